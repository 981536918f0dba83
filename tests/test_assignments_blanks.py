"""Laws that the blanks of assignments/ have to obey, where the other tests would let a plausible mistake pass."""
import importlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

B, T, N, V = 2, 7, 9, 13


@pytest.fixture
def E():  # each file is imported by the tests that need it: they start sooner, and a file that cannot be imported fails its own tests alone
    return importlib.import_module("encoder")


@pytest.fixture
def M():
    return importlib.import_module("model")


@pytest.fixture
def R():
    return importlib.import_module("recon_loss")


@pytest.fixture
def S():
    return importlib.import_module("sample")


def small(M, **changes):
    """All weights random, all sizes different."""
    torch.manual_seed(0)
    cfg = dict(vocab_size=V, text_len=T, image_size=12, patch_size=4, width=24, depth=2, heads=3, encoder_width=10, connector_depth=2)
    model = M.UnifiedModel(M.ModelConfig(**{**cfg, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def close(a, b, what, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda said: f"{what}\n{said}")


# -- 1: the encoder


def vit(E, **changes):
    torch.manual_seed(0)
    cfg = dict(image_size=12, patch_size=4, width=20, depth=0, heads=5, mlp_width=8)
    encoder = E.ViT(E.ViTConfig(**{**cfg, **changes}))
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return encoder


@torch.no_grad()
def test_encoder_attention_is_torchs(E):
    torch.manual_seed(0)
    ours, x = E.Attention(20, 5, True), torch.randn(2, 7, 20)
    theirs = torch.nn.MultiheadAttention(20, 5, batch_first=True)
    theirs.in_proj_weight.copy_(ours.qkv.weight), theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    close(ours(x), theirs(x, x, x)[0], "softmax(q k / sqrt(D / H)) v by head, every token sees every token, then the output projection")


@torch.no_grad()
def test_without_blocks_the_encoder_is_its_patch_embedding(E):
    encoder, images = vit(E, registers=2), torch.rand(2, 3, 12, 8)
    tokens = []
    encoder.norm = torch.nn.Identity()
    encoder.position_embeddings = lambda rows, cols: tokens.append((rows, cols)) or torch.arange(rows * cols).float()[:, None].expand(-1, 20)
    features = encoder(images)
    weight = encoder.patch_embed.weight.view(20, 3, 4, 4)  # a patch embedding is a convolution whose stride is its size
    x = F.conv2d((images - encoder.mean) / encoder.std, weight, encoder.patch_embed.bias, stride=4).flatten(2).transpose(1, 2)
    assert tokens == [(3, 2)], "the grid is rows x columns, and positions are asked for once"
    close(features.patch_tokens, x + torch.arange(6.0)[:, None], "normalised pixels through patch_embed, row by row, plus their positions")
    close(features.cls_token, encoder.prefix_tokens[0].expand(2, -1), "the class token comes first, then the registers, then the patches")


def test_positions_resize_as_the_publisher_does(E):
    encoder = vit(E, pos_resize="antialias", image_size=16)
    grid = encoder.pos_embed.detach().view(4, 4, 20).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (2, 3), mode="bicubic", antialias=True)[0].flatten(1).T
    close(encoder.position_embeddings(2, 3), expected, "4 x 4 positions resized to 2 rows and 3 columns")
    assert encoder.position_embeddings(4, 4) is encoder.pos_embed, "on the native grid they are the parameters themselves"
    encoder.position_embeddings(2, 3).sum().backward()
    assert encoder.pos_embed.grad is not None, "resized positions learn too"


def test_rename_is_one_to_one(E):
    one, two = torch.ones(1), torch.ones(2)
    named = E.rename({"vision_model.encoder.layers.1.self_attn.q_proj.weight": one, "visual_projection.weight": two, "text_model.a.weight": one,
                      "logit_scale": one, "vision_model.unheard.of": two, "vision_model.embeddings.class_embedding": one})
    assert sorted(named) == ["blocks.1.attn.q.weight", "cls_token", "proj.weight", "unheard.of"], f"an unknown name stays, so that loading can refuse it: {sorted(named)}"
    assert named["proj.weight"] is two
    with pytest.raises(ValueError, match="are one"):
        E.rename({"cls_token": one, "class_token": two})


# -- 2: the transformer


@torch.no_grad()
def test_attention_is_torchs_multi_head_attention(M):
    torch.manual_seed(0)
    ours, x, mask = M.Attention(12, 3), torch.randn(2, 5, 12), torch.ones(5, 5, dtype=torch.bool).tril()
    q, (k, v) = ours.q_proj.weight, ours.kv_proj.weight.chunk(2)
    expected = F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, 12, 3, torch.cat([q, k, v]), None, None, None, False, 0.0, ours.out_proj.weight, None, attn_mask=~mask)[0].transpose(0, 1)
    close(ours(x, mask=mask), expected, "softmax(q k / sqrt(D / H)) v by head, True in the mask where a row may see a column")
    assert not torch.allclose(ours(x), expected), "without a mask all see all"


@torch.no_grad()
def test_cross_attention_reads_its_context(M):
    torch.manual_seed(0)
    ours, x, context = M.Attention(12, 3, 8), torch.randn(2, 5, 12), torch.randn(2, 4, 8)
    k, v = ours.kv_proj(context).chunk(2, -1)
    by_head = lambda y: y.view(2, -1, 3, 4).transpose(1, 2)
    out = F.scaled_dot_product_attention(by_head(ours.q_proj(x)), by_head(k), by_head(v)).transpose(1, 2).reshape(2, 5, 12)
    close(ours(x, context=context), ours.out_proj(out), "queries from x, keys and values from the context")


@pytest.mark.parametrize("causal", [False, True])
def test_prefix_mask_row_by_row(M, causal):
    mask = M.prefix_mask(3, 4, 2, causal, "cpu")
    assert mask.shape == (11, 11) and mask.dtype == torch.bool
    for i in range(11):
        for j in range(11):
            if i < 3 or j < 3:
                allowed = j <= i
            else:
                allowed = (i - 3) // 4 == (j - 3) // 4 and (not causal or j <= i)
            assert mask[i, j] == allowed, f"position {i} {'has to' if allowed else 'must not'} see position {j} (3 words, then 2 draws of 4 image positions)"


@torch.no_grad()
def test_image_positions_are_added_once(M):
    model, prefix, image, seen = small(M), torch.randn(B, T, 24), torch.randn(B, N, 24), []
    model.image.embed, model.image.head = lambda model, x: x, lambda model, h: h
    model.trunk = lambda x, mask=None, cache=None: seen.append(x) or x
    close(model.predict_image(prefix, image), image + model.places(), "image positions are what they hold plus their places, once")
    close(seen[0][:, :T], prefix + model.text_pos[:T], "the prefix stands at the first text positions")


@torch.no_grad()
def test_text_logits_start_at_the_last_word_of_the_prefix(M):
    model, prefix, ids = small(M), torch.randn(B, T, 24), torch.randint(V, (B, 3))
    logits = model.text_logits(prefix, ids)
    assert logits.shape == (B, 4, V), f"one row of logits for each word and one for the next: (B, S + 1, V), not {tuple(logits.shape)}"
    close(logits[:, :1], model.text_logits(prefix), "the first row is what follows the prefix alone")
    x = torch.cat([prefix, model.wte(ids)], 1) + model.text_pos[: T + 3]
    close(logits, model.lm_head(model.trunk(x, M.causal_mask(T + 3, "cpu")))[:, -4:], "states of the last of the prefix and of each word, through lm_head")


# -- 3: flow


def test_velocity_error_by_hand(R):
    x, x_pred = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 0.3)
    close(R.velocity_error(x_pred, x, torch.full((1, 1, 1), 0.5)), torch.full((1, 2, 3), 0.36), "(0.3 / (1 - 0.5))^2, element by element")
    close(R.velocity_error(x_pred, x, torch.full((1, 1, 1), 0.97)), torch.full((1, 2, 3), 0.09 / R.MIN_ONE_MINUS_T ** 2), "1 - t is kept at its least value")


