"""Public weights into the ViT of encoder.py: recognise their architecture, load them strictly.

    encoder = load_encoder("path/to/model.safetensors")  # or a preset, or a folder as on the hub
    python pretrained.py clip-b16 photo.jpg              # what it is, what it sees: photo_pca.png

Recognised are the layouts of transformers, OpenCLIP, timm, torchvision and DINOv2's own code, by
names and shapes of tensors; config.json says what no tensor shows (number of heads, activation).
Loading is strict: a tensor of the file is used once or left out by name, each of ours is filled.
What no tensor and no config shows is assumed aloud, or, where the published models of a layout
differ, has to be stated: in a config.json beside the file, or as PATH:quick_gelu, PATH:half.

# D width, N patches; "source" is a name in the file, "target" our name for it
"""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from cli import RANK, Parser, user_errors
from encoder import ACTIVATIONS, CLIP_STATS, HALF_STATS, IMAGENET_STATS, POOLS, ViT, ViTConfig
from images import read_whole_image
from weights import HUB, Tensors, find_weights, read_tensors


# ---- From the publishers' names to ours
def invert_table(table: str) -> dict[str, str]:
    """Rows of a target and its sources, as a dictionary from source to target."""
    rows = [row.split() for row in table.strip().splitlines()]
    return {source: target for target, *sources in rows for source in sources}


# Our name, then what transformers (CLIP and SigLIP, DINOv2), OpenCLIP, timm and DINOv2's own
# files, and torchvision call it.
NAMES = invert_table("""
patch_embed      patch_embedding patch_embeddings.projection conv1 patch_embed.proj conv_proj
cls_token        class_embedding class_token
registers        register_tokens reg_token
positions        position_embedding.weight position_embeddings
positions        positional_embedding pos_embed encoder.pos_embedding
norm_pre         pre_layrnorm ln_pre
norm1            layer_norm1 ln_1
attn.q           self_attn.q_proj attention.attention.query
attn.k           self_attn.k_proj attention.attention.key
attn.v           self_attn.v_proj attention.attention.value
attn.qkv         attn.in_proj self_attention.in_proj
attn.proj        self_attn.out_proj attention.output.dense attn.out_proj self_attention.out_proj
attn.proj.scale  layer_scale1.lambda1 ls1.gamma
norm2            layer_norm2 ln_2
mlp.fc1          mlp.weights_in mlp.w12 mlp.c_fc mlp.0 mlp.linear_1
mlp.fc2          mlp.weights_out mlp.w3 mlp.c_proj mlp.3 mlp.linear_2
mlp.fc2.scale    layer_scale2.lambda1 ls2.gamma
norm             post_layernorm layernorm ln_post encoder.ln
pool.probe       pool.latent
pool.qkv         pool.attention.in_proj
pool.proj        pool.attention.out_proj
pool.norm        pool.layernorm
proj             visual_projection
proj.transposed  proj
""")
PREFIX = re.compile(r"((vision_model|visual(\.trunk)?|dinov2(_with_registers)?)\.)?(embeddings\.)?")
LAYERS = r"encoder\.layers?\.|encoder\.layers\.encoder_layer_|transformer\.resblocks\.|blocks\."
BLOCK = re.compile(rf"(?:(?:{LAYERS})(\d+)\.)?(.*)", re.DOTALL)
# Not of the encoder: text towers, classifiers, what only training or similarity with text needs.
LEFT_OUT = re.compile(
    r"(text_model|text|transformer|token_embedding|ln_final|classifier|heads)\."
    r"|(dino_head|ibot_head)\."
    r"|(head\.(weight|bias)|text_projection(\.weight)?|positional_embedding|logit_(scale|bias))$"
    r"|(input_resolution|context_length|vocab_size)$|decoder_.+"
    r"|(.+\.)?(position_ids|mask_token)$"
)


def target_name(source: str) -> str:
    """Our name for a tensor: the prefix goes, the block and the last part (weight, bias) stay."""
    number, name = BLOCK.fullmatch(PREFIX.sub("", source, count=1)).groups()
    name = re.sub(r"^(head|attn_pool)\.", "pool.", name)  # transformers, timm
    name = name.replace("in_proj_", "in_proj.")  # as nn.MultiheadAttention names its parameters
    block = f"blocks.{number}." if number else ""
    if name in NAMES:
        return block + NAMES[name]
    stem, dot, leaf = name.rpartition(".")
    return block + NAMES.get(stem, stem) + dot + leaf


