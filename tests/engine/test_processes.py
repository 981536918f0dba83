"""Several processes (torchrun): what they share, and what each draws by itself."""

import pytest
import torch
from train_helpers import (
    QUIET_HOOKS,
    assert_close,
    assert_same,
    log_lines,
    run,
    torchrun,
    weights,
)

from engine import find_states

PRETRAIN = ["--stage", "pretrain", "--log_every", 1, "--warmup", 100, "--save_every", 4]
TEN = [*PRETRAIN, "--pretrain_steps", 10, "--ema", 0.9]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Ten steps of pretrain in two processes."""
    out = tmp_path_factory.mktemp("processes") / "two"
    torchrun(out, *TEN)
    return out


def test_all_processes_end_with_the_same_weights(two):
    first, second = (torch.load(two / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(first, second)


def test_each_process_draws_its_own_noise(two):
    first, second = torch.load(find_states(two)[0], weights_only=True)["rng"]["cpu"]
    assert not torch.equal(first, second)


def test_losses_without_noise_are_those_of_one_process(tmp_path):
    """Where captions have one length: else a word weighs more in a process that has fewer."""
    options = [*PRETRAIN, "--pretrain_steps", 50, "--paradigm", "ar"]
    run(tmp_path / "one", *options, **QUIET_HOOKS)
    torchrun(tmp_path / "two", *options, quiet=True)
    lines = zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True)
    for one, two in lines:
        assert abs(one["t2t"] - two["t2t"]) < 2e-5, (one, two)
        # later, a rounding may turn a code of the tokenizer into the next one
        assert abs(one["tokenizer"] - two["tokenizer"]) < 1e-5 or one["step"] > 5, (one, two)
    assert one["step"] == 50


def test_two_processes_resume_bit_exactly(two, tmp_path):
    out = tmp_path / "again"
    torchrun(out, *TEN)
    find_states(out)[0].unlink()  # of step 10: on from step 8
    torchrun(out, *TEN, "--resume")
    assert log_lines(out) == log_lines(two)
    assert_same(weights(out / "pretrain.pt"), weights(two / "pretrain.pt"))


def test_sharded_weights_give_the_losses_and_files_of_whole_ones(two, tmp_path):
    out = tmp_path / "sharded"
    torchrun(out, *TEN, "--shard")
    for whole, sharded in zip(log_lines(two), log_lines(out), strict=True):
        assert abs(whole["t2i"] - sharded["t2i"]) < 1e-5, (whole, sharded)
        assert abs(whole["grad_norm"] - sharded["grad_norm"]) < 1e-4, (whole, sharded)
    assert_close(weights(two / "pretrain.pt"), weights(out / "pretrain.pt"), 1e-4)

    # the state does not show that it was sharded
    find_states(out)[0].unlink()
    torchrun(out, *TEN, "--resume", "--no-shard")
    assert_close(weights(two / "pretrain.pt"), weights(out / "pretrain.pt"), 1e-4)

    # nor how many processes there were; one draws other noise than two
    find_states(out)[0].unlink()
    run(out, *TEN, "--resume", "--no-shard")
    assert log_lines(out)[:8] == log_lines(out)[:8]
    assert [line["step"] for line in log_lines(out)] == list(range(1, 11))
