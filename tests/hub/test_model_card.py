import logging
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

import coss_hf
import tests.helpers.runs as h
from coss_hf.hub import model_card
from coss_hf.hub.push import PushFailed
from coss_hf.hub.snippets import LOADERS, Subject
from coss_hf.losses.registry import LOSSES, papers
from coss_hf.trainer import publishing
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.hub_server import card_errors

RESULTS = {"teacher": {"parameters": 5}, "student": {"parameters": 3, "knn20": 0.82341, "cosine": None}}
RECORD = {
    "command": "recipes/distill.py --teacher t --hub_token=***",
    "results": RESULTS | {"random": {"parameters": 3, "knn20": 0.3}},
    "evaluated_on": "test",
    "arguments": {"dataset": "somebody/images", "dataset_revision": "abc", "student_init": "pretrained"},
}


@pytest.fixture
def trainer(tmp_path, image_parquet, networks):
    def make(**args):
        return h.make_trainer(tmp_path, image_parquet, networks.teacher, args.pop("student", networks.vit), **args)

    return make


def test_metadata_and_text(trainer, tmp_path, networks):
    run = trainer(method="coss + rkd", hub_model_id="me/my-student")
    run.create_model_card(model_name="A student", record=RECORD, license="mit", tags="tiny")
    path = tmp_path / "out" / "README.md"
    card, data = ModelCard.load(path), metadata_load(path)
    assert {key: data[key] for key in ("library_name", "pipeline_tag", "license", "datasets")} == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": "mit",
        "datasets": "somebody/images",
    }
    assert "base_model" not in data, "the teacher is a folder"
    assert card.data.model_name == "A student"
    assert card.data.tags == ["coss_hf", "distillation", "coss", "rkd", "sentence-transformers", "tiny"]
    (result,) = card.data.eval_results
    assert (result.metric_value, result.metric_type, result.dataset_split) == (0.8234, "accuracy", "test")
    assert (result.dataset_type, result.dataset_revision) == ("somebody/images", "abc")
    assert card_errors(path.read_text()) == []
    for words in (
        RECORD["command"],
        run.teacher.fingerprint(),
        "not stated",
        "2409.13939",
        "1904.05068",
        "| 0 |",
        "1,000 of the",
    ):
        assert words in card.content, words


@pytest.mark.parametrize(("method", "tag"), [("rkd", "rkd"), ("seed", "seed"), ("coss", "coss")])
def test_a_student_is_tagged_with_the_methods_that_it_was_trained_by(trainer, tmp_path, method, tag):
    """All students had the tag of CoSS, which one of ten methods is."""
    trainer(method=method).create_model_card(tags=["coss_hf", "mine"])
    tags = metadata_load(tmp_path / "out" / "README.md")["tags"]
    assert tags == ["coss_hf", "distillation", tag, "sentence-transformers", "mine"]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("Dataset (in memory)", "Dataset-in-memory"),
        ("/data/my photos", "my-photos"),
        (".", "images"),
        ("me/it", "me/it"),
    ],
)
def test_the_hub_takes_the_name_of_each_dataset(trainer, tmp_path, dataset, expected):
    """It refuses a card whose data set has a name that it could not have there, so that nothing was pushed."""
    trainer().create_model_card(record=RECORD | {"arguments": {"dataset": dataset}})
    path = tmp_path / "out" / "README.md"
    (result,) = ModelCard.load(path).data.eval_results
    assert result.dataset_type == expected and card_errors(path.read_text()) == []


def test_card_states_whether_distillation_helped(trainer, tmp_path):
    trainer().create_model_card(record=RECORD | {"verdict": ["It did not help: no better.", "It has collapsed."]})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It did not help: no better.\n\nIt has collapsed.\n\n## Use" in card
    assert "embeds images as its teacher does" not in card


def test_card_counts_damaged_images(trainer, tmp_path):
    counts = {"train_images": 5000, "bad_images": ["a.png"], "replaced_images": ["b.png", "c.png"]}
    trainer().create_model_card(record=RECORD | counts)
    expected = "5,000 training images; 1 left out and 2 replaced by others, since they cannot be decoded |"
    assert expected in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_the_snippet_embeds_as_the_package(trainer, networks, network, tmp_path):
    run = trainer(student=getattr(networks, network))
    code = LOADERS[0].code(Subject(getattr(networks, network), run.student, None, tmp_path))
    space = {}
    exec(code, space)
    expected = coss_hf.embed(getattr(networks, network), space["image"])
    torch.testing.assert_close(space["embedding"], expected, rtol=1e-5, atol=1e-6)
    assert f"(1, {run.student.dim})" in code and expected.shape == (1, run.student.dim)


