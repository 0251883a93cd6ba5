"""The examples of docs/extend.md work as they are printed there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from danet_core import backbone
from danet_core.backbone import BasicBlock, Bottleneck, ResNet
from danet_core.model import DANet
from danet_study.checkpoint import CHECKPOINTS
from danet_study.config import Study, load_study, write_configs
from danet_study.evaluate import evaluate
from danet_study.files import StudyError, read_json
from danet_study.store import PackedStore
from danet_study.tables import write_tables
from danet_study.train import train
from data_prep import llcm
from data_prep.index import inventory, prepare, read
from data_prep.pack import pack
from tests import trees
from tests.stores import ROOT, SMALL, make_project, small_params, small_run

TEXT = (ROOT / "docs/extend.md").read_text(encoding="utf-8")


def rows(number: int) -> dict[str, Any]:
    """The YAML block of that number in the text."""
    return YAML(typ="safe").load(re.findall(r"```yaml\n(.*?)```", TEXT, re.S)[number])


def silent(line: str) -> None:
    pass


def test_every_python_line_that_is_printed_is_in_the_code_it_describes():
    code = "".join((ROOT / name).read_text() for name in ("docs/examples/my_losses.py", "data_prep/folder.py"))
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for line in "".join(blocks[:2]).splitlines():
        assert line.strip('"').removesuffix('"""') in code
    assert eval(f"{{{blocks[2]}}}", {"Bottleneck": Bottleneck}) == {"resnet101": (Bottleneck, (3, 4, 23, 3))}
    assert all((ROOT / path).exists() for path in re.findall(r"`(\w+/\w+\.py)`", TEXT))


def test_a_fifth_variant_with_a_loss_of_ones_own_trains_and_is_scored_like_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path, ("synth_sysu",)))
    study = load_study(small_params(tmp_path, **rows(0)))
    config = study.run("synth_sysu-1", "b_mine", 0)
    assert config.losses["docs.examples.my_losses.my_loss"] == {"weight": 0.5, "scale": 2.0}
    history = train(config, device="cpu", log=silent)["history"]
    term = "docs.examples.my_losses.my_loss"
    assert history[-1][term] < history[0][term]
    assert history[0]["total"] == pytest.approx(history[0]["L_id"] + 0.5 * history[0][term])
    assert evaluate(config, device="cpu")["training"]["final"].keys() >= {"L_id", term}


def test_an_edited_loss_is_noticed_by_the_pipeline_and_by_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    folder = tmp_path / "docs/examples"  # own_code
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(folder)
    module = folder / "edited_losses.py"
    module.write_text((ROOT / "docs/examples/my_losses.py").read_text())
    row = {"label": "x", "losses": {"edited_losses.my_loss": {"weight": 0.5}}}
    study = load_study(small_params(tmp_path, variants={"b_mine": row}, study={"variants": ["baseline", "b_mine"]}))
    config = study.run("synth_sysu-1", "b_mine", 0)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, device="cpu", log=stop)
    inputs = []
    for file, addition in ((module, ""), (module, "# edited\n"), (folder / "helper.py", "FACTOR = 2.0\n")):
        file.write_text((file.read_text() if file.exists() else "") + addition)
        write_configs(study)
        inputs.append([read_json(Path(f"build/configs/synth_sysu-1-{row}-0.json")) for row in ("baseline", "b_mine")])
    assert all(one[0] == inputs[0][0] for one in inputs) and len({str(one[1]) for one in inputs}) == 3
    with pytest.raises(StudyError, match="losses"):
        train(config, device="cpu", log=silent)
    assert list(CHECKPOINTS.glob("*.pt"))
    with pytest.raises(StudyError):  # DVC watches another folder
        write_configs(study.model_copy(update={"own_code": "elsewhere"}))


def test_examples_are_found_from_the_projects_root():
    code = "from danet_core.losses import find_term; print(find_term('docs.examples.my_losses.my_loss').__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "my_loss"


def photographs(root: Path, identities: int = 10, images: int = 2) -> None:
    """visible/<id>/*.png and infrared/<id>/*.png: an identity is one picture plus noise."""
    generator = np.random.default_rng(0)
    for pid in range(1, identities + 1):
        picture = generator.integers(40, 216, (40, 36, 3))
        for modality in ("visible", "infrared"):
            folder = root / modality / f"{pid:03d}"
            folder.mkdir(parents=True)
            for number in range(images):
                noisy = (picture + generator.integers(-20, 21, picture.shape)).astype(np.uint8)
                image = Image.fromarray(noisy)
                (image.convert("L") if modality == "infrared" else image).save(folder / f"{number}.png")
    (root / "README.txt").write_text("mine")


