"""exp_alignment_corr.py: metrics against reference values and float64 loops, the null, statistics, stages, exact resume, bad input."""

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
from conftest import ROOT
from torch import nn

import common
import demo_data
import exp_alignment_corr as exp
from common import UserError

SHARED = ROOT.parent / "shared"


# ----------------------------------------------------------------------------------------- reference values of other code

def case_a():
    draws = np.random.RandomState(0)
    z, wa, wb, ea, eb = (draws.standard_normal(shape) for shape in ((64, 8), (8, 32), (8, 48), (64, 32), (64, 48)))
    return torch.tensor((z @ wa + ea).astype(np.float32)), torch.tensor((z @ wb + eb).astype(np.float32))


def case_b(n=128, dims=(64, 96)):
    torch.manual_seed(0)
    return torch.randn(n, dims[0]), torch.randn(n, dims[1])


# Values of minyoungg/platonic-rep (neighbours exact; CKA of a version in float64 without epsilon; exact SVCCA; CKNNA without its epsilon).
REFERENCE = {
    "A": (case_a, {"cycle_knn": 1.0, "mutual_knn": 0.6296875, "lcs_knn": 3.609375, "edit_distance_knn": 0.1625, "cka": 0.8324021428,
                   "unbiased_cka": 0.8070474063, "cknna": 0.6829109, "svcca": 0.8055325923}),
    "B": (case_b, {"cycle_knn": 0.5390625, "mutual_knn": 0.0703125, "lcs_knn": 0.6171875, "edit_distance_knn": 0.00703125, "cka": 0.3889131613,
                   "unbiased_cka": 0.0171096896, "cknna": 0.0602027, "svcca": 0.2611224735}),
    "C": (lambda: (case_a()[0],) * 2, {"cycle_knn": 1.0, "mutual_knn": 1.0, "lcs_knn": 10.0, "edit_distance_knn": 1.0, "cka": 1.0,
                                       "unbiased_cka": 1.0, "cknna": 1.0, "svcca": 1.0}),
    "D": (lambda: case_b(64, (8192, 8192)), {"cycle_knn": 0.78125, "mutual_knn": 0.146875, "lcs_knn": 1.09375, "edit_distance_knn": 0.01875,
                                             "cka": 0.9923070718, "unbiased_cka": -0.0249187086, "cknna": 0.0973663, "svcca": 0.301776898}),
}


@pytest.mark.parametrize("case", REFERENCE)
@pytest.mark.parametrize("metric", exp.METRICS)
def test_reference_values(case, metric):
    features, values = REFERENCE[case]
    assert getattr(exp, metric)(*features()) == pytest.approx(values[metric], abs=5e-7)


def test_reference_values_at_other_k_and_swapped():
    a, b = case_a()
    expected = {"cycle_knn": 0.96875, "mutual_knn": 0.540625, "lcs_knn": 1.890625, "cknna": 0.5593752, "edit_distance_knn": 0.190625}
    for metric, value in expected.items():
        assert getattr(exp, metric)(a, b, 5) == pytest.approx(value, abs=5e-7), metric
    x, y = case_b()
    assert exp.cycle_knn(y, x) == 0.5234375  # asymmetric


def case_f():
    draws = np.random.RandomState(7)
    z = draws.standard_normal((96, 6))
    stacks = [np.stack([(base + step * i) * z @ draws.standard_normal((6, dim)) + draws.standard_normal((96, dim)) for i in range(layers)], axis=1)
              for layers, dim, base, step in ((3, 24, 0.3, 0.4), (4, 40, 0.2, 0.3))]
    for column, stack in enumerate(stacks):
        stack[:, :, column] *= 8
    return [torch.tensor(stack.astype(np.float32)) for stack in stacks]


@pytest.mark.parametrize(("exact", "thresholds", "matrix"), [
    (True, (5.42082405, 4.62809372), [[0.154167, 0.222917, 0.226042, 0.233333], [0.175, 0.340625, 0.404167, 0.427083],
                                      [0.214583, 0.402083, 0.546875, 0.579167]]),
    (False, (4.97086906, 4.43497705), [[0.151042, 0.226042, 0.220833, 0.227083], [0.173958, 0.345833, 0.404167, 0.43125],
                                       [0.207292, 0.409375, 0.558333, 0.579167]])])
def test_clamped_stacks_of_layers(exact, thresholds, matrix):
    clamped = [exp.clamp_outliers(stack, 0.95, exact) for stack in case_f()]
    for stack, threshold in zip(clamped, thresholds, strict=True):
        assert stack.abs().max().item() == pytest.approx(threshold, rel=1e-6)
    assert torch.allclose(exp.alignment_matrix(*clamped, "mutual_knn"), torch.tensor(matrix, dtype=torch.float64), atol=1e-6)
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
    with pytest.raises(UserError, match=r"m\.pt: the 0\.95 quantile of \|value\| is 0.*clamp_quantile=1"):
        exp.read_features(tmp_path / "m.pt", exp.AlignmentConfig(), "cpu")
    assert torch.equal(exp.read_features(tmp_path / "m.pt", exp.AlignmentConfig(clamp_quantile=1), "cpu").layers[0], sparse[:, 0])
    layers = torch.rand(40, 2, 5, generator=g) + torch.tensor([0.0, 9.0])[:, None]  # the second lies wholly above the threshold
    write_features(tmp_path / "m.pt", feats=layers, ids=list(range(40)))
    with pytest.warns(UserWarning, match="40 constant rows"):
        exp.read_features(tmp_path / "m.pt", exp.AlignmentConfig(clamp_quantile=0.4), "cpu")


