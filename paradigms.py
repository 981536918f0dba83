"""The four ways to generate an image, side by side: what a position holds, head, loss, sampler.

           stands for                an image position holds    attends to       its state becomes
    flow   BAGEL, Transfusion, JiT   a noised patch, all at t   the whole image  the clean patch
    ar     Janus-Pro, LlamaGen       the previous code          earlier codes    logits of its code
    mask   Show-o, MaskGIT           its code, or [MASK]        the whole image  logits of its code
    mar    Harmon, MAR               its patch, or [MASK]       the whole image  input of a flow MLP

Every position also attends to the prefix, which never attends to the image (model.py). A fifth
paradigm is one more class here and its row in PARADIGMS.

Flow convention, here and everywhere: x_t = t * image + (1 - t) * noise. t = 0 is noise, t = 1 the
image, and velocity = image - noise.

# B batch, T prefix length, N image positions, G of them drawn at a time, D width, C codes,
# P values of a patch (3 * patch_size^2), W width of the flow MLP
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from words import BOS, EOS, PAD

# Training: t = sigmoid(N(mean, std)). arXiv 2511.13720 has -0.8; layout and color are decided early
LOGIT_NORMAL_MEAN = -1.0
LOGIT_NORMAL_STD = 1.0
MIN_ONE_MINUS_T = 0.1  # bounds the weight 1 / (1 - t)^2 of the velocity loss; 0.05 in 2511.13720
LOG_FREQUENCY_RANGE = 9.2103  # log(10,000), of the time embedding
MLP_REPEATS = 2  # mar: times and noises drawn for each patch; 4 in arXiv 2406.11838, appendix B

# Sampling
TIME_POWER = 1.5  # t_i = (i / steps)^1.5: more steps near the noise, where the layout is decided
CHOICE_NOISE = 4.5  # mask: randomness of which codes are kept first, as in MaskGIT's code
FLOW_MLP_STEPS = 25  # mar: Euler steps of the flow MLP for each group of patches


@dataclass(frozen=True)
class Sampling:
    """How to sample; each paradigm reads what it needs."""

    cfg_scale: float = 2.5  # classifier-free guidance, s of `cfg_predict`; 1 is none
    steps: int = 25  # passes through the transformer (flow, mask, mar); ar takes one a code
    eta: float = 0.0  # flow, mar: share of the noise resampled at each step, see `euler_sample`
    temperature: float = 1.0  # of the codes (ar, mask: 0 is greedy) or of the noise (flow, mar)


class Flow(nn.Module):
    """flow: each position holds a noised patch and predicts the clean one (arXiv 2511.13720)."""

    causal = False
    uses_tokenizer = False
    default_sampling = Sampling(cfg_scale=2.0, steps=50, eta=1.0)

    def __init__(self, cfg):
        super().__init__()
        patch_values = 3 * cfg.patch_size**2
        self.patch_embed = nn.Linear(patch_values, cfg.width)
        self.t_embed = TimeEmbedding(cfg.width)
        # without this norm, noise is a hundred times as large as the position embedding
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        self.flow_head = nn.Linear(cfg.width, patch_values)

    def embed(self, model, x_t, t):  # (B, N, P), (B,) -> (B, N, D)
        return self.norm(self.patch_embed(x_t) + self.t_embed(t)[:, None])

    def head(self, model, h):  # (B, N, D) -> clean patches (B, N, P)
        return self.flow_head(h)

    def loss(self, model, prefix, images):
        """E |v_pred - v|^2 over all patches. (B, T, D), (B, 3, H, W) in [0, 1] -> scalar."""
        x = patchify(images, model.cfg.patch_size)  # (B, N, P)
        x_t, t = add_noise(x, sample_times(len(x), 1, x.device), model.cfg.noise_scale)
        x_pred = model.predict_image(prefix, x_t, t[:, 0, 0])  # (B, N, P)
        return velocity_squared_error(x_pred, x, t).mean()

    def sample(self, model, prefix, sampling, noise):
        """From noise (t = 0) to image (t = 1), all patches together: (B, T, D) -> (B, 3, H, W)."""
        predict = prefill_guided(model, prefix, sampling)
        N, P = model.cfg.image_len, 3 * model.cfg.patch_size**2
        draw_noise = partial(noise.normal, N, P, std=model.cfg.noise_scale * sampling.temperature)

        def predict_guided(x_t, t):
            return cfg_predict(predict, sampling.cfg_scale, x_t, t.expand(len(x_t)))

        x = euler_sample(predict_guided, draw_noise, sampling.steps, sampling.eta)
        return unpatchify(x, model.cfg.patch_size)


class MaskedCodes(nn.Module):
    """mask: each position holds its code or [MASK], and predicts its code (MaskGIT, 2202.04200).

    Codes share `wte` and `lm_head` with the words: first the words, then the codes, then [MASK].
    """

    causal = False
    uses_tokenizer = True
    default_sampling = Sampling(cfg_scale=2.0, steps=18, temperature=0.7)

    def __init__(self, cfg):
        super().__init__()

    def embed(self, model, codes):  # (B, N) in [0, C], C is [MASK] -> (B, N, D)
        return model.wte(codes + model.cfg.vocab_size)

    def head(self, model, h):  # (B, N, D) -> logits of the codes alone (B, N, C)
        return F.linear(h, model.lm_head.weight[model.cfg.vocab_size : -1])

    def loss(self, model, prefix, images):
        """-log p(code_i | prefix, codes not masked), mean over each image's masked codes.

        A share cos(pi u / 2) is masked, u ~ U(0, 1) (arXiv 2202.04200, section 3.3; Show-o, arXiv
        2408.12528). (B, T, D), (B, 3, H, W) in [0, 1] -> scalar.
        """
        codes = model.tokenizer.encode(images)  # (B, N)
        u = torch.rand(len(codes), 1, device=codes.device)
        masked = random_mask(codes.shape[1], torch.cos(math.pi / 2 * u))  # (B, N)
        logits = model.predict_image(prefix, codes.masked_fill(masked, model.cfg.codes))
        nll = F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none")  # (B, N)
        return masked_mean(masked, nll).mean()

    def sample(self, model, prefix, sampling, noise):
        """All codes at once, keep the most confident, and again (arXiv 2202.04200, section 3.2).

        The confidence is the log-probability of the sampled code plus noise that fades out, without
        which the images vary too little. (B, T, D) -> (B, 3, H, W).
        """
        predict = prefill_guided(model, prefix, sampling)
        mask_id = model.cfg.codes
        codes = torch.full((len(prefix), model.cfg.image_len), mask_id, device=prefix.device)
        for step, num_masked in enumerate(mask_schedule(model.cfg.image_len, sampling.steps), 1):
            logits = cfg_predict(predict, sampling.cfg_scale, codes)  # (B, N, C)
            sampled = sample_categorical(logits, sampling.temperature, noise)  # (B, N)
            log_p = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
            scale = sampling.temperature * CHOICE_NOISE * (1 - step / sampling.steps)
            confidence = log_p + scale * noise.gumbel(*log_p.shape[1:])
            # codes that are decided come last, so that they stay
            confidence = confidence.masked_fill(codes != mask_id, math.inf)
            least_confident = confidence.argsort(1)[:, :num_masked]
            codes = torch.where(codes == mask_id, sampled, codes)
            codes = codes.scatter(1, least_confident, mask_id)
        return model.tokenizer.decode(codes)


class Autoregressive(MaskedCodes):
    """ar: each position holds the previous code and predicts its own (LlamaGen, arXiv 2406.06525).

    The first position holds [MASK], which here means that an image begins.
    """

    causal = True
    default_sampling = Sampling(cfg_scale=1.5, temperature=0.5)

    def loss(self, model, prefix, images):
        """-sum_i log p(code_i | prefix, codes before i) / N. (B, T, D), (B, 3, H, W) -> scalar."""
        codes = model.tokenizer.encode(images)  # (B, N)
        previous = F.pad(codes[:, :-1], (1, 0), value=model.cfg.codes)  # (B, N)
        logits = model.predict_image(prefix, previous)  # (B, N, C)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    def sample(self, model, prefix, sampling, noise):
        """Code by code, in reading order: (B, T, D) -> (B, 3, H, W)."""
        predict = prefill_guided(model, prefix, sampling)
        codes = [torch.full((len(prefix), 1), model.cfg.codes, device=prefix.device)]  # [MASK]
        for _ in range(model.cfg.image_len):
            logits = cfg_predict(predict, sampling.cfg_scale, codes[-1])  # (B, 1, C)
            codes.append(sample_categorical(logits, sampling.temperature, noise))  # (B, 1)
        return model.tokenizer.decode(torch.cat(codes[1:], 1))


class MaskedAutoregressive(nn.Module):
    """mar: each position holds its patch or [MASK]; a flow MLP draws it (MAR, arXiv 2406.11838)."""

    causal = False
    uses_tokenizer = False
    default_sampling = Sampling(cfg_scale=2.5, steps=9)

    def __init__(self, cfg):
        super().__init__()
        self.patch_embed = nn.Linear(3 * cfg.patch_size**2, cfg.width)
        self.mask_embed = nn.Parameter(torch.empty(1, cfg.width))
        self.flow_mlp = FlowMLP(cfg)

    def embed(self, model, patches, masked):  # (B, N, P), (B, N) bool -> (B, N, D)
        return torch.where(masked[..., None], self.mask_embed, self.patch_embed(patches))

    def head(self, model, h):  # (B, N, D), as the flow MLP takes them
        return h

    def loss(self, model, prefix, images):
        """E |v_pred - v|^2 of each masked patch by itself, given the transformer's state there.

        arXiv 2406.11838, eq. 1, with a flow in place of diffusion. The paper masks at least 0.7 of
        the patches; of nine that leaves two visible, and sampling passes through all shares, so
        here the share is uniform. (B, T, D), (B, 3, H, W) in [0, 1] -> scalar.
        """
        x = patchify(images, model.cfg.patch_size)  # (B, N, P)
        masked = random_mask(x.shape[1], ratio=torch.rand(len(x), 1, device=x.device))  # (B, N)
        h = model.predict_image(prefix, x, masked)  # (B, N, D)
        x, h, masked = (y.repeat_interleave(MLP_REPEATS, 0) for y in (x, h, masked))
        x_t, t = add_noise(x, sample_times(len(x), x.shape[1], x.device), model.cfg.noise_scale)
        x_pred = self.flow_mlp(x_t, t[..., 0], h)  # (2 B, N, P)
        squared_error = velocity_squared_error(x_pred, x, t).mean(-1)  # (2 B, N)
        return masked_mean(masked, squared_error).mean()

    def sample(self, model, prefix, sampling, noise):
        """Patches in random groups, by the flow MLP (section 3.4): (B, T, D) -> (B, 3, H, W)."""
        predict = prefill_guided(model, prefix, sampling)
        copies = 1 if sampling.cfg_scale == 1 else 2  # states with the condition, and without
        std = model.cfg.noise_scale * sampling.temperature
        B, N, P = len(prefix), model.cfg.image_len, 3 * model.cfg.patch_size**2
        order = noise.uniform(N).argsort(1)  # (B, N), each row a permutation
        x = prefix.new_zeros(B, N, P)
        masked = torch.ones(B, N, dtype=torch.bool, device=prefix.device)
        done = 0
        for num_masked in mask_schedule(N, sampling.steps):
            group = order[:, done : N - num_masked, None]  # (B, G, 1)
            h = predict(x.repeat(copies, 1, 1), masked.repeat(copies, 1))  # (2 B, N, D)
            h = h.take_along_dim(group.repeat(copies, 1, 1), 1)  # (2 B, G, D)
            predict_guided = partial(self.predict_guided, h, sampling.cfg_scale)
            draw_noise = partial(noise.normal, group.shape[1], P, std=std)
            patches = euler_sample(predict_guided, draw_noise, FLOW_MLP_STEPS, sampling.eta)
            x = x.scatter(1, group.expand_as(patches), patches)
            masked = masked.scatter(1, group[..., 0], False)
            done = N - num_masked
        return unpatchify(x, model.cfg.patch_size)

    def predict_guided(self, h, cfg_scale, x_t, t):
        """Patches (B, G, P) at one t, with the states h (2 B, G, D) -> clean ones (B, G, P)."""
        flow_mlp = partial(self.flow_mlp, h=h)
        return cfg_predict(flow_mlp, cfg_scale, x_t, t.expand(x_t.shape[:2]))


PARADIGMS = {"flow": Flow, "ar": Autoregressive, "mask": MaskedCodes, "mar": MaskedAutoregressive}


# ---------------------------------------------------------------- the parts they are made of
class TimeEmbedding(nn.Module):
    """t in [0, 1], of any shape -> (..., D): sines and cosines, then an MLP (arXiv 2212.09748)."""

    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        # from 1000 down to 0.1, in equal ratios
        freqs = 1000 * torch.exp(-torch.arange(frequencies) / frequencies * LOG_FREQUENCY_RANGE)
        self.register_buffer("freqs", freqs, persistent=False)
        layers = [nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, t):
        angles = t.float()[..., None] * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class ModulatedMLP(nn.Module):
    """A residual MLP that a condition shifts, scales and gates (adaLN-zero, arXiv 2212.09748)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.ada = nn.Linear(width, 3 * width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x, c):  # both (..., W)
        shift, scale, gate = self.ada(c).chunk(3, -1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down_proj(F.silu(self.up_proj(h)))


class FlowMLP(nn.Module):
    """A patch from its noised self, its t and the transformer's state (2406.11838, section 4.2)."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.flow_mlp_width
        patch_values = 3 * cfg.patch_size**2
        self.in_proj = nn.Linear(patch_values, width)
        self.cond_proj = nn.Linear(cfg.width, width)
        self.t_embed = TimeEmbedding(width)
        self.blocks = nn.ModuleList(ModulatedMLP(width) for _ in range(cfg.flow_mlp_depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.flow_head = nn.Linear(width, patch_values)

    def forward(self, x_t, t, h):  # (..., P), (...), (..., D) -> clean patches (..., P)
        x = self.in_proj(x_t)  # (..., W)
        c = F.silu(self.t_embed(t) + self.cond_proj(h))
        for block in self.blocks:
            x = block(x, c)
        return self.flow_head(self.norm(x))


def patchify(images, patch_size: int):
    """Images (B, 3, H, W) in [0, 1] -> patches (B, N, P) in [-1, 1], values ordered (p q c)."""
    pattern = "b c (h p) (w q) -> b (h w) (p q c)"
    return rearrange(images * 2 - 1, pattern, p=patch_size, q=patch_size)


def unpatchify(patches, patch_size: int):
    """Patches (B, N, P) in [-1, 1] -> square images (B, 3, H, W), clamped to [0, 1]."""
    side = math.isqrt(patches.shape[1])
    images = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, c=3)
    return (images / 2 + 0.5).clamp(0, 1)


def masked_mean(mask, values):
    """The mean of each row where mask is true, 0 where it is nowhere: (B, S), (B, S) -> (B,)."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def random_mask(N: int, ratio):
    """Shares (B, 1) in (0, 1] -> (B, N) bool: that share of positions, rounded up, at random."""
    order = torch.rand(len(ratio), N, device=ratio.device).argsort(1)  # each row a permutation
    return order < (ratio * N).ceil().clamp(min=1)


# ---------------------------------------------------------------- flow: training and sampling
def interpolate(image, noise, t):
    """x_t = t * image + (1 - t) * noise: the path of rectified flow (arXiv 2209.03003, eq. 1)."""
    return t * image + (1 - t) * noise


def velocity_squared_error(x_pred, x, t):
    """(v_pred - v)^2 elementwise, (B, N, P), from a predicted image (arXiv 2511.13720, eq. 6).

    v = (x - x_t) / (1 - t), so it is (x_pred - x)^2 / (1 - t)^2; 1 - t is bounded from below.
    """
    return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2


def sample_times(B: int, per_image: int, device):
    """Logit-normal times (B, per_image, 1) in (0, 1) (arXiv 2403.03206, section 3.1).

    One from each of B equal strata, for less variance (as arXiv 2107.00630, appendix I.1).
    """
    u = torch.rand(B, per_image, 1, device=device)
    u = (u.argsort(0) + torch.rand_like(u)) / B
    normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    return torch.sigmoid(LOGIT_NORMAL_MEAN + LOGIT_NORMAL_STD * normal)


def add_noise(x, t, noise_scale: float):
    """Clean patches (B, N, P) at times t, (B, 1, 1) or (B, N, 1) -> x_t (B, N, P) and t."""
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype)
    return interpolate(x, noise * noise_scale, t), t


