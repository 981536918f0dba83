"""Killed at any moment, a run goes on bit-exactly from its newest good state.

pytest tests/engine/test_resume.py
PYTHONPATH=.:tests python tests/engine/test_resume.py --kills 20    # SIGKILL at 20 random moments
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

import engine
import evaluate
import train
from config import Config
from engine import find_states
from train_helpers import (
    ENCODERS,
    ROOT,
    assert_same,
    at_pretrain_step,
    hooked,
    interrupted,
    log_lines,
    run,
    weights,
)

PRETRAIN = ["--stage", "pretrain"]

# ---------------------------------------------------------------- killed at random moments


def slow_save(state, file, real=torch.save):
    """torch.save in two halves with a pause between, so that a kill often falls into a save."""
    whole = io.BytesIO()
    real(state, whole)
    data = whole.getvalue()
    file.write(data[: len(data) // 2])
    file.flush()
    time.sleep(0.03)
    file.write(data[len(data) // 2 :])


def fork_run(*arguments) -> int:
    """Forks a process that runs train.py. Torch must not have computed before: see `kill_runs`."""
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


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float, number: int) -> int:
    """The exit code of a process that is killed then, if it still runs."""
    time.sleep(seconds)
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.kill(pid, number)
    return wait_for(pid)


def kill_runs(kills: int, number: int, seed: int) -> dict:
    """Kills runs at random moments, resumes them, and compares their ends with a run left alone."""
    rng = random.Random(seed)
    options = ["--ema", "0.9"]
    done = starts = in_save = 0
    moments = []
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        began = time.time()
        assert wait_for(fork_run(alone, *options)) == 0
        length = time.time() - began
        while done < kills:
            out = Path(folder) / f"killed{done}"
            code = None
            while code != 0:
                resume = ["--resume"] if (out / "run.json").exists() else []
                starts += 1
                seconds = rng.uniform(0, length) if done < kills else 3 * length
                code = kill_after(fork_run(out, *options, *resume), seconds, number)
                assert code in (0, -number, 128 + number), f"exit code {code}"
                if code:
                    done += 1
                    in_save += bool(list(out.glob("*.tmp")))
                    moments.append(max((p.name for p in out.glob("state-*.pt")), default="start"))
            for name in ("encoder", "pretrain", "sft", "reca"):
                assert_same(weights(alone / f"{name}.pt"), weights(out / f"{name}.pt"))
            assert log_lines(alone) == log_lines(out), "the log differs"
    return {"kills": done, "starts": starts, "within a save": in_save, "after": moments}


def test_killed_and_resumed_ends_bit_exactly():
    """By SIGKILL, and beside it by SIGTERM."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        command = [sys.executable, __file__, "--kills", "4", "--signal", str(int(number))]
        processes.append(subprocess.Popen(command, env=environment, **both))
    printed = [process.communicate()[0] for process in processes]  # both end before a check
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text


def test_a_second_signal_stops_at_once():
    interrupt = engine.Interrupt()
    with pytest.raises(SystemExit) as end:
        interrupt(signal.SIGTERM, None)  # nothing is trained yet
    assert end.value.code == 128 + signal.SIGTERM
    interrupt.training = True
    interrupt(signal.SIGINT, None)
    assert interrupt.asked == signal.SIGINT
    with pytest.raises(SystemExit):
        interrupt(signal.SIGINT, None)


def test_a_second_signal_of_torchrun_changes_nothing(monkeypatch):
    """Ctrl-C reaches its processes twice: from the terminal, and from torchrun."""
    monkeypatch.setattr(engine, "WORLD_SIZE", 2)
    interrupt = engine.Interrupt()
    interrupt.training = True
    interrupt(signal.SIGINT, None)
    interrupt(signal.SIGINT, None)
    assert interrupt.asked == signal.SIGINT


# ---------------------------------------------------------------- damaged states


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A whole run of pretrain."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run(out, *PRETRAIN)
    return out


