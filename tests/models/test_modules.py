"""Any module as a backbone: what its output means, what is read off it, how it is saved and loaded."""

import copy
import inspect

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, TimmWrapperModel, ViTForImageClassification

import tests.helpers.runs as h
from coss_hf import Backbone, Student, embed, load_backbone
from coss_hf.evaluation.evaluator import random_weights
from coss_hf.models.classifier_head import find_classifier
from coss_hf.models.from_module import read_defaults
from coss_hf.models.modules import ModuleNetwork
from coss_hf.trainer.fsdp import unshare
from coss_hf.trainer.inputs import as_backbone
from tests.helpers.modules import FORMS, INPUT, encoder, torchvision_resnet

IMAGES = h.colour_images(3, 5)[0]


def own(form: str = "vector", **options) -> Backbone:
    return Backbone.from_module(encoder(form), **INPUT, **options)


def raw_output(backbone: Backbone):
    return backbone.model.module.eval()(backbone.preprocess(IMAGES))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_every_known_form(form):
    backbone = own(form)
    embedding = embed(backbone, IMAGES)
    output = raw_output(backbone)
    expected = {
        "vector": lambda: output,
        "map": lambda: output.mean((2, 3)),
        "tokens": lambda: output.mean(1),
        "class token": lambda: output[:, 0],
        "object": lambda: output.pooler_output,
        "dict": lambda: output["pooler_output"].flatten(1),
        "maps": lambda: output[-1].mean((2, 3)),
        "features": lambda: output.embedding,
    }[form]()
    torch.testing.assert_close(embedding, expected)
    assert backbone.dim == 16 and backbone.size == (16, 16)
    if form != "class token":
        assert "module.classifier.weight" in backbone.unused


def test_images_are_normalised_as_told():
    backbone = own()
    image = torch.full((1, 3, 16, 16), 102, dtype=torch.uint8)
    torch.testing.assert_close(backbone.normalize(image)[0, :, 0, 0], torch.tensor([0.0, -0.4, -0.8]))
    oblong = Backbone.from_module(encoder(), size=(16, 24), mean=0.5, std=0.5)
    assert oblong.preprocess(IMAGES).shape == (3, 3, 16, 24)


def test_a_function_reads_the_embedding_from_any_output():
    backbone = own("strange", embedding=lambda output: output["features"])
    torch.testing.assert_close(embed(backbone, IMAGES), raw_output(backbone)["features"])


@pytest.mark.parametrize(
    ("form", "maps", "shapes"),
    [
        ("maps", None, [(8, 8, 8), (16, 4, 4)]),
        ("vector", None, [(8, 8, 8), (16, 4, 4)]),
        ("vector", ["stem.0", "stem"], [(8, 8, 8), (8, 8, 8)]),
        ("tokens", ["body"], [(16, 4, 4)]),
    ],
)
def test_feature_maps(form, maps, shapes):
    features = own(form, maps=maps).example(maps=True)
    assert [tuple(x.shape[1:]) for x in features.maps] == shapes


def test_the_classifier_is_found_where_logits_are_given():
    """Methods of logits (kd, srrl) read it; taken for the Hub's model `Encoder`, its name was looked up there."""
    for form, found in (("features", True), ("object", False), ("vector", False)):  # object: logits of another pooling
        layer = find_classifier(own(form))
        assert (layer is not None) == found, form
    layer = find_classifier(Backbone.from_module(torchvision_resnet(), size=32))
    assert (layer.in_features, layer.out_features) == (512, 5)
    layer = find_classifier(Backbone.from_module(timm.create_model("test_resnet")))
    assert (layer.in_features, layer.out_features) == (96, 1000)


class Wrapper(nn.Module):
    """A network of Transformers inside another module, which returns its output or a part of it."""

    def __init__(self, network: nn.Module, part: str = ""):
        super().__init__()
        self.network = network
        self.part = part

    def forward(self, pixel_values):
        output = self.network(pixel_values)
        return getattr(output, self.part) if self.part else output


