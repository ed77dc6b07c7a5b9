"""StepInput: what a worker unpacks is what rank 0 packed."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockyard.engine.step import StepInput

WIDTHS = {"swap_out": 2, "swap_in": 2, "block_copies": 2, "table_updates": 3}


def arrays(width: int | None) -> st.SearchStrategy[np.ndarray]:
    shape = st.integers(0, 5).map(lambda n: (n,) if width is None else (n, width))
    return hnp.arrays(np.int32, shape)


STEPS = st.builds(
    StepInput,
    num_decodes=st.integers(0, 2**31 - 1),
    **{f.name: arrays(WIDTHS.get(f.name)) for f in fields(StepInput) if f.name != "num_decodes"},
)


@given(STEPS)
def test_unpacking_undoes_packing(step: StepInput) -> None:
    again = StepInput.unpack(step.pack())
    assert again.num_decodes == step.num_decodes
    for field in fields(StepInput):
        before, after = getattr(step, field.name), getattr(again, field.name)
        assert np.array_equal(before, after), field.name
        assert np.shape(before) == np.shape(after), field.name
