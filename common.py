"""What the five experiments share: losses, schedule, metrics, checkpoints, a run's folder, config, tables, a few plots.

Nothing here is an experiment: no data set, model, parameter group or training loop, and nothing that an ablation would
want to change. Functions take plain tensors and numbers, never a config section.

Shapes: N rows (pairs) of D features; Q queries against G gallery rows; C classes; R bootstrap resamples.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import operator
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
import typing
import uuid
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(ValueError):
    """A mistake that the user can mend (config, data, folder): reported in one line, exit code 2."""


# -------------------------------------------------------------------------------------------------------------- losses

def rows_at_once(n_columns, like, n_buffers=1):
    """How many rows of n_buffers matrices [rows, n_columns] of the tensor's type and device are worked on at once.

    By a fixed budget of bytes, never by what is free: other programs would change it, and with it the bits.
    """
    budget = 2**29 if like.is_cuda else 2**26
    return max(1, budget // (n_buffers * n_columns * like.element_size()))


def row_blocks(rows, size):
    """The slice cut into slices of `size` rows, but the last."""
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients by its inputs have been formed with it, so that no block is kept or made again.

    gradients: by the inputs a, b, scale and what else there is; of scale a and scale b for those of a and b.
    """

    @staticmethod
    def forward(ctx, value, gradients, a, b, scale, *others):
        ctx.save_for_backward(scale, *gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        scale, grad_a, grad_b, *others = ctx.saved_tensors
        factor = grad * scale
        return None, None, factor * grad_a, factor * grad_b, *(grad * x for x in others)


def _scalar(x, like):
    """x, a number or a tensor of one, as a 0-d tensor of the type and device of `like`; without a synchronisation."""
    return x.to(like).reshape(()) if isinstance(x, torch.Tensor) else like.new_full((), x)


def _check_pairs(a, b, ids, false_negatives):
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"a and b must be equal [N, D] with N > 0, found {list(a.shape)} and {list(b.shape)}")
    if false_negatives not in ("ignore", "mask", "multi_positive"):
        raise ValueError(f"false_negatives must be ignore, mask or multi_positive, found {false_negatives!r}")
    if false_negatives != "ignore" and ids is None:
        raise ValueError(f"false_negatives={false_negatives!r} needs ids [N]; without ids use 'ignore'")
    if ids is not None and ids.shape != a.shape[:1]:
        raise ValueError(f"ids must be [{len(a)}], found {list(ids.shape)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)  # also under autocast
    return a.to(dtype), b.to(dtype)


def _groups(ids):
    """(ids as int32 ranks, number of rows that carry each row's id), both [N], without a host synchronisation."""
    ordered = ids.sort().values
    first = torch.searchsorted(ordered, ids)
    return first.int(), torch.searchsorted(ordered, ids, right=True) - first


def _same(ids, rows, diagonal=True):
    """[chunk, N] bool: pairs of equal id, with or without the pairs of a row and its own partner."""
    same = ids[rows, None] == ids
    if not diagonal:
        same[:, rows].fill_diagonal_(False)
    return same


def _splits_logits(a):
    """Whether float32 products of this tensor's GPU may use TF32, whose 10 bits would move a logit of 100 by .05."""
    return (a.is_cuda and a.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
            and torch.version.cuda is not None and torch.cuda.get_device_capability(a.device) >= (8, 0))


def _logit_factors(a, b):
    """Factors x, y [N, D'] of logits: x y^T = a b^T.

    Where TF32 would be used every number is the sum of two bfloat16 (16 bits), and three products are one of [high,
    high, low] with [high, low, high] (Henry et al. 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations").
    """
    if not _splits_logits(a):
        return a, b
    high_a, high_b = a.bfloat16(), b.bfloat16()
    low_a, low_b = (a - high_a).bfloat16(), (b - high_b).bfloat16()
    return torch.cat([high_a, high_a, low_a], dim=1), torch.cat([high_b, low_b, high_b], dim=1)


def _logits(x, y, out=None):
    """x y^T of `_logit_factors`; of split ones never into `out`."""
    return torch.mm(x, y.T, out_dtype=torch.float32) if x.dtype == torch.bfloat16 else torch.mm(x, y.T, out=out)


def _product_precision(a):
    """That of a loss's products: TF32 for the gradients where the logits are split, else full."""
    return contextlib.nullcontext() if _splits_logits(a) else full_precision()


def info_nce(a, b, logit_scale, ids=None, false_negatives="ignore", label_smoothing=0.0, chunk_size=None,
             rows=slice(None)):
    """Symmetric InfoNCE: mean over rows and over both directions of the cross-entropy of logit_scale * a b^T.

    a, b: [N, D] float, L2-normalised; row i of a is the partner of row i of b. logit_scale: scalar (1 / temperature).
    ids: [N] int, which image or movie a row belongs to. false_negatives: what becomes of pairs of equal id off the
    diagonal: "ignore" leaves them as negatives, "mask" drops them from the denominator, "multi_positive" makes them
    positives (soft targets, each row normalised). label_smoothing: eps spread evenly over the columns of a row that are
    not dropped. chunk_size: rows of logits held at once (default: `rows_at_once`); memory, not the value. rows: a
    slice, this process's share of a batch that several hold whole; the values of all of them sum to the loss.
    Returns: scalar, float32 (float64 for float64 input).
    Raises: ValueError on shapes that disagree, ids that are missing, label_smoothing outside [0, 1].
    Source: van den Oord et al. 2018, equation 4; the symmetric form of CLIP (Radford et al. 2021, figure 3). Soft
        targets as in UniCL (Yang et al. 2022); smoothing of Szegedy et al. 2016, section 7.
    """
    a, b = _check_pairs(a, b, ids, false_negatives)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], found {label_smoothing}")
    scale = _scalar(logit_scale, a)
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale))
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), _product_precision(a):
        value, gradients = _info_nce(a, b, scale, ids, false_negatives, label_smoothing, chunk_size, rows,
                                     needs_gradients)
    return _WithGradients.apply(value, gradients, a, b, scale) if needs_gradients else value


def _info_nce(a, b, scale, ids, false_negatives, label_smoothing, chunk_size, own, needs_gradients):
    """(value, gradients of `_WithGradients` or ()): one pass over blocks of columns for their log-sum-exps, one over
    blocks of rows for the gradient by the logits, softmax by rows + softmax by columns - targets of both ways."""
    n, masked, soft = len(a), false_negatives == "mask", false_negatives == "multi_positive"
    dropped = torch.finfo(a.dtype).min / 4  # finite: -inf - -inf is nan
    on_diagonal = 0.0 if soft else 2 * (1 - label_smoothing)  # weight of the partner in the targets of both ways
    is_spread = soft or label_smoothing > 0  # there are other targets
    if masked or soft:
        ids, group = _groups(ids)
        group = group.to(a.dtype)
    if is_spread:
        share = 1 / (n + 1 - group) if masked else a.new_full((n,), 1 / n)  # 1 / columns kept, [N]
    x, y = _logit_factors(scale * a, b)

    def logits_of(x, y, rows):
        logits = _logits(x[rows], y, None if work is None else work[:len(x[rows])])  # [chunk, N]
        return logits.masked_fill_(_same(ids, rows, diagonal=False), dropped) if masked else logits

    def spread_targets(rows):
        """[chunk, N]: weights of the targets of both ways, but for the diagonal's."""
        spread = label_smoothing * (share[rows, None] + share)
        if masked:
            spread.masked_fill_(_same(ids, rows, diagonal=False), 0)
        return spread + _same(ids, rows) * (2 * (1 - label_smoothing) / group[rows, None]) if soft else spread

    is_share = own != slice(None) and process()[1] > 1  # each process has the columns of its rows
    own, size = slice(*own.indices(n)), chunk_size or rows_at_once(n, a, n_buffers=4)
    blocks, columns = row_blocks(own, size), row_blocks(own if is_share else slice(0, n), size)
    work = None if a.is_cuda else a.new_empty(min(size, n), n)  # a CPU takes long to find fresh memory
    is_one = blocks == columns == [slice(0, n)]  # then one product serves both ways
    log_p, column_lse = a.new_zeros(3, n), a.new_zeros(n)  # log softmax of partners both ways; what other targets add
    for rows in columns:
        logits = logits_of(x, y, rows) if is_one else logits_of(y, x, rows)
        log_p[1, rows] = (logits.T if is_one else logits).log_softmax(1)[:, rows].diagonal()
        torch.sub(logits[:, rows].diagonal(), log_p[1, rows], out=column_lse[rows])
    if is_share:
        column_lse = summed(column_lse)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    for rows in blocks:
        logits = logits if is_one else logits_of(x, y, rows)
        grad = logits.log_softmax(1)
        log_p[0, rows] = grad[:, rows].diagonal()
        if is_spread:
            targets = spread_targets(rows)
            log_p[2, rows] = (targets * logits).sum(1) - (2 - on_diagonal) * logits[:, rows].diagonal()
        if needs_gradients:
            torch.logaddexp(grad, logits.sub_(column_lse), out=grad).exp_()
            if is_spread:
                grad -= targets
            grad[:, rows].diagonal().sub_(on_diagonal)
            torch.addmm(grad_a[rows], grad, b, beta=0, alpha=0.5 / n, out=grad_a[rows])
            torch.addmm(grad_b, grad.T, a[rows], alpha=0.5 / n, out=grad_b)
        logits = grad = targets = None  # before the next block is made
    value = log_p[:, own].sum(0).sum() / (-2 * n)
    return value, (grad_a, grad_b, (grad_a * a).sum()) if needs_gradients else ()


def sigmoid_loss(a, b, logit_scale, logit_bias, ids=None, false_negatives="ignore", chunk_size=None,
                 rows=slice(None)):
    """Pairwise sigmoid loss: -sum_ij log sigmoid(z_ij (logit_scale a_i.b_j + logit_bias)) / N, z = +-1 (partners: +1).

    a, b: [N, D] float, L2-normalised. logit_scale, logit_bias: scalars. ids, false_negatives, chunk_size, rows: as in
    `info_nce`; "mask" drops pairs of equal id off the diagonal, "multi_positive" gives them z = 1.
    Returns: scalar, float32 (float64 for float64 input).
    Raises: ValueError on shapes that disagree or ids that are missing.
    Source: SigLIP, Zhai et al. 2023, algorithm 1 (the sum is divided by N, not N^2).
    """
    a, b = _check_pairs(a, b, ids, false_negatives)
    scale, bias = _scalar(logit_scale, a), _scalar(logit_bias, a)
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale, bias))
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), _product_precision(a):
        value, gradients = _sigmoid_loss(a, b, scale, bias, ids, false_negatives, chunk_size, rows, needs_gradients)
    return _WithGradients.apply(value, gradients, a, b, scale, bias) if needs_gradients else value


def _sigmoid_loss(a, b, scale, bias, ids, false_negatives, chunk_size, own, needs_gradients):
    """(value, gradients of `_WithGradients` or ()), in one pass over blocks of logits."""
    n, masked, soft = len(a), false_negatives == "mask", false_negatives == "multi_positive"
    if masked or soft:
        ids, _ = _groups(ids)
    own = slice(*own.indices(n))
    total, grad_a, grad_b, grad_bias = (torch.zeros_like(like) for like in (bias, a, b, bias))
    x, y = _logit_factors(scale * a, b)
    for rows in row_blocks(own, chunk_size or rows_at_once(n, a, n_buffers=5)):
        logits = _logits(x[rows], y).add_(bias)  # [chunk, N]
        positive = _same(ids, rows) if soft else None
        total -= (logits * positive).sum() if soft else logits[:, rows].diagonal().sum()
        if masked:
            logits.masked_fill_(_same(ids, rows, diagonal=False), torch.finfo(a.dtype).min / 4)
        # -log sigmoid(-x) = softplus(x), -log sigmoid(x) = softplus(x) - x; beyond 40 it is x in float64 too
        total += F.softplus(logits, threshold=40).sum()
        if needs_gradients:
            grad = logits.sigmoid_()
            if soft:
                grad -= positive.to(grad.dtype)
            else:
                grad[:, rows].diagonal().sub_(1)
            torch.addmm(grad_a[rows], grad, b, beta=0, alpha=1 / n, out=grad_a[rows])
            torch.addmm(grad_b, grad.T, a[rows], alpha=1 / n, out=grad_b)
            grad_bias += grad.sum()
        logits = grad = None  # before the next block is made
    return total / n, (grad_a, grad_b, (grad_a * a).sum(), grad_bias / n) if needs_gradients else ()


