"""Against a Hub on this machine: create, push, load by name in a fresh process, push again, and every way to fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

import tests.helpers.networks as networks
import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.hub.export_folders import weights_digest
from coss_hf.hub.push import _errors_as_problems, _images_seen, _Problem, _with_card, httpx
from coss_hf.hub.snippets import LOADERS, Subject
from coss_hf.hub.student import Student
from coss_hf.models.loading import load_backbone
from recipes import push as recipe
from tests.helpers.hub_server import READ_TOKEN, TOKEN, Hub
from tests.helpers.processes import run as run_program

DISTILL = ["recipes/distill.py", "--use_cpu", "--per_device_train_batch_size=8", "--num_images=16", "--seed=1"]
DISTILL += [
    "--settings=paper",
    "--disable_tqdm=true",
    "--augmentation=cifar",
    "--save_strategy=no",
    "--logging_steps=1",
]

LOAD = """
import sys, re, torch, transformers
from huggingface_hub import hf_hub_download, ModelCard
name = sys.argv[1]
card = ModelCard.load(name)
codes = dict(re.findall(r"### (.+?)\\n.*?```python\\n(.*?)```", card.content, re.DOTALL))
space = {}
exec(codes["Transformers"], space)
before = space["embedding"]
exec(codes["Pipeline"], space)
torch.testing.assert_close(before, space["embedding"], rtol=1e-5, atol=1e-6)
assert "coss_hf" not in sys.modules, "the snippets need Transformers alone"
exec(codes["coss_hf"], space)
assert space["embedding"].shape == (1, 16), "in the teacher's space"
import coss_hf
student = coss_hf.Student.from_pretrained(name)
student.push_to_hub("me/copy", commit_message="A copy")
copied = coss_hf.Student.from_pretrained("me/copy").embed([space["image"]])
torch.testing.assert_close(copied, space["embedding"], rtol=0, atol=0)
print("EMBEDDED", tuple(before.shape))
"""

TIMM = """
import sys
sys.modules["coss_hf"] = None
space = {}
exec(sys.stdin.read(), space)
import torch
space["image"].save(sys.argv[1] + "/image.png")
torch.save(space["embedding"], sys.argv[1] + "/embedding.pt")
"""

EXPORTS = """
import logging, shutil, sys
import coss_hf, torch
from pathlib import Path
from coss_hf.hub import push
logging.basicConfig(format="%(message)s", level=logging.WARNING)
folder = Path(sys.argv[1])
coss_hf.Student.from_pretrained(folder).push_to_hub("me/exported")
there = coss_hf.Student.from_pretrained("me/exported")
there.push_to_hub("me/exported-copy")
shutil.rmtree(folder / "onnx")
push(folder, "me/exported", commit_message="from a folder without them")
there.push_to_hub("me/exported", commit_message="from the Hub")
print("CHANGED", file=sys.stderr)
with torch.no_grad():
    next(there.model.parameters()).add_(1)
there.push_to_hub("me/exported", commit_message="other weights")
"""

AGAIN = """
import sys
from recipes.push import main
try:
    main([sys.argv[1], "--repo_id=me/my-student", "--private"])
except SystemExit as exit:
    assert exit.code == 1
