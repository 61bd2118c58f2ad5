"""The YAML files that come with the package: each is read and checked as a command would."""

import pytest
import yaml

import tests.helpers.runs as h
from coss_hf.cli import parse
from coss_hf.models.architecture import BATCH_NORM, TRANSFORMER
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.settings import Situation, fill
from coss_hf.trainer.training_args import DistillationArguments

CONFIGS = sorted((h.ROOT / "recipes" / "configs").glob("*.yaml"))
SITUATIONS = {
    "cifar10_resnet56_resnet20",
    "cifar10_resnet56_resnet20_neighbors",
    "cifar100_paper",
    "cnn_photographs",
    "imagenet_paper",
    "quickstart",
    "retrieval",
    "small_set_pretrained",
    "vit_photographs",
}
EVERYTHING = (ModelArguments, DataArguments, DistillationArguments)


def test_one_for_each_situation():
    assert {path.stem for path in CONFIGS} == SITUATIONS


@pytest.mark.parametrize("name", sorted(SITUATIONS))
def test_it_is_read_and_filled(name):
    words = ["--config", name, "--use_cpu", "--fp16", "false"]
    models, data, args = parse(EVERYTHING, [*words, "--teacher", "teacher"])
    assert models.student and data.dataset
    given = yaml.safe_load((h.ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())
    trained = given.get("student_init") != "random"
    family = TRANSFORMER if "vit" in models.student else BATCH_NORM
    found, settings = fill(args, Situation(family, 11_000_000, trained, 224, 50_000, args.images_per_step))
    assert not {*given} & {*settings.filled}
    if args.settings == "auto":
        assert found.optim == "adamw_torch" and found.learning_rate < 5e-4, "trained weights"
    published = name.startswith(("cifar10", "imagenet", "quickstart"))
    assert (args.settings == "paper") == published, "published figures are not filled by anything else"


def test_cifar100_as_the_paper_has_it():
    models, data, args = parse(EVERYTHING, ["--config", "cifar100_paper", "--use_cpu"])
    args, _ = fill(args, Situation(BATCH_NORM, 272_000, False, 32, 50_000, args.images_per_step))
    assert (args.optim, args.learning_rate, args.momentum, args.weight_decay) == ("sgd", 0.05, 0.9, 5e-4)
    assert (args.num_train_epochs, args.lr_milestones, args.lr_gamma) == (240, [150, 180, 210], 0.1)
    assert (args.warmup_steps, args.max_grad_norm, args.neighbors_k, args.images_per_step) == (0, 0, 0, 128)
    assert args.methods[0].options == {"beta": 50, "lambda_ss": 0.5} and args.augmentation == "cifar"
    assert (models.student, models.student_init, data.validation_size) == ("resnet20", "random", 0)


def test_imagenet_as_the_paper_has_it():
    _, data, args = parse(EVERYTHING, ["--config", "imagenet_paper", "--use_cpu", "--fp16", "false"])
    assert (
        data.test_split == "validation"
        and args.images_per_step * 4 == 1_024
        and args.methods[0].options["beta"] == 142.86
    )
    assert (args.optim, args.learning_rate, args.momentum, args.weight_decay) == ("sgd", 0.03, 0.9, 1e-4)
    assert (args.num_train_epochs, args.augmentation, args.warmup_steps, args.max_grad_norm) == (25, "moco", 0, 0)
    assert (args.neighbors_k, args.neighbors_pool, args.lr_scheduler_type) == (15, 31, "cosine")
