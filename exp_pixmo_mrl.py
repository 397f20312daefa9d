"""Matryoshka embeddings of images and captions: what does a cut to a few dimensions cost, and who avoids it?

Two encoders (frozen ones by name or by their features, or a ViT and a text transformer from scratch), attention pooling
and an MLP projector each, are trained on PixMo's pairs by InfoNCE on the whole embedding and on its prefixes. A prefix
stands beside what costs no training: PCA, random coordinates, a model without the prefix losses. Papers: Kusupati et
al. 2022 (MRL), arXiv 2205.13147; Deitke et al. 2024 (PixMo), arXiv 2409.17146.

    python exp_pixmo_mrl.py configs/pixmo_features.yaml         # features of frozen encoders: a minute on a CPU
    python exp_pixmo_mrl.py configs/pixmo_features.yaml --demo  # synthetic stand-in, no data needed
    python exp_pixmo_mrl.py configs/pixmo_scratch.yaml          # from scratch; pixmo_alignment.yaml: CLIP and mpnet
    python exp_pixmo_mrl.py --compare results/pixmo_features*   # with and without MRL, paired over the test pairs

It prints retrieval at every size last, both ways, and the share of the whole embedding's mean R@5 that is kept, with
95% intervals over the test pairs, beside chance, PCA and random coordinates.

Measured: pixmo_features, 200 test pairs (1,600 to train on; EfficientNet-Lite2 and MiniLM features), seeds 1-3, mean
R@5 at 512 / 16 dimensions: MRL 79.4 +- 2.1 / 74.6 +- 1.4, without it 81.2 +- 1.3 / 47.8 +- 2.0 and by PCA 77.8 +- .1,
chance 2.5; 21 to 35 s of training on one thread of a busy CPU.

Shapes: B pairs a batch, N of a split, T tokens (of a picture, or of all captions of a row), W width of an encoder,
D = projection_dim, d one of the Matryoshka dimensions.

Deviations from the recipe this follows:
- every prefix is L2-normalised again (normalising the whole vector alone leaves short prefixes at a wrong temperature);
- pooling comes before the projector, which is an MLP: one linear map of W < D features cannot fill D dimensions;
- rows without a caption (text dropout), or of equal image or caption, are no negatives (`text_dropout_mode: masked`);
- frozen encoders run once, over the pictures as they prepare them themselves; there are no crops of those;
- pooling scores and the temperature, which Adam hardly moves at the others' rate, have rates of their own;
- the cosine schedule stays at 0 past its end; resuming is exact, and a finished run is not trained again.
"""

import logging
import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import collections
import copy
import functools
import glob
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
import demo_data
from common import UserError, ranged

KS = (1, 5, 10)
WAYS = ("I2T", "T2I")  # images ask for captions, captions for images
PATCH = 16  # pixels a side, of the scratch ViT
CROP = 0.875  # side of a training crop, relative to the stored square; scratch ViT
POOLING_HEADS = 8  # of multihead pooling
SHORTLISTS = (10, 50, 200)  # candidates of a search in two stages
N_PCA = 5000  # training pairs that PCA and the bits' thresholds are measured on; test pairs that the geometry is of
N_DRAWS = 10  # of random coordinates


# ------------------------------------------------------------------------------------------------------------- config

@dataclass
class DatasetConfig:
    train_parquet: str = "pixmo/pixmo_train.parquet"  # a file, a folder, or a glob
    val_parquet: str = "pixmo/pixmo_val.parquet"  # chooses the epoch
    test_parquet: str = ""  # reported (empty: the validation split is, and the report says so)
    batch_size: int = ranged(64, ">= 2")  # pairs a step
    image_size: int = ranged(0, ">= 0")  # pixels a side (0: what a pretrained encoder asks for, else 224)
    horizontal_flip_prob: float = ranged(0.0, ">= 0", "<= 1")  # scratch ViT; captions often say left and right
    max_text_length: int = ranged(512, ">= 2")  # tokens of a caption; a pretrained encoder may allow less
    text_dropout_prob: float = ranged(0.1, ">= 0", "< 1")  # captions taken away in training
    text_dropout_mode: Literal["masked", "literal"] = "masked"  # literal: dropped and duplicate captions stay negatives
    max_pixels: int = ranged(100_000_000, ">= 1")  # images with more are left out unread
    cache: bool = True  # keep decoded images (uint8, size**2 * 3 bytes each); false: decode at every use
    cache_dir: str = "data/cache/pixmo"  # indexes, captions, decoded images, tokens of frozen encoders


@dataclass
class VisionConfig:
    name: str = "scratch"  # scratch; cached (features_file); or a model of the Hugging Face hub or a folder, frozen
    features_file: str = "pixmo/features/image_features.pt"  # of `cached`: feats [R, W] or [R, T, W], ids [R]
    projection_dim: int = ranged(4096, ">= 2")  # D, of both encoders
    mrl_dimensions: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128],
                                      metadata={"bounds": (">= 1",)})  # besides projection_dim
    use_attention_pooling: bool = True  # of both encoders' tokens; false: their mean
    pooling_type: Literal["simple", "multihead"] = "simple"  # one learned query, or one a head; of both encoders
    projector: Literal["mlp", "linear"] = "mlp"  # LayerNorm, then two layers or one; of both encoders
    width: int = ranged(384, ">= 8")  # of the scratch ViT
    depth: int = ranged(12, ">= 1")  # blocks
    heads: int = ranged(6, ">= 1")  # attention heads
    dropout: float = ranged(0.0, ">= 0", "< 1")  # in the scratch blocks, or of a frozen encoder's features


@dataclass
class TextConfig:
    name: str = "scratch"  # as of the vision encoder
    features_file: str = "pixmo/features/text_features.pt"  # as of the vision encoder; a row a caption
    width: int = ranged(384, ">= 8")  # of the scratch transformer
    depth: int = ranged(6, ">= 1")  # blocks
    heads: int = ranged(6, ">= 1")  # attention heads
    vocab_size: int = ranged(8192, ">= 8")  # of the word pieces found in the training captions
    dropout: float = ranged(0.0, ">= 0", "< 1")  # as of the vision encoder


@dataclass
class LossConfig:
    contrastive: float = ranged(0.25, ">= 0")  # weight of InfoNCE on all D dimensions
    mrl: float = ranged(1.0, ">= 0")  # weight of the Matryoshka loss (0: the plain model, its control)
    mrl_weights: list[float] = field(default_factory=list,
                                     metadata={"bounds": ("> 0",)})  # a size, from the largest (empty: equal)
    n_dims_per_step: int | Literal["all"] | None = ranged(None, ">= 1")  # sizes drawn a step, by weight (null: 1)
    sample_single_mrl_dim: bool | None = None  # the recipe's key: true is n_dims_per_step 1, false is all
    temperature: float = ranged(0.07, "> 0")  # of the softmax; where it starts if it is learned
    learnable_temperature: bool = False  # train log(1 / temperature), kept at log(100) or below


@dataclass
class OptimizationConfig:
    lr: float = ranged(2e-4, "> 0")  # AdamW, after warm-up
    weight_decay: float = ranged(0.01, ">= 0")  # on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"bounds": (">= 0", "< 1")})  # of AdamW
    max_grad_norm: float = ranged(1.0, "> 0")  # gradients are scaled down to this norm
    warmup_ratio: float = ranged(0.1, ">= 0", "< 1")  # share of the steps
    num_epochs: int = ranged(10, ">= 1")  # passes over the training rows
    gradient_checkpointing: bool = False  # recompute the scratch blocks in backward: less memory, a third more time
    save_every_steps: int = ranged(500, ">= 1")  # checkpoint_latest.pt within an epoch
    save_every_epochs: int = ranged(0, ">= 0")  # keep checkpoint_epoch_*.pt (0: none)
    log_every: int = ranged(50, ">= 1")  # steps between rows of metrics.csv


@dataclass
class EvaluationConfig:
    projection: Literal["pca", "tsne"] = "pca"  # of embedding_space.png


@dataclass
class Config:
    experiment: str = Path(__file__).stem.removeprefix("exp_")  # the script that a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, crops, dropped captions, drawn sizes
    device: str = "auto"  # auto | cuda | mps | cpu
    cuda_graphs: bool = True  # a GPU replays a recorded training step (false: kernel by kernel, to debug it)
    num_workers: int = ranged(4, ">= 0")  # threads that decode images (0: the main one)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv, tables and pictures to Weights & Biases
    dim: int = ranged(0, ">= 0")  # of --stage embed (0: projection_dim)
    parquet: str = ""  # input of --stage embed (empty: the test split, else the validation split)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    vision_encoder: VisionConfig = field(default_factory=VisionConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def mrl_dims(vision):
    """All sizes that are trained and measured, ascending, without duplicates: mrl_dimensions and projection_dim."""
    return sorted({*vision.mrl_dimensions, vision.projection_dim})


def check(cfg):
    """Raise UserError for keys that do not fit each other."""
    v, losses, dims = cfg.vision_encoder, cfg.losses, mrl_dims(cfg.vision_encoder)
    if dims[-1] > v.projection_dim:
        raise UserError(f"vision_encoder.mrl_dimensions: {dims[-1]} is more than vision_encoder.projection_dim="
                        f"{v.projection_dim}")
    if len(losses.mrl_weights) not in (0, len(dims)):
        raise UserError(f"losses.mrl_weights: expected one for each of {dims[::-1]}, found {len(losses.mrl_weights)}")
    if losses.contrastive == losses.mrl == 0:
        raise UserError("losses.contrastive and losses.mrl are both 0; nothing would be trained")
    if losses.sample_single_mrl_dim is not None and losses.n_dims_per_step is not None:
        raise UserError("losses.sample_single_mrl_dim and losses.n_dims_per_step say the same; give one of them")
    if len(cfg.optimization.betas) != 2:
        raise UserError(f"optimization.betas: expected two numbers, found {cfg.optimization.betas}")
    if cfg.dataset.horizontal_flip_prob and v.name != "scratch":
        raise UserError(f"dataset.horizontal_flip_prob needs vision_encoder.name=scratch; {v.name} sees pictures once")
    if v.name == "scratch" and 0 < cfg.dataset.image_size < PATCH:
        raise UserError(f"dataset.image_size={cfg.dataset.image_size} is less than a patch of {PATCH} pixels")
    for name, section in (("vision_encoder", v), ("text_encoder", cfg.text_encoder)):
        if section.name == "scratch" and section.width % section.heads:
            raise UserError(f"{name}.width={section.width} is not a multiple of {name}.heads={section.heads}")


