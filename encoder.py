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
import http.client
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
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

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
    qkv_bias: bool = True
    norm_pre: bool = False         # CLIP: a LayerNorm before the first block, and patches without a bias
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
ONEDNN = torch.backends.mkldnn.is_available()


@torch.library.custom_op("encoder::onednn_linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_linear.register_fake  # shapes alone, for torch.compile
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """nn.Linear, but without gradients on a CPU it calls oneDNN. torch itself calls MKL there, which leaves the AVX-512 units of
    AMD's CPUs idle: an encoder is twice as fast this way (measured on an EPYC). Both compute in float32."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if learns or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not ONEDNN:
            return super().forward(x)
        return onednn_linear(x, self.weight, self.bias)


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
        self.patch_embed = Linear(3 * cfg.patch_size**2, cfg.width, bias=not cfg.norm_pre)
        self.pos_embed = nn.Parameter(torch.empty(grid * grid, cfg.width))
        # The class token and the registers, the class token's position embedding already added.
        self.prefix_tokens = nn.Parameter(torch.empty(cfg.cls_token + cfg.registers, cfg.width))
        self.norm_pre = nn.LayerNorm(cfg.width, cfg.norm_eps) if cfg.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.pool = AttentionPool(cfg) if cfg.pool == "attention" else None
        self.proj = Linear(cfg.width, cfg.out_width, bias=False) if cfg.out_width else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """The only place that initialises. Whatever adds to the residual stream starts at 0.02 / sqrt(2 * depth) (GPT-2), so that
        the stream's variance does not grow with depth; every other weight at 0.02, truncated at two deviations, but
        positions at 0.5: at 0.02 they drown in the patches, and which object stands where is learnt late."""
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


# ------------------------------------------------------------------------------------------------ reading files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def unique(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]} occurs twice")
    return dict(pairs)


def naturals(value, least: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= least for n in value)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file: u64 header length, JSON header, raw bytes. The tensors are views of the mapped
    file, so only those that are used are ever read. Raises ValueError if the file is not exactly what the format demands."""
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"truncated; {size} bytes cannot be a safetensors file")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy on write: torch wants a writable buffer
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"truncated or not safetensors; the header claims {length} bytes, {size - 8} are left")
    try:
        header = json.loads(data[8:8 + length].decode(), object_pairs_hook=unique)
        if not all(isinstance(value, str) for value in header.pop("__metadata__", {}).values()):
            raise ValueError("__metadata__ must hold strings")
        for name, entry in header.items():
            if not (entry.keys() == {"dtype", "shape", "data_offsets"} and entry["dtype"] in DTYPES and naturals(entry["shape"], 1)
                    and naturals(entry["data_offsets"], 0) and len(entry["data_offsets"]) == 2):
                raise ValueError(f"tensor {name} is described by {str(entry):.99}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged safetensors header: {error}") from None
    tensors, position = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype, shape, count = DTYPES[entry["dtype"]], entry["shape"], math.prod(entry["shape"])
        if begin != position or end > size:
            raise ValueError(f"tensor {name} lies at bytes {begin} to {end}, but has to start at {position} in {size} bytes")
        if end - begin != count * dtype.itemsize:
            raise ValueError(f"tensor {name} of shape {shape} and type {entry['dtype']} does not fill {end - begin} bytes")
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(shape)
        position = end
    if position != size:
        raise ValueError(f"the tensors end at byte {position}, the file at {size}")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Any checkpoint file as names and tensors, memory-mapped where the format allows."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle or zip can raise nearly anything; weights_only keeps it from running code
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"torch.load(weights_only=True) cannot read it ({reason:.150})") from None
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
    positions        embeddings.position_embedding.weight embeddings.position_embeddings positional_embedding
    positions        pos_embed encoder.pos_embedding
    norm_pre         pre_layrnorm ln_pre
    norm1            layer_norm1 ln_1
    attn.q           self_attn.q_proj attention.attention.query
    attn.k           self_attn.k_proj attention.attention.key
    attn.v           self_attn.v_proj attention.attention.value
    attn.qkv.weight  attn.in_proj_weight self_attention.in_proj_weight
    attn.qkv.bias    attn.in_proj_bias self_attention.in_proj_bias
    attn.proj        self_attn.out_proj attention.output.dense attn.out_proj self_attention.out_proj
    attn.scale       layer_scale1.lambda1 ls1.gamma
    norm2            layer_norm2 ln_2
    mlp.fc1          mlp.weights_in mlp.w12 mlp.c_fc mlp.0 mlp.linear_1
    mlp.fc2          mlp.weights_out mlp.w3 mlp.c_proj mlp.3 mlp.linear_2
    mlp.scale        layer_scale2.lambda1 ls2.gamma
    norm             post_layernorm layernorm ln_post encoder.ln fc_norm
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

