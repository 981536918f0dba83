"""From images to tokens. The understanding encoder: one Vision Transformer that every public CLIP, SigLIP and DINOv2 layout loads into.

    python encoder.py clip-b16 photo.jpg                # what the encoder is, and what it sees: photo_pca.png
    encoder = load_encoder("path/to/model.safetensors") # a preset's name, a hub folder or a file; frozen, in eval mode
    features = encoder(images)                          # images in [0, 1]; the encoder normalises them itself
    features.patch_tokens, features.cls_token, features.pooled

An architecture is one row of switches in ViTConfig, read off the file's own names and shapes; config.json says only what no tensor shows
(number of heads, activation). Loading is strict: every tensor of the file is used once or left out by name, every tensor of the model is filled.

For the two paradigms that draw codes there is an image tokenizer too, small, and trained here.

References: ViT 2010.11929, CLIP 2103.00020, SigLIP 2303.15343, SigLIP 2 2502.14786, DINOv2 2304.07193, registers 2309.16588.

# B batch, C = 3 channels, N patches, T = prefix + N tokens, D width, H heads, P pooled width
"""
import argparse
import difflib
import http.client
import json
import math
import mmap
import os
import re
import shutil
import sys
import urllib.request
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from PIL import Image
from torch import Tensor

# ------------------------------------------------------------------------------------------------ the model

CLIP_STATS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))  # of CLIP's training images
IMAGENET_STATS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF_STATS = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # [0, 1] -> [-1, 1]

@dataclass
class ViTConfig:
    """One row of switches per architecture; plain numbers and strings, so that a checkpoint can hold asdict(cfg)."""
    family: str = "scratch"        # whose model this is; printed, the model never branches on it
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
    qkv_bias: bool = True
    norm_pre: bool = False         # CLIP: a LayerNorm before the first block, and patches without a bias
    fc_norm: bool = False          # timm: the last LayerNorm is on the pooled embedding, not on the tokens
    pool: str = "cls"              # one of POOLS
    pos_resize: str = "bicubic"    # a key of RESIZES
    mean: tuple = IMAGENET_STATS["mean"]
    std: tuple = IMAGENET_STATS["std"]

class Features(NamedTuple):
    """What the encoder returns; all after the model's final norm."""
    patch_tokens: Tensor           # (B, N, D), row by row from the top left
    cls_token: Tensor | None       # (B, D)
    pooled: Tensor | None          # (B, P), what the publishing library calls the pooled or projected image embedding

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),                   # CLIP's original
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],      # arXiv 2002.05202; fc1 makes gate and value at once
}
POOLS = ("cls", "mean", "attention", "none")
RESIZES = {"bicubic": {}, "antialias": dict(antialias=True), "align_corners": dict(align_corners=True), "offset": {}}  # of position embeddings, by publisher
DINOV2_OFFSET = 0.1  # with "offset", the new grid grows by this much before the scale is taken