def rename_keys(tensors: Tensors) -> Tensors:
    """The encoder's tensors under our names. What is left out is left out by name."""
    named, origin = {}, {}
    for source, tensor in tensors.items():
        if LEFT_OUT.match(source):
            continue
        target = target_name(source)
        if target in named:
            raise ValueError(f"{source} and {origin[target]} are one tensor of the encoder")
        named[target] = tensor
        origin[target] = source
    return named


# ---- Recognising an architecture
CLIP = CLIP_STATS | {"norm_eps": 1e-5}
ANTIALIAS = {"pos_resize": "antialias"}
# A family, some of its tensors, by which it is known, and what no tensor shows. The first counts.
FAMILIES = (
    ("CLIP, transformers", "pre_layrnorm.weight", CLIP | {"act": "quick_gelu"}),
    ("SigLIP, transformers", "patch_embedding.weight", HALF_STATS | {"act": "gelu_tanh"}),
    ("DINOv2, transformers", "patch_embeddings.projection.weight register_tokens", ANTIALIAS),
    ("DINOv2, transformers", "patch_embeddings.projection.weight", {}),
    ("CLIP, OpenCLIP", "conv1.weight", CLIP | ANTIALIAS),
    ("DINOv2", "patch_embed.proj.weight blocks.0.ls1.gamma mask_token register_tokens", ANTIALIAS),
    ("DINOv2", "patch_embed.proj.weight blocks.0.ls1.gamma mask_token", {"pos_resize": "offset"}),
    ("CLIP, timm", "patch_embed.proj.weight norm_pre.weight", CLIP | ANTIALIAS),
    ("ViT, timm", "patch_embed.proj.weight blocks.0.ls1.gamma", ANTIALIAS),
    ("SigLIP, timm", "patch_embed.proj.weight attn_pool.latent", HALF_STATS | ANTIALIAS),
    ("ViT, timm", "patch_embed.proj.weight", ANTIALIAS),
    ("ViT, torchvision", "conv_proj.weight", {"pos_resize": "align_corners"}),
)
# What nothing shows, and the published models of a layout differ in; and how it may be said.
UNDECIDED = {
    ("CLIP, OpenCLIP", "act"): "quick_gelu for OpenAI's own weights, DFN and MetaCLIP, else gelu",
    ("CLIP, timm", "act"): "quick_gelu for OpenAI's own weights, DFN and MetaCLIP, else gelu",
    ("SigLIP, timm", "act"): "gelu for base and large, gelu_tanh for so400m and giant",
    (
        "ViT, timm",
        "mean",
    ): "imagenet for DeiT, DINO and MAE, half for AugReg and other ViTs of timm",
}
SAID = {act: {"act": act} for act in ACTIVATIONS}
SAID |= {"clip": CLIP_STATS, "imagenet": IMAGENET_STATS, "half": HALF_STATS}
DINOV3 = r"rope|storage_tokens|local_cls_norm|freqs_|^(model\.)?layer\.0\.attention\.q_proj"
# By width: So400m, H, g and bigG. The heads of all other public models have 64 channels.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
# What config.json (transformers, timm) and open_clip_config.json call the fields of ViTConfig.
CONFIG_FIELDS = invert_table("""
width       hidden_size num_features width
depth       num_hidden_layers layers
heads       num_attention_heads num_heads
mlp_width   intermediate_size
registers   num_register_tokens
patch_size  patch_size
image_size  image_size
norm_eps    layer_norm_eps
act         hidden_act
pool        global_pool
""")
CONFIG_VALUES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
CONFIG_VALUES |= {"token": "cls", "avg": "mean", "map": "attention", "": "none"}
TIMM_TANH = r"vit_((giantopt|base_patch32|so400m_patch16)\w*siglip|large_patch16_siglip(_gap)?_512)"


