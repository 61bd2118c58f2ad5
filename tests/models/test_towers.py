"""Networks of images and text: the embedding in the space of both is the one that the network itself compares.

Reported: a student of CLIP could not be searched by words, since CLIP's vision tower ends before the projection into
the space of its texts.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

import coss_hf
import tests.helpers.families as f
from coss_hf.hub.student import Student
from coss_hf.models.backbone import Backbone
from coss_hf.models.heads import projection_head
from coss_hf.models.loading import load_backbone
from coss_hf.models.towers import joint_embedding
from tests.helpers.networks import TOWERS, build, half, images, save

# Text towers read these; the last one of each row ends it.
TOKENS = torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2], [9, 9, 1, 2]])
FAMILIES = ["aimv2", "altclip", "blip", "chinese_clip", "clip", "clipseg", "metaclip_2", "owlvit", "siglip"]


def write(network, folder, size: int = 32) -> str:
    network.save_pretrained(folder)
    half(size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("networks") / "clip"
    save("clip_two_towers", folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_is_what_each_family_compares_with_text(family, tmp_path):
    network = f.build_towers(family)
    pixels = f.pixels()
    with torch.no_grad():
        expected = joint_embedding(network, pixels, {})
        alone = network.get_image_features(pixel_values=pixels)
    assert torch.equal(expected, getattr(alone, "pooler_output", alone)) and expected.dim() == 2
    folder = write(network, tmp_path, f.SIZE)
    by_name = load_backbone(folder, argument="teacher", space="projected").freeze()
    in_memory = Backbone(network, half(f.SIZE), space="projected")
    for teacher in (by_name, in_memory):
        torch.testing.assert_close(teacher.features(pixels).embedding, expected, rtol=1e-5, atol=1e-5)
        assert teacher.dim == expected.shape[1] and teacher.space == "projected"
    assert by_name.fingerprint() == in_memory.fingerprint()
    torch.testing.assert_close(coss_hf.embed(folder, pixels, space="projected"), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in by_name.model.named_modules() if "text" in name], "the text tower stays in memory"


def test_any_vision_network_with_a_text_tower(tmp_path):
    vision = ViTConfig(**TOWERS["vision_config"])
    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=12)
    network = VisionTextDualEncoderModel(config).eval()
    teacher = load_backbone(write(network, tmp_path), space="projected").freeze()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = joint_embedding(network, pixels, {})
    torch.testing.assert_close(teacher.features(pixels).embedding, expected, rtol=1e-5, atol=1e-5)


def test_a_vision_tower_with_its_projection_alone(tmp_path):
    config = CLIPVisionConfig(**TOWERS["vision_config"], projection_dim=12)
    network = CLIPVisionModelWithProjection(config).eval()
    folder = write(network, tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixel_values=pixels).image_embeds
    for teacher in (load_backbone(folder, space="projected"), Backbone(network, half(), space="projected")):
        torch.testing.assert_close(teacher.freeze().features(pixels).embedding, expected)
    assert load_backbone(folder).dim == 32, "by default the tower's own embedding, as before"


def test_the_tower_stays_the_default(clip):
    tower = load_backbone(clip, argument="teacher").freeze()
    projected = load_backbone(clip, argument="teacher", space="projected").freeze()
    assert (tower.dim, projected.dim) == (32, 512) and (tower.space, projected.space) == ("tower", "projected")
    assert tower.fingerprint() != projected.fingerprint(), "neighbours and cached embeddings would be mixed up"
    assert tower.fingerprint() == load_backbone(clip, space="tower").fingerprint()
    assert projected.num_parameters() == tower.num_parameters() + 32 * 512
    assert "CLIPVisionModel with projection" in repr(projected)


def test_other_projection_has_another_fingerprint(clip):
    network = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        network.visual_projection.weight.add_(1)
    same_tower = CLIPModel.from_pretrained(clip)
    prints = {Backbone(each, half(), space="projected").fingerprint() for each in (network, same_tower)}
    assert len(prints) == 2


def test_siglip_without_an_option_is_in_the_space_of_its_texts():
    tower = Backbone(build("siglip_two_towers"), half())
    assert tower.space == "projected"
    tower.set_pooling("mean")
    assert tower.space == "tower"
    assert Backbone(build("vit"), half()).space is None


def test_interpolation_and_maps_reach_the_tower(clip):
    teacher = load_backbone(clip, size=48, interpolate_pos_encoding=True, space="projected").freeze()
    network = CLIPModel.from_pretrained(clip).eval()
    pixels = teacher.preprocess(images())
    assert pixels.shape == (3, 3, 48, 48)
    with torch.no_grad():
        expected = network.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(teacher.features(pixels).embedding, expected)
    assert teacher.example(maps=True).maps[-1].shape == (2, 32, 6, 6)


def test_network_in_memory_is_left_as_it_was(clip):
    network = CLIPModel.from_pretrained(clip).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = network.config.to_dict()
    Backbone(network, half(), space="projected")
    coss_hf.embed(network, images(), processor=half(), space="projected")
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert network.config.to_dict() == config


def test_a_student_of_the_layers_of_a_projected_teacher(clip):
    teacher = load_backbone(clip, argument="teacher", space="projected").freeze()
    student = load_backbone("", argument="student", init="teacher_layers", teacher=teacher)
    assert type(student.model).__name__ == "CLIPVisionModel" and student.dim == 32
    assert student.model.config.num_hidden_layers == 1


# ---- zero-shot: texts against images ----


@torch.no_grad()
def zero_shot(network, image_embeddings):
    """The logits of ``CLIPModel`` and ``SiglipModel`` by their papers: scaled cosines, and a bias."""
    texts = network.get_text_features(input_ids=TOKENS)
    texts = getattr(texts, "pooler_output", texts)
    logits = network.logit_scale.exp() * Student.similarity(image_embeddings, texts)
    return logits + getattr(network, "logit_bias", 0)


@pytest.mark.parametrize(("kind", "config"), [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
def test_student_that_is_its_teachers_tower_gives_the_teachers_zero_shot_logits(kind, config, tmp_path):
    torch.manual_seed(0)
    same_width = {"vision_config": TOWERS["vision_config"], "text_config": TOWERS["text_config"] | {"hidden_size": 32}}
    network = kind(config(**same_width)).eval()
    write(network, tmp_path / "teacher")
    tower = load_backbone(str(tmp_path / "teacher"), argument="student").freeze()
    head = None
    if kind is CLIPModel:
        head = projection_head("linear", tower.dim, network.config.projection_dim)
        with torch.no_grad():
            head.weight.copy_(network.visual_projection.weight)
            head.bias.zero_()
    student = Student(tower, head)
    with torch.no_grad():
        expected = network(input_ids=TOKENS, pixel_values=tower.preprocess(images())).logits_per_image
    found = zero_shot(network, student.encode(images()))
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    teacher = load_backbone(str(tmp_path / "teacher"), argument="teacher", space="projected").freeze()
    torch.testing.assert_close(zero_shot(network, coss_hf.embed(teacher, images())), expected, rtol=1e-5, atol=1e-5)


# ---- refusals ----


def refused(match: str, call):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit", "clip_vision", "timm_vit", "cifar_resnet"])
def test_teacher_without_a_projection_is_refused(name, tmp_path):
    save(name, tmp_path)
    message = "^--teacher_space=projected: .*does not project images into a space that they share with text; give a "
    refused(
        message + ".*leave --teacher_space out",
        lambda: load_backbone(str(tmp_path), argument="teacher", space="projected"),
    )
    refused("^space=projected: .*CLIP or SigLIP", lambda: coss_hf.embed(str(tmp_path), images(), space="projected"))
    refused("^space=projected", lambda: Backbone(build(name), half(), space="projected"))


def test_network_that_generates_text_is_refused():
    """It has image features for a language model, not in a space of images and texts."""
    network = f.build_towers("internvl")
    refused(
        "^--teacher_space=projected", lambda: Backbone(network, half(f.SIZE), argument="teacher", space="projected")
    )


def test_plain_module_is_refused(tmp_path):
    class Encoder(nn.Sequential):
        pass

    encoder = Encoder(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = Backbone.from_module(encoder, size=16, mean=0.5, std=0.5)
    refused("^space=projected: .*Encoder", lambda: Backbone(module.model, half(16), space="projected"))
    refused(
        "^space=projected: .* .a Backbone that was built", lambda: coss_hf.embed(module, images(), space="projected")
    )
    refused(
        "^--teacher_space=projected is for the checkpoint of a teacher.* a plain module has no projection",
        lambda: load_backbone(str(tmp_path), argument="teacher", module=encoder, space="projected"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "text"}, "^--teacher_space='text' is unknown: choose one of tower, projected"),
        (
            {"space": "projected", "pooling": "mean"},
            "^--teacher_pooling=mean next to --teacher_space=projected: .*leave",
        ),
        ({"space": "projected", "init": "random"}, "^--teacher_space=projected is for the checkpoint"),
        ({"space": "projected", "argument": "student"}, "^--student_space=projected is for the checkpoint"),
        (
            {"space": "projected", "size": 48},
            "^--teacher_size=48x48: CLIPVisionModel with projection .*as it was trained",
        ),
    ],
)
def test_other_values_are_refused(clip, options, message):
    refused(message, lambda: load_backbone(clip, **{"argument": "teacher", **options}))


def test_pooling_of_a_projected_backbone_cannot_be_changed(clip):
    teacher = load_backbone(clip, argument="teacher", space="projected")
    refused("^pooling=mean next to space=projected", lambda: coss_hf.embed(teacher, images(), pooling="mean"))


def test_checkpoint_that_lacks_the_projection_is_refused(clip, tmp_path):
    """Its projection would be drawn at random."""
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path)
    half().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "^--teacher=.*lacks weights that the embedding needs .projection.weight"
    refused(message, lambda: load_backbone(str(tmp_path), argument="teacher", space="projected"))
    assert load_backbone(str(tmp_path), argument="teacher").dim == 32, "its vision tower is complete"


def test_network_that_embeds_in_another_way_is_refused(monkeypatch):
    """Code of any origin may do more than project the pooler: what it compares with text decides."""
    network = CLIPModel(CLIPConfig(**TOWERS))
    real = type(network).get_image_features

    def other(self, **given):
        output = real(self, **given)
        output.pooler_output = output.pooler_output.cumsum(1)
        return output

    monkeypatch.setattr(type(network), "get_image_features", other)
    refused("by a projection of its pooler", lambda: Backbone(network, half(), argument="teacher", space="projected"))
