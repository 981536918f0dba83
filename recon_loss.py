"""Where is the reconstruction loss? Here: `recon_loss`, and everything between the image and the scalar is in this file.

Reconstruction Alignment (RecA, arXiv 2509.07295) asks a model to draw an image again from what its own understanding
encoder saw of it: its visual words (see model.py). No caption is used. Left of the bar is the prefix, the loss is right of it:

    t2i     caption words  | image             image_loss   pre-training
    recon   visual words   | image             image_loss   RecA: the same loss with another prefix, for every paradigm
    t2t     caption words  | another wording   text_loss    the language side
    i2t     visual words   | caption           text_loss    understanding; keeps it alive where weights are shared

Flow convention, here and everywhere: x_t = t * image + (1 - t) * noise. t = 0 is noise, t = 1 the image, and
velocity = image - noise points from noise to image.
# B batch, T prefix length, K visual words, N image positions, D width, V words, P pixels of a patch
"""
import math

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F

from data import BOS, EOS, PAD, SPECIALS, WORDS
from model import patchify

LOGIT_NORMAL_MEAN = -1.0  # t = sigmoid(N(mean, std)); arXiv 2511.13720 has -0.8. Layout and color are decided at small t
LOGIT_NORMAL_STD = 1.0
MIN_ONE_MINUS_T = 0.1     # the velocity loss weighs by 1 / (1 - t)^2, which has to stay finite; 0.05 in arXiv 2511.13720
MLP_REPEATS = 2           # mar: times and noises for each patch; with two draws of each image four, as in arXiv 2406.11838, appendix B
DROP = 0.1                # share of conditions dropped for classifier-free guidance, arXiv 2207.12598
TEMPLATES = 0             # recon: one of so many templates, drawn at random, stands in the place of the last visual words (arXiv 2509.07295)
RANK, WORLD = 0, 1        # of this process; how many share a batch (train.py): the mean of their losses is the loss of the batch

def recon_loss(model, encoder, images, train_connector=False, features=None):
    """RecA, arXiv 2509.07295: -log p(image | what the understanding encoder sees of it). images (B, 3, H, W) -> scalar.

    Nothing on the condition's side gets a gradient: not the encoder, not the connector, not through it the word embeddings,
    lest words drift to new meanings. `train_connector` lets the last two learn (photographs, where captions taught too little).
    """
    learns = train_connector or model.cfg.condition != "words"
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        prefix = with_template(model, recon_prefix(model, encoder, images, features))  # (B, T, D)
    return image_loss(model, prefix, images)

def recon_prefix(model, encoder, images, features=None):
    """RecA's prefix: visual words. Or, in the controls of the paper's figure 12, what an image can be copied from. (B, 3, H, W) -> (B, T, D)."""
    if model.cfg.condition == "words":
        return model.visual_prefix(see(model, encoder, images, features))
    if model.cfg.condition == "pixels":
        return model.raw_prefix(patchify(images, model.cfg.patch_size))
    with torch.no_grad():
        features = encoder(model.for_encoder(images)).patch_tokens if features is None else features.to(images.dtype)
    return model.raw_prefix(features)

def t2i_loss(model, caption, images):
    """-log p(image | caption): pre-training. caption (B, T), images (B, 3, H, W) -> scalar."""
    return image_loss(model, model.text_prefix(caption), images)

def see(model, encoder, images, features=None):
    """Images (B, 3, H, W), or their features where they were computed before -> visual words (B, K, V). The encoder is frozen, always."""
    with torch.no_grad():                                                        # (B, tokens, D_enc)
        features = encoder(model.for_encoder(images)).patch_tokens if features is None else features.to(images.dtype)
    return model.visual_words(features)

def with_template(model, prefix):
    """Prefixes (B, T, D) that end with `make the`, or another of TEMPLATES such pairs of words: what the paper's models read after the features."""
    if not TEMPLATES:
        return prefix
    pairs = torch.tensor([[(SPECIALS + WORDS).index(word) for word in (verb, "the")] for verb in ("make", "add", "remove", "move")], device=prefix.device)
    drawn = mine(torch.randint(TEMPLATES, (len(prefix) * WORLD,), device=prefix.device))
    return torch.cat([prefix[:, :-2], model.text_prefix(pairs[drawn]).to(prefix)], 1)

def own_caption(model, encoder, batch):
    """The likeliest visual words of a batch's images, as a caption: <bos> words (B, T)."""
    with torch.no_grad():
        return F.pad(see(model, encoder, batch["image"], batch.get("features")).argmax(-1), (1, 0), value=BOS)

def image_loss(model, prefix, images):
    """The model's own image loss after a prefix, with one condition in ten dropped. (B, T, D), (B, 3, H, W) -> scalar."""
    draws = 1 if model.image.causal else model.cfg.draws                         # more than one, as MAR has for its head, where there is chance
    images = images.repeat_interleave(draws, 0)
    return IMAGE_LOSS[model.cfg.paradigm](model, drop_prefix(model, prefix, DROP), images)

