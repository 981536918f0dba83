"""Data sets and their batches: `open_splits` by name, captioned images, the loader.

    python data.py imagenet DIR  # or folder, cifar10: what training would see; contact_sheet.png

A data set answers `__getitems__([(epoch, index), ...])` with a dictionary (B batch, T words):

    image              (B, 3, H, W) float in [0, 1]
    caption            (B, T) long, <bos> words <eos> <pad> ...: the generator's, sparse for shapes
    full_caption       (B, T) a full description, for the understanding side
    caption_target     (B, T) what the model learns to say: another wording; shapes: the canonical
    canonical_caption  (B, T) one fixed wording and order, the target of the visual words;
                       IGNORE_INDEX where they are free to say more
    question, answer   (B, T) full_caption and caption_target; shapes: or a description with an
                       instruction, and the description of the edited scene
    features           (B, N, D_enc) float16: the encoder's patch tokens (feature_cache.py)
    grid               (B, 9) long, shapes alone (shapes.py)
    bad                list of (path, reason), image folders alone: what cannot be read
"""

import copy
import errno
import itertools
import json
import os
import random
import signal
from array import array
from collections.abc import Collection, Iterable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from captions import class_captions
from cli import Parser, user_errors
from figures import contact_sheet
from folders import Found, file_fingerprint, read_folder
from images import center_crop_resize, decode_image, to_tensor
from shapes import Shapes
from words import IGNORE_INDEX, PAD, Vocabulary, split_words

SPLITS = ("pretrain", "understand", "reca", "test")
DATASETS = ("shapes", "imagenet", "folder", "cifar10")
SHEET_IMAGES = 12  # of a split on the contact sheet
NO_HANDLES = (errno.EMFILE, errno.ENFILE)  # too many open files


class PackedStrings:
    """A read-only list of strings in one block of memory, which workers share without copies."""

    def __init__(self, strings: Collection[str]):
        sizes = (len(string.encode("utf-8", "surrogatepass")) for string in strings)
        self.ends = array("I", itertools.accumulate(sizes, initial=0))
        self.block = "".join(strings).encode("utf-8", "surrogatepass")

    def __getitem__(self, i: int) -> str:
        if i + 1 >= len(self.ends):
            raise IndexError(i)  # which ends a loop over the strings
        return self.block[self.ends[i] : self.ends[i + 1]].decode("utf-8", "surrogatepass")


class CaptionedImages(Dataset):
    """Images with captions: image i is root/files[i], the lines of captions[i] are its wordings.

    The first wording is the plain one. An image that cannot be read is replaced by the next one
    that can, whatever the number of workers, and the batch names it in `bad`. Flips (in training)
    and wordings change with the epoch. Raises ValueError where no image can be read.
    """

    def __init__(self, root, files, captions, split, size, seed, vocabulary=None, text_len=32):
        self.root = root
        self.split = split
        self.image_size = size
        self.seed = seed
        self.text_len = text_len
        self.files = PackedStrings(files)
        numbers: dict[str, int] = {}  # images of a class share their captions
        ids = (numbers.setdefault(text, len(numbers)) for text in captions)
        self.text_ids = array("I", ids)
        self.texts = PackedStrings(numbers)
        self.vocabulary = vocabulary or Vocabulary.from_captions(numbers)
        self.flip = split != "test"
        self.bad: dict[int, str] = {}
        self.read_from(0, [])  # where no image can be read, say so before any long work

    def __len__(self) -> int:
        return len(self.text_ids)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def fingerprint(self) -> Iterator[bytes]:
        """What the images depend on, piece by piece; of a broken link the name alone."""
        yield repr((self.image_size, len(self))).encode()
        for i in range(len(self)):
            found = os.path.exists(self.path(i)) and file_fingerprint(self.path(i))
            yield repr((self.files[i], found)).encode()

    def read(self, index: int) -> Image.Image:
        return decode_image(self.path(index), self.image_size)

    def read_from(self, index: int, skipped: list[int]) -> tuple[int, Image.Image]:
        """The first readable image from `index` on, and its index. Adds others to `skipped`."""
        for i in itertools.chain(range(index, len(self)), range(index)):
            if i not in self.bad:
                try:
                    return i, self.read(i)
                except Exception as error:  # Pillow's plugins raise nearly anything
                    if isinstance(error, MemoryError) or getattr(error, "errno", 0) in NO_HANDLES:
                        raise  # no fault of the image
                    self.bad[i] = " ".join(f"{type(error).__name__}: {error}".split())
            skipped.append(i)
        none = f"none of the {len(self)} images below {self.root} can be read"
        raise ValueError(f"{none}; the last one: {self.bad[i]}")

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        images = []
        skipped = []
        texts = []
        for key in keys:
            index, image = self.read_from(key[1], skipped)
            rng = random.Random(f"{self.seed} {self.split} {key}")
            if self.flip and rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images.append(image)
            # The plain wording, and two different ones where there are several.
            lines = self.texts[self.text_ids[index]].split("\n")
            wordings = lines[:1] + (rng.sample(lines, 2) if len(lines) > 1 else lines * 2)
            texts.append([self.vocabulary.encode(text, self.text_len) for text in wordings])
        plain, full_caption, target = map(torch.tensor, zip(*texts, strict=True))  # (B, T)
        return {
            "image": to_tensor(images),  # (B, 3, H, W)
            "caption": plain,
            "full_caption": full_caption,
            "caption_target": target,
            # A class's name says little of a photograph: behind it the visual words are free.
            "canonical_caption": plain.masked_fill(plain == PAD, IGNORE_INDEX),
            "question": full_caption,
            "answer": target,
            "bad": [(self.path(i), self.bad[i]) for i in dict.fromkeys(skipped)],
        }


