"""What a run draws in a step is a function of its seed and the step alone, whatever ran before and between.

Dropout, drop path and CRD's negatives come from torch's global generator. A search for neighbours that is not in the
cache, an evaluation and the loaders that they start draw from it as well: all of these gave another student.
"""

import pytest
import torch
from transformers import TrainerCallback, set_seed

import tests.helpers.runs as h
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.supervised import TeacherArguments, build_supervised_run
from coss_hf.utils.randomness import StepSeed

STEPS = 7  # 6 an epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    return {
        "teacher": h.save_resnet(folder / "teacher", seed=1),
        "resnet": h.save_resnet(folder / "resnet", seed=2),
        "vit": h.save_vit(folder / "vit", seed=2, **dropout),
        "swin": h.save_swin(folder / "swin", seed=2, drop_path_rate=0.5),
        "images": h.write_images(folder / "images"),
        "folder": folder,
    }


SET_UPS = {
    "crd": ("resnet", {"method": "crd(negatives=5)"}),
    "dropout": ("vit", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "drop path": ("swin", {}),
}


def make(world, kind: str, output, **options):
    student, own = SET_UPS[kind]
    data = DataArguments(neighbors_cache=str(world["folder"] / f"neighbours of {kind}"))
    options = {"neighbors_k": 1, "neighbors_pool": 3, "max_steps": STEPS, **own, **options}
    set_seed(3)  # as a run does, for what the student's checkpoint lacks
    return h.make_trainer(output, world["images"], world["teacher"], world[student], data=data, **options)


def panel(splits, teacher):
    return Evaluator(
        teacher,
        splits.test,
        splits.image_column,
        label_column=splits.label_column,
        train_images=splits.train,
        diagnostics=True,
    )


class Drawing(TrainerCallback):
    """Draws where another program might, as often as the step has a number."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(state.global_step + 1)

    on_substep_end = on_step_end = on_step_begin


@pytest.mark.parametrize("kind", ["crd", *[pytest.param(kind, marks=pytest.mark.slow) for kind in list(SET_UPS)[1:]]])
def test_neighbours_evaluations_and_resumption_leave_the_student_as_it_is(world, tmp_path, kind):
    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    cold = make(world, kind, tmp_path, **saved)
    cold.train()
    expected = h.state(cold)

    evaluated = {"evaluator": panel, "eval_strategy": "steps", "eval_steps": 2}
    warm = make(world, kind, tmp_path / "warm", **evaluated)
    warm.add_callback(Drawing)
    warm.train()
    h.assert_same(h.state(warm), expected)

    for step in (4, 6):
        resumed = make(world, kind, tmp_path / "resumed", **evaluated | {"eval_steps": 3})
        torch.rand(step)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        h.assert_same(h.state(resumed), expected, but=h.UNTRAINED)


def test_the_seed_decides(world, tmp_path):
    options = {"augmentation": "none", "max_steps": 1, "neighbors_k": 0, "per_device_train_batch_size": 24}
    first, other = (make(world, "dropout", tmp_path / str(seed), seed=seed, **options) for seed in (3, 4))
    first.train()
    other.train()
    # The same images in both, as one step sees them all.
    assert not torch.equal(first.model.network.layernorm.bias, other.model.network.layernorm.bias)


def test_every_pass_of_a_run_draws_other_numbers():
    """A state that were the same at each step would drop the same units for ever."""
    seed = StepSeed(3, torch.device("cpu"))
    seed.restart()
    drawn = []
    for step in (0, 0, 1, 1, 2):
        seed.apply(step)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 5
    set_seed(8)
    seed.restart()
    for number, step in zip(drawn, (0, 0, 1, 1, 2)):
        seed.apply(step)
        assert torch.rand(1).item() == number


def test_a_supervised_run_resumes_its_dropout(world, tmp_path):
    """And its weights: those of a ViT have other names in the file than in the network, and were not read."""

    def run(folder, **options):
        args = TeacherArguments(
            output_dir=str(folder),
            model=world["vit"],
            per_device_train_batch_size=8,
            max_steps=4,
            save_strategy="steps",
            save_steps=3,
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=0.1,
            report_to=[],
            **options,
        )
        run = build_supervised_run(DataArguments(dataset=str(world["images"])), args)
        torch.rand(len(options))  # what another version of a library may draw before the first step
        run.trainer.train(resume_from_checkpoint=run.checkpoint)
        return h.state(run.trainer)

    expected = run(tmp_path / "out")
    again = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    h.assert_same(expected, again)
