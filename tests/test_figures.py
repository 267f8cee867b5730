"""Tests of figures/charts.py and page.py: what is shown, that it can be read, what is refused."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from figures import charts, page
from figures.charts import (
    cmc_curves,
    distance_histograms,
    embedding,
    memory_health,
    misordered,
    training_curves,
)


@pytest.fixture
def draw(tmp_path):
    """Calls a drawing function and returns its figure, saved; all of it fits its width."""

    def run(function, *arguments, **options):
        figure = function(*arguments, **options)
        page.save(figure, tmp_path / "a.png")
        assert figure.get_tightbbox().width <= figure.get_figwidth() + 0.1
        return figure

    return run


def words(figure):
    """All texts, with spaces for line ends."""
    return " ".join(" ".join(t.get_text().split()) for t in figure.findobj(Text))


# ------------------------------------------------------------------------------------------- CMC


def run(name, cmc, mean_ap, re_rank="no"):
    return name, {"cmc": cmc, "mAP": mean_ap, "re_rank": re_rank}


RUNS = [
    run("MG-MRA", np.linspace(0.5, 0.9, 20), 0.61),
    run("HCT for $5", np.linspace(0.2, 0.6, 20), 0.25, "random_walk"),
]


def test_cmc_curves_are_percent_over_ranks(draw):
    figure = draw(cmc_curves, RUNS, title="stand-in data")
    first, second = figure.axes[0].lines
    np.testing.assert_allclose(first.get_xdata(), np.arange(1, 21))
    np.testing.assert_allclose(second.get_ydata(), 100 * RUNS[1][1]["cmc"])
    text = words(figure)
    assert "stand-in data" in text
    assert "MG-MRA: Rank-1 50.0, mAP 61.0" in text
    assert "HCT for $5, random_walk: Rank-1 20.0, mAP 25.0" in text  # no formula


def test_long_names_stay_inside_the_figure(draw):
    runs = [run("a_folder_name_without_any_space/" * 4, [0.5], 0.5), run("word " * 30, [0.5], 0.5)]
    title = "price $5 and $6: \\alpha_i\nsecond line " + "word " * 60
    text = words(draw(cmc_curves, runs, title=title))
    assert "price $5 and $6: \\alpha_i" in text and text.count("word") == 90


def test_seven_runs_differ_in_line_and_marker(draw):
    figure = draw(cmc_curves, [run(f"run {i}", [0.1, 0.2], 0.1) for i in range(7)])
    lines = figure.axes[0].lines
    for looks in ("get_color", "get_marker"):
        assert len({getattr(line, looks)() for line in lines}) == 7
    assert len({(line._dash_pattern[0], str(line._dash_pattern[1])) for line in lines}) == 7


@pytest.mark.parametrize("cmc", [[1.0], [0.0, 0.0, 0.3], np.ones(50)])
def test_cmc_of_any_length(draw, cmc):
    assert len(draw(cmc_curves, [run("a", cmc, 0.5)]).axes[0].lines[0].get_xdata()) == len(cmc)


def test_more_curves_than_can_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="8 runs, expected 1 to 7"):
        cmc_curves([run(str(i), [0.1], 0.1) for i in range(8)])


def test_the_legend_is_part_of_the_file_and_keeps_numbers_whole(draw, tmp_path):
    runs = [run("runs/MGMRA_regdb_trial1/test_regdb_v2i_trial1_last" * 2, [0.5], 0.25)]
    figure = draw(cmc_curves, runs)
    (legend,) = figure.legends
    drawn, box = figure.get_tightbbox(), legend.get_window_extent()
    assert drawn.x0 * figure.dpi <= box.x0 and box.x1 <= drawn.x1 * figure.dpi + 1
    assert drawn.y0 * figure.dpi <= box.y0 + 1
    assert "mAP\N{NO-BREAK SPACE}25.0" in legend.get_texts()[0].get_text()


# ------------------------------------------------------------------------------------- distances


def test_misordered_against_naive_pairs():
    rng = np.random.default_rng(0)
    for _ in range(5):
        within, between = rng.integers(0, 6, 13), rng.integers(2, 9, 17)
        naive = np.mean([(b < w) + (b == w) / 2 for w in within for b in between])
        assert misordered(within, between) == pytest.approx(naive)
    assert misordered([1.0, 2.0], [3.0]) == 0
    assert misordered([3.0], [1.0, 2.0]) == 1


def test_histograms_hold_all_pairs_and_say_what_is_misordered(draw):
    rng = np.random.default_rng(0)
    panels = {
        "before": (rng.normal(0.5, 0.1, 300), rng.normal(0.5, 0.1, 900)),
        "after": (rng.normal(0.2, 0.1, 300), rng.normal(0.8, 0.1, 900)),
    }
    figure = draw(distance_histograms, panels, title="t", note="n")
    assert len(figure.axes) == 2
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    for chart, (name, pair) in zip(figure.axes, panels.items(), strict=True):
        different, same = (patch.get_data().values for patch in chart.patches)
        assert different.sum() == pytest.approx(100)
        assert same.sum() == pytest.approx(100)
        assert f"{100 * misordered(*pair):.1f} %" in chart.get_title(loc="left")
        assert name in chart.get_title(loc="left")
        assert chart.patches[0].get_hatch() is None and chart.patches[1].get_hatch()  # in grey
    assert "same identity" in words(figure)
    assert "how often a random pair of different identities is closer" in words(figure)


def test_equal_distances_are_drawn(draw):
    assert draw(distance_histograms, {"a": (np.ones(3), np.ones(4))})


# ------------------------------------------------------------------------------------- embedding


def test_embedding_shows_each_point_by_identity_and_modality(draw):
    rng = np.random.default_rng(0)
    pids = np.repeat([4, 90, 7], 8)
    infrared = np.tile([False] * 4 + [True] * 4, 3)
    points = rng.normal(size=(24, 2)) + pids[:, None]
    figure = draw(embedding, points, pids, infrared, axis_names=("x", "y"), title="t")
    (chart,) = figure.axes
    lines = [line for line in chart.lines if len(line.get_xdata())]
    assert len(lines) == 9  # for each identity: visible, infrared, the line between their centres
    for number, pid in enumerate((4, 7, 90)):
        visible, other, between = lines[3 * number : 3 * number + 3]
        for line, side in ((visible, ~infrared), (other, infrared)):
            np.testing.assert_allclose(line.get_xydata(), points[(pids == pid) & side])
        centers = [points[(pids == pid) & side].mean(axis=0) for side in (~infrared, infrared)]
        np.testing.assert_allclose(between.get_xydata(), centers)
        assert visible.get_marker() == other.get_marker() == "os^"[number]
        assert other.get_markerfacecolor() == "none"  # hides no point
        assert visible.get_markeredgecolor() == other.get_markeredgecolor()
    assert not chart.texts  # nothing that hides a point
    assert [t.get_text() for t in figure.findobj(Text) if t.get_text().isdigit()] == [
        "4",
        "7",
        "90",
    ]


# ------------------------------------------------------------------------------------- a run's log


def log(epochs=6, **more):
    """A log as `fit_loop.fit` writes it, with the mine term of a user's own."""
    lines = []
    for epoch in range(1, epochs + 1):
        line = {"epoch": epoch, "lr": 0.1 / epoch, "id": 9 / epoch, "triplet": 0.0, "mine": 0.3}
        line |= {"total": 10 / epoch, "feature_spread": 0.8, "images_per_second": 99.0}
        for level, survivors in (("part", 0.5), ("instance", 0), ("semantic", 150)):
            line[f"memory/{level}/zero_reads"] = 0.25
            line[f"memory/{level}/survivors"] = survivors
            line[f"memory/{level}/used"] = 0.5
            line[f"memory/{level}/entropy"] = 1.5
        if epoch % 2 == 0:
            line["eval"] = {
                "epoch": epoch,
                "rank1": 0.1 * epoch,
                "mAP": 0.05 * epoch,
                "mINP": 0.01,
                "re_rank": "no",
            }
        lines.append(line | more)
    return lines


