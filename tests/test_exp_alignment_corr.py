"""exp_alignment_corr.py: metrics against reference values and float64 loops, the null, statistics, stages,
exact resume, bad input."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_nothing_chosen_on_test, ends_with, kill_at, killed
from torch import nn

import common
import demo_data
import exp_alignment_corr as exp
from common import UserError

SHARED = ROOT.parent / "shared"


# --------------------------------------------------------------------------------------- reference values of other code

def case_a():
    draws = np.random.RandomState(0)
    z, wa, wb, ea, eb = (draws.standard_normal(shape) for shape in ((64, 8), (8, 32), (8, 48), (64, 32), (64, 48)))
    return torch.tensor((z @ wa + ea).astype(np.float32)), torch.tensor((z @ wb + eb).astype(np.float32))


def case_b(n=128, dims=(64, 96)):
    torch.manual_seed(0)
    return torch.randn(n, dims[0]), torch.randn(n, dims[1])


# Values of minyoungg/platonic-rep (neighbours exact; CKA of a version in float64 without epsilon; exact SVCCA; CKNNA
# without its epsilon).
REFERENCE = {
    "A": (case_a, {"cycle_knn": 1.0, "mutual_knn": 0.6296875, "lcs_knn": 3.609375, "edit_distance_knn": 0.1625,
                   "cka": 0.8324021428, "unbiased_cka": 0.8070474063, "cknna": 0.6829109, "svcca": 0.8055325923}),
    "B": (case_b, {"cycle_knn": 0.5390625, "mutual_knn": 0.0703125, "lcs_knn": 0.6171875,
                   "edit_distance_knn": 0.00703125, "cka": 0.3889131613, "unbiased_cka": 0.0171096896,
                   "cknna": 0.0602027, "svcca": 0.2611224735}),
    "C": (lambda: (case_a()[0],) * 2, {"cycle_knn": 1.0, "mutual_knn": 1.0, "lcs_knn": 10.0, "edit_distance_knn": 1.0,
                                       "cka": 1.0, "unbiased_cka": 1.0, "cknna": 1.0, "svcca": 1.0}),
    "D": (lambda: case_b(64, (8192, 8192)), {"cycle_knn": 0.78125, "mutual_knn": 0.146875, "lcs_knn": 1.09375,
                                             "edit_distance_knn": 0.01875, "cka": 0.9923070718,
                                             "unbiased_cka": -0.0249187086, "cknna": 0.0973663, "svcca": 0.301776898}),
}


@pytest.mark.parametrize("case", REFERENCE)
@pytest.mark.parametrize("metric", exp.METRICS)
def test_reference_values(case, metric):
    features, values = REFERENCE[case]
    assert getattr(exp, metric)(*features()) == pytest.approx(values[metric], abs=5e-7)


def test_reference_values_at_other_k_and_swapped():
    a, b = case_a()
    expected = {"cycle_knn": 0.96875, "mutual_knn": 0.540625, "lcs_knn": 1.890625, "cknna": 0.5593752,
                "edit_distance_knn": 0.190625}
    for metric, value in expected.items():
        assert getattr(exp, metric)(a, b, 5) == pytest.approx(value, abs=5e-7), metric
    x, y = case_b()
    assert exp.cycle_knn(y, x) == 0.5234375  # asymmetric


def case_f():
    draws = np.random.RandomState(7)
    z = draws.standard_normal((96, 6))
    stacks = [np.stack([(base + step * i) * z @ draws.standard_normal((6, dim)) + draws.standard_normal((96, dim))
                        for i in range(layers)], axis=1)
              for layers, dim, base, step in ((3, 24, 0.3, 0.4), (4, 40, 0.2, 0.3))]
    for column, stack in enumerate(stacks):
        stack[:, :, column] *= 8
    return [torch.tensor(stack.astype(np.float32)) for stack in stacks]


@pytest.mark.parametrize(("exact", "thresholds", "matrix"), [
    (True, (5.42082405, 4.62809372), [[0.154167, 0.222917, 0.226042, 0.233333], [0.175, 0.340625, 0.404167, 0.427083],
                                      [0.214583, 0.402083, 0.546875, 0.579167]]),
    (False, (4.97086906, 4.43497705), [[0.151042, 0.226042, 0.220833, 0.227083],
                                       [0.173958, 0.345833, 0.404167, 0.43125],
                                       [0.207292, 0.409375, 0.558333, 0.579167]])])
def test_clamped_stacks_of_layers(exact, thresholds, matrix):
    clamped = [exp.clamp_outliers(stack, 0.95, exact) for stack in case_f()]
    for stack, threshold in zip(clamped, thresholds, strict=True):
        assert stack.abs().max().item() == pytest.approx(threshold, rel=1e-6)
    assert torch.allclose(exp.alignment_matrix(*clamped, "mutual_knn"),
                          torch.tensor(matrix, dtype=torch.float64), atol=1e-6)
    cka = exp.alignment_matrix(*clamped, "unbiased_cka")
    assert divmod(int(cka.argmax()), 4) == (2, 3)
    assert cka.max().item() == pytest.approx(0.793621 if exact else 0.80117, abs=1e-4)


def test_clamp_of_lists_and_of_nothing():
    stack = case_f()[0]
    together = exp.clamp_outliers([stack[:, 0, :5], stack[:, 1]])  # one threshold for both
    values = torch.cat([stack[:, 0, :5], stack[:, 1]], dim=1).abs().flatten().sort().values
    assert max(x.abs().max() for x in together) == values[int(0.95 * len(values))]
    assert torch.equal(exp.clamp_outliers(stack, 1.0), stack)
    assert exp.clamp_outliers(stack[:, 0]).shape == (96, 24)


def test_a_clamp_that_would_erase_sparse_features_is_refused(tmp_path):
    """All rows would be zeros, their neighbours the lowest indices: two unrelated models in full agreement."""
    g = torch.Generator().manual_seed(0)
    sparse = torch.rand(40, 1, 100, generator=g) * (torch.rand(40, 1, 100, generator=g) < 0.02)
    sparse[:, :, 0] = 1
    write_features(tmp_path / "m.pt", feats=sparse, ids=list(range(40)))
    features = exp.read_features(tmp_path / "m.pt")
    assert torch.equal(features.layers[0], sparse[:, 0])
    with pytest.raises(UserError, match=r"m\.pt: most values are 0.*clamp_quantile=1"):
        exp.layers_to_compare(features, exp.AlignmentConfig())
    assert torch.equal(exp.layers_to_compare(features, exp.AlignmentConfig(clamp_quantile=1))[0], sparse[:, 0])
    # the second lies wholly above the threshold
    layers = torch.rand(40, 2, 5, generator=g) + torch.tensor([0.0, 9.0])[:, None]
    write_features(tmp_path / "m.pt", feats=layers, ids=list(range(40)))
    with pytest.warns(UserWarning, match="40 constant rows"):
        exp.layers_to_compare(exp.read_features(tmp_path / "m.pt"), exp.AlignmentConfig(clamp_quantile=0.4))


# The null's recipe: draws of RandomState(123).permutation, K = 99.
@pytest.mark.parametrize(("metric", "tau", "calibrated"), [("mutual_knn", 0.1875, 0.5442307546),
                                                           ("cka", 0.171073824, 0.7978133933),
                                                           ("unbiased_cka", 0.0437373, 0.798214),
                                                           ("cknna", 0.1898357, 0.608584)])
def test_permutation_null_of_the_reference(metric, tau, calibrated):
    a, b = case_a()
    result = exp.permutation_null(a, b, metric, 10, n_permutations=99, seed=123)
    assert result["p_value"] == 0.01
    assert result["threshold"] == pytest.approx(tau, abs=2e-5)
    assert result["calibrated"] == pytest.approx(calibrated, abs=3e-5)
    assert len(result["null"]) == 99


# ----------------------------------------------------------------------------------------- each metric in float64 loops

def unit(x):
    return F.normalize(x.double(), dim=1)


def loop_neighbours(x, k):
    sims, out = unit(x) @ unit(x).T, []
    for i, row in enumerate(sims.tolist()):
        order = sorted((j for j in range(len(row)) if j != i), key=lambda j: (-round(row[j], 12), j))
        out.append(order[:k])
    return out


def loop_lcs(x, y):
    best = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, j in itertools.product(range(len(x)), range(len(y))):
        best[i + 1][j + 1] = best[i][j] + 1 if x[i] == y[j] else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def loop_edit(x, y):
    cost = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(y) + 1)] for i in range(len(x) + 1)]
    for i, j in itertools.product(range(len(x)), range(len(y))):
        cost[i + 1][j + 1] = min(cost[i][j + 1] + 1, cost[i + 1][j] + 1, cost[i][j] + (x[i] != y[j]))
    return cost[-1][-1]


def loop_hsic(gram_a, gram_b):
    centre = torch.eye(len(gram_a), dtype=torch.float64) - 1 / len(gram_a)
    return torch.trace(gram_a @ centre @ gram_b @ centre)


def loop_hsic_unbiased(gram_a, gram_b):
    n, a, b = len(gram_a), gram_a.clone().fill_diagonal_(0), gram_b.clone().fill_diagonal_(0)
    return (torch.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)) / (n * (n - 3))


def loop_metric(metric, a, b, k):
    n, gram_a, gram_b = len(a), unit(a) @ unit(a).T, unit(b) @ unit(b).T
    near_a, near_b = loop_neighbours(a, k), loop_neighbours(b, k)
    if metric == "mutual_knn":
        return sum(len(set(x) & set(y)) for x, y in zip(near_a, near_b, strict=True)) / (n * k)
    if metric == "cycle_knn":
        return sum(any(i in near_a[j] for j in near_b[i]) for i in range(n)) / n
    if metric == "lcs_knn":
        return sum(map(loop_lcs, near_a, near_b)) / n
    if metric == "edit_distance_knn":
        return 1 - sum(map(loop_edit, near_a, near_b)) / (n * k)
    if metric in ("cka", "unbiased_cka"):
        hsic = loop_hsic if metric == "cka" else loop_hsic_unbiased
        return (hsic(gram_a, gram_b) / (hsic(gram_a, gram_a) * hsic(gram_b, gram_b)).sqrt()).item()
    if metric == "cknna":
        def masked(near_x, near_y, gram_x, gram_y):
            mask = torch.tensor([[float(j in near_x[i] and j in near_y[i]) for j in range(n)] for i in range(n)],
                                dtype=torch.float64)
            return loop_hsic_unbiased(mask * gram_x, mask * gram_y)
        own = masked(near_a, near_a, gram_a, gram_a) * masked(near_b, near_b, gram_b, gram_b)
        return (masked(near_a, near_b, gram_a, gram_b) / own.sqrt()).item()
    columns = [(unit(x) - unit(x).mean(0)) / unit(x).std(0) for x in (a, b)]
    u, v = (torch.linalg.svd(x, full_matrices=False)[0][:, :10] for x in columns)
    return torch.linalg.svdvals(u.T @ v).mean().item()


def test_the_loops_themselves_against_hand_values():
    gram_a = torch.tensor([[2, 1, 0, 1, 3], [1, 5, 2, 0, 1], [0, 2, 3, 1, 1], [1, 0, 1, 4, 2], [3, 1, 1, 2, 6]],
                          dtype=torch.float64)
    gram_b = torch.tensor([[1, 0, 2, 1, 1], [0, 3, 1, 2, 0], [2, 1, 4, 0, 1], [1, 2, 0, 2, 1], [1, 0, 1, 1, 5]],
                          dtype=torch.float64)
    assert loop_hsic_unbiased(gram_a, gram_b).item() == pytest.approx(-0.2666668)
    assert loop_hsic(gram_a, gram_b).item() == pytest.approx(24.28)
    lists = [([5, 3, 9, 1], [3, 5, 1, 9]), ([0, 1, 2, 3], [3, 2, 1, 0]), ([7, 8, 2, 4], [7, 1, 8, 4])]
    assert [loop_lcs(*pair) for pair in lists] == [2, 1, 3]
    assert [loop_edit(*pair) for pair in lists] == [3, 4, 2]


def toy_stacks(n=40, seed=0, duplicates=False):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 4, generator=g)
    a = torch.stack([z @ torch.randn(4, 12, generator=g) + torch.randn(n, 12, generator=g) for _ in range(2)], dim=1)
    b = torch.stack([z @ torch.randn(4, 17, generator=g) + torch.randn(n, 17, generator=g) for _ in range(3)], dim=1)
    if duplicates:
        a[5], a[20], b[7], b[8] = a[30], a[30], b[9], b[9]
    return a, b


@pytest.mark.parametrize("metric", exp.METRICS)
@pytest.mark.parametrize(("k", "duplicates"), [(1, False), (5, False), (5, True), (39, True)])
def test_every_layer_pair_against_loops(metric, k, duplicates):
    a, b = toy_stacks(duplicates=duplicates)
    expected = torch.tensor([[loop_metric(metric, a[:, i], b[:, j], k) for j in range(3)] for i in range(2)],
                            dtype=torch.float64)
    got = exp.alignment_matrix(a, b, metric, k)
    assert got.shape == (2, 3)
    assert torch.allclose(got, expected.nan_to_num(0), atol=3e-7), (got, expected)


@pytest.mark.parametrize("metric", exp.METRICS)
def test_blocks_of_rows_and_many_layers_change_nothing(metric, monkeypatch):
    a, b = toy_stacks(70)
    b = torch.cat([b, b.flip(1)], dim=1)
    whole = exp.alignment_matrix(a, b, metric, 6)
    monkeypatch.setattr(exp, "BLOCK_BYTES", 4000)
    assert torch.allclose(exp.alignment_matrix(a, b, metric, 6), whole, atol=1e-6)


@pytest.mark.parametrize("metric", exp.METRICS)
@pytest.mark.parametrize("kept_bytes", [exp.KEPT_BYTES, 0])
def test_permuted_sides_equal_permuted_features(metric, kept_bytes, monkeypatch):
    monkeypatch.setattr(exp, "KEPT_BYTES", kept_bytes)
    a, b = toy_stacks()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    turned = exp.alignment_matrix(exp.prepare(a, metric, 5).permuted(order[None]),
                                  exp.prepare(b, metric, 5).kept(), metric)
    assert torch.allclose(turned, exp.alignment_matrix(a[order], b, metric, 5), atol=1e-6)
    # the items' order itself means nothing
    assert torch.allclose(exp.alignment_matrix(a[order], b[order], metric, 5),
                          exp.alignment_matrix(a, b, metric, 5), atol=1e-6)


@pytest.mark.parametrize("metric", exp.METRICS)
@pytest.mark.parametrize("kept_bytes", [exp.KEPT_BYTES, 0])
def test_layers_and_permutations_taken_together_as_on_a_gpu(metric, kept_bytes, monkeypatch):
    monkeypatch.setattr(exp, "KEPT_BYTES", kept_bytes)
    a, b = toy_stacks(duplicates=True)
    a = [a[:, 0], a[:, 1], b[:, 0], b[:, 1].half(), a[:, 0, :7], a[:, 1, :7]]
    sides = [exp.prepare(x, metric, 5) for x in (a, b)]
    expected = exp.permutation_null(*sides, metric, 5, 19)
    monkeypatch.setattr(exp, "LAUNCH_BYTES", {"cpu": 2**17})  # 2 or 13 of 19 draws at once
    assert [len(x) for x in exp.grouped_layers(a)] == [2, 1, 1, 2]
    together = [exp.prepare(x, metric, 5) for x in (a, b)]
    for result, atol in ((exp.permutation_null(*sides, metric, 5, 19), 1e-12),
                         (exp.permutation_null(*together, metric, 5, 19), 1e-6)):
        assert result["layers"] == expected["layers"]
        for key in ("matrix", "null"):
            np.testing.assert_allclose(result[key], expected[key], rtol=0, atol=atol)
    if metric in exp.KNN_METRICS:
        for side, one_by_one in zip(together, sides, strict=True):
            assert torch.equal(side.near, one_by_one.near) and torch.equal(side.ties, one_by_one.ties)


def test_more_neighbours_than_a_byte_counts():
    a = torch.randn(140, 8, generator=torch.Generator().manual_seed(0))
    assert exp.lcs_knn(a, a, 130) == 130
    assert exp.edit_distance_knn(a, a, 130) == 1
    assert exp.edit_distance_knn(a, a.flip(1) ** 2, 130) == pytest.approx(
        loop_metric("edit_distance_knn", a, a.flip(1) ** 2, 130))


def test_symmetric_product_by_blocks():
    x = torch.randn(1100, 30)
    product = exp.products(x, slice(0, 1100))
    assert torch.allclose(product, x @ x.T, atol=1e-4)
    assert torch.equal(product, product.T)


def test_a_common_offset_changes_no_neighbour_and_no_unbiased_cka_of_itself():
    g = torch.Generator().manual_seed(3)
    # mean cosine .999
    x = torch.randn(200, 64, generator=g, dtype=torch.float64) + 30 * torch.randn(64, generator=g, dtype=torch.float64)
    y = x + 0.5 * torch.randn(200, 64, generator=g, dtype=torch.float64)
    for metric in exp.METRICS:
        assert getattr(exp, metric)(x.float(), y.float()) == pytest.approx(
            loop_metric(metric, x.float(), y.float(), 10), abs=2e-6), metric
    assert exp.unbiased_cka(x.float(), x.float()) == pytest.approx(1, abs=2e-8)


def test_equal_cosines_go_to_the_lowest_index_and_are_counted():
    x = torch.eye(8)[[0, 0, 0, 1, 1, 2, 3, 4]]
    near, cosines, ties = (part[0] for part in exp.nearest_neighbours(x, 1))
    assert near[:, 0].tolist() == [1, 0, 0, 4, 3, 0, 0, 0]
    assert cosines[:5, 0].tolist() == [1.0] * 5
    assert ties == 6  # rows 0, 1, 2 have two copies to choose from, 5, 6, 7 nothing but zeros


def test_svcca_of_flat_spectra_low_rank_and_few_features():
    g = torch.Generator().manual_seed(5)
    x = F.normalize(torch.randn(300, 250, generator=g, dtype=torch.float64), dim=0)
    exact = torch.linalg.svd(x)[0][:, :10]
    assert torch.linalg.svdvals(exp.left_singular_vectors(x).T @ exact).min() > 1 - 1e-10
    low = exp.left_singular_vectors(torch.randn(50, 3, generator=g, dtype=torch.float64)
                                    @ torch.randn(3, 40, generator=g, dtype=torch.float64), 10)
    assert (low != 0).any(0).sum() == 3
    narrow = torch.randn(60, 4, generator=g)
    assert exp.svcca(narrow, narrow) == pytest.approx(1)


@pytest.mark.parametrize("metric", exp.METRICS)
def test_tiny_and_degenerate_features_give_finite_scores(metric):
    g = torch.Generator().manual_seed(0)
    for n, d, dtype in itertools.product((4, 5, 12), (1, 3), (torch.float16, torch.bfloat16, torch.float64)):
        a, b = torch.randn(n, 2, d, generator=g).to(dtype), torch.randn(n, 3, d + 1, generator=g).to(dtype)
        a[2], b[:, 1] = 0, 1  # a row without direction, a layer without differences
        for k in (1, n - 1):
            assert torch.isfinite(exp.alignment_matrix(a, b, metric, k)).all(), (n, d, dtype, k)
    assert math.isfinite(getattr(exp, metric)(torch.zeros(11, 4), torch.zeros(11, 4)))


def test_chance_levels():
    a, b = case_b(400, (32, 32))
    assert exp.mutual_knn(a, b) == pytest.approx(10 / 399, abs=0.01)
    assert abs(exp.unbiased_cka(a, b)) < 0.02
    assert exp.cka(a, b) > 0.05  # the biased one is not


# ----------------------------------------------------------------------------------------------------- null, statistics

def test_p_values_of_independent_features_are_uniform():
    """200 draws, the null of the maximum over 2 x 3 layer pairs:
    a p against the null of one pair alone would be far too small."""
    g, jitter, p_values = torch.Generator().manual_seed(11), np.random.RandomState(11), []
    for draw in range(200):
        a, b = torch.randn(24, 2, 6, generator=g), torch.randn(24, 3, 6, generator=g)
        result = exp.permutation_null(a, b, "unbiased_cka", n_permutations=39, seed=draw)
        p_values.append(result["p_value"] - jitter.rand() / 40)  # p has 40 steps
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) < 0.05) < 0.12


def test_calibration_formula():
    out = exp.calibrate(0.5, np.linspace(0, 0.19, 19))  # K = 19: tau is the 19th of 20
    assert out["threshold"] == pytest.approx(0.19)
    assert out["calibrated"] == pytest.approx((0.5 - 0.19) / 0.81)
    assert out["p_value"] == 1 / 20
    assert exp.calibrate(0.1, np.full(19, 0.3))["calibrated"] == 0
    assert exp.calibrate(0.3, np.full(19, 0.3))["p_value"] == 1
    for k, per_mille in itertools.product((9, 19, 99, 200, 999), range(5, 1000, 5)):  # 1 - .7 is a little more than .3
        place = -(-(1000 - per_mille) * (k + 1) // 1000)  # in whole numbers
        assert exp.calibrate(k, np.arange(k), per_mille / 1000)["threshold"] == place - 1
    assert exp.permutation_null(*case_a(), "lcs_knn", n_permutations=19)["score"] == pytest.approx(0.3609375)


def shared_factors(n, g, weights, noise=1.0):
    """[N, 32] and [N, 48] that share 8 factors."""
    z = torch.randn(n, 8, generator=g)
    return [z @ w + noise * torch.randn(n, w.shape[1], generator=g) for w in weights]


@torch.inference_mode()  # a fifth faster: thousands of tiny operations
def test_intervals_cover_the_expected_score():
    """600 draws of 64 items: the nominal 95% interval holds the mean score of all draws in 92.5 to 97.5% of them.
    Rows are drawn anew each time, as a new set of items would be; tests/bench_alignment.py has the other metrics, sizes
    and stacks of layers."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, width, generator=g) for width in (32, 48)]
    for metric, n_draws in (("unbiased_cka", 300), ("mutual_knn", 300)):
        scores, intervals = [], []
        for _ in range(n_draws):
            a, b = shared_factors(64, g, weights)
            scores.append(getattr(exp, metric)(a, b))
            intervals.append(list(exp.interval("score", scores[-1], exp.part_scores(a, b, metric)).values()))
        low, high = np.array(intervals).T
        coverage = np.mean((low <= np.mean(scores)) & (np.mean(scores) <= high))
        assert 0.925 <= coverage <= 0.975, (metric, coverage)


