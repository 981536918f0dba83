"""Assignment 1, the encoder: what each blank has to do.

    python -m pytest -q tests/test_assignments_1.py

# B batch, T tokens, D width, H heads
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from laws import assert_close, assert_gradients_agree, assert_learns, random_weights

FIXTURES = Path(__file__).parent / "fixtures" / "encoder"


# -------------------------------------------------------- encoder.Attention.forward


def attention_and_torchs(width, heads, bias=True):
    """Our attention and nn.MultiheadAttention with the same weights, in float64."""
    from encoder import Attention

    attention = Attention(width, heads, bias).double()
    random_weights(attention)
    reference = nn.MultiheadAttention(width, heads, bias=True, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias if bias else torch.zeros(3 * width))
    reference.out_proj.load_state_dict(attention.proj.state_dict())
    return attention, reference


@pytest.mark.parametrize("width, heads", [(20, 5), (12, 1), (6, 6)])
@pytest.mark.parametrize("T", [1, 7])
@torch.no_grad()
def test_encoder_attention_is_torchs(width, heads, T):
    attention, reference = attention_and_torchs(width, heads)
    x = torch.randn(2, T, width, dtype=torch.float64)
    law = "softmax(q k^T / sqrt(D / H)) v in each head, all tokens to all, then the projection"
    assert_close(attention(x), reference(x, x, x)[0], law, 1e-8)
    attention, reference = attention_and_torchs(width, heads, bias=False)
    law = "the same without a bias for q, k and v"
    assert_close(attention(x), reference(x, x, x)[0], law, 1e-8)


@torch.no_grad()
def test_encoder_attention_by_hand():
    """The worked example of the text: two tokens of width 1."""
    from encoder import Attention

    attention = Attention(1, 1, False)
    attention.qkv.weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
    attention.proj.weight.fill_(1.0)
    attention.proj.bias.zero_()
    out = attention(torch.tensor([[[1.0], [0.0]]]))
    assert_close(out[0, :, 0], torch.tensor([2.64239, 1.5]), "x = 1, 0: q = x, k = 2x, v = 3x")


def test_encoder_attention_learns():
    attention, reference = attention_and_torchs(20, 5)
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(2, 7, 20, dtype=torch.float64)
    (attention(ours) * weights).sum().backward()
    (reference(theirs, theirs, theirs)[0] * weights).sum().backward()
    actual = {"x": ours, "qkv.weight": attention.qkv.weight, "qkv.bias": attention.qkv.bias}
    actual["proj.weight"] = attention.proj.weight
    expected = {"x": theirs, "qkv.weight": reference.in_proj_weight}
    expected |= {"qkv.bias": reference.in_proj_bias, "proj.weight": reference.out_proj.weight}
    assert_gradients_agree(actual, expected, "as of torch's attention")


# -------------------------------------------------------- encoder.ViT.forward


class Affine(nn.Module):
    """Stands in for a norm, a block or a pool: a map whose use can be read off the result."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x):
        return x * self.scale + self.shift


class SumOfTokens(nn.Module):
    def forward(self, x):
        return x.sum(1)


class AddsFirstToken(nn.Module):
    """A block in which tokens meet."""

    def forward(self, x):
        return x + x[:, :1]


def make_encoder(**changes):
    from encoder import ViT, ViTConfig

    sizes = {"image_size": 12, "patch_size": 4, "width": 20, "depth": 2, "heads": 5, "mlp_width": 8}
    encoder = ViT(ViTConfig(**{**sizes, **changes}))
    random_weights(encoder)
    return encoder


def readable_encoder(**changes):
    """An encoder whose norms and blocks are simple maps; positions count the patches."""
    encoder = make_encoder(depth=0, **changes)
    encoder.norm_pre = Affine(2.0, 0.5)
    encoder.blocks = nn.ModuleList([AddsFirstToken(), Affine(3.0, -1.0)])
    encoder.norm = Affine(0.5, 0.25)
    encoder.fc_norm = Affine(1.5, -2.0)

    def position_embeddings(rows, cols):
        column_of_places = torch.arange(rows * cols).float()[:, None] + 100 * rows
        return column_of_places.expand(-1, 20)

    encoder.position_embeddings = position_embeddings
    return encoder


