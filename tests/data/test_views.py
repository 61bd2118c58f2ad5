import multiprocessing
import pickle
import random
from hashlib import blake2b
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coss_hf.data.checking import content_hashes
from coss_hf.data.decoding import crop_long_side
from coss_hf.data.loading import load_images
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.data.transforms import AUGMENTATIONS, Fit, SeparableBlur, augmentation
from coss_hf.data.views import ViewDataset, collate_views

N, SIZE = 12, 32
NEIGHBORS = np.array([[(i + j) % N for j in range(1, 7)] for i in range(N)], np.int32)


def photo(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rows():
    records = [{"bytes": png(photo(i)), "path": None} for i in range(N)]
    features = datasets.Features({"image": datasets.Image(decode=False), "image_hash": datasets.Value("uint64")})
    return datasets.Dataset.from_dict({"image": records, "image_hash": range(N)}, features=features)


def views(rows, name="imagenet", seed=3, k=2, neighbors=NEIGHBORS, size=SIZE):
    return ViewDataset(rows, "image", name, size, seed=seed, neighbors=neighbors, k=k)


def load(dataset, **options) -> dict[str, torch.Tensor]:
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collate_views, **options))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_have_the_given_size(name):
    for image in (photo(0), photo(0, 32, 32), photo(0, 20, 90)):
        view = augmentation(name, SIZE)(image)
        assert view.shape == (3, SIZE, SIZE) and view.dtype == torch.uint8


def test_none_leaves_an_image_of_the_size_alone():
    image = photo(0, 32, 32)
    assert torch.equal(augmentation("none", 32)(image), F.pil_to_tensor(image))
    wide = photo(0, 64, 32)
    assert torch.equal(augmentation("none", 32)(wide), F.pil_to_tensor(wide.crop((16, 0, 48, 32))))


