"""Packages of extras: a message names the extra of one that is missing."""

import re
import sys
from types import ModuleType

import pytest
from transformers import AutoModel, TimmWrapperConfig

import tests.helpers.runs as h
from coss_hf import DistillationArguments, DistillationTrainer
from coss_hf.cli.pages import load_recipe
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.plots import quality_plot
from coss_hf.reporting.run_report import remove_pictures
from coss_hf.utils.packages import EXTRAS, MissingPackage, check_extra, how_to_install, is_installed


@pytest.fixture
def without(monkeypatch):
    """Block the import of packages."""

    def block(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return block


def test_extras_are_those_of_the_package():
    setup = (h.ROOT / "setup.py").read_text()
    for package, extra in EXTRAS.items():
        assert f'"{extra}":' in setup
        assert re.search(rf'"{ {"sklearn": "scikit-learn"}.get(package, package) }"', setup), package


def test_a_missing_package_is_named_with_its_extra(without):
    assert is_installed("timm") and how_to_install("onnx") == "pip install 'coss-hf[export]'"
    without("timm")
    assert not is_installed("timm") and not is_installed("no_such_package")
    with pytest.raises(MissingPackage, match=r"^--teacher=x needs timm, .*: pip install 'coss-hf\[timm\]'\.$"):
        check_extra("json", "timm", needed_by="--teacher=x")


def test_networks_of_timm(without, tmp_path):
    """Their loader said: give a complete checkpoint."""
    AutoModel.from_config(TimmWrapperConfig(architecture="test_resnet")).save_pretrained(tmp_path / "student")
    without("timm")
    for options in ({"name": str(tmp_path / "student")}, {"name": "timm_wrapper", "init": "random"}):
        with pytest.raises(ValueError, match=r"^student=\S+ needs timm, .*'coss-hf\[timm\]'"):
            load_backbone(argument="student", **options)


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_trackers(without, tmp_path, image_parquet, networks, name):
    """`Trainer` named the package, and for TensorBoard another one."""
    without(name, "tensorboardX")
    args = DistillationArguments(str(tmp_path / "out"), use_cpu=True, report_to=[name], per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=rf"^report_to=.?{name}.? needs {name}, .*'coss-hf\[{name}\]'"):
        DistillationTrainer(networks.teacher, networks.resnet, args, str(image_parquet))


def test_pictures_are_left_out(without, tmp_path, caplog):
    """They are drawn at the end of a run: nothing else of its report is lost, nor a picture that is there."""
    (tmp_path / "a.png").write_bytes(b"of this run")
    without("matplotlib")
    for name in ("a.png", "b.png"):
        quality_plot(tmp_path / name, {"coss": (1.0, [0.5])}, "knn20", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert caplog.messages == [
        f"Pictures in {tmp_path} are not drawn, and those that are there stay as they are, since matplotlib is not "
        f"installed: pip install 'coss-hf[plots]'."
    ]


def test_pictures_of_a_run_that_is_replaced_go_with_it(tmp_path):
    """Without matplotlib the new run's page would show them."""
    for name in ("loss.png", "mine.png"):
        (tmp_path / name).write_bytes(b"")
    remove_pictures(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    """`onnx/` or `trackio/` in the working directory, which their own runs make, was taken for the package."""
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("no_such_package")
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
    assert is_installed("made_by_hand"), "find_spec raises ValueError"


def test_a_name_with_timm_in_it_does_not_need_timm(without, tmp_path):
    """The name of the folder stands in every message about it."""
    (tmp_path / "my_timm").mkdir()
    (tmp_path / "my_timm" / "config.json").write_text("{")
    without("timm")
    with pytest.raises(ValueError, match="my_timm: no config.json of a known network"):
        load_backbone(str(tmp_path / "my_timm"), argument="student")


def test_the_quickstart(without, capsys):
    without("sklearn")
    with pytest.raises(SystemExit) as stop:
        load_recipe("quickstart").bundled_digits()
    assert stop.value.code == 2 and "pip install 'coss-hf[quickstart]'" in capsys.readouterr().err
