"""Training from Python: `DistillationTrainer` takes what its users have, and gives what the recipe gives."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2
from transformers import AutoModel, TrainingArguments

import coss_hf
from coss_hf import DistillationArguments, DistillationTrainer, Student
from coss_hf.cli import parse
from coss_hf.data.views import ViewDataset
from coss_hf.evaluation.diagnostics import evaluations, has_diagnostics
from coss_hf.losses import CoSSLoss
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.run_report import write_pictures
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.reloading import NotReloadable
from recipes.convert import main as convert


@pytest.fixture
def images(image_parquet):
    """As from the Hub: labelled PIL images, without any column of ours."""
    return datasets.load_dataset("parquet", data_files=str(Path(image_parquet, "train.parquet")), split="train")


def arguments(tmp_path, name: str = "out", **options) -> DistillationArguments:
    options = {
        "settings": "paper",
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "augmentation": "cifar",
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | options
    return DistillationArguments(str(tmp_path / name), **options)


def weights(folder) -> str:
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()


def trained(trainer: DistillationTrainer) -> str:
    trainer.train()
    trainer.save_model()
    return weights(trainer.args.output_dir)


def data(tmp_path, **options) -> DataArguments:
    return DataArguments(neighbors_cache=str(tmp_path / "cache"), **options)


def test_ten_lines_give_the_student_of_the_recipe(tmp_path, image_parquet, networks):
    """Names as in the recipe, a dataset with its own test split, neighbours mined, and the recipe's report."""
    neighbors = {"neighbors_k": 1, "neighbors_pool": 4}
    models = ModelArguments(networks.teacher, networks.resnet)
    given = data(tmp_path, dataset=str(image_parquet), validation_size=8)
    run = build_run(models, given, arguments(tmp_path, "recipe", **neighbors))
    run.train()
    recipe = run.report().record

    trainer = DistillationTrainer(
        teacher=networks.teacher,
        student=networks.resnet,
        args=arguments(tmp_path, "python", **neighbors),
        train_dataset=str(image_parquet),
        data=data(tmp_path, validation_size=8),
    )
    assert trainer.train_dataset.k == 1 and trainer.images_seen == 0
    assert trained(trainer) == weights(tmp_path / "recipe")
    assert trainer.images_seen == 4 * 8 * 2
    measured = trainer.evaluate()
    assert 0 <= measured["eval_knn10"] <= 1
    record = trainer.report().record
    assert record["results"] == recipe["results"] and record["arguments"]["teacher"] == networks.teacher
    names = {path.name for path in (tmp_path / "python").iterdir()}
    assert names == {path.name for path in (tmp_path / "recipe").iterdir()} - {"trainer_state.json"}
    assert json.loads((tmp_path / "python" / "run.json").read_text())["verdict"]


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_the_card_does_not_say_that_random_weights_were_trained(tmp_path, images, networks, init):
    """A network built from a name on the Hub has that name at random weights, too."""
    student = load_backbone(networks.small)
    if init == "pretrained":
        trained(DistillationTrainer(networks.teacher, student, arguments(tmp_path, "before"), images))
    student.name = "somebody/student"
    trainer = DistillationTrainer(networks.teacher, student, arguments(tmp_path), images)
    trainer.create_model_card()
    assert trainer.arguments["student_init"] == init
    data = metadata_load(tmp_path / "out" / "README.md")
    assert data.get("base_model") == ("somebody/student" if init == "pretrained" else None)


def test_trainers_of_one_teacher_read_each_their_own_maps(tmp_path, images, networks):
    """The one built last decided for both."""
    teacher = load_backbone(networks.teacher)
    first, second = (
        DistillationTrainer(teacher, networks.small, arguments(tmp_path, name, method=name, max_steps=1), images)
        for name in ("at", "coss")
    )
    assert first.teacher.maps > 0 == second.teacher.maps
    first.train()


@pytest.mark.parametrize("kind", ["name", "model", "backbone"])
def test_networks_in_any_form(tmp_path, images, networks, kind):
    forms = {
        "name": lambda name: Path(name),
        "model": lambda name: AutoModel.from_pretrained(name),
        "backbone": lambda name: load_backbone(name),
    }
    teacher = forms[kind](networks.teacher)
    student = forms[kind](networks.small)
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path), images, images.select(range(12)))
    assert len(trained(trainer)) == 64
    expected = DistillationTrainer(networks.teacher, networks.small, arguments(tmp_path, "named"), images)
    assert trained(expected) == weights(tmp_path / "out")
    student = Student.from_pretrained(tmp_path / "out")
    assert student.encode(images["image"], batch_size=16).shape == (48, 16)