@pytest.mark.parametrize("shape", [(4000, 2), (3, 5001)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_long_image_is_cropped_before_it_is_enlarged(name, shape, monkeypatch):
    """A PNG of 103 bytes, 4000 x 2 pixels, took 400 to 720 MB."""
    sides = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **kw: sides.extend(size) or resize(self, size, *a, **kw)
    )
    image = photo(0, *shape)
    sides.clear()
    assert augmentation(name, 224)(image).shape == (3, 224, 224)
    assert max(sides, default=0) <= 17 * 224
    assert crop_long_side(photo(0, 640, 40)).size == (640, 40)


def test_a_long_image_keeps_its_centre():
    pixels = np.zeros((4, 1000, 3), np.uint8)
    pixels[:, 500:] = 255
    view = augmentation("none", 32)(Image.fromarray(pixels))
    assert view[:, :, :12].max() == 0 and view[:, :, 20:].min() == 255


def test_cifar_is_a_padded_crop_perhaps_mirrored():
    image = photo(0, 32, 32)
    padded = torch.nn.functional.pad(F.pil_to_tensor(image), [4] * 4)
    crops = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
    augment, seen = augmentation("cifar", 32), set()
    for _ in range(100):
        view = augment(image)
        seen |= {
            (*at, flip) for at, c in crops.items() for flip in (0, 1) if torch.equal(view, c.flip(2) if flip else c)
        }
    assert len(seen) > 50 and {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
    assert {flip for *_, flip in seen} == {0, 1}


def test_moco_changes_colours_blurs_and_drops_colour():
    augment, image = augmentation("moco", 32), photo(0)
    drawn = torch.stack([augment(image) for _ in range(150)]).float()
    grey = (drawn - drawn.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1
    assert 0.08 < grey.float().mean() < 0.35  # p = 0.2
    assert len({tuple(view.mean((1, 2)).round().tolist()) for view in drawn}) > 100


def test_separable_blur_equals_torchvisions():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    separable, params = SeparableBlur(9, (0.1, 2.0)), {"sigma": [1.7, 1.7]}
    difference = separable.transform(image, params).int() - F.gaussian_blur(image, [9, 9], [1.7, 1.7]).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("size", [32, 7])
def test_cifar_draws_as_torchvision_does(size):
    theirs = v2.Compose([Fit(size), v2.RandomCrop(size, size // 8), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    ours = augmentation("cifar", size)
    for seed in range(200):
        drawn = []
        for augment in (theirs, ours):
            torch.manual_seed(seed)
            drawn.append(augment(photo(seed)))
        assert torch.equal(*drawn), seed


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_kept_images_give_the_same_views(rows, name):
    plain, keeping = views(rows, name), views(rows, name)
    assert keeping.keep_images() == (name in ("none", "cifar"))
    for epoch in (0, 1):
        plain.set_epoch(epoch), keeping.set_epoch(epoch)
        for workers in (0, 2):
            expected, found = load(plain), load(keeping, num_workers=workers)
            assert torch.equal(expected["pixel_values"], found["pixel_values"])
            assert torch.equal(expected["index"], found["index"])
    assert torch.equal(plain.view(3, 1)[0], keeping.view(3, 1)[0])


def test_too_many_images_are_not_kept(rows, monkeypatch):
    monkeypatch.setattr("coss_hf.data.views.KEPT_BYTES", N * 3 * SIZE**2 - 1)
    assert not views(rows, "cifar").keep_images()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_do_not_depend_on_workers_threads_or_the_generators(rows, name):
    plain = load(views(rows, name))
    assert plain["pixel_values"].shape == (3 * N, 3, SIZE, SIZE) and plain["index"].shape == (3 * N,)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    torch.set_num_threads(2)
    again = load(views(rows, name))
    forked = load(views(rows, name), num_workers=2)
    for other in (again, forked):
        assert torch.equal(plain["pixel_values"], other["pixel_values"])
        assert torch.equal(plain["index"], other["index"])


def test_moco_at_a_size_that_threads_share_does_not_depend_on_them(rows):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(views(rows, "moco", size=224, k=0)[1]["pixel_values"])
    assert torch.equal(*found)


def test_a_pickled_copy_gives_the_same(rows):
    copy = pickle.loads(pickle.dumps(views(rows)))
    assert torch.equal(copy[3]["pixel_values"], views(rows)[3]["pixel_values"])


@pytest.mark.slow  # a new process imports torch
def test_spawned_workers_give_the_same_and_see_the_epoch(rows):
    dataset = views(rows)
    dataset.set_epoch(1)
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(
        dataset, 4, collate_fn=collate_views, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        spawned = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(load(dataset)["pixel_values"], spawned)


def test_the_callers_generators_are_untouched(rows):
    dataset = views(rows, "moco")
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    dataset[0], dataset.view(0, 1), dataset.__getitems__([1, 2])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())


def test_views_differ_by_seed_epoch_anchor_and_slot(rows):
    same_image = np.zeros((N, 1), np.int32)  # image 0 is everybody's neighbour
    same_image[0] = -1  # and has none: it is seen in views of its own
    dataset = views(rows, k=1, neighbors=same_image)
    base = dataset.view(1, 1)[0]
    others = [
        views(rows, k=1, neighbors=same_image, seed=4).view(1, 1)[0],
        dataset.view(1, 1, epoch=1)[0],
        dataset.view(2, 1)[0],
        dataset.view(0, 0)[0],
        dataset.view(0, 1)[0],
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate([base, *others]) for b in others[i:])


def test_views_of_neighbouring_keys_are_independent(rows):
    """Crop offsets of consecutive anchors are uncorrelated and spread evenly."""
    dataset = views(rows, "cifar", k=0)
    draws = []
    for anchor in range(2000):
        torch.default_generator.manual_seed(dataset._key(0, anchor, 0))
        draws.append(torch.randint(0, 9, (2,)).tolist())
    y, x = np.array(draws).T
    assert np.abs(np.corrcoef([y[1:], y[:-1], x[1:], x[:-1]]) - np.eye(4)).max() < 0.1
    assert np.bincount(y).min() > 160


def test_persistent_workers_see_the_epoch(rows):
    dataset = views(rows)
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate_views, num_workers=1, persistent_workers=True)
    by_epoch = []
    for epoch in (0, 5, 0):
        dataset.set_epoch(epoch)
        by_epoch.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert dataset.epoch == 0
    assert torch.equal(by_epoch[0], by_epoch[2]) and not torch.equal(by_epoch[0], by_epoch[1])
    dataset.set_epoch(5)
    assert torch.equal(load(dataset)["pixel_values"], by_epoch[1])


def test_view_computes_an_item_again(rows):
    dataset = views(rows, "moco")
    dataset.set_epoch(2)
    item = dataset[7]
    for slot in range(3):
        view, index = dataset.view(7, slot)
        assert torch.equal(view, item["pixel_values"][slot]) and index == item["index"][slot]
    assert item["index"].dtype == torch.int64 and item["index"][0] == 7
    dataset.set_epoch(9)
    assert torch.equal(dataset.view(7, 0, epoch=2)[0], item["pixel_values"][0])


def test_index_names_the_image_of_each_view(rows):
    dataset = views(rows, "none", size=16, k=3)
    batch = load(dataset)
    images = [augmentation("none", 16)(photo(i)) for i in range(N)]
    for pixels, index in zip(batch["pixel_values"], batch["index"].tolist(), strict=True):
        assert torch.equal(pixels, images[index])


def test_neighbours_are_drawn_evenly_without_replacement_or_padding(rows):
    neighbors = NEIGHBORS.copy()
    neighbors[5, 3:] = -1  # three are left
    neighbors[6, 1:] = -1  # one is left: fewer than k
    neighbors[7] = -1  # none is left
    dataset = views(rows, neighbors=neighbors, k=3)
    assert dataset.short == (2, 1) and views(rows, neighbors=neighbors, k=4).short == (3, 1)
    assert views(rows, neighbors=None, k=0).short == (0, 0)
    groups = {a: [dataset._group(a, epoch)[1:] for epoch in range(400)] for a in (4, 5, 6)}
    assert all(len(set(group)) == 3 for group in groups[4] + groups[5])
    counts = np.bincount(np.concatenate(groups[4]), minlength=N)
    assert set(np.flatnonzero(counts)) == set(NEIGHBORS[4].tolist()) and counts[NEIGHBORS[4]].min() > 150
    assert {n for group in groups[5] for n in group} == set(NEIGHBORS[5, :3].tolist())
    assert {n for group in groups[6] for n in group} == {int(NEIGHBORS[6, 0])}
    assert dataset._group(4, 1) == dataset._group(4, 1)
    assert dataset[7]["index"].tolist() == [7] * 4  # views of its own, each another
    assert len({view.numpy().tobytes() for view in dataset[7]["pixel_values"]}) == 4


def test_a_formatted_dataset_of_decoded_images_gives_the_same(rows):
    decoded = rows.cast_column("image", datasets.Image()).add_column("label", [0] * N).with_format("torch")
    assert torch.equal(views(decoded)[2]["pixel_values"], views(rows)[2]["pixel_values"])
    with pytest.raises(IndexError):
        views(rows)[N]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "simclr"}, "--augmentation simclr: choose one of none, cifar"),
        ({"size": 0}, "--view_size 0"),
        ({"k": -1}, "--neighbors_k -1"),
        ({"k": 7}, "--neighbors_k 7 is more than the 6"),
        ({"neighbors": None}, "--neighbors_k 2 needs"),
        ({"neighbors": NEIGHBORS[:5]}, r"--neighbors_k 2 needs .* not \(5, 6\)"),
        ({"neighbors": NEIGHBORS + 1}, "outside rows 0..11"),
        (
            {"neighbors": np.repeat(np.arange(12)[:, None], 3, 1)},
            "12 of 12 images are among their own neighbours, .*row 0",
        ),
    ],
)
def test_bad_arguments_are_named(rows, change, message):
    with pytest.raises(ValueError, match=message):
        views(rows, **change)


def test_processed_images_are_preprocessed_a_batch_at_a_time(rows):
    sizes = []

    def preprocess(images):
        sizes.append(len(images))
        return torch.stack([F.pil_to_tensor(image).float() / 255 for image in images])

    dataset = ProcessedImages(rows, "image", preprocess)
    batches = list(DataLoader(dataset, batch_size=5))
    assert sizes == [5, 5, 2] and len(dataset) == N
    expected = torch.stack([F.pil_to_tensor(photo(i)).float() / 255 for i in range(N)])
    assert torch.equal(torch.cat(batches), expected) and torch.equal(dataset[3], expected[3])


@pytest.mark.parametrize("name", ["cifar", "moco"])
def test_views_come_back_after_view_epochs(rows, name):
    """The epoch of a view's key, the draw of neighbours included, counts modulo P; 0 is never."""
    repeated = ViewDataset(rows, "image", name, SIZE, seed=3, neighbors=NEIGHBORS, k=2, view_epochs=2)
    endless = views(rows, name)

    def epoch(dataset, number):
        dataset.set_epoch(number)
        return load(dataset)

    first, second, third, fourth = (epoch(repeated, number) for number in range(4))
    for key in ("pixel_values", "index"):
        assert torch.equal(first[key], third[key]) and torch.equal(second[key], fourth[key])
        assert not torch.equal(first[key], second[key])
        assert torch.equal(first[key], epoch(endless, 0)[key]) and torch.equal(second[key], epoch(endless, 1)[key])
        assert not torch.equal(third[key], epoch(endless, 2)[key])
    assert torch.equal(repeated.view(5, 1, epoch=7)[0], repeated.view(5, 1, epoch=1)[0])


class DrawsFromAll:
    """A transform of the user's own, as Albumentations of old and home-made ones are: of every global generator."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        view = F.pil_to_tensor(image.resize((SIZE, SIZE)))
        view = view if random.random() < 0.5 else view.flip(-1)
        shift = torch.from_numpy(np.random.randint(0, 60, (3, 1, 1)))
        return (view // 2 + shift + torch.randint(0, 60, (3, 1, 1))).to(torch.uint8)


def test_views_of_a_transform_that_draws_from_any_global_generator(rows):
    """Only torch's was seeded: views depended on loader workers, and a resumed run was another one."""
    dataset = views(rows, DrawsFromAll())
    expected = load(dataset)["pixel_values"]
    for workers in (1, 2):
        random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
        assert torch.equal(load(dataset, num_workers=workers)["pixel_values"], expected)
    again = views(rows, DrawsFromAll())
    view, _ = again.view(7, 1)
    assert torch.equal(view, expected[7 * 3 + 1]), "whatever was drawn before it"
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    again[3]
    again.view(3, 0)
    assert random.getstate() == before[0] and str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    again.set_epoch(1)
    assert not torch.equal(again[7]["pixel_values"], dataset[7]["pixel_values"])


class DrawsFromItsOwn:
    """As Albumentations does since 2.0: from a generator of its own, which nobody seeds for each view."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        view = F.pil_to_tensor(image.resize((SIZE, SIZE)))
        return view.roll(int(self.generator.integers(SIZE)), -1)


def test_every_branch_of_a_transform_is_checked(rows):
    """A branch that returned an image ended in a TypeError of torch.equal."""

    def sometimes(image: Image.Image):
        image = image.resize((SIZE, SIZE))
        random.seed(calls.append(1) or len(calls))
        return F.pil_to_tensor(image) if len(calls) % 3 else image

    calls = []
    with pytest.raises(ValueError, match="sometimes returns Image; a view is a uint8 tensor"):
        views(rows, sometimes)


def test_a_transform_with_a_generator_of_its_own_is_named(rows, caplog):
    views(rows, DrawsFromAll())
    assert not caplog.text
    views(rows, DrawsFromItsOwn())
    assert "DrawsFromItsOwn" in caplog.text and "gives another view when it is called again" in caplog.text


class Composed:
    """A transform with another one in an attribute named as those of torchvision's `Compose`."""

    def __init__(self):
        self.transforms = resized()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transforms(image)


def resized() -> v2.Compose:
    return v2.Compose([v2.Lambda(lambda image: F.pil_to_tensor(image.resize((SIZE, SIZE))))])


@pytest.mark.parametrize("transform", [Composed, resized])
def test_images_are_not_kept_for_a_transform_of_ones_own(rows, transform):
    """Its attribute `transforms` need not be a list, nor one of two steps: the training ended there."""
    assert not views(rows, transform()).keep_images()


def test_contents_that_are_known_are_not_read_again(rows, monkeypatch):
    """NumPy's format of `datasets` turned the hashes into int64, so that they never counted as known."""
    loaded = load_images(rows.cast_column("image", datasets.Image())).train
    hashes = content_hashes(loaded, "image")
    monkeypatch.setattr("coss_hf.data.views.content_hashes", None)
    given = views(loaded)
    assert given.know_contents() == blake2b(hashes.tobytes(), digest_size=8).hexdigest()
    load(given)
    assert not any(given.reader.is_other_image(range(N)))
