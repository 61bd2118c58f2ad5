"""The loss and gradient of several processes equal those of one that sees the full batch."""

import inspect
import json

import pytest
import torch
from safetensors import safe_open

from coss_hf.features import Features
from coss_hf.losses.combination import Method
from coss_hf.losses.registry import LOSSES, build_loss
from coss_hf.utils.distributed import all_reduce_sum
from tests.helpers.data_parallel import alone, together

# What couples images, computed from those of all processes: exact for uneven shards, too.
GLOBAL = tuple(name for name, loss in LOSSES.items() if loss.couples_images)
# What is remembered is that of all processes; the loss is a mean over a process's images.
MEMORIES = tuple(name for name, loss in LOSSES.items() if loss.keeps_state)
IMAGES, DIM = 8, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method_job(name: str, sizes: list[int]) -> dict:
    """A batch of 8 of 10 images; student and teacher embeddings of one dimension and two maps of each."""
    torch.manual_seed(0)
    maps = (draw(IMAGES, 5, 4, 4, seed=1), draw(IMAGES, 3, 2, 2, seed=2))
    uses_maps = LOSSES[name].uses_maps
    student = Features(draw(2, DIM), (draw(2, DIM, 2, 2),) * 2 if uses_maps else ())
    teacher = Features(draw(2, DIM), tuple(one[:2] for one in maps) if uses_maps else ())
    both = {"student": student, "teacher": teacher}
    given = {"num_images": 10, "batch_size": IMAGES, "classifier": torch.nn.Linear(DIM, 3)}
    built = build_loss([Method(name, {})], student, teacher, **given).double()
    shapes = {"student_dim": DIM, "teacher_dim": teacher.maps[-1].shape[1] if uses_maps else DIM} | given
    if uses_maps:
        shapes |= {"student_size": 2, "teacher_size": 2, "classifier": None}
        shapes |= {f"{side}_dims": tuple(one.shape[1] for one in f.maps) for side, f in both.items()}
    options = {key: value for key, value in shapes.items() if key in inspect.signature(LOSSES[name]).parameters}
    return {
        "name": name,
        "sizes": sizes,
        "student": (draw(DIM, 6), name, options, built.state_dict()),
        "x": draw(IMAGES, 6, seed=3),
        "t": draw(IMAGES, DIM, seed=4),
        "maps": maps if uses_maps else (),
        "index": torch.tensor([9, 0, 3, 9, 8, 3, 4, 7]),  # images that are twice in a batch
    }


def plain_job(name: str, sizes: list[int], x, t, weight, **options) -> dict:
    student = (weight, name, options, {})
    return {"name": name, "sizes": sizes, "student": student, "x": x, "t": t, "maps": (), "index": torch.arange(len(x))}


@pytest.fixture(scope="module")
def jobs(request) -> dict[str, dict]:
    found = {f"{name} equal": method_job(name, [4, 4]) for name in LOSSES}
    found |= {f"{name} uneven": method_job(name, [5, 3]) for name in (*GLOBAL, *MEMORIES)}
    for sizes in ([6, 6], [3, 5, 1, 3]):
        found[f"coss {sizes}"] = plain_job(
            "coss", sizes, draw(12, 7), draw(12, 5, seed=1), draw(5, 7, seed=2), beta=1.0
        )
    for sizes in ([4, 4], [3, 5], [2, 1, 4, 1]):
        found[f"gathered {sizes}"] = plain_job("gathered", sizes, draw(8, 3), draw(8, 2), draw(2, 3, seed=1))
    shared = request.path.parents[3] / "shared" / "fixtures" / "coss-a.safetensors"
    if not shared.is_file():
        return found
    with safe_open(shared, "pt") as f:
        cases = json.loads(f.metadata()["cases"])
        for key in sorted(key for key in f.keys() if key.endswith(".global_loss")):
            case, _, split, _ = key.split(".")
            s, t = f.get_tensor(f"{case}.in.A_s"), f.get_tensor(f"{case}.in.A_t")
            sizes = f.get_tensor(key.replace("global_loss", "sizes")).tolist()
            options = {"beta": cases[case]["beta"], "lambda_ss": cases[case]["splits_lambda"]}
            identity = torch.eye(s.shape[1], dtype=torch.float64)
            found[f"{case} {split}"] = plain_job("coss", sizes, s, t, identity, **options)
            found[f"{case} {split}"]["expected"] = f.get_tensor(key).reshape(())
    return found


@pytest.fixture(scope="module")
def results(jobs, tmp_path_factory) -> dict[str, tuple[dict, list[dict]]]:
    """By job: one process, and each of several."""
    folder, found = tmp_path_factory.mktemp("processes"), {}
    for world in (2, 4):
        names = [name for name, job in jobs.items() if len(job["sizes"]) == world]
        for name, several in zip(names, together(folder, world, [jobs[name] for name in names])):
            found[name] = alone(jobs[name]), several
    return found


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    assert got.keys() == expected.keys(), name
    scale = max((value.abs().max().item() for value in expected.values()), default=0)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-10 * scale, msg=f"{name} {key}")


def test_value_and_gradient_of_every_method_and_split_are_those_of_the_full_batch(jobs, results):
    for name, (single, several) in results.items():
        method = jobs[name]["name"]
        if method in MEMORIES and name.endswith("uneven"):
            continue
        losses = torch.stack([one["losses"] for one in several])
        if method in (*GLOBAL, "gathered"):
            expected = single["losses"].expand_as(losses)
            torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12, msg=name)
        torch.testing.assert_close(losses.mean(0), single["losses"], rtol=1e-10, atol=1e-12, msg=name)
        for one in several:
            assert_close(one["gradients"], single["gradients"], name)
            assert_close(one["state"], single["state"], name)


def test_the_fixtures_splits_have_their_global_loss(jobs, results, shared):
    splits = {name: job["expected"] for name, job in jobs.items() if "expected" in job}
    assert len(splits) == 5
    for name, expected in splits.items():
        for one in results[name][1]:
            torch.testing.assert_close(one["losses"][0], expected, rtol=1e-10, atol=0)


def test_memories_are_equal_on_all_processes(results):
    for name, (_, several) in results.items():
        for one in several:
            assert one["state"].keys() == several[0]["state"].keys()
            assert all(torch.equal(value, several[0]["state"][key]) for key, value in one["state"].items()), name


def test_one_process_needs_no_group():
    x = torch.randn(3, requires_grad=True)
    assert all_reduce_sum(x) is x
