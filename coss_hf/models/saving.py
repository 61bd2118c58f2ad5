"""The network of a student in a folder: in one layout that both ``AutoModel`` and, for its networks, timm load."""

import json
from pathlib import Path

from torch import Tensor

from coss_hf.models.backbone import Backbone
from coss_hf.models.image_processor import is_timm_processor
from coss_hf.models.loading import without_bars
from coss_hf.models.modules import ModuleNetwork
from coss_hf.models.pooler import TIMM, settled

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
PREFIX = "timm_model."  # of the keys by which Transformers' wrapper of timm knows them
# Where timm would look for other weights than those in the folder, and what it says of a classifier.
NOT_KEPT = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "tag"}
NOT_KEPT |= {"label_names", "label_descriptions", "label_offset"}


def save_network(student: Backbone, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write configuration and weights of a student's network, without an untrained pooler (``settled``).

    The weights of a network of timm are written by timm's own keys, and its configuration has what
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads; Transformers' wrapper reads both, too.

    Args:
        student: whose network is written.
        folder: made where it is missing.
        state_dict: of the network, instead of its own.
    """
    network = student.model
    if isinstance(network, ModuleNetwork):
        network.save_pretrained(folder, state_dict=state_dict)
        return
    state, entries = settled(student, network.state_dict() if state_dict is None else state_dict)
    path = Path(folder, CONFIG_FILE)
    if network.config.model_type == TIMM:
        own = {key.removeprefix(PREFIX): value for key, value in state.items()}
        with without_bars():
            network.save_pretrained(folder, state_dict=own, save_original_format=False)
        config = _timm_config(json.loads(path.read_text()), student) | entries
    else:
        with without_bars():
            network.save_pretrained(folder, state_dict=state)
        config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_processor(processor, folder: str | Path) -> None:
    """Write a student's image processor; timm's is part of ``config.json``, and a file of another student goes."""
    if is_timm_processor(processor):
        Path(folder, PROCESSOR_FILE).unlink(missing_ok=True)
    processor.save_pretrained(folder)


def _timm_config(config: dict, student: Backbone) -> dict:
    """The configuration of a network without classifier, which timm would look for in the weights."""
    config = {key: value for key, value in config.items() if key not in ("label_names", "id2label", "label2id")}
    if config.get("model_args") is None:
        config.pop("model_args", None)  # timm takes what is there for a dictionary
    given = config.get("pretrained_cfg") or {}
    kept = {key: value for key, value in given.items() if key not in NOT_KEPT and value is not None}
    return {**config, "num_classes": 0, "num_features": student.dim, "pretrained_cfg": {**kept, "num_classes": 0}}
