"""The loop and its stages: what each trains, how a step is computed, and what is measured."""

import json

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import engine
import train
from config import parse_config
from encoder import ViT, scratch_config
from model import ModelConfig, UnifiedModel
from sample import Checkpoint
from train_helpers import (
    ONE_STEP,
    STEPS,
    TINY,
    assert_same,
    hooked,
    log_lines,
    make_state,
    run,
    weights,
)

PRETRAIN = ["--stage", "pretrain"]

# ---------------------------------------------------------------- the table of stages


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of all stages of one step each, to start from."""
    out = tmp_path_factory.mktemp("stages") / "base"
    run(out, *ONE_STEP, "--paradigm", "ar")
    return out


def trained_parts(stage: str, *options) -> set[str]:
    cfg, _ = parse_config(options)
    model_config = ModelConfig(width=16, depth=1, heads=2, paradigm=cfg.paradigm)
    parts = {"encoder": ViT(scratch_config(48, 16)), "text_decoder": nn.Linear(2, 2)}
    parts = nn.ModuleDict(parts | {"model": UnifiedModel(model_config)})
    train.freeze_except(parts, train.resolve(train.STAGES[stage], cfg))
    names = [name for name, p in parts.named_parameters() if p.requires_grad]
    trained = {name.removeprefix("model.").split(".")[0] for name in names}
    return trained & {"encoder", "text_decoder", "connector", "tokenizer", "blocks", "wte"}


def test_each_stage_trains_its_parts():
    everything = {"encoder", "text_decoder", "connector", "tokenizer", "blocks", "wte"}
    assert trained_parts("encoder", "--paradigm", "ar") == everything
    assert trained_parts("encoder") == everything - {"tokenizer"}
    for name in ("random", "clip-b16"):
        frozen = ("--encoder", name, "--paradigm", "mask")
        assert trained_parts("encoder", *frozen) == {"tokenizer", "blocks", "wte"}
    for stage in ("pretrain", "sft", "reca"):
        assert trained_parts(stage, "--paradigm", "ar") == {"blocks", "wte"}
    assert trained_parts("align", "--paradigm", "ar") == {"connector"}


def test_a_stage_changes_its_parts_alone(base):
    before = weights(base / "pretrain.pt")
    after = weights(base / "reca.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {n for n in before if n.startswith(("connector.", "tokenizer."))}
    assert moved == before.keys() - frozen


def losses(stage: str, *options) -> dict[str, float]:
    cfg, _ = parse_config(options)
    return train.resolve(train.STAGES[stage], cfg).losses


def test_each_stage_has_its_losses():
    terms = {"caption": 1.0, "contrast": 0.25, "words": 1.0, "t2t": 1.0}
    assert losses("encoder") == terms
    assert losses("encoder", "--paradigm", "mask") == terms | {"tokenizer": 1.0}
    assert losses("encoder", "--encoder", "clip-b16") == {"t2t": 1.0}
    assert losses("pretrain") == {"t2i": 1.0, "t2t": 0.1}
    assert losses("align") == {"i2t": 1.0, "words": 1.0}
    language = {"i2t": 0.1, "t2t": 0.1, "replay": 1.0}
    assert losses("sft") == {"t2i": 1.0} | language
    assert losses("reca") == {"recon": 1.0} | language
    assert losses("reca", "--i2t", "0", "--replay", "0.5") == {
        "recon": 1,
        "t2t": 0.1,
        "replay": 0.5,
    }


def test_batches_are_shares_of_batch_size(tmp_path):
    sizes = {}

    class Looking(train.LossModule):
        def forward(self, batch):
            for role, part in batch.items():
                sizes[self.stage.name, role] = len(part["image"])
            return super().forward(batch)

    run(tmp_path, *ONE_STEP, "--batch_size", 12, loss_class=Looking)
    for stage in ("sft", "reca"):
        assert sizes[stage, "main"] == 12
        assert sizes[stage, "understand"] == 3
        assert sizes[stage, "replay"] == 6
    assert sizes["pretrain", "understand"] == 3
    assert sizes["align", "understand"] == sizes["encoder", "main"] == 12


def test_max_images_are_all_that_a_stage_sees(base, tmp_path):
    seen = set()

    class Looking(train.LossModule):
        def forward(self, batch):
            seen.update(image.sum().item() for image in batch["main"]["image"])
            return super().forward(batch)

    row = train.replace(train.STAGES["reca"], max_images=2)
    options = ["--stage", "reca", "--paradigm", "ar", "--init_from", base / "pretrain.pt"]
    run(tmp_path, *options, loss_class=Looking, stages=train.STAGES | {"reca": row})
    assert len(seen) == 2


def test_a_random_encoder_stays_as_it_is(tmp_path):
    run(tmp_path, "--encoder", "random")
    states = []
    for name in ("encoder", "reca"):
        states.append(torch.load(tmp_path / f"{name}.pt", weights_only=True)["encoder"]["state"])
    assert_same(states[0], states[1])
    torch.manual_seed(0)
    assert_same(states[1], ViT(scratch_config(24, 8)).state_dict())


class WiderModel(UnifiedModel):
    """A model of an experiment, with a parameter more."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.extra = nn.Parameter(torch.full((3,), 7.0))


