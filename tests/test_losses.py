from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danet_core import losses, slow
from danet_core.files import StudyError

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "losses_expected.json").read_text())
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def bare(function: Callable) -> Callable:
    """The function without the shape check that conftest.py puts before it: what a user's wrong call meets."""
    return inspect.unwrap(function)


def golden_batch(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    with np.load(GOLDEN / "losses.npz") as arrays:
        feat, w_visible, w_infrared = (
            torch.from_numpy(arrays[f"{name}_{key}"]).to(dtype) for key in ("feat", "w_visible", "w_infrared")
        )
        labels, modalities = (torch.from_numpy(arrays[f"{name}_{key}"]) for key in ("id", "modality"))
    return feat, labels, modalities, feat @ w_visible.T, feat @ w_infrared.T


def random_batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Identities with 1 to 4 images in each modality, shuffled; label numbers with gaps."""
    generator = torch.Generator().manual_seed(seed)
    labels, modalities = [], []
    for pid in (2, 5, 6, 11):
        for modality in (0, 1):
            count = int(torch.randint(1, 5, (), generator=generator))
            labels += [pid] * count
            modalities += [modality] * count
    shuffle = torch.randperm(len(labels), generator=generator)
    feat = torch.randn(len(labels), 6, generator=generator, dtype=dtype) / 3
    return feat, torch.tensor(labels)[shuffle], torch.tensor(modalities)[shuffle]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["even", "uneven"])
def test_losses_equal_the_golden_values(name: str, dtype: torch.dtype) -> None:
    feat, labels, modalities, visible, infrared = golden_batch(name, dtype)
    found = {
        "eq1": losses.triplet_loss(feat, labels, 0.7),
        "eq2": losses.cross_modality_triplet_loss(feat, labels, modalities, 0.7),
        "eq3_literal": losses.cross_modality_center_loss(feat, labels, modalities),
        "eq3_prose": losses.cross_modality_center_loss(feat, labels, modalities, negatives="center"),
        "eq4": losses.modality_identity_loss(visible, infrared, labels, modalities),
        "eq5": losses.mutual_learning_loss(visible, infrared, modalities),
    }
    for key, value in found.items():
        expected = EXPECTED[name][key]
        expected = expected["total"] if isinstance(expected, dict) else expected
        assert value.dtype == dtype
        assert float(value) == pytest.approx(expected, abs=TOLERANCE[dtype]), key
    for negatives, key in (("anchor", "eq3_literal"), ("center", "eq3_prose")):
        terms = losses.cross_modality_center_terms(feat, labels, modalities, 0.7, negatives)
        assert float(terms.pull) == pytest.approx(EXPECTED[name][key]["pull"], abs=TOLERANCE[dtype])
        assert float(terms.push) == pytest.approx(EXPECTED[name][key]["push"], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("margin", [0.3, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_metric_losses_and_gradients_equal_the_slow_loops(seed: int, margin: float) -> None:
    feat, labels, modalities = random_batch(seed)
    pairs = [
        (lambda f: losses.triplet_loss(f, labels, margin), lambda f: slow.eq1(f, labels, margin)),
        (
            lambda f: losses.cross_modality_triplet_loss(f, labels, modalities, margin),
            lambda f: slow.eq2(f, labels, modalities, margin),
        ),
        (
            lambda f: losses.cross_modality_center_loss(f, labels, modalities, margin),
            lambda f: slow.eq3(f, labels, modalities, margin, "anchor"),
        ),
        (
            lambda f: losses.cross_modality_center_loss(f, labels, modalities, margin, "center"),
            lambda f: slow.eq3(f, labels, modalities, margin, "center"),
        ),
    ]
    for fast, loops in pairs:
        mine, theirs = feat.clone().requires_grad_(), feat.clone().requires_grad_()
        value, expected = fast(mine), loops(theirs)
        value.backward(), expected.backward()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("negatives", ["anchor", "center"])
def test_with_fixed_centres_value_and_gradient_equal_the_slow_loops(negatives: str) -> None:
    feat, labels, modalities = random_batch(5)
    mine, theirs, through = (feat.clone().requires_grad_() for _ in range(3))
    value = losses.cross_modality_center_loss(mine, labels, modalities, 1.5, negatives, center_gradient=False)
    expected = slow.eq3(theirs, labels, modalities, 1.5, negatives, center_gradient=False)
    printed = losses.cross_modality_center_loss(through, labels, modalities, 1.5, negatives)
    value.backward(), expected.backward(), printed.backward()
    assert torch.equal(value, printed)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    assert (mine.grad - through.grad).abs().max() > 1e-3


@pytest.mark.parametrize("direction", ["foreign_own", "own_foreign"])
@pytest.mark.parametrize(
    ("gradient", "averages"),
    [("both", False), ("own", False), ("foreign", False), ("both", True), ("own", True)],
)
def test_every_reading_of_mutual_learning_equals_the_slow_loops(gradient: str, averages: bool, direction: str) -> None:
    _, labels, modalities = random_batch(1)
    visible, infrared, *others = four_logits(len(labels))
    averaged = tuple(others) if averages else None
    mine, theirs = ([part.clone().requires_grad_() for part in (visible, infrared)] for _ in range(2))
    value = losses.mutual_learning_loss(*mine, modalities, gradient, direction, averaged)
    expected = slow.eq5(*theirs, modalities, gradient, direction, averaged)
    value.backward(), expected.backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    for found, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-12)


def four_logits(count: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(count, 12, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("seed", range(4))
def test_classifier_losses_and_gradients_equal_the_slow_loops(seed: int) -> None:
    _, labels, modalities = random_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(len(labels), 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    pairs = [
        (
            lambda v, r: losses.modality_identity_loss(v, r, labels, modalities),
            lambda v, r: slow.eq4(v, r, labels, modalities),
        ),
        (lambda v, r: losses.mutual_learning_loss(v, r, modalities), lambda v, r: slow.eq5(v, r, modalities)),
    ]
    for fast, loops in pairs:
        mine, theirs = ([part.clone().requires_grad_() for part in logits] for _ in range(2))
        value, expected = fast(*mine), loops(*theirs)
        value.backward(), expected.backward()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        for found, wanted in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-12)


def test_metric_losses_on_a_batch_worked_out_by_hand() -> None:
    # On a line: identity 0 visible at 0 and 2, infrared at 3; identity 1 visible at 10, infrared at 12. Margin 8.
    feat = torch.tensor([[0.0], [2.0], [3.0], [10.0], [12.0]])
    labels, modalities = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 1])
    # Eq. 1: farthest own, nearest other: (3, 10) (2, 8) (3, 7) (2, 7) (2, 9) -> 1 + 2 + 4 + 3 + 1 = 11
    assert float(losses.triplet_loss(feat, labels, 8.0)) == pytest.approx(11 / 5)
    # Eq. 2: (3, 12) (1, 10) (3, 7) (2, 7) (2, 10) -> 0 + 0 + 4 + 3 + 0 = 7
    assert float(losses.cross_modality_triplet_loss(feat, labels, modalities, 8.0)) == pytest.approx(7 / 5)
    # Eq. 3: centres 3, 3, 1, 12, 10 -> pull 3 + 1 + 2 + 2 + 2 = 10
    # push as printed, from the centre to the anchor's modality: 7, 7, 11, 10, 7 -> 1 + 1 + 0 + 0 + 1 = 3
    terms = losses.cross_modality_center_terms(feat, labels, modalities, 8.0)
    assert [float(term) for term in terms] == pytest.approx([10 / 5, 3 / 5])
    # push as the prose says, within the centre's modality: 9, 9, 9, 9, 8 -> 0
    terms = losses.cross_modality_center_terms(feat, labels, modalities, 10.0, "center")
    assert [float(term) for term in terms] == pytest.approx([10 / 5, (1 + 1 + 1 + 1 + 2) / 5])


def test_classifier_losses_on_a_batch_worked_out_by_hand() -> None:
    # Two classes; log-odds chosen so that C_v says 3/4, 1/4 and C_r says 1/2, 1/2 everywhere.
    visible = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1)
    infrared = torch.zeros(3, 2)
    labels, modalities = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    # Eq. 4: visible (-log 3/4 - log 1/4) / 2, infrared -log 1/2
    expected = (-math.log(3 / 4) - math.log(1 / 4)) / 2 - math.log(1 / 2)
    assert float(losses.modality_identity_loss(visible, infrared, labels, modalities)) == pytest.approx(expected)
    # Eq. 5: visible KL(C_r || C_v) = 1/2 log 2/3 + 1/2 log 2, infrared KL(C_v || C_r) = 3/4 log 3/2 + 1/4 log 1/2
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2) + 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert float(losses.mutual_learning_loss(visible, infrared, modalities)) == pytest.approx(expected)


def test_reversed_and_averaged_mutual_learning_on_a_batch_worked_out_by_hand() -> None:
    # C_v says 3/4, 1/4 and C_r says 1/2, 1/2 of both images; the averaged C_v says 1/4, 3/4, the averaged C_r 1/2, 1/2.
    visible, infrared = torch.tensor([[math.log(3.0), 0.0]]).repeat(2, 1), torch.zeros(2, 2)
    # KL(C_v || C_r) of the visible image, KL(C_r || C_v) of the infrared one
    expected = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    found = losses.mutual_learning_loss(visible, infrared, torch.tensor([0, 1]), direction="own_foreign")
    assert float(found) == pytest.approx(expected)
    # visible: own C_v, foreign the averaged C_r, 1/2 log 2/3 + 1/2 log 2; infrared: own C_r, foreign the averaged C_v
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2) + 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    averaged = (visible.flip(1), infrared)
    found = losses.mutual_learning_loss(visible, infrared, torch.tensor([0, 1]), averaged=averaged)
    assert float(found) == pytest.approx(expected)


def test_what_is_held_fixed_in_mutual_learning_gets_no_gradient() -> None:
    _, _, modalities, *_ = golden_batch("uneven", torch.float64)
    logits, seen = four_logits(len(modalities)), modalities == 0
    for gradient, averages in (("own", False), ("foreign", False), ("both", True), ("own", True)):
        visible, infrared, *averaged = (part.clone().requires_grad_() for part in logits)
        losses.mutual_learning_loss(
            visible, infrared, modalities, gradient, averaged=tuple(averaged) if averages else None
        ).backward()
        own = seen if gradient != "foreign" else ~seen  # rows of C_v that learn; those of C_r are the others
        assert torch.equal(visible.grad.abs().sum(1) > 0, own)
        assert torch.equal(infrared.grad.abs().sum(1) > 0, ~own)
        assert all(part.grad is None for part in averaged)


def test_a_fixed_centre_moves_only_the_feature_that_is_pulled_to_it() -> None:
    feat = torch.tensor([[0.0], [2.0], [50.0], [51.0]], dtype=torch.float64, requires_grad=True)
    labels, modalities = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    losses.cross_modality_center_terms(feat, labels, modalities, center_gradient=False).pull.backward()
    assert feat.grad[0].item() == pytest.approx(-0.25)  # half of what it is through the centres, see below


@given(
    seed=st.integers(0, 10_000), scale=st.floats(0.01, 20), direction=st.sampled_from(["foreign_own", "own_foreign"])
)
@settings(max_examples=30)
def test_mutual_learning_is_never_negative_and_its_two_gradients_add_up(seed, scale, direction) -> None:
    modalities = torch.tensor([0, 1, 1, 0, 1])
    visible, infrared, *_ = (scale * part for part in four_logits(5, seed))
    gradients, values = {}, {}
    for gradient in ("both", "own", "foreign"):
        leaves = [part.clone().requires_grad_() for part in (visible, infrared)]
        values[gradient] = losses.mutual_learning_loss(*leaves, modalities, gradient, direction)
        gradients[gradient] = torch.stack(torch.autograd.grad(values[gradient], leaves))
    assert values["both"] >= -1e-12
    assert values["both"] == values["own"] == values["foreign"]
    torch.testing.assert_close(gradients["own"] + gradients["foreign"], gradients["both"], rtol=1e-9, atol=1e-9)
    # reversed is the same as printed with the classifiers' names exchanged
    other = {"foreign_own": "own_foreign", "own_foreign": "foreign_own"}[direction]
    swapped = losses.mutual_learning_loss(infrared, visible, modalities, direction=other)
    torch.testing.assert_close(swapped, values["both"], rtol=1e-9, atol=1e-12)


def test_a_feature_on_its_centre_has_a_finite_gradient_of_zero() -> None:
    feat = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0], [9.0, 0.0]], requires_grad=True)
    labels, modalities = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    for loss in (
        losses.triplet_loss(feat, labels, 0.7),
        losses.cross_modality_triplet_loss(feat, labels, modalities, 0.7),
        losses.cross_modality_center_loss(feat, labels, modalities),
    ):
        (gradient,) = torch.autograd.grad(loss, feat)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(feat))


def test_identical_features_of_all_identities_give_the_margin_and_a_zero_gradient() -> None:
    feat = torch.ones(8, 5, requires_grad=True)
    labels, modalities = torch.arange(8) // 4, torch.arange(8) % 2
    loss = losses.cross_modality_center_loss(feat, labels, modalities, 0.7)
    (gradient,) = torch.autograd.grad(loss, feat)
    assert loss.item() == pytest.approx(0.7)
    assert torch.equal(gradient, torch.zeros_like(feat))


@pytest.mark.parametrize("name", ["offset", "modality gap", "tight identities"])
def test_float32_chooses_the_right_pairs_where_squares_would_cancel(name: str) -> None:
    feat, labels, modalities = random_batch(7, torch.float32)
    if name == "offset":
        feat = feat + 1000.0
    elif name == "modality gap":
        feat = feat + 300.0 * modalities[:, None]
    else:
        feat = 1e-4 * feat + labels[:, None]
    exact = feat.double()  # the same numbers, so only arithmetic differs
    for found, expected in (
        (losses.triplet_loss(feat, labels, 4.0), slow.eq1(exact, labels, 4.0)),
        (losses.cross_modality_triplet_loss(feat, labels, modalities, 4.0), slow.eq2(exact, labels, modalities, 4.0)),
        (
            losses.cross_modality_center_terms(feat, labels, modalities, 4.0).push,
            slow.mean([term.push for term in slow.center_terms(exact, labels, modalities, 4.0)]),
        ),
    ):
        assert float(found) == pytest.approx(float(expected), rel=1e-5, abs=2e-4 if name == "offset" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_is_computed_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    feat, labels, modalities, visible, infrared = (
        part.to(dtype) if part.is_floating_point() else part for part in golden_batch("uneven", torch.float32)
    )
    calls = [
        (losses.triplet_loss, (feat,), (labels, 0.7)),
        (losses.cross_modality_triplet_loss, (feat,), (labels, modalities, 0.7)),
        (losses.cross_modality_center_loss, (feat,), (labels, modalities)),
        (losses.modality_identity_loss, (visible, infrared), (labels, modalities)),
        (losses.mutual_learning_loss, (visible, infrared), (modalities,)),
    ]
    for function, values, rest in calls:
        exact = function(*(value.double() for value in values), *rest)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(*values, *rest)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(exact), abs=1e-5), function.__name__


def test_mutual_learning_is_finite_for_extreme_logits() -> None:
    visible = torch.tensor([[1e4, 0.0, -1e4], [-1e30, 0.0, 1e30]], requires_grad=True)
    infrared = torch.tensor([[-1e4, 0.0, 1e4], [-1e30, 0.0, 1e30]], requires_grad=True)
    loss = losses.mutual_learning_loss(visible, infrared, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(
        2e4
    )  # C_r is sure of the class that C_v gives log-probability -2e4; row 2 agrees
    assert visible.grad.isfinite().all() and infrared.grad.isfinite().all()


def test_mutual_learning_is_zero_where_the_classifiers_agree_up_to_a_constant() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    loss = losses.mutual_learning_loss(logits, logits + 5, torch.tensor([0, 0, 1, 1, 0, 1]))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_mutual_learning_teaches_both_classifiers_from_both_modalities() -> None:
    _, _, modalities, visible, infrared = golden_batch("uneven", torch.float64)
    visible.requires_grad_(), infrared.requires_grad_()
    losses.mutual_learning_loss(visible, infrared, modalities).backward()
    assert (visible.grad.abs().sum(1) > 0).all() and (infrared.grad.abs().sum(1) > 0).all()


def test_each_classifier_learns_identity_from_its_own_modality_only() -> None:
    _, labels, modalities, visible, infrared = golden_batch("uneven", torch.float64)
    visible.requires_grad_(), infrared.requires_grad_()
    losses.modality_identity_loss(visible, infrared, labels, modalities).backward()
    assert torch.equal(visible.grad.abs().sum(1) > 0, modalities == 0)
    assert torch.equal(infrared.grad.abs().sum(1) > 0, modalities == 1)


def test_gradient_of_the_centre_loss_flows_through_the_centres() -> None:
    feat = torch.tensor([[0.0], [2.0], [50.0], [51.0]], dtype=torch.float64, requires_grad=True)
    labels, modalities = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    losses.cross_modality_center_terms(feat, labels, modalities).pull.backward()
    # |f0 - f1| occurs twice among four anchors, once with f0 as the feature and once as the centre: -2/4, not -1/4
    assert feat.grad[0].item() == pytest.approx(-0.5)


def test_order_of_the_batch_and_names_of_the_labels_do_not_matter() -> None:
    feat, labels, modalities = random_batch(3)
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for negatives in ("anchor", "center"):
        first = losses.cross_modality_center_loss(feat, labels, modalities, 0.7, negatives)
        second = losses.cross_modality_center_loss(
            feat[shuffle], 1000 - labels[shuffle], modalities[shuffle], 0.7, negatives
        )
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_and_modalities_may_have_any_integer_type(dtype: torch.dtype) -> None:
    feat, labels, modalities, visible, infrared = golden_batch("even", torch.float64)
    narrow = labels.to(dtype), modalities.to(dtype)
    for function, values in (
        (losses.cross_modality_center_loss, (feat,)),
        (losses.modality_identity_loss, (visible, infrared)),
    ):
        assert torch.equal(function(*values, *narrow), function(*values, labels, modalities))


def test_repeated_calls_give_the_same_gradient_bit_for_bit_on_several_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    feat = torch.randn(128, 512, generator=generator).requires_grad_()
    labels, modalities = torch.arange(128) // 8, torch.arange(128) % 2
    gradients = [
        torch.autograd.grad(losses.cross_modality_center_loss(feat, labels, modalities, 99.0), feat)[0]
        for _ in range(5)
    ]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_gives_a_loss_that_is_not_finite(value: float) -> None:
    feat, labels, modalities = random_batch(0)
    feat[2, 1] = value
    assert not losses.triplet_loss(feat, labels, 0.7).isfinite()
    assert not losses.cross_modality_triplet_loss(feat, labels, modalities, 0.7).isfinite()
    assert not losses.cross_modality_center_loss(feat, labels, modalities).isfinite()


FEAT = torch.arange(8.0).reshape(4, 2)
Y, S = torch.tensor([7, 7, 9, 9]), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.triplet_loss(FEAT, torch.full((4,), 7), 0.7), "label 7 .* no other identity"),
        (lambda: losses.triplet_loss(FEAT[:1], Y[:1], 0.7), "label 7 .* no other identity"),
        (lambda: losses.cross_modality_triplet_loss(FEAT, torch.full((4,), 7), S, 0.7), "label 7 has no negative"),
        (
            lambda: losses.cross_modality_triplet_loss(FEAT, Y, torch.tensor([0, 1, 1, 1]), 0.7),
            "label 9 .* one modality",
        ),
        (lambda: losses.cross_modality_center_loss(FEAT, torch.full((4,), 7), S), "label 7 has no negative"),
        (lambda: losses.cross_modality_center_loss(FEAT[:1], Y[:1], S[:1]), "label 7 .* one modality"),
        (lambda: losses.cross_modality_center_loss(FEAT, Y, torch.tensor([0, 0, 0, 1])), "label 7 .* one modality"),
        (lambda: losses.cross_modality_center_loss(FEAT, Y, torch.tensor([0, 2, 0, 1])), "modality 2 is neither"),
        (lambda: losses.modality_identity_loss(FEAT, FEAT, Y, S), "label 7 is no class .* 2 outputs"),
        (lambda: losses.modality_identity_loss(FEAT, FEAT, torch.tensor([0, 1, -100, 0]), S), "label -100 is no class"),
        (lambda: losses.modality_identity_loss(FEAT, FEAT, S, torch.zeros_like(S)), "modality 0 is the only one"),
        (lambda: losses.mutual_learning_loss(FEAT, FEAT, torch.ones_like(S)), "modality 1 is the only one"),
        (lambda: losses.mutual_learning_loss(FEAT, FEAT, torch.tensor([0, 1, 5, 1])), "modality 5 is neither"),
        (lambda: bare(losses.triplet_loss)(FEAT, Y[:3], 0.7), r"labels must have shape \(4,\).* found \(3,\)"),
        (lambda: bare(losses.triplet_loss)(FEAT[0], Y, 0.7), r"\(B, D\) matrix, found shape \(2,\)"),
        (lambda: losses.triplet_loss(FEAT[:0], Y[:0], 0.7), r"non-empty .* found shape \(0, 2\)"),
        (lambda: bare(losses.cross_modality_center_terms)(FEAT, Y, S[:2]), r"modalities must have shape \(4,\)"),
        (
            lambda: bare(losses.cross_modality_center_terms)(FEAT, Y, S, 0.7, "centre"),
            "'anchor' .* 'center' .* 'centre'",
        ),
        (lambda: bare(losses.mutual_learning_loss)(FEAT, FEAT[:, :1], S), "must have one shape"),
        (lambda: bare(losses.mutual_learning_loss)(FEAT, FEAT, S, averaged=(FEAT, FEAT[:1])), "must have one shape"),
        (
            lambda: bare(losses.mutual_learning_loss)(FEAT, FEAT, S, "none"),
            "gradient must be one of both, own, foreign",
        ),
        (lambda: bare(losses.mutual_learning_loss)(FEAT, FEAT, S, direction="away"), "direction must be one of"),
        (
            lambda: losses.mutual_learning_loss(FEAT, FEAT, S, "foreign", averaged=(FEAT, FEAT)),
            "nothing learns with gradient 'foreign'",
        ),
        (lambda: bare(losses.mutual_learning_loss)(FEAT, FEAT, S[:3]), r"modalities must have shape \(4,\)"),
    ],
)
def test_a_wrong_batch_is_refused_with_a_sentence_that_names_it(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        call()


def test_a_single_identity_has_no_negative_in_either_reading_of_the_centre_loss() -> None:
    feat, labels, modalities = FEAT[:2], Y[:2], S[:2]
    for negatives in ("anchor", "center"):
        with pytest.raises(StudyError, match=f"label 7 has no negative.* modality of the {negatives}"):
            losses.cross_modality_center_loss(feat, labels, modalities, 0.7, negatives)


COMPILED = """
import torch
from danet_core import losses as L
torch.manual_seed(0)
feat, a, b = (torch.randn(16, n, requires_grad=True) for n in (5, 4, 4))
y, s = torch.arange(16) // 4, torch.arange(16) % 2
for function, values, rest in [
    (L.triplet_loss, (feat,), (y, 0.7)),
    (L.cross_modality_triplet_loss, (feat,), (y, s, 0.7)),
    (L.cross_modality_center_loss, (feat,), (y, s)),
    (L.modality_identity_loss, (a, b), (y, s)),
    (L.mutual_learning_loss, (a, b), (s,)),
]:
    compiled = torch.compile(function, fullgraph=True, backend="eager")  # fullgraph: a graph break is an error
    plain, graph = function(*values, *rest), compiled(*values, *rest)
    torch.testing.assert_close(graph, plain)
    torch.testing.assert_close(torch.autograd.grad(graph, values), torch.autograd.grad(plain, values))
try:
    torch.compile(L.triplet_loss, fullgraph=True, backend="eager")(feat, torch.zeros_like(y), 0.7)
except RuntimeError as error:
    print("refused:", error)
"""


def test_losses_compile_without_a_graph_break_and_still_refuse_a_wrong_batch() -> None:
    # In a process of its own: the shape checks of conftest.py would be in the graph here.
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused: a label of the batch has no negative" in done.stdout


@pytest.mark.gpu
def test_losses_on_cuda_equal_the_golden_values_without_synchronising() -> None:
    batch = [part.cuda() for part in golden_batch("uneven", torch.float32)]
    feat, labels, modalities, visible, infrared = batch
    feat.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            losses.triplet_loss(feat, labels, 0.7),
            losses.cross_modality_triplet_loss(feat, labels, modalities, 0.7),
            losses.cross_modality_center_loss(feat, labels, modalities),
            losses.modality_identity_loss(visible, infrared, labels, modalities),
            losses.mutual_learning_loss(visible, infrared, modalities),
        ]
        torch.stack(found[:3]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [EXPECTED["uneven"][key] for key in ("eq1", "eq2", "eq3_literal", "eq4", "eq5")]
    expected[2] = expected[2]["total"]
    assert [float(value) for value in found] == pytest.approx(expected, abs=1e-5)
    assert feat.grad.isfinite().all()
