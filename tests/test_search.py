"""A folder of crops is ranked as the pipeline would rank it, whatever lies in it, and a run can be looked at."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from safetensors.torch import save_file

from danet_core import crops, search
from danet_core.__main__ import main
from danet_core.backbone import ResNet
from danet_core.crops import RankedImage, ranked_list
from danet_core.evaluate import extract
from danet_core.files import StudyError
from danet_core.parameters import RenderSysu, SplitCounts
from danet_core.record import RunFolder
from danet_core.search import Ranking, describe, find_run, list_gallery, load_run
from danet_core.store import PackedStore
from danet_core.style import save_as
from danet_core.train import train
from data_prep.pack import pack
from data_prep.prepare import Folders, prepare
from data_prep.synthetic import render_sysu
from tests.stores import small_config

ROOT = Path(__file__).resolve().parent.parent
RENDER = RenderSysu(5, 5, 3, 6, SplitCounts(2, 3, 2), 0.0, 0.6, 64)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of a tiny rendered tree, trained by the pipeline's own steps."""

    config: Any
    run: Path
    raw: Path
    store: PackedStore
    project: Path


def make(root: Path, test_feature: str) -> Trained:
    config = small_config("synth_sysu", "b_ml_cc", test_feature=test_feature)
    dataset = dataclasses.replace(config.dataset, root=str(root / "data/raw/synth_sysu"), render=RENDER)
    config = dataclasses.replace(config, dataset=dataset)
    render_sysu(dataset.raw_root(), RENDER, workers=1)
    folders = Folders(root / "data/prepared", root / "data/packed")
    prepare(dataset, folders=folders)
    pack(dataset, workers=1, folders=folders)
    weights = root / "data/weights/synth_sysu.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(3)
    save_file(ResNet("resnet18", 8).state_dict(), weights)
    folder = RunFolder.of(config, root / "runs", root / "build")
    train(config, folder, packed=folders.packed, weights=weights.parent, device="cpu", log=lambda line: None)
    return Trained(config, folder.root, dataset.raw_root(), PackedStore.open(folders.packed / "synth_sysu"), root)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make(tmp_path_factory.mktemp("one"), "after_bn")


