"""Image folders: what is listed, the index, captions, splits, and a sentence for each mistake.

pytest tests/test_folders.py
"""

import gzip
import json
import os
from pathlib import Path

import pytest

import folders
from captions import class_captions
from data import open_splits
from folders import list_folders, read_folder
from pictures import as_bytes, make_folder, picture
from words import IGNORE_INDEX, PAD


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# ----------------------------------------------------------------------------------------- Index


def list_names(root, cache="") -> list[str]:
    """The paths of all images below root, in the order of training."""
    listing = list_folders(str(root), cache).items()
    return [f"{folder}/{name}" for folder, entry in listing for name in entry["images"]]


@pytest.fixture
def indexed(tmp_path, monkeypatch):
    """A folder, its cache folder, and the list of folders that were read from the disk."""
    monkeypatch.setattr(folders, "SETTLED", -60.0)  # index folders that have only just changed
    walks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walks.append(path) or scandir(path))
    return make_folder(tmp_path / "photos"), str(tmp_path / "cache"), walks


def test_a_second_call_reads_the_index(indexed):
    root, cache, walks = indexed
    files = list_names(root, cache)
    assert len(files) == 26
    assert len(walks) == 7
    assert list_names(root, cache) == files
    assert len(walks) == 7


def test_the_index_is_never_stale(indexed):
    root, cache, _ = indexed
    files = list_names(root, cache)
    new = Path(root) / "val" / "cat" / "new.png"
    new.write_bytes(b"")
    assert set(list_names(root, cache)) - set(files) == {os.path.join("val", "cat", "new.png")}
    new.unlink()
    assert list_names(root, cache) == files


def test_a_damaged_index_is_remade(indexed):
    root, cache, walks = indexed
    files = list_names(root, cache)
    (index,) = Path(cache).iterdir()
    whole = index.read_bytes()
    content = gzip.decompress(whole)
    old_checksum = gzip.compress(content.replace(b"003.JPEG", b"004.JPEG"))[:-8] + whole[-8:]
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    cut = [whole[:-1], whole[:middle], b""]
    for damaged in (*cut, b"{}", old_checksum, flipped, b"\x00" * 99):
        index.write_bytes(damaged)
        before = len(walks)
        assert list_names(root, cache) == files
        assert len(walks) == before + 7
        assert gzip.decompress(index.read_bytes()) == content
    assert list(Path(cache).iterdir()) == [index]


def test_a_folder_that_has_only_just_changed_is_not_indexed(tmp_path):
    list_names(make_folder(tmp_path / "photos"), str(tmp_path / "cache"))
    assert not os.path.exists(tmp_path / "cache")


def test_links_are_followed_and_a_loop_ends(tmp_path):
    photos = tmp_path / "photos"
    make_folder(photos, count=2, val=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"")
    (photos / "called.png").mkdir()  # empty, a bad image; the next one is a folder
    (photos / "folder.png").mkdir()
    (photos / "folder.png" / "b.png").write_bytes(b"")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "train" / "loop").symlink_to(photos)
    files = list_names(str(photos), str(tmp_path / "cache"))
    assert len(files) == 9
    assert {"linked/a.png", "/called.png", "folder.png/b.png"} < set(files)


# -------------------------------------------------------------------------------------- Captions


def test_class_folders_without_names_get_a_sentence(tmp_path):
    root = make_folder(tmp_path, ("n00000001", "n00000002"))
    with pytest.raises(ValueError, match=r"classes.tsv"):
        open_splits("imagenet", root, 8)["pretrain"]
    (tmp_path / "classes.tsv").write_text("n00000001\tgoldfish, Carassius auratus\n")
    with pytest.raises(ValueError, match=r"n00000002"):
        open_splits("imagenet", root, 8)["pretrain"]


@pytest.mark.parametrize(
    "name, separator", [("LOC_synset_mapping.txt", " "), ("classes.tsv", "\t")]
)
def test_class_lists_give_names_and_synonyms(tmp_path, name, separator):
    root = make_folder(tmp_path, ("n00000001", "n00000002"))
    lines = f"n00000001{separator}goldfish, Carassius auratus\nn00000002{separator}umbrella\n"
    (tmp_path / name).write_text(lines)
    dataset = open_splits("imagenet", root, 8)["pretrain"]
    seen = {"caption": set(), "full_caption": set(), "caption_target": set()}
    for epoch in range(40):
        batch = dataset.__getitems__([(epoch, 0), (epoch, 12)])
        assert (batch["full_caption"] != batch["caption_target"]).any()
        padding = batch["caption"] == PAD
        assert padding.any()
        expected = batch["caption"].masked_fill(padding, IGNORE_INDEX)
        assert (batch["canonical_caption"] == expected).all(), "visual words are free behind it"
        for key, texts in seen.items():
            texts |= {dataset.vocabulary.decode(row.tolist()) for row in batch[key]}
    assert seen["caption"] == {"a photo of a goldfish", "a photo of an umbrella"}
    goldfish = class_captions("goldfish, Carassius auratus").split("\n")
    wordings = {*goldfish, *class_captions("umbrella").split("\n")}
    assert seen["full_caption"] == wordings
    assert seen["caption_target"] == wordings
    assert "<unk>" not in " ".join(seen["full_caption"])


def captions_of(root) -> dict[str, str]:
    found = read_folder("folder", str(root))
    both = [zip(found.files[split], found.captions[split], strict=True) for split in found.files]
    return dict([*both[0], *both[1]])


