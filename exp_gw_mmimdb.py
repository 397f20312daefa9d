"""Global Workspace on MM-IMDb: does a learned attention over modalities help genre prediction, and what does it cost?

Frozen image and text latents and the genre labels are three domains of one workspace; its state is a weighted sum of their
encodings, and it is trained to translate between all of them. The weights of image and text are learned per film (`shared`,
a shared-key attention), learned once (`constant`), `random`, or `uniform`. Paper: Bertin-Johannet et al., arXiv 2602.08597;
global workspace: Devillers et al. 2024, arXiv 2306.15711.

    python exp_gw_mmimdb.py configs/gw_small.yaml data.dir=mmimdb            # a few thousand films: minutes on two CPU cores
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml                      # the paper's runs: gw_{clip,blip2}_{shared,random}
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml --demo               # synthetic stand-in, no data needed
    python exp_gw_mmimdb.py configs/gw_small.yaml --stage labels             # label files from the raw download
    python exp_gw_mmimdb.py --compare results/gw_small*                      # arms and seeds side by side, paired

It prints genre F1s and mAP on the test films last: clean, with a modality missing or corrupted, beside chance and logistic
regression, with bootstrap intervals over films.

Shapes: B films a batch, D a domain's width (labels: C = 23 genres), W = 512 the workspace; a set S is a non-empty subset of
{image, text, labels}; e_d the encoding of domain d, w_d its weight, z = tanh(sum_d w_d e_d) the state.

Deviations from the paper's recipe, which configs/gw_{clip,blip2}_*.yaml follow where a key is named:
- `training.pos_weight_power`: a rare genre's positives count ((1-p)/p)^power times (0: plain cross-entropy);
- `model.input_dropout` of the input latents; `model.selector_scale: sqrt` divides q.k by sqrt(head_dim);
- `training.false_negatives: mask`: in the contrastive loss rows of one film, or of equal genres, are no negatives;
- `selector: random` is random in training too (the reference's trains with learned attention: `reference-random`);
- z-scoring uses the training films only (`data.statistics: all` uses the stats files, test included);
- F1s are of the whole split, not averaged over batches; the step with the best dev score is the one that is tested.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import demo_data
from common import UserError, ranged

DOMAINS = ("image", "text", "labels")
SUBSETS = tuple(s for n in (1, 2, 3) for s in itertools.combinations(DOMAINS, n))
PROPER = SUBSETS[:-1]  # those with a complement
LOSSES = ("translation", "demi_cycle", "cycle", "contrastive", "fused")
CONTRASTIVE_TEMPERATURE = 0.07
N_DRAWS = 3  # of noise and of random weights, averaged
AMOUNTS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of corruption
RATES = (0, 0.3, 0.5, 0.7, 0.9, 1.0)  # of films that miss a modality
N_NEIGHBOURS = 10  # training films whose mean fills in a missing latent
USES = {"both": ("image", "text"), "image only": ("image",), "text only": ("text",)}
WITH_INTERVAL = ("f1_macro", "mAP", "f1_macro_tuned")


# ------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = ""  # raw MM-IMDb: dataset/, split.json (empty: $MMIMDB1_DIR, else mmimdb)
    latents_dir: str = ""  # the .npy latents (empty: $OTHER_BACKBONES_DIR_IMDB1_AUG70, else dir/latents)
    labels_dir: str = ""  # labels_all_23.npy, ids_all.txt, class_names_23.json (empty: $IMDB1_LABELS_DIR_23, else dir/labels)
    image_file: str = ""  # image latents (empty: $MMIMDB_IMAGE_LATENTS, else mm_imdb1_globals_aug{views}_{backbone}_image.npy)
    text_file: str = ""  # text latents (empty: $MMIMDB_TEXT_EMBEDS, else ..._text.npy)
    backbone: str = "mobilenet_minilm"  # encoder that the latents are of: clip, blip2, or the name in the files
    views: int = ranged(3, ">= 1")  # views a film, view 0 clean (names the files; the manifest decides)
    statistics: Literal["train", "all"] = "train"  # z-scoring: of the training films' rows, or of the .stats.npz


@dataclass
class ModelConfig:
    selector: Literal["shared", "constant", "random", "uniform", "reference-random"] = "shared"  # weights of image and text
    selector_scale: Literal["sqrt", "none"] = "sqrt"  # shared: q.k / sqrt(head_dim), or the paper's q.k
    dim: int = ranged(512, ">= 1", "<= 65536")  # W, the workspace
    hidden_dim: int = ranged(384, ">= 1", "<= 65536")  # of a residual block
    n_blocks: int = ranged(2, ">= 1", "<= 100")  # residual blocks of each encoder and decoder
    head_dim: int = ranged(256, ">= 1", "<= 65536")  # of the selector's query and keys
    dropout: float = ranged(0.1, ">= 0", "< 1")  # in the residual blocks
    input_dropout: float = ranged(0.5, ">= 0", "< 1")  # of the input latents in training (targets stay whole)
    temperature: float = ranged(0.1, "> 0")  # T of the random selector


@dataclass
class TrainingConfig:
    batch_size: int = ranged(128, ">= 2")  # rows (film, view) a step
    steps: int = ranged(60, ">= 6")  # optimisation steps
    learning_rate: float = ranged(1e-3, "> 0")  # AdamW, peak of the one-cycle schedule
    weight_decay: float = ranged(1.7e-5, ">= 0")  # on every parameter
    pos_weight_power: float = ranged(0.5, ">= 0")  # positives of a genre with prevalence p weigh ((1-p)/p)^power
    translation_weight: float = ranged(1.0, ">= 0")  # of decoding what is outside S
    demi_cycle_weight: float = ranged(0.5, ">= 0")  # of decoding S, one domain
    cycle_weight: float = ranged(0.5, ">= 0")  # of S -> complement -> S
    contrastive_weight: float = ranged(0.05, ">= 0")  # of InfoNCE between encodings
    fused_weight: float = ranged(1.0, ">= 0")  # of decoding S, two or three domains
    false_negatives: Literal["mask", "ignore"] = "mask"  # contrastive pairs of one film or of equal genres: left out, or negatives
    selector_after_freeze: bool = False  # first the workspace with mean weights, then as many steps of the selector alone
    eval_every: int = ranged(10, ">= 1")  # steps between rows of metrics.csv, dev scores and checkpoints
    monitor: Literal["mAP", "mAP_micro", "f1_macro", "f1_weighted", "bce"] = "mAP"  # dev score that chooses the step
    patience: int = ranged(0, ">= 0")  # rows without a better dev score before training ends (0: never)


@dataclass
class Config:
    experiment: str = Path(__file__).stem.removeprefix("exp_")  # the script that a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, dropout, random weights
    device: str = "auto"  # auto | cuda | mps | cpu
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv, tables and pictures to Weights & Biases
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


# -------------------------------------------------------------------------------------------------------------- model

class ResMLP(nn.Module):
    """x [.., W] + Linear(Dropout(GELU(Linear(LayerNorm(x)))))."""

    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout),
                                    nn.Linear(hidden_dim, dim))

    def forward(self, x):
        return x + self.layers(x)


class SharedKeySelector(nn.Module):
    """Weights [B, n] = softmax_d(q . k_d) of encodings [B, n, W]: q from their mean, every k_d by one layer.

    scale: divides q . k by sqrt(head_dim); the key's bias, which cancels in the softmax, is left out then. The paper's form
    (no scale) keeps it, so that parameters are counted as there.
    """

    def __init__(self, dim, head_dim, scale=False):
        super().__init__()
        self.query = nn.Linear(dim, head_dim)
        self.key = nn.Linear(dim, head_dim, bias=not scale)
        self.factor = head_dim**-0.5 if scale else 1.0

    def forward(self, encodings):
        query = self.query(encodings.mean(1))
        return (self.factor * (query[:, None] * self.key(encodings)).sum(2)).softmax(1)


class ConstantSelector(nn.Module):
    """Weights [B, n] = softmax(logits), learned, the same for every film: the control of a selector that looks at it."""

    def __init__(self, n_domains):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_domains))

    def forward(self, encodings):
        return self.logits.softmax(0).expand(encodings.shape[:2])


class RandomSelector(nn.Module):
    """Weights [B, n] = softmax(U / T), U uniform in [0, 1), drawn anew for every sample and call."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, encodings):
        return (torch.rand(encodings.shape[:2], device=encodings.device) / self.temperature).softmax(1)


