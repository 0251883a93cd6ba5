"""Switching params.yaml between the embedded sets and the paper's, and what `make paper` then does."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures.pipeline import copy_project, shell

from danet_core.config import load_study
from danet_core.files import StudyError
from danet_core.parameters import RenderRegdb, RenderSysu
from data_prep.synthetic import _sysu_cells
from tools import profile

ROOT = Path(__file__).parent.parent
PARAMS = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """A copy of the project's params.yaml, with the embedded sets switched on."""
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS, encoding="utf-8")
    profile.main(["embedded"], tmp_path)
    return path


def test_the_paper_profile_is_sysu_mm01_and_regdb_with_its_ten_trials(params: Path) -> None:
    assert profile.main(["paper"], params.parent) == 0
    study = load_study(params).study
    assert (study.sysu, study.regdb, study.trials) == (("sysu",), ("regdb",), tuple(range(1, 11)))


def test_the_paper_scale_profile_is_the_papers_recipe_on_rendered_sets_of_the_real_sizes(params: Path) -> None:
    assert profile.main(["paper-scale"], params.parent) == 0
    study = load_study(params)
    assert study.study.datasets == ("synth_sysu_paper_scale", "synth_regdb_paper_scale")
    for layout, (ids, visible, infrared) in {"sysu": (395, 22258, 11909), "regdb": (206, 2060, 2060)}.items():
        ours, real = study.datasets[f"synth_{layout}_paper_scale"], study.datasets[layout]
        assert dataclasses.replace(ours.recipe, weights="imagenet", precision="float32") == real.recipe
        assert (ours.synthetic, ours.image, ours.train_splits) == (True, real.image, real.train_splits)
        found = training_images(ours.render)
        assert found[0] == ids
        assert found[1] == pytest.approx(visible, rel=0.03) and found[2] == pytest.approx(infrared, rel=0.03)


def training_images(render: RenderSysu | RenderRegdb) -> tuple[int, int, int]:
    """Training identities, visible and infrared images of a rendering, without drawing it."""
    if isinstance(render, RenderRegdb):
        return render.ids // 2, render.ids // 2 * render.images, render.ids // 2 * render.images
    splits, cells = _sysu_cells(render)
    counts = {False: 0, True: 0}
    for (_, camera), split in cells.items():
        if split != "test":
            counts[camera in (3, 6)] += getattr(render.images, split)
    return len(splits["train"]) + len(splits["val"]), counts[False], counts[True]


def test_one_of_the_two_sets_may_be_switched_on_alone(params: Path) -> None:
    assert profile.main(["paper", "regdb"], params.parent) == 0
    assert load_study(params).study.datasets == ("regdb",)


