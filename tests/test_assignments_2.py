"""Assignment 2, the unified transformer: what each blank has to do.

    python -m pytest -q tests/test_assignments_2.py

# B batch, T prefix length, N image positions, R repeats, S any sequence, D width, V words, C codes
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from laws import assert_close, assert_gradients_agree, assert_learns, assert_shape, random_weights

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, N, P, V, C, D = 2, 7, 9, 48, 13, 24, 24
PARADIGMS = ["flow", "ar", "mask", "mar"]


def make_model(paradigm="flow", **changes):
    from small import small

    return small(paradigm, **changes)


def silence(model):
    """Lets the blocks of a model add nothing."""
    for block in model.blocks:
        block.attn.out_proj.weight.data.zero_()
        block.down_proj.weight.data.zero_()
    return model


def image_inputs(paradigm, batch=B):
    """What the paradigm's `embed` takes, at random."""
    patches = torch.randn(batch, N, P)
    inputs = {
        "flow": (patches, torch.rand(batch)),
        "mar": (patches, torch.rand(batch, N) < 0.5),
        "ar": (torch.randint(C + 1, (batch, N)),),
        "mask": (torch.randint(C + 1, (batch, N)),),
    }
    return inputs[paradigm]


def depends_on(out, x):
    """Which positions (B, S) of x (B, S, D) the scalar `out` depends on."""
    (gradient,) = torch.autograd.grad(out, x, retain_graph=True)
    return gradient.abs().sum(-1) > 1e-9


# -------------------------------------------------------- model.Attention.forward

Q_FROM_X = "queries from x; keys, then values, from kv_proj; heads are contiguous channels"


def attention_and_torchs(context_width=None):
    """Our attention and nn.MultiheadAttention with the same weights, in float64."""
    from model import Attention

    attention = Attention(12, 3, context_width).double()
    random_weights(attention)
    keys = context_width or 12
    reference = nn.MultiheadAttention(12, 3, bias=False, kdim=keys, vdim=keys, batch_first=True)
    reference = reference.double()
    first, second = attention.kv_proj.weight[:12], attention.kv_proj.weight[12:]
    with torch.no_grad():
        if keys == 12:
            reference.in_proj_weight.copy_(torch.cat([attention.q_proj.weight, first, second]))
        else:
            reference.q_proj_weight.copy_(attention.q_proj.weight)
            reference.k_proj_weight.copy_(first)
            reference.v_proj_weight.copy_(second)
        reference.out_proj.weight.copy_(attention.out_proj.weight)
    return attention, reference


def float64(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("S", [1, 5])
@torch.no_grad()
def test_self_attention_is_torchs(S):
    attention, reference = attention_and_torchs()
    x = float64(2, S, 12)
    law = f"without a mask all attend to all; {Q_FROM_X}"
    assert_close(attention(x), reference(x, x, x)[0], law, 1e-8)
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    expected = reference(x, x, x, attn_mask=~mask)[0]
    assert_close(attention(x, mask=mask), expected, "True: the row attends to the column", 1e-8)
    mask = torch.rand(S, S) < 0.5
    mask.fill_diagonal_(True)
    expected = reference(x, x, x, attn_mask=~mask)[0]
    assert_close(attention(x, mask=mask), expected, "a mask need not be causal", 1e-8)


@pytest.mark.parametrize("context_width", [8, 12])
@torch.no_grad()
def test_cross_attention_is_torchs(context_width):
    attention, reference = attention_and_torchs(context_width)
    x, context = float64(2, 5, 12), float64(2, 4, context_width)
    expected = reference(x, context, context)[0]
    law = "with a context, queries come from x, keys and values from the context"
    assert_close(attention(x, context=context), expected, law, 1e-8)
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]]) > 0
    expected = reference(x, context, context, attn_mask=~mask)[0]
    law = "a mask also holds for a context: rows of x, columns of the context"
    assert_close(attention(x, context=context, mask=mask), expected, law, 1e-8)


