"""Matryoshka vision-text alignment: can one 4096-d embedding be cut to 128 dimensions with little loss?

Two encoders (frozen pretrained ones, or a ViT and a text transformer from scratch), attention pooling and an MLP projector each, trained on PixMo
images and captions by InfoNCE on the whole embedding and on its prefixes. Papers: Kusupati et al. 2022 (MRL), arXiv 2205.13147; Deitke et al. 2024
(PixMo), arXiv 2409.17146.

    python exp_pixmo_mrl.py configs/pixmo_scratch.yaml dataset.train_parquet=... dataset.val_parquet=... dataset.test_parquet=...
    python exp_pixmo_mrl.py configs/pixmo_scratch.yaml --demo       # rendered scenes, under 90 s on two CPU cores
    python exp_pixmo_mrl.py configs/pixmo_alignment.yaml            # CLIP ViT-L/14-336 and mpnet, frozen (needs transformers and a GPU)
    python exp_pixmo_mrl.py configs/pixmo_scratch.yaml --stage embed dim=64 parquet=more.parquet        # embeddings.pt of any parquet
    python exp_pixmo_mrl.py configs/pixmo_scratch.yaml --stage compare compare='[results/pixmo_scratch, results/pixmo_scratch_nomrl]'

It prints retrieval at every dimension last, beside chance and PCA; pixmo_scratch_nomrl.yaml is the control without MRL.

Shapes: B pairs a batch, N of a split, T tokens (patches or text), W width of an encoder, D = projection_dim, d one of the Matryoshka dimensions.

Deviations from the recipe this follows:
- every prefix is L2-normalised again (normalising the whole vector only leaves short prefixes at a wrong temperature);
- pooling comes before the projector, which is an MLP: one linear map of W < D features cannot fill D dimensions;
- rows without a caption (text dropout) and rows of equal image or caption are not each other's negatives (`text_dropout_mode: literal`: they are);
- the cosine schedule stays at 0 past its end; resuming is exact, and a finished run is not trained again.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import collections
import contextlib
import dataclasses
import glob
import hashlib
import heapq
import itertools
import json
import math
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
import demo_data
from common import UserError, ranged

# ---------------------------------------------------------------------------------------------------------------- config

@dataclass
class DatasetConfig:
    train_parquet: str = "pixmo/pixmo_train.parquet"  # a file, a folder, or a glob
    val_parquet: str = "pixmo/pixmo_val.parquet"  # chooses the epoch
    test_parquet: str = ""  # reported (empty: the validation split is, and the report says so)
    batch_size: int = ranged(64, ">= 2")  # pairs a step
    image_size: int = ranged(0, ">= 0")  # pixels a side (0: what a pretrained encoder asks for, else 224)
    random_crop: float = ranged(0.875, "> 0", "<= 1")  # side of the training crop, relative to the stored square
    horizontal_flip_prob: float = ranged(0.0, ">= 0", "<= 1")  # captions often say left and right
    max_text_length: int = ranged(512, ">= 2")  # tokens; longer captions are cut (a pretrained encoder may allow less)
    text_dropout_prob: float = ranged(0.1, ">= 0", "< 1")  # captions replaced by "" in training
    text_dropout_mode: Literal["masked", "literal"] = "masked"  # literal: dropped and duplicate captions stay negatives
    max_pixels: int = ranged(100_000_000, ">= 1")  # images with more are left out unread
    shuffle_rows: int = ranged(2048, ">= 1")  # row groups are shuffled, then rows within windows of at least so many
    cache: bool = True  # keep decoded images (uint8, size**2 * 3 bytes each); false: decode at every use
    cache_dir: str = "data/cache/pixmo"  # indexes, captions and decoded images


@dataclass
class VisionConfig:
    name: str = "scratch"  # scratch, or a model of the Hugging Face hub or a folder (frozen)
    projection_dim: int = ranged(4096, ">= 2")  # D, of both encoders
    mrl_dimensions: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128], metadata={"bounds": (">= 1",)})  # besides projection_dim
    use_attention_pooling: bool = True  # false: mean over the tokens
    pooling_type: Literal["simple", "multihead"] = "simple"  # one score a token, or a learned query in `pooling_heads` heads
    pooling_heads: int = ranged(8, ">= 1")  # of multihead
    projector: Literal["mlp", "linear"] = "mlp"  # LayerNorm, then two layers or one
    width: int = ranged(384, ">= 8")  # of the scratch ViT
    depth: int = ranged(12, ">= 1")  # blocks
    heads: int = ranged(6, ">= 1")  # attention heads
    patch_size: int = ranged(16, ">= 1")  # pixels
    dropout: float = ranged(0.0, ">= 0", "< 1")  # in the scratch blocks


@dataclass
class TextConfig:
    name: str = "scratch"  # scratch, or a model of the Hugging Face hub or a folder (frozen)
    use_attention_pooling: bool = True  # false: mean over the tokens
    pooling_type: Literal["simple", "multihead"] = "simple"  # as of the vision encoder
    pooling_heads: int = ranged(8, ">= 1")  # of multihead
    projector: Literal["mlp", "linear"] = "mlp"  # as of the vision encoder
    width: int = ranged(384, ">= 8")  # of the scratch transformer
    depth: int = ranged(6, ">= 1")  # blocks
    heads: int = ranged(6, ">= 1")  # attention heads
    vocab_size: int = ranged(8192, ">= 258")  # of the byte-level BPE built from the training captions
    dropout: float = ranged(0.0, ">= 0", "< 1")  # in the scratch blocks


@dataclass
class LossConfig:
    contrastive: float = ranged(0.25, ">= 0")  # weight of InfoNCE on all D dimensions
    mrl: float = ranged(1.0, ">= 0")  # weight of the Matryoshka loss (0: the control without it)
    mrl_weights: list[float] = field(default_factory=list, metadata={"bounds": ("> 0",)})  # a dimension, from the largest (empty: equal)
    sample_single_mrl_dim: bool = True  # one dimension a step, drawn by its weight; false: all of them
    temperature: float = ranged(0.07, "> 0")  # of the softmax; where it starts if it is learned
    learnable_temperature: bool = False  # train log(1 / temperature), kept at log(100) or below


@dataclass
class OptimizationConfig:
    lr: float = ranged(2e-4, "> 0")  # AdamW, after warm-up
    weight_decay: float = ranged(0.01, ">= 0")  # on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"bounds": (">= 0", "< 1")})  # of AdamW
    max_grad_norm: float = ranged(1.0, "> 0")  # gradients are scaled down to this norm
    warmup_ratio: float = ranged(0.1, ">= 0", "< 1")  # share of the steps
    num_epochs: int = ranged(10, ">= 1")  # passes over the training rows
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # autocast; auto: bf16 on a GPU that has it, fp16 on another, else fp32
    gradient_checkpointing: bool = False  # recompute the scratch blocks in backward: less memory, a third more time
    save_every_steps: int = ranged(500, ">= 1")  # checkpoint_latest.pt within an epoch
    save_every_epochs: int = ranged(0, ">= 0")  # keep checkpoint_epoch_*.pt (0: none)
    log_every: int = ranged(50, ">= 1")  # steps between rows of metrics.csv
    compile: bool = False  # torch.compile the scratch encoders


@dataclass
class EvaluationConfig:
    shortlists: list[int] = field(default_factory=lambda: [10, 50, 200], metadata={"bounds": (">= 1",)})  # candidates of adaptive retrieval
    n_pca: int = ranged(5000, ">= 2")  # training pairs that the PCA is fitted on
    projection: Literal["pca", "tsne"] = "pca"  # of embedding_space.png
    plots: bool = True  # draw the PNGs


@dataclass
class Config:
    experiment: str = "pixmo_mrl"  # which script a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, crops, dropped captions, drawn dimensions
    device: str = "auto"  # auto | cuda | mps | cpu
    num_workers: int = ranged(4, ">= 0")  # threads that decode images (0: the main one)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv to Weights & Biases
    compare: list[str] = field(default_factory=list)  # run folders for --stage compare
    dim: int = ranged(0, ">= 0")  # of --stage embed (0: projection_dim)
    parquet: str = ""  # input of --stage embed (empty: the test split, else the validation split)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    vision_encoder: VisionConfig = field(default_factory=VisionConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def mrl_dims(vision):
    """All dimensions that are trained and measured, ascending, without duplicates: mrl_dimensions and projection_dim."""
    return sorted({*vision.mrl_dimensions, vision.projection_dim})


def check(cfg):
    """Raises UserError for keys that do not fit each other, or a device that is not there."""
    common.pick_device(cfg.device)
    v, t, losses = cfg.vision_encoder, cfg.text_encoder, cfg.losses
    if max(v.mrl_dimensions, default=1) > v.projection_dim:
        raise UserError(f"vision_encoder.mrl_dimensions: {max(v.mrl_dimensions)} is more than vision_encoder.projection_dim={v.projection_dim}")
    if losses.mrl_weights and len(losses.mrl_weights) != len(mrl_dims(v)):
        raise UserError(f"losses.mrl_weights: expected one for each of {mrl_dims(v)[::-1]}, found {len(losses.mrl_weights)}")
    if losses.contrastive == losses.mrl == 0:
        raise UserError("losses.contrastive and losses.mrl are both 0; nothing would be trained")
    if losses.learnable_temperature and losses.temperature < 0.01:
        raise UserError(f"losses.temperature={losses.temperature}: a learned one stays at 0.01 or above")
    if len(cfg.optimization.betas) != 2:
        raise UserError(f"optimization.betas: expected two numbers, found {cfg.optimization.betas}")
    for name, section in (("vision_encoder", v), ("text_encoder", t)):
        for key in ("heads", *(["pooling_heads"] if section.use_attention_pooling and section.pooling_type == "multihead" else [])):
            if section.name == "scratch" and section.width % getattr(section, key):
                raise UserError(f"{name}.width={section.width} is not a multiple of {name}.{key}={getattr(section, key)}")
    size = cfg.dataset.image_size or 224
    if v.name == "scratch" and size % v.patch_size:
        raise UserError(f"dataset.image_size={size} is not a multiple of vision_encoder.patch_size={v.patch_size}")


# --------------------------------------------------------------------------------------------------------------- parquet

IMAGE_COLUMNS, CAPTION_COLUMNS = ("image_bytes", "image", "jpg", "bytes"), ("caption", "text", "captions", "transcripts")
ID_COLUMNS = ("image_id", "id", "key", "image_url", "url")


def parquet_files(pattern, key):
    """The sorted parquet files of a file, folder or glob. Raises: UserError naming the config key."""
    if not pattern:
        raise UserError(f"{key} is empty; name a parquet file, a folder or a glob, or try --demo")
    path = Path(pattern).expanduser()
    found = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path] if path.is_file() else [
        Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise UserError(f"{key}={pattern}: no parquet files there; download allenai/pixmo-cap with its images (README, 'Data'), point {key}= at it, "
                        "or try --demo")
    return found


def open_parquet(path):
    """(pyarrow ParquetFile, image column, caption column, id column or None). Raises: UserError naming file and columns."""
    import pyarrow
    import pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)  # by default a row group is read whole, however few rows are asked for
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    kinds, is_binary = {f.name: f.type for f in file.schema_arrow}, (lambda k: pyarrow.types.is_binary(k) or pyarrow.types.is_large_binary(k))

    def holds_bytes(kind):
        return is_binary(kind) or (pyarrow.types.is_struct(kind) and any(f.name == "bytes" and is_binary(f.type) for f in kind))
    image = next((c for c in IMAGE_COLUMNS if c in kinds and holds_bytes(kinds[c])), None)
    caption = next((c for c in CAPTION_COLUMNS if c in kinds), None)
    if image is None:
        urls = [c for c in kinds if "url" in c.lower()]
        raise UserError(f"{path}: holds no image bytes (columns {', '.join(kinds)}); expected one of {', '.join(IMAGE_COLUMNS)}, binary or a struct "
                        f"with `bytes`{f'. {urls[0]} only says where the images are: use a release that embeds them' if urls else ''}")
    if caption is None:
        raise UserError(f"{path}: no captions (columns {', '.join(kinds)}); expected one of {', '.join(CAPTION_COLUMNS)}")
    return file, image, caption, next((c for c in ID_COLUMNS if c in kinds), None)


def read_group(path, group):
    """Yields (image bytes or None, list of captions, id or None) for each row of a row group, 64 rows (and a page) in memory at a time.

    Raises: UserError naming file and row group.
    """
    import pyarrow

    def plain(scalar):
        try:
            return scalar.as_py()
        except UnicodeDecodeError:  # some writers do not check that a string is UTF-8
            return None
    file, image, caption, key = open_parquet(path)
    with file:
        try:
            for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[c for c in (image, caption, key) if c], use_threads=False):
                images = batch.column(image)
                images = images.field("bytes") if pyarrow.types.is_struct(images.type) else images
                keys = batch.column(key) if key else [pyarrow.scalar(None)] * len(batch)
                for data, text, name in zip(images, batch.column(caption), keys, strict=True):
                    text, name = plain(text), plain(name)
                    yield data.as_py(), [t.strip() for t in (text if isinstance(text, list) else [text]) if isinstance(t, str) and t.strip()], name
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: row group {group} cannot be read ({str(error).splitlines()[0]}); download the file again") from None


def decode_image(data, size, max_pixels=100_000_000):
    """The centre square of an image file as uint8 [size, size, 3]; see common.decode_image."""
    return common.decode_image(data, size, max_pixels=max_pixels)


@dataclass
class Split:
    """The rows of some parquet files that hold an image and a caption. `position` numbers all rows, good and bad, over all files."""
    name: str
    files: list  # paths
    groups: np.ndarray  # [G, 4] int: file, row group in it, first position, first row in the file
    position: np.ndarray  # [N] of the good rows, ascending
    captions: list  # [N] lists of str, at least one each
    ids: list  # [N] of the id column, else "<file>:<row>"
    same: np.ndarray  # [N] int: rows that share an image or a caption carry the same number
    image_hash: np.ndarray  # [N] uint64 of the encoded bytes
    bad: list  # [(file, row, cause)]
    size: int  # of the stored square
    max_pixels: int
    pixels: np.ndarray | None  # [positions, size, size, 3] uint8, memory-mapped; None: decoded at every use
    window: int  # shuffle_rows
    fingerprint: str
    tokens: list = None  # [N] lists of int32 arrays, one a caption
    held: dict = field(default_factory=collections.OrderedDict)  # row group -> encoded images, when there are no pixels

    def __len__(self):
        return len(self.position)

    def place(self, position):
        """(name of the file, row in it) of a position."""
        file, _, first, row = self.groups[np.searchsorted(self.groups[:, 2], position, side="right") - 1]
        return self.files[file].name, int(row + position - first)


def group_equal(*keys):
    """[N] int: the smallest index of a row's connected component, rows being joined by any equal key; keys: [N] lists of lists of hashables."""
    parent = list(range(len(keys[0])))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i
    for column in keys:
        seen = {}
        for i, values in enumerate(column):
            for value in values:
                a, b = root(i), root(seen.setdefault(value, i))
                parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(parent))], dtype=np.int64)


