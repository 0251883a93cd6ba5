"""DANet (Fig. 2): one backbone for both modalities, a BN neck, and three bias-free classifiers C, C_v, C_r."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from danet_core.backbone import ResNet
from danet_core.files import StudyError
from danet_core.parameters import MutualTrains, Pooling, SidTrains, Streams

_GEM_FLOOR = 1e-6  # of a map's values, Radenovic et al.'s: the root of 0 has no gradient


class Embedding(NamedTuple):
    """What the network says of a batch of B images; every logits tensor covers all B images."""

    feat: Float[Tensor, "B D"]  # before the BN neck: the metric losses act on it
    feat_bn: Float[Tensor, "B D"]  # after the BN neck: the classifiers and the retrieval use it
    logits: Float[Tensor, "B C"]  # C
    logits_visible: Float[Tensor, "B C"]  # C_v
    logits_infrared: Float[Tensor, "B C"]  # C_r
    averaged_visible: Float[Tensor, "B C"] | None = None  # the averaged C_v, without gradient, where there is one
    averaged_infrared: Float[Tensor, "B C"] | None = None  # the averaged C_r
    mutual_visible: Float[Tensor, "B C"] | None = None  # C_v for L_M, where its gradient goes elsewhere than L_sid's
    mutual_infrared: Float[Tensor, "B C"] | None = None  # C_r for L_M


class DANet(nn.Module):
    """The network of the paper, which has one stream.

    Args:
        num_classes: training identities, C.
        backbone: "resnet50" (the paper), "resnet34" or "resnet18"; last stride 1.
        weights: a .safetensors file of backbone weights, or None for random ones.
        width: channels of the backbone's first stage; 64 is the paper's network.
        pooling: "average", "max" or "gem" (see `pool`), gem with `gem_exponent`.
        streams: "one" (the paper), "two" or "zero_padding", see backbone.py.
        averaged: keep moving averages of C_v and C_r, which `update_averages` moves.
        sid_trains: what the gradient of L_sid reaches: "all", or "classifiers", C_v and C_r without what is below them.
        mutual_trains: what the gradient of L_M reaches: "all", or "backbone", all but C_v and C_r.

    Raises StudyError for fewer than two classes, an unknown backbone or weights that do not fit.
    Source: the paper, Fig. 2 and "Implementation details"; the neck, with its bias fixed at 0, is Luo et al. 2019's.
    Choice: pooling is global average unless told otherwise; the paper does not name it.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        weights: str | Path | None = None,
        *,
        width: int = 64,
        pooling: Pooling = "average",
        gem_exponent: float = 3.0,
        streams: Streams = "one",
        averaged: bool = False,
        sid_trains: SidTrains = "all",
        mutual_trains: MutualTrains = "all",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise StudyError(f"num_classes: expected at least 2 training identities, found {num_classes}")
        self.pooling, self.gem_exponent = pooling, gem_exponent
        self.sid_trains, self.mutual_trains = sid_trains, mutual_trains
        self.backbone = ResNet(backbone, width, streams)
        self.neck = nn.BatchNorm1d(self.backbone.out_channels)
        self.neck.bias.requires_grad_(False)
        self.classifier = _head(self.backbone.out_channels, num_classes)
        self.classifier_visible = _head(self.backbone.out_channels, num_classes)
        self.classifier_infrared = _head(self.backbone.out_channels, num_classes)
        self.averages: nn.ModuleList | None = None  # of C_v and C_r; in the state, so that a resumed run has them
        if averaged:
            heads = copy.deepcopy([self.classifier_visible, self.classifier_infrared])
            self.averages = nn.ModuleList(heads).requires_grad_(False)
        if weights is not None:
            self.backbone.load_weights(Path(weights))

    def embed(
        self, images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Features before and after the BN neck, of images normalised as in training; float32 under autocast too.

        modalities: 0 visible, 1 infrared; StudyError without them, unless the network has one stream, which asks for
        none.
        """
        maps = self.backbone(images, modalities)  # (B, D, h, w)
        feat = pool(maps, self.pooling, self.gem_exponent)
        with torch.autocast(images.device.type, enabled=False):
            return feat, self.neck(feat)

    def forward(self, images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"] | None = None) -> Embedding:
        feat, feat_bn = self.embed(images, modalities)
        heads = self.classifier_visible, self.classifier_infrared
        with torch.autocast(images.device.type, enabled=False):
            supervised = feat_bn.detach() if self.sid_trains == "classifiers" else feat_bn
            output = Embedding(feat, feat_bn, self.classifier(feat_bn), *(head(supervised) for head in heads))
            if self.averages is not None:
                visible, infrared = (head(feat_bn.detach()) for head in self.averages)
                output = output._replace(averaged_visible=visible, averaged_infrared=infrared)
            if (self.sid_trains, self.mutual_trains) != ("all", "all"):
                fixed = self.mutual_trains == "backbone"
                weights = (head.weight.detach() if fixed else head.weight for head in heads)
                visible, infrared = (functional.linear(feat_bn, weight) for weight in weights)
                output = output._replace(mutual_visible=visible, mutual_infrared=infrared)
            return output

    @torch.no_grad()
    def update_averages(self, momentum: float) -> None:
        """Move the averages of C_v and C_r, where there are any: momentum * average + (1 - momentum) * classifier.

        Source: Tarvainen and Valpola 2017, whom the paper cites.
        """
        if self.averages is not None:
            heads = self.classifier_visible.weight, self.classifier_infrared.weight
            for average, weight in zip(self.averages.parameters(), heads, strict=True):
                average.lerp_(weight, 1 - momentum)


def pool(maps: Float[Tensor, "B D h w"], pooling: Pooling, gem_exponent: float = 3.0) -> Float[Tensor, "B D"]:
    """One number of each of the D maps: its mean, its maximum, or its generalised mean; float32 for 16-bit maps.

    "gem" is the mean of x^p to the power of 1/p, p = `gem_exponent`, of maps that are not negative. Among equal maxima
    the gradient is shared. Source: Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018.
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    if pooling == "average":
        return maps.mean(dim=(2, 3), dtype=wide)  # AdaptiveAvgPool2d has no deterministic CUDA gradient
    maps = maps.to(wide)
    if pooling == "max":
        return maps.amax(dim=(2, 3))
    with torch.autocast(maps.device.type, enabled=False):
        powers = maps.clamp(min=_GEM_FLOOR).pow(gem_exponent)
        return powers.mean(dim=(2, 3)).pow(1 / gem_exponent)


def _head(features: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(features, num_classes, bias=False)
    nn.init.normal_(head.weight, std=0.001)  # near-uniform first predictions, so that L_id starts at log(C)
    return head
