"""Tiny networks of every family of Transformers that reads images, and what each family's own classifier reads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from coss_hf.models.backbone import backbone_classes

SIZE = 64
CLASSES = 5
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}
DETECTOR = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
WINDOWS = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
PYRAMID = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
SEGMENTER = {
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "num_pos_feats": 8,
}
# Entries in which a family differs from TRANSFORMER and DETECTOR, so that a network has some 10,000 parameters.
ENTRIES = {
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_groups": 4},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "patch_sizes": [7, 3, 3]},
    "dinov3_convnext": STAGES,
    "donut-swin": WINDOWS,
    "dpt": {"is_hybrid": False, "neck_hidden_sizes": [8, 8, 8, 8], "backbone_out_indices": [0, 1, 1, 1]},
    "efficientnet": {"width_coefficient": 0.25, "hidden_dim": 320, "num_block_repeats": [1] * 7},
    "focalnet": {"embed_dim": 8, "depths": [1] * 4, "focal_levels": [1] * 4, "focal_windows": [3] * 4},
    "glpn": PYRAMID,
    "hiera": {
        "embed_dim": 8,
        "depths": [1] * 4,
        "num_heads": [1] * 4,
        "patch_size": [7, 7],
        "image_size": [SIZE, SIZE],
    },
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "patch_size": 16,
    },
    "maskformer-swin": WINDOWS,
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [16, 16, 32], "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 64], "patch_size": 2},
    "mobilevitv2": {
        "width_multiplier": 0.25,
        "base_attn_unit_dims": [32, 32, 32],
        "n_attn_blocks": [1, 1, 1],
        "patch_size": 2,
    },
    "poolformer": {**STAGES, "patch_sizes": [7, 3, 3, 3]},
    "pvt": PYRAMID,
    "pvt_v2": PYRAMID,
    "radio": {"max_img_size": 128},
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "resnet": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "sam_hq_vision_model": SEGMENTER,
    "sam_vision_model": SEGMENTER,
    "segformer": PYRAMID,
    "swiftformer": {"embed_dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "swin": WINDOWS,
    "swin2sr": {**WINDOWS, "patch_size": 1},
    "swinv2": WINDOWS,
    "vit_mae": {"mask_ratio": 0.0},
    "yolos": {"num_detection_tokens": 4, "image_size": [SIZE, SIZE]},
}
# Deep networks in which two images fade at random weights: their embeddings are compared, but hardly differ.
FADING = ("EfficientNetModel", "MobileViTModel", "MobileViTV2Model")
# Families that are tried elsewhere, or that give no embedding of an image.
NOT_TRIED = {
    "depth_pro": "several encoders of many sizes of an image",
    "dinat": "needs a package that is built for one machine",
    "edgetam_vision_model": "a timm network with a pyramid of one size",
    "d_fine": "a detector, of larger images",
    "deimv2": "a detector, of larger images",
    "efficientloftr": "pairs of images",
    "gemma3n_vision": "a timm network of 300 million parameters",
    "lw_detr": "a detector",
    "mgp-str": "reads text",
    "omdet-turbo": "a detector of named things",
    "pp_doclayout_v3": "a detector, of larger images",
    "pp_doclayout_v4": "a detector, of larger images",
    "pp_ocrv5_mobile_rec": "reads lines of text",
    "pp_ocrv5_server_rec": "reads lines of text",
    "pp_ocrv6_medium_det": "finds lines of text",
    "pp_ocrv6_small_det": "finds lines of text",
    "pp_ocrv6_small_rec": "reads lines of text",
    "pp_ocrv6_tiny_rec": "reads lines of text",
    "rf_detr": "a detector, of larger images",
    "rt_detr": "a detector, of larger images",
    "rt_detr_v2": "a detector, of larger images",
    "sam2_hiera_det_model": "stages of one size",
    "sam2_vision_model": "30 million parameters",
    "sam3_lite_text_text_model": "reads text",
    "sam3_video": "900 million parameters",
    "sam3_vision_model": "400 million parameters",
    "timm_backbone": "needs a name of timm",
    "timm_wrapper": "see TIMM",
    "uvdoc": "flattens pages",
}


def config_of(family: str):
    """The configuration of a family's tiny network."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    entries = {"num_labels": CLASSES}
    if family != "cvt":  # which has other meanings for some of the names
        for name, value in (TRANSFORMER | DETECTOR).items():
            if name in known and isinstance(known[name], (list, tuple)) and name in ("image_size", "patch_size"):
                entries[name] = [value, value]
            elif name in known and not isinstance(known[name], (list, tuple)):
                entries[name] = value
    return kind(**entries | ENTRIES.get(family, {}))


