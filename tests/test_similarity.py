"""What rankings are made of: equal rows are found whatever they begin with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danet_core.similarity import first_equal


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 3),
    values=st.sampled_from([1, 2, 100]),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_first_equal_row_is_the_first_with_the_same_bytes(
    rows: int, columns: int, values: int, seed: int, dtype: type
) -> None:
    feat = np.random.default_rng(seed).integers(0, values, (rows, columns)).astype(dtype)
    content = [row.tobytes() for row in feat]
    assert first_equal(feat).tolist() == [content.index(one) for one in content]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_and_minus_zero_are_different_bytes(dtype: type) -> None:
    assert first_equal(np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, 1.0]], dtype)).tolist() == [0, 1, 0]
