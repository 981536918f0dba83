"""pretrained.py: parity with the real libraries, strict loading, damaged files, the hub.

    python -m pytest tests/test_pretrained.py

The fixtures were written by the libraries themselves (make_encoder_fixtures.py); where a library
is installed, its case also runs live.
"""

import argparse
import http.server
import importlib.util
import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import make_encoder_fixtures as fixtures
from encoder import IMAGENET_STATS
from images import read_whole_image
from pretrained import load_encoder, main, pca_colors
from weights import read_safetensors

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures" / "encoder"
CLIP_FOLDER = FIXTURES / "hf_clip"
CLIP_FILE = FIXTURES / "hf_clip" / "model.safetensors"
SIGLIP_FILE = FIXTURES / "hf_siglip" / "model.safetensors"
LIBRARY_CASES = [(name, case) for name, cases in fixtures.CASES.items() for case in cases]
CASES = [case for _, case in LIBRARY_CASES]


def case_name(value):
    return getattr(value, "__name__", value)


def relative_error(a, b):
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return ((a - b).norm() / b.norm()).item()


def assert_same_as_library(folder: Path, said: str = ""):
    encoder = load_encoder(f"{folder}{said}")
    for name, expected in torch.load(folder / "expected.bin", weights_only=True).items():
        features = encoder(expected["images"] / 255)
        assert relative_error(features.patch_tokens, expected["patch_tokens"]) < 1e-5, name
        assert relative_error(features.pooled, expected["pooled"]) < 1e-5, name


# ---- parity


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_fixture_of_the_real_library(case):
    assert_same_as_library(FIXTURES / case.__name__)


# Where the publisher's models differ, and nothing in the file decides.
TO_BE_SAID = {
    fixtures.open_clip_quickgelu: ":quick_gelu",
    fixtures.timm_registers_cls: ":half",
    fixtures.timm_attention_pool: ":gelu",
}


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_conventions_are_known_without_a_config(case, tmp_path, capsys):
    """All but the number of heads is the publisher's default, and is said, or is refused.

    That is the activation, eps, mean, std, pooling and resizing.
    """
    shutil.copytree(FIXTURES / case.__name__, tmp_path, dirs_exist_ok=True)
    (tmp_path / "open_clip_config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    said = TO_BE_SAID.get(case, "")
    assert_same_as_library(tmp_path, said)
    assert "assumed as published" in capsys.readouterr().err or "swiglu" in case.__name__
    if said:
        with pytest.raises(ValueError, match=r"no tensor of .* as in PATH:quick_gelu"):
            load_encoder(tmp_path)


@pytest.mark.parametrize("library, case", LIBRARY_CASES, ids=case_name)
def test_live_library(library, case, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; the fixture that it wrote is tested")
    torch.manual_seed(100)
    fixtures.write_case(case, tmp_path)
    assert_same_as_library(tmp_path)


def tiny_torchvision():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(
        image_size=15,
        patch_size=5,
        num_layers=2,
        num_heads=3,
        hidden_dim=12,
        mlp_dim=20,
        num_classes=4,
    )
    return fixtures.randomise(vit)


@pytest.mark.parametrize("size", [15, 20])
def test_torchvision_live(tmp_path, size):
    model = tiny_torchvision()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    interpolate_embeddings = torchvision.models.vision_transformer.interpolate_embeddings
    state = interpolate_embeddings(size, 5, model.state_dict())
    model.image_size = size
    model.encoder.pos_embedding = torch.nn.Parameter(state["encoder.pos_embedding"])
    images = torch.rand(2, 3, size, size)
    mean = torch.tensor(IMAGENET_STATS["mean"]).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STATS["std"]).view(3, 1, 1)
    x = model._process_input((images - mean) / std)
    x = model.encoder(torch.cat([model.class_token.expand(2, -1, -1), x], dim=1))
    features = load_encoder(tmp_path / "vit.pth")(images)
    assert relative_error(features.patch_tokens, x[:, 1:]) < 1e-5
    assert relative_error(features.pooled, x[:, 0]) < 1e-5
    assert relative_error(features.cls_token, x[:, 0]) < 1e-5


def test_loaded_encoder_is_frozen_and_cast():
    encoder = load_encoder(FIXTURES / "hf_clip", dtype=torch.bfloat16)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    features = encoder(torch.rand(1, 3, 15, 15))
    assert {t.dtype for t in features} == {torch.bfloat16}


# ---- strict loading

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float64: "F64",
}