def own_study(folder: Path, name: str, **plan: Any) -> Study:
    """A study of the row `name` of params.yaml alone, shrunk, with weights that fit it."""
    row = YAML(typ="safe").load((ROOT / "params.yaml").read_text())["datasets"][name]
    small = {"image": {"height": 32, "width": 32}, "recipe": {**SMALL, "backbone": "resnet18", "width": 8}}
    small["recipe"]["ids_per_batch"] = 3
    plan = plan or {"datasets": [name], "photographs": [name], "splits": [f"{name}-1"]}
    Path("data/weights").mkdir(parents=True)
    save_file(ResNet("resnet18", 8).state_dict(), f"data/weights/{name}.safetensors")
    shutil.copytree(ROOT / "results/paper", "results/paper")
    return load_study(small_params(folder, datasets={name: {**row, **small}}, study=plan))


def run_all(study: Study, name: str, variants: int) -> tuple[PackedStore, list[dict[str, Any]], dict[str, str]]:
    """The ordinary stages: prepare, pack, train and evaluate the first variants, tables. Store, records, tables."""
    dataset = study.dataset(name)
    prepare(dataset, ids_per_batch=3)
    pack(dataset, workers=1)
    records = []
    for config in study.runs()[:variants]:
        train(config, device="cpu", log=silent)
        records.append(evaluate(config, device="cpu"))
    return PackedStore.open(f"data/packed/{name}"), records, {p.name: p.read_text() for p in write_tables(study, name)}


def test_ten_people_in_two_folders_are_prepared_packed_trained_on_scored_and_tabled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = own_study(tmp_path, "mine", **rows(1)["study"])
    dataset = study.dataset("mine")
    photographs(tmp_path / dataset.root)
    store, records, texts = run_all(study, "mine", variants=2)
    index, stored = read(dataset), store.manifest.drop(columns="row")
    assert len(stored) == 40 and index.skipped == ["README.txt"] and stored.equals(index.manifest)
    train_ids, test_ids = (set(store.pids[store.rows(split)]) for split in ("train", "test"))
    assert len(train_ids) == len(test_ids) == 5 and not train_ids & test_ids
    for record in records:
        assert record["settings"].keys() == {"infrared_to_visible", "visible_to_infrared"} and not record["synthetic"]
        assert record["settings"]["infrared_to_visible"]["n_query"] == 10
    assert texts.keys() >= {"ablation.md", "settings.md", "findings.md"} and "paper: " not in texts["settings.md"]
    before = inventory(dataset)
    monkeypatch.setattr("data_prep.index.sha256_file", lambda path: f"{path.name} was edited")
    assert inventory(dataset) == {**before, "reader_sha256": "folder.py was edited"}


def test_llcm_goes_through_the_same_stages_and_its_table_quotes_the_corrected_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llcm, "PUBLISHED", trees.counts_of_llcm())
    study = own_study(tmp_path, "llcm")
    trees.write_llcm(tmp_path / study.dataset("llcm").root)
    _, (record,), texts = run_all(study, "llcm", variants=1)
    found = {
        key: (one["n_query"], one["gallery_size"], len(one["per_trial"]["mAP"]))
        for key, one in record["settings"].items()
    }
    assert found == {"infrared_to_visible": (16, 12, 10), "visible_to_infrared": (8, 24, 10)}
    caption = texts["settings.md"].splitlines()[0]
    assert "does not mirror" in caption and len(caption.split()) <= 40
    assert re.search(r"ZYK100/LLCM: DEEN +\| +69.21 \| +90.95 \| +95.07 \| +55.52", texts["settings.md"])
    assert "paper" not in texts["settings.md"] and "DEEN" not in texts["ablation.md"]


def test_a_folder_of_another_layout_or_with_too_few_people_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_study(small_params(tmp_path)).dataset("mine")
    root = tmp_path / dataset.root
    for make in (lambda: root.mkdir(parents=True), lambda: photographs(root / "deeper"), lambda: photographs(root, 6)):
        make()
        with pytest.raises(StudyError) as caught:
            prepare(dataset, ids_per_batch=4)
        assert len(str(caught.value).splitlines()) == 1


def test_a_row_that_names_a_reader_of_ones_own_is_valid(tmp_path):
    study = load_study(small_params(tmp_path, **rows(2)))
    assert study.dataset("theirs").protocol == "both_ways"


def test_a_backbone_is_one_line_of_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path, ("synth_sysu",)))
    monkeypatch.setitem(backbone.ARCHITECTURES, "resnet10", (BasicBlock, (1, 1, 1, 1)))
    save_file(ResNet("resnet10", 8).state_dict(), "data/weights/synth_sysu.safetensors")
    config = small_run("baseline")
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"backbone": "resnet10"})})
    train(config, device="cpu", log=silent)
    monkeypatch.setitem(backbone.ARCHITECTURES, "resnet101", (Bottleneck, (3, 4, 23, 3)))
    with torch.device("meta"):
        assert sum(p.numel() for p in DANet(395, "resnet101").parameters()) > 42e6
    assert rows(3)["datasets"]["sysu"]["recipe"] == {"backbone": "resnet101"}
