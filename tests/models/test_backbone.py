"""Every architecture: which embedding, of what dimension, equal to what, and without which weights."""

import copy
import functools
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BeitConfig,
    BeitModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import embed, embed_dataset
from coss_hf.models.loading import load_backbone
from coss_hf.models.modules import ModuleNetwork
from coss_hf.neighbors.embedding_store import embed_shards
from coss_hf.utils.errors import NonFiniteEmbedding
from tests.helpers.networks import NETWORKS, SMALL, build, half, images, save


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a network of `NETWORKS`, saved once."""

    @functools.cache
    def folder(name: str):
        path = tmp_path_factory.mktemp(name)
        save(name, path)
        return str(path)

    return folder


@pytest.fixture(scope="session")
def backbone(checkpoint):
    """Loaded once, for tests that leave it as it is."""
    return functools.cache(lambda name: load_backbone(checkpoint(name)).freeze())


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_embedding_of(name, backbone):
    network, loaded = NETWORKS[name], backbone(name)
    assert (loaded.pooling, loaded.dim) == (network.pooling, network.dim)
    pixels = loaded.preprocess(images())
    expected = network.value(build(name), pixels)
    embedding = loaded.features(pixels).embedding
    assert embedding.shape == (3, network.dim)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max().clamp(min=1)))
    assert expected.std(0).max() > 1e-4  # images differ, or the comparison would say little
    names = {name for name, _ in loaded.model.named_parameters()}
    assert loaded.unused == network.unused <= names
    dropped = ("classifier", "text_model", "timm_model.fc", "timm_model.head", "timm_model.classifier")
    assert not [name for name in names if name.startswith(dropped)]
    assert loaded.num_parameters() == sum(
        p.numel() for n, p in loaded.model.named_parameters() if n not in loaded.unused
    )


PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_registers": 5, "swin": 0, "data2vec": 1, "clip_two_towers": 1}
PREFIX |= {"siglip_vision": 0, "timm_vit": 1, "convnext": None, "timm_swin": None}


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "gap"])
@pytest.mark.parametrize("name", PREFIX)
def test_mean_over_positions_leaves_other_tokens_out(name, pooling, backbone):
    loaded = copy.copy(backbone(name))
    loaded.set_pooling(pooling)
    pixels = loaded.preprocess(images())
    hidden = loaded.model(pixels).last_hidden_state
    if PREFIX[name] is not None:
        expected = hidden[:, PREFIX[name] :].mean(1)
    else:
        expected = hidden.mean((1, 2) if name == "timm_swin" else (2, 3))
    torch.testing.assert_close(loaded.features(pixels).embedding, expected, rtol=1e-5, atol=1e-5)
    assert loaded.dim == expected.shape[1]


@pytest.mark.parametrize(
    "name, pooling, reason",
    [
        ("vit", "pooler", "weights are not in the checkpoint"),
        ("beit_without_pooler", "pooler", "weights are not in the checkpoint"),
        ("data2vec", "pooler", "has no pooler"),
        ("resnet", "cls", "has no class token"),
        ("swin", "cls", "has no class token"),
        ("vit", "max", "'max' is unknown: choose one of auto, cls"),
    ],
)
def test_pooling_refused(name, pooling, reason, checkpoint):
    with pytest.raises(ValueError, match=reason) as error:
        load_backbone(checkpoint(name), argument="teacher", pooling=pooling)
    assert "--teacher_pooling=" in str(error.value)


def test_beit_of_masked_images_has_a_pooler_without_weights(tmp_path):
    """It is the class token: nothing in it could be missing."""
    model = BeitModel(BeitConfig(**SMALL, use_mean_pooling=False), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(embed(str(tmp_path), pixels), expected)


@pytest.mark.parametrize("name", ["vit", "timm_resnet", "cifar_resnet"])
def test_the_pooling_chosen_stays_with_the_network(name, checkpoint, tmp_path):
    student = load_backbone(checkpoint(name), pooling="gap")
    student.model.save_pretrained(tmp_path)
    student.processor.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path))
    assert again.pooling == again.model.config.embedding_pooling == "gap"
    assert torch.equal(embed(AutoModel.from_pretrained(tmp_path), images()), embed(student, images()))


def test_timm_preprocessing_stays_with_the_network(checkpoint, tmp_path):
    student = load_backbone(checkpoint("timm_resnet"), size=96)
    assert student.size == (96, 96)
    student.model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.data_config["mean"]) == (0.5, 0.5, 0.5)
    assert torch.equal(processor(images())["pixel_values"], student.preprocess(images()))


# ---- sizes ----


def test_a_transformer_takes_another_size_only_if_asked(checkpoint):
    with pytest.raises(
        ValueError, match=r"--teacher_size=48x48: ViTModel .*--teacher_size.*\(32\).*--interpolate_pos_enc"
    ):
        load_backbone(checkpoint("vit"), argument="teacher", size=48)
    loaded = load_backbone(checkpoint("vit"), size=48, interpolate_pos_encoding=True)
    pixels = loaded.preprocess(images())
    assert pixels.shape == (3, 3, 48, 48)
    with torch.no_grad():
        expected = loaded.model.eval()(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(embed(loaded, images()), expected)


@pytest.mark.parametrize("name, size", [("timm_vit", 96), ("convnext", 8), ("dinov2", 4)])
def test_a_size_that_a_network_cannot_take_is_refused(name, size, checkpoint):
    for interpolate in (False, True):  # none of these has the option
        with pytest.raises(ValueError, match=f"--student_size={size}x{size}.*cannot take images of this size") as error:
            load_backbone(checkpoint(name), argument="student", size=size, interpolate_pos_encoding=interpolate)
        assert "interpolate" not in str(error.value)


def test_a_network_of_any_size_ignores_interpolation(checkpoint):
    """One flag serves teacher and student: a ResNet next to an interpolating ViT must not stop."""
    loaded = load_backbone(checkpoint("resnet"), size=40, interpolate_pos_encoding=True)
    assert embed(loaded, images()).shape == (3, 16)


# ---- networks in memory ----


@pytest.mark.parametrize("name", ["vit", "beit_without_pooler", "resnet", "timm_resnet", "clip_two_towers"])
def test_embed_takes_names_networks_and_backbones(name, checkpoint, backbone):
    expected = embed(backbone(name), images())
    assert expected.shape == (3, NETWORKS[name].dim)
    assert torch.equal(embed(checkpoint(name), images()), expected)
    assert torch.equal(embed(AutoModel.from_pretrained(checkpoint(name)), images()), expected)
    pixels = backbone(name).preprocess(images())
    torch.testing.assert_close(embed(checkpoint(name), pixels.double(), batch_size=2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "convnext", "siglip_two_towers", "beit"])
def test_embed_drops_classifier_and_text_in_memory(name, backbone):
    expected = backbone(name).features(pixels := backbone(name).preprocess(images())).embedding
    torch.testing.assert_close(embed(build(name), images(), processor=backbone(name).processor), expected)
    torch.testing.assert_close(embed(build(name), pixels), expected)


def test_embed_leaves_the_network_as_it_was(checkpoint):
    model = AutoModel.from_pretrained(checkpoint("vit")).train()
    model.encoder.eval() if hasattr(model, "encoder") else model.layers.eval()
    model.embeddings.requires_grad_(False)

    def state():
        modes = [module.training for module in model.modules()]
        return modes, [p.requires_grad for p in model.parameters()], repr(vars(model.config))

    before, before_weights = state(), weights(model)
    embedding = embed(model, images(), "mean")
    assert not embedding.requires_grad
    assert state() == before
    assert all(torch.equal(value, before_weights[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(embed(model, images(), "mean"), embedding)
    assert model.training and torch.equal(embed(model.eval(), images(), "mean"), embedding)


def test_embed_with_another_pooling_than_the_backbone_has(backbone):
    vit = backbone("vit")
    assert not torch.equal(embed(vit, images(), "mean"), embed(vit, images()))
    assert vit.pooling == "cls" and vit.model.config.embedding_pooling == "cls"
    with pytest.raises(ValueError, match="^pooling=pooler"):
        embed(vit, images(), "pooler")


def test_a_pooler_that_was_never_in_a_checkpoint_counts_where_the_network_is_new():
    """From a configuration all weights are equally random: the architecture decides."""
    beit = BeitModel(BeitConfig(**SMALL)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(embed(beit, pixels), beit(pixels).pooler_output)


def test_a_vit_is_read_at_its_class_token_even_with_a_pooler():
    vit, pixels = ViTModel(ViTConfig(**SMALL)).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(embed(vit, pixels), vit(pixels).last_hidden_state[:, 0])
        torch.testing.assert_close(embed(vit, pixels, "pooler"), vit(pixels).pooler_output)


def test_embed_reads_every_kind_of_image(backbone):
    resnet, pictures = backbone("resnet"), images()
    expected = embed(resnet, pictures)
    arrays = [np.asarray(image) for image in pictures]
    tensors = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    for same in (arrays, np.stack(arrays), tensors, list(tensors)):
        assert torch.equal(embed(resnet, same), expected)
    for one in (pictures[0], arrays[0], tensors[0]):
        torch.testing.assert_close(embed(resnet, one), expected[:1])
    grey = pictures[0].convert("L")
    sixteen_bits = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for same in (grey.convert("RGBA"), grey.convert("RGB"), sixteen_bits):
        assert torch.equal(embed(resnet, same), embed(resnet, grey))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = pictures[0].transpose(Image.Transpose.ROTATE_180)
    turned.getexif().update(exif)
    assert torch.equal(embed(resnet, turned), embed(resnet, pictures[0]))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ([], "0 images"),
        (3, "int"),
        (np.zeros((4, 4, 3)), "float64"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\) of torch.float32"),
        (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8"),
    ],
)
def test_embed_rejects_values_other_than_images(wrong, named, backbone):
    with pytest.raises(ValueError, match=rf"^images(\[0\])?: .*{named}"):
        embed(backbone("resnet"), wrong)


def test_embed_reads_paths(backbone, tmp_path):
    resnet, pictures = backbone("resnet"), images()
    paths = [str(tmp_path / "0.png"), tmp_path / "1.png"]
    for picture, path in zip(pictures, paths, strict=False):
        picture.save(path)
    assert torch.equal(embed(resnet, paths), embed(resnet, pictures[:2]))
    assert torch.equal(embed(resnet, paths[0]), embed(resnet, pictures[0]))
    with pytest.raises(ValueError, match=r"^images\[1\]: image .*nothing\.png cannot be decoded"):
        embed(resnet, [paths[0], tmp_path / "nothing.png"])


def test_embed_needs_a_processor_for_images_only():
    model = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)
    with pytest.raises(ValueError, match="ViTModel: no image processor"):
        embed(model, images())
    assert embed(model, torch.zeros(2, 3, 32, 32)).shape == embed(model, images(2), processor=half()).shape == (2, 32)


def test_embed_rejects_values_other_than_networks():
    with pytest.raises(ValueError, match="^model: Linear; give a Backbone"):
        embed(torch.nn.Linear(2, 2), images())


def test_a_network_that_hides_patches_at_random(tmp_path):
    config = ViTMAEConfig(**SMALL, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=1)
    model, pixels = ViTMAEModel(config), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="mask_ratio = 0"):
        embed(model, pixels)
    model.save_pretrained(tmp_path)
    config.mask_ratio = 0.0
    torch.testing.assert_close(embed(tmp_path, pixels), embed(model, pixels))
    torch.testing.assert_close(embed(model, pixels), embed(model, pixels))


def test_a_network_that_meta_device_does_not_support():
    class Stubborn(ViTModel):
        def __init__(self, config):
            super().__init__(config, add_pooling_layer=False)
            self.scale = float(torch.ones(1)[0])  # fails on the meta device

    model = Stubborn(ViTConfig(**SMALL)).train()
    frozen = next(model.parameters()).requires_grad_(False)
    loaded = Backbone(model, half())
    assert (loaded.pooling, loaded.dim) == ("cls", 32)
    assert model.training and not frozen.requires_grad and all(p.grad is None for p in model.parameters())


# ---- fingerprint, embed_dataset ----


def test_the_fingerprint_covers_what_an_embedding_depends_on(checkpoint):
    folder = checkpoint("vit")
    original = load_backbone(folder).fingerprint()
    assert load_backbone(folder).fingerprint() == original
    others = [
        load_backbone(folder, pooling="mean"),
        load_backbone(folder, dtype="bfloat16"),
        load_backbone(folder, size=48, interpolate_pos_encoding=True),
        Backbone(AutoModel.from_pretrained(folder), half(32)),
        Backbone(
            AutoModel.from_pretrained(folder), type(half())(size={"height": 32, "width": 32}, image_std=[0.3] * 3)
        ),
        load_backbone(folder),
        Backbone(AutoModel.from_pretrained(folder, num_attention_heads=4), half(32)),
    ]
    with torch.no_grad():
        next(others[5].model.parameters()).view(-1)[0] += 1e-3
    prints = [other.fingerprint() for other in others]
    assert prints.pop(3) == original  # the same again, in memory
    assert len({original, *prints}) == 1 + len(prints)


def test_the_fingerprint_outlives_saving(checkpoint, tmp_path):
    for name in ("vit", "timm_resnet"):
        loaded = load_backbone(checkpoint(name))
        loaded.model.save_pretrained(tmp_path / name)
        loaded.processor.save_pretrained(tmp_path / name)
        assert load_backbone(str(tmp_path / name)).fingerprint() == loaded.fingerprint()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embed_dataset(dtype, checkpoint, capfd, monkeypatch):
    monkeypatch.setattr("coss_hf.models.embedding.BAR_DELAY", 0)
    monkeypatch.setattr("coss_hf.models.embedding.tqdm", partial(tqdm, disable=False))  # tests show no bars
    loaded = load_backbone(checkpoint("resnet"), dtype=dtype)
    loaded.model.train()
    pixels = torch.cat([loaded.preprocess(images()), torch.randn(4, 3, 32, 32)])
    statistics = weights(loaded.model)
    rows = embed_dataset(loaded, [*pixels], batch_size=3, description="Teacher")
    assert rows.shape == (7, 16) and rows.dtype == torch.float32 and not rows.requires_grad
    assert loaded.model.training
    assert all(torch.equal(value, statistics[name]) for name, value in loaded.model.state_dict().items())
    one_by_one = torch.cat([embed(loaded, image[None]) for image in pixels]).float()
    torch.testing.assert_close(rows, one_by_one, rtol=1e-5, atol=1e-5 if dtype == "float32" else 1e-2)
    assert "Teacher" in capfd.readouterr().err


class Named(list):
    """Processed images with names."""

    def names(self, indices):
        return [f"photo{index}.jpg" for index in indices]


def test_images_without_finite_embeddings_are_named(checkpoint, tmp_path):
    """NaN from a teacher for one image made every figure of the panel NaN, and its neighbours rows without a name."""
    loaded = load_backbone(checkpoint("resnet"))
    pixels = torch.randn(7, 3, 32, 32)
    pixels[[2, 5]] = float("nan")
    with pytest.raises(NonFiniteEmbedding, match=r"^Teacher: .* for 1 of 3 images: photo2.jpg\. Use float32"):
        embed_dataset(loaded, Named(pixels), batch_size=3, description="Teacher")
    with pytest.raises(ValueError, match="for 2 of 7 images: row 2, row 5"):
        embed_dataset(loaded, [*pixels], batch_size=7)
    with pytest.raises(ValueError, match="^Embedding for neighbours: .*photo2.jpg, photo5.jpg"):
        embed_shards(loaded, Named(pixels), tmp_path, batch_size=7)


def test_embed_names_images_that_cannot_be_decoded(backbone, tmp_path):
    """Those that `datasets` or Pillow decode when they are handed over ended in an OSError without a position."""
    pictures = images()
    data = [encoded(picture) for picture in pictures]
    data[1] = data[1][: len(data[1]) // 2]
    opened = [Image.open(BytesIO(one)) for one in data]
    column = datasets.Dataset.from_dict({"image": [{"bytes": one, "path": None} for one in data]})
    column = column.cast_column("image", datasets.Image())["image"]
    for given in (opened, iter(opened), column):
        with pytest.raises(ValueError, match=r"^images\[1\]: cannot be decoded \(\w+: "):
            embed(backbone("resnet"), given)


def encoded(picture: Image.Image, **options) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_embed_turns_images_of_paths_once(backbone, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "turned.png").write_bytes(encoded(images()[0].transpose(Image.Transpose.ROTATE_180), exif=exif))
    assert torch.equal(embed(backbone("resnet"), tmp_path / "turned.png"), embed(backbone("resnet"), images()[0]))


def test_embed_checks_the_batch_size(backbone):
    with pytest.raises(ValueError, match="^batch_size=0: give 1 or more"):
        embed(backbone("resnet"), images(), batch_size=0)


def test_a_backbone_without_processor_names_the_remedy():
    """It takes pixel values alone."""
    bare = Backbone(ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), None, size=32)
    assert embed(bare, torch.zeros(2, 3, 32, 32)).shape == embed(bare, images(2), processor=half()).shape == (2, 32)
    assert bare.size == (32, 32)
    with pytest.raises(ValueError, match="^size=None: ViTModel has no image processor that says the size"):
        Backbone(bare.model, None)
    views = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for use in (lambda: embed(bare, images()), lambda: bare.normalize(views), bare.fingerprint):
        with pytest.raises(ValueError, match=r"^processor=None: ViTModel .* build it as Backbone\(model, processor\)"):
            use()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"hf_quantizer": object()}, "is quantised"),
        ({"hf_device_map": {"a": 0, "b": "cpu"}}, "is spread by device_map over 0, cpu"),
        ({"hf_device_map": {"": "disk"}}, "is spread by device_map over disk"),
        ({"hf_device_map": {"a": 0, "b": 1}}, "is spread by device_map over 0, 1"),
        ({"hf_device_map": {"": "cpu"}}, None),
    ],
)
def test_a_network_that_is_not_in_one_place_is_refused(attributes, kind, wrapped):
    """Each ended in an error of torch, of a data type or of the device meta."""
    model = ViTModel(ViTConfig(**SMALL))
    for name, value in attributes.items():
        setattr(model, name, value)
    network = ModuleNetwork(nn.Sequential(model), lambda output: output.pooler_output) if wrapped else model
    if kind is None:
        assert Backbone(network, None, size=32, argument="teacher").dim == 32
        return
    with pytest.raises(ValueError, match=f"^--teacher=.* {kind}, .*bfloat16 if memory is short .--teacher_dtype bf"):
        Backbone(network, None, size=32, argument="teacher")


def test_a_quantised_checkpoint_is_refused_with_a_remedy_that_helps():
    """The data type that was named instead led to the same error."""
    model = ViTModel(ViTConfig(**SMALL))
    model.hf_quantizer = SimpleNamespace(pre_quantized=True)
    with pytest.raises(ValueError, match="^--teacher=.* quantised weights, .* that it was quantised from.$") as error:
        Backbone(model, None, size=32, argument="teacher")
    assert "dtype" not in str(error.value)
