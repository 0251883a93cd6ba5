"""Random flip and erasing, and normalisation, vectorised over the batch on the training device."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from danet_core.parameters import Augment


def normalise(images: UInt8[Tensor, "B 3 H W"], augment: Augment) -> Float[Tensor, "B 3 H W"]:
    """Bytes to float32 with the channel means at 0 and the standard deviations at 1, in channels-last memory."""
    return _scaled(images, augment).contiguous(memory_format=torch.channels_last)


def _scaled(images: UInt8[Tensor, "B 3 H W"], augment: Augment) -> Float[Tensor, "B 3 H W"]:
    """Normalised, in the memory order of the bytes: arithmetic by channel is several times as fast in it on a CPU."""
    mean, std = _statistics(augment, images.device)
    return (images.to(torch.float32) - mean).div_(std)


@functools.cache
def _statistics(augment: Augment, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in units of a byte, (1, 3, 1, 1); kept, since making them on a GPU waits for it."""
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) * 255 for numbers in (augment.mean, augment.std))
    return mean.to(device), std.to(device)


def augment_batch(
    images: UInt8[Tensor, "B 3 H W"],
    augment: Augment,
    generator: torch.Generator,
    share: tuple[int, slice] | None = None,
) -> Float[Tensor, "B 3 H W"]:
    """Flip, shift, normalise and erase each image by chance of its own.

    Each image is mirrored with probability `flip`. With a `pad_crop` of n above 0 it gets n black pixels on each side,
    and a box of its old size is cut out at one of the (2n + 1)^2 places, all equally likely. With probability `erase` a
    box is set to the channel mean; its share of the image is uniform in `erase_area`, its height / width log-uniform in
    `erase_ratio`, cut at the image's sides.

    Args:
        images: bytes on any device.
        generator: of the images' device; six numbers are drawn for each image, whatever becomes of it, so that the
            stream does not depend on earlier outcomes. With a `pad_crop` above 0 two more are drawn after them.
        share: where the images are some rows of a larger batch, its size and those rows. What becomes of an image then
            does not depend on which rows it is augmented with. None: they are the whole batch.

    Source: the paper, "Implementation details"; Zhong et al. 2020 (random erasing) with torchvision's default ranges.
    Choice: padding is silent in the paper. Public code of the field pads bytes with 0, between flip and normalisation
    (Luo et al. 2019), so that the border is black and not the mean.
    """
    _, _, height, width = images.shape
    batch, own = share or (len(images), slice(None))
    draw = torch.rand(6, batch, device=images.device, generator=generator)[:, own]  # (6, B) of the larger batch's
    flipped = torch.where((draw[0] < augment.flip).view(-1, 1, 1, 1), images.flip(-1), images)
    if augment.pad_crop:
        flipped = _pad_crop(flipped, augment.pad_crop, generator, batch, own)
    top, left, box_height, box_width = _boxes(draw, height, width, augment)
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])  # (B, H)
    inside_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])  # (B, W)
    erased = (
        inside_rows[:, :, None] & inside_columns[:, None, :] & (draw[1] < augment.erase).view(-1, 1, 1)
    )  # (B, H, W)
    scaled = _scaled(flipped, augment).masked_fill_(erased[:, None], 0.0)
    return scaled.contiguous(memory_format=torch.channels_last)


def _pad_crop(
    images: UInt8[Tensor, "B 3 H W"], pad: int, generator: torch.Generator, batch: int, own: slice
) -> UInt8[Tensor, "B 3 H W"]:
    """Each image shifted by -pad to pad rows and columns, black where it does not reach; see `share` above."""
    _, _, height, width = images.shape
    draw = torch.rand(2, batch, device=images.device, generator=generator)[:, own]
    top, left = (draw * (2 * pad + 1)).long().clamp_(max=2 * pad)  # (B,) each; float32 may round up to 2 pad + 1
    padded = functional.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2 pad + 1, 2 pad + 1, H, W), a view
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _boxes(
    draw: Float[Tensor, "6 B"], height: int, width: int, augment: Augment
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of each image's box in whole pixels."""
    low, high = augment.erase_area
    area = (low + (high - low) * draw[2]) * (height * width)
    log_low, log_high = (torch.tensor(bound).log() for bound in augment.erase_ratio)  # on the host: () go to any device
    ratio = torch.exp(log_low + (log_high - log_low) * draw[3])
    box_height = (area * ratio).sqrt().round().clamp(1, height)
    box_width = (area / ratio).sqrt().round().clamp(1, width)
    top = (draw[4] * (height - box_height + 1)).floor()
    left = (draw[5] * (width - box_width + 1)).floor()
    return top, left, box_height, box_width
