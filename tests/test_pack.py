"""data_prep.pack, data_prep.images and the command line: from a raw tree to a packed store, whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import trees
from PIL import Image

from danet_core.config import load_study
from danet_core.files import StudyError, exclusive
from danet_core.store import PackedStore, lock_path, partial_path
from data_prep import __main__ as cli
from data_prep import images, synthetic
from data_prep.images import Job, decode, load_rgb, run_jobs
from data_prep.pack import check_images, pack
from data_prep.prepare import FOLDERS, Folders, prepare, read
from tests.fixtures.faults import small_disk

PROJECT = Path(__file__).parents[1]
PLAN = trees.small_sysu_plan()
COUNTS = trees.counts_of_sysu(PLAN)
REGDB = trees.RegdbPlan(ids=8, images=2)
H, W = 24, 16


@dataclasses.dataclass(frozen=True)
class Set:
    """The attributes of danet_core.config.Dataset that preparing and packing use."""

    name: str
    layout: str
    root: Path
    synthetic: bool = False
    render: object = None
    title: str = "A tiny set"
    train_splits: tuple[str, ...] = ("train",)
    allow_partial: bool = False
    image: SimpleNamespace = dataclasses.field(default_factory=lambda: SimpleNamespace(height=H, width=W))

    def raw_root(self) -> Path:
        return self.root


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "prepared", tmp_path / "packed")


@pytest.fixture
def sysu(tmp_path: Path, folders: Folders) -> Set:
    """A prepared small set in SYSU-MM01's layout."""
    dataset = Set("tiny", "sysu", trees.write_sysu(tmp_path / "raw", PLAN))
    prepare(dataset, expected=COUNTS, folders=folders)
    return dataset


def pack_here(dataset: Set, folders: Folders, chunk: int | None = 7) -> dict:
    return pack(dataset, workers=1, folders=folders, chunk=chunk)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- preparing


def test_preparing_writes_manifest_galleries_and_inventory_and_nothing_else(sysu: Set, folders: Folders) -> None:
    assert names(folders.prepared) == ["tiny"]
    assert names(folders.prepared / "tiny") == ["galleries.npz", "inventory.json", "manifest.csv"]
    assert b"\r" not in (folders.prepared / "tiny" / "manifest.csv").read_bytes()
    inventory = json.loads((folders.prepared / "tiny" / "inventory.json").read_text())
    assert inventory.keys() == {"dataset", "layout", "synthetic", "partial", "counts", "skipped", "warnings"}
    assert (inventory["dataset"], inventory["partial"]) == ("tiny", False)
    assert str(sysu.root) not in (folders.prepared / "tiny" / "inventory.json").read_text()


def test_preparing_again_gives_the_same_bytes(sysu: Set, folders: Folders) -> None:
    before = content(folders.prepared / "tiny")
    prepare(sysu, expected=COUNTS, folders=folders)
    assert content(folders.prepared / "tiny") == before
    assert names(folders.prepared) == ["tiny"]


def test_a_failed_preparation_leaves_the_older_one(sysu: Set, folders: Folders) -> None:
    before = content(folders.prepared / "tiny")
    shutil.rmtree(sysu.root / "cam1")
    with pytest.raises(StudyError, match="cam 1"):
        prepare(sysu, expected=COUNTS, folders=folders)
    assert content(folders.prepared / "tiny") == before
    assert names(folders.prepared) == ["tiny"]


def test_what_a_killed_preparation_left_behind_is_removed(sysu: Set, folders: Folders) -> None:
    before = content(folders.prepared / "tiny")
    left = folders.prepared / ".tiny.partial"
    left.mkdir()
    (left / "manifest.csv").write_text("row,pa")
    prepare(sysu, expected=COUNTS, folders=folders)
    assert content(folders.prepared / "tiny") == before
    assert names(folders.prepared) == ["tiny"]


def test_a_subset_on_purpose_is_marked_in_inventory_and_store(sysu: Set, folders: Folders) -> None:
    shutil.rmtree(sysu.root / "cam5")
    prepare(sysu, expected=COUNTS, folders=folders, allow_partial=True)
    inventory = json.loads((folders.prepared / "tiny" / "inventory.json").read_text())
    assert inventory["partial"]
    assert any(warning.startswith("partial:") for warning in inventory["warnings"])
    assert pack_here(sysu, folders)["partial"]