# ------------------------------------------------------------------------------------------------------------ schedule

def warmup_cosine(step, total_steps, warmup_steps):
    """Factor in [0, 1] of a step, from 0: linear 0 -> 1 over warmup_steps, then half a cosine to 0 at total_steps.

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, no restarts; clamped to 0 past its end, where a cosine rises.
    """
    step = max(step, 0)
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


# ------------------------------------------------------------------------------------------------------------- metrics

def _miss_probability(better, tied, own, k):
    """P(none of the top k is one's own): `better` others above, `tied` others level, ties in random order; [Q] float64.

    1 - C(t+m-r, m) / C(t+m, m) is the hit; the quotient is written as the product of (t-j) / (t+m-j) over j < r.
    """
    out = (better >= k).double()
    some = ((tied > 0) & (better < k)).nonzero()[:, 0]
    better, tied, own = better[some], tied[some], own[some]
    miss = torch.ones_like(better, dtype=torch.float64)
    for j in range(min(k, int((tied + own).max())) if len(some) else 0):
        inside = (j < k - better) & (j < tied + own)
        miss = torch.where(inside, miss * (tied - j).clamp(min=0) / (tied + own - j).clamp(min=1), miss)
    out[some] = miss
    return out


def _check_retrieval(queries, gallery, query_ids, gallery_ids):
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries [Q, D], gallery [G, D] needed, found {list(queries.shape)}, {list(gallery.shape)}")
    if query_ids.shape != queries.shape[:1] or gallery_ids.shape != gallery.shape[:1]:
        raise ValueError(f"one id a row needed, found {list(query_ids.shape)} ids for {len(queries)} queries and "
                         f"{list(gallery_ids.shape)} for {len(gallery)} gallery rows")
    if not len(queries) or not len(gallery):
        raise ValueError(f"nothing to retrieve: {len(queries)} queries, {len(gallery)} gallery rows")
    for name, x in (("queries", queries), ("gallery", gallery)):
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise ValueError(f"{name}: {bad} rows of {len(x)} hold non-finite values")


def _block_scores(queries, gallery, gallery32, own_columns, tolerance, only_best, scores, work):
    """Fill `scores` [q, G] float32 with q . g: where a score is close to an own row's (only_best: to the best own
    row's) it is computed in float64 first.

    So equal rows tie whatever the block size. `work` is a buffer of the same shape.
    """
    with full_precision():
        torch.mm(queries.float(), gallery32.T, out=scores)
    near, exact = None, queries.double()
    if own_columns.shape[1] <= 32:
        own = [(exact * gallery[columns].double()).sum(1, keepdim=True).float() for columns in own_columns.T]
        wanted = [functools.reduce(torch.maximum, own)] if only_best else own
        close = functools.reduce(operator.or_, (torch.sub(scores, x, out=work).abs_() <= tolerance for x in wanted))
        near = close.nonzero()
    if near is None or len(near) * 16 > scores.numel():  # many own rows, or a collapsed model: all are near
        return (exact @ gallery.double().T).float()
    for part in near.split(65536):
        q, g = part.unbind(1)
        scores[q, g] = (exact[q] * gallery[g].double()).sum(1).float()
    return scores


def _average_precision(scores, own, n_own, ks):
    """{k: AP@k [q]} of scores [q, G], own rows' [q, most own rows] (-inf: none), expected over random orders of ties.

    Of g level rows o are own: each of their places holds one with probability o / g, which then has a share (o - 1) /
    (g - 1) of the g's places before it. Divided by min(k, own rows).
    """
    top = scores.topk(min(max(ks), scores.shape[1]), dim=1).values
    place = torch.arange(1, top.shape[1] + 1, device=scores.device).double()
    above, level = (compare(top[:, None], top[:, :, None]).sum(2) for compare in (torch.gt, torch.eq))
    level_last = (scores == top[:, -1:]).sum(1, keepdim=True)  # the last group may go on below
    level = torch.where(top == top[:, -1:], level_last, level)
    own = own.sort(1).values
    end = torch.searchsorted(own, top, right=True)
    own_above, own_level = own.shape[1] - end, end - torch.searchsorted(own, top)
    own_before = (place - above - 1) * (own_level - 1) / (level - 1).clamp(min=1)
    expected = own_level * (own_above + own_before + 1) / (level * place)
    return {k: expected[:, :k].sum(1) / n_own.clamp(max=k) for k in ks}


def retrieval_per_query(queries, gallery, query_ids, gallery_ids, ks=(1, 5, 10), map_ks=(10,), chunk_size=None):
    """Retrieval quality of every query; `retrieval_metrics` averages it, a bootstrap resamples it.

    queries: [Q, D], gallery: [G, D], float, L2-normalised for cosine. query_ids: [Q], gallery_ids: [G] int; the gallery
    rows that carry the query's id are its own, and the best of them counts. Ties: the expectation over their random
    order. AP@k is divided by min(k, own rows). chunk_size: queries at once (default: `rows_at_once`); memory, not the
    values.
    Returns: dict of [Q] float64 on the CPU: `hit@k` (probability), `AP@k`, `rank` (expected, from 1), `chance@k`.
    Raises: ValueError on non-finite input, shapes that disagree, or a query without an own row in the gallery.
    """
    _check_retrieval(queries, gallery, query_ids, gallery_ids)
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device  # MPS has no float64
    queries, gallery = queries.detach().to(device), gallery.detach().to(device)
    gallery_ids, order = gallery_ids.to(device).sort(stable=True)  # own rows of a query become one range
    gallery, query_ids = gallery[order], query_ids.to(device)
    first = torch.searchsorted(gallery_ids, query_ids)
    n_own = torch.searchsorted(gallery_ids, query_ids, right=True) - first  # [Q]
    if (n_own == 0).any():
        raise ValueError(f"{int((n_own == 0).sum())} of {len(queries)} queries have no row of their id in the gallery, "
                         f"the first is id {int(query_ids[n_own == 0][0])}")
    offsets = torch.arange(int(n_own.max()), device=device)
    gallery32 = gallery.float()
    eps = 16 * torch.finfo(torch.float32).eps  # of a float32 product
    of_query, of_gallery = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in (queries, gallery))
    largest = of_query[:, None] * of_gallery.max()  # score that a query can have
    tolerance = (eps * largest).float()
    if largest.max() > torch.finfo(torch.float32).max:
        raise ValueError("scores overflow float32; normalise the rows")
    counts, average_precision = [], {f"AP@{k}": [] for k in map_ks}
    size = min(len(queries), chunk_size or rows_at_once(len(gallery), gallery32, n_buffers=6 if map_ks else 3))
    buffers = gallery32.new_empty(2, size, len(gallery))  # fresh ones pile up in the heap
    for rows in row_blocks(slice(0, len(queries)), size):
        scores, work = buffers[:, :len(queries[rows])]  # [q, G]
        is_own = offsets < n_own[rows, None]  # [q, most own rows of any query]
        own_columns = first[rows, None] + offsets * is_own  # filled up with the first
        scores = _block_scores(queries[rows], gallery, gallery32, own_columns, tolerance[rows], not map_ks, scores,
                               work)
        own = scores.gather(1, own_columns).masked_fill(~is_own, -torch.inf)
        best = own.amax(1, keepdim=True)
        level = (own == best).sum(1)  # m, own rows at the best own score
        better = torch.gt(scores, best, out=work).sum(1).long()  # b; a float sum is faster and exact to 2^24
        tied = torch.ge(scores, best, out=work).sum(1).long() - better - level  # t
        counts.append(torch.stack([better, tied, level]))
        if not map_ks:
            continue
        if len(offsets) == 1:  # the mean of 1 / place over the places it can have, without a search for the best
            place = torch.arange(1, min(max(map_ks), len(gallery)) + 1, device=device).double()
            harmonic = F.pad(1 / place, (1, 0)).cumsum(0)
            precisions = {k: (harmonic[(better + tied + 1).clamp(max=k)] - harmonic[better.clamp(max=k)]) / (tied + 1)
                          for k in map_ks}
        else:
            precisions = _average_precision(scores, own, n_own[rows], map_ks)
        for k in map_ks:
            average_precision[f"AP@{k}"].append(precisions[k])
    (better, tied, level), n_own = torch.cat(counts, dim=1).cpu(), n_own.cpu()
    values = {f"hit@{k}": 1 - _miss_probability(better, tied, level, k) for k in ks}
    values |= {name: torch.cat(parts).cpu() for name, parts in average_precision.items()}
    values["rank"] = better + (tied + level + 1).double() / (level + 1)
    numbers, group = n_own.unique(return_inverse=True)
    for k in ks:  # that k of G rows in random order hold an own one
        n, k_rows = len(gallery), min(k, len(gallery))
        missed = [math.comb(n - m, k_rows) / math.comb(n, k_rows) for m in numbers.tolist()]
        values[f"chance@{k}"] = 1 - torch.tensor(missed, dtype=torch.float64)[group]
    return values


def retrieval_metrics(queries, gallery, query_ids, gallery_ids, ks=(1, 5, 10), map_ks=(10,), chunk_size=None):
    """Means over queries of `retrieval_per_query` (same arguments, ties and errors).

    Returns: dict of floats: `R@k` (0..1), `median_rank`, `mean_rank` (expected ranks, from 1), `MRR`, `mAP@k`.
    """
    q = retrieval_per_query(queries, gallery, query_ids, gallery_ids, ks, map_ks, chunk_size)
    return {**{f"R@{k}": q[f"hit@{k}"].mean().item() for k in ks},
            "median_rank": float(np.median(q["rank"].numpy())), "mean_rank": q["rank"].mean().item(),
            "MRR": (1 / q["rank"]).mean().item(), **{f"mAP@{k}": q[f"AP@{k}"].mean().item() for k in map_ks}}


def _ranking_scores(score, positive, weights):
    """(average precision, ROC-AUC), each [R], of scores [N] for labels [N] of 0/1, weights [R, N]; nan if undefined."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # last place of each run of equal scores
    weights = weights[:, order]
    seen = weights.cumsum(1)[:, ends]  # [R, distinct scores]
    hits = (weights * positive[order]).cumsum(1)[:, ends]
    n, n_positive = seen[:, -1:], hits[:, -1:]
    new_hits = np.diff(hits, prepend=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is the nan that is promised
        precision = (new_hits * hits / np.maximum(seen, 1)).sum(1) / n_positive[:, 0]
        new_misses = np.diff(seen - hits, prepend=0)
        auc = (new_misses * (hits - new_hits / 2)).sum(1) / (n_positive * (n - n_positive))[:, 0]
    return precision, auc


def _defined_mean(values):
    """Mean over the first axis of [C, R], nan left out; nan where there is nothing else."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / (~np.isnan(values)).sum(0)


