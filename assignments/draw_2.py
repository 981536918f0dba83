"""Assignment 2, at the end: measure who depends on whom, then teach the model to rephrase.

    python draw.py    # drawn.png, to be compared with expected.png; about two minutes

The picture is no drawing of the mask: each row is the gradient of one state by all inputs, so it
shows what your transformer does. White: the state of the row depends on the input of the column.
"""

import math

import torch
import torch.nn.functional as F

from figures import image_grid
from model import ModelConfig, UnifiedModel
from recon_loss import text_loss
from shapes import Shapes
from words import BOS, EOS, PAD

T, REPEATS = 5, 2
STEPS = 1000
BATCH = 32


def dependence(paradigm: str, repeats: int) -> torch.Tensor:
    """(S, S): 1 where the state of a row depends on the input of a column. S = T + R N."""
    torch.manual_seed(0)
    model = UnifiedModel(ModelConfig(paradigm=paradigm, image_size=32, code_stride=16, depth=2))
    prefix = torch.randn(1, T, 128, requires_grad=True)
    image = torch.randn(repeats, 4, 128, requires_grad=True)
    states = []
    model.norm.register_forward_hook(lambda module, args, out: states.append(out[0]))
    model.paradigm.embed = lambda model, x: x
    model.paradigm.head = lambda model, h: h
    model.predict_image(prefix, image)
    rows = []
    for state in states[0]:
        out = (state * torch.randn_like(state)).sum()  # a plain sum of a normalised state is 0
        by_words, by_image = torch.autograd.grad(out, [prefix, image], retain_graph=True)
        gradient = torch.cat([by_words[0], by_image.flatten(0, 1)])
        rows.append(gradient.abs().sum(-1) > 1e-9)
    return torch.stack(rows).float()


def squares(mask: torch.Tensor, cell: int = 10) -> torch.Tensor:
    """(1, 3, H, W): white squares and dark ones with lines around them."""
    picture = (0.15 + 0.85 * mask).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    picture = F.pad(picture, (0, 1, 0, 1))
    picture[::cell] = 0.5
    picture[:, ::cell] = 0.5
    return picture.expand(1, 3, -1, -1)


@torch.no_grad()
def rephrase(model, prefix) -> list[int]:
    """The likeliest words after a prefix (1, T, D), up to <eos>."""
    ids = torch.empty(1, 0, dtype=torch.long)
    while ids.shape[1] < model.cfg.text_len - 1 and EOS not in ids:
        ids = torch.cat([ids, model.text_logits(prefix, ids)[:, -1:].argmax(-1)], 1)
    return ids[0].tolist()


def readable(ids: list[int], words: list[str]) -> str:
    return " ".join(words[i] for i in ids if i not in (BOS, EOS, PAD))


def main():
    full, causal = dependence("flow", REPEATS), dependence("ar", REPEATS)
    torch.manual_seed(0)
    scenes = Shapes("pretrain")
    words = scenes.vocabulary.words
    model = UnifiedModel(ModelConfig(vocab_size=len(words), text_len=scenes.text_len))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for step in range(STEPS):
        batch = scenes.__getitems__([(0, step * BATCH + i) for i in range(BATCH)])
        loss = text_loss(model, model.text_prefix(batch["question"]), batch["answer"]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:4}/{STEPS} | text loss {loss.item():.3f}")

    batch = Shapes("test").__getitems__([(0, i) for i in range(100)])
    right = 0
    for number, question in enumerate(batch["question"]):
        answer = rephrase(model, model.text_prefix(question[None]))
        wanted = readable(batch["answer"][number].tolist(), words)
        right += readable(answer, words) == wanted
        if number < 4:
            print(f"{readable(question.tolist(), words)}  ->  {readable(answer, words)}")
    note = f"text loss at first ln {len(words)} = {math.log(len(words)):.2f}, "
    note += f"after {STEPS} steps {loss.item():.2f}; {right} of 100 answers are right"
    counts = [int(mask.sum()) for mask in (full, causal)]
    captions = [f"flow: {counts[0]} white squares", f"ar, causal: {counts[1]} white squares"]
    image_grid([[squares(full), squares(causal)]], (), captions, 2, note).save("drawn.png")
    print(*captions, note, "drawn.png", sep="\n")


if __name__ == "__main__":
    main()