def text_loss(model, prefix, target):
    """Next-word cross-entropy; <pad> is not predicted. prefix (B, T, D), target (B, T): <bos> words <eos> <pad>."""
    words = target[:, 1:]                                                        # (B, T - 1), without <bos>
    logits = model.text_logits(prefix, words[:, :-1])                            # (B, T - 1, V)
    return mean_where(words != PAD, F.cross_entropy(logits.transpose(1, 2).float(), words, reduction="none"))

def drop_prefix(model, prefix, p):
    """Each prefix (T, D) of the batch becomes the empty condition with chance p."""
    null = null_prefix(model)                                                    # (1, T, D)
    keep = mine(torch.rand(len(prefix) * WORLD, 1, 1, device=prefix.device)) >= p
    return torch.where(keep, prefix, null.to(prefix.dtype))

def null_prefix(model):
    """The empty condition (1, T, D): <bos> <eos> <pad> ..."""
    return model.text_prefix(torch.tensor([[BOS, EOS] + [PAD] * (model.cfg.text_len - 2)], device=model.device))

# ----------------------------------- image_loss, by paradigm: prefix (B, T, D), images (B, 3, H, W) in [0, 1] -> scalar

def flow_loss(model, prefix, images):
    """flow: E |v_pred - v|^2 over all patches, all at one time."""
    x = patchify(images, model.cfg.patch_size)                                   # (B, N, P)
    x_t, t = noised(x, False, model.cfg.noise_scale)
    x_pred = model.predict_image(prefix, x_t, t[:, 0, 0])                        # (B, N, P)
    return velocity_error(x_pred, x, t).mean()

def ar_loss(model, prefix, images):
    """ar: -sum_i log p(code_i | prefix, codes before it) / N, as LlamaGen (arXiv 2406.06525) and Janus-Pro (2501.17811)."""
    codes = model.tokenizer.encode(images)                                       # (B, N)
    before = F.pad(codes[:, :-1], (1, 0), value=model.cfg.codes)                 # (B, N): [MASK], then all but the last
    logits = model.predict_image(prefix, before)                                 # (B, N, C)
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

def mask_loss(model, prefix, images):
    """mask: -log p(code_i | prefix, codes not masked), mean over the masked, no shift; a share cos(pi u / 2) is masked,
    u ~ U(0, 1) (MaskGIT, arXiv 2202.04200, eq. 1 and section 3.3; Show-o, arXiv 2408.12528)."""
    codes = model.tokenizer.encode(images)                                       # (B, N)
    ratio = torch.cos(math.pi / 2 * mine(torch.rand(len(codes) * WORLD, 1, device=codes.device)))
    masked = random_mask(codes.shape[1], ratio)                                  # (B, N)
    logits = model.predict_image(prefix, codes.masked_fill(masked, model.cfg.codes))  # (B, N, C)
    return mean_where(masked, F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none"))

def mar_loss(model, prefix, images):
    """mar: E |v_pred - v|^2 of each masked patch by itself, given the transformer's state there (arXiv 2406.11838, eq. 1, as a flow). The masked share
    is uniform; there it is at least 0.7, which of nine patches leaves two to be seen, and drawing passes through all shares: objects were miscounted.
    Each state serves MLP_REPEATS times: times and noise are cheap."""
    x = patchify(images, model.cfg.patch_size)                                   # (B, N, P)
    ratio = mine(torch.rand(len(x) * WORLD, 1, device=x.device))                 # (B, 1)
    masked = random_mask(x.shape[1], ratio)                                      # (B, N)
    h = model.predict_image(prefix, x, masked)                                   # (B, N, D)
    x, h, masked = (y.repeat_interleave(MLP_REPEATS, 0) for y in (x, h, masked))
    x_t, t = noised(x, True, model.cfg.noise_scale)
    x_pred = model.image.flow_mlp(x_t, t[..., 0], h)                             # (2 B, N, P)
    return mean_where(masked, velocity_error(x_pred, x, t).mean(-1))

IMAGE_LOSS = {"flow": flow_loss, "ar": ar_loss, "mask": mask_loss, "mar": mar_loss}

def interpolate(image, noise, t):
    """x_t = t * image + (1 - t) * noise: the straight path of rectified flow (arXiv 2209.03003, eq. 1)."""
    return t * image + (1 - t) * noise

def velocity_error(x_pred, x, t):
    """(v_pred - v)^2 with v = (x - x_t) / (1 - t), so (x_pred - x)^2 / (1 - t)^2, its denominator kept off zero (arXiv 2511.13720, eq. 6). (B, N, P)."""
    return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2

def noised(x, per_token, noise_scale):
    """Clean patches (B, N, P) -> x_t and its t, logit-normal (arXiv 2403.03206): one t an image (B, 1, 1), or a patch (B, N, 1)."""
    u = torch.rand(len(x) * WORLD, x.shape[1] if per_token else 1, 1, device=x.device)
    u = mine((u.argsort(0) + torch.rand_like(u)) / len(u))  # one in each of B equal strata: less noise in the gradient, arXiv 2107.00630, I.1
    t = torch.sigmoid(LOGIT_NORMAL_MEAN + LOGIT_NORMAL_STD * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    noise = mine(torch.randn(len(x) * WORLD, *x.shape[1:], device=x.device, dtype=x.dtype))
    return interpolate(x, noise * noise_scale, t), t

def random_mask(N, ratio):
    """Shares (B, 1) in (0, 1] -> (B, N) bool: that many positions, rounded up, drawn at random."""
    order = mine(torch.rand(len(ratio) * WORLD, N, device=ratio.device)).argsort(1)  # each row a permutation
    return order < (ratio * N).ceil().clamp(min=1)

def mine(rows):
    """Of random rows drawn for the whole batch, by the same seed in each process, those of this process: how many there are changes nothing."""
    return rows.chunk(WORLD)[RANK]

def mean_where(mask, values):
    """The mean of the values where mask is true, over the whole batch: processes have unequal numbers of words. Both of one shape."""
    count = mask.sum()
    if WORLD > 1:
        count = collectives.all_reduce(count, "sum", torch.distributed.group.WORLD) / WORLD
    return (values * mask).sum() / count

# ---- What the condition's side learns from: the connector, the tokenizer, and an encoder from scratch with its throw-away text tower

def words_loss(words, canonical):
    """-log p(word k of the canonical description | image), mean over the places asked for: parallel prediction (CapPa, arXiv 2306.07915, section 3).
    words (B, K, V), canonical (B, T), data.ANY where nothing is asked. Not in RecA's paper, whose language models read loose features; here it makes visual words language."""
    return F.nll_loss(words.clamp(min=1e-9).log().flatten(0, 1), canonical[:, 1:].flatten())

def caption_loss(logits, caption):
    """-log p(caption | patch tokens), CoCa's captioning loss (arXiv 2205.01917, eq. 2). logits (B, T, V), caption (B, T)."""
    words = caption[:, 1:]
    return mean_where(words != PAD, F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), words, reduction="none"))

