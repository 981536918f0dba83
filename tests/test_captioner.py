"""The text decoder that trains an encoder from scratch: what each of its two outputs reads.

# B batch, T caption length, N patch tokens, V words, D_enc width of the encoder
"""

import pytest
import torch
from torch import nn

from captioner import TextDecoder

B, T, N, V, D_ENC = 2, 7, 5, 11, 10
IDS = torch.tensor([[1, 5, 6, 2, 0, 0, 0], [1, 4, 7, 8, 9, 2, 0]])  # <bos> words <eos> <pad>


def make_decoder() -> TextDecoder:
    return TextDecoder(V, T, 24, D_ENC, text_depth=1, cross_depth=1, heads=3)


@pytest.fixture
def decoder():
    """Every weight random: heads that start small would hide what flows through."""
    torch.manual_seed(0)
    decoder = make_decoder()
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.3)
    return decoder


@pytest.fixture
def patches():
    return torch.randn(B, N, D_ENC, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_scale_and_bias_start_as_in_siglip():
    decoder = make_decoder()
    assert decoder.log_scale.exp().item() == pytest.approx(10)
    assert decoder.bias.item() == -10


def test_shapes(decoder, patches):
    text, logits = decoder(IDS, patches)
    assert text.shape == (B, D_ENC)
    assert logits.shape == (B, T, V)


def test_the_text_embedding_is_of_the_text_alone(decoder, patches):
    text, _ = decoder(IDS, patches)
    (gradient,) = torch.autograd.grad(text.sum(), patches, allow_unused=True)
    assert gradient is None


def test_every_word_is_predicted_from_all_patches(decoder, patches):
    _, logits = decoder(IDS, patches)
    (gradient,) = torch.autograd.grad(logits[0, 0].sum(), patches)
    assert gradient[0].abs().sum(-1).all()


def test_no_word_attends_to_a_later_one(decoder, patches):
    _, logits = decoder(IDS, patches)
    other = IDS.clone()
    other[0, 2] = 3
    other[0, 4:] = 3
    _, changed = decoder(other, patches)
    assert torch.equal(changed[0, :2], logits[0, :2])


def test_the_text_embedding_reads_the_words_up_to_eos(decoder, patches):
    text, _ = decoder(IDS, patches)
    other = IDS.clone()
    other[0, 4:] = 3  # after <eos>
    assert torch.equal(decoder(other, patches)[0], text)
    other[0, 2] = 3
    changed, _ = decoder(other, patches)
    assert (changed - text)[0].abs().max() > 1e-4
    assert torch.equal(changed[1], text[1])
