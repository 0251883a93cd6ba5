"""A training step against the same network's bare step on random images that lie on the device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch.nn import functional
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Times, growth, interleaved, main, page, table
from danet_core.augment import augment_batch
from danet_core.config import RunConfig, load_study
from danet_core.model import Embedding
from danet_core.parameters import Image, Precision, Recipe
from danet_core.precision import autocast, lacks, loss_scaler
from danet_core.repro import deterministic
from danet_core.sampler import IdentitySampler
from danet_core.store import PackedStore
from danet_core.train import Batch, LossesOf, TrainingImages, build_model, build_optimiser, loss_terms, training_step

PARTS = (
    *("gather", "augment", "forward", "losses", "backward", "optimiser"),
    "losses with their own backward, down to the network's outputs (in the rows above, too)",
)
PER_MODALITY = 8  # images of an identity in the random store
ROUNDS, STEPS = 30, 5


class Bench:
    """A run of random images on a device, ready to take steps."""

    def __init__(self, config: RunConfig, identities: int, device: torch.device) -> None:
        recipe = config.dataset.recipe
        self.config, self.device = config, device
        self.images = TrainingImages(random_store(identities, config.dataset.image), ("train",), 1, device)
        self.model = build_model(config.dataset, identities, None).to(device).train()
        self.optimiser = build_optimiser(self.model, recipe)
        self.scaler = loss_scaler(recipe.precision, device, 2000, None)
        self.chance = torch.Generator(device).manual_seed(0)
        self.batches = endless(self.images, recipe)

    def full(self) -> None:
        """What training does for each batch."""
        batch = next(self.batches)
        training_step(LossesOf(self.model, self.config), self.optimiser, self.scaler, batch, self.config, self.chance)

    def parts(self) -> list[float]:
        """Seconds of each of PARTS in one step; the clock waits for the GPU between them, so that their sum is more."""
        clock = [timer()]
        batch = next(self.batches)
        clock.append(timer())
        images = augment_batch(batch.images, self.config.dataset.recipe.augment, self.chance)
        clock.append(timer())
        with autocast(self.config.dataset.recipe.precision, self.device):
            output = self.model(images, batch.modalities)
        clock.append(timer())
        loss = loss_terms(output, batch, self.config.variant)["total"]
        clock.append(timer())
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        clock.append(timer())
        self.scaler.step(self.optimiser)
        self.scaler.update()
        clock.append(timer())
        seconds = np.diff(clock).tolist()
        leaves = (part if part is None else part.detach().requires_grad_(part.requires_grad) for part in output)
        output = Embedding._make(leaves)
        started = timer()
        self.scaler.scale(loss_terms(output, batch, self.config.variant)["total"]).backward()
        return [*seconds, timer() - started]


class Bare:
    """The bare step of a network like a run's own, on random images that lie on the device."""

    def __init__(self, run: Bench) -> None:
        recipe = run.config.dataset.recipe
        self.config, self.device = run.config, run.device
        self.model = copy.deepcopy(run.model)
        self.optimiser = build_optimiser(self.model, recipe)
        self.scaler = loss_scaler(recipe.precision, self.device, 2000, None)
        batch = next(run.batches)
        self.images, self.labels = torch.randn(batch.images.shape, device=self.device), batch.labels
        if recipe.channels_last:
            self.images = self.images.contiguous(memory_format=torch.channels_last)

    def step(self) -> None:
        """Forward, cross-entropy of the heads that the variant trains, backward and optimiser; nothing else."""
        with autocast(self.config.dataset.recipe.precision, self.device):
            output = self.model(self.images)
        heads = output[2:5] if self.config.variant.ml else output[2:3]
        self.optimiser.zero_grad(set_to_none=True)
        loss = torch.stack([functional.cross_entropy(logits, self.labels) for logits in heads]).sum()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()


