"""Evaluation: from a finished run to its test features and its metrics record. The test images are read here only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from danet_core import INFRARED, VISIBLE, protocols
from danet_core.augment import normalise
from danet_core.config import RunConfig
from danet_core.distances import centre_claim
from danet_core.extremes import Side, extreme_queries
from danet_core.files import StudyError, atomic_path, atomic_write_json, sha256_file, sha256_json
from danet_core.model import DANet
from danet_core.probe import modality_probe
from danet_core.record import RunFolder, load_finished
from danet_core.repro import deterministic, resolve_device
from danet_core.runs import read_features, read_training_record
from danet_core.store import PackedStore
from danet_core.train import build_model


@dataclass(frozen=True)
class Features:
    """Features of n images with what the protocols need to know of each."""

    rows: Int[np.ndarray, " n"]  # in the store
    feat: Float[np.ndarray, "n D"]  # before the BN neck
    feat_bn: Float[np.ndarray, "n D"]  # after it
    pids: Int[np.ndarray, " n"]
    camids: Int[np.ndarray, " n"]
    modalities: Int[np.ndarray, " n"]

    def retrieval(self, test_feature: str) -> Float[np.ndarray, "n D"]:
        """The feature images are compared by: `before_bn` or `after_bn`."""
        return self.feat if test_feature == "before_bn" else self.feat_bn

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz, whole or not at all."""
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote; a missing or damaged file is a StudyError."""
        return cls(**read_features(path, cls.__dataclass_fields__))


def evaluate(
    config: RunConfig,
    folder: RunFolder,
    *,
    packed: Path = Path("data/packed"),
    weights: Path = Path("data/weights"),
    results: Path = Path("results"),
    device: str = "auto",
    split_trial: int | None = None,
) -> dict[str, Any]:
    """Extract the run's test features, score them under its layout's protocol, and write features and metrics record.

    The record (results/<dataset>/metrics/<run>.json) holds, as fractions: `settings` (the cross-modality protocols),
    `within` (retrieval inside each modality, see protocols.within_modality), `figure1` (distances.centre_claim), the
    last epoch's training terms, `probe` (probe.modality_probe of the test images: `pretrained` by the backbone weights
    that the run started from, `before_bn` and `after_bn` by the trained model) and, for SYSU-MM01's layout,
    `camera_pairs` (protocols.camera_pairs, infrared queries; RegDB has one pair, which its settings score). `queries`
    are extremes.extreme_queries of the first setting: infrared queries, for SYSU-MM01's layout on its first gallery.
    `config` is what the weights depend on, `evaluation` how they were scored. A reading's record stands at
    RunConfig.metrics and names the reading; where it trains as another row does, `folder` is that row's run.
    Nothing depends on clock or folder, so that equal runs give equal bytes.
    A setting also names what is not the published protocol, where there is such: `galleries` ("random_seed"), `metric`
    ("euclidean") and `rerank` (its numbers); `queries` names such a metric too. The setting of the
    ablation (all_single, thermal_to_visible) holds `per_query`: for each query with a match its row in the store, its
    identity, and its Rank-1 and AP averaged over the galleries, to six decimals; a reading's does not, for readings are
    compared over seeds alone.

    `split_trial` is the trial whose test images are scored, the configuration's when None. It has to be the one that
    the run was trained on.

    Raises StudyError for a run that is missing, of another configuration or another trial, and for data or backbone
    weights it was not trained on.
    """
    scored = config.trial if split_trial is None else split_trial
    trained = read_training_record(folder.record)["trial"]
    if not trained == config.trial == scored:
        store = PackedStore.open(packed / config.dataset.name)
        _refuse_other_trial(store, config, folder, trained, config.trial if scored == trained else scored)
    tensors, run = load_finished(folder, config.trained or config)
    store = PackedStore.open(packed / config.dataset.name)
    if store.meta["content_sha256"] != run["provenance"]["data_sha256"]:
        raise StudyError(
            f"{store.root}: expected the data the run {folder.root} was trained on "
            f"({run['provenance']['data_sha256'][:12]}), found {store.meta['content_sha256'][:12]}; run `dvc repro`"
        )
    rows = store.rows("test", config.trial)
    _refuse_leak(store, rows, config)
    start = weights / f"{config.dataset.name}.safetensors"
    _refuse_other_weights(start, run["provenance"]["weights_sha256"], folder)
    classes = tensors["classifier.weight"].shape[0]
    untrained = extract(build_model(config.dataset, classes, start, config.variant), store, rows, config, device)
    pretrained = modality_probe(untrained.feat, untrained.pids, untrained.modalities)
    del untrained  # before the trained model's features come, which may be gigabytes, too
    model = build_model(config.dataset, classes, None, config.variant)
    model.load_state_dict(tensors)
    features = extract(model, store, rows, config, device)
    feat = features.retrieval(config.dataset.recipe.test_feature)
    last = run["history"][-1]
    record = {
        "dataset": config.dataset.name,
        "title": config.dataset.title,
        "layout": config.dataset.layout,
        "synthetic": store.meta["synthetic"],
        "partial": store.meta["partial"],
        "variant": config.variant_name,
        "label": config.variant.label,
        "trial": config.trial,
        "seed": config.seed,
        **({} if config.reading is None else {"reading": config.reading}),
        "split": "test",
        "settings": cross_modality(features, feat, store, config),
        "within": {
            "visible": _within(features, feat, VISIBLE, config),
            "infrared": _within(features, feat, INFRARED, config),
        },
        "figure1": centre_claim(feat, features.pids, features.modalities),
        "probe": {
            "pretrained": pretrained,
            "before_bn": modality_probe(features.feat, features.pids, features.modalities),
            "after_bn": modality_probe(features.feat_bn, features.pids, features.modalities),
        },
        **_camera_pairs(features, feat, config),
        "queries": _queries(features, feat, store, config),
        "training": {
            "steps": config.epochs * config.dataset.recipe.steps_per_epoch,
            "epochs": config.epochs,
            "final": {name: last[name] for name in ("L_id", "L_cc", "L_sid", "L_M", "total")},
        },
        "provenance": {"config_sha256": sha256_json(config.resolved()), **run["provenance"]},
        "config": config.resolved(),
        "evaluation": asdict(config.evaluation),
    }
    features.save(folder.features)
    atomic_write_json(results / config.metrics, record)
    return record


def _refuse_leak(store: PackedStore, rows: Int[np.ndarray, " n"], config: RunConfig) -> None:
    """Raise StudyError when an identity that is to be tested was trained on."""
    trained = store.pids[store.rows(config.dataset.train_splits, config.trial)]
    leaked = np.intersect1d(trained, store.pids[rows])
    if len(leaked):
        raise StudyError(
            f"{len(leaked)} of the test identities of {config.dataset.name}, trial {config.trial}, are also training "
            f"identities (first {leaked[0]}); expected none: correct the splits of the raw data"
        )


def _refuse_other_weights(path: Path, expected: str, folder: RunFolder) -> None:
    """Raise StudyError when the backbone weights are not those the run started from."""
    found = sha256_file(path) if path.exists() else "no file"
    if found != expected:
        raise StudyError(
            f"{path}: expected the backbone weights that the run {folder.root} started from ({expected[:12]}), found "
            f"{found[:12]}; run `dvc repro`"
        )


@torch.inference_mode()
def extract(
    model: DANet, store: PackedStore, rows: Int[np.ndarray, " n"], config: RunConfig, device: str = "auto"
) -> Features:
    """Features of the store's `rows`, in their order, with the network in evaluation mode."""
    if len(rows) == 0:
        raise StudyError(f"{store.root}: expected images to extract features of, found none; check the split's id list")
    target = resolve_device(device)
    model = model.to(target).eval()
    parts = []
    with deterministic(0):
        for start in range(0, len(rows), config.evaluation.batch_size):
            chosen = rows[start : start + config.evaluation.batch_size]
            images = normalise(torch.from_numpy(store.images[chosen]).to(target), config.dataset.recipe.augment)
            modalities = torch.from_numpy(store.modalities[chosen]).to(target)
            parts.append([part.float().cpu() for part in model.embed(images, modalities)])
    feat, feat_bn = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Features(rows, feat, feat_bn, store.pids[rows], store.camids[rows], store.modalities[rows])


