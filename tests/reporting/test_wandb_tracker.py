"""W&B: an offline run read back, and servers that cannot be reached."""

import base64
import io
import json
import logging
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from PIL import Image
from transformers import AutoModel, TrainerCallback

import tests.helpers.runs as h
from coss_hf.reporting import wandb_tracker as tracking
from coss_hf.reporting.tracked import grouped
from coss_hf.reporting.trackers import report_end_of_run
from coss_hf.study.trials import StudyConfig, Trial, run_trial
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.run_results import RunReport
from tests.helpers.wandb_reader import artifacts, read, records, tables

SECRETS = ("hf_abcdefghijklmnop", "0123456789" * 4)


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_LOG_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "w"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    wandb.teardown()  # it reads its variables once a process
    yield tmp_path / "w"
    wandb.teardown()


def test_names_in_groups():
    logs = {"loss": 1, "l_co": 2, "eval_overlap10": 3, "eval_teacher_effective_rank": 4, "eval_effective_rank": 5}
    logs |= {"eval_loss": 6, "eval_knn10": 7, "images_per_second": 8, "images_seen": 9}
    assert grouped(logs) == {
        "train/loss": 1,
        "train/l_co": 2,
        "agreement/overlap10": 3,
        "teacher/effective_rank": 4,
        "student/effective_rank": 5,
        "eval/loss": 6,
        "labels/knn10": 7,
        "speed/images_per_second": 8,
        "images_seen": 9,
    }


def test_an_offline_run_read_back(distill_command, wandb_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRETS[1])
    distill_command.run(
        report_to="wandb", logging_steps=2, eval_steps=3, validation_size=12, hub_token=SECRETS[0], run_name="mine"
    )
    wandb.teardown()  # finish alone does not wait for the disk
    history, config, summary = read(wandb_folder)
    losses = [line for line in history if "train/loss" in line]
    assert [line["images_seen"] for line in losses] == [16, 32, 48] and "train/l_ss" in losses[0]
    panels = [line for line in history if "agreement/overlap10" in line]
    assert [line["images_seen"] for line in panels] == [0, 24, 48]
    for name in ("agreement/cka", "student/effective_rank", "teacher/effective_rank", "labels/knn10", "eval/loss"):
        assert all(name in line for line in panels), name
    assert config["per_device_train_batch_size"] == 8 and config["arguments"]["dataset"] == distill_command.images
    assert len(config["fingerprints"]["teacher"]) > 10 and len(config["fingerprints"]["dataset"]) > 10
    record = json.loads((distill_command.out / "run.json").read_text())
    assert summary["final/student/knn10"] == record["results"]["student"]["knn10"]
    assert (
        summary["final/random/parameters"] == record["results"]["random"]["parameters"] and "train_runtime" in summary
    )

    media = history[-1]
    for name in ("loss", "panel", "neighbors", "projection"):
        path = media[f"pictures/{name}/path"]
        (kept,) = wandb_folder.rglob(Path(path).name)
        assert kept.read_bytes() == (distill_command.out / f"{name}.png").read_bytes()
    (page,) = wandb_folder.rglob(Path(media["report/path"]).name)
    assert "<title>out: 48 images seen</title>" in page.read_text()
    assert media["neighbors/_type"] == media["projection/_type"] == "table-file"
    found = tables(wandb_folder)
    table, files = found["neighbors"]
    columns = [f"{network} {i}" for network in ("teacher", "student") for i in range(1, 7)]
    assert table["columns"] == ["query", "shared", *columns] and len(table["data"]) == 8
    for query, shared, *images in table["data"]:
        assert all(Image.open(io.BytesIO(files[image["path"]])).size == (16, 16) for image in (query, *images))
        digests = [image["sha256"] for image in images]
        assert shared == len({*digests[:6]} & {*digests[6:]}) and query["sha256"] not in digests
    points, _ = found["projection"]
    assert len(points["data"]) == 24 and points["columns"][-1] == "label"
    for path in [*wandb_folder.rglob("*"), *distill_command.out.rglob("*")]:
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path


