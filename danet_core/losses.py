"""The paper's losses, one function per equation, and their weighted sum, Eq. 6.

f(i) is feature i of the batch, with identity y(i) and modality s(i): 0 visible, 1 infrared. n images are visible, m are
infrared, B = n + m. rho is the margin, |x| the Euclidean norm, [x]_+ is max(x, 0).

All arithmetic is float64, on features measured from their mean: distances do not change, and they stay exact under
TF32, autocast and large offsets. The result has the input's dtype, at least float32. The gradient of a zero distance is
zero. A batch without positives, negatives or one of the modalities raises ValueError on a CPU. On a GPU, where reading
a value stalls the queue, a device-side assertion fails: its reason is on stderr, not in the RuntimeError that follows.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional

from danet_core import INFRARED, VISIBLE
from danet_core.model import Output


def triplet_loss(feat: Float[Tensor, "B D"], labels: Integer[Tensor, " B"], margin: float) -> Float[Tensor, ""]:
    """Batch-hard triplet loss, Eq. 1: mean over i of [rho - min_k |f(i) - f(k)| + max_j |f(i) - f(j)|]_+.

    j runs over the images of identity y(i), k over those of other identities, both in both modalities.
    Source: the paper, Eq. 1; Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017.
    """
    same = labels[:, None] == labels  # (B, B)
    return _hardest_triplets(feat, labels, positives=same, negatives=~same, margin=margin)


def cross_modality_triplet_loss(
    feat: Float[Tensor, "B D"], labels: Integer[Tensor, " B"], modalities: Integer[Tensor, " B"], margin: float
) -> Float[Tensor, ""]:
    """Batch-hard triplet loss across modalities, Eq. 2: Eq. 1 with j and k from the other modality than i.

    Source: the paper, Eq. 2.
    """
    same, across = labels[:, None] == labels, modalities[:, None] != modalities  # (B, B)
    return _hardest_triplets(feat, labels, positives=same & across, negatives=~same & across, margin=margin)


def cross_modality_center_loss(
    feat: Float[Tensor, "B D"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    margin: float = 0.7,
    negatives: Literal["anchor", "center"] = "anchor",
    center_gradient: bool = True,
) -> Float[Tensor, ""]:
    """Cross-modality center loss (CC), Eq. 3: mean over i of |f(i) - c(i)| + [rho - min_k |c(i) - f(k)|]_+.

    c(i) is the mean feature of identity y(i) in the other modality than i. k runs over other identities.

    Args:
        negatives: modality of f(k). "anchor": that of f(i), as printed. "center": that of c(i), as the prose says.
        center_gradient: False stops the gradient at the centers.

    Source: the paper, Eq. 3. Choice: the paper says neither whether f is the feature before or after the BN neck, nor
    whether centers get gradient. `L_cc` below takes the feature before it.
    """
    same, across = labels[:, None] == labels, modalities[:, None] != modalities  # (B, B)
    candidates = ~same & (across if negatives == "center" else ~across)
    _require(same & across, labels, "has images of one modality only")
    _require(candidates, labels, "has no negative: no other identity has images of the required modality")
    wide = _from_mean(feat)
    members = (same & across).double()
    centers = members @ (wide if center_gradient else wide.detach()) / members.sum(1, keepdim=True)  # (B, D) c(i)
    nearest = _distances(centers, wide).masked_fill(~candidates, torch.inf).argmin(1)  # (B,) k
    pull = (wide - centers).norm(dim=1)
    push = (margin - (centers - wide[nearest]).norm(dim=1)).clamp(min=0)
    return (pull + push).mean().to(_result_dtype(feat))


def modality_identity_loss(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Identity loss of the modality-specific classifiers, Eq. 4: C_v on visible plus C_r on infrared images.

    Args: logits_visible, logits_infrared: C_v and C_r on all B features. labels: class indices in [0, C).
    Source: the paper, Eq. 4.
    """
    same_modality, _ = _by_modality(logits_visible, logits_infrared, modalities)
    losses = functional.cross_entropy(same_modality, labels.long(), reduction="none")  # (B,)
    return _sum_of_modality_means(losses, modalities).to(_result_dtype(logits_visible))


