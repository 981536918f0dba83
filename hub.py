"""The file of weights that is meant: a preset of the public hub, a folder or a path.

    file = find_weights("clip-b16")  # from a cache, or downloaded once

The hub's own variables hold: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import difflib
import http.client
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import torch

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


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder."""
    return next((folder / name for name in WEIGHTS if (folder / name).exists()), None)


def find_weights(name_or_path: str) -> Path:
    """The file of weights behind a preset's name, a folder or a path."""
    path = fetch(HUB[name_or_path]) if name_or_path in HUB else Path(name_or_path)
    if not path.exists():
        near = difflib.get_close_matches(name_or_path, HUB, n=3, cutoff=0.3)
        names = " or ".join(near or HUB)
        raise ValueError(f"{name_or_path} is neither a path nor an encoder; did you mean {names}?")
    file = weights_in(path) if path.is_dir() else path
    if file is None:
        raise ValueError(f"{path} holds none of {', '.join(WEIGHTS)}")
    return file


def download(url: str, target: Path) -> bool:
    """Download a file, whole or not at all. False where the hub does not have it (404)."""
    part = target.with_name(f"{target.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
            print(f"downloading {url} to {target.parent}", file=sys.stderr)
            shutil.copyfileobj(reply, file)
            if reply.length:  # what is still to come
                raise OSError(f"it broke off {reply.length} bytes before its end")
    except (OSError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        if getattr(error, "code", None) == 404:
            return False
        raise ValueError(f"cannot download {url}: {error}") from None
    part.replace(target)
    return True


def fetch(repo: str) -> Path:
    """A folder with a hub repository's files: of the hub's cache, of ours, or downloaded."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    flat_name = repo.replace("/", "--")
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{flat_name}"
    own_cache = Path(torch.hub.get_dir()) / "checkpoints" / flat_name
    for folder in (*sorted(hub_cache.glob("snapshots/*")), own_cache):
        if weights_in(folder) and (folder / "config.json").exists():
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ValueError(
            f"HF_HUB_OFFLINE is set, and neither {hub_cache} nor {own_cache} has {repo}"
        )
    own_cache.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    # Some older repositories have only the last of these.
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        found = download(f"{endpoint}/{repo}/resolve/main/{name}", own_cache / name)
        if found and name in WEIGHTS:
            return own_cache
    raise ValueError(f"{repo} holds neither model.safetensors nor pytorch_model.bin")
