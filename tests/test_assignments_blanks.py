"""Laws of the blanks of assignments/, where other tests would let a plausible mistake pass.

Each test imports what it needs: it starts sooner, and a file that cannot be imported fails its own
tests alone.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

B, T, N, V, D = 2, 7, 9, 13, 24


def assert_close(actual, expected, law, atol=1e-5):
    """law: what the student is told when they differ."""
    torch.testing.assert_close(
        actual, expected, atol=atol, rtol=1e-4, msg=lambda details: f"{law}\n{details}"
    )


# ---------------------------------------------------------------- 1: the encoder


def small_encoder(**changes):
    """An encoder without blocks, all weights random."""
    from encoder import ViT, ViTConfig

    torch.manual_seed(0)
    sizes = {"image_size": 12, "patch_size": 4, "width": 20, "depth": 0, "heads": 5, "mlp_width": 8}
    encoder = ViT(ViTConfig(**{**sizes, **changes}))
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.5)
    return encoder


@torch.no_grad()
def test_encoder_attention_is_torchs():
    from encoder import Attention

    torch.manual_seed(0)
    attention, x = Attention(20, 5, True), torch.randn(2, 7, 20)
    reference = nn.MultiheadAttention(20, 5, batch_first=True)
    reference.in_proj_weight.copy_(attention.qkv.weight)
    reference.in_proj_bias.copy_(attention.qkv.bias)
    reference.out_proj.load_state_dict(attention.proj.state_dict())
    law = (
        "softmax(q k / sqrt(D / H)) v by head, every token attends to every token, "
        "then the output projection"
    )
    assert_close(attention(x), reference(x, x, x)[0], law)


@torch.no_grad()
def test_without_blocks_the_encoder_is_its_patch_embedding():
    encoder, images = small_encoder(registers=2), torch.rand(2, 3, 12, 8)
    encoder.norm = nn.Identity()
    grids = []

    def position_embeddings(rows, cols):
        grids.append((rows, cols))
        return torch.arange(rows * cols).float()[:, None].expand(-1, 20)

    encoder.position_embeddings = position_embeddings
    features = encoder(images)
    assert grids == [(3, 2)], "the grid is rows x columns, and positions are asked for once"
    # a patch embedding is a convolution whose stride is its size
    kernel = encoder.patch_embed.weight.view(20, 3, 4, 4)
    normalised = (images - encoder.mean) / encoder.std
    x = F.conv2d(normalised, kernel, encoder.patch_embed.bias, stride=4)
    x = x.flatten(2).transpose(1, 2)
    law = "normalised pixels through patch_embed, row by row, plus their positions"
    assert_close(features.patch_tokens, x + torch.arange(6.0)[:, None], law)
    law = "the class token comes first, then the registers, then the patches"
    assert_close(features.cls_token, encoder.prefix_tokens[0].expand(2, -1), law)


def test_positions_resize_as_the_publisher_does():
    encoder = small_encoder(pos_resize="antialias", image_size=16)
    grid = encoder.pos_embed.detach().view(4, 4, 20).permute(2, 0, 1)[None]
    resized = F.interpolate(grid, (2, 3), mode="bicubic", antialias=True)
    law = "4 x 4 positions resized to 2 rows and 3 columns"
    assert_close(encoder.position_embeddings(2, 3), resized[0].flatten(1).T, law)
    native = encoder.position_embeddings(4, 4)
    assert native is encoder.pos_embed, "on the native grid they are the parameters themselves"
    encoder.position_embeddings(2, 3).sum().backward()
    assert encoder.pos_embed.grad is not None, "resized positions learn too"


def test_rename_keys_is_one_to_one():
    from pretrained import rename_keys

    one, two = torch.ones(1), torch.ones(2)
    tensors = {
        "vision_model.encoder.layers.1.self_attn.q_proj.weight": one,
        "visual_projection.weight": two,
        "text_model.a.weight": one,
        "logit_scale": one,
        "vision_model.unheard.of": two,
        "vision_model.embeddings.class_embedding": one,
    }
    renamed = rename_keys(tensors)
    expected = ["blocks.1.attn.q.weight", "cls_token", "proj.weight", "unheard.of"]
    assert sorted(renamed) == expected, "an unknown name stays, so that loading can refuse it"
    assert renamed["proj.weight"] is two
    with pytest.raises(ValueError, match="are one"):
        rename_keys({"cls_token": one, "class_token": two})


# ---------------------------------------------------------------- 2: the transformer


@torch.no_grad()
def test_attention_is_torchs_multi_head_attention():
    from model import Attention

    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 5, 12)
    reference = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    qkv = torch.cat([attention.q_proj.weight, attention.kv_proj.weight])
    reference.in_proj_weight.copy_(qkv)
    reference.out_proj.weight.copy_(attention.out_proj.weight)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = reference(x, x, x, attn_mask=~mask)[0]
    law = "softmax(q k / sqrt(D / H)) v by head, True in the mask where a row attends to a column"
    assert_close(attention(x, mask=mask), expected, law)
    assert not torch.allclose(attention(x), expected), "without a mask all attend to all"


@torch.no_grad()
def test_cross_attention_reads_its_context():
    from model import Attention

    torch.manual_seed(0)
    attention = Attention(12, 3, 8)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 4, 8)
    k, v = attention.kv_proj(context).chunk(2, -1)

    def by_head(y):
        return y.view(2, -1, 3, 4).transpose(1, 2)

    out = F.scaled_dot_product_attention(by_head(attention.q_proj(x)), by_head(k), by_head(v))
    expected = attention.out_proj(out.transpose(1, 2).reshape(2, 5, 12))
    law = "queries from x, keys and values from the context"
    assert_close(attention(x, context=context), expected, law)


@pytest.mark.parametrize("causal", [False, True])
def test_prefix_mask_row_by_row(causal):
    from model import prefix_mask

    mask = prefix_mask(3, 4, 2, causal, "cpu")
    assert mask.shape == (11, 11)
    assert mask.dtype == torch.bool
    for i in range(11):
        for j in range(11):
            if i < 3 or j < 3:
                allowed = j <= i
            else:
                same_repeat = (i - 3) // 4 == (j - 3) // 4
                allowed = same_repeat and (not causal or j <= i)
            verb = "has to" if allowed else "must not"
            where = "3 words, then 2 repeats of 4 image positions"
            assert mask[i, j] == allowed, f"position {i} {verb} attend to position {j} ({where})"


@torch.no_grad()
def test_image_positions_are_added_once():
    from small import small

    model = small(connector_depth=2)
    prefix, image = torch.randn(B, T, D), torch.randn(B, N, D)
    inputs = []

    def transformer(x, mask=None, cache=None):
        inputs.append(x)
        return x

    model.transformer = transformer
    model.paradigm.embed = lambda model, x: x
    model.paradigm.head = lambda model, h: h
    law = "image positions are what they hold plus their position embeddings, once"
    expected = image + model.image_position_embedding()
    assert_close(model.predict_image(prefix, image), expected, law)
    law = "the prefix stands at the first text positions"
    assert_close(inputs[0][:, :T], prefix + model.text_pos[:T], law)


@torch.no_grad()
def test_text_logits_start_at_the_last_word_of_the_prefix():
    from model import causal_mask
    from small import small

    model = small(connector_depth=2)
    prefix, ids = torch.randn(B, T, D), torch.randint(V, (B, 3))
    logits = model.text_logits(prefix, ids)
    law = "one row of logits for each word and one for the next: (B, S + 1, V)"
    assert logits.shape == (B, 4, V), f"{law}, not {tuple(logits.shape)}"
    first = model.text_logits(prefix)
    assert_close(logits[:, :1], first, "the first row is what follows the prefix alone")
    x = torch.cat([prefix, model.wte(ids)], 1) + model.text_pos[: T + 3]
    h = model.transformer(x, causal_mask(T + 3, "cpu"))
    law = "states of the last of the prefix and of each word, through lm_head"
    assert_close(logits, model.lm_head(h)[:, -4:], law)


# ---------------------------------------------------------------- 3: flow


def test_velocity_squared_error_by_hand():
    from paradigms import MIN_ONE_MINUS_T, velocity_squared_error

    x, x_pred = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 0.3)
    error = velocity_squared_error(x_pred, x, torch.full((1, 1, 1), 0.5))
    law = "(0.3 / (1 - 0.5))^2, element by element"
    assert_close(error, torch.full((1, 2, 3), 0.36), law)
    error = velocity_squared_error(x_pred, x, torch.full((1, 1, 1), 0.97))
    expected = torch.full((1, 2, 3), 0.09 / MIN_ONE_MINUS_T**2)
    assert_close(error, expected, "1 - t is at least MIN_ONE_MINUS_T")


def test_flow_loss_shows_the_model_noised_patches_alone(monkeypatch):
    from paradigms import patchify
    from small import small

    model, images = small(noise_scale=3.0), torch.rand(B, 3, 12, 12)
    x = patchify(images, 4)
    noised, predicted = [], []

    def add_noise(x, t, noise_scale):
        noised.append((x, t, noise_scale))
        return x + 7, torch.full((B, 1, 1), 0.25)

    def predict_image(*inputs):
        predicted.append(inputs)
        return x + 0.3

    monkeypatch.setattr("paradigms.add_noise", add_noise)
    model.predict_image = predict_image
    loss = model.paradigm.loss(model, "prefix", images)
    law = "the mean over patches and pixels of the velocity's squared error"
    assert loss.ndim == 0, law
    assert loss.item() == pytest.approx(0.16, rel=1e-4), law
    clean, times, noise_scale = noised[0]
    assert_close(clean, x, "the clean image as patches in [-1, 1]")
    assert times.shape == (B, 1, 1), "one time for all patches of an image"
    assert noise_scale == 3.0, "the model's own noise scale"
    prefix, x_t, t = predicted[0]
    assert prefix == "prefix"
    assert torch.equal(x_t, x + 7), "the model sees x_t, never the image"
    assert torch.equal(t, torch.full((B,), 0.25)), "the model is told t (B,)"


def test_guidance_goes_from_none_to_the_condition_and_beyond():
    from paradigms import cfg_predict

    cond, uncond = torch.randn(B, 5), torch.randn(B, 5)
    inputs = torch.arange(B)[:, None]
    calls = []

    def predict(x):
        calls.append(x)
        return torch.cat([cond, uncond]) if len(x) == 2 * B else cond

    for scale in (0.0, 1.0, 2.5):
        law = f"s = {scale}: uncond + s (cond - uncond); the condition's half comes first"
        assert_close(cfg_predict(predict, scale, inputs), uncond + scale * (cond - uncond), law)
    assert torch.equal(calls[-1], torch.cat([inputs, inputs])), "both halves hold the same inputs"
    assert len(calls) == 3, "one pass each"
    assert len(calls[1]) == B, "guidance of 1 costs no second half"


# ---------------------------------------------------------------- 4: visual words and RecA


@torch.no_grad()
def test_connector_reads_its_patches():
    from small import small

    connector = small(connector_depth=2).connector
    patches = torch.randn(B, 5, 10) * 3
    calls = []

    def record(block, args, kwargs, out):
        calls.append((args[0], kwargs.get("context")))

    for block in connector.blocks:
        block.register_forward_hook(record, with_kwargs=True)
    logits = connector(patches)
    law = "logits of K words each: (B, K, V)"
    assert logits.shape == (B, T - 1, V), f"{law}, not {tuple(logits.shape)}"
    assert len(calls) == 2, "every block once"
    queries = connector.queries.expand(B, -1, -1)
    assert_close(calls[0][0], queries, "the first block reads the learned queries")
    for _, context in calls:
        law = "every block attends to the normalised patch tokens"
        assert_close(context, connector.norm_in(patches), law)
    law = "patch tokens are a set: their order carries nothing here"
    assert_close(connector(patches[:, [3, 1, 4, 0, 2]]), logits, law, 1e-4)
    assert (connector(patches**3) - logits).abs().max() > 1e-3, "it depends on the patch tokens"
    assert (logits.sum(-1) - 1).abs().max() > 0.1, "logits, not probabilities"
    x = queries
    for block in connector.blocks:
        x = block(x, context=connector.norm_in(patches))
    law = "the last states, normalised, through word_head"
    assert_close(logits, connector.word_head(connector.norm(x)), law)


@torch.no_grad()
def test_visual_words_are_expected_embeddings():
    from small import small

    model = small("mask", code_levels=(3, 2), connector_depth=2)
    words = torch.rand(B, T - 1, V).softmax(-1)
    prefix = model.visual_prefix(words)
    law = "<bos> and K words: (B, K + 1, D)"
    assert prefix.shape == (B, T, D), f"{law}, not {tuple(prefix.shape)}"
    bos = model.wte.weight[1].expand(B, -1)
    assert_close(prefix[:, 0], bos, "<bos> is word 1, without any position")
    expected = sum(words[..., v, None] * model.wte.weight[v] for v in range(V))
    law = "sum over words of p(word) times its embedding; codes are no words"
    assert_close(prefix[:, 1:], expected, law)


def test_visual_words_train_the_connector_never_the_encoder():
    from paradigms import patchify
    from small import small

    model = small(encoder_size=18, connector_depth=2)
    proj, sizes = nn.Linear(48, 10), []

    def encoder(images):
        sizes.append(tuple(images.shape[2:]))
        return SimpleNamespace(patch_tokens=proj(patchify(images[..., :12, :12], 4)), pooled=None)

    words = model.encode_visual_words(encoder, torch.rand(B, 3, 12, 12))
    assert sizes == [(18, 18)], "the encoder sees the images at its own size (resize_for_encoder)"
    assert words.shape == (B, T - 1, V)
    assert_close(words.sum(-1), torch.ones(B, T - 1), "probabilities over the words")
    words.square().sum().backward()
    assert proj.weight.grad is None, "the encoder is frozen: no gradient reaches it"
    law = "the connector learns through its visual words where it is not frozen"
    assert model.connector.queries.grad.abs().sum() > 0, law