def test_flow_loss_shows_the_model_what_it_says(M, R, monkeypatch):
    model, images, calls = small(M, noise_scale=3.0), torch.rand(B, 3, 12, 12), []
    x = M.patchify(images, 4)
    monkeypatch.setattr(R, "noised", lambda *args: calls.append(args) or (x + 7, torch.full((B, 1, 1), 0.25)))
    model.predict_image = lambda *args: calls.append(args) or x + 0.3
    loss = R.flow_loss(model, "prefix", images)
    assert loss.ndim == 0 and loss.item() == pytest.approx(0.16, rel=1e-4), "the mean over patches and pixels of the velocity's squared error"
    (clean, per_token, scale), (prefix, x_t, t) = calls
    close(clean, x, "the clean image as patches in [-1, 1]")
    assert not per_token and scale == 3.0, "one time for all patches of an image, and the model's own noise scale"
    assert prefix == "prefix" and torch.equal(x_t, x + 7) and torch.equal(t, torch.full((B,), 0.25)), "the model sees x_t and t (B,), never the image"


def test_guidance_goes_from_none_to_the_condition_and_beyond(S):
    cond, uncond, asked = torch.randn(B, 5), torch.randn(B, 5), []

    def look(x):
        asked.append(x)
        return torch.cat([cond, uncond]) if len(x) == 2 * B else cond

    inputs = torch.arange(B)[:, None]
    for scale in (0.0, 1.0, 2.5):
        out = S.guided(SimpleNamespace(cfg_scale=scale), look, inputs)
        close(out, uncond + scale * (cond - uncond), f"scale {scale}: uncond + s (cond - uncond); the condition's half of the batch comes first")
    assert torch.equal(asked[-1], torch.cat([inputs, inputs])), "both halves hold the same inputs"
    assert len(asked) == 3 and len(asked[1]) == B, "one pass each, and guidance of 1 costs no second half"


