"""The engine's exception tree.

EngineError
├── ConfigError        a setting cannot work on this machine or with this model
├── RequestError       one request cannot be served; names the field, the limit and the remedy
└── WorkerDied         a tensor-parallel worker process died; the engine cannot continue
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


class ConfigError(EngineError):
    """A setting that cannot work; the message names the setting and what to change."""


class RequestError(EngineError):
    """A request that can never be served here.

    ``field`` is the name of the request's field at fault (OpenAI's ``param``).
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class WorkerDied(EngineError):
    """A tensor-parallel worker is gone, so no further step can be computed."""
