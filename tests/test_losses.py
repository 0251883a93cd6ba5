"""The losses equal the paper's equations: stored values, loops over images, and what must not matter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from danet_core import losses
from danet_core.losses import (
    check_terms,
    cross_modality_center_loss,
    cross_modality_triplet_loss,
    find_term,
    modality_identity_loss,
    mutual_learning_loss,
    triplet_loss,
    weighted_sum,
)
from danet_core.model import DANet
from danet_study.config import load_study
from danet_study.determinism import deterministic
from tests.stores import PARAMS

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "losses_expected.json").read_text())

# The equations as loops over images. Gradient flows through all of it.


def distance(a: Tensor, b: Tensor) -> Tensor:
    square = ((a - b) ** 2).sum()
    return square.sqrt() if square > 0 else square.detach()  # a zero distance has no gradient


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def slow_triplet(feat, labels, margin, modalities=None) -> Tensor:
    y, s = labels.tolist(), None if modalities is None else modalities.tolist()
    terms = []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if s is None or s[i] != s[j]]
        nearest = min((distance(feat[i], feat[k]) for k in others if y[i] != y[k]), key=Tensor.item)
        farthest = max((distance(feat[i], feat[j]) for j in others if y[i] == y[j]), key=Tensor.item)
        terms.append((margin - nearest + farthest).clamp(min=0))
    return mean(terms)


def slow_center(feat, labels, modalities, margin, negatives="anchor", center_gradient=True) -> Tensor:
    y, s = labels.tolist(), modalities.tolist()
    terms = []
    for i in range(len(y)):
        members = [feat[j] for j in range(len(y)) if y[i] == y[j] and s[i] != s[j]]
        center = sum(members) / len(members)
        center = center if center_gradient else center.detach()
        others = [k for k in range(len(y)) if y[i] != y[k] and (s[i] == s[k]) == (negatives == "anchor")]
        nearest = min((distance(center, feat[k]) for k in others), key=Tensor.item)
        terms.append(distance(feat[i], center) + (margin - nearest).clamp(min=0))
    return mean(terms)


def slow_identity(visible, infrared, labels, modalities) -> Tensor:
    total = 0
    for modality, logits in enumerate((visible, infrared)):
        rows = [i for i in range(len(labels)) if modalities[i] == modality]
        total = total + mean([-(logits[i].exp() / logits[i].exp().sum())[labels[i]].log() for i in rows])
    return total


def slow_mutual(visible, infrared, modalities, gradient="both", direction="cross_same", teachers=None) -> Tensor:
    heads, total = (visible, infrared), 0
    for modality in (0, 1):
        terms = []
        for i in [i for i in range(len(modalities)) if modalities[i] == modality]:
            same, cross = heads[modality][i], (teachers or heads)[1 - modality][i]
            same = same.detach() if gradient == "cross" else same
            cross = cross.detach() if gradient == "same" or teachers else cross
            p, q = (values.exp() / values.exp().sum() for values in (cross, same))
            p, q = (p, q) if direction == "cross_same" else (q, p)
            terms.append(torch.stack([p[c] * (p[c] / q[c]).log() for c in range(len(p))]).sum())
        total = total + mean(terms)
    return total


def golden_batch(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """feat, labels, modalities, logits of C_v, logits of C_r."""
    with np.load(GOLDEN / "losses.npz") as arrays:
        names = ("feat", "w_visible", "w_infrared")
        feat, visible, infrared = (torch.from_numpy(arrays[f"{name}_{key}"]).to(dtype) for key in names)
        labels, modalities = (torch.from_numpy(arrays[f"{name}_{key}"]).long() for key in ("id", "modality"))
    return feat, labels, modalities, feat @ visible.T, feat @ infrared.T


def random_batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Identities with 1 to 4 images in each modality, shuffled; labels with gaps; logits of 12 classes."""
    generator = torch.Generator().manual_seed(seed)
    labels, modalities = [], []
    for pid in (2, 5, 6, 11):
        for modality in (0, 1):
            count = int(torch.randint(1, 5, (), generator=generator))
            labels += [pid] * count
            modalities += [modality] * count
    shuffle = torch.randperm(len(labels), generator=generator)
    feat, *logits = (torch.randn(len(labels), n, generator=generator, dtype=dtype) for n in (6, 12, 12, 12, 12))
    return feat / 3, torch.tensor(labels)[shuffle], torch.tensor(modalities)[shuffle], *logits


