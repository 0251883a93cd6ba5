"""The paper's losses, one function per equation. They know no model: features or logits in, one number out.

Notation: feature i of the batch has identity y(i) and modality s(i); n visible and m infrared images, B = n + m;
rho is the margin.

Numerics, the same for all:
- Results are float32, or float64 for float64 input; 16-bit input is widened, and autocast does not apply inside.
- Distances are Euclidean. Pairs are chosen without gradient from one product of the batch with itself, in float64
  and measured from the mean, so that the choice depends neither on TF32 nor on where the features lie; only the chosen
  pairs are then subtracted, with gradient. A distance of zero has gradient zero.
- No loop over anchors and no branch on values on a GPU. Gradients are summed in a fixed order, so that a run can be
  repeated bit for bit: rows are picked with `embedding`, since the gradient of indexing is not deterministic on
  several CPU threads, nor that of `index_select` on a GPU.
- A non-finite feature gives a non-finite loss, which is the trainer's to notice (under loss scaling it is no error).

Wrong batches raise a StudyError (a ValueError) that names the label. Shapes are always checked. What depends on values
is checked where that is free: on the CPU by an exception; on CUDA, where reading a value would stall the queue, and in
a compiled graph, by `torch._assert_async`, which gives the same sentence without the label, as a RuntimeError.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from danet_core import INFRARED, VISIBLE
from danet_core.files import StudyError

Negatives = Literal["anchor", "center"]
Gradient = Literal["both", "own", "foreign"]
Direction = Literal["foreign_own", "own_foreign"]


class CenterTerms(NamedTuple):
    """The two parts of Eq. 3, each a mean over the B anchors; their sum is the loss."""

    pull: Tensor  # () distance to the centre of the same identity in the other modality
    push: Tensor  # () hinge on the distance from that centre to the nearest other identity


def triplet_loss(feat: Float[Tensor, "B D"], labels: Integer[Tensor, " B"], margin: float) -> Float[Tensor, ""]:
    """Batch-hard triplet loss, Eq. 1: mean over i of [rho - min_k |f(i) - f(k)| + max_j |f(i) - f(j)|]_+.

    k runs over the other identities, j over the anchor's own (itself included, at distance 0), both over
    both modalities.

    Args:
        feat: (B, D) features, used as they are (not normalised).
        labels: (B,) identities, any integers.
        margin: rho, in units of the features.

    Returns:
        The mean over the B anchors.

    Raises:
        StudyError: shapes disagree, the batch is empty, or it has a single identity (no negative).

    Source: the paper, Eq. 1, where it is what Eq. 2 and 3 depart from; Hermans et al., "In Defense of the Triplet
    Loss for Person Re-Identification", 2017.
    """
    _check_shapes(feat, labels)
    with torch.autocast(feat.device.type, enabled=False):
        same = _same(labels)  # (B, B)
        _require((~same).any(1), labels, "has no negative: the batch holds no other identity; sample at least two")
        return _hinge_triplet(feat, positives=same, negatives=~same, margin=margin)


def cross_modality_triplet_loss(
    feat: Float[Tensor, "B D"], labels: Integer[Tensor, " B"], modalities: Integer[Tensor, " B"], margin: float
) -> Float[Tensor, ""]:
    """Batch-hard triplet loss across modalities, Eq. 2: as Eq. 1, with j and k from the modality that i is not of.

    Args:
        feat: (B, D) features, used as they are (not normalised).
        labels: (B,) identities, any integers.
        modalities: (B,) 0 visible, 1 infrared.
        margin: rho, in units of the features.

    Returns:
        The mean over the B anchors.

    Raises:
        StudyError: shapes disagree, the batch is empty, a modality is neither 0 nor 1, an identity lacks one modality,
            or an anchor has no other identity in the other modality.

    Source: the paper, Eq. 2.
    """
    _check_shapes(feat, labels, modalities)
    with torch.autocast(feat.device.type, enabled=False):
        same, across = _same(labels), ~_same(modalities)  # (B, B)
        _check_modalities(modalities)
        _require((same & across).any(1), labels, _ONE_MODALITY)
        _require(
            (~same & across).any(1),
            labels,
            "has no negative: no other identity has an image in the other modality; sample at least two identities",
        )
        return _hinge_triplet(feat, positives=same & across, negatives=~same & across, margin=margin)


def cross_modality_center_loss(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float = 0.7,
    negatives: Negatives = "anchor",
    center_gradient: bool = True,
) -> Float[Tensor, ""]:
    """Cross-modality centre loss, Eq. 3: mean over i of |f(i) - c(i)| + [rho - min_k |c(i) - f(k)|]_+.

    c(i) is the mean of the features of identity y(i) in the modality that f(i) is not of; k runs over the other
    identities. Nothing is squared, the hinge lies inside the mean, and gradient flows through features and, unless told
    otherwise, centres.

    Args:
        feat: (B, D) features, used as they are (not normalised).
        labels: (B,) identities, any integers.
        modalities: (B,) 0 visible, 1 infrared.
        margin: rho, in units of the features.
        negatives: modality of f(k). "anchor": that of f(i), as Eq. 3 is printed (s(i) = s(k)); "center": that of the
            centre, as the prose around it says ("avoid increasing the distance between features from different
            modalities").
        center_gradient: False holds the centres fixed, so that only f(i) and f(k) are moved; the value is the same.

    Returns:
        The mean over the B anchors: `pull + push` of `cross_modality_center_terms`.

    Raises:
        StudyError: shapes disagree, the batch is empty, a modality is neither 0 nor 1, an identity lacks one modality,
            an anchor has no negative in the modality asked for, or `negatives` is another word.

    Source: the paper, Eq. 3. Choice: which features it acts on is the caller's; see the README.
    """
    terms = cross_modality_center_terms(feat, labels, modalities, margin, negatives, center_gradient)
    return terms.pull + terms.push


def cross_modality_center_terms(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float = 0.7,
    negatives: Negatives = "anchor",
    center_gradient: bool = True,
) -> CenterTerms:
    """The pull and the push of `cross_modality_center_loss` apart, for the training record; same arguments and errors.

    Returns:
        CenterTerms(pull, push), both with gradient.
    """
    if negatives not in get_args(Negatives):
        raise StudyError(
            f"negatives must be 'anchor' (Eq. 3 as printed) or 'center' (as its prose says), found {negatives!r}"
        )
    _check_shapes(feat, labels, modalities)
    with torch.autocast(feat.device.type, enabled=False):
        same, across = _same(labels), ~_same(modalities)  # (B, B)
        _check_modalities(modalities)
        _require((same & across).any(1), labels, _ONE_MODALITY)
        others = ~same & (across if negatives == "center" else ~across)  # (B, B) row i: the candidates for k
        _require(
            others.any(1),
            labels,
            f"has no negative: no other identity has an image in the modality of the {negatives};"
            " sample at least two identities with both modalities",
        )
        feat = feat.to(_result_dtype(feat))
        groups = _Groups(own=same & ~across, opposite=same & across)
        with torch.no_grad():
            wide = _centred(feat)
            closeness = _closeness(wide, groups.means(wide) @ wide.T)  # (G, B) of the centres to f(k)
        nearest = _rows(closeness, groups.opposite).masked_fill(~others, torch.inf).argmin(1)  # (B,)
        centres = _rows(groups.means(feat if center_gradient else feat.detach()), groups.opposite)  # (B, D) c(i)
        pull = _distance(feat, centres).mean()
        push = (margin - _distance(centres, _rows(feat, nearest))).clamp(min=0).mean()
        return CenterTerms(pull, push)


def modality_identity_loss(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Identity loss of the modality-specific classifiers, Eq. 4: each learns from its own modality only.

    Cross-entropy of C_v averaged over the n visible images plus cross-entropy of C_r averaged over the m infrared ones.

    Args:
        logits_visible: (B, C) C_v on all features; its infrared rows get gradient zero.
        logits_infrared: (B, C) C_r on all features; its visible rows get gradient zero.
        labels: (B,) class indices in [0, C).
        modalities: (B,) 0 visible, 1 infrared.

    Returns:
        The sum of the two means.

    Raises:
        StudyError: shapes disagree, the batch is empty, a modality is neither 0 nor 1 or missing, or a label is not in
            [0, C).

    Source: the paper, Eq. 4.
    """
    _check_shapes(logits_visible, labels, modalities, twin=logits_infrared)
    with torch.autocast(logits_visible.device.type, enabled=False):
        weights = _modality_weights(modalities)  # (B,)
        n_classes = logits_visible.shape[1]
        _require(
            (labels >= 0) & (labels < n_classes),
            labels,
            f"is no class of a classifier with {n_classes} outputs; number the training identities from 0",
        )
        own, _ = _own_and_foreign(logits_visible, logits_infrared, modalities)
        losses = functional.cross_entropy(own, labels.long(), reduction="none")  # (B,)
        return (losses * weights).sum().to(_result_dtype(logits_visible, logits_infrared))


def mutual_learning_loss(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    modalities: Integer[Tensor, " B"],
    gradient: Gradient = "both",
    direction: Direction = "foreign_own",
    averaged: tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]] | None = None,
) -> Float[Tensor, ""]:
    """Mutual learning between the modality-specific classifiers, Eq. 5: what they say about a feature should agree.

    KL(C_r || C_v) averaged over the n visible features plus KL(C_v || C_r) averaged over the m infrared ones: the
    classifier foreign to the feature stands in front. No temperature. Gradient flows through both distributions,
    as printed, unless told otherwise.

    Args:
        logits_visible: (B, C) C_v on all features.
        logits_infrared: (B, C) C_r on all features.
        modalities: (B,) 0 visible, 1 infrared.
        gradient: the distribution that gradient flows through: "both", "own" (of the classifier of the feature's own
            modality) or "foreign". The other is held fixed; the value is the same.
        direction: "foreign_own", KL(foreign || own) as printed, or "own_foreign", KL(own || foreign).
        averaged: logits of averaged C_v and C_r on all features, which then are the foreign ones, and fixed.

    Returns:
        The sum of the two means, in nats; 0 where the classifiers agree.

    Raises:
        StudyError: shapes disagree, the batch is empty, a modality is neither 0 nor 1 or missing, `gradient` or
            `direction` is another word, or nothing is left to learn, with `averaged` and the gradient "foreign".

    Source: the paper, Eq. 5.
    """
    _check_shapes(logits_visible, modalities, twin=logits_infrared, what="modalities")
    _check_reading(gradient, direction, averaged is not None)
    with torch.autocast(logits_visible.device.type, enabled=False):
        weights = _modality_weights(modalities)  # (B,)
        own, foreign = _own_and_foreign(logits_visible, logits_infrared, modalities)
        if averaged is not None:
            for logits in averaged:
                _check_shapes(logits_visible, modalities, twin=logits, what="modalities")
            _, foreign = _own_and_foreign(*averaged, modalities)
        if averaged is not None or gradient == "own":
            foreign = foreign.detach()
        if gradient == "foreign":
            own = own.detach()
        own, foreign = own.log_softmax(1), foreign.log_softmax(1)
        first, second = (foreign, own) if direction == "foreign_own" else (own, foreign)
        divergence = (first.exp() * (first - second)).sum(1)  # (B,) logs are finite, so 0 * log 0 never arises
        return (divergence * weights).sum().to(_result_dtype(logits_visible, logits_infrared))