# -------------------------------------------------------------------------------------------------------------- model

class ScratchEncoder(nn.Module):
    """A pre-norm transformer on what `embed` makes of pictures [B, 3, S, S] (patches; Dosovitskiy et al. 2021, without
    a class token) or of token ids [B, T] -> [B, T, W]; mask [B, T]: the tokens that are attended to."""

    def __init__(self, c, embed, n_places, checkpointing):
        super().__init__()
        self.embed, self.checkpointing = embed, checkpointing
        self.position = nn.Parameter(0.02 * torch.randn(n_places, c.width))
        activation = functools.partial(F.gelu)  # F.gelu itself sends a block down another path in eval mode
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(c.width, c.heads, 4 * c.width, c.dropout, activation,
                                                               batch_first=True, norm_first=True)
                                    for _ in range(c.depth))

    def forward(self, x, mask=None):
        x = self.embed(x)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        x = x + self.position[:x.shape[1]]
        padding = None if mask is None else ~mask
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, src_key_padding_mask=padding, use_reentrant=False)
            else:
                x = block(x, src_key_padding_mask=padding)
        return x


class Pooling(nn.Module):
    """[B, T, W] -> [B, W], a weighted mean over the tokens where mask [B, T] is true; zeros for a row without any.

    mean: equal weights. simple: softmax_t(q . x_t / sqrt(W)). multihead: a query q_h a head, softmax_t(q_h . K x_t /
    sqrt(W / heads)) of the values V x_t, and a linear map of the heads. q ~ N(0, 1), with a learning rate of its own:
    at the size and rate of the other weights the softmax stays even.
    """

    def __init__(self, width, kind):
        super().__init__()
        self.heads = math.gcd(POOLING_HEADS, width) if kind == "multihead" else 1
        if kind == "mean":
            self.register_buffer("query", torch.zeros(1, width), persistent=False)
        else:
            self.query = nn.Parameter(torch.randn(self.heads, width // self.heads))
        self.key = self.value = self.out = nn.Identity()
        if kind == "multihead":
            self.key = nn.Linear(width, width, bias=False)  # a bias adds the same to all scores of a head
            self.value = nn.Linear(width, width)
            self.out = nn.Linear(width, width)

    def weights(self, x, mask):
        """[B, heads, T] float32; 0 where the mask is false."""
        keys = self.key(x).unflatten(2, (self.heads, -1)).float()  # [B, T, heads, W / heads]
        scores = torch.einsum("bthw,hw->bht", keys, self.query) / keys.shape[3] ** 0.5
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(2) * mask[:, None]

    def forward(self, x, mask):
        values = self.value(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, W / heads]
        weights = self.weights(x, mask).to(values.dtype)[:, :, None]  # [B, heads, 1, T]
        return self.out((weights @ values).flatten(1))


class Tower(nn.Module):
    """Encoder (None: the inputs are features of a frozen one, thinned by dropout), LayerNorm, pooling at its width,
    projector: inputs [B, ..] -> [B, D], not normalised."""

    def __init__(self, encoder, width, dropout, vision):
        super().__init__()
        self.encoder, self.dropout, self.norm = encoder, nn.Dropout(dropout), nn.LayerNorm(width)
        self.pool = Pooling(width, vision.pooling_type if vision.use_attention_pooling else "mean")
        dim = vision.projection_dim
        layers = [nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim)]
        self.projector = nn.Sequential(nn.LayerNorm(width), *(layers if vision.projector == "mlp" else layers[:1]))

    def tokens(self, x, mask=None):
        """([B, T, W], mask [B, T]): what is pooled."""
        tokens = self.norm(self.encoder(x, mask) if self.encoder else self.dropout(x.float()))
        everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens, everything if mask is None else mask

    def forward(self, x, mask=None):
        return self.projector(self.pool(*self.tokens(x, mask)))


class MatryoshkaModel(nn.Module):
    """Two towers into one space of D dimensions, with the objective's settings.

    facts: of the data: `image_size`, `vocabulary`, `max_length` and the `widths` of frozen encoders' features.
    """

    def __init__(self, cfg, facts):
        super().__init__()
        v, t, losses = cfg.vision_encoder, cfg.text_encoder, cfg.losses
        checkpointing, vision, text = cfg.optimization.gradient_checkpointing, None, None
        if v.name == "scratch":
            patches = nn.Conv2d(3, v.width, PATCH, PATCH)
            vision = ScratchEncoder(v, patches, (facts["image_size"] // PATCH) ** 2, checkpointing)
        if t.name == "scratch":
            embedding = nn.Embedding(len(facts["vocabulary"]), t.width)
            nn.init.normal_(embedding.weight, std=0.02)
            text = ScratchEncoder(t, embedding, facts["max_length"], checkpointing)
        self.vision = Tower(vision, facts["widths"].get("vision", v.width), v.dropout, v)
        self.text = Tower(text, facts["widths"].get("text", t.width), t.dropout, v)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(losses.temperature)), losses.learnable_temperature)
        self.dims, self.contrastive, self.mrl = mrl_dims(v), losses.contrastive, losses.mrl
        weights = losses.mrl_weights[::-1] or [1.0] * len(self.dims)
        self.weights = [w / sum(weights) for w in weights]
        self.drawn = None  # the sizes of a step's Matryoshka loss; None: all
        self.false_negatives = "ignore" if cfg.dataset.text_dropout_mode == "literal" else "mask"
        self.max_grad_norm = cfg.optimization.max_grad_norm

    @property
    def logit_scale(self):
        return self.log_scale.exp()

    def forward(self, batch):
        """(image [B, D], text [B, D]) in float32, not normalised; bf16 autocast in training on CUDA."""
        on_gpu = batch["image"].is_cuda
        with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=self.training and on_gpu):
            image = self.vision(batch["image"], batch.get("image_mask"))
            text = self.text(batch["text"], batch["text_mask"])
        return image.float(), text.float()


def build_model(cfg, data):
    """MatryoshkaModel of the data's shapes, on its device."""
    return MatryoshkaModel(cfg, data.facts).to(data.device)


def build_optimizer(cfg, model):
    """AdamW. Weight decay on matrices only: not on biases, norms, positions, embeddings. What Adam hardly moves at the
    others' rate has more: the temperature 20 times as much, the pooling queries 10 times."""
    o = cfg.optimization
    groups = {"matrices": {"weight_decay": o.weight_decay}, "vectors": {}, "query": {"lr": 10 * o.lr},
              "log_scale": {"lr": 20 * o.lr}}
    groups = {name: {"params": [], "weight_decay": 0.0, **options} for name, options in groups.items()}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        is_vector = parameter.ndim < 2 or leaf == "position" or name.endswith("text.encoder.embed.weight")
        group = leaf if leaf in groups else "vectors" if is_vector else "matrices"
        if parameter.requires_grad:
            groups[group]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), fused=next(model.parameters()).is_cuda)


# ---------------------------------------------------------------------------------------------------------- objective