@torch.no_grad()
def test_attention_by_hand():
    """The worked example of the text: two heads of width 1, one word of context."""
    from model import Attention

    attention = Attention(2, 2)
    attention.q_proj.weight.copy_(torch.eye(2))
    attention.kv_proj.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [10, 0], [0, 100]]))
    attention.out_proj.weight.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    out = attention(x)
    expected = torch.tensor([[7.31059, 100.0], [5.0, 196.40276]])
    assert_close(out[0], expected, "two heads: softmax(1, 0) and softmax(0, 4)", 1e-3)


@pytest.mark.parametrize("context_width", [None, 8])
def test_attention_learns(context_width):
    attention, reference = attention_and_torchs(context_width)
    x, weights = float64(2, 5, 12), float64(2, 5, 12)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = {"x": ours}, {"x": theirs}
    source, options = theirs, {}
    if context_width:
        context = float64(2, 4, context_width)
        options["context"] = context.clone().requires_grad_()
        source = context.clone().requires_grad_()
        actual["context"], expected["context"] = options["context"], source
    (attention(ours, **options) * weights).sum().backward()
    (reference(theirs, source, source)[0] * weights).sum().backward()
    actual["out_proj"] = attention.out_proj.weight
    expected["out_proj"] = reference.out_proj.weight
    assert_gradients_agree(actual, expected, "as of torch's attention")
    for name, p in attention.named_parameters():
        assert_learns(p, name)
    if not context_width:
        gradient = torch.cat([attention.q_proj.weight.grad, attention.kv_proj.weight.grad])
        law = "the gradients of q_proj and kv_proj are those of torch's attention"
        assert_close(gradient, reference.in_proj_weight.grad, law, 1e-6)


@torch.no_grad()
def test_cached_attention_is_causal_attention():
    """Read in pieces of 3, 1 and 1 positions, in two layers with caches of their own."""
    from model import KVCache, causal_mask

    cfg = SimpleNamespace(depth=2, heads=3, width=12)
    cache = KVCache(cfg, 2, 8, "cpu", torch.float64)
    layers = [attention_and_torchs()[0], attention_and_torchs()[0]]
    random_weights(layers[1], seed=1)
    inputs = [float64(2, 5, 12), float64(2, 5, 12)]
    whole = [layer(x, mask=causal_mask(5, "cpu")) for layer, x in zip(layers, inputs, strict=True)]
    law = "keys and values of what was read, then the new: cache.extend(layer, k, v)"
    for first, last in [(0, 3), (3, 4), (4, 5)]:
        mask = causal_mask(3, "cpu") if first == 0 else None
        for i in (0, 1):
            piece = inputs[i][:, first:last]
            out = layers[i](piece, mask=mask, cache=cache, layer=i)
            assert_close(out, whole[i][:, first:last], f"layer {i}: {law}", 1e-8)
            message = "attention does not move cache.length on: the model does, after all layers"
            assert cache.length == first, message
        cache.length = last


# -------------------------------------------------------- model.prefix_mask

# T words, N image positions, R repeats: # where the row attends to the column
MASKS = {
    (3, 2, 2, False): "#......|##.....|###....|#####..|#####..|###..##|###..##",
    (3, 2, 2, True): "#......|##.....|###....|####...|#####..|###..#.|###..##",
    (2, 3, 1, False): "#....|##...|#####|#####|#####",
    (2, 3, 1, True): "#....|##...|###..|####.|#####",
    (1, 1, 3, False): "#...|##..|#.#.|#..#",
    (1, 1, 3, True): "#...|##..|#.#.|#..#",
    (1, 2, 1, False): "#..|###|###",
}


def what_it_is(i, T, N):
    return f"word {i}" if i < T else f"position {(i - T) % N} of repeat {(i - T) // N}"


