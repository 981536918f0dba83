"""The exact scorer and the world that it scores: ground truth passes, every wrong color, shape, count and relation fails."""
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as D
import evaluate as E

CELL = 16
ATLAS = D.sprites(CELL)


def scenes_of(category, n, unusual=False):
    rng, out = random.Random(category), []
    kind = E.PROMPTS[category][0]
    while len(out) < n:
        scene = D.random_scene(rng, biased=False, kind=kind)
        out.append((scene, D.describe(scene, rng, *E.PROMPTS[category][1])))
    return out


def cells(scenes):
    images = D.render(torch.tensor([D.to_grid(s) for s in scenes]), torch.tensor([s.background for s in scenes]), ATLAS)
    return E.read_cells(images, ATLAS).tolist(), images


def changed(scene, category):
    """The scene with one thing wrong of the kind that the category is about."""
    first, rest = scene.things[0], scene.things[1:]
    if category in ("color", "attribute", "dense"):
        wrong = (D.Thing(first.shape, (first.color + 3) % len(D.COLORS), first.cell), *rest)
    elif category == "counting":
        free = next(c for c in range(9) if c not in [t.cell for t in scene.things])
        wrong = (*scene.things, D.Thing(first.shape, first.color, free))
    elif category == "position":
        other = scene.things[1]
        wrong = (D.Thing(first.shape, first.color, other.cell), D.Thing(other.shape, other.color, first.cell))
    else:
        shape = next(s for s in range(len(D.SHAPES)) if s not in [t.shape for t in scene.things])
        wrong = (D.Thing(shape, first.color, first.cell), *rest)
    return D.Scene(scene.kind, wrong, scene.background)


@pytest.mark.parametrize("category", E.PROMPTS)
def test_ground_truth_scores_and_what_is_wrong_does_not(category):
    pairs = scenes_of(category, 200)
    right, _ = cells([scene for scene, _ in pairs])
    assert sum(D.holds(D.parse(words), row) for (_, words), row in zip(pairs, right)) >= 0.98 * len(pairs)
    wrong, _ = cells([changed(scene, category) for scene, _ in pairs])
    assert not any(D.holds(D.parse(words), row) for (_, words), row in zip(pairs, wrong))


def test_a_little_noise_is_read_and_static_is_not():
    pairs = scenes_of("two", 64)
    truth, images = cells([scene for scene, _ in pairs])
    noisy = E.read_cells((images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), ATLAS).tolist()
    assert noisy == truth
    assert (E.read_cells(torch.rand(images.shape, generator=torch.Generator().manual_seed(1)), ATLAS) == -1).all()


def test_descriptions_are_true_parse_and_fit():
    for i in range(3000):
        rng = random.Random(i)
        scene = D.random_scene(rng, biased=False)
        for text in (D.describe(scene), D.describe(scene, rng, *D.SPARSE), D.describe(scene, rng)):
            claim = D.parse(text)
            assert claim and D.holds(claim, D.to_grid(scene)), text
            assert len(text.split()) < D.TEXT_LEN, text
        assert D.is_full(D.parse(D.describe(scene))) and D.is_full(D.parse(D.describe(scene, rng)))


def test_relations_are_as_the_picture_shows_them():
    assert [D.relation(a, b) for a, b in ((0, 3), (3, 0), (0, 1), (1, 0), (0, 4), (0, 5))] == ["above", "below", "left", "right", None, "left"]


def test_an_edit_changes_what_it_says_and_nothing_else():
    changes = {"recolor": (1, 1), "replace": (1, 1), "move": (1, 1), "add": (0, 1), "remove": (1, 0)}  # objects gone, objects new
    for kind in D.EDITS:
        for i in range(300):
            before, instruction, after = D.random_edit(random.Random(i), kind)
            gone, new = set(before.things) - set(after.things), set(after.things) - set(before.things)
            assert (len(gone), len(new)) == changes[kind] and before.background == after.background
            words = f"{D.describe(before)} {instruction}"
            assert len(words.split()) < D.TEXT_LEN and all(D.SHAPES[t.shape] in instruction for t in gone), words
            if kind in ("recolor", "replace", "move"):
                (old,), (thing,) = gone, new
                same = [old.shape == thing.shape, old.color == thing.color, old.cell == thing.cell]
                assert same == {"recolor": [True, False, True], "replace": [False, True, True], "move": [True, True, False]}[kind]
                assert instruction.split()[-1 if kind != "move" else slice(-2, None)] == {"recolor": D.COLORS[thing.color], "replace": D.SHAPES[thing.shape],
                                                                                         "move": D.PLACES[thing.cell].split()}[kind]
            assert D.holds(D.parse(D.describe(after)), D.to_grid(after))


def test_sparse_captions_leave_out_what_they_should():
    rng = random.Random(0)
    claims = [D.parse(D.describe(D.random_scene(rng, False, "pair"), rng, *D.SPARSE)) for _ in range(4000)]
    colors = sum(p[1] is not None for c in claims for p in c.phrases) / (2 * len(claims))
    assert abs(colors - 0.05) < 0.01 and abs(sum(bool(c.relations) for c in claims) / len(claims) - 0.3) < 0.03
    usual = [t.color == D.USUAL_COLOR[t.shape] for _ in range(3000) for t in D.random_scene(rng, True, "single").things]
    assert abs(sum(usual) / len(usual) - (0.7 + 0.3 / 8)) < 0.03


def test_splits_share_no_scene_stream_and_epochs_share_scenes():
    a, b = D.Shapes("reca", 24), D.Shapes("understand", 24)
    assert [a.scene(i) for i in range(50)] != [b.scene(i) for i in range(50)]
    one, two = (a.__getitems__([(epoch, i) for i in range(16)]) for epoch in (0, 1))
    assert torch.equal(one["image"], two["image"]) and not torch.equal(one["full"], two["full"])
    assert one["image"].shape == (16, 3, 24, 24) and 0 <= one["image"].min() and one["image"].max() <= 1


def test_unknown_word_and_long_prompt_get_a_sentence():
    vocabulary = D.Shapes("test").vocabulary
    with pytest.raises(ValueError, match="'yelow'.*yellow"):
        vocabulary.encode("a yelow star", 18, strict=True)
    with pytest.raises(ValueError, match="18 words.*at most 17"):
        vocabulary.encode("a star and " * 6, 18, strict=True)
    assert vocabulary.decode(vocabulary.encode("A yellow star", 18)[1:]) == "a yellow star"


def test_distances_of_features():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 5, generator=g), torch.randn(4000, 5, generator=g)
    assert abs(E.frechet(a, b)) < 0.05
    torch.testing.assert_close(E.frechet(a, 2 * b + 3), 5 * (9 + 1.0), rtol=0.03, atol=0)  # |3|^2 + (2 - 1)^2 a dimension
    assert abs(E.mmd(a[:500], b[:500])) < 1e-3 < E.mmd(a[:500], b[:500] + 1)
    low, high = E.interval(0.5, 100)
    assert abs(low - 0.4038) < 1e-3 and abs(high - 0.5962) < 1e-3  # Wilson
