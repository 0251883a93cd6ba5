"""Score features made elsewhere by the protocols of SYSU-MM01 and RegDB: `python -m danet_study.score PATH`.

PATH is a folder that the SYSU-MM01 authors' evaluation code can read (MATLAB v5 or v7.3):
    feature/<name>_cam{1..6}.mat    cell array `feature`: cell [id-1] is (m, D), row i the i-th image
    data_split/{test_id,rand_perm_cam}.mat    `id` and `rand_perm_cam`
    result/result_<name>_<distance>_<mode>_<n>shot.mat    optional, `performance`: what their code found
or an .npz, for RegDB one per trial; `runs/<run>/features.npz` is one:
    feat (N, D)          floats; `feat_bn` is preferred where it exists
    pids (N,)            identities; RegDB: folder numbers
    camids (N,)          SYSU-MM01: cameras 1 to 6; a camera's images of an identity in the order of their names
    modalities (N,)      RegDB: 0 visible, 1 infrared
    rows (N,)            optional, ascending: what galleries count in, 0 to N-1 by default
    all_single, all_multi, indoor_single, indoor_multi (T, G)    optional: SYSU-MM01's galleries, values of `rows`
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from danet_study.analysis import Metric
from danet_study.config import Evaluation
from danet_study.files import StudyError
from danet_study.matlab import read_mat
from danet_study.protocols import PROTOCOLS, SYSU_SEARCHES, Images, ProtocolResult, over_trials
from danet_study.tables import PAPER, grid_text, paper_table

SOURCE = "https://github.com/wuancong/SYSU-MM01"
AUTHORS = "authors' code"
ZERO_PADDING = "feat_deep_zero_padding"
EXPECTED = (
    f"Expected of {ZERO_PADDING}, Euclidean distance, all-search, single-shot: Rank-1 16.7052, Rank-5 42.4323, "
    "Rank-10 58.4617, Rank-20 76.1215, mAP 19.1042. The clone needs no agreement."
)
SIZES = {  # queries and gallery images of the published test sets
    **{"all_single": (3803, 301), "all_multi": (3803, 3010), "indoor_single": (3803, 112)},
    **{"indoor_multi": (3803, 1120), "thermal_to_visible": (2060, 2060), "visible_to_thermal": (2060, 2060)},
}
COLUMNS = {"cmc1": "Rank-1", "cmc5": "Rank-5", "cmc10": "Rank-10", "cmc20": "Rank-20", "mAP": "mAP", "mINP": "mINP"}
COLUMNS["chance"] = "Chance"
IDENTITIES = {"sysu_mm01": 96, "regdb": 206}  # of the published test sets
SHOTS = {"single": 1, "multi": 10}
SIDES = {"sysu_mm01": "camids", "regdb": "modalities"}  # the key that tells query from gallery
SETTINGS = tuple(PROTOCOLS["sysu_mm01"].settings)
TITLES = {**PROTOCOLS["sysu_mm01"].settings, **PROTOCOLS["regdb"].settings}
Others = Mapping[str, Mapping[str, pd.DataFrame]]  # source, setting: scores as fractions by trial, from 1


def score(
    paths: str | Path | Sequence[str | Path],
    *,
    protocol: str = "sysu_mm01",
    metric: Metric = "cosine",
    galleries: str | Path | None = None,
    feature: str | None = None,
) -> dict[str, ProtocolResult]:
    """All settings of a protocol, by the functions that score our own runs; several files are RegDB's trials.

    galleries: rand_perm_cam.mat or an .npz, if not with the features. feature: the files' <name> or the key to score.
    Raises StudyError for a file that is missing or not as described above.
    """
    return _score(paths, protocol, metric, galleries, feature)[0]


def _score(
    paths: str | Path | Sequence[str | Path],
    protocol: str,
    metric: Metric,
    galleries: str | Path | None,
    feature: str | None,
) -> tuple[dict[str, ProtocolResult], int]:
    """And the number of identities, the fewest over the files."""
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    numbers, found, tested = Evaluation(trials=10, metric=metric, galleries="rand_perm", batch_size=1), [], set()
    for path in files:
        images, drawn = _read(path, protocol, feature, galleries)
        tested.add(tuple(np.unique(images.pids)))
        try:
            found.append(PROTOCOLS[protocol].score(images, SimpleNamespace(root=path, galleries=drawn), numbers))
        except ValueError as error:
            raise StudyError(f"{path}: {error}") from None
    if len(files) > 1 and (protocol != "regdb" or len(tested) < len(files)):
        raise StudyError(f"{files[1]}: several files must be different trials of RegDB; score others one by one")
    trials = {name: [trial for one in found for trial in one[name].trials] for name in found[0]}
    results = {name: over_trials(trials[name], one.gallery, one.cmc_level) for name, one in found[0].items()}
    return results, min(map(len, tested))


def published(folder: str | Path, metric: Metric, feature: str | None = None, paper: Path = PAPER) -> Others:
    """What a folder's scores compare with: results of the authors' code, and the paper's row for its features."""
    name = _feature_name(Path(folder), feature)
    others: dict[str, dict[str, pd.DataFrame]] = {AUTHORS: {}}
    for setting in SETTINGS:
        search, shots = setting.split("_")
        for path in Path(folder).rglob(f"result_{glob.escape(name)}_{metric}_{search}_search_{SHOTS[shots]}shot.mat"):
            cmc, ap = (read_mat(path, f"performance/{key}", np.ndarray) for key in ("cmc_all", "map_all"))
            if cmc.ndim != 2 or cmc.shape[1] < 20 or ap.size != len(cmc):
                raise StudyError(
                    f"{path}: cmc_all is {cmc.shape}, map_all {ap.shape}; expected 20 ranks; remove the file"
                )
            ranks = {f"cmc{k}": cmc[:, k - 1] for k in (1, 5, 10, 20)}
            others[AUTHORS][setting] = pd.DataFrame({**ranks, "mAP": ap.ravel()}, index=range(1, len(cmc) + 1))
    if name == ZERO_PADDING:
        row = paper_table("table1_sysu_mm01.csv", paper).loc["Zero-Padding (Wu et al. 2017)"] / 100
        columns = {one: {key: row.get(f"{one}_{key}", np.nan) for key in COLUMNS} for one in SETTINGS}
        others["paper"] = {one: pd.DataFrame(scores, index=[1]) for one, scores in columns.items()}
    return others