def test_a_subset_allowed_in_params_is_as_one_allowed_on_the_command_line(sysu: Set, folders: Folders) -> None:
    shutil.rmtree(sysu.root / "cam5")
    with pytest.raises(StudyError, match="cam 5"):
        prepare(sysu, expected=COUNTS, folders=folders)
    prepare(sysu, expected=COUNTS, folders=folders, allow_partial=True)
    by_flag = content(folders.prepared / "tiny")
    prepare(dataclasses.replace(sysu, allow_partial=True), expected=COUNTS, folders=folders)
    assert content(folders.prepared / "tiny") == by_flag
    assert pack_here(sysu, folders)["partial"]


def test_permission_for_a_subset_does_not_mark_a_complete_set(sysu: Set, folders: Folders) -> None:
    prepare(sysu, expected=COUNTS, folders=folders, allow_partial=True)
    assert not json.loads((folders.prepared / "tiny" / "inventory.json").read_text())["partial"]


@pytest.mark.parametrize("layout", ["sysu", "regdb"])
def test_the_published_counts_hold_for_the_real_sets_only(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "raw"
    if layout == "sysu":
        trees.write_sysu(root, PLAN)
    else:
        trees.write_regdb(root, REGDB)
    assert read(Set("x", layout, root)).failed()
    assert not read(Set("x", layout, root, synthetic=True)).failed()


def test_an_embedded_set_is_rendered_first_and_compared_with_its_record(
    tmp_path: Path, folders: Folders, monkeypatch
) -> None:
    dataset = Set("embedded", "regdb", tmp_path / "raw", synthetic=True, render="the spec")
    counts = {"images": {"visible": 16, "thermal": 16}, "ids": 8}

    def render_regdb(root: Path, spec: str) -> None:
        assert spec == "the spec"
        trees.write_regdb(root, REGDB)
        (root / "render.json").write_text(json.dumps({"counts": counts}))

    monkeypatch.setattr(synthetic, "render_regdb", render_regdb)
    assert not prepare(dataset, folders=folders).failed()
    counts["images"]["thermal"] = 17
    (dataset.root / "render.json").write_text(json.dumps({"counts": counts}))
    with pytest.raises(StudyError, match=r"thermal images: expected 17, found 16; remove .*raw and prepare again"):
        read(dataset).settle(False, "")


# ---------------------------------------------------------------- packing


def test_a_pack_holds_every_image_as_pil_resizes_it(sysu: Set, folders: Folders) -> None:
    meta = pack_here(sysu, folders)
    store = PackedStore.open(folders.packed / "tiny")
    assert store.images.shape == (len(store.manifest), 3, H, W)
    for row, path in enumerate(store.manifest["path"]):
        with Image.open(sysu.root / path) as image:
            expected = np.asarray(image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(store.images[row].transpose(1, 2, 0), expected)
    assert meta == store.meta
    assert {k: meta[k] for k in ("dataset", "layout", "synthetic", "partial", "interpolation")} == {
        "dataset": "tiny", "layout": "sysu", "synthetic": False, "partial": False, "interpolation": "bilinear"
    }  # fmt: skip
    prepared = folders.prepared / "tiny"
    assert (folders.packed / "tiny" / "manifest.csv").read_bytes() == (prepared / "manifest.csv").read_bytes()
    assert (folders.packed / "tiny" / "galleries.npz").read_bytes() == (prepared / "galleries.npz").read_bytes()


def test_resizing_is_what_torchvision_does_to_a_pil_image(tmp_path: Path) -> None:
    from torchvision.transforms import functional

    noise = np.random.default_rng(0).integers(0, 256, (117, 41, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    expected = np.asarray(functional.resize(Image.fromarray(noise), [96, 48]))
    np.testing.assert_array_equal(decode(tmp_path / "noise.png", 96, 48).transpose(1, 2, 0), expected)


def test_the_result_does_not_depend_on_processes_or_chunks(sysu: Set, folders: Folders) -> None:
    pack_here(sysu, folders)
    expected = content(folders.packed / "tiny")
    pack(sysu, workers=2, folders=folders, chunk=5)
    assert content(folders.packed / "tiny") == expected
    pack_here(sysu, folders, chunk=None)
    assert content(folders.packed / "tiny") == expected


def test_regdb_packs_without_galleries(tmp_path: Path, folders: Folders) -> None:
    dataset = Set("tiny", "regdb", trees.write_regdb(tmp_path / "raw", REGDB))
    prepare(dataset, expected=trees.counts_of_regdb(REGDB), folders=folders)
    pack_here(dataset, folders)
    store = PackedStore.open(folders.packed / "tiny")
    assert store.galleries == {}
    assert len(store.rows("train", 10)) == len(store.rows("test", 10)) == 16
    assert names(store.root) == ["images.npy", "manifest.csv", "meta.json"]


def test_a_set_that_is_not_prepared_is_refused(tmp_path: Path, folders: Folders) -> None:
    with pytest.raises(StudyError, match=r"prepared/tiny is missing; .*python -m data_prep prepare tiny"):
        pack_here(Set("tiny", "sysu", tmp_path), folders)


def test_a_truncated_image_is_named_and_the_finished_images_are_kept(sysu: Set, folders: Folders, monkeypatch) -> None:
    path = sysu.root / "cam6" / "0010" / "0004.jpg"  # last in the manifest
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StudyError, match=r"cam6/0010/0004\.jpg \(\d+ bytes\) cannot be decoded \(.*copy it again"):
        pack_here(sysu, folders)
    assert names(folders.packed) == ["tiny.partial"]
    path.write_bytes(whole)
    decoded = []
    monkeypatch.setattr(images, "decode", lambda p, h, w: decoded.append(p) or decode(p, h, w))
    meta = pack_here(sysu, folders)
    assert decoded[-1] == path
    assert len(decoded) <= 7 < meta["n"]
    assert names(folders.packed) == ["tiny"]
    PackedStore.open(folders.packed / "tiny")


def test_an_image_replaced_after_an_interruption_is_decoded_again(sysu: Set, folders: Folders) -> None:
    last, first = sysu.root / "cam6" / "0010" / "0004.jpg", sysu.root / "cam1" / "0001" / "0001.jpg"
    whole = last.read_bytes()
    last.write_bytes(whole[:-60])
    with pytest.raises(StudyError):
        pack_here(sysu, folders)
    last.write_bytes(whole)
    first.write_bytes(trees.jpeg((1, 2, 250), (9, 31)))
    pack_here(sysu, folders)
    np.testing.assert_array_equal(PackedStore.open(folders.packed / "tiny").images[0], decode(first, H, W))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_resumes_with_the_same_bytes_and_leaves_no_process(
    tmp_path: Path, folders: Folders, sysu: Set, workers: int
) -> None:
    """The last image is a named pipe without a writer: the pack waits there for ever, and is killed with SIGKILL."""
    pack_here(sysu, folders)
    expected = content(folders.packed / "tiny")
    shutil.rmtree(folders.packed)
    last = sysu.root / "cam6" / "0010" / "0004.jpg"
    whole, times = last.read_bytes(), last.stat()
    last.unlink()
    os.mkfifo(last)
    script = tmp_path / "killed.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    from pathlib import Path; from data_prep.pack import pack; from data_prep.prepare import Folders; from "
        "test_pack import Set\n"
        f"    dataset = Set('tiny', 'sysu', Path({str(sysu.root)!r}))\n"
        f"    folders = Folders(Path({str(folders.prepared)!r}), Path({str(folders.packed)!r}))\n"
        f"    pack(dataset, workers={workers}, folders=folders, chunk=7)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}
    log = tmp_path / "stderr"
    with log.open("wb") as stream:  # no pipe: the waiting worker would keep it open
        process = subprocess.Popen([sys.executable, script], env=environment, stderr=stream)
    n_chunks = -(-(len(expected["manifest.csv"].splitlines()) - 1) // 7)
    journal = partial_path(folders.packed / "tiny") / "journal.jsonl"
    deadline = time.monotonic() + 60
    while (
        not journal.exists() or len(journal.read_bytes().splitlines()) < n_chunks
    ):  # header and all chunks but the last
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(StudyError, match="the pack of tiny is being made by another process"):
        pack_here(sysu, folders)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):  # let go the worker that waits at the pipe; nobody waits with one worker
        os.close(os.open(last, os.O_WRONLY | os.O_NONBLOCK))
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert names(folders.packed) == ["tiny.partial"]
    with pytest.raises(StudyError, match="a pack was begun and not finished"):
        PackedStore.open(folders.packed / "tiny")

    last.unlink()
    last.write_bytes(whole)
    os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
    pack_here(sysu, folders)
    assert content(folders.packed / "tiny") == expected
    assert names(folders.packed) == ["tiny"]


def test_two_packs_of_one_set_at_once_are_refused(sysu: Set, folders: Folders) -> None:
    with (
        exclusive(lock_path(folders.packed / "tiny"), "the pack of tiny"),
        pytest.raises(StudyError, match="being made by another process"),
    ):
        pack_here(sysu, folders)
    pack_here(sysu, folders)


def test_a_disk_that_fills_up_while_packing_is_an_error_that_keeps_what_is_finished(
    sysu: Set, folders: Folders, monkeypatch
) -> None:
    write, written = images.write_block, []

    def fill(path: Path, offset: int, block: np.ndarray) -> str:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(offset)
        return write(path, offset, block)

    with monkeypatch.context() as patch:
        patch.setattr(images, "write_block", fill)
        with pytest.raises(StudyError, match=r"images\.npy cannot be written \(No space left on device\); make room"):
            pack_here(sysu, folders)
    assert names(folders.packed) == ["tiny.partial"]
    assert len((folders.packed / "tiny.partial" / "journal.jsonl").read_text().splitlines()) == 1 + 3
    pack_here(sysu, folders)
    PackedStore.open(folders.packed / "tiny")


@pytest.mark.skipif(os.name != "posix", reason="mounts a file system")
def test_a_really_full_disk_keeps_what_is_packed_and_the_store_under_its_name_stays_absent(
    sysu: Set, folders: Folders, monkeypatch
) -> None:
    with small_disk(folders.packed, "64k") as resize:
        with pytest.raises(StudyError, match=r"packing needs [\d,]+ bytes .* the disk has 65,536 free"):
            pack_here(sysu, folders)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))  # filled since it was asked
        with pytest.raises(StudyError, match=r"images\.npy cannot be written \(No space left on device\); make room"):
            pack_here(sysu, folders)
        assert names(folders.packed) == ["tiny.partial"]
        with pytest.raises(StudyError, match="a pack was begun and not finished"):
            PackedStore.open(folders.packed / "tiny")
        resize("16m")
        pack_here(sysu, folders)
        PackedStore.open(folders.packed / "tiny")


def test_a_limit_of_the_operating_system_on_the_file_s_size_is_an_error_in_one_sentence(
    sysu: Set, folders: Folders
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StudyError, match=r"packed/tiny cannot be written \(File too large\)"):
            pack_here(sysu, folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (folders.packed / "tiny").exists()
    pack_here(sysu, folders)


def test_a_worker_that_dies_is_an_error_and_takes_the_others_with_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        os.mkfifo(tmp_path / name)
    jobs = [Job(i, [tmp_path / name], None, None, 0) for i, name in enumerate("ab")]

    def kill_one_and_let_the_other_go() -> None:
        os.close(os.open(tmp_path / "a", os.O_WRONLY))  # returns once a worker reads it: its image is then empty
        writer = os.open(tmp_path / "b", os.O_WRONLY)  # a worker waits in it
        os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)
        os.close(writer)

    thread = threading.Thread(target=kill_one_and_let_the_other_go)
    thread.start()
    with (
        pytest.raises(StudyError, match=r"ended unexpectedly \(exit code -9\).*--workers 1"),
        contextlib.closing(run_jobs(jobs, 2)) as outcomes,
    ):
        list(outcomes)
    thread.join()
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------- images


def gradient(dtype: type, top: int) -> np.ndarray:
    return np.linspace(0, top, 64 * 32).round().astype(dtype).reshape(64, 32)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_converted_as_pil_converts_it(tmp_path: Path, mode: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8))
    image = rgb.convert("P").convert("PA") if mode == "PA" else rgb.convert(mode)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr", "PA") else "image.png")
    image.save(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    loaded = load_rgb(path)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), expected)


