"""How losses become methods, and what a built loss is given."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from torch import nn

import coss_hf.losses
from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.combination import SumLoss, parse_methods
from coss_hf.losses.registry import LOSSES, build_loss, import_losses, papers
from tests.helpers.loss_registry import losses_of_a_test

SOURCE = """
from coss_hf.losses.base import DistillationLoss


class FoundLoss(DistillationLoss):
    name = "found"
    reads = "embedding"
"""


@pytest.fixture(autouse=True)
def _losses_of_this_test():
    with losses_of_a_test():
        yield


def test_coss_comes_first_and_the_others_by_their_names():
    names = list(LOSSES)
    assert names[0] == "coss" and names[1:] == sorted(names[1:])
    assert len(LOSSES) == len(names) and LOSSES["coss"].__name__ == "CoSSLoss"
    assert "nothing" not in LOSSES and LOSSES.get("nothing") is None
    assert repr(LOSSES).startswith("Losses(coss, at, ")


def test_a_definition_registers_a_loss():
    class Mine(DistillationLoss):
        name = "mine"

    class Variant(Mine):
        """Without a name of its own."""

    assert LOSSES["mine"] is Mine
    assert [name for name in LOSSES if LOSSES[name].__module__ == __name__] == ["mine"]


def test_a_file_in_the_package_is_found(tmp_path, monkeypatch):
    """Adding a method is adding its file."""
    (tmp_path / "found.py").write_text(SOURCE)
    monkeypatch.setattr(coss_hf.losses, "__path__", [*coss_hf.losses.__path__, str(tmp_path)])
    try:
        import_losses()
        assert LOSSES["found"].__module__ == "coss_hf.losses.found"
        importlib.reload(sys.modules["coss_hf.losses.found"])
        assert LOSSES["found"] is sys.modules["coss_hf.losses.found"].FoundLoss, "imported again, the newest counts"
    finally:
        sys.modules.pop("coss_hf.losses.found", None)


def test_a_name_is_given_once():
    before = LOSSES["coss"]
    with pytest.raises(
        ValueError, match="Other.name='coss' is the name of coss_hf.losses.coss.CoSSLoss; choose another"
    ):

        class Other(DistillationLoss):
            name = "coss"

    assert LOSSES["coss"] is before


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ({"reads": "map"}, "reads='map' is unknown: choose one of embedding, maps"),
        ({"classifier": True}, "classifier=True"),
    ],
)
def test_bad_declarations_are_rejected(attribute, message):
    with pytest.raises(ValueError, match=message):
        type("Bad", (DistillationLoss,), {"name": "bad", **attribute})
    assert "bad" not in LOSSES


class Recorder(DistillationLoss):
    """Keeps what it is given."""

    def forward(self, student, teacher, index=None):
        self.given = student, teacher, index
        return {"loss": student.embedding.sum()}


@pytest.mark.parametrize(
    ("reads", "kept", "logits"),
    [
        ("embedding", [], False),
        ("maps", [0, 1, 2], False),
        ("last_map", [2], False),
        ("middle_map", [1], False),
        ("logits", [], True),
    ],
)
@pytest.mark.parametrize("text", ["recording", "coss + recording"])
def test_a_built_loss_is_given_what_it_reads(reads, kept, logits, text):
    type("Recording", (Recorder,), {"name": "recording", "reads": reads})
    maps = tuple(torch.full((2, i + 1, 2, 2), float(i)) for i in range(3))
    features = Features(torch.ones(2, 4), maps, torch.ones(2, 5))
    loss = build_loss(parse_methods(text), features, features)
    loss(features, teacher=features, index=torch.arange(2))
    part = loss.losses["recording"] if isinstance(loss, SumLoss) else loss
    for given in part.given[:2]:
        assert given.embedding is features.embedding
        assert [x.shape[1] - 1 for x in given.maps] == kept
        assert (given.logits is not None) == logits
    assert torch.equal(part.given[2], torch.arange(2))


def test_a_copy_of_a_built_loss_is_given_the_same():
    """Under FSDP the loss of a run is copied."""
    first, last = torch.full((2, 3, 2, 2), torch.nan), torch.rand(2, 3, 2, 2)
    features = Features(torch.ones(2, 4), (first, last))
    loss = build_loss(parse_methods("sp"), features, features)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other(features, features)["loss"] == 0


def test_shapes_are_those_of_what_is_read():
    class Shapes(DistillationLoss):
        name = "shapes"
        reads = "middle_map"

        def __init__(self, student_dim, teacher_dim, student_size=None, teacher_size=None):
            super().__init__()
            self.shapes = student_dim, teacher_dim, student_size, teacher_size

    student = Features(torch.ones(2, 7), tuple(torch.ones(2, i, 9 - i, 9 - i) for i in (1, 2, 3)))
    teacher = Features(torch.ones(2, 8), tuple(torch.ones(2, i, 9 - i, 9 - i) for i in (4, 5, 6)))
    (method,) = parse_methods("shapes")
    assert build_loss([method], student, teacher).shapes == (2, 5, 7, 4)
    assert build_loss([method], Features(student.embedding), teacher).shapes == (7, 8, None, None)
    Shapes.reads, Shapes.uses_maps = "embedding", False
    assert build_loss([method], student, teacher).shapes == (7, 8, None, None)


def test_a_required_classifier_must_read_the_last_map():
    class Classifying(DistillationLoss):
        name = "classifying"
        reads = "last_map"
        classifier = "required"

        def __init__(self, classifier):
            super().__init__()

    features = Features(torch.ones(2, 3), (torch.zeros(2, 3, 2, 2),))
    with pytest.raises(ValueError, match="--method classifying applies the teacher's classifier to the mean"):
        build_loss(parse_methods("classifying"), features, features, classifier=nn.Linear(3, 2))


def test_what_a_loss_of_a_run_saves_is_named_as_in_a_loss_alone():
    s, t = Features(torch.ones(2, 3)), Features(torch.ones(2, 4))
    alone = build_loss(parse_methods("vid"), s, t).state_dict().keys()
    assert "log_scale" in alone
    several = build_loss(parse_methods("vid + srrl"), s, t).state_dict().keys()
    assert {f"losses.vid.{name}" for name in alone} < set(several)


def test_papers_of_a_sum():
    class Cited(DistillationLoss):
        name = "cited"
        citation = Citation(authors="Nobody, A.", title="Nothing", year=2020)

    class Uncited(DistillationLoss):
        name = "uncited"

    (coss, cited) = papers(["coss", "bn", "uncited", "cited"])
    assert coss[1] == "https://arxiv.org/abs/2409.13939" and coss[2].startswith("@inproceedings{coss2024,\n")
    assert cited == (
        "Nothing",
        None,
        "@misc{cited2020,\n  title = {{Nothing}},\n  author = {Nobody, A.},\n  year = {2020}\n}",
    )
    assert papers(["bn"])[0][2].startswith("@inproceedings{bn2024,")
    assert papers(["uncited"]) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("No", False),
        ("null", None),
        ("None", None),
        ("-3", -3),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("mean", "mean"),
        ("'mean'", "mean"),
    ],
)
def test_values_of_options(text, value):
    ((name, options),) = parse_methods(f"at(x={text})")
    assert options == {"x": value} and type(options["x"]) is type(value)
    assert parse_methods(f"at(x={options['x']})")[0].options == options
