"""The understanding encoder: one Vision Transformer that every public CLIP, SigLIP and DINOv2 layout loads into.

    python encoder.py clip-b16 photo.jpg                # what the encoder is, and what it sees: photo_pca.png
    python encoder.py path/to/model.safetensors         # a local file or hub folder works the same

    encoder = load_encoder("clip-b16")                  # frozen, in eval mode
    features = encoder(images)                          # images in [0, 1]; the encoder normalises them itself
    features.patch_tokens, features.cls_token, features.pooled

An architecture is one row of switches in ViTConfig, read off the file's own names and shapes; config.json says only what no
tensor shows (number of heads, activation). Loading is strict: every tensor of the file is used once or left out by name, every
tensor of the model is filled, anything else is an error that names the tensors.

References: ViT 2010.11929, CLIP 2103.00020, SigLIP 2303.15343, SigLIP 2 2502.14786, DINOv2 2304.07193, registers 2309.16588.

# B batch, C = 3 channels, N patches, T = prefix + N tokens, D width, H heads, P pooled width
"""
import argparse
import difflib
import json
import math
import mmap
import os
import re
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# ------------------------------------------------------------------------------------------------ the model

CLIP_STATS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_STATS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # [0, 1] -> [-1, 1]


@dataclass
class ViTConfig:
    """One row of switches per architecture; plain numbers and strings, so that a checkpoint can hold asdict(cfg)."""
    family: str = "scratch"        # whose model this is; printed, never branched on
    image_size: int = 224          # native side in pixels; other sizes interpolate the position embeddings
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    out_width: int = 0             # P, width of the projection of the pooled embedding; 0: no projection
    act: str = "gelu"              # a key of ACTIVATIONS
    norm_eps: float = 1e-6
    cls_token: bool = True
    registers: int = 0             # extra tokens that hold global information (arXiv 2309.16588)
    patch_bias: bool = True
    qkv_bias: bool = True
    norm_pre: bool = False         # CLIP: a LayerNorm before the first block
    pool: str = "cls"              # cls | mean | mean_norm (norm after the mean, none on the tokens) | attention | none
    pos_resize: str = "bicubic"    # a key of RESIZES
    mean: tuple = IMAGENET_STATS[0]
    std: tuple = IMAGENET_STATS[1]


class Features(NamedTuple):
    """What the encoder returns; all after the model's final norm."""
    patch_tokens: Tensor           # (B, N, D), row by row from the top left
    cls_token: Tensor | None       # (B, D)
    pooled: Tensor | None          # (B, P), what the publishing library calls the pooled or projected image embedding


def swiglu(x: Tensor) -> Tensor:
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's original
    "swiglu": swiglu,                                      # arXiv 2002.05202; fc1 makes gate and value at once
}

# How each publisher's own code resizes position embeddings; in DINOv2's, the grid grows by 0.1 before the scale is taken.
RESIZES = {
    "bicubic": dict(align_corners=False),
    "antialias": dict(align_corners=False, antialias=True),
    "align_corners": dict(align_corners=True),
    "offset": dict(align_corners=False),
}
DINOV2_OFFSET = 0.1


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)  # (B, H, T, D/H) each
        x = F.scaled_dot_product_attention(q, k, v)                                                  # (B, H, T, D/H)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))                                       # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.fc1 = nn.Linear(width, mlp_width * (2 if act == "swiglu" else 1))
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm. DINOv2's LayerScale is not here: scale * (W x + b) = (scale W) x + scale b, folded in when loading."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.attn = Attention(cfg.width, cfg.heads, cfg.qkv_bias)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """SigLIP's head: one learned query asks all tokens, then an MLP (arXiv 2303.15343; "MAP" in big_vision)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.heads = cfg.heads
        self.probe = nn.Parameter(torch.empty(1, cfg.width))
        self.q = nn.Linear(cfg.width, cfg.width)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.act)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.probe).expand(len(x), 1, -1)                                                 # (B, 1, D)
        q = rearrange(q, "b t (h d) -> b h t d", h=self.heads)                                       # (B, H, 1, D/H)
        k, v = rearrange(self.kv(x), "b t (two h d) -> two b h t d", two=2, h=self.heads)            # (B, H, T, D/H) each
        x = F.scaled_dot_product_attention(q, k, v)                                                  # (B, H, 1, D/H)
        x = self.proj(rearrange(x, "b h 1 d -> b (h d)"))                                            # (B, D)
        return x + self.mlp(self.norm(x))                                                            # (B, D)


