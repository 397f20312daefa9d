"""Global Workspace on MM-IMDb: does a learned attention over modalities help genre prediction, and what does it cost?

Frozen image and text latents (CLIP or BLIP-2, 70 augmented views a film) and the genre labels are three domains of one workspace; its state is a
weighted sum of their encodings, and it is trained to translate between all of them. The weights of image and text are learned (`shared`, a shared-key
attention), random, or uniform. Paper: Bertin-Johannet et al., arXiv 2602.08597; global workspace: Devillers et al. 2024, arXiv 2306.15711.

    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml             # train, evaluate, plots; also gw_clip_random, gw_blip2_shared, gw_blip2_random
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml --demo      # synthetic stand-in, under 90 s on two CPU cores
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml --stage labels       # label files from the raw download
    python exp_gw_mmimdb.py configs/gw_clip_shared.yaml --stage compare compare='[results/gw_clip_shared*, results/gw_clip_random*]'

It prints genre F1s and mAP on the test films last: clean, with one modality missing, and corrupted, beside chance.

Shapes: B films a batch, D a domain's width (labels: 23 genres), W = 512 the workspace; a set S is a non-empty subset of {image, text, labels}.

Deviations from the recipe this follows:
- `selector: random` is random in training too (the reference's random arm trains with learned attention: `reference-random`);
- z-scoring uses the training films only (`data.statistics: all` uses the stats files, test included);
- F1s are of the whole split, not averaged over batches; the step with the best dev mAP is the one that is tested.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import demo_data
from common import UserError, ranged

DOMAINS = ("image", "text", "labels")
SUBSETS = tuple(s for n in (1, 2, 3) for s in itertools.combinations(DOMAINS, n))
PROPER = SUBSETS[:-1]  # those with a complement
LOSS_WEIGHTS = {"translation": 1.0, "demi_cycle": 0.5, "cycle": 0.5, "contrastive": 0.05, "fused": 1.0}
TEMPERATURE = 0.07  # of the contrastive loss
BACKBONE_DIMS = {"clip": (512, 512), "blip2": (768, 2048)}


# ---------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = ""  # raw MM-IMDb: dataset/, split.json (empty: the environment's MMIMDB1_DIR, else mmimdb)
    latents_dir: str = ""  # the .npy latents (empty: OTHER_BACKBONES_DIR_IMDB1_AUG70, else dir/latents)
    labels_dir: str = ""  # labels_all_23.npy, ids_all.txt, class_names_23.json (empty: IMDB1_LABELS_DIR_23, else dir/labels)
    image_file: str = ""  # image latents (empty: MMIMDB_IMAGE_LATENTS, else mm_imdb1_globals_aug{views}_{backbone}_image.npy)
    text_file: str = ""  # text latents (empty: MMIMDB_TEXT_EMBEDS, else ..._text.npy)
    backbone: str = "clip"  # encoder that the latents are of: clip, blip2, or the name in the files
    views: int = ranged(70, ">= 1")  # views a film, view 0 clean (names the files; the manifest decides)
    statistics: Literal["train", "all"] = "train"  # z-scoring: of the training films' rows, or the .stats.npz beside the latents


@dataclass
class ModelConfig:
    selector: Literal["shared", "random", "uniform", "reference-random"] = "shared"  # weights of image and text; reference-random: shared in training
    dim: int = ranged(512, ">= 1")  # W, the workspace
    hidden_dim: int = ranged(384, ">= 1")  # of a residual block
    n_blocks: int = ranged(2, ">= 1")  # residual blocks of each encoder and decoder
    head_dim: int = ranged(256, ">= 1")  # of the selector's query and keys
    dropout: float = ranged(0.1, ">= 0", "< 1")  # in the residual blocks
    temperature: float = ranged(0.1, "> 0")  # T of the random selector


@dataclass
class TrainingConfig:
    batch_size: int = ranged(512, ">= 2")  # rows (film, view) a step
    steps: int = ranged(1000, ">= 6")  # optimisation steps
    learning_rate: float = ranged(5.38e-4, "> 0")  # AdamW, peak of the one-cycle schedule
    weight_decay: float = ranged(1.7e-5, ">= 0")  # on every parameter
    selector_after_freeze: bool = False  # first the workspace with mean weights, then as many steps of the shared selector alone
    eval_every: int = ranged(50, ">= 1")  # steps between rows of metrics.csv, dev scores and checkpoints
    compile: bool = False  # torch.compile the encoders and decoders


@dataclass
class EvaluationConfig:
    amounts: list[float] = field(default_factory=lambda: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0], metadata={"bounds": (">= 0",)})  # of corruption
    n_draws: int = ranged(3, ">= 1")  # of noise and random weights, averaged
    plots: bool = True  # draw the PNGs


@dataclass
class Config:
    experiment: str = "gw_mmimdb"  # which script a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, dropout, random weights
    device: str = "auto"  # auto | cuda | mps | cpu
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv to Weights & Biases
    compare: list[str] = field(default_factory=list)  # run folders for --stage compare
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# ------------------------------------------------------------------------------------------------------------------ data

GENRES = demo_data.GENRES
GENRE_SPELLINGS = {**{g.lower(): g for g in GENRES}, "science fiction": "Sci-Fi", "sci fi": "Sci-Fi"}


def write_labels(root, folder):
    """labels_all_23.npy (float32 [N, 23]), ids_all.txt and class_names_23.json from root/dataset/{id}.json with its .jpeg, rows by sorted id.

    Genres are read whatever their case; those beyond the 23 (News, Adult, Talk-Show, Reality-TV) are dropped. Files that are there are left alone.
    Raises: UserError, also if they hold other labels.
    """
    root, folder = Path(root), Path(folder)
    ids = sorted(p.stem for p in (root / "dataset").glob("*.json") if p.with_suffix(".jpeg").exists())
    if not ids:
        raise UserError(f"{root / 'dataset'}: no films (an {{id}}.json with its {{id}}.jpeg); unpack mmimdb.tar.gz, or point data.dir= at it")
    labels = np.zeros((len(ids), len(GENRES)), dtype=np.float32)
    for row, film in enumerate(ids):
        genres = common.read_json(root / "dataset" / f"{film}.json").get("genres") or []
        if not isinstance(genres, list):
            raise UserError(f"{root / 'dataset' / film}.json: genres must be a list, found {genres!r}")
        for name in genres:
            if (genre := GENRE_SPELLINGS.get(str(name).strip().lower())) is not None:
                labels[row, GENRES.index(genre)] = 1
    if all((folder / name).exists() for name in LABEL_FILES):
        known, *names = read_labels(folder)
        if names != [ids, list(GENRES)] or not np.array_equal(known, labels):
            raise UserError(f"{folder}: holds other labels than {root / 'dataset'} gives; move them away, or set data.labels_dir=")
        return labels
    folder.mkdir(parents=True, exist_ok=True)
    common.atomic_write(folder / "class_names_23.json", lambda file: file.write(json.dumps(GENRES).encode()))
    common.atomic_write(folder / "ids_all.txt", lambda file: file.write("".join(f"{film}\n" for film in ids).encode()))
    common.atomic_write(folder / "labels_all_23.npy", lambda file: np.save(file, labels))
    return labels


@dataclass
class Data:
    """Latents by row = views * film + view (memory-mapped if they are large), labels by film, and the films of each split."""
    latents: dict  # "image" | "text" -> [films * views, D] tensor, on the device or mapped
    labels: torch.Tensor  # [films, 23] float32
    genres: list  # [23] names
    views: int
    splits: dict  # train | dev | test -> [n] film numbers
    statistics: dict  # "image" | "text" -> (mean [D], deviation [D])
    device: torch.device
    fingerprint: str
    synthetic: bool


RESIDENT_BYTES = 2**31  # latents up to this size, or a quarter of a GPU's free memory, are moved to the device whole
STATISTICS_ROWS = 2**18  # z-scoring is measured on at most so many of the training films' rows, drawn at random


def paths(data):
    """(root, image latents, text latents, labels folder): config keys, else the environment, else the defaults."""
    root = Path(data.dir or os.environ.get("MMIMDB1_DIR") or "mmimdb")
    latents = Path(data.latents_dir or os.environ.get("OTHER_BACKBONES_DIR_IMDB1_AUG70") or root / "latents")
    labels = Path(data.labels_dir or os.environ.get("IMDB1_LABELS_DIR_23") or root / "labels")
    files = [given or os.environ.get(variable) or f"mm_imdb1_globals_aug{data.views}_{data.backbone}_{modality}.npy" for modality, given, variable
             in (("image", data.image_file, "MMIMDB_IMAGE_LATENTS"), ("text", data.text_file, "MMIMDB_TEXT_EMBEDS"))]
    return root, latents / files[0], latents / files[1], labels


def load_latents(path, ids):
    """(memory-mapped [rows, D] tensor, views a film) of one .npy with its manifest. Raises: UserError naming file, expected and found."""
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.npy"))
        raise UserError(f"{path}: no such file{f' (there are {there[0]} ...: set data.backbone= and data.views=)' if there else ''}; "
                        "encode the data (README, 'Data'), set data.latents_dir=, or try --demo")
    manifest_file, n_films = path.with_name(f"{path.stem}_manifest.json"), len(ids)
    manifest = common.read_json(manifest_file)
    rows = guarded(lambda p: np.load(p, mmap_mode="r"), path)
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
        raise UserError(f"{path}: expected float16 or float32 [rows, dims], found {rows.dtype} {list(rows.shape)}")
    found = {"total_rows": len(rows), "dims": rows.shape[1], "original_rows": n_films}
    views = manifest.get("views_per_sample")
    for key, value in found.items():
        if manifest.get(key, value) != value:
            raise UserError(f"{manifest_file}: {key} is {manifest[key]}, but {'ids_all.txt' if key == 'original_rows' else path.name} has {value}")
    if not isinstance(views, int) or len(rows) != n_films * views:
        raise UserError(f"{path}: expected {n_films} films x {views} views (views_per_sample of {manifest_file.name}) rows, found {len(rows)}")
    if manifest.get("ids", ids) != ids:  # encode.py lists them
        raise UserError(f"{path}: its films are not those of ids_all.txt in the same order; encode again")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(rows), views


def check_finite(x, rows, path, chunk=8192):
    """Raises UserError if one of the rows [n] of x holds NaN or infinite values."""
    for part in rows.split(chunk):
        block = x[part.to(x.device)].float()
        if not torch.isfinite(block.sum()) and len(bad := (~torch.isfinite(block).all(1)).nonzero()[:, 0]):
            raise UserError(f"{path}: NaN or infinite values, first in row {int(part[int(bad[0])])}; encode it again")


def moments(x, rows, chunk=8192):
    """(mean, deviation) [D] float32 of some rows, by float64 sums; a constant feature gets deviation 1."""
    total, squares = 0, 0
    for part in rows.split(chunk):
        block = x[part.to(x.device)].cpu().double()
        total, squares = total + block.sum(0), squares + block.square().sum(0)
    mean = total / len(rows)
    variance = squares / len(rows) - mean.square()
    return mean.float(), torch.where(variance > 1e-10 * mean.square().clamp(min=1e-12), variance, 1).sqrt().float()


def guarded(read, path):
    """read(path), with anything that goes wrong in one line naming the file."""
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:  # numpy, json and the file system raise kinds of their own
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty file'})") from None


LABEL_FILES = ("labels_all_23.npy", "ids_all.txt", "class_names_23.json")


def read_labels(folder):
    """(labels [N, 23] of 0/1, film ids [N], genres [23]) of the label files. Raises: UserError naming file, expected and found."""
    for path in (files := [folder / name for name in LABEL_FILES]):
        if not path.is_file():
            raise UserError(f"{path}: no such file; make it from the raw data with --stage labels, set data.labels_dir=, or try --demo")
    labels, ids, genres = (guarded(read, path) for read, path in
                           zip((np.load, lambda p: p.read_text().split(), lambda p: json.loads(p.read_text())), files, strict=True))
    if labels.shape != (len(ids), len(genres)) or len(set(ids)) != len(ids) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{files[0]}: expected 0/1 of {len(ids)} different ids (ids_all.txt) x {len(genres)} genres, found {labels.shape}")
    return labels, ids, genres


def load_data(cfg):
    """Data of cfg. Raises: UserError naming file, expected and found."""
    device = common.pick_device(cfg.device)
    root, *latent_files, labels_dir = paths(cfg.data)
    labels, ids, genres = read_labels(labels_dir)
    split, film_of = common.read_json(root / "split.json"), {film: i for i, film in enumerate(ids)}
    splits = {}
    for part in ("train", "dev", "test"):
        films = [str(film) for film in split.get(part) or []]
        if not films or (missing := [film for film in films if film not in film_of]):
            found = f"no films of {part}"
            if films:
                found = f"{len(missing)} films of {part} are not in {labels_dir / 'ids_all.txt'}, the first is {missing[0]}"
            raise UserError(f"{root / 'split.json'}: {found}")
        splits[part] = torch.tensor([film_of[film] for film in films])
    everything = torch.cat(list(splits.values()))
    if len(everything.unique()) != len(everything):
        raise UserError(f"{root / 'split.json'}: a film is in two parts of the split, or twice in one")
    latents, views, statistics = {}, set(), {}
    for modality, path in zip(("image", "text"), latent_files, strict=True):
        x, n_views = load_latents(path, ids)
        views.add(n_views)
        room = max(RESIDENT_BYTES, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else RESIDENT_BYTES
        latents[modality] = x.to(device) if x.numel() * x.element_size() <= room else x
    if len(views) > 1:
        raise UserError(f"{latent_files[0]} and {latent_files[1].name} have different numbers of views: {sorted(views)}")
    (n_views,), files = views, [*latent_files, *(path.with_name(f"{path.stem}_manifest.json") for path in latent_files),
                                *(labels_dir / name for name in LABEL_FILES), root / "split.json"]
    for modality, path in zip(("image", "text"), latent_files, strict=True):
        rows = (splits["train"][:, None] * n_views + torch.arange(n_views)).flatten()
        check_finite(latents[modality], torch.cat([rows, torch.cat([splits["dev"], splits["test"]]) * n_views]), path)
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:STATISTICS_ROWS].sort().values
        moment = moments(latents[modality], rows[drawn])
        if cfg.data.statistics == "all":
            stats_file = path.with_name(f"{path.stem}.stats.npz")
            if not stats_file.is_file():
                raise UserError(f"{stats_file}: no such file; data.statistics=all needs it (train does not)")
            moment = guarded(lambda p: tuple(torch.from_numpy(np.load(p)[key]).float() for key in ("mu", "sigma")), stats_file)
            if any(v.shape != latents[modality].shape[1:] or not torch.isfinite(v).all() for v in moment) or (moment[1] <= 0).any():
                raise UserError(f"{stats_file}: expected finite mu and sigma > 0 of {latents[modality].shape[1]} features")
            files.append(stats_file)
        statistics[modality] = tuple(v.to(device) for v in moment)
    return Data(latents, torch.from_numpy(labels.astype(np.float32)).to(device), genres, n_views, splits, statistics, device,
                common.fingerprint(files), bool(split.get("synthetic")))


def random_data(cfg):
    """Random tensors of the backbone's real shapes, one batch of films: for profile_flops.py where the data are not at hand."""
    device, n = common.pick_device(cfg.device), cfg.training.batch_size
    if cfg.data.backbone not in BACKBONE_DIMS:
        raise UserError(f"data.backbone={cfg.data.backbone}: its widths are not known without its latents; known are {', '.join(BACKBONE_DIMS)}")
    dims = BACKBONE_DIMS[cfg.data.backbone]
    latents = {modality: torch.randn(n, dim, device=device) for modality, dim in zip(("image", "text"), dims, strict=True)}
    statistics = {modality: (torch.zeros(dim, device=device), torch.ones(dim, device=device))
                  for modality, dim in zip(("image", "text"), dims, strict=True)}
    films = torch.arange(n)
    labels = (torch.rand(n, len(GENRES), device=device) < 0.1).float()
    return Data(latents, labels, list(GENRES), 1, dict.fromkeys(("train", "dev", "test"), films), statistics, device, "random", True)