class UniformSelector(nn.Module):
    """Equal weights [B, n]."""

    def forward(self, encodings):
        return torch.full(encodings.shape[:2], 1 / encodings.shape[1], device=encodings.device)


def make_selector(model_cfg):
    """The selector of exactly {image, text} in training."""
    if model_cfg.selector in ("shared", "reference-random"):
        return SharedKeySelector(model_cfg.dim, model_cfg.head_dim, scale=model_cfg.selector_scale == "sqrt")
    if model_cfg.selector == "constant":
        return ConstantSelector(2)
    if model_cfg.selector == "random":
        return RandomSelector(model_cfg.temperature)
    if model_cfg.selector == "uniform":
        return UniformSelector()
    raise ValueError(f"no selector {model_cfg.selector!r}")


class GlobalWorkspace(nn.Module):
    """Encoders into and decoders out of a shared space, one of each a domain.

    The chosen selector weighs exactly {image, text}; other sets get random weights of temperature 1, as in the reference
    (equal ones with `mean_weights`). `loss_weights`, `false_negatives` and `pos_weight` [C] are the objective's settings.
    """

    def __init__(self, dims, model_cfg):
        super().__init__()

        def blocks():
            return [ResMLP(model_cfg.dim, model_cfg.hidden_dim, model_cfg.dropout) for _ in range(model_cfg.n_blocks)]
        self.input_dropout = nn.Dropout(model_cfg.input_dropout)
        self.encoders = nn.ModuleDict({d: nn.Sequential(nn.Linear(n, model_cfg.dim), nn.GELU(), *blocks())
                                       for d, n in dims.items()})
        self.decoders = nn.ModuleDict({d: nn.Sequential(*blocks(), nn.Linear(model_cfg.dim, n)) for d, n in dims.items()})
        self.selector = make_selector(model_cfg)
        replaced = model_cfg.selector == "reference-random"
        self.eval_selector = RandomSelector(model_cfg.temperature) if replaced else None  # None: the same
        self.other_sets, self.uniform = RandomSelector(1.0), UniformSelector()
        self.mean_weights = False
        self.loss_weights = {"translation": 1.0, "demi_cycle": 0.5, "cycle": 0.5, "contrastive": 0.05, "fused": 1.0}
        self.false_negatives, self.pos_weight = "ignore", None

    def weights(self, domains, stacked):
        """[B, n] of the encodings [B, n, W] of these domains."""
        if len(domains) == 1:
            return torch.ones_like(stacked[:, :, 0])
        if self.mean_weights:
            return self.uniform(stacked)
        if domains != ("image", "text"):
            return self.other_sets(stacked)
        if self.training or self.eval_selector is None:
            return self.selector(stacked)
        return self.eval_selector(stacked)

    def fuse(self, encodings, reweigh=None):
        """(state z [B, W] = tanh(sum_d w_d e_d), weights [B, n]) of {domain: e_d [B, W]}; reweigh(weights): others instead."""
        stacked = torch.stack(list(encodings.values()), dim=1)  # [B, n, W]
        weights = self.weights(tuple(encodings), stacked)
        if reweigh is not None:
            weights = reweigh(weights)
        return torch.tanh((weights[:, :, None] * stacked).sum(1)), weights

    def forward(self, inputs, decode="labels", reweigh=None):
        """(decoded domain [B, D], weights [B, n]) from {domain: input [B, D]} of the domains that are there.

        decode: "image", "text", "labels" (logits), or "state" for z itself [B, W].
        """
        state, weights = self.fuse({d: self.encoders[d](x) for d, x in inputs.items()}, reweigh)
        return (state if decode == "state" else self.decoders[decode](state)), weights


def build_model(cfg, data):
    """GlobalWorkspace of the data's widths, on its device, with the objective's settings."""
    dims = {**{m: x.shape[1] for m, x in data.latents.items()}, "labels": data.labels.shape[1]}
    model = GlobalWorkspace(dims, cfg.model).to(data.device)
    model.loss_weights = {name: getattr(cfg.training, f"{name}_weight") for name in LOSSES}
    model.false_negatives = cfg.training.false_negatives
    labels = data.labels[data.splits["train"].to(data.device)]
    p = labels.mean(0).clamp(1 / len(labels), 1 - 1 / len(labels))  # a genre that no training film has, or every one
    model.pos_weight = ((1 - p) / p) ** cfg.training.pos_weight_power
    return model


def build_optimizer(cfg, model):
    """AdamW over all parameters; those without a gradient (frozen) stay as they are."""
    return torch.optim.AdamW(model.parameters(), lr=cfg.training.learning_rate, betas=(0.95, 0.999),
                             weight_decay=cfg.training.weight_decay, fused=next(model.parameters()).is_cuda)


