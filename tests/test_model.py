"""model.py: who may see whom, cached equals uncached, visual words are words, codes go round, initial values."""
import os
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from encoder import Conv  # noqa: E402
from model import IMAGES, ModelConfig, UnifiedModel, patchify, unpatchify  # noqa: E402

B, T, N, V, C = 2, 7, 9, 13, 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and where others use the cores lose seconds waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(paradigm="flow", seed=0, **changes):
    """A model whose sizes all differ, with every weight random: zero heads would hide what flows through them."""
    cfg = ModelConfig(vocab_size=V, text_len=T, image_size=12, patch_size=4, width=24, depth=2, heads=3, encoder_width=10, connector_depth=1,
                      paradigm=paradigm, flow_mlp_width=20, flow_mlp_depth=1, code_stride=4, code_levels=(3, 2, 4), code_width=8)
    torch.manual_seed(seed)
    model = UnifiedModel(ModelConfig(**{**vars(cfg), **changes}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def image_inputs(paradigm, batch=B):
    """What `embed` of the paradigm takes, random."""
    patches = torch.randn(batch, N, 48)
    return {"flow": (patches, torch.rand(batch)), "mar": (patches, torch.rand(batch, N) < 0.5),
            "ar": (torch.randint(C + 1, (batch, N)),), "mask": (torch.randint(C + 1, (batch, N)),)}[paradigm]


def moved(out, by):
    """Which positions of `by` (B, S, D), summed over the batch and D, the scalar `out` depends on."""
    return torch.autograd.grad(out, by, retain_graph=True)[0].abs().sum(-1) > 1e-9


# -- who may see whom


@pytest.mark.parametrize("paradigm", IMAGES)
@pytest.mark.parametrize("draws", [1, 3])
def test_masks_of_the_image_by_gradient(paradigm, draws):
    model, prefix = small(paradigm), torch.randn(B, T, 24, requires_grad=True)
    image = torch.randn(B * draws, N, 24, requires_grad=True)
    states = []
    model.norm.register_forward_hook(lambda module, args, out: states.append(out))
    model.image.embed = lambda model, x: x
    out = model.predict_image(prefix, image)
    for row in (0, B * draws - 1):
        for i in range(N):
            seen = moved(out[row, i].sum(), image)
            allowed = torch.zeros(B * draws, N, dtype=torch.bool)
            allowed[row, : i + 1 if paradigm == "ar" else N] = True
            assert torch.equal(seen, allowed), f"image position {i} sees {seen.nonzero().tolist()}"
            words = moved(out[row, i].sum(), prefix)
            assert words[row // draws].all() and words.sum() == T, "an image position sees its own prefix, all of it"
    for i in range(T):
        assert not moved(states[0][0, i].sum(), image).any(), "the prefix never sees the image"
        assert moved(states[0][0, i].sum(), prefix).tolist() == [[j <= i for j in range(T)], [False] * T]


def test_no_future_leak_in_text():
    model, prefix, ids = small(), torch.randn(B, T, 24, requires_grad=True), torch.randint(V, (B, 5))
    logits = model.text_logits(prefix, ids)
    assert logits.shape == (B, 6, V)
    assert moved(logits[0, 0].sum(), prefix)[0].all()
    for j in range(5):
        other = ids.clone()
        other[:, j] = (ids[:, j] + 1) % V
        change = (model.text_logits(prefix, other) - logits).abs().amax((0, 2))
        assert (change[: j + 1] == 0).all() and (change[j + 1:] > 1e-4).all(), f"word {j} moved {change.tolist()}"


# -- the same with the prefix read once


@pytest.mark.parametrize("paradigm", IMAGES)
@torch.no_grad()
def test_cached_image_equals_uncached(paradigm):
    model, prefix, inputs = small(paradigm), torch.randn(B, T, 24), image_inputs(paradigm)
    whole, cache = model.predict_image(prefix, *inputs), model.read_prefix(prefix, room=N)
    if model.image.causal:
        cached = torch.cat([model.predict_image_cached(cache, inputs[0][:, i: i + 1]) for i in range(N)], 1)
    else:
        model.predict_image_cached(cache, *image_inputs(paradigm))  # an earlier step leaves no trace
        cached = model.predict_image_cached(cache, *inputs)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_text_equals_uncached():
    model, prefix, ids = small(), torch.randn(B, T, 24), torch.randint(V, (B, 5))
    cache = model.read_prefix(prefix[:, :-1], room=6)
    steps = torch.cat([prefix[:, -1:], model.wte(ids)], 1)
    cached = torch.cat([model.text_logits_cached(cache, steps[:, i: i + 1]) for i in range(6)], 1)
    torch.testing.assert_close(cached, model.text_logits(prefix, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("paradigm", IMAGES)
@torch.no_grad()
def test_draws_that_share_a_prefix_equal_draws_apart(paradigm):
    model, prefix, inputs = small(paradigm), torch.randn(B, T, 24), image_inputs(paradigm, 3 * B)
    apart = model.predict_image(prefix.repeat_interleave(3, 0), *inputs)
    torch.testing.assert_close(model.predict_image(prefix, *inputs), apart, atol=1e-5, rtol=0)


# -- words, visual words, codes


@torch.no_grad()
def test_one_hot_visual_words_are_the_words():
    for paradigm in IMAGES:
        model, ids = small(paradigm), torch.randint(V, (B, T))
        ids[:, 0] = 1  # <bos>
        words = F.one_hot(ids[:, 1:], V).float()
        torch.testing.assert_close(model.visual_prefix(words), model.text_prefix(ids), atol=1e-6, rtol=0)


@torch.no_grad()
def test_visual_words_can_be_blunted_sharpened_and_reversed():
    model, tokens = small("flow"), torch.randn(B, 4, 10)
    model.connector.word_head.weight.normal_()
    words = model.visual_words(tokens)
    model.cfg.sharpness = 0.0
    torch.testing.assert_close(model.visual_words(tokens), torch.full_like(words, 1 / V))
    model.cfg.sharpness = 1e4
    torch.testing.assert_close(model.visual_words(tokens), F.one_hot(words.argmax(-1), V).float())
    model.cfg.sharpness, model.cfg.reverse_words = 1.0, True
    torch.testing.assert_close(model.visual_words(tokens).flip(1), words)


@pytest.mark.parametrize("paradigm", ["ar", "mask"])
def test_words_and_codes_share_one_head_and_never_mix(paradigm):
    model = small(paradigm)
    assert model.lm_head.weight.shape == model.wte.weight.shape == (V + C + 1, 24)
    model.text_logits(torch.randn(B, T, 24)).logsumexp(-1).sum().backward()
    used = model.lm_head.weight.grad.abs().sum(1) > 0
    assert used[:V].all() and not used[V:].any(), "a word's logits come from the words' rows alone"
    model.zero_grad()
    model.predict_image(torch.randn(B, T, 24), torch.full((B, N), C)).logsumexp(-1).sum().backward()
    used, read = model.lm_head.weight.grad.abs().sum(1) > 0, model.wte.weight.grad.abs().sum(1) > 0
    assert used[V: V + C].all() and not used[:V].any() and not used[-1], "a code's from the codes' rows: neither word nor [MASK]"
    assert read.nonzero().tolist() == [[V + C]], "code C is [MASK], the last row of wte"


def test_fsq_round_trip():
    tokenizer, codes = small("ar").tokenizer, torch.arange(C)
    values = tokenizer.to_values(codes)
    assert torch.equal(tokenizer.to_codes(values), codes) and len(values.unique(dim=0)) == C
    for i, levels in enumerate((3, 2, 4)):
        torch.testing.assert_close(values[:, i].unique(), torch.linspace(-1, 1, levels))
    torch.testing.assert_close(tokenizer.quantize(torch.atanh(values * (1 - 1e-6))), values)  # the grid is a fixed point


def test_fsq_rounds_to_the_nearest_value_and_lets_the_gradient_through():
    tokenizer, z = small("ar").tokenizer, torch.randn(50, 3, requires_grad=True)
    rounded = tokenizer.quantize(z)
    for i, levels in enumerate((3, 2, 4)):
        grid = torch.linspace(-1, 1, levels)
        nearest = grid[(z[:, i].tanh()[:, None] - grid).abs().argmin(1)]
        torch.testing.assert_close(rounded[:, i], nearest)
    torch.testing.assert_close(torch.autograd.grad(rounded.sum(), z)[0], 1 - z.detach().tanh() ** 2)


@torch.no_grad()
def test_tokenizer_decodes_what_it_encodes():
    tokenizer, images = small("mask").tokenizer, torch.rand(B, 3, 12, 12)
    codes = tokenizer.encode(images)
    assert codes.shape == (B, N) and codes.min() >= 0 and codes.max() < C
    torch.testing.assert_close(tokenizer.decode(codes), tokenizer(images).clamp(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 3])
def test_convolution_with_a_matrix_for_a_weight(side):
    conv, torchs = Conv(5, 8, side), nn.Conv2d(5, 8, side, padding=side // 2)
    torchs.weight.copy_(conv.weight.view_as(torchs.weight)), torchs.bias.copy_(conv.bias)
    x = torch.randn(B, 5, 7, 6)
    torch.testing.assert_close(conv(x), torchs(x))
    assert conv.weight.ndim == 2, "Muon takes matrices"


def test_a_code_does_not_depend_on_what_is_far_away():
    tokenizer, images = small("ar", code_stride=4, image_size=48).tokenizer, torch.rand(1, 3, 48, 48)
    near, far = images.clone(), images.clone()
    near[..., :4, :4], far[..., -4:, -4:] = 0, 0                                 # the patch of the first code, and of the last
    states = [tokenizer.encoder(x * 2 - 1)[0, 0] for x in (images, near, far)]
    assert not torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_patches_are_slices_and_go_round():
    images = torch.rand(B, 3, 12, 12)
    patches = patchify(images, 4)
    torch.testing.assert_close(patches[1, 5].view(4, 4, 3).permute(2, 0, 1) / 2 + 0.5, images[1, :, 4:8, 8:12])  # row 1, column 2
    torch.testing.assert_close(unpatchify(patches, 4), images)


# -- initial values


@pytest.mark.parametrize("paradigm", IMAGES)
def test_initial_values(paradigm):
    assert ModelConfig(paradigm=paradigm).image_len == {"flow": 9, "mar": 9, "ar": 36, "mask": 36}[paradigm], "48 px: 3 x 3 patches or 6 x 6 codes"
    model = small(paradigm)
    for p in model.parameters():
        nn.init.constant_(p, float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters()), "every parameter is set in init_weights"
    assert (model.lm_head.weight == 0).all() and (model.text_logits(torch.randn(B, T, 24)) == 0).all()
    out = model.blocks[0].down_proj.weight.std().item()
    assert abs(out - 0.02 / 2) < 0.001, f"residual outputs start at 0.02 / sqrt(2 * depth), not {out}"
    for name, p in model.named_parameters():
        if "norm" in name and p.ndim == 1 and name.endswith("weight"):
            assert (p == 1).all(), name
        if "flow_head" in name or ".ada." in name:
            assert (p == 0).all(), f"{name} has to start at zero"
        if "tokenizer" in name and p.numel() > 500:
            assert abs(p.std() * p.shape[1] ** 0.5 - 1) < 0.2, f"{name} has to start by its fan-in"


# -- the caption tower
