"""paradigms.py: each equation against a closed form, exact predictions recover the data, schedules
and guidance, and a fifth paradigm."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from paradigms import (
    FLOW_MLP_STEPS,
    LOGIT_NORMAL_MEAN,
    LOGIT_NORMAL_STD,
    MIN_ONE_MINUS_T,
    PARADIGMS,
    TIME_POWER,
    ImageNoise,
    Sampling,
    add_noise,
    euler_sample,
    interpolate,
    mask_schedule,
    null_prefix,
    patchify,
    random_mask,
    sample_categorical,
    sample_times,
    unpatchify,
    velocity_squared_error,
)
from small import B, C, D, N, P, T, random_images, random_prefix, seeded, small

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(model, prefix, **changes):
    """Images of the model's paradigm: its default options with changes, and noise of seed 0."""
    sampling = replace(model.paradigm.default_sampling, **changes)
    return model.paradigm.sample(model, prefix, sampling, ImageNoise(range(len(prefix)), "cpu"))


# ---------------------------------------------------------------- patches


def test_patches_are_slices_and_go_round():
    images = random_images()
    patches = patchify(images, 4)
    row_1_column_2 = patches[1, 5].view(4, 4, 3).permute(2, 0, 1)
    torch.testing.assert_close(row_1_column_2 / 2 + 0.5, images[1, :, 4:8, 8:12])
    torch.testing.assert_close(unpatchify(patches, 4), images)


# ---------------------------------------------------------------- flow: the path and the velocity


