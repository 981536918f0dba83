"""sample.py: exact heads recover the data, cached decoding equals uncached, seeds decide everything, and bad input gets a sentence."""
import os
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(__file__))
from test_model import B, C, N, T, V, one_thread, small  # noqa: E402, F401

import recon_loss as R  # noqa: E402
import sample as S  # noqa: E402
from data import SPECIALS, Vocabulary  # noqa: E402
from encoder import ViT, scratch_config  # noqa: E402
from model import IMAGES, patchify, unpatchify  # noqa: E402
from recon_loss import null_prefix  # noqa: E402

WORDS = Vocabulary(SPECIALS + ["a", "red", "star", "circle", "and", "blue", "left", "of", "two"])
assert len(WORDS) == V


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def how(paradigm, **changes):
    return replace(S.IMAGE_SAMPLER[paradigm][1], **changes)


def prefixes(model, batch=B):
    ids = torch.randint(4, V, (batch, T), generator=seeded(5))
    return model.text_prefix(ids).detach()


# -- flow


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("renew", [0.0, 0.6, 1.0])
def test_an_exact_model_recovers_the_data_in_any_number_of_steps(steps, renew):
    model, x = small("flow"), torch.randn(B, N, 48)
    out = S.denoise(lambda x_t, t: x, x.shape, model, how("flow", renew=renew), steps, seeded())
    torch.testing.assert_close(out, x)


