"""Write tests/fixtures/encoder: tiny encoders as the real libraries save them, and their answers.

    python3 -m venv .oracles
    .oracles/bin/pip install torch transformers timm open_clip_torch dinov2
    .oracles/bin/python tests/make_encoder_fixtures.py

Each case is a folder that its library wrote (random weights, all sizes different) and expected.bin:
uint8 images, and patch tokens and pooled embedding for them at the native size and at another one.
test_pretrained.py runs the same cases live where a library is installed. DINOv2's own code comes
from the `dinov2` package; it needs no xformers.
"""

import json
import logging
from pathlib import Path

import torch

WIDTH, DEPTH, HEADS, MLP, PATCH, IMAGE, PROJ = 12, 2, 3, 20, 5, 15, 7  # 3 x 3 patches
OTHER = (10, 20)  # 2 x 4 patches: positions have to be resized
CLIP_STATS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_STATS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIZES = dict(
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    patch_size=PATCH,
    image_size=IMAGE,
)
VISION = SIZES | dict(intermediate_size=MLP)
DINO = SIZES | dict(mlp_ratio=2)
TEXT = dict(
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=4,
    vocab_size=9,
    max_position_embeddings=5,
)
TIMM = dict(
    img_size=IMAGE,
    patch_size=PATCH,
    embed_dim=WIDTH,
    depth=DEPTH,
    num_heads=HEADS,
    mlp_ratio=MLP / WIDTH,
    num_classes=4,
    dynamic_img_size=True,
)


def randomise(model):
    """Large random values in every parameter, norms and biases too.

    A tensor in the wrong place has to show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def hf_clip(folder: Path, projection: bool = True):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    if projection:
        config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJ)
        model = randomise(CLIPModel(config))
        vision, project = model.vision_model, model.visual_projection
    else:
        model = randomise(CLIPVisionModel(CLIPVisionConfig(**VISION)))
        vision, project = getattr(model, "vision_model", model), torch.nn.Identity()
    model.save_pretrained(folder)

    def forward(x):
        out = vision(pixel_values=x, interpolate_pos_encoding=True)
        return vision.post_layernorm(out.last_hidden_state)[:, 1:], project(out.pooler_output)

    return forward, CLIP_STATS


def hf_clip_vision(folder: Path):
    return hf_clip(folder, projection=False)


def hf_siglip(folder: Path):
    from transformers import SiglipConfig, SiglipModel

    model = randomise(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)))
    model.save_pretrained(folder)

    def forward(x):
        out = model.vision_model(pixel_values=x, interpolate_pos_encoding=True)
        return out.last_hidden_state, out.pooler_output

    return forward, HALF_STATS


def hf_dinov2(folder: Path):
    from transformers import Dinov2Config, Dinov2Model

    model = randomise(Dinov2Model(Dinov2Config(**DINO)))
    model.save_pretrained(folder)

    def forward(x):
        out = model(x)
        return out.last_hidden_state[:, 1:], out.pooler_output

    return forward, IMAGENET_STATS


def hf_dinov2_reg_swiglu(folder: Path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=True, num_register_tokens=2)
    model = randomise(Dinov2WithRegistersModel(config))
    model.save_pretrained(folder)

    def forward(x):
        out = model(x)
        return out.last_hidden_state[:, 3:], out.pooler_output

    return forward, IMAGENET_STATS


def dinov2_own(folder: Path):
    from dinov2.models.vision_transformer import DinoVisionTransformer

    model = DinoVisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
        init_values=1.0,
        block_chunks=0,
    )
    randomise(model)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    # No tensor shows the number of heads.
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": HEADS}))

    def forward(x):
        out = model.forward_features(x)
        return out["x_norm_patchtokens"], out["x_norm_clstoken"]

    return forward, IMAGENET_STATS


def open_clip_quickgelu(folder: Path):
    from open_clip.model import CLIP, resize_pos_embed

    vision = dict(
        layers=DEPTH,
        width=WIDTH,
        head_width=WIDTH // HEADS,
        mlp_ratio=MLP / WIDTH,
        patch_size=PATCH,
    )
    config = dict(
        embed_dim=PROJ,
        quick_gelu=True,
        vision_cfg=vision | dict(image_size=IMAGE),
        text_cfg=dict(context_length=5, vocab_size=9, width=4, heads=1, layers=1),
    )
    model = randomise(CLIP(**config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    mean, std = CLIP_STATS
    files = dict(model_cfg=config, preprocess_cfg=dict(mean=mean, std=std))
    (folder / "open_clip_config.json").write_text(json.dumps(files))

    def forward(x):
        sized_vision = vision | dict(image_size=tuple(x.shape[2:]))
        sized = CLIP(**config | dict(vision_cfg=sized_vision)).eval()
        state = model.state_dict()
        resize_pos_embed(state, sized)
        sized.load_state_dict(state)
        sized.visual.output_tokens = True
        pooled, tokens = sized.visual(x)
        return tokens, pooled

    return forward, CLIP_STATS


def timm_model(folder: Path, stats=HALF_STATS, **switches):
    from timm.models import VisionTransformer
    from timm.models._hub import save_for_hf

    model = randomise(VisionTransformer(**TIMM, **switches))
    model.pretrained_cfg = dict(
        architecture="vit_base_patch16_224",
        mean=stats[0],
        std=stats[1],
        num_classes=4,
        input_size=(3, IMAGE, IMAGE),
    )
    save_for_hf(model, folder, model_args=dict(num_heads=HEADS), safe_serialization=True)

    def forward(x):
        tokens = model.forward_features(x)
        pooled = model.forward_head(tokens, pre_logits=True)
        return tokens[:, model.num_prefix_tokens :], pooled

    return forward, stats


def timm_registers_gap(folder: Path):
    switches = dict(class_token=False, no_embed_class=True, reg_tokens=4)
    return timm_model(folder, IMAGENET_STATS, **switches, global_pool="avg", init_values=1.0)


def timm_registers_cls(folder: Path):
    return timm_model(folder, no_embed_class=True, reg_tokens=2, qkv_bias=False)


def timm_attention_pool(folder: Path):
    return timm_model(folder, class_token=False, global_pool="map")


# By the library that has to be installed.
CASES = dict(
    transformers=[hf_clip, hf_clip_vision, hf_siglip, hf_dinov2, hf_dinov2_reg_swiglu],
    open_clip=[open_clip_quickgelu],
    timm=[timm_registers_gap, timm_registers_cls, timm_attention_pool],
    dinov2=[dinov2_own],
)


def write_case(case, folder: Path) -> None:
    """The library's files and its answers for two sizes of image."""
    folder.mkdir(parents=True, exist_ok=True)
    forward, (mean, std) = case(folder)
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    expected = {}
    for name, shape in (("native", (2, 3, IMAGE, IMAGE)), ("other", (1, 3, *OTHER))):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            tokens, pooled = forward((images / 255 - mean) / std)
        expected[name] = dict(
            images=images,
            patch_tokens=tokens.contiguous().clone(),
            pooled=pooled.contiguous().clone(),
        )
    torch.save(expected, folder / "expected.bin")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    root = Path(__file__).parent / "fixtures" / "encoder"
    for seed, case in enumerate(case for cases in CASES.values() for case in cases):
        torch.manual_seed(seed)
        write_case(case, root / case.__name__)
        print(case.__name__)
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    print(f"{size / 1000:.0f} KB")
