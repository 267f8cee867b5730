"""Tests of pictures.py: what a figure shows, how queries are chosen, files, refusals."""

import re
from itertools import product

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from PIL import Image

from figures import charts as figures
from figures import image_grids as pictures
from figures.charts import STYLE
from figures.image_grids import RIGHT, WRONG, ranked_lists

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


@pytest.fixture
def draw(monkeypatch):
    """`ranked_lists` that returns its figure."""

    def run(**arguments):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "draw", lambda path, make: figures.append(make()))
            ranked_lists("unused.png", **arguments)
        return figures[0]

    return run


def shown(figure) -> list[list[int]]:
    """The shades of the images, row by row from the left."""
    places = {}
    for image in figure.axes[0].images:
        left, _, _, top = image.get_extent()
        places.setdefault(top, []).append((left, int(np.asarray(image.get_array())[0, 0, 0])))
    return [[shade for _, shade in sorted(row)] for _, row in sorted(places.items())]


def framed(figure) -> list[list[bool]]:
    """For each query whether its answers are framed as right, from the left."""
    places = {}
    for frame in figure.axes[0].patches:
        if not frame.get_fill():
            solid = frame.get_linestyle() in ("-", "solid")
            right = frame.get_edgecolor()[:3] == to_rgb(RIGHT.color)
            assert right or frame.get_edgecolor()[:3] == to_rgb(WRONG.color)
            assert solid == right
            places.setdefault(frame.get_y(), []).append((frame.get_x(), right))
    return [[right for _, right in sorted(row)] for _, row in sorted(places.items())][:-1]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def nearest(distances, ignored) -> list[int]:
    """Naively: counted gallery rows by distance, then by row."""
    return [j for _, j in sorted((d, j) for j, d in enumerate(distances) if not ignored[j])]


# ---------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("seed", range(4))
def test_images_and_frames_against_a_naive_ranking(draw, seed):
    given = inputs(seed)
    rng = np.random.default_rng(100 + seed)
    given["distmat"] = rng.integers(0, 4, (Q, G))  # many ties
    excluded = rng.random((Q, G)) < 0.4
    queries = [4, 0, 2]
    figure = draw(**given, excluded=excluded, queries=queries, top=5)
    expected = [nearest(given["distmat"][q], excluded[q])[:5] for q in queries]
    assert shown(figure) == [
        [10 + q, *(100 + j for j in row)] for q, row in zip(queries, expected, strict=True)
    ]
    assert framed(figure) == [
        [bool(G_PIDS[j] == Q_PIDS[q]) for j in row]
        for q, row in zip(queries, expected, strict=True)
    ]


def test_marks_agree_with_frames(draw):
    figure = draw(**inputs(), queries=[0, 1, 2], top=4)
    right = sum(map(sum, framed(figure)))
    assert texts(figure).count(RIGHT.mark) == right + 1  # and the legend
    assert texts(figure).count(WRONG.mark) == 12 - right + 1


def test_a_note_gives_first_hit_and_average_precision(draw):
    given = inputs()
    given["distmat"] = np.arange(Q * G, dtype=float).reshape(Q, G)  # in gallery order
    excluded = np.zeros((Q, G), bool)
    excluded[4, 2] = True  # of 9: 3 7 3 7 9 3 7 9
    words = texts(draw(**given, excluded=excluded, queries=[2, 4]))
    assert [w for w in words if w.startswith("identity")] == ["identity 7", "identity 9"]
    assert [w for w in words if w.startswith("first hit")] == ["first hit: 2", "first hit: 5"]
    expected = [(1 / 2 + 2 / 5 + 3 / 8) / 3, (1 / 5 + 2 / 8) / 2]
    assert [w for w in words if w.startswith("AP")] == [f"AP: {100 * ap:.1f} %" for ap in expected]


def test_a_query_without_right_answer_says_so(draw):
    excluded = np.zeros((Q, G), bool)
    excluded[0] = G_PIDS == 3
    words = texts(draw(**inputs(), excluded=excluded, queries=[0]))
    assert "no right answer" in words and not any(w.startswith("AP") for w in words)


