"""Rendered stand-ins for SYSU-MM01 and RegDB, written in the layout of the originals, and crops for pretraining.

Neither original may be shipped. These trees let every line of the study run without them: same folders, same file
formats, same split files, same irregularities (absent cameras, validation identities in three cameras only, images of
different sizes). What is drawn is in `pedestrian.py` and `scenery.py`.

Every image has a generator of its own, seeded by (seed, data set, identity, camera, image number), so a tree does not
depend on how many processes drew it. A tree appears under its final name when it is complete, never before.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from danet_study.files import StudyError, atomic_write_json, read_json, sha256_file, sha256_json
from data_prep.folders import new_folder
from data_prep.parallel import parallel
from data_prep.render.pedestrian import Camera, Nuisance, Spectrum, draw, sample_camera, sample_nuisance
from data_prep.render.people import Identity, sample_identity

TRIALS = 10  # random galleries of SYSU-MM01, random splits of RegDB
_SYSU, _REGDB, _PRETRAINING = 1, 2, 3  # name spaces of seeds: identities of two data sets are never the same
_IDENTITY, _IMAGE, _LAYOUT, _SCENES = 0, 1, 2, 3
_VISIBLE_CAMERAS, _INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)
_VALIDATION_CAMERAS = (3, 4, 5)  # as in SYSU-MM01

Job = tuple[Any, ...]  # (function, arguments), picklable; the function writes files and returns nothing
Count = Annotated[int, Field(ge=1, le=255)]  # rand_perm_cam holds uint8


class _Images(BaseModel, extra="forbid"):
    train: Count
    val: Count
    test: Count


class _Spec(BaseModel, extra="forbid"):
    seed: int


class RenderSysu(_Spec):
    """`render` of a data set in SYSU-MM01's layout; params.yaml says what the values are."""

    train_ids: Annotated[int, Field(ge=2)]
    val_ids: Annotated[int, Field(ge=0)]
    test_ids: Annotated[int, Field(ge=2)]
    images: _Images  # per identity and camera
    absent: Annotated[float, Field(ge=0, lt=0.5)]
    near_infrared_follows: Annotated[float, Field(ge=0, le=1)]
    height: Annotated[int, Field(ge=32)]


class RenderRegdb(_Spec):
    """`render` of a data set in RegDB's layout. RegDB's split files have ten lines per identity."""

    ids: Annotated[int, Field(ge=4)]
    images: Literal[10]


class RenderPretraining(_Spec):
    """`pretraining.render`."""

    ids: Annotated[int, Field(ge=2)]
    images: Count
    height: Annotated[int, Field(ge=32)]


def render(root: Path, layout: str, spec: dict[str, Any], *, workers: int | None = None) -> dict[str, Any]:
    """Render the tree `root` unless it is there, complete and unchanged; returns what its render.json holds.

    layout: "sysu_mm01", "regdb" or "pretraining". spec: `render` in params.yaml. The files do not depend on `workers`.
    Raises StudyError for values out of range, and if `root` holds something that was not rendered here.
    """
    if layout not in _KINDS:
        raise StudyError(f"layout {layout} cannot be rendered; expected sysu_mm01 or regdb")
    form, plan = _KINDS[layout]
    try:
        checked = form(**spec)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise StudyError(f"params.yaml: render.{key} of {root.name}: {error.errors()[0]['msg']}") from None
    fingerprint = sha256_json({"layout": layout, "code": _code(), "spec": checked.model_dump()})
    if (record := _existing(root, fingerprint)) is not None:
        return record
    with new_folder(root) as folder:
        jobs, counts = plan(folder, checked)
        for _ in parallel(_run, jobs, workers):
            pass
        files, content = _content(folder)
        record = {
            "layout": layout,
            "fingerprint": fingerprint,
            "spec": checked.model_dump(),
            "counts": counts | {"files": files},
            "content_sha256": content,
        }
        atomic_write_json(folder / "render.json", record)
    return record


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))


def _identity(seed: int, space: int, pid: int, near_infrared_follows: float = 0.0) -> Identity:
    return sample_identity(_rng(seed, space, _IDENTITY, pid), near_infrared_follows)


