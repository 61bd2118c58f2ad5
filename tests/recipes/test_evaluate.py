import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.evaluation.diagnostics import overlap_on
from coss_hf.models.heads import load_head, projection_head
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.processes import run as run_program
from tests.helpers.runs import ROOT

evaluate = load_recipe("evaluate")
RETRIEVAL = tuple(f"{kind}{name}" for kind in ("", "asymmetric_") for name in ("recall1", "recall10", "map"))
METRICS = ("knn10", "knn20", "probe", *RETRIEVAL, "overlap10", "cosine")


@pytest.fixture
def image_folder(tmp_path):
    """Image folder with train (48 PNG of 4 colours) and test (24)."""
    for split, count, seed in (("train", 48, 0), ("test", 24, 1)):
        for i, (image, label) in enumerate(zip(*h.colour_images(count, seed))):
            folder = tmp_path / "folder" / split / f"colour{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:02}.png")
    return tmp_path / "folder"


def call(monkeypatch, **options):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(f"--{key}={value}" for key, value in options.items())])
    evaluate.main()
    return json.loads(open(options["output"]).read())


def test_every_metric_of_every_network(tmp_path, image_folder, monkeypatch, capsys):
    teacher, student = h.save_resnet(tmp_path / "teacher", seed=1), h.save_resnet(tmp_path / "student", seed=2)
    options = {"teacher": teacher, "student": student, "dataset": image_folder, "output": tmp_path / "new" / "f.json"}
    result = call(monkeypatch, **options, seed=4)
    for name in ("teacher", "student", "random"):
        row = result[name]
        assert set(row) == {"name", "parameters", *METRICS} and row["parameters"] == result["student"]["parameters"] > 0
        assert all(0 <= row[key] <= 1 for key in METRICS[:-1]) and -1 <= row["cosine"] <= 1 + 1e-6
        assert row["knn10"] > 0.5  # four plain colours
    assert result["teacher"]["overlap10"] == 1 and result["teacher"]["cosine"] == pytest.approx(1)
    assert result["student"]["overlap10"] < 1 and result["random"] != result["student"]
    assert result["seed"] == 4 and "--seed=4" in result["command"]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["f.json"]
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in ("teacher", "student", "random")) and "k-NN 20" in out
    # The teacher as its own student agrees with itself.
    result = call(monkeypatch, **options | {"student": teacher})
    assert result["student"] == result["teacher"]
    other = call(monkeypatch, **options | {"student": teacher}, seed=5, linear=True)
    assert result["random"] != other["random"] and 0.5 < other["teacher"]["linear"] <= 1


def test_the_head_is_that_of_the_students_revision(tmp_path, image_parquet, monkeypatch):
    network, asked = h.save_resnet(tmp_path / "network"), []
    monkeypatch.setattr(evaluate, "load_head", lambda *given: asked.append(given))
    load = evaluate.ModelArguments.load_student
    monkeypatch.setattr(
        evaluate.ModelArguments, "load_student", lambda self, *a: load(replace(self, student_revision=None), *a)
    )
    options = {"teacher": network, "student": network, "dataset": image_parquet, "output": tmp_path / "f.json"}
    call(monkeypatch, **options, student_revision="old")
    assert asked == [(network, "old")]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_head_beside_the_student(tmp_path, image_parquet, monkeypatch, kind):
    teacher = h.save_resnet(tmp_path / "teacher", seed=1)
    student = h.save_resnet(tmp_path / "student", seed=2, hidden_sizes=(4, 4, 8))
    options = {"teacher": teacher, "student": student, "dataset": image_parquet, "output": tmp_path / "f.json"}
    assert load_head(student) is None and call(monkeypatch, **options)["student"]["cosine"] is None
    head = projection_head(kind, 8, 16, 5)
    save_file(head.state_dict(), tmp_path / "student" / "head.safetensors")
    x = torch.randn(3, 8)
    assert torch.equal(load_head(student)(x), head(x))
    result = call(monkeypatch, **options)
    assert -1 <= result["student"]["cosine"] <= 1 and result["random"]["cosine"] is None


def test_without_labels_agreement_alone(tmp_path, monkeypatch, capsys):
    for split, count in (("train", 30), ("test", 15)):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for i, image in enumerate(h.colour_images(count, 0)[0]):
            image.save(tmp_path / "plain" / split / f"{i:02}.png")
    teacher, student = h.save_resnet(tmp_path / "teacher", seed=1), h.save_resnet(tmp_path / "student", seed=2)
    result = call(monkeypatch, teacher=teacher, student=student, dataset=tmp_path / "plain", output=tmp_path / "f.json")
    assert set(result["student"]) == {"name", "parameters", "overlap10", "cosine"}
    assert "k-NN" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"output": None}, "--output is missing"),
        ({"teacher": "no-such-teacher"}, "--teacher=no-such-teacher"),
        ({"dataset": "no-such-images"}, "--dataset no-such-images"),
        ({"test_split": "exam"}, "--test_split exam"),
        ({"image_colum": "image"}, "--image_column"),
        ({"output": "."}, "--output . is a folder"),
    ],
)
def test_bad_input(tmp_path, image_parquet, monkeypatch, capsys, replaced, message):
    network = h.save_resnet(tmp_path / "network")
    options = {"teacher": network, "student": network, "dataset": image_parquet, "output": tmp_path / "f.json"}
    words = [f"--{key}={value}" for key, value in (options | replaced).items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "f.json").exists()