def build_scheduler(cfg, optimizer):
    """One cycle (Smith & Topin 2019) by cosines, peak at a fifth: rate /10 -> 1 -> /100 of it, beta1 .95 -> .85 -> .95."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.training.learning_rate, total_steps=cfg.training.steps, pct_start=0.2, div_factor=10,
        final_div_factor=10, base_momentum=0.85, max_momentum=0.95)


# ---------------------------------------------------------------------------------------------------------- objective

def domain_loss(model, domain, decoded, target):
    """Mean loss [n] of decoded [n, B, D] against target [B, D]: squared error, for labels cross-entropy of logits."""
    decoded, target = decoded.float(), target.expand_as(decoded).float()
    if domain == "labels":
        loss = F.binary_cross_entropy_with_logits(decoded, target, pos_weight=model.pos_weight, reduction="none")
    else:
        loss = F.mse_loss(decoded, target, reduction="none")
    return loss.mean((1, 2))


def workspace_losses(model, batch):
    """The five losses, 0-d tensors, each a plain mean of its terms over the sets S:

    demi_cycle (3): |S| = 1, decode S. translation (9): decode what is outside S. fused (9): |S| >= 2, decode S.
    cycle (9): decode the complement of S, re-encode it, fuse it, decode S. contrastive (3): InfoNCE of the encodings before
    tanh, pairs of domains. batch: as from `make_batch`. Every domain is encoded once, and all 7 states are decoded in one
    call a domain.
    """
    targets = {"image": batch["image_target"], "text": batch["text_target"], "labels": batch["labels"]}
    inputs = {"image": model.input_dropout(batch["image"]), "text": model.input_dropout(batch["text"]),
              "labels": batch["labels"]}
    size = len(batch["labels"])
    encodings = {d: model.encoders[d](x) for d, x in inputs.items()}
    states = torch.cat([model.fuse({d: encodings[d] for d in s})[0] for s in SUBSETS])  # [7 B, W]
    decoded = {d: model.decoders[d](states).view(len(SUBSETS), size, -1) for d in DOMAINS}  # [7, B, D]
    terms = {name: [] for name in LOSSES}
    for d in DOMAINS:
        for s, loss in zip(SUBSETS, domain_loss(model, d, decoded[d], targets[d]), strict=True):
            if d not in s:
                terms["translation"].append(loss)
            elif len(s) == 1:
                terms["demi_cycle"].append(loss)
            else:
                terms["fused"].append(loss)

    # cycle: re-encode what S decoded to outside S, fuse it, decode S
    reencoded = {}  # (S, domain outside S) -> [B, W]
    for d in DOMAINS:
        sets = [s for s in PROPER if d not in s]
        outputs = torch.cat([decoded[d][SUBSETS.index(s)] for s in sets])
        for s, e in zip(sets, model.encoders[d](outputs).split(size), strict=True):
            reencoded[s, d] = e
    cycled = {s: model.fuse({d: reencoded[s, d] for d in DOMAINS if d not in s})[0] for s in PROPER}
    for d in DOMAINS:
        sets = [s for s in PROPER if d in s]
        back = model.decoders[d](torch.cat([cycled[s] for s in sets])).view(len(sets), size, -1)
        terms["cycle"].extend(domain_loss(model, d, back, targets[d]))

    directions = {d: F.normalize(e.float(), dim=1) for d, e in encodings.items()}
    for a, b in itertools.combinations(DOMAINS, 2):
        ids = None if model.false_negatives == "ignore" else batch["genre_set" if "labels" in (a, b) else "film"]
        terms["contrastive"].append(common.info_nce(directions[a], directions[b], 1 / CONTRASTIVE_TEMPERATURE, ids,
                                                    model.false_negatives))
    return {name: torch.stack(list(values)).mean() for name, values in terms.items()}


def train_step(model, batch, optimizer):
    """One step -> {loss, and the five losses} as 0-d tensors (no synchronisation). bf16 autocast on CUDA."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=batch["labels"].is_cuda):
        losses = workspace_losses(model, batch)
    total = sum(model.loss_weights[name] * value for name, value in losses.items()) / 5  # a constant: a sixth loss rescales none
    total.backward()
    optimizer.step()
    return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


# -------------------------------------------------------------------------------------------------------------- train

def total_steps(cfg, data=None):
    """Optimisation steps of a run."""
    return cfg.training.steps * (2 if cfg.training.selector_after_freeze else 1)


def set_train_mode(cfg, model, step):
    """Before every step (a validation leaves eval mode): what it trains. With selector_after_freeze the workspace with mean
    weights, then the selector alone, with nothing dropped out."""
    model.train()
    if cfg.training.selector_after_freeze:
        alone = step > cfg.training.steps
        model.mean_weights = not alone
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("selector.") == alone)
        for part in (model.encoders, model.decoders):
            part.train(not alone)


def train(cfg, data):
    """Train, resuming exactly; best_model.pt is the step with the best dev score. Returns the rows of metrics.csv."""
    t = cfg.training
    folder = common.open_run(cfg, data.fingerprint)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer)
    last_step = total_steps(cfg)
    with common.Run(folder, cfg, model, optimizer, scheduler) as run:
        for step in run.steps(last_step):
            if step == t.steps + 1:  # the selector alone, on a cycle of its own
                scheduler = build_scheduler(cfg, optimizer)
                run.restart(scheduler)
            set_train_mode(cfg, model, step)
            batch = make_batch(data, batch_rows(data, cfg, step - 1))  # steps count from 1, batches from 0
            losses = train_step(model, batch, optimizer)
            run.add(losses)  # stays on the device; run.means() waits for it
            rate = scheduler.get_last_lr()[0]
            if step % t.steps:
                scheduler.step()
            if step % t.eval_every == 0 or step % t.steps == 0:
                row = {"step": step, **run.means(), **validate(model, data, cfg.seed), "learning_rate": rate}
                score = -row["dev_bce"] if t.monitor == "bce" else row[f"dev_{t.monitor}"]
                run.log(row, score, val_loss=row["dev_bce"], show=("loss", "dev_bce", "dev_mAP", "dev_f1_macro"),
                        statistics=data.statistics, genres=data.genres)
                if t.patience and run.n_stale >= t.patience and step > last_step - t.steps:
                    run.finish()
    return run.history