main([sys.argv[1], "--repo_id=my-student"])
"""


@pytest.fixture(scope="module")
def hub():
    """One for all tests, which use different repositories: packages read its address at their import."""
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def world(tmp_path):
    images = h.write_images(tmp_path / "images")
    teacher = h.save_resnet(tmp_path / "teacher", seed=1)
    student = h.save_resnet(tmp_path / "student", seed=2, hidden_sizes=(4, 4, 8))
    return {"teacher": teacher, "student": student, "dataset": str(images), "neighbors_cache": str(tmp_path / "nn")}


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    """Of the programs: the Hub's address, a cache that is empty at first, and no token."""
    found = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    found |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    return found | {"HF_HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(h.ROOT)}


@pytest.fixture
def run(environment):
    return lambda words, token=TOKEN, **options: run_words(environment, words, token, **options)


def run_words(imported_in: dict, words: list, token: str | None, **options) -> subprocess.CompletedProcess:
    """In a fresh process; retries of huggingface_hub do not wait."""
    environment = imported_in | ({"HF_TOKEN": token} if token else {})
    words = [*map(str, words), *(f"--{key}={value}" for key, value in options.items())]
    done = run_program(words, environment=environment, imported_in=imported_in)
    assert not re.search(f"{TOKEN}|{READ_TOKEN}", done.stdout + done.stderr), "a token was printed"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def error(done: subprocess.CompletedProcess) -> str:
    return "".join(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_a_student_makes_the_round_trip(hub, run, tmp_path, world):
    out = tmp_path / "my-student"
    words = [*DISTILL, "--push_to_hub", "--hub_private_repo=true", "--hub_token", TOKEN]
    world |= {"hub_model_id": "me/my-student", "output_dir": out}

    # The upload breaks off: the student is complete, nothing was committed, and the message's own command pushes it.
    hub.break_uploads = True
    done = run(words, token=None, **world)
    assert done.returncode == 1 and f"{out} is complete" in error(done), done.stderr
    assert len(hub.commits["models/me/my-student"]) == 1
    again = re.search(r"python (recipes/push\.py .*)", error(done))[1].split()
    assert again == ["recipes/push.py", str(out), "--repo_id", "me/my-student", "--private"]
    hub.break_uploads = False
    done = run(again)
    assert done.returncode == 0, done.stderr
    sha, message, files = hub.commits["models/me/my-student"][-1]
    assert f"revision {sha}" in done.stdout and message == "Student, 16 images seen"
    assert hub.private["models/me/my-student"]
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "head.safetensors"}
    expected |= {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    expected |= {"1_Pooling/config.json"}
    expected |= {f"{number}_Dense/{name}" for number in (2, 3) for name in ("config.json", "model.safetensors")}
    expected |= {
        "README.md",
        "run.json",
        "report.html",
        "loss.png",
        "neighbors.png",
        "projection.png",
        ".gitattributes",
    }
    assert {name for name in files if not name.endswith(".py")} == expected
    assert all(data == (out / name).read_bytes() for name, data in files.items() if name != ".gitattributes")
    here = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in data for data in [*files.values(), *here])

    # By name, in a fresh process, by the card's own words.
    loaded = run(["-c", LOAD, "me/my-student"])
    assert "EMBEDDED (1, 8)" in loaded.stdout, loaded.stderr
    _, message, copied = hub.commits["models/me/copy"][-1]
    assert message == "A copy" and {*copied} == {*files}

    # Another run pushes a second revision; weights that it does not have go.
    hub.private["models/me/my-student"] = False
    (out / "head.safetensors").unlink()
    modules = json.loads((out / "modules.json").read_text())
    (out / "modules.json").write_text(json.dumps(modules[:2]))  # no dense layers
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"images_seen": 32}))
    done = run(["-c", AGAIN, out])
    assert done.returncode == 0 and "is public" in error(done), done.stderr
    (first, _, old), (second, message, files) = hub.commits["models/me/my-student"][-2:]
    assert message == "Student, 32 images seen" and first == sha != second
    assert "head.safetensors" in old and "head.safetensors" not in files
    assert "2_Dense/model.safetensors" in old and not any(name.startswith("2_Dense") for name in files)


