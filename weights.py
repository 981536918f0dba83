"""Files of weights as names and tensors: where they are, and any form that they come in.

    tensors, words = read_tensors(find_weights("clip-b16"))  # or a folder as on the hub, or a file

Read are safetensors, torch.save's files, shards of both, and TorchScript archives; of a training
checkpoint the encoder's own tensors, the teacher's or averaged ones first. What they mean:
pretrained.py.
"""

import difflib
import json
import math
import mmap
import os
import re
import shutil
import sys
import urllib.request
import warnings
import zipfile
from argparse import Namespace
from http.client import HTTPException
from pathlib import Path, PosixPath

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
HUB = {  # preset -> repository on the public hub; -reg: with registers
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-b16": "openai/clip-vit-base-patch16",
    "clip-l14": "openai/clip-vit-large-patch14",
    "clip-l14-336": "openai/clip-vit-large-patch14-336",
    "siglip-b16": "google/siglip-base-patch16-224",
    "siglip-so400m-14": "google/siglip-so400m-patch14-384",
    "siglip2-b16": "google/siglip2-base-patch16-224",
    "siglip2-so400m-14": "google/siglip2-so400m-patch14-384",
}
for size in ("small", "base", "large", "giant"):
    HUB[f"dinov2-{size[0]}14"] = f"facebook/dinov2-{size}"
    HUB[f"dinov2-{size[0]}14-reg"] = f"facebook/dinov2-with-registers-{size}"
WEIGHTS = ["model.safetensors", "open_clip_model.safetensors"]
WEIGHTS += ["pytorch_model.bin", "open_clip_pytorch_model.bin"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
WEIGHTS += [
    f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")
]  # of shards
# Where a training checkpoint keeps weights, and how it begins their names; the first counts.
AVERAGED = ["teacher", "model_ema", "ema", "ema_model", "state_dict_ema", "ema_state_dict"]
WRAPPERS = [*AVERAGED, "state_dict", "model_state_dict", "model", "module", "student", "encoder"]
PREFIXES = [*AVERAGED, "module", "_orig_mod", "model", "student", "backbone", "net"]
PUBLISHED = ["visual", "vision_model", "dinov2", "dinov2_with_registers", "layer"]


def find_weights(name_or_path: str) -> Path:
    """The file of weights behind a preset's name, a folder or a path."""
    path = fetch(HUB[name_or_path]) if name_or_path in HUB else Path(name_or_path).expanduser()
    index = re.sub(r"-\d{5}-of-\d{5}(\.\w+)$", r"\1.index.json", path.name)  # of a shard
    for file in (path.with_name(index), path, *(path / name for name in WEIGHTS)):
        if file.is_file():
            return file
    if path.exists():
        raise ValueError(f"{path} holds none of {', '.join(WEIGHTS)}")
    near = " or ".join(difflib.get_close_matches(name_or_path, HUB, n=3, cutoff=0.3) or HUB)
    raise ValueError(f"{name_or_path} is neither a path nor an encoder; did you mean {near}?")


def fetch(repo: str) -> Path:
    """A folder with a hub repository's files: of the hub's cache, of ours, or downloaded."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    name = repo.replace("/", "--")
    shared = Path(os.environ.get("HF_HUB_CACHE", home / "hub"), f"models--{name}")
    own = Path(torch.hub.get_dir(), "checkpoints", name)
    for folder in (*sorted(shared.glob("snapshots/*")), own):
        if (folder / "config.json").exists() and any((folder / file).exists() for file in WEIGHTS):
            return folder
    way_out = "or give the path of a file or folder of weights, --encoder PATH"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ValueError(f"HF_HUB_OFFLINE is set, neither {shared} nor {own} has {repo}: {way_out}")
    own.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    # Some older repositories have only the last of these.
    for file in ("config.json", "model.safetensors", "pytorch_model.bin"):
        url = f"{endpoint}/{repo}/resolve/main/{file}"
        part = own / f"{file}.part"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as out:
                print(f"downloading {url} to {own}", file=sys.stderr)
                shutil.copyfileobj(reply, out)
                if reply.length:  # what is still to come
                    raise OSError(f"it broke off {reply.length} bytes before its end")
        except (OSError, HTTPException) as error:
            part.unlink(missing_ok=True)
            if getattr(error, "code", None) == 404:
                continue
            raise ValueError(f"cannot download {url}: {error}; {way_out}") from None
        part.replace(own / file)
        if file in WEIGHTS:
            return own
    raise ValueError(f"{repo} holds neither model.safetensors nor pytorch_model.bin")


def check_content(path: Path) -> None:
    """Raises ValueError for what often stands in the place of weights."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("a pointer of git-lfs, not the weights: run `git lfs pull` in its folder")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("a web page, not the weights: download the file itself (/resolve/)")
    if not start:
        raise ValueError("an empty file")


def read_safetensors(path: Path) -> Tensors:
    """A file of u64 header length, JSON header, raw bytes; the tensors are views of the mapping."""
    with open(path, "rb") as file:  # copy on write, since torch wants a writable buffer
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    position = start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"the header claims {start - 8} bytes, the file has {len(data)}")
    tensors = {}
    try:
        header = json.loads(data[8:start].decode())
        header.pop("__metadata__", None)
        # The tensors have to fill the file one after the other.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            if start + begin != position or end - begin != count * dtype.itemsize:
                raise ValueError(f"{name}, {entry}, does not fill the bytes from {position} on")
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=position)
            tensors[name] = flat.view(entry["shape"])
            position = start + end
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged safetensors header: {error!r}") from None
    if position != len(data):
        raise ValueError(f"the tensors end at byte {position}, the file at {len(data)}")
    return tensors


