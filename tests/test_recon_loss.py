"""recon_loss.py: each loss against a closed form; RecA trains the transformer alone."""

import math

import pytest
import torch
import torch.nn.functional as F

import paradigms
from captioner import TextDecoder
from engine import micro_batch
from model import UnifiedModel
from paradigms import PARADIGMS
from recon_loss import (
    caption_loss,
    contrastive_loss,
    drop_prefix,
    parallel_caption_loss,
    recon_loss,
    t2i_loss,
    text_loss,
    total_loss,
)
from small import (
    ENCODER_WIDTH,
    B,
    D,
    N,
    P,
    T,
    TinyEncoder,
    V,
    random_captions,
    random_images,
    small,
)
from words import IGNORE_INDEX, PAD

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- image losses


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_recon_is_t2i_with_another_prefix(paradigm):
    """The heart of it: were the visual words the caption, RecA's loss would be text-to-image's."""
    model, images, ids = small(paradigm), random_images(), random_captions()
    model.encode_visual_words = lambda *args: F.one_hot(ids[:, 1:], V).float()
    torch.manual_seed(1)
    recon = recon_loss(model, None, images)
    torch.manual_seed(1)
    torch.testing.assert_close(recon, t2i_loss(model, ids, images))


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_reca_trains_the_transformer_and_not_what_makes_the_condition(paradigm):
    model, encoder = small(paradigm), TinyEncoder()
    model.cond_drop = 0.0
    batch = {"main": {"image": random_images()}}  # images alone: no caption anywhere
    total_loss(model, encoder, batch, {"recon": 1.0})[0].backward()
    for name, p in [*encoder.named_parameters(), *model.connector.named_parameters()]:
        assert p.grad is None, f"{name} got a gradient"
    if paradigm in ("flow", "mar"):
        gradient = model.wte.weight.grad
        assert gradient is None or (gradient == 0).all(), "the words keep their meaning"
    for name, p in model.blocks.named_parameters():
        assert p.grad.abs().sum() > 0, f"{name} got no gradient"
    if model.tokenizer is not None:
        assert all(p.grad is None for p in model.tokenizer.parameters())


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_condition_reaches_the_loss(paradigm):
    model, images = small(paradigm), random_images()
    model.cond_drop = 0.0

    def loss_of(caption):
        torch.manual_seed(0)
        return t2i_loss(model, caption, images).item()

    caption, other = random_captions(), random_captions()
    assert loss_of(caption) == loss_of(caption)
    assert loss_of(caption) != loss_of(other)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_each_image_has_several_noises_behind_one_prefix(paradigm):
    model, images = small(paradigm, repeats_per_image=3), random_images()
    predict_image = model.predict_image
    calls = []

    def record(prefix, *inputs):
        calls.append((len(prefix), len(inputs[0])))
        return predict_image(prefix, *inputs)

    model.predict_image = record
    t2i_loss(model, random_captions(), images)
    repeats = 1 if paradigm == "ar" else 3  # ar has neither noise nor mask
    assert calls == [(B, B * repeats)]


def test_dropped_conditions_are_the_empty_caption(model):
    prefix = torch.randn(1000, T, D)
    null = model.text_prefix(torch.tensor([1, 2, 0, 0, 0, 0, 0]))
    assert torch.equal(drop_prefix(model, prefix, 0.0), prefix)
    assert (drop_prefix(model, prefix, 1.0) == null).all()
    is_null = (drop_prefix(model, prefix, 0.1) == null).all(-1)  # (1000, T)
    assert (is_null.all(1) == is_null.any(1)).all(), "a condition is dropped whole"
    assert 0.06 < is_null[:, 0].float().mean() < 0.14


# ---------------------------------------------------------------- text losses


def test_text_loss_predicts_each_word_from_those_before_and_no_padding(model):
    prefix, ids = torch.randn(B, T, D), random_captions()
    log_p = model.text_logits(prefix, ids[:, 1:-1]).log_softmax(-1)  # (B, T - 1, V)
    terms = []
    for b in range(B):
        for k in range(T - 1):
            word = ids[b, k + 1]
            if word != PAD:
                terms.append(-log_p[b, k, word])
    assert len(terms) == 4 * B, "three words and <eos> each"
    torch.testing.assert_close(text_loss(model, prefix, ids).mean(), torch.stack(terms).mean())


