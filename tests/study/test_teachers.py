"""Teachers that a study trains first."""

import json
import shutil

import pytest

from coss_hf.study import teachers
from coss_hf.trainer.arguments import DataArguments

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