def first_tokens(encoder, images):
    """Tokens before the first norm: a patch embedding is a convolution with its size as stride."""
    p = encoder.cfg.patch_size
    conv = nn.Conv2d(3, 20, p, stride=p)
    with torch.no_grad():
        conv.weight.copy_(encoder.patch_embed.weight.view(20, 3, p, p))
        conv.bias.copy_(encoder.patch_embed.bias)
    grid = conv((images - encoder.mean) / encoder.std)  # (B, D, rows, columns)
    places = encoder.position_embeddings(*grid.shape[2:])
    patches = grid.flatten(2).mT + places
    return torch.cat([encoder.prefix_tokens.repeat(len(images), 1, 1), patches], 1)


POOLS = [("cls", True, 0), ("cls", True, 2), ("mean", False, 2), ("mean", True, 0)]
POOLS += [("attention", False, 0), ("attention", True, 2), ("none", True, 1), ("none", False, 0)]


@pytest.mark.parametrize("pool, cls_token, registers", POOLS)
@pytest.mark.parametrize("size", [(12, 12), (12, 8), (4, 16)])
@torch.no_grad()
def test_each_output_of_the_encoder(pool, cls_token, registers, size):
    encoder = readable_encoder(pool=pool, cls_token=cls_token, registers=registers, out_width=6)
    encoder.pool = SumOfTokens() if pool == "attention" else None
    images = torch.rand(3, 3, *size)
    features = encoder(images)

    # norm_pre: 2 x + 0.5; blocks: x + its first token, then 3 x - 1; norm: x / 2 + 0.25
    before = first_tokens(encoder, images) * 2 + 0.5
    after = ((before + before[:, :1]) * 3 - 1) / 2 + 0.25
    prefix = cls_token + registers
    law = "normalised pixels, patch_embed, positions, norm_pre, each block once, norm"
    assert_close(features.patch_tokens, after[:, prefix:], f"patch_tokens: {law}", 1e-3)

    if cls_token:
        assert_close(features.cls_token, after[:, 0], f"cls_token, the first token: {law}", 1e-3)
    else:
        assert features.cls_token is None, "cls_token is None where the model has none"

    if pool == "none":
        assert features.pooled is None, "pool 'none': pooled is None"
        return
    pooled = {
        "cls": after[:, 0],
        "mean": after[:, prefix:].mean(1),
        "attention": after.sum(1),
    }[pool]
    expected = (pooled * 1.5 - 2) @ encoder.proj.weight.T
    law = "cls: the class token; mean: of the patches alone; attention: self.pool of all tokens"
    assert_close(features.pooled, expected, f"pooled, then fc_norm and proj; {law}", 2e-2)


OUTPUTS = [("patch_tokens", "none"), ("cls_token", "none")]
OUTPUTS += [("pooled", "cls"), ("pooled", "mean"), ("pooled", "attention")]


@pytest.mark.parametrize("output, pool", OUTPUTS)
def test_each_output_of_the_encoder_learns(output, pool):
    encoder = make_encoder(pool=pool, registers=1, norm_pre=True, out_width=6)
    images = torch.rand(2, 3, 12, 12, requires_grad=True)
    out = getattr(encoder(images), output)
    (out * torch.randn_like(out)).sum().backward()
    assert images.grad is not None and images.grad.any(), f"images get a gradient from {output}"
    for name, p in encoder.named_parameters():
        if name != "proj.weight" or output == "pooled":
            assert_learns(p, f"{name} from {output}")


@torch.no_grad()
def test_a_native_size_that_the_patch_does_not_divide():
    """SigLIP So400m/14 at 384: rows * p and columns * p pixels are used, the last are dropped."""
    encoder = make_encoder(image_size=14)
    images = torch.rand(2, 3, 14, 14)
    law = "the pixels beyond the last whole patch are dropped"
    cropped = encoder(images[..., :12, :12]).patch_tokens
    assert_close(encoder(images).patch_tokens, cropped, law)


@torch.no_grad()
def test_images_are_cast_to_the_weights():
    encoder = make_encoder(cls_token=True).to(torch.bfloat16)
    features = encoder(torch.rand(2, 3, 12, 12))
    for name, tensor in features._asdict().items():
        law = f"{name}: normalised pixels are cast to the dtype of pos_embed"
        assert tensor is not None and tensor.dtype == torch.bfloat16, law


