"""Losses, metrics, schedule, checkpoints and config against naive float64 loops, reference values and scikit-learn."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import nn

import common
from common import UserError, info_nce, ranged, retrieval_metrics, sigmoid_loss

IDS = torch.tensor([0, 0, 1, 1, 2, 3, 3, 4])


def sine_pairs():
    """The pairs that the reference values were computed on: N=8, D=5, float64."""
    i, j = torch.arange(8.0, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)
    return F.normalize(torch.sin(1 + 5 * i + j), dim=1), F.normalize(torch.sin(1.3 + 5 * i + j), dim=1)


def random_pairs(n=37, d=6, seed=0, n_ids=15):
    g = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    return a, b, torch.randint(n_ids, (n,), generator=g)


def naive_info_nce(a, b, scale, ids=None, false_negatives="ignore", eps=0.0):
    """Loops over rows and columns, as the definition reads."""
    n, total = len(a), 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(n):
            same = [j for j in range(n) if ids is not None and ids[i] == ids[j]] or [i]
            kept = [j for j in range(n) if j == i or false_negatives != "mask" or j not in same]
            positives = same if false_negatives == "multi_positive" else [i]
            logits = {j: scale * (x[i] @ y[j]) for j in kept}
            log_sum = torch.stack(list(logits.values())).exp().sum().log()
            for j in kept:
                target = (1 - eps) / len(positives) * (j in positives) + eps / len(kept)
                total = total - target * (logits[j] - log_sum)
    return total / (2 * n)


def naive_sigmoid(a, b, scale, bias, ids=None, false_negatives="ignore"):
    total = 0.0
    for i in range(len(a)):
        for j in range(len(a)):
            same = ids is not None and bool(ids[i] == ids[j]) and i != j
            if same and false_negatives == "mask":
                continue
            z = 1 if i == j or (same and false_negatives == "multi_positive") else -1
            total = total - torch.log(torch.sigmoid(z * (scale * (a[i] @ b[j]) + bias)))
    return total / len(a)


# --------------------------------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize(("scale", "kwargs", "value"), [
    (1 / 0.07, {}, 0.5241731903), (1.0, {}, 1.3894025189), (100.0, {}, 1.1438948838),
    (1.0, {"label_smoothing": 0.1}, 1.4818636180), (20.0, {"label_smoothing": 0.1}, 2.3733673259),
    (20.0, {"label_smoothing": 0.1, "ids": IDS, "false_negatives": "mask"}, 2.4367725364),
    (1 / 0.07, {"ids": IDS, "false_negatives": "multi_positive"}, 3.7326922322),
    (1 / 0.07, {"ids": IDS, "false_negatives": "mask"}, 0.5215317836)])
def test_info_nce_reference_values(scale, kwargs, value):
    assert info_nce(*sine_pairs(), scale, **kwargs).item() == pytest.approx(value, abs=1e-9)
    assert info_nce(*sine_pairs(), scale, chunk_size=3, **kwargs).item() == pytest.approx(value, abs=1e-9)


def test_info_nce_gradient_of_the_log_scale():
    p = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    info_nce(*sine_pairs(), p.exp()).backward()
    assert p.grad.item() == pytest.approx(-0.0349983318, abs=1e-10)


def test_sigmoid_loss_reference_values():
    p = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    loss = sigmoid_loss(*sine_pairs(), p.exp(), b)
    loss.backward()
    assert loss.item() == pytest.approx(1.3541021520, abs=1e-10)
    assert p.grad.item() == pytest.approx(-2.7844927026, abs=1e-10)
    assert b.grad.item() == pytest.approx(-0.2818069722, abs=1e-10)
    assert sigmoid_loss(*sine_pairs(), 10.0, -10.0, IDS, "multi_positive").item() == pytest.approx(
        6.1762494184, abs=1e-10)


def test_closed_forms():
    same = F.normalize(torch.ones(12, 4, dtype=torch.float64), dim=1)
    assert info_nce(same, same, 14.0).item() == pytest.approx(math.log(12), abs=1e-12)
    assert sigmoid_loss(same, same, 10.0, -10.0).item() == pytest.approx(12 * math.log(2), abs=1e-11)
    eye = torch.eye(4, dtype=torch.float64)
    assert sigmoid_loss(eye, eye, 10.0, -10.0).item() == pytest.approx(0.6932833773, abs=1e-10)
    assert info_nce(eye, eye, 1 / 0.07).item() == pytest.approx(math.log(1 + 3 * math.exp(-1 / 0.07)), rel=1e-9)


def value_and_gradients(loss, *numbers):
    """[loss, its gradients by a, b and the numbers] of loss(a, b, ids, *numbers); the loss is scaled,
    as a sum of losses scales it."""
    a, b, ids = random_pairs()
    leaves = [x.requires_grad_() for x in (a, b, *torch.tensor(numbers, dtype=torch.float64))]
    value = loss(a, b, ids, *leaves[2:])
    (1.7 * value).backward()
    with torch.no_grad():
        assert torch.equal(loss(a, b, ids, *leaves[2:]), value)
    return [value.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("false_negatives", ["ignore", "mask", "multi_positive"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_info_nce_against_loops(false_negatives, eps, chunk_size):
    expected = value_and_gradients(lambda a, b, ids, scale: naive_info_nce(a, b, scale, ids, false_negatives, eps), 9.0)
    found = value_and_gradients(
        lambda a, b, ids, scale: info_nce(a, b, scale, ids, false_negatives, eps, chunk_size), 9.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("false_negatives", ["ignore", "mask", "multi_positive"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_sigmoid_loss_against_loops(false_negatives, chunk_size):
    expected = value_and_gradients(
        lambda a, b, ids, *numbers: naive_sigmoid(a, b, *numbers, ids, false_negatives), 9.0, -3.0)
    found = value_and_gradients(
        lambda a, b, ids, *numbers: sigmoid_loss(a, b, *numbers, ids, false_negatives, chunk_size), 9.0, -3.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_frozen_inputs_and_plain_numbers_get_no_gradient():
    a, b, ids = random_pairs()
    for loss in (lambda: info_nce(a, b, 9.0, ids, "mask"), lambda: sigmoid_loss(a, b, 9.0, -3.0, ids, "mask")):
        assert not loss().requires_grad
    a.requires_grad_()
    info_nce(a, b, 9.0).backward()
    assert torch.isfinite(a.grad).all()
    assert b.grad is None


@pytest.mark.parametrize("false_negatives", ["ignore", "mask", "multi_positive"])
@pytest.mark.parametrize("name", ["info_nce", "smoothed", "sigmoid"])
# sorted: with blocks of 1 or 2 a whole block of a column is masked
@pytest.mark.parametrize("sorted_ids", [False, True])
def test_blocks_change_neither_value_nor_gradient(name, false_negatives, sorted_ids):
    def run(chunk_size):
        a, b, ids = random_pairs(n_ids=6)
        ids = ids.sort().values if sorted_ids else ids
        leaves = [a.requires_grad_(), b.requires_grad_(),
                  *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.5, -4.0))]
        if name == "sigmoid":
            loss = sigmoid_loss(a, b, leaves[2].exp(), leaves[3], ids, false_negatives, chunk_size)
        else:
            loss = (info_nce(a, b, leaves[2].exp(), ids, false_negatives, 0.1 * (name == "smoothed"), chunk_size)
                    + 0 * leaves[3])
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]
    whole = run(37)
    for chunk_size in (1, 2, 5, 36):
        for one, other in zip(run(chunk_size), whole, strict=True):
            assert torch.isfinite(one).all()
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_losses_are_float32_under_autocast_and_finite_at_the_largest_scale():
    a, b, ids = random_pairs(64, 16)
    a, b = a.bfloat16(), b.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (info_nce(a, b, 100.0, ids, "mask"), sigmoid_loss(a, b, 100.0, -10.0, ids, "mask")):
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss)


def test_the_wider_of_two_dtypes_decides():
    a, b = sine_pairs()
    for loss in (lambda *pair: info_nce(*pair, 5.0), lambda *pair: sigmoid_loss(*pair, 5.0, -5.0)):
        for pair in ((a, b.float()), (a.float(), b)):
            assert loss(*pair).dtype == torch.float64
            assert loss(*pair).item() == pytest.approx(loss(a, b).item(), abs=1e-6)
        assert loss(a.half(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("kwargs", "message"), [({"false_negatives": "mask"}, "needs ids"),
                                                 ({"false_negatives": "drop"}, "must be ignore"),
                                                 ({"ids": torch.arange(3)}, "ids must be"),
                                                 ({"label_smoothing": 1.5}, "label_smoothing must")])
def test_loss_argument_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        info_nce(*sine_pairs(), 1.0, **kwargs)


def test_loss_shape_errors():
    a, b = sine_pairs()
    for loss in (lambda: info_nce(a, b[:5], 1.0), lambda: sigmoid_loss(a[:0], b[:0], 1.0, 0.0)):
        with pytest.raises(ValueError, match="must be equal"):
            loss()


# ------------------------------------------------------------------------------------------------------------- schedule

def test_warmup_cosine():
    expected = {0: 0, 1: 2e-6, 50: 1e-4, 100: 2e-4, 325: 1.707107e-4, 550: 1e-4, 775: 2.928932e-5, 999: 6.092342e-10,
                1000: 0, 5000: 0}
    for step, value in expected.items():
        assert 2e-4 * common.warmup_cosine(step, 1000, 100) == pytest.approx(value, rel=1e-6)
    assert common.warmup_cosine(0, 10, 0) == 1.0
    assert common.warmup_cosine(3, 2, 5) == 0.6  # warm-up longer than the run
    assert common.warmup_cosine(5, 5, 5) == 0.0
    assert (common.warmup_cosine(-1, 5, 0), common.warmup_cosine(-1, 5, 2)) == (1.0, 0.0)


# -------------------------------------------------------------------------------------------------------------- metrics

def five_captions():
    rng = np.random.RandomState(0)
    u = rng.normal(size=(200, 16))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v = u[np.arange(1000) // 5] + 0.45 * rng.normal(size=(1000, 16))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return torch.from_numpy(u), torch.from_numpy(v), torch.arange(200), torch.arange(1000) // 5


def naive_retrieval(queries, gallery, query_ids, gallery_ids, k):
    """Expected hit, rank of the best own row and AP by averaging over random orders of the ties."""
    scores = (queries.double() @ gallery.double().T).float().numpy()
    own = (query_ids[:, None] == gallery_ids).numpy()
    rng, hits, ranks, aps = np.random.default_rng(0), [], [], []
    for s, mine in zip(scores, own, strict=True):
        hit, rank, ap = [], [], []
        for _ in range(400):
            order = np.lexsort((rng.random(len(s)), -s))
            place = 1 + np.flatnonzero(mine[order])[0]
            hit.append(place <= k)
            rank.append(place)
            found = mine[order][:k]
            ap.append((found * found.cumsum() / np.arange(1, len(found) + 1)).sum() / min(k, mine.sum()))
        hits.append(np.mean(hit))
        ranks.append(np.mean(rank))
        aps.append(np.mean(ap))
    return np.mean(hits), np.mean(ranks), np.mean(aps)


def test_retrieval_reference_values():
    u, v, image_ids, own = five_captions()
    t2i = retrieval_metrics(v, u, own, image_ids)
    assert [t2i[k] for k in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")] == pytest.approx(
        [0.271, 0.539, 0.666, 4, 14.837], abs=1e-9)
    assert t2i["mAP@10"] == pytest.approx(0.38480, abs=5e-6)
    i2t = retrieval_metrics(u, v, image_ids, own, map_ks=(5, 10))
    assert [i2t[k] for k in ("R@1", "R@5", "R@10", "median_rank")] == pytest.approx([0.415, 0.820, 0.895, 2], abs=1e-9)
    assert [i2t["mAP@5"], i2t["mAP@10"]] == pytest.approx([0.17772, 0.20542], abs=5e-6)


def test_a_collapsed_model_scores_chance():
    _, _, image_ids, own = five_captions()
    x = F.normalize(torch.randn(1, 16), dim=1)
    for dtype in (torch.float32, torch.float64, torch.float16):
        u, v = x.expand(200, -1).to(dtype), x.expand(1000, -1).to(dtype)
        for queries, gallery, q_ids, g_ids in ((u, v, image_ids, own), (v, u, own, image_ids)):
            q = common.retrieval_per_query(queries, gallery, q_ids, g_ids)
            assert q["hit@1"].mean().item() == pytest.approx(0.005, abs=1e-12)
            for k in (1, 5, 10):
                torch.testing.assert_close(q[f"hit@{k}"], q[f"chance@{k}"])
            n, n_own = len(gallery), len(gallery) // 200
            chance = sum((1 + i * (n_own - 1) / (n - 1)) / (i + 1) for i in range(10)) * n_own / n / min(10, n_own)
            assert q["AP@10"].mean().item() == pytest.approx(chance, abs=1e-12)


def test_independent_noise_scores_chance():
    g = torch.Generator().manual_seed(1)
    a, b = (F.normalize(torch.randn(3000, 32, generator=g), dim=1) for _ in range(2))
    ids = torch.arange(3000)
    for k in (1, 5, 10):
        p = k / 3000
        assert abs(retrieval_metrics(a, b, ids, ids)[f"R@{k}"] - p) < 4 * math.sqrt(p / 3000)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_ties_against_random_orders(chunk_size):
    g = torch.Generator().manual_seed(3)
    # few values: many ties, own rows tied with each other too
    gallery = torch.randint(0, 2, (12, 3), generator=g).float()
    queries = torch.randint(0, 2, (40, 3), generator=g).float()
    gallery_ids, query_ids = torch.randint(0, 4, (12,), generator=g), torch.randint(0, 4, (40,), generator=g)
    gallery_ids[:4] = torch.arange(4)
    for k in (1, 3, 5):
        hit, rank, ap = naive_retrieval(queries, gallery, query_ids, gallery_ids, k)
        m = retrieval_metrics(queries, gallery, query_ids, gallery_ids, ks=(k,), map_ks=(k,), chunk_size=chunk_size)
        assert m[f"R@{k}"] == pytest.approx(hit, abs=0.012)
        assert m["mean_rank"] == pytest.approx(rank, abs=0.05)
        assert m[f"mAP@{k}"] == pytest.approx(ap, abs=0.012)


def test_many_own_rows_count_as_few_do():
    """Classes instead of pairs: with more own rows than are compared one by one,
    every number is that of the naive loop."""
    g = torch.Generator().manual_seed(4)
    gallery, queries = (torch.randint(0, 3, (n, 3), generator=g).float() for n in (120, 20))
    gallery_ids, query_ids = torch.randint(0, 2, (120,), generator=g), torch.randint(0, 2, (20,), generator=g)
    assert gallery_ids.bincount().max() > 32
    hit, rank, ap = naive_retrieval(queries, gallery, query_ids, gallery_ids, 10)
    m = retrieval_metrics(queries, gallery, query_ids, gallery_ids, chunk_size=7)
    assert (m["R@10"], m["mean_rank"]) == (pytest.approx(hit, abs=0.02), pytest.approx(rank, abs=0.1))
    assert m["mAP@10"] == pytest.approx(ap, abs=0.01)
    everything = retrieval_metrics(queries, gallery, query_ids * 0, gallery_ids * 0)  # all rows are own
    assert [everything[k] for k in ("R@1", "mean_rank", "MRR", "mAP@10")] == [1, 1, 1, 1]


def test_hit_probability_closed_form():
    for better, tied, own, k in ((0, 4, 2, 3), (2, 5, 1, 5), (3, 0, 1, 3), (0, 0, 3, 1), (7, 2, 2, 5), (1, 9, 4, 10)):
        r = min(max(k - better, 0), tied + own)
        expected = 1 - math.comb(tied + own - r, own) / math.comb(tied + own, own)
        got = 1 - common._miss_probability(*(torch.tensor([x]) for x in (better, tied, own)), k)
        assert got.item() == pytest.approx(expected, abs=1e-12)


def test_block_size_and_gallery_order_change_nothing():
    u, v, image_ids, own = five_captions()
    u, v = u.float(), v.float()
    v[100:140] = v[0]  # duplicates: ties must stay ties wherever a block ends
    shuffle = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    reference = retrieval_metrics(u, v, image_ids, own)
    for chunk_size in (1, 3, 64, 4096):
        assert retrieval_metrics(u, v, image_ids, own, chunk_size=chunk_size) == reference
    assert retrieval_metrics(u, v[shuffle], image_ids, own[shuffle]) == reference


def test_noise_of_a_float32_product_changes_nothing(monkeypatch):
    """Images 2i and 2i + 1 share their best caption, which is not the first of either: a tie stays one."""
    u, v, image_ids, own = five_captions()
    shared = F.normalize(u[::2] + u[1::2], dim=1)
    v[3::10], v[8::10] = shared, shared
    u, v, real = u.float(), v.float(), torch.mm

    def noisy(a, b, out):
        return real(a, b, out=out).add_(torch.rand(out.shape) - 0.5, alpha=1e-6)
    for map_ks in ((), (10,)):
        expected = retrieval_metrics(u, v, image_ids, own, map_ks=map_ks)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", noisy)
            assert retrieval_metrics(u, v, image_ids, own, map_ks=map_ks) == expected


def test_the_median_of_two_ranks_is_between_them():
    m = retrieval_metrics(torch.eye(2)[[0, 0]], torch.eye(2), torch.arange(2), torch.arange(2))
    assert [m[name] for name in ("median_rank", "mean_rank", "MRR")] == [1.5, 1.5, 0.75]


def test_a_score_one_float32_step_below_is_no_tie():
    x = torch.tensor(0.5)
    gallery = torch.stack([x, torch.nextafter(x, torch.tensor(-1.0)), torch.tensor(-0.9)])[:, None]
    for own in (0, 1):  # the numbering of the ids must not matter
        m = retrieval_metrics(torch.ones(1, 1), gallery, torch.tensor([own]), torch.tensor([own, 1 - own, own]),
                              map_ks=(1, 10))
        assert (m["R@1"], m["mAP@1"], m["mAP@10"]) == (1.0, 1.0, pytest.approx((1 + 2 / 3) / 2))


def test_overflowing_scores_are_an_error():
    u, v, image_ids, own = five_captions()
    with pytest.raises(ValueError, match="overflow"):
        retrieval_metrics(u * 1e25, v * 1e25, image_ids, own)


def test_retrieval_errors():
    u, v, image_ids, own = five_captions()
    bad = u.clone()
    bad[3, 2] = math.nan
    for args, message in (((bad, v, image_ids, own), "1 rows of 200"),
                          ((u, v, image_ids + 1, own), "no row of their id"),
                          ((u, v[:, :3], image_ids, own), "queries"), ((u, v, own, own), "one id a row"),
                          ((u[:0], v, own[:0], own), "nothing")):
        with pytest.raises(ValueError, match=message):
            retrieval_metrics(*args)


def test_retrieval_of_large_rows_and_of_a_large_k():
    u, v, image_ids, own = five_captions()
    expected = retrieval_metrics(u, v, image_ids, own)
    for scaled in ((u * 1e20, v), (u * 1e20, v * 1e-5), (u.double() * 1e20, v.double())):
        assert retrieval_metrics(*scaled, image_ids, own) == pytest.approx(expected)
    with pytest.raises(ValueError, match="overflow"):
        retrieval_metrics(u * 1e25, v * 1e25, image_ids, own)
    assert retrieval_metrics(u, v, image_ids, own, ks=(10**9,))[f"R@{10**9}"] == 1  # no loop over k


def test_shares_of_a_batch_sum_to_it_in_one_process():
    g = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(9, 5, dtype=torch.float64, generator=g), dim=1).requires_grad_() for _ in range(2))
    for loss in (lambda **rows: info_nce(a, b, 20.0, **rows), lambda **rows: sigmoid_loss(a, b, 20.0, -3.0, **rows)):
        whole, shares = loss(), loss(rows=slice(0, 4)) + loss(rows=slice(4, 9))
        torch.testing.assert_close(shares, whole)
        for x, y in zip(*(torch.autograd.grad(value, (a, b)) for value in (shares, whole)), strict=True):
            torch.testing.assert_close(x, y)


def test_multilabel_metrics_against_scikit_learn():
    g = torch.Generator().manual_seed(0)
    targets = (torch.rand(300, 7, generator=g) < torch.tensor([0.5, 0.3, 0.1, 0.05, 0.02, 0.4, 0.2])).float()
    logits = (targets + torch.randn(300, 7, generator=g)).mul(4).round() / 4 - 0.5  # rounded: ties
    targets[5], logits[5] = 0, -3  # a row with nothing true and nothing predicted
    p = torch.sigmoid(logits.double()).numpy()
    for threshold in (0.5, 0.3):
        m = common.multilabel_metrics(logits, targets, threshold)
        for average in ("micro", "macro", "weighted", "samples"):
            expected = f1_score(targets, logits.double().numpy() > math.log(threshold / (1 - threshold)),
                                average=average, zero_division=0)
            assert m[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)
        assert m["mAP"] == pytest.approx(average_precision_score(targets, p, average="macro"), abs=1e-12)
        assert m["roc_auc"] == pytest.approx(roc_auc_score(targets, p, average="macro"), abs=1e-12)


def test_multilabel_metrics_edge_cases():
    logits = torch.tensor([[1.0, 2.0, -1.0], [2.0, 1.0, -2.0]])
    # one class without negatives, one without positives
    m = common.multilabel_metrics(logits, torch.tensor([[0, 1, 0], [1, 1, 0]]))
    assert (m["roc_auc"], m["mAP"]) == (1.0, 1.0)
    assert math.isnan(common.multilabel_metrics(logits, torch.zeros(2, 3))["mAP"])
    for args, message in (((logits, torch.zeros(2, 2)), "equal"), ((logits[:, :0], logits[:, :0]), "C > 0"),
                          ((logits * math.nan, torch.zeros(2, 3)), "non-finite"),
                          ((logits, torch.full((2, 3), 0.5)), "0 or 1"),
                          ((logits, torch.zeros(2, 3), 1.5), "threshold")):
        with pytest.raises(ValueError, match=message):
            common.multilabel_metrics(*args)


def test_weights_are_repeated_rows():
    """A weight of 2 is a row that stands there twice, one of 0 a row that does not."""
    g = torch.Generator().manual_seed(1)
    targets = (torch.rand(60, 5, generator=g) < torch.tensor([0.5, 0.3, 0.1, 0.05, 0.4])).float()
    logits = (targets + torch.randn(60, 5, generator=g)).mul(2).round() / 2  # ties
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=4)
    together = common.multilabel_metrics(logits, targets, weights=weights)
    for i, counts in enumerate(weights):
        rows = np.repeat(np.arange(60), counts)
        alone = common.multilabel_metrics(logits[rows], targets[rows])
        for name, value in alone.items():
            assert together[name][i] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    expected = average_precision_score(targets.ravel(), logits.ravel())
    assert common.multilabel_metrics(logits, targets)["mAP_micro"] == pytest.approx(expected, abs=1e-12)


def test_bootstrap_of_a_mean_is_its_standard_error_and_groups_are_drawn_together():
    values = np.random.default_rng(0).normal(size=400)

    def mean(weights):
        return {"mean": weights @ values / weights.sum(1)}
    low, high = common.bootstrap_interval(mean, 400)["mean"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert common.bootstrap_interval(mean, 400)["mean"] == (low, high)
    values = np.repeat(np.random.default_rng(1).normal(size=80), 5)  # five equal items a group
    groups = np.repeat(np.arange(80), 5)
    wide = common.bootstrap_interval(mean, 400, groups=groups)["mean"]
    assert (wide[1] - wide[0]) / 2 == pytest.approx(1.96 * values.std() / 80**0.5, rel=0.1)
    table, _, _ = common.interval_tables({"row": {"mean": values}}, [], 400, groups=groups)
    assert (table["row"]["mean low"], table["row"]["mean high"]) == pytest.approx(wide)


def test_the_interval_of_a_share_stays_one_and_that_of_a_difference_may_be_below_zero():
    hits = np.ones(60)
    hits[:2] = 0  # 96.7%

    def items(scale, x):
        return {"a": {"x": torch.tensor(scale * x)}, "b": {"x": torch.zeros(60)}}
    for scale in (1, 100):
        table, differences, _ = common.interval_tables(items(scale, hits), [("a", "b")], 60)
        assert table["a"]["x high"] == scale < differences["a - b"]["x high"]
        table, differences, _ = common.interval_tables(items(scale, 1 - hits), [("a", "b")], 60)
        assert table["a"]["x low"] == 0 > differences["a - b"]["x low"]


def test_intervals_of_macro_map_hold_the_truth():
    """Rare classes bias average precision upwards; the interval must not inherit that twice."""
    generator, prevalence = np.random.default_rng(0), np.geomspace(0.5, 0.05, 6)

    def items(n):
        y = generator.random((n, 6)) < prevalence
        return torch.tensor(1.2 * y + generator.normal(size=(n, 6))), torch.tensor(y).float()
    truth, held, held_by_percentiles = common.multilabel_metrics(*items(100_000))["mAP"], 0, 0
    for i in range(60):
        x, y = items(400)
        draws = common.bootstrap(lambda w, x=x, y=y: common.multilabel_metrics(x, y, weights=w), 400,
                                 n_resamples=150, seed=i)
        low, high = common.interval(common.multilabel_metrics(x, y)["mAP"], draws["mAP"])
        held += low <= truth <= high
        low, high = np.quantile(draws["mAP"], (0.025, 0.975))
        held_by_percentiles += low <= truth <= high
    assert held / 60 > 0.87
    assert held > held_by_percentiles + 3


# ---------------------------------------------------------------------------------------------------------- checkpoints

def test_checkpoint_round_trip_with_random_states(tmp_path):
    common.seed_everything(5)
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, {"rng": common.rng_state(), "tensor": torch.arange(3), "history": [{"loss": 1.5}]})
    import random
    draws = (random.random(), np.random.rand(), torch.rand(2).tolist())
    state = common.load_checkpoint(path)
    common.set_rng_state(state["rng"])
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == draws
    assert state["history"] == [{"loss": 1.5}]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_damaged_checkpoint_falls_back_with_a_warning(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    for epoch in (1, 2):
        common.save_checkpoint(path, {"epoch": epoch, "weights": torch.full((5000,), float(epoch))})
    blob = bytearray(path.read_bytes())
    if damage == "flip":
        blob[len(blob) // 2] ^= 1  # one bit inside the weights: torch.load alone does not notice
    path.write_bytes({"truncate": blob[:len(blob) // 2], "flip": blob, "empty": b"", "remove": b""}[damage])
    if damage == "remove":  # killed between the two renames
        path.unlink()
    with pytest.warns(UserWarning, match="previous"):
        assert common.load_checkpoint(path)["epoch"] == 1
    assert not path.exists()  # a save must not put a damaged file in the good one's place
    assert path.with_name("checkpoint.pt.damaged").exists() == (damage != "remove")
    (tmp_path / "checkpoint.pt.previous").write_bytes(b"junk")
    with pytest.raises((UserError, FileNotFoundError)), warnings.catch_warnings():
        warnings.simplefilter("error")
        common.load_checkpoint(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the training first"):
        common.load_checkpoint(tmp_path / "none.pt")


def test_failed_save_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, {"epoch": 1})

    def full_disk(file):
        file.write(b"partial")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"checkpoint\.pt could not be written"):
        common.atomic_write(path, full_disk, keep_previous=True)
    assert common.load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# --------------------------------------------------------------------------------------------------------------- config

@dataclass
class Training:
    batch_size: int = ranged(512, ">= 2")  # pairs a step
    learning_rate: float = ranged(1e-4, "> 0")  # step size
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    mode: Literal["fast", "slow"] = "fast"  # how
    note: str = ""  # a word
    hidden: int | None = None  # width
    amount: int | float | str = 0.5  # share, number or word
    bn: bool = False  # flag


@dataclass
class Config:
    experiment: str = "toy"  # script
    seed: int = 42  # seed
    output_dir: str = ""  # folder
    device: str = "auto"  # device
    training: Training = field(default_factory=Training)


def load(tmp_path, text, *overrides, **kwargs):
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return common.load_config(Config, path, overrides, **kwargs)


def test_yaml_values_take_the_type_of_their_field(tmp_path):
    cfg = load(tmp_path, "training:\n  learning_rate: 1e-4\n  note: no\n  hidden: null\n  betas: [0.8, 1e-1]\n"
                         "  bn: yes\n  amount: 3\n")
    t = cfg.training
    assert (t.learning_rate, t.note, t.hidden, t.betas, t.bn, t.amount) == (1e-4, "no", None, [0.8, 0.1], True, 3)
    text = 'training:\n  mode: \\"slow\\"  # quotes escaped in a document\n  amount: val2017\nseed: 7'
    cfg = load(tmp_path, text, "training.amount=0.25", "training.hidden=8")
    assert (cfg.training.mode, cfg.training.amount, cfg.training.hidden, cfg.seed) == ("slow", 0.25, 8, 7)
    assert load(tmp_path, "") == dataclasses.replace(Config(), output_dir=str(Path("results/toy")))
    assert load(tmp_path, "training:\n").training == Training()


@pytest.mark.parametrize(("text", "message"), [
    ("training:\n  batchsize: 3", r"unknown key training.batchsize; did you mean training.batch_size\?"),
    ("batch_size: 3", r"did you mean training.batch_size\?"),
    ("seed: 1\nseed: 2", "line 2: duplicate key 'seed'"),
    ("training:\n  batch_size: many", "training.batch_size: expected a whole number, found 'many'"),
    ("training:\n  batch_size: 1.5", "expected a whole number"),
    ("training:\n  batch_size: [3]", "expected a whole number"),
    ("training:\n  batch_size:", "expected a whole number"),
    ("training:\n  batch_size: 1", "must be >= 2, found 1"),
    (f"training:\n  batch_size: -{'9' * 400}", r"expected a whole number, found '-9{58}\.\.\.$"),  # torch takes 64 bits
    ("trainning:\n  hidden: 3", r"unknown key trainning; did you mean training.hidden\?"),
    ("training:\n  lr: 3", r"unknown key training.lr; did you mean training.learning_rate\?"),
    ("training:\n  note: \"a\\0b\"", "training.note: expected a word"),
    ("training:\n  note: \"\\ud800\"", "training.note: expected a word"),  # half a surrogate pair
    ("a: &x [1]\nb: *x", "line 2: aliases"),
    ("a: " + "[" * 50_000, "line 1: nested more than 20 levels deep"),
    ("a: " + "{a: " * 50_000, "nested more than 20 levels deep"),
    ("training:\n  learning_rate: -1e-3", "must be > 0"),
    ("training:\n  learning_rate: nan", "expected a number"),
    ("training:\n  bn: maybe", "expected true or false"),
    ("training:\n  mode: fats", r"expected one of fast, slow, found 'fats'; did you mean fast\?"),
    ("training:\n  betas: 0.9", "expected a list of numbers"),
    ("training: 5", "training is a section"),
    ("training.bn: true\ntraining:\n  bn: false", "duplicate key training.bn"),
    ("experiment: other", r"is a config of exp_other.py"),
    ("- a\n- b", "expected `key: value` lines"),
    ("a: [1", "not valid YAML"),
    ("demo:\n  sede: 1", r"demo: unknown key sede; did you mean seed\?")])
def test_config_errors_are_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, text)
    assert "toy.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("override", "message"), [("seed", "key=value"), ("sed=1", "did you mean seed"),
                                                   ("training=1", "is a section"), ("seed=x", "whole number")])
def test_override_errors(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, "", override)


def test_an_override_is_taken_as_it_stands_unless_quoted_or_a_list(tmp_path):
    for text in ("/my data #1", "a: b", "- a", "!a b", "*a", "# a"):
        assert load(tmp_path, "", f"training.note={text}").training.note == text
    assert load(tmp_path, "", "training.note='a: b'", "training.betas=[1e-1, 0.2]").training.betas == [0.1, 0.2]
    assert load(tmp_path, "", "training.note='a: b'").training.note == "a: b"
    assert load(tmp_path, "", "training.note=").training.note == ""
    assert load(tmp_path, "", "training.hidden=null").training.hidden is None


def test_missing_config_names_the_nearest(tmp_path):
    (tmp_path / "siglip.yaml").write_text("")
    with pytest.raises(UserError, match=r"siglp.yaml: no such config; did you mean .*siglip.yaml\?"):
        common.load_config(Config, tmp_path / "siglp.yaml")


def test_output_dir_names_what_changes_the_run(tmp_path):
    assert (load(tmp_path, "", "training.batch_size=64", "seed=1", "device=cpu").output_dir
            == "results/toy,seed=1,training.batch_size=64")
    assert load(tmp_path, "", demo=True).output_dir == "results/demo/toy"
    assert load(tmp_path, "", "seed=1", "output_dir=here").output_dir == "here"
    assert load(tmp_path, "", "training.note=a/b c").output_dir == "results/toy,training.note=a_b_c"
    assert len(Path(load(tmp_path, "", f"training.note={'x' * 400}").output_dir).name) < 200


def test_demo_section_and_precedence(tmp_path):
    text = "seed: 1\ndemo:\n  seed: 2\n  training:\n    batch_size: 8\n"
    assert load(tmp_path, text).seed == 1
    demo = load(tmp_path, text, "training.batch_size=4", demo=True)
    assert (demo.seed, demo.training.batch_size) == (2, 4)


# ---------------------------------------------------------------------------------------------------------- run folders

def fresh(cfg):
    cfg.fresh = True
    return cfg


def test_open_run_refuses_another_run_and_fresh_moves_it(tmp_path):
    cfg = load(tmp_path, "", f"output_dir={tmp_path / 'run'}")
    folder = common.open_run(cfg, "data")
    (folder / "checkpoint_latest.pt").write_bytes(b"x")
    common.open_run(dataclasses.replace(cfg, device="cpu"), "data")  # a neutral key
    with pytest.raises(UserError, match=r"different config: seed=7 \(was 42\)"):
        common.open_run(dataclasses.replace(cfg, seed=7), "data")
    for n in (1, 2):
        common.open_run(fresh(dataclasses.replace(cfg, seed=6 + n)), "data")
        assert (tmp_path / f"run.old-{n}" / "config.yaml").exists()
    assert (tmp_path / "run.old-1" / "checkpoint_latest.pt").exists()
    assert not (tmp_path / "run" / "checkpoint_latest.pt").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [1", b"- a", b""])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, content):
    cfg = load(tmp_path, "", f"output_dir={tmp_path / 'run'}")
    folder = common.open_run(cfg, "data")
    (folder / "config.yaml").write_bytes(content)
    (folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        common.open_run(cfg, "data")
    common.open_run(fresh(cfg), "data")
    assert (tmp_path / "run.old-1" / "results.json").exists()


def test_open_run_protects_other_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        common.open_run(fresh(load(tmp_path, "", f"output_dir={tmp_path}")), "data")
    with pytest.raises(UserError, match="cannot be written"):
        common.open_run(load(tmp_path, "", f"output_dir={tmp_path / 'thesis.txt'}"), "data")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_short_line(tmp_path, monkeypatch):
    def refused(path, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"run cannot be written \(Permission denied\); set output_dir=$"):
        common.open_run(load(tmp_path, "", f"output_dir={tmp_path / 'run'}"), "data")


LOCKER = """
import dataclasses, sys, time
import common
@dataclasses.dataclass
class Config:
    experiment: str = "toy"
    output_dir: str = sys.argv[1]
