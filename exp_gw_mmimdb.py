"""Global Workspace on MM-IMDb: does a learned attention over modalities help genre prediction, and what does it cost?

Frozen image and text latents and the genre labels are three domains of one workspace; its state is a weighted sum of
their encodings, and it is trained to translate between all of them. The weights of image and text are learned per film
(`shared`, a shared-key attention), learned once (`constant`), `random`, or `uniform`. Paper: Bertin-Johannet et al.,
arXiv 2602.08597; global workspace: Devillers et al. 2024, arXiv 2306.15711.

    python exp_gw_mmimdb.py configs/gw_small.yaml data.dir=mmimdb    # a few thousand films: minutes on two CPU cores
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml              # the paper's runs: gw_{clip,blip2}_{shared,random}
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml --demo       # synthetic stand-in, no data needed
    python exp_gw_mmimdb.py configs/gw_small.yaml --stage labels     # label files from the raw download
    python exp_gw_mmimdb.py --compare results/gw_small*              # arms and seeds side by side, paired over films

It prints genre F1s and mAP on the test films last: clean, with a modality missing or corrupted, beside chance and
logistic regression, with bootstrap intervals over films.

Measured: gw_small, 522 test films, seeds 1-3: macro F1 .470 +- .008 at .5, mAP .483 +- .012 (`constant` .477, .498;
`uniform` .464, .475; `random` .375, .390; logistic regression .490, .507), 35 s of training on one CPU thread.

Shapes: B films a batch, n a split's films, D a domain's width (labels: C = 23 genres), W = 512 the workspace; a set S
is a non-empty subset of {image, text, labels}; e_d the encoding of domain d, w_d its weight, z = tanh(sum_d w_d e_d).

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
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
TEMPERATURE = 0.07  # of the contrastive loss
N_DRAWS = 3  # of noise and of random weights, averaged
AMOUNTS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of corruption
CORRUPTED = ("one", "image", "text", "both")  # one: either of them, at random
RATES = (0, 0.3, 0.5, 0.7, 0.9, 1.0)  # of films that miss a modality
MISSING = ("image", "text", "both")  # both: either of them
N_NEIGHBOURS = 10  # training films whose mean fills in a missing latent


# ------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = ""  # raw MM-IMDb: dataset/, split.json (empty: $MMIMDB1_DIR, else mmimdb)
    latents_dir: str = ""  # the .npy latents (empty: $OTHER_BACKBONES_DIR_IMDB1_AUG70, else dir/latents)
    labels_dir: str = ""  # of labels_all_23.npy and its companions (empty: $IMDB1_LABELS_DIR_23, else dir/labels)
    image_file: str = ""  # (empty: $MMIMDB_IMAGE_LATENTS, else mm_imdb1_globals_aug{views}_{backbone}_image.npy)
    text_file: str = ""  # (empty: $MMIMDB_TEXT_EMBEDS, else ..._text.npy)
    backbone: str = "mobilenet_minilm"  # encoder that the latents are of: clip, blip2, or the name in the files
    views: int = ranged(3, ">= 1")  # views a film, view 0 clean (names the files; the manifest decides)
    statistics: Literal["train", "all"] = "train"  # z-scoring: of the training films' rows, or of the .stats.npz


@dataclass
class ModelConfig:
    selector: Literal["shared", "constant", "random", "uniform", "reference-random"] = "shared"  # of image and text
    selector_scale: Literal["sqrt", "none"] = "sqrt"  # shared: q.k / sqrt(head_dim), or the paper's q.k
    dim: int = ranged(512, ">= 1", "<= 65536")  # W, the workspace
    hidden_dim: int = ranged(384, ">= 1", "<= 65536")  # of a residual block
    n_blocks: int = ranged(2, ">= 1", "<= 100")  # residual blocks of each encoder and decoder
    head_dim: int = ranged(256, ">= 1", "<= 65536")  # of the selector's query and keys
    dropout: float = ranged(0.1, ">= 0", "< 1")  # in the residual blocks
    input_dropout: float = ranged(0.5, ">= 0", "< 1")  # of the input latents in training (targets stay whole)
    image_dropout: float | None = ranged(None, ">= 0", "< 1")  # of the image's, if it is another (null: input_dropout)
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
    false_negatives: Literal["mask", "ignore"] = "mask"  # contrastive pairs of one film or of equal genres
    selector_after_freeze: bool = False  # the workspace with mean weights, then as many steps of the selector
    eval_every: int = ranged(10, ">= 1")  # steps between rows of metrics.csv, dev scores and checkpoints
    monitor: Literal["mAP_micro", "mAP", "f1_macro", "f1_weighted", "bce"] = "mAP_micro"  # dev score that chooses
    patience: int = ranged(0, ">= 0")  # rows without a better dev score before training ends (0: never)


@dataclass
class Config:
    experiment: str = Path(__file__).stem.removeprefix("exp_")  # the script that a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, dropout, random weights
    device: str = "auto"  # auto | cuda | mps | cpu
    cuda_graphs: bool = True  # a GPU replays a recorded training step (false: kernel by kernel, to debug it)
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

    scale: divides q . k by sqrt(head_dim). The key's bias cancels in the softmax; the paper's form (no scale) has it.
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
    """Weights [B, n] = softmax(30 logits), learned, the same for every film: the control of one that looks at it."""

    def __init__(self, n_domains):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_domains))

    def forward(self, encodings):
        return (30 * self.logits).softmax(0).expand(encodings.shape[:2])  # 30: at the others' rate they hardly move


class RandomSelector(nn.Module):
    """Weights [B, n] = softmax(U / T), U uniform in [0, 1), drawn anew for every sample and call."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, encodings):
        return (common.uniform_draws(*encodings.shape[:2], device=encodings.device) / self.temperature).softmax(1)


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

    The chosen selector weighs exactly {image, text}; other sets get random weights of temperature 1, as in the
    reference (equal ones with `mean_weights`). `loss_weights`, `false_negatives` and `pos_weight` [C] are the
    objective's settings.
    """

    def __init__(self, dims, model_cfg):
        super().__init__()
        dim = model_cfg.dim

        def blocks():
            return [ResMLP(dim, model_cfg.hidden_dim, model_cfg.dropout) for _ in range(model_cfg.n_blocks)]
        of_image = model_cfg.input_dropout if model_cfg.image_dropout is None else model_cfg.image_dropout
        self.input_dropout = nn.ModuleDict({"image": nn.Dropout(of_image), "text": nn.Dropout(model_cfg.input_dropout)})
        self.encoders = nn.ModuleDict({d: nn.Sequential(nn.Linear(n, dim), nn.GELU(), *blocks())
                                       for d, n in dims.items()})
        self.decoders = nn.ModuleDict({d: nn.Sequential(*blocks(), nn.Linear(dim, n)) for d, n in dims.items()})
        self.selector = make_selector(model_cfg)
        is_other = model_cfg.selector == "reference-random"  # tested with other weights than it is trained with
        self.eval_selector = RandomSelector(model_cfg.temperature) if is_other else None
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
        """(state z [B, W], weights [B, n]) of {domain: e_d [B, W]}; reweigh(weights) -> the weights to take instead."""
        domains = tuple(d for d in DOMAINS if d in encodings)  # the order of the weights' columns
        stacked = torch.stack([encodings[d] for d in domains], dim=1)  # [B, n, W]
        weights = self.weights(domains, stacked)
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
    if cfg.training.selector_after_freeze and cfg.model.selector != "shared":
        raise UserError("training.selector_after_freeze trains the shared selector; model.selector="
                        f"{cfg.model.selector} has none")
    dims = {**{m: x.shape[1] for m, x in data.latents.items()}, "labels": data.labels.shape[1]}
    model = GlobalWorkspace(dims, cfg.model).to(data.device)
    model.loss_weights = {name: getattr(cfg.training, f"{name}_weight") for name in LOSSES}
    model.false_negatives = cfg.training.false_negatives
    labels = data.labels[data.splits["train"].to(data.device)]
    p = labels.mean(0).clamp(1 / len(labels), 1 - 1 / len(labels))  # also of a genre that no film has, or every one
    model.pos_weight = ((1 - p) / p) ** cfg.training.pos_weight_power
    return model


def build_optimizer(cfg, model):
    """AdamW over all parameters; those without a gradient (frozen) stay as they are."""
    return torch.optim.AdamW(model.parameters(), lr=cfg.training.learning_rate, betas=(0.95, 0.999),
                             weight_decay=cfg.training.weight_decay, fused=next(model.parameters()).is_cuda)


def build_scheduler(cfg, optimizer):
    """One cycle (Smith & Topin 2019), peak at a fifth, by cosines: rate /10 -> 1 -> /100, beta1 .95 -> .85 -> .95."""
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
    """The five losses, 0-d tensors, each a plain mean of its terms over the sets S. batch: as from `make_batch`.

    demi_cycle (3): |S| = 1, decode S. translation (9): decode what is outside S. fused (9): |S| >= 2, decode S.
    cycle (9): decode the complement of S, re-encode it, fuse it, decode S. contrastive (3): InfoNCE of the encodings
    before tanh, pairs of domains. Every domain is encoded once, and all 7 states are decoded in one call a domain.
    Of several processes each has the losses' parts of its share of the batch.
    """
    targets = {"image": batch["image_target"], "text": batch["text_target"], "labels": batch["labels"]}
    inputs = {**{d: dropout(batch[d]) for d, dropout in model.input_dropout.items()}, "labels": batch["labels"]}
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

    n = len(batch["film"])
    directions = {d: common.gathered(F.normalize(e.float(), dim=1), n) for d, e in encodings.items()}
    for a, b in itertools.combinations(DOMAINS, 2):
        ids = None if model.false_negatives == "ignore" else batch["genre_set" if "labels" in (a, b) else "film"]
        terms["contrastive"].append(common.info_nce(directions[a], directions[b], 1 / TEMPERATURE, ids,
                                                    model.false_negatives, rows=common.share(n)))
    losses = {name: torch.stack(list(values)).mean() for name, values in terms.items()}
    return {name: value if name == "contrastive" else value * (size / n) for name, value in losses.items()}


def train_step(model, batch, optimizer):
    """One step -> {loss, and the five losses} as 0-d tensors (no synchronisation). bf16 autocast on CUDA."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=batch["labels"].is_cuda):
        losses = workspace_losses(model, batch)
    total = sum(model.loss_weights[name] * value for name, value in losses.items())
    total = total / 5  # the reference's five losses; a constant, so that a sixth rescales none of them
    total.backward()
    common.sum_gradients(model)
    optimizer.step()
    return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


