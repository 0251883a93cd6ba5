"""Training: from a packed store and backbone weights to a model and its history.

Nothing here reads the test images, and nothing is selected: the last epoch is the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from danet_core.augment import augment_batch
from danet_core.config import Dataset, RunConfig, Variant
from danet_core.files import StudyError, exclusive, sha256_file, sha256_json
from danet_core.losses import cross_modality_center_loss, modality_identity_loss, mutual_learning_loss
from danet_core.model import DANet, Embedding
from danet_core.record import (
    SOURCES,
    RunFolder,
    fingerprint,
    load_checkpoint,
    made_with,
    remove_checkpoints,
    save_checkpoint,
    save_finished,
    sigterm_heeded,
)
from danet_core.repro import derived_seed, deterministic, resolve_device, stamp
from danet_core.sampler import IdentitySampler
from danet_core.store import PackedStore

TERMS = ("L_id", "L_cc", "L_sid", "L_M", "total")


class Batch(NamedTuple):
    """One P x K batch on the training device."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Int[Tensor, " B"]  # 0..C-1, in the order of the sorted training pids
    modalities: Int[Tensor, " B"]


class TrainingImages:
    """The training rows of a store, on the device when that is a GPU; a batch is one gather."""

    def __init__(self, store: PackedStore, splits: tuple[str, ...], trial: int, device: torch.device) -> None:
        self.rows = store.rows(splits, trial)
        self.pids, self.modalities = store.pids[self.rows], store.modalities[self.rows]
        self.identities, labels = np.unique(self.pids, return_inverse=True)
        self._labels, self._modalities = torch.from_numpy(labels), torch.from_numpy(self.modalities)
        self._device, self._store = device, store
        self._resident = torch.from_numpy(store.images[self.rows]).to(device) if device.type == "cuda" else None

    def batch(self, positions: Int[np.ndarray, " B"]) -> Batch:
        index = torch.from_numpy(positions)
        if self._resident is not None:
            images = self._resident[index.to(self._device)]
        else:
            images = torch.from_numpy(self._store.images[self.rows[positions]])
        return Batch(images, self._labels[index].to(self._device), self._modalities[index].to(self._device))


def loss_terms(output: Embedding, batch: Batch, variant: Variant) -> dict[str, Tensor]:
    """The terms of Eq. 6 that the variant has, unweighted, and their weighted sum `total`.

    CC acts on the feature before the BN neck. L_sid belongs to ML: Eq. 6 omits it, but without it C_v and C_r are never
    trained.
    """
    terms = {"L_id": functional.cross_entropy(output.logits.float(), batch.labels)}
    total = terms["L_id"]
    if variant.cc is not None:
        terms["L_cc"] = cross_modality_center_loss(
            output.feat, batch.labels, batch.modalities, variant.cc.margin, variant.cc.negatives
        )
        total = total + variant.cc.lambda_1 * terms["L_cc"]
    if variant.ml is not None:
        logits = output.logits_visible, output.logits_infrared
        terms["L_sid"] = modality_identity_loss(*logits, batch.labels, batch.modalities)
        terms["L_M"] = mutual_learning_loss(*logits, batch.modalities)
        total = total + variant.ml.lambda_sid * terms["L_sid"] + variant.ml.lambda_2 * terms["L_M"]
    return {**terms, "total": total}


def build_model(dataset: Dataset, num_classes: int, weights: Path | None) -> DANet:
    """The data set's network in channels-last memory, which convolutions are fastest in on every device."""
    model = DANet(num_classes, dataset.recipe.backbone, weights, width=dataset.recipe.width)
    return model.to(memory_format=torch.channels_last)


