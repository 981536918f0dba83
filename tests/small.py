"""The small model that the tests share, and random inputs for it.

The sizes differ, so that a swapped axis fails.

# B batch, T prefix length, N image positions, V words, C codes, D width, P values of a patch
"""

from types import SimpleNamespace

import torch
import torch.nn as nn

from model import ModelConfig, UnifiedModel
from paradigms import patchify

B, T, N, V, C = 2, 7, 9, 13, 24
D, P = 24, 48
ENCODER_WIDTH = 10
LEVELS = (3, 2, 4)  # of a code: 3 * 2 * 4 = C
SIZES = dict(
    vocab_size=V,
    text_len=T,
    image_size=12,
    patch_size=4,
    width=D,
    depth=2,
    heads=3,
    encoder_width=ENCODER_WIDTH,
    connector_depth=1,
    flow_mlp_width=20,
    flow_mlp_depth=1,
    code_stride=4,
    code_levels=LEVELS,
    code_width=8,
)


def small(paradigm="flow", **changes):
    """A model with every weight random: heads that start at zero would hide what flows through."""
    torch.manual_seed(0)
    model = UnifiedModel(ModelConfig(**{"paradigm": paradigm, **SIZES, **changes}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


class TinyEncoder(nn.Module):
    """Stands in for encoder.ViT: four patch tokens (B, 4, 10), and their mean."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3 * 6**2, ENCODER_WIDTH)

    def forward(self, images):
        tokens = self.proj(patchify(images, 6))
        return SimpleNamespace(patch_tokens=tokens, pooled=tokens.mean(1))


def random_images(count=B):
    """(count, 3, 12, 12) in [0, 1]."""
    return torch.rand(count, 3, 12, 12)


def random_captions(count=B):
    """<bos>, three words, <eos>, <pad>: ids (count, T)."""
    ids = torch.randint(4, V, (count, T))
    ids[:, 0] = 1
    ids[:, 4] = 2
    ids[:, 5:] = 0
    return ids


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_prefix(model, batch=B):
    """Prefixes (batch, T, D) of random words, the same in each call."""
    ids = torch.randint(4, V, (batch, T), generator=seeded(5))
    return model.text_prefix(ids).detach()