def mutual_learning_loss(
    logits_visible: Float[Tensor, "B C"],
    logits_infrared: Float[Tensor, "B C"],
    modalities: Integer[Tensor, " B"],
    gradient: Literal["both", "same", "cross"] = "both",
    direction: Literal["cross_same", "same_cross"] = "cross_same",
    teachers: tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]] | None = None,
) -> Float[Tensor, ""]:
    """Mutual learning (ML), Eq. 5: mean KL(C_r || C_v) over visible plus mean KL(C_v || C_r) over infrared features.

    "same" is the classifier of a feature's own modality, "cross" the one of the other modality. No temperature.

    Args:
        gradient: the distribution that gets gradient. The other one is constant.
        direction: "cross_same" is KL(cross || same), as printed. "same_cross" is KL(same || cross).
        teachers: logits of the averaged C_v and C_r. They replace the cross-modality classifier and are constant.

    Returns the sum of the two means, in nats.
    Source: the paper, Eq. 5. Choice: the paper does not say which of the two distributions gets gradient.
    """
    if teachers is not None and gradient == "cross":
        raise ValueError("with teachers, gradient 'cross' leaves nothing to train; use 'same'")
    same, cross = _by_modality(logits_visible, logits_infrared, modalities)
    if teachers is not None:
        cross = _by_modality(*teachers, modalities)[1].detach()
    same = (same.detach() if gradient == "cross" else same).log_softmax(1)
    cross = (cross.detach() if gradient == "same" else cross).log_softmax(1)
    first, second = (cross, same) if direction == "cross_same" else (same, cross)
    divergence = (first.exp() * (first - second)).sum(1)  # (B,)
    return _sum_of_modality_means(divergence, modalities).to(_result_dtype(logits_visible))


# Eq. 6. Each term is a function of the model's output, labels and modalities; further arguments come from params.yaml.

Feature = Literal["before_bn", "after_bn", "normalized"]


def _identity(output: Output, labels: Tensor, modalities: Tensor) -> Tensor:
    return functional.cross_entropy(output.logits, labels)


def _triplet(
    output: Output, labels: Tensor, modalities: Tensor, *, margin: float, features: Feature = "before_bn"
) -> Tensor:
    return triplet_loss(_features(output, features), labels, margin)


def _cross_modality_triplet(
    output: Output, labels: Tensor, modalities: Tensor, *, margin: float, features: Feature = "before_bn"
) -> Tensor:
    return cross_modality_triplet_loss(_features(output, features), labels, modalities, margin)


def _cross_modality_center(
    output: Output,
    labels: Tensor,
    modalities: Tensor,
    *,
    margin: float,
    negatives: Literal["anchor", "center"] = "anchor",
    features: Feature = "before_bn",
    center_gradient: bool = True,
) -> Tensor:
    feat = _features(output, features)
    return cross_modality_center_loss(feat, labels, modalities, margin, negatives, center_gradient)


def _modality_identity(output: Output, labels: Tensor, modalities: Tensor, *, detach_features: bool = False) -> Tensor:
    feat = output.feat_bn.detach() if detach_features else output.feat_bn
    visible, infrared = (functional.linear(feat, weight) for weight in output.heads)
    return modality_identity_loss(visible, infrared, labels, modalities)


def _mutual_learning(
    output: Output,
    labels: Tensor,
    modalities: Tensor,
    *,
    gradient: Literal["both", "same", "cross"] = "both",
    direction: Literal["cross_same", "same_cross"] = "cross_same",
    detach_classifiers: bool = False,
) -> Tensor:
    heads = [weight.detach() if detach_classifiers else weight for weight in output.heads]
    visible, infrared = (functional.linear(output.feat_bn, weight) for weight in heads)
    teachers = None
    if output.teachers is not None:
        feat = output.feat_bn.detach()
        teachers = functional.linear(feat, output.teachers[0]), functional.linear(feat, output.teachers[1])
    return mutual_learning_loss(visible, infrared, modalities, gradient, direction, teachers)


Term = Callable[..., Tensor]
TERMS: dict[str, Term] = {
    "L_id": _identity,
    "L_tri": _triplet,  # Eq. 1
    "L_c_tri": _cross_modality_triplet,  # Eq. 2
    "L_cc": _cross_modality_center,  # Eq. 3
    "L_sid": _modality_identity,  # Eq. 4
    "L_M": _mutual_learning,  # Eq. 5
}


def find_term(name: str) -> Term:
    """The term of that name in TERMS, or the function at an import path such as `my_package.my_loss`.

    A user's function has the signature `my_loss(output, labels, modalities, **arguments) -> Tensor`, see `Output`.
    Raises ValueError for an unknown name.
    """
    if name in TERMS:
        return TERMS[name]
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(TERMS)
        raise ValueError(f"unknown loss {name} ({error}); use one of {known} or an import path") from None