def prepare(pattern, key, cfg, size):
    """Split of a parquet file, folder or glob: every image is decoded once, the good rows are indexed and, with dataset.cache, kept.

    Work that a kill interrupts goes on at the next row group. Raises: UserError (no files, no columns, no good row, no room on the disk).
    """
    d, files, name = cfg.dataset, parquet_files(pattern, key), key.split(".")[-1].removesuffix("_parquet")
    groups, n = [], 0
    for number, path in enumerate(files):
        metadata, start = open_parquet(path)[0].metadata, n
        for group in range(metadata.num_row_groups):
            groups.append((number, group, n, n - start))
            n += metadata.row_group(group).num_rows
    source = common.fingerprint(files, whole=1 << 26, blocks=16)
    recipe = json.dumps([source, size, d.max_pixels, d.cache, "centre square, bicubic, 2"])
    folder = Path(d.cache_dir) / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    index, image_file = folder / "rows.jsonl", folder / "pixels.uint8"
    shape, done = (n, size, size, 3), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"dataset.cache_dir={d.cache_dir} cannot be written ({error.strerror}); set another") from None
    if d.cache and not (image_file.exists() and image_file.stat().st_size == math.prod(shape)):
        index.unlink(missing_ok=True)  # the images are lost or cut short: all over again
    if index.exists():
        for line in index.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                done[entry["group"]] = entry
            except (ValueError, KeyError):  # the line that a kill cut short; its row group is read again
                continue
    missing = [i for i in range(len(groups)) if i not in done]
    if missing and d.cache:
        with open(image_file, "ab") as file:
            file.truncate(math.prod(shape))  # full of holes: takes no room yet
            room = shutil.disk_usage(folder).free - len(missing) / len(groups) * math.prod(shape)
        if room < 0:
            raise UserError(f"{folder}: {math.prod(shape) / 1e9:.2g} GB of decoded images do not fit, {-room / 1e9:.2g} GB are missing; "
                            "set dataset.cache_dir=, or dataset.cache=false to decode at every use")
    if missing:
        with mapper(cfg.num_workers) as each, open(index, "ab") as log, open(image_file, "r+b") if d.cache else contextlib.nullcontext() as pixels:
            if log.tell():
                log.write(b"\n")  # ends a line that a kill cut short
            started = time.time()
            for count, i in enumerate(common.progress(missing, f"decoding {name}"), 1):
                done[i] = decode_group(files[groups[i][0]], groups[i], i, size, d.max_pixels, each, pixels)
                log.write(f"{json.dumps(done[i])}\n".encode())
                log.flush()
                if not sys.stderr.isatty() and time.time() - started > 30:
                    started = time.time()
                    print(f"decoding {name}: {count} of {len(missing)} row groups", flush=True)
    good, bad = [], []
    for i, (number, _, first, start) in enumerate(groups):
        file = files[number].name
        good += [(first + row, captions, f"{file}:{start + row}" if own is None else str(own), int(image_hash, 16))
                 for row, captions, own, image_hash in done[i]["good"]]
        bad += [(file, start + row, cause) for row, cause in done[i]["bad"]]
    if not good:
        raise UserError(f"{key}={pattern}: none of {n:,} rows holds an image and a caption (the first: {bad[0][2] if bad else 'no rows'})")
    position, captions, ids, hashes = map(list, zip(*good, strict=True))
    return Split(name, files, np.array(groups), np.array(position), captions, ids, group_equal([[h] for h in hashes], captions),
                 np.array(hashes, dtype=np.uint64), bad, size, d.max_pixels,
                 np.memmap(image_file, dtype=np.uint8, mode="r", shape=shape) if d.cache else None, d.shuffle_rows, source)


@contextlib.contextmanager
def mapper(n_threads):
    """`map`, over so many threads (0: the plain one)."""
    if not n_threads:
        yield map
        return
    with ThreadPoolExecutor(n_threads) as pool:
        yield pool.map


