import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.hub.student import Student
from coss_hf.losses.registry import LOSSES
from coss_hf.study import baselines, timing
from coss_hf.study import sweep as sweep_module
from coss_hf.study import trials as trials_module
from coss_hf.study.sweep import Sweep, show_gpu, take_one_gpu, visible_gpus
from coss_hf.study.timing import images_within
from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer, evaluations_path, run_trial
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.utils.errors import LostWorker, NonFiniteEmbedding, stopped_run_exits

TRIAL = Trial("pair", "coss", "coss(beta=50)", 1, 1, 48, "test")


@pytest.fixture
def config(image_parquet, networks):
    data = DataArguments(dataset=str(image_parquet), validation_size=12)
    training = {
        "settings": "paper",
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "augmentation": "cifar",
        "learning_rate": 0.01,
    }
    models = {"pair": ModelArguments(teacher=networks.teacher, student=networks.resnet, student_init="random")}
    return StudyConfig(data, models, training | {"logging_steps": 2}, milestones=(0.5,))


@pytest.fixture
def forked(monkeypatch):
    """Workers that need not import everything again; tests/study/test_teachers.py starts one from nothing.

    Of a server: torch cannot train in a fork of a process that has trained.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coss_hf.study.sweep"])
    monkeypatch.setattr("multiprocessing.get_context", lambda method=None: context)


@pytest.mark.usefixtures("forked")
def test_finished_trials_are_kept_and_never_repeated(tmp_path, config):
    failing = replace(TRIAL, method="diverges", expression="coss(beta=1e30)", num_images=40)
    trials = [TRIAL, TRIAL, failing, replace(TRIAL, method="random", expression="", num_images=0)]
    rows = Sweep(tmp_path / "study", "first", 2, {"command": "c"}).run(trials, config)
    assert rows.pop(0) == rows[0], "the same trial"
    assert rows[0]["images_seen"] == 48 and 0 <= rows[0]["linear"] <= 1 and rows[0]["extra_teacher_images"] == 0
    assert "The loss is" in rows[1]["failed"] and "linear" not in rows[1]
    assert rows[2]["images_seen"] == 0 and rows[2]["knn10"] is not None
    lines = (tmp_path / "study" / "first.jsonl").read_text().splitlines()
    expected = [{"command": "c"} | {key: value for key, value in row.items() if key != "loss"} for row in rows]
    assert [json.loads(line) for line in lines] == expected
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "trials").glob("*.json")}
    assert len(files) == 3 and not [path for path in (tmp_path / "study" / "trials").iterdir() if path.is_dir()]
    # Another study of the same runs under other names, in another order.
    sweep = Sweep(tmp_path / "study", "second", 1, {"command": "d"})
    again = sweep.run([replace(TRIAL, method="other"), failing], config)
    assert {json.loads(line)["command"] for line in sweep.file.read_text().splitlines()} == {"c"}, "what ran them"
    assert again == [rows[0] | {"method": "other"}, rows[1]]
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "trials").glob("*.json")}


@pytest.mark.usefixtures("forked")
def test_an_error_ends_the_sweep_and_keeps_what_was_finished(tmp_path, config):
    """A pool that is shut down twice took up the remaining trials again, and nobody kept their results."""
    cannot_run = replace(TRIAL, method="kd", expression="kd", seed=2)
    later = [replace(TRIAL, seed=seed) for seed in (3, 4)]
    sweep = Sweep(tmp_path / "study", "first", 1, {})
    with pytest.raises(ValueError, match="kd"):
        sweep.run([TRIAL, cannot_run, *later], config)
    found = [sweep.result(trial, config.key(trial)) for trial in (TRIAL, cannot_run, *later)]
    assert found[0]["images_seen"] == 48 and found[1:] == [None, None, None]


def test_a_result_is_kept_before_its_checkpoints_are_removed(tmp_path, config):
    there = []
    run_trial(
        TRIAL, config, tmp_path / "trial", keep=lambda result: there.append((result, (tmp_path / "trial").exists()))
    )
    assert there[0][0]["linear"] >= 0 and there[0][1] and not (tmp_path / "trial").exists()


def test_the_student_of_a_reported_run_is_kept_where_it_is_asked_for(tmp_path, config):
    keeping = replace(config, students=tmp_path / "students")
    assert keeping.key(TRIAL) == config.key(TRIAL)
    trial = replace(TRIAL, pair="small/large", method="lambda 0.5")
    keeping = replace(keeping, models={trial.pair: config.models["pair"]})
    found = run_trial(trial, keeping, tmp_path / "trial")
    run_trial(replace(trial, split="validation", seed=0), keeping, tmp_path / "trial")
    (folder,) = (tmp_path / "students").iterdir()
    assert folder.name == f"small_large-lambda_0.5-scale1-seed1-48-{keeping.key(trial)}" == found["student"]
    student = Student.from_pretrained(folder)
    assert trials_module.measure(trial, keeping, student.backbone, student.head)["linear"] == found["linear"]


def test_students_of_two_studies_in_one_folder_are_both_kept(tmp_path, config):
    """The second study wrote its students over those of the first, whose rows had the same names."""
    keeping = replace(config, students=tmp_path / "students")
    other = replace(keeping, training=config.training | {"learning_rate": 0.02})
    found = [run_trial(TRIAL, one, tmp_path / "trial")["student"] for one in (keeping, other)]
    assert sorted(found) == sorted(path.name for path in (tmp_path / "students").iterdir()) and len({*found}) == 2
    assert "student" not in run_trial(replace(TRIAL, split="validation", seed=0), keeping, tmp_path / "trial")


def test_logs_of_tensorboard_outlive_the_checkpoints(tmp_path, config, monkeypatch):
    """They lay in the folder of the checkpoints, which is removed when a trial ends."""
    pytest.importorskip("torch.utils.tensorboard")
    tracked = replace(config, training=config.training | {"report_to": ["tensorboard"]}, logs=tmp_path / "runs")
    run_trial(TRIAL, tracked, tmp_path / "trial")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == tracked.folder_of(TRIAL) and [*folder.glob("events.*")] and not (tmp_path / "trial").exists()
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path / "runs"))], "the file is closed"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    run_trial(replace(TRIAL, seed=2), tracked, tmp_path / "trial")
    assert [path.parent.name for path in (tmp_path / "elsewhere").glob("*/events.*")] == [
        tracked.folder_of(replace(TRIAL, seed=2))
    ]


def test_a_student_without_finite_embeddings_is_a_failed_trial(tmp_path, config, monkeypatch):
    real = Evaluator.embed

    def embed(self, backbone, images, description):
        if description.startswith("Student"):
            raise NonFiniteEmbedding("Student: the network gives NaN or infinity for 3 of 48 images: a, b, c. Use")
        return real(self, backbone, images, description)

    monkeypatch.setattr(Evaluator, "embed", embed)
    result = run_trial(TRIAL, config, tmp_path / "trial")
    assert result["failed"].startswith("Student: the network gives NaN") and result["images_seen"] == 48
    monkeypatch.setattr(Evaluator, "embed", lambda *args: (_ for _ in ()).throw(NonFiniteEmbedding("Teacher: NaN")))
    trials_module._evaluator.cache_clear()
    with pytest.raises(NonFiniteEmbedding, match="Teacher"):
        run_trial(TRIAL, config, tmp_path / "trial")
    trials_module._evaluator.cache_clear()


def test_a_measured_length_is_that_of_its_own_networks_and_arguments(tmp_path, config, monkeypatch, caplog):
    lengths = iter((100, 200, 300))
    monkeypatch.setattr(baselines, "images_within", lambda *args: next(lengths))
    other = replace(config, training=config.training | {"learning_rate": 0.02})

    def length(hours, trials, config=config):
        return baselines.run_images(tmp_path, hours, trials, [], config)

    assert [length(8, [TRIAL]), length(8, [TRIAL], other), length(4, [TRIAL])] == [100, 200, 300]
    assert [length(8, [TRIAL]), length(8, [TRIAL], other), length(4, [TRIAL])] == [100, 200, 300] and not caplog.text
    assert length(8, [TRIAL, replace(TRIAL, seed=2)]) == 100 and "2 runs take about 16 h" in caplog.text


def test_resumed_trial_equals_uninterrupted_trial(tmp_path, config):
    config = replace(config, training=config.training | {"save_strategy": "steps", "save_steps": 3})
    uninterrupted = run_trial(TRIAL, config, tmp_path / "uninterrupted")
    steps = iter(range(1, 99))

    def stop_in_step_five(images: int) -> None:
        if next(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(TRIAL, config, tmp_path / "stopped", stop_in_step_five)
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = run_trial(TRIAL, config, tmp_path / "stopped")
    assert resumed.pop("loss") is not None and uninterrupted.pop("loss") is not None
    assert resumed == uninterrupted and resumed["teacher_images"] == 48


def test_a_trial_that_had_only_to_be_measured_knows_its_teacher_images(tmp_path, config, monkeypatch):
    config = replace(config, training=config.training | {"save_strategy": "steps", "save_steps": 6})
    with monkeypatch.context() as patch:
        patch.setattr(trials_module, "measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_trial(TRIAL, config, tmp_path / "trial")
    assert run_trial(TRIAL, config, tmp_path / "trial")["teacher_images"] == 48


@pytest.fixture
def evaluated(tmp_path, config, monkeypatch):
    """A study that keeps its students and saves each third step, and the splits that were measured, in order."""
    training = config.training | {"save_strategy": "steps", "save_steps": 3}
    config = replace(config, training=training, students=tmp_path / "with", eval_at=(0.34, 0.67, 1.0))
    measured = []
    real = trials_module.measure

    def measure(trial, *args):
        measured.append(trial.split)
        found = real(trial, *args)
        torch.manual_seed(len(measured))  # a metric may draw from the global generators
        return found

    monkeypatch.setattr(trials_module, "measure", measure)
    return config, measured


def weights(folder):
    (student,) = folder.iterdir()
    return (student / "model.safetensors").read_bytes()


def test_an_evaluation_during_training_changes_nothing_of_it(tmp_path, evaluated):
    """Of 6 steps after 2, 4 (an epoch ends there) and 6; the result and the weights are those without it."""
    config, measured = evaluated
    without = replace(config, students=tmp_path / "without", eval_at=())
    assert config.key(TRIAL) == without.key(TRIAL)
    assert run_trial(TRIAL, config, tmp_path / "a") == run_trial(TRIAL, without, tmp_path / "b")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    assert measured == ["validation"] * 3 + ["test"] + ["test"], "test images are read at the end"
    found = json.loads(evaluations_path(tmp_path / "a").read_text())
    assert [(row["share"], row["images_seen"]) for row in found] == [(0.34, 16), (0.67, 32), (1.0, 48)]
    assert all(0 <= row["linear"] <= 1 and 0 <= row["knn20"] <= 1 for row in found)
    assert len({row["cosine"] for row in found}) == 3 and not evaluations_path(tmp_path / "b").exists()
    run_trial(replace(TRIAL, split="validation", seed=0), config, tmp_path / "choice")
    assert not evaluations_path(tmp_path / "choice").exists(), "a choice is measured once"


@pytest.mark.parametrize("stop", [2, 5])
def test_an_evaluation_during_training_is_neither_lost_nor_repeated(tmp_path, evaluated, stop):
    """Stopped in the second step, before its evaluation, without a checkpoint; and in the fifth, after step 3 was
    saved and step 4 evaluated."""
    config, measured = evaluated
    run_trial(TRIAL, config, tmp_path / "uninterrupted")
    measured.clear()
    steps = iter(range(1, 99))

    def interrupt(images: int) -> None:
        if next(steps) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(TRIAL, config, tmp_path / "stopped", interrupt)
    assert len(measured) == {2: 0, 5: 2}[stop]
    run_trial(TRIAL, config, tmp_path / "stopped")
    assert measured == ["validation"] * 3 + ["test"]
    assert (
        evaluations_path(tmp_path / "stopped").read_text() == evaluations_path(tmp_path / "uninterrupted").read_text()
    )


def test_a_student_without_finite_embeddings_is_measured_again_later(tmp_path, evaluated, monkeypatch):
    config, _ = evaluated
    outcomes = iter([NonFiniteEmbedding("Student: NaN; use float32"), {"linear": 0.5}, {"linear": 0.6}, {}])

    def measure(*args):
        if isinstance(outcome := next(outcomes), Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(trials_module, "measure", measure)
    assert "failed" not in run_trial(TRIAL, config, tmp_path / "trial")
    found = json.loads(evaluations_path(tmp_path / "trial").read_text())
    assert found[0] == {"share": 0.34, "images_seen": 16, "failed": "Student: NaN"}
    assert [row["linear"] for row in found[1:]] == [0.5, 0.6]


@pytest.mark.usefixtures("forked")
def test_evaluations_during_training_are_rows_of_their_own(tmp_path, config):
    config = replace(config, eval_at=(0.5,))
    sweep = Sweep(tmp_path / "study", "first", 1, {"command": "c"})
    (result,) = sweep.run([TRIAL], config)
    first, last = (json.loads(line) for line in sweep.file.read_text().splitlines())
    assert (first["split"], first["share"], first["images_seen"], first["command"]) == ("validation", 0.5, 24, "c")
    assert {name: first[name] for name in ("pair", "method", "seed", "scale", "num_images")} == {
        name: last[name] for name in ("pair", "method", "seed", "scale", "num_images")
    }
    assert last["split"] == "test" and "share" not in last and result["linear"] == last["linear"]
    del sweep
    # Finished trials are found with or without it, and what was measured stays in the file.
    again = Sweep(tmp_path / "study", "first", 1, {"command": "d"})
    assert again.run([TRIAL], replace(config, eval_at=())) == [result]
    assert [json.loads(line) for line in again.file.read_text().splitlines()] == [first, last]


def test_baselines_of_a_student_with_pretrained_weights(tmp_path, config):
    """Random weights are random, one draw a seed; the initial ones are the checkpoint's."""
    own = replace(config.models["pair"], student_init="pretrained")
    untrained = replace(TRIAL, expression="", num_images=0)
    rows, draws = {}, (("initial", 5), ("random", 5), ("random", 6))
    for name, models in (("own", own), ("none", config.models["pair"])):
        config = replace(config, models={"pair": models})
        for method, seed in draws:
            found = run_trial(replace(untrained, method=method, seed=seed), config, tmp_path)
            rows[name, method, seed] = found["cosine"]
    assert len({rows["own", method, seed] for method, seed in draws}) == 3
    # Without weights of its own a student starts from the very weights that the baseline has.
    assert rows["none", "initial", 5] == rows["none", "random", 5] != rows["own", "initial", 5]


