"""Features in a file, ours or anyone's, for a protocol: scored without any network."""

import collections
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from data_manager import EvalSet
from engine.evaluate import Features
from utils import write_atomic

NORM_TOLERANCE = 1e-3  # half-precision features pass


def save_features(path: Path, protocol: EvalSet, features: Features, row: dict[str, Any]) -> None:
    """Writes everything that an evaluation ranks, in the order of the protocol's lists.

    The arrays are, for ``query`` and ``gallery`` each, ``<role>_<feature>`` (n, D) float32 with
    rows of norm 1, ``<role>_pids`` (n,), ``<role>_camids`` (n,), ``<role>_paths`` (n,) and
    ``<role>_modality``; ``gallery_trials`` (trials, g) with rows of the gallery, -1 behind a
    trial's last, and where each trial has its own queries ``query_trials`` likewise;
    ``protocol``, ``dataset``, ``checkpoint``, ``tta``. None needs pickle to be read.
    """
    arrays = {name: str(row[name]) for name in ("protocol", "dataset", "checkpoint", "tta")}
    for role in ("query", "gallery"):
        images, trials = getattr(protocol, role), getattr(protocol, f"{role}_trials")
        arrays |= {f"{role}_{feat}": values for feat, values in features[role].items()}
        arrays[f"{role}_pids"], arrays[f"{role}_camids"] = images.pids, images.camids
        arrays[f"{role}_paths"], arrays[f"{role}_modality"] = images.paths, images.modality
        if trials is not None:
            padded = list(itertools.zip_longest(*trials, fillvalue=-1))  # g rows, a column a trial
            arrays[f"{role}_trials"] = np.transpose(padded)
    write_atomic(path, lambda stream: np.savez(stream, **arrays))


def read_features(path: str | Path, protocol: EvalSet) -> Features:
    """Reads the features of a protocol's images from an .npz file, which may hold others too.

    Every float array (n, D) of the file is a kind of feature, by its name.

    Raises:
        ValueError: The file has no such arrays, names an image twice or lacks one; a feature is not
            finite, or not of norm 1.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        groups = ("",) if "paths" in arrays else ("query_", "gallery_")
        paths = np.concatenate([arrays[f"{group}paths"] for group in groups]).ravel().tolist()
        floats = [k for k, v in arrays.items() if v.ndim == 2 and v.dtype.kind == "f"]
        names = [n.removeprefix(groups[0]) for n in floats if n.startswith(groups[0])]
        kinds = {n: np.concatenate([arrays[group + n] for group in groups]) for n in names}
        if not paths or not kinds or any(len(values) != len(paths) for values in kinds.values()):
            raise ValueError({name: values.shape for name, values in arrays.items()})
    except Exception as error:  # a damaged file makes numpy raise nearly anything
        raise ValueError(
            f"{path} cannot be used: {error!r}; expected arrays `paths` (n,), `features` (n, D), "
            f"or the same of queries and gallery, `query_paths`, `query_features`, ..."
        ) from error
    if str(arrays.get("tta", protocol.tta)) != protocol.tta:  # in files of --save-features
        raise ValueError(f"{path} was written with --tta {arrays['tta']}: give the same here")
    doubled = [name for name, count in collections.Counter(paths).items() if count > 1]
    if doubled:
        raise ValueError(f"{path} names {len(doubled)} images more than once, {doubled[0]!r} first")
    rows = {name: row for row, name in enumerate(paths)}
    wanted = [*protocol.query.paths, *protocol.gallery.paths]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(wanted)} images of {protocol.protocol}, "
            f"{missing[0]!r} first; it has {paths[0]!r}"
        )
    found: Features = {"query": {}, "gallery": {}}
    for name, values in kinds.items():
        own = values[[rows[name] for name in wanted]].astype(np.float32)
        norms = np.linalg.norm(own, axis=1)
        if not (abs(norms - 1) < NORM_TOLERANCE).all():  # NaN is not
            found_norms = f"norms from {norms.min():.4g} to {norms.max():.4g}"
            raise ValueError(f"{path}: rows of {name!r} have {found_norms}, expected 1")
        found["query"][name], found["gallery"][name] = np.split(own, [len(protocol.query)])
    return found
