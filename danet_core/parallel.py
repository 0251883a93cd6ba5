"""One run in several processes (torchrun, torch's DistributedDataParallel), each with its rows of every batch.

The paper's losses compare images with each other, so what each process computed of its rows is gathered, with gradient,
and every process computes the same loss of the whole batch. 1 and N processes then have the same loss and the same
gradient of every parameter, but for rounding; batch norm over the whole batch is needed for that, see `Team.network`.

Labels and modalities are not sent: each process draws the same batches from the same generator and knows them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx

from danet_core.files import StudyError
from danet_core.parameters import BatchNorm
from danet_core.repro import resolve_device

_T = TypeVar("_T")


@dataclass(frozen=True)
class Team:
    """The processes that train one run together. Alone, every method gives back what it is given."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # of this process
    parent: int = 0  # process id of torchrun

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads and writes checkpoints, model and record."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch: as many as every other's, and in the order of the ranks.

        A batch is grouped by identity, so that a process has whole identities wherever their number allows it.
        Raises StudyError for a batch that cannot be split evenly.
        """
        if batch % self.size:
            raise StudyError(
                f"a batch of {batch} images cannot be split evenly between {self.size} processes; start a number of "
                f"processes that divides {batch}, or change `ids_per_batch` of the recipe in params.yaml"
            )
        own = batch // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def gathered(self, rows: Float[Tensor, "b ..."]) -> Float[Tensor, "B ..."]:
        """The rows of all processes, in the order of the batch, with gradient."""
        return rows if self.size == 1 else _Gather.apply(rows, self.rank, self.size)

    def network(self, model: nn.Module, batch_norm: BatchNorm) -> nn.Module:
        """`model` as the processes train it together: called as before, its gradients averaged in the backward pass.

        Its output is the loss terms, in whose graph DDP looks for the parameters that get a gradient. All processes
        start from the first one's weights. With `batch_norm` "global" the layers of `model` are replaced, in place, by
        such as take mean and variance over the whole batch: the result does not depend on the number of processes. With
        "per_process" each takes them over its own rows, which sends nothing, and the result does depend on that number;
        the running statistics are then those of the first process's rows.

        `model` lies on the device of the process.
        """
        if self.size == 1:
            return model
        if batch_norm == "global" and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif batch_norm == "global":
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.__class__ = _GlobalBatchNorm  # same parameters and buffers, another forward
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=True,  # a variant without ML leaves C_v and C_r without gradient
        )

    def from_first(self, make: Callable[..., _T], *arguments: Any) -> _T:
        """What `make` of the arguments gives in the first process, in every process; the others wait for it.

        Where it raises in the first process, the others end with it: see `processes`.
        """
        if self.size == 1:
            return make(*arguments)
        box: list[Any] = [make(*arguments) if self.first else None]
        distributed.broadcast_object_list(box)
        return box[0]

    def any(self, holds: bool) -> bool:
        """Whether it holds in any of the processes; the same answer in all of them.

        Raises StudyError in a process whose torchrun has ended without it, since nobody waits for its result.
        """
        if self.size == 1:
            return holds
        if os.getppid() != self.parent:
            raise StudyError("torchrun has ended, and its processes end with it; start it again to go on")
        flag = torch.tensor(int(holds), device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def share_buffers(self, model: nn.Module, batch_norm: BatchNorm) -> None:
        """Give every process the first one's running statistics, where they are not equal already."""
        if self.size > 1 and batch_norm == "per_process":
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def require_same(self, facts: dict[str, Any], differing: Callable[[Any, Any], list[str]]) -> None:
        """Raise StudyError, in all processes but the first, unless `facts` are the first one's.

        Processes on several machines read their own copies of data, weights and code.
        """
        if keys := differing(self.from_first(lambda: facts), facts):
            raise StudyError(
                f"this process has another {', '.join(keys)} than the first one, and a run of two kinds is no result; "
                "copy the project's folder, or share it, so that all machines have the same"
            )


ALONE = Team()


@contextlib.contextmanager
def processes(device: str) -> Iterator[Team]:
    """The processes that torchrun started, connected for the block; elsewhere this one alone.

    They talk through NCCL on GPUs, one GPU to a process, and through gloo on CPUs. An error of any process ends all:
    its StudyError is raised again with the process's number, and the others raise one when they miss it.

    Args:
        device: "auto", "cpu" or "cuda"; the GPU is that of the process's number on its machine.

    Raises StudyError for a GPU that is not there and when another process has ended.
    """
    if not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield Team(device=resolve_device(device))
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    try:
        target = resolve_device(device)
        if target.type == "cuda":
            if local >= torch.cuda.device_count():
                raise StudyError(
                    f"expected a GPU for each process, found {torch.cuda.device_count()} on this machine; lower "
                    "--nproc-per-node"
                )
            target = torch.device("cuda", local)
            torch.cuda.set_device(target)
        distributed.init_process_group("nccl" if target.type == "cuda" else "gloo", rank=rank, world_size=size)
        yield Team(rank, size, target, os.getppid())
        distributed.destroy_process_group()  # after an error the process ends, and a group without all members may hang
    except StudyError as error:
        raise StudyError(f"process {rank + 1} of {size}: {error}") from None
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise StudyError(
            f"process {rank + 1} of {size}: another process has ended, and none goes on without it; its own message "
            "stands above or below, and the same command goes on from the last checkpoint"
        ) from error


class _Gather(torch.autograd.Function):
    """All rows from everyone's; backwards N times the gradient of the own rows.

    N processes compute the same loss L of the same gathered rows, and autograd sees the sum of what they compute, N L:
    N times dL/drow is the sum over the processes of what each says of the row, and since they say the same, nothing
    has to be sent. DDP then divides each parameter's summed gradient by N, which leaves dL/dparameter.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].chunk(ctx.size)[ctx.rank] * ctx.size, None, None


class _Sum(torch.autograd.Function):
    """Sum of everyone's values; backwards the sum of everyone's gradients, since each value is in all the sums."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.apply(gradients[0])


class _GlobalBatchNorm(nn.BatchNorm2d):
    """What SyncBatchNorm does, whose kernels are a GPU's only, in operations that a CPU has."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Maps, or the neck's features."""

    def forward(self, input: Float[Tensor, "b C ..."]) -> Float[Tensor, "b C ..."]:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        axes, per_channel = [0, *range(2, wide.ndim)], (1, -1, *[1] * (wide.ndim - 2))
        count = wide.numel() // wide.shape[1] * distributed.get_world_size()
        mean = _Sum.apply(wide.sum(axes)) / count  # (C,)
        centred = wide - mean.view(per_channel)
        variance = _Sum.apply(centred.square().sum(axes)) / count  # (C,) of the deviations: no cancellation
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(per_channel) + self.bias.view(per_channel)).to(input.dtype)
