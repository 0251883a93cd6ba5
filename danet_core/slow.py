"""The paper's equations term by term, as loops over images: to read beside the formulas, and to check losses.py by.

Nothing here comes from losses.py. Every sum is a loop and every min and max runs over a list, so that a line can be
compared with its symbol; gradient flows through all of it. Notation and arguments are those of losses.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from danet_core import INFRARED, VISIBLE
from danet_core.files import StudyError
from danet_core.parameters import CrossModalityCenter, MutualLearning, Variant


class TripletTerm(NamedTuple):
    """What image i adds to Eq. 1 or Eq. 2."""

    nearest: Tensor  # () min over k
    farthest: Tensor  # () max over j
    hinge: Tensor  # () [rho - nearest + farthest]_+


class CenterTerm(NamedTuple):
    """What image i adds to Eq. 3."""

    center: Tensor  # (D,) c(i)
    negative: int  # k at which the minimum is reached
    pull: Tensor  # () |f(i) - c(i)|
    nearest: Tensor  # () min over k
    push: Tensor  # () [rho - nearest]_+


def triplet_terms(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    margin: float,
    modalities: Integer[Tensor, " B"] | None = None,
) -> list[TripletTerm]:
    """The B terms of Eq. 1, or of Eq. 2 where `modalities` are given: j and k are then of the other modality."""
    y, s = labels.tolist(), None if modalities is None else modalities.tolist()
    terms = []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if s is None or s[i] != s[j]]
        nearest = min((distance(feat[i], feat[k]) for k in others if y[i] != y[k]), key=Tensor.item)
        farthest = max((distance(feat[i], feat[j]) for j in others if y[i] == y[j]), key=Tensor.item)
        terms.append(TripletTerm(nearest, farthest, hinge(margin - nearest + farthest)))
    return terms


def center_terms(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float,
    negatives: str = "anchor",
    center_gradient: bool = True,
) -> list[CenterTerm]:
    """The B terms of Eq. 3; `negatives` as in losses.py: "anchor" takes s(k) = s(i), "center" takes s(k) != s(i)."""
    y, s = labels.tolist(), modalities.tolist()
    terms = []
    for i in range(len(y)):
        center = mean([feat[j] for j in range(len(y)) if y[i] == y[j] and s[i] != s[j]])
        if not center_gradient:
            center = center.detach()
        others = [k for k in range(len(y)) if y[i] != y[k] and (s[i] == s[k]) == (negatives == "anchor")]
        k = min(others, key=lambda k: distance(center, feat[k]).item())
        nearest = distance(center, feat[k])
        terms.append(CenterTerm(center, k, distance(feat[i], center), nearest, hinge(margin - nearest)))
    return terms


def eq1(feat: Float[Tensor, "B D"], labels: Integer[Tensor, " B"], margin: float) -> Float[Tensor, ""]:
    """Triplet loss: the mean of its terms."""
    return mean([term.hinge for term in triplet_terms(feat, labels, margin)])


def eq2(
    feat: Float[Tensor, "B D"], labels: Integer[Tensor, " B"], modalities: Integer[Tensor, " B"], margin: float
) -> Float[Tensor, ""]:
    """Cross-modality triplet loss: the mean of its terms."""
    return mean([term.hinge for term in triplet_terms(feat, labels, margin, modalities)])


def eq3(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float,
    negatives: str = "anchor",
    center_gradient: bool = True,
) -> Float[Tensor, ""]:
    """Cross-modality centre loss: the mean of pull + push."""
    terms = center_terms(feat, labels, modalities, margin, negatives, center_gradient)
    return mean([term.pull + term.push for term in terms])


def eq4(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Identity loss of C_v on the visible images plus that of C_r on the infrared ones."""
    y, s = labels.tolist(), modalities.tolist()
    visible = mean([-softmax(logits_visible[i])[y[i]].log() for i in range(len(y)) if s[i] == VISIBLE])
    infrared = mean([-softmax(logits_infrared[j])[y[j]].log() for j in range(len(y)) if s[j] == INFRARED])
    return visible + infrared


def eq5(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    modalities: Integer[Tensor, " B"],
    gradient: str = "both",
    direction: str = "foreign_own",
    averaged: tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]] | None = None,
) -> Float[Tensor, ""]:
    """Mutual learning: KL(C_r || C_v) on the visible images plus KL(C_v || C_r) on the infrared ones.

    The other readings as in losses.py: what is fixed has no gradient, `direction` says which one stands in front, and
    `averaged` classifiers are the foreign ones, fixed.
    """
    s = modalities.tolist()
    foreign_visible, foreign_infrared = averaged or (logits_visible, logits_infrared)

    def disagreement(own: Tensor, foreign: Tensor) -> Tensor:
        own = own.detach() if gradient == "foreign" else own
        foreign = foreign.detach() if gradient == "own" or averaged else foreign
        return divergence(foreign, own) if direction == "foreign_own" else divergence(own, foreign)

    visible = [disagreement(logits_visible[i], foreign_infrared[i]) for i in range(len(s)) if s[i] == VISIBLE]
    infrared = [disagreement(logits_infrared[j], foreign_visible[j]) for j in range(len(s)) if s[j] == INFRARED]
    return mean(visible) + mean(infrared)