# The null's recipe: draws of RandomState(123).permutation, K = 99.
@pytest.mark.parametrize(("metric", "tau", "calibrated"), [("mutual_knn", 0.1875, 0.5442307546), ("cka", 0.171073824, 0.7978133933),
                                                           ("unbiased_cka", 0.0437373, 0.798214), ("cknna", 0.1898357, 0.608584)])
def test_permutation_null_of_the_reference(metric, tau, calibrated):
    a, b = case_a()
    result = exp.permutation_null(a, b, metric, 10, n_permutations=99, seed=123)
    assert result["p_value"] == 0.01
    assert result["threshold"] == pytest.approx(tau, abs=2e-5)
    assert result["calibrated"] == pytest.approx(calibrated, abs=3e-5)
    assert len(result["null"]) == 99


# ------------------------------------------------------------------------------------------- each metric in float64 loops

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
            mask = torch.tensor([[float(j in near_x[i] and j in near_y[i]) for j in range(n)] for i in range(n)], dtype=torch.float64)
            return loop_hsic_unbiased(mask * gram_x, mask * gram_y)
        own = masked(near_a, near_a, gram_a, gram_a) * masked(near_b, near_b, gram_b, gram_b)
        return (masked(near_a, near_b, gram_a, gram_b) / own.sqrt()).item()
    columns = [(unit(x) - unit(x).mean(0)) / unit(x).std(0) for x in (a, b)]
    u, v = (torch.linalg.svd(x, full_matrices=False)[0][:, :10] for x in columns)
    return torch.linalg.svdvals(u.T @ v).mean().item()


def test_the_loops_themselves_against_hand_values():
    gram_a = torch.tensor([[2, 1, 0, 1, 3], [1, 5, 2, 0, 1], [0, 2, 3, 1, 1], [1, 0, 1, 4, 2], [3, 1, 1, 2, 6]], dtype=torch.float64)
    gram_b = torch.tensor([[1, 0, 2, 1, 1], [0, 3, 1, 2, 0], [2, 1, 4, 0, 1], [1, 2, 0, 2, 1], [1, 0, 1, 1, 5]], dtype=torch.float64)
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
    expected = torch.tensor([[loop_metric(metric, a[:, i], b[:, j], k) for j in range(3)] for i in range(2)], dtype=torch.float64)
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
def test_permuted_sides_equal_permuted_features(metric):
    a, b = toy_stacks()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    turned = exp.scores(exp.permuted(exp.prepare(a, metric, 5), order), exp.prepare(b, metric, 5), metric)
    assert torch.allclose(turned, exp.alignment_matrix(a[order], b, metric, 5), atol=1e-6)
    # the items' order itself means nothing
    assert torch.allclose(exp.alignment_matrix(a[order], b[order], metric, 5), exp.alignment_matrix(a, b, metric, 5), atol=1e-6)


def test_more_neighbours_than_a_byte_counts():
    a = torch.randn(140, 8, generator=torch.Generator().manual_seed(0))
    assert exp.lcs_knn(a, a, 130) == 130
    assert exp.edit_distance_knn(a, a, 130) == 1
    assert exp.edit_distance_knn(a, a.flip(1) ** 2, 130) == pytest.approx(loop_metric("edit_distance_knn", a, a.flip(1) ** 2, 130))


def test_symmetric_product_by_blocks():
    x = torch.randn(1100, 30)
    assert torch.allclose(exp.products(x, 0, 1100), x @ x.T, atol=1e-4)
    assert torch.equal(exp.products(x, 0, 1100), exp.products(x, 0, 1100).T)


def test_a_common_offset_changes_no_neighbour_and_no_unbiased_cka_of_itself():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, 64, generator=g, dtype=torch.float64) + 30 * torch.randn(64, generator=g, dtype=torch.float64)  # mean cosine .999
    y = x + 0.5 * torch.randn(200, 64, generator=g, dtype=torch.float64)
    for metric in exp.METRICS:
        assert getattr(exp, metric)(x.float(), y.float()) == pytest.approx(loop_metric(metric, x.float(), y.float(), 10), abs=2e-6), metric
    assert exp.unbiased_cka(x.float(), x.float()) == pytest.approx(1, abs=2e-8)


def test_equal_cosines_go_to_the_lowest_index_and_are_counted():
    x = torch.eye(8)[[0, 0, 0, 1, 1, 2, 3, 4]]
    near, cosines, ties = exp.nearest_neighbours(x, 1)
    assert near[:, 0].tolist() == [1, 0, 0, 4, 3, 0, 0, 0]
    assert cosines[:5, 0].tolist() == [1.0] * 5
    assert ties == 6  # rows 0, 1, 2 have two copies to choose from, 5, 6, 7 nothing but zeros


def test_svcca_of_flat_spectra_low_rank_and_few_features():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(300, 250, generator=g, dtype=torch.float64)
    left = exp.left_singular_vectors(x, 10)
    exact = torch.linalg.svd(x)[0][:, :10]
    assert torch.linalg.svdvals(left.T @ exact).min() > 1 - 1e-10
    low = exp.left_singular_vectors(torch.randn(50, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 40, generator=g, dtype=torch.float64), 10)
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


# ---------------------------------------------------------------------------------------------------------- null, statistics