def write_safetensors(path: Path, tensors: dict, header: bytes | None = None) -> None:
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        entries[name] = dict(
            dtype=SAFETENSORS_NAMES[tensor.dtype],
            shape=list(tensor.shape),
            data_offsets=[len(data), len(data) + len(raw)],
        )
        data += raw
    header = json.dumps(entries).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def without(tensors: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def clip_tensors():
    return dict(read_safetensors(CLIP_FILE))


def of_the_encoder(tensors: dict) -> list[str]:
    return [name for name in tensors if name.startswith(("vision_model", "visual_projection"))]


@pytest.fixture
def clip_folder(tmp_path):
    shutil.copy(FIXTURES / "hf_clip" / "config.json", tmp_path)

    def write(tensors):
        write_safetensors(tmp_path / "model.safetensors", tensors)
        return tmp_path

    return write


def test_safetensors_reader_reads_what_was_written(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.randn(4).half(),
        "c": torch.randn(5, 1).bfloat16(),
        "scalar": torch.tensor(7),
        "d": torch.arange(3, dtype=torch.uint8),
        "e": torch.randn(2, dtype=torch.float64),
    }
    write_safetensors(tmp_path / "t.safetensors", tensors)
    read = read_safetensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


def test_only_wanted_tensors_are_read(clip_folder):
    """A text tower of 8 GB (a hole in the file) costs neither time nor memory."""
    folder = clip_folder(clip_tensors())
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, end = json.loads(raw[8 : 8 + length]), len(raw) - 8 - length
    header["text_model.huge"] = dict(dtype="F32", shape=[2**31], data_offsets=[end, end + 2**33])
    new = json.dumps(header).encode()
    raw = struct.pack("<Q", len(new)) + new + raw[8 + length :]
    (folder / "model.safetensors").write_bytes(raw)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(8 + len(new) + end + 2**33)
    images = torch.ones(1, 3, 15, 15)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pooled = load_encoder(folder)(images).pooled
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 200_000
    assert torch.equal(pooled, load_encoder(FIXTURES / "hf_clip")(images).pooled)


def test_every_missing_tensor_is_refused(clip_folder):
    tensors = clip_tensors()
    wanted = of_the_encoder(tensors)
    assert len(wanted) == 2 * 16 + 8
    for name in wanted:
        folder = clip_folder(without(tensors, name))
        with pytest.raises(ValueError, match="missing|needs|no layout|no place"):
            load_encoder(folder)


def test_every_reshaped_tensor_is_refused(clip_folder):
    tensors = clip_tensors()
    for name in of_the_encoder(tensors):
        tensor = tensors[name]
        if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1]:
            reshaped = tensor.transpose(0, 1).contiguous()
        else:
            reshaped = tensor.view(2, -1)
        with pytest.raises(ValueError, match="model.safetensors: "):
            load_encoder(clip_folder(tensors | {name: reshaped}))


def test_a_wrong_shape_and_a_wrong_dtype_are_named(clip_folder):
    tensors, name = clip_tensors(), "vision_model.post_layernorm.weight"
    with pytest.raises(ValueError, match=r"\[2, 12\] instead of"):
        load_encoder(clip_folder(tensors | {name: torch.ones(2, 12)}))
    with pytest.raises(ValueError, match="int64"):
        load_encoder(clip_folder(tensors | {name: torch.ones(12, dtype=torch.int64)}))


EXTRA = [
    "vision_model.encoder.layers.0.self_attn.extra.weight",
    "vision_model.encoder.layers.1.mlp.fc3.bias",
    "lm_head.weight",
    "mean",
    "prefix_tokens",
    "visual_projection.bias",
]