def multilabel_metrics(logits, targets, threshold=0.5, weights=None, names=None):
    """F1 at a probability threshold, mAP and ROC-AUC of multi-label predictions, over the whole set at once.

    logits: [N, C] float. targets: [N, C] of 0/1. A label is predicted when sigmoid(logit) > threshold.
    weights: [R, N] how often each row counts in each of R resamples of a bootstrap; each value is then an array [R].
    names: the values that are wanted (default: all).
    Returns: dict of floats `f1_micro`, `f1_macro`, `f1_weighted`, `f1_samples` (an F1 of 0/0 counts as 0), `mAP` and
    `roc_auc` (macro, over the classes where they are defined: with a positive; with a positive and a negative; else
    nan), `mAP_micro` (of all rows x classes as one list).
    Raises: ValueError on shapes that disagree, non-finite logits, targets other than 0/1, a threshold outside (0, 1).
    Definitions as in scikit-learn, which the tests compare with.
    """
    if logits.ndim != 2 or logits.shape != targets.shape or not logits.numel():
        found = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"logits and targets must be equal [N, C] with N, C > 0, found {found}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), found {threshold}")
    x, y = logits.detach().cpu().double().numpy(), targets.detach().cpu().double().numpy()
    if not np.isfinite(x).all():
        raise ValueError(f"logits: {int((~np.isfinite(x)).any(1).sum())} rows of {len(x)} hold non-finite values")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
    w = np.ones((1, len(x))) if weights is None else np.asarray(weights, dtype=np.float64)
    predicted = x > math.log(threshold / (1 - threshold))
    hit, wrong = predicted * y, (predicted != y).astype(np.float64)  # [N, C]

    def f1(hits, errors):
        return 2 * hits / np.maximum(2 * hits + errors, 1)  # hits is 0 where the sum is

    of_class, support = f1(w @ hit, w @ wrong), w @ y  # [R, C]
    out = {"f1_micro": f1((w @ hit).sum(1), (w @ wrong).sum(1)), "f1_macro": of_class.mean(1),
           "f1_samples": w @ f1(hit.sum(1), wrong.sum(1)) / w.sum(1),
           "f1_weighted": (of_class * support).sum(1) / np.maximum(support.sum(1), 1)}
    if names is None or {"mAP", "roc_auc"} & set(names):
        columns = [_ranking_scores(x[:, c], y[:, c], w) for c in range(x.shape[1])]
        out["mAP"], out["roc_auc"] = (_defined_mean(np.stack(part)) for part in zip(*columns, strict=True))
    if names is None or "mAP_micro" in names:
        out["mAP_micro"] = _ranking_scores(x.ravel(), y.ravel(), w.repeat(x.shape[1], axis=1))[0]
    return {name: float(v[0]) if weights is None else v for name, v in out.items() if names is None or name in names}


def bootstrap(statistic, n, groups=None, n_resamples=1000, seed=0):
    """{name: values [R]} of a statistic in resamples of n test items (Efron 1979); of two models they are paired.

    statistic: weights [r, n], how often each item counts in each of r resamples, -> {name: values [r]}. The resamples
    depend on n, groups, n_resamples and seed alone.
    groups: [n] ints from 0; items of one group (captions of an image) are drawn together.
    """
    n_groups = n if groups is None else int(np.max(groups)) + 1
    draws, parts = np.random.default_rng(seed), []
    for start in range(0, n_resamples, 50):  # bounds the memory of [r, n] arrays
        size = min(50, n_resamples - start)
        weights = draws.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=size).astype(np.float64)
        parts.append(statistic(weights if groups is None else weights[:, groups]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(estimate, resampled, is_difference=False):
    """(low, high): the basic 95% bootstrap interval (Davison & Hinkley 1997, equation 5.6) of an estimate, resampled
    [R]. A share, from 0 to 1 or in percent, stays one; a difference of shares may be below 0.

    Resamples scatter about the estimate as it does about the truth, with the same bias: 2 estimate - quantile. The mean
    average precision of rare classes is biased upwards: its percentile interval holds the truth in 65% of 120 draws of
    522 items with 12 classes of 2 to 60%, this one in 93%.
    """
    low, high = 2 * estimate - np.nanquantile(resampled, (0.975, 0.025))
    largest = np.nanmax(resampled)
    if not is_difference and np.nanmin(resampled) >= 0 and largest <= 100:
        low, high = max(low, 0), min(high, 1 if largest <= 1 else 100)
    return float(low), float(high)


def bootstrap_interval(statistic, n, groups=None, n_resamples=1000, seed=0, is_difference=False):
    """{name: (low, high)}: 95% intervals of `bootstrap`; of a difference taken inside `statistic` a paired one."""
    estimates, draws = statistic(np.ones((1, n))), bootstrap(statistic, n, groups, n_resamples, seed)
    return {name: interval(estimates[name][0], values, is_difference) for name, values in draws.items()}


def moments(x, rows, chunk=8192):
    """(mean, deviation), each [D] float32, of some rows [n] of x [N, D], by float64 sums; a constant one: 1.

    Raises: ValueError if every feature is constant.
    """
    total, squares = 0, 0
    for part in rows.split(chunk):
        block = x[part.to(x.device)].cpu().double()
        total = total + block.sum(0)
        squares = squares + block.square().sum(0)
    mean = total / len(rows)
    variance = squares / len(rows) - mean.square()
    constant = variance <= 1e-10 * mean.square().clamp(min=1e-12)
    if constant.all():
        raise ValueError(f"all {len(constant)} features are constant over {len(rows):,} rows: nothing to learn from")
    return mean.float(), variance.masked_fill(constant, 1).sqrt().float()


# ------------------------------------------------------------------------------------------------------------- photos

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
warnings.filterwarnings("ignore", module="PIL")  # palettes with transparency, odd EXIF; not where threads decode
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # of an EXIF orientation


def decode_image(data, size=None, crop=True, max_pixels=100_000_000):
    """An image file as uint8 [H, W, 3]: upright as its EXIF says, transparency on white, 16 bits scaled to 8.

    data: bytes of the file, or None. size: side of the square that its centre square (crop=False: all of it, squeezed)
    is resized to, a JPEG from the power of two that leaves at least twice as much; None: as large as it is. max_pixels:
    width times height. Raises: ValueError with the cause, of anything that is no whole image.
    """
    if not data:
        raise ValueError("no image bytes")
    Image.MAX_IMAGE_PIXELS = None  # max_pixels takes its place
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:
        start = bytes(data[:64]).lstrip().lower()
        is_html = start.startswith((b"<!doctype", b"<html"))
        raise ValueError("HTML, not an image" if is_html else "not an image") from None
    if image.format not in FORMATS:
        raise ValueError(f"format {image.format} is not read")
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than max_pixels={max_pixels}")
    try:
        if size:
            image.draft(image.mode, (2 * size, 2 * size))
        image.load()  # only this finds a file cut off half-way
        turn = None
        with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about the pixels
            turn = TURNS.get(image.getexif().get(0x0112))  # ImageOps.exif_transpose fails on odd tags of cameras
        if image.mode.startswith("I"):  # 16 bits: convert() would clip them to white; or 8 in 32, which stay
            values = np.asarray(image)
            if values.size and (values.min() < 0 or values.max() > 65535):
                raise ValueError("32-bit integers are not read")
            white = 255 if image.mode == "I" and values.size and values.max() <= 255 else 65535
            image = Image.fromarray(((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels are not read")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image = image.transpose(Image.Transpose[turn]) if turn else image
        if size:
            width, height = [min(image.size)] * 2 if crop else image.size
            left, top = (image.width - width) / 2, (image.height - height) / 2
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height),
                                 reducing_gap=2.0)
    except Exception as error:  # Pillow's decoders raise kinds of their own
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------- files and checkpoints

def _previous(path):
    return path.with_name(f"{path.name}.previous")


def reason_of(error):
    """What went wrong in a few words of one line."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds more than tensors and plain types, or is damaged"
    if isinstance(error, (RecursionError, FileNotFoundError)):
        return "no such file" if isinstance(error, FileNotFoundError) else "it is nested too deeply"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['empty'])[0]}"


def guarded(read, path):
    """read(path); whatever goes wrong there is a UserError of one line that names the file."""
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:  # numpy, json, zip and pickle raise kinds of their own
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None


def atomic_write(path, write, keep_previous=False):
    """Call write(binary file) on a temporary file, fsync, rename onto path: at any moment path is whole, old or new.

    Of several processes only the first writes. Raises: OSError naming the path (disk full, no permission); what was
    there stays.
    """
    if process()[0]:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, _previous(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); all that was saved before is kept, and the same command "
                      "resumes from it once this is mended") from None


def write_text(path, text):
    """Write a text file atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    """Write JSON atomically; a non-finite number becomes null. Raises: OSError naming the path."""
    def plain(v):
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    write_text(path, json.dumps(plain(value), indent=2) + "\n")


def read_json(path):
    """The object in a JSON file, a dict. Raises: UserError naming the file if it is missing or not a JSON object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason_of(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def check_crc(path):
    """Raise UserError if a member of a zip file (.pt, .npz) is not what its checksum says, which torch.load ignores."""
    def damaged(p):
        with zipfile.ZipFile(p) as archive:
            return archive.testzip()
    if member := guarded(damaged, path):
        raise UserError(f"{path}: {member} does not match its checksum: the file is damaged; copy or encode it again")


def load_tensors(path, mmap=True):
    """What a .pt file holds, on the CPU: plain types and dense tensors. Raises: UserError naming the file."""
    content = guarded(lambda p: torch.load(p, map_location="cpu", mmap=mmap, weights_only=True), path)
    for x in content.values() if isinstance(content, dict) else [content]:
        if isinstance(x, torch.Tensor) and (x.layout != torch.strided or x.is_meta):
            raise UserError(f"{path}: holds a sparse tensor, or one without values (meta); save dense ones")
    return content


def fingerprint(paths, whole=1 << 31, blocks=512):
    """16 hex digits of the SHA-256 over the contents of files, in the order given; .pt and .npz pass `check_crc`.

    Of a file larger than `whole` bytes it takes the size and `blocks` blocks of 1 MiB, spread from first to last.
    """
    digest = hashlib.sha256()
    for path in paths:
        if Path(path).suffix in (".pt", ".npz") and zipfile.is_zipfile(path):
            check_crc(path)
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size > whole:
                digest.update(str(size).encode())
                for i in range(blocks):
                    file.seek((size - (1 << 20)) * i // (blocks - 1))
                    digest.update(file.read(1 << 20))
            else:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()[:16]


def save_checkpoint(path, state, keep_previous=True):
    """Write a dict of tensors and plain types atomically; the file it replaces is kept as `<path>.previous`.

    Raises: OSError naming the path; the last good checkpoint stays.
    """
    atomic_write(path, lambda file: torch.save(state, file), keep_previous)


def load_checkpoint(path):
    """The dict that `save_checkpoint` wrote, on the CPU (weights_only=True). A missing or damaged file falls back to
    `<path>.previous`, where there is one, with a warning; the damaged one becomes `<path>.damaged`.

    Raises: FileNotFoundError if neither is there, UserError if none can be read.
    """
    path, problems = Path(path), []
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            check_crc(candidate)
            state = guarded(lambda p: torch.load(p, map_location="cpu", weights_only=True), candidate)
        except UserError as error:
            problems.append(f"{candidate} is damaged ({str(error).removeprefix(f'{candidate}: ')})")
            continue
        if candidate != path:
            warnings.warn(f"{problems[0] if problems else f'{path} is missing'}; using {candidate}", stacklevel=2)
            if problems:  # else the next save would put it in the good one's place
                path.replace(path.with_name(f"{path.name}.damaged"))
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}; copy it again, or train anew: the run's command with --fresh")
    raise FileNotFoundError(f"{path}: no such checkpoint; run the training first")


# --------------------------------------------------------------------------------------------------- several processes
#
# torchrun starts W processes that train as one. Each embeds its rows of every batch; what is compared is gathered, with
# gradient; losses are parts that sum to the whole batch's, and so are gradients, before every process takes the same
# step. Process 0 alone writes and prints. With one process all of this does nothing.

def process():
    """(number of this process, from 0; how many train together)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def join_processes(device_name):
    """Become one of torchrun's processes, if it started this one: a GPU each, or the CPU. Raises: UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or process()[1] > 1:
        return
    on_gpu = device_name.startswith(("auto", "cuda")) and torch.cuda.is_available()
    if on_gpu:
        wanted, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if wanted > n_gpus or ":" in device_name:
            raise UserError(f"{wanted} processes need a GPU each, device={device_name} has {n_gpus} here; use torchrun "
                            f"--nproc-per-node {n_gpus} and the device auto, or cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
    if process()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open


@contextlib.contextmanager
def one_after_the_other():
    """Process 0 does what is inside before the others: it fills the caches that they find."""
    number, n_processes = process()
    if number > 0:
        dist.barrier()
    yield
    if number == 0 and n_processes > 1:
        dist.barrier()


def share(n):
    """This process's slice of a batch of n rows; the shares differ by a row at most."""
    number, n_processes = process()
    return slice(n * number // n_processes, n * (number + 1) // n_processes)


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what all processes ask of it."""

    @staticmethod
    def forward(ctx, x, n):
        n_processes = process()[1]
        sizes = [n * (i + 1) // n_processes - n * i // n_processes for i in range(n_processes)]
        padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.own = share(n)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.own], None


def gathered(x, n):
    """[n, ..] of all processes, with gradient, of this process's `share(n)` [.., ..]."""
    return x if process()[1] == 1 else _Gather.apply(x, n)


def summed(x):
    """The sum over processes of a tensor, without gradient."""
    if process()[1] > 1:
        x = x.contiguous().clone()
        dist.all_reduce(x)
    return x


def uniform_draws(n, *shape, device=None):
    """[n, *shape] uniform in [0, 1): this process's rows of what process 0 draws for all of them."""
    if process()[1] == 1:
        return torch.rand(n, *shape, device=device)
    total = int(summed(torch.tensor(n)))
    draws = torch.rand(total, *shape, device=device)
    dist.broadcast(draws, 0)
    return draws[share(total)]


def agreed(values):
    """What process 0 says of a list of plain values."""
    if process()[1] > 1:
        dist.broadcast_object_list(values)
    return values


def sum_gradients(model):
    """Add up the gradients of all processes, in one message."""
    if process()[1] == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = summed(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


class _Sum(torch.autograd.Function):
    """Sum over processes, whose gradient is the sum over processes."""

    @staticmethod
    def forward(ctx, x):
        return summed(x)

    @staticmethod
    def backward(ctx, grad):
        return summed(grad)


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d of x [B, D] whose statistics are those of the whole batch, over all processes, on any device."""

    def forward(self, x):
        if process()[1] == 1 or not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = _Sum.apply(torch.cat([values.new_full((1,), len(x)), values.sum(0), values.square().sum(0)]))
        n, (mean, square) = sums[0], (sums[1:] / sums[0]).split(x.shape[1])
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return ((values - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


# ------------------------------------------------------------------------------------------------ device, seeds, steps

def pick_device(name="auto"):
    """torch.device from "auto" (cuda, else mps, else cpu), "cuda", "mps" or "cpu"; also switches TF32 matmul on.

    Raises: UserError if the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if name == "cuda" and process()[1] > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    kind = name.partition(":")[0]
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind, False) or name not in (kind, *(f"{kind}:{i}" for i in range(count))):
        choices = ", ".join(k for k in available if available[k])
        raise UserError(f"device={name} is not available here; use one of auto, {choices}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # a graph is recorded on the current one: of another it would be empty
    torch.set_float32_matmul_precision("high")
    return torch.device(name)


@contextlib.contextmanager
def full_precision():
    """Float32 matrix products without TF32, for what is measured and for logits of a large scale."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def seed_everything(seed):
    """Seed Python, NumPy and torch (all devices), ask for deterministic kernels: equal runs give equal bits."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def rng_state():
    """All random states as plain types and tensors (so that a checkpoint loads with weights_only=True); of several GPUs
    that of the run's, which another GPU or a machine with fewer goes on with."""
    kind, keys, *rest = np.random.get_state()
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state(),
            "cuda": cuda}


def set_rng_state(state):
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


class GraphedStep:
    """A script's train_step(model, batch, optimizer), on a GPU as CUDA graphs: its kernels are recorded once and then
    launched together, without Python between them. Called with a batch, {name: tensor, or what does not change}.

    There is a graph for every set of shapes and every `key`, what else the step depends on (sizes it draws, what is
    frozen), recorded when they come for the fifth time, as a recording costs about four steps; after `most` of them,
    and where a step cannot be recorded (it takes a number from the device, copies from CPU memory, draws from the CPU's
    generator, its optimizer is not fused), it runs as it is written, with the same values. So it does on other devices,
    and of several processes. step_inside=False: the optimizer's step, then the last of train_step, stays outside the
    graph, which freezes its settings but for the learning rate. Source: Nguyen et al. 2021, "Accelerating PyTorch with
    CUDA Graphs".
    """

    def __init__(self, train_step, model, optimizer, enabled=True, step_inside=True, most=16):
        self.train_step, self.model, self.optimizer = train_step, model, optimizer
        device = next(model.parameters()).device
        if device.type == "cuda":  # the other kernels of attention add up its gradients in no fixed order
            self.train_step = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)(train_step)
        self.on_gpu = device.type == "cuda" and process()[1] == 1
        self.step_inside = step_inside and all(group.get("fused") for group in optimizer.param_groups)
        self.most = most if enabled and self.step_inside == step_inside else 0
        self.graphs, self.pool = {}, None  # key -> (graph, inputs, gradients, names, values)
        self.seen = collections.Counter()
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups] if self.step_inside else []

    def __call__(self, batch, key=None):
        if not self.on_gpu:
            return self.train_step(self.model, batch, self.optimizer)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=False):
            rate.fill_(group["lr"])
        tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
        key = (key, *((name, (x.shape, x.dtype) if name in tensors else x) for name, x in batch.items()))
        self.seen[key] += 1
        if key not in self.graphs and self.seen[key] >= 5 and len(self.graphs) < self.most:
            try:
                self.graphs[key] = self._recorded(batch)
            except RuntimeError as error:  # also out of memory
                self.most = 0
                self.graphs.clear()
                print(f"NOTE: no CUDA graphs of this training step ({reason_of(error)}): it runs kernel by kernel")
        if key not in self.graphs:
            with self._rates_on_device():
                return self.train_step(self.model, batch, self.optimizer)
        graph, inputs, gradients, names, values = self.graphs[key]
        for name, x in tensors.items():
            inputs[name].copy_(x)
        graph.replay()
        if not self.step_inside:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            self.optimizer.step()
        return dict(zip(names, values.clone().unbind(), strict=True))

    @contextlib.contextmanager
    def _rates_on_device(self, **options):
        """Learning rates that a graph reads when it runs; schedules and checkpoints see numbers."""
        groups = self.optimizer.param_groups if self.step_inside else []
        before = [{**group} for group in groups]
        for rate, group in zip(self.rates, groups, strict=True):
            group.update(lr=rate, **options)
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)

    def _state(self):
        """The tensors that a step changes: weights, buffers and what the optimizer keeps."""
        of_optimizer = [x for state in self.optimizer.state.values() for x in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *(x for x in of_optimizer if torch.is_tensor(x))]

    def _recorded(self, batch):
        """Warm up, record, and put everything back: a recording trains nothing. Raises: RuntimeError."""
        inputs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        optimizer = self.optimizer if self.step_inside else types.SimpleNamespace(
            zero_grad=self.optimizer.zero_grad, step=lambda: None)
        before, random_states = {id(x): x.detach().clone() for x in self._state()}, rng_state()
        graph, current, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        generator = torch.cuda.default_generators[current.device_index]
        unrecorded = generator.clone_state()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            stream.wait_stream(current)
            with torch.cuda.stream(stream), self._rates_on_device():
                for _ in range(3):
                    self.train_step(self.model, inputs, optimizer)
            current.wait_stream(stream)
            recording = torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local")
            with self._rates_on_device(capturable=True), recording:
                losses = self.train_step(self.model, inputs, optimizer)
                values = torch.stack([*losses.values()])
            if not torch.equal(torch.get_rng_state(), random_states["torch"]):
                raise RuntimeError("it draws from the CPU's generator")
        except RuntimeError:  # a recording that broke off still has the ear of the allocator and of the generator
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(current.device_index, self.pool)
            generator.graphsafe_set_state(unrecorded)
            raise
        finally:
            torch.cuda.set_stream(current)  # a recording that breaks off stays on its own
            current.wait_stream(stream)
            with torch.no_grad():
                for x in self._state():  # AdamW's moments and count begin at 0
                    x.copy_(before[id(x)]) if id(x) in before else x.zero_()
            set_rng_state(random_states)
        trained = [] if self.step_inside else [p for p in self.model.parameters() if p.grad is not None]
        return graph, inputs, {p: p.grad for p in trained}, [*losses], values


