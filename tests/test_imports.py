"""The direction of imports: a package knows only itself and the packages before it."""

import ast
import subprocess
import sys
from importlib.util import resolve_name

import pytest

import coss_hf
from tests.helpers.runs import ROOT

PACKAGES = "utils features losses data models evaluation neighbors hub reporting trainer study cli".split()
# Next to torch and their own package, all that a loss may import.
LOSS_IMPORTS = {"features", "losses", "utils.distributed", "utils.lazy", "utils.vectors"}


def imports(path) -> set[str]:
    """Full names of the modules and names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = (
                resolve_name("." * node.level + (node.module or ""), package_of(path)) if node.level else node.module
            )
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def package_of(path) -> str:
    """The package that a file's relative imports start from."""
    return ".".join(path.parent.relative_to(ROOT).parts)


def test_relative_imports_count():
    found = imports(ROOT / "coss_hf/models/cifar/modeling_cifar_resnet.py")
    assert "coss_hf.models.cifar.configuration_cifar_resnet.CifarResNetConfig" in found


def files(package: str):
    return [ROOT / "coss_hf" / f"{package}.py"] if package == "features" else (ROOT / "coss_hf" / package).rglob("*.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_packages_before_them(package):
    for path in files(package):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("coss_hf.")}
        assert ours <= {*PACKAGES[: PACKAGES.index(package) + 1]}, path


def test_every_module_belongs_to_a_package():
    found = {path.name.removesuffix(".py") for path in (ROOT / "coss_hf").iterdir()}
    assert found - {"__pycache__", "__init__", "__main__", "py.typed"} == {*PACKAGES}


def test_losses_import_torch_features_and_distributed_alone():
    for path in files("losses"):
        ours = {name.removeprefix("coss_hf.") for name in imports(path) if name.startswith("coss_hf.")}
        assert all(any(f"{name}.".startswith(f"{allowed}.") for allowed in LOSS_IMPORTS) for name in ours), path


def test_losses_need_no_other_package_than_torch():
    found = {name.split(".")[0] for path in files("losses") for name in imports(path)}
    assert found - set(sys.stdlib_module_names) == {"coss_hf", "torch"}


def test_one_file_imports_faiss():
    every = [path for path in (ROOT / "coss_hf").rglob("*.py")]
    found = [path.name for path in every if any(name.split(".")[0] == "faiss" for name in imports(path))]
    assert found == ["faiss_index.py"]


def test_the_package_offers_its_public_names_without_importing_them_all():
    program = (
        "import sys, coss_hf; from coss_hf.losses import CoSSLoss; CoSSLoss(beta=50.0, lambda_ss=1.0); "
        "assert not {'faiss', 'datasets', 'transformers'} & set(sys.modules), 'a loss needs torch alone'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert all(getattr(coss_hf, name) for name in coss_hf.__all__)


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
def test_public_names_of_the_packages(line):
    exec(line, {})
