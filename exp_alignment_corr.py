"""Representation alignment: how far do vision and language models agree, does agreement fall as captions carry more
information of their own, and does it predict performance?

Sources: the Platonic Representation Hypothesis (Huh et al. 2024, arXiv 2405.07987); "Understanding the Emergence of
Multimodal Representation Alignment" (Tjandrasuwita et al. 2025, arXiv 2502.16282). A YAML names its stages:

    python exp_alignment_corr.py configs/alignment_synthetic.yaml    # synthetic: controlled uniqueness, no data needed
    python exp_alignment_corr.py configs/alignment_prh.yaml --demo   # align, uniqueness: layers of two sets of models
    python exp_alignment_corr.py configs/alignment_n_sweep.yaml      # n_sweep: is alignment a matter of few items?
    python exp_alignment_corr.py configs/alignment_mmimdb.yaml       # mmimdb: linear probes against alignment, by genre
    python exp_alignment_corr.py configs/clip_finetune.yaml          # finetune: few labels, many pairs, w x InfoNCE
    python exp_alignment_corr.py --compare results/clip_finetune*    # runs side by side

It prints tables last: the score of the best layer pair, its 95% interval, chance (the mean of the permutation null),
the calibrated score and p, and rank correlations with n and p.

Measured: synthetic, seeds 1-3, 512 samples, D = 1: unbiased CKA .68, .29, .01 at U = 0, 4, 8, in 136 s; captions
(MiniLM) with 1,024 photos (MobileNet V2): mutual 10-NN .131 at u = 0, .012 at u = 100 (chance .010), in 49 s and .75
GB; one CPU core, torch 2.13.

Shapes: N items, L layers, D features, K permutations; a stack is [N, L, D], [N, D] (one layer) or a list of [N, D_l],
tensors or numpy arrays. Of the synthetic label's 8 bits U are unique to one side, 8 - U shared; u is the share of a
caption's words that were replaced, in percent; w weighs InfoNCE beside the classifier's loss.

Deviations from the recipes this follows:
- unbiased CKA and CKNNA have no epsilon (with it a model has .12 with itself at a mean cosine of .99);
- SVCCA is exact; neighbours are searched in float32, near ties in float64; equal cosines go by index; signs stay;
- every score has a permutation null of the *maximum over layer pairs* (one permutation for all layers);
- files whose ids differ or are in another order are an error; MM-IMDb's genres are matched by name;
- outliers are clamped for alignment alone, never in what a model trains on, nor in hashed TF-IDF, mostly zeros;
- truncations of one encoder are a dose-response of that encoder, never a sample of models;
- probes and fine-tuning choose on dev; every w gets the same start, steps and rates.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import copy
import dataclasses
import functools
import glob
import itertools
import json
import math
import operator
import re
import sys
import warnings
import zlib
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

METRICS = ("mutual_knn", "cycle_knn", "lcs_knn", "edit_distance_knn", "cka", "unbiased_cka", "cknna", "svcca")
KNN_METRICS = ("mutual_knn", "cycle_knn", "lcs_knn", "edit_distance_knn", "cknna")
TRAINED = ("synthetic", "mmimdb", "finetune")  # the stages that train something
NEAR_TIE = 2e-6  # cosines closer than this in float32 are computed again in float64
BLOCK_BYTES = 2**28  # what is N x N is made in row blocks of about this size
KEPT_BYTES = 2**31  # and the N x N of all layers are kept up to this size
LAUNCH_BYTES = {"cuda": BLOCK_BYTES, "cpu": 0}  # a GPU takes layers and draws of this size at once, a CPU one by one


# ------------------------------------------------------------------------------------------------------------- config

@dataclass
class AlignmentConfig:
    metrics: list[Literal[METRICS]] = field(default_factory=lambda: ["mutual_knn", "unbiased_cka"])  # to compute
    k: int = ranged(10, ">= 1")  # neighbours
    clamp_quantile: float = ranged(0.95, "> 0", "<= 1")  # clamp to this quantile of |value| of the whole stack (1: not)
    clamp_exact: bool = True  # that quantile itself (false: mean over samples of each one's quantile)
    n_permutations: int = ranged(200, ">= 19")  # K, of the null of the maximum over layer pairs
    ladder: list[str] = field(default_factory=list)  # pca:WIDTH cuts of the first model, tfidf:WIDTH of the texts


@dataclass
class SyntheticConfig:
    uniqueness: list[int] = field(default_factory=lambda: [0, 2, 4, 6, 8])  # U, unique bits among the label's 8
    transform_depths: list[int] = field(default_factory=lambda: [1, 3, 10])  # D, tanh blocks that x2 passes through
    x1_depths: list[int] = field(default_factory=lambda: [1])  # layers of x1's encoders
    x2_depths: list[int] = field(default_factory=lambda: [1, 3, 6, 10])  # layers of x2's encoders
    n_seeds: int = ranged(1, ">= 1")  # data, transforms and encoders are drawn anew for seed, seed + 1, ...
    n_samples: int = ranged(65536, ">= 4000")  # split 70/15/15
    epochs: int = ranged(10, ">= 1")  # of each encoder, the best on validation kept
    batch_size: int = ranged(512, ">= 2")  # samples a step
    k: int = ranged(100, ">= 1", "< 512")  # neighbours among the 512 test samples that alignment is measured on


@dataclass
class NSweepConfig:
    sizes: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024, 2048, 4096])  # N; and all items
    n_draws: int = ranged(5, ">= 2")  # subsamples of each size
    several_dir: str = ""  # language features of several captions an image (features_dir: of one); empty: without


@dataclass
class MMIMDbConfig:
    dir: str = "mmimdb"  # split.json, labels/, latents/, dataset/ (plots), {train,dev,test}/sampled_ids.npy if any
    language_dir: str = ""  # folder of layer-wise language features by film id (empty: the text latents)
    vision_dir: str = ""  # likewise of the posters (empty: the image latents)
    epochs: int = ranged(100, ">= 1")  # of the linear probes
    batch_size: int = ranged(64, ">= 2")  # films a step


@dataclass
class FinetuneConfig:
    class_idx: int | str = 19  # genre by name, or by its place in frequency order (19: Western)
    weights: list[float] = field(default_factory=lambda: [0, 0.1, 0.25, 0.5, 1, 2, 5, 10],
                                 metadata={"bounds": (">= 0",)})  # w: of InfoNCE
    n_labelled: int | Literal["index", "all"] = "index"  # labelled films: the index files' (all without one); a number
    n_seeds: int = ranged(3, ">= 1")  # runs of each weight: seed, seed + 1, ...
    epochs: int = ranged(30, ">= 1")  # same steps for every weight
    warmup_epochs: int = ranged(10, ">= 0")  # linear, then cosine to a hundredth
    batch_size: int = ranged(64, ">= 2")  # pairs a step, and labelled films a step
    learning_rate: float = ranged(1e-4, "> 0")  # AdamW
    scale_learning_rate: float = ranged(1e-2, "> 0")  # of InfoNCE's learnt scale, which hardly moves at the others'
    embed_dim: int = ranged(512, ">= 1")  # of the towers


@dataclass
class Config:
    experiment: str = Path(__file__).stem.removeprefix("exp_")  # the script that a YAML belongs to
    seed: int = ranged(0, ">= 0", "< 4294967296")  # weights, data order, permutations, subsamples
    device: str = "auto"  # auto | cuda | mps | cpu
    cuda_graphs: bool = True  # a GPU replays a recorded training step (false: kernel by kernel, to debug it)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv, tables and pictures to Weights & Biases
    stages: list[Literal["synthetic", "align", "uniqueness", "n_sweep", "mmimdb", "finetune"]] = field(
        default_factory=lambda: ["synthetic"])  # what to run, in order
    features_dir: str = ""  # language features: folder, file, pattern; {u} or {}: the level; {BASE_DIR}: that variable
    vision_dir: str = ""  # vision features (empty: features_dir, by pool_x, pool_y; the same: one modality with itself)
    pool_x: str = ""  # use only language files of this pooling (empty: any)
    pool_y: str = ""  # use only vision files of this pooling (empty: any)
    align_dir: str = ""  # score matrices, one file a level (empty: the run folder's alignment/; {u} as above)
    plot_dir: str = ""  # pictures of align, uniqueness and n_sweep (empty: the run folder)
    captions_file: str = ""  # JSON of captions and rewrites, for the text-only baseline and the ladder's tfidf
    same_scale: bool = False  # one y range for all panels of performance
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    n_sweep: NSweepConfig = field(default_factory=NSweepConfig)
    mmimdb: MMIMDbConfig = field(default_factory=MMIMDbConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


# ------------------------------------------------------------------------------------------------------------ metrics

def as_layers(stack, where=""):
    """A stack's layers, a list of [N, D_l]; a list is as it is. Raises: UserError, which begins with `where`."""
    is_list = isinstance(stack, (list, tuple))
    tensors = [torch.tensor(x) if isinstance(x, np.ndarray) else x for x in (stack if is_list else [stack])]
    tensors = [x.cpu() if x.device.type == "mps" else x for x in tensors]  # float64, which MPS lacks
    layers = tensors if is_list or tensors[0].ndim != 3 else [*tensors[0].unbind(1)]
    if not layers or any(x.ndim != 2 or x.numel() == 0 or len(x) != len(layers[0]) for x in layers):
        raise UserError(f"{where}features must be [N, D] or [N, L, D], found {[list(x.shape) for x in layers]}")
    extremes = torch.stack([value.float() for x in tensors for value in x.aminmax()])
    if not extremes.abs().amax() <= 1e30:  # also of NaN; beyond it float32 has no room for a row's length
        i, x = next((i, x) for i, x in enumerate(layers) if not x.float().abs().amax() <= 1e30)  # in half 1e30 is inf
        bad = (~(x.float().abs() <= 1e30).all(1)).nonzero()[:, 0]
        raise UserError(f"{where}layer {i}: {len(bad)} of {len(x)} rows of features hold NaN, infinite or values "
                        f"beyond 1e30, the first is row {int(bad[0])}")
    return layers


def grouped_layers(layers):
    """The layers in order: on a GPU those of one shape together, [G, N, D], on a CPU each [N, D]."""
    for ((n, d), _), alike in itertools.groupby(layers, lambda x: (x.shape, x.dtype)):
        alike = list(alike)
        size = LAUNCH_BYTES[alike[0].device.type] // (16 * n * max(n, d))
        yield from torch.stack(alike).split(size) if size > 1 else alike


def clamp_outliers(stack, q=0.95, exact=True, where=""):
    """Features clamped to [-t, t], one threshold t for the whole stack (Huh et al. 2024, appendix).

    exact: t is the int(q n) + 1 smallest of all n = N L D absolute values; else the mean over samples of each sample's
    q-quantile. Takes and returns [N, L, D], [N, D] or a list of [N, D_l]; q = 1 changes nothing.
    Raises: UserError if t is 0, which sparse features have.
    """
    layers = as_layers(stack)
    values = torch.cat([x.abs().float() for x in layers], dim=1).cpu().numpy()  # [N, sum D_l]
    if exact:
        place = min(int(q * values.size), values.size - 1)
        t = float(np.partition(values, place, axis=None)[place])
    else:
        t = float(np.quantile(values, q, axis=1).mean())
    if t == 0 and values.any():
        raise UserError(f"{where}most values are 0: clamping would leave nothing; set alignment.clamp_quantile=1")
    clamped = [x.clamp(-t, t) for x in layers]
    if isinstance(stack, (list, tuple)):
        return clamped
    return clamped[0] if stack.ndim == 2 else torch.stack(clamped, dim=1)


def unit_rows(x):
    """Rows of x [.., N, D] at unit length, float32 (float64 stays); zero rows stay zero."""
    x = x if x.dtype == torch.float64 else x.float()
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # 1e20 squared is no float32
    return x / lengths.clamp(min=1e-30).to(x.dtype)