@pytest.mark.parametrize("T, N, repeats, causal", list(MASKS))
def test_prefix_mask_is_the_picture(T, N, repeats, causal):
    from model import prefix_mask

    mask = prefix_mask(T, N, repeats, causal, "cpu")
    rows = MASKS[T, N, repeats, causal].split("|")
    assert_shape(mask, (len(rows), len(rows)), f"{T} words and {repeats} x {N} image positions")
    assert mask.dtype == torch.bool, f"the mask is of type bool, not {mask.dtype}"
    for i, row in enumerate(rows):
        for j, mark in enumerate(row):
            verb = "has to" if mark == "#" else "must not"
            places = f"{what_it_is(i, T, N)} {verb} attend to {what_it_is(j, T, N)}"
            assert mask[i, j].item() == (mark == "#"), f"({T}, {N}, {repeats}, {causal}): {places}"


@pytest.mark.parametrize("causal", [False, True])
def test_repeats_of_a_mask_are_alike_and_apart(causal):
    from model import prefix_mask

    words, places = 5, 4
    one = prefix_mask(words, places, 1, causal, "cpu")
    three = prefix_mask(words, places, 3, causal, "cpu")
    assert_shape(three, (17, 17), "5 words and 3 x 4 image positions")
    attended = one.sum(1).tolist()
    expected = [1, 2, 3, 4, 5] + ([6, 7, 8, 9] if causal else [9, 9, 9, 9])
    assert attended == expected, f"how many positions each row attends to: {attended}"
    for r in range(3):
        start = words + r * places
        mine = [*range(words), *range(start, start + places)]
        message = f"with the prefix, repeat {r} is as if it were alone"
        assert torch.equal(three[mine][:, mine], one), message
        others = [i for i in range(words, 17) if i not in mine]
        assert not three[start : start + places][:, others].any(), "repeats do not meet"
    meta = prefix_mask(2, 3, 2, causal, "meta")
    assert meta.device.type == "meta", f"the mask is made on the device given, not {meta.device}"


