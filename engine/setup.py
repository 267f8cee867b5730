"""What the three training scripts share: flags, device, folders, resume, logging.

What can be checked is checked before an image is decoded.
"""

import argparse
import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import options
import utils
from data_loader import IdentitySampler, ImageStore, TrainLoader
from data_manager import DATASETS, EvalSet, TrainSet, data_name, eval_set, train_set
from datasets.decode import ImageCache
from datasets.transforms import Augmentation
from engine import devices, distributed, resume
from engine.bank_init import fill_bank
from engine.checkpoints import SEEN_BEFORE, TrainedOn
from engine.evaluate import evaluate, format_result
from engine.fit import Progress, write_reports
from engine.run_files import LAST, RunFiles
from engine.train import TrainSettings
from memory import MultiGranularityMemory, SingleGranularityMemory
from model import TwoStreamNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run of a training script."""

    args: argparse.Namespace  # resolved flags
    sources: dict[str, str]  # where each flag's value came from
    device: torch.device
    files: RunFiles
    checkpoint: dict[str, Any]  # entries of the one to resume from; {}: a new run
    command: str  # that started it
    locks: contextlib.ExitStack  # held until it ends

    @property
    def network(self) -> dict[str, Any]:
        """The network's settings, as `TwoStreamNet` takes them, but for the memory's."""
        args = self.args
        names = ("arch", "share_net", "num_strips", "local_feat_dim", "gem_p")
        without_stripes = "agw" if args.method == "agw" else "global"
        return {
            "head": "pcb" if args.pcb == "on" else without_stripes,
            "weights": None if self.checkpoint else args.weights,  # a checkpoint brings them
            **{name: getattr(args, name) for name in names},
        }

    @property
    def addressing(self) -> dict[str, float]:
        """How the memory is addressed, as its classes take it: threshold and temperature."""
        args, auto = self.args, self.args.shrink == "auto"
        chosen = {"shrink_scale": args.shrink_scale} if auto else {"shrink": args.shrink}
        return chosen | ({"temperature": args.temperature} if args.addressing == "cosine" else {})

    @cached_property
    def settings(self) -> TrainSettings:
        """How to train, and when to evaluate and save."""
        args = self.args
        names = ("seed", "num_strips", "sync_bn", "eval_start", "eval_every", "save_last_every")
        return TrainSettings(
            **{name: getattr(args, name) for name in names},
            amp=devices.amp_dtype(args.amp, self.device),
            compiled=args.compile,
            progress=distributed.is_main() and not args.quiet,
            save_every=args.save_epoch,
            selection="the validation identities" if args.select_on == "val" else "the test set",
        )

    def data_sets(self) -> tuple[TrainSet, EvalSet]:
        """Lists the images to train and to evaluate on."""
        args = self.args
        fit, test = ("fit", "val") if args.select_on == "val" else ("all", "test")
        caches = {"use_cache": not args.no_cache, "size": (args.img_h, args.img_w)}
        train = train_set(args.dataset, args.data_path, trial=args.trial, subset=fit, **caches)
        return train, eval_set(**options.protocol(args, subset=test))

    def begin(
        self, net: TwoStreamNet, optimizer: Optimizer, train: TrainSet, sampler: IdentitySampler
    ) -> Progress:
        """Checks what is left to check, loads the checkpoint, if any, and opens the folders.

        Returns how far the run is.
        """
        args, files, checkpoint = self.args, self.files, self.checkpoint
        _check_network(args, net)
        sampler.rows_of_rank(distributed.rank(), distributed.size())  # raises where P is uneven
        about, identities, seen_before = files.header, train.pids.tolist(), self._seen_before()
        progress, resumed = Progress(), checkpoint.get("path")
        if resumed:
            progress = resume.restore(checkpoint, net, optimizer, identities=identities)
        if distributed.is_main():
            logs = utils.make_writable_dir(args.log_path or files.output_dir)
            if not args.test_only:
                own = files.output_dir / ".lock", files.checkpoint_dir / f".{files.prefix}lock"
                for file in sorted(set(own)):
                    self.locks.enter_context(utils.lock(file))
                files.begin(overwrite=args.overwrite, resumed=resumed)
                write_reports(files, progress)
            utils.log_to(logs / (f"{about['run']}.log" if args.log_path else "train.log"))
        files.header = {**about, "identities": identities, SEEN_BEFORE: seen_before}
        log.info("%s: writing into %s", about["run"], files.output_dir)
        log.info("command: %s", self.command)
        where = "device: %(device)s; torch %(torch)s; version %(version)s, commit %(commit)s"
        log.info(where, about["versions"])
        log.info("%s", options.describe(args, self.sources))
        log.info("data: %s; %s", about["data"], train.description)
        if resumed:
            log.warning("resumed %s after epoch %d", resumed, progress.epoch)
        if not args.test_only:
            _warn_of_an_unread_memory(net)
        return progress

    def _seen_before(self) -> dict[str, list[int]]:
        """Raw pids that the starting weights had seen, by data."""
        if self.checkpoint:
            return self.checkpoint.get(SEEN_BEFORE, {})
        if self.args.weights in ("imagenet", "none"):
            return {}
        return {name: sorted(pids) for name, pids in TrainedOn(self.args.weights).seen.items()}

    def trains(self, progress: Progress) -> bool:
        """Whether there is anything left to train."""
        done = progress.epoch >= self.args.epochs
        if done and not self.args.test_only:
            log.info("nothing to train: all %d epochs are done", progress.epoch)
        return not (done or self.args.test_only)

    def _images(self) -> ImageCache:
        size = self.args.img_h, self.args.img_w
        return ImageCache(*size, workers=self.args.workers, progress=self.settings.progress)

    def loader(
        self,
        train: TrainSet,
        sampler: IdentitySampler,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> TrainLoader:
        """Decodes the training images and builds the loader of augmented batches."""
        args, images = self.args, self._images()
        augmentation = {each.name: getattr(args, each.name) for each in fields(Augmentation)}
        return TrainLoader(
            visible=ImageStore(images(train.visible), self.device, resident=args.resident),
            infrared=ImageStore(images(train.infrared), self.device, resident=args.resident),
            sampler=sampler,
            augmentation=Augmentation(**augmentation),
            transform=transform,
            rank=distributed.rank(),
            world_size=distributed.size(),
        )

    def bank_filler(
        self, net: TwoStreamNet, optimizer: Optimizer, loader: TrainLoader, train: TrainSet
    ) -> Callable[[int], None]:
        """Returns what `fit` calls before each epoch: it fills the bank where the flags say so."""
        args = self.args
        chosen = args.bank_init == "features"
        if chosen and args.bank_init_epoch >= args.epochs:
            log.warning("--bank-init features: no epoch has the number of --bank-init-epoch")

        def fill(epoch: int) -> None:
            if chosen and epoch == args.bank_init_epoch:
                fill_bank(net, optimizer, loader, train.labels, seed=args.seed)
                log.info("the prototypes are now features of the training images")

        return fill

    def evaluator(self, net: TwoStreamNet, test: EvalSet) -> Callable[[], dict[str, Any]]:
        """Returns a function that evaluates the present weights; it decodes the images once.

        With --test-only, raises ValueError where the test identities were trained on.
        """
        args, images, header = self.args, self._images(), self.files.header
        trained = TrainedOn(self.checkpoint.get("path", ""), header)
        which = {"trial": args.trial, "subset": args.select_on, "seen": not args.test_only}
        test, remark = trained.admit(test, header["data"], **which)
        if remark:
            log.warning("every result of this run says: %s", remark)
        how = {"amp": self.settings.amp, "progress": self.settings.progress}
        how |= {"batch_size": args.test_batch, "rankings": (args.re_rank,)}
        how["test_feats"] = (args.test_feat or net.test_feats()[0],)

        def evaluate_now() -> dict[str, Any]:
            _, results = evaluate(net, test, images, **how)
            result = {k: v for k, v in results[0].items() if k != "cmc"}  # of no use in a log
            return {**result, "dataset": header["data"]}

        return evaluate_now

    def report(self, progress: Progress, evaluate_now: Callable[[], dict[str, Any]]) -> None:
        """Logs the results: of the last and the best epoch, or of --test-only."""
        if self.args.test_only:
            result = evaluate_now()
            log.info("%s  (%s)", format_result(result), result["dataset"])
            return
        for label, result in (("last", progress.last), ("best", progress.best)):
            if result is not None:
                chosen = f"epoch {result['epoch']}, {result['selection']}; {result['dataset']}"
                log.info("%s (%s): %s", label, chosen, format_result(result))
        last = self.files.checkpoint(LAST)
        script, here = Path(options.__file__).resolve().with_name("test.py"), Path.cwd()
        script = script.relative_to(here) if script.is_relative_to(here) else script
        command = shlex.join([str(script), "--resume", str(last)])
        log.info("%s is complete. Evaluate it with: python %s", last, command)


@contextlib.contextmanager
def start(method: str, description: str, argv: Sequence[str] | None) -> Iterator[Run]:
    """Opens a run; errors a user can mend, and signals, end it with a message."""
    with utils.user_errors(), utils.stop_signals():
        given = options.train_parser(description).parse_args(argv)
        args, sources = options.resolve(given, f"train_{method}.py")
        if args.overwrite and args.resume is not None:
            raise ValueError("--resume goes on with a run, --overwrite starts it afresh: give one")
        if args.test_only and args.resume is None:
            raise ValueError("--test-only needs the checkpoint to evaluate: --resume PATH")
        without_stripes = "_AGW" if args.method == "agw" else "_global"
        name = f"{method}{without_stripes if args.pcb == 'off' else ''}_{args.dataset}"
        name += f"_trial{args.trial}" if DATASETS[args.dataset].splits > 1 else ""
        full_name = name + options.distinction(args, sources)
        output = args.output_dir or Path("runs") / full_name
        events = args.vis_log_path / full_name if args.vis_log_path else output / "tensorboard"
        prefix = f"{full_name}_" if args.model_path else ""
        files = RunFiles(output, args.model_path or output, events, prefix=prefix)
        utils.setup_logging()
        try:
            with distributed.processes(args.gpu) as device, contextlib.ExitStack() as locks:
                devices.set_up(device, args.float32_precision, deterministic=args.deterministic)
                torch.manual_seed(args.seed)
                files.header = {
                    "method": name,
                    "run": full_name,
                    "data": data_name(args.dataset, args.data_path),
                    "options": options.to_json(args),
                    "versions": devices.versions(device),
                }
                checkpoint = resume.find(args.resume, files, train=not args.test_only)
                if not args.test_only:
                    resumed, saved = checkpoint.get("path"), checkpoint.get("options", {})
                    files.check(overwrite=args.overwrite, resumed=resumed)
                    changed = resume.changes(saved, files.header["options"])
                    if changed:
                        log.warning("options changed since %s: %s", resumed, changed)
                yield Run(args, sources, device, files, checkpoint, _command(argv), locks)
        except utils.Interrupted as stop:
            if distributed.is_main():
                saved = files.checkpoint(LAST)
                complete = files.begun and saved.exists()
                kept = f": complete epochs are in {saved}" if complete else ""
                command = _command(argv, resume=complete or (files.begun and not args.resume))
                sys.stderr.write(f"{stop}{kept}. Go on with: {command}\n")
            raise SystemExit(stop.exit_code) from None


def _check_network(args: argparse.Namespace, net: TwoStreamNet) -> None:
    """Raises ValueError where flags ask for what the network has not."""
    net.check_image_height(args.img_h)
    if args.bank_init == "features" and not isinstance(net.memory, SingleGranularityMemory):
        kind = type(net.memory).__name__
        raise ValueError(f"--bank-init features cannot fill a {kind}: leave it out")
    if args.test_feat not in (None, *net.test_feats()):
        legal = ", ".join(net.test_feats())
        raise ValueError(f"--test-feat {args.test_feat}: this network has {legal}")


def _warn_of_an_unread_memory(net: TwoStreamNet) -> None:
    """Warns when MG-MRA's threshold is above the semantic level's uniform weight."""
    memory, added = net.memory, net.memory_levels in (None, "semantic")
    if isinstance(memory, MultiGranularityMemory) and added and memory.temperature is None:
        size = memory.bank_sizes()["semantic"]
        if 1 / size < memory.threshold("semantic", size):
            log.warning(
                "the memory has prototypes of %d identities: at their initial norms no semantic "
                "read passes the threshold. Until one does, MG-MRA is its control, --memory-levels "
                "none; --shrink auto scales the threshold with the bank",
                size,
            )


def _command(argv: Sequence[str] | None, *, resume: bool = False) -> str:
    """The command line that started this process; with `resume`, the one that resumes its run."""
    words = sys.argv if argv is None else [sys.argv[0], *argv]
    if resume and words[-1] != "--resume":  # the last one counts: without a value last.pt
        words = [*(word for word in words if word != "--overwrite"), "--resume"]
    return f"{'torchrun ...' if distributed.size() > 1 else 'python'} {shlex.join(words)}"
