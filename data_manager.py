"""Which images, which labels: the layouts, splits and protocols of the data sets.

`train_set` and `eval_set` read the lists of a data set, check all that can be checked without
decoding an image, and answer with `ImageList`s: relative paths, identities, cameras and where each
path was named. The on-disk words (Thermal, rgb, ir) stop here; the rest of the project says visible
and infrared. A data set is one class in `DATASETS`: its layout, training lists and protocol.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.base import (
    DATASETS,
    TRIALS,
    DataError,
    EvalOptions,
    EvalSet,
    ImageList,
    Source,
    TrainSet,
    check_choice,
    held_out_labels,
    narrow,
    one_against_other,
)
from datasets.folders import (
    SYSU_FOLDER,
    check_not_empty,
    data_root,
    drawn_gallery,
    find_images,
    folder_images,
    image_list,
    paired_lists,
    read_ids,
    read_list,
    seeded_draw,
)
from datasets.sysu_mm01 import Sysu

__all__ = [
    "DATASETS",
    "DataError",
    "EvalOptions",
    "EvalSet",
    "ImageList",
    "TrainSet",
    "data_name",
    "eval_set",
    "folder_images",
    "train_set",
]

STAND_IN_MARKER = "stand_in.json"  # written by stand_in.py; the real data sets lack it
LLCM_CAMERAS = {"vis": (1, 2, 3, 4, 5, 6, 7, 8, 9), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}


def train_set(
    dataset: str,
    data_path: str | Path,
    *,
    trial: int = 1,
    subset: str = "all",
    use_cache: bool = True,
) -> TrainSet:
    """List and check the training images of a data set.

    Args:
        dataset: a name in `DATASETS`.
        data_path: the data folder.
        trial: RegDB's split, 1..10; no meaning for the others.
        subset: "all" identities, or "fit": without those that `eval_set(subset="val")` asks for.
        use_cache: take SYSU-MM01's `train_{rgb,ir}_resized_{img,label}.npy` where all four exist.

    Raises:
        DataError: a folder, list, label or image is missing or wrong; found before any decoding.
    """
    check_choice("subset", subset, ("all", "fit"))
    check_choice("trial", trial, TRIALS)
    source, path = _source(dataset), Path(data_path)
    result = source.train(path, trial, use_cache)
    if subset == "fit":
        result = narrow(result, ~source.held_out(path, result.pids))
    found = f"{len(result.visible)} visible and {len(result.infrared)} infrared images"
    words = f"{result.description}: {result.num_ids} identities, {found}"
    return replace(result, description=words)


def eval_set(dataset: str, data_path: str | Path, **options: int | str) -> EvalSet:
    """List and check the query and gallery images of a protocol.

    Args:
        dataset: a name in `DATASETS`.
        data_path: the data folder.
        **options: the fields of `EvalOptions`.

    Raises:
        DataError: a folder, list, label or image is missing or wrong; found before any decoding.
    """
    return _source(dataset).evaluate(Path(data_path), EvalOptions(**options))


def data_name(dataset: str, data_path: str | Path) -> str:
    """Name the data in printed rows, so that stand-in numbers are never taken for real ones."""
    name = DATASETS[dataset].title
    stand_in = (Path(data_path) / STAND_IN_MARKER).exists()
    return f"stand-in data in {name}'s layout" if stand_in else name


def _source(dataset: str) -> Source:
    check_choice("dataset", dataset, tuple(DATASETS))
    return DATASETS[dataset]


class Regdb:
    """RegDB: ten splits of 412 identities in halves, 10 visible and 10 infrared images of each.

    `idx/{train,test}_{visible,thermal}_{trial}.txt` hold lines `Visible/<pid>/<file> <label>`;
    labels are 0..L-1 per split and shared by the two modalities. No camera rule, one gallery.
    """

    name = "regdb"
    title = "RegDB"
    folders = ("idx", "Visible", "Thermal")
    how_to_get = (
        "RegDB is given out by its authors against a signed form (http://dm.dongguk.edu/link.html,"
        " 'Dongguk Body-based Person Recognition Database (DBPerson-Recog-DB1)')."
    )
    lists_hint = "idx/ with the ten splits comes apart from the images; put it beside Visible/"

    def train(self, path: Path, trial: int, use_cache: bool = False) -> TrainSet:
        """Read a split's two training lists; 8,240 small images need no cache."""
        return self._split(path, "train", trial)

    def held_out(self, path: Path, pids: np.ndarray) -> np.ndarray:
        """Tell which labels ((L,) bool) are kept for validation: 0, 5, 10, ..."""
        return held_out_labels(pids)

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """Make one modality the query and the other the gallery."""
        if options.subset == "test":
            people = self._split(path, "test", options.trial)
        else:
            people = self._split(path, "train", options.trial)
            people = narrow(people, self.held_out(path, people.pids))
        return one_against_other(people, options, people.description)

    def _split(self, path: Path, split: str, trial: int) -> TrainSet:
        """Read both lists of a split and check them against each other."""
        root = data_root(path, self)
        names = [f"idx/{split}_{word}_{trial}.txt" for word in ("visible", "thermal")]
        lists = [
            read_list(root, name, folder)
            for name, folder in zip(names, ("Visible", "Thermal"), strict=True)
        ]
        return paired_lists(self, root, names, lists, (1, 2), f"RegDB trial {trial}")


