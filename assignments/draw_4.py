"""Assignment 4, at the end: post-train base.pt with your RecA and draw what it changes.

    python draw.py    # drawn.png, to be compared with expected.png; about four minutes

Columns: an image, what the base generates from its visual words, what the post-trained model does.
The line above each row is its visual words, which RecA does not train.
"""

import os

import train
from data import open_splits
from evaluate import read_cells
from figures import image_grid
from sample import Checkpoint, encode_in_chunks, format_visual_words, reconstruct

STEPS = 800
COUNT = 6


def main():
    if not os.path.exists("base.pt"):
        raise SystemExit("there is no base.pt: ask for one, or train it (python train.py)")
    options = f"--stage reca --init_from base.pt --reca_steps {STEPS} --eval_n 24"
    train.main(f"{options} --out_dir out_draw --device cpu".split())
    base, reca = Checkpoint("base.pt"), Checkpoint("out_draw/reca.pt")
    batch = open_splits("shapes")["test"].__getitems__([(0, i) for i in range(COUNT)])
    images = batch["image"]
    words = encode_in_chunks(base.model, base.encoder, images)
    lines = [format_visual_words(row, base.vocabulary) for row in words]
    columns, marks = [images], [[[]] * COUNT]
    for loaded in (base, reca):
        again = reconstruct(loaded.model, loaded.encoder, images)
        columns.append(again)
        kept = (read_cells(again) == read_cells(images)).all(1).tolist()
        marks.append([[right] for right in kept])
    rows = [[column[i : i + 1] for column in columns] for i in range(COUNT)]
    correct = list(zip(*marks, strict=True))
    note = "Tick: every object with its shape, color and place."
    image_grid(rows, lines, ["image", "base", "RecA"], None, note, correct=correct).save(
        "drawn.png"
    )
    print("drawn.png")


if __name__ == "__main__":
    main()