def _code() -> str:
    """Hash of the text of the modules that decide what is drawn: a tree drawn by other code is replaced."""
    here = Path(__file__).parent
    names = ("figure.py", "pedestrian.py", "people.py", "scenery.py", "synthetic.py")
    return sha256_json([(here / name).read_text(encoding="utf-8") for name in names])


def _existing(root: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record of a complete tree of this spec, None if there is no tree or another one that may be replaced."""
    if not root.exists() or not any(root.iterdir()):
        return None
    if not (root / "render.json").is_file():
        raise StudyError(f"{root} was not rendered by this study (no render.json); move it, or set another root")
    record = read_json(root / "render.json")
    if record.get("fingerprint") != fingerprint:
        return None
    return record if (record["counts"]["files"], record["content_sha256"]) == _content(root) else None


def _content(root: Path) -> tuple[int, str]:
    """Number of files and the hash of their names and bytes."""
    paths = (path for path in root.rglob("*") if path.is_file() and path != root / "render.json")
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return len(names), sha256_json([[name, sha256_file(root / name)] for name in names])


def _run(job: Job) -> None:
    job[0](*job[1:])


def _save_crop(
    path: Path, who: Identity, camera: Camera, height: int, rng: np.random.Generator, spectrum: Spectrum
) -> None:
    """Draw a JPEG of about `height` pixels, and half as wide."""
    high = round(height * rng.uniform(0.82, 1.2))
    nuisance = sample_nuisance(rng, camera, high, round(high * rng.uniform(0.42, 0.52)))
    Image.fromarray(draw(who, nuisance, spectrum)).save(path, quality=camera.quality)


# SYSU-MM01's layout


def _sysu_cameras(seed: int) -> dict[int, Camera]:
    room, office, gate, garden, passage = map(int, _rng(seed, _SYSU, _SCENES).integers(2**31, size=5))
    white = (1.0, 1.0, 1.0)
    return {  # eye, tint, gain, contrast, noise, blur, quality, outdoor
        1: Camera("room", room, 2.7, (1.06, 1.0, 0.9), 1.0, 1.05, 0.012, 0.3, 92),
        2: Camera("office", office, 2.3, (0.95, 1.0, 1.04), 0.88, 0.95, 0.016, 0.45, 85),
        3: Camera("office", office, 2.3, white, 1.0, 1.05, 0.014, 0.35, 85),
        4: Camera("gate", gate, 3.1, (1.02, 1.0, 0.97), 1.15, 1.15, 0.01, 0.35, 90, True),
        5: Camera("garden", garden, 1.8, (0.98, 1.02, 0.95), 0.95, 0.9, 0.014, 0.5, 80, True),
        6: Camera("passage", passage, 2.6, white, 0.9, 1.0, 0.018, 0.45, 78, True),
    }


def _sysu_cells(spec: RenderSysu) -> tuple[dict[str, list[int]], dict[tuple[int, int], str]]:
    """Identities of each split, and the split of every (identity, camera) cell with images."""
    rng = _rng(spec.seed, _SYSU, _LAYOUT)
    total = spec.train_ids + spec.val_ids + spec.test_ids
    numbers = rng.permutation(total + math.ceil(total / 12))[:total] + 1  # gaps: folders of the original have them too
    parts = np.split(numbers, np.cumsum([spec.train_ids, spec.val_ids]))
    splits = {name: sorted(part.tolist()) for name, part in zip(("train", "val", "test"), parts, strict=True)}
    cells = {
        (pid, camera): name
        for name, pids in splits.items()
        for pid in pids
        for camera in (_VALIDATION_CAMERAS if name == "val" else range(1, 7))
    }
    quota = round(spec.absent * len(cells))
    outdoors = round(2 * spec.absent * spec.test_ids)  # test identities never seen indoors in the light
    if spec.absent > 0 and spec.test_ids > 1 and quota >= 2:
        outdoors = max(1, outdoors)
    for pid in rng.permutation(splits["test"])[: min(outdoors, quota // 2)].tolist():
        del cells[pid, 1], cells[pid, 2]
        quota -= 2
    order = sorted(cells)
    for k in rng.permutation(len(order)):
        if quota <= 0:
            break
        pid, camera = order[k]
        same_modality = _INFRARED_CAMERAS if camera in _INFRARED_CAMERAS else _VISIBLE_CAMERAS
        if sum((pid, other) in cells for other in same_modality) > 1:
            del cells[pid, camera]
            quota -= 1
    return splits, cells


def _plan_sysu(root: Path, spec: RenderSysu) -> tuple[list[Job], dict[str, Any]]:
    splits, cells = _sysu_cells(spec)
    cameras = _sysu_cameras(spec.seed)
    sizes = {cell: getattr(spec.images, split) for cell, split in sorted(cells.items())}
    jobs = [(_draw_sysu_cell, root, spec, pid, camid, cameras[camid], n) for (pid, camid), n in sizes.items()]
    _write_sysu_lists(root, spec.seed, splits, sizes)
    by_camera = {c: [n for (_, camid), n in sizes.items() if camid == c] for c in cameras}
    return jobs, {
        "ids": {name: len(pids) for name, pids in splits.items()},
        "images": {name: sum(n for cell, n in sizes.items() if cells[cell] == name) for name in splits},
        "cameras": {str(c): {"ids": len(some), "images": sum(some)} for c, some in by_camera.items()},
    }


def _draw_sysu_cell(root: Path, spec: RenderSysu, pid: int, camid: int, camera: Camera, count: int) -> None:
    who = _identity(spec.seed, _SYSU, pid, spec.near_infrared_follows)
    spectrum: Spectrum = "near_infrared" if camid in _INFRARED_CAMERAS else "visible"
    folder = root / f"cam{camid}" / f"{pid:04d}"
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        rng = _rng(spec.seed, _SYSU, _IMAGE, pid, camid, number)
        _save_crop(folder / f"{number:04d}.jpg", who, camera, spec.height, rng, spectrum)


def _write_sysu_lists(root: Path, seed: int, splits: dict[str, list[int]], sizes: dict[tuple[int, int], int]) -> None:
    """`exp/*` and the random galleries: cell [camera, 0][id - 1, 0] holds uint8 (10, m) permutations of 1..m."""
    (root / "exp").mkdir()
    for name, pids in (splits | {"available": sorted(sum(splits.values(), []))}).items():
        (root / "exp" / f"{name}_id.txt").write_text(",".join(map(str, pids)), encoding="ascii", newline="\n")
        _save_matlab(root / "exp" / f"{name}_id.mat", {"id": np.asarray(pids, np.float64).reshape(1, -1)})
    galleries = np.empty((6, 1), object)
    for camid in range(1, 7):
        last = max((pid for pid, camera in sizes if camera == camid), default=0)
        cell = np.empty((last, 1), object)
        for pid in range(1, last + 1):
            size = sizes.get((pid, camid), 0)
            rng = _rng(seed, _SYSU, _LAYOUT, pid, camid)
            rows = [rng.permutation(size) + 1 for _ in range(TRIALS)]
            cell[pid - 1, 0] = np.asarray(rows, np.uint8).reshape(TRIALS, size)
        galleries[camid - 1, 0] = cell
    _save_matlab(root / "rand_perm_cam.mat", {"rand_perm_cam": galleries})


def _save_matlab(path: Path, values: dict[str, np.ndarray]) -> None:
    """Write a MATLAB v5 file; its header's time stamp is replaced, so that equal values give equal bytes."""
    import scipy.io  # here: the processes that draw do without

    stream = io.BytesIO()
    scipy.io.savemat(stream, values)
    header = b"MATLAB 5.0 MAT-file, rendered"
    path.write_bytes(header.ljust(116) + stream.getvalue()[116:])


# RegDB's layout


def _plan_regdb(root: Path, spec: RenderRegdb) -> tuple[list[Job], dict[str, Any]]:
    jobs = [(_draw_regdb_identity, root, spec.seed, pid, spec.images) for pid in range(1, spec.ids + 1)]
    names = {pid: [_regdb_moment(spec.seed, pid, k)[0] for k in range(spec.images)] for pid in range(1, spec.ids + 1)}
    (root / "idx").mkdir()
    half = spec.ids // 2
    for trial in range(1, TRIALS + 1):
        order = (_rng(spec.seed, _REGDB, _LAYOUT, trial).permutation(spec.ids) + 1).tolist()
        for split, pids in (("train", order[:half]), ("test", order[half:])):
            for modality, letter in (("Visible", "v"), ("Thermal", "t")):
                lines = [
                    f"{modality}/{pid}/{name.format(letter)} {label}\n"
                    for label, pid in enumerate(pids)
                    for name in names[pid]
                ]
                path = root / "idx" / f"{split}_{modality.lower()}_{trial}.txt"
                path.write_text("".join(lines), encoding="ascii", newline="\n")
    total = spec.ids * spec.images
    return jobs, {
        "ids": spec.ids,
        "images": {"visible": total, "thermal": total},
        "trials": TRIALS,
        "split": {"train": half, "test": spec.ids - half},
    }


def _regdb_moment(seed: int, pid: int, k: int) -> tuple[str, Nuisance, np.random.Generator]:
    """File name (with a gap for the modality's letter) and circumstances of one moment of an identity's track."""
    track = _rng(seed, _REGDB, _IMAGE, pid)
    who = _identity(seed, _REGDB, pid)
    # where somebody was recorded says nothing about who it was: four places, drawn anew for each moment
    base = float(track.uniform(-math.pi, math.pi))
    start, step = int(track.integers(200, 9000)), int(track.integers(4, 30))
    rng = _rng(seed, _REGDB, _IMAGE, pid, k)
    place = int(_rng(seed, _REGDB, _SCENES).integers(2**31)) + int(rng.integers(4))
    camera = Camera(
        "street" if place % 2 else "gate", place, 3.0, gain=1.0, contrast=1.0, noise=0.014, blur=0.6, outdoor=True
    )
    turned = math.pi if rng.random() < 0.35 else 0.0  # people are also seen walking back
    yaw = math.remainder(base + turned + float(rng.normal(0, 0.45)), 2 * math.pi)
    nuisance = sample_nuisance(rng, camera, 128, 64, yaw)
    sex, side = "male" if who.body.male else "female", "front" if abs(yaw) < math.pi / 2 else "back"
    name = f"{sex}_{side}_{{}}_{start + k * step:05d}_{pid}.bmp"
    return name, nuisance, rng


def _draw_regdb_identity(root: Path, seed: int, pid: int, count: int) -> None:
    who = _identity(seed, _REGDB, pid)
    visible, thermal = root / "Visible" / str(pid), root / "Thermal" / str(pid)
    visible.mkdir(parents=True)
    thermal.mkdir(parents=True)
    for k in range(count):
        name, nuisance, rng = _regdb_moment(seed, pid, k)
        Image.fromarray(draw(who, nuisance, "visible")).save(visible / name.format("v"))
        # the thermal camera stands beside the visible one: the same moment, a little displaced, its own noise
        other = dataclasses.replace(
            nuisance,
            shift_x=nuisance.shift_x + float(rng.normal(0.01, 0.012)),
            shift_y=nuisance.shift_y + float(rng.normal(0, 0.006)),
            gain=float(np.exp(rng.normal(0, 0.1))),
            grain=int(rng.integers(2**32)),
        )
        Image.fromarray(draw(who, other, "thermal")).save(thermal / name.format("t"))


# pretraining


def _plan_pretraining(root: Path, spec: RenderPretraining) -> tuple[list[Job], dict[str, Any]]:
    pids = range(1, spec.ids + 1)
    jobs = [(_draw_pretraining_identity, root, spec.seed, spec.height, pid, spec.images) for pid in pids]
    return jobs, {"ids": spec.ids, "images": spec.ids * spec.images}


def _draw_pretraining_identity(root: Path, seed: int, height: int, pid: int, count: int) -> None:
    who = _identity(seed, _PRETRAINING, pid)
    folder = root / f"{pid:04d}"
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        rng = _rng(seed, _PRETRAINING, _IMAGE, pid, number)
        camera = sample_camera(_rng(seed, _PRETRAINING, _SCENES, int(rng.integers(24))))
        _save_crop(folder / f"{number:04d}.jpg", who, camera, height, rng, "visible")


_KINDS: dict[str, tuple[type[_Spec], Callable[..., tuple[list[Job], dict[str, Any]]]]] = {
    "sysu_mm01": (RenderSysu, _plan_sysu),
    "regdb": (RenderRegdb, _plan_regdb),
    "pretraining": (RenderPretraining, _plan_pretraining),
}
