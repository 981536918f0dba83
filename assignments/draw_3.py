"""Assignment 3, at the end: train from captions and draw what the model generates.

    python draw.py    # drawn.png, to be compared with expected.png; about four minutes

The stage `pretrain` of train.py is your loss; sample.py is your sampler. Rows are prompts, columns
are seeds; the second group has no guidance.
"""

import train
from figures import image_grid
from sample import Checkpoint, text_to_image

STEPS = 800
PROMPTS = [
    "a red circle",
    "a yellow star",
    "a blue square left of a red circle",
    "two green squares",
]


def main():
    options = f"--stage pretrain --pretrain_steps {STEPS} --out_dir out_draw --device cpu"
    train.main(options.split())
    loaded = Checkpoint("out_draw/pretrain.pt")
    rows = []
    for prompt in PROMPTS:
        row = []
        for cfg_scale in (2.0, 1.0):
            four = [prompt] * 4
            row.append(text_to_image(loaded.model, loaded.vocabulary, four, cfg_scale=cfg_scale))
        rows.append(row)
    image_grid(rows, PROMPTS, ["cfg_scale 2", "cfg_scale 1"]).save("drawn.png")
    print("drawn.png")


if __name__ == "__main__":
    main()