@pytest.mark.parametrize(
    ("student", "teacher", "init", "expected"),
    [
        ("google/vit", "facebook/dino", "pretrained", ["google/vit", "facebook/dino"]),
        ("google/vit", "facebook/dino", "random", ["facebook/dino"]),
        ("google/vit", "google/vit", "pretrained", ["google/vit"]),
        ("/a/folder", "facebook/dino", "pretrained", ["facebook/dino"]),
        ("ResNet (torchvision.models.resnet)", "/a/folder", "pretrained", []),
        ("ViTModel", "facebook/dino", "pretrained", ["facebook/dino"]),  # a network in memory
        ("facebook/dino, layers [0, 2]", "facebook/dino", "teacher_layers", ["facebook/dino"]),
    ],
)
def test_the_networks_that_a_student_comes_from(student, teacher, init, expected):
    names = [SimpleNamespace(name=name) for name in (student, teacher)]
    assert model_card._base_models(*names, init) == expected


def test_the_hub_finds_it_by_its_libraries(trainer, tmp_path, monkeypatch):
    run = trainer()
    run.teacher.name = "facebook/dino"
    monkeypatch.setattr(model_card, "licence_of", lambda *arguments: ("mit", "`mit`."))
    run.create_model_card()
    data = metadata_load(tmp_path / "out" / "README.md")
    assert data["base_model"] == "facebook/dino" and data["base_model_relation"] == "finetune"
    assert {"coss_hf", "sentence-transformers"} <= {*data["tags"]} and "transformers" not in data["tags"]
    assert data["widget"][0]["src"].startswith("https://huggingface.co/datasets/")


@pytest.mark.parametrize(
    "card, licence, words",
    [
        ("license: apache-2.0", "apache-2.0", "`apache-2.0`.$"),
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0", "no commercial use"),
        ("license: other\nlicense_name: dinov3-license", "other", "`dinov3-license`: .*terms of its own"),
        ("tags: [a]", None, "not stated"),
        ("license: [", None, "could not be read"),
        (None, None, "not stated"),
    ],
)
def test_licence_is_read_from_card_or_file(tmp_path, card, licence, words):
    if card is not None:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    found, sentence = model_card.licence_of(str(tmp_path))
    assert found == licence and re.search(words, sentence)


MIT = (
    "MIT License\n\nPermission is hereby granted, free of charge, to any person ... \nwithout   restriction, including"
)
BSD = "Redistribution and use in source and binary\nforms, with or without modification, are permitted"


