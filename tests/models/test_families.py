"""The pooling of every family: held against what its own classifier reads, or what its paper takes.

Reported: of 99 tiny checkpoints of all families, PVT, RADIO, CvT, YOLOS were pooled over the wrong tokens, and AIMv2,
AltCLIP and MetaCLIP-2 with both towers were refused for a false reason.
"""

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import (
    AutoModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTImageProcessor,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tests.helpers.families as f
from coss_hf.models.backbone import Backbone, find_tower
from coss_hf.models.embedding import embed
from coss_hf.models.loading import load_backbone
from coss_hf.models.pooling import feature_maps, is_channels_last, token_layout
from tests.helpers.networks import half

FAST = "beit convnext cvt deit dinov2 dinov3_convnext focalnet pvt radio swin vit yolos".split()


def fast(name, names):
    """Parameters of which all but one are slow."""
    return [pytest.param(each, marks=() if each == name else pytest.mark.slow) for each in names]


def same(embedding, expected):
    """Up to rounding, which grows with the largest of the numbers that are added up."""
    size = max(1.0, expected.abs().max().item())
    return embedding.shape == expected.shape and torch.allclose(embedding, expected, rtol=1e-5, atol=1e-5 * size)


@torch.no_grad()
def reloaded(network, folder, images):
    """Embedding of a network as teacher, and of what it saved, loaded as a student and by AutoModel alone."""
    network.save_pretrained(folder / "given")
    half(f.SIZE).save_pretrained(folder / "given")
    teacher = load_backbone(str(folder / "given"), argument="teacher").freeze()
    teacher.model.save_pretrained(folder / "saved")
    half(f.SIZE).save_pretrained(folder / "saved")
    student = load_backbone(str(folder / "saved"), argument="student").freeze()
    embedding = teacher.features(images).embedding
    for again in (student.model, AutoModel.from_pretrained(folder / "saved")):
        weights = again.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in teacher.model.state_dict().items())
        assert same(embed(again, images, student.pooling), embedding)
    assert embedding.shape == (2, teacher.dim)
    assert embedding.std(0).max() > 1e-4 or type(teacher.model).__name__ in f.FADING
    return teacher, embedding


@pytest.mark.parametrize("family", FAST)
def test_a_family(family, tmp_path):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed Transformers has no {family}")
    check(family, tmp_path)


def check(family, folder):
    network = f.build(family)
    images = f.pixels()
    if family in f.REFUSED:
        with pytest.raises(ValueError, match=f.REFUSED[family]) as error:
            Backbone(network, None, size=(f.SIZE, f.SIZE))
        assert "of this size" not in str(error.value)
        return
    _, embedding = reloaded(network, folder, images)
    read = f.read_by_classifier(network, images)
    if read is None:
        with torch.no_grad():
            assert same(embedding, f.BY_PAPER[family](network(pixel_values=images)))
    elif family in f.RELATED:
        with torch.no_grad():
            assert same(f.RELATED[family](network, embedding, images), read)
    else:
        assert same(embedding, read)


@pytest.mark.slow
def test_every_family_of_transformers(tmp_path):
    """A family that Transformers adds needs a line in the tables only where it has no classifier."""
    wrong = {}
    for family in f.families():
        try:
            check(family, tmp_path / family)
        except (Exception, pytest.fail.Exception) as error:  # all families are reported at once
            wrong[family] = f"{type(error).__name__}: {str(error)[:300]}"
    if wrong:
        pytest.fail("\n".join(f"{family}: {error}" for family, error in wrong.items()))


@pytest.mark.parametrize("family", fast("altclip", f.TOWERS))
def test_the_tower_that_reads_images(family, tmp_path):
    network = f.build_towers(family)
    teacher, embedding = reloaded(network, tmp_path, f.pixels())
    assert type(teacher.model).__name__ == f.TOWERS[family]
    with torch.no_grad():
        output = find_tower(network)(pixel_values=f.pixels())
    expected = f._all_but_first(output) if family == "internvl" else output.pooler_output
    assert same(embedding, expected) and same(embed(network, f.pixels()), expected)


@pytest.mark.parametrize("family", fast("git", f.TEACHERS))
def test_a_tower_that_automodel_does_not_load_alone_teaches(family, tmp_path):
    network = f.build_towers(family)
    network.save_pretrained(tmp_path)
    half(f.SIZE).save_pretrained(tmp_path)
    teacher = load_backbone(str(tmp_path), argument="teacher").freeze()
    assert same(teacher.features(f.pixels()).embedding, embed(network, f.pixels()))
    with pytest.raises(ValueError, match="^--student=.*AutoModel does not load a .* alone.*can be a teacher"):
        load_backbone(str(tmp_path), argument="student")


@pytest.mark.parametrize("name", fast("vit_tiny_patch16_224", f.TIMM))
def test_a_network_of_timm(name, tmp_path):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=f.CLASSES, model_args=f.TIMM[name] or None)
    side = f.TIMM[name].get("img_size", f.SIZE)
    images = f.pixels((side, side))
    network = TimmWrapperForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), argument="teacher", size=side).freeze()
    backbone.model.save_pretrained(tmp_path / "saved")
    again = load_backbone(str(tmp_path / "saved"), argument="student").freeze()
    with torch.no_grad():
        embedding = backbone.features(images).embedding
        weights = again.model.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in backbone.model.state_dict().items())
        assert same(again.features(images).embedding, embedding)
        expected = network.timm_model.forward_head(network.timm_model.forward_features(images), pre_logits=True)
    assert isinstance(backbone.model, TimmWrapperModel) and same(embedding, expected.flatten(1))
    assert f"(TimmWrapperModel {config.architecture})" in repr(backbone)


