"""Experiments: their measures, tables, plots and runs."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import experiments
from config import Config, parse_config, validate
from experiments import (
    EXPERIMENTS,
    Experiment,
    color_table,
    counting_accuracy,
    expand_rows,
    main,
    markdown_table,
    plot_differences,
    plot_shares,
    read_scores,
    shuffled_condition_loss,
    train_if_missing,
    unusual_color_accuracy,
)
from scripted import scripted
from shapes import PLURALS, SHAPES, USUAL_COLOR, Scene, SceneObject, Shapes
from variants import RUNS

# ---------------------------------------------------------------- what single experiments measure


def draw_usual(prompt):
    """A single object of the prompt's shape, in its usual color."""
    shape = next(i for i, name in enumerate(SHAPES) if name in prompt)
    return Scene("single", (SceneObject(shape, USUAL_COLOR[shape], 4),), 0)


def test_what_is_recognized_is_told_from_what_is_drawn(monkeypatch):
    scores = unusual_color_accuracy(scripted(monkeypatch, draw=draw_usual), 24, 0)
    assert scores["recognized"] == 1
    assert scores["drawn"] == 0
    assert scores["cases"]["drawn"] == 2 * 6 * 7
    assert scores["drawn red circle"] == 1
    assert scores["drawn green circle"] == 0
    assert scores["recognized green circle"] == 1
    text = color_table({"base": [scores], "RecA": [scores | {"drawn green circle": 0.5}]})
    row = "| circle | (100 / 100 / 100) | 100 / 0 / 0 | 100 / 0 / 0 | 100 / 0 / 50 |"
    assert row in text


def test_counting(monkeypatch):
    def draw_two(prompt):
        shape = PLURALS.index(prompt.split()[-1])
        return Scene("group", tuple(SceneObject(shape, 0, cell) for cell in range(2)), 0)

    loaded = scripted(monkeypatch, draw=draw_two, caption=lambda scene: "three red stars")
    scores = counting_accuracy(loaded, 12, 0)
    assert [scores[f"drawn_{i}"] for i in (2, 3, 4)] == [1, 0, 0]
    assert [scores[f"counted_{i}"] for i in (2, 3, 4)] == [0, 1, 0]


def noisy_loss(model, prefix, images):
    return (prefix / 2 - images).square().mean() + torch.rand(())


def test_a_shuffled_condition_is_that_of_the_scene_before(monkeypatch):
    loaded = scripted(monkeypatch)
    loaded.model.recon_prefix = lambda encoder, images: images * 2
    monkeypatch.setattr(experiments, "image_loss", noisy_loss)
    losses = shuffled_condition_loss(loaded, 6, seed=3)
    images = Shapes("test").__getitems__([(0, i) for i in range(6)])["image"]
    apart = (images - images[[5, 0, 1, 2, 3, 4]]).square().mean().item()
    torch.manual_seed(3)
    noise = torch.rand(()).item()
    expected = {"own_words": noise, "shuffled_words": noise + apart}
    assert losses == pytest.approx(expected, abs=1e-6), "the same noise for both"
    assert losses != shuffled_condition_loss(loaded, 6, seed=4)


# ---------------------------------------------------------------- tables and plots


def runs(*values):
    return [{"x": value} for value in values]


def test_means_and_differences_to_the_base():
    rows = {"base": runs(0.5, 0.6, 0.7), "a": runs(0.7, 0.81, 0.9), "b": runs(0.6, 0.8, 1.0)}
    rows |= {"base 2": runs(0.9, 0.9, 0.9), "c": runs(0.9, 1.0, 0.9)}
    lines = markdown_table(rows, ["x", "y"]).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:7]] == [
        "0.600",
        "0.803 (+0.203 ± 0.014)",
        "0.800 (+0.200 ± 0.248, n.s.)",
        "0.900",
        "0.933 (+0.033 ± 0.143, n.s.)",
    ]
    assert "n.s.: not significant (95% CI includes 0)" in lines[-1]


def test_one_seed_has_no_interval():
    lines = markdown_table({"base": runs(0.5), "a": runs(0.7)}, ["x"]).splitlines()
    assert lines[3] == "| a | 0.700 (+0.200) |"


def test_reca_is_compared_with_its_control_too():
    rows = {"base, ar": runs(0.5, 0.5), "SFT, ar": runs(0.6, 0.7), "RecA, ar": runs(0.8, 0.9)}
    lines = markdown_table(rows, ["x"]).splitlines()
    assert lines[4] == "| RecA, ar | 0.850 (+0.350 ± 0.635, n.s.) |"
    assert lines[5] == "| RecA, ar - SFT, ar | +0.200 ± 0.000 |"


def scores_around(means, seeds=2):
    """{title: scores by seed}, all of them near a mean; differences spread over the seeds."""
    columns = EXPERIMENTS["main"].columns
    rows = {}
    for title, mean in means.items():
        values = [mean + mean * seed / 100 for seed in range(seeds)]
        rows[title] = [dict.fromkeys(columns, value) for value in values]
    return rows


