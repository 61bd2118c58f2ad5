"""The direction of imports: a wing knows only itself and the wings before it."""

import ast
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT

WINGS = "utils features losses data models evaluation neighbors hub reporting trainer study cli".split()
# Beside torch and their own wing, all that a loss may import.
LOSS_IMPORTS = {"features", "losses", "utils.distributed", "utils.lazy", "utils.vectors"}


def imports(path) -> set[str]:
    """Full names of the modules and names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(wing: str):
    return [ROOT / "coss_hf" / f"{wing}.py"] if wing == "features" else (ROOT / "coss_hf" / wing).rglob("*.py")


@pytest.mark.parametrize("wing", WINGS)
def test_wings_import_only_wings_before_them(wing):
    for path in files(wing):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("coss_hf.")}
        assert ours <= {*WINGS[: WINGS.index(wing) + 1]}, path


def test_every_module_belongs_to_a_wing():
    found = {path.name.removesuffix(".py") for path in (ROOT / "coss_hf").iterdir()}
    assert found - {"__pycache__", "__init__", "__main__", "py.typed"} == {*WINGS}


def test_losses_import_torch_features_and_distributed_alone():
    for path in files("losses"):
        ours = {name.removeprefix("coss_hf.") for name in imports(path) if name.startswith("coss_hf.")}
        assert all(any(f"{name}.".startswith(f"{allowed}.") for allowed in LOSS_IMPORTS) for name in ours), path


def test_one_file_imports_faiss():
    every = [path for path in (ROOT / "coss_hf").rglob("*.py")]
    found = [path.name for path in every if any(name.split(".")[0] == "faiss" for name in imports(path))]
    assert found == ["faiss_index.py"]


def test_the_package_offers_its_public_names_without_importing_them_all():
    program = (
        "import sys, coss_hf; from coss_hf.losses import CoSSLoss; CoSSLoss(beta=50.0, lambda_ss=1.0); "
        "assert not {'faiss', 'datasets', 'transformers'} & set(sys.modules), 'a loss needs torch alone'; "
        "print([getattr(coss_hf, name).__class__.__name__ for name in coss_hf.__all__])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "line",
    [
        "from coss_hf.losses import LOSSES, build_loss",
        "from coss_hf.evaluation import evaluate_embeddings, knn_accuracy, linear_probe, retrieval, table",
        "from coss_hf.neighbors import add_neighbors, check_neighbors, nearest_neighbors, neighbor_hashes, search",
        "from coss_hf.trainer import DistillationTrainer",
        "from coss_hf.hub import check_repo, push, push_dataset",
        "from coss_hf.cli import bad_input_exits, parse, stopped_run_exits",
        "from coss_hf.models import CIFAR_NETWORKS, CifarResNetConfig, CifarResNetModel, cifar_config",
    ],
)
def test_public_names_of_the_wings(line):
    exec(line, {})
