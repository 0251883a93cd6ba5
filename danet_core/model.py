"""DANet: backbone, pooling, BN neck and three classifiers without bias (the paper, Fig. 2)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from danet_core.backbone import ResNet, Stem


class Output(NamedTuple):
    """What losses are computed from. B images, features of D numbers, C training identities."""

    feat: Float[Tensor, "B D"]  # before the BN neck: metric losses
    feat_bn: Float[Tensor, "B D"]  # after the BN neck: classifiers and retrieval
    logits: Float[Tensor, "B C"]  # classifier C on feat_bn
    heads: tuple[Float[Tensor, "C D"], Float[Tensor, "C D"]]  # weights of C_v and C_r
    teachers: tuple[Float[Tensor, "C D"], Float[Tensor, "C D"]] | None = None  # their moving averages

    @property
    def logits_visible(self) -> Float[Tensor, "B C"]:
        """C_v on all B features."""
        return functional.linear(self.feat_bn, self.heads[0])

    @property
    def logits_infrared(self) -> Float[Tensor, "B C"]:
        """C_r on all B features."""
        return functional.linear(self.feat_bn, self.heads[1])


class DANet(nn.Module):
    """The network of all variants; they differ in their losses.

    Args:
        num_classes: C, the number of training identities.
        backbone: a name in backbone.ARCHITECTURES.
        weights: a .safetensors file of backbone weights; None keeps the random initial ones.
        width: channels of the first stage; 64 is torchvision's network.
        pooling: "average", "max" or "gem" (generalized mean with `gem_exponent`). Choice: the paper names none.
        stem: "one" stream (the paper), "two" streams or "zero_padding" (Table 1's simple baselines).
        teacher_ema: momentum of the averaged C_v and C_r of mutual learning; 0 disables them.

    Source: the paper, "Implementation details" and "Ablation Study" (BN neck and FC layer); Luo et al. 2019 (BN neck,
    whose bias is fixed at 0). Choice: classifiers read the feature after the BN neck and start normal, with std 0.001.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        weights: str | Path | None = None,
        *,
        width: int = 64,
        pooling: Literal["average", "max", "gem"] = "average",
        gem_exponent: float = 3.0,
        stem: Stem = "one",
        teacher_ema: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling, self.gem_exponent, self.teacher_ema = pooling, gem_exponent, teacher_ema
        self.backbone = ResNet(backbone, width, stem)
        self.neck = nn.BatchNorm1d(self.backbone.out_channels)
        self.neck.bias.requires_grad_(False)
        self.classifier = _head(self.backbone.out_channels, num_classes)
        self.classifier_visible = _head(self.backbone.out_channels, num_classes)
        self.classifier_infrared = _head(self.backbone.out_channels, num_classes)
        self.teachers = None  # part of the state, so that a resumed run has them
        if teacher_ema > 0:
            heads = copy.deepcopy([self.classifier_visible, self.classifier_infrared])
            self.teachers = nn.ModuleList(heads).requires_grad_(False)
        if weights is not None:
            self.backbone.load_weights(Path(weights))

    def embed(
        self, images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Features before and after the BN neck, float32. `modalities` is needed unless the stem is "one"."""
        maps = self.backbone(images, modalities)  # (B, D, H/16, W/16)
        feat = pool(maps, self.pooling, self.gem_exponent)  # (B, D)
        with torch.autocast(images.device.type, enabled=False):
            return feat, self.neck(feat)

    def forward(self, images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"] | None = None) -> Output:
        """Normalized images to what the losses need; see `Output`."""
        feat, feat_bn = self.embed(images, modalities)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.classifier(feat_bn)
        heads = self.classifier_visible.weight, self.classifier_infrared.weight
        teachers = None if self.teachers is None else (self.teachers[0].weight, self.teachers[1].weight)
        return Output(feat, feat_bn, logits, heads, teachers)  # type: ignore[arg-type]  # a ModuleList of Linear

    @torch.no_grad()
    def update_teachers(self) -> None:
        """After a step: teacher = momentum * teacher + (1 - momentum) * classifier. Source: Tarvainen, Valpola 2017."""
        if self.teachers is not None:
            for teacher, head in zip(self.teachers, (self.classifier_visible, self.classifier_infrared), strict=True):
                teacher.weight.lerp_(head.weight, 1 - self.teacher_ema)  # type: ignore[operator]


def pool(maps: Float[Tensor, "B D h w"], pooling: str, gem_exponent: float = 3.0) -> Float[Tensor, "B D"]:
    """Mean, maximum or generalized mean of each map, at least float32.

    "gem" is (mean x^p)^(1/p) of non-negative maps. Source: Radenovic et al., "Fine-tuning CNN Image Retrieval with No
    Human Annotation", 2018.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if pooling == "average":
        return maps.mean((2, 3))  # AdaptiveAvgPool2d has no deterministic CUDA gradient
    if pooling == "max":
        return maps.amax((2, 3))
    with torch.autocast(maps.device.type, enabled=False):
        return maps.clamp(min=1e-6).pow(gem_exponent).mean((2, 3)).pow(1 / gem_exponent)  # pow has no gradient at 0


def _head(features: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(features, num_classes, bias=False)
    nn.init.normal_(head.weight, std=0.001)  # near-uniform first predictions: L_id starts at log(C)
    return head
