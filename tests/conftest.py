import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before any Hugging Face import: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Bars share a lock with forked processes, and one that a test kills may take it along.
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


# Files that take longest, most of them since they start processes: first, so that none is left over at the end.
LONGEST = (
    "test_crash",
    "test_push",
    "test_two_processes",
    "test_fsdp",
    "test_export",
    "test_processes",
    "test_distributed",
    "test_wandb_tracker",
    "test_cached_teacher",
    "test_front_door",
)


def pytest_configure(config):
    """One empty cache for all processes of the session, instead of what other programs of this machine have cached."""
    atexit.register(gc.unfreeze)  # else bindings of C++ report what was not collected as leaked
    if "HF_HOME" not in os.environ:
        home = tempfile.TemporaryDirectory(prefix="coss-hf-tests-")
        os.environ["HF_HOME"] = home.name
        config.add_cleanup(home.cleanup)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images, checkpoints and numerical references beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: it holds the real images and checkpoints of this test")
    return SHARED


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_kept():
    """Each training collects garbage first, which would look at all of it: a second of each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: a second thread only adds noise."""
    torch.set_num_threads(1)


@pytest.fixture
def messages_as_written():
    """With flags, as for somebody at a command line; ``tests/utils/test_messages.py`` has the words for Python."""
    from coss_hf.utils.messages import command_line

    with command_line():
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """What many tests start from, made once; each test gets a copy, which it may change."""
    import tests.helpers.runs as h

    folder = tmp_path_factory.mktemp("saved")
    h.write_images(folder / "images")
    h.save_resnet(folder / "teacher", seed=1)
    h.save_resnet(folder / "resnet", seed=2)
    h.save_resnet(folder / "small", seed=2, hidden_sizes=(4, 4, 8))
    h.save_vit(folder / "vit", seed=2)
    return folder


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Folder of a checkpoint with code of its own, which is forgotten afterwards: other tests keep it elsewhere."""
    from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetModel
    from coss_hf.models.cifar.registry import cifar_config, cifar_image_processor

    def take() -> dict:
        names = [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "modules")  # before the folder that another test's checkpoint added
    folder = tmp_path / "checkpoint"
    CifarResNetModel(cifar_config("resnet8x4")).save_pretrained(folder)
    cifar_image_processor([0.5] * 3, [0.5] * 3).save_pretrained(folder)
    for name in ("config.json", "configuration_cifar_resnet.py"):  # as if this package did not know it
        text = (folder / name).read_text()
        assert '"cifar_resnet"' in text
        (folder / name).write_text(text.replace('"cifar_resnet"', '"of_my_own"'))
    before = take()
    yield folder
    take()
    sys.modules.update(before)


@pytest.fixture
def image_parquet(saved, tmp_path):
    """Folder with train.parquet (48 images of 4 colours) and test.parquet (24), 16x16, labelled."""
    return shutil.copytree(saved / "images", tmp_path / "images")


@pytest.fixture
def networks(saved, tmp_path):
    """Folders of tiny networks: a teacher and students of several kinds."""
    from types import SimpleNamespace

    names = ("teacher", "resnet", "small", "vit")
    return SimpleNamespace(**{name: str(shutil.copytree(saved / name, tmp_path / name)) for name in names})


@pytest.fixture
def distill_command(tmp_path, image_parquet, monkeypatch):
    """A teacher, a student, images, and a way to call the recipe of ``distill`` on them."""
    from types import SimpleNamespace

    import tests.helpers.runs as h
    from coss_hf.cli.pages import load_recipe

    w = SimpleNamespace(
        recipe=load_recipe("distill"),
        teacher=h.save_resnet(tmp_path / "teacher", seed=1),
        student=h.save_resnet(tmp_path / "student", seed=2, hidden_sizes=(4, 4, 8)),
        images=str(image_parquet),
        out=tmp_path / "out",
    )

    def run(*argv, **replaced):
        options = {
            "teacher": w.teacher,
            "student": w.student,
            "dataset": w.images,
            "output_dir": str(w.out),
            "settings": "paper",
            "per_device_train_batch_size": 8,
            "augmentation": "cifar",
            "num_images": 48,
            "neighbors_cache": str(tmp_path / "neighbours"),
            "disable_tqdm": True,
            "use_cpu": True,
            **replaced,
        }
        words = [f"--{key}={value}" for key, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["distill.py", *words, *argv])
        w.recipe.main()

    w.run = run
    return w


@pytest.fixture
def passes(monkeypatch):
    """Counts the embedding passes, the expensive part that the cache saves."""
    from coss_hf.neighbors import mining as module

    calls = []
    real = module.embed_shards
    monkeypatch.setattr(module, "embed_shards", lambda *a, **kw: calls.append(a) or real(*a, **kw))
    return calls
