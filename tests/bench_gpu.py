"""How near a GPU comes to its own speed: steps, an epoch, losses, retrieval and alignment beside plain formulations.

    python tests/bench_gpu.py            # under four minutes; prints five tables, writes results/bench_gpu.json
    python tests/bench_gpu.py --small    # tiny sizes, also on a CPU: does it run?

Times are medians in ms, the variants in turn. A step "as written" launches its kernels one by one, "replayed" as a CUDA
graph; so is a loss "recorded". Busy is the time of the kernels alone, which is what counts in a graph. On a CPU
nothing is recorded: all is as written. The times are taken first, the tables printed at the end.
Plain losses and products may use TF32, as a training script's do.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench_alignment
import bench_losses

import common
import exp_alignment_corr as alignment
import exp_coco_heads as coco
import exp_flickr_ttt as flickr
import profile_flops

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIGS = ("siglip", "attention", "cross_modal", "gw_clip_shared", "pixmo_scratch", "pixmo_features",
           "flickr8k_features", "flickr8k", "flickr8k_tiny")
STEP_INSIDE = {"gw_mmimdb": False}  # its betas move
DEMO = {"flickr8k_features": ["data.dir=data/demo/flickr8k", "data.cache_dir=data/demo/cache",
                              "data.features_dir=data/demo/flickr8k_features"]}  # shapes of stand-ins are all small


def milliseconds(functions, repeats):
    """Median time of each of some functions, which take turns; the first six of each warm up, record."""
    times = {name: [] for name in functions}
    for repeat in range(-5, repeats + 1):
        for name, function in functions.items():
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def extra_mebibytes(function):
    """Peak of the allocator during a call, beyond what was there; None on a CPU (see bench_losses.py)."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(function):
    """(ms of all kernels that a call runs, their number); (None, None) on a CPU. After it every launch of the process
    takes longer, the profiler still looking on: tables take it last, when all times have been taken."""
    if DEVICE.type == "cpu":
        return None, None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA
              and not e.is_user_annotation]
    return sum(e.device_time for e in events) / 1000, len(events)


def recorded(function):
    """A call as a CUDA graph, as it runs in a recorded training step; itself on a CPU."""
    if DEVICE.type == "cpu":
        return function
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def steps(small):
    """A training step of the configs, of their own batch size and shapes."""
    for name in CONFIGS:
        config = ROOT / f"configs/{name}.yaml"
        if name in DEMO:
            flickr.use_demo(common.load_config(flickr.Config, config, demo=True))
        built = profile_flops.build(config, 8 if small else None, overrides=DEMO.get(name, ()))
        model, batch, optimizer, step = built.model, built.batch, built.optimizer, built.module.train_step
        model.train()
        if hasattr(built.module, "set_train_mode"):
            built.module.set_train_mode(built.cfg, model, 1)
        if hasattr(built.module, "draw_passes"):
            batch |= built.module.draw_passes(model)
        step_inside = STEP_INSIDE.get(built.cfg.experiment, True)
        written, replayed = (common.GraphedStep(step, model, optimizer, enabled, step_inside)
                             for enabled in (False, True))
        variants = {"as written": lambda w=written, b=batch: w(b), "replayed": lambda r=replayed, b=batch: r(b)}
        took = milliseconds(variants, 3 if small else 30)
        yield {"": name, "batch": len(next(iter(batch.values()))), **took, "graphs": len(replayed.graphs),
               "busy": variants["as written"]}