def cross_modality(
    features: Features, feat: Float[np.ndarray, "n D"], store: PackedStore, config: RunConfig
) -> dict[str, dict[str, Any]]:
    """Scores of every setting of the data set's layout, as they stand in the record.

    SYSU-MM01: infrared queries of cameras 3 and 6 against the galleries of the store, or with the evaluation's
    `random_seed` against those of protocols.random_seed_galleries. RegDB: both directions, named by query and gallery.
    Each setting carries `chance_rank1`, the Rank-1 a random ranking would have, and that of the ablation `per_query`.
    """
    infrared, visible = features.modalities == INFRARED, features.modalities == VISIBLE
    pids, evaluation = features.pids, config.evaluation
    options: dict[str, Any] = {
        "ranks": evaluation.ranks,
        "rerank": evaluation.rerank,
        "distance": evaluation.metric,
    }
    marks: dict[str, Any] = {} if evaluation.rerank is None else {"rerank": asdict(evaluation.rerank)}
    marks |= _metric_mark(config)
    if config.dataset.layout == "sysu":
        galleries = _galleries(features, store, config)
        if evaluation.galleries == "random_seed":
            marks["galleries"] = "random_seed"
        query = feat[infrared], pids[infrared], features.camids[infrared]
        gallery = feat[visible], pids[visible], features.camids[visible]
        scored = protocols.evaluate_sysu_settings(*query, *gallery, galleries, **options)
        chances = {name: protocols.chance_rank1(*query[1:], *gallery[1:], galleries[name]) for name in galleries}
        settings = {name: {**_setting(result, chances[name]), **marks} for name, result in scored.items()}
        return _with_queries(settings, "all_single", scored["all_single"], features, config)
    sides = feat[infrared], pids[infrared], feat[visible], pids[visible]
    both = protocols.evaluate_regdb_settings(*sides, **options)
    settings = {}
    for (name, levels), (query, gallery) in zip(both.items(), ((infrared, visible), (visible, infrared)), strict=True):
        cameras = features.camids[query], features.camids[gallery]
        everyone = np.arange(gallery.sum())[None]
        chance = protocols.chance_rank1(pids[query], cameras[0], pids[gallery], cameras[1], everyone)
        by_identity = levels["identity"].mean
        settings[name] = {
            **_setting(levels["image"], chance),
            **marks,
            "identity_level": {rank: by_identity[rank] for rank in ("cmc1", "cmc5", "cmc10", "cmc20")},
        }
    return _with_queries(settings, "thermal_to_visible", both["thermal_to_visible"]["image"], features, config)


