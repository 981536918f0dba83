"""Figures: what stands where, in grids of images and in plots."""

import xml.etree.ElementTree as ElementTree
from unittest.mock import patch

import pytest
import torch
from PIL import ImageFont

from figures import GAP, GREY, MARGIN, PAGE_WIDTH, PALETTE, Axis, bars, curves, forest, image_grid

SIZE, SCALE = 5, 4
SIDE = SIZE * SCALE


def solid(count, value=0.5):
    return torch.full((count, 3, SIZE, SIZE), value)


def pixels(grid):
    """(H, W, 3) in 0 to 255."""
    return torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(*grid.size[::-1], 3)


def test_groups_stand_side_by_side_and_rows_below_each_other():
    grid = pixels(image_grid([[solid(2), solid(1)], [solid(2), solid(1)]], scale=SCALE))
    grey = (grid == 127).all(2)
    assert grey.sum() == 6 * SIDE**2
    columns = grey.any(0).nonzero().flatten()
    step = SIDE + GAP
    expected = [*range(SIDE), *range(step, step + SIDE)]
    expected += range(2 * step + MARGIN, 2 * step + MARGIN + SIDE)
    assert (columns - columns[0]).tolist() == expected
    rows = grey.any(1).nonzero().flatten()
    assert (rows - rows[0]).tolist() == [*range(SIDE), *range(step, step + SIDE)]


def test_captions_heads_and_notes_take_room():
    rows = [[solid(3)]]
    plain = image_grid(rows, scale=SCALE)
    for options in ({"row_captions": ["a"]}, {"column_captions": ["a"]}, {"heads": list("abc")}):
        assert image_grid(rows, scale=SCALE, **options).height > plain.height
    one = image_grid(rows, scale=SCALE, note="short")
    assert one.height > plain.height
    assert one.width == plain.width
    long = image_grid(rows, scale=SCALE, note="a note of several lines " * 4)
    assert long.width == plain.width, "a note is broken into lines"
    assert long.height > one.height


def test_text_is_readable_on_a_page():
    with patch.object(ImageFont, "load_default", side_effect=ImageFont.load_default) as font:
        grid = image_grid([[solid(8), solid(8)]], column_captions=["a", "b"], scale=40)
    assert font.call_args.args[0] * PAGE_WIDTH / grid.width >= 12


def test_a_frame_is_drawn_around_one_image_of_each_group():
    grid = image_grid([[solid(3), solid(3)], [solid(3), solid(3)]], scale=SCALE, framed=[1, 2])
    black = (pixels(grid) == 0).all(2)
    frame = (SIDE + 6) ** 2 - SIDE**2
    assert black.sum() <= 4 * frame
    assert black.sum() > 3 * frame
    columns = black.any(0).nonzero().flatten()
    assert columns[0] == MARGIN + (SIDE + GAP) - 3, "the first images have none"


def test_marks_stand_below_images_and_groups_without_have_none():
    correct = [[[], [True, False]]]
    grid = pixels(image_grid([[solid(2), solid(2)]], scale=SCALE, correct=correct)).int()
    green = (grid[..., 1] > grid[..., 0] + 40).nonzero()
    red = (grid[..., 0] > grid[..., 1] + 40).nonzero()
    second_group = MARGIN + 2 * (SIDE + GAP) + MARGIN
    assert green[:, 1].min() >= second_group
    assert red[:, 1].min() >= second_group + SIDE + GAP
    bottom = (grid == 127).all(2).any(1).nonzero().max()
    assert min(green[:, 0].min(), red[:, 0].min()) > bottom


# ---------------------------------------------------------------- plots


def elements(path, name):
    """Attributes of the elements of that name, in the order in which they were drawn."""
    root = ElementTree.parse(path).getroot()
    return [e.attrib | {"text": e.text} for e in root if e.tag.endswith(f"}}{name}")]


def points(line):
    return [tuple(map(float, point.split(","))) for point in line["points"].split()]


