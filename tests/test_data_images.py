"""Image folders: what is read, how it is framed, what is skipped and named, and in which order. Images are made here.

    pytest tests/test_data_images.py
"""
import gzip
import io
import itertools
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

import data

TINY = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny-imagenet.tar"


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("index")))


def picture(i: int, size=(12, 9)) -> Image.Image:
    """A smooth picture that differs for every i, and from its own mirror image."""
    ramp = torch.arange(size[0]).float()[None, :, None] / size[0] * 200 + torch.tensor([i * 37 % 50, i * 11 % 50, i // 7 % 50])
    pixels = ramp.expand(size[1], -1, 3).contiguous().byte()
    return Image.frombytes("RGB", size, bytes(pixels.flatten().tolist()))


def as_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def make_folder(root, classes=("cat", "sea_otter"), count: int = 10, val: int = 3):
    for part, n in (("train", count), ("val", val)):
        for c, name in enumerate(classes):
            os.makedirs(root / part / name)
            for i in range(n):
                (root / part / name / f"{i:03d}.JPEG").write_bytes(as_bytes(picture(100 * c + i), "JPEG"))
    return str(root)


def first_pixels(path, size: int) -> torch.Tensor:
    return data.to_tensor([data.decode(str(path), size)])[0]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in ("image", "caption", "canonical", "full", "wording"))


# ---- pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_upright_pixels(tmp_path, orientation):
    upright = picture(5, (11, 11))
    upright.paste((255, 0, 0), (0, 0, 4, 2))  # no symmetry of the square maps this onto itself
    T = Image.Transpose
    stored = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    image = upright if stored[orientation] is None else upright.transpose(stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "TIFF"):
        (tmp_path / f"x.{form}").write_bytes(as_bytes(image, form, exif=exif))
        torch.testing.assert_close(first_pixels(tmp_path / f"x.{form}", 11), data.to_tensor([upright])[0], atol=0, rtol=0)


def test_16_bits_keep_their_scale(tmp_path):
    values = [0, 257 * 10, 257 * 128, 257 * 200, 65535, 300, 257 * 60, 257 * 90, 257 * 250]
    image = Image.frombytes("I;16", (3, 3), struct.pack("<9H", *values))
    for form in ("PNG", "TIFF"):
        (tmp_path / f"x.{form}").write_bytes(as_bytes(image, form))
        expected = (torch.tensor(values) / 65535).view(1, 3, 3).expand(3, -1, -1)
        torch.testing.assert_close(first_pixels(tmp_path / f"x.{form}", 3), expected, atol=0.51 / 255, rtol=0)


def test_modes_and_formats_become_the_same_rgb(tmp_path):
    rgb = Image.new("RGB", (8, 8), (200, 40, 90))
    clear = Image.new("RGBA", (8, 8), (200, 40, 90, 255))
    clear.paste((1, 2, 3, 0), (0, 0, 8, 4))  # transparent above: white, not the color hidden under it
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([1, 2, 3, 200, 40, 90])
    palette.paste(0, (0, 0, 8, 4))
    frames = [Image.new("RGB", (8, 8), (0, 250 * i, 0)) for i in range(3)]
    white_above = torch.tensor([200, 40, 90])[:, None, None].expand(3, 8, 8).clone()
    white_above[:, :4] = 255
    plain = torch.tensor([200, 40, 90])[:, None, None].expand(3, 8, 8)
    cases = {
        "rgb.png": (as_bytes(rgb), plain), "png_called.jpg": (as_bytes(rgb), plain),
        "cmyk.jpg": (as_bytes(rgb.convert("CMYK"), "JPEG", quality=100), plain),
        "alpha.png": (as_bytes(clear), white_above), "webp.webp": (as_bytes(clear, "WEBP", lossless=True), white_above),
        "palette.png": (as_bytes(palette, transparency=0), white_above),
        "palette.gif": (as_bytes(palette, "GIF", transparency=0), white_above),
        "moving.gif": (as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]), torch.zeros(3, 8, 8)),
        "one_bit.png": (as_bytes(Image.new("1", (8, 8), 1)), torch.full((3, 8, 8), 255)),
        "one_pixel.png": (as_bytes(Image.new("RGB", (1, 1), (200, 40, 90))), plain),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        error = (first_pixels(tmp_path / name, 8) * 255 - expected).abs().max()
        assert error <= (4 if name == "cmyk.jpg" else 0.01), f"{name}: off by {error}"


