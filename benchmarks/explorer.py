"""Notebook 06: from a control that moves to the pictures that answer, with 2,000 queries and 2,000 gallery images."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import Times, main, page, table, timer
from danet_core import MODALITIES
from danet_core.config import Study, load_study
from danet_core.evaluate import Features
from danet_core.explore import Explorer
from danet_core.files import atomic_write_json, sha256_json
from danet_core.scores import run_name
from danet_core.store import PackedStore
from data_prep.store_writer import StoreWriter

DATASET, PER_MODALITY, FEATURES, SIZE, ROUNDS = "synth_regdb", 10, 512, (3, 64, 32), 7
VARIANTS = ("baseline", "b_ml_cc", "b_cc", "b_ml")


def write_store(root: Path, people: int) -> PackedStore:
    """Test images of noise in RegDB's layout, PER_MODALITY of each person and modality."""
    generator = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, people + 1), 2 * PER_MODALITY)
    modality = np.tile(np.repeat([0, 1], PER_MODALITY), people)
    columns: dict[str, Any] = {"path": [f"{row}.bmp" for row in range(len(pids))], "pid": pids, "camid": 1 + modality}
    manifest = pd.DataFrame({"row": np.arange(len(pids)), **columns, "modality": np.array(MODALITIES)[modality]})
    writer = StoreWriter(root, (len(pids), *SIZE), "noise", chunk=len(pids))
    content = generator.bytes(len(pids) * int(np.prod(SIZE)))
    with writer.images_path.open("r+b") as stream:
        stream.seek(writer.offset_of(0))
        stream.write(content)
    writer.finish_chunk(0, "noise", hashlib.sha256(content).hexdigest())
    meta = {"dataset": DATASET, "layout": "regdb", "synthetic": True, "partial": False, "interpolation": "none"}
    writer.commit(manifest.assign(split_1="test"), {}, {**meta, "counts": {}})
    return PackedStore.open(root)


def write_run(root: Path, study: Study, store: PackedStore, variant: str) -> None:
    """A run's record and features: a centre for each person, noise, and a shift between the modalities."""
    generator = np.random.default_rng(len(variant))
    feat = generator.standard_normal((store.pids.max() + 1, FEATURES))[store.pids] * 2
    feat += 4 * generator.standard_normal(feat.shape) + np.outer(store.modalities, generator.standard_normal(FEATURES))
    folder = root / "runs" / DATASET / run_name(variant, 1, 0)
    hashes = dict.fromkeys(("weights_sha256", "fingerprint", "model_sha256"), sha256_json(variant))
    named = {"dataset": DATASET, "variant": variant, "label": study.variants[variant].label, "trial": 1, "seed": 0}
    record = {
        **named,
        **{"command": "none", "seconds": 0.0, "history": [{"epoch": 1}]},
        "config": study.run(DATASET, variant, 1, 0).resolved(),
        "provenance": {"data_sha256": store.meta["content_sha256"], **hashes},
        "versions": dict.fromkeys(("code", "python", "device", "libraries", "train_code_sha256")),
    }
    atomic_write_json(folder / "record.json", record)
    single = feat.astype(np.float32)
    neck = (single - single.mean(axis=0)) / single.std(axis=0)
    rows = np.arange(len(single))
    Features(rows, single, neck, store.pids, store.camids, store.modalities).save(folder / "features.npz")


def moves(explorer: Explorer, others: Sequence[int]) -> list[tuple[str, Any, Any]]:
    """Controls with the values they take in a round; the last of a control's values is where it came from."""
    found = [
        ("distance", explorer.metric, "euclidean"),
        ("distance", explorer.metric, "cosine"),
        ("feature", explorer.feature, "before_bn"),
        ("feature", explorer.feature, "after_bn"),
        ("colours", explorer.colour, "identity"),
        ("identity, coloured", explorer.identity, others[0]),
        ("colours", explorer.colour, "modality"),
        ("identity", explorer.identity, others[1]),
        ("query", explorer.query_number, 2),
        ("query", explorer.query_number, 1),
        ("show first 30", explorer.top, 30),
        ("show first 10", explorer.top, 10),
        ("search", explorer.setting, "visible_to_thermal"),
        ("search", explorer.setting, "thermal_to_visible"),
    ]
    last = [box for box in explorer.variants.values() if box.value][-1]
    shown = sum(box.value for box in explorer.variants.values())
    return [*found, ("a variant fewer", last, False), ("a variant more", last, True)] if shown > 1 else found


def measured(study: Study, root: Path, shown: int, rounds: int) -> tuple[Times, dict[str, Times]]:
    """Seconds until the explorer stands, with `shown` variants, and until each of its controls is answered."""
    started = timer()
    explorer = Explorer(study, root, dataset=DATASET, variants=VARIANTS[:shown])
    opened = timer() - started
    for thread in explorer.preparing.values():
        thread.join()
    people = [pid for _, pid in explorer.identity.options]
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, control, value in moves(explorer, (people[2 * number + 1], people[2 * number + 2])):
            explorer.forget()  # or a picture that was drawn once would be shown again
            started = timer()
            control.value = value
            if number:  # the first round lays panels out
                seconds.setdefault(name, []).append(timer() - started)
    return Times(np.array([opened])), {name: Times(np.array(values)) for name, values in seconds.items()}


def section(tiny: bool) -> str:
    study, counts = load_study(), (1, 2) if tiny else (1, 2, 4)
    people = 20 if tiny else 200
    with tempfile.TemporaryDirectory(prefix="danet-bench-") as folder:
        root = Path(folder)
        store = write_store(root / "data/packed" / DATASET, people)
        for variant in VARIANTS:
            write_run(root, study, store, variant)
        found = [measured(study, root, shown, 1 if tiny else ROUNDS) for shown in counts]
    names = list(found[-1][1])
    rows = [("opening", *(opened for opened, _ in found))]
    rows += [(name, *(times.get(name, "–") for _, times in found)) for name in names]
    images = people * PER_MODALITY
    return page(
        "## Notebook 06, from a control to its pictures",
        f"""{images:,} queries, {images:,} gallery images, {FEATURES} numbers each, no picture kept from before. What
        the features, distances and variants of a run ask for is computed beside the controls once the notebook stands;
        these times are those after that.""",
        table(("control", *(f"{count} variant{'s' * (count > 1)}" for count in counts)), rows),
    )


if __name__ == "__main__":
    main(section)
