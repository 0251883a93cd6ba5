"""Export a trained run: `python -m danet_study.export runs/<run> --onnx model.onnx --program model.pt2`.

In: uint8 RGB images (N, 3, H, W) of the run's size, any N; for the stems "two" and "zero_padding" also the modalities,
int64 (N,). Out: the run's test feature, float32 (N, D). Pixels are normalized inside. Features are not scaled to
length 1: the cosine distance does that, here and in `search`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from danet_core.model import DANet
from danet_study.checkpoint import load_run
from danet_study.config import Augment
from danet_study.data import normalize
from danet_study.determinism import deterministic
from danet_study.files import StudyError, atomic_path

TOLERANCE = 1e-4  # difference from PyTorch's features, as a share of the largest


class TestFeature(nn.Module):
    """The network from bytes to the feature that a run is scored by."""

    def __init__(self, model: DANet, config: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.augment = model, Augment(**config["recipe"]["augment"])
        self.part = ("before_bn", "after_bn").index(config["model"]["test_feature"])

    def forward(
        self, images: UInt8[Tensor, "N 3 H W"], modalities: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, "N D"]:
        return self.model.embed(normalize(images, self.augment), modalities)[self.part]


@torch.no_grad()
def export(run: str | Path, *, onnx: Path | None = None, program: Path | None = None) -> dict[Path, float]:
    """Write a run's network to an .onnx file, to a .pt2 file for `torch.export.load`, or to both.

    Returns by file the largest difference from PyTorch's features, as a share of the largest feature. Raises StudyError
    for a missing run or package, and for features that differ by more than TOLERANCE.
    """
    model, record = load_run(run)
    height, width = (record["config"]["dataset"]["image"][side] for side in ("height", "width"))
    one_stream = record["config"]["model"]["stem"] == "one"

    def inputs(n: int) -> tuple[Tensor, ...]:
        images = torch.randint(256, (n, 3, height, width), dtype=torch.uint8)
        return (images,) if one_stream else (images, torch.arange(n) % 2)

    network = TestFeature(model.to(memory_format=torch.contiguous_format), record["config"]).eval()
    differences = {}
    with deterministic(0):
        given = inputs(5)
        expected = network(*given)  # `normalize` caches its constants: before the tracer runs it
        axes = {0: torch.export.Dim("N")}
        shapes = {"images": axes} if one_stream else {"images": axes, "modalities": axes}
        traced = torch.export.export(network, inputs(2), dynamic_shapes=shapes).run_decompositions({})
        for path, write in ((onnx, write_onnx), (program, write_program)):
            if path is not None:
                with atomic_path(path) as temporary:
                    found = write(traced, temporary, given)
                    differences[path] = float((found - expected).abs().max() / expected.abs().max())
                    if not differences[path] <= TOLERANCE:
                        raise StudyError(
                            f"{path}: features differ from PyTorch's by {differences[path]:.0e}; not written"
                        )
    return differences


def write_program(traced: torch.export.ExportedProgram, path: Path, given: tuple[Tensor, ...]) -> Tensor:
    """Write a .pt2 file; returns the features of `given` from that file."""
    torch.export.save(traced, path)
    return torch.export.load(path).module()(*given)


def write_onnx(traced: torch.export.ExportedProgram, path: Path, given: tuple[Tensor, ...]) -> Tensor:
    """Write an .onnx file; returns the features of `given` from that file by ONNX Runtime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch.onnx translates with
    except ImportError as error:
        raise StudyError(f"ONNX needs the package {error.name}; run `pip install onnxruntime onnxscript`") from None
    torch.onnx.export(traced, f=path, dynamo=True, external_data=False, verbose=False, output_names=["features"])
    session = onnxruntime.InferenceSession(path)
    named = zip(session.get_inputs(), given, strict=True)
    return torch.from_numpy(session.run(None, {node.name: values.numpy() for node, values in named})[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m danet_study.export", description="Export the network of a trained run.")
    parser.add_argument("run", type=Path, help="the run's folder, runs/<run>")
    parser.add_argument("--onnx", type=Path, help="write this .onnx file")
    parser.add_argument("--program", type=Path, help="write this .pt2 file, for torch.export.load")
    given = parser.parse_args(arguments)
    if given.onnx is None and given.program is None:
        parser.error("name the file to write: --onnx, --program, or both")
    try:
        for path, difference in export(**vars(given)).items():
            print(f"{path}: largest difference from PyTorch's features {difference:.0e} of the largest feature")
    except StudyError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