def endless(images: TrainingImages, recipe: Recipe) -> Iterator[Batch]:
    """Batches without end. No method of Bench: the cycle would keep its memory until garbage is collected."""
    order = np.random.default_rng(0)
    sampler = IdentitySampler(images.pids, images.modalities, recipe.ids_per_batch, recipe.imgs_per_modality)
    while True:
        yield from images.batches(sampler.epoch(100, order))


def random_store(identities: int, image: Image) -> PackedStore:
    """Random bytes as a store in memory, PER_MODALITY images of each identity and modality, all of the split train."""
    count = identities * 2 * PER_MODALITY
    images = np.random.default_rng(0).integers(0, 256, (count, 3, image.height, image.width), dtype=np.uint8)
    modality = np.tile(np.repeat(["visible", "infrared"], PER_MODALITY), identities)
    manifest = pd.DataFrame(
        {"pid": np.repeat(np.arange(1, identities + 1), 2 * PER_MODALITY), "camid": 1, "modality": modality}
    )
    return PackedStore(Path("random"), images, manifest.assign(split_1="train"), {}, {})


@contextlib.contextmanager
def bench(config: RunConfig, identities: int, device: torch.device) -> Iterator[Bench]:
    with deterministic(0, tf32=config.dataset.recipe.precision == "tf32"):
        yield Bench(config, identities, device)


def with_recipe(config: RunConfig, **changes: object) -> RunConfig:
    recipe = dataclasses.replace(config.dataset.recipe, **changes)  # type: ignore[arg-type]  # names come from above
    return dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, recipe=recipe))


def matrix_product(precision: Precision, device: torch.device, size: int) -> Callable[[], object]:
    """A square product of two matrices in the precision, as the rate that the device can reach."""
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    left, right = (torch.rand(size, size, device=device, dtype=kind) for _ in range(2))
    return lambda: left @ right


def freely(step: Callable[[], None]) -> Callable[[], None]:
    """The step with whatever algorithms are fastest, inside `deterministic`."""

    def action() -> None:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        try:
            step()
        finally:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False

    return action


def peak_host_memory() -> int:
    """The most memory this process has held, in bytes."""
    if os.name != "posix":
        return psutil.Process().memory_info().peak_wset
    import resource

    kilobytes = os.uname().sysname != "Darwin"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def memory_of(run: Bench) -> str:
    """The peak of some full steps; to be asked before anything else lies beside them on the device."""
    for _ in range(STEPS):
        run.full()
    if run.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(run.device) / 2**30:.1f} GiB on the device"
    image = run.config.dataset.image
    store = run.images.rows.size * 3 * image.height * image.width
    return f"{(peak_host_memory() - store) / 2**30:.2f} GiB above the store"


def compare(config: RunConfig, identities: int, device: torch.device, rounds: int, size: int) -> tuple[str, ...]:
    """One row: a full step, the bare one, their ratio, use of the device, memory."""
    recipe = config.dataset.recipe
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with bench(config, identities, device) as run:
        memory, bare = memory_of(run), Bare(run)
        with FlopCounterMode(display=False) as counter:
            bare.step()
        product = matrix_product(recipe.precision, device, size)
        actions = {"full": run.full, "bare": bare.step, "free": freely(Bare(run).step), "product": product}
        times = interleaved(actions, rounds)
        reached = counter.get_total_flops() / times["full"].median
        attainable = 2 * size**3 / times["product"].median
        batch = recipe.ids_per_batch * 2 * recipe.imgs_per_modality
    return (
        f"{recipe.backbone} x{recipe.width / 64:g}, {config.dataset.image.height}x{config.dataset.image.width}, "
        f"batch {batch}, {config.variant.label}, {recipe.precision}, {device.type}",
        str(times["full"]),
        str(times["bare"]),
        times["full"].over(times["bare"]),
        times["full"].over(times["free"]),
        f"{batch / times['full'].median:,.0f}",
        f"{reached / 1e9:,.0f} GFLOP/s, {100 * reached / attainable:.0f} %",
        memory,
    )