def test_each_trial_of_a_study_is_a_run_of_its_own(tmp_path, image_parquet, networks, wandb_folder, monkeypatch):
    """All trials that one process trains were drawn into the run of the first."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    data = DataArguments(dataset=str(image_parquet), validation_size=12)
    models = {"pair": ModelArguments(teacher=networks.teacher, student=networks.resnet, student_init="random")}
    training = {"settings": "paper", "use_cpu": True, "per_device_train_batch_size": 8, "augmentation": "cifar"}
    config = StudyConfig(data, models, training | {"report_to": ["wandb"], "logging_steps": 2, "run_name": "mine"})
    trial = Trial("pair", "coss", "coss(beta=50)", 1, 1, 32, "test")
    for seed in (1, 2):
        run_trial(replace(trial, seed=seed), config, tmp_path / "trial")
        assert wandb.run is None
    wandb.teardown()
    runs = sorted(path.parent for path in wandb_folder.rglob("*.wandb"))
    assert len(runs) == 2
    for run in runs:
        history, settings, _ = read(run)
        assert [line["images_seen"] for line in history if "train/loss" in line] == [16, 32]
    names = {record.run.display_name for run in runs for record in records(run) if record.HasField("run")}
    assert names == {f"mine-{replace(trial, seed=seed).folder_name}" for seed in (1, 2)}


@pytest.mark.slow
def test_resumed_finished_run_still_logs_its_report(distill_command, wandb_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    distill_command.run(save_strategy="epoch")  # the process died in its last evaluation, say
    distill_command.run("--resume_from_checkpoint", report_to="wandb")
    wandb.teardown()
    history, config, summary = read(wandb_folder)
    assert "final/student/overlap10" in summary and len(config["fingerprints"]["teacher"]) > 10
    assert history[-1]["images_seen"] == 48 and history[-1]["report/path"].endswith(".html")


def test_a_resumed_run_continues_its_run(distill_command, wandb_folder, monkeypatch):
    """It was a second run on W&B, with the second half of the curves."""
    monkeypatch.setenv("WANDB_MODE", "offline")

    def ids(*argv, **options) -> list[str]:
        distill_command.run(*argv, report_to="wandb", save_strategy="epoch", **options)
        wandb.teardown()
        return [folder.name.split("-")[-1] for folder in wandb_folder.rglob("offline-run-*") if folder.is_dir()]

    (first,) = ids()
    resumed = ids("--resume_from_checkpoint", num_images=96)
    assert len(resumed) in (1, 2) and set(resumed) == {first}  # one folder, where both began in the same second
    assert len(set(ids("--overwrite_output_dir"))) == 2


def test_the_model_that_is_kept_is_the_student_without_secrets(distill_command, wandb_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    distill_command.run(report_to="wandb", hub_token=SECRETS[0], save_strategy="epoch")
    wandb.teardown()
    kept = artifacts(wandb_folder, "model")
    assert len(kept) == 2  # what the network looks like, and the student
    for files in kept:
        assert not {name for name in files if name.endswith((".bin", ".pt", ".pth"))}, "a pickle hides what it holds"
    folder = wandb_folder / "student"
    folder.mkdir()
    for name, content in kept[-1].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    modules = json.loads((folder / "modules.json").read_text())
    assert len(modules) > 1 and all((folder / module["path"]).is_dir() for module in modules), "with its head"
    h.assert_same(
        AutoModel.from_pretrained(folder).state_dict(), AutoModel.from_pretrained(distill_command.out).state_dict()
    )


class Server(BaseHTTPRequestHandler):
    """As much of W&B as a run needs to start: it lets in ``key``, and no longer answers once it is ``lost``."""

    protocol_version = "HTTP/1.1"
    key = SECRETS[1]
    lost = threading.Event()
    gone = threading.Event()
    ANSWERS = {
        "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []},
        "viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}},
        "upsertBucket": {
            "bucket": {
                "id": "r",
                "name": "run",
                "displayName": "run",
                "config": "{}",
                "historyLineCount": 0,
                "project": {"id": "p", "name": "coss_hf", "entity": {"id": "e", "name": "me"}},
            },
            "inserted": True,
        },
        "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
    }

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.lost.is_set():
            self.gone.wait()
        user, _, password = base64.b64decode((self.headers["Authorization"] or "Basic ")[6:]).decode().partition(":")
        body = json.dumps({"data": self.ANSWERS}).encode()
        self.send_response(200 if password == self.key else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A W&B server of the test's own, the address of which runs are given."""
    Server.lost.clear()
    Server.gone.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads, running.block_on_close = True, False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{running.server_port}")
        yield Server
        Server.gone.set()
        running.shutdown()


def test_host_without_web_server_is_unreachable():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(OSError, match="SSH-2.0"):
            tracking.reach(f"http://127.0.0.1:{listener.getsockname()[1]}")


REASONS = {"no key": "no key", "malformed key": "40+", "wrong key": "authenticate", "refused": "refused"}
REASONS["silent"] = "no answer from"


@pytest.mark.parametrize("kind", REASONS)
def test_training_continues_without_a_server(
    tmp_path, image_parquet, networks, wandb_folder, server, monkeypatch, caplog, kind
):
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2)
    # As in a terminal that nobody sits at: a question there would be waited for, for ever.
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)
    keys = {"no key": None, "malformed key": "short", "wrong key": "9876543210" * 4}
    if key := keys.get(kind, SECRETS[1]):
        monkeypatch.setenv("WANDB_API_KEY", key)
    if kind == "silent":
        server.lost.set()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        if kind == "refused":
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, report_to="wandb")
        with caplog.at_level(logging.WARNING):
            trainer.train()
        report_end_of_run(trainer, RunReport({"results": {}}, None, None))
        wandb.teardown()
    assert trainer.state.global_step == 6
    (warning,) = [entry.getMessage() for entry in caplog.records if "W&B" in entry.getMessage()]
    assert REASONS[kind] in warning and "is kept on disk" in warning and "wandb login" in warning
    assert SECRETS[1] not in warning
    folder = Path(warning.split("wandb sync ")[1].split("`")[0])
    assert [line["train/loss"] for line in read(folder)[0] if "train/loss" in line]


def test_a_server_that_is_lost_ends_no_run(tmp_path, image_parquet, networks, wandb_folder, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS[1])
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2)
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, report_to="wandb")

    class Lose(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            server.lost.set()

    trainer.add_callback(Lose)
    trainer.train()
    assert wandb.run.settings.mode == "online"
    report_end_of_run(trainer, RunReport({"results": {}}, None, None))
    assert wandb.run is None and trainer.state.global_step == 6
    wandb.teardown()
    assert [line["train/loss"] for line in read(wandb_folder)[0] if "train/loss" in line]


def test_settings_that_are_not_valid_are_refused_before_training(tmp_path, image_parquet, networks, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "127.0.0.1:9")
    wandb.teardown()
    with pytest.raises(ValueError, match="(?s)--report_to wandb: W&B's settings are not valid .*base_url"):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, report_to="wandb")