class Cifar10Images(CaptionedImages):
    """CIFAR-10: an array (N, 32, 32, 3) of bytes, downloaded to data_dir where it is not there."""

    def __init__(self, data_dir: str, split: str, *options):
        from torchvision.datasets import CIFAR10

        try:
            cifar = CIFAR10(data_dir, split != "test", download=True)
        except Exception as error:
            hint = f"put cifar-10-python.tar.gz into {data_dir}"
            raise ValueError(f"CIFAR-10 cannot be downloaded ({error}): {hint}") from None
        self.arrays = cifar.data
        by_class = [class_captions(name) for name in cifar.classes]
        captions = [by_class[target] for target in cifar.targets]
        super().__init__("CIFAR-10", map(str, range(len(captions))), captions, split, *options)

    def fingerprint(self) -> Iterator[bytes]:
        yield repr(self.image_size).encode()
        yield self.arrays.tobytes()

    def read(self, index: int) -> Image.Image:
        return center_crop_resize(Image.fromarray(self.arrays[index]), self.image_size)


def open_splits(
    name,
    data_dir="",
    image_size=48,
    seed=0,
    vocabulary=None,
    text_len=32,
    cache_dir="",
    caption_column="",
) -> dict[str, Dataset]:
    """The data set `name`, one of DATASETS, by split; all of SPLITS but 'test' are for training.

    Of photographs these are the same images. vocabulary: that of a checkpoint, else all words of
    the training captions. ValueError where the images of a split cannot be used.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset {name}: no such data set, there are {', '.join(DATASETS)}")
    if name == "shapes":
        return {split: Shapes(split, image_size, seed) for split in SPLITS}
    options = (image_size, seed, vocabulary, text_len)
    if name == "cifar10":
        train = Cifar10Images(data_dir, "pretrain", *options)
        test = Cifar10Images(data_dir, "test", image_size, seed, train.vocabulary, text_len)
        found = Found(data_dir, {}, {}, 10, ["train and test as published"])
    else:
        found = read_folder(name, data_dir, cache_dir, caption_column)
        parts = {
            part: (found.root, found.files[part], found.captions[part]) for part in found.files
        }
        train = CaptionedImages(*parts["train"], "pretrain", *options)
        options = (image_size, seed, train.vocabulary, text_len)
        test = CaptionedImages(*parts["test"], "test", *options)
        found.files, found.captions = {}, {}  # packed now
    splits = {}
    for split in SPLITS[:-1]:
        splits[split] = copy.copy(train)
        splits[split].split = split
        splits[split].found = found
    return splits | {"test": test}


def summarize_splits(splits: dict[str, CaptionedImages]) -> list[str]:
    """What training sees of captioned images, then what was assumed or is amiss, a line each."""
    train, test = splits["pretrain"], splits["test"]
    found = train.found
    lengths = [len(split_words(line)) for text in train.texts for line in text.split("\n")]
    cut = sum(length > train.text_len - 1 for length in lengths)
    line = f"{found.root}: {len(train)} images to train on, {len(test)} to test on, "
    line += f"{found.classes} classes, {len(train.vocabulary)} words, longest caption "
    line += f"{max(lengths)} words, {cut} of {len(lengths)} cut at {train.text_len - 1}"
    return [line, *found.facts, *found.warnings]


def batch_indices(size, batch_size, seed, start=0, rank=0, world_size=1) -> Iterator[list]:
    """Batches of (epoch, index) without end: one seeded permutation an epoch.

    start: the number of batches used before a resume. Each process gets its share of every batch.
    """
    assert batch_size % world_size == 0, f"{batch_size=} cannot be shared by {world_size=}"
    share = batch_size // world_size
    epoch = -1
    for first in itertools.count(start * batch_size + rank * share, batch_size):
        batch = []
        for position in range(first, first + share):
            if position // size != epoch:
                epoch = position // size
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order = torch.randperm(size, generator=generator).tolist()
            batch.append((epoch, order[position % size]))
        yield batch


def make_loader(dataset: Dataset, batches_of_indices: Iterable, workers: int) -> DataLoader:
    """Batches of the data set, made by `workers` processes (0: by this one)."""
    return DataLoader(
        dataset,
        batch_sampler=batches_of_indices,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
        collate_fn=dict,  # `__getitems__` has made a whole batch
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # draws a seed: not from the global one, which is restored
    )


def ignore_signals(worker: int) -> None:
    """Lets the main process save first, for 30 s after a SIGTERM: it ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def batches(
    dataset, batch_size, seed, start=0, workers=0, bad_file="", rank=0, world_size=1, max_images=0
) -> Iterator[dict]:
    """Batches without end of the first max_images images (0: all). bad_file names skipped ones."""
    size = min(max_images or len(dataset), len(dataset))
    indices = batch_indices(size, batch_size, seed, start, rank, world_size)
    named = set()
    for batch in make_loader(dataset, indices, workers):
        bad = dict(batch.pop("bad", ()))
        if bad_file and not bad.keys() <= named:
            with open(bad_file, "a+", encoding="utf-8", errors="surrogateescape") as file:
                file.seek(0)
                before = {line.split("\t")[0] for line in file}  # by another stream or run
                lines = {one_line(path): reason for path, reason in bad.items()}
                file.writelines(f"{path}\t{lines[path]}\n" for path in lines.keys() - before)
            named |= bad.keys()
        yield batch