def test_a_pooler_that_no_checkpoint_has_is_not_read_inside_a_module(networks):
    """A module around ``AutoModel`` of a classifier's checkpoint was embedded by a random pooler."""
    vit = AutoModel.from_pretrained(networks.vit)
    backbone = Backbone.from_module(Wrapper(vit), size=16, mean=0.5, std=0.5)
    assert backbone.pooling == "cls" and "module.network.pooler.dense.weight" in backbone.missing
    with pytest.raises(ValueError, match=r"lacks weights.*module\.network\.pooler.*such as last_hidden_state"):
        Backbone.from_module(Wrapper(vit, "pooler_output"), size=16, mean=0.5, std=0.5, argument="teacher")
    nn.init.normal_(vit.pooler.dense.bias)  # trained since
    assert Backbone.from_module(Wrapper(vit), size=16, mean=0.5, std=0.5).pooling == "pooler"


def test_new_layers_inside_a_module_are_refused_for_a_teacher_alone(networks, caplog):
    """A student with a new output layer, which the training trains, was refused as if its checkpoint was incomplete."""
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    module = Wrapper(ViTForImageClassification.from_pretrained(networks.vit, **options), "logits")
    teacher = load_backbone(networks.teacher)
    caplog.clear()
    assert as_backbone(module, "student", teacher).dim == 7
    assert "lacks weights" not in caplog.text
    backbone = Backbone.from_module(module, size=16, mean=0.5, std=0.5)
    assert "is a student alone: the checkpoint lacks weights" in caplog.text
    assert as_backbone(backbone, "student") is backbone
    for given in (module, backbone):
        with pytest.raises(ValueError, match="^--teacher=Wrapper .*lacks weights.*classifier"):
            as_backbone(given, "teacher", teacher)
    nn.init.normal_(module.network.classifier.bias)  # trained since
    assert as_backbone(backbone, "teacher") is backbone


def test_torchvision_without_its_classifier_and_with_the_input_of_its_weights():
    module = torchvision.models.shufflenet_v2_x0_5()
    backbone = Backbone.from_module(module)
    assert (backbone.size, backbone.dim) == ((224, 224), 1024)
    assert module.fc.out_features == 1000, "the caller's module keeps its classifier"
    without = copy.deepcopy(module)
    without.fc = nn.Identity()
    torch.testing.assert_close(embed(backbone, IMAGES), without.eval()(backbone.preprocess(IMAGES)))


@pytest.mark.parametrize(
    ("name", "options", "size", "resize"),
    [
        ("efficientnet_b2", {}, (288, 288), 288),
        ("efficientnet_b2", {"num_classes": 7}, (288, 288), 288),
        ("resnet18", {"num_classes": 10}, (224, 224), 256),
        ("vit_b_32", {"image_size": 64}, (64, 64), None),
    ],
)
def test_the_input_of_torchvision_by_architecture(name, options, size, resize):
    with torch.device("meta"):
        found = read_defaults(torchvision.models.get_model(name, **options))
    assert (found.size, found.resize) == (size, resize)
    assert found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {}),
        ("test_vit", {"img_size": 32, "drop_path_rate": 0.1}),
        ("test_vit", {"global_pool": "avg", "num_classes": 3}),
        ("test_convnext", {"num_classes": 0}),
    ],
)
def test_timm_objects_are_what_their_names_would_be(tmp_path, name, options):
    module = timm.create_model(name, **options)
    backbone = Backbone.from_module(module)
    assert isinstance(backbone.model, TimmWrapperModel)
    module.eval()
    pixels = backbone.preprocess(IMAGES)
    expected = module.forward_head(module.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(embed(backbone, IMAGES), expected)
    backbone.model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(pixels).pooler_output, expected)
    assert load_backbone(str(tmp_path)).size == tuple(pixels.shape[2:])


def test_timm_objects_that_no_name_gives_are_plain_modules(tmp_path):
    def build():
        return timm.create_model("test_vit", act_layer=nn.ReLU)

    backbone = Backbone.from_module(build())
    assert isinstance(backbone.model, ModuleNetwork) and backbone.dim == 64 and backbone.size == (160, 160)
    backbone.model.save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path), module=build)
    torch.testing.assert_close(embed(again, IMAGES), embed(backbone, IMAGES))


