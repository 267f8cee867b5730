"""Files from strangers: whatever is in them, an answer or an error of ours.

Hundreds of cases by default; `pytest -m slow tests/test_untrusted.py` tries thousands.
"""

import contextlib
import io
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from short_run import NARROW, arguments, write_data

import options
import stand_in
import train_MGMRA
import visualize
from data_manager import DataError, eval_set, train_set
from engine import resume
from engine.checkpoints import TrainedOn, load_network, open_network
from engine.fit import RunFiles, write_reports
from engine.train import Schedule, make_optimizer
from model import TwoStreamNet
from networks import checkpoint_file
from networks.backbone import BACKBONES
from networks.checkpoint_file import CheckpointError, load_checkpoint, save_checkpoint
from reproduction.plan import Row, Setting, Step
from reproduction.tables import _read_result
from test import describe
from test import main as evaluate

SETTINGS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
    "report_multiple_bugs": False,
    "print_blob": False,
}


def cases(few, many):
    """A property tried on `few` cases by default, and on `many` more in a slow test."""

    def decorate(function):
        def run(count, *args):
            settings(max_examples=count, **SETTINGS)(function)(*args)

        return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])(
            _with_signature(run, function)
        )

    return decorate


def _with_signature(run, function):
    """A test whose one fixture beside the count is the module's `place`."""

    def test(count, place):
        run(count, place)

    test.__name__, test.__doc__ = function.__name__, function.__doc__
    return test


