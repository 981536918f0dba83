"""Where is the reconstruction loss? Here: `recon_loss`.

# B batch, T prefix length, K visual words, N image positions, D width, V words, P pixels of a patch
"""
import torch
import torch.nn.functional as F

from data import PAD
from model import patchify

LOGIT_NORMAL_MEAN = -1.0
LOGIT_NORMAL_STD = 1.0
MIN_ONE_MINUS_T = 0.1
DROP = 0.1


def interpolate(image, noise, t):
    return t * image + (1 - t) * noise


def flow_loss(model, prefix, images):
    """Rectified flow with x-prediction and velocity loss."""
    cfg = model.cfg
    x = patchify(images, cfg.patch_size)                                         # (B, N, P)
    noise = torch.randn_like(x) * cfg.noise_scale
    t = torch.sigmoid(LOGIT_NORMAL_MEAN + LOGIT_NORMAL_STD * torch.randn(len(x), 1, 1, device=x.device))
    x_t = interpolate(x, noise, t)
    x_pred = model.predict_image(prefix, x_t, t[:, 0, 0])
    return (((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2).mean()


def drop_prefix(model, prefix, p):
    null = model.text_prefix(null_caption(model.cfg, prefix.device))
    keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
    return torch.where(keep, prefix, null)


def null_caption(cfg, device):
    return torch.tensor([[1, 2] + [PAD] * (cfg.text_len - 2)], device=device)


def t2i_loss(model, caption, images):
    return flow_loss(model, drop_prefix(model, model.text_prefix(caption), DROP), images)


def recon_loss(model, encoder, images):
    with torch.no_grad():
        features = encoder(images).patch_tokens                                  # (B, tokens, D_enc)
        prefix = model.visual_prefix(model.visual_words(features))               # (B, T, D)
    return flow_loss(model, drop_prefix(model, prefix, DROP), images)


def text_loss(model, prefix, target):
    words = target[:, 1:]                                                        # without <bos>
    logits = model.text_logits(prefix, words[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), ignore_index=PAD)


def t2t_loss(model, caption, wording):
    return text_loss(model, model.text_prefix(caption), wording)


def i2t_loss(model, encoder, images, caption, entropy=0.0):
    with torch.no_grad():
        features = encoder(images).patch_tokens
    words = model.visual_words(features)
    loss = text_loss(model, model.visual_prefix(words), caption)
    H = -(words * (words + 1e-9).log()).sum(-1).mean()
    return loss, H