def test_datasets_in_any_form(tmp_path, images, networks):
    renamed = images.rename_column("image", "photo")
    both = datasets.DatasetDict({"train": renamed, "test": images.select(range(9)).rename_column("image", "photo")})
    trainer = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path), both)
    assert len(trainer.splits.train) == 48 and trainer.evaluator is None and len(trainer.splits.test) == 9
    assert set(trainer.compare()) == {"teacher", "student", "random"}
    streams = datasets.IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in both.items()})
    assert trainer.evaluate(streams).keys() == trainer.evaluate(both).keys(), "train was measured as well"
    given = DistillationTrainer(
        networks.teacher, networks.resnet, arguments(tmp_path), renamed, images.select(range(12))
    )
    assert len(given.splits.train) == 48 and len(given.evaluator.test_images) == 12
    assert given.splits.validation.column_names.count("photo") == 1


@pytest.mark.parametrize("method", ["rkd", "coss"])
def test_one_held_out_image_has_no_loss_of_a_batch(tmp_path, images, networks, method):
    """The run ended at its first evaluation."""
    trainer = DistillationTrainer(
        networks.teacher, networks.resnet, arguments(tmp_path, method=method), images, images.select([0])
    )
    assert "eval_loss" not in trainer.evaluate()


def test_losses_in_any_form(tmp_path, images, networks):
    students = {
        name: trained(
            DistillationTrainer(
                networks.teacher, networks.resnet, arguments(tmp_path, name), images, criterion=criterion
            )
        )
        for name, criterion in (("default", None), ("name", "coss"), ("module", CoSSLoss()), ("other", "coss + rkd"))
    }
    assert students["default"] == students["name"] == students["module"] != students["other"]


def test_transforms_in_any_form(tmp_path, images, networks):
    transform = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    students = [
        trained(
            DistillationTrainer(
                networks.teacher,
                networks.resnet,
                arguments(tmp_path, name, augmentation="imagenet"),
                images,
                transform=given,
            )
        )
        for name, given in (("name", "imagenet"), ("callable", transform), ("again", transform))
    ]
    assert students[0] == students[1] == students[2], "the same operations, seeded for each view"


def as_float(image):
    return v2.functional.pil_to_tensor(image).float()[:, :16, :16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "^teacher is missing"),
        ({"teacher": 3}, "^teacher is a int; give a Hub name"),
        ({"args": "out"}, "^args is a str; give DistillationArguments"),
        ({"args": TrainingArguments("out", use_cpu=True)}, "^args is a TrainingArguments; give DistillationArguments"),
        ({"student": torch.nn.Identity()}, "^student=Identity .* has no parameters"),
        ({"train_dataset": [1, 2]}, "^train_dataset is a list; give a datasets.Dataset"),
        ({"eval_dataset": {}}, "^eval_dataset is a dict"),
        ({"train_dataset": datasets.Dataset.from_dict({"text": ["a"] * 50})}, "image"),
        ({"criterion": "cos"}, "^method='cos' is unknown"),
        ({"criterion": 7}, "^criterion is a int"),
        ({"transform": "cifar10"}, "^transform='cifar10' is unknown: choose one of none, cifar"),
        ({"transform": 7}, "^transform is a int"),
        ({"transform": as_float}, r"^transform=as_float returns torch.float32 \(3, 16, 16\); a view is a uint8"),
        ({"transform": lambda image: image}, "^transform=.* returns Image; a view is a uint8 tensor"),
        ({"transform": v2.PILToTensor()}, r"^transform=PILToTensor\(\) returns torch.uint8 \(3, 32, 24\); a view"),
        ({"transform": lambda image: image.nothing}, "fails on a PIL image"),
    ],
)
def test_bad_input_is_named_by_parameter(tmp_path, images, networks, options, message):
    given = {"teacher": networks.teacher, "student": networks.resnet, "train_dataset": images}
    with pytest.raises(ValueError, match=message) as raised:
        DistillationTrainer(**given | {"args": arguments(tmp_path, augmentation="imagenet")} | options)
    assert "--" not in str(raised.value)