def exported_student(folder: Path) -> dict[str, bytes]:
    """Save a student with exported files, which nothing reads; returns those of its weights."""
    networks.save("resnet", folder / "network")
    backbone = load_backbone(str(folder / "network")).freeze()
    space = {"teacher": "t", "revision": None, "pooling": "pooler", "dim": backbone.dim, "head": False}
    backbone.model.config.teacher_space = space
    Student(backbone).save_pretrained(folder)
    (folder / "README.md").write_text(
        '---\ntags: [a]\n---\n# S\n\n## Use\n\n### coss_hf\n\nname = "s"\n\n## Training\n'
    )
    record = json.dumps({"weights": weights_digest(folder)}).encode()
    files = {"onnx/model.onnx": b"graph", "onnx/model_int8.onnx": b"int8", "onnx/export.json": record}
    others = {"openvino/openvino_model.xml": b"old", "openvino/export.json": b'{"weights": "others"}'}
    for name, content in (files | others).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def test_exports_are_pushed_and_stay_on_the_hub_with_their_weights(hub, run, tmp_path):
    """`Student.push_to_hub` pushed no exports, and deleted those of its own weights from the Hub without a word."""
    files = exported_student(tmp_path)
    done = run(["-c", EXPORTS, tmp_path])
    assert done.returncode == 0, done.stderr
    *unchanged, (_, message, changed) = hub.commits["models/me/exported"][1:]
    assert len(unchanged) == 3 and message == "other weights"
    copied = hub.files("models/me/exported-copy")
    for found in [copied, *(found for _, _, found in unchanged)]:
        assert {name: found.get(name) for name in files} == files
        assert not any(name.startswith("openvino") for name in found), "they are of other weights"
    for found in (copied, unchanged[0][2], unchanged[2][2]):
        assert b"### ONNX Runtime" in found["README.md"]
    assert not {*files} & {*changed} and b"### ONNX Runtime" not in changed["README.md"]
    before, after = done.stderr.split("CHANGED")
    assert "deleted" not in before
    assert "me/exported: this push deleted onnx/model.onnx, onnx/model_int8.onnx, onnx/export.json, since" in after


