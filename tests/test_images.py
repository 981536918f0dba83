"""Image files as tensors: orientation, modes, formats, framing.

pytest tests/test_images.py
"""

import os
import struct

import pytest
import torch
from PIL import Image, features

from images import center_crop_resize, decode_image, open_rgb, read_images, to_tensor
from pictures import as_bytes, picture

Turn = Image.Transpose
# By EXIF orientation: how an upright image is stored.
STORED = {
    1: None,
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_90,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_270,
}


def pixels_of(path, size: int) -> torch.Tensor:
    return to_tensor([decode_image(str(path), size)])[0]


def store(image, orientation):
    """The image as a camera stores it, and the EXIF block that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = STORED[orientation]
    return image if turn is None else image.transpose(turn), exif


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_gives_upright_pixels(tmp_path, orientation, form):
    upright = picture(5, (11, 11))
    upright.paste((255, 0, 0), (0, 0, 4, 2))  # no symmetry of the square maps this onto itself
    stored, exif = store(upright, orientation)
    (tmp_path / "x").write_bytes(as_bytes(stored, form, exif=exif))
    expected = to_tensor([upright])[0]
    torch.testing.assert_close(pixels_of(tmp_path / "x", 11), expected, atol=0, rtol=0)


@pytest.mark.parametrize("orientation", STORED)
def test_a_whole_image_is_upright_and_of_full_size(tmp_path, orientation):
    upright = picture(5, (11, 7))
    stored, exif = store(upright, orientation)
    (tmp_path / "x.png").write_bytes(as_bytes(stored, exif=exif))
    image = open_rgb(str(tmp_path / "x.png"))
    assert image.size == (11, 7)
    assert image.tobytes() == upright.tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_keep_their_scale(tmp_path, form):
    values = [0, 257 * 10, 257 * 128, 257 * 200, 65535, 300, 257 * 60, 257 * 90, 257 * 250]
    image = Image.frombytes("I;16", (3, 3), struct.pack("<9H", *values))
    (tmp_path / "x").write_bytes(as_bytes(image, form))
    expected = (torch.tensor(values) / 65535).view(1, 3, 3).expand(3, -1, -1)
    torch.testing.assert_close(pixels_of(tmp_path / "x", 3), expected, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize("largest", [1, 255])
def test_a_tiff_of_floats_is_not_black(tmp_path, largest):
    """Its values are in [0, 1], or in [0, 255]."""
    values = torch.linspace(0, 1, 9)
    image = Image.frombytes("F", (3, 3), struct.pack("<9f", *(values * largest).tolist()))
    (tmp_path / "x").write_bytes(as_bytes(image, "TIFF"))
    expected = values.view(1, 3, 3).expand(3, -1, -1)
    torch.testing.assert_close(pixels_of(tmp_path / "x", 3), expected, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize("form, feature", [("AVIF", "avif"), ("JPEG2000", "jpg_2000")])
def test_avif_and_jpeg_2000_are_read(tmp_path, form, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    (tmp_path / "x").write_bytes(as_bytes(image, form))
    expected = torch.tensor([200, 40, 90])[:, None, None].expand(3, 8, 8) / 255
    torch.testing.assert_close(pixels_of(tmp_path / "x", 8), expected, atol=0.02, rtol=0)


def modes_and_formats() -> dict[str, tuple[bytes, torch.Tensor]]:
    """Files of 8 x 8 pixels, and the bytes (3, 8, 8) that they should become."""
    color = (200, 40, 90)
    rgb = Image.new("RGB", (8, 8), color)
    clear = Image.new("RGBA", (8, 8), (*color, 255))
    clear.paste((1, 2, 3, 0), (0, 0, 8, 4))  # transparent above: white, not the color under it
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([1, 2, 3, *color])
    palette.paste(0, (0, 0, 8, 4))
    frames = [Image.new("RGB", (8, 8), (0, 250 * i, 0)) for i in range(3)]
    moving = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    plain = torch.tensor(color)[:, None, None].expand(3, 8, 8)
    white_above = plain.clone()
    white_above[:, :4] = 255
    return {
        "rgb.png": (as_bytes(rgb), plain),
        "png_called.jpg": (as_bytes(rgb), plain),
        "cmyk.jpg": (as_bytes(rgb.convert("CMYK"), "JPEG", quality=100), plain),
        "alpha.png": (as_bytes(clear), white_above),
        "webp.webp": (as_bytes(clear, "WEBP", lossless=True), white_above),
        "palette.png": (as_bytes(palette, transparency=0), white_above),
        "palette.gif": (as_bytes(palette, "GIF", transparency=0), white_above),
        "moving.gif": (moving, torch.zeros(3, 8, 8)),
        "one_bit.png": (as_bytes(Image.new("1", (8, 8), 1)), torch.full((3, 8, 8), 255)),
        "one_pixel.png": (as_bytes(Image.new("RGB", (1, 1), color)), plain),
    }


@pytest.mark.parametrize("name", modes_and_formats())
def test_modes_and_formats_become_the_same_rgb(tmp_path, name):
    content, expected = modes_and_formats()[name]
    (tmp_path / name).write_bytes(content)
    error = (pixels_of(tmp_path / name, 8) * 255 - expected).abs().max()
    assert error <= (4 if name == "cmyk.jpg" else 0.01)


@pytest.mark.parametrize("size, box", [((20, 8), (6, 0, 14, 8)), ((8, 21), (0, 6, 8, 14))])
def test_the_centre_square_is_kept(tmp_path, size, box):
    image = picture(3, size)
    image.paste((0, 255, 0), (box[0], box[1], box[0] + 2, box[1] + 2))
    (tmp_path / "x.png").write_bytes(as_bytes(image))
    assert torch.equal(pixels_of(tmp_path / "x.png", 8), to_tensor([image.crop(box)])[0])


def test_draft_mode_stays_near_the_full_decode(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (48 * 64 * 3,), generator=generator).tolist()
    small = Image.frombytes("RGB", (64, 48), bytes(noise))
    image = small.resize((640, 480), Image.Resampling.BICUBIC)
    (tmp_path / "x.jpg").write_bytes(as_bytes(image, "JPEG", quality=95))
    full = to_tensor([center_crop_resize(open_rgb(str(tmp_path / "x.jpg")), 64)])[0]
    error = (pixels_of(tmp_path / "x.jpg", 64) - full).square().mean().sqrt()
    assert 0 < error < 0.015
    assert full.std() > 0.1


def test_what_is_no_image_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a file"):
        open_rgb(str(tmp_path / "pipe.png"))
    (tmp_path / "bomb.png").write_bytes(as_bytes(Image.new("1", (10_000, 10_000))))
    with pytest.raises(ValueError, match="10000 x 10000 pixels are more than"):
        open_rgb(str(tmp_path / "bomb.png"))
    with pytest.raises(ValueError, match="cannot read the image .*pipe.png: not a file"):
        read_images([str(tmp_path / "pipe.png")], 8)
