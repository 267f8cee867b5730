"""One run in several processes (``torchrun``): ranks, gathered batches, sums and means.

Without torchrun every function returns what it was given, so that callers need no second path.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import all_gather

from engine.devices import resolve_device


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and logs."""
    return rank() == 0


@contextlib.contextmanager
def processes(gpu: str | None) -> Iterator[torch.device]:
    """Joins the process group if ``torchrun`` started this process, and leaves it at the end.

    Yields this process's device: that of ``--gpu``, and under torchrun the CUDA device of its local
    rank (NCCL), or the CPU (gloo). Other ranks than 0 log errors alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield resolve_device(gpu)
        return
    if os.environ["RANK"] != "0":
        logging.getLogger().setLevel(logging.ERROR)
    device = resolve_device(gpu, local_rank=os.environ["LOCAL_RANK"])
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    yield device
    # Only after success: with a dead peer this would wait for it.
    dist.destroy_process_group()


def parallel(
    net: nn.Module, *, sync_bn: bool = False, unused_parameters: bool = False
) -> nn.Module:
    """The module to train: `net`, on its device, or `net` in DistributedDataParallel.

    With `sync_bn` (CUDA only) the statistics of its batch norms become those of all processes.
    With `unused_parameters` the loss leaves some without gradient: each step then looks for them.
    """
    if size() == 1:
        return net
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return nn.parallel.DistributedDataParallel(
        net,
        find_unused_parameters=unused_parameters,
        broadcast_buffers=False,  # `share` sends them once an epoch
    )


def share(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by rank 0's."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of the batch that one process would have, from each process's (2PK, ...).

    Both have visible rows first, and identities in the sampler's order. Every process computes the
    same loss from the result, and the gradient of its rows is the sum over all these losses:
    DistributedDataParallel divides by their number.
    """
    if size() == 1:
        return rows
    shares = all_gather(rows)
    return torch.stack([share.unflatten(0, (2, -1)) for share in shares], dim=1).flatten(0, 2)


def gather_output(
    out: dict[str, Any], labels: Tensor, *, whole_reads: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """Gathers what `model.TwoStreamNet` returns in training, and the labels, for the whole batch.

    The memory's maps, which are large, stay the own rows' unless `whole_reads`: gradients are
    averaged over processes, so a mean over rows has the whole batch's gradient all the same.
    """
    whole = {k: gather_rows(v) if torch.is_tensor(v) else v for k, v in out.items()}
    if whole_reads:
        read = whole["memory_read"]
        maps = {k: gather_rows(v) for k, v in read._asdict().items() if torch.is_tensor(v)}
        whole["memory_read"] = read._replace(**maps)
    return whole, gather_rows(labels)


def mean_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the processes of scalars by name, in one all-reduce."""
    if size() == 1:
        return values
    total = torch.stack([value.double() for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, (total / size()).unbind(), strict=True))


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
