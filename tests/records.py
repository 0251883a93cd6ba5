"""Made-up evaluation records, whole and consistent under the schema, for tests of tables and figures."""

import copy
import functools
import json
import zlib
from pathlib import Path

import numpy as np

from danet_study.config import Plan, RunConfig, Study, load_study

ROOT = Path(__file__).parents[1]
LOSSES = {
    "baseline": {"L_id": {"weight": 1.0}},
    "b_cc": {"L_id": {"weight": 1.0}, "L_cc": {"weight": 1.0, "margin": 0.7}},
    "b_ml": {"L_id": {"weight": 1.0}, "L_sid": {"weight": 1.0}, "L_M": {"weight": 2.5}},
}
LOSSES["b_ml_cc"] = {**LOSSES["b_ml"], "L_cc": LOSSES["b_cc"]["L_cc"]}

SETTINGS = {  # gallery size and chance of each setting
    "sysu_mm01": {
        "all_single": (32, 0.125),
        "all_multi": (320, 0.125),
        "indoor_single": (16, 0.125),
        "indoor_multi": (160, 0.125),
    },
    "regdb": {"thermal_to_visible": (24, 0.125), "visible_to_thermal": (24, 0.125)},
}
MEANS = {"baseline": 0.22, "b_cc": 0.29, "b_ml": 0.24, "b_ml_cc": 0.30}
QUERIES = [2, 3, 4, 5, 2, 3, 4, 1]  # valid queries of each of the eight test identities


def record(run="synth_sysu-1-baseline-0", *, variant=None, seed=None, dataset=None, trial=None, **overrides):
    """The record of a run; `cmc1` and `mAP` set the scores of its ablation setting, other overrides a top-level key."""
    parts = run.rsplit("-", 3)
    given = dataset, trial, variant, seed
    dataset, trial, variant, seed = (b if a is None else a for a, b in zip(given, parts, strict=True))
    trial, seed = int(trial), int(seed)
    run = f"{dataset}-{trial}-{variant}-{seed}"
    rng = np.random.default_rng(zlib.crc32(run.encode()))
    protocol = overrides.pop("protocol", "regdb" if "regdb" in dataset else "sysu_mm01")
    cmc1 = overrides.pop("cmc1", round(0.2 + 0.1 * rng.random(), 6))
    mean_ap = overrides.pop("mAP", round(0.25 + 0.1 * rng.random(), 6))
    losses = copy.deepcopy(LOSSES.get(variant, LOSSES["baseline"]))
    made = {
        "run": run,
        "dataset": dataset,
        "trial": trial,
        "variant": variant,
        "seed": seed,
        "protocol": protocol,
        "synthetic": dataset.startswith("synth_"),
        "partial": False,
        "split": "test",
        "settings": {
            name: setting(cmc1 - 0.02 * i, mean_ap - 0.02 * i, size, chance, 1 if protocol == "regdb" else 10)
            for i, (name, (size, chance)) in enumerate(SETTINGS[protocol].items())
        },
        "per_identity": per_identity(cmc1, mean_ap, rng),
        "within": {
            "visible": {"cmc1": 0.95, "mAP": 0.9, "n_query": 32, "n_valid": 32},
            "infrared": {"cmc1": 0.7, "mAP": 0.6, "n_query": 24, "n_valid": 24},
        },
        "modality_gap": {
            "nearest": 0.75,
            "median": 0.125,
            "mean": 0.25,
            "n": 8,
            "pretrained": {"nearest": 1.0, "median": 0.75, "mean": 0.75, "n": 8},
        },
        "probe": {"pretrained": 0.99, "before_bn": 0.97, "after_bn": 0.96},
        "training": {"steps": 400, "epochs": 10, "final": {term: 0.5 + 0.1 * i for i, term in enumerate(losses)}},
        "config": {"losses": losses, "recipe": {"lr": 0.001}, "model": {}, "trial": trial, "seed": seed},
        "evaluation": {"trials": 10, "ranks": 20, "metric": "cosine", "galleries": "rand_perm"},
        "provenance": {"data_sha256": "da" * 32, "weights_sha256": "3e" * 32, "model_sha256": f"{seed:064x}"},
        "versions": {"python": "3.12", "libraries": {"torch": "2.11"}, "training_code_sha256": "c0" * 32},
    }
    if protocol == "sysu_mm01":
        made["camera_pairs"] = [
            {"query_camera": q, "gallery_camera": g, "cmc1": 0.3, "mAP": 0.3, "n_query": 12, "n_valid": 12,
             "gallery_size": 8}
            for q in (3, 6)
            for g in (1, 2, 4, 5)
            if (q, g) != (3, 2)
        ]  # fmt: skip
    assert overrides.keys() <= made.keys(), f"no such key: {overrides.keys() - made.keys()}"
    return {**made, **overrides}


