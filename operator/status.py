"""The status of an LLMService, computed from what is there, in this one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .observed import Observed
from .replicas import Action


def compute(observed: Observed, actions: Sequence[Action], previous: Mapping[str, Any]) -> dict[str, Any]:
    """LLMServiceStatus as the API server stores it. ``actions`` are those that have just been carried out.

    Equal to ``previous`` when nothing has changed: write only if it differs.
    """
    raise NotImplementedError


def urgent(status: Mapping[str, Any], previous: Mapping[str, Any]) -> bool:
    """Does it differ in more than load (percentages, running and waiting requests, pool numbers)?

    Load alone changes all the time while requests run: write it at most every few seconds.
    """
    raise NotImplementedError
