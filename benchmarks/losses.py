"""Each loss against its loop over anchors and against one product of the batch with itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import Times, growth, interleaved, main, page, table
from danet_core import INFRARED, VISIBLE
from danet_core.losses import (
    cross_modality_center_loss,
    cross_modality_triplet_loss,
    modality_identity_loss,
    mutual_learning_loss,
    triplet_loss,
)

ROUNDS, CALLS, SLOW_CALLS = 9, 20, 3
FEATURES, CLASSES, PEOPLE, PER_IDENTITY = 2048, 395, 16, 8  # the paper's batch: 128 images of 16 identities
MARGIN = 0.7


class Inputs:
    """A random batch of P identities, half of each one's images infrared, with features and two classifiers' logits."""

    def __init__(self, people: int, per_identity: int, features: int, classes: int) -> None:
        torch.manual_seed(0)
        count = people * per_identity
        self.labels = torch.arange(people).repeat_interleave(per_identity)
        self.modalities = (torch.arange(count) % 2).long()
        self.feat = torch.randn(count, features, requires_grad=True)
        self.visible, self.infrared = (torch.randn(count, classes, requires_grad=True) for _ in range(2))

    def run(self, value: Callable[[], Tensor]) -> Callable[[], None]:
        """The function's value with its gradient, as one action."""

        def action() -> None:
            for leaf in (self.feat, self.visible, self.infrared):
                leaf.grad = None
            value().backward()

        return action

    def product(self) -> None:
        """One `f @ f.T`, forward and backward."""
        self.feat.grad = None
        result = self.feat @ self.feat.T
        result.backward(torch.ones_like(result))


