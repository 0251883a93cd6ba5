"""Training: from a packed store and backbone weights to a model and its history.

Nothing here reads the test images, and nothing is selected: the last epoch is the model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from danet_core.augment import augment_batch
from danet_core.config import RunConfig
from danet_core.files import StudyError, exclusive, sha256_file, sha256_json
from danet_core.losses import (
    cross_modality_center_loss,
    cross_modality_triplet_loss,
    modality_identity_loss,
    mutual_learning_loss,
    triplet_loss,
)
from danet_core.model import DANet, Embedding
from danet_core.parallel import ALONE, Team, processes
from danet_core.parameters import CrossModalityCenter, Dataset, Recipe, Variant
from danet_core.precision import autocast, loss_scaler, require_precision
from danet_core.record import (
    SOURCES,
    RunFolder,
    differing_keys,
    fingerprint,
    load_checkpoint,
    made_with,
    remove_checkpoints,
    save_checkpoint,
    save_finished,
    sigterm_heeded,
)
from danet_core.repro import derived_seed, deterministic, stamp
from danet_core.sampler import IdentitySampler
from danet_core.store import PackedStore

TERMS = ("L_id", "L_cc", "L_sid", "L_M", "total")  # L_cc: the loss in CC's place, whichever equation it is
_RESIDENT_SHARE = 1 / 3  # of a GPU's free memory that the training images may take; the rest is the network's
_CHUNK = 1024  # images that go to the GPU at once, so that the host never holds a second copy of the store


class Batch(NamedTuple):
    """One P x K batch on the training device; of several processes, each has the images of its own rows only."""

    images: Tensor  # (B, 3, H, W) uint8; (B / processes, 3, H, W)
    labels: Int[Tensor, " B"]  # 0..C-1, in the order of the sorted training pids
    modalities: Int[Tensor, " B"]


class TrainingImages:
    """The training rows of a store as batches on the device.

    On a GPU the images lie in its memory where they take no more than a third of what is free, and a batch is one
    gather there; else two pinned buffers are filled in turn. On a CPU a batch is one gather from the memory map.
    Of several processes each gathers its own rows.
    """

    def __init__(
        self, store: PackedStore, splits: tuple[str, ...], trial: int, device: torch.device, team: Team = ALONE
    ) -> None:
        self.rows = store.rows(splits, trial)
        self.pids, self.modalities = store.pids[self.rows], store.modalities[self.rows]
        self.identities, labels = np.unique(self.pids, return_inverse=True)
        self._labels = torch.from_numpy(labels).to(device)
        self._modalities = torch.from_numpy(self.modalities).to(device)
        self._device, self._store, self._team = device, store, team
        self._resident = self._on_gpu() if device.type == "cuda" and self._fits_gpu() else None

    def batches(self, positions: Int[np.ndarray, "S B"]) -> Iterator[Batch]:
        """The batches of these positions in `rows`, in order; no batch makes the host wait for the work on the last."""
        index = torch.from_numpy(positions).to(self._device)  # once an epoch: each transfer from the host is a wait
        own = self._team.rows(positions.shape[1])
        if self._resident is not None:
            images: Iterator[Tensor] = (self._resident[row] for row in index[:, own])
        elif self._device.type == "cuda":
            images = self._pinned(positions[:, own])
        else:
            images = (
                torch.from_numpy(self._store.images[self.rows[row]]).to(self._device) for row in positions[:, own]
            )
        for row, gathered in zip(index, images, strict=True):
            yield Batch(gathered, self._labels[row], self._modalities[row])

    def _fits_gpu(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        return len(self.rows) * self._store.images[0].nbytes <= _RESIDENT_SHARE * free

    def _on_gpu(self) -> Tensor:
        images = torch.empty((len(self.rows), *self._store.images.shape[1:]), dtype=torch.uint8, device=self._device)
        for start in range(0, len(self.rows), _CHUNK):
            chunk = self._store.images[self.rows[start : start + _CHUNK]]
            images[start : start + _CHUNK] = torch.from_numpy(chunk)
        return images

    def _pinned(self, positions: Int[np.ndarray, "S B"]) -> Iterator[Tensor]:
        """One buffer is filled while the GPU is busy with the batch of the other; a full one is copied in the queue."""
        shape = (positions.shape[1], *self._store.images.shape[1:])
        buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event() for _ in range(2)]
        for step, row in enumerate(positions):
            buffer, event = buffers[step % 2], copied[step % 2]
            event.synchronize()  # two batches ago; at once for an event that has not been recorded yet
            np.take(self._store.images, self.rows[row], axis=0, out=buffer.numpy(), mode="clip")  # "raise" buffers
            images = buffer.to(self._device, non_blocking=True)
            event.record()
            yield images


def loss_terms(output: Embedding, batch: Batch, variant: Variant) -> dict[str, Tensor]:
    """The terms of Eq. 6 that the variant has, unweighted, and their weighted sum `total`.

    L_sid belongs to ML: Eq. 6 omits it, but without it C_v and C_r are never trained. A lambda_2 of 0 leaves L_M out.
    """
    terms = {"L_id": functional.cross_entropy(output.logits, batch.labels)}
    total = terms["L_id"]
    if variant.cc is not None:
        terms["L_cc"] = _feature_alignment(output, batch, variant.cc)
        total = total + variant.cc.lambda_1 * terms["L_cc"]
    if (ml := variant.ml) is not None:
        logits = output.logits_visible, output.logits_infrared
        terms["L_sid"] = modality_identity_loss(*logits, batch.labels, batch.modalities)
        total = total + ml.lambda_sid * terms["L_sid"]
        if ml.lambda_2 > 0:
            visible, infrared = output.averaged_visible, output.averaged_infrared
            averaged = None if visible is None or infrared is None else (visible, infrared)
            if output.mutual_visible is not None and output.mutual_infrared is not None:
                logits = output.mutual_visible, output.mutual_infrared
            terms["L_M"] = mutual_learning_loss(*logits, batch.modalities, ml.gradient, ml.direction, averaged)
            total = total + ml.lambda_2 * terms["L_M"]
    return {**terms, "total": total}


def _feature_alignment(output: Embedding, batch: Batch, cc: CrossModalityCenter) -> Tensor:
    """Eq. 3, or Eq. 1 or 2 in its place, of the features it acts on."""
    feat = output.feat_bn if cc.features == "after_bn" else output.feat
    if cc.features == "normalised":
        feat = functional.normalize(feat)
    if cc.equation == 1:
        return triplet_loss(feat, batch.labels, cc.margin)
    if cc.equation == 2:
        return cross_modality_triplet_loss(feat, batch.labels, batch.modalities, cc.margin)
    return cross_modality_center_loss(feat, batch.labels, batch.modalities, cc.margin, cc.negatives, cc.center_gradient)


def build_model(dataset: Dataset, num_classes: int, weights: Path | None, variant: Variant | None = None) -> DANet:
    """The network of a variant on a data set, its convolutions in channels-last memory where the recipe says so.

    Without a variant it is the Baseline's: one stream, and no averaged classifiers.
    """
    recipe, ml = dataset.recipe, None if variant is None else variant.ml
    model = DANet(
        num_classes,
        recipe.backbone,
        weights,
        width=recipe.width,
        pooling=recipe.pooling,
        gem_exponent=recipe.gem_exponent,
        streams="one" if variant is None else variant.streams,
        averaged=ml is not None and ml.foreign_average > 0,
        sid_trains="all" if ml is None else ml.sid_trains,
        mutual_trains="all" if ml is None else ml.mutual_trains,
    )
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def build_optimiser(model: DANet, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam over what is trained, fused into one pass over the weights."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


class LossesOf(nn.Module):
    """The model and its losses as one module: this process's images and the labels of the batch to `loss_terms`."""

    def __init__(self, model: nn.Module, config: RunConfig, team: Team = ALONE) -> None:
        super().__init__()
        self.model, self._config, self._team = model, config, team

    def forward(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        own = batch.modalities[self._team.rows(len(batch.modalities))]
        with autocast(self._config.dataset.recipe.precision, images.device):
            output = self.model(images, own)
        whole = Embedding._make(None if part is None else self._team.gathered(part) for part in output)
        return loss_terms(whole, batch, self._config.variant)


def training_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: RunConfig,
    chance: torch.Generator,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """Train on one batch; returns the loss terms, detached and on the device. Nothing in it reads a value there.

    Of several processes each computes its rows of the batch, and all the same loss of the whole of it. `network` is
    `LossesOf` the model, or what `team.network` made of it.
    """
    recipe, size = config.dataset.recipe, len(batch.labels)
    images = augment_batch(batch.images, recipe.augment, chance, (size, team.rows(size)))
    if not recipe.channels_last:
        images = images.contiguous()
    terms = network(images, batch)
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(terms["total"]).backward()
    scaler.step(optimiser)
    scaler.update()
    if (ml := config.variant.ml) is not None and ml.foreign_average > 0:
        alone: Any = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        alone.model.update_averages(ml.foreign_average)
    return {name: term.detach() for name, term in terms.items()}


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
    unusable data, weights or checkpoints, for a loss that is not finite, for a device that lacks the memory or the
    precision, when the run is being trained elsewhere, and after the epoch in which SIGTERM came.

    Under torchrun its processes train the run together: the first one reads and writes the files of `folder`, and the
    weights are those of one process but for rounding (with `batch_norm: per_process`, of that number of processes).
    """
    with processes(device) as team:
        return _train(config, folder, packed, weights, team, log if team.first else lambda line: None)


def _train(
    config: RunConfig, folder: RunFolder, packed: Path, weights: Path, team: Team, log: Callable[[str], None]
) -> dict[str, Any]:
    """The same in each of the team's processes, with the same record from each."""
    recipe, target = config.dataset.recipe, team.device
    require_precision(recipe.precision, target)
    _require_divisible(recipe, config.variant, team)
    with (
        exclusive(folder.lock, f"run {config.place}") if team.first else contextlib.nullcontext(),
        sigterm_heeded() as told_to_stop,
        _what_to_lower(recipe, target),
    ):
        started = time.perf_counter()
        store = PackedStore.open(packed / config.dataset.name)
        weights_path = weights / f"{config.dataset.name}.safetensors"
        images = TrainingImages(store, config.dataset.train_splits, config.trial, target, team)
        with deterministic(derived_seed(config.seed, "initial weights"), tf32=recipe.precision == "tf32"):
            model = build_model(config.dataset, len(images.identities), weights_path, config.variant).to(target)
            made_of = {"data_sha256": store.meta["content_sha256"], "weights_sha256": sha256_file(weights_path)}
            kind = made_with(config, **made_of)
            team.require_same(kind, differing_keys)
            history = _fit(model, images, config, folder, kind, team, told_to_stop, log)
            versions = {**stamp(target), "train_code_sha256": sha256_json(SOURCES)}
        record = {
            "dataset": config.dataset.name,
            "variant": config.variant_name,
            "label": config.variant.label,
            "trial": config.trial,
            "seed": config.seed,
            **({} if config.reading is None else {"reading": config.reading}),
            "config": config.resolved(),
            "history": history,
            "provenance": {
                **made_of,
                "fingerprint": fingerprint(config, **made_of),
                "processes": list(dict.fromkeys(row.get("processes", 1) for row in history)),  # in the order of use
            },
            "versions": versions,
            "command": config.command,
            "seconds": round(time.perf_counter() - started, 1),
        }
        record = team.from_first(save_finished, folder, model, record)
        if team.first:
            remove_checkpoints(folder)
        return record


def _require_divisible(recipe: Recipe, variant: Variant, team: Team) -> None:
    """Raise StudyError for batches that the team cannot split, or not into rows that its batch norm can work with."""
    own = team.rows(2 * recipe.ids_per_batch * recipe.imgs_per_modality)
    if variant.streams == "two" and recipe.ids_per_batch % team.size:
        raise StudyError(
            f"streams two: {recipe.ids_per_batch} identities cannot be split between {team.size} processes so that "
            "each has as many images of either modality, which the two entrances need; start a number of processes "
            f"that divides {recipe.ids_per_batch}"
        )
    if recipe.batch_norm == "per_process" and own.stop - own.start == 1:
        raise StudyError(
            f"batch_norm per_process with {team.size} processes leaves one image to each, which has no variance; start "
            "fewer processes, or set `batch_norm` of the recipe in params.yaml to global"
        )


@contextlib.contextmanager
def _what_to_lower(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turn a GPU's want of memory into a StudyError that says which parameter to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        shorter = ", or set `precision` to bfloat16 or float16" if recipe.precision in ("float32", "tf32") else ""
        raise StudyError(
            f"the memory of device {device} is too small for {recipe.backbone} with batches of {recipe.ids_per_batch} "
            f"identities x {2 * recipe.imgs_per_modality} images in {recipe.precision}; lower `ids_per_batch` of the "
            f"recipe in params.yaml{shorter}"
        ) from None


def _fit(
    model: DANet,
    images: TrainingImages,
    config: RunConfig,
    folder: RunFolder,
    kind: dict[str, Any],
    team: Team,
    told_to_stop: Callable[[], bool],
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    recipe, device = config.dataset.recipe, next(model.parameters()).device
    sampler = IdentitySampler(images.pids, images.modalities, recipe.ids_per_batch, recipe.imgs_per_modality)
    optimiser = build_optimiser(model, recipe)
    history: list[dict[str, Any]] = []
    place = device if team.size == 1 else torch.device("cpu")  # no other process has the first one's GPU
    checkpoint = team.from_first(load_checkpoint, folder, kind, place, log)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        history = checkpoint["history"]
        log(f"resumed {config.place} after epoch {len(history)} of {config.epochs}")
    model.train()
    if recipe.compile:
        model.compile()
    network = team.network(LossesOf(model, config, team), recipe.batch_norm)
    saving, saved = 0.0, time.perf_counter()  # what the last checkpoint took, and when it was whole
    for epoch in range(len(history), config.epochs):
        rate = recipe.lr * recipe.decay ** sum(epoch >= milestone for milestone in config.milestones)
        for group in optimiser.param_groups:
            group["lr"] = rate
        scale = history[-1]["loss_scale"] if history and recipe.precision == "float16" else None
        scaler = loss_scaler(recipe.precision, device, recipe.steps_per_epoch, scale)
        row = _epoch(network, optimiser, scaler, images, sampler, config, epoch, team)
        history.append({"epoch": epoch + 1, "lr": rate, **row})
        team.share_buffers(model, recipe.batch_norm)
        _require_finite(model, epoch)
        stop = team.any(told_to_stop())
        started = time.perf_counter()
        due = team.any(team.first and config.checkpoints.due(epoch + 1, saving, started - saved))
        if stop or due or epoch + 1 == config.epochs:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history}
            team.from_first(save_checkpoint, folder, {"made_with": kind, **state})
            saved = time.perf_counter()
            saving = saved - started
        log(epoch_line(history[-1], config.epochs))
        if stop:
            raise StudyError(
                f"stopped by SIGTERM after epoch {epoch + 1} of {config.epochs}, whose checkpoint is whole; the same "
                "command goes on from there"
            )
    return history


def _epoch(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: TrainingImages,
    sampler: IdentitySampler,
    config: RunConfig,
    epoch: int,
    team: Team,
) -> dict[str, Any]:
    """One epoch; the terms stay on the device until its end, so that no step waits for the host."""
    recipe, device = config.dataset.recipe, team.device
    order = np.random.default_rng(derived_seed(config.seed, "batches", epoch))
    chance = torch.Generator(device).manual_seed(derived_seed(config.seed, "augmentation", epoch))
    positions = sampler.epoch(recipe.steps_per_epoch, order)
    steps: list[dict[str, Tensor]] = []
    started = time.perf_counter()
    batches: Iterable[Batch] = images.batches(positions)
    if team.first:
        bar = f"epoch {epoch + 1}/{config.epochs}"
        batches = tqdm(batches, desc=bar, total=len(positions), unit="step", leave=False)
    for batch in batches:
        steps.append(training_step(network, optimiser, scaler, batch, config, chance, team))
    means = _means(steps, epoch)
    seconds = time.perf_counter() - started
    row = {**means, "images_per_s": round(positions.size / seconds, 1), "seconds": round(seconds, 2)}
    if team.size > 1:
        row["processes"] = team.size
    return {**row, "loss_scale": scaler.get_scale()} if scaler.is_enabled() else row


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