def epoch(small):
    """Seconds of an epoch over COCO's size with the siglip config, batches drawn and indexed as in a run; beside a
    plain loop: a loader's batches copied to the device, plain modules, the loss as usually written."""
    cfg = common.load_config(coco.Config, ROOT / "configs/siglip.yaml", ["training.batch_size=512"])
    n_images, n_texts = (200, 1000) if small else (94_000, 468_000)
    images, texts = torch.randn(n_images, 1152, device=DEVICE).half(), torch.empty(n_texts, 4096, dtype=torch.half)
    texts = texts.to(DEVICE).normal_()
    rows, of_text = torch.arange(n_texts, device=DEVICE), torch.arange(n_texts, device=DEVICE) % n_images
    unit = [(torch.zeros(x.shape[1]), torch.ones(x.shape[1])) for x in (images, texts)]
    data = coco.Data(images, texts, of_text, [*map(str, range(n_images))], {"train": rows}, unit, "random", True)
    common.seed_everything(0)
    model = coco.build_model(cfg, data)
    optimizer = coco.build_optimizer(cfg, model)
    take_step = common.GraphedStep(coco.train_step, model, optimizer)

    def ours():
        for batch in coco.epoch_batches(data, cfg, 0):
            losses = take_step(coco.make_batch(data, batch))
        return losses["loss"].item()
    heads = torch.nn.ModuleList([torch.nn.Linear(1152, 512), torch.nn.Linear(4096, 512)]).to(DEVICE)
    plain_optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3)
    scale = torch.tensor(10.0, device=DEVICE)

    def plain(n_batches=100):
        for batch in torch.randperm(n_texts).split(512)[:n_batches]:
            x = images[of_text[batch.to(DEVICE)]].float(), texts[batch.to(DEVICE)].float()
            z = [F.normalize(head(y), dim=1) for head, y in zip(heads, x, strict=True)]
            plain_optimizer.zero_grad()
            bench_losses.plain_sigmoid(*z, scale, None).backward()
            plain_optimizer.step()
    ours()
    took = milliseconds({"ours": ours}, 1)["ours"] / 1000
    n_batches = min(100, -(-n_texts // 512))
    plain_took = milliseconds({"plain": plain}, 1)["plain"] / 1000 * -(-n_texts // 512) / n_batches
    yield {"": f"siglip, {n_texts:,} pairs, B = 512", "epoch, s": took, "plain loop, s": plain_took,
           "ratio": took / plain_took}


def losses(small):
    """Forward and backward at width 512."""
    for n in (64, 128) if small else (4096, 16_384, 32_768, 65_536):
        for name, (plain, ours) in bench_losses.PAIRS.items():
            args = bench_losses.inputs(n, DEVICE)
            functions = {"ours": lambda f=ours, a=args: f(*a).backward(),
                         "plain": lambda f=plain, a=args: f(*a).backward()}
            if n == 65_536:  # out of the plain one's reach
                del functions["plain"]
            graphs = {f"{key}, recorded": recorded(f) for key, f in functions.items()} if n <= 4096 else {}
            took = milliseconds({**functions, **graphs}, 10 if n < 65_536 else 2)
            of_plain = took.get("plain", float("nan"))
            memory = {f"{key}, MiB": extra_mebibytes(function) for key, function in functions.items()}
            yield {"": f"{name}, N = {n:,}", **took, "ratio": took["ours"] / of_plain, **memory,
                   **{f"{key}, busy": function for key, function in functions.items()}}


def retrieval(small):
    """COCO's test set both ways: ranks in blocks beside a whole argsort."""
    n_images, n_texts = (100, 500) if small else (5000, 25_000)
    images, texts = (F.normalize(torch.randn(n, 512, device=DEVICE), dim=1) for n in (n_images, n_texts))
    own = torch.arange(n_texts, device=DEVICE) % n_images

    def plain():
        similarity = images @ texts.T
        order = similarity.argsort(1, descending=True)
        (own[order] == torch.arange(n_images, device=DEVICE)[:, None]).int().argmax(1)
        (similarity.T.argsort(1, descending=True) == own[:, None]).int().argmax(1)
    functions = {"ours": lambda: coco.retrieval(images, texts, own, map_ks=()), "plain": plain}
    took = milliseconds(functions, 5)
    yield {"": f"{n_images:,} x {n_texts:,}", **took, "ratio": took["ours"] / took["plain"],
           **{f"{key}, MiB": extra_mebibytes(function) for key, function in functions.items()},
           **{f"{key}, busy": function for key, function in functions.items()}}


def stacks(small):
    """Alignment of 13 x 768 against 25 x 1,024 features: all pairs of layers, and the null of their maximum."""
    a, b = (x.to(DEVICE) for x in bench_alignment.stacks(64 if small else 1024))
    a, b = (a[:, :2], b[:, :2]) if small else (a, b)
    n_pairs, repeats = a.shape[1] * b.shape[1], 1 if small else 5
    for metric in ("mutual_knn", "cka"):
        def plain(metric=metric):  # of five pairs
            for i, j in bench_alignment.PAIRS[:1] if small else bench_alignment.PAIRS:
                x, y = F.normalize(a[:, i], dim=1), F.normalize(b[:, j], dim=1)
                bench_alignment.PLAIN[metric](x, y)
        functions = {"ours": lambda m=metric: alignment.alignment_matrix(a, b, m), "plain": plain}
        took = milliseconds(functions, repeats)
        took["plain"] *= n_pairs / (1 if small else len(bench_alignment.PAIRS))
        yield {"": f"{metric}, {n_pairs} pairs", **took, "ratio": took["ours"] / took["plain"]}
    n_draws = 20 if small else 200
    null = {"ours": lambda: alignment.permutation_null(a, b, "mutual_knn", n_permutations=n_draws)}
    yield {"": f"mutual_knn with its null, K = {n_draws}", **milliseconds(null, 1)}


TABLES = {"a training step, ms": steps, "an epoch": epoch, "losses, ms": losses, "retrieval, ms": retrieval,
          "alignment, ms": stacks}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", default="results/bench_gpu.json")
    args = parser.parse_args()
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "a CPU"
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    torch.set_float32_matmul_precision("high")
    tables, start = {}, time.time()
    for title, table in TABLES.items():
        tables[title] = [*table(args.small)]
    for title, rows in tables.items():
        for row in rows:
            for key in [key for key, value in row.items() if callable(value)]:
                row[key], row[key.replace("busy", "kernels")] = kernels(row[key])
        columns = [*dict.fromkeys(key for row in rows for key in row if key)]
        print(f"\n{common.format_table([title, *columns], [[row[''], *map(row.get, columns)] for row in rows])}",
              flush=True)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "seconds": time.time() - start}
    out.write_text(json.dumps({**facts, "tables": tables}, indent=2))
    print(f"\n{time.time() - start:.0f} s; {out}")


if __name__ == "__main__":
    main()
