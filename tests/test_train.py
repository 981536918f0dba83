"""The engine: killed at any moment and resumed to the bit, shared over processes, refused in one sentence.

    pytest tests/test_train.py
    python tests/test_train.py --kills 20       # the long version: SIGKILL at 20 random moments, then SIGTERM
"""
import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from torch import nn

import evaluate
import train

ROOT = Path(train.__file__).parent
TINY = ("--width 16 --depth 1 --heads 2 --image_size 24 --patch_size 8 --batch_size 4 --understand_batch 4 --side_batch 2 --replay_batch 2 --draws 2 --encoder_steps 6 --pretrain_steps 14 "
        "--align_steps 6 --reca_steps 8 --eval_n 2 --warmup 2 --log_every 4 --save_every 3 --device cpu").split()


def run(out, *more):
    """train.py in this process, without the scores at its end."""
    original = train.report
    train.report = lambda *args: None
    try:
        train.main([*TINY, "--out_dir", str(out), *map(str, more)])
    finally:
        train.report = original
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def weights(path):
    saved = torch.load(path, weights_only=True)
    return {**saved["model"], **{f"ema.{k}": v for k, v in (saved["ema"] or {}).items()}}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def lines(out):
    """log.jsonl without what depends on the clock."""
    timed = ("images_per_second", "tokens_per_second", "gigabytes")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Killed at random moments


def slow_save(state, file, real=torch.save):
    """torch.save in two halves with a pause between, so that a kill often falls into a save."""
    import io
    whole = io.BytesIO()
    real(state, whole)
    half = len(whole.getvalue()) // 2
    file.write(whole.getvalue()[:half])
    file.flush()
    time.sleep(0.03)
    file.write(whole.getvalue()[half:])


def child(arguments) -> int:
    """Forks; the child runs train.py. Only a process that has not computed yet may fork: so this runs in one of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.save = slow_save
            run(*arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return pid


def killing(kills: int, number: int, seed: int, options=("--ema", "0.9")) -> dict:
    """Kills a run at random moments until `kills` are done, resumes it each time, and compares the end with a run left alone."""
    rng, done, starts, in_save, moments = random.Random(seed), 0, 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        assert os.waitstatus_to_exitcode(os.waitpid(child([f"{folder}/alone", *options]), 0)[1]) == 0
        length = time.time() - began
        while done < kills:
            out = Path(folder) / f"killed{done}"
            while True:
                pid = child([out, *options, *(["--resume"] if (out / "run.json").exists() else [])])
                starts += 1
                time.sleep(rng.uniform(0, length) if done < kills else length * 3)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    os.kill(pid, number)
                    _, status = os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status)
                if code == 0:
                    break
                assert code in (-number, 128 + number), f"exit code {code}"
                done += 1
                in_save += bool(list(out.glob("*.tmp")))
                moments.append(max((p.name for p in out.glob("state-*.pt")), default="start"))
            for name in ("encoder", "pretrain", "sft", "reca"):
                same(weights(f"{folder}/alone/{name}.pt"), weights(out / f"{name}.pt"))
            assert lines(f"{folder}/alone") == lines(out), "the log differs"
    return {"kills": done, "starts": starts, "within a save": in_save, "after": moments}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_ends_with_the_same_bits(number):
    done = subprocess.run([sys.executable, __file__, "--kills", "4", "--signal", str(int(number))], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# A user's mistakes: one sentence, exit code 2, nothing begun


def folder(tmp, name, *files):
    for file in files:
        (tmp / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name / file).write_bytes(b"no picture")
    return tmp / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders and files to be wrong about."""
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "empty").mkdir()
    folder(tmp, "bad_photos", "train/n01443537/a.JPEG", "val/n01443537/b.JPEG", "words.txt")
    (tmp / "bad_photos" / "words.txt").write_text("n01443537\tgoldfish\n")
    folder(tmp, "no_train", "val/n01443537/b.JPEG")
    folder(tmp, "no_classes", "train/b.JPEG", "val/c.JPEG")
    (tmp / "file").write_text("a file")
    (tmp / "text.pt").write_text("no checkpoint")
    torch.save({"format": 1}, tmp / "half.pt")
    torch.save({"format": 99}, tmp / "future.pt")
    torch.save([1, 2], tmp / "list.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp / "foreign.pt")
    run(tmp / "done", "--encoder_steps", 1, "--pretrain_steps", 1, "--align_steps", 1, "--reca_steps", 1)
    (tmp / "cut.pt").write_bytes((tmp / "done" / "reca.pt").read_bytes()[:5000])
    run(tmp / "early", "--stage", "pretrain", "--pretrain_steps", 1)
    with pytest.raises(SystemExit):
        Stop.at(tmp / "begun", 5)
    (tmp / "nothing_left").mkdir()
    shutil.copy(tmp / "begun" / "run.json", tmp / "nothing_left")
    return tmp


class Stop:
    """A run that gets SIGTERM in step `step` of pretrain."""

    @staticmethod
    def at(out, step, *more):
        real, calls = train.update, []

        def update(*args):
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)
        train.update = update
        try:
            run(out, "--encoder_steps", 0, *more)
        finally:
            train.update = real


