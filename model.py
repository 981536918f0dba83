"""The unified model: one transformer that reads words and images, writes words, generates images.

What is left of the bar is the prefix, right of it is what is predicted (see recon_loss.py):

    <bos> caption words <eos> <pad>   | image, or another wording
    <bos> visual words w_1 ... w_K    | image (RecA, arXiv 2509.07295), or caption words

*Visual words* are the image as the understanding encoder sees it, in the model's own language. K
learned queries (BLIP-2, arXiv 2301.12597) attend to the encoder's patch tokens; each gives logits
over the vocabulary, and the transformer reads the expected word embedding, softmax(logits) @ wte
(AlignVLM, arXiv 2502.01341). One-hot visual words ARE a caption: so text to image and
reconstruction are one loss with two prefixes.

The prefix is causal and never attends to the image, so every sampling step reuses its keys and
values. How the image is generated is up to the paradigm (paradigms.py); all else is shared.

# B batch, T prefix length, K = T - 1 visual words, N image positions, R repeats of an image,
# S any sequence, D width, H heads, V words, C codes
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from paradigms import PARADIGMS
from tokenizer import Tokenizer
from words import BOS

# without biases they are as fast as any
Linear = partial(nn.Linear, bias=False)
LayerNorm = partial(nn.LayerNorm, bias=False)


@dataclass
class ModelConfig:
    """The sizes of the model; plain numbers, so that a checkpoint can hold them."""

    vocab_size: int = 38
    text_len: int = 18  # T: <bos> and K = 17 words
    image_size: int = 48  # pixels of a side
    patch_size: int = 16  # pixels of a side
    width: int = 128
    depth: int = 6
    heads: int = 4
    encoder_width: int = 128  # of the understanding encoder's patch tokens
    encoder_size: int = 0  # pixels of a side at which the encoder sees an image; 0: as it is
    connector_depth: int = 3
    paradigm: str = "flow"  # a key of PARADIGMS
    repeats_per_image: int = 1  # training: how often an image is noised or masked behind its prefix
    eta: float = 1.0  # flow: largest share of the noise that sampling resamples at each step
    noise_scale: float = 2.0  # flow, mar: std of the noise; larger for larger images, 2511.13720
    flow_mlp_width: int = 256  # mar
    flow_mlp_depth: int = 3  # mar
    code_stride: int = 8  # ar, mask: pixels of a side that one code stands for
    code_levels: tuple = (8, 5, 5)  # ar, mask: values of each dimension of a code, arXiv 2309.15505
    code_width: int = 64  # ar, mask: channels of the tokenizer

    @property
    def image_len(self) -> int:
        """N, the number of image positions."""
        uses_codes = PARADIGMS[self.paradigm].uses_tokenizer
        stride = self.code_stride if uses_codes else self.patch_size
        return (self.image_size // stride) ** 2

    @property
    def codes(self) -> int:
        """C, the number of codes; the id C is [MASK]."""
        return math.prod(self.code_levels)


class KVCache:
    """Keys and values of what was read so far: (depth, 2, B, H, length, D / H)."""

    def __init__(self, cfg: ModelConfig, batch: int, length: int, device, dtype):
        shape = (cfg.depth, 2, batch, cfg.heads, length, cfg.width // cfg.heads)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions that are kept
        self.prefix_length = 0  # of them in the prefix

    def extend(self, layer: int, k, v):
        """What is cached, then k, v (B, H, S, D / H), which stay only if `length` is moved on."""
        end = self.length + k.shape[2]
        keys, values = self.kv[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention; queries from x, keys and values from x or from `context`."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.kv_proj = Linear(context_width or width, 2 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x, context=None, mask=None, cache: KVCache | None = None, layer: int = 0):
        """x (B, S, D), context (B, any, D_context), mask (S, S): True where a row attends."""
        q = rearrange(self.q_proj(x), "b s (h d) -> b h s d", h=self.heads)
        kv = self.kv_proj(x if context is None else context)  # (B, any, 2 D)
        k, v = rearrange(kv, "b s (two h d) -> two b h s d", two=2, h=self.heads)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D / H)
        return self.out_proj(rearrange(out, "b h s d -> b s (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block: attention, optional cross-attention to `context`, MLP."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        if context_width:
            self.norm_cross = LayerNorm(width)
            self.cross = Attention(width, heads, context_width)
        self.norm2 = LayerNorm(width)
        self.up_proj = Linear(width, 4 * width)
        self.down_proj = Linear(4 * width, width)

    def forward(self, x, mask=None, context=None, cache=None, layer=0, first=0):
        """x (B, S, D) -> (B, S - first, D): only positions from `first` on are computed."""
        h = self.norm1(x)
        attended = self.attn(h[:, first:], context=h, mask=mask, cache=cache, layer=layer)
        x = x[:, first:] + attended
        if context is not None:
            x = x + self.cross(self.norm_cross(x), context=context)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))


class Connector(nn.Module):
    """Patch tokens of the understanding encoder -> logits of K visual words."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(cfg.text_len - 1, cfg.width))
        self.norm_in = LayerNorm(cfg.encoder_width)
        sizes = (cfg.width, cfg.heads, cfg.encoder_width)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(cfg.connector_depth))
        self.norm = LayerNorm(cfg.width)
        self.word_head = Linear(cfg.width, cfg.vocab_size)

    def forward(self, patch_tokens):
        """(B, tokens, D_enc) -> (B, K, V). The queries attend to each other and to the tokens."""
        context = self.norm_in(patch_tokens)
        x = self.queries.expand(len(context), -1, -1)  # (B, K, D)
        for block in self.blocks:
            x = block(x, context=context)
        return self.word_head(self.norm(x))  # (B, K, V)


