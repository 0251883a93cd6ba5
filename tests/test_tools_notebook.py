"""The notebook runner, its kernel and the stripped copies, with real kernels and real kills."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from danet_core.files import StudyError
from tools.notebook import LineWriter, NotebookError, declared_parameters, main, parse_parameters
from tools.strip import strip, stripped

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = """\
variant = "baseline"  # a row of params.yaml
seed = 0
rate: float = 0.5
smoke = False
ids = [1, 2]
free = None"""


def write(path: Path, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    """A notebook at `path`: an introduction, the parameters cell, then one code cell for each source."""
    cells = [new_markdown_cell("# A question"), new_code_cell("import os, sys, time")]
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nbformat.write(new_notebook(cells=cells + [new_code_cell(source) for source in sources]), path)
    return path


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A runner in a process of its own, whose output can be read."""
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"} | options.pop("env", {})
    command = [sys.executable, "-m", "tools.notebook", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        options.pop("command", command),
        cwd=ROOT,
        env=environment,
        preexec_fn=heed_signals if os.name == "posix" else None,
        **pipes,
        **options,
    )


def heed_signals() -> None:
    """Under nohup or as a shell's background job the tests themselves ignore these, and children would inherit it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def kernel_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The kernel whose process id the notebook prints as `kernel N`."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"kernel (\d+)", line):
            return psutil.Process(int(found[1]))
    raise AssertionError(f"no kernel reported: {process.stderr.read() if process.stderr else ''}")


def ends(process: psutil.Process, seconds: float = 20) -> bool:
    """Whether the process goes within the time; a zombie nobody has waited for has gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


# -- parameters ------------------------------------------------------------------------------------------------------