def all_losses(feat, labels, modalities, visible, infrared, margin: float = 0.7) -> dict[str, Tensor]:
    return {
        "eq1": triplet_loss(feat, labels, margin),
        "eq2": cross_modality_triplet_loss(feat, labels, modalities, margin),
        "eq3_literal": cross_modality_center_loss(feat, labels, modalities, margin),
        "eq3_prose": cross_modality_center_loss(feat, labels, modalities, margin, "center"),
        "eq4": modality_identity_loss(visible, infrared, labels, modalities),
        "eq5": mutual_learning_loss(visible, infrared, modalities),
    }


def assert_same_value_and_gradient(fast, slow, *inputs: Tensor) -> None:
    mine, theirs = ([one.clone().requires_grad_() for one in inputs] for _ in range(2))
    value, expected = fast(*mine), slow(*theirs)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(value, mine, materialize_grads=True, allow_unused=True)
    wanted = torch.autograd.grad(expected, theirs, materialize_grads=True, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["even", "uneven"])
def test_losses_equal_the_golden_values(name, dtype, tolerance):
    batch = golden_batch(name, dtype)
    for key, value in all_losses(*batch).items():
        expected = EXPECTED[name][key]
        expected = expected["total"] if isinstance(expected, dict) else expected
        assert value.dtype == dtype
        assert value.item() == pytest.approx(expected, abs=tolerance), key
    for negatives, key in (("anchor", "eq3_literal"), ("center", "eq3_prose")):  # a margin that switches the push off
        pull = cross_modality_center_loss(*batch[:3], -1e9, negatives)
        assert pull.item() == pytest.approx(EXPECTED[name][key]["pull"], abs=tolerance)


@pytest.mark.gpu
def test_losses_on_a_gpu_equal_the_golden_values_without_a_wait():
    batch = [one.cuda() for one in golden_batch("uneven", torch.float32)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = all_losses(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for key, value in found.items():
        expected = EXPECTED["uneven"][key]
        assert value.item() == pytest.approx(expected["total"] if isinstance(expected, dict) else expected, abs=1e-6)


@pytest.mark.parametrize("margin", [0.3, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_metric_losses_and_gradients_equal_the_loops(seed, margin):
    feat, y, s, *_ = random_batch(seed)
    check = assert_same_value_and_gradient
    check(lambda f: triplet_loss(f, y, margin), lambda f: slow_triplet(f, y, margin), feat)
    check(lambda f: cross_modality_triplet_loss(f, y, s, margin), lambda f: slow_triplet(f, y, margin, s), feat)
    for options in (("anchor", True), ("anchor", False), ("center", True), ("center", False)):
        arguments = (y, s, margin, *options)
        check(lambda f, a=arguments: cross_modality_center_loss(f, *a), lambda f, a=arguments: slow_center(f, *a), feat)


@pytest.mark.parametrize("seed", range(3))
def test_classifier_losses_and_gradients_equal_the_loops(seed):
    _, y, s, visible, infrared, *teachers = random_batch(seed)
    check, logits = assert_same_value_and_gradient, (visible, infrared)
    check(lambda v, r: modality_identity_loss(v, r, y, s), lambda v, r: slow_identity(v, r, y, s), *logits)
    for direction in ("cross_same", "same_cross"):
        for gradient, averaged in (("both", None), ("same", None), ("cross", None), ("same", tuple(teachers))):
            arguments = (s, gradient, direction, averaged)
            check(
                lambda v, r, a=arguments: mutual_learning_loss(v, r, *a),
                lambda v, r, a=arguments: slow_mutual(v, r, *a),
                *logits,
            )


def test_gradients_are_those_of_finite_differences():
    feat, y, s, visible, infrared, *_ = random_batch(1)
    wide = [one.requires_grad_() for one in (feat, visible, infrared)]
    for margin in (0.4, 50.0):  # some hinges active, all active
        assert torch.autograd.gradcheck(lambda *i, m=margin: tuple(all_losses(i[0], y, s, *i[1:], m).values()), wide)


def test_metric_losses_on_a_batch_worked_out_by_hand():
    # On a line: identity 0 visible at 0 and 2, infrared at 3; identity 1 visible at 10, infrared at 12. Margin 8.
    feat = torch.tensor([[0.0], [2.0], [3.0], [10.0], [12.0]])
    y, s = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 1])
    # Eq. 1: farthest positive, nearest negative: (3, 10) (2, 8) (3, 7) (2, 7) (2, 9) -> 1 + 2 + 4 + 3 + 1 = 11
    assert triplet_loss(feat, y, 8.0).item() == pytest.approx(11 / 5)
    # Eq. 2: (3, 12) (1, 10) (3, 7) (2, 7) (2, 10) -> 0 + 0 + 4 + 3 + 0 = 7
    assert cross_modality_triplet_loss(feat, y, s, 8.0).item() == pytest.approx(7 / 5)
    # Eq. 3: centers 3, 3, 1, 12, 10 -> pull 3 + 1 + 2 + 2 + 2 = 10
    # push as printed, from the center to the anchor's modality: 7, 7, 11, 10, 7 -> 1 + 1 + 0 + 0 + 1 = 3
    assert cross_modality_center_loss(feat, y, s, 8.0).item() == pytest.approx(13 / 5)
    # push as the prose says, within the center's modality: 9, 9, 9, 9, 8 -> with margin 10: 1 + 1 + 1 + 1 + 2 = 6
    assert cross_modality_center_loss(feat, y, s, 10.0, "center").item() == pytest.approx(16 / 5)


def test_classifier_losses_on_a_batch_worked_out_by_hand():
    # C_v says 3/4, 1/4 for every image, C_r says 1/2, 1/2.
    visible, infrared = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1), torch.zeros(3, 2)
    y, s = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    expected = (-math.log(3 / 4) - math.log(1 / 4)) / 2 - math.log(1 / 2)
    assert modality_identity_loss(visible, infrared, y, s).item() == pytest.approx(expected)
    # Eq. 5: visible images KL((1/2, 1/2) || (3/4, 1/4)), the infrared image KL((3/4, 1/4) || (1/2, 1/2))
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2) + 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert mutual_learning_loss(visible, infrared, s).item() == pytest.approx(expected)


