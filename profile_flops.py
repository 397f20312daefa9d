"""Measured FLOPs of one training step of any experiment, side by side.

    python profile_flops.py configs/gw_blip2_shared.yaml configs/gw_blip2_random.yaml
    python profile_flops.py configs/gw_small.yaml data.dir=mmimdb model.selector=constant    # overrides, of all YAMLs
    python profile_flops.py configs/*.yaml --batch-size 64          # another batch size than the configs' own

Builds the experiment of each YAML, exp_<its `experiment:` key>.py, a copy of yours included, and runs real training
steps: forward, backward, optimizer. Without its data it takes stand-ins of the real shapes and says so. A run of
several phases (`selector_after_freeze`) is measured in each; its figures of a step are their mean. The figures are
printed, and saved to results/flops/ (JSON, bar plot).

1 multiply-add = 2 FLOPs. torch.profiler counts matrix products (mm, addmm, bmm, baddbmm), conv2d, and elementwise add
and mul; FlopCounterMode counts matrix products, convolutions with their backward, and attention (by its plain
formulation: the fused kernels would count as nothing on a CPU). Neither counts softmax, GELU, normalisation or the
optimizer. Recomputation of checkpointed blocks counts as backward, the gradient that a contrastive loss forms with its
value as forward.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import argparse
import contextlib
import ctypes
import importlib
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import common
from common import UserError


def build(config_path, batch_size=None, device="auto", overrides=()):
    """A YAML's cfg, module, model, batch, optimizer, steps of a run (None: unknown), why stand-ins ("": real data).

    None if it has no training step. Raises: UserError.
    """
    name = str(common.read_yaml(config_path).get("experiment"))
    scripts = sorted(p.stem.removeprefix("exp_") for p in Path(__file__).parent.glob("exp_*.py"))
    if name not in scripts:
        raise UserError(f"{config_path}: experiment: {name} is none of the scripts here; it must name one of "
                        f"{', '.join(scripts)}")
    module = importlib.import_module(f"exp_{name}")
    settings = [*overrides, f"device={device}"]
    cfg = common.load_config(module.Config, config_path, settings)
    if hasattr(module, "TRAINED") and not set(cfg.stages) & set(module.TRAINED):
        return None
    common.seed_everything(cfg.seed)
    why = ""
    try:
        data = module.load_data(cfg)
    except UserError as error:  # no data here: the shapes are what counts
        why = str(error)
        if hasattr(module, "random_data"):
            data = module.random_data(cfg)
        else:
            demo = common.load_config(module.Config, config_path, settings, demo=True)
            module.use_demo(demo)
            data = module.load_data(demo)
    sections = (getattr(cfg, key, None) for key in ("training", "dataset", getattr(data, "stage", "")))
    n = batch_size or next(section.batch_size for section in sections if hasattr(section, "batch_size"))
    rows = data.splits["train"]
    rows = rows.repeat(-(-n // len(rows)))[:n]
    model = module.build_model(cfg, data)
    is_counted = not why or hasattr(getattr(cfg, "training", None), "steps")
    return SimpleNamespace(cfg=cfg, module=module, model=model, batch=module.make_batch(data, rows),
                           optimizer=module.build_optimizer(cfg, model), why=why,
                           steps=module.total_steps(cfg, data) if is_counted else None)


def count_flops(step):
    """({operator: FLOPs}, forward, backward FLOPs) of a `step`; what runs inside Tensor.backward is backward."""
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
    counts = counter.get_flop_counts().get("Global", {})
    operators = {str(op).removeprefix("aten."): int(flops) for op, flops in counts.items()}
    return operators, counter.get_total_flops() - sum(backward), sum(backward)


def peak_memory(step, device):
    """Bytes that one call of `step` needs beyond what was there: of the allocator on CUDA, else, where Linux tells it,
    of the resident set."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None

    def kilobytes(key):
        return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(AttributeError):  # glibc: give freed memory back, or reusing it would not show
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    before = kilobytes("VmRSS")
    step()
    return 1024 * max(0, kilobytes("VmHWM") - before)


