"""Projection heads on COCO: which head and contrastive loss best align frozen SigLIP images with frozen E5-Mistral text?

Small heads are trained on precomputed embeddings and judged by image-text retrieval on held-out images, beside chance,
ridge regression and CCA. Losses: softmax InfoNCE (CLIP, arXiv 2103.00020), pairwise sigmoid (SigLIP, arXiv 2303.15343), smoothed
InfoNCE (ALIGN, arXiv 2102.05918), a queue of momentum keys (MoCo, arXiv 1911.05722), soft targets (ALBEF/BLIP, arXiv 2107.07651, 2201.12086).

    python exp_coco_heads.py configs/siglip.yaml                    # split, train, evaluate, plots
    python exp_coco_heads.py configs/siglip.yaml --demo             # synthetic data, under 90 s on two CPU cores
    python exp_coco_heads.py configs/siglip.yaml --stage compare compare='[results/siglip, results/clip]'
    python exp_coco_heads.py configs/tune/siglip.yaml               # search hyper-parameters with Optuna

It prints the test table last: R@1/5/10 image-to-text and text-to-image, RSUM with its 95% interval, median ranks, the
baselines and chance. Shapes: P pairs (one a caption), M unique images, D_img and D_txt the encoders' widths, D the
shared width, B pairs a batch.

Deviations from the recipe this follows:
- the gallery holds unique images (a repeated gallery shows as R@5 = R@1 for text to image);
- captions of the same image in a batch or queue are no negatives;
- attention works on 8 pseudo-tokens (over one vector it is affine), cross_modal on a shared memory (with the partner it cheats);
- momentum copies cover BatchNorm buffers and have no dropout; empty queue places are left out;
- the sigmoid loss learns its scale and bias and is divided by B, not B^2;
- inputs are z-scored and thinned by feature dropout: heads on a few thousand images overfit within two epochs otherwise;
- validation has at least min(10%, 1,000) images and picks the epoch by RSUM; the last batch of an epoch is not short.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import copy
import dataclasses
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import common
import demo_data
from common import UserError, ranged

# ---------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = "pretrain_encoded"  # folder of the {name}_image_embeddings.pt, _text_embeddings.pt and _metadata.json files
    name: str = "train2017"  # the files that are split by image
    train: int | float | Literal["auto", "rest"] = "auto"  # share or number of images; rest: all that is left; auto: 0.8, or rest with a test file
    val: int | float | Literal["auto"] = "auto"  # share or number of images; auto: 1%, but at least min(10%, 1,000 images)
    test: int | float | str = 0.04  # share or number of images; or a held-out file's name (val2017); or karpathy
    karpathy_ids: str = ""  # with test=karpathy: JSON list or text file of the test images' COCO image ids or caption ids
    split_seed: int = ranged(42, ">= 0", "< 4294967296")  # of the split by image; the same for every `seed`, so that runs share their test set


@dataclass
class ModelConfig:
    type: Literal["mlp", "siglip", "clip", "align", "blip", "attention", "transformer", "cross_modal"] = "siglip"  # head (transformer: attention)
    output_dim: int = ranged(512, ">= 1")  # D, width of the shared space
    hidden_dim: int | None = ranged(None, ">= 1")  # null: 1024; clip half the input width, align 2048; attention: all 8 tokens together
    num_heads: int = ranged(8, ">= 1")  # of attention and cross_modal
    num_layers: int = ranged(2, ">= 1")  # of attention
    dropout: float = ranged(0.1, ">= 0", "< 1")  # inside every head but siglip
    use_bn: bool = True  # align: BatchNorm on the hidden layer (false: LayerNorm)
    momentum: float = ranged(0.995, ">= 0", "<= 1")  # of the copies that the queue and blip losses use
    input_dropout: float = ranged(0.5, ">= 0", "< 1")  # share of the input features dropped in training
    standardize: bool = True  # z-score the input features with the training split's mean and deviation
    learnable_temp: bool = True  # train logit_scale (and the sigmoid's bias)


@dataclass
class LossConfig:
    type: Literal["clip", "siglip", "align", "queue", "blip"] = "siglip"  # clip: InfoNCE; siglip: pairwise sigmoid; align: InfoNCE, smoothed
    temperature: float | None = ranged(None, "> 0")  # starting 1 / logit_scale (null: 0.07; siglip 0.1, align 1)
    logit_bias: float | Literal["auto"] = -10.0  # siglip: starting bias; auto: -log(batch_size - 1)
    label_smoothing: float | None = ranged(None, ">= 0", "< 1")  # of clip and align (null: 0, align 0.1)
    false_negatives: Literal["mask", "multi_positive", "ignore"] | None = None  # captions of the same image (null: mask; blip multi_positive)
    queue_size: int | None = ranged(None, ">= 1")  # of queue and blip: momentum keys kept (null: 4096, blip 57600; at most the training captions)
    alpha: float = ranged(0.4, ">= 0", "<= 1")  # blip: weight of the momentum model's soft targets, ramped up over the first epoch


@dataclass
class TrainingConfig:
    batch_size: int = ranged(512, ">= 2")  # pairs a step
    learning_rate: float = ranged(1e-4, "> 0", "<= 1e6")  # AdamW
    weight_decay: float = ranged(0.01, ">= 0")  # not on scale, bias, norms
    num_epochs: int = ranged(50, ">= 1")  # at most
    patience: int = ranged(5, ">= 1")  # epochs without a better validation before stopping
    monitor: Literal["loss", "r1", "rsum"] = "rsum"  # validation quantity that picks the best epoch (r1: mean of both directions)
    warmup_steps: int = ranged(0, ">= 0")  # linear warm-up
    schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up: cosine to 0 over num_epochs
    one_caption_per_image: bool = False  # an epoch is one random caption of each image instead of all
    save_every_steps: int = ranged(0, ">= 0")  # extra checkpoints inside an epoch (0: one an epoch)
    compile: bool = False  # torch.compile the heads


@dataclass
class EvaluationConfig:
    chunk_size: int = ranged(256, ">= 1")  # queries scored at once: memory, not numbers
    n_bootstrap: int = ranged(1000, ">= 0")  # resamples of the test images for the 95% intervals
    projection: Literal["pca", "tsne"] = "pca"  # picture of the shared space (tsne needs scikit-learn)
    plots: bool = True  # draw the PNGs


@dataclass
class Config:
    experiment: str = "coco_heads"  # which script a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, dropout
    device: str = "auto"  # auto | cuda | mps | cpu
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv to Weights & Biases
    compare: list[str] = field(default_factory=list)  # run folders for --stage compare
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class TuneConfig:
    experiment: str = "coco_heads"  # tune YAML: which script it belongs to
    base: str = "configs/siglip.yaml"  # tune YAML: the run config that every trial starts from
    search_space: dict = field(default_factory=dict)  # tune YAML: config key -> list of choices, or {low, high[, log]}
    study_name: str = "xclip_siglip_tuning"  # tune YAML: a changed search space gets a new name, with a hash appended
    storage: str = "sqlite:///optuna_study.db"  # tune YAML: Optuna URL, or a path for a JournalStorage (quicker with many workers)
    n_trials: int = ranged(50, ">= 1")  # tune YAML: in all, over restarts
    n_jobs: int = ranged(3, ">= 1")  # tune YAML: worker processes
    num_epochs: int = ranged(9, ">= 1")  # tune YAML: a trial's at most
    n_captions: int = ranged(100_000, ">= 2")  # tune YAML: size of the tuning subset (whole images of the training split)
    results_dir: str = "optuna_results"  # tune YAML: where best_config.yaml goes


# ------------------------------------------------------------------------------------------------------------------ data

@dataclass
class Data:
    """Embeddings on the device, stored in half precision, and the split by image."""
    images: torch.Tensor  # [M, D_img] one row a unique image
    texts: torch.Tensor  # [P, D_txt] one row a caption
    image_index: torch.Tensor  # [P] int64: the caption's row in images
    image_ids: list  # [M] ids as the metadata has them
    splits: dict  # "train" | "val" | "test" -> [n] int64 rows of texts
    fingerprint: str
    synthetic: bool


def embedding_files(folder, name):
    """The three paths of a set: image embeddings, text embeddings, metadata."""
    return [Path(folder) / f"{name}_{part}" for part in ("image_embeddings.pt", "text_embeddings.pt", "metadata.json")]


def load_tensor(path):
    """A memory-mapped [rows, D] float tensor; UserError naming the file if it is anything else."""
    try:
        try:
            tensor = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a file of an old torch cannot be mapped
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise kinds of their own on a damaged file
        raise UserError(f"{path}: not a readable .pt file ({common.reason_of(error)}); "
                        "copy or encode it again") from None
    if not (isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] and tensor.is_floating_point()
            and tensor.layout == torch.strided):
        found = f"{tensor.layout} {tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UserError(f"{path}: expected a float tensor [rows, dim], found {found}")
    return tensor.detach()


def to_half(source, rows, path, device, chunk=16384):
    """source[rows] on the device in half precision (float16, or bfloat16 where float16 would over- or underflow), checked row by row."""
    bad, first, largest = 0, None, 0.0
    for i in range(0, len(rows), chunk):
        block = source[rows[i:i + chunk]].float()
        wrong = (~torch.isfinite(block).all(1)).nonzero()[:, 0]
        if len(wrong) and first is None:
            first = int(rows[i + int(wrong[0])])
        bad, largest = bad + len(wrong), max(largest, float(block.abs().nan_to_num(0, 0, 0).max()))
    if bad:
        raise UserError(f"{path}: {bad} of {len(rows)} rows hold NaN or infinite values, the first is row {first}; encode them again")
    if not 1e-15 < largest < 1e15 or bool((source[rows[:1]] == source[rows[:chunk]]).all()):
        raise UserError(f"{path}: rows all alike, or values out of range (the largest is {largest:g}): these are no embeddings")
    half = source.dtype if source.dtype in (torch.float16, torch.bfloat16) else torch.float16 if 1e-3 < largest < 6e4 else torch.bfloat16
    out = torch.empty(len(rows), source.shape[1], dtype=half, device=device)
    for i in range(0, len(rows), chunk):
        out[i:i + chunk] = source[rows[i:i + chunk]].to(device, half)
    return out


def load_embeddings(folder, name, device):
    """(images [M, D_img], texts [P, D_txt], image_index [P], image ids [M], metadata) of one set of three files.

    The image file has a row per caption (repeats are dropped) or a row per image with `image_index` in the metadata.
    Raises: UserError naming file, expected and found.
    """
    image_file, text_file, metadata_file = embedding_files(folder, name)
    for path in (image_file, text_file, metadata_file):
        if not path.is_file():
            raise UserError(f"{path}: no such file; put the encoded embeddings there (README, 'Data'), point data.dir= at them, "
                            "or try --demo, which needs no data")
    metadata = common.read_json(metadata_file)
    ids = metadata.get("image_ids")
    if not isinstance(ids, list) or not ids:
        raise UserError(f"{metadata_file}: expected a list image_ids with one id a caption row, found {type(ids).__name__}; "
                        "without it captions of one image cannot be kept in one split")
    if {type(i) for i in ids} not in ({int}, {str}):
        raise UserError(f"{metadata_file}: image_ids must be all numbers or all strings, found {sorted({type(i).__name__ for i in ids})}")
    for key in ("image_index", "caption_ids"):
        given = metadata.get(key)
        if given is not None and (not isinstance(given, list) or len(given) != len(ids) or {type(i) for i in given} not in ({int}, {str})):
            raise UserError(f"{metadata_file}: {key} must be a list of {len(ids)} ids, one a caption row like image_ids")
    images, texts = load_tensor(image_file), load_tensor(text_file)
    if len(texts) != len(ids):
        raise UserError(f"{text_file}: expected {len(ids)} rows (image_ids in {metadata_file.name}), found {len(texts)}")
    unique = {image: row for row, image in enumerate(dict.fromkeys(ids))}  # in order of first appearance
    image_index = torch.tensor([unique[i] for i in ids])  # [P]
    first = torch.full((len(unique),), len(ids)).scatter_reduce(0, image_index, torch.arange(len(ids)), "amin")  # [M] a caption of each image
    rows = metadata.get("image_index")
    if len(images) == len(ids) and (rows is None or len(unique) < len(ids)):  # a row per caption
        clash = first_clash(images, first[image_index])
        if clash is None:
            rows = range(len(ids))
        elif rows is None:
            raise UserError(f"{image_file}: rows {int(first[image_index[clash]])} and {clash} carry the same image id {ids[clash]} in "
                            f"{metadata_file.name} but different embeddings; the files do not belong together")
    elif rows is None:
        raise UserError(f"{image_file}: expected {len(ids)} rows (one a caption), or fewer with image_index in {metadata_file.name}; "
                        f"found {len(images)} rows and no image_index")
    if isinstance(rows, list) and (isinstance(rows[0], str) or min(rows) < 0 or max(rows) >= len(images)):
        raise UserError(f"{metadata_file}: image_index must hold rows of {image_file.name} (0 to {len(images) - 1}), "
                        f"found {min(rows)} to {max(rows)}")
    if isinstance(rows, list) and len(set(zip(ids, rows, strict=True))) != len(unique):
        raise UserError(f"{metadata_file}: image_index and image_ids disagree: captions of one image id point at different image rows")
    first = torch.tensor(rows)[first]  # [M] the row of each image
    everything = torch.arange(len(ids))
    return to_half(images, first, image_file, device), to_half(texts, everything, text_file, device), image_index, list(unique), metadata


def first_clash(images, same_as, chunk=16384):
    """The first row that differs from the row it should repeat (same_as [P]), by more than 10% of its norm; None if none does."""
    for i in range(0, len(images), chunk):
        one, other = images[i:i + chunk].float(), images[same_as[i:i + chunk]].float()
        wrong = ((one - other).norm(dim=1) > 0.1 * one.norm(dim=1)).nonzero()[:, 0]
        if len(wrong):
            return i + int(wrong[0])
    return None


def read_karpathy(path, image_ids, caption_ids):
    """The set of test image ids in a file of COCO image ids or caption ids. image_ids: of each caption; caption_ids: likewise."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        listed = {str(i) for i in (json.loads(text) if text.lstrip().startswith("[") else text.split())}
    except (OSError, ValueError) as error:
        raise UserError(f"data.karpathy_ids={path}: cannot be read ({error}); give a JSON list or a text file of image or caption ids") from None
    known = set(map(str, image_ids))
    if not listed <= known and listed <= set(map(str, caption_ids)):
        return {image for image, caption in zip(image_ids, caption_ids, strict=True) if str(caption) in listed}
    if not listed or not listed <= known:
        raise UserError(f"data.karpathy_ids={path}: {len(listed - known)} of {len(listed)} ids are no image_ids of the metadata, "
                        "and they are not all caption_ids either")
    return {image for image in image_ids if str(image) in listed}


def load_data(cfg):
    """Read the files of cfg.data, put them on the device and split them by image. Raises: UserError in one line."""
    device, d = common.pick_device(cfg.device), cfg.data
    names = [d.name]
    if d.test == "karpathy":
        if not d.karpathy_ids:
            raise UserError("data.test=karpathy needs data.karpathy_ids=<file of the 5,000 test images' ids>")
        if embedding_files(d.dir, "val2017")[0].is_file():  # the Karpathy test images lie in both
            names.append("val2017")
    elif isinstance(d.test, str):
        names.append(d.test)
    sets = [load_embeddings(d.dir, name, device) for name in names]
    for (images, texts, *_), name in zip(sets[1:], names[1:], strict=True):
        widths, expected = (images.shape[1], texts.shape[1]), (sets[0][0].shape[1], sets[0][1].shape[1])
        if widths != expected:
            raise UserError(f"{d.dir}: {name} has image and text widths {widths}, {d.name} has {expected}; encode both with the same models")
    image_ids = [i for s in sets for i in s[3]]
    if len(set(map(str, image_ids))) < len(image_ids):
        twice = set(map(str, sets[0][3])) & set(map(str, sets[1][3]))
        raise UserError(f"{d.dir}: {len(twice)} image ids are in both {names[0]} and {names[1]} (e.g. {min(twice)}); training would see test images")
    offsets = [0, *np.cumsum([len(s[0]) for s in sets])]
    image_index = torch.cat([s[2] + offset for s, offset in zip(sets, offsets, strict=False)])
    images, texts = ((sets[0][i] if len(sets) == 1 else torch.cat([s[i] for s in sets])) for i in (0, 1))

    pool = sorted(range(len(sets[0][0])), key=lambda row: str(image_ids[row]))  # the split depends on ids and seed, not on file order
    pool = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(d.split_seed)).tolist()]
    n = len(pool)
    if d.test == "karpathy":
        caption_images = [image_ids[row] for row in image_index.tolist()]
        caption_ids = [c for s in sets for c in s[4].get("caption_ids") or [None] * len(s[1])]
        wanted = read_karpathy(d.karpathy_ids, caption_images, caption_ids)
        test = [row for row, image in enumerate(image_ids) if image in wanted]
        pool = [row for row in pool if image_ids[row] not in wanted]
    elif isinstance(d.test, str):
        test = list(range(offsets[1], offsets[2]))
    else:
        pool, test = split_off(pool, d.test, n, "test")
    pool, val = split_off(pool, max(0.01, min(0.1, 1000 / n)) if d.val == "auto" else d.val, n, "val")
    if d.train == "rest" or (d.train == "auto" and isinstance(d.test, str)):
        train = pool
    else:
        train = split_off(pool, min(round(0.8 * n), len(pool)) if d.train == "auto" else d.train, n, "train")[1]
    splits, role = {}, torch.full((len(image_ids),), -1)
    for number, (split, rows) in enumerate((("train", train), ("val", val), ("test", test))):
        assert (role[rows] == -1).all(), "an image is in two splits"
        role[rows] = number
        splits[split] = (role[image_index] == number).nonzero()[:, 0].to(device)
        if len(rows) < 2:
            raise UserError(f"the {split} split has {len(rows)} of {n} images; change data.{split}")
    fingerprint = common.fingerprint(file for name in names for file in embedding_files(d.dir, name))
    return Data(images, texts, image_index.to(device), image_ids, splits, fingerprint, any(s[4].get("synthetic", False) for s in sets))


