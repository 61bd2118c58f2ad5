"""SIGTERM and Ctrl-C in a training: the step is saved, and the process ends with the code of the signal."""

import os
import signal

import pytest
from transformers import TrainerCallback, TrainerControl

import tests.helpers.runs as h
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.callbacks.preemption import PATIENCE, PATIENCE_TO_SAVE, TIMES_A_STEP, Preemption
from coss_hf.trainer.checkpoint_files import incomplete
from coss_hf.trainer.supervised import TeacherArguments, build_supervised_run
from coss_hf.utils.ending import ENDING


class Send(TrainerCallback):
    """Sends a signal to this process at an event of a step."""

    def __init__(self, number: int, event: str, step: int):
        self.step = step

        def send(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, event, send)


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_the_step_is_saved(tmp_path, image_parquet, networks, capsys, number, code, name):
    """Ctrl-C ended with a traceback, and the steps since the last checkpoint were lost."""
    arguments = (tmp_path, image_parquet, networks.teacher, networks.resnet)
    whole = h.make_trainer(*arguments, output_dir=str(tmp_path / "whole"))
    whole.train()
    trainer = h.make_trainer(*arguments)
    trainer.add_callback(Send(number, "on_pre_optimizer_step", 2))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == code and signal.getsignal(number) is before and not ENDING.installed
    assert f"{name}: step 3 is saved; resume by train(resume_from_checkpoint=True)." in capsys.readouterr().out
    again = h.make_trainer(*arguments)
    again.train(resume_from_checkpoint=True)
    h.assert_same(h.state(again), h.state(whole))


def test_signal_during_evaluation_starts_no_further_step(tmp_path, image_parquet, networks):
    class Signalled(Evaluator):
        def __call__(self, *args):
            if trainer.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*args)

    trainer = h.make_trainer(
        tmp_path,
        image_parquet,
        networks.teacher,
        networks.resnet,
        evaluator=lambda splits, teacher: Signalled(teacher, splits.test, splits.image_column),
        eval_strategy="steps",
        eval_steps=2,
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [line["step"] for line in trainer.state.log_history if "eval_cosine" in line] == [0, 2]


def test_a_supervised_training_saves_its_step(tmp_path, image_parquet, networks):
    args = TeacherArguments(
        output_dir=str(tmp_path / "out"),
        model=networks.vit,
        per_device_train_batch_size=8,
        max_steps=4,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    run = build_supervised_run(DataArguments(dataset=str(image_parquet)), args)
    run.trainer.add_callback(Send(signal.SIGTERM, "on_pre_optimizer_step", 1))
    with pytest.raises(SystemExit) as stop:
        run.train()
    assert stop.value.code == 143
    assert incomplete(tmp_path / "out" / "checkpoint-2") is None


def test_a_checkpoint_is_waited_for_longer_than_a_step():
    """A signal during a save of minutes ended the process after half a minute, and the steps before it were lost."""
    preemption = Preemption()
    control = TrainerControl()
    with preemption:
        assert ENDING.grace() == PATIENCE_TO_SAVE, "the evaluation before the first step"
        preemption.on_step_begin(None, None, control)
        assert ENDING.grace() == PATIENCE
        preemption.on_step_end(None, None, control)
        assert ENDING.grace() == PATIENCE
        control.should_save = True
        preemption.on_step_end(None, None, control)
        assert ENDING.grace() == PATIENCE_TO_SAVE
        preemption.on_step_begin(None, None, control)
        preemption._longest_step = PATIENCE
        assert ENDING.grace() == TIMES_A_STEP * PATIENCE
