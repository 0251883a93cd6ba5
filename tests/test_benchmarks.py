"""A benchmark run writes a whole page; how long anything takes is never asserted."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import time
import weakref

import numpy as np
import pytest
import torch
import yaml

from benchmarks import losses, pipeline, run, step
from benchmarks.measure import Times, growth, interleaved, page, table
from danet_core.config import load_study
from danet_core.durations import timed

QUANTITY = r"\d[\d,.]* ± \d[\d,.]* (s|ms|us)"


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a page as cells, header first."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]


def test_a_tiny_run_of_all_parts_writes_a_page_of_whole_tables_with_hardware_versions_and_every_loss(tmp_path):
    out = tmp_path / "RESULTS.md"
    assert run.main(["--tiny", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    headings = ["Training step", "Losses", "Evaluation", "Large galleries", "Rendering and packing"]
    headings += ["Start-up of a notebook stage", "Notebook 06, from a control to its pictures", "`make repro` by stage"]
    assert re.findall("^## (.*)$", text, flags=re.MULTILINE) == headings
    for found in tables(text):
        assert len({len(line) for line in found}) == 1
        assert all(cell for line in found[2:] for cell in line[:-1])
    names = {line[0]: line[1:] for found in tables(text) for line in found[2:]}
    assert {"processor", "memory", "GPU", "versions", "code"} <= names.keys()
    for equation in range(1, 6):
        cells = next(cells for name, cells in names.items() if name.startswith(f"Eq. {equation},"))
        assert re.fullmatch(QUANTITY, cells[0]) and re.fullmatch(QUANTITY, cells[2])
    for part in ("gather", "augment", "forward", "losses", "backward", "optimiser", step.PARTS[-1]):
        assert re.fullmatch(QUANTITY, names[part][0]) and names[part][1].endswith(" %")
    assert str(run.ROOT) not in text and str(tmp_path) not in text
    assert all(name in text for name in run._MEMORY)


def test_a_part_can_be_measured_alone_and_is_printed_not_written(tmp_path, capsys):
    out = tmp_path / "RESULTS.md"
    assert run.main(["pipeline", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("## `make repro` by stage\n")
    assert not out.exists()
    with pytest.raises(SystemExit):
        run.main(["steps"])


def test_a_part_that_fails_ends_the_run_and_leaves_the_page_as_it_was(tmp_path, capsys, monkeypatch):
    out = tmp_path / "RESULTS.md"
    out.write_text("before", encoding="utf-8")
    monkeypatch.setattr(run, "PARTS", ("pipeline", "nothing"))
    assert run.main(["--tiny", "--out", str(out)]) == 1
    assert "benchmark nothing ended with status 1" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "before"


def test_a_time_is_shown_as_its_median_and_half_the_distance_of_its_quartiles_in_a_fitting_unit():
    assert str(Times(np.array([1.0, 2.0, 3.0, 4.0, 50.0]))) == "3.00 ± 1.00 s"
    assert str(Times(np.array([0.0123]))) == "12.3 ± 0.00 ms"
    assert str(Times(np.array([4e-7]))) == "0.40 ± 0.00 us"


def test_a_ratio_is_taken_round_by_round():
    quiet_then_busy = Times(np.array([1.0, 10.0, 100.0]))
    assert Times(2 * quiet_then_busy.seconds).over(quiet_then_busy) == "2.00 ± 0.00"


def test_actions_are_measured_in_turn_after_one_call_each():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, {"b": 2})
    assert calls == ["a", "b", "a", "b", "b", "a", "b", "b"]
    assert {name: len(found.seconds) for name, found in times.items()} == {"a": 2, "b": 2}


def test_growth_names_the_factor_of_each_step_and_a_page_wraps_only_its_prose():
    found = growth("images", [8, 16], [Times(np.array([1.0])), Times(np.array([3.0]))])
    assert found.splitlines()[2:] == ["| 8 | 1.00 ± 0.00 s |  |", "| 16 | 3.00 ± 0.00 s | 3.00 |"]
    wide = table(("a" * 200, "b"), [])
    assert page("# title", "word " * 40, wide).splitlines() == [
        "# title",
        "",
        *[("word " * 23).strip(), ("word " * 17).strip()],
        "",
        *wide.splitlines(),
    ]


def test_a_measured_network_is_gone_with_its_last_name_so_that_the_next_ones_memory_is_its_own():
    config = step.with_recipe(load_study().run("synth_sysu", "b_ml_cc", 1, 0), width=8, imgs_per_modality=1)
    gc.disable()
    try:
        with step.bench(config, 16, torch.device("cpu")) as full:
            assert "above the store" in step.memory_of(full)
            bare = step.Bare(full)
            bare.step()
            assert len(full.parts()) == len(step.PARTS)
            names = [weakref.ref(name) for name in (full, full.model, full.optimiser, full.images, bare, bare.model)]
        del full, bare
        assert [name() for name in names] == [None] * len(names)
    finally:
        gc.enable()


@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["far apart", "nearer than the margin"])
def test_the_loops_over_anchors_are_the_losses_in_value_and_gradient(spread):
    found = {}
    for ways in (losses.vectorised, losses.loops):
        inputs = losses.Inputs(4, 4, 16, 8)
        inputs.feat.data *= spread
        leaves = (inputs.feat, inputs.visible, inputs.infrared)
        for name, value in ways(inputs).items():
            inputs.run(value)()
            found.setdefault(name, []).append([value().detach(), *(leaf.grad for leaf in leaves)])
    assert len(found) == 5
    for fast, loop in found.values():
        for ours, other in zip(fast, loop, strict=True):
            assert (ours is None) == (other is None)
            if ours is not None:
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_the_pipelines_stages_are_read_from_what_the_study_left_and_no_other(tmp_path):
    folder = tmp_path / "build/executed"
    folder.mkdir(parents=True)
    names = ("train-synth_sysu-b_cc-t1-s0", "train-synth_regdb-baseline-t1-s0", "train-synth_sysu-b_cc-t1-s77")
    names += ("tables-synth_sysu", "tables-other", "other")
    for name, seconds in zip(names, (60.0, 40.0, 7.0, 3.0, 7.0, 7.0), strict=True):
        notebook = {"metadata": {"papermill": {"duration": seconds}}}
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    for stage in ("pack-synth_sysu", "pack-other"):
        with timed(stage, tmp_path):
            time.sleep(0.25)
    with contextlib.suppress(KeyError), timed("pack-synth_regdb", tmp_path):
        raise KeyError
    found = {line[0]: line[1:] for line in tables(pipeline.section(True, tmp_path))[0][2:]}
    study = load_study().study
    runs = len(study.variants) * len(study.seeds) * (len(study.sysu) + len(study.regdb) * len(study.trials))
    assert found["train"] == [f"2 of {runs}", "50.0 ± 5.00 s", "100 s"]
    assert found["tables"][0] == f"1 of {len(study.datasets)}"
    assert found["evaluate"] == [f"0 of {runs}", "not run", "not run"]
    assert found["pack"][0] == f"1 of {len(study.datasets)}"
    assert 250 <= float(found["pack"][1].split()[0]) < 1000
    assert found["report"] == ["0 of 1", "not run", "not run"]


def test_the_stages_looked_for_are_those_that_the_pipeline_has_and_their_notebooks_those_it_writes():
    text = (run.ROOT / "dvc.yaml").read_text(encoding="utf-8")
    ends = {"train": "-${item.dataset}-${item.variant}-t${item.trial}-s${item.seed}.ipynb"}
    ends |= {"evaluate": ends["train"], "tables": "-${item.dataset}.ipynb", "figures": "-${item.dataset}.ipynb"}
    study = load_study()
    chosen = study.study
    item = {"dataset": chosen.datasets[0], "variant": chosen.variants[0], "trial": 1, "seed": chosen.seeds[0]}
    found = pipeline.stages(study)
    listed = dict.fromkeys(re.sub("_(sysu|regdb)$", "", stage) for stage in yaml.safe_load(text)["stages"])
    assert [stage for stage in listed if stage in found] == list(found)
    assert listed.keys() - found.keys() == {"notebooks", "readme", "readings", "readings_train", "readings_score"}
    for stage, end in ends.items():
        assert f" build/executed/{stage}{end}" in text
        name = re.sub(r"\$\{item\.(\w+)\}", lambda match: str(item[match[1]]), f"{stage}{end}")
        assert name.removesuffix(".ipynb") in found[stage]