def validate(model, data, seed):
    """Dev scores, and the selector's health: mean and sd of the image's weight, entropy of the weights / ln 2."""
    logits, weights = predict(model, film_inputs(data, "dev"), seed=seed)
    dev = genre_scores(logits, data.labels[data.splits["dev"]])
    entropy = torch.special.entr(weights).sum(1).mean().item() / np.log(2)
    return {**{f"dev_{name}": dev[name] for name in ("bce", "mAP", "mAP_micro", "f1_macro", "f1_weighted")},
            "dev_weight_image": weights[:, 0].mean().item(), "dev_weight_sd": weights[:, 0].std().item(),
            "dev_weight_entropy": entropy}


# ----------------------------------------------------------------------------------------------------------- evaluate

class Prediction(NamedTuple):
    decoded: torch.Tensor  # [n, D]
    weights: torch.Tensor  # [n, domains]


@torch.no_grad()
def predict(model, inputs, decode="labels", seed=0, reweigh=None):
    """Prediction from {domain: z-scored input [n, D]}; random weights draw from `seed` alone. reweigh: as in `forward`."""
    model.eval()
    with common.full_precision(), torch.random.fork_rng():
        torch.manual_seed(seed)
        decoded, weights = model(inputs, decode, reweigh)
    return Prediction(decoded.float(), weights.float())


def corrupt(inputs, kind, amount, seed):
    """Inputs plus 5 x amount x Gaussian noise of unit variance in each row; kind: image, text, one (at random), both."""
    generator = torch.Generator().manual_seed(seed + 1)
    side = torch.randint(2, (len(inputs["image"]),), generator=generator)
    noisy = {}
    for i, d in enumerate(("image", "text")):
        noise = torch.randn(inputs[d].shape, generator=generator)
        noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True, correction=0)
        hit = side == i if kind == "one" else torch.full_like(side, kind in (d, "both"))
        noisy[d] = inputs[d] + 5 * amount * (noise * hit[:, None]).to(inputs[d].device)
    return noisy


def missing_modality(film, kind, rate):
    """What a film misses where this share of the films misses an item: 0 the image, 1 the text, -1 nothing.

    A pure function of its arguments; what misses an item at one rate does at every higher one. kind "both": one of the two.
    """
    digest = hashlib.sha256(f"{film}/{kind}".encode()).digest()
    if int.from_bytes(digest[:6], "big") / 2**48 >= rate:
        return -1
    return digest[6] % 2 if kind == "both" else ("image", "text").index(kind)


def leave_out(weights, missing):
    """Weights [n, 2] of image and text where missing [n] (0: no image, 1: no text) leaves all of the weight to the other."""
    alone = F.one_hot(1 - missing.clamp(min=0), 2).to(weights)
    return torch.where((missing >= 0)[:, None], alone, weights)


def fill_in(data, inputs, missing):
    """Inputs whose missing [n] latent is the mean of those of the 10 training films nearest by the other one (cosine)."""
    train, filled = film_inputs(data, "train"), dict(inputs)
    for i, (lost, present) in enumerate((("image", "text"), ("text", "image"))):
        rows = missing == i
        near = F.normalize(inputs[present][rows], dim=1) @ F.normalize(train[present], dim=1).T
        nearest = near.topk(min(N_NEIGHBOURS, near.shape[1]), dim=1).indices  # [n, k]
        filled[lost] = inputs[lost].clone()
        filled[lost][rows] = train[lost][nearest].mean(1)
    return filled


class Condition(NamedTuple):
    """What the trained model is asked: its inputs and weights of a split (and a seed for noise), changed."""
    inputs: Callable = lambda inputs, split, seed: inputs
    weights: Callable = lambda weights, split, seed: weights
    n_draws: int = 1


def conditions(data, selector):
    """{row: Condition}."""
    n_draws = N_DRAWS if selector in ("random", "reference-random") else 1

    def missing(split, kind, rate):
        films = [data.ids[i] for i in data.splits[split].tolist()]
        return torch.tensor([missing_modality(film, kind, rate) for film in films], device=data.device)
    rows = {"clean, both": Condition(n_draws=n_draws)}
    for i, name in enumerate(("text only", "image only")):
        rows[f"clean, {name}"] = Condition(weights=lambda w, split, seed, i=i: leave_out(w, torch.full_like(w[:, 0], i).long()))
    if selector == "shared":
        rows["clean, both, mean weights"] = Condition(weights=lambda w, split, seed: w.mean(0).expand_as(w))
        rows["clean, both, equal weights"] = Condition(weights=lambda w, split, seed: torch.full_like(w, 0.5))
        rows["clean, both, another film's weights"] = Condition(weights=lambda w, split, seed: w.roll(1, 0))
    for kind, amount in itertools.product(("one", "image", "text", "both"), AMOUNTS):
        rows[f"{kind} corrupted by {amount:g}"] = Condition(
            inputs=lambda x, split, seed, kind=kind, amount=amount: corrupt(x, kind, amount, seed), n_draws=N_DRAWS)
    for kind, rate in itertools.product(("image", "text", "both"), RATES):
        rows[f"{kind} missing in {rate:g}"] = Condition(
            weights=lambda w, split, seed, kind=kind, rate=rate: leave_out(w, missing(split, kind, rate)), n_draws=n_draws)
        rows[f"{kind} missing in {rate:g}, filled in"] = Condition(
            inputs=lambda x, split, seed, kind=kind, rate=rate: fill_in(data, x, missing(split, kind, rate)), n_draws=n_draws)
    return rows


def ask(model, data, condition, seed):
    """{"logits": {split: [draws, n, C]}, "weights": [n, 2] of the test films} under a Condition."""
    logits = {"dev": [], "test": []}
    for split in logits:
        for draw in range(seed, seed + condition.n_draws):
            inputs = condition.inputs(film_inputs(data, split), split, draw)
            reweigh = functools.partial(condition.weights, split=split, seed=draw)
            decoded, weights = predict(model, inputs, seed=draw, reweigh=reweigh)
            logits[split].append(decoded.cpu())
    return {"logits": {split: torch.stack(draws) for split, draws in logits.items()}, "weights": weights.cpu()}


def tuned_thresholds(logits, labels):
    """The logit of each genre [C] above which predicting it maximises its F1 on these films [N, C]; 0 for one none has."""
    ordered, order = logits.sort(dim=0, descending=True)
    hits, n = labels.gather(0, order).cumsum(0), torch.arange(1, len(logits) + 1)[:, None]
    after = torch.cat([ordered[1:], ordered[-1:] - 2])
    f1 = torch.where(ordered > after, 2 * hits / (n + labels.sum(0)), -1)  # no cut between equal logits
    best = f1.argmax(0, keepdim=True)
    middle = (ordered.gather(0, best) + after.gather(0, best))[0] / 2
    return torch.where(labels.sum(0) > 0, middle, 0)


