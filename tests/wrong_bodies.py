"""Plausible mistakes in every blank of assignments/: each has to be caught by the tests of that blank.

    python tests/wrong_bodies.py 2            # tries those of assignment 2, prints which were caught, ends with 1 if one was not

A mistake is what it is in the field's words, then a piece of the real body, and what a student might write there.
"""
import __future__
import ast
import importlib
import inspect
import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
import pytest
from _pytest.runner import runtestprotocol

sys.path[:0] = [str(ROOT / "assignments"), str(ROOT), str(ROOT / "tests")]

from make import blanks_of, body_of, find, local, with_body  # noqa: E402

WRONG = {
    "encoder.Attention.forward": [
        ("queries and keys swapped", "q, k, v = rearrange", "k, q, v = rearrange"),
        ("heads are the inner axis", "(three h d)", "(three d h)"),
        ("no output projection", "self.proj(rearrange(x, \"b h t d -> b t (h d)\"))", "rearrange(x, \"b h t d -> b t (h d)\")"),
        ("a causal mask", "(q, k, v)", "(q, k, v, is_causal=True)"),
        ("scaled by the width, not the head's", "(q, k, v)", "(q, k, v, scale=x.shape[-1] ** -0.5)"),
    ],
    "encoder.ViT.forward": [
        ("pixels not normalised", "images[..., :rows * p, :cols * p] - self.mean) / self.std", "images[..., :rows * p, :cols * p])"),
        ("patches column by column", "-> b (h w)", "-> b (w h)"),
        ("position embeddings added twice", "+ self.position_embeddings(rows, cols)", "+ 2 * self.position_embeddings(rows, cols)"),
        ("channels last within a patch", "(c p q)", "(p q c)"),
        ("the class token counted among the patches", "x[:, self.prefix_tokens.shape[0]:]", "x[:, :rows * cols]"),
        ("no check of the images", "self.check(images)", "(images.shape[2] // p, images.shape[3] // p)"),
    ],
    "encoder.ViT.position_embeddings": [
        ("rows and columns swapped", "size=(rows, cols)", "size=(cols, rows)"),
        ("bilinear", 'mode="bicubic"', 'mode="bilinear"'),
        ("the publisher's offset left out", "rows + DINOV2_OFFSET", "rows"),
        ("no gradient through the resizing", "self.pos_embed.float()", "self.pos_embed.detach().float()"),
        ("transposed grid", '"(h w) d -> 1 d h w"', '"(w h) d -> 1 d h w"'),
    ],
    "encoder.rename": [
        ("unknown names skipped in silence", "        named[ours], origin[ours]", "        if NAMES.get(stem) is None and name not in NAMES.values():\n            continue\n        named[ours], origin[ours]"),
        ("the last of two names wins", "if ours in named:", "if False:"),
        ("the text tower is not left out", "if LEFT_OUT.match(theirs):", "if False:"),
        ("every block is block 0", "{match[1]}", "0"),
    ],
    "model.Attention.forward": [
        ("keys and values swapped", "k, v = rearrange", "v, k = rearrange"),
        ("heads are the inner axis", "(h d) -> b h s d", "(d h) -> b h s d"),
        ("the mask is left out", "attn_mask=mask", "attn_mask=None"),
        ("no scale", "attn_mask=mask", "attn_mask=mask, scale=1.0"),
        ("the context is ignored", "x if context is None else context", "x if context is None or context.shape[-1] != x.shape[-1] else x"),
        ("the cache is not read", "k, v = cache.extend(layer, k, v)", "cache.extend(layer, k, v)"),
    ],
    "model.prefix_mask": [
        ("off by one: nothing sees itself", ">= row", "> row"),
        ("the prefix sees the image", "return mine & (", "return (draw[:, None] == -1) | mine & ("),
        ("rows and columns swapped", "return mine & (", "return mine.T & ("),
        ("the prefix is bidirectional", "seen | (row[:, None] >= T)", "seen | True"),
        ("draws see each other", "mine = (draw == -1) | (draw[:, None] == draw)", "mine = torch.ones_like(draw, dtype=torch.bool)"),
        ("always full attention in the image", "seen if causal else ", ""),
    ],
    "model.UnifiedModel.predict_image": [
        ("image positions added twice", "+ self.places() ", "+ 2 * self.places() "),
        ("image positions left out", "+ self.places() ", " "),
        ("the prefix has no positions", "prefix + self.text_pos[:T]", "prefix"),
        ("states off by one", "h[:, T:]", "h[:, T - 1:-1]"),
        ("draws mixed with the batch", "b (draws n) d\", draws=draws)\n        x", "b (draws n) d\", b=len(prefix))[:, :].flip(0)\n        x"),
        ("the causal switch ignored", "self.image.causal", "False"),
    ],
    "model.UnifiedModel.text_logits": [
        ("off by one: from the word after the prefix", "prefix.shape[1] - 1:", "prefix.shape[1]:"),
        ("a word sees later words", "causal_mask(x.shape[1], x.device)", "None"),
        ("positions begin anew after the prefix", "x + self.text_pos[: x.shape[1]]", "x + torch.cat([self.text_pos[: prefix.shape[1]], self.text_pos[: x.shape[1] - prefix.shape[1]]])"),
        ("no positions", "x = x + self.text_pos[: x.shape[1]]", "x = x"),
    ],
    "model.UnifiedModel.predict_image_cached": [
        ("text positions instead of the image's", "self.places()[start: start + x.shape[1]]", "self.text_pos[start: start + x.shape[1]]"),
        ("the cache grows by every look", "if self.image.causal else 0", "if True else 0"),
        ("the cache never grows", "if self.image.causal else 0", "if False else 0"),
        ("every code at the first position", "start = cache.length - cache.prefix", "start = 0"),
    ],
    "recon_loss.interpolate": [
        ("swapped: t = 0 is the image", "t * image + (1 - t) * noise", "(1 - t) * image + t * noise"),
        ("noise not scaled down", "(1 - t) * noise", "noise"),
        ("variance-preserving instead of straight", "(1 - t) * noise", "(1 - t ** 2) ** 0.5 * noise"),
    ],
    "recon_loss.velocity_error": [
        ("divided by t", "(1 - t).clamp", "t.clamp"),
        ("not weighed by the time", " / (1 - t).clamp(min=MIN_ONE_MINUS_T)", ""),
        ("weighed once instead of squared", "((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2", "(x_pred - x) ** 2 / (1 - t).clamp(min=MIN_ONE_MINUS_T)"),
        ("the denominator reaches zero", ".clamp(min=MIN_ONE_MINUS_T)", ""),
        ("absolute instead of squared", " ** 2", ".abs()"),
    ],
    "recon_loss.flow_loss": [
        ("the model sees the clean image", "predict_image(prefix, x_t,", "predict_image(prefix, x,"),
        ("the model is told 1 - t", "t[:, 0, 0])", "1 - t[:, 0, 0])"),
        ("the noise's scale forgotten", "model.cfg.noise_scale", "1.0"),
        ("compared with the noised image", "velocity_error(x_pred, x, t)", "velocity_error(x_pred, x_t, t)"),
        ("a time for each patch", "noised(x, False,", "noised(x, True,"),
        ("sum instead of mean", ".mean()", ".sum()"),
    ],
    "recon_loss.drop_prefix": [
        ("keeps with chance p", ">= p", "< p"),
        ("drops word by word", "len(prefix) * WORLD, 1, 1", "len(prefix) * WORLD, prefix.shape[1], 1"),
        ("the dropped condition is zeros", "null.to(prefix.dtype))", "torch.zeros_like(prefix))"),
        ("one coin for the whole batch", ">= p\n", ">= p\n    keep = keep[:1]\n"),
    ],
    "sample.guided": [
        ("the sign of guidance", "uncond + how.cfg_scale * (cond - uncond)", "uncond - how.cfg_scale * (cond - uncond)"),
        ("halves swapped", "cond, uncond = look", "uncond, cond = look"),
        ("the other convention: 1 is already guidance", "uncond + how.cfg_scale", "cond + how.cfg_scale"),
        ("guidance of 0 is the condition", "how.cfg_scale == 1", "how.cfg_scale in (0, 1)"),
        ("two passes even without guidance", "return look(*inputs)", "return look(*[torch.cat([x, x]) for x in inputs])[: len(inputs[0])]"),
    ],
    "sample.denoise": [
        ("from image to noise", "zip(times[:-1], times[1:])", "zip(times.flip(0)[1:], times.flip(0)[:-1])"),
        ("the noise with t and 1 - t swapped", "(x_t - t * x_pred) / (1 - t)", "(x_t - (1 - t) * x_pred) / t.clamp(min=0.01)"),
        ("equal steps", "** TIME_POWER", "** 1.0"),
        ("renewed noise grows: weights that sum to one, not squares", "(1 - how.renew ** 2) ** 0.5", "(1 - how.renew)"),
        ("the noise's scale forgotten", "* model.cfg.noise_scale ", ""),
        ("the last step left out", "zip(times[:-1], times[1:])", "zip(times[:-2], times[1:-1])"),
        ("stays at t", "interpolate(x_pred, noise, t_next)", "interpolate(x_pred, noise, t)"),
    ],
    "model.Connector.forward": [
        ("patch tokens not normalised", "self.norm_in(patch_tokens)", "patch_tokens"),
        ("probabilities instead of logits", "return self.word_head(self.norm(x))", "return self.word_head(self.norm(x)).softmax(-1)"),
        ("the queries never look", "block(x, context=context)", "block(x)"),
        ("only the last block counts", "x = block(x, context=context)", "y = block(x, context=context)\n        x = y"),
        ("no last norm", "self.word_head(self.norm(x))", "self.word_head(x)"),
    ],
    "model.UnifiedModel.visual_prefix": [
        ("no <bos>", "self.wte.weight[1].expand", "torch.zeros_like(self.wte.weight[1]).expand"),
        ("<bos> last", "torch.cat([bos, (words @ self.wte.weight[: self.cfg.vocab_size]).to(bos.dtype)], 1)", "torch.cat([(words @ self.wte.weight[: self.cfg.vocab_size]).to(bos.dtype), bos], 1)"),
        ("hard words: argmax", "(words @ self.wte.weight[: self.cfg.vocab_size])", "self.wte(words.argmax(-1))"),
        ("softmax twice", "(words @", "(words.softmax(-1) @"),
        ("<pad> instead of <bos>", "self.wte.weight[1]", "self.wte.weight[0]"),
    ],
    "recon_loss.see": [
        ("the encoder learns", "with torch.no_grad():", "with torch.enable_grad():"),
        ("nothing learns", "return model.visual_words(features)", "return model.visual_words(features).detach()"),
        ("images not at the encoder's size", "model.for_encoder(images)", "images"),
        ("logits instead of probabilities", "model.visual_words(features)", "model.connector(features)"),
    ],
    "recon_loss.recon_loss": [
        ("no detach: the connector learns", "learns and torch.is_grad_enabled()", "torch.is_grad_enabled()"),
        ("the connector never learns", "learns and torch.is_grad_enabled()", "False"),
        ("the condition is not used", "image_loss(model, prefix, images)", "image_loss(model, torch.zeros_like(prefix), images)"),
        ("nothing learns", "    return image_loss(model, prefix, images)", "    with torch.no_grad():\n        return image_loss(model, prefix, images)"),
        ("no condition is dropped", "image_loss(model, prefix, images)", "IMAGE_LOSS[model.cfg.paradigm](model, prefix, images)"),
    ],
    "recon_loss.text_loss": [
        ("no shift: each word predicts itself", "words = target[:, 1:]", "words = target[:, :-1]"),
        ("<pad> is predicted", "words != PAD", "words == words"),
        ("<eos> is not predicted", "words != PAD", "(words != PAD) & (words != EOS)"),
        ("<bos> read again after the prefix", "words[:, :-1])", "target[:, :-2])"),
        ("sum instead of mean", "return mean_where(words != PAD, ", "return (words != PAD).sum() * mean_where(words != PAD, "),
    ],
}


