"""Projection heads on COCO: which head and loss best align frozen SigLIP images with frozen E5-Mistral text?

Small heads are trained on precomputed embeddings and judged by image-text retrieval among held-out images, beside
chance, ridge regression and CCA. Losses: InfoNCE (CLIP, arXiv 2103.00020), pairwise sigmoid (SigLIP, arXiv 2303.15343),
smoothed InfoNCE (ALIGN, arXiv 2102.05918), a queue of momentum keys (MoCo, arXiv 1911.05722), soft targets (ALBEF,
BLIP, arXiv 2107.07651, 2201.12086). Every scorer stands twice: by cosine, and corrected for hubs (CSLS, 1710.04087).

    python exp_coco_heads.py configs/siglip.yaml                    # split, train, evaluate, plots
    python exp_coco_heads.py configs/siglip.yaml --demo             # synthetic stand-in, no data needed
    python exp_coco_heads.py configs/siglip.yaml --stage embed      # the test set through the trained heads
    python exp_coco_heads.py configs/tune/siglip.yaml               # search hyper-parameters with Optuna
    python exp_coco_heads.py --compare results/siglip* results/clip # heads and seeds side by side, paired over images

It prints the test table last: R@1/5/10 both ways and RSUM with 95% intervals, the closed forms, chance, and the paired
differences between them.

Measured: 1,000 test photos of Flickr8k (5,397 train; MobileNet and MiniLM features), seeds 1-3, RSUM by cosine / CSLS:
siglip 285.1 +- 1.9 / 292.1, siglip_cca 288.8 +- .7 / 306.0, cross_modal 293.5 +- 1.6 / 308.5, CCA 268.7 / 300.5, chance
3.2; about a minute of training on one CPU thread.

Shapes: P pairs (one a caption), M unique images, D_img and D_txt the encoders' widths, D the shared width, B pairs a
batch, m images and n captions of a split.

Deviations from the recipe this follows:
- the gallery holds unique images (a repeated gallery shows as R@5 = R@1 for text to image);
- captions of the same image in a batch or queue are no negatives;
- attention works on 8 pseudo-tokens (over one vector it is affine), cross_modal on a shared memory (with the partner it
  cheats); both are added to a linear head through a gate that starts at 0, the tokens are concatenated, not averaged;
- momentum copies cover BatchNorm buffers and have no dropout; empty queue places are left out;
- the sigmoid loss learns its scale and bias and is divided by B, not B^2;
- inputs are z-scored and thinned by feature dropout: on a few thousand images heads overfit in two epochs otherwise;
- validation has at least min(10%, 1,000) images and picks the epoch by RSUM; the last batch of an epoch is not short.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import platform
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import common
import demo_data
from common import UserError, ranged

KS = (1, 5, 10)
N_TOKENS = 8  # pseudo-tokens of the attention head
N_SLOTS = 64  # of the cross_modal heads' memory
BANK_ROWS = 50_000  # training rows a side that measure hubness
STATISTICS_ROWS = 2**16  # z-scoring is measured on at most so many training pairs, drawn at random


# ------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = "pretrain_encoded"  # of {name}_image_embeddings.pt, _text_embeddings.pt, _metadata.json
    name: str = "train2017"  # the files that are split by image
    train: int | float | Literal["auto", "rest"] = "auto"  # share or number of images; auto: .8, rest with a test file
    val: int | float | Literal["auto"] = "auto"  # share or number of images; auto: 1%, at least min(10%, 1,000 images)
    test: int | float | str = 0.04  # share or number of images; or a held-out file's name (val2017); or karpathy
    karpathy_ids: str = ""  # with test=karpathy: JSON list or text file of the test images' COCO image or caption ids
    split_seed: int = ranged(42, ">= 0", "< 4294967296")  # of the split: the same for every `seed`, to share a test set


@dataclass
class ModelConfig:
    type: "Literal[tuple(HEADS)]" = "siglip"  # head
    output_dim: int = ranged(512, ">= 1")  # D, width of the shared space
    hidden_dim: int | None = ranged(None, ">= 1")  # null: 1024; clip half the input width, align 2048
    num_heads: int = ranged(8, ">= 1")  # of attention and cross_modal
    num_layers: int = ranged(2, ">= 0")  # of attention
    dropout: float = ranged(0.1, ">= 0", "< 1")  # inside every head but siglip
    use_bn: bool = True  # align: BatchNorm on the hidden layer (false: LayerNorm)
    momentum: float = ranged(0.995, ">= 0", "<= 1")  # of the copies that the queue and blip losses use
    input_dropout: float = ranged(0.5, ">= 0", "< 1")  # share of the input features dropped in training
    init: Literal["random", "cca"] = "random"  # start of siglip's, attention's and cross_modal's linear part
    learnable_temp: bool = True  # train logit_scale (and the sigmoid's bias)


@dataclass
class LossConfig:
    type: "Literal[tuple(LOSSES)]" = "siglip"  # clip: InfoNCE; siglip: pairwise sigmoid; align: InfoNCE, smoothed
    temperature: float | None = ranged(None, "> 0")  # starting 1 / logit_scale (null: .07; siglip .1, align 1)
    logit_bias: float | Literal["auto"] = -10.0  # siglip: starting bias; auto: -log(batch_size - 1)
    label_smoothing: float | None = ranged(None, ">= 0", "< 1")  # of clip and align (null: 0, align 0.1)
    false_negatives: Literal["mask", "multi_positive", "ignore"] | None = None  # null: mask; blip multi_positive
    queue_size: int | None = ranged(None, ">= 1")  # queue, blip: momentum keys (null: 4096, blip 57600; at most all)
    alpha: float = ranged(0.4, ">= 0", "<= 1")  # blip: weight of the soft targets, ramped up over the first epoch


@dataclass
class TrainingConfig:
    batch_size: int = ranged(512, ">= 2")  # pairs a step
    learning_rate: float = ranged(1e-4, "> 0", "<= 1e6")  # AdamW
    weight_decay: float = ranged(0.01, ">= 0")  # not on scale, bias, gates, norms
    num_epochs: int = ranged(50, ">= 1")  # at most
    patience: int = ranged(5, ">= 1")  # epochs without a better validation before stopping
    monitor: Literal["loss", "r1", "rsum"] = "rsum"  # validation quantity that picks the epoch (r1: mean of both ways)
    warmup_steps: int = ranged(0, ">= 0")  # linear warm-up
    schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up: cosine to 0 over num_epochs
    one_caption_per_image: bool = False  # an epoch is one random caption of each image instead of all


@dataclass
class EvaluationConfig:
    hubness_k: int = ranged(10, ">= 0")  # CSLS: neighbours that measure how much of a hub a row is (0: no CSLS rows)
    embed: str = ""  # --stage embed: name of the files to embed (empty: the test split)


@dataclass
class Config:
    experiment: str = Path(__file__).stem.removeprefix("exp_")  # the script that a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, dropout
    device: str = "auto"  # auto | cuda | mps | cpu
    cuda_graphs: bool = True  # a GPU replays a recorded training step (false: kernel by kernel, to debug it)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv, tables and pictures to Weights & Biases
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class TuneConfig:
    experiment: str = Config.experiment  # tune YAML: which script it belongs to
    base: str = "configs/siglip.yaml"  # tune YAML: the run config that trials change, itself the first trial
    search_space: dict = field(default_factory=dict)  # tune YAML: key -> list of choices, or {low, high[, log]}
    study_name: str = "xclip_siglip_tuning"  # tune YAML: a changed search gets a new name, with a hash appended
    storage: str = "sqlite:///optuna_study.db"  # tune YAML: Optuna URL, or a path for a JournalStorage (many workers)
    n_trials: int = ranged(50, ">= 1")  # tune YAML: in all, over restarts
    n_jobs: int = ranged(3, ">= 1")  # tune YAML: worker processes
    n_captions: int = ranged(100_000, ">= 2")  # tune YAML: size of the tuning subset (whole training images)
    results_dir: str = "optuna_results"  # tune YAML: where best_config.yaml goes


# -------------------------------------------------------------------------------------------------------------- model

def linear(width, model):
    """SigLIP's head, LayerNorm and Linear: [B, width] -> [B, D]. To start at CCA the Linear alone."""
    layer = nn.Linear(width, model.output_dim)
    return layer if model.init == "cca" else nn.Sequential(nn.LayerNorm(width), layer)


def mlp(width, hidden_dim, model, hidden_norm=nn.Identity, output_norm=nn.Identity):
    """Linear-norm-GELU-Dropout-Linear-norm: [B, width] -> [B, D]."""
    return nn.Sequential(nn.Linear(width, hidden_dim), hidden_norm(hidden_dim), nn.GELU(), nn.Dropout(model.dropout),
                         nn.Linear(hidden_dim, model.output_dim), output_norm(model.output_dim))


class GatedHead(nn.Module):
    """linear(x) + gate * branch(x); the gate, a learned scalar, starts at 0, and so the head as the linear one."""

    def __init__(self, width, model, branch):
        super().__init__()
        self.linear, self.branch = linear(width, model), branch
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.linear(x) + self.gate * self.branch(x)


