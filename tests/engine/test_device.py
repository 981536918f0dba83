"""Devices that are not here: what train.py chooses on them, and what it counts and measures."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import engine
import evaluate
import train
from config import Config, parse_config, validate
from engine import DeviceConfig, count_flops, wrap_model
from train_helpers import ONE_STEP, ROOT, TINY, assert_same, make_state, run, weights


@pytest.fixture
def fake_cuda(monkeypatch):
    """fake_cuda(name, major) -> the DeviceConfig of a machine with this card."""
    flash = torch.backends.cuda.flash_sdp_enabled()

    def make(name: str, major: int = 9) -> DeviceConfig:
        def is_bf16_supported(including_emulation=True):
            return including_emulation or major >= 8

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        return DeviceConfig(Config(compile="off"))

    yield make
    torch.backends.cuda.enable_flash_sdp(flash)


# ---------------------------------------------------------------- CUDA


@pytest.mark.parametrize("name, major", [("Tesla V100-SXM2-16GB", 7), ("Tesla T4", 7)])
def test_a_card_that_emulates_bfloat16_gets_float16(name, major, fake_cuda):
    assert fake_cuda(name, major).dtype == torch.float16


def test_a_card_that_computes_in_bfloat16_gets_it(fake_cuda):
    assert fake_cuda("NVIDIA H100 80GB HBM3", 9).dtype == torch.bfloat16
    assert fake_cuda("NVIDIA A100-SXM4-40GB", 8).dtype == torch.bfloat16


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla T4": 65,
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_card_has_the_peak_of_its_own_name(name, fake_cuda):
    peak = fake_cuda(name).peak_flops
    assert peak == (PEAKS[name] and PEAKS[name] * 1e12)


# ---------------------------------------------------------------- what is counted


def loss_module(state):
    stage = train.resolve(train.STAGES["reca"], state.cfg)
    train.freeze_except(state.parts, stage)
    return train.LossModule(state.parts, train.replace(stage, losses={"recon": 1.0}))


def test_flops_are_counted_on_a_few_images_and_the_peak_of_memory_is_reset(tmp_path, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(len(seen)))
    seen = []

    class Looking(train.LossModule):
        def forward(self, batch):
            seen.append({role: len(part["image"]) for role, part in batch.items()})
            return super().forward(batch)

    state = make_state(tmp_path)
    module = loss_module(state)
    module = Looking(state.parts, module.stage)
    images = torch.rand(8, 3, 24, 24)
    batch = {"main": {"image": images}, "understand": {"image": images[:2]}}
    whole = count_flops(module, batch, state.device_config)
    assert seen == [{"main": 4, "understand": 1}]
    assert not resets, "there is no GPU"

    state.device_config.device = torch.device("cuda")
    assert count_flops(module, batch, state.device_config) == whole
    assert resets == [2], "after the pass"
    half = {role: {"image": part["image"].chunk(2)[0]} for role, part in batch.items()}
    assert [2 * x for x in count_flops(module, half, state.device_config)] == list(whole)


def test_recomputed_activations_are_no_flops(tmp_path):
    counts = []
    for options in ([], ["--checkpoint_activations"]):
        state = make_state(tmp_path, *options)
        batch = {"main": {"image": torch.rand(4, 3, 24, 24)}}
        for _ in range(2):  # two stages
            module = loss_module(state)
            counts.append(count_flops(module, batch, state.device_config))
            wrap_model(module, state.cfg, state.device_config)
    assert counts[0][0] > 0
    assert counts == 4 * counts[:1]


# ---------------------------------------------------------------- Apple and Windows


def test_a_mac_trains_on_its_gpu_in_one_process(monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    device_config = DeviceConfig(Config())
    assert device_config.device == torch.device("mps")
    assert device_config.dtype == torch.float32
    assert not device_config.compile
    assert DeviceConfig(Config(device="cpu")).device == torch.device("cpu")
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**30)
    assert device_config.peak_gigabytes() == 3

    monkeypatch.setattr(engine, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert DeviceConfig(Config()).device == torch.device("cpu")


def test_several_processes_on_one_mac_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr("config.WORLD_SIZE", 2)
    with pytest.raises(SystemExit):
        validate(Config(device="mps", out_dir=str(tmp_path)))
    assert "--device mps is one GPU" in capsys.readouterr().err


def test_macos_counts_memory_in_bytes_and_linux_in_kibibytes(monkeypatch):
    device_config = DeviceConfig(Config(device="cpu"))
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2**30))
    for platform, gigabytes in (("darwin", 1), ("linux", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert device_config.peak_gigabytes() == gigabytes


WINDOWS = """
import os, signal, sys
import torch
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.pread, os.pwrite, os.fork, signal.SIGALRM, signal.alarm
import train
train.report = lambda *args: None
train.main(sys.argv[1:])
"""


def windows(out, *options):
    """train.py without the modules and functions that Python has not on Windows."""
    command = [sys.executable, "-c", WINDOWS, *TINY, *ONE_STEP, "--out_dir", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_windows_trains_and_resumes(tmp_path):
    done = windows(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.0 GB" in done.stdout
    assert (tmp_path / "reca.pt").exists()
    assert windows(tmp_path, "--resume").returncode == 0


def test_windows_cannot_cache_features(tmp_path):
    done = windows(tmp_path, "--cache_features")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --cache_features needs os.pread")


# ---------------------------------------------------------------- bytes in, scores out


def test_images_may_come_as_bytes(tmp_path, monkeypatch):
    """They become the floats that they stand for, in the loop and for the feature cache."""
    real = train.batches

    def run_with(name, convert):
        def converted(*args, **options):
            for batch in real(*args, **options):
                pixels = (255 * batch["image"]).round().to(torch.uint8)
                yield batch | {"image": convert(pixels)}

        monkeypatch.setattr(train, "batches", converted)
        run(tmp_path / name, "--stage", "pretrain", "--pretrain_steps", 3)
        return weights(tmp_path / name / "pretrain.pt")

    floats = run_with("floats", lambda pixels: pixels.float() / 255)
    assert_same(floats, run_with("bytes", lambda pixels: pixels))

    state = make_state(tmp_path / "encode")
    pixels = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    assert torch.equal(state.encode(pixels), state.encode(pixels.float() / 255))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_sampled_in_the_precision_of_training(dtype, tmp_path, monkeypatch):
    seen = []

    def watch(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return {}

    monkeypatch.setattr(evaluate, "evaluate", watch)
    monkeypatch.setattr(evaluate, "compare", watch)
    monkeypatch.setattr(evaluate, "table", str)
    options = [*TINY, *ONE_STEP, "--dtype", dtype, "--out_dir", str(tmp_path)]
    cfg, _ = parse_config(options)
    assert cfg.dtype == dtype
    train.main(options)
    assert seen == 4 * [dtype == "bfloat16"]