def train(
    config: RunConfig,
    folder: RunFolder,
    *,
    packed: Path = Path("data/packed"),
    weights: Path = Path("data/weights"),
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train one run, or go on from its checkpoint, and write its model and record into `folder`.

    Returns the record: resolved configuration, history by epoch, provenance and versions. Raises StudyError for
    unusable data, weights or checkpoints, for a loss that is not finite, when the run is being trained elsewhere, and
    after the epoch in which SIGTERM came.
    """
    with exclusive(folder.lock, f"run {config.dataset.name}/{config.name}"), sigterm_heeded() as told_to_stop:
        started = time.perf_counter()
        target = resolve_device(device)
        store = PackedStore.open(packed / config.dataset.name)
        weights_path = weights / f"{config.dataset.name}.safetensors"
        images = TrainingImages(store, config.dataset.train_splits, config.trial, target)
        with deterministic(derived_seed(config.seed, "initial weights")):
            model = build_model(config.dataset, len(images.identities), weights_path).to(target)
            provenance = {"data_sha256": store.meta["content_sha256"], "weights_sha256": sha256_file(weights_path)}
            kind = made_with(config, **provenance)
            provenance["fingerprint"] = fingerprint(config, **provenance)
            history = _fit(model, images, config, folder, kind, told_to_stop, log)
            versions = {**stamp(target), "train_code_sha256": sha256_json(SOURCES)}
        record = {
            "dataset": config.dataset.name,
            "variant": config.variant_name,
            "label": config.variant.label,
            "trial": config.trial,
            "seed": config.seed,
            "config": config.resolved(),
            "history": history,
            "provenance": provenance,
            "versions": versions,
            "command": f"dvc repro train_{config.dataset.layout}@{config.dataset.name}-{config.trial}-"
            f"{config.variant_name}-{config.seed}",
            "seconds": round(time.perf_counter() - started, 1),
        }
        record = save_finished(folder, model, record)
        remove_checkpoints(folder)
        return record


def _fit(
    model: DANet,
    images: TrainingImages,
    config: RunConfig,
    folder: RunFolder,
    kind: dict[str, Any],
    told_to_stop: Callable[[], bool],
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    recipe, device = config.dataset.recipe, next(model.parameters()).device
    sampler = IdentitySampler(images.pids, images.modalities, recipe.ids_per_batch, recipe.imgs_per_modality)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    history: list[dict[str, Any]] = []
    checkpoint = load_checkpoint(folder, kind, device, log)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        history = checkpoint["history"]
        log(f"resumed {config.dataset.name}/{config.name} after epoch {len(history)} of {config.epochs}")
    model.train()
    for epoch in range(len(history), config.epochs):
        rate = recipe.lr * recipe.decay ** sum(epoch >= milestone for milestone in config.milestones)
        for group in optimiser.param_groups:
            group["lr"] = rate
        row = _epoch(model, optimiser, images, sampler, config, epoch)
        history.append({"epoch": epoch + 1, "lr": rate, **row})
        _require_finite(model, epoch)
        stop = told_to_stop()
        if stop or (epoch + 1) % config.checkpoints.every_epochs == 0 or epoch + 1 == config.epochs:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history}
            save_checkpoint(folder, {"made_with": kind, **state})
        log(epoch_line(history[-1], config.epochs))
        if stop:
            raise StudyError(
                f"stopped by SIGTERM after epoch {epoch + 1} of {config.epochs}, whose checkpoint is whole; the same "
                "command goes on from there"
            )
    return history


def _epoch(
    model: DANet,
    optimiser: torch.optim.Optimizer,
    images: TrainingImages,
    sampler: IdentitySampler,
    config: RunConfig,
    epoch: int,
) -> dict[str, Any]:
    """One epoch; the terms stay on the device until its end, so that no step waits for the host."""
    recipe, device = config.dataset.recipe, next(model.parameters()).device
    order = np.random.default_rng(derived_seed(config.seed, "batches", epoch))
    chance = torch.Generator(device).manual_seed(derived_seed(config.seed, "augmentation", epoch))
    batches = sampler.epoch(recipe.steps_per_epoch, order)
    steps: list[dict[str, Tensor]] = []
    started = time.perf_counter()
    for positions in tqdm(batches, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", leave=False):
        batch = images.batch(positions)
        output = model(augment_batch(batch.images, recipe.augment, chance))
        terms = loss_terms(output, batch, config.variant)
        optimiser.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimiser.step()
        steps.append({name: term.detach() for name, term in terms.items()})
    means = _means(steps, epoch)
    seconds = time.perf_counter() - started
    return {**means, "images_per_s": round(batches.size / seconds, 1), "seconds": round(seconds, 2)}


def _means(steps: list[dict[str, Tensor]], epoch: int) -> dict[str, float | None]:
    """Mean of each term over the epoch, None for a term the variant lacks; StudyError for a NaN or infinite one."""
    means: dict[str, float | None] = dict.fromkeys(TERMS)
    for name in steps[0]:
        values = torch.stack([step[name] for step in steps]).cpu()
        broken = torch.nonzero(~torch.isfinite(values)).flatten()
        if len(broken):
            step = int(broken[0])
            raise StudyError(
                f"{name} is {values[step].item()} at step {step + 1} of epoch {epoch + 1}; expected a finite loss: "
                "lower `lr` in params.yaml, remove the run's checkpoints in build/checkpoints and start again"
            )
        means[name] = values.double().mean().item()
    return means


def _require_finite(model: DANet, epoch: int) -> None:
    """Raise StudyError when the epoch's last step broke a weight, which no loss has seen yet."""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in model.state_dict().values()])
    if not finite.all():
        name = list(model.state_dict())[int(torch.nonzero(~finite)[0])]
        raise StudyError(
            f"weights {name} are not finite after epoch {epoch + 1}; expected finite numbers: lower `lr` in "
            "params.yaml, remove the run's checkpoints in build/checkpoints and start again"
        )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch in one line: loss terms, learning rate, images/s and the time left at this speed."""
    terms = "  ".join(f"{name} {row[name]:.3f}" for name in TERMS if row[name] is not None)
    left = round((epochs - row["epoch"]) * row["seconds"])
    return (
        f"epoch {row['epoch']:>3}/{epochs}  {terms}  lr {row['lr']:.2e}  "
        f"{row['images_per_s']:,.0f} images/s  {left // 60}:{left % 60:02d} left"
    )
