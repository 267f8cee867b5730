"""What the three training scripts share: from flags to data, network, loop and files.

A training script says which method it is, how its network and its criterion are built, and calls
`run`. Order of work: everything that can be checked is checked before the first image is decoded.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import options
from data_loader import (
    Augmentation,
    EvalLoader,
    IdentitySampler,
    ImageStore,
    TrainLoader,
    load_images,
)
from data_manager import EvalSet, TrainSet, data_name, eval_set, train_set
from engine import (
    Progress,
    RunFiles,
    Schedule,
    extract_features,
    fit,
    format_result,
    make_optimizer,
    score,
)
from loss import LABEL_SMOOTHING, Criterion
from memory import SHRINK
from model import TwoStreamNet
from utils import (
    CheckpointError,
    load_checkpoint,
    make_writable_dir,
    resolve_device,
    seed_everything,
    setup_logging,
    user_errors,
    versions,
    write_json,
)

log = logging.getLogger(__name__)


def network_from_flags(args: argparse.Namespace, num_ids: int, memory: str | None) -> TwoStreamNet:
    """Builds the network that the flags describe.

    Args:
        args: Resolved flags.
        num_ids: Training identities.
        memory: None, "sg" or "mg".
    """
    return TwoStreamNet(
        num_ids,
        head="agw" if args.method == "agw" else "pcb",
        memory=memory,
        memory_variant=args.memory_variant,
        share_net=args.share_net,
        num_strips=args.num_strips,
        local_feat_dim=args.local_feat_dim,
        gem_p=args.gem_p,
        arch=args.arch,
        weights=None if starts_from_checkpoint(args) else args.weights,
        instances_per_id=args.instances_per_id,
        parts_per_instance=args.parts_per_instance,
        shrink=SHRINK if args.shrink == "auto" else args.shrink,
        shrink_scale=args.shrink_scale if args.shrink == "auto" else None,
        memory_levels=args.memory_levels,
    )


def criterion_from_flags(args: argparse.Namespace, kind: type[Criterion] = Criterion) -> Criterion:
    """Builds the criterion, weights included, that the flags describe.

    Args:
        args: Resolved flags.
        kind: `Criterion`, or a class with further terms.
    """
    return kind(
        margin=args.margin,
        label_smoothing=LABEL_SMOOTHING if args.label_smooth == "on" else 0.0,
        num_strips=args.num_strips,
        weights={
            "id": args.w_id,
            "triplet": args.w_triplet,
            "center_triplet": args.w_center,
            "memory_id": args.w_memory_id,
            "memory_triplet": args.w_memory_triplet,
            "alignment": args.w_alignment,
            "decorrelation": args.w_decorrelation,
        },
    )


def starts_from_checkpoint(args: argparse.Namespace) -> bool:
    """Whether the weights come from ``--resume``."""
    return args.resume != ""


def run(
    method: str,
    description: str,
    build_model: Callable[[argparse.Namespace, int], TwoStreamNet],
    build_criterion: Callable[[argparse.Namespace], Criterion],
    argv: Sequence[str] | None = None,
) -> int:
    """Trains, or with ``--test-only`` evaluates, one method.

    Args:
        method: Name in folders and logs.
        description: Text of ``--help``.
        build_model: From flags and number of identities to the network.
        build_criterion: From flags to the criterion.
        argv: Command line; None takes the process's.

    Returns:
        The process's exit code.
    """
    with user_errors():
        args = options.train_parser(description).parse_args(argv)
        sources = options.resolve(args)
        name = f"{method}{'_AGW' if args.method == 'agw' else ''}_{args.dataset}"
        name += f"_trial{args.trial}" if args.dataset == "regdb" else ""
        setup_logging()
        files = _run_files(args, name)
        device = resolve_device(args.gpu)
        seed_everything(args.seed)
        on_val = args.select_on == "val"
        training = train_set(
            args.dataset, args.data_path, trial=args.trial, subset="fit" if on_val else "all"
        )
        testing = eval_set(
            args.dataset,
            args.data_path,
            trial=args.trial,
            direction=args.direction,
            mode=args.mode,
            gallery=args.gallery,
            shots=args.shots,
            trials=args.trials,
            subset="val" if on_val else "test",
        )
        data = data_name(args.dataset, args.data_path)
        resumed = _read_resume(args, files)
        net = build_model(args, training.num_ids)
        net.check_image_height(args.img_h)
        sampler = IdentitySampler(
            training.visible_labels,
            training.infrared_labels,
            ids_per_batch=args.batch_size,
            images_per_id=args.num_pos,
            seed=args.seed,
        )
        net = net.to(device, memory_format=torch.channels_last)
        optimizer = make_optimizer(
            net,
            name=args.optim,
            backbone_lr_scale=args.backbone_lr_scale,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
        )
        progress = _restore(resumed, net, optimizer) if resumed else Progress()
        _make_folders(files, args.log_path)
        log.info("%s\n%s", name, options.describe(args, sources))
        log.info("data: %s; %s", data, training.description)
        evaluate = _evaluator(args, testing, net, device, data)
        if args.test_only:
            log.info("%s  (%s)", format_result(evaluate()), data)
            return 0
        if progress.epoch >= args.epochs:
            raise ValueError(
                f"the checkpoint has all of its {progress.epoch} epochs and --epochs is "
                f"{args.epochs}: nothing to train; evaluate it with test.py"
            )
        files.header.update(
            method=name,
            options=options.to_json(args),
            versions=versions(),
            data=data,
            identities=training.pids.tolist(),
        )
        if args.overwrite:
            _clear(files)
        write_json(
            files.output_dir / "options.json",
            {k: files.header[k] for k in ("method", "data", "options", "versions")},
        )
        loader = _train_loader(args, training, sampler, device)
        final = fit(
            net,
            build_criterion(args),
            optimizer,
            loader,
            schedule=Schedule(
                lr=args.lr,
                epochs=args.epochs,
                warmup_epochs=args.warmup_epochs,
                milestones=args.milestones,
                kind=args.schedule,
                triplet_ramp=args.triplet_ramp,
            ),
            files=files,
            seed=args.seed,
            evaluate=evaluate,
            selection="the validation identities" if on_val else "the test set",
            eval_start=args.eval_start,
            eval_every=args.eval_every,
            save_epoch=args.save_epoch,
            amp=args.amp,
            resume_from=progress,
            progress=not args.quiet,
        )
        for label, result in (("last", final.last), ("best", final.best)):
            chosen = f"epoch {result['epoch']}, {result['selection']}"
            log.info("%s (%s; %s): %s", label, chosen, data, format_result(result))
    return 0


def _run_files(args: argparse.Namespace, name: str) -> RunFiles:
    """Where the run will write; nothing is made yet.

    Raises:
        ValueError: When the folder holds a run that would be overwritten.
    """
    output = args.output_dir or Path("runs") / name
    checkpoints = args.model_path or output
    existing = checkpoints / "last.pt"
    if existing.exists() and not (starts_from_checkpoint(args) or args.overwrite):
        raise ValueError(
            f"{existing} is there already: continue that run with --resume, start it afresh "
            f"with --overwrite, or choose another --output-dir"
        )
    return RunFiles(output, checkpoints, args.vis_log_path or output / "tensorboard")


def _make_folders(files: RunFiles, log_path: Path | None) -> None:
    """Makes the output folders and starts logging into them.

    Raises:
        ValueError: When one cannot be written to.
    """
    logs = log_path or files.output_dir
    for folder in (files.output_dir, files.checkpoint_dir, files.tensorboard_dir, logs):
        make_writable_dir(folder)
    setup_logging(logs / "train.log")


def _clear(files: RunFiles) -> None:
    """Removes a former run's checkpoints and logs, once the new one is sure to start."""
    former = (
        *files.checkpoint_dir.glob("*.pt"),
        *files.output_dir.glob("*.json*"),
        *files.tensorboard_dir.glob("events.*"),
    )
    for file in former:
        file.unlink()


