"""recipes/reproduce.py, recipes/compare.py and recipes/report.py."""

import json
import os
import signal
import sys
import time
from dataclasses import replace

import datasets
import pytest

import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.study.comparison import held_out_size
from coss_hf.study.trials import UNTRAINED
from coss_hf.trainer.arguments import DataArguments
from tests.helpers.processes import Program

reproduce, compare, report = load_recipe("reproduce"), load_recipe("compare"), load_recipe("report")


def words(**options) -> list[str]:
    found = []
    for key, value in options.items():
        found += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return found


@pytest.fixture
def refused(tmp_path, image_parquet, networks, monkeypatch, capsys):
    def run(recipe, **options):
        output = {"dataset": image_parquet, "output_dir": tmp_path / "out", "use_cpu": True}
        monkeypatch.setattr(sys, "argv", ["recipe.py", *words(**output | options)])
        with pytest.raises(SystemExit) as exit:
            recipe.main()
        assert exit.value.code == 2
        assert not list((tmp_path / "out").rglob("*.json*"))
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": ["resnet20/resnet110"]}, "--pairs='resnet20/resnet110' is unknown: choose among resnet20/"),
        ({"methods": ["sed"]}, "--methods='sed' is neither a row of table 1 (at, sp, "),
        ({"table": 3, "methods": ["lambda 2"]}, "--methods='lambda 2' is neither a row of table 3 (lambda 0, "),
        ({"methods": ["seed(queue_size=7)"]}, "queue_size=7 must be a multiple of the batch"),
        ({"budget": 1e-7}, "--budget=1e-07 of 240 epochs of 40 images is less than one step: give at least"),
        ({"choice_budget": 1e-7}, "--choice_budget=1e-07 of 240 epochs"),
        ({"test_split": "no"}, "--test_split"),
        ({"budget": 1e-7, "choice_budget": 1}, "--budget=1e-07 of 240 epochs of 40 images is less than one step"),
        ({"budget": 0}, "--budget=0.0 must be above 0"),
        ({"scales": [1, 0]}, "--scales=[1.0, 0.0] must be above 0"),
        ({"finalists": 0, "methods": ["at"]}, "--finalists=0 reports CoSS alone, and --methods has no coss: add it"),
        ({"eval_at": [0.5], "validation_size": 0, "scales": 1}, "--eval_at=[0.5] measures on images held out of train"),
        ({"seeds_of_others": 4}, "--seeds_of_others=4 must be from 0 to --seeds=3"),
        ({"seeds_of_others": 1}, "--seeds_of_others=1 is for the rows that are no finalists: give --finalists"),
        ({"teacher": "x"}, "--teacher=x is one, --pairs are 3"),
        ({"validation_size": 0}, "--validation_size: the scales are chosen on images held out"),
        ({"metric": "eval_knn"}, "--metric: invalid choice: 'eval_knn'"),
    ],
)
def test_reproduce_rejects_invalid_arguments(refused, options, message):
    """Before a teacher is trained."""
    assert message in refused(reproduce, **{"validation_size": 8, "batch_size": 8} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--hours or --num_images: give one of them"),
        ({"num_images": 64, "hours": 1}, "--hours or --num_images: give one of them"),
        ({"num_images": 64, "method": "rkd"}, "--method and --beta: give --methods"),
        ({"num_images": 64, "seeds": 2}, "--seeds=2 must be at least 3"),
        ({"num_images": 64, "seed": 7}, "--seed=7: the runs have the seeds 1 to 3"),
        ({"num_images": 64, "validation_size": 0}, "--validation_size: hold images out of train"),
        ({"num_images": 64, "methods": ["coss", "kd"]}, "--methods kd: --teacher"),
        ({"num_images": 64, "methods": ["coss", "nothing"]}, "--methods='nothing': there is no method 'nothing'"),
        ({"num_images": 64, "methods": ["coss +"]}, "--methods='coss +': '' cannot be read"),
        ({"num_images": 64, "jobs": 0}, "--jobs=0 must be at least 1"),
        ({"num_images": 64, "load_best_model_at_end": True}, "--load_best_model_at_end: it is for a single run"),
        ({"num_images": 64, "eval_steps": 5}, "--eval_steps: it is for a single run"),
        ({"num_images": 64, "hub_model_id": "a/b"}, "--hub_model_id: it is for a single run"),
        (
            {"num_images": 96, "neighbors_k": 4, "neighbors_pool": 4},
            '--per_device_train_batch_size=8 with --neighbors_k=4: a step of the row "coss, no neighbours" has as many '
            "images as the others, 40, and no neighbours among them, but there are 36 training images; give "
            "--per_device_train_batch_size 7 at most, ",
        ),
        ({"hours": 1e-9, "methods": ["rkd"]}, "is too short for these runs, which need"),
        ({"num_images": 4}, "--num_images=4 is less than one step"),
        ({"num_images": 64, "dry_run": True}, "--dry_run: it is for a single run, and this command makes many"),
        ({"num_images": 64, "push_to_hub": True}, "--push_to_hub: it is for a single run"),
        ({"num_images": 64, "eval_strategy": "epoch"}, "--eval_strategy: it is for a single run"),
        ({"num_images": 64, "resume_from_checkpoint": True}, "--resume_from_checkpoint: it is for a single run"),
        ({"num_images": 64, "overwrite_output_dir": True}, "--overwrite_output_dir: it is for a single run"),
    ],
)
def test_compare_rejects_invalid_arguments(refused, networks, options, message):
    models = {"teacher": networks.teacher, "student": networks.resnet, "per_device_train_batch_size": 8}
    assert message in refused(compare, **models | {"validation_size": 12} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--hours or --num_images: give one of them"),
        ({"num_images": 64, "method": "rkd"}, "--method=rkd: a report is of CoSS at its own beta; leave it out, or"),
        ({"num_images": 64, "beta": 3}, "compare other methods with coss-hf compare --methods"),
        ({"num_images": 64, "timing_rounds": 0}, "--timing_rounds=0"),
        ({"num_images": 64, "seeds": 2}, "--seeds=2 must be at least 3"),
    ],
)
def test_report_rejects_invalid_arguments(refused, networks, options, message):
    models = {"teacher": networks.teacher, "student": networks.resnet, "per_device_train_batch_size": 8}
    assert message in refused(report, **models | options)


