"""The rendered trees: layout, determinism, and that nothing but shape, reflectance and warmth crosses the spectra."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from danet_study.files import StudyError
from data_prep.render import synthetic
from data_prep.render.pedestrian import Camera, draw, sample_nuisance
from data_prep.render.people import (
    BAGS,
    BOTTOMS,
    HAIRS,
    SHOES,
    TEXTURES,
    TOPS,
    sample_identity,
)
from data_prep.render.scenery import KINDS

ROOT = Path(__file__).resolve().parents[1]
SYSU = {
    **{"seed": 5, "train_ids": 5, "val_ids": 3, "test_ids": 6, "images": {"train": 2, "val": 3, "test": 2}},
    **{"absent": 0.15, "near_infrared_follows": 0.6, "height": 64},
}
REGDB = {"seed": 5, "ids": 5, "images": 10}
PRETRAINING = {"seed": 5, "ids": 3, "images": 2, "height": 64}
INFRARED = (3, 6)


@pytest.fixture(scope="module")
def sysu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sysu") / "tree"
    synthetic.render(root, "sysu_mm01", SYSU, workers=1)
    return root


@pytest.fixture(scope="module")
def regdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("regdb") / "tree"
    synthetic.render(root, "regdb", REGDB, workers=1)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def split_ids(root: Path, split: str) -> list[int]:
    return [int(word) for word in (root / "exp" / f"{split}_id.txt").read_text().split(",")]


def cells(root: Path) -> dict[tuple[int, int], int]:
    """Number of images of each (pid, camid) that has some."""
    found: dict[tuple[int, int], int] = {}
    for path in root.glob("cam*/*/*.jpg"):
        key = int(path.parent.name), int(path.parent.parent.name.removeprefix("cam"))
        found[key] = found.get(key, 0) + 1
    return found


# determinism


def test_one_and_three_workers_write_the_same_bytes(sysu: Path, tmp_path: Path) -> None:
    synthetic.render(tmp_path / "tree", "sysu_mm01", SYSU, workers=3)
    assert contents(tmp_path / "tree") == contents(sysu)


def test_another_seed_gives_other_people(sysu: Path, tmp_path: Path) -> None:
    other = {**SYSU, "seed": 6}
    record = synthetic.render(tmp_path / "tree", "sysu_mm01", other, workers=1)
    assert record["content_sha256"] != json.loads((sysu / "render.json").read_text())["content_sha256"]
    same = set(contents(tmp_path / "tree").values()) & set(contents(sysu).values())
    assert not [data for data in same if data.startswith(b"\xff\xd8")]  # not a single JPEG


def test_a_finished_tree_is_left_as_it_is(tmp_path: Path) -> None:
    first = synthetic.render(tmp_path / "tree", "pretraining", PRETRAINING, workers=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tree").rglob("*")}
    assert synthetic.render(tmp_path / "tree", "pretraining", PRETRAINING, workers=1) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tree").rglob("*")} == before


def test_a_tree_of_another_spec_or_with_a_file_missing_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    first = synthetic.render(root, "pretraining", PRETRAINING, workers=1)
    smaller = {**PRETRAINING, "ids": 2}
    assert synthetic.render(root, "pretraining", smaller, workers=1)["counts"]["ids"] == 2
    assert sorted(p.name for p in root.iterdir()) == ["0001", "0002", "render.json"]
    synthetic.render(root, "pretraining", PRETRAINING, workers=1)
    (root / "0002" / "0001.jpg").unlink()
    assert synthetic.render(root, "pretraining", PRETRAINING, workers=1) == first
    assert (root / "0002" / "0001.jpg").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tree.lock", "tree"]


def test_a_folder_that_was_not_rendered_here_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "cam1").mkdir()
    (tmp_path / "cam1" / "precious.jpg").write_bytes(b"licensed")
    with pytest.raises(StudyError, match="render.json"):
        synthetic.render(tmp_path, "sysu_mm01", SYSU, workers=1)
    assert (tmp_path / "cam1" / "precious.jpg").read_bytes() == b"licensed"


def test_the_record_hashes_the_files_and_counts_them(sysu: Path) -> None:
    record = json.loads((sysu / "render.json").read_text())
    files = contents(sysu)
    del files["render.json"]
    assert record["counts"]["files"] == len(files)
    assert sum(record["counts"]["images"].values()) == sum(name.endswith(".jpg") for name in files)
    assert record["spec"]["images"] == {"train": 2, "val": 3, "test": 2}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_rendering_leaves_no_tree_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    script = tmp_path / "kill_me.py"
    script.write_text(
        "from pathlib import Path\nfrom data_prep.render.synthetic import render\n"
        "if __name__ == '__main__':\n"
        "    spec = {'seed': 1, 'ids': 400, 'images': 20, 'height': 64}\n"
        "    render(Path('out') / 'tree', 'pretraining', spec, workers=2)\n"
    )
    victim = subprocess.Popen(
        [sys.executable, script.name], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not any((tmp_path).glob("out/.tree.partial/*/*.jpg")):
            assert victim.poll() is None, "the rendering ended before it could be killed"
            assert time.monotonic() < deadline, "the rendering never began"
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)  # the parent alone: its workers have to notice
        victim.wait()
        assert not (tmp_path / "out" / "tree").exists()
        while _group_lives(victim.pid):
            assert time.monotonic() < deadline, "workers outlived the process that started them"
            time.sleep(0.05)
        synthetic.render(tmp_path / "out" / "tree", "pretraining", PRETRAINING, workers=1)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".tree.lock", "tree"]
    finally:
        if _group_lives(victim.pid):
            os.killpg(victim.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    """Whether a process of this group still runs; zombies, which a container may never reap, do not count."""
    if not Path("/proc").is_dir():
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


# SYSU-MM01's layout


def test_splits_are_disjoint_and_together_available(sysu: Path) -> None:
    ids = {split: split_ids(sysu, split) for split in ("train", "val", "test", "available")}
    assert [len(ids[s]) for s in ("train", "val", "test")] == [5, 3, 6]
    assert all(values == sorted(set(values)) for values in ids.values())
    assert not any(set(ids[a]) & set(ids[b]) for a, b in itertools.combinations(("train", "val", "test"), 2))
    assert ids["available"] == sorted(ids["train"] + ids["val"] + ids["test"])
    assert {pid for pid, _ in cells(sysu)} == set(ids["available"])
    for split, values in ids.items():
        assert re.fullmatch(r"\d+(,\d+)*", (sysu / "exp" / f"{split}_id.txt").read_text())
        assert scipy.io.loadmat(sysu / "exp" / f"{split}_id.mat")["id"].ravel().tolist() == values


def test_splits_are_not_ranges_of_ids(sysu: Path) -> None:
    order = sorted((pid, split) for split in ("train", "val", "test") for pid in split_ids(sysu, split))
    assert len(list(itertools.groupby(split for _, split in order))) > 3


def test_validation_identities_appear_in_cameras_3_4_5_only(sysu: Path) -> None:
    found = {camid for pid, camid in cells(sysu) if pid in split_ids(sysu, "val")}
    assert found == {3, 4, 5}


def test_every_identity_has_both_modalities_and_some_test_identity_misses_both_indoor_cameras(sysu: Path) -> None:
    found = cells(sysu)
    for pid in split_ids(sysu, "available"):
        cameras = {camid for p, camid in found if p == pid}
        assert cameras & set(INFRARED) and cameras - set(INFRARED)
    assert any(not {(pid, 1), (pid, 2)} & set(found) for pid in split_ids(sysu, "test"))
    assert 11 * 6 + 3 * 3 - len(found) == round(0.15 * (11 * 6 + 3 * 3))  # the share of absent cells


def test_no_cell_is_absent_when_none_should_be(tmp_path: Path) -> None:
    spec = {**SYSU, "absent": 0.0, "images": {"train": 1, "val": 1, "test": 1}}
    _, found = synthetic._sysu_cells(synthetic.RenderSysu(**spec))
    assert len(found) == 11 * 6 + 3 * 3


def test_random_galleries_are_permutations_of_the_images_that_exist(sysu: Path) -> None:
    galleries = scipy.io.loadmat(sysu / "rand_perm_cam.mat")["rand_perm_cam"]
    assert galleries.dtype == object and galleries.shape == (6, 1)
    found = cells(sysu)
    for camid in range(1, 7):
        per_id = galleries[camid - 1, 0]
        assert per_id.dtype == object and per_id.shape[1] == 1
        assert {pid for pid, c in found if c == camid} <= set(range(1, len(per_id) + 1))
        for pid in range(1, len(per_id) + 1):
            rows, size = per_id[pid - 1, 0], found.get((pid, camid), 0)
            assert rows.shape == (10, size)
            if size:
                assert rows.dtype == np.uint8
                assert (np.sort(rows, axis=1) == np.arange(1, size + 1)).all()


def test_images_are_numbered_from_one_and_vary_in_size(sysu: Path) -> None:
    sizes = set()
    for (pid, camid), count in cells(sysu).items():
        for number in range(1, count + 1):
            with Image.open(sysu / f"cam{camid}" / f"{pid:04d}" / f"{number:04d}.jpg") as image:
                assert image.format == "JPEG"
                sizes.add(image.size)
    assert len(sizes) > 10


def test_near_infrared_images_are_grey_and_visible_ones_are_not(sysu: Path) -> None:
    for path in sysu.glob("cam*/*/0001.jpg"):
        pixels = np.asarray(Image.open(path).convert("RGB"), np.int16)
        spread = np.abs(pixels - pixels[..., :1]).max()
        assert (spread == 0) == (path.parent.parent.name in ("cam3", "cam6")), path


# RegDB's layout


def test_regdb_bitmaps_have_the_size_of_the_originals(regdb: Path) -> None:
    for modality in ("Visible", "Thermal"):
        files = list((regdb / modality).glob("*/*.bmp"))
        assert len(files) == 50
        assert {p.stat().st_size for p in files} == {24_630}
        with Image.open(files[0]) as image:
            assert image.size == (64, 128)


def test_regdb_thermal_images_are_grey(regdb: Path) -> None:
    for path in (regdb / "Thermal").glob("*/*.bmp"):
        pixels = np.asarray(Image.open(path))
        assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("trial", [1, 10])
def test_index_lines_pair_the_modalities_and_halve_the_identities(regdb: Path, trial: int) -> None:
    halves = {}
    for split in ("train", "test"):
        visible, thermal = (
            (regdb / "idx" / f"{split}_{m}_{trial}.txt").read_bytes().decode().split("\n")
            for m in ("visible", "thermal")
        )
        assert visible.pop() == thermal.pop() == ""
        labels = [int(line.split()[1]) for line in visible]
        assert labels == [k // 10 for k in range(len(labels))]
        pids = []
        for v, t in zip(visible, thermal, strict=True):
            assert re.fullmatch(r"Visible/(\d+)/(male|female)_(front|back)_v_\d{5}_\1\.bmp \d+", v)
            assert t == v.replace("Visible", "Thermal").replace("_v_", "_t_")
            assert (regdb / v.split()[0]).is_file() and (regdb / t.split()[0]).is_file()
            pids.append(int(v.split("/")[1]))
        assert len(set(visible)) == len(visible)
        assert all(len(set(pids[k : k + 10])) == 1 for k in range(0, len(pids), 10))
        halves[split] = set(pids)
    assert not halves["train"] & halves["test"]
    assert halves["train"] | halves["test"] == set(range(1, 6))


def test_the_ten_trials_differ(regdb: Path) -> None:
    assert len({(regdb / "idx" / f"train_visible_{t}.txt").read_bytes() for t in range(1, 11)}) > 1
    assert len(list((regdb / "idx").iterdir())) == 40


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("regdb", {"seed": 1, "ids": 4, "images": 4}),
        ("regdb", {"seed": 1, "ids": 4}),
        ("regdb", {"seed": 1, "ids": 4, "images": 10, "hight": 3}),
        ("sysu_mm01", {**SYSU, "images": {"train": 2, "val": 3, "test": 256}}),
        ("sysu_mm01", {**SYSU, "absent": 1.0}),
        ("my_package.read", SYSU),
    ],
)
def test_values_that_cannot_be_rendered_are_refused(tmp_path: Path, layout: str, spec: dict) -> None:
    with pytest.raises(StudyError):
        synthetic.render(tmp_path / "tree", layout, spec, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_two_data_sets_with_one_seed_show_different_people() -> None:
    people = [synthetic._identity(7, space, pid) for space in (1, 2, 3) for pid in range(1, 30)]
    assert len({person.body for person in people}) == len(people)


# drawing


def someone(seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    camera = Camera(KINDS[seed % len(KINDS)], 3, 2.6, outdoor=bool(seed % 2))
    return sample_identity(rng), sample_nuisance(rng, camera, 96, 48)


@pytest.mark.parametrize("seed", range(6))
def test_infrared_images_do_not_depend_on_colour_nor_visible_ones_on_heat(seed: int) -> None:
    who, nuisance = someone(seed)
    other, _ = someone(seed + 100)
    recoloured = dataclasses.replace(who, colours=other.colours)
    assert (draw(who, nuisance, "thermal") == draw(recoloured, nuisance, "thermal")).all()
    assert (draw(who, nuisance, "near_infrared") == draw(recoloured, nuisance, "near_infrared")).all()
    assert (draw(who, nuisance, "visible") != draw(recoloured, nuisance, "visible")).any()
    reheated = dataclasses.replace(who, warmth=other.warmth, reflectance=other.reflectance)
    assert (draw(who, nuisance, "visible") == draw(reheated, nuisance, "visible")).all()
    assert (draw(who, nuisance, "thermal") != draw(reheated, nuisance, "thermal")).any()


@pytest.mark.parametrize("seed", range(4))
def test_drawing_twice_gives_the_same_pixels_whatever_was_drawn_between(seed: int) -> None:
    who, nuisance = someone(seed)
    first = draw(who, nuisance, "visible")
    draw(*someone(seed + 50), "near_infrared")
    assert (draw(who, nuisance, "visible") == first).all()
    assert first.shape == (96, 48, 3) and first.dtype == np.uint8


def test_reflectance_follows_brightness_in_part_and_no_hue() -> None:
    people = [sample_identity(np.random.default_rng(k), 0.6) for k in range(400)]
    colours, reflectance = np.array([p.colours[3] for p in people]), np.array([p.reflectance[3] for p in people])
    brightness, hue = colours @ (0.299, 0.587, 0.114), colours[:, 0] - colours[:, 2]
    assert 0.4 < np.corrcoef(brightness, reflectance)[0, 1] < 0.95
    rest = reflectance - np.polyval(np.polyfit(brightness, reflectance, 1), brightness)
    assert abs(np.corrcoef(hue, rest)[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("field", "names"),
    [("top", TOPS), ("bottom", BOTTOMS), ("hair", HAIRS), ("shoes", SHOES), ("bag", BAGS)],
)
def test_every_cut_can_be_told_from_every_other_in_thermal(field: str, names: tuple[str, ...]) -> None:
    """In some of eight views: a body may hide a bag. A dress differs from a long skirt in its cloth, not its cut."""
    names = tuple(name for name in names if name != "dress")
    who, nuisance = someone(2)
    plain = dataclasses.replace(who.outfit, top="tshirt", bottom="slim", hair="short", shoes="shoes", bag="none")
    views = [dataclasses.replace(nuisance, yaw=k * np.pi / 4, occluder="none", height=128, width=64) for k in range(8)]
    pictures = {}
    for name in names:
        outfit = dataclasses.replace(plain, **{field: name}, skirt=0.36 if name == "skirt_short" else 0.2)
        person = dataclasses.replace(who, outfit=outfit)
        pictures[name] = np.stack([draw(person, view, "thermal") for view in views]).astype(int)
    for one, other in itertools.combinations(names, 2):
        assert np.abs(pictures[one] - pictures[other]).max() >= 8, (one, other)


def test_every_texture_is_drawn_differently_in_near_infrared() -> None:
    who, nuisance = someone(3)
    nuisance = dataclasses.replace(nuisance, yaw=0.2, occluder="none", height=128, width=64)
    outfit = dataclasses.replace(who.outfit, top="tshirt", stripes=2, bag="none")
    pictures = {
        draw(
            dataclasses.replace(who, outfit=dataclasses.replace(outfit, texture=texture)), nuisance, "near_infrared"
        ).tobytes()
        for texture in TEXTURES
    }
    assert len(pictures) == len(TEXTURES)


def test_a_person_stands_out_as_warm_in_thermal() -> None:
    for seed in range(5):
        who, nuisance = someone(seed)
        nuisance = dataclasses.replace(nuisance, occluder="none", shift_x=0.0, shift_y=0.0)
        pixels = draw(who, nuisance, "thermal")[..., 0].astype(float)
        assert pixels[20:60, 20:28].mean() > 1.2 * pixels[20:60, :6].mean()


def test_an_unknown_spectrum_is_refused() -> None:
    with pytest.raises(ValueError, match="infrared"):
        draw(*someone(0), "x-ray")
