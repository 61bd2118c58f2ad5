"""One file a loss, one plain dictionary of names.

A loss is a module called with student and teacher ``Features`` and the dataset indices of the images. It never holds
a network and returns a dictionary of scalars with the key ``loss``. Class attributes say what it needs:
``uses_maps`` (feature maps, where a network gives them) and ``same_dim`` (embeddings of one dimension).
"""

import inspect

import torch
from torch import nn

from coss_hf.features import Features
from coss_hf.losses.at import ATLoss
from coss_hf.losses.bn import BNLoss
from coss_hf.losses.combination import Method, OfLastMap, SumLoss
from coss_hf.losses.coss import CoSSLoss
from coss_hf.losses.crd import CRDLoss
from coss_hf.losses.dist import DISTLoss
from coss_hf.losses.factor import FactorLoss
from coss_hf.losses.hint import HintLoss
from coss_hf.losses.kd import KDLoss
from coss_hf.losses.nst import NSTLoss
from coss_hf.losses.pkt import PKTLoss
from coss_hf.losses.rkd import RKDLoss
from coss_hf.losses.seed import SEEDLoss
from coss_hf.losses.sp import SPLoss
from coss_hf.losses.srrl import SRRLLoss
from coss_hf.losses.vid import VIDLoss

LOSSES = {
    "coss": CoSSLoss,
    "at": ATLoss,
    "bn": BNLoss,
    "crd": CRDLoss,
    "dist": DISTLoss,
    "factor": FactorLoss,
    "hint": HintLoss,
    "kd": KDLoss,
    "nst": NSTLoss,
    "pkt": PKTLoss,
    "rkd": RKDLoss,
    "seed": SEEDLoss,
    "sp": SPLoss,
    "srrl": SRRLLoss,
    "vid": VIDLoss,
}
# Those of embeddings alone, without a memory of the training set: they can be computed of held-out images.
OF_EMBEDDINGS = ("bn", "coss", "dist", "pkt", "rkd")
# Those of maps that do not take an embedding for one.
OF_MAPS = ("at", "nst")
# Those that use the teacher's classifier.
OF_CLASSIFIERS = ("kd", "srrl")
# Those with `totals`: sums over a batch that the loss is computed from (exact accumulation).
SEPARABLE = ("coss",)


def build_loss(methods: list[Method], student: Features, teacher: Features, **given) -> nn.Module:
    """The loss of one method, or the sum of several.

    Args:
        methods: names and options.
        student, teacher: features of a few images, for the shapes of what a loss learns.
        given: what else a loss may ask for by name: ``num_images``, ``batch_size``, ``classifier``.

    Raises:
        ValueError: an option that the method does not have, or a value that it refuses.
    """
    losses = {}
    for method in methods:
        own = given | _shapes(method.name, student, teacher)
        if method.name == "srrl" and not _pools_to_embedding(teacher):
            own["classifier"] = None
        loss = _build(method, own)
        losses[method.name] = OfLastMap(loss) if method.name == "sp" else loss
    return SumLoss(losses) if len(losses) > 1 else losses[methods[0].name]


def _build(method: Method, given: dict) -> nn.Module:
    takes = inspect.signature(LOSSES[method.name]).parameters
    options = [name for name in takes if name not in given and name not in ("student_size", "teacher_size")]
    for name in method.options:
        if name not in options:
            raise ValueError(f"--method={method}: {method.name} has no option {name!r}; it has {', '.join(options)}.")
    try:
        return LOSSES[method.name](**{name: given[name] for name in takes if name in given}, **method.options)
    except (TypeError, ValueError) as error:
        told = str(error)
        raise ValueError(told if told.startswith("--method") else f"--method={method}: {told}") from error


def _shapes(name: str, student: Features, teacher: Features) -> dict:
    """Channels and sides of the maps compared where a method reads maps, else dimensions of the embeddings."""
    if not (LOSSES[name].uses_maps and student.maps):
        return {"student_dim": student.embedding.shape[1], "teacher_dim": teacher.embedding.shape[1]}
    at = len(student.maps) // 2 if name == "hint" else -1
    s, t = student.maps[at].shape, teacher.maps[at].shape
    return {"student_dim": s[1], "teacher_dim": t[1], "student_size": s[2], "teacher_size": t[2]}


def _pools_to_embedding(teacher: Features) -> bool:
    """Whether the mean of the last map is what a classifier of the embedding reads; a class token is not."""
    if not teacher.maps:
        return True
    pooled = teacher.maps[-1].mean((2, 3))
    return pooled.shape == teacher.embedding.shape and torch.allclose(pooled, teacher.embedding, rtol=1e-3, atol=1e-4)