class AttentionBranch(nn.Module):
    """The vector as 8 learned pseudo-tokens, mixed by a transformer encoder, concatenated, projected.

    Self-attention over the vector as one token would be an affine map in which queries and keys get no gradient; the
    mean of the tokens would leave hidden_dim / 8 numbers.
    """

    def __init__(self, width, model):
        super().__init__()
        hidden_dim = model.hidden_dim or 1024
        token_dim = hidden_dim // N_TOKENS
        if hidden_dim % (N_TOKENS * model.num_heads):
            raise UserError(f"model.hidden_dim={hidden_dim} must be a multiple of {N_TOKENS} tokens x model.num_heads="
                            f"{model.num_heads}")
        self.tokens = nn.Linear(width, hidden_dim)
        layers = [nn.TransformerEncoderLayer(token_dim, model.num_heads, 4 * token_dim, model.dropout, "gelu",
                                             batch_first=True, norm_first=True) for _ in range(model.num_layers)]
        self.encoder = nn.Sequential(*layers)
        self.norm, self.output = nn.LayerNorm(token_dim), nn.Linear(hidden_dim, model.output_dim)

    def forward(self, x):
        tokens = self.tokens(x).unflatten(1, (N_TOKENS, -1))  # [B, 8, token_dim]
        return self.output(self.norm(self.encoder(tokens)).flatten(1))


class CrossModalBranch(nn.Module):
    """The vector attends to a learned memory [64, hidden_dim] that both modalities share; the partner is never seen.

    A head that attends to the query's own partner scores 100% on pure noise.
    """

    def __init__(self, width, model, memory):
        super().__init__()
        hidden_dim = memory.shape[1]
        if hidden_dim % model.num_heads:
            raise UserError(f"model.hidden_dim={hidden_dim} must be a multiple of model.num_heads={model.num_heads}")
        self.memory, self.num_heads = memory, model.num_heads
        self.embed, self.norm = nn.Linear(width, hidden_dim), nn.LayerNorm(hidden_dim)
        self.query, self.value = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.key = nn.Linear(hidden_dim, hidden_dim, bias=False)  # a bias cancels in the softmax
        self.dropout = nn.Dropout(model.dropout)
        self.output = mlp(hidden_dim, hidden_dim, model)

    def attention(self, embedded):
        """Weights [B, heads, 64] of embedded [B, hidden_dim]."""
        query = self.query(self.norm(embedded)).unflatten(1, (self.num_heads, -1))  # [B, heads, d]
        key = self.key(self.memory).unflatten(1, (self.num_heads, -1))  # [64, heads, d]
        return (torch.einsum("bhd,shd->bhs", query, key) / query.shape[-1] ** 0.5).softmax(-1)

    def forward(self, x):
        embedded = self.embed(x)
        value = self.value(self.memory).unflatten(1, (self.num_heads, -1))
        read = torch.einsum("bhs,shd->bhd", self.dropout(self.attention(embedded)), value).flatten(1)
        return self.output(embedded + read)


# {model.type: function of (width, model config, memory shared by both sides)}: a new head is a line here.
HEADS = {
    "mlp": lambda width, model, memory: mlp(width, model.hidden_dim or 1024, model, output_norm=nn.LayerNorm),
    "siglip": lambda width, model, memory: linear(width, model),
    "clip": lambda width, model, memory: mlp(width, model.hidden_dim or width // 2, model),
    "align": lambda width, model, memory: mlp(width, model.hidden_dim or 2048, model,
                                              hidden_norm=common.BatchNorm1d if model.use_bn else nn.LayerNorm),
    "blip": lambda width, model, memory: mlp(width, model.hidden_dim or 1024, model, output_norm=nn.LayerNorm),
    "attention": lambda width, model, memory: GatedHead(width, model, AttentionBranch(width, model)),
    "cross_modal": lambda width, model, memory: GatedHead(width, model, CrossModalBranch(width, model, memory))}


def make_heads(model, input_dims):
    """[image head, text head], modules [B, width] -> [B, output_dim], for the two widths of the embeddings."""
    memory = nn.Parameter(torch.randn(N_SLOTS, model.hidden_dim or 1024)) if model.type == "cross_modal" else None
    return [HEADS[model.type](width, model, memory) for width in input_dims]


class ProjectionModel(nn.Module):
    """One head a modality, a shared logit scale and (sigmoid loss) bias; for the queue and blip losses momentum copies
    and queues.

    statistics: [(mean, deviation) of image features, of text features]; ramp_steps: until blip's alpha is whole.
    forward(image [B, D_img], text [B, D_txt]) -> (z_image, z_text), both [B, D], L2-normalised.
    """

    def __init__(self, cfg, statistics, queue_size, ramp_steps):
        super().__init__()
        model, loss = cfg.model, cfg.loss
        self.heads = nn.ModuleList(make_heads(model, [len(mean) for mean, _ in statistics]))  # image, text
        for name, (mean, deviation) in zip(("image", "text"), statistics, strict=True):  # saved with the weights
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_deviation", deviation)
        self.input_dropout = nn.Dropout(model.input_dropout)
        self.loss_type, self.alpha, self.momentum = loss.type, loss.alpha, model.momentum
        self.false_negatives = loss.false_negatives or ("multi_positive" if loss.type == "blip" else "mask")
        smoothing = 0.1 if loss.type == "align" else 0.0
        self.label_smoothing = smoothing if loss.label_smoothing is None else loss.label_smoothing
        temperature = loss.temperature or {"siglip": 0.1, "align": 1.0}.get(loss.type, 0.07)
        low, high = {"align": (1e-3, 100), "blip": (2, 1000)}.get(loss.type, (1, 100))  # of the learnt 1 / temperature
        if not low <= 1 / temperature <= high:
            raise UserError(f"loss.temperature={temperature}: must lie in [{1 / high:g}, {1 / low:g}] with loss.type="
                            f"{loss.type}")
        self.log_scale_range = math.log(low), math.log(high)
        bias = -math.log(cfg.training.batch_size - 1) if loss.logit_bias == "auto" else float(loss.logit_bias)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=model.learnable_temp)
        self.logit_bias = None
        if loss.type == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(bias), requires_grad=model.learnable_temp)
        self.momentum_heads = None
        if loss.type in ("queue", "blip"):
            self.momentum_heads = copy.deepcopy(self.heads).requires_grad_(False)  # together: a memory stays shared
            self.register_buffer("queue", torch.zeros(2, queue_size, model.output_dim))  # momentum keys: image, text
            self.register_buffer("queue_ids", torch.full((queue_size,), -1))  # -1: not filled yet, never a negative
            self.register_buffer("queue_next", torch.zeros((), dtype=torch.long))
            self.register_buffer("n_steps", torch.zeros((), dtype=torch.long))
            self.ramp_steps = ramp_steps
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.momentum_heads is not None:
            self.momentum_heads.eval()  # no dropout in the copies
        return self

    def standardised(self, image, text):
        return (image - self.image_mean) / self.image_deviation, (text - self.text_mean) / self.text_deviation

    def embed_image(self, x):
        """[B, D_img] -> [B, D], L2-normalised."""
        x = self.input_dropout((x - self.image_mean) / self.image_deviation)
        return F.normalize(self.heads[0](x).float(), dim=-1)

    def embed_text(self, x):
        """[B, D_txt] -> [B, D], L2-normalised."""
        x = self.input_dropout((x - self.text_mean) / self.text_deviation)
        return F.normalize(self.heads[1](x).float(), dim=-1)

    def forward(self, image, text):
        return self.embed_image(image), self.embed_text(text)

    @torch.no_grad()
    def momentum_keys(self, image, text):
        """(image, text) keys [B, D] of the momentum copies; None without."""
        if self.momentum_heads is None:
            return None
        image, text = self.standardised(image, text)
        return tuple(F.normalize(head(x).float(), dim=-1)
                     for head, x in zip(self.momentum_heads, (image, text), strict=True))

    @torch.no_grad()
    def finish_step(self, keys=None, ids=None):
        """After an optimizer step: clamp the scale; move the momentum copies (MoCo, equation 2; BatchNorm buffers too);
        enqueue the batch's keys."""
        self.log_scale.clamp_(*self.log_scale_range)
        if keys is None:
            return
        copies, lives = ([*m.parameters(), *m.buffers()] for m in (self.momentum_heads, self.heads))  # a memory once
        for copied, live in zip(copies, lives, strict=True):
            if copied.is_floating_point():
                copied.lerp_(live, 1 - self.momentum)
            else:
                copied.copy_(live)
        size = len(self.queue_ids)
        keys, ids = torch.stack(keys)[:, -size:], ids[-size:]  # a batch larger than the queue leaves its last rows
        slots = (self.queue_next + torch.arange(len(ids), device=ids.device)) % size
        self.queue[:, slots], self.queue_ids[slots] = keys, ids
        self.queue_next.copy_((self.queue_next + len(ids)) % size)
        self.n_steps += 1


def build_model(cfg, data):
    """ProjectionModel of the data's widths, on their device. Raises: UserError on settings that do not go together."""
    for key, types in (("label_smoothing", ("clip", "align")), ("queue_size", ("queue", "blip"))):
        if getattr(cfg.loss, key) and cfg.loss.type not in types:
            raise UserError(f"loss.{key}={getattr(cfg.loss, key)} works with loss.type={' or '.join(types)}, not "
                            f"{cfg.loss.type}")
    if cfg.model.init == "cca" and cfg.model.type not in ("siglip", "attention", "cross_modal"):
        raise UserError(f"model.init=cca starts the linear part of a head; model.type={cfg.model.type} has none")
    n_train = len(data.splits["train"])
    queue_size = min(cfg.loss.queue_size or {"queue": 4096}.get(cfg.loss.type, 57_600), n_train)
    return ProjectionModel(cfg, data.statistics, queue_size, len(epoch_batches(data, cfg, 0))).to(data.images.device)


