"""Training batches: P x K sampling, images on the device, augmentation of a whole batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from danet_core import INFRARED, MODALITIES, VISIBLE
from danet_study.config import Augment
from danet_study.files import StudyError
from danet_study.store import PackedStore

ERASE_TRIES = 10  # torchvision's RandomErasing


class Batch(NamedTuple):
    """One P x K batch on the training device."""

    images: UInt8[Tensor, "B 3 H W"]
    labels: Int[Tensor, " B"]  # class index 0..C-1, in the order of the sorted training pids
    modalities: Int[Tensor, " B"]


class PKSampler:
    """Batches of P identities with K visible and K infrared images each, as positions in the training images.

    1. Identities come from successive random permutations; the remainder that fills no batch is dropped.
    2. Images of an identity and modality are drawn without replacement; if there are fewer than K, they repeat.

    Args: pids, modalities: (N,) of the training images.
    Raises StudyError if there are fewer than P identities, or an identity has images of one modality only.
    Source: the paper, "Implementation details"; equal numbers of both modalities as in Ye et al. 2018b.
    """

    def __init__(
        self, pids: Int[np.ndarray, " N"], modalities: Int[np.ndarray, " N"], ids_per_batch: int, imgs_per_modality: int
    ) -> None:
        identities = np.unique(pids)
        if len(identities) < ids_per_batch:
            raise StudyError(
                f"recipe.ids_per_batch is {ids_per_batch}, but only {len(identities)} identities are trained on"
            )
        self.ids_per_batch, self.imgs_per_modality, self.n_ids = ids_per_batch, imgs_per_modality, len(identities)
        self._images = []  # by modality: for each identity the positions of its images
        for modality in (VISIBLE, INFRARED):
            images = [np.flatnonzero((pids == pid) & (modalities == modality)) for pid in identities]
            for pid, positions in zip(identities, images, strict=True):
                if len(positions) == 0:
                    raise StudyError(f"training identity {pid} has no {MODALITIES[modality]} image; remove it")
            self._images.append(images)

    def epoch(self, steps: int, generator: np.random.Generator) -> Int[np.ndarray, "S B"]:
        """Positions of `steps` batches; images are grouped by identity, visible before infrared."""
        per_permutation = self.n_ids // self.ids_per_batch * self.ids_per_batch
        order: list[int] = []
        while len(order) < steps * self.ids_per_batch:
            order.extend(generator.permutation(self.n_ids)[:per_permutation])
        drawn = [
            np.resize(generator.permutation(images[identity]), self.imgs_per_modality)
            for identity in order[: steps * self.ids_per_batch]
            for images in self._images
        ]
        return np.concatenate(drawn).reshape(steps, -1)


class TrainingImages:
    """The training images of a store as batches on the device.

    On a GPU all images are resident if they need at most a third of the free memory.
    """

    def __init__(self, store: PackedStore, splits: list[str], trial: int, device: torch.device) -> None:
        self.rows = store.rows(splits, trial)
        self.pids, self.modalities = store.pids[self.rows], store.modalities[self.rows]
        identities, labels = np.unique(self.pids, return_inverse=True)
        self.n_classes, self._store, self._device = len(identities), store, device
        self._labels, self._modalities = torch.from_numpy(labels), torch.from_numpy(self.modalities)
        self._resident = None
        if device.type == "cuda":
            size = len(self.rows) * store.images[0].nbytes
            if size <= torch.cuda.mem_get_info(device)[0] / 3:
                self._resident = torch.empty(
                    (len(self.rows), *store.images.shape[1:]), dtype=torch.uint8, device=device
                )
                for start in range(0, len(self.rows), 1024):  # the host never holds a second copy of the store
                    chunk = torch.from_numpy(store.images[self.rows[start : start + 1024]])
                    self._resident[start : start + 1024] = chunk.to(device)

    def batches(self, positions: Int[np.ndarray, "S B"]) -> Iterator[Batch]:
        """The batches at these positions, in order. The host does not wait for the device."""
        for row in torch.from_numpy(positions):
            labels, modalities = self._labels[row], self._modalities[row]
            if self._resident is not None:
                images = self._resident[self._to_device(row)]
            else:
                images = self._to_device(torch.from_numpy(self._store.images[self.rows[row.numpy()]]))
            yield Batch(images, self._to_device(labels), self._to_device(modalities))

    def _to_device(self, values: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return values.pin_memory().to(self._device, non_blocking=True)
        return values.to(self._device)


def normalize(images: UInt8[Tensor, "B 3 H W"], augment: Augment) -> Float[Tensor, "B 3 H W"]:
    """Bytes to float32 with the configured channel means at 0 and standard deviations at 1."""
    mean, std = _statistics(augment, images.device)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def _statistics(augment: Augment, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std in units of a byte, (1, 3, 1, 1); cached, because a copy to a GPU stalls its queue."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(device) * 255 for values in (augment.mean, augment.std))
    return mean, std


def augment_batch(
    images: UInt8[Tensor, "B 3 H W"], augment: Augment, generator: torch.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Flip, pad and crop, normalize and erase, each image independently.

    A box to erase has a share of the image uniform in `erase_area` and a height / width log-uniform in `erase_ratio`. A
    box that does not fit is drawn again, at most ten times, as in torchvision. Erased pixels get the channel mean.

    Args: generator: on the device of `images`. The number of draws does not depend on outcomes.
    Source: the paper, "Implementation details"; Zhong et al., "Random Erasing Data Augmentation", 2020.
    """
    size, _, height, width = images.shape
    draw = torch.rand(6 + 2 * ERASE_TRIES, size, device=images.device, generator=generator)
    images = torch.where((draw[0] < augment.flip).view(-1, 1, 1, 1), images.flip(-1), images)
    if augment.pad_crop:
        images = _pad_crop(images, augment.pad_crop, augment.pad_value, draw[1:3])
    erased = _boxes(draw[4:], height, width, augment) & (draw[3] < augment.erase).view(-1, 1, 1)  # (B, H, W)
    return normalize(images, augment).masked_fill_(erased[:, None], 0.0)


