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
TINY = ("--width 16 --depth 1 --heads 2 --image_size 24 --patch_size 8 --batch_size 4 --side_batch 2 --draws 2 --encoder_steps 6 --pretrain_steps 14 "
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", type=int, nargs="+", default=[signal.SIGKILL, signal.SIGTERM])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number in args.signal:
        print(signal.Signals(number).name, json.dumps(killing(args.kills, number, args.seed)))