@pytest.mark.parametrize("options", [{"features_only": True}, {"act_layer": nn.ReLU}])
def test_plain_modules_of_timm_resize_images_as_their_weights_were_evaluated(options):
    """They cropped the full shorter side, by bicubic interpolation."""
    module = timm.create_model("test_vit", **options)
    cfg = {**module.pretrained_cfg, "crop_pct": 0.8, "interpolation": "bilinear", "input_size": (3, 160, 160)}
    module.pretrained_cfg = module.default_cfg = cfg
    backbone = Backbone.from_module(module)
    assert isinstance(backbone.model, ModuleNetwork) and backbone.size == (160, 160)
    processor = backbone.processor
    assert processor.size["shortest_edge"] == 200 and processor.crop_size["height"] == 160
    assert processor.resample == Image.Resampling.BILINEAR
    assert Backbone.from_module(module, size=160).processor.size["shortest_edge"] == 200
    del cfg["crop_pct"]
    assert Backbone.from_module(module).processor.size["shortest_edge"] == 160


def test_maps_of_timm_that_keeps_channels_last():
    maps = Backbone.from_module(torchvision.models.swin_t(), size=64).example(maps=True).maps
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]


@pytest.mark.parametrize("names", [None, ["0", "1", "2"]])
def test_a_map_in_doubt_is_as_the_other_submodules_that_keep_channels_last(names):
    """Of swin_t at 384 pixels the first, 96 x 96 x 96, had its rows for channels: the last output is turned."""
    to_last, to_first = ([0, 2, 3, 1], [0, 3, 1, 2])
    permute = torchvision.ops.Permute
    stages = [
        nn.Sequential(nn.Conv2d(3, 16, 2, 2), permute(to_last)),
        nn.Sequential(permute(to_first), nn.Conv2d(16, 32, 2, 2), permute(to_last)),
        nn.Sequential(permute(to_first), nn.Conv2d(32, 48, 2, 2)),
    ]
    blocks = [nn.Sequential(stage) for stage in stages]  # maps are looked for on two levels
    backbone = Backbone.from_module(
        nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), **INPUT | {"size": 32}, maps=names
    )
    shapes = [tuple(one.shape[1:]) for one in backbone.example(maps=True).maps]
    assert shapes == [(16, 16, 16), (32, 8, 8), (48, 4, 4)]
    backbone.maps = 3
    backbone.freeze()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.features(pixels).maps[0], stages[0][0](pixels))


def test_maps_in_a_list_that_keep_channels_last():
    """Their rows were taken for channels."""
    channels_first = own("maps")
    module = copy.deepcopy(channels_first.model.module)
    forward = module.forward
    module.forward = lambda images: [one.permute(0, 2, 3, 1) for one in forward(images)]
    backbone = Backbone.from_module(module, **INPUT)
    pixels = backbone.preprocess(IMAGES)
    for one in (backbone, channels_first):
        one.maps = 2
        one.freeze()
    found, expected = backbone.features(pixels), channels_first.features(pixels)
    torch.testing.assert_close(found.embedding, expected.embedding)
    torch.testing.assert_close(found.maps, expected.maps)


def test_wrapped_modules_are_unwrapped():
    module = encoder()
    compiled = nn.Module()
    compiled._orig_mod = module  # as torch.compile keeps it
    for wrapped in (nn.DataParallel(module), nn.DataParallel(compiled)):
        assert Backbone.from_module(wrapped, **INPUT).model.module is module


def test_scripted_modules():
    scripted = torch.jit.trace(encoder().eval(), torch.zeros(2, 3, 16, 16))
    torch.testing.assert_close(embed(Backbone.from_module(scripted, **INPUT), IMAGES), embed(own(), IMAGES))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_saved_in_the_keys_of_the_module_and_loaded_by_anybody(tmp_path):
    for module in (encoder(), Tied()):
        backbone = Backbone.from_module(module, **INPUT)
        backbone.model.save_pretrained(tmp_path)
        backbone.processor.save_pretrained(tmp_path)
        other = type(module)()
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert set(load_file(tmp_path / "model.safetensors")) == set(module.state_dict())
        for given in (type(module), type(module)(), Backbone.from_module(type(module)(), **INPUT)):
            again = load_backbone(str(tmp_path), module=given)
            torch.testing.assert_close(embed(again, IMAGES), embed(backbone, IMAGES), rtol=0, atol=0)
            assert again.size == (16, 16) and again.name == str(tmp_path)


