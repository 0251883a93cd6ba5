"""DANet (Fig. 2): one backbone for both modalities, a BN neck, and three bias-free classifiers C, C_v, C_r."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from danet_core.backbone import ResNet
from danet_core.files import StudyError


class Embedding(NamedTuple):
    """What the network says of a batch of B images; every logits tensor covers all B images."""

    feat: Float[Tensor, "B D"]  # before the BN neck: the metric losses act on it
    feat_bn: Float[Tensor, "B D"]  # after the BN neck: the classifiers and the retrieval use it
    logits: Float[Tensor, "B C"]  # C
    logits_visible: Float[Tensor, "B C"]  # C_v
    logits_infrared: Float[Tensor, "B C"]  # C_r


class DANet(nn.Module):
    """The one-stream network of the paper.

    Args:
        num_classes: training identities, C.
        backbone: "resnet50" (the paper), "resnet34" or "resnet18"; last stride 1.
        weights: a .safetensors file of backbone weights, or None for random ones.
        width: channels of the backbone's first stage; 64 is the paper's network.

    Raises StudyError for fewer than two classes, an unknown backbone or weights that do not fit.
    Source: the paper, Fig. 2 and "Implementation details"; the neck, with its bias fixed at 0, is Luo et al. 2019's.
    Choice: pooling is global average; the paper does not name it.
    """

    def __init__(
        self, num_classes: int, backbone: str = "resnet50", weights: str | Path | None = None, *, width: int = 64
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise StudyError(f"num_classes: expected at least 2 training identities, found {num_classes}")
        self.backbone = ResNet(backbone, width)
        self.neck = nn.BatchNorm1d(self.backbone.out_channels)
        self.neck.bias.requires_grad_(False)
        self.classifier = _head(self.backbone.out_channels, num_classes)
        self.classifier_visible = _head(self.backbone.out_channels, num_classes)
        self.classifier_infrared = _head(self.backbone.out_channels, num_classes)
        if weights is not None:
            self.backbone.load_weights(Path(weights))

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Features before and after the BN neck, of images normalised as in training; float32 under autocast too."""
        maps = self.backbone(images)  # (B, D, h, w)
        wide = torch.promote_types(maps.dtype, torch.float32)
        feat = maps.mean(dim=(2, 3), dtype=wide)  # AdaptiveAvgPool2d has no deterministic CUDA gradient
        with torch.autocast(images.device.type, enabled=False):
            return feat, self.neck(feat)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Embedding:
        feat, feat_bn = self.embed(images)
        with torch.autocast(images.device.type, enabled=False):
            return Embedding(
                feat,
                feat_bn,
                self.classifier(feat_bn),
                self.classifier_visible(feat_bn),
                self.classifier_infrared(feat_bn),
            )


def _head(features: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(features, num_classes, bias=False)
    nn.init.normal_(head.weight, std=0.001)  # near-uniform first predictions, so that L_id starts at log(C)
    return head
