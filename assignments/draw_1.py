"""Assignment 1, at the end: train your encoder and draw what it sees.

    python draw.py    # drawn.png, to be compared with expected.png; half a minute

A scene has 3 x 3 cells and the encoder 3 x 3 patches. A linear layer on each patch token says what
its cell holds, one of 37 contents. The second row draws what it says.
"""

import torch
import torch.nn.functional as F
from torch import nn

from encoder import ViT, scratch_config
from figures import image_grid
from shapes import COLORS, SHAPES, Shapes, render

STEPS = 400
BATCH = 32
CONTENTS = 1 + len(SHAPES) * len(COLORS)


def train(steps: int = STEPS, shift: int = 0) -> tuple[ViT, nn.Linear]:
    """An encoder and the layer that reads its patch tokens, trained together.

    shift: a token is asked for the cell that many places before its own; the first, for the last.
    """
    torch.manual_seed(0)
    scenes = Shapes("understand")
    encoder = ViT(scratch_config(image_size=48, patch_size=16))
    readout = nn.Linear(encoder.cfg.width, CONTENTS)
    parameters = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for step in range(steps):
        batch = scenes.__getitems__([(0, step * BATCH + i) for i in range(BATCH)])
        logits = readout(encoder(batch["image"]).patch_tokens)  # (B, 9, contents)
        wanted = batch["grid"].roll(shift, 1)  # (B, 9)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:3}/{steps} | loss {loss.item():.3f}")
    return encoder, readout


@torch.no_grad()
def look(encoder, readout, images):
    """Images (B, 3, 48, 48) -> the likeliest content of each cell, (B, 9)."""
    return readout(encoder(images).patch_tokens).argmax(-1)


def accuracy(seen, grid) -> float:
    """Share of the objects, not of the empty cells, that are seen right."""
    return (seen == grid)[grid > 0].float().mean().item()


def main():
    encoder, readout = train()
    test = Shapes("test")
    batch = test.__getitems__([(0, i) for i in range(200)])
    seen = look(encoder, readout, batch["image"])
    right = accuracy(seen, batch["grid"])
    note = f"{right:.0%} of the objects of 200 scenes have the right shape and color"
    print(note)
    backgrounds = torch.zeros(8, dtype=torch.long)
    rows = [batch["image"][:8], render(seen[:8], backgrounds, test.atlas)]
    captions = ["scenes that were not trained on", "what the patch tokens say; tick: all is right"]
    ticks = (seen == batch["grid"]).all(1)[:8].tolist()
    image_grid(rows, captions, note=note, correct=[[[]], [ticks]]).save("drawn.png")
    print("drawn.png")


if __name__ == "__main__":
    main()
