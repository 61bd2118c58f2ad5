"""Teachers that a study trains first."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModel

from coss_hf.models.cifar.registry import CIFAR_NETWORKS, cifar_config
from coss_hf.study import reproduction, teachers
from coss_hf.study.reproduction import ReproduceArguments
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.utils.messages import command_line

OPTIONS = {
    "per_device_train_batch_size": 16,
    "bf16": False,
    "use_cpu": True,
    "save_steps": 1,
    "torch_compile_mode": None,
}


@pytest.fixture
def data(image_parquet):
    return DataArguments(dataset=str(image_parquet), validation_size=12)


def test_a_teacher_is_kept_where_nothing_changed_that_decides_its_weights(tmp_path, data, monkeypatch):
    folder = tmp_path / "resnet20"
    folder.mkdir()
    (folder / teachers.TRAINED_WITH).write_text(json.dumps(teachers._trained_with(data, 1, OPTIONS)))
    monkeypatch.chdir(Path(data.dataset).parent)
    operation = {"preprocessing_num_workers": 3, "neighbors_cache": "c", "neighbors_recall": 0.9}
    teachers.check([folder], replace(data, dataset=f"./{Path(data.dataset).name}", **operation), 1, OPTIONS)
    with pytest.raises(ValueError, match="was trained with dataset .*, not elsewhere; give"):
        teachers.check([folder], replace(data, dataset="elsewhere"), 1, OPTIONS)
    (folder / "run.json").write_text("{}")  # of test images of which some have no label
    assert teachers.describe(folder) == "Its teacher was trained first, for 1 epochs."


@pytest.mark.slow
def test_incomplete_teacher_checkpoint_is_skipped_and_other_options_are_rejected(tmp_path, data):
    folder = tmp_path / "resnet20"
    half = folder / "checkpoint-1"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    teachers.train([folder], data, 1, OPTIONS)
    assert (folder / "run.json").exists() and not list(folder.glob("checkpoint-*"))
    record = json.loads((folder / "run.json").read_text())
    assert "--lr_milestones 0.625 0.75 0.875" in record["command"]
    assert f"trained first, for 1 epochs: {100 * record['accuracy']:.1f} % of test" in teachers.describe(folder)
    before = (folder / "run.json").stat().st_mtime_ns
    teachers.train([folder], data, 1, OPTIONS)
    assert before == (folder / "run.json").stat().st_mtime_ns
    teachers.check([folder], data, 1, OPTIONS | {"save_steps": 5, "use_cpu": False})
    with pytest.raises(
        ValueError, match="--output_dir: its teacher .* trained with num_train_epochs 1, not 4, lr_miles"
    ):
        teachers.check([folder], data, 4, OPTIONS)
    shutil.rmtree(folder)
    teachers.check([folder], data, 4, OPTIONS)


@pytest.mark.parametrize("name", sorted(CIFAR_NETWORKS))
def test_a_network_is_known_by_its_configuration(name, networks):
    """A table took any folder as the teacher that its pair names."""
    model = SimpleNamespace(config=cifar_config(name, image_size=64, num_labels=7))
    assert teachers.name_of_another(name, model) == ""
    other = "vgg8" if name != "vgg8" else "resnet20"
    assert teachers.name_of_another(other, model) == name
    foreign = AutoModel.from_pretrained(networks.teacher)
    assert teachers.name_of_another(name, foreign) == type(foreign).__name__


@pytest.mark.parametrize(("held", "named"), [("resnet20", "resnet20"), ("resnet56", "")])
def test_another_teacher_than_that_of_the_pair_is_named(tmp_path, caplog, held, named):
    folder = teachers.save_untrained(held, tmp_path / held)
    args = ReproduceArguments(pairs=["resnet20/resnet56"], teacher=folder)
    network = ModelArguments(teacher=folder).load_teacher().model
    with command_line():
        assert reproduction._other_teacher(args, network) == named
    warning = f"--teacher={folder} holds a network resnet20, and --pairs=resnet20/resnet56 has the teacher resnet56"
    assert (warning in caplog.text) == bool(named)
    assert reproduction._other_teacher(ReproduceArguments(), network) == ""