def test_a_query_whose_gallery_is_empty_has_an_empty_row(draw):
    excluded = np.zeros((Q, G), bool)
    excluded[0] = True
    assert [len(row) for row in shown(draw(**inputs(), excluded=excluded, queries=[0, 1]))] == [
        1,
        1 + G,
    ]


def test_top_is_cut_to_the_gallery(draw):
    figure = draw(**inputs(), queries=[0], top=50)
    assert [len(row) for row in shown(figure)] == [1 + G]
    assert [w for w in texts(figure) if w.isdigit()] == [str(rank) for rank in range(1, G + 1)]


def test_images_are_shown_as_they_are(draw):
    given = inputs()
    given["query_images"][0, :12] = (200, 30, 60)  # upper half
    image = draw(**given, queries=[0]).axes[0].images[0]
    assert image.get_extent()[2] > image.get_extent()[3]  # row 0 on top
    pixels = np.asarray(image.get_array())
    assert np.abs(pixels[2, 2].astype(int) - (200, 30, 60)).max() <= 2
    assert np.abs(pixels[-3, -3].astype(int) - 10).max() <= 2


# ------------------------------------------------------------------------------ choice of queries


def many(success_share: float, count: int = 200) -> dict:
    """Queries of whom so many have a right nearest image."""
    distmat = np.tile([1.0, 2.0], (count, 1))
    distmat[: round(success_share * count)] = [2.0, 1.0]
    images = flat_images(0, count)
    return {
        "query_images": images,
        "gallery_images": images[:2],
        "distmat": distmat,
        "q_pids": np.zeros(count, int),
        "g_pids": np.array([1, 0]),
    }


@pytest.mark.parametrize(
    ("success_share", "count", "expected"),
    [
        (0.5, 8, (4, 4)),
        (0.75, 8, (6, 2)),
        (0.99, 8, (6, 2)),  # a quarter of the rows shows failures, however rare
        (0.02, 8, (2, 6)),
        (0.005, 8, (1, 7)),  # there is only one
        (1.0, 8, (8, 0)),
        (0.0, 8, (0, 8)),
        (0.7, 1, (1, 0)),
        (0.7, 2, (1, 1)),
        (0.5, 1000, (100, 100)),
    ],
)
def test_successes_and_failures_are_shown_and_counted(draw, success_share, count, expected):
    figure = draw(**many(success_share), num_queries=count)
    rows = framed(figure)
    assert (sum(row[0] for row in rows), sum(not row[0] for row in rows)) == expected
    words = " ".join(texts(figure))
    total = round(200 * success_share)
    assert "at random (seed 0)" in words
    assert f"{expected[0]} of the {total} whose" in words
    assert f"{expected[1]} of the {200 - total} whose" in words