def families() -> list[str]:
    """Model types of Transformers whose ``AutoModel`` reads images alone."""
    found = []
    for family in CONFIG_MAPPING:
        try:
            classes = AutoModel._model_mapping.get(CONFIG_MAPPING[family], ())
            first = classes[0] if isinstance(classes, (list, tuple)) else classes
            reads_images = first.main_input_name == "pixel_values"
        except (AttributeError, ImportError, IndexError, ValueError):  # not here, or needs a package that is not
            continue
        towers = "vision_config" in (getattr(CONFIG_MAPPING[family], "sub_configs", None) or {})
        if reads_images and not towers and not family.startswith("cifar_") and family not in NOT_TRIED:
            found.append(family)
    return found


def build(family: str) -> PreTrainedModel:
    """A family's network as its checkpoints have it: with its classifier, where it has one; all weights random."""
    torch.manual_seed(0)
    config = config_of(family)
    classifiers = AutoModelForImageClassification._model_mapping.get(type(config), None)
    if isinstance(classifiers, (list, tuple)):
        classifiers = classifiers[0]
    network = (classifiers or backbone_classes(config)[0])(config)
    with torch.no_grad():  # an initial norm is an identity, an initial class token zero, and images fade in deep ones
        for parameter in network.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * (2 / max(parameter[0].numel(), 1)) ** 0.5)
            else:
                parameter.add_(0.1 * noise)
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    return network.eval()


def pixels(size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read_by_classifier(network: PreTrainedModel, images: Tensor) -> Tensor | None:
    """What a network's last linear layer of classes reads ``(b, d)``; None where it has no such layer."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == network.config.num_labels]
    if not layers:
        return None
    read = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    network(pixel_values=images)
    handle.remove()
    return read[0].flatten(1)


def _and_mean_of_patches(network: PreTrainedModel, embedding: Tensor, images: Tensor) -> Tensor:
    """DINOv2: the class token beside the mean of the patches; the paper's k-NN reads the class token alone."""
    others = 1 + getattr(network.config, "num_register_tokens", 0)
    patches = network.base_model(pixel_values=images).last_hidden_state[:, others:]
    return torch.cat([embedding, patches.mean(1)], 1)


def _behind_norm_of_map(network: PreTrainedModel, embedding: Tensor, images: Tensor) -> Tensor:
    """PoolFormer: the mean of its normalised map, which has one mean and one deviation for an image."""
    values = network.base_model(pixel_values=images).last_hidden_state.flatten(1)
    deviation = (values.var(1, unbiased=False) + network.norm.eps).sqrt()
    centred = embedding - values.mean(1, keepdim=True)
    return centred / deviation[:, None] * network.norm.weight + network.norm.bias


# What a classifier reads that reads something else than the embedding, computed from the embedding. Most have a norm of
# their own, which AutoModel drops.
RELATED: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Tensor]] = {
    "cvt": lambda network, embedding, _: embedding * network.layernorm.weight + network.layernorm.bias,
    "data2vec-vision": lambda network, embedding, _: network.base_model.pooler.layernorm(embedding),
    "dinov2": _and_mean_of_patches,
    "dinov2_with_registers": _and_mean_of_patches,
    "levit": lambda network, embedding, _: network.classifier.batch_norm(embedding),
    "poolformer": _behind_norm_of_map,
    "swiftformer": lambda network, embedding, _: network.norm(embedding[:, :, None, None]).flatten(1),
}


def _pooler(output) -> Tensor:
    return output.pooler_output.flatten(1)


def _map(output) -> Tensor:
    return output.last_hidden_state.mean((2, 3))


def _tokens(output) -> Tensor:
    return output.last_hidden_state.mean(1)