@pytest.fixture(scope="module", params=["after_bn", "before_bn"])
def either(request: pytest.FixtureRequest, one: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return one if request.param == "after_bn" else make(tmp_path_factory.mktemp("other"), request.param)


@pytest.fixture
def gallery(one: Trained, tmp_path: Path) -> Path:
    """Three crops of different people, one in a sub-folder: `10.jpg`, `2.jpg`, `b/1.jpg`."""
    sources = sorted(one.raw.glob("cam1/*/0001.jpg"))
    for name, source in zip(("10.jpg", "2.jpg", "b/1.jpg"), sources, strict=False):
        (tmp_path / "gallery" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tmp_path / "gallery" / name)
    return tmp_path / "gallery"


def query_of(trained: Trained) -> Path:
    return sorted(trained.raw.glob("cam3/*/0001.jpg"))[0]


def ranked(trained: Trained, gallery: Path, **options: Any) -> Ranking:
    return search.search(query_of(trained), gallery, trained.run, device="cpu", **options)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


# -------------------- what is ranked, and how


def test_distances_are_those_of_the_packed_images_through_the_pipelines_own_extraction(either: Trained) -> None:
    _, model, _ = load_run(either.run)
    rows = np.arange(len(either.store.manifest))
    features = extract(model, either.store, rows, either.config, "cpu")
    feat = features.retrieval(either.config.dataset.recipe.test_feature)
    row = {path: index for index, path in enumerate(either.store.manifest["path"])}
    query = feat[row[query_of(either).relative_to(either.raw).as_posix()]]
    ranking = ranked(either, either.raw / "cam1")
    expected = {
        path.removeprefix("cam1/"): cosine(query, feat[index])
        for path, index in row.items()
        if path.startswith("cam1/")
    }
    assert set(ranking.names) == set(expected) and len(expected) > 10
    np.testing.assert_allclose(ranking.distances, [expected[name] for name in ranking.names], atol=1e-5)
    assert (np.diff(ranking.distances) >= 0).all()


def test_the_run_alone_says_how_an_image_is_seen(one: Trained, gallery: Path, tmp_path: Path, monkeypatch) -> None:
    expected = ranked(one, gallery)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # no params.yaml, no data, no runs
    copied = shutil.copytree(one.run, tmp_path / "elsewhere" / "a model somebody sent")
    found = search.search(query_of(one), gallery, copied, device="cpu")
    assert found.names == expected.names
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert found.run == "synth_sysu/b_ml_cc-t1-s0"


def test_distances_do_not_depend_on_how_many_images_share_a_forward_pass(one: Trained, gallery: Path, monkeypatch):
    (gallery / "5.png").write_bytes(b"no image")
    together = ranked(one, gallery, skip_broken=True)
    monkeypatch.setattr(search, "_BATCH", 1)
    alone = ranked(one, gallery, skip_broken=True)
    assert alone.names == together.names
    np.testing.assert_allclose(alone.distances, together.distances, atol=1e-5)


def test_equal_crops_stand_in_natural_order_of_their_names(one: Trained, tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "a/1.png", "1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 32), (200, 30, 40)).save(tmp_path / name)
    assert ranked(one, tmp_path).names == ("1.png", "2.png", "10.png", "a/1.png")


def test_a_copy_of_the_query_comes_first_at_distance_zero(one: Trained, gallery: Path) -> None:
    shutil.copyfile(query_of(one), gallery / "copy.jpg")
    ranking = ranked(one, gallery)
    assert ranking.names[0] == "copy.jpg"
    assert ranking.distances[0] == pytest.approx(0, abs=1e-6)


def test_the_query_file_itself_is_left_out_of_its_gallery_and_that_is_said(one: Trained) -> None:
    ranking = ranked(one, query_of(one).parent)
    assert ranking.names == ("0002.jpg",)
    assert ranking.skipped == ("0001.jpg (the query itself)",)


def test_a_grey_and_a_palette_image_are_ranked_like_their_rgb_selves(one: Trained, tmp_path: Path) -> None:
    grey = Image.open(query_of(one)).convert("L")
    for name, mode in (("1.png", "RGB"), ("2.png", "L"), ("3.png", "P")):
        grey.convert(mode).save(tmp_path / name)
    np.testing.assert_allclose(np.diff(ranked(one, tmp_path).distances), 0, atol=1e-6)


# -------------------- what else lies in the folder


def test_images_are_listed_in_natural_order_and_everything_else_apart(tmp_path: Path) -> None:
    wanted = ["2.PNG", "10.jpg", "a2/1.bmp", "a10/1.jpeg"]
    strays = [".DS_Store", "._2.jpg", "a2/Thumbs.db", "notes.txt"]
    for name in wanted + strays + [".ipynb_checkpoints/3.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a2")
    (tmp_path / "empty").mkdir()
    images, others = list_gallery(tmp_path)
    assert images == wanted
    assert sorted(others) == sorted([*strays, ".ipynb_checkpoints", "link"])


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_an_image_that_cannot_be_decoded_is_named_and_can_be_left_out(one: Trained, gallery: Path, content) -> None:
    whole = ranked(one, gallery)
    broken = gallery / "7.jpg"
    broken.write_bytes((gallery / "2.jpg").read_bytes()[:300] if content is None else content)
    with pytest.raises(StudyError, match=r"7\.jpg .*cannot be decoded.*--skip-broken") as error:
        ranked(one, gallery)
    assert "\n" not in str(error.value)
    ranking = ranked(one, gallery, skip_broken=True)
    assert ranking.names == whole.names
    assert len(ranking.broken) == 1 and "7.jpg" in ranking.broken[0]


def test_a_link_to_nothing_is_an_image_that_cannot_be_decoded(one: Trained, gallery: Path) -> None:
    (gallery / "gone.jpg").symlink_to(gallery / "nowhere.jpg")
    with pytest.raises(StudyError, match=r"gone\.jpg is missing"):
        ranked(one, gallery)
    assert len(ranked(one, gallery, skip_broken=True).names) == 3


def test_a_folder_without_one_image_that_can_be_decoded_is_refused(one: Trained, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"no image")
    with pytest.raises(StudyError, match=r"none of its 1 images can be decoded.*1\.jpg"):
        ranked(one, tmp_path, skip_broken=True)


def test_a_query_that_cannot_be_decoded_is_refused_even_when_broken_images_are_skipped(one, gallery, tmp_path) -> None:
    (tmp_path / "query.jpg").write_bytes(b"no image")
    with pytest.raises(StudyError, match=r"query\.jpg .*cannot be decoded") as error:
        search.search(tmp_path / "query.jpg", gallery, one.run, skip_broken=True)
    assert "--skip-broken" not in str(error.value)


def test_missing_query_folder_and_images_are_each_named(one: Trained, gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "strays").mkdir()
    with pytest.raises(StudyError, match=r"gallery .*strays: expected jpg, png or bmp images, found an empty folder"):
        ranked(one, tmp_path / "strays")
    (tmp_path / "strays" / "notes.txt").touch()
    with pytest.raises(StudyError, match=r"found only 1 other files or folders"):
        ranked(one, tmp_path / "strays")
    with pytest.raises(StudyError, match="gallery .*nowhere: expected a folder of crops, found nothing"):
        ranked(one, tmp_path / "nowhere")
    with pytest.raises(StudyError, match=r"gallery .*2\.jpg: expected a folder of crops, found a file"):
        ranked(one, gallery / "2.jpg")
    with pytest.raises(StudyError, match=r"query .*no\.jpg: expected an image file, found nothing"):
        search.search(gallery / "no.jpg", gallery, one.run)
    with pytest.raises(StudyError, match="query .*: expected an image file, found a folder"):
        search.search(gallery, gallery, one.run)


# -------------------- the run


def test_the_only_run_there_is_needs_no_name(one: Trained) -> None:
    assert find_run(None, one.project / "runs") == one.run


def test_several_runs_are_listed_and_none_says_what_trains_one(one: Trained, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="found none: no model is trained yet; `make repro`"):
        find_run(None, tmp_path / "runs")
    with pytest.raises(StudyError, match=r"a-t1-s0.*found none: no model is trained yet; `make repro`"):
        find_run(tmp_path / "runs/synth_sysu/a-t1-s0", tmp_path / "runs")
    for name in ("a-t10-s0", "a-t2-s0"):
        shutil.copytree(one.run, tmp_path / "runs/synth_regdb" / name)
    with pytest.raises(StudyError, match=r"found 2; name one of .*/a-t2-s0, .*/a-t10-s0$"):
        find_run(None, tmp_path / "runs")
    with pytest.raises(StudyError, match=r"expected a folder with a record.json, found none; name one of .*a-t2-s0"):
        find_run(tmp_path / "runs/synth_regdb", tmp_path / "other")
    assert find_run(str(tmp_path / "runs/synth_regdb/a-t2-s0")).name == "a-t2-s0"


def test_a_damaged_model_and_a_record_of_another_version_are_refused(one: Trained, gallery: Path, tmp_path: Path):
    damaged = shutil.copytree(one.run, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(StudyError, match="expected SHA-256"):
        search.search(query_of(one), gallery, damaged)
    other = shutil.copytree(one.run, tmp_path / "other")
    record = json.loads((other / "record.json").read_text())
    record["config"]["dataset"]["recipe"]["temperature"] = 2
    (other / "record.json").write_text(json.dumps(record))
    with pytest.raises(StudyError, match=r"record\.json.*unknown key 'temperature'.*another version"):
        search.search(query_of(one), gallery, other)
    for text in ("[]", "{}", '{"config": 3, "label": ""}'):
        (other / "record.json").write_text(text)
        with pytest.raises(StudyError, match=r"record\.json is no record of a run"):
            search.search(query_of(one), gallery, other)
        with pytest.raises(StudyError, match=r"record\.json is no record of a run"):
            describe(other / "record.json")


def test_a_shown_run_has_every_number_of_its_record_but_the_earlier_epochs(one: Trained, capsys) -> None:
    assert main(["show", str(one.run)]) == 0
    text = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  "))
    record = json.loads((one.run / "record.json").read_text())
    assert rows["dataset.image.height"] == "32" and rows["dataset.recipe.test_feature"] == "after_bn"
    assert rows["dataset.recipe.augment.mean"] == "0.485, 0.456, 0.406"
    assert record["provenance"].pop("processes") == [1] and rows["processes"] == "1"
    assert {rows[key] for key in record["provenance"]} == set(record["provenance"].values())
    assert rows["libraries.torch"] == record["versions"]["libraries"]["torch"]
    assert float(rows["L_cc"]) == pytest.approx(record["history"][-1]["L_cc"], rel=1e-5)
    assert rows["epoch"] == "3" and "last of 3 epochs" in text
    assert main(["show", str(one.run / "nothing")]) == 1
    assert "expected a folder with a record.json" in capsys.readouterr().err


# -------------------- command line and picture


def test_the_command_prints_the_first_ranks_and_saves_their_picture(one: Trained, gallery: Path, tmp_path, capsys):
    (gallery / "notes.txt").touch()
    out = tmp_path / "new" / "ranked.png"
    arguments = ["--query", str(query_of(one)), "--gallery", str(gallery), "--run", str(one.run), "--out", str(out)]
    assert main(["search", *arguments, "--top", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    ranking = ranked(one, gallery)
    rows = [line.split() for line in printed.out.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [
        [str(rank), f"{ranking.distances[rank - 1]:.4f}", (gallery / ranking.names[rank - 1]).as_posix()]
        for rank in (1, 2)
    ]
    assert "skipped: notes.txt" in printed.err
    with Image.open(out) as picture:
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 50


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed: make extras")
@pytest.mark.parametrize("index", ["faiss", "faiss-hnsw"])
def test_a_faiss_index_finds_the_first_ranks_and_the_command_says_which_is_approximate(
    one: Trained, gallery: Path, tmp_path: Path, capsys: Any, index: str
) -> None:
    arguments = ["--query", str(query_of(one)), "--gallery", str(gallery), "--run", str(one.run), "--device", "cpu"]
    assert main(["search", *arguments, "--out", str(tmp_path / "a.png"), "--top", "2", "--index", index]) == 0
    printed = capsys.readouterr().out
    assert "gallery" in printed and "3 images" in printed
    assert ("its recall is not 1" in printed) == (index == "faiss-hnsw")
    found, expected = ranked(one, gallery, index=index, top=2), ranked(one, gallery)
    assert found.names == expected.names[:2] and found.n_gallery == 3
    assert all(name in printed for name in found.names)
    np.testing.assert_allclose(found.distances, expected.distances[:2], rtol=0, atol=1e-12)


def test_an_index_without_its_package_is_refused_before_anything_is_read(
    one: Trained, gallery, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    arguments = ["--query", str(query_of(one)), "--gallery", str(gallery), "--run", str(tmp_path / "no run")]
    assert main(["search", *arguments, "--out", str(tmp_path / "a.png"), "--index", "faiss"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "the index faiss needs the package faiss" in message


def test_the_command_says_what_is_wrong_in_one_line_and_leaves_no_picture(
    one: Trained, gallery: Path, tmp_path, capsys
):
    arguments = ["search", "--query", str(query_of(one)), "--gallery", str(gallery), "--run", str(one.run)]
    assert main([*arguments, "--out", str(tmp_path / "a.gif")]) == 1
    assert capsys.readouterr().err == (
        f"error: picture {tmp_path / 'a.gif'}: expected a name that ends in .png or .pdf; name another file\n"
    )
    (gallery / "0.bmp").write_bytes(b"")
    assert main([*arguments, "--out", str(tmp_path / "a.png")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "0.bmp" in message
    assert main([*arguments, "--out", str(tmp_path / "a.png"), "--skip-broken"]) == 0
    assert "left out: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--top", "0"])
    assert "--top: expected a whole number of at least 1, found '0'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "gallery"]


def test_names_that_no_terminal_prints_do_not_stop_the_list_or_the_picture(one: Trained, tmp_path: Path) -> None:
    names = ["a\nb.png", "cost $1 and $2_x^.png", "r\udcffaw.png", "人.png", "a_{.png"]
    for name in names:
        Image.new("RGB", (16, 32), (9, 99, 199)).save(tmp_path / name)
    ranking = ranked(one, tmp_path)
    assert sorted(ranking.names) == sorted(names)
    text = ranking.text()
    assert len(text.splitlines()) == 7 and "a?b.png" in text and "r?aw.png" in text
    text.encode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in (".png", ".pdf"):
            save_as(ranking.figure(), tmp_path / f"out{suffix}")


def test_the_picture_holds_query_ranks_and_distances_in_order_with_the_crops_unstretched() -> None:
    def crop(value: int, height: int = 40) -> np.ndarray:
        return np.full((height, 20, 3), value, np.uint8)

    images = [RankedImage(f"{n}.jpg", crop(n, 30 + n), n / 10) for n in range(1, 14)]
    figure = ranked_list(RankedImage("q.jpg", crop(200)), images, title="somewhere")
    (axis,) = figure.axes
    words = [text.get_text() for text in axis.texts]
    assert words[:6] == ["query", "q.jpg", "1 · 0.100", "1.jpg", "2 · 0.200", "2.jpg"]
    assert words[2:] == [word for n in range(1, 14) for word in (f"{n} · {n / 10:.3f}", f"{n}.jpg")]
    places = {}
    for rank, drawn in enumerate(axis.images):
        assert drawn.get_array()[0, 0, 0] == (rank or 200)  # type: ignore[index]
        left, right, bottom, top = drawn.get_extent()
        assert (bottom - top) / (right - left) == pytest.approx((30 + rank if rank else 40) / 20)
        places[rank] = left, top
    assert axis.get_aspect() == 1
    assert np.diff(axis.get_xlim()) / -np.diff(axis.get_ylim()) == pytest.approx(np.divide(*figure.get_size_inches()))
    assert places[0][0] < places[1][0] < places[2][0] and places[11][1] > places[1][1]
    assert places[11][0] == pytest.approx(places[1][0], abs=0.1)  # below the first, not below the query
    with pytest.raises(StudyError, match="no ranked image"):
        ranked_list(RankedImage("q.jpg", crop(0)), [], title="")


def test_a_mark_is_a_colour_and_a_sign_and_what_is_ignored_has_no_rank() -> None:
    image = np.zeros((40, 20, 3), np.uint8)
    marks: tuple[Any, ...] = ("wrong", "ignored", "right", None)
    images = [RankedImage(str(mark), image, 0.5, mark) for mark in marks]
    (axis,) = ranked_list(RankedImage("q", image), images, title="").axes
    told = [text.get_text() for text in axis.texts][::2]
    assert told == ["query", "1 · 0.500 ✗", "0.500 ignored", "2 · 0.500 ✓", "3 · 0.500"]
    frames = [to_hex(patch.get_edgecolor()).upper() for patch in axis.patches]
    assert len(set(frames)) == 4 and frames[1:] == [crops.MARKS[mark][0] for mark in marks[:3]]


def test_the_picture_for_the_screen_has_every_crop_and_frame_where_the_figure_has_it() -> None:
    marks: tuple[Any, ...] = ("wrong", "ignored", "right", None)
    images = [
        RankedImage(f"{n}.jpg", np.full((40, 20, 3), 10 + n, np.uint8), n / 10, mark) for n, mark in enumerate(marks)
    ]
    query, title = RankedImage("q.jpg", np.full((30, 20, 3), 200, np.uint8)), "two\nlines"
    figure = ranked_list(query, images, title=title, columns=3)
    picture = crops.ranked_picture(query, images, title=title, columns=3, dpi=100)
    assert picture.size == tuple(np.round(100 * figure.get_size_inches()).astype(int))
    pixels, (axis,) = np.asarray(picture), figure.axes
    right, bottom = axis.transData.transform([(0, 0), (1, 1)])[1] - axis.transData.transform([(0, 0), (1, 1)])[0]
    assert right == pytest.approx(-bottom) == pytest.approx(figure.dpi)  # the figure is in inches
    frames = dict(zip(("q.jpg", "0.jpg", "1.jpg", "2.jpg"), axis.patches, strict=True))
    for drawn, name in zip(axis.images, ("q.jpg", "0.jpg", "1.jpg", "2.jpg", "3.jpg"), strict=True):
        left, end, low, top = (100 * edge for edge in drawn.get_extent())
        top, low = (edge - 100 * axis.get_ylim()[1] for edge in (top, low))
        value = drawn.get_array()[0, 0].tolist()  # type: ignore[index]
        assert pixels[int((top + low) / 2), int((left + end) / 2)].tolist() == value
        across = pixels[round(top) + 1, round(left) : round(end)]  # along the upper edge
        assert (across == 255).all(axis=1).sum() <= 1  # nothing of the paper between frame and crop
        if name not in frames:
            assert (across[1:-1] == value).all()
            continue
        colour = (255 * np.array(frames[name].get_edgecolor()[:3])).round().tolist()
        framed = (across == colour).all(axis=1).mean()
        assert 0.4 < framed < 0.9 if name == "1.jpg" else framed > 0.95, name  # dashed where it is ignored
    with pytest.raises(StudyError, match="no ranked image"):
        crops.ranked_picture(query, [], title="")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("0001.jpg", ["0001.jpg"]),
        ("cam1/0001/0004.jpg", ["cam1/0001/0004.jpg"]),
        ("camera_1/0001/0004.jpg", ["camera_1/0001/", "0004.jpg"]),
        ("x" * 40, ["x" * 17, "x" * 17, "x" * 6]),
        ("first_folder/second_folder/third_folder/4.jpg", ["first_folder/", "second_folder/", "third_folder/4.jpg"]),
        ("a" * 17 + "/" + "b" * 17 + "/" + "c" * 17 + "/4.jpg", ["…" + "b" * 17 + "/", "c" * 17 + "/", "4.jpg"]),
    ],
)
def test_a_long_name_is_broken_at_slashes_and_keeps_its_end(name: str, lines: list[str]) -> None:
    assert crops._name_lines(name).splitlines() == lines


def test_at_most_fifty_crops_are_drawn_and_the_table_has_all(one: Trained, tmp_path: Path) -> None:
    for number in range(search.DRAWN + 3):
        Image.new("RGB", (8, 16), (4 * number, 0, 0)).save(tmp_path / f"{number}.png")
    ranking = ranked(one, tmp_path)
    assert len(ranking.table(100)) == search.DRAWN + 3
    assert len(ranking.figure(100).axes[0].images) == search.DRAWN + 1


def test_the_method_never_imports_what_prepares_data() -> None:
    for path in sorted((ROOT / "danet_core").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("data_prep", "tools") for name in names), path


# -------------------- the notebook


def test_the_notebook_runs_from_top_to_bottom_on_the_embedded_data(one: Trained, tmp_path: Path) -> None:
    values = {
        "query": query_of(one),
        "gallery": one.raw / "cam1",
        "run": one.run,
        "top": 3,
        "device": "cpu",
        "out": tmp_path / "ranked.png",
    }
    command = [sys.executable, "-m", "tools.notebook", "notebooks/08_search.ipynb", tmp_path / "executed.ipynb"]
    for name, value in values.items():
        command += ["-p", name, str(value)]
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells
    shown = "".join(str(cell.get("outputs", "")) for cell in cells)
    assert all(name in shown for name in ranked(one, one.raw / "cam1").names[:3])
    assert "image/png" in shown
    assert (tmp_path / "ranked.png").stat().st_size > 10_000


def test_the_notebooks_defaults_name_files_of_the_embedded_benchmark() -> None:
    from danet_core.config import load_study
    from data_prep.synthetic import _sysu_cells
    from tools.notebook import declared_parameters

    defaults = declared_parameters(ROOT / "notebooks/08_search.ipynb")
    study = load_study(ROOT / "params.yaml")
    dataset = study.dataset("synth_sysu")
    splits, cells = _sysu_cells(dataset.render)  # type: ignore[arg-type]
    root, camera, pid, name = defaults["query"].rsplit("/", 3)
    assert root == dataset.root and name == "0001.jpg"
    assert int(pid) in splits["test"] and (int(pid), int(camera.removeprefix("cam"))) in cells
    assert defaults["gallery"] == f"{dataset.root}/cam1"
    assert defaults["run"] == f"runs/synth_sysu/{study.run('synth_sysu', 'b_ml_cc', 1, 0).name}"
