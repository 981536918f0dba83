"""The unified model: one transformer that reads words and images, writes words, and draws.

Left of the bar is the prefix, right of it what the model is asked for (see recon_loss.py):

    <bos> caption words <eos> <pad>   | image, or another wording
    <bos> visual words w_1 ... w_K    | image, or caption words          | image: Reconstruction Alignment, arXiv 2509.07295

*Visual words* are the image as the understanding encoder sees it, said in the model's own language. K learned queries
(BLIP-2, arXiv 2301.12597) attend to the encoder's patch tokens, each gives logits over the vocabulary, and what is passed
on is the expected word embedding, softmax(logits) @ wte (AlignVLM, arXiv 2502.01341). One-hot visual words ARE a caption: so
text to image and reconstruction are one loss with two prefixes.

The prefix is causal and never sees the image; so its keys and values are computed once and reused by every sampling step.
How the image itself is made is one of four *paradigms*, and only the image positions know which:

             stands for                  an image position holds         it sees           its state becomes
    flow     BAGEL, Transfusion, JiT     a noised patch, all at one t    all the image     the clean patch
    ar       Janus-Pro, LlamaGen         the code before its own         earlier codes     logits of its code
    mask     Show-o, MaskGIT             its code, or [MASK]             all the image     logits of its code
    mar      Harmon, MAR                 its clean patch, or [MASK]      all the image     what a small flow MLP draws it from

A fifth is one class here (see IMAGES), one loss in recon_loss.py and one sampler in sample.py.
# B batch, T prefix length, K = T - 1 visual words, N image positions, S any sequence, D width, H heads, V words, C codes, P pixels of a patch
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from encoder import Tokenizer

Linear, LayerNorm = partial(nn.Linear, bias=False), partial(nn.LayerNorm, bias=False)  # without biases they are as fast as any, everywhere

@dataclass
class ModelConfig:
    """The sizes of the transformer; plain numbers, so that a checkpoint can hold them."""
    vocab_size: int = 38
    text_len: int = 18            # T: <bos> and 17 words
    image_size: int = 48
    patch_size: int = 16
    width: int = 128
    depth: int = 6
    heads: int = 4
    encoder_width: int = 128      # width of the understanding encoder's patch tokens
    encoder_size: int = 0         # pixels of a side at which the encoder sees the images; 0: as they are
    connector_depth: int = 3
    paradigm: str = "flow"        # a key of IMAGES
    visual_words: int = 0         # how many of the K are kept, the rest are <pad>; 0: all
    sharpness: float = 1.0        # what the logits of visual words are multiplied by: 0, all words alike; large, one word each
    reverse_words: bool = False   # visual words from the last to the first: each is still a word, together they are no sentence
    condition: str = "words"      # RecA's. Controls of higher fidelity: "features", the patch tokens through an MLP; "pixels", the patches through one matrix
    draws: int = 1                # in training, how often each image is noised or masked behind its prefix
    renew: float = 1.0            # flow: share of the noise that sampling draws anew at each step; flat shapes: all, photographs: none
    noise_scale: float = 2.0      # flow, mar: standard deviation of the noise; larger for larger images, arXiv 2511.13720
    flow_mlp_width: int = 256     # mar: the head that draws one patch
    flow_mlp_depth: int = 3
    code_stride: int = 8          # ar, mask: side in pixels of what one code stands for
    code_levels: tuple = (8, 5, 5)  # ar, mask: values of each dimension of a code, arXiv 2309.15505; C is their product
    code_width: int = 64          # ar, mask: channels of the tokenizer

    @property
    def image_len(self) -> int:  # N
        return (self.image_size // (self.code_stride if IMAGES[self.paradigm].holds_codes else self.patch_size)) ** 2

    @property
    def codes(self) -> int:  # C
        return math.prod(self.code_levels)

class KVCache:
    """Keys and values of what was read so far: (depth, 2, B, H, length, D / H), room for `length` positions."""
    def __init__(self, cfg: ModelConfig, batch: int, length: int, device, dtype):
        self.kv = torch.empty(cfg.depth, 2, batch, cfg.heads, length, cfg.width // cfg.heads, device=device, dtype=dtype)
        self.length = self.prefix = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached followed by k, v. They stay only if `length` is moved on: an image in the making is written over."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length:end], self.kv[layer, 1, :, :, self.length:end] = k, v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

class Attention(nn.Module):
    """Multi-head attention; queries from x, keys and values from x or from `context`."""
    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.q_proj, self.kv_proj, self.out_proj = Linear(width, width), Linear(context_width or width, 2 * width), Linear(width, width)

    def forward(self, x, context=None, mask=None, cache: KVCache | None = None, layer: int = 0):
        q = rearrange(self.q_proj(x), "b s (h d) -> b h s d", h=self.heads)
        k, v = rearrange(self.kv_proj(x if context is None else context), "b s (two h d) -> two b h s d", two=2, h=self.heads)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)            # (B, H, S, D / H)
        return self.out_proj(rearrange(out, "b h s d -> b s (h d)"))

class Block(nn.Module):
    """Pre-norm transformer block: attention, optional cross-attention to `context`, MLP."""
    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.norm1, self.attn = LayerNorm(width), Attention(width, heads)
        if context_width:
            self.norm_cross, self.cross = LayerNorm(width), Attention(width, heads, context_width)
        self.norm2, self.up_proj, self.down_proj = LayerNorm(width), Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x, mask=None, context=None, cache=None, layer=0):
        x = x + self.attn(self.norm1(x), mask=mask, cache=cache, layer=layer)
        if context is not None:
            x = x + self.cross(self.norm_cross(x), context=context)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))

class Connector(nn.Module):
    """Patch tokens of the understanding encoder -> logits of K visual words."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(cfg.text_len - 1, cfg.width))
        self.norm_in = LayerNorm(cfg.encoder_width)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.encoder_width) for _ in range(cfg.connector_depth))
        self.norm, self.word_head = LayerNorm(cfg.width), Linear(cfg.width, cfg.vocab_size)

    def forward(self, patch_tokens):                                             # (B, tokens, encoder width)
        context = self.norm_in(patch_tokens)
        x = self.queries.expand(len(context), -1, -1)                            # (B, K, D)
        for block in self.blocks:
            x = block(x, context=context)
        return self.word_head(self.norm(x))                                      # (B, K, V)