# A family is known by some of its tensors; the rest of its row is what no tensor shows. The first row that fits counts.
FAMILIES = (  # family, tensors, activation, eps, mean and std, resizing of positions
    ("CLIP, transformers", "embeddings.patch_embedding.weight pre_layrnorm.weight", "quick_gelu", 1e-5, CLIP_STATS, "bicubic"),
    ("SigLIP, transformers", "embeddings.patch_embedding.weight", "gelu_tanh", 1e-6, HALF_STATS, "bicubic"),
    ("DINOv2, transformers", "embeddings.patch_embeddings.projection.weight embeddings.register_tokens", "gelu", 1e-6,
     IMAGENET_STATS, "antialias"),
    ("DINOv2, transformers", "embeddings.patch_embeddings.projection.weight", "gelu", 1e-6, IMAGENET_STATS, "bicubic"),
    ("CLIP, OpenCLIP", "conv1.weight", "gelu", 1e-5, CLIP_STATS, "antialias"),
    ("DINOv2", "patch_embed.proj.weight register_tokens", "gelu", 1e-6, IMAGENET_STATS, "antialias"),
    ("DINOv2", "patch_embed.proj.weight mask_token", "gelu", 1e-6, IMAGENET_STATS, "offset"),
    ("CLIP, timm", "patch_embed.proj.weight norm_pre.weight", "gelu", 1e-5, CLIP_STATS, "antialias"),
    ("ViT, timm", "patch_embed.proj.weight blocks.0.ls1.gamma", "gelu", 1e-6, IMAGENET_STATS, "antialias"),
    ("ViT, timm", "patch_embed.proj.weight", "gelu", 1e-6, HALF_STATS, "antialias"),
    ("ViT, torchvision", "conv_proj.weight", "gelu", 1e-6, IMAGENET_STATS, "align_corners"),
)
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # So400m, H, g, bigG; heads of every other public model have 64 channels
CONFIG_FIELDS = {  # what config.json (transformers, timm) and open_clip_config.json call the fields of ViTConfig
    "hidden_size": "width", "num_features": "width", "width": "width", "num_hidden_layers": "depth", "layers": "depth",
    "num_attention_heads": "heads", "num_heads": "heads", "intermediate_size": "mlp_width", "num_register_tokens": "registers",
    "patch_size": "patch_size", "image_size": "image_size", "layer_norm_eps": "norm_eps"}
ACT_NAMES = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
TIMM_TANH = re.compile(r"vit_(giantopt|base_patch32|so400m_patch16)\w*siglip|vit_large_patch16_siglip(_gap)?_512")
TIMM_POOLS = {"token": "cls", "avg": "mean", "map": "attention", "": "none"}


def strip(shape) -> tuple:
    return strip(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)


