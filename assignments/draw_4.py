"""Assignment 4, at the end: post-train base.pt with your RecA and draw what it changes.

    python draw.py    # drawn.png, to be compared with expected.png; about three minutes

Columns: an image, what the base generates from its visual words, what the post-trained model does.
The line above each row is its visual words, which RecA does not train.
"""

import os

import train
from data import make_dataset
from figures import image_grid
from sample import Checkpoint, encode_in_chunks, format_visual_words, reconstruct

STEPS = 300
COUNT = 6


def main():
    if not os.path.exists("base.pt"):
        raise SystemExit("there is no base.pt: ask for one, or train it (python train.py)")
    options = f"--stage reca --init_from base.pt --reca_steps {STEPS} --eval_n 24"
    train.main(f"{options} --out_dir out_draw --device cpu".split())
    base, reca = Checkpoint("base.pt"), Checkpoint("out_draw/reca.pt")
    batch = make_dataset("shapes", "test").__getitems__([(0, i) for i in range(COUNT)])
    images = batch["image"]
    words = encode_in_chunks(base.model, base.encoder, images)
    lines = [format_visual_words(row, base.vocabulary) for row in words]
    columns = [images]
    for loaded in (base, reca):
        columns.append(reconstruct(loaded.model, loaded.encoder, images))
    rows = [[column[i : i + 1] for column in columns] for i in range(COUNT)]
    image_grid(rows, lines, ["image", "base", "RecA"]).save("drawn.png")
    print("drawn.png")


if __name__ == "__main__":
    main()
