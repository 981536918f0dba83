"""The numbers of teacher.md: what the questions of the assignments come to. Not handed out.

    cd OUT    # a hand-out whose blanks are filled in; for 3.1 to 3.3 after its draw.py
    PYTHONPATH=. python PATH/assignments/answers.py 1.1

Each question in its own hand-out: 1.1 1.2 1.3, 2.1 2.2 2.3, 3.1 3.2 3.3. Those of assignment 4 are
answered by commands of the program, which teacher.md gives.
"""

import sys
import time
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange


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


@torch.no_grad()
def positions_and_order():
    """1.2: objects seen right without position embeddings, and with the patches shuffled."""
    from draw import accuracy, look, train

    from shapes import Shapes

    batch = Shapes("test").__getitems__([(0, i) for i in range(200)])
    images, grid = batch["image"], batch["grid"]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    cells = rearrange(images, "b k (r h) (c w) -> b (r c) k h w", r=3, c=3)[:, order]
    shuffled = rearrange(cells, "b (r c) k h w -> b k (r h) (c w)", r=3, c=3)
    for shift in (0, 1):
        with torch.enable_grad():
            encoder, readout = train(shift=shift)
        wanted, in_order = grid.roll(shift, 1), grid[:, order].roll(shift, 1)
        right = [accuracy(look(encoder, readout, images), wanted)]
        right.append(accuracy(look(encoder, readout, shuffled), in_order))
        encoder.pos_embed.zero_()
        right.append(accuracy(look(encoder, readout, images), wanted))
        shown = ", ".join(f"{share:.3f}" for share in right)
        print(f"shift {shift}: as trained, patches shuffled, positions left out: {shown}")


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
def prefix_that_sees_the_image():
    """2.1: how far the states of the prefix move with t, as masked and if it saw the image."""
    import model as module

    torch.manual_seed(0)
    model = module.UnifiedModel(module.ModelConfig()).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    states = []
    model.blocks[-1].register_forward_pre_hook(lambda block, args: states.append(args[0]))
    T, N, P = model.cfg.text_len, model.cfg.image_len, 3 * model.cfg.patch_size**2
    prefix, x_t = torch.randn(1, T, 128), torch.randn(1, N, P)
    real_mask = module.prefix_mask

    def open_mask(T, N, *others):
        mask = real_mask(T, N, *others)
        mask[:T, T:] = True
        return mask

    for name, mask in (("as masked", real_mask), ("open to the image", open_mask)):
        module.prefix_mask = mask
        states.clear()
        for t in (0.1, 0.9):
            model.predict_image(prefix, x_t, torch.full((1,), t))
        moved = (states[1] - states[0])[:, :T].norm() / states[0][:, :T].norm()
        print(f"{name}: states of the prefix move by {moved:.1e} of their norm")


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
        loaded.model.paradigm.default_sampling = replace(default, **{option: value})
        right = []
        for category in ("single", "two"):
            right += generate_and_check(loaded, make_prompts(category, 48), 0)[1]
        images = text_to_image(loaded.model, loaded.vocabulary, ["a star"] * 32)
        spread = images.std(0).mean().item()
        share = sum(right) / len(right)
        print(f"{option} {value}: {share:.2f} of {len(right)} prompts, spread {spread:.3f}")


ANSWERS = {
    "1.1": zeroed_tensors,
    "1.2": positions_and_order,
    "1.3": steps_of_training,
    "2.1": prefix_that_sees_the_image,
    "2.2": cached_passes,
    "2.3": share_of_the_prefix,
    "3.1": partial(sampled, "steps", [1, 2, 5, 10, 25, 50]),
    "3.2": partial(sampled, "cfg_scale", [0.0, 1.0, 1.5, 2.0, 5.0]),
    "3.3": partial(sampled, "eta", [0.0, 0.5, 1.0]),
}

if __name__ == "__main__":
    ANSWERS[sys.argv[1]]()