def test_intervals_shrink_and_need_enough_items():
    widths = {}
    for n in (100, 1600):
        a, b = shared_factors(n, torch.Generator().manual_seed(n), [torch.eye(8, 32), torch.eye(8, 48)], 0.3)
        low, high = exp.interval("score", exp.unbiased_cka(a, b), exp.part_scores(a, b, "unbiased_cka")).values()
        assert low < exp.unbiased_cka(a, b) < high
        widths[n] = high - low
    assert 2 < widths[100] / widths[1600] < 8  # as 1 / sqrt(n): 4
    assert exp.part_scores(a[:15], b[:15], "unbiased_cka") is None  # quarters of 3 rows
    halves, quarters = exp.part_scores(a, b, "mutual_knn", 8)
    rows = np.random.RandomState(0).permutation(1600)[800:]
    assert halves[0, 1] == exp.mutual_knn(a[rows], b[rows], 4)  # half the neighbours among half the items
    assert (halves.shape, quarters.shape) == ((16, 2), (8, 4))
    assert exp.interval("score", 0.5, None) == {}
    parts = [np.tile([0.4, 0.6], (16, 1)), np.tile([0.3, 0.7, 0.3, 0.7], (8, 1))]  # V(N/2) = .02, V(N/4) = .0533
    assert exp.interval("score", 0.5, parts)["score high"] == pytest.approx(
        0.5 + 2.45 * math.sqrt(0.75 * 0.02 - 0.16 / 3 / 8))


