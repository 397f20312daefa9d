"""Alignment metrics over whole layer stacks beside the plain per-pair formulation, one table. Run by hand:

    python tests/bench_alignment.py [N]        # default 1024; 13 x 768 against 25 x 1024 features, one CPU thread
    python tests/bench_alignment.py coverage   # how often a 95% interval holds the expected score: 1,000 draws a row,
                                               # about half an hour

The plain side computes each layer pair on its own from features, as published implementations do: its time is that of a
few pairs times the number of pairs. Both run in turn in one process; the ratio is what to quote. Then matrix and null
of mutual_knn on one and two threads, and the memory that the null of unbiased_cka takes for K = 20 and 200.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import exp_alignment_corr as alignment

K, PAIRS = 10, [(0, 0), (6, 12), (12, 24), (3, 20), (9, 5)]


def plain_neighbours(x, k):
    sims = x @ x.T
    sims.fill_diagonal_(-torch.inf)
    return sims.argsort(dim=1, descending=True)[:, :k]


def plain_mutual(a, b):
    n = len(a)
    masks = []
    for x in (a, b):
        mask = torch.zeros(n, n, device=x.device)
        mask[torch.arange(n, device=x.device)[:, None], plain_neighbours(x, K)] = 1
        masks.append(mask)
    return ((masks[0] * masks[1]).sum(1) / K).mean().item()


def plain_cycle(a, b):
    near_a, near_b = plain_neighbours(a, K), plain_neighbours(b, K)
    return (near_a[near_b] == torch.arange(len(a))[:, None, None]).any(2).any(1).double().mean().item()


def plain_lists(a, b, measure):
    total = 0
    for x, y in zip(plain_neighbours(a, K).tolist(), plain_neighbours(b, K).tolist(), strict=True):
        total += measure(x, y)
    return total / len(a)


def lcs(x, y):
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(len(x)):
        for j in range(len(y)):
            table[i + 1][j + 1] = table[i][j] + 1 if x[i] == y[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def levenshtein(x, y):
    row = list(range(len(y) + 1))
    for i in range(len(x)):
        above, row = row, [i + 1]
        for j in range(len(y)):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x[i] != y[j])))
    return row[-1]


def plain_hsic(gram_a, gram_b):
    centre = torch.eye(len(gram_a), device=gram_a.device) - 1 / len(gram_a)
    return torch.trace(gram_a @ centre @ gram_b @ centre)


def plain_hsic_unbiased(gram_a, gram_b):
    n = len(gram_a)
    a, b = gram_a.clone().fill_diagonal_(0), gram_b.clone().fill_diagonal_(0)
    return ((a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)) / (n * (n - 3))


def plain_cka(a, b, hsic=plain_hsic):
    gram_a, gram_b = a @ a.T, b @ b.T
    return (hsic(gram_a, gram_b) / (hsic(gram_a, gram_a) * hsic(gram_b, gram_b)).sqrt()).item()


def plain_cknna(a, b):
    def masked(x, y):
        mask = torch.ones(len(x), len(x))
        for z in (x, y):
            own = torch.zeros_like(mask)
            own[torch.arange(len(x))[:, None], plain_neighbours(z, K)] = 1
            mask *= own
        return plain_hsic_unbiased(mask * (x @ x.T), mask * (y @ y.T))
    return (masked(a, b) / (masked(a, a) * masked(b, b)).sqrt()).item()


def plain_svcca(a, b):
    vectors = [torch.linalg.svd((x - x.mean(0)) / x.std(0), full_matrices=False)[0][:, :10] for x in (a, b)]
    return torch.linalg.svdvals(vectors[0].T @ vectors[1]).mean().item()


PLAIN = {"mutual_knn": plain_mutual, "cycle_knn": plain_cycle, "lcs_knn": lambda a, b: plain_lists(a, b, lcs),
         "edit_distance_knn": lambda a, b: 1 - plain_lists(a, b, levenshtein) / K, "cka": plain_cka,
         "unbiased_cka": lambda a, b: plain_cka(a, b, plain_hsic_unbiased), "cknna": plain_cknna, "svcca": plain_svcca}


def stacks(n):
    """Two stacks that share 20 factors, noisier in the first layers."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 20, generator=g)
    def layer(dim, noise):
        return z @ torch.randn(20, dim, generator=g) + noise * torch.randn(n, dim, generator=g)
    return [torch.stack([layer(dim, 6 - 3 * i / layers) for i in range(layers)], dim=1)
            for layers, dim in ((13, 768), (25, 1024))]