@common.exit_codes
def main(argv):
    common.open_run(Config(), "data")
    print("open", flush=True)
    time.sleep(float(argv[1]))
sys.exit(main())
"""


def test_one_process_owns_a_folder_until_it_dies(tmp_path):
    def start(seconds):
        return subprocess.Popen([sys.executable, "-c", LOCKER, tmp_path / "run", str(seconds)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = start(60)
    assert first.stdout.readline() == "open\n"
    out, error = start(0).communicate()
    assert out == ""
    assert f"run is in use by process {first.pid} on " in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "run/.lock").read_bytes() == b""
    first.kill()
    first.communicate()
    assert start(0).communicate() == ("open\n", "")


def test_a_flipped_bit_in_a_data_file_is_refused(tmp_path):
    """A .pt that torch.load takes: only its own checksums tell."""
    path = tmp_path / "x.pt"
    torch.save({"feats": torch.arange(4000.0), "ids": list(range(40))}, path)
    good, refused, generator = path.read_bytes(), 0, np.random.default_rng(0)
    digest = common.fingerprint([path])
    for _ in range(100):
        blob = bytearray(good)
        blob[generator.integers(1000, 16000)] ^= 1 << generator.integers(8)  # inside the tensor
        path.write_bytes(blob)
        torch.load(path, weights_only=True)
        with pytest.raises(UserError, match="does not match its checksum: the file is damaged"):
            common.fingerprint([path])
        refused += 1
    assert refused == 100
    path.write_bytes(good)
    assert common.fingerprint([path]) == digest


def test_torchs_advice_to_load_unsafely_is_not_passed_on(tmp_path):
    torch.save({"f": re.compile("x")}, tmp_path / "x.pt")
    with pytest.raises(UserError,
                       match=r"x\.pt: cannot be read \(it holds more than tensors and plain types, or is damaged\)$"):
        common.guarded(lambda p: torch.load(p, weights_only=True), tmp_path / "x.pt")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        common.read_json(tmp_path / "x.json")


def test_data_fingerprint_is_checked(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1")
    one = common.fingerprint([tmp_path / "a.bin"])
    (tmp_path / "a.bin").write_bytes(b"2")
    other = common.fingerprint([tmp_path / "a.bin"])
    cfg = load(tmp_path, "", f"output_dir={tmp_path / 'run'}")
    folder = common.open_run(cfg, one)
    common.open_run(cfg, one)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"other data .fingerprint {one}, now {other}"):
        common.open_run(dataclasses.replace(cfg, device="cpu"), other)
    assert (folder / "config.yaml").read_bytes() == before
    environment = common.read_json(folder / "environment.json")
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"command_line", "git_commit", "git_dirty", "python"} <= set(environment)


class Toy:
    """A training run of the smallest kind: a linear layer, noise from torch's generator, rows every 2 steps."""

    def __init__(self, folder, n_steps=10, score=lambda step: step, **options):
        self.cfg = Config(output_dir=str(folder))
        self.n_steps, self.score, self.options, self.killed_at = n_steps, score, options, None

    def train(self, patience=0, poison=None):
        folder = common.open_run(self.cfg, "data")
        common.seed_everything(3)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        with common.Run(folder, self.cfg, model, optimizer, scheduler, **self.options) as run:
            for step in run.steps(self.n_steps):
                loss = (model(torch.randn(8, 4)) - 1).square().mean() + (math.nan if step == poison else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.add({"loss": loss, "half": loss / 2})
                scheduler.step()
                if step == self.killed_at:
                    raise KeyboardInterrupt
                if step % 2 == 0:
                    run.log({"step": step, **run.means()}, score=self.score(step), val_loss=-self.score(step),
                            patience=patience, note=step)
        return run


@pytest.mark.parametrize(("steps_per_epoch", "n_notes"), [(1, 1), (2, 0)])
def test_an_epoch_of_one_step_is_noted(tmp_path, capsys, steps_per_epoch, n_notes):
    toy = Toy(tmp_path / "a", n_steps=4, steps_per_epoch=steps_per_epoch)
    toy.train()
    assert capsys.readouterr().out.count("NOTE: an epoch is one step") == n_notes


def test_early_stopping_and_a_kill_before_metrics_csv(tmp_path, monkeypatch):
    """The checkpoint of the row that ends the training says so: a rerun trains no further row."""
    toys = [Toy(tmp_path / name) for name in "ab"]
    for toy in toys:
        toy.score = lambda step: -step
    toys[0].train(patience=2)
    write, rows = common.Run._write_csv, []

    def killed(run):
        rows.append(len(run.history))
        if rows[-1] == 3:
            raise KeyboardInterrupt
        write(run)
    monkeypatch.setattr(common.Run, "_write_csv", killed)
    with pytest.raises(KeyboardInterrupt):
        toys[1].train(patience=2)
    monkeypatch.setattr(common.Run, "_write_csv", write)
    assert toys[1].train(patience=2).step == 6
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "b/metrics.csv").read_bytes()


