"""Figures: grids of images (PNG), and bars, forest plots and curves with their intervals (SVG).

Drawing alone: nothing here knows of models, scores or training. SVG is written as text, so no
plotting package is needed. Text stays at MIN_TEXT pixels or more on a page of PAGE_WIDTH pixels.
"""

import math
import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

PAGE_WIDTH = 880  # at which GitHub shows a README's pictures
MIN_TEXT = 12
GAP = 4  # pixels between the images of a group
MARGIN = 12  # pixels around all, and between groups beside the gap
GREY, LIGHT = "#777", "#ddd"
# Okabe and Ito's palette, which color-blind readers can tell apart, after a grey for the base.
PALETTE = ["#999", "#E90", "#07B", "#097", "#D50", "#C7A", "#5BE", "#000", "#825", "#173"]
TICK = [(0, 5), (4, 9), (12, 1)], "#173"  # the points of a line, and its color
CROSS = [(0, 0), (10, 10), (5, 5), (10, 0), (0, 10)], "#c22"
MARK_HEIGHT = 15


def contact_sheet(images: torch.Tensor, captions: list[str], columns: int = 4) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1], each enlarged to about 160 pixels above its caption."""
    side = images.shape[-1] * max(1, round(160 / images.shape[-1]))
    cell_width = max(side, 200) + MARGIN
    cell_height = side + 90
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, caption in enumerate(captions):
        left = i % columns * cell_width + GAP
        top = i // columns * cell_height + GAP
        pixels = images[i].permute(1, 2, 0).mul(255).byte()  # (H, W, 3)
        image = Image.fromarray(pixels.numpy())
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(caption, 26)[:4]
        draw.text((left, top + side + GAP), "\n".join(lines), "black", font)
    return sheet


def image_grid(
    rows, row_captions=(), column_captions=(), scale=None, note="", heads=(), framed=(), correct=()
) -> Image.Image:
    """Rows of images with their captions -> one PIL image.

    rows             tensors (C, 3, H, W) in [0, 1], or lists of them, groups set apart: [a, b]
    row_captions     a line above each row
    column_captions  a line above each group; no row is longer than the first
    scale            whole-number magnification, without blur; by default to about 96 pixels
    note, heads      lines below all; a word above each image of a group, the same for all groups
    framed           [row]: which image of each group has a frame
    correct          [row][group][image]: a tick below it, or a cross; an empty group: neither
    """
    rows = [[row] if isinstance(row, torch.Tensor) else row for row in rows]
    height, width = rows[0][0].shape[-2:]
    scale = scale or max(1, round(96 / width))
    height *= scale
    width *= scale
    step = width + GAP
    lefts = [MARGIN]  # of the groups, and where the last one ends
    for group in rows[0]:
        lefts.append(lefts[-1] + len(group) * step + MARGIN)
    right = lefts[-1]
    font = ImageFont.load_default(max(15, 1.1 * MIN_TEXT * right / PAGE_WIDTH))
    line = round(1.5 * font.size)

    # where each line of text stands, and where each row of images begins
    top = GAP
    texts = [(x, top, words) for x, words in zip(lefts, column_captions, strict=False)]
    top += line if column_captions else 0
    for left in lefts[:-1]:
        texts += [(left + i * step, top, word) for i, word in enumerate(heads)]
    top += line if heads else 0
    tops = []
    for r in range(len(rows)):
        if r < len(row_captions):
            texts.append((MARGIN, top, row_captions[r]))
            top += line
        tops.append(top)
        top += height + GAP + (MARK_HEIGHT if any(map(any, correct)) else 0)
    for x, _, words in texts:
        right = max(right, math.ceil(x + font.getlength(words)) + MARGIN)
    for words in textwrap.wrap(note, int(1.9 * right / font.size)):
        texts.append((MARGIN, top, words))
        top += line

    canvas = Image.new("RGB", (right, top + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for x, y, words in texts:
        draw.text((x, y), words, fill="black", font=font)
    for r, row in enumerate(rows):
        y = tops[r]
        below = y + height + GAP
        for g, group in enumerate(row):
            pixels = 255 * group.float().cpu().clamp(0, 1)
            for i, image in enumerate(pixels.byte().permute(0, 2, 3, 1).numpy()):
                x = lefts[g] + i * step
                large = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
                border = 3 if framed and framed[r] == i else 0
                canvas.paste(ImageOps.expand(large, border), (x - border, y - border))
                if correct and correct[r][g]:
                    points, color = TICK if correct[r][g][i] else CROSS
                    draw.line([(x + dx, below + dy) for dx, dy in points], fill=color, width=2)
    return canvas


# ----------------------------------------------------------------------------- plots, as SVG
class Axis(NamedTuple):
    """Values from low to high stand at pixels from start to end; values outside, at its ends."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = min(max((value - self.low) / (self.high - self.low), 0), 1)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """About five round numbers: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


