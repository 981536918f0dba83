"""sample.py: seeds and options decide every image, cached words equal uncached, checkpoints go
round, and bad input gets one sentence."""

import shlex
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from encoder import ViT, scratch_config
from figures import image_grid
from paradigms import PARADIGMS
from sample import (
    FORMAT,
    Checkpoint,
    append_instruction,
    caption_images,
    edit,
    format_visual_words,
    main,
    reconstruct,
    sample_image,
    sample_words,
    text_to_image,
)
from small import B, N, T, V, random_prefix, small
from words import EOS, PAD, SPECIALS, Vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["a", "red", "star", "circle", "and", "blue", "left", "of", "two"]
VOCABULARY = Vocabulary(SPECIALS + WORDS)
assert len(VOCABULARY) == V


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_guidance_of_one_is_no_guidance(paradigm):
    model = small(paradigm)
    prefix = random_prefix(model)

    def sample(cfg_scale):
        return sample_image(model, prefix, cfg_scale=cfg_scale, steps=4, temperature=0.5)

    plain = sample(1)
    torch.testing.assert_close(plain, sample(1 + 1e-7), atol=1e-3, rtol=0)
    assert (plain - sample(3)).abs().max() > 1e-3


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_a_seed_decides_everything(paradigm, monkeypatch):
    model = small(paradigm)
    prefix = random_prefix(model, 5)

    def sample(seed):
        return sample_image(
            model, prefix, range(seed, seed + len(prefix)), steps=4, temperature=1.0
        )

    first = sample(1)
    torch.manual_seed(99)
    assert first.shape == (5, 3, 12, 12)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2), first)
    monkeypatch.setattr("sample.MAX_BATCH", 2)
    in_chunks = sample(1)
    assert in_chunks.shape == first.shape
    assert torch.equal(sample(1), in_chunks)


@torch.no_grad()
@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("steps", [3, 8])
def test_a_progress_bar_counts_each_pass_and_comes_to_its_end(paradigm, steps, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, delay, leave, disable, desc):
            assert delay > 0, "shown only where sampling takes long"
            assert not leave, "it disappears at its end"
            assert disable is None, "shown on a terminal alone"
            self.total = total
            self.done = 0
            bars.append(self)

        def update(self):
            self.done += 1

    monkeypatch.setattr("paradigms.tqdm", Bar)
    model = small(paradigm)
    sample_image(model, random_prefix(model, 3), steps=steps)
    passes = N if paradigm == "ar" else steps
    assert [(bar.total, bar.done) for bar in bars] == [(passes, passes)]


@pytest.mark.parametrize("of_model, option, expected", [(1, None, 1), (0, None, 0), (0, 0.5, 0.5)])
def test_a_model_of_photographs_resamples_no_noise_unless_told(model, of_model, option, expected):
    sampled_with = []

    def sample(model, prefix, sampling, noise):
        sampled_with.append(sampling.eta)
        return torch.zeros(len(prefix), 3, 2, 2)

    model.paradigm.sample = sample
    model.cfg.eta = float(of_model)
    sample_image(model, torch.zeros(2, 1, 1), eta=option)
    assert sampled_with == [expected]


# ---------------------------------------------------------------- words


