"""Assignment 3, at the end: train from captions and draw what the model generates.

    python draw.py            # drawn.png, to be compared with expected.png; about four minutes
    python draw.py --sample   # draws again from out_draw/pretrain.pt, without training

The stage `pretrain` of train.py calls your loss, and sample.py your sampler; train.py itself would
also score images' captions, which is assignment 4. Rows are prompts, columns are seeds; the second
group has no guidance.
"""

import sys
from pathlib import Path

import config
import train
from engine import DeviceConfig, Interrupt, TrainState
from evaluate import read_cells
from figures import image_grid
from sample import Checkpoint, text_to_image
from shapes import parse_caption, scene_matches

OPTIONS = "--stage pretrain --pretrain_steps 1200 --out_dir out_draw --device cpu"
COLUMNS = 4
PROMPTS = ["a circle", "a yellow star", "a cross and a triangle", "two squares", "a green square"]


def pretrain():
    """Writes out_draw/pretrain.pt."""
    cfg, _ = config.parse_config(OPTIONS.split())
    Path(cfg.out_dir).mkdir(exist_ok=True)
    [stage] = train.choose_stages(cfg, train.STAGES)
    state = TrainState(cfg, DeviceConfig(cfg))
    train.train_stage(state, stage, train.LossModule, Interrupt())


def generate(loaded, prompt: str, cfg_scale: float):
    """Four images of a prompt, and whether each holds exactly what the prompt asks for."""
    images = text_to_image(loaded.model, loaded.vocabulary, [prompt] * COLUMNS, cfg_scale=cfg_scale)
    parsed = parse_caption(prompt)
    return images, [scene_matches(parsed, grid) for grid in read_cells(images).tolist()]


def main():
    if "--sample" not in sys.argv:
        pretrain()
    loaded = Checkpoint("out_draw/pretrain.pt")
    rows, marks = [], []
    for prompt in PROMPTS:
        with_guidance, right = generate(loaded, prompt, 2.0)
        without, also_right = generate(loaded, prompt, 1.0)
        rows.append([with_guidance, without])
        marks.append([right, also_right])
        print(f"{prompt}: {sum(right)} of {COLUMNS} right, without guidance {sum(also_right)}")
    note = "Tick: exactly what the prompt asks for."
    captions = ["cfg_scale 2", "cfg_scale 1"]
    image_grid(rows, PROMPTS, captions, note=note, correct=marks).save("drawn.png")
    print("drawn.png")


if __name__ == "__main__":
    main()