def latent_rows(data, modality, rows):
    """[B, D] float32 z-scored latents of some rows, on the device."""
    x = data.latents[modality]
    mean, deviation = data.statistics[modality]
    return (x[rows.to(x.device, non_blocking=True)].to(data.device, non_blocking=True).float() - mean) / deviation


def make_batch(data, indices):
    """Inputs of rows (film * views + view) with the clean views of their films as targets: image, text, labels, image_target, text_target."""
    films = indices // data.views
    batch = {modality: latent_rows(data, modality, indices) for modality in ("image", "text")}
    clean = batch if data.views == 1 else {modality: latent_rows(data, modality, films * data.views) for modality in ("image", "text")}
    return {**batch, "labels": data.labels[films.to(data.device, non_blocking=True)], "image_target": clean["image"], "text_target": clean["text"]}


def batch_rows(data, cfg, step):
    """The rows [B] of a step, on the CPU: a pure function of seed and step. An epoch is every view of every training film once, in random order,
    but for the rows that do not fill a batch."""
    films, n = data.splits["train"], len(data.splits["train"]) * data.views
    per_epoch = max(1, n // cfg.training.batch_size)
    epoch, place = divmod(step, per_epoch)
    order = epoch_order(n, cfg.seed, epoch)[place * cfg.training.batch_size:(place + 1) * cfg.training.batch_size]
    return films[order // data.views] * data.views + order % data.views


@functools.lru_cache(maxsize=1)  # a million rows take longer to shuffle than a step
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(1000003 * seed + epoch))


def total_steps(cfg, data):
    """Optimisation steps of a run."""
    return cfg.training.steps * (2 if cfg.training.selector_after_freeze else 1)


# ----------------------------------------------------------------------------------------------------------------- model

class ResMLP(nn.Module):
    """x [.., W] + Linear(Dropout(GELU(Linear(LayerNorm(x)))))."""

    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim))

    def forward(self, x):
        return x + self.layers(x)


