"""The processes of `test_distributed.py`: python distributed_worker.py FOLDER."""

import os
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

import short_run  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import options  # noqa: E402
from data_manager import eval_set  # noqa: E402
from engine import distributed  # noqa: E402
from engine import setup as training  # noqa: E402
from engine.train import make_optimizer, set_learning_rate, training_step  # noqa: E402
from loss import TERM_WEIGHTS, Criterion  # noqa: E402
from memory import MemoryHealth  # noqa: E402
from model import TwoStreamNet  # noqa: E402

IDS, IMAGES = 6, 2  # P, K of the whole batch


def one_step(settings: dict) -> dict:
    """Terms, gradients and counters of one step in float64, batch statistics frozen."""
    torch.manual_seed(0)
    net = TwoStreamNet(6, arch="resnet18", num_strips=2, local_feat_dim=8, shrink=0.02, **settings)
    net.double().train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    generator = torch.Generator().manual_seed(1)
    size = (IDS * IMAGES, 3, 32, 16)
    images = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = torch.randperm(IDS, generator=generator).repeat_interleave(IMAGES)
    rows = len(labels) // distributed.size()
    own = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    weights = {**TERM_WEIGHTS, "decorrelation": 0.5}
    criterion = Criterion(label_smoothing=0.1, num_strips=2, weights=weights)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, 0.0)
    health = MemoryHealth()
    terms, _ = training_step(
        distributed.parallel(net),
        criterion,
        optimizer,
        visible=images[0][own],
        infrared=images[1][own],
        labels=labels[own].repeat(2),
        order=[1, 0],
        weights=weights,
        health=health,
    )
    health_sum = MemoryHealth()
    health_sum.load_state_dict(distributed.sum_of(health.state_dict()))
    return {
        "terms": {k: v.double() for k, v in distributed.mean_of(terms).items()},
        "gradients": {k: p.grad for k, p in net.named_parameters() if p.grad is not None},
        "health": health_sum.summary(),
    }


def run_and_evaluate(data: Path, folder: Path) -> tuple[list[bool], dict]:
    """Trains an epoch; whether each rank ends with equal states; a sharded evaluation."""
    arguments = short_run.arguments(data, folder, "--test-batch", 3, "--batch-size", 6)
    args = options.train_parser("").parse_args(arguments)
    options.resolve(args)
    torch.manual_seed(0)
    net = training.network_from_flags(args, 6, "mg")
    evaluate = training._evaluator(
        args, eval_set("regdb", data), net, torch.device("cpu"), "stand-in"
    )
    result = evaluate()
    wrapped = distributed.parallel(net).train()
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, 0.1)
    generator = torch.Generator().manual_seed(distributed.rank())  # other rows on each rank
    for _ in range(2):
        training_step(
            wrapped,
            Criterion(num_strips=2),
            optimizer,
            visible=torch.randn(4, 3, 32, 16, generator=generator),
            infrared=torch.randn(4, 3, 32, 16, generator=generator),
            labels=torch.arange(2).repeat_interleave(2).repeat(2) + 2 * distributed.rank(),
            order=[0, 1],
            weights=TERM_WEIGHTS,
        )
    distributed.share_buffers(net)
    states = distributed.gather_objects({k: v.numpy() for k, v in net.state_dict().items()})
    alike = [all((state[k] == states[0][k]).all() for k in state) for state in states]
    return alike, result


def work(data: Path, folder: Path) -> None:
    """One process's part; the main one writes FOLDER/report.pt."""
    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        methods = {"AGW": one_step({"head": "agw"})}  # its non-local blocks need the real ResNet
        short_run.use_narrow_backbone()
        methods |= {memory: one_step({"memory": memory}) for memory in ("sg", "mg")}
        alike, evaluation = run_and_evaluate(data, folder)
        if distributed.is_main():
            report = {"methods": methods, "alike": alike, "evaluation": evaluation}
            torch.save(report, folder / "report.pt")


def fork(count: int, rank: int, port: int, data: Path, folder: Path) -> int:
    """Starts one process with torchrun's environment; returns its id."""
    child = os.fork()
    if child == 0:
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
        values = map(str, (count, rank, rank, port, "127.0.0.1"))
        os.environ.update(zip(names, values, strict=True))
        try:
            work(data, folder)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


def main() -> int:
    """Does the work with one, two and three processes; torch is imported only once for all."""
    root = Path(sys.argv[1])
    data = short_run.write_data(root / "data")
    failed = 0
    for count in (1, 2, 3):
        folder = root / str(count)
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork(count, rank, port, data, folder) for rank in range(count)]
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return failed


if __name__ == "__main__":
    sys.exit(main())
