"""What a run was given and what it used, for its record."""

import json
import os
import shlex
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

# Read before any library sets it.
LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: version(name) for name in ("torch", "torchvision", "transformers", "accelerate", "datasets")}


def command() -> str:
    """The command line, its secrets hidden, with what started the processes."""
    if os.environ.get("COSS_HF_COMMAND"):
        return os.environ["COSS_HF_COMMAND"]
    if "ipykernel" in sys.modules:
        return "a notebook"  # what started its kernel tells nothing, but where this machine keeps its files
    return shlex.join([*launcher(), *hide_secrets(sys.argv)])


def launcher() -> list[str]:
    """What started this process: python, accelerate or torchrun, with the number of processes and the precision."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if not LAUNCHED:
        if world == 1:
            return ["python"]
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        nodes = ["--standalone"]
        if world > local:
            nodes = ["--nnodes", str(world // local), "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:PORT"]
        return ["torchrun", *nodes, "--nproc_per_node", str(local)]
    words = ["accelerate", "launch"]
    if world > 1:
        import torch  # not for a command's help, which imports this module

        # Without a configuration that says so, accelerate starts one process on a CPU, however many are asked for.
        on_cpu = "--use_cpu" in sys.argv or not torch.accelerator.is_available()
        words += ["--config_file", "accelerate_configs/cpu.yaml"] if on_cpu else []
        words += ["--num_processes", str(world)]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return words + (["--mixed_precision", precision] if precision != "no" else [])


def hide_secrets(words: list[str]) -> list[str]:
    """The words of a command line, with ``***`` as the value of every option that ends in ``token``.

    Example:
        >>> hide_secrets(["--hub_token", "abc", "--seed", "1"])
        ['--hub_token', '***', '--seed', '1']
    """
    shown = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and name.endswith("token")
        if hide:
            shown.append("***")
        else:
            shown.append(f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    return shown


def read_json(path: str | Path) -> dict:
    """Read a JSON file of entries.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); correct or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no entries, as {{...}} would; correct or remove it.")
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Write a file atomically, folders included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(unfinished, path)


def to_dict(*parsed) -> dict:
    """What a run was given, for its record; secrets left out."""
    return {f.name: getattr(p, f.name) for p in parsed for f in fields(p) if f.init and not f.name.endswith("token")}
