"""LLCM: its layout, training lists and gallery draws."""

from pathlib import Path

import numpy as np

from datasets.base import (
    DataError,
    DataSet,
    EvalOptions,
    EvalSet,
    Item,
    TrainSet,
    drawn_gallery,
    seeded_draw,
)
from datasets.folders import find_images, paired_lists, read_ids
from datasets.sysu_mm01 import Sysu

CAMERAS = {"vis": (1, 2, 3, 4, 5, 6, 7, 8, 9), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}


class Llcm(DataSet):
    """LLCM: nine cameras in low light; seven hundred identities to train on, one split.

    `idx/train_{vis,nir}.txt` hold lines `<folder>/<file> <label>` with labels 0..L-1 shared by the
    two modalities; they name no raw identity, and the label stands for it. Test images lie in
    `test_vis/cam1..cam9/<pid>/` and `test_nir/cam{1,2,4..9}/<pid>/`, of the identities in
    `idx/test_id.txt`. Queries are all images of one modality; the gallery has one seeded image of
    the other per identity and camera. Images of the query's own person and camera do not count.

    Visible to infrared has two meanings in print, whose numbers do not compare: that of the CVPR
    2023 paper is the one above; since 2023-06-20 the authors' repository turns it round, and the
    drawn infrared images query all visible ones.

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
    has_stand_in = True
    train_pids_are_labels = True
    # SYSU-MM01 too has several cameras, and one image per camera in the gallery.
    preset = Sysu.preset
    preset_source = (
        "this project's guess, SYSU-MM01's values; those that LLCM's authors publish for AGW, in"
        " their DEEN repository, were not at hand"
    )
    gallery_draws = 10
    protocols = {
        "v2i paper": {"direction": "v2i", "protocol": "paper"},
        "v2i repository": {"direction": "v2i", "protocol": "repository"},
        "i2v": {"direction": "i2v"},
    }
    expected = {"train": (713, 16946, 13975), "test": (351, None, None)}

    def train(self, root: Path, trial: int) -> TrainSet:
        """Reads the two training lists."""
        return paired_lists(root, ("idx/train_vis.txt", "idx/train_nir.txt"), self.title)

    def describe(self, options: EvalOptions) -> str:
        """Returns direction and, where there are two, protocol in words."""
        words = {
            "paper": "the CVPR 2023 paper's protocol",
            "repository": "the authors' repository's protocol (drawn infrared images query all"
            " visible ones)",
        }
        which = f", {words[options.protocol]}" if options.direction == "v2i" else ""
        return super().describe(options) + which

    def items(self, root: Path, role: str, trial: int) -> tuple[list[Item], list[Item]]:
        """Lists the images of the test identities."""
        pids = sorted(read_ids(root, f"idx/{role}_id.txt"))
        visible = find_images(root, pids, CAMERAS["vis"], "test_vis/cam")
        return visible, find_images(root, pids, CAMERAS["nir"], "test_nir/cam")

    def evaluate(self, root: Path, options: EvalOptions) -> EvalSet:
        """Makes one modality the queries and draws the galleries, or the queries, from the other.

        Raises:
            DataError: The repository's protocol is asked for in the direction that has but one.
        """
        turned = options.protocol == "repository"
        if turned and options.direction == "i2v":
            raise DataError(
                "LLCM has one protocol from infrared to visible: leave out --protocol repository"
            )
        whole = super().evaluate(root, options)
        if options.subset == "val":
            return whole
        draws = [seeded_draw(whole.gallery, trial, 1) for trial in range(options.trials)]
        drawn, rows = drawn_gallery(whole.gallery, draws)
        count = f"{len(draws)} trial{'s' * (len(draws) > 1)}"
        protocol = f"{whole.protocol}, single-shot, seeded draws, {count}"
        if turned:
            all_rows = (np.arange(len(whole.query)),) * len(draws)
            return EvalSet(self.name, drawn, whole.query, all_rows, "same", protocol, rows)
        return EvalSet(self.name, whole.query, drawn, rows, "same", protocol)