def test_bars_show_what_the_table_of_main_says(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ASSETS", tmp_path)
    plot_shares(scores_around({"base": 0.2, "SFT": 0.3, "RecA": 0.9}))
    bars = (tmp_path / "bars.svg").read_text()
    assert bars.count("<rect") == 1 + 3 + 3 * 10, "paper, legend, and three bars a category"
    assert bars.count('stroke="black"') == 2 * 10, "intervals of the differences to the base"
    plot_shares(scores_around({"base": 0.2, "RecA": 0.9}, seeds=1))
    assert 'stroke="black"' not in (tmp_path / "bars.svg").read_text()


def test_a_forest_shows_what_the_table_of_ablations_says(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ASSETS", tmp_path)
    path = tmp_path / "ablations.svg"
    plot_differences(scores_around({"RecA": 0.9, "no replay": 0.5}, seeds=1))
    plot_differences(scores_around({"RecA": 0.9}))
    assert not path.exists(), "nothing has an interval"
    plot_differences(scores_around({"RecA": 0.9, "no replay": 0.5}))
    assert "no replay" in path.read_text()
    assert "the difference to RecA" in path.read_text()


def test_an_experiment_draws_its_plot_from_the_scores_of_its_table(copy, monkeypatch):
    plotted = []
    experiment = EXPERIMENTS["copy"]._replace(plot=plotted.append)
    monkeypatch.setitem(EXPERIMENTS, "copy", experiment)
    copy.start()
    [scores] = plotted
    assert list(scores) == ["base", "pixels"]
    assert [run["overall"] for run in scores["pixels"]] == [0.7, 0.71]
    assert EXPERIMENTS["main"].plot is plot_shares
    assert EXPERIMENTS["ablations"].plot is plot_differences
    copy.start("--picture")
    assert len(plotted) == 1


# ---------------------------------------------------------------- training and scoring

FAKE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "run.json").write_text("{}")
with open("calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if pathlib.Path("fail").exists() and out.name == "pixels":
    sys.exit(3)
seed = int(out.parent.name[1:])
scores = {}
for name, x in {"pretrain": 0.5, "sft": 0.6, "reca": 0.7}.items():
    scores[name] = {"overall": x + seed / 100, "cases": {"psnr": 5}}
lines = [json.dumps({"stage": "reca", "recon": loss}) for loss in (0.9, 0.25)]
(out / "log.jsonl").write_text("\\n".join(lines))
(out / "results.json").write_text(json.dumps(scores))
"""
S0 = "experiments/s0"
S1 = "experiments/s1"
COMMAND = "python experiments.py copy --seeds 0 1 --n 5 --train='--pretrain_steps 7'"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The experiment copy with a fake train.py: start(), calls() of train.py, and pictures drawn.

    s0/main is there already, as a link.
    """
    for script in ("train.py", "experiments.py"):
        (tmp_path / script).write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "experiments.py"))
    drawn = []

    def picture(checkpoints, titles, path, seed):
        drawn.append((checkpoints, titles, str(path), seed))

    rows = "main/pretrain pixels"
    experiment = Experiment(rows, ["recon_loss", "overall"], picture=picture)
    monkeypatch.setitem(EXPERIMENTS, "copy", experiment)
    monkeypatch.setattr(experiments, "Checkpoint", lambda path, *_: str(path))
    other = tmp_path / "elsewhere"
    other.mkdir()
    results = {"pretrain": {"overall": 0.5, "cases": {"psnr": 5}}}
    (other / "results.json").write_text(json.dumps(results))
    (tmp_path / S0).mkdir(parents=True)
    (tmp_path / S0 / "main").symlink_to(other)

    def start(*options):
        main(["copy", "--seeds", "0", "1", "--n", "5", "--train=--pretrain_steps 7", *options])

    def calls():
        return Path("calls").read_text().splitlines()

    return SimpleNamespace(start=start, calls=calls, drawn=drawn)


def train_call(seed, run):
    variant = "train --variant pixels " if run == "pixels" else ""
    call = f"{variant}--out_dir experiments/s{seed}/{run} --seed {seed} --eval_n 5"
    call += " --pretrain_steps 7"
    if run == "pixels":
        call += f" --stage reca --init_from experiments/s{seed}/main/pretrain.pt"
    return call


def test_a_run_that_fails_ends_an_experiment(copy):
    Path("fail").touch()
    with pytest.raises(SystemExit) as end:
        copy.start()
    assert end.value.code == 3
    assert not Path("assets/copy.md").exists()
    assert copy.calls() == [train_call(0, "pixels")]


