"""Image folders as people have them: each gives the right split and captions, or a sentence.

pytest tests/test_layouts.py
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from captions import class_names
from folders import read_folder
from pictures import as_bytes, picture

ROOT = Path(__file__).resolve().parents[1]
PNG = as_bytes(picture(1))
DOGS = {"n02086240": "shih-tzu", "n02087394": "rhodesian ridgeback"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(root: Path, files: dict) -> Path:
    """Makes files: images for None, else the text or bytes."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = PNG if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def images(*folders_: str, count: int = 2) -> dict:
    return {f"{folder}/{i}.jpg": None for folder in folders_ for i in range(count)}


def read(root, name="folder", **options) -> dict:
    """{split: {path: its first caption}}."""
    found = read_folder(name, str(root), **options)
    result = {}
    for split, paths in found.files.items():
        texts = [text.split("\n")[0] for text in found.captions[split]]
        result[split] = dict(zip(paths, texts, strict=True))
    return result


def every(found: dict) -> dict:
    return found["train"] | found["test"]


# ------------------------------------------------------------------------------------------ Splits


@pytest.mark.parametrize(
    "train, test",
    [
        ("train", "test"),
        ("train", "validation"),
        ("Train", "Valid"),
        ("training", "dev"),
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("train.X1", "val.X"),
        ("train", "test1"),
        ("seg_train", "seg_test"),
        ("data/images/train", "data/images/val"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
    ],
)
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_the_names_of_splits(tmp_path, name, train, test):
    write(tmp_path, images(*[f"{part}/{c}" for part in (train, test) for c in ("cat", "dog")]))
    found = read(tmp_path, name)
    assert {path.rsplit("/", 2)[0] for path in found["train"]} == {train}
    assert {path.rsplit("/", 2)[0] for path in found["test"]} == {test}
    assert set(every(found).values()) == {"a photo of a cat", "a photo of a dog"}


def test_splits_below_the_classes(tmp_path):
    write(tmp_path, images("cat/train", "cat/test", "dog/train", "dog/test"))
    found = read(tmp_path)
    assert set(found["test"]) == set(images("cat/test", "dog/test"))
    assert found["train"]["dog/train/0.jpg"] == "a photo of a dog"


def test_of_val_and_test_the_first_is_held_out_and_the_rest_is_left_out_and_counted(tmp_path):
    write(tmp_path, images("train/cat", "train/dog", "val/cat", "val/dog", "test", "extra"))
    found = read_folder("folder", str(tmp_path))
    assert len(found.files["train"]) == len(found.files["test"]) == 4
    assert {"2 images of test/ are left out", "2 images of extra/ are left out"} <= {
        *found.warnings
    }


def test_a_class_of_trains_is_no_split(tmp_path):
    write(tmp_path, images("bus", "train", "car", count=20))
    found = read(tmp_path)
    assert len(found["test"]) == 3
    assert set(every(found).values()) == {f"a photo of a {c}" for c in ("bus", "train", "car")}


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_without_a_second_split_one_image_in_twenty_is_held_out(tmp_path, name):
    write(tmp_path, images("train/cat", "train/dog", count=30))
    found = read_folder(name, str(tmp_path))
    assert [len(found.files[split]) for split in ("train", "test")] == [57, 3]
    assert any("one image in twenty is held out" in fact for fact in found.facts)
    assert set(every(read(tmp_path, name)).values()) == {"a photo of a cat", "a photo of a dog"}


def test_a_held_out_split_alone_is_refused(tmp_path):
    write(tmp_path, images("val/cat", "val/dog"))
    with pytest.raises(ValueError, match=r"there is val and no train/: rename it"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------- ImageNet


def test_a_subset_of_imagenet_has_torchvisions_names(tmp_path):
    write(tmp_path, images(*[f"{part}/{wnid}" for part in ("train", "val") for wnid in DOGS]))
    for name in ("imagenet", "folder"):
        assert set(every(read(tmp_path, name)).values()) == {
            f"a photo of a {text}" for text in DOGS.values()
        }


def test_every_name_of_imagenet_belongs_to_its_id():
    names, sources = class_names(["n01440764", "n02119789", "n03255030", "n15075141"], [])
    assert list(names.values()) == ["tench", "kit fox", "dumbbell", "toilet tissue"]
    assert sources == ["ImageNet-1k's list"]


def test_a_group_between_split_and_id_and_a_name_behind_the_id(tmp_path):
    write(tmp_path, images("train/dogs/n02086240", "train/dogs/n02087394", "val/x/n02086240"))
    write(tmp_path / "stanford", images("n00000001-Great_Dane", "n00000002-red_setter"))
    assert (
        read(tmp_path, "imagenet")["train"]["train/dogs/n02086240/0.jpg"] == "a photo of a shih-tzu"
    )
    assert set(every(read(tmp_path / "stanford")).values()) == {
        "a photo of a great dane",
        "a photo of a red setter",
    }


FLAT = {
    "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000002,n02086240 1 2 3 4\n"
    "ILSVRC2012_val_00000001,n02087394 1 2 3 4 n02087394 5 6 7 8\n",
    "val_annotations.txt": "ILSVRC2012_val_00000002.JPEG\tn02086240\t0\t1\t2\t3\n"
    "ILSVRC2012_val_00000001.JPEG\tn02087394\t0\t1\t2\t3\n",
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "200\n131\n",
}


@pytest.mark.parametrize("truth", FLAT)
@pytest.mark.parametrize("place", ["", "ILSVRC/Data/CLS-LOC"])
def test_a_flat_val_with_its_truth(tmp_path, truth, place):
    base = tmp_path / place
    write(tmp_path, {truth: FLAT[truth]})
    write(base, images("train/n02086240", "train/n02087394"))
    write(base, {f"val/ILSVRC2012_val_0000000{i}.JPEG": None for i in (1, 2)})
    for root in (base, tmp_path):
        test = read(root, "imagenet")["test"]
        assert len(test) == 2
        assert next(iter(test.values())) == "a photo of a rhodesian ridgeback"


def test_a_flat_val_without_its_truth_is_refused(tmp_path):
    write(tmp_path, images("train/n02086240") | {"val/ILSVRC2012_val_00000001.JPEG": None})
    with pytest.raises(ValueError, match=r"no test image, such as .*val/ILS.* caption or a class"):
        read(tmp_path, "imagenet")


def meta_bin() -> bytes:
    file = io.BytesIO()
    torch.save(({"n00000001": ("red fox", "Vulpes")}, ["n00000001"]), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("Labels.json", json.dumps({"n00000001": "red fox, Vulpes"})),
        ("imagenet_class_index.json", json.dumps({"0": ["n00000001", "red_fox"]})),
        ("LOC_synset_mapping.txt", "n00000001 red fox, Vulpes\n"),
        ("words.txt", "n00000001\tred fox, Vulpes\n"),
        ("meta.bin", meta_bin()),
    ],
)
def test_lists_of_class_names_three_folders_up(tmp_path, name, content):
    write(tmp_path, {name: content} | images("a/b/c/train/n00000001", "a/b/c/val/n00000001"))
    for place in ("", "a/b/c"):
        found = read_folder("imagenet", str(tmp_path / place))
        assert found.captions["train"][0].split("\n")[0] == "a photo of a red fox"
        assert any(name in fact for fact in found.facts)


def test_tiny_imagenet_as_distributed(tmp_path):
    write(tmp_path, images(*[f"train/{wnid}/images" for wnid in DOGS], "test/images"))
    write(tmp_path, images("val/images", count=1) | {"words.txt": "n02086240\tfluffy dog\n"})
    write(tmp_path, {"val/val_annotations.txt": "0.jpg\tn02086240\t0\t0\t6\t6\n"})
    for name in ("imagenet", "folder"):
        found = read(tmp_path, name)
        assert found["test"] == {"val/images/0.jpg": "a photo of a fluffy dog"}
        assert len(found["train"]) == 4


def test_a_folder_that_is_called_like_an_image_is_a_folder(tmp_path):
    write(tmp_path, images("cats.jpg", "dogs.jpg"))
    assert len(every(read(tmp_path))) == 4


# ---------------------------------------------------------------------------------------- Captions

THREE = {"img/a.jpg": None, "img/b.jpg": None, "img/c.jpg": None}
BUS = {"img/a.jpg": "a red bus", "img/b.jpg": "a dog, running", "img/c.jpg": ""}
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 8, "caption": "a dog, running"},
        {"image_id": 7, "caption": "a red bus"},
    ],
}
TABLES = {
    "captions.txt": "image,caption\na.jpg,a red bus\nb.jpg,a dog, running\n",
    "Flickr8k.token.txt": "a.jpg#0\ta red bus\nb.jpg#1\ta dog, running\n",
    "results.csv": "image_name| number| comment\na.jpg| 0| a red bus\nb.jpg| 0| a dog, running\n",
    "list.tsv": "filename\tprompt\nimg\\a.jpg\ta red bus\n/old/place/img/b.jpg\ta dog, running\n",
    "img/metadata.csv": '\ufefffile_name;text\na.jpg;"a red bus"\nb.jpg;a dog, running\n',
    "metadata.jsonl": '{"file_name": "img/a.jpg", "text": ["a red bus", "bus"]}\n'
    '{"file_name": "C:\\\\x\\\\img\\\\b.jpg", "text": "a dog, running"}\n',
    "captions.json": json.dumps(
        [{"image": "a", "caption": "a red bus"}, {"image": "b.jpg", "caption": "a dog, running"}]
    ),
    "annotations/captions_train2017.json": json.dumps(COCO),
    "by_name.json": json.dumps({"a.jpg": "a red bus", "img/b.jpg": ["a dog, running"]}),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_captions(tmp_path, name):
    write(tmp_path, THREE | {name: TABLES[name]})
    assert every(read(tmp_path)) == BUS
    found = read_folder("folder", str(tmp_path))
    assert any(f"captions from {name}" in fact for fact in found.facts)
    assert "1 of 3 train images have no caption" in found.warnings


def test_a_table_in_utf_16_and_one_in_windows_encoding(tmp_path):
    for encoding in ("utf-16", "cp1252"):
        write(
            tmp_path,
            THREE | {"metadata.csv": "file_name,text\nimg/a.jpg,a café\n".encode(encoding)},
        )
        assert every(read(tmp_path))["img/a.jpg"] == "a café"


def test_a_table_above_the_splits(tmp_path):
    write(tmp_path, images("train", "val"))
    rows = [f"{part}/{i}.jpg,a {part} {i}" for part in ("train", "val") for i in range(2)]
    write(tmp_path, {"metadata.csv": "\n".join(["file_name,text", *rows])})
    assert read(tmp_path)["test"] == {"val/0.jpg": "a val 0", "val/1.jpg": "a val 1"}


def test_the_other_images_keep_the_captions_of_their_classes(tmp_path):
    write(tmp_path, images("cat", "dog") | {"metadata.csv": "file_name,text\ncat/0.jpg,my cat\n"})
    assert sorted(every(read(tmp_path)).values()) == ["a photo of a cat"] + 2 * [
        "a photo of a dog"
    ] + ["my cat"]


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_texts_beside_the_images(tmp_path, suffix):
    write(tmp_path, THREE | {f"img/a{suffix}": "a red bus\n", f"img/b{suffix}": "a dog, running"})
    write(tmp_path, {"readme.txt": "my photographs", f"img/c{suffix}": "0 0.5 0.5 0.25 1e-05\n"})
    assert every(read(tmp_path)) == BUS
    found = read_folder("folder", str(tmp_path))
    assert {"not used: readme.txt", f"not used: 1 {suffix} without words beside images"} <= {
        *found.warnings
    }


def test_rows_of_absent_images_are_counted(tmp_path):
    write(
        tmp_path, THREE | {"metadata.csv": "file_name,text\nimg/a.jpg,x y\nimg/z.jpg,z\nz.jpg,z\n"}
    )
    (fact,) = [
        fact for fact in read_folder("folder", str(tmp_path)).facts if "captions from" in fact
    ]
    assert fact == "captions from metadata.csv (3 captions, 2 rows of images that are not there)"


def test_a_name_that_two_images_share_names_neither(tmp_path):
    write(
        tmp_path, images("a", "b", count=1) | {"list.csv": "file,text\n0.jpg,x y\nb/0.jpg,my b\n"}
    )
    assert every(read(tmp_path)) == {"a/0.jpg": "a photo of an a", "b/0.jpg": "my b"}


def test_caption_column(tmp_path):
    write(tmp_path, THREE | {"metadata.csv": "file_name,text,long\nimg/a.jpg,bus,a red bus\n"})
    assert every(read(tmp_path, caption_column="Long"))["img/a.jpg"] == "a red bus"
    with pytest.raises(ValueError, match=r"columns file_name, text, long\) has no column"):
        read(tmp_path, caption_column="short")


@pytest.mark.parametrize(
    "files, pattern",
    [
        (
            {"metadata.csv": "file_name,tags\nimg/a.jpg,x\n"},
            r"columns file_name, tags\) has no col",
        ),
        ({"boxes.csv": "file_name,x,y\nimg/a.jpg,1,2\n"}, r"not used: boxes.csv \(columns file_n"),
        ({"metadata.parquet": b"PAR1"}, r"1 Parquet files are not read, unpack them"),
        ({"img/000.tar": b""}, r"1 tar files are not read, unpack them"),
        ({"metadata.jsonl": "{"}, r"metadata.jsonl cannot be read \(JSONDecodeError"),
        ({"img/a.txt": "0 0.5 0.5 0.2 0.2"}, r"1 .txt without words"),
        ({"annotations/instances_val.json": '{"images": [], "annotations": []}'}, "instances_val"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, files, pattern):
    write(tmp_path, THREE | files)
    with pytest.raises(ValueError, match=pattern):
        read(tmp_path)


# ------------------------------------------------------------------------------- The command lines


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_data_py_shows_what_training_would_see(tmp_path):
    write(tmp_path, images(*[f"{part}/{wnid}" for part in ("train", "val") for wnid in DOGS]))
    done = run("data.py", "imagenet", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 images to train on, 4 to test on, 2 classes" in done.stdout
    assert "longest caption 7 words" in done.stdout
    assert "names of 2 classes from ImageNet-1k's list" in done.stdout
    assert "pretrain: a photo of a shih-tzu" in done.stdout.replace("shih - tzu", "shih-tzu")
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    done = run("data.py", "folder", "train/n02086240", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no train image")


def test_training_refuses_before_the_first_step(tmp_path):
    write(tmp_path, images("train/n02086240", "train/n02087394") | {"val/a.JPEG": None})
    done = run("train.py", "--dataset", "imagenet", "--encoder", "nowhere", "--smoke", cwd=tmp_path)
    assert done.returncode == 2
    assert "no test image" in done.stderr
    done = run("train.py", "--dataset", "imagenet", cwd=tmp_path / "train")
    assert done.returncode == 2
    assert "needs --data_dir, a folder: there is no ./train either" in done.stderr