def measure(built, step_number, repeats):
    """Figures of training step number step_number, as `profile` returns them."""
    model, device, module = built.model, next(built.model.parameters()).device, built.module
    model.train()
    if hasattr(module, "set_train_mode"):
        module.set_train_mode(built.cfg, model, step_number)

    def step():
        module.train_step(model, built.batch, built.optimizer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    step()  # allocates the optimizer's state
    by_counter, forward, backward = count_flops(step)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and stop on stderr
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *on_gpu], with_flops=True) as profiler:
        step()
    events = profiler.key_averages()
    seconds = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    by_profiler = {e.key: int(e.flops) for e in events if e.flops}
    shares = {key: t / sum(seconds.values()) for key, t in sorted(seconds.items(), key=lambda item: -item[1])}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"flops_profiler": sum(by_profiler.values()), "flops_counter": forward + backward,
            "flops_forward": forward, "flops_backward": backward, "step_ms": 1000 * float(np.median(times)),
            "peak_bytes": peak_memory(step, device),
            "operators": {"profiler": by_profiler, "counter": by_counter},
            "uncounted": {key: share for key, share in shares.items() if key not in by_profiler and share >= 0.001},
            "trained": [name for name, p in model.named_parameters() if p.requires_grad]}


def profile(config_path, batch_size=None, device="auto", repeats=5, overrides=()):
    """FLOPs, memory and time of one training step of a config; None if it has no training step. Raises: UserError.

    overrides: 'section.key=value' strings.
    Returns a dict; of a step `flops_profiler`, `flops_counter`, `flops_forward`, `flops_backward`, `step_ms` (median),
    `flop_per_s`, `peak_bytes`, `operators` ({name: FLOPs} by either counter), `uncounted` ({operator: share of the
    time}); `flops_per_sample`, `flops_run` (x steps; None: unknown), `batch_size`, `steps`, `parameters` (trained);
    `phases` (the same of each, if there are several: a step's figures are their mean); `random_data`, `why_random`,
    `device`, `name` (of the run's folder).
    """
    built = build(config_path, batch_size, device, overrides)
    if built is None:
        return None
    starts = built.module.phases(built.cfg) if hasattr(built.module, "phases") else [1]
    phases = [measure(built, start, repeats) for start in starts]
    trained = {name for phase in phases for name in phase.pop("trained")}
    mean = {key: sum(phase[key] for phase in phases) / len(phases) for key in phases[0]
            if key.startswith("flops_") or key == "step_ms"}
    mean |= {key: int(x) for key, x in mean.items() if x.is_integer() and key != "step_ms"}
    size, total = len(next(iter(built.batch.values()))), mean["flops_counter"]
    return {"config": str(config_path), "name": Path(built.cfg.output_dir).name, **phases[0], **mean,
            "peak_bytes": max(phase["peak_bytes"] or 0 for phase in phases) or None,
            "flops_per_sample": total / size, "flops_run": total * built.steps if built.steps else None,
            "batch_size": size, "steps": built.steps,
            "parameters": sum(p.numel() for name, p in built.model.named_parameters() if name in trained),
            "flop_per_s": 1000 * total / mean["step_ms"], "phases": phases if len(phases) > 1 else [],
            "random_data": bool(built.why), "why_random": built.why,
            "device": str(next(built.model.parameters()).device)}


def scaled(value, unit="FLOP"):
    """1.5e9 -> '1.500 GFLOP'."""
    from matplotlib.ticker import EngFormatter
    return "-" if value is None else EngFormatter(unit, places=3)(value)


CONVENTION = "1 multiply-add = 2 FLOPs"
ROWS = (("FLOPs a step, torch.profiler", "flops_profiler", scaled),
        ("FLOPs a step, FlopCounterMode", "flops_counter", scaled),
        ("  forward", "flops_forward", scaled), ("  backward", "flops_backward", scaled),
        ("FLOPs a sample", "flops_per_sample", scaled), ("FLOPs a run", "flops_run", scaled),
        ("batch size", "batch_size", str), ("steps a run", "steps", lambda v: "-" if v is None else f"{v:,}"),
        ("parameters", "parameters", "{:,}".format), ("step, median", "step_ms", "{:.1f} ms".format),
        ("achieved", "flop_per_s", lambda v: scaled(v, "FLOP/s")),
        ("peak memory of a step", "peak_bytes", lambda v: scaled(v, "B")))


