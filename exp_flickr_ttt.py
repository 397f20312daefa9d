"""Tri-modal memory network on Flickr8k with spoken captions: is there a shared space, and does adapting at test time
(TTT) keep it under corruption?

Text, image and speech encoders, each with a memory of slots, meet in one 256-d latent behind a central memory, trained
by InfoNCE on the three pairs. At test time queries are corrupted; memories, normalisation layers or statistics adapt
without labels, the gallery never does. Memories write by a rule that descends an objective, and training runs through
that write. Encoders are trained from scratch, or `cached`: features of frozen ones, from encode.py.

    python exp_flickr_ttt.py configs/flickr8k_features.yaml data.dir=flickr8k    # cached encoders: minutes on two cores
    python exp_flickr_ttt.py configs/flickr8k.yaml                               # from scratch, the document's sizes
    python exp_flickr_ttt.py configs/flickr8k_tiny.yaml --demo                   # synthetic scenes and speech
    python exp_flickr_ttt.py configs/flickr8k_tiny.yaml --stage ttt              # all | cache | train | evaluate | ttt
    python exp_flickr_ttt.py --compare results/flickr8k_features*                # arms and seeds, paired over photos

It prints recalls in six directions beside chance and CCA, what memories and fusion add, and last what each test-time
method changes, with paired 95% intervals over the test photos.

Measured: flickr8k_features, 125 test photos, seeds 1-3, R@10: text -> image 88.0 +- 0.3 (CCA 87.2), audio -> image
53.9 +- 0.9 (30.4), text -> audio 95.7 +- 0.9 (96.0), 75 s of training on one shared CPU thread; under white noise
`statistics` adds 21.3 [16.5, 26.2] points to audio -> text (seed 1), memories that adapt add nothing.

Shapes: B rows a batch (a row is a caption with its photo), A <= B of them spoken, L tokens or layers of features, T mel
frames, D = latent_dim, M slots, Q queries, G gallery rows.

Deviations from the recipe this follows:
- memories attend by cosine and learned temperature: nn.MultiheadAttention over small slots gives every slot 1 / M;
- the latent is the mean of the encodings that are there, weighed by learned confidences, plus the fusion's output;
- the gallery holds unique photos, captions of one photo are no negatives, text <-> audio is strict (the caption read);
- the recipe's TENT cannot work: backward under no_grad has no graph, its entropy head is untrained, it picks every
  parameter with 'memory' in its name, and p log p of an underflowed p is NaN. Here the entropy is that of
  softmax(query . gallery / temperature), and only LayerNorm affines of the query's encoder adapt;
- a batch's writes to a slot are averaged (summed, they diverge); a random half of training's encodings is adapted;
- every parameter gets gradient: fusion and presence bits are trained by fused pairs of modalities against the third;
- encodings are standardised (BatchNorm): else the modality that is harder to match shrinks to one point.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import re
import struct
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import demo_data
from common import UserError, ranged

MODALITIES = ("text", "image", "audio")
PAIRS = tuple(itertools.combinations(MODALITIES, 2))
MAX_TOKENS, MAX_FRAMES, RATE, N_MELS = 77, 1024, 16000, 80
FEEDBACK_STEPS = 2  # reads of the central memory
CLIP_NORM = 1.0  # of the gradient
GATE_RATE = 5e-3  # learning rate of the modalities' confidences
SPELL = 0.02  # share of training words read by their characters, as unknown ones are
BUCKET = 8  # batches sorted by length of speech together, in epochs of many more
EMBED_ROWS = 128  # embedded at once


# ------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = "data/flickr8k"  # Flickr8k_Dataset/, Flickr8k_text/ and, for speech, flickr_audio/
    cache_dir: str = "data/cache"  # photos and mels are decoded into it once
    features_dir: str = ""  # of {text,image,audio}_features.pt (encode.py flickr8k) for cached encoders (empty: dir)
    captions: Literal["one", "all"] = "one"  # of a training photo in an epoch: one at random (and a spoken one), or all


@dataclass
class ModelConfig:
    latent_dim: int = ranged(256, ">= 8", "<= 65536")  # D, of encodings, slots and the unified latent
    memory: Literal["slots", "linear", "none"] = "slots"  # cosine softmax, linear attention, or an MLP of equal size
    memory_size: int = ranged(64, ">= 2", "<= 65536")  # slots of the central memory; those of a modality have half
    num_heads: int = ranged(4, ">= 1")  # of every attention
    num_layers: int = ranged(3, ">= 1", "<= 1000")  # transformer layers of the text and of the image encoder
    text_encoder: Literal["transformer", "cached"] = "transformer"  # on tokens, or precomputed features
    image_encoder: Literal["vit", "cached"] = "vit"  # a vision transformer on pixels, or precomputed features
    audio_encoder: Literal["cnn", "cached"] = "cnn"  # convolutions on log mels, or precomputed features of all layers
    init: Literal["random", "cca"] = "random"  # where the maps of precomputed features start, all three cached
    image_size: int = ranged(224, ">= 8")  # pixels of a side, cropped from 8/7 of it
    patch_size: int = ranged(16, ">= 1")  # pixels of a side of a patch
    audio_channels: list[int] = field(default_factory=lambda: [64, 128, 256, 512],
                                      metadata={"bounds": (">= 1",)})  # of the stride-2 convolutions
    dropout: float = ranged(0.1, ">= 0", "< 1")  # in transformers, before the audio projection and in the fusion
    input_dropout: float = ranged(0.3, ">= 0", "< 1")  # of precomputed features
    ttt_topk: int = ranged(8, ">= 2")  # slots that a write touches; half as many in the memories of one modality
    ttt_lr: float = ranged(0.1, "> 0", "<= 1")  # eta, step of a write


@dataclass
class TrainingConfig:
    batch_size: int = ranged(64, ">= 2")  # captions a step
    epochs: int = ranged(30, ">= 1")  # passes over the training photos (or captions)
    optimizer: Literal["adamw"] = "adamw"  # the only one
    learning_rate: float = ranged(5e-4, "> 0")  # peak, after warm-up, then a cosine to 0
    weight_decay: float = ranged(0.01, ">= 0")  # on every parameter
    warmup: float = ranged(0.05, ">= 0", "< 1")  # share of the steps
    through_update: bool = True  # train through the memories' inner update, on a random half of the encodings
    augment: bool = True  # crops, mirror images, SpecAugment
    use_amp: bool = True  # bfloat16 on a GPU that has it


@dataclass
class LossConfig:
    temperature: float = ranged(0.07, "> 0")  # of InfoNCE, and of the entropies at test time
    fused: float = ranged(0.5, ">= 0")  # weight of a random pair of modalities against the third


@dataclass
class EvaluationConfig:
    stream_batch: int = ranged(16, ">= 1")  # queries that arrive together at test time
    n_orders: int = ranged(3, ">= 1")  # stream orders, averaged
    n_severities: int = ranged(4, ">= 1")  # of each corruption, mildest first (there are 3 or 4)
    more_streams: bool = False  # also mixed and continual streams, batches of 1 and 64, and a corrupted gallery


@dataclass
class Config:
    experiment: str = Path(__file__).stem.removeprefix("exp_")  # the script that a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, augmentation, stream orders
    device: str = "auto"  # auto | cuda | mps | cpu
    num_workers: int = ranged(0, ">= 0")  # threads that decode files (0: one a core)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv, tables and pictures to Weights & Biases
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# -------------------------------------------------------------------------------------------------------------- model

def gelu(x):
    """F.gelu under its own name: for F.gelu itself the layers below have a fast path in eval mode, of other bits."""
    return F.gelu(x)


def transformer(dim, n_heads, n_layers, dropout):
    """Pre-norm transformer layers [N, L, D] -> [N, L, D]."""
    return nn.ModuleList(nn.TransformerEncoderLayer(dim, n_heads, 4 * dim, dropout, gelu, batch_first=True,
                                                    norm_first=True) for _ in range(n_layers))


class TextEncoder(nn.Module):
    """Tokens [B, L] (0: padding) -> mean over the tokens [B, D]."""

    def __init__(self, vocab_size, dim, n_heads, n_layers, dropout):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, dim))
        self.blocks, self.norm = transformer(dim, n_heads, n_layers, dropout), nn.LayerNorm(dim)

    def forward(self, text):
        padding = text == 0
        x = self.embed(text) + self.position[:text.shape[1]]
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        n_tokens = (~padding).sum(1, keepdim=True)
        return self.norm(x).masked_fill(padding[:, :, None], 0).sum(1) / n_tokens


class ImageEncoder(nn.Module):
    """Normalised pixels [B, 3, S, S] -> the class token of a vision transformer [B, D] (Dosovitskiy et al. 2021)."""

    def __init__(self, image_size, patch_size, dim, n_heads, n_layers, dropout):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn((image_size // patch_size) ** 2 + 1, dim))
        self.blocks, self.norm = transformer(dim, n_heads, n_layers, dropout), nn.LayerNorm(dim)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)  # [B, patches, D]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class AudioEncoder(nn.Module):
    """Log mels [B, 80, T], of which `frames` [B] are there -> [B, D]: stride-2 convolutions, then the mean over time.

    The input and each layer, normalised over its channels alone, are zeroed past the end: what lies there changes
    nothing. `pitch`, which mel a feature is of (convolutions cannot tell), starts at the scale of what it is added to.
    """

    def __init__(self, channels, dim, dropout):
        super().__init__()
        pairs = itertools.pairwise([1, *channels])
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.pitch = nn.Parameter(0.5 * torch.randn(N_MELS // 2, channels[0]))
        self.project = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels[-1], dim), nn.LayerNorm(dim))

    def forward(self, audio, frames):
        times = torch.arange(audio.shape[2], device=audio.device)
        x = (audio * (times < frames[:, None, None]))[:, None]  # [B, 1, 80, T]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x, frames = conv(x), (frames + 1) // 2
            x = norm(x.permute(0, 2, 3, 1))  # [B, mels, T, C]
            if i == 0:
                x = x + self.pitch[:, None]
            inside = times[:x.shape[2]] < frames[:, None]  # [B, T]
            x = (F.gelu(x) * inside[:, None, :, None]).permute(0, 3, 1, 2)
        return self.project(x.sum(3).mean(2) / frames[:, None])


class FeatureEncoder(nn.Module):
    """Features of a frozen encoder [B, F], or of all its L layers [B, L, F], -> [B, D]: z-scored by training moments,
    scaled by learned weights of the layers (after ELMo, Peters et al. 2018), normalised, and mapped linearly."""

    def __init__(self, shape, dim, dropout):
        super().__init__()
        n_layers, width = (1, *shape)[-2:]
        self.register_buffer("mean", torch.zeros(n_layers, width))
        self.register_buffer("deviation", torch.ones(n_layers, width))
        self.layer_logits = nn.Parameter(torch.zeros(n_layers)) if n_layers > 1 else None
        self.norm, self.dropout = nn.LayerNorm(n_layers * width), nn.Dropout(dropout)
        self.project = nn.Linear(n_layers * width, dim)

    def standard(self, x):
        """[B, L F]: what is mapped."""
        x = (x.view(len(x), *self.mean.shape) - self.mean) / self.deviation
        if self.layer_logits is not None:
            x = x * len(self.mean) * self.layer_logits.softmax(0)[:, None]
        return self.norm(x.flatten(1))

    def forward(self, x):
        return self.project(self.dropout(self.standard(x)))


def slot_weights(slots, x, topk):
    """(a, chosen), both [B, M], of slots [M, D] and x [B, D]: a is the softmax of x . slots / sqrt(D) over a row's
    top-k slots, chosen is 1 there."""
    top = (x @ slots.T / slots.shape[1] ** 0.5).topk(topk, dim=1)
    weights = torch.zeros(len(x), len(slots), device=x.device, dtype=top.values.dtype)
    weights = weights.scatter(1, top.indices, top.values.softmax(1))
    return weights, torch.zeros_like(weights).scatter(1, top.indices, 1.0)


def memory_write(slots, x, topk, lr):
    """One write: m_k + lr * mean over the rows b that chose slot k of a_bk (x_b - m_k), a as in `slot_weights`.

    It is a step of gradient descent on 1/2 sum_k mean_b a_bk |m_k - x_b|^2 with a held fixed. Deviation from the
    recipe: the mean; its sum over b diverges once lr * sum_b a_bk passes 2.
    slots: [M, D] float. x: [B, D], detached here. topk: slots a row writes to, 1..M. lr: eta in (0, 1].
    Returns: new slots [M, D]; those that no row chose keep their bits.
    """
    x = x.detach().to(slots.dtype)
    a, chosen = slot_weights(slots, x, topk)
    n = chosen.sum(0)[:, None]  # [M, 1]
    return torch.where(n > 0, slots + lr * (a.T @ x - a.sum(0)[:, None] * slots) / n.clamp(min=1), slots)


class SlotMemory(nn.Module):
    """LayerNorm(x + read(x)) [B, D]: x asks, M learned slots are keys and values, n_heads cosines over a temperature.

    Slots start at the scale of the standardised encodings that ask: they are addressed by content from the start. Two
    ways to adapt: with `enable_ttt_updates`, in eval mode, the slots that all rows share move towards what they were
    asked, after the answer (online). With episodic=True every row has slots of its own, written before the answer and
    gone after it. linear: linear attention (Katharopoulos et al. 2020) in place of the softmax.
    """

    START = 16.0  # 1 / temperature: random cosines of 64 dimensions then give an entropy of about .6 ln M

    def __init__(self, dim, n_slots, n_heads, ttt_topk, ttt_lr, enable_ttt_updates=False, linear=False):
        super().__init__()
        self.slots, self.norm = nn.Parameter(torch.randn(n_slots, dim)), nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.full((n_heads,), math.log(self.START)))
        self.n_heads, self.ttt_topk, self.ttt_lr = n_heads, min(ttt_topk, n_slots), ttt_lr
        self.enable_ttt_updates, self.linear = enable_ttt_updates, linear

    def heads(self, x):
        return x.view(len(x), self.n_heads, -1)

    def adapt(self, x):
        """(w [B, M], x [B, D]): row b's own slots are m_k + w_bk (x_b - m_k)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(self.slots.dtype)
            return self.ttt_lr * slot_weights(self.slots, x, self.ttt_topk)[0], x

    def attention(self, x, adapted=None):
        """Weights [B, n_heads, M] of a read. adapted: (w, x) of `adapt`.

        Keys are linear in the slots, so a row's own ones (1 - w) k + w k_x are never formed: O(B M D), not O(B M D^2).
        """
        q, k = F.normalize(self.heads(self.query(x)).float(), dim=2), self.heads(self.key(self.slots)).float()
        dots, squares = torch.einsum("bhd,mhd->bhm", q, k), k.square().sum(2).T  # [B, h, M], [h, M]
        if adapted is not None:
            w, own = adapted[0][:, None], self.heads(self.key(adapted[1])).float()  # [B, 1, M], [B, h, d]
            dots = (1 - w) * dots + w * (q * own).sum(2, keepdim=True)
            squares = ((1 - w).square() * squares + 2 * w * (1 - w) * torch.einsum("bhd,mhd->bhm", own, k)
                       + w.square() * own.square().sum(2, keepdim=True))
        cosines = dots * (squares + 1e-6).rsqrt()
        if self.linear:  # linear in q and k: their feature map is (1, x / |x|)
            return (1 + cosines) / (1 + cosines).sum(2, keepdim=True)
        logits = self.log_scale.exp()[:, None] * cosines
        return logits.softmax(2)

    def read(self, x, adapted=None, order=slice(None)):
        """[B, D]: the weighed values of the slots (in another `order` than the keys); `adapted`: of a row's own."""
        p, v = self.attention(x, adapted), self.heads(self.value(self.slots[order]))
        if adapted is None:
            y = torch.einsum("bhm,mhd->bhd", p.to(v.dtype), v)
        else:
            w, own = adapted[0][:, None], self.heads(self.value(adapted[1].to(x.dtype)))
            y = torch.einsum("bhm,mhd->bhd", (p * (1 - w)).to(v.dtype), v)
            y = y + (p * w).sum(2, keepdim=True).to(v.dtype) * own
        return self.out(y.flatten(1))

    def forward(self, x, episodic=False, write=True):
        y = self.norm(x + self.read(x, self.adapt(x) if episodic else None))
        if write and self.enable_ttt_updates and not self.training:
            with torch.no_grad():
                self.slots.copy_(memory_write(self.slots, x, self.ttt_topk, self.ttt_lr))
        return y


