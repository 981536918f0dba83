"""--cache_features: the same bytes after any interruption, the same losses, and never the features of something else.

    pytest tests/test_cache.py
"""
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import data
import recon_loss
import train
from encoder import ViT, scratch_config
from model import ModelConfig, UnifiedModel

N, SIZE = 11, 12  # images; pixels of a side


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 3 images, on one thread."""
    monkeypatch.setattr(data, "BLOCK", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """Photographs of noise, no two alike, the fourth damaged."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for i in range(N):
        pixels = torch.randint(0, 256, (3 * 14 * 17,), generator=generator, dtype=torch.uint8)
        Image.frombytes("RGB", (14, 17), bytes(pixels.tolist())).save(tmp_path / "photos" / f"{i:02}.png")
    (tmp_path / "photos" / "03.png").write_bytes(b"no image")
    return tmp_path


def photos(folder, size=SIZE, split="reca"):
    files = sorted(os.listdir(folder / "photos"))
    return data.Photos(str(folder / "photos"), files, ["a thing"] * len(files), split, size, 0)


def make(seed=0, size=0):
    """An encoder and a model that reads it, all of them random."""
    torch.manual_seed(seed)
    encoder = ViT(scratch_config(SIZE, 4)).eval()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model = UnifiedModel(ModelConfig(vocab_size=9, text_len=5, image_size=SIZE, patch_size=6, width=24, depth=1, heads=2, encoder_width=encoder.cfg.width, connector_depth=1,
                                     encoder_size=size))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, mean=float(p.ndim == 1))
    return encoder, model


class Kill(BaseException):
    pass


def cache(folder, dataset, encoder, model, dtype=torch.float32, stop=99, calls=None, **how):
    """As train.py does it; killed in the `stop`-th call of the encoder. The first call is not a block: it finds the sizes."""
    calls = [] if calls is None else calls

    def encode(images):
        calls.append(len(images))
        if len(calls) > stop:
            raise Kill
        with torch.no_grad():
            return encoder(model.for_encoder(images)).patch_tokens
    return data.cache_features(dataset, encode, data.encoder_identity(encoder, model.cfg.encoder_size, dtype), str(folder / "cache"), **how)


def keys(n, epoch=0):
    return [(epoch, i) for i in range(n)]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_stopped_and_resumed_gives_the_same_bytes_and_computes_nothing_twice(folder, stop):
    encoder, model = make()
    whole = open(cache(folder, photos(folder), encoder, model).path, "rb").read()
    os.rename(folder / "cache", folder / "alone")
    calls = []
    with pytest.raises(Kill):
        cache(folder, photos(folder), encoder, model, stop=stop)
    assert open(next((folder / "cache").iterdir()), "rb").read() != whole
    again = cache(folder, photos(folder), encoder, model, calls=calls)
    assert open(again.path, "rb").read() == whole
    assert calls == [3] + [3, 3, 3, 2][stop - 1:]
    calls.clear()
    cache(folder, photos(folder), encoder, model, calls=calls)
    assert calls == [3], "a whole cache is only compared"


def test_a_mark_is_set_after_its_block_is_on_the_disk(folder, monkeypatch):
    encoder, model = make()
    dataset, order = photos(folder), []
    sync, mark = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), sync(file)))
    monkeypatch.setattr(os, "pwrite", lambda *how: (order.append("mark"), mark(*how))[1])
    cache(folder, dataset, encoder, model)
    assert order == ["sync", "mark", "sync"] * 4