def read_tensors(path: Path) -> tuple[Tensors, str]:
    """Any file of weights as names and tensors, memory-mapped where the format allows; and the
    words that the file says of them. Raises ValueError with the true cause."""
    check_content(path)
    if path.name.endswith(".index.json"):
        return read_shards(path), ""
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    words = []
    while isinstance(content, dict) and not all(isinstance(t, Tensor) for t in content.values()):
        words += [value for value in content.values() if isinstance(value, str)]
        words += [str(value) for value in content.values() if isinstance(value, Namespace)]
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError("it holds no state dict, that is names and tensors")
    return strip_prefixes(content), " ".join(words)


def read_shards(path: Path) -> Tensors:
    """The tensors of all files that an index of shards names."""
    try:
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a damaged index of shards: {error!r}") from None
    tensors = {}
    for name in files:
        if not (path.parent / name).is_file():
            raise ValueError(f"its shard {name} is not there")
        tensors |= read_tensors(path.parent / name)[0]
    return strip_prefixes(tensors)


def read_pickle(path: Path):
    """What torch.save wrote, or the tensors of a TorchScript archive; no code of it runs."""
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            with warnings.catch_warnings(action="ignore"):  # it is deprecated
                return dict(torch.jit.load(path, "cpu").state_dict())
        # weights_only keeps a pickle from running code
        with torch.serialization.safe_globals([Namespace, PosixPath]):
            return torch.load(path, "cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle or zip can raise nearly anything
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            advice = "save the tensors alone, with torch.save(model.state_dict(), PATH)"
            raise ValueError(f"it holds objects of {unsafe[1]}, which are code: {advice}") from None
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"damaged, or no file of torch.save ({reason})") from None


def strip_prefixes(tensors: Tensors) -> Tensors:
    """Without what training put before the names: `module.`, `teacher.backbone.`, a chunk's number.

    Where one of PREFIXES begins some names, the others are left out, and that is said.
    """
    while tensors:
        firsts = dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name)
        chosen = next((name for name in PREFIXES if name in firsts), "")
        if not chosen and len(firsts) == 1 and not firsts.keys() & {*PUBLISHED}:
            chosen = next(iter(firsts))
        if not chosen:
            break
        others = sorted({name.split(".")[0] for name in tensors} - {chosen})
        if others:
            print(f"of the weights {chosen} are used, not {', '.join(others)}", file=sys.stderr)
        chosen += "."
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(chosen)}
        tensors = {name.removeprefix(chosen): tensor for name, tensor in own.items()}
    # DINOv2's own training keeps blocks in chunks, `blocks.0.11`, numbered through
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", n): t for n, t in tensors.items()}
