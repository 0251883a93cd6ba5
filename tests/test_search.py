"""A folder of photographs is ranked as the run's record says, whatever else is in it."""

import contextlib
import io
import os
import shutil

import numpy as np
import pytest
import torch
from finished import run_notebook
from PIL import Image
from stores import SIDE, small_run

from danet_study import figures, search
from danet_study.checkpoint import build_model, save_run
from danet_study.data import normalize
from danet_study.files import StudyError
from danet_study.search import list_files

PEOPLE = np.random.default_rng(1).integers(0, 256, (4, 4, 2, 3), np.uint8)


def photograph(person, seed=0, size=(48, 96)):
    """A noisy picture of a person, width x height."""
    scale = np.ones((size[1] // 4, size[0] // 2, 1))
    noise = np.random.default_rng(seed).integers(-12, 13, (size[1], size[0], 3))
    return Image.fromarray((np.kron(PEOPLE[person], scale) + noise).clip(0, 255).astype(np.uint8))


def write_run(folder, **model):
    config = small_run()
    resolved = config.resolved()
    resolved["model"] |= model
    torch.manual_seed(0)
    record = {"run": folder.name, "config": resolved, "history": [], "provenance": {}}
    made = build_model(resolved, 5, None)
    with torch.no_grad():
        made.neck.running_mean.fill_(0.5)  # so that features before and after the neck differ
    save_run(folder, made, record)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "synth_sysu-1-b_ml_cc-0")


@pytest.fixture
def gallery(tmp_path):
    """Persons 0 to 3 as 10.png, 2.webp, sub/1.tif and sub/3.bmp; a text and a hidden file."""
    folder = tmp_path / "gallery"
    (folder / "sub").mkdir(parents=True)
    for person, name in enumerate(("10.png", "2.webp", "sub/1.tif", "sub/3.bmp")):
        photograph(person).save(folder / name)
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def names(found, q=0):
    return [found.gallery[g].name for g in found.order[q]]


def test_several_queries_find_their_person_in_one_call(run, gallery, tmp_path):
    queries = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for query, person in zip(queries, (2, 0), strict=True):
        photograph(person, seed=9).save(query)
    found = search.search(queries, gallery, run, device="cpu")
    assert (names(found)[0], names(found, 1)[0]) == ("1.tif", "10.png")
    assert found.gallery == [gallery / name for name in ("10.png", "2.webp", "sub/1.tif", "sub/3.bmp")]
    assert len(found.broken) == 1 and "notes.txt" in found.broken[0]
    table = found.table(top=3)
    assert len(table) == 6 and list(table["rank"]) == [1, 2, 3] * 2
    assert table.groupby("query", sort=False)["distance"].apply(lambda column: column.is_monotonic_increasing).all()
    assert found.order[0].tolist() == search.search(queries[0], gallery, run, device="cpu").order[0].tolist()


@pytest.mark.parametrize("test_feature", ["before_bn", "after_bn"])
def test_distances_are_those_of_the_runs_test_feature(gallery, tmp_path, test_feature):
    run = write_run(tmp_path / "run", test_feature=test_feature)
    query = tmp_path / "query.png"
    photograph(1, seed=9).save(query)
    found = search.search(query, gallery, run, device="cpu", features=tmp_path / "features.npz")
    model, record = search.load_run(run)
    paths = [query, *found.gallery]
    images = np.stack([np.asarray(Image.open(p).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for p in paths])
    with torch.inference_mode():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        both = model.embed(normalize(pixels, small_run().recipe.augment))
    feat = both[test_feature == "after_bn"].double()
    unit = (feat / feat.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(found.distances[0], 1 - unit[1:] @ unit[0], atol=1e-6)
    with np.load(tmp_path / "features.npz") as written:
        assert written["paths"].tolist() == [str(path) for path in found.gallery]
        np.testing.assert_allclose(written["feat"], feat.numpy()[1:], rtol=1e-4, atol=1e-5)


def test_every_format_that_pillow_writes_and_reads_is_ranked_whatever_its_ending(run, gallery, tmp_path):
    Image.init()  # IM: Pillow will drop it. SPIDER: floats, whose range is not known
    expected = set()
    for number, form in enumerate(sorted((Image.OPEN.keys() & Image.SAVE.keys()) - {"IM", "SPIDER"})):
        for mode in ("RGB", "L", "1"):  # what the format can hold
            path = gallery / f"sub/{form}-{mode}.{number}"
            with contextlib.suppress(Exception):
                photograph(0).convert(mode).save(path, form)
                with Image.open(path) as image:
                    image.load()
                expected.add(path.name)
                break
            path.unlink(missing_ok=True)
    found = search.search(gallery / "10.png", gallery, run, device="cpu")
    assert expected <= set(names(found)) and len(found.broken) == 1
    assert {"JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "JPEG2000"} <= {
        n.split("-")[0] for n in expected
    }


def test_exif_orientation_is_applied(run, gallery, tmp_path):
    query = tmp_path / "query.png"
    photograph(3, seed=5).save(query)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    photograph(3, seed=5).rotate(90, expand=True).save(gallery / "turned.png", exif=exif)
    found = search.search(query, gallery, run, device="cpu")
    assert names(found)[0] == "turned.png" and found.distances[0, found.order[0][0]] < 1e-9
    assert found.figure(2).axes[0].images


def test_the_query_itself_is_not_ranked_but_its_copy_is(run, gallery):
    shutil.copy(gallery / "2.webp", gallery / "copy.webp")
    (gallery / "link.webp").symlink_to(gallery / "2.webp")
    found = search.search([gallery / "2.webp", gallery / "10.png"], gallery, run, device="cpu")
    assert names(found)[0] == "copy.webp" and not {"2.webp", "link.webp"} & set(names(found))
    assert "2.webp" in names(found, 1) and "10.png" not in names(found, 1)


def test_linked_folders_are_followed_once(gallery, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    photograph(0).save(tmp_path / "elsewhere/far.jpg")
    (gallery / "link").symlink_to(tmp_path / "elsewhere")
    (gallery / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(gallery)
    names = [path.name for path in list_files(gallery)]
    assert names.count("far.jpg") == 1 and sorted(names) == sorted(
        ["far.jpg", "10.png", "2.webp", "1.tif", "3.bmp", "notes.txt"]
    )


def test_broken_images_are_reported_and_left_out(run, gallery, tmp_path):
    (gallery / "cut.png").write_bytes((gallery / "10.png").read_bytes()[:500])
    (gallery / "empty.jpg").write_bytes(b"")
    (gallery / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with contextlib.suppress(OSError):  # some file systems refuse names that are not UTF-8
        (gallery / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no image")
    found = search.search(gallery / "10.png", gallery, run, device="cpu", features=tmp_path / "features.npz")
    assert len(found.broken) >= 4 and all(any(name in s for s in found.broken) for name in ("cut", "empty", "dangling"))
    assert sorted(names(found)) == ["1.tif", "2.webp", "3.bmp"]


def test_counts_of_a_thermal_camera_are_refused_because_their_range_is_not_known(run, gallery):
    counts = 7000 + 4 * np.asarray(photograph(1).convert("L"), dtype=np.uint16)
    Image.fromarray(counts).save(gallery / "deep.png")
    found = search.search(gallery / "10.png", gallery, run, device="cpu")
    assert "deep.png" not in names(found) and any("deep.png" in sentence for sentence in found.broken)


def test_results_do_not_depend_on_the_batch(run, gallery, monkeypatch):
    whole = search.search(gallery / "10.png", gallery, run, device="cpu")
    monkeypatch.setattr(search, "BATCH", 1)
    alone = search.search(gallery / "10.png", gallery, run, device="cpu")
    assert names(whole) == names(alone)
    np.testing.assert_allclose(whole.distances, alone.distances, atol=1e-6)


def test_unusable_input_is_a_study_error(run, gallery, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    query = gallery / "10.png"
    for arguments in (
        (tmp_path / "absent.png", gallery, run),
        (tmp_path / "broken.png", gallery, run),
        ([query, gallery], gallery, run),
        (query, tmp_path / "absent", run),
        (query, query, run),
        (query, tmp_path / "empty", run),
        (query, gallery, tmp_path / "empty"),
    ):
        with pytest.raises(StudyError):
            search.search(*arguments, device="cpu")
    with pytest.raises(StudyError):
        search.search(query, gallery, write_run(tmp_path / "two", stem="two"), device="cpu")


def test_the_figure_has_all_queries_and_readable_names(run, gallery, tmp_path):
    query = tmp_path / "a $name$ with a very long file name indeed.png"
    photograph(1, seed=9).save(query)
    found = search.search([query, gallery / "10.png"], gallery, run, device="cpu")
    figure = found.figure(top=3)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert any(text.startswith("1 · ") and "2.webp" in text for text in texts)
    assert sum("query" in text.split("\n") for text in texts) == 2
    assert all(path.stat().st_size for path in figures.save(figure, tmp_path / "out"))


def test_the_command_prints_ranks_and_what_is_left_out(run, gallery, tmp_path):
    (gallery / "cut.png").write_bytes(b"no image")
    command = ["--query", gallery / "10.png", gallery / "2.webp", "--gallery", gallery, "--run", run, "--device", "cpu"]
    command += ["--top", "2", "--out", tmp_path / "ranked", "--features", tmp_path / "feat.npz"]
    out, left_out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(left_out):
        assert search.main([str(word) for word in command]) == 0
        assert search.main(["--query", "absent.png", "--gallery", str(gallery), "--run", str(run)]) == 1
    assert out.getvalue().count("distance") == 2 and str(gallery / "sub") in out.getvalue()
    assert "cut.png" in left_out.getvalue() and "notes.txt" in left_out.getvalue()
    assert (tmp_path / "ranked.png").exists() and (tmp_path / "feat.npz").exists()


def test_notebook_08_writes_its_figure(run, gallery, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queries = [str(gallery / "10.png"), str(gallery / "2.webp")]
    values = run_notebook("08_search", queries=queries, gallery=str(gallery), run=str(run), device="cpu")
    assert len(values["found"].order) == 2 and (tmp_path / "build/search/ranked.png").exists()