@pytest.mark.parametrize("killed_at", [1, 2, 5, 10])
def test_a_run_resumes_to_the_bit(tmp_path, killed_at):
    whole, broken = Toy(tmp_path / "a"), Toy(tmp_path / "b")
    whole.train()
    broken.killed_at = killed_at
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.killed_at = None
    broken.train()
    a, b = (common.load_checkpoint(tmp_path / name / "checkpoint_latest.pt") for name in "ab")
    for part in ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "history", "position", "rng"):
        assert repr(a[part]) == repr(b[part]), part
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "b/metrics.csv").read_bytes()
    assert {"epoch", "global_step", "best_val_loss", "scaler_state_dict", "config"} <= a.keys()


@pytest.mark.parametrize("moment", ["mid-save", "between the renames", "before metrics.csv", "best saved, latest not"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_run_killed_inside_a_save_resumes_to_the_bit(tmp_path, monkeypatch, moment, nth):
    Toy(tmp_path / "a").train()
    real, seen = os.replace, []

    class Killed(BaseException):
        pass

    def replace(source, target):
        name = Path(target).name
        seen.append(name)
        at = {"mid-save": "checkpoint_latest.pt.previous", "between the renames": "checkpoint_latest.pt",
              "before metrics.csv": "metrics.csv",
              "best saved, latest not":
                  "checkpoint_latest.pt.previous" if "checkpoint_latest.pt" in seen else "checkpoint_latest.pt"}[moment]
        if name == at and seen.count(name) == nth:
            raise Killed
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        Toy(tmp_path / "b").train()
    monkeypatch.setattr(os, "replace", real)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between the renames it is the previous one that is read
        Toy(tmp_path / "b").train()
    for name in ("checkpoint_latest.pt", "best_model.pt"):
        a, b = (common.load_checkpoint(tmp_path / folder / name) for folder in "ab")
        assert repr({k: v for k, v in a.items() if k != "config"}) == repr(
            {k: v for k, v in b.items() if k != "config"})
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "b/metrics.csv").read_bytes()


def test_a_finished_run_takes_no_step_and_best_model_is_of_the_best_score(tmp_path, capsys):
    toy = Toy(tmp_path / "a", score=lambda step: -abs(step - 6), steps_per_epoch=5)
    assert toy.train().best_step == 6
    best, latest = (common.load_checkpoint(tmp_path / "a" / f"{name}.pt")
                    for name in ("best_model", "checkpoint_latest"))
    assert (best["step"], best["note"], latest["epoch"], latest["best_val_loss"]) == (6, 6, 2, 0)
    before = (tmp_path / "a/checkpoint_latest.pt").stat().st_mtime_ns
    run = toy.train()
    assert (run.best_step, run.step, len(run.history)) == (6, 10, 5)
    assert "training is complete" in capsys.readouterr().out
    assert (tmp_path / "a/checkpoint_latest.pt").stat().st_mtime_ns == before
    model = nn.Linear(4, 1)
    assert common.load_best(tmp_path / "a", model)["step"] == 6
    assert torch.equal(model.weight, best["model_state_dict"]["weight"])
    assert not model.training
    with pytest.raises(UserError, match="of another model"):
        common.load_best(tmp_path / "a", nn.Linear(5, 1))


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, capsys):
    Toy(tmp_path / "a").train()
    path = tmp_path / "a/checkpoint_latest.pt"
    state = common.load_checkpoint(path)
    common.save_checkpoint(path, {**state, "source": "x"})
    Toy(tmp_path / "a").train()
    assert "was trained by another version of the script" in capsys.readouterr().out
    for changed in ({**state, "position": {}}, {**state, "model_state_dict": {}}, {"a": 1}):
        common.save_checkpoint(path, changed)
        with pytest.raises(UserError, match=r"latest\.pt is of another model or version of the script .*; "
                                            r"use --fresh to start again$"):
            Toy(tmp_path / "a").train()


