import numpy as np
import pytest
from PIL import Image

from coss_hf.reporting import plots
from coss_hf.reporting.plots import (
    SHARED,
    STUDENTS,
    length_plot,
    loss_curve,
    neighbor_picture,
    panel_curves,
    projection_picture,
    quality_plot,
)

GREEN = tuple(int(SHARED[i : i + 2], 16) for i in (1, 3, 5))


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 80, (8, 8), dtype=np.uint8)) for _ in range(12)]


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def green(pixels: np.ndarray) -> int:
    return int((pixels == GREEN).all(2).sum())


def test_neighbor_picture_frames_what_is_shared(tmp_path, images):
    teacher = np.array([[3, 4, 5], [6, 7, 8]])
    pixels = {}
    for name, student in {"none": teacher + 3, "one": [[9, 3, 10], [9, 10, 11]], "all": teacher[:, ::-1]}.items():
        neighbor_picture(tmp_path / f"{name}.png", images, [0, 1], student, teacher)
        pixels[name] = read(tmp_path / f"{name}.png")
    # 2 rows x (1 + 3 + 3 columns and two gaps), at 150 dots an inch.
    assert pixels["none"].shape == pixels["all"].shape == (382, 1058, 3)
    assert len(np.unique(pixels["none"].reshape(-1, 3), axis=0)) > 50
    counts = {name: green(array[:-60]) for name, array in pixels.items()}  # the legend is green too
    assert counts["none"] == 0
    assert counts["all"] == pytest.approx(6 * counts["one"], rel=0.1) and counts["one"] > 500


def test_neighbor_picture_reads_only_what_it_shows(tmp_path, images):
    class Lazy:
        read = set()

        def __getitem__(self, row):
            self.read.add(row)
            return images[row]

    neighbor_picture(tmp_path / "a.png", Lazy(), [2], [[5, 7]], [[7, 1]], labels=list("abcdefghijkl"))
    assert Lazy.read == {1, 2, 5, 7}
    neighbor_picture(tmp_path / "b.png", images, [2], [[5, 7]], [[7, 1]])
    assert read(tmp_path / "a.png").shape[0] > read(tmp_path / "b.png").shape[0]  # room for the labels


@pytest.mark.parametrize("student", [[[1, 2]], [[1, 2, 3], [4, 5, 6]], [1, 2, 3]])
def test_neighbor_picture_refuses_shapes_that_differ(tmp_path, images, student):
    with pytest.raises(ValueError, match="must both be"):
        neighbor_picture(tmp_path / "a.png", images, [0], student, [[1, 2, 3]])


def test_loss_curve_has_a_panel_for_every_part(tmp_path):
    history = [{"loss": 3 - i / 10, "images_seen": 128 * i, "step": i, "learning_rate": 0.1} for i in range(1, 20)]
    history += [{"eval_knn10": 0.5, "step": 19}, {"train_loss": 2.0, "step": 19}]
    loss_curve(tmp_path / "whole.png", history)
    parts = [entry | {"l_co": -0.5, "loss_other": i} if "loss" in entry else entry for i, entry in enumerate(history)]
    loss_curve(tmp_path / "parts.png", parts)
    whole, parts = read(tmp_path / "whole.png"), read(tmp_path / "parts.png")
    assert whole.shape == (390, 1050, 3) and parts.shape == (840, 1050, 3)
    assert green(whole) > 500 and green(parts) > 1.5 * green(whole)


def test_loss_curve_without_images_seen_uses_steps(tmp_path):
    loss_curve(tmp_path / "a.png", [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}])
    assert green(read(tmp_path / "a.png")) > 100


def test_loss_curve_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no entry with 'loss'"):
        loss_curve(tmp_path / "a.png", [{"train_loss": 1.0, "step": 1}])


def test_panel_curves_show_what_there_is(tmp_path):
    panels = [{"images_seen": 100 * i, "overlap10": 0.1 * i, "effective_rank": i} for i in range(3)]
    panel_curves(tmp_path / "some.png", panels)
    panel_curves(tmp_path / "all.png", [entry | {"cosine": 0.5, "knn20": None, "probe": 1} for entry in panels])
    some, whole = read(tmp_path / "some.png"), read(tmp_path / "all.png")
    assert whole.shape[0] == 2 * some.shape[0] and green(whole) > green(some) > 100