def test_p_values_of_independent_features_are_uniform():
    """200 draws, the null of the maximum over 2 x 3 layer pairs: a p against the null of one pair alone would be far too small."""
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
    for k, per_mille in itertools.product((9, 19, 99, 200, 999), range(5, 1000, 5)):  # 1 - .7 is a little more than .3
        place = -(-(1000 - per_mille) * (k + 1) // 1000)  # in whole numbers
        assert exp.calibrate(k, np.arange(k), per_mille / 1000)["threshold"] == place - 1
    assert exp.permutation_null(*case_a(), "lcs_knn", n_permutations=19)["score"] == pytest.approx(0.3609375)


def test_intervals_cover_the_score_and_shrink():
    for metric in ("mutual_knn", "unbiased_cka"):
        widths = []
        for n in (100, 1600):
            g = torch.Generator().manual_seed(n)
            z = torch.randn(n, 6, generator=g)
            a, b = (torch.cat([z, torch.randn(n, 6, generator=g)], dim=1) for _ in range(2))
            low, high = exp.score_interval(a, b, metric)
            assert low < getattr(exp, metric)(a, b) < high
            widths.append(high - low)
        assert 2 < widths[0] / widths[1] < 8 if metric == "unbiased_cka" else widths[0] > widths[1]  # as 1 / sqrt(n): 4
    assert all(math.isnan(end) for end in exp.score_interval(a[:18], b[:18], "lcs_knn"))  # 9 of 18 rows have no 10 neighbours


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
        exact = scipy.stats.permutation_test((x,), lambda v: scipy.stats.spearmanr(v, y).statistic, permutation_type="pairings", n_resamples=10**6)
        assert out["p"] == pytest.approx(np.mean(np.abs(rho) >= abs(out["rho"]) - 1e-9) if rho else exact.pvalue, rel=1e-6)


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
        assert exp.slope(np.random.RandomState(0).rand(10), [constant] * 10) == {"slope": 0, "p": 1, "n": 10}


def test_slope_and_false_discovery_rate_against_scipy():
    draws = np.random.RandomState(4)
    x, y = draws.rand(15), draws.rand(15)
    reference = scipy.stats.linregress(x, y)
    out = exp.slope(x, y)
    assert (out["slope"], out["p"]) == (pytest.approx(reference.slope), pytest.approx(reference.pvalue, rel=1e-4))
    p = draws.rand(23) ** 3
    assert exp.benjamini_hochberg(p) == pytest.approx(scipy.stats.false_discovery_control(p).tolist())
    assert math.isnan(exp.benjamini_hochberg([0.01, math.nan])[1])


# ------------------------------------------------------------------------------------------------------------- the synthetic label

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
    again = exp.draw_synthetic(s, 0)
    assert torch.equal(again[1][2], x2[2])
    assert torch.equal(again[2][8], labels[8])


def test_encoders_trained_at_once_equal_single_ones():
    torch.manual_seed(0)
    model = exp.Encoders(3, 2)
    singles = []
    for e in range(3):
        single = nn.Sequential(nn.Linear(12, 12), nn.LeakyReLU(0.01), nn.Linear(12, 12), nn.LeakyReLU(0.01), nn.Linear(12, 4))
        parts = [(model.weight[e, 0], model.bias[e, 0, 0]), (model.weight[e, 1], model.bias[e, 1, 0]), (model.head_weight[e], model.head_bias[e, 0])]
        for layer, (weight, bias) in zip(single[::2], parts, strict=True):
            layer.weight.data, layer.bias.data = weight.detach().T.clone(), bias.detach().clone()
        singles.append(single)
    cfg = exp.Config()
    optimizer = exp.build_optimizer(cfg, model)
    batch = {"inputs": torch.randn(32, 3, 12), "labels": torch.randint(4, (32, 3))}
    for _ in range(3):
        exp.train_step(model, batch, optimizer)
    for e, single in enumerate(singles):
        own = torch.optim.Adam(single.parameters(), lr=cfg.synthetic.learning_rate)
        for _ in range(3):
            own.zero_grad()
            F.cross_entropy(single(batch["inputs"][:, e]), batch["labels"][:, e]).backward()
            own.step()
        assert torch.allclose(model(batch["inputs"])[0][e], single(batch["inputs"][:, e]), atol=1e-4)


def test_alignment_falls_with_uniqueness_to_chance(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("""synthetic: {uniqueness: [0, 4, 8], transform_depths: [1], x2_depths: [3], n_samples: 16384, epochs: 6}
alignment: {n_permutations: 19}
seed: 1
""")
    assert exp.main([str(path), f"output_dir={tmp_path / 'run'}", "device=cpu"]) == 0
    rows = common.read_json(tmp_path / "run/results.json")["stages"]["synthetic"]["rows"]
    for metric in ("unbiased_cka", "mutual_knn"):
        high, middle, low = (r[metric]["score"] for r in rows)
        assert high > middle + 0.1 > low + 0.2
    assert rows[2]["unbiased_cka"]["score"] < 0.1
    assert rows[2]["mutual_knn"]["score"] == pytest.approx(100 / 511, abs=0.03)  # chance
    assert rows[0]["accuracy_x1"] > 0.8 > rows[2]["accuracy_x1"]


# --------------------------------------------------------------------------------------------------------- features and captions

def write_features(path, n=30, layers=2, dim=6, seed=0, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    feats = torch.randn(n, layers, dim, generator=torch.Generator().manual_seed(seed)).half()
    content = {"feats": feats, "ids": [f"item{i}" for i in range(n)], "model": path.stem, **changes}
    torch.save(content, path)
    return content


def align_config(tmp_path, *overrides):
    defaults = [f"features_dir={tmp_path}/language", f"vision_dir={tmp_path}/vision", "stages=[align]", "alignment.n_permutations=19",
                f"output_dir={tmp_path}/run", "device=cpu"]
    path = tmp_path / "toy.yaml"
    path.write_text("")
    return common.load_config(exp.Config, path, [*defaults, *overrides])


def cli(tmp_path, *overrides):
    path = tmp_path / "cli.yaml"
    path.write_text("")
    return exp.main([str(path), "stages=[align]", f"features_dir={tmp_path}/language", f"vision_dir={tmp_path}/vision", f"output_dir={tmp_path}/run",
                     "alignment.n_permutations=19", "device=cpu", *overrides])


def test_padding_is_cut_off_before_the_clamp(tmp_path):
    content = write_features(tmp_path / "a.pt", layers=2, dim=6, dims=[4, 6])
    content["feats"][:, 0, 4:] = 0
    torch.save(content, tmp_path / "a.pt")
    found = exp.read_features(tmp_path / "a.pt", exp.AlignmentConfig(), "cpu")
    assert [x.shape[1] for x in found.layers] == [4, 6]
    values = torch.cat([content["feats"][:, 0, :4], content["feats"][:, 1]], dim=1).float().abs().flatten().sort().values
    assert max(x.abs().max() for x in found.layers) == values[int(0.95 * len(values))]


def test_files_of_another_pooling_are_left_out(tmp_path):
    for name, pool in (("gpt", "avg"), ("vit", "cls")):
        write_features(tmp_path / f"{name}.pt", pool=pool, seed=len(pool))
    write_features(tmp_path / "llama_pool-avg.pt", seed=5)
    write_features(tmp_path / "clip_pool-cls.pt", seed=6)
    language, vision = exp.read_models(align_config(tmp_path, f"features_dir={tmp_path}", "vision_dir=", "pool_x=avg", "pool_y=cls"), None, "cpu")
    assert ([m.model for m in language], [m.model for m in vision]) == (["gpt", "llama_pool-avg"], ["clip_pool-cls", "vit"])
    with pytest.raises(UserError, match="both sides"):
        exp.read_models(align_config(tmp_path, f"features_dir={tmp_path}", "vision_dir="), None, "cpu")


BAD_FEATURES = {
    "misordered": ({"ids": [f"item{i}" for i in range(30)][::-1]}, "same ids .* in another order"),
    "other items": ({"ids": [f"film{i}" for i in range(30)]}, "row 0 is film0, there item0"),
    "fewer": ({"feats": torch.randn(20, 2, 6), "ids": [f"item{i}" for i in range(20)]}, "vision/m.pt: 20 items"),
    "nan": ({"feats": torch.full((30, 2, 6), math.nan)}, "vision/m.pt: layer 0: 30 of 30 rows of features hold NaN"),
    "inf": ({"feats": torch.randn(30, 1, 6).index_fill(0, torch.tensor([3]), math.inf)}, "the first is row 3"),
    "no feats": ({"feats": None}, "expected float features"),
    "whole numbers": ({"feats": torch.ones(30, 2, 6, dtype=torch.int64)}, "int64"),
    "ids": ({"ids": ["a"]}, "30 rows of features but 1 ids"),
    "dims": ({"dims": [6, 7]}, "dims must give the width"),
    "words as dims": ({"dims": ["a", "b"]}, "must be lists of names and of widths"),
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
    (["alignment.metrics=[mutual_nn]"], "mutual_knn"), (["features_dir="], "is not set"), (["alignment.metrics=[cka, cka]"], "each once"),
    (["mmimdb.learning_rates=[]"], "mmimdb.learning_rates must name"), (["alignment.k=30"], "too few for alignment.k=30"),
                                                    (["features_dir=nowhere"], "no language feature files"),
    (["stages=[uniqueness]"], r"placeholder {u}"), (["stages=[uniqueness]", "features_dir=nowhere_{u}"], "for any level"),
                                                    (["stages=[align, align]"], "each once"),
    (["features_dir={BASE_DIR}/x"], "BASE_DIR"), (["alignment.ladder=[pca:99]"], "6 features of 30"),
                                                    (["alignment.ladder=[tfidf:9]"], "needs the texts"),
    (["alignment.ladder=[lsa:9]"], "expected pca:WIDTH"), (["captions_file=nowhere.json"], "nowhere.json"),
                                                    (["--stage", "finetune"], "for finetune set stages"),
    (["stages=[mmimdb]", "mmimdb.dir=nowhere"], "nowhere/split.json"), (["stages=[synthetic]", "synthetic.uniqueness=[9]"], "from 0 to 8"),
    (["stages=[synthetic]", "synthetic.k=600"], "more than k=600"), (["synthetic.x2_depths=[1, 1]"], "each once")])
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
    assert "vision/m.pt: not a readable .pt" in capsys.readouterr().err
    tensor = torch.randn(30, 6)
    tensor[4] = 1
    torch.save(tensor, tmp_path / "vision/m.pt")  # one layer, no ids
    with pytest.warns(UserWarning) as caught:
        found = exp.read_features(tmp_path / "vision/m.pt", exp.AlignmentConfig(), "cpu")
    assert ["order of its items was not checked" in str(w.message) or "1 constant rows" in str(w.message) for w in caught] == [True, True]
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
    a, b = (exp.read_features(tmp_path / f"{name}.pt", exp.AlignmentConfig(), "cpu") for name in "ab")
    assert [x.shape[1] for x in a.layers] == [4, 6]
    assert (a.bpb, b.bpb) == (0.5, None)
    exp.check_same_items([a, b])  # 7 and "7" are one item


def test_models_are_told_apart_by_name_and_side(tmp_path, capsys):
    """CLIP's two towers bear one name; the score against N and the intervals are of the layers that were best."""
    for folder, layers, seed in (("language", 2, 0), ("vision", 4, 1)):
        write_features(tmp_path / folder / "clip.pt", n=60, layers=layers, seed=seed)
    assert cli(tmp_path, "alignment.k=5", "alignment.metrics=[mutual_knn]") == 0
    result = common.read_json(tmp_path / "run/results.json")["stages"]["align"]
    (row,) = result["rows"]
    assert row["interval"][0] < row["score"] < row["interval"][1]
    assert next(p["mean"] for p in result["against_n"] if p["n"] == 60) == pytest.approx(row["score"])
    write_features(tmp_path / "language/other.pt", n=60, seed=2, model="clip")
    assert cli(tmp_path, "alignment.k=5", f"output_dir={tmp_path}/again") == 2
    assert "a second model of the name clip" in capsys.readouterr().err


def test_few_items_have_no_interval_and_the_second_report_is_the_first(tmp_path, capsys):
    for i, folder in enumerate(("language", "vision")):
        write_features(tmp_path / folder / f"m{i}.pt", n=9, seed=i)
    assert cli(tmp_path, "alignment.k=5", "alignment.metrics=[lcs_knn]") == 0
    out = capsys.readouterr().out
    assert "- .. -" in out
    assert cli(tmp_path, "alignment.k=5", "alignment.metrics=[lcs_knn]") == 0
    assert capsys.readouterr().out == out


def test_align_stage_reports_every_pair_and_resumes_from_its_matrices(tmp_path, capsys, monkeypatch):
    shared = torch.randn(60, 5)
    for i, folder in enumerate(("language", "language", "vision")):
        noise = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(i))
        noise[:, 1, :5] += 3 * shared  # the middle layer agrees
        write_features(tmp_path / folder / f"m{i}.pt", n=60, layers=3, dim=8, feats=noise)
    overrides = ["alignment.metrics=[mutual_knn, lcs_knn, svcca]", "alignment.k=5", "alignment.ladder=[pca:2, pca:4, pca:6]"]
    assert cli(tmp_path, *overrides) == 0
    out = capsys.readouterr().out
    results = common.read_json(tmp_path / "run/results.json")["stages"]["align"]
    rows = {(r["language"], r["vision"], r["metric"]): r for r in results["rows"]}
    assert len(rows) == 5 * 3
    best = rows["m0", "m2", "mutual_knn"]
    assert best["layers"] == [1, 1]
    assert best["p_value"] == 0.05
    assert best["calibrated"] > 0.2
    assert best["interval"][0] < best["score"] < best["interval"][1]
    assert 0 <= rows["m0", "m2", "lcs_knn"]["score"] <= 1
    assert any(c["n"] == 3 and "pca ladder" in c["of"] for c in results["correlations"])
    assert {p["n"] for p in results["against_n"]} == {15, 30, 60}
    assert "chance" in out
    assert (tmp_path / "run/alignment/alignment.pt").exists()
    assert {p.name for p in (tmp_path / "run").glob("*.png")} >= {"alignment_vs_n.png", "heatmap_mutual_knn_m0.png", "heatmap_svcca_m1.png"}
    monkeypatch.setattr(exp, "null_of_maximum", None)  # nothing is computed again
    assert cli(tmp_path, *overrides) == 0
    assert capsys.readouterr().out == out
    (tmp_path / "run/results.json").unlink()
    assert cli(tmp_path, *overrides) == 0
    assert common.read_json(tmp_path / "run/results.json")["stages"]["align"]["rows"] == results["rows"]
    write_features(tmp_path / "vision/m2.pt", n=60, layers=3, dim=8, seed=9)
    assert cli(tmp_path, *overrides) == 2
    assert "other data" in capsys.readouterr().err


def test_caption_levels_and_placeholders(tmp_path, monkeypatch):
    for u in (0, 30, 100):
        write_features(tmp_path / f"gpt_u={u}_features/minhuh/prh/m_pool-avg.pt", seed=u)
    monkeypatch.setenv("BASE_DIR", str(tmp_path))
    assert exp.caption_levels("{BASE_DIR}/gpt_u={}_features") == [0, 30, 100]
    assert exp.at_level("{BASE_DIR}/gpt_u={}_features", 30) == f"{tmp_path}/gpt_u=30_features"
    assert exp.caption_levels("{BASE_DIR}/gpt_u={u}_features/minhuh/prh/m_pool-avg.pt") == [0, 30, 100]
    assert len(exp.feature_files(f"{tmp_path}/gpt_u=30_features", "avg", "language")) == 1


def test_both_shapes_of_captions_and_the_text_only_baseline(tmp_path):
    one = [{"Index - 0": {"sentences": {"Caption 0 - 0%": "a b", "Caption 1 - 10%": "a c"}, "similarities": [0.5]}}]
    two = [{"Index - 0": {"original": "a b", "sentences": {"Caption 1 - 10%": "a c"}}}]
    for content in (one, two):
        (tmp_path / "c.json").write_text(json.dumps(content))
        assert exp.read_captions(tmp_path / "c.json") == {0: ["a b"], 10: ["a c"]}
    for broken in ([{"Index - 0": {"sentences": {"Caption 1 - 10%": "a"}}}], {"a": 1}, [1], [{"Index - 0": {"original": None, "sentences": {}}}]):
        (tmp_path / "c.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"c\.json"):
            exp.read_captions(tmp_path / "c.json")
    texts = ["a b b", "a c", "d"]
    vectors = exp.tfidf(texts, texts, 4096).double()
    idf = {w: math.log(4 / (1 + df)) + 1 for w, df in {"a": 2, "b": 1, "c": 1, "d": 1}.items()}
    row = {"a": idf["a"], "b": math.sqrt(2) * idf["b"]}
    length = math.hypot(*row.values())
    assert sorted(vectors[0][vectors[0] > 0].tolist()) == pytest.approx(sorted(v / length for v in row.values()))
    assert (vectors[0] @ vectors[1]).item() == pytest.approx(row["a"] / length * idf["a"] / math.hypot(idf["a"], idf["c"]))


@pytest.mark.skipif(not (SHARED / "data/alignment").exists(), reason="real features are not here")
def test_real_features_and_captions():
    captions = exp.read_captions(SHARED / "data/alignment/wit_rewritten_captions.json")
    original = exp.tfidf(captions[0], captions[0])
    curve = [exp.mutual_knn(original, exp.tfidf(captions[u], captions[0])) for u in range(10, 101, 10)]
    assert curve == pytest.approx([0.0865, 0.0466, 0.0436, 0.0311, 0.0280, 0.0277, 0.0254, 0.0275, 0.0238, 0.0185], abs=2e-4)
    assert exp.spearman(range(10), curve)["rho"] == pytest.approx(-0.988, abs=1e-3)
    assert len(exp.read_captions(SHARED / "data/alignment/flickr8k_rule_based_captions.json")[100]) == 1024
    plain = exp.AlignmentConfig(clamp_quantile=1)
    vision = exp.read_features(SHARED / "data/alignment/vision/mobilenet_v2_1.0_224.pt", plain, "cpu")
    text = exp.read_features(SHARED / "data/alignment/language/minilm_cap5.pt", plain, "cpu")

    def centred(features):  # as the published figures of this set are
        return features.layers[-1] - features.layers[-1].mean(0)
    assert exp.mutual_knn(centred(vision), centred(text)) == pytest.approx(0.171, abs=1e-3)
    for u, value in ((0, 0.133), (40, 0.045), (100, 0.011)):
        replaced = exp.read_features(SHARED / f"data/alignment/rule_u={u}_features/minilm_last.pt", plain, "cpu")
        assert exp.mutual_knn(centred(vision), centred(replaced)) == pytest.approx(value, abs=1e-3)


def test_families_of_models():
    names = {"vit_small_patch14_dinov2": "vit_dinov2", "vit_huge_patch14_clip": "vit_clip", "mobilenet_v1_0.25_128": "mobilenet_v1",
             "vit_tiny_in21k": "vit_in21k"}
    assert {name: exp.family(name) for name in names} == names


# --------------------------------------------------------------------------------------------------------- films, fine-tuning

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return demo_data.write_mmimdb(tmp_path_factory.mktemp("films"), n_films=120)


def film_config(tmp_path, films, *overrides):
    path = tmp_path / "films.yaml"
    path.write_text("")
    return common.load_config(exp.Config, path, [f"mmimdb.dir={films}", "stages=[finetune]", "finetune.class_idx=Drama", "device=cpu",
                                                 f"output_dir={tmp_path}/run", "alignment.n_permutations=19", "alignment.metrics=[mutual_knn]",
                                                 *overrides])


def test_labels_are_tied_by_id_and_by_name(tmp_path, films):
    shuffled = tmp_path / "shuffled"
    shutil.copytree(films, shuffled)
    labels, ids = np.load(f"{films}/labels/labels_all_23.npy"), Path(films, "labels/ids_all.txt").read_text().split()
    columns = np.random.RandomState(0).permutation(23)
    np.save(shuffled / "labels/labels_all_23.npy", labels[:, columns])
    (shuffled / "labels/class_names_23.json").write_text(json.dumps([demo_data.GENRES[c] for c in columns]))
    reference, other = (exp.read_films(film_config(tmp_path, f), "cpu") for f in (films, shuffled))
    for genre in demo_data.GENRES:
        assert torch.equal(reference.labels[:, reference.genres.index(genre)], other.labels[:, other.genres.index(genre)])
    film = reference.ids[5]
    assert reference.labels[5].tolist() == labels[ids.index(film)].tolist()
    rows = np.load(next(Path(films, "latents").glob("*_text.npy")))
    clamped = exp.clamp_outliers(torch.from_numpy(rows[::3].astype(np.float32)), 0.95)
    assert torch.equal(reference.language[0].layers[0][5], clamped[ids.index(film)])
    assert exp.genre_of(19, reference.genres) == exp.genre_of("western", other.genres) == "Western"
    assert exp.genre_of(0, reference.genres) == "Drama"
    with pytest.raises(UserError, match="no such genre"):
        exp.genre_of("Noir", reference.genres)


def test_index_files_choose_films(tmp_path, films):
    root = tmp_path / "indexed"
    shutil.copytree(films, root)
    split = common.read_json(root / "split.json")
    (root / "test").write_text("\n".join(split["test"][3:9]))
    (root / "train.json").write_text(json.dumps([0, 2, 4]))
    found = exp.read_films(film_config(tmp_path, root), "cpu")
    assert [found.ids[i] for i in found.splits["test"].tolist()] == split["test"][3:9]
    assert [found.ids[i] for i in found.splits["train"].tolist()] == [split["train"][i] for i in (0, 2, 4)]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda root: (root / "labels/ids_all.txt").write_text("1\n2\n"), "expected 2 x 23"),
    (lambda root: (root / "labels/labels_all_23.npy").write_bytes(b"junk"), "label files cannot be read"),
    (lambda root: (root / "latents/mm_imdb1_globals_aug3_clip_text.npy").write_bytes(b"junk"), "not a readable .npy"),
    (lambda root: (root / "split.json").write_text(json.dumps({"train": ["nobody"], "dev": ["x"], "test": ["y"]})), "1 films of train are not in"),
    (lambda root: np.save(root / "latents/mm_imdb1_globals_aug3_clip_text.npy", np.zeros((7, 4))), "expected 120 films x views_per_sample"),
    (lambda root: (root / "latents/mm_imdb1_globals_aug3_clip_image.npy").unlink(), "no mm_imdb1_globals_aug*_image.npy"),
    (lambda root: np.save(root / "latents/mm_imdb1_globals_aug3_clip_text.npy", np.full((360, 4), np.nan)), "NaN"),
    (lambda root: np.save(root / "labels/labels_all_23.npy", np.full((120, 23), 2)), "of 0 and 1"),
    (lambda root: (root / "split.json").write_text(json.dumps({"train": 5})), "no films of train"),
    (lambda root: (root / "test.json").write_text("[1, 2"), "test.json: expected ids of films"),
    (lambda root: (root / "test").write_bytes(b"\x80\xff"), "test: expected ids of films"),
    (lambda root: (root / "test.txt").write_text("0 1 tt99"), "'tt99' is neither"),
    (lambda root: (root / "dev.txt").write_text(""), "it is empty"),
    (lambda root: (root / "test.txt").write_text(" ".join(map(str, range(10)))), "10 test films are too few")])
