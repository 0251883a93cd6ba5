"""data_prep: packing, weights and the command line."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torchvision.models import ResNet50_Weights

from danet_core.model import DANet
from danet_study.config import Dataset, load_study
from danet_study.files import StudyError, read_json
from danet_study.store import PackedStore, decode
from data_prep import index as indexing
from data_prep import weights
from data_prep.__main__ import main
from data_prep.pack import inspect_images, intensity_ranges, pack
from data_prep.parallel import parallel
from tests import trees

ROOT = Path(__file__).parents[1]
REGDB = trees.RegdbPlan(ids=4, images=2)


@pytest.fixture
def regdb(tmp_path: Path) -> Dataset:
    return trees.dataset("regdb", trees.write_regdb(tmp_path / "raw", REGDB))


def packed(dataset: Dataset, workers: int = 1) -> PackedStore:
    folder = dataset.root.parent
    indexing.prepare(dataset, prepared=folder / "prepared")
    pack(dataset, workers=workers, prepared=folder / "prepared", packed=folder / "packed")
    return PackedStore.open(folder / "packed" / dataset.name)


def nothing_packed(dataset: Dataset) -> bool:
    return [path.name for path in (dataset.root.parent / "packed").iterdir()] == [".mine.lock"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- packing


def test_a_store_holds_every_image_as_pillow_resizes_it(tmp_path: Path) -> None:
    root = trees.write_sysu(tmp_path / "raw", trees.small_sysu_plan())
    store = packed(trees.dataset("sysu_mm01", root))
    assert len(store.images) == len(store.manifest) == 162
    for row, path in enumerate(store.manifest["path"]):
        wanted = Image.open(root / path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(store.images[row], np.asarray(wanted).transpose(2, 0, 1))
    assert store.galleries["all_multi"].dtype == np.int32
    assert (store.meta["dataset"], store.meta["partial"], store.meta["intensity"]) == ("mine", False, None)
    assert store.meta["counts"]["1"]["test"]["identities"] == 4
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [".mine.lock", "mine"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(regdb: Dataset) -> None:
    one = content(packed(regdb).root)
    assert content(packed(regdb, workers=2).root) == one


def test_undecodable_images_are_named_and_nothing_is_left(regdb: Dataset) -> None:
    paths = [trees.regdb_file("Visible", pid, 1) for pid in (1, 2)]
    whole = (regdb.root / paths[0]).read_bytes()
    (regdb.root / paths[0]).write_bytes(whole[: len(whole) // 2])
    (regdb.root / paths[1]).write_bytes(b"no image")
    with pytest.raises(StudyError) as caught:
        packed(regdb)
    assert all(path in str(caught.value) for path in paths)
    assert nothing_packed(regdb)


def test_a_failed_pack_keeps_the_older_store(regdb: Dataset) -> None:
    before = content(packed(regdb).root)
    (regdb.root / trees.regdb_file("Visible", 1, 1)).write_bytes(b"no image")
    with pytest.raises(StudyError):
        packed(regdb)
    assert content(regdb.root.parent / "packed" / "mine") == before


def test_a_tree_that_changed_since_it_was_prepared_is_refused(regdb: Dataset) -> None:
    packed(regdb)
    (regdb.root / trees.regdb_file("Visible", 1, 1)).write_bytes(trees.bmp((1, 1, 1)))
    with pytest.raises(StudyError, match="changed"):
        pack(regdb, prepared=regdb.root.parent / "prepared", packed=regdb.root.parent / "packed")


def test_a_set_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="missing"):
        pack(trees.dataset("regdb", tmp_path), prepared=tmp_path / "prepared", packed=tmp_path / "packed")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(regdb: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StudyError, match="No space left"):
        packed(regdb)
    assert nothing_packed(regdb)


def thermal_16_bit(root: Path, low: int = 29_000, high: int = 31_000) -> None:
    """Thermal images as uint16 centi-Kelvin, as FLIR cameras write them, where the tree has gray value 100 and more."""
    for k, path in enumerate(sorted((root / "Thermal").glob("*/*.bmp"))):
        values = np.linspace(low + 10 * k, high - 10 * k, 16 * 8).astype(np.uint16).reshape(16, 8)
        Image.fromarray(values).save(path.with_suffix(".png"))
        path.unlink()
    for path in (root / "idx").glob("*thermal*"):
        trees.edit(path, lambda text: text.replace(".bmp", ".png"))


def test_16_bit_images_are_scaled_by_the_range_of_their_modality(regdb: Dataset) -> None:
    thermal_16_bit(regdb.root)
    store = packed(regdb)
    assert store.meta["intensity"] == {"infrared": [29_000.0, 31_000.0]}
    infrared = store.images[store.modalities == 1]
    assert infrared.min() < 12 and infrared.max() > 243
    names = [regdb.root / path for path in store.manifest["path"]]
    assert inspect_images(names, list(store.manifest["modality"]), 32, 32, workers=1)[0] == []


def test_16_bits_per_color_are_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(12)) * 2)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    with pytest.raises(StudyError, match="16 bits"):
        intensity_ranges([tmp_path / "a.png"], ["visible"], 1)


COUNTS = np.linspace(7000, 8200, 64).reshape(8, 8)  # of a camera with 14 bits


def big_endian_tiff(values: np.ndarray) -> bytes:
    pixels = values.astype(">u2").tobytes()
    tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, 1), (277, 1), (278, 8)]  # size, bits, raw, gray
    entries = [struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    entries += [struct.pack(">HHII", 273, 4, 1, 8), struct.pack(">HHII", 279, 4, 1, len(pixels))]  # place of pixels
    table = struct.pack(">H", len(entries)) + b"".join(sorted(entries)) + bytes(4)
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + table


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32, ">u2"])
def test_counts_of_a_14_bit_camera_keep_their_contrast(tmp_path: Path, kind) -> None:
    path = tmp_path / "a.tif"
    if kind == ">u2":
        path.write_bytes(big_endian_tiff(COUNTS))
    else:
        Image.fromarray(COUNTS.astype(kind)).save(path)
    ranges = intensity_ranges([path], ["infrared"], 1)
    assert ranges == {"infrared": (7000, 8200)}
    np.testing.assert_allclose(decode(path, 8, 8, ranges["infrared"])[0], (COUNTS - 7000) / 1200 * 255, atol=0.75)
    assert inspect_images([path], ["infrared"], 32, 32, 1) == ([], [])


@pytest.mark.parametrize("modalities", [("infrared", "infrared"), ("visible", "infrared")])
def test_one_modality_in_integers_and_floats_has_no_common_range(tmp_path: Path, modalities: tuple[str, str]) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.tif"]
    for path, values in zip(paths, (COUNTS.astype(np.uint16), COUNTS.astype(np.float32) / 8200), strict=True):
        Image.fromarray(values).save(path)
    if len(set(modalities)) == 2:
        assert intensity_ranges(paths, modalities, 1)["infrared"][1] == 1
    else:
        with pytest.raises(StudyError, match="b.tif"):
            intensity_ranges(paths, modalities, 1)


def test_nearly_constant_images_are_reported(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(noise // 250 + 7).save(tmp_path / "b.png")
    Image.new("RGB", (40, 40), (9, 99, 200)).save(tmp_path / "c.png")
    failures, flat = inspect_images([tmp_path / f"{name}.png" for name in "abc"], ["visible"] * 3, 32, 32, 1)
    assert (failures, flat) == ([], [str(tmp_path / "b.png"), str(tmp_path / "c.png")])


# ---------------------------------------------------------------- processes


def quit_at_3(job: int) -> int:
    if job == 3:
        os._exit(1)
    return job


def test_a_worker_that_dies_is_one_sentence() -> None:
    with pytest.raises(StudyError, match="worker"):
        list(parallel(quit_at_3, range(8), 2))


PARENTS = {
    "at work": """