def test_random_weights_forget_all_that_was_learnt():
    torch.manual_seed(0)
    module = nn.Sequential(encoder("map"), nn.GroupNorm(2, 16))
    module.register_parameter("scale", nn.Parameter(torch.full((16,), 7.0)))
    backbone = Backbone.from_module(module, **INPUT)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(100)
    twins = [random_weights(backbone, seed).model for seed in (1, 1, 2)]
    states = [torch.cat([p.flatten() for p in twin.parameters()]) for twin in twins]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert states[0].abs().max() < 5, "nothing is left of the weights"
    assert all(parameter.mean() > 50 for parameter in module.parameters()), "the module itself stays"


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, images, text):
        return self.layer(images.mean((2, 3)))


class Kept(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: encoder("strange"), INPUT, r"^model=Encoder \(tests.* returns a dict of 'scores', 'features', from"),
        (lambda: encoder("scores"), INPUT, r"a tuple of \(2, 5\), \(2, 16\), .*module\(module, embedding="),
        (lambda: encoder("scores"), {}, "returns a tuple"),
        (lambda: encoder("nothing"), INPUT, "returns a NoneType"),
        (lambda: encoder("integers"), INPUT, r"a tensor \(2, 16, 4, 4\) of torch.int64"),
        (lambda: encoder(), {}, r"^model=Encoder .*: size and mean and std of its input .*size=, mean=, std="),
        (lambda: encoder(), {"size": 16, "mean": 0.5}, r"std of its input cannot be read"),
        (lambda: encoder(), INPUT | {"mean": (120, 110, 100)}, r"^mean=\[120, 110, 100\]: .*fractions of 1 \(0.5"),
        (lambda: encoder(), INPUT | {"std": (0, 1, 1)}, r"^std="),
        (lambda: encoder(), INPUT | {"mean": (0.5, 0.5)}, r"^mean=\[0.5, 0.5\]: give a number for each of the 3"),
        (lambda: encoder(), INPUT | {"size": 0}, r"^size=\(0, 0\)"),
        (lambda: encoder(), INPUT | {"size": (16, 16, 3)}, r"^size="),
        (lambda: encoder(), INPUT | {"maps": ["stems"]}, r"^maps: Encoder .*no submodule 'stems'. Did you mean stem"),
        (lambda: encoder(), INPUT | {"maps": ["classifier"]}, r"^maps: classifier of Encoder .* gives a tensor"),
        (lambda: encoder(), INPUT | {"embedding": lambda output: output[:, 0]}, r"^embedding=.* a tensor \(2,\)"),
        (lambda: encoder(), INPUT | {"embedding": lambda output: output.nothing}, r"fails on the module's output"),
        (lambda: nn.Flatten(), INPUT, r"^model=Flatten .* has no parameters"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3), Kept(3, 3)), INPUT, "keeps 2._extra_state"),
        (TwoInputs, INPUT, r"cannot embed RGB images of 16x16 pixels .*text"),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 3)), INPUT, "Sequential reads images of 1 channel,"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), INPUT, r"give it as .*from_module\(module, size="),
        (lambda: nn.Conv3d(3, 3, 1), INPUT | {"size": 17}, "reads videos"),
    ],
)  # fmt: skip
def test_bad_input_is_one_paragraph(make, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Backbone.from_module(make(), **options)
    assert "--" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            None,
            r"^--student=.* was saved from a plain nn.Module \(tests.helpers.modules.Encoder\), which",
        ),
        (
            lambda: encoder(dim=8),
            r"^module=Encoder .* does not fit the weights in .*model.safetensors \(.*size mismatch",
        ),
        (7, "^module is a int; give an nn.Module"),
        (
            lambda: Backbone.from_module(encoder(), **INPUT, embedding=torch.relu),
            r"was trained with embedding=None, not",
        ),
    ],
)
def test_a_folder_of_a_module_needs_that_module(tmp_path, module, message):
    backbone = own()
    backbone.model.config.teacher_space = {"head": False}
    backbone.model.save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Student.from_pretrained(tmp_path, module=module)
    for load in (lambda: embed(str(tmp_path), IMAGES), lambda: load_backbone(str(tmp_path), argument="teacher")):
        with pytest.raises(ValueError, match=r"was saved from a plain nn.Module .*Student.from_pretrained\("):
            load()