class Place:
    """Stand-in data in both layouts, with links that lead outside, and a checkpoint."""

    def __init__(self, root):
        self.root, self.regdb, self.sysu = root, root / "regdb", root / "sysu"
        write_data(self.regdb)
        counts = {"train_ids": 3, "test_ids": 2, "images_per_id": 2}
        stand_in.generate(self.sysu, layout="sysu", **counts, seed=1, workers=1)
        outside = root / "outside" / "1"
        outside.mkdir(parents=True)
        shutil.copy(next(self.regdb.rglob("*.bmp")), outside / "out.bmp")
        self.files = sorted(p.relative_to(self.regdb).as_posix() for p in self.regdb.rglob("*.bmp"))
        (self.regdb / "Visible" / "78").mkdir()
        (self.regdb / "Visible" / "78" / "link.bmp").symlink_to(outside / "out.bmp")
        (self.regdb / "Visible" / "77").symlink_to(outside)
        self.files += ["Visible/78/link.bmp", "Visible/77/out.bmp"]
        self.lines = (self.regdb / "idx/train_visible_1.txt").read_text().splitlines()
        folder = root / "run"
        train_MGMRA.main(arguments(self.regdb, folder, "--epochs", 1))
        self.checkpoint = folder / "last.pt"
        place = ("--data-path", self.regdb, "--output-dir", folder, "--resume", self.checkpoint)
        evaluate([*map(str, ("--dataset", "regdb", *place, "--gpu", "cpu", "--quiet"))])
        self.content = load_checkpoint(self.checkpoint)
        self.identities = self.content["identities"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(BACKBONES, "resnet18", NARROW["resnet18"])
        yield Place(tmp_path_factory.mktemp("untrusted"))


@contextlib.contextmanager
def replaced(file, content):
    """Another content of a file, while it lasts."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def inside(images, root):
    """Checks that each image is a file in the data folder."""
    for path in images.paths:
        real = os.path.realpath(root / path)
        assert real.startswith(f"{os.path.realpath(root)}/")
        assert os.path.isfile(real)


def mutated(data):
    """Bytes with a few changes: overwritten, cut, repeated, inserted."""

    @st.composite
    def strategy(draw):
        result = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(len(result) - 1, 0)))
            kind = draw(st.sampled_from(("set", "cut", "insert", "end")))
            if kind == "set":
                result[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
            elif kind == "cut":
                del result[at : at + draw(st.integers(1, 9))]
            elif kind == "insert":
                result[at:at] = draw(st.binary(max_size=9))
            else:
                del result[at:]
        return bytes(result)

    return strategy()


SEGMENTS = st.sampled_from(
    ("Visible", "Thermal", "..", ".", "", "/etc", "77", "idx", "link.bmp", "out.bmp", "~", "\x00")
)


@cases(200, 4000)
@given(st.data())
def test_regdb_lists(place, data):
    paths = st.one_of(
        st.sampled_from(place.files),
        st.lists(SEGMENTS | st.text(max_size=6), max_size=5).map("/".join),
        st.text(max_size=20),
    )
    labels = st.integers(-1, 7).map(str) | st.text(max_size=4)
    line = st.sampled_from(place.lines) | st.tuples(paths, labels).map(" ".join)
    few_changes = st.tuples(st.integers(0, len(place.lines) - 1), line).map(
        lambda change: [*place.lines[: change[0]], change[1], *place.lines[change[0] + 1 :]]
    )
    lines = data.draw(few_changes | st.lists(line, max_size=6))
    text = data.draw(
        st.just("\n".join(lines).encode("utf-8", "surrogatepass"))
        | mutated("\n".join(place.lines).encode())
    )
    with replaced(place.regdb / "idx/train_visible_1.txt", text):
        try:
            found = train_set("regdb", place.regdb)
        except DataError as error:
            assert "idx/train_" in str(error) or str(place.regdb) in str(error)
        else:
            inside(found.visible, place.regdb)


@cases(150, 3000)
@given(st.data())
def test_identity_lists(place, data):
    number = st.integers(-2, 12).map(str) | st.text(max_size=5) | st.integers().map(str)
    lines = st.lists(number, max_size=9).map(",".join).map(lambda text: text.encode("utf-8"))
    name = data.draw(st.sampled_from(("train", "val", "test")))
    file = place.sysu / f"exp/{name}_id.txt"
    with replaced(file, data.draw(lines | mutated(file.read_bytes()))):
        for read in (train_set, eval_set):
            with contextlib.suppress(DataError):
                found = read("sysu", place.sysu)
                inside(getattr(found, "gallery", None) or found.visible, place.sysu)


FLAG_VALUES = st.one_of(
    st.integers(-3, 200).map(str),
    st.floats().map(str),
    st.sampled_from(
        ("on", "off", "base", "agw", "regdb", "sysu", "sgd", "adam", "cosine", "step", "v2i", "i2v")
    ),
    st.sampled_from(("scratch", "val", "test", "all", "indoor", "resnet18", "", "nan", "-inf")),
    st.text(max_size=5),
)


@cases(200, 5000)
@given(st.data())
def test_option_combinations(place, data):
    parser = options.train_parser("")
    flags = sorted(
        f for a in parser._actions for f in a.option_strings if f not in ("-h", "--help")
    )
    words = data.draw(
        st.lists(st.tuples(st.sampled_from(flags), st.lists(FLAG_VALUES, max_size=2)), max_size=5)
    )
    argv = [word for flag, values in words for word in (flag, *values)]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            args, sources = options.resolve(parser.parse_args(argv))
        except (ValueError, SystemExit):
            return
    saved = options.to_json(args)
    assert resume.changes(saved, json.loads(json.dumps(saved))) == ""
    options.describe(args, sources)
    schedule = Schedule(
        lr=args.lr,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        milestones=args.milestones,
        kind=args.schedule,
        triplet_ramp=args.triplet_ramp,
    )
    for epoch in {0, 1, args.epochs // 2, args.epochs - 1} & set(range(args.epochs)):
        assert 0 <= schedule.learning_rate(epoch) <= args.lr
        assert 0 <= schedule.triplet_scale(epoch) <= 1


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TENSORS = st.sampled_from(((), (3,), (2, 2), (32, 8, 1, 1))).map(torch.ones) | st.sampled_from(
    (
        torch.ones(5, dtype=torch.int64),
        torch.ones(3, 2).T,
        torch.ones(1).expand(10**8, 3),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        torch.empty(2, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    )
)


def nested(values):
    """Values, and lists and dictionaries of them."""
    return st.recursive(
        values,
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3),
        max_leaves=5,
    )


@st.composite
def changed(draw, content, values, depth=4):
    """A dictionary with one entry, possibly deep inside, replaced, removed or added."""
    content = dict(content)
    keys = sorted(content, key=str)
    key = draw(st.sampled_from(keys)) if keys else "new"
    value = content.get(key)
    if isinstance(value, dict) and depth and draw(st.booleans()):
        content[key] = draw(changed(value, values, depth - 1))
    elif isinstance(value, list) and value and draw(st.booleans()):
        content[key] = [*value[:-1], draw(values)]
    elif draw(st.integers(0, 3)) == 0:
        content.pop(key, None)
    else:
        key = draw(st.just(key) | st.text(max_size=4) | st.integers(0, 2))
        content[key] = draw(values)
    return content


@cases(60, 3000)
@given(st.data())
def test_checkpoint_dictionaries(place, data):
    stored = torch.load(place.checkpoint, weights_only=True)
    about, values = json.loads(stored["about"]), nested(PLAIN | TENSORS)
    former = {**about, "net": stored["net"], "format": checkpoint_file.FORMER}
    texts = changed(about, nested(PLAIN)).map(json.dumps) | st.text(max_size=9)
    content = data.draw(
        texts.map(lambda text: {**stored, "about": text})
        | changed(stored, values)
        | changed(former, values)
        | st.dictionaries(st.text(max_size=6), values, max_size=4)
    )
    file = place.root / "stranger.pt"
    torch.save(content, file)
    with contextlib.suppress(ValueError):  # a CheckpointError, or of the size in its options
        info = load_checkpoint(file)
        TrainedOn(file, info).defaults  # noqa: B018
        entries = {name: info[name] for name in resume.ENTRIES if name in info}
        with contextlib.suppress(CheckpointError):
            resumed(place, **entries)
        net, info, _ = open_network(file, torch.device("cpu"), None, None)
        json.dumps(describe(str(file), info, net))


def hostile(stored):
    """Files that once were read without end, or beyond their tensors."""
    lists = []
    for _ in range(60):
        lists = [lists, lists]
    about = json.loads(stored["about"])
    yield "about", {**stored, "about": lists}
    yield "about", {**stored, "about": "[" * 10**6}
    yield "about", {**stored, "about": json.dumps({**about, "epoch": float("nan")})}
    yield "about", {**stored, "about": json.dumps(about).replace('"epoch": 1', '"epoch": 1e999')}


def test_hostile_checkpoints_end_at_once(place):
    stored, file = torch.load(place.checkpoint, weights_only=True), place.root / "hostile.pt"
    for what, content in hostile(stored):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=f"{file} .* is not a readable checkpoint: "):
            load_checkpoint(file)
        assert file.stat().st_size < 20 * 2**20, what


def test_a_former_checkpoint_is_evaluated_but_not_resumed(place):
    content = {k: v for k, v in place.content.items() if k != "generators"}
    former = {**content, "format": checkpoint_file.FORMER, "torch_generator": torch.ones(2)}
    file = place.root / "former.pt"
    torch.save(former, file)
    net, info = load_network(file)
    weights = net.state_dict()
    assert all(torch.equal(weights[name], each) for name, each in content["net"].items())
    assert info == {k: content[k] for k in checkpoint_file.OF_FORMER}
    with pytest.raises(CheckpointError, match=r"without optimizer, .*; to start from its weights"):
        resume.find(str(file), RunFiles(place.root, place.root, place.root), train=True)


READERS = {
    "log.jsonl": visualize.read_log,
    "options.json": lambda file: visualize.read_log(file.parent),
    "results.json": visualize.read_result,
}


@cases(100, 3000)
@given(st.data())
def test_reports_of_a_run(place, data):
    folder = place.checkpoint.parent
    name = data.draw(st.sampled_from((*READERS, "training.json")))
    file, texts = folder / name, st.binary(max_size=9) | st.sampled_from((b"[" * 10**5, b"1e999"))
    before = file.read_bytes()
    changes = changed(json.loads(before), nested(PLAIN)).map(lambda x: json.dumps(x).encode())
    text = data.draw(mutated(before) | texts | changes)
    with replaced(file, text), contextlib.suppress(ValueError):
        try:
            Step("train_MGMRA.py", {"dataset": "regdb"}, folder).is_done()
            row = Row("regdb", "v2i", Setting("MG-MRA"), "last", [folder / "results.json"], 1)
            _read_result(*row.files, row)
            READERS.get(name, str)(file)
        except ValueError as error:
            assert str(folder) in str(error)
            raise


def resumed(place, **entries):
    """Restores a run from its checkpoint, some entries of which are others."""
    net = TwoStreamNet(**place.content["config"])
    content = {**place.content, **entries, "path": place.checkpoint}
    progress = resume.restore(content, net, make_optimizer(net), identities=place.identities)
    write_reports(RunFiles(place.root, place.root, place.root), progress)
    return progress


def test_what_is_in_order_is_taken(place):
    assert resumed(place).epoch == 1


def test_a_run_s_checkpoint_that_is_out_of_order_is_refused(place):
    content, tensor = place.content, torch.ones(2, 2)
    groups = content["optimizer"]["param_groups"]
    first = next(iter(content["net"]))
    for entries in (
        {"net": {**content["net"], first: tensor}},
        {"net": {}},
        {"config": {**content["config"], "num_ids": tensor}},
        {"config": {**content["config"], "num_ids": 7}},
        {"config": None},
        {"identities": [tensor] * len(place.identities)},
        {"identities": place.identities[::-1]},
        {"identities": None},
        {"optimizer": {**content["optimizer"], "param_groups": [None, None]}},
        {"optimizer": {"state": {0: {"momentum_buffer": tensor}}, "param_groups": groups}},
        {"optimizer": {"state": {}, "param_groups": groups[:1]}},
        {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(1)}}, "param_groups": groups}},
        {"optimizer": []},
        {"generators": {"cpu": tensor}},
        {"generators": {"x": tensor}},
    ):
        with pytest.raises(CheckpointError, match=str(place.checkpoint)):
            resumed(place, **entries)


@pytest.mark.parametrize("missing", resume.ENTRIES[1:])
def test_a_file_that_is_no_run_s_checkpoint_is_refused(missing, place):
    file = place.root / "other.pt"
    save_checkpoint(file, {k: v for k, v in place.content.items() if k != missing})
    with pytest.raises(CheckpointError, match=f"{file} is no checkpoint .*without {missing}; "):
        resume.find(str(file), RunFiles(place.root, place.root, place.root), train=True)


@cases(150, 3000)
@given(st.data())
def test_checkpoint_bytes(place, data):
    file = place.root / "stranger.pt"
    before = place.checkpoint.read_bytes()
    after = data.draw(mutated(before))
    file.write_bytes(after)
    try:
        content = load_checkpoint(file)
    except CheckpointError as error:
        assert str(file) in str(error)
    else:  # a change in the padding, or of a checksum that nothing reads
        for name, value in content["net"].items():
            assert torch.equal(value, place.content["net"][name]), name