import time
from data_prep.parallel import parallel
if __name__ == "__main__":
    for _ in parallel(time.sleep, [0.01] * 100_000, 2):
        print("busy", flush=True)
""",
    "before the worker watches": """
import multiprocessing, time
from danet_study.processes import exit_with_parent
def work():
    time.sleep(2)
    exit_with_parent()
    time.sleep(100)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    print("busy", flush=True)
    worker.join()
""",
}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("when", PARENTS)
def test_workers_end_with_a_killed_parent(when: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENTS[when])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, env=environment)
    try:
        assert parent.stdout is not None and parent.stdout.readline() == b"busy\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert workers
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, "workers outlived the process that started them"
        time.sleep(0.1)


# ---------------------------------------------------------------- weights


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pretraining of seconds, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    study = load_study(ROOT / "params.yaml")
    recipe = study.run("synth_sysu-1", "baseline", 0).recipe.model_copy(update={"width": 4})
    image = study.dataset("synth_sysu").image.model_copy(update={"height": 32, "width": 32})
    small = {"render": {"seed": 1, "ids": 3, "images": 3, "height": 32}, "batch_size": 4, "steps": 3}
    return image, recipe, study.pretraining.model_copy(update=small)


def test_pretraining_twice_gives_the_same_bytes_and_data_sets_share_one(tiny, tmp_path: Path, capsys) -> None:
    weights.make_weights(*tiny, tmp_path / "a.safetensors", device="cpu")
    assert "step" in capsys.readouterr().out
    weights.make_weights(*tiny, tmp_path / "b.safetensors", device="cpu")
    assert "step" not in capsys.readouterr().out
    first = (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == first
    for path in (tmp_path / "build" / "pretrained").glob("*.safetensors"):
        path.unlink()
    weights.make_weights(*tiny, tmp_path / "c.safetensors", device="cpu")
    assert (tmp_path / "c.safetensors").read_bytes() == first
    DANet(5, tiny[1].backbone, tmp_path / "a.safetensors", width=4)


def test_a_pretraining_that_diverges_leaves_no_file(tiny, tmp_path: Path) -> None:
    image, recipe, pretraining = tiny
    with pytest.raises(StudyError, match="lr"):
        weights.make_weights(image, recipe, pretraining.model_copy(update={"lr": 1e30}), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's hub folder with a stand-in for the ImageNet weights, and its hash."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "hub" / "checkpoints" / weights.IMAGENET_FILE
    path.parent.mkdir(parents=True)
    torch.save({"conv1.weight": torch.ones(2), "fc.weight": torch.ones(3)}, path)
    monkeypatch.setattr(weights, "IMAGENET_SHA256", weights.sha256_file(path))
    return path


def imagenet_recipe():
    return load_study(ROOT / "params.yaml").run("sysu-1", "baseline", 0).recipe


def test_imagenet_weights_are_checked_and_taken_without_the_classifier(hub: Path, tmp_path: Path, monkeypatch) -> None:
    weights.imagenet(imagenet_recipe(), tmp_path / "a.safetensors")
    assert list(load_file(tmp_path / "a.safetensors")) == ["conv1.weight"]
    monkeypatch.setattr(weights, "IMAGENET_SHA256", "0" * 64)
    with pytest.raises(StudyError, match="SHA-256"):
        weights.imagenet(imagenet_recipe(), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_without_a_network_the_message_says_which_file_belongs_where(hub: Path, tmp_path: Path, monkeypatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    hub.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(StudyError, match=weights.IMAGENET_FILE):
        weights.imagenet(imagenet_recipe(), tmp_path / "a.safetensors")


def test_imagenet_weights_are_refused_for_another_network(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="resnet50"):
        weights.imagenet(imagenet_recipe().model_copy(update={"width": 32}), tmp_path / "a.safetensors")


def test_the_pinned_file_is_torchvisions() -> None:
    assert ResNet50_Weights.IMAGENET1K_V1.url == weights.IMAGENET_URL
    assert weights.IMAGENET_SHA256[:8] in weights.IMAGENET_FILE


# ---------------------------------------------------------------- command line


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml in which `synth_regdb` is tiny, and `regdb` has no images."""
    yaml = YAML()
    raw = yaml.load((ROOT / "params.yaml").read_text())
    raw["datasets"]["synth_regdb"]["render"]["ids"] = 4
    raw["datasets"]["synth_regdb"]["image"] = {"height": 32, "width": 32}
    raw["datasets"]["synth_regdb"]["recipe"] = {**raw["datasets"]["synth_regdb"]["recipe"], "ids_per_batch": 2}
    with (tmp_path / "params.yaml").open("w") as stream:
        yaml.dump(raw, stream)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.render.synthetic.parallel", lambda function, jobs, workers: map(function, jobs))
    return tmp_path


