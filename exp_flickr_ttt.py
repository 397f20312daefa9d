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

Measured: flickr8k_features, 125 test photos, seeds 1-3, R@10: text -> image 88.1 +- 0.2 (CCA 87.2), audio -> image
55.2 +- 1.6 (30.4), text -> audio 95.5 +- 0.5 (96.0), 17 s of training on one CPU thread; under white noise `statistics`
adds 21.5 [16.3, 26.3] points to audio -> text, memories that adapt add nothing.

Shapes: B rows a batch (a row is a caption with its photo), A <= B of them spoken, L tokens or layers of features, T mel
frames, D = latent_dim, M slots, Q queries, G gallery rows.

Deviations from the recipe this follows:
- memories attend by cosine and learned temperature: nn.MultiheadAttention over small slots gives every slot 1 / M;
- the latent is the mean of the encodings that are there, weighed by learned confidences, plus the fusion's output;
- the gallery holds unique photos, captions of one photo are no negatives, text <-> audio is strict (the caption read);
- the recipe's TENT cannot work (no graph under no_grad, an untrained entropy head, parameters chosen by 'memory' in
  their names, NaN of p log p): here softmax(query . gallery / temperature) has the entropy, LayerNorm affines adapt;
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
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import re
import sys
import uuid
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
N_DIRECTIONS = 6  # of `directions` that count in dev_recall and in the test-time protocol, as far as they are there
CCA_RIDGES, CCA_DIMS = (0.3, 1.0, 3.0), (32, 128)  # of the baseline, among which dev chooses
PHOTO_FOLDERS = ("Flickr8k_Dataset", "Flicker8k_Dataset", "Images")
STAGES = ("all", "cache", "train", "evaluate", "ttt")


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
    memory_size: int = ranged(64, ">= 4", "<= 65536")  # slots of the central memory; those of a modality have half
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
    cuda_graphs: bool = True  # a GPU replays a recorded training step (false: kernel by kernel, to debug it)
    num_workers: int = ranged(0, ">= 0")  # threads that decode files (0: one a core)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv, tables and pictures to Weights & Biases
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# -------------------------------------------------------------------------------------------------------------- model