def test_an_axis_is_linear_and_ends_at_its_ends():
    axis = Axis(0, 2, 100, 300)
    assert [axis.at(value) for value in (0, 0.5, 2)] == [100, 150, 300]
    assert [axis.at(value) for value in (-1, 3)] == [100, 300]


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.8, 0.8, [-0.5, 0, 0.5]),
        (3, 97, [20, 40, 60, 80]),
        (0, 5000, [0, 1000, 2000, 3000, 4000, 5000]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert Axis(low, high, 0, 1).ticks() == pytest.approx(ticks)


def test_bars_are_as_high_as_their_shares(tmp_path):
    series = {"base": [(0.5, None), (0.25, None)], "a < b": [(1.0, 0.5), (0.75, 0.1)]}
    bars(["one", "two"], series, tmp_path / "a.svg", "title", "note")
    rects = elements(tmp_path / "a.svg", "rect")[3:]  # after the paper and the legend
    heights = [float(rect["height"]) for rect in rects]
    assert heights == pytest.approx([130, 260, 65, 195], abs=0.1)
    assert [rect["fill"] for rect in rects] == PALETTE[:2] * 2
    intervals = [
        line for line in elements(tmp_path / "a.svg", "polyline") if line["stroke"] == "black"
    ]
    (_, low), (_, high) = points(intervals[1])
    assert low - high == pytest.approx(260 * 0.2, abs=0.2)
    texts = {text["text"] for text in elements(tmp_path / "a.svg", "text")}
    assert {"title", "note", "one", "two", "base", "a < b"} <= texts


def test_a_forest_is_grey_where_an_interval_includes_zero(tmp_path):
    rows = {"a": [(0.5, 0.2), (0.1, 0.2)], "b": [(-0.3, 0.1), (0.0, 0.0)]}
    forest(["x", "y"], rows, tmp_path / "a.svg", "title")
    marks = elements(tmp_path / "a.svg", "rect")[1:]
    assert [mark["fill"] for mark in marks] == [PALETTE[2], PALETTE[2], GREY, GREY]
    zero = [text for text in elements(tmp_path / "a.svg", "text") if text["text"] == "0"]
    assert float(marks[0]["x"]) > float(zero[0]["x"]) > float(marks[1]["x"])


def test_a_forest_of_no_differences_stands_at_zero(tmp_path):
    forest(["x"], {"a": [(0.0, 0.0)]}, tmp_path / "a.svg", "title")
    zero = [text for text in elements(tmp_path / "a.svg", "text") if text["text"] == "0"]
    mark = elements(tmp_path / "a.svg", "rect")[1]
    assert float(mark["x"]) + 3 == float(zero[0]["x"])


def lines_of(path):
    return [line for line in elements(path, "polyline") if line["stroke"] in PALETTE]


def test_curves_leave_out_what_is_not_finite(tmp_path):
    series = {"a": [(0, 0.0), (1, float("nan")), (2, 1.0)], "b": [(0, float("inf"))]}
    curves(series, tmp_path / "a.svg", "title", "step", "loss")
    a, b = lines_of(tmp_path / "a.svg")
    assert points(a) == [(60, 330), (PAGE_WIDTH - 16, 70)]
    assert b["points"] == ""


def test_curves_of_wide_range_are_logarithmic(tmp_path):
    curves({"a": [(0, 0.01), (1, 0.1), (2, 1.0)]}, tmp_path / "a.svg")
    heights = [y for _, y in points(lines_of(tmp_path / "a.svg")[0])]
    assert heights == [330, 200, 70]
    curves({"a": [(0, 0.1), (1, 0.55), (2, 1.0)]}, tmp_path / "b.svg")
    low, middle, high = [y for _, y in points(lines_of(tmp_path / "b.svg")[0])]
    assert low - middle == pytest.approx(middle - high, abs=0.2)


def test_no_points_make_no_picture(tmp_path):
    curves({"a": []}, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