def euler_sample(predict, draw_noise, steps: int, eta: float):
    """Noise -> patches (B, N, P) in Euler steps at t_i = (i / steps)^TIME_POWER.

    predict(x_t, t) is the predicted clean image, draw_noise() fresh noise. Euler's step keeps the
    noise that x_t holds: x_t + (t_next - t) * velocity = t_next * x_pred + (1 - t_next) * noise.
    `eta` in [0, 1] mixes fresh noise in, by variance: noise <- sqrt(1 - eta^2) noise + eta fresh
    (as DDIM, arXiv 2010.02502, eq. 16), so that an early mistake can be undone.
    """
    x_t = draw_noise()
    times = (torch.arange(steps + 1, device=x_t.device) / steps) ** TIME_POWER
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x_pred = predict(x_t, t)
        noise = (x_t - t * x_pred) / (1 - t)
        if eta > 0:
            noise = (1 - eta**2) ** 0.5 * noise + eta * draw_noise()
        x_t = interpolate(x_pred, noise, t_next)
    return x_t


# ---------------------------------------------------------------- guidance, codes, noise
def null_prefix(model):
    """The empty condition (1, T, D): <bos> <eos> <pad> ..."""
    ids = [BOS, EOS] + [PAD] * (model.cfg.text_len - 2)
    return model.text_prefix(torch.tensor([ids], device=model.device))


