"""encoder.py against the real libraries (fixtures that they wrote, and live where installed), and against damaged files.

    python -m pytest tests/test_encoder.py
"""
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
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import encoder as E
import make_encoder_fixtures as fixtures

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures" / "encoder"
CASES = [case for cases in fixtures.CASES.values() for case in cases]


def relative(a, b):
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return ((a - b).norm() / b.norm()).item()


def same_as_library(folder: Path):
    encoder = E.load_encoder(folder)
    for name, expected in torch.load(folder / "expected.bin", weights_only=True).items():
        features = encoder(expected["images"] / 255)
        assert relative(features.patch_tokens, expected["patch_tokens"]) < 1e-5, name
        assert relative(features.pooled, expected["pooled"]) < 1e-5, name


# ---- parity

@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_fixture_of_the_real_library(case):
    same_as_library(FIXTURES / case.__name__)


@pytest.mark.parametrize("case", [case for case in CASES if case is not fixtures.open_clip_quickgelu], ids=lambda case: case.__name__)
def test_conventions_are_known_without_a_config(case, tmp_path):
    """All but the number of heads: the activation, eps, mean, std, pooling and resizing are the publisher's default."""
    shutil.copytree(FIXTURES / case.__name__, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    same_as_library(tmp_path)


@pytest.mark.parametrize("library, case", [(library, case) for library, cases in fixtures.CASES.items() for case in cases],
                         ids=lambda value: getattr(value, "__name__", value))
def test_live_library(library, case, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; the fixture that it wrote is tested")
    torch.manual_seed(100)
    fixtures.write_case(case, tmp_path)
    same_as_library(tmp_path)


def tiny_torchvision():
    torch.manual_seed(0)
    return fixtures.randomise(torchvision.models.VisionTransformer(
        image_size=15, patch_size=5, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20, num_classes=4))


@pytest.mark.parametrize("size", [15, 20])
def test_torchvision_live(tmp_path, size):
    model = tiny_torchvision()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    state = torchvision.models.vision_transformer.interpolate_embeddings(size, 5, model.state_dict())
    model.image_size, model.encoder.pos_embedding = size, torch.nn.Parameter(state["encoder.pos_embedding"])
    images = torch.rand(2, 3, size, size)
    x = model._process_input((images - torch.tensor(E.IMAGENET_STATS["mean"]).view(3, 1, 1)) / torch.tensor(E.IMAGENET_STATS["std"]).view(3, 1, 1))
    x = model.encoder(torch.cat([model.class_token.expand(2, -1, -1), x], dim=1))
    features = E.load_encoder(tmp_path / "vit.pth")(images)
    assert relative(features.patch_tokens, x[:, 1:]) < 1e-5
    assert relative(features.pooled, x[:, 0]) < 1e-5 and relative(features.cls_token, x[:, 0]) < 1e-5


def test_dinov2_resizes_with_the_offset():
    """The published models without registers scale by (new + 0.1) / old, which differs from resizing to the size itself."""
    vit = E.ViT(E.ViTConfig(image_size=15, patch_size=5, width=4, heads=2, depth=1, mlp_width=8, pos_resize="offset"))
    grid = vit.pos_embed.detach().view(3, 3, 4).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, scale_factor=(2.1 / 3, 4.1 / 3), mode="bicubic")[0].flatten(1).T
    plain = F.interpolate(grid, size=(2, 4), mode="bicubic")[0].flatten(1).T
    got = vit.position_embeddings(2, 4)
    torch.testing.assert_close(got, expected)
    assert (got - plain).abs().max() > 1e-4


# ---- the model by itself

def small(**changes):
    torch.manual_seed(0)
    return E.ViT(E.scratch_config(image_size=12, patch_size=4, width=20, depth=3, heads=5, **changes))


def test_init_guarantees():
    vit = E.ViT(E.scratch_config(24, 8, width=128, depth=8, heads=4, out_width=64))
    for name, p in vit.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            adds = name.startswith("blocks") and name.endswith(("attn.proj.weight", "fc2.weight"))
            deviation = 0.88 * (0.02 / 4 if adds else 0.5 if name == "pos_embed" else 0.02)
            assert abs(p.std().item() / deviation - 1) < 0.05, f"{name} {p.std():.4f}"  # 0.88: of a normal cut at two deviations
            assert p.abs().max() <= 2.001 * deviation / 0.88, name


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
def test_every_parameter_learns(pool):
    vit = small(out_width=6, pool=pool)
    features = vit(torch.rand(2, 3, 12, 12))
    assert features.pooled.shape == (2, 6) and features.patch_tokens.shape == (2, 9, 20)
    (features.pooled.square().sum() + features.patch_tokens.square().sum()).backward()
    assert not [name for name, p in vit.named_parameters() if p.grad is None or (p.numel() and not p.grad.any())]


def test_checkpoint_round_trip(tmp_path):
    vit, images = small(out_width=6), torch.rand(2, 3, 12, 12)
    torch.save({"config": asdict(vit.cfg), "state": vit.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = E.ViT(E.ViTConfig(**saved["config"]))
    again.load_state_dict(saved["state"])
    assert torch.equal(again(images).pooled, vit(images).pooled)


def test_a_patch_changes_with_its_own_pixels_first():
    """Tokens are row by row: with no block, token (row 1, column 2) sees the pixels of that patch alone."""
    torch.manual_seed(0)
    vit = E.ViT(E.ViTConfig(image_size=12, patch_size=4, width=20, depth=0, heads=5, mlp_width=8))
    images = torch.rand(1, 3, 12, 12)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 1 - changed[:, :, 4:8, 8:12]
    moved = (vit(images).patch_tokens - vit(changed).patch_tokens).abs().amax(dim=2)[0] > 1e-6
    assert moved.tolist() == [False] * 5 + [True] + [False] * 3


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_linear_with_and_without_gradients(bias):
    torch.manual_seed(0)
    linear = E.Linear(4, 5, bias=bias)
    for x in (torch.randn(2, 3, 4), torch.randn(3, 4), torch.randn(4, 3, 2).transpose(0, 2)):
        expected = F.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(linear(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), expected)
    assert linear(x).requires_grad and linear(x.requires_grad_()).grad_fn is not None
    linear.requires_grad_(False)
    assert linear(x).requires_grad  # a frozen encoder still passes gradients on to its images


def test_compiles_without_graph_breaks():
    vit, images = small(), torch.rand(2, 3, 12, 12)
    for learns in (True, False):
        compiled = torch.compile(vit.requires_grad_(learns), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).pooled, vit(images).pooled)


def test_loaded_encoder_is_frozen_and_cast():
    encoder = E.load_encoder(FIXTURES / "hf_clip", dtype=torch.bfloat16)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    features = encoder(torch.rand(1, 3, 15, 15))
    assert {t.dtype for t in features} == {torch.bfloat16}


def test_native_size_that_the_patch_does_not_divide():
    """SigLIP So400m/14 at 384: the last pixels are dropped, as by the publisher's convolution."""
    torch.manual_seed(0)
    vit = E.ViT(E.ViTConfig(image_size=14, patch_size=4, width=20, depth=1, heads=5, mlp_width=8))
    images = torch.rand(1, 3, 14, 14)
    torch.testing.assert_close(vit(images).patch_tokens, vit(images[..., :12, :12]).patch_tokens)


@pytest.mark.parametrize("size, sentence", [((14, 12), "height 14 .* 12 or 16"), ((12, 3), "width 3 .* valid: 4"), ((12, 17), "16 or 20")])
def test_wrong_image_size_is_a_sentence(size, sentence):
    with pytest.raises(ValueError, match=sentence):
        small()(torch.rand(1, 3, *size))


@pytest.mark.parametrize("images", [torch.rand(1, 3, 12, 12) * 255, torch.rand(1, 3, 12, 12) - 0.5, torch.rand(3, 12, 12),
                                    torch.rand(1, 12, 12, 3), torch.zeros(1, 3, 12, 12, dtype=torch.uint8)])
def test_images_are_checked_at_the_boundary(images):
    with pytest.raises(AssertionError, match="images must"):
        small()(images)


# ---- strict loading

def write_safetensors(path: Path, tensors: dict, header: bytes | None = None) -> None:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8", torch.float64: "F64"}
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        entries[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    header = json.dumps(entries).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def clip_tensors():
    return dict(E.read_safetensors(FIXTURES / "hf_clip" / "model.safetensors"))


@pytest.fixture
def clip_folder(tmp_path):
    shutil.copy(FIXTURES / "hf_clip" / "config.json", tmp_path)

    def write(tensors):
        write_safetensors(tmp_path / "model.safetensors", tensors)
        return tmp_path
    return write


def test_safetensors_reader_reads_what_was_written(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).half(), "c": torch.randn(5, 1).bfloat16(), "scalar": torch.tensor(7),
               "d": torch.arange(3, dtype=torch.uint8), "e": torch.randn(2, dtype=torch.float64)}
    write_safetensors(tmp_path / "t.safetensors", tensors)
    read = E.read_safetensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_only_wanted_tensors_are_read(clip_folder):
    """A text tower of 8 GB (a hole in the file) costs neither time nor memory."""
    folder = clip_folder({})
    tensors = clip_tensors()
    write_safetensors(folder / "model.safetensors", tensors)
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, end = json.loads(raw[8:8 + length]), len(raw) - 8 - length
    header["text_model.huge"] = dict(dtype="F32", shape=[2**31], data_offsets=[end, end + 2**33])
    new = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length:])
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(8 + len(new) + end + 2**33)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    same = E.load_encoder(folder)(torch.ones(1, 3, 15, 15)).pooled
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert torch.equal(same, E.load_encoder(FIXTURES / "hf_clip")(torch.ones(1, 3, 15, 15)).pooled)