def transformer(dim, n_heads, n_layers, dropout):
    """Pre-norm transformer layers [N, L, D] -> [N, L, D]."""
    activation = lambda x: F.gelu(x)  # noqa: E731, F.gelu itself has a fast path in eval mode, of other bits
    return nn.ModuleList(nn.TransformerEncoderLayer(dim, n_heads, 4 * dim, dropout, activation, batch_first=True,
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
    """Log mels [B, 80, T] or [B, 1, 80, T], of which `frames` [B] (None: all) are there -> [B, D]: stride-2
    convolutions, then the mean over time.

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

    def forward(self, audio, frames=None):
        audio = audio.squeeze(1)
        times = torch.arange(audio.shape[2], device=audio.device)
        frames = times.new_full((len(audio),), len(times)) if frames is None else frames
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
    """a [B, M] of slots [M, D] and x [B, D]: the softmax of x . slots / sqrt(D) over a row's top-k slots, else 0."""
    top = (x @ slots.T / slots.shape[1] ** 0.5).topk(topk, dim=1)
    return x.new_zeros(len(x), len(slots)).scatter(1, top.indices, top.values.softmax(1))


def memory_write(slots, x, topk, lr):
    """One write: m_k + lr * mean over the rows b that chose slot k of a_bk (x_b - m_k), a as in `slot_weights`.

    It is a step of gradient descent on 1/2 sum_k mean_b a_bk |m_k - x_b|^2 with a held fixed. Deviation from the
    recipe: the mean; its sum over b diverges once lr * sum_b a_bk passes 2.
    slots: [M, D] float. x: [B, D], detached here. topk: slots a row writes to, 1..M. lr: eta in (0, 1].
    Returns: new slots [M, D]; those that no row chose keep their bits.
    """
    x = x.detach().to(slots.dtype)
    a = slot_weights(slots, x, topk)
    n = (a > 0).sum(0)[:, None]  # [M, 1]
    return torch.where(n > 0, slots + lr * (a.T @ x - a.sum(0)[:, None] * slots) / n.clamp(min=1), slots)


class SlotMemory(nn.Module):
    """LayerNorm(x + read(x)) [B, D]: x asks, M learned slots are keys and values, n_heads cosines over a temperature.

    Slots start at the scale of the standardised encodings that ask: they are addressed by content from the start. Two
    ways to adapt: with `enable_ttt_updates`, in eval mode, the slots that all rows share move towards what they were
    asked, after the answer (online). With episodic=True, or a 0-d tensor of 1 or 0 that a GPU's recorded step reads,
    every row has slots of its own, written before the answer and gone after it. linear: linear attention (Katharopoulos
    et al. 2020) in place of the softmax.
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

    def adapt(self, x, share=1):
        """(w [B, M], x [B, D]): row b's own slots are m_k + w_bk (x_b - m_k); of a share 0 they stay m_k."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(self.slots.dtype)
            return share * self.ttt_lr * slot_weights(self.slots, x, self.ttt_topk), x

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
        return (self.log_scale.exp()[:, None] * cosines).softmax(2)

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
        y = self.norm(x + self.read(x, None if episodic is False else self.adapt(x, episodic)))
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

    text: [B, L <= 77] int64, 0 is padding. image: [B, 3, S, S] normalised pixels. audio, audio_frames: as in
    `AudioEncoder`, standardised. Of a modality in `features` instead [B, *features[modality]], of a frozen encoder.
    episodic: every row reads slots of its own.
    Raises: ValueError if nothing is given, or a modality that the model was built without.
    """

    def __init__(self, vocab_size=4565, latent_dim=256, memory_size=64, num_heads=4, num_layers=3, image_size=224,
                 patch_size=16, audio_channels=(64, 128, 256, 512), modalities=MODALITIES, features=None,
                 memory="slots", dropout=0.1, input_dropout=0.3, enable_ttt_updates=False, ttt_topk=8, ttt_lr=0.1):
        super().__init__()
        dim, features = latent_dim, features or {}
        encoders = {"text": lambda: TextEncoder(vocab_size, dim, num_heads, num_layers, dropout),
                    "image": lambda: ImageEncoder(image_size, patch_size, dim, num_heads, num_layers, dropout),
                    "audio": lambda: AudioEncoder(audio_channels, dim, dropout)}
        self.encoders = nn.ModuleDict({m: FeatureEncoder(features[m], dim, input_dropout) if m in features
                                       else encoders[m]() for m in modalities})

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
        self.feedback_steps = FEEDBACK_STEPS
        self.temperature, self.fused = 0.07, 0.5  # of the objective; build_model sets the config's
        self.through_update, self.use_amp = True, True

    def encode(self, modality, x, frames=None, episodic=False):
        """[B, D] of one modality after its memory, from the input x of its encoder; frames: of mels."""
        if modality not in self.encoders:
            raise ValueError(f"this model was trained without {modality}; it has {', '.join(self.encoders)}")
        encoder = self.encoders[modality]
        encoding = encoder(x) if frames is None else encoder(x, frames)
        return self.memories[modality](self.standardise[modality](encoding), episodic)

    def fuse_modalities(self, encodings, episodic=False):
        """Latent [B, D] of {modality: [B, D]}: their mean, weighed by learned confidences, plus the fusion's output,
        through the central memory. One that is not there is its type embedding alone, presence bit 0.

        Raises: ValueError if {}.
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
        given = {"text": (text, None), "image": (image, None), "audio": (audio, audio_frames)}
        encodings = {m: self.encode(m, *x, episodic) for m, x in given.items() if x[0] is not None}
        return {"central_latent": self.fuse_modalities(encodings, episodic), "encodings": encodings}


def all_memories(model):
    """{"text", .., "central": memory}."""
    return {**model.memories, "central": model.central}


def build_model(cfg, data):
    """MultiModalMemoryNetwork for the data, on their device. Raises: UserError on sizes that do not fit."""
    m = cfg.model
    if not m.audio_channels:
        raise UserError("model.audio_channels=[] leaves no convolution; give one number of channels or more")
    for size, part in (("latent_dim", "num_heads"), ("image_size", "patch_size")):
        if getattr(m, size) % getattr(m, part):
            raise UserError(f"model.{size}={getattr(m, size)} must be a multiple of model.{part}={getattr(m, part)}")
    if m.init == "cca" and len(data.features) < len(MODALITIES):
        raise UserError("model.init=cca starts the maps of precomputed features; set model.{text,image,audio}_encoder="
                        "cached, with speech, or model.init=random")
    arguments = {name: getattr(m, name) for name in (
        "latent_dim", "memory_size", "num_heads", "num_layers", "image_size", "patch_size", "audio_channels", "memory",
        "dropout", "input_dropout", "ttt_topk", "ttt_lr")}
    arguments |= {"vocab_size": len(data.vocabulary), "modalities": list(data.modalities),
                  "features": {modality: list(x.shape[1:]) for modality, x in data.features.items()}}
    model = MultiModalMemoryNetwork(**arguments)
    model.arguments = arguments  # best_model.pt keeps them
    for modality in data.features:
        encoder, x = model.encoders[modality], raw_items(data, modality, data.items(modality, "train"))
        mean, deviation = common.moments(x.flatten(1), torch.arange(len(x)))
        encoder.mean.copy_(mean.view_as(encoder.mean))
        encoder.deviation.copy_(deviation.view_as(encoder.mean))
    if m.init == "cca":
        start_at_cca(model, data)
    model.temperature, model.fused = cfg.losses.temperature, cfg.losses.fused
    model.through_update, model.use_amp = cfg.training.through_update, cfg.training.use_amp
    return model.to(data.device)


svd = functools.partial(torch.linalg.svd, full_matrices=False)


def cca(svd_x, svd_y, ridge_x, ridge_y, n_dims):
    """[A [F_x, n_dims], B [F_y, n_dims]], float64: canonical correlation analysis (Hotelling 1936) of paired centred
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
    half = model.central.norm.normalized_shape[0] // 2

    def inputs(modality, captions):
        x = raw_items(data, modality, data.items_of(modality, captions)).cpu()
        x = model.encoders[modality].standard(x).double()
        return x - x.mean(0)

    def solved(x, y, ridge_x, ridge_y):
        """Both maps of the CCA of x and y, the rows' norms of what they give having a root mean square of 1."""
        maps = cca(svd(x), svd(y), ridge_x, ridge_y, half)
        return [to / (z @ to).square().sum(1).mean().sqrt() for z, to in zip((x, y), maps, strict=True)]
    text, image = (inputs(m, data.splits["train"]) for m in ("text", "image"))
    said, audio = (inputs(m, data.items("audio", "train")) for m in ("text", "audio"))
    text_to_image, image_to_text = solved(text, image, 1, 3)
    text_to_audio, audio_to_text = solved(said, audio, 1, 1)
    maps = {"text": (text, text_to_image, text_to_audio),
            "image": (image, image_to_text, ridge_regression(image, text @ text_to_audio, 10)),
            "audio": (audio, ridge_regression(audio, said @ text_to_image, 0.3), audio_to_text)}
    for modality, (x, *halves) in maps.items():
        weight = (half ** 0.5 * torch.cat(halves, dim=1)).T.float()
        encoder = model.encoders[modality]
        encoder.project.weight.copy_(weight)
        encoder.project.bias.zero_()
        spread = (x.float() @ weight.T).std(0)  # BatchNorm would make all directions equally long
        model.standardise[modality].weight.copy_(spread)
    memories = all_memories(model).values()
    lasts = [memory.out if isinstance(memory, SlotMemory) else memory.mlp[-1] for memory in memories]
    for last in (model.fusion[-1], model.feedback[-1], *lasts):
        last.weight.mul_(0.1)
        last.bias.zero_()


def build_optimizer(cfg, model):
    """AdamW (Loshchilov & Hutter 2019); what Adam would hardly move, by its rate a step, has rates of its own: learned
    scalars ten times the others', confidences GATE_RATE, maps that start at a closed form a tenth."""
    rate, named = cfg.training.learning_rate, dict(model.named_parameters())
    scalars = [name for name in named if name.endswith(("log_scale", "layer_logits"))]
    gates = [name for name in named if name.startswith("confidence.")]
    maps = [name for name in named if name.endswith("project.weight")] if cfg.model.init == "cca" else []
    others = [name for name in named if name not in (*scalars, *gates, *maps)]
    decay = {"weight_decay": cfg.training.weight_decay}
    groups = ((others, decay), (scalars, {"weight_decay": 0.0, "lr": 10 * rate}),
              (gates, {"weight_decay": 0.0, "lr": GATE_RATE}), (maps, {**decay, "lr": rate / 10}))
    groups = [{"params": [named[name] for name in names], **settings} for names, settings in groups if names]
    return torch.optim.AdamW(groups, lr=rate, fused=next(model.parameters()).is_cuda)


# ---------------------------------------------------------------------------------------------------------- objective

def draw_passes(model):
    """What a step draws, from torch's CPU generator (of several processes the first one's), for its batch: `adapted`,
    whether the encodings of each modality, and of the pair, are adapted before they are used (through_update; on a GPU
    a tensor [4] of 0 and 1, which all recordings of a step share); `third`, the modality that the pair is against."""
    *coins, third = common.agreed([*torch.rand(len(MODALITIES) + 1).tolist(), int(torch.randint(len(MODALITIES), ()))])
    adapted = tuple(model.through_update and coin < 0.5 for coin in coins)
    if model.through_update and model.presence.is_cuda:
        adapted = torch.tensor(adapted, dtype=torch.float32).to(model.presence.device)
    return {"adapted": adapted, "third": MODALITIES[third]}


def retrieval_losses(model, batch):
    """{"text_image", "text_audio", "image_audio", "fused"}: scalars, InfoNCE (van den Oord et al. 2018) of the pairs,
    audio's over spoken rows.

    batch: as `make_batch` returns it; with fewer than two spoken rows there is only text_image. Captions of one photo
    are no negatives. Every modality goes through the fusion alone; "fused" is a random pair against the third. What
    `draw_passes` draws is in the batch, or drawn here. Of several processes each encodes its share of the rows and has
    the losses' parts.
    """
    drawn = batch if "third" in batch else draw_passes(model)
    adapted, third = dict(zip((*MODALITIES, "pair"), drawn["adapted"], strict=True)), drawn["third"]
    spoken, photo = batch.get("audio_rows"), batch["photo"]
    n = {"text": len(photo), "image": len(photo)}
    if spoken is not None and len(spoken) > 1:
        n["audio"] = len(spoken)
    encodings = {m: model.encode(m, batch[m], batch.get(f"{m}_frames"), adapted[m]) for m in n}
    latents = {m: model.fuse_modalities({m: e}, adapted[m]) for m, e in encodings.items()}
    latents = {m: F.normalize(z.float(), dim=1) for m, z in latents.items()}
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
    """Batches of an epoch; the last rows are spread over all of them. With captions "one" it is of the mean number."""
    rows = data.splits["train"]
    n = fewest = len(rows)
    if cfg.data.captions == "one":
        n_captions = torch.bincount(data.photo_of[rows])
        n_spoken = torch.bincount(data.photo_of[rows], (data.speech[rows, 1] > 0).double())
        silent = (1 - n_spoken / n_captions)[n_spoken > 0]  # the chance that a second caption joins
        fewest = int((n_captions > 0).sum())
        n = fewest + round(silent.sum().item())
    return max(1, min(-(-n // cfg.training.batch_size), fewest // 2))  # no batch of one row


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
    take_step = common.GraphedStep(train_step, model, optimizer, cfg.cuda_graphs, most=64)
    folder = common.open_run(cfg, data.fingerprint)  # after what can fail for its settings
    with common.Run(folder, cfg, model, optimizer, scheduler, steps_per_epoch=per_epoch) as run:
        for step in run.steps(last_step):
            epoch, place = divmod(step - 1, per_epoch)
            model.train()
            draws = np.random.default_rng([cfg.seed, epoch, place]) if cfg.training.augment else None
            rows = epoch_batches(data, cfg.seed, cfg.data.captions, per_epoch, epoch)[place]
            batch = make_batch(data, rows, draws, common.share)
            run.add(take_step({**batch, **draw_passes(model)}))  # stays on the device
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            if step % per_epoch == 0:
                row = {"epoch": epoch + 1, "step": step, **run.means(), **validate(model, data), "learning_rate": rate}
                run.log(row, score=row["dev_recall"], val_loss=row["dev_loss"], show=("loss", "dev_loss", "dev_recall"),
                        arguments=model.arguments, vocabulary=data.vocabulary,
                        mel_statistics=[x.cpu() for x in data.mel_statistics])

    def columns(start):
        return {name.removeprefix(start): name for name in run.history[-1] if name.startswith(start)}
    losses = {name: name for name in ("loss", "text_image", "text_audio", "image_audio", "fused")
              if name in run.history[-1]}
    panels = {"training loss": losses, "dev R@10 (%)": columns("dev_R@10 "),
              "memories: entropy / ln M, dev": columns("entropy_")}
    common.plot_history(folder / "training_curves.png", run.history, {n: p for n, p in panels.items() if p}, x="step",
                        mark=run.best_step, title=f"memory {cfg.model.memory}", synthetic=data.synthetic)
    return run.history


def validate(model, data):
    """Dev scores: `dev_loss`, InfoNCE over all pairs, `dev_recall`, the mean of R@1, 5 and 10 of all directions in %,
    each direction's R@10; and every memory's health: entropy of its attention / ln M, share of its slots in use."""
    tasks, recalls, row, loss = directions(data, "dev")[:N_DIRECTIONS], [], {}, 0.0
    z, health, _ = dev_latents(model, data)
    for d in tasks:
        q = ranks(d, z(*d.query, d.items), z(d.gallery, d.gallery_items))
        recalls += [100 * q[f"hit@{k}"].mean().item() for k in (1, 5, 10)]
        row[f"dev_R@10 {d.name}"] = recalls[-1]
    for a, b in itertools.combinations(dict.fromkeys(d.gallery for d in tasks), 2):
        rows = data.items("audio" if "audio" in (a, b) else "text", "dev")
        x, y = (z(m, data.items_of(m, rows)) for m in (a, b))
        loss += common.info_nce(x, y, 1 / model.temperature, data.photo_of[rows].to(data.device), "mask").item()
    row |= {f"{column}_{name}": of[column] for column in ("entropy", "usage") for name, of in health.items()}
    return {"dev_loss": loss, "dev_recall": float(np.mean(recalls)), **row}


@torch.no_grad()
def dev_latents(model, data):
    """(`embedded` of dev; {memory: its health while it was asked there}; {memory: its mean read [D]}).

    Health: entropy / ln M of the attention, mean over heads and queries; usage, the share of slots that are some
    query's first; scale, 1 / temperature; read_sd, sd of the read over queries / its root mean square.
    """
    asked = {name: [] for name, memory in all_memories(model).items() if isinstance(memory, SlotMemory)}
    hooks = [all_memories(model)[name].register_forward_pre_hook(lambda module, args, xs=xs: xs.append(args[0]))
             for name, xs in asked.items()]
    z, health, mean_reads = embedded(model, data, "dev"), {}, {}
    for hook in hooks:
        hook.remove()
    for name, xs in asked.items():
        if xs:
            memory, x = all_memories(model)[name], torch.cat(xs)
            weights, read = memory.attention(x), memory.read(x).float()
            entropy = torch.special.entr(weights).sum(2).mean() / math.log(weights.shape[2])
            health[name] = {"entropy": entropy.item(),
                            "usage": len(weights.argmax(2).unique()) / weights.shape[2],
                            "scale": memory.log_scale.exp().mean().item(),
                            "read_sd": (read.std(0, correction=0).norm() / read.square().mean(0).sum().sqrt()).item()}
            mean_reads[name] = read.mean(0)
    return z, health, mean_reads


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
    photo: torch.Tensor  # [Q] of each query


def directions(data, split):
    """The six directions of a split (two without speech), then variants: other right answers, and fused queries."""
    rows, photos, spoken = (data.items(m, split) for m in MODALITIES)
    heard = data.photo_of[spoken].unique()
    rows_heard = rows[torch.isin(data.photo_of[rows], heard)]
    tasks = [("text", rows, "image", photos, "photo", ""), ("image", photos, "text", rows, "photo", "")]
    if len(spoken) > 1:
        tasks += [("audio", spoken, "image", photos, "photo", ""), ("image", heard, "audio", spoken, "photo", ""),
                  ("text", spoken, "audio", spoken, "caption", ""), ("audio", spoken, "text", rows, "caption", ""),
                  ("audio", spoken, "text", spoken, "caption", ", spoken captions"),
                  ("text", rows_heard, "audio", spoken, "photo", ", same photo"),
                  ("audio", spoken, "text", rows, "photo", ", same photo"),
                  ("text + audio", spoken, "image", photos, "photo", ""),
                  ("text + image", spoken, "audio", spoken, "caption", ""),
                  ("image + audio", spoken, "text", rows, "caption", "")]

    def photo_of(modality, items):
        return items if modality == "image" else data.photo_of[items]
    return [Direction(f"{query} -> {gallery}{variant}", tuple(query.split(" + ")),
                      items, items if by == "caption" else photo_of(query, items),
                      gallery, answers, answers if by == "caption" else photo_of(gallery, answers),
                      photo_of(query, items)) for query, items, gallery, answers, by, variant in tasks]


def latents(model, inputs, episodic=False):
    """[B, D] float32, L2-normalised."""
    with common.full_precision():
        return F.normalize(model(**inputs, episodic=episodic)["central_latent"].float(), dim=1)


@torch.no_grad()
def embed(model, data, modalities, items, raw=None):
    """[N, D] latents of items [N] (photos if the modality is the image alone, else captions), or of raw items given for
    them. Raises: FloatingPointError if they are not finite."""
    model.eval()
    order = torch.arange(len(items))
    if "audio" in modalities and "audio" not in data.features:  # neighbours of similar length need little padding
        order = data.speech[items, 1].argsort(stable=True)
    parts = []
    for part in order.split(EMBED_ROWS):
        inputs = {}
        for m in modalities:
            rows = items[part] if len(modalities) == 1 else data.items_of(m, items[part])
            inputs |= as_input(data, m, raw_items(data, m, rows) if raw is None else take(raw, part))
        parts.append(latents(model, inputs))
    z = torch.cat(parts)[order.argsort().to(data.device)]
    if not torch.isfinite(z).all():
        raise FloatingPointError("non-finite embeddings: the weights have overflowed; lower training.learning_rate")
    return z


def embedded(model, data, split):
    """Function (modality, items of the split) -> [n, D]: each modality is embedded once."""
    items = {d.gallery: data.items(d.gallery, split) for d in directions(data, split)}
    z = {m: embed(model, data, (m,), rows) for m, rows in items.items()}
    return lambda m, rows: z[m][torch.searchsorted(items[m], rows).to(data.device)]


def take(raw, rows):
    return raw[rows.to(raw.device)] if isinstance(raw, torch.Tensor) else [raw[i] for i in rows.tolist()]


def ranks(direction, queries, gallery):
    return common.retrieval_per_query(queries, gallery, direction.ids, direction.gallery_ids, map_ks=())


def by_photo(data, d, q, name="hit", ks=(1, 5, 10)):
    """{"R@k": [2, n] float64} of the values of `ranks` (name "chance": of chance): their sum over the queries of each
    test photo, and how many these are. A bootstrap resamples photos with all of their captions."""
    photos = data.items("image", "test")
    place, n = torch.searchsorted(photos, d.photo), len(photos)
    counts = torch.bincount(place, minlength=n).double()
    return {f"R@{k}": torch.stack([torch.bincount(place, q[f"{name}@{k}"], minlength=n), counts]) for k in ks}


def percent(values, weights):
    """{column: mean in %} of {column: [2, n] of `by_photo`}; with weights [R, n] of photos [R] each. `mean R@10` is of
    the columns "<direction> R@10"."""
    columns = {}
    for name, sums in values.items():
        totals, counts = np.asarray(sums)
        if weights is None:
            columns[name] = 100 * totals.sum() / counts.sum()
        else:
            columns[name] = 100 * (weights @ totals) / np.maximum(weights @ counts, 1)
    of_directions = [value for name, value in columns.items() if "->" in name]
    return {"mean R@10": np.mean(of_directions, axis=0), **columns} if of_directions else columns


def evaluate(cfg, data, test_time=True):
    """Test the best model: retrieval beside chance and CCA, fused queries, what its parts do, and (test_time) the
    protocol of corrupted queries. Returns the results."""
    folder = common.open_run(cfg, data.fingerprint)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    step = common.load_best(folder, model)["step"]
    n = {split: len(data.items("image", split)) for split in data.splits}
    print(f"evaluating: {n['test']:,} test photos", flush=True)
    results = {
        **common.run_facts(cfg, data), "n": n["test"],
        "headline": f"{n['test']:,} test photos, recalls in %; memory {cfg.model.memory}, step {step}, seed {cfg.seed}",
        "chosen": {"step": step}, "n_photos": n, "counts": data.counts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": ["Intervals: 95%, bootstrap over the test photos with all of their captions; the model as it is."],
        "tables": {}, "curves": {}, "test_time": test_time and corrupted_fingerprint(data),
        "per_item": {"ids": [data.names["image"][i] for i in data.items("image", "test").tolist()]}}
    _, health, mean_reads = dev_latents(model, data)
    for title, (rows, pairs, chosen) in (("retrieval", retrieval_rows(model, data)),
                                         ("fused queries", fusion_rows(model, data)),
                                         ("parts of the trained model", part_rows(model, data, mean_reads))):
        results["chosen"] |= chosen
        if rows:
            add_tables(results, title, rows, pairs)
    if health:
        results["tables"]["memories, dev"] = health
    if test_time:
        run_protocol(cfg, model, data, folder, results)
    return results


def add_tables(results, title, rows, pairs):
    """The table of rows {row: {column: `by_photo`}}, and of differences of pairs of them, into the results."""
    table, differences, items = common.interval_tables(rows, pairs, results["n"], percent)
    results["tables"] |= {title: table, f"{title}, paired difference": differences}
    for kind, values in items.items():
        results["per_item"].setdefault(kind, {}).update({f"{title}: {name}": x for name, x in values.items()})


def retrieval_rows(model, data):
    """({row: values}, pairs, what dev chose) of every direction: the model, chance, CCA and, for speech and photos,
    what the model does with the true transcripts."""
    rows, pairs, chosen = {}, [], {}
    z, fitted = embedded(model, data, "test"), functools.cache(functools.partial(fit_cca, data))
    for d in directions(data, "test"):
        if len(d.query) > 1:
            continue
        sides = (*d.query, d.items), (d.gallery, d.gallery_items)
        q = ranks(d, *(z(*side) for side in sides))
        rows[d.name], rows[f"{d.name}, chance"] = by_photo(data, d, q), by_photo(data, d, q, "chance")
        pair = [m for m in MODALITIES if m in (*d.query, d.gallery)]
        project, chosen[f"CCA {', '.join(pair)}"] = fitted(*pair)
        rows[f"{d.name}, CCA"] = by_photo(data, d, ranks(d, *(project(*side) for side in sides)))
        pairs.append((d.name, f"{d.name}, CCA"))
        if pair == ["image", "audio"]:
            written = (z("text" if m == "audio" else m, items) for m, items in sides)
            rows[f"{d.name}, true transcript"] = by_photo(data, d, ranks(d, *written))
    return rows, pairs, chosen


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


def fit_cca(data, a, b):
    """(function (modality, items) -> [n, D], its settings): CCA of two modalities on the training pairs; the ridges and
    the size by dev's recall."""
    def features(m, items):
        parts = [simple_features(data, m, raw_items(data, m, part)) for part in items.split(256)]  # photos are large
        return torch.cat(parts).double()
    rows = data.items("audio" if "audio" in (a, b) else "text", "train")
    x = {m: features(m, data.items_of(m, rows)) for m in (a, b)}
    mean = {m: values.mean(0) for m, values in x.items()}
    deviation = {m: values.std(0).clamp(min=1e-3) for m, values in x.items()}
    parts = {m: svd((values - mean[m]) / deviation[m]) for m, values in x.items()}

    def projected(maps, m, items):
        return F.normalize(((features(m, items) - mean[m]) / deviation[m] @ maps[m]).float(), dim=1)
    tasks = [d for d in directions(data, "dev")[:N_DIRECTIONS] if {*d.query, d.gallery} == {a, b}]
    best_recall, best = -1.0, None
    for ridges in itertools.product(CCA_RIDGES, CCA_RIDGES):
        maps = dict(zip((a, b), cca(parts[a], parts[b], *ridges, max(CCA_DIMS)), strict=True))
        for n_dims in CCA_DIMS:
            z = functools.partial(projected, {m: to[:, :n_dims] for m, to in maps.items()})
            recall = np.mean([ranks(d, z(*d.query, d.items), z(d.gallery, d.gallery_items))["hit@10"].mean()
                              for d in tasks])
            if recall > best_recall:
                best_recall, best = recall, (z, {"ridges": list(ridges), "dims": n_dims})
    return best


def fusion_rows(model, data):
    """({row: values}, pairs, what dev chose): fused queries, the better of the two alone (by dev), and the sum of both
    latents."""
    rows, pairs, chosen = {}, [], {}
    for split in ("dev", "test"):
        z = embedded(model, data, split)
        for d in directions(data, split):
            if len(d.query) == 1:
                continue
            single = {m: z(m, data.items_of(m, d.items)) for m in d.query}
            total = f"{d.name}, sum of the latents"
            queries = {d.name: embed(model, data, d.query, d.items), total: F.normalize(sum(single.values()), dim=1),
                       **{f"{d.name}, {m} alone": x for m, x in single.items()}}
            answers = {name: ranks(d, x, z(d.gallery, d.gallery_items)) for name, x in queries.items()}
            if split == "dev":
                mrr = {m: (1 / answers[f"{d.name}, {m} alone"]["rank"]).mean() for m in d.query}
                chosen[f"{d.name}, best single"] = max(mrr, key=mrr.get)
                continue
            best = f"{d.name}, {chosen[f'{d.name}, best single']} alone"
            rows |= {name: by_photo(data, d, answers[name]) for name in (d.name, best, total)}
            rows[f"{d.name}, chance"] = by_photo(data, d, answers[d.name], "chance")
            pairs += [(d.name, best), (d.name, total)]
    return rows, pairs, chosen


def part_rows(model, data, mean_reads):
    """({row: values}, pairs, {}): recalls as trained, and with one part at a time taken away."""
    def constant(model, names):
        for name in names:
            all_memories(model)[name].read = lambda x, adapted=None, mean=mean_reads[name]: mean.expand_as(x)

    def shuffled(model):
        for memory in all_memories(model).values():
            order = torch.randperm(len(memory.slots), generator=torch.Generator().manual_seed(0))
            memory.read = functools.partial(memory.read, order=order.to(data.device))
    changes = {"as trained": lambda model: None}
    if mean_reads:
        changes |= {"all reads replaced by their means": lambda model: constant(model, mean_reads),
                    "reads of the modalities' memories replaced": lambda model: constant(model, [*mean_reads][:-1]),
                    "reads of the central memory replaced": lambda model: constant(model, ["central"]),
                    "values shuffled among slots": shuffled}
    changes |= {"one feedback step": lambda model: setattr(model, "feedback_steps", 1),
                "no type embeddings": lambda model: model.modality_type_embeddings.data.zero_(),
                "no presence bits": lambda model: setattr(model, "presence_scale", 0.0)}
    for name in dict(model.named_parameters()):  # encoders.text.position
        if name.endswith((".position", ".pitch")):
            zeroed = functools.partial(lambda name, model: model.get_parameter(name).data.zero_(), name)
            changes[f"no {' '.join(name.split('.')[1:])}"] = zeroed
    tasks, rows = directions(data, "test")[:N_DIRECTIONS], {}
    for name, change in changes.items():
        changed = copy.deepcopy(model)
        change(changed)
        z = embedded(changed, data, "test")
        q = {d.name: ranks(d, z(*d.query, d.items), z(d.gallery, d.gallery_items)) for d in tasks}
        rows[name] = {f"{d.name} R@10": by_photo(data, d, q[d.name])["R@10"] for d in tasks}
    pairs = [("as trained", name) for name in rows if name != "as trained"]
    rows["chance"] = {f"{d.name} R@10": by_photo(data, d, q[d.name], "chance")["R@10"] for d in tasks}
    return rows, pairs, {}


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
    """A way to adapt: `answer_stream` calls configure on a copy of the model, and adapt after each batch's answers.

    choices: settings among which dev chooses by query modality, beside "off". configure(kept, model, modality, choice)
    sets up the copy and what is kept between batches. adapt(model, kept, z [b, D], gallery [G, D], inputs) -> share of
    the batch that adapted something.
    """
    choices: tuple
    configure: callable
    adapt: callable


def configure_memories(kept, model, modality, choice, episodic):
    kept.episodic = episodic
    for memory in all_memories(model).values():
        memory.ttt_lr, memory.enable_ttt_updates = choice, not episodic


def configure_statistics(kept, model, modality, choice):
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
    norm.register_forward_pre_hook(see)


def collect(model, modality):
    """The parameters that tent, eata, tcr and random adapt: the LayerNorm affines of the query's encoder."""
    norms = [m for m in model.encoders[modality].modules() if isinstance(m, nn.LayerNorm)]
    return [p for norm in norms for p in norm.parameters()]


def configure_gradient(kept, model, modality, choice, is_random=False):
    lr, kept.margin = choice if isinstance(choice, tuple) else (choice, None)
    kept.parameters = collect(model, modality)
    model.requires_grad_(False)
    for p in kept.parameters:
        p.requires_grad_(True)
    kept.optimizer = torch.optim.Adam(kept.parameters, lr=lr)
    kept.generator = torch.Generator().manual_seed(0) if is_random else None
    kept.seen, kept.queue, kept.n_batches = None, None, 0  # of eata, of tcr


def step_down(kept, loss):
    """One step; with a generator along random gradients of the same norms: the control."""
    kept.optimizer.zero_grad()
    loss.backward()
    for p in kept.parameters if kept.generator else ():
        direction = torch.randn(p.shape, generator=kept.generator).to(p.device)
        p.grad = direction * (p.grad.norm() / direction.norm())
    kept.optimizer.step()


def entropies(z, gallery, temperature):
    """(entropy [B] of softmax(z . gallery / temperature), the softmax [B, G])."""
    log_p = (z @ gallery.T / temperature).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1), log_p.exp()


def adapt_tent(model, kept, z, gallery, inputs):
    """TENT (Wang et al. 2021) over a gallery in place of classes: one step down the mean entropy."""
    step_down(kept, entropies(z, gallery, model.temperature)[0].mean())
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
    "none": Method((None,), lambda *_: None, lambda *_: 0.0),
    "memory-episodic": Method((0.1, 0.3, 1.0), functools.partial(configure_memories, episodic=True), lambda *_: 1.0),
    "memory-online": Method((0.1, 0.3, 1.0), functools.partial(configure_memories, episodic=False), lambda *_: 1.0),
    "statistics": Method((16, 64, 256), configure_statistics, lambda *_: 1.0),
    "tent": Method(RATES, configure_gradient, adapt_tent),
    "eata": Method(tuple(itertools.product(RATES, (0.05, 0.2, 0.5))), configure_gradient, adapt_eata),
    "tcr": Method(RATES, configure_gradient, adapt_tcr),
    "random": Method((), functools.partial(configure_gradient, is_random=True), adapt_tent)}  # with tent's step


def answer_stream(model, data, modality, raw, gallery, method, choice, order, batch):
    """(embeddings [N, D] of N raw queries of a modality that arrive in `order`, `batch` at a time, each answered before
    the step that it causes; share that adapted something). A copy adapts: the model stays what it is, to the bit.

    gallery: [G, D], read only. choice: of the method's, None is off. Raises: FloatingPointError.
    """
    method, model = "none" if choice is None else method, copy.deepcopy(model).eval()
    z, share = torch.empty(len(raw), gallery.shape[1], device=data.device), 0.0
    kept = SimpleNamespace(parameters=[], episodic=False)
    METHODS[method].configure(kept, model, modality, choice)
    for part in order.split(EMBED_ROWS if method in ("none", "memory-episodic") else batch):
        inputs = as_input(data, modality, take(raw, part))
        with torch.set_grad_enabled(bool(kept.parameters)):
            answers = latents(model, inputs, kept.episodic)
            z[part.to(z.device)] = answers.detach()
            share += METHODS[method].adapt(model, kept, answers, gallery, inputs) * len(part) / len(raw)
    if not torch.isfinite(z).all():
        raise FloatingPointError(f"non-finite embeddings in the test-time method {method}, step {choice}")
    return z, share


# -------------------------------------------------------------------------------------------------- test-time protocol

class Stream(NamedTuple):
    """How queries arrive: under which conditions (kind, amount), `batch` at a time, in how many orders."""
    conditions: list
    batch: int
    n_orders: int = 1
    severity: int | None = None  # 0 clean, 1 the mildest; None: a stream beside the protocol's main ones
    is_mixed: bool = False  # conditions alternate from query to query; else all queries under one, then the next
    with_gallery: bool = False  # the gallery is corrupted too, and then frozen


def streams_of(modality, settings):
    """{name: Stream} of a modality's test queries: clean, every corruption, and with more_streams others. settings: of
    EvaluationConfig."""
    batch, n_orders = settings.stream_batch, settings.n_orders
    streams = {"clean": Stream([CLEAN], batch, n_orders, 0)}
    for kind, amounts in CORRUPTIONS[modality].items():
        for i, amount in enumerate(amounts[:settings.n_severities]):
            streams[f"{kind} {amount:g}"] = Stream([(kind, amount)], batch, n_orders, i + 1)
    if settings.more_streams:
        kinds = [(kind, amounts[1]) for kind, amounts in CORRUPTIONS[modality].items()]
        if len(kinds) == 1:
            kinds = [(kind, amount) for kind, amounts in CORRUPTIONS[modality].items() for amount in amounts]
        streams |= {"mixed": Stream(kinds, batch, is_mixed=True), "continual": Stream(kinds, batch),
                    "batch 1": Stream(kinds[:1], 1), "batch 64": Stream(kinds[:1], 64),
                    "gallery too": Stream(kinds[:1], batch, with_gallery=True)}
    return streams


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
    scores, chosen = Counter(), {}
    for d in (d for d in directions(data, "dev")[:N_DIRECTIONS] if d.query == (modality,)):
        raw = corrupted_items(data, modality, d.items, *HELD_OUT[modality])
        gallery, order = embed(model, data, (d.gallery,), d.gallery_items), stream_order(len(d.items), cfg.seed)
        for method in methods:
            for choice in METHODS[method].choices:
                z, _ = answer_stream(model, data, modality, raw, gallery, method, choice, order,
                                     cfg.evaluation.stream_batch)
                scores[method, choice] += (1 / ranks(d, z, gallery)["rank"]).mean().item()
    for method in methods:
        if METHODS[method].choices:
            best = max(METHODS[method].choices, key=lambda choice: scores[method, choice])
            chosen[method] = best if scores[method, best] > scores["none", None] else None
    chosen["random"] = max(RATES, key=lambda choice: scores["tent", choice])  # also where tent is off
    return chosen


def stream_answers(cfg, model, data, tasks, galleries, chosen, stream):
    """{"direction, method": {"R@1", "R@10": sums by photo, "share" that adapted}} of a stream, mean over its orders."""
    answers = {}
    for d in tasks:
        n, gallery = len(d.items), galleries[d.name]
        raws = [corrupted_items(data, *d.query, d.items, *condition) for condition in stream.conditions]
        raw = torch.cat(raws) if isinstance(raws[0], torch.Tensor) else [item for items in raws for item in items]
        starts = n * torch.arange(len(raws))
        if stream.is_mixed:
            raw, starts = take(raw, torch.arange(n) + starts.repeat(n)[:n]), starts[:1]
        if stream.with_gallery:
            kind, amounts = next(iter(CORRUPTIONS[d.gallery].items()))
            answered = corrupted_items(data, d.gallery, d.gallery_items, kind, amounts[1])
            gallery = embed(model, data, (d.gallery,), d.gallery_items, answered)
        for method, choice in chosen.items():
            is_fixed, runs = choice is None or method == "memory-episodic", []  # whatever the order
            for i in range(1 if is_fixed else stream.n_orders):
                order = (starts[:, None] + stream_order(n, cfg.seed + i)).flatten()
                z, share = answer_stream(model, data, *d.query, raw, gallery, method, choice, order, stream.batch)
                parts = [by_photo(data, d, ranks(d, part, gallery), ks=(1, 10)) for part in z.split(n)]
                runs.append({k: sum(part[k] for part in parts) for k in parts[0]})
                runs[-1]["share"] = torch.tensor(share, dtype=torch.float64)
            answers[f"{d.name}, {method}"] = {k: torch.stack([run[k] for run in runs]).mean(0) for k in runs[0]}
    return answers


def has_corrupted(data, modality, conditions):
    """Whether a cached modality has features of its corrupted queries."""
    wanted = [*conditions, HELD_OUT[modality]]
    return modality not in data.features or all(
        feature_file(data.features_dir, modality, condition_suffix(*condition)).exists() for condition in wanted)


def corrupted_fingerprint(data):
    """Of all features of corrupted queries that there are; they may come, or be made anew, after a run."""
    found = [sorted(data.features_dir.glob(f"{m}_features,*.pt")) for m in data.features]
    return common.fingerprint(itertools.chain.from_iterable(found))


def run_protocol(cfg, model, data, folder, results):
    """Frozen galleries, queries in streams, every method in every direction; what comes of it goes into the results."""
    tasks, answers = directions(data, "test")[:N_DIRECTIONS], {}  # answers: {(modality, stream): `stream_answers`}
    galleries = {d.name: embed(model, data, (d.gallery,), d.gallery_items) for d in tasks}
    frozen = results["gallery_sha256"] = {name: digest(gallery) for name, gallery in galleries.items()}
    methods = [name for name in METHODS if isinstance(model.central, SlotMemory) or not name.startswith("memory")]
    weights = digest(torch.cat([value.double().flatten().cpu() for value in model.state_dict().values()]))
    signature = [results["source"], data.fingerprint, results["test_time"], weights, cfg.seed]
    notes = results["notes"]
    for m in dict.fromkeys(d.query[0] for d in tasks):
        own, streams = [d for d in tasks if d.query == (m,)], streams_of(m, cfg.evaluation)
        if not has_corrupted(data, m, [condition for stream in streams.values() for condition in stream.conditions]):
            notes.append(f"No features of corrupted {m} queries: encode.py flickr8k --corruptions makes them.")
            tasks = [d for d in tasks if d.query != (m,)]
            continue
        compute = functools.partial(choose_settings, cfg, model, data, m, methods)
        chosen = results["chosen"][f"test time, {m}"] = kept_file(folder / f"ttt/{m},settings.pt", signature, compute)
        settings = (f"{method} {'off' if chosen[method] is None else chosen[method]}" for method in methods[1:])
        notes.append(f"Chosen on dev ({m}, {HELD_OUT[m][0]}): {', '.join(settings)}.")
        for name, stream in streams.items():
            print(f"test time: {m}, {name}", flush=True)
            compute = functools.partial(stream_answers, cfg, model, data, own, galleries, chosen, stream)
            answers[m, name] = kept_file(folder / f"ttt/{m},{name}.pt", signature, compute)
    for d in tasks:
        unmoved = digest(embed(model, data, (d.gallery,), d.gallery_items))
        assert digest(galleries[d.name]) == frozen[d.name] == unmoved
    if tasks:
        changes = protocol_tables(cfg, tasks, methods, answers, results)
        notes += verdicts(changes)
        common.plot_lines(folder / "ttt_R10.png", results["curves"], "corrupted queries", data.synthetic)
        plot_changes(folder / "ttt_changes.png", changes, data.synthetic)


def protocol_tables(cfg, tasks, methods, answers, results):
    """Tables and curves of what `run_protocol` measured, into the results. Returns {(direction, method): its row of
    differences to none}."""
    rows, rows_beside, shares, chances, keys = {}, {}, {}, {}, []
    for d in tasks:
        q = ranks(d, torch.ones(len(d.ids), 1), torch.ones(len(d.gallery_ids), 1))
        chances[d.name] = {k: 100 * q[f"chance@{k}"].mean().item() for k in (1, 10)}
        streams, lines = streams_of(*d.query, cfg.evaluation), {}
        severities = sorted({stream.severity for stream in streams.values()} - {None})
        corrupted = [name for name, stream in streams.items() if stream.severity]
        beside = [name for name, stream in streams.items() if stream.severity is None]
        for method in methods:
            row = f"{d.name}, {method}"
            values = {name: answers[(*d.query, name)][row] for name in streams}
            rows[row] = {f"clean R@{k}": values["clean"][f"R@{k}"] for k in (1, 10)}
            rows[row] |= {f"corrupted R@{k}": sum(values[name][f"R@{k}"] for name in corrupted) for k in (1, 10)}
            shares[row] = float(np.mean([values[name]["share"] for name in ("clean", *corrupted)]))
            if beside:
                rows_beside[row] = {f"{name} R@10": values[name]["R@10"] for name in beside}
            lines[method] = {"x": severities, "y": []}
            for severity in severities:
                sums = sum(values[name]["R@10"] for name, stream in streams.items() if stream.severity == severity)
                lines[method]["y"].append(float(percent({"R@10": sums}, None)["R@10"]))
        lines["chance"] = {"x": severities, "y": [chances[d.name][10]] * len(severities)}
        results["curves"][f"{d.name} R@10 (%)"] = {"xlabel": "severity of the query's corruption", "lines": lines}
        keys += [(d.name, method) for method in methods if method != "none"]
    pairs = [(f"{direction}, {method}", f"{direction}, none") for direction, method in keys]
    for title, of_title in (("test time", rows), ("other streams", rows_beside)):
        if not of_title:
            continue
        add_tables(results, title, of_title, pairs)
        for name, chance in chances.items():
            columns = of_title[f"{name}, none"]
            results["tables"][title][f"{name}, chance"] = {c: chance[int(c.rpartition("@")[2])] for c in columns}
    for row, share in shares.items():
        results["tables"]["test time"][row]["adapted share"] = share
    return dict(zip(keys, results["tables"]["test time, paired difference"].values(), strict=True))


def verdicts(changes):
    """What the paired intervals of R@10 say, in lines. changes: {(direction, method): row of differences}."""
    def names(column, side, control=False):  # whose interval lies wholly above (+1) or below (-1) zero
        return [f"{method}, {direction}" for (direction, method), row in changes.items()
                if (method == "random") == control
                and min(side * row[f"{column} R@10 low"], side * row[f"{column} R@10 high"]) > 0]
    helped, n = names("corrupted", 1), sum(method != "random" for _, method in changes)
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

    Raises: ValueError on less than 25 ms, or NaN; what soundfile raises.
    """
    import soundfile
    if raw[36:40] == b"data":
        end = 44 + int.from_bytes(raw[40:44], "little")
        if raw[end:] and not re.match(rb"[\w ]{4}", raw[end:]):  # no chunk there: a broken header, and more sound
            raw = raw[:40] + b"\xff" * 4 + raw[44:]
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


words_of = functools.partial(re.findall, r"\w+|[^\w\s]")  # words and punctuation marks


def build_vocabulary(captions):
    """{token: id}: padding 0, unknown character 1, characters (as '##a'), and the words that occur at least twice, most
    frequent first."""
    counts = Counter(word for caption in captions for word in words_of(caption.lower()))
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
        words, ids = words_of(caption.lower()), []
        spelled = draws.random(len(words)) < spell if draws is not None else [False] * len(words)
        for word, is_spelled in zip(words, spelled, strict=True):
            known = word in vocabulary and not is_spelled
            ids += [vocabulary[word]] if known else [vocabulary.get(f"##{c}", 1) for c in word]
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
        return MODALITIES if self.speech[:, 1].any() else MODALITIES[:2]

    def items_of(self, modality, captions):
        """What goes with caption rows [n]: rows of their photos, they themselves, or those of them that are spoken."""
        if modality == "image":
            return self.photo_of[captions]
        return captions[self.speech[captions, 1] > 0] if modality == "audio" else captions

    def items(self, modality, split):
        """A split's photos, captions or spoken captions, each once."""
        return self.items_of(modality, self.splits[split]).unique()


def decoded(folder, name, paths, decode, shape, dtype, workers):
    """Every file decoded once: (mapped rows [R, *shape], rows of each file [N], {file: why it could not be read},
    fingerprint of the contents).

    decode(bytes) -> array [rows, *shape]. The cache's name holds a hash of the transform's name and of the files'
    names, sizes and times; its index a checksum of the rows of every 256 files. Raises: UserError if they disagree.
    """
    def about(path):
        return (path.name, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (path.name,)

    def read(path):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:  # any other OSError ends the run: it may pass, and the cache would keep it
            return [], b"-", "no such file"
        try:
            return decode(raw), hashlib.sha256(raw).digest(), None
        except (MemoryError, torch.OutOfMemoryError, ImportError):
            raise
        except Exception as error:  # PIL and soundfile raise kinds of their own
            return [], b"-", common.reason_of(error)
    key = json.dumps([name, shape, str(np.dtype(dtype)), [about(path) for path in paths]])
    stem = Path(folder) / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    data_file, index_file = stem.with_suffix(".bin"), stem.with_suffix(".json")
    blocks = [slice(start, start + 256) for start in range(0, len(paths), 256)]  # some at a time: they wait in memory
    if not index_file.exists():  # written last
        stem.parent.mkdir(parents=True, exist_ok=True)
        counts, checksums, problems, contents = [], [], {}, hashlib.sha256()

        def write(file):
            with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
                for block in common.progress(blocks, f"decoding {name}"):
                    checksums.append(0)
                    for path, (rows, content, problem) in zip(paths[block], pool.map(read, paths[block]), strict=True):
                        counts.append(len(rows))
                        contents.update(content)
                        if problem:
                            problems[path.name] = problem
                        raw = np.ascontiguousarray(rows, dtype).tobytes()
                        checksums[-1] = zlib.crc32(raw, checksums[-1])
                        file.write(raw)
        own = stem.with_suffix(f".{uuid.uuid4().hex}")  # runs that start together decode twice, never into one file
        common.atomic_write(own, write)
        os.replace(own, data_file)
        common.write_json(index_file, {"counts": counts, "checksums": checksums, "problems": problems,
                                       "fingerprint": contents.hexdigest()[:16]})
    try:
        index = common.read_json(index_file)
        counts, n = index["counts"], sum(index["counts"])
        rows = np.memmap(data_file, dtype, mode="c", shape=(n, *shape)) if n else np.empty((0, *shape), dtype)
        ends = np.cumsum([0, *(sum(counts[block]) for block in blocks)]).tolist()
        if [zlib.crc32(rows[start:end]) for start, end in itertools.pairwise(ends)] != index["checksums"]:
            raise ValueError
        counts, problems = torch.tensor(counts, dtype=torch.int64), dict(index["problems"])
        return torch.from_numpy(rows), counts, problems, str(index["fingerprint"])
    except (KeyError, OSError, TypeError, ValueError):
        raise UserError(f"{data_file} is damaged; delete it and {index_file.name} to decode the files again") from None


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
                    "(sls.csail.mit.edu/downloads/flickraudio), name their folder, or try the experiment's --demo")


LINES = {  # file -> (what a line is, as a pattern; in words)
    "Flickr8k.token.txt": (r"(.+)#(\d{1,9})\t(.*)", "name.jpg#k<TAB>caption"),
    "captions.txt": (r'([^,]+),(?:"((?:[^"]|"")*)"|([^",][^,]*|))', 'image,caption or image,"caption, with commas"'),
    "wav2capt.txt": (r"(\S+)\s+(\S+)\s+#?(\d{1,9})", "<wav> <photo> #k"),
    "Images.txt": (r"(.+)", "the name of a photo")}


def read_lines(path):
    """The parts of each line that is not blank, by `LINES`. Raises: UserError naming the file and the line."""
    text = common.guarded(lambda p: p.read_text(encoding="utf-8-sig"), path)  # without the mark that some editors put
    pattern, expected = next(line for name, line in LINES.items() if path.name.endswith(name))
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = re.fullmatch(pattern, line.strip())
        if parts:
            lines.append(parts.groups())
        elif line.strip():
            raise UserError(f"{path}: line {number}: expected {expected}, found {line.strip()[:60]!r}")
    return lines


def read_captions(root):
    """({photo: {number: caption}}, file) of Flickr8k.token.txt, or of Kaggle's captions.txt (CSV: image,caption)."""
    path = find(root, *(f"{folder}{name}" for name in [*LINES][:2] for folder in ("Flickr8k_text/", "")))
    captions = {}
    for photo, *parts in read_lines(path):
        of_photo = captions.setdefault(photo.strip(), {})
        if path.name == "captions.txt":
            quoted, plain = parts
            of_photo[len(of_photo)] = (plain if quoted is None else quoted.replace('""', '"')).strip()
        else:
            k, caption = parts
            of_photo[int(k)] = caption.strip()
    return captions, path


def read_speech_list(root):
    """({(photo, number): wav}, file) of flickr_audio/wav2capt.txt; without that folder ({}, None)."""
    if not (root / "flickr_audio").is_dir():
        return {}, None
    path = find(root, "flickr_audio/wav2capt.txt")
    return {(photo, int(k)): root / "flickr_audio/wavs" / wav for wav, photo, k in read_lines(path)}, path


def read_splits(root):
    """({train | dev | test: photos}, files). Raises: UserError if a photo is in two, or twice in one."""
    splits, files, seen = {}, [], {}
    for split in ("train", "dev", "test"):
        files.append(find(root, f"Flickr8k_text/Flickr_8k.{split}Images.txt", f"Flickr_8k.{split}Images.txt"))
        splits[split] = [name for (name,) in read_lines(files[-1])]
        for name in splits[split]:
            if name in seen:
                raise UserError(f"{files[-1]}: {name} is in {seen[name]} too; a photo belongs to one split, once")
            seen[name] = split
    return splits, files


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
    content = common.load_tensors(path, mmap=False)
    content = content if isinstance(content, dict) else {}
    feats, row_of = content.get("feats"), {name: row for row, name in enumerate(content.get("ids", ()))}
    dims = (2, 3) if modality == "audio" else (2,)
    if not isinstance(feats, torch.Tensor) or feats.ndim not in dims or len(feats) != len(row_of):
        raise UserError(f"{path}: expected a dict of feats [N, D] (or [N, layers, D]) and N different ids; {remedy}")
    if model not in (None, content.get("model")):
        raise UserError(f"{path}: made by {content.get('model')}, the features of clean queries by {model}; {remedy}")
    missing = [name for name in names if name not in row_of and name not in content.get("unreadable", ())]
    if missing:
        raise UserError(f"{path}: no features of {len(missing)} of {len(names)} items, such as {missing[0]}; {remedy}")
    feats = feats[[row_of[name] for name in names if name in row_of]].float()
    if not torch.isfinite(feats).all():
        raise UserError(f"{path}: NaN or infinite features; {remedy}")
    return feats, torch.tensor([name in row_of for name in names]), content.get("model")


def load_data(cfg):
    """`Data` of cfg; photos and speech are decoded into the cache the first time, unless their encoder is cached.
    Vocabulary and mel statistics come from the training split alone. Raises: UserError."""
    device, root, workers = common.pick_device(cfg.device), Path(cfg.data.dir), cfg.num_workers
    features_dir, features, models = Path(cfg.data.features_dir or root), {}, {}
    captions, caption_file = read_captions(root)
    spoken, speech_file = read_speech_list(root)
    listed, files = read_splits(root)
    modalities = MODALITIES if speech_file else MODALITIES[:2]
    cached = [m for m in modalities if getattr(cfg.model, f"{m}_encoder") == "cached"]
    files += [caption_file, *([speech_file] if speech_file else []), *(feature_file(features_dir, m) for m in cached)]

    def read(modality, names):
        """(rows of each of the names [N], {name: why it has none}) of precomputed features."""
        features[modality], has_row, models[modality] = read_features(features_dir, modality, "", names)
        return has_row.long(), dict.fromkeys(itertools.compress(names, (~has_row).tolist()), "no features")
    split_of = {name: split for split, names in listed.items() for name in names}
    names, size = list(split_of), -(-cfg.model.image_size * 8 // 7)
    photos, mels, contents = torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, N_MELS), ""
    if "image" in cached:
        folders = [root / name for name in PHOTO_FOLDERS if (root / name).is_dir()]
        names = [name for name in names if not folders or (folders[0] / name).exists()]
        has_photo, broken = read("image", names)
        broken |= dict.fromkeys(split_of.keys() - set(names), "no such file")
    else:
        folder = find(root, *PHOTO_FOLDERS)
        photos, has_photo, broken, contents = decoded(
            cfg.data.cache_dir, f"photos{size}", [folder / name for name in names],
            lambda raw: decode_photo(raw, size), (3, size, size), np.uint8, workers)
    names = list(itertools.compress(names, has_photo.tolist()))
    row_of = {name: row for row, name in enumerate(names)}
    items = [(name, k) for name in names for k in sorted(captions.get(name, {}))]
    splits = {}
    for split in listed:
        splits[split] = torch.tensor([i for i, (name, _) in enumerate(items) if split_of[name] == split])
        n = len({items[i][0] for i in splits[split].tolist()})
        if n < 2:
            raise UserError(f"{root}: {n} of {len(listed[split])} listed {split} photos can be read and have captions"
                            f"{first_of(broken)}; check the folders")
    if "text" in cached:
        read("text", [f"{name}#{k}" for name, k in items])
    wavs = [spoken.get(item) for item in items]
    read_out, broken_wavs = [i for i, path in enumerate(wavs) if path], {}
    if "audio" in cached:
        frames, broken_wavs = read("audio", [wavs[i].name for i in read_out])
    else:
        mels, frames, broken_wavs, digest_of_speech = decoded(
            cfg.data.cache_dir, "mels", [wavs[i] for i in read_out], lambda raw: decode_speech(raw, device), (N_MELS,),
            np.float16, workers if device.type == "cpu" else 1)
        contents += digest_of_speech
    speech = torch.zeros(len(items), 2, dtype=torch.int64)
    speech[read_out] = torch.stack([frames.cumsum(0) - frames, frames], dim=1)
    for split in ("train", "dev"):  # dev chooses for every direction
        if speech_file and (speech[splits[split], 1] > 0).sum() < 2:
            raise UserError(f"{speech_file}: fewer than 2 of its {len(spoken)} recordings are readable and of a "
                            f"caption of a {split} photo{first_of(broken_wavs)}; check flickr_audio, or move it away "
                            "to run on image and text alone")
    mean, deviation = torch.zeros(N_MELS), torch.ones(N_MELS)
    if len(mels):
        n_train = speech[splits["train"]].sum(1).max()  # train comes first
        sample = mels[:n_train][::max(1, int(n_train) // 2**18)].double()
        mean, deviation = sample.mean(0), sample.std(0).clamp(min=1e-3)
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
    text = [captions[name][k] for name, k in items]
    counts = {"photos missing or broken": len(broken),
              "photos without captions": sum(name not in captions for name in names),
              "captions not spoken": len(items) - len(read_out), "recordings missing or broken": len(broken_wavs)}
    return Data(
        photos.to(device) if photos.numel() < room else photos, text,
        torch.tensor([row_of[name] for name, _ in items]), mels, speech, wavs,
        {"text": [f"{name}#{k}" for name, k in items], "image": names, "audio": [path and path.name for path in wavs]},
        splits, build_vocabulary([text[i] for i in splits["train"].tolist()]),
        tuple(x.float()[:, None].to(device) for x in (mean, deviation)), cfg.model.image_size, counts, device,
        hashlib.sha256(f"{common.fingerprint(files)}{contents}".encode()).hexdigest()[:16],
        (root / "SYNTHETIC_DEMO").exists(), {m: x.to(device) for m, x in features.items()}, models, features_dir)


def first_of(problems):
    """Of {file: why it cannot be read}."""
    return f" (the first that cannot be read: {': '.join(next(iter(problems.items())))})" if problems else ""


def random_data(cfg):
    """Random photos, captions of 12 of 4,520 words and 5 s of speech, one batch: for profile_flops.py without data."""
    if "cached" in (cfg.model.text_encoder, cfg.model.image_encoder, cfg.model.audio_encoder):
        raise UserError("the width of precomputed features is not known without data.features_dir=")
    device, n, size = common.pick_device(cfg.device), cfg.training.batch_size, -(-cfg.model.image_size * 8 // 7)
    draws, words = np.random.default_rng(0), [f"w{i}" for i in range(4520)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *(f"##{i}" for i in range(43)), *words])}
    return Data(torch.randint(256, (n, 3, size, size), dtype=torch.uint8),
                [" ".join(draws.choice(words, 12)) for _ in range(n)], torch.arange(n),
                torch.randn(500 * n, N_MELS).half(),
                torch.stack([torch.arange(n) * 500, torch.full((n,), 500)], dim=1), [None] * n, {},
                dict.fromkeys(("train", "dev", "test"), torch.arange(n)), vocabulary,
                (torch.zeros(N_MELS, 1, device=device), torch.ones(N_MELS, 1, device=device)), cfg.model.image_size, {},
                device, "", True)


def raw_items(data, modality, items, draws=None, share=slice(None)):
    """A `share` of the items [n] (photos for modality image, else captions) before they are the model's input: texts,
    photos [n, 3, S, S] uint8, log mels [T, 80] each, or features [n, ..]. Photos are cropped in the middle, or with
    `draws` (a NumPy generator) anywhere and half of them mirrored."""
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


def few_lengths(x, multiple, longest, device):
    """x [B, T, ...] on the device; on a GPU T is filled up with zeros, so that a step is recorded for few of them."""
    if device.type == "cuda":
        filled = max(x.shape[1], min(-(-x.shape[1] // multiple) * multiple, longest))
        x = F.pad(x, (*[0, 0] * (x.ndim - 2), 0, filled - x.shape[1]))
    return x.to(device, non_blocking=True)


def as_input(data, modality, raw):
    """{argument: tensor} of the model for raw items."""
    if modality in data.features:
        return {modality: raw.to(data.device, non_blocking=True).float()}
    if modality == "text":
        return {"text": few_lengths(tokenise(raw, data.vocabulary), 16, MAX_TOKENS, data.device)}
    if modality == "image":
        return {"image": raw.to(data.device, non_blocking=True).float().sub_(115).div_(68)}
    frames = torch.tensor([len(x) for x in raw], device=data.device)
    padded = nn.utils.rnn.pad_sequence(raw, batch_first=True) if raw else torch.zeros(0, 1, N_MELS)
    padded = few_lengths(padded, 256, MAX_FRAMES, data.device)
    mean, deviation = data.mel_statistics
    return {"audio": (padded.float().transpose(1, 2) - mean) / deviation, "audio_frames": frames}  # [A, 80, T]


def spec_augment(audio, frames, draws, n, share):
    """Zeroes (the mean) in every row of audio [A, 80, T] two bands of up to 12 mels and two spans of up to 15% of its
    frames (Park et al. 2019). The rows are a `share` of n."""
    def in_spans(length, widest, places):
        """[A, places] bool: in one of two spans of up to `widest` places, anywhere in length [A, 1, 1] or a number."""
        numbers = torch.from_numpy(draws.random((2, n, 2, 1))[:, share].astype(np.float32)).to(audio.device)
        start, width = (numbers[0] * length).floor(), (numbers[1] * widest).floor()
        place = torch.arange(places, device=audio.device)
        return ((place >= start) & (place < start + width)).any(1)
    length = frames[:, None, None]
    band, span = in_spans(N_MELS, 13, N_MELS), in_spans(length, 0.15 * length, audio.shape[2])
    return audio * ~(band[:, :, None] | span[:, None])


def make_batch(data, indices, draws=None, share=lambda n: slice(n)):
    """Model input of caption rows [B]: text [B, L], image [B, ...], photo [B] ids; and of the A spoken ones audio
    [A, 80, T], audio_frames [A], audio_rows [A] (their places in the batch). Cached modalities: features [B or A, ..].

    draws: a NumPy generator for augmentation. share(n) -> which of n rows text, image and audio are of.
    """
    photos, spoken = data.photo_of[indices], data.speech[indices, 1].nonzero()[:, 0]
    own, own_spoken = share(len(indices)), share(len(spoken))
    batch = {"photo": photos.to(data.device, non_blocking=True)}
    if draws is None or "text" in data.features:
        batch |= as_input(data, "text", raw_items(data, "text", indices, share=own))
    else:
        text = tokenise(raw_items(data, "text", indices), data.vocabulary, SPELL, draws)[own]
        batch["text"] = few_lengths(text, 16, MAX_TOKENS, data.device)
    batch |= as_input(data, "image", raw_items(data, "image", photos, draws, own))
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
    names, methods = (list(dict.fromkeys(part)) for part in zip(*changes, strict=True))
    figure, axes = common.new_figure(2, width=5.4, height=0.9 + 0.75 * len(names))
    for axis, on in zip(axes, ("clean", "corrupted"), strict=True):
        for i, method in enumerate(methods):
            rows = [changes[name, method] for name in names]
            value, low, high = (np.array([row[f"{on} R@10{side}"] for row in rows]) for side in ("", " low", " high"))
            place = np.arange(len(names)) + 0.11 * (i - len(methods) / 2)
            reach = np.maximum([value - low, high - value], 0)
            axis.errorbar(value, place, xerr=reach, fmt=".", capsize=2, label=method)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlabel="change of R@10 (points), paired 95%", title=f"{on} queries")
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("test-time methods against none" + (" (synthetic data)" if synthetic else ""))
    common.save_figure(figure, path)


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
    if any(getattr(cfg.model, f"{m}_encoder") == "cached" for m in MODALITIES):
        cfg.data.features_dir = "data/demo/flickr8k_features"
        write_demo_features(cfg.data)


def write_demo_features(data_cfg):
    """Stand-ins in features_dir for what encode.py flickr8k --corruptions writes, made by `simple_features`."""
    folder = Path(data_cfg.features_dir)
    if (folder / "COMPLETE").exists():
        return
    data = load_data(Config(device="cpu", data=data_cfg, model=ModelConfig(image_size=56)))
    data.splits["all"] = torch.arange(len(data.captions))
    folder.mkdir(parents=True, exist_ok=True)
    for m in MODALITIES:
        corrupted = [(kind, amount, "test") for kind, amounts in CORRUPTIONS[m].items() for amount in amounts]
        for kind, amount, split in [(*CLEAN, "all"), *corrupted, (*HELD_OUT[m], "dev")]:
            items = data.items(m, split)
            feats = simple_features(data, m, corrupted_items(data, m, items, kind, amount))
            content = {"feats": feats.view(len(feats), 2, -1) if m == "audio" else feats, "model": "stand-in",
                       "ids": [data.names[m][i] for i in items.tolist()]}
            common.save_checkpoint(feature_file(folder, m, condition_suffix(kind, amount)), content, False)
    common.write_text(folder / "COMPLETE", "counts of words, pixels and mels, not of real encoders\n")


@common.exit_codes
def main(argv):
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo)
    if stage == "ttt" and not Path(cfg.output_dir, "checkpoint_latest.pt").exists():
        raise UserError(f"{cfg.output_dir}: no trained run to test; run the command without --stage first")
    with common.one_after_the_other():  # the first fills the caches
        data = load_data(cfg)
    for split, rows in data.splits.items():
        n_photos, n_spoken = (len(data.items(m, split)) for m in ("image", "audio"))
        print(f"{split}: {n_photos:,} photos, {len(rows):,} captions, {n_spoken:,} spoken")
    counts = ", ".join(f"{name} {n:,}" for name, n in data.counts.items())
    print(f"vocabulary: {len(data.vocabulary):,} tokens; {counts}")
    if len(data.modalities) < 3:
        print(f"NOTE: {cfg.data.dir} has no folder flickr_audio: image and text alone")
    if stage in ("all", "train"):
        train(cfg, data)
    if stage in ("all", "evaluate", "ttt") and common.process()[0] == 0:  # the first of several processes evaluates
        results = common.published(cfg, data.fingerprint)
        if results is None or (stage != "evaluate" and results["test_time"] != corrupted_fingerprint(data)):
            results = evaluate(cfg, data, test_time=stage != "evaluate")
        common.publish(cfg.output_dir, results)


if __name__ == "__main__":
    sys.exit(main())