def genre_scores(logits, labels, weights=None):
    """Genre metrics at .5 and the binary cross-entropy; weights [R, n] of a bootstrap. Raises: FloatingPointError."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError("non-finite predictions: the weights have overflowed; lower training.learning_rate")
    bce = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none").mean(1).cpu().numpy()
    mean = bce.mean() if weights is None else weights @ bce / weights.sum(1)
    return {**common.multilabel_metrics(logits, labels, weights=weights), "bce": mean}


def statistic(values, weights=None):
    """Columns of a table's row, means over draws; values: logits and logits above the dev thresholds [draws, n, C], labels."""
    draws = []
    for logits, above in zip(values["logits"], values["above_thresholds"], strict=True):
        tuned = common.multilabel_metrics(above, values["labels"], weights=weights)
        draws.append({**genre_scores(logits, values["labels"], weights), "f1_macro_tuned": tuned["f1_macro"],
                      "f1_weighted_tuned": tuned["f1_weighted"]})
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}


def logistic_regression(x, y, power, strength, start=None):
    """(weight [D, C], bias [C]) of one-vs-rest logistic regression of y [n, C] on x [n, D], by L-BFGS from `start`.

    A genre of prevalence p: positives weigh p^-power, negatives (1-p)^-power, scaled to mean 1 (power 1: "balanced").
    strength: of the penalty strength / (2 n) |weight|^2.
    """
    p = y.mean(0).clamp(1 / len(y), 1 - 1 / len(y))
    importance = y * p**-power + (1 - y) * (1 - p) ** -power
    importance = importance / importance.mean(0)
    weight, bias = (v.clone().requires_grad_(True) for v in start or (x.new_zeros(x.shape[1], y.shape[1]), x.new_zeros(y.shape[1])))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y, importance, reduction="none").mean(0).sum()
        loss = loss + strength / (2 * len(y)) * weight.square().sum()
        loss.backward()
        return loss
    with common.full_precision():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def fit_baseline(features, labels):
    """({"dev", "test": logits [n, C]}, settings) of the logistic regression that dev likes best, by macro F1 at .5 plus mAP.

    features: {split: [n, D]}; labels: of train and dev.
    """
    best = -1
    for power in (0.5, 1.0):
        fit = None
        for strength in (1000, 300, 100, 30, 10):
            fit = logistic_regression(features["train"], labels["train"], power, strength, fit)
            dev = genre_scores(features["dev"] @ fit[0] + fit[1], labels["dev"])
            if dev["f1_macro"] + dev["mAP"] > best:
                best, (weight, bias), settings = dev["f1_macro"] + dev["mAP"], fit, {"power": power, "strength": strength}
    return {split: (features[split] @ weight + bias).cpu() for split in ("dev", "test")}, settings


def evaluate(cfg, data):
    """Test the best model under every condition, beside logistic regression; returns the results, and draws the pictures.

    All that is chosen (step, thresholds, the baselines' settings) is chosen on dev.
    """
    folder = common.open_run(cfg, data.fingerprint)
    model = build_model(cfg, data)
    step = common.load_best(folder, model)["step"]
    labels = {split: data.labels[films] for split, films in data.splits.items()}
    inputs = {split: film_inputs(data, split) for split in data.splits}

    print("evaluating: logistic regression on the latents and on the state", flush=True)
    features = {f"logistic regression, {name}": {split: torch.cat([x[d] for d in use], dim=1) for split, x in inputs.items()}
                for name, use in (("both", ("image", "text")), ("image", ("image",)), ("text", ("text",)))}
    features["logistic regression on the state"] = {
        split: predict(model, x, "state", cfg.seed).decoded for split, x in inputs.items()}
    fitted = {name: fit_baseline(x, labels) for name, x in features.items()}
    answers = {name: {"logits": {split: x[None] for split, x in logits.items()}} for name, (logits, _) in fitted.items()}

    asked = conditions(data, cfg.model.selector)
    print(f"evaluating: {len(asked)} conditions, clean, corrupted, with a modality missing", flush=True)
    for name in common.progress(asked, "conditions"):
        answers[name] = ask(model, data, asked[name], cfg.seed)

    rows, chosen = {}, {"step": step, "thresholds": {}, **{name: settings for name, (_, settings) in fitted.items()}}
    for name, answer in answers.items():
        thresholds = torch.stack([tuned_thresholds(x, labels["dev"].cpu()) for x in answer["logits"]["dev"]])
        chosen["thresholds"][name] = thresholds.tolist()
        rows[name] = {"logits": answer["logits"]["test"], "labels": labels["test"].cpu(),
                      "above_thresholds": answer["logits"]["test"] - thresholds[:, None]}
    everything = torch.ones_like(labels["test"].cpu())[None]  # predicts every genre
    rows = {"chance": {"logits": everything, "above_thresholds": everything, "labels": labels["test"].cpu()}, **rows}
    scores = {name: {column: float(value) for column, value in statistic(values).items()} for name, values in rows.items()}

    print("evaluating: bootstrap intervals", flush=True)
    shown = [name for name in rows if not re.search(r"(corrupted by|missing in) (?!0\.5)", name)]
    resampled = {name: common.bootstrap(functools.partial(statistic, rows[name]), len(labels["test"])) for name in shown}
    pairs = [("clean, both", name) for name in shown if name.startswith(("clean,", "logistic regression, both"))][1:]
    pairs += [(f"{d} missing in 0.5, filled in", f"{d} missing in 0.5") for d in ("image", "text")]
    differences = {f"{a} - {b}": with_interval({c: scores[a][c] - scores[b][c] for c in scores[a]},
                                               {c: resampled[a][c] - resampled[b][c] for c in scores[a]}) for a, b in pairs}
    attention = {split: predict(model, x, seed=cfg.seed).weights[:, 0].cpu() for split, x in inputs.items()}
    tables = {
        "genres from image and text": {name: with_interval(scores[name], resampled[name]) for name in shown},
        "difference, paired over films": differences,
        "weight of the image": {**{split: {"mean": w.mean().item(), "sd": w.std().item()} for split, w in attention.items()},
                                **{f"test, {d} corrupted by 1": {"mean": answers[f"{d} corrupted by 1"]["weights"][:, 0].mean().item()}
                                   for d in ("image", "text")}},
        "cross-translation": translation_table(model, inputs["test"], cfg.seed)}
    corrupted = curve_panels(scores, "corrupted by", AMOUNTS, ("one", "image", "text", "both"), {"": cfg.model.selector},
                             "amount of noise")
    for d in ("image", "text"):
        weights = [answers[f"{d} corrupted by {x:g}"]["weights"][:, ("image", "text").index(d)].mean().item() for x in AMOUNTS]
        corrupted[f"weight of the corrupted {d}"] = {"xlabel": "amount of noise", "lines": {
            cfg.model.selector: {"x": AMOUNTS, "y": weights}}}
    missing = curve_panels(scores, "missing in", RATES, ("image", "text", "both"),
                           {"": "left out", ", filled in": "filled in by 10 neighbours"}, "share of films that miss it")
    notes = [f"95% intervals: bootstrap over {len(labels['test']):,} films, thresholds and weights as they are."]
    if scores["clean, both"]["mAP"] < scores["logistic regression, both"]["mAP"]:
        notes.append("NOTE: the workspace does not beat logistic regression on the same latents (mAP).")
    common.plot_lines(folder / "corruption.png", corrupted, "test films", data.synthetic)
    common.plot_lines(folder / "missing.png", missing, "test films", data.synthetic)
    plot_attention(folder / "attention_histogram.png", attention, data.synthetic)
    ids = [data.ids[i] for i in data.splits["test"].tolist()]
    common.write_text(folder / "missing_modality.csv", "film,kind,rate,missing\n" + "".join(
        f"{film},{kind},{rate:g},{('image', 'text', '')[missing_modality(film, kind, rate)]}\n"
        for film in ids for kind in ("image", "text", "both") for rate in RATES))
    return {**common.run_facts(cfg, data), "n": len(ids), "headline":
            f"{len(ids):,} test films; selector {cfg.model.selector}, step {step}, seed {cfg.seed}", "tables": tables,
            "curves": corrupted | missing, "notes": notes, "chosen": chosen, "per_item": {"ids": ids, "rows": {n: rows[n] for n in shown}}}


