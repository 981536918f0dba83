"""Features of the frozen encoder, computed once and read from a file (`--cache_features`).

# B batch, N patch tokens, D_enc the encoder's width
"""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from itertools import chain

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data import make_loader
from folders import default_cache_dir

BLOCK = 128  # images that are encoded, and marked as done, at once
SAME_FEATURES = 0.2  # relative error. CLIP: rounding to bfloat16 0.08, another resizing 0.5


class CachedFeatures(Dataset):
    """A data set whose batches also hold `features`, from the file that `cache_features` wrote."""

    def __init__(self, dataset: Dataset, path: str, shape: tuple[int, int, int]):
        self.dataset = dataset
        self.path = path
        self.shape = shape  # (images, N, D_enc)

    def __len__(self) -> int:
        return len(self.dataset)

    def features(self, indices: list[int]) -> torch.Tensor:
        # Mapping the file each time takes microseconds, and nothing is sent to workers.
        mapped = torch.from_file(self.path, True, math.prod(self.shape), dtype=torch.float16)
        return mapped.view(self.shape)[indices]  # (B, N, D_enc)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        features = self.features([index for _, index in keys])
        return self.dataset.__getitems__(keys) | {"features": features}


def encoder_fingerprint(encoder: torch.nn.Module, size: int, dtype: torch.dtype) -> Iterator[bytes]:
    """What features depend on besides the images, in pieces: encoder and weights, size, dtype."""
    yield repr((encoder.cfg, size, dtype)).encode()
    for name, tensor in encoder.state_dict().items():
        yield repr((name, tensor.dtype, tensor.shape)).encode()
        yield tensor.cpu().reshape(-1).view(torch.uint8).numpy()


def block_keys(block: int, size: int) -> list[tuple[int, int]]:
    return [(0, i) for i in range(size)[block * BLOCK : (block + 1) * BLOCK]]


def cache_features(
    dataset, encode, fingerprint, cache_dir="", workers=0, rank=0, world_size=1
) -> CachedFeatures:
    """The data set with its features; encode: (B, 3, H, W) -> (B, N, D_enc) computes absent ones.

    The file's name is a hash of all that features depend on, `fingerprint` being the encoder's
    part. A byte at its end marks each block that is on the disk: a stopped computation continues.
    Images are no longer flipped, as the file would be twice as large. Each of world_size processes
    computes its share. Raises ValueError with a sentence for the user.
    """
    dataset.flip = False
    sample = list(range(min(8, BLOCK, len(dataset))))
    expected = encode(dataset.__getitems__([(0, i) for i in sample])["image"]).cpu().half()
    shape = (len(dataset), *expected.shape[1:])  # (images, N, D_enc)

    name = hashlib.sha256(repr(shape).encode())
    for piece in chain(fingerprint, dataset.fingerprint()):
        name.update(hashlib.sha256(piece).digest())
    folder = default_cache_dir(cache_dir)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"features_{name.hexdigest()[:32]}")
    cached = CachedFeatures(dataset, path, shape)

    blocks = math.ceil(len(dataset) / BLOCK)
    block_bytes = 2 * BLOCK * math.prod(shape[1:])
    end = 2 * math.prod(shape)  # of the features: here the marks begin
    open(path, "ab").close()  # made where it is not there
    with open(path, "r+b") as file:
        file.truncate(end + blocks)
        marks = os.pread(file.fileno(), blocks, end)
        need = block_bytes * marks.count(0)
        free = shutil.disk_usage(folder).free
        if need > free:
            sizes = f"{need / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free"
            hint = "give --cache_dir another place, or leave --cache_features out"
            raise ValueError(f"--cache_features needs {sizes}: {hint}")
        limit = SAME_FEATURES * expected.float().norm()
        if marks[0] and not (cached.features(sample) - expected).float().norm() < limit:
            raise ValueError(f"the features in {path} are not this code's: remove that file")

        # Encode this process's share of the blocks without a mark.
        todo = [i for i in range(rank, blocks, world_size) if not marks[i]]
        loader = make_loader(dataset, (block_keys(i, len(dataset)) for i in todo), workers)
        hidden = rank > 0 or not todo or None
        bar = tqdm(loader, "features", len(todo), unit="block", leave=False, disable=hidden)
        for i, batch in zip(todo, bar, strict=True):
            features = encode(batch["image"]).cpu().half()  # (BLOCK, N, D_enc)
            if not features.isfinite().all():
                raise ValueError("--cache_features: features beyond float16's 65504: leave it out")
            file.seek(i * block_bytes)
            file.write(features.contiguous().numpy())
            file.flush()
            os.fsync(file.fileno())  # first the features, then their mark
            os.pwrite(file.fileno(), b"\1", end + i)
            os.fsync(file.fileno())

        # Wait for the shares of the other processes.
        while 0 in os.pread(file.fileno(), blocks, end):
            time.sleep(0.1)
    return cached
