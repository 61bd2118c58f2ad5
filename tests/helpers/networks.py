"""Tiny networks of many architectures at random weights, and the embedding each should give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessor,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from coss_hf.models.cifar.configuration_cifar_resnet import CifarResNetConfig
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetForImageClassification

SIZE = 32
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
    "max_position_embeddings": 8,
}
TOWERS = {"vision_config": SMALL, "text_config": TEXT}
STAGES = {"hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1]}
SQUARE = {"height": SIZE, "width": SIZE}


def half(size: int = SIZE) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def images(count: int = 3, size: tuple[int, int] = (50, 40)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def timm_config(architecture: str, **model_args) -> TimmWrapperConfig:
    return TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=model_args or None)


class Network(NamedTuple):
    """A network as published, its image processor, and what coss_hf should make of it.

    ``value`` computes the embedding of pixel values with the published network; ``unused`` are the parameters that the
    loaded backbone has but the embedding does not need.
    """

    model: Callable[[], PreTrainedModel]
    processor: Callable | None
    pooling: str
    dim: int
    value: Callable
    unused: set[str] = frozenset()


DENSE = {"pooler.dense.weight", "pooler.dense.bias"}
NORM = {"pooler.layernorm.weight", "pooler.layernorm.bias"}
MASK = {"embeddings.mask_token"}
DINOV2 = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
NETWORKS = {
    "vit": Network(
        lambda: ViTForImageClassification(ViTConfig(**SMALL)),
        half,
        "cls",
        32,
        lambda m, x: m.vit(x).last_hidden_state[:, 0],
        DENSE,
    ),
    "deit": Network(
        lambda: DeiTForImageClassification(DeiTConfig(**SMALL)),
        half,
        "cls",
        32,
        lambda m, x: m.deit(x).last_hidden_state[:, 0],
        DENSE,
    ),
    "dinov2": Network(
        lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL)),
        lambda: BitImageProcessor(**DINOV2),
        "pooler",
        32,
        lambda m, x: m.dinov2(x).last_hidden_state[:, 0],
        MASK,
    ),
    "dinov2_registers": Network(
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)),
        lambda: BitImageProcessor(**DINOV2),
        "pooler",
        32,
        lambda m, x: m(x).last_hidden_state[:, 0],
        MASK,
    ),
    "swin": Network(
        lambda: SwinForImageClassification(
            SwinConfig(image_size=SIZE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ),
        half,
        "pooler",
        16,
        lambda m, x: m.swin(x).last_hidden_state.mean(1),
    ),
    "convnext": Network(
        lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES)),
        lambda: ConvNextImageProcessor(size={"shortest_edge": SIZE}),
        "pooler",
        16,
        lambda m, x: m.convnext.layernorm(m.convnext(x).last_hidden_state.mean((2, 3))),
    ),
    "resnet": Network(
        lambda: ResNetForImageClassification(ResNetConfig(**STAGES, embedding_size=4, layer_type="basic")),
        half,
        "pooler",
        16,
        lambda m, x: m.resnet(x).last_hidden_state.mean((2, 3)),
    ),
    "mobilenet_v2": Network(
        lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=SIZE)),
        lambda: MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
        "pooler",
        1280,
        lambda m, x: m.mobilenet_v2(x).last_hidden_state.mean((2, 3)),
    ),
    "efficientnet": Network(
        lambda: EfficientNetForImageClassification(
            EfficientNetConfig(
                image_size=SIZE,
                width_coefficient=0.25,
                hidden_dim=320,
                num_block_repeats=[1] * 7,
                initializer_range=0.12,
            )
        ),
        lambda: EfficientNetImageProcessor(size=SQUARE),
        "pooler",
        320,
        lambda m, x: m.efficientnet(x).last_hidden_state.mean((2, 3)),
    ),
    "beit": Network(
        lambda: BeitForImageClassification(BeitConfig(**SMALL)),
        half,
        "pooler",
        32,
        lambda m, x: m.beit.pooler.layernorm(m.beit(x).last_hidden_state[:, 1:].mean(1)),
    ),
    "beit_without_pooler": Network(
        lambda: BeitModel(BeitConfig(**SMALL), add_pooling_layer=False),
        half,
        "mean",
        32,
        lambda m, x: m(x).last_hidden_state[:, 1:].mean(1),
        NORM,
    ),
    "data2vec": Network(
        lambda: Data2VecVisionForImageClassification(Data2VecVisionConfig(**SMALL)),
        half,
        "mean",
        32,
        lambda m, x: m.data2vec_vision(x).last_hidden_state[:, 1:].mean(1),
    ),
    "siglip_vision": Network(
        lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)),
        lambda: SiglipImageProcessor(size=SQUARE),
        "pooler",
        32,
        lambda m, x: m(x).pooler_output,
    ),
    "siglip_two_towers": Network(
        lambda: SiglipModel(SiglipConfig(**TOWERS)),
        lambda: SiglipImageProcessor(size=SQUARE),
        "pooler",
        32,
        lambda m, x: m.vision_model(x).pooler_output,
    ),
    "clip_vision": Network(
        lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)),
        lambda: CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE),
        "pooler",
        32,
        lambda m, x: m(x).pooler_output,
    ),
    "clip_two_towers": Network(
        lambda: CLIPModel(CLIPConfig(**TOWERS)),
        lambda: CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE),
        "pooler",
        32,
        lambda m, x: m.vision_model(x).pooler_output,
    ),
    "timm_resnet": Network(
        lambda: TimmWrapperForImageClassification(timm_config("test_resnet")),
        None,
        "pooler",
        96,
        lambda m, x: m.timm_model.forward_features(x).mean((2, 3)),
    ),
    "timm_vit": Network(
        lambda: TimmWrapperModel(timm_config("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2)),
        None,
        "pooler",
        32,
        lambda m, x: m.timm_model.forward_features(x)[:, 0],
    ),
    "timm_mobilenetv3": Network(
        lambda: TimmWrapperModel(timm_config("mobilenetv3_small_050")),
        None,
        "pooler",
        1024,
        lambda m, x: m.timm_model(x),
    ),
    "timm_swin": Network(  # gives maps (b, h, w, d)
        lambda: TimmWrapperModel(
            timm_config("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 2))
        ),
        None,
        "pooler",
        16,
        lambda m, x: m.timm_model.forward_features(x).mean((1, 2)),
    ),
    "cifar_resnet": Network(
        lambda: CifarResNetForImageClassification(CifarResNetConfig(depth=8, stem_width=4, hidden_sizes=[4, 8, 16])),
        half,
        "pooler",
        16,
        lambda m, x: m.resnet(x).last_hidden_state.mean((2, 3)),
    ),
}


def build(name: str) -> PreTrainedModel:
    """The published network, with biases, class tokens and batch-norm statistics as if it had been trained."""
    torch.manual_seed(0)
    model = NETWORKS[name].model()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        if norms:
            for norm in norms:
                norm.momentum = None
            model.train()(torch.randn(4, 3, SIZE, SIZE))
    return model.eval()


def save(name: str, folder: Path) -> PreTrainedModel:
    model = build(name)
    model.save_pretrained(folder)
    if NETWORKS[name].processor is not None:
        NETWORKS[name].processor().save_pretrained(folder)
    return model


def save_with_tokenizer(folder: Path) -> None:
    """CLIP of both towers, with a tokenizer of a few words."""
    save("clip_two_towers", folder)
    words = ["<pad>", "<unk>", "a", "photo", "of", "cat", "dog", "<end>"]
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = words.index("<end>")  # the position that it pools
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 7)])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
