"""Which images, which labels: training sets and retrieval protocols of the data sets.

`train_set` and `eval_set` read the lists of a data set and check all that can be checked without
decoding an image. A data set is a class (`datasets.base.DataSet`) and an entry in `DATASETS`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets.base import (  # noqa: F401 - found here as well
    TRIALS,
    TTA,
    DataError,
    DataSet,
    EvalOptions,
    EvalSet,
    ImageList,
    TrainSet,
    check_choice,
)
from datasets.folders import check_layout, folder_images  # noqa: F401
from datasets.llcm import Llcm
from datasets.regdb import Regdb
from datasets.sysu_mm01 import Sysu

DATASETS: dict[str, DataSet] = {data.name: data for data in (Regdb(), Sysu(), Llcm())}
STAND_IN_MARKER = "stand_in.json"  # written by stand_in.py; the real data sets lack it


def train_set(
    dataset: str,
    data_path: str | Path,
    *,
    trial: int = 1,
    subset: str = "all",
    use_cache: bool = True,
    size: tuple[int, int] | None = None,
) -> TrainSet:
    """Lists and checks the training images of one of `DATASETS`.

    `subset` is "all" identities, or "fit": without those that `eval_set(subset="val")` asks for.
    With `use_cache`, images that `pre_process_sysu.py` decoded are taken where there are any, of
    this `size` (height, width) if it is given.

    Raises:
        DataError: A folder, list, label or image is missing or wrong; found before any decoding.
    """
    check_choice("dataset", dataset, tuple(DATASETS))
    check_choice("subset", subset, ("all", "fit"))
    check_choice("trial", trial, TRIALS)
    data, path = DATASETS[dataset], Path(data_path)
    result = data.train_from_cache(path, size) if use_cache else None
    if result is None:
        result = data.train(checked_folder(dataset, path), trial)
    if subset == "fit":
        result = result.narrow(~data.held_out(path.resolve(), result.pids))
    found = f"{len(result.visible)} visible and {len(result.infrared)} infrared images"
    description = f"{result.description}: {result.num_ids} identities, {found}"
    return replace(result, description=description)


def eval_set(dataset: str, data_path: str | Path, **options: int | str) -> EvalSet:
    """Lists and checks a protocol's images; `options` are the fields of `EvalOptions`.

    Raises:
        DataError: As `train_set`.
    """
    check_choice("dataset", dataset, tuple(DATASETS))
    chosen = EvalOptions(**options)
    found = DATASETS[dataset].evaluate(checked_folder(dataset, data_path), chosen)
    return replace(found, protocol=found.protocol + TTA[chosen.tta], tta=chosen.tta)


def checked_folder(dataset: str, data_path: str | Path) -> Path:
    """Returns the data folder with links resolved; DataError where its layout is another."""
    return check_layout(Path(data_path), DATASETS[dataset], DATASETS.values())


def data_name(dataset: str, data_path: str | Path) -> str:
    """Returns the data's name in printed rows, which tells stand-in data from the real one."""
    name = DATASETS[dataset].title
    return f"stand-in data in {name}'s layout" if is_stand_in(data_path) else name


def is_stand_in(data_path: str | Path) -> bool:
    """Tells whether a data folder was written by ``stand_in.py``."""
    return (Path(data_path) / STAND_IN_MARKER).exists()
