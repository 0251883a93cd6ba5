"""What `precision` in a recipe means: the arithmetic of the network's layers, and the devices that have it.

    float32   exact float32 (TF32 off), the default
    tf32      float32 whose products a GPU rounds to 10 bits of mantissa on its tensor cores
    bfloat16  convolutions in bfloat16, by autocast
    float16   convolutions in float16, by autocast, with the loss scaled so that small gradients survive

Weights, optimiser, pooled features, BN neck, classifiers and losses are float32 in all of them, and so is evaluation.
"""

from __future__ import annotations

import torch

from danet_core.files import StudyError
from danet_core.parameters import Precision

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FIRST_SCALE = 2.0**16  # torch's own; halved at each overflow, so that it finds its place within some steps


def lacks(precision: Precision, device: torch.device) -> str | None:
    """What the device would need for this precision and has not, None where it has all."""
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return "a CUDA GPU of compute capability 8.0 or higher"
    if (
        precision == "bfloat16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "a GPU that computes in bfloat16 (compute capability 8.0 or higher)"
    return None


def require_precision(precision: Precision, device: torch.device) -> None:
    """Raise StudyError where the device lacks the precision: it is never replaced by another one in silence."""
    missing = lacks(precision, device)
    if missing:
        raise StudyError(
            f"precision {precision} on device {device}: expected {missing}, found none; set `precision` of the recipe "
            "in params.yaml to float32, or to float16 on an older GPU"
        )


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of the forward pass; does nothing for float32 and tf32."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def loss_scaler(
    precision: Precision, device: torch.device, steps_per_epoch: int, last_scale: float | None
) -> torch.amp.GradScaler:
    """The scaler of one epoch, which passes everything through unless the precision is float16.

    It is made afresh for each epoch, from the scale that the last one ended with (None for the first) and that the
    history keeps, so that a resumed run scales as an uninterrupted one. An epoch without overflow doubles the scale.
    """
    return torch.amp.GradScaler(
        device.type,
        init_scale=_FIRST_SCALE if last_scale is None else last_scale,
        growth_interval=steps_per_epoch,
        enabled=precision == "float16",
    )
