"""Features from files get the scores of the authors' code and of our own records; files that do not fit are refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from finished import run_notebook
from stores import ROOT, make_project, small_run
from test_evaluate import finish, run

from danet_study import score as module
from danet_study.files import StudyError
from danet_study.matlab import read_mat
from danet_study.protocols import SCORES
from danet_study.score import published, score, table

MADE = Path(__file__).parent / "golden" / "sysu_authors_code"
KEYS = ("cmc1", "cmc5", "cmc10", "cmc20", "mAP")
MODES = {
    "all_single": ("all_search", "1"),
    "all_multi": ("all_search", "10"),
    "indoor_single": ("indoor_search", "1"),
    "indoor_multi": ("indoor_search", "10"),
}


def authors(setting, metric):
    """What the authors' MATLAB code gives for the made-up features, by trial."""
    with (MADE / "expected.csv").open() as stream:
        rows = [
            r for r in csv.DictReader(stream) if (r["distance"], r["mode"], r["shots"]) == (metric, *MODES[setting])
        ]
    return [{key: float(row[key]) for key in KEYS} for row in rows]


def save_v73(path, **variables):
    """As MATLAB's `save -v7.3`: references to cells, reversed axes, the size of empty cells, structs as groups."""
    with h5py.File(path, "w", userblock_size=512) as file:

        def put(name, value):
            if isinstance(value, dict):
                for field, one in value.items():
                    put(f"{name}/{field}", one)
            elif value.dtype == object:
                cells = [put(f"#refs#/{name}_{i}", cell).ref for i, cell in enumerate(value.ravel())]
                file[name] = np.array(cells, dtype=h5py.ref_dtype).reshape(value.T.shape)
            elif value.size:
                file[name] = value.T
            else:
                file[name] = np.array(value.shape, dtype=np.uint64)
                file[name].attrs["MATLAB_empty"] = np.uint8(1)
            return None if isinstance(value, dict) else file[name]

        for name, value in variables.items():
            put(name, value)


@pytest.fixture
def clone(tmp_path):
    """The made-up features laid out and named as in the authors' repository, v7.3, with a result file."""
    root = tmp_path / "clone" / "evaluation"
    for path in MADE.rglob("*.mat"):
        name = path.name.replace("made", "deep_zero_padding")
        target = root / ("feature" if name.startswith("feat") else "data_split") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        variables = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("_")}
        save_v73(target, **variables)
    (root / "result").mkdir()
    trials = authors("all_single", "euclidean")
    cmc = np.zeros((10, 20))  # rank 96 in the original
    for k in (1, 5, 10, 20):
        cmc[:, k - 1] = [trial[f"cmc{k}"] for trial in trials]
    performance = {"cmc_all": cmc, "map_all": np.array([[trial["mAP"]] for trial in trials])}
    save_v73(root / "result/result_feat_deep_zero_padding_euclidean_all_search_1shot.mat", performance=performance)
    return root.parent


@pytest.fixture
def arrays():
    """The made-up features as the arrays of an .npz."""
    return module._read_folder(MADE, None)[0]


