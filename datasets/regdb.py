"""RegDB: its layout, splits and protocol."""

from pathlib import Path

from datasets.base import DataSet, ImageList, TrainSet
from datasets.folders import paired_lists


class Regdb(DataSet):
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
    has_stand_in = True
    preset = {"batch_size": 8, "num_pos": 4, "gem_p": 10.0, "w_center": 2.0, "label_smooth": "on"}
    preset_source = "lr, P, K: the authors' README; p, w_center, smoothing: their script, HCT"
    splits = 10
    expected = {"train": (206, 2060, 2060), "test": (206, 2060, 2060)}

    def train(self, root: Path, trial: int) -> TrainSet:
        """Reads a split's two training lists."""
        return self._split(root, "train", trial)

    def images(self, root: Path, role: str, trial: int) -> tuple[ImageList, ImageList]:
        """Reads a split's two lists of the "train" or the "test" identities."""
        people = self._split(root, role, trial)
        return people.visible, people.infrared

    def _split(self, root: Path, role: str, trial: int) -> TrainSet:
        names = f"idx/{role}_visible_{trial}.txt", f"idx/{role}_thermal_{trial}.txt"
        title = f"{self.title} trial {trial}"
        return paired_lists(root, names, title, folders=("Visible", "Thermal"), camids=(1, 2))