def test_interpolation_endpoints_and_velocity_by_jvp():
    image, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(interpolate(image, noise, torch.zeros(1)), noise)
    torch.testing.assert_close(interpolate(image, noise, torch.ones(1)), image)
    t = torch.rand(2, 1, 1)
    _, dx_dt = torch.func.jvp(lambda t: interpolate(image, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(dx_dt, image - noise)


def test_velocity_squared_error_is_that_of_the_velocity():
    x, x_pred, noise = torch.randn(3, 2, 3, 4)
    t = torch.rand(2, 3, 1) * 0.9
    x_t = interpolate(x, noise, t)
    v_pred = (x_pred - x_t) / (1 - t)
    error = velocity_squared_error(x_pred, x, t)
    torch.testing.assert_close(error, (v_pred - (x - noise)) ** 2, atol=1e-3, rtol=1e-3)
    assert velocity_squared_error(x_pred, x, torch.ones(1)).isfinite().all()


@pytest.mark.parametrize("per_image", [1, 5])
def test_times_are_logit_normal_and_noise_has_its_scale(per_image):
    torch.manual_seed(0)
    x = torch.randn(4000, 5, 2)
    x_t, t = add_noise(x, sample_times(4000, per_image, "cpu"), 3.0)
    assert t.shape == (4000, per_image, 1)
    assert t.min() > 0
    assert t.max() < 1
    logit = torch.logit(t)
    assert abs(logit.mean() - LOGIT_NORMAL_MEAN) < 0.05
    assert abs(logit.std() - LOGIT_NORMAL_STD) < 0.05
    noise = (x_t - t * x) / (1 - t)
    assert abs(noise.std() - 3) < 0.05
    assert abs(noise.mean()) < 0.05
    if per_image > 1:
        assert t.std(1).mean() > 0.05, "each patch has its own time"


# ---------------------------------------------------------------- losses


def test_flow_loss_is_zero_for_the_image_and_exact_for_an_offset(monkeypatch):
    model, images = small("flow"), random_images()
    x = patchify(images, 4)
    t = torch.tensor([0.3, 0.95]).view(B, 1, 1)
    monkeypatch.setattr("paradigms.sample_times", lambda B, per_image, device: t)
    model.predict_image = lambda prefix, x_t, t: x
    assert model.paradigm.loss(model, None, images) == 0
    model.predict_image = lambda prefix, x_t, t: x + 0.2
    expected = (0.04 / 0.7**2 + 0.04 / MIN_ONE_MINUS_T**2) / 2
    loss = model.paradigm.loss(model, None, images)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_ar_loss_is_the_chain_rule():
    """-log p(codes) = -sum_i log p(code_i | codes before it), each factor from a run of its own."""
    model, prefix, images = small("ar"), torch.randn(B, T, D), random_images()
    codes = model.tokenizer.encode(images)  # (B, N)
    total = 0
    for i in range(N):
        previous = torch.full((B, N), C)
        previous[:, 1 : i + 1] = codes[:, :i]  # later codes are not known yet
        log_p = model.predict_image(prefix, previous)[:, i].log_softmax(-1)  # (B, C)
        total = total - log_p.gather(1, codes[:, i : i + 1]).mean()
    torch.testing.assert_close(model.paradigm.loss(model, prefix, images), total / N)


def test_mask_loss_counts_masked_codes_only_and_hides_them():
    model, images = small("mask"), random_images(300)
    codes = model.tokenizer.encode(images)
    logits = torch.randn(300, N, C)
    inputs = []

    def predict_image(prefix, codes):
        inputs.append(codes)
        return logits

    model.predict_image = predict_image
    loss = model.paradigm.loss(model, None, images)
    masked = inputs[0] == C
    assert torch.equal(inputs[0][~masked], codes[~masked])
    assert masked.any(1).all(), "each image has a masked code"
    nll = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # (300, N)
    means = torch.stack([row[mask].mean() for row, mask in zip(nll, masked, strict=True)])
    torch.testing.assert_close(loss, means.mean())
    # E cos(pi u / 2) = 2 / pi, plus half a position for rounding up
    share = masked.float().mean().item()
    assert abs(share - (2 / math.pi + 0.5 / N)) < 0.05, share


def test_mar_loss_counts_masked_patches_only_and_hides_them():
    model, images = small("mar"), random_images(200)
    x = patchify(images, 4)
    masks = []

    def predict_image(prefix, patches, masked):
        """A state that knows the clean patch, and whether it is masked."""
        masks.append(masked)
        return torch.cat([x, masked[..., None].float()], -1)

    def exact_where_masked(x_t, t, h):
        patches, masked = h[..., :-1], h[..., -1:]
        return patches + 5 * (1 - masked)

    model.predict_image = predict_image
    model.paradigm.flow_mlp.forward = exact_where_masked
    assert model.paradigm.loss(model, None, images) == 0
    counts = masks[0].sum(1).unique().tolist()
    assert counts == list(range(1, N + 1)), "every share that sampling passes through"
    model.paradigm.flow_mlp.forward = lambda x_t, t, h: h[..., :-1] + 0.1
    assert model.paradigm.loss(model, None, images) > 0.01
    hidden = small("mar").paradigm.embed(None, x, torch.ones(200, N, dtype=torch.bool))
    assert (hidden == hidden[0, 0]).all(), "a masked patch is not seen"


def test_random_mask_hides_exactly_its_share_at_every_position():
    torch.manual_seed(0)
    ratio = torch.tensor([[0.01], [0.34], [1.0]]).repeat(1000, 1)
    masked = random_mask(7, ratio)
    assert torch.equal(masked.sum(1), (ratio[:, 0] * 7).ceil().long())
    frequency = masked[1::3].float().mean(0)  # 3 of 7
    assert (frequency - 3 / 7).abs().max() < 0.06, frequency


# ---------------------------------------------------------------- the sampler of flow


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_an_exact_model_recovers_the_data_in_any_number_of_steps(steps, eta):
    x = torch.randn(B, N, P)
    draw_noise = partial(ImageNoise(range(B), "cpu").normal, N, P)
    torch.testing.assert_close(euler_sample(lambda x_t, t: x, draw_noise, steps, eta), x)


@torch.no_grad()
def test_without_resampling_the_steps_are_eulers():
    weight = torch.randn(P, P) / 7

    def predict(x_t, t):
        return (x_t @ weight).tanh() * (1 + t)

    x_t = ImageNoise(range(B), "cpu").normal(N, P)
    times = (torch.arange(6) / 5) ** TIME_POWER
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        velocity = (predict(x_t, t) - x_t) / (1 - t)
        x_t = x_t + (t_next - t) * velocity
    draw_noise = partial(ImageNoise(range(B), "cpu").normal, N, P)
    sampled = euler_sample(predict, draw_noise, steps=5, eta=0.0)
    torch.testing.assert_close(sampled, x_t, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_resampled_noise_keeps_its_variance(eta):
    """A model that predicts zeros leaves x_t = (1 - t) * noise, whose std each step can measure."""
    stds = []

    def predict(x_t, t):
        stds.append((x_t.std() / (1 - t)).item())
        return torch.zeros_like(x_t)

    draw_noise = partial(ImageNoise(range(50), "cpu").normal, N, P, std=2.0)
    euler_sample(predict, draw_noise, steps=4, eta=eta)
    assert len(stds) == 4
    for std in stds:
        assert std == pytest.approx(2.0, rel=0.02)


# ---------------------------------------------------------------- the samplers of codes


@pytest.mark.parametrize("cfg_scale", [1.0, 1.7])
@torch.no_grad()
def test_cached_greedy_codes_equal_uncached(cfg_scale):
    model = small("ar")
    prefix = random_prefix(model)
    null = null_prefix(model).expand(B, -1, -1)
    model.tokenizer.decode = lambda codes: codes
    sampled = sample(model, prefix, cfg_scale=cfg_scale, temperature=0.0)
    codes = torch.full((B, N + 1), C)  # [MASK], then each code
    for i in range(N):
        cond = model.predict_image(prefix, codes[:, :N])[:, i]
        uncond = model.predict_image(null, codes[:, :N])[:, i]
        codes[:, i + 1] = (uncond + cfg_scale * (cond - uncond)).argmax(-1)
    assert torch.equal(sampled, codes[:, 1:])


@pytest.mark.parametrize("steps", [1, 4, 9, 30])
@torch.no_grad()
def test_maskgit_ends_without_masks_and_decides_each_code_once(steps):
    model = small("mask")
    predict_image_cached = model.predict_image_cached
    states = []

    def record(cache, codes):
        states.append(codes[:B])
        return predict_image_cached(cache, codes)

    model.predict_image_cached = record
    model.tokenizer.decode = lambda codes: codes
    final = sample(model, random_prefix(model), steps=steps)
    assert len(states) == min(steps, N)
    assert (states[0] == C).all(), "everything is masked at first"
    assert final.max() < C, "nothing is masked at last"
    states.append(final)
    for before, after in zip(states[:-1], states[1:], strict=True):
        decided = before != C
        assert torch.equal(after[decided], before[decided]), "a decided code stays"
        num_before, num_after = (before == C).sum(1), (after == C).sum(1)
        assert (num_after < num_before).all(), "each pass decides something"
    num_masked = [int((state[0] == C).sum()) for state in states[1:]]
    assert num_masked == list(mask_schedule(N, steps))


@torch.no_grad()
def test_maskgit_keeps_the_most_confident():
    model = small("mask")
    order = torch.randperm(N, generator=seeded(3))
    logits = torch.zeros(1, N, C)
    logits[0, order, 7] = torch.arange(N, 0, -1.0) * 2  # most confident of position order[0]
    states = []

    def predict(cache, codes):
        states.append(codes[:1])
        return logits.expand(len(codes), -1, -1)

    model.predict_image_cached = predict
    model.tokenizer.decode = lambda codes: codes
    final = sample(model, random_prefix(model, 1), steps=4, temperature=0.0, cfg_scale=1.0)
    for state in [*states, final]:
        decided = (state[0] != C).nonzero()[:, 0].tolist()
        assert set(decided) == set(order[: len(decided)].tolist())


def test_the_schedule_is_a_cosine_that_ends_at_zero():
    assert list(mask_schedule(64, 8)) == [62, 59, 53, 45, 35, 24, 12, 0]


@pytest.mark.parametrize("count", [1, 2, 9, 64])
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 200])
def test_each_pass_of_the_schedule_decides_something(count, steps):
    num_masked = list(mask_schedule(count, steps))
    assert num_masked[-1] == 0
    assert len(num_masked) == min(count, steps)
    before = [count, *num_masked[:-1]]
    assert all(a > b for a, b in zip(before, num_masked, strict=True))


def test_sampled_ids_follow_the_softmax():
    logits, noise = torch.tensor([0.0, 1.0, -2.0, 0.5]), ImageNoise([0], "cpu")
    for temperature in (1.0, 0.5):
        ids = sample_categorical(logits.expand(1, 20000, -1), temperature, noise)[0]
        frequency = torch.bincount(ids, minlength=4) / 20000
        expected = (logits / temperature).softmax(0)
        torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)
    greedy = sample_categorical(logits.expand(50, -1), 0.0, None)
    assert (greedy == 1).all()


