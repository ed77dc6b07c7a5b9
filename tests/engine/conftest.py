"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine

from .oracle import MakeEngine, OracleRunner


@pytest.fixture
def oracle_engine() -> MakeEngine:
    """Builds an engine around the oracle; keywords are EngineConfig's and the sizes below."""

    def make(
        *,
        num_blocks: int = 64,
        block_tokens: int = 4,
        host_blocks: int = 0,
        max_num_seqs: int = 8,
        max_batch_tokens: int = 32,
        **settings: object,
    ) -> Engine:
        runner = OracleRunner(
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            host_blocks=host_blocks,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
        )
        config = EngineConfig(model="oracle", block_tokens=block_tokens, **settings)  # type: ignore[arg-type]
        return Engine(config, runner)

    return make