def report(results):
    """The side-by-side table, ratios to the first config, operators and what was not counted."""
    first, table = results[0], []
    for label, key, show in ROWS:
        cells = [show(r[key]) for r in results]
        for i, r in enumerate(results[1:], 1):
            if r[key] and first[key] and key != "batch_size":
                cells[i] += f" ({r[key] / first[key]:.3f}x)"
        table.append([label, *cells])
    lines = [common.format_table(["", *(r["name"] for r in results)], table)]
    for r in results:
        stand_in = f", stand-in data of the real shapes ({r['why_random']})" if r["random_data"] else ""
        lines.append(f"\n{r['name']}: on {r['device']}{stand_in}")
        for i, phase in enumerate(r["phases"], 1):
            parts = [f"{scaled(phase[f'flops_{part}'])} {part}" for part in ("forward", "backward")]
            lines.append(f"  phase {i}: {scaled(phase['flops_counter'])} a step ({', '.join(parts)}), "
                         f"{phase['step_ms']:.1f} ms")
        for name, operators in r["operators"].items():
            largest = sorted(operators.items(), key=lambda item: -item[1])
            lines.append(f"  by {name}: " + ", ".join(f"{op} {scaled(flops)}" for op, flops in largest))
        shares = [f"{op} {100 * share:.1f}%" for op, share in list(r["uncounted"].items())[:10]]
        lines.append(f"  not counted by the profiler, {100 * sum(r['uncounted'].values()):.1f}% of the time: "
                     f"{', '.join(shares)}")
    return "\n".join([*lines, f"\n{CONVENTION}"])


def plot(results, path):
    """Bars: forward and backward FLOPs of a step."""
    figure, (axis,) = common.new_figure(width=2.2 + 1.1 * len(results), height=4)
    places, bottom = range(len(results)), np.zeros(len(results))
    for part in ("forward", "backward"):
        gigaflops = np.array([r[f"flops_{part}"] for r in results]) / 1e9
        axis.bar(places, gigaflops, 0.6, bottom=bottom, label=part)
        bottom += gigaflops
    axis.set(ylabel="GFLOP a step (FlopCounterMode)")
    axis.set_xticks(places, [r["name"][:40] for r in results], rotation=30, ha="right", fontsize=8)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    common.save_figure(figure, path)


@common.exit_codes
def main(argv):
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="YAML | key=value", help="YAML files; overrides of all of them")
    parser.add_argument("--batch-size", type=int, help="instead of each config's own")
    parser.add_argument("--device", default="auto", help="auto | cuda | mps | cpu")
    parser.add_argument("--out", default="results/flops", help="folder of the JSON and PNG")
    args = parser.parse_intermixed_args(argv)
    overrides = [word for word in args.configs if re.match(r"[\w.]+=", word)]
    configs = [word for word in args.configs if word not in overrides]
    if not configs:
        raise UserError("which config? Name at least one YAML file, e.g. one of configs/")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: must be at least 1, found {args.batch_size}")
    results = []
    for path in configs:
        try:
            result = profile(path, args.batch_size, args.device, overrides=overrides)
            why = "has no training step"
        except UserError as error:  # e.g. a pretrained encoder that is not here: the other configs are still wanted
            if len(configs) == 1:
                raise
            result, why = None, error
        if result:
            results.append(result)
        else:
            print(f"{path}: {why}; passed over")
    if not results:
        return
    print(report(results))
    folder, batch = Path(args.out), f",batch={args.batch_size}" if args.batch_size else ""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:  # report.md of a run quotes the file of its name
        common.write_json(folder / f"{result['name']}{batch}.json", {"convention": CONVENTION, "results": [result]})
    names = "+".join(r["name"] for r in results)
    plot(results, folder / f"{names if len(names) < 100 else f'{len(results)}_configs'}{batch}.png")
    print(f"files: {folder}/*.json, .png")


if __name__ == "__main__":
    sys.exit(main())
