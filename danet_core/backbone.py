"""ResNet without pooling and classifier, last stride 1.

Layers and parameter names are torchvision's, so that its ImageNet weights load unchanged. `width` below 64 gives the
narrow networks of the embedded benchmark. The stem decides how images enter:
    one            every image through the same layers (the paper)
    two            conv1 and bn1 for each modality, all later layers shared
    zero_padding   two input channels, visible gray and infrared gray; the absent one is 0
`two` and `zero_padding` are simple baselines of the paper's Table 1. Source: Wu et al., ICCV 2017 (SYSU-MM01).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from danet_core import INFRARED, VISIBLE

Stem = Literal["one", "two", "zero_padding"]
LUMA = (0.299, 0.587, 0.114)  # red, green, blue in gray; ITU-R BT.601


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, He et al. 2016, Fig. 5 left."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = _conv(channels, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.bn2(self.conv2(out))
        out += maps if self.downsample is None else self.downsample(maps)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, He et al. 2016, Fig. 5 right; the stride is the 3x3's."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = _conv(channels, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += maps if self.downsample is None else self.downsample(maps)
        return self.relu(out)


def _conv(channels: int, planes: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, planes, kernel, stride, padding=kernel // 2, bias=False)


ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
STRIDES = (1, 2, 2, 1)  # the last is 2 in torchvision; the paper: "the stride size of the last convolutional layer"


class ResNet(nn.Module):
    """Images (B, 3, H, W) to feature maps (B, out_channels, H / 16, W / 16).

    Args: name: one of ARCHITECTURES. width: channels of the first stage; 64 is torchvision's network. stem: see top.
    Raises ValueError for an unknown name.
    Source: He et al. 2016 as in torchvision.models.resnet; last stride as in the paper, "Implementation details".
    """

    def __init__(self, name: str, width: int = 64, stem: Stem = "one") -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(ARCHITECTURES)}")
        block, depths = ARCHITECTURES[name]
        self.stem = stem
        self.conv1 = _first_conv(2 if stem == "zero_padding" else 3, width)
        self.bn1 = nn.BatchNorm2d(width)
        if stem == "two":  # conv1 and bn1 are then the visible ones
            self.conv1_infrared, self.bn1_infrared = _first_conv(3, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = [width, *(width * 2**stage * block.expansion for stage in range(4))]
        stages = [_stage(block, channels[stage], width * 2**stage, depths[stage], STRIDES[stage]) for stage in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.out_channels = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B E h w"]:
        if self.stem == "one":
            maps = self.bn1(self.conv1(images))
        elif modalities is None:
            raise ValueError(f"stem {self.stem!r} needs the modality of each image")
        elif self.stem == "two":
            maps = self._two_stems(images, modalities)
        else:
            maps = self.bn1(self.conv1(zero_padded(images, modalities)))
        maps = self.maxpool(self.relu(maps))  # (B, width, H / 4, W / 4)
        maps = self.layer2(self.layer1(maps))  # (B, 2 width x expansion, H / 8, W / 8)
        return self.layer4(self.layer3(maps))  # (B, 8 width x expansion, H / 16, W / 16)

    def _two_stems(self, images: Tensor, modalities: Tensor) -> Tensor:
        """(B, width, H / 2, W / 2): the batch norm of a modality sees the images of that modality only.

        A training batch has as many visible as infrared images: to count them would stall a GPU's queue.
        """
        if not self.training:  # running statistics: no image depends on the others
            visible = (modalities == VISIBLE)[:, None, None, None]
            return torch.where(visible, self.bn1(self.conv1(images)), self.bn1_infrared(self.conv1_infrared(images)))
        torch._assert_async(2 * modalities.sum() == len(modalities), "two streams need equal numbers of each modality")
        order = modalities.argsort(stable=True)  # visible images first
        visible, infrared = images[order].chunk(2)
        maps = (self.bn1(self.conv1(visible)), self.bn1_infrared(self.conv1_infrared(infrared)))
        return torch.cat(maps).index_select(0, order.argsort())

    def load_weights(self, path: Path) -> None:
        """Load one-stream backbone weights from a .safetensors file; its classifier (`fc.`) is ignored.

        Raises ValueError with file and first offending tensor if the file is missing, damaged or of another network.
        """
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise ValueError(f"backbone weights {path} are missing; `dvc repro` makes them") from None
        except SafetensorError as error:
            raise ValueError(f"backbone weights {path} are damaged ({error}); remove them, run `dvc repro`") from None
        tensors = self._for_stem({name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")})
        own = self.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            expected, found = (tuple(known[name].shape) if name in known else "nothing" for known in (own, tensors))
            if expected != found:
                raise ValueError(f"backbone weights {path}, {name}: expected {expected}, found {found}; check `width`")
        self.load_state_dict(tensors)

    def _for_stem(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of one stream as weights of this stem: both modalities start with the same ones."""
        if self.stem == "two":
            first = {name: tensor for name, tensor in tensors.items() if name.startswith(("conv1.", "bn1."))}
            return {**tensors, **{name.replace("1.", "1_infrared.", 1): tensor for name, tensor in first.items()}}
        if self.stem == "zero_padding" and "conv1.weight" in tensors:
            gray = tensors["conv1.weight"].sum(1, keepdim=True)  # answers a gray image nearly as the colors did
            return {**tensors, "conv1.weight": gray.repeat(1, 2, 1, 1)}
        return tensors


def zero_padded(images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"]) -> Float[Tensor, "B 2 H W"]:
    """Gray images in the channel of their modality, visible first; the other channel is zero.

    Args: images: normalized, so that 0 is the mean. Source: Wu et al. 2017, deep zero-padding.
    """
    red, green, blue = images.unbind(1)
    gray = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # (B, H, W)
    present = torch.stack((modalities == VISIBLE, modalities == INFRARED), 1)  # (B, 2)
    return gray[:, None] * present[:, :, None, None]


def _first_conv(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, planes: int, depth: int, stride: int
) -> nn.Sequential:
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))
    first = block(channels, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out, planes) for _ in range(depth - 1)))
