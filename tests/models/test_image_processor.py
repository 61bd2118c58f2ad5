"""One image processor: in full for evaluation, and its arithmetic alone for training views."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    DPTImageProcessor,
    EfficientNetImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from coss_hf.models.cifar.registry import cifar_image_processor
from coss_hf.models.image_processor import Preprocessing
from coss_hf.utils.messages import flag
from tests.helpers.networks import images

SQUARE = {"height": 32, "width": 32}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TIMM = {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6]}
PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "imagenet": lambda: ViTImageProcessor(size=SQUARE, **IMAGENET),
    "dinov2": lambda: BitImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    "deit": lambda: DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE),
    "beit": lambda: BeitImageProcessor(size=SQUARE),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}),
    "convnext_without_crop": lambda: ConvNextImageProcessor(size={"shortest_edge": 384}),
    "efficientnet": lambda: EfficientNetImageProcessor(size=SQUARE),
    "efficientnet_offset": lambda: EfficientNetImageProcessor(size=SQUARE, rescale_offset=True, include_top=False),
    "mobilenet_v2": lambda: MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "mobilevit": lambda: MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "poolformer": lambda: PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    "siglip": lambda: SiglipImageProcessor(size=SQUARE),
    "timm": lambda: TimmWrapperImageProcessor({**TIMM, "std": [0.2, 0.3, 0.25]}),
    "cifar": lambda: cifar_image_processor(IMAGENET["image_mean"], IMAGENET["image_std"]),
}


def as_views(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in pictures])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", PROCESSORS)
def test_views_equal_the_processor_without_resizing_and_cropping(name):
    processor = PROCESSORS[name]()
    preprocessing = Preprocessing(processor)
    pictures = images(2, size=preprocessing.size)
    views = as_views(pictures)
    assert views.dtype == torch.uint8
    if name == "timm":  # has no such switches: its settings, written out
        mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
        expected = (views / 255 - mean) / std
    else:
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        expected = processor(pictures, **options)["pixel_values"]
    normalized = preprocessing.normalize(views)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_equals_the_full_processor(name):
    processor, pictures = PROCESSORS[name](), images(2, size=(50, 40))
    preprocessing = Preprocessing(processor)
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocessing.full(pictures), expected)
    assert expected.shape == (2, 3, *preprocessing.size)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [24, 48])
def test_another_size(name, size):
    processor = PROCESSORS[name]()
    before = repr(processor.to_dict())
    preprocessing = Preprocessing(processor, size)
    assert preprocessing.size == (size, size)
    assert preprocessing.full(images(2, size=(100, 70))).shape == (2, 3, size, size)
    assert repr(processor.to_dict()) == before, "the caller's processor changed"
    again = Preprocessing(preprocessing.processor)
    assert again.size == (size, size)


def test_another_size_keeps_the_share_that_is_cropped_away():
    for name, edge in (("dinov2", {"shortest_edge": 54}), ("clip", {"shortest_edge": 48})):
        assert dict(Preprocessing(PROCESSORS[name](), 48).processor.size) == edge
    assert dict(Preprocessing(PROCESSORS["deit"](), 48).processor.size) == {"height": 54, "width": 54}
    assert Preprocessing(PROCESSORS["timm"](), 48).processor.data_config["crop_pct"] == 0.875
    assert Preprocessing(PROCESSORS["convnext"](), 48).processor.crop_pct == PROCESSORS["convnext"]().crop_pct


def test_teacher_and_student_statistics_on_one_view():
    teacher, student = (Preprocessing(PROCESSORS[name]()) for name in ("vit", "imagenet"))
    view = as_views(images(2, size=(32, 32)))
    mean, std = (torch.tensor(IMAGENET[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    torch.testing.assert_close(teacher.normalize(view), view / 127.5 - 1, rtol=0, atol=1e-5)
    torch.testing.assert_close(student.normalize(view), (view / 255 - mean) / std, rtol=0, atol=1e-5)


def test_a_view_of_another_size_is_resized():
    preprocessing = Preprocessing(PROCESSORS["vit"]())
    plain = torch.full((2, 3, 48, 48), 51, dtype=torch.uint8)
    torch.testing.assert_close(preprocessing.normalize(plain), torch.full((2, 3, 32, 32), -0.6))
    ramp = torch.arange(0, 256, 4).to(torch.uint8).expand(1, 3, 64, 64)
    means_of_two = ramp.float().reshape(1, 3, 64, 32, 2).mean(-1)[:, :, :32] / 127.5 - 1
    resized = preprocessing.normalize(ramp)
    assert resized.shape == (1, 3, 32, 32)
    torch.testing.assert_close(resized[..., 1:-1], means_of_two[..., 1:-1], rtol=0, atol=1e-4)


def test_blue_green_red():
    preprocessing = Preprocessing(PROCESSORS["mobilevit"]())
    red = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    assert preprocessing.normalize(red)[0, :, 0, 0].tolist() == pytest.approx([0, 0, 1])


@pytest.mark.parametrize(
    "processor, size, reason",
    [
        (lambda: ViTImageProcessor(do_resize=False), None, "200x300 and 300x200 pixels.*set --teacher_size"),
        (lambda: BitImageProcessor(do_center_crop=False), None, "224x336 and 336x224 pixels.*set --teacher_size"),
        (lambda: DPTImageProcessor(keep_aspect_ratio=True), None, "one size is needed.*set --teacher_size"),
        (lambda: DPTImageProcessor(ensure_multiple_of=32), 40, r"one size is needed \(40x40\)"),
        (lambda: Siglip2ImageProcessor(), None, "not RGB images"),
        (lambda: ViTImageProcessor(size={"longest_edge": 32}), None, "fails on an RGB image"),
        (lambda: ViTImageProcessor(size=SQUARE), 0, "^--teacher_size=0"),
        (lambda: TimmWrapperImageProcessor({**TIMM, "mean": [0.4] * 3}), -1, "^--teacher_size=-1"),
    ],
)
def test_refused(processor, size, reason):
    with pytest.raises(ValueError, match=reason) as error:
        Preprocessing(processor(), size, "teacher")
    assert str(error.value).startswith("--teacher")


def test_a_processor_that_does_not_resize_can_be_told_to():
    assert Preprocessing(ViTImageProcessor(do_resize=False), 32).size == (32, 32)


def test_a_processor_that_does_more_is_refused():
    class Gamma(ViTImageProcessor):
        def __call__(self, *args, **kwargs):
            batch = super().__call__(*args, **kwargs)
            batch["pixel_values"] = batch["pixel_values"].sign() * batch["pixel_values"].abs() ** 1.01
            return batch

    with pytest.raises(ValueError, match=r"^model: its image processor \(Gamma\) does more than resize, crop"):
        Preprocessing(Gamma(size=SQUARE))


def test_flags():
    assert [flag("teacher"), flag("teacher", "size"), flag(""), flag("", "size")] == [
        "--teacher",
        "--teacher_size",
        "model",
        "size",
    ]


def test_a_long_image_is_cropped_before_it_is_enlarged():
    """4000 x 2 pixels, 103 bytes as a PNG, became 512,000 x 256 and took up to 900 MB."""
    seen = []

    class Recording(CLIPImageProcessor):
        def resize(self, image, *args, **kwargs):
            seen.append(tuple(super().resize(image, *args, **kwargs).shape[-2:]))
            return super().resize(image, *args, **kwargs)

    processor = Recording(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    full = Preprocessing(processor).full
    seen.clear()
    assert full([Image.new("RGB", (4000, 2))]).shape == (1, 3, 224, 224)
    assert seen == [(256, 4096)]
