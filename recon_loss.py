"""Where is the reconstruction loss? Here: `recon_loss`, and beside it every other loss.

Reconstruction Alignment (RecA, arXiv 2509.07295) asks a model to generate an image again from what
its own understanding encoder saw of it: its visual words (model.py). No caption is used. What is
left of the bar is the prefix, the loss is right of it:

    t2i     caption words  | image             image_loss   pre-training
    recon   visual words   | image             image_loss   RecA: the same loss with another prefix
    t2t     caption words  | another wording   text_loss    the language side
    i2t     visual words   | caption           text_loss    understanding; kept alive by it

The image loss itself, E |v_pred - v|^2 for flow, is the `loss` of each class in paradigms.py.

# B batch, T prefix length, K visual words, D width, V words, D_enc width of the encoder
"""

import torch
import torch.nn.functional as F

from paradigms import masked_mean, null_prefix
from words import IGNORE_INDEX, PAD


def recon_loss(model, encoder, images, features=None):
    """RecA: -log p(image | what the understanding encoder sees of it). arXiv 2509.07295.

    images (B, 3, H, W) in [0, 1] -> scalar. features: the encoder's patch tokens, if known. Nothing
    on the condition's side gets a gradient: not the encoder, not the connector, not the word
    embeddings that it reads, or the words would drift to new meanings.
    """
    with torch.no_grad():
        prefix = model.recon_prefix(encoder, images, features)  # (B, T, D): <bos> visual words
    return image_loss(model, prefix, images)


def t2i_loss(model, caption, images):
    """Pre-training: -log p(image | caption). caption (B, T), images (B, 3, H, W) -> scalar."""
    prefix = model.text_prefix(caption)  # (B, T, D): <bos> caption words
    return image_loss(model, prefix, images)


def image_loss(model, prefix, images):
    """The loss of the model's paradigm behind a prefix (B, T, D), with some conditions dropped.

    images (B, 3, H, W) in [0, 1] -> scalar. Each gets `repeats_per_image` noises or masks, if any.
    """
    prefix = drop_prefix(model, prefix, model.cond_drop)
    if not model.paradigm.causal:
        images = images.repeat_interleave(model.cfg.repeats_per_image, 0)
    return model.paradigm.loss(model, prefix, images)


def drop_prefix(model, prefix, p: float):
    """Each prefix of the batch (B, T, D) becomes the empty condition with probability p.

    For classifier-free guidance, arXiv 2207.12598, algorithm 1.
    """
    keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
    return torch.where(keep, prefix, null_prefix(model).to(prefix.dtype))


def text_loss(model, prefix, target):
    """Next-word cross-entropy after a prefix (B, T, D), mean over each text's words without <pad>.

    target (B, T): <bos> words <eos> <pad> -> (B,).
    """
    words = target[:, 1:]  # (B, T - 1), without <bos>
    logits = model.text_logits(prefix, words[:, :-1])  # (B, T - 1, V)
    return word_cross_entropy(logits, words)


def caption_loss(logits, caption):
    """CoCa's captioning loss, -log p(caption | patch tokens) (arXiv 2205.01917, eq. 2).

    logits (B, T, V) of the text decoder, caption (B, T) -> (B,).
    """
    return word_cross_entropy(logits[:, :-1], caption[:, 1:])


def word_cross_entropy(logits, words):
    """Mean over the words of each text that are not <pad>. logits (B, S, V), words (B, S) -> (B,).

    By text, not over all words of the batch: so parts of a batch have the mean of the whole.
    """
    nll = F.cross_entropy(logits.transpose(1, 2).float(), words, reduction="none")  # (B, S)
    return masked_mean(words != PAD, nll)


def parallel_caption_loss(words, canonical_caption):
    """-log p(word k of the canonical caption | image): parallel prediction (arXiv 2306.07915).

    words (B, K, V): visual words, that is probabilities; canonical_caption (B, T), IGNORE_INDEX
    where a visual word is free -> (B,), the mean over the others. Not in RecA's paper, whose
    language models read features as they are; here it makes visual words language.
    """
    log_p = words.clamp(min=1e-9).log().transpose(1, 2)  # (B, V, K)
    target = canonical_caption[:, 1:]  # (B, K), without <bos>
    nll = F.nll_loss(log_p, target, reduction="none", ignore_index=IGNORE_INDEX)  # (B, K)
    return masked_mean(target != IGNORE_INDEX, nll)


def contrastive_loss(image, text, log_scale, bias):
    """SigLIP's loss, -1/B sum_ij log sigmoid(y_ij (s <image_i, text_j> + b)) (2303.15343, eq. 1).

    image, text (B, P) -> scalar. y is 1 for pairs and -1 for all else in the batch of this process.
    """
    cosine = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # (B, B)
    y = 2 * torch.eye(len(text), device=image.device) - 1
    return -F.logsigmoid(y * (cosine * log_scale.exp() + bias)).sum(1).mean()


def total_loss(model, encoder, batch, weights, text_decoder=None):
    """The weighted sum of the terms, and each term by itself: (scalar, {term: scalar}).

    batch    {"main", "understand", "replay"}: dictionaries as the data sets make them
    weights  {term: weight > 0}. RecA itself is {"recon": 1}: it reads batch["main"]["image"] alone
    """
    main = batch.get("main")
    understand = batch.get("understand")
    terms = {}

    if "t2i" in weights:
        terms["t2i"] = t2i_loss(model, main["caption"], main["image"])
    if "recon" in weights:
        terms["recon"] = recon_loss(model, encoder, main["image"], main.get("features"))
    if "replay" in weights:
        terms["replay"] = t2i_loss(model, batch["replay"]["caption"], batch["replay"]["image"])

    # understanding: a trained encoder is frozen, one from scratch learns to caption and to contrast
    if "caption" in weights or "contrast" in weights:
        features = encoder(understand["image"])
        text, logits = text_decoder(understand["full_caption"], features.patch_tokens)
        words = model.visual_words(features.patch_tokens)  # (B, K, V)
    elif "i2t" in weights or "words" in weights:
        features = understand.get("features")
        words = model.encode_visual_words(encoder, understand["image"], features)  # (B, K, V)

    # one pass for both: {term: (prefix, target)}
    texts = {}
    if "i2t" in weights:
        texts["i2t"] = model.visual_prefix(words), understand["caption_target"]
    if "t2t" in weights:
        texts["t2t"] = model.text_prefix(understand["question"]), understand["answer"]
    if texts:
        prefix, target = map(torch.cat, zip(*texts.values(), strict=True))
        losses = text_loss(model, prefix, target).chunk(len(texts))  # each (B,)
        terms |= {name: loss.mean() for name, loss in zip(texts, losses, strict=True)}
    if "caption" in weights:
        terms["caption"] = caption_loss(logits, understand["full_caption"]).mean()
    if "contrast" in weights:
        scale, bias = text_decoder.log_scale, text_decoder.bias
        terms["contrast"] = contrastive_loss(features.pooled, text, scale, bias)
    if "words" in weights:
        words_loss = parallel_caption_loss(words, understand["canonical_caption"])  # (B,)
        terms["words"] = words_loss.mean()
    if "tokenizer" in weights:
        terms["tokenizer"] = F.mse_loss(model.tokenizer(main["image"]), main["image"])

    unknown = weights.keys() - terms.keys()
    assert terms and not unknown, f"no term has a weight, or a term is unknown: {weights}"
    loss = sum(weights[name] * value for name, value in terms.items())
    return loss, terms
