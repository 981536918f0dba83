"""The exact scorer and the world that it scores: ground truth passes, every wrong color, shape, count and relation fails."""
import json
import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

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


def pictures(scenes):
    return D.render(torch.tensor([D.to_grid(s) for s in scenes]), torch.tensor([s.background for s in scenes]), ATLAS)


def cells(scenes):
    images = pictures(scenes)
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
    assert all(math.isnan(E.frechet(x, b)) for x in (a[:1], a * math.nan))
    assert abs(E.mmd(a[:500], b[:500])) < 1e-3 < E.mmd(a[:500], b[:500] + 1)
    low, high = E.interval(0.5, 100)
    assert abs(low - 0.4038) < 1e-3 and abs(high - 0.5962) < 1e-3  # Wilson


# ----------------------------------------------------------------------------------------------------------------------
# Scores of models that do exactly what is told here, and the experiments


def model_that(monkeypatch, caption=D.describe, drawn=lambda prompt: D.Scene("single", (), 0), again=lambda i, scene: scene, edited=lambda i, after, before, think: after, tokenizer=None):
    """A checkpoint of which these functions say what it does: of a scene its caption; of a prompt, a scene or an edit the scene that it draws."""
    known = [D.Shapes("test").scene(i) for i in range(40)]
    images_of_known = list(pictures(known))

    def draw_scenes(scenes, atlas):
        images = pictures(scenes)
        known.extend(scenes), images_of_known.extend(images)
        return images

    seen = lambda image: next(scene for scene, its in zip(known, images_of_known) if torch.equal(its, image))
    monkeypatch.setattr(E, "draw_scenes", draw_scenes)
    monkeypatch.setattr(E, "caption", lambda m, e, v, images: [caption(seen(image)) for image in images])
    monkeypatch.setattr(E, "text_to_image", lambda m, v, asked, generator: pictures([drawn(words) for words in asked]))
    monkeypatch.setattr(E, "reconstruct", lambda m, e, images, generator: pictures([again(i, seen(image)) for i, image in enumerate(images)]))

    def edit(m, e, v, images, instructions, think=True, generator=None):
        return pictures([edited(i, after, before, think) for i, (before, _, after) in enumerate(E.edits(len(images), 0))])

    monkeypatch.setattr(E, "edit", edit)
    return SimpleNamespace(model=SimpleNamespace(cfg=SimpleNamespace(image_size=48, codes=200), device="cpu", tokenizer=tokenizer), encoder=None, vocabulary=None,
                           config={"dataset": "shapes"})


def changed_first(scene, **change):
    return replace(scene, things=(replace(scene.things[0], **change), *scene.things[1:]))


def free_cell(scene):
    return next(c for c in range(9) if c not in [t.cell for t in scene.things])


def test_kept_objects_kept_places_and_psnr(monkeypatch):
    move = lambda i, scene: changed_first(scene, cell=free_cell(scene)) if i % 2 else scene
    paint = lambda i, scene: changed_first(scene, color=(scene.things[0].color + 1) % 8)
    count = sum(len(D.Shapes("test").scene(i).things) for i in range(40))
    perfect = E.evaluate(model_that(monkeypatch), 40)
    assert perfect["kept"] == perfect["kept_places"] == perfect["reconstruction"] == 1 and perfect["psnr"] == pytest.approx(60)
    moved = E.evaluate(model_that(monkeypatch, again=move), 40)
    assert moved["kept"] == 1 and moved["kept_places"] == pytest.approx((count - 20) / count) and moved["reconstruction"] == 0.5 and moved["psnr"] < 50
    painted = E.evaluate(model_that(monkeypatch, again=paint), 40)
    assert painted["kept"] == painted["kept_places"] == pytest.approx((count - 40) / count)
    assert painted["cases"]["kept"] == count and painted["interval"]["kept"] == E.interval(painted["kept"], count)
    twice = E.evaluate(model_that(monkeypatch, again=lambda i, scene: replace(scene, things=(*scene.things, replace(scene.things[0], cell=free_cell(scene))))), 40)
    assert twice["kept"] == 1 and twice["reconstruction"] == 0, "an object too many is no object lost"