def test_parallel_caption_loss_compares_place_by_place():
    ids = random_captions()
    one_hot = F.one_hot(ids[:, 1:], V).float()
    assert (parallel_caption_loss(one_hot, ids) == 0).all()
    assert (parallel_caption_loss(one_hot.roll(1, 1), ids) > 5).all()
    uniform = torch.full((B, T - 1, V), 1 / V)
    expected = torch.full((B,), math.log(V))
    torch.testing.assert_close(parallel_caption_loss(uniform, ids), expected)


def test_parallel_caption_loss_leaves_places_free():
    ids, words = random_captions(), torch.rand(B, T - 1, V).softmax(-1)
    log_p = words.log()
    first = [log_p[0, k, ids[0, k + 1]] for k in range(2)]
    second = [log_p[1, k, ids[1, k + 1]] for k in range(4)]
    ids[0, 3:] = IGNORE_INDEX
    ids[1, 5:] = IGNORE_INDEX
    expected = -torch.stack([torch.stack(first).mean(), torch.stack(second).mean()])
    torch.testing.assert_close(parallel_caption_loss(words, ids), expected)
    ids[:] = IGNORE_INDEX
    assert (parallel_caption_loss(words, ids) == 0).all(), "a caption of which no word is known"


def test_caption_loss_is_of_the_next_word():
    logits, ids = torch.randn(B, T, V), random_captions()
    log_p = logits.log_softmax(-1)
    terms = [-log_p[b, k, ids[b, k + 1]] for b in range(B) for k in range(4)]
    torch.testing.assert_close(caption_loss(logits, ids).mean(), torch.stack(terms).mean())


def test_contrastive_loss_is_the_papers_double_sum():
    image, text = torch.randn(3, 5), torch.randn(3, 5)
    scale, bias = 2.5, -1.5
    total = 0.0
    for i in range(3):
        for j in range(3):
            z = scale * F.cosine_similarity(image[i], text[j], dim=0).item() + bias
            total += math.log(1 + math.exp(-z if i == j else z)) / 3
    loss = contrastive_loss(image, text, torch.tensor(scale).log(), torch.tensor(bias))
    assert loss.item() == pytest.approx(total, rel=1e-5)


# ---------------------------------------------------------------- the sum


def test_total_loss_weighs_its_terms_and_computes_no_other(model):
    understand = {"image": random_images()}
    for name in ("full_caption", "caption_target", "canonical_caption", "question", "answer"):
        understand[name] = random_captions()
    weights = {"i2t": 0.5, "t2t": 2.0, "words": 3.0}
    loss, terms = total_loss(model, TinyEncoder(), {"understand": understand}, weights)
    assert list(terms) == ["i2t", "t2t", "words"]
    expected = 0.5 * terms["i2t"] + 2 * terms["t2t"] + 3 * terms["words"]
    torch.testing.assert_close(loss, expected)
    t2t = text_loss(model, model.text_prefix(understand["question"]), understand["answer"])
    torch.testing.assert_close(terms["t2t"], t2t.mean())


def test_total_loss_reads_the_caption_for_t2i(model):
    main = {"image": random_images()}
    main |= {"caption": random_captions(), "full_caption": random_captions()}
    torch.manual_seed(0)
    term = total_loss(model, None, {"main": main}, {"t2i": 1.0})[1]["t2i"]
    torch.manual_seed(0)
    torch.testing.assert_close(term, t2i_loss(model, main["caption"], main["image"]))


def test_total_loss_refuses_unknown_terms_and_no_term(model):
    batch = {"main": {"image": random_images(), "caption": random_captions()}}
    with pytest.raises(AssertionError, match="recno"):
        total_loss(model, TinyEncoder(), batch, {"recno": 1.0})
    with pytest.raises(AssertionError, match="recno"):
        total_loss(model, TinyEncoder(), batch, {"t2i": 1.0, "recno": 1.0})
    with pytest.raises(AssertionError, match="no term"):
        total_loss(model, TinyEncoder(), batch, {})