WRONG = """
--batchsize 8 | did you mean --batch_size
--data-dir x | did you mean --data_dir
--lr 1e-3 | unrecognized
--reca_step 5 | did you mean --reca_steps
--seeds 1 | did you mean --seed
--dataste shapes | did you mean --dataset
--paradigms flow | did you mean --paradigm
--out x | --help
--resumed | did you mean --resume
--stages all | did you mean --stage
--compil on | did you mean --compile
--emma 0.9 | did you mean --ema
--no-resumee | did you mean --no-resume
--Seed 1 | did you mean --seed
-batch_size 8 | unrecognized
shapes | unrecognized
--dataset | expected one argument
--seed | expected one argument
--out_dir | expected one argument
--dataset mnist | invalid choice
--dataset ImageNet | invalid choice
--stage RecA | invalid choice
--stage finetune | invalid choice
--paradigm diffusion | invalid choice
--paradigm FLOW | invalid choice
--captions rich | invalid choice
--dtype fp16 | invalid choice
--dtype float64 | invalid choice
--compile yes | invalid choice
--batch_size many | invalid int
--batch_size 1.5 | invalid int
--batch_size 1e3 | invalid int
--batch_size 0 | at least 1
--batch_size -4 | at least 1
--side_batch 0 | at least 1
--understand_batch -1 | at least 1
--draws 0 | at least 1
--width 0 | at least 1
--width -128 | at least 1
--depth 0 | at least 1
--heads 0 | at least 1
--heads 3 | a multiple of --heads
--image_size 0 | at least 1
--image_size -48 | at least 1
--image_size 50 | a multiple of --patch_size
--image_size 64 --patch_size 16 | multiple of 3
--image_size 36 --patch_size 12 --paradigm ar | a multiple of 8
--image_size 36 --patch_size 12 --paradigm mask | a multiple of 8
--patch_size 0 | at least 1
--patch_size 7 | a multiple of --patch_size
--text_len 0 | --text_len is 0
--text_len 12 | its longest caption
--encoder_size -1 | at least 0
--encoder_steps -1 | at least 0
--pretrain_steps -1 | at least 0
--align_steps -5 | at least 0
--reca_steps -1 | at least 0
--reca_steps ten | invalid int
--warmup -1 | at least 0
--encoder_lr 0 | a positive number
--pretrain_lr nan | a positive number
--pretrain_lr -1e-3 | expected one argument
--pretrain_lr -0.001 | a positive number
--align_lr inf | a positive number
--reca_lr 0 | a positive number
--reca_lr fast | invalid float
--grad_clip 0 | a positive number
--grad_clip nan | a positive number
--decay 1.5 | in [0, 1]
--decay nan | in [0, 1]
--ema 1 | in [0, 1)
--ema -0.1 | in [0, 1)
--ema nan | in [0, 1)
--drop 1 | in [0, 1)
--images -1 | at least 0
--visual_words 18 | at most 17
--trains mlp | invalid choice
--sharpness -1 | at least 0
--noise_scale 0 | a positive number
--templates 5 | in 0 to 4
--condition pixels | only --stage reca
--dataset imagenet --data_dir {place} --encoder random | control on the shapes
--weight_decay -1 | at least 0
--t2t -1 | at least 0
--i2t nan | at least 0
--replay inf | at least 0
--words -0.5 | at least 0
--seed -1 | at least 0 and below
--seed 99999999999 | at least 0 and below
--seed x | invalid int
--workers -2 | -1 or more
--save_every 0 | at least 1
--log_every 0 | at least 1
--eval_n 0 | at least 1
--keep 0 | at least 1
--accumulate 0 | at least 1
--accumulate 3 | a multiple of 1 processes x --accumulate 3
--shard | several processes
--device gpu | invalid choice
--device cuda:99 | invalid choice
--device mps | invalid choice
--dataset imagenet | needs --data_dir
--dataset folder | needs --data_dir
--dataset imagenet --data_dir {place}/nowhere | no such folder
--dataset imagenet --data_dir {place}/file | a file, not a folder
--dataset imagenet --data_dir {place}/empty | empty folder
--dataset imagenet --data_dir {place}/no_train | no train/
--dataset imagenet --data_dir {place}/no_classes | no class folders
--dataset imagenet --data_dir {place}/bad_photos --encoder {place}/file | file
--dataset imagenet --data_dir {place}/bad_photos | can be read
--dataset folder --data_dir {place}/empty | empty folder
--dataset folder --data_dir {place}/done | no images
--dataset imagenet --data_dir {place}/bad_photos --encoder scratch | public weights
--encoder clip-b17 | did you mean clip-b16
--encoder {fixtures}/hf_clip | not a multiple of the encoder's patch size
--encoder {place}/nowhere | neither a path nor an encoder
--encoder {place}/empty | holds none of
--encoder {place}/text.pt | text.pt
--encoder {place}/half.pt | half.pt
--out_dir {place}/file | cannot be made
--out_dir {place}/file/out | cannot be made
--out_dir {place}/empty --resume | there is no run
--out_dir {place}/begun | has not ended
--out_dir {place}/begun --resume --width 32 | goes on with that
--out_dir {place}/begun --resume --paradigm ar | goes on with that
--out_dir {place}/begun --resume --seed 5 | goes on with that
--out_dir {place}/begun --resume --pretrain_lr -1 | a positive number
--stage align | --init_from
--stage sft | --init_from
--stage reca | --init_from
--stage pretrain --paradigm ar | --init_from
--stage reca --init_from {place}/nowhere.pt | there is no checkpoint
--stage reca --init_from {place}/empty | there is no checkpoint
--stage reca --init_from {place}/text.pt | damaged
--stage reca --init_from {place}/cut.pt | damaged
--stage reca --init_from {place}/list.pt | format
--stage reca --init_from {place}/future.pt | format 99
--stage reca --init_from {place}/foreign.pt | format
--stage reca --init_from {place}/half.pt | does not fit this code
--stage reca --init_from {place}/early/pretrain.pt | of stage pretrain
--stage reca --init_from {place}/done/encoder.pt | of stage encoder
--stage reca --init_from {place}/done/pretrain.pt --width 32 | width is 16 there and 32 here
--stage reca --init_from {place}/done/pretrain.pt --paradigm mar | paradigm is flow there
--stage reca --init_from {place}/done/pretrain.pt --image_size 48 | image_size is 24 there
--stage sft --init_from {place}/done/pretrain.pt --depth 2 | depth is 1 there
"""