def _pad_crop(
    images: UInt8[Tensor, "B 3 H W"], pad: int, value: int, draw: Float[Tensor, "2 B"]
) -> UInt8[Tensor, "B 3 H W"]:
    """Each image moved by -pad to pad rows and columns; the border has the given value."""
    size, _, height, width = images.shape
    top, left = (draw * (2 * pad + 1)).long().clamp_(max=2 * pad)  # (B,) each
    padded = functional.pad(images, (pad, pad, pad, pad), value=value)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2 pad + 1, 2 pad + 1, H, W), a view
    return windows[torch.arange(size, device=images.device), :, top, left]


def _boxes(draw: Float[Tensor, "N B"], height: int, width: int, augment: Augment) -> Tensor:
    """(B, H, W) True inside each image's box; all False where no try gave a box that fits."""
    low, high = augment.erase_area
    area = (low + (high - low) * draw[2 : 2 + ERASE_TRIES]) * (height * width)  # (10, B)
    low, high = (float(np.log(bound)) for bound in augment.erase_ratio)
    ratio = torch.exp(low + (high - low) * draw[2 + ERASE_TRIES : 2 + 2 * ERASE_TRIES])
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(0, keepdim=True)  # (1, B) the first try that fits
    box_height, box_width = (sides.gather(0, first)[0] for sides in (heights, widths))
    top, left = (draw[0] * (height - box_height + 1)).floor(), (draw[1] * (width - box_width + 1)).floor()
    rows, columns = (torch.arange(length, device=draw.device) for length in (height, width))
    inside_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])  # (B, H)
    inside_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])  # (B, W)
    return inside_rows[:, :, None] & inside_columns[:, None, :] & fits.any(0).view(-1, 1, 1)
