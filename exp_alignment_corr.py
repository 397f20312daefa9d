"""Representation alignment: how far do vision and language models agree, does agreement fall as captions carry more unique
information, and does it predict performance?

Sources: the Platonic Representation Hypothesis (Huh et al. 2024, arXiv 2405.07987) and "Understanding the Emergence of Multimodal
Representation Alignment" (Tjandrasuwita et al. 2025, arXiv 2502.16282). Stages, one or several to a YAML (`stages:`):

    python exp_alignment_corr.py configs/alignment_synthetic.yaml    # synthetic: controlled uniqueness, no data needed
    python exp_alignment_corr.py configs/alignment_prh.yaml --demo   # align, uniqueness: layer-wise features of two sets of models
    python exp_alignment_corr.py configs/alignment_mmimdb.yaml       # mmimdb: linear probes against alignment, per genre
    python exp_alignment_corr.py configs/clip_finetune.yaml          # finetune: does adding a contrastive loss help a classifier?

Each prints its table last: raw score, chance (mean of the permutation null), calibrated score and p, correlations with n and p.

Shapes: N items, L layers, D features, K permutations; a stack is [N, L, D], [N, D] (one layer), or a list of [N, D_l]. U unique and R = 8 - U
shared bits decide the synthetic label; u is the share of a caption's words that were replaced, in percent.

Deviations from the recipes this follows:
- unbiased CKA and CKNNA have no epsilon (it gives a self-similarity of .12 at mean cosine .99); features are centred first, sums are float64;
- SVCCA is exact; neighbours are never searched in bfloat16; equal cosines are ordered by index; scores keep their sign;
- every score stands beside a permutation null of the *maximum over layer pairs* (the same permutation for all layers);
- files whose ids differ or are in another order are an error; MM-IMDb's genres are matched by name;
- probes and fine-tuning choose on dev, never on test; every contrastive weight gets the same number of steps, and several seeds.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import dataclasses
import functools
import glob
import itertools
import json
import math
import operator
import re
import sys
import time
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
SVCCA_DIMS = 10
NEAR_TIE = 2e-6  # cosines closer than this in float32 are computed again in float64
BLOCK_BYTES = 2**28  # what is N x N is made in row blocks of about this size
KEPT_BYTES = 2**31  # and the N x N of all layers are kept up to this size
# MM-IMDb's genres by frequency, the order of the reference's class_idx.
GENRES_BY_FREQUENCY = ("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery", "Sci-Fi",
                       "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western", "Sport", "Short", "Film-Noir")


# ---------------------------------------------------------------------------------------------------------------- config

@dataclass
class AlignmentConfig:
    metrics: list[Literal[METRICS]] = field(
        default_factory=lambda: ["mutual_knn", "unbiased_cka"])  # scores to compute; the curve against N shows the first
    k: int = ranged(10, ">= 1")  # neighbours
    clamp_quantile: float = ranged(0.95, "> 0", "<= 1")  # features are clamped to this quantile of |value| of the whole stack (1: not)
    clamp_exact: bool = True  # that quantile itself (false: mean over samples of each one's quantile)
    n_permutations: int = ranged(200, ">= 19")  # K, of the null of the maximum over layer pairs
    alpha: float = ranged(0.05, "> 0", "< 1")  # level of the threshold that calibrated scores are measured from
    ladder: list[str] = field(default_factory=list)  # extra language models: pca:WIDTH of the last layer, tfidf:WIDTH of the captions or plots


@dataclass
class SyntheticConfig:
    uniqueness: list[int] = field(default_factory=lambda: [0, 2, 4, 6, 8])  # U, unique bits among the label's 8
    transform_depths: list[int] = field(default_factory=lambda: [1, 3, 10])  # D, tanh blocks that x2 passes through
    x2_depths: list[int] = field(default_factory=lambda: [1, 3, 6, 10])  # layers of x2's encoder
    x1_depth: int = ranged(1, ">= 1")  # layers of x1's encoder
    n_seeds: int = ranged(1, ">= 1")  # data, transforms and encoders are drawn anew for seed, seed + 1, ...
    n_samples: int = ranged(65536, ">= 4000")  # split 70/15/15
    label_seed: int = ranged(2, ">= 0")  # of the label's weights
    epochs: int = ranged(10, ">= 1")  # of each encoder, the best on validation kept
    batch_size: int = ranged(512, ">= 2")  # samples a step
    learning_rate: float = ranged(5e-3, "> 0")  # Adam
    k: int = ranged(100, ">= 1")  # neighbours among the test batch
    n_test: int = ranged(512, ">= 16")  # test samples that alignment is measured on


@dataclass
class MMIMDbConfig:
    dir: str = "mmimdb"  # folder with split.json, labels/, latents/, dataset/ (plots); index files train, dev, test if there are
    language_dir: str = ""  # folder of layer-wise language features by film id (empty: the text latents in dir/latents)
    vision_dir: str = ""  # likewise of the posters (empty: the image latents)
    epochs: int = ranged(100, ">= 1")  # of the linear probes
    batch_size: int = ranged(64, ">= 2")  # films a step
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 5e-4, 1e-3, 5e-3])  # of the probes, each with each weight decay
    weight_decays: list[float] = field(default_factory=lambda: [0, 0.1, 0.01, 0.001, 0.0001])  # AdamW


@dataclass
class FinetuneConfig:
    class_idx: int | str = 19  # genre by name, or by its place in frequency order (19: Western)
    weights: list[float] = field(default_factory=lambda: [0, 0.1, 0.25, 0.5, 1, 2, 5, 10])  # w: of InfoNCE beside the classifier's loss
    n_seeds: int = ranged(3, ">= 1")  # runs of each weight: seed, seed + 1, ...
    epochs: int = ranged(30, ">= 1")  # same steps for every weight
    warmup_epochs: int = ranged(10, ">= 0")  # linear, then cosine to min_learning_rate
    batch_size: int = ranged(64, ">= 2")  # films a step
    learning_rate: float = ranged(1e-4, "> 0")  # AdamW
    min_learning_rate: float = ranged(1e-6, ">= 0")  # at the end
    weight_decay: float = ranged(0.01, ">= 0")  # not on 1-D parameters
    embed_dim: int = ranged(512, ">= 1")  # of the towers


@dataclass
class Config:
    experiment: str = "alignment_corr"  # which script a YAML belongs to
    seed: int = ranged(0, ">= 0", "< 4294967296")  # weights, data order, permutations
    device: str = "auto"  # auto | cuda | mps | cpu
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv to Weights & Biases
    stages: list[Literal["synthetic", "align", "uniqueness", "mmimdb", "finetune"]] = field(
        default_factory=lambda: ["synthetic"])  # what to run, in order
    features_dir: str = ""  # language features: folder or pattern of .pt files; {u} or {} stands for the caption level, {BASE_DIR} for that variable
    vision_dir: str = ""  # vision features (empty: features_dir, told apart by pool_x and pool_y)
    pool_x: str = ""  # use only language files of this pooling (empty: any)
    pool_y: str = ""  # use only vision files of this pooling (empty: any)
    align_dir: str = ""  # score matrices, one file a level (empty: the run folder's alignment/; {u} as above)
    plot_dir: str = ""  # pictures of align and uniqueness (empty: the run folder)
    captions_file: str = ""  # JSON of captions and their rewrites, for the text-only baseline and the ladder's tfidf
    same_scale: bool = False  # one y range for all uniqueness panels
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    mmimdb: MMIMDbConfig = field(default_factory=MMIMDbConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


# --------------------------------------------------------------------------------------------------------------- metrics


def as_layers(stack):
    """A stack as a list of layers [N, D_l]: [N, L, D] holds L, [N, D] is one; a list is taken as it is. Raises: UserError."""
    layers = list(stack) if isinstance(stack, (list, tuple)) else [stack] if stack.ndim == 2 else list(stack.unbind(1)) if stack.ndim == 3 else []
    if not layers or any(x.ndim != 2 or x.shape[1] == 0 or len(x) != len(layers[0]) for x in layers):
        raise UserError(f"features must be [N, D] or [N, L, D], found {[list(x.shape) for x in layers] or list(stack.shape)}")
    for i, x in enumerate(layers):
        if not torch.isfinite(x.sum()) and len(bad := (~torch.isfinite(x).all(1)).nonzero()):  # the sum is the quicker test; it may overflow
            raise UserError(f"layer {i}: {len(bad)} of {len(x)} rows of features hold NaN or infinite values, the first is row {int(bad[0])}")
    return [x.cpu() if x.device.type == "mps" else x for x in layers]  # float64, which MPS lacks


def clamp_outliers(stack, q=0.95, exact=True):
    """Features clamped to [-t, t], one threshold t for the whole stack (Huh et al. 2024, appendix).

    exact: t is the int(q n) + 1 smallest of all n = N L D absolute values; else the mean over samples of each sample's q-quantile.
    Takes and returns [N, L, D], [N, D] or a list of [N, D_l]; q = 1 changes nothing. Raises: UserError if t is 0, which sparse features have.
    """
    layers = as_layers(stack)
    values = torch.cat([x.reshape(len(x), -1) for x in layers], dim=1).abs().float()  # [N, sum D_l]
    if exact:
        flat = values.flatten().cpu().numpy()
        place = min(int(q * flat.size), flat.size - 1)
        t = float(np.partition(flat, place)[place])
    else:
        t = float(np.quantile(values.cpu().numpy(), q, axis=1).mean())
    if t == 0 and values.any():
        raise UserError(f"the {q:g} quantile of |value| is 0, as most values are: clamping would leave nothing; set alignment.clamp_quantile=1")
    return [x.clamp(-t, t) for x in stack] if isinstance(stack, (list, tuple)) else stack.clamp(-t, t)


def unit_rows(x):
    """Rows of x [N, D] at unit length, in float32 unless x is float64; zero rows stay zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1, eps=1e-30)


def products(x, start, stop):
    """x[start:stop] @ x.T in float32 without TF32; the whole of it by its upper blocks, as it is symmetric."""
    x, n = x.float(), len(x)
    with common.full_precision():
        if stop - start < n:
            return x[start:stop] @ x.T
        out, size = x.new_empty(n, n), max(256, (n + 3) // 4)
        for i in range(0, n, size):
            out[i:i + size, i:] = x[i:i + size] @ x[i:].T
            out[i + size:, i:i + size] = out[i:i + size, i + size:].T
    return out


def nearest_neighbours(x, k):
    """The k nearest rows by cosine, without the row itself, best first, equal cosines by lowest index.

    x [N, D] -> (indices [N, k] int64, cosines [N, k] float32, number of rows with a tie at the k-th place). The cosines are those of float64
    products: a float32 search finds the candidates, rows with near ties are searched again.
    """
    n, device = len(x), x.device
    unit, out, ties = unit_rows(x), [], 0
    rows_at_once = max(1, BLOCK_BYTES // (16 * n))
    for start in range(0, n, rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, n), device=device)
        cosines = products(unit, start, start + len(rows))
        cosines[rows - start, rows] = -torch.inf
        values, indices = cosines.topk(min(k + 1, n - 1), dim=1)
        if len(close := (values.diff(dim=1) > -NEAR_TIE).any(1).nonzero()[:, 0]):
            exact = x.double()
            lengths = exact.square().sum(1).sqrt().clamp(min=1e-300)
            # rounded: copies of a row tie whatever the order of summation
            again = (exact[rows[close]] @ exact.T / lengths[rows[close], None] / lengths).float()
            again[torch.arange(len(close), device=device), rows[close]] = -torch.inf
            again, order = again.sort(dim=1, descending=True, stable=True)
            values[close], indices[close] = again[:, :values.shape[1]], order[:, :values.shape[1]]
            if n - 1 > k:
                ties += int((values[:, k - 1] == values[:, k]).sum())
        out.append((indices[:, :k], values[:, :k]))
    return *(torch.cat(parts) for parts in zip(*out, strict=True)), ties


def left_singular_vectors(x, n_vectors):
    """The first left singular vectors [N, n_vectors] of x [N, D] float64 (zero columns beyond its rank), to a residual of 1e-10.

    Block Krylov iteration on the smaller Gram matrix with Rayleigh-Ritz (Musco & Musco 2015, arXiv 1504.05477); a full
    eigendecomposition where that has not converged.
    """
    wanted = min(n_vectors, *x.shape)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # [m, m]
    m = len(gram)
    block = torch.randn(min(m, wanted + 10), m, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).to(x.device) @ gram
    basis, applied = gram.new_empty(0, m), gram.new_empty(0, m)  # rows: orthonormal vectors v, and v G
    for _ in range(12):
        for _ in range(2):
            block = torch.linalg.qr((block - block @ basis.T @ basis).T).Q.T
        basis, applied = torch.cat([basis, block[:m - len(basis)]]), torch.cat([applied, block[:m - len(basis)] @ gram])
        values, ritz = (part.flip(-1)[..., :wanted] for part in torch.linalg.eigh(applied @ basis.T))
        vectors = ritz.T @ basis
        if len(basis) == m or (ritz.T @ applied - values[:, None] * vectors).norm(dim=1).max() <= 1e-10 * values[0]:
            break
        block = applied[-len(block):]
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0)[:wanted], vectors.T.flip(0)[:wanted]
    vectors = vectors * (values > 1e-12 * values[0])[:, None]
    left = vectors.T if m == len(x) else F.normalize(x @ vectors.T, dim=0, eps=1e-300)
    return F.pad(left, (0, n_vectors - wanted))