class TimeEmbedding(nn.Module):
    """t in [0, 1], any shape -> (..., D): sines and cosines, then an MLP (arXiv 2212.09748)."""
    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        self.register_buffer("freqs", 1000 * torch.exp(-torch.arange(frequencies) / frequencies * 9.2103), persistent=False)  # 1000 ... 0.1
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t.float()[..., None] * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))

# ---- The image positions, one class a paradigm: what they hold (`embed`), whom they see (`causal`), what their states become (`head`)

class NoisedPatches(nn.Module):
    """flow: each position holds a noised patch, all at one time t, and says the clean patch (x-prediction, arXiv 2511.13720)."""
    causal, holds_codes = False, False
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        pixels = 3 * cfg.patch_size ** 2
        self.patch_embed = nn.Linear(pixels, cfg.width)
        self.t_embed = TimeEmbedding(cfg.width)
        self.norm = LayerNorm(cfg.width)  # noise is loud: without it a position's own place, added after, is a hundredth of its input
        self.flow_head = nn.Linear(cfg.width, pixels)

    def embed(self, model, x_t, t):                                              # (B, N, P), (B,) -> (B, N, D)
        return self.norm(self.patch_embed(x_t) + self.t_embed(t)[:, None])

    def head(self, model, h):                                                    # (B, N, D) -> (B, N, P)
        return self.flow_head(h)

