"""Assignment 4, visual words and RecA: what each blank has to do.

    python -m pytest -q tests/test_assignments_4.py

# B batch, T prefix length, K = T - 1 visual words, N patch tokens, V words, C codes, D width
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laws import assert_close, assert_learns, assert_shape

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, K, V, D, D_ENC = 2, 7, 6, 13, 24, 10
PARADIGMS = ["flow", "ar", "mask", "mar"]


def make_model(paradigm="flow", **changes):
    from small import small

    return small(paradigm, **{"connector_depth": 2, **changes})


def random_words():
    return torch.randn(B, K, V).softmax(-1)


# -------------------------------------------------------- model.Connector.forward


class FakeBlock(nn.Module):
    """x is scaled, and what each token of the context says is added."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(D_ENC, D))

    def forward(self, x, mask=None, context=None, cache=None, layer=0):
        assert context is not None, "each block attends to the patch tokens, as its context"
        assert mask is None, "the queries see each other and all patch tokens: no mask"
        return x * self.scale + (context @ self.weight).tanh().mean(1, keepdim=True)


@pytest.mark.parametrize("tokens", [1, 5, 9])
@torch.no_grad()
def test_queries_read_the_patch_tokens(tokens):
    connector = make_model().connector
    connector.blocks = nn.ModuleList([FakeBlock(2.0), FakeBlock(-0.5)])
    patches = torch.randn(3, tokens, D_ENC) * 2 + 1
    logits = connector(patches)
    assert_shape(logits, (3, K, V), "logits of K words over the vocabulary, for each image")
    tokens = connector.norm_in(patches)
    first, second = (tokens @ block.weight for block in connector.blocks)  # (3, tokens, D)
    state = -connector.queries - first.tanh().mean(1, keepdim=True) / 2
    state = state + second.tanh().mean(1, keepdim=True)
    law = "the learned queries through each block, in order, with norm_in(patches) as context"
    assert_close(logits, connector.word_head(connector.norm(state)), law, 1e-4)