def linear_part(head):
    """The module that a start at CCA sets."""
    return head.linear if isinstance(head, GatedHead) else head


@torch.no_grad()
def initialise(cfg, model, data):
    """With model.init=cca: the heads' linear part becomes the CCA of best validation RSUM with CSLS; the rows that are
    wider than CCA stay random, at a tenth of their size."""
    if cfg.model.init == "random":
        return
    scorer, _ = closed_forms(data, 10)["CCA, CSLS"]  # not evaluation.hubness_k, which leaves a run what it is
    for head, matrix, (_, deviation) in zip(model.heads, (scorer.image, scorer.text), data.statistics, strict=True):
        layer = linear_part(head)
        rows = (deviation[:, None] * matrix).T[:layer.out_features]  # [dims, width], of z-scored features
        size = layer.weight.std()  # so that learning rate and scale mean the same from either start
        layer.weight.mul_(0.1)
        layer.weight[:len(rows)] = rows * size / rows.square().mean().sqrt()
        layer.bias.zero_()
    if model.momentum_heads is not None:
        model.momentum_heads.load_state_dict(model.heads.state_dict())


def build_optimizer(cfg, model):
    """AdamW; no weight decay on scale, bias, gates and norms; what starts at CCA learns at a tenth of the rate."""
    slow = {id(p) for head in model.heads for p in linear_part(head).parameters()} if cfg.model.init == "cca" else ()
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            rate = cfg.training.learning_rate * (0.1 if id(p) in slow else 1.0)
            groups.setdefault((rate, cfg.training.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
                             fused=model.log_scale.is_cuda)


# ---------------------------------------------------------------------------------------------------------- objective

def contrastive_loss(model, z_image, z_text, ids, keys, rows):
    """InfoNCE of a batch; of `align` with smoothed labels."""
    return common.info_nce(z_image, z_text, model.log_scale.exp(), ids, model.false_negatives, model.label_smoothing,
                           rows=rows)


def pairwise_loss(model, z_image, z_text, ids, keys, rows):
    """SigLIP's sigmoid loss of a batch."""
    return common.sigmoid_loss(z_image, z_text, model.log_scale.exp(), model.logit_bias, ids, model.false_negatives,
                               rows=rows)


def queue_loss(model, z_image, z_text, ids, keys, rows):
    """Cross-entropy of each z over the momentum keys of the batch and the filled part of the queue, mean of both ways.

    queue: one positive, the own partner's key (MoCo, He et al. 2020, equation 1). blip: soft targets, alpha of the
    momentum model's own softmax and 1 - alpha of the positives (ALBEF, Li et al. 2021, equation 6; BLIP, Li et al.
    2022). Without keys (validation): InfoNCE of the batch.
    """
    if keys is None:
        return contrastive_loss(model, z_image, z_text, ids, None, rows)
    scale, n = model.log_scale.exp(), len(ids)
    all_ids = torch.cat([ids, model.queue_ids])
    same = ids[rows, None] == all_ids  # [rows, B + queue]
    own = torch.eye(n, len(all_ids), dtype=torch.bool, device=ids.device)[rows]
    dropped = (all_ids == -1).expand_as(same)
    if model.false_negatives == "mask":
        dropped = dropped | (same & ~own)
    positive = (same if model.false_negatives == "multi_positive" else own).to(z_image.dtype)
    targets = positive / positive.sum(1, keepdim=True)
    total = 0.0
    with common.full_precision():  # TF32 moves large logits
        for z, own_key, other_keys, queue in ((z_image, keys[0], keys[1], model.queue[1]),
                                              (z_text, keys[1], keys[0], model.queue[0])):
            candidates = torch.cat([other_keys, queue])  # [B + queue, D]
            log_p = (scale * z[rows] @ candidates.T).masked_fill(dropped, -torch.inf).log_softmax(1)
            goal = targets
            if model.loss_type == "blip":
                alpha = model.alpha * (model.n_steps / model.ramp_steps).clamp(max=1)
                soft = (scale.detach() * own_key[rows] @ candidates.T).masked_fill(dropped, -torch.inf).softmax(1)
                goal = alpha * soft + (1 - alpha) * targets
            total = total - (goal * log_p.masked_fill(dropped, 0)).sum() / (2 * n)
    return total


# {loss.type: function of (model, z_image [B, D], z_text [B, D], ids [B] of the images, momentum keys or None, rows)}: a
# new loss is a line here. rows: the slice of the batch that is this process's; its part of the mean over all B.
LOSSES = {
    "clip": contrastive_loss, "siglip": pairwise_loss, "align": contrastive_loss,
    "queue": queue_loss, "blip": queue_loss}


def train_step(model, batch, optimizer):
    """One optimisation step -> {loss} as a 0-d tensor (no synchronisation). bf16 autocast on CUDA.

    Of several processes each embeds its share of the batch and has its part of the loss; negatives are all of them.
    """
    optimizer.zero_grad(set_to_none=True)
    ids, n = batch["ids"], len(batch["ids"])
    with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=batch["image"].is_cuda):
        z_image, z_text = (common.gathered(z, n) for z in model(batch["image"], batch["text"]))
        keys = model.momentum_keys(batch["image"], batch["text"])
    keys = keys and [common.gathered(key, n) for key in keys]
    loss = LOSSES[model.loss_type](model, z_image, z_text, ids, keys, common.share(n))
    loss.backward()
    common.sum_gradients(model)
    optimizer.step()
    model.finish_step(keys, ids)
    return {"loss": loss.detach()}


# -------------------------------------------------------------------------------------------------------------- train

def total_steps(cfg, data):
    """Optimisation steps of a run, if it is not stopped early."""
    return len(epoch_batches(data, cfg, 0)) * cfg.training.num_epochs


def begin(cfg, data):
    """(model, optimizer, scheduler) at the start of a run or trial, seeded."""
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    last_step = total_steps(cfg, data) if cfg.training.schedule == "cosine" else 10**15  # so far off that it stays 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: common.warmup_cosine(step, last_step, cfg.training.warmup_steps))
    return model, optimizer, scheduler


def train(cfg, data):
    """Train to early stopping or num_epochs, resuming exactly; best_model.pt is the epoch with the best validation.
    Returns the rows of metrics.csv."""
    model, optimizer, scheduler = begin(cfg, data)
    folder = open_folder(cfg, data)  # after what can fail for its settings
    take_step = common.GraphedStep(train_step, model, optimizer, cfg.cuda_graphs)
    per_epoch = len(epoch_batches(data, cfg, 0))
    batches = None  # of an epoch; made when it begins, or resumes
    with common.Run(folder, cfg, model, optimizer, scheduler, steps_per_epoch=per_epoch) as run:
        if run.step == 0:
            initialise(cfg, model, data)
        for step in run.steps(total_steps(cfg, data)):
            epoch, batch_number = divmod(step - 1, per_epoch)
            if batch_number == 0 or batches is None:
                batches = epoch_batches(data, cfg, epoch)
            rows = batches[batch_number]
            run.add(take_step(make_batch(data, rows, common.share(len(rows)))))
            rate = max(scheduler.get_last_lr())
            scheduler.step()
            if batch_number + 1 == per_epoch:
                row = {"epoch": epoch + 1, "step": step, "train_loss": run.means()["loss"],
                       **validate(model, data, cfg), "learning_rate": rate}
                run.log(row, score=monitored(row, cfg), val_loss=row["val_loss"], patience=cfg.training.patience,
                        show=("epoch", "train_loss", "val_loss", "val_i2t_R1", "val_t2i_R1", "val_RSUM"))
    losses = {name: [row[name] for row in run.history] for name in ("train_loss", "val_loss")}
    common.write_json(folder / "loss_history.json", losses)
    plot_training(folder, cfg, run, data.synthetic)
    return run.history


def monitored(row, cfg):
    """The quantity that picks the best epoch, larger is better, of a row of metrics.csv."""
    r1 = (row["val_i2t_R1"] + row["val_t2i_R1"]) / 2
    return {"loss": -row["val_loss"], "r1": r1, "rsum": row["val_RSUM"]}[cfg.training.monitor]


def validate(model, data, cfg):
    """Validation loss (batches of batch_size in one fixed order), recalls, scale and bias, and the heads' health."""
    model.eval()
    z_image, z_text, own = embed(model, data, "val")
    if not (torch.isfinite(z_image).all() and torch.isfinite(z_text).all()):
        raise FloatingPointError("non-finite weights after the epoch's last step; lower training.learning_rate (the "
                                 "last checkpoint is kept)")
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).to(own.device)
    batches = order.tensor_split(max(1, math.ceil(len(order) / cfg.training.batch_size)))
    with torch.no_grad(), common.full_precision():
        losses = [LOSSES[model.loss_type](model, z_image[own[i]], z_text[i], own[i], None, slice(None)) * len(i)
                  for i in batches]
    scores = summarise(retrieval(z_image, z_text, own, map_ks=()))
    row = {"val_loss": (sum(losses) / len(order)).item(), "val_i2t_R1": scores["I2T R@1"],
           "val_t2i_R1": scores["T2I R@1"], "val_RSUM": scores["RSUM"], "logit_scale": model.log_scale.exp().item()}
    if model.logit_bias is not None:
        row["logit_bias"] = model.logit_bias.item()
    row |= {"rank_image": effective_rank(z_image), "rank_text": effective_rank(z_text), **gate_health(model, data)}
    model.train()
    return row


