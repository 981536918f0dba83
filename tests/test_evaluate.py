"""The exact scorer: ground truth passes; every wrong color, shape, count and relation fails."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
from data import open_splits
from evaluate import (
    PROMPTS,
    compare,
    correct_attributes,
    frechet_distance,
    main,
    mean_with_ci,
    read_cells,
    squared_mmd,
    table,
    wilson_interval,
    write_json,
)
from scripted import scripted, true_images
from shapes import (
    COLORS,
    EDITS,
    SHAPES,
    Scene,
    SceneObject,
    Shapes,
    describe,
    parse_caption,
    random_scene,
    scene_matches,
    to_grid,
)
from words import SPECIALS, Vocabulary

# ---------------------------------------------------------------- reading images


def scenes_of(category, n):
    """n scenes of a category's kind, with descriptions in its wording."""
    rng = random.Random(category)
    kind, chances, _ = PROMPTS[category]
    scenes = [random_scene(rng, biased=False, kind=kind) for _ in range(n)]
    return scenes, [describe(scene, rng, *chances) for scene in scenes]


def free_cell(scene):
    taken = [item.cell for item in scene.objects]
    return next(cell for cell in range(9) if cell not in taken)


def change_first(scene, **changes):
    first, *rest = scene.objects
    return replace(scene, objects=(replace(first, **changes), *rest))


def add_object(scene, item):
    return replace(scene, objects=(*scene.objects, item))


def spoil(scene, category):
    """The scene with one thing wrong, of the kind that the category is about."""
    first = scene.objects[0]
    if category in ("color", "attribute", "dense"):
        return change_first(scene, color=(first.color + 3) % len(COLORS))
    if category == "counting":
        return add_object(scene, replace(first, cell=free_cell(scene)))
    if category == "position":
        a, b = scene.objects
        return replace(scene, objects=(replace(a, cell=b.cell), replace(b, cell=a.cell)))
    taken = [item.shape for item in scene.objects]
    return change_first(scene, shape=next(s for s in range(len(SHAPES)) if s not in taken))


def count_matches(texts, scenes):
    grids = read_cells(true_images(scenes)).tolist()
    pairs = zip(texts, grids, strict=True)
    return sum(scene_matches(parse_caption(text), grid) for text, grid in pairs)


@pytest.mark.parametrize("category", PROMPTS)
def test_ground_truth_scores(category):
    scenes, texts = scenes_of(category, 200)
    assert count_matches(texts, scenes) >= 0.98 * 200


@pytest.mark.parametrize("category", PROMPTS)
def test_what_is_wrong_does_not_score(category):
    scenes, texts = scenes_of(category, 200)
    assert count_matches(texts, [spoil(scene, category) for scene in scenes]) == 0


def test_a_little_noise_is_read_and_static_is_not():
    scenes, _ = scenes_of("two", 64)
    images = true_images(scenes)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + 0.05 * noise).clamp(0, 1)
    assert read_cells(noisy).tolist() == [to_grid(scene) for scene in scenes]
    static = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    assert (read_cells(static) == -1).all()


# ---------------------------------------------------------------- intervals and distances


def test_wilson_interval():
    low, high = wilson_interval(0.5, 100)
    assert low == pytest.approx(0.4038, abs=1e-3)
    assert high == pytest.approx(0.5962, abs=1e-3)


def test_interval_of_a_mean():
    assert mean_with_ci([1.0, 2.0, 3.0]) == (2.0, 3, [0.8684, 3.1316])  # 1.96 * 1 / sqrt(3)
    assert mean_with_ci([1.0])[2] == [-math.inf, math.inf]


