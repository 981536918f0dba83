"""A user's mistakes: one sentence, exit code 2, nothing begun; one wrong option for each rule."""

import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch
from torch import nn

import train
from config import Config, parse_config, validate
from engine import find_states
from sample import FORMAT
from train_helpers import (
    ENCODERS,
    ONE_STEP,
    ROOT,
    TINY,
    at_pretrain_step,
    interrupted,
    log_lines,
    run,
    weights,
)


def write_file(path, data=b"no picture"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders and files to be wrong about."""
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "empty").mkdir()
    write_file(tmp / "bad_photos/train/n01443537/a.JPEG")
    write_file(tmp / "bad_photos/val/n01443537/b.JPEG")
    write_file(tmp / "bad_photos/words.txt", b"n01443537\tgoldfish\n")
    write_file(tmp / "no_train/val/n01443537/b.JPEG")
    write_file(tmp / "no_classes/train/b.JPEG")
    write_file(tmp / "no_classes/val/c.JPEG")
    write_file(tmp / "file", b"a file")
    write_file(tmp / "text.pt", b"no checkpoint")
    torch.save({"format": FORMAT}, tmp / "half.pt")
    torch.save({"format": FORMAT - 1}, tmp / "past.pt")
    torch.save([1, 2], tmp / "list.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp / "foreign.pt")
    run(tmp / "done", *ONE_STEP)
    write_file(tmp / "cut.pt", (tmp / "done/reca.pt").read_bytes()[:5000])
    run(tmp / "early", "--stage", "pretrain", "--pretrain_steps", 1)
    interrupted(tmp / "begun", 5)
    (tmp / "past").mkdir()
    text = (tmp / "begun/run.json").read_text()
    write_file(tmp / "past/run.json", text.replace("batch_size", "batch").encode())
    return tmp


# options, | and what their sentence says
WRONG = """
--batchsize 8 | did you mean --batch_size
--lr 1e-3 | unrecognized
--condition pixels | unrecognized
-batch_size 8 | unrecognized
shapes | unrecognized
--seed | expected one argument
--dataset mnist | invalid choice
--batch_size 1.5 | invalid int
--reca_lr fast | invalid float

--depth 0 | --depth is 0, it must be at least 1
--reca_steps -1 | at least 0
--replay inf | at least 0
--pretrain_lr nan | a positive number
--ema 1 | in [0, 1)
--workers -2 | -1 or more
--seed 99999999999 | at least 0 and below
--image_size 50 | a multiple of --patch_size
--heads 3 | a multiple of --heads
--image_size 64 --patch_size 16 | multiple of 3
--image_size 36 --patch_size 12 --paradigm ar | a multiple of 8
--text_len 12 | its longest caption
--dataset imagenet --data_dir {place} --text_len 2 | at least 3
--dataset imagenet --data_dir {place} --encoder random | public weights
--grad_accum_steps 3 | a multiple of 1 processes x --grad_accum_steps 3
--batch_size 6 | 0.25 of it is a batch
--shard | unrecognized
--device mps | no MPS device
--out_dir {place}/file/out | cannot be made

--dataset imagenet | needs --data_dir
--dataset imagenet --data_dir {place}/nowhere | no such folder
--dataset imagenet --data_dir {place}/file | a file, not a folder
--dataset imagenet --data_dir {place}/empty | empty folder
--dataset imagenet --data_dir {place}/no_train | no train/
--dataset imagenet --data_dir {place}/no_classes | no train image
--dataset imagenet --data_dir {place}/bad_photos | can be read
--dataset folder --data_dir {place}/done | no images
--encoder clip-b17 | did you mean clip-b16
--encoder {place}/nowhere | neither a path nor an encoder
--encoder {place}/empty | holds none of
--encoder {place}/text.pt | text.pt
--encoder {fixtures}/hf_clip | not a multiple of the encoder's patch size

--out_dir {place}/empty --resume | there is no run
--out_dir {place}/begun | has not ended
--out_dir {place}/begun --resume --width 32 | goes on with that
--out_dir {place}/begun --resume --pretrain_lr -1 | a positive number
--out_dir {place}/past --resume | of another version

--stage align | give --init_from, a checkpoint of stage pretrain
--stage pretrain --paradigm ar | give --init_from, a checkpoint of stage encoder
--stage reca --init_from {place}/nowhere.pt | there is no checkpoint
--stage reca --init_from {place}/text.pt | damaged
--stage reca --init_from {place}/cut.pt | damaged
--stage reca --init_from {place}/list.pt | format
--stage reca --init_from {place}/past.pt | format
--stage reca --init_from {place}/foreign.pt | format
--stage reca --init_from {place}/half.pt | does not fit this code
--stage reca --init_from {place}/early/pretrain.pt | of stage pretrain
--stage reca --init_from {place}/done/pretrain.pt --width 32 | width is 16 there and 32 here
--stage reca --init_from {place}/done/pretrain.pt --paradigm mar | paradigm is flow there
"""


def files_of(place):
    return sorted((path, path.stat().st_mtime) for path in place.rglob("*.pt"))


@pytest.mark.parametrize("line", [line for line in WRONG.splitlines() if line])
def test_a_mistake_gets_one_sentence_before_any_work(line, place, capsys, monkeypatch, tmp_path):
    options, _, expected = line.partition(" | ")
    monkeypatch.setattr(train, "train_stage", lambda *args: pytest.fail("training began"))
    monkeypatch.setattr(train, "report", lambda *args: pytest.fail("training ended"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    base = TINY if "--dataset" not in options else []
    options = options.format(place=place, fixtures=ENCODERS).split()
    before = files_of(place)
    began = time.time()
    with pytest.raises(SystemExit) as end:
        train.main([*base, "--out_dir", str(tmp_path / "out"), *options])
    lines = capsys.readouterr().err.strip().splitlines()
    message = "\n".join(line for line in lines if "assumed as published" not in line)
    assert end.value.code == 2
    assert message.startswith("error: ")
    assert "\n" not in message and "Traceback" not in message
    assert expected in message
    assert before == files_of(place), "something was written"
    assert time.time() - began < 5


def test_cuda_is_refused_where_there_is_none(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        validate(Config(device="cuda", out_dir=str(tmp_path)))
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_other_words_are_another_configuration(place, tmp_path, capsys):
    saved = torch.load(place / "done/pretrain.pt", weights_only=True)
    saved["vocabulary"][-1] = "other"
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "out", "--stage", "reca", "--init_from", tmp_path / "other.pt")
    assert end.value.code == 2
    assert "it was trained on other words" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    """The lock is of a process, and ends with it, also by SIGKILL."""
    lock = f"import engine, pathlib; held = engine.lock_run_dir(pathlib.Path({str(tmp_path)!r}))"
    code = f"{lock}; print('held', flush=True); import time; time.sleep(60)"
    command = [sys.executable, "-c", code]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    assert end.value.code == 2
    assert "another run is at work" in capsys.readouterr().err
    other.kill()
    other.wait()
    run(tmp_path, "--stage", "pretrain", "--pretrain_steps", 1)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_value_ends_the_run_before_it_is_saved(where, tmp_path, capsys):
    def poison(module):
        """After this step the weights are not finite either."""
        p = next(p for p in module.parameters() if p.requires_grad)
        if where == "loss":
            with torch.no_grad():
                p.fill_(float("nan"))
        else:
            p.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(SystemExit) as end:
        options = ["--stage", "pretrain", "--save_every", 4]
        run(tmp_path, *options, loss_class=at_pretrain_step(8, poison))
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "at step 8 of stage pretrain" in message
    assert "--resume" in message and "state-1-pretrain-0000004.pt" in message
    assert ("grad_norm is nan" if where == "gradient" else "t2i is nan") in message
    assert ("t2i is nan" in message) == (where == "loss")
    states = find_states(tmp_path)
    assert [path.name for path in states] == ["state-1-pretrain-0000004.pt"]
    assert all(value.isfinite().all() for value in weights(states[0]).values())

    # the command of the sentence works
    command = message.partition("go on with ")[2].split()
    run(tmp_path, *command)
    assert log_lines(tmp_path)[-1]["step"] == 14


# ---------------------------------------------------------------- what is not refused


def test_help_says_what_a_preset_changes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"--{name} " in text or f"--{name}," in text
    assert text.count("(default: ") == 45
    presets = " ".join(text.partition("presets")[2].split())
    assert "--dataset imagenet, cifar10 or folder: --image_size 64 --patch_size 8" in presets
    assert "--smoke: --encoder_steps 60" in presets


def test_an_option_wins_over_a_preset_and_that_over_a_default():
    cfg, given = parse_config(["--dataset", "imagenet", "--smoke", "--heads", "3"])
    assert given == {"dataset": "imagenet", "smoke": True, "heads": 3}
    assert (cfg.heads, cfg.width, cfg.reca_steps, cfg.seed) == (3, 384, 40, 0)
    cfg, _ = parse_config(["--dataset", "imagenet", "--image_size", "256"])
    assert (cfg.patch_size, cfg.width, cfg.heads, cfg.text_len) == (16, 768, 12, 33)


def test_bench_needs_no_batch_of_a_stage(tmp_path):
    with patch.object(train, "bench") as bench:
        run(tmp_path, "--bench", "--batch_size", 1)
    assert bench.called