def test_bad_films_are_one_line(tmp_path, films, capsys, damage, message):
    root = tmp_path / "damaged"
    shutil.copytree(films, root)
    damage(root)
    (tmp_path / "x.yaml").write_text("")
    assert exp.main([str(tmp_path / "x.yaml"), "stages=[mmimdb]", f"mmimdb.dir={root}", "device=cpu", f"output_dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_every_weight_gets_the_same_steps_rates_and_start(tmp_path, films):
    cfg = film_config(tmp_path, films, "finetune.weights=[0, 2]", "finetune.n_seeds=2", "finetune.epochs=4", "finetune.warmup_epochs=2")
    history = exp.train(cfg)
    jobs = {}
    for row in history:
        jobs.setdefault(row["job"], []).append((row["epoch"], row["learning_rate"]))
    assert len(jobs) == 4
    assert len({tuple(rows) for rows in jobs.values()}) == 1
    rates = [rate for _, rate in next(iter(jobs.values()))]
    assert rates[1] == pytest.approx(1e-4)
    assert rates[3] == pytest.approx(1e-6)
    data = exp.load_data(cfg)
    starts = []
    for job in data.jobs[::2]:  # both weights, seed 0
        common.seed_everything(job["seed"])
        starts.append(exp.build_model(cfg, exp.select(data, job)).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in starts), strict=True))