_ONE_MODALITY = (
    "has images of one modality only, and the loss compares it with the other;"
    " sample visible and infrared images of each identity"
)


def _hinge_triplet(feat: Tensor, *, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    feat = feat.to(_result_dtype(feat))
    with torch.no_grad():
        wide = _centred(feat)
        closeness = _closeness(wide, _products(wide))  # (B, B)
    farthest = closeness.masked_fill(~positives, -torch.inf).argmax(1)  # (B,)
    nearest = closeness.masked_fill(~negatives, torch.inf).argmin(1)  # (B,)
    to_positive = _distance(feat, _rows(feat, farthest))
    to_negative = _distance(feat, _rows(feat, nearest))
    return (margin - to_negative + to_positive).clamp(min=0).mean()


def _centred(feat: Tensor) -> Tensor:
    """(B, D) the features in float64, measured from their mean."""
    wide = feat.to(_wide_dtype(feat), copy=True)
    wide -= wide.mean(0)  # in place: fresh memory for a second copy takes longer than a product
    return wide


def _closeness(wide: Tensor, products: Tensor) -> Tensor:
    """(P, B) to choose by: row p is in the order of the distances from point p to the rows f(k) of `wide`.

    It is half the squared distance less the point's own share of it, |f(k)|^2 / 2 - p.f(k); `products` holds p.f(k).
    """
    return torch.linalg.vector_norm(wide, dim=1).square() / 2 - products


def _products(wide: Tensor) -> Tensor:
    """(B, B) `wide @ wide.T` for three quarters of the work: one of its quarters mirrors another."""
    first, second = wide[: len(wide) // 2], wide[len(wide) // 2 :]
    across = first @ second.T
    return torch.cat([torch.cat([first @ first.T, across], 1), torch.cat([across.T, second @ second.T], 1)])


class _Groups:
    """The groups of a batch: images of one identity in one modality, known by the first of them.

    There are G rows of means, one for each group; where counting the groups would stall the queue, one for each image,
    and zeros for an image that is not the first of its group.
    """

    def __init__(self, *, own: Tensor, opposite: Tensor) -> None:
        first = own.int().argmax(1)  # (B,) first image of the same identity and modality
        free = own.device.type == "cpu" and not torch.compiler.is_compiling()
        known_by = first.unique() if free else torch.arange(len(first), device=first.device)  # (G,)
        self._members = first.argsort(stable=True)  # (B,) images, group after group
        self._start = torch.searchsorted(first[self._members], known_by)  # (G,)
        self.opposite = torch.searchsorted(known_by, opposite.int().argmax(1))  # (B,) group of the other modality

    def means(self, table: Tensor) -> Tensor:
        """(G, D) the mean row of `table` (B, D) over each group.

        An embedding bag takes it: linear in B, exact in float32 whatever TF32 says, with a deterministic gradient.
        """
        return functional.embedding_bag(self._members, table, self._start, mode="mean")


class _Distance(torch.autograd.Function):
    """Euclidean distances of the rows of two (B, D) matrices.

    Its gradient is written out because autograd's goes over the batch several times as often.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        apart = left - right
        distance = apart.square().sum(1).sqrt()
        ctx.save_for_backward(apart, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        apart, distance = ctx.saved_tensors
        share = (gradient / distance).masked_fill(distance == 0, 0)  # asked this way round, NaN stays NaN
        left = apart * share[:, None]
        return left, -left


def _distance(left: Tensor, right: Tensor) -> Tensor:
    """(B,) Euclidean distances of the rows, with gradient zero where a distance is zero."""
    return _Distance.apply(left, right)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    return functional.embedding(index, table)


def _same(values: Tensor) -> Tensor:
    return values[:, None] == values[None, :]


def _own_and_foreign(logits_visible: Tensor, logits_infrared: Tensor, modalities: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) each: the logits of the classifier of the image's own modality, and of the other one."""
    visible = (modalities == VISIBLE)[:, None]
    wide_visible, wide_infrared = _wide(logits_visible), _wide(logits_infrared)
    return torch.where(visible, wide_visible, wide_infrared), torch.where(visible, wide_infrared, wide_visible)


def _modality_weights(modalities: Tensor) -> Tensor:
    """(B,) 1/n for visible and 1/m for infrared images, so that a weighted sum is the sum of the two means."""
    _check_modalities(modalities)
    visible, infrared = modalities == VISIBLE, modalities == INFRARED
    both = visible.any() & infrared.any()
    problem = "is the only one in the batch, and each modality has a mean of its own; sample both"
    _require(both.expand_as(modalities), modalities, problem, "modality")
    n, m = _wide(visible.sum()), _wide(infrared.sum())
    return torch.where(visible, 1 / n, 1 / m)


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))