def split_off(pool, amount, n, split):
    """(what is left, what is taken) of a shuffled list; amount: a share of n or a number of images."""
    count = round(amount * n) if isinstance(amount, float) else amount
    if not 0 < count <= len(pool):
        raise UserError(f"data.{split}={amount}: asks for {count} images, {len(pool)} of {n} are left for it")
    return pool[count:], pool[:count]


def write_splits(folder, cfg, data):
    """splits.json, written once: image ids of each split, seed, fingerprint. Raises: UserError if it holds another split."""
    ids = {split: [data.image_ids[i] for i in data.image_index[rows].unique().tolist()] for split, rows in data.splits.items()}
    path = folder / "splits.json"
    record = {"split_seed": cfg.data.split_seed, "data_fingerprint": data.fingerprint, "image_ids": ids}
    if not path.exists():
        common.write_json(path, record)
    elif common.read_json(path) != record:
        raise UserError(f"{path}: holds another split than this config makes of this data; use --fresh")


def start(cfg, data=None):
    """(run folder, data), after the checks that every stage needs: same config, same data, same split as the folder's run."""
    data = data or load_data(cfg)
    folder = common.open_run(cfg, data.fingerprint)
    write_splits(folder, cfg, data)
    return folder, data


def make_batch(data, indices):
    """Rows [B] of captions -> {image [B, D_img], text [B, D_txt] float32, ids [B] the image's row}."""
    rows = data.image_index[indices]
    return {"image": data.images[rows].float(), "text": data.texts[indices].float(), "ids": rows}