def test_an_experiment_goes_on_where_it_stopped(copy):
    Path("fail").touch()
    with pytest.raises(SystemExit):
        copy.start()
    Path("fail").unlink()
    copy.start()
    resumed = f"train --variant pixels --out_dir {S0}/pixels --resume"
    assert copy.calls()[1:] == [resumed, train_call(1, "main"), train_call(1, "pixels")]
    lines = Path("assets/copy.md").read_text().splitlines()
    assert lines[0] == f"`{COMMAND}`"
    assert lines[2:6] == [
        "|  | recon_loss | overall |",
        "| --- | --- | --- |",
        "| base |  | 0.505 |",
        "| pixels | 0.250 | 0.705 (+0.200 ± 0.000) |",
    ]
    copy.start()
    assert len(copy.calls()) == 4, "all was there"
    paths = [f"{S0}/main/pretrain.pt", f"{S0}/pixels/reca.pt"]
    assert copy.drawn == 2 * [(paths, ["base", "pixels"], "assets/copy.png", 0)]


def test_a_part_of_an_experiment(copy):
    copy.start("--runs", "pixels")
    lines = Path("assets/copy.md").read_text().splitlines()
    assert lines[2:5] == [
        "|  | recon_loss | overall |",
        "| --- | --- | --- |",
        "| pixels | 0.250 | 0.705 |",
    ]


def test_a_picture_alone_leaves_the_table(copy):
    Path("assets").mkdir()
    Path("assets/copy.md").write_text("table of three seeds")
    copy.start("--picture")
    assert Path("assets/copy.md").read_text() == "table of three seeds"
    assert copy.calls() == [train_call(0, "pixels")], "of the first seed"
    assert copy.drawn[0][2] == "assets/copy.png"


def test_what_a_run_starts_from_is_trained_before_it(copy):
    args = SimpleNamespace(out_dir="experiments", n=5, train="", encoder="", data_dir="")
    train_if_missing("pixels/reca", 2, args)
    folders = [call.split("--out_dir ")[1].split()[0] for call in copy.calls()]
    assert folders == ["experiments/s2/main", "experiments/s2/pixels"]


def test_scores_are_measured_where_the_run_has_others(tmp_path, monkeypatch):
    folder = tmp_path / "s3/main"
    folder.mkdir(parents=True)
    (folder / "reca.pt").touch()
    results = {"reca": {"overall": 0.1, "cases": {"psnr": 5}}}
    (folder / "results.json").write_text(json.dumps(results))
    called = []

    def fake_evaluate(loaded, n, seed):
        called.append((loaded, n, seed))
        return {"overall": 0.2}

    monkeypatch.setattr(experiments, "Checkpoint", lambda path, *_: str(path))
    monkeypatch.setattr(evaluate, "evaluate", fake_evaluate)

    def scores(n):
        given = SimpleNamespace(encoder="", data_dir="", train="", device="cpu")
        args = SimpleNamespace(out_dir=tmp_path, n=n, **vars(given))
        return read_scores("main/reca", 3, fake_evaluate, args)

    assert scores(5) == {"overall": 0.1, "cases": {"psnr": 5}}
    assert not called
    assert scores(9)["overall"] == 0.2
    assert scores(9)["overall"] == 0.2
    assert called == [(str(folder / "reca.pt"), 9, 3)], "measured once, then kept"
    os.utime(folder / "reca.pt", (2e9, 2e9))
    scores(9)
    assert len(called) == 2, "of a checkpoint that was trained again"
    results["reca"]["overall"] = None
    (folder / "results.json").write_text(json.dumps(results))
    assert "overall" not in scores(5), "null in strict JSON: it was not finite"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_is_a_run_that_train_accepts(name, tmp_path):
    given = {"encoder": "clip-b16", "data_dir": "photos"}
    for row in expand_rows(EXPERIMENTS[name].rows.split()).values():
        run_name, checkpoint = row.split("/")
        run = RUNS[run_name]
        argv = run.options.format(**given).split()
        if run.stage:
            argv += ["--stage", run.stage]
        cfg, _ = parse_config(["--out_dir", str(tmp_path / run_name), *argv])
        validate(cfg)
        options = [word.removeprefix("--") for word in argv if word.startswith("--")]
        changed = [k for k in options if k != "stage" and getattr(cfg, k) != getattr(Config(), k)]
        is_recipe = not changed and run.variant == RUNS["main"].variant
        twice = ("reca_sft", "sft_reca", "reca_reca")
        assert run_name in ("main", *twice) or not is_recipe, f"{run_name} is the recipe itself"
        trained = ["pretrain", "sft", "reca"] if cfg.stage == "all" else [cfg.stage]
        assert checkpoint in trained


def test_titles_of_an_experiment_are_its_rows():
    for experiment in EXPERIMENTS.values():
        names = experiment.rows.split()
        three = [name for name in names if "/" not in name and not RUNS[name].title]
        assert len(expand_rows(names)) == len(names) + 2 * len(three)


@pytest.mark.parametrize(
    "line, said",
    [
        ("copy --n 0", "at least 1"),
        ("copy --seeds 1 1", "different seeds"),
        ("copy --seeds 0 1 2 3 4 5 6 7 8 9 10", "one to 10"),
        ("copy --runs pixel", "no run pixel, it has main features pixels"),
    ],
)
def test_wrong_numbers_get_a_sentence(line, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert said in capsys.readouterr().err
