"""--cache_features: the same bytes after any interruption, the same losses, never other features.

pytest tests/test_feature_cache.py
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import feature_cache
from data import CaptionedImages, batches
from encoder import ViT, scratch_config
from feature_cache import cache_features, encoder_fingerprint
from model import ModelConfig, UnifiedModel, resize_for_encoder
from recon_loss import total_loss
from shapes import Shapes

IMAGES, SIZE = 11, 12  # images; pixels of a side

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 3)


@pytest.fixture
def folder(tmp_path):
    """Photographs of noise, no two alike, the fourth damaged."""
    generator = torch.Generator().manual_seed(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(IMAGES):
        pixels = torch.randint(0, 256, (3 * 14 * 17,), generator=generator, dtype=torch.uint8)
        image = Image.frombytes("RGB", (14, 17), bytes(pixels.tolist()))
        image.save(photos / f"{i:02}.png")
    (photos / "03.png").write_bytes(b"no image")
    return tmp_path


def make_photos(folder, size=SIZE, split="reca"):
    root = str(folder / "photos")
    files = sorted(os.listdir(root))
    return CaptionedImages(root, files, ["a thing"] * len(files), split, size, 0)


def make_shapes(split, seed=0):
    dataset = Shapes(split, SIZE, seed)
    dataset.size = IMAGES
    return dataset


def make_models(encoder_size=0):
    """An encoder and a model that reads it, all of them random."""
    torch.manual_seed(0)
    encoder = ViT(scratch_config(SIZE, 4)).eval()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    cfg = ModelConfig(
        vocab_size=9,
        text_len=5,
        image_size=SIZE,
        patch_size=6,
        width=24,
        depth=1,
        heads=2,
        encoder_width=encoder.cfg.width,
        connector_depth=1,
        encoder_size=encoder_size,
    )
    model = UnifiedModel(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, mean=float(p.ndim == 1))
    return encoder, model


class Kill(BaseException):
    pass


def make_encode(encoder, size=0):
    """As in training: images -> patch tokens, without gradients."""

    def encode(images):
        with torch.no_grad():
            return encoder(resize_for_encoder(images, size)).patch_tokens

    return encode


def cache(folder, dataset, encoder, size=0, dtype=torch.float32, encode=None, **options):
    """The data set with its features, cached in folder/cache."""
    encode = encode or make_encode(encoder, size)
    fingerprint = encoder_fingerprint(encoder, size, dtype)
    return cache_features(dataset, encode, fingerprint, str(folder / "cache"), **options)


def counting(encoder, calls, stop=99):
    """An encode that notes the sizes of its batches and is killed in the `stop`-th call after the
    first, which is not a block: it finds the shape."""
    encode = make_encode(encoder)

    def count(images):
        calls.append(len(images))
        if len(calls) > stop:
            raise Kill
        return encode(images)

    return count


def keys(count, epoch=0):
    return [(epoch, i) for i in range(count)]


def content(dataset) -> bytes:
    return Path(dataset.path).read_bytes()


# ----------------------------------------------------------------------------------- Interruptions


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_stopped_and_resumed_gives_the_same_bytes_and_computes_nothing_twice(folder, stop):
    encoder, _ = make_models()
    whole = content(cache(folder, make_photos(folder), encoder))
    os.rename(folder / "cache", folder / "alone")
    with pytest.raises(Kill):
        cache(folder, make_photos(folder), encoder, encode=counting(encoder, [], stop))
    (part,) = (folder / "cache").iterdir()
    assert part.read_bytes() != whole
    calls = []
    resumed = cache(folder, make_photos(folder), encoder, encode=counting(encoder, calls))
    assert content(resumed) == whole
    assert calls == [3] + [3, 3, 3, 2][stop - 1 :]
    calls.clear()
    cache(folder, make_photos(folder), encoder, encode=counting(encoder, calls))
    assert calls == [3], "a whole cache is only compared"


def test_a_mark_is_set_after_its_block_is_on_the_disk(folder, monkeypatch):
    encoder, _ = make_models()
    dataset = make_photos(folder)
    order = []
    sync = os.fsync
    mark = os.pwrite

    def noted_sync(file):
        order.append("sync")
        sync(file)

    def noted_mark(*arguments):
        order.append("mark")
        return mark(*arguments)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "pwrite", noted_mark)
    cache(folder, dataset, encoder)
    assert order == ["sync", "mark"] * 4


def test_processes_share_the_work(folder):
    encoder, _ = make_models()
    whole = content(cache(folder, make_photos(folder), encoder))
    os.rename(folder / "cache", folder / "alone")
    os.mkdir(folder / "cache")
    calls = []
    encode = counting(encoder, calls)

    def do_not_wait(seconds):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache.time, "sleep", do_not_wait)
        with pytest.raises(InterruptedError):  # rank 1 would wait for rank 0
            cache(folder, make_photos(folder), encoder, encode=encode, rank=1, world_size=2)
    assert calls == [3, 3, 2]
    done = cache(folder, make_photos(folder), encoder, encode=encode, rank=0, world_size=2)
    assert content(done) == whole
    assert calls == [3, 3, 2, 3, 3, 3]


# ---------------------------------------------------------------------------- The right features


def check_features(dataset, encode, batch) -> None:
    expected = encode(batch["image"])
    assert batch["features"].dtype == torch.float16
    torch.testing.assert_close(batch["features"].float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_image_beside_them(folder, workers):
    encoder, _ = make_models()
    encode = make_encode(encoder)
    dataset = cache(folder, make_photos(folder), encoder, workers=workers)
    stream = batches(dataset, 4, seed=0, workers=workers)
    for _ in range(8):
        batch = next(stream)
        check_features(dataset, encode, batch)
        features = batch["features"].float()
        assert not torch.allclose(features, features.roll(1, 0), atol=0.1), "no two are alike"
    first, second = (dataset.__getitems__(keys(IMAGES, epoch))["image"] for epoch in (0, 1))
    assert torch.equal(first, second), "no flips"


def cached_path(folder, dataset, encoder, size=0, dtype=torch.float32) -> str:
    """The path of the cache, whose features are checked."""
    cached = cache(folder, dataset, encoder, size, dtype)
    check_features(cached, make_encode(encoder, size), cached.__getitems__(keys(len(dataset))))
    return cached.path


def test_another_encoder_size_or_image_set_never_hits(folder):
    encoder, _ = make_models()
    photos = make_photos(folder)
    changed, _ = make_models()
    with torch.no_grad():
        changed.state_dict()["blocks.0.norm1.weight"][5] += 1e-3  # one number
    normalized, _ = make_models()
    normalized.cfg.mean = (0.1, 0.2, 0.3)
    paths = [
        cached_path(folder, photos, encoder),
        cached_path(folder, photos, encoder, dtype=torch.bfloat16),
        cached_path(folder, photos, changed),
        cached_path(folder, photos, normalized),
        cached_path(folder, photos, encoder, size=16),
        cached_path(folder, photos, encoder, size=SIZE),
        cached_path(folder, make_photos(folder, 16), encoder, size=SIZE),
        cached_path(folder, make_shapes("reca"), encoder),
        cached_path(folder, make_shapes("understand"), encoder),
        cached_path(folder, make_shapes("reca", seed=1), encoder),
    ]
    assert len(set(paths)) == len(paths)
    same_images = cached_path(folder, make_photos(folder, split="understand"), encoder)
    assert same_images == paths[0], "the same images under another name"


def test_changed_images_never_hit(folder):
    encoder, _ = make_models()
    paths = {cached_path(folder, make_photos(folder), encoder)}
    image = folder / "photos" / "05.png"
    old = image.stat()
    Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    os.utime(image, ns=(old.st_atime_ns, old.st_mtime_ns))  # written over, its time set back
    paths.add(cached_path(folder, make_photos(folder), encoder))
    assert len(paths) == 2
    os.remove(folder / "photos" / "07.png")
    paths.add(cached_path(folder, make_photos(folder), encoder))
    assert len(paths) == 3


def test_features_that_this_code_does_not_compute_are_refused(folder):
    """The transform itself may change, with Pillow or an edit: the file's name does not tell."""
    encoder, _ = make_models()
    cache(folder, make_photos(folder), encoder)
    encode = make_encode(encoder)
    with pytest.raises(ValueError, match="remove that file"):
        cache(folder, make_photos(folder), encoder, encode=lambda images: encode(images.flip(-1)))