def normal_features(seed):
    return torch.randn(4000, 5, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_normal_distributions():
    a, b = normal_features(0), normal_features(1)
    assert abs(frechet_distance(a, b)) < 0.05
    # |3|^2 + (2 - 1)^2 in each of five dimensions
    assert frechet_distance(a, 2 * b + 3) == pytest.approx(50, rel=0.03)


def test_frechet_distance_is_nan_without_features():
    a, b = normal_features(0), normal_features(1)
    assert math.isnan(frechet_distance(a[:1], b))
    assert math.isnan(frechet_distance(a * math.nan, b))


def test_kernel_distance_is_zero_for_one_distribution():
    a, b = normal_features(0)[:500], normal_features(1)[:500]
    assert abs(squared_mmd(a, b)) < 1e-3
    assert squared_mmd(a, b + 1) > 1e-3


# ---------------------------------------------------------------- all scores of a scripted model


def move_odd(i, scene):
    return change_first(scene, cell=free_cell(scene)) if i % 2 else scene


def recolor(i, scene):
    return change_first(scene, color=(scene.objects[0].color + 1) % 8)


def duplicate(i, scene):
    return add_object(scene, replace(scene.objects[0], cell=free_cell(scene)))


COUNT = sum(len(Shapes("test").scene(i).objects) for i in range(40))


def test_a_perfect_reconstruction(monkeypatch):
    scores = evaluate.evaluate(scripted(monkeypatch), 40)
    assert scores["object_recall"] == 1
    assert scores["object_recall_in_place"] == 1
    assert scores["reconstruction"] == 1
    assert scores["psnr"] == pytest.approx(60)


def test_a_moved_object_is_recalled_but_not_in_place(monkeypatch):
    scores = evaluate.evaluate(scripted(monkeypatch, again=move_odd), 40)
    assert scores["object_recall"] == 1
    assert scores["object_recall_in_place"] == pytest.approx((COUNT - 20) / COUNT)
    assert scores["reconstruction"] == 0.5
    assert scores["psnr"] < 50


def test_a_recolored_object_is_not_recalled(monkeypatch):
    scores = evaluate.evaluate(scripted(monkeypatch, again=recolor), 40)
    share = scores["object_recall"]
    assert share == scores["object_recall_in_place"] == pytest.approx((COUNT - 40) / COUNT)
    assert scores["cases"]["object_recall"] == COUNT
    assert scores["interval"]["object_recall"] == wilson_interval(share, COUNT)


def test_an_object_too_many_is_no_object_lost(monkeypatch):
    scores = evaluate.evaluate(scripted(monkeypatch, again=duplicate), 40)
    assert scores["object_recall"] == 1
    assert scores["reconstruction"] == 0


class SwappingTokenizer:
    """Decodes scenes 0 to 199 to their neighbours, and uses 150 codes."""

    def encode(self, images):
        self.images = images
        return torch.arange(2000)[:, None].expand(2000, 36) % 150

    def decode(self, codes):
        assert codes[7, 0] == 7
        return torch.cat([self.images[1:201], self.images[200:]])


def test_what_a_tokenizer_keeps_and_uses(monkeypatch):
    scores = evaluate.evaluate(scripted(monkeypatch, tokenizer=SwappingTokenizer()), 5)
    assert scores["codes_used"] == 0.75
    assert scores["tokenizer"] == pytest.approx(0.9)
    assert 50 < scores["tokenizer_psnr"] < 60
    assert "tokenizer" not in evaluate.evaluate(scripted(monkeypatch), 5)


def test_noise_is_of_the_seed_and_of_the_place_of_an_image(monkeypatch):
    loaded = scripted(monkeypatch)
    seen = {}
    for name in ("text_to_image", "reconstruct", "edit"):
        function = getattr(evaluate, name)

        def watch(*args, seeds, name=name, function=function):
            seen[name] = list(seeds)
            return function(*args, seeds=seeds)

        monkeypatch.setattr(evaluate, name, watch)
    evaluate.evaluate(loaded, 5, seed=0)
    assert seen == dict.fromkeys(seen, [0, 1, 2, 3, 4])
    assert seen.keys() == {"text_to_image", "reconstruct", "edit"}
    assert list(evaluate.noise_seeds(3, 2)) == [30_000, 30_001]


def test_edits_by_kind_and_generated_at_once(monkeypatch):
    def edited(i, after, before, think):
        return after if think and i % 5 != 1 else before

    scores = evaluate.evaluate(scripted(monkeypatch, edited=edited), 40)
    assert scores["edit"] == pytest.approx(0.8)
    assert scores["edit_direct"] == 0
    assert [scores[f"edit_{kind}"] for kind in EDITS] == [1, 0, 1, 1, 1]
    assert scores["cases"]["edit_replace"] == 8


SPREAD = Scene("spread", (SceneObject(0, 0, 0), SceneObject(3, 2, 8)), 0)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "a red circle top left and a yellow star bottom right",
            {"color", "shape", "count", "arrangement"},
        ),
        (
            "a yellow circle top left and a red star bottom right",
            {"shape", "count", "arrangement"},
        ),
        ("a red circle top left and a yellow star bottom left", {"color", "shape", "count"}),
        ("a red circle and a yellow star", {"color", "shape", "count"}),  # no place is said
        ("a red circle top left and two yellow stars", {"color", "shape"}),
        ("a red circle top left and a yellow cross bottom right", {"count"}),
        ("nothing that parses", set()),
    ],
)
def test_understanding_by_attribute(text, expected):
    attributes = correct_attributes(parse_caption(text), SPREAD)
    assert {name for name, correct in attributes.items() if correct} == expected