# -------------------------------------------------------------------------------------------------------------- train

TRAINING_PANELS = {  # of training_curves.png: {ylabel: {label: column of metrics.csv}}
    "loss": {name: name for name in ("loss", *LOSSES)},
    "dev score": {"mAP, macro": "dev_mAP", "mAP, micro": "dev_mAP_micro", "macro F1 at .5": "dev_f1_macro"},
    "weights of image and text, dev": {"image, mean": "dev_weight_image", "image, sd over films": "dev_weight_sd",
                                       "entropy / ln 2": "dev_weight_entropy"}}


def phases(cfg):
    """The first step of each phase of cfg.training.steps."""
    return [1, cfg.training.steps + 1] if cfg.training.selector_after_freeze else [1]


def total_steps(cfg, data=None):
    """Optimisation steps of a run."""
    return cfg.training.steps * len(phases(cfg))


def set_train_mode(cfg, model, step):
    """What a step trains, set before each (a validation leaves eval mode). With selector_after_freeze first the
    workspace with mean weights, then the selector alone, with nothing dropped out."""
    model.train()
    if cfg.training.selector_after_freeze:
        alone = step > cfg.training.steps
        model.mean_weights = not alone
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("selector.") == alone)
        for part in (model.input_dropout, model.encoders, model.decoders):
            part.train(not alone)


