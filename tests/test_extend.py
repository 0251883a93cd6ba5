"""The examples of docs/extend.md work as they are printed there."""

from __future__ import annotations

import re
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
from danet_study.config import load_study, write_configs
from danet_study.evaluate import evaluate
from danet_study.files import StudyError, read_json
from danet_study.store import PackedStore
from danet_study.train import train
from data_prep.index import prepare, read
from data_prep.pack import pack
from tests.stores import ROOT, SMALL, make_project, small_params, small_run

TEXT = (ROOT / "docs/extend.md").read_text(encoding="utf-8")


def rows(number: int) -> dict[str, Any]:
    """The YAML block of that number in the text."""
    return YAML(typ="safe").load(re.findall(r"```yaml\n(.*?)```", TEXT, re.S)[number])


def silent(line: str) -> None:
    pass


def test_every_python_line_that_is_printed_is_in_the_code_it_describes():
    code = "".join((ROOT / name).read_text() for name in ("docs/examples/my_losses.py", "docs/examples/my_reader.py"))
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for line in "".join(blocks[:2]).splitlines():
        assert line.strip('"').removesuffix('"""') in code
    assert eval(f"{{{blocks[2]}}}", {"Bottleneck": Bottleneck}) == {"resnet101": (Bottleneck, (3, 4, 23, 3))}
    for path in re.findall(r"\]\((examples/\w+\.py)\)", TEXT) + re.findall(r"`(\w+/\w+\.py)`", TEXT):
        assert (ROOT / "docs" / path).exists() or (ROOT / path).exists(), path


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
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "edited_losses.py"
    module.write_text((ROOT / "docs/examples/my_losses.py").read_text())
    row = {"label": "x", "losses": {"edited_losses.my_loss": {"weight": 0.5}}}
    study = load_study(small_params(tmp_path, variants={"b_mine": row}, study={"variants": ["baseline", "b_mine"]}))
    config = study.run("synth_sysu-1", "b_mine", 0)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, device="cpu", log=stop)
    inputs = []
    for addition in ("", "# edited\n"):
        module.write_text(module.read_text() + addition)
        write_configs(study)
        inputs.append([read_json(Path(f"build/configs/synth_sysu-1-{row}-0.json")) for row in ("baseline", "b_mine")])
    assert inputs[0][0] == inputs[1][0] and inputs[0][1] != inputs[1][1]
    with pytest.raises(StudyError, match="losses"):
        train(config, device="cpu", log=silent)
    assert list(CHECKPOINTS.glob("*.pt"))


def test_examples_are_found_from_the_projects_root():
    code = "from danet_core.losses import find_term; print(find_term('docs.examples.my_losses.my_loss').__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "my_loss"


def photographs(root: Path, identities: int = 12, images: int = 3) -> None:
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


def test_a_data_set_of_ones_own_is_prepared_packed_trained_on_and_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = rows(1)
    mine["datasets"]["mine"] |= {"image": {"height": 32, "width": 32}}
    mine["datasets"]["mine"]["recipe"] |= {**SMALL, "backbone": "resnet18", "width": 8}
    study = load_study(small_params(tmp_path, **mine))
    dataset = study.dataset("mine")
    photographs(tmp_path / dataset.root)
    index = prepare(dataset, ids_per_batch=4)
    assert len(index.manifest) == 72 and index.skipped == ["README.txt"] and not index.findings
    pack(dataset, workers=1)
    store = PackedStore.open("data/packed/mine")
    train_ids, test_ids = (set(store.pids[store.rows(split)]) for split in ("train", "test"))
    assert len(train_ids) == len(test_ids) == 6 and not train_ids & test_ids
    assert index.manifest.equals(read(dataset).manifest)  # the split is the same every time
    Path("data/weights").mkdir()
    save_file(ResNet("resnet18", 8).state_dict(), "data/weights/mine.safetensors")
    (config, *_) = study.runs()
    assert config.name == "mine-1-baseline-0"
    train(config, device="cpu", log=silent)
    record = evaluate(config, device="cpu")
    assert record["settings"].keys() == {"thermal_to_visible", "visible_to_thermal"} and not record["synthetic"]
    assert record["settings"]["thermal_to_visible"]["n_query"] == 18


def test_a_folder_of_another_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_study(small_params(tmp_path, **rows(1))).dataset("mine")
    for make in (lambda root: root.mkdir(parents=True), lambda root: photographs(root / "deeper")):
        make(tmp_path / dataset.root)
        with pytest.raises(StudyError):
            prepare(dataset)


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
    assert rows(2)["datasets"]["sysu"]["recipe"] == {"backbone": "resnet101"}