def named(chart):
    return {line.get_label(): line for line in chart.lines}


def test_training_curves_show_terms_rate_and_evaluations(draw):
    figure = draw(training_curves, log(), title="MG-MRA: stand-in data")
    loss = next(chart for chart in figure.axes if chart.get_ylabel() == "loss")
    assert set(named(loss)) == {"total", "id", "triplet", "mine"}
    np.testing.assert_allclose(named(loss)["id"].get_ydata(), 9 / np.arange(1, 7))
    assert loss.get_yscale() == "log"
    results = next(c for c in figure.axes if c.get_ylabel() == "evaluation (%)")
    np.testing.assert_allclose(named(results)["Rank-1"].get_xdata(), [2, 4, 6])
    np.testing.assert_allclose(named(results)["Rank-1"].get_ydata(), [20, 40, 60])
    assert {"learning rate", "feature spread"} <= {c.get_ylabel() for c in figure.axes}


def test_a_run_without_evaluations_says_so(draw):
    lines = [{k: v for k, v in line.items() if k != "eval"} for line in log(1)]
    assert "nothing logged" in words(draw(training_curves, lines, title="t"))


def test_eight_terms_still_differ(draw):
    terms = {f"term {i}": 1.0 for i in range(7)}
    lines = [{"epoch": e, "lr": 0.1, **terms, "total": 2.0} for e in (1, 2)]
    figure = draw(training_curves, lines, title="t")
    loss = next(chart for chart in figure.axes if chart.get_ylabel() == "loss")
    looks = {(line.get_color(), line.get_marker()) for line in loss.lines}
    assert len(looks) == len(loss.lines) == 8


