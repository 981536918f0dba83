"""The numbers of teacher.md: what the questions of the assignments come to. Not handed out.

    cd OUT    # a hand-out whose blanks are filled in, and draw.py has run
    PYTHONPATH=. python PATH/assignments/answers.py 1.1

Each question in its own hand-out: 1.1 1.2 1.3, 2.2 2.3, 3.1 3.2 3.3. The others are answered by
commands of the program, which teacher.md gives.
"""

import sys
import time

import torch


def zeroed_tensors():
    """1.1: how far the pooled embedding moves when one tensor of a file is replaced by zeros."""
    from pretrained import load_encoder

    folder = "tests/fixtures/encoder/hf_clip"
    images = torch.rand(8, 3, 15, 15, generator=torch.Generator().manual_seed(0))
    whole = load_encoder(folder)(images).pooled
    names = ["blocks.0.attn.qkv.bias", "blocks.1.mlp.fc2.weight", "pos_embed", "patch_embed.weight"]
    for name in names:
        encoder = load_encoder(folder)
        encoder.get_parameter(name).data.zero_()
        moved = (encoder(images).pooled - whole).norm() / whole.norm()
        print(f"{name:26} {moved:.2f}")


def positions_and_order():
    """1.2: objects seen right without position embeddings, and with the patches shuffled."""
    from draw import accuracy, look, train

    from shapes import Shapes

    encoder, readout = train()
    batch = Shapes("test").__getitems__([(0, i) for i in range(200)])
    images, grid = batch["image"], batch["grid"]
    print(f"as trained            {accuracy(look(encoder, readout, images), grid):.3f}")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    cells = images.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)[:, :, order]
    shuffled = cells.unflatten(2, (3, 3)).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    said = accuracy(look(encoder, readout, shuffled), grid[:, order])
    print(f"patches shuffled      {said:.3f}")
    encoder.pos_embed.data.zero_()
    print(f"positions left out    {accuracy(look(encoder, readout, images), grid):.3f}")


def steps_of_training():
    """1.3: objects seen right after so many steps."""
    from draw import accuracy, look, train

    from shapes import Shapes

    batch = Shapes("test").__getitems__([(0, i) for i in range(200)])
    for steps in (25, 50, 100, 200, 400):
        encoder, readout = train(steps)
        print(
            f"{steps} steps: {accuracy(look(encoder, readout, batch['image']), batch['grid']):.3f}"
        )


@torch.no_grad()
def cached_passes():
    """2.2: seconds of 25 passes with the prefix read in each, and read once."""
    from model import ModelConfig, UnifiedModel

    for length in (18, 180):
        model = UnifiedModel(ModelConfig(text_len=length)).eval()
        N, P = model.cfg.image_len, 3 * model.cfg.patch_size**2
        prefix, x_t, t = torch.randn(8, length, 128), torch.randn(8, N, P), torch.rand(8)
        model.predict_image(prefix, x_t, t)
        began = time.time()
        for _ in range(25):
            model.predict_image(prefix, x_t, t)
        uncached = time.time() - began
        began = time.time()
        cache = model.prefill(prefix, N)
        for _ in range(25):
            model.predict_image_cached(cache, x_t, t)
        cached = time.time() - began
        ratio = uncached / cached
        print(f"prefix of {length}: {uncached:.2f} s, cached {cached:.2f} s, {ratio:.1f} times")


def share_of_the_prefix():
    """2.3: multiply-adds of a forward pass, and those of the positions of the prefix."""
    from torch.utils.flop_counter import FlopCounterMode

    from model import ModelConfig, UnifiedModel

    model = UnifiedModel(ModelConfig())
    T, N, P = model.cfg.text_len, model.cfg.image_len, 3 * model.cfg.patch_size**2
    for repeats in (1, 4):
        with FlopCounterMode(display=False) as counter:
            x_t, t = torch.randn(repeats, N, P), torch.rand(repeats)
            model.predict_image(torch.randn(1, T, 128), x_t, t)
        total = counter.get_total_flops() / 2e6
        share = T / (T + repeats * N)
        print(f"{repeats} repeats: {total:.1f} million multiply-adds, {share:.0%} of the positions")


def sampled(option: str, values):
    """Prompts of evaluate.py that come out right, and how much the images of a prompt differ."""
    from evaluate import generate_and_check, make_prompts
    from sample import Checkpoint, text_to_image

    loaded = Checkpoint("out_draw/pretrain.pt")
    default = loaded.model.paradigm.default_sampling
    for value in values:
        loaded.model.paradigm.default_sampling = type(default)(**{**vars(default), option: value})
        right = []
        for category in ("single", "two", "color"):
            right += generate_and_check(loaded, make_prompts(category, 32), 0)[1]
        images = text_to_image(loaded.model, loaded.vocabulary, ["a star"] * 32)
        spread = images.std(0).mean().item()
        share = sum(right) / len(right)
        print(f"{option} {value}: {share:.2f} of {len(right)} prompts, spread {spread:.3f}")


ANSWERS = {
    "1.1": zeroed_tensors,
    "1.2": positions_and_order,
    "1.3": steps_of_training,
    "2.2": cached_passes,
    "2.3": share_of_the_prefix,
    "3.1": lambda: sampled("steps", [1, 2, 5, 10, 25, 50]),
    "3.2": lambda: sampled("cfg_scale", [0.0, 1.0, 1.5, 2.0, 5.0]),
    "3.3": lambda: sampled("eta", [0.0, 0.5, 1.0]),
}

if __name__ == "__main__":
    ANSWERS[sys.argv[1]]()
