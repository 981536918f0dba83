"""The throw-away text decoder that trains an understanding encoder from scratch (stage `encoder`).

As in CoCa (arXiv 2205.01917) and SigLIP 2 (arXiv 2502.14786). It is not used after that stage.

# B batch, T caption length, N patch tokens, D width, V words, D_enc width of the encoder
"""

import math

import torch
import torch.nn as nn

from model import Block, LayerNorm, Linear, causal_mask
from words import EOS


class TextDecoder(nn.Module):
    """Embeds a caption, to be contrasted with the image, and predicts it from the patch tokens.

    The first causal blocks read the caption alone: their state at <eos> is the text embedding. The
    others also attend to the patch tokens and predict the caption's words: from that an encoder
    learns which object has which color; contrast leaves a bag of words (arXiv 2210.01936).
    """

    def __init__(
        self, vocab_size, text_len, width, encoder_width, text_depth=1, cross_depth=2, heads=4
    ):
        super().__init__()
        self.text_depth = text_depth
        self.wte = nn.Embedding(vocab_size, width)
        self.text_pos = nn.Parameter(torch.empty(text_len, width))
        blocks = [Block(width, heads) for _ in range(text_depth)]
        blocks += [Block(width, heads, encoder_width) for _ in range(cross_depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_text = LayerNorm(width)
        self.norm = LayerNorm(width)
        self.text_proj = Linear(width, encoder_width)
        self.lm_head = Linear(width, vocab_size)
        # the scale and bias of the sigmoid loss: 10 and -10 (arXiv 2303.15343, section 3.2)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.bias = nn.Parameter(torch.empty(()))
        for p in self.parameters():
            if p.ndim == 1:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.text_pos, std=0.3)
        nn.init.constant_(self.log_scale, math.log(10))
        nn.init.constant_(self.bias, -10)

    def forward(self, ids, patch_tokens):
        """Captions (B, T), patch tokens (B, N, D_enc) -> embedding (B, D_enc), logits (B, T, V)."""
        x = self.wte(ids) + self.text_pos[: ids.shape[1]]  # (B, T, D)
        mask = causal_mask(ids.shape[1], ids.device)
        for block in self.blocks[: self.text_depth]:
            x = block(x, mask=mask)
        rows = torch.arange(len(x), device=x.device)
        end = (ids == EOS).int().argmax(1)  # (B,)
        embedding = self.text_proj(self.norm_text(x[rows, end]))  # (B, D_enc)
        for block in self.blocks[self.text_depth :]:
            x = block(x, mask=mask, context=patch_tokens)
        return embedding, self.lm_head(self.norm(x))
