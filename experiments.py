"""The experiments of RESULTS.md: runs of train.py (see variants.py), scores, tables and pictures.

    python experiments.py controls --seeds 0 1 2 --n 64    # assets/controls.md and .png
    python experiments.py controls --seeds 0 --picture     # only the picture
    python experiments.py train --variant features --stage reca --init_from out/pretrain.pt

An experiment trains what is not there yet, goes on where it was stopped, scores and draws; main
draws assets/bars.svg too, and ablations assets/ablations.svg.
"""

import json
import random
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import figures
import shapes
import train
from cli import Parser, user_errors
from evaluate import CATEGORIES, DISTANCES, TITLES, compare, compare_reconstructions
from recon_loss import image_loss
from sample import Checkpoint
from shapes import COLORS, GRID, NUMBERS, PLURALS, SHAPES, USUAL_COLOR, Scene, SceneObject
from variants import ABLATIONS, RUNS

ASSETS = Path("assets")
LEGEND = "In brackets: the difference to the base, or to the first row. "
LEGEND += "n.s.: not significant (95% CI includes 0)."
T95 = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, by seeds


# ---------------------------------------------------------------- what single experiments measure
def color_test(loaded, count: int, seed: int):
    """The paper's figure 3: `count` objects of each shape and color, recognized and drawn."""
    rng = random.Random(f"combinations {seed}")
    kinds = product(range(len(SHAPES)), range(len(COLORS)), range(count))
    objects = [SceneObject(shape, color, rng.randrange(GRID * GRID)) for shape, color, _ in kinds]
    scenes = [Scene("single", (item,), rng.randrange(2)) for item in objects]
    prompts = [shapes.describe(scene, rng, 1, 0, 0) for scene in scenes]
    pairs = zip(objects, evaluate.caption_scenes(loaded, scenes), strict=True)
    recognized = [COLORS[item.color] in caption.split() for item, caption in pairs]
    return objects, recognized, evaluate.generate_and_check(loaded, prompts, seed)


