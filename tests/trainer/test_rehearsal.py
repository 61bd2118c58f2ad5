"""Arguments that cannot work, named in one paragraph before images and neighbours are worked on."""

import copy

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import tests.helpers.runs as h
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.inputs import build_evaluator
from coss_hf.trainer.publishing import HubPublisher
from coss_hf.trainer.rehearsal import noise_views, rehearse
from coss_hf.trainer.supervised import TeacherArguments, build_supervised_run
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5}}


def arguments(tmp_path, **options) -> DistillationArguments:
    return DistillationArguments(**{"output_dir": str(tmp_path / "out"), "use_cpu": True, **options})


# Each ended in a traceback after the images were checked and the neighbours found, or did nothing.
REFUSED_AT_ONCE = {
    "labels": ({"label_names": ["labels"]}, "^label_names=labels: distillation reads no labels"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "^label_smoothing_factor=0.1: distillation reads no labels"),
    "half precision on a CPU": ({"fp16": True}, "^fp16: a CPU has no half precision.*bf16"),
    "half precision in evaluation": ({"bf16_full_eval": True}, "^bf16_full_eval=True: .*student_dtype"),
    "a folder of each machine": ({"save_on_each_node": True}, "^save_on_each_node=True: a run has one output_dir"),
    "another batch size": ({"auto_find_batch_size": True}, "^auto_find_batch_size=True: the loss depends"),
    "lengths": ({"train_sampling_strategy": "group_by_length"}, "^train_sampling_strategy=group_by_length: views"),
    "unknown optimizer": ({"optim": "adamm"}, "^optim=adamm: .*adamw_torch"),
    "unknown schedule": ({"lr_scheduler_type": "cosin"}, "^lr_scheduler_type=cosin: .*cosine"),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "^deepspeed={.*: Trainer does not take this"),
    "accelerate's options": ({"accelerator_config": {"foo": 1}}, "^accelerator_config={'foo': 1} .*'foo'"),
    "no batch": ({"per_device_train_batch_size": 0}, "^per_device_train_batch_size=0: give 1 or more"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "^gradient_accumulation_steps=0: give 1 or more"),
    "negative seed": ({"seed": -1}, "^seed=-1: give a number from 0 to"),
    "negative decay": ({"weight_decay": -1.0}, "^weight_decay=-1.0: give 0 or more"),
    "no epochs": ({"num_train_epochs": -1}, "^num_train_epochs=-1: give more than 0"),
    "no steps": ({"max_steps": 0}, "^max_steps=0: give 1 or more"),
    "warm-up of a plateau": (PLATEAU | {"warmup_steps": 5}, "^warmup_steps=5: lr_scheduler_type=reduce_lr_on_plat"),
    "wrong mode": (
        {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"mode": "min"}},
        "^lr_scheduler_kwargs mode=min: metric_for_best_model=overlap10 needs mode=max",
    ),
}


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_refused_when_arguments_are_read(tmp_path, case):
    options, message = REFUSED_AT_ONCE[case]
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


REFUSED_BY_TRIAL = {
    "workers": (
        {"settings": "paper", "dataloader_persistent_workers": True},
        "^dataloader_persistent_workers=True: the data loader",
    ),
    "tracker not installed": ({"report_to": ["dvclive"]}, "^report_to=dvclive.*dvclive"),
    "unknown tracker": ({"report_to": ["wandbb"]}, "^report_to=wandbb: Trainer cannot be set up"),
    "optimizer not installed": ({"optim": "adamw_bnb_8bit"}, "^optim=adamw_bnb_8bit: the optimizer.*bitsandbytes"),
    "lomo": ({"optim": "lomo"}, "^optim=lomo: the optimizer.*lomo"),
    "options of an optimizer": ({"optim_args": "eps"}, "^optim_args=eps: the optimizer cannot be built"),
    "moments": ({"optim": "adamw_torch", "adam_beta1": 2.0}, "^adam_beta1=2.0: the optimizer"),
    "schedule's options": ({"lr_scheduler_kwargs": {"foo": 1}}, "^lr_scheduler_kwargs={'foo': 1}: the schedule"),
    "schedule without options": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "^lr_scheduler_type=cosine_with_min_lr: the schedule .*min_lr",
    ),
    "compiler": ({"torch_compile_backend": "foo"}, "^torch_compile_backend=foo: "),
    "no token": ({"push_to_hub": True}, "there is no token"),
    "checkpointing's options": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}},
        "^gradient_checkpointing=True gradient_checkpointing_kwargs={'foo': 1} .*two images of noise fails",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_TRIAL)
