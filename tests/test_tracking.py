"""W&B: an offline run read back, and servers that cannot be reached."""

import contextlib
import io
import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from PIL import Image

import tests.helpers as h
from coss_hf import tracking
from tests.recipes.test_distill import world  # noqa: F401 (a fixture)
from tests.wandb_reader import read, tables

SECRETS = ("hf_abcdefghijklmnop", "0123456789" * 4)


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
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
    assert tracking.grouped(logs) == {
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


def test_an_offline_run_read_back(world, wandb_folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRETS[1])
    world.run(
        report_to="wandb", logging_steps=2, eval_steps=3, validation_size=12, hub_token=SECRETS[0], run_name="mine"
    )
    wandb.teardown()  # finish alone does not wait for the disk
    history, config, summary = read(wandb_folder)
    losses = [line for line in history if "train/loss" in line]
    assert [line["images_seen"] for line in losses] == [16, 32, 48] and "train/l_ss" in losses[0]
    panels = [line for line in history if "agreement/overlap10" in line]
    assert [line["images_seen"] for line in panels] == [24, 48]
    for name in ("agreement/cka", "student/effective_rank", "teacher/effective_rank", "labels/knn10", "eval/loss"):
        assert all(name in line for line in panels), name
    assert config["per_device_train_batch_size"] == 8 and config["arguments"]["dataset"] == world.images
    assert len(config["fingerprints"]["teacher"]) > 10 and len(config["fingerprints"]["dataset"]) > 10
    record = json.loads((world.out / "run.json").read_text())
    assert summary["final/student/knn10"] == record["results"]["student"]["eval_knn10"]
    assert (
        summary["final/random/parameters"] == record["results"]["random"]["parameters"] and "train_runtime" in summary
    )

    media = history[-1]
    for name in ("loss", "panel", "neighbors", "projection"):
        path = media[f"pictures/{name}/path"]
        (kept,) = wandb_folder.rglob(Path(path).name)
        assert kept.read_bytes() == (world.out / f"{name}.png").read_bytes()
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
    for path in [*wandb_folder.rglob("*"), *world.out.rglob("*")]:
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path


class Refusing(BaseHTTPRequestHandler):
    """A server that lets nobody in."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(401)

    def log_message(self, *args):
        pass


def test_what_is_no_web_server_is_out_of_reach():
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


@pytest.mark.parametrize("kind", ["no key", "wrong key", "refused", "silent"])
def test_training_goes_on_without_a_server(tmp_path, image_parquet, networks, wandb_folder, monkeypatch, caplog, kind):
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2)
    if kind != "no key":
        monkeypatch.setenv("WANDB_API_KEY", SECRETS[1])
    with contextlib.ExitStack() as stack:
        if kind.endswith("key"):
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Refusing))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            port = server.server_port
        else:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if kind == "silent":
                listener.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, report_to="wandb")
        with caplog.at_level(logging.WARNING):
            trainer.train()
        trainer.track({"results": {}})
        wandb.teardown()
    assert trainer.state.global_step == 6
    (warning,) = [entry.getMessage() for entry in caplog.records if "W&B" in entry.getMessage()]
    reasons = {
        "no key": "No API key",
        "wrong key": "the key right",
        "refused": "refused",
        "silent": "no answer from",
    }
    assert (
        reasons[kind] in warning
        and "is kept on disk" in warning
        and "wandb login" in warning
        and SECRETS[1] not in warning
    )
    folder = Path(warning.split("wandb sync ")[1].split("`")[0])
    assert [line["train/loss"] for line in read(folder)[0] if "train/loss" in line]


def test_settings_that_are_not_valid_are_refused_before_training(tmp_path, image_parquet, networks, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "127.0.0.1:9")
    wandb.teardown()
    with pytest.raises(ValueError, match="(?s)--report_to wandb: W&B's settings are not valid .*base_url"):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, report_to="wandb")
