"""Sampling."""
import torch
from einops import rearrange

from data import BOS, EOS, PAD
from model import unpatchify
from recon_loss import MIN_ONE_MINUS_T, null_caption

STEPS = 25
CFG_SCALE = 2.5
TIME_POWER = 1.5


@torch.no_grad()
def sample_image(model, prefix, cfg_scale=CFG_SCALE, steps=STEPS, generator=None):
    """Euler steps from noise to image with classifier-free guidance; (B, T, D) -> images (B, 3, H, W)."""
    cfg, B = model.cfg, len(prefix)
    null = model.text_prefix(null_caption(cfg, prefix.device)).expand(B, -1, -1)
    guided = cfg_scale != 1
    cache = model.read_prefix(torch.cat([prefix, null]) if guided else prefix)
    x_t = torch.randn(B, cfg.image_len, 3 * cfg.patch_size ** 2, generator=generator, device=prefix.device) * cfg.noise_scale
    times = (torch.arange(steps + 1) / steps) ** TIME_POWER
    for t, t_next in zip(times[:-1], times[1:]):
        x_in = torch.cat([x_t, x_t]) if guided else x_t
        x_pred = model.predict_image_cached(cache, x_in, t.expand(len(x_in)))
        if guided:
            cond, uncond = x_pred.chunk(2)
            x_pred = uncond + cfg_scale * (cond - uncond)
        velocity = (x_pred - x_t) / (1 - t)
        x_t = x_t + (t_next - t) * velocity
    return unpatchify(x_t, cfg.patch_size)


@torch.no_grad()
def sample_words(model, prefix):
    """Greedy words after a prefix: (B, T, D) -> ids (B, K)."""
    ids = torch.zeros(len(prefix), 0, dtype=torch.long, device=prefix.device)
    for _ in range(model.cfg.text_len - 1):
        nxt = model.text_logits(prefix, ids)[:, -1].argmax(-1)
        ids = torch.cat([ids, nxt[:, None]], 1)
        if ((ids == EOS).any(1)).all():
            break
    return ids
