"""Augmentation acts on each image by itself and as often as its probability says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danet_core.augment import augment_batch, normalise
from danet_core.config import load_study

AUGMENT = load_study(Path(__file__).parent.parent / "params.yaml").augment
OFF = dataclasses.replace(AUGMENT, flip=0.0, erase=0.0)


def images(batch: int = 8, height: int = 24, width: int = 12) -> torch.Tensor:
    return torch.randint(1, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalising_equals_the_hand_computed_value():
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    expected = [(1 - mean) / std for mean, std in zip(AUGMENT.mean, AUGMENT.std, strict=True)]
    torch.testing.assert_close(normalise(white, AUGMENT)[0, :, 0, 0], torch.tensor(expected))


def test_with_both_probabilities_at_zero_only_normalisation_is_left():
    torch.testing.assert_close(augment_batch(images(), OFF, generator()), normalise(images(), AUGMENT), rtol=0, atol=0)


def test_a_certain_flip_mirrors_every_image_left_to_right():
    flipped = augment_batch(images(), dataclasses.replace(OFF, flip=1.0), generator())
    torch.testing.assert_close(flipped, normalise(images(), AUGMENT).flip(-1), rtol=0, atol=0)


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_flips_and_erasings_happen_as_often_as_their_probability(probability):
    batch = images(4000, 16, 16)
    plain = normalise(batch, AUGMENT)
    flipped = augment_batch(batch, dataclasses.replace(OFF, flip=probability), generator())
    erased = augment_batch(batch, dataclasses.replace(OFF, erase=probability), generator())
    for changed in (flipped, erased):
        share = (changed != plain).flatten(1).any(1).float().mean().item()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_an_erased_box_is_one_rectangle_of_the_channel_mean_within_the_area_and_ratio_bounds():
    height, width = 96, 48
    batch = images(600, height, width)
    out = augment_batch(batch, dataclasses.replace(OFF, erase=1.0), generator())
    plain = normalise(batch, AUGMENT)
    for before, after in zip(plain, out, strict=True):
        changed = (after != before).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box_height, box_width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        box = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == 0).all()
        area, ratio = box_height * box_width / (height * width), box_height / box_width
        assert area < AUGMENT.erase_area[1] * 1.1
        assert area > AUGMENT.erase_area[0] * 0.7 or box_width == width  # a wide box is cut at the image's sides
        assert AUGMENT.erase_ratio[0] * 0.8 < ratio < AUGMENT.erase_ratio[1] * 1.25


def test_images_of_a_batch_are_augmented_independently():
    same = images(1).expand(64, -1, -1, -1).contiguous()
    out = augment_batch(same, AUGMENT, generator())
    assert len(torch.unique(out.flatten(1), dim=0)) > 32


def test_the_same_generator_state_gives_the_same_batch_and_the_input_stays_as_it_was():
    batch = images()
    before = batch.clone()
    first, again, other = (augment_batch(batch, AUGMENT, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(batch, before)


def test_pad_crop_shifts_each_image_by_whole_pixels_and_leaves_black_where_it_does_not_reach():
    pad, height, width = 2, 6, 5
    batch = images(120, height, width)
    out = augment_batch(batch, dataclasses.replace(OFF, pad_crop=pad), generator())
    seen = set()
    for before, after in zip(batch, out, strict=True):
        shifts = []
        for down in range(-pad, pad + 1):
            for right in range(-pad, pad + 1):
                expected = torch.zeros_like(before)
                for y in range(height):
                    for x in range(width):
                        if 0 <= y - down < height and 0 <= x - right < width:
                            expected[:, y, x] = before[:, y - down, x - right]
                if torch.equal(normalise(expected[None], AUGMENT)[0], after):
                    shifts.append((down, right))
        assert len(shifts) == 1  # the bytes are random and above 0, so that no two shifts look alike
        seen.add(shifts[0])
    assert {down for down, _ in seen} == {right for _, right in seen} == set(range(-pad, pad + 1))


def test_pad_crop_draws_after_everything_else_so_that_flips_and_boxes_stay_where_they_are():
    white = torch.full((64, 3, 24, 12), 255, dtype=torch.uint8)
    erased = augment_batch(white, AUGMENT, generator()) == 0
    shifted = augment_batch(white, dataclasses.replace(AUGMENT, pad_crop=2), generator()) == 0
    assert torch.equal(erased, shifted)
    plain, padded = generator(), generator()
    augment_batch(white, AUGMENT, plain), augment_batch(white, dataclasses.replace(AUGMENT, pad_crop=2), padded)
    assert not torch.equal(plain.get_state(), padded.get_state())
    torch.rand(2, 64, generator=plain)
    assert torch.equal(plain.get_state(), padded.get_state())


@given(pad=st.integers(0, 6), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_pad_crop_keeps_the_size_and_invents_no_pixel(pad, height, width, seed):
    batch = images(5, height, width)
    out = augment_batch(batch, dataclasses.replace(OFF, pad_crop=pad), generator(seed))
    assert out.shape == batch.shape
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), AUGMENT).unique().tolist()
    for before, after in zip(normalise(batch, AUGMENT), out, strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist()) | set(black)