def peak_kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the resident set is Linux's")
def test_memory_of_the_null_is_flat_in_k():
    a, b = toy_stacks(600)
    growth = {}
    for metric in ("unbiased_cka", "mutual_knn"):
        exp.permutation_null(a, b, metric, n_permutations=20)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_kilobytes()
        exp.permutation_null(a, b, metric, n_permutations=20)
        short = peak_kilobytes()
        exp.permutation_null(a, b, metric, n_permutations=300)
        growth[metric] = peak_kilobytes() - max(short, before)
    assert max(growth.values()) < 20_000, growth  # 2 MB a permutation would be 560 MB


def test_a_metric_of_ones_own_and_numpy_arrays():
    a, b = toy_stacks(30)

    def centred_alignment(x, y):
        x, y = x - x.mean(), y - y.mean()
        return (x * y).sum() / (x.norm() * y.norm())
    result = exp.permutation_null(a.numpy(), list(b.numpy().swapaxes(0, 1)), centred_alignment, n_permutations=39)
    gram_a, gram_b = unit(a[:, 1]) @ unit(a[:, 1]).T, unit(b[:, 2]) @ unit(b[:, 2]).T
    assert result["matrix"][1][2] == pytest.approx(centred_alignment(gram_a, gram_b).item(), abs=1e-6)
    assert result["p_value"] <= 0.05
    for metric in exp.METRICS:
        assert getattr(exp, metric)(a[:, 0].numpy(), b[:, 0].numpy(), 5) == getattr(exp, metric)(a[:, 0], b[:, 0], 5)
    assert np.array_equal(exp.clamp_outliers(a.numpy(), 0.9), exp.clamp_outliers(a, 0.9))


@pytest.mark.parametrize("metric", exp.METRICS)
def test_huge_magnitudes_give_the_right_number_and_nan_an_error(metric):
    a, b = (x[:, 0] for x in toy_stacks())
    expected = getattr(exp, metric)(a, b, 5)
    assert getattr(exp, metric)(1e20 * a, 1e-20 * b, 5) == pytest.approx(expected, abs=1e-6)
    a[3, 2] = math.nan
    with pytest.raises(UserError, match="the first is row 3"):
        getattr(exp, metric)(a, b, 5)