@torch.no_grad()
def test_cached_greedy_words_equal_uncached(model):
    word_logits = model.word_logits
    no_eos = torch.tensor([EOS])
    model.word_logits = lambda h: word_logits(h).index_fill(-1, no_eos, -1e9)
    prefix = random_prefix(model)
    ids = torch.empty(B, 0, dtype=torch.long)
    for _ in range(T - 1):
        new = model.text_logits(prefix, ids)[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    assert torch.equal(sample_words(model, prefix), ids)


@torch.no_grad()
def test_nothing_is_written_after_the_last_eos(model):
    model.word_logits = lambda h: F.one_hot(torch.full(h.shape[:2], EOS), V).float()
    assert sample_words(model, random_prefix(model)).tolist() == [[EOS]] * B


@torch.no_grad()
def test_a_sentence_that_has_ended_is_padded(model):
    steps = iter([[4, EOS, 5], [6, 7, EOS], [EOS, 8, 9]])  # the likeliest words of three rows
    model.word_logits = lambda h: F.one_hot(torch.tensor(next(steps))[:, None], V).float()
    expected = [[4, 6, EOS], [EOS, PAD, PAD], [5, EOS, PAD]]
    assert sample_words(model, random_prefix(model, 3)).tolist() == expected


def test_an_instruction_goes_on_where_the_visual_words_end():
    words = F.one_hot(torch.tensor([[4, 5, 6, 2, 0, 0], [4, 6, 8, 4, 5, 7]]), V).float()
    ids = append_instruction(words, VOCABULARY, ["blue", "and a blue star"]).argmax(-1).tolist()
    assert ids[0] == [4, 5, 6, 9, 2, 0]
    assert ids[1] == [4, 8, 4, 9, 6, 2], "no <eos>: the instruction takes the last five places"
    assert words[0].argmax(-1).tolist() == [4, 5, 6, 2, 0, 0], "the argument stays as it was"


def test_an_instruction_may_take_all_places_and_no_more():
    words = F.one_hot(torch.tensor([[4, 5, 6, 2, 0, 0]]), V).float()
    with pytest.raises(ValueError, match="at most"):
        append_instruction(words, VOCABULARY, ["a a a a a a a"])
    full = append_instruction(words, VOCABULARY, ["a a a a a a"])
    assert full.argmax(-1).tolist() == [[4] * 6]


def test_visual_words_are_formatted_up_to_eos_with_low_probabilities():
    words = F.one_hot(torch.tensor([4, 5, 6, 2, 0, 0]), V).float()
    assert format_visual_words(words, VOCABULARY) == "a red star <eos>"
    mixed = words * 0.8 + 0.2 / V
    assert format_visual_words(mixed, VOCABULARY) == "a(82%) red(82%) star(82%) <eos>(82%)"


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path, paradigm="flow", without=(), **changes):
    """A checkpoint of the small model with some entries changed or left out: model, encoder."""
    model = small(paradigm, encoder_width=16)
    encoder = ViT(scratch_config(12, 4, width=16, depth=1, heads=2))
    saved = {
        "format": FORMAT,
        "model_class": "UnifiedModel",
        "stage": "reca",
        "step": 7,
        "model_config": asdict(model.cfg),
        "model": model.state_dict(),
        "ema": None,
        "vocabulary": VOCABULARY.words,
        "config": {},
        "encoder": {
            "name": "scratch",
            "config": asdict(encoder.cfg),
            "state": encoder.state_dict(),
        },
    }
    saved |= changes
    for name in without:
        del saved[name]
    torch.save(saved, path)
    return model, encoder


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_checkpoint_goes_round(paradigm, tmp_path):
    model, encoder = save_checkpoint(tmp_path / "a.pt", paradigm)
    loaded = Checkpoint(tmp_path / "a.pt")
    assert (loaded.stage, loaded.step) == ("reca", 7)
    assert loaded.vocabulary.words == VOCABULARY.words
    for p in [*loaded.model.parameters(), *loaded.encoder.parameters()]:
        assert not p.requires_grad

    def generate(model):
        prompts = ["a red star"] * 2
        return text_to_image(model, VOCABULARY, prompts, steps=3)

    assert torch.equal(generate(loaded.model), generate(model))
    images = torch.rand(3, 3, 12, 12)
    again = reconstruct(loaded.model, loaded.encoder, images, steps=3)
    assert torch.equal(again, reconstruct(model, encoder, images, steps=3))
    assert len(caption_images(loaded.model, loaded.encoder, VOCABULARY, images)) == 3
    instructions = ["and blue"] * 3
    edited = edit(loaded.model, loaded.encoder, VOCABULARY, images, instructions, steps=3)
    assert edited.shape == images.shape


def test_averaged_weights_are_sampled_where_there_are_any(tmp_path):
    state = small(encoder_width=16).state_dict()
    averaged = {name: torch.full_like(value, 0.5) for name, value in state.items()}
    save_checkpoint(tmp_path / "a.pt", ema=averaged)
    for name, p in Checkpoint(tmp_path / "a.pt").model.named_parameters():
        assert (p == 0.5).all(), name


def test_the_model_class_of_a_checkpoint_is_checked(tmp_path):
    save_checkpoint(tmp_path / "a.pt", model_class="Pixels")
    with pytest.raises(ValueError, match="is a Pixels, not a UnifiedModel: .*experiments.py"):
        Checkpoint(tmp_path / "a.pt")


# ---------------------------------------------------------------- pictures


