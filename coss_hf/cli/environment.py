"""What `coss-hf env` prints: all that a bug report needs, and no secrets."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "coss-hf",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "faiss-cpu",
    "huggingface_hub",
    "pillow",
    "timm",
    "wandb",
)
VARIABLES = ("ACCELERATE_", "CUDA_VISIBLE", "HF_", "NCCL_", "OMP_", "TORCH", "WANDB_")


def environment() -> str:
    """Versions, devices and settings of this machine, one line each."""
    rows = {
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()} ({platform.machine()})",
        **{name: _version(name) for name in PACKAGES},
        **_devices(),
        "variables": ", ".join(_variables()) or "none",
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "GPUs": ", ".join(names) or "none",
        "CUDA of torch": torch.version.cuda or "none",
        "torch threads": str(torch.get_num_threads()),
    }


def _variables() -> list[str]:
    """Settings in the environment; secrets by name alone."""
    found = sorted(name for name in os.environ if name.startswith(VARIABLES))
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    return [f"{name}=***" if any(part in name for part in secret) else f"{name}={os.environ[name]}" for name in found]
