"""ResNet trunks with the last stride set to 1, of one stream or with one of the other two entrances.

Layers and parameter names are torchvision's, so that its ImageNet weights load as they are and the tests can compare
the two; importing torchvision itself costs every notebook that needs a network more than torch does. `width` below 64
gives the narrow networks of the embedded benchmark. The ways in, Wu et al. 2017's base methods (ICCV, SYSU-MM01):
    one           every image through the same layers
    two           conv1 and bn1 for each modality, every later layer shared
    zero_padding  two input channels, the first for visible grey, the second for infrared; the absent one is 0
All of them start from the same weights of one stream: `two` from conv1 and bn1 twice, `zero_padding` from the sum of
conv1's filters over colours for both channels, which answers a grey image nearly as before: not quite, because the
three colours are normalised by numbers of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from danet_core import INFRARED, VISIBLE
from danet_core.files import StudyError
from danet_core.parameters import Streams


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
STRIDES = (
    1,
    2,
    2,
    1,
)  # the fourth is 2 in torchvision; the paper sets "the stride size of the last convolutional layer" to 1
LUMA = (0.299, 0.587, 0.114)  # red, green, blue in grey; ITU-R BT.601


class ResNet(nn.Module):
    """ResNet without pooling and classifier: images (B, 3, H, W) to feature maps (B, out_channels, H / 16, W / 16).

    Args:
        name: one of ARCHITECTURES.
        width: channels of the first stage; 64 is torchvision's network.
        streams: how images enter, see above; all but "one" need their modalities.

    Raises StudyError for an unknown name.
    Source: He et al. 2016 as in torchvision.models.resnet; last stride as in the paper, "Implementation details".
    Choice: Wu et al.'s zero padding is kept (one grey channel a modality, no colour) on this trunk and in normalised
    units, where a channel of zeros passes conv1, which has no bias, as exactly nothing: filters that see one modality
    only can come about, which is what the method is for. RGB + RGB would keep colour, and be another method.
    """

    def __init__(self, name: str, width: int = 64, streams: Streams = "one") -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise StudyError(
                f"unknown backbone {name!r}; expected one of {', '.join(ARCHITECTURES)}: correct `backbone`"
            )
        block, depths = ARCHITECTURES[name]
        self.streams = streams
        self.conv1 = _entrance(2 if streams == "zero_padding" else 3, width)
        self.bn1 = nn.BatchNorm2d(width)
        if streams == "two":  # conv1 and bn1 are then the visible ones
            self.conv1_infrared, self.bn1_infrared = _entrance(3, width), nn.BatchNorm2d(width)
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
        if self.streams != "one" and modalities is None:
            raise StudyError(
                f"a network with streams {self.streams} needs the modality of each image (0 visible, 1 infrared), found"
                " none; give `modalities`, or take a variant with one stream"
            )
        if modalities is None or self.streams == "one":
            maps = self.bn1(self.conv1(images))
        elif self.streams == "two":
            maps = self._two_entrances(images, modalities)
        else:
            maps = self.bn1(self.conv1(zero_padded(images, modalities)))
        maps = self.maxpool(self.relu(maps))  # (B, width, H / 4, W / 4)
        maps = self.layer2(self.layer1(maps))  # (B, 2 width x expansion, H / 8, W / 8)
        return self.layer4(self.layer3(maps))  # (B, 8 width x expansion, H / 16, W / 16)

    def _two_entrances(self, images: Tensor, modalities: Tensor) -> Tensor:
        """(B, width, H / 2, W / 2), each image by its modality's layers, whose batch norm sees no other image."""
        rows = [torch.nonzero(modalities == one).flatten() for one in (VISIBLE, INFRARED)]
        visible = self.bn1(self.conv1(images[rows[VISIBLE]])) if len(rows[VISIBLE]) else None
        infrared = self.bn1_infrared(self.conv1_infrared(images[rows[INFRARED]])) if len(rows[INFRARED]) else None
        parts = [part for part in (visible, infrared) if part is not None]
        return torch.cat(parts).index_select(0, torch.cat(rows).argsort())

    def load_weights(self, path: Path) -> None:
        """Load a .safetensors file of backbone weights of one stream; a classifier in it (`fc.`) is left out.

        Raises StudyError, naming file and first offending tensor, when it is missing, damaged or of another network.
        """
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise StudyError(
                f"backbone weights {path} are missing; `dvc repro` makes them in its `weights` stages"
            ) from None
        except SafetensorError as error:
            raise StudyError(
                f"backbone weights {path} are damaged ({error}); remove the file and run `dvc repro`"
            ) from None
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
        tensors = self._for_entrance(tensors)
        own = self.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            expected = tuple(own[name].shape) if name in own else "no such tensor"
            found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
            if expected != found:
                raise StudyError(
                    f"backbone weights {path}, tensor {name}: expected {expected}, found {found}; "
                    "they belong to another `backbone` or `width`"
                )
        self.load_state_dict(tensors)

    def _for_entrance(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of one stream as weights of this network."""
        if self.streams == "two":
            first = {name: tensor for name, tensor in tensors.items() if name.startswith(("conv1.", "bn1."))}
            return {**tensors, **{name.replace("1.", "1_infrared.", 1): tensor for name, tensor in first.items()}}
        if self.streams == "zero_padding" and "conv1.weight" in tensors:
            grey = tensors["conv1.weight"].sum(1, keepdim=True)  # (width, 1, 7, 7)
            return {**tensors, "conv1.weight": grey.repeat(1, 2, 1, 1)}
        return tensors


def zero_padded(images: Float[Tensor, "B 3 H W"], modalities: Int[Tensor, " B"]) -> Float[Tensor, "B 2 H W"]:
    """Grey images, each in the channel of its modality, visible first; zeros in the other.

    images: normalised, so that 0 is the mean. modalities: 0 visible, 1 infrared.
    Source: Wu et al. 2017, deep zero-padding.
    """
    red, green, blue = images.unbind(1)
    grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # (B, H, W)
    present = torch.stack((modalities == VISIBLE, modalities == INFRARED), 1)  # (B, 2)
    return grey[:, None] * present[:, :, None, None]


def _entrance(channels: int, width: int) -> nn.Conv2d:
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