def _all_but_first(output) -> Tensor:
    return output.last_hidden_state[:, 1:].mean(1)


# What the papers of families without a classifier take for the embedding of an image.
BY_PAPER: dict[str, Callable] = {
    "aimv2_vision_model": _pooler,
    "chinese_clip_vision_model": _pooler,
    "clip_vision_model": _pooler,
    "dinov3_convnext": _pooler,
    "dinov3_vit": _pooler,
    "dpt": _pooler,
    "glpn": _map,
    "internvl_vision": _all_but_first,
    "maskformer-swin": _pooler,
    "mlcd": _pooler,
    "mlcd_vision_model": _pooler,
    "pixio": _pooler,
    "qianfan_ocr_vision": _all_but_first,
    "radio": lambda output: output.last_hidden_state[:, [0, 1]].flatten(1),
    "sam3_vit_model": _tokens,
    "sam_hq_vision_model": _map,
    "sam_vision_model": _map,
    "sapiens2": _pooler,
    "siglip_vision_model": _pooler,
    "swin2sr": _map,
    "tipsv2_vision_model": _pooler,
    "vit_mae": lambda output: output.last_hidden_state[:, 0],
    "vitdet": _map,
    "yolos": _pooler,
}
# Families whose networks give no embedding of RGB images alone, and what the refusal must name.
REFUSED = {
    "conditional_detr": "decoder",
    "cosmos3_edge_vision": "grid_thw besides images",
    "dab-detr": "decoder",
    "deformable_detr": "decoder",
    "detr": "decoder",
    "glm_image_vision": "grid_thw besides images",
    "grounding-dino": "input_ids besides images",
    "hgnet_v2": "no last_hidden_state",
    "hunyuan_vl_vision": "grid_thw besides images",
    "hy_v4_vl_vision": "grid_thw besides images",
    "inkling2_vision": "image_grid_thw besides images",
    "lightglue": "images of 1 channel",
    "mask2former": "no last_hidden_state",
    "maskformer": "no last_hidden_state",
    "minicpm_ocr_vision": "cannot embed RGB images",
    "minicpmv4_7_vision": "cannot embed RGB images",
    "mm-grounding-dino": "input_ids besides images",
    "muse_glimmer_vision": "grid_thw besides images",
    "muse_spark_vision": "grid_thw besides images",
    "pixtral": "packs images",
    "seggpt": "prompt_pixel_values, prompt_masks besides images",
    "siglip2_vision_model": "pixel_attention_mask, spatial_shapes besides images",
    "table-transformer": "decoder",
    "timesformer": "reads videos",
    "video_llama_3_vision": "grid_thw, merge_sizes besides images",
    "videomae": "reads videos",
    "vivit": "reads videos",
}
# Networks of several towers: the class of the one that reads images once it stands alone.
TOWERS = {
    "aimv2": "Aimv2VisionModel",
    "altclip": "CLIPVisionModel",
    "chinese_clip": "ChineseCLIPVisionModel",
    "clip": "CLIPVisionModel",
    "internvl": "InternVLVisionModel",
    "metaclip_2": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
}
# Towers that AutoModel does not load alone: teachers, not students.
TEACHERS = ("blip", "clipseg", "git", "owlvit")
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}


def build_towers(family: str) -> PreTrainedModel:
    """A family's network of several towers, all weights random."""
    torch.manual_seed(0)
    text = TEXT if family == "git" else {"text_config": TEXT}
    return AutoModel.from_config(CONFIG_MAPPING[family](vision_config=TRANSFORMER, **text)).eval()


TIMM = {
    "convnext_atto": {},
    "deit_tiny_distilled_patch16_224": {"img_size": SIZE},
    "efficientnet_lite0": {},
    "hgnetv2_b0": {},
    "mobilenetv3_small_050": {},
    "poolformer_s12": {},
    "regnetx_002": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": SIZE, "window_size": 2, "embed_dim": 24, "depths": [1, 1, 1, 1]},
    "vit_tiny_patch16_224": {"img_size": SIZE, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": SIZE, "depth": 1, "embed_dim": 64, "num_heads": 2},
    "vit_small_patch14_dinov2": {"img_size": 56, "depth": 2},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 2},
}
