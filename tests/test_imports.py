"""The direction of imports: a room knows only the rooms below it."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [
    {"features", "distributed", "decoding", "plots", "checkpoints", "lookup", "schedule", "accumulation"}
    | {"processes", "search_options", "neighbor_columns", "citations", "panel", "html", "disk"},
    {"losses", "models", "preprocessing", "images", "views"},
    {"backbones"},
    {"loading"},
    {"classifiers", "embedding", "engines", "store"},
    {"searching"},
    {"indexes"},
    {"modeling", "config", "cli", "evaluation", "neighbors"},
    {"model_card", "student"},
    {"hub"},
    {"assembly", "pretraining", "tracking"},
    {"saving"},
    {"publishing"},
    {"trainer"},
    {"report", "estimate", "export"},
    {"study"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / "coss_hf").parts[0].removesuffix(".py")


def files():
    return sorted(p for p in (ROOT / "coss_hf").rglob("*.py") if p.parent != ROOT / "coss_hf" or p.stem != "__init__")


def test_imports_point_downwards():
    for path in files():
        for name in imports(path):
            if name.startswith("coss_hf."):
                below = name.split(".")[1]
                assert below == room(path) or LEVEL[below] <= LEVEL[room(path)], f"{path.name} imports {name}"


def test_losses_know_only_features_and_distributed():
    for path in (ROOT / "coss_hf" / "losses").glob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("coss_hf.")}
        assert ours <= {"features", "distributed", "losses"}, path.name


def test_the_trainer_never_imports_faiss():
    assert not any("neighbors" in name or "indexes" in name for name in imports(ROOT / "coss_hf" / "trainer.py"))
    for path in files():
        if any(name.split(".")[0] == "faiss" for name in imports(path)):
            assert path.name == "indexes.py"


def test_no_file_is_longer_than_350_lines():
    for path in [*files(), *(ROOT / "recipes").rglob("*.py")]:
        limit = 150 if "recipes" in path.parts else 130 if room_or_none(path) == "losses" else 350
        assert len(path.read_text().splitlines()) <= limit, path.name


def room_or_none(path: Path) -> str | None:
    return room(path) if (ROOT / "coss_hf") in path.parents else None


def test_the_package_offers_its_public_names_without_importing_them_all():
    program = (
        "import sys, coss_hf; from coss_hf.losses import LOSSES; LOSSES['coss'](beta=50.0, lambda_ss=1.0); "
        "assert not {'faiss', 'datasets', 'transformers'} & set(sys.modules), 'a loss needs torch alone'; "
        "print([getattr(coss_hf, name).__class__.__name__ for name in coss_hf.__all__])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