def test_grids_are_sharp_and_captioned():
    base, reca = torch.rand(2, 3, 5, 4), torch.rand(1, 3, 5, 4)
    rows, captions = [[base, reca], [base, reca]], ["a red star", "two"]
    grid = image_grid(rows, captions, ["base", "RecA"], scale=6)
    pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(grid.height, grid.width, 3).permute(2, 0, 1) / 255
    windows = pixels.unfold(1, 30, 1).unfold(2, 24, 1)  # (3, rows, columns, 30, 24)
    magnified = (base[0] * 255).floor().div(255).repeat_interleave(6, 1).repeat_interleave(6, 2)
    difference = (windows - magnified[:, None, None]).abs().amax((0, 3, 4))
    found = (difference < 0.003).sum()
    assert found == 2, "in both rows, and every pixel of the image is a 6 x 6 square"
    long_caption = "a very long caption that is wider than its two small images"
    assert image_grid([base]).width < image_grid([base], [long_caption]).width


# ---------------------------------------------------------------- the command line


def run(capsys, *argv):
    """Exit code and what was said; a traceback would fail the test."""
    try:
        main([str(arg) for arg in argv])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr()


def assert_one_sentence(capsys, said, out, *argv):
    code, io = run(capsys, *argv)
    assert code == 2
    assert said in io.err
    assert io.err.startswith("error: ")
    assert io.err.count("\n") == 1, "one sentence"
    assert not out.exists()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with one good checkpoint and one for each way to be wrong."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder / "good.pt")
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:5000])
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "empty.pt").write_text("")
    torch.save([1, 2], folder / "list.pt")
    save_checkpoint(folder / "format.pt", format=99)
    save_checkpoint(folder / "config.pt", model_config=asdict(small(width=30).cfg))
    save_checkpoint(folder / "unknown.pt", model_config={"widht": 3})
    save_checkpoint(folder / "wordless.pt", without=["vocabulary"])
    save_checkpoint(folder / "variant.pt", model_class="Pixels")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    return folder


WRONG_CHECKPOINTS = [
    ("none.pt", "there is no checkpoint"),
    ("cut.pt", "damaged"),
    ("text.pt", "damaged"),
    ("empty.pt", "damaged"),
    ("list.pt", "format"),
    ("format.pt", "format 99"),
    ("config.pt", "does not fit"),
    ("unknown.pt", "does not fit"),
    ("wordless.pt", "vocabulary"),
    ("variant.pt", "experiments.py"),
]


@pytest.mark.parametrize("name, said", WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_gets_one_sentence_and_exit_code_2(name, said, checkpoints, capsys):
    out = checkpoints / "grid.png"
    argv = ["--ckpt", checkpoints / name, "--prompt", "a red star", "--out", out]
    assert_one_sentence(capsys, said, out, *argv)


WRONG_ARGUMENTS = [
    ("--prompt 'a rde star' --out grid.png", "'rde'"),
    ("--prompt 'a a a a a a a a' --out grid.png", "at most"),
    ("--prompt a --out none/grid.png", "cannot be written"),
    ("--prompt a --out grid.foo", "cannot be written"),
    ("--caption broken.png", "broken.png"),
    ("--reconstruct none.png --out grid.png", "none.png"),
    ("--edit broken.png --out grid.png", "--prompt"),
    ("--out grid.png", "give one of"),
    ("--prompt 'a red star' --out grid.png --steps 0", "steps=0"),
    ("--prompt 'a red star' --out grid.png --eta 1.5", "eta in [0, 1]"),
    ("--prompt 'a red star' --out grid.png --n 0", "--n is 0"),
    ("--prompt 'a red star' --out grid.png --temprature 1", "--temprature"),
]


@pytest.mark.parametrize("line, said", WRONG_ARGUMENTS)
def test_wrong_arguments_get_one_sentence(line, said, checkpoints, capsys, monkeypatch):
    monkeypatch.chdir(checkpoints)
    argv = ["--ckpt", "good.pt", *shlex.split(line)]
    assert_one_sentence(capsys, said, checkpoints / "grid.png", *argv)


COMMANDS = [
    "--prompt 'a red star' --n 11",
    "--reconstruct photo.png photo.png --n 3",
    "--edit photo.png --prompt 'and blue'",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_line_generates_and_edits(line, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.png")
    argv = ["--ckpt", checkpoints / "good.pt", *shlex.split(line), "--steps", 2]
    code, io = run(capsys, *argv, "--out", "grid.png")
    assert code == 0, io.err
    assert "grid.png" in io.out
    assert Image.open("grid.png").width > 100


def test_the_command_line_captions(checkpoints, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    code, io = run(capsys, "--ckpt", checkpoints / "good.pt", "--caption", photo)
    assert code == 0, io.err
    assert "visual words:" in io.out