def tuning_subset(data, n_captions, seed):
    """Training rows of whole images, drawn at random, holding min(n_captions, all) captions (at most one image more)."""
    rows = data.splits["train"]
    images = data.image_index[rows]
    unique, counts = images.unique(return_counts=True)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).to(unique.device)
    before = counts[order].cumsum(0) - counts[order]
    return rows[torch.isin(images, unique[order][before < n_captions])]


def random_data(cfg):
    """Random tensors of SigLIP's and E5-Mistral's widths, one batch of pairs: for profile_flops.py where the data are not at hand."""
    device, n = common.pick_device(cfg.device), cfg.training.batch_size
    images, texts, rows = torch.randn(n, 1152, device=device), torch.randn(n, 4096, device=device), torch.arange(n, device=device)
    return Data(images, texts, rows, list(range(n)), {"train": rows}, "random", True)


def total_steps(cfg, data):
    """Optimisation steps of a run, if it is not stopped early."""
    return len(epoch_batches(data, cfg, 0)) * cfg.training.num_epochs


def epoch_batches(data, cfg, epoch):
    """The caption rows of one epoch as a list of [B] batches of equal size (one row more or less): a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
    rows = data.splits["train"]
    rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    if cfg.training.one_caption_per_image:  # the first of each image in the shuffled order
        images, order = data.image_index[rows].sort(stable=True)
        first = torch.cat([images.new_ones(1, dtype=torch.bool), images[1:] != images[:-1]])
        rows = rows[order[first].sort().values]
    n = min(math.ceil(len(rows) / cfg.training.batch_size), len(rows) // 2)  # one pair alone has no negatives, and no BatchNorm
    return rows.tensor_split(max(1, n))


# ----------------------------------------------------------------------------------------------------------------- model

SCALE_RANGE = {"clip": (1, 100), "siglip": (1, 100), "align": (1e-3, 100), "queue": (1, 100), "blip": (2, 1000)}  # of the learnt 1 / temperature
TRAINING_ONLY = ("momentum_heads.", "queue", "steps")  # parts of the state that best_model.pt does without


def mlp(input_dim, hidden_dim, output_dim, dropout, hidden_norm=nn.Identity, output_norm=nn.Identity):
    """Linear-norm-GELU-Dropout-Linear-norm: [B, input_dim] -> [B, output_dim]."""
    return nn.Sequential(nn.Linear(input_dim, hidden_dim), hidden_norm(hidden_dim), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(hidden_dim, output_dim), output_norm(output_dim))


class AttentionHead(nn.Module):
    """The vector becomes 8 learned pseudo-tokens, a transformer encoder mixes them, their mean is projected.

    Self-attention over the vector as one token would be an affine map in which queries and keys get no gradient.
    """
    N_TOKENS = 8

    def __init__(self, input_dim, hidden_dim, output_dim, num_heads, num_layers, dropout):
        super().__init__()
        width = hidden_dim // self.N_TOKENS
        self.tokens = nn.Linear(input_dim, hidden_dim)
        self.position = nn.Parameter(0.02 * torch.randn(self.N_TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, output_dim)

    def forward(self, x):
        tokens = self.tokens(x).unflatten(1, self.position.shape) + self.position  # [B, 8, width]
        return self.output(self.norm(self.encoder(tokens).mean(1)))


class CrossModalHead(nn.Module):
    """The vector attends to a learned memory [n_slots, hidden_dim] that both modalities share; the partner is never seen.

    A head that attends to the query's own partner scores 100% on pure noise.
    """

    def __init__(self, input_dim, hidden_dim, output_dim, num_heads, dropout, memory):
        super().__init__()
        self.memory, self.num_heads = memory, num_heads
        self.embed, self.norm = nn.Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim)
        self.query, self.key, self.value = (nn.Linear(hidden_dim, hidden_dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.output = mlp(hidden_dim, hidden_dim, output_dim, dropout)

    def forward(self, x):
        x = self.embed(x)
        query = self.query(self.norm(x)).unflatten(1, (self.num_heads, -1))  # [B, heads, d]
        key, value = (layer(self.memory).unflatten(1, (self.num_heads, -1)) for layer in (self.key, self.value))  # [slots, heads, d], once a batch
        weights = (torch.einsum("bhd,shd->bhs", query, key) / query.shape[-1] ** 0.5).softmax(-1)
        return self.output(x + torch.einsum("bhs,shd->bhd", self.dropout(weights), value).flatten(1))


def make_heads(model, input_dims):
    """[image head, text head], modules [B, width] -> [B, output_dim], for the two widths of the embeddings."""
    hidden = model.hidden_dim or {"align": 2048}.get(model.type, 1024)
    memory = nn.Parameter(torch.randn(64, hidden) / hidden**0.5) if model.type == "cross_modal" else None

    def make(width):
        if model.type == "siglip":
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, model.output_dim))
        if model.type in ("attention", "transformer"):
            return AttentionHead(width, hidden, model.output_dim, model.num_heads, model.num_layers, model.dropout)
        if model.type == "cross_modal":
            return CrossModalHead(width, hidden, model.output_dim, model.num_heads, model.dropout, memory)
        if model.type == "clip":
            return mlp(width, model.hidden_dim or width // 2, model.output_dim, model.dropout)
        if model.type == "align":
            return mlp(width, hidden, model.output_dim, model.dropout, hidden_norm=nn.BatchNorm1d if model.use_bn else nn.LayerNorm)
        return mlp(width, hidden, model.output_dim, model.dropout, output_norm=nn.LayerNorm)  # mlp, blip
    return [make(width) for width in input_dims]


class ProjectionModel(nn.Module):
    """One head a modality, a shared logit scale and (sigmoid loss) bias; for the queue and blip losses momentum copies and queues.

    forward(image [B, D_img], text [B, D_txt]) -> (z_image, z_text), both [B, D], L2-normalised.
    """

    def __init__(self, heads, statistics, model, loss, batch_size, n_train, steps_per_epoch):
        super().__init__()
        self.heads = nn.ModuleList(heads)  # image, text
        for name, (mean, deviation) in zip(("image", "text"), statistics, strict=True):  # fixed, and saved with the weights
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_deviation", deviation)
        self.input_dropout = nn.Dropout(model.input_dropout)
        self.loss_type, self.alpha, self.momentum = loss.type, loss.alpha, model.momentum
        self.false_negatives = loss.false_negatives or ("multi_positive" if loss.type == "blip" else "mask")
        self.label_smoothing = loss.label_smoothing if loss.label_smoothing is not None else 0.1 * (loss.type == "align")
        temperature = loss.temperature or {"siglip": 0.1, "align": 1.0}.get(loss.type, 0.07)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)), requires_grad=model.learnable_temp)
        self.log_scale_range = [math.log(s) for s in SCALE_RANGE[loss.type]]
        bias = -math.log(batch_size - 1) if loss.logit_bias == "auto" else float(loss.logit_bias)
        self.logit_bias = nn.Parameter(torch.tensor(bias), requires_grad=model.learnable_temp) if loss.type == "siglip" else None
        self.uses_queue = loss.type in ("queue", "blip")
        if self.uses_queue:
            self.momentum_heads = copy.deepcopy(self.heads).requires_grad_(False)  # together: a memory that the heads share stays shared
            size = min(loss.queue_size or {"queue": 4096, "blip": 57_600}[loss.type], n_train)
            self.register_buffer("queue", torch.zeros(2, size, model.output_dim))  # momentum keys: image, text
            self.register_buffer("queue_ids", torch.full((size,), -1))  # -1: not filled yet, never a negative
            self.register_buffer("queue_next", torch.zeros((), dtype=torch.long))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.ramp_steps = steps_per_epoch
        self.train()
        self.finish_step()

    def train(self, mode=True):
        super().train(mode)
        if self.uses_queue:
            self.momentum_heads.eval()  # no dropout in the copies
        return self

    def embed_image(self, x):
        return F.normalize(self.heads[0](self.input_dropout((x - self.image_mean) / self.image_deviation)).float(), dim=-1)

    def embed_text(self, x):
        return F.normalize(self.heads[1](self.input_dropout((x - self.text_mean) / self.text_deviation)).float(), dim=-1)

    def forward(self, image, text):
        return self.embed_image(image), self.embed_text(text)

    def loss(self, z_image, z_text, ids):
        """The objective of a batch of normalised pairs [B, D]; ids [B]: the image a row belongs to.

        For the queue and blip losses this is what validation uses: plain InfoNCE at the learnt scale, without queue.
        """
        if self.loss_type == "siglip":
            return common.sigmoid_loss(z_image, z_text, self.log_scale.exp(), self.logit_bias, ids, self.false_negatives)
        return common.info_nce(z_image, z_text, self.log_scale.exp(), ids, self.false_negatives, self.label_smoothing)

    @torch.no_grad()
    def momentum_keys(self, image, text):
        """Keys [B, D] of both modalities from the momentum copies."""
        return (F.normalize(self.momentum_heads[0]((image - self.image_mean) / self.image_deviation).float(), dim=-1),
                F.normalize(self.momentum_heads[1]((text - self.text_mean) / self.text_deviation).float(), dim=-1))

    def queue_loss(self, z_image, z_text, keys, ids):
        """Cross-entropy of each z over the momentum keys of the batch and the filled part of the queue, mean of both directions.

        z_image, z_text [B, D], keys (image, text) [B, D], all L2-normalised; ids [B]. queue: one positive, the own partner's key (MoCo, He et
        al. 2020, equation 1). blip: soft targets, alpha of the momentum model's own softmax and 1 - alpha of the positives (ALBEF, Li et al.
        2021, equation 6; BLIP, Li et al. 2022).
        """
        scale, n = self.log_scale.exp(), len(ids)
        all_ids = torch.cat([ids, self.queue_ids])
        same = ids[:, None] == all_ids  # [B, B + queue]
        own = torch.eye(n, len(all_ids), dtype=torch.bool, device=ids.device)
        dropped = (all_ids == -1).expand_as(same)
        if self.false_negatives == "mask":
            dropped = dropped | (same & ~own)
        positive = (same if self.false_negatives == "multi_positive" else own).to(z_image.dtype)
        targets = positive / positive.sum(1, keepdim=True)
        total = 0.0
        for z, own_key, other_keys, queue in ((z_image, keys[0], keys[1], self.queue[1]), (z_text, keys[1], keys[0], self.queue[0])):
            candidates = torch.cat([other_keys, queue])  # [B + queue, D]
            log_p = (scale * z @ candidates.T).masked_fill(dropped, -torch.inf).log_softmax(1)
            goal = targets
            if self.loss_type == "blip":
                alpha = self.alpha * (self.steps / self.ramp_steps).clamp(max=1)
                soft = (scale.detach() * own_key @ candidates.T).masked_fill(dropped, -torch.inf).softmax(1)
                goal = alpha * soft + (1 - alpha) * targets
            total = total - (goal * log_p.masked_fill(dropped, 0)).sum(1).mean() / 2
        return total

    @torch.no_grad()
    def finish_step(self, keys=None, ids=None):
        """After an optimizer step: clamp the scale; move the momentum copies (MoCo, equation 2; BatchNorm buffers too); enqueue the batch's keys."""
        self.log_scale.clamp_(*self.log_scale_range)
        if keys is None:
            return
        copies, live_heads = ([*m.parameters(), *m.buffers()] for m in (self.momentum_heads, self.heads))  # each once: a memory is shared
        for mine, live in zip(copies, live_heads, strict=True):
            mine.lerp_(live, 1 - self.momentum) if mine.is_floating_point() else mine.copy_(live)
        size = len(self.queue_ids)
        keys, ids = torch.stack(keys)[:, -size:], ids[-size:]  # a batch larger than the queue leaves its last rows
        slots = (self.queue_next + torch.arange(len(ids), device=ids.device)) % size
        self.queue[:, slots], self.queue_ids[slots] = keys, ids
        self.queue_next.copy_((self.queue_next + len(ids)) % size)
        self.steps += 1


