"""Features of the frozen encoder, computed once and read from a file (`--cache_features`)."""

import hashlib
import math
import os
import shutil
import time

import torch
from torch.utils.data import BatchSampler, Dataset
from tqdm import tqdm

from data import make_loader
from encoder import encoder_hash
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

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        # Mapping the file each time takes microseconds, and nothing is sent to workers.
        mapped = torch.from_file(self.path, True, math.prod(self.shape), dtype=torch.float16)
        features = mapped.view(self.shape)[[index for _, index in keys]]  # (B, N, D_enc)
        return self.dataset.__getitems__(keys) | {"features": features}


def encoder_fingerprint(encoder: torch.nn.Module, size: int, dtype: torch.dtype) -> str:
    """What features depend on besides the images: encoder and weights, input size, dtype."""
    return f"{encoder_hash(encoder)} {size} {dtype}"


def cache_features(dataset, encode, fingerprint, cache_dir="", workers=0, rank=0, world_size=1):
    """The data set with its features; encode: (B, 3, H, W) -> (B, N, D_enc) computes absent ones.

    The file's name is a hash of all they depend on, `fingerprint` being the encoder's part. A byte
    at its end marks each block that is on the disk: a stopped computation continues. Each of
    world_size processes computes its share. Raises ValueError with a sentence for the user.
    """
    dataset.flip = False  # with both orientations the file would be twice as large
    blocks = list(BatchSampler([(0, i) for i in range(len(dataset))], BLOCK, drop_last=False))
    expected = encode(dataset.__getitems__(blocks[0][:8])["image"]).cpu().float()
    shape = (len(dataset), *expected.shape[1:])  # (images, N, D_enc)
    name = hashlib.sha256(f"{fingerprint} {shape}".encode())
    for piece in dataset.fingerprint():
        name.update(hashlib.sha256(piece).digest())
    folder = default_cache_dir(cache_dir)
    os.makedirs(folder, exist_ok=True)
    cached = CachedFeatures(dataset, f"{folder}/features_{name.hexdigest()[:32]}", shape)
    block_bytes = 2 * BLOCK * math.prod(shape[1:])
    end = 2 * math.prod(shape)  # of the features: here the marks begin
    descriptor = os.open(cached.path, os.O_RDWR | os.O_CREAT, 0o666)
    with open(descriptor, "r+b") as file:
        file.truncate(end + len(blocks))
        marks = os.pread(descriptor, len(blocks), end)
        need = block_bytes * marks.count(0) / 1e9  # GB
        free = shutil.disk_usage(folder).free / 1e9
        if need > free:
            sizes = f"{need:.3g} GB in {folder}, where {free:.3g} GB are free"
            raise ValueError(f"--cache_features needs {sizes}: change --cache_dir, or leave it out")
        stored = cached.__getitems__(blocks[0][:8])["features"]
        if marks[0] and not (stored - expected).norm() < SAME_FEATURES * expected.norm():
            raise ValueError(f"the features in {cached.path} are not this code's: remove that file")
        todo = [i for i in range(rank, len(blocks), world_size) if not marks[i]]
        loader = iter(make_loader(dataset, [blocks[i] for i in todo], workers))
        for i in tqdm(todo, "features", unit="block", leave=False, disable=rank > 0 or None):
            features = encode(next(loader)["image"]).cpu().half()  # (BLOCK, N, D_enc)
            if not features.isfinite().all():
                raise ValueError("--cache_features: features beyond float16's 65504: leave it out")
            file.seek(i * block_bytes)
            file.write(features.contiguous().numpy())
            file.flush()
            os.fsync(file)  # first the features, then their mark
            os.pwrite(descriptor, b"\1", end + i)
        while 0 in os.pread(descriptor, len(blocks), end):
            time.sleep(0.1)  # the other processes compute their shares
    return cached