def _wide_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _result_dtype(*inputs: Tensor) -> torch.dtype:
    dtype = torch.float32
    for values in inputs:
        dtype = torch.promote_types(dtype, values.dtype)
    return dtype


def _check_shapes(
    matrix: Tensor,
    labels: Tensor,
    modalities: Tensor | None = None,
    *,
    twin: Tensor | None = None,
    what: str = "labels",
) -> None:
    """Shapes are known without reading a value, so these checks cost nothing on any device."""
    if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.shape[1] == 0:
        raise StudyError(f"features or logits must be a non-empty (B, D) matrix, found shape {tuple(matrix.shape)}")
    if twin is not None and twin.shape != matrix.shape:
        raise StudyError(
            f"logits_visible {tuple(matrix.shape)} and logits_infrared {tuple(twin.shape)} must have one shape;"
            " both classifiers see all B features"
        )
    for name, values in ((what, labels), ("modalities", modalities)):
        if values is not None and values.shape != matrix.shape[:1]:
            raise StudyError(
                f"{name} must have shape ({matrix.shape[0]},), one entry per row of the batch,"
                f" found {tuple(values.shape)}"
            )


def _check_reading(gradient: str, direction: str, averaged: bool) -> None:
    for name, value, words in (("gradient", gradient, Gradient), ("direction", direction, Direction)):
        if value not in get_args(words):
            raise StudyError(f"{name} must be one of {', '.join(get_args(words))}, found {value!r}")
    if averaged and gradient == "foreign":
        raise StudyError("averaged classifiers are fixed, so that nothing learns with gradient 'foreign'; take 'own'")


def _check_modalities(modalities: Tensor) -> None:
    known = (modalities == VISIBLE) | (modalities == INFRARED)
    _require(known, modalities, "is neither 0 (visible) nor 1 (infrared); recode the modalities", "modality")


def _require(holds: Tensor, values: Tensor, problem: str, what: str = "label") -> None:
    """Refuse the batch unless `holds` (B,) is true throughout. The one place that reads values; see above."""
    if values.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(holds.all(), f"a {what} of the batch {problem}")
    elif not bool(holds.all()):
        raise StudyError(f"{what} {int(values[~holds][0])} {problem}")