@pytest.mark.parametrize(
    "labels", [list(range(40)), *[pytest.param(labels, marks=pytest.mark.slow) for labels in (None, [0, 1] * 20)]]
)
def test_projection_picture(tmp_path, labels):
    points = np.random.default_rng(0).normal(size=(40, 2))
    projection_picture(tmp_path / "a.png", points, points[::-1], labels)
    assert len(np.unique(read(tmp_path / "a.png").reshape(-1, 3), axis=0)) > 10


def test_the_projection_has_a_legend(tmp_path):
    points = np.random.default_rng(0).normal(size=(40, 2))
    classes = [0, 1, 2, 3] * 10
    projection_picture(tmp_path / "names.png", points, points, classes, {0: "red", 1: "a long name", 2: "b", 3: "c"})
    projection_picture(tmp_path / "none.png", points, points, None)
    for name in ("names", "none"):
        below = read(tmp_path / f"{name}.png")
        below = below[int(0.9 * below.shape[0]) :]
        assert (below < 200).any(), name


def test_each_student_has_its_own_colour(tmp_path):
    """All students were green."""
    points = {name: (5.0, [0.1 * i, 0.1 * i + 0.02]) for i, name in enumerate(("coss", "random", "plain"), 1)}
    quality_plot(tmp_path / "a.png", points | {"teacher": (9.0, [0.9])}, "probe", "title")
    picture = read(tmp_path / "a.png").reshape(-1, 3).astype(int)
    for color in STUDENTS[:3]:
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(picture - wanted).max(1) < 6).sum() > 20, color
    assert len(set(STUDENTS)) == 8


def test_names_of_slow_networks_stay_in_the_picture(tmp_path, monkeypatch):
    """They stood on the right of their dots, and two ran past the axes."""
    figures = []
    make = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    name = "a network with a rather long name"
    quality_plot(tmp_path / "a.png", {f"{name} {ms}": (ms, [0.5]) for ms in (1.0, 9.0, 10.0)}, "probe", "title")
    axes = figures[0].axes[0]
    figures[0].canvas.draw()
    edges = figures[0].bbox
    texts = [text.get_window_extent() for text in axes.texts]
    assert len(texts) == 3 and all(edges.x0 <= text.x0 and text.x1 <= edges.x1 for text in texts)


def test_the_length_plot_shows_seeds_means_and_the_teacher(tmp_path, monkeypatch):
    figures = []
    make = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    methods = {"CoSS": {0: [0.1], 300: [0.6, 0.8], 100: [0.4]}, "other": {0: [0.1], 300: [0.69]}}
    length_plot(tmp_path / "a.png", {"first": (methods, 0.9), "second": (methods, 0.5)}, "probe")
    read(tmp_path / "a.png")
    for axes, title, teacher in zip(figures[0].axes, ("first", "second"), (90, 50)):
        assert axes.get_title(loc="left") == title and axes.get_ylim() == (0, 105)
        assert [text.get_text() for text in axes.texts] == [f"teacher {teacher}.0", "other 69.0", "CoSS 70.0"]
        heights = [text.get_position()[1] for text in axes.texts[1:]]
        assert heights[1] - heights[0] >= 5, "names that are close to each other are moved apart"
        means = [line for line in axes.lines if len(line.get_xdata()) == 3][0]
        assert [*means.get_xdata()] == [0, 100, 300] and [*means.get_ydata()] == pytest.approx([10, 40, 70])


def test_both_spaces_have_one_scale_and_titles_at_one_height(tmp_path, monkeypatch):
    """Each had a scale of its own, and the student's title was cut off at the top."""
    figures = []
    make = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    points = np.random.default_rng(0).normal(size=(40, 2))
    projection_picture(tmp_path / "a.png", 0.3 * points, points, None)
    left, right = figures[0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert left.get_position().y1 == pytest.approx(right.get_position().y1) and left.get_position().y1 < 0.97
    assert all(axes.get_xlabel().startswith("first component") for axes in (left, right))