def test_large_offsets_do_not_matter_in_float32_and_float64():
    feat, y, s, *_ = random_batch(7, torch.float32)
    for shifted in (feat + 1e4, feat + 300.0 * s[:, None], 1e-4 * feat + y[:, None], feat.double() + 1e8):
        exact = shifted.double()
        for found, expected in (
            (triplet_loss(shifted, y, 4.0), slow_triplet(exact, y, 4.0)),
            (cross_modality_triplet_loss(shifted, y, s, 4.0), slow_triplet(exact, y, 4.0, s)),
            (cross_modality_center_loss(shifted, y, s, 4.0), slow_center(exact, y, s, 4.0)),
        ):
            assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_equal_features_have_a_finite_gradient():
    feat = torch.ones(8, 3, requires_grad=True)
    y, s = torch.arange(8) // 4, torch.arange(8) % 2
    terms = (
        triplet_loss(feat, y, 0.7),
        cross_modality_triplet_loss(feat, y, s, 0.7),
        cross_modality_center_loss(feat, y, s),
    )
    sum(terms).backward()
    assert [term.item() for term in terms] == pytest.approx([0.7, 0.7, 0.7])
    assert feat.grad.isfinite().all()


def test_extreme_logits_give_finite_losses_and_equal_classifiers_none():
    visible = torch.tensor([[1e4, 0.0, -1e4], [-1e30, 0.0, 1e30]], requires_grad=True)
    infrared = torch.tensor([[-1e4, 0.0, 1e4], [-1e30, 0.0, 1e30]], requires_grad=True)
    loss = mutual_learning_loss(visible, infrared, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)  # C_r is sure of a class that has log-probability -2e4 in C_v
    assert visible.grad.isfinite().all() and infrared.grad.isfinite().all()
    same = torch.randn(4, 5)
    assert mutual_learning_loss(same, same + 5, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(0, abs=1e-6)


def test_order_of_the_batch_and_names_of_the_labels_do_not_matter():
    feat, y, s, visible, infrared, *_ = random_batch(3)
    shuffle = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    first = all_losses(feat, y, s, visible, infrared)
    renamed = torch.arange(12).flip(0)[y]  # another name, and its column in the logits
    second = all_losses(*(one[shuffle] for one in (feat, renamed, s, visible.flip(1), infrared.flip(1))))
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_and_modalities_may_have_any_integer_type(dtype):
    feat, y, s, visible, infrared = golden_batch("even", torch.float64)
    narrow = all_losses(feat, y.to(dtype), s.to(dtype), visible, infrared)
    assert narrow == all_losses(feat, y, s, visible, infrared)


def test_repeated_calls_give_the_same_gradient_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    feat = torch.randn(128, 256, generator=generator).requires_grad_()
    y, s = torch.arange(128) // 8, torch.arange(128) % 2
    for loss in (triplet_loss(feat, y, 99.0), cross_modality_center_loss(feat, y, s, 99.0)):
        first, second = (torch.autograd.grad(loss, feat, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_and_tf32_change_nothing(dtype):
    batch = [one.to(dtype) if one.is_floating_point() else one for one in golden_batch("uneven", torch.float32)]
    exact = all_losses(*(one.double() if one.is_floating_point() else one for one in batch))
    with deterministic(0, tf32=True), torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_losses(*batch)
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[key].item(), rel=1e-6), key


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_gives_a_loss_that_is_not_finite(value):
    feat, y, s, visible, infrared, *_ = random_batch(0)
    feat[2, 1] = visible[2, 1] = infrared[2, 1] = value
    assert not any(loss.isfinite() for loss in all_losses(feat, y, s, visible, infrared).values())


FEAT, Y, S = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
ONE_ID, ONE_MODALITY, BAD = torch.zeros_like(Y), torch.zeros_like(S), torch.tensor([0, 1, 0, 2])


@pytest.mark.parametrize(
    "call",
    [
        lambda: triplet_loss(FEAT, ONE_ID, 0.7),
        lambda: cross_modality_triplet_loss(FEAT, ONE_ID, S, 0.7),
        lambda: cross_modality_triplet_loss(FEAT, Y, torch.tensor([0, 1, 1, 1]), 0.7),
        lambda: cross_modality_center_loss(FEAT, ONE_ID, S),
        lambda: cross_modality_center_loss(FEAT, ONE_ID, S, 0.7, "center"),
        lambda: cross_modality_center_loss(FEAT, Y, torch.tensor([0, 0, 0, 1])),
        lambda: modality_identity_loss(FEAT, FEAT, Y, ONE_MODALITY),
        lambda: modality_identity_loss(FEAT, FEAT, Y, BAD),
        lambda: mutual_learning_loss(FEAT, FEAT, ONE_MODALITY),
        lambda: mutual_learning_loss(FEAT, FEAT, BAD),
        lambda: mutual_learning_loss(FEAT, FEAT, S, "cross", teachers=(FEAT, FEAT)),
    ],
)
def test_a_batch_without_partners_or_with_an_unknown_modality_is_refused(call):
    with pytest.raises(ValueError):
        call()


# Eq. 6


def model_and_batch(**options) -> tuple[DANet, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = DANet(4, "resnet18", width=8, **options)
    labels, modalities = torch.arange(4).repeat_interleave(4), torch.tensor([0, 0, 1, 1]).repeat(4)
    return model, torch.rand(16, 3, 32, 32), labels, modalities


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        ("baseline", {"L_id": 1.0}),
        ("b_cc", {"L_id": 1.0, "L_cc": 1.0}),
        ("b_ml", {"L_id": 1.0, "L_sid": 1.0, "L_M": 2.5}),
        ("b_ml_cc", {"L_id": 1.0, "L_cc": 1.0, "L_sid": 1.0, "L_M": 2.5}),
    ],
)
def test_a_variant_has_exactly_its_terms_and_their_weighted_sum(variant, weights):
    model, images, labels, modalities = model_and_batch()
    rows = load_study(PARAMS).run("synth_sysu-1", variant, 0).losses
    values = weighted_sum(model(images), labels, modalities, rows)
    assert values.keys() == {*weights, "total"}
    expected = sum(weight * values[name] for name, weight in weights.items())
    torch.testing.assert_close(values["total"], expected)


def test_terms_are_not_computed_in_the_precision_of_an_autocast_around_them():
    model, images, labels, modalities = model_and_batch()
    rows, output = load_study(PARAMS).run("synth_sysu-1", "b_ml_cc", 0).losses, model(images)
    exact = weighted_sum(output, labels, modalities, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weighted_sum(output, labels, modalities, rows) == exact


TRUNK, HEADS = {"backbone"}, {"classifier_visible", "classifier_infrared"}


@pytest.mark.parametrize(
    ("term", "arguments", "reached"),
    [
        ("L_id", {}, TRUNK | {"neck", "classifier"}),
        ("L_tri", {"margin": 9.0}, TRUNK),
        ("L_c_tri", {"margin": 9.0, "features": "after_bn"}, TRUNK | {"neck"}),
        ("L_cc", {"margin": 0.7}, TRUNK),  # before the BN neck
        ("L_cc", {"margin": 0.7, "features": "normalized"}, TRUNK),
        ("L_cc", {"margin": 0.7, "features": "after_bn"}, TRUNK | {"neck"}),
        ("L_sid", {}, TRUNK | {"neck"} | HEADS),
        ("L_sid", {"detach_features": True}, HEADS),
        ("L_M", {}, TRUNK | {"neck"} | HEADS),
        ("L_M", {"gradient": "same"}, TRUNK | {"neck"} | HEADS),
        ("L_M", {"detach_classifiers": True}, TRUNK | {"neck"}),
    ],
)
@pytest.mark.parametrize("teacher_ema", [0.0, 0.8])
def test_each_loss_reaches_the_parameters_it_should_and_no_others(term, arguments, reached, teacher_ema):
    model, images, labels, modalities = model_and_batch(teacher_ema=teacher_ema)
    if model.teachers is not None:
        with torch.no_grad():  # teachers that agree with their classifiers would leave no divergence
            model.teachers[0].weight.mul_(-1)
    weighted_sum(model(images), labels, modalities, {term: {"weight": 1.0, **arguments}})["total"].backward()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert changed == reached


def test_teachers_take_the_place_of_the_cross_modality_classifier():
    model, images, labels, modalities = model_and_batch(teacher_ema=0.8)
    with torch.no_grad():
        for teacher in model.teachers:
            teacher.weight.normal_(generator=torch.Generator().manual_seed(1))
    output = model(images)
    teachers = tuple(output.feat_bn @ teacher.weight.T for teacher in model.teachers)
    expected = mutual_learning_loss(output.logits_visible, output.logits_infrared, modalities, teachers=teachers)
    found = weighted_sum(output, labels, modalities, {"L_M": {"weight": 2.0}})
    torch.testing.assert_close(found["L_M"], expected)
    torch.testing.assert_close(found["total"], 2 * expected)


def spread(output, labels, modalities, power: float = 1.0) -> Tensor:
    """A user's loss: found by its import path."""
    return output.feat.std() ** power


def test_a_users_loss_is_found_by_its_import_path_and_a_weight_of_zero_is_not_computed():
    model, images, labels, modalities = model_and_batch()
    rows = {"L_id": {"weight": 0.0}, "tests.test_losses.spread": {"weight": 3.0, "power": 2.0}}
    check_terms(rows)
    output = model(images)
    values = weighted_sum(output, labels, modalities, rows)
    assert values.keys() == {"tests.test_losses.spread", "total"}
    torch.testing.assert_close(values["total"], 3 * output.feat.var())
    assert find_term("L_cc") is losses.TERMS["L_cc"]


@pytest.mark.parametrize(
    "rows",
    [
        {"L_xy": {"weight": 1}},  # no such term
        {"no_such_package.loss": {"weight": 1}},
        {"tests.test_losses.no_such_function": {"weight": 1}},
        {"L_cc": {"weight": 1}},  # its margin is missing
        {"L_cc": {"weight": 1, "margin": 0.7, "marign": 1}},
        {"L_cc": {"weight": 1, "margin": 0.7, "negatives": "nearest"}},
        {"L_cc": {"weight": 1, "margin": "wide"}},
        {"L_cc": {"weight": 1, "margin": 0.7, "center_gradient": "no"}},
        {"L_tri": {"weight": 1, "margin": 0.7, "features": "raw"}},
        {"L_M": {"weight": 1, "gradient": "own"}},
        {"L_M": {"weight": 1, "output": 3}},
    ],
)
def test_a_row_with_an_unknown_term_or_argument_is_refused(rows):
    with pytest.raises(ValueError):
        check_terms(rows)