def flip_one_bit(path: Path) -> bytes:
    """The state with one bit of one weight changed."""
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model"]["wte.weight"]
    data[data.index(weight.numpy().tobytes()) + 40] ^= 1
    return data


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_the_newest_undamaged_state_is_taken(damage, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "KEEP_STATES", 3)
    out = interrupted(tmp_path, 8, *PRETRAIN)
    states = find_states(out)
    assert [int(path.stem[-7:]) for path in states] == [8, 6, 3]
    data = states[0].read_bytes()
    if damage == "flip":
        states[0].write_bytes(flip_one_bit(states[0]))
    else:
        states[0].write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    capsys.readouterr()
    run(out, *PRETRAIN, "--resume")
    assert "is damaged" in capsys.readouterr().out
    assert_same(weights(alone / "pretrain.pt"), weights(out / "pretrain.pt"))
    assert log_lines(alone) == log_lines(out)


def test_a_run_without_any_good_state_begins_anew(alone, tmp_path):
    out = interrupted(tmp_path, 2, *PRETRAIN)
    find_states(out)[0].write_bytes(b"")
    run(out, "--resume")  # the settings are in run.json
    assert_same(weights(alone / "pretrain.pt"), weights(out / "pretrain.pt"))


def test_a_full_disk_leaves_the_last_good_state(alone, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        size = int(1.6 * find_states(alone)[0].stat().st_size) // 1024
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        with pytest.raises(SystemExit) as end:
            run(disk, *PRETRAIN)
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert "No space left" in message and "free some space" in message
        assert "Traceback" not in message
        assert [path.name for path in disk.glob("*.pt*")] == ["state-1-pretrain-0000003.pt"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run(disk, "--resume")
        assert_same(weights(alone / "pretrain.pt"), weights(disk / "pretrain.pt"))
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def test_a_save_that_is_cut_leaves_the_last_good_state(alone, tmp_path, capsys):
    """`ulimit -f`, which needs no rights: from step 5 on no file is longer than half a state."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = find_states(alone)[0].stat().st_size // 2

    def limit(module):
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))

    try:
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *PRETRAIN, loss_class=at_pretrain_step(5, limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "File too large" in message and "Traceback" not in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.glob("*.pt*")] == ["state-1-pretrain-0000003.pt"]

    (tmp_path / "run.json").write_bytes(b"")  # cut, too
    with pytest.raises(SystemExit):
        run(tmp_path, *PRETRAIN)
    assert "has not ended" in capsys.readouterr().err
    assert find_states(tmp_path), "a new run took the place of one that could go on"
    run(tmp_path, "--resume")
    assert_same(weights(alone / "pretrain.pt"), weights(tmp_path / "pretrain.pt"))
    assert log_lines(alone) == log_lines(tmp_path)


# ---------------------------------------------------------------- what --resume may change


def test_resume_may_change_the_learning_rate(tmp_path):
    out = interrupted(tmp_path, 5, *PRETRAIN)
    run(out, "--resume", "--pretrain_lr", 1e-9)
    lines = log_lines(out)
    assert [line["step"] for line in lines] == [4, 8, 12, 14]
    assert lines[0]["lr"] == Config.pretrain_lr
    assert lines[-1]["lr"] < 1e-9


def test_a_finished_run_has_nothing_left_to_do(alone):
    before = weights(alone / "pretrain.pt")
    run(alone, "--resume", "--pretrain_steps", 14)
    assert_same(before, weights(alone / "pretrain.pt"))


def test_a_new_run_takes_the_place_of_a_finished_one(tmp_path, capsys):
    run(tmp_path, *PRETRAIN, "--pretrain_steps", 4)
    capsys.readouterr()
    run(tmp_path, *PRETRAIN, "--pretrain_steps", 3, "--seed", 1)
    assert "holds a finished run" in capsys.readouterr().out
    assert [line["step"] for line in log_lines(tmp_path)] == [3]
    names = [path.name for path in find_states(tmp_path)]
    assert names == ["state-1-pretrain-0000003.pt"]


def test_out_of_memory_says_how_to_go_on(tmp_path, capsys):
    def fail(module):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    with pytest.raises(SystemExit) as end:
        run(tmp_path, *PRETRAIN, loss_class=at_pretrain_step(5, fail))
    assert end.value.code == 2
    assert "--grad_accum_steps 2" in capsys.readouterr().err
    run(tmp_path, "--resume", "--grad_accum_steps", 2)
    assert [line["step"] for line in log_lines(tmp_path)] == [4, 8, 12, 14]


def test_more_steps_for_a_stage_that_is_over_have_no_effect_and_that_is_said(tmp_path, capsys):
    options = ["--stage", "all", "--align_steps", 2, "--reca_steps", 4]

    def stop(module, step):
        if module.stage.name == "sft" and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run(tmp_path, "--encoder_steps", 0, *options, loss_class=hooked(stop))
    before = weights(tmp_path / "pretrain.pt")
    capsys.readouterr()
    run(tmp_path, "--resume", "--pretrain_steps", 20)
    assert "--pretrain_steps has no effect on stage pretrain: it is over" in capsys.readouterr().out
    assert_same(before, weights(tmp_path / "pretrain.pt"))


def test_fewer_steps_than_are_done_are_refused(tmp_path, capsys):
    interrupted(tmp_path, 8, *PRETRAIN)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--resume", "--pretrain_steps", 5)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "--pretrain_steps 5: stage pretrain has done 8 steps already" in message


def test_an_encoder_of_its_own_cannot_be_exchanged(tmp_path, capsys):
    interrupted(tmp_path, 5, *PRETRAIN)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--resume", "--encoder", "random")
    assert end.value.code == 2
    assert "--encoder random: it was trained with scratch" in capsys.readouterr().err


# ---------------------------------------------------------------- photographs


@pytest.fixture
def photographs(tmp_path):
    """Options of a run on six photographs of one color each, two of a kind."""
    for n in range(6):
        path = tmp_path / f"photos/kind{n % 2}/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (40 * n, 90, 200 - 30 * n)).save(path)
    options = ["--dataset", "folder", "--data_dir", tmp_path / "photos"]
    options += ["--cache_dir", tmp_path / "cache", "--encoder", ENCODERS / "hf_clip"]
    options += ["--encoder_size", 25, "--text_len", 9, "--workers", 0, "--save_every", 5]
    return [*options, "--encoder_steps", 0]


def test_photographs_resume_bit_exactly(photographs, tmp_path):
    run(tmp_path / "whole", *photographs)
    interrupted(tmp_path / "cut", 7, *photographs)
    names = torch.load(find_states(tmp_path / "cut")[0], weights_only=True)["parts"]
    assert any(name.startswith("model.") for name in names)
    assert not any(name.startswith("encoder.") for name in names), "public weights are not saved"
    run(tmp_path / "cut", "--resume")
    for name in ("pretrain", "sft", "reca"):
        assert_same(weights(tmp_path / f"whole/{name}.pt"), weights(tmp_path / f"cut/{name}.pt"))


def test_the_encoder_may_move_but_not_change(photographs, tmp_path, capsys):
    """A run knows its encoder by the hash of the weights, not by where they lie."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(ENCODERS / "hf_clip", here)
    out = interrupted(tmp_path / "out", 7, *photographs, "--encoder", here)
    here.rename(there)
    with pytest.raises(SystemExit) as end:
        run(out, "--resume", "--encoder", ENCODERS / "hf_clip_vision")
    assert end.value.code == 2
    assert f"it was trained with {here}, whose weights are others" in capsys.readouterr().err
    with patch.object(train, "report"):
        train.main(["--resume", "--out_dir", str(out), "--encoder", str(there)])
    assert torch.load(out / "reca.pt", weights_only=True)["encoder"]["name"] == str(there)
    there.rename(here)  # and back: the checkpoint says it is there
    options = [*photographs, "--stage", "reca", "--init_from", out / "pretrain.pt"]
    run(tmp_path / "more", *options, "--encoder", here)


def test_photographs_may_move(photographs, tmp_path):
    whole = tmp_path / "whole"
    run(whole, *photographs)
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = ["--data_dir", str(tmp_path / "moved")]
    checkpoints = [str(whole / "pretrain.pt"), str(whole / "reca.pt")]
    scores = tmp_path / "scores.json"
    evaluate.main([*moved, "--ckpt", *checkpoints, "--n", "3", "--json", str(scores)])
    cases = [row["cases"] for row in json.loads(scores.read_text()).values()]
    assert cases == 2 * [{"psnr": 1, "cosine": 1, "t2i_cosine": 1}], "one of six is held out"
    train.main(["--resume", "--out_dir", str(whole), *moved])
    results = json.loads((whole / "results.json").read_text())
    assert results.keys() == {"pretrain", "sft", "reca"}, "checkpoints from before are scored too"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", type=int, nargs="+", default=[signal.SIGKILL, signal.SIGTERM])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number in args.signal:
        result = kill_runs(args.kills, number, args.seed)
        print(signal.Signals(number).name, json.dumps(result))