# -------------------------------------------------------- model.UnifiedModel.predict_image


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_who_attends_to_whom_by_gradient(paradigm, repeats):
    model = make_model(paradigm)
    prefix = torch.randn(B, T, D, requires_grad=True)
    image = torch.randn(B * repeats, N, D, requires_grad=True)
    model.paradigm.embed = lambda model, x: x
    out = model.predict_image(prefix, image)
    for row in (0, B * repeats - 1):
        for i in range(N):
            attended = depends_on(out[row, i].sum(), image)
            allowed = torch.zeros(B * repeats, N, dtype=torch.bool)
            allowed[row, : i + 1 if paradigm == "ar" else N] = True
            places = attended.nonzero().tolist()
            message = f"{paradigm}: position {i} of image {row} depends on [image, position]"
            assert torch.equal(attended, allowed), f"{message} {places}"
            words = depends_on(out[row, i].sum(), prefix)
            assert words[row // repeats].all(), "an image position attends to its whole prefix"
            assert words.sum() == T, "an image position attends to no other prefix"


@torch.no_grad()
def test_the_prefix_is_causal_and_never_sees_the_image():
    """Of two models that differ in the image alone, all states of the prefix are equal."""
    model = make_model()
    states = []
    model.blocks[-1].register_forward_pre_hook(lambda block, args: states.append(args[0][:, :T]))
    prefix, other = torch.randn(B, T, D), torch.randn(B, T, D)
    model.predict_image(prefix, *image_inputs("flow"))
    model.predict_image(prefix, *image_inputs("flow"))
    assert_close(states[1], states[0], "the prefix does not attend to the image", 1e-6)
    model.predict_image(torch.cat([prefix[:, :4], other[:, 4:]], 1), *image_inputs("flow"))
    law = "words of the prefix attend to themselves and those before"
    assert_close(states[2][:, :4], states[0][:, :4], law, 1e-6)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("length", [3, T])
@torch.no_grad()
def test_repeats_that_share_a_prefix_equal_repeats_apart(paradigm, length):
    model = make_model(paradigm)
    prefix = torch.randn(B, length, D)
    inputs = image_inputs(paradigm, 3 * B)
    apart = model.predict_image(prefix.repeat_interleave(3, 0), *inputs)
    law = "rows 0 to 2 of the inputs belong to prefix 0, rows 3 to 5 to prefix 1"
    assert_close(model.predict_image(prefix, *inputs), apart, f"{paradigm}: {law}")
    one = model.predict_image(prefix[1:], *[x[3:4] for x in inputs])
    assert_close(apart[3:4], one, f"{paradigm}: rows of a batch do not meet")


@pytest.mark.parametrize("paradigm", ["flow", "mask", "ar"])
@torch.no_grad()
def test_where_blocks_add_nothing_an_image_position_is_itself(paradigm):
    model = silence(make_model(paradigm))
    inputs = image_inputs(paradigm, 2 * B)
    prefix = torch.randn(B, T, D)
    held = model.paradigm.embed(model, *inputs) + model.image_position_embedding()
    law = "what it holds plus its position embedding, once, then norm and head"
    expected = model.paradigm.head(model, model.norm(held))
    assert_close(model.predict_image(prefix, *inputs), expected, f"image positions: {law}")


@pytest.mark.parametrize("length", [3, T])
@torch.no_grad()
def test_words_of_the_prefix_have_their_positions(length):
    model, prefix, inputs = make_model(), torch.randn(B, length, D), image_inputs("flow")
    expected = model.predict_image(prefix, *inputs)
    moved = prefix + model.text_pos[:length]
    model.text_pos.zero_()
    law = "word i of the prefix is its embedding plus text_pos[i], once"
    assert_close(model.predict_image(moved, *inputs), expected, law)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_all_learns_through_the_image(paradigm):
    model = make_model(paradigm)
    prefix = torch.randn(B, T, D, requires_grad=True)
    out = model.predict_image(prefix, *image_inputs(paradigm, 2 * B))
    (out * torch.randn_like(out)).sum().backward()
    assert_learns(prefix, "the prefix")
    names = [f"blocks.{n}" for n, _ in model.blocks.named_parameters()]
    names += ["image_pos", "text_pos", "norm.weight"]
    names += {"flow": ["paradigm.patch_embed.weight", "paradigm.flow_head.weight"]}.get(
        paradigm, []
    )
    names += ["paradigm.mask_embed"] if paradigm == "mar" else []
    names += ["wte.weight", "lm_head.weight"] if paradigm in ("ar", "mask") else []
    for name in names:
        assert_learns(model.get_parameter(name), f"{name} ({paradigm})")


# -------------------------------------------------------- model.UnifiedModel.text_logits


def test_no_word_sees_a_later_word():
    model = make_model()
    prefix = torch.randn(B, T, D, requires_grad=True)
    ids = torch.randint(V, (B, 5))
    logits = model.text_logits(prefix, ids)
    assert_shape(logits, (B, 6, V), "one row of logits after the prefix and after each word")
    assert depends_on(logits[0, 0].sum(), prefix)[0].all(), "all of the prefix is read"
    for j in range(5):
        other = ids.clone()
        other[:, j] = (ids[:, j] + 1) % V
        change = (model.text_logits(prefix, other) - logits).abs().amax((0, 2))  # (6,)
        assert (change[: j + 1] == 0).all(), f"word {j} changes past logits: {change.tolist()}"
        assert (change[j + 1 :] > 1e-4).all(), f"word {j} is not read: {change.tolist()}"


@pytest.mark.parametrize("paradigm", ["flow", "mask"])
@pytest.mark.parametrize("length, count", [(T, 5), (3, 1), (1, 4), (2 * T - 2, 2)])
@torch.no_grad()
def test_logits_are_of_the_next_word(paradigm, length, count):
    model = make_model(paradigm)
    prefix, ids = torch.randn(B, length, D), torch.randint(V, (B, count))
    logits = model.text_logits(prefix, ids)
    law = "(B, S + 1, V), of the words alone: codes cannot be written"
    assert_shape(logits, (B, count + 1, V), law)
    law = "without ids: the one row after the prefix"
    assert_close(model.text_logits(prefix), logits[:, :1], law)
    read = torch.cat([prefix, model.wte(ids)], 1)
    for s in range(1, count + 1):
        law = f"words that were read may as well stand in the prefix: row {s}"
        assert_close(model.text_logits(read[:, : length + s])[:, 0], logits[:, s], law)


@torch.no_grad()
def test_where_blocks_add_nothing_logits_are_of_the_last_word_alone():
    model = silence(make_model("mask"))
    prefix, ids = torch.randn(B, 4, D), torch.randint(V, (B, 3))
    logits = model.text_logits(prefix, ids)
    assert_shape(logits, (B, 4, V), "one row of logits after the prefix and after each word")
    for s in range(4):
        word = prefix[:, 3] if s == 0 else model.wte(ids[:, s - 1])
        state = model.norm(word + model.text_pos[3 + s])
        law = f"row {s}: the state of the word before it, at position {3 + s}, through lm_head"
        assert_close(logits[:, s], state @ model.lm_head.weight[:V].T, law)


@pytest.mark.parametrize("paradigm", ["flow", "ar"])
def test_all_learns_through_the_words(paradigm):
    model = make_model(paradigm)
    prefix = torch.randn(B, T, D, requires_grad=True)
    logits = model.text_logits(prefix, torch.randint(V, (B, 3)))
    (logits * torch.randn_like(logits)).sum().backward()
    assert_learns(prefix, "the prefix")
    names = [f"blocks.{n}" for n, _ in model.blocks.named_parameters()]
    for name in [*names, "text_pos", "wte.weight", "norm.weight", "lm_head.weight"]:
        assert_learns(model.get_parameter(name), name)


# -------------------------------------------------------- model.UnifiedModel.predict_image_cached


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("length", [4, T])
@torch.no_grad()
def test_cached_image_equals_uncached(paradigm, length):
    """Needs predict_image."""
    model = make_model(paradigm)
    prefix = torch.randn(B, length, D)
    inputs = image_inputs(paradigm)
    uncached = model.predict_image(prefix, *inputs)
    cache = model.prefill(prefix, max_new_tokens=N + 1)
    if model.paradigm.causal:
        for i in range(N):
            out = model.predict_image_cached(cache, inputs[0][:, i : i + 1])
            law = f"position {i}, with those before it in the cache"
            assert_close(out, uncached[:, i : i + 1], f"{paradigm}: {law}")
            message = "a causal paradigm moves cache.length on by the positions that it has read"
            assert cache.length == length + i + 1, f"{message}: it is {cache.length}"
    else:
        for _ in range(2):  # an earlier step leaves no trace
            model.predict_image_cached(cache, *image_inputs(paradigm))
            law = "all positions at once, behind the cached prefix"
            out = model.predict_image_cached(cache, *inputs)
            assert_close(out, uncached, f"{paradigm}: {law}")
            message = "other paradigms read all positions anew: cache.length stays at the prefix"
            assert cache.length == length, f"{message}, not {cache.length}"
    assert cache.prefix_length == length, "cache.prefix_length stays as it was"


@torch.no_grad()
def test_two_caches_do_not_meet():
    model = make_model("ar")
    codes = torch.randint(C, (B, 3))
    caches = [model.prefill(torch.randn(B, T, D), N) for _ in range(2)]
    alone = [model.predict_image_cached(caches[0], codes[:, i : i + 1]) for i in range(3)]
    again = model.prefill(torch.randn(B, T, D), N)
    again.kv.copy_(caches[0].kv)
    for i in range(3):
        model.predict_image_cached(caches[1], codes[:, i : i + 1])
        out = model.predict_image_cached(again, codes[:, i : i + 1])
        assert_close(out, alone[i], "each cache counts its own positions")


# -------------------------------------------------------- recon_loss.text_loss


class Bigrams(nn.Module):
    """A model whose next word depends on the last alone: logits (V, V), a row for each word."""

    def __init__(self, V=5):
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V))
        self.asked = []

    def text_logits(self, prefix, ids=None):
        self.asked.append(ids)
        first = prefix[:, -1:]  # the prefix holds logits
        return first if ids is None else torch.cat([first, self.table[ids]], 1)


