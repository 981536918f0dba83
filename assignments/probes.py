"""What a blank computes for inputs that nobody has seen: the part of a grade that cannot be forged.

    PYTHONPATH=.. python probes.py SEED NAME...     # answers of the program in the folder above

A probe calls a blank with random inputs and yields what comes out, piece by piece. grade.py copies
this file beside the tests and runs it twice with the same seed: in the process of the student's
code, and in one with the reference alone. Neither tests nor expected values are needed, so there
is nothing that a student's code could read or change to be right.

# B batch, T prefix length, N image positions, V words, C codes, D width, P values of a patch
"""

import json
import math
import sys
from types import SimpleNamespace

import torch

from small import ENCODER_WIDTH, SIZES, B, C, D, N, P, T, V

PARADIGMS = ("flow", "ar", "mask", "mar")


# ---------------------------------------------------------------- 1: the encoder


def encoder_attention():
    from encoder import Attention

    attention = randomise(Attention(20, 5, True))
    x = learnable(2, 7, 20)
    out = attention(x)
    yield "output", out
    yield "gradients", gradients(out, attention, x=x)


def encoder_vit():
    from encoder import POOLS

    for pool in POOLS:
        has_cls = pool in ("cls", "none")
        changes = dict(cls_token=has_cls, registers=2, fc_norm=pool == "mean")
        encoder = random_encoder(pool=pool, norm_pre=pool == "cls", out_width=6, **changes)
        images = random_images(2, 12, 8)
        features = encoder(images)
        yield f"{pool}: patch_tokens", features.patch_tokens
        yield f"{pool}: cls_token", features.cls_token
        yield f"{pool}: pooled", features.pooled
        yield f"{pool}: gradients", gradients(features.patch_tokens, encoder)
    encoder = random_encoder()
    yield "a wrong size", error_of(encoder, random_images(2, 13, 12))


def position_embeddings():
    from encoder import RESIZES

    for how in RESIZES:
        encoder = random_encoder(image_size=16, pos_resize=how)
        for rows, cols in ((4, 4), (2, 3), (7, 4), (2, 8)):
            out = encoder.position_embeddings(rows, cols)
            yield f"{how}, {rows} x {cols}", out
            yield f"{how}, {rows} x {cols}: gradients", gradients(out, encoder)


def rename_keys():
    from pretrained import rename_keys

    block = int(torch.randint(2, 30, ()))
    names = [
        f"vision_model.encoder.layers.{block}.self_attn.q_proj.weight",
        f"vision_model.encoder.layers.{block}.layer_norm2.bias",
        "visual_projection.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.unheard.of",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "logit_scale",
    ]
    tensors = {name: random(3) for name in names}
    renamed = rename_keys(tensors)
    yield "names", sorted(renamed)
    yield "tensors", [renamed[name] for name in sorted(renamed)]
    timm = {f"blocks.{block}.mlp.fc1.weight": random(2), "head.weight": random(2)}
    yield "another layout", sorted(rename_keys(timm))
    twice = {"cls_token": random(1), "class_token": random(1)}
    yield "two names of one tensor", error_of(rename_keys, twice)
    yield "nothing", sorted(rename_keys({}))


# ---------------------------------------------------------------- 2: the transformer