def prefix_losses(image, text, dims, logit_scale, ids=None, false_negatives="ignore", rows=slice(None)):
    """{d: symmetric InfoNCE (0-d, nats) of the first d dimensions, L2-normalised again} for ascending dims.

    Products and squared norms are accumulated from one size to the next, so that all prefixes cost one [N, D] x [D, N]
    product. rows: a slice, this process's share of the batch; the values of all of them sum to the losses. Arguments
    and errors else as of `matryoshka_loss`.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(f"image and text must be equal [N, D], N > 0, found {list(image.shape)}, {list(text.shape)}")
    if not dims or dims[0] < 1 or dims[-1] > image.shape[1]:
        raise ValueError(f"dims must lie in 1..{image.shape[1]}, found {dims}")
    if false_negatives not in ("ignore", "mask") or (false_negatives == "mask" and ids is None):
        raise ValueError(f"false_negatives must be ignore, or mask with ids [N], found {false_negatives!r}")
    image, text = (x if x.dtype == torch.float64 else x.float() for x in (image, text))
    if false_negatives == "mask":
        ids = ids.view(len(image), -1)
        masked = (ids[:, None] == ids).any(2).fill_diagonal_(False)  # [N, N]
    own = slice(*rows.indices(len(image)))
    is_whole = own == slice(0, len(image), 1)  # then the logits of the texts are those of the images, transposed
    sizes = np.diff(dims, prepend=0).tolist()
    with torch.autocast(image.device.type, enabled=False), common.full_precision():
        parts = [x[:, :dims[-1]].split(sizes, dim=1) for x in (image, text)]
        squares = [x[:, :dims[-1]].square().split(sizes, dim=1) for x in (image, text)]
        norms = [torch.stack([*itertools.accumulate(x.sum(1) for x in side)]) for side in squares]
        inverse = [norm.clamp(min=torch.finfo(norm.dtype).tiny).rsqrt() for norm in norms]  # [K, N]
        total = 0
        for a, b in ((0, 1),) if is_whole else ((0, 1), (1, 0)):
            products = (x[own] @ y.T for x, y in zip(parts[a], parts[b], strict=True))
            scores = torch.stack([*itertools.accumulate(products)])  # [K, rows, N]
            logits = scores * (logit_scale * inverse[a])[:, own, None] * inverse[b][:, None]
            positive = logits.diagonal(own.start, 1, 2)
            if false_negatives == "mask":
                logits = logits.masked_fill(masked[own], torch.finfo(logits.dtype).min / 4)
            total = total + (logits.logsumexp(2) - positive).sum(1)
        if is_whole:
            total = total + (logits.logsumexp(1) - positive).sum(1)
        return dict(zip(dims, (total / (2 * len(image))).unbind(), strict=True))


def matryoshka_loss(image, text, dims, logit_scale, weights=None, ids=None, false_negatives="ignore"):
    """Matryoshka InfoNCE: (sum_d w_d L_d / sum_d w_d, {d: L_d}), L_d the symmetric InfoNCE of the first d dimensions.

    image, text: [N, D] float, not normalised; row i of one is the partner of row i of the other. dims: ints in 1..D,
    any order. logit_scale: 1 / temperature. weights: one a dimension, in the order of dims (default: equal). ids: [N]
    int, or [N, K]; with false_negatives="mask" pairs with an equal one are not each other's negatives.
    Returns 0-d tensors, float32 (float64 for float64 input).
    Raises: ValueError on shapes, dims or weights that do not fit.
    Source: Kusupati et al. 2022, equation 1, with InfoNCE for the classification loss, every prefix normalised again.
    """
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims) or min(weights, default=0) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must be one a dimension, none negative and not all 0, found {weights} for {dims}")
    losses = prefix_losses(image, text, sorted(set(dims)), logit_scale, ids, false_negatives)
    return sum(w * losses[d] for w, d in zip(weights, dims, strict=True)) / sum(weights), losses


def objective(model, image, text, ids, drawn=None, rows=slice(None)):
    """{loss, loss_clip, loss_mrl} of raw embeddings [B, D]: loss = contrastive * InfoNCE(D) + mrl * loss_mrl.

    loss_mrl: the mean over the drawn sizes, or the weighted mean over all. ids: [B] or [B, K]. rows: this process's.
    """
    whole = model.dims[-1]
    losses = prefix_losses(image, text, sorted({*(drawn or model.dims), whole}), model.logit_scale, ids,
                           model.false_negatives, rows)
    if drawn:
        mrl = sum(losses[d] for d in drawn) / len(drawn)
    else:
        mrl = sum(w * losses[d] for w, d in zip(model.weights, model.dims, strict=True))
    return {"loss": model.contrastive * losses[whole] + model.mrl * mrl, "loss_clip": losses[whole], "loss_mrl": mrl}


def draw_dims(cfg, model, step):
    """The sizes of a step's Matryoshka loss, a pure function of seed and step; None: all of them.

    n evenly spaced points with a random start in [0, 1) fall into intervals of the sizes' weights: size d is drawn
    n w_d times on average, so that the mean over the drawn is unbiased for the weighted mean over all.
    """
    n = "all" if cfg.losses.sample_single_mrl_dim is False else cfg.losses.n_dims_per_step or 1
    if n == "all" or not cfg.losses.mrl:
        return None
    points = (np.random.default_rng([cfg.seed, step]).random() + np.arange(n)) / n
    places = np.searchsorted(np.cumsum(model.weights)[:-1], points, side="right")
    return [model.dims[i] for i in places]


def train_step(model, batch, optimizer):
    """One step -> {loss, loss_clip, loss_mrl} (nats) as 0-d tensors (no synchronisation).

    Of several processes each embeds its share of the batch and has its part of the losses; negatives are all of them.
    """
    optimizer.zero_grad(set_to_none=True)
    n = len(batch["ids"])
    image, text = (common.gathered(x, n) for x in model(batch))
    losses = objective(model, image, text, batch["ids"], model.drawn, common.share(n))
    losses["loss"].backward()
    common.sum_gradients(model)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], model.max_grad_norm)
    optimizer.step()
    if model.log_scale.requires_grad:
        with torch.no_grad():  # of the parameter: a clamp in the forward pass would leave it without gradient beyond
            model.log_scale.clamp_(max=math.log(100))
    return {name: value.detach() for name, value in losses.items()}


# -------------------------------------------------------------------------------------------------------------- train

TRAINING_PICTURES = {  # file: {ylabel: {label: column of metrics.csv}}
    "training_curves": {"loss": {"train": "train/loss", "val": "val/loss"},
                        "R@k of all dimensions (val), %": {f"{way.upper()} R@{k}": f"val/{way}_r{k}"
                                                           for way in ("i2t", "t2i") for k in (1, 10)}},
    "loss_components": {f"{label} loss": {"train": f"train/{column}", "val": f"val/{column}"} for label, column in
                        (("contrastive", "loss_clip"), ("Matryoshka", "loss_mrl"), ("total", "loss"))},
    "lr_schedule": {"learning rate": {"train": "train/lr"}}}


def steps_per_epoch(cfg, data):
    """Optimisation steps of an epoch; what does not fill a batch waits for another epoch."""
    return max(1, len(data.splits["train"]) // cfg.dataset.batch_size)


def total_steps(cfg, data):
    """Optimisation steps of a run."""
    return cfg.optimization.num_epochs * steps_per_epoch(cfg, data)


def set_train_mode(cfg, model, step):
    """What a step trains, set before each (a validation leaves eval mode)."""
    model.train()
    model.drawn = draw_dims(cfg, model, step)


def train(cfg, data):
    """Train for num_epochs, resuming exactly, also within an epoch; best_model.pt is the epoch of the lowest validation
    loss. Returns the rows of metrics.csv."""
    o = cfg.optimization
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    per_epoch, last_step = steps_per_epoch(cfg, data), total_steps(cfg, data)
    warmup_steps = round(o.warmup_ratio * last_step)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: common.warmup_cosine(step, last_step, warmup_steps))
    take_step = common.GraphedStep(train_step, model, optimizer, cfg.cuda_graphs)
    folder = common.open_run(cfg, data.fingerprint)  # after what can fail for its settings
    write_left_out(folder, data)
    with common.Run(folder, cfg, model, optimizer, scheduler, None, per_epoch) as run:
        keep_periodic(run, o.save_every_epochs * per_epoch)  # a kill may have come before it
        batches = training_batches(cfg, data, first=run.step)
        for step in run.steps(last_step):
            set_train_mode(cfg, model, step)
            drawn = model.drawn and tuple(model.drawn)  # a recorded step is of these sizes
            run.add(take_step(next(batches), drawn))  # stays on the device; run.means() waits for it
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            ends, saves = step % per_epoch == 0, step % o.save_every_steps == 0
            if not (ends or saves or step % o.log_every == 0):
                continue
            row = {"train/step": step, "train/epoch": step / per_epoch, "train/lr": rate}
            row |= {f"train/{name}": value for name, value in run.means().items()}
            if ends:
                row |= validate(cfg, model, data)
                run.log(row, score=-row["val/loss"], val_loss=row["val/loss"], facts=data.facts,
                        show=("train/loss", "val/loss", "val/i2t_r1", "val/t2i_r1", "val/i2t_r10", "val/t2i_r10"))
                keep_periodic(run, o.save_every_epochs * per_epoch)
            else:
                run.log(row)
                if saves:
                    run.save()
    for name, panels in TRAINING_PICTURES.items():
        common.plot_history(folder / f"{name}.png", run.history, panels, x="train/step", mark=run.best_step,
                            title=model_name(cfg), synthetic=data.synthetic)
    return run.history


def keep_periodic(run, every):
    """Copy checkpoint_latest.pt to checkpoint_epoch_*.pt if one is due at the run's step; every: steps (0: never)."""
    if every and run.step and run.step % every == 0 and common.process()[0] == 0:
        latest = run.latest.read_bytes()
        path = run.folder / f"checkpoint_epoch_{run.step // run.steps_per_epoch}.pt"
        common.atomic_write(path, lambda file: file.write(latest))