class SharedKeySelector(nn.Module):
    """Weights [B, n_domains] = softmax_d(q . k_d) of encodings [B, n_domains, dim]: q from their mean, every k_d by the same layer, no scaling."""

    def __init__(self, dim, head_dim):
        super().__init__()
        self.query, self.key = nn.Linear(dim, head_dim), nn.Linear(dim, head_dim)

    def forward(self, encodings):
        query, keys = self.query(encodings.mean(1)), self.key(encodings)
        return (query[:, None] * keys).sum(2).softmax(1)


class RandomSelector(nn.Module):
    """Weights [B, n_domains] = softmax(U / T), U uniform in [0, 1), drawn anew for every sample and call."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, encodings):
        return (torch.rand(encodings.shape[:2], device=encodings.device) / self.temperature).softmax(1)


class UniformSelector(nn.Module):
    """Equal weights [B, n_domains]."""

    def forward(self, encodings):
        return torch.full(encodings.shape[:2], 1 / encodings.shape[1], device=encodings.device)


class GlobalWorkspace(nn.Module):
    """Encoders into and decoders out of a shared space, one of each a domain. The chosen selector weighs exactly {image, text}; other sets get
    random weights of temperature 1 (equal ones with `mean_weights`)."""

    def __init__(self, dims, model):
        super().__init__()
        def blocks():
            return [ResMLP(model.dim, model.hidden_dim, model.dropout) for _ in range(model.n_blocks)]
        self.encoders = nn.ModuleDict({d: nn.Sequential(nn.Linear(n, model.dim), nn.GELU(), *blocks()) for d, n in dims.items()})
        self.decoders = nn.ModuleDict({d: nn.Sequential(*blocks(), nn.Linear(model.dim, n)) for d, n in dims.items()})
        learned = model.selector in ("shared", "reference-random")
        self.selector = SharedKeySelector(model.dim, model.head_dim) if learned else UniformSelector() if model.selector == "uniform" \
            else RandomSelector(model.temperature)
        self.test_selector = RandomSelector(model.temperature) if model.selector == "reference-random" else None  # None: the same
        self.other_sets, self.mean_weights = RandomSelector(1.0), False

    def fuse(self, encodings):
        """(state z [B, W] = tanh(sum_d w_d e_d), weights [B, n]) of {domain: e_d [B, W]}."""
        stacked = torch.stack(list(encodings.values()), dim=1)  # [B, n, W]
        if stacked.shape[1] == 1:
            return torch.tanh(stacked[:, 0]), torch.ones_like(stacked[:, :, 0])
        tested = self.test_selector is not None and not self.training
        chosen = self.other_sets if tuple(encodings) != ("image", "text") else self.test_selector if tested else self.selector
        weights = UniformSelector()(stacked) if self.mean_weights else chosen(stacked)
        return torch.tanh((weights[:, :, None] * stacked).sum(1)), weights

    def forward(self, inputs, decode="labels"):
        """(decoded domain [B, D], weights [B, n]) from {domain: input [B, D]} of the domains that are there."""
        state, weights = self.fuse({d: self.encoders[d](x) for d, x in inputs.items()})
        return self.decoders[decode](state), weights


def build_model(cfg, data):
    """GlobalWorkspace of the data's widths, on its device."""
    dims = {"image": data.latents["image"].shape[1], "text": data.latents["text"].shape[1], "labels": data.labels.shape[1]}
    model = GlobalWorkspace(dims, cfg.model).to(data.device)
    for part in (*model.encoders.values(), *model.decoders.values()) if cfg.training.compile else ():
        part.compile()
    return model