def effective_rank(z):
    """exp of the entropy of the covariance's spectrum of z [n, D] (Roy & Vetterli 2007)."""
    z = z.cpu().double()  # MPS has no float64
    spectrum = torch.linalg.eigvalsh((z - z.mean(0)).T @ (z - z.mean(0))).clamp(min=0)
    return torch.special.entr(spectrum / spectrum.sum().clamp(min=1e-30)).sum().exp().item()


@torch.no_grad()
def gate_health(model, data, n=2048):
    """Of gated heads, on validation pairs: the gates, the share of the linear part in the output's norm, and the
    entropy of the memory's read / ln 64."""
    health, batch = {}, make_batch(data, data.splits["val"][:n])
    for name, head, x in zip(("image", "text"), model.heads, model.standardised(batch["image"], batch["text"]),
                             strict=True):
        if isinstance(head, GatedHead):
            of_linear, of_branch = head.linear(x).norm(dim=1), (head.gate * head.branch(x)).norm(dim=1)
            health |= {f"gate_{name}": head.gate.item(),
                       f"linear_{name}": (of_linear / (of_linear + of_branch)).mean().item()}
        if isinstance(getattr(head, "branch", None), CrossModalBranch):
            weights = head.branch.attention(head.branch.embed(x))
            health[f"entropy_{name}"] = (torch.special.entr(weights).sum(-1).mean() / math.log(N_SLOTS)).item()
    return health


# ----------------------------------------------------------------------------------------------------------- evaluate

def embed(scorer, data, split):
    """Unique images [m, D] and captions [n, D] of a split, L2-normalised, and each caption's row of the images [n].

    scorer: anything with embed_image and embed_text.
    """
    rows = data.splits[split]
    images, own = data.image_index[rows].unique(return_inverse=True)
    return *embed_rows(scorer, data, images, rows), own


@torch.no_grad()
def embed_rows(scorer, data, images, captions, chunk=8192):
    """(z_image [m, D], z_text [n, D]) of rows of data.images and of data.texts."""
    with common.full_precision():
        return (torch.cat([scorer.embed_image(data.images[i].float()) for i in images.split(chunk)]),
                torch.cat([scorer.embed_text(data.texts[i].float()) for i in captions.split(chunk)]))


def retrieval(z_image, z_text, own, hubs=None, map_ks=(5, 10)):
    """{"I2T" | "T2I": values of every query, as of common.retrieval_per_query; "own": own}.

    hubs: (of the images [m], of the captions [n]), for the scores 2 q.g - hubs of g of cross-domain similarity local
    scaling (CSLS, Conneau et al. 2018, section 2.3); the query's own term is the same for its whole gallery.
    """
    image_ids = torch.arange(len(z_image), device=own.device)
    image_queries, text_queries, image_gallery, text_gallery = z_image, z_text, z_image, z_text
    if hubs is not None:  # one more column: 2 q.g - hub
        image_queries, text_queries = (F.pad(2 * z, (0, 1), value=-1.0) for z in (z_image, z_text))
        image_gallery, text_gallery = (torch.cat([z, hub[:, None]], dim=1)
                                       for z, hub in zip((z_image, z_text), hubs, strict=True))
    return {"own": own.cpu(),
            "I2T": common.retrieval_per_query(image_queries, text_gallery, image_ids, own, KS, map_ks),
            "T2I": common.retrieval_per_query(text_queries, image_gallery, own, image_ids, KS, map_ks)}


def training_bank(scorer, data, n_rows=BANK_ROWS):
    """Embeddings of training images and captions, at most n_rows of either, one fixed random draw."""
    def drawn(rows):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n_rows]
        return rows[order.to(rows.device)]
    rows = data.splits["train"]
    return embed_rows(scorer, data, drawn(data.image_index[rows].unique()), drawn(rows))


def hubness(z_image, z_text, bank, k):
    """Mean cosine of each gallery image [m] and caption [n] to its k nearest training rows of the other modality; bank:
    (images, captions)."""
    def nearest(gallery, queries):
        with common.full_precision():
            return torch.cat([(block @ queries.T).topk(min(k, len(queries)), dim=1).values.mean(1)
                              for block in gallery.split(common.rows_at_once(len(queries), gallery))])
    return nearest(z_image, bank[1]), nearest(z_text, bank[0])


def summarise(values, weights=None):
    """{column: number} of `retrieval`'s values: recalls and RSUM in percent; with weights [R, m] of the images in R
    resamples (a caption goes with its image) arrays [R]. A new metric is a line here."""
    of_way = {"I2T": weights, "T2I": None if weights is None else weights[:, values["own"]]}
    out = {}
    for way, w in of_way.items():
        def mean(x, w=w):
            x = np.asarray(x, dtype=np.float64)
            return x.mean() if w is None else w @ x / w.sum(1)
        out |= {f"{way} R@{k}": 100 * mean(values[way][f"hit@{k}"]) for k in KS}
    out["RSUM"] = sum(out[f"{way} R@{k}"] for way in of_way for k in KS)
    return out if weights is None else {name: out[name] for name in ("I2T R@1", "T2I R@1", "RSUM")}


def rank_table(rows):
    """{row: median and mean rank (from 1), MRR, mAP@5 and @10 (divided by min(k, own rows), percent)}."""
    table = {name: {} for name in rows}
    for (name, values), way in itertools.product(rows.items(), ("I2T", "T2I")):
        q = values[way]
        columns = {"median rank": np.median(q["rank"]), "mean rank": q["rank"].mean(), "MRR": (1 / q["rank"]).mean(),
                   **{f"mAP@{k}": 100 * q[f"AP@{k}"].mean() for k in (5, 10)}}
        table[name] |= {f"{way} {column}": float(value) for column, value in columns.items()}
    return table


def linear_scorer(mean_image, image, mean_text, text):
    """Centred features [B, D_img], [B, D_txt] times a matrix [D_img, D], [D_txt, D], L2-normalised."""
    return SimpleNamespace(image=image, text=text, embed_image=lambda x: F.normalize((x - mean_image) @ image, dim=-1),
                           embed_text=lambda x: F.normalize((x - mean_text) @ text, dim=-1))


def covariances(data, chunk=16384):
    """(mean [D], covariance [D, D]) of image and text features side by side, D = D_img + D_txt, over the training
    pairs, float64 on the CPU; products of blocks in float32."""
    def block(rows):
        batch = make_batch(data, rows)
        return torch.cat([batch["image"], batch["text"]], dim=1)
    rows, sums, products = data.splits["train"], 0, 0
    centre = block(rows[:1024]).mean(0)  # keeps the float32 products well scaled
    for part in rows.split(chunk):
        both = block(part) - centre
        with common.full_precision():
            sums, products = sums + both.sum(0).cpu().double(), products + (both.T @ both).cpu().double()
    mean = sums / len(rows)
    return mean + centre.cpu(), products / len(rows) - mean[:, None] * mean


