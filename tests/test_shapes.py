"""The world of shapes: descriptions are true, edits change one thing, biases have their size.

pytest tests/test_shapes.py
"""

import random

import pytest
import torch

from shapes import (
    COLORS,
    EDITS,
    PLACES,
    SHAPES,
    SPARSE_CHANCES,
    TEXT_LEN,
    USUAL_COLOR,
    Shapes,
    describe,
    is_complete_caption,
    parse_caption,
    random_edit,
    random_scene,
    relation,
    scene_matches,
    to_grid,
    to_objects,
)


def test_descriptions_are_true_parse_and_fit():
    for i in range(3000):
        rng = random.Random(i)
        scene = random_scene(rng, biased=False)
        sparse = describe(scene, rng, *SPARSE_CHANCES)
        for text in (describe(scene), sparse, describe(scene, rng)):
            parsed = parse_caption(text)
            assert parsed is not None, text
            assert scene_matches(parsed, to_grid(scene)), text
            assert len(text.split()) < TEXT_LEN, text
        assert is_complete_caption(parse_caption(describe(scene)))
        assert is_complete_caption(parse_caption(describe(scene, rng)))


def test_no_scene_matches_a_caption_that_does_not_parse():
    grid = to_grid(random_scene(random.Random(0), biased=False))
    for text in ("", "a star and", "two star", "one stars", "a zebra", "a top left star"):
        assert parse_caption(text) is None, text
        assert not scene_matches(parse_caption(text), grid), text


def test_no_caption_matches_a_cell_that_could_not_be_read():
    scene = random_scene(random.Random(0), biased=False, kind="single")
    grid = to_grid(scene)
    grid[scene.objects[0].cell - 1] = -1
    assert not scene_matches(parse_caption(describe(scene)), grid)


def test_a_grid_holds_the_objects_of_its_scene():
    for i in range(100):
        scene = random_scene(random.Random(i), biased=False)
        assert set(to_objects(to_grid(scene))) == set(scene.objects)


@pytest.mark.parametrize(
    "a, b, name",
    [
        (0, 3, "above"),
        (3, 0, "below"),
        (0, 1, "left"),
        (1, 0, "right"),
        (0, 4, None),
        (0, 5, "left"),
    ],
)
def test_relations_are_as_the_picture_shows_them(a, b, name):
    assert relation(a, b) == name


# By kind: objects gone, objects new.
CHANGES = {"recolor": (1, 1), "replace": (1, 1), "move": (1, 1), "add": (0, 1), "remove": (1, 0)}
# What stays of the object that is changed: shape, color, cell.
STAYS = {
    "recolor": (True, False, True),
    "replace": (False, True, True),
    "move": (True, True, False),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind):
    for i in range(300):
        before, instruction, after = random_edit(random.Random(i), kind)
        gone = set(before.objects) - set(after.objects)
        new = set(after.objects) - set(before.objects)
        assert (len(gone), len(new)) == CHANGES[kind]
        assert before.background == after.background
        text = f"{describe(before)} {instruction}"
        assert len(text.split()) < TEXT_LEN, text
        assert all(SHAPES[item.shape] in instruction for item in gone), text
        assert scene_matches(parse_caption(describe(after)), to_grid(after))
        if kind in STAYS:
            (old,) = gone
            (item,) = new
            same = (old.shape == item.shape, old.color == item.color, old.cell == item.cell)
            assert same == STAYS[kind]
            endings = {
                "recolor": COLORS[item.color],
                "replace": SHAPES[item.shape],
                "move": PLACES[item.cell],
            }
            assert instruction.endswith(f" {endings[kind]}")


def test_sparse_captions_leave_out_what_they_should():
    rng = random.Random(0)
    parsed = []
    for _ in range(4000):
        scene = random_scene(rng, False, "pair")
        parsed.append(parse_caption(describe(scene, rng, *SPARSE_CHANCES)))
    colors = sum(phrase.color is not None for caption in parsed for phrase in caption.phrases)
    assert abs(colors / (2 * len(parsed)) - 0.05) < 0.01
    relations = sum(bool(caption.relations) for caption in parsed)
    assert abs(relations / len(parsed) - 0.3) < 0.03


def test_biased_scenes_have_usual_colors():
    rng = random.Random(0)
    usual = 0
    for _ in range(3000):
        (item,) = random_scene(rng, True, "single").objects
        usual += item.color == USUAL_COLOR[item.shape]
    assert abs(usual / 3000 - (0.7 + 0.3 / 8)) < 0.03


def test_splits_share_no_scene_stream():
    reca, understand = Shapes("reca", 24), Shapes("understand", 24)
    assert [reca.scene(i) for i in range(50)] != [understand.scene(i) for i in range(50)]


def test_epochs_share_scenes_but_not_wordings():
    dataset = Shapes("reca", 24)
    first = dataset.__getitems__([(0, i) for i in range(16)])
    second = dataset.__getitems__([(1, i) for i in range(16)])
    assert torch.equal(first["image"], second["image"])
    assert not torch.equal(first["full_caption"], second["full_caption"])


def test_images_are_in_the_unit_range():
    images = Shapes("reca", 24).__getitems__([(0, i) for i in range(16)])["image"]
    assert images.shape == (16, 3, 24, 24)
    assert images.min() >= 0
    assert images.max() <= 1
