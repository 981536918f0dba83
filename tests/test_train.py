"""The engine: killed at any moment and resumed to the bit, shared over processes, refused in one sentence.

    pytest tests/test_train.py
    python tests/test_train.py --kills 20       # the long version: SIGKILL at 20 random moments, then SIGTERM
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from torch import nn

import train

ROOT = Path(train.__file__).parent
TINY = ("--width 16 --depth 1 --heads 2 --image_size 24 --patch_size 8 --batch_size 4 --understand_batch 4 --side_batch 2 --draws 2 --encoder_steps 6 --pretrain_steps 14 "
        "--align_steps 6 --reca_steps 8 --eval_n 2 --warmup 2 --log_every 4 --save_every 3 --device cpu").split()


def run(out, *more, report=False, monkeypatch=None):
    """train.py in this process, without the scores at its end."""
    original = train.report
    train.report = original if report else lambda *args: None
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
--heads 3 | not a multiple of --heads
--image_size 0 | at least 1
--image_size -48 | at least 1
--image_size 50 | not a multiple of --patch_size
--image_size 64 --patch_size 16 | multiple of 3
--image_size 36 --patch_size 12 --paradigm ar | not a multiple of 8
--image_size 36 --patch_size 12 --paradigm mask | not a multiple of 8
--patch_size 0 | at least 1
--patch_size 7 | not a multiple of --patch_size
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
--weight_decay -1 | at least 0
--t2t -1 | at least 0
--i2t nan | at least 0
--replay inf | at least 0
--words -0.5 | at least 0
--entropy nan | at least 0
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
--device gpu | no device
--device cuda:99 | CUDA device
--device mps | only cpu and cuda
--device cpu:x | no device
--dataset imagenet | needs --data_dir
--dataset folder | needs --data_dir
--dataset imagenet --data_dir {place}/nowhere | no folder
--dataset imagenet --data_dir {place}/file | no folder
--dataset imagenet --data_dir {place}/empty | empty folder
--dataset imagenet --data_dir {place}/no_train | no train/
--dataset imagenet --data_dir {place}/no_classes | no class folders
--dataset imagenet --data_dir {place}/bad_photos --encoder {place}/file | file
--dataset imagenet --data_dir {place}/bad_photos | can be read
--dataset folder --data_dir {place}/empty | empty folder
--dataset folder --data_dir {place}/done | no images
--dataset imagenet --data_dir {place}/bad_photos --encoder scratch | public weights
--encoder clip-b17 | did you mean clip-b16
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
        train.main([*base, "--out_dir", str(tmp_path / "out"), *options.format(place=place).split()])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2, f"exit code {end.value.code}"
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message, message
    assert expected in message, message
    assert before == sorted((p, p.stat().st_mtime) for p in place.rglob("*.pt")), "something was written"
    assert time.time() - began < 5


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", type=int, nargs="+", default=[signal.SIGKILL, signal.SIGTERM])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number in args.signal:
        print(signal.Signals(number).name, json.dumps(killing(args.kills, number, args.seed)))