# -- 4: visual words and RecA


@torch.no_grad()
def test_connector_reads_its_patches(M):
    model = small(M)
    connector, patches, seen = model.connector, torch.randn(B, 5, 10) * 3, []
    for block in connector.blocks:
        block.register_forward_hook(lambda block, args, kwargs, out: seen.append((args[0], kwargs.get("context"))), with_kwargs=True)
    logits = connector(patches)
    assert logits.shape == (B, T - 1, V), f"logits of K words each: (B, K, V), not {tuple(logits.shape)}"
    assert len(seen) == 2, "every block once"
    close(seen[0][0], connector.queries.expand(B, -1, -1), "the first block reads the learned queries")
    for _, context in seen:
        close(context, connector.norm_in(patches), "every block attends to the normalised patch tokens")
    close(connector(patches[:, [3, 1, 4, 0, 2]]), logits, "patch tokens are a set: their order carries nothing here", 1e-4)
    assert (connector(patches ** 3) - logits).abs().max() > 1e-3 and (logits.sum(-1) - 1).abs().max() > 0.1, "logits, not probabilities"
    x = connector.queries.expand(B, -1, -1)
    for block in connector.blocks:
        x = block(x, context=connector.norm_in(patches))
    close(logits, connector.word_head(connector.norm(x)), "the last states, normalised, through word_head")


@torch.no_grad()
def test_visual_words_are_expected_embeddings(M):
    model, words = small(M, paradigm="mask", code_levels=(3, 2), code_stride=4, code_width=8), torch.rand(B, T - 1, V).softmax(-1)
    prefix = model.visual_prefix(words)
    assert prefix.shape == (B, T, 24), f"<bos> and K words: (B, K + 1, D), not {tuple(prefix.shape)}"
    close(prefix[:, 0], model.wte.weight[1].expand(B, -1), "<bos> is word 1, without any position")
    expected = sum(words[..., v, None] * model.wte.weight[v] for v in range(V))
    close(prefix[:, 1:], expected, "sum over words of p(word) times its embedding; codes are no words")


def test_seeing_trains_the_connector_and_never_the_encoder(M, R):
    model, proj, sizes = small(M, encoder_size=18), torch.nn.Linear(48, 10), []

    class Encoder(torch.nn.Module):
        def forward(self, images):
            sizes.append(tuple(images.shape[2:]))
            return SimpleNamespace(patch_tokens=proj(M.patchify(images[..., :12, :12], 4)), pooled=None)

    words = R.see(model, Encoder(), torch.rand(B, 3, 12, 12))
    assert sizes == [(18, 18)], "the encoder sees the images at its own size (for_encoder)"
    assert words.shape == (B, T - 1, V)
    close(words.sum(-1), torch.ones(B, T - 1), "probabilities over the words")
    words.square().sum().backward()
    assert proj.weight.grad is None, "the encoder is frozen: no gradient reaches it"
    assert model.connector.queries.grad.abs().sum() > 0, "the connector learns through its visual words where it is not frozen"