def test_a_cmyk_jpeg_of_white_is_white(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "white").convert("CMYK").save(tmp_path / "white.jpg")
    assert decode(tmp_path / "white.jpg", 8, 8).min() >= 250


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled_to_8_not_clipped(tmp_path: Path, suffix: str) -> None:
    """A 16-bit value 257 v is the 8-bit value v exactly; PIL's own conversion would make all above 255 white."""
    eight = gradient(np.uint8, 255)
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / f"deep{suffix}")
    loaded = np.asarray(load_rgb(tmp_path / f"deep{suffix}"))
    for channel in range(3):
        np.testing.assert_array_equal(loaded[..., channel], eight)
    sixteen = gradient(np.uint16, 65535)
    Image.fromarray(sixteen).save(tmp_path / f"deep{suffix}")
    expected = np.floor(sixteen.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / f"deep{suffix}"))[..., 0], expected)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(gradient(np.float32, 1)).save(tmp_path / "float.tif")
    with pytest.raises(StudyError, match=r"float\.tif .*floating-point pixels, expected 8 or 16 bits"):
        load_rgb(tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("suffix", "kept"), [(".jpg", 0.5), (".jpg", 0.9), (".bmp", 0.5), (".png", 0.7), (".jpg", 0.0)]
)
def test_a_truncated_file_is_refused_whatever_its_type(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 64, 3), dtype=np.uint8)).save(path)
    load_rgb(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(StudyError, match=rf"image\{suffix} \(\d+ bytes\) cannot be decoded"):
        load_rgb(path)


def test_an_image_that_is_gone_or_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"gone\.jpg is missing"):
        load_rgb(tmp_path / "gone.jpg")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(StudyError, match=r"page\.jpg \(16 bytes\) cannot be decoded"):
        load_rgb(tmp_path / "page.jpg")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_deep_check_names_every_image_that_fails_also_those_left_out_of_the_manifest(sysu: Set, workers: int) -> None:
    broken = ["cam1/0001/0001.jpg", "cam4/0009/0002.jpg", "cam6/0010/0004.jpg"]  # identity 9 is not available
    for name in broken:
        (sysu.root / name).write_bytes((sysu.root / name).read_bytes()[:-40])
    reading = read(sysu, expected=COUNTS)
    assert reading.problems == []
    check_images(reading, workers=workers)
    assert [name in problem for name, problem in zip(broken, reading.problems, strict=True)] == [True] * 3
    with pytest.raises(StudyError, match="cannot be decoded"):
        reading.settle(True, "")