def train(cfg, data):
    """Train, resuming exactly; best_model.pt is the step with the best dev score. Returns the rows of metrics.csv."""
    t, last_step = cfg.training, total_steps(cfg)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer)
    take_step = common.GraphedStep(train_step, model, optimizer, cfg.cuda_graphs, step_inside=False)  # betas move
    folder = common.open_run(cfg, data.fingerprint)  # after what can fail for its settings
    with common.Run(folder, cfg, model, optimizer, scheduler) as run:
        for step in run.steps(last_step):
            if step == t.steps + 1:  # the selector alone, on the last workspace, with a cycle of its own
                scheduler = build_scheduler(cfg, optimizer)
                run.restart(scheduler)
            set_train_mode(cfg, model, step)
            rows = batch_rows(data, cfg, step - 1)  # steps count from 1, batches from 0
            batch = make_batch(data, rows, common.share(len(rows)))
            run.add(take_step(batch, step > t.steps))  # stays on the device; run.means() waits for it
            rate, phase_ends = scheduler.get_last_lr()[0], step % t.steps == 0  # of this step
            if not phase_ends:
                scheduler.step()
            if step % t.eval_every == 0 or phase_ends:
                row = {"step": step, **run.means(), **validate(model, data, cfg.seed), "learning_rate": rate}
                score = -row["dev_bce"] if t.monitor == "bce" else row[f"dev_{t.monitor}"]
                run.log(row, score, row["dev_bce"], patience=t.patience if step > last_step - t.steps else 0,
                        show=("loss", "dev_bce", "dev_mAP", "dev_f1_macro"),
                        statistics=data.statistics, genres=data.genres)  # the statistics and names for load_model
    common.plot_history(folder / "training_curves.png", run.history, TRAINING_PANELS, mark=run.best_step,
                        title=f"{cfg.data.backbone}, selector {cfg.model.selector}", synthetic=data.synthetic)
    return run.history


def validate(model, data, seed):
    """Dev scores, and the selector's health: mean and sd of the image's weight, entropy of the weights / ln 2."""
    logits, weights = predict(model, film_inputs(data, "dev"), seed=seed)
    dev = genre_scores(logits, data.labels[data.splits["dev"]])
    return {**{f"dev_{name}": dev[name] for name in ("bce", "mAP", "mAP_micro", "f1_macro", "f1_weighted")},
            "dev_weight_image": weights[:, 0].mean(), "dev_weight_sd": weights[:, 0].std(correction=0),
            "dev_weight_entropy": torch.special.entr(weights).sum(1).mean() / np.log(2)}


# ----------------------------------------------------------------------------------------------------------- evaluate