class UnifiedModel(nn.Module):
    """Words, visual words and image positions through one transformer.

    Words and codes share the head `lm_head`; patches have the head of their paradigm.
    """

    cond_drop = 0.1  # training: share of conditions dropped for guidance, arXiv 2207.12598

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.paradigm in PARADIGMS, f"{cfg.paradigm=} is not one of {', '.join(PARADIGMS)}"
        assert cfg.image_size % cfg.patch_size == 0, (
            f"{cfg.image_size=} must be a multiple of {cfg.patch_size=}"
        )
        assert cfg.width % cfg.heads == 0, f"{cfg.width=} must be a multiple of {cfg.heads=}"
        self.cfg = cfg
        self.paradigm = PARADIGMS[cfg.paradigm](cfg)
        self.tokenizer = None
        num_tokens = cfg.vocab_size
        if self.paradigm.uses_tokenizer:
            # trained first, then frozen; its codes and [MASK] come after the words
            self.tokenizer = Tokenizer(cfg)
            num_tokens += cfg.codes + 1
        self.wte = nn.Embedding(num_tokens, cfg.width)
        # text positions: a prefix, and the words that answer it; image positions: rows and columns
        self.text_pos = nn.Parameter(torch.empty(2 * cfg.text_len, cfg.width))
        self.image_pos = nn.Parameter(torch.empty(2, math.isqrt(cfg.image_len), cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.width)
        self.lm_head = Linear(cfg.width, num_tokens)
        self.connector = Connector(cfg)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initial values, in one place: normal(0.02), heads and adaLN at zero.

        Word and position embeddings are larger, so that they are not drowned by what the blocks
        add; outputs to the residual stream get smaller with depth, as in GPT-2.
        """
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.constant_(p, 1.0 if "norm" in name else 0.0)
            elif "lm_head" in name or "flow_head" in name or ".ada." in name:
                nn.init.zeros_(p)
            elif "tokenizer" in name:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            else:
                nn.init.normal_(p, std=0.02)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.text_pos, std=0.3)
        nn.init.normal_(self.image_pos)
        for blocks in (self.blocks, self.connector.blocks):
            for block in blocks:
                block.attn.out_proj.weight.div_((2 * len(blocks)) ** 0.5)
                block.down_proj.weight.div_((2 * len(blocks)) ** 0.5)

    @property
    def device(self):
        return self.wte.weight.device

    # ------------------------------------------------ prefixes
    def text_prefix(self, ids):
        """Words (B, T) -> prefix (B, T, D)."""
        return self.wte(ids)

    def encode_visual_words(self, encoder, images, features=None):
        """Images (B, 3, H, W) in [0, 1] -> visual words (B, K, V).

        The encoder is frozen, always. features: its patch tokens of these images, if known.
        """
        if features is None:
            with torch.no_grad():
                images = resize_for_encoder(images, self.cfg.encoder_size)
                features = encoder(images).patch_tokens  # (B, tokens, D_enc)
        return self.visual_words(features.to(images.dtype))

    def visual_words(self, patch_tokens):
        """Patch tokens (B, tokens, D_enc) -> (B, K, V): K distributions over the vocabulary."""
        return self.connector(patch_tokens).float().softmax(-1)

    def visual_prefix(self, words):
        """Visual words (B, K, V) -> prefix (B, T, D): <bos>, then expected word embeddings."""
        bos = self.wte.weight[BOS].expand(len(words), 1, -1)  # (B, 1, D)
        expected = words @ self.wte.weight[: self.cfg.vocab_size]  # (B, K, D)
        return torch.cat([bos, expected.to(bos.dtype)], 1)

    def recon_prefix(self, encoder, images, features=None):
        """RecA's prefix of images (B, 3, H, W): <bos> and their visual words, (B, T, D)."""
        return self.visual_prefix(self.encode_visual_words(encoder, images, features))

    def image_position_embedding(self):
        """(N, D), row by row: row + column, so that a row is learned in all columns at once."""
        rows, columns = self.image_pos
        return rearrange(rows[:, None] + columns, "h w d -> (h w) d")

    # ------------------------------------------------ the transformer
    def transformer(self, x, mask=None, cache=None, first=0):
        """Embedded positions (B, S, D) -> hidden states from `first` on (B, S - first, D).

        mask: see Attention. The states before `first` end with the last block, which skips them.
        """
        for layer, block in enumerate(self.blocks):
            if first and block is self.blocks[-1]:
                x = block(x, mask=mask[first:], cache=cache, layer=layer, first=first)
            else:
                x = block(x, mask=mask, cache=cache, layer=layer)
        return self.norm(x)

    def word_logits(self, h):
        """Hidden states (B, S, D) -> logits (B, S, V), of the words alone."""
        return F.linear(h, self.lm_head.weight[: self.cfg.vocab_size])

    def text_logits(self, prefix, ids=None):
        """Logits (B, S + 1, V) of the words after a prefix (B, T, D), given the first S, ids."""
        x = prefix if ids is None else torch.cat([prefix, self.wte(ids)], 1)
        x = x + self.text_pos[: x.shape[1]]
        mask = causal_mask(x.shape[1], x.device)
        h = self.transformer(x, mask, first=prefix.shape[1] - 1)  # (B, S + 1, D)
        return self.word_logits(h)

    def predict_image(self, prefix, *inputs):
        """What the image positions predict after a prefix (B, T, D), given what they hold.

        inputs: those of the paradigm's `embed`, (B R, ...). The R repeats of an image share its
        prefix and do not attend to each other. Returns the paradigm's `head`, (B R, N, ...).
        """
        T, N = prefix.shape[1], self.cfg.image_len
        image = self.paradigm.embed(self, *inputs) + self.image_position_embedding()  # (B R, N, D)
        repeats = len(image) // len(prefix)
        image = rearrange(image, "(b r) n d -> b (r n) d", r=repeats)
        x = torch.cat([prefix + self.text_pos[:T], image], 1)  # (B, T + R N, D)
        mask = prefix_mask(T, N, repeats, self.paradigm.causal, x.device)
        h = self.transformer(x, mask, first=T)
        return self.paradigm.head(self, rearrange(h, "b (r n) d -> (b r) n d", r=repeats))

    # ------------------------------------------------ the same with the prefix read once
    def prefill(self, prefix, max_new_tokens: int) -> KVCache:
        """Keys and values of a prefix (B, T, D), with room for that many more positions."""
        B, T, _ = prefix.shape
        cache = KVCache(self.cfg, B, T + max_new_tokens, prefix.device, prefix.dtype)
        self.transformer(prefix + self.text_pos[:T], causal_mask(T, prefix.device), cache)
        cache.length = cache.prefix_length = T
        return cache

    def decode_step(self, cache, x):
        """Reads the embedding of one more word, (B, 1, D) -> logits of the next, (B, 1, V)."""
        h = self.transformer(x + self.text_pos[cache.length], cache=cache)
        cache.length += 1
        return self.word_logits(h)

    def predict_image_cached(self, cache, *inputs):
        """`predict_image` with the prefix already read; causal paradigms read one more position."""
        x = self.paradigm.embed(self, *inputs)  # (B, N, D), causal: (B, 1, D)
        start = cache.length - cache.prefix_length
        positions = self.image_position_embedding()[start : start + x.shape[1]]
        h = self.transformer(x + positions, cache=cache)
        if self.paradigm.causal:  # the others read the whole image anew in the next step
            cache.length += x.shape[1]
        return self.paradigm.head(self, h)


def causal_mask(length: int, device):
    """(length, length) bool, True where a row attends to a column: itself and all before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def prefix_mask(T: int, N: int, repeats: int, causal: bool, device):
    """(T + R N, T + R N) bool: the prefix is causal, and each repeat of the image attends to it.

    A repeat also attends to itself: to all its positions, or with `causal` to those before.
    """
    position = torch.arange(T + repeats * N, device=device)
    in_image = position >= T
    repeat = torch.where(in_image, (position - T) // N, -1)  # -1: the prefix
    same_or_prefix = (repeat == -1) | (repeat[:, None] == repeat)
    before = position[:, None] >= position
    return same_or_prefix & (before if causal else before | in_image[:, None])


def resize_for_encoder(images, size: int):
    """Images (B, 3, H, W) at the size in pixels at which the encoder sees them; 0: as they are."""
    if size == 0:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