def feature_statistics(data, standardize, chunk=16384):
    """[(mean, deviation) of the image features, of the text features] over the training pairs, float32; a constant feature gets deviation 1."""
    rows, out = data.splits["train"], []
    for source, index in ((data.images, data.image_index[rows]), (data.texts, rows)):
        mean, variance = source.new_zeros(source.shape[1], dtype=torch.float32), source.new_ones(source.shape[1], dtype=torch.float32)
        if standardize:
            mean = sum(source[i].float().sum(0) for i in index.split(chunk)) / len(index)
            variance = sum((source[i].float() - mean).square().sum(0) for i in index.split(chunk)) / len(index)
        out.append((mean, torch.where(variance > 1e-10 * mean.square(), variance, 1).sqrt()))
    return out


def check_settings(cfg):
    """Raises: UserError on settings of model and loss that do not go together."""
    hidden, heads = cfg.model.hidden_dim or 1024, cfg.model.num_heads
    if cfg.model.type in ("attention", "transformer") and hidden % (AttentionHead.N_TOKENS * heads):
        raise UserError(f"model.hidden_dim={hidden} must be a multiple of {AttentionHead.N_TOKENS} tokens x model.num_heads={heads}")
    if cfg.model.type == "cross_modal" and hidden % heads:
        raise UserError(f"model.hidden_dim={hidden} must be a multiple of model.num_heads={heads}")
    if cfg.loss.label_smoothing and cfg.loss.type not in ("clip", "align"):
        raise UserError(f"loss.label_smoothing={cfg.loss.label_smoothing} works with loss.type=clip or align, not {cfg.loss.type}")
    if cfg.loss.queue_size and cfg.loss.type not in ("queue", "blip"):
        raise UserError(f"loss.queue_size={cfg.loss.queue_size} works with loss.type=queue or blip, not {cfg.loss.type}")
    low, high = SCALE_RANGE[cfg.loss.type]
    if cfg.loss.temperature and not low <= 1 / cfg.loss.temperature <= high:
        raise UserError(f"loss.temperature={cfg.loss.temperature}: must lie in [{1 / high:g}, {1 / low:g}] with loss.type={cfg.loss.type}")


def build_model(cfg, data):
    """ProjectionModel on the data's device; the widths are the data's. Raises: UserError on settings that do not go together."""
    check_settings(cfg)
    heads = make_heads(cfg.model, [data.images.shape[1], data.texts.shape[1]])
    model = ProjectionModel(heads, feature_statistics(data, cfg.model.standardize), cfg.model, cfg.loss, cfg.training.batch_size,
                            len(data.splits["train"]), len(epoch_batches(data, cfg, 0))).to(data.images.device)
    if cfg.training.compile:
        model.compile()
    return model


