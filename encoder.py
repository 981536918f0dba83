"""The understanding encoder: one Vision Transformer that CLIP, SigLIP and DINOv2 weights load into.

    encoder = ViT(scratch_config(image_size=48, patch_size=16))  # random weights, to be trained
    encoder = load_encoder("clip-b16")  # public weights, frozen: see pretrained.py
    features = encoder(images)          # images in [0, 1]; the encoder normalises them itself
    features.patch_tokens, features.cls_token, features.pooled

References: ViT 2010.11929, CLIP 2103.00020, SigLIP 2303.15343, SigLIP 2 2502.14786,
DINOv2 2304.07193, registers 2309.16588.

# B batch, C = 3 channels, N patches, T = prefix + N tokens, D width, H heads, P pooled width
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

# Mean and standard deviation of red, green and blue that a family of models was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STATS = {"mean": CLIP_MEAN, "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET_STATS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF_STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # [0, 1] -> [-1, 1]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU in the original CLIP."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 M) -> (..., M): fc1 computes gate and value in one product (arXiv 2002.05202)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "swiglu": swiglu}
POOLS = ("cls", "mean", "attention", "none")
RESIZES = ("bicubic", "antialias", "align_corners", "offset")  # of positions, by publisher
DINOV2_OFFSET = 0.1  # "offset" adds this to the new grid before it takes the scale factor


@dataclass
class ViTConfig:
    """One architecture, in plain numbers and strings: a checkpoint holds asdict(cfg)."""

    family: str = "scratch"  # whose model this is; printed, the model never branches on it
    image_size: int = 224  # native side in pixels; other sizes interpolate the position embeddings
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    out_width: int = 0  # P, width of the projection of the pooled embedding; 0: no projection
    act: str = "gelu"  # a key of ACTIVATIONS
    norm_eps: float = 1e-6
    cls_token: bool = True
    registers: int = 0  # extra tokens that hold global information (arXiv 2309.16588)
    qkv_bias: bool = True
    norm_pre: bool = False  # CLIP: a LayerNorm before the first block, and patches without a bias
    fc_norm: bool = False  # timm: the last LayerNorm is on the pooled embedding, not on the tokens
    pool: str = "cls"  # one of POOLS
    pos_resize: str = "bicubic"  # one of RESIZES
    mean: tuple = IMAGENET_STATS["mean"]
    std: tuple = IMAGENET_STATS["std"]


class Features(NamedTuple):
    """What the encoder returns, all after the final norm."""

    patch_tokens: Tensor  # (B, N, D), row by row from the top left
    cls_token: Tensor | None  # (B, D)
    pooled: Tensor | None  # (B, P), the publisher's pooled or projected image embedding


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # (B, T, 3 D)
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.fc1 = nn.Linear(width, 2 * mlp_width if act == "swiglu" else mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm. DINOv2's LayerScale is folded in when loading: s (W x + b) = (s W) x + s b."""

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
    """SigLIP's head: one learned query attends to all tokens, then an MLP (arXiv 2303.15343)."""

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
        q = repeat(self.q(self.probe), "1 (h d) -> b h 1 d", b=len(x), h=self.heads)
        k, v = rearrange(self.kv(x), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, D / H)
        x = self.proj(rearrange(x, "b h 1 d -> b (h d)"))  # (B, D)
        return x + self.mlp(self.norm(x))  # (B, D)


