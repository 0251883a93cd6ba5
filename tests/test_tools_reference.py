"""tools.reference: what it lists, copies and publishes; test_pipeline.py runs it whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fixtures.params import embedded
from fixtures.records import training_record, write_records

from danet_core.config import Study, load_study
from danet_core.files import StudyError, atomic_write_json
from tools import reference
from tools.reference import listed, outlook, prepare, publish

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """The embedded study of two variants on three seeds."""
    loaded = load_study(embedded(tmp_path / "params.yaml"))
    lists = dataclasses.replace(loaded.study, variants=("baseline", "b_cc"))
    return dataclasses.replace(loaded, study=lists, reference=dataclasses.replace(loaded.reference, seeds=(0, 1, 2)))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """This project's code with a packed set, one finished run and its scores."""
    root = tmp_path / "project"
    for name in reference.STUDY:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    (root / "params.yaml").unlink()
    embedded(root / "params.yaml")
    for name in ("data/packed/synth_sysu/images.npy", "runs/synth_sysu/baseline-t1-s0/model.safetensors", "dvc.lock"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_every_listed_variant_is_run_on_every_seed_of_the_reference(study: Study) -> None:
    runs = [f"{variant}-t1-s{seed}" for variant in ("baseline", "b_cc") for seed in (0, 1, 2)]
    assert listed(study) == {"synth_sysu": runs, "synth_regdb": runs}


@pytest.mark.parametrize(("sysu", "found"), [(("sysu",), "sysu, synth_regdb"), ((), "none")])
def test_a_study_that_is_not_of_rendered_sets_is_refused(study: Study, sysu: tuple[str, ...], found: str) -> None:
    lists = dataclasses.replace(study.study, sysu=sysu, regdb=("synth_regdb",) if sysu else ())
    with pytest.raises(StudyError, match=f"of rendered data sets, found {found} in `study`; run `make embedded`"):
        listed(dataclasses.replace(study, study=lists))


def test_the_copy_starts_with_what_is_finished_and_other_seeds(project: Path, study: Study) -> None:
    before = (project / "params.yaml").read_bytes()
    copy = project / "build" / "reference"
    prepare(copy, study, project)
    for name in ("data/packed/synth_sysu/images.npy", "runs/synth_sysu/baseline-t1-s0/model.safetensors", "dvc.lock"):
        assert (copy / name).read_text() == name
    model = "runs/synth_sysu/baseline-t1-s0/model.safetensors"
    assert not (copy / model).samefile(project / model)
    assert load_study(copy / "params.yaml").study.seeds == (0, 1, 2)
    assert (project / "params.yaml").read_bytes() == before
    assert "no_scm = true" in (copy / ".dvc" / "config.local").read_text()


def test_a_second_call_renews_the_code_and_keeps_the_runs_of_the_copy(project: Path, study: Study) -> None:
    copy = project / "build" / "reference"
    prepare(copy, study, project)
    trained = copy / "runs" / "synth_sysu" / "baseline-t1-s1" / "model.safetensors"
    trained.parent.mkdir()
    trained.write_text("trained")
    (copy / "dvc.lock").write_text("the copy's")
    (copy / "danet_core" / "old.py").write_text("")
    prepare(copy, study, project)
    assert trained.read_text() == "trained"
    assert (copy / "dvc.lock").read_text() == "the copy's"
    assert not (copy / "danet_core" / "old.py").exists()


def test_a_copy_that_was_cut_short_is_made_again(project: Path, study: Study) -> None:
    cut = project / "build" / ".reference.new" / "runs" / "synth_sysu" / "baseline-t1-s9"
    cut.mkdir(parents=True)
    prepare(project / "build" / "reference", study, project)
    assert not (project / "build" / "reference" / "runs" / "synth_sysu" / "baseline-t1-s9").exists()
    assert not (project / "build" / ".reference.new").exists()


def test_the_time_is_told_by_the_finished_runs(tmp_path: Path) -> None:
    runs = {"synth_sysu": ["baseline-t1-s0", "baseline-t1-s1", "baseline-t1-s2"]}
    assert outlook(tmp_path, runs).startswith("0 of 3 runs are there, 3 to train; how long that takes is not known yet")
    for seed, seconds in ((0, 60.0), (1, 180.0)):
        record = {**training_record("synth_sysu", "baseline", 1, seed), "seconds": seconds}
        atomic_write_json(tmp_path / "runs" / "synth_sysu" / f"baseline-t1-s{seed}" / "record.json", record)
    assert outlook(tmp_path, runs).startswith("2 of 3 runs are there, 1 to train: about 2 minutes of training")
    atomic_write_json(tmp_path / "runs/synth_sysu/baseline-t1-s2/record.json", {})
    with pytest.raises(StudyError, match="baseline-t1-s2/record.json has no entry seconds, so it is damaged; remove"):
        outlook(tmp_path, runs)


def results(copy: Path, study: Study) -> None:
    """Results of the reference as the pipeline leaves them in the copy, and a run that is not listed."""
    seeded = dataclasses.replace(study, study=dataclasses.replace(study.study, seeds=(0, 1, 2, 9)))
    for name in study.study.datasets:
        write_records(copy, name, seeded)
        for shown in ("tables", "figures"):
            (copy / "results" / name / shown).mkdir()
            (copy / "results" / name / shown / "one").write_text(name)


def test_results_are_published_all_or_none_and_without_runs_of_other_seeds(tmp_path: Path, study: Study) -> None:
    copy, root = tmp_path / "copy", tmp_path / "root"
    results(copy, study)
    old = root / "results" / "reference" / "synth_sysu" / "tables" / "old.md"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    missing = copy / "results" / "synth_regdb" / "metrics" / "b_cc-t1-s2.json"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(StudyError, match="has no scores of b_cc-t1-s2"):
        publish(copy, listed(study), root)
    assert old.read_text() == "old"
    missing.write_bytes(content)
    final = publish(copy, listed(study), root)
    assert not old.exists()
    for name, runs in listed(study).items():
        assert sorted(path.stem for path in (final / name / "metrics").iterdir()) == sorted(runs)
        assert (final / name / "tables" / "one").read_text() == (final / name / "figures" / "one").read_text() == name
    assert [path.name for path in (root / "results").iterdir()] == ["reference"]


def test_a_project_without_params_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(root=tmp_path) == 1
    assert "params.yaml" in capsys.readouterr().err


def test_a_failed_stage_publishes_nothing_and_a_second_call_ends_with_the_results_and_the_readme(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(copy: Path, study: Study) -> None:
        raise StudyError("a stage failed")

    shown: list[Path] = []
    monkeypatch.setattr(reference, "run", fail)
    monkeypatch.setattr(reference.readme, "update", lambda root: bool(shown.append(root)))
    assert reference.main(root=project) == 1
    assert "a stage failed" in capsys.readouterr().err
    assert not (project / "results" / "reference").exists() and not shown
    monkeypatch.setattr(reference, "run", results)
    assert reference.main(root=project) == 0
    said = capsys.readouterr().out
    assert "The reference study, seeds 0, 1, 2: 0 of 24 runs are there" in said
    assert len(list((project / "results" / "reference").glob("*/metrics/*.json"))) == 24
    assert shown == [project]
