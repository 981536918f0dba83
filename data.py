"""Data sets and their batches: `make_dataset` by name, captioned images, the loader.

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

import errno
import itertools
import os
import random
import signal
from array import array
from collections.abc import Iterable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from folders import class_captions, file_fingerprint, read_folder
from images import center_crop_resize, decode_image, to_tensor
from shapes import Shapes
from words import IGNORE_INDEX, PAD, Vocabulary

DATASETS = ("shapes", "imagenet", "folder", "cifar10")
NO_HANDLES = (errno.EMFILE, errno.ENFILE)  # too many open files


class PackedStrings:
    """A read-only list of strings in one block of memory, which workers share without copies."""

    def __init__(self, strings: Iterable[str]):
        parts = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.block = b"".join(parts)
        self.ends = array("q", itertools.accumulate(map(len, parts), initial=0))

    def __getitem__(self, i: int) -> str:
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
        self.text_ids = array("q", [numbers.setdefault(text, len(numbers)) for text in captions])
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


def make_dataset(
    name, split, data_dir="", image_size=48, seed=0, vocabulary=None, text_len=32, cache_dir=""
) -> Dataset:
    """The data set `name`, one of DATASETS. split: 'pretrain', 'understand', 'reca' or 'test'.

    Of photographs the first three are the training images, 'test' is val/. vocabulary: that of a
    checkpoint, else all words of the training captions. ValueError where no images can be used.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset {name}: no such data set, there are {', '.join(DATASETS)}")
    if name == "shapes":
        return Shapes(split, image_size, seed)
    if split == "test" and vocabulary is None:
        vocabulary = make_dataset(name, "pretrain", data_dir, cache_dir=cache_dir).vocabulary
    options = (split, image_size, seed, vocabulary, text_len)
    if name == "cifar10":
        return Cifar10Images(data_dir, *options)
    return CaptionedImages(*read_folder(name, split, data_dir, cache_dir), *options)


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
                named |= {line.split("\t")[0] for line in file}  # by another stream or run
                file.writelines(f"{path}\t{bad[path]}\n" for path in bad if path not in named)
            named |= bad.keys()
        yield batch
