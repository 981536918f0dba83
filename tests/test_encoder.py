"""encoder.py: the ViT by itself. What public weights make of it: test_pretrained.py.

python -m pytest tests/test_encoder.py
"""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from encoder import ViT, ViTConfig, scratch_config


def small(**changes):
    torch.manual_seed(0)
    return ViT(scratch_config(image_size=12, patch_size=4, width=20, depth=3, heads=5, **changes))


# ---- initial values and gradients


def expected_std(name):
    if name == "pos_embed":
        return 0.5
    if name.startswith("blocks") and name.endswith(("attn.proj.weight", "fc2.weight")):
        return 0.02 / 4
    return 0.02


def test_init_guarantees():
    vit = ViT(scratch_config(24, 8, width=128, depth=8, heads=4, out_width=64))
    for name, p in vit.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            std = expected_std(name)
            # A normal distribution cut at two deviations has 0.88 of its standard deviation.
            assert abs(p.std().item() / (0.88 * std) - 1) < 0.05, f"{name} {p.std():.4f}"
            assert p.abs().max() <= 2.001 * std, name


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
def test_every_parameter_learns(pool):
    vit = small(out_width=6, pool=pool)
    features = vit(torch.rand(2, 3, 12, 12))
    assert features.pooled.shape == (2, 6)
    assert features.patch_tokens.shape == (2, 9, 20)
    (features.pooled.square().sum() + features.patch_tokens.square().sum()).backward()
    for name, p in vit.named_parameters():
        assert p.grad is not None, name
        assert p.numel() == 0 or p.grad.any(), name


def test_a_frozen_encoder_passes_gradients_on_to_its_images():
    vit, images = small().requires_grad_(False), torch.rand(2, 3, 12, 12, requires_grad=True)
    vit(images).patch_tokens.square().sum().backward()
    assert images.grad.any()


def test_checkpoint_round_trip(tmp_path):
    vit, images = small(out_width=6), torch.rand(2, 3, 12, 12)
    torch.save({"config": asdict(vit.cfg), "state": vit.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = ViT(ViTConfig(**saved["config"]))
    again.load_state_dict(saved["state"])
    assert torch.equal(again(images).pooled, vit(images).pooled)


def test_compiles_without_graph_breaks():
    vit, images = small(), torch.rand(2, 3, 12, 12)
    for learns in (True, False):
        vit.requires_grad_(learns)
        compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).pooled, vit(images).pooled)


# ---- patches and positions


def test_a_patch_changes_with_its_own_pixels_first():
    """Tokens are row by row: with no block, token (row 1, column 2) sees that patch alone."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=12, patch_size=4, width=20, depth=0, heads=5, mlp_width=8))
    images = torch.rand(1, 3, 12, 12)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 1 - changed[:, :, 4:8, 8:12]
    difference = vit(images).patch_tokens - vit(changed).patch_tokens
    moved = difference.abs().amax(dim=2)[0] > 1e-6
    assert moved.tolist() == [False] * 5 + [True] + [False] * 3


def test_dinov2_resizes_with_the_offset():
    """The published models without registers scale by (new + 0.1) / old.

    That differs from resizing to the size itself.
    """
    cfg = ViTConfig(image_size=15, patch_size=5, width=4, heads=2, depth=1, mlp_width=8)
    cfg.pos_resize = "offset"
    vit = ViT(cfg)
    grid = vit.pos_embed.detach().view(3, 3, 4).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, scale_factor=(2.1 / 3, 4.1 / 3), mode="bicubic")
    plain = F.interpolate(grid, size=(2, 4), mode="bicubic")
    got = vit.position_embeddings(2, 4)
    torch.testing.assert_close(got, expected[0].flatten(1).T)
    assert (got - plain[0].flatten(1).T).abs().max() > 1e-4


def test_native_size_that_the_patch_does_not_divide():
    """SigLIP So400m/14 at 384: the last pixels are dropped, as by the publisher's convolution."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=14, patch_size=4, width=20, depth=1, heads=5, mlp_width=8))
    images = torch.rand(1, 3, 14, 14)
    cropped = images[..., :12, :12]
    torch.testing.assert_close(vit(images).patch_tokens, vit(cropped).patch_tokens)


# ---- images that cannot be encoded

WRONG_SIZES = [
    ((14, 12), "height 14 .* 12 or 16"),
    ((12, 3), "width 3 .* valid: 4"),
    ((12, 17), "16 or 20"),
]


@pytest.mark.parametrize("size, sentence", WRONG_SIZES)
def test_wrong_image_size_is_a_sentence(size, sentence):
    with pytest.raises(ValueError, match=sentence):
        small()(torch.rand(1, 3, *size))


WRONG_IMAGES = {
    "up to 255": torch.rand(1, 3, 12, 12) * 255,
    "below 0": torch.rand(1, 3, 12, 12) - 0.5,
    "no batch": torch.rand(3, 12, 12),
    "channels last": torch.rand(1, 12, 12, 3),
    "bytes": torch.zeros(1, 3, 12, 12, dtype=torch.uint8),
}


@pytest.mark.parametrize("images", WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_images_are_checked_at_the_boundary(images):
    with pytest.raises(AssertionError, match="images must"):
        small()(images)