class Stopped(Exception):
    """A run that ended itself after Ctrl-C or SIGTERM, with its checkpoint saved."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


# ------------------------------------------------------------------------------------------------------ a run's folder

# Keys that leave a run what it is: they neither name its folder nor make it another run. So are all that end in dir,
# _file or parquet: the data they name are known by their fingerprint.
NEUTRAL_KEYS = ("device", "cuda_graphs", "num_workers", "wandb", "evaluation", "compare", "dim")


def is_neutral(key):
    """Whether a dotted config key leaves the run what it is."""
    return key.split(".")[0] in NEUTRAL_KEYS or key.endswith(("dir", "_file", "parquet", ".cache"))


def _run_config(folder):
    """The config dict that a run's folder holds."""
    path, config = Path(folder) / "config.yaml", None
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged; choose another output_dir= or move the run aside with --fresh")
    return config


def _environment(folder):
    """environment.json of a run's folder, {} if it has none yet."""
    with contextlib.suppress(UserError):  # a damaged one is begun anew
        return read_json(Path(folder) / "environment.json")
    return {}


def check_run(cfg, data_fingerprint=None):
    """Raise UserError if cfg.output_dir holds a run of another config or data, or something else. Writes nothing."""
    folder, remedy = Path(cfg.output_dir), "choose another output_dir= or move the old run aside with --fresh"
    is_run = (folder / "config.yaml").exists() or (folder / "checkpoint_latest.pt").exists()
    if is_run and getattr(cfg, "fresh", False):
        return
    if not (folder / "config.yaml").exists():
        others = [p.name for p in folder.glob("*") if not p.name.startswith((".", "compare."))]
        if others:
            raise UserError(f"{folder} is not empty and holds no run ({others[0]} ...); choose another output_dir=")
        return
    old, new = flatten(_run_config(folder)), flatten(dataclasses.asdict(cfg))
    changed = [key for key in {**old, **new} if not is_neutral(key) and old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key}={new.get(key)} (was {old.get(key)})" for key in changed[:4])
        raise UserError(f"{folder} holds a run of a different config: {shown}{' ...' * (len(changed) > 4)}; {remedy}")
    earlier = _environment(folder).get("data_fingerprint")
    if None not in (earlier, data_fingerprint) and earlier != data_fingerprint:
        raise UserError(f"{folder} holds a run on other data (fingerprint {earlier}, now {data_fingerprint}); {remedy}")


_LOCKS = {}  # (device, inode) of a run's .lock -> the open file, for as long as this process lives


def _lock(folder):
    """Own a run's folder until this process ends, however it ends. Raises: UserError if another process owns it."""
    file = open(folder / ".lock", "ab")  # noqa: SIM115, it stays open
    status = os.fstat(file.fileno())
    identity = status.st_dev, status.st_ino
    if identity in _LOCKS or fcntl is None:
        file.close()  # an flock is of the first opening
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _environment(folder)
        raise UserError(f"{folder} is in use by process {owner.get('process', '?')} on {owner.get('host', '?')} "
                        f"({owner.get('command_line', '?')}); wait for it, or set output_dir=") from None
    except OSError:  # a file system without locks
        pass
    _LOCKS[identity] = file
    os.register_at_fork(after_in_child=file.close)  # a killed run's workers do not keep it