# <bos> words <eos> <pad>, of unequal lengths; the last row is full
TARGET = torch.tensor([[1, 4, 2, 0, 0], [1, 3, 4, 2, 0], [1, 3, 3, 4, 2]])


def test_text_loss_is_the_mean_over_each_texts_words():
    from recon_loss import text_loss

    torch.manual_seed(0)
    model, prefix = Bigrams(), 4 * torch.randn(3, 2, 5)
    means = []
    for row, words in enumerate([[4, 2], [3, 4, 2], [3, 3, 4, 2]]):
        scores, total = prefix[row, -1], 0.0
        for word in words:
            total -= math.log(math.exp(scores[word]) / sum(math.exp(s) for s in scores))
            scores = model.table[word]
        means.append(total / len(words))
    law = "of each text the mean of -log p(word) over its words and <eos>: 2, 3 and 4 here"
    loss = text_loss(model, prefix, TARGET)
    assert loss.shape == (3,), f"a loss for each of the 3 texts, not of shape {tuple(loss.shape)}"
    assert_close(loss, torch.tensor(means), law)
    assert all(1 not in ids for ids in model.asked if ids is not None), (
        "<bos> is not read again: the prefix stands in its place"
    )
    one = text_loss(model, prefix[:1], TARGET[:1])
    padded = text_loss(model, prefix[:1], TARGET[:1, :3])
    assert_close(one, padded, "more <pad> changes nothing")