def build_optimizer(cfg, model):
    """AdamW; no weight decay on scale, biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.training.weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.training.learning_rate, fused=parameters[0].is_cuda)


# ------------------------------------------------------------------------------------------------------------- objective

def train_step(model, batch, optimizer):
    """One optimisation step -> {loss, logit_scale[, logit_bias]} as 0-d tensors (no synchronisation). bf16 autocast on CUDA."""
    optimizer.zero_grad(set_to_none=True)
    keys = None
    with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=batch["image"].is_cuda):
        z_image, z_text = model(batch["image"], batch["text"])
        if model.uses_queue:
            keys = model.momentum_keys(batch["image"], batch["text"])
    if model.uses_queue:
        loss = model.queue_loss(z_image, z_text, keys, batch["ids"])
    else:
        loss = model.loss(z_image, z_text, batch["ids"])
    loss.backward()
    optimizer.step()
    model.finish_step(keys, batch["ids"])
    return {"loss": loss.detach(), **logit_parameters(model)}


def logit_parameters(model):
    """{logit_scale[, logit_bias]}: 0-d tensors, detached."""
    scalars = {"logit_scale": model.log_scale.detach().exp()}
    return scalars if model.logit_bias is None else {**scalars, "logit_bias": model.logit_bias.detach().clone()}


# ------------------------------------------------------------------------------------------------------------ evaluation

KS = (1, 5, 10)


@torch.no_grad()
def embed(embed_image, embed_text, data, split, chunk=8192):
    """Unique images and all captions of a split through two functions -> z_image [m, D], z_text [n, D], own image of a caption [n]."""
    rows = data.splits[split]
    images, own = data.image_index[rows].unique(return_inverse=True)
    z_image = torch.cat([embed_image(data.images[i].float()) for i in images.split(chunk)])
    z_text = torch.cat([embed_text(data.texts[r].float()) for r in rows.split(chunk)])
    return z_image, z_text, own


def retrieval(z_image, z_text, own, chunk_size=256):
    """Both directions, one value a query: ({"i2t": ..., "t2i": ...} as common.retrieval_per_query gives them)."""
    image_ids = torch.arange(len(z_image), device=own.device)
    options = {"ks": KS, "map_ks": (5, 10), "chunk_size": chunk_size}
    return {"i2t": common.retrieval_per_query(z_image, z_text, image_ids, own, **options),
            "t2i": common.retrieval_per_query(z_text, z_image, own, image_ids, **options)}


def summarise(per_query):
    """Recall and mAP in %, ranks from 1: {"i2t_R@1": ..., "RSUM": ...}."""
    out = {}
    for way, q in per_query.items():
        out |= {f"{way}_R@{k}": 100 * q[f"hit@{k}"].mean().item() for k in KS}
        out |= {f"{way}_mAP@{k}": 100 * q[f"AP@{k}"].mean().item() for k in (5, 10)}
        out |= {f"{way}_median_rank": float(np.median(q["rank"])), f"{way}_mean_rank": q["rank"].mean().item(),
                f"{way}_MRR": (1 / q["rank"]).mean().item()}
    out["RSUM"] = sum(out[f"{way}_R@{k}"] for way in per_query for k in KS)
    return out


def chance(per_query):
    """What random scores give, exactly, in the keys of `summarise` that have it."""
    out = {f"{way}_R@{k}": 100 * q[f"chance@{k}"].mean().item() for way, q in per_query.items() for k in KS}
    return {**out, "RSUM": sum(out.values())}


def bootstrap(per_query, own, n_resamples, seed=0):
    """95% percentile intervals of recalls and RSUM over resampled test images (a caption goes with its image)."""
    own, rng = own.cpu().numpy(), np.random.default_rng(seed)
    n_captions = np.bincount(own)
    hits = {f"i2t_R@{k}": per_query["i2t"][f"hit@{k}"].numpy() for k in KS}
    hits |= {f"t2i_R@{k}": np.bincount(own, per_query["t2i"][f"hit@{k}"].numpy()) for k in KS}  # sum over an image's captions
    draws = {name: np.empty(n_resamples) for name in hits}
    for i in range(n_resamples):
        sample = rng.integers(len(n_captions), size=len(n_captions))
        for name, values in hits.items():
            weight = len(sample) if name.startswith("i2t") else n_captions[sample].sum()
            draws[name][i] = 100 * values[sample].sum() / weight
    draws["RSUM"] = sum(draws.values())
    return {name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in draws.items()} if n_resamples else {}


def covariances(data, split="train", chunk=16384):
    """(mean image, mean text, C_ii, C_tt, C_it) over the pairs of a split, float64 on the CPU; products of blocks in float32."""
    rows, sums, products = data.splits[split], 0, 0
    centre_image, centre_text = data.images[:1].float(), data.texts[:1].float()  # any row: keeps the float32 products well scaled
    for r in rows.split(chunk):
        both = torch.cat([data.images[data.image_index[r]].float() - centre_image, data.texts[r].float() - centre_text], dim=1)
        with common.full_precision():
            sums, products = sums + both.sum(0).cpu().double(), products + (both.T @ both).cpu().double()
    mean, d = sums / len(rows), data.images.shape[1]
    covariance = products / len(rows) - mean[:, None] * mean
    return (mean[:d] + centre_image[0].cpu(), mean[d:] + centre_text[0].cpu(), covariance[:d, :d], covariance[d:, d:], covariance[:d, d:])


def linear_baselines(data, chunk_size=256):
    """Ridge regression (image to text) and regularised CCA in closed form on the training pairs, the strength of the
    regularisation chosen by validation RSUM. Returns {name: (embed_image, embed_text, chosen settings, validation RSUM)}.

    CCA: Hotelling 1936, with shrinkage of both covariances towards their mean variance and the canonical directions
    weighted by correlation^power (Gong et al. 2014).
    """
    mean_image, mean_text, c_image, c_text, c_cross = covariances(data)
    device = data.images.device

    def shrunk(c, amount):
        return (1 - amount) * c + amount * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)

    def projection(mean, matrix):
        mean, matrix = mean.float().to(device), matrix.float().to(device)
        return lambda x: F.normalize((x - mean) @ matrix, dim=-1)

    candidates = []
    for strength in (0.03, 0.1, 0.3, 1.0, 3.0):
        weights = torch.linalg.solve(c_image + strength * c_image.diagonal().mean() * torch.eye(len(c_image), dtype=c_image.dtype), c_cross)
        candidates.append(("ridge", f"lambda {strength:g}", mean_image, weights, mean_text, torch.eye(len(c_text), dtype=weights.dtype)))
    for shrinkage in (0.1, 0.5, 0.7):
        whiten = []
        for c in (c_image, c_text):
            values, vectors = torch.linalg.eigh(shrunk(c, shrinkage))
            whiten.append(vectors * values.clamp(min=values[-1] * 1e-10).rsqrt() @ vectors.T)
        left, correlation, right = torch.linalg.svd(whiten[0] @ c_cross @ whiten[1], full_matrices=False)
        for dims in sorted({min(d, len(correlation)) for d in (128, 256, 512)}):
            for power in (0, 0.5, 1):
                scale = correlation[:dims] ** power
                candidates.append(("CCA", f"shrinkage {shrinkage:g}, {dims} dims, power {power:g}", mean_image, whiten[0] @ left[:, :dims] * scale,
                                   mean_text, whiten[1] @ right[:dims].T * scale))
    best = {}
    for name, setting, *sides in candidates:
        heads = projection(*sides[:2]), projection(*sides[2:])
        rsum = summarise(retrieval(*embed(*heads, data, "val"), chunk_size))["RSUM"]
        if name not in best or rsum > best[name][3]:
            best[name] = (*heads, setting, rsum)
    return best


def read_best(folder, data):
    """best_model.pt of a run; UserError if it is missing, damaged or made for other widths."""
    path = folder / "best_model.pt"
    if not path.exists():
        raise UserError(f"{path}: no such file; train first (without --stage evaluate; if the run is complete, anew with --fresh)")
    best = common.load_checkpoint(path)
    widths = [data.images.shape[1], data.texts.shape[1]]
    if best.get("input_dims") != widths:
        raise UserError(f"{path}: trained on image and text widths {best.get('input_dims')}, the data have {widths}; "
                        "use the run's own embeddings or train anew with --fresh")
    return best


def evaluate(cfg, data=None):
    """Judge best_model.pt on the test images beside the baselines; writes results.json, evaluation_results/, plots. Returns the results.

    Does nothing but return them when they are there already, made with the same evaluation settings.
    """
    data = data or load_data(cfg)
    best = read_best(Path(cfg.output_dir), data)
    folder, data = start(cfg, data)
    done = folder / "results.json"
    settings = dataclasses.asdict(cfg.evaluation)
    if done.exists():
        results = common.read_json(done)
        if (results.get("evaluation"), results.get("best_epoch")) == (settings, best["epoch"]):
            return results
    started = time.time()
    model = build_model(cfg, data)
    missing, unexpected = model.load_state_dict(best["model_state_dict"], strict=False)
    assert not unexpected and all(k.startswith(TRAINING_ONLY) for k in missing), (missing, unexpected)
    model.eval()
    z_image, z_text, own = embed(model.embed_image, model.embed_text, data, "test")
    per_query = retrieval(z_image, z_text, own, cfg.evaluation.chunk_size)
    baselines = {"chance": chance(per_query)}
    for name, (image, text, setting, _) in linear_baselines(data, cfg.evaluation.chunk_size).items():
        scores = summarise(retrieval(*embed(image, text, data, "test"), cfg.evaluation.chunk_size))
        baselines[name] = {**scores, "setting": setting}
    results = {
        "experiment": cfg.experiment, "synthetic": data.synthetic, "seed": cfg.seed, "head": cfg.model.type, "loss": cfg.loss.type,
        "n_images": len(z_image), "n_captions": len(z_text), "n_train_captions": len(data.splits["train"]), "best_epoch": best["epoch"],
        "units": "recalls, RSUM and mAP in percent; ranks from 1; intervals: 95% bootstrap over test images",
        "data_fingerprint": data.fingerprint,
        "test_split": [data.fingerprint, cfg.data.test, cfg.data.split_seed, cfg.data.karpathy_ids], "test": summarise(per_query),
        "interval95": bootstrap(per_query, own, cfg.evaluation.n_bootstrap), "baselines": baselines,
        "logit": {name: value.item() for name, value in logit_parameters(model).items()}, "evaluation": settings}
    out = folder / "evaluation_results"
    out.mkdir(exist_ok=True)
    if cfg.evaluation.plots:
        plot_evaluation(out, cfg, results, z_image, z_text, own, per_query)
    text = report(results)
    common.write_json(out / "metrics.json", {k: results[k] for k in ("test", "interval95", "baselines")})
    common.atomic_write(out / "metrics.txt", lambda file: file.write(f"{text}\n".encode()))
    common.record_environment(folder, evaluate_seconds=round(time.time() - started, 2))
    common.write_json(done, results)  # last: its presence says that the evaluation is complete
    return results


COLUMNS = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in KS] + ["RSUM", "i2t_median_rank", "t2i_median_rank", "i2t_mAP@10", "t2i_MRR"]


def report(results):
    """The final table as text: chance, baselines, the trained head with its intervals, and what to make of them."""
    test, rows = results["test"], []
    for name, scores in [*results["baselines"].items(), (f"{results['head']} + {results['loss']} loss", test)]:
        rows.append([name, *(scores.get(c) for c in COLUMNS[:-1]), None if "t2i_MRR" not in scores else f"{scores['t2i_MRR']:.3f}"])
    for i, side in enumerate(("  95% from", "  95% to") if results["interval95"] else ()):
        rows.append([side, *(results["interval95"][c][i] if c in results["interval95"] else None for c in COLUMNS)])
    header = ["", *(c.replace("_", " ").replace("i2t", "I2T").replace("t2i", "T2I").replace("median rank", "medR") for c in COLUMNS)]
    lines = [f"test: {results['n_images']:,} images, {results['n_captions']:,} captions; recalls in %; epoch {results['best_epoch']}, "
             f"seed {results['seed']}{'  [SYNTHETIC demo data]' if results['synthetic'] else ''}", common.format_table(header, rows)]
    lines += [f"{name}: {s['setting']} (chosen on validation)" for name, s in results["baselines"].items() if "setting" in s]
    beaten = [name for name, s in results["baselines"].items() if s["RSUM"] >= test["RSUM"]]
    if beaten:
        lines.append(f"NOTE: the trained head does not beat {' and '.join(beaten)} by RSUM on these test images")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- training

def validate(model, data, cfg):
    """Validation loss (batches of batch_size in one fixed shuffled order) and recalls -> dict of floats."""
    model.eval()
    z_image, z_text, own = embed(model.embed_image, model.embed_text, data, "val")
    if not (torch.isfinite(z_image).all() and torch.isfinite(z_text).all()):
        raise FloatingPointError("non-finite weights after the epoch's last step; lower training.learning_rate (the last checkpoint is kept)")
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).to(own.device)
    with torch.no_grad():
        batches = order.tensor_split(max(1, math.ceil(len(order) / cfg.training.batch_size)))
        loss = sum(model.loss(z_image[own[i]], z_text[i], own[i]) * len(i) for i in batches) / len(order)
    scores = summarise(retrieval(z_image, z_text, own, cfg.evaluation.chunk_size))
    model.train()
    return {"val_loss": loss.item(), **{f"val_{k.replace('@', '')}": scores[k] for k in ("i2t_R@1", "t2i_R@1", "RSUM")}}


def check_finite(losses, step, loss_type, rate, model):
    """FloatingPointError naming the first of an epoch's steps whose loss is not finite. rate: function of the step in the epoch."""
    wrong = (~torch.isfinite(losses[:step])).nonzero()
    if len(wrong):
        first, scale = int(wrong[0]), {k: round(v.item(), 4) for k, v in logit_parameters(model).items()}
        raise FloatingPointError(f"non-finite {loss_type} loss ({losses[first].item()}) at step {first + 1} of the epoch, learning rate "
                                 f"{rate(first):g}, {scale}; lower training.learning_rate (the last good checkpoint is kept)")