def parts(config: RunConfig, identities: int, device: torch.device, rounds: int) -> list[tuple[str, str]]:
    """Each of PARTS: its time and its share of a full step's, which is taken in turn with them."""
    measured = []
    with bench(config, identities, device) as run:
        for step in range(rounds + 1):
            seconds = run.parts()
            started = timer()
            run.full()
            if step > 0:  # the first one warms up
                measured.append([*seconds, timer() - started])
    *columns, full = (Times(column) for column in np.array(measured).T)
    return [(str(column), f"{Times(100 * column.seconds).over(full)} %") for column in columns]


def section(tiny: bool) -> str:
    study, cpu = load_study(), torch.device("cpu")
    embedded, paper = (study.run(name, "b_ml_cc", 1, 0) for name in ("synth_sysu", "sysu"))
    baseline = study.run("synth_sysu", "baseline", 1, 0)
    rounds, size, identities, paper_identities = (2, 64, 16, 16) if tiny else (ROUNDS, 2048, 200, 395)
    if tiny:
        embedded, baseline = (with_recipe(config, width=8, imgs_per_modality=1) for config in (embedded, baseline))
    rows = [compare(config, identities, cpu, rounds, size) for config in (baseline, embedded)]
    split = {"embedded, cpu": parts(embedded, identities, cpu, rounds)}
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    precisions: tuple[Precision, ...] = ("float32", "tf32", "bfloat16", "float16")
    for precision in precisions:
        label = f"the paper's recipe, {precision}, cuda"
        if gpu is None or lacks(precision, gpu):
            rows.append((label, *["not run"] * 7))
            continue
        config = with_recipe(paper, precision=precision)
        rows.append(compare(config, paper_identities, gpu, rounds, size * 4))
        split[label] = parts(config, paper_identities, gpu, rounds)

    few = max(2, rounds // 6)
    people = (2, 4) if tiny else (4, 8, 16, 32)
    classes = (16, 32) if tiny else (100, 200, 400, 800)
    by_batch = [_step(with_recipe(embedded, ids_per_batch=count), identities, few) for count in people]
    by_class = [_step(embedded, count, few) for count in classes]
    per_identity = 2 * embedded.dataset.recipe.imgs_per_modality
    return page(
        "## Training step",
        """Full: gather, augmentation, forward, losses, backward, optimiser. Bare: the same network on random images
        that lie on the device, with a cross-entropy for each head that the variant trains. Both are deterministic, as
        training is; free: the bare step where nothing has to be, and cuDNN tries which algorithm is the fastest. The
        rate is the network's operations (forward and backward) over the time of the full step, and its share of what a
        square matrix product reaches in the same precision, turn by turn with the steps; above 100 % the convolutions'
        library is the faster one. Memory: the peak of full steps, without the bare networks and the product's matrices;
        on the CPU that of the whole process, from its start.""",
        table(
            ("case", "full", "bare", "full / bare", "full / free", "images/s", "rate, share of a product's", "memory"),
            rows,
        ),
        """The parts of a full step of B + ML + CC, each waited for on a GPU, so that they add up to more than the step,
        which is timed in turn with them:""",
        table(
            ("part", *(heading for case in split for heading in (case, "of a full step"))),
            [(name, *(cell for case in split.values() for cell in case[i])) for i, name in enumerate(PARTS)],
        ),
        "How the full embedded step on the CPU grows with the images of a batch:",
        growth("images", [count * per_identity for count in people], by_batch),
        "How it grows with the training identities:",
        growth("identities", classes, by_class),
    )


def _step(config: RunConfig, identities: int, rounds: int) -> Times:
    with bench(config, identities, torch.device("cpu")) as run:
        return interleaved({"full": run.full}, rounds)["full"]


if __name__ == "__main__":
    main(section)
