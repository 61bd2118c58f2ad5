import dataclasses

import pytest

from coss_hf.cli.parser import parse
from coss_hf.reporting.run_record import to_dict
from coss_hf.study.single_run import OF_ONE_RUN
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.errors import bad_input_exits

EVERYTHING = (ModelArguments, DataArguments, DistillationArguments)


def read(tmp_path, yaml: str, *argv: str):
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    return parse(EVERYTHING, ["--config", str(path), "--use_cpu", *argv])


def test_yaml_is_typed_and_the_command_line_wins(tmp_path):
    models, data, args = read(
        tmp_path,
        """
        teacher: somebody/teacher
        student_config_overrides: {shortcut: padding, hidden_sizes: [4, 8]}
        learning_rate: 1e-3        # a string to YAML
        num_images: 500_000
        lr_milestones: [150, 180]
        eval_strategy: no          # false to YAML
        validation_size: 0.1
        label_column: null
        """,
        "--learning_rate",
        "0.1",
        "--student=resnet20",
    )
    assert models.teacher == "somebody/teacher" and models.student == "resnet20"
    assert models.overrides() == {"shortcut": "padding", "hidden_sizes": [4, 8]}
    assert args.learning_rate == 0.1 and args.num_images == 500_000 and args.lr_milestones == [150.0, 180.0]
    assert args.eval_strategy == "no" and data.validation_size == 0.1 and data.label_column is None


def test_the_classes_stay_as_they_are(tmp_path):
    """A help page that was written after it called optional arguments required ones."""
    types = [{field.name: str(field.type) for field in dataclasses.fields(kind)} for kind in EVERYTHING[:2]]
    read(tmp_path, "teacher: a")
    assert [{field.name: str(field.type) for field in dataclasses.fields(kind)} for kind in EVERYTHING[:2]] == types
    assert "None" in str(DataArguments.__dataclass_fields__["label_column"].type)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rat: 1", r"'learning_rat' \(did you mean learning_rate"),
        ("lr: 1", r": 'lr' \(did you mean learning_rate\?\) is no argument"),
        ("qqq: 1\nbatch_size: 2", r": 'qqq', 'batch_size' \(did you mean per_device_train_batch_size\?\) are no arg"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("student_init: teacher", "invalid choice: 'teacher'"),
        ("- a list", "must contain"),
        ("a: [", "not valid YAML"),
        ("student_config_overrides: [shortcut]", "key=value"),
    ],
)
def test_bad_yaml(tmp_path, yaml, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, yaml)[0].overrides()


@pytest.mark.parametrize(
    ("words", "report_to"), [([], []), (["--report_to", "wandb", "tensorboard"], ["wandb", "tensorboard"])]
)
def test_several_trackers(tmp_path, words, report_to):
    (args,) = parse((DistillationArguments,), [f"--output_dir={tmp_path}", *words])
    assert args.report_to == report_to
    assert DistillationArguments(str(tmp_path), report_to="tensorboard").report_to == ["tensorboard"]


def test_unknown_flag_suggests(tmp_path):
    with pytest.raises(ValueError, match="--batchsize is no argument"):
        parse(EVERYTHING, ["--batchsize", "3"])
    with pytest.raises(ValueError, match="Did you mean --neighbors_k"):
        parse(EVERYTHING, ["--neighbour_k", "3"])
    with pytest.raises(ValueError, match=r"Did you mean --per_device_train_batch_size\?$"):
        parse(EVERYTHING, ["--batch_size", "3"])


@pytest.mark.parametrize("name", ["epochs", "resume", "loss"])
def test_no_hint_leads_to_an_option_that_a_study_refuses(name):
    with pytest.raises(ValueError, match=f"^--{name}=3 is no argument of this command. See --help") as error:
        parse(EVERYTHING, [f"--{name}=3"], single_run=OF_ONE_RUN)
    assert "Did you mean" not in str(error.value)


def test_config_with_an_equals_sign(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 0.123")
    argv = [f"--config={tmp_path / 'run.yaml'}", "--use_cpu"]
    assert parse((DistillationArguments,), argv)[0].learning_rate == 0.123


def test_two_config_files_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 0.123")
    with pytest.raises(ValueError, match="--config was given twice"):
        parse((DistillationArguments,), ["--config", str(tmp_path / "run.yaml"), f"--config={tmp_path / 'run.yaml'}"])


def test_lone_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched.*use_cpu"):
        DistillationArguments(output_dir=str(tmp_path))


def test_missing_config_file():
    with pytest.raises(ValueError, match="--config nowhere.yaml: no such file"):
        parse(EVERYTHING, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--resume_from_checkpoint"], "auto"),
        (["--resume_from_checkpoint", "--use_cpu"], "auto"),
        (["--resume_from_checkpoint", "auto"], "auto"),
        (["--resume_from_checkpoint", "out/checkpoint-3"], "out/checkpoint-3"),
        ([], None),
    ],
)
def test_bare_resume(argv, expected):
    assert parse((DistillationArguments,), [*argv, "--use_cpu"])[0].resume_from_checkpoint == expected


def test_defaults_are_the_methods_own(tmp_path):
    args = DistillationArguments(output_dir=str(tmp_path), settings="paper", use_cpu=True)
    expected = {"optim": "sgd", "momentum": 0.9, "lr_scheduler_type": "cosine", "max_grad_norm": 0.0}
    assert {name: getattr(args, name) for name in expected} == expected
    assert not args.logging_nan_inf_filter and not args.remove_unused_columns and args.dataloader_drop_last


def test_images_per_step_counts_neighbours_and_accumulation(tmp_path):
    args = DistillationArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=16,
        neighbors_k=15,
        gradient_accumulation_steps=2,
    )
    assert args.images_per_step == 16 * 16 * 2


def test_bad_input_is_one_paragraph_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        raise ValueError("--teacher=x\n  is wrong;\ngive y.")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --teacher=x is wrong; give y.\n"


def test_the_record_contains_no_token(tmp_path):
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="secret")
    assert "secret" not in str(to_dict(args))


def test_every_argument_of_ours_has_help():
    for arguments in EVERYTHING:
        for field in dataclasses.fields(arguments):
            if field.name in arguments.__annotations__:
                assert field.metadata.get("help"), field.name


def test_position_embeddings_that_no_network_has(networks):
    models = ModelArguments(teacher=str(networks.teacher), student=str(networks.resnet), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="^--interpolate_pos_encoding: neither .*teacher nor .*resnet has position"):
        models.load_student(models.load_teacher())
    models.student = str(networks.vit)
    models.load_student(models.load_teacher())