def monitored(row, monitor):
    """The quantity that picks the best epoch, larger is better, from a row of the history."""
    return {"loss": -row["val_loss"], "r1": (row["val_i2t_R1"] + row["val_t2i_R1"]) / 2, "rsum": row["val_RSUM"]}[monitor]


def learning_rate(training, step, total_steps):
    """The rate of a step: linear warm-up, then constant or a cosine to 0."""
    if training.schedule == "constant" and step >= training.warmup_steps:
        return training.learning_rate
    return training.learning_rate * common.warmup_cosine(step, total_steps, training.warmup_steps)


def set_learning_rate(optimizer, rate):
    """The same rate in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def train(cfg, data=None):
    """Train to early stopping or num_epochs, resuming exactly from checkpoint_latest.pt; writes best_model.pt. Returns the history."""
    t = cfg.training
    folder, data = start(cfg, data)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    device = data.images.device
    epoch, first_step, global_step, history, best, stale, finished = 0, 0, 0, [], None, 0, False
    losses = torch.empty(len(epoch_batches(data, cfg, 0)), device=device)  # of this epoch's steps: read by the host once an epoch
    latest = folder / "checkpoint_latest.pt"
    if latest.exists() or latest.with_name(f"{latest.name}.previous").exists():
        state = common.load_checkpoint(latest)
        model.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])
        epoch, global_step, history, position = state["epoch"], state["global_step"], state["history"], state["position"]
        first_step, best, stale, finished = position["step"], position["best"], position["stale"], position["finished"]
        losses[:first_step] = position["losses"]
        common.set_rng_state(state["rng"])
        print(f"{folder}: training is complete" if finished else f"resuming {folder} at epoch {epoch + 1}, step {first_step}")
    steps_per_epoch, last_step = len(losses), total_steps(cfg, data)

    def rate(step):
        return learning_rate(t, epoch * steps_per_epoch + step, last_step)

    def save(step):
        common.save_checkpoint(latest, {
            "epoch": epoch, "global_step": global_step, "best_val_loss": min((row["val_loss"] for row in history), default=None),
            "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": {"step": global_step, "total_steps": last_step, "warmup_steps": t.warmup_steps},
            "scaler_state_dict": {}, "history": history, "config": dataclasses.asdict(cfg), "rng": common.rng_state(),
            "position": {"step": step, "losses": losses[:step].cpu().clone(), "best": best, "stale": stale, "finished": finished}})

    log = common.RunLog(folder, cfg.wandb and not finished, dataclasses.asdict(cfg))
    if history:  # a kill may have come between the last checkpoint and these files
        write_history(folder, log, history)
    model.train()
    started, trained_epochs = time.time(), 0
    with common.StopSignal() as stop:
        while not finished:
            epoch_started = time.time()
            batches = epoch_batches(data, cfg, epoch)
            for step in common.progress(range(first_step, steps_per_epoch), f"epoch {epoch + 1}"):
                set_learning_rate(optimizer, rate(step))
                losses[step] = train_step(model, make_batch(data, batches[step]), optimizer)["loss"]
                global_step += 1
                if stop.signum or (t.save_every_steps and global_step % t.save_every_steps == 0 and step + 1 < steps_per_epoch):
                    check_finite(losses, step + 1, cfg.loss.type, rate, model)
                    save(step + 1)
                    if stop.signum:
                        raise common.Stopped(stop.signum, f"stopped at epoch {epoch + 1}, step {step + 1}; the same command resumes from {latest}")
            check_finite(losses, steps_per_epoch, cfg.loss.type, rate, model)
            scores = validate(model, data, cfg)
            row = {"epoch": epoch + 1, "global_step": global_step, "train_loss": losses.mean().item(), **scores,
                   "logit_bias": None, **{k: v.item() for k, v in logit_parameters(model).items()}, "learning_rate": rate(steps_per_epoch - 1)}
            history.append(row)
            score = monitored(row, t.monitor)
            better = best is None or score > best
            best, stale = (score, 0) if better else (best, stale + 1)
            epoch, first_step = epoch + 1, 0
            finished = epoch == t.num_epochs or stale >= t.patience
            if better:
                common.save_checkpoint(folder / "best_model.pt", {
                    "model_state_dict": {k: v for k, v in model.state_dict().items() if not k.startswith(TRAINING_ONLY)},
                    "config": dataclasses.asdict(cfg), "epoch": epoch, "global_step": global_step,
                    "input_dims": [data.images.shape[1], data.texts.shape[1]], "validation": scores}, keep_previous=False)
            save(0)
            write_history(folder, log, history)
            trained_epochs += 1
            print(f"epoch {epoch:3}  train loss {row['train_loss']:.4f}  val: loss {row['val_loss']:.4f}  I2T R@1 {row['val_i2t_R1']:.1f}  T2I R@1 "
                  f"{row['val_t2i_R1']:.1f}  RSUM {row['val_RSUM']:.1f}{' *' if better else '  '}  {time.time() - epoch_started:.1f} s", flush=True)
            if stop.signum:
                raise common.Stopped(stop.signum, f"stopped after epoch {epoch}; the same command goes on from {latest}")
    log.close()
    if trained_epochs:
        seconds = time.time() - started
        common.record_environment(folder, device=str(device), train_seconds=round(seconds, 2), seconds_per_epoch=round(seconds / trained_epochs, 3))
    return history


def write_history(folder, log, history):
    """metrics.csv and loss_history.json from the epochs so far."""
    log.write(history)
    common.write_json(folder / "loss_history.json", {name: [row[name] for row in history] for name in ("train_loss", "val_loss")})


# ---------------------------------------------------------------------------------------------------------------- tuning

def import_optuna():
    """The optional package. Raises: UserError with the pip command."""
    try:
        import optuna
    except ImportError:
        raise UserError("--stage tune needs the package: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def read_search_space(path, tuning):
    """{config key: list of choices, or (low, high, log)} with the types of Config. Raises: UserError naming the key."""
    space, schema = {}, common.config_schema(Config)
    for key, spec in common.flatten(tuning.search_space, leaves=[k for k, v in schema.items() if v]).items():
        where = f"{path}: search_space"
        if isinstance(spec, list) and spec:
            space[key] = [common.typed({key: choice}, schema, where)[key] for choice in spec]
        elif isinstance(spec, dict) and {"low", "high"} <= set(spec) <= {"low", "high", "log"}:
            low, high = (common.typed({key: spec[end]}, schema, where)[key] for end in ("low", "high"))
            if not all(type(end) in (int, float) for end in (low, high)) or not low < high:
                raise UserError(f"{where}: {key}: low must be a number below high, found {spec['low']} and {spec['high']}")
            log = {"true": True, "false": False}.get(str(spec.get("log", "false")).lower())
            if log is None or (log and low <= 0):
                raise UserError(f"{where}: {key}: log must be true (with low above 0) or false, found log: {spec['log']}, low: {spec['low']}")
            space[key] = (low, high, log)
        else:
            raise UserError(f"{where}: {key}: expected a list of choices or {{low: .., high: .., log: true}}, found {spec!r}")
    if not space:
        raise UserError(f"{path}: has no search_space; tune YAMLs are in configs/tune/")
    return space


def trial_config(base, overrides, params, demo):
    """The run config `base` with a trial's parameters {config key: value}. Raises: UserError if they are out of range."""
    return common.load_config(Config, base, [*overrides, *(f"{k}={'null' if v is None else v}" for k, v in params.items())], demo=demo)