def test_a_group_has_no_arrangement():
    group = Scene("group", tuple(SceneObject(1, 1, cell) for cell in range(3)), 0)
    attributes = correct_attributes(parse_caption("three orange squares"), group)
    assert attributes == {"color": True, "shape": True, "count": True}


def test_the_arrangement_of_a_pair_is_its_relation():
    pair = Scene("pair", (SceneObject(0, 0, 3), SceneObject(3, 2, 5)), 0)
    right = parse_caption("a red circle left of a yellow star")
    wrong = parse_caption("a red circle right of a yellow star")
    assert correct_attributes(right, pair)["arrangement"]
    assert not correct_attributes(wrong, pair)["arrangement"]


def test_captions_that_are_wrong_in_color_alone(monkeypatch):
    def say_red(scene):
        return describe(replace(scene, objects=tuple(replace(o, color=0) for o in scene.objects)))

    scores = evaluate.evaluate(scripted(monkeypatch, caption=say_red), 40)
    assert scores["understanding_shape"] == 1
    assert scores["understanding_count"] == 1
    assert scores["understanding_arrangement"] == 1
    assert scores["understanding_color"] < 0.5


def test_a_table_has_the_scores_that_all_checkpoints_have(monkeypatch):
    text = table({"pretrain": {"single": 0.5, "psnr": 20.0}, "other": {"single": 0.25}})
    assert text.splitlines() == ["          single", "base       0.500", "other      0.250"]


