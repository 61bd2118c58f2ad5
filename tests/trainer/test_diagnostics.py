import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, TrainerCallback

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.evaluation.agreement import duplicate_share
from coss_hf.evaluation.diagnostics import alarms, chance, evaluations, few_images, is_gentle
from coss_hf.evaluation.embeddings import evaluate_embeddings
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.trainer.callbacks.diagnostics import DiagnosticsCallback


def evaluation(overlap=0.02, rank=20.0, teacher=36.0, duplicates=0.0, dead=0.0, same=0.0):
    return {
        "eval_overlap10": overlap,
        "eval_effective_rank": rank,
        "eval_teacher_effective_rank": teacher,
        "eval_teacher_duplicates": duplicates,
        "eval_dead_dimensions": dead,
        "eval_duplicates": same,
    }


def test_a_healthy_run_raises_no_alarm():
    history = [evaluation(), {"loss": 1.0}, evaluation(0.10, 25), {"loss": 0.5}, evaluation(0.2, 30)]
    assert alarms(history, 2000, finished=True) == {}
    # A little lower than at its best, and a network whose random weights embed all images nearly alike.
    assert alarms([evaluation(rank=2.5), evaluation(0.10, 3), evaluation(0.09, 3)], 2000, finished=True) == {}
    assert alarms([], 2000) == {}
    # As measured, evaluated each 1,500 images: the first steps press all images together, and set out below the start.
    early = [
        evaluation(0.0181, 21.8),
        evaluation(0.0141, 3.2),
        evaluation(0.0198, 13.8),
        evaluation(0.0259, 19.7),
        evaluation(0.0269, 19.1),
    ]
    assert all(alarms(early[:count], 2000) == {} for count in range(6)) and alarms(early, 2000, finished=True) == {}


def test_names_in_the_history_are_read_without_their_prefix():
    history = [{"loss": 1.0, "step": 1}, evaluation() | {"eval_loss": 0.5, "step": 2}, {"eval_loss": 0.4, "step": 3}]
    (found,) = evaluations(history)
    assert found == {
        "overlap10": 0.02,
        "effective_rank": 20.0,
        "teacher_effective_rank": 36.0,
        "teacher_duplicates": 0.0,
        "dead_dimensions": 0.0,
        "duplicates": 0.0,
        "loss": 0.5,
        "step": 2,
    }


@pytest.mark.parametrize(
    ("history", "name"),
    [
        ([evaluation(teacher=1.4)], "teacher"),
        ([evaluation(duplicates=0.3)], "teacher"),
        ([evaluation(), evaluation(0.1, rank=1.2), evaluation(0.1, rank=1.2)], "collapse"),
        ([evaluation(), evaluation(0.1, rank=3.0), evaluation(0.1, rank=3.0)], "collapse"),
        ([evaluation(), evaluation(0.1, dead=0.8), evaluation(0.1, dead=0.8)], "collapse"),
        ([evaluation(), evaluation(0.1, same=0.9), evaluation(0.1, same=0.9)], "collapse"),
        ([evaluation(), evaluation(0.021), evaluation(0.022), evaluation(0.021)], "no_progress"),
        ([evaluation(), evaluation(0.01), evaluation(0.01), evaluation(0.01)], "no_progress"),
    ],
)
def test_alarms_are_raised(history, name):
    found = alarms(history, 2000)
    assert list(found) == [name] and "--" in found[name]


def test_duplicates_that_the_teacher_sees_too_are_no_collapse():
    """Four frames of a film each come as one image to any network."""
    film = [evaluation(duplicates=0.75, same=0.75), evaluation(0.1, 25, duplicates=0.75, same=0.8)]
    assert "collapse" not in alarms([*film, film[-1]], 2000, finished=True)
    # Of what the teacher tells apart, more than half merged.
    merged = [film[0], evaluation(0.1, 25, duplicates=0.75, same=0.95), evaluation(0.1, 25, duplicates=0.75, same=0.95)]
    assert "collapse" in alarms(merged, 2000)
    # Few different images: the teacher's rank is low, and so is the student's; a constant is another matter.
    few = evaluation(0.1, rank=1.5, teacher=1.6)
    assert "collapse" not in alarms([few, few, few], 2000, finished=True)
    assert "collapse" in alarms([few, evaluation(0.1, 0.0, 1.6), evaluation(0.1, 0.0, 1.6)], 2000, finished=True)


def test_a_handful_of_images_raises_no_alarm():
    """Ranks cannot exceed the number of images, and neighbours of 20 images are mostly there by chance."""
    bad = [evaluation(0.5, 1.2), evaluation(0.4, 1.1), evaluation(0.4, 1.1), evaluation(0.4, 1.1)]
    assert alarms(bad, 49, finished=True) == {} and {*alarms(bad, 50, finished=True)} == {"collapse", "no_progress"}


def test_missing_progress_says_how_short_the_run_is_and_what_chance_is():
    def at(images):
        return alarms([evaluation(), evaluation() | {"images_seen": images}], 2000, finished=True)["no_progress"]

    assert "2.0 % before training (on 2,000 images, where 0.5 % would be chance)" in at(640)
    assert "The run is short: 640 images seen so far" in at(640) and "is short" not in at(500_000)


def test_chance_and_few_images():
    assert chance(60) == pytest.approx(10 / 59) and chance(5) == 1
    assert few_images(60).startswith(
        "This is measured on 60 images alone, of which one is 1.7 points"
    ) and not few_images(500)


