"""Tests of the whole: which module may import which."""

from pathlib import Path

LAYERS = {  # project modules that each module may import: house map, imports point up only
    "utils": "",
    "eval_metrics": "",
    "re_rank": "",
    "loss": "",
    "addressing": "",
    "memory": "addressing",
    "image_lists": "",
    "data_folders": "image_lists",
    "sysu_mm01": "data_folders image_lists",
    "data_manager": "data_folders image_lists sysu_mm01",
    "options": "",
    "pedestrians": "",
    "weights": "utils",
    "augmentation": "",
    "data_loader": "augmentation image_lists sysu_mm01",
    "layers": "addressing",
    "model": "addressing layers memory utils weights",
    "distributed": "utils",
    "engine": "distributed loss memory",
    "retrieval": "distributed eval_metrics re_rank",
    "fit_loop": "distributed engine loss retrieval utils",
    "resume": "engine fit_loop model retrieval utils",
    "figures": "utils",
    "pictures": "figures",
    "addresses": "addressing data_loader model pictures",
    "tables": "eval_metrics",
    "data_check": "data_folders data_manager image_lists",
}
WITHOUT_TORCH = ("image_lists", "data_folders", "sysu_mm01", "data_manager", "data_check")
WITHOUT_TORCH += ("options", "eval_metrics", "re_rank", "pedestrians", "tables")


def test_imports_point_up_only():
    import ast

    root = Path(__file__).parents[1]
    modules = {path.stem for path in root.glob("*.py")}
    for name, allowed in LAYERS.items():
        tree = ast.parse((root / f"{name}.py").read_text())
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found & modules <= set(allowed.split()), name
        if name in WITHOUT_TORCH:
            assert "torch" not in found, name
        assert "argparse" not in found or name == "options", name
