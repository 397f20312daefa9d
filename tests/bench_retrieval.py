"""Time and peak memory of the block ranks beside a full argsort, dim 512, every query with one own row. Run by hand:

    python tests/bench_retrieval.py [N ...]     # N queries against N gallery rows; default 5000 10000; one CPU thread

Both compute R@1/5/10, median and mean rank of the same random embeddings; the ratio is what to quote. Memory as in
bench_losses.py.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_losses import resident

import common


def inputs(n):
    g = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(n, 512, generator=g), dim=1)
    return a, F.normalize(a + 0.08 * torch.randn(n, 512, generator=g), dim=1), torch.arange(n)


def argsort_ranks(a, b, ids):
    order = (a @ b.T).argsort(dim=1, descending=True)
    ranks = (order == ids[:, None]).int().argmax(1) + 1
    return {**{f"R@{k}": (ranks <= k).float().mean().item() for k in (1, 5, 10)},
            "median_rank": ranks.float().quantile(0.5).item()}


def block_ranks(a, b, ids):
    return common.retrieval_metrics(a, b, ids, ids)


def measure(which, n):
    torch.set_num_threads(1)
    function, args = (argsort_ranks, block_ranks)[which], inputs(n)
    function(*inputs(64))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    metrics = function(*args)
    return time.perf_counter() - start, resident("VmHWM") - before, metrics["R@1"], metrics["median_rank"]


def main():
    rows = []
    for n in [int(n) for n in sys.argv[1:]] or [5000, 10000]:
        results = []
        for which in (0, 1):  # each in a fresh process: the allocator holds nothing back from the other
            code = f"import bench_retrieval as b; print(*b.measure({which}, {n}))"
            out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True,
                                 text=True, check=True).stdout
            results.append([float(x) for x in out.split()])
        (plain_s, plain_mb, *plain), (block_s, block_mb, *block) = results
        assert max(abs(x - y) for x, y in zip(plain, block, strict=True)) < 1e-3 * n, (plain, block)
        rows.append([str(n), f"{plain_s:.2f}", f"{block_s:.2f}", f"{plain_s / block_s:.1f}x",
                     f"{plain_mb:.0f}", f"{block_mb:.0f}", f"{plain[0]:.4f}", f"{block[0]:.4f}"])
    print(common.format_table(
        ["N", "argsort s", "block s", "faster", "argsort MB", "block MB", "argsort R@1", "block R@1"], rows))


if __name__ == "__main__":
    main()