def table(results: Mapping[str, ProtocolResult], others: Others | None = None, by_trial: bool = False) -> pd.DataFrame:
    """Percent: Setting, Row, Trial, scores, Chance. Rows: ours, `others`, and the differences between them."""
    parts = {}
    for name, result in results.items():
        ours = pd.DataFrame(result.per_trial, index=range(1, len(result.trials) + 1))
        frames = {"ours": ours.assign(chance=[trial.chance_rank1 for trial in result.trials])}
        frames |= {source: settings[name] for source, settings in (others or {}).items() if name in settings}
        if by_trial:  # of which the paper has none
            frames = {source: frame for source, frame in frames.items() if len(frame) == len(ours)}
        else:
            frames = {source: frame.mean().to_frame("mean").T for source, frame in frames.items()}
        frames |= {f"ours − {source}": frames["ours"] - frame for source, frame in frames.items() if source != "ours"}
        parts[TITLES[name]] = pd.concat(frames, names=["Row", "Trial"])
    scores = 100 * pd.concat(parts, names=["Setting"]).reindex(columns=list(COLUMNS))
    return scores.rename(columns=COLUMNS).reset_index()


# -------------------- reading


def _read(path: Path, protocol: str, feature: str | None, given: str | Path | None) -> tuple[Images, dict[str, Any]]:
    """The images that `path` holds and, for SYSU-MM01, the galleries (T, G) of each setting as values of their rows."""
    if path.suffix.lower() == ".npz":
        arrays, source = _read_npz(path), path
        images = _images(path, arrays, feature or ("feat_bn" if "feat_bn" in arrays else "feat"), protocol)
    else:
        arrays, source = _read_folder(path, feature)
        images = _images(path, arrays, "feat", protocol)
    source = Path(given or source)
    if protocol != "sysu_mm01":
        return images, {}
    if source.suffix.lower() == ".mat":
        return images, _draw(source, images)
    stored, visible = _read_npz(source), images.rows[images.modalities == 0]
    galleries = {name: stored.get(name, np.array("absent")) for name in SETTINGS}
    for values in galleries.values():
        fit = values.ndim == 2 and values.size and values.dtype.kind in "iu" and np.isin(values, visible).all()
        if not fit or (np.diff(np.sort(values)) == 0).any():
            raise StudyError(f"{source}: no galleries {', '.join(SETTINGS)} of these images; name rand_perm_cam.mat")
    return images, galleries


