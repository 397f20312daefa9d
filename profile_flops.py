"""Measured FLOPs of one training step of any experiment, side by side.

    python profile_flops.py configs/gw_blip2_shared.yaml configs/gw_blip2_random.yaml
    python profile_flops.py configs/*.yaml --batch-size 64          # another batch size than the configs' own

Builds the experiment of each YAML (told by its `experiment:` key) and runs real training steps: forward, backward, optimizer. Without its data it
takes random tensors of the config's real shapes and says so. Prints and saves to results/flops/ (JSON, bar plot): FLOPs by torch.profiler and by
FlopCounterMode, forward and backward, per sample and per run, parameters, memory, time, and the share of time in operators that were not counted.

Convention: 1 multiply-add = 2 FLOPs. torch.profiler counts matrix products (mm, addmm, bmm, baddbmm), conv2d, and elementwise add and mul;
FlopCounterMode counts matrix products, convolutions with their backward, and attention (run by its plain formulation: the fused kernels would count
as nothing on a CPU). Neither counts softmax, GELU, normalisation or the optimizer. Recomputation of checkpointed blocks counts as backward.
"""

import argparse
import contextlib
import ctypes
import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import common
from common import UserError

EXPERIMENTS = ("coco_heads", "gw_mmimdb", "pixmo_mrl", "flickr_ttt", "alignment_corr")


