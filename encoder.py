"""The understanding encoder: one Vision Transformer that CLIP, SigLIP and DINOv2 weights load into.

    encoder = ViT(scratch_config(image_size=48, patch_size=16))  # random weights, to be trained
    encoder = load_encoder("clip-b16")  # public weights, frozen: see pretrained.py
    features = encoder(images)  # patch_tokens, cls_token, pooled; images in [0, 1]

References: ViT 2010.11929, CLIP 2103.00020, SigLIP 2303.15343 and 2502.14786, DINOv2 2304.07193.
# B batch, C = 3 channels, N patches, T = prefix + N tokens, D width, H heads, P pooled width
"""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

# Mean and standard deviation of red, green and blue that a family of models was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STATS = {"mean": CLIP_MEAN, "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET_STATS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF_STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # [0, 1] -> [-1, 1]
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLS = ("cls", "mean", "attention", "none")
RESIZES = ("bicubic", "antialias", "align_corners", "offset")  # of positions, by publisher
DINOV2_OFFSET = 0.1  # "offset" adds this to the new grid before it takes the scale factor


@dataclass
class ViTConfig:  # in plain numbers and strings: a checkpoint holds asdict(cfg)
    family: str = "scratch"  # whose model this is; printed, the model never branches on it
    image_size: int = 224  # native side in pixels; other sizes interpolate the position embeddings
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    out_width: int = 0  # P, width of the projection of the pooled embedding; 0: no projection
    act: str = "gelu"  # one of ACTIVATIONS
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


class Features(NamedTuple):  # what the encoder returns, all after the final norm
    patch_tokens: torch.Tensor  # (B, N, D), row by row from the top left
    cls_token: torch.Tensor | None  # (B, D)
    pooled: torch.Tensor | None  # (B, P), the publisher's pooled or projected image embedding


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (B, T, D) -> (B, T, D)
        qkv = self.qkv(x)  # (B, T, 3 D)
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, act: str):
        super().__init__()
        self.act = act  # one of ACTIVATIONS
        self.fc1 = nn.Linear(width, 2 * mlp_width if act == "swiglu" else mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x):  # (..., D) -> (..., D)
        x = self.fc1(x)
        if self.act == "swiglu":  # gate and value in one product, arXiv 2002.05202
            gate, value = x.chunk(2, dim=-1)  # (..., M)
            x = F.silu(gate) * value
        elif self.act == "quick_gelu":  # OpenAI's approximation in the original CLIP
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.act == "gelu_tanh" else "none")
        return self.fc2(x)


class Block(nn.Module):  # pre-norm; pretrained.py folds DINOv2's LayerScale into attn.proj and fc2
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.attn = Attention(cfg.width, cfg.heads, cfg.qkv_bias)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.act)

    def forward(self, x):  # (B, T, D) -> (B, T, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):  # SigLIP's head: a learned query attends to all tokens; an MLP
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.heads = cfg.heads
        self.probe = nn.Parameter(torch.empty(1, cfg.width))
        self.q = nn.Linear(cfg.width, cfg.width)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.act)

    def forward(self, x):  # (B, T, D) -> (B, D)
        q = repeat(self.q(self.probe), "1 (h d) -> b h 1 d", b=len(x), h=self.heads)
        k, v = rearrange(self.kv(x), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, D / H)
        x = self.proj(rearrange(x, "b h 1 d -> b (h d)"))  # (B, D)
        return x + self.mlp(self.norm(x))


class ViT(nn.Module):  # images in, named features out; trainable as it is
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        self.grid = cfg.image_size // cfg.patch_size
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1))
        self.patch_embed = nn.Linear(3 * cfg.patch_size**2, D, bias=not cfg.norm_pre)
        self.pos_embed = nn.Parameter(torch.empty(self.grid**2, D))
        # The class token and the registers, the class token's position embedding already added.
        self.prefix_tokens = nn.Parameter(torch.empty(cfg.cls_token + cfg.registers, D))
        self.norm_pre = nn.LayerNorm(D, cfg.norm_eps) if cfg.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.Identity() if cfg.fc_norm else nn.LayerNorm(D, cfg.norm_eps)
        self.fc_norm = nn.LayerNorm(D, cfg.norm_eps) if cfg.fc_norm else nn.Identity()
        self.pool = AttentionPool(cfg) if cfg.pool == "attention" else None
        self.proj = nn.Linear(D, cfg.out_width, bias=False) if cfg.out_width else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Weights are normal, cut at two deviations; norms stay at torch's 1 and 0."""
        for name, parameter in self.named_parameters():
            # Positions at 0.02 drown in the patches, and are learnt late.
            std = 0.5 if name == "pos_embed" else 0.02
            # Residual outputs start smaller, as in GPT-2: the variance does not grow with depth.
            if name.startswith("blocks.") and name.endswith(("attn.proj.weight", "fc2.weight")):
                std = 0.02 / (2 * self.cfg.depth) ** 0.5
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def position_embeddings(self, rows: int, cols: int) -> torch.Tensor:
        """(rows * cols, D): as trained on the native grid, else resized as the publisher does."""
        if rows == cols == self.grid:
            return self.pos_embed
        native = rearrange(self.pos_embed.float(), "(h w) d -> 1 d h w", h=self.grid)
        if self.cfg.pos_resize == "offset":
            scale = [(side + DINOV2_OFFSET) / self.grid for side in (rows, cols)]
            resized = F.interpolate(native, scale_factor=scale, mode="bicubic")
        else:
            switches = {k: k == self.cfg.pos_resize for k in ("antialias", "align_corners")}
            resized = F.interpolate(native, (rows, cols), mode="bicubic", **switches)
        return rearrange(resized, "1 d h w -> (h w) d").to(self.pos_embed.dtype)

    def patch_grid(self, images: torch.Tensor) -> tuple[int, int]:
        """Rows and columns. AssertionError for no images, ValueError for sides that do not fit."""
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

    def forward(self, images: torch.Tensor) -> Features:
        """images (B, 3, H, W), floats in [0, 1]; patch_grid refuses others."""
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
        else:
            pooled = cls_token if self.cfg.pool == "cls" else patch_tokens.mean(dim=1)
        return Features(patch_tokens, cls_token, self.proj(self.fc_norm(pooled)))  # pooled: (B, P)


def scratch_config(image_size, patch_size, width=128, depth=4, heads=4, out_width=0, pool="mean"):
    """ViTConfig of a small encoder, to be trained from random weights. image_size in pixels."""
    assert image_size % patch_size == 0, f"{patch_size=} must divide {image_size=}"
    assert width % heads == 0, f"{heads=} must divide {width=}"
    cfg = ViTConfig("scratch", image_size, patch_size, width, depth, heads, 4 * width, out_width)
    return replace(cfg, pool=pool, cls_token=pool == "cls", **HALF_STATS)


def encoder_hash(encoder: ViT) -> str:
    """SHA-256 of an encoder's configuration and of the names, shapes and bytes of its tensors."""
    sha = hashlib.sha256(repr(encoder.cfg).encode())
    for name, tensor in encoder.state_dict().items():
        sha.update(repr((name, tuple(tensor.shape))).encode())
        sha.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