def model_attention():
    from model import Attention, KVCache, ModelConfig

    attention = randomise(Attention(12, 3))
    x = learnable(2, 5, 12)
    mask = torch.rand(5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    yield "all to all", attention(x)
    out = attention(x, mask=mask)
    yield "a random mask", out
    yield "gradients", gradients(out, attention, x=x)
    cross = randomise(Attention(12, 3, 8))
    yield "context", cross(x, context=random(2, 4, 8))
    cfg = ModelConfig(**SIZES | dict(width=12))
    cache = KVCache(cfg, 2, 9, "cpu", torch.float32)
    with torch.no_grad():
        for layer in (1, 0):
            first = random(2, 3, 12)
            yield f"cache, layer {layer}, first", attention(first, cache=cache, layer=layer)
        cache.length = 3
        for layer in (0, 1):
            yield f"cache, layer {layer}, then", attention(x[:, 3:], cache=cache, layer=layer)


def prefix_mask():
    from model import prefix_mask

    for repeats in (1, 2, 3):
        length, image = torch.randint(2, 7, (2,)).tolist()
        for causal in (False, True):
            mask = prefix_mask(length, image, repeats, causal, "cpu")
            yield f"{repeats} repeats, {causal=}", mask


def predict_image():
    for paradigm in PARADIGMS:
        model = random_model(paradigm)
        for repeats in (1, 3):
            prefix = learnable(B, T, D)
            out = model.predict_image(prefix, *image_inputs(paradigm, B * repeats))
            yield f"{paradigm}, {repeats} repeats", out
        yield f"{paradigm}: gradients", gradients(out, model, prefix=prefix)


def text_logits():
    for paradigm in ("flow", "mask"):
        model = random_model(paradigm)
        prefix, ids = learnable(B, T, D), torch.randint(V, (B, 4))
        yield f"{paradigm}, no words yet", model.text_logits(prefix)
        logits = model.text_logits(prefix, ids)
        yield f"{paradigm}, after words", logits
        yield f"{paradigm}: gradients", gradients(logits, model, prefix=prefix)
        short = model.text_logits(prefix[:, :3], ids[:, :1])
        yield f"{paradigm}, a short prefix", short


def predict_image_cached():
    for paradigm in PARADIGMS:
        model = random_model(paradigm)
        with torch.no_grad():
            cache = model.prefill(random(B, T, D), max_new_tokens=N)
            for step in (1, 2, 3):
                inputs = image_inputs(paradigm, B)
                if paradigm == "ar":
                    inputs = [inputs[0][:, :1]]
                out = model.predict_image_cached(cache, *inputs)
                yield f"{paradigm}, step {step}", out
            yield f"{paradigm}: length of the cache", cache.length


# ---------------------------------------------------------------- 3: flow


def interpolate():
    from paradigms import interpolate

    image, noise = random(B, N, P), random(B, N, P)
    for shape in ((B, 1, 1), (B, N, 1), ()):
        t = torch.rand(shape)
        yield f"t of shape {shape}", interpolate(image, noise, t)
    image, noise = learnable(B, N, P), learnable(B, N, P)
    out = interpolate(image, noise, t)
    yield "gradients", gradients(out, image=image, noise=noise)


def velocity_squared_error():
    from paradigms import velocity_squared_error

    x = random(B, N, P)
    for low, high in ((0.0, 0.8), (0.9, 1.0)):
        t = low + (high - low) * torch.rand(B, N, 1)
        x_pred = learnable(B, N, P)
        out = velocity_squared_error(x_pred, x, t)
        yield f"t from {low} to {high}", out
        yield f"t from {low} to {high}: gradients", gradients(out.sqrt(), x_pred=x_pred)


def flow_loss():
    model = random_model("flow", noise_scale=1.7)
    for batch in (2, 5):
        images, prefix = random_images(batch, 12, 12), learnable(batch, T, D)
        reseed()
        loss = model.paradigm.loss(model, prefix, images)
        yield f"batch {batch}", loss
        yield f"batch {batch}: gradients", gradients(loss, model, prefix=prefix)


def drop_prefix():
    from paradigms import null_prefix
    from recon_loss import drop_prefix

    model = random_model("flow")
    prefix = learnable(B, T, D)
    for p in (0.0, 1.0):
        out = drop_prefix(model, prefix, p)
        yield f"p = {p}", out
        yield f"p = {p}: gradients", gradients(out, model, prefix=prefix)
    many, empty = random(4000, T, D), null_prefix(model)
    for p in (0.3, 0.8):
        out = drop_prefix(model, many, p)
        dropped = (out == empty).flatten(1).all(1)
        kept = (out == many).flatten(1).all(1)
        yield f"p = {p}: every condition whole", bool((dropped ^ kept).all())
        yield f"p = {p}: share", bool(abs(dropped.float().mean() - p) < 0.05)
        halves = [half.float().mean() for half in dropped.chunk(2)]
        yield f"p = {p}: at random", bool(max(abs(half - p) for half in halves) < 0.06)


def cfg_predict():
    from paradigms import cfg_predict

    weight = random(D, D)

    def predict(x, bias):
        # the second half stands for the empty condition
        half = torch.arange(len(x)) >= B
        return torch.tanh(x @ weight + bias) + half[:, None] * x

    for scale in (0.0, 0.4, 1.0, 2.5, -1.0):
        x, bias = learnable(B, D), learnable(B, 1)
        out = cfg_predict(predict, scale, x, bias)
        yield f"s = {scale}", out
        yield f"s = {scale}: gradients", gradients(out, x=x, bias=bias)
    yield "one input", cfg_predict(lambda x: torch.sin(x).cumsum(0), 3.0, random(B, D))


def euler_sample():
    from paradigms import euler_sample

    weight = random(P, P) / P**0.5
    for steps, eta in ((1, 0.0), (4, 0.0), (4, 1.0), (7, 0.6), (3, 0.25)):
        fresh = iter(random(10, B, N, P) * 1.5)
        times = []

        def predict(x_t, t, times=times):
            times.append(t)
            return torch.tanh(x_t @ weight + t)

        out = euler_sample(predict, lambda fresh=fresh: next(fresh), steps, eta)
        yield f"{steps} steps, eta = {eta}", out
        yield f"{steps} steps, eta = {eta}: times", [t.flatten()[:1] for t in times]


# ---------------------------------------------------------------- 4: visual words and RecA


def connector():
    for count in (5, 8):
        connector = random_model("flow").connector
        tokens = learnable(B, count, ENCODER_WIDTH)
        logits = connector(tokens)
        yield f"{count} tokens", logits
        yield f"{count} tokens: gradients", gradients(logits, connector, tokens=tokens)


def visual_prefix():
    for paradigm in ("flow", "mask"):
        model = random_model(paradigm)
        words = random(B, T - 1, V).softmax(-1).requires_grad_(True)
        prefix = model.visual_prefix(words)
        yield f"{paradigm}: prefix", prefix
        yield f"{paradigm}: gradients", gradients(prefix, model, words=words)
        few = random(3, 2, V).softmax(-1)
        yield f"{paradigm}: two words", model.visual_prefix(few)


def encode_visual_words():
    for size in (0, 18):
        model = random_model("flow", encoder_size=size)
        encoder = random_stub()
        words = model.encode_visual_words(encoder, random_images(B, 12, 12))
        yield f"encoder_size {size}", words
        yield f"encoder_size {size}: gradients", gradients(words, model)
        yield f"encoder_size {size}: the encoder's", gradients(words, encoder.proj)
    features = random(B, 6, ENCODER_WIDTH)
    words = model.encode_visual_words(None, random_images(B, 12, 12), features)
    yield "features", words
    yield "features: gradients", gradients(words, model)


def recon_loss():
    from recon_loss import recon_loss

    for paradigm, repeats in (("flow", 1), ("flow", 3), ("ar", 1)):
        model = random_model(paradigm, repeats_per_image=repeats)
        model.cond_drop = 0.4
        encoder = random_stub()
        for features in (None, random(B, 6, ENCODER_WIDTH)):
            case = f"{paradigm}, {repeats} repeats, {'images' if features is None else 'features'}"
            images = random_images(B, 12, 12)
            reseed()
            loss = recon_loss(model, encoder, images, features)
            yield case, loss
            yield f"{case}: gradients", gradients(loss, model)
            yield f"{case}: the encoder's", gradients(loss, encoder.proj)


def text_loss():
    from recon_loss import text_loss

    for paradigm in ("flow", "mask"):
        model = random_model(paradigm)
        prefix = learnable(3, T, D)
        target = torch.randint(4, V, (3, T))
        target[:, 0] = 1
        for row, length in enumerate((2, 4, T - 1)):
            target[row, length] = 2
            target[row, length + 1 :] = 0
        loss = text_loss(model, prefix, target)
        yield f"{paradigm}: unequal lengths", loss
        yield f"{paradigm}: gradients", gradients(loss.mean(), model, prefix=prefix)


PROBES = {
    "encoder.Attention.forward": encoder_attention,
    "encoder.ViT.forward": encoder_vit,
    "encoder.ViT.position_embeddings": position_embeddings,
    "pretrained.rename_keys": rename_keys,
    "model.Attention.forward": model_attention,
    "model.prefix_mask": prefix_mask,
    "model.UnifiedModel.predict_image": predict_image,
    "model.UnifiedModel.text_logits": text_logits,
    "model.UnifiedModel.predict_image_cached": predict_image_cached,
    "paradigms.interpolate": interpolate,
    "paradigms.velocity_squared_error": velocity_squared_error,
    "paradigms.Flow.loss": flow_loss,
    "recon_loss.drop_prefix": drop_prefix,
    "paradigms.cfg_predict": cfg_predict,
    "paradigms.euler_sample": euler_sample,
    "model.Connector.forward": connector,
    "model.UnifiedModel.visual_prefix": visual_prefix,
    "model.UnifiedModel.encode_visual_words": encode_visual_words,
    "recon_loss.recon_loss": recon_loss,
    "recon_loss.text_loss": text_loss,
}


# ---------------------------------------------------------------- random inputs


def random(*shape):
    return torch.randn(shape)


def learnable(*shape):
    """Random inputs that a gradient has to reach."""
    return random(*shape).requires_grad_(True)


def random_images(count, height, width):
    """(count, 3, height, width) in [0, 1]."""
    return torch.rand(count, 3, height, width)


def reseed():
    """Before a blank that draws: whatever was drawn until here, it draws the same."""
    torch.manual_seed(torch.initial_seed())


def randomise(module):
    """A module with every weight random: zeros would hide what flows through."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.eval()


def random_encoder(**changes):
    from encoder import ViT, ViTConfig

    sizes = dict(image_size=12, patch_size=4, width=20, depth=1, heads=5, mlp_width=8)
    return randomise(ViT(ViTConfig(**sizes | changes)))


def random_model(paradigm, **changes):
    from model import ModelConfig, UnifiedModel

    sizes = SIZES | dict(connector_depth=2, paradigm=paradigm)
    return randomise(UnifiedModel(ModelConfig(**sizes | changes)))


def random_stub():
    """Stands in for an encoder: a linear map of patches of 6 x 6 pixels. proj: its weights."""
    from paradigms import patchify

    proj = torch.nn.Linear(3 * 6**2, ENCODER_WIDTH)

    def encoder(images):
        tokens = proj(patchify(images, 6))
        return SimpleNamespace(patch_tokens=tokens, cls_token=None, pooled=tokens.mean(1))

    encoder.proj = proj
    return encoder


def image_inputs(paradigm, batch):
    """What the image positions of a paradigm hold: the arguments of its `embed`."""
    if paradigm == "flow":
        return [random(batch, N, P), torch.rand(batch)]
    if paradigm == "mar":
        return [random(batch, N, P), torch.rand(batch, N) < 0.5]
    return [torch.randint(C + 1, (batch, N))]


# ---------------------------------------------------------------- answers


def gradients(out, module=None, **inputs):
    """{parameter or input: the norm of its gradient} of a random projection of `out`."""
    named = dict(module.named_parameters()) if module is not None else {}
    named |= {name: x for name, x in inputs.items() if x.requires_grad}
    if not out.requires_grad:
        return {name: 0.0 for name in named}
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) + 1.5
    found = torch.autograd.grad(
        (out * weight).sum(), list(named.values()), allow_unused=True, retain_graph=True
    )
    norms = [0.0 if g is None else g.norm() for g in found]
    return dict(zip(named, norms, strict=True))


def error_of(function, *args):
    """The name of the error that a call raises, or that it raises none."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__
    return "no error"


def answers(name, seed):
    """{what: plain lists, numbers, strings} of a blank; an error ends it, and is its last."""
    torch.manual_seed(seed)
    found = {}
    try:
        for what, value in PROBES[name]():
            found[what] = plain(value)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def plain(value):
    """Tensors as {kind, shape, values}, rounded to what float32 holds; others as JSON has them."""
    if isinstance(value, torch.Tensor):
        values = [round_float(x) for x in value.detach().double().flatten().tolist()]
        kind = "bool" if value.dtype == torch.bool else "numbers"
        return {"kind": kind, "shape": list(value.shape), "values": values}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__name__}, not a tensor"


def round_float(x):
    return float(f"{x:.7g}") if math.isfinite(x) else str(x)


def main():
    seed, *names = sys.argv[1:]
    print(json.dumps({name: answers(name, int(seed)) for name in names}))


if __name__ == "__main__":
    main()
