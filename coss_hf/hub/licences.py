"""The licence of a network: what its card, its configuration and the text next to its weights say."""

import json
from pathlib import Path

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from coss_hf.models.files import find_file
from coss_hf.models.revision import commit_of
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

PERMISSIVE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0")
TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
# Sentences of licences; all of a line must be found, and the first line that fits decides.
WORDS = {
    "apache-2.0": ("apache license", "version 2.0"),
    "bsd-3-clause": ("redistribution and use in source and binary forms", "neither the name"),
    "bsd-2-clause": ("redistribution and use in source and binary forms",),
    "isc": ("permission to use, copy, modify, and/or distribute this software for any purpose",),
    "mit": ("permission is hereby granted, free of charge", "without restriction"),
    "agpl-3.0": ("gnu affero general public license", "version 3"),
    "lgpl-3.0": ("gnu lesser general public license", "version 3"),
    "gpl-3.0": ("gnu general public license", "version 3"),
    "cc-by-nc-sa-4.0": ("attribution-noncommercial-sharealike 4.0",),
    "cc-by-nc-4.0": ("attribution-noncommercial 4.0",),
    "cc-by-sa-4.0": ("attribution-sharealike 4.0",),
    "cc-by-4.0": ("attribution 4.0 international",),
    "cc0-1.0": ("cc0 1.0 universal",),
    "unlicense": ("this is free and unencumbered software",),
}


def on_hub(name: str | None, kind: str = "model") -> bool:
    """Whether a model or dataset given by ``name`` came from the Hub, and not from a disk or from memory.

    A network in memory may be called by its class. So a model has an owner in its name, or it is in the cache.
    """
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    if Path(name).exists():
        return False
    return "/" in name or kind == "dataset" or commit_of(name) is not None


def licence_of(name: str, revision: str | None = None) -> tuple[str | None, str]:
    """A network's licence by its card, its ``config.json`` or the text next to its weights, and a sentence on it.

    Args:
        name: Hub name or folder.
        revision: on the Hub.
    """
    if not (on_hub(name) or Path(name).exists()):
        return (
            None,
            "**not known**: it is neither on the Hub nor in a folder that is there; look it up where it comes from "
            "before you publish or use this student.",
        )
    gated = False
    try:
        if on_hub(name):
            info = HfApi().model_info(name, revision=revision, timeout=10)
            card = info.card_data.to_dict() if info.card_data else {}
            gated = bool(info.gated)
        else:
            path = Path(name, "README.md")
            card = (metadata_load(path) if path.is_file() else None) or {}
    except Exception as error:  # no network, or a card that is no YAML: no reason to lose a student
        logger.debug("no card of %s: %s", name, error)
        return None, "**could not be read**: look it up before you publish or use this student."
    licence = _in_words(card.get("license")) or _by_config(name, revision)
    if not licence:
        licence, path = _by_text(name, revision)
        if path and not licence:
            return "other", f"**terms of its own**, in `{path}` next to its weights; read it before you publish this."
    if not licence:
        return (
            None,
            "**not stated**: without a licence its author keeps all rights; ask before you publish or use this.",
        )
    named = f"`{card['license_name']}`" if licence == "other" and card.get("license_name") else f"`{licence}`"
    if gated:
        return licence, f"{named}, and **access to it is gated**: its terms may reach this student."
    if licence in PERMISSIVE:
        return licence, f"{named}."
    limit = "no commercial use" if "-nc" in licence else "terms of its own"
    return licence, f"{named}: **{limit}**; read it before you publish or use this student."


def _in_words(given) -> str | None:
    return ", ".join(given) if isinstance(given, list) else given or None


def _by_config(name: str, revision: str | None) -> str | None:
    """What ``config.json`` says, as timm's do; None where it says nothing."""
    path = _file(name, "config.json", revision)
    try:
        config = json.loads(Path(path).read_text()) if path else {}
    except ValueError as error:  # whoever loads the network says so
        logger.debug("config.json of %s: %s", name, error)
        return None
    nested = config.get("pretrained_cfg") or {}
    return _in_words(config.get("license") or nested.get("license"))


def _by_text(name: str, revision: str | None) -> tuple[str | None, str | None]:
    """The licence whose sentences stand in a text next to the weights, and the text's name; None for either."""
    for file in TEXTS:
        path = _file(name, file, revision)
        if path is None:
            continue
        text = " ".join(Path(path).read_text(errors="replace").lower().split())
        return next((key for key, words in WORDS.items() if all(word in text for word in words)), None), file
    return None, None


def _file(name: str, file: str, revision: str | None) -> str | None:
    try:
        return find_file(name, file, revision)
    except (OSError, ValueError) as error:  # no folder, no repository, no network
        logger.debug("%s of %s: %s", file, name, error)
        return None