class MaskedCodes(nn.Module):
    """mask: each position holds its code or [MASK]. Codes share wte and lm_head with the words: words, then codes, then [MASK]."""
    causal, holds_codes = False, True
    def __init__(self, cfg: ModelConfig):
        super().__init__()

    def embed(self, model, codes):                                               # (B, N) in [0, C], C is [MASK] -> (B, N, D)
        return model.wte(codes + model.cfg.vocab_size)

    def head(self, model, h):                                                    # (B, N, D) -> (B, N, C): no word can be drawn
        return F.linear(h, model.lm_head.weight[model.cfg.vocab_size: -1])

class CausalCodes(MaskedCodes):
    """ar: each position holds the code before its own; the first holds [MASK], which here says: an image begins."""
    causal = True

class MaskedPatches(nn.Module):
    """mar: each position holds its clean patch or [MASK]; from its state a small MLP draws the patch (arXiv 2406.11838)."""
    causal, holds_codes = False, False
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.patch_embed = nn.Linear(3 * cfg.patch_size ** 2, cfg.width)
        self.mask_embed = nn.Parameter(torch.empty(1, cfg.width))
        self.flow_mlp = FlowMLP(cfg)

    def embed(self, model, patches, masked):                                     # (B, N, P), (B, N) bool -> (B, N, D)
        return torch.where(masked[..., None], self.mask_embed, self.patch_embed(patches))

    def head(self, model, h):                                                    # (B, N, D), for flow_mlp
        return h

IMAGES = {"flow": NoisedPatches, "ar": CausalCodes, "mask": MaskedCodes, "mar": MaskedPatches}

class ModulatedMLP(nn.Module):
    """A residual MLP whose input is shifted and scaled, and whose output is gated, by a condition (adaLN-zero, arXiv 2212.09748)."""
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.ada = LayerNorm(width), nn.Linear(width, 3 * width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, c):                                                     # (..., W), (..., W) -> (..., W)
        shift, scale, gate = self.ada(c).chunk(3, -1)
        return x + gate * self.down_proj(F.silu(self.up_proj(self.norm(x) * (1 + scale) + shift)))

