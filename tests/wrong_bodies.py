"""Plausible mistakes in every blank of assignments/: the tests of that blank have to catch each.

    PYTHONPATH=. python tests/wrong_bodies.py 2    # those of assignment 2, and what caught them

Ends with 1 if a mistake was not caught. A mistake is its name in the field's words, then what
changes in the real body, as in a diff: lines that go (-) and lines that come (+). Of every body
through which something learns, there is one more: all of it under torch.no_grad().
"""

import __future__

import ast
import importlib
import inspect
import io
import json
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from _pytest.runner import runtestprotocol

from assignments.make import Blank, blanks_of, body_of, find, with_body

ROOT = Path(__file__).resolve().parents[1]

WRONG = {
    "encoder.Attention.forward": """
queries and keys swapped
- q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
+ k, q, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)

heads are the inner axis
- q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
+ q, k, v = rearrange(qkv, "b t (three d h) -> three b h t d", three=3, h=self.heads)

no output projection
- return self.proj(rearrange(x, "b h t d -> b t (h d)"))  # (B, T, D)
+ return rearrange(x, "b h t d -> b t (h d)")

a causal mask
- x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
+ x = F.scaled_dot_product_attention(q, k, v, is_causal=True)

scaled by the width, not by that of a head
- x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
+ x = F.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)

keys without a gradient
- x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
+ x = F.scaled_dot_product_attention(q, k.detach(), v)

computed in bfloat16
- x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
+ x = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q)
""",
    "encoder.ViT.forward": """
pixels not normalised
- x = (images[..., : rows * p, : cols * p] - self.mean) / self.std  # (B, C, H, W)
+ x = images[..., : rows * p, : cols * p]

patches column by column
- x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)  # (B, N, C p p)
+ x = rearrange(x, "b c (h p) (w q) -> b (w h) (c p q)", p=p, q=p)

channels last within a patch
- x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)  # (B, N, C p p)
+ x = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

position embeddings added twice
- x = self.patch_embed(x.to(self.pos_embed.dtype)) + self.position_embeddings(rows, cols)
+ x = self.patch_embed(x.to(self.pos_embed.dtype)) + 2 * self.position_embeddings(rows, cols)

the class token counted among the patches
- patch_tokens = x[:, len(self.prefix_tokens) :]  # (B, N, D)
+ patch_tokens = x[:, : rows * cols]

no check of the images
- rows, cols = self.patch_grid(images)
+ rows, cols = images.shape[2] // p, images.shape[3] // p

no class token in the result
- return Features(patch_tokens, cls_token, self.proj(self.fc_norm(pooled)))  # pooled: (B, P)
+ return Features(patch_tokens, None, self.proj(self.fc_norm(pooled)))

attention pooling of the patches alone
-     pooled = self.pool(x)  # (B, D)
+     pooled = self.pool(patch_tokens)

the mean of all tokens
-     pooled = cls_token if self.cfg.pool == "cls" else patch_tokens.mean(dim=1)
+     pooled = cls_token if self.cfg.pool == "cls" else x.mean(dim=1)

no norm before the projection
- return Features(patch_tokens, cls_token, self.proj(self.fc_norm(pooled)))  # pooled: (B, P)
+ return Features(patch_tokens, cls_token, self.proj(pooled))

the pooled embedding is not projected
- return Features(patch_tokens, cls_token, self.proj(self.fc_norm(pooled)))  # pooled: (B, P)
+ return Features(patch_tokens, cls_token, self.fc_norm(pooled))

a first register taken for a class token
- cls_token = x[:, 0] if self.cfg.cls_token else None  # (B, D)
+ cls_token = x[:, 0] if len(self.prefix_tokens) else None

the first norm left out
- x = self.norm_pre(torch.cat([prefix, x], dim=1))  # (B, T, D)
+ x = torch.cat([prefix, x], dim=1)

the first norm of the patches alone
- x = self.norm_pre(torch.cat([prefix, x], dim=1))  # (B, T, D)
+ x = torch.cat([prefix, self.norm_pre(x)], dim=1)

patch tokens without a gradient
- patch_tokens = x[:, len(self.prefix_tokens) :]  # (B, N, D)
+ patch_tokens = x[:, len(self.prefix_tokens) :].detach()
""",
    "encoder.ViT.position_embeddings": """
rows and columns swapped
-     resized = F.interpolate(native, (rows, cols), mode="bicubic", **switches)
+     resized = F.interpolate(native, (cols, rows), mode="bicubic", **switches)

bilinear
-     resized = F.interpolate(native, (rows, cols), mode="bicubic", **switches)
+     resized = F.interpolate(native, (rows, cols), mode="bilinear", **switches)

the publisher's offset left out
-     scale = [(side + DINOV2_OFFSET) / self.grid for side in (rows, cols)]
+     scale = [side / self.grid for side in (rows, cols)]

no gradient through the resizing
- native = rearrange(self.pos_embed.float(), "(h w) d -> 1 d h w", h=self.grid)
+ native = rearrange(self.pos_embed.detach().float(), "(h w) d -> 1 d h w", h=self.grid)

transposed grid
- native = rearrange(self.pos_embed.float(), "(h w) d -> 1 d h w", h=self.grid)
+ native = rearrange(self.pos_embed.float(), "(w h) d -> 1 d h w", h=self.grid)

as many positions taken for the same grid
- if rows == cols == self.grid:
+ if rows * cols == self.grid**2:

one equal side taken for the same grid
- if rows == cols == self.grid:
+ if rows == self.grid:

antialiasing always
-     resized = F.interpolate(native, (rows, cols), mode="bicubic", **switches)
+     resized = F.interpolate(native, (rows, cols), mode="bicubic", antialias=True)

left in float32
- return rearrange(resized, "1 d h w -> (h w) d").to(self.pos_embed.dtype)
+ return rearrange(resized, "1 d h w -> (h w) d")

column by column
- return rearrange(resized, "1 d h w -> (h w) d").to(self.pos_embed.dtype)
+ return rearrange(resized, "1 d h w -> (w h) d").to(self.pos_embed.dtype)
""",
    "pretrained.rename_keys": """
unknown names are skipped
-     target = target_name(source)
+     target = target_name(source)
+     if target in source and target not in NAMES.values():
+         continue

the last of two names wins
-     if target in named:
+     if False:

the text tower is not left out
-     if LEFT_OUT.match(source):
+     if False:

every block is block 0
-     target = target_name(source)
+     target = re.sub(r"blocks\\.\\d+", "blocks.0", target_name(source))

LEFT_OUT anywhere in the name
-     if LEFT_OUT.match(source):
+     if LEFT_OUT.search(source):

LEFT_OUT of the new name
-     if LEFT_OUT.match(source):
+     if LEFT_OUT.match(target_name(source)):

the first of two names wins
-     if target in named:
+     if target in named:
+         continue
+     if False:

a clash of equal tensors is overlooked
-     if target in named:
+     if target in named and named[target] is not tensor:

tensors are cast
-     named[target] = tensor
+     named[target] = tensor.half()

only one name in the error
-         raise ValueError(f"{source} and {origin[target]} are one tensor of the encoder")
+         raise ValueError(f"{target} is one tensor of the encoder, of {source}")
""",
    "model.Attention.forward": """
keys and values swapped
- k, v = rearrange(kv, "b s (two h d) -> two b h s d", two=2, h=self.heads)
+ v, k = rearrange(kv, "b s (two h d) -> two b h s d", two=2, h=self.heads)

heads are the inner axis
- q = rearrange(self.q_proj(x), "b s (h d) -> b h s d", h=self.heads)
+ q = rearrange(self.q_proj(x), "b s (d h) -> b h s d", h=self.heads)

the mask is left out
- out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D / H)
+ out = F.scaled_dot_product_attention(q, k, v)

no scale
- out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D / H)
+ out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

the context is ignored
- kv = self.kv_proj(x if context is None else context)  # (B, any, 2 D)
+ kv = self.kv_proj(x if context is None or context.shape[-1] != x.shape[-1] else x)

the cache is not read
-     k, v = cache.extend(layer, k, v)
+     cache.extend(layer, k, v)

the cache of the first layer for all
-     k, v = cache.extend(layer, k, v)
+     k, v = cache.extend(0, k, v)

attention moves the cache on
-     k, v = cache.extend(layer, k, v)
+     k, v = cache.extend(layer, k, v)
+     cache.length += x.shape[1]

a mask is not used with a context
- out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D / H)
+ mask = mask if context is None else None
+ out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

values without a gradient
- out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D / H)
+ out = F.scaled_dot_product_attention(q, k, v.detach(), attn_mask=mask)

any mask is causal
- out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D / H)
+ out = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None)
""",
    "model.prefix_mask": """
off by one: no position attends to itself
- before = position[:, None] >= position
+ before = position[:, None] > position

the prefix attends to the image
- return same_or_prefix & (before if causal else before | in_image[:, None])
+ mask = same_or_prefix & (before if causal else before | in_image[:, None])
+ return mask | ~in_image[:, None]

rows and columns swapped
- return same_or_prefix & (before if causal else before | in_image[:, None])
+ return same_or_prefix.T & (before if causal else before | in_image[:, None])

the prefix is bidirectional
- return same_or_prefix & (before if causal else before | in_image[:, None])
+ return same_or_prefix & (before if causal else torch.ones_like(before))

repeats attend to each other
- same_or_prefix = (repeat == -1) | (repeat[:, None] == repeat)
+ same_or_prefix = torch.ones_like(repeat, dtype=torch.bool)

always full attention in the image
- return same_or_prefix & (before if causal else before | in_image[:, None])
+ return same_or_prefix & (before | in_image[:, None])

on the CPU whatever the device
- position = torch.arange(T + repeats * N, device=device)
+ position = torch.arange(T + repeats * N)

numbers instead of bool
- return same_or_prefix & (before if causal else before | in_image[:, None])
+ return (same_or_prefix & (before if causal else before | in_image[:, None])).float()
""",
    "model.UnifiedModel.predict_image": """
image positions added twice
- image = self.paradigm.embed(self, *inputs) + self.image_position_embedding()  # (B R, N, D)
+ image = self.paradigm.embed(self, *inputs) + 2 * self.image_position_embedding()

image positions left out
- image = self.paradigm.embed(self, *inputs) + self.image_position_embedding()  # (B R, N, D)
+ image = self.paradigm.embed(self, *inputs)

the prefix has no positions
- x = torch.cat([prefix + self.text_pos[:T], image], 1)  # (B, T + R N, D)
+ x = torch.cat([prefix, image], 1)

states off by one
- h = self.transformer(x, mask, first=T)
+ h = self.transformer(x, mask)[:, T - 1 : -1]

repeats mixed with the batch
- image = rearrange(image, "(b r) n d -> b (r n) d", r=repeats)
+ image = rearrange(image, "(b r) n d -> b (r n) d", r=repeats).flip(0)

the causal switch ignored
- mask = prefix_mask(T, N, repeats, self.paradigm.causal, x.device)
+ mask = prefix_mask(T, N, repeats, False, x.device)

the prefix without a gradient
- x = torch.cat([prefix + self.text_pos[:T], image], 1)  # (B, T + R N, D)
+ x = torch.cat([prefix.detach() + self.text_pos[:T], image], 1)

repeats the inner axis
- image = rearrange(image, "(b r) n d -> b (r n) d", r=repeats)
+ image = rearrange(image, "(r b) n d -> b (r n) d", r=repeats)

the positions of the longest prefix
- x = torch.cat([prefix + self.text_pos[:T], image], 1)  # (B, T + R N, D)
+ x = torch.cat([prefix + self.text_pos[self.cfg.text_len - T : self.cfg.text_len], image], 1)
""",
    "model.UnifiedModel.text_logits": """
off by one: from the word after the prefix
- h = self.transformer(x, mask, first=prefix.shape[1] - 1)  # (B, S + 1, D)
+ h = self.transformer(x, mask, first=prefix.shape[1])

a word attends to later words
- mask = causal_mask(x.shape[1], x.device)
+ mask = torch.ones_like(causal_mask(x.shape[1], x.device))

positions begin anew after the prefix
- x = x + self.text_pos[: x.shape[1]]
+ T = prefix.shape[1]
+ x = x + torch.cat([self.text_pos[:T], self.text_pos[: x.shape[1] - T]])

no positions
- x = x + self.text_pos[: x.shape[1]]

codes can be written as words
- return self.word_logits(h)
+ return self.lm_head(h)

the prefix has its longest length
- return self.word_logits(h)
+ return self.word_logits(h[:, self.cfg.text_len - 1 :])

the prefix without a gradient
- x = x + self.text_pos[: x.shape[1]]
+ x = torch.cat([prefix.detach(), x[:, prefix.shape[1] :]], 1) + self.text_pos[: x.shape[1]]
""",
    "model.UnifiedModel.predict_image_cached": """
text positions instead of the image's
- positions = self.image_position_embedding()[start : start + x.shape[1]]
+ positions = self.text_pos[start : start + x.shape[1]]

the cache grows in every pass
- if self.paradigm.causal:  # the others read the whole image anew in the next step
+ if True:

the cache never grows
- if self.paradigm.causal:  # the others read the whole image anew in the next step
+ if False:

every code at the first position
- start = cache.length - cache.prefix_length
+ start = 0

the prefix has its longest length
- start = cache.length - cache.prefix_length
+ start = max(0, cache.length - self.cfg.text_len)

moved on for all positions of an image
- if self.paradigm.causal:  # the others read the whole image anew in the next step
+ if self.paradigm.causal or x.shape[1] == self.cfg.image_len:
""",
    "paradigms.interpolate": """
swapped: t = 0 is the image
- return t * image + (1 - t) * noise
+ return (1 - t) * image + t * noise

noise not scaled down
- return t * image + (1 - t) * noise
+ return t * image + noise

variance-preserving instead of straight
- return t * image + (1 - t) * noise
+ return t * image + (1 - t**2) ** 0.5 * noise

the noise without a gradient
- return t * image + (1 - t) * noise
+ return t * image + (1 - t) * noise.detach()

rounded times
- return t * image + (1 - t) * noise
+ return (t > 0.5) * image + (t <= 0.5) * noise
""",
    "paradigms.velocity_squared_error": """
divided by t
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return ((x_pred - x) / t.clamp(min=MIN_ONE_MINUS_T)) ** 2

not weighted by the time
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return (x_pred - x) ** 2

weighted once instead of squared
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return (x_pred - x) ** 2 / (1 - t).clamp(min=MIN_ONE_MINUS_T)

the denominator reaches zero
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return ((x_pred - x) / (1 - t)) ** 2

absolute instead of squared
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)).abs()

the mean over values
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return (((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2).mean(-1, keepdim=True)

t is bounded instead of 1 - t
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return ((x_pred - x) / (1 - t.clamp(min=MIN_ONE_MINUS_T)).clamp(min=1e-3)) ** 2

the prediction without a gradient
- return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
+ return ((x_pred.detach() - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
""",
    "paradigms.Flow.loss": """
the model sees the clean image
- x_pred = model.predict_image(prefix, x_t, t[:, 0, 0])  # (B, N, P)
+ x_pred = model.predict_image(prefix, x, t[:, 0, 0])

the model is told 1 - t
- x_pred = model.predict_image(prefix, x_t, t[:, 0, 0])  # (B, N, P)
+ x_pred = model.predict_image(prefix, x_t, 1 - t[:, 0, 0])

the scale of the noise forgotten
- x_t, t = add_noise(x, sample_times(len(x), 1, x.device), model.cfg.noise_scale)
+ x_t, t = add_noise(x, sample_times(len(x), 1, x.device), 1.0)

compared with the noised image
- return velocity_squared_error(x_pred, x, t).mean()
+ return velocity_squared_error(x_pred, x_t, t).mean()

a time for each patch
- x_t, t = add_noise(x, sample_times(len(x), 1, x.device), model.cfg.noise_scale)
+ x_t, t = add_noise(x, sample_times(len(x), x.shape[1], x.device), model.cfg.noise_scale)

sum instead of mean
- return velocity_squared_error(x_pred, x, t).mean()
+ return velocity_squared_error(x_pred, x, t).sum()

one time for the batch
- x_t, t = add_noise(x, sample_times(len(x), 1, x.device), model.cfg.noise_scale)
+ times = sample_times(1, 1, x.device).expand(len(x), -1, -1)
+ x_t, t = add_noise(x, times, model.cfg.noise_scale)

uniform times
- x_t, t = add_noise(x, sample_times(len(x), 1, x.device), model.cfg.noise_scale)
+ x_t, t = add_noise(x, torch.rand(len(x), 1, 1), model.cfg.noise_scale)

patches left in [0, 1]
- x = patchify(images, model.cfg.patch_size)  # (B, N, P)
+ x = patchify(images, model.cfg.patch_size) / 2 + 0.5

the mean weighted after averaging over images
- return velocity_squared_error(x_pred, x, t).mean()
+ return velocity_squared_error(x_pred, x, t.mean()).mean()

the prefix without a gradient
- x_pred = model.predict_image(prefix, x_t, t[:, 0, 0])  # (B, N, P)
+ x_pred = model.predict_image(prefix.detach(), x_t, t[:, 0, 0])
""",
    "recon_loss.drop_prefix": """
kept with probability p
- keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
+ keep = torch.rand(len(prefix), 1, 1, device=prefix.device) < p

dropped word by word
- keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
+ keep = torch.rand(len(prefix), prefix.shape[1], 1, device=prefix.device) >= p

the dropped condition is zeros
- return torch.where(keep, prefix, null_prefix(model).to(prefix.dtype))
+ return torch.where(keep, prefix, torch.zeros_like(prefix))

one coin for the whole batch
- keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
+ keep = torch.rand(1, 1, 1, device=prefix.device) >= p

the first rows instead of chance
- keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
+ keep = (torch.arange(len(prefix)) >= round(p * len(prefix))).view(-1, 1, 1)

always the same number, at random places
- keep = torch.rand(len(prefix), 1, 1, device=prefix.device) >= p
+ keep = (torch.randperm(len(prefix)) >= round(p * len(prefix))).view(-1, 1, 1)

the empty condition without a gradient
- return torch.where(keep, prefix, null_prefix(model).to(prefix.dtype))
+ return torch.where(keep, prefix, null_prefix(model).detach().to(prefix.dtype))

the prefix without a gradient
- return torch.where(keep, prefix, null_prefix(model).to(prefix.dtype))
+ return torch.where(keep, prefix.detach(), null_prefix(model).to(prefix.dtype))

the dtype of the words
- return torch.where(keep, prefix, null_prefix(model).to(prefix.dtype))
+ return torch.where(keep, prefix, null_prefix(model))
""",
    "paradigms.cfg_predict": """
the sign of guidance
- return uncond + cfg_scale * (cond - uncond)
+ return uncond - cfg_scale * (cond - uncond)

halves swapped
- cond, uncond = predict(*(torch.cat([x, x]) for x in inputs)).chunk(2)
+ uncond, cond = predict(*(torch.cat([x, x]) for x in inputs)).chunk(2)

the other convention: 1 is already guidance
- return uncond + cfg_scale * (cond - uncond)
+ return cond + cfg_scale * (cond - uncond)

guidance of 0 is the condition
- if cfg_scale == 1:
+ if cfg_scale in (0, 1):

two passes even without guidance
-     return predict(*inputs)
+     return predict(*[torch.cat([x, x]) for x in inputs])[: len(inputs[0])]

one input alone is doubled
- cond, uncond = predict(*(torch.cat([x, x]) for x in inputs)).chunk(2)
+ cond, uncond = predict(torch.cat([inputs[0], inputs[0]]), *inputs[1:]).chunk(2)

the first input alone is handed on
- cond, uncond = predict(*(torch.cat([x, x]) for x in inputs)).chunk(2)
+ cond, uncond = predict(torch.cat([inputs[0], inputs[0]])).chunk(2)

each input beside its copy
- cond, uncond = predict(*(torch.cat([x, x]) for x in inputs)).chunk(2)
+ cond, uncond = predict(*(x.repeat_interleave(2, 0) for x in inputs)).chunk(2)

no guidance below 1
- return uncond + cfg_scale * (cond - uncond)
+ return uncond + max(cfg_scale, 1) * (cond - uncond) if cfg_scale else uncond
""",
    "paradigms.euler_sample": """
from image to noise
- times = (torch.arange(steps + 1, device=x_t.device) / steps) ** TIME_POWER
+ times = (torch.arange(steps + 1, device=x_t.device) / steps).flip(0) ** TIME_POWER

the noise with t and 1 - t swapped
-     noise = (x_t - t * x_pred) / (1 - t)
+     noise = (x_t - (1 - t) * x_pred) / t.clamp(min=0.01)

equal steps
- times = (torch.arange(steps + 1, device=x_t.device) / steps) ** TIME_POWER
+ times = torch.arange(steps + 1, device=x_t.device) / steps

resampled noise grows: weights that sum to one, not squares
-         noise = (1 - eta**2) ** 0.5 * noise + eta * draw_noise()
+         noise = (1 - eta) * noise + eta * draw_noise()

it begins with zeros
- x_t = draw_noise()
+ x_t = torch.zeros_like(draw_noise())

the last step left out
- for t, t_next in zip(times[:-1], times[1:], strict=True):
+ for t, t_next in zip(times[:-2], times[1:-1], strict=True):

stays at t
-     x_t = interpolate(x_pred, noise, t_next)
+     x_t = interpolate(x_pred, noise, t)

shares instead of variances at the ends alone
-         noise = (1 - eta**2) ** 0.5 * noise + eta * draw_noise()
+         noise = (1 - eta) ** 0.5 * noise + eta**0.5 * draw_noise()

all or nothing
-         noise = (1 - eta**2) ** 0.5 * noise + eta * draw_noise()
+         noise = draw_noise() if eta > 0.5 else noise

told the time of the next step
-     x_pred = predict(x_t, t)
+     x_pred = predict(x_t, t_next)

told a number, not a tensor
-     x_pred = predict(x_t, t)
+     x_pred = predict(x_t, t.item())

clamped
-     x_t = interpolate(x_pred, noise, t_next)
+     x_t = interpolate(x_pred.clamp(-1, 1), noise, t_next)
""",
    "model.Connector.forward": """
patch tokens not normalised
- context = self.norm_in(patch_tokens)
+ context = patch_tokens

probabilities instead of logits
- return self.word_head(self.norm(x))  # (B, K, V)
+ return self.word_head(self.norm(x)).softmax(-1)

the queries never attend to the image
-     x = block(x, context=context)
+     x = block(x)

only the last block counts
-     x = block(x, context=context)
+     last = block(x, context=context)
+ x = last

no last norm
- return self.word_head(self.norm(x))  # (B, K, V)
+ return self.word_head(x)

the patch tokens without a gradient
- context = self.norm_in(patch_tokens)
+ context = self.norm_in(patch_tokens.detach())

normalised anew in each block
-     x = block(x, context=context)
+     x = block(x, context=self.norm_in(context))

one block left out
- for block in self.blocks:
+ for block in self.blocks[:-1]:

the first image for all
- context = self.norm_in(patch_tokens)
+ context = self.norm_in(patch_tokens[:1]).expand(len(patch_tokens), -1, -1)
""",
    "model.UnifiedModel.visual_prefix": """
no <bos>
- bos = self.wte.weight[BOS].expand(len(words), 1, -1)  # (B, 1, D)
+ bos = torch.zeros_like(self.wte.weight[BOS]).expand(len(words), 1, -1)

<bos> last
- return torch.cat([bos, expected.to(bos.dtype)], 1)
+ return torch.cat([expected.to(bos.dtype), bos], 1)

hard words: argmax
- expected = words @ self.wte.weight[: self.cfg.vocab_size]  # (B, K, D)
+ expected = self.wte(words.argmax(-1))

softmax twice
- expected = words @ self.wte.weight[: self.cfg.vocab_size]  # (B, K, D)
+ expected = words.softmax(-1) @ self.wte.weight[: self.cfg.vocab_size]

<pad> instead of <bos>
- bos = self.wte.weight[BOS].expand(len(words), 1, -1)  # (B, 1, D)
+ bos = self.wte.weight[0].expand(len(words), 1, -1)

codes are counted among the words
- expected = words @ self.wte.weight[: self.cfg.vocab_size]  # (B, K, D)
+ expected = words @ self.wte.weight[-self.cfg.vocab_size :]

positions added
- return torch.cat([bos, expected.to(bos.dtype)], 1)
+ return torch.cat([bos, expected.to(bos.dtype)], 1) + self.text_pos[: words.shape[1] + 1]

the words keep their meaning: no gradient to the embeddings
- expected = words @ self.wte.weight[: self.cfg.vocab_size]  # (B, K, D)
+ expected = words @ self.wte.weight[: self.cfg.vocab_size].detach()
""",
    "model.UnifiedModel.encode_visual_words": """
the encoder learns
-     with torch.no_grad():
+     with torch.enable_grad():

nothing learns
- return self.visual_words(features.to(images.dtype))
+ return self.visual_words(features.to(images.dtype)).detach()

images not at the encoder's size
-         images = resize_for_encoder(images, self.cfg.encoder_size)

logits instead of probabilities
- return self.visual_words(features.to(images.dtype))
+ return self.connector(features.to(images.dtype))

known features are ignored
- if features is None:
+ if encoder is not None:

known features are resized
-         images = resize_for_encoder(images, self.cfg.encoder_size)
+         images = resize_for_encoder(images, self.cfg.encoder_size or 6)

features in their own dtype
- return self.visual_words(features.to(images.dtype))
+ return self.visual_words(features)

words not made by visual_words
- return self.visual_words(features.to(images.dtype))
+ return self.connector(features.to(images.dtype)).softmax(-1)
""",
    "recon_loss.recon_loss": """
the condition learns
- with torch.no_grad():
+ with torch.enable_grad():

the condition is not used
- return image_loss(model, prefix, images)
+ return image_loss(model, torch.zeros_like(prefix), images)

nothing learns
- return image_loss(model, prefix, images)
+ with torch.no_grad():
+     return image_loss(model, prefix, images)

no condition is dropped
- return image_loss(model, prefix, images)
+ return model.paradigm.loss(model, prefix, images)

known features are ignored
-     prefix = model.recon_prefix(encoder, images, features)  # (B, T, D): <bos> visual words
+     prefix = model.recon_prefix(encoder, images)

no repeats of an image
- return image_loss(model, prefix, images)
+ return model.paradigm.loss(model, drop_prefix(model, prefix, model.cond_drop), images)

the model's own prefix is passed by
-     prefix = model.recon_prefix(encoder, images, features)  # (B, T, D): <bos> visual words
+     prefix = model.visual_prefix(model.encode_visual_words(encoder, images, features))
""",
    "recon_loss.text_loss": """
no shift: each word predicts itself
- words = target[:, 1:]  # (B, T - 1), without <bos>
+ words = target[:, :-1]

<pad> is predicted
- return word_cross_entropy(logits, words)
+ return F.cross_entropy(logits.transpose(1, 2), words, reduction="none").mean(1)

<eos> is not predicted
- return word_cross_entropy(logits, words)
+ return word_cross_entropy(logits, words.masked_fill(words == 2, PAD))

<bos> read again after the prefix
- logits = model.text_logits(prefix, words[:, :-1])  # (B, T - 1, V)
+ logits = model.text_logits(prefix, target[:, :-2])

sum instead of mean
- return word_cross_entropy(logits, words)
+ return word_cross_entropy(logits, words) * (words != PAD).sum(1)

one mean over the batch
- return word_cross_entropy(logits, words)
+ return word_cross_entropy(logits, words).mean()

one mean over all words, for each text
- return word_cross_entropy(logits, words)
+ count = (words != PAD).sum(1)
+ loss = word_cross_entropy(logits, words)
+ return ((loss * count).sum() / count.sum()).expand(len(words))

divided by the longest text
- return word_cross_entropy(logits, words)
+ count = (words != PAD).sum(1)
+ return word_cross_entropy(logits, words) * count / count.max()

logits are clamped
- return word_cross_entropy(logits, words)
+ return word_cross_entropy(logits.clamp(-5, 5), words)

the prefix without a gradient
- logits = model.text_logits(prefix, words[:, :-1])  # (B, T - 1, V)
+ logits = model.text_logits(prefix.detach(), words[:, :-1])

the model without a gradient
- return word_cross_entropy(logits, words)
+ return word_cross_entropy(logits.detach() + 0 * logits.sum(), words)
""",
}