def with_interval(scores, resampled):
    """A table's row: scores, with `low` and `high` for the columns of WITH_INTERVAL."""
    row = {}
    for column, value in scores.items():
        row[column] = value
        if column in WITH_INTERVAL:
            row[f"{column} low"], row[f"{column} high"] = common.interval(resampled[column])
    return row


def curve_panels(scores, noun, xs, kinds, suffixes, xlabel):
    """`common.plot_lines` panels, by kind, of the rows "{kind} {noun} {x}{suffix}"; suffixes: {suffix: label}."""
    panels = {}
    for (column, ylabel), kind in itertools.product({"mAP": "mAP", "f1_macro_tuned": "macro F1 (dev thresholds)"}.items(), kinds):
        lines = {label: {"x": xs, "y": [scores[f"{kind} {noun} {x:g}{suffix}"][column] for x in xs]}
                 for suffix, label in suffixes.items()}
        lines["chance: every genre"] = {"x": xs, "y": [scores["chance"][column]] * len(xs)}
        panels[f"{ylabel}, {kind} {noun.split()[0]}"] = {"xlabel": xlabel, "lines": lines}
    return panels


def translation_table(model, inputs, seed):
    """Retrieval (in percent) and squared error of one modality decoded from the other, on the test films."""
    ids = torch.arange(len(inputs["image"]))
    table = {"chance": {**{f"R@{k}": 100 * min(1, k / len(ids)) for k in (1, 5, 10)}, "median_rank": (len(ids) + 1) / 2}}
    for source, target in (("image", "text"), ("text", "image")):
        decoded = predict(model, {source: inputs[source]}, target, seed).decoded
        ranks = common.retrieval_metrics(F.normalize(decoded, dim=1), F.normalize(inputs[target], dim=1), ids, ids)
        table[f"{source} to {target}"] = {
            **{f"R@{k}": 100 * ranks[f"R@{k}"] for k in (1, 5, 10)}, "median_rank": ranks["median_rank"],
            "squared error": F.mse_loss(decoded, inputs[target]).item(),
            "that of the mean": inputs[target].square().mean().item()}
    return table


# --------------------------------------------------------------------------------------------------------------- data

GENRES = demo_data.GENRES
GENRE_SPELLINGS = {**{g.lower(): g for g in GENRES}, "science fiction": "Sci-Fi", "sci fi": "Sci-Fi"}
RESIDENT_BYTES = 2**31  # latents up to this size, or a quarter of a GPU's free memory, are moved to the device whole
STATISTICS_ROWS = 2**18  # z-scoring is measured on at most so many of the training films' rows, drawn at random


@dataclass
class Data:
    """Latents by row = views * film + view (memory-mapped if they are large), labels by film, the films of each split."""
    latents: dict  # "image" | "text" -> [films * views, D] tensor, on the device or mapped
    labels: torch.Tensor  # [films, C] float32
    genres: list  # [C] names
    genre_sets: torch.Tensor  # [films] films with equal labels share a number
    ids: list  # [films] names
    views: int
    splits: dict  # train | dev | test -> [n] film numbers
    statistics: dict  # "image" | "text" -> (mean [D], deviation [D])
    device: torch.device
    fingerprint: str
    synthetic: bool


def film_inputs(data, split):
    """{"image", "text": z-scored latents [n, D]} of the clean views of a split's films."""
    return {m: latent_rows(data, m, data.splits[split] * data.views) for m in ("image", "text")}


def latent_rows(data, modality, rows):
    """[B, D] float32 z-scored latents of some rows, on the device."""
    x = data.latents[modality]
    mean, deviation = data.statistics[modality]
    return (x[rows.to(x.device, non_blocking=True)].to(data.device, non_blocking=True).float() - mean) / deviation


def make_batch(data, indices):
    """Rows (film * views + view) [B] -> inputs image, text, labels; *_target, the clean views; film and genre_set [B]."""
    films = indices // data.views
    batch = {m: latent_rows(data, m, indices) for m in ("image", "text")}
    clean = batch if data.views == 1 else {m: latent_rows(data, m, films * data.views) for m in ("image", "text")}
    films = films.to(data.device, non_blocking=True)
    return {**batch, "labels": data.labels[films], "image_target": clean["image"], "text_target": clean["text"],
            "film": films, "genre_set": data.genre_sets[films]}