@pytest.mark.usefixtures("forked")
def test_rows_of_another_study_that_leave_the_file_are_named(tmp_path, config, caplog):
    """A second comparison in the same folder replaced the results of the first one without a word."""

    def sweep(trials, config=config, later=0):
        caplog.clear()
        study = Sweep(tmp_path / "study", "first", 1, {"command": "c"})
        if later:
            study.run(trials[:1], config, later=later)
        rows = study.run(trials, config)
        study._lock.release()
        return rows

    trials = [replace(TRIAL, method=name, expression="", num_images=0) for name in ("random", "teacher")]
    first = sweep(trials[:1])
    sweep(trials, later=1)
    assert not caplog.text, "a study that grows, in two steps"
    file = tmp_path / "study" / "first.jsonl"
    file.write_text(file.read_text().replace(f'"pair": "{TRIAL.pair}"', f'"pair": "{TRIAL.pair}/."'))
    sweep(trials)
    assert not caplog.text, "the teacher's path spelled in another way"
    sweep(trials[1:])
    assert "1 row of another study leave" in caplog.text and "(1 of random)" in caplog.text
    assert sweep(trials[:1]) == first and "(1 of teacher)" in caplog.text
    sweep(trials[:1], replace(config, training=config.training | {"learning_rate": 0.02}))
    assert "(1 of random)" in caplog.text, "the same row of other arguments"