class NoMemory(nn.Module):
    """LayerNorm(x + MLP(x)) with as many parameters as a SlotMemory: what is left of it without slots."""

    def __init__(self, dim, n_slots):
        super().__init__()
        hidden = 2 * dim + n_slots // 2
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, episodic=False, write=True):
        return self.norm(x + self.mlp(x))


class MultiModalMemoryNetwork(nn.Module):
    """Text, image and audio, any of them, into one latent: model(text, image, audio, audio_frames, episodic) -> dict
    with `central_latent` [B, D], not normalised, and `encodings` {modality: [B, D]}.

    text: [B, L <= 77] int64, 0 is padding. image: [B, 3, S, S] normalised pixels. audio: [B, 80, T] or [B, 1, 80, T]
    standardised log mels; audio_frames: [B] int64, how many of the T are there (default: all). Of a modality in
    `features` instead [B, *features[modality]], of a frozen encoder. episodic: every row reads slots of its own.
    Raises: ValueError if nothing is given, or a modality that the model was built without.
    """

    def __init__(self, vocab_size=4565, latent_dim=256, memory_size=64, num_heads=4, num_layers=3, image_size=224,
                 patch_size=16, audio_channels=(64, 128, 256, 512), modalities=MODALITIES, features=None,
                 memory="slots", dropout=0.1, input_dropout=0.3, enable_ttt_updates=False, ttt_topk=8, ttt_lr=0.1):
        super().__init__()
        dim, features = latent_dim, features or {}
        self.encoders = nn.ModuleDict()
        for modality in modalities:
            if modality in features:
                self.encoders[modality] = FeatureEncoder(features[modality], dim, input_dropout)
            elif modality == "text":
                self.encoders[modality] = TextEncoder(vocab_size, dim, num_heads, num_layers, dropout)
            elif modality == "image":
                self.encoders[modality] = ImageEncoder(image_size, patch_size, dim, num_heads, num_layers, dropout)
            else:
                self.encoders[modality] = AudioEncoder(audio_channels, dim, dropout)

        def make_memory(n_slots, topk):
            if memory == "none":
                return NoMemory(dim, n_slots)
            return SlotMemory(dim, n_slots, num_heads, topk, ttt_lr, enable_ttt_updates, memory == "linear")
        self.standardise = nn.ModuleDict({m: common.BatchNorm1d(dim) for m in modalities})
        self.memories = nn.ModuleDict({m: make_memory(memory_size // 2, max(1, ttt_topk // 2)) for m in modalities})
        self.central = make_memory(memory_size, ttt_topk)
        self.modality_type_embeddings = nn.Parameter(0.02 * torch.randn(len(MODALITIES), dim))
        self.type_norm = nn.LayerNorm(dim)
        self.confidence = nn.ModuleDict({m: nn.Linear(dim, 1) for m in modalities})
        self.fusion = nn.Sequential(nn.Linear(len(MODALITIES) * (dim + 1), 2 * dim), nn.GELU(), nn.Dropout(dropout),
                                    nn.Linear(2 * dim, dim))
        self.feedback = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.register_buffer("presence", torch.eye(len(MODALITIES)), persistent=False)
        self.presence_scale = dim**0.5  # as large as an encoding
        self.feedback_steps, self.ttt_lr = FEEDBACK_STEPS, ttt_lr
        self.temperature, self.fused = 0.07, 0.5  # of the objective; build_model sets the config's
        self.through_update, self.use_amp = True, True

    def encode(self, modality, *inputs, episodic=False):
        """[B, D] of one modality after its memory, from the input of its encoder (audio: mels and frames).

        Raises: ValueError if the model has none.
        """
        if modality not in self.encoders:
            raise ValueError(f"this model was trained without {modality}; it has {', '.join(self.encoders)}")
        return self.memories[modality](self.standardise[modality](self.encoders[modality](*inputs)), episodic)

    def fuse_modalities(self, encodings, episodic=False):
        """Latent [B, D] of {modality: [B, D]}: their mean, weighed by learned confidences, plus the fusion's output,
        through the central memory.

        One that is not there is its type embedding alone, presence bit 0. Raises: ValueError if {}.
        """
        if not encodings:
            raise ValueError("nothing to fuse: give at least one of text, image and audio")
        size = len(next(iter(encodings.values())))
        weights = torch.cat([self.confidence[m](e) for m, e in encodings.items()], dim=1).softmax(1)  # [B, given]
        z = sum(w[:, None] * e for w, e in zip(weights.T, encodings.values(), strict=True))
        parts, presence = [], 0
        for i, m in enumerate(MODALITIES):
            own_type = self.modality_type_embeddings[i].expand(size, -1)
            parts.append(self.type_norm(encodings[m] + own_type if m in encodings else own_type))
            if m in encodings:
                presence = presence + self.presence_scale * self.presence[i]
        z = z + self.fusion(torch.cat([*parts, presence.expand(size, -1)], dim=1))
        for step in range(self.feedback_steps):
            z = self.central(z + self.feedback(z), episodic, write=step == self.feedback_steps - 1)
        return z

    def forward(self, text=None, image=None, audio=None, audio_frames=None, episodic=False):
        given = {"text": (text,), "image": (image,), "audio": (audio,)}
        if audio is not None and isinstance(dict(self.encoders.items()).get("audio"), AudioEncoder):
            audio = audio.flatten(0, 1) if audio.ndim == 4 else audio
            if audio_frames is None:
                audio_frames = torch.full((len(audio),), audio.shape[2], device=audio.device)
            given["audio"] = (audio, audio_frames)
        encodings = {m: self.encode(m, *inputs, episodic=episodic) for m, inputs in given.items()
                     if inputs[0] is not None}
        return {"central_latent": self.fuse_modalities(encodings, episodic), "encodings": encodings}


def model_arguments(cfg, data):
    """Keyword arguments of MultiModalMemoryNetwork. Raises: UserError on sizes that do not fit."""
    m = cfg.model
    if not m.audio_channels:
        raise UserError("model.audio_channels=[] leaves no convolution; give one number of channels or more")
    if m.latent_dim % m.num_heads:
        raise UserError(f"model.latent_dim={m.latent_dim} must be a multiple of model.num_heads={m.num_heads}")
    if m.image_size % m.patch_size:
        raise UserError(f"model.image_size={m.image_size} must be a multiple of model.patch_size={m.patch_size}")
    if m.init == "cca" and len(data.features) < len(MODALITIES):
        raise UserError("model.init=cca starts the maps of precomputed features; set model.{text,image,audio}_encoder="
                        "cached, with speech, or model.init=random")
    return {**{name: getattr(m, name) for name in (
        "latent_dim", "memory_size", "num_heads", "num_layers", "image_size", "patch_size", "audio_channels", "memory",
        "dropout", "input_dropout", "ttt_topk", "ttt_lr")}, "vocab_size": len(data.vocabulary),
        "modalities": list(data.modalities), "features": {m: list(x.shape[1:]) for m, x in data.features.items()}}


def build_model(cfg, data):
    """MultiModalMemoryNetwork for the data's vocabulary, features and modalities, on their device."""
    model = MultiModalMemoryNetwork(**model_arguments(cfg, data))
    for modality, x in data.features.items():
        rows = data.rows_of(modality, data.splits["train"])
        mean, deviation = common.moments(x.flatten(1), rows.unique())
        model.encoders[modality].mean.copy_(mean.view(model.encoders[modality].mean.shape))
        model.encoders[modality].deviation.copy_(deviation.view(model.encoders[modality].mean.shape))
    if cfg.model.init == "cca":
        start_at_cca(model, data)
    model.temperature, model.fused = cfg.losses.temperature, cfg.losses.fused
    model.through_update, model.use_amp = cfg.training.through_update, cfg.training.use_amp
    return model.to(data.device)


def svd(x):
    return torch.linalg.svd(x, full_matrices=False)


def cca(svd_x, svd_y, ridge_x, ridge_y, n_dims):
    """(A [F_x, n_dims], B [F_y, n_dims]), float64: canonical correlation analysis (Hotelling 1936) of paired centred
    features [N, F] (their `svd`), ridges in units of the mean squared singular value, weighed by their correlation."""
    (u, s, v), (p, t, w) = svd_x, svd_y
    scale_x = (s.square() + ridge_x * s.square().mean()).rsqrt()
    scale_y = (t.square() + ridge_y * t.square().mean()).rsqrt()
    cross = (scale_x * s)[:, None] * (u.T @ p) * (scale_y * t)
    left, correlations, right = svd(cross)
    maps = v.T @ (scale_x[:, None] * left * correlations), w.T @ (scale_y[:, None] * right.T * correlations)
    return [F.pad(m[:, :n_dims], (0, max(0, n_dims - m.shape[1]))) for m in maps]


def ridge_regression(x, y, ridge):
    """[F, n]: y [N, n] on centred x [N, F], the ridge in units of the mean squared singular value."""
    u, s, v = svd(x)
    return v.T @ ((s / (s.square() + ridge * s.square().mean()))[:, None] * (u.T @ y))


@torch.no_grad()
def start_at_cca(model, data):
    """The linear maps of precomputed features start in closed form, in two halves of the latent.

    The first half is the CCA of texts and photos; what a caption is there is regressed on its speech, which so meets
    photos through words. The second is the CCA of captions and recordings; what a caption is there is regressed on its
    photo. Ridges were chosen on dev. The parts after the maps start small.
    """
    rows, half = data.splits["train"], model.central.norm.normalized_shape[0] // 2

    def inputs(modality, captions):
        x = data.features[modality][data.rows_of(modality, captions).to(data.device)]
        x = model.encoders[modality].standard(x.cpu()).double()
        return x - x.mean(0)
    text, image = inputs("text", rows), inputs("image", rows)
    to_text, to_image = cca(svd(text), svd(image), 1, 3, half)
    to_text, to_image = to_text / rms(text @ to_text), to_image / rms(image @ to_image)
    spoken = rows[data.speech[rows, 1] > 0]
    said, audio = inputs("text", spoken), inputs("audio", spoken)
    to_said, to_audio = cca(svd(said), svd(audio), 1, 1, half)
    to_said, to_audio = to_said / rms(said @ to_said), to_audio / rms(audio @ to_audio)
    maps = {"text": [to_text, to_said], "image": [to_image, ridge_regression(image, text @ to_said, 10)],
            "audio": [ridge_regression(audio, said @ to_text, 0.3), to_audio]}
    for modality, x in (("text", text), ("image", image), ("audio", audio)):
        weight = (half ** 0.5 * torch.cat(maps[modality], dim=1)).T.float()
        encoder, norm = model.encoders[modality], model.standardise[modality]
        encoder.project.weight.copy_(weight)
        encoder.project.bias.zero_()
        norm.weight.copy_((x.float() @ weight.T).std(0))  # BatchNorm would make all directions equally long
    memories = all_memories(model).values()
    lasts = [memory.out if isinstance(memory, SlotMemory) else memory.mlp[-1] for memory in memories]
    for last in (model.fusion[-1], model.feedback[-1], *lasts):
        last.weight.mul_(0.1)
        last.bias.zero_()


def rms(x):
    """Root mean square of the rows' norms."""
    return x.square().sum(1).mean().sqrt()


def build_optimizer(cfg, model):
    """AdamW (Loshchilov & Hutter 2019); what Adam would hardly move, by its rate a step, has rates of its own: learned
    scalars ten times the others', confidences GATE_RATE."""
    rate = cfg.training.learning_rate
    groups = [{"params": [], "weight_decay": cfg.training.weight_decay},
              {"params": [], "weight_decay": 0.0, "lr": 10 * rate},
              {"params": [], "weight_decay": 0.0, "lr": GATE_RATE}]
    for name, p in model.named_parameters():
        is_scalar, is_gate = name.endswith(("log_scale", "layer_logits")), name.startswith("confidence.")
        groups[1 if is_scalar else 2 if is_gate else 0]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=rate, fused=next(model.parameters()).is_cuda)


# ---------------------------------------------------------------------------------------------------------- objective

def retrieval_losses(model, batch):
    """{"text_image", "text_audio", "image_audio", "fused"}: scalars, InfoNCE (van den Oord et al. 2018) of the pairs,
    audio's over spoken rows.

    batch: as `make_batch` returns it; with fewer than two spoken rows there is only text_image. Captions of one photo
    are no negatives. Every modality goes through the fusion alone; "fused" is a random pair against the third. Which
    encodings are adapted before they are used (through_update) and which pair is fused is drawn from torch's CPU
    generator. Of several processes each encodes its share of the rows and has the losses' parts.
    """
    *coins, third = common.agreed([*torch.rand(len(MODALITIES) + 1).tolist(), int(torch.randint(len(MODALITIES), ()))])
    adapted = {m: model.through_update and coin < 0.5 for m, coin in zip((*MODALITIES, "pair"), coins, strict=True)}
    spoken, photo, third = batch.get("audio_rows"), batch["photo"], MODALITIES[third]
    given, n = {"text": (batch["text"],), "image": (batch["image"],)}, {"text": len(photo), "image": len(photo)}
    if spoken is not None and len(spoken) > 1:
        given["audio"] = (batch["audio"], batch["audio_frames"]) if "audio_frames" in batch else (batch["audio"],)
        n["audio"] = len(spoken)
    encodings = {m: model.encode(m, *inputs, episodic=adapted[m]) for m, inputs in given.items()}
    latents = {m: F.normalize(model.fuse_modalities({m: e}, adapted[m]).float(), dim=1) for m, e in encodings.items()}
    latents = {m: common.gathered(z, n[m]) for m, z in latents.items()}
    losses, scale = {}, 1 / model.temperature
    for a, b in PAIRS:
        if a in latents and b in latents:
            rows = spoken if b == "audio" else slice(None)
            losses[f"{a}_{b}"] = common.info_nce(latents[a][rows], latents[b], scale, photo[rows], "mask",
                                                 rows=common.share(n[b]))
    if model.fused and len(encodings) == 3:
        own = spoken[common.share(len(spoken))]  # a row's text and photo may have been encoded by another process
        pair = {m: e if m == "audio" else common.gathered(e, n[m])[own] for m, e in encodings.items() if m != third}
        joint = F.normalize(model.fuse_modalities(pair, adapted["pair"]).float(), dim=1)
        target = latents[third] if third == "audio" else latents[third][spoken]
        losses["fused"] = common.info_nce(common.gathered(joint, len(spoken)), target, scale, photo[spoken], "mask",
                                          rows=common.share(len(spoken)))
    return losses


def train_step(model, batch, optimizer):
    """One step -> {"loss", and the losses of `retrieval_losses`} as 0-d tensors (no synchronisation)."""
    optimizer.zero_grad(set_to_none=True)
    on_gpu = batch["text"].is_cuda and torch.cuda.is_bf16_supported()
    with torch.autocast(batch["text"].device.type, torch.bfloat16, enabled=model.use_amp and on_gpu):
        losses = retrieval_losses(model, batch)
    total = sum((model.fused if name == "fused" else 1) * value for name, value in losses.items())
    total.backward()
    common.sum_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


# -------------------------------------------------------------------------------------------------------------- train

def steps_per_epoch(cfg, data):
    """Batches of an epoch; the last rows are spread over all of them."""
    n = data.epoch_size(cfg.data.captions)
    return max(1, min(-(-n // cfg.training.batch_size), n // 2))  # no batch of one row


def total_steps(cfg, data):
    """Optimisation steps of a run."""
    return cfg.training.epochs * steps_per_epoch(cfg, data)


def train(cfg, data):
    """Train, resuming exactly; best_model.pt is the epoch with the best dev_recall. Returns the rows of metrics.csv."""
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    per_epoch, last_step = steps_per_epoch(cfg, data), total_steps(cfg, data)
    warmup_steps = math.ceil(cfg.training.warmup * last_step)
    scheduler = torch.optim.lr_scheduler.LambdaLR(  # of step s + 1: neither the first nor the last stands still
        optimizer, lambda s: common.warmup_cosine(s + 1, last_step + 1, warmup_steps))
    folder = common.open_run(cfg, data.fingerprint)  # after what can fail for its settings
    with common.Run(folder, cfg, model, optimizer, scheduler, steps_per_epoch=per_epoch) as run:
        for step in run.steps(last_step):
            epoch, place = divmod(step - 1, per_epoch)
            model.train()
            draws = np.random.default_rng([cfg.seed, epoch, place]) if cfg.training.augment else None
            rows = epoch_batches(data, cfg.seed, cfg.data.captions, per_epoch, epoch)[place]
            batch = make_batch(data, rows, draws, common.share)
            losses = train_step(model, batch, optimizer)
            run.add(losses)  # stays on the device; run.means() waits for it
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            if step % per_epoch == 0:
                row = {"epoch": epoch + 1, "step": step, **run.means(), **validate(model, data), "learning_rate": rate}
                run.log(row, score=row["dev_recall"], val_loss=row["dev_loss"], show=("loss", "dev_loss", "dev_recall"),
                        arguments=model_arguments(cfg, data), vocabulary=data.vocabulary,
                        mel_statistics=[x.cpu() for x in data.mel_statistics])
    columns = list(dict.fromkeys(name for row in run.history for name in row))
    panels = {"training loss": {n: n for n in ("loss", "text_image", "text_audio", "image_audio", "fused")
                                if n in columns},
              "dev R@10 (%)": {n.removeprefix("dev_R@10 "): n for n in columns if n.startswith("dev_R@10 ")},
              "memories: entropy / ln M, dev": {n.removeprefix("entropy_"): n for n in columns
                                                              if n.startswith("entropy_")}}
    common.plot_history(folder / "training_curves.png", run.history, {n: p for n, p in panels.items() if p}, x="step",
                        mark=run.best_step, title=f"memory {cfg.model.memory}", synthetic=data.synthetic)
    return run.history


def validate(model, data):
    """Dev scores: `dev_loss`, InfoNCE over all pairs, `dev_recall`, the mean of R@1, 5 and 10 of all directions in %,
    each direction's R@10; and every memory's health: entropy of its attention / ln M, share of its slots in use."""
    tasks, recalls, row, loss = directions(data, "dev")[:N_DIRECTIONS], [], {}, 0.0
    with memory_inputs(model) as asked:
        items, z = embedded(model, data, tasks)
    for d in tasks:
        q = ranks(d, z(*d.query, d.items), z(d.gallery, d.gallery_items))
        recalls += [100 * q[f"hit@{k}"].mean().item() for k in (1, 5, 10)]
        row[f"dev_R@10 {d.name}"] = recalls[-1]
    for a, b in itertools.combinations(items, 2):
        rows = items["audio"] if "audio" in (a, b) else items["text"]
        x, y = (z(m, data.photo_of[rows] if m == "image" else rows) for m in (a, b))
        loss += common.info_nce(x, y, 1 / model.temperature, data.photo_of[rows].to(data.device), "mask").item()
    health = memory_health(model, asked)
    row |= {f"{column}_{name}": of[column] for column in ("entropy", "usage") for name, of in health.items()}
    return {"dev_loss": loss, "dev_recall": float(np.mean(recalls)), **row}


def all_memories(model):
    """{"text", .., "central": memory}."""
    return {**model.memories, "central": model.central}


@contextlib.contextmanager
def memory_inputs(model):
    """{memory: [x [B, D], ..]} of all that the memories are asked inside."""
    asked, hooks = {}, []
    for name, memory in all_memories(model).items():
        keep = functools.partial(lambda name, module, args, output: asked.setdefault(name, []).append(args[0]), name)
        hooks.append(memory.register_forward_hook(keep))
    try:
        yield asked
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def memory_health(model, asked):
    """{memory: entropy / ln M of its attention, mean over heads and queries; usage, the share of slots that are some
    query's first; scale, 1 / temperature; read_sd, sd of the read over queries / its root mean square}."""
    health = {}
    for name, memory in all_memories(model).items():
        if isinstance(memory, SlotMemory) and name in asked:
            x = torch.cat(asked[name])
            weights, read = memory.attention(x), memory.read(x).float()
            entropy = torch.special.entr(weights).sum(2).mean() / math.log(weights.shape[2])
            health[name] = {"entropy": entropy.item(),
                            "usage": len(weights.argmax(2).unique()) / weights.shape[2],
                            "scale": memory.log_scale.exp().mean().item(),
                            "read_sd": (read.std(0, correction=0).norm() / read.square().mean(0).sum().sqrt()).item()}
    return health


# ----------------------------------------------------------------------------------------------------------- evaluate

@dataclass
class Direction:
    """Queries of one or more modalities against a gallery of one; rows of equal id belong together."""
    name: str
    query: tuple
    items: torch.Tensor  # [Q] photos if the query is an image alone, else captions
    ids: torch.Tensor  # [Q]
    gallery: str
    gallery_items: torch.Tensor  # [G]
    gallery_ids: torch.Tensor  # [G]


N_DIRECTIONS = 6  # of `directions` that count in dev_recall and in the test-time protocol, as far as they are there


def directions(data, split):
    """The six directions of a split (two without speech), then variants: other right answers, and fused queries."""
    rows = data.splits[split]
    photo, spoken = data.photo_of[rows], rows[data.speech[rows, 1] > 0]
    photos, said = photo.unique(), data.photo_of[spoken]
    heard = said.unique()
    tasks = [Direction("text -> image", ("text",), rows, photo, "image", photos, photos),
             Direction("image -> text", ("image",), photos, photos, "text", rows, photo)]
    if len(spoken) > 1:
        tasks += [Direction("audio -> image", ("audio",), spoken, said, "image", photos, photos),
                  Direction("image -> audio", ("image",), heard, heard, "audio", spoken, said),
                  Direction("text -> audio", ("text",), spoken, spoken, "audio", spoken, spoken),
                  Direction("audio -> text", ("audio",), spoken, spoken, "text", rows, rows),
                  Direction("audio -> text, spoken captions", ("audio",), spoken, spoken, "text", spoken, spoken),
                  Direction("text -> audio, same photo", ("text",), rows[torch.isin(photo, heard)],
                            photo[torch.isin(photo, heard)], "audio", spoken, said),
                  Direction("audio -> text, same photo", ("audio",), spoken, said, "text", rows, photo),
                  Direction("text + audio -> image", ("text", "audio"), spoken, said, "image", photos, photos),
                  Direction("text + image -> audio", ("text", "image"), spoken, spoken, "audio", spoken, spoken),
                  Direction("image + audio -> text", ("image", "audio"), spoken, spoken, "text", rows, rows)]
    return tasks


@torch.no_grad()
def embed(model, data, modalities, items, raw=None, episodic=False):
    """[N, D] float32, L2-normalised latents of items [N] (photos if the modality is the image alone, else captions), or
    of raw items given for them. Raises: FloatingPointError if they are not finite."""
    model.eval()
    order = torch.arange(len(items))
    if "audio" in modalities and "audio" not in data.features:  # neighbours of similar length need little padding
        lengths = data.speech[items, 1] if raw is None else torch.tensor([len(x) for x in raw])
        order = lengths.argsort(stable=True)
    parts = []
    for part in order.split(EMBED_ROWS):
        inputs = {}
        for m in modalities:
            rows = data.photo_of[items[part]] if m == "image" and len(modalities) > 1 else items[part]
            inputs |= as_input(data, m, raw_items(data, m, rows) if raw is None else take(raw, part))
        with common.full_precision():
            parts.append(F.normalize(model(**inputs, episodic=episodic)["central_latent"].float(), dim=1))
    z = torch.cat(parts)[order.argsort().to(data.device)]
    if not torch.isfinite(z).all():
        raise FloatingPointError("non-finite embeddings: the weights have overflowed; lower training.learning_rate")
    return z


def embedded(model, data, tasks):
    """({modality: items}, function (modality, items) -> [n, D]) of all that the galleries of tasks hold, and of single
    queries: each modality embedded once."""
    items = {}
    for d in tasks:
        items[d.gallery] = torch.cat([items.get(d.gallery, d.gallery_items), d.gallery_items]).unique()
    z = {m: embed(model, data, (m,), rows) for m, rows in items.items()}
    return items, lambda m, rows: z[m][torch.searchsorted(items[m], rows).to(z[m].device)]


def take(raw, rows):
    return raw[rows.to(raw.device)] if isinstance(raw, torch.Tensor) else [raw[i] for i in rows.tolist()]


def ranks(direction, queries, gallery):
    return common.retrieval_per_query(queries, gallery, direction.ids, direction.gallery_ids, map_ks=())


class ByPhoto:
    """Sums of a direction's values over the queries of each test photo, which a bootstrap resamples together."""

    def __init__(self, data):
        photos = data.photo_of[data.splits["test"]].unique()
        self.n, self.photos = len(photos), photos
        self.names = [data.names["image"][i] for i in photos.tolist()]
        self.photo_of = data.photo_of

    def sums(self, direction, values):
        """[2, n] float64: of values [Q] their sum over each photo's queries, and how many these are."""
        photo = direction.items if direction.query == ("image",) else self.photo_of[direction.items]
        place = torch.searchsorted(self.photos, photo)
        totals = torch.bincount(place, torch.as_tensor(values, dtype=torch.float64), minlength=self.n)
        return torch.stack([totals, torch.bincount(place, minlength=self.n).double()])

    def row(self, direction, q, name="hit", ks=(1, 5, 10), prefix=""):
        """{"R@k": sums} of the values of `ranks`; name "chance": of chance."""
        return {f"{prefix}R@{k}": self.sums(direction, q[f"{name}@{k}"]) for k in ks}


def percent(values, weights):
    """{column: mean in %} of {column: [2, n] of ByPhoto}; with weights [R, n] of photos [R] each. `mean R@k` comes from
    the columns "<direction> R@k"."""
    columns = {}
    for name, sums in values.items():
        totals, counts = (np.asarray(x) if weights is None else weights @ np.asarray(x) for x in sums)
        columns[name] = 100 * totals.sum() / counts.sum() if weights is None else 100 * totals / np.maximum(counts, 1)
    of_directions = [value for name, value in columns.items() if "->" in name]
    return {**({"mean R@10": np.mean(of_directions, axis=0)} if of_directions else {}), **columns}


def evaluate(cfg, data, test_time=True):
    """Test the best model: retrieval beside chance and CCA, fused queries, what its parts do, and (test_time) the
    protocol of corrupted queries. Returns the results."""
    folder = common.open_run(cfg, data.fingerprint)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    step = common.load_best(folder, model)["step"]
    photos, n = ByPhoto(data), {split: len(data.photo_of[rows].unique()) for split, rows in data.splits.items()}
    print(f"evaluating: {n['test']:,} test photos", flush=True)
    retrieval, recall_pairs, chosen_baselines = retrieval_rows(model, data, photos)
    fused, fused_pairs, chosen_singles = fusion_rows(model, data, photos)
    parts, health = part_rows(model, data, photos)
    part_pairs = [("as trained", name) for name in parts if name not in ("as trained", "chance")]
    tables, items = {}, {}
    for title, rows, pairs in (("retrieval", retrieval, recall_pairs), ("fused queries", fused, fused_pairs),
                               ("parts of the trained model", parts, part_pairs)):
        if rows:
            tables[title], tables[f"{title}, paired difference"], kept = common.interval_tables(
                rows, pairs, photos.n, percent)
            for kind, values in kept.items():
                items.setdefault(kind, {}).update({f"{title}: {name}": x for name, x in values.items()})
    if health:
        tables["memories, dev"] = health
    results = {
        **common.run_facts(cfg, data), "n": n["test"],
        "headline": f"{n['test']:,} test photos, recalls in %; memory {cfg.model.memory}, step {step}, seed {cfg.seed}",
        "chosen": {"step": step, **chosen_baselines, **chosen_singles}, "n_photos": n, "counts": data.counts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": ["Intervals: 95%, bootstrap over the test photos with all of their captions; the model as it is."],
        "tables": tables, "curves": {}}
    if test_time:
        protocol = run_protocol(cfg, model, data, photos, folder)
        for key in ("tables", "chosen", "curves"):
            results[key] |= protocol[key]
        results["notes"] += protocol["notes"]
        for kind, values in protocol["items"].items():
            items.setdefault(kind, {}).update({f"test time: {name}": x for name, x in values.items()})
        results["gallery_sha256"] = protocol["gallery_sha256"]
        common.plot_lines(folder / "ttt_R10.png", protocol["curves"], "corrupted queries", data.synthetic)
        plot_changes(folder / "ttt_changes.png", protocol["changes"], data.synthetic)
    return {**results, "test_time": test_time, "per_item": {"ids": photos.names, **items}}


def retrieval_rows(model, data, photos):
    """({row: values}, pairs, what dev chose) of every direction: the model, chance, CCA and, for speech and photos,
    what the model does with the true transcripts."""
    rows, pairs = {}, []
    tasks = [d for d in directions(data, "test") if len(d.query) == 1]
    _, z = embedded(model, data, tasks)
    solved = {pair: fit_cca(data, *pair) for pair in PAIRS if set(pair) <= set(data.modalities)}
    for d in tasks:
        gallery = z(d.gallery, d.gallery_items)
        q = ranks(d, z(*d.query, d.items), gallery)
        rows[d.name], rows[f"{d.name}, chance"] = photos.row(d, q), photos.row(d, q, "chance")
        pair = tuple(sorted((*d.query, d.gallery), key=MODALITIES.index))
        project = solved[pair][0]
        q = ranks(d, project(*d.query, d.items), project(d.gallery, d.gallery_items))
        rows[f"{d.name}, CCA"] = photos.row(d, q)
        pairs.append((d.name, f"{d.name}, CCA"))
        if d.name == "audio -> image":
            rows[f"{d.name}, true transcript"] = photos.row(d, ranks(d, z("text", d.items), gallery))
        if d.name == "image -> audio":
            spoken = z("text", d.gallery_items)
            rows[f"{d.name}, true transcript"] = photos.row(d, ranks(d, z("image", d.items), spoken))
    return rows, pairs, {f"CCA {a}, {b}": settings for (a, b), (_, settings) in solved.items()}


def simple_features(data, modality, raw):
    """[n, F] float32 of raw items: precomputed features (of speech all layers), or counts of words, 8 x 8 pixels, mean
    and deviation of each mel."""
    if modality in data.features:
        return raw.float().flatten(1).cpu()
    if modality == "image":
        return F.interpolate(raw.float().cpu(), (8, 8), mode="area").flatten(1)
    if modality == "audio":
        return torch.stack([torch.cat([x.float().mean(0), x.float().std(0)]) for x in raw])
    ids = tokenise(raw, data.vocabulary).clamp(max=1000)  # characters and the most frequent words
    return torch.zeros(len(raw), min(len(data.vocabulary), 1001)).scatter_add(1, ids, (ids > 0).float())


CCA_RIDGES = (0.3, 1.0, 3.0)
CCA_DIMS = (32, 128)


def fit_cca(data, a, b):
    """(function (modality, items) -> [n, D], its settings): CCA of two modalities on the training pairs; the ridges and
    the size by dev's recall."""
    def features(m, items):
        parts = [simple_features(data, m, raw_items(data, m, part)) for part in items.split(256)]  # photos are large
        return torch.cat(parts).double()
    rows = data.splits["train"]
    rows = rows[data.speech[rows, 1] > 0] if "audio" in (a, b) else rows
    x = {m: features(m, data.photo_of[rows] if m == "image" else rows) for m in (a, b)}
    mean = {m: values.mean(0) for m, values in x.items()}
    deviation = {m: values.std(0).clamp(min=1e-3) for m, values in x.items()}
    parts = {m: svd((values - mean[m]) / deviation[m]) for m, values in x.items()}
    tasks = [d for d in directions(data, "dev")[:N_DIRECTIONS] if {*d.query, d.gallery} == {a, b}]
    best_recall, best = -1.0, None
    for ridges in itertools.product(CCA_RIDGES, CCA_RIDGES):
        maps = dict(zip((a, b), cca(parts[a], parts[b], *ridges, max(CCA_DIMS)), strict=True))
        for n_dims in CCA_DIMS:
            def project(m, items, maps=maps, n_dims=n_dims):
                z = (features(m, items) - mean[m]) / deviation[m] @ maps[m][:, :n_dims]
                return F.normalize(z.float(), dim=1)
            recall = np.mean([ranks(d, project(*d.query, d.items), project(d.gallery, d.gallery_items))["hit@10"].mean()
                              for d in tasks])
            if recall > best_recall:
                best_recall, best = recall, (project, {"ridges": list(ridges), "dims": n_dims})
    return best


def fusion_rows(model, data, photos):
    """({row: values}, pairs, what dev chose): fused queries, the better of the two alone (by dev), and the sum of both
    latents."""
    rows, pairs, chosen = {}, [], {}
    answers = {}
    for split in ("dev", "test"):
        tasks = [d for d in directions(data, split) if len(d.query) == 2]
        _, z = embedded(model, data, directions(data, split)[:N_DIRECTIONS])
        for d in tasks:
            single = {m: z(m, data.photo_of[d.items] if m == "image" else d.items) for m in d.query}
            queries = {"": embed(model, data, d.query, d.items),
                       ", sum of the latents": F.normalize(sum(single.values()), dim=1),
                       **{f", {m} alone": x for m, x in single.items()}}
            answers[split, d.name] = {name: ranks(d, x, z(d.gallery, d.gallery_items)) for name, x in queries.items()}
            if split == "dev":
                continue
            alone = [name for name in queries if name.endswith("alone")]
            best = max(alone, key=lambda name: (1 / answers["dev", d.name][name]["rank"]).mean())
            chosen[f"{d.name}, best single"] = best.removeprefix(", ").removesuffix(" alone")
            for name in ("", best, ", sum of the latents"):
                rows[d.name + name] = photos.row(d, answers[split, d.name][name])
            rows[f"{d.name}, chance"] = photos.row(d, answers[split, d.name][""], "chance")
            pairs += [(d.name, d.name + best), (d.name, f"{d.name}, sum of the latents")]
    return rows, pairs, chosen


def part_rows(model, data, photos):
    """({row: values}, {memory: health on dev}): recalls as trained, and with one part at a time taken away."""
    tasks = directions(data, "test")[:N_DIRECTIONS]
    with memory_inputs(model) as asked:
        embedded(model, data, directions(data, "dev")[:N_DIRECTIONS])
    health = memory_health(model, asked)
    memories = {name: memory for name, memory in all_memories(model).items() if name in health}
    with torch.no_grad():
        means = {name: memory.read(torch.cat(asked[name])).mean(0) for name, memory in memories.items()}

    def constant(names):
        for name in names:
            memories[name].read = lambda x, adapted=None, mean=means[name]: mean.to(x.dtype).expand_as(x)

    def shuffled():
        for memory in memories.values():
            order = torch.randperm(len(memory.slots), generator=torch.Generator().manual_seed(0))
            memory.read = functools.partial(memory.read, order=order.to(data.device))
    single = [name for name in memories if name != "central"]
    changes = {"as trained": lambda: None}
    if memories:
        changes |= {"all reads replaced by their means": lambda: constant(memories),
                    "reads of the modalities' memories replaced": lambda: constant(single),
                    "reads of the central memory replaced": lambda: constant(["central"]),
                    "values shuffled among slots": shuffled}
    changes |= {"one feedback step": lambda: setattr(model, "feedback_steps", 1),
                "no type embeddings": model.modality_type_embeddings.data.zero_,
                "no presence bits": lambda: setattr(model, "presence_scale", 0.0)}
    for modality, name in (("text", "position"), ("image", "position"), ("audio", "pitch")):
        part = getattr(dict(model.encoders.items()).get(modality), name, None)
        if part is not None:
            changes[f"no {modality} {name}"] = part.data.zero_
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {name: getattr(model, name) for name in ("feedback_steps", "presence_scale")}
    rows = {}
    for name, change in changes.items():
        change()
        _, z = embedded(model, data, tasks)
        answers = {d.name: ranks(d, z(*d.query, d.items), z(d.gallery, d.gallery_items)) for d in tasks}
        rows[name] = {f"{d.name} R@10": photos.sums(d, answers[d.name]["hit@10"]) for d in tasks}
        for memory in memories.values():
            vars(memory).pop("read", None)
        vars(model).update(settings)
        model.load_state_dict(saved)
    rows["chance"] = {f"{d.name} R@10": photos.sums(d, answers[d.name]["chance@10"]) for d in tasks}
    return rows, health


# -------------------------------------------------------------------------------------------------- test-time methods

CORRUPTIONS = {  # of queries: amounts, mildest first
    "image": {"noise": (0.08, 0.18, 0.38), "defocus": (3, 6, 10), "jpeg": (25, 15, 7)},  # sd; pixels; quality
    "audio": {"white noise": (20, 10, 5, 0)},  # dB
    "text": {"swap": (0.05, 0.1, 0.2), "drop": (0.05, 0.1, 0.2), "insert": (0.05, 0.1, 0.2)}}  # of the letters
HELD_OUT = {"image": ("contrast", 0.3), "audio": ("low-pass", 1000), "text": ("word drop", 0.3)}  # on dev
CLEAN = ("", 0)
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {c: "".join(k for line in KEYS[max(0, y - 1):y + 2] for k in line[max(0, x - 1):x + 2] if k != c)
              for y, row in enumerate(KEYS) for x, c in enumerate(row)}


def item_draws(name):
    """NumPy generator of one item: what is done to it depends on nothing else."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def condition_suffix(kind, amount):
    """"", or ",white_noise=20": of the name of a file of corrupted queries."""
    return f",{kind.replace(' ', '_')}={amount:g}" if kind else ""


def corrupt_text(caption, kind, amount, draws):
    """Each letter with probability `amount`: swapped for a neighbour on the keyboard, dropped, or followed by a
    neighbour; or words dropped."""
    if kind == "word drop":
        words = caption.split()
        keep = draws.random(len(words)) >= amount
        return " ".join(word for word, kept in zip(words, keep, strict=True) if kept) or caption
    letters = []
    for c, hit in zip(caption, draws.random(len(caption)) < amount, strict=True):
        near = NEIGHBOURS.get(c.lower())
        typed = near[draws.integers(len(near))] if hit and near else ""
        letters.append({"swap": typed, "drop": "", "insert": c + typed}[kind] if typed else c)
    return "".join(letters)


def corrupt_photo(photo, kind, amount, draws):
    """uint8 [3, H, W] -> the same: noise and JPEG as in ImageNet-C (Hendrycks & Dietterich 2019), a disk blur, or a
    lower contrast."""
    x = photo.float()
    if kind == "noise":
        x = x + 255 * amount * torch.from_numpy(draws.standard_normal(x.shape, dtype=np.float32))
    elif kind == "contrast":
        x = (x - x.mean((1, 2), keepdim=True)) * amount + x.mean((1, 2), keepdim=True)
    elif kind == "defocus":
        radius = amount * min(photo.shape[1:]) / 224
        reach = math.ceil(radius)
        axis = torch.arange(-reach, reach + 1.0)
        disk = (radius + 0.5 - (axis[:, None] ** 2 + axis**2).sqrt()).clamp(0, 1)
        x = F.conv2d(F.pad(x[:, None], [reach] * 4, mode="reflect"), (disk / disk.sum())[None, None])[:, 0]
    else:
        buffer = io.BytesIO()
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=amount)
        return torch.from_numpy(np.array(Image.open(buffer)).transpose(2, 0, 1))
    return x.round().clamp(0, 255).to(torch.uint8)


def corrupt_speech(wave, kind, amount, draws):
    """[n] -> [n]: white noise `amount` dB below the recording's mean power, or nothing above `amount` Hz."""
    if kind == "white noise":
        noise = torch.from_numpy(draws.standard_normal(len(wave), dtype=np.float32))
        return wave + noise * (wave.square().mean() / 10 ** (amount / 10)).sqrt()
    spectrum = torch.fft.rfft(wave)
    spectrum[int(amount * len(wave) / RATE) + 1:] = 0
    return torch.fft.irfft(spectrum, n=len(wave))


def corrupted_items(data, modality, items, kind, amount):
    """As `raw_items`, corrupted item by item, so that neither order nor company matters. kind "": as they are."""
    if not kind:
        return raw_items(data, modality, items)
    names = [data.names[modality][i] for i in items.tolist()]
    if modality in data.features:
        suffix = condition_suffix(kind, amount)
        return read_features(data.features_dir, modality, suffix, names, data.models[modality])[0]
    draws = [item_draws(name) for name in names]
    if modality == "audio":
        waves = (read_wav(data.wavs[item].read_bytes()) for item in items.tolist())
        spoken = [corrupt_speech(wave, kind, amount, g).to(data.device) for wave, g in zip(waves, draws, strict=True)]
        return [log_mel(wave).T[:MAX_FRAMES].half().cpu() for wave in spoken]
    raw = raw_items(data, modality, items)
    if modality == "text":
        return [corrupt_text(caption, kind, amount, g) for caption, g in zip(raw, draws, strict=True)]
    return torch.stack([corrupt_photo(photo, kind, amount, g) for photo, g in zip(raw.cpu(), draws, strict=True)])


class Method(NamedTuple):
    """A way to adapt. `answer_stream` calls configure once, adapt after each batch's answers, and restores the model.

    choices: settings among which dev chooses by query modality, beside "off". configure(model, modality, choice) ->
    what is kept between batches, with the model set up. adapt(model, kept, z [b, D], gallery [G, D], inputs) -> share
    of the batch that adapted something.
    """
    choices: tuple
    configure: callable
    adapt: callable


def collect(model, modality):
    """The parameters that tent, eata, tcr and random adapt: the LayerNorm affines of the query's encoder."""
    norms = [m for m in model.encoders[modality].modules() if isinstance(m, nn.LayerNorm)]
    return [p for norm in norms for p in norm.parameters()]


def configure_nothing(model, modality, choice):
    return SimpleNamespace(hooks=[], parameters=[], episodic=False)


def configure_memories(model, modality, choice, episodic):
    for memory in all_memories(model).values():
        memory.ttt_lr, memory.enable_ttt_updates = choice, not episodic
    return SimpleNamespace(hooks=[], parameters=[], episodic=episodic)


def configure_statistics(model, modality, choice):
    """The BatchNorm of the query's modality takes its statistics from the queries seen so far and a prior of `choice`
    training queries (after Nado et al. 2020, Schneider et al. 2020): no labels, no gradient."""
    norm = model.standardise[modality]
    n, total = float(choice), choice * norm.running_mean.double()
    squares = choice * (norm.running_var.double() + norm.running_mean.double().square())

    def see(module, args):
        nonlocal n, total, squares
        x = args[0].detach().double()
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
        norm.running_mean.copy_(total / n)
        norm.running_var.copy_(squares / n - (total / n).square())
    return SimpleNamespace(hooks=[norm.register_forward_pre_hook(see)], parameters=[], episodic=False)


def configure_gradient(model, modality, choice):
    lr, margin = choice if isinstance(choice, tuple) else (choice, None)
    parameters = collect(model, modality)
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    return SimpleNamespace(hooks=[], parameters=parameters, episodic=False, margin=margin, seen=None, n_batches=0,
                           queue=None, optimizer=torch.optim.Adam(parameters, lr=lr),
                           generator=torch.Generator().manual_seed(0))


def step_down(kept, loss):
    kept.optimizer.zero_grad()
    loss.backward()
    kept.optimizer.step()


def entropies(z, gallery, temperature):
    """(entropy [B] of softmax(z . gallery / temperature), the softmax [B, G])."""
    log_p = (z @ gallery.T / temperature).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1), log_p.exp()


def adapt_nothing(model, kept, z, gallery, inputs):
    return 1.0 if kept.episodic or kept.hooks else 0.0


def adapt_tent(model, kept, z, gallery, inputs):
    """TENT (Wang et al. 2021) over a gallery in place of classes: one step down the mean entropy."""
    step_down(kept, entropies(z, gallery, model.temperature)[0].mean())
    return 1.0


def adapt_random(model, kept, z, gallery, inputs):
    """tent's step with every gradient replaced by a random one of the same norm: the control."""
    kept.optimizer.zero_grad()
    entropies(z, gallery, model.temperature)[0].mean().backward()
    for p in kept.parameters:
        direction = torch.randn(p.shape, generator=kept.generator).to(p.device)
        p.grad = direction * (p.grad.norm() / direction.norm())
    kept.optimizer.step()
    return 1.0


def adapt_eata(model, kept, z, gallery, inputs):
    """EATA's active samples alone, weighted (Niu et al. 2022): entropy below .4 ln G, and a cosine below the margin
    between their distribution and the running mean of earlier ones. (No Fisher regulariser: the model is reset.)"""
    entropy, p = entropies(z, gallery, model.temperature)
    limit = 0.4 * math.log(len(gallery))
    keep = entropy < limit
    if kept.seen is not None:
        keep &= F.cosine_similarity(kept.seen[None], p.detach()).abs() < kept.margin
    if not keep.any():
        return 0.0
    mean = p[keep].detach().mean(0)
    kept.seen = mean if kept.seen is None else 0.9 * kept.seen + 0.1 * mean
    step_down(kept, (entropy[keep] * (limit - entropy[keep].detach()).exp()).mean())
    return keep.float().mean().item()


def adapt_tcr(model, kept, z, gallery, inputs):
    """TCR (Li et al., ICLR 2025, as in its code): three steps down the entropy over the batch's nearest gallery items,
    of the queries surer than the worst of a queue, plus uniformity, plus the modality gap held at the queue's."""
    for step in range(3):
        q = z if step == 0 else latents(model, inputs)
        g = gallery[(q.detach() @ gallery.T).argmax(1)]
        entropy = entropies(q, g, model.temperature)[0]
        centre, spread = q.mean(0), (q - q.mean(0)).norm(dim=1)
        if step == 0 and kept.n_batches < 10:
            unsure = 2 * (q - g).norm(dim=1) - spread - (g - g.mean(0)).norm(dim=1)
            new = unsure.topk(max(1, round(0.3 * len(q))), largest=False).indices
            entries = [x[new].detach() for x in (unsure, q, g, entropy)]
            if kept.queue:
                entries = [torch.cat(both) for both in zip(kept.queue, entries, strict=True)]
            surest = entries[0].topk(min(len(z), len(entries[0])), largest=False).indices
            kept.queue = [x[surest] for x in entries]
        _, sure_q, sure_g, sure_entropy = kept.queue
        limit = sure_entropy.max()
        keep = entropy <= limit
        weight = (1 - entropy.detach() / (limit + 1e-3)).clamp(min=0)
        loss = (weight * entropy)[keep].sum() / max(1, int(keep.sum())) + (-0.1 * spread).exp().mean()
        gap = (centre - g.mean(0)).norm() - (sure_q.mean(0) - sure_g.mean(0)).norm()
        step_down(kept, loss + gap.square())
    kept.n_batches += 1
    return keep.float().mean().item()


RATES = (1e-4, 1e-3, 1e-2)
METHODS = {
    "none": Method((), configure_nothing, adapt_nothing),
    "memory-episodic": Method((0.1, 0.3, 1.0), functools.partial(configure_memories, episodic=True), adapt_nothing),
    "memory-online": Method((0.1, 0.3, 1.0), functools.partial(configure_memories, episodic=False), adapt_nothing),
    "statistics": Method((16, 64, 256), configure_statistics, adapt_nothing),
    "tent": Method(RATES, configure_gradient, adapt_tent),
    "eata": Method(tuple(itertools.product(RATES, (0.05, 0.2, 0.5))), configure_gradient, adapt_eata),
    "tcr": Method(RATES, configure_gradient, adapt_tcr),
    "random": Method((), configure_gradient, adapt_random)}  # with tent's step


def latents(model, inputs, episodic=False):
    with common.full_precision():
        return F.normalize(model(**inputs, episodic=episodic)["central_latent"].float(), dim=1)


def answer_stream(model, data, modality, raw, gallery, method, choice, order, batch):
    """(embeddings [N, D] of N raw queries of a modality that arrive in `order`, `batch` at a time, each answered before
    the step that it causes; share that adapted something). Afterwards the model is what it was, to the bit.

    gallery: [G, D], read only. choice: of the method's, None is off. Raises: FloatingPointError.
    """
    if choice is None:
        method = "none"
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    z, share = torch.empty(len(raw), gallery.shape[1], device=data.device), 0.0
    model.eval()
    kept = METHODS[method].configure(model, modality, choice)
    for part in order.split(EMBED_ROWS if method in ("none", "memory-episodic") else batch):
        inputs = as_input(data, modality, take(raw, part))
        with torch.set_grad_enabled(bool(kept.parameters)):
            answers = latents(model, inputs, kept.episodic)
            z[part.to(z.device)] = answers.detach()
            share += METHODS[method].adapt(model, kept, answers, gallery, inputs) * len(part) / len(raw)
    for hook in kept.hooks:
        hook.remove()
    for memory in all_memories(model).values():
        memory.ttt_lr, memory.enable_ttt_updates = model.ttt_lr, False
    model.requires_grad_(True)
    model.load_state_dict(saved)
    if not torch.isfinite(z).all():
        raise FloatingPointError(f"non-finite embeddings in the test-time method {method}, step {choice}")
    return z, share


def digest(x):
    return hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:16]


def stream_order(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def kept_file(path, signature, compute):
    """compute(), or what an earlier run with the same signature kept in the file: a stage that was killed goes on."""
    if path.exists():
        with contextlib.suppress(UserError, OSError):  # damaged: computed again
            content = common.load_checkpoint(path)
            if content["signature"] == signature:
                return content["value"]
    value = compute()
    path.parent.mkdir(exist_ok=True)
    common.save_checkpoint(path, {"signature": signature, "value": value}, keep_previous=False)
    return value


def choose_settings(cfg, model, data, modality, methods):
    """{method: its choice of best mean MRR on dev under the held-out corruption, None if off is best}."""
    tasks = [d for d in directions(data, "dev")[:N_DIRECTIONS] if d.query == (modality,)]
    scores = {}
    for d in tasks:
        raw = corrupted_items(data, modality, d.items, *HELD_OUT[modality])
        gallery, order = embed(model, data, (d.gallery,), d.gallery_items), stream_order(len(d.items), cfg.seed)
        for method in methods:
            for choice in METHODS[method].choices if method != "none" else (None,):
                z, _ = answer_stream(model, data, modality, raw, gallery, method, choice, order,
                                     cfg.evaluation.stream_batch)
                mrr = (1 / ranks(d, z, gallery)["rank"]).mean().item()
                scores.setdefault(f"{method} {choice}", []).append(mrr)
    scores = {name: float(np.mean(values)) for name, values in scores.items()}
    chosen = {"none": None}
    for method in methods:
        choices = METHODS[method].choices
        if choices:
            best = max(choices, key=lambda choice: scores[f"{method} {choice}"])
            chosen[method] = best if scores[f"{method} {best}"] > scores["none None"] else None
    chosen["random"] = max(RATES, key=lambda choice: scores[f"tent {choice}"])  # also where tent is off
    return chosen


def condition_answers(cfg, model, data, photos, tasks, galleries, condition, chosen, methods):
    """{direction: {method: {"R@1" | "R@10": sums by photo, "share"}}} of queries under a condition, over orders."""
    raw_all = corrupted_items(data, *tasks[0].query, tasks[0].items, *condition)  # the first has all items
    answers = {}
    for d in tasks:
        raw, answers[d.name] = take(raw_all, torch.searchsorted(tasks[0].items, d.items)), {}
        for method in methods:
            fixed = method in ("none", "memory-episodic") or chosen[method] is None
            runs, shares = [], []
            for i in range(1 if fixed else cfg.evaluation.n_orders):
                order = stream_order(len(d.items), cfg.seed + i)
                z, share = answer_stream(model, data, *d.query, raw, galleries[d.name], method, chosen[method], order,
                                         cfg.evaluation.stream_batch)
                runs.append(photos.row(d, ranks(d, z, galleries[d.name]), ks=(1, 10)))
                shares.append(share)
            answers[d.name][method] = {**{k: torch.stack([run[k] for run in runs]).mean(0) for k in runs[0]},
                                       "share": float(np.mean(shares))}
    return answers


def stream_answers(cfg, model, data, photos, tasks, galleries, chosen, methods):
    """{direction: {method: {column: sums by photo}}} of the other streams: one severity, one order."""
    (modality,), answers = tasks[0].query, {}
    kinds = [(kind, amounts[min(1, len(amounts) - 1)]) for kind, amounts in CORRUPTIONS[modality].items()]
    if len(kinds) == 1:
        kinds = [(kind, amount) for kind, amounts in CORRUPTIONS[modality].items() for amount in amounts]
    raw_of = [corrupted_items(data, modality, tasks[0].items, *kind) for kind in kinds]
    for d in tasks:
        places = torch.searchsorted(tasks[0].items, d.items)
        raws, n, gallery = [take(raw, places) for raw in raw_of], len(d.items), galleries[d.name]
        shifted = corrupted_items(data, d.gallery, d.gallery_items, *second_severity(d.gallery))
        shifted = embed(model, data, (d.gallery,), d.gallery_items, shifted)
        order = stream_order(n, cfg.seed)
        kind_of = torch.arange(n) % len(kinds)
        together = torch.cat(raws) if isinstance(raws[0], torch.Tensor) else [x for raw in raws for x in raw]
        continual = torch.cat([order + i * n for i in range(len(kinds))])
        mixed, batch = take(together, kind_of * n + torch.arange(n)), cfg.evaluation.stream_batch
        streams = {"mixed": (mixed, gallery, order, batch), "continual": (together, gallery, continual, batch),
                   "batch 1": (raws[0], gallery, order, 1), "batch 64": (raws[0], gallery, order, 64),
                   "gallery too": (raws[0], shifted, order, batch)}
        answers[d.name] = {method: {} for method in methods}
        for method, (name, (raw, gallery, order, batch)) in itertools.product(methods, streams.items()):
            z, _ = answer_stream(model, data, modality, raw, gallery, method, chosen[method], order, batch)
            sums = [photos.row(d, ranks(d, part, gallery), ks=(10,))["R@10"] for part in z.split(n)]
            answers[d.name][method][f"{name} R@10"] = torch.stack(sums).sum(0)
    return answers


def second_severity(modality):
    kind, amounts = next(iter(CORRUPTIONS[modality].items()))
    return kind, amounts[1]


def run_protocol(cfg, model, data, photos, folder):
    """Frozen galleries, corrupted queries, every method in every direction -> {"tables", "chosen", "curves", ..}."""
    e, before = cfg.evaluation, {name: value.clone() for name, value in model.state_dict().items()}
    tasks = directions(data, "test")[:N_DIRECTIONS]
    galleries = {d.name: embed(model, data, (d.gallery,), d.gallery_items) for d in tasks}
    frozen = {name: digest(gallery) for name, gallery in galleries.items()}
    has_slots = isinstance(model.central, SlotMemory)
    methods = [method for method in METHODS if has_slots or not method.startswith("memory")]
    weights = digest(torch.cat([value.double().flatten().cpu() for value in before.values()]))
    signature = [common.run_facts(cfg, data)["source"], data.fingerprint, weights, cfg.seed]
    chosen, answers, others = {}, {}, {}  # answers: {(modality, condition): answers}
    modalities = [m for m in MODALITIES if any(d.query == (m,) for d in tasks)]
    conditions = {m: [CLEAN, *((kind, amount) for kind, amounts in CORRUPTIONS[m].items()
                               for amount in amounts[:e.n_severities])] for m in modalities}
    without = [m for m in modalities if not has_corrupted(data, m, conditions[m])]
    for m in modalities:
        own = sorted((d for d in tasks if d.query == (m,)), key=lambda d: -len(d.items))
        if m in without:
            chosen[m] = dict.fromkeys(methods)
            conditions[m] = [CLEAN]
            continue
        chosen[m] = kept_file(folder / f"ttt/{m},settings.pt", signature, functools.partial(
            choose_settings, cfg, model, data, m, methods))
        for condition in common.progress(conditions[m], f"test time, {m}"):
            print(f"test time: {m}, {' '.join(map(str, condition)).strip() if condition[0] else 'clean'}", flush=True)
            path = folder / f"ttt/{m}{condition_suffix(*condition) or ',clean'}.pt"
            answers[m, condition] = kept_file(path, signature, functools.partial(
                condition_answers, cfg, model, data, photos, own, galleries, condition, chosen[m], methods))
        if e.more_streams:
            others |= kept_file(folder / f"ttt/{m},streams.pt", signature, functools.partial(
                stream_answers, cfg, model, data, photos, own, galleries, chosen[m], methods))
    for d in tasks:
        again = digest(embed(model, data, (d.gallery,), d.gallery_items))
        assert digest(galleries[d.name]) == frozen[d.name] == again
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    tasks = [d for d in tasks if d.query[0] not in without]
    return {**protocol_results(photos, tasks, conditions, answers, others, chosen, methods, without),
            "gallery_sha256": frozen}


def has_corrupted(data, modality, conditions):
    """Whether a cached modality has features of its corrupted queries."""
    wanted = [*conditions, HELD_OUT[modality]]
    return modality not in data.features or all(
        feature_file(data.features_dir, modality, condition_suffix(*condition)).exists() for condition in wanted)


def protocol_results(photos, tasks, conditions, answers, others, chosen, methods, without):
    """Tables, curves, notes and verdicts of what `run_protocol` measured."""
    rows, pairs, curves, chances, changes = {}, [], {}, {}, {}
    for d in tasks:
        (m,), corrupted = d.query, [condition for condition in conditions[d.query[0]] if condition != CLEAN]
        chance = ranks(d, torch.ones(len(d.ids), 1), torch.ones(len(d.gallery_ids), 1))
        chances[d.name] = {k: 100 * chance[f"chance@{k}"].mean().item() for k in (1, 10)}
        levels = {condition: CORRUPTIONS[m][condition[0]].index(condition[1]) + 1 for condition in corrupted}
        lines = {}
        for method in methods:
            of = {condition: answers[m, condition][d.name][method] for condition in conditions[m]}
            row = {f"clean R@{k}": of[CLEAN][f"R@{k}"] for k in (1, 10)}
            row |= {f"corrupted R@{k}": torch.stack([of[c][f"R@{k}"] for c in corrupted]).sum(0) for k in (1, 10)}
            rows[f"{d.name}, {method}"] = row
            xs = [0, *sorted(set(levels.values()))]
            sums = [sum(of[c]["R@10"].sum(1) for c in conditions[m] if levels.get(c, 0) == x) for x in xs]
            lines[method] = {"x": xs, "y": [100 * (total / count).item() for total, count in sums]}
            if method != "none":
                pairs.append((f"{d.name}, {method}", f"{d.name}, none"))
        lines["chance"] = {"x": xs, "y": [chances[d.name][10]] * len(xs)}
        curves[f"{d.name} R@10 (%)"] = {"xlabel": "severity of the query's corruption", "lines": lines}
    table, differences, items = common.interval_tables(rows, pairs, photos.n, percent)
    for d in tasks:
        table[f"{d.name}, chance"] = {column: chances[d.name][int(column.split("@")[1])] for column in row}
        for method in methods:
            shares = [answers[d.query[0], c][d.name][method]["share"] for c in conditions[d.query[0]]]
            table[f"{d.name}, {method}"]["adapted share"] = float(np.mean(shares))
    tables = {"test time": table, "test time, paired difference": differences}
    if others:
        of_streams = {f"{d}, {method}": row for d, of in others.items() for method, row in of.items()}
        stream_pairs = [(name, f"{name.rpartition(',')[0]}, none") for name in of_streams if ", none" not in name]
        tables["other streams"], tables["other streams, paired difference"], _ = common.interval_tables(
            of_streams, stream_pairs, photos.n, percent)
        for d in tasks:
            tables["other streams"][f"{d.name}, chance"] = dict.fromkeys(others[d.name]["none"], chances[d.name][10])
    for name, row in differences.items():
        direction, method = name.split(" - ")[0].rsplit(", ", 1)
        changes[direction, method] = row
    said = {m: ", ".join(f"{method} {choice if choice is not None else 'off'}" for method, choice in of.items()
                         if method != "none") for m, of in chosen.items() if m not in without}
    notes = [f"Chosen on dev ({m}, {HELD_OUT[m][0]}): {text}." for m, text in said.items()] + verdicts(changes)
    notes += [f"No features of corrupted {m} queries: encode.py flickr8k --corruptions makes them." for m in without]
    return {"tables": tables, "chosen": {f"test time, {m}": of for m, of in chosen.items()}, "curves": curves,
            "notes": notes, "items": items, "changes": changes}


def verdicts(changes):
    """What the paired intervals of R@10 say, in lines. changes: {(direction, method): row of differences}."""
    def names(column, side, control=False):  # whose interval lies wholly above (+1) or below (-1) zero
        return [f"{method}, {direction}" for (direction, method), row in changes.items()
                if (method == "random") == control
                and min(side * row[f"{column} R@10 low"], side * row[f"{column} R@10 high"]) > 0]
    n = sum(method != "random" for _, method in changes)
    helped = names("corrupted", 1)
    found = "; ".join(helped) or "NULL RESULT: no test-time method helps here"
    return [f"Corrupted R@10: {len(helped)} of {n} intervals lie above 0 (by chance about {n * 0.025:.1f}): {found}.",
            f"Below 0: {'; '.join(names('corrupted', -1)) or 'none'}. "
            f"The random control above 0: {'; '.join(names('corrupted', 1, control=True)) or 'none'}.",
            f"Damage to clean queries (R@10 below 0): {'; '.join(names('clean', -1)) or 'none'}."]


# ------------------------------------------------------------------------------------------------------- speech, text

@functools.lru_cache
def mel_filters(device):
    """[201, 80] float32 triangles of peak 1 (no area norm), evenly spaced from 0 to 8 kHz on HTK's scale, mel(f) =
    2595 log10(1 + f / 700 Hz)."""
    mels = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), N_MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    slopes = edges - torch.linspace(0, 8000, 201)[:, None]  # [201, 82], of each frequency to each edge
    widths = edges.diff()
    return torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp(min=0).to(device)


def mel_spectrogram(waveform):
    """Power mel spectrogram: periodic Hann windows of 25 ms every 10 ms, centred, the ends reflected.

    waveform: [.., n] float32 or float64 in [-1, 1], 16 kHz, n > 200. Returns: [.., 80, 1 + n // 160] >= 0, of the same
    type. Raises: RuntimeError (torch.stft) if n is too short to be reflected. Values: librosa's, htk=True, norm=None.
    """
    window = torch.hann_window(400, device=waveform.device, dtype=waveform.dtype)
    flat = waveform.reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(flat, 400, 160, window=window, center=True, pad_mode="reflect", return_complex=True)
    real, imaginary = torch.view_as_real(spectrum).square().unbind(-1)  # faster than a sum over the last axis
    filters = mel_filters(waveform.device).to(waveform.dtype)
    return (filters.T @ (real + imaginary)).view(*waveform.shape[:-1], N_MELS, -1)


def log_mel(waveform):
    """Natural log(mel + 1e-6) [.., 80, frames] of a waveform [.., samples]; see `mel_spectrogram`."""
    return torch.log(mel_spectrogram(waveform) + 1e-6)


def read_wav(raw):
    """[n] float32 at 16 kHz of a file's bytes: stereo is mixed down, other rates are resampled.

    A 16-bit file is read here, since a header may state a wrong length: then the samples go to the end of the file.
    soundfile reads all others. Raises: ValueError on less than 25 ms, or NaN; what soundfile raises.
    """
    at, kind, data = 12, None, None
    while raw[:4] == b"RIFF" and at + 8 <= len(raw):
        name, size = raw[at:at + 4], int.from_bytes(raw[at + 4:at + 8], "little")
        if name == b"fmt ":
            kind = struct.unpack("<HHIIHH", raw[at + 8:at + 24])  # format, channels, rate, .., bits
        if name == b"data":
            following = raw[at + 8 + size + size % 2:][:4]  # the name of another chunk, if the length is right
            is_right = size and (not following or (len(following) == 4 and following.replace(b" ", b"").isalnum()))
            data = raw[at + 8:at + 8 + size] if is_right else raw[at + 8:]
            break
        at += 8 + size + size % 2
    if kind and data is not None and kind[0] == 1 and kind[5] == 16:
        channels, rate = kind[1], kind[2]
        samples = np.frombuffer(data[:len(data) // (2 * channels) * 2 * channels], "<i2")
        wave = samples.reshape(-1, channels).astype(np.float32) / 32768
    else:
        import soundfile
        wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    wave = torch.from_numpy(wave.mean(1))
    if len(wave) * RATE < 400 * rate:
        raise ValueError(f"{len(wave)} samples at {rate} Hz, less than 25 ms")
    if not torch.isfinite(wave).all():
        raise ValueError("NaN or infinite samples")
    if rate != RATE:  # band-limited, by the spectrum of the whole recording
        n = round(len(wave) * RATE / rate)
        wave = torch.fft.irfft(torch.fft.rfft(wave)[:n // 2 + 1], n=n) * (n / len(wave))
    return wave


def words_of(caption):
    """Lower-cased words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def build_vocabulary(captions):
    """{token: id}: padding 0, unknown character 1, characters (as '##a'), and the words that occur at least twice, most
    frequent first."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    characters = sorted({c for word in counts for c in word})
    words = sorted((word for word, n in counts.items() if n >= 2), key=lambda word: (-counts[word], word))
    return {token: i for i, token in enumerate(["<pad>", "<unk>", *(f"##{c}" for c in characters), *words])}


def tokenise(captions, vocabulary, spell=0.0, draws=None):
    """[B, L <= 77] int64 token ids of B captions, padded with 0; an empty caption is one unknown character.

    Words that the vocabulary lacks, and with `draws` (a NumPy generator) a share `spell` of the others, are read by
    their characters.
    """
    rows = []
    for caption in captions:
        words, ids = words_of(caption), []
        by_characters = draws.random(len(words)) < spell if draws is not None else [False] * len(words)
        for word, is_spelled in zip(words, by_characters, strict=True):
            if word in vocabulary and not is_spelled:
                ids.append(vocabulary[word])
            else:
                ids += [vocabulary.get(f"##{c}", 1) for c in word]
        rows.append(torch.tensor(ids[:MAX_TOKENS] or [1]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


# --------------------------------------------------------------------------------------------------------------- data

@dataclass(eq=False)
class Data:
    """Photos and captions by row; photos and mels are memory-mapped, or on the device where they fit."""
    photos: torch.Tensor  # [P, 3, S, S] uint8; none with precomputed features
    captions: list  # [C] text
    photo_of: torch.Tensor  # [C] row of a photo
    mels: torch.Tensor  # [frames, 80] float16, log mel; none with precomputed features
    speech: torch.Tensor  # [C, 2]: first row of mels (or row of the features), number of frames (0: not spoken)
    wavs: list  # [C] path or None
    names: dict  # modality -> [C] "photo#k", [P] photos, [C] recordings or None
    splits: dict  # train | dev | test -> [n] caption rows
    vocabulary: dict
    mel_statistics: tuple  # (mean [80, 1], deviation [80, 1]) over training frames, on the device
    image_size: int
    counts: dict  # what was dropped or is missing
    device: torch.device
    fingerprint: str
    synthetic: bool
    features: dict = field(default_factory=dict)  # cached modality -> [n, F] or [n, L, F], of frozen encoders
    models: dict = field(default_factory=dict)  # cached modality -> name of the encoder
    features_dir: Path = Path()

    @property
    def modalities(self):
        return MODALITIES if (self.speech[:, 1] > 0).any() else MODALITIES[:2]

    def rows_of(self, modality, captions):
        """Rows of the modality's features that caption rows go with; captions that are not spoken have none."""
        if modality == "text":
            return captions
        if modality == "image":
            return self.photo_of[captions]
        return self.speech[captions[self.speech[captions, 1] > 0], 0]

    def epoch_size(self, captions):
        """Rows of an epoch with data.captions=`captions`; "one" is the mean, rounded, of what is drawn."""
        rows = self.splits["train"]
        if captions == "all":
            return len(rows)
        n_photos = len(self.photo_of[rows].unique())
        spoken = torch.bincount(self.photo_of[rows], self.speech[rows, 1] > 0)
        share = (spoken / torch.bincount(self.photo_of[rows]).clamp(min=1))[spoken > 0]
        return n_photos + round((1 - share).sum().item())


def decoded(folder, name, paths, decode, shape, dtype, workers):
    """Every file decoded once: (mapped rows [R, *shape], rows of each file [N], {file: why it could not be read},
    fingerprint of the contents).

    decode(bytes) -> array [rows, *shape]. The cache's name holds a hash of the transform's name and of the files'
    names, sizes and times; its index a checksum of the rows of every 256 files. Raises: UserError if they disagree.
    """
    def about(path):
        return (path.name, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (path.name,)

    def read(path):
        nothing = np.empty((0, *shape), dtype), b""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:  # any other OSError ends the run: it may pass, and the cache would keep it
            return *nothing, "no such file"
        try:
            return decode(raw), hashlib.sha256(raw).digest(), None
        except (MemoryError, torch.OutOfMemoryError, ImportError):
            raise
        except Exception as error:  # PIL and soundfile raise kinds of their own
            return *nothing, common.reason_of(error)
    key = json.dumps([name, shape, str(np.dtype(dtype)), [about(path) for path in paths]])
    stem = Path(folder) / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    data_file, index_file = stem.with_suffix(".bin"), stem.with_suffix(".json")
    blocks = [slice(start, start + 256) for start in range(0, len(paths), 256)]  # some at a time: they wait in memory
    if not index_file.exists():  # written last
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            own = tempfile.TemporaryDirectory(dir=stem.parent)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder} cannot be written ({error.strerror}); choose another") from None
        counts, checksums, problems, contents = [], [], {}, hashlib.sha256()

        def write(file):
            with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
                for block in common.progress(blocks, f"decoding {name}"):
                    checksum = 0
                    for path, (rows, content, problem) in zip(paths[block], pool.map(read, paths[block]), strict=True):
                        counts.append(len(rows))
                        contents.update(content or b"-")
                        if problem:
                            problems[path.name] = problem
                        raw = np.ascontiguousarray(rows, dtype).tobytes()
                        checksum = zlib.crc32(raw, checksum)
                        file.write(raw)
                    checksums.append(checksum)
        with own:  # runs that start together decode twice, but never into one file
            common.atomic_write(Path(own.name, data_file.name), write)
            os.replace(Path(own.name, data_file.name), data_file)
        common.write_json(index_file, {"counts": counts, "checksums": checksums, "problems": problems,
                                       "fingerprint": contents.hexdigest()[:16]})
    damaged = UserError(f"{data_file} is damaged; delete it and {index_file.name} to decode the files again")
    index = common.read_json(index_file)
    if {"counts", "checksums", "problems", "fingerprint"} - index.keys():
        raise damaged
    n = sum(index["counts"])
    if not data_file.is_file() or data_file.stat().st_size != n * math.prod(shape) * np.dtype(dtype).itemsize:
        raise damaged
    rows = np.memmap(data_file, dtype, mode="c", shape=(n, *shape)) if n else np.empty((0, *shape), dtype)
    ends = np.cumsum([0, *(sum(index["counts"][block]) for block in blocks)])
    found = [zlib.crc32(rows[start:end]) for start, end in itertools.pairwise(ends.tolist())]
    if found != index["checksums"]:
        raise damaged
    counts = torch.tensor(index["counts"], dtype=torch.int64)
    return torch.from_numpy(rows), counts, index["problems"], index["fingerprint"]


def decode_photo(raw, size):
    """[1, 3, size, size] uint8 of a file's bytes, squeezed to a square: a crop would cut off what captions tell of."""
    return common.decode_image(raw, size, crop=False).transpose(2, 0, 1)[None]


def decode_speech(raw, device):
    """[frames <= 1024, 80] float16 log mel of a file's bytes."""
    return log_mel(read_wav(raw).to(device)).T[:MAX_FRAMES].half().cpu().numpy()


def find(root, *names):
    """The first of root/name that exists. Raises: UserError with what to do."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root / names[0]}: no such file or folder; download Flickr8k_Dataset.zip and Flickr8k_text.zip "
                    "(github.com/jbrownlee/Datasets, release Flickr8k) and flickr_audio "
                    "(sls.csail.mit.edu/downloads/flickraudio), set data.dir=, or try --demo")


def read_lines(path):
    """[(number from 1, line)] of a text file, blank lines left out. Raises: UserError if it cannot be read."""
    text = common.guarded(lambda p: p.read_text(encoding="utf-8-sig"), path)  # without the mark that some editors put
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_captions(root):
    """({photo: {number: caption}}, file) of Flickr8k.token.txt (`name.jpg#k<TAB>caption`), or of Kaggle's captions.txt
    (CSV: image,caption)."""
    names = ("Flickr8k.token.txt", "captions.txt")
    path = find(root, *(f"{folder}{name}" for name in names for folder in ("Flickr8k_text/", "")))
    captions, is_csv = {}, path.name == "captions.txt"
    for number, line in read_lines(path):
        if is_csv:
            row = [] if line.count('"') % 2 else next(csv.reader([line]))  # an open quote would hide the lines after it
            if len(row) != 2:
                raise UserError(f"{path}: line {number}: expected image,caption or image,\"caption, with commas\", "
                                f"found {line[:60]!r}")
            if number > 1 or row[0] != "image":
                of_photo = captions.setdefault(row[0].strip(), {})
                of_photo[len(of_photo)] = row[1].strip()
        else:
            parts = re.fullmatch(r"(.+)#(\d{1,9})\t(.*)", line)
            if not parts:
                raise UserError(f"{path}: line {number}: expected name.jpg#k<TAB>caption, found {line[:60]!r}")
            captions.setdefault(parts[1], {})[int(parts[2])] = parts[3].strip()
    return captions, path


def read_speech_list(root):
    """({(photo, number): wav}, file) of flickr_audio/wav2capt.txt (`<wav> <photo> #k`); without it ({}, None)."""
    if not (root / "flickr_audio").is_dir():
        return {}, None
    path, speech = find(root, "flickr_audio/wav2capt.txt"), {}
    for number, line in read_lines(path):
        words = line.split()
        if len(words) != 3 or not re.fullmatch(r"#?\d{1,9}", words[2]):
            raise UserError(f"{path}: line {number}: expected <wav> <photo> #k, found {line[:60]!r}")
        speech[words[1], int(words[2].lstrip("#"))] = root / "flickr_audio/wavs" / words[0]
    return speech, path


def read_splits(root):
    """({train | dev | test: photos}, files). Raises: UserError if a photo is in two, or twice in one."""
    splits, files, seen = {}, [], {}
    for split in ("train", "dev", "test"):
        files.append(find(root, f"Flickr8k_text/Flickr_8k.{split}Images.txt", f"Flickr_8k.{split}Images.txt"))
        splits[split] = [name for _, name in read_lines(files[-1])]
        for name in splits[split]:
            if name in seen:
                raise UserError(f"{files[-1]}: {name} is in {seen[name]} too; a photo belongs to one split, once")
            seen[name] = split
    return splits, files


PHOTO_FOLDERS = ("Flickr8k_Dataset", "Flicker8k_Dataset", "Images")


def feature_file(folder, modality, suffix=""):
    return Path(folder) / f"{modality}_features{suffix}.pt"


def read_features(folder, modality, suffix, names, model=None):
    """(features [R, ..] float32, whether each of the names has some [N], name of the encoder).

    A name may lack features only if the file lists it as unreadable. model: what must have made them, if it is known.
    Raises: UserError on a file of another kind, non-finite features, or features of other files.
    """
    path = feature_file(folder, modality, suffix)
    remedy = "make it with encode.py flickr8k" + (" --corruptions" if suffix else f", or set model.{modality}_encoder=")
    if not path.exists():
        raise UserError(f"{path}: no such file; {remedy}, or set data.features_dir=")
    content = common.guarded(lambda p: torch.load(p, map_location="cpu", weights_only=True), path)
    is_right = isinstance(content, dict) and isinstance(content.get("feats"), torch.Tensor) and isinstance(
        content.get("ids"), list) and content["feats"].ndim in ((2, 3) if modality == "audio" else (2,))
    if not is_right or len(content["feats"]) != len(content["ids"]) or len(set(content["ids"])) != len(content["ids"]):
        raise UserError(f"{path}: expected a dict of feats [N, D] (or [N, layers, D]) and N different ids; {remedy}")
    if model is not None and content.get("model") != model:
        raise UserError(f"{path}: made by {content.get('model')}, the features of clean queries by {model}; {remedy}")
    row_of = {name: i for i, name in enumerate(content["ids"])}
    unreadable = set(content.get("unreadable", ()))
    missing = [name for name in names if name not in row_of and name not in unreadable]
    if missing:
        raise UserError(f"{path}: no features of {len(missing)} of {len(names)} items, such as {missing[0]}; {remedy}")
    feats = content["feats"][[row_of[name] for name in names if name in row_of]].float()
    if not torch.isfinite(feats).all():
        raise UserError(f"{path}: NaN or infinite features; {remedy}")
    return feats, torch.tensor([name in row_of for name in names]), content.get("model")


def load_data(cfg):
    """`Data` of cfg; photos and speech are decoded into the cache the first time, unless their encoder is cached.
    Vocabulary and mel statistics come from the training split alone.

    Raises: UserError naming the file, what was expected and found: missing or unreadable lists, a photo in two splits,
    fewer than two photos with captions in a split, speech for fewer than two training captions, or other features.
    """
    device, root, workers = common.pick_device(cfg.device), Path(cfg.data.dir), cfg.num_workers
    features_dir = Path(cfg.data.features_dir or root)
    cached = [m for m in MODALITIES if getattr(cfg.model, f"{m}_encoder") == "cached"]
    captions, caption_file = read_captions(root)
    spoken, speech_file = read_speech_list(root)
    listed, files = read_splits(root)
    files += [caption_file, *([speech_file] if speech_file else []), *(feature_file(features_dir, m) for m in cached
                                                                     if m != "audio" or speech_file)]
    split_of = {name: split for split, names in listed.items() for name in names}
    names, size = list(split_of), -(-cfg.model.image_size * 8 // 7)
    features, models, contents, photos = {}, {}, "", torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    if "image" in cached:
        folders = [root / name for name in PHOTO_FOLDERS if (root / name).is_dir()]
        names = [name for name in names if not folders or (folders[0] / name).exists()]
        features["image"], readable, models["image"] = read_features(features_dir, "image", "", names)
        problems = {name: "no features" for name in split_of.keys() - set(itertools.compress(names, readable.tolist()))}
    else:
        folder = find(root, *PHOTO_FOLDERS)
        photos, readable, problems, contents = decoded(
            cfg.data.cache_dir, f"photos{size}", [folder / name for name in names],
            lambda raw: decode_photo(raw, size), (3, size, size), np.uint8, workers)
    names = list(itertools.compress(names, readable.tolist()))
    items = [(name, k) for name in names for k in sorted(captions.get(name, {}))]
    splits = {split: torch.tensor([i for i, (name, _) in enumerate(items) if split_of[name] == split])
              for split in listed}
    for split, rows in splits.items():
        n = len({items[i][0] for i in rows.tolist()})
        if n < 2:
            why = f" (the first that cannot be read: {': '.join(next(iter(problems.items())))})" if problems else ""
            raise UserError(f"{root}: {n} of {len(listed[split])} listed {split} photos can be read and have captions"
                            f"{why}; check the folders")
    if "text" in cached:
        ids = [f"{name}#{k}" for name, k in items]
        features["text"], _, models["text"] = read_features(features_dir, "text", "", ids)
    wavs = [spoken.get(item) for item in items]
    read_out = [i for i, path in enumerate(wavs) if path]
    speech, mels = torch.zeros(len(items), 2, dtype=torch.int64), torch.empty(0, N_MELS)
    if "audio" in cached and speech_file:
        features["audio"], has_features, models["audio"] = read_features(features_dir, "audio", "", [
            wavs[i].name for i in read_out])
        frames, n_broken, broken = has_features.long(), int((~has_features).sum()), {}
    else:
        mels, frames, broken, digest_of_speech = decoded(
            cfg.data.cache_dir, "mels", [wavs[i] for i in read_out], lambda raw: decode_speech(raw, device), (N_MELS,),
            np.float16, workers if device.type == "cpu" else 1)
        contents, n_broken = contents + digest_of_speech, len(broken)
    speech[read_out] = torch.stack([frames.cumsum(0) - frames, frames], dim=1)
    if speech_file and (speech[splits["train"], 1] > 0).sum() < 2:
        why = f" (the first that cannot be read: {': '.join(next(iter(broken.items())))})" if broken else ""
        raise UserError(f"{speech_file}: fewer than 2 of its {len(spoken)} recordings are readable and of a caption of "
                        f"a training photo{why}; check flickr_audio, or move it away to run on image and text alone")
    mean, deviation = torch.zeros(N_MELS), torch.ones(N_MELS)
    if len(mels):
        n_train = speech[splits["train"]].sum(1).max()  # train comes first
        sample = mels[:n_train][::max(1, int(n_train) // 2**18)].double()
        mean, deviation = sample.mean(0), sample.std(0).clamp(min=1e-3)
    text = [captions[name][k] for name, k in items]
    counts = {"photos missing or broken": len(problems),
              "photos without captions": sum(name not in captions for name in names),
              "captions not spoken": len(items) - len(read_out), "recordings missing or broken": n_broken}
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
    photos = photos.to(device) if photos.numel() < room else photos
    row_of = {name: i for i, name in enumerate(names)}
    return Data(
        photos, text, torch.tensor([row_of[name] for name, _ in items]), mels, speech, wavs,
        {"text": [f"{name}#{k}" for name, k in items], "image": names, "audio": [path and path.name for path in wavs]},
        splits, build_vocabulary([text[i] for i in splits["train"].tolist()]),
        tuple(x.float()[:, None].to(device) for x in (mean, deviation)), cfg.model.image_size, counts, device,
        hashlib.sha256(f"{common.fingerprint(files)}{contents}".encode()).hexdigest()[:16],
        (root / "SYNTHETIC_DEMO").exists(), {m: x.to(device) for m, x in features.items()}, models, features_dir)


def random_data(cfg):
    """Random photos, captions of 12 of 4,520 words and 5 s of speech, one batch: for profile_flops.py without data."""
    device, n, size = common.pick_device(cfg.device), cfg.training.batch_size, -(-cfg.model.image_size * 8 // 7)
    draws, words = np.random.default_rng(0), [f"w{i}" for i in range(4520)]
    if "cached" in (cfg.model.text_encoder, cfg.model.image_encoder, cfg.model.audio_encoder):
        raise UserError("the width of precomputed features is not known without data.features_dir=")
    tokens = ["<pad>", "<unk>", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'\""), *words]
    speech = torch.stack([torch.arange(n) * 500, torch.full((n,), 500)], dim=1)
    captions = [" ".join(draws.choice(words, 12)) for _ in range(n)]
    statistics = torch.zeros(N_MELS, 1, device=device), torch.ones(N_MELS, 1, device=device)
    splits = dict.fromkeys(("train", "dev", "test"), torch.arange(n))
    return Data(torch.randint(256, (n, 3, size, size), dtype=torch.uint8), captions, torch.arange(n),
                torch.randn(500 * n, N_MELS).half(), speech, [None] * n, {}, splits,
                {token: i for i, token in enumerate(tokens)}, statistics, cfg.model.image_size, {}, device, "", True)


def raw_items(data, modality, items, draws=None, share=slice(None)):
    """What is queried with, before it becomes the model's input: captions, photos [n, 3, S, S] uint8, log mels [T, 80]
    each, or features [n, ..].

    items: [n] rows of photos for modality image, else of captions. Photos are cropped in the middle, or with `draws` (a
    NumPy generator) anywhere and half of them mirrored. share: those of the items that are wanted.
    """
    n, items = len(items), items[share]
    if modality in data.features:
        rows = data.speech[items, 0] if modality == "audio" else items
        return data.features[modality][rows.to(data.device, non_blocking=True)]
    if modality == "text":
        return [data.captions[i] for i in items.tolist()]
    if modality == "audio":
        return [data.mels[first:first + n] for first, n in data.speech[items].tolist()]
    side, margin = data.image_size, data.photos.shape[-1] - data.image_size
    corners = np.full((len(items), 2), margin // 2)
    if draws is not None:
        corners = draws.integers(margin + 1, size=(n, 2))[share]
    crops = torch.stack([data.photos[p, :, y:y + side, x:x + side]
                         for p, (y, x) in zip(items.tolist(), corners.tolist(), strict=True)])
    if draws is not None:
        mirrored = torch.from_numpy(draws.random(n)[share] < 0.5).nonzero()[:, 0].to(crops.device)
        crops[mirrored] = crops[mirrored].flip(3)
    return crops


def as_input(data, modality, raw):
    """{argument: tensor} of the model for raw items."""
    if modality in data.features:
        return {modality: raw.to(data.device, non_blocking=True).float()}
    if modality == "text":
        return {"text": tokenise(raw, data.vocabulary).to(data.device)}
    if modality == "image":
        return {"image": raw.to(data.device, non_blocking=True).float().sub_(115).div_(68)}
    frames = torch.tensor([len(x) for x in raw], device=data.device)
    padded = nn.utils.rnn.pad_sequence(raw, batch_first=True) if raw else torch.zeros(0, 1, N_MELS)
    padded = padded.to(data.device, non_blocking=True)
    mean, deviation = data.mel_statistics
    return {"audio": (padded.float().transpose(1, 2) - mean) / deviation, "audio_frames": frames}  # [A, 80, T]


def spec_augment(audio, frames, draws, n=None, share=slice(None)):
    """Zeroes (the mean) in every row of audio [A, 80, T] two bands of up to 12 mels and two spans of up to 15% of its
    frames (Park et al. 2019). The rows are a `share` of n (None: of A)."""
    def in_spans(length, widest, places):
        """[A, places] bool: in one of two spans of up to `widest` places, anywhere in length [A, 1, 1] or a number."""
        numbers = draws.random((2, n or len(audio), 2, 1))[:, share]
        numbers = torch.from_numpy(numbers.astype(np.float32)).to(audio.device)
        start, width = (numbers[0] * length).floor(), (numbers[1] * widest).floor()
        place = torch.arange(places, device=audio.device)
        return ((place >= start) & (place < start + width)).any(1)
    length = frames[:, None, None]
    band, span = in_spans(N_MELS, 13, N_MELS), in_spans(length, 0.15 * length, audio.shape[2])
    return audio * ~(band[:, :, None] | span[:, None])


def make_batch(data, indices, draws=None, share=lambda n: slice(n)):
    """Model input of caption rows [B]: text [B, L], image [B, ...], photo [B] ids; and of the A spoken ones audio
    [A, 80, T], audio_frames [A], audio_rows [A] (their places in the batch). Cached modalities: features [B or A, ..].

    draws: a NumPy generator for augmentation. share(n) -> which of n rows are to be encoded: text, image and audio are
    of these alone.
    """
    photos, spoken = data.photo_of[indices], data.speech[indices, 1].nonzero()[:, 0]
    own, own_spoken = share(len(indices)), share(len(spoken))
    batch = as_input(data, "text", raw_items(data, "text", indices, share=own))
    if draws is not None and "text" not in data.features:
        text = tokenise(raw_items(data, "text", indices), data.vocabulary, SPELL, draws)[own]
        batch["text"] = text.to(data.device)
    batch |= {**as_input(data, "image", raw_items(data, "image", photos, draws, own)),
              "photo": photos.to(data.device, non_blocking=True)}
    if len(spoken):
        batch |= as_input(data, "audio", raw_items(data, "audio", indices[spoken], share=own_spoken))
        batch["audio_rows"] = spoken.to(data.device, non_blocking=True)
        if draws is not None and "audio_frames" in batch:
            batch["audio"] = spec_augment(batch["audio"], batch["audio_frames"], draws, len(spoken), own_spoken)
    return batch


@functools.lru_cache(maxsize=2)
def epoch_batches(data, seed, captions, n_batches, epoch):
    """The caption rows of every batch of an epoch: a pure function of seed and epoch.

    "one": a caption of each photo at random; where that is not spoken and another one is, that one too. Speech of
    similar length shares a batch, in epochs of many batches.
    """
    draws, rows = np.random.default_rng([seed, epoch]), data.splits["train"].numpy()
    photo, frames = data.photo_of.numpy(), data.speech.numpy()[:, 1]
    if captions == "one":
        order = draws.permutation(rows)
        first = order[np.unique(photo[order], return_index=True)[1]]
        spoken = order[frames[order] > 0]
        heard = spoken[np.unique(photo[spoken], return_index=True)[1]]
        rows = np.concatenate([first, heard[np.isin(photo[heard], photo[first[frames[first] == 0]])]])
    rows = draws.permutation(rows)
    length = frames[rows]
    if length.any():  # those without speech anywhere in between
        length = np.where(length > 0, length, draws.choice(length[length > 0], len(rows)))
    bucket = max(1, min(BUCKET, n_batches // 10)) * -(-len(rows) // n_batches)
    batches = np.array_split(rows[np.lexsort((length, np.arange(len(rows)) // bucket))], n_batches)
    return [torch.from_numpy(batches[i]) for i in draws.permutation(n_batches)]


# -------------------------------------------------------------------------------------------------------- plots, main

def plot_changes(path, changes, synthetic):
    """Change of R@10 by every method with its paired interval: clean and corrupted queries. changes: {(direction,
    method): row of differences}."""
    names = list(dict.fromkeys(direction for direction, _ in changes))
    methods = list(dict.fromkeys(method for _, method in changes))
    figure, axes = common.new_figure(2, width=5.4, height=0.9 + 0.75 * len(names))
    for axis, on in zip(axes, ("clean", "corrupted"), strict=True):
        column = f"{on} R@10"
        for i, method in enumerate(methods):
            rows = {direction: row for (direction, m), row in changes.items() if m == method}
            place = [names.index(direction) + 0.11 * (i - len(methods) / 2) for direction in rows]
            value = np.array([row[column] for row in rows.values()])
            low, high = (np.array([row[f"{column} {side}"] for row in rows.values()]) for side in ("low", "high"))
            reach = np.maximum([value - low, high - value], 0)
            axis.errorbar(value, place, xerr=reach, fmt=".", capsize=2, label=method)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlabel="change of R@10 (points), paired 95%", title=f"{on} queries")
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("test-time methods against none" + (" (synthetic data)" if synthetic else ""))
    common.save_figure(figure, path)


STAGES = ("all", "cache", "train", "evaluate", "ttt")


def load_model(folder):
    """(MultiModalMemoryNetwork of a finished run in eval mode, its Config). `model.vocabulary` and
    `model.mel_statistics` make its inputs, as in `tokenise` and `as_input`. Raises: UserError."""
    cfg = common.load_config(Config, Path(folder) / "config.yaml")
    best = common.guarded(common.load_checkpoint, Path(folder) / "best_model.pt")
    model = MultiModalMemoryNetwork(**best["arguments"])
    common.load_best(folder, model)
    model.vocabulary, model.mel_statistics = best["vocabulary"], best["mel_statistics"]
    return model, cfg


def use_demo(cfg):
    """Write the stand-in tree and point the config at it."""
    torch.set_num_threads(1)  # for so small a model a second thread only waits
    cfg.data.dir, cfg.data.cache_dir = demo_data.write_flickr8k("data/demo/flickr8k"), "data/demo/cache"
    cached = [m for m in MODALITIES if getattr(cfg.model, f"{m}_encoder") == "cached"]
    if cached:
        cfg.data.features_dir = "data/demo/flickr8k_features"
        write_demo_features(cfg.data)


def write_demo_features(data_cfg):
    """Stand-ins in features_dir for what encode.py flickr8k --corruptions writes, made by `simple_features`."""
    folder = Path(data_cfg.features_dir)
    if (folder / "COMPLETE").exists():
        return
    data = load_data(Config(device="cpu", data=data_cfg, model=ModelConfig(image_size=56)))
    folder.mkdir(parents=True, exist_ok=True)
    rows = {split: {"text": rows, "image": data.photo_of[rows].unique(), "audio": rows[data.speech[rows, 1] > 0]}
            for split, rows in {**data.splits, "all": torch.arange(len(data.captions))}.items()}
    for m in MODALITIES:
        asked = [(kind, amount, "test") for kind, amounts in CORRUPTIONS[m].items() for amount in amounts]
        for kind, amount, split in [(*CLEAN, "all"), *asked, (*HELD_OUT[m], "dev")]:
            items = rows[split][m]
            feats = simple_features(data, m, corrupted_items(data, m, items, kind, amount))
            content = {"feats": feats.view(len(feats), 2, -1) if m == "audio" else feats, "model": "stand-in",
                       "ids": [data.names[m][i] for i in items.tolist()]}
            path = feature_file(folder, m, condition_suffix(kind, amount))
            common.atomic_write(path, lambda file, content=content: torch.save(content, file))
    common.write_text(folder / "COMPLETE", "counts of words, pixels and mels, not of real encoders\n")


@common.exit_codes
def main(argv):
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo)
    if stage == "ttt" and not Path(cfg.output_dir, "checkpoint_latest.pt").exists():
        raise UserError(f"{cfg.output_dir}: no trained run to test; run the command without --stage first")
    with common.one_after_the_other():  # the first fills the caches
        data = load_data(cfg)
    for split, rows in data.splits.items():
        n_spoken = int((data.speech[rows, 1] > 0).sum())
        print(f"{split}: {len(data.photo_of[rows].unique()):,} photos, {len(rows):,} captions, {n_spoken:,} spoken")
    counts = ", ".join(f"{name} {n:,}" for name, n in data.counts.items())
    print(f"vocabulary: {len(data.vocabulary):,} tokens; {counts}")
    if len(data.modalities) < 3:
        print(f"NOTE: {cfg.data.dir} has no folder flickr_audio: image and text alone")
    if stage in ("all", "train"):
        train(cfg, data)
    if common.process()[0]:
        return  # the first of several processes evaluates
    if stage in ("all", "evaluate", "ttt"):
        results = common.published(cfg, data.fingerprint)
        if results is None or (stage != "evaluate" and not results["test_time"]):
            results = evaluate(cfg, data, test_time=stage != "evaluate")
        common.publish(cfg.output_dir, results)


if __name__ == "__main__":
    sys.exit(main())