def stated_fields(config: dict) -> dict:
    """What a publisher's configuration states, as fields of ViTConfig."""
    model = config.get("model_cfg", {})
    vision = config.get("vision_config") or model.get("vision_cfg")
    vision = vision or config | config.get("model_args", {})
    timm_name = vision.get("timm_model_name") or config.get("architecture") or ""
    tag = config.get("tag") or config.get("pretrained_cfg", {}).get("tag")
    if model.get("quick_gelu") or "quickgelu" in timm_name or tag == "openai":
        vision["hidden_act"] = "quick_gelu"
    if re.match(TIMM_TANH, timm_name):
        vision["hidden_act"] = "gelu_tanh"
    if timm_name or model:  # what OpenCLIP's and timm's configurations leave out
        vision.setdefault("hidden_act", "gelu")
    if "head_width" in vision:
        vision["num_heads"] = vision["width"] // vision["head_width"]
    stated = {}
    for source, field in CONFIG_FIELDS.items():
        if source in vision:
            value = CONFIG_VALUES.get(vision[source], vision[source])
            # An int, a float or a str, as the field's default is.
            stated[field] = type(getattr(ViTConfig, field))(value)
    if stated.get("act", "gelu") not in ACTIVATIONS or stated.get("pool", "cls") not in POOLS:
        raise ValueError(f"no such activation or pooling: {stated}")
    stats = config.get("preprocess_cfg") or config.get("pretrained_cfg") or config
    for field in ("mean", "std"):
        value = stats.get(field) or stats.get(f"image_{field}")
        if value:
            red, green, blue = map(float, value)
            stated[field] = (red, green, blue)
    return stated


def read_config(folder: Path, tensors: Tensors) -> dict:
    """What the JSON files beside the weights state, as fields of ViTConfig; {} without files."""
    names = ["preprocessor_config.json", "config.json"]
    if any(name.startswith("visual.") for name in tensors):
        names.append("open_clip_config.json")
    config = {}
    try:
        for name in names:
            if (folder / name).exists():
                config |= json.loads((folder / name).read_text())
        return stated_fields(config)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"the config beside it cannot be used: {error}") from None


def last_axes(named: Tensors, name: str, ndim: int) -> torch.Size:
    if name not in named or named[name].ndim < ndim:
        raise ValueError(f"{name} is missing, or has fewer than {ndim} dimensions")
    return named[name].shape[-ndim:]


def shown_fields(named: Tensors) -> dict:
    """Fields of ViTConfig that the names and shapes of the tensors leave no choice of."""
    width, _, _, patch_size = last_axes(named, "patch_embed.weight", 4)
    _, mlp_width = last_axes(named, "blocks.0.mlp.fc2.weight", 2)
    shown = {"width": width, "patch_size": patch_size, "mlp_width": mlp_width}
    shown["depth"] = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
    shown["cls_token"] = "cls_token" in named
    shown["registers"] = last_axes(named, "registers", 2)[0] if "registers" in named else 0
    shown["qkv_bias"] = "blocks.0.attn.q.bias" in named or "blocks.0.attn.qkv.bias" in named
    shown["norm_pre"] = "norm_pre.weight" in named
    shown["fc_norm"] = "fc_norm.weight" in named
    if "proj.weight" in named:
        shown["out_width"] = last_axes(named, "proj.weight", 2)[0]
    elif "proj.transposed" in named:
        shown["out_width"] = last_axes(named, "proj.transposed", 2)[1]
    return shown


