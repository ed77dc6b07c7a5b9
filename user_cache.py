"""Where this user's caches are: prepared models, their identities, compiled kernels, local runs, the control
plane of the tests.

It stands beside the floors, and below all of them, because each keeps something there.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$BLOCKYARD_CACHE, else ``blockyard`` in $XDG_CACHE_HOME, else ``~/.cache/blockyard``."""
    if given := os.environ.get("BLOCKYARD_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockyard"