def seconds(function, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def coverage(n_draws=1000):
    """Share of draws whose 95% interval holds the mean score of all draws: items anew each time,
    of two stacks that share 8 factors, or none."""
    print(f"{n_draws} draws\n{'metric':20}{'N':>6}{'layers':>8}{'sharing':>9}{'mean':>8}{'sd':>8}{'coverage':>10}")
    for metric in ("mutual_knn", "unbiased_cka", "cka", "cknna", "svcca", "cycle_knn", "edit_distance_knn"):
        for n, n_layers, noise in ((64, 1, 1), (64, 1, 3), (64, 1, None), (64, 3, 1), (256, 1, 1)):
            g, values, intervals = torch.Generator().manual_seed(0), [], []
            maps = [[torch.randn(8, width, generator=g) for _ in range(n_layers)] for width in (32, 48)]
            for _ in range(n_draws if n == 64 else n_draws // 4):
                z = torch.randn(n, 8, generator=g)
                a, b = ([(0 if noise is None else z @ w) + (noise or 1) * torch.randn(n, w.shape[1], generator=g)
                         for w in side]
                        for side in maps)
                values.append(alignment.alignment_matrix(a, b, metric, K).max().item())
                intervals.append([*alignment.interval("", values[-1], alignment.part_scores(a, b, metric, K)).values()])
            held = np.mean([low <= np.mean(values) <= high for low, high in intervals])
            sharing = {1: "much", 3: "some", None: "none"}[noise]
            print(f"{metric:20}{n:6}{n_layers:8}{sharing:>9}{np.mean(values):8.3f}{np.std(values):8.4f}{held:10.3f}",
                  flush=True)


def peak_megabytes(function):
    """Highest resident set while `function` runs, MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def main():
    if sys.argv[1:] == ["coverage"]:
        torch.set_num_threads(1)
        coverage()
        return
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    torch.set_num_threads(1)
    a, b = stacks(n)
    n_pairs = a.shape[1] * b.shape[1]
    print(f"{n_pairs} layer pairs, N = {n}\n{'metric':20}{'plain s':>9}{'stack s':>9}{'ratio':>7}{'|difference|':>14}")
    for metric, plain in PLAIN.items():
        took, values = 0, []
        for i, j in PAIRS:
            x, y = F.normalize(a[:, i], dim=1), F.normalize(b[:, j], dim=1)
            one, value = seconds(lambda x=x, y=y, plain=plain: plain(x, y), 1)
            took, values = took + one, [*values, value]
        stack, matrix = seconds(lambda metric=metric: alignment.alignment_matrix(a, b, metric, K))
        difference = max(abs(matrix[i, j].item() - value) for (i, j), value in zip(PAIRS, values, strict=True))
        print(f"{metric:20}{took / len(PAIRS) * n_pairs:9.1f}{stack:9.2f}{took / len(PAIRS) * n_pairs / stack:7.0f}"
              f"{difference:14.1e}", flush=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        took, _ = seconds(lambda: alignment.permutation_null(a, b, "mutual_knn", K, 200), 2)
        print(f"mutual_knn with its null of the maximum, K = 200, {threads} thread{'s' * (threads > 1)}: {took:.2f} s",
              flush=True)
    for k in (20, 200):
        peak = peak_megabytes(lambda k=k: alignment.permutation_null(a, b, "unbiased_cka", K, k))
        print(f"unbiased_cka with its null, K = {k}: peak memory of the process {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