def wrong_sources(b):
    """(what is wrong, the file with that in it) for each mistake in a blank."""
    source = (ROOT / b.file).read_text()
    body = body_of(source, local(b.name))
    for what, piece, instead in WRONG[b.name]:
        assert piece in body, f"{b.name}: {what}: the real body has no {piece!r} any more"
        yield what, with_body(source, local(b.name), body.replace(piece, instead))


def code_of(source: str, b):
    """The code object of one function of a source file."""
    node = find(source, local(b.name))
    node.decorator_list = []
    module = compile(ast.Module([node], []), b.file, "exec", flags=__future__.annotations.compiler_flag)
    return next(c for c in module.co_consts if inspect.iscode(c) and c.co_name == node.name)


class Matrix:
    """A pytest plugin: collects the tests once, then runs those of each blank with the real body and with every wrong one.

    The function's code is changed in place, so that all who imported it see it.
    """

    def __init__(self, assignment: int):
        self.blanks, self.results = blanks_of(assignment), []

    def pytest_runtestloop(self, session):
        for b in self.blanks:
            function = importlib.import_module(b.file[:-3])
            for part in local(b.name).split("."):
                function = getattr(function, part)
            function, right = inspect.unwrap(function), inspect.unwrap(function).__code__
            own = [item for item in session.items if f"{item.path.name}::{item.originalname}" in b.tests]
            own.sort(key=lambda item: item.path.name != "test_assignments_blanks.py")  # the quick ones first
            assert {f"{item.path.name}::{item.originalname}" for item in own} == set(b.tests), f"{b.name} names a test that does not exist"
            for what, source in [(None, (ROOT / b.file).read_text()), *wrong_sources(b)]:
                began, function.__code__ = time.time(), code_of(source, b)
                try:
                    by = next((item.name for item in own if not passes(item)), None)
                finally:
                    function.__code__ = right
                self.results.append({"blank": b.name, "what": what, "caught by": by, "seconds": round(time.time() - began, 2)})
        return True


def passes(item) -> bool:
    item._initrequest()  # as new: an item may run more than once
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def check(assignment: int) -> list[dict]:
    matrix, tests = Matrix(assignment), sorted({f"{ROOT}/tests/{test}" for b in blanks_of(assignment) for test in b.tests})
    with redirect_stdout(io.StringIO()) as out:
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *tests], plugins=[matrix])
    assert code == 0 and matrix.results, out.getvalue()
    return matrix.results


if __name__ == "__main__":
    results = check(int(sys.argv[1]))
    for r in results:
        print(json.dumps(r))
    sys.exit(any((r["caught by"] is None) != (r["what"] is None) for r in results))