@torch.no_grad()
def predict(model, inputs, decode="labels", seed=0, reweigh=None):
    """(decoded [n, D], weights [n, domains]) of {domain: z-scored input [n, D]}; random weights are of `seed`."""
    model.eval()
    device = next(model.parameters()).device
    with common.full_precision(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        decoded, weights = model(inputs, decode, reweigh)
    return decoded.float(), weights.float()


def corrupt(inputs, kind, amount, seed):
    """Inputs + 5 x amount x Gaussian noise of unit variance in each row. kind: image, text, one (at random), both."""
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

    A pure function of its arguments; what is missing at one rate is at every higher one. kind "both": either of them.
    """
    digest = hashlib.sha256(f"{film}/{kind}".encode()).digest()
    if int.from_bytes(digest[:6], "big") / 2**48 >= rate:
        return -1
    return digest[6] % 2 if kind == "both" else ("image", "text").index(kind)


def fill_in(data, inputs, lost):
    """Inputs whose lost [n] latents (0: image, 1: text) are means of the 10 training films nearest by the other one."""
    train, filled = film_inputs(data, "train"), {d: x.clone() for d, x in inputs.items()}
    for i, (absent, present) in enumerate((("image", "text"), ("text", "image"))):
        rows = lost == i
        with common.full_precision():
            similarity = F.normalize(inputs[present][rows], dim=1) @ F.normalize(train[present], dim=1).T
        nearest = similarity.topk(min(N_NEIGHBOURS, similarity.shape[1]), dim=1).indices  # [rows, k]
        filled[absent][rows] = train[absent][nearest].mean(1)
    return filled


def conditions(selector):
    """{row: arguments of `logits_under`} of all that the trained model is asked."""
    asked = {"clean, both": {}, "clean, text only": {"missing": ("image", 1)},
             "clean, image only": {"missing": ("text", 1)}}
    if selector == "shared":  # weights by film: do they do more than these would?
        asked["clean, both, mean weights"] = {"reweigh": lambda w: w.mean(0).expand_as(w)}
        asked["clean, both, equal weights"] = {"reweigh": lambda w: torch.full_like(w, 0.5)}
        asked["clean, both, another film's weights"] = {"reweigh": lambda w: w.roll(1, 0)}
    for kind, amount in itertools.product(CORRUPTED, AMOUNTS):
        asked[f"{kind} corrupted by {amount:g}"] = {"noise": (kind, amount)}
    for kind, rate in itertools.product(MISSING, RATES):
        asked[f"{kind} missing in {rate:g}"] = {"missing": (kind, rate)}
        asked[f"{kind} missing in {rate:g}, filled in"] = {"missing": (kind, rate), "fill": True}
    return asked


def logits_under(model, data, split, seed, noise=None, missing=None, fill=False, reweigh=None):
    """(logits [n, C], weights [n, 2]) of a split's films. noise: (kind, amount) of `corrupt`; missing: (kind, rate) of
    `missing_modality`, left out of the sum or filled in; reweigh: as in `GlobalWorkspace.fuse`."""
    inputs = film_inputs(data, split)
    if noise:
        inputs = corrupt(inputs, *noise, seed)
    if missing:
        films = [data.ids[i] for i in data.splits[split].tolist()]
        lost = torch.tensor([missing_modality(film, *missing) for film in films], device=data.device)
        if fill:
            inputs = fill_in(data, inputs, lost)
        else:  # all of the weight to the other, which is the state of a set of one domain
            other = F.one_hot(1 - lost.clamp(min=0), 2)
            reweigh = lambda w: torch.where(lost[:, None] >= 0, other.to(w), w)  # noqa: E731
    return predict(model, inputs, seed=seed, reweigh=reweigh)


def tuned_thresholds(logits, labels):
    """The logit [C] above which predicting a genre maximises its F1 on these films [n, C]; 0 for one that none has."""
    ordered, order = logits.sort(dim=0, descending=True)
    hits, n = labels.gather(0, order).cumsum(0), torch.arange(1, len(logits) + 1)[:, None]
    after = torch.cat([ordered[1:], ordered[-1:] - 2])
    f1 = torch.where(ordered > after, 2 * hits / (n + labels.sum(0)), -1)  # no cut between equal logits
    best = f1.argmax(0, keepdim=True)
    middle = (ordered.gather(0, best) + after.gather(0, best))[0] / 2
    return torch.where(labels.sum(0) > 0, middle, 0)


def genre_scores(logits, labels):
    """Genre metrics at .5 and the binary cross-entropy. Raises: FloatingPointError."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError("non-finite predictions: the weights have overflowed; lower training.learning_rate")
    bce = F.binary_cross_entropy_with_logits(logits, labels).item()
    return {**common.multilabel_metrics(logits, labels), "bce": bce}


def row_scores(values, counts=None):
    """A row's columns, means over draws; with counts [R, n] of a bootstrap those that get an interval.

    values: logits and logits above dev's thresholds [draws, n, C], labels [n, C].
    """
    draws, labels = [], values["labels"]
    for logits, above in zip(values["logits"], values["above_thresholds"], strict=True):
        if counts is None:
            scores = genre_scores(logits, labels)
        else:
            scores = common.multilabel_metrics(logits, labels, weights=counts, names=("f1_macro", "mAP"))
        tuned = common.multilabel_metrics(above, labels, weights=counts, names=("f1_macro",))
        draws.append({**scores, "f1_macro_tuned": tuned["f1_macro"]})
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}


def logistic_regression(x, y, power, strength, start=None):
    """[1 + D, C] (the bias first) of one-vs-rest logistic regression of y [n, C] on x [n, D], by L-BFGS from `start`.

    A genre minimises sum_n c_n BCE_n / sum_n c_n + strength / 2 |weight|^2; c is ((1-p)/p)^power for its positives, p
    of the n, and 1 for the rest: power 1 is scikit-learn's class_weight="balanced" with C = 1 / (n strength).
    """
    p = y.mean(0).clamp(0.5 / len(y), 1 - 0.5 / len(y))
    importance = torch.where(y > 0, ((1 - p) / p) ** power, 1.0)
    importance = importance / importance.sum(0)
    theta = torch.zeros(1 + x.shape[1], y.shape[1], device=x.device) if start is None else start.clone()
    theta.requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=50, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ theta[1:] + theta[0], y, importance, reduction="sum")
        loss = loss + strength / 2 * theta[1:].square().sum()
        loss.backward()
        return loss
    with common.full_precision():
        optimizer.step(closure)
    return theta.detach()