def test_declared_parameters_are_the_literals_of_the_tagged_cell(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb")
    expected = {"variant": "baseline", "seed": 0, "rate": 0.5, "smoke": False, "ids": [1, 2], "free": None}
    assert declared_parameters(notebook) == expected
    strip(notebook, tmp_path / "s.ipynb")
    assert set(papermill.inspect_notebook(tmp_path / "s.ipynb")) == set(expected), "as papermill sees it"


def test_a_notebook_without_tagged_cell_has_no_parameters(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb", parameters=None)
    assert declared_parameters(notebook) == {}
    with pytest.raises(NotebookError, match="no parameter `seed`; it has none"):
        parse_parameters(notebook, [("seed", "1")])


@pytest.mark.parametrize("source", ["seed = int(3)", "import os", "a, b = 1, 2", "seed =", "for i in []: pass"])
def test_a_parameters_cell_with_more_than_literals_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(NotebookError, match="name = literal"):
        declared_parameters(write(tmp_path / "a.ipynb", parameters=source))


def test_two_parameters_cells_are_refused(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb")
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(new_code_cell("seed = 1", metadata={"tags": ["parameters"]}))
    nbformat.write(content, notebook)
    with pytest.raises(NotebookError, match="2 cells tagged"):
        declared_parameters(notebook)


def test_values_get_the_type_of_the_default(tmp_path: Path) -> None:
    pairs = [("variant", "007"), ("seed", "-3"), ("rate", "1e-3"), ("smoke", "true"), ("ids", "[3]"), ("free", "x")]
    values = parse_parameters(write(tmp_path / "a.ipynb"), pairs)
    assert values == {"variant": "007", "seed": -3, "rate": 0.001, "smoke": True, "ids": [3], "free": "x"}
    assert type(parse_parameters(tmp_path / "a.ipynb", [("rate", "2")])["rate"]) is float


@pytest.mark.parametrize(
    "name, text",
    [("seed", "1.5"), ("seed", "true"), ("seed", "b_cc"), ("rate", "fast"), ("rate", "nan"), ("rate", "inf")]
    + [("smoke", "1"), ("smoke", "maybe"), ("ids", "3"), ("ids", "[3"), ("seed", "")],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(NotebookError, match=f"`{name}` .* is of type .* not {re.escape(repr(text))}"):
        parse_parameters(write(tmp_path / "a.ipynb"), [(name, text)])


def test_a_parameter_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="`seed` .* given twice"):
        parse_parameters(write(tmp_path / "a.ipynb"), [("seed", "1"), ("seed", "2")])


def test_an_unknown_parameter_names_the_known_ones_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook, output = write(tmp_path / "a.ipynb"), tmp_path / "out" / "a.ipynb"
    assert main([str(notebook), str(output), "-p", "varaint", "b_cc"]) == 1
    assert "no parameter `varaint`; it knows variant, seed, rate, smoke, ids, free" in capsys.readouterr().err
    assert not output.parent.exists()


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_notebook_is_never_executed_onto_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = write(tmp_path / "a.ipynb")
    before = notebook.read_bytes()
    (tmp_path / "link.ipynb").symlink_to(notebook)
    for output in (notebook, tmp_path / "." / "a.ipynb", tmp_path / "link.ipynb"):
        assert main([str(notebook), str(output)]) == 1
        assert "overwritten by its own executed copy" in capsys.readouterr().err
    assert notebook.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "link.ipynb"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"cells": []}', '{"cells": [], "nbformat": 3}'])
def test_what_is_no_notebook_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    notebook = tmp_path / "a.ipynb"
    if content is not None:
        notebook.write_text(content)
    assert main([str(notebook), str(tmp_path / "b.ipynb")]) == 1
    assert re.search(r"a\.ipynb is (missing|not a notebook)", capsys.readouterr().err)
    assert not (tmp_path / "b.ipynb").exists()


def test_an_output_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "a.ipynb")), str(tmp_path / "b.html")]) == 1
    assert "must end in .ipynb" in capsys.readouterr().err


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_prints_lines_uses_this_interpreter_and_writes_the_executed_copy(tmp_path: Path) -> None:
    profile = tmp_path / "home" / ".ipython" / "profile_default" / "startup"
    profile.mkdir(parents=True)
    (profile / "00.py").write_text("raise SystemExit('a start-up file of the user was run')")
    foreign = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "?", "language": "python"}))
    notebook = write(
        tmp_path / "a {seed}.ipynb",
        "from tqdm import tqdm\nprint(variant, seed, rate, smoke)\nprint(os.getcwd())\nprint(sys.executable)",
        "for _ in tqdm(range(1000)): pass\nsys.stdout.write('10%\\r50%\\r100%\\n')",
        "import danet_core\nprint(os.path.basename(os.path.dirname(danet_core.__file__)))",
        "sys.stdout.write('no line end')",
    )
    arguments = ["-p", "variant", "b_cc", "-p", "seed", "7", "-p", "smoke", "yes"]
    output = tmp_path / "out" / "a {seed}.ipynb"
    environment = {"HOME": str(tmp_path / "home"), "JUPYTER_PREFER_ENV_PATH": "0"}
    status, stdout, stderr = finish(start(notebook, output, *arguments, env=environment))
    assert (status, stderr) == (0, "")
    assert stdout.splitlines() == ["b_cc 7 0.5 True", str(ROOT), sys.executable, "100%", "danet_core", "no line end"]
    assert [path.name for path in output.parent.iterdir()] == ["a {seed}.ipynb"]
    executed = nbformat.read(output, as_version=4)
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in executed.cells)
    assert executed.cells[-1].outputs[0].text == "no line end"