def test_the_choice_is_a_function_of_the_seed(draw):
    first, again, other = (shown(draw(**many(0.6), seed=seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert len({row[0] for row in first}) == 8


def test_every_query_of_a_kind_can_be_chosen(draw):
    chosen = {row[0] for seed in range(20) for row in shown(draw(**many(0.5, 12), seed=seed))}
    assert chosen == set(range(12))


def test_queries_without_right_answer_are_not_drawn(draw):
    excluded = np.zeros((Q, G), bool)
    excluded[:4] = (Q_PIDS[:4, None] == G_PIDS) | (np.arange(G) < 2)
    assert {row[0] for row in shown(draw(**inputs(), excluded=excluded))} == {14, 15}


def test_an_excluded_image_is_no_success(draw):
    given = many(1.0, 4)
    given["g_pids"] = np.array([0, 0, 1])
    given["gallery_images"] = flat_images(0, 3)
    given["distmat"] = np.tile([3.0, 1.0, 2.0], (4, 1))
    excluded = np.tile([False, True, False], (4, 1))
    words = " ".join(texts(draw(**given, excluded=excluded)))
    assert "0 of the 0 whose nearest image is right, 4 of the 4" in words
    assert "ignores" in words


def test_queries_named_are_not_called_random(draw):
    words = " ".join(texts(draw(**inputs(), queries=(5, 5))))
    assert "by hand" in words and "random" not in words and "ignores" not in words


def test_global_generators_and_settings_are_left_alone(tmp_path):
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    settings = dict(matplotlib.rcParams)
    ranked_lists(tmp_path / "a.png", **inputs())
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert dict(matplotlib.rcParams) == settings
    assert not hasattr(pictures, "plt")


# ------------------------------------------------------------------------------------- legibility


@pytest.mark.parametrize(("top", "queries"), [(1, [0]), (3, [0, 1]), (9, list(range(Q)))])
@pytest.mark.parametrize("title", ["", "stand-in RegDB: infrared to visible, trial 1 of 10 " * 3])
def test_no_text_leaves_the_page_or_covers_another(draw, top, queries, title):
    given = inputs()
    given["q_pids"], given["g_pids"] = Q_PIDS + 9000, G_PIDS + 9000
    figure = draw(**given, top=top, queries=queries, title=title)
    figure.canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.axes[0].texts if t.get_text()]
    width, height = figure.bbox.size
    for words, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, words
    for i, (words, box) in enumerate(boxes):
        for others, other in boxes[:i]:
            if {words, others} & {RIGHT.mark, WRONG.mark}:
                continue  # in badges of their own
            overlap = (
                min(box.x1, other.x1) - max(box.x0, other.x0),
                min(box.y1, other.y1) - max(box.y0, other.y0),
            )
            assert min(overlap) <= 2, (words, others)


def test_no_font_is_under_eight_points(draw):
    figure = draw(**inputs(), title="title")
    assert min(text.get_fontsize() for text in figure.axes[0].texts) >= 8
    with matplotlib.rc_context(fname=STYLE):
        for name, value in matplotlib.rcParams.items():
            if name.endswith("size") and ("font" in name or "label" in name or "title" in name):
                points = FontProperties(size=value).get_size_in_points()
                assert points >= 8, name


def test_the_style_file_has_no_mistake(caplog):
    with matplotlib.rc_context(fname=STYLE):
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()
    assert not caplog.records
    assert len(set(cycle["color"])) == len(set(map(str, cycle["linestyle"]))) == 7


def test_kinds_of_answer_differ_without_colour():
    def grey(color):
        return np.dot(to_rgb(color), (0.299, 0.587, 0.114))

    assert grey(WRONG.color) - grey(RIGHT.color) > 0.25
    assert RIGHT.dashes != WRONG.dashes and RIGHT.mark != WRONG.mark


def test_the_title_is_text_and_is_wrapped(draw):
    title = "price $5 and $6: \\alpha_i\nsecond line " + "word " * 60
    figure = draw(**inputs(), title=title)
    assert not any(text.get_parse_math() for text in figure.axes[0].texts)
    lines = texts(figure)
    assert lines[0] == "price $5 and $6: \\alpha_i"
    assert lines[1].startswith("second line word")
    assert " ".join(lines[1:]).count("word") == 60


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF")]
)
def test_files(tmp_path, name, magic):
    ranked_lists(tmp_path / name, **inputs(), title="x")
    first = (tmp_path / name).read_bytes()
    assert first.startswith(magic)
    ranked_lists(str(tmp_path / name), **inputs(), title="x")
    assert (tmp_path / name).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_png_is_small_and_keeps_its_colours(tmp_path):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:288, :144] / 144
    shape = np.sin(np.multiply.outer(rng.uniform(2, 9, (8, 3)), x + y)).transpose(0, 2, 3, 1)
    visible = (127 + 100 * shape + rng.normal(0, 4, shape.shape)).clip(0, 255).astype(np.uint8)
    visible[:, 200:230, 20:40] = rare = (250, 20, 230)  # a small bag
    path = tmp_path / "a.png"
    ranked_lists(
        path,
        query_images=visible,
        gallery_images=np.repeat(visible, 3, axis=0),
        distmat=rng.random((8, 24)),
        q_pids=np.arange(8),
        g_pids=np.repeat(np.arange(8), 3),
    )
    assert path.stat().st_size < 300_000
    image = Image.open(path)
    assert image.width / image.info["dpi"][0] <= 7.2  # inches
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    pixels = np.asarray(image.convert("RGB"), int).reshape(-1, 3)
    for color in (RIGHT.color, WRONG.color, "white", [v / 255 for v in rare]):
        distance = np.abs(pixels - 255 * np.array(to_rgb(color))).max(axis=1)
        assert (distance <= 6).sum() > 500, color


