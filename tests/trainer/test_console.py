"""What a training prints: lines that a person reads."""

import json
import re

import pytest

import tests.helpers.runs as h
from coss_hf.evaluation.diagnostics import few_images
from coss_hf.losses import CoSSLoss
from coss_hf.reporting.closing import closing_summary, next_lines
from coss_hf.trainer.callbacks.console import clock, evaluation_line
from coss_hf.utils.messages import command_line


@pytest.fixture
def printed(tmp_path, image_parquet, networks, capsys):
    def run(**options) -> list[str]:
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options).train()
        return capsys.readouterr().out.splitlines()

    return run


def test_console_prints_one_line_per_log_step(printed):
    *steps, last, following = printed(max_steps=4, logging_steps=2)
    assert len(steps) == 2 and last.startswith("trained 4 steps in 0:0") and following.startswith("Next: ")
    parts = steps[0].split(" · ")
    assert parts[:2] == ["step 2/4", "16 images"]
    assert (
        parts[2].endswith(")") and " % from the optimum (co 0." in parts[2].replace("%", " %") and "ss 0." in parts[2]
    )
    assert parts[3].startswith("lr 0.") and "img/s (teacher " in parts[4] and "data wait" in parts[4]
    assert parts[5].endswith(" left") and "{" not in steps[0]


def test_other_losses_are_printed_with_their_parts(printed):
    line = printed(max_steps=2, logging_steps=2, method="coss + rkd")[0]
    assert " · loss " in line and "coss_l_co " in line and "rkd " in line and "optimum" not in line


def test_log_format_json_prints_one_object_per_line(printed):
    entries = [json.loads(line) for line in printed(max_steps=2, logging_steps=1, log_format="json")]
    assert [entry["step"] for entry in entries] == [1, 2, 2] and entries[0]["l_co"] < 0 < entries[0]["images_seen"]
    assert 0 <= entries[1]["teacher_share"] <= 1 and 0 <= entries[1]["data_wait_share"] <= 1


def test_shares_of_the_time_are_those_of_the_steps(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, max_steps=4, logging_steps=4)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "teacher_share" in entry)
    assert 0 < entry["teacher_share"] < 1 and entry["teacher_share"] + entry["data_wait_share"] < 1.01


def test_an_evaluation_is_one_line():
    logs = {
        "eval_overlap10": 0.365,
        "eval_effective_rank": 2.669,
        "eval_teacher_effective_rank": 2.2,
        "eval_runtime": 1,
    }
    expected = (
        "evaluation at step 7 · neighbours shared with the teacher 36.5 % · effective rank 2.7 · the teacher's 2.2"
    )
    assert evaluation_line(7, logs) == expected
    for prefix in ("test", "eval_flowers"):
        named = {key.replace("eval", prefix, 1): value for key, value in logs.items()}
        name = prefix.removeprefix("eval_")
        assert evaluation_line(7, named) == expected.replace("step 7", f"step 7, {name}"), "lines were empty"


def test_optimum_of_coss():
    assert CoSSLoss(beta=50, lambda_ss=0.5).optimum == -75


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (7390, "2:03:10")])
def test_durations_are_printed_as_hours_minutes_seconds(seconds, text):
    assert clock(seconds) == text


def test_closing_summary_says_what_to_do_next(monkeypatch):
    monkeypatch.setenv("COSS_HF_COMMAND", "coss-hf distill")
    text = closing_summary("runs/my-student", {"results": {}, "verdict": ["It learnt."]}, in_teacher_space=True)
    assert "It learnt." in text and "runs/my-student/report.html" in text
    assert 'coss_hf.Student.from_pretrained("runs/my-student")' in text
    assert "coss-hf push runs/my-student --repo_id USER/my-student" in text


@pytest.mark.parametrize(
    ("images", "split", "expected"),
    [
        (None, None, "To evaluate the next run, hold images out of the training with --validation_size."),
        (40, "validation", "To measure on more, hold out more with --validation_size."),
        (40, "test", "Give more test images."),
        (4000, "test", ""),
    ],
)
def test_closing_summary_says_how_to_measure_on_more_images(images, split, expected):
    """It said to hold more out of train where a test split was measured, and the card said so, too."""
    record = {"results": {}, "verdict": ["It learnt."], "evaluated_images": images, "evaluated_on": split}
    with command_line():
        first = closing_summary("out", record, in_teacher_space=True).split("\n\n")[0]
    assert "--" not in closing_summary("out", record, in_teacher_space=True).split("\n\n")[0]
    assert first == f"It learnt.\n{expected}".strip()
    assert "--" not in few_images(40) and few_images(4000) == ""


def test_closing_summary_in_python_and_of_a_plain_module():
    """The lines that use the student of a plain module failed: only its owner can build it."""
    record = {"results": {}, "verdict": []}
    text = closing_summary("out", record, in_teacher_space=True, from_module=True, in_python=True)
    assert 'Student.from_pretrained("out", module=...)' in text and "    trainer.push_to_hub()" in text
    assert "coss-hf push" not in text
    text = closing_summary("out", record, in_teacher_space=False, from_module=True)
    assert 'coss_hf.load_backbone("out", module=...)' in text and "Student" not in text


@pytest.mark.parametrize(("in_space", "call"), [(True, "Student.from_pretrained"), (False, "embed")])
def test_closing_summary_allows_code_of_the_student(in_space, call):
    """That of a plain module's image processor was left out."""
    made = closing_summary("out", {"results": {}, "verdict": []}, in_space, from_module=True, own_code=True)
    assert '("out", module=..., trust_remote_code=True)  # built as' in made
    text = closing_summary("out", {"results": {}, "verdict": []}, in_space, own_code=True)
    assert re.search(rf'coss_hf.{call}\("out".*, trust_remote_code=True\)', text)


def test_what_follows_a_training():
    history = [
        {"eval_overlap10": overlap, "eval_effective_rank": 2.0, "step": step}
        for step, overlap in ((0, 0.125), (2, 0.75), (4, 0.5))
    ]
    overlaps, following = next_lines("out", history, 4).splitlines()
    assert overlaps.endswith(": 12.5 % before the training, 50.0 % after it.")
    assert following.startswith("Next: ") and "to out, and trainer.report()" in following
    alone = next_lines("out", history[:1], 4, can_report=False)
    assert alone == "Next: trainer.save_model() writes the student to out."


def test_the_overlap_is_that_of_the_student_that_stays():
    """It was that of the last evaluation, "after the training": also of a student that the best one had replaced."""
    history = [
        {"eval_overlap10": overlap, "eval_effective_rank": 2.0, "step": step}
        for step, overlap in ((0, 0.125), (2, 0.75), (4, 0.5))
    ]
    assert " 75.0 % at step 2, whose student was the best and is loaded." in next_lines("out", history, 5, best=2)
    assert " 50.0 % at step 4." in next_lines("out", history, 5)
    assert "shared with" not in next_lines("out", history[1:], 5), "nothing was measured before the training"