def build_optimizer(cfg, model):
    """AdamW over what is to be trained: all parameters, or those that are not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=cfg.training.learning_rate, betas=(0.95, 0.999), weight_decay=cfg.training.weight_decay,
                             fused=parameters[0].is_cuda)


def build_scheduler(cfg, optimizer):
    """One cycle (Smith & Topin 2019): rate /10 -> 1 -> /100 of the peak, beta1 .95 -> .85 -> .95, by cosines, peak at a fifth of the steps."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.training.learning_rate, total_steps=cfg.training.steps, pct_start=0.2, div_factor=10,
                                               final_div_factor=10, base_momentum=0.85, max_momentum=0.95)


# ------------------------------------------------------------------------------------------------------------- objective

def domain_loss(domain, decoded, target):
    """Mean loss of each set [n]: decoded [n, B, D] against target [B, D]; squared error, for labels binary cross-entropy of logits."""
    target = target.expand_as(decoded)
    loss = F.binary_cross_entropy_with_logits if domain == "labels" else F.mse_loss
    return loss(decoded.float(), target.float(), reduction="none").mean((1, 2))


def workspace_losses(model, batch):
    """The five losses, 0-d tensors, each a plain mean of its terms over the sets S:

    demi_cycle (3): |S| = 1, decode S. translation (9): decode what is outside S. fused (9): |S| >= 2, decode S.
    cycle (9): decode the complement of S, re-encode it, fuse it, decode S. contrastive (3): InfoNCE of the encodings before tanh, pairs of domains.
    batch: as from `make_batch`. Every domain is encoded once and all 7 states are decoded in one call a domain.
    """
    targets = {"image": batch["image_target"], "text": batch["text_target"], "labels": batch["labels"]}
    size = len(batch["labels"])
    encodings = {d: model.encoders[d](batch[d]) for d in DOMAINS}
    states = torch.cat([model.fuse({d: encodings[d] for d in s})[0] for s in SUBSETS])  # [7 B, W]
    decoded = {d: model.decoders[d](states).view(len(SUBSETS), size, -1) for d in DOMAINS}  # [7, B, D]
    loss = {d: domain_loss(d, decoded[d], targets[d]) for d in DOMAINS}  # [7]
    terms = {"demi_cycle": [], "translation": [], "fused": []}
    for i, s in enumerate(SUBSETS):
        for d in DOMAINS:
            terms["translation" if d not in s else "fused" if len(s) > 1 else "demi_cycle"].append(loss[d][i])
    outside = {d: [i for i, s in enumerate(PROPER) if d not in s] for d in DOMAINS}  # sets whose complement has d: 3
    again = {d: model.encoders[d](torch.cat([decoded[d][i] for i in outside[d]])).view(3, size, -1) for d in DOMAINS}
    cycled = [model.fuse({d: again[d][outside[d].index(i)] for d in DOMAINS if d not in s})[0] for i, s in enumerate(PROPER)]
    terms["cycle"] = []
    for d in DOMAINS:
        inside = [cycled[i] for i, s in enumerate(PROPER) if d in s]  # 3
        terms["cycle"].append(domain_loss(d, model.decoders[d](torch.cat(inside)).view(3, size, -1), targets[d]))
    directions = {d: F.normalize(e.float(), dim=1) for d, e in encodings.items()}
    terms["contrastive"] = [common.info_nce(directions[a], directions[b], 1 / TEMPERATURE) for a, b in itertools.combinations(DOMAINS, 2)]
    return {name: torch.cat([t.reshape(-1) for t in terms[name]]).mean() for name in LOSS_WEIGHTS}