def test_too_small_a_disk_is_said_before_any_work(folder, monkeypatch):
    encoder, _ = make_models()
    calls = []
    disk = SimpleNamespace(free=1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(ValueError, match=r"needs 2\.76e-05 GB in .*, where 1e-06 GB are free"):
        cache(folder, make_photos(folder), encoder, encode=counting(encoder, calls))
    assert calls == [3]


def test_features_beyond_float16_are_refused(folder):
    encoder, _ = make_models()
    with torch.no_grad():
        encoder.norm.weight[5] = 1e6
    with pytest.raises(ValueError, match="beyond float16"):
        cache(folder, make_photos(folder), encoder)


# -------------------------------------------------------------------------------------- Training


def no_encoder(images):
    raise AssertionError("the encoder ran")


def test_losses_and_gradients_are_those_of_the_encoder(folder):
    encoder, model = make_models()
    batch = cache(folder, make_photos(folder), encoder).__getitems__(keys(IMAGES))
    words = torch.tensor([[1, 4, 5, 2, 0]] * IMAGES)
    without = {"image": batch["image"], "caption_target": words}

    def loss_and_gradients(encoder, part):
        model.zero_grad()
        torch.manual_seed(0)
        parts = {"main": part, "understand": part}
        loss, _ = total_loss(model, encoder, parts, {"recon": 1.0, "i2t": 0.5})
        loss.backward()
        return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]

    computed = loss_and_gradients(encoder, without)
    cached = loss_and_gradients(no_encoder, {**without, "features": batch["features"]})
    for a, b in zip(computed, cached, strict=True):
        assert (a - b).norm() <= 5e-3 * a.norm() + 1e-7


