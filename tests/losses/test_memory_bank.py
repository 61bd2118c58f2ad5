"""The memories of CRD and SEED, against loops, and over processes."""

from pathlib import Path

import pytest
import torch

from coss_hf.losses.memory_bank import (
    enqueue,
    products,
    random_queue,
    uniform_rows,
    update_rows,
    weighted_sums,
)
from tests.helpers.processes import spawn


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["all rows", "rows drawn"])
def way(request, monkeypatch):
    """Both ways to compute products: with all rows of the memory, and with those drawn."""
    monkeypatch.setattr("coss_hf.losses.memory_bank._is_small", lambda *args: request.param == "all rows")


# More images than are read at a time; a row that is drawn twice for one image.
CANDIDATES = torch.randint(20, (19, 5), generator=torch.Generator().manual_seed(1))
CANDIDATES[3, 1] = CANDIDATES[3, 4]


@pytest.mark.usefixtures("way")
def test_products_equal_a_loop():
    v, memory = draw(19, 4), draw(20, 4, seed=2)
    got = products(v, memory, CANDIDATES)
    expected = torch.stack([memory[rows] @ x for x, rows in zip(v, CANDIDATES)])
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("way")
def test_weighted_sums_equal_a_loop():
    weights, memory = draw(19, 5), draw(20, 4, seed=2)
    got = weighted_sums(weights, memory, CANDIDATES)
    expected = torch.stack([x @ memory[rows] for x, rows in zip(weights, CANDIDATES)])
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("way")
def test_reads_are_without_gradient_and_in_the_type_of_what_is_given():
    v, memory = draw(19, 4).float().requires_grad_(), draw(20, 4, seed=2)
    got = products(v, memory, CANDIDATES)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert weighted_sums(got, memory, CANDIDATES).dtype == torch.float32


def test_the_start_of_a_memory():
    torch.manual_seed(0)
    rows = uniform_rows(1000, 12)
    assert rows.shape == (1000, 12) and rows.abs().max() <= 0.5
    assert rows.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)
    queue = random_queue(3, 7)
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(7))


def test_update_of_rows_equals_a_loop():
    """Row 2 comes twice: its last vector counts, and what it was before the batch."""
    memories = [draw(6, 3, seed=1), draw(6, 3, seed=2)]
    vectors = [draw(3, 3, seed=3), draw(3, 3, seed=4)]
    index = torch.tensor([2, 5, 2])
    before = [memory.clone() for memory in memories]
    update_rows(list(zip(memories, vectors)), index, momentum=0.25)
    for memory, old, v in zip(memories, before, vectors):
        expected = old.clone()
        for row, position in ((2, 2), (5, 1)):
            moved = 0.25 * old[row] + 0.75 * v[position]
            expected[row] = moved / moved.norm()
        torch.testing.assert_close(memory, expected)


def test_the_last_of_many_vectors_of_one_row_counts():
    index = torch.tensor([4, 1, 4, 4, 1, 0, 4, 1])
    memory, vectors = torch.zeros(5, 8), torch.eye(8)
    update_rows([(memory, vectors)], index, momentum=0.5)
    assert torch.equal(memory[[4, 1, 0]], vectors[[6, 7, 5]])
    assert not memory[[2, 3]].any()


def test_a_queue_wraps_around():
    queue, pointer = torch.zeros(2, 5), torch.zeros(1, dtype=torch.long)
    pointers = []
    for start in (0, 3, 6):
        enqueue(queue, pointer, torch.arange(start, start + 3.0)[:, None].expand(3, 2))
        pointers.append(pointer.item())
    assert pointers == [3, 1, 4]
    assert torch.equal(queue, torch.tensor([5.0, 6, 7, 8, 4]).expand(2, 5))


def test_a_batch_may_fill_the_queue():
    queue, pointer = torch.zeros(1, 3), torch.tensor([2])
    enqueue(queue, pointer, torch.tensor([[1.0], [2.0], [3.0]]))
    assert queue.tolist() == [[2, 3, 1]] and pointer.item() == 2


def written(rows: slice) -> dict[str, torch.Tensor]:
    """The memories after two batches, of which this process has some rows. Row 2 comes on both processes."""
    memory, queue, pointer = draw(6, 3, seed=1), draw(3, 8, seed=2), torch.tensor([5])
    for seed in (3, 4):
        vectors = draw(5, 3, seed=seed)[rows]
        update_rows([(memory, vectors)], torch.tensor([2, 0, 2, 4, 2])[rows], momentum=0.5)
        enqueue(queue, pointer, vectors)
    return {"memory": memory, "queue": queue, "pointer": pointer}


def _write(rank: int, folder: Path) -> None:
    torch.save(written(slice(0, 3) if rank == 0 else slice(3, 5)), folder / f"{rank}.pt")


def test_two_processes_write_what_one_does(tmp_path):
    spawn(_write, tmp_path, tmp_path, processes=2)
    expected = written(slice(None))
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(got[name], value) for name, value in expected.items())