class ViT(nn.Module):
    """Images in, named features out. Trainable as it is; load_encoder returns it frozen."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.grid = cfg.image_size // cfg.patch_size
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1))
        self.patch_embed = nn.Linear(3 * cfg.patch_size**2, cfg.width, bias=not cfg.norm_pre)
        self.pos_embed = nn.Parameter(torch.empty(self.grid**2, cfg.width))
        # The class token and the registers, the class token's position embedding already added.
        self.prefix_tokens = nn.Parameter(torch.empty(cfg.cls_token + cfg.registers, cfg.width))
        norm = partial(nn.LayerNorm, cfg.width, cfg.norm_eps)
        self.norm_pre = norm() if cfg.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.Identity() if cfg.fc_norm else norm()
        self.fc_norm = norm() if cfg.fc_norm else nn.Identity()
        self.pool = AttentionPool(cfg) if cfg.pool == "attention" else None
        self.proj = nn.Identity()
        if cfg.out_width:
            self.proj = nn.Linear(cfg.width, cfg.out_width, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """The only place that initialises; weights are normal, cut at two deviations.

        Residual outputs start at 0.02 / sqrt(2 * depth), as in GPT-2: the variance of the stream
        does not grow with depth. Positions at 0.02 drown in the patches, and are learnt late.
        """
        for name, parameter in self.named_parameters():
            std = 0.5 if name == "pos_embed" else 0.02
            if name.startswith("blocks.") and name.endswith(("attn.proj.weight", "fc2.weight")):
                std = 0.02 / math.sqrt(2 * self.cfg.depth)
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def position_embeddings(self, rows: int, cols: int) -> Tensor:
        """(rows * cols, D): as trained on the native grid, else resized as the publisher does."""
        if rows == cols == self.grid:
            return self.pos_embed
        how = self.cfg.pos_resize
        native = rearrange(self.pos_embed.float(), "(h w) d -> 1 d h w", h=self.grid)
        if how == "offset":
            scale = [(side + DINOV2_OFFSET) / self.grid for side in (rows, cols)]
            resized = F.interpolate(native, scale_factor=scale, mode="bicubic")
        else:
            switches = {"antialias": how == "antialias", "align_corners": how == "align_corners"}
            resized = F.interpolate(native, (rows, cols), mode="bicubic", **switches)
        return rearrange(resized, "1 d h w -> (h w) d").to(self.pos_embed.dtype)

    def patch_grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches; an error for what cannot be encoded."""
        is_batch = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
        assert is_batch, f"images must be floats (B, 3, H, W): {images.dtype} {tuple(images.shape)}"
        # One image shows a wrong scale; checking all would cost time.
        if not torch.compiler.is_compiling() and len(images):
            low, high = images[0].detach().aminmax()
            in_range = low >= -1e-3 and high <= 1 + 1e-3
            assert in_range, f"images must lie in [0, 1], not [{low:.3g}, {high:.3g}]"
        p = self.cfg.patch_size
        for name, side in zip(("height", "width"), images.shape[2:], strict=True):
            # The native side always fits: SigLIP's So400m/14 at 384 drops the last 6 pixels.
            if side < p or (side % p and side != self.cfg.image_size):
                below = side // p * p
                valid = f"{below} or {below + p}" if below else p
                problem = f"image {name} {side} is not a multiple of the encoder's patch size {p}"
                raise ValueError(f"{problem}; nearest valid: {valid}")
        return images.shape[2] // p, images.shape[3] // p

    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W), floats in [0, 1], to Features.

        Raises AssertionError for other images, ValueError for a size that the patch does not fit.
        """
        p = self.cfg.patch_size
        rows, cols = self.patch_grid(images)
        x = (images[..., : rows * p, : cols * p] - self.mean) / self.std  # (B, C, H, W)
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)  # (B, N, C p p)
        x = self.patch_embed(x.to(self.pos_embed.dtype)) + self.position_embeddings(rows, cols)
        prefix = self.prefix_tokens.expand(len(x), -1, -1)  # (B, prefix, D)
        x = self.norm_pre(torch.cat([prefix, x], dim=1))  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)

        cls_token = x[:, 0] if self.cfg.cls_token else None  # (B, D)
        patch_tokens = x[:, len(self.prefix_tokens) :]  # (B, N, D)
        if self.cfg.pool == "none":
            return Features(patch_tokens, cls_token, None)
        if self.cfg.pool == "attention":
            pooled = self.pool(x)  # (B, D)
        elif self.cfg.pool == "cls":
            pooled = cls_token
        else:
            pooled = patch_tokens.mean(dim=1)
        return Features(patch_tokens, cls_token, self.proj(self.fc_norm(pooled)))  # pooled: (B, P)


def scratch_config(image_size, patch_size, width=128, depth=4, heads=4, out_width=0, pool="mean"):
    """ViTConfig of a small encoder, to be trained from random weights. image_size in pixels."""
    assert image_size % patch_size == 0, f"{patch_size=} must divide {image_size=}"
    assert width % heads == 0, f"{heads=} must divide {width=}"
    cfg = ViTConfig("scratch", image_size, patch_size, width, depth, heads, 4 * width, out_width)
    return replace(cfg, pool=pool, cls_token=pool == "cls", **HALF_STATS)
