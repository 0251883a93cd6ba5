"""What a run was made with and what it took, as results/<data set>/runs.csv says it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fixtures import records

from danet_core.config import load_study
from danet_core.files import atomic_write_json
from danet_core.scores import run_name
from tools import profile, runs

ROOT = Path(__file__).parent.parent
REGDB, SYSU = "synth_regdb_paper_scale", "synth_sysu_paper_scale"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a params.yaml that lists both sets of the paper's size, and no run."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    profile.main(["paper-scale"], tmp_path)
    return tmp_path


def trained(root: Path, dataset: str, variant: str, epochs: list[tuple[float, float]], seed: int = 0) -> None:
    """Write the record of a run on a GPU; epochs: seconds and images/s of each."""
    record = records.training_record(dataset, variant, seed=seed)
    record["config"] = load_study(root / "params.yaml").run(dataset, variant, 1, seed).resolved()
    record["history"] = [
        {"epoch": place, "L_id": 1 / place, "seconds": seconds, "images_per_s": speed}
        for place, (seconds, speed) in enumerate(epochs, 1)
    ]
    record["seconds"] = 12.0  # of the last leg: the run was resumed
    record["provenance"]["processes"] = [1]
    record["versions"]["device"] = {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "threads": 16}
    atomic_write_json(root / "runs" / dataset / run_name(variant, 1, seed) / "record.json", record)


def written(root: Path, dataset: str) -> list[dict[str, Any]]:
    table = pd.read_csv(root / "results" / dataset / "runs.csv", dtype=str)
    return table.to_dict("records")


def test_a_line_has_card_precision_epochs_duration_speed_and_versions(root: Path) -> None:
    trained(root, REGDB, "b_cc", [(20.5, 200.0), (4.0, 1024.0), (4.2, 960.0)])
    assert runs.main([REGDB], root) == 0
    assert written(root, REGDB) == [
        {
            "dataset": REGDB,
            "synthetic": "true",
            "variant": "b_cc",
            "label": "B + CC",
            "trial": "1",
            "seed": "0",
            "device": "NVIDIA H100 80GB HBM3",
            "processes": "1",
            "precision": "bfloat16",
            "epochs": "3 of 140 epochs",
            "steps": "96",  # 3 epochs of 32
            "batch_size": "128",  # 16 identities of 4 images in each of two modalities
            "train_seconds": "28.7",  # 20.5 + 4 + 4.2, and not the 12 of the last leg
            "images_per_s": "960.0",  # the median: the first epoch's start does not count
            "final_L_id": "0.3333",
            "model_sha256": records.digest("model", REGDB, "b_cc", 1, 0),
            "code": "0123abcd",
            "python": "3.11.7",
            "torch": "2.14.1",
            "numpy": "2.4.6",
        }
    ]


@pytest.mark.parametrize(
    ("variant", "epochs", "words"),
    [
        ("baseline", 139, "139 of 140 epochs"),
        ("baseline", 140, "140"),
        ("baseline_2x", 140, "140 of 280 epochs"),
        ("baseline_2x", 280, "280"),
    ],
)
def test_fewer_epochs_than_the_papers_are_labelled_so(root: Path, variant: str, epochs: int, words: str) -> None:
    edit_params(root, lambda text: text.replace("b_ml, b_ml_cc]", "b_ml, b_ml_cc, baseline_2x]"))
    trained(root, REGDB, variant, epochs * [(4.0, 1000.0)])
    assert runs.main([REGDB], root) == 0
    assert [line["epochs"] for line in written(root, REGDB)] == [words]


def edit_params(root: Path, change: Callable[[str], str]) -> None:
    path = root / "params.yaml"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def test_lines_are_the_listed_runs_that_are_finished_in_the_order_of_the_tables(root: Path) -> None:
    edit_params(root, lambda text: text.replace("  seeds: [0]\n", "  seeds: [1, 0]\n", 1))
    for variant, seed in (("b_ml_cc", 0), ("baseline", 0), ("baseline", 1), ("baseline", 2), ("baseline_2x", 0)):
        trained(root, SYSU, variant, [(4.0, 1000.0)], seed)
    runs.main([SYSU], root)
    found = [(line["variant"], line["seed"], line["steps"]) for line in written(root, SYSU)]
    assert found == [("baseline", "1", "186"), ("baseline", "0", "186"), ("b_ml_cc", "0", "186")]


def test_a_listed_set_without_a_finished_run_is_named_in_one_sentence_and_the_other_is_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.main([], root) == 1
    said = capsys.readouterr().err
    assert f"runs has no finished run of {SYSU}, {REGDB}; `dvc repro` makes" in said and said.count("\n") == 1
    assert not (root / "results").exists()
    trained(root, REGDB, "baseline", [(4.0, 1000.0)])
    assert runs.main([], root) == 1
    assert f"no finished run of {SYSU};" in capsys.readouterr().err
    assert len(written(root, REGDB)) == 1 and not (root / "results" / SYSU).exists()
    assert runs.main(["elsewhere"], root) == 1
    assert "elsewhere" in capsys.readouterr().err