def unusual_color_accuracy(loaded, n: int, seed: int) -> dict:
    """Of n / 12 objects of each shape and color: the share of unusual ones, and of each kind."""
    objects, recognized, (_, drawn) = color_test(loaded, max(1, n // 12), seed)
    cases = defaultdict(list)
    for name, correct in {"recognized": recognized, "drawn": drawn}.items():
        for item, is_right in zip(objects, correct, strict=True):
            cases[f"{name} {COLORS[item.color]} {SHAPES[item.shape]}"].append(is_right)
            if item.color != USUAL_COLOR[item.shape]:
                cases[name].append(is_right)
    return evaluate.summarize(cases)


def counting_accuracy(loaded, n: int, seed: int) -> dict:
    """Groups of two, three and four: drawn when asked for, and counted right in captions."""
    rng = random.Random(f"counts {seed}")
    cases = {}
    for number in (2, 3, 4):
        prompts = [f"{NUMBERS[number - 1]} {PLURALS[i % len(PLURALS)]}" for i in range(n)]
        _, cases[f"drawn_{number}"] = evaluate.generate_and_check(loaded, prompts, seed)
        scenes = []
        while len(scenes) < n:
            scene = shapes.random_scene(rng, biased=False, kind="group")
            if len(scene.objects) == number:
                scenes.append(scene)
        parsed = map(shapes.parse_caption, evaluate.caption_scenes(loaded, scenes))
        correct = map(evaluate.correct_attributes, parsed, scenes)
        cases[f"counted_{number}"] = [attributes["count"] for attributes in correct]
    return evaluate.summarize(cases)


@torch.no_grad()
def shuffled_condition_loss(loaded, n: int, seed: int) -> dict:
    """The recon loss of n held-out scenes behind their own visual words, and behind another's."""
    model = loaded.model
    test = shapes.Shapes("test", model.cfg.image_size)
    images = test.__getitems__([(0, i) for i in range(n)])["image"].to(model.device)
    prefix = model.recon_prefix(loaded.encoder, images)  # (B, T, D)
    losses = {}
    for name, condition in {"own_words": prefix, "shuffled_words": prefix.roll(1, 0)}.items():
        torch.manual_seed(seed)  # the same noise for both
        losses[name] = image_loss(model, condition, images).item()
    return losses


def compare_colors(checkpoints: list, titles: list[str], path, seed: int = 0) -> None:
    """A picture of each shape in each color, as each checkpoint generates it."""
    columns = [color_test(loaded, 1, seed)[-1] for loaded in checkpoints]
    note = f"Framed: the usual color. Tick: exactly the one object asked for. Seed {seed}."
    evaluate.save_columns(columns, PLURALS, titles, path, note, heads=COLORS, framed=USUAL_COLOR)


# ---------------------------------------------------------------- tables and plots
def markdown_table(rows: dict[str, list[dict]], columns: list[str]) -> str:
    """{title: scores by seed} -> means over seeds, and differences to the last base above."""
    lines, base = [], []
    for title, runs in rows.items():
        base = [] if title.startswith("base") else base
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            mean = f"{statistics.mean(values):.3f}" if values else ""
            gain = format_difference(runs, base, column)
            cells.append(f"{mean} ({gain})" if gain else mean)
        lines.append([title, *cells])
        control = title.replace("RecA", "SFT")
        if control != title and control in rows:  # then RecA has a line of differences to SFT too
            gains = [format_difference(runs, rows[control], column) for column in columns]
            lines.append([f"{title} - {control}", *gains])
        base = base or runs
    return f"{pipe_table(['', *columns], lines)}\n{LEGEND}\n"


def paired_difference(runs: list[dict], others: list[dict], column: str) -> tuple:
    """The mean difference and half its 95% t-interval over seeds; None where there is none."""
    pairs = zip(runs, others, strict=False)
    gains = [a[column] - b[column] for a, b in pairs if column in a and column in b]
    if len(gains) < 2:
        return (gains[0] if gains else None), None
    half = T95[len(gains) - 2] * statistics.stdev(gains) / len(gains) ** 0.5
    return statistics.mean(gains), half


def format_difference(runs: list[dict], others: list[dict], column: str) -> str:
    gain, half = paired_difference(runs, others, column)
    if half is None:
        return "" if gain is None else f"{gain:+.3f}"
    return f"{gain:+.3f} ± {half:.3f}" + (", n.s." if half >= abs(gain) else "")


def pipe_table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def color_table(rows: dict[str, list[dict]]) -> str:
    """Percent of each shape and color: recognized and drawn by the first row, drawn by the last."""
    first, *_, last = rows
    lines = []
    for shape, usual in zip(SHAPES, USUAL_COLOR, strict=True):
        line = [shape]
        for color in COLORS:
            percents = []
            for how, title in (("recognized", first), ("drawn", first), ("drawn", last)):
                share = statistics.mean(run[f"{how} {color} {shape}"] for run in rows[title])
                percents.append(f"{100 * share:.0f}")
            cell = " / ".join(percents)
            line.append(f"({cell})" if color == COLORS[usual] else cell)
        lines.append(line)
    what = f"Percent recognized by {first} / drawn by {first} / drawn by {last}"
    return f"\n{what}; the usual color in brackets:\n\n" + pipe_table(["", *COLORS], lines)


def plot_shares(scores: dict[str, list[dict]]) -> None:
    """assets/bars.svg: the means of main; its error bars are those of differences to the base."""
    columns = [*CATEGORIES, "overall", "dense", "edit", "understanding"]
    series = defaultdict(list)
    for (title, runs), column in product(scores.items(), columns):
        _, half = paired_difference(runs, scores["base"], column)
        series[title].append((statistics.mean(run[column] for run in runs), half))
    title = "Share of cases that are exactly right"
    note = "Error bars: 95% interval of the difference to the base, over seeds."
    figures.bars(columns, series, ASSETS / "bars.svg", title, note)


def plot_differences(scores: dict[str, list[dict]]) -> None:
    """assets/ablations.svg: differences to the first row. One seed has no intervals to draw."""
    columns = ["overall", "color", "position", "attribute", "edit"]
    (first, base), *others = scores.items()
    rows = {}
    for title, runs in others:
        rows[title] = [paired_difference(runs, base, column) for column in columns]
    title = f"RecA with one thing changed: the difference to {first}"
    note = "Lines: 95% interval over seeds. Grey: not significant (the interval includes 0)."
    if others and len(base) > 1:
        figures.forest(columns, rows, ASSETS / "ablations.svg", title, note)


# ---------------------------------------------------------------- the experiments
class Experiment(NamedTuple):
    rows: str  # runs, or run/checkpoint; a run of all stages has three rows
    columns: list[str]
    measure: Callable = evaluate.evaluate  # (loaded, n, seed) -> {column: value}
    picture: Callable | None = compare  # (checkpoints, titles, path, seed)
    plot: Callable | None = None  # ({title: scores by seed})


RECALL = ["object_recall", "object_recall_in_place"]
SCORES = [*CATEGORIES, "overall", "dense", "edit", *RECALL, "understanding"]
ALL_SCORES = [*SCORES, "reconstruction"]
COPY_SCORES = ["recon_loss", "overall", "color", "attribute", "dense", *RECALL, "psnr"]
RECON_SCORES = [*RECALL, "reconstruction", "psnr"]
LOSSES = ["own_words", "shuffled_words"]
COUNTS = [f"{what}_{number}" for what in ("drawn", "counted") for number in (2, 3, 4)]
COUNTED = [f"{number} {plural}" for plural in PLURALS[:2] for number in NUMBERS[1:]]
CHANGES = " ".join(["main/reca", *ABLATIONS])
PAIR = "main/pretrain main/reca"
EXPERIMENTS = {
    "main": Experiment("main", ALL_SCORES, plot=plot_shares),
    "broccoli": Experiment(PAIR, ["recognized", "drawn"], unusual_color_accuracy, compare_colors),
    "reconstruction": Experiment("main", RECON_SCORES, picture=compare_reconstructions),
    "shuffle": Experiment(PAIR, LOSSES, shuffled_condition_loss, compare_reconstructions),
    "copy": Experiment(f"{PAIR} features pixels", COPY_SCORES),
    "controls": Experiment("main own_captions dense_captions reca_sft sft_reca reca_reca", SCORES),
    "ablations": Experiment(CHANGES, SCORES, picture=None, plot=plot_differences),
    "paradigms": Experiment("main ar mask mar", ALL_SCORES),
    "noise": Experiment("main noise_3", ALL_SCORES),
    "counting": Experiment("main", COUNTS, counting_accuracy, partial(compare, prompts=COUNTED)),
    "encoder": Experiment(f"{PAIR} random/pretrain random/reca clip/pretrain clip/reca", SCORES),
    "photographs": Experiment("photographs", ["psnr", *DISTANCES]),
    "connector": Experiment("photographs/reca train_connector", ["psnr", *DISTANCES]),
}


def expand_rows(names: list[str]) -> dict[str, str]:
    """Rows of an experiment -> {title: run/checkpoint}."""
    rows = {}
    for name in names:
        run, _, checkpoint = name.partition("/")
        stage = checkpoint or RUNS[run].stage
        for found in [stage] if stage else TITLES:
            title = f"{TITLES[found]}, {run}".removesuffix(", main").removesuffix(", photographs")
            rows[RUNS[run].title or title] = f"{run}/{found}"
    return rows


def train_if_missing(row: str, seed: int, args) -> Path:
    """The checkpoint of a row; what it needs is trained first. Ends with train.py's exit code."""
    name, checkpoint = row.split("/")
    run = RUNS[name]
    path = Path(args.out_dir) / f"s{seed}" / name / f"{checkpoint}.pt"
    if path.with_name("results.json").exists():
        return path
    command = [sys.executable, str(Path(__file__).with_name("train.py"))]
    if run.variant != RUNS["main"].variant:
        command = [sys.executable, __file__, "train", "--variant", name]
    command += ["--out_dir", str(path.parent)]
    if path.with_name("run.json").exists():
        command.append("--resume")
    else:
        given = {"encoder": args.encoder or "clip-b16", "data_dir": args.data_dir}
        command += ["--seed", str(seed), "--eval_n", str(args.n), *shlex.split(args.train)]
        if run.parent:
            parent = train_if_missing(run.parent, seed, args)
            command += ["--stage", run.stage, "--init_from", str(parent)]
        command += [word.format(**given) for word in run.options.split()]
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # train.py has got the signal too, and saves its state first
        code = process.wait()
    if code:
        raise SystemExit(code)
    return path


def load(row: str, seed: int, args):
    model_class = RUNS[row.split("/")[0]].model_class
    return Checkpoint(train_if_missing(row, seed, args), args.device, model_class)


def read_scores(row: str, seed: int, measure: Callable, args) -> dict:
    """The scores of a row: of results.json if they are of as many cases, else measured and kept."""
    path = train_if_missing(row, seed, args)
    stage = path.stem
    scores = json.loads(path.with_name("results.json").read_text()).get(stage, {})
    if measure is not evaluate.evaluate or scores.get("cases", {}).get("psnr") != args.n:
        kept = path.with_name(f"{measure.__name__}_{stage}_{args.n}.json")
        if not kept.exists() or kept.stat().st_mtime < path.stat().st_mtime:
            evaluate.write_json(kept, measure(load(row, seed, args), args.n, seed))
        scores = json.loads(kept.read_text())
    log = path.with_name("log.jsonl")
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        if entry["stage"] == stage and "recon" in entry:
            scores["recon_loss"] = entry["recon"]  # the last one stays
    return {name: score for name, score in scores.items() if score is not None}


def run_experiment(name: str, args) -> None:
    """Trains and scores what is missing, then writes assets/NAME.md and a picture."""
    names, columns, measure, picture, plot = EXPERIMENTS[name]
    names = [row for row in names.split() if args.encoder or not row.startswith("clip/")]
    runs = dict.fromkeys(row.split("/")[0] for row in names)
    chosen = args.runs.split() or runs
    unknown = set(chosen) - set(runs)
    if unknown:
        raise ValueError(f"--runs: {name} has no run {min(unknown)}, it has {' '.join(runs)}")
    rows = expand_rows([row for row in names if row.split("/")[0] in chosen])
    ASSETS.mkdir(exist_ok=True)
    if not args.picture:
        scores = {title: [] for title in rows}
        for seed, (title, row) in product(args.seeds, rows.items()):
            scores[title].append(read_scores(row, seed, measure, args))
        seeds = " ".join(map(str, args.seeds))
        command = f"python experiments.py {name} --seeds {seeds} --n {args.n}"
        for option in ("runs", "train", "encoder", "data_dir"):
            value = getattr(args, option)
            command += f" --{option}={shlex.quote(value)}" if value else ""
        text = f"`{command}`\n\n{markdown_table(scores, columns)}"
        text += color_table(scores) if name == "broccoli" else ""
        (ASSETS / f"{name}.md").write_text(text)
        print(text)
        if plot:
            plot(scores)
    if picture:
        checkpoints = [load(row, args.seeds[0], args) for row in rows.values()]
        picture(checkpoints, list(rows), ASSETS / f"{name}.png", args.seeds[0])


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        parser = Parser(add_help=False)
        names = [name for name, run in RUNS.items() if run.variant != RUNS["main"].variant]
        parser.add_argument("--variant", choices=names, required=True)
        args, options = parser.parse_known_args(argv[1:])
        return train.main(options, *RUNS[args.variant].variant)
    parser = Parser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("name", choices=EXPERIMENTS, help="what to train, score and draw")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of runs, prompts and noise")
    add("--n", type=int, default=64, help="cases of each category (64)")
    add("--picture", action="store_true", help="only the picture, of the first seed")
    add("--runs", default="", help='a part of an experiment: --runs="main ar"')
    add("--out_dir", default="experiments", help="where runs are, as s0/main, s0/pixels, ...")
    add("--train", default="", help='more options of all runs: --train="--reca_steps 5"')
    add("--encoder", default="", help="CLIP's weights: for two rows of encoder; of photographs")
    add("--data_dir", default="", help="where the photographs are, train/ and val/")
    add("--device", default=device, help=f"({device})")
    args = parser.parse_args(argv)
    if args.n < 1:
        parser.error(f"--n is {args.n}, it must be at least 1")
    is_different = len(set(args.seeds)) == len(args.seeds) <= len(T95) + 1
    if not is_different or min(args.seeds) < 0:
        parser.error(f"--seeds: give one to {len(T95) + 1} different seeds, at least 0")
    with user_errors():
        run_experiment(args.name, args)


if __name__ == "__main__":
    main()
