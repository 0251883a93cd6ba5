"""Backbone weights of a data set: torchvision's ImageNet ResNet-50, or a small network pretrained on rendered crops."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch.nn import functional

from danet_core.model import DANet
from danet_study.config import Image, Pretraining, Recipe
from danet_study.data import augment_batch
from danet_study.determinism import derived_seed, deterministic, resolve_device
from danet_study.files import StudyError, atomic_path, sha256_file, sha256_json
from danet_study.store import decode
from data_prep.index import scan
from data_prep.render.synthetic import render

IMAGENET_FILE = "resnet50-0676ba61.pth"
IMAGENET_URL = f"https://download.pytorch.org/models/{IMAGENET_FILE}"  # torchvision's IMAGENET1K_V1
IMAGENET_SHA256 = "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"
PRETRAINING_ROOT = Path("data/raw/synth_pretrain")
KEPT = Path("build/pretrained")
_CODE = ["data_prep/weights", "danet_core/backbone", "danet_core/model", "danet_study/data", "danet_study/determinism"]


def make_weights(image: Image, recipe: Recipe, pretraining: Pretraining, out: Path, *, device: str = "auto") -> None:
    """Write the backbone weights that `recipe.weights` names to `out`, whole or not at all. `image`: size of crops."""
    if recipe.weights == "imagenet":
        imagenet(recipe, out)
    else:
        rendered(image, recipe, pretraining, out, device=device)


def imagenet(recipe: Recipe, out: Path) -> None:
    """torchvision's ResNet-50 (IMAGENET1K_V1), taken from torch's hub folder or downloaded, checked by SHA-256.

    Raises StudyError if the recipe's network is another, the file cannot be downloaded, or its hash differs.
    """
    if (recipe.backbone, recipe.width) != ("resnet50", 64):
        raise StudyError(f"weights: imagenet needs resnet50 of width 64, found {recipe.backbone} of {recipe.width}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), progress=False)  # to a temporary file first
        except OSError as error:  # also URLError
            raise StudyError(
                f"{IMAGENET_FILE} cannot be downloaded ({error}); put torchvision's file at {path}"
            ) from None
    if (found := sha256_file(path)) != IMAGENET_SHA256:
        raise StudyError(f"{path}: SHA-256 is {found[:16]}.., expected {IMAGENET_SHA256[:16]}..; remove the file")
    state = torch.load(path, map_location="cpu", weights_only=True)
    _save({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, out)


def rendered(image: Image, recipe: Recipe, pretraining: Pretraining, out: Path, *, device: str = "auto") -> None:
    """Weights of a network that classifies rendered visible crops of identities found in no data set.

    Data sets with the same image size and network share one pretraining, kept below build/pretrained by the hash of all
    that it depends on.
    """
    kept = KEPT.resolve()
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(kept / ".lock"):  # of several processes the second waits and finds the result
        crops = render(PRETRAINING_ROOT, "pretraining", pretraining.render)
        identity = {
            "crops": crops["content_sha256"],
            "pretraining": pretraining.model_dump(mode="json", exclude={"render"}),
            "image": image.model_dump(mode="json"),
            "network": [recipe.backbone, recipe.width, recipe.augment.model_dump(mode="json")],
            "code": [sha256_file(Path(__file__).parents[1] / f"{name}.py") for name in _CODE],
            "torch": str(torch.__version__),
            "device": resolve_device(device).type,
        }
        path = kept / f"{sha256_json(identity)[:16]}.safetensors"
        if not path.exists():
            names = [name for name in scan(PRETRAINING_ROOT) if name.endswith(".jpg")]
            images = np.stack([decode(PRETRAINING_ROOT / name, image.height, image.width) for name in names])
            _, labels = np.unique([Path(name).parent.name for name in names], return_inverse=True)
            _save(_pretrain(torch.from_numpy(images), torch.from_numpy(labels), pretraining, recipe, device), path)
    with atomic_path(out) as temporary:
        shutil.copyfile(path, temporary)


def _pretrain(
    images: torch.Tensor, labels: torch.Tensor, pretraining: Pretraining, recipe: Recipe, device: str
) -> dict[str, torch.Tensor]:
    """Train on images (N, 3, H, W) uint8 and labels (N,), on one thread; returns the backbone's state."""
    target = resolve_device(device)
    with deterministic(derived_seed(pretraining.seed, "pretraining weights")):
        model = DANet(int(labels.max()) + 1, recipe.backbone, width=recipe.width).train()
        model.to(target).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=pretraining.lr, weight_decay=pretraining.weight_decay, fused=True
        )
        # One cycle: the schedule that reaches a usable backbone in the fewest steps; the paper has no say here.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, pretraining.lr, total_steps=pretraining.steps)
        order = np.random.default_rng(derived_seed(pretraining.seed, "pretraining batches"))
        generator = torch.Generator(target).manual_seed(derived_seed(pretraining.seed, "pretraining augmentation"))
        losses = []
        for step in range(1, pretraining.steps + 1):
            rows = torch.from_numpy(order.choice(len(images), pretraining.batch_size, replace=False))
            batch = augment_batch(images[rows].to(target), recipe.augment, generator)
            loss = functional.cross_entropy(model(batch).logits, labels[rows].to(target))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % 100 == 0 or step == pretraining.steps:
                mean = torch.stack(losses).mean().item()
                if not np.isfinite(mean):
                    raise StudyError(f"pretraining loss is {mean} at step {step}; lower pretraining.lr in params.yaml")
                print(f"step {step:>5}/{pretraining.steps}  loss {mean:.3f}", flush=True)
                losses.clear()
    return {name: tensor.cpu() for name, tensor in model.backbone.state_dict().items()}


def _save(tensors: dict[str, torch.Tensor], out: Path) -> None:
    with atomic_path(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, os.fspath(temporary))