@pytest.mark.parametrize("transform", [as_float, "none"])
def test_two_augmentations_are_refused(tmp_path, images, networks, transform):
    """One of them was recorded, and the other made the views."""
    given = networks.teacher, networks.resnet, arguments(tmp_path, augmentation="moco"), images
    with pytest.raises(ValueError, match="^augmentation=moco next to transform, which makes the views"):
        DistillationTrainer(*given, transform=transform)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbors_k": 1, "neighbors_pool": 3}, "^neighbors_k=1: the views of the ViewDataset were made with 0;"),
        ({"view_size": 24}, "^view_size=24: .* made with 16; leave view_size out"),
        ({"augmentation": "moco"}, "^augmentation=moco: .* made with none"),
        ({"view_seed": 9}, "^view_seed=9: .* made with 5"),
        ({"view_epochs": 3}, "^view_epochs=3: .* made with 2"),
        ({"reduced_decoding": False}, "^reduced_decoding=False: .* made with True"),
    ],
)
def test_views_that_were_made_otherwise_are_refused(tmp_path, image_parquet, networks, options, message):
    """The arguments were recorded, and the views stayed as they were."""
    rows = coss_hf.load_images(str(image_parquet)).train
    views = ViewDataset(rows, "image", "none", 16, seed=5, view_epochs=2)
    as_made = {"augmentation": "none", "view_epochs": 2}
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, **as_made | options), views)
    trainer = DistillationTrainer(
        networks.teacher, networks.resnet, arguments(tmp_path, augmentation="imagenet"), views
    )
    names = ("neighbors_k", "view_size", "augmentation", "view_seed", "view_epochs")
    assert [trainer.arguments[name] for name in names] == [0, 16, "none", 5, 2]


def test_a_dry_run_of_views_that_were_given_describes_it(tmp_path, image_parquet, networks, capsys):
    """It ended in an AttributeError: there are no splits."""
    views = ViewDataset(coss_hf.load_images(str(image_parquet)).train, "image", "none", 16)
    args = arguments(tmp_path, augmentation="none", dry_run=True)
    DistillationTrainer(networks.teacher, networks.resnet, args, views).train()
    out = capsys.readouterr().out
    assert re.search(r"\nimages +those of the views that were given\n", out) and "estimate" in out


@pytest.mark.parametrize(
    "options",
    [{"max_train_samples": 8}, {"validation_size": 8}, {"train_split": "test"}, {"image_column": "photo"}],
)
def test_arguments_about_images_that_were_read_are_refused(tmp_path, image_parquet, networks, options):
    splits = coss_hf.load_images(str(image_parquet))
    message = f"^{next(iter(options))}=.*: the images of train_dataset were read already"
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            networks.teacher, networks.resnet, arguments(tmp_path), splits, data=data(tmp_path, **options)
        )
    columns = {"image_column": splits.image_column, "label_column": splits.label_column}
    loading = data(tmp_path, dataset=str(image_parquet), validation_size=8, test_split="test")
    for images, agreeing in ((splits, data(tmp_path, **columns, validation_size=0)), (loading.load(), loading)):
        DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path), images, data=agreeing)
    neighbors = np.arange(1, 49)[:, None] % 48
    args = arguments(tmp_path, neighbors_k=1, neighbors_pool=1)
    given = {"data": data(tmp_path), "neighbors": neighbors}
    assert DistillationTrainer(networks.teacher, networks.resnet, args, splits, **given).train_dataset.k == 1


def cut(image):
    return v2.functional.pil_to_tensor(image)[:, :16, :16]


@pytest.mark.skipif(
    not hasattr(DistillationArguments, "dataloader_multiprocessing_context"),
    reason="versions of Transformers at the floor do not have this option",
)
def test_a_transform_that_workers_cannot_load_is_refused_at_once(tmp_path, networks):
    """It failed at the first batch, behind the search for neighbours."""
    spawned = {"dataloader_multiprocessing_context": "spawn", "augmentation": "imagenet"}

    def make(transform, **options):
        args = arguments(tmp_path, **spawned | options)
        DistillationTrainer(networks.teacher, networks.resnet, args, "nowhere", transform=transform)

    for workers in (1, None):
        with pytest.raises(ValueError, match="^transform=.*lambda.* cannot be sent to loader workers, .* by spawn"):
            make(lambda image: cut(image), dataloader_num_workers=workers, settings="auto")
    for transform, context in ((cut, "spawn"), (lambda image: cut(image), "fork")):
        with pytest.raises(ValueError, match="nowhere"):
            make(transform, dataloader_num_workers=1, dataloader_multiprocessing_context=context)