def test_the_centre_square_is_kept(tmp_path):
    for size, box in (((20, 8), (6, 0, 14, 8)), ((8, 21), (0, 6, 8, 14))):
        image = picture(3, size)
        image.paste((0, 255, 0), (box[0], box[1], box[0] + 2, box[1] + 2))
        (tmp_path / "x.png").write_bytes(as_bytes(image))
        assert torch.equal(first_pixels(tmp_path / "x.png", 8), data.to_tensor([image.crop(box)])[0])


def test_draft_mode_stays_near_the_full_decode(tmp_path):
    noise = torch.randint(256, (48 * 64 * 3,), generator=torch.Generator().manual_seed(0)).tolist()
    image = Image.frombytes("RGB", (64, 48), bytes(noise)).resize((640, 480), Image.Resampling.BICUBIC)
    (tmp_path / "x.jpg").write_bytes(as_bytes(image, "JPEG", quality=95))
    with Image.open(tmp_path / "x.jpg") as file:
        full = data.to_tensor([data.fit(file, 64)])[0]
    error = (first_pixels(tmp_path / "x.jpg", 64) - full).square().mean().sqrt()
    assert error < 0.015 and full.std() > 0.1, error


# ---- the loader


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path):
    root = make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "004.JPEG").write_bytes(b"")
    dataset = data.make_dataset("imagenet", "pretrain", root, 8, seed=3)
    runs = {}
    for workers in (0, 1, 2):
        loader = data.batches(dataset, 3, seed=3, workers=workers)
        runs[workers] = [next(loader) for _ in range(9)]  # 27 of 20 images: across the end of an epoch, which a batch straddles
    for other in (1, 2):
        assert all(same(a, b) for a, b in zip(runs[0], runs[other]))
    assert not same(runs[0][0], runs[0][1])
    resumed = data.batches(dataset, 3, seed=3, start=5, workers=2)
    assert all(same(next(resumed), b) for b in runs[0][5:])
    assert not same(next(data.batches(dataset, 3, seed=4)), runs[0][0])


