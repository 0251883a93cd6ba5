"""Several processes train what one would: the same batches, losses, gradients, files and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from danet_core.config import RunConfig, load_study
from danet_core.files import StudyError, read_json
from danet_core.parallel import ALONE, Team
from danet_core.record import RunFolder
from danet_core.train import _require_divisible, build_model, train
from tests.fixtures import team as of_team
from tests.fixtures.faults import packed_project
from tests.fixtures.pipeline import copy_project
from tests.stores import PARAMS, small_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun is told to stop by POSIX signals")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in: packed images, weights, and a params.yaml with the numbers lowered."""
    root = packed_project(tmp_path_factory.mktemp("project"))
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    row = params["datasets"]["synth_sysu"]
    row["image"] = {"height": 32, "width": 16}
    small = {"width": 8, "ids_per_batch": 4, "imgs_per_modality": 2, "epochs": 8, "steps_per_epoch": 15}
    row["recipe"] |= {**small, "milestones": [6], "lr": 1e-4}
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return root


def torchrun(count: int, cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(cwd if (cwd / "tools").exists() else ROOT),
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*command, "-m", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(process: subprocess.Popen[str], start: str) -> list[str]:
    """The lines it writes, up to the first that starts so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError("".join(lines))


# ---------------------------------------------------------------- one and N processes: losses and gradients


@pytest.fixture(scope="module")
def one(project: Path) -> dict[str, torch.Tensor]:
    return of_team.everything(project, ALONE)


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of 2 and of 4 processes found."""
    out = tmp_path_factory.mktemp("found")
    process = torchrun(request.param, ROOT, "tests.fixtures.team", str(project), str(out))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return [torch.load(out / f"{rank}-of-{request.param}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("part", ["alone", *of_team.VARIANTS])
def test_losses_gradients_and_statistics_are_those_of_one_process_to_1e_9_in_every_process(one, several, part):
    expected = {name: value for name, value in one.items() if name.startswith(f"{part} ")}
    assert any("gradient" in name for name in expected)
    assert all(value.dtype == torch.float64 for name, value in expected.items() if "num_batches" not in name)
    for found in several:
        same = {name: value for name, value in found.items() if name.startswith(f"{part} ")}
        assert same.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(same[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_every_image_is_augmented_as_it_is_by_one_process(one, several):
    for found in several:
        for batch in ("augmented 0", "augmented 1"):
            assert torch.equal(found[batch], one[batch])


def test_heads_without_a_loss_get_no_gradient_so_that_weight_decay_leaves_them_alone(several):
    for found in several:
        assert "baseline 1 gradient classifier.weight" in found
        assert "baseline 1 gradient classifier_visible.weight" not in found


def test_batch_norm_of_each_process_changes_the_result_but_not_that_all_processes_share_it(one, several):
    names = [name for name in several[0] if name.startswith("per_process ")]
    assert names
    for found in several[1:]:
        for name in names:
            torch.testing.assert_close(found[name], several[0][name], rtol=1e-12, atol=1e-12, msg=name)
    loss = "0 loss total"
    assert abs(several[0][f"per_process {loss}"] - one[f"b_ml_cc {loss}"]) > 1e-3


# ---------------------------------------------------------------- a run under torchrun


@pytest.fixture(scope="module")
def config(project: Path) -> RunConfig:
    return load_study(project / "params.yaml").run("synth_sysu", "b_ml_cc", 1, 0)


def trained(project: Path, config: RunConfig, out: Path, lines: list[str]) -> tuple[RunFolder, dict]:
    folder = RunFolder.of(config, out / "runs", out / "build")
    places = {"packed": project / "data/packed", "weights": project / "data/weights"}
    return folder, train(config, folder, **places, device="cpu", log=lines.append)


def test_a_run_of_two_processes_that_is_killed_then_stopped_then_resumed_by_one_ends_as_a_run_of_one(
    project: Path, config: RunConfig, tmp_path: Path
) -> None:
    command = ["danet_core", "train", "--dataset", "synth_sysu", "--variant", "b_ml_cc", "--device", "cpu"]
    folder = RunFolder.of(config, project / "runs", project / "build")

    process = torchrun(2, project, *command)
    until(process, "epoch   1/8")
    workers = psutil.Process(process.pid).children()
    second = next(worker for worker in workers if worker.environ()["RANK"] == "1")
    second.kill()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: process 1 of 2: another process has ended, and none goes on without it" in said
    assert not any(worker.is_running() for worker in workers)
    assert folder.checkpoint.exists() and not folder.record.exists()

    process = torchrun(2, project, *command)
    until(process, "resumed synth_sysu/b_ml_cc-t1-s0 after epoch")
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    done = len(torch.load(folder.checkpoint, weights_only=True)["history"])
    for number in (1, 2):
        assert f"error: process {number} of 2: stopped by SIGTERM after epoch {done} of 8, whose checkpoint" in said
    assert not any(worker.is_running() for worker in workers)
    assert process.returncode != 0 and 1 < done < 8

    lines: list[str] = []
    _, record = trained(project, config, project, lines)
    assert lines[0] == f"resumed synth_sysu/b_ml_cc-t1-s0 after epoch {done} of 8"
    assert record["provenance"]["processes"] == [2, 1]
    whole, expected = trained(project, config, tmp_path, [])
    assert expected["provenance"]["processes"] == [1]
    for row, other in zip(record["history"], expected["history"], strict=True):
        for term in ("L_id", "L_cc", "L_sid", "L_M", "total"):
            assert row[term] == pytest.approx(other[term], rel=1e-4), (row["epoch"], term)
    # Sums of float32 in another order differ in the last digit, and Adam divides a gradient by its own size: a weight
    # whose gradient is rounding only goes its own way. So the distance is held against the way that training went.
    ends, start = (load_file(path.model) for path in (whole, folder)), build_model(config.dataset, 6, None)
    here, there = ends
    weights = [name for name, parameter in start.named_parameters() if parameter.requires_grad]
    first = load_file(project / "data/weights/synth_sysu.safetensors")
    names = [name for name in weights if name.removeprefix("backbone.") in first]
    moved = sum((here[name] - first[name.removeprefix("backbone.")]).square().sum() for name in names).sqrt()
    apart = sum((here[name] - there[name]).square().sum() for name in names).sqrt()
    print(f"weights moved by {moved:.3g} and are {apart:.3g} apart")
    assert apart < 1e-3 * moved  # found: 1e-6


def test_the_training_notebook_under_torchrun_is_one_run_of_all_processes_and_one_executed_copy(
    project: Path, tmp_path: Path
) -> None:
    root = copy_project(tmp_path / "danet")  # a kernel works in the folder of the runner's own code
    (root / "data").symlink_to(project / "data")
    (root / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
    words = ["-p", "variant", "b_ml_cc", "-p", "device", "cpu"]
    process = torchrun(2, root, "tools.notebook", "notebooks/02_train.ipynb", "executed/train.ipynb", *words)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    config = load_study(root / "params.yaml").run("synth_sysu", "b_ml_cc", 1, 0)
    record = read_json(RunFolder.of(config, root / "runs", root / "build").record)
    assert record["provenance"]["processes"] == [2]
    assert [path.name for path in (root / "executed").iterdir() if path.suffix == ".ipynb"] == ["train.ipynb"]


def test_the_command_without_torchrun_trains_in_one_process_what_the_notebook_does(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danet_core.__main__ import main

    out = tmp_path / "out"
    out.mkdir()
    (out / "data").symlink_to(project / "data")
    text = (project / "params.yaml").read_text(encoding="utf-8").replace("epochs: 8", "epochs: 2")
    (out / "params.yaml").write_text(text.replace("- 6\n", "- 1\n"), encoding="utf-8")
    monkeypatch.chdir(out)
    assert main(["train", "--dataset", "synth_sysu", "--variant", "baseline", "--seed", "3", "--device", "cpu"]) == 0
    config = load_study(out / "params.yaml").run("synth_sysu", "baseline", 1, 3)
    folder, _ = trained(project, config, tmp_path / "called", [])
    assert (out / "runs/synth_sysu/baseline-t1-s3/model.safetensors").read_bytes() == folder.model.read_bytes()
    assert read_json(out / "runs/synth_sysu/baseline-t1-s3/record.json")["provenance"]["processes"] == [1]


def test_the_command_names_an_unknown_variant_in_a_sentence(project, monkeypatch, capsys):
    from danet_core.__main__ import main

    monkeypatch.chdir(project)
    assert main(["train", "--dataset", "synth_sysu", "--variant", "b_cm"]) == 1
    assert "error: unknown variant 'b_cm'" in capsys.readouterr().err


# ---------------------------------------------------------------- sharing out


def test_the_shares_of_the_processes_are_equal_and_together_the_batch_in_its_order():
    shares = [np.arange(16)[Team(rank, 4).rows(16)] for rank in range(4)]
    assert {len(share) for share in shares} == {4}
    assert np.concatenate(shares).tolist() == list(range(16))


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused_with_what_to_change():
    with pytest.raises(StudyError, match="a batch of 16 images cannot be split evenly between 3 processes; start"):
        Team(0, 3).rows(16)


def require_divisible(config: RunConfig, size: int) -> None:
    _require_divisible(config.dataset.recipe, config.variant, Team(0, size))


def test_one_image_to_a_process_is_refused_where_batch_norm_is_each_processs_own():
    require_divisible(small_config(), 16)
    require_divisible(small_config(batch_norm="per_process"), 8)
    with pytest.raises(StudyError, match="with 16 processes leaves one image to each, which has no variance; start"):
        require_divisible(small_config(batch_norm="per_process"), 16)


def test_two_entrances_are_refused_processes_that_do_not_have_whole_identities():
    config = small_config(variant="two_stream")
    identities = config.dataset.recipe.ids_per_batch
    require_divisible(config, identities)
    with pytest.raises(StudyError, match=f"{identities} identities cannot be split between {2 * identities} processes"):
        require_divisible(config, 2 * identities)


def test_a_process_whose_torchrun_has_gone_ends():
    with pytest.raises(StudyError, match="torchrun has ended, and its processes end with it"):
        Team(1, 2, parent=os.getppid() + 1).any(False)