def test_one_sweep_at_a_time(tmp_path, config):
    first = Sweep(tmp_path, "a", 1, {})
    with pytest.raises(ValueError, match="--output_dir=.* another sweep"):
        Sweep(tmp_path, "b", 1, {})
    del first


def test_several_processes_are_not_one_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes were started for one sweep; start one, and give --jobs"):
        Sweep(tmp_path / "study", "a", 1, {})
    assert not (tmp_path / "study").exists()


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^--output_dir=.*file cannot be used .*; give another folder"):
        Sweep(tmp_path / "file", "a", 1, {})


def test_a_study_takes_one_gpu_and_knows_all(monkeypatch):
    """Several visible GPUs were refused with the arguments, before a study could hand them out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    take_one_gpu.cache_clear()
    assert [take_one_gpu(), take_one_gpu()] == [["2", "3"]] * 2 and os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    take_one_gpu.cache_clear()


def end_process(trial, config, folder, keep):
    os._exit(9)  # as the kernel ends one for want of memory


def end_by_signal(trial, config, folder, keep):
    raise SystemExit(143)


def lose_worker(trial, config, folder, keep):
    raise LostWorker(RuntimeError("DataLoader worker (pid 1) is killed"), "step 3 is saved")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("work", "message"),
    [
        (end_process, "A process that trains a trial ended before its time"),
        (end_by_signal, "A process that trains a trial ended before its time"),
        (lose_worker, "A process that loads images ended (DataLoader worker (pid 1) is killed): step 3 is saved."),
    ],
)
def test_what_ends_a_trial_is_said_in_words(tmp_path, config, monkeypatch, capsys, work, message):
    """It was a traceback, or nothing."""
    monkeypatch.setattr(sweep_module, "_run_in_worker", work)
    with pytest.raises(SystemExit) as stop, stopped_run_exits():
        Sweep(tmp_path, "a", 1, {}).run([TRIAL], config)
    assert stop.value.code == 1 and f"error: {message}" in capsys.readouterr().err


def test_parallel_trials_take_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    gpus, shown = visible_gpus(), []
    for turn in range(3):
        show_gpu(gpus, turn)
        shown.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert shown == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert visible_gpus() == ["GPU-a", "GPU-b"]
    show_gpu([], 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


def test_check_rejects_a_method_that_cannot_run(tmp_path, config):
    with pytest.raises(ValueError, match="--method kd"):
        Sweep(tmp_path, "a", 1, {}).check([TRIAL, replace(TRIAL, method="kd", expression="kd")], config)


def test_key_covers_everything_that_a_result_depends_on(config):
    changed = [replace(TRIAL, **change) for change in ({"seed": 2}, {"num_images": 56}, {"split": "validation"})]
    keys = {config.key(trial) for trial in [TRIAL, *changed]} | {replace(config, bank_size=5).key(TRIAL)}
    assert len(keys) == 5 and config.key(replace(TRIAL, method="other")) in keys


def test_key_does_not_depend_on_how_a_trial_is_run(config):
    """Another --logging_steps or --neighbors_cache trained everything again, without a word."""
    operation = {
        "logging_steps": 7,
        "report_to": ["tensorboard"],
        "run_name": "a",
        "save_total_limit": 3,
        "logging_first_step": True,
        "dataloader_num_workers": 2,
    }
    found = {replace(config, training=config.training | {name: value}).key(TRIAL) for name, value in operation.items()}
    for change in ({"neighbors_cache": "x"}, {"preprocessing_num_workers": 2}):
        found.add(replace(config, data=replace(config.data, **change)).key(TRIAL))
    assert found == {config.key(TRIAL)}


def test_key_does_not_depend_on_how_paths_are_spelled(config, networks, monkeypatch):
    trained = replace(TRIAL, method="kd", expression="kd")
    root = Path(config.data.dataset).parent
    monkeypatch.chdir(root)

    def keys(spelled):
        models = config.models["pair"]
        networks = {name: spelled(getattr(models, name)) for name in ("teacher", "student")}
        data = replace(config.data, dataset=spelled(config.data.dataset))
        pair = f"{networks['student']} / {networks['teacher']}"
        one = replace(config, data=data, models={pair: replace(models, **networks)}, identity={pair: "contents"})
        return [one.key(replace(trial, pair=pair)) for trial in (TRIAL, trained)]

    absolute = keys(str)
    assert keys(lambda path: f"{path}/") == absolute == keys(lambda path: os.path.relpath(path, root))
    assert absolute[0] != absolute[1]
    other = replace(config.models["pair"], student=networks.vit)
    students = [
        replace(config, models={"pair": one}, identity={"pair": "contents"}).key(TRIAL)
        for one in (config.models["pair"], other)
    ]
    assert students[0] != students[1], "a network at random weights is known by its configuration"


def test_a_loss_whose_value_changed_is_another_trial(config, monkeypatch):
    alone, with_it = TRIAL, replace(TRIAL, expression=f"{TRIAL.expression} + crd")
    before = config.key(alone), config.key(with_it)
    monkeypatch.setattr(LOSSES["crd"], "revision", 2)
    assert config.key(alone) == before[0] and config.key(with_it) != before[1]


def test_other_weights_or_images_are_other_trials(tmp_path, config):
    first = config.identified()
    assert first.key(TRIAL) == config.identified().key(TRIAL) != config.key(TRIAL)
    operation = config.training | {"save_steps": 7, "dataloader_num_workers": 2}
    assert replace(first, training=operation).key(TRIAL) == first.key(TRIAL)
    own = {"pair": replace(config.models["pair"], student_init="pretrained")}
    assert replace(config, models=own).identified().identity != first.identity
    other_images = replace(config, data=replace(config.data, max_train_samples=30)).identified()
    assert other_images.identity != first.identity
    path = Path(config.models["pair"].teacher, "model.safetensors")
    weights, before = load_file(path), path.read_bytes()
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path, {"format": "pt"})
    trials_module._load.cache_clear()
    try:
        assert config.identified().key(TRIAL) != first.key(TRIAL)
    finally:
        path.write_bytes(before)
        trials_module._load.cache_clear()


def test_learning_rate_falls_at_shares_of_the_run(tmp_path, config):
    trainer = build_trial_trainer(replace(TRIAL, num_images=160), config, tmp_path / "run")
    rates = []
    trainer.create_optimizer_and_scheduler(20)
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.01] * 10 + [0.001] * 10)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_milestones_in_epochs_fall_after_as_many_images_without_neighbours(tmp_path, config, accumulation):
    """An epoch has a quarter of the images where no anchor draws three neighbours: its rate fell in the first steps."""
    training = config.training | {"lr_milestones": [1, 2], "neighbors_pool": 4, "per_device_train_batch_size": 4}
    training["gradient_accumulation_steps"] = accumulation
    data = replace(config.data, neighbors_cache=str(tmp_path / "cache"))
    config = replace(config, data=data, training=training, milestones=())
    with_neighbours = replace(TRIAL, neighbors_k=3, num_images=16 * 36)
    trials = [with_neighbours, replace(with_neighbours, neighbors_k=0, anchors=16)]
    trainers = [build_trial_trainer(trial, config, tmp_path / "run") for trial in trials]
    drops = [
        [one.length.images_after(round(epoch * one.length.steps_per_epoch)) for epoch in one.args.lr_milestones]
        for one in trainers
    ]
    assert drops[0] == [144, 288]
    assert drops[1] == pytest.approx(drops[0], abs=16 * accumulation)
    assert trainers[0].args.lr_milestones == [1, 2]


def test_results_with_other_milestones_are_not_taken(config):
    """Keys of all other trials stay what they were."""
    plain = replace(TRIAL, anchors=16)
    falling = replace(config, training=config.training | {"lr_milestones": [1, 2]}, milestones=())
    assert falling.falls_with_others(plain) == [1, 2]
    assert not falling.falls_with_others(replace(plain, neighbors_k=3)) and not falling.falls_with_others(TRIAL)
    assert not config.falls_with_others(plain) and not replace(falling, training={}).falls_with_others(plain)


def test_neighbours_are_training_images(tmp_path, config):
    config = replace(config, data=replace(config.data, neighbors_cache=str(tmp_path / "cache")))
    training = config.training | {"neighbors_pool": 4}
    trainer = build_trial_trainer(replace(TRIAL, neighbors_k=3), replace(config, training=training), tmp_path / "run")
    assert trainer.args.images_per_step == 32 and len(trainer.train_dataset) == 36


def test_run_length_fits_the_hours(config):
    others = [replace(TRIAL, method="random", num_images=0)]
    images = images_within(600, [TRIAL, replace(TRIAL, seed=2)], others, config)
    assert images > 1000
    with pytest.raises(ValueError, match="--hours=.* too short .* give .* at least"):
        images_within(0.01, [TRIAL], others, config)
    diverges = replace(TRIAL, method="diverges", expression="coss(beta=1e30)")
    assert images_within(600, [TRIAL, diverges], others, config) > 1000, "a row that says so, as without --hours"


def test_runs_on_devices_of_their_own_may_be_longer(config, monkeypatch):
    """With two jobs on two GPUs half of the hours were left over."""
    monkeypatch.setattr(timing, "_time_measurement", lambda *args: 0.0)
    speed = timing._Speed(before=0.0, per_step=1.0, images_per_step=1)
    monkeypatch.setattr(timing, "_time_steps", lambda *args: speed)
    trials = [replace(TRIAL, seed=seed) for seed in (1, 2, 3, 4)]

    def images(count, parallel):
        return images_within(6000, trials[:count], [TRIAL], config, parallel)

    assert images(4, 1) == pytest.approx(1500, rel=0.01) and images(4, 2) == pytest.approx(3000, rel=0.01)
    assert images(3, 2) == pytest.approx(3000, rel=0.01), "the third runs alone"
    assert images(2, 8) == pytest.approx(6000, rel=0.01)


def test_too_few_hours_are_reported_within_a_tenth_of_them(config, monkeypatch):
    """It once took 183 seconds to refuse 0.03 hours: the measurement was timed in full, whatever it took."""

    def measured(*args):
        raise AssertionError("a measurement of an hour was timed in full")

    monkeypatch.setattr(timing, "run_trial", measured)
    monkeypatch.setattr(timing, "embedding_seconds", lambda *args: 3600.0)
    others = [replace(TRIAL, method="random", num_images=0)]
    message = r"^--hours=0.03 \(1 min 48 s\) is too short for these runs, which need 2 h or more: give 2.1 at least"
    with pytest.raises(ValueError, match=message):
        images_within(108, [TRIAL], others, config)


@pytest.mark.parametrize(("times", "expected"), [([9], 9.0), ([9, 10], 1.0), ([9, 10, 11, 12], 1.0)])
def test_step_time_is_measured_on_available_steps(times, expected):
    clock = timing._Clock(deadline=0)
    clock.times = times
    assert clock.per_step(0) == expected


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_progress_bars_are_afterwards_as_the_user_set_them(given, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if given is not None:
        monkeypatch.setenv("TQDM_DISABLE", given)
    with sweep_module._silent_progress_in_children():
        assert os.environ["TQDM_DISABLE"] == "1"
    assert os.environ.get("TQDM_DISABLE") == given
