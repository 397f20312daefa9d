"""A training step of the global workspace at CLIP's real sizes, beside a plain one that encodes and decodes for every
term on its own. By hand:

    python tests/bench_gw.py [batch size]        # default 512; one CPU thread, or the GPU if there is one

Both take turns in one process and see the same batch; the ratio of medians of CPU time is what to quote. Last:
gathering a batch from mapped latents.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import demo_data
import exp_gw_mmimdb as gw


def plain_step(model, batch, optimizer):
    """The same 33 terms, set by set."""
    targets = {"image": batch["image_target"], "text": batch["text_target"], "labels": batch["labels"]}

    def loss(d, decoded):
        return (F.binary_cross_entropy_with_logits(decoded, targets[d])
                if d == "labels" else F.mse_loss(decoded, targets[d]))
    terms = {name: [] for name in gw.LOSSES}
    for s in gw.SUBSETS:
        for d in gw.DOMAINS:  # a term at a time: encode, fuse, decode
            state = model.fuse({m: model.encoders[m](batch[m]) for m in s})[0]
            terms["translation" if d not in s else "demi_cycle" if len(s) == 1 else "fused"].append(
                loss(d, model.decoders[d](state)))
        outside = [d for d in gw.DOMAINS if d not in s]
        if outside:
            state = model.fuse({m: model.encoders[m](batch[m]) for m in s})[0]
            again = model.fuse({m: model.encoders[m](model.decoders[m](state)) for m in outside})[0]
            terms["cycle"] += [loss(d, model.decoders[d](again)) for d in s]
    for a, b in itertools.combinations(gw.DOMAINS, 2):
        x, y = (F.normalize(model.encoders[m](batch[m]), dim=1) for m in (a, b))
        own = torch.arange(len(x), device=x.device)
        terms["contrastive"].append(
            (F.cross_entropy(x @ y.T / gw.TEMPERATURE, own) + F.cross_entropy(y @ x.T / gw.TEMPERATURE, own)) / 2)
    optimizer.zero_grad(set_to_none=True)
    total = sum(model.loss_weights[name] * torch.stack(terms[name]).mean() for name in gw.LOSSES) / len(terms)
    total.backward()
    optimizer.step()
    return {"loss": total.detach()}


def main():
    torch.set_num_threads(1)
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        cfg = common.load_config(gw.Config, root / "configs/gw_clip_shared.yaml",
                                 [f"training.batch_size={size}", "data.views=2"])
        cfg.data.dir = demo_data.write_mmimdb(folder, n_films=max(600, 2 * size), views=2, dims=(512, 512))
        data = gw.load_data(cfg)
        torch.manual_seed(0)
        model = gw.build_model(cfg, data)
        optimizer, batch = gw.build_optimizer(cfg, model), gw.make_batch(data, gw.batch_rows(data, cfg, 0))
        model.train()
        times = {gw.train_step: [], plain_step: []}
        for repeat in range(6):
            for step in times:
                wall, cpu = time.perf_counter(), time.process_time()
                step(model, batch, optimizer)["loss"].item()
                if repeat:  # the first warms up
                    times[step].append((time.process_time() - cpu, time.perf_counter() - wall))
        (cpu, wall), (plain_cpu, plain_wall) = ([statistics.median(column) for column in zip(*v, strict=True)]
                                                for v in times.values())
        print(f"step of {size} on {data.device}: {cpu:.2f} CPU s ({wall:.3f} s), plain {plain_cpu:.2f} CPU s "
              f"({plain_wall:.3f} s): ratio {cpu / plain_cpu:.2f} ({wall / plain_wall:.2f})")
        path = Path(folder) / "latents.npy"
        np.save(path, np.random.RandomState(0).rand(200_000, 512).astype(np.float16))
        data.latents = dict.fromkeys(("image", "text"), torch.from_numpy(np.load(path, mmap_mode="c")))
        data.labels, data.views, data.genre_sets = (data.labels[:1].expand(20_000, -1), 10,
                                                    torch.zeros(20_000, dtype=torch.long, device=data.device))
        gather = []
        for i in range(20):
            rows = torch.randint(200_000, (size,), generator=torch.Generator().manual_seed(i))
            start = time.perf_counter()
            gw.make_batch(data, rows)
            gather.append(time.perf_counter() - start)
    took = statistics.median(gather)
    print(f"a batch with its clean targets from mapped float16 latents: {1000 * took:.2f} ms, "
          f"{100 * took / wall:.2f}% of a step")


if __name__ == "__main__":
    main()