def test_every_missing_tensor_is_refused(clip_folder):
    tensors = clip_tensors()
    wanted = [name for name in tensors if name.startswith(("vision_model", "visual_projection"))]
    assert len(wanted) == 2 * 16 + 8
    for name in wanted:
        folder = clip_folder({other: tensor for other, tensor in tensors.items() if other != name})
        with pytest.raises(ValueError, match="missing|needs|no layout|no place"):
            E.load_encoder(folder)


def test_every_reshaped_tensor_is_refused(clip_folder):
    tensors = clip_tensors()
    for name, tensor in tensors.items():
        if name.startswith(("vision_model", "visual_projection")):
            swapped = tensor.transpose(0, 1) if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1] else tensor.view(2, -1)
            with pytest.raises(ValueError, match="model.safetensors: "):
                E.load_encoder(clip_folder({**tensors, name: swapped.contiguous()}))
    with pytest.raises(ValueError, match=r"\[2, 12\] instead of"):
        E.load_encoder(clip_folder({**tensors, "vision_model.post_layernorm.weight": torch.ones(2, 12)}))
    with pytest.raises(ValueError, match="int64"):
        E.load_encoder(clip_folder({**tensors, "vision_model.post_layernorm.weight": torch.ones(12, dtype=torch.int64)}))