def test_a_card_that_is_written_again_keeps_its_results(tmp_path, images, networks):
    """`push_to_hub` after `report` published a card without verdict and table."""
    given = {"train_dataset": images, "eval_dataset": images.select(range(12))}
    trainer = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, max_steps=1), **given)
    trainer.train()
    trainer.save_model()
    trainer.report()
    card = tmp_path / "out" / "README.md"
    before = card.read_text()
    trainer.create_model_card()
    assert card.read_text() == before and "k-NN" in before


def test_arguments_may_ask_to_resume(tmp_path, images, networks):
    """`train()` read its own parameter alone, and started anew over the checkpoints."""
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, "whole", **options), images)
    expected = trained(whole)
    first = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, **options), images)
    first.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    options["resume_from_checkpoint"] = True
    again = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, **options), images)
    assert trained(again) == expected
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [2, 4]
    assert [path.name for path in sorted((tmp_path / "out").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def test_images_of_load_images_are_as_safe_as_any(tmp_path, image_parquet, networks):
    """What ``load_images`` returns was taken for a recipe's: a run was written over, and ``eval_dataset`` ignored."""
    splits = coss_hf.load_images(str(image_parquet))
    first = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, max_steps=1), splits)
    before = trained(first)
    again = DistillationTrainer(networks.teacher, networks.small, arguments(tmp_path, max_steps=1), splits)
    with pytest.raises(ValueError, match="^output_dir=.* already holds a run"):
        again.train()
    assert weights(tmp_path / "out") == before
    with pytest.raises(ValueError, match="^optim=lomo: the optimizer cannot be built"):
        DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, "new", optim="lomo"), splits)
    held_out = splits.test.select(range(12))
    given = arguments(tmp_path, "measured")
    trainer = DistillationTrainer(networks.teacher, networks.resnet, given, splits, held_out)
    assert len(trainer.evaluator.test_images) == 12


def test_arguments_are_tried_before_images_are_read(tmp_path, networks):
    """Only the recipe did; from Python the optimizer was missed after images and neighbours had taken their hours."""
    with pytest.raises(ValueError, match="^optim=lomo: the optimizer cannot be built") as raised:
        DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, optim="lomo"), "nowhere")
    assert "--" not in str(raised.value)


def test_a_saved_student_is_loaded_again(tmp_path, images, networks, monkeypatch):
    """Only the recipe did."""
    from coss_hf.trainer import trainer as module

    def save_wrong(folder, *rest):
        save_student(folder, *rest)
        weights = load_file(f"{folder}/model.safetensors")
        save_file({name: 2 * value for name, value in weights.items()}, f"{folder}/model.safetensors", {"format": "pt"})

    save_student = module.save_student
    trainer = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path, max_steps=1), images)
    trainer.train()
    trainer.save_model()
    monkeypatch.setattr(module, "save_student", save_wrong)
    with pytest.raises(NotReloadable, match="^The student is trained, but its folder .* does not load as what was"):
        trainer.save_model()


def test_evaluation_on_other_images(tmp_path, images, networks):
    """`evaluate(eval_dataset)` measured the images that the trainer was made with."""
    given = {"train_dataset": images, "eval_dataset": images.select(range(12))}
    trainer = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path), **given)
    own = trainer.evaluate()
    others = images.select(range(12, 48)).rename_column("image", "photo")
    found = trainer.evaluate(others)
    history = trainer.state.log_history
    assert [entry["overlap10"] for entry in evaluations(history)] == [own["eval_overlap10"]], "not compared with others"
    assert found["eval_cosine"] != own["eval_cosine"] and found.keys() >= {"eval_knn10", "eval_overlap10"}
    expected = DistillationTrainer(networks.teacher, networks.resnet, arguments(tmp_path), images, others).evaluate()
    clocks = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert {key: found[key] for key in {*found} - clocks} == {key: expected[key] for key in {*expected} - clocks}
    tested = trainer.predict(others)  # it measured the trainer's own images
    assert tested.metrics["test_cosine"] == found["eval_cosine"] and tested.predictions is None
    with pytest.raises(ValueError, match="^test_dataset is missing"):
        trainer.predict(None)
    several = trainer.evaluate({"a": others, "b": str(Path(tmp_path, "images", "test.parquet"))})
    assert several["eval_a_cosine"] == found["eval_cosine"] and "eval_b_knn10" in several
    assert trainer.evaluate()["eval_cosine"] == own["eval_cosine"]
    without = DistillationTrainer(
        networks.teacher, networks.resnet, arguments(tmp_path, augmentation="cifar"), trainer.train_dataset
    )
    assert without.evaluate(others)["eval_cosine"] == found["eval_cosine"]
    write_pictures(tmp_path, without, None)
    assert not Path(tmp_path, "panel.png").exists()
    without.state.log_history += [entry for entry in history if has_diagnostics(entry)]
    write_pictures(tmp_path, without, None)
    assert Path(tmp_path, "panel.png").exists()
    with pytest.raises(ValueError, match="^eval_dataset is a int; give a datasets.Dataset"):
        trainer.evaluate(7)


