"""The commit on the Hub that a network was loaded from."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit in the cache that a revision means; the revision where it is not there, and None for a folder.

    Args:
        name: Hub name or folder.
        revision: branch, tag or commit on the Hub; None for main.
    """
    if Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a class, or whatever else a network in memory is called
        return None
    return Path(file).parent.name if isinstance(file, str) else revision


def commit_in_memory(model: nn.Module) -> str | None:
    """The commit that a network in memory was loaded from; None where that is not known.

    Configurations of Transformers keep it no longer: where the cache has one commit of the model, it is that.
    """
    known = getattr(model.config, "_commit_hash", None)
    name = getattr(model, "name_or_path", None)
    if known or not name or Path(name).exists():
        return known
    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    found = [path.parent.name for path in folder.glob("*/config.json")]
    return found[0] if len(found) == 1 else None