# ---- families whose tokens stand elsewhere ----


def backbone_of(family, pooling="auto"):
    return Backbone(f.build(family), None, size=(f.SIZE, f.SIZE), pooling=pooling)


@torch.no_grad()
def test_means_and_maps_leave_detection_tokens_out():
    """YOLOS: one class token before the patches, detection tokens after them."""
    yolos = backbone_of("yolos", "mean")
    yolos.model.eval()
    output = yolos.model(f.pixels(), output_hidden_states=True)
    patches = output.last_hidden_state[:, 1:-4]
    assert same(yolos.features(f.pixels()).embedding, patches.mean(1))
    last = feature_maps(output, yolos.layout, yolos.size)[-1]
    assert same(last.flatten(2).transpose(1, 2), patches)


@torch.no_grad()
def test_the_mean_leaves_the_class_token_of_the_last_stage_out():
    """PVT has patches of several sizes, DINOv3's ConvNeXt a pooled token before those of its last map."""
    for family in ("pvt", "dinov3_convnext"):
        network = backbone_of(family, "mean")
        network.model.eval()
        hidden = network.model(f.pixels()).last_hidden_state
        assert hidden.shape[1] == 5 and same(network.features(f.pixels()).embedding, hidden[:, 1:].mean(1))


@torch.no_grad()
def test_the_class_token_that_stands_apart():
    cvt = backbone_of("cvt")
    cvt.model.eval()
    output = cvt.model(f.pixels())
    assert cvt.pooling == "cls"
    assert same(cvt.features(f.pixels()).embedding, layer_norm(output.cls_token_value[:, 0], (32,)))
    cvt.set_pooling("gap")
    assert same(cvt.features(f.pixels()).embedding, output.last_hidden_state.mean((2, 3)))


def test_cvt_without_a_class_token():
    config = f.config_of("cvt")
    config.cls_token = [False, False, False]
    network = AutoModel.from_config(config)
    assert Backbone(network, None, size=(f.SIZE, f.SIZE)).pooling == "gap"
    with pytest.raises(ValueError, match="has no class token"):
        Backbone(network, None, size=(f.SIZE, f.SIZE), pooling="cls")


@pytest.mark.parametrize(
    "count, size, patch, suffix, prefix",
    [
        (197, (224, 224), (16, 16), 0, 1),
        (261, (224, 224), (14, 14), 0, 5),
        (296, (224, 224), (14, 14), 40, 0),
        (49, (224, 224), (4, 4), 0, 0),  # stages of windows
        (50, (224, 224), None, 0, 1),
        (169, (100, 100), (4, 4), 0, 0),  # padded: 25 patches a side, then 13
        (7, (64, 96), None, 0, 1),
        (1, (224, 224), (16, 16), 0, 0),
    ],
)
def test_tokens_that_are_no_patches(count, size, patch, suffix, prefix):
    assert token_layout(count, size, patch, suffix)[:2] == (True, prefix)


@pytest.mark.parametrize(
    "shape, size, last",
    [
        ((2, 7, 7, 768), (224, 224), True),
        ((2, 768, 7, 7), (224, 224), False),
        ((2, 7, 7, 7), (224, 224), False),
        ((2, 4, 8, 32), (64, 128), True),
        ((2, 512, 1, 8), (64, 64), False),
    ],
)
def test_channels_of_a_map(shape, size, last):
    assert is_channels_last(shape, size) is last


# ---- inputs that do not fit ----


@pytest.mark.parametrize(
    "entries, reason",
    [
        ({"num_channels": 1}, "--student=.* reads images of 1 channel, and images are RGB here, of 3 channels"),
        ({"num_channels": 4}, "reads images of 4 channels"),
        ({"image_size": 96}, r"--student_size=64x64: .*as it was trained \(96\)"),
        ({"patch_size": 12, "image_size": 60}, "of which its patches are 12x12 pixels"),
    ],
)
def test_the_refusal_names_what_does_not_fit(entries, reason):
    """A network of one channel was refused for the size of its images."""
    config = f.config_of("vit")
    network = AutoModel.from_config(type(config)(**{**f.TRANSFORMER, **entries}))
    with pytest.raises(ValueError, match=reason):
        Backbone(network, None, size=(f.SIZE, f.SIZE), argument="student")


def test_a_convolutional_network_of_one_channel():
    network = AutoModel.from_config(type(f.config_of("resnet"))(**f.STAGES, embedding_size=8, num_channels=1))
    with pytest.raises(ValueError, match="images of 1 channel,"):
        Backbone(network, None, size=(f.SIZE, f.SIZE))
    config = TimmWrapperConfig(architecture="resnet18", model_args={"in_chans": 1})
    with pytest.raises(ValueError, match="images of 1 channel,"):
        Backbone(TimmWrapperModel(config), None, size=(f.SIZE, f.SIZE))


def test_a_processor_is_not_blamed_for_a_network_of_other_inputs():
    grey = AutoModel.from_config(type(f.config_of("vit"))(**f.TRANSFORMER, num_channels=1))
    with pytest.raises(ValueError, match="--teacher=.* reads images of 1 channel"):
        Backbone(grey, ViTImageProcessor(image_mean=[0.5], image_std=[0.5]), argument="teacher")
    with pytest.raises(ValueError, match="reads videos"):
        Backbone(f.build("videomae"), ViTImageProcessor(image_mean=[0.5], image_std=[0.5]))


@pytest.mark.parametrize("family", ["detr", "glm_image_vision", "videomae"])
def test_a_network_of_other_inputs_or_outputs(family):
    with pytest.raises(ValueError, match=f.REFUSED[family]):
        backbone_of(family)
