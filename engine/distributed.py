"""One run in several processes (``torchrun``): who we are, what is gathered, what is agreed on.

Every function is the identity, or says "alone", in a process that was started by itself, so that
callers need no second path. Gathered batches have the rows of the one batch that a single process
would have: visible first, identities in the sampler's order.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import keep_freed_memory, resolve_device


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


@contextlib.contextmanager
def processes(gpu: str) -> Iterator[torch.device]:
    """Joins the processes that ``torchrun`` started, if it did, and leaves them at the end.

    On the CPU freed memory is kept for reuse; see `utils.keep_freed_memory`.

    Args:
        gpu: ``--gpu``; under torchrun each process takes the CUDA device of its local rank (NCCL),
            or the CPU (gloo).

    Yields:
        This process's device.

    Raises:
        ValueError: When there is no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        device = resolve_device(gpu)
        if device.type == "cpu":
            keep_freed_memory()
        yield device
        return
    on_cpu = gpu in ("cpu", "-1") or not torch.cuda.is_available()
    device = resolve_device("cpu" if on_cpu else os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects travel through the current device
    else:
        keep_freed_memory()
    dist.init_process_group("gloo" if on_cpu else "nccl")
    yield device
    # Only after success: with a dead peer this would wait for it.
    dist.destroy_process_group()


def parallel(net: nn.Module, *, sync_bn: bool = False) -> nn.Module:
    """The module to train: `net`, or `net` in DistributedDataParallel.

    Args:
        net: On its device, states loaded; with `sync_bn` its batch norms are exchanged in place.
        sync_bn: Batch statistics over all processes; CUDA only.
    """
    if size() == 1:
        return net
    device = next(net.parameters()).device
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    ids = [device.index] if device.type == "cuda" else None
    # A term of weight 0 may leave parameters without gradient.
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, find_unused_parameters=True)


def share_buffers(net: nn.Module) -> None:
    """Gives every process the main one's running statistics, which each has of its own rows."""
    if size() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; the gradient of a loss that every process computes from them alike."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(size())]
        dist.all_gather(parts, rows)
        both = torch.stack([part.unflatten(0, (2, -1)) for part in parts], dim=1)  # (2, n, PK, ..)
        return both.flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.unflatten(0, (2, size(), -1))[:, rank()]
        # DistributedDataParallel divides by the number of processes; the loss is one, not a mean.
        return size() * own.flatten(0, 1)


def gather_rows(rows: Tensor) -> Tensor:
    """The whole batch's rows, visible first, from each process's (2PK, ...), visible first.

    Gradient flows to the own rows. It is exact under DistributedDataParallel, whose mean over
    processes it undoes, when every process computes the same loss from the result.
    """
    return _GatherRows.apply(rows.contiguous()) if size() > 1 else rows


def gather_output(
    out: Mapping[str, Any], labels: Tensor, *, whole_read: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """A training output and its labels for the whole batch.

    Args:
        out: What `model.TwoStreamNet` returns in training mode for the own rows.
        labels: Of the own rows.
        whole_read: Whether the memory's part read, large and needed only by terms that are no mean
            over rows, is gathered too. Otherwise it stays the own rows', and the mean over
            processes of such a term, or of its gradient, is the whole batch's.
    """
    if size() == 1:
        return dict(out), labels
    whole = {k: gather_rows(v) if torch.is_tensor(v) else v for k, v in out.items()}
    if whole_read and whole.get("memory_read") is not None:
        read = whole["memory_read"]
        whole["memory_read"] = read._replace(part=gather_rows(read.part))
    return whole, gather_rows(labels)


def mean_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the processes of scalars by name, in one exchange that nothing waits for."""
    if size() == 1:
        return values
    total = torch.stack([value.double() for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, (total / size()).unbind(), strict=True))


def sum_of(counters: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Sums over the processes of CPU counters by level and name; booleans are joined by "or"."""
    if size() == 1:
        return counters
    gathered = gather_objects(counters)
    result = {}
    for level in counters:
        parts = [other[level] for other in gathered]
        result[level] = {
            name: torch.stack([part[name] for part in parts]).any(dim=0)
            if value.dtype == torch.bool
            else sum(part[name] for part in parts)
            for name, value in counters[level].items()
        }
    return result


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in order of rank; for plain values and arrays."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Waits until every process has come here."""
    if size() > 1:
        dist.barrier()


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(gather_objects(flag))


def from_main(value: Any) -> Any:
    """The main process's value, in every process."""
    if size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def share_of(count: int, unit: int) -> tuple[int, int]:
    """This process's share (first, last + 1) of `count` items, in whole units such as batches.

    Shares are contiguous, in order of rank, cover all, and may be empty.
    """
    units = -(-count // unit)
    bounds = [min(count, units * i // size() * unit) for i in (rank(), rank() + 1)]
    return bounds[0], bounds[1]
