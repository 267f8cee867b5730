"""Measures when the memory is read; writes the tables of what_the_memory_does.md and its figure.

    python -m docs.memory_numbers    # about three minutes of one core
    python -m docs.memory_numbers --checkpoint runs/demo/last.pt --data-path runs/demo/data
    python -m docs.memory_numbers --study runs/reproduce --data-path data/study

The second form measures a trained MG-MRA on images of its training set, and rewrites that table
alone; the third does so with the trained memories of the study (table `continued`).

Letters in shapes: ``n`` queries, ``m`` prototypes of a bank, ``C`` channels.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.plain import TERM_WEIGHTS
from data_loader import EvalLoader
from data_manager import data_name, train_set
from datasets.decode import ImageCache
from engine.checkpoints import open_network
from engine.train import make_optimizer, set_learning_rate, training_step
from figures.page import GREY, PAGE_WIDTH, add_legend, save, styled
from loss import Criterion
from memory import MultiGranularityMemory
from model import TwoStreamNet
from networks.memory_health import MemoryHealth
from networks.settings import LEVELS, SHRINK, TEMPERATURE
from reproduction.plan import STUDY_SPLITS, plan

PAGE = Path(__file__).with_name("what_the_memory_does.md")
FIGURE = Path(__file__).with_name("zero_reads.png")
BANKS = {206: "RegDB", 395: "SYSU-MM01", 713: "LLCM"}  # training identities
QUERIES = 512
NORM = 50.0  # of the queries of the table of rules
LARGEST_NORM = 1e4  # a query that needs more is never read
MAP_NORMS = (40, 60)  # a position of ResNet-50's last map with ImageNet weights: an estimate
RULES = {  # settings of the memory, as flags and as arguments
    "`paper`, lambda 0.0025": {},
    "`first`, lambda 0.0025": {"variant": "first"},
    "`released`, lambda 0.0025": {"variant": "released"},
    "`paper`, `--shrink auto`": {"shrink_scale": 1.0},
    "`paper`, `--shrink auto --shrink-scale 3`": {"shrink_scale": 3.0},
    "the same with `--addressing cosine`": {"shrink_scale": 3.0, "temperature": TEMPERATURE},
}
TRAININGS = {  # the same as arguments of the network
    "`paper`": {},
    "`first`": {"memory_variant": "first"},
    "`released`": {"memory_variant": "released"},
    "`paper`, `--shrink 0`": {"shrink": 0.0},
    "`paper`, `--shrink auto`": {"shrink_scale": 1.0},
    "`paper`, `--memory-levels part`": {"memory_levels": "part"},
    "`paper`, `--addressing cosine --shrink auto --shrink-scale 3`": {
        "shrink_scale": 3.0,
        "temperature": TEMPERATURE,
    },
}
STEPS, IDS_PER_BATCH, IMAGES_PER_ID = 4, 4, 2  # of the comparison with no memory
FIRST_RATE = 0.01  # of the published warm-up's first epoch
IMAGES = 64  # of each modality, for a checkpoint


# --- a bank's numbers -----------------------------------------------------------------------------


def initial_memory(*sizes: int, **settings: Any) -> MultiGranularityMemory:
    """The memory before any training, of sizes L and, other than the method's, T, R, C."""
    torch.manual_seed(0)
    return MultiGranularityMemory(*sizes, **settings).requires_grad_(False)


def banks_of(memory: MultiGranularityMemory) -> dict[str, Tensor]:
    """The banks (m, C) by level."""
    return dict(zip(LEVELS, (memory.part_bank.detach(), *memory.banks()), strict=True))


