"""Features in files: what is read for a protocol, and what is refused."""

import numpy as np
import pytest

from data_manager import EvalSet, eval_set
from engine.evaluate import score
from engine.feature_files import read_features, save_features


@pytest.fixture
def protocol(tiny_regdb):
    return eval_set("regdb", tiny_regdb)


def random_features(count, seed=0):
    values = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def all_paths(protocol):
    return [*protocol.query.paths, *protocol.gallery.paths]


def test_rows_are_found_by_path_in_any_order_and_others_are_left(protocol, tmp_path):
    paths = ["Visible/0/other.bmp", *all_paths(protocol)]
    values = random_features(len(paths))
    order = np.random.default_rng(1).permutation(len(paths))
    np.savez(tmp_path / "f.npz", paths=np.array(paths)[order], features=values[order])
    found = read_features(tmp_path / "f.npz", protocol)
    count = len(protocol.query)
    assert np.array_equal(found["query"]["features"], values[1 : 1 + count])
    assert np.array_equal(found["gallery"]["features"], values[1 + count :])


def test_groups_and_several_kinds_of_features(protocol, tmp_path):
    query, gallery = random_features(len(protocol.query)), random_features(len(protocol.gallery), 1)
    arrays = {"query_paths": protocol.query.paths, "gallery_paths": protocol.gallery.paths}
    arrays |= {"query_a": query, "gallery_a": gallery, "query_b": -query, "gallery_b": -gallery}
    np.savez(tmp_path / "f.npz", query_pids=protocol.query.pids, **arrays)
    found = read_features(tmp_path / "f.npz", protocol)
    assert list(found["query"]) == list(found["gallery"]) == ["a", "b"]
    assert np.array_equal(found["gallery"]["b"], -gallery)


def damaged(name, paths, values):
    """Arrays of a file that is wrong in one way."""
    return {
        "missing": {"paths": paths[:-2], "features": values[:-2]},
        "doubled": {"paths": [*paths, *paths[:3]], "features": [*values, *values[:3]]},
        "norms": {"paths": paths, "features": 3 * values},
        "NaN": {"paths": paths, "features": np.where(values > 0.5, np.nan, values)},
        "lengths": {"paths": paths, "features": values[1:]},
        "no features": {"paths": paths},
        "no images": {"paths": paths[:0], "features": values[:0]},
        "no paths": {"features": values},
        "pickled": {"paths": np.array(paths, dtype=object), "features": values},
        "mirror": {"paths": paths, "features": values, "tta": "flip"},
    }[name]


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "missing": "lacks 2 of the 20 images of RegDB trial 1, visible to infrared, 'Thermal/7/",
        "doubled": "names 3 images more than once, 'Visible/5/",
        "norms": "norms from 3 to 3, expected 1",
        "NaN": "norms from nan to nan, expected 1",
        "lengths": "cannot be used.*expected arrays `paths`",
        "no features": "expected arrays `paths`",
        "no images": "expected arrays `paths`",
        "no paths": "KeyError.*expected arrays `paths`",
        "pickled": "allow_pickle",
        "mirror": "was written with --tta flip",
    }.items(),
)
def test_what_cannot_be_scored_is_said(protocol, tmp_path, name, text):
    paths = all_paths(protocol)
    np.savez(tmp_path / "f.npz", **damaged(name, paths, random_features(len(paths))))
    with pytest.raises(ValueError, match=text):
        read_features(tmp_path / "f.npz", protocol)


def test_paths_may_stand_in_a_column(protocol, tmp_path):
    paths = np.array(all_paths(protocol))[:, None]
    np.savez(tmp_path / "f.npz", paths=paths, features=random_features(len(paths)))
    assert len(read_features(tmp_path / "f.npz", protocol)["query"]["features"]) == len(
        protocol.query
    )


def test_files_that_are_no_npz_are_named(protocol, tmp_path):
    (tmp_path / "f.npz").write_text("nothing")
    np.save(tmp_path / "g.npy", np.zeros(3))
    for name in ("f.npz", "g.npy", "none.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be used: .*expected arrays"):
            read_features(tmp_path / name, protocol)


def test_what_is_saved_is_what_is_read_and_trials_are_padded(protocol, tmp_path):
    trials = (np.array([0, 2]), np.array([1]))
    protocol = EvalSet(
        "regdb", protocol.query, protocol.gallery.take([3, 0, 5]), trials, "none", "p"
    )
    roles = {"query": len(protocol.query), "gallery": 3}
    features = {role: {"pcb": random_features(count)} for role, count in roles.items()}
    row = {"protocol": "p", "dataset": "d", "checkpoint": "c", "tta": "no"}
    save_features(tmp_path / "f.npz", protocol, features, row)
    with np.load(tmp_path / "f.npz") as saved:
        assert saved["gallery_trials"].tolist() == [[0, 2], [1, -1]]
    found = read_features(tmp_path / "f.npz", protocol)
    pairs = [(each["query"]["pcb"], each["gallery"]["pcb"]) for each in (features, found)]
    assert score(protocol, *pairs[0]) == score(protocol, *pairs[1])