@torch.no_grad()
def test_without_renewal_the_steps_are_eulers():
    model, weight = small("flow"), torch.randn(48, 48) / 7
    predict = lambda x_t, t: (x_t @ weight).tanh() * (1 + t)
    x_t, times = torch.randn(B, N, 48, generator=seeded()) * 2.0, (torch.arange(6) / 5) ** S.TIME_POWER
    for t, t_next in zip(times[:-1], times[1:]):
        x_t = x_t + (t_next - t) * (predict(x_t, t) - x_t) / (1 - t)  # the velocity
    torch.testing.assert_close(S.denoise(predict, x_t.shape, model, how("flow", renew=0.0), 5, seeded()), x_t, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_renewed_noise_keeps_its_size():
    """A model that sees zeros everywhere leaves (1 - t) times pure noise: the size of the last but one state tells its variance."""
    model, seen = small("flow"), []
    for renew in (0.0, 0.5, 1.0):
        S.denoise(lambda x_t, t: seen.append((x_t.std() / (1 - t)).item()) or torch.zeros_like(x_t), (50, N, 48), model, how("flow", renew=renew), 4, seeded())
    assert len(seen) == 12 and all(abs(std / model.cfg.noise_scale - 1) < 0.02 for std in seen), seen


# -- codes


@pytest.mark.parametrize("cfg_scale", [1.0, 1.7])
@torch.no_grad()
def test_cached_greedy_codes_equal_uncached(cfg_scale):
    model = small("ar")
    prefix, drawn = prefixes(model), []
    model.tokenizer.decode = lambda codes: drawn.append(codes) or codes
    S.sample_ar(model, prefix, how("ar", cfg_scale=cfg_scale, temperature=0.0), seeded())
    held = torch.full((B, N + 1), C)
    null = null_prefix(model).expand(B, -1, -1)
    for i in range(N):
        cond, uncond = model.predict_image(prefix, held[:, :N])[:, i], model.predict_image(null, held[:, :N])[:, i]
        held[:, i + 1] = (uncond + cfg_scale * (cond - uncond)).argmax(-1)
    assert torch.equal(drawn[0], held[:, 1:])


@torch.no_grad()
def test_cached_greedy_words_equal_uncached():
    model, ids = small(), torch.empty(B, 0, dtype=torch.long)
    write = model.write
    model.write = lambda h: write(h).index_fill(-1, torch.tensor([2]), -1e9)  # no early <eos>
    prefix = prefixes(model)
    for _ in range(T - 1):
        ids = torch.cat([ids, model.text_logits(prefix, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(S.sample_words(model, prefix), ids)
    model.write = lambda h: F.one_hot(torch.full(h.shape[:2], 2), V).float()
    assert S.sample_words(model, prefix).tolist() == [[2]] * B, "nothing is written after everyone's <eos>"


@pytest.mark.parametrize("steps", [1, 4, 9, 30])
@torch.no_grad()
def test_maskgit_ends_without_masks_and_decides_each_code_once(steps):
    model, seen, final = small("mask"), [], []
    model.tokenizer.decode = lambda codes: final.append(codes) or codes
    look = model.predict_image_cached
    model.predict_image_cached = lambda cache, codes: seen.append(codes[:B]) or look(cache, codes)
    S.sample_mask(model, prefixes(model), how("mask", steps=steps), seeded())
    states = seen + final
    assert (states[0] == C).all() and final[0].max() < C and len(seen) == min(steps, N)
    for k, (before, after) in enumerate(zip(states, states[1:])):
        assert torch.equal(after[before != C], before[before != C]), "what is decided stays"
        assert ((after == C).sum(1) < (before == C).sum(1)).all(), "each pass decides something"
    assert [int((s[0] == C).sum()) for s in states[1:]] == list(S.masked_left(N, steps))


@torch.no_grad()
def test_maskgit_keeps_what_it_is_most_sure_of():
    model, final, order = small("mask"), [], torch.randperm(N, generator=seeded(3))
    logits = torch.zeros(1, N, C)
    logits[0, order, 7] = torch.arange(N, 0, -1.0) * 2  # order[0] is the surest
    model.tokenizer.decode = lambda codes: final.append(codes) or codes
    model.predict_image_cached = lambda cache, codes: final.append(codes[:1]) or logits.expand(len(codes), -1, -1)
    S.sample_mask(model, prefixes(model, 1), how("mask", steps=4, temperature=0.0, cfg_scale=1.0), seeded())
    for state in final:
        decided = int((state != C).sum())
        assert set((state[0] != C).nonzero()[:, 0].tolist()) == set(order[:decided].tolist())


def test_the_schedule_is_a_cosine_that_ends_at_zero():
    assert list(S.masked_left(64, 8)) == [62, 59, 53, 45, 35, 24, 12, 0]
    for n in (1, 2, 9, 64):
        for steps in (1, 2, 5, 12, 200):
            left = list(S.masked_left(n, steps))
            assert left[-1] == 0 and len(left) == min(n, steps) and all(a > b for a, b in zip([n] + left, left))


def test_draw_follows_the_softmax():
    logits, generator = torch.tensor([0.0, 1.0, -2.0, 0.5]), seeded()
    for temperature in (1.0, 0.5):
        ids = S.draw(logits.expand(20000, -1), temperature, generator)
        counts = torch.bincount(ids, minlength=4) / 20000
        torch.testing.assert_close(counts, (logits / temperature).softmax(0), atol=0.015, rtol=0)
    assert (S.draw(logits.expand(50, -1), 0.0, None) == 1).all()


# -- mar


@pytest.mark.parametrize("steps", [1, 3, 9])
@torch.no_grad()
def test_mar_with_an_exact_head_recovers_the_data_and_draws_each_patch_once(steps):
    model, truth, passes, asked = small("mar"), torch.rand(B, 3, 12, 12), [], []
    x = patchify(truth, 4)

    def look(cache, held, masked):  # a state that says which patch it stands for
        passes.append((held[:B].clone(), masked[:B].clone()))
        where = torch.stack(torch.meshgrid(torch.arange(len(held)) % B, torch.arange(N), indexing="ij"), -1)
        return F.pad(where.float(), (0, 22))

    def head(x_t, t, h):
        image, place = h[..., 0].long(), h[..., 1].long()
        asked.append(place[:B])
        return x[image, place]

    model.predict_image_cached, model.image.flow_mlp.forward = look, head
    out = S.sample_mar(model, prefixes(model), how("mar", steps=steps), seeded())
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)
    groups = torch.cat(asked[:: S.HEAD_STEPS], 1)
    assert torch.equal(groups.sort(1).values, torch.arange(N).expand(B, -1)), "each position is drawn once"
    assert not torch.equal(groups[0], groups[1]), "in an order of its own"
    for held, masked in passes:
        torch.testing.assert_close(held[~masked], x[~masked], atol=1e-4, rtol=0)
    assert [int(masked[0].sum()) for _, masked in passes] == [N] + list(S.masked_left(N, steps))[:-1]


# -- all four


@pytest.mark.parametrize("paradigm", IMAGES)
@torch.no_grad()
def test_guidance_of_one_is_no_guidance(paradigm):
    model = small(paradigm)
    prefix = prefixes(model)
    plain, almost, strong = (S.sample_image(model, prefix, seeded(), cfg_scale=s, steps=4, temperature=0.5) for s in (1, 1 + 1e-7, 3))
    torch.testing.assert_close(plain, almost, atol=1e-3, rtol=0)
    assert (plain - strong).abs().max() > 1e-3


@pytest.mark.parametrize("paradigm", IMAGES)
@torch.no_grad()
def test_a_seed_decides_everything(paradigm, monkeypatch):
    model = small(paradigm)
    prefix = prefixes(model, 5)
    first = S.sample_image(model, prefix, seeded(1), steps=4, temperature=1.0)
    torch.manual_seed(99)
    assert first.shape == (5, 3, 12, 12) and 0 <= first.min() and first.max() <= 1
    assert torch.equal(S.sample_image(model, prefix, seeded(1), steps=4, temperature=1.0), first)
    assert not torch.equal(S.sample_image(model, prefix, seeded(2), steps=4, temperature=1.0), first)
    monkeypatch.setattr(S, "MAX_BATCH", 2)
    chunks = S.sample_image(model, prefix, seeded(1), steps=4, temperature=1.0)
    assert chunks.shape == first.shape and torch.equal(S.sample_image(model, prefix, seeded(1), steps=4, temperature=1.0), chunks)


@torch.no_grad()
@pytest.mark.parametrize("paradigm", IMAGES)
@pytest.mark.parametrize("steps", [3, 8])
def test_a_progress_bar_counts_each_pass_and_comes_to_its_end(paradigm, steps, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, delay, leave, disable, desc):
            assert delay > 0 and not leave and disable is None, "for long drawings, on a terminal"
            self.total, self.done = total, 0
            bars.append(self)

        def update(self):
            self.done += 1

    monkeypatch.setattr(S, "tqdm", Bar)
    model = small(paradigm).eval()
    S.sample_image(model, prefixes(model, 3), seeded(), steps=steps)
    assert [(bar.total, bar.done) for bar in bars] == [(N, N) if paradigm == "ar" else (steps, steps)]


def test_a_fifth_paradigm_is_a_class_a_loss_and_a_sampler(monkeypatch):
    """Plain regression: a position holds nothing but its place, and says its patch. RecA's own loss trains it, and its sampler draws what was learnt."""
    class Empty(torch.nn.Module):
        causal, holds_codes = False, False

        def __init__(self, cfg):
            super().__init__()
            self.flow_head = torch.nn.Linear(cfg.width, 48)

        def embed(self, model, like):
            return like.new_zeros(len(like), N, model.cfg.width)

        def head(self, model, h):
            return self.flow_head(h)

    monkeypatch.setitem(IMAGES, "regression", Empty)
    monkeypatch.setitem(R.IMAGE_LOSS, "regression", lambda model, prefix, images: (model.predict_image(prefix, images) - patchify(images, 4)).square().mean())
    monkeypatch.setitem(S.IMAGE_SAMPLER, "regression", (lambda model, prefix, how, generator: unpatchify(model.predict_image(prefix, prefix), 4), S.Sampling()))
    monkeypatch.setattr(R, "DROP", 0.0)
    torch.manual_seed(0)
    model, images = small("regression", encoder_width=128), torch.rand(1, 3, 12, 12)
    encoder = ViT(scratch_config(12, 4)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        R.recon_loss(model, encoder, images).backward()
        optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(S.reconstruct(model, encoder, images), images, atol=0.05, rtol=0)


def test_edit_goes_on_where_the_visual_words_end():
    words = F.one_hot(torch.tensor([[4, 5, 6, 2, 0, 0], [4, 6, 8, 4, 5, 7]]), V).float()
    ids = S.edit_words(words, WORDS, ["blue", "and a blue star"]).argmax(-1).tolist()
    assert ids == [[4, 5, 6, 9, 2, 0], [4, 8, 4, 9, 6, 2]]  # the second has no tail: the instruction takes the last five places
    assert words.argmax(-1).tolist()[0] == [4, 5, 6, 2, 0, 0], "the words given stay as they were"
    with pytest.raises(ValueError, match="at most"):
        S.edit_words(words[:1], WORDS, ["a a a a a a a"])
    assert S.edit_words(words[:1], WORDS, ["a a a a a a"]).argmax(-1).tolist() == [[4] * 6], "as long as there is room for"
    assert S.readable(words[0] * 0.8 + 0.2 / V, WORDS) == "a(82%) red(82%) star(82%) <eos>(82%)"
    assert S.readable(words[0], WORDS) == "a red star <eos>"


# -- checkpoints, pictures, the command line


def checkpoint(path, paradigm="flow", **changes):
    model, encoder = small(paradigm, encoder_width=16), ViT(scratch_config(12, 4, width=16, depth=1, heads=2))
    saved = {"format": 1, "stage": "reca", "step": 7, "model_config": asdict(model.cfg), "model": model.state_dict(), "ema": None, "vocabulary": WORDS.words,
             "config": {}, "encoder": {"name": "scratch", "config": asdict(encoder.cfg), "state": encoder.state_dict()}} | changes
    torch.save({key: value for key, value in saved.items() if value != "left out"}, path)
    return model, encoder


@pytest.mark.parametrize("paradigm", IMAGES)
def test_a_checkpoint_goes_round(paradigm, tmp_path):
    model, encoder = checkpoint(tmp_path / "a.pt", paradigm)
    loaded = S.load_checkpoint(tmp_path / "a.pt")
    assert (loaded.stage, loaded.step, loaded.vocabulary.words) == ("reca", 7, WORDS.words)
    assert not any(p.requires_grad for p in [*loaded.model.parameters(), *loaded.encoder.parameters()])
    draw = lambda m: S.text_to_image(m, WORDS, ["a red star"] * 2, generator=seeded(), steps=3)
    assert torch.equal(draw(loaded.model), draw(model))
    images = torch.rand(3, 3, 12, 12)
    assert torch.equal(*(S.reconstruct(m, e, images, generator=seeded(), steps=3) for m, e in ((loaded.model, loaded.encoder), (model, encoder))))
    assert len(S.caption(loaded.model, loaded.encoder, WORDS, images)) == 3
    assert S.edit(loaded.model, loaded.encoder, WORDS, images, ["and blue"] * 3, generator=seeded(), steps=3).shape == images.shape


def test_averaged_weights_are_sampled_where_there_are_any(tmp_path):
    averaged = {name: torch.full_like(w, 0.5) for name, w in small(encoder_width=16).state_dict().items()}
    checkpoint(tmp_path / "a.pt", ema=averaged)
    assert all((p == 0.5).all() for p in S.load_checkpoint(tmp_path / "a.pt").model.parameters())


def run(capsys, *argv):
    """Exit code and what was said; a traceback would fail the test."""
    try:
        S.main([str(a) for a in argv])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()


def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, capsys):
    good, out = tmp_path / "good.pt", tmp_path / "grid.png"
    checkpoint(good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_text("")
    checkpoint(tmp_path / "format.pt", format=99)
    checkpoint(tmp_path / "config.pt", model_config=asdict(small(width=30).cfg))
    checkpoint(tmp_path / "unknown.pt", model_config={"widht": 3})
    checkpoint(tmp_path / "wordless.pt", vocabulary="left out")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    torch.save([1, 2], tmp_path / "list.pt")
    draw = ["--prompt", "a red star", "--out", out]
    for argv, said in [
        (["--ckpt", tmp_path / "none.pt", *draw], "there is no checkpoint"),
        (["--ckpt", tmp_path / "cut.pt", *draw], "damaged"),
        (["--ckpt", tmp_path / "text.pt", *draw], "damaged"),
        (["--ckpt", tmp_path / "empty.pt", *draw], "damaged"),
        (["--ckpt", tmp_path / "list.pt", *draw], "format"),
        (["--ckpt", tmp_path / "format.pt", *draw], "format 99"),
        (["--ckpt", tmp_path / "config.pt", *draw], "does not fit"),
        (["--ckpt", tmp_path / "unknown.pt", *draw], "does not fit"),
        (["--ckpt", tmp_path / "wordless.pt", *draw], "vocabulary"),
        (["--ckpt", good, "--prompt", "a rde star", "--out", out], "'rde'"),
        (["--ckpt", good, "--prompt", "a a a a a a a a", "--out", out], "at most"),
        (["--ckpt", good, "--prompt", "a", "--out", tmp_path / "none" / "grid.png"], "cannot be written"),
        (["--ckpt", good, "--prompt", "a", "--out", tmp_path / "grid.foo"], "cannot be written"),
        (["--ckpt", good, "--caption", tmp_path / "broken.png"], "broken.png"),
        (["--ckpt", good, "--reconstruct", tmp_path / "none.png", "--out", out], "none.png"),
        (["--ckpt", good, "--edit", tmp_path / "broken.png", "--out", out], "--prompt"),
        (["--ckpt", good, "--out", out], "give one of"),
        (["--ckpt", good, *draw, "--steps", "0"], "steps=0"),
        (["--ckpt", good, *draw, "--renew", "1.5"], "renew in [0, 1]"),
        (["--ckpt", good, *draw, "--n", "0"], "--n is 0"),
        (["--ckpt", good, *draw, "--temprature", "1"], "--temprature"),
    ]:
        code, io = run(capsys, *argv)
        assert code == 2 and said in io.err and io.err.startswith("error: ") and io.err.count("\n") == 1, (argv, code, io.err)
        assert not out.exists()


def test_the_command_line_draws_edits_and_captions(tmp_path, capsys):
    ckpt, out, photo = tmp_path / "a.pt", tmp_path / "grid.png", tmp_path / "photo.png"
    checkpoint(ckpt)
    Image.new("RGB", (40, 30), "red").save(photo)
    for argv in (["--prompt", "a red star", "--n", 11], ["--reconstruct", photo, photo, "--n", 3], ["--edit", photo, "--prompt", "and blue"]):
        code, io = run(capsys, "--ckpt", ckpt, *argv, "--out", out, "--steps", 2)
        assert code == 0 and str(out) in io.out and Image.open(out).width > 100, io.err
        out.unlink()
    code, io = run(capsys, "--ckpt", ckpt, "--caption", photo)
    assert code == 0 and "visual words:" in io.out


def test_grids_are_sharp_and_captioned():
    base, reca = torch.rand(2, 3, 5, 4), torch.rand(1, 3, 5, 4)
    grid = S.image_grid([[base, reca], [base, reca]], ["a red star", "two"], ["base", "RecA"], scale=6)
    pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(grid.height, grid.width, 3).permute(2, 0, 1) / 255
    block = (base[0] * 255).floor().div(255).repeat_interleave(6, 1).repeat_interleave(6, 2)
    places = pixels.unfold(1, 30, 1).unfold(2, 24, 1)  # (3, rows, columns, 30, 24)
    assert ((places - block[:, None, None]).abs().amax((0, 3, 4)) < 0.003).sum() == 2, "every pixel of the image is a 6 x 6 square, in both rows"
    assert S.image_grid([base]).width < S.image_grid([base], ["a very long caption that is wider than its two small images"]).width


def test_a_model_of_photographs_keeps_its_noise_unless_told(monkeypatch):
    seen = []
    monkeypatch.setitem(S.IMAGE_SAMPLER, "flow", (lambda model, prefix, how, generator: seen.append(how.renew) or torch.zeros(len(prefix), 3, 2, 2), S.IMAGE_SAMPLER["flow"][1]))
    model = small()
    for of_model, told in ((1.0, None), (0.0, None), (0.0, 0.5)):
        model.cfg.renew = of_model
        S.sample_image(model, torch.zeros(2, 1, 1), renew=told)
    assert seen == [1.0, 0.0, 0.5]
