"""What the method notebook shows besides the equations, which test_losses.py compares with losses.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stores import PARAMS

from danet_core import slow
from danet_core.config import load_study
from danet_core.files import StudyError
from danet_core.model import Embedding
from danet_core.train import Batch, loss_terms

VARIANTS = load_study(PARAMS).variants

# On a line: identity 0 visible at 0 and 2, infrared at 3; identity 1 visible at 10, infrared at 12.
FEAT = torch.tensor([[0.0], [2.0], [3.0], [10.0], [12.0]])
LABELS, MODALITIES = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 1])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_slow_total_is_what_training_minimises_for_every_variant(variant) -> None:
    generator = torch.Generator().manual_seed(5)
    feat, *logits = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (3, 2, 2, 2))
    output = Embedding(feat, feat, *logits)
    trained = loss_terms(output, Batch(torch.empty(0), LABELS, MODALITIES), variant)["total"]
    total = slow.eq6(feat, *logits, LABELS, MODALITIES, variant)
    assert float(trained) == pytest.approx(float(total), abs=1e-6)  # L_id is computed in float32 there


READINGS = [
    {"equation": 1},
    {"equation": 2},
    {"features": "after_bn"},
    {"features": "normalised"},
    {"equation": 2, "features": "normalised"},
    {"center_gradient": False},
    {"negatives": "center"},
    {"gradient": "own"},
    {"gradient": "foreign"},
    {"direction": "own_foreign"},
    {"lambda_2": 0.0},
    {"foreign_average": 0.9},
]


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_the_slow_total_and_its_gradient_are_what_training_minimises_for_every_reading(reading) -> None:
    variant = VARIANTS["b_ml_cc"]
    cc = {key: value for key, value in reading.items() if hasattr(variant.cc, key)}
    ml = {key: value for key, value in reading.items() if hasattr(variant.ml, key)}
    variant = dataclasses.replace(
        variant, cc=dataclasses.replace(variant.cc, **cc), ml=dataclasses.replace(variant.ml, **ml)
    )
    generator = torch.Generator().manual_seed(5)
    sizes = (3, 3, 2, 2, 2, 2, 2)
    drawn = [torch.randn(5, size, generator=generator, dtype=torch.float64) for size in sizes]
    fast, loops = ([part.clone().requires_grad_() for part in drawn] for _ in range(2))
    averaged = ([part.detach() for part in drawn[5:]]) if "foreign_average" in reading else [None, None]
    output = Embedding(*fast[:5], *averaged)
    trained = loss_terms(output, Batch(torch.empty(0), LABELS, MODALITIES), variant)["total"]
    feat, feat_bn, *logits = loops[:5]
    teachers = tuple(averaged) if "foreign_average" in reading else None
    total = slow.eq6(feat, *logits, LABELS, MODALITIES, variant, feat_bn=feat_bn, averaged=teachers)
    trained.backward(), total.backward()
    assert trained.item() == pytest.approx(total.item(), abs=1e-6)  # L_id is computed in float32 there
    for found, expected in zip(fast[:5], loops[:5], strict=True):
        none = torch.zeros_like(found)
        left, right = (none if part.grad is None else part.grad for part in (found, expected))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_the_slow_total_asks_for_the_features_that_it_lacks() -> None:
    cc = dataclasses.replace(VARIANTS["b_cc"].cc, features="after_bn")
    with pytest.raises(StudyError, match="after the BN neck here, found none; give `feat_bn`"):
        slow.alignment(FEAT, LABELS, MODALITIES, cc)


def test_triplet_terms_name_both_distances_of_each_image() -> None:
    terms = slow.triplet_terms(FEAT, LABELS, 8.0)
    assert slow.table(terms).to_numpy().tolist() == [[10, 3, 1], [8, 2, 2], [7, 3, 4], [7, 2, 3], [9, 2, 1]]
    across = slow.triplet_terms(FEAT, LABELS, 8.0, MODALITIES)
    assert slow.table(across).to_numpy().tolist() == [[12, 3, 0], [10, 1, 0], [7, 3, 4], [7, 2, 3], [10, 2, 0]]


def test_center_terms_name_the_centre_and_the_nearest_negative_of_both_readings() -> None:
    printed = slow.center_terms(FEAT, LABELS, MODALITIES, 8.0, "anchor")
    assert [term.center.item() for term in printed] == [3, 3, 1, 12, 10]
    assert [term.negative for term in printed] == [3, 3, 4, 1, 2]
    assert [term.nearest.item() for term in printed] == [7, 7, 11, 10, 7]
    prose = slow.center_terms(FEAT, LABELS, MODALITIES, 8.0, "center")
    assert [term.negative for term in prose] == [4, 4, 3, 2, 1]


def test_values_that_differ_are_an_error_and_not_a_table() -> None:
    shown = slow.side_by_side(torch.tensor(0.25), torch.tensor(0.25), "Eq. 1")
    assert shown.loc["Eq. 1"].tolist() == [0.25, 0.25, 0]
    for wrong in (0.2501, float("nan")):
        with pytest.raises(StudyError, match=r"Eq. 1: .* gives 0.25, expected .* found"):
            slow.side_by_side(torch.tensor(0.25), torch.tensor(wrong), "Eq. 1")


def test_descent_steps_against_the_gradient_and_keeps_every_state() -> None:
    start = torch.tensor([4.0, -2.0])
    path, values = slow.descend(lambda x, scale: scale * (x**2).sum(), [start], rate=0.5, steps=2, scale=0.5)
    assert [states[0].tolist() for states in path] == [[4, -2], [2, -1], [1, -0.5]]
    assert values == [10, 2.5, 0.625]
    assert start.tolist() == [4, -2] and not start.requires_grad
