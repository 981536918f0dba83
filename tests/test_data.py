"""Batches of images: their order, what is skipped and named, flips and captions.

pytest tests/test_data.py
"""

import itertools
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import engine
from config import Config
from data import batch_indices, batches, open_splits
from images import to_tensor
from pictures import as_bytes, make_folder, picture
from words import SPECIALS, UNK, Vocabulary

TINY = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny-imagenet.tar"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def same(a: dict, b: dict) -> bool:
    keys = ("image", "caption", "canonical_caption", "full_caption", "caption_target")
    return all(torch.equal(a[key], b[key]) for key in keys)


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def keys(count: int, epoch: int = 0) -> list[tuple[int, int]]:
    return [(epoch, i) for i in range(count)]


# ----------------------------------------------------------------------------------------- Order


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path):
    root = make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "004.JPEG").write_bytes(b"")
    dataset = open_splits("imagenet", root, 8, seed=3)["pretrain"]
    # 27 of 20 images: across the end of an epoch, which a batch straddles.
    runs = [take(batches(dataset, 3, seed=3, workers=workers), 9) for workers in (0, 1, 2)]
    for other in runs[1:]:
        assert all(map(same, runs[0], other))
    assert not same(runs[0][0], runs[0][1])
    resumed = take(batches(dataset, 3, seed=3, start=5, workers=2), 4)
    assert all(map(same, resumed, runs[0][5:]))
    assert not same(next(batches(dataset, 3, seed=4)), runs[0][0])