def baseline_logits(model, data, seed):
    """({row: {"dev" | "test": logits [1, n, C]}}, {row: settings}) of logistic regression on latents and on the state.

    It is fitted to the clean views of the training films; dev chooses weighting and strength, by macro F1 at .5 + mAP.
    Of both modalities the wider is scaled down to the other's variance: under one penalty it would count more.
    """
    inputs = {split: film_inputs(data, split) for split in data.splits}
    labels = {split: data.labels[data.splits[split]] for split in ("train", "dev")}
    states = {split: predict(model, x, "state", seed)[0] for split, x in inputs.items()}
    mean, deviation = states["train"].mean(0), states["train"].std(0).clamp(min=1e-6)
    narrow = min(x.shape[1] for x in inputs["train"].values())
    scale = {d: (narrow / x.shape[1]) ** 0.5 for d, x in inputs["train"].items()}
    features = {"both": {split: torch.cat([x[d] * scale[d] for d in x], dim=1) for split, x in inputs.items()},
                **{d: {split: x[d] for split, x in inputs.items()} for d in scale},
                "the state": {split: (z - mean) / deviation for split, z in states.items()}}
    logits, settings = {}, {}
    for name, x in features.items():
        best, row = 0, f"logistic regression, {name}"
        for power in (0.75, 1.0):
            theta = None
            for strength in (3.0, 1.0, 0.3, 0.1):
                theta = logistic_regression(x["train"], labels["train"], power, strength, theta)
                with common.full_precision():
                    fitted = {split: x[split] @ theta[1:] + theta[0] for split in ("dev", "test")}
                dev = genre_scores(fitted["dev"], labels["dev"])
                if dev["f1_macro"] + dev["mAP"] > best:
                    best, settings[row] = dev["f1_macro"] + dev["mAP"], {"power": power, "strength": strength}
                    logits[row] = {split: z[None].cpu() for split, z in fitted.items()}
    return logits, settings


def condition_logits(cfg, model, data):
    """({row: {"dev" | "test": logits [draws, n, C]}}, {row: mean weight of the image}) of all conditions."""
    logits, weight_image, asked = {}, {}, conditions(cfg.model.selector)
    for name in common.progress(asked, "conditions"):
        is_random = "noise" in asked[name] or "random" in cfg.model.selector
        seeds = range(cfg.seed, cfg.seed + (N_DRAWS if is_random else 1))
        answers = {split: [logits_under(model, data, split, seed, **asked[name]) for seed in seeds]
                   for split in ("dev", "test")}
        logits[name] = {split: torch.stack([x.cpu() for x, _ in answers[split]]) for split in answers}
        weight_image[name] = torch.stack([w[:, 0] for _, w in answers["test"]]).mean().item()
    return logits, weight_image


def evaluate(cfg, data):
    """Test the best model under every condition, beside logistic regression; draw the pictures, return the results.

    All that is chosen (step, thresholds, the baselines' settings) is chosen on dev; the thresholds of `f1_macro_tuned`
    under the same condition (noise, missing modality) as they are used, so that only the ranking of films counts.
    """
    folder = common.open_run(cfg, data.fingerprint)
    model = build_model(cfg, data)
    step = common.load_best(folder, model)["step"]
    dev_labels, test_labels = (data.labels[data.splits[split]].cpu() for split in ("dev", "test"))
    print("evaluating: logistic regression, then the workspace, clean, corrupted, with a modality missing", flush=True)
    logits, settings = baseline_logits(model, data, cfg.seed)
    of_workspace, weight_image = condition_logits(cfg, model, data)

    everything = torch.ones_like(test_labels)[None]  # predicts every genre
    rows = {"chance": {"logits": everything, "above_thresholds": everything, "labels": test_labels}}
    thresholds = {}
    for name, of_split in {**logits, **of_workspace}.items():
        tuned = torch.stack([tuned_thresholds(x, dev_labels) for x in of_split["dev"]])  # [draws, C]
        rows[name] = {"logits": of_split["test"], "above_thresholds": of_split["test"] - tuned[:, None],
                      "labels": test_labels}
        thresholds[name] = tuned.tolist()
    on_curves = [name for name in rows if " corrupted by " in name or " missing in " in name]
    shown = {name: values for name, values in rows.items() if name not in on_curves or " 0.5" in name}
    others = [name for name in shown if name.startswith(("clean, ", "logistic regression, both"))]
    pairs = [*(("clean, both", name) for name in others if name != "clean, both"),
             *((f"{d} missing in 0.5, filled in", f"{d} missing in 0.5") for d in ("image", "text"))]
    genres, differences, items = common.interval_tables(shown, pairs, len(test_labels), row_scores)
    for name in genres.keys() & weight_image.keys():
        genres[name]["weight_image"] = weight_image[name]
    notes = ["Intervals: 95%, bootstrap over the test films; the model, thresholds and settings as they are."]
    if genres["clean, both"]["mAP"] < genres["logistic regression, both"]["mAP"]:
        notes.append("NOTE: the workspace does not beat logistic regression on the same latents (mAP).")

    scores = {name: {**row_scores(values), "weight_image": weight_image.get(name, 0.5)}
              for name, values in rows.items()}
    weights = {split: predict(model, film_inputs(data, split), seed=cfg.seed)[1][:, 0].cpu() for split in data.splits}
    curves = draw_pictures(folder, cfg, data, scores, weights)
    films = [data.ids[i] for i in data.splits["test"].tolist()]
    lines = [f"{film},{kind},{rate:g},{('image', 'text', '')[missing_modality(film, kind, rate)]}"
             for film in films for kind in MISSING for rate in RATES]
    common.write_text(folder / "missing_modality.csv", "\n".join(["film,kind,rate,missing", *lines, ""]))
    of_split = {split: {"mean": w.mean().item(), "sd": w.std(correction=0).item()} for split, w in weights.items()}
    return {
        **common.run_facts(cfg, data), "n": len(films), "notes": notes,
        "headline": f"{len(films):,} test films; selector {cfg.model.selector}, step {step}, seed {cfg.seed}",
        "chosen": {"step": step, "thresholds": thresholds, **settings},
        "tables": {"genres from image and text": genres, "paired difference": differences,
                   "weight of the image": of_split,
                   "cross-translation": translation_table(model, film_inputs(data, "test"), cfg.seed)},
        "curves": curves, "per_item": {"ids": films, **items}}