def cca_solver(c_image, c_text, c_cross):
    """solve(image's shrinkage, text's) -> (A [D_img, r], canonical correlations [r], B [D_txt, r]), float64.

    Canonical correlation analysis (Hotelling 1936), either covariance shrunk towards its mean variance (Ledoit & Wolf
    2004), which leaves its eigenvectors as they are.
    """
    (values_image, vectors_image), (values_text, vectors_text) = torch.linalg.eigh(c_image), torch.linalg.eigh(c_text)
    cross = vectors_image.T @ c_cross @ vectors_text

    def scale(values, shrinkage):
        return ((1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()).rsqrt()

    def solve(shrinkage_image, shrinkage_text):
        image, text = scale(values_image, shrinkage_image), scale(values_text, shrinkage_text)
        left, correlations, right = torch.linalg.svd(image[:, None] * cross * text, full_matrices=False)
        return vectors_image @ (image[:, None] * left), correlations, vectors_text @ (text[:, None] * right.T)
    return solve


RIDGE_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
CCA_SHRINKAGES = {0: (0.3, 0.5, 0.7), 20_000: (0.03, 0.1, 0.3)}  # by number of training images: more need less
CCA_DIMS = (128, 256, 512)
CCA_POWERS = (0.5, 1)


@functools.lru_cache(maxsize=1)  # a start at CCA and the evaluation take the same, of the same Data object
def closed_forms(data, hubness_k):
    """{"ridge" | "CCA"[", CSLS"]: (scorer, its settings)}, each chosen by its own validation RSUM.

    ridge: regression of the text on the image. CCA: the directions weighted by correlation^power (Gong et al. 2014).
    """
    mean, c = covariances(data)
    d, device = data.images.shape[1], data.images.device
    best = {}

    def consider(name, image, text, settings):
        scorer = linear_scorer(*(x.float().to(device) for x in (mean[:d], image, mean[d:], text)))
        z_image, z_text, own = embed(scorer, data, "val")
        scores = {name: summarise(retrieval(z_image, z_text, own, map_ks=()))["RSUM"]}
        if hubness_k:
            hubs = hubness(z_image, z_text, training_bank(scorer, data, 4096), hubness_k)
            scores[f"{name}, CSLS"] = summarise(retrieval(z_image, z_text, own, hubs, map_ks=()))["RSUM"]
        for row, score in scores.items():
            if row not in best or score > best[row][0]:
                best[row] = score, scorer, {**settings, "validation RSUM": score}

    identity_image, identity_text = (torch.eye(n, dtype=c.dtype) for n in (d, len(c) - d))
    for strength in RIDGE_STRENGTHS:
        ridge = c[:d, :d] + strength * c[:d, :d].diagonal().mean() * identity_image
        consider("ridge", torch.linalg.solve(ridge, c[:d, d:]), identity_text, {"lambda": strength})
    solve = cca_solver(c[:d, :d], c[d:, d:], c[:d, d:])
    n_images = len(data.image_index[data.splits["train"]].unique())
    grid = CCA_SHRINKAGES[max(n for n in CCA_SHRINKAGES if n <= n_images)]
    for shrinkages in itertools.product(grid, grid):
        image, correlations, text = solve(*shrinkages)
        for dims, power in itertools.product(sorted({min(n, len(correlations)) for n in CCA_DIMS}), CCA_POWERS):
            weights = correlations[:dims] ** power
            consider("CCA", image[:, :dims] * weights, text[:, :dims] * weights,
                     {"shrinkages": shrinkages, "dims": dims, "power": power})
    return {row: (scorer, settings) for row, (_, scorer, settings) in best.items()}


def ablations(model):
    """{suffix: copy of the model without a part} of gated heads: what the part is worth."""
    if not isinstance(model.heads[0], GatedHead):
        return {}
    linear_only, unmixed = copy.deepcopy(model), copy.deepcopy(model)
    for head in linear_only.heads:
        nn.init.zeros_(head.gate)
    for head in unmixed.heads:
        if isinstance(head.branch, AttentionBranch):
            head.branch.encoder = nn.Identity()
        else:  # equal weights over the memory's slots
            nn.init.zeros_(head.branch.query.weight)
            nn.init.zeros_(head.branch.query.bias)
    part = "tokens not mixed" if isinstance(model.heads[0].branch, AttentionBranch) else "constant read"
    return {"linear part": linear_only, part: unmixed}


def evaluate(cfg, data):
    """Test best_model.pt beside chance and the closed forms, by cosine and by CSLS; draw the pictures, return the
    results. All that is chosen (epoch, the closed forms' settings) is chosen on validation."""
    model = build_model(cfg, data)
    folder, name, k = open_folder(cfg, data), cfg.model.type, cfg.evaluation.hubness_k
    step = common.load_best(folder, model)["step"]
    print("evaluating: ridge and CCA, their settings chosen on validation", flush=True)
    forms = closed_forms(data, k)
    scorers = {row: scorer for row, (scorer, _) in forms.items()}
    if data.native_texts is not None:  # zero-shot retrieval in the image encoder's own space
        native = SimpleNamespace(embed_image=F.normalize, embed_text=F.normalize)
        scorers |= {"native": native, "native, CSLS": native}
    scorers |= {f"{name}, {part}": changed for part, changed in ablations(model).items()}
    scorers |= {name: model, f"{name}, CSLS": model, f"{name}, CSLS, random bank": model}
    print("evaluating: retrieval among the test images", flush=True)
    images, own = data.image_index[data.splits["test"]].unique(return_inverse=True)
    rows = {}
    for row, scorer in scorers.items():  # its name says how a row is scored: native.., .., CSLS[, random bank]
        source = dataclasses.replace(data, texts=data.native_texts) if row.startswith("native") else data
        z_image, z_text, _ = embed(scorer, source, "test")
        hubs = None
        if "CSLS" in row:
            if not k:
                continue
            bank = training_bank(scorer, source)
            if row.endswith("random bank"):
                generator = torch.Generator().manual_seed(0)
                bank = [F.normalize(torch.randn(z.shape, generator=generator), dim=1).to(z) for z in bank]
            hubs = hubness(z_image, z_text, bank, k)
        rows[row] = retrieval(z_image, z_text, own, hubs)
    level = torch.ones(len(own), 1, device=own.device)  # all scores equal: the expectation over their random order
    rows = {"chance": retrieval(level[:len(images)], level, own), **rows}

    pairs = [(f"{name}{csls}", row) for csls in ("", ", CSLS") for row in rows
             if ("CSLS" in row) == bool(csls) and row not in ("chance", f"{name}{csls}")]
    pairs += [(f"{row}, CSLS", row) for row in (name, "CCA") if k]
    print(f"evaluating: bootstrap of {len(rows)} rows over {len(images):,} images", flush=True)
    recalls, differences, items = common.interval_tables(rows, pairs, len(images), summarise)
    # --compare pairs rows of one name, whatever the head
    shared = {row: row.replace(name, "the head", 1) for row in rows if row.split(",")[0] == name}
    items = {kind: {shared.get(row, row): x for row, x in numbers.items()} for kind, numbers in items.items()}
    notes = ["Recalls, RSUM and mAP in percent, ranks from 1; intervals: 95%, bootstrap over the test images."]
    for pair, difference in differences.items():
        if difference["RSUM"] <= 0:
            notes.append(f"NOTE: no gain in RSUM on these test images: {pair}, {difference['RSUM']:.1f}.")
    results = {
        **common.run_facts(cfg, data), "n": len(images), "notes": notes,
        "headline": f"{len(images):,} test images, {len(own):,} captions; {name} head, {cfg.loss.type} loss, "
                    f"step {step}, seed {cfg.seed}",
        "chosen": {"step": step, **{row: settings for row, (_, settings) in forms.items()}},
        "tables": {"test": recalls, "paired difference": differences, "ranks": rank_table(rows)},
        "curves": recall_curves(recalls), "per_item": {"ids": [data.image_ids[i] for i in images.tolist()], **items}}
    plot_evaluation(folder, cfg, results, rows, model, data)
    for file, text in (("metrics.json", json.dumps(results["tables"], indent=2)),
                       ("metrics.txt", common.results_text(results))):
        common.write_text(folder / "evaluation_results" / file, f"{text}\n")
    return results


def recall_curves(recalls):
    """Panels of common.plot_lines: recall at 1, 5, 10 of every row, a panel each way."""
    return {f"{way} recall [%]": {"xlabel": "k", "lines": {
        row: {"x": KS, "y": [scores[f"{way} R@{k}"] for k in KS]} for row, scores in recalls.items()}}
        for way in ("I2T", "T2I")}


# --------------------------------------------------------------------------------------------------------------- data

@dataclass(eq=False)
class Data:
    """Embeddings on the device, stored in half precision, and the split by image."""
    images: torch.Tensor  # [M, D_img] one row a unique image
    texts: torch.Tensor  # [P, D_txt] one row a caption
    image_index: torch.Tensor  # [P] int64: the caption's row in images
    image_ids: list  # [M] str
    splits: dict  # "train" | "val" | "test" -> [n] int64 rows of texts
    statistics: list  # [(mean, deviation) of images, of texts] over the training pairs
    fingerprint: str
    synthetic: bool
    native_texts: torch.Tensor | None = None  # [P, D_img] the captions in the image encoder's own space


def make_batch(data, indices, share=slice(None)):
    """Rows [B] of captions -> {image [B, D_img], text [B, D_txt] float32, ids [B] the image's row}; image and text of
    this `share` of the batch alone."""
    ids = data.image_index[indices]
    return {"image": data.images[ids[share]].float(), "text": data.texts[indices[share]].float(), "ids": ids}


def epoch_batches(data, cfg, epoch):
    """The caption rows of an epoch as batches [B] of equal size (one row more or less): a pure function of seed and
    epoch."""
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
    rows = data.splits["train"]
    rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    if cfg.training.one_caption_per_image:  # the first of each image in the shuffled order
        images, order = data.image_index[rows].sort(stable=True)
        first = torch.cat([images.new_ones(1, dtype=torch.bool), images[1:] != images[:-1]])
        rows = rows[order[first].sort().values]
    n = min(math.ceil(len(rows) / cfg.training.batch_size), len(rows) // 2)  # a pair alone has no negative
    return rows.tensor_split(max(1, n))


def embedding_files(folder, name):
    """The three paths of a set: image embeddings, text embeddings, metadata."""
    return [Path(folder) / f"{name}_{part}" for part in ("image_embeddings.pt", "text_embeddings.pt", "metadata.json")]


def check_files(paths):
    """The fingerprint of files, whose checksums it checks. Raises: UserError, also if one is missing."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; put the encoded embeddings there (README, 'Data'), point data.dir= "
                            "at them, or try --demo, which needs no data")
    return common.fingerprint(paths)


def load_tensor(path, device, chunk=16384):
    """A float tensor [rows, D] on the device, in half precision: bfloat16 where float16 would over- or underflow.
    Raises: UserError naming the file if it is anything else, or not finite."""
    tensor = common.load_tensors(path)
    if not (isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel()):
        kind = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UserError(f"{path}: expected a float tensor [rows, dim], found {kind}")
    tensor = tensor.detach()
    sizes = torch.cat([part.float().abs().amax(1) for part in tensor.split(chunk)])  # [rows]
    bad = (~(sizes < 1e15)).nonzero()[:, 0]
    if len(bad):
        raise UserError(f"{path}: {len(bad)} of {len(tensor)} rows hold NaN, infinite or huge values, the first is row "
                        f"{int(bad[0])}; encode them again")
    half = torch.float16 if 1e-3 < sizes.max() < 6e4 else torch.bfloat16
    if tensor.dtype in (torch.float16, torch.bfloat16):
        half = tensor.dtype
    out = torch.empty(tensor.shape, dtype=half, device=device)
    for i in range(0, len(tensor), chunk):
        out[i:i + chunk] = tensor[i:i + chunk]
    return out


def load_embeddings(folder, name, device):
    """(images [M, D_img], texts [P, D_txt], image_index [P], image ids [M], caption ids [P], whether they are
    synthetic, native texts [P, D_img] or None) of a set of files.

    The image file has a row per caption (repeats are dropped), or a row per image with `image_index` in the metadata.
    Raises: UserError naming file, expected and found.
    """
    image_file, text_file, metadata_file = embedding_files(folder, name)
    metadata = common.read_json(metadata_file)
    images, texts = load_tensor(image_file, device), load_tensor(text_file, device)
    ids, rows = metadata.get("image_ids"), metadata.get("image_index")
    if not isinstance(ids, list) or len(ids) != len(texts):
        n_ids = len(ids) if isinstance(ids, list) else type(ids).__name__
        raise UserError(f"{metadata_file}: expected image_ids, one for each of the {len(texts)} rows of "
                        f"{text_file.name}, found {n_ids}; without it an image's captions cannot be kept in one split")
    caption_ids = metadata.get("caption_ids") or [None] * len(ids)
    if not isinstance(caption_ids, list) or len(caption_ids) != len(ids):
        raise UserError(f"{metadata_file}: caption_ids must be a list of {len(ids)}, one a caption like image_ids")
    unique = {image: row for row, image in enumerate(dict.fromkeys(map(str, ids)))}  # in order of first appearance
    image_index, captions = torch.tensor([unique[str(image)] for image in ids]), torch.arange(len(ids))
    if len(images) == len(unique) and rows is not None:
        rows = common.guarded(lambda _: torch.tensor(rows), metadata_file)
        if rows.shape != captions.shape or rows.is_floating_point() or rows.min() < 0 or rows.max() >= len(images):
            raise UserError(f"{metadata_file}: image_index must list {len(ids)} rows of {image_file.name}, from 0 to "
                            f"{len(images) - 1}")
    elif len(images) == len(ids):
        rows = captions
    else:
        raise UserError(f"{image_file}: expected {len(ids)} rows (one a caption) or {len(unique)} (one an image, with "
                        f"image_index in {metadata_file.name}), found {len(images)} rows"
                        f"{' and no image_index' if rows is None else ''}")
    first = torch.full((len(unique),), len(ids)).scatter_reduce(0, image_index, captions, "amin")  # [M] a caption each
    clash = first_clash(images, rows, rows[first][image_index])
    if clash is not None:
        raise UserError(f"{image_file}: captions {int(first[image_index[clash]])} and {clash} have the image id "
                        f"{ids[clash]} in {metadata_file.name} but different embeddings; these files do not match")
    native, native_file = None, Path(folder) / f"{name}_native_text_embeddings.pt"
    if native_file.is_file():
        common.check_crc(native_file)
        native = load_tensor(native_file, device)
        if native.shape != (len(ids), images.shape[1]):
            raise UserError(f"{native_file}: expected {[len(ids), images.shape[1]]} (captions, the images' width), "
                            f"found {list(native.shape)}")
    images = images[rows[first].to(device)]
    return images, texts, image_index, list(unique), [*map(str, caption_ids)], bool(metadata.get("synthetic")), native


def first_clash(images, rows, same_as, chunk=16384):
    """The first caption whose image differs from that of the image's first caption by more than 10% of its norm, or
    None."""
    for i in range(0, len(rows), chunk):
        image, first_image = images[rows[i:i + chunk]].float(), images[same_as[i:i + chunk]].float()
        wrong = ((image - first_image).norm(dim=1) > 0.1 * image.norm(dim=1)).nonzero()
        if len(wrong):
            return i + int(wrong[0])
    return None


def read_karpathy(path, image_ids, caption_ids):
    """The set of test image ids in a file of image ids or caption ids. image_ids, caption_ids: of each caption, str."""
    def listed_in(p):
        text = Path(p).read_text(encoding="utf-8")
        return {str(i) for i in (json.loads(text) if text.lstrip().startswith("[") else text.split())}
    listed, all_images = common.guarded(listed_in, path), set(image_ids)
    if not listed <= all_images and listed <= set(caption_ids):
        return {image for image, caption in zip(image_ids, caption_ids, strict=True) if caption in listed}
    if not listed or not listed <= all_images:
        raise UserError(f"data.karpathy_ids={path}: {len(listed - all_images)} of {len(listed)} ids are no image_ids "
                        "of the metadata, and they are not all caption_ids either")
    return listed


def split_off(pool, amount, n, split):
    """(what is left, what is taken) of a shuffled list; amount: a share of n or a number of images."""
    count = round(amount * n) if isinstance(amount, float) else amount
    if not 0 < count <= len(pool):
        raise UserError(f"data.{split}={amount}: asks for {count} images, {len(pool)} of {n} are left for it")
    return pool[count:], pool[:count]


def joined(parts):
    """[rows, D] of tensors, in bfloat16 if any is: float16 and bfloat16 together would become float32."""
    if len(parts) == 1:
        return parts[0]
    half = torch.bfloat16 if any(x.dtype == torch.bfloat16 for x in parts) else torch.float16
    return torch.cat([x.to(half) for x in parts])


def split_images(d, image_ids, n, captions):
    """{train | val | test: image rows}. image_ids: of all sets, the first n those of data.name; captions: (image ids,
    caption ids) of all captions."""
    pool = sorted(range(n), key=lambda row: image_ids[row])  # the split depends on ids and seed, not on file order
    pool = [pool[i] for i in torch.randperm(n, generator=torch.Generator().manual_seed(d.split_seed)).tolist()]
    if d.test == "karpathy":
        listed = read_karpathy(d.karpathy_ids, *captions)
        test = [row for row, image in enumerate(image_ids) if image in listed]
        pool = [row for row in pool if image_ids[row] not in listed]
    elif isinstance(d.test, str):
        test = list(range(n, len(image_ids)))
    else:
        pool, test = split_off(pool, d.test, n, "test")
    pool, val = split_off(pool, max(0.01, min(0.1, 1000 / n)) if d.val == "auto" else d.val, n, "val")
    train = pool
    if d.train != "rest" and not (d.train == "auto" and isinstance(d.test, str)):
        train = split_off(pool, min(round(0.8 * n), len(pool)) if d.train == "auto" else d.train, n, "train")[1]
    splits = {"train": train, "val": val, "test": test}
    assert len(set(train) | set(val) | set(test)) == len(train) + len(val) + len(test), "an image is in two splits"
    for split, rows in splits.items():
        if len(rows) < 2:
            raise UserError(f"the {split} split has {len(rows)} of {n} images; change data.{split}")
    return splits


def load_data(cfg):
    """Read the files of cfg.data, put them on the device and split them by image. Raises: UserError in one line."""
    device, d = common.pick_device(cfg.device), cfg.data
    names = [d.name]
    if d.test == "karpathy":
        if not d.karpathy_ids:
            raise UserError("data.test=karpathy needs data.karpathy_ids=<file of the 5,000 test images' ids>")
        if embedding_files(d.dir, "val2017")[0].is_file():  # the Karpathy test images lie in both
            names.append("val2017")
    elif isinstance(d.test, str):
        names.append(d.test)
    files = [file for name in names for file in embedding_files(d.dir, name)]
    fingerprint = check_files(files)
    images, texts, indices, ids, caption_ids, synthetic, natives = zip(
        *(load_embeddings(d.dir, name, device) for name in names), strict=True)
    widths = [(x.shape[1], y.shape[1]) for x, y in zip(images, texts, strict=True)]
    if widths[-1] != widths[0]:
        raise UserError(f"{d.dir}: {names[-1]} has image and text widths {widths[-1]}, {d.name} has {widths[0]}; "
                        "encode both with the same models")
    twice = set(ids[0]) & set(ids[-1]) if len(names) == 2 else set()
    if twice:
        raise UserError(f"{d.dir}: {len(twice)} image ids are in both {names[0]} and {names[1]} (e.g. {min(twice)}); "
                        "training would see test images")
    image_ids = [image for part in ids for image in part]
    image_index = torch.cat([indices[0], *(index + len(ids[0]) for index in indices[1:])])
    of_caption = [image_ids[row] for row in image_index.tolist()], [caption for part in caption_ids for caption in part]
    of_image = split_images(d, image_ids, len(ids[0]), of_caption)
    splits = {split: torch.isin(image_index, torch.tensor(rows)).nonzero()[:, 0] for split, rows in of_image.items()}
    natives = [None] if any(x is None for x in natives) else natives
    images, texts, native_texts = map(joined, (images, texts, natives))
    drawn = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(0))[:STATISTICS_ROWS]
    train = splits["train"][drawn.sort().values]
    statistics = []
    for x, rows, path in ((images, image_index[train], files[0]), (texts, train, files[1])):
        moments = common.guarded(lambda _, x=x, rows=rows: common.moments(x, rows), path)
        statistics.append(tuple(v.to(device) for v in moments))
    splits = {split: rows.to(device) for split, rows in splits.items()}
    return Data(images, texts, image_index.to(device), image_ids, splits, statistics, fingerprint,
                any(synthetic), native_texts)


def print_splits(data):
    """How many images and captions a split has."""
    for split, rows in data.splits.items():
        print(f"{split:5} {len(data.image_index[rows].unique()):7,} images {len(rows):8,} captions")


def open_folder(cfg, data):
    """The run's folder, with splits.json: image ids of each split, written once. Raises: UserError if it holds another
    split."""
    folder = common.open_run(cfg, data.fingerprint)
    of_split = {split: data.image_index[rows].unique().tolist() for split, rows in data.splits.items()}
    record = {"split_seed": cfg.data.split_seed, "data_fingerprint": data.fingerprint,
              "image_ids": {split: [data.image_ids[i] for i in images] for split, images in of_split.items()}}
    path = folder / "splits.json"
    if not path.exists():
        common.write_json(path, record)
    elif common.read_json(path) != record:
        raise UserError(f"{path}: holds another split than this config makes of this data; use --fresh")
    return folder


def random_data(cfg):
    """Random tensors of SigLIP's and E5-Mistral's widths, a batch of pairs: for profile_flops.py without the data."""
    device, rows = common.pick_device(cfg.device), torch.arange(cfg.training.batch_size)
    images, texts = torch.randn(len(rows), 1152, device=device), torch.randn(len(rows), 4096, device=device)
    rows, statistics = rows.to(device), [(x.mean(0), x.std(0)) for x in (images, texts)]
    return Data(images, texts, rows, [*map(str, rows.tolist())], {"train": rows}, statistics, "random", True)


# --------------------------------------------------------------------------------------------------------------- tune

def import_optuna():
    """The optional package. Raises: UserError with the pip command."""
    try:
        import optuna
    except ImportError:
        raise UserError("--stage tune needs the package: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def read_search_space(path, tuning):
    """{config key: ("categorical" | "int" | "float", arguments of Optuna's trial.suggest_...)}. Raises: UserError."""
    def typed(key, value):
        cfg = common.load_config(Config, None, [f"{key}={'null' if value is None else value}"])
        return functools.reduce(getattr, key.split("."), cfg)

    space, keys = {}, common.flatten(dataclasses.asdict(Config()))
    is_log = {"true": True, "yes": True, "false": False, "no": False, "none": False}
    for key, spec in common.flatten(tuning.search_space, leaves=keys).items():
        if key.partition(".")[0] not in ("model", "loss", "training", "seed"):
            raise UserError(f"{path}: search_space: {key} cannot be searched; only model, loss, training keys can")
        try:
            if isinstance(spec, list) and spec:
                space[key] = "categorical", {"choices": [typed(key, choice) for choice in spec]}
                continue
            low, high, log = typed(key, spec["low"]), typed(key, spec["high"]), is_log[str(spec.get("log")).lower()]
            if set(spec) - {"low", "high", "log"} or isinstance(low, bool) or not low < high or (log and low <= 0):
                raise ValueError
            space[key] = type(low).__name__, {"low": low, "high": high, "log": log}
        except UserError as error:
            raise UserError(f"{path}: search_space: {str(error).removeprefix('command line: ')}") from None
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{path}: search_space: {key}: expected a list of choices or {{low: .., high: .., log: "
                            f"true}} with numbers low < high (above 0 with log), found {spec!r}") from None
    if not space:
        raise UserError(f"{path}: has no search_space; tune YAMLs are in configs/tune/")
    return space


def trial_config(tuning, overrides, params, demo):
    """The base config with a trial's parameters {config key: value}. Raises: UserError if they are out of range."""
    changes = [f"{key}={'null' if value is None else value}" for key, value in params.items()]
    return common.load_config(Config, tuning.base, [*overrides, *changes], demo=demo)


def open_study(tuning, name):
    """The Optuna study of that name, made if it is not there. Raises: UserError if the storage cannot be opened."""
    optuna = import_optuna()

    def opened(storage):
        if "://" not in storage:
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}  # waits for others' writes
        return optuna.storages.RDBStorage(storage, engine_kwargs=options)
    # Rungs at epochs 3, 9, 27: only the better third of the trials that got there goes on.
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=3, min_early_stopping_rate=0)
    return optuna.create_study(
        study_name=name, storage=common.guarded(opened, tuning.storage), direction="maximize", load_if_exists=True,
        pruner=pruner, sampler=optuna.samplers.TPESampler(constant_liar=tuning.n_jobs > 1))


def run_trials(tuning, name, space, overrides, demo, data, n_left):
    """A worker: trials until tuning.n_trials are complete or pruned. data: with the tuning subset to train on."""
    optuna, study = import_optuna(), open_study(tuning, name)
    torch.set_num_threads(max(1, torch.get_num_threads() // tuning.n_jobs))
    parent = torch.multiprocessing.parent_process()
    if parent is not None:  # Ctrl-C reaches the parent, which ends its workers; without a parent they end themselves
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

    def objective(trial):
        trial.set_user_attr("process", [platform.node(), os.getpid()])
        suggested = {} if "base" in trial.user_attrs else space
        params = {key: getattr(trial, f"suggest_{kind}")(key, **spec) for key, (kind, spec) in suggested.items()}
        cfg = trial_config(tuning, overrides, params, demo)
        model, optimizer, scheduler = begin(cfg, data)
        initialise(cfg, model, data)
        take_step = common.GraphedStep(train_step, model, optimizer, cfg.cuda_graphs)
        best, n_stale = -math.inf, 0
        for epoch in range(cfg.training.num_epochs):
            for rows in epoch_batches(data, cfg, epoch):
                take_step(make_batch(data, rows))
                scheduler.step()
            score = monitored(validate(model, data, cfg), cfg)
            n_stale = 0 if score > best else n_stale + 1
            best = max(best, score)
            trial.report(best, epoch + 1)
            if n_stale >= cfg.training.patience:
                break
            if suggested and trial.should_prune():
                raise optuna.TrialPruned
        return best

    def print_trial(study, trial):
        value = "" if trial.value is None else f"{trial.value:.2f}"
        print(f"trial {trial.number:3} {trial.state.name:8} {value:6} {trial.params or 'base'}", flush=True)

    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    study.optimize(objective, n_trials=n_left, catch=(UserError, FloatingPointError, torch.OutOfMemoryError),
                   callbacks=[print_trial, optuna.study.MaxTrialsCallback(tuning.n_trials, states=ended)])


def is_dead(trial):
    """Whether the process of a running trial is gone, if it was one of this machine."""
    host, process = trial.user_attrs.get("process", (None, None))
    if process is None or host != platform.node():
        return process is None
    try:
        os.kill(process, 0)  # only asks
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody waits for it
    except OSError as error:  # gone; or another user's; or a system without /proc
        return isinstance(error, ProcessLookupError)


def tune(args):
    """Search a base config's hyper-parameters by the run's own monitored validation quantity on the tuning subset.

    The base is the first trial; a trial trains as a run does, with the same epochs. Run again it resumes: a trial whose
    process is gone is tried again, the total is kept. Writes results_dir/best_config.yaml.
    """
    optuna = import_optuna()
    own = [o for o in args.overrides if o.partition("=")[0] in TuneConfig.__dataclass_fields__]
    overrides = [o for o in args.overrides if o not in own]
    tuning = common.load_config(TuneConfig, args.config, own)
    space = read_search_space(args.config, tuning)
    base = trial_config(tuning, overrides, {}, args.demo)
    changes_loss = [key for key in space if key.startswith("loss.") or key == "training.batch_size"]
    if "training.monitor" in space or (base.training.monitor == "loss" and changes_loss):
        raise UserError(f"{args.config}: trials must share one objective: take training.monitor=rsum in the base")
    if args.demo:
        use_demo(base)
        overrides.append(f"data.dir={base.data.dir}")
        tuning.study_name += "_demo"
        tuning.results_dir = "results/demo/optuna"
    data = load_data(base)
    data.splits["train"] = tuning_subset(data, tuning.n_captions, base.data.split_seed)
    print_splits(data)
    config = {k: v for k, v in common.flatten(dataclasses.asdict(base)).items() if not common.is_neutral(k)}
    identity = json.dumps([space, config, data.fingerprint, len(data.splits["train"])], sort_keys=True)
    identity = hashlib.sha256(identity.encode()).hexdigest()[:8]
    name, study = tuning.study_name, open_study(tuning, tuning.study_name)
    if study.user_attrs.get("identity", "another program's" if study.get_trials() else identity) != identity:
        name = f"{name}_{identity}"
        print(f"the study {tuning.study_name} searched something else; this search is the study {name}")
        study = open_study(tuning, name)
    study.set_user_attr("identity", identity)
    states = optuna.trial.TrialState
    for trial in filter(is_dead, study.get_trials(states=[states.RUNNING])):
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"base": True} if "base" in trial.user_attrs else None)
    if not study.get_trials():
        study.enqueue_trial({}, user_attrs={"base": True})

    n_left = tuning.n_trials - len(study.get_trials(states=[states.COMPLETE, states.PRUNED]))
    job = (tuning, name, space, overrides, args.demo, data, n_left)
    if n_left > 0 and (tuning.n_jobs == 1 or data.images.is_mps):  # MPS tensors cannot be shared
        run_trials(*job)
    elif n_left > 0:  # the data are shared with the workers, not copied
        context = torch.multiprocessing.get_context("spawn")
        workers = [context.Process(target=run_trials, args=job, daemon=True) for _ in range(min(tuning.n_jobs, n_left))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if dead := [worker.exitcode for worker in workers if worker.exitcode]:
            print(f"NOTE: {len(dead)} of {len(workers)} workers ended early (exit codes {dead}); lower n_jobs, and run "
                  "the same command again")
    trials = study.get_trials()
    count = {state.name: sum(t.state == state for t in trials) for state in states}
    complete = sorted((t for t in trials if t.state == states.COMPLETE), key=lambda t: -t.value)
    if not complete:
        raise UserError(f"all trials of {name} failed or were pruned ({count}); widen search_space or raise n_trials")
    table = []
    for t in complete[:5]:
        values = {**common.flatten(dataclasses.asdict(base)), **t.params}
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (values[key] for key in space)]
        table.append([f"{t.number}{' (base)' * ('base' in t.user_attrs)}", f"{t.value:.2f}", *cells])
    print("\n" + common.format_table(["trial", base.training.monitor, *space], table))
    best = dataclasses.asdict(trial_config(tuning, overrides, complete[0].params, args.demo))
    del best["output_dir"]
    path = Path(tuning.results_dir) / "best_config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"python {Path(__file__).name} {path}"
    origin = f"Trial {complete[0].number} of study {name}: validation {base.training.monitor} {complete[0].value:.2f}."
    common.write_text(path, f"# {command}\n# {origin}\n{yaml.safe_dump(best, sort_keys=False)}")
    print(f"{count['COMPLETE']} complete, {count['PRUNED']} pruned, {count['FAIL']} failed or interrupted; study {name}"
          f" in {tuning.storage}\nnext: {command}")


def tuning_subset(data, n_captions, seed):
    """Training rows of whole images, drawn at random, with min(n_captions, all) captions (at most one image more)."""
    rows = data.splits["train"]
    images = data.image_index[rows]
    unique, counts = images.unique(return_counts=True)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).to(unique.device)
    before = counts[order].cumsum(0) - counts[order]
    return rows[torch.isin(images, unique[order][before < n_captions])]


# -------------------------------------------------------------------------------------------------------------- plots

def plot_training(folder, cfg, run, synthetic):
    """training_curves.png: losses, the monitored quantity, recalls, scale, and the heads' health; the chosen epoch's
    last step is marked."""
    panels = {f"{cfg.loss.type} loss": {"train": "train_loss", "validation": "val_loss"},
              "validation RSUM": {"RSUM": "val_RSUM"},
              "validation R@1 [%]": {"image to text": "val_i2t_R1", "text to image": "val_t2i_R1"},
              "logit scale": {"logit scale": "logit_scale"},
              "effective rank of the output": {"image": "rank_image", "text": "rank_text"}}
    if "gate_image" in run.history[0]:
        panels["gate"] = {"image": "gate_image", "text": "gate_text"}
    common.plot_history(folder / "training_curves.png", run.history, panels, mark=run.best_step, synthetic=synthetic,
                        title=f"{cfg.model.type} head, {cfg.loss.type} loss")


@torch.no_grad()
def plot_evaluation(folder, cfg, results, rows, model, data):
    """result.png, and in evaluation_results/ embedding_space_{pca,tsne}, similarity_matrix and rank_histogram.png."""
    def title(text):
        return f"{cfg.model.type} head, {cfg.loss.type} loss: {text}{' (synthetic data)' * data.synthetic}"
    out = folder / "evaluation_results"
    out.mkdir(exist_ok=True)
    plot_result(folder / "result.png", results["tables"]["test"], cfg.model.type, title("95% intervals"))
    z_image, z_text, own = embed(model, data, "test")
    captions = torch.arange(len(own), device=own.device)
    first = torch.full((len(z_image),), len(own), device=own.device).scatter_reduce(0, own, captions, "amin")
    n = min(200, len(z_image))
    shown = {"image": z_image[:n], "first caption": z_text[first[:n]]}
    for method in ("pca", "tsne"):
        if method == "pca" or importlib.util.find_spec("sklearn"):  # t-SNE is scikit-learn's
            common.plot_embedding_space(out / f"embedding_space_{method}.png", shown, title(f"{n} test pairs"), method)
    n = min(60, len(z_image))
    common.plot_similarity_matrix(out / "similarity_matrix.png", z_image[:n] @ z_text[first[:n]].T,
                                  title(f"first {n} test images"), "first caption of image", "image")
    figure, axes = common.new_figure(2)
    for axis, way, gallery in zip(axes, ("I2T", "T2I"), (len(z_text), len(z_image)), strict=True):
        ranks = rows[cfg.model.type][way]["rank"].numpy()
        axis.hist(ranks, bins=np.unique(np.geomspace(1, gallery + 1, 40).round()) - 0.5)
        axis.axvline(np.median(ranks), color="black", linestyle=":")
        axis.set(xscale="log", xlabel=f"rank of the best own item among {gallery:,}", ylabel="queries",
                 title=f"{way}, n = {len(ranks):,}, median {np.median(ranks):g}")
    figure.suptitle(title("ranks"))
    common.save_figure(figure, out / "rank_histogram.png")


def plot_result(path, table, head, title):
    """RSUM of every row with its interval."""
    figure, (axis,) = common.new_figure(width=7, height=1 + 0.32 * len(table))
    values = np.array([[row["RSUM"], row["RSUM low"], row["RSUM high"]] for row in table.values()])
    colours = ["tab:blue" if row.startswith(head) else "grey" for row in table]
    axis.barh(range(len(table)), values[:, 0], xerr=np.abs(values[:, 1:] - values[:, :1]).T, color=colours, capsize=2)
    axis.set_yticks(range(len(table)), table)
    axis.invert_yaxis()
    axis.set(xlabel="RSUM", title=title)
    common.save_figure(figure, path)


# --------------------------------------------------------------------------------------------------------------- main

STAGES = ("all", "split", "train", "evaluate", "embed", "tune")


def load_model(folder):
    """(ProjectionModel of a finished run in eval mode, its Config): model.embed_image(x), model.embed_text(x) take raw
    embeddings. Raises: UserError."""
    cfg = common.load_config(Config, Path(folder) / "config.yaml")

    def model_of(path):
        state = common.load_checkpoint(path)["model_state_dict"]
        statistics = [(state[f"{side}_mean"], state[f"{side}_deviation"]) for side in ("image", "text")]
        queue_size = state["queue"].shape[1] if "queue" in state else 0
        return ProjectionModel(cfg, statistics, queue_size, 1)
    model = common.guarded(model_of, Path(folder) / "best_model.pt")
    common.load_best(folder, model)
    return model, cfg


def write_embeddings(cfg, data):
    """`--stage embed`: the test split, or the files that evaluation.embed names, through the heads, in the run's folder
    as {name}_image_embeddings.pt [m, D], _text_embeddings.pt [n, D] and _metadata.json, which data.dir takes again."""
    model, folder, name = build_model(cfg, data), open_folder(cfg, data), cfg.evaluation.embed or "test"
    common.load_best(folder, model)
    if cfg.evaluation.embed:
        check_files(embedding_files(cfg.data.dir, name))
        images, texts, index, ids, _, synthetic, _ = load_embeddings(cfg.data.dir, name, data.images.device)
        if (images.shape[1], texts.shape[1]) != (data.images.shape[1], data.texts.shape[1]):
            raise UserError(f"evaluation.embed={name}: has image and text widths {[images.shape[1], texts.shape[1]]}, "
                            f"the heads take {[data.images.shape[1], data.texts.shape[1]]}")
        data = dataclasses.replace(data, images=images, texts=texts, image_index=index.to(images.device), image_ids=ids,
                                   splits={"test": torch.arange(len(texts), device=images.device)}, synthetic=synthetic)
    z_image, z_text, own = embed(model, data, "test")
    of_image = [data.image_ids[i] for i in data.image_index[data.splits["test"]].unique().tolist()]
    image_file, text_file, metadata_file = embedding_files(folder, name)
    for path, z in ((image_file, z_image), (text_file, z_text)):
        common.atomic_write(path, lambda file, z=z: torch.save(z.cpu(), file))
    own = own.tolist()
    metadata = {"image_ids": [of_image[i] for i in own], "image_index": own, "synthetic": data.synthetic}
    common.write_json(metadata_file, metadata)
    print(f"{image_file}: {list(z_image.shape)}, {text_file}: {list(z_text.shape)}")


def use_demo(cfg):
    """Write the stand-in data and point the config at them."""
    cfg.data.dir = demo_data.write_coco("data/demo/coco_heads")


@common.exit_codes
def main(argv):
    if {"tune", "--stage=tune"} & set(argv) and not any(word.endswith((".yaml", ".yml")) for word in argv):
        argv = ["configs/tune/default.yaml", *argv]
    args = common.parse_command_line(argv, (Config, TuneConfig), __doc__, STAGES)
    is_search = args.config and "search_space" in common.read_yaml(args.config)
    if args.stage == "tune" and not is_search:
        raise UserError(f"{args.config}: has no search_space; tune YAMLs are in configs/tune/")
    if is_search:
        if args.stage not in ("all", "tune") or args.fresh:
            raise UserError(f"{args.config} describes a search, not a run: leave --stage and --fresh out (a new "
                            "study_name= searches anew)")
        tune(args)
        return
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo)
    data = load_data(cfg)
    print_splits(data)
    if stage == "split":
        print(open_folder(cfg, data) / "splits.json")
    if stage in ("all", "train"):
        train(cfg, data)
    if common.process()[0]:
        return  # the first of several processes evaluates
    if stage in ("all", "evaluate"):
        results = common.published(cfg, data.fingerprint)
        if results is None or ("native" in results["tables"]["test"]) != (data.native_texts is not None):
            results = evaluate(cfg, data)
        common.publish(cfg.output_dir, results)
    if stage == "embed":
        write_embeddings(cfg, data)


if __name__ == "__main__":
    sys.exit(main())