# ---------------------------------------------------------------- the sampler of mar


@pytest.mark.parametrize("steps", [1, 3, 9])
@torch.no_grad()
def test_mar_with_an_exact_flow_mlp_recovers_the_data_and_draws_each_patch_once(steps):
    model, images = small("mar"), random_images()
    x = patchify(images, 4)
    passes, groups = [], []

    def predict(cache, patches, masked):
        """States that say which patch they stand for: (image, position, 0, ...)."""
        passes.append((patches[:B].clone(), masked[:B].clone()))
        image, position = torch.arange(len(patches)) % B, torch.arange(N)
        where = torch.stack(torch.meshgrid(image, position, indexing="ij"), -1)
        return F.pad(where.float(), (0, D - 2))

    def exact(x_t, t, h):
        image, position = h[..., 0].long(), h[..., 1].long()
        groups.append(position[:B])
        return x[image, position]

    model.predict_image_cached = predict
    model.paradigm.flow_mlp.forward = exact
    sampled = sample(model, random_prefix(model), steps=steps)
    torch.testing.assert_close(sampled, images, atol=1e-5, rtol=0)
    order = torch.cat(groups[::FLOW_MLP_STEPS], 1)  # (B, N)
    each_once = torch.arange(N).expand(B, -1)
    assert torch.equal(order.sort(1).values, each_once), "each position is drawn once"
    assert not torch.equal(order[0], order[1]), "each image has its own order"
    for patches, masked in passes:
        torch.testing.assert_close(patches[~masked], x[~masked], atol=1e-4, rtol=0)
    num_masked = [int(masked[0].sum()) for _, masked in passes]
    assert num_masked == [N, *mask_schedule(N, steps)][:-1]


