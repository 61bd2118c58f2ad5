"""Distillation into the space that a teacher shares with its texts: from the option to search by words."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

import coss_hf
import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.cli.parser import parse
from coss_hf.hub.snippets import LOADERS, NOT_MENTIONED, Subject
from coss_hf.models.loading import load_backbone
from coss_hf.models.saving import save_processor
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.cached_teacher import teacher_identity
from coss_hf.trainer.dry_run import describe
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.networks import save_with_tokenizer

ARGUMENTS = (ModelArguments, DataArguments, DistillationArguments)
SHORT = {
    "per_device_train_batch_size": 8,
    "augmentation": "none",
    "max_steps": 3,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "neighbors_k": 1,
    "neighbors_pool": 4,
    "view_epochs": 1,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "clip"
    save_with_tokenizer(folder)
    return str(folder)


def prepared(tmp_path, images, teacher: str, student: str, name: str = "out", **options):
    given = {"teacher": teacher, "student": student, "dataset": images, "output_dir": tmp_path / name, **SHORT}
    given |= {"neighbors_cache": tmp_path / "neighbours", "teacher_cache": tmp_path / "teachers", **options}
    return build_run(*parse(ARGUMENTS, [f"--{key}={value}" for key, value in given.items()]))


def test_student_in_the_space_of_texts(tmp_path, image_parquet, networks, teacher, monkeypatch, capsys):
    run = prepared(tmp_path, image_parquet, teacher, networks.small, teacher_space="projected")
    assert "CLIPVisionModel with projection" in describe(run.trainer)
    run.train()
    record = run.report().record
    assert record["arguments"]["teacher_space"] == "projected"
    out = tmp_path / "out"
    space = json.loads((out / "config.json").read_text())["teacher_space"]
    assert (space["space"], space["dim"], space["head"]) == ("projected", 512, True)
    student = coss_hf.Student.from_pretrained(out)
    embeddings = student.encode(h.colour_images(5, 7)[0])
    network = CLIPModel.from_pretrained(teacher).eval()
    with torch.no_grad():
        texts = network.get_text_features(input_ids=torch.tensor([[3, 4, 2], [3, 6, 2]])).pooler_output
    assert embeddings.shape == (5, 512) and student.similarity(embeddings, texts).shape == (5, 2)
    card = (out / "README.md").read_text()
    assert "the one that the teacher's images share with its texts (after the projection)" in card
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "get_text_features" in code]
    scope = {}
    exec(code, scope)
    assert scope["text_embeddings"].shape == (2, 512)
    assert scope["tokens"]["input_ids"].shape == (2, 8), "padded, though the tokenizer names no length"
    assert not np.allclose(*scope["text_embeddings"]), "two texts"

    # An evaluation follows the run: the student is compared with the teacher in the space that it was trained into.
    evaluate = load_recipe("evaluate")
    given = {"teacher": teacher, "student": out, "dataset": image_parquet, "output": tmp_path / "f.json"}
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(f"--{key}={value}" for key, value in given.items())])
    evaluate.main()
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["student"]["cosine"] == pytest.approx(record["results"]["student"]["cosine"], abs=1e-6)


def test_tower_and_shared_space_share_neither_neighbours_nor_cached_embeddings(
    tmp_path, image_parquet, networks, teacher, passes
):
    runs = [
        prepared(tmp_path, image_parquet, teacher, networks.small, space, teacher_space=space)
        for space in ("tower", "projected")
    ]
    assert len(passes) == 2, "the neighbours of one space were taken for those of the other"
    first, second = (run.trainer for run in runs)
    assert teacher_identity(first.teacher) != teacher_identity(second.teacher)
    assert first.identity()["--teacher"] != second.identity()["--teacher"], "one would be resumed as the other"
    for run, dim in zip(runs, (32, 512)):
        run.train()
        config = json.loads((Path(run.trainer.args.output_dir) / "config.json").read_text())
        assert config["teacher_space"]["dim"] == dim
    assert config["teacher_space"]["space"] == "projected"
    assert len(list((tmp_path / "teachers").iterdir())) == 2


def test_card_of_a_student_of_the_tower(tmp_path, image_parquet, networks, teacher):
    run = prepared(tmp_path, image_parquet, teacher, networks.small, max_steps=1)
    run.train()
    run.trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "before the projection into the space of its texts" in card and "get_text_features" not in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["teacher_space"]["space"] == "tower"


def test_refusals_name_the_parameter(tmp_path, image_parquet, networks):
    with pytest.raises(ValueError, match="^--teacher_space=projected: .*does not project images"):
        prepared(tmp_path, image_parquet, networks.teacher, networks.small, teacher_space="projected")
    with pytest.raises(ValueError, match="teacher_space"):
        parse(ARGUMENTS, ["--teacher_space=text"])


def test_from_python(tmp_path, image_parquet, networks, teacher):
    backbone = coss_hf.load_backbone(teacher, argument="teacher", space="projected")
    short = {name: value for name, value in SHORT.items() if not name.startswith(("neighbors", "view"))}
    args = coss_hf.DistillationArguments(str(tmp_path / "out"), **short | {"max_steps": 1})
    trainer = coss_hf.DistillationTrainer(backbone, networks.small, args, str(image_parquet))
    trainer.train()
    trainer.save_model()
    assert trainer.arguments["teacher_space"] == "projected"
    assert coss_hf.Student.from_pretrained(tmp_path / "out").dim == 512


def test_the_card_searches_by_text_where_the_teacher_reads_texts(tmp_path, networks, teacher):
    """Vision halves have no text tower to search with."""
    student = load_backbone(networks.small, argument="student")
    student.model.config.teacher_space = {"teacher": teacher, "revision": "v2", "space": "projected", "dim": 512}
    subject = Subject("me/student", student, None, tmp_path)
    (text,) = [loader for loader in LOADERS if loader.title == "Search by text"]
    assert text.why_not(subject) == "" and text.code(subject).count('revision="v2"') == 2
    student.model.config.teacher_space["texts"] = False
    assert text.why_not(subject) == NOT_MENTIONED
    whole = load_backbone(teacher, argument="teacher")
    CLIPModel.from_pretrained(teacher).vision_model.save_pretrained(tmp_path / "half")
    save_processor(whole.processor, tmp_path / "half")
    half = load_backbone(str(tmp_path / "half"), argument="teacher")
    assert whole.has_texts and not half.has_texts