def test_a_dataset_without_test_images_or_labels(refused, tmp_path, image_parquet):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train.parquet").write_bytes((image_parquet / "train.parquet").read_bytes())
    options = {"validation_size": 8, "batch_size": 8, "pairs": ["resnet20/resnet56"]}
    assert "--test_split: a table is reported on test images" in refused(reproduce, **options, dataset=alone)
    for split in ("train", "test"):
        images = datasets.Dataset.from_parquet(str(image_parquet / f"{split}.parquet"))
        images.select_columns("image").to_parquet(alone / f"{split}.parquet")
    options["output_dir"] = tmp_path / "other"
    assert "--metric=linear needs labels" in refused(reproduce, **options, dataset=alone)


def test_methods_are_compared_on_held_out_images_by_default(image_parquet, tmp_path):
    data = DataArguments(dataset=str(image_parquet))
    assert held_out_size(data) == 4 and held_out_size(replace(data, validation_size=0)) == 0
    for split, rows in (("train", 20), ("validation", 9), ("test", 9)):
        images = datasets.Dataset.from_parquet(str(image_parquet / "train.parquet")).select(range(rows))
        images.to_parquet(tmp_path / "own" / f"{split}.parquet")
    own = DataArguments(dataset=str(tmp_path / "own"), validation_size=None)
    own = replace(own, validation_size=held_out_size(own))
    assert own.validation_size == 0 and len(own.load().validation) == 9


def start(recipe: str, **options) -> Program:
    return Program([f"{h.ROOT}/recipes/{recipe}.py", *words(**options)])