@pytest.mark.parametrize("extra", ["vision_model.encoder.layers.0.self_attn.extra.weight", "vision_model.encoder.layers.1.mlp.fc3.bias",
                                   "lm_head.weight", "mean", "prefix_tokens", "visual_projection.bias"])
def test_extra_tensors_are_named(clip_folder, extra):
    with pytest.raises(ValueError, match=extra.split(".")[-1]):
        E.load_encoder(clip_folder({**clip_tensors(), extra: torch.ones(12)}))


def test_two_layouts_in_one_file_are_refused(clip_folder):
    with pytest.raises(ValueError, match="layernorm.weight and .*layernorm.weight are one"):
        E.load_encoder(clip_folder({**clip_tensors(), "vision_model.layernorm.weight": torch.ones(12)}))


def test_one_lost_layer_scale_is_refused(tmp_path):
    tensors = dict(E.read_safetensors(FIXTURES / "hf_dinov2" / "model.safetensors"))
    del tensors["encoder.layer.1.layer_scale1.lambda1"]
    shutil.copy(FIXTURES / "hf_dinov2" / "config.json", tmp_path)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="blocks.1.attn.proj.scale is missing"):
        E.load_encoder(tmp_path)


def test_siglip_without_its_head_has_no_pooled_embedding(tmp_path):
    """As transformers saves it with vision_use_head=False; a head in part is a damaged one."""
    shutil.copytree(FIXTURES / "hf_siglip", tmp_path, dirs_exist_ok=True)
    tensors = E.read_safetensors(FIXTURES / "hf_siglip" / "model.safetensors")
    head = [name for name in tensors if name.startswith("vision_model.head.")]
    images = torch.rand(1, 3, 15, 15)
    whole = E.load_encoder(tmp_path)(images)
    write_safetensors(tmp_path / "model.safetensors", {name: tensor for name, tensor in tensors.items() if name not in head})
    features = E.load_encoder(tmp_path)(images)
    assert features.pooled is None and torch.equal(features.patch_tokens, whole.patch_tokens) and whole.pooled is not None
    for lost in head:
        write_safetensors(tmp_path / "model.safetensors", {name: tensor for name, tensor in tensors.items() if name != lost})
        with pytest.raises(ValueError, match="missing|no place"):
            E.load_encoder(tmp_path)