def draw_pictures(folder, cfg, data, scores, weights):
    """corruption.png, missing.png and attention_histogram.png -> the panels {ylabel: ..} of the first two.

    scores: {row: {column: number}}; weights: {split: the image's weight [n]}.
    """
    ylabels = {"mAP": "mAP", "f1_macro_tuned": "macro F1 (dev thresholds)", "weight_image": "weight of the image"}

    def panel(xlabel, xs, column, rows):
        lines = {label: {"x": xs, "y": [scores[row.format(x)][column] for x in xs]} for label, row in rows.items()}
        lines["chance"] = {"x": xs, "y": [scores["chance"][column]] * len(xs)}
        return {"xlabel": xlabel, "lines": lines}
    corruption, missing, densities = {}, {}, {}
    for column, kind in itertools.product(ylabels, CORRUPTED):
        rows = {"test films": f"{kind} corrupted by {{:g}}"}
        corruption[f"{ylabels[column]}, {kind} corrupted"] = panel("amount of noise", AMOUNTS, column, rows)
    for column, kind in itertools.product(("mAP", "f1_macro_tuned"), MISSING):
        rows = {"left out": f"{kind} missing in {{:g}}", "filled in": f"{kind} missing in {{:g}}, filled in"}
        missing[f"{ylabels[column]}, {kind} missing"] = panel("share of films that miss it", RATES, column, rows)
    bins = np.linspace(0, 1, 41)
    for split, w in weights.items():
        density, _ = np.histogram(w.numpy(), bins, density=True)
        densities[f"{split}, n = {len(w):,}, mean {w.mean():.2f}"] = {"x": (bins[1:] + bins[:-1]) / 2, "y": density}
    pictures = {"corruption": corruption, "missing": missing,
                "attention_histogram": {"density of films": {"xlabel": "weight of the image", "lines": densities}}}
    for name, panels in pictures.items():
        common.plot_lines(folder / f"{name}.png", panels, f"selector {cfg.model.selector}, test films", data.synthetic)
    return corruption | missing


def translation_table(model, inputs, seed):
    """Retrieval (in percent) and squared error of one modality decoded from the other, on the test films."""
    ids = torch.arange(len(inputs["image"]))
    chance = {f"R@{k}": 100 * min(1, k / len(ids)) for k in (1, 5, 10)}
    table = {"chance": {**chance, "median_rank": (len(ids) + 1) / 2}}
    for source, target in (("image", "text"), ("text", "image")):
        decoded = predict(model, {source: inputs[source]}, target, seed)[0]
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
    """Latents by row = views * film + view (memory-mapped if large), labels by film, the films of each split."""
    latents: dict  # "image" | "text" -> [films * views, D] tensor, on the device or mapped
    labels: torch.Tensor  # [films, C] float32
    genres: list  # [C] names
    ids: list  # [films] names
    views: int
    splits: dict  # train | dev | test -> [n] film numbers
    statistics: dict  # "image" | "text" -> (mean [D], deviation [D])
    device: torch.device
    fingerprint: str
    synthetic: bool

    def __post_init__(self):
        self.genre_sets = self.labels.unique(dim=0, return_inverse=True)[1]  # [films] equal labels share a number


def latent_rows(data, modality, rows):
    """[B, D] float32 z-scored latents of some rows, on the device."""
    x = data.latents[modality]
    mean, deviation = data.statistics[modality]
    return (x[rows.to(x.device, non_blocking=True)].to(data.device, non_blocking=True).float() - mean) / deviation


def film_inputs(data, split):
    """{"image" | "text": z-scored latents [n, D]} of the clean views of a split's films."""
    return {m: latent_rows(data, m, data.splits[split] * data.views) for m in ("image", "text")}