def test_refused_by_a_step_on_noise(tmp_path, networks, case, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    options, message = REFUSED_BY_TRIAL[case]
    student = load_backbone(networks.vit)
    with pytest.raises(ValueError, match=message):
        rehearse(student, load_backbone(networks.teacher).freeze(), arguments(tmp_path, **options))
    assert "Traceback" not in capsys.readouterr().err


def test_a_network_without_checkpointing(tmp_path, networks):
    args = arguments(tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: the student \(CifarResNetModel\)"):
        rehearse(load_backbone(networks.small), load_backbone(networks.teacher).freeze(), args)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "bf16": True},
        {"exact_accumulation": True, "gradient_accumulation_steps": 4},
        {"optim": "adafactor", "dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"channels_last": True, "lr_milestones": [1.0], "neighbors_k": 3, "report_to": ["tensorboard"]},
    ],
)
def test_a_rehearsal_leaves_nothing_behind(tmp_path, networks, options):
    student = load_backbone(networks.vit)
    teacher = load_backbone(networks.teacher).freeze()
    before = [copy.deepcopy(network.model.state_dict()) for network in (student, teacher)]
    config = student.model.config.to_dict()
    rehearse(student, teacher, arguments(tmp_path, **options))
    for network, weights in zip((student, teacher), before):
        h.assert_same(network.model.state_dict(), weights)
        assert not network.model._forward_pre_hooks and network.maps == 0
    assert student.model.config.to_dict() == config and not student.model.is_gradient_checkpointing
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_rehearsal_leaves_checkpoints_as_they_are(tmp_path, networks, monkeypatch, dry_run):
    """It deleted all but the newest at its end: the best student, and the checkpoint that the run was to resume."""
    monkeypatch.setattr(HubPublisher, "open_repo", lambda publisher, *args: "me/x")
    checkpoints = [tmp_path / "out" / f"checkpoint-{step}" for step in (100, 200, 300)]
    for folder in checkpoints:
        folder.mkdir(parents=True)
    options = {"push_to_hub": True, "hub_token": "t", "save_total_limit": 1, "resume_from_checkpoint": "auto"}
    args = arguments(tmp_path, dry_run=dry_run, **options)
    rehearse(load_backbone(networks.small), load_backbone(networks.teacher).freeze(), args)
    assert all(folder.is_dir() for folder in checkpoints) and args.save_total_limit == 1


def test_arguments_are_tried_before_the_images(tmp_path, networks, monkeypatch):
    def load(*args, **options):
        raise AssertionError("images were worked on")

    monkeypatch.setattr("coss_hf.trainer.arguments.load_images", load)
    models = ModelArguments(teacher=networks.teacher, student=networks.small)
    with pytest.raises(ValueError, match="^--optim=lomo"):
        build_run(models, DataArguments(dataset="somewhere"), arguments(tmp_path, optim="lomo"))


def test_supervised_training_is_tried_too(tmp_path, image_parquet):
    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "model": "resnet20", "image_size": 16}
    data = DataArguments(dataset=str(image_parquet))
    with pytest.raises(ValueError, match="^--optim=lomo: the optimizer"):
        build_supervised_run(data, TeacherArguments(**args, per_device_train_batch_size=16, optim="lomo"))
    with pytest.raises(ValueError, match="^--report_to=dvclive"):
        build_supervised_run(data, TeacherArguments(**args, per_device_train_batch_size=16, report_to="dvclive"))