@pytest.mark.parametrize("field, value, sentence", [
    ("hidden_size", 24, "width = 24.* show 12"), ("num_hidden_layers", 3, "depth = 3.* show 2"), ("image_size", 20, "image_size = 20"),
    ("hidden_act", "relu", "no such activation.*relu"), ("num_attention_heads", 5, "heads"), ("num_attention_heads", "three", "config beside it"),
    ("num_attention_heads", 0, "heads"), ("hidden_act", ["gelu"], "config beside it"), ("patch_size", None, "config beside it")])
def test_a_config_that_contradicts_the_tensors(clip_folder, field, value, sentence):
    folder = clip_folder(clip_tensors())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        E.load_encoder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"vision_config": 3}', '{"vision_config": {"num_attention_heads": 3}, "image_mean": [1, 2]}',
                                  '{"num_attention_heads": 3, "global_pool": "max"}', "\\xff"])
def test_a_config_that_is_damaged(clip_folder, text):
    folder = clip_folder(clip_tensors())
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config beside it|heads"):
        E.load_encoder(folder)


def test_a_shape_that_claims_a_giant_costs_no_memory(clip_folder):
    """A patch embedding that says it is 524,288 wide would make an attention matrix of 3 TB."""
    name = "vision_model.embeddings.patch_embedding.weight"
    folder = clip_folder({**clip_tensors(), name: torch.zeros(2**19, 3, 1, 1).half()})
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="instead of"):
        E.load_encoder(folder)


def test_heads_that_nothing_tells_are_not_guessed(tmp_path):
    torch.save(tiny_torchvision().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="no number of heads for width 12: state num_attention_heads"):
        E.load_encoder(tmp_path / "vit.pth")


# ---- damaged files

def siglip_bytes():
    return (FIXTURES / "hf_siglip" / "model.safetensors").read_bytes()


def must_refuse(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=path.name):
        E.load_encoder(path)


def test_truncated_files(tmp_path):
    shutil.copy(FIXTURES / "hf_siglip" / "config.json", tmp_path)
    raw = siglip_bytes()
    for length in {0, 1, 7, 8, 9, len(raw) - 1, *random.Random(0).sample(range(len(raw)), 40)}:
        must_refuse(tmp_path / "model.safetensors", raw[:length])
    must_refuse(tmp_path / "model.safetensors", raw + b"\0")


