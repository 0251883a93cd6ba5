"""The P x K batches hold what the paper says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_core.files import StudyError
from danet_core.sampler import IdentitySampler


def training_set(identities: int, visible: int, infrared: int) -> tuple[np.ndarray, np.ndarray]:
    """pids with gaps, and modalities, in shuffled order."""
    pids = np.repeat(np.arange(identities) * 7 + 3, visible + infrared)
    modalities = np.tile(np.array([0] * visible + [1] * infrared), identities)
    order = np.random.default_rng(0).permutation(len(pids))
    return pids[order], modalities[order]


@settings(max_examples=40, deadline=None)
@given(
    identities=st.integers(2, 30),
    visible=st.integers(1, 9),
    infrared=st.integers(1, 9),
    per_modality=st.integers(1, 5),
    steps=st.integers(1, 12),
    data=st.data(),
)
def test_every_batch_holds_p_identities_with_k_images_of_each_modality(
    identities, visible, infrared, per_modality, steps, data
):
    per_batch = data.draw(st.integers(2, identities))
    pids, modalities = training_set(identities, visible, infrared)
    sampler = IdentitySampler(pids, modalities, per_batch, per_modality)
    batches = sampler.epoch(steps, np.random.default_rng(1))
    assert batches.shape == (steps, per_batch * 2 * per_modality)
    for batch in batches:
        grouped_pids = pids[batch].reshape(per_batch, 2 * per_modality)
        assert (grouped_pids == grouped_pids[:, :1]).all()
        assert len(np.unique(grouped_pids[:, 0])) == per_batch
        grouped_modalities = modalities[batch].reshape(per_batch, 2, per_modality)
        assert (grouped_modalities[:, 0] == 0).all()
        assert (grouped_modalities[:, 1] == 1).all()


def test_images_repeat_in_a_batch_only_when_an_identity_has_too_few():
    pids, modalities = training_set(4, visible=6, infrared=3)
    batch = IdentitySampler(pids, modalities, 4, 4).epoch(1, np.random.default_rng(0))[0].reshape(4, 2, 4)
    assert all(len(set(row)) == 4 for row in batch[:, 0])
    assert all(len(set(row)) == 3 for row in batch[:, 1])


def test_identities_are_seen_equally_often():
    pids, modalities = training_set(12, 4, 4)
    batches = IdentitySampler(pids, modalities, 4, 2).epoch(9, np.random.default_rng(0))
    counts = np.unique(pids[batches], return_counts=True)[1]
    assert len(counts) == 12
    assert counts.min() == counts.max()


def test_the_same_generator_gives_the_same_batches_and_another_does_not():
    sampler = IdentitySampler(*training_set(8, 4, 4), 4, 2)
    first, again, other = (sampler.epoch(5, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_fewer_identities_than_a_batch_holds_is_refused_with_both_numbers():
    with pytest.raises(StudyError, match="at most the 3 training identities, found 4"):
        IdentitySampler(*training_set(3, 2, 2), 4, 2)


def test_an_identity_with_one_modality_is_refused_by_name():
    pids, modalities = np.array([5, 5, 9, 9, 9]), np.array([0, 1, 0, 0, 0])
    with pytest.raises(StudyError, match="training identity 9 has no infrared image"):
        IdentitySampler(pids, modalities, 2, 1)