def test_garbage_is_collected_from_the_second_cell_on(tmp_path: Path) -> None:
    notebook = tmp_path / "a.ipynb"
    cells = [new_code_cell("import gc\nprint(gc.isenabled())"), new_code_cell("print(gc.isenabled())")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    status, stdout, stderr = finish(start(notebook, tmp_path / "b.ipynb"))
    assert (status, stdout.split(), stderr) == (0, ["False", "True"], "")


def test_a_failing_cell_leaves_the_old_output_and_a_failed_copy(tmp_path: Path) -> None:
    raising = "from danet_core.files import StudyError\nif seed: raise StudyError('data/x is missing; make it')"
    notebook, output = write(tmp_path / "a.ipynb", raising), tmp_path / "b.ipynb"
    output.write_text("the output of an earlier run")
    status, _, stderr = finish(start(notebook, output, "-p", "seed", "1"))
    assert status == 1
    assert stderr.splitlines()[0] == "tools.notebook: a.ipynb, cell 4: StudyError: data/x is missing; make it"
    assert "Traceback" not in stderr
    assert output.read_text() == "the output of an earlier run"
    failed = nbformat.read(tmp_path / "b.failed.ipynb", as_version=4)
    assert failed.cells[-1].outputs[0].ename == "StudyError"
    status, _, stderr = finish(start(notebook, output))
    assert (status, stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "b.ipynb"], "the failed copy is outdated"


def test_a_mistake_in_code_shows_its_traceback_without_colours(tmp_path: Path) -> None:
    status, _, stderr = finish(start(write(tmp_path / "a.ipynb", "{}['key']"), tmp_path / "b.ipynb"))
    assert status == 1
    assert "cell 3: KeyError: 'key'" in stderr.splitlines()[0]
    assert "----> 1 {}['key']" in stderr
    assert "\x1b" not in stderr


def test_a_kernel_that_dies_is_said_in_a_sentence(tmp_path: Path) -> None:
    status, _, stderr = finish(start(write(tmp_path / "a.ipynb", "os.kill(os.getpid(), 9)"), tmp_path / "b.ipynb"))
    assert status == 1
    assert "a.ipynb, the kernel died" in stderr
    assert not (tmp_path / "b.ipynb").exists()


WAITING = "print('kernel', os.getpid(), flush=True)\ntime.sleep(300)"


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes that a test starts; whatever happens none is left."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.skipif(os.name != "posix", reason="signals of this kind are POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_a_runner_that_is_stopped_takes_its_kernel_with_it(
    tmp_path: Path, started: list[psutil.Process], name: str
) -> None:
    runner = start(write(tmp_path / "a.ipynb", WAITING), tmp_path / "b.ipynb", env={"TMPDIR": str(tmp_path)})
    started.append(psutil.Process(runner.pid))
    kernel = kernel_of(runner)
    started.append(kernel)
    number = getattr(signal, name)
    runner.send_signal(number)
    status = runner.wait(timeout=20)
    assert ends(kernel)
    if name == "SIGKILL":
        assert status == -number
    else:
        assert status == 128 + number
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb"], "nothing half-written stays"


SAVING = """\
from danet_core.files import StudyError
from danet_core.record import sigterm_heeded
with sigterm_heeded() as told_to_stop:
    print('kernel', os.getpid(), flush=True)
    while not told_to_stop(): time.sleep(0.05)
    open({path!r}, 'w').write('saved')
raise StudyError('stopped by SIGTERM after epoch 3 of 14, whose checkpoint is whole')"""


@pytest.mark.skipif(os.name != "posix", reason="signals of this kind are POSIX")
def test_a_kernel_has_time_to_save_when_a_batch_scheduler_sends_sigterm(
    tmp_path: Path, started: list[psutil.Process]
) -> None:
    notebook = write(tmp_path / "a.ipynb", SAVING.format(path=str(tmp_path / "checkpoint")))
    runner = start(notebook, tmp_path / "b.ipynb")
    started.append(psutil.Process(runner.pid))
    kernel = kernel_of(runner)
    started.append(kernel)
    kernel.terminate()  # Slurm tells every process of a job, and the runner passes it on
    for _ in range(2):
        runner.send_signal(signal.SIGTERM)
    status, _, stderr = finish(runner)
    assert status == 128 + signal.SIGTERM
    assert "a.ipynb, cell 3: StudyError: stopped by SIGTERM after epoch 3 of 14, whose checkpoint is whole\n" in stderr
    assert "tools.notebook: stopped by SIGTERM, and the kernel with it" in stderr
    assert ends(kernel)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "checkpoint"]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("in_stage", [False, True], ids=["its parent", "DVC behind a shell"])