def products(x, rows):
    """x[rows] @ x.T of x [.., N, D] in float32 without TF32; on a CPU the whole by upper blocks, as it is symmetric."""
    x, n = x.float(), x.shape[-2]
    with common.full_precision():
        if rows.stop - rows.start < n or n <= 256 or x.is_cuda:
            return x[..., rows, :] @ x.mT
        out = x.new_empty(*x.shape[:-1], n)
        for part in common.row_blocks(rows, max(256, (n + 3) // 4)):
            out[..., part, part.start:] = x[..., part, :] @ x[..., part.start:, :].mT
            out[..., part.stop:, part] = out[..., part, part.stop:].mT
    return out


class Side:
    """What a metric needs of one stack of layers, computed once; `by_layer` names its tensors [L, N, ...] or [L]."""

    def permuted(self, orders):
        """That of the rows `orders` [B, N], without another search or product: L x B layers."""
        side = copy.copy(self)
        for name in self.by_layer:
            x = getattr(self, name)
            setattr(side, name, x[:, orders].flatten(0, 1) if x.ndim > 1 else x.repeat_interleave(len(orders)))
        return side

    def kept(self):
        """A copy for many comparisons, which holds what they share where it fits; not to be permuted."""
        return self


class Neighbours(Side):
    """`near` [L, N, k], the nearest rows, best first; `cosines` [L, N, k] float64; `ties` [L], rows with a k-th tie."""

    by_layer = ("near", "cosines")

    def __init__(self, layers, k):
        groups = zip(*(nearest_neighbours(x, k) for x in grouped_layers(layers)), strict=True)
        self.near, cosines, self.ties = map(torch.cat, groups)
        self.n, self.k, self.cosines = len(layers[0]), k, cosines.double()

    def permuted(self, orders):
        side = super().permuted(orders)
        inverse = orders.argsort().repeat(len(self.near), 1)  # [L B, N]
        side.near = inverse.gather(1, side.near.flatten(1)).view_as(side.near)
        return side

    def kept(self):
        side = copy.copy(self)
        if 4 * len(self.near) * self.n**2 <= KEPT_BYTES:
            tables = list(self.tables())
            side.tables = lambda: tables
        return side

    def tables(self):
        """For each block of rows: (rows, table [rows * N, L] float32); entry (i N + j, l) is 1 if j is among the
        neighbours of the block's row i in layer l, else 0."""
        near, n = self.near, self.n
        size = BLOCK_BYTES // ((4 if near.is_cuda else 64) * n * len(near))  # a small block stays in a CPU's cache
        for rows in common.row_blocks(slice(0, n), max(1, size)):
            table = torch.zeros(rows.stop - rows.start, n, len(near), device=near.device)
            yield rows, table.scatter_(1, near[:, rows].permute(1, 2, 0), 1).flatten(0, 1)


def nearest_neighbours(x, k):
    """The k nearest rows by cosine, without the row itself, best first, equal cosines by lowest index.

    x [G, N, D] or [N, D], G = 1 -> (indices [G, N, k] int64, cosines [G, N, k] float32, rows with a tie at the k-th
    place [G]). A float32 search finds them; rows with near ties are searched again by float64 products.
    """
    n, unit, blocks, ties = x.shape[-2], unit_rows(x), [], 0
    for rows in common.row_blocks(slice(0, n), max(1, BLOCK_BYTES // (16 * x.shape[:-1].numel()))):
        cosines = products(unit, rows)
        cosines.diagonal(rows.start, -2, -1).fill_(-torch.inf)
        values, indices = cosines.topk(min(k + 1, n - 1))
        close = (values.diff() > -NEAR_TIE).any(-1).view(-1, values.shape[-2])
        close = close.any(0).nonzero()[:, 0]  # in one of the layers; the only read from the device
        if len(close):
            exact = x.double()
            lengths = exact.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-300)
            itself = close + rows.start
            # rounded: copies of a row tie whatever the order of summation
            cosines = (exact[..., itself, :] @ exact.mT / lengths[..., itself, :] / lengths.mT).float()
            cosines.scatter_(-1, itself[:, None].expand(*cosines.shape[:-1], 1), -torch.inf)
            cosines, order = cosines.sort(descending=True, stable=True)
            values[..., close, :], indices[..., close, :] = (x[..., :values.shape[-1]] for x in (cosines, order))
        ties = ties + (values[..., k - 1:k] == values[..., k:]).sum((-2, -1))  # none of k = N - 1
        blocks.append((indices[..., :k], values[..., :k]))
    return *(torch.cat(parts, dim=-2).view(-1, n, k) for parts in zip(*blocks, strict=True)), ties.view(-1)


def mutual_knn_scores(a, b):
    """Mean overlap of the two sets of k nearest neighbours / k (Huh et al. 2024, appendix A); in [0, 1], chance
    k / (N - 1)."""
    total = 0
    for rows, table in b.tables():
        near = a.near[:, rows]
        pairs = a.n * torch.arange(near.shape[1], device=near.device)[:, None] + near
        bags = pairs.view(-1, math.gcd(near.shape[1], 8) * a.k)  # up to 8 rows in one
        overlap = F.embedding_bag(bags, table, mode="sum")  # [La bags, Lb]
        total = total + overlap.view(len(near), -1, table.shape[1]).sum(1, dtype=torch.float64)
    return total / (a.n * a.k)


def cycle_knn_scores(a, b):
    """Share of items i that are among a's neighbours of some j of b's neighbours of i; in [0, 1], chance
    1 - (1 - k / (N - 1))^k; asymmetric, and raised by hubs."""
    i, hits = torch.arange(a.n, device=a.near.device)[:, None], []
    for near in a.near:
        is_near = torch.zeros(a.n, a.n, dtype=torch.bool, device=near.device).scatter_(1, near, True)  # of the row j
        hits.append(is_near.take(b.near * a.n + i).any(2).sum(1))
    return torch.stack(hits).double() / a.n


def lcs_knn_scores(a, b):
    """Mean longest common subsequence of the two lists of k neighbours, nearest first; in [0, k]."""
    return compare_lists(a, b, longest=True) / a.n


def edit_distance_knn_scores(a, b):
    """1 - mean Levenshtein distance of the two lists of k neighbours, nearest first, / k; in [0, 1], chance near 0."""
    return 1 - compare_lists(a, b, longest=False) / (a.n * a.k)


def compare_lists(a, b, longest):
    """Sum over rows of the longest common subsequence, or else the Levenshtein distance, of the two lists: [La, Lb]."""
    k, out = a.k, a.near.new_zeros(len(a.near), len(b.near))
    rows_at_once = max(1, BLOCK_BYTES // (len(b.near) * k * k))
    for near, total in zip(a.near, out, strict=True):
        for start in range(0, a.n, rows_at_once):
            of_a, of_b = near[start:start + rows_at_once].T, b.near[:, start:start + rows_at_once].permute(2, 0, 1)
            same = (of_a[:, None, None] == of_b).to(torch.int8 if k < 127 else torch.int16)  # [k, k, Lb, rows]
            above = [torch.full_like(same[0, 0], 0 if longest else j) for j in range(k + 1)]
            for i in range(k):  # dynamic programming over the beginnings of the lists
                row = [above[0] if longest else above[0] + 1]
                for j in range(k):
                    if longest:
                        best = torch.maximum(torch.maximum(above[j + 1], row[j]), above[j] + same[i, j])
                    else:
                        best = torch.minimum(torch.minimum(above[j + 1], row[j]) + 1, above[j] + 1 - same[i, j])
                    row.append(best)
                above = row
            total += above[k].long().sum(1)
    return out.double()


class Grams(Side):
    """Gram matrices of centred unit rows, and their `norm` [L]. Features are centred first, which keeps the digits at a
    mean cosine of .99; the matrices are held in float32 where they fit, else made again in blocks. unbiased: U-centred
    (Szekely & Rizzo 2014, eq. 3.1), HSIC of Song et al. 2012, eq. 4, is then a plain inner product. centred=False:
    matrices of cosines, for a metric of one's own."""

    def __init__(self, layers, k=None, unbiased=False, centred=True):
        self.n, self.n_layers, self.unbiased, self.gram = len(layers[0]), len(layers), unbiased, None
        self.features = [(centred_rows if centred else unit_rows)(x) for x in grouped_layers(layers)]
        if 4 * len(layers) * self.n**2 <= KEPT_BYTES:
            self.gram = self.make(slice(0, self.n))
            self.norm = torch.linalg.vector_norm(self.gram, dim=2).double().square().sum(1).sqrt()
        else:
            self.norm = gram_products(self, self).diagonal().sqrt()

    def make(self, rows):
        """Rows of the matrices, [L, rows, N] float32, from the features."""
        n, out = self.n, self.features[0].new_empty(self.n_layers, rows.stop - rows.start, self.n)
        for gram, x in zip(out.split([x.shape[:-2].numel() for x in self.features]), self.features, strict=True):
            gram.copy_(products(x, rows))
            if self.unbiased:  # columns of x sum to 0: without its diagonal row i of the Gram sums to -own[i]
                own = x.square().sum(-1, keepdim=True)
                gram += (own[..., rows, :] + own.mT) / (n - 2) - own.sum(-2, keepdim=True) / ((n - 1) * (n - 2))
                gram.diagonal(rows.start, 1, 2).zero_()
        return out

    def block(self, rows):
        """The same in float64."""
        return (self.make(rows) if self.gram is None else self.gram[:, rows]).double()

    def permuted(self, orders):
        side, n_orders = copy.copy(self), len(orders)
        side.n_layers, side.norm = n_orders * self.n_layers, self.norm.repeat_interleave(n_orders)
        if self.gram is None:
            side.features = [x[..., orders, :].flatten(0, -3) for x in self.features]
        else:
            places = (self.n * orders[:, :, None] + orders[:, None]).flatten()  # in one go, which is the fastest
            side.gram = self.gram.flatten(1).index_select(1, places).view(-1, self.n, self.n)
        return side

    def kept(self):
        side = copy.copy(self)
        if 8 * self.n_layers * self.n**2 <= KEPT_BYTES // 4:
            side.gram = self.gram.double()
        return side


def centred_rows(x):
    """Unit rows of x [.., N, D] less their mean, float32, scaled to a total square of 1."""
    x = unit_rows(x)
    for _ in range(2):  # the first mean is rounded
        x = x - x.mean(-2, keepdim=True, dtype=torch.float64).to(x.dtype)
    return (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-30)).float()


def gram_products(a, b):
    """<K, L> [La, Lb] float64 over all pairs of Gram matrices, in blocks of rows."""
    total, size = 0, max(1, BLOCK_BYTES // (16 * a.n * (a.n_layers + b.n_layers)))
    for rows in common.row_blocks(slice(0, a.n), size):
        total = total + a.block(rows).flatten(1) @ b.block(rows).flatten(1).T
    return total


def cka_scores(a, b):
    """Linear CKA (Kornblith et al. 2019, eq. 1). cka: in [0, 1], biased, chance about [(1 + N / Da)(1 + N / Db)]^-1/2.
    unbiased_cka: with the unbiased HSIC (Song et al. 2012, eq. 4), at most 1, chance 0, can be negative."""
    return gram_products(a, b) / (a.norm[:, None] * b.norm).clamp(min=1e-300)


class MutualNeighbours(Neighbours):
    """Neighbours with `mutual` [L, N, k], whether the row is among its neighbour's own, and `own` [L], the HSIC of each
    layer with itself."""

    by_layer = ("near", "cosines", "mutual", "own")

    def __init__(self, layers, k):
        super().__init__(layers, k)
        rows = torch.arange(self.n, device=self.near.device)[:, None, None]
        self.mutual = torch.stack([(near[near] == rows).any(2) for near in self.near])
        self.own = torch.stack([masked_hsic(self, i, self)[i] for i in range(len(layers))])


def masked_hsic(a, layer, b):
    """HSIC_u [Lb] of one layer of a with every layer of b: both Grams zeroed but for the (i, j) where j is a neighbour
    of i in both."""
    n = a.n
    same = a.near[layer][:, :, None] == b.near[:, :, None, :]  # [Lb, N, k, k]
    of_a = a.cosines[layer] * same.any(3)  # [Lb, N, k]
    of_b = (same * b.cosines[:, :, None, :]).sum(3)  # at the neighbours of a
    both = (same & b.mutual[:, :, None, :]).any(3) & a.mutual[layer]
    index = a.near[layer].flatten().expand(len(of_a), -1)
    columns = torch.zeros(len(of_a), n, dtype=of_a.dtype, device=of_a.device).scatter_add(1, index, of_a.flatten(1))
    trace = (of_a * of_b * both).sum((1, 2))
    sums = of_a.sum((1, 2)) * of_b.sum((1, 2))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * (columns * of_b.sum(2)).sum(1) / (n - 2)) / (n * (n - 3))


def cknna_scores(a, b):
    """Unbiased CKA with both Grams restricted to pairs that are neighbours of each other in a and in b (Huh et al.
    2024, appendix A, in the trace form tr(KL)); 1 of a with itself, chance about 0, 0 where such pairs are too few."""
    own = a.own[:, None] * b.own  # of one sign, or too few mutual neighbours for a score: 0
    crossed = torch.stack([masked_hsic(a, i, b) for i in range(len(a.near))])
    return crossed / own.sqrt().nan_to_num(0).clamp(min=1e-300) * (own > 1e-30)


class Directions(Side):
    """The first 10 left singular `vectors` [L, N, 10] of each layer: rows at unit length, columns standardised."""

    by_layer = ("vectors",)

    def __init__(self, layers, k=None):
        self.n, self.vectors = len(layers[0]), torch.stack([left_singular_vectors(centred_rows(x)) for x in layers])


def left_singular_vectors(x, n_vectors=10):
    """Those of x [N, D] with its columns at unit length, [N, n_vectors] float64; zeros beyond its rank.

    Block Krylov iteration on the smaller Gram matrix with Rayleigh-Ritz (Musco & Musco 2015, arXiv 1504.05477) to a
    residual of 1e-10; a full eigendecomposition, three times as slow, where that has not converged.
    """
    x = x.double()
    norms = x.square().sum(0).sqrt()
    x = x / torch.maximum(norms, 1e-12 * norms.max()).clamp(min=1e-300)  # constant columns stay 0
    is_wide, wanted = len(x) <= x.shape[1], min(n_vectors, *x.shape)
    gram = x @ x.T if is_wide else x.T @ x  # [m, m]
    m = len(gram)
    start = torch.randn(min(m, wanted + 10), m, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    block = start.to(x.device) @ gram
    basis, applied = gram.new_empty(0, m), gram.new_empty(0, m)  # rows: orthonormal vectors v, and v G
    for _ in range(12):
        for _ in range(2):
            block = torch.linalg.qr((block - block @ basis.T @ basis).T).Q.T
        block = block[:m - len(basis)]
        basis, applied = torch.cat([basis, block]), torch.cat([applied, block @ gram])
        values, ritz = (part.flip(-1)[..., :wanted] for part in torch.linalg.eigh(applied @ basis.T))
        vectors = ritz.T @ basis
        residual = (ritz.T @ applied - values[:, None] * vectors).norm(dim=1).max()
        if len(basis) == m or residual <= 1e-10 * values[0]:
            break
        block = applied[-len(block):]
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0)[:wanted], vectors.T.flip(0)[:wanted]
    vectors = vectors * (values > 1e-12 * values[0])[:, None]
    left = vectors.T if is_wide else F.normalize(x @ vectors.T, dim=0, eps=1e-300)
    return F.pad(left, (0, n_vectors - wanted))


def svcca_scores(a, b):
    """Mean canonical correlation, in [0, 1], of the first 10 singular directions (Raghu et al. 2017)."""
    u, v = a.vectors, b.vectors
    ranks = torch.minimum((u != 0).any(1).sum(1)[:, None], (v != 0).any(1).sum(1))
    correlations = torch.linalg.svdvals(torch.einsum("anr,bns->abrs", u, v).cpu())
    return correlations.sum(2).to(u.device) / ranks.clamp(min=1)


SIDES_AND_SCORES = {
    "mutual_knn": (Neighbours, mutual_knn_scores), "cycle_knn": (Neighbours, cycle_knn_scores),
    "lcs_knn": (Neighbours, lcs_knn_scores), "edit_distance_knn": (Neighbours, edit_distance_knn_scores),
    "cka": (Grams, cka_scores), "unbiased_cka": (functools.partial(Grams, unbiased=True), cka_scores),
    "cknna": (MutualNeighbours, cknna_scores), "svcca": (Directions, svcca_scores)}


def prepare(stack, metric, k=10):
    """What a metric needs of a stack, a Side; of a Side itself. Raises: UserError."""
    if isinstance(stack, Side):
        return stack
    if not callable(metric) and metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    layers = as_layers(stack)
    n = len(layers[0])
    if n < 4 or (metric in KNN_METRICS and not 1 <= k < n):
        raise UserError(f"{metric} needs more than k = {k} and at least 4 rows, found {n}")
    return Grams(layers, centred=False) if callable(metric) else SIDES_AND_SCORES[metric][0](layers, k)


def alignment_matrix(stack_a, stack_b, metric, k=10):
    """Scores of all layer pairs, [La, Lb] float64, of two stacks of the same N items in the same order.

    metric: one of METRICS, each defined at its function `.._scores`, or metric(gram_a, gram_b) -> number of two
    matrices of cosines [N, N]. Rows are normalised inside. A stack may be `prepare`d.
    Raises: UserError for an unknown metric, N <= k, N < 4, different N, non-finite features.
    """
    a, b = prepare(stack_a, metric, k), prepare(stack_b, metric, k)
    if a.n != b.n:
        raise UserError(f"the two sides have {a.n} and {b.n} items; they must be the same items in the same order")
    if callable(metric):
        grams_a, grams_b = a.block(slice(0, a.n)), b.block(slice(0, b.n))
        return grams_a.new_tensor([[float(metric(x, y)) for y in grams_b] for x in grams_a])
    return SIDES_AND_SCORES[metric][1](a, b)


def highest(metric, k):
    """The largest score of a metric: that of lcs_knn counts items, those of the others are shares or correlations."""
    return k if metric == "lcs_knn" else 1


def of_two_layers(metric):
    """A metric as a function of one layer a side: metric(a [N, Da], b [N, Db], k=10) -> float."""
    def metric_of(a, b, k=10):
        return alignment_matrix(a, b, metric, k).item()
    metric_of.__doc__ = SIDES_AND_SCORES[metric][1].__doc__
    return metric_of


mutual_knn, cycle_knn, lcs_knn, edit_distance_knn, cka, unbiased_cka, cknna, svcca = map(of_two_layers, METRICS)


# --------------------------------------------------------------------------------------------------- null, intervals

def calibrate(score, null, alpha=0.05):
    """A score against its null [K]: p = (1 + #null >= score) / (K + 1); threshold tau = the ceil((1 - alpha)(K + 1))-th
    smallest of null and score together; calibrated = max(0, (score - tau) / (1 - tau)). Returns: dict of floats."""
    place = math.ceil(round((1 - alpha) * (len(null) + 1), 6))  # rounded: .3 * 10 must not be 3.0000000000000004
    tau = float(np.sort(np.append(null, score))[max(place, 1) - 1])
    return {"score": float(score), "p_value": float((1 + (null >= score).sum()) / (len(null) + 1)), "threshold": tau,
            "calibrated": max(0.0, (float(score) - tau) / (1 - tau)) if tau < 1 else 0.0,
            "null_mean": float(null.mean())}


def permutation_null(stack_a, stack_b, metric, k=10, n_permutations=200, seed=0, alpha=0.05):
    """The best layer pair of two stacks against the permutation null of that maximum (Westfall & Young 1993): b's items
    are permuted by successive draws of RandomState(seed).permutation(N), one for all layers.

    Arguments and errors as of `alignment_matrix`. Returns: `calibrate`'s dict, with `layers` (of a, of b) of the best
    pair, `matrix` of scores [La, Lb], and `null` [K]; lcs_knn is divided by k, so that 1 is its largest value, too.
    """
    a, b, unit = prepare(stack_a, metric, k), prepare(stack_b, metric, k).kept(), highest(metric, k)
    matrix = alignment_matrix(a, b, metric) / unit
    draws, null = np.random.RandomState(seed), matrix.new_empty(n_permutations)  # kept ones would split the heap
    size = LAUNCH_BYTES[matrix.device.type] // (8 * len(matrix) * a.n * (k if metric in KNN_METRICS else a.n))
    for part in common.row_blocks(slice(0, n_permutations), max(1, size)):
        permutations = np.stack([draws.permutation(a.n) for _ in range(part.start, part.stop)])  # [B, N]
        orders = torch.from_numpy(permutations).to(matrix.device).argsort()  # inverse, of a: the same pairs
        scores = alignment_matrix(a.permuted(orders), b, metric).unflatten(0, (-1, len(orders)))  # [La, B, Lb]
        null[part] = scores.amax((0, 2)) / unit
    matrix, null = matrix.cpu(), null.cpu().numpy()
    best = divmod(int(matrix.argmax()), matrix.shape[1])
    return {**calibrate(matrix.max().item(), null, alpha), "layers": list(best), "matrix": matrix.tolist(),
            "null": null.tolist()}


def part_scores(stack_a, stack_b, metric, k=10, seed=0):
    """Best layer pairs' scores in random disjoint halves [16, 2] and quarters [8, 4] of the items, for `interval`.

    k shrinks with the part, so that the share of neighbours stays. None if a quarter is too small for the metric.
    """
    a, b = as_layers(stack_a), as_layers(stack_b)
    n, draws, found = len(a[0]), np.random.RandomState(seed), []
    for n_parts, n_splits in ((2, 16), (4, 8)):
        k_part, values = max(1, round(k / n_parts)), np.empty((n_splits, n_parts))
        if n // n_parts <= max(3, k_part):
            return None
        for row in values:
            for part, rows in enumerate(np.array_split(draws.permutation(n), n_parts)):
                rows = torch.from_numpy(rows).to(a[0].device)
                matrix = alignment_matrix([x[rows] for x in a], [x[rows] for x in b], metric, k_part)
                row[part] = matrix.max().item() / highest(metric, k_part)
        found.append(values)
    return found


def interval(column, score, parts):
    """{column low, column high}: 95% interval of the best layer pair's score from its `part_scores`; {} without them.

    Disjoint parts are independent samples, so the variance between them is that of the score of fewer items, V(N/2) and
    V(N/4), whatever the metric and the choice of layers; a jackknife's is up to 3 times too large, and rows drawn twice
    would be neighbours of themselves. V(N) is extrapolated as a / N + b / N^2.
    """
    if parts is None:
        return {}
    halves, quarters = (values.var(axis=1, ddof=1).mean() for values in parts)
    variance = min(max(0.75 * halves - quarters / 8, halves / 4), halves / 2)  # from all b / N^2 to all a / N
    margin = 2.45 * math.sqrt(variance)  # Student's t: the estimate is worth six degrees of freedom or so
    return {f"{column} low": float(score - margin), f"{column} high": float(score + margin)}


# --------------------------------------------------------------------------------------------------------- statistics

def ranks(values):
    """Ranks from 1, equal values sharing their mean rank."""
    values = np.asarray(values, dtype=float)
    return np.array([((values < v).sum() + (values <= v).sum() + 1) / 2 for v in values])


def student_tail(dof):
    """(angles [M], their two-sided p [M]) of Student's t = sqrt(dof) tan(angle), whose density is cos(angle)^(dof - 1);
    the angle of a correlation is its arc sine."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    beyond = (np.cos(angles) ** (dof - 1))[::-1].cumsum()[::-1]
    return angles, beyond / beyond[0]


def correlation_p(r, n):
    """Two-sided p of a correlation of n pairs, by Student's t."""
    angles, p = student_tail(n - 2)
    return float(p[np.searchsorted(angles, math.asin(min(abs(r), 1.0)))])


@functools.lru_cache(maxsize=256)
def rank_sum_counts(x, y):
    """How many permutations p give each value of sum x_i y_p(i) (whole numbers, x and y sorted): exact, by recursion
    over the subsets of y used."""
    size = int(np.dot(x, y)) + 1
    level = {0: np.eye(1, size, dtype=np.int64)[0]}
    for value in x:
        following = {}
        for used, counts in level.items():
            for j, other in enumerate(y):
                if not used >> j & 1:
                    total = following.setdefault(used | 1 << j, np.zeros(size, dtype=np.int64))
                    total[value * other:] += counts[:size - value * other]
        level = following
    return next(iter(level.values()))


def spearman(x, y):
    """Spearman's rho with its two-sided p over n pairs: exact by permutation up to n = 12, then by Student's t.

    Returns: dict n, rho, p; rho and p are nan for n < 3 or when one side is constant.
    """
    n, rx, ry = len(x), ranks(x), ranks(y)
    if n < 3 or rx.std() == 0 or ry.std() == 0:
        return {"n": n, "rho": math.nan, "p": math.nan}
    rho = float(np.corrcoef(rx, ry)[0, 1])
    if n > 12:
        return {"n": n, "rho": rho, "p": correlation_p(rho, n)}
    whole_x, whole_y = (2 * rx).astype(int), (2 * ry).astype(int)  # mean ranks may be halves
    counts = rank_sum_counts(tuple(sorted(whole_x.tolist())), tuple(sorted(whole_y.tolist())))
    middle = whole_x.sum() * whole_y.sum() / n
    extreme = np.abs(np.arange(len(counts)) - middle) >= abs((whole_x * whole_y).sum() - middle) - 1e-6
    return {"n": n, "rho": rho, "p": float(counts[extreme].sum() / counts.sum())}


def slope(x, y):
    """Least-squares slope of y on x with its two-sided p (Student's t); nan for n < 3 or constant x."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0:
        return {"slope": math.nan, "slope p": math.nan}
    if np.ptp(y) == 0:
        return {"slope": 0.0, "slope p": 1.0}
    r = np.corrcoef(x, y)[0, 1]
    return {"slope": float(r * y.std() / x.std()), "slope p": correlation_p(r, len(x))}


def benjamini_hochberg(p_values):
    """q-values of the false discovery rate (Benjamini & Hochberg 1995); nan stays nan and is not counted."""
    p = np.asarray(p_values, dtype=float)
    q, defined = np.full(len(p), math.nan), np.flatnonzero(np.isfinite(p))
    order = defined[np.argsort(p[defined])]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1) if len(order) else []
    return q.tolist()


def grouped(rows, *keys):
    """{(values of the keys): [rows]}, in order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean_of(rows, *keys):
    """Mean of rows[..][key][key].."""
    return float(np.mean([functools.reduce(operator.getitem, keys, row) for row in rows]))


def line(rows, x, *keys):
    """A curve of common.plot_lines: the mean of rows[..][key].. at every value of column x."""
    groups = grouped(rows, x)
    return {"x": [value for value, in groups], "y": [mean_of(part, *keys) for part in groups.values()]}


def cells(name, curve):
    """A curve as a row of a table."""
    return {f"{name} = {x}": y for x, y in zip(curve["x"], curve["y"], strict=True)}


def stated(c):
    """A correlation in the words of a picture."""
    return f"rho {c['rho']:+.2f}, n = {c['n']}, p = {c['p']:.2g}"


def null_columns(metric, rows):
    """A table's columns: the means over rows of the numbers of `permutation_null`."""
    return {metric: mean_of(rows, metric, "score"), f"{metric} chance": mean_of(rows, metric, "null_mean"),
            f"{metric} calibrated": mean_of(rows, metric, "calibrated")}


# ------------------------------------------------------------------------------------- train: a stage's models are jobs

@dataclass
class Data:
    """What a stage works on, its files, films or settings as `source`. Of one that trains, `jobs` tell its models
    apart, and `tensors` [n, ...] and `splits` (train | val | test -> rows) are those of the selected `job`."""
    stage: str
    source: object
    fingerprint: str
    synthetic: bool
    jobs: list = field(default_factory=list)
    select_job: object = None  # job -> (tensors, splits)
    job: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    splits: dict = field(default_factory=dict)


def select(data, job=None):
    """The same data with the tensors and splits of a job (default: the last)."""
    job = job or data.jobs[-1]
    tensors, splits = data.select_job(job)
    return dataclasses.replace(data, job=job, tensors=tensors, splits=splits)


def title_of(data, job):
    """A job's name, without a comma: it is a cell of metrics.csv."""
    return " ".join([data.stage, *(f"{key}={value}" for key, value in job.items())])


def make_batch(data, indices, labelled=None):
    """{name: rows of each tensor of the job}; finetune's classifier has the films `labelled` (default: the same)."""
    batch = {name: values[indices] for name, values in data.tensors.items()}
    if data.stage == "finetune":
        labelled = indices if labelled is None else labelled
        batch |= {"labelled_text": data.tensors["text"][labelled], "labels": data.tensors["labels"][labelled]}
    return batch


def steps_per_epoch(cfg, data):
    return max(1, len(data.splits["train"]) // getattr(cfg, data.stage).batch_size)


def total_steps(cfg, data):
    """Optimisation steps of the selected job."""
    return getattr(cfg, data.stage).epochs * steps_per_epoch(cfg, data)


def epoch_batches(cfg, data, epoch):
    """[(rows, labelled films or None)] of an epoch: a pure function of seed and epoch, sizes equal, the remainder
    spread. Labelled films are drawn in rounds of their own."""
    n_batches, rows, labelled = steps_per_epoch(cfg, data), data.splits["train"], data.splits.get("labelled")
    g = torch.Generator().manual_seed(1000003 * data.job.get("seed", cfg.seed) + epoch)
    pairs = rows[torch.randperm(len(rows), generator=g).to(rows.device)].tensor_split(n_batches)
    if labelled is None:
        return [(part, None) for part in pairs]
    size = min(getattr(cfg, data.stage).batch_size, len(labelled))
    rounds = [torch.randperm(len(labelled), generator=g) for _ in range(math.ceil(n_batches * size / len(labelled)))]
    order = torch.cat(rounds)[:n_batches * size].to(rows.device)
    return list(zip(pairs, labelled[order].split(size), strict=True))


def build_model(cfg, data):
    """The model of the selected job, on its device: `losses(batch)`, `make_optimizer(cfg)`, `score(data, split)`."""
    x, train = data.tensors, data.splits["train"]
    if data.stage == "synthetic":
        model = Encoders(x["inputs"].shape[1], data.job["depth"])
    elif data.stage == "mmimdb":
        model = Probes(x["features"].shape[1], x["labels"][train])
    else:
        model = TwoTower(x["image"].shape[1], x["text"].shape[1], cfg.finetune, data.job["weight"])
    return model.to(train.device)


def build_optimizer(cfg, model):
    """Adam or AdamW, with the groups that the model asks for."""
    return model.make_optimizer(cfg)


def train_step(model, batch, optimizer):
    """One step; returns the losses, a dict of 0-d tensors."""
    losses = model.losses(batch)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def train_job(cfg, data):
    """(state of the best epoch by validation, a row an epoch) of the selected job: a pure function of its seed.

    `score` gives one number a model, or [E] of E encoders at once, which lead in every parameter.
    """
    common.seed_everything(data.job.get("seed", cfg.seed))
    model, n_batches, title = build_model(cfg, data), steps_per_epoch(cfg, data), title_of(data, data.job)
    optimizer = build_optimizer(cfg, model)
    take_step = common.GraphedStep(train_step, model, optimizer, cfg.cuda_graphs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: model.schedule((step + 1) / n_batches))
    best, best_score, rows = copy.deepcopy(model.state_dict()), torch.tensor(-math.inf), []
    for epoch in range(1, getattr(cfg, data.stage).epochs + 1):
        losses = []
        for batch in epoch_batches(cfg, data, epoch - 1):
            losses.append(take_step(make_batch(data, *batch))["loss"])
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
        losses, score = torch.stack(losses).tolist(), model.score(data, "val")
        bad = [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
        if bad or not torch.isfinite(score).all():
            raise FloatingPointError(f"non-finite loss or prediction in {title}, epoch {epoch}, step "
                                     f"{(*bad, n_batches)[0]}; lower the learning rate of {data.stage}, {rate:g}")
        better = score > best_score
        best_score = torch.where(better, score, best_score)
        for name, x in model.state_dict().items():
            is_better = better.to(x.device).reshape(better.shape + (1,) * (x.ndim - better.ndim))
            best[name] = torch.where(is_better, x, best[name])
        rows.append({"stage": data.stage, "job": title, "epoch": epoch, "loss": sum(losses) / len(losses),
                     "val_score": score.double().mean().item(), "learning_rate": rate, **model.health()})
    print(f"{title}: {epoch} epochs, best validation score {best_score.double().mean().item():.3f}", flush=True)
    return best, rows


def collect_models(cfg, *data):
    """([(data, job)], a ModuleList of their models) of the jobs of all stages, as in checkpoints."""
    jobs = [(d, job) for d in data for job in d.jobs]
    return jobs, nn.ModuleList(build_model(cfg, select(d, job)) for d, job in jobs)


def train(cfg, *data):
    """Train every job of the stages' data in turn; a step of the run is a job, and the rows of metrics.csv, which are
    returned, are its epochs. A job takes seconds to minutes: one that a kill cuts short is done again."""
    folder = common.open_run(cfg, joint_fingerprint(data))
    jobs, models = collect_models(cfg, *data)
    with common.Run(folder, cfg, models, None) as run:
        for step in run.steps(len(jobs)):
            d, job = jobs[step - 1]
            best, rows = train_job(cfg, select(d, job))
            models[step - 1].load_state_dict(best)
            *others, last = ({"step": step, **row} for row in rows)
            run.history += others
            run.log(last, score=step)  # later is better: best_model.pt has the models of all jobs so far
    return run.history


def joint_fingerprint(data):
    return "-".join(dict.fromkeys(d.fingerprint for d in data))


class JobModel(nn.Module):
    """A job's model: the factor of its learning rates after so many epochs, and its columns of metrics.csv."""

    def schedule(self, epoch):
        return 1.0

    def health(self):
        return {}


# ---------------------------------------------------------------------------------------------------------- synthetic

N_ALIGNED = 512  # test samples that alignment is measured on


def label_distribution(seed=2, temperature=0.05):
    """p(y | 8 bits) [256, 4] float64, row r the bits of r (first bit highest): softmax of bits @ W / T, W [8, 4]
    uniform in (0, 1) with unit rows, rescaled until every class mean is within .01 of 1/4."""
    weights = np.random.RandomState(seed).uniform(0, 1, (8, 4))
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    logits = np.array(list(itertools.product([0, 1], repeat=8))) @ weights / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    while not np.allclose(p.mean(0), 0.25, atol=0.01):
        p *= 0.25 / p.mean(0)
        p /= p.sum(1, keepdims=True)
    return p


def side_bits(uniqueness):
    """Which of the label's 8 bits x1 and x2 see: 8 - U shared ones, then U // 2 of x1's own, the rest of x2's."""
    shared, own = list(range(8 - uniqueness)), list(range(8 - uniqueness, 8))
    return shared + own[:uniqueness // 2], shared + own[uniqueness // 2:]


def label_information(p, bits):
    """I(bits; y) in nats, of uniform bits and the label distribution p [256, 4]; bits: which of the 8 are seen."""
    seen = (np.arange(256)[:, None] >> (7 - np.array(bits)) & 1) @ (1 << np.arange(len(bits)))
    joint = np.stack([p[seen == value].sum(0) for value in range(1 << len(bits))]) / 256  # [2^bits, 4]
    return float((joint * np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0)))).sum())


def z_scored(x, rows):
    """x [n, D] standardised with the statistics of some of its rows."""
    return (x - x[rows].mean(0)) / x[rows].std(0).clamp(min=1e-6)


def draw_synthetic(s, seed):
    """x1, {D: x2} [n, 12] float32 standardised with the training split's statistics, labels {U: [n] int64}, and the
    splits {name: rows}."""
    g = torch.Generator().manual_seed(seed)
    common_bits, own_1, own_2 = (torch.randint(2, (s.n_samples, width), generator=g) for width in (8, 4, 4))
    n_train, n_val = int(0.7 * s.n_samples), int(0.15 * s.n_samples)
    parts = torch.arange(s.n_samples).split([n_train, n_val, s.n_samples - n_train - n_val])
    splits = dict(zip(("train", "val", "test"), parts, strict=True))
    p, labels = torch.from_numpy(label_distribution()), {}
    for u in s.uniqueness:
        bits = torch.cat([common_bits[:, :8 - u], own_1[:, :u // 2], own_2[:, :u - u // 2]], dim=1)  # [n, 8]
        labels[u] = torch.multinomial(p[bits @ (1 << torch.arange(7, -1, -1))], 1, generator=g)[:, 0]

    def linear(x):  # nn.Linear's default initialisation
        weight, bias = ((2 * torch.rand(shape, generator=g) - 1) / 12**0.5 for shape in ((12, 12), (12,)))
        return x @ weight + bias

    x, transformed = linear(torch.cat([common_bits, own_2], dim=1).float()), {}
    for depth in range(1, max(s.transform_depths) + 1):
        x = linear(torch.tanh(x))
        if depth in s.transform_depths:
            transformed[depth] = z_scored(x, splits["train"])
    return z_scored(torch.cat([common_bits, own_1], dim=1).float(), splits["train"]), transformed, labels, splits


def encoder_grid(s, side):
    """[(U, D)] of the encoders that a job of this side trains at once; D is None for x1's."""
    return list(itertools.product(s.uniqueness, s.transform_depths if side == "x2" else [None]))


def load_synthetic(cfg, stage="synthetic"):
    """Data of the controlled experiment; a job's encoders are of one seed, side and depth. Raises: UserError."""
    s, device = cfg.synthetic, common.pick_device(cfg.device)
    if min(*s.transform_depths, *s.x1_depths, *s.x2_depths) < 1 or not all(0 <= u <= 8 for u in s.uniqueness):
        raise UserError("synthetic: uniqueness takes numbers from 0 to 8, transform_depths and the others from 1")
    draw = functools.lru_cache(maxsize=1)(lambda seed: draw_synthetic(s, seed))  # one draw is held at a time

    def select_job(job):
        x1, x2, labels, splits = draw(job["seed"])
        grid = encoder_grid(s, job["side"])
        inputs = torch.stack([x2[depth] if depth else x1 for _, depth in grid], dim=1)  # [n, E, 12]
        labels = torch.stack([labels[u] for u, _ in grid], dim=1)  # [n, E]
        return ({"inputs": inputs.to(device), "labels": labels.to(device)},
                {name: rows.to(device) for name, rows in splits.items()})
    sides = [*(("x1", depth) for depth in s.x1_depths), *(("x2", depth) for depth in s.x2_depths)]
    jobs = [{"seed": seed, "side": side, "depth": depth}
            for seed in range(cfg.seed, cfg.seed + s.n_seeds) for side, depth in sides]
    return select(Data(stage, s, common.fingerprint([]), True, jobs, select_job))


class Encoders(JobModel):
    """E independent MLPs of one depth, trained at once: `depth` blocks Linear(12), LeakyReLU(.01), then Linear(4).
    Inputs [B, E, 12]."""

    def __init__(self, n_encoders, depth, width=12, n_classes=4):
        super().__init__()

        def drawn(*shape):  # nn.Linear's default initialisation
            return nn.Parameter(torch.empty(n_encoders, *shape).uniform_(-width**-0.5, width**-0.5))
        self.weight, self.bias = drawn(depth, width, width), drawn(depth, 1, width)
        self.head_weight, self.head_bias = drawn(width, n_classes), drawn(1, n_classes)

    def forward(self, inputs):
        """(logits [E, B, 4], hidden layers, a list of [E, B, 12])."""
        x, hidden = inputs.transpose(0, 1), []
        for weight, bias in zip(self.weight.unbind(1), self.bias.unbind(1), strict=True):
            x = F.leaky_relu(torch.baddbmm(bias, x, weight), 0.01)
            hidden.append(x)
        return torch.baddbmm(self.head_bias, x, self.head_weight), hidden

    def losses(self, batch):
        logits, _ = self(batch["inputs"])
        # of two dimensions, which a GPU adds up in a fixed order
        total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].T.flatten(), reduction="sum")
        return {"loss": total / len(batch["labels"])}  # the sum of the E mean losses

    def make_optimizer(self, cfg):
        return torch.optim.Adam(self.parameters(), lr=5e-3, fused=self.weight.is_cuda)

    @torch.no_grad()
    def score(self, data, split):
        """Accuracy of each encoder, [E]."""
        hits = [(self(data.tensors["inputs"][rows])[0].argmax(2) == data.tensors["labels"][rows].T).sum(1)
                for rows in data.splits[split].split(8192)]
        return sum(hits) / len(data.splits[split])


@torch.no_grad()
def evaluate_synthetic(cfg, data, models):
    """Alignment of x1's encoders with x2's on one test batch, and accuracies, against U."""
    s, a, rows, sides = cfg.synthetic, cfg.alignment, [], {}  # (seed, side, U) -> [a dict of each encoder]
    for job, model in zip(data.jobs, models, strict=True):
        data = select(data, job)
        accuracy = model.score(data, "test").tolist()
        hidden = torch.stack(model(data.tensors["inputs"][data.splits["test"][:N_ALIGNED]])[1])  # [L, E, N, 12]
        for e, (u, depth) in enumerate(encoder_grid(s, job["side"])):
            sides.setdefault((job["seed"], job["side"], u), []).append(
                {"D": depth, "depth": job["depth"], "accuracy": accuracy[e], "stack": hidden[:, e].transpose(0, 1)})
    pairs = [(seed, u, x, y) for (seed, side, u), encoders in sides.items() if side == "x1"
             for x, y in itertools.product(encoders, sides[seed, "x2", u])]
    for seed, u, x, y in common.progress(pairs, "alignment"):
        scores = {metric: permutation_null(x["stack"], y["stack"], metric, s.k, a.n_permutations, cfg.seed)
                  for metric in a.metrics}
        rows.append({"seed": seed, "U": u, "D": y["D"], "x2_depth": y["depth"], "accuracy x1": x["accuracy"],
                     "accuracy x2": y["accuracy"], **scores})
    table, correlations, curves, p, folder = {}, {}, {}, label_distribution(), Path(cfg.output_dir)
    for (depth, u), part in sorted(grouped(rows, "D", "U").items()):
        row = table[f"D = {depth}, U = {u}"] = {"n": len(part)}
        for metric in a.metrics:
            row |= null_columns(metric, part)
        row |= {key: mean_of(part, key) for key in ("accuracy x1", "accuracy x2")}
    for metric in a.metrics:
        panels, performance = {}, {}
        for (depth,), part in grouped(rows, "D").items():
            rho = correlations[f"{metric}: U, alignment; D = {depth}"] = correlation_over_seeds(part, metric)
            lines = {f"x2's encoder: {layers} layers": line(of_depth, "U", metric, "score")
                     for (layers,), of_depth in grouped(part, "x2_depth").items()}
            lines["chance"] = line(part, "U", metric, "null_mean")
            panels[f"D = {depth}: {stated(rho)}"] = {"xlabel": "unique bits U", "lines": lines}
            curves[f"{metric}, D = {depth}"] = panels[f"D = {depth}: {stated(rho)}"]
        for (u,), part in grouped(rows, "U").items():
            points = [(r[metric]["score"], r["accuracy x2"]) for r in part]
            rho = correlations[f"{metric}: alignment, accuracy of x2; U = {u}"] = spearman(*zip(*points, strict=True))
            x, y = map(list, zip(*sorted(points, key=operator.itemgetter(0)), strict=True))
            performance[f"accuracy of x2, U = {u}: {stated(rho)}"] = {
                "xlabel": f"alignment ({metric})", "lines": {"encoders of x2": {"x": x, "y": y}}}
        common.plot_lines(folder / f"alignment_vs_uniqueness_{metric}.png", panels, f"alignment ({metric})", True)
        common.plot_lines(folder / f"alignment_vs_performance_{metric}.png", performance, "performance", True)
    information = {f"U = {u}": {f"I(x{i}; y)": label_information(p, bits) for i, bits in enumerate(side_bits(u), 1)}
                   for u in s.uniqueness}
    information["x1 and x2"] = {"I(x1, x2; y)": label_information(p, range(8))}
    return {"headline": f"synthetic: encoders of x1 and x2, {s.n_seeds} seeds, {N_ALIGNED} test samples, k = {s.k}",
            "tables": {"alignment against uniqueness U": table, "rank correlation": correlations,
                       "information of the label (nats)": information}, "curves": curves,
            "notes": ["Means over seeds and encoders; chance: mean of the permutation null. mean rho: of the seeds' "
                      "own rhos of U, with Student's 95% interval; monotone: in how many of them alignment falls "
                      "at every step of U."]}


def correlation_over_seeds(rows, metric):
    """Rank correlation of U with alignment: n, rho and p of all points (each the mean over the encoders of a draw,
    which share data and transform), and the mean of the seeds' own rhos with its interval."""
    curves = [line(part, "U", metric, "score") for part in grouped(rows, "seed").values()]
    points = [point for c in curves for point in zip(c["x"], c["y"], strict=True)]
    of_seeds = [spearman(c["x"], c["y"])["rho"] for c in curves]
    row = {**spearman(*zip(*points, strict=True)), "seeds": len(curves)}
    row["monotone"] = sum(bool((np.diff(c["y"]) < 0).all()) for c in curves)
    if len(curves) > 1:
        angles, p = student_tail(len(curves) - 1)
        t = math.sqrt(len(curves) - 1) * math.tan(angles[np.argmax(p <= 0.05)])
        margin, mean = t * np.std(of_seeds, ddof=1) / math.sqrt(len(curves)), float(np.mean(of_seeds))
        row |= {"mean rho": mean, "mean rho low": max(-1.0, mean - margin), "mean rho high": min(1.0, mean + margin)}
    return row


# ---------------------------------------------------------------------------- align, uniqueness, n_sweep: feature files

@dataclass
class Features:
    """One model's features of N items."""
    model: str
    layers: list  # of [N, D_l] float tensors
    ids: list | None = None  # [N] strings; None if the file does not say
    bpb: float | None = None  # a language model's bits per byte on the captions
    family: str = ""  # what models of several sizes share
    path: str = ""
    clamp: bool = True  # whether outliers are clamped for alignment; not of hashed TF-IDF, which is mostly zeros


def read_features(path, device="cpu", pool=""):
    """Features of one .pt file; None if the file says that it was pooled otherwise.

    The file holds {feats, ids[, dims, model, family, bpb, pool]} or a bare tensor; feats are [N, L, D] or a list of
    [N, D_l]. Raises: UserError naming the file.
    """
    content = common.load_tensors(path, mmap=False)
    content = content if isinstance(content, dict) else {"feats": content}
    in_name = re.search(r"pool-([a-z0-9]+)", Path(path).name)
    if pool and content.get("pool", in_name[1] if in_name else pool) != pool:
        return None
    ids, dims, bpb = (content.get(key) for key in ("ids", "dims", "bpb"))
    try:
        layers = as_layers(content.get("feats"))
        if dims is not None:
            layers = as_layers([x[:, :int(d)] for x, d in zip(layers, dims, strict=True)])
        if not all(x.is_floating_point() for x in layers):
            raise TypeError(f"feats are {layers[0].dtype}")
        if ids is not None:
            ids = [str(i.item() if isinstance(i, torch.Tensor) else i) for i in ids]
        if ids is not None and len(ids) != len(layers[0]):
            raise ValueError(f"{len(layers[0])} rows of features but {len(ids)} ids")
        if bpb is not None and not math.isfinite(bpb):
            raise ValueError(f"bpb (bits per byte) is {bpb}")
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: {error}; expected float features [N, L, D], or a list of [N, D], as feats, and if "
                        "any N ids, L dims (true widths) and a finite bpb") from None
    if ids is None:
        warnings.warn(f"{path}: has no ids; the order of its items was not checked", stacklevel=2)
    model = str(content.get("model") or Path(path).stem)
    layers = [x.float().contiguous().to(device) for x in layers]
    return Features(model, layers, ids, bpb and float(bpb), content.get("family") or family_of(model), str(path))


def family_of(model):
    """A model's name without the parts that tell its size: vit_small_patch14_dinov2 is of vit_dinov2."""
    size = r"(tiny|small|base|large|huge|giant|[tsblhg]|patch)?\d*"
    return "_".join(part for part in re.split(r"[_\-.]", model) if not re.fullmatch(size, part)) or model


def layers_to_compare(m, a):
    """A model's layers, clamped as the section `a` (AlignmentConfig) says. Raises: UserError naming the file."""
    layers = clamp_outliers(m.layers, a.clamp_quantile, a.clamp_exact, f"{m.path}: ") if m.clamp else m.layers
    constant = sum(int((x.amax(1) == x.amin(1)).sum()) for x in layers if x.shape[1] > 1)
    if constant:
        warnings.warn(f"{m.path}: {constant} constant rows (no direction to compare) over all layers, after the clamp",
                      stacklevel=2)
    return layers


def at_level(pattern, level=None):
    """A path with {BASE_DIR} from the environment and {u} (or {}) replaced by the level."""
    pattern = pattern.replace("{BASE_DIR}", os.environ.get("BASE_DIR", "{BASE_DIR}")).replace("{}", "{u}")
    return os.path.expanduser(pattern if level is None else pattern.replace("{u}", str(level)))


def caption_levels(pattern):
    """The levels u, ascending, that a path with the placeholder {u} has on disk. Raises: UserError if it has none."""
    has_levels = "{u}" in at_level(pattern)
    levels = [u for u in range(101) if has_levels and glob.glob(at_level(pattern, u), recursive=True)]
    if not levels:
        raise UserError(f"features_dir={pattern}: expected files at levels {{u}}; run encode.py alignment, or --demo")
    return levels


def feature_files(pattern, what):
    """Paths of the .pt files of a folder (searched through), file or pattern. Raises: UserError."""
    path = Path(pattern)
    files = sorted(path.rglob("*.pt") if pattern and path.is_dir() else map(Path, glob.glob(pattern, recursive=True)))
    if not files:
        raise UserError(f"{pattern or 'features_dir='}: no {what} features (.pt); run encode.py alignment, or --demo")
    return files


def load_features(cfg, stage):
    """Data of align, uniqueness (all levels) or n_sweep (the lowest); `source` is {level: (language files, vision
    files)}, the level None without a placeholder. Raises: UserError."""
    levels, vision_dir = [None], cfg.vision_dir or cfg.features_dir
    if stage == "uniqueness" or "{u}" in at_level(cfg.features_dir):
        levels = caption_levels(cfg.features_dir)[:None if stage == "uniqueness" else 1]
    source = {level: (feature_files(at_level(cfg.features_dir, level), "language"),
                      feature_files(at_level(vision_dir, level), "vision")) for level in levels}
    files = [file for sides in source.values() for side in sides for file in side]
    first = common.load_tensors(files[0])
    if stage == "n_sweep" and cfg.n_sweep.several_dir:
        files += feature_files(at_level(cfg.n_sweep.several_dir), "language")
    if cfg.captions_file:
        files.append(Path(at_level(cfg.captions_file)))
        read_captions(files[-1])
    synthetic = isinstance(first, dict) and bool(first.get("synthetic"))
    return Data(stage, source, common.fingerprint(dict.fromkeys(map(str, files))), synthetic)


def read_side(files, pool, device):
    """Features of the files that are of this pooling, each model once. Raises: UserError."""
    models = [m for m in (read_features(file, device, pool) for file in files) if m is not None]
    if not models:
        raise UserError(f"{files[0].parent}: no features of pool {pool}; correct pool_x= (language), pool_y= (vision)")
    return named_once(models)


def read_models(cfg, files):
    """(language models, vision models) as lists of Features, of the files of either side. Raises: UserError."""
    device = common.pick_device(cfg.device)
    language, vision = (read_side(*side, device) for side in zip(files, (cfg.pool_x, cfg.pool_y), strict=True))
    both = {m.path for m in language} & {m.path for m in vision}
    if both and cfg.vision_dir != cfg.features_dir:
        raise UserError(f"{min(both)} is on both sides; set vision_dir=, or pool_x= and pool_y= to tell language from "
                        "vision features (vision_dir= equal to features_dir= compares models of one modality)")
    check_same_items(language + vision)
    return language, vision


def named_once(models):
    """The same models; UserError if two have one name, by which results are told apart."""
    first = {}
    for m in models:
        if first.setdefault(m.model, m) is not m:
            raise UserError(f"{m.path}: a second model of the name {m.model} (the first is {first[m.model].path}); "
                            "name them apart under the key model, or choose one pooling with pool_x= or pool_y=")
    return models


def check_same_items(models):
    """UserError unless all Features are of the same items in the same order, as far as they carry ids."""
    first = next((m for m in models if m.ids is not None), models[0])
    for m in models:
        if len(m.layers[0]) != len(first.layers[0]):
            raise UserError(f"{m.path}: {len(m.layers[0])} items, but {first.path} has {len(first.layers[0])}")
        if m.ids not in (None, first.ids):
            what = "the same ids in another order" if sorted(m.ids) == sorted(first.ids) else "other items"
            row = next(i for i, (x, y) in enumerate(zip(m.ids, first.ids, strict=True)) if x != y)
            raise UserError(f"{m.path}: {what} than in {first.path}: row {row} is {m.ids[row]}, there {first.ids[row]}")


def read_captions(path):
    """{u: [N captions]}, u = 0 the originals, of a JSON list of {name: {sentences: {"Caption i - u%": text}[, original:
    text]}}. Raises: UserError."""
    items, levels = common.guarded(lambda p: json.loads(Path(p).read_text(encoding="utf-8")), path), {}
    try:
        for item in items:
            (body,) = item.values()
            texts = {int(re.search(r"(\d+)\s*%", key)[1]): text for key, text in body["sentences"].items()}
            for u, text in (texts | ({0: body["original"]} if "original" in body else {})).items():
                levels.setdefault(u, []).append(text)
        counts = {u: len(texts) for u, texts in levels.items()}
        is_text = all(isinstance(text, str) for texts in levels.values() for text in texts)
        if 0 not in levels or len(set(counts.values())) != 1 or not is_text:
            raise ValueError(f"every item needs its original (0%) and the same levels, all texts; found {counts}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected [{{name: {{sentences: {{'Caption i - u%': text}}}}}}] ({error})") from None
    return dict(sorted(levels.items()))


def tfidf(texts, reference, width=4096):
    """Hashed TF-IDF [N, width] float32 with unit rows: column crc32(word) % width, value sqrt(count) * idf, where idf =
    ln((1 + N) / (1 + df)) + 1 is of the reference texts (Salton & Buckley 1988, smoothed)."""
    def count(texts):
        counts = np.zeros((len(texts), width), dtype=np.float32)
        for row, text in zip(counts, texts, strict=True):
            np.add.at(row, [zlib.crc32(word.encode()) % width for word in re.findall(r"\w+", text.lower())], 1)
        return counts
    seen = count(reference)
    idf = np.log((1 + len(reference)) / (1 + (seen > 0).sum(0))) + 1
    return F.normalize(torch.from_numpy(np.sqrt(seen if texts is reference else count(texts)) * idf).float(), dim=1)


def extend_with_ladder(ladder, models, texts, fit=slice(None)):
    """(the models and the rungs of the ladder as Features, {kind: [(width, name)]} of the rungs, the first model whole
    as the widest of pca's). pca:WIDTH cuts its last layer to its first principal components (of the rows `fit`), while
    tfidf:WIDTH is hashed TF-IDF of the texts [N] (idf from the rows `fit`). Raises: UserError."""
    rungs, kinds, base = [], {}, models[0]
    x, texts = base.layers[-1], np.array(texts or [], dtype=object)
    for rung in ladder:
        match = re.fullmatch(r"(pca|tfidf):([1-9]\d*)", rung)
        if not match:
            raise UserError(f"alignment.ladder: expected pca:WIDTH or tfidf:WIDTH, found {rung!r}")
        kind, width = match[1], int(match[2])
        if kind == "pca" and width > min(x[fit].shape):
            raise UserError(f"alignment.ladder: {rung}: {base.model} has {x.shape[1]} features of {len(x[fit])} items")
        if kind == "tfidf" and len(texts) != len(x):
            raise UserError(f"alignment.ladder: {rung} needs the texts of the {len(x)} items; set captions_file=")
        if kind == "pca":
            mean = x[fit].mean(0)
            cut = (x - mean) @ torch.linalg.svd(x[fit] - mean, full_matrices=False)[2][:width].T
        else:
            cut = tfidf(texts, texts[fit], width).to(x.device)
        rungs.append(Features(f"{kind}{width}", [cut], base.ids, family=kind, path=rung, clamp=kind == "pca"))
        kinds.setdefault(kind, []).append((width, rungs[-1].model))
    if "pca" in kinds:
        kinds["pca"].append((x.shape[1], base.model))
    return named_once([*models, *rungs]), kinds


def compare_models(cfg, language, vision, level):
    """Every language model with every vision model by every metric (of one modality: each pair once): a list of dicts
    of `permutation_null`'s numbers, and `ties`, the rows with one at the k-th neighbour. Read from the level's file in
    align_dir if it holds the same, by this version of the script, else computed and saved."""
    a, n, digest, rows = cfg.alignment, len(language[0].layers[0]), 0, []
    folder = Path(at_level(cfg.align_dir, level) if cfg.align_dir else Path(cfg.output_dir) / "alignment")
    path = folder / ("alignment.pt" if level is None else f"alignment_u={level}.pt")
    if n <= a.k:
        raise UserError(f"{language[0].path}: {n} items are too few for alignment.k={a.k} neighbours")
    for m in (*language, *vision):
        for x in m.layers:
            digest = zlib.crc32(x.cpu().contiguous().numpy(), digest)
    facts = [[(m.model, m.family, m.bpb) for m in side] for side in (language, vision)]
    identity = json.dumps([common.source_hash(cfg, a), cfg.seed, *facts, digest])
    earlier = common.load_checkpoint(path) if path.exists() else {}
    if earlier.get("identity") == identity:
        return earlier["rows"]
    pairs = {}
    for x, y in itertools.product(language, vision):
        if x.path != y.path:
            pairs.setdefault(frozenset((x.path, y.path)), (x, y))
    if not pairs:
        raise UserError(f"{language[0].path}: is the only model on both sides; compare at least two")
    stacks = {m.path: layers_to_compare(m, a) for m in (*language, *vision)}
    for metric in a.metrics:
        sides = {key: prepare(layers, metric, a.k) for key, layers in stacks.items()}
        for x, y in common.progress(pairs.values(), metric):
            row = permutation_null(sides[x.path], sides[y.path], metric, a.k, a.n_permutations, cfg.seed)
            ties = [int(sides[m.path].ties[layer]) for m, layer in zip((x, y), row["layers"], strict=True)
                    if metric in KNN_METRICS]
            rows.append({"language": x.model, "vision": y.model, "family": y.family, "metric": metric, "bpb": x.bpb,
                         "n": n, "ties": sum(ties), **row})
    folder.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, {"identity": identity, "rows": rows}, keep_previous=False)
    return rows


def picture_file(cfg, name):
    """Where a picture of these stages goes: plot_dir, or the run's folder."""
    folder = Path(at_level(cfg.plot_dir or cfg.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', name)}.png"


def evaluate_align(cfg, data, models=None):
    """All pairs at the lowest caption level with their intervals, and correlations over language models."""
    a, tables, correlations = cfg.alignment, {}, {}
    ((level, files),) = data.source.items()
    encoders, vision = read_models(cfg, files)
    texts = read_captions(at_level(cfg.captions_file))[0] if cfg.captions_file else None
    language, rungs = extend_with_ladder(a.ladder, encoders, texts)
    rows = compare_models(cfg, language, vision, level)
    stacks = [{m.model: layers_to_compare(m, a) for m in side} for side in (language, vision)]
    for r in common.progress(rows, "intervals"):  # the best layer of fewer items is looked for near the best of all
        x, y = (side[r[name]][max(0, best - 2):best + 3]
                for side, name, best in zip(stacks, ("language", "vision"), r["layers"], strict=True))
        title = f"{r['metric']}: best layer pair, {r['n']:,} items{'' if level is None else f', u = {level}'}"
        tables.setdefault(title, {})[f"{r['language']} - {r['vision']}"] = {
            "score": r["score"], **interval("score", r["score"], part_scores(x, y, r["metric"], a.k)),
            "chance": r["null_mean"], "p": r["p_value"], "calibrated": r["calibrated"],
            "layers": ", ".join(map(str, r["layers"])), "ties": r["ties"]}
    for (metric, y), part in grouped(rows, "metric", "vision").items():
        score = {r["language"]: r["score"] for r in part}
        scored = [(-m.bpb, score[m.model]) for m in encoders if m.bpb is not None and m.model in score]
        if len(scored) >= 3:
            correlations[f"{metric}: performance (- bits per byte), alignment with {y}"] = spearman(
                *zip(*scored, strict=True))
        for kind, of_kind in rungs.items():
            doses = [(width, score[name]) for width, name in of_kind if name in score]  # not of a model with itself
            correlations[f"{metric}: dose-response, width of {kind}, alignment with {y}"] = spearman(
                *zip(*doses, strict=True))
    for (metric, model), part in grouped(rows, "metric", "language").items():
        largest = max(r["score"] for r in rows if r["metric"] == metric)
        plot_heatmaps(picture_file(cfg, f"heatmap_{metric}_{model}"), part, largest, data.synthetic)
    return {"headline": f"align: {len(language)} language and {len(vision)} vision models, {rows[0]['n']:,} items, "
                        f"k = {a.k}", "tables": tables | ({"rank correlation": correlations} if correlations else {}),
            "notes": ["Score of the best layer pair with its 95% interval (from disjoint parts of the items); chance: "
                      "mean of the permutation null of the maximum over layer pairs, p against it; ties: rows with one "
                      "at the k-th place."]}


def plot_heatmaps(path, rows, largest, synthetic):
    """All layer pairs of a language model with the (at most six) vision models that it agrees with best."""
    shown = sorted(rows, key=lambda r: -r["score"])[:6]
    figure, axes = common.new_figure(len(shown), width=3.6)
    for axis, r in zip(axes, shown, strict=True):
        image = axis.imshow(r["matrix"], vmin=min(0, np.min(r["matrix"])), vmax=largest, aspect="auto", origin="lower")
        axis.scatter(r["layers"][1], r["layers"][0], marker="x", color="red",
                     label=f"best {r['score']:.3f}, calibrated {r['calibrated']:.3f}")
        for numbers in (axis.xaxis, axis.yaxis):
            numbers.get_major_locator().set_params(integer=True)
        axis.set(xlabel=f"layer of {r['vision']}", ylabel=f"layer of {r['language']}")
        axis.legend(fontsize=6)
    figure.colorbar(image, ax=axes, label=r["metric"].replace("_", " "))
    best = f"; the best {len(shown)} of {len(rows)} vision models" if len(shown) < len(rows) else ""
    figure.suptitle(f"{r['language']}, {r['n']:,} items{best}{' (synthetic data)' * synthetic}", fontsize=10)
    common.save_figure(figure, path)


def evaluate_uniqueness(cfg, data, models=None):
    """Alignment at every caption level: against u, against performance at each level, and the text-only baseline."""
    a, rows, tables, correlations, curves = cfg.alignment, [], {}, {}, {}
    for level, files in data.source.items():
        of_level = compare_models(cfg, *read_models(cfg, files), level)
        rows += [{"u": level, **r} for r in of_level]
        mean = mean_of([r for r in of_level if r["metric"] == a.metrics[0]], "score")
        print(f"u = {level:3}: {len(of_level) // len(a.metrics)} pairs of models, mean {a.metrics[0]} {mean:.4f}")
    n = f"{rows[0]['n']:,} items"
    captions = read_captions(at_level(cfg.captions_file)) if cfg.captions_file else {}
    vectors = {u: tfidf(texts, captions[0]) for u, texts in captions.items()}
    for metric in a.metrics:
        scores, calibrated = {}, {}
        table = tables[f"{metric}: mean over language models, {n}"] = {}
        for (model,), part in grouped([r for r in rows if r["metric"] == metric], "vision").items():
            curve, chance, above = (line(part, "u", key) for key in ("score", "null_mean", "calibrated"))
            rho = correlations[f"{metric}: u, alignment with {model}"] = spearman(*curve.values())
            scores |= {f"{model}: {stated(rho)}": curve, "chance": chance}
            calibrated[model] = above
            table |= {model: cells("u", curve), f"{model}: chance": cells("u", chance),
                      f"{model}: calibrated": cells("u", above)}
        panels = {metric: scores, f"{metric}, calibrated": calibrated}
        if captions and metric in ("mutual_knn", "unbiased_cka"):
            levels = [u for u in captions if u > 0]
            curve = {"x": levels, "y": [alignment_matrix(vectors[0], vectors[u], metric, a.k).item() for u in levels]}
            rho = correlations[f"{metric}: u, originals with rewrites (text-only TF-IDF)"] = spearman(*curve.values())
            panels[f"{metric}, originals with rewrites"] = {f"TF-IDF: {stated(rho)}": curve}
            table = tables.setdefault("text only: TF-IDF of the originals with that of their rewrites", {})
            table[metric] = cells("u", curve)
        panels = {ylabel.replace("_", " "): {"xlabel": "u: share of words replaced [%]", "lines": lines}
                  for ylabel, lines in panels.items()}
        curves |= panels
        common.plot_lines(picture_file(cfg, f"alignment_vs_uniqueness_{metric}"), panels,
                          f"alignment against caption uniqueness, {n}", data.synthetic)
    for (metric, name), part in grouped([r for r in rows if r["bpb"] is not None], "metric", "family").items():
        if len(grouped(part, "language")) >= 3:
            rhos = plot_performance(cfg, metric, name, part, data.synthetic)
            correlations |= {f"{metric}: performance (- bits per byte), alignment with {name}; u = {u}": rho
                             for u, rho in rhos.items()}
    notes = ["Score of the best layer pair; chance: mean of the permutation null of that maximum; calibrated: measured "
             "from its 95% point."]
    if not any("performance" in name for name in correlations):
        notes.append("No panels of performance: fewer than 3 language models carry bpb (bits per byte).")
    return {"headline": f"uniqueness: u = {', '.join(map(str, data.source))}, {n}, k = {a.k}",
            "tables": {**tables, "rank correlation": correlations}, "notes": notes, "curves": curves}


def plot_performance(cfg, metric, name, rows, synthetic):
    """{u: rank correlation over language models of - bits per byte with alignment, the mean over a family's sizes};
    drawn at 10, 30, 50, 70, 90 where they are, a line a vision model."""
    levels, rhos = grouped(rows, "u"), {}
    for (u,), part in levels.items():
        points = [(-bpb, mean_of(of_model, "score")) for (_, bpb), of_model in grouped(part, "language", "bpb").items()]
        rhos[u] = spearman(*zip(*points, strict=True))
    shown = [u for u in (10, 30, 50, 70, 90) if u in rhos] or list(rhos)
    figure, axes = common.new_figure(len(shown), width=3.3)
    for axis, u in zip(axes, shown, strict=True):
        for (model,), part in grouped(levels[u,], "vision").items():
            axis.plot(*zip(*sorted((-r["bpb"], r["score"]) for r in part), strict=True), marker=".", label=model)
        axis.set(xlabel="- bits per byte", ylabel=metric.replace("_", " "))
        axis.set_title(f"u = {u}: {stated(rhos[u])}", fontsize=8)
        axis.legend(fontsize=6)
        if cfg.same_scale:
            axis.set_ylim(min(0, min(r["score"] for r in rows)), 1.05 * max(r["score"] for r in rows))
    figure.suptitle(f"{name}: alignment against language performance{' (synthetic data)' * synthetic}", fontsize=10)
    common.save_figure(figure, picture_file(cfg, f"performance_{metric}_{name}"))
    return rhos


def evaluate_n_sweep(cfg, data, models=None):
    """Alignment against the number of items, at fixed k and at a fixed share k / N of neighbours, of one and of several
    captions an image, each beside its null. Alignment that is only coarse falls with N (arXiv 2604.18572)."""
    a, s, tables, curves, variants = cfg.alignment, cfg.n_sweep, {}, {}, {}
    one, vision = read_models(cfg, *data.source.values())
    captions, n = {"one caption": one}, len(vision[0].layers[0])
    if s.several_dir:
        files = feature_files(at_level(s.several_dir), "language")
        captions["several captions"] = read_side(files, cfg.pool_x, common.pick_device(cfg.device))
        check_same_items(captions["several captions"] + vision)
    sizes = sorted({size for size in (*s.sizes, n) if max(3, a.k) < size <= n})
    if not sizes:
        raise UserError(f"{vision[0].path}: {n} items are too few for alignment.k={a.k} neighbours")
    for metric in a.metrics:
        is_knn = metric in KNN_METRICS
        variants[f"{metric}, k = {a.k}" if is_knn else metric] = metric, {size: a.k for size in sizes}
        if is_knn:
            share = {size: round(a.k * size / sizes[0]) for size in sizes}
            variants[f"{metric}, k / N = {a.k / sizes[0]:.3g}"] = metric, share
    for title, (metric, ks) in variants.items():
        table, lines = tables.setdefault(title, {}), {}
        for (name, language), y in itertools.product(captions.items(), vision):
            sweeps, row = [sweep(cfg, x, y, metric, ks) for x in language if x.path != y.path], f"{y.model}, {name}"
            for key in sweeps[0]:
                values = (np.max if key == "p" else np.mean)([of_model[key] for of_model in sweeps], axis=0).tolist()
                table[row if key == "score" else f"{row}: {key}"] = cells("N", {"x": sizes, "y": values})
            lines[row] = {"x": sizes, "y": list(table[f"{row}: less chance"].values()),
                          "sd": list(table[f"{row}: sd"].values())}
            print(f"{title}: {row} is done", flush=True)
        curves[title] = {"xlabel": "items N; the score less chance", "lines": lines}
    common.plot_lines(picture_file(cfg, "alignment_vs_n"), curves, "alignment against N", data.synthetic)
    return {"headline": f"n_sweep: alignment of up to {n:,} items, {s.n_draws} subsamples of each size",
            "tables": tables, "curves": curves,
            "notes": ["Score of the best layer pair, mean (and sd) over subsamples, and over language models; chance: "
                      "mean of the permutation null of that maximum; less chance: (score - chance) / (1 - chance); p: "
                      "the largest."]}


def sweep(cfg, x, y, metric, ks):
    """{score, sd, chance, less chance, p: [a number a size]} of a language and a vision model, ks {size: neighbours}.
    Subsamples are drawn without replacement, the same for all models; the null is the first one's."""
    a, n, stacks, rows = cfg.alignment, len(y.layers[0]), [layers_to_compare(m, cfg.alignment) for m in (x, y)], []
    for size, k in ks.items():
        draws, values = np.random.RandomState(cfg.seed), []
        for _ in range(cfg.n_sweep.n_draws if size < n else 1):
            items = torch.from_numpy(np.sort(draws.permutation(n)[:size])).to(y.layers[0].device)
            sides = [[layer[items] for layer in layers] for layers in stacks]
            if not values:
                null = permutation_null(*sides, metric, k, a.n_permutations, cfg.seed)
            values.append(alignment_matrix(*sides, metric, k).max().item() / highest(metric, k))
        score, chance = float(np.mean(values)), null["null_mean"]
        rows.append({"score": score, "sd": float(np.std(values, ddof=len(values) > 1)), "chance": chance,
                     "less chance": (score - chance) / (1 - chance), "p": null["p_value"]})
    return {key: [row[key] for row in rows] for key in rows[0]}


# --------------------------------------------------------------------------------------------- mmimdb, finetune: films

# MM-IMDb's genres by frequency, the order of the reference's class_idx.
GENRES_BY_FREQUENCY = (
    "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery",
    "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western", "Sport",
    "Short", "Film-Noir")
LABEL_FILES = ("labels_all_23.npy", "ids_all.txt", "class_names_23.json")
PROBE_SETTINGS = tuple(itertools.product((1e-4, 5e-4, 1e-3, 5e-3), (0, 0.1, 0.01, 0.001, 0.0001)))  # rate, decay
ALL_GENRES, ALL_POSITIVE = "chance: all genres of every film", "chance: all positive"


@dataclass
class Films:
    """MM-IMDb: labels by name, and features of both modalities, rows of the films of the split."""
    ids: list  # [N] film ids
    labels: torch.Tensor  # [N, 23] of 0/1
    genres: list  # [23] names
    splits: dict  # train, dev, test -> rows of all of their films
    chosen: dict  # the same of the films of the index files; all where there is none
    language: list  # of Features
    vision: list  # of Features
    test_sample: torch.Tensor  # rows of test films that alignment is measured on
    rungs: dict = field(default_factory=dict)  # of the ladder


def read_labels(folder):
    """(labels [N, C] of 0/1, film ids [N], genres [C]) of the label files. Raises: UserError."""
    labels = common.guarded(np.load, folder / LABEL_FILES[0])
    ids = common.guarded(lambda p: p.read_text().split(), folder / LABEL_FILES[1])
    genres = common.guarded(lambda p: json.loads(p.read_text()), folder / LABEL_FILES[2])
    if labels.shape != (len(ids), len(genres)) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{folder / LABEL_FILES[0]}: expected {len(ids)} x {len(genres)} of 0, 1, found {labels.shape}")
    return labels, ids, genres


def read_index(path, films):
    """Places [n] in a part's films of those that an index file chooses: a 1-D array of ids, as words or whole numbers
    (without leading zeros), else of places in split.json's list. Raises: UserError."""
    values = common.guarded(np.load, path)  # allow_pickle is off
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "USiu":
        raise UserError(f"{path}: expected [n] film ids or places, found {values.dtype} {list(values.shape)}")
    words = values.astype(str).tolist()
    place = {film.lstrip("0"): i for i, film in enumerate(films)} | {film: i for i, film in enumerate(films)}
    if not any(word in place for word in words):
        place = {str(i): i for i in range(len(films))}
    missing = [word for word in words if word not in place]
    if missing:
        raise UserError(f"{path}: {len(missing)} entries are no films of split.json's part, the first is {missing[0]}")
    return sorted({place[word] for word in words})


def rows_of(films, ids, path):
    """Rows of the films in a file that has these ids. Raises: UserError."""
    row = {film: i for i, film in enumerate(ids)}
    missing = [film for film in films if film not in row]
    if missing:
        raise UserError(f"{path}: {len(missing)} of the split's films are not there, the first is {missing[0]}")
    return [row[film] for film in films]


def load_films(cfg, stage):
    """Data of mmimdb or finetune, its last job selected. Raises: UserError naming the file."""
    m, root, device = cfg.mmimdb, Path(at_level(cfg.mmimdb.dir)), common.pick_device(cfg.device)
    files = [root / "split.json", *(root / "labels" / name for name in LABEL_FILES)]
    if missing := [path for path in files if not path.exists()]:
        raise UserError(f"{missing[0]}: no such file; unpack mmimdb.tar.gz (archive.org/details/mmimdb) and run "
                        "exp_gw_mmimdb.py with --stage labels, set mmimdb.dir=, or try --demo")
    split = common.read_json(files[0])
    labels, all_ids, genres = read_labels(root / "labels")
    ids, splits, chosen, sides = [], {}, {}, []
    for part in ("train", "dev", "test"):
        films, index_file = [str(film) for film in split.get(part) or ()], root / part / "sampled_ids.npy"
        splits[part] = chosen[part] = torch.arange(len(ids), len(ids) + len(films), device=device)
        ids += films
        if index_file.is_file():
            chosen[part] = splits[part][read_index(index_file, films)]
            files.append(index_file)
        why = f"those of {index_file}" if index_file in files else f"all of split.json (no {index_file})"
        print(f"{stage}: {part} has {len(chosen[part]):,} of {len(films):,} films, {why}")
    if not all(map(len, splits.values())) or len(set(ids)) != len(ids):
        raise UserError(f"{root / 'split.json'}: expected films of train, dev and test, each film once")
    labels = torch.from_numpy(labels[rows_of(ids, all_ids, root / "labels" / LABEL_FILES[1])].astype(np.float32))
    for what, folder, modality in (("language", m.language_dir, "text"), ("vision", m.vision_dir, "image")):
        latents = sorted((root / "latents").glob(f"mm_imdb1_globals_aug*_{modality}.npy"))
        paths = feature_files(at_level(folder), what) if folder else latents
        if not paths:
            raise UserError(f"{root}/latents: no mm_imdb1_globals_aug*_{modality}.npy; or set mmimdb.{what}_dir=")
        sides.append(named_once([read_features(path) if folder else read_latents(path, all_ids) for path in paths]))
        for f in sides[-1]:
            rows = rows_of(ids, f.ids or [], f.path)
            f.layers, f.ids = [x[rows].to(device) for x in f.layers], ids
        files += paths
    sample = chosen["test"]
    if len(sample) == len(splits["test"]):  # no index file: a draw
        drawn = np.sort(np.random.RandomState(cfg.seed).permutation(len(sample))[:1024])
        sample = sample[torch.from_numpy(drawn).to(device)]
    if len(sample) <= cfg.alignment.k:
        raise UserError(f"{root}: {len(sample)} test films are too few for alignment.k={cfg.alignment.k} neighbours")
    if stage == "mmimdb" and reads_texts(cfg.alignment.ladder):
        files += [root / "dataset" / f"{film}.json" for film in ids]
    films = Films(ids, labels.to(device), genres, splits, chosen, *sides, sample)
    jobs, select_job = (probe_jobs if stage == "mmimdb" else tower_jobs)(cfg, films)
    return select(Data(stage, films, common.fingerprint(files), bool(split.get("synthetic")), jobs, select_job))


def read_latents(path, ids):
    """The clean views of one latent file as Features of one layer; row = views * film + view."""
    rows = common.guarded(lambda p: np.load(p, mmap_mode="r"), path)
    manifest_file = path.with_name(f"{path.stem}_manifest.json")
    views = common.read_json(manifest_file).get("views_per_sample")
    if not isinstance(views, int) or rows.ndim != 2 or len(rows) != views * len(ids):
        raise UserError(f"{path}: expected {len(ids)} films x {views} views ({manifest_file.name}), found {rows.shape}")
    layers = as_layers(rows[::views].astype(np.float32), f"{path}: ")
    return Features(path.stem.split("_", 4)[-1], layers, list(ids), path=str(path))


def reads_texts(ladder):
    return any(rung.startswith("tfidf") for rung in ladder)


def film_texts(root, ids):
    """The plots of the films, [N] strings, from dataset/{id}.json: the first summary longer than one word."""
    texts = []
    for film in ids:
        plots = common.read_json(Path(root) / "dataset" / f"{film}.json").get("plot") or ""
        plots = [str(plot) for plot in plots] if isinstance(plots, list) else [str(plots)]
        texts.append(next((plot for plot in plots if len(plot.split()) > 1), plots[0]))
    return texts


def genre_f1(predicted, targets):
    """F1 of each column [C] from predictions and 0/1 targets [N, C]; 0/0 counts as 0."""
    hits = (predicted & (targets > 0)).sum(0)
    return 2 * hits / (predicted.sum(0) + targets.sum(0)).clamp(min=1)


def probe_jobs(cfg, films):
    """One job a language model, the rungs of the ladder among them; and what selects one."""
    ladder = cfg.alignment.ladder
    texts = film_texts(at_level(cfg.mmimdb.dir), films.ids) if reads_texts(ladder) else None
    films.language, films.rungs = extend_with_ladder(ladder, films.language, texts, films.chosen["train"].cpu())
    splits = {"train": films.chosen["train"], "val": films.chosen["dev"], "test": films.chosen["test"]}

    def select_job(job):
        x = next(m for m in films.language if m.model == job["model"]).layers[-1]
        return {"features": z_scored(x, splits["train"]), "labels": films.labels}, splits
    return [{"model": m.model} for m in films.language], select_job


class Probes(JobModel):
    """Linear probes, one for each learning rate and weight decay, trained at once on the same batches [B, D]; the loss
    weighs a genre's positives by its negatives / positives among the labels [N, C]."""

    def __init__(self, dim, labels):
        super().__init__()
        n_classes, positives = labels.shape[1], labels.sum(0)
        self.weight = nn.ParameterList([torch.zeros(dim, n_classes) for _ in PROBE_SETTINGS])
        self.bias = nn.ParameterList([torch.zeros(n_classes) for _ in PROBE_SETTINGS])
        self.register_buffer("pos_weight", (len(labels) - positives) / positives.clamp(min=1))

    def forward(self, features):
        """Logits [probes, B, classes]."""
        weight, bias = torch.stack(list(self.weight)), torch.stack(list(self.bias))
        return torch.baddbmm(bias[:, None], features.expand(len(weight), *features.shape), weight)

    def losses(self, batch):
        logits = self(batch["features"])
        loss = F.binary_cross_entropy_with_logits(logits, batch["labels"].expand_as(logits), pos_weight=self.pos_weight,
                                                  reduction="none")
        return {"loss": loss.mean((1, 2)).sum()}

    def make_optimizer(self, cfg):
        """Adam with L2, as the reference's."""
        return torch.optim.Adam([{"params": [w, b], "lr": rate, "weight_decay": decay} for (rate, decay), w, b
                                 in zip(PROBE_SETTINGS, self.weight, self.bias, strict=True)],
                                fused=self.weight[0].is_cuda)

    @torch.no_grad()
    def macro_f1(self, data, split):
        """[probes] of a split."""
        x, rows = data.tensors, data.splits[split]
        return torch.stack([genre_f1(logits > 0, x["labels"][rows]).mean() for logits in self(x["features"][rows])])

    def score(self, data, split):
        return self.macro_f1(data, split).max()


@torch.no_grad()
def evaluate_mmimdb(cfg, data, models):
    """Probe scores of every language model, its alignment with the vision models on test films, and F1 against
    alignment by genre: over models, and as a dose-response over the rungs of each ladder."""
    films, labels = data.source, data.source.labels[data.source.chosen["test"]].cpu()
    values, f1, chosen = {ALL_GENRES: {"logits": torch.ones_like(labels), "labels": labels}}, {}, {}
    for job, probes in zip(data.jobs, models, strict=True):
        data, name = select(data, job), job["model"]
        dev_f1 = probes.macro_f1(data, "val")
        best = int(dev_f1.argmax())
        rate, decay = PROBE_SETTINGS[best]
        chosen[name] = {"learning_rate": rate, "weight_decay": decay, "dev_f1_macro": dev_f1[best].item()}
        logits = probes(data.tensors["features"][data.splits["test"]])[best].cpu()
        values[name] = {"logits": logits, "labels": labels}
        of_genre = genre_f1(logits > 0, labels).tolist()
        f1[name] = {"macro": float(np.mean(of_genre)), **dict(zip(films.genres, of_genre, strict=True))}
    table, _, items = common.interval_tables(values, [], len(labels), probe_scores)
    sides = [[dataclasses.replace(m, layers=[x[films.test_sample] for x in m.layers]) for m in side]
             for side in (films.language, films.vision)]
    rows, vision = compare_models(cfg, *sides, None), films.vision[0].model
    tables = {f"linear probes; alignment with {vision}": table}
    groups = {"models": [m.model for m in films.language if m.path not in cfg.alignment.ladder],
              **{f"dose-response over {kind}": [name for _, name in rungs] for kind, rungs in films.rungs.items()}}
    for metric in cfg.alignment.metrics:
        score = {}
        for r in (r for r in rows if (r["vision"], r["metric"]) == (vision, metric)):
            score[r["language"]] = r["score"]
            table[r["language"]] |= null_columns(metric, [{metric: r}])
        for group, names in groups.items():
            if len(names) >= 3:
                x, title = [score[name] for name in names], f"test F1 against {metric}, {group}"
                correlations = correlations_by_genre(x, [f1[name] for name in names])
                if len(tables) == 1:  # a picture of the first
                    plot_mmimdb(Path(cfg.output_dir), title, metric, score, {name: table[name] for name in names},
                                correlations, table[ALL_GENRES]["f1_macro"], data.synthetic)
                tables[title] = correlations
    return {"headline": f"mmimdb: linear probes on {len(f1)} language models, {len(labels):,} test films, alignment on "
                        f"{len(films.test_sample):,}", "tables": tables, "chosen": chosen,
            "per_item": {"ids": [films.ids[i] for i in films.chosen["test"].tolist()], **items},
            "notes": ["Intervals: 95%, bootstrap over the test films. The rungs of a ladder are cut from one encoder: "
                      "their rho says how F1 answers to alignment in it, not how it varies over models. q: "
                      "Benjamini-Hochberg over the genres."]}


def probe_scores(values, weights):
    names = ("f1_macro", "mAP") if weights is not None else ("f1_macro", "f1_micro", "f1_weighted", "mAP")
    return common.multilabel_metrics(values["logits"], values["labels"], weights=weights, names=names)


def correlations_by_genre(x, f1):
    """{genre: rho and slope of F1 against alignment x over models, with p, and q over the genres but macro}."""
    rows = {genre: {} for genre in f1[0]}
    for genre, row in rows.items():
        y = [of_model[genre] for of_model in f1]
        row |= {**spearman(x, y), **slope(x, y)}
    for p, q in (("p", "q"), ("slope p", "slope q")):
        _, *genres = rows.values()
        for row, value in zip(genres, benjamini_hochberg([row[p] for row in genres]), strict=True):
            row[q] = value
    return rows


def plot_mmimdb(folder, title, metric, alignment, models, rows, chance, synthetic):
    """Macro F1 with its interval against alignment over models, and over genres histograms of rho and slope."""
    figure, (points, *histograms) = common.new_figure(3, width=4.4)
    middle = (min(alignment[name] for name in models) + max(alignment[name] for name in models)) / 2
    for name, row in models.items():
        x, y = alignment[name], row["f1_macro"]
        spread = [[max(0, y - row["f1_macro low"])], [max(0, row["f1_macro high"] - y)]]  # it need not hold y
        points.errorbar(x, y, spread, fmt="C0o", markersize=4, elinewidth=1, capsize=2)
        side, offset = ("right", -4) if x > middle else ("left", 4)  # towards the middle: no label leaves the panel
        points.annotate(name.replace("_", " "), (x, y), fontsize=6, ha=side, xytext=(offset, 3),
                        textcoords="offset points")
    points.axhline(chance, color="grey", linestyle=":", label="chance: every genre")
    points.axvline(next(iter(models.values()))[f"{metric} chance"], color="grey", linestyle="--", linewidth=1,
                   label="chance of the alignment")
    points.legend(fontsize=7)
    points.set(xlabel=f"alignment ({metric.replace('_', ' ')})", ylabel="test macro F1, 95% intervals")
    points.set_title(f"macro: {stated(rows['macro'])}", fontsize=8)
    for axis, key, q in zip(histograms, ("rho", "slope"), ("q", "slope q"), strict=True):
        values = [row[key] for genre, row in rows.items() if genre != "macro" and math.isfinite(row[key])]
        axis.hist(values, bins=12)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set(xlabel=f"{key} of F1 against alignment", ylabel="genres")
        n_below = sum(row.get(q, 1) < 0.05 for row in rows.values())
        axis.set_title(f"{len(values)} genres, {n_below} with q < .05", fontsize=8)
    figure.suptitle(f"{title.replace('_', ' ')}{' (synthetic data)' * synthetic}", fontsize=10)
    common.save_figure(figure, folder / "mmimdb_correlations.png")


def genre_of(class_idx, genres):
    """A genre's name from its name or its place in the frequency order. Raises: UserError."""
    name = GENRES_BY_FREQUENCY[class_idx] if isinstance(class_idx, int) and 0 <= class_idx < 23 else class_idx
    match = next((g for g in genres if g.lower() == str(name).lower()), None)
    if match is None:
        raise UserError(f"finetune.class_idx={class_idx}: use 0 to 22 (by frequency) or one of {', '.join(genres)}")
    return match


def tower_jobs(cfg, films):
    """A job for each arm (few labels, and all as a control), weight and seed; and what selects one. Few labels are
    those of the index files' films, whose dev films then choose, or a number of training films, drawn by seed."""
    f, genre, train = cfg.finetune, genre_of(cfg.finetune.class_idx, films.genres), films.splits["train"]
    labels, few = films.labels[:, films.genres.index(genre)], f.n_labelled
    if few == "index":
        few = len(films.chosen["train"]) if len(films.chosen["train"]) < len(train) else "all"
    if few != "all" and not 2 <= few <= len(train):
        raise UserError(f"finetune.n_labelled={few}: must be 2 to {len(train)}, the training films")
    for part, rows in (("train", films.chosen["train"]), ("dev", films.chosen["dev"]), ("test", films.splits["test"])):
        if not 0 < labels[rows].sum() < len(rows):
            raise UserError(f"finetune.class_idx: {genre} has none or all of the {len(rows)} films of {part}")
    image, text = (z_scored(models[0].layers[-1], train) for models in (films.vision, films.language))

    def select_job(job):
        splits = {"train": train, "val": films.chosen["dev"], "test": films.splits["test"]}
        if job["labelled"] != "all":
            drawn = None if f.n_labelled == "index" else labelled_films(labels, train, few, job["seed"])
            splits["labelled"] = films.chosen["train"] if drawn is None else drawn
        return {"image": image, "text": text, "labels": labels}, splits
    return [{"genre": genre, "labelled": arm, "weight": w, "seed": seed} for arm in dict.fromkeys([few, "all"])
            for w in f.weights for seed in range(cfg.seed, cfg.seed + f.n_seeds)], select_job


def labelled_films(labels, rows, n, seed):
    """n of the rows, drawn at random, with as many positives as their share, at least one."""
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)]
    positive = labels[order] > 0
    n_positive = max(1, min(n - 1, round(n * positive.float().mean().item())))
    return torch.cat([order[positive][:n_positive], order[~positive][:n - n_positive]])


class TwoTower(JobModel):
    """Trainable towers on frozen features, a classifier of one genre on the text embedding, and InfoNCE between the
    two, weighted by w; the classifier's loss has the labelled films alone, InfoNCE all pairs."""

    def __init__(self, image_dim, text_dim, f, weight):
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(dim, f.embed_dim), nn.GELU(), nn.Linear(f.embed_dim, f.embed_dim))
            for dim in (image_dim, text_dim))
        self.head, self.log_scale = nn.Linear(f.embed_dim, 1), nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.contrastive_weight, self.warmup_epochs, self.epochs = weight, f.warmup_epochs, f.epochs

    def classify(self, text):
        """Logits [B] of texts [B, D]."""
        return self.head(self.text(text))[:, 0]

    def losses(self, batch):
        classify = F.binary_cross_entropy_with_logits(self.classify(batch["labelled_text"]), batch["labels"])
        image = F.normalize(self.image(batch["image"]).float(), dim=1)
        text = F.normalize(self.text(batch["text"]).float(), dim=1)
        contrast = common.info_nce(image, text, self.log_scale.clamp(max=math.log(100)).exp())
        return {"loss": self.contrastive_weight * contrast + classify, "classify": classify, "contrast": contrast}

    def make_optimizer(self, cfg):
        """AdamW, no weight decay on 1-D parameters, and a rate of its own for the scale."""
        f, others = cfg.finetune, [p for name, p in self.named_parameters() if name != "log_scale"]
        return torch.optim.AdamW([{"params": [p for p in others if p.ndim > 1], "weight_decay": 0.01},
                                  {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
                                  {"params": [self.log_scale], "weight_decay": 0.0, "lr": f.scale_learning_rate}],
                                 lr=f.learning_rate, fused=self.log_scale.is_cuda)

    def schedule(self, epoch):
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        return 0.01 + 0.99 * common.warmup_cosine(epoch - self.warmup_epochs, self.epochs - self.warmup_epochs, 0)

    @torch.no_grad()
    def score(self, data, split):
        """Average precision of the genre, which needs no threshold."""
        rows = data.splits[split]
        logit = self.classify(data.tensors["text"][rows])
        is_finite = torch.isfinite(logit).all()
        return torch.tensor(average_precision(logit, data.tensors["labels"][rows]) if is_finite else math.nan)

    def health(self):
        return {"logit_scale": self.log_scale.exp().item()}


def best_threshold(logits, targets):
    """The logit above which predicting maximises F1 of logits [N], targets 0/1 [N]: in the middle between two."""
    ranked, order = logits.sort(descending=True)
    below = torch.cat([ranked[1:], ranked[-1:] - 1])  # behind the last, all are predicted
    hits, n = targets[order].cumsum(0), torch.arange(1, len(order) + 1, device=order.device)
    cut = int((2 * hits / (n + targets.sum()) * (below < ranked)).argmax())  # equal logits are not parted
    return (ranked[cut] + below[cut]) / 2


def average_precision(logit, labels):
    return common.multilabel_metrics(logit[:, None], labels[:, None], names=("mAP",))["mAP"]


def genre_scores(values, weights=None):
    """Means over seeds of F1 (at 0, and at dev's threshold) and average precision; of logits [seeds, n], labels [n]."""
    labels, of_seeds = values["labels"][:, None], []
    for logit, threshold in zip(values["logits"], values["thresholds"], strict=True):
        plain = common.multilabel_metrics(logit[:, None], labels, weights=weights, names=("f1_macro", "mAP"))
        tuned = common.multilabel_metrics((logit - threshold)[:, None], labels, weights=weights, names=("f1_macro",))
        of_seeds.append({"AP": plain["mAP"], "F1": plain["f1_macro"], "F1, dev threshold": tuned["f1_macro"]})
    return {name: np.mean([scores[name] for scores in of_seeds], axis=0) for name in of_seeds[0]}


@torch.no_grad()
def evaluate_finetune(cfg, data, models):
    """Test F1 and average precision, and the alignment of the two towers, of every arm and weight, each at its
    dev-chosen epoch, with intervals over test films (means over seeds)."""
    a, films, runs, weights = cfg.alignment, data.source, [], cfg.finetune.weights
    test, sample, index = films.splits["test"], films.test_sample, torch.arange(len(films.test_sample))
    for job, model in zip(data.jobs, models, strict=True):
        data = select(data, job)
        x, dev = data.tensors, data.splits["val"]
        image, text = model.image(x["image"][sample]), model.text(x["text"][sample])
        logit = model.classify(x["text"][test])
        recall = common.retrieval_metrics(F.normalize(text, dim=1), F.normalize(image, dim=1), index, index, ks=(10,))
        runs.append({**job, "arm": arm_name(job["labelled"], job["weight"]), "T2I R@10": 100 * recall["R@10"],
                     "logit": logit.cpu(), "AP": average_precision(logit, x["labels"][test]),
                     "threshold": best_threshold(model.classify(x["text"][dev]), x["labels"][dev]).cpu()})
        for metric in a.metrics:
            runs[-1][metric] = permutation_null(text, image, metric, a.k, a.n_permutations, cfg.seed)
            runs[-1][metric]["parts"] = part_scores(text, image, metric, a.k)
    labels, arms, genre = x["labels"][test].cpu(), list(dict.fromkeys(r["labelled"] for r in runs)), job["genre"]
    values = {ALL_POSITIVE: {"logits": torch.ones(1, len(test)), "thresholds": torch.zeros(1), "labels": labels}}
    for (name,), part in grouped(runs, "arm").items():
        values[name] = {"logits": torch.stack([r["logit"] for r in part]), "labels": labels,
                        "thresholds": torch.stack([r["threshold"] for r in part])}
    pairs = [(arm_name(arm, w), arm_name(arm, weights[0])) for arm in arms for w in weights[1:]]
    pairs += [(arm_name("all", w), arm_name(arms[0], w)) for w in weights if len(arms) > 1]
    table, differences, items = common.interval_tables(values, pairs, len(test), genre_scores)
    table[ALL_POSITIVE]["T2I R@10"] = 1000 / len(index)
    correlations, curves = {}, {}
    for (name,), part in grouped(runs, "arm").items():
        of_seeds = [r["AP"] for r in part]
        table[name] |= {"AP sd": float(np.std(of_seeds, ddof=len(part) > 1)), "T2I R@10": mean_of(part, "T2I R@10")}
        for metric in a.metrics:
            parts = [r[metric]["parts"] for r in part]
            parts = None if parts[0] is None else [np.mean(x, axis=0) for x in zip(*parts, strict=True)]
            table[name] |= null_columns(metric, part)
            table[name] |= interval(metric, table[name][metric], parts)
    for arm, name in itertools.product(arms, ("AP", *a.metrics)):
        of_arm = [r for r in runs if r["labelled"] == arm]
        y = [r["AP"] if name == "AP" else r[name]["score"] for r in of_arm]
        correlations[f"w, {name}; {arm_name(arm)}"] = spearman([r["weight"] for r in of_arm], y)
    for name in ("AP", "F1, dev threshold", *a.metrics):
        columns, lines = {"y": name, "low": f"{name} low", "high": f"{name} high"}, {}
        for arm in arms:
            rows = [table[arm_name(arm, w)] for w in weights]
            curve = {key: [row[column] for row in rows] for key, column in columns.items() if column in rows[0]}
            lines[arm_name(arm)] = {"x": weights, **curve}  # some metrics have no interval
        chance = [table[arm_name(arms[0], w)][f"{name} chance"] if name in METRICS else table[ALL_POSITIVE][name]
                  for w in weights]
        curves[f"alignment ({name.replace('_', ' ')})" if name in METRICS else name] = {
            "xlabel": "weight w of InfoNCE", "lines": {**lines, "chance": {"x": weights, "y": chance}}}
    common.plot_lines(Path(cfg.output_dir) / "finetune.png", curves,
                      f"fine-tuning for {genre}: test films, means over seeds, 95% intervals", data.synthetic)
    return {"headline": f"finetune: genre {genre}, {int(labels.sum())} of {len(test):,} test films; loss = w InfoNCE "
                        f"of {len(data.splits['train']):,} pairs ({films.vision[0].model}, {films.language[0].model}) "
                        f"+ BCE of the labelled films; {cfg.finetune.n_seeds} seeds",
            "tables": {f"{genre}: F1, AP and alignment against w": table, "paired difference": differences,
                       "rank correlation": correlations}, "curves": curves,
            "chosen": {f"{r['arm']}, seed {r['seed']}": r["threshold"].item() for r in runs},
            "per_item": {"ids": [films.ids[i] for i in test.tolist()], **items},
            "notes": ["Means over seeds; intervals: 95%, of F1 and AP by bootstrap over the test films (differences "
                      "paired), of alignment from disjoint parts of them; epoch and F1's threshold are chosen on dev. "
                      "`all labelled` is the control."]}


def arm_name(arm, w=None):
    return f"{arm} labelled" if w is None else f"{arm} labelled, w = {w:g}"


# --------------------------------------------------------------------------------------------------------------- main

BLOCKS = {  # stage: (how it loads its data, how it evaluates)
    "synthetic": (load_synthetic, evaluate_synthetic), "align": (load_features, evaluate_align),
    "uniqueness": (load_features, evaluate_uniqueness), "n_sweep": (load_features, evaluate_n_sweep),
    "mmimdb": (load_films, evaluate_mmimdb), "finetune": (load_films, evaluate_finetune)}
STAGES = ("all", "train", "evaluate")


def load_data(cfg, stage=None):
    """Data of a stage (default: the first in cfg.stages), with its last job selected. Raises: UserError."""
    for key, values in common.flatten(dataclasses.asdict(cfg)).items():
        is_list = isinstance(values, list) and key != "alignment.ladder"
        if is_list and (not values or len(set(values)) != len(values)):
            raise UserError(f"{key} must name at least one, and each once")
    stage = stage or cfg.stages[0]
    return BLOCKS[stage][0](cfg, stage)


def evaluate(cfg, *data):
    """The results of the stages' data, in one dict, and their pictures."""
    fingerprint = joint_fingerprint(data)
    folder = common.open_run(cfg, fingerprint)
    _, models = collect_models(cfg, *data)
    if len(models):
        common.load_best(folder, models)
    whole = dataclasses.replace(data[0], fingerprint=fingerprint, synthetic=any(d.synthetic for d in data))
    results = {**common.run_facts(cfg, whole), "headline": "", "tables": {}, "notes": [], "curves": {}, "chosen": {},
               "per_item": {"ids": [], "rows": {}, "scores": {}, "draws": {}}}
    headlines, models = [], iter(models)
    for d in data:
        of_stage = BLOCKS[d.stage][1](cfg, d, list(itertools.islice(models, len(d.jobs))))
        headlines.append(of_stage["headline"])
        results["notes"] += of_stage["notes"]
        for key in ("tables", "curves", "chosen"):
            results[key] |= {name if name not in results[key] else f"{d.stage}: {name}": value
                             for name, value in of_stage.get(key, {}).items()}
        if not results["per_item"]["ids"]:
            results["per_item"] = of_stage.get("per_item", results["per_item"])
    return results | {"headline": "; ".join(headlines)}


def load_model(folder):
    """({job's name: its model, in eval mode} of a finished run, its Config). Raises: UserError."""
    cfg = common.load_config(Config, Path(folder) / "config.yaml")
    jobs, models = collect_models(cfg, *(load_data(cfg, stage) for stage in cfg.stages if stage in TRAINED))
    common.load_best(folder, models)
    return {title_of(d, job): model for (d, job), model in zip(jobs, models, strict=True)}, cfg


def use_demo(cfg):
    """Write the stand-in features, captions and films, and point the config at them."""
    folder = demo_data.write_alignment("data/demo/alignment")
    cfg.features_dir, cfg.vision_dir = f"{folder}/gpt_u={{u}}_features", f"{folder}/vision"
    cfg.captions_file, cfg.n_sweep.several_dir = f"{folder}/captions.json", f"{folder}/several"
    cfg.mmimdb.dir = demo_data.write_mmimdb("data/demo/mmimdb_clip_3", dims=(512, 512))  # CLIP's widths


@common.exit_codes
def main(argv):
    cfg, stage = common.setup(argv, Config, __doc__, STAGES, use_demo)
    data = [load_data(cfg, name) for name in cfg.stages]
    common.open_run(cfg, joint_fingerprint(data))  # --fresh is for stages that train nothing, too
    if stage in ("all", "train") and any(d.jobs for d in data):
        train(cfg, *data)
    if stage in ("all", "evaluate"):
        common.publish(cfg.output_dir, common.published(cfg, joint_fingerprint(data)) or evaluate(cfg, *data))


if __name__ == "__main__":
    sys.exit(main())
