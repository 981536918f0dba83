"""model.py: attention masks by gradient, cached equals uncached, visual words are words, codes go
round, initial values."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ModelConfig
from paradigms import PARADIGMS
from small import LEVELS, B, C, D, N, P, T, V, random_images, small
from tokenizer import Conv
from words import BOS

pytestmark = pytest.mark.usefixtures("one_thread")


def image_inputs(paradigm, batch=B):
    """What the paradigm's `embed` takes, at random."""
    patches = torch.randn(batch, N, P)
    inputs = {
        "flow": (patches, torch.rand(batch)),
        "mar": (patches, torch.rand(batch, N) < 0.5),
        "ar": (torch.randint(C + 1, (batch, N)),),
        "mask": (torch.randint(C + 1, (batch, N)),),
    }
    return inputs[paradigm]


def depends_on(out, x):
    """Which positions (B, S) of x (B, S, D) the scalar `out` depends on."""
    (gradient,) = torch.autograd.grad(out, x, retain_graph=True)
    return gradient.abs().sum(-1) > 1e-9


# ---------------------------------------------------------------- attention masks


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_masks_of_the_image_by_gradient(paradigm, repeats):
    model = small(paradigm)
    prefix = torch.randn(B, T, D, requires_grad=True)
    image = torch.randn(B * repeats, N, D, requires_grad=True)
    states = []
    model.blocks[-1].register_forward_pre_hook(lambda block, args: states.append(args[0]))
    model.paradigm.embed = lambda model, x: x
    out = model.predict_image(prefix, image)
    for row in (0, B * repeats - 1):
        for i in range(N):
            attended = depends_on(out[row, i].sum(), image)
            allowed = torch.zeros(B * repeats, N, dtype=torch.bool)
            allowed[row, : i + 1 if paradigm == "ar" else N] = True
            assert torch.equal(attended, allowed), (
                f"image position {i} attends to {attended.nonzero().tolist()}"
            )
            words = depends_on(out[row, i].sum(), prefix)
            assert words[row // repeats].all(), "an image position attends to its whole prefix"
            assert words.sum() == T, "an image position attends to no other prefix"
    for i in range(T):
        state = states[0][0, i].sum()
        assert not depends_on(state, image).any(), "the prefix never attends to the image"
        causal = [[j <= i for j in range(T)], [False] * T]
        assert depends_on(state, prefix).tolist() == causal, "the prefix is causal"


def test_no_future_leak_in_text(model):
    prefix = torch.randn(B, T, D, requires_grad=True)
    ids = torch.randint(V, (B, 5))
    logits = model.text_logits(prefix, ids)
    assert logits.shape == (B, 6, V)
    assert depends_on(logits[0, 0].sum(), prefix)[0].all()
    for j in range(5):
        other = ids.clone()
        other[:, j] = (ids[:, j] + 1) % V
        change = (model.text_logits(prefix, other) - logits).abs().amax((0, 2))  # (6,)
        assert (change[: j + 1] == 0).all(), f"word {j} changes past logits: {change.tolist()}"
        assert (change[j + 1 :] > 1e-4).all(), f"word {j} is not read: {change.tolist()}"


# ---------------------------------------------------------------- the prefix read once


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_cached_image_equals_uncached(paradigm):
    model = small(paradigm)
    prefix = torch.randn(B, T, D)
    inputs = image_inputs(paradigm)
    uncached = model.predict_image(prefix, *inputs)
    cache = model.prefill(prefix, max_new_tokens=N)
    if model.paradigm.causal:
        steps = [model.predict_image_cached(cache, inputs[0][:, i : i + 1]) for i in range(N)]
        cached = torch.cat(steps, 1)
    else:
        model.predict_image_cached(
            cache, *image_inputs(paradigm)
        )  # an earlier step leaves no trace
        cached = model.predict_image_cached(cache, *inputs)
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_text_equals_uncached(model):
    prefix = torch.randn(B, T, D)
    ids = torch.randint(V, (B, 5))
    cache = model.prefill(prefix[:, :-1], max_new_tokens=6)
    x = torch.cat([prefix[:, -1:], model.wte(ids)], 1)  # (B, 6, D)
    cached = torch.cat([model.decode_step(cache, x[:, i : i + 1]) for i in range(6)], 1)
    torch.testing.assert_close(cached, model.text_logits(prefix, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_repeats_that_share_a_prefix_equal_repeats_apart(paradigm):
    model = small(paradigm)
    prefix = torch.randn(B, T, D)
    inputs = image_inputs(paradigm, 3 * B)
    apart = model.predict_image(prefix.repeat_interleave(3, 0), *inputs)
    torch.testing.assert_close(model.predict_image(prefix, *inputs), apart, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- words, visual words, codes


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_one_hot_visual_words_are_the_words(paradigm):
    model = small(paradigm)
    ids = torch.randint(V, (B, T))
    ids[:, 0] = BOS
    words = F.one_hot(ids[:, 1:], V).float()
    torch.testing.assert_close(
        model.visual_prefix(words), model.text_prefix(ids), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("paradigm", ["ar", "mask"])
def test_words_and_codes_share_one_head_and_never_mix(paradigm):
    model = small(paradigm)
    assert model.lm_head.weight.shape == model.wte.weight.shape == (V + C + 1, D)

    model.text_logits(torch.randn(B, T, D)).logsumexp(-1).sum().backward()
    used = model.lm_head.weight.grad.abs().sum(1) > 0
    assert used[:V].all(), "a word's logits come from the words' rows"
    assert not used[V:].any(), "a word's logits come from no code's row"

    model.zero_grad()
    masked = torch.full((B, N), C)
    model.predict_image(torch.randn(B, T, D), masked).logsumexp(-1).sum().backward()
    used = model.lm_head.weight.grad.abs().sum(1) > 0
    assert used[V : V + C].all(), "a code's logits come from the codes' rows"
    assert not used[:V].any(), "a code's logits come from no word's row"
    assert not used[-1], "[MASK] is never predicted"
    read = model.wte.weight.grad.abs().sum(1) > 0
    assert read.nonzero().tolist() == [[V + C]], "code C is [MASK], the last row of wte"


def test_fsq_round_trip():
    tokenizer = small("ar").tokenizer
    codes = torch.arange(C)
    values = tokenizer.to_values(codes)
    assert torch.equal(tokenizer.to_codes(values), codes)
    assert len(values.unique(dim=0)) == C
    for i, levels in enumerate(LEVELS):
        torch.testing.assert_close(values[:, i].unique(), torch.linspace(-1, 1, levels))
    # the grid is a fixed point
    torch.testing.assert_close(tokenizer.quantize(torch.atanh(values * (1 - 1e-6))), values)


def test_fsq_rounds_to_the_nearest_value_and_passes_the_gradient():
    tokenizer = small("ar").tokenizer
    z = torch.randn(50, 3, requires_grad=True)
    rounded = tokenizer.quantize(z)
    for i, levels in enumerate(LEVELS):
        grid = torch.linspace(-1, 1, levels)
        nearest = grid[(z[:, i].tanh()[:, None] - grid).abs().argmin(1)]
        torch.testing.assert_close(rounded[:, i], nearest)
    (gradient,) = torch.autograd.grad(rounded.sum(), z)
    torch.testing.assert_close(gradient, 1 - z.detach().tanh() ** 2)


@torch.no_grad()
def test_tokenizer_decodes_what_it_encodes():
    tokenizer = small("mask").tokenizer
    images = random_images()
    codes = tokenizer.encode(images)
    assert codes.shape == (B, N)
    assert codes.min() >= 0
    assert codes.max() < C
    torch.testing.assert_close(tokenizer.decode(codes), tokenizer(images).clamp(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 3])
def test_convolution_with_a_matrix_for_a_weight(side):
    conv = Conv(5, 8, side)
    expected = nn.Conv2d(5, 8, side, padding=side // 2)
    expected.weight.copy_(conv.weight.view_as(expected.weight))
    expected.bias.copy_(conv.bias)
    x = torch.randn(B, 5, 7, 6)
    torch.testing.assert_close(conv(x), expected(x))
    assert conv.weight.ndim == 2, "Muon takes matrices"


def test_a_code_does_not_depend_on_what_is_far_away():
    tokenizer = small("ar", code_stride=4, image_size=48).tokenizer
    images = torch.rand(1, 3, 48, 48)
    near = images.clone()
    near[..., :4, :4] = 0  # the pixels of the first code
    far = images.clone()
    far[..., -4:, -4:] = 0  # and of the last
    state, state_near, state_far = (tokenizer.encoder(x * 2 - 1)[0, 0] for x in (images, near, far))
    assert not torch.equal(state, state_near)
    assert torch.equal(state, state_far)


# ---------------------------------------------------------------- initial values


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_initial_values(paradigm):
    image_len = {"flow": 9, "mar": 9, "ar": 36, "mask": 36}[paradigm]
    assert ModelConfig(paradigm=paradigm).image_len == image_len, "3 x 3 patches or 6 x 6 codes"
    model = small(paradigm)
    for p in model.parameters():
        nn.init.constant_(p, float("nan"))
    model.init_weights()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), f"{name} is not set in init_weights"
    assert (model.lm_head.weight == 0).all()
    assert (model.text_logits(torch.randn(B, T, D)) == 0).all()
    std = model.blocks[0].down_proj.weight.std().item()
    assert abs(std - 0.02 / 2) < 0.001, f"residual outputs: 0.02 / sqrt(2 * depth), not {std}"
    for name, p in model.named_parameters():
        if "norm" in name and p.ndim == 1 and name.endswith("weight"):
            assert (p == 1).all(), name
        if "flow_head" in name or ".ada." in name:
            assert (p == 0).all(), f"{name} has to start at zero"
        if "tokenizer" in name and p.numel() > 500:
            assert abs(p.std() * p.shape[1] ** 0.5 - 1) < 0.2, f"{name} has to start by its fan-in"