def some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_config(folder: Path, tensors: dict[str, Tensor]) -> dict:
    """What the publisher's JSON files beside the weights state, in ViTConfig's words; empty where there are none."""
    open_clip, config = any(name.startswith("visual.") for name in tensors), {}
    try:
        for name in ["open_clip_config.json"] if open_clip else ["preprocessor_config.json", "config.json"]:
            config |= json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        model = config.get("model_cfg", {})
        vision = config.get("vision_config") or model.get("vision_cfg") or config | config.get("model_args", {})
        timm_name = vision.get("timm_model_name") or config.get("architecture") or ""
        stated = {ours: vision[theirs] for theirs, ours in CONFIG_FIELDS.items() if theirs in vision}
        if odd := {ours: value for ours, value in stated.items() if type(value) is not (float if ours == "norm_eps" else int)}:
            raise ValueError(f"it states {odd}")
        if "head_width" in vision:
            stated["heads"] = vision["width"] // vision["head_width"]
        if act := "quick_gelu" if model.get("quick_gelu") or "quickgelu" in timm_name else vision.get("hidden_act"):
            if act not in ACT_NAMES:
                raise ValueError(f"it states the activation {act}; known are {', '.join(ACT_NAMES)}")
            stated["act"] = ACT_NAMES[act]
        if TIMM_TANH.match(timm_name):
            stated["act"] = "gelu_tanh"
        if config.get("global_pool") in TIMM_POOLS:
            stated["pool"] = TIMM_POOLS[config["global_pool"]]
        if vision.get("vision_use_head") is False:  # SigLIP without its head
            stated["pool"] = "none"
        if config.get("architectures") == ["CLIPVisionModel"]:  # CLIP without its projection
            stated["out_width"] = 0
        stats = config.get("preprocess_cfg") or config.get("pretrained_cfg") or config
        for ours in ("mean", "std"):
            if value := stats.get(ours) or stats.get(f"image_{ours}"):
                red, green, blue = map(float, value)
                stated[ours] = (red, green, blue)
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
    for family, signs, act, norm_eps, (mean, std), pos_resize in FAMILIES:
        if bare.issuperset(signs.split()):
            break
    else:
        raise ValueError(f"no layout of CLIP, SigLIP, DINOv2, timm or torchvision; its tensors are {some(tensors)}")
    needed = dict(patch_embed=("patch_embed.weight", 4), fc1=("blocks.0.mlp.fc1.weight", 2), fc2=("blocks.0.mlp.fc2.weight", 2))
    for name, ndim in (*needed.values(), ("positions", 2)):
        if name not in named or named[name].ndim < ndim:
            raise ValueError(f"{family} needs {name} with {ndim} dimensions, which is missing or has fewer")
    patch, fc1, fc2 = (named[name].shape for name, _ in needed.values())
    grid = math.isqrt(named["positions"].shape[-2])  # class token and registers are too few to reach the next square
    shown = dict(width=patch[0], patch_size=patch[3], mlp_width=fc2[1],
                 registers=named["registers"].shape[-2] if "registers" in named and named["registers"].ndim > 1 else 0,
                 depth=len({name.split(".")[1] for name in named if name.startswith("blocks.")}))
    for field in shown.keys() & stated.keys():
        if shown[field] != stated[field]:
            raise ValueError(f"the config beside it states {field} = {stated[field]}, its tensors show {shown[field]}")
    pool = "attention" if "pool.probe" in named or family.startswith("SigLIP") else "cls" if "cls_token" in named else "mean"
    cfg = replace(ViTConfig(
        family=family, image_size=grid * patch[3], heads=HEADS.get(patch[0], patch[0] // 64 if patch[0] % 64 == 0 else 0), act=act,
        norm_eps=norm_eps, cls_token="cls_token" in named, norm_pre="norm_pre.weight" in named, pool=pool, pos_resize=pos_resize,
        qkv_bias=any(re.fullmatch(r"blocks\.\d+\.attn\.q(kv)?\.bias", name) for name in named), mean=mean, std=std, **shown), **stated)
    if fc1[0] == 2 * fc2[1]:
        cfg.act = "swiglu"
    if cfg.pool == "mean" and "fc_norm.weight" in bare:
        cfg.pool = "mean_norm"
    if "proj.weight" in named or "proj.transposed" in named:
        cfg.out_width = named["proj.weight"].shape[0] if "proj.weight" in named else named["proj.transposed"].shape[-1]
    elif family in ("CLIP, transformers", "CLIP, OpenCLIP") and "out_width" not in stated and "pre_layrnorm.weight" not in tensors:
        raise ValueError(f"{family} needs a projection, visual_projection.weight or visual.proj, which is missing")
    if cfg.image_size // cfg.patch_size != grid:
        raise ValueError(f"the config beside it states image_size = {cfg.image_size}, its positions show {grid} x {grid} patches")
    if cfg.heads < 1 or cfg.width % cfg.heads:
        raise ValueError(f"the number of heads cannot be told from width {cfg.width}: "
                         f"state num_attention_heads, which has to divide it, in a config.json beside the file")
    return cfg


def fill(model: ViT, named: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give every tensor of the model its values and every tensor of the file its place, or raise a ValueError that names them.
    Empties named. With tensors on the meta device it is a rehearsal that costs no memory."""
    cfg, D, wrong, made = model.cfg, model.cfg.width, [], {}

    def take(name: str, *shape: int) -> Tensor:
        """The tensor if it has the shape (tokens and positions may have leading axes of size 1), otherwise a complaint."""
        tensor = named.pop(name, None)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif not tensor.is_floating_point() or [*strip(tensor.shape)] != [*strip(shape)]:
            wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)} instead of float {list(shape)}")
        else:
            return tensor.view(shape)
        return torch.zeros(shape, device="meta")

    # What our ViT keeps in another form than the file: first the tokens, ...
    own = named["positions"].shape[-2] - len(model.pos_embed)  # prefix tokens that have a position embedding
    if own not in (0, cfg.cls_token, cfg.cls_token + cfg.registers):
        raise ValueError(f"{own + len(model.pos_embed)} positions are no square grid after {cfg.cls_token + cfg.registers} tokens")
    positions = take("positions", own + len(model.pos_embed), D)
    prefix = [take(name, n, D) for name, n in (("cls_token", int(cfg.cls_token)), ("registers", cfg.registers)) if n]
    made["prefix_tokens"] = torch.cat([*prefix, positions[:0]]).float()
    made["prefix_tokens"][:own] += positions[:own]
    made["pos_embed"] = positions[own:]
    made["patch_embed.weight"] = take("patch_embed.weight", D, 3, cfg.patch_size, cfg.patch_size).flatten(1)
    # ... then the blocks: q, k, v in one matrix, LayerScale folded into the matrix before it, ...
    layer_scale = any(name.endswith(".scale") for name in named)
    for i in range(cfg.depth):
        for leaf, shape in (("weight", (D, D)), ("bias", (D,))):
            if f"blocks.{i}.attn.q.{leaf}" in named:
                made[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([take(f"blocks.{i}.attn.{part}.{leaf}", *shape) for part in "qkv"])
        for scale, last, inner in (("attn.scale", "attn.proj", D), ("mlp.scale", "mlp.fc2", cfg.mlp_width)) if layer_scale else ():
            gamma = take(f"blocks.{i}.{scale}", D).float()
            made[f"blocks.{i}.{last}.weight"] = gamma[:, None] * take(f"blocks.{i}.{last}.weight", D, inner)
            made[f"blocks.{i}.{last}.bias"] = gamma * take(f"blocks.{i}.{last}.bias", D)
    # ... and the pooling.
    if "pool.qkv.weight" in named:
        for leaf, shape in (("weight", (3 * D, D)), ("bias", (3 * D,))):
            made[f"pool.q.{leaf}"], made[f"pool.kv.{leaf}"] = take(f"pool.qkv.{leaf}", *shape).split((D, 2 * D))
    if "proj.transposed" in named:
        made["proj.weight"] = take("proj.transposed", D, cfg.out_width).T

    state = {"mean": torch.tensor(cfg.mean).view(3, 1, 1), "std": torch.tensor(cfg.std).view(3, 1, 1)}
    for name, want in model.named_parameters():
        tensor = made[name] if name in made else take(name, *want.shape)
        state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if named:
        wrong.append(f"no place for {some(named)}")
    if wrong:
        raise ValueError("; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""))
    model.load_state_dict(state, assign=True)


# ------------------------------------------------------------------------------------------------ finding the file

HUB = {  # preset -> repository on the public hub; -reg: with registers
    "clip-b32": "openai/clip-vit-base-patch32", "clip-b16": "openai/clip-vit-base-patch16",
    "clip-l14": "openai/clip-vit-large-patch14", "clip-l14-336": "openai/clip-vit-large-patch14-336",
    "siglip-b16": "google/siglip-base-patch16-224", "siglip-so400m-14": "google/siglip-so400m-patch14-384",
    "siglip2-b16": "google/siglip2-base-patch16-224", "siglip2-so400m-14": "google/siglip2-so400m-patch14-384",
    "dinov2-s14": "facebook/dinov2-small", "dinov2-s14-reg": "facebook/dinov2-with-registers-small",
    "dinov2-b14": "facebook/dinov2-base", "dinov2-b14-reg": "facebook/dinov2-with-registers-base",
    "dinov2-l14": "facebook/dinov2-large", "dinov2-l14-reg": "facebook/dinov2-with-registers-large",
    "dinov2-g14": "facebook/dinov2-giant", "dinov2-g14-reg": "facebook/dinov2-with-registers-giant"}
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def find_weights(name_or_path: str | Path) -> Path:
    """The file of weights behind a preset's name, a folder or a path."""
    path = Path(name_or_path)
    if str(name_or_path) in HUB:
        path = fetch(HUB[str(name_or_path)])
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).exists()]
        if not found:
            sharded = "; its weights are in several shards, save them as one file" if any(path.glob("*.index.json")) else ""
            raise ValueError(f"{path} holds none of {', '.join(WEIGHTS)}{sharded}")
        return found[0]
    if not path.exists():
        near = difflib.get_close_matches(str(name_or_path), HUB, n=3, cutoff=0.3)
        raise ValueError(f"{name_or_path} is neither a path nor an encoder; did you mean {' or '.join(near) or ', '.join(HUB)}?")
    return path