@torch.no_grad()
def test_patch_tokens_are_a_normalised_set():
    connector = make_model().connector
    patches = torch.randn(B, 5, D_ENC) * 3
    logits = connector(patches)
    assert_shape(logits, (B, K, V), "logits of K words over the vocabulary")
    law = "their order carries nothing here"
    assert_close(connector(patches[:, [3, 1, 4, 0, 2]]), logits, law, 1e-3)
    law = "norm_in makes them independent of scale and offset"
    assert_close(connector(7 * patches + 5), logits, law, 1e-2)
    changed = patches.clone()
    changed[:, 4, :5] += 3
    assert (connector(changed) - logits).abs().max() > 1e-3, "each patch token is read"
    one = connector(patches[1:])
    assert_close(logits[1:], one, "images of a batch do not meet", 1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "two images have two answers"


@torch.no_grad()
def test_logits_are_linear_in_the_last_norm_and_in_word_head():
    connector = make_model().connector
    patches = torch.randn(B, 5, D_ENC)
    logits = connector(patches)
    connector.word_head.weight.mul_(2)
    assert_close(connector(patches), 2 * logits, "logits, not probabilities", 1e-4)
    connector.norm.weight.mul_(3)
    assert_close(connector(patches), 6 * logits, "word_head reads the normalised states", 1e-3)


def test_all_of_the_connector_learns():
    connector = make_model().connector
    patches = torch.randn(B, 5, D_ENC, requires_grad=True)
    logits = connector(patches)
    (logits * torch.randn_like(logits)).sum().backward()
    assert_learns(patches, "the patch tokens")
    for name, p in connector.named_parameters():
        assert_learns(p, name)


# -------------------------------------------------------- model.UnifiedModel.visual_prefix


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_one_hot_visual_words_are_a_caption(paradigm):
    model = make_model(paradigm)
    ids = torch.randint(V, (3, T))
    ids[:, 0] = 1
    prefix = model.visual_prefix(F.one_hot(ids[:, 1:], V).float())
    law = "one-hot visual words are the caption <bos> words, without positions"
    assert_close(prefix, model.text_prefix(ids), law)


@pytest.mark.parametrize("paradigm", ["flow", "mask"])
@torch.no_grad()
def test_visual_words_are_expected_embeddings(paradigm):
    model, words = make_model(paradigm), random_words()
    prefix = model.visual_prefix(words)
    assert_shape(prefix, (B, K + 1, D), "<bos> and K words")
    bos = model.wte.weight[1].expand(B, D)
    assert_close(prefix[:, 0], bos, "first <bos>, word 1")
    expected = torch.zeros(B, K, D)
    for v in range(V):
        expected += words[:, :, v, None] * model.wte.weight[v]
    law = "sum over words of p(word) times its embedding; codes are no words"
    assert_close(prefix[:, 1:], expected, law)
    law = "linear in the probabilities: nothing is normalised again"
    assert_close(model.visual_prefix(0.5 * words)[:, 1:], 0.5 * prefix[:, 1:], law)


@torch.no_grad()
def test_visual_prefix_by_hand():
    """The worked example of the text: half a word of (2, 0), half a word of (0, 4)."""
    model = make_model()
    words = torch.zeros(1, K, V)
    words[..., 5] = words[..., 6] = 0.5
    model.wte.weight.zero_()
    model.wte.weight[5, 0], model.wte.weight[6, 1] = 2.0, 4.0
    model.wte.weight[1, 2] = 7.0
    prefix = model.visual_prefix(words)
    law = "<bos>, then half of each word"
    assert_close(prefix[0, :2, :3], torch.tensor([[0.0, 0, 7], [1, 2, 0]]), law)


def test_visual_words_and_embeddings_learn():
    model, words = make_model("mask"), random_words().requires_grad_()
    prefix = model.visual_prefix(words)
    weights = torch.randn_like(prefix)
    (prefix * weights).sum().backward()
    assert_learns(words, "the visual words")
    expected = weights[:, 1:] @ model.wte.weight.detach()[:V].T
    law = "the derivative by p(word) is along the word's embedding"
    assert_close(words.grad, expected, law, 1e-4)
    assert_learns(model.wte.weight, "the word embeddings")
    gradient = model.wte.weight.grad
    expected = torch.einsum("bkv,bkd->vd", words.detach(), weights[:, 1:])
    expected[1] += weights[:, 0].sum(0)  # <bos>
    assert_close(gradient[:V], expected, "the derivative by a word's embedding is p(word)", 1e-4)
    assert not gradient[V:].any(), "codes and [MASK] are no words"


# -------------------------------------------------------- model.UnifiedModel.encode_visual_words


class FakeEncoder(nn.Module):
    """Patch tokens of the first 12 x 12 pixels, and the sizes that it was shown."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(48, D_ENC)
        self.seen = []

    def forward(self, images):
        from paradigms import patchify

        self.seen.append(images)
        tokens = self.proj(patchify(images[..., :12, :12], 4))
        return SimpleNamespace(patch_tokens=tokens, cls_token=None, pooled=tokens.mean(1))


def no_encoder(images):
    raise AssertionError("where features are given, the encoder is not called")


@pytest.mark.parametrize("size", [0, 18])
def test_the_encoder_sees_images_at_its_size(size):
    from model import resize_for_encoder

    model, encoder = make_model(encoder_size=size), FakeEncoder()
    images = torch.rand(3, 3, 12, 12)
    words = model.encode_visual_words(encoder, images)
    assert_shape(words, (3, K, V), "K distributions over the vocabulary for each image")
    assert len(encoder.seen) == 1, "the encoder is called once"
    expected = F.interpolate(images, (18, 18), mode="bilinear", antialias=True) if size else images
    law = f"encoder_size = {size}: resize_for_encoder, 0 is as they are"
    assert_close(encoder.seen[0], expected, law)
    assert_close(words.sum(-1), torch.ones(3, K), "probabilities over the words")
    tokens = encoder(resize_for_encoder(images, size)).patch_tokens
    law = "softmax of the connector's logits of the patch tokens"
    assert_close(words, model.connector(tokens).softmax(-1), law)


@torch.no_grad()
def test_known_features_spare_the_encoder():
    model, encoder = make_model(encoder_size=18), FakeEncoder()
    images = torch.rand(B, 3, 12, 12)
    features = torch.randn(B, 5, D_ENC)
    words = model.encode_visual_words(no_encoder, images, features)
    law = "features are the patch tokens of the images: the encoder is not needed"
    assert_close(words, model.connector(features).softmax(-1), law)
    expected = model.encode_visual_words(encoder, images)
    features = encoder(encoder.seen[0]).patch_tokens
    assert_close(model.encode_visual_words(None, images, features), expected, law)
    half = model.encode_visual_words(no_encoder, images, features.bfloat16())
    assert half.dtype == torch.float32, "features are cast to the dtype of the images"
    assert_close(half, expected, "bfloat16 features change little", 0.1)


@pytest.mark.parametrize("known", [False, True])
def test_visual_words_train_the_connector_never_the_encoder(known):
    model, encoder = make_model(), FakeEncoder()
    images = torch.rand(B, 3, 12, 12)
    features = torch.randn(B, 5, D_ENC) if known else None
    words = model.encode_visual_words(encoder, images, features)
    assert words.requires_grad, "the connector learns through its words: nothing is detached here"
    (words * torch.randn_like(words)).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is None, f"the encoder is frozen: no gradient reaches its {name}"
    for name, p in model.connector.named_parameters():
        assert_learns(p, f"connector.{name}")
    assert torch.is_grad_enabled(), "gradients are on again afterwards"


@torch.no_grad()
def test_a_subclass_may_change_the_visual_words():
    """As the variants of experiments.py do."""
    model = make_model()
    model.visual_words = lambda patch_tokens: patch_tokens.sum((1, 2))
    tokens = torch.randn(B, 5, D_ENC)
    words = model.encode_visual_words(None, torch.rand(B, 3, 12, 12), tokens)
    law = "patch tokens become words by self.visual_words, which a subclass may replace"
    assert_close(words, tokens.sum((1, 2)), law)


# -------------------------------------------------------- recon_loss.recon_loss


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("cond_drop", [0.0, 0.5, 1.0])
def test_recon_is_t2i_with_another_prefix(paradigm, cond_drop):
    """Were the visual words the caption, RecA's loss would be text-to-image's."""
    from recon_loss import recon_loss, t2i_loss
    from small import random_captions

    model, images, ids = make_model(paradigm), torch.rand(4, 3, 12, 12), random_captions(4)
    model.cond_drop = cond_drop
    model.encode_visual_words = lambda *args: F.one_hot(ids[:, 1:], V).float()
    torch.manual_seed(1)
    recon = recon_loss(model, None, images)
    torch.manual_seed(1)
    law = "the loss of the image behind its visual words, with conditions dropped as for captions"
    assert_close(recon, t2i_loss(model, ids, images), f"{paradigm}: {law}")


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_reca_trains_the_transformer_and_not_what_makes_the_condition(paradigm):
    from recon_loss import recon_loss

    model, encoder = make_model(paradigm), FakeEncoder()
    model.cond_drop = 0.0
    recon_loss(model, encoder, torch.rand(B, 3, 12, 12)).backward()
    for name, p in [*encoder.named_parameters(), *model.connector.named_parameters()]:
        assert p.grad is None, f"RecA does not train what makes the condition: {name}"
    if paradigm in ("flow", "mar"):
        gradient = model.wte.weight.grad
        assert gradient is None or not gradient.any(), "the words keep their meaning"
    names = [f"blocks.{n}" for n, _ in model.blocks.named_parameters()]
    for name in [*names, "text_pos", "image_pos", "norm.weight"]:
        assert_learns(model.get_parameter(name), f"{name} ({paradigm})")
    for name, p in model.paradigm.named_parameters():
        if not name.startswith("flow_mlp.t_embed"):
            assert_learns(p, f"paradigm.{name} ({paradigm})")
    assert torch.is_grad_enabled(), "gradients are on again afterwards"


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_prefix_comes_from_recon_prefix(repeats):
    """As the variants of experiments.py need it: they replace model.recon_prefix."""
    from recon_loss import recon_loss

    model, images = make_model(repeats_per_image=repeats), torch.rand(B, 3, 12, 12)
    model.cond_drop = 0.0
    prefix = nn.Parameter(torch.randn(B, T, D))
    asked, seen = [], []

    def recon_prefix(encoder, images, features=None):
        asked.append((encoder, images, features))
        return prefix * 1.0

    def predict_image(prefix, x_t, t):
        seen.append((prefix, x_t, t))
        return x_t * model.text_pos[0, 0]

    model.recon_prefix, model.predict_image = recon_prefix, predict_image
    loss = recon_loss(model, "encoder", images, "features")
    assert_shape(loss, (), "the loss is a scalar")
    assert len(asked) == 1, "model.recon_prefix makes the condition, once"
    assert asked[0][0] == "encoder", "it takes the encoder,"
    assert asked[0][1] is images, "the images,"
    assert asked[0][2] == "features", "and the features"
    assert_close(seen[0][0], prefix, "the model predicts behind that prefix")
    assert len(seen[0][1]) == repeats * B, "each image has repeats_per_image noises (image_loss)"
    loss.backward()
    assert prefix.grad is None, "no gradient reaches the condition"
    assert_learns(model.text_pos, "the model")


@torch.no_grad()
def test_recon_loss_passes_known_features_on():
    from recon_loss import recon_loss

    model, encoder, images = make_model(), FakeEncoder(), torch.rand(B, 3, 12, 12)
    model.cond_drop = 0.0

    def loss_of(encoder, features=None):
        torch.manual_seed(0)
        return recon_loss(model, encoder, images, features)

    expected = loss_of(encoder)
    features = encoder(images).patch_tokens
    law = "features are handed on: the encoder is not called again"
    assert_close(loss_of(no_encoder, features), expected, law)
    other = loss_of(no_encoder, features.flip(0))
    assert (other - expected).abs() > 1e-6, "the condition is that of the features given"
