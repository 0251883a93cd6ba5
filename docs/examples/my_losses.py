"""A loss of one's own, used by a row of params.yaml through its import path. See docs/extend.md."""

from __future__ import annotations

from torch import Tensor

from danet_core import INFRARED, VISIBLE
from danet_core.model import Output


def my_loss(output: Output, labels: Tensor, modalities: Tensor, *, scale: float = 1.0) -> Tensor:
    """Distance between the mean visible and the mean infrared feature of the batch, times `scale`."""
    visible, infrared = ((modalities == modality).float()[:, None] for modality in (VISIBLE, INFRARED))  # (B, 1)
    mean_visible = (output.feat * visible).sum(0) / visible.sum()  # (D,)
    mean_infrared = (output.feat * infrared).sum(0) / infrared.sum()
    return scale * (mean_visible - mean_infrared).norm()