class Svg:
    """A picture PAGE_WIDTH wide on white, so that it reads on a dark page too."""

    def __init__(self, height: int, title: str, note: str = ""):
        box = f'viewBox="0 0 {PAGE_WIDTH} {height}" font-family="sans-serif" font-size="13"'
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{PAGE_WIDTH}" {box}>']
        self.rect(0, 0, PAGE_WIDTH, height, "white")
        self.text(16, 24, title, "start", 16)
        self.text(16, height - 12, note, "start")

    def text(self, x, y, text: str, anchor="middle", size=13) -> None:
        place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"'
        self.parts.append(f"<text {place}>{escape(text)}</text>")

    def line(self, points, color=LIGHT, width=1) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        style = f'fill="none" stroke="{color}" stroke-width="{width}"'
        self.parts.append(f'<polyline points="{path}" {style}/>')

    def rect(self, x, y, width, height, color) -> None:
        size = f'width="{width}" height="{height}"'
        self.parts.append(f'<rect x="{x}" y="{y}" {size} fill="{color}"/>')

    def frame(self, y: Axis, names, log: bool = False) -> None:
        """A line across for each tick of y, a power of ten if `log`; a legend below the title."""
        for tick in y.ticks():
            height = y.at(tick)
            self.line([(60, height), (PAGE_WIDTH - 16, height)])
            self.text(54, height + 4, f"{10**tick if log else tick:.2g}", "end")
        left = 60
        for name, color in zip(names, PALETTE, strict=False):
            self.rect(left, 38, 12, 12, color)
            self.text(left + 17, 49, name, "start")
            left += 40 + 8 * len(name)

    def save(self, path) -> None:
        Path(path).write_text("\n".join([*self.parts, "</svg>\n"]))


def bars(categories: list[str], series: dict, path, title: str, note: str = "") -> None:
    """Shares in [0, 1] side by side. series: {name: [(share, half its interval or None), ...]}."""
    svg = Svg(400, title, note)
    y = Axis(0, 1, 330, 70)
    svg.frame(y, series)
    step = (PAGE_WIDTH - 80) / len(categories)
    width = 0.8 * step / len(series)
    for c, category in enumerate(categories):
        x = 60 + c * step
        svg.text(x + 0.4 * step, 350, category)
        for values, color in zip(series.values(), PALETTE, strict=False):
            share, half = values[c]
            top = y.at(share)
            svg.rect(x, top, width - 2, 330 - top, color)
            if half:
                center = x + width / 2 - 1
                ends = [(center, y.at(share - half)), (center, y.at(share + half))]
                svg.line(ends, "black", 1.5)
            x += width
    svg.save(path)


def forest(panels: list[str], rows: dict, path, title: str, note: str = "") -> None:
    """{name: [(difference, half its interval) for each panel]}; grey where that includes 0."""
    reach = max(abs(value) + half for row in rows.values() for value, half in row) or 1
    bottom = 80 + 24 * len(rows)
    svg = Svg(bottom + 50, title, note)
    width = (PAGE_WIDTH - 270) / len(panels)
    for p, panel in enumerate(panels):
        left = 260 + p * width
        x = Axis(-reach, reach, left, left + width - 20)
        svg.text(x.at(0), 58, panel)
        for tick in x.ticks():
            place = x.at(tick)
            svg.line([(place, 66), (place, bottom)], LIGHT if tick else GREY)
            svg.text(place, bottom + 14, f"{tick:g}")
        for r, (name, row) in enumerate(rows.items()):
            value, half = row[p]
            y = 86 + 24 * r
            if p == 0:
                svg.text(16, y + 4, name, "start")
            color = PALETTE[2] if half < abs(value) else GREY
            svg.line([(x.at(value - half), y), (x.at(value + half), y)], color, 2)
            svg.rect(x.at(value) - 3, y - 3, 6, 6, color)
    svg.save(path)


def curves(series: dict, path, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Lines {name: [(x, y), ...]} through the points that are finite; none at all: no picture."""
    points = [point for row in series.values() for point in row if math.isfinite(point[1])]
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    x = Axis(min(xs), max(xs) + 1e-9, 60, PAGE_WIDTH - 16)
    log = 0 < 20 * min(ys) < max(ys)  # positive, and more than a factor of 20 apart
    scale = math.log10 if log else float
    low = min(ys) if log else min(0, *ys)
    y = Axis(scale(low), scale(max(ys) + 1e-9), 330, 70)
    svg = Svg(384, title)
    svg.frame(y, series, log)
    for tick in x.ticks():
        svg.text(x.at(tick), 350, f"{tick:g}")
    svg.text(470, 374, x_label)
    svg.text(16, 62, y_label, "start")
    for row, color in zip(series.values(), PALETTE, strict=False):
        finite = [(x.at(a), y.at(scale(b))) for a, b in row if math.isfinite(b)]
        svg.line(finite, color, 2)
    svg.save(path)