class Llcm:
    """LLCM: nine cameras in low light; seven hundred identities to train on, one split.

    `idx/train_{vis,nir}.txt` hold lines `<folder>/<file> <label>` with labels 0..L-1 shared by the
    two modalities; they name no raw identity, and the label stands for it. Test images lie in
    `test_vis/cam1..cam9/<pid>/` and `test_nir/cam{1,2,4..9}/<pid>/`, of the identities in
    `idx/test_id.txt`; `<pid>` may have leading zeros or none. Queries are all images of one
    modality; the gallery has one seeded image of the other per identity and camera, drawn as
    SYSU-MM01's. Images of the query's own person and camera do not count.

    Deviation: the data set names no validation identities; every fifth training label is held out,
    and since the training lists name no cameras either, these are evaluated as RegDB's.
    """

    name = "llcm"
    title = "LLCM"
    folders = ("idx", "test_vis", "test_nir")
    how_to_get = (
        "LLCM is given out by its authors against a signed form (https://github.com/ZYK100/LLCM)."
    )
    lists_hint = "idx/ is part of the data set's download; put it beside test_vis/"

    def train(self, path: Path, trial: int, use_cache: bool = False) -> TrainSet:
        """Read the two training lists; there is one split and no cache."""
        root = data_root(path, self)
        names = [f"idx/train_{word}.txt" for word in LLCM_CAMERAS]
        lists = [read_list(root, name) for name in names]
        return paired_lists(self, root, names, lists, (-1, -1), self.title)

    def held_out(self, path: Path, pids: np.ndarray) -> np.ndarray:
        """Tell which labels ((L,) bool) are kept for validation: 0, 5, 10, ..."""
        return held_out_labels(pids)

    def evaluate(self, path: Path, options: EvalOptions) -> EvalSet:
        """List the queries and draw the galleries."""
        if options.subset == "val":
            people = self.train(path, 1)
            people = narrow(people, self.held_out(path, people.pids))
            return one_against_other(people, options, f"{self.title}, whole gallery")
        root = data_root(path, self)
        pids = np.array(sorted(read_ids(root, "test", "idx")), dtype=np.int64)
        sides = {}
        for modality, (word, cameras) in zip(
            ("visible", "infrared"), LLCM_CAMERAS.items(), strict=True
        ):
            layout = (f"test_{word}/{SYSU_FOLDER}", f"test_{word}/cam{{}}/{{}}")
            sides[modality] = find_images(root, pids, cameras, layout)
        asked, sought = list(sides) if options.direction == "v2i" else list(sides)[::-1]
        folders = [f"{folder}/" for folder in self.folders[1:]]
        both = {"query": (sides[asked], folders), "gallery": (sides[sought], folders)}
        check_not_empty(root, len(pids), "idx/test_id.txt", both)
        query = [(*key, name) for key, names in sides[asked].items() for name in names]
        draws = [seeded_draw(sides[sought], trial, 1) for trial in range(options.trials)]
        words = f"{self.title}, {asked} to {sought}, single-shot, seeded gallery"
        words += f", {len(draws)} trials"
        gallery = drawn_gallery(root, draws, sought)
        return EvalSet(self.name, image_list(root, query, asked), *gallery, "same", words)


DATASETS.update({source.name: source for source in (Regdb(), Sysu(), Llcm())})