def test_a_rendered_set_is_prepared_packed_and_verified_without_check(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "synth_regdb"]) == 1  # only photographs have an inventory
    assert not (project / "data").exists()
    assert main(["prepare", "synth_regdb"]) == main(["pack", "synth_regdb", "--workers", "1"]) == 0
    assert not (project / "data/inventory").exists()
    path = project / "data/prepared/synth_regdb/inventory.json"
    before = path.read_bytes()
    store = PackedStore.open("data/packed/synth_regdb")
    assert store.meta["synthetic"] and len(store.images) == 80
    assert main(["verify", "synth_regdb", "--deep", "--workers", "1"]) == 0
    assert "ok" in capsys.readouterr().out and path.read_bytes() == before
    image = next(project.glob("data/raw/synth_regdb/Visible/1/*.bmp"))
    pixels = image.read_bytes()
    image.write_bytes(pixels[::-1])
    assert main(["prepare", "synth_regdb"]) == 0  # an edited image is rendered again
    assert (image.read_bytes(), path.read_bytes()) == (pixels, before)


def test_check_writes_the_inventory_of_photographs_where_dvc_expects_it(project: Path, monkeypatch) -> None:
    monkeypatch.setenv("REGDB_ROOT", str(trees.write_regdb(project / "photographs", REGDB)))
    assert main(["check", "regdb"]) == 0
    stage = YAML().load((ROOT / "dvc.yaml").read_text())["stages"]["check"]
    assert [*stage["outs"][0]] == ["data/inventory/${item.dataset}.json"]
    assert read_json(project / "data/inventory/regdb.json")["files"] == 56