def decode_group(path, group, number, size, max_pixels, each, pixels):
    """The index entry of a row group, {group, good: [(row, captions, id, hash)], bad: [(row, cause)]}; writes its images to `pixels`.

    each: `map`, or that of a pool. Raises: OSError that says what to do where the images cannot be written.
    """
    entry = {"group": number, "good": [], "bad": []}

    def work(item):
        row, (data, texts, name) = item
        try:
            image = decode_image(data, size, max_pixels)
            if not texts:
                raise ValueError("no caption")
        except ValueError as error:
            return None, (row, str(error))
        return image, (row, texts, name if isinstance(name, (int, str)) else None, hashlib.sha256(data).hexdigest()[:16])

    rows = enumerate(read_group(path, group[1]))
    try:
        while chunk := list(itertools.islice(rows, 64)):  # so that a pool never holds a whole row group
            for image, found in each(work, chunk):
                entry["bad" if image is None else "good"].append(found)
                if pixels and image is not None:
                    pixels.seek((group[2] + found[0]) * image.size)
                    pixels.write(image.tobytes())
        if pixels:
            pixels.flush()
            os.fsync(pixels.fileno())
    except OSError as error:  # of writing: what cannot be read is a UserError
        raise OSError(f"{pixels.name} could not be written ({error.strerror}); what is decoded is kept, and the same command goes on once there is "
                      "room, or set dataset.cache=false") from None
    return entry


def gather_images(split, rows, each=map):
    """uint8 [B, size, size, 3] of rows of a split: from the cache, or decoded from the row groups, of which those of a window are held."""
    positions = split.position[rows]
    if split.pixels is not None:
        return split.pixels[positions]
    group_of = np.searchsorted(split.groups[:, 2], positions, side="right") - 1
    wanted = list(dict.fromkeys(group_of.tolist()))
    for group in wanted:
        if group not in split.held:
            number, inside = split.groups[group, :2]
            split.held[group] = [data for data, _, _ in read_group(split.files[number], int(inside))]
        split.held.move_to_end(group)
    data = [split.held[g][p - split.groups[g, 2]] for g, p in zip(group_of, positions, strict=True)]
    while len(split.held) > len(wanted) and sum(map(len, split.held.values())) > 2 * split.window:
        split.held.popitem(last=False)
    return np.stack(list(each(lambda x: decode_image(x, split.size, split.max_pixels), data)))


# ---------------------------------------------------------------------------------------------------------------- tokens

WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
PAD, START, BYTE = 0, 1, 2  # ids: padding, the start of a text, and byte 0


class Tokenizer:
    """Byte-level BPE over lower-cased text (Sennrich et al. 2016, arXiv 1508.07909, on bytes): every text starts with START and has a code."""

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.known = {}

    def __len__(self):
        return BYTE + 256 + len(self.merges)

    @classmethod
    def train(cls, captions, vocab_size):
        """The most frequent pairs, merged one after the other; of equal ones the smaller ids first. captions: iterable of str."""
        counts = collections.Counter(word for text in captions for word in WORD.findall(text.lower()))
        words = [([BYTE + b for b in word.encode()], n) for word, n in sorted(counts.items())]
        pairs, where = collections.Counter(), collections.defaultdict(set)
        for i, (ids, n) in enumerate(words):
            for pair in itertools.pairwise(ids):
                pairs[pair] += n
                where[pair].add(i)
        heap = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(heap)
        merges = []
        while heap and BYTE + 256 + len(merges) < vocab_size:
            negative, pair = heapq.heappop(heap)
            if -negative != pairs[pair]:  # an outdated entry; the pair is in the heap again with its count of now
                continue
            if -negative < 2:
                break
            new, changed = BYTE + 256 + len(merges), set()
            merges.append(pair)
            for i in where.pop(pair):
                ids, n = words[i]
                for old in itertools.pairwise(ids):
                    pairs[old] -= n
                    changed.add(old)
                ids[:] = merge(ids, pair, new)
                for now in itertools.pairwise(ids):
                    pairs[now] += n
                    where[now].add(i)
                    changed.add(now)
            for other in changed - {pair}:
                if pairs[other] > 0:
                    heapq.heappush(heap, (-pairs[other], other))
        return cls(merges)

    def word(self, word):
        ids = [BYTE + b for b in word.encode()]
        while len(ids) > 1:
            pair = min(itertools.pairwise(ids), key=lambda p: self.rank.get(p, math.inf))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, BYTE + 256 + self.rank[pair])
        return ids

    def __call__(self, texts, max_length):
        """[int32 array of at most max_length ids, ...] of a list of str."""
        out = []
        for text in texts:
            ids = [START]
            for word in WORD.findall(text.lower()):
                if word not in self.known:
                    self.known[word] = self.word(word)
                ids += self.known[word]
            out.append(np.array(ids[:max_length], dtype=np.int32))
        return out


def merge(ids, pair, new):
    """ids with every occurrence of a pair replaced by one new id, from left to right."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def pretrained(name, what):
    """(facts, model part) of `transformers` by name or folder; what: "vision" or "text". Raises: UserError with the remedy."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{what}_encoder.name={name} needs the package: pip install transformers (or {what}_encoder.name=scratch)") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(name)
        if what == "vision":
            processor = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)[0]
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub, the files and the network raise kinds of their own
        raise UserError(f"{what}_encoder.name={name} cannot be loaded ({' '.join(str(error).split())[:200]}); give a model of the hub or a folder, "
                        f"or {what}_encoder.name=scratch") from None
    model = getattr(model, f"{what}_model", model)
    model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    model = model.float().eval().requires_grad_(False)  # some are stored in half precision: autocast alone decides on that here
    if what == "vision":
        size = getattr(model.config, "image_size", None) or 224
        return {"mean": processor.get("image_mean") or [0.5] * 3, "std": processor.get("image_std") or [0.5] * 3,
                "image_size": size[0] if isinstance(size, (list, tuple)) else size}, model
    pad = tokenizer.pad_token_id or 0

    def tokenize(texts, max_length):  # a text without any token (some have no start or end token) is one of padding
        return [np.array(ids or [pad], dtype=np.int32) for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]]
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)
    return {"tokenizer": tokenize, "pad": pad, "max_length": min(limits)}, model


