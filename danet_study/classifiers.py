"""Why ML does what it does (docs/why_ml.md): do C_v and C_r agree, and how hard does each loss pull at the feature?"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from danet_core import MODALITIES
from danet_core.losses import weighted_sum
from danet_core.model import DANet
from danet_study.config import Augment, RunConfig
from danet_study.data import PKSampler, TrainingImages, augment_batch, normalize
from danet_study.determinism import autocast, derived_seed, deterministic

N_IMAGES, N_BATCHES = 1024, 8  # drawn for the accuracies and for the gradients


def classifier_agreement(model: DANet, images: TrainingImages, config: RunConfig) -> dict[str, Any]:
    """Measures of a trained run, on its training images; the model is not changed.

    cosine: between an identity's weights in C_v and in C_r; mean and standard deviation over identities.
    accuracy: of C, C_v and C_r on visible and on infrared images, in evaluation mode.
    gradient: of each weighted term but L_id, the norm of its gradient at the pooled feature (B, D), over that of L_id;
    mean and standard deviation over batches.
    """
    seed = derived_seed(config.seed, "classifiers")
    order = np.random.default_rng(seed)
    with deterministic(0):
        cosine = torch.cosine_similarity(model.classifier_visible.weight, model.classifier_infrared.weight)  # (C,)
        drawn = order.permutation(len(images.pids))[:N_IMAGES]
        accuracy = _accuracies(model.eval(), images, drawn, config.recipe.augment)
        ratios = _gradient_ratios(copy.deepcopy(model).train(), images, config, order, seed)
    return {
        "cosine": _spread(cosine.detach().cpu().numpy()),
        "accuracy": accuracy,
        "gradient": {name: _spread(values) for name, values in ratios.items()},
    }


def _accuracies(model: DANet, images: TrainingImages, rows: Any, augment: Augment) -> dict[str, dict[str, float]]:
    heads = {"C": model.classifier, "C_v": model.classifier_visible, "C_r": model.classifier_infrared}
    hits, modalities = [], []
    for part in np.array_split(rows, -(-len(rows) // 128)):
        (batch,) = images.batches(part[None])
        with torch.inference_mode():
            _, feat = model.embed(normalize(batch.images, augment), batch.modalities)
            hits.append(torch.stack([head(feat).argmax(1) == batch.labels for head in heads.values()], 1).cpu())
        modalities.append(batch.modalities.cpu())
    hit, modality = torch.cat(hits).numpy(), torch.cat(modalities).numpy()  # (n, 3), (n,)
    return {
        head: {title: float(hit[modality == side, k].mean()) for side, title in enumerate(MODALITIES)}
        for k, head in enumerate(heads)
    }


def _gradient_ratios(
    model: DANet, images: TrainingImages, config: RunConfig, order: np.random.Generator, seed: int
) -> dict[str, list[float]]:
    """By term, a ratio for each batch. Sampling, augmentation, batch norm and precision are those of training."""
    if "L_id" not in config.losses:
        return {}
    recipe, device = config.recipe, next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    sampler = PKSampler(images.pids, images.modalities, recipe.ids_per_batch, recipe.imgs_per_modality)
    ratios: dict[str, list[float]] = {name: [] for name in config.losses if name != "L_id"}
    for batch in images.batches(sampler.epoch(N_BATCHES, order)):
        with autocast(recipe.precision, device):
            output = model(augment_batch(batch.images, recipe.augment, generator), batch.modalities)
        terms = weighted_sum(output, batch.labels, batch.modalities, config.losses)
        norms = {}
        for name, values in config.losses.items():
            loss, feat = values["weight"] * terms[name], output.feat
            # materialize_grads: zeros for a term that does not reach the feature
            (gradient,) = torch.autograd.grad(loss, feat, retain_graph=True, materialize_grads=True)
            norms[name] = float(gradient.norm())
        for name, found in ratios.items():
            found.append(norms[name] / norms["L_id"])
    return ratios


def _spread(values: Any) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}