def jsonl(rows) -> str:
    lines = [json.dumps({"file_name": name, "text": text, "more": 1}) for name, text in rows]
    return "\n".join(lines) + "\n\n"


def csv(rows) -> str:
    lines = ["more,text,file_name"]
    for name, text in rows:
        escaped = text.replace('"', '""')
        lines.append(f'1,"{escaped}",{name}')
    return "\n".join(lines) + "\n"


ROWS = [
    ("images/1.png", 'Two dogs, "running"'),
    ("images/2.png", "a red bus"),
    ("images/2.png", "a bus  that is red"),
]
METADATA = [
    ("metadata.jsonl", jsonl(ROWS), '{"file_name": "x"}\n'),
    ("metadata.csv", csv(ROWS), "1,x\n"),
]


@pytest.mark.parametrize("name, text, bad_row", METADATA)
def test_metadata_captions(tmp_path, name, text, bad_row):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(as_bytes(picture(i)))
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert captions_of(tmp_path) == {
        "images/0.png": "",
        "images/1.png": 'Two dogs, "running"',
        "images/2.png": "a red bus\na bus that is red",
        "images/3.png": "",
    }
    (tmp_path / name).write_text(text + bad_row)
    with pytest.raises(ValueError, match=rf"{name}, near row"):
        open_splits("folder", str(tmp_path), 8)["pretrain"]
    (tmp_path / name).write_text(text.replace("images/", "wrong/"))
    with pytest.raises(ValueError, match=r"names no image that is there"):
        open_splits("folder", str(tmp_path), 8)["pretrain"]


def test_a_bad_row_is_counted_among_the_rows(tmp_path):
    (tmp_path / "a.png").write_bytes(as_bytes(picture(1)))
    good = '{"file_name": "a.png", "text": "a bus"}\n'
    (tmp_path / "metadata.jsonl").write_text(2 * good + '{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match=r"near row 3: .*KeyError: 'text'"):
        captions_of(tmp_path)


def test_a_folder_name_is_a_caption_where_it_tells_images_apart(tmp_path):
    def plain():
        return {lines.split("\n")[0] for lines in captions_of(tmp_path).values()}

    for name in ("red_car", "bus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(as_bytes(picture(1)))
    assert plain() == {"a photo of a bus", "a photo of a red car"}
    (tmp_path / "2.png").write_bytes(as_bytes(picture(1)))
    assert plain() == {"a photo of a bus", "a photo of a red car", ""}
    (tmp_path / "2.png").unlink()
    (tmp_path / "bus" / "1.png").unlink()
    with pytest.raises(ValueError, match="no train image, such as .* a caption or a class"):
        plain()


def test_one_image_in_twenty_of_a_folder_is_kept_for_the_test(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(as_bytes(picture(i)))
        (tmp_path / f"{i}.txt").write_text("a picture")

    def files(split, seed):
        dataset = open_splits("folder", str(tmp_path), 8, seed=seed)[split]
        return [dataset.files[i] for i in range(len(dataset))]

    training, test = files("pretrain", 0), files("test", 0)
    assert training == files("pretrain", 1) == files("reca", 0) == files("reca", 1)
    assert test == files("test", 1)
    assert len(test) == 3
    assert sorted(training + test) == sorted(f"{i}.png" for i in range(60))


# -------------------------------------------------------------------------------------- Mistakes


def check_sentence(pattern, name, data_dir):
    with pytest.raises(ValueError, match=pattern) as error:
        open_splits(name, str(data_dir), 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_a_wrong_data_dir_gets_a_sentence(tmp_path, name):
    (tmp_path / "file.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    check_sentence("needs --data_dir", name, "")
    check_sentence("absent' is no such folder", name, tmp_path / "absent")
    check_sentence("file.tar' is a file, not a folder", name, tmp_path / "file.tar")
    check_sentence("an empty folder", name, tmp_path / "empty")


def test_an_unknown_data_set_gets_a_sentence(tmp_path):
    check_sentence("there are shapes, imagenet", "imagnet", tmp_path)


def test_a_folder_without_images_gets_a_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    check_sentence("no images below .*looked for .avif .*it holds a.txt", "folder", tmp_path)
    for name in "bcdef":
        (tmp_path / f"{name}.txt").write_text("x")
    check_sentence("it holds a.txt, b.txt, c.txt, d.txt, e.txt, ...$", "folder", tmp_path)


def test_an_imagenet_that_is_laid_out_otherwise_gets_a_sentence(tmp_path):
    jpeg = as_bytes(picture(1), "JPEG")
    train, val = tmp_path / "train", tmp_path / "val"
    (train / "cat").mkdir(parents=True)
    (train / "1.jpg").write_bytes(jpeg)
    check_sentence("no train image, such as .*train/1.jpg, has a caption", "imagenet", tmp_path)
    (train / "1.jpg").unlink()
    check_sentence("no images below", "imagenet", tmp_path)
    (train / "cat" / "1.jpg").write_bytes(b"x")
    check_sentence("none of the 1 images", "imagenet", tmp_path)
    (train / "cat" / "1.jpg").write_bytes(jpeg)
    val.mkdir()
    (val / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg)
    check_sentence("no test image, such as .*ILSVRC2012.* has a caption", "imagenet", tmp_path)