def contrast_loss(image, text, log_scale, bias):
    """-1/B sum_ij log sigmoid(y_ij (s <image_i, text_j> + b)), y = 1 for pairs, else -1 (arXiv 2303.15343, eq. 1). Both (B, P)."""
    if WORLD > 1:  # against the captions of all processes
        text = collectives.all_gather_tensor_autograd(text.contiguous(), 0, torch.distributed.group.WORLD)
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * log_scale.exp() + bias  # (B, B)
    y = 2 * mine(torch.eye(len(text), device=image.device)) - 1
    return -F.logsigmoid(y * logits).sum(1).mean()

def total_loss(model, encoder, batch, weights, tower=None, captions="caption", train_connector=False):
    """The weighted sum of the terms with a positive weight, and each term by itself: (scalar, {term: scalar}).

    batch     {"main", "understand", "replay"}: dictionaries as the data sets make them; a term reads only its own
    weights   {term: weight}. RecA itself is {"recon": 1}: it reads batch["main"]["image"] alone
    captions  what t2i reads: "caption" (sparse), "full" (dense) or "own": the likeliest visual words, the model's own caption
    """
    on = {term for term, weight in weights.items() if weight > 0}
    main, understand, replay = (batch.get(name) for name in ("main", "understand", "replay"))
    features = words = text = logits = None
    if on & {"caption", "contrast"}:                                             # an encoder from scratch learns
        features = encoder(understand["image"])
        text, logits = tower(understand["full"], features.patch_tokens)          # (B, P), (B, T, V)
        words = model.visual_words(features.patch_tokens)                        # (B, K, V)
    elif on & {"i2t", "words"}:
        words = see(model, encoder, understand["image"], understand.get("features"))
    terms = {
        "t2i": lambda: t2i_loss(model, own_caption(model, encoder, main) if captions == "own" else main[captions], main["image"]),
        "recon": lambda: recon_loss(model, encoder, main["image"], train_connector, main.get("features")),
        "replay": lambda: t2i_loss(model, replay["caption"], replay["image"]),
        "i2t": lambda: text_loss(model, model.visual_prefix(words), understand["wording"]),
        "t2t": lambda: text_loss(model, model.text_prefix(understand["question"]), understand["answer"]),
        "caption": lambda: caption_loss(logits, understand["full"]),
        "contrast": lambda: contrast_loss(features.pooled, text, tower.log_scale, tower.bias),
        "words": lambda: words_loss(words, understand["canonical"]),
        "tokenizer": lambda: F.mse_loss(model.tokenizer(main["image"]), main["image"]),
    }
    assert on and weights.keys() <= terms.keys(), f"no positive weight, or an unknown term: {weights}; known: {', '.join(terms)}"
    parts = {term: value() for term, value in terms.items() if term in on}
    loss = sum(weights[term] * part for term, part in parts.items())
    return loss, parts  # detached by the caller: of a loss that is its only term, torch.compile would detach both
