"""Tests of the whole: which module may import which, and the names that others rely on."""

import ast
import importlib
from pathlib import Path

import pytest

from utils import VERSION

ROOT = Path(__file__).parents[1]
# From the ground up: a room or module imports what stands below it, and modules of its own room.
FLOORS = (
    "utils",
    "eval_metrics re_rank datasets",
    "data_manager data_loader",
    "networks",
    "memory loss",
    "model",
    "options",
    "engine",
    "figures reproduction",
    "train_HCT train_SGMRA train_MGMRA test pre_process_sysu stand_in reproduce visualize",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
ROOMS = ("datasets", "networks", "engine", "figures", "reproduction")
WITHOUT_TORCH = ("options", "eval_metrics", "re_rank", "data_manager", "datasets", "reproduction")
WITH_TORCH = ("datasets.transforms",)  # works on batches


def product_modules() -> dict[str, Path]:
    """Path of each product module by its dotted name."""
    paths = [*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_citation_names_this_version():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_imports_point_down_only():
    modules = product_modules()
    graph = {name: imports(path) & modules.keys() for name, path in modules.items()}
    for name, targets in graph.items():
        room = name.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            assert other == room or FLOOR[other] < FLOOR[room], f"{name} imports {target}"
    done: set[str] = set()
    while done != graph.keys():  # leaves go first; in a circle nothing can
        leaves = {n for n, targets in graph.items() if n not in done and targets <= done}
        assert leaves, f"a circle among {sorted(graph.keys() - done)}"
        done |= leaves


def test_modules_are_where_they_belong():
    assert {name for name in product_modules() if "." not in name} == {
        name for name in FLOOR if name not in ROOMS
    }
    for room in ROOMS:
        assert (ROOT / room / "__init__.py").read_text() == ""
    for name, path in product_modules().items():
        found = {target.split(".")[0] for target in imports(path)}
        if name.split(".")[0] in WITHOUT_TORCH and name not in WITH_TORCH:
            assert "torch" not in found, name
        commands = (*" ".join(FLOORS[-2:]).split(), "options", "engine")
        assert "argparse" not in found or name.split(".")[0] in commands, name


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("memory", "SingleGranularityMemory MultiGranularityMemory MemoryRead"),
        ("loss", "HeteroCenterTripletLoss BatchHardTripletLoss WeightedRegularizedTripletLoss"),
        ("model", "TwoStreamNet convert_released_state_dict"),
        ("eval_metrics", "eval_sysu eval_regdb"),
        ("re_rank", "k_reciprocal random_walk"),
    ],
)
def test_names_that_code_elsewhere_calls_stay_where_they_are(module, names):
    assert not [
        name for name in names.split() if not hasattr(importlib.import_module(module), name)
    ]