class FlowMLP(nn.Module):
    """x-prediction for one patch: its noised self, its time and the transformer's state -> the clean patch (arXiv 2406.11838, 4.2; noise there)."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width, pixels = cfg.flow_mlp_width, 3 * cfg.patch_size ** 2
        self.in_proj, self.cond_proj = nn.Linear(pixels, width), nn.Linear(cfg.width, width)
        self.t_embed = TimeEmbedding(width)
        self.blocks = nn.ModuleList(ModulatedMLP(width) for _ in range(cfg.flow_mlp_depth))
        self.norm, self.flow_head = LayerNorm(width), nn.Linear(width, pixels)

    def forward(self, x_t, t, h):                                                # (..., P), (...), (..., D) -> (..., P)
        x = self.in_proj(x_t)                                                    # (..., W)
        c = F.silu(self.t_embed(t) + self.cond_proj(h))
        for block in self.blocks:
            x = block(x, c)
        return self.flow_head(self.norm(x))

class UnifiedModel(nn.Module):
    """Words, visual words and image positions through one transformer: one head for words and codes, one for patches."""
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.image_size % cfg.patch_size == 0, f"{cfg.image_size=} must be a multiple of {cfg.patch_size=}"
        assert cfg.width % cfg.heads == 0, f"{cfg.width=} must be a multiple of {cfg.heads=}"
        assert cfg.paradigm in IMAGES, f"{cfg.paradigm=} must be one of {', '.join(IMAGES)}"
        self.cfg = cfg
        self.image = IMAGES[cfg.paradigm](cfg)
        self.tokenizer = Tokenizer(cfg.image_size, cfg.code_stride, cfg.code_levels, cfg.code_width) if self.image.holds_codes else None      # trained first, then frozen
        tokens = cfg.vocab_size + (cfg.codes + 1 if self.image.holds_codes else 0)  # words, codes, [MASK]
        self.wte = nn.Embedding(tokens, cfg.width)
        self.text_pos = nn.Parameter(torch.empty(2 * cfg.text_len, cfg.width))   # a prefix, and the words that answer it
        self.image_pos = nn.Parameter(torch.empty(2, math.isqrt(cfg.image_len), cfg.width))  # of rows and columns
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.norm, self.lm_head = LayerNorm(cfg.width), Linear(cfg.width, tokens)
        self.connector = Connector(cfg)
        if cfg.condition != "words":
            features, pixels = cfg.encoder_width, 3 * cfg.patch_size ** 2
            self.raw_norm = LayerNorm(features) if cfg.condition == "features" else nn.Identity()
            self.raw_proj = nn.Sequential(Linear(features, 4 * cfg.width), nn.GELU(), Linear(4 * cfg.width, cfg.width)) if cfg.condition == "features" else Linear(pixels, cfg.width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initial values, in one place: normal(0.02), residual outputs smaller with depth, heads and adaLN at zero."""
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.ones_(p) if "norm" in name else nn.init.zeros_(p)
            elif "lm_head" in name or "flow_head" in name or ".ada." in name:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=p.shape[1] ** -0.5 if "raw_proj" in name or "tokenizer" in name else 0.02)
        nn.init.normal_(self.wte.weight)                                         # words and places have to be heard beside what the blocks
        nn.init.normal_(self.text_pos, std=0.3)                                  # add: "top left" is learnt four times as fast as with 0.02
        nn.init.normal_(self.image_pos)
        for module in (self, self.connector):
            for block in module.blocks:
                for out in (block.attn.out_proj, block.down_proj):
                    out.weight.div_((2 * len(module.blocks)) ** 0.5)

    @property
    def device(self):
        return self.wte.weight.device

    # -- prefixes ------------------------------------------------------------------------------------------------------

    def text_prefix(self, ids):                                                  # words (B, T) -> prefix (B, T, D)
        return self.wte(ids)

    def for_encoder(self, images):
        """Images (B, 3, H, W) at the size that the encoder is to see them in: small photographs are enlarged, in [0, 1]."""
        size = self.cfg.encoder_size
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True) if size else images

    def visual_words(self, patch_tokens):
        """Encoder patch tokens (B, tokens, D_enc) -> probabilities (B, K, V): each visual word is a mixture of words."""
        words = (self.connector(patch_tokens).float() * self.cfg.sharpness).softmax(-1)
        if self.cfg.visual_words:
            kept = torch.arange(words.shape[1], device=words.device) < self.cfg.visual_words
            words = torch.where(kept[:, None], words, torch.eye(words.shape[2], device=words.device)[0])  # data.PAD
        return words.flip(1) if self.cfg.reverse_words else words

    def visual_prefix(self, words):
        """Visual words (B, K, V) -> prefix (B, T, D): <bos>, then expected word embeddings. One-hot words give text_prefix."""
        bos = self.wte.weight[1].expand(len(words), 1, -1)                       # data.BOS
        return torch.cat([bos, (words @ self.wte.weight[: self.cfg.vocab_size]).to(bos.dtype)], 1)

    def raw_prefix(self, x):
        """Patch tokens (B, n, D_enc) or patches (B, n, P), see `condition` -> prefix (B, T, D): <bos>, what they are mapped to, <pad>."""
        x = self.raw_proj(self.raw_norm(x))
        ids = torch.tensor([1] + [0] * (self.cfg.text_len - 1), device=x.device)  # data.BOS, data.PAD
        padding = self.text_prefix(ids.expand(len(x), -1)).to(x)
        return torch.cat([padding[:, :1], x, padding[:, 1 + x.shape[1]:]], 1)

    def places(self):
        """Position embeddings of the image, row by row: (N, D). What is learnt of one row holds in all columns (arXiv 2307.06304)."""
        return rearrange(self.image_pos[0][:, None] + self.image_pos[1], "h w d -> (h w) d")

    # -- the transformer -----------------------------------------------------------------------------------------------

    def trunk(self, x, mask=None, cache=None):
        """Embedded positions (B, S, D) -> hidden states (B, S, D). `mask` (S, S): True where a row may see a column."""
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=mask, cache=cache, layer=layer)
        return self.norm(x)

    def write(self, h):                                                          # (B, S, D) -> logits of words (B, S, V): no code can be written
        return F.linear(h, self.lm_head.weight[: self.cfg.vocab_size])

    def text_logits(self, prefix, ids=None):
        """Logits of the words that follow `prefix` (B, T, D), given those so far, `ids` (B, S): (B, S + 1, V)."""
        x = prefix if ids is None else torch.cat([prefix, self.wte(ids)], 1)
        x = x + self.text_pos[: x.shape[1]]
        h = self.trunk(x, causal_mask(x.shape[1], x.device))
        return self.write(h[:, prefix.shape[1] - 1:])

    def predict_image(self, prefix, *inputs):
        """What the image positions say after a prefix (B, T, D), given what they hold: see `embed` and `head` in the paradigm's class.
        B * draws inputs: draws of one image share its prefix, which costs more than they do, and do not see each other."""
        T, N = prefix.shape[1], self.cfg.image_len
        image = self.image.embed(self, *inputs) + self.places()                 # (B * draws, N, D)
        draws = len(image) // len(prefix)
        image = rearrange(image, "(b draws) n d -> b (draws n) d", draws=draws)
        x = torch.cat([prefix + self.text_pos[:T], image], 1)
        h = self.trunk(x, prefix_mask(T, N, draws, self.image.causal, x.device))
        return self.image.head(self, rearrange(h[:, T:], "b (draws n) d -> (b draws) n d", draws=draws))

    # -- the same with the prefix read once ----------------------------------------------------------------------------

    def read_prefix(self, prefix, room: int) -> KVCache:
        """The keys and values of a prefix (B, T, D), with room for so many more: computed once, used by every sampling step."""
        B, T, _ = prefix.shape
        cache = KVCache(self.cfg, B, T + room, prefix.device, prefix.dtype)
        self.trunk(prefix + self.text_pos[:T], causal_mask(T, prefix.device), cache)
        cache.length = cache.prefix = T
        return cache

    def text_logits_cached(self, cache, x):
        """Reads one more word's embedding (B, 1, D) and says the next one's logits: (B, 1, V)."""
        h = self.trunk(x + self.text_pos[cache.length], cache=cache)
        cache.length += 1
        return self.write(h)

    def predict_image_cached(self, cache, *inputs):
        """`predict_image` with the prefix already read: all positions anew, or where they are causal the next one."""
        x = self.image.embed(self, *inputs)                                      # (B, N, D), causal: (B, 1, D)
        start = cache.length - cache.prefix
        h = self.trunk(x + self.places()[start: start + x.shape[1]], cache=cache)
        cache.length += x.shape[1] if self.image.causal else 0
        return self.image.head(self, h)

def causal_mask(length: int, device) -> torch.Tensor:                            # (length, length), True where a row may see a column: itself and all before it
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()

def prefix_mask(T: int, N: int, draws: int, causal: bool, device) -> torch.Tensor:
    """(T + draws * N) squared: the prefix is causal; an image sees the prefix and itself, all of it or what is before."""
    row = torch.arange(T + draws * N, device=device)
    draw = torch.where(row < T, -1, (row - T) // N)                              # -1: the prefix
    mine = (draw == -1) | (draw[:, None] == draw)
    seen = row[:, None] >= row
    return mine & (seen if causal else seen | (row[:, None] >= T))

def patchify(images, patch_size: int):                                           # (B, 3, H, W) in [0, 1] -> patches (B, N, P) in [-1, 1]
    return rearrange(images * 2 - 1, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)

def unpatchify(patches, patch_size: int):                                        # (B, N, P) in [-1, 1] -> images (B, 3, H, W) in [0, 1], clamped
    side = int(patches.shape[1] ** 0.5)
    images = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size)
    return (images / 2 + 0.5).clamp(0, 1)