def test_what_a_tokenizer_keeps_and_uses(monkeypatch):
    class Tokenizer:
        def encode(self, images):
            self.images = images
            return torch.arange(2000)[:, None].expand(2000, 36) % 150

        def decode(self, codes):
            assert codes[7, 0] == 7
            return torch.cat([self.images[1:201], self.images[200:]])  # scenes 0 to 199 become their neighbours

    found = E.evaluate(model_that(monkeypatch, tokenizer=Tokenizer()), 5)
    assert found["codes_used"] == 0.75 and found["tokenizer"] == pytest.approx(0.9) and 50 < found["tokenizer_psnr"] < 60
    assert "tokenizer" not in E.evaluate(model_that(monkeypatch), 5)


def test_edits_by_kind_and_drawn_at_once(monkeypatch):
    found = E.evaluate(model_that(monkeypatch, edited=lambda i, after, before, think: after if think and i % 5 != 1 else before), 40)
    assert found["edit"] == pytest.approx(0.8) and found["edit_direct"] == 0
    assert [found[f"edit_{kind}"] for kind in D.EDITS] == [1, 0, 1, 1, 1] and found["cases"]["edit_replace"] == 8


def test_understanding_by_attribute(monkeypatch):
    scene = D.Scene("spread", (D.Thing(0, 0, 0), D.Thing(3, 2, 8)), 0)
    says = lambda text: {name for name, hit in E.attributes(D.parse(text), scene).items() if hit}
    assert says("a red circle top left and a yellow star bottom right") == {"color", "shape", "count", "arrangement"}
    assert says("a yellow circle top left and a red star bottom right") == {"shape", "count", "arrangement"}
    assert says("a red circle top left and a yellow star bottom left") == {"color", "shape", "count"}
    assert says("a red circle and a yellow star") == {"color", "shape", "count"}, "where they are was not said"
    assert says("a red circle top left and two yellow stars") == {"color", "shape"}
    assert says("a red circle top left and a yellow cross bottom right") == {"count"}
    assert says("nothing that parses") == set()
    group = D.Scene("group", tuple(D.Thing(1, 1, c) for c in range(3)), 0)
    assert E.attributes(D.parse("three orange squares"), group) == {"color": True, "shape": True, "count": True}
    pair = D.Scene("pair", (D.Thing(0, 0, 3), D.Thing(3, 2, 5)), 0)
    assert E.attributes(D.parse("a red circle left of a yellow star"), pair)["arrangement"] and not E.attributes(D.parse("a red circle right of a yellow star"), pair)["arrangement"]
    found = E.evaluate(model_that(monkeypatch, caption=lambda s: D.describe(replace(s, things=tuple(replace(t, color=0) for t in s.things)))), 40)
    assert found["understanding_shape"] == found["understanding_count"] == found["understanding_arrangement"] == 1 and found["understanding_color"] < 0.5


def test_broccoli_and_counting_tell_what_is_seen_from_what_is_drawn(monkeypatch):
    usual = lambda words: next(D.Scene("single", (D.Thing(s, D.USUAL_COLOR[s], 4),), 0) for s, name in enumerate(D.SHAPES) if name in words)
    found = E.broccoli(model_that(monkeypatch, drawn=usual), 24, 0)
    assert found["recognized"] == 1 and found["drawn"] == 0 and found["cases"]["drawn"] == 2 * 6 * 7
    assert found["drawn red circle"] == 1 and found["drawn green circle"] == 0 and found["recognized green circle"] == 1
    text = E.broccoli_table({"base": [found], "RecA": [found | {"drawn green circle": 0.5}]})
    assert "| circle | (100 / 100 / 100) | 100 / 0 / 0 | 100 / 0 / 0 | 100 / 0 / 50 |" in text
    two = lambda words: D.Scene("group", tuple(D.Thing(D.PLURALS.index(words.split()[-1]), 0, c) for c in range(2)), 0)
    found = E.counts(model_that(monkeypatch, drawn=two, caption=lambda s: "three red stars"), 12, 0)
    assert [found[f"drawn_{i}"] for i in (2, 3, 4)] == [1, 0, 0] and [found[f"counted_{i}"] for i in (2, 3, 4)] == [0, 1, 0]