def test_no_images_to_test_on(tmp_path, image_folder, monkeypatch, capsys):
    network = h.save_resnet(tmp_path / "network")
    options = {"teacher": network, "student": network, "dataset": image_folder / "train", "output": tmp_path / "f.json"}
    with pytest.raises(SystemExit):
        call(monkeypatch, **options)
    assert "--validation_size" in capsys.readouterr().err
    assert "knn10" in call(monkeypatch, **options, validation_size=12)["random"]


def test_what_the_students_run_held_out_is_held_out_again(tmp_path, image_folder, monkeypatch, caplog):
    network, dataset = h.save_resnet(tmp_path / "network"), str(image_folder / "train")
    options = {"teacher": network, "student": network, "dataset": dataset, "output": tmp_path / "f.json"}
    given, measured = {"dataset": dataset, "dataset_name": None, "train_split": None}, []

    class Spy(evaluate.Evaluator):
        def __init__(self, teacher, test_images, *args, train_images, **kwargs):
            shared = set(test_images["image_hash"]) & set(train_images["image_hash"])
            measured.append(shared or len(test_images))
            super().__init__(teacher, test_images, *args, train_images=train_images, **kwargs)

    monkeypatch.setattr(evaluate, "Evaluator", Spy)
    for size, words in ((9, {}), (9, {"validation_size": 12})):
        record = {"arguments": given | {"validation_size": size}}
        (tmp_path / "network" / "run.json").write_text(json.dumps(record))
        call(monkeypatch, **options, **words)
    assert measured == [9, 12] and "was trained with 9" in caplog.text
    (tmp_path / "network" / "run.json").write_text(json.dumps({"arguments": given | {"dataset": "another"}}))
    with pytest.raises(SystemExit):
        call(monkeypatch, **options)


@pytest.mark.parametrize("change", [None, "more", "renamed", "test split"])
def test_changed_images_are_reported(tmp_path, image_folder, monkeypatch, caplog, change):
    """The part held out was another one, perhaps trained on, without a word."""
    dataset = image_folder if change == "test split" else image_folder / "train"
    network = h.save_resnet(tmp_path / "network")
    given = {"dataset": str(dataset), "dataset_name": None, "train_split": None, "validation_size": 9}
    (tmp_path / "network" / "run.json").write_text(json.dumps({"arguments": given}))
    DataArguments(dataset=str(dataset), validation_size=9).load().run_images.save(network)
    first = sorted(dataset.rglob("*.png"))[0]
    if change in ("more", "test split"):
        shutil.copy(first, first.with_name("new.png"))
    elif change == "renamed":
        first.rename(first.with_name("zzz.png"))
    options = {"teacher": network, "student": network, "dataset": dataset, "output": tmp_path / "f.json"}
    monkeypatch.setattr(evaluate, "compare", lambda *given, **options: {})  # what is measured does not matter
    call(monkeypatch, **options)
    assert ("Evaluate with the images of that run" in caplog.text) == (change in ("more", "renamed"))


def test_the_revision_of_the_dataset_is_that_of_the_run(tmp_path):
    record = {"dataset": "user/images", "dataset_revision": "v1", "validation_size": 9}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": record}))
    followed = DataArguments(dataset="user/images").follow(str(tmp_path))
    assert (followed.dataset_revision, followed.validation_size) == ("v1", 9)
    same = DataArguments(dataset="user/images", dataset_revision="v1").follow(str(tmp_path))
    assert same.validation_size == 9
    other = DataArguments(dataset="user/images", dataset_revision="v2").follow(str(tmp_path))
    assert (other.dataset_revision, other.validation_size, other.holds_out_by_default) == ("v2", None, False)


def test_a_head_of_another_kind(tmp_path):
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="layers.0.weight"):
        load_head(tmp_path)


def test_as_a_command(tmp_path):
    run = run_program([ROOT / "recipes" / "evaluate.py", "--teacher", "nowhere/nothing"], cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert (
        run.stderr.startswith("error: --student, --dataset and --output are missing")
        and len(run.stderr.strip().splitlines()) == 1
    )


def test_the_figures_are_those_of_the_run(tmp_path, image_parquet, networks, monkeypatch, capsys):
    """Other sizes, pooling and seed of the random row than the run's gave a table that contradicted its record."""
    models = ModelArguments(networks.teacher, networks.resnet, teacher_size=24, teacher_pooling="gap", student_size=20)
    data = DataArguments(dataset=str(image_parquet), neighbors_cache=str(tmp_path / "cache"))
    args = DistillationArguments(
        str(tmp_path / "out"),
        settings="paper",
        per_device_train_batch_size=8,
        max_steps=2,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        seed=3,
    )
    run = build_run(models, data, args)
    run.train()
    record = run.report().record
    options = {"teacher": networks.teacher, "student": tmp_path / "out", "dataset": image_parquet}
    found = call(monkeypatch, **options, output=tmp_path / "f.json")
    for name, row in record["results"].items():
        assert {key: value for key, value in found[name].items() if key != "name"} == pytest.approx(
            {key: value for key, value in row.items() if key != "name"}, abs=1e-6
        )
    assert found["seed"] == 3 and found["images"] == record["evaluated_images"] == 24
    out = capsys.readouterr().out
    assert "Overlap on 24 images, where 43.5 % would be chance." in out
    # What is given stands.
    other = call(monkeypatch, **options, output=tmp_path / "g.json", seed=5, teacher_pooling="pooler")
    assert other["seed"] == 5 and other["random"] != found["random"]


def test_an_overlap_that_is_not_measured_has_no_chance_level():
    """Ten images have no 11th: the line said that 100 % would be chance."""
    assert overlap_on(10) == ("Overlap: not measured, since it needs 11 images or more, and there are 10.")
    assert overlap_on(24).startswith("Overlap on 24 images, where 43.5 %")