def batch_rows(data, cfg, step):
    """The rows [B] of a step (from 0): a pure function of seed and step. An epoch is every view of every film once."""
    films, size = data.splits["train"], cfg.training.batch_size
    n = len(films) * data.views
    epoch, place = divmod(step, max(1, n // size))
    order = epoch_order(n, cfg.seed, epoch)[place * size:(place + 1) * size]
    return films[order // data.views] * data.views + order % data.views


@functools.lru_cache(maxsize=1)  # a million rows take longer to shuffle than a step
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(1000003 * seed + epoch))


def paths(data_cfg):
    """(root, image latents, text latents, labels folder): config keys, else the environment, else the defaults."""
    root = Path(data_cfg.dir or os.environ.get("MMIMDB1_DIR") or "mmimdb")
    latents = Path(data_cfg.latents_dir or os.environ.get("OTHER_BACKBONES_DIR_IMDB1_AUG70") or root / "latents")
    labels = Path(data_cfg.labels_dir or os.environ.get("IMDB1_LABELS_DIR_23") or root / "labels")
    stem = f"mm_imdb1_globals_aug{data_cfg.views}_{data_cfg.backbone}"
    image = data_cfg.image_file or os.environ.get("MMIMDB_IMAGE_LATENTS") or f"{stem}_image.npy"
    text = data_cfg.text_file or os.environ.get("MMIMDB_TEXT_EMBEDS") or f"{stem}_text.npy"
    return root, latents / image, latents / text, labels


def write_labels(root, folder):
    """labels_all_23.npy (float32 [N, 23]), ids_all.txt, class_names_23.json from root/dataset/{id}.json, rows by sorted id.

    A film needs its .jpeg. Genres beyond the 23 are dropped. Raises: UserError, also if other labels are there.
    """
    root, folder = Path(root), Path(folder)
    ids = sorted(p.stem for p in (root / "dataset").glob("*.json") if p.with_suffix(".jpeg").exists())
    if not ids:
        raise UserError(f"{root / 'dataset'}: no films (an {{id}}.json with its {{id}}.jpeg); unpack mmimdb.tar.gz, or "
                        "point data.dir= at it")
    labels = np.zeros((len(ids), len(GENRES)), dtype=np.float32)
    for row, film in enumerate(ids):
        names = common.read_json(root / "dataset" / f"{film}.json").get("genres") or []
        if not isinstance(names, list):
            raise UserError(f"{root / 'dataset' / film}.json: genres must be a list, found {names!r}")
        for name in names:
            if genre := GENRE_SPELLINGS.get(str(name).strip().lower()):
                labels[row, GENRES.index(genre)] = 1
    if (folder / "labels_all_23.npy").exists():
        earlier, earlier_ids, _ = read_labels(folder)
        if earlier_ids != ids or not np.array_equal(earlier, labels):
            raise UserError(f"{folder}: holds other labels than {root / 'dataset'} gives; move them away, or set "
                            "data.labels_dir=")
        return labels
    folder.mkdir(parents=True, exist_ok=True)
    common.write_text(folder / "class_names_23.json", json.dumps(GENRES))
    common.write_text(folder / "ids_all.txt", "".join(f"{film}\n" for film in ids))
    common.atomic_write(folder / "labels_all_23.npy", lambda file: np.save(file, labels))
    return labels


def read_labels(folder):
    """(labels [N, C] of 0/1, film ids [N], genres [C]) of the label files. Raises: UserError."""
    if not (folder / "labels_all_23.npy").exists():
        raise UserError(f"{folder / 'labels_all_23.npy'}: no such file; make it from the raw data with --stage labels, set "
                        "data.labels_dir=, or try --demo")
    labels = common.guarded(np.load, folder / "labels_all_23.npy")
    ids = common.guarded(lambda p: p.read_text().split(), folder / "ids_all.txt")
    genres = common.guarded(lambda p: json.loads(p.read_text()), folder / "class_names_23.json")
    if labels.shape != (len(ids), len(genres)) or len(set(ids)) != len(ids) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{folder / 'labels_all_23.npy'}: expected 0/1 of {len(ids)} different ids (ids_all.txt) x "
                        f"{len(genres)} genres, found {labels.shape}")
    return labels, ids, genres


def read_splits(path, ids, labels):
    """({train | dev | test: film numbers [n]} of split.json, whether it is synthetic). Raises: UserError."""
    content, number, splits = common.read_json(path), {film: i for i, film in enumerate(ids)}, {}
    for part in ("train", "dev", "test"):
        films = content.get(part)
        if not isinstance(films, list) or not films:
            raise UserError(f"{path}: no films of {part}")
        missing = [film for film in films if str(film) not in number]
        if missing:
            raise UserError(f"{path}: {len(missing)} films of {part} are not in ids_all.txt, the first is {missing[0]}")
        splits[part] = torch.tensor([number[str(film)] for film in films])
        if not labels[splits[part].numpy()].any():
            raise UserError(f"{path}: no film of {part} has a genre; make the label files again with --stage labels")
    everything = torch.cat(list(splits.values()))
    if len(everything.unique()) != len(everything):
        raise UserError(f"{path}: a film is in two parts of the split, or twice in one")
    return splits, bool(content.get("synthetic"))


def load_latents(path, ids):
    """(memory-mapped [rows, D] tensor, views a film) of one .npy with its manifest. Raises: UserError."""
    if not path.is_file():
        others = "".join(f" (there is {p.name}: set data.backbone= and data.views=)" for p in sorted(path.parent.glob("*.npy"))[:1])
        raise UserError(f"{path}: no such file{others}; encode the data (encode.py mmimdb -h), set data.latents_dir=, or try "
                        "--demo")
    manifest_file = path.with_name(f"{path.stem}_manifest.json")
    manifest = common.read_json(manifest_file)
    rows = common.guarded(lambda p: np.load(p, mmap_mode="c"), path)
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
        raise UserError(f"{path}: expected float16 or float32 [rows, dims], found {rows.dtype} {list(rows.shape)}")
    for key, found, where in (("total_rows", len(rows), path.name), ("dims", rows.shape[1], path.name),
                              ("original_rows", len(ids), "ids_all.txt")):
        if manifest.get(key, found) != found:
            raise UserError(f"{manifest_file}: {key} is {manifest[key]}, but {where} has {found}")
    views = manifest.get("views_per_sample")
    if not isinstance(views, int) or len(rows) != len(ids) * views:
        raise UserError(f"{path}: expected {len(ids)} films x {views} views ({manifest_file.name}) rows, found {len(rows)}")
    if manifest.get("ids", ids) != ids:  # encode.py lists them
        raise UserError(f"{path}: its films are not those of ids_all.txt in the same order; encode again")
    return torch.from_numpy(rows), views


def check_finite(x, rows, path, chunk=8192):
    """Raises UserError naming the first of the rows [n] of x [N, D] that holds NaN or infinite values."""
    for part in rows.split(chunk):
        bad = (~torch.isfinite(x[part.to(x.device)].float()).all(1)).nonzero()
        if len(bad):
            raise UserError(f"{path}: NaN or infinite values, first in row {int(part[int(bad[0])])}; encode it again")


def load_data(cfg):
    """Data of cfg. Raises: UserError naming file, expected and found."""
    device = common.pick_device(cfg.device)
    root, *latent_files, labels_dir = paths(cfg.data)
    labels, ids, genres = read_labels(labels_dir)
    splits, synthetic = read_splits(root / "split.json", ids, labels)
    files = [*latent_files, *(p.with_name(f"{p.stem}_manifest.json") for p in latent_files),
             labels_dir / "labels_all_23.npy", labels_dir / "ids_all.txt", labels_dir / "class_names_23.json",
             root / "split.json"]
    mapped = {m: load_latents(path, ids) for m, path in zip(("image", "text"), latent_files, strict=True)}
    views = mapped["image"][1]
    if mapped["text"][1] != views:
        raise UserError(f"{latent_files[1]} has {mapped['text'][1]} views a film, {latent_files[0].name} {views}")
    train_rows = (splits["train"][:, None] * views + torch.arange(views)).flatten()
    used = torch.cat([train_rows, torch.cat([splits["dev"], splits["test"]]) * views])
    drawn = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(0))[:STATISTICS_ROWS].sort().values
    room = max(RESIDENT_BYTES, torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0)
    latents, statistics = {}, {}
    for (modality, (x, _)), path in zip(mapped.items(), latent_files, strict=True):
        latents[modality] = x.to(device) if x.numel() * x.element_size() <= room else x
        check_finite(latents[modality], used, path)
        moments = common.guarded(lambda _, x=x: common.moments(x, train_rows[drawn]), path)
        if cfg.data.statistics == "all":
            files.append(path.with_name(f"{path.stem}.stats.npz"))
            moments = read_statistics(files[-1], x.shape[1])
        statistics[modality] = tuple(v.to(device) for v in moments)
    labels = torch.from_numpy(labels.astype(np.float32)).to(device)
    genre_sets = labels.unique(dim=0, return_inverse=True)[1]
    return Data(latents, labels, genres, genre_sets, ids, views, splits, statistics, device, common.fingerprint(files), synthetic)