def save(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_all_400_figures_of_the_authors_matlab_code(metric):
    compared = 0
    for setting, found in score(MADE, metric=metric).items():
        for trial, wanted in zip(found.per_trial, authors(setting, metric), strict=True):
            assert {key: trial[key] for key in KEYS} == pytest.approx(wanted, abs=1e-9)
            compared += len(KEYS)
    assert compared == 200


def test_a_clone_is_compared_with_the_authors_result_file_and_the_papers_row(clone, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    results, others = score(clone, metric="euclidean"), published(clone, "euclidean")
    for setting, result in score(MADE, metric="euclidean").items():  # v5
        assert result.per_trial == results[setting].per_trial
    frame = table(results, others).set_index(["Setting", "Row"])
    first = frame.loc["all-search, single-shot"]
    assert abs(first.loc["ours − authors' code", "Rank-1":"mAP"].astype(float)).max() < 1e-7
    assert first.loc["paper", "Rank-1":"mAP"].dropna().tolist() == pytest.approx([14.80, 54.12, 71.33, 15.95])
    assert first.loc["ours − paper", "Rank-1"] == pytest.approx(100 * results["all_single"].mean["cmc1"] - 14.80)
    assert "authors' code" not in frame.loc["indoor-search, multi-shot"].index
    trials = table(results, others, by_trial=True)
    assert trials[trials["Row"] == "ours − authors' code"]["Trial"].tolist() == list(range(1, 11))
    assert module.main([str(clone)]) == 0
    assert "14.8000" in capsys.readouterr().out


def test_an_absent_folder_is_answered_with_the_clone_to_make_and_what_to_expect(tmp_path, capsys):
    assert module.main([str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert "git clone" in error and "16.7052" in error and "19.1042" in error


def test_the_same_features_as_npz_get_the_same_scores_by_both_kinds_of_galleries(tmp_path, arrays):
    expected = score(MADE)
    drawn = score(save(tmp_path / "a.npz", arrays), galleries=MADE / "rand_perm_cam.mat")
    images = module._images(MADE, arrays, "feat", "sysu_mm01")
    galleries = module._draw(MADE / "rand_perm_cam.mat", images)
    stored = score(save(tmp_path / "b.npz", arrays | galleries))
    shifted = {name: values + 7 for name, values in (galleries | {"rows": images.rows}).items()}
    counted = score(save(tmp_path / "c.npz", arrays | shifted))
    for name, result in expected.items():
        assert result.per_trial == drawn[name].per_trial == stored[name].per_trial == counted[name].per_trial


@pytest.mark.parametrize("split", ["synth_sysu-1", "synth_regdb-1"])
def test_the_features_of_our_own_run_get_the_scores_of_its_record(tmp_path, split):
    root, config = make_project(tmp_path / "project"), small_run(split=split)
    finish(root, config)
    record = run(root, config)
    galleries = root / "data/packed/synth_sysu/galleries.npz"
    path = root / "runs" / config.name / "features.npz"
    results = score(path, protocol=record["protocol"], galleries=galleries)
    for name, setting in record["settings"].items():
        assert {key: round(results[name].mean[key], 6) for key in SCORES} == setting["mean"]
        assert round(results[name].chance_rank1, 6) == setting["chance_rank1"]
    arguments = [str(path), "--protocol", record["protocol"], "--galleries", str(galleries), "--trials"]
    assert module.main(arguments) == 0


def regdb(seed):
    rng = np.random.default_rng(seed)
    pids = np.repeat(rng.permutation(40)[:8], 5)
    return {"feat": rng.normal(size=(40, 4)), "pids": pids, "modalities": np.arange(40) % 2}


def test_regdb_averages_its_trials_and_takes_none_twice(tmp_path):
    paths = [save(tmp_path / f"{seed}.npz", regdb(seed)) for seed in range(3)]
    alone = [score(path, protocol="regdb") for path in paths]
    for name, result in score(paths, protocol="regdb").items():
        assert result.per_trial == tuple(one[name].per_trial[0] for one in alone)
        assert result.mean["mAP"] == pytest.approx(np.mean([one[name].mean["mAP"] for one in alone]))
    order = np.random.default_rng(0).permutation(40)
    again = save(tmp_path / "again.npz", {key: values[order] for key, values in regdb(0).items()})
    for repeated in (paths[0], again):
        with pytest.raises(StudyError):
            score([*paths, repeated], protocol="regdb")


def one_nan(arrays):
    arrays["feat"][5, 2] = np.nan


CHANGES = {
    "a wrong key": lambda a: a.update(features=a.pop("feat")),
    "no camids": lambda a: a.pop("camids"),
    "NaN": one_nan,
    "one feature too few": lambda a: a.update(feat=a["feat"][:-1]),
    "features without dimensions": lambda a: a.update(feat=a["feat"][:, :0]),
    "features whose squares overflow": lambda a: a.update(feat=a["feat"] * 1e300),
    "flat features": lambda a: a.update(feat=a["feat"][:, 0]),
    "integer features": lambda a: a.update(feat=a["feat"].astype(int)),
    "text identities": lambda a: a.update(pids=a["pids"].astype(str)),
    "pids and camids swapped": lambda a: a.update(pids=a["camids"], camids=a["pids"]),
    "modalities swapped": lambda a: a.update(modalities=1 - np.isin(a["camids"], (3, 6))),
    "visible images only": lambda a: a.update({key: a[key][~np.isin(a["camids"], (3, 6))] for key in dict(a)}),
    "a missing image": lambda a: a.update({key: a[key][1:] for key in dict(a)}),
    "an identity without a permutation": lambda a: a.update(pids=a["pids"] + 100),
    "rows that do not ascend": lambda a: a.update(rows=np.arange(len(a["pids"]))[::-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, change):
    CHANGES[change](arrays)
    path = save(tmp_path / "features.npz", arrays)
    with pytest.raises(StudyError) as error:
        score(path, galleries=MADE / "rand_perm_cam.mat")
    assert len(str(error.value).replace(str(path), "PATH").split()) <= 27


def test_an_npz_without_galleries_or_of_other_images_is_refused(tmp_path, arrays):
    path = save(tmp_path / "features.npz", arrays)
    other = save(tmp_path / "other.npz", dict.fromkeys(MODES, np.array([[10**6]])))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for paths, galleries in (
        (path, None),
        (path, other),
        (tmp_path / "broken.npz", None),
        (tmp_path / "none.npz", None),
    ):
        with pytest.raises(StudyError):
            score(paths, galleries=galleries)
    with pytest.raises(StudyError):
        score(path, protocol="regdb")


STORED = {
    "flat": lambda g: g[0],
    "cubic": lambda g: g[None],
    "empty": lambda g: g[:, :0],
    "bool": lambda g: g[:, :1] > 0,
    "repeated": lambda g: np.repeat(g, 2, axis=1),
}


@pytest.mark.parametrize("change", STORED)
def test_stored_galleries_that_do_not_fit_are_refused(tmp_path, arrays, change):
    galleries = module._draw(MADE / "rand_perm_cam.mat", module._images(MADE, arrays, "feat", "sysu_mm01"))
    path = save(
        tmp_path / "features.npz", arrays | galleries | {"indoor_multi": STORED[change](galleries["all_multi"])}
    )
    with pytest.raises(StudyError):
        score(path)


def change_cells(function):
    def change(cameras):
        changed = cameras.copy()
        for camera in range(6):
            changed[camera, 0] = cameras[camera, 0].copy()
            for index, order in enumerate(cameras[camera, 0].ravel()):
                changed[camera, 0][index, 0] = function(order)
        return changed

    return change


DRAWN = {
    "four cameras": lambda c: c[:4],
    "seven cameras": lambda c: np.concatenate([c, c[:1]]),
    "no cell array": lambda c: np.eye(6),
    "arrays as cameras": lambda c: np.array([[np.eye(3 + i)] for i in range(6)] + [[None]], dtype=object)[:6],
    "five trials": change_cells(lambda order: order[:5]),
    "transposed": change_cells(lambda order: order.T),
    "text": change_cells(lambda order: np.array(["text"])),
}


@pytest.mark.parametrize("change", DRAWN)
def test_permutations_that_do_not_fit_are_refused(tmp_path, arrays, change):
    cameras = scipy.io.loadmat(MADE / "rand_perm_cam.mat")["rand_perm_cam"]
    scipy.io.savemat(tmp_path / "p.mat", {"rand_perm_cam": DRAWN[change](cameras)})
    with pytest.raises(StudyError):
        score(save(tmp_path / "features.npz", arrays), galleries=tmp_path / "p.mat")


IDS = {
    "text": lambda ids: np.array(["text"]),
    "a fraction": lambda ids: ids + 0.5,
    "NaN": lambda ids: np.where(ids == ids.max(), np.nan, ids),
    "repeated": lambda ids: np.concatenate([ids, ids], axis=1),
    "zero": lambda ids: ids - ids.min(),
    "empty": lambda ids: np.zeros((0, 0)),
    "cells": lambda ids: np.array([[ids[:, :1], None]], dtype=object)[:, :1],
}


@pytest.mark.parametrize("version", [scipy.io.savemat, lambda path, variables: save_v73(path, **variables)])
@pytest.mark.parametrize("change", [None, *IDS])
def test_test_identities_are_different_integers_also_as_doubles(clone, version, change):
    path = clone / "evaluation/data_split/test_id.mat"
    ids = scipy.io.loadmat(MADE / "test_id.mat")["id"].astype(float)
    if change == "text" and version is not scipy.io.savemat:
        save_v73(path, id=ids)
        with h5py.File(path, "a") as file:
            file["id"].attrs["MATLAB_class"] = np.bytes_("char")
    else:
        version(path, {"id": IDS[change](ids) if change else ids})
    if change is None:
        assert score(clone)["all_multi"].mean == score(MADE)["all_multi"].mean
    else:
        with pytest.raises(StudyError):
            score(clone)


@pytest.mark.parametrize("given", ["a.mat PATH", "an absent .mat PATH", "absent galleries", "few ranks"])
def test_the_command_answers_wrong_files_in_one_line(clone, tmp_path, arrays, capsys, given):
    ranks = {"cmc_all": np.zeros((10, 19)), "map_all": np.zeros((10, 1))}
    result = clone / "evaluation/result/result_feat_deep_zero_padding_euclidean_all_search_1shot.mat"
    scipy.io.savemat(result, {"performance": ranks})
    arguments = {
        "a.mat PATH": [str(MADE / "rand_perm_cam.mat")],
        "an absent .mat PATH": [str(tmp_path / "absent.mat")],
        "absent galleries": [str(save(tmp_path / "a.npz", arrays)), "--galleries", str(tmp_path / "absent.mat")],
        "few ranks": [str(clone)],
    }[given]
    assert module.main(arguments) == 1
    error = capsys.readouterr().err
    assert "git clone" not in error and error.count("\n") == 1


def test_an_npz_may_have_a_suffix_in_capitals(tmp_path, arrays, capsys):
    path = save(tmp_path / "a.npz", arrays).rename(tmp_path / "a.NPZ")
    assert module.main([str(path), "--galleries", str(MADE / "rand_perm_cam.mat")]) == 0
    assert "identities: 20 " in capsys.readouterr().out


@pytest.mark.parametrize("file", ["feature/feat_deep_zero_padding_cam4.mat", "data_split/test_id.mat"])
@pytest.mark.parametrize("damage", ["missing", "cut", "other variable", "cells without features", "two copies"])
def test_a_damaged_folder_is_refused(clone, file, damage):
    path = clone / "evaluation" / file
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1500])
    elif damage == "two copies":
        (clone / "another").mkdir()
        scipy.io.savemat(clone / "another" / path.name, {"id": np.arange(1, 4), "feature": np.eye(2)})
    elif damage == "other variable":
        scipy.io.savemat(path, {"other": np.eye(2)})
    else:
        cells = np.empty((40, 1), dtype=object)
        cells[:, 0] = [np.zeros((0, 0))] * 40
        scipy.io.savemat(path, {"feature": cells, "id": np.array([[3, 500]])})
    with pytest.raises(StudyError):
        score(clone)


@pytest.mark.parametrize("name", ["mine", "[a-z]*"])
def test_of_two_sets_of_features_one_must_be_named(clone, name):
    for path in (clone / "evaluation/feature").glob("*.mat"):
        shutil.copyfile(path, path.with_name(path.name.replace("feat_deep_zero_padding", name)))
    with pytest.raises(StudyError):
        score(clone)
    assert score(clone, feature=name)["all_single"].mean == score(MADE)["all_single"].mean
    assert published(clone, "euclidean", name) == {"authors' code": {}}


def test_matlab_files_of_both_versions_give_the_same_arrays_and_cells(tmp_path):
    cells = np.empty((3, 1), dtype=object)
    cells[:, 0] = np.arange(6.0).reshape(2, 3), np.zeros((0, 4)), np.array([[1.5]])
    scipy.io.savemat(tmp_path / "5.mat", {"cells": cells, "s": {"a": np.arange(6).reshape(3, 2)}})
    save_v73(tmp_path / "7.mat", cells=cells, s={"a": np.arange(6).reshape(3, 2)})
    for name in ("5.mat", "7.mat"):
        for found, cell in zip(read_mat(tmp_path / name, "cells"), cells.ravel(), strict=True):
            np.testing.assert_array_equal(found, cell)
        np.testing.assert_array_equal(read_mat(tmp_path / name, "s/a"), np.arange(6).reshape(3, 2))


@pytest.mark.parametrize("present", [True, False])
def test_the_notebook_scores_a_clone_or_made_up_features_and_an_npz(clone, tmp_path, arrays, monkeypatch, present):
    monkeypatch.chdir(ROOT)
    folder, npz = str(clone if present else tmp_path / "absent"), str(save(tmp_path / "mine.npz", arrays))
    galleries = str(MADE / "rand_perm_cam.mat")
    values = run_notebook("09_score_features", folder=folder, npz=npz, galleries=galleries)
    assert (values["scored"] == folder) == present
    assert ("paper" in values["others"]) == present
    assert ("authors' code" in set(values["by_trial"]["Row"])) == present