def test_the_loss_reads_the_features(folder):
    encoder, model = make_models()
    batch = cache(folder, make_photos(folder), encoder).__getitems__(keys(IMAGES))

    def loss(features):
        torch.manual_seed(0)
        main = {**batch, "features": features}
        return total_loss(model, no_encoder, {"main": main}, {"recon": 1.0})[0]

    features = batch["features"]
    assert (loss(features) - loss(features.roll(1, 0))).abs() > 1e-4


SMALL_RUN = (
    "--width 16 --depth 1 --heads 2 --image_size 24 --patch_size 8 --batch_size 4 --warmup 1 "
    "--repeats_per_image 2 --encoder_steps 2 --pretrain_steps 2 --align_steps 2 --reca_steps 3 "
    "--device cpu --cache_features"
)


def test_train_runs_on_cached_features(tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.setattr(Shapes, "SPLITS", dict.fromkeys(Shapes.SPLITS, 12))
    monkeypatch.setattr(train, "report", lambda *args: None)
    arguments = [*SMALL_RUN.split(), "--cache_dir", str(tmp_path / "cache")]
    train.main([*arguments, "--out_dir", str(tmp_path / "out")])
    assert len(list((tmp_path / "cache").iterdir())) == 2, "understand's and reca's"
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(SystemExit) as end:
        train.main([*arguments, "--out_dir", str(tmp_path / "other"), "--seed", "1"])
    assert end.value.code == 2
    assert "--cache_features needs" in capsys.readouterr().err
