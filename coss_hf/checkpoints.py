"""Which checkpoint to resume from."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def read_state(folder: str | Path) -> dict | None:
    """Trainer state of a complete checkpoint, else None: it is written last, and a half-written one does not parse."""
    try:
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if "global_step" in state and (Path(folder) / "config.json").is_file() else None


def finished(state: dict, args) -> bool:
    """Whether the run that saved ``state`` is already as long as ``args`` ask for."""
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["epoch"] >= args.num_train_epochs


def find_checkpoint(output_dir: str, asked: str | bool | None) -> str | None:
    """Folder to resume from.

    Args:
        output_dir: of the run.
        asked: None or False for a fresh start; True, ``"auto"`` or ``"True"`` for the newest complete checkpoint, None
            if there is none; else a checkpoint folder.

    Raises:
        ValueError: a folder that is not a complete checkpoint.
    """
    if not asked or str(asked).lower() in ("false", "none"):
        return None
    if asked is True or str(asked).lower() in ("auto", "true"):
        folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
        folders.sort(key=lambda folder: int(folder.name[11:]), reverse=True)
        return next((str(folder) for folder in folders if read_state(folder)), None)
    folder = Path(asked)
    if not read_state(folder):
        inside = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        hint = f" Did you mean {inside}?" if inside else " Give --resume_from_checkpoint auto for the newest."
        raise ValueError(f"--resume_from_checkpoint={asked} is not a complete checkpoint.{hint}")
    return str(folder)