def test_switching_changes_three_lines_and_switching_back_gives_the_same_bytes(params: Path) -> None:
    before = params.read_bytes()
    profile.main(["paper"], params.parent)
    old, new = before.decode().splitlines(), params.read_text(encoding="utf-8").splitlines()
    changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    assert [b.split(":")[0].strip() for _, b in changed] == ["sysu", "regdb", "trials"]
    assert [a.partition("#")[2] for a, _ in changed] == [b.partition("#")[2] for _, b in changed]
    profile.main(["embedded"], params.parent)
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    "study",
    [
        "study:\n  sysu:\n  - synth_sysu\n  regdb:\n    - synth_regdb   # a comment\n  trials:\n  - 1\n  - 2\n",
        "study: {sysu: [synth_sysu], regdb: [], trials: [1]}\n",
        'study:\n  trials: [1,\n    2]  # two\n  "regdb": []\n  sysu: [ synth_sysu ]\n',
        "study:\r\n  sysu: [synth_sysu]   # one\r\n  regdb: []\r\n  trials: [1]\r\n",
    ],
    ids=["dashes", "one line", "two lines", "CRLF"],
)
def test_lists_may_be_written_in_any_way_that_yaml_knows(study: str) -> None:
    text = f"# trials: [1]\n{study}other: {{trials: [1], sysu: [x]}}  # sysu: [y]\n"
    new = profile.switched(text, profile.profile("paper"))
    assert yaml.safe_load(new)["study"] == {"sysu": ["sysu"], "regdb": ["regdb"], "trials": list(range(1, 11))}
    assert yaml.safe_load(new)["other"] == yaml.safe_load(text)["other"]
    assert new.startswith("# trials: [1]\n") and new.endswith("# sysu: [y]\n")
    assert new.count("#") == text.count("#") and new.count("\r") == text.count("\r")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: {sysu: [], regdb: []}\n", "has no list `trials` in its block `study`"),
        ("study: {sysu: [], regdb: x, trials: [1]}\n", "has no list `regdb`"),
        ("other: 1\n", "has no list `sysu`"),
        ("study: [\n", "is not valid YAML"),
    ],
)
def test_a_file_without_these_lists_is_refused(text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        profile.switched(text, profile.profile("paper"))


def test_a_params_file_that_the_study_cannot_read_is_left_as_it_is(
    params: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = params.read_text(encoding="utf-8").replace("\n  variants:", "\n  sedes: [1]\n  variants:", 1)
    params.write_text(broken, encoding="utf-8")
    assert profile.main(["paper"], params.parent) == 1
    assert "sedes" in capsys.readouterr().err
    assert params.read_text(encoding="utf-8") == broken
    assert [path.name for path in params.parent.iterdir()] == ["params.yaml"]


def test_it_says_what_it_wrote_and_the_way_back(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile.main(["paper", "sysu"], params.parent)
    said = capsys.readouterr().out
    assert "now has `sysu: [sysu]`, `regdb: []`, `trials: [1, 2, 3" in said and "tools.profile embedded" in said
    profile.main(["paper", "sysu"], params.parent)
    assert "has already" in capsys.readouterr().out
    for wrong in (["paper", "synth_sysu"], ["paper-scale", "paper"], ["embedded", "sysu"], ["real"]):
        with pytest.raises(SystemExit):
            profile.main(wrong, params.parent)


def made(folder: Path, *arguments: str) -> list[str]:
    """The modules with their arguments that make would start after its set-up."""
    shutil.copyfile(ROOT / "Makefile", folder / "Makefile")
    command = ["make", "--dry-run", "--old-file=.venv/.ready", *arguments]
    # The tests themselves may run below make, which a make inside would tell by more lines, and hand on its variables.
    of_make = ("MAKE", "MFLAGS", "ARGS", "SETS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_make)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    modules = [line.partition("-m ")[2] for line in done.stdout.splitlines() if "-m " in line]
    return modules[modules.index("tools.checkout") + 1 :]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_paper_scale_finishes_regdbs_layout_before_the_long_runs_and_says_what_runs_took(tmp_path: Path) -> None:
    assert made(tmp_path, "paper-scale") == [
        "tools.profile paper-scale sysu regdb",
        "dvc repro tables_regdb@synth_regdb_paper_scale figures_regdb@synth_regdb_paper_scale",
        "tools.runs synth_regdb_paper_scale",
        "dvc repro ",
        "tools.runs",
    ]
    assert made(tmp_path, "paper-scale", "SETS=sysu") == ["tools.profile paper-scale sysu", "dvc repro ", "tools.runs"]


@pytest.mark.slow
def test_the_paper_scale_runs_through_every_stage_with_one_step_on_a_few_images(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "danet")
    shell(project, sys.executable, "-m", "tools.profile", "paper-scale")
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["study"]["variants"] = ["baseline", "b_ml_cc"]
    params["pretraining"].update(batch_size=4, steps=1)
    params["pretraining"]["render"].update(ids=4, images=2)
    for layout, render in {
        "sysu": {"train_ids": 4, "val_ids": 2, "test_ids": 3, "images": {"train": 2, "val": 2, "test": 2}},
        "regdb": {"ids": 8},
    }.items():
        row = params["datasets"][f"synth_{layout}_paper_scale"]
        row["recipe"] = {**row["recipe"], "ids_per_batch": 2, "imgs_per_modality": 1, "epochs": 1}
        row["recipe"].update(steps_per_epoch=1, milestones=[])
        row["render"].update(render)
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    names = {layout: f"synth_{layout}_paper_scale" for layout in profile.REAL}
    shell(project, "dvc", "repro", *(f"{stage}_{key}@{names[key]}" for stage in ("tables", "figures") for key in names))
    for name in names.values():
        assert len(list((project / "results" / name / "metrics").glob("*.json"))) == 2
        assert "synthetic" in "".join(path.read_text() for path in (project / "results" / name).rglob("*.md")).lower()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_paper_switches_looks_at_the_raw_data_and_then_runs_everything(tmp_path: Path) -> None:
    assert made(tmp_path, "paper", "SETS=regdb", "ARGS=--keep-going") == [
        "tools.profile paper regdb",
        "dvc repro --keep-going prepare_regdb@regdb",
        "dvc repro --keep-going",
    ]
    both = made(tmp_path, "paper")
    assert both[1] == "dvc repro --keep-going prepare_sysu@sysu prepare_regdb@regdb"
    assert made(tmp_path, "paper", "SETS=") == both, "no set named: both, and never a pipeline without a look at them"


def test_absent_real_sets_are_both_named_with_folder_licence_and_tree_before_anything_else_runs(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "danet")
    shell(project, sys.executable, "-m", "tools.profile", "paper")
    targets = [f"prepare_{name}@{name}" for name in profile.REAL]
    done = shell(project, sys.executable, "-m", "dvc", "repro", "--keep-going", *targets, check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    for words in ("data/raw/SYSU-MM01", "wuancong/SYSU-MM01", "cam1..cam6", "SYSU_MM01_ROOT"):
        assert words in said
    for words in ("data/raw/RegDB", "Dongguk", "idx/{train,test}", "REGDB_ROOT"):
        assert words in said
    assert not (project / "data/prepared").exists() or not list((project / "data/prepared").glob("*/manifest.csv"))
    shell(project, sys.executable, "-m", "tools.profile", "embedded")
    assert load_study(project / "params.yaml").study.datasets == ("synth_sysu", "synth_regdb")
