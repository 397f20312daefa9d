"""Synthetic stand-ins for the real data sets, in their exact files, so that every experiment starts with no download.

Each `write_*` is deterministic, takes seconds, does nothing where its files already are, and returns the folder.

    python demo_data.py            # writes them all under data/demo/
"""

import json
from pathlib import Path

import torch

from common import atomic_write


def nonlinear_map(n_in, n_out, gain, generator):
    """A fixed random two-layer tanh network [.., n_in] -> [.., n_out] with features of unequal scale, as encoders have."""
    first = gain * torch.randn(n_in, 4 * n_in, generator=generator) / n_in**0.5
    bias = torch.randn(4 * n_in, generator=generator)
    second = torch.randn(4 * n_in, n_out, generator=generator) / (4 * n_in) ** 0.5
    scale = torch.exp(0.5 * torch.randn(n_out, generator=generator))
    offset = torch.randn(n_out, generator=generator)
    return lambda x: torch.tanh(x @ first + bias) @ second * scale + offset


def write_coco(folder="data/demo/coco_heads", n_train=3000, n_val=500, n_captions=5, n_factors=10, image_dim=128, text_dim=192):
    """Image and caption embeddings as exp_coco_heads.py reads them: train2017_* (a row per caption) and val2017_* (a row per image).

    An image shows shared factors and private ones (style); a caption mentions most of the shared factors, imprecisely, half of
    them by their size only, which no linear map of the image gives, and has private ones (wording). Both are seen through
    different non-linear maps. Every third image is a near-duplicate of an earlier one, so that retrieval has distractors.
    """
    folder = Path(folder)
    if (folder / "val2017_metadata.json").exists():  # written last
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(2017)
    see, read = nonlinear_map(2 * n_factors, image_dim, 1.0, g), nonlinear_map(2 * n_factors, text_dim, 1.5, g)
    for name, n, start in (("train2017", n_train, 100_000), ("val2017", n_val, 900_000)):
        shared = torch.randn(n, n_factors, generator=g)
        copies = torch.arange(2, n, 3)
        shared[copies] = shared[copies - 2] + 0.35 * torch.randn(len(copies), n_factors, generator=g)
        images = see(torch.cat([shared, 0.7 * torch.randn(n, n_factors, generator=g)], dim=1))
        images += 0.1 * torch.randn(images.shape, generator=g)
        index = torch.arange(n).repeat_interleave(n_captions)
        mentioned = torch.rand(len(index), n_factors, generator=g) < 0.8
        said = torch.cat([shared[:, :n_factors // 2], 1.5 * (shared[:, n_factors // 2:].abs() - 0.8)], dim=1)
        content = said[index] * mentioned + 0.3 * torch.randn(len(index), n_factors, generator=g)
        texts = read(torch.cat([content, 0.7 * torch.randn(len(index), n_factors, generator=g)], dim=1))
        metadata = {"dataset_name": f"synthetic {name}", "synthetic": True, "image_ids": (index + start).tolist(),
                    "caption_ids": list(range(10 * start, 10 * start + len(index))), "total_pairs": len(index), "unique_images": n}
        if name == "val2017":
            metadata["image_index"] = index.tolist()
        else:
            images = images[index]
        files = {"image_embeddings.pt": lambda f, x=images: torch.save(x.half(), f), "text_embeddings.pt": lambda f, x=texts: torch.save(x.half(), f),
                 "metadata.json": lambda f, x=metadata: f.write(json.dumps(x).encode())}
        for part, write in files.items():
            atomic_write(folder / f"{name}_{part}", write)
    return str(folder)


if __name__ == "__main__":
    print(write_coco())