# Nothing learns through these, or sampling alone calls them.
NO_GRADIENT = {"pretrained.rename_keys", "model.prefix_mask", "paradigms.euler_sample"}
NO_GRADIENT |= {"model.UnifiedModel.predict_image_cached"}


class Mistake(NamedTuple):
    what: str
    removed: str  # whole lines of the real body, without its indentation
    added: str


def mistakes(name: str) -> list[Mistake]:
    """The paragraphs of WRONG[name]."""
    found = []
    for paragraph in WRONG[name].strip().split("\n\n"):
        what, *lines = paragraph.splitlines()
        removed = [line[2:] for line in lines if line.startswith("- ")]
        added = [line[2:] for line in lines if line.startswith("+ ")]
        assert len(removed) + len(added) == len(lines), f"{name}: {what}: lines begin with - or +"
        found.append(Mistake(what, "\n".join(removed), "\n".join(added)))
    return found


def wrong_sources(b: Blank) -> Iterator[tuple[str, str]]:
    """What is wrong, and the file with that in it, for each mistake in a blank."""
    source = (ROOT / b.file).read_text()
    indent = " " * (find(source, b.function).col_offset + 4)
    body = textwrap.dedent(body_of(source, b.function))
    for what, removed, added in mistakes(b.name):
        found = f"\n{body}".count(f"\n{removed}\n")
        assert found == 1, f"{b.name}: {what}: the real body has {found} times:\n{removed}"
        wrong = f"\n{body}".replace(f"\n{removed}\n", f"\n{added}\n")
        yield what, with_body(source, b.function, textwrap.indent(wrong, indent))
    if b.name not in NO_GRADIENT:
        wrong = f"with torch.no_grad():\n{textwrap.indent(body, '    ')}"
        yield "all under no_grad", with_body(source, b.function, textwrap.indent(wrong, indent))