def _read_resume(args: argparse.Namespace, files: RunFiles) -> dict[str, Any] | None:
    """Reads the checkpoint that --resume names: a path, or alone the output folder's last.pt."""
    if not starts_from_checkpoint(args):
        if args.test_only:
            raise ValueError("--test-only needs the checkpoint to evaluate: --resume PATH")
        return None
    path = Path(args.resume or files.checkpoint_dir / "last.pt")
    if not path.exists() and (files.checkpoint_dir / path).exists():
        path = files.checkpoint_dir / path
    content = load_checkpoint(path)
    if "config" not in content or "optimizer" not in content:
        raise CheckpointError(
            f"{path} is no checkpoint of an interrupted run of this project; to start from its "
            f"weights use --weights {path}, to evaluate it test.py --resume {path}"
        )
    return {**content, "path": path}


def _restore(
    content: dict[str, Any], net: TwoStreamNet, optimizer: torch.optim.Optimizer
) -> Progress:
    """Loads a checkpoint's states.

    Raises:
        CheckpointError: When it belongs to another method, network or number of identities.
    """
    differing = [
        f"{key} {content['config'].get(key)!r} there, {value!r} here"
        for key, value in net.config.items()
        if content["config"].get(key) != value
    ]
    if differing:
        raise CheckpointError(
            f"{content['path']} belongs to another network ({'; '.join(differing)}); to start from "
            f"its weights use --weights"
        )
    net.load_state_dict(content["net"])
    optimizer.load_state_dict(content["optimizer"])
    log.info("resumed %s after epoch %d", content["path"], content["epoch"])
    return Progress(content["epoch"], content["best"], content["last"])