def one_line(path: str) -> str:
    """A path with tabs, newlines and quotation marks escaped as in JSON."""
    return json.dumps(path, ensure_ascii=False)[1:-1]


def main() -> None:
    """Show what training would see of a data set, without training; and a contact sheet of it."""
    parser = Parser(description=main.__doc__)
    add = parser.add_argument
    add("dataset", choices=DATASETS[1:])
    add("data_dir", nargs="?", default="", help="the folder of the images")
    add("--image_size", type=int, default=64, help="side of an image (64)")
    add("--text_len", type=int, default=33, help="length of a caption in words (33)")
    add("--caption_column", default="", help="of tables of captions")
    add("--cache_dir", default="", help="folder of file lists (~/.cache/reca)")
    add("--out", default="contact_sheet.png", help="the picture (contact_sheet.png)")
    options = vars(parser.parse_args())
    name, out = options.pop("dataset"), options.pop("out")
    with user_errors():
        splits = open_splits(name, **options)
        print("\n  ".join(summarize_splits(splits)))
        images, captions, bad = [], [], []
        for split in ("pretrain", "test"):
            dataset = splits[split]
            count = min(SHEET_IMAGES, len(dataset))
            batch = dataset.__getitems__([(0, i * len(dataset) // count) for i in range(count)])
            texts = [dataset.vocabulary.decode(row.tolist()) for row in batch["caption"]]
            captions += [f"{split}: {text}" for text in texts]
            images.append(batch["image"])
            bad += batch["bad"]
        print("\n".join(f"  {caption}" for caption in captions[:3]))
        for path, reason in dict.fromkeys(bad):
            print(f"  cannot be read: {one_line(path)} ({reason})")
        contact_sheet(torch.cat(images), captions).save(out)
        print(f"{out}: {len(captions)} images from all over the splits, with their captions")


if __name__ == "__main__":
    main()
