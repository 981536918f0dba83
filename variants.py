"""The runs that experiments.py makes: options of train.py, and variants that no option reaches.

A variant changes the core from outside: a subclass of the model or of the loss, or another table of
stages. `python experiments.py train --variant NAME ...` trains one, with the options of train.py.

# B batch, T prefix length, K visual words, D width, V words
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import LayerNorm, Linear, UnifiedModel, resize_for_encoder
from paradigms import patchify
from train import STAGES, LossModule
from words import BOS, PAD


# ---------------------------------------------------------------- models
class FirstWords(UnifiedModel):
    """The first `count` visual words are kept, the others are <pad>."""

    count = 4

    def visual_words(self, patch_tokens):
        words = super().visual_words(patch_tokens).clone()  # (B, K, V)
        words[:, self.count :] = F.one_hot(torch.tensor(PAD), words.shape[2])
        return words


class SharpenedWords(UnifiedModel):
    """The logits of visual words are multiplied: 0, all words alike; 10, nearly one word each."""

    sharpness = 1.0

    def visual_words(self, patch_tokens):
        return (self.connector(patch_tokens).float() * self.sharpness).softmax(-1)


class ReversedWords(UnifiedModel):  # each is still a word, they are no sentence
    def visual_words(self, patch_tokens):
        return super().visual_words(patch_tokens).flip(1)


class TrainedConnector(UnifiedModel):  # RecA's gradient reaches it, and the word embeddings
    def recon_prefix(self, encoder, images, features=None):
        with torch.set_grad_enabled(self.training):
            return super().recon_prefix(encoder, images, features)


class PixelPrefix(UnifiedModel):
    """A control of the paper's figure 12: RecA's prefix holds the patches, through one matrix."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.raw_proj = self.make_projection(cfg)
        for p in self.raw_proj.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def make_projection(self, cfg) -> nn.Module:
        return Linear(3 * cfg.patch_size**2, cfg.width)

    def raw_tokens(self, encoder, images, features):  # what an image can be copied from: (B, n, P)
        return patchify(images, self.cfg.patch_size)

    def recon_prefix(self, encoder, images, features=None):
        """<bos>, n projected tokens, <pad>: (B, T, D). Raises ValueError where they do not fit."""
        tokens = self.raw_tokens(encoder, images, features)
        B, n, _ = tokens.shape
        T = self.cfg.text_len
        if n >= T:
            what = f"{type(self).__name__} has {n} tokens, and the prefix has room for {T - 1}"
            raise ValueError(f"{what}: choose larger patches")
        with torch.set_grad_enabled(self.training):
            tokens = self.raw_proj(tokens)
            ids = torch.tensor([BOS] + [PAD] * (T - 1), device=tokens.device)
            words = self.text_prefix(ids.expand(B, T)).to(tokens)
            return torch.cat([words[:, :1], tokens, words[:, 1 + n :]], 1)


class FeaturePrefix(PixelPrefix):
    """The same with the encoder's patch tokens, through an MLP."""

    def make_projection(self, cfg) -> nn.Module:
        up, down = Linear(cfg.encoder_width, 4 * cfg.width), Linear(4 * cfg.width, cfg.width)
        return nn.Sequential(LayerNorm(cfg.encoder_width), up, nn.GELU(), down)

    @torch.no_grad()
    def raw_tokens(self, encoder, images, features):
        if features is None:
            features = encoder(resize_for_encoder(images, self.cfg.encoder_size)).patch_tokens
        return features.to(images.dtype)


def subclass(base: type, name: str, value) -> type:
    """A model that differs in one class attribute."""
    return type(f"{base.__name__}_{value}", (base,), {name: value})


# ---------------------------------------------------------------- losses
class DenseCaptions(LossModule):
    """sft on full captions in place of sparse ones."""

    def caption(self, main: dict):
        return main["full_caption"]

    def forward(self, batch):
        main = batch["main"]
        if self.stage.name == "sft":
            main = main | {"caption": self.caption(main)}
        return super().forward(batch | {"main": main})


