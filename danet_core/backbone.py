"""One-stream ResNet trunks with the last stride set to 1.

Layers and parameter names are torchvision's, so that its ImageNet weights load as they are and the tests can compare
the two; importing torchvision itself costs every notebook that needs a network more than torch does. `width` below 64
gives the narrow networks of the embedded benchmark.
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from danet_core.files import StudyError


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


class ResNet(nn.Module):
    """ResNet without pooling and classifier: images (B, 3, H, W) to feature maps (B, out_channels, H / 16, W / 16).

    Args:
        name: one of ARCHITECTURES.
        width: channels of the first stage; 64 is torchvision's network.

    Raises StudyError for an unknown name.
    Source: He et al. 2016 as in torchvision.models.resnet; last stride as in the paper, "Implementation details".
    """

    def __init__(self, name: str, width: int = 64) -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise StudyError(
                f"unknown backbone {name!r}; expected one of {', '.join(ARCHITECTURES)}: correct `backbone`"
            )
        block, depths = ARCHITECTURES[name]
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = [width, *(width * 2**stage * block.expansion for stage in range(4))]
        stages = [_stage(block, channels[stage], width * 2**stage, depths[stage], STRIDES[stage]) for stage in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.out_channels = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E h w"]:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (B, width, H / 4, W / 4)
        maps = self.layer2(self.layer1(maps))  # (B, 2 width x expansion, H / 8, W / 8)
        return self.layer4(self.layer3(maps))  # (B, 8 width x expansion, H / 16, W / 16)

    def load_weights(self, path: Path) -> None:
        """Load a .safetensors file of backbone weights; a classifier in it (`fc.`) is left out.

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


def _stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, planes: int, depth: int, stride: int
) -> nn.Sequential:
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))
    first = block(channels, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out, planes) for _ in range(depth - 1)))