def make_batch(data, indices, share=slice(None)):
    """Rows (film * views + view) [B] -> inputs image, text, labels; *_target, the clean views, of this `share` of the
    batch; film, genre_set [B] of all of it."""
    all_films = (indices // data.views).to(data.device, non_blocking=True)
    indices = indices[share]
    films = indices // data.views
    batch = {m: latent_rows(data, m, indices) for m in ("image", "text")}
    clean = batch if data.views == 1 else {m: latent_rows(data, m, films * data.views) for m in ("image", "text")}
    films = films.to(data.device, non_blocking=True)
    return {**batch, "labels": data.labels[films], "image_target": clean["image"], "text_target": clean["text"],
            "film": all_films, "genre_set": data.genre_sets[all_films]}


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
    """labels_all_23.npy (float32 [N, 23]), ids_all.txt, class_names_23.json of dataset/*.json, by sorted id.

    A film needs its .jpeg; genres beyond the 23 are dropped. Raises: UserError, also if other labels are there.
    """
    root, folder = Path(root), Path(folder)
    ids = sorted(p.stem for p in (root / "dataset").glob("*.json") if p.with_suffix(".jpeg").exists())
    if not ids:
        raise UserError(f"{root / 'dataset'}: no films (.json with .jpeg); unpack mmimdb.tar.gz "
                        "(archive.org/details/mmimdb), or set data.dir=")
    labels = np.zeros((len(ids), len(GENRES)), dtype=np.float32)
    for row, film in enumerate(ids):
        names = common.read_json(root / "dataset" / f"{film}.json").get("genres") or []
        if not isinstance(names, list):
            raise UserError(f"{root / 'dataset' / film}.json: genres must be a list, found {names!r}")
        for genre in {GENRE_SPELLINGS.get(str(name).strip().lower()) for name in names} - {None}:
            labels[row, GENRES.index(genre)] = 1
    if (folder / "labels_all_23.npy").exists():
        earlier, *names = read_labels(folder)
        if names != [ids, list(GENRES)] or not np.array_equal(earlier, labels):
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
    path = folder / "labels_all_23.npy"
    if not path.exists():
        raise UserError(f"{path}: no such file; make it with --stage labels, set data.labels_dir=, or try --demo")
    labels = common.guarded(np.load, path)
    ids = common.guarded(lambda p: p.read_text().split(), folder / "ids_all.txt")
    genres = common.guarded(lambda p: json.loads(p.read_text()), folder / "class_names_23.json")
    if not isinstance(genres, list) or {type(g) for g in genres} != {str} or len(set(genres)) != len(genres):
        raise UserError(f"{folder / 'class_names_23.json'}: expected a list of names; make it with --stage labels")
    shape = getattr(labels, "shape", "no array")
    if shape != (len(ids), len(genres)) or len(set(ids)) != len(ids) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{path}: expected 0/1 of {len(ids)} different ids (ids_all.txt) x {len(genres)} genres, found "
                        f"{shape}")
    return labels, ids, genres


