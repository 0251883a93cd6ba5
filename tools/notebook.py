"""Run a notebook with parameters; what `dvc.yaml` starts.

    python -m tools.notebook build/notebooks/02_train.ipynb build/executed/train.ipynb -p variant b_cc -p seed 0

papermill executes it, in a kernel of this very interpreter, in the project's folder. Over plain papermill:
- an unknown parameter, or a value of another type than the default's, is an error before anything starts;
- what the notebook prints is passed on as it comes, whole lines only, a progress bar as its last state;
- OUTPUT appears when the notebook is through; of one that failed NAME.failed.ipynb is kept, to look at;
- a runner that is stopped or killed, or whose DVC is, takes its kernel with it; after SIGTERM, which batch schedulers
  send before they kill, the kernel first has time to save what it has;
- nothing of the user's is involved: no kernel or IPython start-up file of another environment.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from danet_core.files import StudyError
from tools import ROOT
from tools.command import command
from tools.parent import watch
from tools.strip import read_notebook, source_of, tags_of

KERNEL_TIMEOUT = 300  # seconds for a kernel to start; a loaded machine with a cold disk needs more than papermill's 60
SAME_NOTICE = 2  # seconds within which a second SIGTERM says nothing new; danet_core.record has the same for a run
GRACE = 20  # seconds between SIGTERM and the kernel's end, if it does not end by itself; Slurm's default is 30
COLOUR = re.compile("\x1b\\[[0-9;]*[A-Za-z]")


class NotebookError(StudyError):
    """A notebook, one of its parameters or its output file is not what the runner needs."""


# -- parameters ------------------------------------------------------------------------------------------------------


def declared_parameters(path: Path) -> dict[str, Any]:
    """Names and default values in the cell tagged `parameters`; empty when there is none.

    Raises NotebookError when several cells are tagged, or when the cell holds more than plain literals.
    """
    cells = [cell for cell in read_notebook(path)["cells"] if "parameters" in tags_of(cell)]
    if len(cells) > 1:
        raise NotebookError(f"{path} has {len(cells)} cells tagged `parameters`, one was expected; untag the others")
    defaults: dict[str, Any] = {}
    for cell in cells:
        try:
            for statement in ast.parse(source_of(cell)).body:
                name, value = _assignment(statement)
                defaults[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise NotebookError(
                f"the cell tagged `parameters` of {path} holds more than lines of the form name = literal; "
                "move the rest to another cell"
            ) from None
    return defaults


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr]:
    """Name and value of `name = value` or `name: type = value`; ValueError for any other statement."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            return name, value
    raise ValueError