def train_step(model, batch, optimizer):
    """One step -> {loss, and the five losses} as 0-d tensors (no synchronisation). bf16 autocast on CUDA."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=batch["labels"].is_cuda):
        losses = workspace_losses(model, batch)
    total = sum(LOSS_WEIGHTS[name] * value for name, value in losses.items()) / len(losses)
    total.backward()
    optimizer.step()
    return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


# ------------------------------------------------------------------------------------------------------------ evaluation

@torch.no_grad()
def predict(cfg, model, data, split, use=("image", "text"), decode="labels", corrupt="none", amount=0.0, seed=0):
    """(decoded [n, D], weights [n, len(use)], which modality was corrupted [n]: 0 image, 1 text, -1 both or none) of a split's clean views.

    Corruption adds 5 x amount x Gaussian noise of unit variance in each row to the z-scored input: of image, text, one of them at random, or both.
    """
    model.eval()
    films, generator = data.splits[split], torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed)  # of random weights
    inputs = {d: latent_rows(data, d, films * data.views) for d in use}
    side = torch.randint(2, (len(films),), generator=generator).to(data.device)
    hit = {"none": torch.full_like(side, -1), "both": torch.full_like(side, -1), "one": side, "image": torch.zeros_like(side),
           "text": torch.ones_like(side)}
    hit = hit[corrupt]
    for i, d in enumerate(("image", "text") if corrupt != "none" else ()):
        noise = torch.randn(len(films), data.latents[d].shape[1], generator=generator).to(data.device)
        noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True, correction=0)
        inputs[d] = inputs[d] + 5 * amount * noise * ((hit == i) | (corrupt == "both"))[:, None]
    with common.full_precision():
        decoded, weights = model(inputs, decode)
    return decoded.float(), weights.float(), hit


def scores(logits, labels):
    """Genre metrics with the binary cross-entropy. Raises: FloatingPointError."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError("non-finite predictions: the weights have overflowed; lower training.learning_rate")
    return {**common.multilabel_metrics(logits, labels), "bce": F.binary_cross_entropy_with_logits(logits, labels).item()}


def tuned_thresholds(logits, labels):
    """The logit of each genre [C] above which predicting it maximises its F1 on these films [N, C]; 0 for a genre that none of them has."""
    device, logits, labels = logits.device, logits.cpu(), labels.cpu()
    ordered, order = logits.sort(dim=0, descending=True)
    hits, n = labels.gather(0, order).cumsum(0), torch.arange(1, len(logits) + 1)[:, None]
    after = torch.cat([ordered[1:], ordered[-1:] - 2])
    f1 = torch.where(ordered > after, 2 * hits / (n + labels.sum(0)), -1)  # no cut between equal logits
    best = f1.argmax(0, keepdim=True)
    middle = (ordered.gather(0, best) + after.gather(0, best))[0] / 2
    return torch.where(labels.sum(0) > 0, middle, 0).to(device)


def read_best(folder, data, cfg):
    """The model of best_model.pt. Raises: UserError if it does not fit the data."""
    try:
        state, latest = common.load_checkpoint(folder / "best_model.pt"), common.load_checkpoint(folder / "checkpoint_latest.pt")
    except FileNotFoundError as error:
        raise UserError(f"{error}; a finished run that has lost it starts again with --fresh") from None
    if latest["global_step"] < total_steps(cfg, data):
        raise UserError(f"{folder}: training stopped at step {latest['global_step']} of {total_steps(cfg, data)}; "
                        "the same command without --stage goes on")
    model = build_model(cfg, data)
    try:
        model.load_state_dict(state["model_state_dict"])
    except RuntimeError:
        raise UserError(f"{folder / 'best_model.pt'} is of other widths than the data; choose another output_dir=, or --fresh") from None
    return model, state["step"]


