"""Evaluation of a finished run: features of the test images, scores of its protocol, and the record of both.

Only this module reads test images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from danet_core import INFRARED, VISIBLE
from danet_core.model import DANet
from danet_study.analysis import Metric, best_and_worst_queries, modality_gap, modality_probe
from danet_study.checkpoint import build_model, load_run
from danet_study.classifiers import classifier_agreement
from danet_study.config import Evaluation, Recipe, RunConfig
from danet_study.data import TrainingImages, normalize
from danet_study.determinism import deterministic, resolve_device
from danet_study.files import StudyError, atomic_path, atomic_write_json, sha256_file, sha256_json
from danet_study.processes import exit_with_pipeline
from danet_study.protocols import PROTOCOLS, Images, ProtocolResult, camera_pairs, within_modality
from danet_study.store import PackedStore

FEATURES, RANKINGS = "features.npz", "rankings.json"
DIGITS = 6  # decimals in records


@dataclass(frozen=True)
class Features:
    """Features of n images: before and after the BN neck."""

    rows: Int[np.ndarray, " n"]  # of the store
    feat: Float[np.ndarray, "n D"]
    feat_bn: Float[np.ndarray, "n D"]
    pids: Int[np.ndarray, " n"]
    camids: Int[np.ndarray, " n"]
    modalities: Int[np.ndarray, " n"]

    def images(self, test_feature: str) -> Images:
        """What protocols score, by the feature `before_bn` or `after_bn`. Raises StudyError if it is not finite."""
        feat = self.feat if test_feature == "before_bn" else self.feat_bn
        return Images.of(feat, self.pids, self.camids, self.modalities, self.rows)

    def save(self, path: Path) -> None:
        """Write an .npz, whole or not at all."""
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read what `save` wrote. Raises StudyError for a missing or damaged file."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls(**{field.name: archive[field.name] for field in fields(cls)})
        except FileNotFoundError:
            raise StudyError(f"{path} is missing; evaluate the run first (`dvc repro`)") from None
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            raise StudyError(f"{path} is damaged ({type(error).__name__}); remove it and run `dvc repro`") from None


def evaluate(
    config: RunConfig,
    *,
    trained: RunConfig | None = None,
    runs: str | Path = "runs",
    packed: str | Path = "data/packed",
    weights: str | Path = "data/weights",
    results: str | Path = "results",
    device: str = "auto",
) -> dict[str, Any]:
    """Score the run `runs`/<run> on its test images, or on the identities that `evaluation.split` names.

    Writes `results`/records/<run>.json, whose scores are fractions, and features.npz and rankings.json into the run's
    folder. Equal runs give equal bytes. Returns the record. `trained`: the run whose weights are scored, if `config`
    only changes the test.

    Raises StudyError if the run is missing or was trained with another configuration, trial, store or backbone weights,
    or if a test identity is also a training identity.
    """
    exit_with_pipeline()
    dataset, tested = config.dataset, config.evaluation
    if dataset.protocol not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise StudyError(f"datasets.{dataset.name}.protocol: found {dataset.protocol!r}, expected {known}")
    run_dir, root = Path(runs) / config.name, Path(packed) / dataset.name
    backbone = Path(weights) / f"{dataset.name}.safetensors"
    trained = trained or config
    assert (config.losses, config.recipe) == (trained.losses, trained.recipe)
    model, run = load_run(Path(runs) / trained.name, trained)
    store = PackedStore.open(root)
    found = sha256_file(backbone) if backbone.exists() else "no file"
    _refuse_other(root, store.meta["content_sha256"], run["provenance"]["data_sha256"])
    _refuse_other(backbone, found, run["provenance"]["weights_sha256"])
    rows = store.rows(tested.split, config.trial)
    leaked = np.intersect1d(store.pids[store.rows(dataset.train_splits, config.trial)], store.pids[rows])
    if len(leaked):
        raise StudyError(f"{root}: {len(leaked)} {tested.split} identities are trained on; correct the splits")
    start = build_model(config.resolved(), model.classifier.out_features, backbone)
    before, features = (
        extract(one, store, rows, config.recipe, batch_size=tested.batch_size, device=device) for one in (start, model)
    )
    images, metric = features.images(config.model.test_feature), tested.metric
    protocol, marks = PROTOCOLS[dataset.protocol], _marks(tested, store)
    scored = protocol.score(images, store, tested)
    identities = images.pids, images.modalities
    query, gallery = (images.of_modality(side) for side in protocol.sides[protocol.ablation])
    infrared, visible = images.of_modality(INFRARED), images.of_modality(VISIBLE)
    scores = {
        "settings": {name: {**_setting(result), **marks} for name, result in scored.items()},
        "per_identity": _per_identity(scored[protocol.ablation], query),
        "within": {"visible": _within(visible, metric), "infrared": _within(infrared, metric)},
        "modality_gap": modality_gap(images.feat, *identities) | {"pretrained": modality_gap(before.feat, *identities)},
        "probe": {
            "pretrained": modality_probe(before.feat, *identities),
            "before_bn": modality_probe(features.feat, *identities),
            "after_bn": modality_probe(features.feat_bn, *identities),
        },
    }
    if len(np.unique(infrared.camids)) > 1 or len(np.unique(visible.camids)) > 1:  # the settings score a single pair
        scores["camera_pairs"] = camera_pairs(infrared, visible, metric)
    recipe, last = config.recipe, run["history"][-1]
    steps, final = recipe.epochs * recipe.steps_per_epoch, {term: last[term] for term in config.losses}
    scores["training"] = {"steps": steps, "epochs": recipe.epochs, "final": final}
    if config.losses.keys() & {"L_sid", "L_M"}:  # elsewhere C_v and C_r are not trained
        images_seen = TrainingImages(store, dataset.train_splits, config.trial, resolve_device(device))
        scores["classifiers"] = classifier_agreement(model, images_seen, config)
    record = {
        **{"run": config.name, "dataset": dataset.name, "trial": config.trial, "variant": config.variant},
        **{"seed": config.seed, "protocol": dataset.protocol, "split": tested.split},
        **{key: store.meta[key] for key in ("synthetic", "partial")},
        **_rounded(scores),
        "config": config.resolved(),
        "evaluation": tested.model_dump(mode="json"),
        "provenance": {**run["provenance"], "config_sha256": sha256_json(config.resolved())},
        "versions": run["versions"],
    }
    result = scored[protocol.ablation]
    drawn = gallery[result.gallery]
    ends = best_and_worst_queries(result.trials[0].ap, query, drawn, protocol.ignore(query, drawn), metric=metric)
    features.save(run_dir / FEATURES)
    atomic_write_json(run_dir / RANKINGS, {"setting": protocol.ablation, **marks, **ends})
    atomic_write_json(Path(results) / "records" / f"{config.name}.json", record)
    return record


@torch.inference_mode()
def extract(
    model: DANet,
    store: PackedStore,
    rows: Int[np.ndarray, " n"],
    recipe: Recipe,
    *,
    batch_size: int = 256,
    device: str = "auto",
) -> Features:
    """Features of the store's `rows`, in their order, with the model in evaluation mode and float32 arithmetic."""
    target, parts = resolve_device(device), []
    model = model.to(target).eval()
    with deterministic(0):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            images = normalize(torch.from_numpy(store.images[chosen]).to(target), recipe.augment)
            modalities = torch.from_numpy(store.modalities[chosen]).to(target)
            parts.append([part.float().cpu().numpy() for part in model.embed(images, modalities)])
    feat, feat_bn = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Features(rows, feat, feat_bn, store.pids[rows], store.camids[rows], store.modalities[rows])


