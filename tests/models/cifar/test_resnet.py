import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from coss_hf.models.cifar.configuration_cifar_resnet import CifarResNetConfig
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel
from coss_hf.models.cifar.registry import CIFAR_NETWORKS, cifar_config, cifar_image_processor

TINY = {"depth": 14, "stem_width": 4, "hidden_sizes": [6, 8, 12]}


def reference(weights: dict, x: torch.Tensor, shortcut: str) -> list[torch.Tensor]:
    """The evaluation forward pass from a state dict alone: the maps at the end of the three stages."""

    def norm(x, name):
        mean, var, scale, shift = (
            weights[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1").clamp(min=0)
    maps = []
    for stage in range(3):
        block = 0
        while f"stages.{stage}.{block}.conv1.weight" in weights:
            name, stride = f"stages.{stage}.{block}", 2 if stage > 0 and block == 0 else 1
            y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = norm(y, f"{name}.bn1").clamp(min=0)
            y = norm(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if y.shape != x.shape and shortcut == "padding":
                before = (y.shape[1] - x.shape[1]) // 2
                kept, x = x[:, :, ::stride, ::stride], torch.zeros_like(y)
                x[:, before : before + kept.shape[1]] = kept
            elif y.shape != x.shape:
                x = norm(F.conv2d(x, weights[f"{name}.shortcut.0.weight"], stride=stride), f"{name}.shortcut.1")
            x = (y + x).clamp(min=0)
            block += 1
        maps.append(x)
    return maps


def randomize_norms(model: torch.nn.Module) -> None:
    """Off their initial 1 and 0, so that a batch norm in the wrong place shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("resnet20", 278_324), ("resnet56", 861_620), ("resnet8x4", 1_233_540), ("resnet32x4", 7_433_860)),
        *(("vgg8", 3_965_028), ("vgg13", 9_462_180)),
        *(("wrn_16_2", 703_284), ("wrn_40_2", 2_255_156), ("wrn_40_1", 569_780)),
    ],
)
def test_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(cifar_config(name, num_labels=100))
    assert model.num_parameters() == parameters


def test_padding_shortcuts_have_no_parameters():
    with torch.device("meta"):
        model = CifarResNetForImageClassification(cifar_config("resnet56", shortcut="padding", num_labels=10))
    assert model.num_parameters() == 853_018
    assert not [key for key in model.state_dict() if "shortcut" in key]


def test_every_named_network_has_its_depth():
    for name in CIFAR_NETWORKS:
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(cifar_config(name))
        layers = [key for key, p in model.named_parameters() if p.dim() > 1 and "shortcut" not in key]
        if name.startswith("vgg"):
            assert len(layers) == {"vgg8": 6, "vgg13": 11}[name], "two fully connected layers fewer than on ImageNet"
        else:
            # A depth of 6n + 4 counts the three shortcuts as two layers.
            assert len(layers) == model.config.depth - 2 * name.startswith("wrn")


@pytest.mark.parametrize("shortcut", ["projection", "padding"])
@pytest.mark.parametrize("size", [(32, 32), (30, 18)])
def test_forward_agrees_with_a_computation_from_the_weights(shortcut, size):
    torch.manual_seed(0)
    model = CifarResNetModel(CifarResNetConfig(**TINY, shortcut=shortcut)).eval()
    randomize_norms(model)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        outputs = model(x, output_hidden_states=True)
        expected = reference(model.state_dict(), x, shortcut)
    assert [tuple(m.shape[1:]) for m in outputs.hidden_states][0] == (6, *size)
    assert len(outputs.hidden_states) == 3
    for found, wanted in zip(outputs.hidden_states, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.last_hidden_state, expected[-1], rtol=1e-4, atol=1e-5)
    assert outputs.pooler_output.shape == (2, model.config.hidden_sizes[-1], 1, 1)
    torch.testing.assert_close(outputs.pooler_output[..., 0, 0], expected[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert model(x).hidden_states is None
    torch.testing.assert_close(model(x, return_dict=False)[1], outputs.pooler_output)


def test_initial_weights_are_kaiming_normal_and_depend_on_the_seed():
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(CifarResNetModel(cifar_config("resnet20")))
    weight, same, other = (network.stages[2][1].conv1.weight for network in networks)
    assert torch.equal(weight, same) and not torch.equal(weight, other)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert weight.mean().abs() < 1e-3
    norm = networks[0].stages[2][1].bn2
    assert (norm.weight == 1).all() and (norm.bias == 0).all() and (norm.running_var == 1).all()


def test_classifier_loss_and_gradients():
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(**TINY, num_labels=5)).train()
    labels = torch.tensor([0, 4, 2])
    outputs = model(torch.randn(3, 3, 32, 32), labels=labels)
    assert outputs.logits.shape == (3, 5)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_auto_model_loads_the_backbone_of_a_classifier(tmp_path):
    model = CifarResNetForImageClassification(CifarResNetConfig(**TINY, shortcut="padding", num_labels=5)).eval()
    randomize_norms(model)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hidden_sizes == TINY["hidden_sizes"]
    x = torch.randn(2, 3, 32, 32)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is CifarResNetModel
    torch.testing.assert_close(backbone(x).pooler_output, model.resnet(x).pooler_output)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(reloaded) is CifarResNetForImageClassification
    torch.testing.assert_close(reloaded(x).logits, model(x).logits)


def test_image_processor_reloads_and_normalises(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    cifar_image_processor(mean, std).save_pretrained(tmp_path)
    CifarResNetConfig(**TINY).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = processor([Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    expected = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(found, expected.permute(2, 0, 1), rtol=0, atol=1e-5)
    larger = processor([Image.fromarray(pixels).resize((50, 40))], return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "depth=18 .*20"),
        ({"depth": 2}, "depth=2 "),
        ({"shortcut": "option_a"}, "shortcut='option_a' .*'padding'"),
        ({"hidden_sizes": [16, 32]}, r"hidden_sizes=\[16, 32\].*three"),
        ({"hidden_sizes": [16, 31, 64], "shortcut": "padding"}, "31.*'projection'"),
        ({"hidden_sizes": [8, 32, 64], "shortcut": "padding"}, "8.*'projection'"),
        ({"stem_width": 0}, "stem_width=0.*positive"),
    ],
)
def test_configurations_that_define_no_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CifarResNetConfig(**arguments)


def test_unknown_network_is_refused():
    with pytest.raises(ValueError, match="'resnet18'.*resnet20"):
        cifar_config("resnet18")