def test_memory_health_shows_each_level_and_zero(draw):
    figure = draw(memory_health, log(), title="t")
    by_label = {chart.get_ylabel(): named(chart) for chart in figure.axes}
    assert all(set(lines) == {"part", "instance", "semantic"} for lines in by_label.values())
    zero = by_label["zero reads (% of positions)"]["part"]
    np.testing.assert_allclose(zero.get_ydata(), 25)
    none = by_label["survivors per position"]["instance"]
    np.testing.assert_allclose(none.get_ydata(), 0)
    assert none.axes.get_yscale() == "symlog" and none.axes.get_ylim()[0] < 0


def test_a_single_level_is_drawn_alone(draw):
    lines = [
        {k: v for k, v in line.items() if "inst" not in k and "sem" not in k} for line in log()
    ]
    figure = draw(memory_health, lines, title="SG-MRA")
    assert all(set(named(chart)) == {"part"} for chart in figure.axes)


def test_a_log_without_memory_is_refused():
    with pytest.raises(ValueError, match="no memory"):
        memory_health([{"epoch": 1, "total": 1.0}], title="t")


# ------------------------------------------------------------------------------------------ files


def test_files_are_of_either_kind_and_the_same_each_time(tmp_path):
    settings = dict(matplotlib.rcParams)
    for name, magic in (("a.png", b"\x89PNG"), ("b.PNG", b"\x89PNG"), ("a.pdf", b"%PDF")):
        page.save(cmc_curves(RUNS), tmp_path / name)
        first = (tmp_path / name).read_bytes()
        page.save(cmc_curves(RUNS), str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == first
        assert first.startswith(magic) and 2_000 < len(first) < 300_000
    assert dict(matplotlib.rcParams) == settings  # the reader's own are left alone
    assert len(list(tmp_path.iterdir())) == 3
    with Image.open(tmp_path / "a.png") as image:
        assert round(image.info["dpi"][0]) == 300


def test_title_and_note_can_be_left_to_the_caption(tmp_path):
    sizes = []
    for heading in (True, False):
        figure = training_curves(log(), title="the title")
        page.save(figure, tmp_path / "a.png", heading=heading)
        shown = [t.get_text() for t in figure.findobj(Text) if t.get_visible()]
        assert ("the title" in shown) == any(t.startswith("Loss terms") for t in shown) == heading
        with Image.open(tmp_path / "a.png") as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] > sizes[1][1] + 50


def test_a_failure_leaves_the_former_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    (tmp_path / "a.png").write_bytes(b"former")
    with pytest.raises(OSError, match="disk full"):
        page.save(cmc_curves(RUNS), tmp_path / "a.png")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"former"]


def test_the_style_file_has_no_mistake_and_its_colours_differ_in_grey(caplog):
    with matplotlib.rc_context(fname=page.STYLE):
        look = matplotlib.rcParams["axes.prop_cycle"].by_key()
    assert not caplog.records
    assert len(look["color"]) == len(set(map(str, look["linestyle"]))) == charts.MAX_CURVES
    greys = sorted(255 * np.dot(to_rgb(color), (0.299, 0.587, 0.114)) for color in look["color"])
    assert np.diff(greys).min() > 20 and greys[-1] < 200