def _train_loader(
    args: argparse.Namespace, training: TrainSet, sampler: IdentitySampler, device: torch.device
) -> TrainLoader:
    """Decodes the training images and builds the loader."""
    stores = [
        ImageStore(
            load_images(
                images,
                height=args.img_h,
                width=args.img_w,
                workers=args.workers,
                progress=not args.quiet,
            ),
            device=device,
        )
        for images in (training.visible, training.infrared)
    ]
    return TrainLoader(
        visible=stores[0],
        infrared=stores[1],
        sampler=sampler,
        augmentation=Augmentation(
            pad=args.pad, flip=args.flip, grey=args.grey, erase=args.erase, tone=args.tone
        ),
        seed=args.seed,
        device=device,
    )


def _evaluator(
    args: argparse.Namespace,
    testing: EvalSet,
    net: nn.Module,
    device: torch.device,
    data: str,
) -> Callable[[], dict[str, Any]]:
    """Evaluation of the present weights; images are decoded at the first call and kept."""
    loaders: dict[str, EvalLoader] = {}
    test_feat = args.test_feat or net.test_feats()[0]

    def evaluate() -> dict[str, Any]:
        features = []
        for role in ("query", "gallery"):
            images = getattr(testing, role)
            if role not in loaders:
                decoded = load_images(
                    images,
                    height=args.img_h,
                    width=args.img_w,
                    workers=args.workers,
                    progress=not args.quiet,
                )
                loaders[role] = EvalLoader(decoded, batch_size=args.test_batch, device=device)
            embedded = extract_features(
                net,
                loaders[role],
                modality=images.modality,
                test_feats=(test_feat,),
                amp=args.amp,
                progress=not args.quiet,
            )
            features.append(embedded[test_feat])
        result = score(testing, *features, args.re_rank)
        del result["cmc"]  # of no use in a log
        return {**result, "dataset": data, "test_feat": test_feat}

    return evaluate