def prefill_guided(model, prefix, sampling):
    """Reads the prefixes (B, T, D) once, and for guidance the empty condition behind them.

    Returns predict(*inputs): `predict_image_cached` and a progress bar, of 2 B rows with guidance.
    """
    if sampling.cfg_scale != 1:
        prefix = torch.cat([prefix, null_prefix(model).expand_as(prefix)])  # (2 B, T, D)
    cache = model.prefill(prefix, max_new_tokens=model.cfg.image_len)
    passes = model.cfg.image_len if model.paradigm.causal else sampling.steps
    progress = tqdm(total=passes, desc="sampling", delay=2, leave=False, disable=None)

    def predict(*inputs):
        progress.update()
        return model.predict_image_cached(cache, *inputs)

    return predict


def cfg_predict(predict, cfg_scale: float, *inputs):
    """uncond + s * (cond - uncond), classifier-free guidance with s = 1 + w of 2207.12598, eq. 6.

    predict takes the inputs (B, ...) twice, with the condition and then without -> (B, ...).
    """
    if cfg_scale == 1:
        return predict(*inputs)
    cond, uncond = predict(*(torch.cat([x, x]) for x in inputs)).chunk(2)
    return uncond + cfg_scale * (cond - uncond)


def mask_schedule(N: int, steps: int):
    """How many of N positions are still masked after each pass: N cos(pi k / (2 steps)).

    Each pass decides at least one position, the last all that are left (arXiv 2202.04200).
    """
    num_masked = N
    for step in range(1, min(N, steps) + 1):
        planned = int(N * math.cos(math.pi / 2 * step / steps))
        num_masked = min(num_masked - 1, planned)
        yield num_masked


def sample_categorical(logits, temperature: float, noise):
    """One id an entry from softmax(logits / temperature), by the Gumbel-max trick.

    logits (B, ..., C), noise: that of the B images -> (B, ...); a temperature of 0 is greedy.
    """
    if temperature > 0:
        logits = logits + temperature * noise.gumbel(*logits.shape[1:])
    return logits.argmax(-1)


class ImageNoise:
    """The noise of B images, each from its own seed: the same in a batch of any size.

    Drawn on the model's device; another kind of device gives other noise for a seed.
    """

    def __init__(self, seeds, device):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(self, distribution: str, shape):
        """One of torch's in-place distributions, `normal_` for instance: (B, *shape)."""
        noise = torch.empty(len(self.generators), *shape, device=self.device)
        for image, generator in zip(noise, self.generators, strict=True):
            getattr(image, distribution)(generator=generator)
        return noise

    def normal(self, *shape, std: float = 1.0):
        return std * self.draw("normal_", shape)

    def uniform(self, *shape):
        return self.draw("uniform_", shape)

    def gumbel(self, *shape):
        return -self.draw("exponential_", shape).log()