def read_splits(path, ids, labels):
    """({train | dev | test: film numbers [n]} of split.json, whether it is synthetic). Raises: UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file; it is in mmimdb.tar.gz (archive.org/details/mmimdb); set data.dir=")
    content, number, splits = common.read_json(path), {film: i for i, film in enumerate(ids)}, {}
    for part in ("train", "dev", "test"):
        films = content.get(part)
        if not isinstance(films, list) or not films:
            raise UserError(f"{path}: no films of {part}")
        missing = [film for film in films if str(film) not in number]
        if missing:
            raise UserError(f"{path}: {len(missing)} films of {part} are not in ids_all.txt, the first is {missing[0]}")
        splits[part] = torch.tensor([number[str(film)] for film in films])
        if not labels[splits[part]].any():
            raise UserError(f"{path}: no film of {part} has a genre in labels_all_23.npy; make it with --stage labels")
    if len(torch.cat(list(splits.values())).unique()) != sum(map(len, splits.values())):
        raise UserError(f"{path}: a film is in two parts of the split, or twice in one")
    return splits, bool(content.get("synthetic"))


def load_latents(path, ids):
    """(memory-mapped [rows, D] tensor, views a film) of one .npy with its manifest. Raises: UserError."""
    if not path.is_file():
        others = [f" (there is {p.name}: set data.backbone=, data.views=)" for p in sorted(path.parent.glob("*.npy"))]
        raise UserError(f"{path}: no such file{''.join(others[:1])}; encode the data (encode.py mmimdb -h), set "
                        "data.latents_dir=, or try --demo")
    manifest_file = path.with_name(f"{path.stem}_manifest.json")
    manifest = common.read_json(manifest_file)
    rows = common.guarded(lambda p: np.load(p, mmap_mode="c"), path)
    if not isinstance(rows, np.memmap) or rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise UserError(f"{path}: expected float16 or float32 [rows, dims], found {found}")
    if path.stat().st_size != rows.offset + rows.nbytes:
        size = path.stat().st_size
        raise UserError(f"{path}: expected {rows.offset + rows.nbytes} bytes by its header, found {size}")
    for key, value, where in (("total_rows", len(rows), path.name), ("dims", rows.shape[1], path.name),
                              ("original_rows", len(ids), "ids_all.txt")):
        if manifest.get(key, value) != value:
            raise UserError(f"{manifest_file}: {key} is {manifest[key]}, but {where} has {value}")
    views = manifest.get("views_per_sample")
    if not isinstance(views, int) or len(rows) != len(ids) * views:
        raise UserError(f"{path}: expected {len(ids)} films x {views} views ({manifest_file.name}) rows, found "
                        f"{len(rows)}")
    if manifest.get("ids", ids) != ids:  # encode.py lists them
        raise UserError(f"{path}: its films are not those of ids_all.txt in the same order; encode again")
    return torch.from_numpy(rows), views


def load_data(cfg):
    """Data of cfg. Raises: UserError naming file, expected and found."""
    device = common.pick_device(cfg.device)
    root, image_file, text_file, labels_dir = paths(cfg.data)
    labels, ids, genres = read_labels(labels_dir)
    splits, synthetic = read_splits(root / "split.json", ids, labels)
    (image, views), (text, text_views) = load_latents(image_file, ids), load_latents(text_file, ids)
    if text_views != views:
        raise UserError(f"{text_file} has {text_views} views a film, {image_file.name} {views}")
    files = [image_file, text_file, *(p.with_name(f"{p.stem}_manifest.json") for p in (image_file, text_file)),
             *(labels_dir / name for name in ("labels_all_23.npy", "ids_all.txt", "class_names_23.json")),
             root / "split.json"]
    train_rows = (splits["train"][:, None] * views + torch.arange(views)).flatten()
    used = torch.cat([train_rows, torch.cat([splits["dev"], splits["test"]]) * views])
    drawn = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(0))[:STATISTICS_ROWS].sort().values
    room = max(RESIDENT_BYTES, torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0)
    latents, statistics = {}, {}
    for modality, x, path in (("image", image, image_file), ("text", text, text_file)):
        latents[modality] = x.to(device) if x.numel() * x.element_size() <= room else x
        for part in used.split(8192):
            bad = (~torch.isfinite(latents[modality][part.to(latents[modality].device)]).all(1)).nonzero()
            if len(bad):
                row = int(part[int(bad[0])])
                raise UserError(f"{path}: NaN or infinite values, first in row {row}; encode it again")
        moments = common.guarded(lambda _, x=x: common.moments(x, train_rows[drawn]), path)
        if cfg.data.statistics == "all":
            path = path.with_name(f"{path.stem}.stats.npz")
            files.append(path)
            moments = common.guarded(lambda p: [torch.from_numpy(np.load(p)[k]).float() for k in ("mu", "sigma")], path)
            if any(v.shape != x.shape[1:] or not torch.isfinite(v).all() for v in moments) or (moments[1] <= 0).any():
                raise UserError(f"{path}: expected finite mu and sigma > 0 of {x.shape[1]} features")
        statistics[modality] = tuple(v.to(device) for v in moments)
    labels = torch.from_numpy(labels.astype(np.float32)).to(device)
    return Data(latents, labels, genres, ids, views, splits, statistics, device, common.fingerprint(files), synthetic)


# --------------------------------------------------------------------------------------------------------------- main

STAGES = ("all", "labels", "train", "evaluate")


def load_model(folder):
    """(GlobalWorkspace of a finished run in eval mode, its Config). `model.statistics` z-scores latents, as in
    `latent_rows`; `model.genres` names the logits. Raises: UserError."""
    cfg = common.load_config(Config, Path(folder) / "config.yaml")
    best = common.guarded(common.load_checkpoint, Path(folder) / "best_model.pt")
    dims = {d: best["model_state_dict"][f"encoders.{d}.0.weight"].shape[1] for d in DOMAINS}
    model = GlobalWorkspace(dims, cfg.model)
    common.load_best(folder, model)
    model.statistics, model.genres = best["statistics"], best["genres"]
    return model, cfg


def use_demo(cfg):
    """Write the stand-in films, of the backbone's real widths, and point the config at them."""
    d = cfg.data
    dims = {"clip": (512, 512), "blip2": (768, 2048)}.get(d.backbone, (1280, 384))
    d.dir = demo_data.write_mmimdb(f"data/demo/mmimdb_{d.backbone}_{d.views}", views=d.views, backbone=d.backbone,
                                   dims=dims)
    d.latents_dir, d.labels_dir = f"{d.dir}/latents", f"{d.dir}/labels"
    d.image_file, d.text_file = (f"mm_imdb1_globals_aug{d.views}_{d.backbone}_{m}.npy" for m in ("image", "text"))


@common.exit_codes
def main(argv):
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo)
    if stage == "labels":
        root, *_, folder = paths(cfg.data)
        labels = write_labels(root, folder)
        counts = [[genre, int(n)] for genre, n in zip(GENRES, labels.sum(0), strict=True)]
        print(common.format_table(["genre", "films"], counts))
        print(f"{len(labels):,} films, {int(labels.sum()):,} labels: {folder}/")
        return
    data = load_data(cfg)
    print(", ".join(f"{split} {len(films):,} films" for split, films in data.splits.items()) + f", {data.views} views")
    if stage in ("all", "train"):
        train(cfg, data)
    if common.process()[0]:
        return  # the first of several processes evaluates
    if stage in ("all", "evaluate"):
        common.publish(cfg.output_dir, common.published(cfg, data.fingerprint) or evaluate(cfg, data))


if __name__ == "__main__":
    sys.exit(main())