def _feature_name(folder: Path, feature: str | None) -> str:
    if folder.is_file() or folder.suffix.lower() == ".mat":
        raise StudyError(f"{folder} is neither a folder nor an .npz; name the folder that holds the feature files")
    if not folder.is_dir():
        raise StudyError(f"{folder} is missing; `git clone --depth 1 {SOURCE} {folder}` makes it")
    names = {path.stem[: -len("_cam1")] for path in folder.rglob("*_cam1.mat")}
    chosen = names & {feature} if feature else names
    if len(chosen) != 1:
        raise StudyError(f"{folder}: expected one <name>_cam1.mat, found {sorted(names)}; choose with --feature")
    return chosen.pop()


def _read_folder(folder: Path, feature: str | None) -> tuple[dict[str, np.ndarray], Path]:
    """Arrays as in an .npz, and rand_perm_cam.mat."""
    names = [f"{_feature_name(folder, feature)}_cam{camera}.mat" for camera in range(1, 7)]
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.mat")):
        first = files.setdefault(path.name, path)
        if path.name in (*names, "test_id.mat", "rand_perm_cam.mat") and path.read_bytes() != first.read_bytes():
            raise StudyError(f"{first} and {path} differ; name the folder that holds one of them")
    if absent := [name for name in (*names, "test_id.mat", "rand_perm_cam.mat") if name not in files]:
        raise StudyError(f"{folder}: {', '.join(absent)} missing; copy `evaluation/` of {SOURCE} again")
    found = read_mat(files["test_id.mat"], "id", np.ndarray).ravel().tolist()
    ids = sorted(map(int, {*range(1, 10**5)} & {*found}))  # MATLAB's numbers are doubles unless cast
    if not found or len(ids) != len(found):
        raise StudyError(f"{files['test_id.mat']}: expected different positive integers as `id`; copy the file again")
    feat, pids, camids = [], [], []
    for camera, name in enumerate(names, start=1):
        cells = read_mat(files[name], "feature", list)
        for pid in ids:
            if pid <= len(cells) and np.size(cells[pid - 1]):
                feat.append(np.asarray(cells[pid - 1]))
                pids.append(np.full(len(feat[-1]), pid))
                camids.append(np.full(len(feat[-1]), camera))
    if unseen := sorted({*ids} - {int(part[0]) for part in pids}):
        raise StudyError(f"{folder}: no features of test identities {unseen[:5]}; extract them")
    if len({part.shape[1:] for part in feat}) != 1:
        raise StudyError(f"{folder}: features of different lengths; extract all with one model")
    arrays = {"feat": np.concatenate(feat), "pids": np.concatenate(pids), "camids": np.concatenate(camids)}
    return arrays, files["rand_perm_cam.mat"]


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; correct the path") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise StudyError(f"{path} is no .npz of arrays ({type(error).__name__}); write it with np.savez") from None


def _images(path: Path, arrays: Mapping[str, np.ndarray], feature: str, protocol: str) -> Images:
    """What is scored, checked."""
    if absent := [key for key in (feature, "pids", SIDES[protocol]) if key not in arrays]:
        raise StudyError(
            f"{path}: no {' and '.join(absent)} among its keys {', '.join(arrays)}; rename or add these keys"
        )
    feat = arrays[feature]
    if feat.ndim != 2 or feat.dtype.kind != "f" or not feat.size:
        raise StudyError(f"{path}: {feature} is {feat.dtype} {feat.shape}; expected floats (images, dimensions)")
    if wrong := int((~(np.abs(feat) < np.float64(1e100)).all(axis=1)).sum()):  # squares must be finite
        raise StudyError(f"{path}: {wrong} of {len(feat)} features are not finite or beyond 1e100; extract them again")
    columns = {key: arrays[key] for key in ("pids", "camids", "modalities", "rows") if key in arrays}
    for key, values in columns.items():
        if values.shape != feat.shape[:1] or values.dtype.kind not in "iu":
            raise StudyError(f"{path}: {key} is {values.dtype} {values.shape}; expected {len(feat)} integers")
        columns[key] = values.astype(np.int64)
    if protocol == "sysu_mm01":
        camids, infrared = columns["camids"], np.isin(columns["camids"], (3, 6)).astype(np.int64)
        if not np.isin(camids, range(1, 7)).all() or (columns.setdefault("modalities", infrared) != infrared).any():
            raise StudyError(
                f"{path}: expected camids 1 to 6, with 3 and 6 infrared; check the keys, or add --protocol regdb"
            )
    if {*columns["modalities"].tolist()} != {0, 1} or (np.diff(columns.get("rows", [])) <= 0).any():
        raise StudyError(f"{path}: expected images of both modalities, 0 and 1, sorted by rows; save them so")
    return Images.of(feat, **columns)