def code_of(source: str, b: Blank):
    """The code object of one function of a source file."""
    node = find(source, b.function)
    node.decorator_list = []
    flags = __future__.annotations.compiler_flag
    module = compile(ast.Module([node], []), b.file, "exec", flags=flags)
    codes = [constant for constant in module.co_consts if inspect.iscode(constant)]
    return next(code for code in codes if code.co_name == node.name)


def function_of(b: Blank):
    function = importlib.import_module(b.file.removesuffix(".py"))
    for part in b.function.split("."):
        function = getattr(function, part)
    return inspect.unwrap(function)


class Matrix:
    """A pytest plugin: runs the tests of each blank with the real body and with every wrong one.

    The tests are collected once. A function's code is changed in place, so that all who imported
    it see it.
    """

    def __init__(self, assignment: int):
        self.blanks = blanks_of(assignment)
        self.results = []

    def pytest_runtestloop(self, session):
        for b in self.blanks:
            items = [item for item in session.items if test_of(item) in b.tests]
            missing = set(b.tests) - {test_of(item) for item in items}
            assert not missing, f"{b.name} names tests that do not exist: {missing}"
            right = (ROOT / b.file).read_text()
            for what, source in [(None, right), *wrong_sources(b)]:
                self.results.append(self.run(b, what, source, items))
        return True

    def run(self, b: Blank, what: str | None, source: str, items: list) -> dict:
        """The first test that fails with a body, or None."""
        function = function_of(b)
        right = function.__code__
        began = time.time()
        function.__code__ = code_of(source, b)
        try:
            caught_by = next((item.name for item in items if not passes(item)), None)
        finally:
            function.__code__ = right
        seconds = round(time.time() - began, 2)
        return {"blank": b.name, "what": what, "caught by": caught_by, "seconds": seconds}


def test_of(item) -> str:
    return f"{item.path.name}::{item.originalname}"


def passes(item) -> bool:
    item._initrequest()  # as new: an item may run more than once
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def check(assignment: int) -> list[dict]:
    matrix = Matrix(assignment)
    tests = sorted({f"{ROOT}/tests/{test}" for b in matrix.blanks for test in b.tests})
    with redirect_stdout(io.StringIO()) as out:
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(ROOT)]
        code = pytest.main([*options, *tests], plugins=[matrix])
    assert code == 0 and matrix.results, out.getvalue()
    return matrix.results


def main() -> None:
    results = check(int(sys.argv[1]))
    for result in results:
        print(json.dumps(result))
    is_right = [result["what"] is None for result in results]
    passed = [result["caught by"] is None for result in results]
    sys.exit(is_right != passed)


if __name__ == "__main__":
    main()
