"""What the three training scripts share: from flags to data, network, loop and files.

A training script says which method it is, how its network and its criterion are built, and calls
`run`. Order of work: everything that can be checked is checked before the first image is decoded.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import options
from data_loader import EvalLoader, IdentitySampler, ImageStore, TrainLoader, load_images
from data_manager import EvalSet, TrainSet, data_name, eval_set, train_set
from datasets.transforms import Augmentation
from engine import distributed, resume
from engine.evaluate import extract_shared, format_result, score
from engine.fit import LAST, PREVIOUS, Progress, RunFiles, fit, write_reports
from engine.train import Schedule, make_optimizer
from loss import LABEL_SMOOTHING, Criterion
from memory import SHRINK
from model import TwoStreamNet
from utils import (
    CheckpointError,
    Interrupted,
    StopSignals,
    make_deterministic,
    make_writable_dir,
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
    with user_errors(), StopSignals() as stop:
        args = options.train_parser(description).parse_args(argv)
        sources = options.resolve(args)
        name = f"{method}{'_AGW' if args.method == 'agw' else ''}_{args.dataset}"
        name += f"_trial{args.trial}" if args.dataset == "regdb" else ""
        if args.deterministic:
            make_deterministic()
        try:
            with distributed.processes(args.gpu) as device:
                _run(args, sources, name, device, build_model, build_criterion, stop)
        except Interrupted as interrupted:
            sys.stderr.write(f"{interrupted}. {_how_to_go_on(args, argv)}\n")
            raise SystemExit(interrupted.exit_code) from None
    return 0


def _how_to_go_on(args: argparse.Namespace, argv: Sequence[str] | None) -> str:
    """What to run after an interruption."""
    words = list(sys.argv[1:] if argv is None else argv)
    former = {"--overwrite", "--resume", "-r", args.resume, f"--resume={args.resume}"}
    kept = [str(word) for word in words if word not in former]
    command = shlex.join([Path(sys.argv[0]).name, *kept, "--resume"])
    launcher = "torchrun ..." if distributed.size() > 1 else "python"
    return f"Go on with: {launcher} {command}"


def _run(
    args: argparse.Namespace,
    sources: dict[str, str],
    name: str,
    device: torch.device,
    build_model: Callable[[argparse.Namespace, int], TwoStreamNet],
    build_criterion: Callable[[argparse.Namespace], Criterion],
    stop: StopSignals,
) -> None:
    """Checks everything, then trains or evaluates; see `run`."""
    _start_logging()
    files = _run_files(args, name)
    seed_everything(args.seed)
    training, testing = _data_sets(args)
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
    sampler.share(distributed.rank(), distributed.size())  # raises where they do not divide
    if args.sync_bn and device.type != "cuda":
        raise ValueError("--sync-bn needs CUDA devices: torch's SyncBatchNorm has no CPU version")
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(
        net,
        name=args.optim,
        backbone_lr_scale=args.backbone_lr_scale,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
    )
    progress, notes = _resume(args, resumed, net, optimizer, sampler, training)
    if distributed.is_main():
        _make_folders(files, args.log_path)
    log.info("%s\n%s", name, options.describe(args, sources))
    log.info("data: %s; %s", data, training.description)
    for note in notes:
        log.warning("%s", note)
    evaluate = _evaluator(args, testing, net, device, data)
    if args.test_only:
        log.info("%s  (%s)", format_result(evaluate()), data)
        return
    if distributed.is_main():
        identities = training.pids.tolist()
        _start_files(args, files, resumed, method=name, data=data, identities=identities)
    if progress.epoch == args.epochs:
        log.info("nothing to train: all %d epochs are done; test.py evaluates them", args.epochs)
        write_reports(files, progress)
        final = progress
    else:
        final = fit(
            net,
            build_criterion(args),
            optimizer,
            _train_loader(args, training, sampler, device),
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
            selection=("the validation identities" if args.select_on == "val" else "the test set"),
            eval_start=args.eval_start,
            eval_every=args.eval_every,
            save_epoch=args.save_epoch,
            save_every_steps=args.save_every_steps,
            sync_bn=args.sync_bn,
            amp=args.amp,
            resume_from=progress,
            stop=stop,
            progress=_shows_bars(args),
        )
    for label, result in (("last", final.last), ("best", final.best)):
        if result is not None:
            chosen = f"epoch {result['epoch']}, {result['selection']}"
            log.info("%s (%s; %s): %s", label, chosen, data, format_result(result))


def _start_logging(file: Path | None = None) -> None:
    """Sets up logging; processes other than the main one only warn."""
    setup_logging(file, level=logging.INFO if distributed.is_main() else logging.WARNING)


def _shows_bars(args: argparse.Namespace) -> bool:
    return distributed.is_main() and not args.quiet


def _data_sets(args: argparse.Namespace) -> tuple[TrainSet, EvalSet]:
    """The lists to train and to evaluate on."""
    on_val = args.select_on == "val"
    training = train_set(
        args.dataset, args.data_path, trial=args.trial, subset="fit" if on_val else "all"
    )
    subset = "val" if on_val else "test"
    testing = eval_set(**options.protocol(args, subset=subset))
    return training, testing


def _resume(
    args: argparse.Namespace,
    resumed: dict[str, Any] | None,
    net: TwoStreamNet,
    optimizer: torch.optim.Optimizer,
    sampler: IdentitySampler,
    training: TrainSet,
) -> tuple[Progress, list[str]]:
    """Loads a checkpoint's states, if there is one; also returns what is to be said about it.

    Raises:
        ValueError: When it does not fit, an option cannot change, or it is beyond the last epoch.
    """
    if resumed is None:
        return Progress(), []
    path, saved, underway = (resumed[name] for name in ("path", "options", "underway"))
    if not (isinstance(saved, dict) and isinstance(underway, dict)):
        raise CheckpointError(f"{path} holds no options of a run")
    changed = ""
    if not args.test_only:
        within = underway.get("steps") != 0
        changed = options.changes(saved, options.to_json(args), within_epoch=within)
    progress = resume.restore(
        resumed,
        net,
        optimizer,
        steps_per_epoch=sampler.steps_per_epoch,
        identities=training.pids.tolist(),
    )
    if progress.epoch > args.epochs and not args.test_only:
        raise ValueError(f"{path} has {progress.epoch} epochs and --epochs is {args.epochs}")
    steps = progress.underway.steps
    inside = f" and {steps} of {sampler.steps_per_epoch} steps of the next" if steps else ""
    notes = [f"resumed {path} after {progress.epoch} epochs{inside}"]
    return progress, [*notes, *([f"options changed since then: {changed}"] if changed else [])]


def _start_files(
    args: argparse.Namespace,
    files: RunFiles,
    resumed: dict[str, Any] | None,
    **about: Any,
) -> None:
    """Readies the folders once the run is sure to start: a former run goes, a resumed one stays."""
    files.header.update(options=options.to_json(args), versions=versions(), **about)
    if args.overwrite:
        _clear(files)
    if resumed:
        resume.set_damaged_aside(resumed, files.checkpoint_dir)
        resume.carry_best(resumed, files.checkpoint_dir)
    written = ("method", "data", "options", "versions")
    write_json(files.output_dir / "options.json", {k: files.header[k] for k in written})


def _run_files(args: argparse.Namespace, name: str) -> RunFiles:
    """Where the run will write; nothing is made yet.

    Raises:
        ValueError: When the folder holds a run that would be overwritten.
    """
    output = args.output_dir or Path("runs") / name
    checkpoints = args.model_path or output
    if args.overwrite and starts_from_checkpoint(args):
        raise ValueError("--resume goes on with a run, --overwrite starts it afresh: give one")
    existing = [checkpoints / n for n in (LAST, PREVIOUS) if (checkpoints / n).exists()]
    if existing and not (starts_from_checkpoint(args) or args.overwrite):
        raise ValueError(
            f"{existing[0]} is there already: continue that run with --resume, start it afresh "
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
    _start_logging(logs / "train.log")


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
    """Reads the checkpoint that --resume names: a path, or alone the output folder's last.pt.

    Alone in a folder without one there is nothing to go on with yet, and the run starts at the
    beginning: the same command serves however early a run was ended.
    """
    if not starts_from_checkpoint(args):
        if args.test_only:
            raise ValueError("--test-only needs the checkpoint to evaluate: --resume PATH")
        return None
    folder = files.checkpoint_dir
    path = Path(args.resume or folder / LAST)
    if not path.exists() and (folder / path).exists():
        path = folder / path
    nothing_yet = not any((folder / name).exists() for name in (LAST, PREVIOUS))
    if args.resume is None and nothing_yet and not args.test_only:
        log.warning("--resume: no checkpoint in %s yet, starting from the beginning", folder)
        args.resume = ""
        return None
    return resume.read(path, fall_back=not args.test_only)


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
                progress=_shows_bars(args),
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
        share=(distributed.rank(), distributed.size()),
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

    def embed(role: str) -> np.ndarray:
        images = getattr(testing, role)

        def batches(first: int, last: int) -> EvalLoader:
            if role not in loaders:
                decoded = load_images(
                    images if last - first == len(images) else images.take(range(first, last)),
                    height=args.img_h,
                    width=args.img_w,
                    workers=args.workers,
                    progress=_shows_bars(args),
                )
                loaders[role] = EvalLoader(decoded, batch_size=args.test_batch, device=device)
            return loaders[role]

        return extract_shared(
            net,
            len(images),
            batches,
            batch_size=args.test_batch,
            modality=images.modality,
            test_feats=(test_feat,),
            amp=args.amp,
            progress=_shows_bars(args),
        )[test_feat]

    def evaluate() -> dict[str, Any]:
        features = [embed(role) for role in ("query", "gallery")]
        result = None
        if distributed.is_main():
            result = score(testing, *features, args.re_rank)
            del result["cmc"]  # of no use in a log
        return {**distributed.from_main(result), "dataset": data, "test_feat": test_feat}

    return evaluate
