"""Print, as a table for an issue, what only a CUDA GPU shows. `make test-gpu`, under ten minutes.

Random images of the paper's size train B + ML + CC with the paper's recipe, in a few steps.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from danet_core import MODALITIES
from danet_study.checkpoint import build_model
from danet_study.config import RunConfig, load_study
from danet_study.data import TrainingImages
from danet_study.determinism import deterministic, resolve_device
from danet_study.files import StudyError
from danet_study.store import PackedStore
from danet_study.train import fit
from tools.bench import alternate, step_tasks

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
SAME, DIFFERENT = "same bits", "DIFFERENT"
HEADER = """\
| Precision | Format | Two runs | Resumed | Peak memory | Step | Step / bare network | Images/s |
| :-- | :-- | :-- | :-- | --: | --: | --: | --: |"""


def report(config: RunConfig, device: torch.device, repeats: int = 10) -> list[str]:
    """The lines of the table: one for each precision and memory format."""
    size = 2 * config.recipe.ids_per_batch * config.recipe.imgs_per_modality
    height, width = config.dataset.image.height, config.dataset.image.width
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    software = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    lines = [f"{name}, {software}: {config.recipe.backbone}, {size} images of {height} x {width}.\n", HEADER]
    images = np.random.default_rng(0).integers(256, size=(2 * size, 3, height, width), dtype=np.uint8)
    pids = np.arange(len(images)) // 2 % (2 * config.recipe.ids_per_batch)
    modalities = np.array(MODALITIES)[np.arange(len(images)) % 2]
    store = PackedStore(Path(), images, pd.DataFrame({"pid": pids, "modality": modalities, "split_1": "train"}), {}, {})
    for precision in PRECISIONS:
        for channels_last in (True, False):
            one = changed(config, precision=precision, channels_last=channels_last, epochs=2, steps_per_epoch=3)
            try:
                resolve_device(str(device), precision)
                cells = [*exactness(one, store, device), *speed(one, device, repeats)]
            except torch.OutOfMemoryError:
                cells = ["out of memory", *[""] * 5]
            except StudyError as error:
                cells = [str(error), *[""] * 5]
            lines.append(
                f"| {precision} | {'channels_last' if channels_last else 'contiguous'} | {' | '.join(cells)} |"
            )
    return lines


def exactness(config: RunConfig, store: PackedStore, device: torch.device) -> list[str]:
    """Whether a second run, and one resumed after half of its epochs, end with the first's bits; the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        first, second, resumed = (Path(folder) / name for name in ("first.pt", "second.pt", "resumed.pt"))
        expected, again = (trained(config, store, device, path) for path in (first, second))
        trained(changed(config, epochs=config.recipe.epochs // 2), store, device, resumed)
        whole = trained(config, store, device, resumed)
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "unknown"
    return [*(SAME if found == expected else DIFFERENT for found in (again, whole)), memory]


def trained(config: RunConfig, store: PackedStore, device: torch.device, checkpoint: Path) -> list[bytes]:
    """The tensors of a trained model; the training goes on from the checkpoint if there is one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with deterministic(0, tf32=config.recipe.precision == "tf32"):
        images = TrainingImages(store, ["train"], 1, device)
        model = build_model(config.resolved(), images.n_classes, None).to(device)
        fit(model, images, config, checkpoint, {}, lambda line: None)
    return [tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()]


def speed(config: RunConfig, device: torch.device, repeats: int) -> list[str]:
    """Median time of a step, its ratio to the bare network's, and images per second."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    with deterministic(0, tf32=config.recipe.precision == "tf32"):
        seconds = alternate(step_tasks(config, device), repeats, wait=wait)
    step = statistics.median(seconds["step"])
    ratio = statistics.median(a / b for a, b in zip(seconds["step"], seconds["bare"], strict=True))
    images = 2 * config.recipe.ids_per_batch * config.recipe.imgs_per_modality
    return [f"{1000 * step:.1f} ms", f"{ratio:.2f}", f"{images / step:.0f}"]


def changed(config: RunConfig, **recipe: Any) -> RunConfig:
    """The same run with other values in its recipe."""
    return config.model_copy(update={"recipe": config.recipe.model_copy(update=recipe)})


def main() -> int:
    """Print the table; 1 if there is no GPU or bits differ."""
    if not torch.cuda.is_available():
        print("test-gpu: found no usable CUDA GPU; run it on a machine where nvidia-smi lists one", file=sys.stderr)
        return 1
    lines = report(load_study().run("sysu-1", "b_ml_cc", 0), torch.device("cuda"))
    print(*lines, sep="\n")
    return int(any(DIFFERENT in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