def test_missing_progress_is_reported_after_three_evaluations_or_at_the_end():
    history = [evaluation(), evaluation(0.02)]
    assert alarms(history, 2000) == {} and "no_progress" in alarms(history, 2000, finished=True)
    # Three standard errors of 100 images are more than those of 2,000.
    assert alarms([evaluation(), evaluation(0.03)], 2000, finished=True) == {}
    assert "no_progress" in alarms([evaluation(), evaluation(0.03)], 100, finished=True)


@pytest.mark.parametrize("resumed", [True, False])
def test_an_alarm_is_raised_only_once_even_after_resuming(caplog, resumed):
    callback = DiagnosticsCallback(2000, True)
    state = SimpleNamespace(global_step=1, max_steps=9, is_world_process_zero=True, log_history=[evaluation()])
    with caplog.at_level(logging.WARNING):
        for entry in (evaluation(0.1, 1.2), evaluation(0.2, 1.1), evaluation(0.3, 20.0), evaluation(0.3, 1.1)):
            state.log_history.append(entry)
            if resumed:
                callback = DiagnosticsCallback(2000, True)  # as a new process has
            callback.on_evaluate(None, state, None)
    assert [record.message[:29] for record in caplog.records] == ["ALARM: The student has collap"]


def test_alarms_never_ask_for_a_higher_rate():
    """A student below random weights was thrown there by its first steps; the alarm once advised to raise the rate."""
    found = alarms([evaluation(), evaluation(0.01, 1.1)], 2000, finished=True)
    alone = alarms([evaluation(), evaluation(0.01)], 2000, finished=True)
    assert "Lower --learning_rate" in found["collapse"]
    assert "warmup" not in found["no_progress"], "one advice"
    text = alone["no_progress"]
    assert "--warmup_steps 0.1 and --max_grad_norm 1.0" in text and "--settings auto" in text
    # It advised what the training did already.
    gentle = alarms([evaluation(), evaluation(0.01)], 2000, finished=True, gentle=True)["no_progress"]
    assert "switched on already: try a smaller --learning_rate" in gentle and "--warmup_steps" not in gentle
    assert not any("raise --learning_rate" in text for text in (found["no_progress"], text, gentle))
    assert is_gentle(SimpleNamespace(warmup_steps=0.1, max_grad_norm=1.0))
    assert not is_gentle(SimpleNamespace(warmup_steps=0.1, max_grad_norm=0.0))


def test_duplicates_have_the_same_direction():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert duplicate_share(x) == 0
    assert duplicate_share(torch.cat([x, 3 * x[:10]])) == pytest.approx(20 / 50)
    assert duplicate_share(torch.ones(5, 3)) == 1 and duplicate_share(x[:1]) == 0


def test_diagnostics_of_embeddings():
    teacher = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    metrics = evaluate_embeddings(teacher @ rotation, teacher, diagnostics=True)
    assert metrics["cka"] == pytest.approx(1) and metrics["overlap10"] == pytest.approx(1)
    assert metrics["cosine"] < 0.9 and metrics["dimension_cosine"] < 0.9
    assert 5 < metrics["effective_rank"] <= 6 and metrics["dead_dimensions"] == 0
    narrow = evaluate_embeddings(teacher[:, :3], teacher, projected=teacher, diagnostics=True)
    assert narrow["cosine"] == pytest.approx(1) and narrow["effective_rank"] <= 3


@pytest.mark.parametrize(("n", "held_out"), [(196, 0), (200, 20), (428, 42)])
def test_images_are_held_out_by_default(tmp_path, n, held_out):
    images = h.write_images(tmp_path / "images", train=n)
    splits = load_images(str(images), validation_size=None)
    assert len(splits.validation or []) == held_out and len(splits.train) == n - held_out
    hashes = [set(rows["image_hash"]) for rows in (splits.train, splits.validation) if rows is not None]
    assert len(set.union(*hashes)) == n


def test_the_best_student_is_kept(tmp_path, image_parquet, networks):
    """By default a short run is evaluated before its first step and after its last."""

    def make_evaluator(splits, teacher):
        return Evaluator(teacher, splits.test, splits.image_column, diagnostics=True)

    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, evaluator=make_evaluator)
    assert trainer.args.eval_steps == round(50_000 / 8)
    trainer.train()
    seen = [line for line in trainer.state.log_history if "eval_overlap10" in line]
    assert [line["step"] for line in seen] == [0, 6]
    assert {"eval_cka", "eval_teacher_effective_rank", "eval_duplicates"} <= seen[0].keys()
    assert trainer.state.best_metric == seen[1]["eval_overlap10"]
    kept = AutoModel.from_pretrained(tmp_path / "out" / "best").state_dict()
    h.assert_same(kept, trainer.student.model.state_dict(), but=h.UNTRAINED)


def test_the_kept_student_need_not_be_the_last(tmp_path, image_parquet, networks):
    def make_evaluator(splits, teacher):
        return Evaluator(teacher, splits.test, splits.image_column, diagnostics=True)

    options = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1.0, "save_strategy": "no"}
    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, networks.vit, evaluator=make_evaluator, **options
    )
    states = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            states[state.global_step] = {k: v.clone() for k, v in trainer.student.model.state_dict().items()}

    trainer.add_callback(Keep)
    trainer.train()
    overlaps = {line["step"]: line["eval_overlap10"] for line in trainer.state.log_history if "eval_cka" in line}
    del overlaps[0]  # what training has not touched is no student to keep
    best = max(overlaps, key=overlaps.get)
    assert best != 6, "learning rate 1 is wild enough for the best not to be the last"
    kept = AutoModel.from_pretrained(tmp_path / "out" / "best").state_dict()
    h.assert_same(kept, states[best], but=h.UNTRAINED)


def test_no_evaluation_without_held_out_images(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    trainer.train()
    assert not (tmp_path / "out" / "best").exists()