def statistics(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Usage statistics of one read's addressing weights, as in the log of a training."""
    health = MemoryHealth()
    health.update(weights)
    return health.summary()


def rectified_queries(dim: int) -> Tensor:
    """Directions (n, C) like those of a map after ReLU: half of the channels are zero."""
    gen = torch.Generator().manual_seed(1)
    queries = torch.randn(QUERIES, dim, generator=gen).relu()
    return queries / queries.norm(dim=1, keepdim=True)


def some_of(bank: Tensor) -> Tensor:
    """Directions (n, C) of prototypes: the most selective reads that the level above can give."""
    rows = bank[:: max(1, len(bank) // QUERIES)][:QUERIES]
    return rows / rows.norm(dim=1, keepdim=True)


def norm_needed(directions: Tensor, bank: Tensor, threshold: float) -> np.ndarray:
    """Norm from which on each query reads a bank: (n,), 0 always, infinite never.

    A query's largest weight grows with its norm, so a bisection finds the norm at which it passes
    the threshold.

    Args:
        directions: Queries of norm 1, (n, C).
        bank: Prototypes, (m, C).
        threshold: Weights at or below it are dropped.
    """
    if threshold * len(bank) < 1:  # the uniform weight 1 / m already passes
        return np.zeros(len(directions))
    scores = directions @ bank.t()  # (n, m)
    scores -= scores.amax(dim=1, keepdim=True)  # the largest is 0
    low = torch.zeros(len(scores), 1)
    high = torch.full_like(low, LARGEST_NORM)
    for _ in range(30):
        middle = (low + high) / 2
        zero = 1 / (scores * middle).exp().sum(dim=1, keepdim=True) <= threshold
        low, high = torch.where(zero, middle, low), torch.where(zero, high, middle)
    return torch.where(high < LARGEST_NORM, high, math.inf).squeeze(1).numpy()


def largest_weight(query_norm: float, bank: Tensor) -> float:
    """Upper bound of any addressing weight of queries of at most this norm.

    Scores lie within +-(query norm * largest prototype norm), by Cauchy and Schwarz.
    """
    score = query_norm * float(bank.norm(dim=1).max())
    return 1 / (1 + (len(bank) - 1) * math.exp(-2 * score))


def bank_rows(num_ids: int) -> list[list[str]]:
    """Rows of the table of banks: what a level's queries can be, and need to be, in `paper`."""
    rows = []
    longest_query = math.inf  # the part level is queried with the map
    directions = rectified_queries(dim=2048)
    for level, bank in banks_of(initial_memory(num_ids)).items():
        longest = float(bank.norm(dim=1).max())
        needed = np.quantile(norm_needed(directions, bank, SHRINK), (0.01, 0.5, 0.99))
        weight = largest_weight(longest_query, bank)
        shut = weight <= SHRINK
        always = 1 / len(bank) > SHRINK
        verdict = "always zero" if shut else "never zero" if always else "depends on the query"
        rows.append(
            [
                f"{num_ids}",
                level,
                f"{len(bank)}",
                f"{1 / len(bank):.5f}",
                f"{longest:.3f}",
                "any" if longest_query == math.inf else f"{longest_query:.3f}",
                f"{weight:.5f}",
                " / ".join(f"{norm:.0f}" for norm in needed),
                verdict,
            ]
        )
        # A read that is not zero is a weighted mean of prototypes, so no longer than the longest.
        longest_query = 0.0 if shut else longest
        directions = some_of(bank)
    return rows


def rule_rows(num_ids: int) -> list[list[str]]:
    """Rows of the table of rules: how a map is read under other thresholds and variants."""
    x = NORM * rectified_queries(dim=2048)[:128, :, None, None]  # (n, C, 1, 1)
    rows = []
    for name, settings in RULES.items():
        memory = initial_memory(num_ids, **settings)
        read = memory(x)
        found = statistics(read.weights)
        shares = {k: f"{100 * found[f'{k}/zero_reads']:.0f}" for k in memory.levels}
        zero = " / ".join(shares.get(level, "-") for level in LEVELS)
        kept = f"{100 * found['semantic/survivors'] / num_ids:.0f}"
        value = read.semantic.flatten(1)  # (n, C)
        varies = (value - value.mean(dim=0)).norm(dim=1).mean()
        numbers = [f"{float(v) / NORM:.1e}" for v in (value.norm(dim=1).mean(), varies)]
        numbers = ["0" if float(number) < 1e-8 else number for number in numbers]
        rows.append([f"{num_ids}", name, zero, kept, *numbers])
    return rows


# --- training, with and without it ----------------------------------------------------------------


def loss_terms(*, lr: float = FIRST_RATE, **settings: Any) -> tuple[Tensor, list[float], float]:
    """Trains a ResNet-18 from scratch for four steps, with the alignment's weight at 0.

    206 identities, noise for images, float64, published loss weights. The same initial weights
    and batches whatever the settings.

    Args:
        lr: Learning rate.
        **settings: Of `model.TwoStreamNet`.

    Returns:
        The loss terms of each step (steps, terms), all weighted terms and their total; the share
        of zero part reads in each step, none without a memory; the norm of the last gradient of
        the part bank relative to the bank's norm, nan without a memory.
    """
    torch.manual_seed(0)
    net = TwoStreamNet(206, memory="mg", arch="resnet18", **settings).double().train()
    weights = TERM_WEIGHTS | {"alignment": 0.0}
    criterion = Criterion(weights, label_smoothing=0.1)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, lr)
    gen = torch.Generator().manual_seed(1)
    size = (IDS_PER_BATCH * IMAGES_PER_ID, 3, 96, 48)
    losses, zero = [], []
    for _ in range(STEPS):
        ids = torch.randperm(206, generator=gen)[:IDS_PER_BATCH]
        visible, infrared = (torch.randn(size, generator=gen).double() for _ in range(2))
        labels = ids.repeat_interleave(IMAGES_PER_ID).repeat(2)
        batch = SimpleNamespace(visible=visible, infrared=infrared, labels=labels)
        health = MemoryHealth()
        how = {"order": range(6), "weights": weights, "health": health}
        terms, _ = training_step(net, criterion, optimizer, batch, **how)
        losses.append(torch.stack(list(terms.values())))
        if net.memory is not None:
            zero.append(health.summary()["part/zero_reads"])
    gradient = math.nan
    if net.memory is not None:
        bank = net.memory.part_bank
        gradient = float(bank.grad.norm() / bank.detach().norm())
    return torch.stack(losses), zero, gradient


def training_rows() -> list[list[str]]:
    """Rows of the table of trainings: how far their loss terms are from those of no memory."""
    without, _, _ = loss_terms(memory_levels="none")
    rows = []
    for name, settings in TRAININGS.items():
        losses, zero, gradient = loss_terms(**settings)
        differences = (losses - without).abs()
        first, last = f"{differences[0].max():.0e}", f"{differences.max():.0e}"
        rows.append([name, first, last, f"{gradient:.0e}", f"{100 * np.mean(zero):.0f}"])
    return rows


# --- a checkpoint ---------------------------------------------------------------------------------


@torch.no_grad()
def training_maps(
    path: Path, data_path: Path
) -> tuple[TwoStreamNet, dict[str, Any], Tensor, Tensor]:
    """Opens a checkpoint, and maps some images of its training set.

    Returns the network, the checkpoint's other entries, the maps (2 * images, C, H, W) of visible,
    then infrared images, and their labels.
    """
    net, info, size = open_network(path, torch.device("cpu"), None, None)
    data = train_set(info["options"]["dataset"], data_path, trial=info["options"]["trial"])
    images, maps, labels = ImageCache(*size), [], []
    for name, own in zip(("visible", "infrared"), data.labels, strict=True):
        side = getattr(data, name)
        rows = np.linspace(0, len(side) - 1, IMAGES).astype(int)
        labels.append(torch.from_numpy(own[rows]))
        decoded = images(side.take(rows))
        for batch in EvalLoader(decoded, batch_size=32, device=torch.device("cpu")):
            maps.append(net.feature_map(**{name: batch}))
    return net, info, torch.cat(maps), torch.cat(labels)


@torch.no_grad()
def study_rows(runs: Path, data_path: Path) -> list[list[str]]:
    """Rows of the study's trained memories, means over those of the splits that are there."""
    table_rows = []
    rows = plan("continued", dataset="regdb", runs=runs, trials=STUDY_SPLITS, extra={})[1]
    for row in (row for row in rows if row.protocol == "v2i"):
        found = []
        for file in (folder / "last.pt" for folder in row.training):
            if not file.exists():
                continue
            net, _, maps, labels = training_maps(file, data_path)
            if net.memory is None:
                continue
            read = net.memory(maps)
            used = statistics(read.weights)
            numbers = [100 * used.get(f"{level}/zero_reads", math.nan) for level in LEVELS]
            value = read.coarsest().permute(0, 2, 3, 1).flatten(0, 2)  # (n, C)
            norm = maps.norm(dim=1).mean()
            numbers += [float(value.norm(dim=1).mean() / norm)]
            numbers += [float((value - value.mean(dim=0)).norm(dim=1).mean() / norm)]
            semantic, own = read.weights.get("semantic"), math.nan
            if semantic is not None:  # (n, L)
                positions = labels.repeat_interleave(maps[0, 0].numel())
                own = float(100 * semantic.to_dense().gather(1, positions[:, None]).mean())
            found.append([*numbers, own])
        if found:
            *zero, norm, varies, own = np.mean(found, axis=0).tolist()
            shares = " / ".join("-" if math.isnan(share) else f"{share:.0f}" for share in zero)
            cells = [
                shares,
                f"{norm:.2g}",
                f"{varies:.2g}",
                "-" if math.isnan(own) else f"{own:.2g}",
            ]
            table_rows.append([row.setting.name, str(len(found)), *cells])
    return table_rows


@torch.no_grad()
def checkpoint_rows(path: Path, data_path: Path) -> tuple[str, list[list[str]]]:
    """What was measured on a checkpoint in words, and its rows, one a level.

    Args:
        path: A checkpoint of this project with a cascade, MG-MRA's variants ``paper`` and
            ``first``.
        data_path: The folder of the data set that it was trained on.
    """
    net, info, maps, _ = training_maps(path, data_path)
    memory, trained = net.memory, info["options"]
    if getattr(memory, "levels", None) != LEVELS:
        raise ValueError(f"{path} has no memory of MG-MRA's variant paper or first")
    found, norms = statistics(memory(maps).weights), maps.norm(dim=1).flatten()
    sizes = (memory.instances_per_id, memory.parts_per_instance, memory.dim)
    start = banks_of(initial_memory(memory.num_ids, *sizes, variant=memory.variant))
    rows = []
    longest_query = float(norms.max())
    for level, bank in banks_of(memory).items():
        threshold = memory.threshold(level, len(bank))
        longest = float(bank.norm(dim=1).max())
        weight = largest_weight(longest_query, bank)
        rows.append(
            [
                level,
                f"{len(bank)}",
                f"{start[level].norm(dim=1).mean():.3f}",
                f"{bank.norm(dim=1).mean():.3f}",
                f"{longest_query:.2f}",
                f"{weight:.5f}",
                f"{100 * found[f'{level}/zero_reads']:.1f}",
                f"{found[f'{level}/survivors']:.1f}",
            ]
        )
        longest_query = 0.0 if weight <= threshold else longest
    first, last = info["log"][0], info["log"][-1]
    share = trained["w_alignment"] * last["alignment"] / last["total"]
    keys = {level: f"memory/{level}/zero_reads" for level in LEVELS}
    in_log = "; ".join(
        f"{level} {100 * first[key]:.1f} and {100 * last[key]:.1f}" for level, key in keys.items()
    )
    words = (
        f"{data_name(trained['dataset'], data_path)}, {net.config['num_ids']} identities, "
        f"{trained['arch']} (C = {net.dim}), {last['epoch']} epochs; norm of the map's positions "
        f"{norms.mean():.1f} on average, {norms.max():.1f} at most. Zero reads in the log, first "
        f"and last epoch, %: {in_log}. Weighted alignment over total loss, last epoch: "
        f"{share:.0e}. Last epoch's result: Rank-1 {100 * last['eval']['rank1']:.2f}, mAP "
        f"{100 * last['eval']['mAP']:.2f}."
    )
    return words, rows


# --- figure and page ------------------------------------------------------------------------------


@styled
def figure_of_norms() -> Figure:
    """Draws the share of zero reads against the norm of the query, for each level and bank."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.4), layout="constrained")
    charts = dict(zip(LEVELS, figure.subplots(1, 3, sharex=True, sharey=True), strict=True))
    norms = np.geomspace(0.05, 1000, 800)
    for num_ids, data in BANKS.items():
        directions = rectified_queries(dim=2048)
        for level, bank in banks_of(initial_memory(num_ids)).items():
            zero = norm_needed(directions, bank, SHRINK) > norms[:, None]
            label = f"{num_ids} identities ({data})"
            charts[level].plot(norms, 100 * zero.mean(axis=1), label=label)
            directions = some_of(bank)
    longest = {k: float(v.norm(dim=1).max()) for k, v in banks_of(initial_memory(713)).items()}
    for level, query, (start, end), words in (
        ("part", "map", MAP_NORMS, "ImageNet\nmaps:\n40 to 60"),
        ("instance", "part read", (norms[0], longest["part"]), "all the\nqueries\nthere are"),
        ("semantic", "instance read", (norms[0], longest["instance"]), "none is\nlonger"),
    ):
        chart, left = charts[level], level == "part"  # on which side of the span is room
        chart.axvspan(start, end, color="#cccccc", linewidth=0)
        side = {"x": 0.8 * start, "ha": "right"} if left else {"x": 1.25 * end, "ha": "left"}
        chart.text(**side, y=45, s=words, color=GREY, va="center")
        title = f"{level} (query: {query})"
        chart.set(title=title, xscale="log", xlim=(norms[0], norms[-1]), ylim=(-4, 108))
        chart.xaxis.set_major_formatter("{x:g}")
    charts["part"].set_ylabel("zero reads (% of queries)")
    charts["instance"].set_xlabel("norm of the query")
    add_legend(figure, charts["part"].get_lines(), columns=3)
    return figure


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BANK_HEADS = (
    *("identities", "level", "m", "1/m", "longest prototype", "longest query"),
    *("largest weight", "norm needed (1 / 50 / 99 %)", "reads"),
)
RULE_HEADS = (
    *("identities", "rule", "zero reads, %: part / instance / semantic"),
    *("semantic bank kept, %", "norm of the semantic read / of x", "its variation / norm of x"),
)
TRAINING_HEADS = (
    *("memory", "largest difference from no memory: first step", "four steps"),
    *("bank's gradient / bank", "zero part reads, %"),
)
CHECKPOINT_HEADS = (
    *("level", "m", "mean prototype, start", "trained", "longest query", "largest weight"),
    *("zero reads, %", "survivors"),
)


STUDY_HEADS = (
    *("method", "splits", "zero reads, %: part / instance / semantic"),
    *("norm of the read / of x", "its variation / norm of x", "weight of its own identity, %"),
)


def replace_block(text: str, name: str, block: str) -> str:
    """The page with what stands between the marks of a block replaced."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = text.split(start)
    return before + start + block + end + rest.split(end)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="measure this trained MG-MRA instead")
    parser.add_argument("--study", type=Path, help="measure the study's, in this folder of runs")
    parser.add_argument("--data-path", type=Path, help="the data that it was trained on")
    args = parser.parse_args(argv)
    if (args.checkpoint is None and args.study is None) != (args.data_path is None):
        parser.error("--checkpoint or --study, and --data-path go together")
    if args.study is not None:
        blocks = {"study": table(STUDY_HEADS, study_rows(args.study, args.data_path))}
    elif args.checkpoint is not None:
        words, rows = checkpoint_rows(args.checkpoint, args.data_path)
        blocks = {"checkpoint": f"{words}\n\n{table(CHECKPOINT_HEADS, rows)}"}
    else:
        banks, rules = (
            [row for ids in BANKS for row in make(ids)] for make in (bank_rows, rule_rows)
        )
        blocks = {
            "banks": table(BANK_HEADS, banks),
            "rules": table(RULE_HEADS, rules),
            "trainings": table(TRAINING_HEADS, training_rows()),
        }
        save(figure_of_norms(), FIGURE)
    text = PAGE.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = replace_block(text, name, block)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