def test_patience_ends_a_run_for_good(tmp_path):
    toy = Toy(tmp_path / "a", score=lambda step: -step)
    assert toy.train(patience=2).step == 6
    assert toy.train(patience=2).step == 6  # a rerun does not go on
    assert common.load_best(tmp_path / "a", nn.Linear(4, 1))["step"] == 2


def test_the_best_score_and_the_rows_since_it_are_resumed(tmp_path):
    toy = Toy(tmp_path / "a", n_steps=20, score=lambda step: min(step, 4))  # of equal scores the first is the best
    toy.killed_at = 7
    with pytest.raises(KeyboardInterrupt):
        toy.train(patience=3)
    toy.killed_at = None
    run = toy.train(patience=3)
    assert (run.best_step, run.step) == (4, 10)


def test_an_unfinished_run_is_not_evaluated(tmp_path):
    toy = Toy(tmp_path / "a")
    toy.killed_at = 5
    with pytest.raises(KeyboardInterrupt):
        toy.train()
    with pytest.raises(UserError, match="training stopped at step 4; the same command"):
        common.load_best(tmp_path / "a", nn.Linear(4, 1))
    with pytest.raises(UserError, match=r"best_model\.pt: no such checkpoint"):
        common.load_best(tmp_path / "none", nn.Linear(4, 1))
    common.record_environment(tmp_path / "a", train_seconds=1000)
    (tmp_path / "a/results.json").write_text("{}")  # of an earlier state
    toy.killed_at = None
    toy.train()
    assert not (tmp_path / "a/results.json").exists()
    assert common.read_json(tmp_path / "a/environment.json")["train_seconds"] >= 1000  # those before it, too


