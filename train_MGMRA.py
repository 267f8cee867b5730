"""Trains MG-MRA: HCT (or AGW) with a multi-granularity memory.

    python train_MGMRA.py --dataset regdb --lr 0.1 --gpu 0 --batch-size 8 --num_pos 4
    python train_MGMRA.py --dataset sysu  --lr 0.1 --batch-size 6 --num_pos 8 --gpu 0

Reproduces the MG-MRA row of the paper's Table 1 (RegDB) and of the SYSU-MM01 table.
"""

import sys
from collections.abc import Sequence

import torch

from data_loader import IdentitySampler
from engine import setup
from engine.fit import fit
from engine.train import Schedule, make_optimizer
from loss import Criterion
from memory import MultiGranularityMemory
from model import TwoStreamNet
from networks.backbone import find_backbone
from networks.settings import LABEL_SMOOTHING


def main(
    argv: Sequence[str] | None = None,
    memory_class: type[torch.nn.Module] = MultiGranularityMemory,
    criterion_class: type[Criterion] = Criterion,
) -> int:
    """Runs the script with the process's command line, or `argv`; returns its exit code."""
    with setup.start("MGMRA", __doc__, argv) as run:
        args = run.args

        # Data: batches of P identities with K images in each modality.
        train, test = run.data_sets()
        sampler = IdentitySampler(
            *train.labels, ids_per_batch=args.batch_size, images_per_id=args.num_pos, seed=args.seed
        )

        # Network: two streams, the head, and a memory that reads the last map.
        memory = memory_class(
            args.memory_ids or train.num_ids,
            args.instances_per_id,
            args.parts_per_instance,
            dim=find_backbone(args.arch).channels,
            variant=args.memory_variant,
            **run.addressing,
        )
        net = TwoStreamNet(
            train.num_ids, memory=memory, memory_levels=args.memory_levels, **run.network
        )
        net.to(run.device, memory_format=torch.channels_last)

        # Loss: terms and their weights.
        criterion = criterion_class(
            {
                "id": args.w_id,
                "triplet": args.w_triplet,
                "center_triplet": args.w_center,
                "memory_id": args.w_memory_id,
                "memory_triplet": args.w_memory_triplet,
                "alignment": args.w_alignment,
                "decorrelation": args.w_decorrelation,
            },
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
            loader = run.loader(train, sampler)
            progress = fit(
                net,
                criterion,
                optimizer,
                loader,
                schedule=schedule,
                settings=run.settings,
                evaluate=evaluate,
                files=run.files,
                progress=progress,
                before_epoch=run.bank_filler(net, optimizer, loader, train),
            )
        run.report(progress, evaluate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
