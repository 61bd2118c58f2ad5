"""Photographs larger than a view needs are decoded at a reduced scale: the same crops, from enough pixels."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from coss_hf.data.decoding import decode, decode_reduced
from coss_hf.data.transforms import AUGMENTATIONS, RandomCrop
from coss_hf.data.views import ViewDataset

SIZE = 32
SIZES = [(640, 480), (481, 643), (70, 66), (40, 300), (33, 32), (20, 30)]


def smooth(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int = 0) -> dict:
    buffer = BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    options = {"quality": 95, "exif": exif} if kind == "JPEG" else {}
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("value", ["6", b"\x06", 9, (6, 6)])
def test_an_orientation_of_another_type_turns_nothing(monkeypatch, value):
    """Of a text a run ended at the first reduced view, though the image had passed the check."""
    record = encoded(smooth(0, 400, 300))
    expected = decode_reduced(record, lambda size: 4)
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {0x0112: value})
    found = decode_reduced(record, lambda size: 4)
    assert (found.size, found.scale) == (expected.size, expected.scale) == ((400, 300), 4)
    assert np.array_equal(found.image, expected.image) and decode(record).size == (400, 300)


def rows(records: list[dict]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(decode=False), "image_hash": datasets.Value("uint64")})
    return datasets.Dataset.from_dict({"image": records, "image_hash": range(len(records))}, features=features)


def views(records, name, **options) -> torch.Tensor:
    dataset = ViewDataset(rows(records), "image", name, SIZE, seed=1, **options)
    return torch.stack([item["pixel_values"][0] for item in dataset.__getitems__(list(range(len(records))))])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_without_reduction_every_view_is_that_of_earlier_versions(name, kind):
    """Whole images through torchvision's own crop; the crop of a photograph becomes a tensor, not all of it."""
    records = [encoded(smooth(i, *size), kind) for i, size in enumerate(SIZES)]
    dataset = ViewDataset(rows(records), "image", name, SIZE, seed=1, reduced_decoding=False)
    flip = v2.RandomHorizontalFlip()
    former = dict(zip(AUGMENTATIONS, [None] * 4, strict=True))
    former["imagenet"] = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(SIZE), flip])
    former["moco"] = v2.Compose([v2.RandomResizedCrop(SIZE, (0.2, 1.0)), *dataset.augment.transforms[1:]])
    for row, record in enumerate(records):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(dataset._key(0, row, 0))
            expected = (former[name] or dataset.augment)(decode(record))
        assert torch.equal(dataset.view(row, 0)[0], expected)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_reduced_views_are_the_same_crops(name):
    """Of the same place, colours and mirroring; only what lies between pixels differs."""
    records = [encoded(smooth(i, *size)) for i, size in enumerate(SIZES * 3)]
    whole, reduced = views(records, name, reduced_decoding=False), views(records, name)
    difference = (whole.float() - reduced.float()).abs()
    # 0.3 to 0.8 here; a crop that is off by a pixel of the view is 3 and more.
    assert difference.mean() < 1.5, difference.mean((1, 2, 3))
    assert torch.equal(whole[5::6], reduced[5::6]), "smaller than a view: nothing to reduce"


def test_pngs_are_as_ever():
    records = [encoded(smooth(i, *size), "PNG") for i, size in enumerate(SIZES)]
    for name in AUGMENTATIONS:
        assert torch.equal(views(records, name, reduced_decoding=False), views(records, name))


@pytest.mark.parametrize("orientation", range(9))
def test_crops_are_drawn_in_the_upright_image(orientation):
    record = encoded(smooth(3, 640, 300), orientation=orientation)
    seen = []
    found = decode_reduced(record, lambda size: seen.append(size) or 3.9)
    whole = decode(record)
    assert seen == [whole.size] and found.size == whole.size
    assert found.scale == 2 and found.image.size == (whole.size[0] // 2, whole.size[1] // 2)
    shrunk = np.asarray(whole.resize(found.image.size, Image.Resampling.BOX), float)
    assert np.abs(shrunk - np.asarray(found.image, float)).mean() < 1


@pytest.mark.parametrize("size", [(640, 480), (641, 479), (9, 17), (16, 16), (1, 800), (33, 7)])
@pytest.mark.parametrize("allowed", [0.3, 1, 1.99, 2, 3, 4.5, 7.9, 8, 100])
def test_never_smaller_than_allowed(size, allowed):
    """A crop of `allowed` times the view's side keeps as many pixels as the view has."""
    found = decode_reduced(encoded(smooth(0, *size)), lambda given: min(allowed, min(given)))
    assert found.scale <= max(1, allowed) and found.size == size
    assert found.image.size == tuple(-(-side // found.scale) for side in size)


def test_a_crop_has_the_pixels_of_the_view():
    records = [encoded(smooth(i, 700 + 30 * i, 900 - 40 * i)) for i in range(12)]
    scales = set()
    real = RandomCrop.of_file

    def of_file(self, read, seed):
        def reading(reduction):
            found = read(reduction)
            seed()
            _, _, height, width = self.draw(found.size)
            assert min(height, width) / found.scale >= SIZE or found.scale == 1
            scales.add(found.scale)
            return found

        return real(self, reading, seed)

    try:
        RandomCrop.of_file = of_file
        views(records, "imagenet")
    finally:
        RandomCrop.of_file = real
    assert scales >= {4, 8}


def test_images_kept_in_memory_are_those_that_are_read_each_time():
    records = [encoded(smooth(i, *size)) for i, size in enumerate(SIZES)]
    kept = ViewDataset(rows(records), "image", "cifar", SIZE, seed=1)
    assert kept.keep_images()
    assert torch.equal(torch.stack([kept.view(i, 0)[0] for i in range(len(records))]), views(records, "cifar"))


def test_an_image_that_takes_the_place_of_a_damaged_one_gets_the_crop_of_its_own_size():
    """The crop of the damaged one was drawn before: a view must not depend on how far its file could be read."""
    good = encoded(smooth(1, 640, 480))
    cut = {"bytes": encoded(smooth(0, 900, 300))["bytes"][:3000], "path": None}
    empty = {"bytes": b"", "path": None}
    found = []
    for bad in (cut, empty):
        dataset = ViewDataset(rows([bad, good]), "image", "imagenet", SIZE, seed=1, on_bad_image="skip")
        found.append(dataset.view(0, 0)[0])
    assert torch.equal(*found)


def test_user_transform_gets_full_images():
    sizes = []

    def transform(image):
        sizes.append(image.size)
        return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)

    views([encoded(smooth(0, 640, 480))], transform)
    assert sizes[-1] == (640, 480)