WRONG_IMAGES = {
    "up to 255": (torch.rand(1, 3, 12, 12) * 255, AssertionError),
    "below 0": (torch.rand(1, 3, 12, 12) - 0.5, AssertionError),
    "no batch": (torch.rand(3, 12, 12), AssertionError),
    "channels last": (torch.rand(1, 12, 12, 3), AssertionError),
    "bytes": (torch.zeros(1, 3, 12, 12, dtype=torch.uint8), AssertionError),
    "a size between two grids": (torch.rand(1, 3, 14, 12), ValueError),
}


@pytest.mark.parametrize("what", WRONG_IMAGES)
def test_images_are_checked_first(what):
    images, error = WRONG_IMAGES[what]
    with pytest.raises(error, match="image"):  # self.patch_grid(images) raises it
        make_encoder()(images)


@pytest.mark.parametrize("folder", sorted(p.name for p in FIXTURES.iterdir()))
@torch.no_grad()
def test_features_are_those_of_the_real_library(folder):
    """Needs all four blanks: weights are renamed and loaded, positions resized."""
    from pretrained import load_encoder

    encoder = load_encoder(FIXTURES / folder)
    for name, expected in torch.load(FIXTURES / folder / "expected.bin", weights_only=True).items():
        features = encoder(expected["images"] / 255)
        for output in ("patch_tokens", "pooled"):
            law = f"{output} of {folder}, {name}, as its own library computes them"
            assert_close(getattr(features, output), expected[output], law, 2e-4)


# -------------------------------------------------------- encoder.ViT.position_embeddings

# A 4 x 4 grid of positions of width 1, and what each way of resizing makes of it (torch 2.15).
NATIVE = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, -6.0, 5.0, 3.0, -5.0, 8.0, 9.0, -7.0, 9.0, 3.0]
RESIZED = """
bicubic       2 3  -0.99 5.42 -2.76 6.36 -2.11 6.10
bicubic       2 8  -2.62 -0.43 3.19 5.31 4.88 1.87 -2.15 -4.60
                   9.04 5.42 -0.60 -2.98 -0.49 2.99 5.71 7.39
bicubic       4 2  0.53 2.97 2.66 -2.66 4.75 0.75 -0.50 7.50
antialias     2 3  0.71 3.34 -0.78 3.97 0.29 3.86
antialias     2 8  -1.09 0.34 3.36 4.21 2.67 0.93 -0.88 -1.73
                   6.28 4.43 0.52 -0.69 1.07 2.63 3.90 4.50
antialias     4 2  1.36 2.06 2.30 -0.57 2.77 1.55 1.88 4.33
align_corners 2 3  3.00 1.41 1.00 9.00 0.06 3.00
align_corners 2 8  3.00 0.93 -0.91 0.01 2.83 4.03 2.65 1.00
                   9.00 1.02 -6.32 -4.27 4.73 9.53 6.78 3.00
align_corners 4 2  3.00 1.00 -5.00 -6.00 5.00 8.00 9.00 3.00
offset        2 3  -0.75 4.97 -1.55 6.42 -2.64 5.62
offset        2 8  -1.98 -0.24 2.69 4.67 4.75 2.32 -1.44 -3.98
                   8.37 5.61 0.99 -2.20 -2.34 0.70 5.47 8.70
offset        4 2  0.78 3.58 1.73 -1.36 4.81 -1.88 0.82 8.02
"""


def resized_positions():
    """Rows of RESIZED as (how, rows, columns, values)."""
    rows = RESIZED.strip().replace("\n    ", " ").splitlines()
    for how, height, width, *values in map(str.split, rows):
        yield how, int(height), int(width), [float(value) for value in values]


def encoder_of_positions(how):
    """4 x 4 positions of width 2: the second channel is 10 minus twice the first."""
    from encoder import ViT, ViTConfig

    sizes = {"image_size": 16, "patch_size": 4, "width": 2, "heads": 1, "depth": 0, "mlp_width": 4}
    encoder = ViT(ViTConfig(pos_resize=how, **sizes))
    first = torch.tensor(NATIVE)
    with torch.no_grad():
        encoder.pos_embed.copy_(torch.stack([first, 10 - 2 * first], 1))
    return encoder


@pytest.mark.parametrize("how, rows, cols, values", list(resized_positions()))
@torch.no_grad()
def test_positions_resize_as_the_publisher_does(how, rows, cols, values):
    first = torch.tensor(values)
    resized = encoder_of_positions(how).position_embeddings(rows, cols)
    law = f"4 x 4 positions resized to {rows} rows and {cols} columns, {how}, row by row"
    assert_close(resized, torch.stack([first, 10 - 2 * first], 1), law, 0.02)


