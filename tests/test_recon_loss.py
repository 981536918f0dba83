"""recon_loss.py: one equation after another against a closed form; RecA trains what it should and nothing else."""
import math
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(__file__))
from test_model import B, C, N, T, V, one_thread, small  # noqa: E402, F401

import recon_loss as R  # noqa: E402
from data import ANY  # noqa: E402
from model import IMAGES, UnifiedModel, patchify  # noqa: E402


class Encoder(torch.nn.Module):
    """Stands in for encoder.ViT: four patch tokens of width 10, and their mean."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(3 * 36, 10)

    def forward(self, images):
        tokens = self.proj(patchify(images, 6))
        return SimpleNamespace(patch_tokens=tokens, pooled=tokens.mean(1))


def captions(count=B):
    ids = torch.randint(4, V, (count, T))
    ids[:, 0], ids[:, 4], ids[:, 5:] = 1, 2, 0
    return ids


def images(count=B):
    return torch.rand(count, 3, 12, 12)


# -- the flow


def test_interpolation_endpoints_and_velocity_by_jvp():
    image, noise, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 1, 1)
    torch.testing.assert_close(R.interpolate(image, noise, torch.zeros(1)), noise)
    torch.testing.assert_close(R.interpolate(image, noise, torch.ones(1)), image)
    x_t, dx_dt = torch.func.jvp(lambda t: R.interpolate(image, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(dx_dt, image - noise)


def test_velocity_error_is_the_squared_error_of_the_velocity():
    x, x_pred, noise, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 3, 1) * 0.9
    x_t = R.interpolate(x, noise, t)
    v_pred, v = (x_pred - x_t) / (1 - t), x - noise
    torch.testing.assert_close(R.velocity_error(x_pred, x, t), (v_pred - v) ** 2, atol=1e-3, rtol=1e-3)
    assert R.velocity_error(x_pred, x, torch.ones(1)).isfinite().all()


@pytest.mark.parametrize("per_token", [False, True])
def test_noised_draws_times_and_noise_as_it_says(per_token):
    torch.manual_seed(0)
    x = torch.randn(4000, 5, 2)
    x_t, t = R.noised(x, per_token, 3.0)
    assert t.shape == (4000, 5 if per_token else 1, 1) and 0 < t.min() and t.max() < 1
    logit = torch.logit(t)
    assert abs(logit.mean() - R.LOGIT_NORMAL_MEAN) < 0.05 and abs(logit.std() - R.LOGIT_NORMAL_STD) < 0.05
    noise = (x_t - t * x) / (1 - t)
    assert abs(noise.std() - 3) < 0.05 and abs(noise.mean()) < 0.05
    if per_token:
        assert t.std(1).mean() > 0.05, "each patch has its own time"


# -- the four image losses, each with a stand-in for the transformer


def test_flow_loss_is_zero_for_the_image_and_exact_for_an_offset(monkeypatch):
    model, pictures = small("flow"), images()
    x, t = patchify(pictures, 4), torch.tensor([0.3, 0.95]).view(B, 1, 1)
    monkeypatch.setattr(R, "noised", lambda x, per_token, scale: (R.interpolate(x, torch.randn_like(x), t), t))
    model.predict_image = lambda prefix, x_t, t: x
    assert R.flow_loss(model, None, pictures) == 0
    model.predict_image = lambda prefix, x_t, t: x + 0.2
    assert R.flow_loss(model, None, pictures).item() == pytest.approx((0.04 / 0.7 ** 2 + 0.04 / R.MIN_ONE_MINUS_T ** 2) / 2, rel=1e-4)


def test_ar_loss_is_the_chain_rule():
    """-log p(codes) = -sum log p(code_i | codes before it), each factor from its own run that sees only those."""
    model, prefix, pictures = small("ar"), torch.randn(B, T, 24), images()
    codes, total = model.tokenizer.encode(pictures), 0
    for i in range(N):
        held = torch.full((B, N), C)
        held[:, 1: i + 1] = codes[:, :i]  # the rest is not known yet
        total = total - model.predict_image(prefix, held)[:, i].log_softmax(-1).gather(1, codes[:, i: i + 1]).mean()
    torch.testing.assert_close(R.ar_loss(model, prefix, pictures), total / N)


def test_mask_loss_counts_masked_codes_only_and_hides_them():
    model, pictures, seen = small("mask"), images(300), {}
    codes = model.tokenizer.encode(pictures)

    def predict(prefix, held):
        seen["held"], seen["logits"] = held, torch.randn(300, N, C)
        return seen["logits"]

    model.predict_image = predict
    loss = R.mask_loss(model, None, pictures)
    masked = seen["held"] == C
    assert torch.equal(seen["held"][~masked], codes[~masked]) and masked.any(1).all()
    torch.testing.assert_close(loss, F.cross_entropy(seen["logits"][masked], codes[masked]))
    share = masked.float().mean().item()  # E cos(pi u / 2) = 2 / pi, plus half a position for rounding up
    assert abs(share - (2 / math.pi + 0.5 / N)) < 0.05, share


def test_mar_loss_counts_masked_patches_only_and_hides_them():
    model, pictures, seen = small("mar"), images(200), {}
    x = patchify(pictures, 4)

    def predict(prefix, held, masked):
        seen["masked"] = masked
        return torch.cat([x, masked[..., None].float()], -1)  # a state that knows the patch and whether it is asked for

    model.predict_image = predict
    model.image.flow_mlp.forward = lambda x_t, t, h: h[..., :-1] + 5 * (1 - h[..., -1:])  # exact where masked, wrong elsewhere
    assert R.mar_loss(model, None, pictures) == 0
    count = seen["masked"].sum(1)
    assert count.unique().tolist() == list(range(1, N + 1)), "every share that drawing passes through"
    model.image.flow_mlp.forward = lambda x_t, t, h: h[..., :-1] + 0.1
    assert R.mar_loss(model, None, pictures) > 0.01
    hidden = small("mar").image.embed(None, x, torch.ones(200, N, dtype=torch.bool))
    assert (hidden == hidden[0, 0]).all(), "a masked patch is not seen"


def test_random_mask_hides_exactly_its_share_everywhere_alike():
    torch.manual_seed(0)
    ratio = torch.tensor([[0.01], [0.34], [1.0]]).repeat(1000, 1)
    masked = R.random_mask(7, ratio)
    assert torch.equal(masked.sum(1), (ratio[:, 0] * 7).ceil().long())
    where = masked[1::3].float().mean(0)  # 3 of 7
    assert (where - 3 / 7).abs().max() < 0.06, where


# -- prefixes


def test_a_template_stands_in_the_place_of_the_last_two_words(monkeypatch):
    model = UnifiedModel(replace(small().cfg, vocab_size=38))
    prefix = model.visual_prefix(torch.rand(64, T - 1, 38).softmax(-1))
    assert R.with_template(model, prefix) is prefix
    words = {verb: model.text_prefix(torch.tensor([number, 6])) for verb, number in {"make": 8, "add": 9, "remove": 10}.items()}  # and `the`
    for count, expected in {1: {"make"}, 3: {"make", "add", "remove"}}.items():
        monkeypatch.setattr(R, "TEMPLATES", count)
        shown = R.with_template(model, prefix)
        assert torch.equal(shown[:, :-2], prefix[:, :-2])
        assert {next(verb for verb, pair in words.items() if torch.equal(pair, last)) for last in shown[:, -2:]} == expected



def test_recon_is_t2i_with_another_prefix(monkeypatch):
    """The heart of it: were the visual words the caption, RecA's loss would be text-to-image's, to the bit."""
    for paradigm in IMAGES:
        model, pictures, ids = small(paradigm), images(), captions()
        monkeypatch.setattr(R, "see", lambda *args: F.one_hot(ids[:, 1:], V).float())
        torch.manual_seed(1)
        recon = R.recon_loss(model, None, pictures)
        torch.manual_seed(1)
        torch.testing.assert_close(recon, R.t2i_loss(model, ids, pictures))


@pytest.mark.parametrize("paradigm", IMAGES)
def test_reca_trains_the_transformer_and_not_what_makes_the_condition(paradigm, monkeypatch):
    monkeypatch.setattr(R, "DROP", 0.0)
    model, encoder, batch = small(paradigm), Encoder(), {"main": {"image": images()}}  # nothing but images: no caption anywhere
    R.total_loss(model, encoder, batch, {"recon": 1.0})[0].backward()
    for name, p in [*encoder.named_parameters(), *model.connector.named_parameters()]:
        assert p.grad is None, f"{name} got a gradient"
    if paradigm in ("flow", "mar"):
        assert (model.wte.weight.grad == 0).all(), "the words keep their meaning"
    assert all(p.grad.abs().sum() > 0 for p in model.blocks.parameters())
    assert model.tokenizer is None or all(p.grad is None for p in model.tokenizer.parameters())
    R.total_loss(model, encoder, batch, {"recon": 1.0}, train_connector=True)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.connector.parameters()) and encoder.proj.weight.grad is None


def test_a_condition_reaches_the_loss(monkeypatch):
    monkeypatch.setattr(R, "DROP", 0.0)
    for paradigm in IMAGES:
        model, pictures, ids, losses = small(paradigm), images(), captions(), []
        for prefix in (ids, ids, captions()):
            torch.manual_seed(0)
            losses.append(R.t2i_loss(model, prefix, pictures).item())
        assert losses[0] == losses[1] != losses[2]


def test_dropped_conditions_are_the_empty_caption():
    model, prefix = small(), torch.randn(1000, T, 24)
    null = model.text_prefix(torch.tensor([1, 2, 0, 0, 0, 0, 0]))
    assert torch.equal(R.drop_prefix(model, prefix, 0.0), prefix)
    assert (R.drop_prefix(model, prefix, 1.0) == null).all()
    dropped = (R.drop_prefix(model, prefix, 0.1) == null).all(-1)
    assert (dropped.all(1) == dropped.any(1)).all() and 0.06 < dropped[:, 0].float().mean() < 0.14


# -- text, and the encoder's own


def test_text_loss_predicts_each_word_from_those_before_and_no_padding():
    model, prefix, ids = small(), torch.randn(B, T, 24), captions()
    logp = model.text_logits(prefix, ids[:, 1:-1]).log_softmax(-1)  # what follows the prefix, then each word
    terms = [-logp[b, k, ids[b, k + 1]] for b in range(B) for k in range(T - 1) if ids[b, k + 1] != 0]
    assert len(terms) == 4 * B, "three words and <eos> each"
    torch.testing.assert_close(R.text_loss(model, prefix, ids), torch.stack(terms).mean())


def test_words_loss_compares_place_by_place():
    ids = captions()
    assert R.words_loss(F.one_hot(ids[:, 1:], V).float(), ids) == 0
    assert R.words_loss(F.one_hot(ids[:, 1:].roll(1, 1), V).float(), ids) > 5
    assert R.words_loss(torch.full((B, T - 1, V), 1 / V), ids).item() == pytest.approx(math.log(V), rel=1e-5)
    words = torch.rand(B, T - 1, V).softmax(-1)
    asked = -torch.stack([words[b, k, ids[b, k + 1]].log() for b in range(B) for k in range(2)]).mean()
    torch.testing.assert_close(R.words_loss(words, torch.cat([ids[:, :3], torch.full((B, T - 3), ANY)], 1)), asked)  # the others are free


def test_caption_loss_is_of_the_next_word():
    logits, ids = torch.randn(B, T, V), captions()
    terms = [-logits[b, k].log_softmax(-1)[ids[b, k + 1]] for b in range(B) for k in range(4)]
    torch.testing.assert_close(R.caption_loss(logits, ids), torch.stack(terms).mean())


def test_contrast_loss_is_the_papers_double_sum():
    image, text, scale, bias = torch.randn(3, 5), torch.randn(3, 5), 2.5, -1.5
    total = 0.0
    for i in range(3):
        for j in range(3):
            z = scale * F.cosine_similarity(image[i], text[j], dim=0).item() + bias
            total += math.log(1 + math.exp(-z if i == j else z)) / 3
    assert R.contrast_loss(image, text, torch.tensor(scale).log(), torch.tensor(bias)).item() == pytest.approx(total, rel=1e-5)


# -- the sum


def test_total_loss_weighs_its_terms_and_computes_no_other():
    model, encoder = small(), Encoder()
    understand = {"image": images(), "full": captions(), "wording": captions(), "canonical": captions(), "question": captions(), "answer": captions()}
    torch.manual_seed(0)
    loss, parts = R.total_loss(model, encoder, {"understand": understand}, {"i2t": 0.5, "t2t": 2.0, "words": 3.0, "recon": 0.0})
    assert list(parts) == ["i2t", "t2t", "words"]
    torch.testing.assert_close(loss, 0.5 * parts["i2t"] + 2 * parts["t2t"] + 3 * parts["words"])
    torch.testing.assert_close(parts["t2t"], R.text_loss(model, model.text_prefix(understand["question"]), understand["answer"]))
    batch = {"main": {"image": images(), "caption": captions(), "full": captions()}}
    for key in ("caption", "full"):
        torch.manual_seed(0)
        part = R.total_loss(model, None, batch, {"t2i": 1.0}, captions=key)[1]["t2i"]
        torch.manual_seed(0)
        torch.testing.assert_close(part, R.t2i_loss(model, batch["main"][key], batch["main"]["image"]))
    with pytest.raises(AssertionError, match="recno"):
        R.total_loss(model, encoder, batch, {"recno": 1.0})
    with pytest.raises(AssertionError, match="positive"):
        R.total_loss(model, encoder, batch, {"t2i": 0.0})


@pytest.mark.parametrize("paradigm, term", [*((paradigm, "t2i") for paradigm in IMAGES), ("ar", "tokenizer")])
def test_one_batch_overfits(paradigm, term):
    torch.manual_seed(0)
    model, ids = UnifiedModel(small(paradigm, flow_mlp_width=96).cfg), torch.tensor([[1, 5, 2, 0, 0, 0, 0], [1, 6, 2, 0, 0, 0, 0]]).repeat(8, 1)
    pictures, losses = torch.rand(2, 3, 12, 12).repeat(8, 1, 1, 1), []
    if model.tokenizer:
        model.tokenizer.requires_grad_(term == "tokenizer")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(120):
        loss, _ = R.total_loss(model, None, {"main": {"image": pictures, "caption": ids}}, {term: 1.0})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    assert last < 0.4 * first, f"{paradigm}, {term}: {first:.3f} -> {last:.3f}"
