"""Without CUDA, Triton kernels are tested in Triton's interpreter.

Triton decides that when it is first imported, and several libraries import it; so it is said here, before
any test module is loaded.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
