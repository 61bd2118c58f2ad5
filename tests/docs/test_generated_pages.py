"""What the pages take from results and docstrings is what these say now."""

import importlib.util
import json

import pytest

from coss_hf.study.paper_tables import ROWS, scaled
from tests.helpers.runs import ROOT


@pytest.fixture(scope="module")
def generate():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(generate):
    for path, text in generate.pages().items():
        assert path.is_file() and path.read_text() == text, f"{path.relative_to(ROOT)}: run python docs/generate.py"


def test_no_page_of_a_method_that_is_gone(generate):
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {*generate.own_losses()}


def test_every_section_of_a_method_says_something(generate):
    for name in generate.own_losses():
        page = generate.method_page(name)
        parts = [part.split("\n", 1)[1].strip() for part in page.split("\n## ")[1:]]
        assert len(parts) == 7 and all(parts), name


def test_photographs_are_compared_at_equal_images_seen(generate, monkeypatch):
    """With runs of two lengths each row was paired with both, and a row of one seed had an infinite interval."""

    def row(method, settings, seed, seen, value, split="test"):
        found = {"student": "resnet18", "method": method, "settings": settings, "seed": seed, "split": split}
        return found | {"images_seen": seen, "num_images": seen, "knn20": value, "linear": value}

    rows = [row("coss", "new", seed, 100, 0.5, "validation") for seed in (1, 2, 3)]
    for seed in (1, 2, 3):
        rows += [row("coss", "new", seed, seen, 0.5 + seen / 1000) for seen in (100, 200)]
        rows += [row("cosine alone", "new", seed, 200, 0.4), row("coss", "old", seed, 100, 0.3)]
        rows.append(row("random weights", "", seed, 0, 0.1))
    rows.append(row("initial weights", "", 1, 0, 0.2))
    monkeypatch.setattr(generate, "json_lines", lambda name: rows)
    found = [[cell.strip() for cell in line.split("|")[2:6]] for line in generate.photographs_paired().splitlines()[2:]]
    assert found == [
        ["100", "coss (old)", "3", "+30.0 ± 0.0"],
        ["100", "random weights", "3", "+50.0 ± 0.0"],
        ["100", "initial weights", "3", "+40.0 ± 0.0"],
        ["200", "cosine alone", "3", "+30.0 ± 0.0"],
        ["200", "random weights", "3", "+60.0 ± 0.0"],
        ["200", "initial weights", "3", "+50.0 ± 0.0"],
    ]


def test_the_front_page_shows_the_longest_training_by_the_chosen_settings(generate, monkeypatch):
    cost = {"parameters": 10, "bytes": 1e6, "batch_1": {"ms": 2.0}}

    def row(method, settings, seen, value, split="test"):
        found = {"student": "mobilenetv3", "method": method, "settings": settings, "seed": 1, "split": split}
        scores = dict.fromkeys(("knn20", "linear", "overlap10", "asymmetric_map"), value)
        return found | {"images_seen": seen, "num_images": seen} | scores | cost

    rows = [row("coss", "sgd", 100, 0.5, "validation"), row("coss", "paper", 100, 0.4, "validation")]
    rows += [row("teacher", "", 0, 0.9), row("random weights", "", 0, 0.1)]
    rows += [row("coss", settings, seen, 0.5) for settings in ("sgd", "paper") for seen in (100, 200)]
    rows += [row("cosine alone", "sgd", seen, 0.3) for seen in (100, 200)]
    larger = [one | {"student": "resnet18"} for one in rows if one["method"] != "teacher"]
    monkeypatch.setattr(generate, "json_lines", lambda name: rows + larger)
    found = [[cell.strip() for cell in line.split("|")[1:4]] for line in generate.photographs_front().splitlines()[2:]]
    assert found == [
        ["teacher (EfficientNet-Lite1)", "", "90.0"],
        ["mobilenetv3_small_100: CoSS, 3 neighbours", "200", "50.0"],
        ["mobilenetv3_small_100: cosine alone, 3 neighbours", "200", "30.0"],
        ["mobilenetv3_small_100: random weights", "", "10.0"],
    ]
    assert len(generate.photographs().splitlines()) == 2 + 8 + 7


