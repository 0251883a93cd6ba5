"""Training of one run. The last epoch is the model; nothing is selected, and no test image is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danet_core.losses import check_terms, own_files, weighted_sum
from danet_core.model import DANet
from danet_study.checkpoint import CHECKPOINTS, build_model, load_checkpoint, save_checkpoint, save_run
from danet_study.config import Recipe, RunConfig
from danet_study.data import Batch, PKSampler, TrainingImages, augment_batch
from danet_study.determinism import autocast, code_sha256, derived_seed, deterministic, resolve_device, versions
from danet_study.files import StudyError, exclusive, sha256_file, sha256_json
from danet_study.processes import exit_with_pipeline
from danet_study.store import PackedStore

NOT_TERMS = ("epoch", "lr", "images_per_s", "seconds")  # keys of a history row that are no loss


def train(
    config: RunConfig,
    *,
    runs: str | Path = "runs",
    packed: str | Path = "data/packed",
    weights: str | Path = "data/weights",
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a run, or resume it from its checkpoint, and write model and record to `runs`/<run>.

    Returns the record: configuration, history by epoch, provenance, versions. Raises StudyError for unusable data,
    weights, device or checkpoint, for a loss that is not finite, and if another process trains the same run.
    """
    exit_with_pipeline()
    check_terms(config.losses)
    target, recipe, checkpoint = resolve_device(device, config.recipe.precision), config.recipe, _checkpoint(config)
    with (
        exclusive(checkpoint.with_suffix(".lock"), f"run {config.name}"),
        deterministic(derived_seed(config.seed, "initial weights"), tf32=recipe.precision == "tf32"),
    ):
        started = time.perf_counter()
        store = PackedStore.open(Path(packed) / config.dataset.name)
        images = TrainingImages(store, config.dataset.train_splits, config.trial, target)
        backbone = Path(weights) / f"{config.dataset.name}.safetensors"
        model = build_model(config.resolved(), images.n_classes, backbone).to(target)
        fingerprint = {
            "config": config.resolved(),
            "data": store.meta["content_sha256"],
            "weights": sha256_file(backbone),
            "code": code_sha256(),
            "losses": {name: sha256_file(path) for name, path in own_files(config.losses).items()},
            "libraries": {"torch": str(torch.__version__), "numpy": np.__version__},
        }
        try:
            history = fit(model, images, config, checkpoint, fingerprint, log)
        except torch.OutOfMemoryError:
            raise StudyError(f"run {config.name}: {target} is out of memory; lower recipe.ids_per_batch") from None
        record = {
            **{"run": config.name, "dataset": config.dataset.name, "trial": config.trial},
            **{"variant": config.variant, "seed": config.seed, "config": config.resolved(), "history": history},
            "provenance": {
                "data_sha256": fingerprint["data"],
                "weights_sha256": fingerprint["weights"],
                "fingerprint": sha256_json(fingerprint),
            },
            "versions": versions(target),
            "seconds": round(time.perf_counter() - started, 1),
        }
        record = save_run(Path(runs) / config.name, model, record)
        checkpoint.unlink(missing_ok=True)
        return record


def fit(
    model: DANet,
    images: TrainingImages,
    config: RunConfig,
    checkpoint: Path,
    fingerprint: dict[str, Any],
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All epochs, with a checkpoint after each; returns the history, one row per epoch."""
    recipe, device = config.recipe, next(model.parameters()).device
    sampler = PKSampler(images.pids, images.modalities, recipe.ids_per_batch, recipe.imgs_per_modality)
    optimizer = build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    history: list[dict[str, Any]] = []
    state = load_checkpoint(checkpoint, fingerprint, device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history = state["history"]
        log(f"resumed {config.name} after epoch {len(history)} of {recipe.epochs}")
    model.train()
    for epoch in range(len(history), recipe.epochs):
        rate = recipe.lr * recipe.decay ** sum(epoch >= milestone for milestone in recipe.milestones)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Generators are seeded by epoch, so that a resumed run needs no generator state.
        order = np.random.default_rng(derived_seed(config.seed, "batches", epoch))
        generator = torch.Generator(device).manual_seed(derived_seed(config.seed, "augmentation", epoch))
        started = time.perf_counter()
        batches = images.batches(sampler.epoch(recipe.steps_per_epoch, order))
        steps = [train_step(model, optimizer, scaler, batch, config, generator) for batch in batches]
        means = epoch_means(steps, f"epoch {epoch + 1} of run {config.name}")
        seconds = time.perf_counter() - started
        n_images = 2 * recipe.ids_per_batch * recipe.imgs_per_modality * recipe.steps_per_epoch
        speed = {"images_per_s": round(n_images / seconds, 1), "seconds": round(seconds, 2)}
        history.append({"epoch": epoch + 1, "lr": rate, **means, **speed})
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_checkpoint(checkpoint, {"fingerprint": fingerprint, "history": history, **state})
        log(epoch_line(history[-1], recipe.epochs))
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise StudyError(f"weights of run {config.name} are not finite after its last step; lower recipe.lr")
    return history


def train_step(
    model: DANet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: RunConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One step; returns the loss terms, detached and on the device. It reads no value, so a GPU never waits."""
    inputs = augment_batch(batch.images, config.recipe.augment, generator)
    if not config.recipe.channels_last:
        inputs = inputs.contiguous()
    with autocast(config.recipe.precision, inputs.device):
        output = model(inputs, batch.modalities)
    terms = weighted_sum(output, batch.labels, batch.modalities, config.losses)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(terms["total"]).backward()
    scaler.step(optimizer)
    scaler.update()
    model.update_teachers()
    return {name: term.detach() for name, term in terms.items()}


def build_optimizer(model: DANet, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam over all trained parameters, as in the paper; `fused` updates them in one pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def epoch_means(steps: list[dict[str, Tensor]], where: str) -> dict[str, float]:
    """The mean of each term over the epoch. Raises StudyError for a loss that is not finite."""
    means = {}
    for name in steps[0]:
        values = torch.stack([step[name] for step in steps]).double().cpu()
        if not values.isfinite().all():
            step = int((~values.isfinite()).nonzero()[0]) + 1
            raise StudyError(
                f"{name} is {values[step - 1].item()} at step {step}, {where}; lower recipe.lr in params.yaml"
            )
        means[name] = values.mean().item()
    return means


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch in one line: loss terms, learning rate, images/s and the time left at this speed."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in NOT_TERMS)
    left = round((epochs - row["epoch"]) * row["seconds"])
    return (
        f"epoch {row['epoch']:>3}/{epochs}  {terms}  lr {row['lr']:.1e}  {row['images_per_s']:.0f} images/s  "
        f"{left // 60}:{left % 60:02d} left"
    )


def _checkpoint(config: RunConfig) -> Path:
    return CHECKPOINTS / f"{config.name}.pt"
