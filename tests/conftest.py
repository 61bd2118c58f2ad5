import os
from pathlib import Path

# Before any Hugging Face import: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images, checkpoints and numerical references beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: it holds the real images and checkpoints of this test")
    return SHARED


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: a second thread only adds noise."""
    torch.set_num_threads(1)
