"""Backbone weights of a data set: torchvision's ImageNet ResNet-50, or a small network pretrained on rendered crops."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import urllib.error
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from danet_core.augment import augment_batch
from danet_core.files import StudyError, atomic_path, exclusive, sha256_file, sha256_json
from danet_core.model import DANet
from danet_core.parameters import Dataset, Image, Pretraining, Recipe
from danet_core.repro import derived_seed, deterministic, resolve_device
from data_prep.images import decode
from data_prep.reading import natural_key
from data_prep.synthetic import render_pretraining

IMAGENET_FILE = "resnet50-0676ba61.pth"
IMAGENET_SHA256 = "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"
# What the pretrained weights come from besides their numbers; a change in any of it pretrains anew.
_CODE = (
    *(f"data_prep/{name}.py" for name in ("synthetic", "people", "figure", "pedestrian", "scenery", "weights")),
    *(f"danet_core/{name}.py" for name in ("augment", "backbone", "images", "model", "repro")),
)
PRETRAINING_ROOT = Path("data/raw/synth_pretrain")


def make_weights(dataset: Dataset, pretraining: Pretraining, out: Path, *, device: str = "auto") -> None:
    """Write the backbone weights that the data set's recipe names to `out`, whole or not at all."""
    if dataset.recipe.weights == "imagenet":
        imagenet(out, dataset.recipe)
    else:
        rendered(pretraining, dataset.image, dataset.recipe, out, device=device)


def imagenet(out: Path, recipe: Recipe) -> None:
    """torchvision's ResNet-50 (IMAGENET1K_V1), fetched into torch's hub folder or taken from there, checked by SHA-256.

    Raises StudyError when the recipe's network is not that one, the file cannot be fetched, or its hash differs.
    Source: torchvision.models.ResNet50_Weights.IMAGENET1K_V1.
    """
    if (recipe.backbone, recipe.width) != ("resnet50", 64):
        found = f"{recipe.backbone} of width {recipe.width}"
        raise StudyError(f"weights: imagenet are those of resnet50 of width 64, found {found}; use `weights: rendered`")
    path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_FILE
    if not path.exists():
        _fetch(path)
    found = sha256_file(path)
    if found != IMAGENET_SHA256:
        raise StudyError(
            f"{path}: expected SHA-256 {IMAGENET_SHA256}, found {found}; remove the file and fetch it again"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    _save({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, out)


def _fetch(path: Path) -> None:
    # Imported here: torchvision.models takes a second that the rendered weights need not pay.
    from torchvision.models import ResNet50_Weights

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(path) as temporary:
            torch.hub.download_url_to_file(ResNet50_Weights.IMAGENET1K_V1.url, str(temporary), progress=False)
    except (urllib.error.URLError, OSError) as error:
        raise StudyError(
            f"{IMAGENET_FILE} (torchvision's ImageNet ResNet-50) cannot be fetched ({error}); "
            f"download it elsewhere and put it at {path}, its SHA-256 is {IMAGENET_SHA256}"
        ) from None


def rendered(pretraining: Pretraining, image: Image, recipe: Recipe, out: Path, *, device: str = "auto") -> None:
    """Weights of a network that classifies rendered visible crops of identities found in no other split.

    The crops have the size `image` of the data set. Data sets with the same size and network share one pretraining:
    its result is kept under build/pretrained/ by the hash of all it depends on, and copied from there.
    """
    identity = {
        "pretraining": dataclasses.asdict(pretraining),
        "image": dataclasses.asdict(image),
        "backbone": recipe.backbone,
        "width": recipe.width,
        "code": [sha256_file(Path(__file__).parent.parent / name) for name in _CODE],
        "torch": torch.__version__,
        "device": resolve_device(device).type,
    }
    kept = Path("build/pretrained") / f"{sha256_json(identity)[:16]}.safetensors"
    with exclusive(kept.with_suffix(".lock"), "the pretrained backbone"):
        if not kept.exists():
            images, labels = _crops(pretraining, image)
            _save(_pretrain(images, labels, pretraining, recipe, device), kept)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as temporary:
            shutil.copyfile(kept, temporary)


def _crops(pretraining: Pretraining, image: Image) -> tuple[torch.Tensor, torch.Tensor]:
    """All pretraining crops (N, 3, H, W) uint8 and their labels (N,)."""
    render_pretraining(PRETRAINING_ROOT, pretraining.render)
    paths = sorted(PRETRAINING_ROOT.glob("*/*.jpg"), key=lambda path: natural_key(path.as_posix()))
    images = np.stack([decode(path, image.height, image.width) for path in paths])
    _, labels = np.unique([path.parent.name for path in paths], return_inverse=True)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _pretrain(
    images: torch.Tensor, labels: torch.Tensor, pretraining: Pretraining, recipe: Recipe, device: str
) -> dict[str, torch.Tensor]:
    target = resolve_device(device)
    with deterministic(derived_seed(pretraining.seed, "pretraining weights")):
        model = DANet(int(labels.max()) + 1, recipe.backbone, width=recipe.width).train()
        model.to(target).to(memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(
            model.parameters(), lr=pretraining.lr, weight_decay=pretraining.weight_decay, fused=True
        )
        # One cycle: the schedule that reaches a usable backbone in the fewest steps; the paper has no say here.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, pretraining.lr, total_steps=pretraining.steps)
        order = np.random.default_rng(derived_seed(pretraining.seed, "pretraining batches"))
        chance = torch.Generator(target).manual_seed(derived_seed(pretraining.seed, "pretraining augmentation"))
        losses, started = [], time.perf_counter()
        for step in range(1, pretraining.steps + 1):
            rows = torch.from_numpy(order.choice(len(images), pretraining.batch_size, replace=False))
            batch = augment_batch(images[rows].to(target), pretraining.augment, chance)
            loss = functional.cross_entropy(model(batch).logits, labels[rows].to(target))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
            if step % max(1, pretraining.steps // 10) == 0:
                _report(step, losses, pretraining, started)
                losses.clear()
    return {name: tensor.cpu() for name, tensor in model.backbone.state_dict().items()}


def _report(step: int, losses: list[torch.Tensor], pretraining: Pretraining, started: float) -> None:
    mean = torch.stack(losses).mean().item()
    if not np.isfinite(mean):
        raise StudyError(f"pretraining loss is {mean} at step {step}; expected a finite loss: lower `pretraining.lr`")
    rate = step * pretraining.batch_size / (time.perf_counter() - started)
    print(f"pretraining step {step:>5}/{pretraining.steps}  loss {mean:.3f}  {rate:,.0f} images/s", flush=True)


def _save(tensors: dict[str, torch.Tensor], out: Path) -> None:
    with atomic_path(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, os.fspath(temporary))