def test_a_failure_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"former")

    def fail(image, colors):
        raise OSError("disk full")

    monkeypatch.setattr(figures, "palette", fail)
    with pytest.raises(OSError, match="disk full"):
        ranked_lists(path, **inputs())
    assert path.read_bytes() == b"former" and len(list(tmp_path.iterdir())) == 1


def test_memory_maps_are_accepted(tmp_path):
    given = inputs()
    np.save(tmp_path / "g.npy", given["gallery_images"])
    given["gallery_images"] = np.load(tmp_path / "g.npy", mmap_mode="r")
    ranked_lists(tmp_path / "a.png", **given)
    assert (tmp_path / "a.png").stat().st_size > 1000


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distmat": np.zeros(G)}, r"distmat has shape \(9,\)"),
        ({"distmat": np.zeros((0, G))}, r"distmat has shape \(0, 9\)"),
        ({"distmat": np.zeros((Q, G), complex)}, "complex128"),
        ({"distmat": np.full((Q, G), np.nan)}, r"distmat\[0, 0\] is nan"),
        ({"distmat": np.full((Q, G), np.inf)}, r"distmat\[0, 0\] is inf"),
        ({"distmat": np.zeros((G, Q))}, r"q_pids has shape \(6,\).*expected \(9,\)"),
        ({"q_pids": np.zeros(5, int)}, r"q_pids has shape \(5,\).*expected \(6,\)"),
        ({"g_pids": np.zeros((G, 1), int)}, r"g_pids has shape \(9, 1\)"),
        ({"query_images": flat_images(0, 5)}, r"query_images has shape \(5, 24, 12, 3\)"),
        ({"query_images": flat_images(0, Q)[..., 0]}, r"query_images.*expected \(6, .*, 3\)"),
        ({"query_images": flat_images(0, Q)[:, :0]}, r"query_images has shape \(6, 0, 12, 3\)"),
        ({"query_images": flat_images(0, Q) / 255}, "float64.*expected.*uint8"),
        ({"gallery_images": flat_images(0, Q)}, r"gallery_images has shape \(6, 24, 12, 3\)"),
        (
            {"gallery_images": flat_images(0, G)[:, ::2]},
            r"gallery_images has shape \(9, 12, 12, 3\).*expected \(9, 24, 12, 3\)",
        ),
        ({"excluded": np.zeros((Q, 1), bool)}, r"excluded has shape \(6, 1\)"),
        ({"excluded": np.zeros((Q, G), int)}, "excluded.*int64.*expected.*bool"),
        ({"excluded": np.ones((Q, G), bool)}, "none of 6 queries"),
        ({"g_pids": G_PIDS + 50}, "none of 6 queries.*share identities"),
        ({"queries": []}, r"queries is \[\]"),
        ({"queries": [0.5]}, r"queries is \[0.5\]"),
        ({"queries": [0, 6]}, "from 0 to 5"),
        ({"queries": [-1]}, "from 0 to 5"),
        ({"num_queries": 0}, "num_queries 0"),
        ({"top": 0}, "top is 0"),
    ],
)
def test_bad_input(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ranked_lists(tmp_path / "a.png", **(inputs() | change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a.jpg", "a.svg", "png"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(".png or .pdf")):
        ranked_lists(tmp_path / name, **inputs())


def test_shares_add_up():
    for count, successes, failures in product(range(1, 12), range(9), range(9)):
        if count <= successes + failures:
            right, wrong = pictures._shares(count, successes, failures)
            assert right + wrong == count
            assert 0 <= right <= successes and 0 <= wrong <= failures
            assert right >= min(successes, count // 4) and wrong >= min(failures, count // 4)


# ------------------------------------------------------------------------------ unknown identities


def unknown(**more) -> dict:
    given = inputs() | {"q_pids": None, "g_pids": None}
    return given | {"query_names": [f"camera/{i}.jpg" for i in range(Q)]} | more


def test_unknown_identities_are_framed_alike_with_their_scores(draw):
    given = unknown(queries=[3, 1], top=4)
    given["distmat"] = given["distmat"] - 0.5
    figure = draw(**given)
    expected = [nearest(given["distmat"][q], np.zeros(G, bool))[:4] for q in (3, 1)]
    assert shown(figure) == [
        [10 + q, *(100 + j for j in row)] for q, row in zip((3, 1), expected, strict=True)
    ]
    colors = {patch.get_edgecolor() for patch in figure.axes[0].patches}
    assert len(colors) == 1 and not colors & {to_rgb(RIGHT.color), to_rgb(WRONG.color)}
    words = texts(figure)
    assert not {RIGHT.mark, WRONG.mark} & set(words)
    for q, row in zip((3, 1), expected, strict=True):
        for j in row:
            assert f"{-given['distmat'][q, j]:.2f}".replace("-", "\N{MINUS SIGN}") in words
        assert f"camera/{q}.jpg" in words
    assert not any(word.startswith(("identity", "AP", "first hit", "right")) for word in words)


def test_unknown_queries_are_all_shown_or_drawn_at_random(draw):
    assert "All 6 queries." in texts(draw(**unknown()))
    assert "4 of 6 queries, drawn at random (seed 0)." in texts(draw(**unknown(num_queries=4)))


def test_a_long_name_is_folded_and_its_end_is_kept(draw):
    names = ["a/very/long/folder/" * 6 + f"and_{i}.jpg" for i in range(Q)]
    figure = draw(**unknown(query_names=names, queries=[2]))
    words = "".join(texts(figure))
    assert "\N{HORIZONTAL ELLIPSIS}" in words and "and_2.jpg" in words
    figure.canvas.draw()
    first = min(image.get_extent()[0] for image in figure.axes[0].images[1:])
    for text in figure.axes[0].texts:
        if text.get_ha() == "left" and text.get_position()[1] > 40:
            right = figure.axes[0].transData.inverted().transform(text.get_window_extent().max)[0]
            assert right <= first


def test_names_are_one_a_query(tmp_path):
    with pytest.raises(ValueError, match="2 query_names, expected 6"):
        ranked_lists(tmp_path / "a.png", **unknown(query_names=["a", "b"]))


# -------------------------------------------------------------------------------------- the memory


def page_of(monkeypatch, function, *arguments, **options):
    """The figure that a function draws."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "draw", lambda path, make: made.append(make()))
        function("unused.png", *arguments, **options)
    return made[0]


def fired(maps, numbers=None, size=50):
    maps = np.asarray(maps, np.float32)
    rows = np.arange(len(maps))[:, None] * 10 + np.arange(maps.shape[1])
    return pictures.Fired(size, rows if numbers is None else np.asarray(numbers), maps)


def rich(seed=0):
    return fired(np.random.default_rng(seed).random((2, 3, 6, 3)))


LEGIBLE = {"images": flat_images(10, 2), "names": ["identity 1\nvisible", "identity 1\ninfrared"]}


def test_addressing_has_a_heat_map_for_each_prototype(monkeypatch):
    levels = {"part": rich(), "instance": rich(1), "semantic": rich(2)}
    figure = page_of(monkeypatch, pictures.addressing, **LEGIBLE, levels=levels, title="t")
    assert len(figure.axes[0].images) == 2 * (1 + 9) + 1  # and the scale
    words = texts(figure)
    assert {"identity 1", "visible", "infrared", "0", "2", "12"} <= set(words)
    assert "part, 50 in all" in words
    assert words.count("weights from 0 to 99 %") + words.count("weights from 0 to 100 %") >= 1
    assert min(text.get_fontsize() for text in figure.axes[0].texts) >= 8


def test_nothing_addressed_and_all_alike_are_said(monkeypatch):
    none = fired(np.zeros((2, 3, 6, 3)), np.full((2, 3), -1))
    alike = fired(np.full((2, 3, 6, 3), 1 / 150))
    part = fired([np.eye(6)[:1, None, :3].repeat(6, 1).repeat(3, 0) * 0.04] * 2)
    levels = {"part": part, "instance": none, "semantic": alike}
    figure = page_of(monkeypatch, pictures.addressing, **LEGIBLE, levels=levels)
    words = texts(figure)
    assert words.count("none") == words.count("alike") == 6
    assert "reads zero everywhere" in words
    assert "the same everywhere: 0.67 %" in words
    assert "weights from 0 to 4.00 %" in words
    assert len(figure.axes[0].images) == 2 + 6 + 1


def test_heat_darkens_where_a_prototype_fires_and_keeps_the_image_elsewhere():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 30, 3), dtype=np.uint8)
    shares = np.zeros((6, 3))
    shares[2, 1], shares[4, 2] = 1, 0.3
    heated = pictures._heated(image, shares).astype(float)
    grey = heated @ (0.299, 0.587, 0.114)
    cells = grey.reshape(6, 10, 3, 10).mean(axis=(1, 3))
    cold = np.delete(cells.ravel(), [7, 14])
    assert cells[2, 1] < cells[4, 2] < cold.min()
    untouched = heated[:10].mean(axis=2)
    assert np.corrcoef(untouched.ravel(), image[:10].mean(axis=2).ravel())[0, 1] > 0.999
    assert (heated[:10].max(axis=2) == heated[:10].min(axis=2)).all()  # grey


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": flat_images(0, 2)[:0]}, r"images \(0, 24, 12, 3\)"),
        ({"names": ["one"]}, "1 names"),
        ({"levels": {}}, "0 levels"),
        ({"levels": {"part": fired(np.zeros((3, 1, 2, 2)))}}, "part: shapes"),
        ({"levels": {"part": fired(np.zeros((2, 1, 2, 2)), np.zeros((2, 4)))}}, "part: shapes"),
    ],
)
def test_addressing_refusals(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pictures.addressing(tmp_path / "a.png", **(LEGIBLE | {"levels": {"part": rich()}} | change))


def patches(visible: int, infrared: int, name="part 7\n2 % of reads") -> pictures.Patches:
    sides = [np.full((n, 9, 9, 3), 40 * n, np.uint8) for n in (visible, infrared)]
    return pictures.Patches(name, *sides, np.linspace(1, 0.5, visible), np.full(infrared, 0.25))


def test_prototypes_show_their_patches_and_weights(monkeypatch):
    rows = [patches(3, 2), patches(0, 1, "part 9\n1 % of reads")]
    figure = page_of(monkeypatch, pictures.prototypes, rows, title="t", note="n")
    assert len(figure.axes[0].images) == 6
    words = texts(figure)
    assert {"part 7", "part 9", "1.00", "0.75", "0.50", "visible patches"} <= set(words)
    assert words.count("0.25") == 3
    assert words.count("none addresses it") == 1
    extents = [image.get_extent() for image in figure.axes[0].images]
    assert len({(left, top) for left, _, _, top in extents}) == 6
    assert min(text.get_fontsize() for text in figure.axes[0].texts) >= 8


def test_pictures_of_the_memory_are_files(tmp_path):
    pictures.addressing(tmp_path / "a.png", **LEGIBLE, levels={"part": rich()})
    pictures.prototypes(tmp_path / "b.pdf", [patches(2, 2)])
    assert (tmp_path / "a.png").stat().st_size > 2000 < (tmp_path / "b.pdf").stat().st_size
    with pytest.raises(ValueError, match="no prototype"):
        pictures.prototypes(tmp_path / "c.png", [])