def load_encoders(cfg):
    """({vision | text: frozen module} of the pretrained ones, facts {image_size, mean, std, pad, max_length[, tokenizer]} of both encoders).

    Raises: UserError if one cannot be loaded, or does not take the config's image size, text length or pooling heads.
    """
    d, encoders = cfg.dataset, {}
    facts = {"image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "pad": PAD, "max_length": math.inf}
    for part, section in (("vision", cfg.vision_encoder), ("text", cfg.text_encoder)):
        if section.name != "scratch":
            known, encoders[part] = pretrained(section.name, part)
            facts |= known
            width = encoders[part].config.hidden_size
            if section.use_attention_pooling and section.pooling_type == "multihead" and width % section.pooling_heads:
                raise UserError(f"{part}_encoder.pooling_heads={section.pooling_heads} does not divide the width {width} of {section.name}")
    own_size = facts["image_size"]
    facts |= {"image_size": d.image_size or own_size, "max_length": min(d.max_text_length, facts["max_length"])}
    for part, module in encoders.items():
        try:  # the largest inputs that there will be
            if part == "vision":
                Frozen(module)(torch.zeros(1, 3, facts["image_size"], facts["image_size"]))
            else:
                tokens = torch.from_numpy(facts["tokenizer"](["a " * facts["max_length"]], facts["max_length"])[0])[None].long()
                Frozen(module)(tokens, torch.ones_like(tokens, dtype=torch.bool))
        except Exception as error:  # transformers raises kinds of its own
            key, remedy = ((f"image_size={facts['image_size']}", f"leave it 0 for the encoder's own {own_size}") if part == "vision" else
                           (f"max_text_length={facts['max_length']}", "lower it"))
            raise UserError(f"dataset.{key}: {getattr(cfg, f'{part}_encoder').name} does not take it ({' '.join(str(error).split())[:120]}); "
                            f"{remedy}") from None
    return encoders, facts


# ------------------------------------------------------------------------------------------------------------------ data

@dataclass
class Data:
    """The splits, and what turns their rows into batches."""
    sets: dict  # train | val | test -> Split
    splits: dict  # the same names -> [N] row numbers, torch.arange
    tokenizer: object  # (list of str, longest) -> [int32 array, ...]
    encoders: dict  # vision | text -> frozen module, of pretrained ones
    image_size: int
    mean: torch.Tensor  # [3] of pixels in 0..255, on the device
    std: torch.Tensor
    pad: int  # token id
    max_length: int  # tokens
    empty: np.ndarray  # tokens of ""
    dropout: float
    literal: bool
    flip: float
    seed: int
    device: torch.device
    fingerprint: str
    synthetic: bool


def load_data(cfg, tokenizer=None, only=None):
    """Data of cfg: train, val and, if there is one, test. Raises: UserError naming file or key.

    tokenizer: of a finished run (else it is built from the training captions). only: (pattern, config key), to load nothing but that as `embed`.
    """
    check(cfg)
    d = cfg.dataset
    keys = {name: (getattr(d, f"{name}_parquet"), f"dataset.{name}_parquet") for name in ("train", "val", "test") if name != "test" or d.test_parquet}
    keys = {"embed": only} if only else keys
    files = [path for pattern, key in keys.values() for path in parquet_files(pattern, key)]
    metadata = [open_parquet(path)[0].schema_arrow.metadata or {} for path in files]  # what is missing is said before minutes of decoding
    encoders, facts = load_encoders(cfg)
    sets = {name: prepare(pattern, key, cfg, round(facts["image_size"] / d.random_crop)) for name, (pattern, key) in keys.items()}
    leave_out_overlap(sets)
    if small := [name for name, split in sets.items() if len(split) < 2 and not only]:
        raise UserError(f"dataset.{small[0]}_parquet: one pair is no data to tell apart; give at least two")
    tokenizer = facts.get("tokenizer") or tokenizer or build_tokenizer(sets["train"], cfg.text_encoder.vocab_size, d.cache_dir)
    for split in sets.values():
        flat = iter(tokenizer([text for texts in split.captions for text in texts], facts["max_length"]))
        split.tokens = [list(itertools.islice(flat, len(texts))) for texts in split.captions]
    digest = hashlib.sha256(" ".join(f"{name}={split.fingerprint}" for name, split in sets.items()).encode()).hexdigest()[:16]
    return make_data(cfg, sets, tokenizer, encoders, facts, digest, any(b"synthetic" in m for m in metadata))


def make_data(cfg, sets, tokenizer, encoders, facts, fingerprint, synthetic):
    """Data of splits whose tokens are there; encoders, facts: of `load_encoders`."""
    d, device = cfg.dataset, common.pick_device(cfg.device)
    return Data(sets, {name: torch.arange(len(split)) for name, split in sets.items()}, tokenizer, encoders, facts["image_size"],
                255 * torch.tensor(facts["mean"], device=device), 255 * torch.tensor(facts["std"], device=device), facts["pad"], facts["max_length"],
                tokenizer([""], facts["max_length"])[0], d.text_dropout_prob, d.text_dropout_mode == "literal", d.horizontal_flip_prob, cfg.seed,
                device, fingerprint, synthetic)


def leave_out_overlap(sets):
    """Take the rows out of train whose image is in val or test, and out of val those in test: a split is by image."""
    for name, later in (("train", ("val", "test")), ("val", ("test",))):
        for other in later:
            if name not in sets or other not in sets:
                continue
            split = sets[name]
            twice = np.isin(split.image_hash, sets[other].image_hash)
            if twice.all():
                raise UserError(f"dataset.{name}_parquet and dataset.{other}_parquet hold the same images; a split needs images of its own")
            split.bad += [(*split.place(position), f"its image is also in {other}") for position in split.position[twice]]
            for part in ("position", "same", "image_hash"):
                setattr(split, part, getattr(split, part)[~twice])
            for part in ("captions", "ids"):
                setattr(split, part, list(itertools.compress(getattr(split, part), ~twice)))


def build_tokenizer(split, vocab_size, cache_dir, n_captions=200_000):
    """Tokenizer from (at most n_captions of) the captions of a split, kept in cache_dir."""
    captions = [text for texts in split.captions for text in texts]
    captions = captions[::-(-len(captions) // n_captions)]
    name = hashlib.sha256("\0".join([str(vocab_size), *captions]).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"tokenizer_{name}.json"
    if not path.exists():
        common.write_json(path, {"merges": Tokenizer.train(captions, vocab_size).merges})
    return Tokenizer(common.read_json(path)["merges"])


def uniform(seed, epoch, rows, what):
    """[n] float64 in [0, 1): a pure function of its arguments (SplitMix64, Steele et al. 2014), whatever the batch or the number of threads."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {epoch} {what}".encode()).digest()[:8], "little")
    x = np.asarray(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def gather(data, rows, split="train", epoch=None, each=map):
    """A batch on the host: squares uint8 [B, S, S, 3], where to cut and whether to flip them, token ids. epoch: of training; None: no randomness."""
    s, rows = data.sets[split], np.asarray(rows)
    images, n, margin = gather_images(s, rows, each), len(rows), s.size - data.image_size
    top = left = np.full(n, margin // 2)
    flip = dropped = np.zeros(n, dtype=bool)
    texts = [s.tokens[r][0] for r in rows]
    if epoch is not None:
        draw = {what: uniform(data.seed, epoch, s.position[rows], what) for what in ("top", "left", "flip", "caption", "drop")}
        top, left = (np.floor(draw[side] * (margin + 1)).astype(np.int64) for side in ("top", "left"))
        flip, dropped = draw["flip"] < data.flip, draw["drop"] < data.dropout
        texts = [data.empty if gone else s.tokens[r][int(u * len(s.tokens[r]))] for r, u, gone in zip(rows, draw["caption"], dropped, strict=True)]
    tokens = np.full((n, max(1, *map(len, texts))), data.pad, dtype=np.int64)
    mask = np.zeros(tokens.shape, dtype=bool)
    for i, text in enumerate(texts):
        tokens[i, :len(text)], mask[i, :len(text)] = text, True
    batch = {"image": images, "top": top, "left": left, "flip": flip, "tokens": tokens, "mask": mask, "ids": np.where(dropped, -1, s.same[rows])}
    batch = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}
    return {name: value.pin_memory() for name, value in batch.items()} if data.device.type == "cuda" else batch


def to_device(data, batch):
    """{image [B, 3, H, H] float, tokens [B, T] int, mask [B, T] bool, ids [B] int}: cropped, flipped and normalised on the device."""
    batch = {name: value.to(data.device, non_blocking=True) for name, value in batch.items()}
    span, image = torch.arange(data.image_size, device=data.device), batch["image"]
    columns = batch["left"][:, None] + torch.where(batch["flip"][:, None], span.flip(0), span)
    image = image[torch.arange(len(image), device=data.device)[:, None, None], (batch["top"][:, None] + span)[:, :, None], columns[:, None]]
    image = ((image - data.mean) / data.std).permute(0, 3, 1, 2)
    return {"image": image, **{name: batch[name] for name in ("tokens", "mask", "ids")}}


def make_batch(data, indices, split="train", epoch=None):
    """A batch of rows [B] of a split on the device, as `to_device` returns it. epoch: draws crops, captions and text dropout; None: none of them."""
    return to_device(data, gather(data, indices, split, epoch))


def prefetched(work, items, depth=2):
    """work(item) of every item in order, computed in a thread up to `depth` items ahead."""
    with ThreadPoolExecutor(1) as thread:
        queue = collections.deque()
        for item in items:
            queue.append(thread.submit(work, item))
            if len(queue) > depth:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def epoch_order(split, seed, epoch):
    """[N] rows in the order of an epoch: row groups shuffled, then rows within windows of whole row groups with at least split.window rows."""
    rng = np.random.default_rng([seed, epoch])
    groups = np.split(np.arange(len(split)), np.searchsorted(split.position, split.groups[1:, 2]))
    order, window = [], []
    for g in rng.permutation(len(groups)):
        window.append(groups[g])
        if sum(map(len, window)) >= split.window:
            order.append(rng.permutation(np.concatenate(window)))
            window = []
    return np.concatenate([*order, *([rng.permutation(np.concatenate(window))] if window else [])])


def steps_per_epoch(cfg, data):
    """Optimisation steps of an epoch; what does not fill a batch waits for another epoch."""
    return max(1, len(data.sets["train"]) // cfg.dataset.batch_size)


def total_steps(cfg, data):
    """Optimisation steps of a run."""
    return cfg.optimization.num_epochs * steps_per_epoch(cfg, data)


def training_batches(cfg, data, first):
    """Batches on the host of the steps from `first` (counted from 0), each a pure function of seed, epoch and place."""
    n, size = steps_per_epoch(cfg, data), cfg.dataset.batch_size

    def items():
        for epoch in range(first // n, cfg.optimization.num_epochs):
            order = epoch_order(data.sets["train"], cfg.seed, epoch)
            for place in range(max(0, first - epoch * n), n):
                yield epoch, order[place * size:(place + 1) * size]
    with mapper(cfg.num_workers) as each:
        yield from prefetched(lambda item: gather(data, item[1], "train", item[0], each), items())


def random_data(cfg):
    """Data of random pixels and tokens in the shapes of cfg, for profile_flops.py where the files are not at hand."""
    check(cfg)
    encoders, facts = load_encoders(cfg)
    rng, n, size = np.random.default_rng(0), cfg.dataset.batch_size, round(facts["image_size"] / cfg.dataset.random_crop)
    tokens = [[row] for row in rng.integers(START, BYTE + 256, (n, facts["max_length"])).astype(np.int32)]
    split = Split("train", [], np.array([[0, 0, 0, n]]), np.arange(n), [["random"]] * n, list(range(n)), np.arange(n), np.arange(n).astype(np.uint64),
                  [], size, 1, rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8), n, "random", tokens)
    tokenizer = facts.get("tokenizer") or Tokenizer([(BYTE, BYTE)] * (cfg.text_encoder.vocab_size - BYTE - 256))
    return make_data(cfg, {"train": split}, tokenizer, encoders, facts, "random", False)


# ----------------------------------------------------------------------------------------------------------------- model

class Block(nn.Module):
    """Pre-norm transformer block on [B, T, W]; mask [B, T] bool: which tokens may be attended to."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, W / heads]
        x = x + F.dropout(self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
                                   .transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class ScratchViT(nn.Module):
    """Patches of [B, 3, H, H] -> [B, T, W] tokens (Dosovitskiy et al. 2021, without a class token)."""

    def __init__(self, c, image_size, checkpointing):
        super().__init__()
        self.width, self.checkpointing = c.width, checkpointing
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.position = nn.Parameter(0.02 * torch.randn((image_size // c.patch_size) ** 2, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.dropout) for _ in range(c.depth))

    def forward(self, image, mask=None):
        return run_blocks(self, self.patches(image).flatten(2).transpose(1, 2) + self.position, mask)


class ScratchText(nn.Module):
    """Token ids [B, T] with their mask -> [B, T, W]; every token attends to all that are no padding."""

    def __init__(self, c, n_tokens, max_length, checkpointing):
        super().__init__()
        self.width, self.checkpointing = c.width, checkpointing
        self.embedding = nn.Embedding(n_tokens, c.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(max_length, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.dropout) for _ in range(c.depth))

    def forward(self, tokens, mask):
        return run_blocks(self, self.embedding(tokens) + self.position[:tokens.shape[1]], mask)


def run_blocks(encoder, x, mask):
    for block in encoder.blocks:
        x = checkpoint(block, x, mask, use_reentrant=False) if encoder.checkpointing and torch.is_grad_enabled() else block(x, mask)
    return x


class Frozen(nn.Module):
    """A pretrained encoder: always in eval mode, without gradients, in no optimizer and no checkpoint (a tuple hides it from nn.Module)."""

    def __init__(self, backbone):
        super().__init__()
        self.hidden, self.width = (backbone,), backbone.config.hidden_size

    @torch.no_grad()
    def forward(self, x, mask=None):
        backbone, = self.hidden
        output = backbone(pixel_values=x) if mask is None else backbone(input_ids=x, attention_mask=mask.long())
        return output.last_hidden_state  # [B, T, W]


class AttentionPooling(nn.Module):
    """[B, T, W] -> [B, W], a weighted mean over the tokens where mask [B, T] is true; zeros for a row without any.

    simple: one learned score a token. multihead: a learned query attends to the tokens in `heads` heads, and a linear map of the result.
    """

    def __init__(self, width, kind, heads):
        super().__init__()
        self.kind, self.heads = kind, heads
        if kind == "simple":
            self.score = nn.Linear(width, 1)
        else:
            self.query = nn.Parameter(torch.randn(heads, width // heads) / (width // heads) ** 0.5)
            self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, mask=None):
        if self.kind == "simple":
            scores, values = self.score(x).transpose(1, 2), x[:, None]  # [B, 1, T], [B, 1, T, W]
        else:
            keys, values = (part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.key, self.value))  # [B, heads, T, W / heads]
            scores = (keys * self.query[:, None]).sum(3) / keys.shape[3] ** 0.5  # [B, heads, T]
        scores = scores.float()
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(2)
        if mask is not None:
            weights = weights * mask[:, None]
        pooled = (weights.to(values.dtype)[:, :, None] @ values).flatten(1)  # [B, W]
        return pooled if self.kind == "simple" else self.out(pooled)


def mean_pooling(x, mask=None):
    """[B, T, W] -> [B, W], the mean over the tokens where mask [B, T] is true; zeros for a row without any."""
    return x.mean(1) if mask is None else (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Tower(nn.Module):
    """An encoder, LayerNorm, pooling at its width, and the projector: inputs [B, ..] with mask -> [B, D], not normalised."""

    def __init__(self, encoder, c, dim):
        super().__init__()
        self.encoder, self.norm = encoder, nn.LayerNorm(encoder.width)
        self.pool = AttentionPooling(encoder.width, c.pooling_type, c.pooling_heads) if c.use_attention_pooling else mean_pooling
        layers = [nn.Linear(encoder.width, dim), nn.GELU(), nn.Linear(dim, dim)] if c.projector == "mlp" else [nn.Linear(encoder.width, dim)]
        self.projector = nn.Sequential(nn.LayerNorm(encoder.width), *layers)

    def forward(self, x, mask=None):
        tokens = self.encoder(x, mask)
        return self.projector(self.pool(self.norm(tokens), mask))


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class MatryoshkaModel(nn.Module):
    """Two towers into one space of D dimensions, with the weights of the loss and the logit scale."""

    def __init__(self, cfg, data):
        super().__init__()
        v, t, losses, again = cfg.vision_encoder, cfg.text_encoder, cfg.losses, cfg.optimization.gradient_checkpointing
        vision = Frozen(data.encoders["vision"]) if v.name != "scratch" else ScratchViT(v, data.image_size, again)
        text = Frozen(data.encoders["text"]) if t.name != "scratch" else ScratchText(t, len(data.tokenizer), data.max_length, again)
        self.vision, self.text = Tower(vision, v, v.projection_dim), Tower(text, t, v.projection_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(losses.temperature)), requires_grad=losses.learnable_temperature)
        self.dims, self.contrastive, self.mrl = mrl_dims(v), losses.contrastive, losses.mrl
        self.weights = [w / sum(losses.mrl_weights) for w in losses.mrl_weights[::-1]] or [1 / len(self.dims)] * len(self.dims)
        self.false_negatives = "ignore" if data.literal else "mask"
        self.max_grad_norm = cfg.optimization.max_grad_norm
        best = "fp32" if data.device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        self.dtype = {"auto": DTYPES[best], **DTYPES}[cfg.optimization.precision]
        self.scaler = torch.amp.GradScaler(data.device.type, enabled=self.dtype == torch.float16)

    @property
    def logit_scale(self):
        return self.log_scale.exp()

    def forward(self, batch):
        """(image [B, D], text [B, D]) in float32, not normalised."""
        with torch.autocast(batch["image"].device.type, self.dtype, enabled=self.dtype != torch.float32):
            image, text = self.vision(batch["image"]), self.text(batch["tokens"], batch["mask"])
        return image.float(), text.float()


def build_model(cfg, data):
    """MatryoshkaModel on the data's device; frozen encoders go there too, those from scratch are compiled if the config says so."""
    model = MatryoshkaModel(cfg, data).to(data.device)
    for tower in (model.vision, model.text):
        if isinstance(tower.encoder, Frozen):
            tower.encoder.hidden[0].to(data.device)
        elif cfg.optimization.compile:
            tower.encoder.compile()
    return model


def build_optimizer(cfg, model):
    """AdamW; weight decay on matrices only: not on biases, norms, positions, embeddings and the logit scale."""
    o, groups = cfg.optimization, ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or name.endswith(("position", "embedding.weight", "query"))].append(parameter)
    return torch.optim.AdamW([{"params": groups[0], "weight_decay": o.weight_decay}, {"params": groups[1], "weight_decay": 0.0}], lr=o.lr,
                             betas=tuple(o.betas), fused=groups[0][0].is_cuda)


# ------------------------------------------------------------------------------------------------------------- objective

def prefix_losses(image, text, dims, logit_scale, ids=None, false_negatives="ignore"):
    """{d: symmetric InfoNCE (0-d, nats) of the first d dimensions, L2-normalised again} for ascending dims; arguments as of `matryoshka_loss`.

    Products and squared norms are accumulated from one dimension to the next, so that all prefixes cost one [N, D] x [D, N] product.
    Raises: ValueError on shapes, dims or false_negatives that do not fit.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(f"image and text must be equal [N, D] with N > 0, found {list(image.shape)} and {list(text.shape)}")
    if not dims or dims[0] < 1 or dims[-1] > image.shape[1]:
        raise ValueError(f"dims must lie in 1..{image.shape[1]}, found {dims}")
    if false_negatives not in ("ignore", "mask") or (false_negatives == "mask" and ids is None):
        raise ValueError(f"false_negatives must be ignore, or mask with ids [N], found {false_negatives!r}")
    image, text = (x if x.dtype == torch.float64 else x.float() for x in (image, text))
    if false_negatives == "mask":
        masked = (ids[:, None] == ids).fill_diagonal_(False)
    losses, scores, norms, last = {}, 0, [0, 0], 0
    with torch.autocast(image.device.type, enabled=False):
        for d in dims:
            a, b = image[:, last:d], text[:, last:d]
            scores = scores + a @ b.T  # [N, N]
            norms = [norms[0] + a.square().sum(1), norms[1] + b.square().sum(1)]
            inverse = [n.clamp(min=torch.finfo(n.dtype).tiny).rsqrt() for n in norms]
            logits = logit_scale * scores * inverse[0][:, None] * inverse[1]
            positive = logits.diagonal()
            if false_negatives == "mask":
                logits = logits.masked_fill(masked, torch.finfo(logits.dtype).min / 4)
            losses[d] = ((logits.logsumexp(0) + logits.logsumexp(1)) / 2 - positive).mean()
            last = d
    return losses


def matryoshka_loss(image, text, dims, logit_scale, weights=None, ids=None, false_negatives="ignore"):
    """Matryoshka InfoNCE: (sum_d w_d L_d / sum_d w_d, {d: L_d}), L_d the symmetric InfoNCE of the first d dimensions, each L2-normalised.

    image, text: [N, D] float, not normalised; row i of one is the partner of row i of the other. dims: ints in 1..D, any order.
    logit_scale: 1 / temperature. weights: one a dimension, in the order of dims (default: equal). ids [N] int with false_negatives="mask": pairs of
    equal id are not each other's negatives. Returns 0-d tensors, float32 (float64 for float64 input).
    Raises: ValueError on shapes, dims or weights that do not fit.
    Source: Kusupati et al. 2022, eq. 1, with InfoNCE for the classification loss.
    """
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims) or min(weights, default=0) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights must be one a dimension, none negative and not all 0, found {weights} for dims {dims}")
    losses = prefix_losses(image, text, sorted(set(dims)), logit_scale, ids, false_negatives)
    return sum(w * losses[d] for w, d in zip(weights, dims, strict=True)) / sum(weights), losses


def objective(model, image, text, ids, drawn=None):
    """{loss, loss_clip, loss_mrl} of raw embeddings [B, D] with ids [B]: loss = contrastive * InfoNCE(D) + mrl * loss_mrl, loss_mrl the loss of the
    drawn dimension, or the weighted mean over all."""
    dims = [drawn] if drawn else model.dims
    losses = prefix_losses(image, text, sorted({*dims, model.dims[-1]}), model.logit_scale, ids, model.false_negatives)
    clip = losses[model.dims[-1]]
    mrl = losses[drawn] if drawn else sum(w * losses[d] for w, d in zip(model.weights, dims, strict=True))
    return {"loss": model.contrastive * clip + model.mrl * mrl, "loss_clip": clip, "loss_mrl": mrl}


def draw_dim(cfg, model, step):
    """The dimension of a step, drawn with probability w_d / sum w as a pure function of seed and step; None: all of them."""
    if not cfg.losses.sample_single_mrl_dim or not cfg.losses.mrl:
        return None
    return int(np.random.default_rng([cfg.seed, step]).choice(model.dims, p=model.weights))


def train_step(model, batch, optimizer, drawn=None):
    """One step -> {loss, loss_clip, loss_mrl (nats), grad_norm before clipping} as 0-d tensors (no synchronisation but fp16's).

    batch: as of `to_device`. drawn: the one dimension of the Matryoshka loss, or None for all.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = objective(model, *model(batch), batch["ids"], drawn)
    model.scaler.scale(losses["loss"]).backward()
    model.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], model.max_grad_norm)
    model.scaler.step(optimizer)
    model.scaler.update()
    if model.log_scale.requires_grad:
        with torch.no_grad():
            model.log_scale.clamp_(max=math.log(100))  # of the parameter: a clamp in the forward pass would leave it without gradient beyond
    return {**{name: value.detach() for name, value in losses.items()}, "grad_norm": norm}


# ------------------------------------------------------------------------------------------------------------ evaluation

@torch.no_grad()
def embed(cfg, model, data, split, rows=None):
    """(image [N, D], text [N, D]) float32 of a split's rows (default: all), not normalised, on the device: centre crops, first captions."""
    model.eval()
    rows = np.arange(len(data.sets[split])) if rows is None else rows
    chunks = [rows[i:i + cfg.dataset.batch_size] for i in range(0, len(rows), cfg.dataset.batch_size)]
    with mapper(cfg.num_workers) as each:
        out = [model(to_device(data, batch)) for batch in prefetched(lambda chunk: gather(data, chunk, split, each=each), chunks)]
    image, text = (torch.cat(parts) for parts in zip(*out, strict=True))
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise FloatingPointError("non-finite embeddings: the weights have overflowed; lower optimization.lr")
    return image, text


@torch.no_grad()
def validate(cfg, model, data):
    """{val/..}: the losses over batches of nearly equal size with every dimension, and R@k of the whole embedding, in percent."""
    image, text = embed(cfg, model, data, "val")
    ids = torch.from_numpy(data.sets["val"].same).to(data.device)
    parts = torch.arange(len(ids)).tensor_split(-(-len(ids) // cfg.dataset.batch_size))
    losses = [objective(model, image[p], text[p], ids[p]) for p in parts]
    row = {f"val/{name}": float(np.average([loss[name].item() for loss in losses], weights=[len(p) for p in parts])) for name in losses[0]}
    found = both_ways(F.normalize(image, dim=1), F.normalize(text, dim=1), ids)
    return row | {f"val/{way}_r{k}": 100 * found[way][f"R@{k}"] for way in WAYS for k in (1, 5, 10)}


WAYS = ("i2t", "t2i")  # images ask for captions, captions for images


def both_ways(image, text, ids):
    """Retrieval of normalised [N, d] embeddings, ids [N]: {i2t: {R@1, R@5, R@10, MRR, median_rank}, t2i: .., R@5_mean of both}; R@k, MRR in 0..1."""
    found = {way: common.retrieval_metrics(a, b, ids, ids, map_ks=()) for way, a, b in zip(WAYS, (image, text), (text, image), strict=True)}
    found = {way: {key: of[key] for key in ("R@1", "R@5", "R@10", "MRR", "median_rank")} for way, of in found.items()}
    return {**found, "R@5_mean": (found["i2t"]["R@5"] + found["t2i"]["R@5"]) / 2}


def geometry(image, text):
    """Of normalised [N, d]: alignment mean |x - y|^2 (Wang & Isola 2020), uniformity log mean exp(-2 |x_i - x_j|^2) over i < j of each side, and the
    distance of the two means (the modality gap of Liang et al. 2022)."""
    def uniformity(x):
        n, sums = len(x), []
        for i in range(0, n, 1024):
            squares = 2 - 2 * x[i:i + 1024] @ x.T
            sums.append((-2 * squares[torch.ones_like(squares, dtype=torch.bool).triu(i + 1)]).logsumexp(0))
        return (torch.stack(sums).logsumexp(0) - math.log(n * (n - 1) / 2)).item()
    return {"alignment": (image - text).square().sum(1).mean().item(), "uniformity_image": uniformity(image), "uniformity_text": uniformity(text),
            "modality_gap": (image.mean(0) - text.mean(0)).norm().item()}


def fit_pca(image, text):
    """(mean of image [D], mean of text [D], axes [D, D], columns by falling variance), float32, of normalised [N, D]; each side is centred by itself.

    `(x - mean) @ axes[:, :d]` is the untrained baseline of d dimensions.
    """
    means = image.double().mean(0), text.double().mean(0)
    centred = torch.cat([image.double() - means[0], text.double() - means[1]])
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)
    return (*(m.float() for m in means), axes.float())


def funnel(queries, gallery, ids, dim, shortlist, seed=0):
    """R@1 (0..1) of adaptive retrieval: the `shortlist` best gallery rows by the first `dim` dimensions, ranked again by all of them.

    queries, gallery: [N, D] normalised; ids: [N] int, which rows belong together. Equal scores in the shortlist come in random order (by seed), in
    the second ranking they share the place; shortlist = N is the exact search. Source: Kusupati et al. 2022, section 4.3.
    """
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(seed)).to(gallery.device)
    gallery, owners, shortlist = gallery[order], ids[order], min(shortlist, len(gallery))
    small = F.normalize(gallery[:, :dim], dim=1)
    hits, size = [], max(1, 2**26 // (shortlist * queries.shape[1]))
    for i in range(0, len(queries), size):
        q = queries[i:i + size]
        top = (F.normalize(q[:, :dim], dim=1) @ small.T).topk(shortlist, dim=1).indices  # [q, shortlist]
        scores = (gallery[top].double() @ q.double()[:, :, None])[:, :, 0].float()
        own = owners[top] == ids[i:i + size, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        level = (scores == best).sum(1)
        hit = (own & (scores == best)).sum(1) / level.clamp(min=1) * (scores <= best).all(1) * own.any(1)
        hits.append(hit.double())
    return torch.cat(hits).mean().item()


def search_times(queries, gallery, settings, n=100):
    """{(dim, shortlist): milliseconds a query} of plain float32 search, one query at a time; (D, 0) is the exact one. The median of n queries."""
    times = {}
    for dim, shortlist in settings:
        small, spent = gallery[:, :dim].contiguous(), []
        for q in queries[:n]:
            start = time.perf_counter()
            found = small @ q[:dim]
            if shortlist:
                found = gallery[found.topk(shortlist).indices] @ q
            found.argmax().item()  # waits for the device
            spent.append(1000 * (time.perf_counter() - start))
        times[dim, shortlist] = float(np.median(spent))
    return times


def read_best(cfg, data, folder):
    """(model, epoch) of best_model.pt. Raises: UserError if training is not finished or the weights do not fit."""
    try:
        state, latest = common.load_checkpoint(folder / "best_model.pt"), common.load_checkpoint(folder / "checkpoint_latest.pt")
    except FileNotFoundError as error:
        raise UserError(f"{error}; a finished run that has lost it starts again with --fresh") from None
    if latest["epoch"] < cfg.optimization.num_epochs:
        raise UserError(f"{folder}: training stopped in epoch {latest['epoch'] + 1} of {cfg.optimization.num_epochs}; "
                        "the same command without --stage goes on")
    model = build_model(cfg, data)
    try:
        model.load_state_dict(state["model_state_dict"])
    except RuntimeError:
        raise UserError(f"{folder / 'best_model.pt'} is of other widths than the config; choose another output_dir=, or --fresh") from None
    return model, state["epoch"]


def evaluate(cfg, data=None):
    """Test the best model at every dimension, against chance and PCA; writes results.json, results.txt and the plots; returns the results (a dict).

    What results.json already holds for the same settings is not computed again. Raises: UserError if the run is not trained to its end, or was made
    with another config or on other data; FloatingPointError on non-finite embeddings.
    """
    folder, data = start(cfg, data)
    model, epoch = read_best(cfg, data, folder)
    name, e, file = "test" if "test" in data.sets else "val", cfg.evaluation, folder / "results.json"
    settings = {"shortlists": sorted(set(e.shortlists)), "n_pca": e.n_pca}
    drawn = not e.plots or (folder / "similarity_matrix.png").exists()  # the last plot
    if drawn and file.exists() and (known := common.read_json(file)).get("evaluation") == settings and known["epoch"] == epoch:
        return known
    with common.full_precision():
        where = torch.device("cpu") if data.device.type == "mps" else data.device  # MPS has no float64
        image, text = (x.to(where) for x in embed(cfg, model, data, name))
        ids = torch.from_numpy(data.sets[name].same).to(where)
        rows = np.random.default_rng(cfg.seed).permutation(len(data.sets["train"]))[:e.n_pca]
        *means, axes = fit_pca(*(F.normalize(x, dim=1).to(where) for x in embed(cfg, model, data, "train", np.sort(rows))))
        whole = [F.normalize(x, dim=1) for x in (image, text)]
        turned = [(x - mean) @ axes for x, mean in zip(whole, means, strict=True)]
        dims, pca, shape = {}, {}, {}
        for d in model.dims:
            cut = [F.normalize(x[:, :d], dim=1) for x in whole]
            dims[str(d)], shape[str(d)] = both_ways(*cut, ids), geometry(*cut)
            pca[str(d)] = both_ways(*(F.normalize(x[:, :d], dim=1) for x in turned), ids)
        chance = common.retrieval_per_query(*whole, ids, ids, map_ks=())
        largest = model.dims[-1]
        adaptive = [{"dim": d, "shortlist": k, "i2t_R@1": funnel(*whole, ids, d, k), "t2i_R@1": funnel(*whole[::-1], ids, d, k),
                     "multiply_adds": len(ids) * d + k * largest} for d in model.dims[:-1] for k in settings["shortlists"] if k <= len(ids)]
        times = search_times(whole[1], whole[0], [(largest, 0), *((a["dim"], a["shortlist"]) for a in adaptive)])
    results = {"experiment": cfg.experiment, "seed": cfg.seed, "synthetic": data.synthetic, "data_fingerprint": data.fingerprint, "split": name,
               "n": len(ids), "n_train": len(data.sets["train"]), "epoch": epoch, "evaluation": settings, "trained_with_mrl": cfg.losses.mrl > 0,
               "unit": "fractions; multiply-adds a query", "dims": dims, "pca": pca,
               "chance": {f"R@{k}": chance[f"chance@{k}"].mean().item() for k in (1, 5, 10)},
               "geometry": shape, "adaptive": adaptive, "exact_multiply_adds": len(ids) * largest,
               "left_out": {part: len(split.bad) for part, split in data.sets.items()}}
    common.record_environment(folder, search_ms={f"{d}, shortlist {k}" if k else "exact": t for (d, k), t in times.items()})
    common.atomic_write(folder / "results.txt", lambda f: f.write(f"{report(results, times)}\n".encode()))
    if e.plots:
        plot_evaluation(folder, cfg, results, whole)
    common.write_json(file, results)
    return results


def retrieval_table(runs):
    """Retrieval at every dimension, of prefixes, of PCA and by chance (R@k and what is kept of the whole's mean R@5 in percent), as text.

    runs: [(label, [results, one a seed]), ...]; several seeds give mean +- sd.
    """
    def cell(values, unit=100, form=".1f"):
        values = unit * np.array(values)
        return f"{values.mean():{form}}" + (f" +- {values.std(ddof=1):{form}}" if len(values) > 1 else "")
    rows, keys = [], {"R@1": (), "R@5": (), "R@10": (), "MRR": (1, ".3f"), "median_rank": (1, ".4g")}
    for label, found in runs:
        whole = [r["dims"][max(r["dims"], key=int)]["R@5_mean"] for r in found]
        for part, mark in (("dims", ""), ("pca", ", PCA")):
            for d in sorted(found[0][part], key=int, reverse=True):
                each = [r[part][d] for r in found]
                mean = [x["R@5_mean"] for x in each]
                rows.append([f"{label}{d}{mark}", *(cell([x[way][key] for x in each], *form) for way in WAYS for key, form in keys.items()),
                             cell(mean), cell([m / max(w, 1e-9) for m, w in zip(mean, whole, strict=True)])])
    chance = [f"{100 * np.mean([r['chance'][key] for _, found in runs for r in found]):.1f}" for key in ("R@1", "R@5", "R@10")]
    rows.append(["chance", *chance, None, None, *chance, None, None, chance[1], None])
    return common.format_table(["dimensions", *(f"{way} {key.split('_')[0]}" for way in WAYS for key in keys), "mean R@5", "% kept"], rows)


def report(r, times):
    """The final tables of results.json's content as text; times: as of `search_times`."""
    dims = sorted(map(int, r["dims"]), reverse=True)
    lines = [f"{r['split']}: {r['n']:,} pairs; epoch {r['epoch']}, seed {r['seed']}, trained {'with' if r['trained_with_mrl'] else 'WITHOUT'} MRL"
             f" on {r['n_train']:,} pairs{'' if r['split'] == 'test' else ' (this split also chose the epoch)'}"
             f"{'  [SYNTHETIC demo data]' if r['synthetic'] else ''}",
             retrieval_table([("", [r])])]
    if r["adaptive"]:
        whole = r["dims"][str(dims[0])]
        rows = [["exact", *(100 * whole[way]["R@1"] for way in WAYS), f"{r['exact_multiply_adds']:,}", f"{times[dims[0], 0]:.3f}"]]
        rows += [[f"{a['dim']}, best {a['shortlist']} again by {dims[0]}", *(100 * a[f"{way}_R@1"] for way in WAYS), f"{a['multiply_adds']:,}",
                  f"{times[a['dim'], a['shortlist']]:.3f}"] for a in r["adaptive"] if a["dim"] in dims[-3:]]  # results.json has them all
        lines += ["", common.format_table(["adaptive retrieval", "i2t R@1", "t2i R@1", "multiply-adds/query", "ms/query"], rows)]
    rows = [[str(d), *(f"{value:.3f}" for value in r["geometry"][str(d)].values())] for d in dims]
    return "\n".join([*lines, "", common.format_table(["geometry", "alignment", "uniformity image", "text", "modality gap"], rows)])


# -------------------------------------------------------------------------------------------------------------- training

def start(cfg, data=None):
    """(run folder, data), after the checks that every stage needs: same config, same data as the folder's run."""
    data = data or load_data(cfg)
    folder = common.open_run(cfg, data.fingerprint)
    return folder, data


TRAIN_COLUMNS, VAL_COLUMNS = ("loss", "loss_clip", "loss_mrl"), (*(f"val/{n}" for n in ("loss", "loss_clip", "loss_mrl")),
                                                                 *(f"val/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)))


def train(cfg, data=None):
    """Train for optimization.num_epochs, resuming exactly, also within an epoch; best_model.pt is the epoch of the lowest validation loss.

    Returns the history: a row every log_every steps and at the end of an epoch, those with the validation columns filled.
    Raises: UserError if the folder's run has another config or other data; FloatingPointError on a non-finite loss, before it can be saved;
    common.Stopped after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    o = cfg.optimization
    folder, data = start(cfg, data)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    per_epoch, last_step = steps_per_epoch(cfg, data), total_steps(cfg, data)
    warmup = round(o.warmup_ratio * last_step)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: common.warmup_cosine(step, last_step, warmup))
    step, history, best, pending, complete = 0, [], None, [], 0
    latest = folder / "checkpoint_latest.pt"
    if latest.exists() or latest.with_name(f"{latest.name}.previous").exists():
        state = common.load_checkpoint(latest)
        step, complete, history, best = state["global_step"], state["epoch"], state["history"], state["best_val_loss"]
        pending = [row.to(data.device) for row in state["position"]["pending"]]
        model.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])
        scheduler.load_state_dict(state["scheduler_state_dict"])
        model.scaler.load_state_dict(state["scaler_state_dict"])
        common.set_rng_state(state["rng"])
        print(f"{folder}: training is complete" if complete >= o.num_epochs else f"resuming {folder} at step {step} of {last_step}")

    def save(path=latest, keep_previous=True):
        common.save_checkpoint(path, {
            "epoch": complete, "global_step": step, "best_val_loss": best, "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict(),
            "scaler_state_dict": model.scaler.state_dict(), "history": history, "config": dataclasses.asdict(cfg), "rng": common.rng_state(),
            "position": {"pending": pending}}, keep_previous)

    if complete < o.num_epochs:
        (folder / "results.json").unlink(missing_ok=True)
        if isinstance(data.tokenizer, Tokenizer):
            common.write_json(folder / "tokenizer.json", {"merges": data.tokenizer.merges})
        rows = [f"{split.name},{file},{row},{json.dumps(cause)}\n" for split in data.sets.values() for file, row, cause in split.bad]
        common.atomic_write(folder / "left_out.csv", lambda file: file.write("".join(["split,file,row,cause\n", *rows]).encode()))
    log = common.RunLog(folder, cfg.wandb and complete < o.num_epochs, dataclasses.asdict(cfg))
    if history:  # a kill may have come between the last checkpoint and this file
        log.write(history)
    started, first, waited = time.time(), step, 0.0
    batches = training_batches(cfg, data, first)
    with common.StopSignal() as stop:
        for step in common.progress(range(first + 1, last_step + 1), "steps"):  # counted from 1: `step` steps are done at the end of the body
            asked = time.time()
            batch = to_device(data, next(batches))
            waited += time.time() - asked
            model.train()
            rate = scheduler.get_last_lr()[0]
            losses = train_step(model, batch, optimizer, draw_dim(cfg, model, step))
            pending.append(torch.stack([*(losses[name] for name in TRAIN_COLUMNS), torch.full_like(losses["loss"], rate)]))
            scheduler.step()
            ends = step % per_epoch == 0
            logs, saves = ends or step % o.log_every == 0, ends or step % o.save_every_steps == 0 or stop.signum
            if logs or saves:  # the host waits for the device only here
                means = torch.stack(pending).cpu()
                if len(bad := (~torch.isfinite(means).all(1)).nonzero()[:, 0]):
                    *values, rate = means[int(bad[0])].tolist()
                    names = [name for name, v in zip(TRAIN_COLUMNS, values, strict=True) if not math.isfinite(v)]
                    raise FloatingPointError(f"non-finite {' and '.join(names)} in step {step - len(pending) + 1 + int(bad[0])}, learning rate "
                                             f"{rate:g}; lower optimization.lr")
            if logs:
                row = {"train/step": step, "train/epoch": step / per_epoch, "train/lr": rate,
                       **{f"train/{name}": value for name, value in zip(TRAIN_COLUMNS, means.mean(0).tolist(), strict=False)},
                       **dict.fromkeys(VAL_COLUMNS)}
                history.append(row)
                pending = []
            if ends:
                rng = common.rng_state()
                row |= validate(cfg, model, data)
                common.set_rng_state(rng)
                complete, better = step // per_epoch, best is None or row["val/loss"] < best
                if better:
                    best = row["val/loss"]
                    common.save_checkpoint(folder / "best_model.pt", {"model_state_dict": model.state_dict(), "config": dataclasses.asdict(cfg),
                                                                      "epoch": complete}, keep_previous=False)
                if o.save_every_epochs and complete % o.save_every_epochs == 0:
                    save(folder / f"checkpoint_epoch_{complete}.pt", keep_previous=False)
                print(f"epoch {complete:3}  loss {row['train/loss']:.4f}  val: loss {row['val/loss']:.4f}  R@1 {row['val/i2t_r1']:.1f} "
                      f"{row['val/t2i_r1']:.1f}  R@10 {row['val/i2t_r10']:.1f} {row['val/t2i_r10']:.1f}{' *' if better else ''}", flush=True)
            if saves:
                save()
            if logs:
                log.write(history)
            if stop.signum and saves:  # a signal that came after the line that decides on saving waits for the next step
                raise common.Stopped(stop.signum, f"stopped at step {step}; the same command resumes from {latest}")
    log.close()
    if step > first:
        seconds = time.time() - started
        common.record_environment(folder, device=str(data.device), train_seconds=round(seconds, 2), pairs_per_second=round(
            (step - first) * cfg.dataset.batch_size / seconds, 1), share_waiting_for_data=round(waited / seconds, 4))
    return history


# ----------------------------------------------------------------------------------------------------------------- plots

def plot_training(folder, cfg, history, synthetic):
    """training_curves.png, loss_components.png, lr_schedule.png, against steps."""
    title = f"{folder.name}{' (synthetic data)' if synthetic else ''}"
    ends = [row for row in history if row["val/loss"] is not None]
    chosen = min(ends, key=lambda row: row["val/loss"])["train/step"]

    def draw(name, panels, schedule=()):
        figure, axes = common.new_figure(len(panels))
        for axis, (ylabel, columns) in zip(axes, panels.items(), strict=True):
            for column in columns:
                rows = [row for row in history if row[column] is not None]
                axis.plot([row["train/step"] for row in rows], [row[column] for row in rows], marker="." if len(rows) < 30 else None, label=column)
            if len(schedule):
                axis.plot(range(1, len(schedule) + 1), schedule, label="schedule", zorder=0)
            if any(column.startswith("val") for column in columns):
                axis.axvline(chosen, color="grey", linestyle=":", linewidth=1, label="chosen")
            axis.set(xlabel="step", ylabel=ylabel)
            axis.legend(fontsize=8)
        figure.suptitle(title)
        common.save_figure(figure, folder / name)
    draw("training_curves.png", {"loss": ["train/loss", "val/loss"],
                                 "R@k of all dimensions (val), %": [f"val/{way}_r{k}" for way in WAYS for k in (1, 10)]})
    draw("loss_components.png", {f"{label} loss": [f"train/{column}", f"val/{column}"] for label, column in
                                 (("contrastive", "loss_clip"), ("Matryoshka", "loss_mrl"), ("total", "loss"))})
    last, peak = history[-1]["train/step"], cfg.optimization.lr
    draw("lr_schedule.png", {"learning rate": ["train/lr"]},
         [peak * common.warmup_cosine(step, last, round(cfg.optimization.warmup_ratio * last)) for step in range(last)])


def plot_retrieval(path, runs, chance, synthetic):
    """mean R@5 of both directions against the dimension; runs = [(label, [{dim: .. as of both_ways}, one a seed], line style), ...]."""
    figure, (axis,) = common.new_figure(width=6, height=4.2)
    top, every = 0, set()
    for label, found, style in runs:
        dims = sorted(map(int, found[0]))
        values = 100 * np.array([[each[str(d)]["R@5_mean"] for d in dims] for each in found])
        axis.errorbar(dims, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None, fmt=style, marker=".", capsize=2,
                      label=f"{label}{f' (n = {len(values)})' if len(values) > 1 else ''}")
        top, every = max(top, values.max()), every | set(dims)  # runs may differ in their dimensions
    axis.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(every), map(str, sorted(every)))
    axis.set(xlabel="dimensions kept", ylabel="mean R@5 of both directions, %",
             title="retrieval by prefix" + (" (synthetic data)" if synthetic else ""))
    axis.set_ylim(0, 1.08 * top + 1)
    axis.legend(fontsize=8)
    common.save_figure(figure, path)


def plot_evaluation(folder, cfg, r, whole, n=200):
    """mrl_performance.png, embedding_space.png, similarity_matrix.png (the first n pairs)."""
    plot_retrieval(folder / "mrl_performance.png", [("prefix", [r["dims"]], "-"), ("PCA", [r["pca"]], "--")], r["chance"]["R@5"], r["synthetic"])
    first = [x[:n] for x in whole]
    mark = " (synthetic data)" if r["synthetic"] else ""
    common.plot_embedding_space(folder / "embedding_space.png", dict(zip(("images", "captions"), first, strict=True)),
                                f"{len(first[0])} pairs of {r['split']}{mark}", cfg.evaluation.projection)
    common.plot_similarity_matrix(folder / "similarity_matrix.png", first[0] @ first[1].T, f"{r['split']}{mark}", "captions", "images")


def compare(cfg):
    """Finished runs side by side: runs that differ only in their seed become one row, mean +- sd. Writes compare.txt and compare.png."""
    runs = common.runs_by_seed(cfg.compare, cfg.experiment)
    everything = [r for _, found in runs for r in found]
    synthetic = any(r["synthetic"] for r in everything)

    text = retrieval_table([(f"{name}{f' (n = {len(found)})' if len(found) > 1 else ''}: ", found) for name, found in runs])
    text += "\n[SYNTHETIC demo data]" if synthetic else ""
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    lines = [(f"{name}{label}", [r[part] for r in found], style) for name, found in runs
             for label, part, style in (("", "dims", "-"), (", PCA", "pca", "--"))]
    plot_retrieval(out / "compare.png", lines, np.mean([r["chance"]["R@5"] for r in everything]), synthetic)
    common.atomic_write(out / "compare.txt", lambda file: file.write(f"{text}\n".encode()))
    print(f"{text}\n{out / 'compare.txt'}, {out / 'compare.png'}")


# ------------------------------------------------------------------------------------------------------------------ main

STAGES = ("all", "prepare", "train", "evaluate", "embed", "compare")


def embed_stage(cfg):
    """embeddings.pt in the run's folder: {image [N, dim], text [N, dim] normalised float32, ids [N], dim, parquet} of any parquet."""
    folder, dims = Path(cfg.output_dir), cfg.vision_encoder.projection_dim
    if cfg.dim > dims:
        raise UserError(f"dim={cfg.dim} is more than vision_encoder.projection_dim={dims}")
    tokenizer = Tokenizer(common.read_json(folder / "tokenizer.json")["merges"]) if cfg.text_encoder.name == "scratch" else None
    source = next((pattern, key) for pattern, key in ((cfg.parquet, "parquet"), (cfg.dataset.test_parquet, "dataset.test_parquet"),
                                                      (cfg.dataset.val_parquet, "dataset.val_parquet")) if pattern)
    data = load_data(cfg, tokenizer, source)
    model, _ = read_best(cfg, data, folder)
    dim = cfg.dim or dims
    image, text = (F.normalize(x[:, :dim], dim=1).cpu() for x in embed(cfg, model, data, "embed"))
    content = {"image": image, "text": text, "ids": data.sets["embed"].ids, "dim": dim, "parquet": source[0]}
    common.atomic_write(folder / "embeddings.pt", lambda file: torch.save(content, file))
    print(f"{len(image):,} pairs x {dim} dimensions, {len(data.sets['embed'].bad)} rows left out: {folder / 'embeddings.pt'}")


def show_splits(data):
    """One line a split: rows, and what was left out and why."""
    for name, split in data.sets.items():
        causes = collections.Counter(re.sub(r"\d+ x \d+|\d+", "..", cause) for _, _, cause in split.bad)
        total = len(split) + len(split.bad)
        why = f", {len(split.bad):,} of {total:,} rows left out ({100 * len(split.bad) / total:.2f}%): " + "; ".join(
            f"{n} {cause}" for cause, n in causes.most_common(4)) if split.bad else ""
        print(f"{name}: {len(split):,} pairs{why}{' ...' if len(causes) > 4 else ''}")


@common.exit_codes
def main(argv):
    args = common.parse_command_line(argv, (Config,), __doc__, STAGES)
    cfg = common.load_config(Config, args.config, args.overrides, demo=args.demo)
    if args.stage == "compare":
        return compare(cfg)
    if args.fresh and args.stage in ("evaluate", "embed"):
        raise UserError(f"--fresh starts a run again; --stage {args.stage} needs a trained one")
    if args.demo:
        if any(re.match(r"dataset\.\w+_parquet=", override) for override in args.overrides):
            raise UserError("--demo brings its own data; leave it or the parquet files out")
        folder = demo_data.write_pixmo()
        for name in ("train", "val", "test"):
            setattr(cfg.dataset, f"{name}_parquet", f"{folder}/pixmo_{name}.parquet")
    check(cfg)
    if args.stage == "prepare":
        return show_splits(load_data(cfg))
    best = Path(cfg.output_dir, "best_model.pt")
    if args.stage in ("evaluate", "embed") and not best.exists():
        raise UserError(f"{best}: no such checkpoint; train first, with the same command without --stage")
    cfg.fresh = args.fresh
    common.check_run(cfg)  # before the data are loaded; nothing is written or moved until they are
    if args.stage == "embed":
        return embed_stage(cfg)
    data = load_data(cfg)
    show_splits(data)
    folder = Path(cfg.output_dir)
    if args.stage in ("all", "train"):
        common.open_run(cfg, data.fingerprint)
        history = train(cfg, data)
        if cfg.evaluation.plots:
            plot_training(folder, cfg, history, data.synthetic)
    if args.stage in ("all", "evaluate"):
        evaluate(cfg, data)
        print(f"\n{(folder / 'results.txt').read_text()}", end="")
    print(f"files: {folder}/ (results.json, metrics.csv, best_model.pt, *.png)")


if __name__ == "__main__":
    sys.exit(main())