@pytest.mark.parametrize(
    "files, licence, words",
    [
        ({"config.json": '{"license": "apache-2.0"}'}, "apache-2.0", "`apache-2.0`.$"),
        ({"config.json": '{"pretrained_cfg": {"license": "cc-by-nc-4.0"}}'}, "cc-by-nc-4.0", "no commercial use"),
        ({"config.json": "{}", "LICENSE": MIT}, "mit", "`mit`.$"),
        ({"LICENSE": BSD}, "bsd-2-clause", "`bsd-2-clause`.$"),
        ({"LICENCE.txt": f"{BSD} Neither the name of"}, "bsd-3-clause", "`bsd-3-clause`.$"),
        ({"LICENSE": "You may look at it."}, "other", "terms of its own.*`LICENSE` next to its weights"),
        ({"config.json": "{", "LICENSE.md": MIT}, "mit", "`mit`"),
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": BSD}, "mit", "`mit`.$"),
        ({"README.md": "---\ntags: [a]\n---\n", "LICENSE": BSD}, "bsd-2-clause", "`bsd-2-clause`.$"),
    ],
)
def test_licence_is_read_from_files_next_to_the_weights(tmp_path, files, licence, words):
    """A teacher with its licence in config.json or in a LICENSE next to its weights was called one without."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found, sentence = model_card.licence_of(str(tmp_path))
    assert found == licence and re.search(words, sentence)


def test_a_licence_that_the_hub_does_not_give_is_not_stated(tmp_path, monkeypatch):
    """A Hub that was lost between two questions ended a finished run."""

    def lost(*arguments):
        raise ValueError("LICENSE cannot be read: the Hub does not answer")

    monkeypatch.setattr("coss_hf.hub.licences.find_file", lost)
    assert model_card.licence_of(str(tmp_path))[0] is None


def test_licence_lookup_without_network_does_not_fail_the_run(trainer, caplog):
    assert model_card.licence_of("somebody/teacher")[0] is None
    assert "could not be read" in model_card.licence_of("somebody/teacher")[1]
    trainer().create_model_card()
    assert "Licence of the teacher" in caplog.text


def test_the_licence_of_the_students_start_is_on_the_card(trainer, tmp_path, monkeypatch, caplog):
    """That of the teacher was the only one which was looked at."""
    terms = {"some/student": ("cc-by-nc-4.0", "`cc-by-nc-4.0`: **no commercial use**.")}
    monkeypatch.setattr(model_card, "licence_of", lambda name, revision: terms.get(name, ("mit", "`mit`.")))
    run = trainer()
    run.student.name = "some/student"
    run.create_model_card(record=RECORD)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| its licence | `mit`. |" in card and "| licence of its start | `cc-by-nc-4.0`: **no comm" in card
    assert "Licence of the student's start some/student: `cc-by-nc-4.0`: no commercial use." in caplog.text
    for arguments, name in (({"student_init": "random"}, "some/student"), ({}, run.teacher.name)):
        run.student.name = name
        run.create_model_card(record=RECORD | {"arguments": arguments})
        assert "licence of its start" not in (tmp_path / "out" / "README.md").read_text()


def test_a_network_that_is_called_by_its_class_is_none_of_the_hub(trainer, tmp_path):
    """Its card linked to a page that does not exist, and its licence was one that the Hub did not tell."""
    run = trainer()
    run.teacher.name = "ViTModel"
    run.create_model_card(record=RECORD | {"arguments": {"dataset": "cifar10"}})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "co/ViTModel" not in card and "**not known**" in card and "datasets/cifar10)" in card


def test_each_method_has_its_paper():
    for method in LOSSES:
        ((title, _, entry),) = papers([method])
        assert f"title = {{{{{title}}}}}" in entry and entry.count("{") == entry.count("}")
    assert len(papers(["coss", "bn", "rkd"])) == 2


def test_without_network_training_is_not_lost(trainer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(push_to_hub=True, hub_model_id="me/x", hub_token="hf_Secret", max_steps=1)
    assert "asked again at the push" in caplog.text
    run.train()
    with pytest.raises(PushFailed, match="is complete; push it with: coss-hf push .* --repo_id me/x"):
        run.save_model()
    out = tmp_path / "out"
    assert (out / "model.safetensors").is_file() and (out / "README.md").is_file()
    assert not any(b"hf_Secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_unsafe_hub_strategies_are_rejected(trainer, monkeypatch, caplog):
    with pytest.raises(ValueError, match="--hub_strategy=checkpoint would publish"):
        trainer(hub_strategy="checkpoint")
    pushed = []

    def push(folder, name, *, commit_message, **options):
        pushed.append((str(folder).rsplit("/")[-1], commit_message))
        raise PushFailed("broken")

    monkeypatch.setattr(publishing, "push", push)
    for strategy in ("end", "every_save"):
        options = {"save_strategy": "steps", "save_steps": 3, "hub_always_push": True, "overwrite_output_dir": True}
        run = trainer(push_to_hub=True, hub_model_id="me/x", hub_token="t", hub_strategy=strategy, **options)
        run.train()
        run._finish_current_push()
        assert pushed == (
            []
            if strategy == "end"
            else [(f"checkpoint-{step}", f"Training in progress, {8 * step} images seen") for step in (3, 6)]
        )
    assert "Training continues. broken" in caplog.text


def test_pushes_in_the_background_keep_their_order_and_their_checkpoints(trainer, tmp_path, monkeypatch):
    """They ran at once, so that an older one could end last, and a checkpoint was removed while it was pushed."""
    pushed = []
    last = tmp_path / "out" / "checkpoint-2"

    def push(folder, name, **options):
        end = time.monotonic() + 300
        while not last.exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05 if folder.endswith("1") else 0)
        pushed.append((Path(folder).name, Path(folder, "model.safetensors").exists()))

    monkeypatch.setattr(publishing, "push", push)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "hub_always_push": True}
    options |= {"hub_strategy": "every_save", "push_to_hub": True, "hub_model_id": "me/x", "hub_token": "t"}
    trainer(max_steps=2, **options).train()
    assert pushed == [(f"checkpoint-{step}", True) for step in (1, 2)]
    assert [path.name for path in last.parent.glob("checkpoint-*")] == [last.name]


def test_a_newer_push_takes_the_place_of_one_that_has_not_begun(tmp_path, monkeypatch):
    """Over a slow network the checkpoints that waited for their push filled the disk."""
    begun, may_end = threading.Event(), threading.Event()
    pushed = []

    def push(folder, name, **options):
        begun.set()
        may_end.wait(300)
        pushed.append(Path(folder).name)

    monkeypatch.setattr(publishing, "push", push)
    publisher = publishing.HubPublisher(DistillationArguments(str(tmp_path), use_cpu=True))
    for step in (1, 2, 3):
        publisher.push_checkpoint(str(tmp_path / f"checkpoint-{step}"), "me/x", images_seen=8)
        begun.wait(300)
    waiting = publisher.pushed_folders()
    may_end.set()
    publisher.wait()
    assert pushed == ["checkpoint-1", "checkpoint-3"] and waiting == {str(tmp_path / name) for name in pushed}


def test_an_invalid_name_is_refused_at_the_start(trainer):
    with pytest.raises(ValueError, match="--hub_model_id='a b/c' is an invalid name"):
        trainer(push_to_hub=True, hub_model_id="a b/c")
