"""exp_pixmo_mrl.py: decoding and its cache against plain PIL, the Matryoshka loss against separate losses, steps and
the loader's share of them.

    OMP_NUM_THREADS=1 python tests/bench_pixmo.py

Variants run alternately in one process; medians and their ratio are printed. Pictures are synthetic JPEGs of PixMo's
usual size (1600 x 1200, about half a megabyte).
"""

import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import demo_data
import exp_pixmo_mrl as exp


def alternately(variants, repeats):
    """{name: median seconds} of functions called in turns."""
    times = {name: [] for name in variants}
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def photo(seed, width=1600, height=1200):
    """A JPEG with detail at every scale, as photos have."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256, 800):
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC)
        image += (np.asarray(layer).astype(float) - 127.5) * 2 / cells**0.5
    Image.fromarray(np.clip(image + 127.5, 0, 255).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue()


def plain(data, size):
    """Full-size decode, then resize of the centre square."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC,
                                   box=(left, top, image.width - left, image.height - top)))


def bench_decoding(size=256, n=24):
    photos = [photo(i) for i in range(n)]
    found = alternately({"plain": lambda: [plain(p, size) for p in photos],
                         "ours": lambda: [common.decode_image(p, size) for p in photos]}, 3)
    errors = [np.square(plain(p, size).astype(float) - common.decode_image(p, size)).mean() for p in photos]
    print(f"decode {np.mean([len(p) for p in photos]) / 1e3:.0f} kB JPEGs to {size} px: "
          f"plain PIL {n / found['plain']:.1f} images/s, "
          f"decode_image {n / found['ours']:.1f} images/s ({found['plain'] / found['ours']:.2f}x), "
          f"PSNR {10 * np.log10(255**2 / np.mean(errors)):.1f} dB")
    with tempfile.NamedTemporaryFile() as file:
        pixels = np.memmap(file.name, dtype=np.uint8, mode="w+", shape=(2048, size, size, 3))
        pixels[:] = np.arange(256)[:size, None].astype(np.uint8)
        rows = np.random.default_rng(0).permutation(2048)[:64]
        gathered = alternately({"gather": lambda: pixels[rows]}, 20)["gather"]
    print(f"64 images of {size} px from the cache: {1000 * gathered:.1f} ms; "
          f"decoded anew {1000 * found['ours'] * 64 / n:.0f} ms "
          f"({found['ours'] * 64 / n / gathered:.0f}x)")


def bench_loss(n=64, dims=(128, 256, 512, 1024, 2048, 4096)):
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, dims[-1], generator=generator, requires_grad=True) for _ in range(2))

    def separate(which):
        return sum(common.info_nce(F.normalize(image[:, :d], dim=1), F.normalize(text[:, :d], dim=1), 14.0)
                   for d in which) / len(which)

    def step(loss):
        image.grad = text.grad = None
        loss().backward()
    variants = {"the whole embedding alone": lambda: separate(dims[-1:]),
                "all six, separate losses": lambda: separate(dims),
                "all six, prefix accumulation": lambda: exp.matryoshka_loss(image, text, dims, 14.0)[0],
                "one drawn dimension (512)": lambda: exp.matryoshka_loss(image, text, [512], 14.0)[0]}
    found = alternately({name: (lambda loss=loss: step(loss)) for name, loss in variants.items()}, 60)
    base = found["all six, separate losses"]
    print(f"Matryoshka loss with backward, N = {n}, D = {dims[-1]}: "
          + ", ".join(f"{name} {1000 * t:.1f} ms ({t / base:.2f})" for name, t in found.items()))
    print("  difference of the two: "
          f"{abs(separate(dims) - exp.matryoshka_loss(image, text, dims, 14.0)[0]).item():.1e}")


def bench_step(steps=25):
    root = Path(__file__).parent.parent
    variants = {"pixmo_scratch, cached": ["configs/pixmo_scratch.yaml"],
                "pixmo_scratch, decoding at every use": ["configs/pixmo_scratch.yaml", "dataset.cache=false"],
                "pixmo_features": ["configs/pixmo_features.yaml"],
                "pixmo_features, batches of 1,024": ["configs/pixmo_features.yaml", "dataset.batch_size=1024",
                                                     "optimization.num_epochs=100"]}
    with tempfile.TemporaryDirectory() as folder:
        scenes = demo_data.write_pixmo(f"{folder}/scenes")
        features = demo_data.write_pixmo_features(scenes)
        files = [f"dataset.{part}_parquet={scenes}/pixmo_{part}.parquet" for part in ("train", "val", "test")]
        files += [f"vision_encoder.features_file={features}/image_features.pt",
                  f"text_encoder.features_file={features}/text_features.pt"]
        for name, (config, *overrides) in variants.items():
            cfg = common.load_config(exp.Config, root / config,
                                     [*files, f"dataset.cache_dir={folder}/cache", *overrides])
            data = exp.load_data(cfg)
            model = exp.build_model(cfg, data).train()
            optimizer, batches, waited = exp.build_optimizer(cfg, model), exp.training_batches(cfg, data, 0), 0.0
            exp.train_step(model, next(batches), optimizer)
            start = time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                exp.train_step(model, batch, optimizer)
            whole = time.perf_counter() - start
            print(f"a step of {name}: {1000 * whole / steps:.0f} ms, "
                  f"{cfg.dataset.batch_size * steps / whole:.0f} pairs/s, "
                  f"waiting for a batch on {data.device}: {100 * waited / whole:.1f}%")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    bench_decoding()
    bench_loss()
    bench_step()