def test_a_non_finite_loss_names_its_step_and_its_learning_rate(tmp_path):
    with pytest.raises(FloatingPointError, match=r"non-finite half in step 3, learning rate 0\.081;"):
        Toy(tmp_path / "a").train(poison=3)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_in_hand(tmp_path, signum, monkeypatch):
    toy = Toy(tmp_path / "a")
    real = common.Run.add

    def add(run, losses):
        real(run, losses)
        if run.step == 3:
            os.kill(os.getpid(), signum)
    before = signal.getsignal(signum)
    monkeypatch.setattr(common.Run, "add", add)
    with pytest.raises(common.Stopped, match="stopped at step 3; the same command resumes") as stop:
        toy.train()
    assert stop.value.signum == signum
    assert signal.getsignal(signum) is before
    monkeypatch.setattr(common.Run, "add", real)
    with pytest.raises(FloatingPointError, match=r"in step 4, learning rate 0\.0729;"):  # steps and rates go on
        toy.train(poison=4)
    toy.train()
    Toy(tmp_path / "b").train()
    assert (tmp_path / "a/metrics.csv").read_bytes() == (tmp_path / "b/metrics.csv").read_bytes()


def test_a_row_without_a_score_is_a_row_alone(tmp_path):
    cfg, model = Config(output_dir=str(tmp_path / "a")), nn.Linear(1, 1)
    folder = common.open_run(cfg, "data")
    with common.Run(folder, cfg, model, torch.optim.SGD(model.parameters(), lr=1)) as run:
        for step in run.steps(2):
            run.add({"loss": torch.tensor(0.5)})
            run.log({"step": step, **run.means(), **({"dev": np.float32(2)} if step == 2 else {})})
            assert (folder / "checkpoint_latest.pt").exists() is False
    assert (folder / "metrics.csv").read_text() == "step,loss,dev\n1,0.5,\n2,0.5,2.0\n"
    assert not (folder / "best_model.pt").exists()
    assert common.load_checkpoint(folder / "checkpoint_latest.pt")["position"]["finished"]


