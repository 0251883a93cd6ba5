"""Measure what the study claims to be fast and write results/benchmarks.md. `make bench`, about three minutes.

Every figure is a ratio to a bare operation, timed in the same process on one thread: machines differ, ratios less.
"""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from danet_core.losses import weighted_sum
from danet_study.checkpoint import build_model
from danet_study.config import RunConfig, load_study
from danet_study.data import Batch, augment_batch
from danet_study.determinism import autocast, deterministic
from danet_study.files import atomic_write_text
from danet_study.protocols import evaluate_regdb, evaluate_sysu
from danet_study.train import build_optimizer, train_step

OUT = Path("results/benchmarks.md")
Row = tuple[str, str, str, str]


def alternate(
    tasks: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2, wait: Callable[[], object] = int
) -> dict[str, list[float]]:
    """Seconds of each task, run in turn so that a change of the machine's speed reaches all of them.

    Args: wait: called after each task; for a GPU, `torch.cuda.synchronize`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(warm_up + repeats):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            wait()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_row(what: str, base: str, seconds: dict[str, list[float]], name: str, reference: str) -> Row:
    """One line of the table: median ratio of paired repeats, its range, and the median time."""
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))
    ratio, spread = f"{statistics.median(ratios):.2f} x {base}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return what, ratio, spread, f"{1000 * statistics.median(seconds[name]):.1f} ms"


def step_tasks(config: RunConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    """`step`: training. `bare`: the network's own forward, backward and Adam step. `losses`: the losses alone."""
    recipe, image = config.recipe, config.dataset.image
    labels = torch.arange(recipe.ids_per_batch, device=device).repeat_interleave(2 * recipe.imgs_per_modality)
    modalities = torch.arange(2, device=device).repeat_interleave(recipe.imgs_per_modality).repeat(recipe.ids_per_batch)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(256, (len(labels), 3, image.height, image.width), dtype=torch.uint8, device=device)
    batch, inputs = Batch(images, labels, modalities), augment_batch(images, recipe.augment, generator)
    inputs = inputs if recipe.channels_last else inputs.contiguous()
    network, model = (build_model(config.resolved(), 200, None).to(device).train() for _ in range(2))
    optimizers = [build_optimizer(one, recipe) for one in (network, model)]
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    with torch.no_grad():
        output = model(inputs, modalities)
    leaves = [part.requires_grad_() for part in output[:3]]  # features and logits

    def bare() -> None:
        with autocast(recipe.precision, device):
            _, feat_bn = network.embed(inputs, modalities)
        optimizers[0].zero_grad(set_to_none=True)
        functional.cross_entropy(network.classifier(feat_bn), labels).backward()
        optimizers[0].step()

    def losses() -> None:
        weighted_sum(output, labels, modalities, config.losses)["total"].backward(inputs=leaves)

    step = functools.partial(train_step, model, optimizers[1], scaler, batch, config, generator)
    return {"bare": bare, "step": step, "losses": losses}


def evaluation_rows(repeats: int) -> list[Row]:
    """Evaluation at the published sizes, random features of ResNet-50's dimension, against the bare products."""
    rng = np.random.default_rng(0)

    def features(n: int) -> np.ndarray:
        return rng.standard_normal((n, 2048), dtype=np.float32)

    queries, pool = features(3803), features(6775)
    q_pids, g_pids = rng.integers(96, size=3803), np.arange(6775) % 96
    q_camids, g_camids = rng.choice([3, 6], 3803), rng.choice([1, 2, 4, 5], 6775)
    sizes = {"all_single": 301, "all_multi": 3010, "indoor_single": 112, "indoor_multi": 1120}
    galleries = {name: np.stack([rng.permutation(6775)[:size] for _ in range(10)]) for name, size in sizes.items()}
    sides = features(2060), np.arange(2060) // 10, features(2060), np.arange(2060) // 10
    tasks = {
        "product": lambda: queries @ pool.T,
        "sysu": lambda: [
            evaluate_sysu(queries, q_pids, q_camids, pool, g_pids, g_camids, rows) for rows in galleries.values()
        ],
        "regdb product": lambda: sides[0] @ sides[2].T,
        "regdb": lambda: evaluate_regdb(*sides),
    }
    seconds = alternate(tasks, repeats, warm_up=1)
    return [
        ratio_row("SYSU-MM01, four settings, ten galleries", "one product", seconds, "sysu", "product"),
        ratio_row("RegDB, one direction", "one product", seconds, "regdb", "regdb product"),
    ]


def start_row(repeats: int) -> Row:
    """Start of a Python process with all imports of a training notebook."""
    command = [sys.executable, "-c", "import danet_study.train, danet_study.figures, pandas"]
    seconds = alternate({"start": lambda: subprocess.run(command, check=True)}, repeats)["start"]
    spread = f"{min(seconds):.1f} to {max(seconds):.1f} s"
    return "Start and imports of a training notebook", "", spread, f"{1000 * statistics.median(seconds):.0f} ms"


def main() -> None:
    """Measure all rows, print them and write OUT."""
    config = load_study().run("synth_sysu-1", "b_ml_cc", 0)
    with deterministic(0):
        seconds = alternate(step_tasks(config, torch.device("cpu")), 10)
        rows = [
            ratio_row("Training step, B + ML + CC", "network step", seconds, "step", "bare"),
            ratio_row("Losses, forward and backward", "network step", seconds, "losses", "bare"),
            *evaluation_rows(3),
            start_row(3),
        ]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench`: one thread, {platform.machine()}, {versions}. Ratios are medians of paired repeats.",
        "",
        "| What | Ratio | Range | Median time |",
        "| :-- | --: | --: | --: |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    atomic_write_text(OUT, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