def _refuse_other(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise StudyError(f"{path} ({found[:12]}) differs from that of the run ({expected[:12]}); run `dvc repro`")


def _setting(result: ProtocolResult) -> dict[str, Any]:
    per_trial = {key: [trial[key] for trial in result.per_trial] for key in ("cmc1", "mAP", "mINP")}
    same = ("mean", "n_query", "n_valid", "gallery_size", "chance_rank1", "cmc_level")
    return {key: getattr(result, key) for key in same} | {"per_trial": per_trial, "cmc": result.cmc.tolist()}


def _marks(evaluation: Evaluation, store: PackedStore) -> dict[str, str]:
    """What differs from the published protocol. `galleries` concerns data sets whose galleries are published."""
    metric = {} if evaluation.metric == "cosine" else {"metric": evaluation.metric}
    return metric | ({"galleries": "random_seed"} if store.galleries and evaluation.galleries == "random_seed" else {})


def _per_identity(result: ProtocolResult, query: Images) -> dict[str, list[Any]]:
    """Number of valid queries and mean Rank-1 and AP of each identity: what the bootstrap resamples."""
    valid, rank1, ap = result.per_query()
    pids, label, n = np.unique(query.pids[valid], return_inverse=True, return_counts=True)
    means = {key: (np.bincount(label, values[valid]) / n).tolist() for key, values in (("cmc1", rank1), ("ap", ap))}
    return {"pids": pids.tolist(), "n": n.tolist(), **means}


def _within(images: Images, metric: Metric) -> dict[str, float | int]:
    found = within_modality(images, metric)
    return {"cmc1": found.mean["cmc1"], "mAP": found.mean["mAP"], "n_query": found.n_query, "n_valid": found.n_valid}


def _rounded(value: Any) -> Any:
    """The same JSON value with floats rounded to DIGITS."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value