def test_the_front_page_has_a_seed_of_random_weights_once(generate, monkeypatch):
    """It is in both files of results."""

    def row(method, seed, seen, value, split="test"):
        return {"method": method, "seed": seed, "images_seen": seen, "knn20": value, "split": split}

    files = {
        "gpu_cifar10.jsonl": [row("coss", 1, 900, 0.8), row("random", 1, 0, 0.3)],
        "table1_cifar10.jsonl": [row("coss", seed, 100, 0.6) for seed in (1, 2)]
        + [row("random", 1, 0, 0.3), row("random", 2, 0, 0.2), row("coss", 1, 50, 0.9, "validation")]
        + [row("at", 1, 100, 0.1), row("teacher", 1, 0, 0.85)],
    }
    monkeypatch.setattr(generate, "json_lines", files.get)
    found = [[cell.strip() for cell in line.split("|")[1:5]] for line in generate.front_page().splitlines()[2:]]
    assert found == [
        ["teacher (resnet56)", "", "85.0", ""],
        ["student (resnet20)", "900", "80.0", "1"],
        ["student (resnet20)", "100", "60.0 ± 0.0", "2"],
        ["student at random weights", "", "25.0 ± 7.1", "2"],
    ]


def test_what_a_student_of_cifar100_keeps(generate, monkeypatch, tmp_path):
    def row(method, seed, linear, seen=100, table=3):
        rows = ROWS[table]
        found = {
            "table": table,
            "pair": "resnet20/resnet56",
            "method": method,
            "expression": scaled(rows[method], 1) if method in rows else "",
            "seed": seed,
            "split": "test",
            "scale": 1,
        }
        found |= {"images_seen": seen, "num_images": seen}
        return found | ({"failed": "nan"} if linear is None else {"linear": linear, "knn20": linear / 2})

    rows = [row("teacher", 1, 0.6, seen=0), row("random", 1, 0.06, seen=0)]
    rows += [row("lambda 0.5", seed, 0.3) for seed in (1, 2)]
    others = {"at": 0.1, "sp": 0.2, "vid": 0.3, "rkd": 0.15, "pkt": 0.25, "coss": 0.3}
    rows += [row(name, 1, value, table=1) for name, value in others.items()]
    rows.append(row("at", 2, None, table=1))
    monkeypatch.setattr(generate, "cifar100_rows", lambda: rows)
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert "| CoSS | 100 | 2 | 30.0 ± 0.0 | 15.0 ± 0.0 | 50% | 50% |" in generate.cifar100_kept()
    files = {"resnet20/run": {"images_seen": 100}, "resnet20/results": {"student": {"linear": 0.4, "knn20": 0.2}}}
    files["resnet56/run"] = {"images_seen": 900, "accuracy": 0.6123, "seed": 0, "command": "train"}
    for name, record in files.items():
        path = tmp_path / f"cifar100-{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    text = generate.cifar100_teachers()
    assert "| `cifar100-resnet56` | 900 | 0 | not recorded | 61.2 |" in text
    assert "The command of `cifar100-resnet56`: `train`" in text
    longer = [row | {"overlap10": 0.9} for row in rows]
    (tmp_path / "cifar100-resnet56-20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    text = generate.cifar100_longer_teacher()
    assert "| `coss` | 71.11 | 30.0 ± 0.0 | -41.1 | 15.0 ± 0.0 | 90.0 ± 0.0 | 50% | 50% | 2 | 100 |" in text
    other = [row("lambda 0", seed, value) | {"overlap10": 0.8} for seed, value in ((1, 0.29), (2, 0.27))]
    (tmp_path / "cifar100-resnet56-20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer + other))
    text = generate.cifar100_longer_paired()
    assert "| the cosine alone | 100 | 2 | +2.0 ± 12.7 | +1.0 ± 6.4 | +10.0 ± 0.0 |" in text
    table = generate.cifar100_kept().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "teacher (resnet56)",
        "resnet20, trained with labels",
        "CoSS",
        "resnet20, random weights",
    ]
    assert "| CoSS | 100 | 2 | 30.0 ± 0.0 | 15.0 ± 0.0 | 50% | 50% | 75% | 75% |" in table
    files["resnet20/run"]["images_seen"] = 400
    (tmp_path / "cifar100-resnet20" / "run.json").write_text(json.dumps(files["resnet20/run"]))
    table = generate.cifar100_kept().splitlines()
    assert "| CoSS | 100 | 2 | 30.0 ± 0.0 | 15.0 ± 0.0 | 50% | 50% |  |  |" in table, "of other length: no measure"
    page = generate.cifar100()
    named = [f"cifar100-table1-resnet20-resnet56{kind}.png" for kind in ("", "-runs")]
    assert all(f"](images/{name})" in page for name in named) and "2 (1 failed)" in page
    generate.cifar100_pictures(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(named)
