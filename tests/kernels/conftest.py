# mypy: disable-error-code="import-untyped"
"""Makes Triton's tests run wherever there is a Triton, and says so where there is none."""

from __future__ import annotations

import importlib.util
from typing import Any

collect_ignore_glob: list[str] = []

if importlib.util.find_spec("triton") is None:  # torch for CPUs alone comes without it
    collect_ignore_glob.append("test_triton_*.py")
else:
    import triton

    if triton.knobs.runtime.interpret and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        # Older interpreters make loop bounds of one-element arrays, which newer numpy refuses.
        from triton.runtime import interpreter

        _patch_tensor = interpreter._patch_lang_tensor

        def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
            _patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = _patch_tensor_and_index


def pytest_report_header() -> list[str]:
    """One line that no reader of the report can take for tested kernels."""
    return ["Triton is not installed: its kernels are not tested"] if collect_ignore_glob else []
