"""Trains SG-MRA: HCT (or AGW) with a single-granularity memory.

    python train_SGMRA.py --dataset regdb --lr 0.1 --gpu 0 --batch-size 8 --num_pos 4

Reproduces the single-granularity row of the ablation.
"""

import argparse
import sys
from collections.abc import Sequence

from engine.setup import criterion_from_flags, network_from_flags, run
from loss import Criterion
from model import TwoStreamNet


def build_model(args: argparse.Namespace, num_ids: int) -> TwoStreamNet:
    """Builds the network for `num_ids` training identities."""
    return network_from_flags(args, num_ids, memory="sg")


def build_criterion(args: argparse.Namespace) -> Criterion:
    """Builds the loss terms and their weights."""
    return criterion_from_flags(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run(
        "SGMRA", "SG-MRA: HCT with a single-granularity memory.", build_model, build_criterion, argv
    )


if __name__ == "__main__":
    sys.exit(main())
