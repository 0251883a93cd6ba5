"""Batches hold what the paper says, and augmentation acts on each image by itself as often as its share says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_study.config import load_study
from danet_study.data import PKSampler, TrainingImages, augment_batch, normalize
from danet_study.files import StudyError
from danet_study.store import PackedStore
from tests.stores import PARAMS, make_store

AUGMENT = load_study(PARAMS).run("sysu-1", "baseline", 0).recipe.augment
OFF = AUGMENT.model_copy(update={"flip": 0.0, "erase": 0.0})


def training_set(identities: int, visible: int, infrared: int) -> tuple[np.ndarray, np.ndarray]:
    """pids with gaps, and modalities, in shuffled order."""
    pids = np.repeat(np.arange(identities) * 7 + 3, visible + infrared)
    modalities = np.tile(np.array([0] * visible + [1] * infrared), identities)
    order = np.random.default_rng(0).permutation(len(pids))
    return pids[order], modalities[order]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 20), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.data())
def test_every_batch_holds_p_identities_with_k_images_of_each_modality(ids, visible, infrared, k, steps, data):
    p = data.draw(st.integers(2, ids))
    pids, modalities = training_set(ids, visible, infrared)
    batches = PKSampler(pids, modalities, p, k).epoch(steps, np.random.default_rng(1))
    assert batches.shape == (steps, p * 2 * k)
    for batch in batches:
        grouped, (by_visible, by_infrared) = (
            pids[batch].reshape(p, 2 * k),
            modalities[batch].reshape(p, 2, k).swapaxes(0, 1),
        )
        assert (grouped == grouped[:, :1]).all() and len(np.unique(grouped)) == p
        assert (by_visible == 0).all() and (by_infrared == 1).all()
        distinct = [[len(set(one)) for one in group] for group in batch.reshape(p, 2, k).tolist()]
        assert distinct == [[min(k, visible), min(k, infrared)]] * p  # images repeat only where there are too few


def test_identities_are_seen_equally_often_and_the_order_depends_on_the_generator_alone():
    pids, modalities = training_set(12, 4, 4)
    sampler = PKSampler(pids, modalities, 4, 2)
    first, again, other = (sampler.epoch(9, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert len(set(np.unique(pids[first], return_counts=True)[1])) == 1
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_too_few_identities_or_an_identity_of_one_modality_are_refused_with_the_number():
    with pytest.raises(StudyError, match=r"4.* 3 "):
        PKSampler(*training_set(3, 2, 2), 4, 2)
    with pytest.raises(StudyError, match="9"):
        PKSampler(np.array([5, 5, 9, 9, 9]), np.array([0, 1, 0, 0, 0]), 2, 1)


def test_training_images_are_those_of_the_training_splits_with_classes_in_the_order_of_pids(tmp_path):
    store = PackedStore.open(make_store(tmp_path / "synth_sysu"))
    images = TrainingImages(store, ["train"], 1, torch.device("cpu"))
    assert images.n_classes == 6 and set(images.pids) == {1, 3, 5, 7, 9, 11}
    positions = np.random.default_rng(0).integers(0, len(images.pids), (2, 5))
    for row, batch in zip(positions, images.batches(positions), strict=True):
        assert torch.equal(batch.images, torch.from_numpy(store.images[images.rows[row]]))
        assert batch.labels.tolist() == ((images.pids[row] - 1) // 2).tolist()
        assert batch.modalities.tolist() == store.modalities[images.rows[row]].tolist()


def bytes_of(batch: int = 8, height: int = 24, width: int = 12) -> torch.Tensor:
    return torch.randint(1, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def augmented(images: torch.Tensor, seed: int = 0, **changed: object) -> torch.Tensor:
    return augment_batch(images, OFF.model_copy(update=changed), torch.Generator().manual_seed(seed))


def test_normalizing_equals_the_value_computed_by_hand():
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    expected = [(1 - mean) / std for mean, std in zip(AUGMENT.mean, AUGMENT.std, strict=True)]
    torch.testing.assert_close(normalize(white, AUGMENT)[0, :, 0, 0], torch.tensor(expected))


def test_without_augmentation_images_are_normalized_and_a_certain_flip_mirrors_all():
    assert torch.equal(augmented(bytes_of()), normalize(bytes_of(), AUGMENT))
    assert torch.equal(augmented(bytes_of(), flip=1.0), normalize(bytes_of(), AUGMENT).flip(-1))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_flips_and_erased_boxes_are_as_frequent_as_their_share(share):
    images = bytes_of(4000, 16, 16)
    plain = normalize(images, AUGMENT)
    for changed in (augmented(images, flip=share), augmented(images, erase=share)):
        found = (changed != plain).flatten(1).any(1).float().mean().item()
        assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_an_erased_box_is_one_rectangle_of_the_channel_mean_within_bounds_of_area_and_ratio():
    height, width = 96, 48
    images = bytes_of(400, height, width)
    for before, after in zip(normalize(images, AUGMENT), augmented(images, erase=1.0), strict=True):
        changed = (after != before).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == 0).all()
        area, ratio = box[0].numel() / (height * width), box.shape[1] / box.shape[2]
        assert AUGMENT.erase_area[0] * 0.8 < area < AUGMENT.erase_area[1] * 1.1  # sides are rounded to pixels
        assert AUGMENT.erase_ratio[0] * 0.8 < ratio < AUGMENT.erase_ratio[1] * 1.25


def test_no_box_is_erased_where_none_fits():
    images = bytes_of(200, 32, 32)
    assert torch.equal(augmented(images, erase=1.0, erase_area=(0.9, 1.0), erase_ratio=(3.0, 3.3)), augmented(images))


def test_images_of_a_batch_are_augmented_independently_and_equally_for_equal_generators():
    same = bytes_of(1).expand(64, -1, -1, -1).contiguous()
    changes = {"flip": 0.5, "erase": 0.5, "pad_crop": 3}
    first, again, other = (augmented(same, seed, **changes) for seed in (1, 1, 2))
    assert len(torch.unique(first.flatten(1), dim=0)) > 32
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(same, bytes_of(1).expand(64, -1, -1, -1))  # the input is unchanged


def test_pad_crop_changes_neither_which_images_are_flipped_nor_the_boxes():
    white = torch.full((64, 3, 24, 12), 255, dtype=torch.uint8)
    plain, moved = (augmented(white, flip=0.5, erase=1.0, pad_crop=pad, pad_value=255) for pad in (0, 4))
    assert torch.equal(plain, moved)


@pytest.mark.parametrize("value", [0, 127])
def test_pad_crop_moves_each_image_by_whole_pixels_within_the_bounds(value):
    pad, height, width = 2, 6, 5
    images = bytes_of(120, height, width)
    padded = torch.full((120, 3, height + 2 * pad, width + 2 * pad), value, dtype=torch.uint8)
    padded[:, :, pad:-pad, pad:-pad] = images
    seen = set()
    for number, after in enumerate(augmented(images, pad_crop=pad, pad_value=value)):
        moves = [
            (top, left)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            if torch.equal(
                normalize(padded[number : number + 1, :, top : top + height, left : left + width], AUGMENT)[0], after
            )
        ]
        assert len(moves) == 1
        seen.add(moves[0])
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(2 * pad + 1))