@pytest.mark.parametrize("n", [4, 7, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_spearman_against_scipy(n, tied):
    draws = np.random.RandomState(n)
    x, y = draws.rand(n), draws.rand(n)
    if tied:
        x, y = np.round(3 * x), np.round(3 * y)
    out = exp.spearman(x, y)
    assert out["rho"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert out["n"] == n
    if n > 12:
        assert out["p"] == pytest.approx(scipy.stats.spearmanr(x, y).pvalue, rel=1e-4)
    else:
        rho = [scipy.stats.spearmanr(x, p).statistic for p in itertools.permutations(y)] if n < 7 else None
        exact = scipy.stats.permutation_test((x,), lambda v: scipy.stats.spearmanr(v, y).statistic,
                                             permutation_type="pairings", n_resamples=10**6)
        assert out["p"] == pytest.approx(np.mean(np.abs(rho) >= abs(out["rho"]) - 1e-9) if rho else exact.pvalue,
                                         rel=1e-6)


def test_spearman_needs_587_at_n_12():
    x = np.arange(12)
    draws, found = np.random.RandomState(0), {}
    while len(found) < 2:
        out = exp.spearman(x, draws.permutation(12))
        if 0.5874 <= abs(out["rho"]) < 0.60:
            found["above"] = out["p"]
        elif 0.56 < abs(out["rho"]) < 0.5870:
            found["below"] = out["p"]
    assert found["above"] <= 0.05 < found["below"]


def test_spearman_and_slope_where_they_are_not_defined():
    assert math.isnan(exp.spearman([1, 2], [1, 2])["rho"])
    assert math.isnan(exp.spearman([1, 1, 1, 1], [1, 2, 3, 4])["p"])
    assert math.isnan(exp.slope([2, 2, 2], [1, 2, 3])["slope"])
    for constant in (0, 0.3, 1 / 3):
        assert exp.slope(np.random.RandomState(0).rand(10), [constant] * 10) == {"slope": 0, "slope p": 1}


def test_slope_and_false_discovery_rate_against_scipy():
    draws = np.random.RandomState(4)
    x, y = draws.rand(15), draws.rand(15)
    reference = scipy.stats.linregress(x, y)
    out = exp.slope(x, y)
    assert (out["slope"], out["slope p"]) == (pytest.approx(reference.slope), pytest.approx(reference.pvalue, rel=1e-4))
    p = draws.rand(23) ** 3
    assert exp.benjamini_hochberg(p) == pytest.approx(scipy.stats.false_discovery_control(p).tolist())
    assert math.isnan(exp.benjamini_hochberg([0.01, math.nan])[1])


# -------------------------------------------------------------------------------------------------- the synthetic label

def test_label_information_of_the_published_file():
    p = exp.label_distribution(2)
    assert np.allclose(p.sum(1), 1)
    assert np.abs(p.mean(0) - 0.25).max() < 0.0126
    assert exp.label_information(p, range(8)) == pytest.approx(1.158839, abs=1e-6)
    expected_1 = [1.158839, 0.97171, 0.97171, 0.715085, 0.715085, 0.493503, 0.493503, 0.366874, 0.366874][::1]
    expected_2 = [1.158839, 1.158839, 0.880554, 0.886691, 0.733368, 0.771674, 0.607597, 0.618817, 0.473343]
    sides = [exp.side_bits(u) for u in range(9)]
    assert [exp.label_information(p, one) for one, _ in sides][::2] == pytest.approx(expected_1[::2], abs=1e-6)
    assert [exp.label_information(p, other) for _, other in sides] == pytest.approx(expected_2, abs=1e-6)


def test_synthetic_data_hold_what_they_say():
    s = exp.SyntheticConfig(uniqueness=[0, 8], transform_depths=[1, 2], n_samples=20000)
    x1, x2, labels, splits = exp.draw_synthetic(s, 0)
    assert [len(splits[k]) for k in ("train", "val", "test")] == [14000, 3000, 3000]
    assert x1.shape == x2[1].shape == x2[2].shape == (20000, 12)
    assert x2[2][:14000].mean(0).abs().max() < 1e-3
    assert x2[2][:14000].std(0) == pytest.approx(torch.ones(12), abs=1e-3)
    bits = (x1 > 0).long()
    p = torch.from_numpy(exp.label_distribution(2))
    code = bits[:, :8] @ (1 << torch.arange(7, -1, -1))  # U = 0: all of the label's bits are shared
    rate = torch.stack([F.one_hot(labels[0][code == c], 4).double().mean(0) for c in range(0, 256, 16)])
    assert (rate - p[::16]).abs().max() < 0.2
    own = bits[:, 8:] @ (1 << torch.arange(3, -1, -1))  # U = 8: x1 sees the first four of the label's bits
    rate = torch.stack([F.one_hot(labels[8][own == c], 4).double().mean(0) for c in range(16)])
    assert (rate - p.unflatten(0, (16, 16)).mean(1)).abs().max() < 0.06
    again = exp.draw_synthetic(s, 0)
    assert torch.equal(again[1][2], x2[2])
    assert torch.equal(again[2][8], labels[8])


def test_encoders_trained_at_once_equal_single_ones():
    torch.manual_seed(0)
    model = exp.Encoders(3, 2)
    singles = []
    for e in range(3):
        single = nn.Sequential(nn.Linear(12, 12), nn.LeakyReLU(0.01), nn.Linear(12, 12), nn.LeakyReLU(0.01),
                               nn.Linear(12, 4))
        parts = [(model.weight[e, 0], model.bias[e, 0, 0]), (model.weight[e, 1], model.bias[e, 1, 0]),
                 (model.head_weight[e], model.head_bias[e, 0])]
        for layer, (weight, bias) in zip(single[::2], parts, strict=True):
            layer.weight.data, layer.bias.data = weight.detach().T.clone(), bias.detach().clone()
        singles.append(single)
    cfg = exp.Config()
    optimizer = exp.build_optimizer(cfg, model)
    batch = {"inputs": torch.randn(32, 3, 12), "labels": torch.randint(4, (32, 3))}
    for _ in range(3):
        exp.train_step(model, batch, optimizer)
    for e, single in enumerate(singles):
        own = torch.optim.Adam(single.parameters(), lr=5e-3)
        for _ in range(3):
            own.zero_grad()
            F.cross_entropy(single(batch["inputs"][:, e]), batch["labels"][:, e]).backward()
            own.step()
        assert torch.allclose(model(batch["inputs"])[0][e], single(batch["inputs"][:, e]), atol=1e-4)


def test_alignment_falls_with_uniqueness_to_chance(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("""synthetic: {uniqueness: [0, 4, 8], transform_depths: [1], x2_depths: [3], n_samples: 16384,
            epochs: 6}
alignment: {n_permutations: 19}
seed: 1
""")
    assert exp.main([str(path), f"output_dir={tmp_path / 'run'}", "device=cpu"]) == 0
    results = common.read_json(tmp_path / "run/results.json")
    rows = [results["tables"]["alignment against uniqueness U"][f"D = 1, U = {u}"] for u in (0, 4, 8)]
    for metric in ("unbiased_cka", "mutual_knn"):
        high, middle, low = (r[metric] for r in rows)
        assert high > middle + 0.1 > low + 0.2
        rho = results["tables"]["rank correlation"][f"{metric}: U, alignment; D = 1"]
        assert (rho["rho"], rho["n"], rho["monotone"]) == (pytest.approx(-1), 3, 1)
    assert rows[2]["unbiased_cka"] < 0.1
    assert rows[2]["mutual_knn"] == pytest.approx(100 / 511, abs=0.03)  # chance
    assert rows[0]["accuracy x1"] > 0.8 > rows[2]["accuracy x1"]
    assert results["synthetic"] is True


def test_rho_over_seeds_has_an_interval_and_counts_monotone_ones():
    curves = {0: (0.9, 0.5, 0.4, 0.1), 1: (0.8, 0.4, 0.5, 0.2), 2: (0.7, 0.6, 0.3, 0.3)}
    rows = [{"seed": seed, "U": u, "cka": {"score": y + e}}
            for seed, ys in curves.items() for u, y in zip((0, 2, 4, 8), ys, strict=True)
            for e in (-0.01, 0.01)]
    row = exp.correlation_over_seeds(rows, "cka")
    of_seeds = [scipy.stats.spearmanr((0, 2, 4, 8), y).statistic for y in curves.values()]
    assert (row["n"], row["seeds"], row["monotone"]) == (12, 3, 1)
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(of_seeds), scipy.stats.sem(of_seeds))
    assert (row["mean rho"], row["mean rho low"], row["mean rho high"]) == pytest.approx(
        (np.mean(of_seeds), max(-1, low), min(1, high)), abs=1e-3)


# ------------------------------------------------------------------------------------------------ features and captions

def write_features(path, n=30, layers=2, dim=6, seed=0, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    feats = torch.randn(n, layers, dim, generator=torch.Generator().manual_seed(seed)).half()
    content = {"feats": feats, "ids": [f"item{i}" for i in range(n)], "model": path.stem, **changes}
    torch.save(content, path)
    return content


def align_config(tmp_path, *overrides):
    defaults = [f"features_dir={tmp_path}/language", f"vision_dir={tmp_path}/vision", "stages=[align]",
                "alignment.n_permutations=19", f"output_dir={tmp_path}/run", "device=cpu"]
    path = tmp_path / "toy.yaml"
    path.write_text("")
    return common.load_config(exp.Config, path, [*defaults, *overrides])


def cli(tmp_path, *overrides):
    path = tmp_path / "cli.yaml"
    path.write_text("")
    return exp.main([str(path), "stages=[align]", f"features_dir={tmp_path}/language", f"vision_dir={tmp_path}/vision",
                     f"output_dir={tmp_path}/run", "alignment.n_permutations=19", "device=cpu", *overrides])


def test_padding_is_cut_off_before_the_clamp(tmp_path):
    content = write_features(tmp_path / "a.pt", layers=2, dim=6, dims=[4, 6])
    content["feats"][:, 0, 4:] = 0
    torch.save(content, tmp_path / "a.pt")
    found = exp.read_features(tmp_path / "a.pt")
    assert [x.shape[1] for x in found.layers] == [4, 6]
    found.layers = exp.layers_to_compare(found, exp.AlignmentConfig())
    values = torch.cat(
        [content["feats"][:, 0, :4], content["feats"][:, 1]], dim=1).float().abs().flatten().sort().values
    assert max(x.abs().max() for x in found.layers) == values[int(0.95 * len(values))]


def test_files_of_another_pooling_are_left_out(tmp_path):
    for name, pool in (("gpt", "avg"), ("vit", "cls")):
        write_features(tmp_path / f"{name}.pt", pool=pool, seed=len(pool))
    write_features(tmp_path / "llama_pool-avg.pt", seed=5)
    write_features(tmp_path / "clip_pool-cls.pt", seed=6)
    def models(*overrides):
        cfg = align_config(tmp_path, f"features_dir={tmp_path}", "vision_dir=", *overrides)
        return exp.read_models(cfg, exp.load_features(cfg, "align").source[None])
    language, vision = models("pool_x=avg", "pool_y=cls")
    assert ([m.model for m in language], [m.model for m in vision]) == (
        ["gpt", "llama_pool-avg"], ["clip_pool-cls", "vit"])
    with pytest.raises(UserError, match="both sides"):
        models()
    with pytest.raises(UserError, match="no features of pool max; correct pool_x="):
        models("pool_x=max")


BAD_FEATURES = {
    "misordered": ({"ids": [f"item{i}" for i in range(30)][::-1]}, "same ids in another order"),
    "other items": ({"ids": [f"film{i}" for i in range(30)]}, "row 0 is film0, there item0"),
    "fewer": ({"feats": torch.randn(20, 2, 6), "ids": [f"item{i}" for i in range(20)]}, "vision/m.pt: 20 items"),
    "nan": ({"feats": torch.full((30, 2, 6), math.nan)}, "vision/m.pt: layer 0: 30 of 30 rows of features hold NaN"),
    "inf": ({"feats": torch.randn(30, 1, 6).index_fill(0, torch.tensor([3]), math.inf)}, "the first is row 3"),
    "half": ({"feats": torch.randn(30, 1, 6).half().index_fill(0, torch.tensor([3]), math.inf)}, "the first is row 3"),
    "complex": ({"feats": torch.zeros(30, 1, 6, dtype=torch.complex64)}, "expected float features"),
    "no feats": ({"feats": None}, "expected float features"),
    "whole numbers": ({"feats": torch.ones(30, 2, 6, dtype=torch.int64)}, "int64"),
    "ids": ({"ids": ["a"]}, "30 rows of features but 1 ids"),
    "dims": ({"dims": [6]}, r"L dims \(true widths\)"),
    "words as dims": ({"dims": ["a", "b"]}, "invalid literal for int"),
    "no layers": ({"feats": []}, "features must be"),
    "no items": ({"feats": torch.zeros(0, 2, 6), "ids": []}, r"features must be .* found \[\[0, 6\]"),
    "bits per byte": ({"bpb": math.nan}, r"bpb \(bits per byte\) is nan"),
}


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_bad_features_are_one_line_naming_the_file(tmp_path, capsys, case):
    changes, message = BAD_FEATURES[case]
    write_features(tmp_path / "language/m.pt")
    write_features(tmp_path / "vision/m.pt", seed=1, **changes)
    assert cli(tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(("overrides", "message"), [
    (["alignment.metrics=[mutual_nn]"], "mutual_knn"), (["features_dir="], "features_dir=: no language features"),
    (["alignment.metrics=[cka, cka]"], "each once"),
    (["synthetic.x1_depths=[]"], "synthetic.x1_depths must name"), (["alignment.k=30"], "too few for alignment.k=30"),
    (["features_dir=nowhere"], "no language features"), (["stages=[uniqueness]"], r"expected files at levels {u}"),
    (["stages=[uniqueness]", "features_dir=nowhere_{u}"], "nowhere_{u}: expected files"),
    (["stages=[align, align]"], "each once"), (["features_dir={BASE_DIR}/x"], "BASE_DIR"),
    (["alignment.ladder=[pca:99]"], "6 features of 30"), (["alignment.ladder=[tfidf:9]"], "needs the texts"),
    (["alignment.ladder=[lsa:9]"], "expected pca:WIDTH"), (["captions_file=nowhere.json"], "nowhere.json"),
    (["features_dir=", "stages=[n_sweep]"], "features_dir=: no language features"),
    (["stages=[mmimdb]", "mmimdb.dir=nowhere"], "nowhere/split.json"),
    (["stages=[synthetic]", "synthetic.uniqueness=[9]"], "from 0 to 8"),
    (["stages=[synthetic]", "synthetic.k=600"], "synthetic.k: must be < 512"),
    (["finetune.weights=[0, -1]"], "finetune.weights: must be >= 0"),
    (["synthetic.x2_depths=[1, 1]"], "each once")])
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, overrides, message):
    monkeypatch.delenv("BASE_DIR", raising=False)
    write_features(tmp_path / "language/m.pt")
    write_features(tmp_path / "vision/n.pt", seed=1)
    assert cli(tmp_path, *overrides) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error


def test_damaged_file_bare_tensor_and_constant_rows(tmp_path, capsys):
    write_features(tmp_path / "language/m.pt")
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/m.pt").write_bytes(b"not a file of torch")
    assert cli(tmp_path) == 2
    assert "vision/m.pt: cannot be read" in capsys.readouterr().err
    tensor = torch.randn(30, 6)
    tensor[4] = 1
    torch.save(tensor, tmp_path / "vision/m.pt")  # one layer, no ids
    with pytest.warns(UserWarning) as caught:
        found = exp.read_features(tmp_path / "vision/m.pt")
        exp.layers_to_compare(found, exp.AlignmentConfig())
    assert ["order of its items was not checked" in str(w.message) or "1 constant rows" in str(w.message)
            for w in caught] == [True, True]
    assert [tuple(x.shape) for x in found.layers] == [(30, 6)]
    with pytest.raises(UserError, match="30 and 20"):
        exp.alignment_matrix(tensor, tensor[:20], "cka")
    with pytest.raises(UserError, match="NaN"):
        exp.mutual_knn(tensor, tensor * math.nan)
    with pytest.raises(UserError, match="more than k"):
        exp.mutual_knn(tensor[:10], tensor[:10], 10)


def test_tensors_and_whole_numbers_as_facts_of_a_file(tmp_path):
    write_features(tmp_path / "a.pt", dims=torch.tensor([4, 6]), bpb=torch.tensor(0.5), ids=torch.arange(30))
    write_features(tmp_path / "b.pt", ids=[str(i) for i in range(30)])
    a, b = (exp.read_features(tmp_path / f"{name}.pt") for name in "ab")
    assert [x.shape[1] for x in a.layers] == [4, 6]
    assert (a.bpb, b.bpb) == (0.5, None)
    exp.check_same_items([a, b])  # 7 and "7" are one item


def test_lists_of_layers_families_and_missing_ids(tmp_path):
    layers = [torch.randn(30, 4), torch.randn(30, 7).half()]
    write_features(tmp_path / "m.pt", feats=layers, family="mine", ids=None)
    with pytest.warns(UserWarning, match=r"m\.pt: has no ids"):
        found = exp.read_features(tmp_path / "m.pt")
    assert [tuple(x.shape) for x in found.layers] == [(30, 4), (30, 7)]
    assert found.family == "mine"
    write_features(tmp_path / "vit_small_dinov2.pt")
    assert exp.read_features(tmp_path / "vit_small_dinov2.pt").family == "vit_dinov2"


def results_of(tmp_path):
    return common.read_json(tmp_path / "run/results.json")


def test_models_are_told_apart_by_name_and_side(tmp_path, capsys):
    """CLIP's two towers bear one name; the intervals are of the layers that were best."""
    language = write_features(tmp_path / "language/clip.pt", n=60)["feats"]
    vision = torch.randn(60, 9, 6, generator=torch.Generator().manual_seed(1))
    vision[:, 7] += language[:, 1]
    write_features(tmp_path / "vision/clip.pt", n=60, feats=vision)
    assert cli(tmp_path, "alignment.k=5", "alignment.metrics=[mutual_knn]") == 0
    (row,) = results_of(tmp_path)["tables"]["mutual_knn: best layer pair, 60 items"].values()
    near = []
    for folder, best in zip(("language", "vision"), map(int, row["layers"].split(", ")), strict=True):
        layers = exp.clamp_outliers(exp.read_features(tmp_path / folder / "clip.pt").layers)
        near.append(layers[max(0, best - 2):best + 3])
    expected = exp.interval("score", row["score"], exp.part_scores(*near, "mutual_knn", 5))
    assert row["layers"] == "1, 7" and row["score low"] < row["score"] < row["score high"]
    assert {key: row[key] for key in expected} == expected
    write_features(tmp_path / "language/other.pt", n=60, seed=2, model="clip")
    assert cli(tmp_path, "alignment.k=5", f"output_dir={tmp_path}/again") == 2
    assert "a second model of the name clip" in capsys.readouterr().err


def test_models_of_one_modality_are_compared_once_a_pair(tmp_path, capsys):
    for i in range(3):
        write_features(tmp_path / f"vision/m{i}.pt", n=40, seed=i)
    overrides = [f"features_dir={tmp_path}/vision", "alignment.metrics=[cka]"]
    assert cli(tmp_path, *overrides) == 0
    assert list(results_of(tmp_path)["tables"]["cka: best layer pair, 40 items"]) == ["m0 - m1", "m0 - m2", "m1 - m2"]
    assert cli(tmp_path, *overrides, "alignment.ladder=[pca:2, pca:3, pca:4]", "--fresh") == 0
    tables = results_of(tmp_path)["tables"]
    assert len(tables["cka: best layer pair, 40 items"]) == 3 + 3 * 3
    # m0 whole is not compared with itself
    assert [row["n"] for row in tables["rank correlation"].values()] == [4, 4, 3]
    for i in (1, 2):
        (tmp_path / f"vision/m{i}.pt").unlink()
    assert cli(tmp_path, *overrides, "--fresh") == 2
    assert "is the only model on both sides" in capsys.readouterr().err


def test_few_items_have_no_interval_and_the_second_report_is_the_first(tmp_path, capsys):
    for i, folder in enumerate(("language", "vision")):
        write_features(tmp_path / folder / f"m{i}.pt", n=9, seed=i)
    assert cli(tmp_path, "alignment.k=5", "alignment.metrics=[lcs_knn]") == 0
    out = capsys.readouterr().out
    assert "[" not in out.partition("Score of")[0]
    assert cli(tmp_path, "alignment.k=5", "alignment.metrics=[lcs_knn]") == 0
    assert capsys.readouterr().out == out


def test_align_stage_reports_every_pair_and_resumes_from_its_matrices(tmp_path, capsys, monkeypatch):
    shared = torch.randn(60, 5)
    for i, folder in enumerate(("language", "language", "vision")):
        noise = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(i))
        noise[:, 1, :5] += 3 * shared  # the middle layer agrees
        write_features(tmp_path / folder / f"m{i}.pt", n=60, layers=3, dim=8, feats=noise)
    overrides = ["alignment.metrics=[mutual_knn, lcs_knn, svcca]", "alignment.k=5",
                 "alignment.ladder=[pca:2, pca:4, pca:6]"]
    assert cli(tmp_path, *overrides) == 0
    out = capsys.readouterr().out
    results = results_of(tmp_path)
    tables = {metric: results["tables"][f"{metric}: best layer pair, 60 items"]
              for metric in ("mutual_knn", "lcs_knn", "svcca")}
    assert {len(table) for table in tables.values()} == {5}
    best = tables["mutual_knn"]["m0 - m2"]
    assert (best["layers"], best["p"]) == ("1, 1", 0.05)
    assert best["calibrated"] > 0.2
    sides = [exp.clamp_outliers(exp.read_features(tmp_path / name).layers)
             for name in ("language/m0.pt", "vision/m2.pt")]
    expected = exp.permutation_null(*sides, "mutual_knn", 5, 19)
    assert (best["score"], best["chance"]) == pytest.approx((expected["score"], expected["null_mean"]))
    assert best["score low"] < best["score"] < best["score high"]
    assert 0 <= tables["lcs_knn"]["m0 - m2"]["score"] <= 1
    rho = results["tables"]["rank correlation"]["mutual_knn: dose-response, width of pca, alignment with m2"]
    assert rho["n"] == 4  # the whole model is the widest
    assert "chance" in out
    assert (tmp_path / "run/alignment/alignment.pt").exists()
    assert {p.name for p in (tmp_path / "run").glob("*.png")} >= {"heatmap_mutual_knn_m0.png", "heatmap_svcca_m1.png"}
    monkeypatch.setattr(exp, "permutation_null", None)  # nothing is computed again
    assert cli(tmp_path, *overrides) == 0
    assert capsys.readouterr().out == out
    (tmp_path / "run/results.json").unlink()
    assert cli(tmp_path, *overrides) == 0
    assert results_of(tmp_path)["tables"] == results["tables"]
    other = [*overrides, f"align_dir={tmp_path}/run/alignment", f"output_dir={tmp_path}/other"]
    with pytest.raises(TypeError):  # not of another seed, version of the metrics, bits per byte or features
        cli(tmp_path, *other, "seed=1")
    with monkeypatch.context() as patch:
        patch.setattr(common, "source_hash", lambda *_: "another")
        with pytest.raises(TypeError):
            cli(tmp_path, *other, "--fresh")
    for name, changes in (("language/m0.pt", {"bpb": 1.5}), ("vision/m2.pt", {"feats": torch.randn(60, 3, 8)})):
        content = torch.load(tmp_path / name, weights_only=True)
        torch.save({**content, **changes}, tmp_path / name)
        with pytest.raises(TypeError):
            cli(tmp_path, *other, "--fresh")
        torch.save(content, tmp_path / name)
    write_features(tmp_path / "vision/m2.pt", n=60, layers=3, dim=8, seed=9)
    assert cli(tmp_path, *overrides) == 2
    assert "other data" in capsys.readouterr().err


def test_n_sweep_has_both_kinds_of_k_both_kinds_of_captions_and_nulls(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    kinds = torch.randn(10, 6, generator=g)[torch.arange(200) % 10]  # coarse: which of ten kinds an item is of
    for folder, seed in (("language", 0), ("several", 1), ("vision", 2)):
        noise = 0.7 * torch.randn(200, 1, 6, generator=torch.Generator().manual_seed(seed))
        write_features(tmp_path / folder / "m.pt", n=200, feats=kinds[:, None] + noise)
    assert cli(tmp_path, "stages=[n_sweep]", f"n_sweep.several_dir={tmp_path}/several", "n_sweep.sizes=[50, 100, 5000]",
               "n_sweep.n_draws=3") == 0
    tables = results_of(tmp_path)["tables"]
    assert list(tables) == ["mutual_knn, k = 10", "mutual_knn, k / N = 0.2", "unbiased_cka"]
    assert {row.partition(":")[0] for table in tables.values() for row in table} == {
        "m, one caption", "m, several captions"}
    fixed, share = ({row.replace(", one caption", ""): values for row, values in tables[f"mutual_knn, {how}"].items()}
                    for how in ("k = 10", "k / N = 0.2"))
    assert list(fixed["m"]) == ["N = 50", "N = 100", "N = 200"]
    # with more items of a kind ten neighbours are a matter of detail
    assert fixed["m"]["N = 50"] > fixed["m"]["N = 200"] + 0.1
    assert share["m"]["N = 200"] == pytest.approx(share["m"]["N = 50"], abs=0.08)
    assert share["m: chance"]["N = 200"] == pytest.approx(0.2, abs=0.03)
    assert fixed["m: chance"]["N = 200"] == pytest.approx(0.05, abs=0.02)
    score, chance = fixed["m"]["N = 100"], fixed["m: chance"]["N = 100"]
    assert fixed["m: less chance"]["N = 100"] == pytest.approx((score - chance) / (1 - chance))
    assert (fixed["m: sd"]["N = 200"], fixed["m: p"]["N = 200"]) == (0, 0.05)
    models = [exp.read_features(tmp_path / f"{side}/m.pt") for side in ("language", "vision")]
    clamped = [exp.clamp_outliers(m.layers[0]) for m in models]
    assert fixed["m"]["N = 200"] == pytest.approx(exp.mutual_knn(*clamped))
    of_lists = exp.sweep(align_config(tmp_path), *models, "lcs_knn", {200: 10})
    assert of_lists["score"] == [pytest.approx(exp.lcs_knn(*clamped) / 10)]
    assert (tmp_path / "run/alignment_vs_n.png").exists()
    write_features(tmp_path / "several/m.pt", n=200, ids=list(range(200)))
    assert cli(tmp_path, "stages=[n_sweep]", f"n_sweep.several_dir={tmp_path}/several", "--fresh") == 2
    assert "other items than in" in capsys.readouterr().err


def test_caption_levels_and_placeholders(tmp_path, monkeypatch):
    for u in (0, 30, 100):
        write_features(tmp_path / f"gpt_u={u}_features/minhuh/prh/m_pool-avg.pt", seed=u)
    monkeypatch.setenv("BASE_DIR", str(tmp_path))
    assert exp.caption_levels("{BASE_DIR}/gpt_u={}_features") == [0, 30, 100]
    assert exp.at_level("{BASE_DIR}/gpt_u={}_features", 30) == f"{tmp_path}/gpt_u=30_features"
    assert exp.caption_levels("{BASE_DIR}/gpt_u={u}_features/minhuh/prh/m_pool-avg.pt") == [0, 30, 100]
    assert len(exp.feature_files(f"{tmp_path}/gpt_u=30_features", "language")) == 1


def test_both_shapes_of_captions_and_the_text_only_baseline(tmp_path):
    one = [{"Index - 0": {"sentences": {"Caption 0 - 0%": "a b", "Caption 1 - 10%": "a c"}, "similarities": [0.5]}}]
    two = [{"Index - 0": {"original": "a b", "sentences": {"Caption 1 - 10%": "a c"}}}]
    for content in (one, two):
        (tmp_path / "c.json").write_text(json.dumps(content))
        assert exp.read_captions(tmp_path / "c.json") == {0: ["a b"], 10: ["a c"]}
    for broken in ([{"Index - 0": {"sentences": {"Caption 1 - 10%": "a"}}}], {"a": 1}, [1],
                   [{"Index - 0": {"original": None, "sentences": {}}}]):
        (tmp_path / "c.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"c\.json"):
            exp.read_captions(tmp_path / "c.json")
    texts = ["a b b", "a c", "d"]
    vectors = exp.tfidf(texts, texts, 4096).double()
    idf = {w: math.log(4 / (1 + df)) + 1 for w, df in {"a": 2, "b": 1, "c": 1, "d": 1}.items()}
    row = {"a": idf["a"], "b": math.sqrt(2) * idf["b"]}
    length = math.hypot(*row.values())
    assert sorted(vectors[0][vectors[0] > 0].tolist()) == pytest.approx(sorted(v / length for v in row.values()))
    assert (vectors[0] @ vectors[1]).item() == pytest.approx(
        row["a"] / length * idf["a"] / math.hypot(idf["a"], idf["c"]))


@pytest.mark.skipif(not (SHARED / "data/alignment").exists(), reason="real features are not here")
def test_real_features_and_captions():
    captions = exp.read_captions(SHARED / "data/alignment/wit_rewritten_captions.json")
    original = exp.tfidf(captions[0], captions[0])
    curve = [exp.mutual_knn(original, exp.tfidf(captions[u], captions[0])) for u in range(10, 101, 10)]
    assert curve == pytest.approx([0.0865, 0.0466, 0.0436, 0.0311, 0.0280, 0.0277, 0.0254, 0.0275, 0.0238, 0.0185],
                                  abs=2e-4)
    assert exp.spearman(range(10), curve)["rho"] == pytest.approx(-0.988, abs=1e-3)
    assert len(exp.read_captions(SHARED / "data/alignment/flickr8k_rule_based_captions.json")[100]) == 1024
    vision = exp.read_features(SHARED / "data/alignment/vision/mobilenet_v2_1.0_224.pt")
    text = exp.read_features(SHARED / "data/alignment/language/minilm_cap5.pt")

    def centred(features):  # as the published figures of this set are
        return features.layers[-1] - features.layers[-1].mean(0)
    assert exp.mutual_knn(centred(vision), centred(text)) == pytest.approx(0.171, abs=1e-3)
    for u, value in ((0, 0.133), (40, 0.045), (100, 0.011)):
        replaced = exp.read_features(SHARED / f"data/alignment/rule_u={u}_features/minilm_last.pt")
        assert exp.mutual_knn(centred(vision), centred(replaced)) == pytest.approx(value, abs=1e-3)


def test_families_of_models():
    names = {"vit_small_patch14_dinov2": "vit_dinov2", "vit_huge_patch14_clip": "vit_clip",
             "mobilenet_v1_0.25_128": "mobilenet_v1", "vit_tiny_in21k": "vit_in21k"}
    assert {name: exp.family_of(name) for name in names} == names


# --------------------------------------------------------------------------------------------------- films, fine-tuning

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return demo_data.write_mmimdb(tmp_path_factory.mktemp("films"), n_films=120)


def film_config(tmp_path, films, *overrides):
    path = tmp_path / "films.yaml"
    path.write_text("")
    return common.load_config(exp.Config, path, [f"mmimdb.dir={films}", "stages=[finetune]",
                                                 "finetune.class_idx=Drama", "device=cpu", f"output_dir={tmp_path}/run",
                                                 "alignment.n_permutations=19", "alignment.metrics=[mutual_knn]",
                                                 *overrides])


def load(tmp_path, films, *overrides, stage="finetune"):
    return exp.load_data(film_config(tmp_path, films, *overrides), stage)


def test_plots_that_a_rung_reads_are_data_of_the_run(tmp_path, films):
    root, equal = shutil.copytree(films, tmp_path / "films"), []
    for ladder in ("[tfidf:64]", "[pca:2]"):
        before = load(tmp_path, root, f"alignment.ladder={ladder}", stage="mmimdb").fingerprint
        file = min((root / "dataset").glob("*.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), "plot": [f"Another plot, for {ladder}."]}))
        equal.append(before == load(tmp_path, root, f"alignment.ladder={ladder}", stage="mmimdb").fingerprint)
    assert equal == [False, True]


def test_labels_are_tied_by_id_and_by_name_and_training_inputs_are_whole(tmp_path, films):
    shuffled = tmp_path / "shuffled"
    shutil.copytree(films, shuffled)
    labels, ids = np.load(f"{films}/labels/labels_all_23.npy"), Path(films, "labels/ids_all.txt").read_text().split()
    columns = np.random.RandomState(0).permutation(23)
    np.save(shuffled / "labels/labels_all_23.npy", labels[:, columns])
    (shuffled / "labels/class_names_23.json").write_text(json.dumps([demo_data.GENRES[c] for c in columns]))
    data, other = (load(tmp_path, f) for f in (films, shuffled))
    reference, other = data.source, other.source
    for genre in demo_data.GENRES:
        assert torch.equal(reference.labels[:, reference.genres.index(genre)],
                           other.labels[:, other.genres.index(genre)])
    assert reference.labels[5].tolist() == labels[ids.index(reference.ids[5])].tolist()
    rows = torch.from_numpy(np.load(next(Path(films, "latents").glob("*_text.npy")))[::3].astype(np.float32))
    rows = rows[[ids.index(film) for film in reference.ids]]
    assert torch.equal(reference.language[0].layers[0], rows)  # no clamp
    train = data.splits["train"]
    assert torch.allclose(data.tensors["text"], (rows - rows[train].mean(0)) / rows[train].std(0), atol=1e-5)
    assert exp.genre_of(19, reference.genres) == exp.genre_of("western", other.genres) == "Western"
    assert exp.genre_of(0, reference.genres) == "Drama"
    with pytest.raises(UserError, match="use 0 to 22"):
        exp.genre_of("Noir", reference.genres)


@pytest.mark.parametrize("form", ["words", "bytes", "whole numbers", "places"])
def test_index_folders_choose_films(tmp_path, films, capsys, form):
    root = tmp_path / "indexed"
    shutil.copytree(films, root)
    split = common.read_json(root / "split.json")
    chosen = {"train": split["train"][::2], "dev": split["dev"][::2], "test": split["test"][3:24]}
    for part, names in chosen.items():
        (root / part).mkdir()
        places = np.array([split[part].index(film) for film in names])
        np.save(root / part / "sampled_ids.npy", {"words": np.array(names), "bytes": np.array(names, dtype="S"),
                                                  "places": places,
                                                  "whole numbers": np.array([int(film) for film in names])}[form])
    data = load(tmp_path, root)
    found = data.source
    for part, names in chosen.items():
        assert [found.ids[i] for i in found.chosen[part].tolist()] == names
    assert f"train has 36 of 72 films, those of {root}/train/sampled_ids.npy" in capsys.readouterr().out
    assert [found.ids[i] for i in found.test_sample.tolist()] == chosen["test"]
    few, control = (exp.select(data, next(job for job in data.jobs if job["labelled"] == arm)) for arm in (36, "all"))
    assert [found.ids[i] for i in few.splits["labelled"].tolist()] == chosen["train"]
    assert "labelled" not in control.splits
    assert [found.ids[i] for i in few.splits["val"].tolist()] == chosen["dev"]
    assert len(few.splits["train"]) == 72  # InfoNCE has all pairs
    probes = load(tmp_path, root, stage="mmimdb")
    assert (len(probes.splits["train"]), len(probes.splits["test"])) == (36, 21)


def sampled(root, values, part="test"):
    (root / part).mkdir()
    np.save(root / part / "sampled_ids.npy", values)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda root: (root / "labels/ids_all.txt").write_text("1\n2\n"), "expected 2 x 23 of 0, 1"),
    (lambda root: (root / "labels/labels_all_23.npy").write_bytes(b"junk"), "labels_all_23.npy: cannot be read"),
    (lambda root: (root / "latents/mm_imdb1_globals_aug3_clip_text.npy").write_bytes(b"junk"),
     "clip_text.npy: cannot be read"),
    (lambda root: (root / "split.json").write_text(json.dumps({"train": ["nobody"], "dev": ["x"], "test": ["y"]})),
     "labels/ids_all.txt: 3 of the split's films are not there, the first is nobody"),
    (lambda root: (root / "split.json").unlink(), "split.json: no such file; unpack mmimdb.tar.gz"),
    (lambda root: shutil.rmtree(root / "labels"), "labels_all_23.npy: no such file; unpack mmimdb.tar.gz"),
    (lambda root: np.save(root / "latents/mm_imdb1_globals_aug3_clip_text.npy", np.zeros((7, 4))),
     "expected 120 films x 3 views"),
    (lambda root: (root / "latents/mm_imdb1_globals_aug3_clip_image.npy").unlink(),
     "no mm_imdb1_globals_aug*_image.npy"),
    (lambda root: np.save(root / "latents/mm_imdb1_globals_aug3_clip_text.npy", np.full((360, 4), np.nan)), "NaN"),
    (lambda root: np.save(root / "labels/labels_all_23.npy", np.full((120, 23), 2)), "of 0, 1"),
    (lambda root: (root / "split.json").write_text(json.dumps({"train": []})), "expected films of train, dev and test"),
    (lambda root: sampled(root, np.array([["0"]])), "expected [n] film ids or places, found <U1 [1, 1]"),
    (lambda root: sampled(root, np.array([None, 3])), "sampled_ids.npy: cannot be read"),  # a pickle
    (lambda root: sampled(root, np.array([0.5])), "expected [n] film ids or places, found float64"),
    (lambda root: sampled(root, np.array(["0", "tt99"])),
     "1 entries are no films of split.json's part, the first is tt99"),
    (lambda root: sampled(root, np.arange(10)), "10 test films are too few")])
def test_bad_films_are_one_line(tmp_path, films, capsys, damage, message):
    root = tmp_path / "damaged"
    shutil.copytree(films, root)
    damage(root)
    (tmp_path / "x.yaml").write_text("")
    assert exp.main([str(tmp_path / "x.yaml"), "stages=[mmimdb]", f"mmimdb.dir={root}", "device=cpu",
                     f"output_dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_plots_are_the_first_summary_longer_than_one_word(tmp_path):
    (tmp_path / "dataset").mkdir()
    for film, plot in (("1", ["Short", "Two words", "More of it"]), ("2", "One line"), ("3", []),
                       ("4", ["Word"]), ("5", None)):
        (tmp_path / f"dataset/{film}.json").write_text(json.dumps({"plot": plot}))
    assert exp.film_texts(tmp_path, ["1", "2", "3", "4", "5"]) == ["Two words", "One line", "", "Word", ""]


def test_every_weight_gets_the_same_steps_rates_batches_and_start(tmp_path, films):
    cfg = film_config(tmp_path, films, "finetune.weights=[0, 2]", "finetune.n_seeds=2", "finetune.epochs=4",
                      "finetune.warmup_epochs=2", "finetune.n_labelled=20")
    data = exp.load_data(cfg)
    history = exp.train(cfg, data)
    jobs = {}
    for row in history:
        jobs.setdefault(row["job"], []).append((row["epoch"], row["learning_rate"]))
    assert len(jobs) == 8
    assert len({tuple(rows) for rows in jobs.values()}) == 1
    rates = [rate for _, rate in next(iter(jobs.values()))]
    assert rates[1] == pytest.approx(1e-4)
    assert rates[3] == pytest.approx(1e-6)
    states, batches = [], []
    for job in (j for j in data.jobs if j["seed"] == 1 and j["labelled"] == 20):  # both weights
        common.seed_everything(job["seed"])
        selected = exp.select(data, job)
        states.append(exp.build_model(cfg, selected).state_dict())
        batches.append(exp.epoch_batches(cfg, selected, 3))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert all(torch.equal(a, b) for one, other in zip(*batches, strict=True) for a, b in zip(one, other, strict=True))
    (rows, _), = exp.epoch_batches(cfg, exp.select(data, data.jobs[0]), 3)
    assert not torch.equal(rows, batches[0][0][0])  # of another seed
    starts = [exp.train_job(cfg, exp.select(data, data.jobs[i]))[0]["head.weight"] for i in (0, 1)]
    assert (starts[0] - starts[1]).abs().max() > 0.01  # further apart than four steps go


def test_few_labels_many_pairs(tmp_path, films):
    """InfoNCE has every pair once an epoch; the classifier's loss has no label but those of the labelled films."""
    cfg = film_config(tmp_path, films, "finetune.n_labelled=20", "finetune.weights=[1]", "finetune.batch_size=16",
                      "finetune.n_seeds=2")
    data = exp.load_data(cfg)
    assert [job["labelled"] for job in data.jobs] == [20, 20, "all", "all"]
    labelled = [set(exp.select(data, job).splits["labelled"].tolist()) for job in data.jobs[:2]]
    assert labelled[0] != labelled[1]  # drawn by seed
    few = exp.select(data, data.jobs[0])
    positives = few.tensors["labels"][few.splits["labelled"]].sum().item()
    share = few.tensors["labels"][few.splits["train"]].mean().item()
    assert positives == max(1, round(20 * share))
    batches = exp.epoch_batches(cfg, few, 0)
    assert sorted(torch.cat([pairs for pairs, _ in batches]).tolist()) == few.splits["train"].tolist()
    assert {len(rows) for _, rows in batches} == {16}
    assert set(torch.cat([rows for _, rows in batches]).tolist()) <= labelled[0]
    unknown = [i for i in range(120) if i not in labelled[0]]
    changed = dataclasses.replace(few, tensors={**few.tensors, "labels": few.tensors["labels"].clone()})
    changed.tensors["labels"][unknown] = 1 - changed.tensors["labels"][unknown]
    model = exp.build_model(cfg, few)
    for pairs, rows in batches:
        one, other = (model.losses(exp.make_batch(d, pairs, rows)) for d in (few, changed))
        assert torch.equal(one["loss"], other["loss"])
    with pytest.raises(UserError, match="n_labelled=500: must be 2 to 72"):
        load(tmp_path, films, "finetune.n_labelled=500")


def test_contrastive_weight_zero_trains_no_image_tower_and_scale_is_clamped(tmp_path, films):
    cfg = film_config(tmp_path, films, "finetune.weights=[0]")
    data = exp.load_data(cfg)
    model, batch = exp.build_model(cfg, data), exp.make_batch(data, data.splits["train"][:8])
    groups = exp.build_optimizer(cfg, model).param_groups
    assert [(group["weight_decay"], group["lr"], {p.ndim for p in group["params"]}) for group in groups] == [
        (0.01, 1e-4, {2}), (0, 1e-4, {1}), (0, 1e-2, {0})]
    model.losses(batch)["loss"].backward()
    assert all(p.grad.abs().sum() == 0 for p in model.image.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.text.parameters())
    model.log_scale.data.fill_(10)
    image, text = model.image(batch["image"]), model.text(batch["text"])
    expected = common.info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor(100.0))
    assert model.losses(batch)["contrast"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_learnt_scale_moves_and_is_logged(tmp_path, films):
    """It has a rate of its own; at the towers' it stayed where it began."""
    cfg = film_config(tmp_path, films, "finetune.weights=[5]", "finetune.n_seeds=1", "finetune.epochs=4",
                      "finetune.warmup_epochs=1")
    history = exp.train(cfg, exp.load_data(cfg))
    assert abs(history[-1]["logit_scale"] - 1 / 0.07) > 0.1  # 4 steps at the towers' rate: at most .006


def test_the_epoch_of_the_best_validation_score_is_kept(tmp_path, films):
    cfg = film_config(tmp_path, films, "finetune.weights=[1]", "finetune.learning_rate=0.03", "finetune.epochs=6",
                      "finetune.warmup_epochs=1", "finetune.class_idx=Fantasy")
    data = exp.load_data(cfg)
    best, rows = exp.train_job(cfg, data)
    model = exp.build_model(cfg, data)
    model.load_state_dict(best)
    scores = [row["val_score"] for row in rows]
    assert scores[-1] < max(scores) == model.score(data, "val").item()


def test_one_batch_is_overfitted(tmp_path, films):
    data = load(tmp_path, films, "finetune.weights=[1]")
    cfg = film_config(tmp_path, films, "finetune.weights=[1]", "finetune.learning_rate=3e-3")
    torch.manual_seed(0)
    model = exp.build_model(cfg, data)
    optimizer, batch = exp.build_optimizer(cfg, model), exp.make_batch(data, data.splits["train"][:16])
    losses = [exp.train_step(model, batch, optimizer)["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]


def test_a_genre_that_dev_lacks_is_refused(tmp_path, films):
    root = tmp_path / "lacking"
    shutil.copytree(films, root)
    labels, ids = np.load(root / "labels/labels_all_23.npy"), (root / "labels/ids_all.txt").read_text().split()
    labels[[ids.index(film) for film in common.read_json(root / "split.json")["dev"]],
           demo_data.GENRES.index("War")] = 0
    np.save(root / "labels/labels_all_23.npy", labels)
    with pytest.raises(UserError, match="War has none or all of the 12 films of dev"):
        load(tmp_path, root, "finetune.class_idx=War")


def test_a_ladder_longer_than_the_data_is_refused(tmp_path, films):
    root = tmp_path / "short"
    shutil.copytree(films, root)
    sampled(root, np.arange(20), "train")
    with pytest.raises(UserError, match="clip_text has 48 features of 20 items"):
        load(tmp_path, root, "alignment.ladder=[pca:30]", stage="mmimdb")
    with pytest.raises(UserError, match="a second model of the name pca4"):
        load(tmp_path, films, "alignment.ladder=[pca:4, pca:4]", stage="mmimdb")


def test_threshold_that_maximises_f1():
    logits, targets = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    t = exp.best_threshold(logits, targets)
    assert exp.genre_f1((logits > t)[:, None], targets[:, None]).item() == pytest.approx(2 * 3 / (4 + 3))
    g = torch.Generator().manual_seed(0)
    for n in range(1, 60):  # with ties; some are best predicted all, as those of a model that tells none apart
        logits, targets = torch.randint(n // 4 + 1, (n,), generator=g).float(), torch.ones(n)
        targets[1:] = (torch.rand(n - 1, generator=g) < 0.6).float()
        best, found = (max(exp.genre_f1((logits > t)[:, None], targets[:, None]).item() for t in thresholds)
                       for thresholds in ([-1.0, *logits.tolist()], [exp.best_threshold(logits, targets)]))
        assert found == best


def test_probes_are_adam_with_l2(tmp_path, films):
    data = load(tmp_path, films, stage="mmimdb")
    cfg = film_config(tmp_path, films)
    model, batch = exp.build_model(cfg, data), exp.make_batch(data, data.splits["train"][:16])
    optimizer = exp.build_optimizer(cfg, model)
    for _ in range(3):
        exp.train_step(model, batch, optimizer)
    for i, (rate, decay) in list(enumerate(exp.PROBE_SETTINGS))[::6]:
        single = nn.Linear(48, 23)
        nn.init.zeros_(single.weight)
        nn.init.zeros_(single.bias)
        own = torch.optim.Adam(single.parameters(), lr=rate, weight_decay=decay)
        for _ in range(3):
            own.zero_grad()
            F.binary_cross_entropy_with_logits(single(batch["features"]), batch["labels"],
                                               pos_weight=model.pos_weight).backward()
            own.step()
        assert torch.allclose(model.weight[i], single.weight.T, atol=1e-5), i


# ----------------------------------------------------------------------------------------------------------- whole runs

def toy_yaml(tmp_path, films):
    path = tmp_path / "toy.yaml"
    path.write_text(f"""stages: [synthetic, mmimdb, finetune]
mmimdb: {{dir: {films}, epochs: 4}}
alignment: {{n_permutations: 19, k: 5, ladder: ["pca:4", "pca:8", "tfidf:64"]}}
finetune: {{class_idx: Drama, weights: [0, 1], n_seeds: 2, epochs: 4, warmup_epochs: 1, embed_dim: 16, n_labelled: 30}}
synthetic: {{uniqueness: [0, 4, 8], transform_depths: [1], x1_depths: [1, 2], x2_depths: [1], n_samples: 4000,
             epochs: 2, n_seeds: 2}}
device: cpu
""")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, films):
    """An uninterrupted run of the three stages that train."""
    folder = tmp_path_factory.mktemp("whole")
    path = toy_yaml(folder, films)
    assert exp.main([str(path), f"output_dir={folder / 'run'}"]) == 0
    return path, folder / "run"


def assert_same_run(folder, whole):
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("best_model.pt", "checkpoint_latest.pt"):
        one, other = (common.load_checkpoint(f / name)["model_state_dict"] for f in (folder, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_leaves_the_documented_files(whole):
    folder = whole[1]
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt",
                     "results.json", "report.md", "per_item.pt", "finetune.png", "mmimdb_correlations.png",
                     "alignment_vs_uniqueness_mutual_knn.png", "alignment_vs_performance_unbiased_cka.png"}
    results = common.read_json(folder / "results.json")
    assert results["synthetic"] is True
    assert results["data_fingerprint"] == common.read_json(folder / "environment.json")["data_fingerprint"]
    state = common.load_checkpoint(folder / "checkpoint_latest.pt")
    assert state.keys() >= {"epoch", "global_step", "best_val_loss", "model_state_dict", "optimizer_state_dict",
                            "scheduler_state_dict", "scaler_state_dict", "history", "config", "rng", "position"}
    tables = results["tables"]
    assert set(tables["alignment against uniqueness U"]) == {"D = 1, U = 0", "D = 1, U = 4", "D = 1, U = 8"}
    assert tables["alignment against uniqueness U"]["D = 1, U = 4"]["n"] == 4  # 2 seeds x 2 depths of x1
    probes = tables["linear probes; alignment with clip_image"]
    assert list(probes) == ["chance: all genres of every film", "clip_text", "pca4", "pca8", "tfidf64"]
    assert probes["clip_text"]["f1_macro low"] < probes["clip_text"]["f1_macro"] < probes["clip_text"]["f1_macro high"]
    genres = tables["test F1 against mutual_knn, dose-response over pca"]
    assert genres["macro"]["n"] == 3
    assert len(genres) == 24
    assert not any("models" in title for title in tables)  # one model is no sample
    rows = tables["Drama: F1, AP and alignment against w"]
    assert list(rows) == ["chance: all positive", "30 labelled, w = 0", "30 labelled, w = 1", "all labelled, w = 0",
                          "all labelled, w = 1"]
    for row in list(rows.values())[1:]:
        assert row["AP low"] < row["AP"] < row["AP high"]
        assert row["unbiased_cka low"] < row["unbiased_cka"] < row["unbiased_cka high"]
    assert list(tables["paired difference"]) == ["30 labelled, w = 1 - 30 labelled, w = 0",
                                                 "all labelled, w = 1 - all labelled, w = 0",
                                                 "all labelled, w = 0 - 30 labelled, w = 0",
                                                 "all labelled, w = 1 - 30 labelled, w = 1"]
    assert tables["rank correlation"]["unbiased_cka: U, alignment; D = 1"]["seeds"] == 2
    assert tables["finetune: rank correlation"]["w, AP; 30 labelled"]["n"] == 4


def test_finished_models_load_and_give_the_reported_scores(whole, films):
    models, cfg = exp.load_model(whole[1])
    assert cfg.finetune.n_labelled == 30
    results = common.read_json(whole[1] / "results.json")["tables"]
    data = exp.load_data(cfg, "finetune")
    row = results["Drama: F1, AP and alignment against w"]["30 labelled, w = 1"]
    values, recalls, aligned = [], [], []
    for seed in (0, 1):
        model = models[f"finetune genre=Drama labelled=30 weight=1.0 seed={seed}"]
        assert not model.training
        values.append(model.score(data, "test").item())
        x, rows = data.tensors, data.source.test_sample
        image, text = model.image(x["image"][rows]), model.text(x["text"][rows])
        index = torch.arange(len(rows))
        recalls.append(100 * common.retrieval_metrics(F.normalize(text, dim=1), F.normalize(image, dim=1), index,
                                                      index)["R@10"])
        aligned.append(exp.unbiased_cka(text.detach(), image.detach()))
    assert np.mean(values) == pytest.approx(row["AP"])
    assert (row["T2I R@10"], row["unbiased_cka"]) == pytest.approx((np.mean(recalls), np.mean(aligned)))
    assert results["Drama: F1, AP and alignment against w"]["chance: all positive"]["T2I R@10"] == 1000 / 36
    difference = results["paired difference"]["30 labelled, w = 1 - 30 labelled, w = 0"]["AP"]
    others = results["Drama: F1, AP and alignment against w"]["30 labelled, w = 0"]["AP"]
    assert difference == pytest.approx(row["AP"] - others)
    assert isinstance(models["synthetic seed=1 side=x2 depth=1"], exp.Encoders)
    assert sum(name.startswith("mmimdb") for name in models) == 4


@torch.no_grad()
def test_synthetic_scores_and_probes_are_of_test_items(whole):
    models, cfg = exp.load_model(whole[1])
    tables, accuracies, scores = common.read_json(whole[1] / "results.json")["tables"], {"x1": [], "x2": []}, []
    for seed in (0, 1):
        x1, x2, labels, splits = exp.draw_synthetic(cfg.synthetic, seed)
        test, stacks = splits["test"], {}
        for side, depth, x in (("x1", 1, x1), ("x1", 2, x1), ("x2", 1, x2[1])):
            model = models[f"synthetic seed={seed} side={side} depth={depth}"]
            logits, hidden = model(x[test][:, None].expand(-1, 3, -1))  # of U = 0, 4, 8
            accuracies[side].append((logits[1].argmax(1) == labels[4][test]).float().mean().item())
            stacks[side, depth] = torch.stack([x[1, :512] for x in hidden], dim=1)
        scores += [exp.alignment_matrix(stacks["x1", depth], stacks["x2", 1], "mutual_knn", 100).max().item()
                   for depth in (1, 2)]
    row = tables["alignment against uniqueness U"]["D = 1, U = 4"]
    assert row["mutual_knn"] == pytest.approx(np.mean(scores))
    for side, values in accuracies.items():
        assert row[f"accuracy {side}"] == pytest.approx(np.mean(values))

    films = exp.load_data(cfg, "mmimdb").source
    train, test = films.splits["train"], films.splits["test"]
    x, texts = films.language[0].layers[-1], exp.film_texts(cfg.mmimdb.dir, films.ids)
    assert [m.clamp for m in films.language] == [True, True, True, False]  # tfidf is mostly zeros
    directions = torch.linalg.svd(x[train] - x[train].mean(0), full_matrices=False)[2][:4]
    rung = exp.tfidf(texts, [texts[i] for i in train.tolist()], 64)
    inputs = {"clip_text": x, "pca4": (x - x[train].mean(0)) @ directions.T, "tfidf64": rung}
    chosen = common.read_json(whole[1] / "results.json")["chosen"]
    for name, x in inputs.items():
        setting = exp.PROBE_SETTINGS.index((chosen[name]["learning_rate"], chosen[name]["weight_decay"]))
        model = models[f"mmimdb model={name}"]
        logits = model((x[test] - x[train].mean(0)) / x[train].std(0).clamp(min=1e-6))[setting]
        f1 = exp.genre_f1(logits > 0, films.labels[test]).mean().item()
        assert tables["linear probes; alignment with clip_image"][name]["f1_macro"] == pytest.approx(f1)
    positives = films.labels[train].sum(0)
    assert torch.allclose(model.pos_weight, (len(train) - positives) / positives)


def test_correlations_over_models_are_f1_on_alignment_and_q_of_genres_alone():
    draws = np.random.RandomState(2)
    x, f1 = draws.rand(6), [{"macro": draws.rand(), "Drama": draws.rand(), "War": draws.rand()} for _ in range(6)]
    rows = exp.correlations_by_genre(x, f1)
    for genre, row in rows.items():
        reference = scipy.stats.linregress(x, [of_model[genre] for of_model in f1])
        assert (row["slope"], row["rho"]) == pytest.approx(
            (reference.slope, scipy.stats.spearmanr(x, [of_model[genre] for of_model in f1]).statistic))
    assert [rows[genre]["q"] for genre in ("Drama", "War")] == pytest.approx(
        scipy.stats.false_discovery_control([rows["Drama"]["p"], rows["War"]["p"]]))
    assert "q" not in rows["macro"]


def test_nothing_is_chosen_on_test(whole, films, tmp_path):
    """The genres of the test films, shuffled among them."""
    root = tmp_path / "films"
    shutil.copytree(films, root)
    labels, ids = np.load(root / "labels/labels_all_23.npy"), (root / "labels/ids_all.txt").read_text().split()
    rows = [ids.index(film) for film in common.read_json(root / "split.json")["test"]]
    labels[rows] = labels[np.random.RandomState(0).permutation(rows)]
    np.save(root / "labels/labels_all_23.npy", labels)
    path = tmp_path / "toy.yaml"
    path.write_text(whole[0].read_text())
    assert exp.main([str(path), f"output_dir={tmp_path / 'run'}", f"mmimdb.dir={root}"]) == 0
    for changed in (("Drama: F1, AP and alignment against w", "30 labelled, w = 1", "AP"),
                    ("linear probes; alignment with clip_image", "clip_text", "mAP")):
        assert_nothing_chosen_on_test(tmp_path / "run", whole[1], changed=("tables", *changed))


# Moments of a run at which a process is killed; a job that is cut short is done again.
MOMENTS = {
    "mid job": lambda: kill_at(exp, "train_step", 31),
    "before a checkpoint": lambda: kill_at(common, "atomic_write", 3, ends_with("checkpoint_latest.pt")),
    "before best_model.pt": lambda: kill_at(common, "atomic_write", 1, ends_with("best_model.pt")),
    "evaluation": lambda: kill_at(common, "plot_lines", 3),
    "before results.json": lambda: kill_at(common, "atomic_write", 1, ends_with("results.json")),
    "after completion": lambda: None}


def quicken():
    torch.set_num_threads(1)


def test_killed_at_any_moment_and_rerun_equals_uninterrupted(whole, tmp_path):
    commands = {moment: [whole[0], f"output_dir={tmp_path / moment.replace(' ', '_')}"] for moment in MOMENTS}
    killed("test_exp_alignment_corr", list(commands.items()))
    for moment, command in commands.items():
        assert exp.main([*map(str, command)]) == 0, moment
        assert_same_run(tmp_path / moment.replace(" ", "_"), whole[1])


def test_ctrl_c_ends_after_the_job_in_hand(whole, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "exp_alignment_corr.py", str(whole[0]), f"output_dir={tmp_path / 'run'}"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.csv"
    while process.poll() is None and not log.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert re.search(r"stopped at step \d+; the same command resumes from", error.strip())
    assert exp.main([str(whole[0]), f"output_dir={tmp_path / 'run'}"]) == 0
    assert_same_run(tmp_path / "run", whole[1])


def test_a_finished_run_only_reports_and_another_config_is_refused(whole, capsys, monkeypatch):
    path, folder = whole
    monkeypatch.setattr(exp, "train_job", None)
    monkeypatch.setattr(exp, "evaluate", None)
    before = (folder / "results.json").read_bytes()
    assert exp.main([str(path), f"output_dir={folder}"]) == 0
    assert "finetune: genre Drama" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before
    assert exp.main([str(path), f"output_dir={folder}", "finetune.epochs=5"]) == 2
    assert "finetune.epochs=5 (was 4)" in capsys.readouterr().err


def test_stages_with_and_without_training_share_a_run(tmp_path, films):
    for i, folder in enumerate(("language", "vision")):
        write_features(tmp_path / folder / "m.pt", n=40, seed=i)
    command = ["stages=[align, finetune]", f"mmimdb.dir={films}", "finetune.class_idx=Drama", "finetune.weights=[1]",
               "finetune.n_seeds=1", "finetune.epochs=2", "finetune.warmup_epochs=1", "finetune.embed_dim=8",
               "alignment.metrics=[cka]", "alignment.k=5"]
    assert cli(tmp_path, *command) == 0
    assert list(results_of(tmp_path)["tables"]) == ["cka: best layer pair, 40 items",
                                                    "Drama: F1, AP and alignment against w", "paired difference",
                                                    "rank correlation"]
    (tmp_path / "run/results.json").unlink()
    assert cli(tmp_path, *command, "--stage", "evaluate") == 0


def test_runs_are_compared_pair_by_pair_over_films(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    path.write_text(whole[0].read_text().replace("[synthetic, mmimdb, finetune]", "[finetune]"))
    for rate in ("1e-4", "1e-3"):
        assert exp.main([str(path), f"output_dir={tmp_path / rate}", f"finetune.learning_rate={rate}"]) == 0
    capsys.readouterr()
    assert exp.main(["--compare", str(tmp_path / "1e-4"), str(tmp_path / "1e-3")]) == 0
    out = capsys.readouterr().out
    assert "1e-3 - 1e-4 (paired, 36 items)" in out
    assert "30 labelled, w = 1: 1e-3 (1)" in out


def test_non_finite_loss_names_job_and_rate(tmp_path, films, capsys):
    (tmp_path / "x.yaml").write_text("")
    code = exp.main([str(tmp_path / "x.yaml"), "stages=[finetune]", f"mmimdb.dir={films}",
                     "finetune.learning_rate=1e30", "finetune.warmup_epochs=0",
                     "finetune.class_idx=Drama", "device=cpu", f"output_dir={tmp_path}/run"])
    error = capsys.readouterr().err
    assert code == 1
    assert "non-finite loss or prediction in finetune" in error
    assert "lower the learning rate of finetune" in error


def test_documented_command_line_values_load(tmp_path):
    """The keys of the reference's commands, as a YAML."""
    path = tmp_path / "doc.yaml"
    path.write_text("""features_dir: "{BASE_DIR}/gpt_u={}_features"
align_dir: "{BASE_DIR}/gpt_u={}_alignment"
plot_dir: "./plots"
same_scale: true
pool_x: avg
pool_y: cls
finetune:
  class_idx: 19
  weights: [0,0.1,0.25,0.5,1.0,2.0,5.0,10.0]
  epochs: 30
""")
    cfg = common.load_config(exp.Config, path)
    assert cfg.finetune.class_idx == 19
    assert cfg.finetune.weights[-1] == 10
    assert cfg.features_dir == "{BASE_DIR}/gpt_u={}_features"


def test_score_matrices_and_pictures_go_where_the_config_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_DIR", str(tmp_path))
    for u in (0, 50):
        for i in range(3):
            write_features(tmp_path / f"gpt_u={u}_features/m{i}.pt", n=40, seed=10 * u + i, bpb=1 - 0.1 * i, pool="avg")
    write_features(tmp_path / "vision/vit_base.pt", n=40, seed=5)
    captions = [{f"{i}": {"original": f"a b c{i % 7} {i}", "sentences": {"Caption 1 - 50%": f"a c{i % 7} d{i % 3}"}}}
                for i in range(40)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert cli(tmp_path, "stages=[align, uniqueness]", "features_dir={BASE_DIR}/gpt_u={}_features",
               "captions_file={BASE_DIR}/captions.json",
               "align_dir={BASE_DIR}/gpt_u={}_alignment", "plot_dir={BASE_DIR}/plots", "same_scale=true", "pool_x=avg",
               "alignment.metrics=[mutual_knn]") == 0
    assert (tmp_path / "gpt_u=0_alignment/alignment_u=0.pt").exists()
    assert (tmp_path / "gpt_u=50_alignment/alignment_u=50.pt").exists()
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "alignment_vs_uniqueness_mutual_knn.png", "performance_mutual_knn_vit.png",
        *(f"heatmap_mutual_knn_m{i}.png" for i in range(3))}
    tables = results_of(tmp_path)["tables"]
    title = "mutual_knn: performance (- bits per byte), alignment with vit"
    for u, row in ((50, tables["uniqueness: rank correlation"][f"{title}; u = 50"]),
                   (0, tables["rank correlation"][f"{title}_base"])):
        rows = common.load_checkpoint(tmp_path / f"gpt_u={u}_alignment/alignment_u={u}.pt")["rows"]
        assert row == exp.spearman([-r["bpb"] for r in rows], [r["score"] for r in rows])
        assert [r["bpb"] for r in rows] == pytest.approx([1, 0.9, 0.8])
    original, rewritten = exp.read_captions(tmp_path / "captions.json").values()
    expected = exp.mutual_knn(exp.tfidf(original, original), exp.tfidf(rewritten, original))
    assert tables["text only: TF-IDF of the originals with that of their rewrites"]["mutual_knn"] == {
        "u = 50": pytest.approx(expected)}