def test_another_class_of_model_starts_from_a_plain_checkpoint(base, tmp_path):
    options = ["--stage", "reca", "--paradigm", "ar", "--init_from", base / "pretrain.pt"]
    run(tmp_path, *options, "--reca_steps", 0, model_class=WiderModel)
    saved = weights(tmp_path / "reca.pt")
    assert_same(weights(base / "pretrain.pt") | {"extra": torch.full((3,), 7.0)}, saved)
    with pytest.raises(ValueError, match="WiderModel"):
        Checkpoint(tmp_path / "reca.pt")


# ---------------------------------------------------------------- one step


class Squares(train.LossModule):
    """A loss without noise, of one matrix w: the mean of (w x)^2 over the batch."""

    def __init__(self, parts, stage):
        super().__init__(parts, stage)
        # one row of a matrix stands in for w, and the pixels of an image for x
        self.w = parts["model"].text_pos

    def forward(self, batch):
        x = batch["main"]["image"].flatten(1)[:, : self.w.shape[1]]
        loss = ((x @ self.w[:1].T) ** 2).mean()
        # all that is trained has a gradient, if only zero
        zero = sum(0 * p.sum() for p in self.parameters() if p.requires_grad)
        return loss + zero, {"squares": loss}


def one_step(out, *options, **hooks):
    run(out, *PRETRAIN, "--pretrain_steps", 1, "--log_every", 1, *options, **hooks)
    return log_lines(out)[0], weights(out / "pretrain.pt")


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """The logged loss, the norm of the gradient, and the weights after the step."""
    inputs = []

    class Keeping(Squares):
        def forward(self, batch):
            inputs.append((batch["main"]["image"], self.w.detach().clone()))
            return super().forward(batch)

    ends = []
    for n in (1, 2, 3):
        inputs.clear()
        options = ["--batch_size", 24, "--grad_accum_steps", n]
        line, after = one_step(tmp_path / str(n), *options, loss_class=Keeping)
        images = torch.cat([image for image, _ in inputs[1:]])  # the first counts FLOPs
        w = inputs[0][1].requires_grad_()
        loss = ((images.flatten(1)[:, :16] @ w[:1].T) ** 2).mean()
        loss.backward()
        assert len(images) == 24
        assert line["squares"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(w.grad.norm().item(), rel=1e-5)
        ends.append(after["text_pos"])
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_muon_takes_the_matrices_inside_and_adamw_the_rest(tmp_path):
    parameters = dict(make_state(tmp_path, "--paradigm", "ar").parts.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    sets = []
    for optimizer in engine.make_optimizers(parameters.items()):
        sets.append({names[id(p)] for group in optimizer.param_groups for p in group["params"]})
    adamw, muon = sets
    assert adamw | muon == parameters.keys()
    assert not adamw & muon
    assert "model.blocks.0.attn.out_proj.weight" in muon
    assert "model.connector.blocks.0.down_proj.weight" in muon
    assert "model.tokenizer.decoder.0.weight" in muon
    assert {"model.wte.weight", "model.lm_head.weight", "model.text_pos"} <= adamw
    assert {"model.image_pos", "model.tokenizer.decoder.0.bias"} <= adamw


@pytest.mark.parametrize("overflow", ["inf", "nan"])
def test_float16_scales_the_loss_and_skips_a_step_that_overflows(overflow, tmp_path, monkeypatch):
    """In float32 products here, with a scaler that is on. One parameter of AdamW overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    no_autocast = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(engine.DeviceConfig, "scaler", lambda self: scaler)
    monkeypatch.setattr(engine.DeviceConfig, "autocast", lambda self: no_autocast)
    seen = []

    before = {}

    class Overflowing(Squares):
        def forward(self, batch):
            model = self.parts["model"]
            seen.append(self.w.detach().clone())
            loss, terms = super().forward(batch)
            # the second step's gradient is not finite, its loss is
            if len(seen) == 3:
                self.w.register_hook(lambda gradient: gradient * float(overflow))
                before.update({name: p.detach().clone() for name, p in model.named_parameters()})
            return loss, terms

    options = [*PRETRAIN, "--pretrain_steps", 2, "--log_every", 1, "--dtype", "float16"]
    run(tmp_path, *options, loss_class=Overflowing)
    good, bad = log_lines(tmp_path)
    _, first, moved = seen
    after = weights(tmp_path / "pretrain.pt")
    assert 0 < good["grad_norm"] < 100, "unscaled before it is clipped"
    assert not torch.equal(first, moved)
    assert not torch.tensor(bad["grad_norm"]).isfinite()
    assert torch.equal(moved, after["text_pos"])
    assert_same(before, after)  # Muon's parameters neither
    assert scaler.get_scale() == 2.0**7


def test_the_scaler_is_on_for_float16_alone(tmp_path):
    for dtype in ("float16", "bfloat16", "float32"):
        cfg, _ = parse_config(["--device", "cpu", "--dtype", dtype])
        assert engine.DeviceConfig(cfg).scaler().is_enabled() == (dtype == "float16")


def test_bfloat16_is_close_to_float32(tmp_path):
    run(tmp_path / "a", *PRETRAIN)
    run(tmp_path / "b", *PRETRAIN, "--dtype", "bfloat16")
    for a, b in zip(log_lines(tmp_path / "a"), log_lines(tmp_path / "b"), strict=True):
        assert abs(a["t2i"] - b["t2i"]) < 0.02
        assert abs(a["t2t"] - b["t2t"]) < 0.02
    assert log_lines(tmp_path / "a") != log_lines(tmp_path / "b")
    dtypes = {value.dtype for value in weights(tmp_path / "b/pretrain.pt").values()}
    assert dtypes == {torch.float32}


def test_recomputed_activations_change_nothing(tmp_path):
    run(tmp_path / "a", *PRETRAIN)
    run(tmp_path / "b", *PRETRAIN, "--checkpoint_activations")
    assert_same(weights(tmp_path / "a/pretrain.pt"), weights(tmp_path / "b/pretrain.pt"))


def test_ema_is_the_average_of_its_equation(tmp_path):
    steps = []

    def keep(module, step):
        """Before step i + 1: the weights after step i."""
        model = module.parts["model"]
        steps.append({name: p.detach().clone() for name, p in model.named_parameters()})

    run(tmp_path, *PRETRAIN, "--ema", 0.5, loss_class=hooked(keep))
    saved = torch.load(tmp_path / "pretrain.pt", weights_only=True)
    start = make_state(tmp_path).model.state_dict()  # the same seed
    steps = [*steps[2:], saved["model"]]
    for name in ("wte.weight", "blocks.0.up_proj.weight"):
        average = start[name].clone()
        for step, after in enumerate(steps):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * after[name]
        torch.testing.assert_close(saved["ema"][name], average)

    # what is not trained is not averaged
    queries = "connector.queries"
    assert torch.equal(saved["ema"][queries], saved["model"][queries])
    # the average samples, and the next stage starts from it
    sampled = Checkpoint(tmp_path / "pretrain.pt").model
    assert torch.equal(sampled.wte.weight, saved["ema"]["wte.weight"])
    second = make_state(tmp_path)
    second.load_checkpoint(tmp_path / "pretrain.pt", "pretrain")
    assert torch.equal(second.model.wte.weight, saved["ema"]["wte.weight"])


def test_the_next_stage_of_a_run_starts_from_the_average(tmp_path):
    steps = ["--encoder_steps=3", "--pretrain_steps=0", "--align_steps=0", "--reca_steps=0"]
    run(tmp_path, "--ema", 0.5, *steps)
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert not torch.equal(saved["ema"]["wte.weight"], saved["model"]["wte.weight"])
    after = torch.load(tmp_path / "pretrain.pt", weights_only=True)
    assert_same(saved["ema"], after["model"])


def test_learning_rate_rises_stays_and_falls_to_zero():
    rates = [train.learning_rate(step, 100, 2.0, warmup=10) for step in range(100)]
    assert rates[0] == 0.2
    assert rates[9] == rates[50] == max(rates) == 2.0
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[71:-1], rates[72:], strict=True))
    assert 0 < rates[99] < 0.1


# ---------------------------------------------------------------- sizes, FLOPs, the compiler


@pytest.mark.parametrize(
    "image_size, least, most, positions", [(64, 28e6, 36e6, 64), (256, 115e6, 140e6, 256)]
)
def test_presets_have_their_sizes(image_size, least, most, positions):
    cfg, _ = parse_config(["--dataset", "imagenet", "--image_size", str(image_size)])
    names = ("text_len", "image_size", "patch_size", "width", "depth", "heads")
    sizes = {name: getattr(cfg, name) for name in names}
    with torch.device("meta"):
        model = UnifiedModel(ModelConfig(vocab_size=2000, encoder_width=768, **sizes))
    assert least < sum(p.numel() for p in model.parameters()) < most
    assert model.cfg.image_len == positions


def recon_module(state):
    """The module of RecA's own loss."""
    stage = train.resolve(train.STAGES["reca"], state.cfg)
    train.freeze_except(state.parts, stage)
    return train.LossModule(state.parts, train.replace(stage, losses={"recon": 1.0}))


def test_flops_and_tokens_are_those_of_the_products(tmp_path):
    state = make_state(tmp_path)
    module = recon_module(state)
    module.stage = train.replace(module.stage, losses={"t2i": 1.0})
    B, T, D, N, P = 8, state.model.cfg.text_len, 16, 9, 192
    R = state.cfg.repeats_per_image
    batch = {"image": torch.rand(B, 3, 24, 24), "caption": torch.ones(B, T, dtype=torch.long)}
    flops, tokens = engine.count_flops(module, {"main": batch}, state.device_config)
    S = T + R * N
    assert tokens == B * S
    blocks = B * S * (4 + 8) * D * D
    attention = B * 2 * S * S * D
    skipped = B * T * (2 + 8) * D * D + B * 2 * T * S * D
    patches = B * R * N * 2 * P * D  # in and out
    # of the last block the prefix has keys and values alone
    forward = 2 * (blocks + attention + patches - skipped)
    assert 2.5 * forward < flops < 3.5 * forward


@pytest.mark.parametrize("paradigm", ["flow", "ar", "mask", "mar"])
def test_the_compiled_step_is_one_graph_and_stays_so(paradigm, tmp_path):
    torch._dynamo.reset()
    module = recon_module(make_state(tmp_path, "--paradigm", paradigm))
    optimizers = engine.make_optimizers(module.named_parameters())
    # inductor's graphs are the same, but need a C++ compiler and a minute
    module.compile(dynamic=False, backend="eager")
    counters.clear()
    for step in range(12):
        loss, terms = module({"main": {"image": torch.rand(4, 3, 24, 24)}})
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert loss.isfinite() and terms["recon"].isfinite()
        if step == 1:
            warm = dict(counters["stats"])
    assert not counters["graph_break"]
    assert dict(counters["stats"]) == warm
    assert warm["unique_graphs"] == 1


def test_without_a_compiler_training_goes_on(tmp_path, capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    run(tmp_path, *PRETRAIN, "--compile", "on")
    text = capsys.readouterr().out
    assert text.count("No working C++ compiler found): on without it") == 1
    assert (tmp_path / "pretrain.pt").exists()


@pytest.mark.parametrize("compiler, option", [(False, "auto"), (True, "off")])
def test_bench_measures_each_way(compiler, option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "can_compile", lambda device: compiler)
    run(tmp_path, "--bench", "--compile", option)
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = result["rows"]
    assert not list(tmp_path.glob("**/*.pt")), "nothing is saved"
    assert result["settings"]["batch_size"] == 8
    assert "img/s" in capsys.readouterr().out
    ways = [(row["dtype"], row["compiled"]) for row in rows]
    assert ways == [("float32", False), ("bfloat16", False)]
    for row in rows:
        assert row["steps_per_second"] == row["images_per_second"] / 8 > 0
        assert row["teraflops_per_second"] > 0
        assert row["gigabytes"] > 0
        assert row["mfu"] is None


# ---------------------------------------------------------------- the report


def test_the_report_scores_the_base_and_draws_the_losses(tmp_path):
    options = [*TINY, "--eval_n=1", "--log_every=2", f"--out_dir={tmp_path}"]
    train.main(options + [f"--{name}=4" for name in STEPS])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["pretrain", "sft", "reca"]
    for row in results.values():
        assert {"steps", "seconds", "device", "seed", "settings"} <= row.keys()
    curves = train.read_curves(tmp_path, 2)
    assert [x for x, _ in curves["recon"]] == [18, 20]
    assert (tmp_path / "curves.svg").exists() and (tmp_path / "compare.png").exists()
