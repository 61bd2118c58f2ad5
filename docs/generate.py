"""Write what pages of the documentation take from code and results: ``python docs/generate.py``.

Each method has a page, made of the docstring and the declarations of its loss. Tables of figures stand between
``<!-- begin: name -->`` and ``<!-- end: name -->`` in README.md and docs/, and come from recipes/benchmarks/results/.
``tests/docs/test_generated_pages.py`` compares the pages with what this script would write.
"""

import inspect
import json
import math
import re
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from coss_hf.losses.registry import LOSSES, SHAPES
from coss_hf.reporting.plots import length_plot, method_plot, published_plot, quality_plot
from coss_hf.study.paper_cells import Cell, at_usual_length, cells, cells_table, compared, ranking_sentence
from coss_hf.study.paper_tables import own_pairs
from coss_hf.study.tables import as_markdown, extra_passes, half_interval, ranked
from coss_hf.utils.packages import check_extra

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "recipes" / "benchmarks" / "results"
PHOTOGRAPH_STUDENTS = {
    "mobilenetv3": "mobilenetv3_small_100",
    "mobilenetv3, warm start": "mobilenetv3_small_100, distilled from other images before",
    "vit-tiny": "ViT-tiny",
    "resnet18": "resnet18",
}
# Methods of the photographs as the front page calls them: its default has no neighbours.
FRONT_NAMES = {
    "coss, no neighbours": "CoSS",
    "coss": "CoSS, 3 neighbours",
    "cosine alone": "cosine alone, 3 neighbours",
}
BLOCK = re.compile(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
TITLES = "Shapes|Several processes|Exact accumulation|Use when|Args|Returns|Raises|Example|References"
SECTION = re.compile(rf"^({TITLES})(?: \(when called\))?:[ \n]", re.MULTILINE)

# What a run passes to a loss by itself, so that it is no option of the method.
GIVEN_BY_THE_RUN = (*SHAPES, "num_images", "batch_size", "classifier")
READS = {
    "embedding": "The embeddings of both networks.",
    "maps": "The feature maps at the end of each stage of both networks (the token maps of a transformer's layers).",
    "last_map": "The last feature map of both networks.",
    "middle_map": "The feature map in the middle of both networks.",
    "logits": "The logits of the teacher's classifier.",
}


def json_lines(name: str) -> list[dict]:
    """Rows of a results file."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def json_record(name: str) -> dict:
    """A results file that holds one record."""
    return json.loads((RESULTS / name).read_text())


def percent(values: list[float], spread=None) -> str:
    """Mean in percent, with a spread where there are several values."""
    text = f"{100 * statistics.fmean(values):.1f}"
    return f"{text} ± {100 * spread(values):.1f}" if spread is not None and len(values) > 1 else text


def score(rows: list[dict], key: str, spread=half_interval) -> str:
    """One cell of a table: mean and spread over the rows that have the metric."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return percent(values, spread) if values else ""


def select(rows: list[dict], **wanted) -> list[dict]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


# --- tables of figures -----------------------------------------------------------------------------------------------


def front_lengths() -> dict[int, list[dict]]:
    """Results of resnet20 on CIFAR-10 by images seen, on test images; 0 are random weights."""
    rows = [*json_lines("gpu_cifar10.jsonl"), *json_lines("table1_cifar10.jsonl")]
    found: dict[int, dict[int, dict]] = {}
    for row in select(rows, split="test"):
        if row["method"] in ("coss", "random"):
            found.setdefault(row["images_seen"], {})[row["seed"]] = row  # a seed of random weights is in both files
    return {seen: [*by_seed.values()] for seen, by_seed in sorted(found.items())}


def front_teacher() -> list[dict]:
    """The teacher's result on CIFAR-10, test images."""
    return select(json_lines("table1_cifar10.jsonl"), split="test", method="teacher")


def front_page() -> str:
    """Teacher, students by length and random weights, with what they cost."""
    costs = json_record("report_cifar10.json")["costs"]
    lines = [["CIFAR-10, test images", "images seen", "k-NN 20", "seeds", "parameters", "file, MB", "one image, ms"]]
    rows = [("teacher (resnet56)", "teacher", "", front_teacher())]
    for seen, found in sorted(front_lengths().items(), reverse=True):
        name = "student (resnet20)" if seen else "student at random weights"
        rows.append((name, "student", f"{seen:,}" if seen else "", found))
    for name, network, seen, found in rows:
        cost = costs[network]
        sizes = [f"{cost['parameters']:,}", f"{cost['bytes'] / 1e6:.1f}", f"{cost['batch_1']['ms']:.1f}"]
        seeds = "" if network == "teacher" else str(len(found))
        lines.append([name, seen, score(found, "knn20", statistics.stdev), seeds, *sizes])
    return as_markdown(lines)


def front_picture(path: Path) -> None:
    """Accuracy against length, of the two tables of the front page."""
    check_extra("matplotlib", needed_by="docs/images/front_page.png")
    cifar = {"CoSS": {seen: [row["knn20"] for row in found] for seen, found in front_lengths().items()}}
    photographs: dict[str, dict[int, list[float]]] = {}
    settings = chosen_settings("mobilenetv3")
    rows = [(found[0], [row["knn20"] for row in found]) for _, found, _ in photograph_rows()]
    rows = [(row, values) for row, values in rows if row["student"] == "mobilenetv3"]
    untrained = next(values for row, values in rows if row["method"] == "random weights")
    for row, values in rows:
        if row["settings"] == settings:
            name = FRONT_NAMES[row["method"]]
            photographs.setdefault(name, {0: untrained})[row["images_seen"]] = values
    teachers = [front_teacher()[0]["knn20"], next(photograph_rows())[1][0]["knn20"]]
    plots = {
        "CIFAR-10: resnet20 from resnet56": (cifar, teachers[0]),
        "Photographs: mobilenetv3 from EfficientNet-Lite1": (photographs, teachers[1]),
    }
    path.parent.mkdir(exist_ok=True)
    length_plot(path, plots, "k-NN 20")


def quickstart_digits() -> str:
    """Teacher, student, random weights and raw pixels on the digits."""
    record = json_record("quickstart_digits.json")
    columns = {"knn10": "k-NN 10", "knn20": "k-NN 20", "probe": "linear probe", "overlap10": "overlap 10"}
    lines = [["", "parameters", *columns.values()]]
    for name, mean in record["mean"].items():
        spread = record["standard_deviation"][name]
        cells = []
        for key in columns:
            same = not spread.get(key)
            text = f"{100 * mean[key]:.1f}" if mean.get(key) is not None else ""
            cells.append(text if same or not text else f"{text} ± {100 * spread[key]:.1f}")
        lines.append([name, f"{mean['parameters']:,}" if "parameters" in mean else "", *cells])
    return as_markdown(lines)


def cifar10_short() -> str:
    """Ten epochs on CIFAR-10, next to a bare PyTorch loop."""
    rows = json_lines("cifar10_resnet56_resnet20.jsonl")
    metrics = {"knn10": "k-NN 10", "knn20": "k-NN 20", "probe": "linear probe", "overlap10": "overlap 10"}
    groups = {
        "student, no neighbours": select(rows, run="trainer", config="cifar10_resnet56_resnet20"),
        "the same by a bare PyTorch loop": select(rows, run="bare_loop"),
        "student, 32 anchors × (1 + 3 of the 15 nearest)": select(rows, config="cifar10_resnet56_resnet20_neighbors"),
    }
    lines = [["", *metrics.values()]]
    for name, found in groups.items():
        lines.append([name, *(score(found, key, statistics.stdev) for key in metrics)])
    return as_markdown(lines)


def table1() -> str:
    """Table 1 on a small budget: the choice on held-out images, and what was reported."""
    rows = json_lines("table1_cifar10.jsonl")
    chosen = select(rows, split="validation")
    reported = select(rows, split="test")
    lines = [["method", "probe, held-out images (scale)", "probe, test", "k-NN 20, test", "overlap 10, test"]]

    def mean(name: str) -> float:
        found = select(reported, method=name) or select(chosen, method=name)
        return (bool(select(reported, method=name)), max(row["probe"] for row in found))

    for name in sorted({row["method"] for row in rows}, key=mean, reverse=True):
        found = select(reported, method=name)
        tried = select(chosen, method=name)
        scale = {row["scale"] for row in found}
        taken = [row for row in tried if row["scale"] in scale] or sorted(tried, key=lambda row: -row["probe"])[:1]
        held_out = f"{100 * taken[0]['probe']:.1f} ({taken[0]['scale']:g})" if taken else ""
        lines.append([f"`{name}`", held_out, *(score(found, key) for key in ("probe", "knn20", "overlap10"))])
    return as_markdown(lines)


def tables234() -> str:
    """Tables 2 to 4 on a small budget."""
    rows = json_lines("tables234_cifar10.jsonl")
    metrics = {"probe": "probe, test", "knn20": "k-NN 20, test", "map": "mAP, test", "overlap10": "overlap 10, test"}
    names = ("lambda 1", "lambda 0.5", "lambda 0.25", "lambda 0", "L_ss", "bn", "random")
    lines = [["row", "probe, held-out images (scale)", *metrics.values()]]
    for name in names:
        found = select(rows, method=name, split="test")
        seeds = {row["seed"]: row for row in found}
        scale = next(iter(seeds.values()))["scale"]
        tried = [row for row in select(rows, method=name, split="validation") if row["scale"] == scale]
        held_out = f"{100 * tried[0]['probe']:.1f} ({scale:g})" if tried else ""
        lines.append([f"`{name}`", held_out, *(score([*seeds.values()], key) for key in metrics)])
    return as_markdown(lines)


def cifar100() -> str:
    """Every cell of the paper's tables on its own data, run or not, with the agreement of the rankings."""
    parts = []
    for (table, pair), own in cifar100_cells().items():
        name = "SEED, with and without space similarity and neighbours" if table == 5 else f"Table {table}"
        if table != 5 and pair not in own_pairs(table):
            name += ", its rows for a pair that the paper's does not have"
        parts.append(f"## {name}: {' from '.join(pair.split('/'))}\n\n{cells_table(own)}")
        parts += extra_passes([row for cell in own for row in cell.runs])
        if cifar100_runs(own):
            alt = "Each seed of each row as a dot, the mean as a stroke, with the teacher and random weights"
            parts.append(f"![{alt}](images/{cifar100_picture_name(table, pair, '-runs')})")
        if sentence := ranking_sentence(own):
            parts += [sentence, f"![Figures here against the paper's](images/{cifar100_picture_name(table, pair)})"]
    return "\n\n".join(parts)


def cifar100_runs(own: list[Cell]) -> list[dict]:
    """Runs of three rows or more of a pair at their usual length, with its teacher and random weights."""
    runs = [row | {"method": cell.row} for cell in at_usual_length(own) for row in cell.runs]
    if len({row["method"] for row in runs}) < 3:
        return []
    untrained = {
        (row["method"], row["seed"]): row
        for row in cifar100_rows()
        if row["pair"] == own[0].pair and row["split"] == "test" and row["method"] in ("teacher", "random")
    }
    return [*runs, *untrained.values()]


def cifar100_rows() -> list[dict]:
    """Results of the paper's tables on its own data; empty before any are there."""
    path = RESULTS / "cifar100.jsonl"
    return json_lines(path.name) if path.exists() else []


def cifar100_cells() -> dict[tuple[int, str], list[Cell]]:
    """Cells of the paper's tables by table and pair."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells(cifar100_rows()):
        groups.setdefault((cell.table, cell.pair), []).append(cell)
    return groups


def cifar100_counting(pair: str) -> list[dict]:
    """Test runs of a pair that count in a cell, under the cell's name, with its teacher and random weights."""
    counting = [
        row | {"method": cell.row}
        for (_, own_pair), own in cifar100_cells().items()
        if own_pair == pair
        for cell in own
        for row in cell.runs
    ]
    untrained = [row for row in cifar100_rows() if row["pair"] == pair and row["method"] in ("teacher", "random")]
    return counting + select(untrained, split="test")


def cifar100_picture_name(table: int, pair: str, kind: str = "") -> str:
    """File of a plot of one pair of a table."""
    return f"cifar100-table{table}-{pair.replace('/', '-')}{kind}.png"


def cifar100_pictures(folder: Path) -> None:
    """Runs of each pair, and our figures against the paper's, where enough rows were run."""
    check_extra("matplotlib", needed_by="docs/images/cifar100-*.png")
    for (table, pair), own in cifar100_cells().items():
        if runs := cifar100_runs(own):
            seen = max(row["images_seen"] for row in runs)
            name = f"{pair}, CIFAR-100, {seen:,} images seen"
            method_plot(folder / cifar100_picture_name(table, pair, "-runs"), ranked(runs, "linear"), "linear", name)
        if both := compared(own):
            rows = {cell.row: (cell.published, cell.values("linear")) for cell in both}
            seen = max(row["images_seen"] for cell in both for row in cell.runs)
            title = f"Table {table}, {pair}, {seen:,} images seen"
            published_plot(folder / cifar100_picture_name(table, pair), rows, "linear evaluation", title)


def cifar100_teachers() -> str:
    """How the teachers that are kept next to the results were trained, and what they reach."""
    lines = [["folder", "images seen", "seed", "hours", "top-1"]]
    commands = []
    for folder in sorted(RESULTS.glob("cifar100-resnet56*/")):
        record = json_record(f"{folder.name}/run.json")
        hours = f"{record['hours']:.1f}" if "hours" in record else "not recorded"
        top1 = percent([record["accuracy"]])
        lines.append([f"`{folder.name}`", f"{record['images_seen']:,}", str(record["seed"]), hours, top1])
        commands.append(f"The command of `{folder.name}`: `{record['command']}`")
    return "\n\n".join([as_markdown(lines), *commands])


def cifar100_longer_teacher() -> str:
    """Runs with the teacher of 20 epochs: the student's figures, and their shares of the teacher's."""
    rows = json_lines("cifar100-resnet56-20.jsonl")
    others = ("lambda 0", "lambda 0.5")  # the same runs as L_co and coss
    found = {cell.row: cell for cell in cells(rows) if cell.values("linear") and cell.row not in others}
    teacher = select(rows, method="teacher", split="test")[:1]
    head = ["row", "paper", "linear evaluation, here", "gap", "k-NN 20", "overlap 10", "share of linear evaluation"]
    lines = [[*head, "share of k-NN 20", "seeds", "images seen", "scale"]]
    measured = [score(teacher, key) for key in ("linear", "knn20", "overlap10")]
    lines.append(["teacher (resnet56)", "", measured[0], "", *measured[1:], "", "", "", "", ""])
    for cell in sorted(found.values(), key=lambda cell: -statistics.fmean(cell.values("linear"))):
        runs = [row for row in cell.runs if row.get("linear") is not None]
        lines.append(
            [
                f"`{cell.row}`",
                "" if cell.published is None else f"{cell.published:.2f}",
                cell.text("linear"),
                "" if cell.published is None else f"{cell.gap('linear'):+.1f}",
                cell.text("knn20"),
                cell.text("overlap10"),
                *(share(runs, teacher, key) for key in ("linear", "knn20")),
                cell.seeds("linear"),
                f"{runs[0]['images_seen']:,}",
                f"{runs[0]['scale']:g}",
            ]
        )
    return as_markdown(lines)


def cifar100_kept() -> str:
    """CoSS next to its teacher, and next to a network of the student's size that was trained with labels."""
    rows = cifar100_counting("resnet20/resnet56")
    names = {"teacher": "teacher (resnet56)", "coss": "CoSS", "random": "resnet20, random weights"}
    groups: dict[tuple[str, int], dict[int, dict]] = {}
    for row in rows:
        method = "coss" if row["method"] == "lambda 0.5" else row["method"]
        if method in names and row.get("linear") is not None:
            groups.setdefault((method, row["images_seen"]), {})[row["seed"]] = row
    if not any(method == "coss" for method, _ in groups):
        return "Not run."
    found = {name: [*by_seed.values()] for name, by_seed in groups.items()}
    if (RESULTS / "cifar100-resnet20").is_dir():
        seen = json_record("cifar100-resnet20/run.json")["images_seen"]
        found["supervised", seen] = [json_record("cifar100-resnet20/results.json")["student"]]
    names["supervised"] = "resnet20, trained with labels"
    metrics = {"linear": "linear evaluation", "knn20": "k-NN 20"}
    bases = [base for base in ("teacher", "supervised") if any(name == base for name, _ in found)]
    shares = [f"{names[base]}: share of {metrics[key]}" for base in bases for key in metrics]
    lines = [["", "images seen", "seeds", *metrics.values(), *shares]]
    for (method, seen), own in sorted(found.items(), key=lambda item: -statistics.fmean(r["linear"] for r in item[1])):
        kept = []
        for base in bases:
            # A network of other length is no measure: the teacher has one row, whatever it has seen.
            measure = found.get((base, 0 if base == "teacher" else seen))
            kept += [share(own, measure, key) if measure else "" for key in metrics]
        scores = [score(own, key) for key in metrics]
        lines.append([names[method], f"{seen:,}" if seen else "", str(len(own)), *scores, *kept])
    return as_markdown(lines)


def share(rows: list[dict], others: list[dict], metric: str) -> str:
    """Mean of a metric as a share of that of others."""
    ours, theirs = (statistics.fmean(row[metric] for row in found) for found in (rows, others))
    return f"{ours / theirs:.0%}"


def cifar100_paired() -> str:
    """CoSS minus the others, with the teacher of the tables."""
    return coss_minus_others(cifar100_counting("resnet20/resnet56"))


def cifar100_longer_paired() -> str:
    """CoSS minus the others, with the teacher of 20 epochs."""
    found = cells(json_lines("cifar100-resnet56-20.jsonl"))
    return coss_minus_others([row | {"method": cell.row} for cell in found for row in cell.runs])


def coss_minus_others(rows: list[dict]) -> str:
    """CoSS minus the cosine alone and other methods with several seeds, in points with 95 % t-intervals, by seed."""
    groups: dict[int, dict[str, dict[int, dict]]] = {}
    for row in rows:
        name = {"coss": "lambda 0.5", "L_co": "lambda 0"}.get(row["method"], row["method"])
        if row.get("linear") is not None:
            groups.setdefault(row["images_seen"], {}).setdefault(name, {})[row["seed"]] = row
    lines = [["CoSS minus", "images seen", "seeds", "linear evaluation", "k-NN 20", "overlap 10"]]
    others = {"lambda 0": "the cosine alone", "dist": "`dist`", "srrl": "`srrl`"}
    for (seen, by_name), (name, title) in product(sorted(groups.items()), others.items()):
        found = [(one, by_name.get(name, {}).get(seed)) for seed, one in by_name.get("lambda 0.5", {}).items()]
        found = [(one, other) for one, other in found if other]
        if len(found) > 1:
            differences = (paired(found, key) for key in ("linear", "knn20", "overlap10"))
            lines.append([title, f"{seen:,}", str(len(found)), *differences])
    return as_markdown(lines) if len(lines) > 1 else "Not run."


def loss_classes() -> str:
    """The base class of losses and every loss of the package, for the API page."""
    base = ["coss_hf.losses.base.DistillationLoss", "coss_hf.losses.base.Citation"]
    losses = [f"{LOSSES[name].__module__}.{LOSSES[name].__qualname__}" for name in own_losses()]
    lines = [line for name in (*base, *losses) for line in (f".. autoclass:: {name}", "   :members:")]
    lines += [f".. autofunction:: coss_hf.losses.registry.{name}" for name in ("build_loss", "papers")]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def gpu() -> str:
    """Longer runs of one seed on a GPU."""
    metrics = {"probe": "linear probe", "knn20": "k-NN 20", "map": "mAP", "overlap10": "overlap 10"}
    lines = [["", "images seen", *metrics.values()]]
    rows = [row for row in json_lines("gpu_cifar10.jsonl") if "images_seen" in row]
    rows += select(json_lines("table1_cifar10.jsonl"), method="teacher")
    for row in sorted(rows, key=lambda row: (row["method"] == "teacher", row["images_seen"])):
        seen = f"{row['images_seen']:,}" if row["method"] != "teacher" else ""
        lines.append([f"`{row['method']}`", seen, *(score([row], key) for key in metrics)])
    return as_markdown(lines)


def report() -> str:
    """Did it help, on a run as short as can be."""
    rows = json_lines("report_cifar10.jsonl")
    metrics = {"probe": "linear probe", "knn20": "k-NN 20", "map": "mAP", "asymmetric_map": "mAP, teacher's gallery"}
    lines = [["", *metrics.values(), "overlap 10"]]
    for name in dict.fromkeys(row["method"] for row in sorted(rows, key=lambda row: -row["probe"])):
        found = select(rows, method=name)
        lines.append([name, *(score(found, key) for key in [*metrics, "overlap10"])])
    return as_markdown(lines)


def export() -> str:
    """PyTorch and ONNX Runtime."""
    lines = [["", "bytes", "cosine, least / mean", "k-NN 20, %", "ms, batch 1", "ms, batch 64"]]
    names = {"pytorch": "PyTorch", "onnx": "ONNX Runtime, float32", "int8": "ONNX Runtime, int8, static"}
    for key, name in names.items():
        row = json_record("export.json")["results"][key]
        cosine = "" if key == "pytorch" else f"{row['cosine_min']:.6f} / {row['cosine_mean']:.6f}"
        times = [f"{row['batch_1']['ms']:.2f}", f"{row['batch_64']['ms']:.1f}"]
        lines.append([name, f"{row['bytes']:,}" if "bytes" in row else "", cosine, score([row], "knn20"), *times])
    return as_markdown(lines)


def correlation() -> str:
    """Spearman's correlation of label-free figures with accuracy."""
    record = json_record("overlap_correlation.json")
    everyone, of_coss = record["all 20 students"], record["the 16 students of CoSS"]
    lines = [["", "k-NN 10", "k-NN 20", "linear probe", "among the 16 of CoSS: k-NN 20"]]
    for name in sorted(everyone, key=lambda name: -everyone[name]["knn20"]):
        cells = [f"{everyone[name][key]:.2f}" for key in ("knn10", "knn20", "probe")]
        lines.append([name, *cells, f"{of_coss[name]['knn20']:.2f}"])
    return as_markdown(lines)


def neighbor_search() -> str:
    """What a search for 10 neighbours costs."""
    lines = [["vectors", "search", "recall@10", "CPU seconds", "of exact search"]]
    exact = {}
    for row in json_record("neighbor_search.json")["results"]:
        vectors = (row["data"], row["images"], row["dim"])
        seconds = (
            row["cpu_seconds"] * row["images"] / row.get("queries", row["images"])
        )  # extrapolated from some queries
        if row["search"] == "exact":
            exact[vectors] = seconds
        name = "CIFAR-10 by resnet56" if row["data"] != "synthetic" else "synthetic"
        share = f"{seconds / exact[vectors]:.2g}" if vectors in exact else ""
        cells = [row["search"], f"{row.get('recall', 1):.3f}", f"{seconds:,.0f}", share]
        lines.append([f"{name}, {row['images']:,} × {row['dim']}", *cells])
    return as_markdown(lines)


def shared_cache() -> str:
    """A study whose trials share the teacher's embeddings, next to the same study without a cache."""
    rows = json_lines("shared_cache.jsonl")
    lines = [["trials", "teacher", "images that it embeds", "wall time, s"]]
    for name, cached in (("methods of embeddings and logits", True), ("methods of feature maps", False)):
        methods = {row["method"] for row in rows if row["cached"]}
        found = [row for row in rows if (row["method"] in methods) == cached]
        lines += [_way(f"{len(found) // 2} of {name}", way, found) for way in ("live", "shared")]
    return as_markdown([*lines, *(_way(f"all {len(rows) // 2}", way, rows) for way in ("live", "shared"))])


def _way(name: str, way: str, rows: list[dict]) -> list[str]:
    found = select(rows, way=way)
    images = sum(row["teacher_images"] for row in found)
    return [name, way, f"{images:,}", f"{sum(row['seconds'] for row in found):.0f}"]


def cost_model() -> str:
    """The formulas of docs/scaling.md at d = 256, float16, 31 neighbours and 8 probes, on one core."""
    dim, size, pool, probes = 256, 2, 31, 8
    lines = [["images", "embeddings", "ivf index", "neighbours", "exact search", "build ivf", "search ivf"]]
    for images in (50_000, 200_000, 10**6, 10**7, 10**8, 10**9):
        root = math.sqrt(images)
        sizes = (images * dim * size, images * (dim * size + 8) + 16 * root * dim, 4 * images * pool)
        exact = 2 * images**2 * dim / 51e9
        build = images * dim * (20_480 + 8 * root) / 85e9
        search = images * root * dim * (8 + probes / 2) / 15e9
        lines.append([f"{images:,}", *map(in_bytes, sizes), *map(in_time, (exact, build, search))])
    return as_markdown(lines)


def in_bytes(count: float) -> str:
    """A number of bytes in GB or MB, with three digits."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.3g} {name}"


def in_time(seconds: float) -> str:
    """A time in the largest of days, hours, minutes and seconds of which it has two."""
    for unit, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.0f} s"


def teacher_cache() -> str:
    """Images a second live, with an empty and with a complete cache, and of the student alone; medians of rounds."""
    names = {"resnet": "resnet56 → resnet20, 32 px, batch 128", "vit": "DINOv2-S/14 → resnet18, 112 px, batch 32"}
    kinds = {"tensors": "views in memory", "images": "images, one loader process"}
    ways = ["live", "empty cache", "complete cache", "student alone"]
    lines = [["", "teacher, share of a live step", *ways, "complete / live", "complete / student"]]
    rows = json_lines("teacher_cache.jsonl")
    for pair, networks in names.items():
        for kind, views in kinds.items():
            found = [row for row in rows if (row["run"]["pair"], row["run"]["data"]) == (pair, kind)]
            rates: dict[str, dict[int, float]] = {}
            for row in found:
                rates.setdefault(row["run"]["mode"], {})[row["run"]["round"]] = row["images_per_second"]
            shares = [row["teacher_share"] for row in found if row["run"]["mode"] == "live"]
            cells = [f"{statistics.median(shares):.0%}"]
            cells += [f"{statistics.median(rates[mode].values()):.1f}" for mode in ("live", "cold", "warm", "student")]
            for mode in ("live", "student"):
                ratios = [rates["warm"][number] / rates[mode][number] for number in sorted(rates["warm"])]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            lines.append([f"{networks}, {views}", *cells])
    return as_markdown(lines)


def view_epochs() -> str:
    """Students by the number of epochs after which their views come back, on held-out images."""
    metrics = {"knn20": "k-NN 20", "linear": "linear evaluation", "overlap10": "overlap 10"}
    lines = [["epochs of views", "cache", "seeds", *metrics.values(), "cosine to the teacher"]]
    rows = json_lines("view_epochs.jsonl")
    arms = {(row["view_epochs"], row["cache_dtype"]) for row in rows}
    for views, dtype in sorted(arms, key=lambda arm: (arm[0] or math.inf, arm[1] or "")):
        found = select(rows, view_epochs=views, cache_dtype=dtype)
        cosines = [row["cosine"] for row in found]
        cosine = f"{statistics.fmean(cosines):.3f}"
        cosine += f" ± {statistics.stdev(cosines):.3f}" if len(cosines) > 1 else ""
        cells = [score(found, key, statistics.stdev) for key in metrics]
        lines.append([str(views or "new each time"), dtype or "none", str(len(found)), *cells, cosine])
    return as_markdown(lines)


def decoding() -> str:
    """Views a second and core of large and small photographs, by how they are decoded."""
    record = json_record("decoding.json")
    ways = {"full": "full size", "reduced": "reduced scale", "copy": "copy at 288 px"}
    lines = [["photographs", "augmentation", *ways.values(), "reduced / full", "copy / full"]]
    for size in ("4000x3000", "500x375"):
        for augmentation in ("imagenet", "moco"):
            rates = record[size][augmentation]["views_per_second"]
            cells = [f"{rates[way]:.1f}" for way in ways]
            ratios = [f"{rates[way] / rates['full']:.2f}" for way in ("reduced", "copy")]
            lines.append([size.replace("x", " × "), f"`{augmentation}`", *cells, *ratios])
    return as_markdown(lines)


def config_runs() -> str:
    """Each YAML file for photographs, run once."""
    names = {"vit_photographs": "ViT-tiny", "small_set_pretrained": "resnet56, trained on CIFAR-100"}
    lines = [["file", "student", "images seen", "k-NN 20: random weights / student / teacher"]]
    lines[0] += ["linear probe: random weights / student / teacher", "verdict of the run"]
    for row in json_lines("configs.jsonl"):
        results = row["results"]
        networks = ("random", "student", "teacher")
        scores = [" / ".join(f"{100 * results[name][key]:.1f}" for name in networks) for key in ("knn20", "probe")]
        student = names.get(row["config"], "resnet18")
        verdict = row["verdict"][0].split(":")[0].removesuffix(", see below")
        if any("collapsed" in sentence for sentence in row["verdict"][1:]):
            verdict += "; it has collapsed"
        lines.append([f"`{row['config']}`", student, f"{row['images_seen']:,}", *scores, verdict])
    return as_markdown(lines)


def photographs_settings(num_images: int = 6400) -> str:
    """Settings in short runs on photographs, measured on held-out images."""
    kept = select(json_lines("photographs.jsonl"), split="validation")
    rows = select(kept, method="coss", num_images=num_images)
    students = {row["student"] for row in rows}
    rows += [row | {"settings": "random weights"} for row in select(kept, method="random weights")]
    lines = [["student", "settings", "seeds", "k-NN 20", "linear evaluation", "overlap 10", "effective rank"]]
    for student, settings in dict.fromkeys((row["student"], row["settings"]) for row in rows):
        if student not in students:
            continue
        found = select(rows, student=student, settings=settings)
        rank = f"{statistics.fmean(row['effective_rank'] for row in found):.1f}"
        cells = [score(found, key, statistics.stdev) for key in ("knn20", "linear", "overlap10")]
        lines.append([student, settings, str(len(found)), *cells, rank])
    lines[1:] = sorted(lines[1:], key=lambda line: line[0])
    return as_markdown(lines)


def optimizers() -> str:
    """Optimizers by their starting values, measured on held-out images."""
    rows = json_lines("optimizers.jsonl")
    students = {"vit": "ViT of 4 layers", "cifar100-resnet56": "resnet56, trained on CIFAR-100"}
    images = {"cifar100": "CIFAR-100", "imagenette": "photographs", "data": "digits"}
    lines = [["student", "images", "images seen", "optimizer", "seeds", "k-NN 20", "linear evaluation", "overlap 10"]]
    for key in dict.fromkeys((row["student"], row["dataset"], row["optimizer"]) for row in rows):
        found = [row for row in rows if (row["student"], row["dataset"], row["optimizer"]) == key]
        cells = [score(found, metric, statistics.stdev) for metric in ("knn20", "linear", "overlap10")]
        seen = max(row["images_seen"] for row in rows if row["student"] == key[0])
        names = [students.get(key[0], key[0]), images.get(key[1], key[1])]
        lines.append([*names, f"{seen:,}" if found[0]["images_seen"] else "0", key[2], str(len(found)), *cells])
    return as_markdown(lines)


def photographs_longer() -> str:
    """Settings in longer runs on photographs, measured on held-out images."""
    return photographs_settings(12_800)


def photographs() -> str:
    """Teacher, students and random weights on photographs, test images, with what they cost."""
    return photographs_table(list(photograph_rows()))


def photographs_front() -> str:
    """The longest training of the student that is smaller than its teacher, by the settings that were chosen for it."""
    shown = ("", chosen_settings("mobilenetv3"))  # the teacher and random weights have none
    rows = [
        (front_name(name, found[0]["method"]), found, cost)
        for name, found, cost in photograph_rows()
        if found[0]["method"] == "teacher" or (found[0]["student"] == "mobilenetv3" and found[0]["settings"] in shown)
    ]
    longest = max(found[0]["images_seen"] for _, found, _ in rows)
    return photographs_table([row for row in rows if row[1][0]["images_seen"] in (0, longest)])


def front_name(name: str, method: str) -> str:
    """Name of a row of ``photograph_rows`` without its settings."""
    return f"{name.partition(':')[0]}: {FRONT_NAMES[method]}" if method in FRONT_NAMES else name


def photographs_table(rows: list[tuple[str, list[dict], dict]]) -> str:
    """Rows of ``photograph_rows`` as a table."""
    metrics = {
        "knn20": "k-NN 20",
        "linear": "linear evaluation",
        "overlap10": "overlap 10",
        "asymmetric_map": "mAP, teacher's gallery",
    }
    head = ["photographs, test images", "images seen", *metrics.values(), "parameters", "file, MB", "one image, ms"]
    lines = [head]
    for name, found, cost in rows:
        seen = f"{found[0]['images_seen']:,}" if found[0]["images_seen"] else ""
        scores = [score(found, key, statistics.stdev) for key in metrics]
        if found[0]["method"] == "teacher":
            scores[2:] = ["", ""]  # of its own neighbours
        sizes = [f"{cost['parameters']:,}", f"{cost['bytes'] / 1e6:.1f}", f"{cost['batch_1']['ms']:.1f}"]
        lines.append([name, seen, *scores, *sizes])
    return as_markdown(lines)


def photograph_rows() -> Iterator[tuple[str, list[dict], dict]]:
    """Rows of test images, with their names and costs: the teacher, then student by student, the best first."""
    rows = select(json_lines("photographs.jsonl"), split="test")
    teacher = select(rows, method="teacher")
    if not teacher:
        return
    costs = json_record("photographs_costs.json")["networks"]
    yield "teacher (EfficientNet-Lite1)", teacher[:1], costs["teacher"]
    for student in (name for name in PHOTOGRAPH_STUDENTS if select(rows, student=name)):
        own = [row for row in rows if row["student"] == student and row["method"] != "teacher"]
        groups: dict[tuple[str, str, int], list[dict]] = {}
        for row in own:
            groups.setdefault((row["settings"], row["method"], row["images_seen"]), []).append(row)
        cost = costs[student.partition(",")[0]]  # a warm start is the same network
        order = sorted(groups, key=lambda key: -statistics.fmean(row["knn20"] for row in groups[key]))
        for key in order:
            settings, method, _ = key
            name = f"{PHOTOGRAPH_STUDENTS[student]}: {method}" + (f" ({settings})" if settings else "")
            yield name, groups[key], cost


def photographs_paired() -> str:
    """How far CoSS by the chosen settings is above each other row of its student, seed by seed, on test images.

    Rows are compared at equal images seen; those that are not trained, with each length. The weights that a warm start
    begins with are the same for all seeds.
    """
    rows = select(json_lines("photographs.jsonl"), split="test")
    lines = [["student", "images seen", "CoSS by the chosen settings, minus", "seeds", "k-NN 20", "linear evaluation"]]
    for student in (name for name in PHOTOGRAPH_STUDENTS if select(rows, student=name, method="coss")):
        settings = chosen_settings(student)
        of_coss = select(rows, student=student, method="coss", settings=settings)
        for seen in sorted({row["images_seen"] for row in of_coss}):
            best = {row["seed"]: row for row in select(of_coss, images_seen=seen)}
            for name, others in compared_with(select(rows, student=student), settings, seen).items():
                fixed = others.get(1) if len(others) == 1 and name == "initial weights" else None
                found = [(best[seed], others.get(seed, fixed)) for seed in best if others.get(seed, fixed)]
                cells = [paired(found, key) for key in ("knn20", "linear")]
                lines.append([PHOTOGRAPH_STUDENTS[student], f"{seen:,}", name, str(len(found)), *cells])
    return as_markdown(lines)


def compared_with(rows: list[dict], settings: str, images_seen: int) -> dict[str, dict[int, dict]]:
    """Rows that CoSS by ``settings`` is compared with, by name and seed."""
    groups: dict[str, dict[int, dict]] = {}
    for row in rows:
        coss = (row["settings"], row["method"]) == (settings, "coss")
        if row["method"] != "teacher" and not coss and row["images_seen"] in (0, images_seen):
            other = row["settings"] not in ("", settings)
            name = f"{row['method']} ({row['settings']})" if other else row["method"]
            groups.setdefault(name, {})[row["seed"]] = row
    return groups


def chosen_settings(student: str) -> str:
    """The settings with the best mean of k-NN 20 in the short runs, on held-out images."""
    rows = select(json_lines("photographs.jsonl"), split="validation", method="coss", student=student)
    rows = select(rows, num_images=min(row["num_images"] for row in rows))
    return next(iter(ranked([row | {"method": row["settings"]} for row in rows], "knn20")))


def paired(found: list[tuple[dict, dict]], key: str) -> str:
    """Mean difference in points, with a 95 % t-interval."""
    values = [100 * (one[key] - other[key]) for one, other in found]
    return f"{statistics.fmean(values):+.1f} ± {half_interval(values):.1f}"


def photograph_picture(path: Path) -> None:
    """Accuracy against latency on photographs: the teacher, and each student's best row from random weights."""
    check_extra("matplotlib", needed_by="docs/images/photographs.png")
    points: dict[str, tuple[float, list[float]]] = {}
    kept = set()
    for name, found, cost in photograph_rows():
        student = found[0]["student"] if found[0]["method"] != "teacher" else "teacher"
        seen = found[0]["images_seen"]
        if student not in kept and student != "mobilenetv3, warm start":
            label = name.partition(":")[0].partition(" (")[0] + (f", {seen:,} images seen:" if seen else "")
            points[label] = (cost["batch_1"]["ms"], [row["knn20"] for row in found])
        kept.add(student)
    path.parent.mkdir(exist_ok=True)
    quality_plot(path, points, "k-NN 20", "Photographs of ten classes: EfficientNet-Lite1 as teacher, no labels")


TABLES = (
    decoding,
    optimizers,
    photographs,
    photographs_front,
    photographs_longer,
    photographs_paired,
    photographs_settings,
    config_runs,
    teacher_cache,
    view_epochs,
    loss_classes,
    front_page,
    quickstart_digits,
    cifar10_short,
    table1,
    tables234,
    cifar100,
    cifar100_kept,
    cifar100_paired,
    cifar100_teachers,
    cifar100_longer_teacher,
    cifar100_longer_paired,
    gpu,
    report,
    export,
    correlation,
    neighbor_search,
    cost_model,
    shared_cache,
)


# --- pages of the methods --------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A docstring's text in Markdown."""
    return re.sub(r"``(.+?)``", lambda found: f"`{' '.join(found[1].split())}`", text, flags=re.DOTALL)


def sections(document: str) -> dict[str, str]:
    """Parts of a docstring by their title; what stands before the first title is ``""``."""
    parts = SECTION.split(document)
    found = {"": parts[0].strip()}
    for title, text in zip(parts[1::2], parts[2::2]):
        found[title] = inspect.cleandoc(text).strip()
    return found


def entries(text: str) -> dict[str, str]:
    """Items of an ``Args`` section by name."""
    found = re.split(r"^(\w+): ", text, flags=re.MULTILINE)
    return {name: " ".join(value.split()) for name, value in zip(found[1::2], found[2::2])}


def options(loss: type) -> list[list[str]]:
    """Options of a method, with defaults."""
    described = entries(sections(inspect.getdoc(loss)).get("Args", ""))
    lines = [["option", "default", "meaning"]]
    for name, parameter in inspect.signature(loss).parameters.items():
        if name not in GIVEN_BY_THE_RUN:
            default = "by the run" if parameter.default is None else f"`{parameter.default}`"
            lines.append([f"`{name}`", default, plain(described.get(name, ""))])
    return lines


def cost(loss: type) -> list[str]:
    """What a method needs, by what its class declares."""
    lines = [f"**Reads:** {READS[loss.reads]}"]
    head = "The student gets a projection head where the dimensions differ." if loss.same_dim else "No head is needed."
    lines.append(f"**Dimensions:** {head}")
    if loss.keeps_state:
        lines.append("**Memory:** Keeps embeddings of earlier images, which are part of each checkpoint.")
    if loss.pretraining_steps:
        lines.append(f"**Pre-training:** {loss.pretraining_steps:,} batches before the training of the student.")
    if loss.classifier != "unused":
        lines.append(f"**Classifier of the teacher:** {loss.classifier}.")
    exact = "works" if loss.separable else "is not available"
    lines.append(f"**Exact gradient accumulation** (`--exact_accumulation`): {exact}.")
    return lines


def results_of(name: str) -> str:
    """What the tables on CIFAR-10 and CIFAR-100 say of a method, with seeds and lengths."""
    texts = [text for text in (cifar10_result(name), cifar100_result(name)) if text]
    if not texts:
        return "No results of this method are kept in the repository."
    listed = "\n".join(f"* {text}" for text in texts)
    weight = " These runs have `lambda_ss=0.5`, not the default." if name == "coss" else ""
    return f"resnet56 to resnet20.{weight} Short runs show how fast a method starts, not where it ends.\n\n{listed}"


def cifar10_result(name: str) -> str:
    """What table 1 on CIFAR-10, or else tables 2 to 4, say of a method; empty where they have nothing of it."""
    rows = select(json_lines("table1_cifar10.jsonl"), method=name)
    rows = rows or select(json_lines("tables234_cifar10.jsonl"), method=name)
    reported = [*{row["seed"]: row for row in select(rows, split="test")}.values()]
    tried = sorted(select(rows, split="validation"), key=lambda row: -row["probe"])
    if reported:
        text = (
            f"{score(reported, 'probe')} % by linear probe and {score(reported, 'knn20')} % by k-NN 20 on test images "
        )
        text += f"(mean and 95 % t-interval of {len(reported)} seeds, {reported[0]['images_seen']:,} images seen)"
    elif tried:
        text = f"{score(tried[:1], 'probe')} % by linear probe on held-out images (one seed, "
        text += f"{tried[0]['images_seen']:,} images seen, the best of {len(tried)} scales)"
    else:
        return ""
    if "stages=last" in rows[0]["expression"]:
        text += ", with `stages=last`"
    return f"CIFAR-10: {text}; the other methods, commands and caveats: [Reproducing the paper](../paper.md)."


def cifar100_result(name: str) -> str:
    """What the tables on CIFAR-100 say of a method; empty where they have nothing of it."""
    found = [cell for (_, pair), own in cifar100_cells().items() if pair == "resnet20/resnet56" for cell in own]
    runs = {cell.runs[0]["images_seen"]: cell for cell in found if cell.row == name and cell.runs}
    parts = []
    for images, cell in sorted(runs.items()):
        spread = "one seed" if len(cell.runs) == 1 else f"mean and 95 % t-interval of {len(cell.runs)} seeds"
        scale = f"scale {cell.runs[0]['scale']:g}"
        parts.append(
            f"{cell.text('linear')} % by linear evaluation and {cell.text('knn20')} % by k-NN 20 ({spread}, "
            f"{images:,} images seen, {scale})"
        )
    if not parts:
        return ""
    rows = select(cifar100_rows(), pair="resnet20/resnet56", split="test")
    by_seed = [{row["seed"]: row for row in select(rows, method=kind)} for kind in ("teacher", "random")]
    teacher, untrained = (score([*found.values()], "linear") for found in by_seed)
    return (
        f"CIFAR-100, test images: {'; '.join(parts)}; by linear evaluation the teacher has {teacher} %, random weights "
        f"have {untrained} %. The paper's figures are next to them in "
        f"[The paper's tables on CIFAR-100](../paper-cifar100.md)."
    )


def paragraphs(text: str) -> str:
    """Join the lines of each paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def sentence(text: str) -> str:
    """A section in Markdown that begins with a capital."""
    text = plain(paragraphs(text))
    return text[0].upper() + text[1:]


def method_page(name: str) -> str:
    """The page of a method in Markdown."""
    loss = LOSSES[name]
    parts = sections(inspect.getdoc(loss))
    summary, _, formula = parts[""].partition("\n\n")
    page = [
        f"# {name}",
        f"<!-- Written by docs/generate.py from the docstring of {loss.__name__}. -->",
        plain(paragraphs(summary)),
        "## Formula",
        plain(paragraphs(formula)),
        f"**Shapes.** {sentence(parts['Shapes'])}",
        "## When to use it",
        f"Use it when {plain(paragraphs(parts['Use when']))}",
        "## What it needs",
        *(f"* {line}" for line in cost(loss)),
        f"**Several processes.** {sentence(parts['Several processes'])}",
        "## Options",
        as_markdown(options(loss)).replace("---:", "---"),
        f"On the command line: `--method '{name}({option_example(loss)})'`. In Python: `criterion='{name}'`, or the "
        f"module `coss_hf.losses.{loss.__name__}`.",
        "## Example",
        f"```pycon\n{inspect.cleandoc(parts['Example'])}\n```",
        "## Results",
        results_of(name),
        "## Citation",
        plain(paragraphs(parts.get("References", ""))),
    ]
    if loss.citation is not None:
        page.append(f"```bibtex\n{loss.citation.bibtex(f'{name}{loss.citation.year}')}\n```")
    return "\n\n".join(page).replace("\n\n* ", "\n* ").replace("## What it needs\n*", "## What it needs\n\n*") + "\n"


def option_example(loss: type) -> str:
    """The first option with its default."""
    found = inspect.signature(loss).parameters.values()
    return next(
        f"{one.name}={one.default}" for one in found if one.name not in GIVEN_BY_THE_RUN and one.default is not None
    )


def methods_table() -> str:
    """All methods with what they compare and when to take them."""
    lines = [["method", "what it compares", "take it when"]]
    for name, loss in own_losses().items():
        parts = sections(inspect.getdoc(loss))
        summary = plain(paragraphs(parts[""].partition("\n\n")[0]))
        use = plain(paragraphs(parts["Use when"])).split(". ")[0].rstrip(".")
        lines.append([f"[`{name}`](methods/{name}.md)", summary, f"{use}."])
    return as_markdown(lines).replace("---:", "---")


def own_losses() -> dict[str, type]:
    """Losses of the package; tests and users may have registered others."""
    return {name: loss for name, loss in LOSSES.items() if loss.__module__.startswith("coss_hf.")}


# --- the pages -------------------------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """A page with its tables renewed."""
    tables = {table.__name__: table for table in (*TABLES, methods_table)}
    return BLOCK.sub(lambda found: f"<!-- begin: {found[1]} -->\n{tables[found[1]]()}\n<!-- end: {found[1]} -->", text)


def pages() -> dict[Path, str]:
    """All pages that hold something generated, by path."""
    found = {DOCS / "methods" / f"{name}.md": method_page(name) for name in own_losses()}
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        if path not in found and BLOCK.search(path.read_text()):
            found[path] = filled(path.read_text())
    return found


if __name__ == "__main__":
    front_picture(DOCS / "images" / "front_page.png")
    photograph_picture(DOCS / "images" / "photographs.png")
    cifar100_pictures(DOCS / "images")
    for page, content in pages().items():
        page.write_text(content)
        print(page.relative_to(ROOT))