def _with_queries(
    settings: dict[str, dict[str, Any]],
    name: str,
    result: protocols.ProtocolResult,
    features: Features,
    config: RunConfig,
) -> dict[str, dict[str, Any]]:
    """The settings, that of the ablation, whose queries are infrared in both layouts, with its scores per query."""
    if config.reading is not None:
        return settings
    asked = np.flatnonzero(features.modalities == INFRARED)[result.per_query["index"]]
    per_query = {
        "rows": features.rows[asked].tolist(),
        "pids": features.pids[asked].tolist(),
        **{key: result.per_query[key].round(6).tolist() for key in ("cmc1", "ap")},
    }
    return {**settings, name: {**settings[name], "per_query": per_query}}


def _galleries(features: Features, store: PackedStore, config: RunConfig) -> dict[str, Int[np.ndarray, "T S"]]:
    """SYSU-MM01's galleries by setting, as indices into the visible test images."""
    visible, trials = features.modalities == VISIBLE, config.evaluation.trials
    pool = features.rows[visible]
    if config.evaluation.galleries == "random_seed":
        paths = store.manifest["path"].iloc[pool].tolist()
        return protocols.random_seed_galleries(features.pids[visible], features.camids[visible], paths, trials)
    return {name: np.searchsorted(pool, rows[:trials]) for name, rows in store.galleries.items()}


def _queries(
    features: Features, feat: Float[np.ndarray, "n D"], store: PackedStore, config: RunConfig
) -> dict[str, Any]:
    infrared, visible = (np.flatnonzero(features.modalities == one) for one in (INFRARED, VISIBLE))
    setting = "thermal_to_visible"
    if config.dataset.layout == "sysu":
        setting = "all_single"
        visible = visible[np.sort(_galleries(features, store, config)[setting][0])]

    def ignore(rows: slice) -> np.ndarray:
        return protocols.same_place(features.camids[infrared[rows]], features.camids[visible])  # none in RegDB

    sides = [Side(features.rows[side], feat[side], features.pids[side]) for side in (infrared, visible)]
    found = extreme_queries(sides[0], sides[1], ignore, config.evaluation.metric)
    return {"setting": setting, **_metric_mark(config), **found}


def _metric_mark(config: RunConfig) -> dict[str, str]:
    metric = config.evaluation.metric
    return {} if metric == "cosine" else {"metric": metric}


def _refuse_other_trial(store: PackedStore, config: RunConfig, folder: RunFolder, trained: int, asked: int) -> None:
    """Raise StudyError: a model of one trial was asked to score the test images of another."""
    seen = np.unique(store.pids[store.rows(config.dataset.train_splits, trained)])
    tested = np.unique(store.pids[store.rows("test", asked)])
    leaked = np.intersect1d(seen, tested)
    raise StudyError(
        f"{folder.root} holds a model of trial {trained}, asked to score the test images of trial {asked}: it was "
        f"trained on {len(leaked)} of their {len(tested)} identities; score each trial with a model of its own"
    )


def _setting(result: protocols.ProtocolResult, chance: float) -> dict[str, Any]:
    return {
        "mean": result.mean,
        "per_trial": list(result.per_trial),
        "n_query": result.n_query,
        "n_valid": result.n_valid,
        "gallery_size": result.gallery_size,
        "chance_rank1": chance,
        "cmc": result.cmc.tolist(),
        **({"cmc_range": result.cmc_range.tolist()} if len(result.per_trial) > 1 else {}),
        "cmc_level": result.cmc_level,
    }


def _camera_pairs(features: Features, feat: Float[np.ndarray, "n D"], config: RunConfig) -> dict[str, Any]:
    if config.dataset.layout != "sysu":
        return {}
    query, gallery = features.modalities == INFRARED, features.modalities == VISIBLE
    sides = [(feat[side], features.pids[side], features.camids[side]) for side in (query, gallery)]
    return {"camera_pairs": protocols.camera_pairs(*sides[0], *sides[1], distance=config.evaluation.metric)}


def _within(features: Features, feat: Float[np.ndarray, "n D"], modality: int, config: RunConfig) -> dict[str, Any]:
    chosen = features.modalities == modality
    images = feat[chosen], features.pids[chosen], features.camids[chosen]
    result = protocols.within_modality(*images, distance=config.evaluation.metric)
    return {
        "cmc1": result.mean["cmc1"],
        "mAP": result.mean["mAP"],
        "n_query": result.n_query,
        "n_valid": result.n_valid,
    }
