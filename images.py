"""The one reader of image files: any format and mode -> upright RGB -> a square -> (B, 3, H, W)."""

import os
import warnings

import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch.utils.data import get_worker_info

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
SUFFIXES |= {".pgm", ".avif", ".jp2"}
# By content, not by suffix.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]
# Images that Pillow cannot read are named once, in bad_images.txt.
warnings.filterwarnings("ignore", module="PIL")


def open_rgb(path: str, draft_size: int = 0) -> Image.Image:
    """An image file as RGB: EXIF orientation applied, alpha over white, an animation's first frame.

    draft_size: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, as long as
    no side falls below this number of pixels; 0 for full size. Raises OSError for what is not a
    file, ValueError above Image.MAX_IMAGE_PIXELS, and whatever Pillow finds wrong with the content.
    """
    if not os.path.isfile(path):
        raise OSError("not a file")  # reading a pipe would wait
    with Image.open(path, formats=FORMATS) as image:
        # Pillow itself warns here, and refuses only twice as many.
        limit = Image.MAX_IMAGE_PIXELS
        if image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
        if draft_size:
            image.draft(None, (draft_size, draft_size))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            # Integers have 16 bits, floats are in [0, 1] or [0, 255]; convert("L") clips at 255.
            scale = 1 / 257
            if image.mode == "F":
                scale = 255 if image.getextrema()[1] <= 1 else 1
            image = image.convert("F").point(lambda value: value * scale + 0.5).convert("L")
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """The central square of an RGB image, resized to size x size."""
    width, height = image.size
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    # Hamming is as good as bicubic for shrinking, and faster.
    resampling = Image.Resampling.HAMMING if side > size else Image.Resampling.BICUBIC
    return image.resize((size, size), resampling, (left, top, left + side, top + side))


def decode_image(path: str, size: int) -> Image.Image:
    """The central square of an image file, size x size RGB. Raises what `open_rgb` raises."""
    return center_crop_resize(open_rgb(path, size), size)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> (B, 3, H, W) float in [0, 1]."""
    batch = torch.empty(len(images), 3, images[0].height, images[0].width)  # (B, 3, H, W)
    if get_worker_info():
        batch.share_memory_()  # the main process reads it there: no copy on the way
    for i, image in enumerate(images):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        batch[i] = rearrange(pixels, "(h w c) -> c h w", h=image.height, c=3)
    return batch.div_(255)


def read_images(paths: list[str], size: int) -> torch.Tensor:
    """Image files -> (B, 3, size, size) in [0, 1]. A ValueError names one that is unreadable."""
    images = []
    for path in paths:
        try:
            images.append(decode_image(path, size))
        except Exception as error:  # Pillow's plugins raise nearly anything
            raise ValueError(f"cannot read the image {path}: {error}") from None
    return to_tensor(images)


def read_whole_image(path: str, side: int, patch_size: int, max_aspect: int = 8) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]: not cropped, the shorter side about `side`; whole patches."""
    try:
        image = open_rgb(path)
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise ValueError(f"cannot read the image {path}: {error}") from None
    shorter = max(min(image.size), max(image.size) / max_aspect)
    scale = side / shorter / patch_size  # patches a pixel
    size = [max(1, round(pixels * scale)) * patch_size for pixels in image.size]
    return to_tensor([image.resize(size, Image.Resampling.BICUBIC)])
