"""Images and image folders that the tests of files share, made here."""

import io

import torch
from PIL import Image


def picture(i: int, size=(12, 9)) -> Image.Image:
    """A smooth picture that differs for every i, and from its own mirror image."""
    ramp = torch.arange(size[0]).float()[None, :, None] / size[0] * 200
    offset = torch.tensor([i * 37 % 50, i * 11 % 50, i // 7 % 50])
    pixels = (ramp + offset).expand(size[1], -1, 3).contiguous().byte()
    return Image.frombytes("RGB", size, bytes(pixels.flatten().tolist()))


def as_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """The file that the image makes."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def make_folder(root, classes=("cat", "sea_otter"), count: int = 10, val: int = 3) -> str:
    """An ImageNet of `count` training images and `val` others a class."""
    for part, images in (("train", count), ("val", val)):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(images):
                (folder / f"{i:03d}.JPEG").write_bytes(as_bytes(picture(100 * c + i), "JPEG"))
    return str(root)