def fetch(repo: str) -> Path:
    """A folder with a hub repository's config.json and weights: from the hub's own cache, from ours, or downloaded into ours."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    theirs = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{repo.replace('/', '--')}" / "snapshots"
    ours = Path(torch.hub.get_dir()) / "checkpoints" / repo.replace("/", "--")
    for folder in (*sorted(theirs.glob("*")), ours):
        if (folder / "config.json").exists() and any((folder / name).exists() for name in WEIGHTS):
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ValueError(f"HF_HUB_OFFLINE is set, and {repo} is neither in {theirs.parent} nor in {ours}")
    ours.mkdir(parents=True, exist_ok=True)
    download(repo, "config.json", ours)
    for name in ("model.safetensors", "pytorch_model.bin"):  # some older repositories have only the second
        if download(repo, name, ours):
            return ours
    raise ValueError(f"{repo} holds neither model.safetensors nor pytorch_model.bin")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def download(repo: str, name: str, folder: Path) -> bool:
    """One file of a repository, checked against the sha256 that the hub gives for large files; False if it has no such file."""
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/main/{name}"
    try:
        try:
            reply = urllib.request.build_opener(NoRedirect).open(urllib.request.Request(url, method="HEAD"), timeout=30)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            if error.code >= 400:
                raise
            reply = error  # the redirect to where large files are stored; only it has their sha256
        sha256 = re.fullmatch('"([0-9a-f]{64})"', reply.headers.get("x-linked-etag", ""))
        size = reply.headers.get("x-linked-size") or reply.headers.get("content-length")
        print(f"downloading {url} to {folder}", file=sys.stderr)
        torch.hub.download_url_to_file(url, str(folder / name), hash_prefix=sha256 and sha256[1])
        if sha256 is None and size and size != str((folder / name).stat().st_size):
            (folder / name).unlink()
            raise OSError(f"it broke off before its {size} bytes were here")
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the sha256 is another one
        raise ValueError(f"cannot download {url}: {error}".replace("hash value", "sha256")) from None
    return True


@torch.no_grad()
def load_encoder(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> ViT:
    """A public encoder, frozen and in eval mode: it is the understanding that generation is aligned with, so it has to stay.

    name_or_path: a preset of HUB, a folder as the hub has it, or one .safetensors, .bin, .pth or .pt file.
    Raises ValueError with one sentence for an unknown name and for a file that is damaged or no encoder."""
    file = find_weights(name_or_path)
    try:
        tensors = read_tensors(file)
        named = rename(tensors)
        with torch.device("meta"):  # no memory, no initialisation: every tensor comes from the file
            model = ViT(recognise(tensors, named, read_config(file.parent, tensors)))
        fill(model, {name: tensor.to("meta") for name, tensor in named.items()}, dtype)  # finds all that is wrong first
        fill(model, named, dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ what the encoder sees

def load_image(path: str, cfg: ViTConfig) -> Tensor:
    """(1, 3, H, W) in [0, 1]: the whole picture, its shorter side about cfg.image_size, both sides a multiple of the patch."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all of them PIL's
        raise ValueError(f"{path} is no image that can be read ({error})") from None
    scale = cfg.image_size / min(image.size) / cfg.patch_size
    size = [max(1, round(side * scale)) * cfg.patch_size for side in image.size]
    return to_tensor(image.resize(size, Image.Resampling.BICUBIC))[None]