def eq6(
    feat: Float[Tensor, "B D"],
    logits: Float[Tensor, "B C"],
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    variant: Variant,
    *,
    feat_bn: Float[Tensor, "B D"] | None = None,
    averaged: tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]] | None = None,
) -> Float[Tensor, ""]:
    """The total loss of a variant, with L_sid, which the printed equation omits.

    `feat_bn` and `averaged` are for the readings that ask for them.
    """
    y = labels.tolist()
    total = mean([-softmax(logits[i])[y[i]].log() for i in range(len(y))])
    if variant.cc is not None:
        total = total + variant.cc.lambda_1 * alignment(feat, labels, modalities, variant.cc, feat_bn)
    if variant.ml is not None:
        total = total + mutual_learning(logits_visible, logits_infrared, labels, modalities, variant.ml, averaged)
    return total


def alignment(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    cc: CrossModalityCenter,
    feat_bn: Float[Tensor, "B D"] | None = None,
) -> Float[Tensor, ""]:
    """The equation that stands in CC's place, of the features it acts on."""
    f = feat_bn if cc.features == "after_bn" else feat
    if f is None:
        raise StudyError("CC acts on features after the BN neck here, found none; give `feat_bn`")
    if cc.features == "normalised":
        f = torch.stack([row / (row**2).sum().sqrt() for row in f])
    if cc.equation == 1:
        return eq1(f, labels, cc.margin)
    if cc.equation == 2:
        return eq2(f, labels, modalities, cc.margin)
    return eq3(f, labels, modalities, cc.margin, cc.negatives, cc.center_gradient)


def mutual_learning(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    weights: MutualLearning,
    averaged: tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]] | None = None,
) -> Float[Tensor, ""]:
    """What ML adds to the total loss: Eq. 4 and Eq. 5 with their weights."""
    own = eq4(logits_visible, logits_infrared, labels, modalities)
    both = eq5(logits_visible, logits_infrared, modalities, weights.gradient, weights.direction, averaged)
    return weights.lambda_sid * own + weights.lambda_2 * both


def distance(a: Float[Tensor, " D"], b: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Euclidean; a plain zero, without gradient, for equal vectors, where the norm has no derivative."""
    square = ((a - b) ** 2).sum()
    return square.sqrt() if square.item() > 0 else square.detach()


def hinge(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """[value]_+"""
    return value.clamp(min=0)


def softmax(logits: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """The distribution over identities that a classifier's logits stand for."""
    weights = (logits - logits.max().detach()).exp()
    return weights / weights.sum()


def divergence(first: Float[Tensor, " C"], second: Float[Tensor, " C"]) -> Float[Tensor, ""]:
    """KL(first || second) of the distributions of two rows of logits, in nats."""
    p, q = softmax(first), softmax(second)
    return torch.stack([p[c] * (p[c] / q[c]).log() for c in range(len(p))]).sum()


def mean(terms: Sequence[Tensor]) -> Tensor:
    """1/n times the sum of n tensors."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total / len(terms)


def table(terms: Sequence[Any]) -> pd.DataFrame:
    """One line per image i with the scalars of its term, to read."""
    scalars = [{name: value for name, value in term._asdict().items() if name != "center"} for term in terms]
    return pd.DataFrame(
        [{name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()} for row in scalars]
    ).rename_axis("i")


def side_by_side(slow: Float[Tensor, ""], fast: Float[Tensor, ""], name: str) -> pd.DataFrame:
    """The loop's value, danet_core's and their difference in one line.

    Raises StudyError when they differ by more than 1e-9 (float64) or 1e-5 (float32).
    """
    gap = abs(float(slow) - float(fast))
    if not gap <= (1e-9 if fast.dtype == torch.float64 else 1e-5):
        raise StudyError(
            f"{name}: the loop of danet_core/slow.py gives {float(slow)!r}, expected the same of danet_core, found "
            f"{float(fast)!r}; one of the two was changed: run the tests of losses"
        )
    return pd.DataFrame({"loop over images": float(slow), "danet_core": float(fast), "difference": gap}, index=[name])


def descend(
    loss: Callable[..., Tensor], start: Sequence[Tensor], *, rate: float, steps: int, **given: Any
) -> tuple[list[tuple[Tensor, ...]], list[float]]:
    """Plain gradient descent, to watch what a loss asks for.

    Args:
        loss: of the tensors of `start`, and of `given` by name, to one number.
        rate: length of a step, as a share of the gradient.

    Returns:
        The tensors before the first step and after each, and the loss at each of them: steps + 1 long, both.
    """
    path, values = [], []
    here = tuple(tensor.detach().clone() for tensor in start)
    for step in range(steps + 1):
        here = tuple(tensor.requires_grad_() for tensor in here)
        value = loss(*here, **given)
        path.append(tuple(tensor.detach() for tensor in here))
        values.append(value.item())
        if step < steps:
            gradients = torch.autograd.grad(value, here)
            here = tuple((x - rate * g).detach() for x, g in zip(here, gradients, strict=True))
    return path, values