def test_each_epoch_is_another_permutation_and_ranks_share_its_batches():
    size, batch_size = 10, 6
    first = lambda **how: list(itertools.islice(data.keys(size, batch_size, 1, **how), 5))  # 30 keys: three epochs
    flat = [key for batch in first() for key in batch]
    orders = [[index for e, index in flat if e == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders) and orders[0] != orders[1] != orders[2]
    assert [a + b + c for a, b, c in zip(*(first(rank=rank, world=3) for rank in range(3)))] == first()
    with pytest.raises(AssertionError, match="cannot be shared"):
        first(world=4)


def test_the_loader_leaves_the_global_generator_alone(tmp_path):
    dataset = data.make_dataset("imagenet", "pretrain", make_folder(tmp_path), 8)
    before = torch.get_rng_state()
    next(data.batches(dataset, 3, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_flips_follow_the_epoch_and_the_test_split_has_none(tmp_path):
    root = make_folder(tmp_path, count=30)
    dataset = data.make_dataset("imagenet", "pretrain", root, 8)
    plain = torch.stack([data.to_tensor([dataset.read(i)])[0] for i in range(len(dataset))])
    flipped = []
    for epoch in range(4):
        batch = dataset.__getitems__([(epoch, i) for i in range(len(dataset))])["image"]
        is_flip = [torch.equal(batch[i], plain[i].flip(-1)) for i in range(len(dataset))]
        assert all(f or torch.equal(batch[i], plain[i]) for i, f in enumerate(is_flip))
        assert torch.equal(batch, dataset.__getitems__([(epoch, i) for i in range(len(dataset))])["image"])
        flipped.append(is_flip)
    assert 80 < sum(map(sum, flipped)) < 160 and flipped[0] != flipped[1]
    test = data.make_dataset("imagenet", "test", root, 8)
    for epoch in range(2):
        batch = test.__getitems__([(epoch, i) for i in range(len(test))])["image"]
        assert all(torch.equal(batch[i], data.to_tensor([test.read(i)])[0]) for i in range(len(test)))


def bad_contents() -> dict:
    jpeg, png, webp = as_bytes(picture(1), "JPEG"), as_bytes(picture(1)), as_bytes(picture(1), "WEBP")
    bomb = as_bytes(Image.new("1", (10_000, 10_000)))  # whole, and within twice Pillow's limit, where Pillow only warns
    return {"truncated.jpg": jpeg[:-40], "head_only.jpg": jpeg[:30], "truncated.png": png[:-30], "truncated.webp": webp[:-20],
            "empty.jpg": b"", "text.jpg": b"a photo of nothing", "page.png": b"<!doctype html><html>404</html>",
            "noise.gif": bytes(range(7, 255)), "bomb.png": bomb, "folder.JPEG": "folder", "lost_link.jpg": "link", "pipe.jpg": "pipe"}


def test_sixty_bad_images_of_twelve_kinds_are_named_and_skipped(tmp_path):
    root, bad = tmp_path / "photos", set()
    kinds = bad_contents()
    assert len(kinds) == 12
    good = {"cmyk.jpg": as_bytes(picture(1).convert("CMYK"), "JPEG"), "deep.png": as_bytes(Image.new("I;16", (5, 5), 9000)),
            "moving.gif": as_bytes(picture(1), "GIF", save_all=True, append_images=[picture(2)]), "pixel.png": as_bytes(picture(1, (1, 1))),
            "grey.jpg": as_bytes(picture(1).convert("L"), "JPEG"), "png_called.jpg": as_bytes(picture(1)), "upper.JPG": as_bytes(picture(3), "JPEG")}
    for i in range(5):
        folder = root / f"class_{i}"
        folder.mkdir(parents=True)
        for k, (name, content) in enumerate(kinds.items()):
            path = folder / f"{k * 15:03d}_{name}"
            bad.add(str(path))
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content == "folder":
                path.mkdir()
            elif content == "link":
                path.symlink_to("nowhere.jpg")
            else:
                os.mkfifo(path)
        for k, (name, content) in enumerate(good.items()):
            (folder / f"{k * 20:03d}_{name}").write_bytes(content)
        for k in range(200 - len(kinds) - len(good)):
            (folder / f"{k:03d}.png").write_bytes(as_bytes(picture(k + 200 * i)))
    (root / "._resource.jpg").write_bytes(b"not an image, and no part of the folder")
    dataset = data.make_dataset("folder", "pretrain", str(root), 8)
    test = data.make_dataset("folder", "test", str(root), 8)
    assert len(dataset) + len(test) == 1000
    for workers in (0, 2):
        bad_file = tmp_path / f"bad_{workers}.txt"
        named = lambda: [line.split("\t")[0] for line in bad_file.read_text().splitlines()] if bad_file.exists() else []
        for part in (dataset, test):
            loader = data.batches(part, 25, seed=0, workers=workers, bad_file=str(bad_file))
            for _ in range(-(-2 * len(part) // 25)):  # two epochs
                assert next(loader)["image"].shape == (25, 3, 8, 8)
        assert len(named()) == 60 and set(named()) == bad
    next(data.batches(dataset, 900, seed=0, bad_file=str(bad_file)))
    assert len(named()) == 60, "a resumed run names an image a second time"


def test_two_streams_of_one_folder_name_a_bad_image_once(tmp_path):
    root = make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "004.JPEG").write_bytes(b"no image")
    streams = [data.batches(data.make_dataset("imagenet", split, root, 8), 2, seed=0, bad_file=str(tmp_path / "bad.txt")) for split in ("reca", "pretrain")]
    for _ in range(10):
        for stream in streams:
            next(stream)
    assert [os.path.basename(line.split("\t")[0]) for line in (tmp_path / "bad.txt").read_text().splitlines()] == ["004.JPEG"]


def test_the_next_good_image_stands_in_with_its_own_caption(tmp_path):
    root = make_folder(tmp_path)
    for i in (8, 9):  # the last of the cats: an otter follows
        (tmp_path / "train" / "cat" / f"{i:03d}.JPEG").write_bytes(b"no image")
    (tmp_path / "train" / "sea_otter" / "009.JPEG").write_bytes(b"no image")  # the very last: the first follows
    dataset = data.make_dataset("imagenet", "reca", root, 8)
    batch = dataset.__getitems__([(0, 8), (0, 9), (0, 19)])
    for row, stands_in, caption in ((0, 10, "a photo of a sea otter"), (1, 10, "a photo of a sea otter"), (2, 0, "a photo of a cat")):
        expected = data.to_tensor([dataset.read(stands_in)])[0]
        assert any(torch.equal(batch["image"][row], e) for e in (expected, expected.flip(-1)))
        assert dataset.vocabulary.decode(batch["caption"][row].tolist()) == caption
    assert [os.path.basename(path) for path, _ in batch["bad"]] == ["008.JPEG", "009.JPEG", "009.JPEG"]


def test_a_fault_of_the_machine_is_not_blamed_on_the_image(tmp_path, monkeypatch):
    dataset = data.make_dataset("imagenet", "reca", make_folder(tmp_path), 8)
    for error in (MemoryError(), OSError(24, "Too many open files")):
        def fail(path, size):
            raise error
        monkeypatch.setattr(data, "decode", fail)
        with pytest.raises(type(error)):
            dataset.__getitems__([(0, 1)])
    assert not dataset.bad


# ---- the index


def test_the_index_is_used_never_stale_and_remade_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SETTLED", -60.0)  # index folders that have only just changed
    root, cache = make_folder(tmp_path / "photos"), str(tmp_path / "cache")
    walks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walks.append(path) or scandir(path))
    files = data.list_files(root, cache)
    assert len(files) == 26 and files == sorted(files) and len(walks) == 7
    assert data.list_files(root, cache) == files and len(walks) == 7
    (index,) = os.listdir(cache)
    new = tmp_path / "photos" / "val" / "cat" / "new.png"
    new.write_bytes(b"")
    assert set(data.list_files(root, cache)) - set(files) == {os.path.join("val", "cat", "new.png")}
    new.unlink()
    assert data.list_files(root, cache) == files
    whole = (Path(cache) / index).read_bytes()
    other = gzip.compress(gzip.decompress(whole).replace(b"003.JPEG", b"004.JPEG"))[:-8] + whole[-8:]  # the checksum is the old one
    middle = len(whole) // 2
    for damaged in (whole[:-1], whole[:middle], b"", b"{}", other, whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:], b"\x00" * 99):
        (Path(cache) / index).write_bytes(damaged)
        before = len(walks)
        assert data.list_files(root, cache) == files and len(walks) == before + 7
        assert gzip.decompress((Path(cache) / index).read_bytes()) == gzip.decompress(whole)
    assert os.listdir(cache) == [index]


def test_a_folder_that_has_only_just_changed_is_not_indexed(tmp_path):
    data.list_files(make_folder(tmp_path / "photos"), str(tmp_path / "cache"))
    assert not os.path.exists(tmp_path / "cache")


def test_links_are_followed_and_a_loop_ends(tmp_path):
    make_folder(tmp_path / "photos", count=2, val=1)
    os.makedirs(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"")
    os.makedirs(tmp_path / "photos" / "called.png")  # a bad image: it is listed, not entered
    (tmp_path / "photos" / "called.png" / "b.png").write_bytes(b"")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "train" / "loop").symlink_to(tmp_path / "photos")
    files = data.list_files(str(tmp_path / "photos"), str(tmp_path / "cache"))
    assert len(files) == 8 and {os.path.join("linked", "a.png"), "called.png"} < set(files)


# ---- captions


def test_class_lists_give_names_and_synonyms(tmp_path):
    root = make_folder(tmp_path, ("n00000001", "n00000002"))
    with pytest.raises(ValueError, match="classes.tsv"):
        data.make_dataset("imagenet", "pretrain", root, 8)
    (tmp_path / "classes.tsv").write_text("n00000001\tgoldfish, Carassius auratus\n")
    with pytest.raises(ValueError, match="n00000002"):
        data.make_dataset("imagenet", "pretrain", root, 8)
    for name, separator in (("LOC_synset_mapping.txt", " "), ("classes.tsv", "\t")):
        (tmp_path / "classes.tsv").unlink(missing_ok=True)
        (tmp_path / name).write_text(f"n00000001{separator}goldfish, Carassius auratus\nn00000002{separator}umbrella\n")
        dataset = data.make_dataset("imagenet", "pretrain", root, 8)
        said = {k: set() for k in ("caption", "full", "wording")}
        for epoch in range(40):
            batch = dataset.__getitems__([(epoch, 0), (epoch, 12)])
            assert not torch.equal(batch["full"], batch["wording"])
            over = batch["caption"] == data.PAD
            assert torch.equal(batch["canonical"], batch["caption"].masked_fill(over, data.ANY)) and over.any(), "after a caption visual words are free"
            for k in said:
                said[k] |= {dataset.vocabulary.decode(row.tolist()) for row in batch[k]}
        assert said["caption"] == {"a photo of a goldfish", "a photo of an umbrella"}
        for k in ("full", "wording"):
            assert said[k] == set(f"{data.class_captions('goldfish, Carassius auratus')}\n{data.class_captions('umbrella')}".split("\n"))
        assert "<unk>" not in " ".join(said["full"])


def test_the_vocabulary_comes_from_training_captions_or_the_checkpoint(tmp_path):
    root = make_folder(tmp_path)
    train, test = (data.make_dataset("imagenet", split, root, 8) for split in ("pretrain", "test"))
    assert train.vocabulary.words == test.vocabulary.words and train.vocabulary.words[:5] == data.SPECIALS + ["a"], "the most frequent first"
    assert set(train.vocabulary.words[4:]) == set("a photo picture of an image photograph this is here you see cat sea otter".split())
    words = data.Vocabulary(data.SPECIALS + ["a", "photo", "of", "cat"])
    kept = data.make_dataset("imagenet", "test", root, 8, vocabulary=words, text_len=5)
    assert kept.vocabulary is words and kept.__getitems__([(0, 0)])["caption"].tolist() == [[1, 4, 5, 6, 4]]


def captions(root) -> dict[str, str]:
    return dict(zip(*data.captioned(str(root), data.list_files(str(root)), "folder", str(root))))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_captions(tmp_path, form):
    rows = [("images/1.png", "Two dogs, \"running\""), ("images/2.png", "a red bus"), ("images/2.png", "a bus  that is red")]
    os.makedirs(tmp_path / "images")
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(as_bytes(picture(i)))
    if form == "jsonl":
        text = "\n".join(json.dumps({"file_name": f, "text": t, "more": 1}) for f, t in rows) + "\n\n"
    else:
        text = "more,text,file_name\n" + "\n".join('1,"' + t.replace('"', '""') + '",' + f for f, t in rows) + "\n"
    (tmp_path / f"metadata.{form}").write_text(text, encoding="utf-8-sig")
    assert captions(tmp_path) == {"images/0.png": "", "images/1.png": 'Two dogs, "running"', "images/2.png": "a red bus\na bus that is red", "images/3.png": ""}
    (tmp_path / f"metadata.{form}").write_text(text + ('{"file_name": "x"}\n' if form == "jsonl" else "1,x\n"))
    with pytest.raises(ValueError, match=f"metadata.{form}, near row"):
        data.make_dataset("folder", "pretrain", str(tmp_path), 8)
    (tmp_path / f"metadata.{form}").write_text(text.replace("images/", "wrong/"))
    with pytest.raises(ValueError, match="names no image that is there"):
        data.make_dataset("folder", "pretrain", str(tmp_path), 8)


def test_a_folder_name_is_a_caption_where_it_tells_images_apart(tmp_path):
    for name in ("red_car", "bus"):
        os.makedirs(tmp_path / name)
        (tmp_path / name / "1.png").write_bytes(as_bytes(picture(1)))
    plain = lambda: {lines.split("\n")[0] for lines in captions(tmp_path).values()}
    assert plain() == {"a photo of a bus", "a photo of a red car"}
    (tmp_path / "2.png").write_bytes(as_bytes(picture(1)))
    assert plain() == {"a photo of a bus", "a photo of a red car", ""}
    (tmp_path / "2.png").unlink()
    (tmp_path / "bus" / "1.png").unlink()
    assert plain() == {""}


def test_one_image_in_twenty_of_a_folder_is_kept_for_the_test(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(as_bytes(picture(i)))
    parts = [data.make_dataset("folder", split, str(tmp_path), 8, seed=seed) for split in ("pretrain", "reca", "test") for seed in (0, 1)]
    files = [[d.files[i] for i in range(len(d))] for d in parts]
    assert files[0] == files[1] == files[2] == files[3] and files[4] == files[5] and len(files[4]) == 3
    assert sorted(files[0] + files[4]) == sorted(f"{i}.png" for i in range(60))


def test_cifar_images_come_as_they_are_and_an_absent_download_is_a_sentence(tmp_path, monkeypatch):
    from torchvision import datasets
    arrays = torch.arange(4 * 32 * 32 * 3).remainder(251).byte().view(4, 32, 32, 3)

    class Fake:
        def __init__(self, root, train=True, download=False):
            self.data, self.targets, self.classes = arrays.numpy(), [1, 0, 1, 0], ["airplane", "automobile"]

    class Absent:
        def __init__(self, root, train=True, download=False):
            raise OSError("no route to host") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    dataset = data.make_dataset("cifar10", "test", str(tmp_path), 32)
    batch = dataset.__getitems__([(0, 0), (0, 3)])
    torch.testing.assert_close(batch["image"], arrays[[0, 3]].permute(0, 3, 1, 2).float() / 255, atol=1e-6, rtol=0)
    assert [dataset.vocabulary.decode(r.tolist()) for r in batch["caption"]] == ["a photo of an automobile", "a photo of an airplane"]
    monkeypatch.setattr(datasets, "CIFAR10", Absent)
    with pytest.raises(ValueError, match="no route to host"):
        data.make_dataset("cifar10", "pretrain", str(tmp_path), 32)


# ---- mistakes


def test_every_mistake_gets_a_sentence(tmp_path):
    def says(pattern, name, data_dir, split="pretrain"):
        with pytest.raises(ValueError, match=pattern) as error:
            data.make_dataset(name, split, str(data_dir), 8)
        assert "\n" not in str(error.value)

    (tmp_path / "file.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("imagenet", "folder"):
        says("needs --data_dir", name, "")
        says("absent' is no such folder", name, tmp_path / "absent")
        says("file.tar' is a file, not a folder", name, tmp_path / "file.tar")
        says("an empty folder", name, tmp_path / "empty")
    says("there are shapes, imagenet", "imagnet", tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    says("no images below .*it holds a.txt", "folder", tmp_path / "notes")
    says("no train/.* it holds a.txt", "imagenet", tmp_path / "notes")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "train" / "1.jpg").write_bytes(as_bytes(picture(1), "JPEG"))
    says("no class folders, such as 1.jpg", "imagenet", tmp_path / "flat")
    (tmp_path / "flat" / "train" / "cat").mkdir()
    (tmp_path / "flat" / "train" / "1.jpg").unlink()
    says("no images below", "imagenet", tmp_path / "flat")
    (tmp_path / "flat" / "train" / "cat" / "1.jpg").write_bytes(b"x")
    says("none of the 1 images", "imagenet", tmp_path / "flat")
    (tmp_path / "flat" / "train" / "cat" / "1.jpg").write_bytes(as_bytes(picture(1), "JPEG"))
    says("no val/", "imagenet", tmp_path / "flat", "test")
    (tmp_path / "flat" / "val").mkdir()
    (tmp_path / "flat" / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(as_bytes(picture(1), "JPEG"))
    says("no class folders, such as ILSVRC2012.*val/<wnid>/", "imagenet", tmp_path / "flat", "test")


@pytest.mark.skipif(not TINY.exists(), reason=f"the photographs are not there: {TINY}")
def test_real_photographs(tmp_path):
    import tarfile
    with tarfile.open(TINY) as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.isfile() and (parts[-1] == "classes.tsv" or int("".join(filter(str.isdigit, parts[-1][-9:])) or 0) % 50 == 0):
                tar.extract(member, tmp_path, filter="data")
    (found,) = tmp_path.rglob("classes.tsv")
    dataset = data.make_dataset("imagenet", "understand", str(found.parent), 64)
    batch = next(data.batches(dataset, 32, seed=0, workers=1))
    assert len(dataset) > 200 and batch["image"].shape == (32, 3, 64, 64) and 0.1 < batch["image"].std() < 0.5
    assert (batch["caption"] != data.UNK).all() and len(batch["caption"].unique(dim=0)) > 10
    assert not dataset.bad