@pytest.mark.parametrize("command", ["check", "prepare", "pack", "verify"])
def test_an_absent_data_set_is_one_line_and_nothing_is_written(
    project: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "regdb"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "regdb" in error.lower()
    left = [path.name for path in project.rglob("*") if path.is_file()]
    assert [name for name in left if name not in ("params.yaml", ".regdb.lock")] == []


def test_verify_shows_what_is_wrong(project: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.write_regdb(project / "photographs", REGDB)
    (root / "Visible" / os.fsdecode(b"caf\xe9")).mkdir()
    (root / "Visible" / os.fsdecode(b"caf\xe9") / "x.txt").touch()
    (root / trees.regdb_file("Visible", 1, 1)).write_bytes(b"no image")
    monkeypatch.setenv("REGDB_ROOT", str(root))
    assert main(["verify", "regdb", "--deep", "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "WRONG" in printed.out and "caf\\" in printed.out
    assert "412" in printed.err and "cannot be decoded" in printed.err


def test_names_that_a_terminal_cannot_show_are_escaped(project: Path) -> None:
    root = trees.write_regdb(project / "photographs", REGDB)
    (root / "Visible/\u4e2d.txt").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252", "REGDB_ROOT": str(root)}
    command = [sys.executable, "-m", "data_prep", "verify", "regdb"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert b"\\u4e2d.txt" in done.stdout and b"Traceback" not in done.stderr


def test_any_file_name_is_printed_on_a_console_with_few_characters(project: Path) -> None:
    root = trees.write_regdb(project / "photographs", REGDB)
    for name in (b"caf\xe9.txt", "照片.txt".encode()):
        (root / os.fsdecode(name)).touch()
    environment = {**os.environ, "REGDB_ROOT": str(root), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252:strict"}
    command = [sys.executable, "-m", "data_prep", "verify", "regdb"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, encoding="cp1252")
    assert "skipped: 2 files" in done.stdout and "\\u7167" in done.stdout and "caf\\" in done.stdout
    assert "Traceback" not in done.stderr and "412" in done.stderr and done.returncode == 1


def test_wrong_usage_and_unknown_names(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prepare"])
    assert caught.value.code == 2
    assert main(["prepare", "sinth_regdb"]) == 1
    assert "synth_regdb" in capsys.readouterr().err


def test_preparing_and_packing_load_no_torch(project: Path) -> None:
    code = (
        "import sys\nfrom data_prep.__main__ import main\n"
        "assert not any(main([c, 'synth_regdb']) for c in ('prepare', 'pack'))\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    main(["prepare", "synth_regdb"])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_json(project / "data/packed/synth_regdb/meta.json")["n"] == 80