def open_run(cfg, data_fingerprint):
    """Create cfg.output_dir or reopen it to resume; lock it, write config.yaml and environment.json. Returns its Path.

    With --fresh (`cfg.fresh`) an existing run is moved to `<folder>.old-N` first. Raises: UserError if the folder
    cannot be written, holds a run of another config or data, or something else, or is another process's.
    """
    folder = Path(cfg.output_dir)
    if process()[0]:  # it is the first one's
        cfg.fresh = False
        return folder
    check_run(cfg, data_fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if getattr(cfg, "fresh", False) and any(folder.glob("c*")):  # config.yaml, checkpoint_latest.pt
            names = (folder.with_name(f"{folder.name}.old-{n}") for n in range(1, 10**6))
            old = folder.rename(next(name for name in names if not name.exists()))
            print(f"moved the earlier run to {old}")
            folder.mkdir()
            _lock(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the output folder {folder} cannot be written ({reason}); set output_dir=") from None
    cfg.fresh = False
    write_text(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    record_environment(folder, data_fingerprint=data_fingerprint)
    return folder


def record_environment(folder, **facts):
    """Merge facts into environment.json: versions, device, git commit, command line, wall-clock times."""
    def git(*command):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(["git", "--no-optional-locks", *command], cwd=Path(__file__).parent, text=True,
                                  capture_output=True, timeout=10, check=True).stdout.strip()
    versions = {}
    for package in ("torch", "numpy", "matplotlib", "pyarrow", "soundfile", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    write_json(Path(folder) / "environment.json", {
        **_environment(folder), "command_line": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.datetime.now().isoformat(timespec="seconds"), "process": os.getpid(), "host": platform.node(),
        "python": platform.python_version(), "platform": platform.platform(), "processors": os.cpu_count(),
        "threads": torch.get_num_threads(), "versions": versions, "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain")), **facts})


def progress(items, label, **options):
    """tqdm over items (with the time that is left) when the terminal is interactive, else the items."""
    return tqdm(items, desc=label, leave=False, dynamic_ncols=True, **options) if sys.stderr.isatty() else items


def _open_wandb(folder, config):
    """The folder's W&B run, whose id environment.json keeps: a new folder is a new run, a resumed one goes on."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb=true needs the package: pip install wandb") from None
    run_id = _environment(folder).get("wandb_id") or uuid.uuid4().hex[:16]
    record_environment(folder, wandb_id=run_id)
    run = wandb.init(project=config["experiment"], name=folder.name, id=run_id, resume="allow", config=config,
                     dir=str(folder))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


class Run:
    """What a training loop keeps in its folder, and the wish to stop. The loop itself stays in the script:

        with common.Run(folder, cfg, model, optimizer, scheduler) as run:   # resumes the run that is there
            for step in run.steps(last_step):                              # the steps that are left, from 1
                run.add(train_step(...))                                   # 0-d tensors; nobody waits for the device
                if step % every == 0:
                    row = {"step": step, **run.means(), **validate(...)}
                    run.log(row, score=row["dev_mAP"])

    `history` holds the rows of metrics.csv, `best_step` the step of best_model.pt, `n_stale` the scored rows since. The
    first Ctrl-C or SIGTERM ends the loop after the step in hand, with a checkpoint; a second one acts at once.
    """

    POSITION = ("best_score", "best_step", "n_stale", "finished", "_pending", "_rates")  # of a checkpoint

    def __init__(self, folder, cfg, model, optimizer, scheduler=None, scaler=None, steps_per_epoch=None):
        self.folder, self.config = Path(folder), dataclasses.asdict(cfg)
        self.parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        self.steps_per_epoch = steps_per_epoch
        self.step, self.last_step, self.finished, self.history = 0, None, False, []
        self.best_score = self.best_step = self.best_val_loss = None
        self.n_stale = 0
        self._pending, self._rates = [], []  # losses and learning rates of the steps since means() was called
        self._rng = self._signum = self._wandb = None
        _check_memory(model)
        if process()[1] > 1:
            dist.barrier()  # process 0 has opened the folder
        self.latest = self.folder / "checkpoint_latest.pt"
        self._source = source_hash(cfg, {})
        if self.latest.exists() or _previous(self.latest).exists():
            state = load_checkpoint(self.latest)
            try:
                self._resume(state)
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.latest} is of another model or version of the script ({reason_of(error)}); use "
                                "--fresh to start again") from None
        self._first_step = self.step

    def _resume(self, state):
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(state[f"{name}_state_dict"])
        device = next(self.parts["model"].parameters()).device
        self.step, self.history, self._rng = operator.index(state["global_step"]), state["history"], state["rng"]
        number, others = process()[0], state.get("rng_of_others", [])
        if number:  # resumed with more or fewer processes it draws anew
            self._rng = others[number - 1] if len(others) == process()[1] - 1 else None
        self.best_val_loss = state["best_val_loss"]
        for name in self.POSITION:
            setattr(self, name, state["position"][name])
        own = 0 if number else 1  # process 0 goes on with the sums of all
        self._pending = [{name: own * x.to(device) for name, x in losses.items()} for losses in self._pending]
        if state["source"] != self._source:
            print(f"NOTE: {self.folder} was trained by another version of the script so far; --fresh trains anew")
        if self.history:  # a kill may have come between the checkpoint and this file
            self._write_csv()

    def __enter__(self):
        if not self.finished:
            (self.folder / "results.json").unlink(missing_ok=True)  # of an earlier state
            if self.config.get("wandb") and process()[0] == 0:
                self._wandb = _open_wandb(self.folder, self.config)
        self._started, self._handlers = time.time(), {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._note_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note_signal(self, signum, frame):
        self._signum = signum
        self._restore_signals()

    def _restore_signals(self):
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def __exit__(self, *error):
        self._restore_signals()
        if self._wandb:
            self._wandb.finish()
        n_steps, seconds = self.step - self._first_step, time.time() - self._started
        if n_steps:
            before = _environment(self.folder).get("train_seconds", 0) if self._first_step else 0
            record_environment(self.folder, train_seconds=round(before + seconds, 2),
                               seconds_per_step=round(seconds / n_steps, 4),
                               device=str(next(self.parts["model"].parameters()).device))

    def steps(self, last_step):
        """The numbers of the steps that are left of last_step, from 1."""
        self.last_step = last_step
        if self.finished:
            print(f"{self.folder}: training is complete")
            return
        if self.steps_per_epoch == 1:
            print("NOTE: an epoch is one step, as batch_size has no second batch; a smaller one makes more steps")
        if self.step:
            print(f"{self.folder}: resuming at step {self.step} of {last_step}")
        if self._rng:
            set_rng_state(self._rng)
        elif process()[0]:  # other dropout than in process 0
            torch.manual_seed(torch.initial_seed() + process()[0])
        first = self.step
        for step in progress(range(first + 1, last_step + 1), "steps", initial=first, total=last_step):
            self.step = step
            yield step
            if signum := self._stop_signal():
                self.save()
                raise Stopped(signum, f"stopped at step {step}; the same command resumes from {self.latest}")
            if self.finished:
                return
        self.save()  # the last step was not logged

    def _stop_signal(self):
        """The signal to stop at, the same in every process after the same step: several agree at every 8th."""
        if process()[1] == 1:
            return self._signum
        if self.step % 8:
            return None
        signum = torch.tensor(self._signum or 0)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)

    def restart(self, scheduler):
        """Begin a phase of its own: another scheduler, and a best score of this phase alone."""
        self.parts["scheduler"], self.best_score, self.n_stale = scheduler, None, 0

    def add(self, losses):
        """Keep the losses of a step, {name: 0-d tensor}, on their device; of several processes each its part."""
        self._pending.append({name: value.detach() for name, value in losses.items()})
        rate = self.parts["optimizer"].param_groups[0]["lr"]
        self._rates.append(rate.clone() if isinstance(rate, torch.Tensor) else rate)

    def means(self):
        """{name: mean since the last call}. Raises: FloatingPointError naming the term, its step and learning rate."""
        names = list(dict.fromkeys(name for losses in self._pending for name in losses))
        first, means = self.step + 1 - len(self._pending), {}
        for name in reversed(names):  # the total last: its parts say more
            places = [i for i, losses in enumerate(self._pending) if name in losses]
            values = summed(torch.stack([self._pending[i][name] for i in places])).tolist()
            for i, value in zip(places, values, strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(f"non-finite {name} in step {first + i}, learning rate "
                                             f"{float(self._rates[i]):g}; lower it, or look at the data")
            means[name] = sum(values) / len(values)
        self._pending, self._rates = [], []
        return {name: means[name] for name in names}

    def log(self, row, score=None, val_loss=None, patience=0, show=(), **extras):
        """Append a row to metrics.csv. With a score (higher is better) also save checkpoint_latest.pt and, if it is the
        best so far, best_model.pt with the `extras` (plain types, tensors); True if so. After `patience` scored rows
        without a better one the training ends, for good (0: never). `show`: columns to print."""
        row = {name: v.item() if isinstance(v, (np.generic, torch.Tensor)) else v for name, v in row.items()}
        row, score, val_loss = agreed([row, score, val_loss])
        self.history.append(row)
        if val_loss is not None:
            self.best_val_loss = min(float(val_loss), math.inf if self.best_val_loss is None else self.best_val_loss)
        better = score is not None and (self.best_score is None or score > self.best_score)
        if better:
            self.best_score, self.best_step = float(score), self.step
            state = {"model_state_dict": self.parts["model"].state_dict(), "config": self.config, "step": self.step}
            save_checkpoint(self.folder / "best_model.pt", {**state, **extras}, keep_previous=False)
        if score is not None:
            self.n_stale = 0 if better else self.n_stale + 1
            self.finished = self.finished or 0 < patience <= self.n_stale
            self.save()
        self._write_csv()
        if self._wandb:
            self._wandb.log({"step": self.step, **{name: value for name, value in row.items() if value is not None}})
        if show:
            left = (time.time() - self._started) / (self.step - self._first_step) * (self.last_step - self.step)
            values = "  ".join(f"{name} {row[name]:.4g}" for name in show)
            minutes = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            print(f"step {self.step}/{self.last_step}  {values}{' *' if better else ''}  ({minutes} left)", flush=True)
        return better

    def save(self):
        """Write checkpoint_latest.pt."""
        rngs = [rng_state()] * process()[1]
        if process()[1] > 1:
            dist.all_gather_object(rngs, rng_state())
        self.finished = self.finished or self.step == self.last_step
        position = {name: getattr(self, name) for name in self.POSITION}
        position["_pending"] = [{name: summed(x) for name, x in losses.items()} for losses in self._pending]
        states = {f"{name}_state_dict": {} if part is None else part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.latest, {
            "epoch": self.step // self.steps_per_epoch if self.steps_per_epoch else 0, "global_step": self.step,
            "best_val_loss": self.best_val_loss, **states, "history": self.history, "config": self.config,
            "rng": rngs[0], "rng_of_others": rngs[1:], "source": self._source,
            "position": position})

    def _write_csv(self):
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in self.history]
        write_text(self.folder / "metrics.csv", "".join(f"{','.join(line)}\n" for line in [columns, *cells]))


def _check_memory(model):
    """Raise UserError if weights, gradients and AdamW's moments exceed the machine's memory: it would be killed."""
    trained = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
    needed = memory = 4 * sum(p.numel() * p.element_size() for p in trained)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a system that does not tell
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(f"the model needs {needed / 1e9:.0f} GB with its gradients and optimizer, the machine has "
                        f"{memory / 1e9:.0f}; lower the sizes of the model")


def load_best(folder, model):
    """Load a finished run's best_model.pt into the model, in eval mode; returns the checkpoint.

    Raises: UserError if there is none, it is of another model, or training has not come to its end.
    """
    folder = Path(folder)
    try:
        best = load_checkpoint(folder / "best_model.pt")
        latest = load_checkpoint(folder / "checkpoint_latest.pt")
    except FileNotFoundError as error:
        raise UserError(f"{error}; a finished run that has lost it starts again with --fresh") from None
    try:
        finished, step = latest["position"]["finished"], latest["global_step"]
        model.load_state_dict(best["model_state_dict"])
        best["step"]
    except (AttributeError, KeyError, RuntimeError, TypeError):
        raise UserError(f"{folder}: best_model.pt is of another model than the config and data ask for, or the "
                        "checkpoints were edited; use --fresh") from None
    if not finished:
        raise UserError(f"{folder}: training stopped at step {step}; the same command without --stage goes on")
    model.eval()
    return best


# -------------------------------------------------------------------------------------------- config and command line

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def ranged(default, *bounds):
    """A dataclass field whose value must satisfy every bound, e.g. `ranged(0.1, ">= 0", "< 1")`."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


class _StrictLoader(yaml.BaseLoader):
    """YAML with every scalar left a string (the dataclass types it); no duplicates, no aliases, 20 levels at most."""

    depth = 0

    def compose_node(self, parent, index):
        line = f"line {self.peek_event().start_mark.line + 1}"
        if self.check_event(yaml.AliasEvent):
            raise UserError(f"{line}: aliases (*name) are not read; write the value out")
        if self.depth == 20:
            raise UserError(f"{line}: nested more than 20 levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                line = node.value[i][0].start_mark.line + 1
                raise UserError(f"line {line}: duplicate key {key!r}; keep one of the two")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The mapping in a YAML file, all scalars as strings. Raises UserError: no such file, bad syntax, duplicate key."""
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        files = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config{_nearest(str(path), files)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # also bytes that are no UTF-8, a NUL in the path
        raise UserError(f"{str(path)!r}: cannot be read ({error})") from None
    if raw in (None, ""):
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(raw).__name__}")
    return raw


def _nearest(word, known):
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def nearest_key(word, keys):
    """The key that was meant, or None: the same leaf elsewhere, its initials (lr), a word of it (epochs), or a near
    spelling."""
    leaf = word.replace("-", "_").rpartition(".")[2]

    def closeness(key):
        name = key.rpartition(".")[2]
        words = name.split("_")
        named = leaf in (name, "".join(w[0] for w in words), *words)
        return named + difflib.SequenceMatcher(None, word, key).ratio()
    best = max(keys, key=closeness, default="")
    return best if closeness(best) > 0.6 else None


def _describe(kind):
    """A field type in the words of an error message."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null",
             dict: "a section"}
    return names.get(kind) or f"a list of {_describe((typing.get_args(kind) or (str,))[0]).removeprefix('a ')}s"


def _convert(value, kind):
    """What YAML gave, a string, list or dict, as `kind`; ValueError if it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda k: k is str):  # str takes anything: last
            with contextlib.suppress(ValueError):
                return _convert(value, option)
        raise ValueError
    if origin is list or kind is list:
        if not isinstance(value, list):
            raise ValueError
        return [_convert(v, args[0] if args else str) for v in value]
    if kind is dict and isinstance(value, dict):
        return value
    if kind is dict or not isinstance(value, str):
        raise ValueError
    value = re.sub(r'^\\"(.*)\\"$', r"\1", value.strip())  # \"siglip\": quotes escaped by a Markdown editor
    if "\0" in value or value.encode("utf-8", "ignore").decode() != value:  # NUL, half of a surrogate pair: in no path
        raise ValueError
    words = None
    if origin is typing.Literal:
        words = {str(option): option for option in args}
    elif kind is type(None):
        words = dict.fromkeys(("", "~", "null", "Null", "NULL", "None"))
    elif kind is bool:
        value, words = value.lower(), {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if words is not None:
        if value not in words:
            raise ValueError
        return words[value]
    number = kind(value)  # int("512"), float("1e-4"), str("no")
    if (kind is float and not math.isfinite(number)) or (kind is int and abs(number) >= 2**63):
        raise ValueError
    return number


def _set(section, tree, where, keys, prefix="", seen=None):
    """Set the fields of a config section, and of those in it, from nested dicts of strings; UserError names the key."""
    hints = typing.get_type_hints(type(section))
    seen = set() if seen is None else seen
    for key, raw in tree.items():
        key, _, rest = key.partition(".")  # training.seed: 1 is training: {seed: 1}
        raw = {rest: raw} if rest else raw
        name, kind = prefix + key, hints.get(key)
        if kind is None:
            within = next(iter(raw), "") if isinstance(raw, dict) else ""  # modell: {dim: 4} means model.dim
            meant = nearest_key(f"{name}.{within}" if within else name, keys)
            hint = f"; did you mean {meant}?" if meant else ""
            raise UserError(f"{where}: unknown key {name}{hint} (-h lists every key)")
        if dataclasses.is_dataclass(kind):
            if not isinstance(raw, dict) and raw != "":  # `training:` with nothing under it is fine
                raise UserError(f"{where}: {name} is a section; set {name}.<key> instead of {name}={raw}")
            _set(getattr(section, key), raw or {}, where, keys, f"{name}.", seen)
            continue
        if name in seen:
            raise UserError(f"{where}: duplicate key {name} (dotted and in its section); keep one of the two")
        seen.add(name)
        try:
            value = _convert(raw, kind)
        except (ValueError, OverflowError):
            choices = [str(c) for c in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []
            shown = repr(raw) if len(repr(raw)) < 80 else f"{repr(raw)[:60]}..."
            hint = _nearest(str(raw), choices)
            raise UserError(f"{where}: {name}: expected {_describe(kind)}, found {shown}{hint}") from None
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
        for bound in type(section).__dataclass_fields__[key].metadata.get("bounds", ()):
            op, limit = bound.split()
            if not all(COMPARE[op](v, float(limit)) for v in numbers):
                raise UserError(f"{where}: {name}: must be {bound}, found {raw}")
        setattr(section, key, os.path.expanduser(value) if key.endswith(("dir", "_file")) else value)


def load_config(Config, path, overrides=(), demo=False):
    """The config dataclass from a YAML file and `key=value` overrides; every value is converted to its field's type.

    The file's `demo:` section is checked always and applied, before the overrides, with `demo=True`. An empty
    `output_dir` becomes `results/[demo/]<file name>[,overrides that change the run]`.
    Args: Config: dataclass, nested one dataclass a section, with an `experiment` name and an `output_dir`.
        path: a YAML file, or None for the defaults. overrides: list of 'section.key=value'.
    Raises: UserError (a ValueError), in one line: unknown or duplicate key, wrong type, out of range, missing file,
        a YAML of another experiment.
    """
    cfg, raw = Config(), read_yaml(path) if path is not None else {}
    keys = list(flatten(dataclasses.asdict(cfg)))
    name, demo_section = raw.get("experiment", cfg.experiment), raw.pop("demo", "") or {}
    if name != cfg.experiment:
        raise UserError(f"{path}: is a config of exp_{name}.py (experiment: {name}), not of exp_{cfg.experiment}.py; "
                        "a copied script takes a copied YAML")
    if not isinstance(demo_section, dict):
        raise UserError(f"{path}: demo is a section of keys, found {demo_section!r}")
    _set(cfg, raw, path, keys)
    _set(cfg if demo else Config(), demo_section, f"{path}: demo", keys)
    changed = {}
    for item in overrides:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"{item!r}: an override is written key=value, e.g. seed=1")
        if value.startswith(("[", "{", '"', "'")):  # the rest stays as it is: a path may hold ` #` or `: `
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.load(value, Loader=_StrictLoader)
        if key == "experiment":
            raise UserError("command line: experiment is the script's own name; it cannot be set")
        _set(cfg, {key: value}, "command line", keys)
        if not is_neutral(key):
            changed[key] = _plain(value)
    if getattr(cfg, "output_dir", "-") in ("", "null", "~"):
        stem = Path(path).stem if path is not None else cfg.experiment
        folder = ",".join([stem, *(f"{key}={changed[key]}" for key in sorted(changed))])
        folder = re.sub(r"[^\w.=,+\-\[\]]+", "_", folder)
        if len(folder) > 200:  # file systems stop at 255 bytes
            folder = f"{folder[:180]}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"
        cfg.output_dir = str(Path("results", "demo" if demo else "", folder))
    return cfg


def flatten(tree, prefix="", leaves=()):
    """{'a': {'b': 1}} -> {'a.b': 1}, but for the dicts named in leaves."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and prefix + key not in leaves
        flat |= flatten(value, f"{prefix}{key}.", leaves) if nested else {prefix + key: value}
    return flat


def _plain(value):
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return "null" if value is None else str(value)


def _config_help(section, prefix=""):
    """One line a key: name, default, the trailing comment on the field in the source, choices and bounds."""
    source, lines = inspect.getsource(type(section)).splitlines(), []
    hints = typing.get_type_hints(type(section))
    statements = {node.target.id: source[node.end_lineno - 1] for node in ast.parse("\n".join(source)).body[0].body
                  if isinstance(node, ast.AnnAssign)}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            lines += ["", *_config_help(value, f"{prefix}{field.name}.")]
            continue
        choices = f" [{_describe(hints[field.name])}]" if typing.get_origin(hints[field.name]) is typing.Literal else ""
        bounds = "".join(f" ({b})" for b in field.metadata.get("bounds", ()))
        key = f"{prefix}{field.name}={_plain(value)}"
        lines.append(f"  {key:44} {statements[field.name].partition('# ')[2]}{choices}{bounds}")
    return lines


class Finished(Exception):
    """A command that was done before any data were read."""


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is a UserError."""

    def error(self, message):
        raise UserError(f"{message} (-h shows the usage)")


def parse_command_line(argv, configs, doc, stages):
    """`config.yaml [key=value ...] [--stage S] [--demo] [--fresh]`, or `--compare FOLDER ...` -> arguments.

    -h lists every key of the config dataclasses. Raises: UserError.
    """
    epilog = ""
    if {"-h", "--help"} & set(argv):
        sections = [Config() for Config in configs]
        for path in (word for word in argv if os.path.isfile(word) or re.fullmatch(r"[^=]+\.ya?ml", word)):
            try:
                raw = read_yaml(path)  # it fits the config that has most of its keys
                kind = max(configs, key=lambda Config: len(raw.keys() & Config.__dataclass_fields__.keys()))
                sections[configs.index(kind)] = load_config(kind, path, demo="--demo" in argv)
            except UserError as error:
                epilog += f"{error}; shown are the defaults\n\n"
        epilog += "config keys, values (the YAML's, else defaults) and meaning (set in the YAML, or as key=value):\n"
        epilog += "\n\n".join("\n".join(_config_help(section)) for section in sections)
    parser = Parser(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="a YAML file in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="change a config key, e.g. seed=1 training.learning_rate=3e-4")
    parser.add_argument("--stage", choices=stages, default="all", help="run only this part (default: all)")
    parser.add_argument("--demo", action="store_true", help="synthetic stand-in data, about a minute on a laptop CPU")
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder to .old-N and start again")
    parser.add_argument("--compare", nargs="+", metavar="FOLDER", help="finished runs side by side; needs no YAML")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        option, _, value = unknown[0].partition("=")
        following = [word for word in argv[argv.index(unknown[0]) + 1:][:1] if not word.startswith("-")]
        keys = [key for Config in configs for key in flatten(dataclasses.asdict(Config()))]
        meant = nearest_key(option.lstrip("-"), keys)
        hint = f"did you mean {meant}={value or ''.join(following)}?" if meant else "config keys are written key=value"
        raise UserError(f"{option}: no such option; {hint} (-h lists everything)")
    if args.config and args.compare:
        raise UserError(f"--compare takes folders alone; leave {args.config} out")
    if args.config is None and not args.compare:
        raise UserError("which config? The first argument is a YAML file, e.g. one of configs/ (-h shows the usage)")
    if args.config and "=" in args.config and not Path(args.config).exists():
        raise UserError(f"the config file comes first, found {args.config!r}")
    return args


def setup(argv, Config, doc, stages, use_demo):
    """(cfg, stage) of a command line, with all that can be told before the data are read; `--compare` ends here.

    use_demo(cfg) writes the stand-in data and points cfg at them.
    Raises: UserError; Finished after --compare.
    """
    args = parse_command_line(argv, (Config,), doc, stages)
    if args.compare:
        compare_runs(args.compare)
        raise Finished
    cfg = load_config(Config, args.config, args.overrides, demo=args.demo)
    join_processes(cfg.device)
    if args.demo:
        before = flatten(dataclasses.asdict(cfg))
        with one_after_the_other():
            use_demo(cfg)
        after = flatten(dataclasses.asdict(cfg))
        for key in (item.partition("=")[0].strip() for item in args.overrides):
            if before.get(key) != after.get(key):
                raise UserError(f"--demo brings its own data; leave --demo or {key}= out")
    if args.fresh and args.stage not in ("all", "train"):
        raise UserError(f"--fresh starts a run again; --stage {args.stage} needs a trained one")
    if args.stage in ("evaluate", "embed") and not Path(cfg.output_dir, "checkpoint_latest.pt").exists():
        raise UserError(f"{cfg.output_dir}: no trained run to {args.stage}; run the command without --stage first")
    cfg.fresh = args.fresh
    check_run(cfg)
    return cfg, args.stage


_ALLOCATION = re.compile(r"allocate memory|out of memory|ALLOC\w*_FAILED|Storage size calculation overflowed|"
                         "Overflow when unpacking")


def is_out_of_memory(error):
    """Whether an exception says so; CUDA's libraries (cuBLAS, cuDNN) raise others than PyTorch does."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _ALLOCATION.search(str(error)) is not None


def exit_codes(main):
    """Make `main(argv)` return 0 done, 2 a user's mistake, 1 anything else, 130/143 stopped by Ctrl-C/SIGTERM.

    What a user can cause is one line on stderr; only a bug shows a traceback.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts' guard was for the imports
        try:
            main(sys.argv[1:] if argv is None else argv)
            return 0
        except Finished:
            return 0
        except UserError as error:
            message, code = str(error), 2
        except Stopped as stop:
            message, code = str(stop), 128 + stop.signum
        except KeyboardInterrupt:
            message, code = "stopped by Ctrl-C", 130
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, TypeError) as error:
            code = 1
            if process()[1] > 1 and re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                message = "another process of this run has ended; the same command resumes from the last checkpoint"
            elif is_out_of_memory(error):
                asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
                asked = f"tried to allocate {asked.group(1)}" if asked else reason_of(error)
                message = f"out of memory ({asked}); lower the batch size or the sizes of the model"
            else:
                raise
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (OSError, FloatingPointError) as error:
            message, code = str(error), 1
        finally:
            if process()[1] > 1:
                dist.destroy_process_group()
        line = " ".join(message.split())
        if os.environ.get("LOCAL_RANK", "0") == "0" or code == 1:  # the others of a machine make the same mistake
            print(f"error: {line}" if code < 128 else line, file=sys.stderr)
        return code
    return wrapped


# ------------------------------------------------------------------------------------------------------------- results

def run_facts(cfg, data):
    """What every results.json holds: experiment, seed, the data's fingerprint, whether they are synthetic, `source`."""
    return {"experiment": cfg.experiment, "seed": cfg.seed, "data_fingerprint": data.fingerprint,
            "synthetic": data.synthetic, "source": source_hash(cfg, getattr(cfg, "evaluation", {}))}


def source_hash(cfg, settings):
    """16 hex digits of the script's and this file's source, and of some settings."""
    content = Path(__file__).read_bytes()
    with contextlib.suppress(TypeError, OSError):  # a class that was typed into a notebook
        content += Path(inspect.getfile(type(cfg))).read_bytes()
    return hashlib.sha256(content + repr(settings).encode()).hexdigest()[:16]


def _read_results(folder):
    """results.json of a finished run. Raises: UserError if it is not there, damaged, or lacks what `publish` writes."""
    path = Path(folder) / "results.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; {folder} is not the folder of a finished run")
    results = read_json(path)
    kinds = {"headline": str, "tables": dict, "seed": int, "data_fingerprint": str, "synthetic": bool, "files": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(results.get(key), kind)]
    tables = results["tables"].values() if "tables" not in wrong else []
    if not all(isinstance(table, dict) and all(isinstance(row, dict) for row in table.values()) for table in tables):
        wrong.append("tables")
    if wrong or not isinstance(results.get("curves", {}), dict):
        raise UserError(f"{path}: {(*wrong, 'curves')[0]} is missing or damaged; run its command again, which writes "
                        "it anew")
    return results


def published(cfg, data_fingerprint):
    """results.json of cfg's run, or None (which is said) if it, or what it lists, is missing, damaged, of other
    data or of another version of the script: then the evaluation runs again, and the training does not."""
    folder = Path(cfg.output_dir)
    if not (folder / "results.json").exists():
        return None
    try:
        results = _read_results(folder)
        check_crc(folder / "per_item.pt")
        why = [f"{name} is gone" for name in results["files"] if not (folder / name).exists()]
    except UserError as error:
        results, why = {}, [str(error)]
    if not why and results["data_fingerprint"] != data_fingerprint:
        why = ["it is of other data"]
    if not why and results.get("source") != source_hash(cfg, getattr(cfg, "evaluation", {})):
        why = ["it is of another version of the script"]
    if why:
        print(f"{folder}: the evaluation runs again ({why[0]})")
        return None
    return results


def publish(folder, results):
    """Print results and write results.json, report.md and, for `--compare`, per_item.pt.

    results: {"headline": str, "tables": {title: {row: {column: number}}}, "notes": [str], "curves": as in `plot_lines`,
    "chosen": what train and dev chose, "per_item": as in `compare_runs`, and `run_facts`}. The columns `<column> low`
    and `<column> high` are the interval of a column.
    """
    folder, results = Path(folder), dict(results)
    per_item, config = results.pop("per_item", None), _run_config(folder) if (folder / "config.yaml").exists() else {}
    if per_item is not None:
        save_checkpoint(folder / "per_item.pt", per_item, keep_previous=False)
    written = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    results["files"] = sorted(path for path in written if path.endswith((".png", ".csv", "per_item.pt")))
    write_json(folder / "results.json", results)
    write_text(folder / "report.md", _report(folder, results))
    print(f"\n{results_text(results)}")
    if config.get("wandb") and per_item is not None:
        run = _open_wandb(folder, config)
        import wandb
        for title, table in results["tables"].items():
            header, rows = _cells(title, table)
            run.log({title: wandb.Table(columns=header, data=rows)})
        run.log({path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))})
        run.finish()
    print(f"files: {folder}/ (report.md, results.json, metrics.csv, best_model.pt, *.png)")


