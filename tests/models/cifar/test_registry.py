"""What holds for every family of CIFAR networks, and the ones that are not residual networks of the plain kind."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForImageClassification

from coss_hf.models.cifar.configuration_cifar_resnet import CifarResNetConfig
from coss_hf.models.cifar.configuration_cifar_vgg import CifarVGGConfig
from coss_hf.models.cifar.configuration_cifar_wide_resnet import CifarWideResNetConfig
from coss_hf.models.cifar.registry import cifar_image_processor
from coss_hf.models.loading import load_backbone
from tests.helpers.processes import run as run_program
from tests.models.cifar.test_resnet import randomize_norms

TINY = [
    CifarResNetConfig(depth=14, stem_width=4, hidden_sizes=[6, 8, 12], num_labels=5),
    CifarVGGConfig(layers_per_stage=2, hidden_sizes=[4, 5, 6, 7, 8], num_labels=5),
    CifarWideResNetConfig(depth=16, stem_width=4, hidden_sizes=[4, 8, 12], num_labels=5),
]
# Of maps of one size, as those of the last two stages of VGG, the last counts.
SIZES = {"cifar_resnet": (32, 16, 8), "cifar_vgg": (32, 16, 8, 4), "cifar_wide_resnet": (32, 16, 8)}


def vgg_maps(model, x):
    maps = []
    for i, stage in enumerate(model.stages):
        for conv, norm in ((stage[0], stage[1]), (stage[3], stage[4])):
            x = norm(F.conv2d(x, conv.weight, conv.bias, padding=1)).clamp(min=0)
        maps.append(x)
        x = F.max_pool2d(x, 2) if i < 3 else x
    return maps


def wide_maps(model, x):
    """Pre-activation as written in the paper: y = x + conv(relu(bn(conv(relu(bn(x))))))."""
    x, maps = F.conv2d(x, model.conv1.weight, padding=1), []
    for i, stage in enumerate(model.stages):
        for block in stage:
            active = block.bn1(x).clamp(min=0)
            stride = 2 if i > 0 and block is stage[0] else 1
            y = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
            y = F.conv2d(block.bn2(y).clamp(min=0), block.conv2.weight, padding=1)
            x = y + (x if x.shape == y.shape else F.conv2d(active, block.shortcut.weight, stride=stride))
        norm = model.stages[i + 1][0].bn1 if i < 2 else model.bn
        maps.append(norm(x).clamp(min=0))
    return maps


@pytest.mark.parametrize(("config", "reference"), [(TINY[1], vgg_maps), (TINY[2], wide_maps)])
def test_forward_agrees_with_a_computation_from_the_weights(config, reference):
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    randomize_norms(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs, expected = model(x, output_hidden_states=True), reference(model, x)
    torch.testing.assert_close(list(outputs.hidden_states), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.last_hidden_state, expected[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.pooler_output[..., 0, 0], expected[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", TINY, ids=lambda config: config.model_type)
def test_trains_saves_and_serves_as_a_backbone(tmp_path, config):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).train()
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    outputs = model(x, labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    outputs.loss.backward()
    # A bias before batch norm has no effect.
    inert = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not [name for name in inert if not name.endswith("bias")]
    model.save_pretrained(tmp_path)
    cifar_image_processor((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.dim == config.hidden_sizes[-1]
    assert tuple(m.shape[-1] for m in backbone.example(maps=True).maps) == SIZES[config.model_type]
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert half(x.bfloat16()).pooler_output.isfinite().all()


def test_vgg_pools_once_more_on_larger_images():
    for size, side in ((32, 4), (64, 4), (48, 6)):
        model = AutoModel.from_config(CifarVGGConfig(hidden_sizes=[2] * 5, image_size=size))
        assert model(torch.zeros(1, 3, size, size)).last_hidden_state.shape[-1] == side


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (CifarVGGConfig, {"layers_per_stage": 0}, "layers_per_stage=0.*positive"),
        (CifarVGGConfig, {"hidden_sizes": [1, 2, 3]}, "five positive widths"),
        (CifarWideResNetConfig, {"depth": 20}, "depth=20 is not 6n"),
        (CifarWideResNetConfig, {"hidden_sizes": [1, 2, 0]}, "three positive widths"),
    ],
)
def test_configurations_that_define_no_network_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(**arguments)


REMOTE = """
import sys
sys.modules["coss_hf"] = None
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
for folder in sys.argv[1:]:
    x, pooled, logits = torch.load(folder + "/expected.pt")
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(model(x).logits, logits)
    torch.testing.assert_close(AutoModel.from_pretrained(folder, trust_remote_code=True)(x).pooler_output, pooled)
    AutoImageProcessor.from_pretrained(folder)
    again = folder + "-again"
    model.save_pretrained(again)
    torch.testing.assert_close(AutoModel.from_pretrained(again, trust_remote_code=True)(x).pooler_output, pooled)
    print("loaded", type(model).__module__)
assert not [name for name in sys.modules if name.startswith("coss_hf.")]
"""


def test_checkpoints_load_where_this_package_is_not_installed(tmp_path):
    folders = [tmp_path / config.model_type for config in TINY]
    for folder, config in zip(folders, TINY):
        model = AutoModelForImageClassification.from_config(config).eval()
        randomize_norms(model)
        model.save_pretrained(folder)
        cifar_image_processor((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).save_pretrained(folder)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.save((x, model.base_model(x).pooler_output, model(x).logits), folder / "expected.pt")
    done = run_program(["-c", REMOTE, *folders], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loaded transformers_modules") == len(TINY)