def centred_rows(x):
    """Unit rows less their mean, [N, D] float32, scaled to a total square of 1."""
    x = unit_rows(x)
    for _ in range(2):  # the first mean is rounded
        x = x - x.mean(0, dtype=torch.float64).to(x.dtype)
    return (x / x.norm().clamp(min=1e-30)).float()


def standardized(x):
    """Columns of centred x [N, D] divided by their norms; constant ones stay 0."""
    norms = x.square().sum(0).sqrt()
    return x / norms.clamp(min=max(1e-12 * float(norms.max()), 1e-300))


def prepare(stack, metric, k=10):
    """What `scores` needs of one side, computed once a layer: neighbour lists, centred Grams or singular vectors; a dict of tensors [L, ...]."""
    layers = as_layers(stack)
    n = len(layers[0])
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    if n < 4 or (metric in KNN_METRICS and not 1 <= k < n):
        raise UserError(f"{metric} needs more than k = {k} and at least 4 rows, found {n}")
    if metric in KNN_METRICS:
        found = [nearest_neighbours(x, k) for x in layers]
        side = {"n": n, "k": k, "ties": [ties for *_, ties in found], "near": torch.stack([indices for indices, *_ in found])}
        if metric == "cknna":
            side["cosines"] = torch.stack([cosines for _, cosines, _ in found]).double()
            side["mutual"] = torch.stack([(near[near] == torch.arange(n, device=near.device)[:, None, None]).any(2) for near in side["near"]])
            side["self"] = torch.cat([masked_hsic(side, i, {key: side[key][i:i + 1] for key in ("near", "cosines", "mutual")})
                                      for i in range(len(layers))])
        return side
    centred = [centred_rows(x) for x in layers]
    if metric == "svcca":
        return {"n": n, "vectors": torch.stack([left_singular_vectors(standardized(x.double()), SVCCA_DIMS) for x in centred])}
    side = {"n": n, "unbiased": metric == "unbiased_cka", "features": centred}
    if 4 * len(layers) * n * n <= KEPT_BYTES:
        side["gram"] = gram_rows(side, 0, n)
        side["norm"] = torch.linalg.vector_norm(side["gram"], dim=2).double().square().sum(1).sqrt()
    else:
        side["norm"] = gram_products(side, side).diagonal().sqrt()
    return side


def gram_rows(side, start, stop):
    """Rows of the centred Gram matrices [L, stop - start, N] float32 of features centred first, which keeps the digits at a mean cosine of .99.

    For the unbiased estimator they are U-centred (Szekely & Rizzo 2014, eq. 3.1), which makes HSIC (Song et al. 2012, eq. 4) a plain inner product.
    """
    if "gram" in side:
        return side["gram"][:, start:stop]
    out = []
    for x in side["features"]:
        gram = products(x, start, stop)
        if side["unbiased"]:  # the columns of x sum to 0, so without its diagonal row i of the Gram sums to -squares[i]
            n, squares = len(x), x.square().sum(1)
            gram += (squares[start:stop, None] + squares) / (n - 2) - squares.sum() / ((n - 1) * (n - 2))
            gram.diagonal(start).zero_()
        out.append(gram)
    return torch.stack(out)


def permuted(side, order):
    """`prepare(stack[order])` from `prepare(stack)`, without another search or product."""
    out = dict(side)
    if "near" in side:
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        out["near"] = place[side["near"][:, order]]
        out |= {key: side[key][:, order] for key in ("cosines", "mutual") if key in side}
    elif "vectors" in side:
        out["vectors"] = side["vectors"][:, order]
    else:
        out["features"] = [x[order] for x in side["features"]]
        if "gram" in side:
            out["gram"] = side["gram"][:, order][:, :, order]
    return out


