"""Images to discrete codes and back: the small autoencoder of the paradigms `ar` and `mask`.

# B batch, N codes an image, C codes in all, d channels of the bottleneck
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn


class Conv(nn.Linear):
    """A convolution whose weight is a matrix, (out, in * side * side), so that Muon takes it."""

    def __init__(self, channels: int, out: int, side: int):
        super().__init__(channels * side**2, out)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.unflatten(1, (-1, self.side, self.side))  # (out, in, side, side)
        return F.conv2d(x, kernel, self.bias, padding=self.side // 2)  # (B, out, H, W)


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width, 3)
        self.out_conv = Conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_conv(F.silu(self.conv(F.silu(x))))


class Tokenizer(nn.Module):
    """A convolutional autoencoder with finite scalar quantisation, FSQ (arXiv 2309.15505).

    Each of d channels is bounded and rounded to one of L values; together they are the code of
    stride x stride pixels. Departure: no half-step shift, (tanh z + 1) / 2 bounds even L too.
    """

    def __init__(self, cfg):
        super().__init__()
        d = len(cfg.code_levels)
        width = cfg.code_width
        first = cfg.code_stride // 2
        basis = torch.tensor([1, *cfg.code_levels[:-1]]).cumprod(0)
        self.register_buffer("levels", torch.tensor(cfg.code_levels), persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        self.side = cfg.image_size // cfg.code_stride
        # at 1 / first of the image's side, then at 1 / stride, then the bottleneck of d channels
        down = [nn.PixelUnshuffle(first), Conv(3 * first**2, width, 3), ResBlock(width)]
        down += [nn.PixelUnshuffle(2), Conv(4 * width, width, 1), ResBlock(width), ResBlock(width)]
        down += [Conv(width, d, 1), Rearrange("b d h w -> b (h w) d")]
        self.encoder = nn.Sequential(*down)
        up = [Conv(d, width, 1), ResBlock(width), ResBlock(width)]
        up += [Conv(width, 4 * width, 1), nn.PixelShuffle(2), ResBlock(width)]
        up += [Conv(width, 3 * first**2, 3), nn.PixelShuffle(first)]
        self.decoder = nn.Sequential(*up)

    def quantize(self, z: Tensor) -> Tensor:
        """Any z (..., d) to rounded values in [-1, 1]; straight-through gradient."""
        x = (self.levels - 1) * (z.tanh() + 1) / 2  # [0, L - 1]
        x = x + (x.round() - x).detach()
        return 2 * x / (self.levels - 1) - 1

    def to_codes(self, values: Tensor) -> Tensor:
        """Rounded values (..., d) in [-1, 1] to codes (...) in [0, C)."""
        digits = ((values + 1) / 2 * (self.levels - 1)).round().long()
        return (digits * self.basis).sum(-1)

    def to_values(self, codes: Tensor) -> Tensor:
        """Codes (...) in [0, C) to values (..., d) in [-1, 1]."""
        digits = codes[..., None] // self.basis % self.levels
        return 2 * digits / (self.levels - 1) - 1

    def decode_values(self, values: Tensor) -> Tensor:
        """(B, N, d) to images (B, 3, H, W)."""
        return self.decoder(rearrange(values, "b (h w) d -> b d h w", h=self.side)) / 2 + 0.5

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], through the bottleneck and back."""
        return self.decode_values(self.quantize(self.encoder(images * 2 - 1)))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to codes (B, N)."""
        return self.to_codes(self.quantize(self.encoder(images * 2 - 1)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) to images (B, 3, H, W) in [0, 1]."""
        return self.decode_values(self.to_values(codes)).clamp(0, 1)
