"""The comparison of precisions trains the Baseline alone, on what the device has, and scores validation identities."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from danet_core.backbone import ResNet
from danet_core.config import load_study
from danet_core.parameters import Image
from danet_core.store import PackedStore
from tests.stores import PARAMS, make_store, small_config
from tools import precision


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a store, weights and a small study; the splits that are asked for."""
    monkeypatch.chdir(tmp_path)
    make_store(Path("data/packed/synth_sysu"), "sysu")
    real = PackedStore.rows
    rows = {"val": "test"}  # the store has no validation images; its test images stand for them
    asked: list[str] = []

    def spy(self, splits, trial=1):
        asked.extend([splits] if isinstance(splits, str) else splits)
        return real(self, rows.get(splits, splits) if isinstance(splits, str) else splits, trial)

    monkeypatch.setattr(PackedStore, "rows", spy)
    Path("data/weights").mkdir()
    save_file(ResNet("resnet18", 8).state_dict(), "data/weights/synth_sysu.safetensors")
    study = load_study(PARAMS)
    recipe = dataclasses.replace(small_config().dataset.recipe, epochs=1, milestones=())
    dataset = dataclasses.replace(study.datasets["synth_sysu"], recipe=recipe, image=Image(32, 16))
    tuning = dataclasses.replace(study.tuning, seeds=(0, 1))
    small = dataclasses.replace(study, datasets={**study.datasets, "synth_sysu": dataset}, tuning=tuning)
    monkeypatch.setattr(precision, "load_study", lambda: small)
    return asked


def test_a_cpu_is_asked_for_what_it_has_with_every_seed_and_only_the_baseline():
    runs = precision.candidates(load_study(PARAMS), torch.device("cpu"))
    found = [(run.dataset.recipe.precision, run.seed) for run in runs]
    assert found == [(name, seed) for name in ("float32", "bfloat16") for seed in (0, 1)]
    assert {run.variant_name for run in runs} == {"baseline"}


def test_the_table_has_scores_and_speed_of_each_run_and_no_test_image_is_read(project, monkeypatch):
    monkeypatch.setattr(precision, "resolve_device", lambda name: torch.device("cpu"))
    precision.main(root=Path.cwd())
    table = pd.read_csv("results/precision/synth_sysu-cpu.csv")
    assert list(zip(table.precision, table.seed, strict=True))[::2] == [
        ("float32", 0),
        ("bfloat16", 0),
    ]
    assert {"final_L_id", "rank1", "mAP", "images_per_s", "device", "torch"} <= set(table)
    assert table.rank1.between(0, 1).all() and (table.images_per_s > 0).all()
    assert table.final_L_id.nunique() > 3
    assert set(project) == {"train", "val"}
