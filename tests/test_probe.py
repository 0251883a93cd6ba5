"""The modality probe: chance where nothing tells the modality, one where a direction does, never fitted to its test."""

from __future__ import annotations

import numpy as np
import pytest

from danet_core.files import StudyError
from danet_core.probe import RIDGE, modality_probe


def people(ids: int = 40, images: int = 6, dim: int = 16, gap: float = 0.0, seed: int = 0):
    """Features (N, D) of identities with half of their images infrared, moved by `gap` along one direction."""
    rng = np.random.default_rng(seed)
    pids = np.repeat(np.arange(ids), 2 * images)
    modalities = np.tile(np.repeat([0, 1], images), ids)
    feat = rng.normal(size=(ids, dim))[pids] + 0.1 * rng.normal(size=(len(pids), dim))
    feat[:, 0] += gap * (2 * modalities - 1)
    return feat, pids, modalities


def test_a_feature_without_modality_is_at_chance_and_one_with_a_wide_gap_is_told_always():
    assert modality_probe(*people()) == pytest.approx(0.5, abs=0.06)
    assert modality_probe(*people(gap=20.0)) == 1.0


def test_the_number_grows_with_the_gap():
    found = [modality_probe(*people(gap=gap)) for gap in (0.0, 0.3, 0.6, 1.2, 5.0)]
    assert found == sorted(found) and found[-1] > 0.95


def test_what_is_learnt_of_single_people_does_not_count():
    # Every identity has a private dimension whose sign is the modality: a probe tested on its own people would be right
    # always, and one that must carry over to others has nothing to go by.
    ids, images = 30, 4
    pids = np.repeat(np.arange(ids), 2 * images)
    modalities = np.tile(np.repeat([0, 1], images), ids)
    feat = np.zeros((len(pids), ids))
    feat[np.arange(len(pids)), pids] = 2.0 * modalities - 1
    assert modality_probe(feat, pids, modalities) == 0.5


def test_equal_features_and_identity_features_are_at_exactly_one_half():
    _, pids, modalities = people(ids=6)
    assert modality_probe(np.ones((len(pids), 3)), pids, modalities) == 0.5
    assert modality_probe(np.eye(6)[pids], pids, modalities) == 0.5


def test_modalities_count_alike_however_many_images_each_has():
    feat, pids, modalities = people(gap=0.6)
    few = (modalities == 0) | (np.arange(len(pids)) % 6 == 0)  # one infrared image of each identity
    assert few.sum() < 0.6 * len(few)
    assert modality_probe(feat[few], pids[few], modalities[few]) == pytest.approx(
        modality_probe(feat, pids, modalities), abs=0.05
    )


def test_it_is_the_written_out_ridge_regression():
    feat, pids, modalities = people(ids=10, gap=0.5)
    unit = feat / np.linalg.norm(feat, axis=1, keepdims=True)
    right: dict[int, list[bool]] = {0: [], 1: []}
    for fold in range(5):
        train = pids % 5 != fold
        weight = np.where(
            modalities[train] == 1, 0.5 / (modalities[train] == 1).sum(), 0.5 / (modalities[train] == 0).sum()
        )
        centre = np.average(unit[train], axis=0, weights=weight)
        x = unit[train] - centre
        covariance = np.einsum("n,nd,ne->de", weight, x, x)
        ridge = RIDGE * np.trace(covariance) / len(covariance)
        w = np.linalg.inv(covariance + ridge * np.eye(len(covariance))) @ (x.T @ (weight * (2 * modalities[train] - 1)))
        for row in np.flatnonzero(~train):
            right[int(modalities[row])].append(bool(((unit[row] - centre) @ w > 0) == modalities[row]))
    assert modality_probe(feat, pids, modalities) == pytest.approx((np.mean(right[0]) + np.mean(right[1])) / 2)


def test_order_and_length_of_the_features_do_not_matter():
    feat, pids, modalities = people(gap=0.4)
    order = np.random.default_rng(1).permutation(len(pids))
    scaled = feat * np.random.default_rng(2).uniform(0.1, 9, (len(pids), 1))
    assert modality_probe(scaled[order], pids[order], modalities[order]) == modality_probe(feat, pids, modalities)


def test_what_cannot_be_probed_is_refused():
    feat, pids, modalities = people(ids=4)
    with pytest.raises(StudyError, match="the features hold 1; expected at least 2"):
        modality_probe(feat, np.zeros_like(pids), modalities)
    with pytest.raises(StudyError, match="no infrared image to be fitted to"):
        modality_probe(feat, pids, np.zeros_like(modalities))