@pytest.mark.slow
def test_a_student_of_timm_loads_by_its_name_on_the_hub(hub, environment, tmp_path):
    """By the card's own code, in a fresh process without this package."""
    networks.save("timm_resnet", tmp_path / "network")
    student = Student(load_backbone(str(tmp_path / "network")).freeze())
    student.save_pretrained(tmp_path / "student")
    files = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir() if path.is_file()}
    hub.private["models/me/of-timm"] = False
    hub.add("models/me/of-timm", "", files)
    subject = Subject("me/of-timm", student.backbone, None, tmp_path / "student", on_hub=True)
    (loader,) = (loader for loader in LOADERS if loader.title == "timm")
    code = loader.code(subject)
    assert "hf-hub:" in code
    done = subprocess.run(
        [sys.executable, "-c", TIMM, str(tmp_path)], input=code, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = student.encode([Image.open(tmp_path / "image.png")])
    found = torch.load(tmp_path / "embedding.pt")
    assert torch.cosine_similarity(found.double(), expected.double()).min() >= 0.9999


def test_neighbours_make_the_round_trip(hub, run, tmp_path, world):
    out = tmp_path / "with-neighbors"
    words = ["recipes/neighbors.py", "--use_cpu", "--push_to_hub=me/neighbours", "--neighbors_pool=4"]
    done = run(words, output=out, **{k: v for k, v in world.items() if k != "student"})
    assert done.returncode == 0, done.stderr
    # An organisation may have private repositories by default.
    assert not {"visibility", "private"} & hub.created["datasets/me/neighbours"].keys()
    files = hub.files("datasets/me/neighbours")
    assert "neighbors.json" in files and any(name.endswith(".parquet") for name in files)
    teacher = {path.name: path.read_bytes() for path in Path(world["teacher"]).iterdir() if path.is_file()}
    hub.private["models/some/teacher"] = False
    old = hub.add("models/some/teacher", "", teacher | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    world |= {
        "teacher": "some/teacher",
        "dataset": "me/neighbours",
        "output_dir": tmp_path / "s",
        "neighbors_cache": tmp_path / "unused",
    }
    done = run(DISTILL, **world, neighbors_k=1, neighbors_pool=4)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "unused").exists(), "nothing had to be searched"
    card = (tmp_path / "s" / "README.md").read_text()
    assert "datasets: me/neighbours" in card and "/datasets/me/neighbours)" in card
    # The teacher's revision and licence are those of its page.
    assert "base_model: some/teacher" in card and f"`{old}`" in card and "no commercial use" in card
    assert "no commercial use" in done.stderr


VERSIONS = """
import json, os
from transformers import AutoModel
from coss_hf.hub.model_card import revision_of
from coss_hf.models.classifier_head import find_classifier
from coss_hf.models.loading import is_checkpoint, load_backbone
from coss_hf.trainer.distillation_model import _teacher_space
from coss_hf.trainer.inputs import as_backbone
name = "some/versions"
found = {}
def note(key, backbone):
    classifier = find_classifier(backbone)
    found[key] = [
        backbone.revision,
        revision_of(backbone),
        _teacher_space(backbone, None)["revision"],
        backbone.processor.image_mean[0],
        None if classifier is None else float(classifier.bias[0]),
    ]
note("tag", load_backbone(name, argument="teacher", revision="v1"))
note("in memory", as_backbone(AutoModel.from_pretrained(name, revision="v1"), "teacher"))
found["looked up"] = [is_checkpoint(name, "v1"), is_checkpoint(name)]
note("main", load_backbone(name, argument="teacher"))
os.environ["HF_HUB_OFFLINE"] = "1"
note("commit", load_backbone(name, argument="teacher", revision=found["tag"][0]))
print("FOUND", json.dumps(found))
"""


def test_a_teacher_of_a_revision_is_read_of_that_commit_alone(hub, run, tmp_path):
    """Its classifier was that of main, and so was the commit that the card and the student name."""
    commits = []
    for number, mean in enumerate((0.25, 0.75), start=1):
        config = ResNetConfig(hidden_sizes=[4, 8], depths=[1, 1], embedding_size=4, layer_type="basic", num_labels=3)
        torch.manual_seed(0)
        network = ResNetForImageClassification(config)
        with torch.no_grad():
            network.classifier[1].bias.fill_(number)
        network.save_pretrained(tmp_path / "versions")
        networks.half(16).from_dict({"image_mean": [mean] * 3, "size": {"height": 16, "width": 16}}).save_pretrained(
            tmp_path / "versions"
        )
        files = {path.name: path.read_bytes() for path in (tmp_path / "versions").iterdir()}
        commits.append(hub.add("models/some/versions", "", files))
    hub.private["models/some/versions"] = False
    hub.tags["models/some/versions"] = {"v1": commits[0]}
    done = run(["-c", VERSIONS])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND ")[2])
    first = [commits[0]] * 3
    assert found["tag"] == found["commit"] == [*first, 0.25, 1]
    assert found["in memory"] == [*first, 0.25, None]
    assert found["looked up"] == [True, False]
    assert found["main"] == [commits[1]] * 3 + [0.75, 2]


CHECKS = """
import logging, sys
from huggingface_hub import constants
from coss_hf.hub import PushFailed, check_repo, push
logging.basicConfig(format="%(message)s", level=logging.WARNING)
folder, token, read_token = sys.argv[1:]
# What a rehearsal asks: a run whose images are refused must not leave an empty repository.
print("ASKED", check_repo("later", "--hub_model_id", token=token, create=False))
cases = [("me/x", token), ("me/x", "hf_wrong"), ("you/x", token), ("a b/c/d", token), ("me/x", read_token)]
for name, token in [*cases, ("me/x", token)]:
    if len(cases) == 0:
        constants.ENDPOINT = "http://127.0.0.1:9"
    try:
        print("OK", check_repo(name, "--hub_model_id", token=token))
    except ValueError as error:
        print("REFUSED", error)
    try:
        push(folder, name, token=token)
    except PushFailed as error:
        print("FAILED", error)
    del cases[:1]
"""


def test_errors_of_a_push_name_reason_and_remedy(hub, run, tmp_path):
    student = h.save_resnet(tmp_path / "s")
    done = run(["-c", CHECKS, student, TOKEN, READ_TOKEN])
    asked, ok, pushed, *rest = done.stdout.splitlines()
    assert asked == "ASKED me/later" and "models/me/later" not in hub.commits
    assert ok == "OK me/x" and pushed.startswith("Pushed: ")
    for words in ("token is wrong", "neither you (me)", "is an invalid name", "may only read"):
        refused, failed, *rest = rest
        assert refused.startswith("REFUSED --hub_model_id=") and words in refused, refused
        assert failed.startswith("FAILED") and "coss-hf push" in failed and "is complete" in failed, failed
        assert words in failed or words == "is an invalid name"
    # Without network a run may start; only its push fails.
    ok, failed = rest
    assert ok == "OK me/x" and "cannot be reached" in failed and f"{student} is complete" in failed
    assert "asked again at the push" in done.stderr


def test_unreadable_file_is_not_reported_as_network_error(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(_Problem, match="config.json cannot be read \\(Is a directory") as caught:
        with _errors_as_problems("me/x"):
            (tmp_path / "config.json").read_text()
    assert caught.value.refused


@pytest.mark.parametrize(("words", "private"), [([], None), (["--private"], True)])
def test_organization_default_visibility_is_kept(tmp_path, monkeypatch, words, private):
    """huggingface_hub takes False for public, and None for what the organisation says."""
    given = {}
    monkeypatch.setattr(recipe, "push", lambda *args, **options: given.update(options))
    recipe.main([h.save_resnet(tmp_path / "s"), "--repo_id=me/x", *words])
    assert given["private"] is private
    assert load_recipe("neighbors").NeighborsArguments(hub_private_repo=bool(private)).private is private


def answer(status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("PUT", "https://huggingface.co/upload"))
    return HfHubHTTPError(f"{status} of the server", response=response)


def wrapped(inner: Exception) -> Exception:
    """As an upload wraps what went wrong in one of its threads."""
    try:
        raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from inner
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("raised", "words", "refused"),
    [
        (wrapped(answer(500)), "the Hub answers with an error of its own, 500", False),
        (answer(503), "the Hub answers with an error of its own, 503", False),
        (wrapped(answer(403)), "the token may not write to me/x", True),
        (wrapped(answer(429)), "the Hub answers 429", False),
        (wrapped(httpx.ConnectError("no route")), "cannot be reached, or the connection broke (no route)", False),
        (wrapped(ConnectionResetError("reset by peer")), "the connection broke (reset by peer)", False),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE=1 keeps the Hub out of reach", False),
        (PermissionError(13, "Permission denied", "student/config.json"), "student/config.json cannot be read", True),
        (RuntimeError("Data processing error: status 502"), "the push fails (Data processing error: status 502", False),
    ],
)
def test_upload_error_names_its_cause(raised, words, refused):
    """An answer 500 at an upload was called "cannot be reached"."""
    with pytest.raises(_Problem) as problem, _errors_as_problems("me/x"):
        raise raised
    assert words in str(problem.value) and problem.value.refused == refused
    assert ("cannot be reached" in str(problem.value)) == ("cannot be reached" in words or "connection broke" in words)


def test_a_broken_file_of_the_folder_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(_Problem, match=r"run\.json cannot be read .*correct it"):
        _images_seen(tmp_path)


def test_a_push_leaves_the_folder_as_it_is_until_it_has_succeeded(tmp_path):
    (tmp_path / "2_Dense").mkdir()
    for name in ("README.md", "config.json", "2_Dense/README.md"):
        (tmp_path / name).write_text(name)
    with _with_card(tmp_path, "another card") as place:
        found = {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}
    assert found == {
        "README.md": "another card",
        "config.json": "config.json",
        "2_Dense/README.md": "2_Dense/README.md",
    }
    assert (tmp_path / "README.md").read_text() == "README.md"


def test_images_seen_of_a_teacher_are_not_known(tmp_path):
    (tmp_path / "run.json").write_text('{"accuracy": 0.5}')
    assert _images_seen(tmp_path) == ""
    (tmp_path / "run.json").write_text('{"images_seen": 5000}')
    assert _images_seen(tmp_path) == ", 5,000 images seen"