def unequal_captions(count):
    """<bos>, one to four words, <eos>, <pad>: ids (count, T), the short ones first."""
    ids = torch.randint(4, V, (count, T))
    ids[:, 0] = 1
    for row in range(count):
        length = 1 + 4 * row // count
        ids[row, 1 + length] = 2
        ids[row, 2 + length :] = PAD
    return ids


WITHOUT_NOISE = ["t2i", "recon", "replay", "i2t", "t2t", "words", "caption", "tokenizer"]


@pytest.mark.parametrize("term", WITHOUT_NOISE)
def test_parts_of_a_batch_are_the_whole_batch(term):
    """Loss and gradient, with captions of unequal lengths, the short ones in one part."""
    model, encoder = small("ar"), TinyEncoder()
    model.cond_drop = 0.0
    decoder = TextDecoder(V, T, D, ENCODER_WIDTH, heads=3)
    part = {"image": random_images(8)}
    for name in ("caption", "full_caption", "caption_target", "question", "answer"):
        part[name] = unequal_captions(8)
    canonical = unequal_captions(8)
    part["canonical_caption"] = canonical.masked_fill(canonical == PAD, IGNORE_INDEX)
    batch = {"main": part, "understand": part, "replay": part}
    trained = [*model.parameters(), *encoder.parameters(), *decoder.parameters()]

    def loss_and_gradient(parts):
        total = 0.0
        for i in range(parts):
            piece = micro_batch(batch, i, parts)
            loss, _ = total_loss(model, encoder, piece, {term: 1.0}, decoder)
            (loss / parts).backward()
            total += loss.item() / parts
        gradients = [p.grad.flatten() for p in trained if p.grad is not None]
        for p in trained:
            p.grad = None
        return total, torch.cat(gradients)

    whole, gradient = loss_and_gradient(1)
    for parts in (2, 4):
        loss, summed = loss_and_gradient(parts)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert (summed - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("paradigm", ["mask", "mar"])
def test_each_masked_image_counts_alike(paradigm, monkeypatch):
    """However many of its positions are masked: one of them, or all."""
    model, images = small(paradigm), random_images(2)
    model.cond_drop = 0.0
    masks = torch.ones(2, N, dtype=torch.bool)
    masks[0, 1:] = False
    noise = torch.randn(2, N, P)
    monkeypatch.setattr(paradigms, "MLP_REPEATS", 1)
    caption = unequal_captions(2)

    def loss_of(rows):
        monkeypatch.setattr(paradigms, "random_mask", lambda N, ratio: masks[rows])
        times = torch.full((len(rows), N, 1), 0.5)
        monkeypatch.setattr(paradigms, "sample_times", lambda *args: times)
        monkeypatch.setattr(torch, "randn", lambda *args, **options: noise[rows])
        return t2i_loss(model, caption[rows], images[rows])

    both, first, second = loss_of([0, 1]), loss_of([0]), loss_of([1])
    torch.testing.assert_close(both, (first + second) / 2)
    assert abs(first - second) > 0.01 * both


ALL_T2I = [(paradigm, "t2i") for paradigm in PARADIGMS]


@pytest.mark.parametrize("paradigm, term", [*ALL_T2I, ("ar", "tokenizer")])
def test_one_batch_overfits(paradigm, term):
    torch.manual_seed(0)
    model = UnifiedModel(small(paradigm, flow_mlp_width=96).cfg)
    ids = torch.tensor([[1, 5, 2, 0, 0, 0, 0], [1, 6, 2, 0, 0, 0, 0]]).repeat(8, 1)
    images = random_images(2).repeat(8, 1, 1, 1)
    batch = {"main": {"image": images, "caption": ids}}
    if model.tokenizer is not None:
        model.tokenizer.requires_grad_(term == "tokenizer")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(120):
        loss, _ = total_loss(model, None, batch, {term: 1.0})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first = sum(losses[:5]) / 5
    last = sum(losses[-20:]) / 20
    assert last < 0.4 * first, f"{paradigm}, {term}: {first:.3f} -> {last:.3f}"