# ---------------------------------------------------------------- a fifth paradigm


class Regression(nn.Module):
    """A position holds nothing but its place, and predicts its patch: plain regression."""

    causal = False
    uses_tokenizer = False
    default_sampling = Sampling()

    def __init__(self, cfg):
        super().__init__()
        self.flow_head = nn.Linear(cfg.width, P)

    def embed(self, model, like):
        return like.new_zeros(len(like), N, D)

    def head(self, model, h):
        return self.flow_head(h)

    def loss(self, model, prefix, images):
        return F.mse_loss(model.predict_image(prefix, images), patchify(images, 4))

    def sample(self, model, prefix, sampling, noise):
        return unpatchify(model.predict_image(prefix, prefix), 4)


def test_a_fifth_paradigm_is_one_class_and_one_row(monkeypatch):
    """RecA's own loss trains it, and its sampler returns what was learned."""
    # imported here: the other tests of this file need paradigms.py and model.py alone
    from encoder import ViT, scratch_config
    from recon_loss import recon_loss
    from sample import reconstruct

    monkeypatch.setitem(PARADIGMS, "regression", Regression)
    torch.manual_seed(0)
    model, images = small("regression", encoder_width=128), random_images(1)
    model.cond_drop = 0.0
    encoder = ViT(scratch_config(12, 4)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        recon_loss(model, encoder, images).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(reconstruct(model, encoder, images), images, atol=0.05, rtol=0)


# ---------------------------------------------------------------- the noise of each image


@pytest.mark.parametrize("paradigm", ["flow", "ar", "mask", "mar"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@torch.no_grad()
def test_an_image_is_the_same_in_a_batch_of_any_size(paradigm, cfg_scale, monkeypatch):
    """Image 3 of seeds 0 to 7 is the image of seed 3 alone, also where the batch is cut in two."""
    import sample as sample_module

    torch.manual_seed(0)
    model = small(paradigm)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))  # heads start at zero
    prefix = random_prefix(model, 1).expand(8, -1, -1)
    options = {"cfg_scale": cfg_scale, "steps": 4}
    if paradigm in ("flow", "mar"):
        options["eta"] = 0.5
    images = sample_module.sample_image(model, prefix, range(8), **options)
    alone = sample_module.sample_image(model, prefix[:1], [3], **options)
    torch.testing.assert_close(images[3:4], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(images[3], images[4], atol=1e-3), "each image has noise of its own"
    monkeypatch.setattr(sample_module, "MAX_BATCH", 3)
    cut = sample_module.sample_image(model, prefix, range(8), **options)
    torch.testing.assert_close(cut, images, atol=1e-4, rtol=0)
