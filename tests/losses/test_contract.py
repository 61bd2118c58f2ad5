"""What every registered loss must declare, and that it does what it declares."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from coss_hf.features import Features, as_features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.combination import Method
from coss_hf.losses.registry import LOSSES, SHAPES, build_loss

IMAGES, DIM, CLASSES = 6, 8, 5
GIVEN = {"num_images": 30, "batch_size": IMAGES}
INDEX = torch.tensor([1, 5, 1, 29, 0, 7])

every_loss = pytest.mark.parametrize("name", list(LOSSES))
MAP_LOSSES = [name for name, loss in LOSSES.items() if loss.uses_maps]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def student(seed: int = 0, dim: int = DIM) -> Features:
    sizes = [(3, 8), (4, 4), (5, 2)]
    maps = [draw(IMAGES, channels, side, side, seed=seed + i) for i, (channels, side) in enumerate(sizes)]
    return Features(draw(IMAGES, dim, seed=seed + 10), tuple(maps))


def teacher(seed: int = 100) -> Features:
    sizes = [(3, 8), (6, 4), (DIM, 4)]
    maps = [draw(IMAGES, channels, side, side, seed=seed + i) for i, (channels, side) in enumerate(sizes)]
    return Features(maps[-1].mean((2, 3)), tuple(maps))


def build(name: str, s: Features, t: Features) -> nn.Module:
    torch.manual_seed(0)
    classifier = nn.Linear(DIM, CLASSES)
    return build_loss([Method(name, {})], s, t, classifier=classifier, **GIVEN)


def value(name: str, s: Features, t: Features) -> Tensor:
    """The loss of one batch, by a module that is built for ``student`` and ``teacher`` anew."""
    shapes = [student(), teacher()] if s.maps else [s, t]
    return build(name, *shapes)(s, t, INDEX)["loss"].detach()


def only_what_is_read(loss: type[DistillationLoss], features: Features) -> Features:
    """Everything that the loss does not declare to read is NaN."""
    kept = loss.select(features)
    maps = tuple(x if any(x is one for one in kept.maps) else torch.full_like(x, torch.nan) for x in features.maps)
    embedding = features.embedding
    logits = features.logits
    if loss.uses_maps:
        embedding = torch.full_like(embedding, torch.nan)
    if loss.reads != "logits":
        logits = torch.full((len(embedding), CLASSES), torch.nan)
    return Features(embedding, maps, logits)


@every_loss
def test_declares_its_name_and_paper(name):
    loss = LOSSES[name]
    assert issubclass(loss, DistillationLoss) and loss.name == name
    assert loss.__module__ == f"coss_hf.losses.{name}", "one file for each loss, named after its method"
    assert isinstance(loss.citation, Citation)
    assert loss.citation.title and loss.citation.authors and 2014 < loss.citation.year < 2030
    assert loss.uses_maps == (loss.reads in ("maps", "last_map", "middle_map"))


@every_loss
def test_options_have_defaults_and_beta_is_the_scale(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    needed = {key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    assert needed <= {*SHAPES, *GIVEN}
    s, t = student(), teacher()
    arguments = {"student": s, "teacher": t, "classifier": nn.Linear(DIM, CLASSES), **GIVEN}
    torch.manual_seed(0)
    once = build_loss([Method(name, {"beta": 1.0})], **arguments)(s, t, INDEX)["loss"]
    torch.manual_seed(0)
    twice = build_loss([Method(name, {"beta": 2.0})], **arguments)(s, t, INDEX)["loss"]
    torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(ValueError, match="beta=-1"):
        build_loss([Method(name, {"beta": -1})], **arguments)


@every_loss
def test_reads_nothing_but_what_it_declares(name):
    loss = LOSSES[name]
    s, t = student(), teacher()
    got = value(name, only_what_is_read(loss, s), only_what_is_read(loss, t))
    assert got.isfinite()
    assert torch.equal(got, value(name, s, t))


@every_loss
def test_reads_all_that_it_declares(name):
    loss = LOSSES[name]
    s, t = student(), teacher()
    before = value(name, s, t)
    for network in ("student", "teacher"):
        features = {"student": s, "teacher": t}
        kept = loss.select(features[network])
        parts = range(len(kept.maps)) if loss.uses_maps else [None]
        for part in parts:
            other = only_part_changed(features[network], kept, part)
            assert value(name, **{"s": s, "t": t} | {network[0]: other}) != before


def only_part_changed(features: Features, kept: Features, part: int | None) -> Features:
    if part is None:
        return features._replace(embedding=features.embedding.flip(0))
    maps = tuple(x.flip(0) if x is kept.maps[part] else x for x in features.maps)
    return features._replace(maps=maps)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].reads == "logits"])
def test_logits_that_features_carry_are_taken(name):
    logits = draw(IMAGES, CLASSES, seed=1), draw(IMAGES, CLASSES, seed=2)
    nan = torch.full((IMAGES, DIM), torch.nan)
    assert value(name, Features(nan, logits=logits[0]), Features(nan, logits=logits[1])).isfinite()


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_embeddings_may_stand_for_maps_where_declared(name):
    s, t = Features(student().embedding), Features(teacher().embedding)
    if LOSSES[name].embedding_as_map:
        assert value(name, s, t).isfinite()
    else:
        with pytest.raises(ValueError, match=f"--method {name} compares feature maps"):
            value(name, s, t)


@every_loss
def test_other_dimensions_are_rejected_where_declared(name):
    s, t = student(dim=DIM - 1), teacher()
    if LOSSES[name].same_dim:
        with pytest.raises(ValueError, match=r"student \(6, 7\) and teacher \(6, 8\): give the student a head"):
            build(name, s, t)(s, t, INDEX)
    else:
        build(name, s, t)(s, t, INDEX)


@every_loss
def test_depends_on_earlier_batches_where_declared(name):
    values = []
    for seed in (200, 300):
        loss = build(name, student(), teacher())
        loss(student(seed), teacher(seed), INDEX)
        torch.manual_seed(1)
        values.append(loss(student(), teacher(), INDEX)["loss"])
    assert torch.equal(*values) != LOSSES[name].keeps_state


def test_losses_of_held_out_embeddings():
    found = {name for name, loss in LOSSES.items() if loss.is_function_of_embeddings()}
    assert found >= {"coss", "bn", "dist", "pkt", "rkd"} and not found & {"crd", "seed", "at", "kd"}


@every_loss
def test_couples_images_where_declared(name):
    """Of a mean over images, that of two halves is the mean of the halves."""
    torch.manual_seed(0)
    loss = build(name, student(), teacher()).train(LOSSES[name].couples_images)  # else batch norm does not count
    if LOSSES[name].keeps_state:
        pytest.skip("its value depends on the batches before")
    full = loss(student(), teacher(), INDEX)["loss"]
    halves = [
        loss(*(LOSSES[name].select(_rows(x, part)) for x in (student(), teacher())), INDEX[part])["loss"]
        for part in (slice(0, IMAGES // 2), slice(IMAGES // 2, IMAGES))
    ]
    assert torch.allclose(full, sum(halves) / 2, rtol=1e-5) != LOSSES[name].couples_images


def _rows(features: Features, part: slice) -> Features:
    logits = None if features.logits is None else features.logits[part]
    return Features(features.embedding[part], tuple(one[part] for one in features.maps), logits)


@every_loss
def test_separable_losses_are_made_of_totals(name):
    loss = build(name, student(), teacher())
    assert hasattr(loss, "totals") == LOSSES[name].separable
    assert ("other_totals" in inspect.signature(loss.forward).parameters) == LOSSES[name].separable
    if LOSSES[name].separable:
        s, t = student(), teacher()
        first = [LOSSES[name].select(x)._replace(embedding=x.embedding[:2]) for x in (s, t)]
        others = [LOSSES[name].select(x)._replace(embedding=x.embedding[2:]) for x in (s, t)]
        got = loss(*first, INDEX[:2], other_totals=loss.totals(*others))
        torch.testing.assert_close(got, loss(s, t, INDEX))


@every_loss
def test_takes_a_classifier_where_declared(name):
    loss = LOSSES[name]
    assert ("classifier" in inspect.signature(loss).parameters) == (loss.classifier != "unused")
    if loss.classifier != "unused" and loss.uses_maps:
        # The embedding is not the mean of the last map.
        other = teacher()._replace(embedding=draw(IMAGES, DIM, seed=5))
        kept, dropped = (build(name, student(), t) for t in (teacher(), other))
        assert sum(p.numel() for p in kept.parameters()) > sum(p.numel() for p in dropped.parameters())


@every_loss
def test_pretraining_reaches_its_module_alone(name):
    loss = build(name, student(), teacher())
    if not loss.pretraining_steps:
        for method in (loss.pretraining_module, lambda: loss.pretraining_loss(teacher())):
            with pytest.raises(NotImplementedError):
                method()
        return
    module = loss.pretraining_module()
    assert not any(p.requires_grad for p in module.parameters()), "frozen but for its pre-training"
    module.requires_grad_(True)
    loss.pretraining_loss(teacher()).backward()
    reached = [key for key, p in loss.named_parameters() if p.grad is not None]
    own = {id(p) for p in module.parameters()}
    assert reached == [key for key, p in loss.named_parameters() if id(p) in own]


@every_loss
def test_the_teacher_gets_no_gradient_and_the_student_does(name):
    s, t = student(), teacher()
    for x in (*s[0:1], *s.maps, *t[0:1], *t.maps):
        x.requires_grad_()
    out = build(name, s, t)(s, t, INDEX)
    out["loss"].backward()
    assert all(part.shape == () for part in out.values())
    assert any(x.grad is not None and x.grad.any() for x in (s.embedding, *s.maps))
    assert all(x.grad is None for x in t.maps) and t.embedding.grad is None


@every_loss
def test_zeros_in_features_have_a_finite_gradient(name):
    """As ReLU leaves them: single entries, a channel, an image."""
    s, t = ([x.relu() for x in (features.embedding, *features.maps)] for features in (student(), teacher()))
    for tensor in s + t:
        tensor[:, 1] = 0
        tensor[3] = 0
    for tensor in s:
        tensor.requires_grad_()
    torch.manual_seed(0)
    loss = build(name, student(), teacher())
    loss(*(Features(embedding, tuple(maps)) for embedding, *maps in (s, t)), INDEX)["loss"].backward()
    gradients = [x.grad for x in (*s, *loss.parameters()) if x.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) < 1e5


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_in_half_precision(name, dtype):
    """DeepSpeed casts all that is trained, the loss with it: layers compute in bfloat16, all else in float32."""
    values = []
    for cast in (torch.float32, torch.bfloat16):
        features = [
            Features(x.embedding.to(dtype), tuple(one.to(dtype) for one in x.maps)) for x in (student(), teacher())
        ]
        for x in (features[0].embedding, *features[0].maps):
            x.requires_grad_()
        loss = build(name, student(), teacher()).to(cast)
        torch.manual_seed(1)
        for _ in range(2):
            out = loss(*features, INDEX)
        assert all(part.dtype == torch.float32 and part.isfinite() for part in out.values()), out
        out["loss"].backward()
        gradients = [x.grad for x in (features[0].embedding, *features[0].maps, *loss.parameters())]
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
        values.append(out["loss"].detach())
    torch.testing.assert_close(values[1], values[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["bn", "crd", "seed"])
def test_what_a_loss_keeps_stays_in_float32(name):
    loss = build(name, student(), teacher())
    before = {key: buffer.clone() for key, buffer in loss.named_buffers()}
    loss.bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in loss.parameters())
    for key, buffer in loss.named_buffers():
        assert torch.equal(buffer, before[key]) and buffer.dtype == before[key].dtype, key
    assert {buffer.dtype for buffer in loss.double().buffers()} <= {torch.float64, torch.long}


@every_loss
def test_the_docstring_has_its_parts(name):
    text = inspect.getdoc(LOSSES[name])
    for part in (
        "Use when: ",
        "Shapes: ",
        "Several processes: ",
        "\nArgs:\n",
        "\nRaises:\n",
        "\nExample:\n",
        "\nReferences:\n",
    ):
        assert part in text, part
    options = [key for key in inspect.signature(LOSSES[name]).parameters]
    assert all(f"\n    {key}: " in text for key in options), options


@every_loss
def test_takes_tensors_as_well_as_features(name):
    """As in a bare PyTorch loop: embeddings, logits or maps as they are."""
    loss = LOSSES[name]
    s, t = student(), teacher()
    if loss.reads == "maps":
        given = [list(s.maps), list(t.maps)]
    elif loss.uses_maps:
        given = [loss.select(s).maps[0], loss.select(t).maps[0]]
    else:
        given = [s.embedding, t.embedding]
    wrapped = [as_features(x, logits=loss.reads == "logits") for x in given]
    # The student's embedding stands for the mean of its map.
    a = build(name, *wrapped)(*given, INDEX)["loss"]
    b = build(name, *wrapped)(student=wrapped[0], teacher=wrapped[1], index=INDEX)["loss"]
    assert torch.equal(a, b) and a.requires_grad == b.requires_grad


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(2, 3)], "features", []])
def test_other_inputs_are_rejected_by_name(value):
    with pytest.raises(ValueError, match="teacher: got .*give embeddings"):
        LOSSES["coss"]()(torch.zeros(2, 3), value)


def test_a_loss_that_counts_images_says_why_it_cannot_on_a_stream():
    given = GIVEN | {"num_images": None, "classifier": None}
    with pytest.raises(ValueError, match=r"^--method=crd: .*nobody knows the number of images in a stream$"):
        build_loss([Method("crd", {})], student(), teacher(), **given)