def test_processes_share_the_work(folder):
    encoder, model = make()
    whole = open(cache(folder, photos(folder), encoder, model).path, "rb").read()
    os.rename(folder / "cache", folder / "alone")
    os.mkdir(folder / "cache")
    calls = []
    with pytest.raises(InterruptedError), pytest.MonkeyPatch.context() as patch:  # rank 1 would wait for rank 0
        patch.setattr(data.time, "sleep", lambda seconds: (_ for _ in ()).throw(InterruptedError))
        cache(folder, photos(folder), encoder, model, calls=calls, rank=1, world=2)
    assert calls == [3, 3, 2]
    assert open(cache(folder, photos(folder), encoder, model, calls=calls, rank=0, world=2).path, "rb").read() == whole
    assert calls == [3, 3, 2, 3, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_image_beside_them(folder, workers):
    encoder, model = make()
    dataset = cache(folder, photos(folder), encoder, model, workers=workers)
    stream = data.batches(dataset, 4, seed=0, workers=workers)
    for _ in range(8):
        batch = next(stream)
        expected = encoder(model.for_encoder(batch["image"])).patch_tokens
        assert batch["features"].dtype == torch.float16
        torch.testing.assert_close(batch["features"].float(), expected, atol=2e-3, rtol=2e-3)
        assert not torch.allclose(expected, expected.roll(1, 0), atol=0.1), "no two images are alike to this encoder"
    assert torch.equal(dataset.__getitems__(keys(N))["image"], dataset.__getitems__(keys(N, 1))["image"]), "no flips"


def test_another_encoder_size_or_image_set_never_hits(folder):
    encoder, model = make()
    same, paths = photos(folder), set()

    def path(dataset, *what):
        found = cache(folder, dataset, *what).path
        batch = data.Cached.__getitems__(cache(folder, dataset, *what), keys(len(dataset)))
        torch.testing.assert_close(batch["features"].float(), what[0](what[1].for_encoder(batch["image"])).patch_tokens, atol=2e-3, rtol=2e-3)
        return found

    paths.add(path(same, encoder, model))
    assert path(photos(folder, split="understand"), encoder, model) in paths, "the same images under another name"
    changed, _ = make()
    with torch.no_grad():
        changed.state_dict()["blocks.0.norm1.weight"][5] += 1e-3  # one number
    renamed, _ = make()
    renamed.cfg.mean = (0.1, 0.2, 0.3)
    others = [(same, encoder, model, torch.bfloat16), (same, changed, model), (same, renamed, model), (same, encoder, make(size=16)[1]), (same, encoder, make(size=SIZE)[1]),
              (photos(folder, 16), encoder, make(size=SIZE)[1]),
              (data.Shapes("reca", SIZE), encoder, model), (data.Shapes("understand", SIZE), encoder, model), (data.Shapes("reca", SIZE, 1), encoder, model)]
    for shapes in (other[0] for other in others[6:]):
        shapes.size = N
    for number, other in enumerate(others):
        found = path(*other)
        assert found not in paths, f"case {number}"
        paths.add(found)
    old = (folder / "photos" / "05.png").stat()
    turned = Image.open(folder / "photos" / "05.png").transpose(Image.Transpose.ROTATE_180)
    turned.save(folder / "photos" / "05.png")
    os.utime(folder / "photos" / "05.png", ns=(old.st_atime_ns, old.st_mtime_ns))  # written over, its time set back
    found = path(photos(folder), encoder, model)
    assert found not in paths
    os.remove(folder / "photos" / "07.png")
    assert path(photos(folder), encoder, model) not in paths | {found}


def test_features_that_this_code_does_not_compute_are_refused(folder):
    """The transform itself may change: with Pillow, with an edit. What is cached is compared, whatever its name says."""
    encoder, model = make()
    cache(folder, photos(folder), encoder, model)
    model.for_encoder = lambda images: images.flip(-1)
    with pytest.raises(ValueError, match="remove that file"):
        cache(folder, photos(folder), encoder, model)


def test_too_small_a_disk_is_said_before_any_work(folder, monkeypatch):
    encoder, model = make()
    calls = []
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"needs 2\.76e-05 GB in .*, where 1e-06 GB are free"):
        cache(folder, photos(folder), encoder, model, calls=calls)
    assert calls == [3]


def test_features_beyond_float16_are_refused(folder):
    encoder, model = make()
    with torch.no_grad():
        encoder.norm.weight[5] = 1e6
    with pytest.raises(ValueError, match="beyond float16"):
        cache(folder, photos(folder), encoder, model)


def test_losses_and_gradients_are_those_of_the_encoder(folder):
    encoder, model = make()
    dataset = cache(folder, photos(folder), encoder, model)
    batch, found = dataset.__getitems__(keys(N)), []
    words = torch.tensor([[1, 4, 5, 2, 0]] * N)

    def none(images):
        raise AssertionError("the encoder ran")

    for how in (encoder, none):
        part = {"image": batch["image"], "wording": words} | ({"features": batch["features"]} if how is none else {})
        model.zero_grad()
        torch.manual_seed(0)
        loss, _ = recon_loss.total_loss(model, how, {"main": part, "understand": part}, {"recon": 1.0, "i2t": 0.5}, train_connector=True)
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found):
        assert (a - b).norm() <= 5e-3 * a.norm() + 1e-7
    batch["features"] = batch["features"].roll(1, 0)
    torch.manual_seed(0)
    other, _ = recon_loss.total_loss(model, none, {"main": batch}, {"recon": 1.0})
    torch.manual_seed(0)
    right, _ = recon_loss.total_loss(model, none, {"main": batch | {"features": batch["features"].roll(-1, 0)}}, {"recon": 1.0})
    assert (other - right).abs() > 1e-4, "features are read"


def test_train_runs_on_cached_features_and_exits_with_2_where_there_is_no_room(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Shapes, "SPLITS", {name: 12 for name in data.Shapes.SPLITS})
    monkeypatch.setattr(train, "report", lambda *args: None)
    arguments = ("--width 16 --depth 1 --heads 2 --image_size 24 --patch_size 8 --batch_size 4 --side_batch 2 --replay_batch 2 --draws 2 --encoder_steps 2 --pretrain_steps 2 "
                 "--align_steps 2 --reca_steps 3 --warmup 1 --device cpu --cache_features").split() + ["--cache_dir", str(tmp_path / "cache")]
    train.main([*arguments, "--out_dir", str(tmp_path / "out")])
    assert len(list((tmp_path / "cache").iterdir())) == 2, "understand's and reca's"
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(SystemExit) as end:
        train.main([*arguments, "--out_dir", str(tmp_path / "other"), "--seed", "1"])
    assert end.value.code == 2 and "--cache_features needs" in capsys.readouterr().err