def test_a_runner_stops_when_what_it_works_for_is_killed(
    tmp_path: Path, started: list[psutil.Process], in_stage: bool
) -> None:
    runner = [
        sys.executable,
        "-m",
        "tools.notebook",
        str(write(tmp_path / "a.ipynb", WAITING)),
        str(tmp_path / "b.ipynb"),
    ]
    # The `true` keeps the shell from replacing itself by the command.
    inner = ["/bin/sh", "-c", f"{subprocess.list2cmdline(runner)}; true"] if in_stage else runner
    caller = f"import subprocess; subprocess.run({inner!r})"
    process = start(command=[sys.executable, "-c", caller], env={"DVC_STAGE": "train"} if in_stage else {})
    started.append(psutil.Process(process.pid))
    kernel = kernel_of(process)
    chain = [kernel, *psutil.Process(process.pid).children(recursive=True)]
    started.extend(chain)
    process.kill()
    assert all(ends(member) for member in chain)


def test_a_second_runner_of_the_same_output_is_refused(tmp_path: Path, started: list[psutil.Process]) -> None:
    pytest.importorskip("fcntl")
    notebook, output = write(tmp_path / "a.ipynb", WAITING), tmp_path / "b.ipynb"
    first = start(notebook, output)
    started.append(psutil.Process(first.pid))
    started.append(kernel_of(first))
    status, _, stderr = finish(start(notebook, output))
    assert status == 1
    assert "another runner is writing" in stderr
    first.terminate()
    assert first.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "pieces, expected",
    [
        (["a\nb", "c\n"], "a\nbc\n"),
        (["10%\r", "20%\r", "30%\n"], "30%\n"),
        (["windows\r", "\nend\r\n"], "windows\nend\n"),
        (["no end"], "no end\n"),
        (["bar 1\rbar 2"], "bar 2\n"),
        (["\n\n"], "\n\n"),
        ([], ""),
    ],
)
def test_line_writer_passes_on_whole_lines_in_their_last_state(
    pieces: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = LineWriter(sys.stdout)
    for piece in pieces:
        writer.write(piece)
    writer.finish()
    assert capsys.readouterr().out == expected


# -- stripped copies -------------------------------------------------------------------------------------------------


def test_the_stripped_copy_is_the_same_after_a_run_in_jupyterlab(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb", "print(1)")
    strip(notebook, tmp_path / "before.ipynb")
    content = nbformat.read(notebook, as_version=4)
    content.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Another name"},
        "language_info": {"name": "python", "version": "3.13.0"},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}},
    }
    for number, cell in enumerate(content.cells):
        cell.id = f"random{number}"
        cell.metadata |= {
            "execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"},
            "collapsed": True,
            "trusted": True,
        }
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.outputs = [new_output("stream", text="1\n")]
    nbformat.write(content, notebook)
    strip(notebook, tmp_path / "after.ipynb")
    assert (tmp_path / "before.ipynb").read_bytes() == (tmp_path / "after.ipynb").read_bytes()


def test_the_stripped_copy_keeps_sources_and_tags_and_is_valid(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb", "print('é')\n\nprint(2)")
    strip(notebook, tmp_path / "s.ipynb")
    original, copy = (nbformat.read(path, as_version=4) for path in (notebook, tmp_path / "s.ipynb"))
    nbformat.validate(copy)
    assert [cell.source for cell in copy.cells] == [cell.source for cell in original.cells]
    assert declared_parameters(tmp_path / "s.ipynb") == declared_parameters(notebook)
    again = json.loads((tmp_path / "s.ipynb").read_text(encoding="utf-8"))
    assert stripped(again) == again, "stripping twice changes nothing"


def test_stripping_onto_itself_or_from_nothing_is_refused(tmp_path: Path) -> None:
    notebook = write(tmp_path / "a.ipynb")
    before = notebook.read_bytes()
    with pytest.raises(StudyError, match="its own stripped copy"):
        strip(notebook, notebook)
    with pytest.raises(StudyError, match="is missing"):
        strip(tmp_path / "none.ipynb", tmp_path / "b.ipynb")
    assert notebook.read_bytes() == before
    assert not (tmp_path / "b.ipynb").exists()