# ---- schedules and choices by a metric ----


def trainer_with_evaluations(tmp_path, images, networks, **options):
    def evaluator(splits, teacher):
        args = arguments(tmp_path, **options)
        return build_evaluator(splits, teacher, args, splits.test, during_training=True)

    return h.make_trainer(tmp_path, images, networks.teacher, networks.small, evaluator=evaluator, **options)


@pytest.mark.parametrize(
    ("metric", "mode"), [("overlap10", "max"), ("eval_cosine", "max"), ("loss", "min"), ("duplicates", "min")]
)
def test_metric_for_best_model_has_the_right_direction(tmp_path, metric, mode):
    args = arguments(tmp_path, metric_for_best_model=metric, **PLATEAU)
    assert args.greater_is_better == (mode == "max") and args.lr_scheduler_kwargs["mode"] == mode


def test_a_rate_that_falls_when_the_metric_does_not_rise(tmp_path, image_parquet, networks, monkeypatch):
    """With mode "min", as Trainer builds it, the rate fell where the overlap rose and stayed where it fell."""
    options = {"eval_strategy": "steps", "eval_steps": 1, **PLATEAU}
    trainer = trainer_with_evaluations(tmp_path, image_parquet, networks, **options)
    # Six evaluations after that before the first step; of the last three none is better.
    values = iter([0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda **options: evaluate(**options) | {"eval_overlap10": next(values)})
    rates = []
    step = ReduceLROnPlateau.step
    monkeypatch.setattr(
        ReduceLROnPlateau,
        "step",
        lambda self, *args: (step(self, *args), rates.append(self.optimizer.param_groups[0]["lr"])),
    )
    trainer.train()
    assert rates == [0.01, 0.01, 0.01, 0.01, 0.005, 0.005]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "waits for 10 evaluations without progress, and the run has 6"),
        ({**PLATEAU, "eval_steps": 6}, "^--lr_scheduler_type=reduce_lr_on_plateau would never .* the run has 1;"),
        ({"metric_for_best_model": "overlp10"}, "^--metric_for_best_model=overlp10 is not measured.*overlap10.*knn10"),
    ],
)
def test_plateau_schedule_with_too_few_evaluations_is_rejected(tmp_path, image_parquet, networks, options, message):
    options = {"eval_strategy": "steps", "eval_steps": 1, **options}
    with pytest.raises(ValueError, match=message):
        trainer_with_evaluations(tmp_path, image_parquet, networks, **options)


@pytest.mark.parametrize("options", [PLATEAU, {"save_strategy": "best"}])
def test_options_that_need_evaluations_are_rejected_without_them(tmp_path, image_parquet, networks, options):
    with pytest.raises(ValueError, match="needs evaluations during training, and there are none.*validation_size"):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)


def test_metrics_that_are_named_are_measured(tmp_path, image_parquet, networks):
    trainer = trainer_with_evaluations(tmp_path, image_parquet, networks, eval_strategy="steps", eval_steps=6)
    with torch.no_grad():
        measured, _ = trainer.evaluator(trainer.student, trainer.project)
    defined = {name for name, value in measured.items() if value is not None}
    assert set(trainer.evaluator.metric_names()) == defined - {"teacher_effective_rank", "teacher_duplicates"}


def test_neighbours_that_views_draw_are_counted(tmp_path, networks):
    """A dataset of views draws what it was made with, also where the arguments say nothing of neighbours."""
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=1)
    views = noise_views(arguments(tmp_path, per_device_train_batch_size=16), "cifar", 16)
    views.use_neighbors((np.arange(16)[:, None] + np.arange(1, 4)) % 16, 3)
    teacher, student = load_backbone(networks.teacher).freeze(), load_backbone(networks.small)
    trainer = DistillationTrainer(teacher, student, args, views)
    assert trainer.args.images_per_step == 32 and trainer.args.neighbors_k == 3 and args.neighbors_k == 0
    assert trainer.args.eval_steps == round(50_000 / 32) and trainer.length.images_after(2) == 64