def test_each_epoch_is_another_permutation():
    flat = itertools.chain(*take(batch_indices(10, 6, seed=1), 5))  # 30 of 10: three epochs
    orders = [[], [], []]
    for epoch, index in flat:
        orders[epoch].append(index)
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_processes_share_each_batch():
    whole = take(batch_indices(10, 6, seed=1), 5)
    shares = [take(batch_indices(10, 6, 1, rank=rank, world_size=3), 5) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == whole
    with pytest.raises(AssertionError, match="cannot be shared"):
        next(batch_indices(10, 6, 1, world_size=4))


def test_the_loader_leaves_the_global_generator_alone(tmp_path):
    dataset = open_splits("imagenet", make_folder(tmp_path), 8)["pretrain"]
    before = torch.get_rng_state()
    next(batches(dataset, 3, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_max_images_limits_a_stream_to_the_first(tmp_path):
    dataset = open_splits("imagenet", make_folder(tmp_path), 8)["reca"]
    whole = take(batches(dataset, 5, seed=0), 8)
    few = take(batches(dataset, 5, seed=0, max_images=2), 8)
    assert len(torch.cat([batch["image"] for batch in whole]).unique(dim=0)) > 20
    assert len(torch.cat([batch["image"] for batch in few]).unique(dim=0)) == 4, "and their flips"


def test_flips_follow_the_epoch(tmp_path):
    dataset = open_splits("imagenet", make_folder(tmp_path, count=30), 8)["pretrain"]
    plain = to_tensor([dataset.read(i) for i in range(len(dataset))])
    flipped = []
    for epoch in range(4):
        batch = dataset.__getitems__(keys(60, epoch))["image"]
        is_flip = (batch == plain.flip(-1)).flatten(1).all(1)
        is_plain = (batch == plain).flatten(1).all(1)
        assert (is_flip | is_plain).all()
        assert torch.equal(batch, dataset.__getitems__(keys(60, epoch))["image"])
        flipped.append(is_flip)
    assert 80 < torch.stack(flipped).sum() < 160
    assert not torch.equal(flipped[0], flipped[1])


def test_the_test_split_has_no_flips(tmp_path):
    dataset = open_splits("imagenet", make_folder(tmp_path, count=30), 8)["test"]
    plain = to_tensor([dataset.read(i) for i in range(len(dataset))])
    for epoch in range(2):
        assert torch.equal(dataset.__getitems__(keys(len(dataset), epoch))["image"], plain)


# ------------------------------------------------------------------------------------ Bad images


def bad_contents() -> dict:
    """Bad images of twelve kinds: bytes, or what else has the name of an image."""
    jpeg = as_bytes(picture(1), "JPEG")
    png = as_bytes(picture(1))
    webp = as_bytes(picture(1), "WEBP")
    return {
        "truncated.jpg": jpeg[:-40],
        "head_only.jpg": jpeg[:30],
        "truncated.png": png[:-30],
        "truncated.webp": webp[:-20],
        "empty.jpg": b"",
        "text.jpg": b"a photo of nothing",
        "page.png": b"<!doctype html><html>404</html>",
        "noise.gif": bytes(range(7, 255)),
        # Whole, and within twice Pillow's limit, where Pillow only warns.
        "bomb.png": as_bytes(Image.new("1", (10_000, 10_000))),
        "folder.JPEG": "folder",
        "lost_link.jpg": "link",
        "pipe.jpg": "pipe",
    }


def good_contents() -> dict[str, bytes]:
    """Images that look odd and can be read."""
    moving = as_bytes(picture(1), "GIF", save_all=True, append_images=[picture(2)])
    return {
        "cmyk.jpg": as_bytes(picture(1).convert("CMYK"), "JPEG"),
        "deep.png": as_bytes(Image.new("I;16", (5, 5), 9000)),
        "moving.gif": moving,
        "pixel.png": as_bytes(picture(1, (1, 1))),
        "grey.jpg": as_bytes(picture(1).convert("L"), "JPEG"),
        "png_called.jpg": as_bytes(picture(1)),
        "upper.JPG": as_bytes(picture(3), "JPEG"),
    }


def make_bad(path: Path, content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "link":
        path.symlink_to("nowhere.jpg")
    else:
        os.mkfifo(path)


def named_in(bad_file: Path) -> list[str]:
    return [line.split("\t")[0] for line in bad_file.read_text().splitlines()]


def test_sixty_bad_images_of_twelve_kinds_are_named_and_skipped(tmp_path):
    root = tmp_path / "photos"
    bad = set()
    kinds = bad_contents()
    good = good_contents()
    assert len(kinds) == 12
    for i in range(5):
        folder = root / f"class_{i}"
        folder.mkdir(parents=True)
        for k, (name, content) in enumerate(kinds.items()):
            path = folder / f"{k * 15:03d}_{name}"
            make_bad(path, content)
            bad.add(str(path))
        for k, (name, content) in enumerate(good.items()):
            (folder / f"{k * 20:03d}_{name}").write_bytes(content)
        for k in range(200 - len(kinds) - len(good)):
            (folder / f"{k:03d}.png").write_bytes(as_bytes(picture(k + 200 * i)))
    (root / "._resource.jpg").write_bytes(b"not an image, and no part of the folder")
    dataset = open_splits("folder", str(root), 8)["pretrain"]
    test = open_splits("folder", str(root), 8)["test"]
    assert len(dataset) + len(test) == 1000
    for workers in (0, 2):
        bad_file = tmp_path / f"bad_{workers}.txt"
        for part in (dataset, test):
            loader = batches(part, 25, seed=0, workers=workers, bad_file=str(bad_file))
            for _ in range(-(-2 * len(part) // 25)):  # two epochs
                assert next(loader)["image"].shape == (25, 3, 8, 8)
        assert len(named_in(bad_file)) == 60
        assert set(named_in(bad_file)) == bad
    next(batches(dataset, 900, seed=0, bad_file=str(bad_file)))
    assert len(named_in(bad_file)) == 60, "a resumed run names no image a second time"


def test_a_name_with_a_tab_and_a_newline_is_one_line_of_bad_images(tmp_path):
    root = make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "a\tb\nc.JPEG").write_bytes(b"no image")
    bad_file = tmp_path / "bad.txt"
    dataset = open_splits("imagenet", root, 8)["pretrain"]
    for _ in range(2):  # a second run adds nothing
        next(batches(dataset, len(dataset), seed=0, bad_file=str(bad_file)))
    assert [os.path.basename(path) for path in named_in(bad_file)] == [r"a\tb\nc.JPEG"]


@pytest.mark.parametrize("ranks, streams, expected", [(1, 1, 16), (1, 3, 5), (4, 3, 1), (8, 4, 1)])
def test_loader_processes_share_the_cores_of_the_affinity_mask(
    ranks, streams, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(engine, "LOCAL_WORLD_SIZE", ranks)
    assert engine.count_workers(Config(dataset="folder"), streams) == expected
    assert engine.count_workers(Config(dataset="folder", workers=2), streams) == 2
    assert engine.count_workers(Config(), streams) == 0


def test_two_streams_of_one_folder_name_a_bad_image_once(tmp_path):
    root = make_folder(tmp_path)
    (tmp_path / "train" / "cat" / "004.JPEG").write_bytes(b"no image")
    bad_file = tmp_path / "bad.txt"
    datasets = [open_splits("imagenet", root, 8)[split] for split in ("reca", "pretrain")]
    streams = [batches(dataset, 2, seed=0, bad_file=str(bad_file)) for dataset in datasets]
    for _ in range(10):
        for stream in streams:
            next(stream)
    assert [os.path.basename(path) for path in named_in(bad_file)] == ["004.JPEG"]


def test_the_next_good_image_stands_in_with_its_own_caption(tmp_path):
    root = make_folder(tmp_path)
    train = tmp_path / "train"
    # The last of the cats, which an otter follows; and the very last, which the first follows.
    for path in ("cat/008.JPEG", "cat/009.JPEG", "sea_otter/009.JPEG"):
        (train / path).write_bytes(b"no image")
    dataset = open_splits("imagenet", root, 8)["reca"]
    batch = dataset.__getitems__([(0, 8), (0, 9), (0, 19)])
    for row, stands_in in enumerate((10, 10, 0)):
        expected = to_tensor([dataset.read(stands_in)])[0]
        image = batch["image"][row]
        assert torch.equal(image, expected) or torch.equal(image, expected.flip(-1))
    captions = [dataset.vocabulary.decode(row.tolist()) for row in batch["caption"]]
    assert captions == 2 * ["a photo of a sea otter"] + ["a photo of a cat"]
    names = [os.path.basename(path) for path, _ in batch["bad"]]
    assert names == ["008.JPEG", "009.JPEG", "009.JPEG"]


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_a_fault_of_the_machine_is_not_blamed_on_the_image(tmp_path, monkeypatch, error):
    dataset = open_splits("imagenet", make_folder(tmp_path), 8)["reca"]

    def fail(path, size):
        raise error

    monkeypatch.setattr(data, "decode_image", fail)
    with pytest.raises(type(error)):
        dataset.__getitems__([(0, 1)])
    assert not dataset.bad


# --------------------------------------------------------------------------------- Vocabulary etc.


def test_the_vocabulary_comes_from_the_training_captions(tmp_path):
    root = make_folder(tmp_path)
    words = open_splits("imagenet", root, 8)["pretrain"].vocabulary.words
    assert words == open_splits("imagenet", root, 8)["test"].vocabulary.words
    assert words[:5] == SPECIALS + ["a"], "the most frequent first"
    captions = "a photo picture of an image photograph this is here you see cat sea otter"
    assert set(words[4:]) == set(captions.split())


def test_the_vocabulary_of_a_checkpoint_is_kept(tmp_path):
    words = Vocabulary(SPECIALS + ["a", "photo", "of", "cat"])
    root = make_folder(tmp_path)
    dataset = open_splits("imagenet", root, 8, vocabulary=words, text_len=5)["test"]
    assert dataset.vocabulary is words
    assert dataset.__getitems__([(0, 0)])["caption"].tolist() == [[1, 4, 5, 6, 4]]


def test_cifar_images_come_as_they_are(tmp_path, monkeypatch):
    from torchvision import datasets

    arrays = torch.arange(4 * 32 * 32 * 3).remainder(251).byte().view(4, 32, 32, 3)

    class Cifar:
        def __init__(self, root, train=True, download=False):
            self.data = arrays.numpy()
            self.targets = [1, 0, 1, 0]
            self.classes = ["airplane", "automobile"]

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    dataset = open_splits("cifar10", str(tmp_path), 32)["test"]
    batch = dataset.__getitems__([(0, 0), (0, 3)])
    expected = arrays[[0, 3]].permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(batch["image"], expected, atol=1e-6, rtol=0)
    captions = [dataset.vocabulary.decode(row.tolist()) for row in batch["caption"]]
    assert captions == ["a photo of an automobile", "a photo of an airplane"]


def test_an_absent_download_of_cifar_is_a_sentence(tmp_path, monkeypatch):
    from torchvision import datasets

    class Absent:
        def __init__(self, root, train=True, download=False):
            raise OSError("no route to host") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "CIFAR10", Absent)
    with pytest.raises(ValueError, match="no route to host"):
        open_splits("cifar10", str(tmp_path), 32)["pretrain"]


def is_wanted(member) -> bool:
    """The class list, and every fiftieth image."""
    name = member.name.split("/")[-1]
    number = "".join(filter(str.isdigit, name[-9:]))
    return member.isfile() and (name == "classes.tsv" or int(number or 0) % 50 == 0)


@pytest.mark.skipif(not TINY.exists(), reason=f"the photographs are not there: {TINY}")
def test_real_photographs(tmp_path):
    with tarfile.open(TINY) as tar:
        for member in filter(is_wanted, tar):
            tar.extract(member, tmp_path, filter="data")
    (found,) = tmp_path.rglob("classes.tsv")
    dataset = open_splits("imagenet", str(found.parent), 64)["understand"]
    assert len(dataset) > 200
    batch = next(batches(dataset, 32, seed=0, workers=1))
    assert batch["image"].shape == (32, 3, 64, 64)
    assert 0.1 < batch["image"].std() < 0.5
    assert (batch["caption"] != UNK).all()
    assert len(batch["caption"].unique(dim=0)) > 10
    assert not dataset.bad