# ---------------------------------------------------------------- command line


@pytest.fixture
def params(tmp_path: Path, monkeypatch) -> Path:
    """The study's params.yaml in a working directory of its own, without the user's data folders."""
    shutil.copy(PROJECT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SYSU_MM01_ROOT", raising=False)
    monkeypatch.delenv("REGDB_ROOT", raising=False)
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("name", "words"),
    [("sysu", ["data/raw/SYSU-MM01", "wuancong/SYSU-MM01", "cam1..cam6/", "SYSU_MM01_ROOT"]),
     ("regdb", ["data/raw/RegDB", "DBPerson-Recog-DB1", "Visible/{id}", "REGDB_ROOT"])],
)  # fmt: skip
@pytest.mark.parametrize("command", ["prepare", "verify"])
def test_an_absent_data_set_is_one_sentence_with_folder_licence_and_tree(params, capsys, command, name, words) -> None:
    assert cli.main([command, name]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not Path("data/prepared").joinpath(name).exists()


def test_the_environment_variable_names_the_folder(params: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("REGDB_ROOT", str(tmp_path / "elsewhere"))
    assert cli.main(["verify", "regdb"]) == 1
    assert str(tmp_path / "elsewhere") in capsys.readouterr().err


def test_regdb_at_full_size_goes_through_verify_and_prepare(params: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    root = trees.write_regdb(tmp_path / "RegDB", trees.RegdbPlan(412), linked=True)
    monkeypatch.setenv("REGDB_ROOT", str(root))
    assert cli.main(["verify", "regdb"]) == 0
    out = capsys.readouterr().out
    assert "verdict" in out and "WRONG" not in out and "70 of 70 checks passed" in out
    assert cli.main(["prepare", "regdb"]) == 0
    assert len(Path("data/prepared/regdb/manifest.csv").read_text().splitlines()) == 8241


def test_verify_prints_what_is_wrong_and_fails_and_prepare_refuses_until_told_it_is_a_subset(
    params: Path, tmp_path: Path, capsys
) -> None:
    root = trees.write_regdb(tmp_path / "small", trees.RegdbPlan(20), linked=True)
    arguments = ["verify", "regdb", "--root", str(root)]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "Visible: identities" in out and "412" in out and "WRONG" in out
    assert "Visible: images: expected 4,120, found 200; unpack" in err
    assert cli.main([*arguments, "--allow-partial", "--deep"]) == 0
    assert "partial" in capsys.readouterr().out
    rows = params.read_text(encoding="utf-8")
    params.write_text(rows.replace("allow_partial: false", "allow_partial: true"), encoding="utf-8")
    assert cli.main(arguments) == 0, "a subset allowed in params.yaml is allowed here too"
    params.write_text(rows, encoding="utf-8")
    capsys.readouterr()
    Path("data/raw").mkdir(parents=True)
    root.rename("data/raw/RegDB")
    assert cli.main(["prepare", "regdb"]) == 1
    told = capsys.readouterr().err
    assert "--allow-partial" in told and "`allow_partial: true` in params.yaml" in told
    assert cli.main(["prepare", "regdb", "--allow-partial"]) == 0
    assert cli.main(["pack", "regdb", "--workers", "1"]) == 0
    assert PackedStore.open("data/packed/regdb").meta["partial"]
    assert cli.main(["sheet", "regdb", "--out", "sheet.png"]) == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.height > 12 * 128
    assert cli.main(["sheet", "regdb", "--out", "sheet.txt"]) == 1


def test_unknown_names_and_wrong_usage_have_their_own_exit_status(params: Path, capsys) -> None:
    assert cli.main(["prepare", "market1501"]) == 1
    assert "market1501" in capsys.readouterr().err
    for arguments in ([], ["prepare"], ["pack", "sysu", "--workers", "0"], ["sheet", "sysu"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["pack", "sysu", "--workers", "0"])
    assert "--workers: expected a whole number of at least 1, found '0'" in capsys.readouterr().err


def test_rendered_images_never_pass_for_a_part_of_the_real_ones(params: Path, capsys) -> None:
    root = trees.write_regdb(Path("data/raw/RegDB"), trees.RegdbPlan(20), linked=True)
    (root / "render.json").write_text("{}")
    assert cli.main(["prepare", "regdb", "--allow-partial"]) == 1
    assert "data/raw/RegDB was rendered by this study" in capsys.readouterr().err
    assert not Path("data/prepared/regdb").exists()
    (root / "render.json").unlink()
    assert cli.main(["prepare", "regdb", "--allow-partial"]) == 0


def test_a_tree_that_is_not_there_is_not_called_switched_on_and_a_file_is_not_called_missing(
    params: Path, tmp_path: Path, capsys
) -> None:
    for dataset, variable in (("sysu", "SYSU_MM01_ROOT"), ("regdb", "REGDB_ROOT")):
        assert cli.main(["verify", dataset, "--root", str(tmp_path / "none")]) == 1
        told = capsys.readouterr().err
        assert f"images are not at {tmp_path / 'none'}: expected the tree" in told and variable in told
        assert "is switched on" not in told
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["verify", "synth_sysu", "--root", str(file)]) == 1
    assert f"{file} is no folder; render the tree" in capsys.readouterr().err


def test_preparing_packing_and_verifying_load_no_torch(params: Path, tmp_path: Path) -> None:
    trees.write_regdb(Path("data/raw/RegDB"), trees.RegdbPlan(20), linked=True)
    code = (
        "import sys; from data_prep.__main__ import main\n"
        "for command in (['prepare', 'regdb', '--allow-partial'], ['pack', 'regdb', '--workers', '1'],"
        " ['verify', 'regdb', '--allow-partial']):\n"
        "    assert main(command) == 0\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PROJECT)})


def test_the_configuration_has_every_attribute_the_tests_stand_in_for() -> None:
    for dataset in load_study(PROJECT / "params.yaml").datasets.values():
        for field in dataclasses.fields(Set):
            assert hasattr(dataset, field.name)
        assert isinstance(dataset.raw_root(), Path)
    assert Folders(Path("data/prepared"), Path("data/packed")) == FOLDERS