def parse_parameters(path: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Values for the notebook's parameters, each read as the type of its default.

    A text parameter takes the argument as it stands, so that a name like `on` or `007` stays one. Raises NotebookError
    for an unknown or repeated name and for a value of another type.
    """
    defaults = declared_parameters(path)
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name not in defaults:
            known = f"it knows {', '.join(defaults)}" if defaults else "it has none"
            raise NotebookError(f"{path} has no parameter `{name}`; {known}")
        if name in values:
            raise NotebookError(f"the parameter `{name}` of {path} was given twice; give it once")
        try:
            values[name] = _parse(text, defaults[name])
        except ValueError:
            kind = type(defaults[name]).__name__
            raise NotebookError(
                f"the parameter `{name}` of {path} is of type {kind} (default {defaults[name]!r}), not {text!r}; "
                f"give a value of that type"
            ) from None
    return values


def _parse(text: str, default: Any) -> Any:
    """`text` as a value of the default's type; ValueError when it is none."""
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        value = float(text)  # YAML 1.1 reads 1e-3 as text
        if not math.isfinite(value):
            raise ValueError
        return value
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError from None
    if default is not None and type(value) is not type(default):
        raise ValueError
    return value


# -- what is printed -------------------------------------------------------------------------------------------------


class LineWriter:
    """Passes on whole lines; of a line that was redrawn with carriage returns only the last state."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = ""

    def write(self, text: str) -> None:
        """Take a piece of the notebook's output."""
        *lines, rest = (self._rest + text).split("\n")
        # A return at the very end may belong to a line end that has not arrived yet.
        self._rest = self._last_state(rest) + "\r" * rest.endswith("\r")
        for line in lines:
            self._stream.write(self._last_state(line) + "\n")
        if lines:
            self._stream.flush()

    def flush(self) -> None:
        """papermill calls it after each piece; an unfinished line waits for its end."""

    def finish(self) -> None:
        """Pass on an unfinished last line."""
        if self._rest:
            self.write("\n")

    @staticmethod
    def _last_state(line: str) -> str:
        return line.rstrip("\r").rpartition("\r")[2]


# -- processes -------------------------------------------------------------------------------------------------------


class Guard:
    """Stops the kernel when this process is told to stop, or when the process it works for has gone."""

    def __init__(self) -> None:
        self.kernel: Any = None  # jupyter_client's provisioner, once there is one
        self.leftovers: list[Path] = []
        self.told_to_stop: float | None = None  # when SIGTERM came

    def install(self) -> None:
        """Take over the signals that end a process, and watch the parent. Only the main thread can do so."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup and `&` ignore some
                signal.signal(number, self._stop)
        watch(self._gone)

    def _gone(self) -> None:
        if self.told_to_stop is None:
            self.end(signal.SIGTERM)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        running = self.kernel is not None and self.kernel.process is not None
        now = time.monotonic()
        if number == signal.SIGTERM and self.told_to_stop is not None and now - self.told_to_stop < SAME_NOTICE:
            return
        if number != signal.SIGTERM or self.told_to_stop is not None or not running:
            self.end(number)
        self.told_to_stop = now
        self.kernel.process.terminate()
        threading.Thread(target=self._see_to_the_end, daemon=True).start()

    def _see_to_the_end(self) -> None:
        """End this process when time is up, unless papermill saw the kernel fail or die before, and has ended it."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if self.kernel.process is None or self.kernel.process.poll() is not None:
                deadline = min(deadline, time.monotonic() + 5)
        self.end(signal.SIGTERM)

    def end(self, number: int) -> NoReturn:
        """Kill the kernel, remove what is half-written, and end this process as signal `number` would."""
        with contextlib.suppress(OSError):
            if self.kernel is not None and self.kernel.process is not None:
                if self.kernel.pgid:
                    os.killpg(self.kernel.pgid, signal.SIGKILL)
                self.kernel.process.kill()
        for path in self.leftovers:
            with contextlib.suppress(OSError):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        with contextlib.suppress(OSError):
            os.write(2, f"tools.notebook: stopped by {signal.Signals(number).name}, and the kernel with it\n".encode())
        os._exit(128 + number)  # not through papermill, which would wait for the kernel's farewell


# -- running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """Hold `path` against a second runner of the same output; the operating system lets go when this process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotebookError(f"another runner is writing {path} now; wait for it or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield


def _kernel_manager(guard: Guard, folder: Path) -> type:
    """A kernel manager class that starts this interpreter, whatever kernels are registered elsewhere."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    # Sockets in the file system where their paths may be that long: no ports to run out of or to collide on, and no
    # other user of the machine can reach them.
    sockets = str(folder / "kernel")
    use_sockets = hasattr(socket, "AF_UNIX") and os.name == "posix" and len(sockets) < 90

    class Manager(AsyncKernelManager):
        def __init__(self, **kw: Any) -> None:
            kw["connection_file"] = str(folder / "kernel.json")
            super().__init__(**kw | ({"transport": "ipc", "ip": sockets} if use_sockets else {}))

        @property
        def kernel_spec(self) -> KernelSpec:
            kernel = str(ROOT / "tools" / "kernel.py")
            return KernelSpec(argv=[sys.executable, kernel, "-f", "{connection_file}"], language="python", env={})

        async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
            await super()._async_launch_kernel(kernel_cmd, **kw)
            guard.kernel = self.provisioner

        async def _async_interrupt_kernel(self) -> None:
            if not self.shutting_down:
                await super()._async_interrupt_kernel()

    # Connection files and IPython's profile go to a folder of this run: none of the user's start-up files is run, and a
    # read-only home does not matter. Bars belong into JupyterLab; the log has the lines that the notebook prints.
    os.environ |= {
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return Manager


def run(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute `notebook` with `parameters` (checked, see `parse_parameters`) into `output`.

    Raises NotebookError when it cannot start, or when a cell fails; then `output` is untouched and the executed copy
    lies beside it as NAME.failed.ipynb.
    """
    notebook, output = notebook.resolve(), output.resolve()
    if output.suffix != ".ipynb":
        raise NotebookError(f"the executed copy {output.name} must end in .ipynb; rename it")
    if output == notebook or (output.exists() and output.samefile(notebook)):
        raise NotebookError(f"{notebook.name} would be overwritten by its own executed copy; name another output")
    failed = output.with_suffix(".failed.ipynb")
    partial = output.with_name(f".{output.stem}.partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    guard = Guard()
    with _reserved(partial), tempfile.TemporaryDirectory(prefix="danet-", ignore_cleanup_errors=True) as folder:
        guard.leftovers = [partial, Path(folder)]
        guard.install()
        failed.unlink(missing_ok=True)
        try:
            _execute(notebook, partial, parameters, _kernel_manager(guard, Path(folder)))
        except NotebookError as error:
            if guard.told_to_stop is not None:
                sys.stdout.flush()
                print(f"tools.notebook: {notebook.name}, {error}", file=sys.stderr, flush=True)
                guard.end(signal.SIGTERM)
            partial.replace(failed)
            raise NotebookError(f"{notebook.name}, {error}\n(the executed copy: {_shown(failed)})") from None
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(output)


def _execute(notebook: Path, partial: Path, parameters: dict[str, Any], kernel_manager: type) -> None:
    """papermill's part. Raises NotebookError when a cell fails or the kernel dies."""
    # A validator of web addresses that compiles its grammar for 1.3 s at import, and that no notebook needs.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill
    from nbclient.exceptions import DeadKernelError

    def plain(path: Path) -> str:  # papermill fills in {...} in paths
        return str(path).replace("{", "{{").replace("}", "}}")

    stdout, stderr = LineWriter(sys.stdout), LineWriter(sys.stderr)
    try:
        papermill.execute_notebook(
            plain(notebook),
            plain(partial),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(ROOT),
            progress_bar=False,
            stdout_file=stdout,
            stderr_file=stderr,
            start_timeout=KERNEL_TIMEOUT,
            iopub_timeout=60,
            # After the last cell nothing is left to do. A kernel that is interrupted and asked to leave, as is the
            # default, now and then ends in an error message instead.
            shutdown_kernel="immediate",
            kernel_manager_class=kernel_manager,
        )
    except papermill.PapermillExecutionError as error:
        trace = ""
        if hasattr(builtins, error.ename):  # a mistake in code; the study's own errors say it all in their sentence
            trace = COLOUR.sub("", "\n".join(error.traceback)) + "\n"
        message = f"cell {error.exec_count}: {error.ename}: {COLOUR.sub('', error.evalue)}"
        raise NotebookError(message + ("\n" + trace.rstrip() if trace else "")) from None
    except DeadKernelError:
        raise NotebookError(
            "the kernel died; out of memory is the usual reason (`dmesg` tells on Linux), unless it was told to stop"
        ) from None
    finally:
        stdout.finish()
        stderr.finish()


def _shown(path: Path) -> str:
    """`path` as seen from the project's folder, where it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


@contextlib.contextmanager
def own_copy(output: Path) -> Iterator[Path]:
    """Where this process's executed copy goes: `output`, or under torchrun, in all processes but the first, elsewhere.

    torchrun's processes each run the notebook, in a kernel of its own, and its training is one run of them all. The
    other copies are like the first; only that of a cell that failed is kept, as NAME.process-N.failed.ipynb.
    """
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    if rank == "0":
        yield output
        return
    own = output.with_name(f"{output.stem}.process-{int(rank) + 1}{output.suffix}")
    yield own
    own.unlink(missing_ok=True)


@command("tools.notebook")
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 for an error with a sentence, 128 + number after a signal."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebook", description="Run a notebook with parameters.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path, help="the executed copy")
    parser.add_argument(
        "-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter's value"
    )
    options = parser.parse_args(arguments)
    parameters = parse_parameters(options.notebook, [(name, text) for name, text in options.pairs])
    with own_copy(options.output) as output:
        run(options.notebook, output, parameters)
    return 0


if __name__ == "__main__":
    sys.exit(main())
