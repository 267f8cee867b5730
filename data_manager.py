"""Which images, which labels: training sets and retrieval protocols of the data sets.

`train_set` and `eval_set` read the lists of a data set and check all that can be checked without
decoding an image. A data set is a class (`datasets.base.DataSet`) and an entry in `DATASETS`.
"""

from dataclasses import replace
from pathlib import Path

from datasets.base import (  # noqa: F401 - found here as well
    TTA,
    DataError,
    DataSet,
    EvalOptions,
    EvalSet,
    ImageList,
    TrainSet,
)
from datasets.llcm import Llcm
from datasets.regdb import Regdb
from datasets.sysu_mm01 import Sysu

DATASETS: dict[str, DataSet] = {data.name: data for data in (Regdb(), Sysu(), Llcm())}
STAND_IN_MARKER = "stand_in.json"  # written by stand_in.py; the real data sets lack it
STAND_IN_HINT = (
    " To try everything without it, write stand-in data: python stand_in.py --layout {} --out DIR"
    " --train-ids 150 --test-ids 40 --images-per-id 10 --seed 0"
)


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
    data, root = DATASETS[dataset], checked_folder(dataset, data_path)
    result = data.train_from_cache(Path(data_path), size) if use_cache else None
    if result is None:
        result = data.train(root, trial)
    if subset == "fit":
        result = result.narrow(~data.held_out(root, result.pids))
    found = f"{len(result.visible)} visible and {len(result.infrared)} infrared images"
    description = f"{result.description}: {result.num_ids} identities, {found}"
    return replace(result, description=description)


def eval_set(dataset: str, data_path: str | Path, **options: int | str) -> EvalSet:
    """Lists and checks a protocol's images; `options` are the fields of `EvalOptions`.

    Raises:
        DataError: As `train_set`.
    """
    chosen = EvalOptions(**options)
    found = DATASETS[dataset].evaluate(checked_folder(dataset, data_path), chosen)
    return replace(found, protocol=found.protocol + TTA[chosen.tta], tta=chosen.tta)


def checked_folder(dataset: str, data_path: str | Path) -> Path:
    """Returns the data folder with links resolved, whose layout is checked.

    Raises:
        DataError: The folder or a part of it is not there; says where it may be instead, or which
            other data set it is.
    """

    def lacking(folder: Path, kind: DataSet) -> list[str]:
        return [f"{name}/" for name in kind.folders if not (folder / name).is_dir()]

    path, data = Path(data_path).resolve(), DATASETS[dataset]
    missing = lacking(path, data)
    if not missing:
        return path
    found = f"has no {', '.join(missing)}" if path.is_dir() else "does not exist, or is a file"
    hint = data.how_to_get + (STAND_IN_HINT.format(dataset) if data.has_stand_in else "")
    for folder in [path.parent, *sorted(path.glob("*"))]:  # one too deep or too high
        if not lacking(folder, data):
            hint = f"It is in {folder}: pass --data-path {folder}"
    for other in DATASETS.values():
        if not lacking(path, other):
            hint = f"It looks like {other.title}: pass {data.title}'s folder"
            hint += f", or --dataset {other.name} to a command that has this flag"
    if missing == [f"{data.folders[0]}/"] and data.lists_hint:
        hint = f"The images are there, the lists are not: {data.lists_hint}"
    expected = ", ".join(f"{name}/" for name in data.folders)
    raise DataError(f"{path} {found}. {data.title} is a folder with {expected} in it. {hint}")


def data_name(dataset: str, data_path: str | Path) -> str:
    """Returns the data set's name for printed rows; stand-in data is named as such."""
    name = DATASETS[dataset].title
    return f"stand-in data in {name}'s layout" if is_stand_in(data_path) else name


def is_stand_in(data_path: str | Path) -> bool:
    """Tells whether a data folder was written by ``stand_in.py``."""
    return (Path(data_path) / STAND_IN_MARKER).exists()