def test_a_model_beyond_the_memory_is_one_line(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6)
    for parameter in model.parameters():
        parameter.__class__ = type("OnCpu", (nn.Parameter,), {"device": torch.device("cpu")})
    with pytest.raises(UserError, match=r"needs 16000 GB with its gradients and optimizer, the machine has"):
        common.Run(tmp_path, Config(), model, None)


class FakeWandb(types.ModuleType):
    """Records what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def define_metric(self, name, **options):
        self.calls.append(("axis", name, options))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish",))

    def Table(self, columns, data):
        return columns, data

    def Image(self, path):
        return path


@dataclass
class WandbConfig(Config):
    wandb: bool = True  # mirror


def test_wandb_gets_rows_on_the_step_axis_tables_and_pictures_and_an_id_a_folder(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    toy = Toy(tmp_path / "a")
    toy.cfg = WandbConfig(output_dir=str(tmp_path / "a"))
    toy.killed_at = 5
    with pytest.raises(KeyboardInterrupt):
        toy.train()
    toy.killed_at = None
    toy.train()
    common.save_figure(common.new_figure()[0], tmp_path / "a/curve.png")
    common.publish(tmp_path / "a", {**RESULTS, "per_item": {"ids": ["x"]}})
    ids = [options["id"] for name, *rest in fake.calls if name == "init" for options in rest]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert ("axis", "*", {"step_metric": "step"}) in fake.calls
    logged = [rest[0] for name, *rest in fake.calls if name == "log"]
    assert [row["step"] for row in logged if "step" in row] == [2, 4, 6, 8, 10]
    assert {"table": (["table", "score"], [["chance", "0.500"], ["head", "0.700 [0.600, 0.800]"]])} in logged
    assert {"curve": str(tmp_path / "a/curve.png")} in logged
    toy.cfg.fresh = True
    toy.train()
    assert len({options["id"] for name, *rest in fake.calls if name == "init" for options in rest}) == 2  # a new folder
    monkeypatch.setitem(sys.modules, "wandb", None)
    toy.cfg.fresh = True
    with pytest.raises(UserError, match="pip install wandb"):
        toy.train()


# -------------------------------------------------------------------------------------------------------------- results

RESULTS = {"headline": "3 items", "experiment": "toy", "seed": 1, "data_fingerprint": "d", "synthetic": False,
           "source": "s",
           "tables": {"table": {"chance": {"score": 0.5}, "head": {"score": 0.7, "score low": 0.6, "score high": 0.8}}}}


def finished(folder, seed=1, shift=0.0, n=200, **config):
    """A finished run whose head's item scores are noise + shift;
    the noise is that of its seed and shared over shifts."""
    cfg = Config(seed=seed, output_dir=str(folder))
    for key, value in config.items():
        setattr(cfg.training, key, value)
    common.open_run(cfg, "d")
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)) + shift
    rows = {"head": {"score": values}, "chance": {"score": torch.zeros(n)}}
    table, _, items = common.interval_tables(rows, [], n)
    curves = {"score": {"xlabel": "x",
                        "lines": {"head": {"x": [0, 1], "y": [shift, seed]}, "chance": {"x": [0, 1], "y": [0, 0]}}}}
    common.publish(folder, {**RESULTS, "seed": seed, "tables": {"table": table}, "curves": curves, "notes": ["a note"],
                            "per_item": {"ids": [f"i{i}" for i in range(n)], **items}})
    return folder


def test_publish_prints_and_writes_results_report_and_items(tmp_path, capsys):
    (tmp_path / "flops").mkdir()
    common.write_json(tmp_path / "flops/run.json", {"results": [{"flops_run": 3e12}]})
    folder = finished(tmp_path / "run")
    out = capsys.readouterr().out
    assert re.search(r"head +-?0\.\d{3} \[-?0\.\d{3}, 0\.\d{3}\]", out)
    report = (folder / "report.md").read_text().splitlines()
    assert report[0] == "# run"
    assert any(re.fullmatch(r"\| head \| -?0\.\d{3} \[.*\] \|", line) for line in report)
    assert report[-1].endswith(", 3 TFLOP.")
    assert "a note" in report
    assert "per_item" not in common.read_json(folder / "results.json")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "environment.json"}
    finished(folder)
    # equal runs, equal files
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "environment.json"} == before


def test_publish_takes_the_least_that_a_script_can_give(tmp_path, capsys):
    common.publish(tmp_path, {"headline": "3 items", "tables": {"t": {"chance": {"R@1": 12.345, "n": 3, "x": None}}}})
    assert capsys.readouterr().out.splitlines()[:5] == ["", "3 items", "", "t        R@1  n  x", "-" * 18]
    assert (tmp_path / "report.md").read_text().endswith("| chance | 12.3 | 3 | - |\n")


def test_compare_merges_seeds_and_pairs_items(tmp_path, capsys, monkeypatch):
    """A shift of .1 and .2 under noise of sd 1 that both share: the paired interval sees their mean, the runs' own
    intervals overlap."""
    plot, drawn = common.plot_lines, []
    monkeypatch.setattr(common, "plot_lines", lambda path, curves, **options: (
        drawn.append(curves["score"]["lines"]), plot(path, curves, **options)))
    a = [finished(tmp_path / f"a,seed={seed}", seed) for seed in (1, 2)]
    b = [finished(tmp_path / f"b,seed={seed}", seed, 0.1 * seed, note="b") for seed in (1, 2)]
    capsys.readouterr()
    common.compare_runs([*a, *b, a[0]], out=tmp_path / "out")
    text = (tmp_path / "out/compare.txt").read_text()
    assert capsys.readouterr().out.startswith(text.rstrip())
    assert re.search(r"head: a \(2\) +-?0\.\d+ \+- 0\.\d+", text)
    assert re.search(r"^chance  +0\.000 \[0\.000, 0\.000\]$", text, flags=re.MULTILINE)  # the same in all: one row
    assert "b - a (paired, 200 items)" in text
    assert "chance" not in text.partition("(paired")[2]  # without a difference
    assert re.search(r"^head +0\.150 \[0\.150, 0\.150\]$", text, flags=re.MULTILINE)
    assert drawn[0].keys() == {"a: head", "b: head", "chance"}
    assert drawn[0]["b: head"]["y"] == pytest.approx([0.15, 1.5])
    assert drawn[0]["b: head"]["sd"] == pytest.approx([0.1 / 2**0.5, 1 / 2**0.5])
    assert (tmp_path / "out/compare.png").stat().st_size > 5000
    common.compare_runs(a, out=tmp_path / "one")
    assert "paired" not in (tmp_path / "one/compare.txt").read_text()
    other = finished(tmp_path / "c", 1, n=50)
    common.compare_runs([a[0], other], out=tmp_path / "two")  # other items: tables, no pairs
    assert "paired" not in (tmp_path / "two/compare.txt").read_text()


def test_compare_of_an_edited_script_and_of_folders_named_by_their_seed(tmp_path):
    """Results of one config and seed that differ stand side by side; a copy is passed over."""
    runs = [finished(tmp_path / name, shift=shift) for name, shift in (("plain", 0), ("copy", 0), ("edited", 0.1))]
    common.compare_runs([*runs, tmp_path / "compare", tmp_path / "demo"], out=tmp_path / "out")  # results/*
    text = (tmp_path / "out/compare.txt").read_text()
    assert "edited - plain (paired" in text
    assert "copy" not in text
    assert "SYNTHETIC" not in text
    results = common.read_json(runs[2] / "results.json")
    common.write_json(runs[2] / "results.json", {**results, "synthetic": True})
    common.compare_runs(runs, out=tmp_path / "out")  # one is enough
    assert "SYNTHETIC" in (tmp_path / "out/compare.txt").read_text()
    common.compare_runs([finished(tmp_path / f"mine/seed{seed}", seed) for seed in (1, 2)], out=tmp_path / "out")
    assert "head: mine (2)" in (tmp_path / "out/compare.txt").read_text()


def test_compare_leaves_out_what_still_runs_and_refuses_what_is_no_run(tmp_path, capsys):
    with pytest.raises(UserError,
                       match=r"none/results\.json: no such file; .*none is not the folder of a finished run"):
        common.compare_runs([tmp_path / "none"])
    folder, running = finished(tmp_path / "a"), finished(tmp_path / "b", seed=2)
    (running / "results.json").unlink()
    common.compare_runs([running, folder], out=tmp_path / "out")
    assert f"NOTE: {running} is left out: its run is not finished" in capsys.readouterr().out
    assert "head: a (1)" in (tmp_path / "out/compare.txt").read_text()
    with pytest.raises(UserError, match="no finished run among"):
        common.compare_runs([running], out=tmp_path / "out")
    (folder / "results.json").write_text('{"experiment": "toy"}')
    with pytest.raises(UserError, match=r"results\.json: headline is missing or damaged; run its command again"):
        common.compare_runs([folder])


def test_compare_of_damaged_items_is_one_line(tmp_path):
    a, b = finished(tmp_path / "a"), finished(tmp_path / "b", note="b")
    items = common.load_checkpoint(b / "per_item.pt")
    for changed in ([1], {}, {**items, "scores": {}}, {**items, "draws": {"head": {"score": torch.zeros(7)}}}):
        common.save_checkpoint(b / "per_item.pt", changed, keep_previous=False)
        with pytest.raises(UserError, match="per_item"):
            common.compare_runs([a, b], out=tmp_path / "out")
    with pytest.raises(UserError, match="no finished run among"):
        common.compare_runs([(b.rename(tmp_path / "b.old-1"))], out=tmp_path / "out")


def test_a_changed_script_is_evaluated_again(tmp_path, capsys, monkeypatch):
    cfg = Config(output_dir=str(finished(tmp_path / "a")))
    data = types.SimpleNamespace(fingerprint="d", synthetic=False)
    assert common.published(cfg, "d") is None  # RESULTS has another source
    assert "another version of the script" in capsys.readouterr().out
    results = common.read_json(tmp_path / "a/results.json")
    common.write_json(tmp_path / "a/results.json", {**results, **common.run_facts(cfg, data)})
    assert common.published(cfg, "d")["headline"] == "3 items"
    assert common.published(cfg, "other data") is None
    common.write_json(tmp_path / "a/results.json", {**results, **common.run_facts(cfg, data), "files": ["gone.png"]})
    assert common.published(cfg, "d") is None
    common.write_json(tmp_path / "a/results.json", {**results, **common.run_facts(cfg, data)})
    cfg.evaluation = {"k": 5}  # other settings of the evaluation
    assert common.published(cfg, "d") is None
    assert common.published(Config(output_dir=str(tmp_path / "b")), "d") is None


def test_write_json_has_no_nan(tmp_path):
    common.write_json(tmp_path / "x.json", {"a": [math.nan, 1.0], "b": {"c": math.inf}})
    assert common.read_json(tmp_path / "x.json") == {"a": [None, 1.0], "b": {"c": None}}


def test_format_table():
    lines = common.format_table(
        ["", "R@1"], [["chance", 0.1], ["head", None], ["long name", "12.3 +- 0.4"]]).splitlines()
    assert lines[0].endswith("R@1")
    assert len({len(line) for line in lines if "head" not in line}) == 1
    assert lines[3].split() == ["head", "-"]


# --------------------------------------------------------------------------------------------------- device, exit codes

def test_pick_device():
    assert common.pick_device("cpu").type == "cpu"
    assert common.pick_device("auto").type in ("cpu", "cuda", "mps")
    with common.full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    for name in ("tpu", "cpu:x", "cpu:", "cpu:00", "cuda:99"):
        with pytest.raises(UserError, match=f"device={name}"):
            common.pick_device(name)


def test_one_of_several_gpus_becomes_the_current_one(monkeypatch):
    current = []
    for name, function in (("is_available", lambda: True), ("device_count", lambda: 2), ("set_device", current.append)):
        monkeypatch.setattr(torch.cuda, name, function)
    assert [common.pick_device(name) for name in ("cuda:1", "cuda")] == [torch.device("cuda:1"), torch.device("cuda")]
    assert current == ["cuda:1"]


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_processes_without_a_gpu_each_are_one_line(device, monkeypatch):
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 2 if ":" in device else 1)):
        monkeypatch.setattr(torch.cuda, name, value)
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    with pytest.raises(UserError, match=f"2 processes need a GPU each, device={device} has [12] here; use torchrun"):
        common.join_processes(device)


@pytest.mark.parametrize("n_gpus", [0, 1])
def test_the_random_state_of_a_gpu_is_its_runs_wherever_that_goes_on(n_gpus, monkeypatch):
    """A checkpoint of an earlier version holds those of all GPUs; of device=cuda the first was the run's."""
    restored = []
    for name, function in (("is_available", lambda: n_gpus > 0), ("get_rng_state", lambda: torch.arange(3)),
                           ("set_rng_state", restored.append)):
        monkeypatch.setattr(torch.cuda, name, function)
    state = common.rng_state()
    common.set_rng_state({**state, "cuda": [torch.arange(3), torch.arange(9)]})
    assert len(state["cuda"]) == len(restored) == n_gpus
    assert all(torch.equal(x, torch.arange(3)) for x in state["cuda"] + restored)


