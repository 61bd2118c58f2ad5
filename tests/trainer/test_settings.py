"""What is left out is filled by student, images and machine; what is given stands; a resumed run keeps its own."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from transformers import ConvNextConfig, ConvNextModel, HfArgumentParser

import tests.helpers.runs as h
from coss_hf import DistillationArguments, DistillationTrainer
from coss_hf.cli import parse
from coss_hf.models.architecture import BATCH_NORM, LAYER_NORM, TRANSFORMER
from coss_hf.models.loading import load_backbone
from coss_hf.trainer import default_settings as table
from coss_hf.trainer import settings as module
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.dry_run import describe
from coss_hf.trainer.engine import use_precision
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.settings import Situation, fill, recorded_settings, values_to_record
from coss_hf.trainer.supervised import TeacherArguments
from coss_hf.utils import shared_memory
from coss_hf.utils.shared_memory import needed

EVERYTHING = (ModelArguments, DataArguments, DistillationArguments)


SMALL = {"family": BATCH_NORM, "parameters": 1_500_000}


def arguments(**options) -> DistillationArguments:
    return DistillationArguments(**{"output_dir": "out", "use_cpu": True, **options})


def situation(family: str = TRANSFORMER, **options) -> Situation:
    usual = {"parameters": 11_000_000, "trained": False, "size": 224, "images": 50_000, "views": 64}
    return Situation(family, **{**usual, **options})


def filled(args: DistillationArguments, **options) -> DistillationArguments:
    return fill(args, situation(**options))[0]


def values(args: DistillationArguments, *names: str) -> tuple:
    return tuple(getattr(getattr(args, name), "value", getattr(args, name)) for name in names)


OPTIMIZER = ("optim", "learning_rate", "weight_decay", "weight_decay_on", "warmup_steps", "max_grad_norm")


# ---- by family, start and views ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"family": TRANSFORMER}, ("adamw_torch", 5e-4, 0.05, "matrices", 0.1, 1.0)),
        ({"family": TRANSFORMER, "size": 32}, ("adamw_torch", 5e-4, 0.05, "matrices", 0.1, 1.0)),
        ({"family": LAYER_NORM}, ("adamw_torch", 5e-4, 0.05, "matrices", 0.1, 1.0)),
        # On photographs with 64 views a step, resnet18 and efficientnet-lite0 learnt more by AdamW than by SGD.
        ({"family": BATCH_NORM, "parameters": 3_400_000}, ("adamw_torch", 5e-4, 0.05, "matrices", 0.1, 1.0)),
        # mobilenetv3 there, and resnet20 on CIFAR-100, learnt more by SGD.
        (SMALL, ("sgd", 0.05, 5e-4, "all", 0.1, 1.0)),
        (SMALL | {"views": 128}, ("sgd", 0.071, 5e-4, "all", 0.1, 1.0)),
        # The square root of the views, within a quarter and four times.
        ({"views": 256}, ("adamw_torch", 1e-3, 0.05, "matrices", 0.1, 1.0)),
        ({"views": 128}, ("adamw_torch", 7.1e-4, 0.05, "matrices", 0.1, 1.0)),
        ({"views": 2}, ("adamw_torch", 1.3e-4, 0.05, "matrices", 0.1, 1.0)),
        ({"views": 10**6}, ("adamw_torch", 2e-3, 0.05, "matrices", 0.1, 1.0)),
        # Trained weights are not thrown away.
        ({"trained": True}, ("adamw_torch", 1e-4, 0.05, "matrices", 0.1, 1.0)),
        (SMALL | {"trained": True}, ("sgd", 0.01, 5e-4, "all", 0.1, 1.0)),
    ],
)
def test_starting_values(options, expected):
    assert values(filled(arguments(), **options), *OPTIMIZER) == expected


def test_each_filled_value_has_a_reason():
    args, settings = fill(arguments(), situation(views=256))
    assert args.left_out in ((), ("dataloader_prefetch_factor",))
    assert all(one.reason for one in settings.filled.values()) and set(settings.filled) <= set(table.PAPER)
    lines = settings.table().splitlines()
    assert lines[0].startswith(
        "settings    for transformer, 11 million parameters, random weights, views of 224 px, 50,000 images"
    )
    assert "--settings paper" in lines[0] and len(lines) == 1 + len(settings.filled)
    (rate,) = [line for line in lines if "learning_rate" in line]
    assert rate.split()[:2] == ["learning_rate", "0.001"] and "times 2 (the square root of 256 / 64)" in rate


@pytest.mark.parametrize(
    ("options", "images", "epochs"),
    [
        ({}, 50_000, 40),
        ({}, 3_000, 100),
        ({}, 1_281_167, 10),
        ({"neighbors_k": 3}, 50_000, 10),
        ({"neighbors_k": 1}, 50_000, 20),
        ({"lr_milestones": [150.0, 210.0]}, 50_000, 240),
        ({"lr_milestones": [20.0]}, 50_000, 40),
    ],
)
def test_length(options, images, epochs):
    assert filled(arguments(**options), images=images).num_train_epochs == epochs


@pytest.mark.parametrize("given", [{"max_steps": 100}, {"num_images": 9_000}, {"num_train_epochs": 3.0}])
def test_a_length_that_was_given_stands(given):
    args, settings = fill(arguments(**given), situation())
    assert "num_train_epochs" not in settings.filled
    assert {name: getattr(args, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({"num_train_epochs": 20}, 0.1),
        ({"num_train_epochs": 400}, 0.025),
        ({"num_images": 50_000 * 200}, 0.05),
        ({"max_steps": 50_000 * 200 // 64}, 0.05),
        ({"lr_scheduler_type": "constant"}, 0),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, 0),
        ({"lr_milestones": [1.0]}, 0.1),
    ],
)
def test_warmup_is_a_share_of_the_run_and_ten_epochs_at_most(given, warmup):
    assert filled(arguments(**given)).warmup_steps == pytest.approx(warmup, abs=1e-3)


# ---- what was given stands ----

# Each at the value that would stand without it, by one rule or another.
GIVEN = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "weight_decay_on": "all",
    "warmup_steps": 0.0,
    "max_grad_norm": 0.0,
    "num_train_epochs": 3.0,
    "bf16": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("way", ["python", "command line", "yaml", "another parser", "assigned", "replaced"])
def test_what_was_given_stands_whatever_its_value(tmp_path, name, way):
    """Also where it is a value of the paper, on every way in."""
    value = GIVEN[name]
    words = ["--output_dir=out", "--use_cpu"]
    if way == "python":
        args = arguments(**{name: value})
    elif way == "command line":
        args = parse(EVERYTHING, [*words, f"--{name}={str(value).lower()}"])[2]
    elif way == "yaml":
        (tmp_path / "run.yaml").write_text(f"{name}: {str(value).lower()}\n")
        args = parse(EVERYTHING, [*words, "--config", str(tmp_path / "run.yaml")])[2]
    elif way == "another parser":
        parser = HfArgumentParser(DistillationArguments)
        (args,) = parser.parse_args_into_dataclasses([*words, f"--{name}={str(value).lower()}"])
    elif way == "assigned":
        args = arguments()
        setattr(args, name, value)
    else:
        args = dataclasses.replace(arguments(), **{name: value})
    found, settings = fill(args, situation(bf16=True, cores=8, device="cuda"))
    assert values(found, name) == (value,) and name not in settings.filled
    assert {*GIVEN} - {*settings.filled} <= {name, "dataloader_persistent_workers"}
    assert getattr(args, name) == value and not settings.shown


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"seed": 5}),
        ({}, {"per_device_train_batch_size": 16}),
        ({}, {"save_steps": 10}),
        ({}, {"metric_for_best_model": "loss"}),
        ({}, {"settings": "paper"}),
        ({"eval_steps": 7, "learning_rate": 0.05}, {"seed": 5}),
        ({"settings": "paper"}, {"settings": "auto"}),
        ({"settings": "paper"}, {"seed": 5}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "cosine"}),
    ],
)
def test_replaced_arguments_are_as_if_made_with_them(first, then):
    """What the first ones derived counted as given in the others."""
    made = dataclasses.replace(dataclasses.replace(arguments(**first), data_seed=1), **then)
    expected = arguments(**first | {"data_seed": 1} | then)
    assert made == expected and made.given == expected.given and made.left_out == expected.left_out
    assert made.evaluates_by_default == expected.evaluates_by_default


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"per_device_train_batch_size": 500}, {"per_device_train_batch_size": 64, "eval_steps": 100}),
        (
            {"settings": "paper"},
            {"settings": "auto", "dataloader_num_workers": 0, "warmup_steps": 0, "learning_rate": 0.05}
            | {"max_grad_norm": 0.0, "weight_decay": 5e-4, "weight_decay_on": "all"},
        ),
        ({}, {"settings": "paper", "bf16": False}),
    ],
)
def test_values_that_equal_derived_ones_count_as_given(first, then):
    """Python shares small numbers and short texts, by which a given value was taken for the derived one."""
    before = arguments(**first)
    made = dataclasses.replace(before, **then)
    assert {name: getattr(made, name) for name in then} == then
    again = dataclasses.replace(made, seed=7)
    assert {name: getattr(again, name) for name in then} == then
    json.dumps(before.to_dict())


def test_replaced_arguments_of_a_teachers_training():
    made = dataclasses.replace(TeacherArguments(use_cpu=True), save_steps=10)
    assert made.save_strategy == "steps"


def test_numbers_of_numpy_are_numbers():
    """They failed on the comparison with a list."""
    given = {"learning_rate": np.float64(0.05), "seed": np.int64(3), "lr_milestones": np.array([1.0, 2.0])}
    made = arguments(**given)
    assert made == arguments(learning_rate=0.05, seed=3, lr_milestones=[1.0, 2.0]) and type(made.seed) is int


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("learning_rate", "5e-4", r"give a number \(in YAML with a point, such as 5.0e-04\)\.$"),
        ("max_steps", "ten", "give a number\\.$"),
        ("neighbors_k", "3", "give a number\\.$"),
        ("logging_steps", "fast", "give a number\\.$"),
    ],
)
def test_texts_are_no_numbers(name, text, remedy):
    """YAML reads 5e-4 as a text: it was kept as the learning rate, and failed later without its name."""
    with pytest.raises(ValueError, match=f"^{name}='{text}' is a text: {remedy}"):
        arguments(**{name: text})


def test_a_negative_number_of_neighbors_is_refused():
    """-1 divided by zero."""
    with pytest.raises(ValueError, match="^neighbors_k=-1: give 0 or more"):
        arguments(neighbors_k=-1)


def test_no_trackers_in_either_way():
    assert arguments(report_to=None) == arguments(report_to="none")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr_scheduler_type", "linearly", "^--lr_scheduler_type='linearly' is unknown: choose one of linear"),
        ("dataloader_drop_last", False, "^--dataloader_drop_last.*give set_dataloader drop_last=True"),
        ("method", "cos", "^--method='cos' is unknown"),
        ("seed", -1, "^--seed=-1"),
        ("neighbors_k", -1, "^--neighbors_k=-1: give 0 or more"),
        ("neighbors_k", 50, "^--neighbors_k=50 must lie between 0 and --neighbors_pool=31"),
        ("per_device_train_batch_size", 1, "^--per_device_train_batch_size=1 .* at least 2"),
        ("lr_milestones", [3, 1], "^--lr_milestones=.*must rise"),
        ("num_images", 500, "^--num_images=500 and --max_steps=9: give one"),
        ("hub_strategy", "all_checkpoints", "^--hub_strategy=all_checkpoints would publish"),
        ("hub_strategy", "never", "^--hub_strategy='never' is unknown: choose one of end, every_save"),
        ("label_smoothing_factor", 0.1, "^--label_smoothing_factor=0.1: distillation reads no labels"),
        ("sync_batch_norm", True, "^--sync_batch_norm"),
        ("accelerator_config", {"split_batches": True}, "^--accelerator_config: split_batches"),
        ("accelerator_config", {"split": True}, "^--accelerator_config=.*split"),
    ],
)
def test_what_is_assigned_is_checked_by_the_trainer(name, value, message):
    args = arguments(max_steps=9)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        args.for_training()


def test_what_may_be_given_may_be_assigned(tmp_path):
    """A dictionary had no attributes of a configuration."""
    args = arguments(num_images=2_000)
    args.accelerator_config = {"even_batches": False}
    args.hub_strategy = "every_save"
    made = args.for_training()
    assert made.accelerator_config.even_batches is False and made.hub_strategy.value == "every_save"
    resolved = made.resolved(made.run_length(1_000), has_evaluator=False, has_unused_parameters=False)
    assert resolved.max_steps > 0 and resolved.for_training().max_steps == resolved.max_steps


def test_a_schedule_may_be_assigned_by_name():
    """An error named another argument."""
    args = arguments()
    args.lr_scheduler_type = "constant"
    assert filled(args.for_training()).warmup_steps == 0


def test_bare_switches(tmp_path):
    words = ["--output_dir=out", "--use_cpu", "--bf16", "--dataloader_persistent_workers"]
    args = parse(EVERYTHING, words)[2]
    assert args.bf16 is True and args.dataloader_persistent_workers is True and args.learning_rate is None


@pytest.mark.parametrize(
    ("given", "optim", "rate"),
    [
        ({"optim": "sgd"}, "sgd", 0.05),
        ({"optim": "adafactor"}, "adafactor", 5e-4),
        ({"learning_rate": 0.03}, "sgd", 0.03),
        ({"learning_rate": 1e-3}, "adamw_torch", 1e-3),
        ({"momentum": 0.8}, "sgd", 0.05),
        ({"momentum": 0.8, "learning_rate": 1e-3}, "sgd", 1e-3),
    ],
)
def test_rate_and_optimizer_belong_together(given, optim, rate):
    """A rate of SGD in the hands of AdamW destroys a student, and one of AdamW teaches nothing by SGD."""
    args = filled(arguments(**given))
    assert values(args, "optim", "learning_rate") == (optim, rate)
    assert args.weight_decay_on == ("all" if optim == "sgd" else "matrices")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("views", "rate"), [(16, 5e-4), (32, 1e-3), (64, 1e-3), (16, 3e-3), (2048, 4e-3)])
def test_an_ordinary_rate_of_adamw_keeps_it(trained, views, rate):
    """A transformer of trained weights with 5e-4, the rate of AdamW in the table, was trained by SGD at that rate."""
    args = filled(
        arguments(learning_rate=rate), family=TRANSFORMER, parameters=22_000_000, trained=trained, views=views
    )
    assert values(args, "optim", "learning_rate") == ("adamw_torch", rate)


@pytest.mark.parametrize("family", [BATCH_NORM, LAYER_NORM, TRANSFORMER])
@pytest.mark.parametrize("parameters", [1_500_000, 11_000_000])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("views", [16, 64, 128, 2048])
@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_a_rate_near_the_filled_one_keeps_the_optimizer(family, parameters, trained, views, factor):
    """A student of trained weights with 0.005 instead of 0.01, as an alarm advises, was trained by AdamW at 0.005."""
    options = {"family": family, "parameters": parameters, "trained": trained, "views": views}
    auto = filled(arguments(), **options)
    args = filled(arguments(learning_rate=factor * auto.learning_rate), **options)
    assert values(args, "optim", "weight_decay_on") == values(auto, "optim", "weight_decay_on")


@pytest.mark.parametrize("settings", ["auto", "paper"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 0.8, "optim": "sgd"}, "adam_beta1=0.8 has no effect with optim sgd."),
        ({"lr_gamma": 0.3}, "lr_gamma=0.3 has no effect without lr_milestones."),
        ({"method": "pkt", "lambda_ss": 0.5}, 'lambda_ss=0.5 has no effect with method="pkt".'),
        ({"head": "none", "head_hidden_size": 64}, 'head_hidden_size=64 has no effect with head="none".'),
        ({"teacher_cache_dtype": "float16"}, "teacher_cache_dtype=float16 has no effect without teacher_cache."),
    ],
)
def test_options_without_effect_are_named(caplog, settings, options, message):
    """They were accepted without a word."""
    fill(arguments(settings=settings, **options), situation(**SMALL, size=32, views=128))
    assert message in caplog.text
    caplog.clear()
    fill(
        arguments(settings=settings, method="coss(beta=50) + pkt", lambda_ss=0.5),
        situation(**SMALL, size=32, views=128),
    )
    assert "no effect" not in caplog.text


def test_a_small_rate_is_one_of_adamw(caplog):
    """A MobileNet with ``--learning_rate 5e-4`` was trained by SGD at that rate, which teaches nothing."""
    args, settings = fill(arguments(learning_rate=5e-4), situation(**SMALL, size=32, views=128))
    assert values(args, "optim", "learning_rate", "weight_decay_on") == ("adamw_torch", 5e-4, "matrices")
    assert settings.filled["optim"].reason == "a learning rate of 0.0005 was given, which is one of AdamW"
    filled(arguments(momentum=0.8, optim="adamw_torch"))
    assert "momentum=0.8 has no effect with optim adamw_torch" in caplog.text


@pytest.mark.parametrize("ratio", [0.2, 0.0])
def test_warmup_by_its_former_name(monkeypatch, ratio):
    """Versions of Transformers that still have ``warmup_ratio`` copy it into ``warmup_steps``."""
    there = "warmup_ratio" in {field.name for field in dataclasses.fields(DistillationArguments)}
    if not there:
        monkeypatch.setattr(DistillationArguments, "warmup_ratio", ratio, raising=False)
    args, settings = fill(arguments(**({"warmup_ratio": ratio} if there else {})), situation())
    assert args.warmup_steps == ratio and "warmup_steps" not in settings.filled


def test_options_of_adam_choose_it():
    args = filled(arguments(adam_beta2=0.95), **SMALL, size=32)
    assert values(args, "optim", "weight_decay_on") == ("adamw_torch", "matrices") and args.learning_rate < 0.01


def test_paper_is_what_stood_before():
    args = arguments(settings="paper", warmup_steps=0.05)
    expected = {**table.PAPER, "warmup_steps": 0.05}
    assert dict(zip(expected, values(args, *expected))) == expected
    found, settings = fill(args, situation())
    assert dict(zip(expected, values(found, *expected))) == expected
    assert not settings.filled and settings.table() == "" and settings.record() == {"mode": "paper", "situation": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": "papper"}, "^settings='papper' is unknown: choose one of auto, paper"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}, "optim": "adamw_torch"},
            "^deepspeed with optim=adamw_torch: DeepSpeed is set up before the student is known",
        ),
        (
            {"settings": "paper", "optim": "adamw_torch"},
            "^settings=paper: its learning rate of 0.05 is one of SGD, and optim=adamw_torch was given; give",
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        arguments(**options)
    if "optim" in options and "settings" in options:
        assert arguments(**options, learning_rate=1e-3).learning_rate == 1e-3


def test_deepspeed_of_the_launcher_has_the_same_rules(monkeypatch):
    """AdamW was trained at 0.05, and the table said bf16 False where the launcher had asked for it."""
    args = arguments()
    args.deepspeed_plugin = object()
    args.mixed_precision = "bf16"
    found, settings = fill(args, situation())
    assert "bf16" not in settings.filled and settings.filled["learning_rate"].value == 0.05
    args.mixed_precision = "no"
    assert fill(args, situation())[1].filled["bf16"].value is False
    args.optim = "adamw_torch"
    with pytest.raises(ValueError, match="^DeepSpeed, of the launcher, with --optim=adamw_torch: .*--learning_rate"):
        fill(args, situation())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="^DeepSpeed, of the launcher, with optim=adamw_torch: .*learning_rate"):
        arguments(optim="adamw_torch")


# ---- the machine ----


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ({"device": "cpu", "cores": 2, "threads": 2}, 0),
        ({"device": "cpu", "cores": 2, "threads": 1}, 1),
        ({"device": "cpu", "cores": 16, "threads": 1}, 8),
        ({"device": "cpu", "cores": 1, "threads": 4}, 0),
        # A stream's order, and so its student, would depend on the machine.
        ({"device": "cpu", "cores": 4, "threads": 1, "images": None}, 0),
        ({"device": "cuda", "cores": 64, "images": None}, 0),
        ({"device": "cuda", "cores": 1}, 0),
        ({"device": "cuda", "cores": 6}, 5),
        ({"device": "cuda", "cores": 64}, 8),
    ],
)
def test_loader_workers(options, workers):
    """Threads that compute share no core with a worker; the order of a stream depends on the workers."""
    args = filled(arguments(max_steps=9), **options)
    assert args.dataloader_num_workers == workers
    assert bool(args.dataloader_persistent_workers) == (workers > 0)
    assert args.dataloader_prefetch_factor == (4 if workers and options["device"] == "cuda" else None)


def test_workers_as_many_as_shared_memory_has_room_for(monkeypatch):
    """Workers that were not asked for must not be the reason why a run is refused."""
    batch = 128 * 3 * 96**2 + 256 * 3 * 224**2 * 4  # views of 96 pixels, networks of 224
    found = situation(device="cuda", cores=9, size=96, pixels_to_embed=224**2, shared_memory=7 * batch)
    args, settings = fill(arguments(), found)
    assert args.dataloader_num_workers == 3 and args.dataloader_prefetch_factor is None
    assert "shared memory" in settings.filled["dataloader_num_workers"].reason
    batches = module.loader_batches(args, 96, 224**2)
    assert sum(batches.values()) == batch and needed(3, batches) == 7 * batch  # as the trainer counts
    assert module.loader_batches(args, 96, 0) == {"views": 128 * 3 * 96**2}


def test_the_trainer_accepts_the_workers_that_were_filled_in(tmp_path, image_parquet, networks, monkeypatch):
    """Views of 8 pixels, networks of 16: the images to embed were counted as small as the views."""
    memory = 256 * 3 * 16**2 * 4 * 5
    monkeypatch.setattr(module, "room", lambda: memory)
    monkeypatch.setattr(shared_memory, "room", lambda: memory)
    monkeypatch.setattr(module, "usable_cores", lambda: 9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    args = arguments(per_device_train_batch_size=2, view_size=8, max_steps=1, dry_run=True)
    data = DataArguments(validation_size=8)
    trainer = DistillationTrainer(networks.teacher, networks.vit, args, str(image_parquet), data=data)
    assert trainer.args.dataloader_num_workers == 1 and trainer.evaluator is not None


def test_processes_fill_in_the_same(networks, monkeypatch):
    """Processes of different machines: each would wait for a batch that another one does not have."""

    class Two:
        def gather(self, value):
            return [value, (True, 3, 2, 10_000)]

    monkeypatch.setattr(module, "Processes", Two)
    monkeypatch.setattr(module, "usable_cores", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    backbone = load_backbone(networks.vit, argument="student")
    found = module.find_situation(arguments(), backbone, backbone, size=16, images=9)
    assert (found.cores, found.threads, found.shared_memory, found.bf16) == (3, 2, 10_000, False)
    assert found.pixels_to_embed == 0


def test_no_workers_where_they_are_not_forked(monkeypatch):
    monkeypatch.setattr(module.multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert filled(arguments(), device="cuda", cores=9).dataloader_num_workers == 0


@pytest.mark.parametrize("given", [{"dataloader_prefetch_factor": 3}, {"dataloader_persistent_workers": True}])
def test_options_of_workers_bring_one(given):
    args = filled(arguments(**given), cores=1)
    assert args.dataloader_num_workers == 1 and args.dataloader_persistent_workers is True


def test_precision_by_the_device():
    args = filled(arguments(), device="cuda", bf16=True)
    assert args.bf16 is True and args.mixed_precision == "bf16"
    args = filled(arguments())
    assert args.bf16 is False and args.mixed_precision == "no"
    with_launcher = arguments()
    with_launcher.mixed_precision = "fp16"
    args, settings = fill(with_launcher, situation(device="cuda", bf16=True))
    assert not args.bf16 and args.mixed_precision == "fp16" and "bf16" not in settings.filled


# ---- real students ----


def tiny(kind: str, networks):
    torch.manual_seed(0)
    if kind == "convnext":
        network = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], image_size=32))
        network.save_pretrained(Path(networks.teacher).with_name("convnext"))
        h.processor(32).save_pretrained(Path(networks.teacher).with_name("convnext"))
        return str(Path(networks.teacher).with_name("convnext"))
    if kind == "timm":
        return pytest.importorskip("timm").create_model("resnet10t", num_classes=0)
    if kind == "mobilenet":
        return pytest.importorskip("timm").create_model("mobilenetv3_small_050", num_classes=0)
    if kind == "torchvision":
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    return getattr(networks, kind)


@pytest.mark.parametrize(
    ("kind", "family", "optim"),
    [
        ("resnet", BATCH_NORM, "sgd"),
        ("vit", TRANSFORMER, "adamw_torch"),
        ("convnext", LAYER_NORM, "adamw_torch"),
        ("timm", BATCH_NORM, "adamw_torch"),
        ("torchvision", BATCH_NORM, "adamw_torch"),
        ("mobilenet", BATCH_NORM, "sgd"),
    ],
)
def test_students_of_every_kind(tmp_path, image_parquet, networks, kind, family, optim):
    args = arguments(per_device_train_batch_size=8, dry_run=True, view_size=32, neighbors_k=1, neighbors_pool=2)
    trainer = DistillationTrainer(networks.teacher, tiny(kind, networks), args, str(image_parquet))
    found = trainer.settings.situation
    assert (found.family, found.trained, found.size, found.views) == (family, False, 32, 16)
    assert values(trainer.args, "optim") == (optim,) and trainer.args.num_train_epochs == 100
    assert trainer.arguments["learning_rate"] == trainer.args.learning_rate and args.learning_rate is None
    assert trainer.settings.table() in describe(trainer) and trainer.settings.shown
    assert trainer.create_optimizer().param_groups[0]["lr"] == trainer.args.learning_rate


def test_python_and_command_line_fill_the_same(tmp_path, image_parquet, networks):
    """The front page says that both give the same student."""
    given = {"per_device_train_batch_size": 8, "max_steps": 2, "save_strategy": "no", "logging_steps": 1}
    words = [f"--{name}={value}" for name, value in given.items()]
    words += [f"--teacher={networks.teacher}", f"--student={networks.vit}", f"--dataset={image_parquet}"]
    words += ["--use_cpu", "--validation_size=8", f"--output_dir={tmp_path / 'recipe'}"]
    run = build_run(*parse(EVERYTHING, words))
    args = DistillationArguments(str(tmp_path / "python"), use_cpu=True, **given)
    data = DataArguments(validation_size=8)
    trainer = DistillationTrainer(networks.teacher, networks.vit, args, str(image_parquet), data=data)
    assert trainer.settings == run.trainer.settings and trainer.settings.filled
    weights = []
    for one in (run, trainer):
        one.train()
    for one in (run.trainer, trainer):
        one.save_model()
        weights.append(Path(one.args.output_dir, "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    record = json.loads(Path(trainer.args.output_dir, "run.json").read_text())
    optimizer = record["settings"]["optim"]
    assert optimizer["value"] == "adamw_torch" and optimizer["reason"].startswith(f"{TRANSFORMER}, 0.0")
    assert record["arguments"]["learning_rate"] == trainer.args.learning_rate


def test_an_optimizer_of_ones_own_is_not_described_as_another(tmp_path, image_parquet, networks):
    student = load_backbone(networks.vit, argument="student")
    own = torch.optim.SGD(student.model.parameters(), lr=0.1)
    args = arguments(per_device_train_batch_size=8, dry_run=True)
    trainer = DistillationTrainer(networks.teacher, student, args, str(image_parquet), optimizers=(own, None))
    assert not {"optim", "learning_rate", "weight_decay"} & {*trainer.settings.filled}
    assert "warmup_steps" in trainer.settings.filled
    assert trainer.arguments["learning_rate"] is None is trainer.arguments["optim"]
    assert trainer.arguments["optimizer"].startswith("torch.optim.sgd.SGD(lr=0.1, momentum=0")
    assert trainer.arguments["warmup_steps"] == trainer.args.warmup_steps and "scheduler" not in trainer.arguments


def test_they_are_printed_once_at_the_start(tmp_path, image_parquet, networks, capsys):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, settings="auto", max_steps=1)
    trainer.train()
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("settings    for transformer") == 1 and "  max_grad_norm" in out
    as_json = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, networks.vit, settings="auto", max_steps=1, log_format="json"
    )
    as_json.train()
    assert all(json.loads(line) for line in capsys.readouterr().out.splitlines())


# ---- resuming ----


def interrupted(tmp_path, image_parquet, networks, **options):
    options = {"settings": "auto", "learning_rate": None, "save_strategy": "steps", "save_steps": 2} | options
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    trainer.add_callback(h.StopAfter(2))
    trainer.train()
    return trainer


def on_another_machine(monkeypatch, **changes):
    """Another version of the rules, and another number of cores."""
    for name, value in changes.items():
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(module, "usable_cores", lambda: 3)


@pytest.mark.parametrize("said", ["arguments", "train"])
def test_a_resumed_run_keeps_what_it_began_with(tmp_path, image_parquet, networks, monkeypatch, said):
    before = interrupted(tmp_path, image_parquet, networks)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert recorded_settings(checkpoint) == values_to_record(before.args)
    on_another_machine(monkeypatch, ADAMW=table.SGD, starting_values=lambda family, parameters: table.SGD)
    options = {"settings": "auto", "learning_rate": None, "save_strategy": "no"}
    if said == "arguments":
        options["resume_from_checkpoint"] = checkpoint
    resumed = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    assert (values(resumed.args, "optim") == ("adamw_torch",)) == (said == "arguments")
    resumed.train(resume_from_checkpoint=checkpoint)
    kept = [name for name in table.PAPER if name not in table.OPERATION]
    assert values(resumed.args, *kept) == values(before.args, *kept)
    recorded = {name: resumed.arguments[name] for name in kept}  # was that of this machine in run.json
    assert recorded == dict(zip(kept, values(before.args, *kept)))
    assert resumed.settings.filled["optim"].reason == "as in the run that is resumed"
    assert resumed.args.dataloader_num_workers == 2, "of this machine"
    assert resumed.state.global_step == 6


def test_another_optimizer_is_refused(tmp_path, image_parquet, networks):
    interrupted(tmp_path, image_parquet, networks)
    with pytest.raises(ValueError, match="trained with --optim adamw_torch, and now --optim is sgd; leave"):
        h.make_trainer(
            tmp_path, image_parquet, networks.teacher, networks.vit, settings="paper", resume_from_checkpoint="auto"
        )


@pytest.mark.parametrize("said", ["arguments", "train"])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "adam_beta1", "adam_epsilon"])
def test_what_a_resumed_optimizer_would_not_read_is_refused(tmp_path, image_parquet, networks, name, said):
    """It was ignored without a word, and run.json recorded it."""
    given = {"learning_rate": 0.003, "adam_beta1": 0.8}
    interrupted(tmp_path, image_parquet, networks, **given)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    asked = {"resume_from_checkpoint": checkpoint} if said == "arguments" else {}
    options = {"settings": "auto", "learning_rate": None, "save_strategy": "no"} | asked

    def resume(**options):
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    with pytest.raises(ValueError, match=f"{name}=0.25: the run that is resumed was trained .*leave (--)?{name} out"):
        resume(**options | {name: 0.25})
    if name == "adam_beta1":
        resumed = resume(**options)
        assert {name: resumed.arguments[name] for name in given} == given
        group = resumed.optimizer.param_groups[0]
        assert (group["initial_lr"], group["betas"][0]) == (0.003, 0.8)
        resume(**options | given)


def test_options_of_another_optimizer_and_of_earlier_versions_count_for_nothing():
    recorded = {**table.PAPER, "momentum": 0.8, "adam_beta1": 0.9}
    args = arguments(optim="sgd", learning_rate=0.05, weight_decay=5e-4, adam_beta1=0.5)
    assert fill(args, situation(), recorded)[0].momentum == 0.8, "left out"
    with pytest.raises(ValueError, match="momentum=0.7: the run that is resumed was trained with 0.8"):
        fill(arguments(optim="sgd", momentum=0.7), situation(), recorded)
    assert fill(arguments(optim="sgd", momentum=0.7), situation(), {**table.PAPER})[0].momentum == 0.7
    args = arguments(optim="sgd")
    args.weight_decay = 0.3  # assigned
    with pytest.raises(ValueError, match="weight_decay=0.3: the run that is resumed was trained with 0.0005"):
        fill(args, situation(), recorded)


def test_other_parameters_with_weight_decay_are_named(tmp_path, image_parquet, networks, monkeypatch):
    """Runs of before ``matrices`` was a rule of its own: torch names neither the argument nor a remedy."""
    interrupted(tmp_path, image_parquet, networks)
    monkeypatch.setattr("coss_hf.trainer.trainer.matrices", lambda model: [])
    options = {"settings": "auto", "learning_rate": None, "resume_from_checkpoint": "auto"}
    resumed = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    with pytest.raises(ValueError, match="decay was for other parameters than weight_decay_on=matrices names now"):
        resumed.train()


def test_settings_paper_after_a_run_with_others_is_refused():
    """It changed clipping, warm-up and length in the middle of a run without a word."""
    recorded = {**table.PAPER, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="trained with --max_grad_norm 1.0, and --settings paper means 0.0; leave"):
        fill(arguments(settings="paper"), situation(), recorded)
    assert fill(arguments(settings="paper", max_grad_norm=1.0), situation(), recorded)[0].max_grad_norm == 1.0
    in_steps = {**table.PAPER, "num_train_epochs": 40.0}
    assert fill(arguments(settings="paper", max_steps=9), situation(), in_steps)[0].max_steps == 9
    args = arguments()
    args.settings = "paper"
    found = fill(args, situation())[0]
    assert {name: getattr(found, name) for name in table.PAPER} == table.PAPER


def test_precision_of_the_launcher_is_recorded():
    """``accelerate launch --mixed_precision bf16`` was recorded as float32, and resumed so by ``coss-hf``."""
    args = arguments()
    args.mixed_precision = "bf16"
    args = fill(args, situation())[0]
    recorded = values_to_record(args)
    assert (recorded["bf16"], recorded["fp16"]) == (True, False)
    assert fill(arguments(), situation(device="cuda", bf16=True), recorded)[0].mixed_precision == "bf16"
    module.take_over(args, module.Settings("auto", situation(), {}), recorded)
    in_float16 = {**recorded, "bf16": False, "fp16": True}
    with pytest.raises(ValueError, match="was trained in float16; give --fp16"):
        fill(arguments(), situation(), in_float16)


def test_two_trainers_of_one_notebook_in_different_precisions(tmp_path, image_parquet, networks):
    """Both made their arguments first; accelerate then refused the second trainer."""
    first, second = (arguments(output_dir=str(tmp_path / str(on)), bf16=on, dry_run=True) for on in (True, False))
    trainers = []
    for args in (first, second):
        args.per_device_train_batch_size = 4
        trainers.append(DistillationTrainer(networks.teacher, networks.vit, args, str(image_parquet)))
        assert trainers[-1].accelerator.mixed_precision == ("bf16" if args.bf16 else "no")
    use_precision(first)  # as the first one does when it trains
    assert trainers[0].accelerator.mixed_precision == "bf16"


def test_bfloat16_stays_where_the_device_has_it():
    recorded = {**table.PAPER, "optim": "adamw_torch", "bf16": True}
    assert fill(arguments(), situation(), recorded)[0].bf16 is True, "a CPU computes in it"
    assert fill(arguments(), situation(device="cuda", bf16=True), recorded)[0].mixed_precision == "bf16"
    with pytest.raises(ValueError, match="was trained in bfloat16, which this device does not compute in"):
        fill(arguments(), situation(device="cuda"), recorded)
    with pytest.raises(ValueError, match="trained with --bf16 true; make the trainer with that argument"):
        args, settings = fill(arguments(), situation())
        module.take_over(args, settings, recorded)


def test_warmup_steps_of_a_schedule():
    """The share is one of the steps of the run: the rate rises for so many, and falls to 0 at the end."""
    args = filled(arguments(num_train_epochs=20))
    assert args.get_warmup_steps(1_000) == math.ceil(0.1 * 1_000)


@pytest.mark.parametrize(
    ("given", "distillation", "supervised"),
    [
        ({}, ("epoch", 500), ("no", 500)),
        ({"save_steps": 500}, ("steps", 500), ("steps", 500)),
        ({"save_strategy": "epoch", "save_steps": 20}, ("epoch", 20), ("epoch", 20)),
        ({"save_strategy": "steps"}, ("steps", 500), ("steps", 500)),
    ],
)
def test_an_interval_of_checkpoints_is_not_ignored(tmp_path, given, distillation, supervised):
    """``--save_steps 500`` alone once left the checkpoints to the ends of epochs, without a word."""
    for kind, expected in ((DistillationArguments, distillation), (TeacherArguments, supervised)):
        args = kind(output_dir=str(tmp_path), use_cpu=True, **given)
        assert (args.save_strategy, args.save_steps) == expected
        assert dataclasses.replace(args).save_strategy == expected[0]
    assert TeacherArguments(output_dir=str(tmp_path), use_cpu=True, eval_steps=3).eval_strategy == "steps"