def interval_tables(rows, pairs, n, statistic=None, groups=None):
    """(table, differences, items): rows and differences of pairs with bootstrap intervals; `items` is for per_item.pt.

    rows: {row: values}. statistic(values, None) -> {column: number}; with weights [R, n] -> {column: [R]} of those
    that get an interval. By default values are {column: [n]} and the numbers their means. pairs: (row, row) as "a - b".
    groups: as in `bootstrap`.
    """
    statistic = statistic or _mean_statistic
    scores = {name: statistic(values, None) for name, values in rows.items()}
    draws = {name: bootstrap(functools.partial(statistic, values), n, groups)
             for name, values in progress(rows.items(), "bootstrap")}
    differences = {f"{a} - {b}": _row(_minus(scores[a], scores[b]), _minus(draws[a], draws[b]), True) for a, b in pairs}
    table = {name: _row(scores[name], draws[name]) for name in rows}
    as_tensors = {kind: {name: {column: torch.as_tensor(value) for column, value in columns.items()}
                         for name, columns in numbers.items()}
                  for kind, numbers in (("scores", scores), ("draws", draws))}
    return table, differences, {"rows": rows, **as_tensors}


def _minus(a, b):
    return {name: a[name] - b[name] for name in a if name in b}


def _row(scores, draws, is_difference=False):
    """A table's row of {column: number}, with an interval for the columns that have draws [R]."""
    row = {}
    for name, value in scores.items():
        row[name] = float(value)
        if name in draws:
            row[f"{name} low"], row[f"{name} high"] = interval(value, draws[name], is_difference)
    return row