def read_statistics(path, n_features):
    """(mu, sigma) [D] of a .stats.npz. Raises: UserError."""
    moments = common.guarded(lambda p: tuple(torch.from_numpy(np.load(p)[key]).float() for key in ("mu", "sigma")), path)
    if any(v.shape != (n_features,) or not torch.isfinite(v).all() for v in moments) or (moments[1] <= 0).any():
        raise UserError(f"{path}: expected finite mu and sigma > 0 of {n_features} features")
    return moments


# -------------------------------------------------------------------------------------------------------------- plots

def plot_training(folder, cfg, history, synthetic):
    """training_curves.png: losses, dev scores and the selector's health against steps; the chosen step is marked."""
    last_phase = [row for row in history if row["step"] > history[-1]["step"] - cfg.training.steps]  # only it may be chosen
    key, sign = f"dev_{cfg.training.monitor}", -1 if cfg.training.monitor == "bce" else 1
    chosen = max(last_phase, key=lambda row: sign * row[key])["step"]
    panels = {"loss": {name: name for name in ("loss", *LOSSES)},
              "dev": {"mAP": "dev_mAP", "macro F1 at .5": "dev_f1_macro", "weighted F1 at .5": "dev_f1_weighted"},
              "weights of image and text (dev)": {"image, mean": "dev_weight_image", "image, sd over films": "dev_weight_sd",
                                                  "entropy / ln 2": "dev_weight_entropy"}}
    common.plot_history(folder / "training_curves.png", history, panels, "step", f"{cfg.data.backbone}, selector "
                        f"{cfg.model.selector}", synthetic, chosen)


def plot_attention(path, attention, synthetic):
    """Histogram of the image's weight on each split."""
    figure, (axis,) = common.new_figure()
    for split, w in attention.items():
        axis.hist(w.numpy(), bins=np.linspace(0, 1, 41), density=True, histtype="step",
                  label=f"{split}, n = {len(w):,}, mean {w.mean():.2f}")
    axis.set(xlabel="weight of the image", ylabel="density", title="synthetic data" if synthetic else "")
    axis.legend(fontsize=7)
    common.save_figure(figure, path)


# --------------------------------------------------------------------------------------------------------------- main

STAGES = ("all", "labels", "train", "evaluate")


def load_model(folder):
    """(GlobalWorkspace of a finished run in eval mode, its Config). `model.statistics` z-scores latents, as in `latent_rows`;
    `model.genres` names the logits. Raises: UserError."""
    cfg = common.load_config(Config, Path(folder) / "config.yaml")
    best = common.load_checkpoint(Path(folder) / "best_model.pt")
    state = best["model_state_dict"]
    model = GlobalWorkspace({d: state[f"encoders.{d}.0.weight"].shape[1] for d in DOMAINS}, cfg.model)
    common.load_best(folder, model)
    model.statistics, model.genres = best["statistics"], best["genres"]
    return model, cfg


def use_demo(cfg):
    """Write the stand-in films and point the config at them."""
    d = cfg.data
    dims = {"clip": (512, 512), "blip2": (768, 2048)}.get(d.backbone, (1280, 384))
    d.dir = demo_data.write_mmimdb(f"data/demo/mmimdb_{d.backbone}_{d.views}", views=d.views, backbone=d.backbone, dims=dims)
    d.latents_dir, d.labels_dir = f"{d.dir}/latents", f"{d.dir}/labels"
    d.image_file, d.text_file = (f"mm_imdb1_globals_aug{d.views}_{d.backbone}_{m}.npy" for m in ("image", "text"))


@common.exit_codes
def main(argv):
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo, statistic)
    if stage == "labels":
        root, *_, folder = paths(cfg.data)
        labels = write_labels(root, folder)
        print(common.format_table(["genre", "films"], [[g, int(n)] for g, n in zip(GENRES, labels.sum(0), strict=True)]))
        print(f"{len(labels):,} films, {int(labels.sum()):,} labels: {folder}/")
        return
    if cfg.training.selector_after_freeze and cfg.model.selector != "shared":
        raise UserError(f"training.selector_after_freeze trains the shared selector; model.selector={cfg.model.selector} "
                        "has none")
    data = load_data(cfg)
    print(", ".join(f"{split} {len(films):,} films" for split, films in data.splits.items()) + f", {data.views} views")
    if stage in ("all", "train"):
        plot_training(Path(cfg.output_dir), cfg, train(cfg, data), data.synthetic)
    if stage in ("all", "evaluate"):
        common.publish(cfg.output_dir, common.published(cfg) or evaluate(cfg, data))


if __name__ == "__main__":
    sys.exit(main())