@pytest.mark.parametrize("exact", [True, False])
def test_photographs_are_measured_against_themselves(exact, tmp_path, monkeypatch):
    """A model that draws each photograph as it is, or each as another: only the second is at a distance, image by image; the sets are the same."""
    for i in range(20):
        (tmp_path / "val" / f"kind{i % 2}").mkdir(parents=True, exist_ok=True), (tmp_path / "train" / f"kind{i % 2}").mkdir(parents=True, exist_ok=True)
        for part in ("train", "val"):
            Image.effect_noise((8, 8), 40 + 5 * i).save(tmp_path / part / f"kind{i % 2}" / f"{i}.png")
    order = slice(None) if exact else [7, *range(7), *range(8, 16)]
    monkeypatch.setattr(E, "reconstruct", lambda m, e, images, generator: images[order])
    monkeypatch.setattr(E, "sample_image", lambda m, prefix, generator: prefix)
    look = torch.nn.Linear(192, 5, bias=False)
    vocabulary = D.Vocabulary(D.SPECIALS + ["a", "photo", "of", "kind0", "kind1"])
    photographs = D.make_dataset("imagenet", "test", str(tmp_path), 8, 0, vocabulary, 9, str(tmp_path))
    model = SimpleNamespace(device="cpu", for_encoder=lambda x: x, text_prefix=lambda ids: photographs.__getitems__([(0, i * 20 // 16) for i in range(16)])["image"] * 0.5)
    loaded = SimpleNamespace(model=model, encoder=lambda x: SimpleNamespace(pooled=look(x.flatten(1))), vocabulary=vocabulary,
                             config=dict(dataset="imagenet", data_dir=str(tmp_path), image_size=8, seed=0, text_len=9, cache_dir=str(tmp_path)))
    found = E.evaluate(loaded, 16)
    assert found["cases"] == {name: 16 for name in ("psnr", "cosine", "t2i_cosine")} and abs(found["frechet"]) < 1e-5
    assert (found["psnr"] == 60 and found["cosine"] > 0.9999) == exact and found["t2i_cosine"] > 0.9999 and found["t2i_frechet"] > 1e-3
    E.compare([loaded] * 2, ["pretrain", "reca"], tmp_path / "compare.png", 0, "how it was made")
    assert Image.open(tmp_path / "compare.png").height > 8 * 2 * 8, "sixteen photographs, two to a row"


def test_a_shuffled_condition_is_that_of_the_scene_before(monkeypatch):
    monkeypatch.setattr(E, "recon_prefix", lambda model, encoder, images: images * 2)
    monkeypatch.setattr(E, "image_loss", lambda model, prefix, images: (prefix / 2 - images).square().mean() + torch.rand(()))
    loaded, found = model_that(monkeypatch), {}
    for seed in (3, 4):
        found[seed] = E.shuffled(loaded, 6, seed)
    images = D.Shapes("test").__getitems__([(0, i) for i in range(6)])["image"]
    torch.manual_seed(3)
    noise, apart = torch.rand(()).item(), (images - images[[5, 0, 1, 2, 3, 4]]).square().mean().item()
    assert found[3] == pytest.approx({"own_words": noise, "shuffled_words": noise + apart}, abs=1e-6), "the same noise for both"
    assert found[3] != found[4]


def test_means_differences_and_open_claims():
    runs = lambda *values: [{"x": value} for value in values]
    text = E.markdown({"base": runs(0.5, 0.6, 0.7), "a": runs(0.7, 0.81, 0.9), "b": runs(0.6, 0.8, 1.0), "base 2": runs(0.9, 0.9, 0.9), "c": runs(0.9, 1.0, 0.9)}, ["x", "y"])
    assert [line.split(" | ")[1] for line in text.splitlines()[2:]] == ["0.600", "0.803 (+0.203 ± 0.014)", "0.800 (+0.200 ± 0.248, open)", "0.900", "0.933 (+0.033 ± 0.143, open)"]
    assert E.markdown({"base": runs(0.5), "a": runs(0.7)}, ["x"]).splitlines()[-1] == "| a | 0.700 (+0.200) |"
    both = E.markdown({"base, ar": runs(0.5, 0.5), "SFT, ar": runs(0.6, 0.7), "RecA, ar": runs(0.8, 0.9)}, ["x"]).splitlines()
    assert both[-2:] == ["| RecA, ar | 0.850 (+0.350 ± 0.635, open) |", "| RecA, ar - SFT, ar | +0.200 ± 0.000 |"]


FAKE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "run.json").write_text("{}")
open("calls", "a").write(" ".join(sys.argv[1:]) + "\\n")
if pathlib.Path("fail").exists() and out.name == "pixels":
    sys.exit(3)
seed = int(out.parent.name[1:])
scores = {name: {"overall": x + seed / 100, "cases": {"psnr": 5}} for name, x in {"pretrain": 0.5, "sft": 0.6, "reca": 0.7}.items()}
(out / "log.jsonl").write_text('{"stage": "reca", "recon": 0.9}\\n{"stage": "reca", "recon": 0.25}\\n')
(out / "results.json").write_text(json.dumps(scores))
"""


def test_an_experiment_trains_what_is_not_there_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capfd):
    (tmp_path / "train.py").write_text(FAKE)
    (tmp_path / "fail").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(E, "__file__", str(tmp_path / "evaluate.py"))
    monkeypatch.setitem(E.EXPERIMENTS, "copy", E.Experiment({"base": "main/pretrain", "pixels": "pixels/reca"}, ["recon_loss", "overall"],
                        picture=lambda checkpoints, names, path, seed, note: drawn.append((checkpoints, names, str(path), seed, note))))
    monkeypatch.setattr(E, "load_checkpoint", lambda path, device: str(path))
    drawn, calls = [], lambda: Path("calls").read_text().splitlines() if Path("calls").exists() else []
    start = lambda *more: E.main(["--experiment", "copy", "--seeds", "0", "1", "--n", "5", "--train=--pretrain_steps 7", *more])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/results.json").write_text(json.dumps({"pretrain": {"overall": 0.5, "cases": {"psnr": 5}}}))
    (tmp_path / "experiments/s0").mkdir(parents=True)
    (tmp_path / "experiments/s0/main").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as end:
        start()
    s0, s1 = "experiments/s0", "experiments/s1"
    assert end.value.code == 3 and not Path("assets/copy.md").exists()
    assert calls() == [f"--out_dir {s0}/pixels --seed 0 --eval_n 5 --pretrain_steps 7 --stage reca --init_from {s0}/main/pretrain.pt --condition pixels"]
    Path("fail").unlink()
    start()
    assert calls()[1:] == [f"--out_dir {s0}/pixels --resume", f"--out_dir {s1}/main --seed 1 --eval_n 5 --pretrain_steps 7",
                           f"--out_dir {s1}/pixels --seed 1 --eval_n 5 --pretrain_steps 7 --stage reca --init_from {s1}/main/pretrain.pt --condition pixels"]
    lines = Path("assets/copy.md").read_text().splitlines()
    assert lines[0] == "`python evaluate.py --experiment copy --seeds 0 1 --n 5 --train='--pretrain_steps 7'`: seeds 0, 1, 5 cases each"
    assert lines[2:] == ["|  | recon_loss | overall |", "| --- | --- | --- |", "| base |  | 0.505 |", "| pixels | 0.250 | 0.705 (+0.200 ± 0.000) |"]
    start()
    assert len(calls()) == 4, "all was there"
    command = "python evaluate.py --experiment copy --seeds 0 1 --n 5 --train='--pretrain_steps 7'"
    start("--runs", "pixels")
    assert Path("assets/copy.md").read_text().splitlines()[2:] == ["|  | recon_loss | overall |", "| --- | --- | --- |", "| pixels | 0.250 | 0.705 |"]
    drawn.pop()
    E.make_run("pixels", 2, SimpleNamespace(out_dir="experiments", n=5, train="", encoder="", data_dir=""))
    assert [line.split()[1] for line in calls()[4:]] == ["experiments/s2/main", "experiments/s2/pixels"], "what a run starts from is made before it"
    assert drawn == 2 * [([f"{s0}/main/pretrain.pt", f"{s0}/pixels/reca.pt"], ["base", "pixels"], "assets/copy.png", 0, f"{command} (seed 0)")]


def test_scores_are_measured_where_the_run_has_others(tmp_path, monkeypatch):
    folder, called = tmp_path / "s3/main", []
    folder.mkdir(parents=True)
    (folder / "reca.pt").touch()
    (folder / "results.json").write_text(json.dumps({"reca": {"overall": 0.1, "cases": {"psnr": 5}}}))
    monkeypatch.setattr(E, "load_checkpoint", lambda path, device: str(path))
    monkeypatch.setattr(E, "evaluate", evaluate := lambda loaded, n, seed: (called.append((loaded, n, seed)), {"overall": 0.2})[1])
    monkeypatch.setattr(evaluate, "__name__", "evaluate")
    args = lambda n: SimpleNamespace(out_dir=tmp_path, n=n, device="cpu", encoder="", data_dir="", train="")
    assert E.scores_of("main/reca", 3, E.evaluate, args(5)) == {"overall": 0.1, "cases": {"psnr": 5}} and not called
    for _ in range(2):
        assert E.scores_of("main/reca", 3, E.evaluate, args(9))["overall"] == 0.2
    assert called == [(str(folder / "reca.pt"), 9, 3)], "measured once, then kept"
    os.utime(folder / "reca.pt", (2e9, 2e9))
    E.scores_of("main/reca", 3, E.evaluate, args(9))
    assert len(called) == 2, "of a checkpoint that was trained again"


@pytest.mark.parametrize("name", E.EXPERIMENTS)
def test_every_row_is_a_run_that_train_accepts(name, tmp_path):
    import train
    experiment = E.EXPERIMENTS[name]
    for row in experiment.rows.values():
        run, checkpoint = row.split("/")
        options = E.RUNS[run].format(**{run: "x" for run in E.RUNS}, encoder="clip-b16", data_dir="photos").split()
        cfg, _ = train.parse_config(["--out_dir", str(tmp_path / run), *options])
        train.check(cfg)
        assert not options or any(getattr(cfg, word[2:]) != getattr(train.Config(), word[2:]) for word in options if word.startswith("--") and word not in ("--stage", "--init_from")) or \
            run in ("reca_sft", "sft_reca", "reca_reca"), f"{run} is the recipe itself"
        assert checkpoint in (["pretrain", "sft", "reca"] if cfg.stage == "all" else [cfg.stage])


@pytest.mark.parametrize("line", ["--n 0 | at least 1", "--experiment copy --seeds 1 1 | different seeds", "--experiment copy --seeds 0 1 2 3 4 5 6 7 8 9 10 | one to 10",
                                  "--experiment copy --runs pixel | no run pixel, it has main features pixels"])
def test_wrong_numbers_get_a_sentence(line, capsys):
    options, _, expected = line.partition(" | ")
    with pytest.raises(SystemExit) as end:
        E.main((options if "--experiment" in options else options + " --ckpt x.pt").split())
    assert end.value.code == 2 and expected in capsys.readouterr().err