def _mean_statistic(values, weights):
    """{column: mean} of values {column: [N]}, of the whole set or (weights [R, N]) of resamples."""
    values = {name: torch.as_tensor(v, dtype=torch.float64).numpy() for name, v in values.items()}
    return {name: v.mean() if weights is None else weights @ v / weights.sum(1) for name, v in values.items()}


def _decimals(sizes):
    """How many decimals numbers of a column get, by the largest."""
    largest = max(sizes, default=0)
    return 1 if largest >= 10 else 2 if largest >= 1 else 3


def _cells(title, table):
    """(header, rows) of text of {row: {column: value}}, with the intervals beside their values."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    bounds = {f"{name} {side}" for name in names for side in ("low", "high")}
    columns = [name for name in names if name not in bounds]

    def number(column, value):
        if not isinstance(value, float):
            return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
        numbers = [abs(row[column]) for row in table.values() if isinstance(row.get(column), float)]
        return "-" if math.isnan(value) else f"{value:.{_decimals(numbers)}f}"

    def cell(column, row):
        low, high = (row.get(f"{column} {side}") for side in ("low", "high"))
        interval = "" if low is None else f" [{number(column, low)}, {number(column, high)}]"
        return number(column, row.get(column)) + interval
    return [title, *columns], [[label, *(cell(column, row) for column in columns)] for label, row in table.items()]


def format_table(header, rows):
    """Plain aligned text: the first column left, the others right; floats with one decimal, None as a dash."""
    def text(v):
        return "-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v)
    cells = [[*map(text, row)] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def results_text(results):
    """What a run prints last: its headline, its tables and its notes."""
    mark = "  [SYNTHETIC demo data]" if results.get("synthetic") else ""
    tables = [format_table(*_cells(title, table)) for title, table in results["tables"].items()]
    return "\n\n".join([results["headline"] + mark, *tables, "\n".join(results.get("notes", []))]).rstrip()


def _report(folder, results):
    """report.md: the headline, tables and pictures of a run, its command and versions; last the seconds and FLOPs."""
    environment, parts = _environment(folder), [f"# {folder.name}"]
    parts.append(results["headline"] + (" (**synthetic demo data**)" if results.get("synthetic") else ""))
    for title, table in results["tables"].items():
        header, rows = _cells(title, table)
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]))
    parts += results.get("notes", [])
    parts += [f"![{Path(path).stem}]({path})" for path in results["files"] if path.endswith(".png")]
    if environment:
        command = re.sub(r" (output_dir=\S*|--fresh|--stage \w+)", "", environment["command_line"])
        versions, commit = environment["versions"], (environment["git_commit"] or "unknown")[:10]
        commit += " with changes" * bool(environment.get("git_dirty"))
        parts.append(f"    python {command}")
        parts.append(f"seed {results.get('seed')}, data {environment['data_fingerprint']}, torch {versions['torch']}, "
                     f"numpy {versions['numpy']}, commit {commit}")
        where = environment.get("gpu") or f"CPU, threads: {environment['threads']}"
        measured = ""
        with contextlib.suppress(UserError, KeyError, IndexError, TypeError):  # profile_flops.py has not been here
            flops = read_json(folder.parent / "flops" / f"{folder.name}.json")["results"][0]["flops_run"]
            measured = f", {flops / 1e12:.3g} TFLOP"
        parts.append(f"{environment.get('train_seconds', math.nan):.1f} s of training ({where}){measured}.")
    return "\n\n".join(parts) + "\n"


def _runs_by_seed(folders):
    """{label: [(folder, results)]}: finished runs, those that differ only in their seed together. Raises: UserError."""
    groups = {}
    for folder in map(Path, folders):
        if re.search(r"\.old-\d+$|^(compare|demo|flops)$", folder.name):  # what results/* names beside runs
            continue
        if (folder / "config.yaml").exists() and not (folder / "results.json").exists():
            print(f"NOTE: {folder} is left out: its run is not finished")
            continue
        results, config = _read_results(folder), flatten(_run_config(folder))
        settings = {k: v for k, v in config.items() if k != "seed" and not is_neutral(k)}
        key = json.dumps([settings, results["data_fingerprint"]], sort_keys=True)
        twins = [other["tables"] for _, other in groups.get(key, []) if other["seed"] == results["seed"]]
        if results["tables"] in twins:  # a copy of a run is not another seed
            continue
        key += str(folder) if twins else ""  # other results of a seed: an edited script's
        groups.setdefault(key, []).append((folder, results))
    if not groups:
        raise UserError(f"no finished run among {', '.join(map(str, folders))}; --compare takes folders of finished "
                        "runs")
    labelled = {}
    for runs in groups.values():
        folder = runs[0][0]
        label = re.sub(r"[,_-]?seed[=_-]?\d+", "", folder.name) or folder.parent.name
        if label in labelled:
            label = f"{folder.parent.name}/{label}"
        labelled[label if label not in labelled else f"{label} {len(labelled) + 1}"] = runs
    if len({results["data_fingerprint"] for runs in labelled.values() for _, results in runs}) > 1:
        print("NOTE: these runs were not made from the same data")
    return labelled


def compare_runs(folders, out="results/compare"):
    """Finished runs side by side, in tables (mean +- sd over seeds), paired differences to the first, and curves.

    A run's per_item.pt is {"ids": [n] names of the test items} and the `items` of `interval_tables`. A difference (the
    mean over the seeds of either side) gets its paired 95% bootstrap interval over the test items, where two runs have
    the same ids. Writes compare.txt and compare.png to `out`. Raises: UserError for a folder without a run.
    """
    runs, tables, out = _runs_by_seed(folders), {}, Path(out)
    for title in dict.fromkeys(title for group in runs.values() for _, results in group for title in results["tables"]):
        tables[title] = merged = {}
        of_run = {label: [results["tables"].get(title, {}) for _, results in group] for label, group in runs.items()}
        for row in dict.fromkeys(row for group in of_run.values() for table in group for row in table):
            values = {label: _over_seeds([table[row] for table in group if row in table])
                      for label, group in of_run.items()}
            if len(runs) > 1 and all(value == values[next(iter(runs))] for value in values.values()):
                merged[row] = values[next(iter(runs))]  # chance, a baseline: the same in all
            else:
                merged |= {f"{row}: {label} ({len(runs[label])})": value for label, value in values.items() if value}
    try:
        tables |= _paired_differences(runs)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"a per_item.pt of these runs is damaged ({reason_of(error)}); delete it and run its command "
                        "again") from None
    synthetic = any(results["synthetic"] for group in runs.values() for _, results in group)
    text = "\n\n".join(format_table(*_cells(title, table)) for title, table in tables.items())
    text += "\n\n[SYNTHETIC demo data]" if synthetic else ""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.txt", f"{text}\n")
    print(f"{text}\n{out / 'compare.txt'}")
    if curves := _merged_curves(runs):
        plot_lines(out / "compare.png", curves, synthetic=synthetic)
        print(out / "compare.png")


def _over_seeds(rows):
    """{column: "mean +- sd"} of a table's row in several runs; what is the same in all, or of one run, as it is."""
    if len(rows) < 2:
        return rows[0] if rows else None
    merged = {}
    for column in rows[0]:
        values = [row.get(column) for row in rows]
        if all(value == values[0] for value in values):
            merged[column] = values[0]
        elif not column.endswith((" low", " high")) and None not in values:
            digits = _decimals(map(abs, values))
            merged[column] = f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"
    return merged