def finish(process: Program) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("recipe", [compare, report])
def test_a_study_takes_one_gpu_before_its_arguments_are_checked(recipe, monkeypatch):
    """They are those of a training, which refuses several GPUs in one process."""
    calls = []

    def parsed(*args, **options):
        calls.append("parse")
        raise ValueError("enough")

    monkeypatch.setattr(recipe, "take_one_gpu", lambda: calls.append("take"))
    monkeypatch.setattr(recipe, "parse", parsed)
    with pytest.raises(SystemExit):
        recipe.main()
    assert calls == ["take", "parse"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_with_the_same_file(tmp_path, image_parquet):
    """Teacher first, two methods at two scales, then two seeds; killed in the teacher's training, in that of a trial,
    and where some are finished."""
    budget = {"budget": 960 / 36 / 240, "teacher_epochs": 8, "validation_size": 12, "seeds": 2, "jobs": 2}
    budget |= {"save_steps": 7, "eval_at": [0.5, 1]}
    options = {"dataset": image_parquet, "pairs": ["resnet20/resnet56"], "methods": ["at", "coss"], "scales": [0.5, 1]}
    options |= budget | {"use_cpu": True, "batch_size": 16}
    finish(start("reproduce", **options, output_dir=tmp_path / "whole"))
    for name, count in (("teachers/*/checkpoint-*", 1), ("trials/*/checkpoint-*", 1), ("trials/*.json", 5)):
        process = start("reproduce", **options, output_dir=tmp_path / "killed")
        while len(list((tmp_path / "killed").glob(name))) < count:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)  # its workers must end by themselves
        process.communicate()
    finish(start("reproduce", **options, output_dir=tmp_path / "killed"))

    def rows(name):
        lines = (tmp_path / name / "table1.jsonl").read_text().replace(str(tmp_path / name), "").splitlines()
        found = [json.loads(line) for line in lines]
        # What the teacher embedded depends on what the other job had left in the cache by then.
        return [{key: value for key, value in row.items() if key != "teacher_images"} for row in found]

    assert rows("killed") == rows("whole") and len(rows("whole")) == 4 + 4 + 2 + 1 + 2 * 4
    during = [(row["split"], row["seed"], row["share"]) for row in rows("whole") if "share" in row]
    assert during == [("validation", seed, share) for seed in (1, 2) for share in (0.5, 1)] * 2
    assert max(row["images_seen"] for row in rows("whole")) == 960
    assert not list((tmp_path / "killed" / "teachers").rglob("checkpoint-*"))
    assert "trained first, for 8 epochs" in (tmp_path / "whole" / "table1.md").read_text()
    assert "of the paper's 240 epochs" in (tmp_path / "whole" / "table1.md").read_text()


@pytest.mark.slow
def test_a_comparison(tmp_path, image_parquet, networks):
    models = {"teacher": networks.teacher, "student": networks.resnet, "methods": ["rkd", "seed + coss(lambda_co=0)"]}
    options = models | {
        "dataset": image_parquet,
        "output_dir": tmp_path / "out",
        "num_images": 96,
        "validation_size": 12,
    }
    training = {"per_device_train_batch_size": 8, "augmentation": "cifar", "use_cpu": True, "lambda_ss": 0.5}
    neighbors = {"neighbors_k": 1, "neighbors_pool": 4, "neighbors_cache": tmp_path / "cache"}
    out = finish(start("compare", **options, **training, **neighbors, view_epochs=2))
    names = ["rkd", "seed + coss(lambda_co=0)", "coss", "coss, cosine only", "coss, no neighbours", "random", "teacher"]
    assert all(f"| {name} |" in out for name in names) and "96 images seen" in out
    assert "noise" in out and (tmp_path / "out" / "compared.png").exists()
    assert "shared the teacher's embeddings of these views." in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "compared.jsonl").read_text().splitlines()]
    assert len(rows) == 5 * 3 + 3 + 1 + 1 and {row["split"] for row in rows} == {"validation"}
    assert {row["images_seen"] for row in rows if row["method"] not in UNTRAINED} == {96}
    assert [row["extra_teacher_images"] for row in rows if row["method"] == "rkd"] == [36] * 3


@pytest.mark.slow
def test_a_report(tmp_path, image_parquet, networks):
    """Of a student that has weights of its own and a head."""
    student = h.save_resnet(tmp_path / "own", seed=9, hidden_sizes=(4, 4, 8))  # no seed of a run
    options = {"teacher": networks.teacher, "student": student, "dataset": image_parquet, "num_images": 96}
    training = {"per_device_train_batch_size": 8, "augmentation": "cifar", "use_cpu": True, "timing_rounds": 2}
    neighbors = {"neighbors_k": 1, "neighbors_pool": 4, "neighbors_cache": tmp_path / "cache"}
    out = finish(start("report", **options, **training, **neighbors, output_dir=tmp_path / "out"))
    names = ["coss", "coss, cosine only", "coss, no neighbours", "random", "initial", "teacher"]
    assert all(f"| {name} |" in out for name in names) and "96 images seen, 3 seeds" in out
    assert "Before the first step of each run the teacher also embedded: 48 images for coss, cosine only" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 3 + 3 + 1 + 1
    initial = next(row for row in rows if row["method"] == "initial")
    assert initial["cka"] not in {row["cka"] for row in rows if row["method"] == "random"}
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["verdict"][0].startswith(("It helped", "It did not help")) and found["images_seen"] == 96
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(sentence.replace("'", "&#x27;") in page for sentence in found["verdict"]) and "data:image/png" in page