def test_contrastive_weight_zero_trains_no_image_tower_and_scale_is_clamped(tmp_path, films):
    cfg = film_config(tmp_path, films, "finetune.weights=[0]")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    model.losses(exp.make_batch(data, data.splits["train"][:8]))["loss"].backward()
    assert all(p.grad.abs().sum() == 0 for p in model.image.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.text.parameters())
    model.log_scale.data.fill_(10)
    image, text, _ = model(batch := exp.make_batch(data, data.splits["train"][:8]))
    expected = common.info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor(100.0))
    assert model.losses(batch)["contrast"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_genre_that_dev_lacks_is_refused(tmp_path, films):
    root = tmp_path / "lacking"
    shutil.copytree(films, root)
    labels, ids = np.load(root / "labels/labels_all_23.npy"), (root / "labels/ids_all.txt").read_text().split()
    labels[[ids.index(film) for film in common.read_json(root / "split.json")["dev"]], demo_data.GENRES.index("War")] = 0
    np.save(root / "labels/labels_all_23.npy", labels)
    with pytest.raises(UserError, match="War has none or all of the 12 films of dev"):
        exp.load_data(film_config(tmp_path, root, "finetune.class_idx=War"))


def test_a_ladder_or_a_warm_up_longer_than_the_data_is_refused(tmp_path, films):
    with pytest.raises(UserError, match=r"warmup_epochs=30 must be less than finetune\.epochs=30"):
        exp.load_data(film_config(tmp_path, films, "finetune.warmup_epochs=30"))
    root = tmp_path / "short"
    shutil.copytree(films, root)
    (root / "train.json").write_text(json.dumps(list(range(20))))
    with pytest.raises(UserError, match="clip_text has 48 features of 20 items"):
        exp.load_data(film_config(tmp_path, root, "stages=[mmimdb]", "alignment.ladder=[pca:30]"))
    with pytest.raises(UserError, match="a second model of the name pca4"):
        exp.load_data(film_config(tmp_path, films, "stages=[mmimdb]", "alignment.ladder=[pca:4, pca:4]"))


def test_threshold_that_maximises_f1():
    logits, targets = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    t = exp.best_threshold(logits, targets)
    assert exp.genre_f1((logits > t)[:, None], targets[:, None]).item() == pytest.approx(2 * 3 / (4 + 3))


# ------------------------------------------------------------------------------------------------------------------ whole runs

def toy_yaml(tmp_path, films):
    path = tmp_path / "toy.yaml"
    path.write_text(f"""stages: [synthetic, mmimdb, finetune]
mmimdb: {{dir: {films}, epochs: 4, learning_rates: [1e-3], weight_decays: [0, 0.1]}}
alignment: {{n_permutations: 19, k: 5, ladder: ["pca:4", "tfidf:64"]}}
finetune: {{class_idx: Drama, weights: [0, 1], n_seeds: 1, epochs: 4, warmup_epochs: 1, embed_dim: 16}}
synthetic: {{uniqueness: [0, 8], transform_depths: [1], x2_depths: [1, 2], n_samples: 4000, epochs: 3, n_test: 100, k: 10}}
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
    one, other = (common.load_checkpoint(f / "best_model.pt")["model_state_dict"] for f in (folder, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_leaves_the_documented_files(whole):
    folder = whole[1]
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt", "results.json", "finetune.png",
                     "mmimdb_correlations.png", "alignment_vs_uniqueness_mutual_knn.png", "alignment_vs_performance_unbiased_cka.png"}
    results = common.read_json(folder / "results.json")
    assert results["synthetic"] is True
    assert results["data_fingerprint"] == common.read_json(folder / "environment.json")["data_fingerprint"]
    state = common.load_checkpoint(folder / "checkpoint_latest.pt")
    assert state.keys() >= {"epoch", "global_step", "best_val_loss", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
                            "scaler_state_dict", "history", "config", "rng", "position"}
    rows = results["stages"]["synthetic"]["rows"]
    assert {(r["U"], r["x2_depth"]) for r in rows} == {(0, 1), (0, 2), (8, 1), (8, 2)}
    assert [m["model"] for m in results["stages"]["mmimdb"]["models"]] == ["clip_text", "pca4", "tfidf64"]
    for model in results["stages"]["mmimdb"]["models"]:
        assert model["f1_macro"] == pytest.approx(np.mean(list(model["f1"].values())))
    assert all(c["n"] >= 2 and "p" in c for stage in ("synthetic", "finetune") for c in results["stages"][stage]["correlations"])


@pytest.mark.parametrize("step", [3, 40, 50, 63])
def test_interrupted_at_any_step_and_rerun_equals_uninterrupted(whole, tmp_path, monkeypatch, step):
    """As after a kill: nothing is saved at the interruption itself, only the last checkpoint before it is there."""
    real, taken = exp.train_step, itertools.count()

    class Killed(BaseException):
        pass

    def killed(*args):
        if next(taken) == step:
            raise Killed
        return real(*args)
    monkeypatch.setattr(exp, "SAVE_SECONDS", 0)
    monkeypatch.setattr(exp, "train_step", killed)
    with pytest.raises(Killed):
        exp.main([str(whole[0]), f"output_dir={tmp_path / 'run'}"])
    monkeypatch.setattr(exp, "train_step", real)
    assert exp.main([str(whole[0]), f"output_dir={tmp_path / 'run'}"]) == 0
    assert_same_run(tmp_path / "run", whole[1])


def test_a_job_left_for_another_stage_is_logged_once(whole, tmp_path, monkeypatch):
    real, taken = exp.train_step, itertools.count()

    def interrupted(*args):
        if next(taken) == 2:  # in the third epoch of the first job
            raise KeyboardInterrupt
        return real(*args)
    command = [str(whole[0]), f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(exp, "SAVE_SECONDS", 0)
    monkeypatch.setattr(exp, "train_step", interrupted)
    assert exp.main([*command, "--stage", "finetune"]) == 130
    monkeypatch.setattr(exp, "train_step", real)
    assert exp.main([*command, "--stage", "mmimdb"]) == 0
    assert exp.main(command) == 0
    assert sorted((tmp_path / "run/metrics.csv").read_text().splitlines()) == sorted((whole[1] / "metrics.csv").read_text().splitlines())
    assert common.read_json(tmp_path / "run/results.json") == common.read_json(whole[1] / "results.json")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_and_rerun_equals_uninterrupted(whole, tmp_path, sent, code):
    command = [sys.executable, "-c", "import sys, exp_alignment_corr as e; e.SAVE_SECONDS = 0; sys.exit(e.main(sys.argv[1:]))", str(whole[0]),
               f"output_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run/metrics.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 6):
        time.sleep(0.002)
    process.send_signal(sent)
    assert process.wait() == code
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).returncode == 0
    assert_same_run(tmp_path / "run", whole[1])


def test_a_finished_run_only_reports_and_another_config_is_refused(whole, capsys, monkeypatch):
    path, folder = whole
    monkeypatch.setattr(exp, "load_data", None)
    before = (folder / "results.json").stat().st_mtime_ns
    assert exp.main([str(path), f"output_dir={folder}"]) == 0
    assert "finetune: genre Drama" in capsys.readouterr().out
    assert (folder / "results.json").stat().st_mtime_ns == before
    assert exp.main([str(path), f"output_dir={folder}", "finetune.epochs=5"]) == 2
    assert "finetune.epochs=5 (was 4)" in capsys.readouterr().err


def test_non_finite_loss_names_job_and_rate(tmp_path, films, capsys):
    (tmp_path / "x.yaml").write_text("")
    code = exp.main([str(tmp_path / "x.yaml"), "stages=[finetune]", f"mmimdb.dir={films}", "finetune.learning_rate=1e30", "finetune.warmup_epochs=0",
                     "device=cpu", f"output_dir={tmp_path}/run"])
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