def test_the_record_says_what_both_networks_are_given(tmp_path, images, networks):
    """`coss-hf evaluate` follows it; from Python it lacked all three."""
    trainer = DistillationTrainer(networks.vit, networks.resnet, arguments(tmp_path), images)
    found = {key: trainer.arguments[key] for key in trainer.arguments if key.startswith(("teacher", "student"))}
    found = {key: value for key, value in found.items() if not key.startswith("teacher_cache")}
    assert found == {
        "teacher": networks.vit,
        "teacher_pooling": "cls",
        "teacher_size": 16,
        "teacher_dtype": "float32",
        "student": networks.resnet,
        "student_pooling": "pooler",
        "student_size": 16,
        "student_dtype": "float32",
        "student_init": "random",
    }


def test_images_that_came_after_the_run_began_are_left_out(tmp_path, images, networks, monkeypatch):
    """`train(resume_from_checkpoint=True)` refused them as another dataset: it did not read the run's own list."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(16):
        images[row]["image"].save(folder / f"{row:02d}.png")
    options = {"save_strategy": "steps", "save_steps": 2}

    def trainer(name: str) -> DistillationTrainer:
        args = arguments(tmp_path, name, **options)
        return DistillationTrainer(networks.teacher, networks.resnet, args, str(folder), data=data(tmp_path))

    expected = trained(trainer("whole"))
    trainer("out").train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    images[20]["image"].save(folder / "00new.png")
    again = trainer("out")
    assert len(again.train_dataset) == 17
    again.train(resume_from_checkpoint=True)
    assert len(again.train_dataset) == 16
    again.save_model()
    assert weights(tmp_path / "out") == expected


@pytest.mark.slow
def test_ten_lines_on_cifar100_give_the_student_of_the_recipe(tmp_path, shared, monkeypatch):
    """Real images and a real teacher: the lines of the front page against the command with the same arguments."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for name in ("resnet56", "resnet20"):
        convert([str(shared / "teachers" / f"cifar10-{name}"), "--output", str(tmp_path / name)])
    teacher = str(tmp_path / "resnet56")
    student = str(tmp_path / "resnet20")
    images = shared / "data" / "cifar100"
    given = {
        "max_steps": 4,
        "neighbors_k": 3,
        "per_device_train_batch_size": 16,
        "eval_strategy": "no",
        "use_cpu": True,
    }
    subset = {"max_train_samples": 2000, "neighbors_cache": str(tmp_path / "cache")}
    options = {"teacher": teacher, "student": student, "dataset": str(images), "output_dir": str(tmp_path / "recipe")}
    words = [f"--{name}={value}" for name, value in {**options, **given, **subset}.items()]
    models, data, args = parse((ModelArguments, DataArguments, DistillationArguments), words)
    build_run(models, data, args).train()

    trainer = DistillationTrainer(
        teacher=teacher,
        student=student,
        args=DistillationArguments(str(tmp_path / "python"), **given),
        train_dataset=datasets.load_dataset(
            "parquet", data_files={split: str(images / f"{split}.parquet") for split in ("train", "test")}
        ),
        data=DataArguments(max_train_samples=2000, neighbors_cache=str(tmp_path / "other cache")),
    )
    trainer.train()
    trainer.save_model()
    assert weights(tmp_path / "python") == weights(tmp_path / "recipe")
    photos = datasets.load_dataset("parquet", data_files=str(images / "test.parquet"), split="train[:20]")
    found = Student.from_pretrained(tmp_path / "python").encode(photos["image"])
    assert found.shape == (20, 64) and found.isfinite().all()