@pytest.mark.parametrize("extra", EXTRA)
def test_extra_tensors_are_named(clip_folder, extra):
    with pytest.raises(ValueError, match=extra.split(".")[-1]):
        load_encoder(clip_folder(clip_tensors() | {extra: torch.ones(12)}))


def test_two_layouts_in_one_file_are_refused(clip_folder):
    tensors = clip_tensors() | {"vision_model.layernorm.weight": torch.ones(12)}
    with pytest.raises(ValueError, match="layernorm.weight and .*layernorm.weight are one"):
        load_encoder(clip_folder(tensors))


def test_one_lost_layer_scale_is_refused(tmp_path):
    tensors = read_safetensors(FIXTURES / "hf_dinov2" / "model.safetensors")
    tensors = without(tensors, "encoder.layer.1.layer_scale1.lambda1")
    shutil.copy(FIXTURES / "hf_dinov2" / "config.json", tmp_path)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="blocks.1.attn.proj.scale is missing"):
        load_encoder(tmp_path)


def test_siglip_without_its_head_has_no_pooled_embedding(tmp_path):
    """As transformers saves it with vision_use_head=False; a head in part is a damaged one."""
    shutil.copytree(FIXTURES / "hf_siglip", tmp_path, dirs_exist_ok=True)
    tensors = read_safetensors(SIGLIP_FILE)
    head = [name for name in tensors if name.startswith("vision_model.head.")]
    images = torch.rand(1, 3, 15, 15)
    whole = load_encoder(tmp_path)(images)
    assert whole.pooled is not None
    write_safetensors(tmp_path / "model.safetensors", without(tensors, *head))
    features = load_encoder(tmp_path)(images)
    assert features.pooled is None
    assert torch.equal(features.patch_tokens, whole.patch_tokens)
    for lost in head:
        write_safetensors(tmp_path / "model.safetensors", without(tensors, lost))
        with pytest.raises(ValueError, match="missing|no place"):
            load_encoder(tmp_path)


CONTRADICTIONS = [
    ("hidden_size", 24, "width = 24.* show 12"),
    ("num_hidden_layers", 3, "depth = 3.* show 2"),
    ("image_size", 20, "image_size = 20"),
    ("hidden_act", "relu", "no such activation.*relu"),
    ("num_attention_heads", 5, "heads"),
    ("num_attention_heads", "three", "config beside it"),
    ("num_attention_heads", 0, "heads"),
    ("hidden_act", ["gelu"], "config beside it"),
    ("patch_size", None, "config beside it"),
]


@pytest.mark.parametrize("field, value, sentence", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors(clip_folder, field, value, sentence):
    folder = clip_folder(clip_tensors())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        load_encoder(folder)


def test_what_a_config_states_wins_over_the_convention(clip_folder):
    folder = clip_folder(clip_tensors())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    cfg = load_encoder(folder).cfg
    assert cfg.act == "gelu_tanh"
    assert cfg.norm_eps == 1e-3
    assert cfg.mean == (0.1, 0.2, 0.3)


DAMAGED_CONFIGS = [
    "",
    "{",
    "[]",
    "3",
    '{"vision_config": 3}',
    '{"vision_config": {"num_attention_heads": 3}, "image_mean": [1, 2]}',
    '{"num_attention_heads": 3, "global_pool": "max"}',
    "\\xff",
]


@pytest.mark.parametrize("text", DAMAGED_CONFIGS)
def test_a_config_that_is_damaged(clip_folder, text):
    folder = clip_folder(clip_tensors())
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config beside it|heads"):
        load_encoder(folder)


def test_a_shape_that_claims_a_giant_costs_no_memory(clip_folder):
    """A patch embedding that says it is 524,288 wide would make an attention matrix of 3 TB."""
    name = "vision_model.embeddings.patch_embedding.weight"
    folder = clip_folder(clip_tensors() | {name: torch.zeros(2**19, 3, 1, 1).half()})
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="instead of"):
        load_encoder(folder)