def _draw(path: Path, images: Images) -> dict[str, np.ndarray]:
    """By rand_perm_cam.mat: in each trial the first 1 or 10 images of every identity and gallery camera."""
    drawn: dict[str, list[list[int]]] = {name: [[] for _ in range(10)] for name in SETTINGS}
    cameras = read_mat(path, "rand_perm_cam", list)
    if len(cameras) != 6 or not all(isinstance(cells, list) for cells in cameras):
        raise StudyError(f"{path}: expected a cell array for each of 6 cameras, found {len(cameras)}; copy it again")
    for camera, cells in enumerate(cameras, start=1):
        for pid in np.unique(images.pids).tolist():
            rows = images.rows[(images.camids == camera) & (images.pids == pid)]
            order = np.asarray(cells[pid - 1]) if 0 < pid <= len(cells) else np.zeros((10, 0))
            permuted = np.array_equal(np.sort(order), np.tile(np.arange(1, len(rows) + 1), (10, 1)))
            if not permuted and (order.size or len(rows)):
                found = f"{order.shape} in {path.name}, expected 10 permutations of {len(rows)} features"
                raise StudyError(f"camera {camera}, identity {pid}: {found}; extract all test images or copy the file")
            order = order.astype(int)
            for name in SETTINGS:
                search, shots = name.split("_")
                for trial, numbers in zip(drawn[name], order if camera in SYSU_SEARCHES[search] else [], strict=False):
                    trial += rows[numbers[: SHOTS[shots]] - 1].tolist()
    return {name: np.array(trials) for name, trials in drawn.items()}


# -------------------- command


def as_text(frame: pd.DataFrame) -> str:
    """A table for the terminal, four decimals."""
    texts = frame.map(lambda value: f"{value:.4f}" if isinstance(value, float) else value)
    return grid_text(texts.replace("nan", "–"), "simple")


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m danet_study.score", description=__doc__, formatter_class=raw)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--protocol", choices=["sysu_mm01", "regdb"], default="sysu_mm01")
    parser.add_argument("--metric", choices=["cosine", "euclidean"], help="euclidean for a folder, cosine for an .npz")
    parser.add_argument("--galleries", type=Path, help="rand_perm_cam.mat, or an .npz with galleries")
    parser.add_argument("--feature", help="<name> of the feature files, or key of the .npz")
    parser.add_argument("--trials", action="store_true", help="print every trial, too")
    given = parser.parse_args(arguments)
    folder = given.paths[0].suffix.lower() != ".npz"
    metric: Metric = given.metric or ("euclidean" if folder else "cosine")
    options = {"protocol": given.protocol, "galleries": given.galleries, "feature": given.feature}
    try:
        results, n_identities = _score(given.paths, metric=metric, **options)
        others = published(given.paths[0], metric, given.feature) if folder else {}
    except ValueError as error:  # StudyError, and numpy's for cells in cells
        absent = folder and given.paths[0].suffix.lower() != ".mat" and not given.paths[0].exists()
        print(f"score: {error}", *[EXPECTED] * absent, sep="\n", file=sys.stderr)
        return 1
    print(f"{given.protocol}, {metric} distance, percent", as_text(table(results, others)), sep="\n\n", end="\n\n")
    if given.trials or others.get(AUTHORS):
        print(as_text(table(results, others, by_trial=True)), end="\n\n")
    for name, one in results.items():
        size = one.n_query, one.gallery_size
        note = "" if size == SIZES[name] else f" (published: {SIZES[name][0]} and {SIZES[name][1]})"
        print(f"{TITLES[name]}: {one.n_valid} of {size[0]} queries have a match among {size[1]} images{note}")
    note = "" if n_identities == IDENTITIES[given.protocol] else f" (published: {IDENTITIES[given.protocol]})"
    print(f"test identities: {n_identities}{note}")
    print(f"trials: {len(one.trials)} of the protocol's 10")
    return 0


if __name__ == "__main__":
    sys.exit(main())