class OwnCaptions(DenseCaptions):
    """sft on the likeliest visual words: the model's own captions."""

    @torch.no_grad()
    def caption(self, main: dict):
        model, encoder = self.parts["model"], self.parts["encoder"]
        words = model.encode_visual_words(encoder, main["image"], main.get("features"))
        return F.pad(words.argmax(-1), (1, 0), value=BOS)  # (B, T)


# ---------------------------------------------------------------- the table of runs, by folder
class Run(NamedTuple):
    options: str = ""  # of train.py; {encoder} and {data_dir} are those of experiments.py
    stage: str = ""  # the only one
    parent: str = ""  # the run/checkpoint of the same seed that it starts from
    title: str = ""  # in tables
    model_class: type = UnifiedModel
    loss_class: type = LossModule
    stages: dict = STAGES

    @property
    def variant(self) -> tuple:
        return self.model_class, self.loss_class, self.stages


def reca_run(title, model_class=UnifiedModel, options="", base="main", **changes) -> Run:
    """RecA from the base of another run. changes: of its row in the table of stages."""
    stages = STAGES | {"reca": replace(STAGES["reca"], **changes)}
    return Run(options, "reca", f"{base}/pretrain", title, model_class, stages=stages)


PHOTOS = (
    "--dataset imagenet --data_dir {data_dir} --encoder {encoder} --encoder_size 96 "
    "--cache_features --width 192 --depth 6 --heads 6 --batch_size 16 --replay 0.5 "
    "--encoder_steps 200 --pretrain_steps 3000 --align_steps 300 --reca_steps 1000 "
    "--pretrain_lr 2e-3 --reca_lr 1e-3"
)
TOO = {"base": "photographs", "trains": ("transformer", "connector")}

# RecA with one thing changed
ABLATIONS = {
    "images_500": reca_run("500 images", max_images=500),
    "no_drop": reca_run("no condition dropped", subclass(UnifiedModel, "cond_drop", 0.0)),
    "drop_30": reca_run("30% of conditions dropped", subclass(UnifiedModel, "cond_drop", 0.3)),
    "slow": reca_run("a quarter of the learning rate", options="--reca_lr 5e-4"),
    "fast": reca_run("twice the learning rate", options="--reca_lr 4e-3"),
    "no_i2t": reca_run("no image to words (i2t 0)", options="--i2t 0"),
    "no_t2t": reca_run("no words to words (t2t 0)", losses=STAGES["reca"].losses | {"t2t": 0.0}),
    "no_replay": reca_run("no replay", options="--replay 0"),
    "first4": reca_run("first 4 visual words", subclass(FirstWords, "count", 4)),
    "first8": reca_run("first 8 visual words", subclass(FirstWords, "count", 8)),
    "blurred": reca_run("blurred visual words", subclass(SharpenedWords, "sharpness", 0.3)),
    "hard": reca_run("hard visual words", subclass(SharpenedWords, "sharpness", 10.0)),
    "reversed": reca_run("reversed visual words", ReversedWords),
    "ema": reca_run("averaged weights (EMA 0.99)", options="--ema 0.99"),
}
RUNS = ABLATIONS | {
    "main": Run(),
    "ar": Run("--paradigm ar"),
    "mask": Run("--paradigm mask"),
    "mar": Run("--paradigm mar"),
    "noise_3": Run("--noise_scale 3"),
    "random": Run("--encoder random --align_steps 950"),
    "clip": Run("--encoder {encoder} --encoder_size 48 --align_steps 950"),
    "photographs": Run(PHOTOS),
    "reca_sft": Run("", "sft", "main/reca", "RecA, SFT"),
    "sft_reca": Run("", "reca", "main/sft", "SFT, RecA"),
    "reca_reca": Run("", "reca", "main/reca", "RecA twice"),
    "own_captions": Run("", "sft", "main/pretrain", "SFT, own captions", loss_class=OwnCaptions),
    "dense_captions": Run("", "sft", "main/pretrain", "SFT, dense", loss_class=DenseCaptions),
    "features": reca_run("features", FeaturePrefix),
    "pixels": reca_run("pixels", PixelPrefix),
    "train_connector": reca_run("RecA, connector too", TrainedConnector, PHOTOS, **TOO),
}