def test_seed_everything_repeats():
    draws = []
    for _ in range(2):
        common.seed_everything(3)
        draws.append((torch.rand(3).tolist(), np.random.rand()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize(("error", "code"), [
    (None, 0), (UserError("bad\nkey"), 2), (OSError(28, "No space left"), 1), (FloatingPointError("nan loss"), 1),
    (MemoryError(), 1), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 1),
    (KeyboardInterrupt(), 130), (common.Stopped(signal.SIGTERM, "saved"), 143)])
def test_exit_codes(error, code, capsys):
    @common.exit_codes
    def main(argv):
        if error:
            raise error
    assert main([]) == code
    assert capsys.readouterr().err.count("\n") == (code != 0)


def test_a_closed_pipe_is_no_error():
    code = ("import sys, common\n@common.exit_codes\ndef main(argv):\n    while True: print('x' * 1000)\n"
            "sys.exit(main([]))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_bug_still_shows_its_traceback():
    @common.exit_codes
    def main(argv):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        main([])


def test_import_is_light():
    code = ("import sys, exp_coco_heads; "
            "print([m for m in ('matplotlib', 'optuna', 'transformers', 'sklearn') if m in sys.modules])")
    assert (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            == "[]")


def test_fingerprint_of_large_files_samples_them(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(3 << 20))
    small, sampled = common.fingerprint([path]), common.fingerprint([path], whole=1 << 20)
    assert small != sampled == common.fingerprint([path], whole=1 << 20)
    for place in (0, (3 << 20) - 1):  # the first and the last byte are always among the blocks
        content = bytearray(3 << 20)
        content[place] = 1
        path.write_bytes(content)
        assert common.fingerprint([path], whole=1 << 20) != sampled