@functools.cache
def _params() -> Study:
    return load_study(ROOT / "params.yaml")


def study(seeds=(0,), variants=tuple(MEANS), splits=("synth_sysu-1",), rows=None) -> Study:
    """The project's params.yaml with another plan, a small bootstrap, and further variants `rows`."""
    found = _params()
    names = list(dict.fromkeys(split.rpartition("-")[0] for split in splits))
    plan = Plan(datasets=names, splits=list(splits), variants=list(variants), seeds=list(seeds))
    values = {name: getattr(found, name) for name in Study.model_fields}
    values |= {"study": plan, "variants": {**found.variants, **(rows or {})}}
    return Study.model_construct(**values | {"bootstrap": found.bootstrap.model_copy(update={"resamples": 200})})


def of(config: RunConfig, **overrides):
    """The record of a resolved run; scores lie about `MEANS`, and neighboring seeds differ by one point."""
    base = MEANS.get(config.variant, 0.25) + 0.01 * ((config.seed * 7) % 3 - 1) + 0.002 * (config.trial - 1)
    known = {
        "cmc1": round(base, 6),
        "mAP": round(base + 0.03, 6),
        "protocol": config.dataset.protocol,
        "synthetic": config.dataset.synthetic,
        "config": config.resolved(),
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    return record(config.name, **{**known, **overrides})


def setting(cmc1, mean_ap, gallery_size, chance, draws):
    """Scores of one setting; every draw of the gallery scores the same."""
    cmc = [round(1 - (1 - cmc1) * 0.9**k, 6) for k in range(20)]
    mean = {f"cmc{k}": cmc[k - 1] for k in (1, 5, 10, 20)} | {"mAP": mean_ap, "mINP": round(mean_ap / 2, 6)}
    return {
        "mean": mean,
        "per_trial": {key: [mean[key]] * draws for key in ("cmc1", "mAP", "mINP")},
        "n_query": sum(QUERIES),
        "n_valid": sum(QUERIES),
        "gallery_size": gallery_size,
        "chance_rank1": chance,
        "cmc": cmc,
        "cmc_level": "image" if draws == 1 else "identity",
    }


def per_identity(cmc1, mean_ap, rng):
    """Scores of eight identities whose means over the queries are `cmc1` and `mean_ap`."""
    n = np.array(QUERIES)
    scores = {}
    for key, mean in (("cmc1", cmc1), ("ap", mean_ap)):
        noise = rng.uniform(-0.1, 0.1, len(n))
        scores[key] = (mean + noise - (noise @ n) / n.sum()).round(6).tolist()
    return {"pids": list(range(11, 11 + len(n))), "n": n.tolist(), **scores}


def write_records(results, records):
    """Write records where the study looks for them, `<results>/records/<run>.json`."""
    folder = Path(results) / "records"
    folder.mkdir(parents=True, exist_ok=True)
    for one in records:
        (folder / f"{one['run']}.json").write_text(json.dumps(one))