def pca_colours(tokens: Tensor) -> Tensor:
    """(N, D) -> (N, 3) in [0, 1]: the first three principal components as red, green and blue (as in arXiv 2304.07193)."""
    tokens = tokens - tokens.mean(dim=0)
    _, _, axes = torch.linalg.svd(tokens, full_matrices=False)                                       # (min(N, D), D)
    signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()                            # a component's is arbitrary
    axes = (axes * signs)[:3]                                                                        # (3, D)
    colours = tokens @ axes.T                                                                        # (N, 3)
    low, high = colours.amin(dim=0), colours.amax(dim=0)
    return (colours - low) / (high - low).clamp_min(1e-12)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what an encoder is and, for each IMG, what it sees: IMG_pca.png")
    parser.add_argument("encoder", metavar="NAME_OR_PATH", help=f"{', '.join(HUB)}, or a file or folder of weights")
    parser.add_argument("images", metavar="IMG", nargs="*", help="photographs; beside each goes a picture of its patch tokens")
    args = parser.parse_args()
    encoder = load_encoder(args.encoder)
    cfg = encoder.cfg
    print(f"{cfg.family} | width {cfg.width} depth {cfg.depth} heads {cfg.heads} mlp {cfg.mlp_width} {cfg.act} | patch {cfg.patch_size} "
          f"image {cfg.image_size} registers {cfg.registers} | pooled {cfg.pool} {cfg.out_width or cfg.width} | "
          f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters")
    for path in args.images:
        image = load_image(path, cfg)                                                                # (1, 3, H, W)
        with torch.inference_mode():
            colours = pca_colours(encoder(image).patch_tokens[0].float())                            # (N, 3)
        p = cfg.patch_size
        picture = repeat(colours, "(h w) c -> c (h p) (w q)", p=p, q=p, h=image.shape[2] // p)       # (3, H, W)
        out = Path(path).with_name(f"{Path(path).stem}_pca.png")
        to_pil_image(torch.cat([image[0], picture], dim=2)).save(out)
        print(f"{out}: the image, and its patch tokens' first three principal components as colours")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # a user's mistake gets a sentence, not a traceback
        print(f"encoder.py: {error}", file=sys.stderr)
        sys.exit(2)