class ViT(nn.Module):
    """Images in, named features out. Trainable as it is (nothing here stops gradients); load_encoder freezes it."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        grid = cfg.image_size // cfg.patch_size
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1))
        self.patch_embed = nn.Linear(3 * cfg.patch_size**2, cfg.width, bias=cfg.patch_bias)
        self.pos_embed = nn.Parameter(torch.empty(grid * grid, cfg.width))
        # The class token and the registers, the class token's position embedding already added.
        self.prefix_tokens = nn.Parameter(torch.empty(cfg.cls_token + cfg.registers, cfg.width))
        self.norm_pre = nn.LayerNorm(cfg.width, cfg.norm_eps) if cfg.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.pool = AttentionPool(cfg) if cfg.pool == "attention" else None
        self.proj = nn.Linear(cfg.width, cfg.out_width, bias=False) if cfg.out_width else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """The only place that initialises. Whatever adds to the residual stream starts at 0.02 / sqrt(2 * depth) (GPT-2), so that
        the stream's variance does not grow with depth; every other weight at 0.02, truncated at two deviations."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                adds = re.fullmatch(r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.weight", name)
                std = 0.02 / math.sqrt(2 * self.cfg.depth) if adds else 0.02
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def position_embeddings(self, rows: int, cols: int) -> Tensor:
        """(rows * cols, D): as trained on the native grid, otherwise resized as the publisher's own code does."""
        grid = self.cfg.image_size // self.cfg.patch_size
        if (rows, cols) == (grid, grid):
            return self.pos_embed
        how = dict(mode="bicubic", **RESIZES[self.cfg.pos_resize])
        if self.cfg.pos_resize == "offset":
            how |= dict(scale_factor=((rows + DINOV2_OFFSET) / grid, (cols + DINOV2_OFFSET) / grid))
        else:
            how |= dict(size=(rows, cols))
        old = rearrange(self.pos_embed.float(), "(h w) d -> 1 d h w", h=grid)
        return rearrange(F.interpolate(old, **how), "1 d h w -> (h w) d").to(self.pos_embed.dtype)

    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W), floats in [0, 1]. Raises ValueError for a size that the patch does not divide."""
        p = self.cfg.patch_size
        rows, cols = self.check(images)
        x = (images[..., :rows * p, :cols * p] - self.mean) / self.std                               # (B, C, H, W)
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p).to(self.pos_embed.dtype)    # (B, N, C*p*p)
        x = self.patch_embed(x) + self.position_embeddings(rows, cols)                               # (B, N, D)
        prefix = self.prefix_tokens.expand(len(x), -1, -1)                                           # (B, prefix, D)
        x = self.norm_pre(torch.cat([prefix, x], dim=1))                                             # (B, T, D)
        for block in self.blocks:
            x = block(x)                                                                             # (B, T, D)
        if self.cfg.pool != "mean_norm":
            x = self.norm(x)                                                                         # (B, T, D)
        cls_token = x[:, 0] if self.cfg.cls_token else None                                          # (B, D)
        patch_tokens = x[:, self.prefix_tokens.shape[0]:]                                            # (B, N, D)
        match self.cfg.pool:
            case "cls":
                pooled = cls_token                                                                   # (B, D)
            case "mean":
                pooled = patch_tokens.mean(dim=1)                                                    # (B, D)
            case "mean_norm":
                pooled = self.norm(patch_tokens.mean(dim=1))                                         # (B, D)
            case "attention":
                pooled = self.pool(x)                                                                # (B, D)
            case "none":
                return Features(patch_tokens, cls_token, None)
        return Features(patch_tokens, cls_token, self.proj(pooled))                                  # pooled: (B, P)

    def check(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches; a sentence for whatever cannot be encoded."""
        assert images.ndim == 4 and images.shape[1] == 3, f"images must be (B, 3, H, W), not {tuple(images.shape)}"
        assert images.is_floating_point(), f"images must be floats in [0, 1], not {images.dtype}"
        if not torch.compiler.is_compiling() and len(images):  # one image shows a wrong scale; checking all would cost time
            low, high = (v.item() for v in images[0].detach().aminmax())
            assert -1e-3 <= low and high <= 1 + 1e-3, f"images must lie in [0, 1], not [{low:.3g}, {high:.3g}]"
        p, native = self.cfg.patch_size, self.cfg.image_size
        for name, side in zip(("height", "width"), images.shape[2:]):
            if side < p or side % p and side != native:  # SigLIP's So400m/14 at 384 drops the last 6 pixels, by design
                below, above = max(p, side // p * p), side // p * p + p
                raise ValueError(f"image {name} {side} is not a multiple of the encoder's patch size {p}; nearest valid: "
                                 + (f"{below} or {above}" if below < above else f"{below}"))
        return images.shape[2] // p, images.shape[3] // p


def scratch_config(image_size: int, patch_size: int, width: int = 128, depth: int = 4, heads: int = 4,
                   out_width: int = 0, pool: str = "mean") -> ViTConfig:
    """A small encoder to be trained from random weights: ViT(scratch_config(24, 8)). Sizes in pixels and channels."""
    assert image_size % patch_size == 0, f"{patch_size=} does not divide {image_size=}"
    assert width % heads == 0, f"{heads=} does not divide {width=}"
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads, mlp_width=4 * width,
                     out_width=out_width, pool=pool, cls_token=pool == "cls", mean=HALF_STATS[0], std=HALF_STATS[1])