def test_heads_that_nothing_tells_are_not_guessed(tmp_path):
    torch.save(tiny_torchvision().state_dict(), tmp_path / "vit.pth")
    sentence = "no number of heads for width 12: state num_attention_heads"
    with pytest.raises(ValueError, match=sentence):
        load_encoder(tmp_path / "vit.pth")


# ---- damaged files


def must_refuse(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=path.name):
        load_encoder(path)


def test_truncated_files(tmp_path):
    shutil.copy(FIXTURES / "hf_siglip" / "config.json", tmp_path)
    raw = SIGLIP_FILE.read_bytes()
    lengths = random.Random(0).sample(range(len(raw)), 40)
    for length in {0, 1, 7, 8, 9, len(raw) - 1, *lengths}:
        must_refuse(tmp_path / "model.safetensors", raw[:length])
    must_refuse(tmp_path / "model.safetensors", raw + b"\0")


def test_bit_flips_in_the_header(tmp_path):
    """Any flipped bit is refused.

    Exceptions are what is free text (the metadata) and the name of a tensor that is left out.
    """
    shutil.copy(FIXTURES / "hf_siglip" / "config.json", tmp_path)
    tensors = read_safetensors(SIGLIP_FILE)
    tensors = {name: t for name, t in tensors.items() if name.startswith("vision")}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    bits = 8 * (8 + struct.unpack("<Q", raw[:8])[0])
    for bit in [*range(64), *random.Random(0).sample(range(64, bits), 300)]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        must_refuse(tmp_path / "model.safetensors", bytes(flipped))


def entry(dtype='"F32"', shape="[2]", offsets="[0, 8]"):
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}'


MALFORMED_HEADERS = [
    "[]",
    "7",
    "null",
    '"a"',
    '{"a": 3}',
    '{"a": []}',
    "{",
    "{}{}",
    "[" * 100_000,
    "\xff\xfe",
    "",
    '{"a": {}}',
    '{"a": {"dtype": "F32", "shape": [2]}}',
    # Overlapping tensors.
    f'{{"a": {entry()}, "b": {entry(shape="[1]", offsets="[4, 8]")}}}',
]
MALFORMED_ENTRIES = [
    entry(shape="[1]", offsets="[4, 8]"),  # a hole before
    entry(shape="[1]", offsets="[0, 4]"),  # a hole after
    entry(shape="[1]", offsets="[0, 8]"),  # fewer numbers than bytes
    entry(shape="[4]", offsets="[0, 16]"),  # beyond the file
    entry(offsets="[8, 0]"),
    entry(offsets="[-8, 0]"),
    entry(offsets="[0, 8, 8]"),
    entry(shape="[2.0]"),
    entry(shape="[-2]"),
    entry(shape="[true, 2]"),
    entry(shape="[0, 2]"),
    entry(shape='"2"'),
    entry(shape="[99999999999999999999999]"),
    entry(dtype='"F31"'),
    entry(dtype='["F32"]'),
    entry(dtype='"F64"'),
]
MALFORMED_HEADERS += [f'{{"a": {text}}}' for text in MALFORMED_ENTRIES]


@pytest.mark.parametrize("header", MALFORMED_HEADERS)
def test_malformed_headers(tmp_path, header):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, header.encode("latin-1"))
    with pytest.raises(ValueError):
        read_safetensors(path)


