import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from coss_hf.study import trials as cells
from coss_hf.study.sweep import Sweep, show_gpu, visible_gpus
from coss_hf.study.timing import images_within
from coss_hf.study.trials import Cell, Setting, prepare, run_cell
from coss_hf.trainer.arguments import DataArguments, ModelArguments

CELL = Cell("pair", "coss", "coss(beta=50)", 1, 1, 48, "test")


@pytest.fixture
def setting(image_parquet, networks):
    data = DataArguments(dataset=str(image_parquet), validation_size=12)
    training = {"use_cpu": True, "per_device_train_batch_size": 8, "augmentation": "cifar", "learning_rate": 0.01}
    models = {"pair": ModelArguments(teacher=networks.teacher, student=networks.resnet, student_init="random")}
    return Setting(data, models, training | {"logging_steps": 2}, milestones=(0.5,))


def test_finished_cells_are_kept_and_never_run_again(tmp_path, setting):
    failing = replace(CELL, method="diverges", expression="coss(beta=1e30)", num_images=40)
    cells = [CELL, CELL, failing, replace(CELL, method="random", expression="", num_images=0)]
    rows = Sweep(tmp_path / "study", "first", setting, 2, {"command": "c"}).run(cells)
    assert rows.pop(0) == rows[0], "one and the same cell"
    assert rows[0]["images_seen"] == 48 and 0 <= rows[0]["linear"] <= 1 and rows[0]["extra_teacher_images"] == 0
    assert "The loss is" in rows[1]["failed"] and "linear" not in rows[1]
    assert rows[2]["images_seen"] == 0 and rows[2]["knn10"] is not None
    lines = (tmp_path / "study" / "first.jsonl").read_text().splitlines()
    expected = [{"command": "c"} | {key: value for key, value in row.items() if key != "loss"} for row in rows]
    assert [json.loads(line) for line in lines] == expected
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "cells").glob("*.json")}
    assert len(files) == 3 and not [path for path in (tmp_path / "study" / "cells").iterdir() if path.is_dir()]
    # Another study of the same runs under other names, in another order.
    again = Sweep(tmp_path / "study", "second", setting, 1, {}).run([replace(CELL, method="other"), failing])
    assert again == [rows[0] | {"method": "other"}, rows[1]]
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "cells").glob("*.json")}


def test_cells_of_an_earlier_version_are_read_by_the_names_of_today(tmp_path, setting):
    sweep = Sweep(tmp_path / "study", "first", setting, 1, {})
    row = {"images_seen": 48, "loss": 0.5, "eval_linear": 0.25, "eval_knn10": None}
    (sweep.cells / f"{setting.key(CELL)}.json").write_text(json.dumps(row))
    (found,) = sweep.run([CELL])
    assert found == {"images_seen": 48, "loss": 0.5, "linear": 0.25, "knn10": None} | asdict(CELL)


def test_a_cell_that_was_stopped_ends_as_an_unbroken_one(tmp_path, setting):
    setting = replace(setting, training=setting.training | {"save_strategy": "steps", "save_steps": 3})
    whole = run_cell(CELL, setting, tmp_path / "whole")
    steps = iter(range(1, 99))

    def stop_in_step_five(images: int) -> None:
        if next(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(CELL, setting, tmp_path / "stopped", stop_in_step_five)
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = run_cell(CELL, setting, tmp_path / "stopped")
    assert resumed.pop("loss") is not None and whole.pop("loss") is not None
    assert resumed == whole


def test_controls_of_a_student_with_weights_of_its_own(tmp_path, setting):
    """Random weights are random, one draw a seed; the initial ones are the checkpoint's."""
    own = replace(setting.models["pair"], student_init="pretrained")
    untrained = replace(CELL, expression="", num_images=0)
    rows, draws = {}, (("initial", 5), ("random", 5), ("random", 6))
    for name, models in (("own", own), ("none", setting.models["pair"])):
        setting = replace(setting, models={"pair": models})
        for method, seed in draws:
            found = run_cell(replace(untrained, method=method, seed=seed), setting, tmp_path)
            rows[name, method, seed] = found["cosine"]
    assert len({rows["own", method, seed] for method, seed in draws}) == 3
    # Without weights of its own a student starts from the very weights that the control has.
    assert rows["none", "initial", 5] == rows["none", "random", 5] != rows["own", "initial", 5]


def test_one_sweep_at_a_time(tmp_path, setting):
    first = Sweep(tmp_path, "a", setting, 1, {})
    with pytest.raises(ValueError, match="--output_dir=.* another sweep"):
        Sweep(tmp_path, "b", setting, 1, {})
    del first


def test_cells_side_by_side_take_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    gpus, shown = visible_gpus(), []
    for turn in range(3):
        show_gpu(gpus, turn)
        shown.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert shown == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert visible_gpus() == ["GPU-a", "GPU-b"]
    show_gpu([], 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


def test_a_method_that_cannot_run_is_found_first(tmp_path, setting):
    with pytest.raises(ValueError, match="--method kd"):
        Sweep(tmp_path, "a", setting, 1, {}).check([CELL, replace(CELL, method="kd", expression="kd")])


def test_a_key_is_of_all_that_a_result_depends_on(setting):
    changed = [replace(CELL, **change) for change in ({"seed": 2}, {"num_images": 56}, {"split": "validation"})]
    keys = {setting.key(cell) for cell in [CELL, *changed]} | {replace(setting, bank_size=5).key(CELL)}
    assert len(keys) == 5 and setting.key(replace(CELL, method="other")) in keys


def test_other_weights_or_images_are_other_cells(tmp_path, setting):
    first = setting.identified()
    assert first.key(CELL) == setting.identified().key(CELL) != setting.key(CELL)
    operation = setting.training | {"save_steps": 7, "dataloader_num_workers": 2}
    assert replace(first, training=operation).key(CELL) == first.key(CELL)
    own = {"pair": replace(setting.models["pair"], student_init="pretrained")}
    assert replace(setting, models=own).identified().identity != first.identity
    other_images = replace(setting, data=replace(setting.data, max_train_samples=30)).identified()
    assert other_images.identity != first.identity
    path = Path(setting.models["pair"].teacher, "model.safetensors")
    weights, before = load_file(path), path.read_bytes()
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path, {"format": "pt"})
    cells._load.cache_clear()
    try:
        assert setting.identified().key(CELL) != first.key(CELL)
    finally:
        path.write_bytes(before)
        cells._load.cache_clear()


def test_the_rate_falls_at_shares_of_the_run(tmp_path, setting):
    trainer = prepare(replace(CELL, num_images=160), setting, tmp_path / "run", [])
    rates = []
    trainer.create_optimizer_and_scheduler(20)
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.01] * 10 + [0.001] * 10)


def test_neighbours_come_from_the_training_images(tmp_path, setting):
    setting = replace(setting, data=replace(setting.data, neighbors_cache=str(tmp_path / "cache")))
    training = setting.training | {"neighbors_pool": 4}
    trainer = prepare(replace(CELL, neighbors_k=3), replace(setting, training=training), tmp_path / "run", [])
    assert trainer.args.images_per_step == 32 and len(trainer.train_dataset) == 36


def test_the_length_of_a_comparison_fits_its_hours(setting):
    others = [replace(CELL, method="random", num_images=0)]
    images = images_within(600, [CELL, replace(CELL, seed=2)], others, replace(setting, milestones=()))
    assert images > 1000
    with pytest.raises(ValueError, match="--hours=.* too short .* give .* at least"):
        images_within(0.01, [CELL], others, replace(setting, milestones=()))