@pytest.mark.parametrize("line", [line for line in WRONG.strip().splitlines()])
def test_a_mistake_gets_one_sentence_before_any_work(line, place, capsys, monkeypatch, tmp_path):
    options, _, expected = line.partition(" | ")
    monkeypatch.setattr(train, "train_stage", lambda *args: pytest.fail("training began"))
    monkeypatch.setattr(train, "report", lambda *args: pytest.fail("training ended"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    began = time.time()
    before = sorted((p, p.stat().st_mtime) for p in place.rglob("*.pt"))
    base = TINY if "--dataset" not in options else []
    with pytest.raises(SystemExit) as end:
        train.main([*base, "--out_dir", str(tmp_path / "out"), *options.format(place=place, fixtures=ROOT / "tests/fixtures/encoder").split()])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2, f"exit code {end.value.code}"
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message, message
    assert expected in message, message
    assert before == sorted((p, p.stat().st_mtime) for p in place.rglob("*.pt")), "something was written"
    assert time.time() - began < 5


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is lost


def interrupted(out, step, *more):
    """A run that is stopped after a step of pretrain."""
    with pytest.raises(SystemExit) as end:
        Stop.at(out, step, *more)
    assert end.value.code == 128 + signal.SIGTERM
    return out


def test_the_newest_state_that_is_whole_is_taken(tmp_path, capsys):
    alone = tmp_path / "alone"
    run(alone, "--stage", "pretrain")
    for damage in ("flip", "cut", "empty"):
        out = tmp_path / damage
        with pytest.raises(SystemExit):
            Stop.at(out, 8, "--stage", "pretrain", "--keep", 3)
        newest, before, oldest = train.find_states(out)  # keep 3: steps 8, 6, 3
        assert [int(p.stem[-7:]) for p in (newest, before, oldest)] == [8, 6, 3]
        data = bytearray(newest.read_bytes())
        if damage == "flip":
            at = data.index(torch.load(newest, weights_only=True)["model"]["wte.weight"].numpy().tobytes())
            data[at + 40] ^= 1  # one bit of one weight
        newest.write_bytes({"flip": data, "cut": data[:len(data) // 2], "empty": b""}[damage])
        capsys.readouterr()
        run(out, "--stage", "pretrain", "--keep", 3, "--resume")
        assert "is damaged" in capsys.readouterr().out
        same(weights(alone / "pretrain.pt"), weights(out / "pretrain.pt"))
        assert lines(alone) == lines(out)


def test_a_run_without_any_whole_state_begins_anew(tmp_path, capsys):
    run(tmp_path / "alone", "--stage", "pretrain")
    out = interrupted(tmp_path / "out", 2, "--stage", "pretrain")
    train.find_states(out)[0].write_bytes(b"")
    run(out, "--resume")  # the settings are in run.json
    same(weights(tmp_path / "alone" / "pretrain.pt"), weights(out / "pretrain.pt"))


def test_photographs_resume_to_the_bit_and_states_leave_public_weights_out(tmp_path):
    from PIL import Image
    for n in range(6):
        (tmp_path / "photos" / f"kind{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (40 * n, 90, 200 - 30 * n)).save(tmp_path / f"photos/kind{n % 2}/{n}.png")
    photos = ["--dataset", "folder", "--data_dir", tmp_path / "photos", "--cache_dir", tmp_path / "cache", "--encoder", ROOT / "tests/fixtures/encoder/hf_clip", "--encoder_size", 25,
              "--text_len", 9, "--workers", 0, "--save_every", 5]
    run(tmp_path / "whole", "--encoder_steps", 0, *photos)
    with pytest.raises(SystemExit):
        Stop.at(tmp_path / "cut", 7, *photos)
    names = torch.load(train.find_states(tmp_path / "cut")[0], weights_only=True)["parts"]
    assert any(name.startswith("model.") for name in names) and not any(name.startswith("encoder.") for name in names)
    run(tmp_path / "cut", "--resume")
    for name in ("pretrain", "sft", "reca"):
        same(weights(tmp_path / f"whole/{name}.pt"), weights(tmp_path / f"cut/{name}.pt"))
    (tmp_path / "photos").rename(tmp_path / "moved")
    evaluate.main(["--data_dir", str(tmp_path / "moved"), "--ckpt", *(str(tmp_path / f"whole/{name}.pt") for name in ("pretrain", "reca")), "--n", "3", "--json", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [scores[name]["cases"] for name in ("pretrain", "reca")] == 2 * [{"psnr": 1, "cosine": 1, "t2i_cosine": 1}], "of six photographs one is held out"
    train.main(["--resume", "--out_dir", str(tmp_path / "whole"), "--data_dir", str(tmp_path / "moved")])
    assert json.loads((tmp_path / "whole/results.json").read_text()).keys() == {"pretrain", "sft", "reca"}, "checkpoints from before the photographs moved are scored too"


def test_resume_may_change_the_rate_but_not_the_model(tmp_path):
    out = interrupted(tmp_path / "out", 5, "--stage", "pretrain")
    run(out, "--resume", "--pretrain_lr", 1e-9)
    logged = lines(out)
    assert [line["step"] for line in logged] == [4, 8, 12, 14]
    assert logged[0]["lr"] == train.Config.pretrain_lr and logged[-1]["lr"] < 1e-9


def test_a_finished_run_is_taken_over_and_a_new_one_says_so(tmp_path, capsys):
    out = tmp_path / "out"
    run(out, "--stage", "pretrain", "--pretrain_steps", 4)
    kept = weights(out / "pretrain.pt")
    run(out, "--resume", "--pretrain_steps", 4)  # nothing is left to do
    same(kept, weights(out / "pretrain.pt"))
    capsys.readouterr()
    run(out, "--stage", "pretrain", "--pretrain_steps", 3, "--seed", 1)
    assert "holds a finished run" in capsys.readouterr().out
    assert [line["step"] for line in lines(out)] == [3]
    assert [p.name for p in train.find_states(out)] == ["state-1-pretrain-0000003.pt"]


def test_a_second_signal_stops_at_once_but_not_under_torchrun(monkeypatch):
    """Ctrl-C reaches the processes twice there: from the terminal, and from torchrun."""
    for world, asked in ((1, pytest.raises(SystemExit)), (2, nullcontext())):
        monkeypatch.setattr(train, "WORLD", world)
        interrupt = train.Interrupt()
        with pytest.raises(SystemExit) as end:
            interrupt(signal.SIGTERM, None)  # nothing is trained yet
        assert end.value.code == 128 + signal.SIGTERM
        interrupt.training = True
        interrupt(signal.SIGINT, None)
        with asked:
            interrupt(signal.SIGINT, None)
        assert interrupt.asked == signal.SIGINT


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_ends_the_run_before_it_is_saved(where, tmp_path, capsys, monkeypatch):
    real = train.update

    def update(core, *args):
        update.step += 1
        learning = args[1][0].param_groups[0]["params"]
        if update.step == 8:  # after this step the weights are no numbers either
            with torch.no_grad():
                learning[0].fill_(float("nan"))
        parts = real(core, *args)
        return parts | ({"t2i": torch.tensor(0.5), "t2t": torch.tensor(0.5)} if where == "gradient" else {})
    update.step = 0
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--stage", "pretrain", "--save_every", 4)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "at step 8 of stage pretrain" in message and "--resume" in message and "state-1-pretrain-0000004.pt" in message, message
    assert ("grad_norm" if where == "gradient" else "t2i") in message
    assert [p.name for p in train.find_states(tmp_path)] == ["state-1-pretrain-0000004.pt"]
    assert all(torch.isfinite(v).all() for v in weights(train.find_states(tmp_path)[0]).values())
    monkeypatch.setattr(train, "update", real)
    run(tmp_path, *re.search(r"(--resume) --out_dir \S+ (--pretrain_lr) (\S+)", message).groups())


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    """The lock is of a process, and ends with it, also by SIGKILL."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import train, pathlib; held = train.claim(pathlib.Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    assert end.value.code == 2 and "another run is at work" in capsys.readouterr().err
    other.kill()
    other.wait()
    run(tmp_path, "--stage", "pretrain", "--pretrain_steps", 1)


def test_a_full_disk_leaves_the_last_good_state(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        run(tmp_path / "alone", "--stage", "pretrain")
        size = (tmp_path / "alone" / "state-1-pretrain-0000014.pt").stat().st_size
        subprocess.run(["mount", "-o", f"remount,size={int(size * 1.6) // 1024}k", disk], check=True)
        with pytest.raises(SystemExit) as end:
            run(disk, "--stage", "pretrain")
        message = capsys.readouterr().err
        assert end.value.code == 2 and "No space left" in message and "free some space" in message and "Traceback" not in message, message
        assert [p.name for p in disk.glob("*.pt*")] == ["state-1-pretrain-0000003.pt"]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        run(disk, "--resume")
        same(weights(tmp_path / "alone" / "pretrain.pt"), weights(disk / "pretrain.pt"))
    finally:
        subprocess.run(["umount", "-l", disk])


def test_a_save_cut_by_a_limit_on_file_sizes_leaves_the_last_good_state(tmp_path, capsys, monkeypatch):
    """`ulimit -f`, which needs no rights: from step 5 on no file may be longer than half a state."""
    run(tmp_path / "alone", "--stage", "pretrain")
    before, half = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "alone" / "state-1-pretrain-0000014.pt").stat().st_size // 2
    real, calls, out = train.update, [], tmp_path / "out"

    def update(*args):
        calls.append(1)
        if len(calls) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))
        return real(*args)
    monkeypatch.setattr(train, "update", update)
    try:
        with pytest.raises(SystemExit) as end:
            run(out, "--stage", "pretrain")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "File too large" in message and message.count("\n") == 1 and "Traceback" not in message, message
    assert [p.name for p in out.glob("*.pt*")] == ["state-1-pretrain-0000003.pt"]
    (out / "run.json").write_bytes(b"")  # cut, too
    with pytest.raises(SystemExit):
        run(out, "--stage", "pretrain")
    assert "has not ended" in capsys.readouterr().err and train.find_states(out), "a new run took the place of one that could go on"
    run(out, "--resume")
    same(weights(tmp_path / "alone" / "pretrain.pt"), weights(out / "pretrain.pt"))
    assert lines(tmp_path / "alone") == lines(out)


def test_out_of_memory_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    real, calls = train.update, []

    def update(*args):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return real(*args)
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--stage", "pretrain")
    assert end.value.code == 2 and "--accumulate 2" in capsys.readouterr().err
    run(tmp_path, "--resume", "--accumulate", 2)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12, 14]


# ----------------------------------------------------------------------------------------------------------------------
# One step


def toy(tmp_path, *options):
    cfg, _ = train.parse_config([*TINY, "--out_dir", str(tmp_path), *map(str, options)])
    policy = train.Policy(cfg)
    made = train.Run(cfg, policy)
    return made, cfg, policy


class Squares(nn.Module):
    """A core step without noise: the mean of (w x - y)^2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))

    def forward(self, batch):
        loss = ((batch["main"]["x"] @ self.w.T) ** 2).mean()
        return loss, {"squares": loss}


def test_accumulated_parts_are_one_batch(tmp_path):
    x, ends = torch.randn(12, 3), []
    for parts in (1, 2, 3):
        _, cfg, policy = toy(tmp_path, "--batch_size", 12, "--side_batch", 12, "--replay_batch", 12, "--understand_batch", 12, "--accumulate", parts)
        core = Squares()
        optimizers = train.make_optimizers({"w": core.w}, cfg)
        said = train.update(core, {"main": {"x": x}}, optimizers, policy.scaler(), policy, cfg)
        w = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
        loss = ((x @ w.T) ** 2).mean()
        loss.backward()
        torch.testing.assert_close(said["squares"], loss.detach())
        torch.testing.assert_close(said["grad_norm"], w.grad.norm())
        ends.append(core.w.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_muon_takes_the_matrices_inside_and_adamw_the_rest(tmp_path):
    run, cfg, _ = toy(tmp_path, "--paradigm", "ar")
    named = {id(p): name for name, p in run.parts.named_parameters()}
    adamw, muon = ({named[id(p)] for group in o.param_groups for p in group["params"]} for o in train.make_optimizers(dict(run.parts.named_parameters()), cfg))
    assert adamw | muon == set(named.values()) and not adamw & muon
    assert {"model.blocks.0.attn.out_proj.weight", "model.connector.blocks.0.down_proj.weight", "model.tokenizer.decoder.0.weight"} <= muon
    assert {"model.wte.weight", "model.lm_head.weight", "model.text_pos", "model.image_pos", "model.tokenizer.decoder.0.bias"} <= adamw


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(tmp_path):
    _, cfg, policy = toy(tmp_path, "--dtype", "float16")
    core, scaler = Squares(), torch.amp.GradScaler("cpu", init_scale=2.0 ** 8)
    optimizers = train.make_optimizers({"w": core.w}, cfg)
    policy.autocast = lambda: torch.autocast("cpu", enabled=False)
    x, start = torch.randn(4, 3), core.w.detach().clone()
    good = train.update(core, {"main": {"x": x}}, optimizers, scaler, policy, cfg)
    w = start.clone().requires_grad_()
    ((x @ w.T) ** 2).mean().backward()
    torch.testing.assert_close(good["grad_norm"], w.grad.norm())  # unscaled before it is clipped
    moved = core.w.detach().clone()
    assert not torch.equal(moved, start)
    bad = train.update(core, {"main": {"x": torch.full((4, 3), float("inf"))}}, optimizers, scaler, policy, cfg)
    assert not bad["grad_norm"].isfinite() and torch.equal(core.w.detach(), moved) and scaler.get_scale() == 2.0 ** 7
    assert policy.scaler().is_enabled() and not toy(tmp_path)[2].scaler().is_enabled()


def test_bfloat16_is_close_to_float32(tmp_path):
    run(tmp_path / "a", "--stage", "pretrain")
    run(tmp_path / "b", "--stage", "pretrain", "--dtype", "bfloat16")
    for a, b in zip(lines(tmp_path / "a"), lines(tmp_path / "b")):
        assert abs(a["t2i"] - b["t2i"]) < 0.02 and abs(a["t2t"] - b["t2t"]) < 0.02
    assert lines(tmp_path / "a") != lines(tmp_path / "b")
    assert {v.dtype for v in weights(tmp_path / "b" / "pretrain.pt").values()} == {torch.float32}


def test_recomputed_activations_change_nothing(tmp_path):
    run(tmp_path / "a", "--stage", "pretrain")
    run(tmp_path / "b", "--stage", "pretrain", "--checkpoint_activations")
    same(weights(tmp_path / "a" / "pretrain.pt"), weights(tmp_path / "b" / "pretrain.pt"))


def test_ema_is_the_average_that_its_equation_says(tmp_path, monkeypatch):
    steps, real = [], train.update

    def update(core, *args):
        said = real(core, *args)
        steps.append({n.removeprefix("parts.model."): p.detach().clone() for n, p in core.named_parameters() if "parts.model." in n})
        return said
    monkeypatch.setattr(train, "update", update)
    first, load = [], train.Run.load
    run(tmp_path, "--stage", "pretrain", "--ema", 0.5)
    saved = torch.load(tmp_path / "pretrain.pt", weights_only=True)
    start = toy(tmp_path)[0].model.state_dict()  # the same seed
    for name in ("wte.weight", "blocks.0.up_proj.weight"):
        average = start[name].clone()
        for step, weights_then in enumerate(steps):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weights_then[name]
        torch.testing.assert_close(saved["ema"][name], average)
        assert torch.equal(saved["model"][name], steps[-1][name])
    torch.testing.assert_close(saved["ema"]["connector.queries"], saved["model"]["connector.queries"])  # not trained, not averaged
    from sample import load_checkpoint
    torch.testing.assert_close(load_checkpoint(tmp_path / "pretrain.pt").model.wte.weight, saved["ema"]["wte.weight"])
    second = toy(tmp_path)[0]
    second.load(tmp_path / "pretrain.pt", "align")  # the next stage starts from what samples
    assert torch.equal(second.model.wte.weight, saved["ema"]["wte.weight"])


def test_the_controls_change_what_they_say(place, tmp_path, monkeypatch):
    seen, one = {}, lambda stage, *more: run(tmp_path / "one", "--stage", stage, "--init_from", place / "done/pretrain.pt", "--reca_steps", 3, *more)
    base = weights(place / "done/pretrain.pt")
    moved = lambda stage="reca": {name for name, w in weights(tmp_path / f"one/{stage}.pt").items() if name not in base or not torch.equal(w, base[name])}
    recon_loss, loss = train.recon_loss, train.total_loss
    t2i, recon, drop = recon_loss.t2i_loss, recon_loss.recon_loss, recon_loss.drop_prefix

    def look(model, encoder, batch, *args, **how):
        seen.setdefault("images", set()).update(image.sum().item() for image in batch["main"]["image"])
        seen["words"] = recon_loss.see(model, encoder, batch["main"]["image"]).argmax(-1)
        return loss(model, encoder, batch, *args, **how)

    monkeypatch.setattr(train, "total_loss", look)
    monkeypatch.setattr(recon_loss, "t2i_loss", lambda model, caption, images: (seen.setdefault("captions", []).append(caption), t2i(model, caption, images))[1])
    monkeypatch.setattr(recon_loss, "drop_prefix", lambda model, prefix, p: (seen.update(drop=p), drop(model, prefix, p))[1])
    one("reca", "--images", 2, "--drop", 0.25)
    assert len(seen["images"]) == 2 and seen["drop"] == 0.25
    one("reca", "--trains", "attention")
    assert moved() and all(".attn." in name and not name.startswith("connector") for name in moved())
    one("reca", "--visual_words", 3)
    assert not seen["words"][:, 3:].any()
    words = seen["words"]
    one("reca", "--reverse_words", "--visual_words", 3)
    assert torch.equal(seen["words"].flip(1), words)
    monkeypatch.setattr(recon_loss, "recon_loss", lambda model, *args, **how: (seen.update(sharpness=model.cfg.sharpness, templates=recon_loss.TEMPLATES), recon(model, *args, **how))[1])
    one("reca", "--sharpness", 0.5, "--templates", 3)
    assert seen["sharpness"] == 0.5 and seen["templates"] == 3
    one("sft", "--captions", "own", "--replay", 0)
    assert torch.equal(seen["captions"][-1][:, 1:], seen["words"]) and (seen["captions"][-1][:, 0] == 1).all()
    for condition, names in {"features": {"raw_norm.weight", "raw_proj.0.weight", "raw_proj.2.weight"}, "pixels": {"raw_proj.weight"}}.items():
        one("reca", "--condition", condition)
        assert {name for name in moved() if name.startswith("raw")} == names and not any(name.startswith("connector") for name in moved())
    monkeypatch.undo()
    run(tmp_path / "two", "--encoder", "random")
    encoders = [torch.load(tmp_path / f"two/{name}.pt", weights_only=True)["encoder"]["state"] for name in ("encoder", "reca")]
    torch.manual_seed(0)
    same(encoders[0], encoders[1])
    same(encoders[1], train.ViT(train.scratch_config(24, 8)).state_dict())


def test_caption_tower():
    tower, ids = train.CaptionTower(10, 7, 24, 10, uni=1, multi=1, heads=3), torch.tensor([[1, 5, 6, 2, 0, 0, 0], [1, 4, 7, 8, 9, 2, 0]])
    assert tower.log_scale.exp().item() == pytest.approx(10) and tower.bias.item() == -10
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    patches = torch.randn(2, 5, 10, requires_grad=True)
    text, logits = tower(ids, patches)
    assert text.shape == (2, 10) and logits.shape == (2, 7, 10)
    assert torch.autograd.grad(text.sum(), patches, allow_unused=True)[0] is None, "the text embedding is of the text alone"
    assert torch.autograd.grad(logits[0, 0].sum(), patches)[0][0].abs().sum(-1).all(), "every word is written with all patches in sight"
    other = ids.clone()
    other[0, 4:], other[0, 2] = 3, 3
    changed, changed_logits = tower(other, patches)
    assert (changed_logits - logits)[0, :2].abs().max() == 0, "no word sees a later one"
    other[0, 2] = 6
    torch.testing.assert_close(tower(other, patches)[0], text, atol=0, rtol=0)  # words after <eos> do not count
    assert (changed - text)[0].abs().max() > 1e-4 and (changed - text)[1].abs().max() == 0


def test_learning_rate_rises_stays_and_falls_to_zero():
    cfg = train.Config(warmup=10, decay=0.25)
    rates = [train.learning_rate(step, 100, 2.0, cfg) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and max(rates) == 2.0 and rates[50] == 2.0
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])) and all(a > b for a, b in zip(rates[76:], rates[77:])) and 0 < rates[99] < 0.1


@pytest.mark.parametrize("image_size, least, most, positions", [(64, 28e6, 36e6, 64), (256, 115e6, 140e6, 256)])
def test_presets_have_their_sizes(image_size, least, most, positions):
    cfg, _ = train.parse_config(["--dataset", "imagenet", "--image_size", str(image_size)])
    with torch.device("meta"):
        model = train.UnifiedModel(train.ModelConfig(
            vocab_size=2000, text_len=cfg.text_len, image_size=cfg.image_size, patch_size=cfg.patch_size, width=cfg.width, depth=cfg.depth, heads=cfg.heads, encoder_width=768))
    assert least < sum(p.numel() for p in model.parameters()) < most
    assert model.cfg.image_len == positions


def test_cost_counts_products_and_tokens(tmp_path):
    made, cfg, policy = toy(tmp_path, "--encoder_size", 0)
    made.parameters_of("reca")
    core = train.Core(made, "pretrain", {"t2i": 1.0})
    B, T, D, N, P, R = 4, made.model.cfg.text_len, 16, 9, 192, cfg.draws
    batch = {"main": {"image": torch.rand(B, 3, 24, 24), "caption": torch.ones(B, T, dtype=torch.long)}}
    flops, tokens = train.cost(core, batch, policy, cfg)
    S = T + R * N
    assert tokens == B * S
    forward = B * S * (4 + 8) * D * D + B * 2 * S * S * D + B * R * N * 2 * P * D  # blocks, attention, patches in and out
    assert 2 * 2.5 * forward < flops < 2 * 3.5 * forward, f"{flops / forward / 2:.2f} times the forward pass"


# ----------------------------------------------------------------------------------------------------------------------
# Several processes, and the compiler


def torchrun(out, *more, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(ROOT / "train.py"), *TINY, "--out_dir", str(out), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


FIFTY = ["--stage", "pretrain", "--pretrain_steps", 50, "--log_every", 1, "--warmup", 100, "--decay", 0, "--save_every", 20]


def test_two_processes_give_the_losses_of_one(tmp_path):
    run(tmp_path / "one", *FIFTY)
    torchrun(tmp_path / "two", *FIFTY)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 50
    for a, b in zip(one, two):
        assert abs(a["t2i"] - b["t2i"] + train.Config.t2t * (a["t2t"] - b["t2t"])) < 1e-5, (a, b)
        assert abs(a["t2i"] - b["t2i"]) < 1e-5 and abs(a["t2t"] - b["t2t"]) < 1e-4, (a, b)  # one rounding of a gradient moves t2t by 1e-5: Muon works in bfloat16
    newest = train.find_states(tmp_path / "two")[0]
    newest.unlink()  # step 50; on from step 40
    torchrun(tmp_path / "two", *FIFTY, "--resume")
    assert lines(tmp_path / "two") == two, "resumed, two processes are not where they were"


def test_sharded_parameters_give_the_same_losses_and_files(tmp_path):
    short = [*FIFTY, "--pretrain_steps", 6, "--save_every", 4, "--ema", 0.9]
    run(tmp_path / "one", *short)
    torchrun(tmp_path / "two", *short, "--shard")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert abs(a["t2i"] - b["t2i"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4, (a, b)
    one, two = weights(tmp_path / "one" / "pretrain.pt"), weights(tmp_path / "two" / "pretrain.pt")
    assert one.keys() == two.keys() and all((one[k] - two[k]).abs().max() < 1e-4 for k in one)
    train.find_states(tmp_path / "two")[0].unlink()
    run(tmp_path / "two", *short, "--resume", "--no-shard")  # files do not show how many processes wrote them
    again = weights(tmp_path / "two" / "pretrain.pt")
    assert all((two[k] - again[k]).abs().max() < 1e-4 for k in one)


@pytest.mark.parametrize("paradigm", ["flow", "ar", "mask", "mar"])
def test_the_compiled_step_is_one_graph_and_stays_so(paradigm, tmp_path):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    made, cfg, policy = toy(tmp_path, "--compile", "on", "--paradigm", paradigm)
    if not policy.compile:
        pytest.skip("no compiler here")
    core = train.Core(made, "reca", {"recon": 1.0})
    learning = made.parameters_of("reca")
    optimizers = train.make_optimizers(learning, cfg)
    for group in optimizers[0].param_groups + optimizers[1].param_groups:
        group["lr"] = 1e-3
    core.compile(dynamic=False, backend="eager")  # inductor's graphs are the same, and take a minute
    counters.clear()
    for step in range(12):
        batch = {"main": {"image": torch.rand(4, 3, 24, 24)}}
        said = train.update(core, batch, optimizers, policy.scaler(), policy, cfg)
        assert all(v.isfinite() for v in said.values())
        if step == 1:
            warm = dict(counters["stats"])
    assert not counters["graph_break"] and dict(counters["stats"]) == warm and warm["unique_graphs"] == 1, counters


def test_without_a_compiler_training_goes_on(tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", broken)
    run(tmp_path, "--stage", "pretrain", "--compile", "on")
    said = capsys.readouterr().out
    assert said.count("No working C++ compiler found): on without it") == 1 and (tmp_path / "pretrain.pt").exists()


@pytest.mark.parametrize("compiler, how", [(False, "auto"), (True, "off")])
def test_bench_measures_each_way(compiler, how, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "can_compile", lambda device: compiler)
    run(tmp_path, "--bench", "--compile", how)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert [(row["dtype"], row["compiled"]) for row in rows] == [("float32", False), ("bfloat16", False)]
    assert all(row["steps_per_second"] > 0 and row["gigabytes"] > 0 and row["mfu"] is None for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", type=int, nargs="+", default=[signal.SIGKILL, signal.SIGTERM])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number in args.signal:
        print(signal.Signals(number).name, json.dumps(killing(args.kills, number, args.seed)))