def test_the_same_file_well_formed_is_read(tmp_path):
    path = tmp_path / "t.safetensors"
    header = f'{{"__metadata__": {{"format": "pt"}}, "a": {entry()}}}   '
    write_safetensors(path, {"a": torch.ones(2)}, header.encode())
    assert read_safetensors(path)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("length", [9, 10**6, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_or_the_limit(tmp_path, length):
    (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="header claims"):
        read_safetensors(tmp_path / "t.safetensors")


def test_damaged_pickles(tmp_path):
    raw = (FIXTURES / "dinov2_own" / "pytorch_model.bin").read_bytes()
    shutil.copy(FIXTURES / "dinov2_own" / "config.json", tmp_path)
    for length in (0, 1, 4, 100, len(raw) // 2, len(raw) - 1):
        must_refuse(tmp_path / "dinov2.pth", raw[:length])
    must_refuse(tmp_path / "dinov2.pth", b"not a checkpoint at all")


def test_pickles_of_something_else(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: .*no state dict"):
        load_encoder(tmp_path / "list.pth")
    # A pickled module: loading it would run its code.
    torch.save(tiny_torchvision(), tmp_path / "whole.pt")
    with pytest.raises(
        ValueError, match="whole.pt: .*objects of torchvision.*VisionTransformer, which are code"
    ):
        load_encoder(tmp_path / "whole.pt")


# ---- one's own checkpoints, and what stands in the place of weights


def clip_with(rename=str, **more) -> dict:
    return {rename(name): tensor for name, tensor in clip_tensors().items()} | more


def wrong(tensors: dict) -> dict:
    return {name: tensor + 1 for name, tensor in tensors.items()}


class Unknown:
    pass


def own_checkpoints() -> dict:
    tensors = clip_tensors()
    teacher = {f"teacher.backbone.{name}": tensor for name, tensor in tensors.items()}
    student = {f"student.backbone.{name}": tensor for name, tensor in wrong(tensors).items()}
    head = {"teacher.dino_head.mlp.0.weight": torch.ones(2, 2)}
    return {
        "ddp": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "compiled": {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()},
        "named": {f"vit.{name}": tensor for name, tensor in tensors.items()},
        "args": {"model": tensors, "args": argparse.Namespace(lr=1e-3, name="run"), "epoch": 3},
        "ema": {"model": wrong(tensors), "model_ema": tensors, "epoch": 3},
        "dino": {"student": wrong(tensors), "teacher": tensors, "epoch": 3},
        "dinov2": teacher | student | head,
        "lightning": {"state_dict": student | teacher, "pytorch-lightning_version": "2"},
    }


@pytest.mark.parametrize("name", own_checkpoints())
def test_ones_own_checkpoints(tmp_path, name):
    shutil.copy(CLIP_FOLDER / "config.json", tmp_path)
    torch.save(own_checkpoints()[name], tmp_path / "own.pt")
    assert_same_encoder(tmp_path / "own.pt", CLIP_FOLDER)


def assert_same_encoder(path, other) -> None:
    images = torch.rand(2, 3, 15, 15)
    for mine, theirs in zip(load_encoder(path)(images), load_encoder(other)(images), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_blocks_in_chunks(tmp_path):
    folder = FIXTURES / "dinov2_own"
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    chunked = {name.replace("blocks.", "blocks.0."): t for name, t in tensors.items()}
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(
        {"teacher": {f"backbone.{name}": t for name, t in chunked.items()}}, tmp_path / "x.pth"
    )
    assert_same_encoder(tmp_path / "x.pth", folder)


def test_shards(tmp_path):
    shutil.copy(CLIP_FOLDER / "config.json", tmp_path)
    tensors = clip_tensors()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name] for name, own in weight_map.items() if own == file}
        write_safetensors(tmp_path / file, part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (tmp_path, index, tmp_path / names[1]):
        assert_same_encoder(path, CLIP_FOLDER)
    (tmp_path / names[0]).unlink()
    with pytest.raises(ValueError, match=f"its shard {names[0]} is not there"):
        load_encoder(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="damaged index"):
        load_encoder(tmp_path)


def open_clip_tensors() -> dict:
    folder = FIXTURES / "open_clip_quickgelu"
    return torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize(
    "name, more",
    [
        ("ViT-B-16-quickgelu.pt", {}),
        ("openai.pt", {}),
        ("clip.pt", {"input_resolution": torch.tensor(15), "vocab_size": torch.tensor(9)}),
        ("tag.pt", {"config": {"tag": "openai", "num_attention_heads": 3}}),
        ("said.pt:quick_gelu", {}),
        ("checkpoint.pt", {"name": "run-ViT-B-16-quickgelu-lr_1"}),
    ],
)
def test_quick_gelu_is_believed_where_it_is_said(tmp_path, name, more):
    config = more.get("config", {"num_attention_heads": 3})
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = open_clip_tensors() | {k: v for k, v in more.items() if k not in ("name", "config")}
    if "name" in more:
        content = {"state_dict": content, "name": more["name"], "epoch": 1}
    torch.save(content, tmp_path / name.partition(":")[0])
    assert_same_as_library_file(tmp_path / name, FIXTURES / "open_clip_quickgelu")


def assert_same_as_library_file(path, folder) -> None:
    encoder = load_encoder(path)
    for expected in torch.load(folder / "expected.bin", weights_only=True).values():
        features = encoder(expected["images"] / 255)
        assert relative_error(features.patch_tokens, expected["patch_tokens"]) < 1e-5


def test_a_torchscript_archive(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3, "hidden_act": "quick_gelu"}')
    root = torch.nn.Module()
    for name, tensor in open_clip_tensors().items():
        module = root
        *folders, leaf = name.split(".")
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, torch.nn.Module())
            module = getattr(module, folder)
        module.register_buffer(leaf, tensor)
    torch.jit.save(torch.jit.script(root), tmp_path / "ViT-B-16.pt")
    assert_same_as_library_file(tmp_path / "ViT-B-16.pt", FIXTURES / "open_clip_quickgelu")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of git-lfs",
        ),
        (b"\n<!DOCTYPE html><html>", "a web page, not the weights"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_stands_in_the_place_of_weights(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {sentence}"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["rope_embed.periods", "model.layer.0.attention.q_proj.weight"])
def test_dinov3_is_refused_by_its_name(tmp_path, name):
    torch.save({name: torch.ones(2), "patch_embed.proj.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="DINOv3"):
        load_encoder(tmp_path / "x.pth")


def test_torchs_own_advice_never_reaches_the_user(tmp_path):
    torch.save({"model": clip_tensors(), "config": Unknown()}, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        load_encoder(tmp_path / "x.pth")
    assert "Unknown" in str(error.value)
    assert "weights_only" not in str(error.value)
    assert "\x1b" not in str(error.value)


# ---- finding the file


def test_unknown_names_are_answered_with_near_ones(tmp_path):
    with pytest.raises(ValueError, match="did you mean clip-b16"):
        load_encoder("clip-b-16")
    with pytest.raises(ValueError, match="holds none of model.safetensors"):
        load_encoder(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub, which redirects as the real one does.

    Its files by name, the requests that it got, and the names of files that break off.
    """
    files, requests, broken = {}, [], set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            name = self.path.rpartition("/")[2]
            if name not in files:
                self.send_error(404)
                return
            is_here = self.path.startswith("/storage/") or name == "config.json"
            self.send_response(200 if is_here else 302)
            if not is_here:
                self.send_header("Location", f"/storage/{name}")
            body = files[name] if is_here else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:10] if name in broken else body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for file in ("config.json", "model.safetensors"):
        files[file] = (FIXTURES / "hf_clip" / file).read_bytes()
    yield files, requests, broken
    server.shutdown()


def test_download_once_then_cached(hub):
    _, requests, _ = hub
    images = torch.ones(1, 3, 15, 15)
    pooled = load_encoder("clip-b32")(images).pooled
    assert "/openai/clip-vit-base-patch32/resolve/main/model.safetensors" in requests
    assert torch.equal(pooled, load_encoder(FIXTURES / "hf_clip")(images).pooled)
    requests.clear()
    load_encoder("clip-b32")
    assert not requests


def test_download_falls_back_to_the_older_format(hub):
    files, _, _ = hub
    del files["model.safetensors"]
    for name in ("pytorch_model.bin", "config.json"):
        files[name] = (FIXTURES / "dinov2_own" / name).read_bytes()
    assert load_encoder("clip-b32").cfg.family == "DINOv2"


def test_download_that_breaks_off_is_refused_and_not_kept(hub, tmp_path):
    _, _, broken = hub
    for name in ("model.safetensors", "config.json"):
        broken.add(name)
        with pytest.raises(ValueError, match=f"cannot download .*{name}"):
            load_encoder("clip-b32")
        assert not list(tmp_path.rglob(f"{name}*"))
        shutil.rmtree(tmp_path / "torch")


def test_offline_and_the_hubs_own_cache(hub, monkeypatch, tmp_path):
    _, requests, _ = hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        load_encoder("clip-b32")
    cache = tmp_path / "hf" / "hub" / "models--openai--clip-vit-base-patch32"
    shutil.copytree(FIXTURES / "hf_clip", cache / "snapshots" / "abc")
    load_encoder("clip-b32")
    assert not requests


def test_unreachable_hub_is_a_sentence(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot download .*127.0.0.1:9"):
        load_encoder("clip-b32")


# ---- the command


def test_command_prints_what_it_is_and_what_it_sees(tmp_path, monkeypatch, capsys):
    image = torch.rand(3, 30, 40)
    image[:, :, 20:] *= 0.2
    torchvision.utils.save_image(image, tmp_path / "halves.png")
    arguments = [str(FIXTURES / "timm_registers_gap"), str(tmp_path / "halves.png")]
    monkeypatch.setattr(sys, "argv", ["pretrained.py", *arguments])
    main()
    out = capsys.readouterr().out
    facts = "ViT, timm|width 12|depth 2|heads 3|patch_size 5|image_size 15|registers 4"
    for words in facts.split("|"):
        assert words in out
    # The image beside its patch tokens; the shorter side is the native one.
    with Image.open(tmp_path / "halves_pca.png") as picture:
        assert picture.size == (2 * 20, 15)
        pixels = torchvision.transforms.functional.to_tensor(picture)
    left, right = pixels.split(20, dim=2)
    patches = right.unfold(1, 5, 5).unfold(2, 5, 5)
    assert left.std() > 0.1
    assert right.std() > 0.1
    assert (patches == patches[..., :1, :1]).all(), "one color a patch"


def test_a_picture_is_read_upright_and_whole(tmp_path):
    """Turned by its EXIF orientation (6: a quarter to the right), transparency as white."""
    picture = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    image = read_whole_image(str(tmp_path / "turned.png"), side=15, patch_size=5)
    assert image.shape == (1, 3, 30, 15)
    assert image[0, :, :10].min() > 0.99, "the transparent half is white, and above"
    assert image[0, 0, 20:].min() > 0.99
    assert image[0, 1:, 20:].max() < 0.01


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_a_thin_picture_does_not_become_gigantic(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "line.png")
    cfg = load_encoder(FIXTURES / "hf_clip").cfg
    image = read_whole_image(str(tmp_path / "line.png"), cfg.image_size, cfg.patch_size)
    assert sorted(image.shape[2:]) == [cfg.patch_size, 8 * cfg.image_size]


def test_pca_colors_separate_two_kinds_of_patches():
    torch.manual_seed(0)
    signs = torch.tensor([1.0] * 6 + [-1.0] * 4)[:, None]
    tokens = torch.randn(1, 8) * signs * 5 + 0.1 * torch.randn(10, 8)
    colors = pca_colors(tokens)
    assert colors.shape == (10, 3)
    assert colors.min() == 0
    assert colors.max() == 1
    ones, others = colors[:6, 0], colors[6:, 0]
    assert (ones.min() - others.max()).abs() > 0.8 or (others.min() - ones.max()).abs() > 0.8
    # The sign does not depend on the order.
    reordered = pca_colors(tokens.flip(0)).flip(0)
    torch.testing.assert_close(reordered, colors, atol=1e-3, rtol=0)


MISTAKES = {
    "did you mean": ["clip-b-32"],
    "cannot read the image": [CLIP_FOLDER, CLIP_FOLDER / "config.json"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_command_answers_a_mistake_with_one_line(sentence):
    command = [sys.executable, ROOT / "pretrained.py", *map(str, MISTAKES[sentence])]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "assumed as published" not in line]
    assert done.returncode == 2
    assert len(lines) == 1, done.stderr
    assert sentence in lines[0]