HOW = ["bicubic", "antialias", "align_corners", "offset"]


@pytest.mark.parametrize("how", HOW)
def test_native_positions_are_as_trained(how):
    encoder = encoder_of_positions(how)
    native = encoder.position_embeddings(4, 4)
    assert_close(native, encoder.pos_embed, "on the native grid positions stay as they are", 0)
    native.sum().backward()
    assert_learns(encoder.pos_embed, "pos_embed on the native grid")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rows, cols", [(2, 3), (2, 8), (5, 6)])
def test_resized_positions_learn(how, rows, cols):
    encoder = encoder_of_positions(how)
    encoder.position_embeddings(rows, cols).sum().backward()
    assert_learns(encoder.pos_embed, "pos_embed on another grid")
    law = "the weights of each resized position sum to 1, so its gradients do"
    total = torch.full((2,), float(rows * cols))
    assert_close(encoder.pos_embed.grad.sum(0), total, law, 1e-3)


@pytest.mark.parametrize("how", HOW)
def test_resized_positions_keep_their_dtype(how):
    encoder = encoder_of_positions(how).to(torch.bfloat16)
    resized = encoder.position_embeddings(3, 2)
    assert resized.dtype == torch.bfloat16, "computed in float32, returned in pos_embed's dtype"
    law = "computed in float32, rounded once at the end"
    expected = encoder.float().position_embeddings(3, 2).to(torch.bfloat16)
    assert_close(resized, expected, law, 1e-3)


# -------------------------------------------------------- pretrained.rename_keys


def test_each_tensor_gets_our_name():
    from pretrained import rename_keys

    names = {
        "vision_model.encoder.layers.1.self_attn.q_proj.weight": "blocks.1.attn.q.weight",
        "vision_model.encoder.layers.11.layer_norm2.bias": "blocks.11.norm2.bias",
        "vision_model.embeddings.class_embedding": "cls_token",
        "visual_projection.weight": "proj.weight",
        "visual.transformer.resblocks.0.ln_1.weight": "blocks.0.norm1.weight",
        "visual.positional_embedding": "positions",
        "blocks.3.ls1.gamma": "blocks.3.attn.proj.scale",
    }
    tensors = {source: torch.full((2,), float(i)) for i, source in enumerate(names)}
    before = dict(tensors)
    renamed = rename_keys(tensors)
    assert isinstance(renamed, dict), "rename_keys returns {our name: tensor}"
    assert sorted(renamed) == sorted(names.values()), "names are those of target_name"
    for source, target in names.items():
        assert torch.equal(renamed[target], tensors[source]), f"{source} has to become {target}"
        assert renamed[target].dtype == tensors[source].dtype, "tensors stay as they are"
    assert tensors == before, "the argument stays as it was"


def test_what_is_not_of_the_encoder_is_left_out_by_name():
    from pretrained import rename_keys

    one = torch.ones(1)
    left_out = ["text_model.a.weight", "logit_scale", "positional_embedding", "head.weight"]
    left_out += ["visual.mask_token", "transformer.resblocks.0.ln_1.weight"]
    for source in left_out:
        assert rename_keys({source: one}) == {}, f"LEFT_OUT matches {source}"
    kept = {"vision_model.unheard.of": "unheard.of", "vision_model.text.a": "text.a"}
    kept |= {"lm_head.weight": "lm_head.weight"}
    for source, target in kept.items():
        message = f"{source} is unknown: it stays, as {target}, so that loading can refuse it"
        assert list(rename_keys({source: one})) == [target], message
    assert rename_keys({}) == {}, "no tensors: an empty dictionary"


CLASHES = [("cls_token", "class_token"), ("vision_model.layernorm.weight", "norm.weight")]
CLASHES += [("vision_model.unheard.of", "unheard.of")]


@pytest.mark.parametrize("first, second", CLASHES)
def test_two_tensors_of_one_name_are_an_error(first, second):
    from pretrained import rename_keys

    a, b = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError) as error:
        rename_keys({first: a, "patch_embed.proj.weight": a, second: b})
    said = str(error.value)
    sentence = f"{second} and {first} are one tensor of the encoder"
    assert first in said and second in said, f"the error names both: {sentence!r}, not {said!r}"
    assert "are one tensor" in said, f"the error reads {sentence!r}, not {said!r}"
    same = {first: a, second: a}
    with pytest.raises(ValueError):  # also where the two are equal
        rename_keys(same)