def test_text_loss_by_hand():
    """The worked example of the text: a word that has half of the probability, <eos> a quarter."""
    from recon_loss import text_loss

    model = Bigrams()
    with torch.no_grad():
        model.table.zero_()
        model.table[4] = torch.tensor([1.0, 1, 2, 2, 2]).log()  # after word 4: <eos> 2 of 8
    prefix = torch.tensor([1.0, 1, 1, 1, 4]).log().view(1, 1, 5)  # first: word 4 has 4 of 8
    loss = text_loss(model, prefix, TARGET[:1])
    assert_close(loss, torch.tensor([1.03972]), "(ln 2 + ln 4) / 2")


def test_text_loss_learns():
    from recon_loss import text_loss

    model, prefix = Bigrams(), torch.randn(3, 2, 5, requires_grad=True)
    text_loss(model, prefix, TARGET).sum().backward()
    assert_learns(model.table, "what the model answers")
    assert_learns(prefix, "the prefix")
    law = "the gradient of a first row of logits: (softmax - one hot) / words of its text"
    p = prefix.detach()[:, -1].softmax(-1)
    wanted = torch.stack([p[0] - torch.eye(5)[4], p[1] - torch.eye(5)[3], p[2] - torch.eye(5)[3]])
    assert_close(prefix.grad[:, -1], wanted / torch.tensor([[2.0], [3.0], [4.0]]), law)
    gradient = model.table.grad.abs().sum(1) > 0
    message = "words that are followed by a word: 3 and 4, not <bos>, <eos> or <pad>"
    assert gradient.tolist() == [False, False, False, True, True], message


def test_text_loss_is_computed_in_float32():
    from recon_loss import text_loss

    model, prefix = Bigrams(), torch.randn(3, 2, 5)
    expected = text_loss(model, prefix, TARGET)
    loss = text_loss(model.to(torch.bfloat16), prefix.to(torch.bfloat16), TARGET)
    assert loss.dtype == torch.float32, f"logits are cast to float32 first, not {loss.dtype}"
    assert_close(loss, expected, "bfloat16 logits change little", 0.05)


def test_text_loss_of_the_model():
    """Needs text_logits."""
    from recon_loss import text_loss
    from small import random_captions

    model, prefix = make_model("mask"), torch.randn(B, T, D, requires_grad=True)
    ids = random_captions()
    loss = text_loss(model, prefix, ids)
    log_p = [model.text_logits(prefix, ids[:, 1 : k + 1])[:, -1].log_softmax(-1) for k in range(4)]
    chosen = [log_p[k][b, ids[b, k + 1]] for k in range(4) for b in range(B)]
    law = "three words and <eos>, each from those before it"
    assert_close(loss, -torch.stack(chosen).view(4, B).mean(0), law)
    loss.sum().backward()
    assert_learns(prefix, "the prefix")
    for name, p in model.blocks.named_parameters():
        assert_learns(p, f"blocks.{name}")