def vectorised(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    feat, visible, infrared = inputs.feat, inputs.visible, inputs.infrared
    labels, modalities = inputs.labels, inputs.modalities
    return {
        "Eq. 1, triplet": lambda: triplet_loss(feat, labels, MARGIN),
        "Eq. 2, cross-modality triplet": lambda: cross_modality_triplet_loss(feat, labels, modalities, MARGIN),
        "Eq. 3, cross-modality centre": lambda: cross_modality_center_loss(feat, labels, modalities, MARGIN),
        "Eq. 4, modality identity": lambda: modality_identity_loss(visible, infrared, labels, modalities),
        "Eq. 5, mutual learning": lambda: mutual_learning_loss(visible, infrared, modalities),
    }


def loops(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The same losses as public code writes its triplets: a Python loop over the anchors, each a row operation."""
    feat, visible, infrared = inputs.feat, inputs.visible, inputs.infrared
    labels, modalities = inputs.labels, inputs.modalities
    return {
        "Eq. 1, triplet": lambda: triplet_by_anchor(feat, labels, None),
        "Eq. 2, cross-modality triplet": lambda: triplet_by_anchor(feat, labels, modalities),
        "Eq. 3, cross-modality centre": lambda: centre_by_anchor(feat, labels, modalities),
        "Eq. 4, modality identity": lambda: identity_by_anchor(visible, infrared, labels, modalities),
        "Eq. 5, mutual learning": lambda: mutual_by_anchor(visible, infrared, modalities),
    }


def distances(left: Tensor, right: Tensor) -> Tensor:
    """All Euclidean distances of two sets of rows from one product; the floor keeps the root's gradient finite."""
    square = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
    return square.clamp(min=1e-12).sqrt()


def triplet_by_anchor(feat: Tensor, labels: Tensor, modalities: Tensor | None) -> Tensor:
    """Eq. 1, or Eq. 2 where modalities are given."""
    dist = distances(feat, feat)
    same = labels[:, None] == labels
    other = ~same
    if modalities is not None:
        across = modalities[:, None] != modalities
        same, other = same & across, other & across
    farthest, nearest = [], []
    for i in range(len(feat)):
        farthest.append(dist[i][same[i]].max())
        nearest.append(dist[i][other[i]].min())
    return (MARGIN - torch.stack(nearest) + torch.stack(farthest)).clamp(min=0).mean()


def centre_by_anchor(feat: Tensor, labels: Tensor, modalities: Tensor) -> Tensor:
    """Eq. 3: the centres one by one, their distances to all features from one product, then the anchors."""
    place: dict[tuple[int, int], int] = {}
    centres: list[Tensor] = []
    for pid in labels.unique().tolist():
        for modality in (VISIBLE, INFRARED):
            place[pid, modality] = len(centres)
            centres.append(feat[(labels == pid) & (modalities == modality)].mean(0))
    dist = distances(torch.stack(centres), feat)
    other = (labels[:, None] != labels) & (modalities[:, None] == modalities)
    pull, push = [], []
    for i, (pid, modality) in enumerate(zip(labels.tolist(), modalities.tolist(), strict=True)):
        row = dist[place[pid, INFRARED if modality == VISIBLE else VISIBLE]]
        pull.append(row[i])
        push.append((MARGIN - row[other[i]].min()).clamp(min=0))
    return torch.stack(pull).mean() + torch.stack(push).mean()


def identity_by_anchor(visible: Tensor, infrared: Tensor, labels: Tensor, modalities: Tensor) -> Tensor:
    """Eq. 4, the cross-entropy of one image at a time."""
    terms: dict[int, list[Tensor]] = {VISIBLE: [], INFRARED: []}
    for i, modality in enumerate(modalities.tolist()):
        own = visible if modality == VISIBLE else infrared
        terms[modality].append(functional.cross_entropy(own[i], labels[i]))
    return torch.stack(terms[VISIBLE]).mean() + torch.stack(terms[INFRARED]).mean()


def mutual_by_anchor(visible: Tensor, infrared: Tensor, modalities: Tensor) -> Tensor:
    """Eq. 5, the divergence of one image at a time."""
    terms: dict[int, list[Tensor]] = {VISIBLE: [], INFRARED: []}
    for i, modality in enumerate(modalities.tolist()):
        own, foreign = (visible[i], infrared[i]) if modality == VISIBLE else (infrared[i], visible[i])
        own, foreign = own.log_softmax(0), foreign.log_softmax(0)
        terms[modality].append(functional.kl_div(own, foreign, reduction="sum", log_target=True))
    return torch.stack(terms[VISIBLE]).mean() + torch.stack(terms[INFRARED]).mean()


def section(tiny: bool) -> str:
    torch.set_num_threads(1)
    rounds, calls, slow_calls = (2, 1, 1) if tiny else (ROUNDS, CALLS, SLOW_CALLS)
    features, classes = (16, 8) if tiny else (FEATURES, CLASSES)
    people, per_identity = (4, 4) if tiny else (PEOPLE, PER_IDENTITY)
    inputs = Inputs(people, per_identity, features, classes)
    fast, slow = vectorised(inputs), loops(inputs)
    rows = []
    for name, value in fast.items():
        torch.testing.assert_close(value().detach(), slow[name]().detach(), rtol=1e-3, atol=1e-4)
        actions = {"loss": inputs.run(value), "product": inputs.product, "loop": inputs.run(slow[name])}
        times = interleaved(actions, rounds, {"loss": calls, "product": calls, "loop": slow_calls})
        loss, product, loop = (times[key] for key in actions)
        rows.append((name, loss, loss.over(product), loop, loop.over(loss)))
    batch = people * per_identity
    batches = [batch // 2 * 2**step for step in range(2 if tiny else 4)]
    groups = [people // 2 * 2**step for step in range(2 if tiny else 4)]
    heads = [classes // 4 * 2**step for step in range(2 if tiny else 5)]
    by_batch = [_grown("Eq. 3", Inputs(size // per_identity, per_identity, features, 2), rounds, calls)
                for size in batches]  # fmt: skip
    by_group = [_grown("Eq. 3", Inputs(size, batch // size, features, 2), rounds, calls) for size in groups]
    by_class = [_grown("Eq. 5", Inputs(people, per_identity, 2, size), rounds, calls) for size in heads]
    return page(
        "## Losses",
        f"""Forward and backward in float32 on one CPU thread, for {batch} features of {features} numbers, {people}
        identities, logits of {classes} classes. Product: one `f @ f.T` of the features, forward and backward. Loop: the
        same from a Python loop over the images (anchors), as public re-identification code writes its triplet losses:
        one product first, then for each image operations on its row; forward and backward, checked to give the same
        value. danet_core/slow.py, with a loop for each sum, is there to be read and is not timed.""",
        table(("loss", "time", "over the product", "loop", "loop / loss"), rows),
        f"How Eq. 3 grows with the images of a batch, {per_identity} of each identity:",
        growth("images", batches, by_batch),
        f"How Eq. 3 grows with the identities in a batch of {batch} images:",
        growth("identities", groups, by_group),
        "How Eq. 5 grows with the classes:",
        growth("classes", heads, by_class),
    )


def _grown(equation: str, inputs: Inputs, rounds: int, calls: int) -> Times:
    value = next(value for name, value in vectorised(inputs).items() if name.startswith(equation))
    return interleaved({"loss": inputs.run(value)}, rounds, {"loss": calls})["loss"]


if __name__ == "__main__":
    main(section)