@torch.no_grad()
def validate(cfg, model, data):
    """{val/..}: the losses with every size over batches of nearly equal length, R@k of the whole embedding in percent,
    the temperature, and how even the poolings' weights are in the first batch."""
    image, text = embed(cfg, model, data, "val")
    ids = torch.from_numpy(data.sets["val"].same).to(data.device)
    parts = torch.arange(len(ids)).tensor_split(-(-len(ids) // cfg.dataset.batch_size))
    losses = [objective(model, image[p], text[p], ids[p]) for p in parts]
    row = {f"val/{name}": sum(loss[name].item() * len(p) for loss, p in zip(losses, parts, strict=True)) / len(ids)
           for name in losses[0]}
    values = retrieval(F.normalize(image, dim=1), F.normalize(text, dim=1), ids)
    row |= {f"val/{way.lower()}_r{k}": 100 * values[f"{way} hit@{k}"].mean().item() for way in WAYS for k in KS}
    batch = make_batch(data, parts[0], "val")
    return row | {"val/temperature": 1 / model.logit_scale.item(),
                  "val/entropy_image": pooling_entropy(model.vision, batch["image"], batch.get("image_mask")),
                  "val/entropy_text": pooling_entropy(model.text, batch["text"], batch["text_mask"])}


def pooling_entropy(tower, *inputs):
    """Mean entropy / ln T of the pooling's weights over rows of two tokens or more (1: all count the same), or None."""
    tokens, mask = tower.tokens(*inputs)
    n_tokens = mask.sum(1)
    entropies = torch.special.entr(tower.pool.weights(tokens, mask)).sum(2).mean(1) / n_tokens.clamp(min=2).log()
    return entropies[n_tokens > 1].mean().item() if (n_tokens > 1).any() else None


# ----------------------------------------------------------------------------------------------------------- evaluate

@torch.no_grad()
def embed(cfg, model, data, split, rows=None, dim=None):
    """(image [N, d], text [N, d]) float32, not normalised, on the device: the first `dim` dimensions (default: all) of
    some rows of a split (default: all); centre crops, all captions (a scratch text encoder: the first)."""
    model.eval()
    rows = np.arange(len(data.splits[split])) if rows is None else rows
    size = cfg.dataset.batch_size
    parts = (rows[i:i + size] for i in range(0, len(rows), size))
    batches = prefetched(lambda part: make_batch(data, part, split), parts)
    with common.full_precision():
        embedded = [[side[:, :dim].clone() for side in model(batch)] for batch in batches]
    image, text = (torch.cat(side) for side in zip(*embedded, strict=True))
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise FloatingPointError("non-finite embeddings: the weights have overflowed; lower optimization.lr")
    return image, text


def retrieval(image, text, ids):
    """{"I2T hit@k", "I2T rank", "T2I hit@k", ..}: [N] float64 each, of L2-normalised [N, d]; rows of equal id [N] are
    each other's answers."""
    values = {}
    for way, queries, gallery in zip(WAYS, (image, text), (text, image), strict=True):
        of_query = common.retrieval_per_query(queries, gallery, ids, ids, KS, map_ks=())
        values |= {f"{way} {name}": v for name, v in of_query.items() if not name.startswith("chance")}
    return values


def scores(values, weights=None):
    """Columns in percent of a row's values {"I2T hit@1", .., "whole hit@5": [N]}; with weights [R, N] those that get an
    interval, of resamples. % kept: mean R@5 as a share of the whole embedding's."""
    def mean(name):
        v = torch.as_tensor(values[name], dtype=torch.float64).numpy()
        return 100 * (v.mean() if weights is None else weights @ v / weights.sum(1))
    columns = {f"{way} R@{k}": mean(f"{way} hit@{k}") for way in WAYS for k in KS}
    mean_recall = (columns["I2T R@5"] + columns["T2I R@5"]) / 2
    kept = 100 * mean_recall / np.maximum(mean("whole hit@5"), 1e-9)
    if weights is not None:
        return {"mean R@5": mean_recall, "% kept": kept}
    return {**columns, "RSUM": sum(columns.values()), "mean R@5": mean_recall, "% kept": kept}


def model_name(cfg):
    """What the trained model's rows are called."""
    return "MRL" if cfg.losses.mrl else "plain"


def cuts(cfg, dims, whole, trained, ids):
    """({row: values of `retrieval`} of every way to fewer dimensions, {row: sd over the draws of random coordinates}).

    whole, trained: (image, text), each normalised [N, D], of the test split and of training pairs, which PCA is fitted
    on. A row of random coordinates is the mean over N_DRAWS draws; the sd is that of mean R@5, in percent.
    """
    *means, axes = fit_pca(*trained)
    turned = [(x - mean) @ axes for x, mean in zip(whole, means, strict=True)]

    def of_columns(sides, columns):
        return retrieval(*(F.normalize(x[:, columns], dim=1) for x in sides), ids)
    rows = {f"{model_name(cfg)} {d}": of_columns(whole, slice(d)) for d in dims[::-1]}
    rows |= {f"PCA {d}": of_columns(turned, slice(d)) for d in dims[::-1]}
    spread = {}
    for d in dims[-2::-1]:
        orders = [np.random.default_rng([cfg.seed, draw]).permutation(dims[-1]) for draw in range(N_DRAWS)]
        draws = [of_columns(whole, torch.from_numpy(order[:d]).to(ids.device)) for order in orders]
        row = f"random coordinates {d}"
        rows[row] = {key: torch.stack([values[key] for values in draws]).mean(0) for key in draws[0]}
        recalls = [(values["I2T hit@5"] + values["T2I hit@5"]).mean().item() / 2 for values in draws]
        spread[row] = 100 * float(np.std(recalls, ddof=1))
    return rows, spread


def fit_pca(image, text):
    """(mean of image [D], mean of text [D], axes [D, D], columns by falling variance), float32, of normalised [N, D].

    Each side is centred by itself; `(x - mean) @ axes[:, :d]` is the untrained way to d dimensions.
    """
    means = image.double().mean(0), text.double().mean(0)
    centred = torch.cat([image.double() - means[0], text.double() - means[1]])
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)
    return (*(m.float() for m in means), axes.float())


def without_parts(model, batch):
    """{what is changed: copy of the trained model without it}: is the part that was trained used? Inputs of one token,
    as in the batch, any weights leave as they are."""
    changed = {}
    for side, key in (("vision", "image"), ("text", "text")):
        for change, part in (("even weights", "pool.query"), ("no positions", "encoder.position")):
            copied = copy.deepcopy(model)
            parameter = dict(copied.named_parameters()).get(f"{side}.{part}")
            if parameter is not None and batch[key].shape[1] > 1:
                nn.init.zeros_(parameter)
                changed[f"{change}, {side}"] = copied
    return changed


def geometry(image, text):
    """Of normalised [N, d]: alignment mean |x - y|^2 and uniformity log mean exp(-2 |x_i - x_j|^2), i < j, of each side
    (Wang & Isola 2020), and the distance of the two means (the modality gap of Liang et al. 2022)."""
    pairs = {side: torch.pdist(x.double()).square() for side, x in (("image", image), ("text", text))}
    return {"alignment": (image - text).square().sum(1).mean().item(),
            **{f"uniformity {side}": (-2 * squares).exp().mean().log().item() for side, squares in pairs.items()},
            "modality gap": (image.mean(0) - text.mean(0)).norm().item()}


def two_stage_hits(coarse, fine, ids, shortlist, k):
    """hit@k [N] float64 of a search in two stages: the `shortlist` best by `coarse`, ranked again by `fine`.

    coarse, fine: (queries [N, d], gallery [N, d]), scored by their products. ids: [N] int, which rows belong together.
    Equal scores come in random order in the first stage (always the same draw), in expectation in the second;
    shortlist = N is the exact search. Source: Kusupati et al. 2022, section 4.3.
    """
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).to(ids.device)
    owners, shortlist = ids[order], min(shortlist, len(ids))
    small, large = coarse[1][order], fine[1][order]
    hits, size = [], max(1, 2**26 // (shortlist * large.shape[1]))
    for rows in torch.arange(len(ids), device=ids.device).split(size):
        top = (coarse[0][rows] @ small.T).topk(shortlist, dim=1).indices  # [q, shortlist]
        values = (large[top].double() @ fine[0][rows].double()[:, :, None])[:, :, 0].float()
        own = owners[top] == ids[rows, None]
        best = values.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        level = (own & (values == best)).sum(1)
        better = (values > best).sum(1)
        tied = (values == best).sum(1) - level
        hits.append(torch.where(own.any(1), 1 - common._miss_probability(better, tied, level, k), 0.0))
    return torch.cat(hits)


def adaptive_searches(dims, whole, exact, ids):
    """({search: R@1 and multiply-adds a query} of a shortlist by few dimensions, ranked again by all; {search: ms a
    query}, plain float32 products, one text query at a time, the median of 100). exact: values of the whole."""
    n, largest, table, times = len(ids), dims[-1], {}, {}
    for d, shortlist in [(largest, 0), *((d, k) for d in dims[-2::-1] for k in SHORTLISTS if k <= n)]:
        name = f"{d}, best {shortlist} again by {largest}" if shortlist else "exact"
        small, hits = [F.normalize(x[:, :d], dim=1) for x in whole], [exact[f"{way} hit@1"] for way in WAYS]
        if shortlist:
            hits = [two_stage_hits(small[::turn], whole[::turn], ids, shortlist, 1) for turn in (1, -1)]
        table[name] = {f"{way} R@1": 100 * hit.mean().item() for way, hit in zip(WAYS, hits, strict=True)}
        table[name]["multiply-adds a query"] = n * d + shortlist * largest
        cut, spent = whole[0][:, :d].contiguous(), []
        for query in whole[1][:100]:
            start = time.perf_counter()
            products = cut @ query[:d]
            if shortlist:
                products = whole[0][products.topk(shortlist).indices] @ query
            products.argmax().item()  # waits for the device
            spent.append(1000 * (time.perf_counter() - start))
        times[name] = float(np.median(spent))
    return table, times


def bytes_table(dims, whole, trained, ids):
    """Mean R@5 against the bytes that a gallery item takes: float32, int8, one bit a dimension; queries stay float32.

    int8: each item by its own largest coordinate, a scale that cosine does not see. One bit: on which side of the
    training mean a coordinate lies; the SHORTLISTS[1] nearest by Hamming distance are ranked again by query . bits.
    """
    table = {}
    for d in dims[::-1]:
        sides = [F.normalize(x[:, :d], dim=1) for x in whole]
        means = [F.normalize(x[:, :d], dim=1).mean(0) for x in trained]
        hits = {"float32": [], "int8": [], "one bit": []}
        for query, gallery in ((0, 1), (1, 0)):
            rounded = (127 * sides[gallery] / sides[gallery].abs().amax(1, keepdim=True)).round()
            for name, codes in (("float32", sides[gallery]), ("int8", F.normalize(rounded, dim=1))):
                hits[name].append(common.retrieval_per_query(sides[query], codes, ids, ids, (5,), ())["hit@5"])
            centred, bits = sides[query] - means[query], (sides[gallery] - means[gallery]).sign()
            hits["one bit"].append(two_stage_hits((centred.sign(), bits), (centred, bits), ids, SHORTLISTS[1], 5))
        for name, size in (("float32", 4 * d), ("int8", d), ("one bit", -(-d // 8))):
            recall = 50 * sum(hit.mean().item() for hit in hits[name])
            table[f"{name}, {d}"] = {"bytes": size, "mean R@5": recall}
    return table


def normalised(cfg, model, data, split, rows=None):
    """(image [N, D], text [N, D]) of a split, L2-normalised."""
    sides = [F.normalize(x, dim=1) for x in embed(cfg, model, data, split, rows)]
    return [x.cpu() for x in sides] if data.device.type == "mps" else sides  # MPS has no float64


def evaluate(cfg, data):
    """Test the best model at every size beside chance, PCA and random coordinates; draw the pictures, return the
    results. The epoch is chosen on validation; PCA and the bits' thresholds are measured on training pairs."""
    folder, name = common.open_run(cfg, data.fingerprint), model_name(cfg)
    model = build_model(cfg, data)
    step = common.load_best(folder, model)["step"]
    print("evaluating: retrieval at every size", flush=True)
    split = "test" if "test" in data.sets else "val"
    test, dims, largest = data.sets[split], model.dims, f"{name} {model.dims[-1]}"
    drawn = np.random.default_rng(cfg.seed).permutation(len(data.splits["train"]))[:N_PCA]
    whole, trained = normalised(cfg, model, data, split), normalised(cfg, model, data, "train", np.sort(drawn))
    ids = torch.from_numpy(test.same).to(whole[0].device)
    with common.full_precision():
        level = torch.ones_like(whole[0][:, :1])  # all scores equal: the expectation over their random order
        rows, spread = cuts(cfg, dims, whole, trained, ids)
        parts = {f"{largest}, {change}": retrieval(*normalised(cfg, changed, data, split), ids)
                 for change, changed in without_parts(model, make_batch(data, range(2), split)).items()}
        rows = {"chance": retrieval(level, level, ids), **rows, **parts}
        searches, times = adaptive_searches(dims, whole, rows[largest], ids)
        codes = bytes_table(dims, whole, trained, ids)
        shapes = {str(d): geometry(*(F.normalize(x[:N_PCA, :d], dim=1) for x in whole)) for d in dims[::-1]}
    common.record_environment(folder, search_ms=times)  # results.json has no timings
    print("search, ms a query: " + "; ".join(f"{search} {ms:.3f}" for search, ms in times.items()))

    recalls = (rows[largest]["I2T hit@5"] + rows[largest]["T2I hit@5"]) / 2
    rows = {row: {**values, "whole hit@5": recalls} for row, values in rows.items()}
    pairs = [(largest, row) for row in parts]
    pairs += [(f"{name} {d}", row) for d in dims[-2::-1] for row in (largest, f"PCA {d}", f"random coordinates {d}")]
    groups = np.unique(test.same, return_inverse=True)[1]
    table, differences, items = common.interval_tables(rows, pairs, len(ids), scores, groups)
    for row, sd in spread.items():
        table[row]["sd over draws"] = sd
    shared = {f"prefix {d}": f"{name} {d}" for d in dims}  # what runs with and without MRL share, for --compare
    shared |= {f"prefix of MRL, PCA of plain {d}": f"{name if cfg.losses.mrl else 'PCA'} {d}" for d in dims}
    items = {kind: {**numbers, **{row: numbers[own] for row, own in shared.items()}} for kind, numbers in items.items()}
    ranks = {row: {} for row in rows}
    for (row, values), way in itertools.product(rows.items(), WAYS):
        ranks[row][f"{way} MRR"] = (1 / values[f"{way} rank"]).mean().item()
        ranks[row][f"{way} median rank"] = float(np.median(values[f"{way} rank"]))

    notes = ["Recalls in percent; intervals: 95%, bootstrap over the pairs, the model and the PCA as they are."]
    if split == "val":
        notes.append("NOTE: without a test split this is the validation split, which also chose the epoch.")
    tables = {"retrieval": {row: columns for row, columns in table.items() if row not in parts},
              "paired difference": differences, "ranks": ranks, "adaptive retrieval": searches,
              "bytes of a gallery item": codes, "geometry": shapes}
    if parts:
        tables["parts"] = {row: table[row] for row in (largest, *parts)}
    curves, compared = size_curves(cfg, table, dims)
    draw_pictures(folder, cfg, data, curves, codes, whole, split)
    kept, low, high = (table[f"{name} {dims[0]}"][f"% kept{side}"] for side in ("", " low", " high"))
    return {
        **common.run_facts(cfg, data), "n": len(ids), "n_train": len(data.splits["train"]), "notes": notes,
        "headline": f"{len(ids):,} {split} pairs, {name}: {dims[0]} of {dims[-1]} dimensions keep {kept:.0f}% "
                    f"[{low:.0f}, {high:.0f}] of a mean R@5 of {table[largest]['mean R@5']:.1f}; step {step}, seed "
                    f"{cfg.seed}",
        "chosen": {"step": step}, "tables": tables, "curves": compared, "per_item": {"ids": test.ids.tolist(), **items}}


def size_curves(cfg, table, dims):
    """({column: {way to fewer dimensions: {"x", "y", "low", "high"}}} of the table's rows, largest size last; what
    --compare draws of them: PCA and random coordinates, which cost no training, of the plain model)."""
    name, curves, compared = model_name(cfg), {}, {}
    shown = ("MRL", "chance") if cfg.losses.mrl else ("plain", "PCA", "random coordinates", "chance")
    for column in ("% kept", "mean R@5"):
        curves[column] = lines = {}
        for label in (name, "PCA", "random coordinates"):
            rows = [table.get(f"{label} {d}", table[f"{name} {d}"]) for d in dims]  # all coordinates are the whole
            low, high = ([row[f"{column} {side}"] for row in rows] for side in ("low", "high"))
            lines[label] = {"x": dims, "y": [row[column] for row in rows], "low": low, "high": high}
        lines["chance"] = {"x": dims, "y": [table["chance"][column]] * len(dims)}
        compared[column] = {"xlabel": "log2 of the dimensions kept", "lines": {
            label: {"x": [math.log2(d) for d in dims], "y": lines[label]["y"]} for label in shown}}
    return curves, compared


# --------------------------------------------------------------------------------------------------------------- data

IMAGE_COLUMNS = ("image_bytes", "image", "jpg", "bytes")  # in the order of preference, as the next
CAPTION_COLUMNS = ("caption", "text", "captions", "transcripts")
ID_COLUMNS = ("image_id", "id", "key", "image_url", "url")
SHUFFLE_ROWS = 2048  # row groups are shuffled, then rows within windows of at least so many
READ_ROWS, BLOCK_ROWS = 64, 512  # rows of a parquet file in memory at once; rows of a file of the cache
ENCODED_ROWS = 32  # pictures or captions of a frozen encoder's batch, which fixes the bits
BLOCK_BATCHES = 16  # of those in a file of the cache
RESIDENT_BYTES = 2**31  # features up to this size, or a quarter of a GPU's free memory, are moved to the device whole


@dataclass(eq=False)
class Pieces:
    """What the N rows of a split are made of, as tokens: P captions, or a picture each."""
    values: list  # [P + 1] tensors: token ids [T], or features of tokens [T, W]; the last is that of an empty caption
    count: np.ndarray  # [N] pieces of a row
    one: bool = False  # of a row's captions a batch takes one: a scratch encoder has places for no more

    def __post_init__(self):
        self.length = np.array([*map(len, self.values)])
        self.first = np.cumsum(self.count) - self.count  # [N] a row's first piece


@dataclass(eq=False)
class Split:
    """The good rows of some parquet files."""
    files: list  # paths
    number: np.ndarray  # [N] of the row, counted over the good ones of all files
    place: np.ndarray  # [N, 4] file, row group, row in the file, row in the row group
    ids: np.ndarray  # [N] str: of the id column, else "<file>:<row>"
    captions: np.ndarray  # [N] lists of str, at least one each
    picture: np.ndarray  # [N] int: a hash of the encoded bytes, or of the features
    bad: list  # [(file, row, cause)]
    decode: object  # image bytes -> square [size, size, 3] uint8; None: there are features instead
    squares: list  # of all numbers, memory-mapped; []: decoded at every use
    source: str  # fingerprint of the files
    synthetic: bool
    same: np.ndarray = None  # [N] int: rows that share a picture or a caption carry the same number
    image: Pieces = None  # of a frozen encoder
    text: Pieces = None
    held: dict = field(default_factory=collections.OrderedDict)  # row group -> encoded images, without squares

    def __len__(self):
        return len(self.number)

    def keep(self, chosen, cause):
        """Leave out the rows where chosen [N] is false."""
        self.bad += [(self.files[file].name, int(row), cause) for file, _, row, _ in self.place[~chosen]]
        for name in ("number", "place", "ids", "captions", "picture"):
            setattr(self, name, getattr(self, name)[chosen])


@dataclass(eq=False)
class Data:
    """The splits, and what turns their rows into batches."""
    sets: dict  # train | val | test -> Split
    splits: dict  # the same names -> [N] row numbers, torch.arange
    facts: dict  # plain: what a model is built from and its inputs made with; `load_model` has them too
    each: object  # map, or that of the decoding threads
    text_dropout: float
    flip: float
    seed: int
    device: torch.device
    fingerprint: str
    synthetic: bool


def uniform(seed, epoch, rows, what):
    """[n] float64 in [0, 1), a pure function of its arguments (SplitMix64, Steele et al. 2014), whatever the batch."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {epoch} {what}".encode()).digest()[:8], "little")
    x = np.asarray(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def make_batch(data, indices, split="train", epoch=None, share=slice(None)):
    """A batch of rows [B] of a split, on the device.

    image: [B, 3, S, S] float, or features [B, T, W] with image_mask [B, T] bool. text: token ids [B, T], or features,
    with text_mask. ids: [B, 2] int; rows of an equal one are no negatives of each other (same picture or caption; both
    without a caption). epoch: draws crops, captions and text dropout; None: none of them. share: the rows whose image
    and text are wanted.
    """
    s, rows, dropped = data.sets[split], np.asarray(indices), np.zeros(len(indices), dtype=bool)
    if epoch is not None:
        dropped = uniform(data.seed, epoch, s.number[rows], "drop") < data.text_dropout
    ids = np.stack([s.same[rows], np.where(dropped, -1, np.arange(len(rows)))], axis=1)
    rows, dropped = rows[share], dropped[share]

    def uniform_draws(what, numbers=s.number[rows]):
        return uniform(data.seed, epoch, numbers, what)
    draw = None if epoch is None else uniform_draws
    batch = {"ids": torch.from_numpy(ids).to(data.device)}
    if s.image is None:
        batch["image"] = crops(data, s, rows, draw)
    else:
        batch["image"], batch["image_mask"] = gather(data, s.image, rows, np.zeros_like(dropped), draw)
    batch["text"], batch["text_mask"] = gather(data, s.text, rows, dropped, draw)
    return batch


def crops(data, split, rows, draw):
    """[B, 3, S, S] float: stored squares cut, flipped and normalised on the device; draw: None for centre crops."""
    squares, size = gather_images(split, rows, data.each).to(data.device), data.facts["image_size"]
    margin = squares.shape[1] - size
    top = left = np.full(len(rows), margin // 2)
    flip = np.zeros(len(rows), dtype=bool)
    if draw:
        top, left = (np.floor(draw(side) * (margin + 1)).astype(np.int64) for side in ("top", "left"))
        flip = draw("flip") < data.flip
    images = torch.stack([square[y:y + size, x:x + size] for square, y, x in zip(squares, top, left, strict=True)])
    images = torch.where(torch.from_numpy(flip).to(data.device)[:, None, None, None], images.flip(2), images)
    mean, std = (255 * torch.tensor(data.facts[name], device=data.device) for name in ("mean", "std"))
    return ((images - mean) / std).permute(0, 3, 1, 2)


def ranges(length):
    """(i, place) of every item of ranges of length[i] items, one range after the other: [sum of length] int each."""
    i = np.repeat(np.arange(len(length)), length)
    return i, np.arange(len(i)) - (np.cumsum(length) - length)[i]


def gather(data, pieces, rows, dropped, draw):
    """(values [B, T] or [B, T, W], mask [B, T]) of rows: the tokens of their pieces, one piece after the other.

    draw: None takes all pieces (the first, with `pieces.one`); else a random one, and beside it each with probability
    .5 (not with `pieces.one`). dropped [B]: rows that get the empty piece instead.
    """
    count = pieces.count[rows]  # [B]
    row, place = ranges(count)
    piece = pieces.first[rows][row] + place
    chosen, beside = place == 0, np.ones(len(place), dtype=bool)
    if draw:
        chosen = place == np.floor(draw("caption") * count).astype(np.int64)[row]
        beside = draw("beside", piece) < 0.5
    taken = chosen if pieces.one else chosen | (beside & ~dropped[row])
    piece, row = np.where(dropped[row], len(pieces.values) - 1, piece)[taken], row[taken]
    values = torch.cat([pieces.values[p] for p in piece.tolist()]).to(data.device)
    n_tokens = np.bincount(row, pieces.length[piece], len(rows)).astype(np.int64)  # [B]
    row, column = (torch.from_numpy(x).to(data.device) for x in ranges(n_tokens))
    longest = max(1, int(n_tokens.max()))
    if data.device.type == "cuda":  # few shapes: a step is recorded for each
        longest = max(longest, min(-(-longest // 16) * 16, data.facts["max_length"]))
    shape = len(rows), longest
    out = torch.zeros(*shape, *values.shape[1:], dtype=values.dtype, device=data.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=data.device)
    out[row, column] = values
    mask[row, column] = True
    return out, mask


def prefetched(work, items, depth=2):
    """work(item) of every item of an iterator in order, computed in a thread up to `depth` items ahead."""
    with ThreadPoolExecutor(1) as thread:
        queue = collections.deque(thread.submit(work, item) for item in itertools.islice(items, depth))
        while queue:
            queue.extend(thread.submit(work, item) for item in itertools.islice(items, 1))
            yield queue.popleft().result()


@functools.lru_cache(maxsize=1)  # a step asks for it anew
def epoch_order(split, seed, epoch):
    """[N] rows in the order of an epoch: row groups shuffled, then rows within windows of whole row groups."""
    rng = np.random.default_rng([seed, epoch])
    groups = np.split(np.arange(len(split)), np.flatnonzero(np.diff(split.place[:, :2], axis=0).any(1)) + 1)
    order, window = [], []
    for i, group in enumerate(rng.permutation(len(groups)), 1):
        window.append(groups[group])
        if sum(map(len, window)) >= SHUFFLE_ROWS or i == len(groups):
            order.append(rng.permutation(np.concatenate(window)))
            window = []
    return np.concatenate(order)


def training_batches(cfg, data, first):
    """Batches of the steps from `first` (counted from 0), each a pure function of seed and step."""
    n, size = steps_per_epoch(cfg, data), cfg.dataset.batch_size

    def batch(step):
        epoch, place = divmod(step, n)
        rows = epoch_order(data.sets["train"], cfg.seed, epoch)[place * size:(place + 1) * size]
        return make_batch(data, rows, "train", epoch, common.share(len(rows)))
    return prefetched(batch, iter(range(first, total_steps(cfg, data))))


def parquet_files(pattern, key):
    """The sorted parquet files of a file, folder or glob. Raises: UserError naming the config key."""
    if not pattern:
        raise UserError(f"{key} is empty; name a parquet file, a folder or a glob, or try --demo")
    path = Path(pattern).expanduser()
    files = sorted(path.glob("**/*.parquet") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise UserError(f"{key}={pattern}: no parquet files there; download allenai/pixmo-cap with its images, point "
                        f"{key}= at it, or try --demo")
    return files


def open_parquet(path, with_images):
    """(pyarrow ParquetFile, image column or None, caption column, id column or None). Raises: UserError naming file and
    columns; without with_images a file of captions alone will do."""
    import pyarrow
    import pyarrow.parquet
    options = {"pre_buffer": False, "buffer_size": 1 << 20}  # else a row group is read whole for its first rows
    file = common.guarded(lambda p: pyarrow.parquet.ParquetFile(p, **options), path)
    kinds = {column.name: column.type for column in file.schema_arrow}

    def holds_bytes(kind):
        if pyarrow.types.is_struct(kind):
            return any(part.name == "bytes" and holds_bytes(part.type) for part in kind)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    image = next((c for c in IMAGE_COLUMNS if with_images and c in kinds and holds_bytes(kinds[c])), None)
    caption, key = (next((c for c in columns if c in kinds), None) for columns in (CAPTION_COLUMNS, ID_COLUMNS))
    if with_images and image is None:
        raise UserError(f"{path}: holds no image bytes (columns {', '.join(kinds)}); expected one of "
                        f"{', '.join(IMAGE_COLUMNS)}: take a release that embeds the images, not their URLs alone")
    if caption is None:
        raise UserError(f"{path}: no captions among {', '.join(kinds)}; expected one of {', '.join(CAPTION_COLUMNS)}")
    return file, image, caption, key


def read_group(path, group, with_images):
    """Yields (image bytes or None, caption, id) of each row of a row group, the last two as pyarrow scalars, with
    READ_ROWS rows in memory. Raises: UserError naming file and row group."""
    import pyarrow
    file, *columns = open_parquet(path, with_images)
    with file:
        batches = file.iter_batches(READ_ROWS, [group], [c for c in columns if c], use_threads=False)
        while batch := common.guarded(lambda _: next(batches, None), f"{path}, row group {group}"):
            images, captions, ids = (batch.column(c) if c else pyarrow.nulls(len(batch)) for c in columns)
            if isinstance(images, pyarrow.StructArray):
                images = images.field("bytes")
            yield from zip((image.as_py() for image in images), captions, ids, strict=True)


def block_cache(cache_dir, name, recipe, n_blocks, make, unpack, label):
    """[n_blocks] unpack(dict) of dicts of memory-mapped tensors, in files that are made one by one, once a recipe.

    make(first) yields those from `first` on. Work that a kill interrupts goes on at the next block; a second process
    waits for the first. Raises: UserError (no room, a damaged file).
    """
    folder = Path(cache_dir) / f"{name}_{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"dataset.cache_dir={cache_dir} cannot be written ({error.strerror}); set another") from None
    paths = [folder / f"{i}.pt" for i in range(n_blocks)]
    with open(folder / ".lock", "ab") as lock:
        if common.fcntl:
            common.fcntl.flock(lock, common.fcntl.LOCK_EX)
        first = next((i for i, path in enumerate(paths) if not path.exists()), n_blocks)
        if first < n_blocks:
            print(f"{label}: {n_blocks - first:,} of {n_blocks:,} blocks are to be made", flush=True)
            for path, block in zip(common.progress(paths[first:], label), make(first), strict=True):
                common.save_checkpoint(path, block, keep_previous=False)
                needed = (n_blocks - first) * path.stat().st_size
                if path == paths[first] and needed > shutil.disk_usage(folder).free:
                    raise UserError(f"{folder}: {needed / 1e9:.2g} GB do not fit there; set dataset.cache_dir= (or, of "
                                    "decoded images, dataset.cache=false)")
    def read(path):
        common.check_crc(path)
        return unpack(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    unpacked = []
    for path in paths:
        try:
            unpacked.append(common.guarded(read, path))
        except UserError:
            raise UserError(f"{path} is damaged; delete it to make it again") from None
    return unpacked


def index_rows(rows, decode, keep, each):
    """{rows: [(row, cause or None, captions, id, hash)], squares: those of the good rows, to `keep`} of [(row, what
    `read_group` yields)]. decode: None reads no images; their features will tell equal ones."""
    def work(item):
        row, (data, caption, name) = item
        try:
            texts, name = caption.as_py(), name.as_py()  # ValueError, too, if they are no UTF-8
            texts = texts if isinstance(texts, list) else [texts]
            texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
            square = decode(data) if decode else None
            if not texts:
                raise ValueError("no caption")
        except ValueError as error:
            return (row, str(error), [], None, 0), None
        name = str(name) if isinstance(name, (int, str)) else None
        return (row, None, texts, name, int(hashlib.sha256(data or b"").hexdigest()[:15], 16)), square
    indexed, squares = zip(*each(work, rows), strict=True)
    squares = [square for square in squares if keep and square is not None]
    return {"rows": [*indexed], "squares": torch.from_numpy(np.array(squares))}


def read_split(pattern, key, cfg, size, each):
    """Split of a parquet file, folder or glob. Every row is read once, to index the good ones and, with dataset.cache,
    to keep their pictures. size: of the stored squares (None: images are not read). Raises: UserError."""
    d, files, synthetic = cfg.dataset, parquet_files(pattern, key), False
    decode = functools.partial(common.decode_image, size=size, max_pixels=d.max_pixels) if size else None
    blocks = []  # (file, row group, row of the file that the group begins with, row of the group that the block does)
    for number, path in enumerate(files):
        metadata, start = open_parquet(path, bool(size))[0].metadata, 0
        synthetic = synthetic or b"synthetic" in (metadata.metadata or {})
        for group in range(metadata.num_row_groups):
            n_rows = metadata.row_group(group).num_rows
            blocks += [(number, group, start, row) for row in range(0, n_rows, BLOCK_ROWS)]
            start += n_rows

    def make(first):
        for (number, group), of_group in itertools.groupby(blocks[first:], key=lambda block: block[:2]):
            of_group = [*of_group]
            rows = enumerate(read_group(files[number], group, bool(size)))
            rows = itertools.islice(rows, of_group[0][3], None)  # behind what a kill left of the group
            for _ in of_group:
                yield index_rows([*itertools.islice(rows, BLOCK_ROWS)], decode, d.cache, each)

    def unpack(block):
        """(its squares, its rows) of `index_rows`."""
        rows = [(int(row), cause, [*texts], own, int(picture)) for row, cause, texts, own, picture in block["rows"]]
        squares = block["squares"].unbind(0)
        if len(squares) != sum(not cause for _, cause, *_ in rows) * bool(size and d.cache):
            raise ValueError("rows without a square")
        return squares, rows
    source = common.fingerprint(files, whole=1 << 26, blocks=16)
    recipe = [source, size, d.max_pixels, d.cache, "centre square, bicubic, 2"]
    made = block_cache(d.cache_dir, f"images{BLOCK_ROWS}", recipe, len(blocks), make, unpack, f"reading {key}")
    good, bad, squares = [], [], []
    for (number, group, start, _), (of_block, rows) in zip(blocks, made, strict=True):
        squares += of_block
        for row, cause, texts, own, picture in rows:
            if cause:
                bad.append((files[number].name, start + row, cause))
            else:
                name = own or f"{files[number].name}:{start + row}"
                good.append((number, group, start + row, row, name, texts, picture))
    if not good:
        why = bad[0][2] if bad else "no rows"
        raise UserError(f"{key}={pattern}: none of {len(bad):,} rows holds an image and a caption (the first: {why})")
    *places, ids, texts, picture = zip(*good, strict=True)
    captions = np.empty(len(good), dtype=object)
    captions[:] = texts
    return Split(files, np.arange(len(good)), np.array(places).T, np.array(ids), captions, np.array(picture), bad,
                 decode, squares, source, synthetic)


def gather_images(split, rows, each=map):
    """uint8 [B, size, size, 3] of rows of a split: from the cache, or decoded from the row groups, of which those of a
    window are held."""
    if split.squares:
        return torch.stack([split.squares[number] for number in split.number[rows]])
    places = [(file, group) for file, group, _, _ in split.place[rows].tolist()]
    for file, group in dict.fromkeys(places):
        if (file, group) not in split.held:
            split.held[file, group] = [data for data, _, _ in read_group(split.files[file], group, True)]
        split.held.move_to_end((file, group))
    data = [split.held[place][row] for place, row in zip(places, split.place[rows, 3], strict=True)]
    while len(split.held) > len({*places}) and sum(map(len, split.held.values())) > 2 * SHUFFLE_ROWS:
        split.held.popitem(last=False)
    return torch.from_numpy(np.stack([*each(split.decode, data)]))


def group_equal(*keys):
    """[N] int: the smallest index of a row's connected component; an equal key joins rows. keys: [N] lists of them."""
    number, pairs = {}, []  # of a key; (row, number of a key that it has)
    for i, column in enumerate(keys):
        for row, values in enumerate(column):
            pairs += [(row, number.setdefault((i, value), len(number))) for value in values]
    row, key = np.array(pairs).T
    same, before = np.arange(len(keys[0])), None
    while not np.array_equal(same, before):
        before, smallest = same.copy(), np.full(len(number), len(same))
        np.minimum.at(smallest, key, same[row])
        np.minimum.at(same, row, smallest[key])
    return same


def leave_out_overlap(sets):
    """Take the rows out of train whose picture is in val or test, and out of val those in test: a split is by image."""
    for name, later in (("train", "val"), ("train", "test"), ("val", "test")):
        if name in sets and later in sets:
            new = ~np.isin(sets[name].picture, sets[later].picture)
            if not new.any():
                raise UserError(f"dataset.{name}_parquet and dataset.{later}_parquet hold the same images; a split "
                                "needs images of its own")
            sets[name].keep(new, f"its image is also in {later}")


# ------------------------------------------------------------------------------- captions and frozen encoders

WORD = re.compile(r"\w+|[^\w\s]")
START, UNKNOWN = 1, 2  # after padding, 0


def build_vocabulary(captions, size):
    """Word pieces of captions, a list of at most `size` (and all characters): words by frequency for three quarters of
    the places, then endings (##ing) of the words that are left."""
    counts = collections.Counter(word for text in captions for word in WORD.findall(text.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    characters = sorted({c for word in counts for c in word})
    pieces = dict.fromkeys(["<pad>", "<start>", "<unknown>", *characters, *(f"##{c}" for c in characters)])
    room = max(0, size - len(pieces))
    words = [word for word in ranked if len(word) > 1 and counts[word] > 1]
    pieces |= dict.fromkeys(words[:3 * room // 4])
    endings = collections.Counter()
    for word in ranked:
        if word not in pieces:
            endings.update({f"##{word[i:]}": counts[word] for i in range(1, len(word) - 1)})
    pieces |= dict.fromkeys(sorted(endings, key=lambda piece: (-endings[piece], piece))[:max(0, size - len(pieces))])
    return list(pieces)


def tokenise(texts, vocabulary, max_length):
    """[int64 tensor of at most max_length ids, ...] of texts: START, then each word's longest pieces from the left."""
    number, known, out = {piece: i for i, piece in enumerate(vocabulary)}, {}, []

    def spell(word):
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if mark + word[start:e] in number), start + 1)
            ids.append(number.get(mark + word[start:end], UNKNOWN))
            start = end
        return ids
    for text in texts:
        ids = [START]
        for word in WORD.findall(text.lower()):
            if word not in known:
                known[word] = spell(word)
            ids += known[word]
        out.append(torch.tensor(ids[:max_length]))
    return out


def read_features(path):
    """({id: [features of tokens [T, W], ...]}, whether they are synthetic) of a file: a dict of `feats` [R, W] or
    [R, T, W] float, `ids` [R], which may repeat (captions of a picture), and where tokens are padded, at the end, a
    `mask` [R, T]. Raises: whatever `common.guarded` tells in a line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make it with encode.py pixmo, set features_file=, or try --demo")
    content = common.load_tensors(path)
    feats, ids, of_id = content["feats"], content["ids"], collections.defaultdict(list)
    if not feats.is_floating_point() or feats.ndim not in (2, 3) or len(ids) != len(feats) or not len(ids):
        raise ValueError("expected feats [N, D] or [N, T, D] and ids [N]; make it with encode.py pixmo")
    feats = feats if feats.ndim == 3 else feats[:, None]
    mask = content.get("mask", torch.ones(feats.shape[:2])).bool()
    length = mask.sum(1)
    if not torch.equal(mask, torch.arange(feats.shape[1]) < length[:, None]):
        raise ValueError("padding must be at the end of a row")
    for row, (name, n) in enumerate(zip(ids, length.tolist(), strict=True)):
        if not torch.isfinite(feats[row]).all():
            raise ValueError(f"NaN or infinite features in row {row}; encode it again")
        of_id[str(int(name) if isinstance(name, torch.Tensor) else name)].append(feats[row, :n])
    return dict(of_id), bool(content.get("synthetic"))


def leave_out_unencoded(split, side, path, features):
    """Rows of a split without features of their id go, like broken ones; the pictures' features tell equal pictures."""
    here = np.array([name in features for name in split.ids])
    if not here.any():
        raise UserError(f"{path}: has no features of {split.files[0].name}, ids such as {split.ids[0]}; its own are "
                        f"such as {next(iter(features))}")
    split.keep(here, f"no features in {Path(path).name}")
    if side == "image":
        contents = (features[name][0].numpy().tobytes() for name in split.ids)
        split.picture = np.array([int(hashlib.sha256(content).hexdigest()[:15], 16) for content in contents])


def pretrained(name, side):
    """(facts, load) of a model of `transformers` by name or folder; load() gives its vision or text part, frozen.

    facts: `key`, what tells its versions apart; of pictures mean, std, image_size, `resize` (their shortest side before
    the centre crop, relative to that); of captions `tokenizer`, max_length.
    Raises: UserError with the remedy.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"the encoder {name} needs the package: pip install transformers (or name: scratch)") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # ten lines of retries where there is no network
    part = "vision" if side == "image" else "text"

    def load():
        model = common.guarded(transformers.AutoModel.from_pretrained, name)
        model = getattr(model, f"{part}_model", model)
        model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
        return model.float().eval().requires_grad_(False)
    try:
        config = common.guarded(transformers.AutoConfig.from_pretrained, name)
    except UserError as error:
        raise UserError(f"{error}; {side} encoders are folders of saved models, names on huggingface.co (with "
                        "HF_HUB_OFFLINE=1 downloaded ones), cached or scratch") from None
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(name).glob("*"))]
    facts = {"key": [name, getattr(config, "_commit_hash", None), files]}
    config = getattr(config, f"{part}_config", config)
    if side == "text":
        tokenizer = common.guarded(transformers.AutoTokenizer.from_pretrained, name)
        limits = tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf
        return {**facts, "tokenizer": tokenizer, "max_length": min(limits)}, load
    read = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict
    processor, size = common.guarded(read, name)[0], getattr(config, "image_size", None) or 224
    shortest = (processor.get("size") or {}).get("shortest_edge")
    crop = (processor.get("crop_size") or {}).get("height")
    return {**facts, "mean": processor.get("image_mean") or [0.5] * 3, "std": processor.get("image_std") or [0.5] * 3,
            "resize": shortest / crop if shortest and crop else 1.0,
            "image_size": size[0] if isinstance(size, (list, tuple)) else size}, load


def encoded(cfg, data, split, side, encoder):
    """[P + 1] tokens [T, W], float16, that a frozen encoder (facts, load) makes of a split's pictures, or captions and
    an empty one. It runs once: they are a `block_cache` of BLOCK_BATCHES batches a block."""
    facts, load = encoder
    name, max_length, image_size = facts["key"][0], data.facts["max_length"], data.facts["image_size"]
    texts = [*itertools.chain.from_iterable(split.captions), ""]
    n, size = len(split) if side == "image" else len(texts), ENCODED_ROWS * BLOCK_BATCHES

    @torch.no_grad()
    def run(model, rows):
        """(tokens [V, W], one picture or caption after the other; [B] how many each has) of rows [B]."""
        try:
            if side == "image":
                hidden = model(pixel_values=crops(data, split, rows.numpy(), None)).last_hidden_state
                hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden  # a map of a CNN
                mask = torch.ones(hidden.shape[:2])
            else:
                inputs = facts["tokenizer"]([texts[i] for i in rows], truncation=True, max_length=max_length,
                                            padding=True, return_tensors="pt").to(data.device)
                mask = inputs["attention_mask"]
                hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{name} does not take dataset.image_size={image_size}, max_text_length={max_length} "
                            f"({common.reason_of(error)})") from None
        tokens = hidden[mask.bool()].half().cpu()
        if not torch.isfinite(tokens).all():
            raise UserError(f"{name}: its features are beyond what float16 holds; take another encoder")
        return tokens, mask.sum(1).int().cpu()

    def make(first):
        model = load().to(data.device)
        for block in torch.arange(n).split(size)[first:]:
            tokens, length = zip(*(run(model, rows) for rows in block.split(ENCODED_ROWS)), strict=True)
            yield {"tokens": torch.cat(tokens), "length": torch.cat(length).tolist()}
    recipe = [facts["key"], split.source, split.place.tolist(), side, data.facts["resize"], image_size, max_length]
    label = f"{name} on {split.files[0].name}"
    made = block_cache(cfg.dataset.cache_dir, f"tokens{size}", recipe, -(-n // size), make,
                       lambda block: block["tokens"].split(block["length"]), label)
    tokens = [*itertools.chain.from_iterable(made)]
    return tokens + [tokens[0][:0]] * (side == "image")


def load_data(cfg, facts=None, only=None):
    """Data of cfg: train, val and, if there is one, test. Raises: UserError naming file or key.

    facts: of a finished run (else the vocabulary is built from the training captions). only: parquet files to load
    instead, as `embed`.
    """
    check(cfg)
    d, device = cfg.dataset, common.pick_device(cfg.device)
    sections = {"image": cfg.vision_encoder, "text": cfg.text_encoder}
    names = ("train", "val", "test") if d.test_parquet else ("train", "val")
    patterns = {name: (getattr(d, f"{name}_parquet"), f"dataset.{name}_parquet") for name in names}
    patterns = {"embed": (only, "parquet")} if only else patterns
    models = {side: pretrained(section.name, side) for side, section in sections.items()
              if section.name not in ("scratch", "cached")}
    if facts is None:
        facts = {"image_size": 224, "resize": 1 / CROP, "mean": [0.5] * 3, "std": [0.5] * 3, "max_length": math.inf,
                 "widths": {}, "vocabulary": None}
        for of_model, _ in models.values():
            facts |= {key: value for key, value in of_model.items() if key in facts}
        facts["image_size"] = d.image_size or facts["image_size"]
        facts["max_length"] = min(d.max_text_length, facts["max_length"])
    size = None if cfg.vision_encoder.name == "cached" else round(facts["image_size"] * facts["resize"])
    for pattern, key in patterns.values():  # what is missing is said before minutes of decoding
        for path in parquet_files(pattern, key):
            open_parquet(path, bool(size))
    features = {side: common.guarded(read_features, section.features_file) for side, section in sections.items()
                if section.name == "cached"}
    each = ThreadPoolExecutor(cfg.num_workers).map if cfg.num_workers else map
    sets = {name: read_split(pattern, key, cfg, size, each) for name, (pattern, key) in patterns.items()}
    for split, (side, (of_id, _)) in itertools.product(sets.values(), features.items()):
        leave_out_unencoded(split, side, sections[side].features_file, of_id)
    leave_out_overlap(sets)
    for split in sets.values():
        split.same = group_equal(split.picture[:, None].tolist(), split.captions)
    if cfg.text_encoder.name == "scratch" and facts["vocabulary"] is None:
        captions = itertools.chain.from_iterable(sets["train"].captions)
        facts["vocabulary"] = build_vocabulary(captions, cfg.text_encoder.vocab_size)
    digest = " ".join([common.fingerprint([sections[side].features_file for side in features]),
                       *(f"{name}={split.source}" for name, split in sets.items())])
    synthetic = any(split.synthetic for split in sets.values()) or any(made_up for _, made_up in features.values())
    rows = {name: torch.arange(len(split)) for name, split in sets.items()}
    data = Data(sets, rows, facts, each, d.text_dropout_prob, d.horizontal_flip_prob, cfg.seed, device,
                hashlib.sha256(digest.encode()).hexdigest()[:16], synthetic)
    room = max(RESIDENT_BYTES, torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0)
    for split, side in itertools.product(sets.values(), sections):
        values, count = None, [1] * len(split) if side == "image" else [*map(len, split.captions)]
        if side in models:
            values = encoded(cfg, data, split, side, models[side])
        elif side in features:
            of_rows = [features[side][0][name] for name in split.ids]
            values, count = [*itertools.chain.from_iterable(of_rows)], [*map(len, of_rows)]
            values.append(values[0][:0])
        elif side == "text":
            texts = [*itertools.chain.from_iterable(split.captions), ""]
            values = tokenise(texts, facts["vocabulary"], facts["max_length"])
        if values is None:
            continue
        if values[0].ndim == 2:
            facts["widths"]["vision" if side == "image" else "text"] = values[0].shape[1]
        if device.type != "cpu" and sum(x.nbytes for x in values) <= room:
            values = torch.cat(values).to(device).split([*map(len, values)])
        setattr(split, side, Pieces(values, np.array(count), one=sections[side].name == "scratch"))
    return data


def random_data(cfg):
    """The stand-in at cfg's own sizes: for profile_flops.py without data."""
    stand_in = copy.deepcopy(cfg)
    use_demo(stand_in)
    return load_data(stand_in)


# -------------------------------------------------------------------------------------------------------------- plots

def plot_sizes(path, panels, xlabel, title):
    """Panels {ylabel: {label: {"x", "y"[, "low", "high"]}}} over a doubling x, with bands; "chance" grey and dotted."""
    figure, axes = common.new_figure(len(panels), width=5.4, height=4)
    ticks = sorted({x for lines in panels.values() for line in lines.values() for x in line["x"]})
    for axis, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        for i, (label, line) in enumerate(lines.items()):
            style = {"color": "grey", "linestyle": ":"} if label == "chance" else {"color": f"C{i}", "marker": "."}
            axis.plot(line["x"], line["y"], label=label, **style)
            if "low" in line:
                axis.fill_between(line["x"], line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    common.save_figure(figure, path)


def draw_pictures(folder, cfg, data, curves, codes, whole, split, n=200):
    """mrl_performance.png (`size_curves`), bytes.png (`bytes_table`), embedding_space.png, similarity_matrix.png (the
    first n pairs)."""
    mark, first = " (synthetic data)" if data.synthetic else "", [x[:n] for x in whole]
    title = f"{len(whole[0]):,} {split} pairs{mark}"
    plot_sizes(folder / "mrl_performance.png", curves, "dimensions kept", title)
    lines = {}
    for kind in ("float32", "int8", "one bit"):
        of_kind = [values for row, values in codes.items() if row.startswith(kind)]
        lines[kind] = {"x": [v["bytes"] for v in of_kind], "y": [v["mean R@5"] for v in of_kind]}
    plot_sizes(folder / "bytes.png", {"mean R@5": lines}, "bytes of a gallery item", title)
    common.plot_embedding_space(folder / "embedding_space.png", {"images": first[0], "captions": first[1]},
                                f"{len(first[0])} pairs of {split}{mark}", cfg.evaluation.projection)
    common.plot_similarity_matrix(folder / "similarity_matrix.png", first[0] @ first[1].T, f"{split}{mark}", "captions",
                                  "images")


# --------------------------------------------------------------------------------------------------------------- main

STAGES = ("all", "prepare", "train", "evaluate", "embed")


def load_model(folder):
    """(MatryoshkaModel of a finished run in eval mode, its Config): model(batch) -> raw (image [B, D], text [B, D]).

    `model.facts` makes its inputs: image_size, mean, std, vocabulary and max_length of `tokenise`. Raises: UserError.
    """
    cfg = common.load_config(Config, Path(folder) / "config.yaml")
    facts = common.guarded(common.load_checkpoint, Path(folder) / "best_model.pt")["facts"]
    model = MatryoshkaModel(cfg, facts)
    common.load_best(folder, model)
    model.facts = facts
    return model, cfg


def write_embeddings(cfg):
    """--stage embed: embeddings_<parquet>_<dim>.pt in the run's folder, {image [N, dim], text [N, dim] normalised
    float32, ids [N], dim, parquet}, of any parquet."""
    folder, largest = Path(cfg.output_dir), cfg.vision_encoder.projection_dim
    dim, d = cfg.dim or largest, cfg.dataset
    if dim > largest:
        raise UserError(f"dim={dim} is more than vision_encoder.projection_dim={largest}")
    pattern = cfg.parquet or d.test_parquet or d.val_parquet
    facts = common.guarded(common.load_checkpoint, folder / "best_model.pt")["facts"]
    data = load_data(cfg, facts, pattern)
    model = build_model(cfg, data)
    common.load_best(folder, model)
    image, text = (F.normalize(x, dim=1).cpu() for x in embed(cfg, model, data, "embed", dim=dim))
    content = {"image": image, "text": text, "ids": data.sets["embed"].ids.tolist(), "dim": dim, "parquet": pattern}
    path = folder / f"embeddings_{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(pattern).stem)}_{dim}.pt"
    common.atomic_write(path, lambda file: torch.save(content, file))
    print(f"{len(image):,} pairs x {dim} dimensions, {len(data.sets['embed'].bad)} rows left out: {path}")


def write_left_out(folder, data):
    """left_out.csv: split, file, row and cause of what is not used."""
    lines = [f"{name},{file},{row},{json.dumps(cause)}" for name, split in data.sets.items()
             for file, row, cause in split.bad]
    common.write_text(folder / "left_out.csv", "\n".join(["split,file,row,cause", *lines, ""]))


def print_splits(data):
    """One line a split: rows, and what was left out and why."""
    for name, split in data.sets.items():
        causes = collections.Counter(cause for *_, cause in split.bad).most_common(4)
        share = 100 * len(split.bad) / (len(split) + len(split.bad))
        print(f"{name}: {len(split):,} pairs, {len(split.bad):,} rows left out ({share:.2f}%)",
              *(f"{n} {cause}" for cause, n in causes), sep="; ")


def use_demo(cfg):
    """Write the stand-in data and point the config at them."""
    folder = demo_data.write_pixmo()
    for name in ("train", "val", "test"):
        setattr(cfg.dataset, f"{name}_parquet", f"{folder}/pixmo_{name}.parquet")
    for side, section in (("image", cfg.vision_encoder), ("text", cfg.text_encoder)):
        if section.name == "cached":
            section.features_file = f"{demo_data.write_pixmo_features(folder)}/{side}_features.pt"


@common.exit_codes
def main(argv):
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo)
    if stage == "embed":
        write_embeddings(cfg)
        return
    with common.one_after_the_other():  # the first fills the caches
        data = load_data(cfg)
    print_splits(data)
    if stage in ("all", "train"):
        train(cfg, data)
    if common.process()[0]:
        return  # the first of several processes evaluates
    if stage in ("all", "evaluate"):
        common.publish(cfg.output_dir, common.published(cfg, data.fingerprint) or evaluate(cfg, data))


if __name__ == "__main__":
    sys.exit(main())
