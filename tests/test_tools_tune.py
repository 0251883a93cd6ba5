"""The tuning: the Baseline alone, on validation identities, and a table that is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from danet_core.config import load_study
from danet_core.files import StudyError
from tests.stores import PARAMS
from tools import precision, tune


def test_the_grid_is_the_baseline_at_every_point_with_every_seed():
    study = load_study(PARAMS)
    runs = tune.candidates(study)
    assert {run.variant_name for run in runs} == {"baseline"}
    found = [(run.dataset.recipe.lr, run.dataset.recipe.steps_per_epoch, run.seed) for run in runs]
    grid = study.tuning.grid
    assert found == [(lr, steps, seed) for lr in grid.lr for steps in grid.steps_per_epoch for seed in (0, 1)]


def test_the_table_is_written_when_all_rows_are_there_and_never_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "score", lambda config: {"mAP": config.seed / 4})
    assert tune.main(["--params", str(PARAMS)]) == 0
    table = Path("results/tuning/synth_sysu.csv")
    assert pd.read_csv(table).mAP.tolist() == [0, 0.25] * len(load_study(PARAMS).tuning.grid.lr)
    before = table.read_bytes()

    def diverging(config):
        if config.dataset.recipe.lr > 0.001:
            raise StudyError("the loss is NaN; lower lr")
        return {"mAP": 0.5}

    monkeypatch.setattr(tune, "score", diverging)
    assert tune.main(["--params", str(PARAMS)]) == 1
    assert table.read_bytes() == before
    assert capsys.readouterr().err == "error: the loss is NaN; lower lr\n"


def test_the_committed_table_is_of_the_grid_and_its_best_learning_rate_is_the_recipes():
    study = load_study(PARAMS)
    table = pd.read_csv(PARAMS.parent / "results/tuning" / f"{study.tuning.dataset}.csv")
    assert set(table.lr) == set(study.tuning.grid.lr)
    assert set(table.seed) == set(study.tuning.seeds)
    best = table.groupby(["lr", "steps_per_epoch"]).mAP.mean().idxmax()
    recipe = study.dataset(study.tuning.dataset).recipe
    assert best == (recipe.lr, recipe.steps_per_epoch)


@pytest.mark.parametrize("tool", [tune, precision])
def test_an_absent_params_yaml_is_one_sentence(tool, tmp_path, capsys):
    assert tool.main(["--params", str(tmp_path / "params.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "params.yaml is missing" in error and error.count("\n") == 1