def evaluate(cfg, data=None):
    """Test the best model: clean, missing modality, corrupted, cross-translation. Writes results.json and the plots; returns the results."""
    folder, data = start(cfg, data)
    model, step = read_best(folder, data, cfg)
    amounts, file = sorted(set(cfg.evaluation.amounts)), folder / "results.json"
    settings = {"amounts": amounts, "n_draws": cfg.evaluation.n_draws}
    if file.exists() and (known := common.read_json(file)).get("evaluation") == settings and known["step"] == step:
        return known
    labels = {split: data.labels[data.splits[split]] for split in ("dev", "test")}

    def averaged(runs):  # over draws
        return {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    draws = range(cfg.seed, cfg.seed + cfg.evaluation.n_draws)
    inputs, attention = {}, {}
    for name, use in (("both", ("image", "text")), ("image only", ("image",)), ("text only", ("text",))):
        runs = []
        for seed in draws:
            thresholds = tuned_thresholds(predict(cfg, model, data, "dev", use, seed=seed)[0], labels["dev"])
            logits, weights, _ = predict(cfg, model, data, "test", use, seed=seed)
            tuned = scores(logits - thresholds, labels["test"])
            runs.append({**scores(logits, labels["test"]), **{f"{key}_tuned": tuned[key]
                                                              for key in ("f1_micro", "f1_macro", "f1_weighted", "f1_samples")}})
            if name == "both" and seed == cfg.seed:
                attention["test"] = weights[:, 0].cpu()
        inputs[name] = averaged(runs)
    chance = common.multilabel_metrics(torch.ones_like(labels["test"]), labels["test"])
    for split in ("train", "dev"):
        attention[split] = predict(cfg, model, data, split, seed=cfg.seed)[1][:, 0].cpu()
    corruption = []
    for kind, amount in itertools.product(("one", "image", "text", "both"), amounts):
        runs = []
        for seed in draws:
            logits, weights, hit = predict(cfg, model, data, "test", corrupt=kind, amount=amount, seed=seed)
            on_corrupted = weights.gather(1, hit.clamp(min=0)[:, None]).mean().item() if kind != "both" else math.nan
            runs.append({**{k: v for k, v in scores(logits, labels["test"]).items() if k in ("f1_macro", "f1_micro", "f1_weighted", "mAP")},
                         "weight": on_corrupted})
        corruption.append({"kind": kind, "amount": amount, **averaged(runs)})
    translation = {}
    for source, target in (("image", "text"), ("text", "image")):
        decoded, _, _ = predict(cfg, model, data, "test", (source,), target, seed=cfg.seed)
        truth, ids = latent_rows(data, target, data.splits["test"] * data.views), torch.arange(len(decoded))
        ranks = common.retrieval_metrics(F.normalize(decoded, dim=1), F.normalize(truth, dim=1), ids, ids)
        translation[f"{source} to {target}"] = {"mse": F.mse_loss(decoded, truth).item(), "mse_of_the_mean": truth.square().mean().item(),
                                                **{k: ranks[k] for k in ("R@1", "R@5", "R@10", "median_rank")}, "chance_R@10": min(1, 10 / len(ids))}
    results = {"experiment": cfg.experiment, "selector": cfg.model.selector, "seed": cfg.seed, "synthetic": data.synthetic,
               "data_fingerprint": data.fingerprint, "step": step, "evaluation": settings, "n_test": len(labels["test"]), "inputs": inputs,
               "chance": chance, "corruption": corruption, "translation": translation,
               "attention_on_image": {split: {"mean": w.mean().item(), "sd": w.std().item()} for split, w in attention.items()}}
    common.write_json(folder / "results.json", results)
    common.atomic_write(folder / "results.txt", lambda file: file.write(f"{report(results)}\n".encode()))
    if cfg.evaluation.plots:
        plot_evaluation(folder, results, attention)
    return results


COLUMNS = ("f1_micro", "f1_macro", "f1_weighted", "f1_samples", "mAP", "roc_auc", "bce", "f1_macro_tuned", "f1_weighted_tuned")


def report(r):
    """The final tables as text."""
    def row(name, values):
        return [name, *("-" if values.get(c) is None else f"{values[c]:.3f}" for c in COLUMNS)]
    rows = [row("chance: every genre", r["chance"]), *(row(f"clean, {name}", values) for name, values in r["inputs"].items())]
    shown = [c for c in r["corruption"] if c["kind"] in ("one", "both") and c["amount"] in (0.2, 0.5, 1.0)]
    rows += [row(f"{c['kind']} corrupted by {c['amount']:g}", c) for c in shown]
    marked = "  [SYNTHETIC demo data]" if r["synthetic"] else ""
    text = (f"test: {r['n_test']:,} films; selector {r['selector']}, step {r['step']}, seed {r['seed']}{marked}\n"
            + common.format_table(["genres from image and text", *(c.replace("_tuned", " (dev thr.)") for c in COLUMNS)], rows))
    text += "\nweight of the image: " + ", ".join(f"{split} {w['mean']:.3f} (sd {w['sd']:.3f})" for split, w in r["attention_on_image"].items())
    for kind in ("image", "text"):
        curve = [(c["amount"], c["weight"]) for c in r["corruption"] if c["kind"] == kind]
        shown = (curve[0], curve[len(curve) // 2], curve[-1])
        text += f"\nweight of a corrupted {kind}: " + ", ".join(f"{weight:.2f} at {amount:g}" for amount, weight in shown)
    for name, t in r["translation"].items():
        text += (f"\n{name}: mean squared error {t['mse']:.3f} (predicting the mean {t['mse_of_the_mean']:.3f}), R@10 {100 * t['R@10']:.1f}% "
                 f"(chance {100 * t['chance_R@10']:.1f}%), median rank {t['median_rank']:.0f}")
    return text


# -------------------------------------------------------------------------------------------------------------- training

def start(cfg, data=None):
    """(run folder, data), after the checks that every stage needs: same config, same data as the folder's run."""
    data = data or load_data(cfg)
    folder = common.open_run(cfg, data.fingerprint)
    return folder, data


def train(cfg, data=None):
    """Train for training.steps (twice that with selector_after_freeze), resuming exactly; best_model.pt is the step with the best dev mAP.

    Returns the history, one row every eval_every steps.
    """
    t = cfg.training
    folder, data = start(cfg, data)
    common.seed_everything(cfg.seed)
    model = build_model(cfg, data)

    def begin(phase):
        model.mean_weights = t.selector_after_freeze and phase == 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not t.selector_after_freeze or name.startswith("selector.") == (phase == 1))
        optimizer = build_optimizer(cfg, model)
        return optimizer, build_scheduler(cfg, optimizer)
    last_step, step, history, best, pending = total_steps(cfg, data), 0, [], None, []
    optimizer, scheduler = begin(0)
    latest = folder / "checkpoint_latest.pt"
    if latest.exists() or latest.with_name(f"{latest.name}.previous").exists():
        state = common.load_checkpoint(latest)
        step, history, best = state["global_step"], state["history"], state["position"]["best"]
        pending = [row.to(data.device) for row in state["position"]["pending"]]
        optimizer, scheduler = begin(max(step - 1, 0) // t.steps)
        model.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])
        scheduler.load_state_dict(state["scheduler_state_dict"])
        common.set_rng_state(state["rng"])
        print(f"{folder}: training is complete" if step >= last_step else f"resuming {folder} at step {step}")

    def save():
        common.save_checkpoint(latest, {
            "epoch": step * t.batch_size // (len(data.splits["train"]) * data.views), "global_step": step,
            "best_val_loss": min((row["dev_bce"] for row in history), default=None), "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict(), "scaler_state_dict": {},
            "history": history, "config": dataclasses.asdict(cfg), "rng": common.rng_state(), "position": {"best": best, "pending": pending}})

    if step < last_step:
        (folder / "results.json").unlink(missing_ok=True)
    log = common.RunLog(folder, cfg.wandb and step < last_step, dataclasses.asdict(cfg))
    if history:  # a kill may have come between the last checkpoint and this file
        log.write(history)
    started, first = time.time(), step
    with common.StopSignal() as stop:
        for step in common.progress(range(first + 1, last_step + 1), "steps"):  # counted from 1: `step` steps are done at the end of the body
            if step == t.steps + 1:
                (optimizer, scheduler), best = begin(1), None
            rate = scheduler.get_last_lr()[0]
            model.train()
            if step > t.steps:  # the frozen workspace drops nothing out
                model.encoders.eval(), model.decoders.eval()
            losses = train_step(model, make_batch(data, batch_rows(data, cfg, step - 1)), optimizer)
            pending.append(torch.stack([*losses.values(), torch.full_like(losses["loss"], rate)]))
            if step % t.steps:
                scheduler.step()
            logged = step % t.eval_every == 0 or step % t.steps == 0
            if logged or stop.signum:  # the host waits for the device only here
                means = torch.stack(pending).cpu()
                if len(bad := (~torch.isfinite(means).all(1)).nonzero()[:, 0]):
                    *values, rate = means[int(bad[0])].tolist()
                    names = [n for n, v in zip(("loss", *LOSS_WEIGHTS), values, strict=True) if not math.isfinite(v)]
                    raise FloatingPointError(f"non-finite {' and '.join(names)} in step {step - len(pending) + 1 + int(bad[0])}, "
                                             f"learning rate {rate:g}; lower training.learning_rate")
                if logged:
                    rng = common.rng_state()  # evaluation draws from a seed of its own
                    logits, weights, _ = predict(cfg, model, data, "dev", seed=cfg.seed)
                    common.set_rng_state(rng)
                    dev = scores(logits, data.labels[data.splits["dev"]])
                    row = {"step": step, **dict(zip(("loss", *LOSS_WEIGHTS), means.mean(0)[:-1].tolist(), strict=True)), "dev_bce": dev["bce"],
                           "dev_mAP": dev["mAP"], "dev_f1_macro": dev["f1_macro"], "dev_weight_image": weights[:, 0].mean().item(),
                           "learning_rate": rate}
                    history.append(row)
                    pending = []
                    better = best is None or row["dev_mAP"] > best
                    if better:
                        best = row["dev_mAP"]
                        common.save_checkpoint(folder / "best_model.pt",
                                               {"model_state_dict": model.state_dict(), "config": dataclasses.asdict(cfg), "step": step},
                                               keep_previous=False)
                    print(f"step {step:5}  loss {row['loss']:.4f}  dev: BCE {row['dev_bce']:.4f}  mAP {row['dev_mAP']:.3f}  "
                          f"macro F1 {row['dev_f1_macro']:.3f}{' *' if better else ''}", flush=True)
                save()
                if history:
                    log.write(history)
                if stop.signum:
                    raise common.Stopped(stop.signum, f"stopped at step {step}; the same command resumes from {latest}")
    log.close()
    if step > first:
        common.record_environment(folder, device=str(data.device), train_seconds=round(time.time() - started, 2),
                                  seconds_per_step=round((time.time() - started) / (step - first), 4))
    return history


# ----------------------------------------------------------------------------------------------------------------- plots

def mark(title, synthetic):
    return f"{title} (synthetic data)" if synthetic else title


def plot_training(folder, cfg, history, synthetic):
    every = cfg.training.eval_every
    panels = {"loss": {name: [row[name] for row in history] for name in ("loss", *LOSS_WEIGHTS)},
              "dev": {"mAP": [row["dev_mAP"] for row in history], "macro F1": [row["dev_f1_macro"] for row in history]},
              "weight of the image (dev)": {cfg.model.selector: [row["dev_weight_image"] for row in history]}}
    last_phase = [i for i, row in enumerate(history) if row["step"] > history[-1]["step"] - cfg.training.steps]  # only it may be chosen
    chosen = max(last_phase, key=lambda i: history[i]["dev_mAP"]) + 1
    common.plot_curves(folder / "training_curves.png", panels, xlabel=f"row of metrics.csv ({every} steps)", mark=chosen,
                       title=mark(f"{cfg.data.backbone}, selector {cfg.model.selector}", synthetic))


def plot_corruption(path, runs, synthetic):
    """Macro F1 and the weight of the corrupted modality against the amount; runs = [(label, results), ...], those of equal label are averaged."""
    figure, axes = common.new_figure(4, width=3.8)
    groups = {}
    for label, results in runs:
        groups.setdefault(label, []).append(results["corruption"])
    for axis, (kind, key) in zip(axes, (("one", "f1_macro"), ("both", "f1_macro"), ("image", "weight"), ("text", "weight")), strict=True):
        for label, curves in groups.items():
            amounts = [c["amount"] for c in curves[0] if c["kind"] == kind]
            values = np.array([[c[key] for c in curve if c["kind"] == kind] for curve in curves])
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            axis.errorbar(amounts, values.mean(0), spread, marker=".", capsize=2, label=f"{label} (n = {len(values)})" if len(values) > 1 else label)
        what = {"one": "one modality, at random", "both": "both", "image": "image", "text": "text"}[kind]
        if key == "f1_macro":
            axis.axhline(runs[0][1]["chance"]["f1_macro"], color="grey", linestyle=":", linewidth=1, label="chance: every genre")
        axis.set(xlabel=f"corruption of {what}", ylabel="test macro F1" if key == "f1_macro" else f"weight of the corrupted {kind}")
        axis.legend(fontsize=7)
    figure.suptitle(mark("under corruption", synthetic))
    common.save_figure(figure, path)


def plot_evaluation(folder, results, attention):
    """corruption.png and attention_histogram.png."""
    plot_corruption(folder / "corruption.png", [(results["selector"], results)], results["synthetic"])
    figure, (axis,) = common.new_figure()
    for split, weights in attention.items():
        axis.hist(weights.numpy(), bins=np.linspace(0, 1, 41), density=True, histtype="step",
                  label=f"{split}, n = {len(weights):,}, mean {weights.mean():.2f}")
    axis.set(xlabel="weight of the image", ylabel="density", title=mark(f"selector {results['selector']}", results["synthetic"]))
    axis.legend(fontsize=7)
    common.save_figure(figure, folder / "attention_histogram.png")


def compare(cfg):
    """Finished runs side by side: runs that differ only in their seed become one row, mean +- sd. Writes compare.png and compare.txt."""
    groups = common.runs_by_seed(cfg.compare, cfg.experiment)
    amounts = set.intersection(*({c["amount"] for c in results["corruption"]} for _, found in groups for results in found))
    for _, found in groups:
        for results in found:
            results["corruption"] = [c for c in results["corruption"] if c["amount"] in amounts]
    runs = [(name, results) for name, found in groups for results in found]
    synthetic = any(results["synthetic"] for _, results in runs)

    def cell(values):
        return f"{np.mean(values):.3f}" + (f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
    chance = groups[0][1][0]["chance"]
    table = [["chance: every genre", "-", *(cell([chance[c]]) for c in ("f1_micro", "f1_macro", "f1_weighted", "f1_samples", "mAP")), *["-"] * 6]]
    for label, found in groups:
        both, corrupted = [r["inputs"]["both"] for r in found], []
        for which in (("one", 0.5), ("one", 1.0), ("both", 0.5)):
            values = [c["f1_macro"] for r in found for c in r["corruption"] if (c["kind"], c["amount"]) == which]
            corrupted.append(cell(values) if values else "-")
        table.append([label, len(found), *(cell([r[c] for r in both]) for c in ("f1_micro", "f1_macro", "f1_weighted", "f1_samples", "mAP")),
                      *(cell([r["inputs"][name]["f1_macro"] for r in found]) for name in ("image only", "text only")), *corrupted,
                      cell([r["attention_on_image"]["test"]["mean"] for r in found])])
    text = common.format_table(["run", "seeds", "F1 micro", "macro", "weighted", "samples", "mAP", "macro, image only", "text only",
                                "one corrupted .5", "1.0", "both .5", "weight of image"], table)
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    text += "\n[SYNTHETIC demo data]" if synthetic else ""
    plot_corruption(out / "compare.png", runs, synthetic)
    common.atomic_write(out / "compare.txt", lambda file: file.write(f"{text}\n".encode()))
    print(f"{text}\n{out / 'compare.txt'}, {out / 'compare.png'}")


# ------------------------------------------------------------------------------------------------------------------ main

STAGES = ("all", "labels", "train", "evaluate", "compare")


@common.exit_codes
def main(argv):
    args = common.parse_command_line(argv, (Config,), __doc__, STAGES)
    cfg = common.load_config(Config, args.config, args.overrides, demo=args.demo)
    if args.stage == "compare":
        return compare(cfg)
    if args.fresh and args.stage == "evaluate":
        raise UserError("--fresh starts a run again; --stage evaluate needs a trained one")
    if args.demo:
        if any(override.startswith(("data.dir=", "data.latents_dir=", "data.labels_dir=", "data.image_file=", "data.text_file="))
               for override in args.overrides):
            raise UserError("--demo brings its own data; leave it or the folders out")
        dims = {"clip": (64, 48), "blip2": (96, 128)}.get(cfg.data.backbone, (64, 48))
        cfg.data.dir = demo_data.write_mmimdb(f"data/demo/mmimdb_{cfg.data.backbone}_{cfg.data.views}", views=cfg.data.views,
                                              backbone=cfg.data.backbone, dims=dims)
        cfg.data.latents_dir, cfg.data.labels_dir = f"{cfg.data.dir}/latents", f"{cfg.data.dir}/labels"
        cfg.data.image_file, cfg.data.text_file = (f"mm_imdb1_globals_aug{cfg.data.views}_{cfg.data.backbone}_{m}.npy" for m in ("image", "text"))
    if args.stage == "labels":
        root, *_, folder = paths(cfg.data)
        labels = write_labels(root, folder)
        print(common.format_table(["genre", "films"], [[genre, int(n)] for genre, n in zip(GENRES, labels.sum(0), strict=True)]))
        print(f"{len(labels):,} films, {int(labels.sum()):,} labels: {folder}/")
        return
    if cfg.training.selector_after_freeze and cfg.model.selector != "shared":
        raise UserError(f"training.selector_after_freeze trains the shared selector; model.selector={cfg.model.selector} has none")
    if not cfg.evaluation.amounts:
        raise UserError("evaluation.amounts is empty; give at least one amount of corruption")
    common.check_run(cfg, args.fresh)  # before the data are loaded; nothing is written or moved until they are
    data = load_data(cfg)
    if args.stage == "evaluate":
        read_best(Path(cfg.output_dir), data, cfg)
    folder = common.open_run(cfg, data.fingerprint, args.fresh)
    print(", ".join(f"{split} {len(films):,} films" for split, films in data.splits.items()) + f", {data.views} views")
    if args.stage in ("all", "train"):
        history = train(cfg, data)
        if cfg.evaluation.plots:
            plot_training(folder, cfg, history, data.synthetic)
    if args.stage in ("all", "evaluate"):
        print(f"\n{report(evaluate(cfg, data))}")
    print(f"files: {folder}/ (results.json, metrics.csv, best_model.pt, *.png)")


if __name__ == "__main__":
    sys.exit(main())
