"""Trains HCT, with ``--pcb off`` its baseline without stripes, or with ``--method agw`` AGW.

    python train_HCT.py --dataset regdb --lr 0.1 --gpu 0 --batch-size 8 --num_pos 4
    python train_HCT.py --dataset regdb --method agw

Reproduces the HCT and AGW rows of the paper's Table 1 (RegDB) and of the SYSU-MM01 table.
"""

import sys
from collections.abc import Sequence

import torch

from data_loader import IdentitySampler
from engine import setup
from engine.fit import fit
from engine.train import Schedule, make_optimizer
from loss import Criterion
from model import TwoStreamNet
from networks.settings import LABEL_SMOOTHING


def main(argv: Sequence[str] | None = None, criterion_class: type[Criterion] = Criterion) -> int:
    """Runs the script with the process's command line, or `argv`; returns its exit code."""
    with setup.start("HCT", __doc__, argv) as run:
        args = run.args

        # Data: batches of P identities with K images in each modality.
        train, test = run.data_sets()
        sampler = IdentitySampler(
            *train.labels, ids_per_batch=args.batch_size, images_per_id=args.num_pos, seed=args.seed
        )

        # Network: two streams and the head: stripes or the whole map.
        net = TwoStreamNet(train.num_ids, **run.network)
        net.to(run.device, memory_format=torch.channels_last)

        # Loss: terms and their weights.
        criterion = criterion_class(
            {"id": args.w_id, "triplet": args.w_triplet, "center_triplet": args.w_center},
            margin=args.margin,
            label_smoothing=LABEL_SMOOTHING if args.label_smooth == "on" else 0.0,
            head=net.head,
            images_per_id=args.num_pos,
        )

        # Optimiser and schedule: the head at the full rate, all else at a share of it.
        optimizer = make_optimizer(
            net, args.optim, args.backbone_lr_scale, args.weight_decay, args.momentum
        )
        schedule = Schedule(
            args.lr,
            args.epochs,
            warmup_epochs=args.warmup_epochs,
            milestones=args.milestones,
            kind=args.schedule,
            triplet_ramp=args.triplet_ramp,
        )

        # Loop.
        progress = run.begin(net, optimizer, train, sampler)
        evaluate = run.evaluator(net, test)
        if run.trains(progress):
            progress = fit(
                net,
                criterion,
                optimizer,
                run.loader(train, sampler),
                schedule=schedule,
                settings=run.settings,
                evaluate=evaluate,
                files=run.files,
                progress=progress,
            )
        run.report(progress, evaluate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
