"""Trials of a study see the same views, and the teacher embeds each of them once for all."""

from dataclasses import replace

import pytest

from coss_hf.study.comparison import plan_comparison
from coss_hf.study.tables import comparison, what_was_shared
from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer, run_trial, shared_views
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments

TRIAL = Trial("pair", "coss", "coss", 1, 1, 96, "test")


@pytest.fixture
def config(image_parquet, networks, tmp_path):
    """48 images: 2 epochs of 6 steps a trial."""
    data = DataArguments(dataset=str(image_parquet), validation_size=0)
    training = {
        "settings": "paper",
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "augmentation": "cifar",
        "learning_rate": 0.01,
        "logging_steps": 4,
    }
    models = {"pair": ModelArguments(teacher=networks.teacher, student=networks.resnet, student_init="random")}
    return StudyConfig(data, models, training | shared_views(2, 0, None, tmp_path))


def test_methods_scales_and_seeds_share_embeddings_and_views(config, tmp_path, monkeypatch):
    import coss_hf.trainer.trainer as module

    monkeypatch.setattr("coss_hf.study.trials.measure", lambda *args: {"linear": 0.5})
    embedded = []
    real = module.DistillationTrainer._teacher_features
    monkeypatch.setattr(
        module.DistillationTrainer, "_teacher_features", lambda self, x: embedded.append(len(x)) or real(self, x)
    )
    trials = [
        TRIAL,
        replace(TRIAL, seed=2),
        replace(TRIAL, expression="coss(beta=10)", scale=0.2),
        replace(TRIAL, method="pkt", expression="pkt"),
        replace(TRIAL, method="srrl", expression="srrl"),
    ]
    passes, rows = [], []
    for trial in trials:
        embedded.clear()
        rows.append(run_trial(trial, config, tmp_path / "trial"))
        passes.append(sum(embedded))
    assert passes == [96, 0, 0, 0, 96] == [row["teacher_images"] for row in rows]
    assert [row["shared_views"]["teacher_cache"] for row in rows] == [True] * 4 + [False]
    (text,) = what_was_shared(rows)
    assert "after 2 epochs and are the same in every run (view seed 0)" in text
    assert "The runs of coss and pkt shared the teacher's embeddings" in text
    assert "embedded the views again in the runs of srrl." in text
    assert text in comparison(rows, "linear")
    assert what_was_shared([{"method": "coss"}]) == []


def test_a_cache_changes_no_result_and_no_name_of_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr("coss_hf.study.trials.measure", lambda *args: {})
    without = replace(config, training=config.training | {"teacher_cache": None})
    elsewhere = replace(config, training=config.training | {"teacher_cache": "elsewhere"})
    assert config.key(TRIAL) == without.key(TRIAL) == elsewhere.key(TRIAL)
    cached, live = (run_trial(TRIAL, one, tmp_path / "trial") for one in (config, without))
    assert cached.pop("shared_views")["teacher_cache"] and not live.pop("shared_views")["teacher_cache"]
    assert cached["loss"] == pytest.approx(live["loss"], rel=1e-5) and cached["images_seen"] == 96


def test_a_comparison_shares_by_default_where_views_come_back(image_parquet, networks, tmp_path):
    """Nothing else in its command changes; without --view_epochs nothing is shared."""
    models = ModelArguments(teacher=networks.teacher, student=networks.resnet)
    data = DataArguments(dataset=str(image_parquet), validation_size=12)

    def plan(**options):
        training = DistillationArguments(
            str(tmp_path / "out"),
            num_images=64,
            settings="paper",
            per_device_train_batch_size=8,
            use_cpu=True,
            **options,
        )
        methods = ["at", "rkd"]
        return plan_comparison("c", models, data, training, seeds=3, hours=None, jobs=1, methods=methods)

    assert not {"view_seed", "teacher_cache"} & plan().config.training.keys()
    config = plan(view_epochs=3).config
    assert config.training["view_seed"] == 42 and config.training["view_epochs"] == 3
    trials = {trial.method: trial for trial in plan(view_epochs=3).trials}
    assert not (tmp_path / "out" / "teacher_cache").exists(), "what was checked leaves nothing behind"
    caches = {
        name: build_trial_trainer(trials[name], config, tmp_path / "t").args.teacher_cache for name in ("at", "rkd")
    }
    assert caches == {"at": None, "rkd": str(tmp_path / "out" / "teacher_cache")}
    with pytest.raises(ValueError, match="teacher_cache=x needs views that come back"):
        plan(teacher_cache="x")


def test_a_study_prints_no_lines_of_its_trials(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("coss_hf.study.trials.measure", lambda *args: {})
    run_trial(replace(TRIAL, num_images=16), config, tmp_path / "trial")
    assert "step 1/" not in capsys.readouterr().out