def infer_config(tensors: Tensors, named: Tensors, stated: dict) -> ViTConfig:
    """The architecture that the tensors show; `stated` fills the rest and has to agree."""
    bare = {PREFIX.sub("", name, count=1) for name in tensors}
    if re.search(DINOV3, "\n".join(bare), re.MULTILINE):
        raise ValueError("DINOv3, or another encoder with rotary positions: DINOv2 is read here")
    known = [row for row in FAMILIES if bare.issuperset(row[1].split())]
    if not known:
        raise ValueError(f"no layout that is known here: {', '.join(sorted(tensors)[:6])}")
    family, signs, conventions = known[0]
    shown = shown_fields(named)
    missing = [(field, said) for (name, field), said in UNDECIDED.items() if name == family]
    if family == "ViT, timm" and "ls1" in signs:
        missing = []  # all of them have ImageNet's statistics
    for field, said in missing:
        if field not in stated:
            ways = "append it to the path, as in PATH:quick_gelu or PATH:half, or write config.json"
            raise ValueError(f"no tensor of {family} shows {field}, {said}: {ways}")
    for field, value in shown.items():
        if stated.get(field, value) != value:
            raise ValueError(f"{field} = {stated[field]} in the config, but tensors show {value}")
    if family.startswith("CLIP") and "logit_scale" in tensors and "out_width" not in shown:
        raise ValueError("its projection, visual_projection.weight or visual.proj, is missing")
    cfg = ViTConfig(family, **shown)
    # Class token and registers are too few for the count of positions to reach the next square.
    grid = math.isqrt(last_axes(named, "positions", 2)[0])
    cfg.image_size = grid * cfg.patch_size
    cfg.heads = HEADS.get(cfg.width, 0 if cfg.width % 64 else cfg.width // 64)
    if "pool.probe" in named:
        cfg.pool = "attention"
    elif not cfg.cls_token:
        cfg.pool = "none" if family.startswith("SigLIP") else "mean"
    cfg = replace(cfg, **conventions | stated)
    if last_axes(named, "blocks.0.mlp.fc1.weight", 2)[0] == 2 * cfg.mlp_width:
        cfg.act = "swiglu"
    # The native size need not be a multiple of the patch, but the grid has to agree.
    if cfg.image_size // cfg.patch_size != grid:
        raise ValueError(f"image_size = {cfg.image_size} in the config, {grid} x {grid} positions")
    if cfg.heads < 1 or cfg.width % cfg.heads:
        advice = "state num_attention_heads, a divisor of it, in a config.json beside the file"
        raise ValueError(f"no number of heads for width {cfg.width}: {advice}")
    return cfg


# ---- Filling the model
def take(named: Tensors, name: str, *shape: int) -> Tensor:
    """Move a tensor of this shape out of `named`; leading axes of size 1 do not count."""
    fits = last_axes(named, name, len(shape)) == shape and named[name].numel() == math.prod(shape)
    tensor = named.pop(name)
    if not fits or not tensor.is_floating_point():
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} is {found} instead of float {list(shape)}")
    return tensor.view(shape)


def take_tokens(named: Tensors, cfg: ViTConfig, patches: int) -> Tensors:
    """pos_embed (N, D), and prefix_tokens with the positions that the file has for them."""
    prefix = torch.zeros(cfg.cls_token + cfg.registers, cfg.width)
    # Before the patches come positions of all of the prefix, of the class token, or none.
    own = named["positions"].shape[-2] - patches
    if own not in (len(prefix), int(cfg.cls_token)):
        own = 0
    positions = take(named, "positions", own + patches, cfg.width)
    if cfg.cls_token:
        prefix[0] = take(named, "cls_token", cfg.width)
    if cfg.registers:
        prefix[-cfg.registers :] = take(named, "registers", cfg.registers, cfg.width)
    prefix[:own] += positions[:own]
    return {"pos_embed": positions[own:], "prefix_tokens": prefix}


def load_into(model: ViT, named: Tensors, dtype: torch.dtype) -> None:
    """Fill the model in place from `named`; ValueError for what is missing, misshapen or left."""
    cfg = model.cfg
    D = cfg.width
    # First what the model keeps in another form than the file.
    state = take_tokens(named, cfg, len(model.pos_embed))
    state["mean"] = torch.tensor(cfg.mean).view(3, 1, 1)
    state["std"] = torch.tensor(cfg.std).view(3, 1, 1)
    patches = take(named, "patch_embed.weight", D, 3, cfg.patch_size, cfg.patch_size)
    state["patch_embed.weight"] = patches.flatten(1)
    if "proj.transposed" in named:
        state["proj.weight"] = take(named, "proj.transposed", D, cfg.out_width).T
    if "pool.qkv.weight" in named:
        for leaf, *shape in (("weight", 3 * D, D), ("bias", 3 * D)):
            qkv = take(named, f"pool.qkv.{leaf}", *shape)
            state[f"pool.q.{leaf}"], state[f"pool.kv.{leaf}"] = qkv.split((D, 2 * D))
    # DINOv2's LayerScale is folded into the layer before it: s (W x + b) = (s W) x + s b.
    if any(name.endswith(".scale") for name in named):
        for name, layer in model.named_modules():
            if name.startswith("blocks.") and name.endswith(("attn.proj", "mlp.fc2")):
                scale = take(named, f"{name}.scale", D).float()
                weight = take(named, f"{name}.weight", *layer.weight.shape)
                state[f"{name}.weight"] = scale[:, None] * weight
                state[f"{name}.bias"] = scale * take(named, f"{name}.bias", D)
    for name, parameter in model.named_parameters():
        if name in state:
            tensor = state[name]
        elif ".qkv." in name and name.replace("qkv", "q") in named:
            shape = (D, *parameter.shape[1:])
            tensor = torch.cat([take(named, name.replace("qkv", part), *shape) for part in "qkv"])
        else:
            tensor = take(named, name, *parameter.shape)
        state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if named:
        raise ValueError(f"no place for {len(named)} tensors: {', '.join(sorted(named)[:6])}")
    model.load_state_dict(state, assign=True)