# ---------------------------------------------------------------- photographs


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A checkpoint of 20 photographs of two classes; captions are half as bright photographs."""
    for part in ("train", "val"):
        for i in range(20):
            folder = tmp_path / part / f"kind{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((8, 8), 40 + 5 * i).save(folder / f"{i}.png")
    vocabulary = Vocabulary(SPECIALS + ["a", "photo", "of", "kind0", "kind1"])
    options = dict(data_dir=str(tmp_path), image_size=8, seed=0, text_len=9)
    options["cache_dir"] = str(tmp_path)
    dataset = open_splits("imagenet", vocabulary=vocabulary, **options)["test"]
    images = dataset.__getitems__([(0, i * 20 // 16) for i in range(16)])["image"]
    proj = torch.nn.Linear(192, 5, bias=False)

    def encoder(images):
        return SimpleNamespace(pooled=proj(images.flatten(1)))

    cfg = SimpleNamespace(encoder_size=0, image_size=8)
    model = SimpleNamespace(device="cpu", cfg=cfg, text_prefix=lambda ids: images * 0.5)
    monkeypatch.setattr(evaluate, "sample_image", lambda model, prefix, seeds: prefix)
    parts = {"model": model, "encoder": encoder, "vocabulary": vocabulary}
    return SimpleNamespace(**parts, config={"dataset": "imagenet", **options}, stage="reca")


@pytest.mark.parametrize("is_exact", [True, False])
def test_photographs_are_measured_against_themselves(is_exact, photographs, tmp_path, monkeypatch):
    """Each photograph is generated as it is, or as another: the sets are the same either way."""
    order = list(range(16)) if is_exact else [7, *range(7), *range(8, 16)]
    monkeypatch.setattr(
        evaluate, "reconstruct", lambda model, encoder, images, seeds: images[order]
    )
    scores = evaluate.evaluate(photographs, 16)
    assert scores["cases"] == {name: 16 for name in ("psnr", "cosine", "t2i_cosine")}
    assert abs(scores["frechet"]) < 1e-5
    assert (scores["psnr"] == 60 and scores["cosine"] > 0.9999) == is_exact
    assert scores["t2i_cosine"] > 0.9999
    assert scores["t2i_frechet"] > 1e-3

    path = tmp_path / "compare.png"
    compare([photographs] * 2, ["pretrain", "reca"], path)
    assert Image.open(path).height > 8 * 2 * 8, "sixteen photographs, two to a row"


def test_photographs_are_sampled_in_batches(photographs, monkeypatch):
    seen = []

    def reconstruct(model, encoder, images, seeds):
        seen.append((len(images), list(seeds)))
        return images * 0.9

    monkeypatch.setattr(evaluate, "reconstruct", reconstruct)
    whole = evaluate.evaluate(photographs, 16, seed=2)
    monkeypatch.setattr(evaluate, "PHOTOS_AT_A_TIME", 6)
    halves = iter(photographs.model.text_prefix(None).split(6))
    photographs.model.text_prefix = lambda ids: next(halves)
    parts = evaluate.evaluate(photographs, 16, seed=2)
    assert [count for count, _ in seen] == [16, 6, 6, 4]
    assert seen[0][1] == list(range(20_000, 20_016))
    assert sum((seeds for _, seeds in seen[1:]), []) == seen[0][1], "the same noise in all batches"
    assert parts.pop("interval").keys() == whole.pop("interval").keys()
    assert parts.pop("cases") == whole.pop("cases")
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-9)


def test_captions_in_a_picture_show_no_unknown_words(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "reconstruct", lambda model, encoder, images, seeds: images)
    photographs.vocabulary = Vocabulary(SPECIALS + ["a", "photo", "of", "kind0"])
    drawn = []
    image_grid = evaluate.image_grid

    def watch(*args, **options):
        drawn.append(args)
        return image_grid(*args, **options)

    monkeypatch.setattr(evaluate, "image_grid", watch)
    compare([photographs], ["reca"], tmp_path / "compare.png")
    captions = drawn[0][1]
    assert len(captions) == 8
    assert any("kind0" in caption for caption in captions)
    assert any("..." in caption for caption in captions)
    assert not any("<unk>" in caption for caption in captions)


# ---------------------------------------------------------------- pictures and the command line


def test_results_are_strict_json(tmp_path):
    results = {"reca": {"x": math.nan, "interval": {"x": [-math.inf, math.inf]}, "y": 0.1, "z": 2}}
    write_json(tmp_path / "results.json", results)
    text = (tmp_path / "results.json").read_text()
    expected = {"reca": {"x": None, "interval": {"x": [None, None]}, "y": 0.1, "z": 2}}
    assert json.loads(text) == expected
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())


def test_another_place_of_the_encoder_is_passed_on(monkeypatch, capsys):
    calls = []

    def fake_checkpoint(path, device, **options):
        calls.append(options)
        raise ValueError("seen")

    monkeypatch.setattr(evaluate, "Checkpoint", fake_checkpoint)
    for options in (["--encoder", "weights/clip"], []):
        with pytest.raises(SystemExit):
            main(["--ckpt", "x.pt", *options])
    assert [call.get("encoder", "") for call in calls] == ["weights/clip", ""]
    assert "seen" in capsys.readouterr().err


@pytest.mark.parametrize("count", [3, 5])
def test_a_picture_compares_checkpoints(count, tmp_path, monkeypatch):
    checkpoints = [scripted(monkeypatch)] * count
    compare(checkpoints, ["pretrain", "sft", "reca", "a", "b"][:count], tmp_path / "compare.png")
    image = Image.open(tmp_path / "compare.png")
    groups = 3  # checkpoints side by side, or prompts
    assert image.width > groups * 4 * 96
    rows = 10 if count == 3 else 5
    assert image.height > rows * 96


def test_wrong_numbers_get_a_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--n", "0", "--ckpt", "x.pt"])
    assert end.value.code == 2
    assert "at least 1" in capsys.readouterr().err
