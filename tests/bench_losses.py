"""Time and peak memory of the block losses beside plain formulations, forward + backward, dim 512. Run by hand:

    python tests/bench_losses.py [N ...]        # default 4096 8192; one CPU thread, or the GPU if there is one

The variants take turns within each repeat, so that a noisy machine disturbs them alike; the ratio of medians is what to
quote. Extra memory is the peak during one forward + backward beyond what was there before: of the resident set on the
CPU, of the allocator on CUDA.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

SCALE, BIAS, DIM = 10.0, -10.0, 512


def plain_clip(a, b, scale, ids):
    """Both logit matrices, as the usual implementation has them."""
    targets = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(scale * a @ b.T, targets) + F.cross_entropy(scale * b @ a.T, targets)) / 2


def plain_clip_masked(a, b, scale, ids):
    logits = scale * a @ b.T
    same = (ids[:, None] == ids) & ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    logits = logits.masked_fill(same, -torch.inf)
    targets = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def plain_sigmoid(a, b, scale, ids):
    labels = 2 * torch.eye(len(a), device=a.device) - 1
    return -F.logsigmoid(labels * (scale * a @ b.T + BIAS)).sum() / len(a)


PAIRS = {
    "clip": (plain_clip, lambda a, b, s, ids: common.info_nce(a, b, s)),
    "clip, same-image masked": (plain_clip_masked, lambda a, b, s, ids: common.info_nce(a, b, s, ids, "mask")),
    "siglip": (plain_sigmoid, lambda a, b, s, ids: common.sigmoid_loss(a, b, s, BIAS)),
}


def inputs(n, device):
    g = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(n, DIM, generator=g), dim=1).to(device).requires_grad_() for _ in range(2))
    return a, b, torch.tensor(SCALE, device=device, requires_grad=True), (torch.arange(n) // 5).to(device)


def seconds(loss, args):
    start = time.perf_counter()
    loss(*args).backward()
    if args[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(field):
    """A resident-set figure of this process in MB: VmRSS now, VmHWM the peak since it was last reset (Linux)."""
    return next(int(line.split()[1])
                for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)) / 1024


def extra_megabytes(loss, args):
    """Peak during one forward + backward beyond what was there before."""
    if args[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(loss, args)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds(loss, inputs(64, "cpu"))  # the libraries' own start-up memory
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    seconds(loss, args)
    return resident("VmHWM") - before


def extra_megabytes_afresh(name, which, n):
    """The same in a new process, whose allocator holds nothing back from earlier calls."""
    code = (f"import bench_losses as b, torch; torch.set_num_threads(1); "
            f"print(b.extra_megabytes(b.PAIRS[{name!r}][{which}], b.inputs({n}, 'cpu')))")
    return float(subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True).stdout)


def main():
    sizes = [int(n) for n in sys.argv[1:]] or [4096, 8192]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    rows = []
    for n in sizes:
        for name, variants in PAIRS.items():
            args, times = inputs(n, device), ([], [])
            for repeat in range(4 if n <= 8192 else 2):
                for which, loss in enumerate(variants):
                    t = seconds(loss, args)
                    if repeat:  # the first warms up
                        times[which].append(t)
            plain, block = map(statistics.median, times)
            memory = [extra_megabytes(loss, args) if args[0].is_cuda else extra_megabytes_afresh(name, i, n)
                      for i, loss in enumerate(variants)]
            difference = (variants[0](*args) - variants[1](*args)).abs().item()
            rows.append([f"{name} {n}", f"{plain:.3f}", f"{block:.3f}", f"{block / plain:.2f}",
                         *(f"{m:.0f}" for m in memory), f"{memory[1] / memory[0]:.2f}", f"{difference:.1e}"])
            print(common.format_table(["", "plain s", "block s", "ratio", "plain MB", "block MB", "ratio",
                                       "|difference|"], rows[-1:]), flush=True)
    print()
    print(common.format_table(
        ["", "plain s", "block s", "ratio", "plain MB", "block MB", "ratio", "|difference|"], rows))


if __name__ == "__main__":
    main()