def build(config_path, batch_size=None, device="auto"):
    """(cfg, model, batch, optimizer, train_step, steps of a run or None, why random data or "") of a YAML; None if it has no training step."""
    name = common.read_yaml(config_path).get("experiment")
    if name not in EXPERIMENTS or not Path(__file__).with_name(f"exp_{name}.py").exists():
        raise UserError(f"{config_path}: experiment: {name} is none of the scripts here; it must name one of {', '.join(EXPERIMENTS)}")
    module = importlib.import_module(f"exp_{name}")
    cfg = common.load_config(module.Config, config_path, [f"device={device}"])
    if hasattr(module, "TRAINED") and not set(cfg.stages) & set(module.TRAINED):
        return None
    common.seed_everything(cfg.seed)
    random = ""
    try:
        data = module.load_data(cfg)
    except UserError as error:  # no data here: the shapes are what counts
        data, random = module.random_data(cfg), str(error)
    known = not random or hasattr(getattr(cfg, "training", None), "steps")
    steps = module.total_steps(cfg, data) if known else None
    sections = (getattr(cfg, key, None) for key in ("training", "dataset", getattr(data, "stage", "")))
    section = next(section for section in sections if hasattr(section, "batch_size"))
    n, rows = batch_size or section.batch_size, data.splits["train"]
    rows = rows.repeat(-(-n // len(rows)))[:n]
    model = module.build_model(cfg, data)
    model.train()
    return cfg, model, module.make_batch(data, rows), module.build_optimizer(cfg, model), module.train_step, steps, random


def count_flops(step):
    """({operator: FLOPs}, forward FLOPs, backward FLOPs) of one call of `step` by FlopCounterMode; what runs inside Tensor.backward is backward."""
    backward, real = [], torch.Tensor.backward

    def counted(tensor, *args, **kwargs):
        before = counter.get_total_flops()
        real(tensor, *args, **kwargs)
        backward.append(counter.get_total_flops() - before)
    torch.Tensor.backward = counted
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
    finally:
        torch.Tensor.backward = real
    operators = {str(op).removeprefix("aten."): int(flops) for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    return operators, counter.get_total_flops() - sum(backward), sum(backward)


def peak_memory(step, device):
    """Bytes one call of `step` needs beyond what was there: of the allocator on CUDA, else of the resident set (None where that is unknown)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def kilobytes(key):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))
    with contextlib.suppress(AttributeError):  # glibc: give freed memory back, or reusing it would not show
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    before = kilobytes("VmRSS")
    step()
    return 1024 * max(0, kilobytes("VmHWM") - before)


def profile(config_path, batch_size=None, device="auto", repeats=5):
    """FLOPs, memory and time of one training step of a config; None if it has no training step.

    Returns: dict with `flops_profiler`, `flops_counter` (of a step), `flops_forward`, `flops_backward`, `flops_per_sample` (by FlopCounterMode),
    `flops_run` (x steps, None if the number of steps is unknown), `batch_size`, `steps`, `parameters` (trained), `step_ms` (median), `flop_per_s`,
    `peak_bytes`, `operators` ({name: FLOPs} by either counter), `uncounted` ({operator: share of the time}), `random_data`, `device`.
    """
    built = build(config_path, batch_size, device)
    if built is None:
        return None
    _, model, batch, optimizer, train_step, steps, random = built
    size = len(next(iter(batch.values())))
    where = next(model.parameters()).device

    def step():
        train_step(model, batch, optimizer)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    step()  # allocates the optimizer's state
    by_counter, forward, backward = count_flops(step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and stop on stderr
    with torch.profiler.profile(activities=activities, with_flops=True) as profiler:
        step()
    events = profiler.key_averages()
    seconds = {e.key: e.self_device_time_total if where.type == "cuda" else e.self_cpu_time_total for e in events}
    by_profiler = {e.key: int(e.flops) for e in events if e.flops}
    whole = sum(seconds.values()) or 1
    uncounted = {key: t / whole for key, t in sorted(seconds.items(), key=lambda item: -item[1]) if key not in by_profiler and t / whole >= 0.001}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    total, median = forward + backward, float(np.median(times))
    return {"config": str(config_path), "flops_profiler": sum(by_profiler.values()), "flops_counter": total, "flops_forward": forward,
            "flops_backward": backward,
            "flops_per_sample": total / size, "flops_run": total * steps if steps else None, "batch_size": size, "steps": steps,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "step_ms": 1000 * median, "flop_per_s": total / median,
            "peak_bytes": peak_memory(step, where), "operators": {"profiler": by_profiler, "counter": by_counter}, "uncounted": uncounted,
            "random_data": bool(random), "why_random": random, "device": str(where)}


def scaled(value, unit="FLOP"):
    """1.5e9 -> '1.500 GFLOP'."""
    if value is None:
        return "-"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


ROWS = (("FLOPs a step, torch.profiler", "flops_profiler", scaled), ("FLOPs a step, FlopCounterMode", "flops_counter", scaled),
        ("  forward", "flops_forward", scaled),
        ("  backward", "flops_backward", scaled), ("FLOPs a sample", "flops_per_sample", scaled), ("FLOPs a run", "flops_run", scaled),
        ("batch size", "batch_size", str), ("steps a run", "steps", lambda v: "-" if v is None else f"{v:,}"),
        ("parameters", "parameters", "{:,}".format),
        ("step, median", "step_ms", "{:.1f} ms".format), ("achieved", "flop_per_s", lambda v: scaled(v, "FLOP/s")),
        ("peak memory of a step", "peak_bytes", lambda v: scaled(v, "B")))


def report(results):
    """The side-by-side table, ratios to the first config, operators and what was not counted."""
    first, lines = results[0], []
    header = ["", *(Path(r["config"]).stem for r in results)]
    table = [[label, *(show(r[key]) + (f" ({r[key] / first[key]:.3f}x)" if i and r[key] and first[key] and key != "batch_size" else "") for i,
                       r in enumerate(results))]
             for label, key, show in ROWS]
    lines.append(common.format_table(header, table))
    for r in results:
        lines.append(f"\n{Path(r['config']).stem}: on {r['device']}"
                     + (f", random data of the real shapes ({r['why_random']})" if r["random_data"] else ""))
        for name, operators in r["operators"].items():
            lines.append(f"  by {name}: " + ", ".join(f"{op} {scaled(flops)}" for op, flops in sorted(operators.items(), key=lambda item: -item[1])))
        lines.append(f"  not counted by the profiler, {100 * sum(r['uncounted'].values()):.1f}% of the time: "
                     + ", ".join(f"{op} {100 * share:.1f}%" for op, share in list(r["uncounted"].items())[:10]))
    return "\n".join([*lines, "\n1 multiply-add = 2 FLOPs"])


def plot(results, path):
    figure, (axis, second) = common.new_figure(2, width=2.2 + 1.1 * len(results), height=4)
    place = np.arange(len(results))
    bottom = np.zeros(len(results))
    for key in ("flops_forward", "flops_backward"):
        values = np.array([r[key] for r in results]) / 1e9
        axis.bar(place, values, 0.6, bottom=bottom, label=key.removeprefix("flops_"))
        bottom += values
    axis.set(ylabel="GFLOP a step (FlopCounterMode)", title="a training step")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)
    second.bar(place, [r["flops_per_sample"] / 1e6 for r in results], 0.6, color="tab:green")
    second.set(ylabel="MFLOP a sample", title="per sample")
    for each in (axis, second):
        each.set_xticks(place, [Path(r["config"]).stem for r in results], rotation=30, ha="right", fontsize=8)
    common.save_figure(figure, path)


@common.exit_codes
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="YAML files in configs/")
    parser.add_argument("--batch-size", type=int, help="instead of each config's own")
    parser.add_argument("--device", default="auto", help="auto | cuda | mps | cpu")
    parser.add_argument("--out", default="results/flops", help="folder of the JSON and PNG")
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: must be at least 1, found {args.batch_size}")
    results = []
    for path in args.configs:
        try:
            found = profile(path, args.batch_size, args.device)
            why = "has no training step"
        except UserError as error:  # e.g. a pretrained encoder that is not here: the other configs are still wanted
            found, why = None, error
            if len(args.configs) == 1:
                raise
        if found is None:
            print(f"{path}: {why}; passed over")
        else:
            results.append(found)
    if not results:
        return
    print(report(results))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "+".join(Path(r["config"]).stem for r in results)
    stem = stem if len(stem) < 100 else f"{len(results)}_configs"
    common.write_json(folder / f"{stem}.json", {"convention": "1 multiply-add = 2 FLOPs", "results": results})
    plot(results, folder / f"{stem}.png")
    print(f"files: {folder / stem}.json, .png")


if __name__ == "__main__":
    sys.exit(main())