def test_other_folders_need_none(networks):
    with pytest.raises(ValueError, match="^module: .* was not saved from a plain nn.Module .*leave module out"):
        load_backbone(networks.teacher, module=encoder)


def test_the_public_call_takes_what_the_inner_one_takes():
    from coss_hf.models.from_module import backbone_from_module

    outer = set(inspect.signature(Backbone.from_module).parameters)
    assert outer == set(inspect.signature(backbone_from_module).parameters) - {"teacher"}


@pytest.mark.parametrize("kind", ["torchvision", "timm", "own"])
def test_the_module_of_the_caller_is_the_one_that_is_moved(kind):
    """`to` replaces buffers: on a GPU the caller's module kept statistics of before the training, on the CPU."""
    given = {"torchvision": torchvision_resnet, "timm": lambda: timm.create_model("test_resnet"), "own": encoder}[
        kind
    ]()
    options = {"own": INPUT, "torchvision": {"size": 32}, "timm": {}}[kind]
    network = Backbone.from_module(given, **options).model
    network.to(torch.float64)  # as to another device: parameters stay the same objects, buffers do not
    network.train()
    network(pixel_values=torch.randn(4, 3, 32, 32, dtype=torch.float64))
    trained = getattr(network, "timm_model", getattr(network, "module", None))
    expected = trained.state_dict()
    found = given.state_dict()
    assert any(key.endswith("running_mean") for key in expected)
    for key, value in expected.items():
        assert found[key].data_ptr() == value.data_ptr(), key
    statistics = [name for name, _ in given.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(given.get_buffer(name) == 1 for name in statistics)


def test_shards_do_not_reach_the_module_of_the_caller():
    """FSDP put its DTensors into the dictionaries that both share, and no other code can use those."""
    given = torchvision_resnet()
    network = Backbone.from_module(given, size=32).model
    before = [*given.parameters(), *given.buffers()]
    unshare(network)
    for module in network.modules():  # as `fully_shard` replaces them
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach()[:1]))
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.clone())
    assert all(a is b for a, b in zip(before, [*given.parameters(), *given.buffers()], strict=True))


def test_a_classifier_that_is_left_out_is_named_once(caplog, monkeypatch):
    """The last layer left without a word, and might be the user's own embedding."""
    module = torchvision_resnet()
    Backbone.from_module(module, size=32, argument="student")
    assert len([text for text in caplog.messages if "left out" in text]) == 1
    layer = "Linear(in_features=512, out_features=5, bias=True)"
    assert f"student=ResNet (torchvision.models.resnet): its classifier is left out (fc: {layer})" in caplog.text
    caplog.clear()
    kept = Backbone.from_module(module, size=32, embedding=lambda output: output)
    assert kept.dim == 5 and "left out" not in caplog.text, "as the message says"
    Backbone.from_module(module, size=32, argument="teacher")
    Backbone.from_module(timm.create_model("test_resnet"))
    monkeypatch.setenv("RANK", "1")
    Backbone.from_module(module, size=32)
    assert "left out" not in caplog.text, (
        "kd reads a teacher's; published classes are no embedding; once in all processes"
    )
    monkeypatch.delenv("RANK")
    Backbone.from_module(timm.create_model("test_resnet", num_classes=7))
    assert "(fc: Linear(in_features=96, out_features=7, bias=True))" in caplog.text
    caplog.clear()
    Backbone.from_module(timm.create_model("test_resnet", num_classes=0))
    Backbone.from_module(encoder(), **INPUT)
    assert "left out" not in caplog.text