def _paired_differences(runs):
    """{title: table} of the differences between the other runs and the first, paired over the test items."""
    items = {label: [load_checkpoint(folder / "per_item.pt") for folder, _ in group
                     if (folder / "per_item.pt").exists()] for label, group in runs.items()}

    def seed_mean(side, kind, row):
        return {name: np.mean([x[kind][row][name].numpy() for x in side], axis=0) for name in side[0]["draws"][row]}
    (first, theirs), *others = items.items()
    tables = {}
    for label, ours in others:
        both, table = [*theirs, *ours], {}
        if not theirs or not ours or not both[0]["ids"] or any(x["ids"] != both[0]["ids"] for x in both):
            continue
        for row in (row for row in both[0]["draws"] if all(row in x["draws"] for x in both)):
            scores, draws = (_minus(seed_mean(ours, kind, row), seed_mean(theirs, kind, row))
                             for kind in ("scores", "draws"))
            if any(scores.values()):  # else chance, or a baseline of either
                table[row] = _row(scores, draws, is_difference=True)
        if table:
            tables[f"{label} - {first} (paired, {len(both[0]['ids']):,} items)"] = table
    return tables


def _merged_curves(runs):
    """Curves of all runs, a line each (mean and sd over seeds)."""
    panels = {}
    start = os.path.commonprefix([*runs]) if len(runs) > 1 else ""  # noqa: RUF071, characters are meant
    shared = len(re.match(r"(.*[,=])?", start).group())  # what all labels begin with is left out
    for label, group in runs.items():
        for title, panel in group[0][1].get("curves", {}).items():
            lines = panels.setdefault(title, {**panel, "lines": {}})["lines"]
            for name, line in panel["lines"].items():
                seeds = [results.get("curves", {}).get(title, {}).get("lines", {}).get(name) for _, results in group]
                seeds = [seed["y"] for seed in seeds if seed and seed["x"] == line["x"]]  # evaluated by one version
                spread = {"sd": np.std(seeds, axis=0, ddof=1).tolist()} if len({*map(tuple, seeds)}) > 1 else {}
                key = name if name.startswith("chance") else f"{label[shared:]}: {name}"
                lines[key] = {"x": line["x"], "y": np.mean(seeds, axis=0).tolist(), **spread}
    return panels


# --------------------------------------------------------------------------------------------------------------- plots

def new_figure(n_panels=1, width=4.6, height=3.6):
    """(figure, list of axes), four or three in a row; matplotlib is imported here: -h and imports stay quick."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = 3 if n_panels in (5, 6, 9) else min(n_panels, 4)
    rows = -(-n_panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[n_panels:]:
        axis.remove()
    return figure, list(axes.flat[:n_panels])


def save_figure(figure, path):
    """Write a PNG atomically and free the figure."""
    import matplotlib.pyplot as plt
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)


def plot_lines(path, panels, title="", synthetic=False, mark=None):
    """Panels: {ylabel: {"xlabel": str, "lines": {label: {"x": [...], "y": [...]}}}}; a label has one colour in all.

    A line may have "sd", or "low" and "high" (error bars); one whose label begins with "chance" is grey and dotted.
    `mark` draws a vertical line at the chosen x. More than four panels, or many lines, share one legend below.
    """
    figure, axes = new_figure(len(panels))
    colours, handles = {}, {}
    for axis, (ylabel, panel) in zip(axes, panels.items(), strict=True):
        for label, line in panel["lines"].items():
            style = {"color": "grey", "linestyle": ":"} if label.startswith("chance") else {
                "color": colours.setdefault(label, f"C{len(colours)}"), "marker": "." if len(line["x"]) < 30 else None,
                "linestyle": "-" if [*colours].index(label) < 10 else "--"}
            spread = line.get("sd")
            if "low" in line:
                ends = np.subtract(line["y"], line["low"]), np.subtract(line["high"], line["y"])
                spread = np.maximum(0, ends)  # a basic bootstrap's interval need not hold the estimate
            handles[label] = axis.errorbar(line["x"], line["y"], spread, capsize=2, label=label, **style)
        if mark is not None:
            handles["chosen"] = axis.axvline(mark, color="grey", linestyle="--", linewidth=1, label="chosen")
        axis.set(xlabel=panel["xlabel"], ylabel=ylabel)
    if len(panels) > 4 or len(handles) > 8:
        width, height = figure.get_size_inches()
        columns = max(1, min(4, int(width / (0.5 + 0.08 * max(map(len, handles))))))
        figure.set_size_inches(width, height + 0.2 * -(-len(handles) // columns))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9)
    else:
        for axis in axes:
            axis.legend(fontsize=7)
    figure.suptitle(" ".join([title, "(synthetic data)" if synthetic else ""]).strip(), fontsize=10)
    save_figure(figure, path)


def plot_history(path, history, panels, x="step", title="", synthetic=False, mark=None):
    """Columns of metrics.csv against column x: panels = {ylabel: {label: column}}; rows without a value are skipped."""
    curves = {}
    for ylabel, columns in panels.items():
        lines = {}
        for label, column in columns.items():
            rows = [row for row in history if row.get(column) is not None]
            lines[label.replace("_", " ")] = {"x": [row[x] for row in rows], "y": [row[column] for row in rows]}
        curves[ylabel] = {"xlabel": x.rpartition("/")[2], "lines": lines}
    plot_lines(path, curves, title, synthetic, mark)


def plot_embedding_space(path, groups, title, method="pca"):
    """Two dimensions of sets of embeddings: groups = {label: [N, D]}; equal rows of the first two sets are joined.

    method: "pca", or "tsne" (scikit-learn). Raises: UserError if scikit-learn is asked for and missing.
    """
    sets = [x.detach().float().cpu() for x in groups.values()]
    stacked, labels = torch.cat(sets), ("t-SNE 1", "t-SNE 2")
    if method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise UserError("evaluation.projection=tsne needs scikit-learn: pip install scikit-learn") from None
        flat = TSNE(random_state=0, perplexity=min(30, (len(stacked) - 1) / 3)).fit_transform(stacked.numpy())
    else:
        centred = stacked - stacked.mean(0)
        _, deviations, directions = torch.linalg.svd(centred, full_matrices=False)
        flat, shares = (centred @ directions[:2].T).numpy(), deviations.square() / deviations.square().sum()
        labels = [f"PCA {i + 1}, {shares[i]:.0%} of the variance" for i in range(2)]
    figure, (axis,) = new_figure(width=5.6, height=5)
    parts = np.split(flat, np.cumsum([len(x) for x in sets])[:-1])
    if len(parts) > 1 and len(parts[0]) == len(parts[1]):
        axis.plot(*np.stack([parts[0], parts[1]], axis=2).transpose(1, 2, 0), color="grey", alpha=0.25, linewidth=0.5)
        a, b = (F.normalize(x, dim=1) for x in sets[:2])
        title += f"\ncosine of a pair {(a * b).sum(1).mean():.2f}, of any two {(a @ b.T).mean():.2f}"
    for (label, _), xy in zip(groups.items(), parts, strict=True):
        axis.scatter(*xy.T, s=8, label=label)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.set_title(title, fontsize=10)
    axis.legend()
    save_figure(figure, path)


def plot_similarity_matrix(path, similarity, title, xlabel, ylabel):
    """A [N, M] matrix of cosines as an image with its colour bar, from -1 to 1 whatever is in it."""
    figure, (axis,) = new_figure(width=5.2, height=4.6)
    image = axis.imshow(similarity.detach().float().cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1,
                        interpolation="nearest")
    figure.colorbar(image, ax=axis, label="cosine similarity")
    figure.suptitle(title, fontsize=9)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    save_figure(figure, path)
