"""What a comparison's arguments leave out is filled once for all trials, and stays as the study goes on."""

import dataclasses
import json

import pytest
import torch

from coss_hf.study import comparison as module
from coss_hf.study.baselines import changed_arguments
from coss_hf.study.comparison import fill_for_trials, keep_filled
from coss_hf.trainer import default_settings as table
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments


def training(folder, **options) -> DistillationArguments:
    usual = {"per_device_train_batch_size": 8, "num_images": 64, "use_cpu": True}
    return DistillationArguments(str(folder), **{**usual, **options})


def test_a_study_goes_on_with_what_it_began_with(image_parquet, networks, tmp_path, monkeypatch):
    """On another machine, or after an update, all finished trials counted as others."""
    models = ModelArguments(teacher=networks.teacher, student=networks.vit)
    data = DataArguments(dataset=str(image_parquet), validation_size=12)
    seen = []
    fill = module.fill
    monkeypatch.setattr(module, "fill", lambda args, found, kept: seen.append(found) or fill(args, found, kept))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def fill_and_keep(**options):
        given = training(tmp_path, **options)
        filled, settings = fill_for_trials(given, models, data, 2)
        keep_filled(given, filled, settings)
        return filled, settings

    first, settings = fill_and_keep()
    assert seen[0].threads == 4, "each of two trials has half of the threads"
    assert first.optim == "adamw_torch" and settings.filled["optim"].reason != "as in the run that is resumed"
    monkeypatch.setattr(table, "starting_values", lambda family, parameters: table.SGD)
    again, settings = fill_and_keep()
    assert changed_arguments(again) == changed_arguments(first) and settings.mode == "auto"
    logged, _ = fill_and_keep(logging_steps=7)
    assert logged.optim == "adamw_torch", "what changes no result fills nothing anew"
    other, _ = fill_and_keep(max_grad_norm=2.0)
    assert other.optim == "sgd", "other trials, filled by the rules of today"
    assert len(json.loads((tmp_path / "settings.json").read_text())) == 2


def test_each_student_of_a_folder_is_filled_by_its_own_size(image_parquet, networks, tmp_path, monkeypatch):
    """The second one took what the first had, as if its run was resumed."""
    data = DataArguments(dataset=str(image_parquet), validation_size=12)
    given = training(tmp_path)

    models = ModelArguments(teacher=networks.teacher, student=networks.resnet)

    def fill_and_keep() -> str:
        filled, settings = fill_for_trials(given, models, data, 1)
        keep_filled(given, filled, settings)
        return filled.optim

    assert fill_and_keep() == "sgd"
    monkeypatch.setattr(table, "SMALL", 1)  # the same family counts as large
    assert fill_and_keep() == "sgd", "the same student, kept"
    find = module.find_situation
    monkeypatch.setattr(module, "find_situation", lambda *a, **k: dataclasses.replace(find(*a, **k), parameters=10**7))
    assert fill_and_keep() == "adamw_torch"
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert len(kept) == 2


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.03}])
def test_the_papers_settings_keep_the_names_of_earlier_results(tmp_path, options):
    """Their values are no changes: they were the defaults."""
    found = changed_arguments(training(tmp_path, settings="paper", **options))
    others = {"per_device_train_batch_size": 8, "eval_steps": 6250, "use_cpu": True}
    assert found == {"settings": "paper"} | others | options
    assert "settings" not in changed_arguments(training(tmp_path))
