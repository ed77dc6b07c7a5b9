"""The custom resources as pydantic models."""

from .llmservice import *  # noqa: F403