def open_study(tuning, name):
    """The Optuna study of that name, made if it is not there. Raises: UserError if the storage cannot be opened."""
    optuna = import_optuna()
    try:
        if "://" in tuning.storage:
            options = {"connect_args": {"timeout": 60}} if tuning.storage.startswith("sqlite") else {}  # workers wait for each other's writes
            storage = optuna.storages.RDBStorage(tuning.storage, engine_kwargs=options)
        else:
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(tuning.storage))
    except Exception as error:  # every database driver raises kinds of its own
        raise UserError(f"storage={tuning.storage} cannot be opened ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    # Rungs at epochs 1, 3, 9: only the better third of the trials that got there goes on.
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3, min_early_stopping_rate=0)
    sampler = optuna.samplers.TPESampler(constant_liar=tuning.n_jobs > 1)
    return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True, pruner=pruner, sampler=sampler)


def run_trials(tuning, name, space, base, overrides, demo, data, tickets):
    """A worker: one trial a ticket until they are gone. data: with the tuning subset as its training split."""
    optuna, study = import_optuna(), open_study(tuning, name)
    torch.set_num_threads(max(1, torch.get_num_threads() // tuning.n_jobs))
    if tuning.n_jobs > 1:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers

    def objective(trial):
        params = {}
        for key, spec in space.items():
            if isinstance(spec, list):
                params[key] = trial.suggest_categorical(key, spec)
            else:
                suggest = trial.suggest_int if isinstance(spec[0], int) else trial.suggest_float
                params[key] = suggest(key, spec[0], spec[1], log=spec[2])
        try:
            cfg = trial_config(base, overrides, params, demo)
            common.seed_everything(cfg.seed)
            model = build_model(cfg, data)
            optimizer = build_optimizer(cfg, model)
            steps = len(epoch_batches(data, cfg, 0)) * tuning.num_epochs
            best, step = -math.inf, 0
            for epoch in range(tuning.num_epochs):
                model.train()
                for rows in epoch_batches(data, cfg, epoch):
                    set_learning_rate(optimizer, learning_rate(cfg.training, step, steps))
                    train_step(model, make_batch(data, rows), optimizer)
                    step += 1
                row = validate(model, data, cfg)
                best = max(best, monitored(row, "r1"))
                trial.report(monitored(row, "r1"), epoch + 1)
                if trial.should_prune():
                    raise optuna.TrialPruned
        except FloatingPointError:
            best = math.nan  # Optuna's FAIL
        except (optuna.TrialPruned, UserError, torch.OutOfMemoryError):
            trial.set_user_attr("ended", True)
            raise
        trial.set_user_attr("ended", True)  # a trial without this mark was interrupted
        return best

    while True:
        with tickets.get_lock():
            if tickets.value <= 0:
                return
            tickets.value -= 1
        study.optimize(objective, n_trials=1, catch=(UserError, torch.OutOfMemoryError))
        trial = max(study.get_trials(deepcopy=False), key=lambda t: (t.datetime_complete is not None, t.datetime_complete))
        value = "" if trial.value is None else f"R@1 {trial.value:.2f}"
        print(f"trial {trial.number:3} {trial.state.name:8} {value:11} {trial.params}", flush=True)


def tune(args):
    """Search the hyper-parameters of a base config by validation R@1 (mean of both directions) on the tuning subset, never on test.

    Resumes a killed search: trials that were running are tried again, the total is kept. Writes results_dir/best_config.yaml.
    """
    optuna = import_optuna()
    own = [o for o in args.overrides if o.partition("=")[0] in {f.name for f in dataclasses.fields(TuneConfig)}]
    overrides = [o for o in args.overrides if o not in own]
    tuning = common.load_config(TuneConfig, args.config, own)
    space = read_search_space(args.config, tuning)
    if args.demo:
        overrides.append(f"data.dir={demo_data.write_coco('data/demo/coco_heads')}")
    cfg = trial_config(tuning.base, overrides, {}, args.demo)
    data = load_data(cfg)
    data.splits["train"] = tuning_subset(data, tuning.n_captions, cfg.data.split_seed)
    print(f"tuning on {len(data.splits['train']):,} captions of {len(data.image_index[data.splits['train']].unique()):,} images, "
          f"validating on {len(data.splits['val']):,} captions")
    sections = [dataclasses.asdict(section) for section in (cfg.model, cfg.loss, cfg.training)]
    identity = json.dumps([space, tuning.num_epochs, sections, data.fingerprint, len(data.splits["train"])], sort_keys=True)
    identity = hashlib.sha256(identity.encode()).hexdigest()[:8]
    name = tuning.study_name
    study = open_study(tuning, name)
    if study.user_attrs.get("identity", identity) != identity:
        name = f"{name}_{identity}"
        print(f"the study {tuning.study_name} searched something else; this search is the study {name}")
        study = open_study(tuning, name)
    study.set_user_attr("identity", identity)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a killed search
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def remaining():
        ended = [t for t in study.get_trials() if t.state.is_finished() and t.user_attrs.get("ended")]
        return tuning.n_trials - len(ended)

    while (left := remaining()) > 0:
        workers = torch.multiprocessing.get_context("spawn")
        tickets = workers.Value("i", left)
        job = (tuning, name, space, tuning.base, overrides, args.demo, data, tickets)
        if tuning.n_jobs == 1:
            run_trials(*job)
        else:  # the data are shared with the workers, not copied
            processes = [workers.Process(target=run_trials, args=job, daemon=True) for _ in range(min(tuning.n_jobs, left))]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        if remaining() == left:
            raise UserError(f"no trial of {name} came to its end; run with n_jobs=1 to see why")
    trials = study.get_trials()
    count = {state.name: sum(t.state == state for t in trials) for state in optuna.trial.TrialState}
    finished = sorted((t for t in trials if t.state == optuna.trial.TrialState.COMPLETE), key=lambda t: -t.value)
    if not finished:
        raise UserError(f"all trials of {name} failed or were pruned ({count}); widen the search space or raise n_trials")
    print("\n" + common.format_table(["trial", "val R@1", *space], [[str(t.number), f"{t.value:.2f}", *(
        f"{v:.3g}" if isinstance(v, float) else str(v) for v in map(t.params.get, space))] for t in finished[:5]]))
    best = dataclasses.asdict(trial_config(tuning.base, overrides, finished[0].params, False))
    del best["output_dir"], best["compare"]
    path = Path(tuning.results_dir) / "best_config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = (f"# python exp_coco_heads.py {path}\n"
              f"# Trial {finished[0].number} of study {name}: validation R@1 {finished[0].value:.2f} on the tuning subset.\n")
    common.atomic_write(path, lambda file: file.write((header + yaml.safe_dump(best, sort_keys=False)).encode()))
    print(f"{count['COMPLETE']} complete, {count['PRUNED']} pruned, {count['FAIL']} failed or interrupted; study {name} in {tuning.storage}\n"
          f"next: python exp_coco_heads.py {path}")


# ----------------------------------------------------------------------------------------------------------------- plots

def mark(title, synthetic):
    return f"{title} (synthetic data)" if synthetic else title


def plot_training(folder, cfg, history, synthetic):
    """training_curves.png: loss, recalls and logit scale by epoch, the chosen one marked."""
    chosen = max(history, key=lambda row: monitored(row, cfg.training.monitor))
    panels = {f"{cfg.loss.type} loss": {"train": [r["train_loss"] for r in history], "validation": [r["val_loss"] for r in history]},
              "validation R@1 [%]": {"image to text": [r["val_i2t_R1"] for r in history], "text to image": [r["val_t2i_R1"] for r in history]},
              "logit scale": {"logit scale": [r["logit_scale"] for r in history]}}
    title = mark(f"{cfg.model.type} head, {cfg.loss.type} loss", synthetic)
    common.plot_curves(folder / "training_curves.png", panels, title=title, mark=chosen["epoch"])


def plot_evaluation(folder, cfg, results, z_image, z_text, own, per_query):
    """embedding_space.png, similarity_matrix.png, rank_histogram.png in folder."""
    first = torch.full((len(z_image),), len(own), device=own.device).scatter_reduce(0, own, torch.arange(len(own), device=own.device), "amin")
    n = min(200, len(z_image))
    shown = {"image": z_image[:n], "first caption": z_text[first[:n]]}
    name = f"{cfg.model.type} head, {cfg.loss.type} loss"
    title = mark(f"{name}: {n} test pairs", results["synthetic"])
    common.plot_embedding_space(folder / "embedding_space.png", shown, title, cfg.evaluation.projection)
    n = min(60, len(z_image))
    common.plot_similarity_matrix(folder / "similarity_matrix.png", z_image[:n] @ z_text[first[:n]].T,
                                  mark(f"{name}: first {n} test images", results["synthetic"]), "first caption of image", "image")
    figure, axes = common.new_figure(2)
    for axis, (way, label, gallery) in zip(axes, (("i2t", "image to text", len(z_text)), ("t2i", "text to image", len(z_image))), strict=True):
        ranks = per_query[way]["rank"].numpy()
        axis.hist(ranks, bins=np.unique(np.geomspace(1, gallery + 1, 40).round()) - 0.5, color="tab:blue")
        axis.axvline(np.median(ranks), color="black", linestyle=":", label=f"median {np.median(ranks):g}")
        axis.set(xscale="log", xlabel=f"rank of the best own item among {gallery:,}", ylabel="queries", title=f"{label}, n = {len(ranks):,}")
        axis.legend()
    figure.suptitle(mark(name, results["synthetic"]))
    common.save_figure(figure, folder / "rank_histogram.png")


def compare(cfg):
    """Finished runs side by side: runs that differ only in their seed become one row, mean +- sd. Writes compare.png and compare.txt."""
    runs, columns = common.runs_by_seed(cfg.compare, cfg.experiment), COLUMNS[:7]
    first = runs[0][1][0]
    table = [[name, 1, *(scores.get(c) for c in columns)] for name, scores in first["baselines"].items()]
    bars = [(name, [scores[c] for c in columns], None) for name, scores in first["baselines"].items()]
    for name, found in runs:
        values = np.array([[r["test"][c] for c in columns] for r in found])
        mean, sd = values.mean(0), values.std(0, ddof=1) if len(found) > 1 else None
        table.append([name, len(found), *(f"{m:.1f}" if sd is None else f"{m:.1f} +- {sd[i]:.1f}" for i, m in enumerate(mean))])
        bars.append((f"{name} (n = {len(found)})", mean, sd))
    figure, (axis,) = common.new_figure(width=9)
    for i, (name, mean, sd) in enumerate(bars):
        place = np.arange(6) + (i - (len(bars) - 1) / 2) * 0.8 / len(bars)
        grey = {"color": str(0.5 + 0.15 * i)} if i < len(first["baselines"]) else {}
        axis.bar(place, mean[:6], 0.8 / len(bars), yerr=None if sd is None else sd[:6], capsize=2, label=name, **grey)
    axis.set_xticks(range(6), [c.replace("_", " ").upper() for c in columns[:6]])
    everything = [r for _, found in runs for r in found]
    counts, synthetic = sorted({r["n_images"] for r in everything}), any(r["synthetic"] for r in everything)
    axis.set(ylabel="recall [%]", title=mark(f"{', '.join(f'{n:,}' for n in counts)} test images", synthetic))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    text = common.format_table(["run", "seeds", *(c.replace("_", " ").replace("i2t", "I2T").replace("t2i", "T2I") for c in columns)], table)
    if len({json.dumps(r.get("test_split")) for r in everything}) > 1:
        text += "\nNOTE: these runs were not tested on the same data; the baselines are those of the first"
    text += "\n[SYNTHETIC demo data]" if synthetic else ""
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    common.save_figure(figure, out / "compare.png")
    common.atomic_write(out / "compare.txt", lambda file: file.write(f"{text}\n".encode()))
    print(f"{text}\n{out / 'compare.txt'}, {out / 'compare.png'}")


# ------------------------------------------------------------------------------------------------------------------ main

STAGES = ("all", "split", "train", "evaluate", "compare", "tune")


@common.exit_codes
def main(argv):
    args = common.parse_command_line(argv, (Config, TuneConfig), __doc__, STAGES)
    if "search_space" in common.read_yaml(args.config):
        if args.stage not in ("all", "tune") or args.fresh:
            raise UserError(f"{args.config} describes a search, not a run: leave --stage and --fresh out (a new study_name= searches anew)")
        return tune(args)
    if args.stage == "tune":
        raise UserError(f"{args.config}: has no search_space; tune YAMLs are in configs/tune/")
    cfg = common.load_config(Config, args.config, args.overrides, demo=args.demo)
    if args.stage == "compare":
        return compare(cfg)
    if args.fresh and args.stage == "evaluate":
        raise UserError("--fresh starts a run again; --stage evaluate needs a trained one")
    if args.demo:
        if any(override.startswith("data.dir=") for override in args.overrides):
            raise UserError("--demo brings its own data; leave one of --demo and data.dir= out")
        cfg.data.dir = demo_data.write_coco("data/demo/coco_heads")
    check_settings(cfg)
    cfg.fresh = args.fresh
    common.check_run(cfg)  # before the data are loaded; nothing is written or moved until they are
    data = load_data(cfg)
    if args.fresh:
        common.open_run(cfg, data.fingerprint)
    for split, rows in data.splits.items():
        print(f"{split:5} {len(data.image_index[rows].unique()):7,} images {len(rows):8,} captions")
    if args.stage == "split":
        return print(start(cfg, data)[0] / "splits.json")
    if args.stage in ("all", "train"):
        history = train(cfg, data)
        if cfg.evaluation.plots:
            plot_training(Path(cfg.output_dir), cfg, history, data.synthetic)
    if args.stage in ("all", "evaluate"):
        print(f"\n{report(evaluate(cfg, data))}")
    print(f"files: {cfg.output_dir}/ (results.json, metrics.csv, best_model.pt, evaluation_results/)")


if __name__ == "__main__":
    sys.exit(main())