def neighbour_tables(near, reverse=False):
    """For each block of rows i: (first row, table [block * N, L] float32), where entry (i N + j, l) is 1 if j is among the neighbours of i in layer l
    of near [L, N, k], or with `reverse` i among those of j; else 0."""
    n_layers, n, _ = near.shape
    size = max(1, min(n, BLOCK_BYTES // (64 * n * n_layers)))  # small blocks stay in the cache
    for start in range(0, n, size):
        stop = min(start + size, n)
        table = torch.zeros((stop - start) * n, n_layers, device=near.device)
        if reverse:
            layer, j, place = ((near >= start) & (near < stop)).nonzero(as_tuple=True)
            table[(near[layer, j, place] - start) * n + j, layer] = 1
        else:
            i = torch.arange(stop - start, device=near.device)[:, None]
            table[(i * n + near[:, start:stop]).flatten(1), torch.arange(n_layers, device=near.device)[:, None]] = 1
        yield start, table


def scores(a, b, metric):
    """All layer pairs of two sides from `prepare` at once: [La, Lb] float64. Definitions: see the function of the metric's name."""
    n = a["n"]
    if metric in ("mutual_knn", "cycle_knn"):
        mutual = metric == "mutual_knn"
        kept, other, total = (b, a, 0) if mutual else (a, b, 0)
        for start, table in kept.get("tables") or neighbour_tables(kept["near"], reverse=not mutual):
            near = other["near"][:, start:start + len(table) // n]  # [L, rows, k]
            pairs = n * torch.arange(near.shape[1], device=near.device)[:, None] + near
            found = F.embedding_bag(pairs.flatten(0, 1), table, mode="sum" if mutual else "max")  # of the k pairs of a row: [L rows, L of kept]
            total = total + found.view(*near.shape[:2], -1).sum(1, dtype=torch.float64)
        return total / (n * a["k"]) if mutual else total.T / n
    if metric == "svcca":
        u, v = a["vectors"], b["vectors"]  # [L, N, 10]
        ranks = torch.minimum((u != 0).any(1).sum(1)[:, None], (v != 0).any(1).sum(1))
        return torch.linalg.svdvals(torch.einsum("anr,bns->abrs", u, v).cpu()).sum(2).to(u.device) / ranks.clamp(min=1)
    if metric in ("cka", "unbiased_cka"):
        return gram_products(a, b) / (a["norm"][:, None] * b["norm"]).clamp(min=1e-300)
    if metric == "cknna":
        own = a["self"][:, None] * b["self"]  # of one sign, or too few mutual neighbours for a score: 0
        return torch.stack([masked_hsic(a, i, b) for i in range(len(a["near"]))]) / own.sqrt().nan_to_num(0).clamp(min=1e-300) * (own > 1e-30)
    k, out = a["k"], []
    rows = max(1, BLOCK_BYTES // (len(b["near"]) * k * k))
    for near in a["near"]:
        total = 0
        for start in range(0, n, rows):
            same = near[start:start + rows].T[:, None, None] == b["near"][:, start:start + rows].permute(2, 0, 1)[None]  # [k, k, Lb, rows]
            total = total + compare_lists(same.to(torch.int8 if k < 127 else torch.int16), metric).sum(1)
        out.append(total.double() / n if metric == "lcs_knn" else 1 - total.double() / (n * k))
    return torch.stack(out)


def highest(metric, k):
    """The largest score of a metric: that of lcs_knn counts items, those of the others are shares or correlations."""
    return k if metric == "lcs_knn" else 1


def compare_lists(same, metric):
    """Longest common subsequence (lcs_knn) or else Levenshtein distance of two lists, [...] int64, by dynamic programming over their beginnings.

    same [k, k, ...]: 1 where item i of one list is item j of the other, in a whole-number type that holds k + 1.
    """
    k, longest = len(same), metric == "lcs_knn"
    above = [torch.full_like(same[0, 0], 0 if longest else j) for j in range(k + 1)]
    for i in range(k):
        row = [above[0] if longest else above[0] + 1]
        for j in range(k):
            if longest:
                row.append(torch.maximum(torch.maximum(above[j + 1], row[j]), above[j] + same[i, j]))
            else:
                row.append(torch.minimum(torch.minimum(above[j + 1], row[j]) + 1, above[j] + 1 - same[i, j]))
        above = row
    return above[k].long()


def gram_products(a, b):
    """<K, L> [La, Lb] float64 over all pairs of (U-)centred Gram matrices, in blocks of rows."""
    n = a["n"]
    total, size = 0, max(1, BLOCK_BYTES // (16 * n * (len(a["features"]) + len(b["features"]))))
    for start in range(0, n, size):
        stop = min(start + size, n)
        total = total + gram_rows(a, start, stop).double().flatten(1) @ gram_rows(b, start, stop).double().flatten(1).T
    return total


def masked_hsic(a, layer, b):
    """CKNNA's HSIC_u [Lb] of one layer of a with every layer of b: both Grams zeroed but for the (i, j) where j is a neighbour of i in both."""
    n = a["n"]
    same = a["near"][layer][:, :, None] == b["near"][:, :, None, :]  # [Lb, N, k, k]
    found = same.any(3)
    cosines = (same * b["cosines"][:, :, None, :]).sum(3)  # of b, at the neighbours of a
    both = (same & b["mutual"][:, :, None, :]).any(3) & a["mutual"][layer]
    of_a = a["cosines"][layer] * found
    columns = torch.zeros(len(found), n, dtype=of_a.dtype, device=of_a.device).scatter_add(1, a["near"][layer].flatten().expand(len(found), -1),
                                                                                           of_a.flatten(1))
    trace = (of_a * cosines * both).sum((1, 2))
    sums = of_a.sum((1, 2)) * cosines.sum((1, 2))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * (columns * cosines.sum(2)).sum(1) / (n - 2)) / (n * (n - 3))


def prepare_both(stack_a, stack_b, metric, k):
    """`prepare` of two stacks of the same N items. Raises: UserError."""
    a, b = as_layers(stack_a), as_layers(stack_b)
    if len(a[0]) != len(b[0]):
        raise UserError(f"the two sides have {len(a[0])} and {len(b[0])} items; they must be the same items in the same order")
    return prepare(a, metric, k), prepare(b, metric, k)


def alignment_matrix(stack_a, stack_b, metric, k=10):
    """Scores of all layer pairs, [La, Lb] float64, of two stacks of the same N items in the same order, [N, L, D] or lists of [N, D_l].

    metric: one of METRICS, each defined at the function of its name below; those take one layer a side, a [N, Da] and b [N, Db], and return a float.
    Rows are L2-normalised inside. Raises: UserError for an unknown metric, N <= k, N < 4, different N, non-finite features.
    """
    return scores(*prepare_both(stack_a, stack_b, metric, k), metric)


def mutual_knn(a, b, k=10):
    """Mean overlap of the two sets of k nearest neighbours / k (Huh et al. 2024, appendix A); a, b [N, D]; in [0, 1], chance k / (N - 1)."""
    return alignment_matrix(a, b, "mutual_knn", k).item()


def cycle_knn(a, b, k=10):
    """Share of items i that are among a's neighbours of some j of b's neighbours of i; a, b [N, D]; in [0, 1], chance 1 - (1 - k / (N - 1))^k.

    Asymmetric, and raised by hubs.
    """
    return alignment_matrix(a, b, "cycle_knn", k).item()


def lcs_knn(a, b, k=10):
    """Mean longest common subsequence of the two lists of k neighbours, nearest first; a, b [N, D]; in [0, k]."""
    return alignment_matrix(a, b, "lcs_knn", k).item()


def edit_distance_knn(a, b, k=10):
    """1 - mean Levenshtein distance of the two lists of k neighbours, nearest first, / k; a, b [N, D]; in [0, 1], chance near 0."""
    return alignment_matrix(a, b, "edit_distance_knn", k).item()


def cka(a, b):
    """Linear CKA (Kornblith et al. 2019, eq. 1); a [N, Da], b [N, Db]; in [0, 1], chance about [(1 + N / Da)(1 + N / Db)]^-1/2: biased."""
    return alignment_matrix(a, b, "cka").item()


def unbiased_cka(a, b):
    """Linear CKA with the unbiased HSIC (Song et al. 2012, eq. 4); a, b [N, D]; at most 1, chance 0, possibly negative."""
    return alignment_matrix(a, b, "unbiased_cka").item()


def cknna(a, b, k=10):
    """Unbiased CKA with both Grams restricted to pairs that are neighbours of each other in a and in b (Huh et al. 2024, appendix A); a, b [N, D].

    1 of a with itself, chance about 0, 0 where there are too few such pairs.
    """
    return alignment_matrix(a, b, "cknna", k).item()


def svcca(a, b):
    """Mean canonical correlation of the first 10 singular directions of the standardised features (Raghu et al. 2017); a, b [N, D]; in [0, 1]."""
    return alignment_matrix(a, b, "svcca").item()


def calibrate(score, null, alpha=0.05):
    """A score against its null [K]: p = (1 + #null >= score) / (K + 1); threshold tau = the ceil((1 - alpha)(K + 1))-th smallest of null and
    score together; calibrated = max(0, (score - tau) / (1 - tau)). Returns: dict of floats."""
    null = np.asarray(null)
    place = math.ceil(round((1 - alpha) * (len(null) + 1), 6))  # rounded: .3 * 10 must not be 3.0000000000000004
    tau = float(np.sort(np.append(null, score))[max(place, 1) - 1])
    return {"score": float(score), "p_value": float((1 + (null >= score).sum()) / (len(null) + 1)), "threshold": tau,
            "calibrated": max(0.0, (float(score) - tau) / (1 - tau)) if tau < 1 else 0.0, "null_mean": float(null.mean())}


def null_of_maximum(a, others, metric, n_permutations, seed, alpha):
    """The best layer pair of a prepared side with each of the others, against the null of that maximum: the items of the others are permuted by
    successive draws of RandomState(seed).permutation(N), one for all layers. Returns: for each `calibrate`'s dict, with `layers` (of a, of the
    other) of the best pair, `matrix` of scores [La, Lb], and `null` [K]; lcs_knn is divided by k, so that 1 is its largest value, as of all."""
    if metric == "mutual_knn" and 4 * sum(len(b["near"]) for b in others) * a["n"] ** 2 <= KEPT_BYTES:
        others = [{**b, "tables": list(neighbour_tables(b["near"]))} for b in others]
    unit, draws, nulls = highest(metric, a.get("k")), np.random.RandomState(seed), []
    matrices = [scores(a, b, metric) / unit for b in others]
    for _ in range(n_permutations):
        order = torch.from_numpy(np.argsort(draws.permutation(a["n"]))).to(matrices[0].device)  # the inverse, of a: the same pairs
        turned = permuted(a, order)
        nulls.append(torch.stack([scores(turned, b, metric).max() / unit for b in others]))
    return [{**calibrate(matrix.max().item(), null, alpha), "layers": list(divmod(int(matrix.argmax()), matrix.shape[1])),
             "matrix": matrix.tolist(), "null": null} for matrix, null in zip(matrices, torch.stack(nulls).T.tolist(), strict=True)]


def permutation_null(stack_a, stack_b, metric, k=10, n_permutations=200, seed=0, alpha=0.05):
    """The best layer pair's score against the permutation null of that maximum (Westfall & Young 1993), of stacks [N, L, D].

    Returns: the dict of `null_of_maximum` (`score`, `p_value`, `threshold`, `calibrated`, ...). Raises: as `alignment_matrix`.
    """
    a, b = prepare_both(stack_a, stack_b, metric, k)
    return null_of_maximum(a, [b], metric, n_permutations, seed, alpha)[0]


def score_interval(x, y, metric, k=10, n_resamples=1000, seed=0):
    """A 95% interval (low, high) of the score of two layers [N, D] (lcs_knn: divided by k). Rows are never resampled before the search,
    where copies would be neighbours.

    mutual_knn: bootstrap over the rows' overlaps. Others: delete-half jackknife (Shao & Wu 1989), from halves drawn without replacement; (nan, nan)
    where half the rows are too few for the metric.
    """
    draws = np.random.RandomState(seed)
    if metric == "mutual_knn":
        near_x, near_y = nearest_neighbours(x, k)[0], nearest_neighbours(y, k)[0]
        overlap = (near_x[:, :, None] == near_y[:, None, :]).any(2).double().mean(1).cpu().numpy()
        means = overlap[draws.randint(len(x), size=(n_resamples, len(x)))].mean(1)
        return tuple(np.quantile(means, [0.025, 0.975]).tolist())
    if len(x) // 2 < 4 or (metric in KNN_METRICS and len(x) // 2 <= k):
        return math.nan, math.nan
    halves = [torch.from_numpy(draws.permutation(len(x))[:len(x) // 2]).to(x.device) for _ in range(40)]
    spread = 1.96 * float(np.std([alignment_matrix(x[half], y[half], metric, k).item() for half in halves]))
    score, unit = alignment_matrix(x, y, metric, k).item(), highest(metric, k)
    return (score - spread) / unit, (score + spread) / unit


# ------------------------------------------------------------------------------------------------------------ statistics

def ranks(values):
    """Ranks from 1, equal values sharing their mean rank."""
    values = np.asarray(values, dtype=float)
    return np.array([((values < v).sum() + (values <= v).sum() + 1) / 2 for v in values])


def student_p(t, dof):
    """Two-sided p of Student's t, by the integral of cos^(dof - 1) that x = tan(angle) sqrt(dof) turns its density into."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (dof - 1)
    inside = angles >= math.atan(abs(t) / math.sqrt(dof))
    return float(min(1.0, density[inside].sum() / density.sum()))


@functools.lru_cache(maxsize=256)
def rank_sum_counts(x, y):
    """How many permutations p give each value of sum x_i y_p(i) (whole numbers, x and y sorted): exact, by recursion over the subsets of y used."""
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
    """Spearman's rho with its two-sided p over n pairs: exact by permutation up to n = 12, beyond that Student's t with n - 2 degrees of freedom.

    Returns: dict rho, p, n; rho and p are nan for n < 3 or when one side is constant.
    """
    n, rx, ry = len(x), ranks(x), ranks(y)
    if n < 3 or rx.std() == 0 or ry.std() == 0:
        return {"rho": math.nan, "p": math.nan, "n": n}
    rho = float(np.corrcoef(rx, ry)[0, 1])
    if n > 12:
        return {"rho": rho, "p": 0.0 if abs(rho) > 1 - 1e-12 else student_p(rho * math.sqrt((n - 2) / (1 - rho**2)), n - 2), "n": n}
    whole_x, whole_y = (2 * rx).astype(int), (2 * ry).astype(int)  # mean ranks may be halves
    counts = rank_sum_counts(tuple(sorted(whole_x.tolist())), tuple(sorted(whole_y.tolist())))
    middle = whole_x.sum() * whole_y.sum() / n
    extreme = np.abs(np.arange(len(counts)) - middle) >= abs((whole_x * whole_y).sum() - middle) - 1e-6
    return {"rho": rho, "p": float(counts[extreme].sum() / counts.sum()), "n": n}


def slope(x, y):
    """Least-squares slope of y on x with its two-sided p (Student's t, n - 2 degrees of freedom); nan for n < 3 or constant x."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0:
        return {"slope": math.nan, "p": math.nan, "n": len(x)}
    if np.ptp(y) == 0:  # the fit would leave rounding errors, and a p of those
        return {"slope": 0.0, "p": 1.0, "n": len(x)}
    gradient, offset = np.polyfit(x, y, 1)
    error = math.sqrt(max(((y - gradient * x - offset) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum(), 1e-300))
    return {"slope": float(gradient), "p": student_p(gradient / error, len(x) - 2), "n": len(x)}


def benjamini_hochberg(p_values):
    """q-values of the false discovery rate (Benjamini & Hochberg 1995); nan stays nan and is not counted."""
    p = np.asarray(p_values, dtype=float)
    q, known = np.full(len(p), math.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known])]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1) if len(order) else []
    return q.tolist()


# ------------------------------------------------------------------------------------------------- data: synthetic label

def label_distribution(seed=2, temperature=0.05):
    """p(y | 8 bits) [256, 4] float64, row r the bits of r (first bit highest): softmax of bits @ W / T with W Uniform(0, 1) [8, 4] of unit rows,
    rescaled until every class mean is within .01 of 1/4."""
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
    """Which of the label's 8 bits each side sees, as (bits of x1, bits of x2): R = 8 - U shared ones first, then U // 2 of x1, the rest of x2."""
    shared, own = list(range(8 - uniqueness)), list(range(8 - uniqueness, 8))
    return shared + own[:uniqueness // 2], shared + own[uniqueness // 2:]


def label_information(p, bits):
    """I(bits; y) in nats, of uniform bits and the label distribution p [256, 4]; bits: which of the 8 are seen."""
    seen = (np.arange(256)[:, None] >> (7 - np.array(bits)) & 1) @ (1 << np.arange(len(bits)))
    joint = np.stack([p[seen == value].sum(0) for value in range(1 << len(bits))]) / 256  # [2^bits, 4]
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint * np.log(joint / independent)).sum())


def z_scored(x, rows):
    """x [n, D] standardised with the statistics of some of its rows."""
    return (x - x[rows].mean(0)) / x[rows].std(0).clamp(min=1e-6)


def draw_synthetic(s, seed):
    """x1, {D: x2} [n, 12] float32 standardised with the training split's statistics, labels {U: [n] int64}, and the splits {name: rows}."""
    g = torch.Generator().manual_seed(seed)
    common_bits, own_1, own_2 = (torch.randint(2, (s.n_samples, width), generator=g) for width in (8, 4, 4))
    n_train, n_val = int(0.7 * s.n_samples), int(0.15 * s.n_samples)
    splits = dict(zip(("train", "val", "test"), torch.arange(s.n_samples).split([n_train, n_val, s.n_samples - n_train - n_val]), strict=True))
    p, labels = torch.from_numpy(label_distribution(s.label_seed)), {}
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


# --------------------------------------------------------------------------------------------------- data: feature files

@dataclass
class Features:
    """One model's features of N items."""
    model: str
    layers: list  # of [N, D_l] float tensors
    ids: list | None  # [N] strings; None if the file does not say
    bpb: float | None = None  # a language model's bits per byte on the captions
    path: str = ""
    synthetic: bool = False


def clamped(path, layers, a):
    """`clamp_outliers` as the section `a` says. Raises: UserError naming the file."""
    try:
        return clamp_outliers(layers, a.clamp_quantile, a.clamp_exact)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_features(path, a, device, pool=""):
    """Features of one .pt file, clamped as the section `a` (AlignmentConfig) says; None if the file says that it was pooled otherwise.

    The file holds {feats [N, L, D], ids [, dims, model, bpb, pool]} or a bare tensor. Raises: UserError naming the file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise kinds of their own on a damaged file
        raise UserError(f"{path}: not a readable .pt file of tensors ({common.reason_of(error)}); "
                        "extract the features again") from None
    if isinstance(content, torch.Tensor):
        warnings.warn(f"{path}: a bare tensor; the order of its items was not checked", stacklevel=2)
        content = {"feats": content}
    feats = content.get("feats") if isinstance(content, dict) else None
    if not isinstance(feats, torch.Tensor) or feats.ndim not in (2, 3) or not feats.is_floating_point() or 0 in feats.shape:
        found = f"{feats.dtype} {list(feats.shape)}" if isinstance(feats, torch.Tensor) else type(feats).__name__
        raise UserError(f"{path}: expected float features [N, L, D] under the key feats, found {found}")
    if pool and content.get("pool", pool) != pool:
        return None
    feats = feats[:, None] if feats.ndim == 2 else feats
    ids, dims, bpb = (content.get(key) for key in ("ids", "dims", "bpb"))
    try:
        ids = None if ids is None else [str(i.item() if isinstance(i, torch.Tensor) else i) for i in ids]
        dims = [feats.shape[2]] * feats.shape[1] if dims is None else [int(d) for d in dims]
        bpb = None if bpb is None else float(bpb)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: ids and dims must be lists of names and of widths, bpb a number ({error})") from None
    if ids is not None and len(ids) != len(feats):
        raise UserError(f"{path}: {len(feats)} rows of features but {len(ids)} ids")
    if len(dims) != feats.shape[1] or not all(0 < d <= feats.shape[2] for d in dims):
        raise UserError(f"{path}: dims must give the width of each of the {feats.shape[1]} layers, at most {feats.shape[2]}, found {dims}")
    if bpb is not None and not math.isfinite(bpb):
        raise UserError(f"{path}: bpb (bits per byte) is {bpb}; leave it out or correct it")
    layers = clamped(path, [feats[:, i, :d].float() for i, d in enumerate(dims)], a)
    if constant := sum(int((x.amax(1) == x.amin(1)).sum()) for x in layers if x.shape[1] > 1):
        warnings.warn(f"{path}: {constant} constant rows (no direction to compare) over all layers, after the clamp", stacklevel=2)
    return Features(str(content.get("model") or Path(path).stem), [x.to(device) for x in layers], ids, bpb, str(path), bool(content.get("synthetic")))


def at_level(pattern, level=None):
    """A path with {BASE_DIR} from the environment and {u} (or {}) replaced by the level."""
    if "{BASE_DIR}" in pattern:
        if not os.environ.get("BASE_DIR"):
            raise UserError(f"{pattern}: the environment variable BASE_DIR is not set")
        pattern = pattern.replace("{BASE_DIR}", os.environ["BASE_DIR"])
    pattern = os.path.expanduser(pattern.replace("{}", "{u}"))
    return pattern if level is None else pattern.replace("{u}", str(level))


def caption_levels(pattern):
    """The levels u, ascending, that a path with the placeholder {u} has on disk. Raises: UserError if there are none."""
    pattern = at_level(pattern)
    if "{u}" not in pattern:
        raise UserError(f"features_dir={pattern}: uniqueness needs the placeholder {{u}} in it, one folder or file a caption level")
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\{u\}", r"(\d+)", 1).replace(r"\{u\}", r"\d+")
    found = (re.fullmatch(expression, path) for path in glob.glob(pattern.replace("{u}", "*"), recursive=True))
    levels = sorted({int(match[1]) for match in found if match})
    if not levels:
        raise UserError(f"{pattern}: no such files for any level u; run encode.py alignment, correct features_dir=, or try --demo")
    return levels


def feature_files(pattern, pool, what):
    """Paths of the .pt files of a folder (searched through), file or pattern; those whose name says another `pool-...` are left out."""
    if not pattern:
        raise UserError(f"the folder of the {what} features is not set; give features_dir= (README, 'Data'), or try --demo")
    path = Path(pattern)
    files = sorted(path.rglob("*.pt")) if path.is_dir() else [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [f for f in files if not (m := re.search(r"pool-([a-z0-9]+)", f.name)) or not pool or m[1] == pool]
    if not files:
        raise UserError(f"{pattern}: no {what} feature files (.pt{f' of pool {pool}' if pool else ''}) there; "
                        "make them with encode.py alignment, correct the path, or try --demo")
    return files


def check_same_items(models):
    """UserError unless all Features are of the same items in the same order, as far as they carry ids."""
    known = next((m for m in models if m.ids is not None), models[0])
    for m in models:
        if len(m.layers[0]) != len(known.layers[0]):
            raise UserError(f"{m.path}: {len(m.layers[0])} items, but {known.path} has {len(known.layers[0])}; use features of the same items")
        if m.ids is not None and m.ids != known.ids:
            if sorted(m.ids) == sorted(known.ids):
                raise UserError(f"{m.path}: the same ids as {known.path} in another order; sort both alike")
            row = next(i for i, (x, y) in enumerate(zip(m.ids, known.ids, strict=True)) if x != y)
            raise UserError(f"{m.path}: other items than in {known.path}: row {row} is {m.ids[row]}, there {known.ids[row]}")


def named_once(models):
    """The same models; UserError if two have one name, by which results are told apart."""
    first = {}
    for m in models:
        if (other := first.setdefault(m.model, m)) is not m:
            raise UserError(f"{m.path}: a second model of the name {m.model} (the first is {other.path}); name them apart under the key model, "
                            "or choose one pooling with pool_x= or pool_y=")
    return models


def files_of_sides(cfg, level):
    """[("language", pool, files), ("vision", pool, files)] at a caption level (None: the paths have no placeholder). Raises: UserError."""
    sides = (("language", cfg.pool_x, cfg.features_dir), ("vision", cfg.pool_y, cfg.vision_dir or cfg.features_dir))
    return [(what, pool, feature_files(at_level(pattern, level), pool, what)) for what, pool, pattern in sides]


def read_models(cfg, level, device):
    """(language models, vision models) as lists of Features at a caption level. Raises: UserError."""
    sides = []
    for what, pool, files in files_of_sides(cfg, level):
        models = [m for f in files if (m := read_features(f, cfg.alignment, device, pool)) is not None]
        if not models:
            key = "pool_x" if what == "language" else "pool_y"
            raise UserError(f"{files[0].parent}: no {what} features of pool {pool}; set {key}= to their `pool`, or leave it empty")
        sides.append(named_once(models))
    if {m.path for m in sides[0]} & {m.path for m in sides[1]}:
        raise UserError(f"{sides[0][0].path} is on both sides; set vision_dir=, or pool_x= and pool_y= to tell language from vision features")
    check_same_items(sides[0] + sides[1])
    return sides


def read_captions(path):
    """{u: [N captions]}, u = 0 the originals, of a JSON list of {name: {sentences: {"Caption i - u%": text}[, original: text]}}.

    Raises: UserError.
    """
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
        levels = {}
        for item in items:
            (body,) = item.values()
            texts = {int(re.search(r"(\d+)\s*%", key)[1]): text for key, text in body["sentences"].items()}
            if "original" in body:
                texts[0] = body["original"]
            for u, text in texts.items():
                if not isinstance(text, str):
                    raise TypeError(f"a caption of {u}% is {text!r}")
                levels.setdefault(u, []).append(text)
        if 0 not in levels or len({len(texts) for texts in levels.values()}) != 1:
            raise ValueError("every item needs its original (0%) and the same levels; found "
                             + ", ".join(f"{len(texts)} of {u}%" for u, texts in levels.items()))
    except OSError as error:
        raise UserError(f"{path}: the captions cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a JSON list of {{name: {{sentences: {{'Caption i - u%': text}}}}}} ({error})") from None
    return dict(sorted(levels.items()))


def tfidf(texts, reference, width=4096):
    """Hashed TF-IDF [N, width] float32 with unit rows: column crc32(word) % width, value sqrt(count) * idf, idf = ln((1 + N) / (1 + df)) + 1 from the
    reference texts (Salton & Buckley 1988, with smoothed idf)."""
    def count(texts):
        counts = np.zeros((len(texts), width), dtype=np.float32)
        for row, text in enumerate(texts):
            np.add.at(counts[row], [zlib.crc32(word.encode()) % width for word in re.findall(r"\w+", text.lower())], 1)
        return counts
    seen = count(reference)
    idf = np.log((1 + len(reference)) / (1 + (seen > 0).sum(0))) + 1
    return F.normalize(torch.from_numpy(np.sqrt(seen if texts is reference else count(texts)) * idf).float(), dim=1)


def climb(ladder, models, texts, fit=slice(None)):
    """The language models and those that a ladder adds: pca:WIDTH cuts the last layer of the first model to its first principal components (of the
    rows `fit`), tfidf:WIDTH is hashed TF-IDF of the texts (idf from the rows `fit`). Returns Features; raises UserError."""
    extra, base = [], models[0]
    for rung in ladder:
        kind, _, width = rung.partition(":")
        if kind not in ("pca", "tfidf") or not width.isdigit() or int(width) < 1:
            raise UserError(f"alignment.ladder: expected pca:WIDTH or tfidf:WIDTH, found {rung!r}")
        x, width = base.layers[-1], int(width)
        if kind == "pca":
            if width > min(x[fit].shape):
                raise UserError(f"alignment.ladder: {rung}: {base.model} has {x.shape[1]} features of {len(x[fit])} items")
            mean = x[fit].mean(0)
            x = (x - mean) @ torch.linalg.svd(x[fit] - mean, full_matrices=False)[2][:width].T
        else:
            if texts is None or len(texts) != len(x):
                raise UserError(f"alignment.ladder: {rung} needs the texts of the {len(x)} items: captions_file=, or the plots in mmimdb.dir/dataset")
            x = tfidf(texts, texts if fit == slice(None) else [texts[i] for i in fit.tolist()], width).to(x.device)
        extra.append(Features(f"{kind}{width}", [x], base.ids, path=rung))
    return named_once(models + extra)


# --------------------------------------------------------------------------------------------------------- data: MM-IMDb

@dataclass
class Films:
    """MM-IMDb: labels by name, and features of both modalities, rows of the films of the split."""
    ids: list  # [N] film ids
    labels: torch.Tensor  # [N, 23] of 0/1
    genres: list  # [23] names
    splits: dict  # train, dev, test -> rows
    language: list  # of Features
    vision: list  # of Features
    test_sample: torch.Tensor  # rows of test that alignment is measured on
    files: list  # paths, for the fingerprint
    synthetic: bool


def read_index(path, films):
    """The films that an index file chooses of a part of the split: their ids, or their places in it, in lines or a JSON list. Raises: UserError."""
    try:
        text = path.read_text()
        chosen, known = json.loads(text) if text.lstrip().startswith("[") else text.split(), set(films)
        places = {str(i): film for i, film in enumerate(films)}
        if chosen := [v if v in known else places[v] for v in map(str, chosen)]:
            return chosen
        reason = "it is empty"
    except KeyError as error:
        reason = f"{error} is neither"
    except (OSError, ValueError) as error:
        reason = error
    raise UserError(f"{path}: expected ids of films that split.json has there, or their places from 0 to {len(films) - 1} ({reason})")


def read_films(cfg, device):
    """Films of cfg.mmimdb: labels/, split.json, and the features of language_dir and vision_dir or the latents. Raises: UserError naming the file."""
    m, root = cfg.mmimdb, Path(at_level(cfg.mmimdb.dir))
    label_files = [root / "labels" / name for name in ("labels_all_23.npy", "ids_all.txt", "class_names_23.json")]
    for path in (root / "split.json", *label_files):
        if not path.is_file():
            raise UserError(f"{path}: no such file; point mmimdb.dir= at the MM-IMDb folder (README, 'Data'), or try --demo")
    try:
        labels, all_ids, genres = np.load(label_files[0]), label_files[1].read_text().split(), json.loads(label_files[2].read_text())
    except Exception as error:  # numpy, json and the file system raise kinds of their own
        raise UserError(f"{root / 'labels'}: the label files cannot be read ({type(error).__name__}: {error}); make them again") from None
    if labels.shape != (len(all_ids), len(genres)) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{label_files[0]}: expected {len(all_ids)} x {len(genres)} (ids_all.txt, class_names_23.json) of 0 and 1, found "
                        f"{list(labels.shape)} of {', '.join(map(str, np.unique(labels)[:4]))}")
    split, row_of = common.read_json(root / "split.json"), {film: row for row, film in enumerate(all_ids)}
    chosen = {}
    for part in ("train", "dev", "test"):
        if not isinstance(split.get(part), list) or not split[part]:
            raise UserError(f"{root / 'split.json'}: no films of {part}")
        chosen[part] = [str(film) for film in split[part]]
        if index_file := next((p for p in (root / part, root / f"{part}.txt", root / f"{part}.json") if p.is_file()), None):
            chosen[part] = read_index(index_file, chosen[part])
        if missing := [film for film in chosen[part] if film not in row_of]:
            raise UserError(f"{root / 'split.json'}: {len(missing)} films of {part} are not in {label_files[1]}, the first is {missing[0]}")
    ids = [film for part in chosen.values() for film in part]
    if len(set(ids)) != len(ids):
        raise UserError(f"{root / 'split.json'}: a film is in two parts of the split, or twice in one")
    files, sides = [root / "split.json", *label_files], []
    for what, folder, modality in (("language", m.language_dir, "text"), ("vision", m.vision_dir, "image")):
        if folder:
            paths = feature_files(at_level(folder), "", what)
            models = [read_features(p, cfg.alignment, "cpu") for p in paths]
            if unknown := [f.path for f in models if f.ids is None]:
                raise UserError(f"{unknown[0]}: features of films need their ids")
        else:
            paths = sorted((root / "latents").glob(f"mm_imdb1_globals_aug*_{modality}.npy"))
            if not paths:
                raise UserError(f"{root / 'latents'}: no mm_imdb1_globals_aug*_{modality}.npy; put the latents there, "
                                f"or set mmimdb.{what}_dir= to a folder of features")
            models = [read_latents(p, all_ids, cfg.alignment) for p in paths]
        for f in named_once(models):
            place = {film: row for row, film in enumerate(f.ids)}
            if missing := [film for film in ids if film not in place]:
                raise UserError(f"{f.path}: {len(missing)} of the split's {len(ids)} films have no features, the first is {missing[0]}")
            f.layers, f.ids = [x[[place[film] for film in ids]].to(device) for x in f.layers], ids
        files, sides = [*files, *paths], [*sides, models]
    splits = dict(zip(chosen, torch.arange(len(ids), device=device).split([len(films) for films in chosen.values()]), strict=True))
    n_test = len(splits["test"])
    sample = torch.from_numpy(np.sort(np.random.RandomState(cfg.seed).permutation(n_test)[:1024])).to(device)
    labels = torch.from_numpy(labels[[row_of[film] for film in ids]].astype(np.float32)).to(device)
    return Films(ids, labels, genres, splits, *sides, splits["test"][sample], files, bool(split.get("synthetic")))


def read_latents(path, ids, a):
    """The clean views of one latent file as Features of one layer; row = views * film + view."""
    try:
        rows = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy raises kinds of its own on a damaged file
        raise UserError(f"{path}: not a readable .npy file ({type(error).__name__}); encode it again") from None
    manifest_file = path.with_name(f"{path.stem}_manifest.json")
    views = common.read_json(manifest_file).get("views_per_sample") if manifest_file.is_file() else None
    if not isinstance(views, int) or rows.ndim != 2 or len(rows) != views * len(ids):
        raise UserError(f"{path}: expected {len(ids)} films x views_per_sample of {manifest_file.name} ({views}) rows, found {list(rows.shape)}")
    layers = clamped(path, [torch.from_numpy(rows[::views].astype(np.float32))], a)
    return Features(path.stem.split("_", 4)[-1], layers, list(ids), path=str(path))


def film_texts(root, ids):
    """The plots of the films, [N] strings, from dataset/{id}.json."""
    texts = []
    for film in ids:
        plot = common.read_json(Path(root) / "dataset" / f"{film}.json").get("plot", "")
        texts.append(" ".join(plot) if isinstance(plot, list) else str(plot))
    return texts


# ------------------------------------------------------------------------------------------------ data: what a model trains on

@dataclass
class Data:
    """What one job of a stage trains on: tensors of n rows each, and the rows of each split."""
    stage: str
    job: dict  # what sets this job apart: printed, and saved with its history
    tensors: dict  # name -> [n, ...]
    splits: dict  # train, val, test -> rows
    jobs: list  # of the stage
    source: object  # what all jobs share: {seed: draw_synthetic} or Films


SAVE_SECONDS = 10  # between checkpoints inside a job; a job's end is always saved
TRAINED = ("synthetic", "mmimdb", "finetune")


def load_data(cfg, stage=None):
    """Data of a stage that trains (default: the first in cfg.stages), with its last job selected, the largest. Raises: UserError."""
    stage = stage or next((s for s in cfg.stages if s in TRAINED), None)
    if stage is None:
        raise UserError(f"the stages {', '.join(cfg.stages)} train nothing")
    device, k = common.pick_device(cfg.device), cfg.alignment.k
    if stage == "synthetic":
        s = cfg.synthetic
        depths = [*s.transform_depths, *s.x2_depths]
        if min(depths) < 1 or not all(0 <= u <= 8 for u in s.uniqueness):
            raise UserError("synthetic: uniqueness takes numbers from 0 to 8, transform_depths and x2_depths from 1")
        if s.n_test > 0.15 * s.n_samples or s.k >= s.n_test:
            raise UserError(f"synthetic: n_test={s.n_test} must be at most 15% of n_samples={s.n_samples} and more than k={s.k}")
        seeds = range(cfg.seed, cfg.seed + s.n_seeds)
        sides = [("x1", s.x1_depth), *(("x2", depth) for depth in s.x2_depths)]
        jobs = [{"seed": seed, "side": side, "depth": depth} for seed in seeds for side, depth in sides]
        source = {"config": s, "device": device}
    else:
        source = read_films(cfg, device)
        if len(source.test_sample) <= k:
            raise UserError(f"{cfg.mmimdb.dir}: {len(source.test_sample)} test films are too few for alignment.k={k} neighbours")
        if stage == "mmimdb":
            ladder = cfg.alignment.ladder
            texts = film_texts(at_level(cfg.mmimdb.dir), source.ids) if any(rung.startswith("tfidf") for rung in ladder) else None
            source.language = climb(ladder, source.language, texts, source.splits["train"])
            jobs = [{"model": m.model} for m in source.language]
        else:
            f, genre = cfg.finetune, genre_of(cfg.finetune.class_idx, source.genres)
            if f.warmup_epochs >= f.epochs:
                raise UserError(f"finetune.warmup_epochs={f.warmup_epochs} must be less than finetune.epochs={f.epochs}")
            for part, rows in source.splits.items():
                if not 0 < source.labels[rows, source.genres.index(genre)].sum() < len(rows):
                    raise UserError(f"finetune.class_idx: {genre} has none or all of the {len(rows)} films of {part}; choose another genre")
            jobs = [{"seed": seed, "weight": w, "genre": genre} for w in f.weights for seed in range(cfg.seed, cfg.seed + f.n_seeds)]
    return select(Data(stage, {}, {}, {}, jobs, source), jobs[-1])


def random_data(cfg):
    """Random tensors of CLIP's widths for one batch, last job selected: for profile_flops.py where the data are not at hand."""
    stage, device = next(s for s in cfg.stages if s in TRAINED), common.pick_device(cfg.device)
    section = getattr(cfg, stage)
    n = section.batch_size
    x, labels = torch.randn(2, n, 512, device=device), torch.zeros(n, 23, device=device)
    labels[::4] = 1
    if stage == "mmimdb":
        job, tensors = {"model": "random"}, {"features": x[0], "labels": labels}
    else:
        job, tensors = {"seed": cfg.seed, "weight": max(cfg.finetune.weights)}, {"image": x[0], "text": x[1], "labels": labels[:, 0]}
    return Data(stage, job, tensors, {"train": torch.arange(n, device=device)}, [job], None)


def total_steps(cfg, data):
    """Optimisation steps of the selected job."""
    section = getattr(cfg, data.stage)
    return section.epochs * max(1, len(data.splits["train"]) // section.batch_size)


def genre_of(class_idx, genres):
    """A genre's name from its name or its place in the frequency order. Raises: UserError."""
    name = GENRES_BY_FREQUENCY[class_idx] if isinstance(class_idx, int) and 0 <= class_idx < 23 else class_idx
    match = next((g for g in genres if g.lower() == str(name).lower()), None)
    if match is None:
        raise UserError(f"finetune.class_idx={class_idx}: no such genre; use 0 to 22 (by frequency) or one of {', '.join(genres)}")
    return match


def select(data, job):
    """The same data with another job's tensors."""
    if data.stage == "synthetic":
        s, device, seed = data.source["config"], data.source["device"], job["seed"]
        if seed not in data.source:  # one draw is held at a time
            data.source = {"config": s, "device": device, seed: draw_synthetic(s, seed)}
        x1, x2, labels, splits = data.source[seed]
        pairs = [(u, depth) for u in s.uniqueness for depth in (s.transform_depths if job["side"] == "x2" else [None])]
        inputs = torch.stack([x2[depth] if depth else x1 for _, depth in pairs], dim=1)  # [n, E, 12]
        tensors = {"inputs": inputs.to(device), "labels": torch.stack([labels[u] for u, _ in pairs], dim=1).to(device)}
        splits = {name: rows.to(device) for name, rows in splits.items()}
    else:
        films = data.source
        splits = {"train": films.splits["train"], "val": films.splits["dev"], "test": films.splits["test"]}
        if data.stage == "mmimdb":
            x = next(m for m in films.language if m.model == job["model"]).layers[-1]
            tensors = {"features": z_scored(x, splits["train"]), "labels": films.labels}
        else:
            image, text = (z_scored(models[0].layers[-1], splits["train"]) for models in (films.vision, films.language))
            tensors = {"image": image, "text": text, "labels": films.labels[:, films.genres.index(job["genre"])]}
    return dataclasses.replace(data, job=job, tensors=tensors, splits=splits)


def make_batch(data, indices):
    """{name: rows of each tensor of the job}."""
    return {name: x[indices] for name, x in data.tensors.items()}


# ----------------------------------------------------------------------------------------------------------------- model

class Encoders(nn.Module):
    """E independent MLPs of one depth, trained at once: `depth` blocks Linear(12), LeakyReLU(.01), then Linear(4). Inputs [B, E, 12]."""

    def __init__(self, n_encoders, depth, width=12, n_classes=4):
        super().__init__()
        bound = width**-0.5  # nn.Linear's default initialisation
        self.weight = nn.Parameter(torch.empty(n_encoders, depth, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_encoders, depth, 1, width).uniform_(-bound, bound))
        self.head_weight = nn.Parameter(torch.empty(n_encoders, width, n_classes).uniform_(-bound, bound))
        self.head_bias = nn.Parameter(torch.empty(n_encoders, 1, n_classes).uniform_(-bound, bound))

    def forward(self, inputs):
        """(logits [E, B, 4], hidden layers, a list of [E, B, 12])."""
        x, hidden = inputs.transpose(0, 1), []
        for weight, bias in zip(self.weight.unbind(1), self.bias.unbind(1), strict=True):
            x = F.leaky_relu(torch.baddbmm(bias, x, weight), 0.01)
            hidden.append(x)
        return torch.baddbmm(self.head_bias, x, self.head_weight), hidden

    def losses(self, batch):
        logits, _ = self(batch["inputs"])
        total = F.cross_entropy(logits.permute(1, 2, 0), batch["labels"], reduction="sum")
        return {"loss": total / len(batch["labels"])}  # the sum of the E mean losses

    @torch.no_grad()
    def score(self, data, split):
        """Accuracy of each encoder, [E]."""
        rows = data.splits[split]
        hits = sum((self(data.tensors["inputs"][r])[0].argmax(2) == data.tensors["labels"][r].T).sum(1) for r in rows.split(8192))
        return hits / len(rows)


class Probes(nn.Module):
    """Linear probes, one for each learning rate and weight decay, trained at once on the same batches. Inputs [B, D]."""

    def __init__(self, n_probes, dim, n_classes, pos_weight):
        super().__init__()
        self.weight = nn.ParameterList([torch.zeros(dim, n_classes) for _ in range(n_probes)])
        self.bias = nn.ParameterList([torch.zeros(n_classes) for _ in range(n_probes)])
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(self, features):
        """Logits [probes, B, classes]."""
        return torch.baddbmm(torch.stack(list(self.bias))[:, None], features.expand(len(self.weight), *features.shape),
                             torch.stack(list(self.weight)))

    def losses(self, batch):
        logits = self(batch["features"])
        each = F.binary_cross_entropy_with_logits(logits, batch["labels"].expand_as(logits), pos_weight=self.pos_weight, reduction="none")
        return {"loss": each.mean((1, 2)).sum()}

    @torch.no_grad()
    def score(self, data, split):
        """The best probe's macro F1."""
        return max(genre_f1(logits > 0, data.tensors["labels"][data.splits[split]]).mean()
                   for logits in self(data.tensors["features"][data.splits[split]]))


class TwoTower(nn.Module):
    """Trainable towers on frozen features, a classifier of one genre on the text embedding, and InfoNCE between the two, weighted by w."""

    def __init__(self, image_dim, text_dim, embed_dim, weight):
        super().__init__()
        def tower(dim):
            return nn.Sequential(nn.Linear(dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim))
        self.image, self.text, self.head = tower(image_dim), tower(text_dim), nn.Linear(embed_dim, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.contrastive_weight = weight

    def forward(self, batch):
        """(image embedding [B, E], text embedding [B, E], logit [B])."""
        text = self.text(batch["text"])
        return self.image(batch["image"]), text, self.head(text)[:, 0]

    def losses(self, batch):
        image, text, logit = self(batch)
        classify = F.binary_cross_entropy_with_logits(logit, batch["labels"])
        contrast = common.info_nce(F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1), self.log_scale.clamp(max=math.log(100)).exp())
        return {"loss": self.contrastive_weight * contrast + classify, "classify": classify, "contrast": contrast}

    @torch.no_grad()
    def score(self, data, split):
        """Average precision of the genre, which needs no threshold."""
        batch = make_batch(data, data.splits[split])
        logit = self(batch)[2]
        return torch.tensor(common.multilabel_metrics(logit[:, None], batch["labels"][:, None])["mAP"] if torch.isfinite(logit).all() else math.nan)


def best_threshold(logits, targets):
    """The logit [..] above which predicting maximises F1 on these films, [N] and 0/1 [N]: the middle between two neighbouring logits."""
    order = logits.argsort(descending=True)
    hits, n = targets[order].cumsum(0), torch.arange(1, len(order) + 1, device=order.device)
    cut = int((2 * hits / (n + targets.sum())).argmax())
    return logits[order][cut:cut + 2].mean()


def genre_f1(predicted, targets):
    """F1 of each column [C] from predictions and 0/1 targets [N, C]; 0/0 counts as 0."""
    hits = (predicted & (targets > 0)).sum(0)
    return 2 * hits / (predicted.sum(0) + targets.sum(0)).clamp(min=1)


def build_model(cfg, data):
    """The model of the selected job, on its device."""
    rows, x = data.splits["train"], data.tensors
    if data.stage == "synthetic":
        model = Encoders(x["inputs"].shape[1], data.job["depth"])
    elif data.stage == "mmimdb":
        positives = x["labels"][rows].sum(0)
        n_probes = len(cfg.mmimdb.learning_rates) * len(cfg.mmimdb.weight_decays)
        model = Probes(n_probes, x["features"].shape[1], len(positives), (len(rows) - positives) / positives.clamp(min=1))
    else:
        model = TwoTower(x["image"].shape[1], x["text"].shape[1], cfg.finetune.embed_dim, data.job["weight"])
    return model.to(rows.device)


def build_optimizer(cfg, model):
    """Adam for the encoders; AdamW with a group a probe, or without weight decay on 1-D parameters."""
    fused = next(model.parameters()).is_cuda
    if isinstance(model, Encoders):
        return torch.optim.Adam(model.parameters(), lr=cfg.synthetic.learning_rate, fused=fused)
    if isinstance(model, Probes):
        settings = itertools.product(cfg.mmimdb.learning_rates, cfg.mmimdb.weight_decays)
        return torch.optim.AdamW([{"params": [w, b], "lr": rate, "weight_decay": decay}
                                  for (rate, decay), w, b in zip(settings, model.weight, model.bias, strict=True)])
    matrices, vectors = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.finetune.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=cfg.finetune.learning_rate, fused=fused)


def train_step(model, batch, optimizer):
    """One step; returns the losses, a dict of 0-d tensors."""
    losses = model.losses(batch)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


# -------------------------------------------------------------------------------------------------------------- training

def learning_rate(f, epoch_fraction):
    """Learning rate of fine-tuning (section f) after that many epochs."""
    if epoch_fraction < f.warmup_epochs:
        return f.learning_rate * epoch_fraction / f.warmup_epochs
    factor = common.warmup_cosine(epoch_fraction - f.warmup_epochs, f.epochs - f.warmup_epochs, 0)
    return f.min_learning_rate + (f.learning_rate - f.min_learning_rate) * factor


def epoch_batches(data, batch_size, seed, epoch):
    """The epoch's batches of training rows: a pure function of seed and epoch; equal sizes, the remainder spread."""
    rows = data.splits["train"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000003 * seed + epoch)).to(rows.device)
    return rows[order].tensor_split(max(1, len(rows) // batch_size))


def train(cfg, stages=None, folder=None):
    """Train every job of the stages in turn, keeping each one's best epoch by validation; resumes exactly from checkpoint_latest.pt.

    best_model.pt holds {stage/job/parameter: tensor} of the best epochs, complete after each job. Returns the history, a row an epoch of a job.
    """
    folder = folder or start(cfg)
    latest, best_file = folder / "checkpoint_latest.pt", folder / "best_model.pt"
    history, done, finished, resumed = [], [], {}, None
    if latest.exists() or latest.with_name(f"{latest.name}.previous").exists():
        resumed = common.load_checkpoint(latest)
        history, done = resumed["history"], resumed["position"]["done"]
        finished = common.load_checkpoint(best_file)["model_state_dict"] if done else {}
    todo = [(stage, data, i) for stage in stages or cfg.stages if stage in TRAINED for data in [load_data(cfg, stage)]
            for i in range(len(data.jobs)) if f"{stage}/{i}" not in done]
    log = common.RunLog(folder, cfg.wandb and bool(todo), dataclasses.asdict(cfg))
    if history:  # a kill may have come between the last checkpoint and this file
        log.write(history)
    started = saved_at = time.time()
    with common.StopSignal() as stop:
        for stage, data, i in todo:
            data, section, name = select(data, data.jobs[i]), getattr(cfg, stage), f"{stage}/{i}"
            title = " ".join([stage, *(f"{k}={v}" for k, v in data.job.items())])  # no comma: a cell of metrics.csv
            seed, device = data.job.get("seed", cfg.seed), data.splits["train"].device
            common.seed_everything(seed)
            model = build_model(cfg, data)
            optimizer = build_optimizer(cfg, model)
            best, best_score, first_epoch = None, None, 0
            if resumed and resumed["position"]["job"] == name:
                model.load_state_dict(resumed["model_state_dict"])
                optimizer.load_state_dict(resumed["optimizer_state_dict"])
                common.set_rng_state(resumed["rng"])
                best = {k: v.to(device) for k, v in resumed["position"]["best"].items()}
                best_score, first_epoch = resumed["position"]["best_score"].to(device), resumed["epoch"]
                print(f"resuming {folder} in {title}, epoch {first_epoch + 1}")
            history = [row for row in history if row["job"] != title or row["epoch"] <= first_epoch]  # another stage may have been run in between
            for epoch in range(first_epoch, section.epochs):
                batches, losses = epoch_batches(data, section.batch_size, seed, epoch), []
                model.train()
                for step, rows in enumerate(batches):
                    for group in optimizer.param_groups if stage == "finetune" else []:
                        group["lr"] = learning_rate(section, epoch + (step + 1) / len(batches))
                    losses.append(train_step(model, make_batch(data, rows), optimizer)["loss"])
                losses = torch.stack(losses).tolist()
                model.eval()
                score, state = model.score(data, "val"), model.state_dict()
                bad = [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
                if bad := bad or ([] if torch.isfinite(score).all() else [len(losses)]):
                    raise FloatingPointError(f"non-finite loss or prediction in {title}, epoch {epoch + 1}, step {bad[0]}, learning rate "
                                             f"{optimizer.param_groups[0]['lr']:g}; lower the learning rate of {stage}")
                if best is None:
                    best_score, best = score, {k: v.clone() for k, v in state.items()}
                else:  # one score a model, or one for each of the E encoders, which lead in every parameter
                    better = score > best_score
                    best_score = torch.where(better, score, best_score)
                    best = {k: torch.where(better.view(-1, *[1] * (v.ndim - 1)) if better.ndim else better, v, best[k]) for k, v in state.items()}
                history.append({"stage": stage, "job": title, "epoch": epoch + 1, "train_loss": sum(losses) / len(losses),
                                "val_score": score.double().mean().item(), "learning_rate": optimizer.param_groups[0]["lr"]})
                last = epoch + 1 == section.epochs
                if last:
                    finished |= {f"{name}/{k}": v.cpu() for k, v in best.items()}
                    done = [*done, name]
                    common.save_checkpoint(best_file, {"model_state_dict": finished, "config": dataclasses.asdict(cfg)}, keep_previous=False)
                    print(f"{title}: {epoch + 1} epochs, best validation score {best_score.double().mean().item():.3f}", flush=True)
                if last or stop.signum or time.time() - saved_at > SAVE_SECONDS:
                    common.save_checkpoint(latest, {
                        "epoch": epoch + 1, "global_step": (epoch + 1) * len(batches), "best_val_loss": -best_score.double().mean().item(),
                        "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": {},
                        "scaler_state_dict": {}, "history": history, "config": dataclasses.asdict(cfg), "rng": common.rng_state(),
                        "position": {"done": done, "job": None if last else name, "best": {} if last else best, "best_score": best_score}})
                    log.write(history)
                    saved_at = time.time()
                if stop.signum:
                    raise common.Stopped(stop.signum, f"stopped in {title} after epoch {epoch + 1}; the same command goes on from {latest}")
            common.record_environment(folder, device=str(device), train_seconds=round(time.time() - started, 2))
    log.close()
    return history


def levels_of(cfg):
    """The caption levels of features_dir, or [None] where it has no placeholder and none is needed. Raises: UserError."""
    return caption_levels(cfg.features_dir) if "uniqueness" in cfg.stages or "{u}" in at_level(cfg.features_dir) else [None]


def start(cfg, fresh=False):
    """The run folder, after the checks that every stage needs: input files there, same config and same data as the folder's run."""
    cfg.fresh = fresh
    common.check_run(cfg)
    files = []
    if {"align", "uniqueness"} & set(cfg.stages):
        files += [f for level in levels_of(cfg) for _, _, found in files_of_sides(cfg, level) for f in found]
        files += [at_level(cfg.captions_file)] if cfg.captions_file else []
    if {"mmimdb", "finetune"} & set(cfg.stages):
        files += read_films(cfg, "cpu").files
    try:
        digest = common.fingerprint(dict.fromkeys(map(str, files)))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return common.open_run(cfg, digest)


# ------------------------------------------------------------------------------------------------------------ evaluation

def trained(model, states, data):
    """The model with the best parameters of the selected job, in eval mode."""
    prefix = f"{data.stage}/{data.jobs.index(data.job)}/"
    model.load_state_dict({k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)})
    return model.eval()


def summary(found):
    """The numbers of `null_of_maximum` that are reported."""
    return {key: found[key] for key in ("score", "p_value", "threshold", "calibrated", "null_mean")}


def correlation(metric, of, at, x, y):
    return {"metric": metric, "of": of, "at": at, **spearman(x, y)}


def grouped(rows, *keys):
    """{(values of the keys): [rows]}, in order of first appearance."""
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[key] for key in keys), []).append(r)
    return groups


def number(value, spec):
    """A number as text, a dash where it is not defined."""
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def correlation_table(correlations):
    rows = [[f"{c['metric']}: {c['of']}, {c['at']}", c["n"], number(c["rho"], "+.3f"), number(c["p"], ".2g")] for c in correlations]
    return common.format_table(["Spearman rank correlation", "n", "rho", "p"], rows)


def metric_header(metrics):
    return [column for metric in metrics for column in (metric, "chance", "calibrated")]


REPORTED = ("score", "null_mean", "calibrated")  # under that header


@torch.no_grad()
def evaluate_synthetic(cfg, data, states):
    """Alignment of x1's encoder with each of x2's on one test batch, and accuracies. Returns a dict of `rows` and `correlations`."""
    s, a = cfg.synthetic, cfg.alignment
    p, rows, members = label_distribution(s.label_seed), [], {}  # (seed, side, U) -> [(D, depth, accuracy, stack [n_test, L, 12])]
    for job in data.jobs:
        data = select(data, job)
        model = trained(build_model(cfg, data), states, data)
        accuracy = model.score(data, "test").tolist()
        hidden = torch.stack(model(data.tensors["inputs"][data.splits["test"][:s.n_test]])[1])  # [L, E, n_test, 12]
        grid = itertools.product(s.uniqueness, s.transform_depths if job["side"] == "x2" else [None])
        for e, (u, depth) in enumerate(grid):
            members.setdefault((job["seed"], job["side"], u), []).append((depth, job["depth"], accuracy[e], hidden[:, e].transpose(0, 1)))
    for (seed, side, u), found in members.items():
        if side == "x1":
            (_, _, accuracy_1, stack), = found
            for depth, x2_depth, accuracy_2, other in members[seed, "x2", u]:
                scored = {metric: summary(permutation_null(stack, other, metric, s.k, a.n_permutations, cfg.seed, a.alpha)) for metric in a.metrics}
                rows.append({"seed": seed, "U": u, "D": depth, "x2_depth": x2_depth, "accuracy_x1": accuracy_1, "accuracy_x2": accuracy_2, **scored})
    correlations = []
    for metric in a.metrics:
        for depth in s.transform_depths:
            # encoders of one draw share data and transform: their mean is one observation
            draws = grouped([r for r in rows if r["D"] == depth], "seed", "U")
            correlations.append(correlation(metric, "U, alignment (mean over encoders)", f"D={depth}", [u for _, u in draws],
                                            [np.mean([r[metric]["score"] for r in part]) for part in draws.values()]))
        for (u,), part in grouped(rows, "U").items():
            correlations.append(correlation(metric, "alignment, accuracy of x2", f"U={u}", [r[metric]["score"] for r in part],
                                            [r["accuracy_x2"] for r in part]))
    information = {u: {f"x{i}": label_information(p, bits) for i, bits in enumerate(side_bits(u), 1)} for u in s.uniqueness}
    return {"synthetic": True, "rows": rows, "correlations": correlations,
            "information_nats": {"x1, x2": label_information(p, range(8)), **information}, "n_test": s.n_test, "k": s.k}


def report_synthetic(result):
    metrics, table = list(dict.fromkeys(c["metric"] for c in result["correlations"])), []
    for (depth, u), part in sorted(grouped(result["rows"], "D", "U").items()):
        values = [[r[m][key] for r in part] for m in metrics for key in REPORTED] + [[r[key] for r in part] for key in ("accuracy_x1", "accuracy_x2")]
        table.append([f"D={depth} U={u}", len(part), *(f"{np.mean(v):.3f}" for v in values)])
    return (f"synthetic: alignment of x1's and x2's encoders, {result['n_test']} test samples, k = {result['k']}; means over n encoders of x2; "
            f"chance is the mean of the permutation null\nI(x1, x2; y) = {result['information_nats']['x1, x2']:.4f} nats\n"
            + common.format_table(["", "n", *metric_header(metrics), "acc. x1", "acc. x2"], table)
            + f"\n\n{correlation_table(result['correlations'])}")


def align_models(cfg, language, vision, path):
    """Every language model with every vision model by every metric: a list of dicts with `matrix` [La, Lb], best `layers`, the `summary` of the
    null and the number of rows with ties at the k-th neighbour. Read from `path` if it holds the same, else computed and saved there."""
    a, n, digest = cfg.alignment, len(language[0].layers[0]), 0
    if n <= a.k:
        raise UserError(f"{language[0].path}: {n} items are too few for alignment.k={a.k} neighbours")
    for x in (x for m in (*language, *vision) for x in m.layers):
        digest = zlib.crc32(x.cpu().numpy(), digest)
    identity = json.dumps([dataclasses.asdict(a), cfg.seed, [m.model for m in language], [m.model for m in vision], digest])
    if path.exists() and (known := common.load_checkpoint(path)).get("identity") == identity:
        return known["rows"]
    rows = []
    for metric in a.metrics:
        others = [prepare(m.layers, metric, a.k) for m in vision]
        for x in common.progress(language, metric):
            side = prepare(x.layers, metric, a.k)
            results = null_of_maximum(side, others, metric, a.n_permutations, cfg.seed, a.alpha)
            for y, other, found in zip(vision, others, results, strict=True):
                ties = sum(part["ties"][layer] for part, layer in zip((side, other), found["layers"], strict=True)) if "ties" in side else 0
                rows.append({"language": x.model, "vision": y.model, "metric": metric, "layers": found["layers"], "bpb": x.bpb, "n": n,
                             **summary(found), "ties": ties, "matrix": found["matrix"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, {"identity": identity, "rows": rows}, keep_previous=False)
    return rows


def align_file(cfg, level):
    folder = at_level(cfg.align_dir, level) if cfg.align_dir else Path(cfg.output_dir) / "alignment"
    return Path(folder) / ("alignment.pt" if level is None else f"alignment_u={level}.pt")


def evaluate_align(cfg):
    """All pairs at the lowest caption level, the score against N, and correlations over language models. Returns a dict."""
    a, device = cfg.alignment, common.pick_device(cfg.device)
    level = levels_of(cfg)[0]
    language, vision = read_models(cfg, level, device)
    language = climb(a.ladder, language, read_captions(at_level(cfg.captions_file))[0] if cfg.captions_file else None)
    rows, first = align_models(cfg, language, vision, align_file(cfg, level)), a.metrics[0]
    models = {(side, m.model): m for side, found in (("language", language), ("vision", vision)) for m in found}

    def best_layers(r):
        return [models[side, r[side]].layers[layer] for side, layer in zip(("language", "vision"), r["layers"], strict=True)]
    for r in rows:
        r["interval"] = score_interval(*best_layers(r), r["metric"], a.k)
    n, draws, by_size = rows[0]["n"], np.random.RandomState(cfg.seed), []
    best = [max((r for r in rows if (r["vision"], r["metric"]) == (m.model, first)), key=lambda r: r["score"]) for m in vision]
    for size in sorted({size for size in (n // 8, n // 4, n // 2, n) if size > max(a.k, 7)}):
        samples = [torch.from_numpy(draws.permutation(n)[:size]).to(device) for _ in range(5)]
        for r in best:
            x, y = best_layers(r)
            values = [alignment_matrix(x[s], y[s], first, a.k).item() / highest(first, a.k) for s in samples]
            by_size.append({"n": size, "vision": r["vision"], "language": r["language"], "mean": float(np.mean(values)),
                            "sd": float(np.std(values, ddof=1))})
    correlations = []
    for metric, y in itertools.product(a.metrics, vision):
        found = [r for r in rows if (r["metric"], r["vision"]) == (metric, y.model)]
        if len(scored := [r for r in found if r["bpb"] is not None]) >= 3:
            correlations.append(correlation(metric, "performance (- bits per byte), alignment", y.model, [-r["bpb"] for r in scored],
                                            [r["score"] for r in scored]))
        for kind in ("pca", "tfidf"):
            rungs = [r for r in found if re.fullmatch(rf"{kind}\d+", r["language"])]
            if len(rungs) >= 3:
                correlations.append(correlation(metric, f"width of the {kind} ladder, alignment", y.model,
                                                [int(r["language"].removeprefix(kind)) for r in rungs], [r["score"] for r in rungs]))
    return {"synthetic": any(m.synthetic for m in (*language, *vision)), "rows": rows, "against_n": by_size, "correlations": correlations,
            "level": level, "k": a.k}


def report_align(result):
    rows = result["rows"]
    table = [[f"{r['language']} - {r['vision']}", r["metric"], f"{r['score']:.4f}", " .. ".join(number(v, ".4f") for v in r["interval"]),
              f"{r['null_mean']:.4f}", f"{r['calibrated']:.4f}", f"{r['p_value']:.3g}", ", ".join(map(str, r["layers"])), r["ties"]] for r in rows]
    level = "" if result["level"] is None else f", u = {result['level']}"
    text = (f"align: {rows[0]['n']:,} items{level}; score of the best layer pair, its 95% interval, chance (mean of the null of the maximum), "
            f"calibrated score, p of that null; k = {result['k']}\n"
            + common.format_table(["language - vision", "metric", "score", "95%", "chance", "calibrated", "p", "layers", "ties"], table))
    return text + (f"\n\n{correlation_table(result['correlations'])}" if result["correlations"] else "")


def family(model):
    """A model's name without the parts that tell its size: vit_small_patch14_dinov2 is of vit_dinov2."""
    return "_".join(part for part in re.split(r"[_\-.]", model)
                    if not re.fullmatch(r"(tiny|small|base|large|huge|giant|[tsblhg]|patch)?\d*", part)) or model


BASELINE_METRICS = ("mutual_knn", "unbiased_cka")  # of the text-only baseline


def evaluate_uniqueness(cfg):
    """Alignment at every caption level: curves, correlations with u, with performance at each level, and the text-only baseline. Returns a dict."""
    a, device, rows = cfg.alignment, common.pick_device(cfg.device), []
    levels = caption_levels(cfg.features_dir)
    for level in levels:
        language, vision = read_models(cfg, level, device)
        found = align_models(cfg, language, vision, align_file(cfg, level))
        rows += [{k: v for k, v in r.items() if k != "matrix"} | {"u": level} for r in found]
        print(f"u = {level:3}: {len(language)} language x {len(vision)} vision models, mean {a.metrics[0]} "
              f"{np.mean([r['score'] for r in found if r['metric'] == a.metrics[0]]):.4f}", flush=True)
    curves, correlations = [], []
    for metric in a.metrics:
        of_metric = [r for r in rows if r["metric"] == metric]
        for (model,), part in grouped(of_metric, "vision").items():
            by_level = grouped(part, "u").values()  # ascending, as read
            curve = {key: [float(np.mean([r[key] for r in found])) for found in by_level] for key in ("score", "calibrated", "null_mean")}
            curves.append({"metric": metric, "vision": model, "u": levels, **curve})
            correlations.append(correlation(metric, "u, alignment (mean over language models)", model, levels, curve["score"]))
        for u, name in itertools.product(levels, dict.fromkeys(family(r["vision"]) for r in of_metric)):
            by_model = grouped([r for r in of_metric if r["u"] == u and family(r["vision"]) == name and r["bpb"] is not None], "language", "bpb")
            if len(by_model) >= 3:
                correlations.append(correlation(metric, "performance (- bits per byte), alignment (mean over sizes)", f"{name}, u={u}",
                                                [-bpb for _, bpb in by_model],
                                                [float(np.mean([r["score"] for r in found])) for found in by_model.values()]))
    baseline = None
    if cfg.captions_file:
        captions = read_captions(at_level(cfg.captions_file))
        original, rewritten = tfidf(captions[0], captions[0]), [u for u in captions if u > 0]
        vectors = [tfidf(captions[u], captions[0]) for u in rewritten]
        baseline = {"u": rewritten, "n": len(original), "k": a.k, **{
            metric: [alignment_matrix(original, x, metric, a.k).item() for x in vectors] for metric in BASELINE_METRICS}}
        correlations += [correlation(metric, "u, originals against rewrites (text-only TF-IDF)", Path(cfg.captions_file).name, rewritten,
                                     baseline[metric]) for metric in BASELINE_METRICS]
    return {"synthetic": any(m.synthetic for m in (*language, *vision)), "rows": rows, "curves": curves, "correlations": correlations,
            "text_only": baseline, "levels": levels, "n": rows[0]["n"], "k": a.k}


def report_uniqueness(result):
    table = []
    for c in result["curves"]:
        for key, label in (("score", f"{c['vision']}: {c['metric']}"), ("null_mean", "  chance"), ("calibrated", "  calibrated")):
            table.append([label, *(f"{v:.4f}" for v in c[key])])
    text = (f"uniqueness: alignment (mean over language models) against u, {result['n']:,} items, k = {result['k']}\n"
            + common.format_table(["vision model", *(f"u={u}" for u in result["levels"])], table))
    if t := result["text_only"]:
        text += (f"\n\ntext only: hashed TF-IDF of {t['n']:,} captions against their rewrites\n" + common.format_table(
            ["", *(f"u={u}" for u in t["u"])], [[m, *(f"{v:.4f}" for v in t[m])] for m in BASELINE_METRICS]))
    if not any("performance" in c["of"] for c in result["correlations"]):
        text += "\n\nno panels of performance: fewer than 3 language models carry bpb (bits per byte)"
    return f"{text}\n\n{correlation_table(result['correlations'])}"


@torch.no_grad()
def evaluate_mmimdb(cfg, data, states):
    """Probe scores of every language model, its alignment with the vision models on test films, and correlations over models per genre."""
    films, models = data.source, []
    settings = list(itertools.product(cfg.mmimdb.learning_rates, cfg.mmimdb.weight_decays))
    dev, test = films.splits["dev"], films.splits["test"]
    labels = films.labels[test]
    for job in data.jobs:
        data = select(data, job)
        probes, x = trained(build_model(cfg, data), states, data), data.tensors["features"]
        dev_f1 = [genre_f1(z > 0, films.labels[dev]).mean().item() for z in probes(x[dev])]
        chosen = int(np.argmax(dev_f1))
        logits = probes(x[test])[chosen]
        f1 = genre_f1(logits > 0, labels).tolist()
        models.append({"model": job["model"], "learning_rate": settings[chosen][0], "weight_decay": settings[chosen][1],
                       "dev_f1_macro": dev_f1[chosen], **common.multilabel_metrics(logits, labels), "f1": dict(zip(films.genres, f1, strict=True))})
    sides = [[dataclasses.replace(m, layers=[x[films.test_sample] for x in m.layers]) for m in side] for side in (films.language, films.vision)]
    rows, genres = align_models(cfg, *sides, align_file(cfg, None)), []
    for vision, metric in itertools.product([m.model for m in films.vision], cfg.alignment.metrics):
        x, part = [r["score"] for r in rows if (r["vision"], r["metric"]) == (vision, metric)], []
        for genre in ["macro", *films.genres]:
            y = [m["f1_macro"] if genre == "macro" else m["f1"][genre] for m in models]
            fit = slope(x, y)
            part.append({"vision": vision, "metric": metric, "genre": genre, **spearman(x, y), "slope": fit["slope"], "slope_p": fit["p"]})
        for p, q in (("p", "q"), ("slope_p", "slope_q")):
            for r, value in zip(part[1:], benjamini_hochberg([r[p] for r in part[1:]]), strict=True):
                r[q] = value
        genres += part
    always = {"f1_macro": float(genre_f1(torch.ones_like(labels, dtype=torch.bool), labels).mean())}
    return {"synthetic": films.synthetic, "models": models, "alignment": rows, "genres": genres, "chance": always, "n_test": len(test),
            "n_aligned": len(films.test_sample)}


def report_mmimdb(result):
    keys = ("f1_macro", "f1_micro", "f1_weighted", "mAP")
    score = {(r["language"], r["vision"], r["metric"]): r for r in result["alignment"]}
    columns = list(dict.fromkeys((r["vision"], r["metric"]) for r in result["alignment"]))
    table = [["chance: all genres of every film", f"{result['chance']['f1_macro']:.3f}", *["-"] * (len(keys) - 1 + 3 * len(columns))]]
    table += [[m["model"], *(number(m[key], ".3f") for key in keys),
               *(f"{score[(m['model'], *column)][key]:.3f}" for column in columns for key in REPORTED)] for m in result["models"]]
    forms = {"rho": "+.3f", "p": ".2g", "q": ".2g", "slope": "+.2f", "slope_p": ".2g", "slope_q": ".2g"}
    rows = [[g["genre"], g["n"], *(number(g.get(key), form) for key, form in forms.items())]
            for g in result["genres"] if (g["vision"], g["metric"]) == columns[0]]
    return (f"mmimdb: linear probes on {len(result['models'])} language models, {result['n_test']:,} test films, and alignment with the posters on "
            f"{result['n_aligned']:,}\n" + common.format_table(["language model", *keys, *metric_header(m for _, m in columns)], table)
            + f"\n\nF1 against alignment over language models ({columns[0][1]} with {columns[0][0]}): rho, slope; p, and q over the genres\n"
            + common.format_table(["genre", "n", "rho", "p", "q", "slope", "slope p", "slope q"], rows))


@torch.no_grad()
def evaluate_finetune(cfg, data, states):
    """Test F1 and alignment of the two towers for every weight and seed, each at its dev-chosen epoch."""
    a, rows = cfg.alignment, []
    for job in data.jobs:
        data = select(data, job)
        model = trained(build_model(cfg, data), states, data)
        test, dev, sample = (make_batch(data, part) for part in (data.splits["test"], data.splits["val"], data.source.test_sample))
        (image, text, _), logit, labels = model(sample), model(test)[2], test["labels"]
        threshold = best_threshold(model(dev)[2], dev["labels"])
        f1, f1_tuned = (genre_f1((logit > t)[:, None], labels[:, None]).item() for t in (0, threshold))
        index = torch.arange(len(text))
        retrieval = common.retrieval_metrics(F.normalize(text, dim=1), F.normalize(image, dim=1), index, index, ks=(10,))
        rows.append({"weight": job["weight"], "seed": job["seed"], "f1": f1, "f1_dev_threshold": f1_tuned,
                     "average_precision": common.multilabel_metrics(logit[:, None], labels[:, None])["mAP"], "text_to_image_R@10": retrieval["R@10"],
                     **{metric: summary(permutation_null(text, image, metric, a.k, a.n_permutations, cfg.seed, a.alpha)) for metric in a.metrics}})
    weights = [r["weight"] for r in rows]
    correlations = [correlation(metric, "w, alignment", "all runs", weights, [r[metric]["score"] for r in rows]) for metric in a.metrics]
    correlations += [correlation(key, f"w, {key}", "all runs", weights, [r[key] for r in rows]) for key in FINETUNE_SCORES]
    share = float(labels.mean())
    return {"synthetic": data.source.synthetic, "genre": data.jobs[0]["genre"], "rows": rows, "correlations": correlations, "n_test": len(labels),
            "n_positive": int(labels.sum()),
            "chance": {"f1": 2 * share / (1 + share), "f1_dev_threshold": 2 * share / (1 + share), "average_precision": share,
                       "text_to_image_R@10": 10 / len(text)}}


FINETUNE_SCORES = ("f1", "f1_dev_threshold", "average_precision")


def report_finetune(result):
    metrics, plain = [k for k, v in result["rows"][0].items() if isinstance(v, dict)], (*FINETUNE_SCORES, "text_to_image_R@10")

    def cell(values):
        return f"{np.mean(values):.3f}" + (f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
    table = [["chance: all positive", "", *(f"{result['chance'][k]:.3f}" for k in plain), *["-"] * (3 * len(metrics))]]
    for (w,), part in grouped(result["rows"], "weight").items():
        table.append([f"w = {w:g}", len(part), *(cell([r[k] for r in part]) for k in plain),
                      *(cell([r[m][k] for r in part]) for m in metrics for k in REPORTED)])
    return (f"finetune: genre {result['genre']}, {result['n_positive']} of {result['n_test']:,} test films; loss = w InfoNCE + BCE, "
            "epoch chosen on dev by AP; mean +- sd over seeds\n"
            + common.format_table(["", "seeds", "F1", "F1 (dev threshold)", "AP", "T2I R@10", *metric_header(metrics)], table)
            + f"\n\n{correlation_table(result['correlations'])}")


# ----------------------------------------------------------------------------------------------------------------- plots

def file_name(text):
    return re.sub(r"[^a-zA-Z0-9.]+", "_", text)


def stated(c):
    return f"rho {number(c['rho'], '+.2f')}, n = {c['n']}, p = {number(c['p'], '.2g')}"


def chance_line(axis, x, y):
    axis.plot(x, y, color="grey", linestyle=":", label="chance")


def label(axis, xlabel, ylabel, title=""):
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=8)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6)


def save(figure, path, title, synthetic=False):
    figure.suptitle(f"{title} (synthetic data)" if synthetic else title, fontsize=10)
    common.save_figure(figure, path)


def plot_synthetic(folder, result):
    """Two pictures a metric: alignment against U, a panel a depth D; accuracy of x2's encoders against alignment, a panel a U."""
    depths, levels = (sorted({r[key] for r in result["rows"]}) for key in ("D", "U"))
    for (metric,), correlations in grouped(result["correlations"], "metric").items():
        rho = {c["at"]: stated(c) for c in correlations}

        def means(rows, key, metric=metric):
            return [np.mean([r[metric][key] for r in rows if r["U"] == u]) for u in levels]
        figure, axes = common.new_figure(len(depths), width=3.8)
        for axis, depth in zip(axes, depths, strict=True):
            rows = [r for r in result["rows"] if r["D"] == depth]
            for (layers,), part in grouped(rows, "x2_depth").items():
                axis.plot(levels, means(part, "score"), marker=".", label=f"x2's encoder: {layers} layers")
            chance_line(axis, levels, means(rows, "null_mean"))
            label(axis, "unique bits U", f"alignment ({metric})", f"D = {depth}: {rho[f'D={depth}']}")
        save(figure, folder / f"alignment_vs_uniqueness_{metric}.png", "alignment against uniqueness", result["synthetic"])
        figure, axes = common.new_figure(len(levels), width=3.4)
        for axis, u in zip(axes, levels, strict=True):
            for (depth,), part in grouped([r for r in result["rows"] if r["U"] == u], "D").items():
                axis.scatter([r[metric]["score"] for r in part], [r["accuracy_x2"] for r in part], s=14, label=f"D = {depth}")
            label(axis, f"alignment ({metric})", "test accuracy of x2's encoder", f"U = {u}: {rho[f'U={u}']}")
        save(figure, folder / f"alignment_vs_performance_{metric}.png", "alignment against performance", result["synthetic"])


def plot_align(folder, result):
    """Heatmaps of all layer pairs, a picture a language model with the (at most six) vision models it agrees with best; the score against N."""
    for (metric, model), rows in grouped(result["rows"], "metric", "language").items():
        largest_score = max(r["score"] for r in result["rows"] if r["metric"] == metric)
        shown = sorted(rows, key=lambda r: -r["score"])[:6]
        figure, axes = common.new_figure(len(shown), width=3.6)
        for axis, r in zip(axes, shown, strict=True):
            image = axis.imshow(r["matrix"], vmin=min(0, np.min(r["matrix"])), vmax=largest_score, cmap="viridis", aspect="auto", origin="lower")
            axis.scatter(r["layers"][1], r["layers"][0], marker="x", color="red", label=f"best {r['score']:.3f}, calibrated {r['calibrated']:.3f}")
            for numbers in (axis.xaxis, axis.yaxis):
                numbers.get_major_locator().set_params(integer=True)
            label(axis, f"layer of {r['vision']}", f"layer of {model}")
        figure.colorbar(image, ax=axes, label=metric)
        best = f"; the best {len(shown)} of {len(rows)} vision models" if len(shown) < len(rows) else ""
        save(figure, folder / f"heatmap_{metric}_{file_name(model)}.png", f"{model}, {rows[0]['n']:,} items{best}", result["synthetic"])
    metric, sizes = result["rows"][0]["metric"], sorted({p["n"] for p in result["against_n"]})
    figure, (axis,) = common.new_figure(width=5.4)
    for (vision, language), part in grouped(result["against_n"], "vision", "language").items():
        axis.errorbar(sizes, [p["mean"] for p in part], [p["sd"] for p in part], marker=".", capsize=2, label=f"{vision} - {language}")
    if metric == "mutual_knn":
        chance_line(axis, sizes, [result["k"] / (n - 1) for n in sizes])
    axis.set_xticks(sizes)
    label(axis, "items N (5 subsamples, mean +- sd)", metric)
    save(figure, folder / "alignment_vs_n.png", "the score depends on N", result["synthetic"])


def plot_uniqueness(folder, result, same_scale):
    """A picture a metric: raw and calibrated alignment against u, and the text-only baseline; a picture a family of vision models where language
    models carry bits per byte: alignment against performance, a panel a level."""
    wanted = [u for u in (10, 30, 50, 70, 90) if u in result["levels"]] or result["levels"]
    for (metric,), curves in grouped(result["curves"], "metric").items():
        rho = {(c["of"].split(",")[0].split(" ")[0], c["at"]): stated(c) for c in result["correlations"] if c["metric"] == metric}
        text = result["text_only"] if metric in (result["text_only"] or ()) else None
        figure, axes = common.new_figure(3 if text else 2, width=5, height=4)
        for c in curves:
            axes[0].plot(c["u"], c["score"], marker=".", label=f"{c['vision']}: {rho['u', c['vision']]}")
            axes[1].plot(c["u"], c["calibrated"], marker=".")
        chance_line(axes[0], curves[0]["u"], curves[0]["null_mean"])
        label(axes[0], "u: share of words replaced [%]", metric)
        label(axes[1], "u: share of words replaced [%]", f"{metric}, calibrated")
        if text:
            found = next(c for c in result["correlations"] if c["metric"] == metric and "text-only" in c["of"])
            axes[2].plot(text["u"], text[metric], color="black", marker=".", label=f"TF-IDF: {stated(found)}")
            label(axes[2], "u: share of words replaced [%]", f"{metric}, originals with rewrites", f"text only, {text['n']:,} captions")
        save(figure, folder / f"alignment_vs_uniqueness_{metric}.png", f"alignment against caption uniqueness, {result['n']:,} items",
             result["synthetic"])
        rows = [r | {"family": family(r["vision"])} for r in result["rows"] if r["metric"] == metric and r["bpb"] is not None]
        for (name,), part in grouped(rows, "family").items():
            if any(("performance", f"{name}, u={u}") not in rho for u in wanted):
                continue
            figure, axes = common.new_figure(len(wanted), width=3.3)
            for axis, u in zip(axes, wanted, strict=True):
                for (model,), line in grouped([r for r in part if r["u"] == u], "vision").items():
                    axis.plot(*zip(*sorted((-r["bpb"], r["score"]) for r in line), strict=True), marker=".", label=model)
                label(axis, "- bits per byte", metric, f"u = {u}: {rho['performance', f'{name}, u={u}']}")
                if same_scale:
                    axis.set_ylim(min(0, min(r["score"] for r in part)), 1.05 * max(r["score"] for r in part))
            save(figure, folder / f"performance_{metric}_{file_name(name)}.png", f"{name}: alignment against language performance",
                 result["synthetic"])


def plot_mmimdb(folder, result):
    """Of the first vision model and metric: macro F1 against alignment, and over genres histograms of rho and slope."""
    macro, *genres = grouped(result["genres"], "vision", "metric")[result["genres"][0]["vision"], result["genres"][0]["metric"]]
    vision, metric = macro["vision"], macro["metric"]
    score = {r["language"]: r["score"] for r in result["alignment"] if (r["vision"], r["metric"]) == (vision, metric)}
    figure, axes = common.new_figure(3, width=4.4)
    for m in result["models"]:
        point = score[m["model"]], m["f1_macro"]
        axes[0].scatter(*point, color="tab:blue", s=18)
        axes[0].annotate(m["model"], point, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes[0].axhline(result["chance"]["f1_macro"], color="grey", linestyle=":", label="chance: every genre")
    axes[0].margins(x=0.2)  # room for the names
    label(axes[0], f"alignment ({metric}) with {vision}", "test macro F1", f"macro: {stated(macro)}")
    for axis, key, q, name in zip(axes[1:], ("rho", "slope"), ("q", "slope_q"), ("Spearman's rho", "slope"), strict=True):
        values = [g[key] for g in genres if math.isfinite(g[key])]
        axis.hist(values, bins=12)
        axis.axvline(0, color="grey", linewidth=1)
        label(axis, f"{name} of F1 against alignment", "genres",
              f"{len(values)} genres, {sum(g[q] < 0.05 for g in genres)} with q < .05; n = {macro['n']} models")
    save(figure, folder / "mmimdb_correlations.png", "does alignment predict the probes' F1?", result["synthetic"])


def plot_finetune(folder, result):
    """Test scores, and the alignment by each metric, against the contrastive weight: mean and standard deviation over seeds."""
    metrics, by_weight = [k for k, v in result["rows"][0].items() if isinstance(v, dict)], sorted(grouped(result["rows"], "weight").items())
    rho, places = {c["metric"]: stated(c) for c in result["correlations"]}, range(len(by_weight))
    figure, axes = common.new_figure(1 + len(metrics), width=4.2)
    for axis, keys in zip(axes, (FINETUNE_SCORES, *((m,) for m in metrics)), strict=True):
        for key in keys:
            values = [[r[key]["score"] if key in metrics else r[key] for r in part] for _, part in by_weight]
            bars = axis.errorbar(places, [np.mean(v) for v in values], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values], marker=".",
                                 capsize=2, label=key)
            if key in metrics:
                chance_line(axis, places, [np.mean([r[key]["null_mean"] for r in part]) for _, part in by_weight])
            elif key != "f1_dev_threshold":  # whose chance is f1's
                axis.axhline(result["chance"][key], color=bars[0].get_color(), linestyle=":", linewidth=1, label=f"{key}, all positive")
        axis.set_xticks(places, [f"{w:g}" for (w,), _ in by_weight])
        label(axis, "contrastive weight w", f"alignment ({keys[0]})" if keys[0] in metrics else "test score", f"{keys[0]}: {rho[keys[0]]}")
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, folder / "finetune.png", f"fine-tuning for {result['genre']}: mean +- sd over {len(by_weight[0][1])} seeds", result["synthetic"])


# ------------------------------------------------------------------------------------------------------------------ main

EVALUATE_REPORT_PLOT = {
    "synthetic": (evaluate_synthetic, report_synthetic, plot_synthetic), "align": (evaluate_align, report_align, plot_align),
    "uniqueness": (evaluate_uniqueness, report_uniqueness, plot_uniqueness), "mmimdb": (evaluate_mmimdb, report_mmimdb, plot_mmimdb),
    "finetune": (evaluate_finetune, report_finetune, plot_finetune)}
STAGES = ("all", *EVALUATE_REPORT_PLOT)


def evaluate(cfg, stages=None):
    """Evaluate every stage that results.json does not hold yet; writes results.json and the plots. Returns the results."""
    folder, file = Path(cfg.output_dir), Path(cfg.output_dir) / "results.json"
    if file.exists():
        results = common.read_json(file)
    else:
        data = common.read_json(folder / "environment.json").get("data_fingerprint")
        results = {"experiment": cfg.experiment, "seed": cfg.seed, "data_fingerprint": data, "synthetic": False, "stages": {}}
    plots = Path(at_level(cfg.plot_dir)) if cfg.plot_dir else folder
    plots.mkdir(parents=True, exist_ok=True)
    for stage in [s for s in stages or cfg.stages if s not in results["stages"]]:
        evaluate_stage, _, plot = EVALUATE_REPORT_PLOT[stage]
        inputs = (load_data(cfg, stage), common.load_checkpoint(folder / "best_model.pt")["model_state_dict"]) if stage in TRAINED else ()
        result = evaluate_stage(cfg, *inputs)
        plot(plots, result, **({"same_scale": cfg.same_scale} if stage == "uniqueness" else {}))
        results["stages"][stage], results["synthetic"] = result, results["synthetic"] or result["synthetic"]
        common.write_json(file, results)
    return results


@common.exit_codes
def main(argv):
    args = common.parse_command_line(argv, (Config,), __doc__, STAGES)
    cfg = common.load_config(Config, args.config, args.overrides, demo=args.demo)
    lists = ("stages", "alignment.metrics", "synthetic.uniqueness", "synthetic.transform_depths", "synthetic.x2_depths", "mmimdb.learning_rates",
             "mmimdb.weight_decays", "finetune.weights")
    for key, values in ((key, operator.attrgetter(key)(cfg)) for key in lists):
        if not values or len(set(values)) != len(values):
            raise UserError(f"{key} must name at least one, and each once")
    if args.stage not in ("all", *cfg.stages):
        raise UserError(f"{args.config} has the stages {', '.join(cfg.stages)}; for {args.stage} set stages='[{args.stage}]'")
    if args.demo:
        if any(override.startswith(("features_dir=", "vision_dir=", "captions_file=", "mmimdb.dir=")) for override in args.overrides):
            raise UserError("--demo brings its own data; leave it or the folders out")
        folder = demo_data.write_alignment("data/demo/alignment")
        cfg.features_dir, cfg.vision_dir, cfg.captions_file = f"{folder}/gpt_u={{u}}_features", f"{folder}/vision", f"{folder}/captions.json"
        cfg.mmimdb.dir = demo_data.write_mmimdb("data/demo/mmimdb")
    folder, stages = start(cfg, args.fresh), cfg.stages if args.stage == "all" else [args.stage]
    known = common.read_json(folder / "results.json")["stages"] if (folder / "results.json").exists() else ()
    if any(stage in TRAINED and stage not in known for stage in stages):
        train(cfg, stages, folder)
    results = evaluate(cfg, stages)
    for stage in stages:
        kind = "controlled" if stage == "synthetic" else "demo"
        marked = f"  [SYNTHETIC {kind} data]" if results["stages"][stage]["synthetic"] else ""
        first, _, rest = EVALUATE_REPORT_PLOT[stage][1](results["stages"][stage]).partition("\n")
        print(f"\n{first}{marked}\n{rest}")
    print(f"files: {folder}/ (results.json, *.png)")


if __name__ == "__main__":
    sys.exit(main())