def test_bit_flips_in_the_header(tmp_path):
    """Any flipped bit is refused, except in what is free text (the metadata) or the name of a tensor that is left out."""
    shutil.copy(FIXTURES / "hf_siglip" / "config.json", tmp_path)
    tensors = {name: t for name, t in E.read_safetensors(FIXTURES / "hf_siglip" / "model.safetensors").items() if name.startswith("vision")}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    bits = 8 * (8 + struct.unpack("<Q", raw[:8])[0])
    for bit in [*range(64), *random.Random(0).sample(range(64, bits), 300)]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        must_refuse(tmp_path / "model.safetensors", bytes(flipped))


ENTRY = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize("header", [
    '[]', '7', 'null', '"a"', '{"a": 3}', '{"a": []}', '{', '{}{}', '[' * 100_000, '\xff\xfe', '', '{"a": {}}',
    ENTRY.join(('{"a": ', ', "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}')),            # overlap
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',                                       # a hole before
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',                                       # a hole after
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',                                       # fewer numbers than bytes
    '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',                                      # beyond the file
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}', '{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', '{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 8]}}', '{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F32", "shape": [99999999999999999999999], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}', '{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}', '{"a": {"dtype": "F32", "shape": [2]}}'])
def test_malformed_headers(tmp_path, header):
    write_safetensors(tmp_path / "t.safetensors", {"a": torch.ones(2)}, header.encode("latin-1"))
    with pytest.raises(ValueError):
        E.read_safetensors(tmp_path / "t.safetensors")


def test_the_same_file_well_formed_is_read(tmp_path):
    write_safetensors(tmp_path / "t.safetensors", {"a": torch.ones(2)}, ('{"__metadata__": {"format": "pt"}, "a": %s}   ' % ENTRY).encode())
    assert E.read_safetensors(tmp_path / "t.safetensors")["a"].tolist() == [1, 1]


def test_header_longer_than_the_file_or_the_limit(tmp_path):
    for length in (9, 10**6, 2**63, 2**64 - 1):
        (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ValueError, match="header claims"):
            E.read_safetensors(tmp_path / "t.safetensors")


def test_damaged_pickles(tmp_path):
    raw = (FIXTURES / "dinov2_own" / "pytorch_model.bin").read_bytes()
    shutil.copy(FIXTURES / "dinov2_own" / "config.json", tmp_path)
    for length in (0, 1, 4, 100, len(raw) // 2, len(raw) - 1):
        must_refuse(tmp_path / "dinov2.pth", raw[:length])
    must_refuse(tmp_path / "dinov2.pth", b"not a checkpoint at all")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: .*no state dict"):
        E.load_encoder(tmp_path / "list.pth")
    torch.save(tiny_torchvision(), tmp_path / "whole.pt")  # a pickled module: loading it would run its code
    with pytest.raises(ValueError, match="whole.pt: .*weights_only"):
        E.load_encoder(tmp_path / "whole.pt")


# ---- finding the file

def test_unknown_names_are_answered_with_near_ones(tmp_path):
    with pytest.raises(ValueError, match="did you mean clip-b16"):
        E.load_encoder("clip-b-16")
    with pytest.raises(ValueError, match="holds none of model.safetensors"):
        E.load_encoder(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, which redirects as the real one does."""
    files, requests, broken = {}, [], set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            name = self.path.rpartition("/")[2]
            if name not in files:
                return self.send_error(404)
            stored = self.path.startswith("/storage/")
            self.send_response(200 if stored or name == "config.json" else 302)
            if not stored and name != "config.json":
                self.send_header("Location", f"/storage/{name}")
            body = files[name] if stored or name == "config.json" else b""
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
    files, requests, broken = hub
    pooled = E.load_encoder("clip-b32")(torch.ones(1, 3, 15, 15)).pooled
    assert "/openai/clip-vit-base-patch32/resolve/main/model.safetensors" in requests
    assert torch.equal(pooled, E.load_encoder(FIXTURES / "hf_clip")(torch.ones(1, 3, 15, 15)).pooled)
    requests.clear()
    E.load_encoder("clip-b32")
    assert not requests


def test_download_falls_back_to_the_older_format(hub):
    files, requests, broken = hub
    del files["model.safetensors"]
    files["pytorch_model.bin"] = (FIXTURES / "dinov2_own" / "pytorch_model.bin").read_bytes()
    files["config.json"] = (FIXTURES / "dinov2_own" / "config.json").read_bytes()
    assert E.load_encoder("clip-b32").cfg.family == "DINOv2"


def test_download_that_breaks_off_is_refused_and_not_kept(hub, tmp_path):
    files, requests, broken = hub
    for name in ("model.safetensors", "config.json"):
        broken.add(name)
        with pytest.raises(ValueError, match=f"cannot download .*{name}"):
            E.load_encoder("clip-b32")
        assert not list(tmp_path.rglob(f"{name}*"))
        shutil.rmtree(tmp_path / "torch")


def test_offline_and_the_hubs_own_cache(hub, monkeypatch, tmp_path):
    files, requests, broken = hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        E.load_encoder("clip-b32")
    shutil.copytree(FIXTURES / "hf_clip", tmp_path / "hf" / "hub" / "models--openai--clip-vit-base-patch32" / "snapshots" / "abc")
    E.load_encoder("clip-b32")
    assert not requests


def test_unreachable_hub_is_a_sentence(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot download .*127.0.0.1:9"):
        E.load_encoder("clip-b32")


# ---- the command

def test_command_prints_what_it_is_and_what_it_sees(tmp_path, monkeypatch, capsys):
    image = torch.rand(3, 30, 40)
    image[:, :, 20:] *= 0.2
    torchvision.utils.save_image(image, tmp_path / "halves.png")
    monkeypatch.setattr(sys, "argv", ["encoder.py", str(FIXTURES / "timm_registers_gap"), str(tmp_path / "halves.png")])
    E.main()
    out = capsys.readouterr().out
    for words in ("ViT, timm", "width 12", "depth 2", "heads 3", "patch_size 5", "image_size 15", "registers 4"):
        assert words in out
    with Image.open(tmp_path / "halves_pca.png") as picture:  # the image beside its patch tokens; the shorter side is the native one
        assert picture.size == (2 * 20, 15)
        left, right = torchvision.transforms.functional.to_tensor(picture).split(20, dim=2)
    patches = right.unfold(1, 5, 5).unfold(2, 5, 5)
    assert left.std() > 0.1 and (patches == patches[..., :1, :1]).all() and right.std() > 0.1


def test_pca_colors_separate_two_kinds_of_patches():
    torch.manual_seed(0)
    tokens = torch.randn(1, 8) * torch.tensor([1.0] * 6 + [-1.0] * 4)[:, None] * 5 + 0.1 * torch.randn(10, 8)
    colors = E.pca_colors(tokens)
    assert colors.shape == (10, 3) and colors.min() == 0 and colors.max() == 1
    first = colors[:, 0]
    assert (first[:6].min() - first[6:].max()).abs() > 0.8 or (first[6:].min() - first[:6].max()).abs() > 0.8
    torch.testing.assert_close(E.pca_colors(tokens.flip(0)).flip(0), colors, atol=1e-3, rtol=0)  # the sign does not depend on the order


def test_command_answers_a_mistake_with_one_line():
    for args, sentence in ((["clip-b-32"], "did you mean"), ([FIXTURES / "hf_clip", FIXTURES / "hf_clip" / "config.json"], "no image")):
        done = subprocess.run([sys.executable, ROOT / "encoder.py", *map(str, args)], capture_output=True, text=True)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and sentence in lines[0], done.stderr
