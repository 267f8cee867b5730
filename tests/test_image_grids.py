"""Tests of figures/image_grids.py: what is shown, which queries are drawn, what is refused."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from figures import image_grids, page
from figures.image_grids import RIGHT, WRONG
from figures.prototypes import MODALITIES, Fired, Patches

Q, G, SIZE = 6, 9, (24, 12)
Q_PIDS = np.array([3, 3, 7, 7, 9, 9])
G_PIDS = np.array([3, 7, 9, 3, 7, 9, 3, 7, 9])


def flat_images(first: int, count: int) -> np.ndarray:
    """Images whose one colour tells which they are."""
    shades = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, *SIZE, 3)).copy()


def inputs(seed: int = 0) -> dict:
    return {
        "query_images": flat_images(10, Q),
        "gallery_images": flat_images(100, G),
        "distmat": np.random.default_rng(seed).random((Q, G)),
        "q_pids": Q_PIDS,
        "g_pids": G_PIDS,
    }


def ranked_lists(*, distmat, q_pids=Q_PIDS, g_pids=G_PIDS, excluded=False, **more):
    """Ranked lists by identities and by what the protocol ignores."""
    distmat = np.where(excluded, np.inf, distmat)
    more = {"same": q_pids[:, None] == g_pids, "names": [f"identity {p}" for p in q_pids]} | more
    return image_grids.ranked_lists(distmat=distmat, **more)


def cells(figure) -> list[list]:
    """Axes with an image, row by row from the left."""
    rows: dict[int, list] = {}
    for axes in figure.axes:
        if axes.images:
            rows.setdefault(axes.get_subplotspec().rowspan.start, []).append(axes)
    return list(rows.values())


def shown(figure) -> list[list[int]]:
    """The shades of the images, row by row from the left."""
    return [[int(axes.images[0].get_array()[0, 0, 0]) for axes in row] for row in cells(figure)]


def framed(figure) -> list[list[bool]]:
    """For each query whether its answers are framed as right; colour, line and mark agree."""
    rows = []
    for row in cells(figure):
        rows.append([])
        for axes in row[1:]:
            frame, (mark,) = axes.spines["top"], axes.texts
            right = mark.get_text() == RIGHT.meaning[0]
            assert mark.get_text() == (RIGHT if right else WRONG).meaning[0]
            assert frame.get_edgecolor()[:3] == to_rgb((RIGHT if right else WRONG).color)
            assert frame.get_linestyle() in (("-", "solid") if right else ("--", "dashed"))
            rows[-1].append(right)
    return rows


def texts(figure) -> list[str]:
    """Every line of text."""
    return [line for text in figure.findobj(Text) for line in text.get_text().splitlines()]


def nearest(distances, ignored) -> list[int]:
    """Naively: counted gallery rows by distance, then by row."""
    return [j for _, j in sorted((d, j) for j, d in enumerate(distances) if not ignored[j])]


# ---------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("seed", range(4))
def test_images_and_frames_against_a_naive_ranking(seed):
    given = inputs(seed)
    rng = np.random.default_rng(100 + seed)
    given["distmat"] = rng.integers(0, 4, (Q, G))  # many ties
    excluded = rng.random((Q, G)) < 0.4
    figure = ranked_lists(**given, excluded=excluded, num_queries=Q, top=5)
    queries = [row[0] - 10 for row in shown(figure)]
    assert len(queries) >= Q - 1
    expected = [nearest(given["distmat"][q], excluded[q])[:5] for q in queries]
    assert [row[1:] for row in shown(figure)] == [[100 + j for j in row] for row in expected]
    assert framed(figure) == [
        [bool(G_PIDS[j] == Q_PIDS[q]) for j in row]
        for q, row in zip(queries, expected, strict=True)
    ]


def test_first_hit_and_average_precision_stand_beside_a_query():
    given = inputs()
    given["distmat"] = np.arange(Q * G, dtype=float).reshape(Q, G)  # in gallery order
    excluded = np.zeros((Q, G), bool)
    excluded[:2], excluded[3], excluded[5] = True, True, True  # queries 2 and 4 are left
    excluded[4, 2] = True  # of 9: 3 7 3 7 9 3 7 9
    beside = [row[0].get_ylabel() for row in cells(ranked_lists(**given, excluded=excluded))]
    expected = [(1 / 2 + 2 / 5 + 3 / 8) / 3, (1 / 5 + 2 / 8) / 2]
    assert beside == [
        f"identity 7\nfirst hit: 2\nAP: {100 * expected[0]:.1f} %",
        f"identity 9\nfirst hit: 5\nAP: {100 * expected[1]:.1f} %",
    ]


def test_top_is_cut_to_the_gallery():
    figure = ranked_lists(**inputs(), num_queries=1, top=50)
    assert [len(row) for row in shown(figure)] == [1 + G]
    heads = [axes.get_title() for axes in cells(figure)[0]]
    assert heads == ["query", *(str(rank) for rank in range(1, G + 1))]


# ------------------------------------------------------------------------------ choice of queries


def test_queries_without_right_answer_are_not_drawn():
    excluded = np.zeros((Q, G), bool)
    excluded[:4] = (Q_PIDS[:4, None] == G_PIDS) | (np.arange(G) < 2)
    assert {row[0] for row in shown(ranked_lists(**inputs(), excluded=excluded))} == {14, 15}


# ------------------------------------------------------------------------------------- legibility


def check_width(figure):
    assert figure.get_tightbbox().width <= page.PAGE_WIDTH + 0.1


def test_no_figure_is_wider_than_a_page():
    given = inputs()
    given["q_pids"], given["g_pids"] = Q_PIDS + 9000, G_PIDS + 9000
    for top in (1, 3, 9):
        figure = ranked_lists(
            **given, top=top, title="stand-in RegDB: price $5 and $6, trial 1 " * 3
        )
        check_width(figure)
    for count in (1, 2, 4):
        maps = np.random.default_rng(0).random((2, count, 6, 3))
        levels = dict.fromkeys(("part", "instance", "semantic"), fired(maps))
        check_width(image_grids.addressing(**LEGIBLE, levels=levels))
        rows = [patches(count, count)] * 2
        check_width(image_grids.prototypes(rows, title="t", note="n"))


def test_kinds_of_answer_differ_without_colour():
    def grey(color):
        return np.dot(to_rgb(color), (0.299, 0.587, 0.114))

    assert grey(WRONG.color) - grey(RIGHT.color) > 0.25
    assert RIGHT.line != WRONG.line and RIGHT.meaning[0] != WRONG.meaning[0]


# ------------------------------------------------------------------------------------------ files


def test_memory_maps_are_accepted(tmp_path):
    given = inputs()
    np.save(tmp_path / "g.npy", given["gallery_images"])
    given["gallery_images"] = np.load(tmp_path / "g.npy", mmap_mode="r")
    assert shown(ranked_lists(**given))


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("change", [{"excluded": np.ones((Q, G), bool)}, {"g_pids": G_PIDS + 50}])
def test_queries_without_any_right_answer_are_refused(change):
    with pytest.raises(ValueError, match="none of 6 queries.*share identities"):
        ranked_lists(**(inputs() | change))


# ------------------------------------------------------------------------------ unknown identities


def unknown(**more) -> dict:
    return inputs() | {"same": None, "names": [f"camera/{i}.jpg" for i in range(Q)]} | more


def test_unknown_identities_have_no_frames():
    given = unknown(top=4)
    figure = ranked_lists(**given)
    for q, row in enumerate(cells(figure)):
        expected = nearest(given["distmat"][q], np.zeros(G, bool))[:4]
        assert shown(figure)[q] == [10 + q, *(100 + j for j in expected)]
        assert row[0].get_ylabel() == f"camera/{q}.jpg"
        assert not any(axes.texts or axes.spines["top"].get_visible() for axes in row)


def test_unknown_queries_are_all_shown_or_drawn_at_random():
    assert "Queries drawn at random (seed 0): 6 of 6." in texts(ranked_lists(**unknown()))
    assert "Queries drawn at random (seed 0): 4 of 6." in texts(
        ranked_lists(**unknown(num_queries=4))
    )


def test_of_a_long_name_the_end_is_kept():
    names = ["a/very/long/folder/" * 6 + f"and_{i}.jpg" for i in range(Q)]
    beside = cells(ranked_lists(**unknown(names=names)))[2][0].get_ylabel()
    assert len(beside.splitlines()) == 4
    assert "".join(beside.splitlines()).endswith("and_2.jpg")


# -------------------------------------------------------------------------------------- the memory


def fired(maps, numbers=None, size=50):
    maps = np.asarray(maps, np.float32)
    rows = np.arange(len(maps))[:, None] * 10 + np.arange(maps.shape[1])
    return Fired(size, rows if numbers is None else np.asarray(numbers), maps)


def rich(seed=0):
    return fired(np.random.default_rng(seed).random((2, 3, 6, 3)))


LEGIBLE = {"images": flat_images(10, 2), "names": ["identity 1\nvisible", "identity 1\ninfrared"]}


def test_addressing_has_a_heat_map_for_each_prototype():
    levels = {"part": rich(), "instance": rich(1), "semantic": rich(2)}
    figure = image_grids.addressing(**LEGIBLE, levels=levels, title="t")
    assert [len(row) for row in cells(figure)[:2]] == [1 + 9] * 2
    assert [len(axes.images) for axes in cells(figure)[0]] == [1] + [2] * 9  # heat over the image
    np.testing.assert_allclose(cells(figure)[1][2].images[1].get_array(), levels["part"].maps[1, 1])
    words = texts(figure)
    assert {"identity 1", "visible", "infrared", "0", "2", "12"} <= set(words)
    assert "part, 50 in all" in words
    assert sum(word.startswith("weights from 0 to ") for word in words) == 3


def test_nothing_addressed_and_all_alike_are_said():
    none = fired(np.zeros((2, 3, 6, 3)), np.full((2, 3), -1))
    alike = fired(np.full((2, 3, 6, 3), 1 / 150))
    part = fired([np.eye(6)[:1, None, :3].repeat(6, 1).repeat(3, 0) * 0.04] * 2)
    levels = {"part": part, "instance": none, "semantic": alike}
    figure = image_grids.addressing(**LEGIBLE, levels=levels)
    words = texts(figure)
    assert words.count("none") == words.count("alike") == 6
    assert "reads zero everywhere" in words
    assert "the same everywhere: 0.67 %" in words
    assert "weights from 0 to 4 %" in words
    assert [len(row) for row in cells(figure)] == [1 + 3] * 2


def test_heat_darkens_where_a_prototype_fires_and_keeps_the_image_elsewhere():
    colors = image_grids.HEAT(np.linspace(0, 1, 11))
    over_white = colors[:, 3:] * colors[:, :3] + 1 - colors[:, 3:]
    assert (np.diff(over_white @ (0.299, 0.587, 0.114)) < 0).all()
    assert colors[0, 3] == 0


def patches(visible: int, infrared: int, name="part 7\n2 % of reads") -> Patches:
    sides = [np.full((n, 9, 9, 3), 40 * n, np.uint8) for n in (visible, infrared)]
    weights = np.linspace(1, 0.5, visible), np.full(infrared, 0.25)
    return Patches(name, *(dict(zip(MODALITIES, each, strict=True)) for each in (sides, weights)))


def test_prototypes_show_their_patches_and_weights():
    rows = [patches(3, 2), patches(0, 1, "part 9\n1 % of reads")]
    figure = image_grids.prototypes(rows, title="t", note="n")
    assert [len(row) for row in cells(figure)] == [5, 1]
    words = texts(figure)
    assert {"part 7", "part 9", "1.00", "0.75", "0.50", "visible"} <= set(words)
    assert words.count("0.25") == 3 and words.count("none") == 1
    rectangle = cells(figure)[0][0].patches[0]
    assert rectangle.get_bbox().bounds == (1, 1, 1, 1)  # the middle of 3 x 3 positions
    assert cells(figure)[0][0].images[0].get_extent() == [0, 3, 3, 0]