def own_files(losses: Iterable[str]) -> dict[str, Path]:
    """The Python files of the folders with a user's own losses, by folder and name: a loss may import its neighbors."""
    modules = [importlib.import_module(name.rpartition(".")[0]) for name in losses if name not in TERMS]
    folders = sorted({Path(str(module.__file__)).parent for module in modules})
    return {f"{folder.name}/{path.name}": path for folder in folders for path in sorted(folder.glob("*.py"))}


def check_terms(losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for an unknown term, an argument that it does not have, or one that it misses."""
    for name, arguments in losses.items():
        given = {key: value for key, value in arguments.items() if key != "weight"}
        function = find_term(name)
        try:
            inspect.signature(function).bind(None, None, None, **given)
        except TypeError as error:
            raise ValueError(f"losses.{name}: {error}; correct the row in params.yaml") from None
        for key, value in given.items():
            kind = inspect.get_annotations(function, eval_str=True).get(key)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"losses.{name}.{key}: expected one of {', '.join(get_args(kind))}, found {value}")
            if kind in (float, bool) and type(value) not in ((float, int) if kind is float else (bool,)):
                raise ValueError(f"losses.{name}.{key}: expected a {kind.__name__}, found {value!r}")


def weighted_sum(
    output: Output,
    labels: Integer[Tensor, " B"],
    modalities: Integer[Tensor, " B"],
    losses: Mapping[str, Mapping[str, Any]],
) -> dict[str, Float[Tensor, ""]]:
    """The terms of Eq. 6, unweighted, by name, and their weighted sum under `total`.

    Args: losses: for each term its `weight` and its arguments. A term with weight 0 is not computed.
    Source: the paper, Eq. 6. Choice: it omits L_sid, but no other loss teaches C_v and C_r identities.
    """
    terms = {}
    with torch.autocast(labels.device.type, enabled=False):
        for name, arguments in losses.items():
            if arguments["weight"] > 0:
                given = {key: value for key, value in arguments.items() if key != "weight"}
                terms[name] = find_term(name)(output, labels, modalities, **given)
    total = sum(losses[name]["weight"] * term for name, term in terms.items())
    return {**terms, "total": total}


def _features(output: Output, features: Feature) -> Tensor:
    if features == "normalized":
        return functional.normalize(output.feat)
    return output.feat_bn if features == "after_bn" else output.feat


def _hardest_triplets(feat: Tensor, labels: Tensor, *, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    _require(positives, labels, "has no positive: its identity has images of one modality only")
    _require(negatives, labels, "has no negative; sample at least two identities with both modalities")
    wide = _from_mean(feat)
    distances = _distances(wide, wide)
    farthest = distances.masked_fill(~positives, -torch.inf).argmax(1)  # (B,) j
    nearest = distances.masked_fill(~negatives, torch.inf).argmin(1)  # (B,) k
    hinge = margin - (wide - wide[nearest]).norm(dim=1) + (wide - wide[farthest]).norm(dim=1)
    return hinge.clamp(min=0).mean().to(_result_dtype(feat))


def _from_mean(feat: Tensor) -> Tensor:
    wide = feat.double()
    return wide - wide.mean(0).detach()  # a constant shift changes no distance, hence no gradient either


@torch.no_grad()
def _distances(left: Tensor, right: Tensor) -> Tensor:
    """(P, B) squared Euclidean distances. They choose the pairs; the gradient goes through the chosen pairs alone."""
    return left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T


def _by_modality(logits_visible: Tensor, logits_infrared: Tensor, modalities: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) each: the logits of the classifier of the image's modality, and of the other one."""
    visible, c_v, c_r = (modalities == VISIBLE)[:, None], logits_visible.double(), logits_infrared.double()
    return torch.where(visible, c_v, c_r), torch.where(visible, c_r, c_v)


def _sum_of_modality_means(values: Tensor, modalities: Tensor) -> Tensor:
    """The mean over visible images plus the mean over infrared images of `values` (B,)."""
    visible, infrared = modalities == VISIBLE, modalities == INFRARED
    _require((visible | infrared)[:, None], modalities, "is no modality: expected 0 or 1")
    _require((visible.any() & infrared.any()).expand(1, 1), modalities[:1], "is the only modality; sample both")
    n, m = visible.sum().double(), infrared.sum().double()
    return (values * torch.where(visible, 1 / n, 1 / m)).sum()


def _result_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _require(mask: Tensor, values: Tensor, problem: str) -> None:
    """Refuse a batch if a row of `mask` is False throughout; see the top of this file."""
    found = mask.any(1)
    if mask.device.type != "cpu":
        torch._assert_async(found.all(), f"a value in the batch {problem}")
    elif not found.all():
        raise ValueError(f"value {int(values[~found][0])} in the batch {problem}")