class Linear(nn.Linear):
    """nn.Linear, but on a CPU it calls oneDNN where nothing learns: torch itself calls MKL, which leaves the AVX-512 units of AMD's CPUs idle
    (an encoder is twice as fast on an EPYC). Both compute in float32."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        eager_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        if x.device.type == "cpu" and eager_float32 and not learns and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)  # (B, H, T, D/H) each
        x = F.scaled_dot_product_attention(q, k, v)                                                  # (B, H, T, D/H)
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))                                       # (B, T, D)

class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.fc1 = Linear(width, mlp_width * (2 if act == "swiglu" else 1))
        self.fc2 = Linear(mlp_width, width)

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
        self.q = Linear(cfg.width, cfg.width)
        self.kv = Linear(cfg.width, 2 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.act)

    def forward(self, x: Tensor) -> Tensor:
        q = repeat(self.q(self.probe), "1 (h d) -> b h 1 d", b=len(x), h=self.heads)                 # (B, H, 1, D/H)
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
        self.patch_embed = Linear(3 * cfg.patch_size**2, cfg.width, bias=not cfg.norm_pre)
        self.pos_embed = nn.Parameter(torch.empty(grid * grid, cfg.width))
        # The class token and the registers, the class token's position embedding already added.
        self.prefix_tokens = nn.Parameter(torch.empty(cfg.cls_token + cfg.registers, cfg.width))
        self.norm_pre = nn.LayerNorm(cfg.width, cfg.norm_eps) if cfg.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.Identity() if cfg.fc_norm else nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.fc_norm = nn.LayerNorm(cfg.width, cfg.norm_eps) if cfg.fc_norm else nn.Identity()
        self.pool = AttentionPool(cfg) if cfg.pool == "attention" else None
        self.proj = Linear(cfg.width, cfg.out_width, bias=False) if cfg.out_width else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """The only place that initialises. What adds to the residual stream starts at 0.02 / sqrt(2 * depth) (GPT-2), so that its variance does not grow with
        depth; positions at 0.5: at 0.02 they drown in the patches, and which object stands where is learnt late; other weights at 0.02."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                adds = re.fullmatch(r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.weight", name)
                std = 0.02 / math.sqrt(2 * self.cfg.depth) if adds else 0.5 if name == "pos_embed" else 0.02
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def position_embeddings(self, rows: int, cols: int) -> Tensor:
        """(rows * cols, D): as trained on the native grid, otherwise resized as the publisher's own code does."""
        grid = self.cfg.image_size // self.cfg.patch_size
        if (rows, cols) == (grid, grid):
            return self.pos_embed
        how = dict(size=(rows, cols), **RESIZES[self.cfg.pos_resize])
        if self.cfg.pos_resize == "offset":
            how = dict(scale_factor=((rows + DINOV2_OFFSET) / grid, (cols + DINOV2_OFFSET) / grid))
        old = rearrange(self.pos_embed.float(), "(h w) d -> 1 d h w", h=grid)
        return rearrange(F.interpolate(old, mode="bicubic", **how), "1 d h w -> (h w) d").to(self.pos_embed.dtype)

    def check(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches; a sentence for whatever cannot be encoded."""
        fits = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
        assert fits, f"images must be floats (B, 3, H, W), not {images.dtype} {tuple(images.shape)}"
        if not torch.compiler.is_compiling() and len(images):  # one image shows a wrong scale; checking all would cost time
            low, high = images[0].detach().aminmax()
            assert low >= -1e-3 and high <= 1 + 1e-3, f"images must lie in [0, 1], not [{low:.3g}, {high:.3g}]"
        p = self.cfg.patch_size
        for name, side in zip(("height", "width"), images.shape[2:]):
            if side < p or side % p and side != self.cfg.image_size:  # SigLIP's So400m/14 at 384 drops the last 6 pixels, by design
                valid = " or ".join(str(n * p) for n in (side // p, side // p + 1) if n)
                raise ValueError(f"image {name} {side} is not a multiple of the encoder's patch size {p}; nearest valid: {valid}")
        return images.shape[2] // p, images.shape[3] // p

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
        x = self.norm(x)                                                                             # (B, T, D)
        cls_token = x[:, 0] if self.cfg.cls_token else None                                          # (B, D)
        patch_tokens = x[:, self.prefix_tokens.shape[0]:]                                            # (B, N, D)
        if self.cfg.pool == "none":
            return Features(patch_tokens, cls_token, None)
        pooled = self.pool(x) if self.pool else cls_token if self.cfg.pool == "cls" else patch_tokens.mean(dim=1)  # (B, D)
        return Features(patch_tokens, cls_token, self.proj(self.fc_norm(pooled)))                     # pooled: (B, P)

def scratch_config(image_size: int, patch_size: int, width: int = 128, depth: int = 4, heads: int = 4, out_width: int = 0, pool: str = "mean") -> ViTConfig:
    """A small encoder to be trained from random weights: ViT(scratch_config(24, 8)). Sizes in pixels and channels."""
    assert image_size % patch_size == 0 and width % heads == 0, f"{patch_size=} must divide {image_size=}, and {heads=} {width=}"
    return ViTConfig(image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads, mlp_width=4 * width,
                     out_width=out_width, pool=pool, cls_token=pool == "cls", **HALF_STATS)

# ------------------------------------------------------------------------------------------------ the image tokenizer of `ar` and `mask`

# N codes an image, C codes in all, d channels of the bottleneck

class Conv(nn.Linear):
    """A convolution that keeps its size. Its weight is a matrix, (out, in * side * side), so that Muon takes it: at equal steps AdamW loses shapes."""
    def __init__(self, channels: int, out: int, side: int):
        super().__init__(channels * side ** 2, out)
        self.side = side

    def forward(self, x):                                                        # (B, channels, H, W) -> (B, out, H, W)
        return F.conv2d(x, self.weight.unflatten(1, (-1, self.side, self.side)), self.bias, padding=self.side // 2)

class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv, self.out_conv = Conv(width, width, 3), Conv(width, width, 1)

    def forward(self, x):
        return x + self.out_conv(F.silu(self.conv(F.silu(x))))

class Tokenizer(nn.Module):
    """A small convolutional autoencoder whose middle is rounded: finite scalar quantisation, FSQ (arXiv 2309.15505).

    Each of the d = len(levels) channels is bounded and rounded to one of its few values; their combination is the code. No codebook to learn, so
    none to collapse. Departure from the paper: (L - 1) (tanh z + 1) / 2 bounds odd and even L alike, without its half-step shift for even L.
    """

    def __init__(self, image_size: int, stride: int, levels: tuple[int, ...], width: int):
        super().__init__()
        w, d, first = width, len(levels), stride // 2                            # `stride`: side in pixels of what one code stands for
        self.side = image_size // stride
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([math.prod(levels[:i]) for i in range(d)]), persistent=False)
        self.encoder = nn.Sequential(nn.PixelUnshuffle(first), Conv(3 * first ** 2, w, 3), ResBlock(w), nn.PixelUnshuffle(2),
                                     Conv(4 * w, w, 1), ResBlock(w), ResBlock(w), Conv(w, d, 1), Rearrange("b d h w -> b (h w) d"))
        self.decoder = nn.Sequential(Conv(d, w, 1), ResBlock(w), ResBlock(w), Conv(w, 4 * w, 1), nn.PixelShuffle(2),
                                     ResBlock(w), Conv(w, 3 * first ** 2, 3), nn.PixelShuffle(first))

    def quantize(self, z):
        """Any z (..., d) -> rounded values in [-1, 1]; the gradient passes straight through the rounding."""
        x = (self.levels - 1) * (z.tanh() + 1) / 2                               # [0, L - 1]
        x = x + (x.round() - x).detach()
        return 2 * x / (self.levels - 1) - 1

    def to_codes(self, values):                                                  # rounded values (..., d) in [-1, 1] -> codes (...) in [0, C)
        return (((values + 1) / 2 * (self.levels - 1)).round().long() * self.basis).sum(-1)

    def to_values(self, codes):                                                  # codes (...) in [0, C) -> values (..., d) in [-1, 1]
        return 2 * (codes[..., None] // self.basis % self.levels) / (self.levels - 1) - 1

    def forward(self, images):                                                   # (B, 3, H, W) in [0, 1] -> the same through the bottleneck
        return self.decode_values(self.quantize(self.encoder(images * 2 - 1)))

    def decode_values(self, values):                                             # (B, N, d) -> images (B, 3, H, W)
        return self.decoder(rearrange(values, "b (h w) d -> b d h w", h=self.side)) / 2 + 0.5

    @torch.no_grad()
    def encode(self, images):                                                    # (B, 3, H, W) in [0, 1] -> codes (B, N)
        return self.to_codes(self.quantize(self.encoder(images * 2 - 1)))

    @torch.no_grad()
    def decode(self, codes):                                                     # (B, N) -> images (B, 3, H, W) in [0, 1]
        return self.decode_values(self.to_values(codes)).clamp(0, 1)

# ------------------------------------------------------------------------------------------------ reading files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file: u64 header length, JSON header, raw bytes. The tensors are views of the mapped file, so only those that are
    used are ever read. Raises ValueError if they do not fill the file one after the other."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy on write: torch wants a writable buffer
    start = position = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"truncated or not safetensors; the header claims {start - 8} bytes, the file has {len(data)}")
    tensors = {}
    try:
        header = json.loads(data[8:start].decode())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start + begin != position or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name}, {entry}, does not fill its bytes, from {position - start} on, of {len(data) - start}")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=position).view(shape)
            position = start + end
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged safetensors header: {type(error).__name__} {error}".partition("\n")[0]) from None
    if position != len(data):
        raise ValueError(f"the tensors end at byte {position}, the file at {len(data)}")
    return tensors

def read_tensors(path: Path) -> dict[str, Tensor]:
    """Any checkpoint file as names and tensors, memory-mapped where the format allows."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle or zip can raise nearly anything; weights_only keeps it from running code
        raise ValueError(f"torch.load(weights_only=True) cannot read it: {type(error).__name__} {error}".partition("\n")[0]) from None
    for wrapper in ("state_dict", "model"):
        tensors = tensors.get(wrapper, tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError("it holds no state dict, that is names and tensors")
    return tensors

# ------------------------------------------------------------------------------------------------ recognising an architecture

# Our name, then what transformers (CLIP and SigLIP, DINOv2), OpenCLIP, timm and DINOv2's own files, and torchvision call it.
NAMES = {theirs: row.split()[0] for row in """
    patch_embed      embeddings.patch_embedding embeddings.patch_embeddings.projection conv1 patch_embed.proj conv_proj
    cls_token        embeddings.class_embedding embeddings.cls_token class_embedding class_token
    registers        embeddings.register_tokens register_tokens reg_token
    positions        embeddings.position_embedding.weight embeddings.position_embeddings positional_embedding pos_embed encoder.pos_embedding
    norm_pre         pre_layrnorm ln_pre
    norm1            layer_norm1 ln_1
    attn.q           self_attn.q_proj attention.attention.query
    attn.k           self_attn.k_proj attention.attention.key
    attn.v           self_attn.v_proj attention.attention.value
    attn.qkv.weight  attn.in_proj_weight self_attention.in_proj_weight
    attn.qkv.bias    attn.in_proj_bias self_attention.in_proj_bias
    attn.proj        self_attn.out_proj attention.output.dense attn.out_proj self_attention.out_proj
    attn.proj.scale  layer_scale1.lambda1 ls1.gamma
    norm2            layer_norm2 ln_2
    mlp.fc1          mlp.weights_in mlp.w12 mlp.c_fc mlp.0 mlp.linear_1
    mlp.fc2          mlp.weights_out mlp.w3 mlp.c_proj mlp.3 mlp.linear_2
    mlp.fc2.scale    layer_scale2.lambda1 ls2.gamma
    norm             post_layernorm layernorm ln_post encoder.ln
    pool.probe       head.probe attn_pool.latent
    pool.qkv.weight  head.attention.in_proj_weight
    pool.qkv.bias    head.attention.in_proj_bias
    pool.q           attn_pool.q
    pool.kv          attn_pool.kv
    pool.proj        head.attention.out_proj attn_pool.proj
    pool.norm        head.layernorm attn_pool.norm
    pool.mlp.fc1     head.mlp.fc1 attn_pool.mlp.fc1
    pool.mlp.fc2     head.mlp.fc2 attn_pool.mlp.fc2
    proj             visual_projection
    proj.transposed  proj
    """.strip().splitlines() for theirs in row.split()[1:]}
WRAPPER = re.compile(r"(vision_model|visual\.trunk|visual|dinov2|dinov2_with_registers)\.")
BLOCK = re.compile(r"(?:encoder\.layers?\.|encoder\.layers\.encoder_layer_|transformer\.resblocks\.|blocks\.)(\d+)\.(.+)")
LEFT_OUT = re.compile(  # on purpose: text towers, classifiers, what only training or the similarity with text needs
    r"(text_model|text|transformer|token_embedding|ln_final|classifier|heads)\.|head\.(weight|bias)$"
    r"|(text_projection(\.weight)?|positional_embedding|logit_scale|logit_bias)$|(.+\.)?(position_ids|mask_token)$")

# A family is known by some of its tensors; with it comes what no tensor shows. The first row that fits counts.
FAMILIES = (
    ("CLIP, transformers", "embeddings.patch_embedding.weight pre_layrnorm.weight", dict(CLIP_STATS, act="quick_gelu", norm_eps=1e-5)),
    ("SigLIP, transformers", "embeddings.patch_embedding.weight", dict(HALF_STATS, act="gelu_tanh")),
    ("DINOv2, transformers", "embeddings.patch_embeddings.projection.weight", {}),
    ("CLIP, OpenCLIP", "conv1.weight", dict(CLIP_STATS, norm_eps=1e-5, pos_resize="antialias")),
    ("DINOv2", "patch_embed.proj.weight mask_token", dict(pos_resize="offset")),
    ("CLIP, timm", "patch_embed.proj.weight norm_pre.weight", dict(CLIP_STATS, norm_eps=1e-5, pos_resize="antialias")),
    ("ViT, timm", "patch_embed.proj.weight blocks.0.ls1.gamma", dict(pos_resize="antialias")),
    ("ViT, timm", "patch_embed.proj.weight", dict(HALF_STATS, pos_resize="antialias")),
    ("ViT, torchvision", "conv_proj.weight", dict(pos_resize="align_corners")),
)
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # So400m, H, g, bigG; heads of every other public model have 64 channels
CONFIG_FIELDS = {  # what config.json (transformers, timm) and open_clip_config.json call the fields of ViTConfig
    "hidden_size": "width", "num_features": "width", "width": "width", "num_hidden_layers": "depth", "layers": "depth",
    "num_attention_heads": "heads", "num_heads": "heads", "intermediate_size": "mlp_width", "num_register_tokens": "registers",
    "patch_size": "patch_size", "image_size": "image_size", "layer_norm_eps": "norm_eps", "hidden_act": "act", "global_pool": "pool"}
CONFIG_VALUES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "token": "cls", "avg": "mean", "map": "attention", "": "none"}
TIMM_TANH = re.compile(r"vit_(giantopt|base_patch32|so400m_patch16)\w*siglip|vit_large_patch16_siglip(_gap)?_512")

def read_config(folder: Path, tensors: dict[str, Tensor]) -> dict:
    """What the publisher's JSON files beside the weights state, in ViTConfig's words; empty where there are none."""
    open_clip, config, stated = any(name.startswith("visual.") for name in tensors), {}, {}
    try:
        for name in ["open_clip_config.json"] if open_clip else ["preprocessor_config.json", "config.json"]:
            config |= json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        model = config.get("model_cfg", {})
        vision = config.get("vision_config") or model.get("vision_cfg") or config | config.get("model_args", {})
        timm_name = vision.get("timm_model_name") or config.get("architecture") or ""
        if model.get("quick_gelu") or "quickgelu" in timm_name:
            vision["hidden_act"] = "quick_gelu"
        if TIMM_TANH.match(timm_name):
            vision["hidden_act"] = "gelu_tanh"
        if "head_width" in vision:
            vision["num_heads"] = vision["width"] // vision["head_width"]
        for theirs, ours in CONFIG_FIELDS.items():
            if theirs in vision:  # as an int, a float or a str, as the field is
                stated[ours] = type(getattr(ViTConfig, ours))(CONFIG_VALUES.get(vision[theirs], vision[theirs]))
        if stated.get("act", "gelu") not in ACTIVATIONS or stated.get("pool", "cls") not in POOLS:
            raise ValueError(f"no such activation or pooling: {stated}")
        stats = config.get("preprocess_cfg") or config.get("pretrained_cfg") or config
        for field in ("mean", "std"):
            if value := stats.get(field) or stats.get(f"image_{field}"):
                red, green, blue = map(float, value)
                stated[field] = (red, green, blue)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:  # whatever a damaged JSON leads to
        raise ValueError(f"the config beside it cannot be used: {error}") from None
    return stated

def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors under our names. What is left out is left out by name."""
    named, origin = {}, {}
    for theirs in tensors:
        if LEFT_OUT.match(theirs):
            continue
        name, block = WRAPPER.sub("", theirs, count=1), ""
        if match := BLOCK.match(name):
            block, name = f"blocks.{match[1]}.", match[2]
        stem, _, leaf = name.rpartition(".")
        ours = block + (NAMES[name] if name in NAMES else f"{NAMES.get(stem, stem)}.{leaf}" if stem else name)
        if ours in named:
            raise ValueError(f"{theirs} and {origin[ours]} are one tensor of the encoder")
        named[ours], origin[ours] = tensors[theirs], theirs
    return named

def recognise(tensors: dict[str, Tensor], named: dict[str, Tensor], stated: dict) -> ViTConfig:
    """The architecture that the tensors show; what is stated beside them fills the rest and has to agree."""
    bare = {WRAPPER.sub("", name, count=1) for name in tensors}
    family, _, conventions = next((row for row in FAMILIES if bare.issuperset(row[1].split())), (None, "", {}))
    if family is None:
        raise ValueError(f"no layout of CLIP, SigLIP, DINOv2, timm or torchvision; its tensors begin with {', '.join(sorted(tensors)[:6])}")

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in named or named[name].ndim < ndim:
            raise ValueError(f"{family} needs {name} with {ndim} dimensions, which is missing or has fewer")
        return named[name].shape[-ndim:]

    width, _, _, patch = shape("patch_embed.weight", 4)
    mlp_width, fc1_width = shape("blocks.0.mlp.fc2.weight", 2)[1], shape("blocks.0.mlp.fc1.weight", 2)[0]
    grid = math.isqrt(shape("positions", 2)[0])  # class token and registers are too few to reach the next square
    shown = dict(width=width, patch_size=patch, mlp_width=mlp_width, registers=shape("registers", 2)[0] if "registers" in named else 0,
                 depth=len({name.split(".")[1] for name in named if name.startswith("blocks.")}))
    for field in shown.keys() & stated.keys():
        if shown[field] != stated[field]:
            raise ValueError(f"the config beside it states {field} = {stated[field]}, its tensors show {shown[field]}")
    pool = "cls" if "cls_token" in named else "none" if family.startswith("SigLIP") else "mean"
    implied = dict(family=family, image_size=grid * patch, heads=HEADS.get(width, 0 if width % 64 else width // 64),
                   pool="attention" if "pool.probe" in named else pool,
                   cls_token="cls_token" in named, norm_pre="norm_pre.weight" in named, fc_norm="fc_norm.weight" in named,
                   qkv_bias=bool(named.keys() & {"blocks.0.attn.q.bias", "blocks.0.attn.qkv.bias"}))
    cfg = ViTConfig(**implied | conventions | shown | stated)
    cfg.act = "swiglu" if fc1_width == 2 * mlp_width else cfg.act
    cfg.pos_resize = "antialias" if cfg.registers else cfg.pos_resize  # so do the code of DINOv2, of transformers and of timm
    if "proj.weight" in named or "proj.transposed" in named:
        cfg.out_width = shape("proj.weight", 2)[0] if "proj.weight" in named else shape("proj.transposed", 2)[1]
    elif "logit_scale" in tensors and family.startswith("CLIP"):
        raise ValueError(f"{family} needs a projection, visual_projection.weight or visual.proj, which is missing")
    if cfg.image_size // patch != grid:
        raise ValueError(f"the config beside it states image_size = {cfg.image_size}, its positions show {grid} x {grid} patches")
    if cfg.heads < 1 or width % cfg.heads:
        raise ValueError(f"no number of heads for width {width}: state num_attention_heads, which has to divide it, in a config.json beside the file")
    return cfg

def fill(model: ViT, named: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give every tensor of the model its values and every tensor of the file its place, or raise a ValueError that names it. Empties named."""
    cfg, D, N = model.cfg, model.cfg.width, len(model.pos_embed)

    def take(name: str, *shape: int) -> Tensor:
        """The tensor, if it has this shape; leading axes of size 1 do not count."""
        if name not in named:
            raise ValueError(f"{name} is missing")
        tensor = named.pop(name)
        if not tensor.is_floating_point() or tensor.shape[-len(shape):] != shape or tensor.numel() != math.prod(shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} instead of float {list(shape)}")
        return tensor.view(shape)

    # What our ViT keeps in another form than the file: first the tokens, ...
    tokens = cfg.cls_token + cfg.registers
    own = next((n for n in (tokens, int(cfg.cls_token)) if n + N == named["positions"].shape[-2]), 0)  # those that have a position embedding
    positions = take("positions", own + N, D)
    prefix = [take("cls_token", D)[None]] if cfg.cls_token else []
    prefix += [take("registers", cfg.registers, D)] if cfg.registers else []
    state = {"mean": torch.tensor(cfg.mean).view(3, 1, 1), "std": torch.tensor(cfg.std).view(3, 1, 1), "pos_embed": positions[own:],
             "prefix_tokens": torch.cat([*prefix, positions[:0]]).float(),
             "patch_embed.weight": take("patch_embed.weight", D, 3, cfg.patch_size, cfg.patch_size).flatten(1)}
    state["prefix_tokens"][:own] += positions[:own]
    # ... then the blocks: q, k, v in one matrix, LayerScale folded into the matrix before it, ...
    layer_scale = any(name.endswith(".scale") for name in named)
    for block in (f"blocks.{i}" for i in range(cfg.depth)):
        for leaf, shape in (("weight", (D, D)), ("bias", (D,))):
            if f"{block}.attn.q.{leaf}" in named:
                state[f"{block}.attn.qkv.{leaf}"] = torch.cat([take(f"{block}.attn.{part}.{leaf}", *shape) for part in "qkv"])
        for last, inner in ((f"{block}.attn.proj", D), (f"{block}.mlp.fc2", cfg.mlp_width)) if layer_scale else ():
            gamma = take(f"{last}.scale", D).float()
            state[f"{last}.weight"] = gamma[:, None] * take(f"{last}.weight", D, inner)
            state[f"{last}.bias"] = gamma * take(f"{last}.bias", D)
    # ... and the pooling.
    if "pool.qkv.weight" in named:
        for leaf, shape in (("weight", (3 * D, D)), ("bias", (3 * D,))):
            state[f"pool.q.{leaf}"], state[f"pool.kv.{leaf}"] = take(f"pool.qkv.{leaf}", *shape).split((D, 2 * D))
    if "proj.transposed" in named:
        state["proj.weight"] = take("proj.transposed", D, cfg.out_width).T
    for name, want in model.named_parameters():
        tensor = state[name] if name in state else take(name, *want.shape)
        state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if named:
        raise ValueError(f"no place for {len(named)} of its tensors, {', '.join(sorted(named)[:6])}")
    model.load_state_dict(state, assign=True)

# ------------------------------------------------------------------------------------------------ finding the file

HUB = {  # preset -> repository on the public hub; -reg: with registers
    "clip-b32": "openai/clip-vit-base-patch32", "clip-b16": "openai/clip-vit-base-patch16", "clip-l14": "openai/clip-vit-large-patch14",
    "clip-l14-336": "openai/clip-vit-large-patch14-336", "siglip-b16": "google/siglip-base-patch16-224", "siglip-so400m-14": "google/siglip-so400m-patch14-384",
    "siglip2-b16": "google/siglip2-base-patch16-224", "siglip2-so400m-14": "google/siglip2-so400m-patch14-384",
    **{f"dinov2-{size[0]}14": f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")},
    **{f"dinov2-{size[0]}14-reg": f"facebook/dinov2-with-registers-{size}" for size in ("small", "base", "large", "giant")}}
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")

def find_weights(name_or_path: str) -> Path:
    """The file of weights behind a preset's name, a folder or a path."""
    path = fetch(HUB[name_or_path]) if name_or_path in HUB else Path(name_or_path)
    if not path.exists():
        near = difflib.get_close_matches(name_or_path, HUB, n=3, cutoff=0.3)
        raise ValueError(f"{name_or_path} is neither a path nor an encoder; did you mean {' or '.join(near or HUB)}?")
    files = [path / name for name in WEIGHTS if (path / name).exists()] if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds none of {', '.join(WEIGHTS)}")
    return files[0]

def fetch(repo: str) -> Path:
    """A folder with a hub repository's config.json and weights: from the hub's own cache, from ours, or downloaded into ours."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    theirs = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{repo.replace('/', '--')}"
    ours = Path(torch.hub.get_dir()) / "checkpoints" / repo.replace("/", "--")
    for folder in (*sorted(theirs.glob("snapshots/*")), ours):
        if (folder / "config.json").exists() and any((folder / name).exists() for name in WEIGHTS):
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ValueError(f"HF_HUB_OFFLINE is set, and {repo} is neither in {theirs} nor in {ours}")
    ours.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):  # some older repositories have only the last
        url, part = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/main/{name}", ours / f"{name}.part"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
                print(f"downloading {url} to {ours}", file=sys.stderr)
                shutil.copyfileobj(reply, file)
                if reply.length:  # what is still to come
                    raise OSError(f"it broke off {reply.length} bytes before its end")
        except (OSError, http.client.HTTPException) as error:
            part.unlink(missing_ok=True)
            if getattr(error, "code", None) == 404:
                continue
            raise ValueError(f"cannot download {url}: {error}") from None
        part.replace(ours / name)
        if name in WEIGHTS:
            return ours
    raise ValueError(f"{repo} holds neither model.safetensors nor pytorch_model.bin")

@torch.no_grad()
def load_encoder(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> ViT:
    """A public encoder, frozen and in eval mode: it is the understanding that generation is aligned with, so it has to stay.

    name_or_path: a preset of HUB, a folder as the hub has it, or one .safetensors, .bin, .pth or .pt file. Raises ValueError with one sentence for an
    unknown name and for a file that is damaged or no encoder."""
    file = find_weights(str(name_or_path))
    try:
        tensors = read_tensors(file)
        named = rename(tensors)
        with torch.device("meta"):  # no memory, no initialisation: every tensor comes from the file
            model = ViT(recognise(tensors, named, read_config(file.parent, tensors)))
        fill(model, named, dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return model.eval().requires_grad_(False)

# ------------------------------------------------------------------------------------------------ what the encoder sees

def load_image(path: str, cfg: ViTConfig) -> Tensor:
    """(1, 3, H, W) in [0, 1]: the whole picture, its shorter side about cfg.image_size, both sides a multiple of the patch."""
    try:
        image = Image.open(path).convert("RGB")
    except Exception as error:  # PIL raises nearly anything for a damaged file
        raise ValueError(f"{path} is no image that can be read ({error})") from None
    scale = cfg.image_size / min(image.size) / cfg.patch_size
    size = [max(1, round(side * scale)) * cfg.patch_size for side in image.size]
    from torchvision.transforms.functional import to_tensor  # here, since it takes a second to import
    return to_tensor(image.resize(size, Image.Resampling.BICUBIC))[None]

def pca_colors(tokens: Tensor) -> Tensor:
    """(N, D) -> (N, 3) in [0, 1]: the first three principal components as red, green and blue (as in arXiv 2304.07193)."""
    tokens = tokens - tokens.mean(dim=0)
    axes = torch.linalg.svd(tokens, full_matrices=False)[2][:3]                                      # (3, D)
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()                      # a component's sign is arbitrary
    colors = tokens @ axes.T                                                                        # (N, 3)
    colors = colors - colors.amin(dim=0)
    return colors / colors.amax(dim=0).clamp_min(1e-12)

def main() -> None:
    parser = argparse.ArgumentParser(description="Show what an encoder is and, for each IMG, what it sees: IMG_pca.png")
    parser.add_argument("encoder", metavar="NAME_OR_PATH", help=f"{', '.join(HUB)}, or a file or folder of weights")
    parser.add_argument("images", metavar="IMG", nargs="*", help="photographs; beside each goes a picture of its patch tokens")
    args = parser.parse_args()
    encoder = load_encoder(args.encoder)
    cfg, p = encoder.cfg, encoder.cfg.patch_size
    print(" | ".join(f"{field} {value}" for field, value in asdict(cfg).items()), f"| {sum(w.numel() for w in encoder.parameters()) / 1e6:.1f} M parameters")
    for path in args.images:
        image = load_image(path, cfg)                                                                # (1, 3, H, W)
        with torch.inference_mode():
            colors = pca_colors(encoder(image).patch_tokens[0].float())                            # (N, 3)
        picture = repeat(colors, "(h w) c -> c (h p) (w q)", p=p, q=p, h=image.shape[2] // p)       # (3, H, W)
        out = Path(path).with_name(f"{Path(path).stem}_pca.png")
        from torchvision.transforms.functional import to_pil_image
        to_pil_image(torch.cat([image[0], picture], dim=2)).save(out)
        print(f"{out}: the image, and its patch tokens' first three principal components as colors")

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # a user's mistake gets a sentence, not a traceback
        print(f"encoder.py: {error}", file=sys.stderr)
        sys.exit(2)