@cache
def warn_once(text: str) -> None:
    if RANK == 0:
        print(text, file=sys.stderr)


@torch.no_grad()
def load_encoder(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> ViT:
    """A public encoder, frozen and in eval mode: generation is aligned with it, so it has to stay.

    name_or_path: a preset of HUB, a folder as on the hub, a file (.safetensors, .bin, .pth, .pt),
    with what it does not show behind it, as in PATH:quick_gelu:half (the keys of SAID).
    Raises ValueError for an unknown name, a damaged file, and no encoder.
    """
    path, said = str(name_or_path), {}
    while path.rpartition(":")[2] in SAID and not Path(path).exists():
        path, _, word = path.rpartition(":")
        said |= SAID[word]
    file = find_weights(path)
    try:
        tensors, words = read_tensors(file)
        named = rename_keys(tensors)
        stated = read_config(file.parent, tensors)
        # OpenAI's own file of CLIP has three scalars; others say it in a name.
        names = f"{file.parent.name} {file.name} {words}".lower()
        if "input_resolution" in tensors or re.search("quick_?gelu|openai", names):
            stated = {"act": "quick_gelu"} | stated
        stated |= said
        cfg = infer_config(tensors, named, stated)
        # No memory and no initialisation: every tensor comes from the file.
        with torch.device("meta"):
            model = ViT(cfg)
        load_into(model, named, dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    assumed = [f"{f} {getattr(cfg, f)}" for f in ("act", "mean", "norm_eps") if f not in stated]
    if assumed and cfg.act != "swiglu":
        warn_once(f"{file}: {cfg.family}, assumed as published: {', '.join(assumed)}")
    return model.eval().requires_grad_(False)


# ---- What the encoder sees
def pca_colors(tokens: Tensor) -> Tensor:
    """(N, D) -> (N, 3) in [0, 1]: three principal components as colors (arXiv 2304.07193)."""
    tokens = tokens - tokens.mean(dim=0)
    axes = torch.linalg.svd(tokens, full_matrices=False).Vh[:3]  # (3, D)
    # A component's sign is arbitrary: make its largest entry positive.
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    colors = tokens @ axes.T  # (N, 3)
    colors = colors - colors.amin(dim=0)
    return colors / colors.amax(dim=0).clamp_min(1e-12)


def draw_pca(encoder: ViT, path: str) -> None:
    """Write the picture beside the colors of its patch tokens, as PATH_pca.png."""
    p = encoder.cfg.patch_size
    image = read_whole_image(path, encoder.cfg.image_size, p)  # (1, 3, H, W)
    with torch.inference_mode():
        colors = pca_colors(encoder(image).patch_tokens[0].float())  # (N, 3)
    drawn = repeat(colors, "(h w) c -> (h p) (w q) c", h=image.shape[2] // p, p=p, q=p)
    both = torch.cat([rearrange(image[0], "c h w -> h w c"), drawn], dim=1)  # (H, 2 W, 3)
    out = Path(path).with_name(f"{Path(path).stem}_pca.png")
    Image.fromarray((both * 255).byte().numpy()).save(out)
    print(f"{out}: the image, and its patch tokens' first three principal components")


def main() -> None:
    """Show what an encoder is and, for each image, what it sees: IMAGE_pca.png."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("encoder", help=f"{', '.join(HUB)}, or a file or folder of weights")
    parser.add_argument("images", nargs="*", help="photographs; the picture of each goes beside it")
    args = parser.parse_args()
    with user_errors():
        encoder = load_encoder(args.encoder)
        facts = [f"{field} {value}" for field, value in asdict(encoder.cfg).items()]
        size = sum(parameter.numel() for parameter in encoder.parameters())
        print(" | ".join([*facts, f"{size / 1e6:.1f} M parameters"]))
        for path in args.images:
            draw_pca(encoder, path)


if __name__ == "__main__":
    main()
