"""Tri-modal memory network on Flickr8k and its spoken captions: is there a shared space, and does test-time training (TTT) keep it under corruption?

Text, image and speech encoders, each with a memory of slots, are fused into one 256-d latent through a central memory and trained with InfoNCE on all
three pairs. At test time queries are corrupted, and the memories (or, as TENT and EATA do, the normalisation layers) adapt without labels; the
gallery never does. Slots move by a rule that descends an objective, and training runs through that update.

    python exp_flickr_ttt.py configs/flickr8k.yaml                  # cache, train, evaluate, ttt
    python exp_flickr_ttt.py configs/flickr8k_tiny.yaml             # a small model, minutes on two CPU cores
    python exp_flickr_ttt.py configs/flickr8k_tiny.yaml --demo      # synthetic scenes and speech, under 90 s on two CPU cores
    python exp_flickr_ttt.py configs/flickr8k.yaml --stage ttt      # the test-time protocol alone
    python exp_flickr_ttt.py configs/flickr8k.yaml --stage compare compare='[results/flickr8k*]'    # runs side by side, mean +- sd over seeds

It prints recalls in six directions (and of fused queries) beside chance, then what each test-time method changes, with paired 95% intervals.

Shapes: B rows a batch (a row is a caption with its photo), A <= B of them spoken, L tokens, T mel frames, D = latent_dim, M slots, G gallery rows.

Deviations from the recipe this follows:
- the gallery holds unique photos, captions of one photo are no negatives, text <-> audio is strict (the caption that was read out);
- the recipe's TENT cannot work: backward under no_grad has no graph, its entropy head is untrained, it picks every parameter with 'memory' in its
  name, and p log p of an underflowed p is NaN. Here the entropy is that of softmax(query . gallery / temperature), and only LayerNorm affines adapt;
- a batch's writes to a slot are averaged (summed, they diverge); in training a random half of the encodings is adapted, so that both uses are known;
- every parameter gets gradient: fusion and presence bits are trained by fused pairs of modalities against the third;
- encodings are standardised (batch statistics in training, fixed ones after): else the modality that is harder to match shrinks to one point.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import re
import struct
import sys
import tempfile
import time
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import demo_data
from common import UserError, ranged

MODALITIES = ("text", "image", "audio")
PAIRS = tuple(itertools.combinations(MODALITIES, 2))
MAX_TOKENS, MAX_FRAMES, RATE, N_MELS = 77, 1024, 16000, 80
METHODS = ("memory-episodic", "memory-online", "tent", "eata", "random")


# ---------------------------------------------------------------------------------------------------------------- config

@dataclass
class DataConfig:
    dir: str = "data/flickr8k"  # Flickr8k_Dataset/, Flickr8k_text/ and, for speech, flickr_audio/
    cache_dir: str = "data/cache"  # photos and mels are decoded into it once
    captions: Literal["one", "all"] = "one"  # of each training photo in an epoch: one at random, or all
    spoken_share: float = ranged(0.5, ">= 0", "<= 1")  # captions=one: how often to draw among the spoken ones where only some captions are
    image_features_file: str = ""  # for model.image_encoder=cached: .pt with feats [N, D] and ids [N], the photos' file names


@dataclass
class ModelConfig:
    latent_dim: int = ranged(256, ">= 8")  # D, of encoders, slots and the unified latent
    memory_size: int = ranged(64, ">= 2")  # slots of the central memory; text, image and audio have half as many
    num_heads: int = ranged(4, ">= 1")  # of every attention
    num_layers: int = ranged(3, ">= 1")  # transformer layers of the text and of the image encoder
    image_encoder: Literal["vit", "cached"] = "vit"  # a vision transformer on pixels, or precomputed features
    image_size: int = ranged(224, ">= 8")  # pixels of a side, cropped from 8/7 of it
    patch_size: int = ranged(16, ">= 1")  # pixels of a side of a patch
    audio_channels: list[int] = field(default_factory=lambda: [64, 128, 256, 512], metadata={"bounds": (">= 1",)})  # of the stride-2 convolutions
    dropout: float = ranged(0.1, ">= 0", "< 1")  # in transformers, before the audio projection and in the fusion
    feedback_steps: int = ranged(2, ">= 1")  # reads of the central memory
    ttt_topk: int = ranged(8, ">= 2")  # slots that a write touches; half as many in the memories of one modality
    ttt_lr: float = ranged(0.1, "> 0", "<= 1")  # eta, step of a write


@dataclass
class TrainingConfig:
    batch_size: int = ranged(64, ">= 2")  # captions a step
    bucket: int = ranged(8, ">= 1")  # batches sorted by length of speech together: more save padding; equal lengths are harder to tell apart
    epochs: int = ranged(30, ">= 1")  # passes over the training photos (or captions)
    optimizer: Literal["adamw"] = "adamw"  # the only one
    learning_rate: float = ranged(5e-4, "> 0")  # peak, after warm-up, then a cosine to 0
    weight_decay: float = ranged(0.01, ">= 0")  # on every parameter
    warmup: float = ranged(0.05, ">= 0", "< 1")  # share of the steps
    clip_norm: float = ranged(1.0, "> 0")  # of the gradient
    through_update: bool = True  # train through the memory's inner update, on a random half of the encodings
    augment: bool = True  # crops, mirror images, SpecAugment
    spell: float = ranged(0.02, ">= 0", "< 1")  # share of training words read by their characters, as unknown ones are
    use_amp: bool = True  # bfloat16 on CUDA


@dataclass
class LossConfig:
    temperature: float = ranged(0.07, "> 0")  # of InfoNCE, and of the entropies at test time
    fused: float = ranged(0.5, ">= 0")  # weight of a random pair of modalities against the third


@dataclass
class EvaluationConfig:
    batch_size: int = ranged(128, ">= 1")  # rows embedded at once
    stream_batch: int = ranged(16, ">= 1")  # queries that arrive together at test time
    n_orders: int = ranged(3, ">= 1")  # stream orders, averaged
    n_severities: int = ranged(4, ">= 1")  # of each corruption, mildest first (there are 3 or 4)
    n_bootstrap: int = ranged(1000, ">= 100")  # resamples of the photos for intervals
    plots: bool = True  # draw the PNGs


@dataclass
class Config:
    experiment: str = "flickr_ttt"  # which script a YAML belongs to
    seed: int = ranged(42, ">= 0", "< 4294967296")  # weights, data order, augmentation, corruption
    device: str = "auto"  # auto | cuda | mps | cpu
    num_workers: int = ranged(0, ">= 0")  # threads that decode files (0: one a core)
    output_dir: str = ""  # run folder (empty: results/<config name>[,overrides])
    wandb: bool = False  # mirror metrics.csv to Weights & Biases
    compare: list[str] = field(default_factory=list)  # run folders for --stage compare
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# ---------------------------------------------------------------------------------------------------------- speech, text

@functools.lru_cache
def mel_filters(device):
    """[201, 80] float32 triangles of peak 1 (no area norm), evenly spaced from 0 to 8 kHz on HTK's scale, mel(f) = 2595 log10(1 + f / 700 Hz)."""
    mels = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), N_MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    slopes = edges - torch.linspace(0, 8000, 201)[:, None]  # [201, 82], of each frequency to each edge
    widths = edges.diff()
    return torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp(min=0).to(device)


def mel_spectrogram(waveform):
    """Power mel spectrogram: periodic Hann windows of 25 ms every 10 ms, centred, the ends reflected.

    waveform: [.., n] float32 or float64 in [-1, 1], 16 kHz, n > 200. Returns: [.., 80, 1 + n // 160] >= 0, of the same type.
    Raises: RuntimeError (torch.stft) if n is too short to be reflected. Values: librosa's with htk=True, norm=None.
    """
    window = torch.hann_window(400, device=waveform.device, dtype=waveform.dtype)
    flat = waveform.reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(flat, 400, 160, window=window, center=True, pad_mode="reflect", return_complex=True)
    real, imaginary = torch.view_as_real(spectrum).square().unbind(-1)  # [N, 201, frames]; a sum over the last axis would take longer than the stft
    return (mel_filters(waveform.device).to(waveform.dtype).T @ (real + imaginary)).view(*waveform.shape[:-1], N_MELS, -1)


def log_mel(waveform):
    """Natural log(mel + 1e-6) [.., 80, frames] of a waveform [.., samples]; see `mel_spectrogram`."""
    return torch.log(mel_spectrogram(waveform) + 1e-6)


def read_wav(raw):
    """[n] float32 at 16 kHz of a file's bytes: stereo is mixed down, other rates are resampled. Raises: ValueError on less than 25 ms, or NaN.

    A 16-bit file is read here, since a header may state a wrong length: then the samples go to the end of the file. soundfile reads all others.
    """
    at, kind, data = 12, None, None
    while raw[:4] == b"RIFF" and at + 8 <= len(raw):
        name, size = raw[at:at + 4], int.from_bytes(raw[at + 4:at + 8], "little")
        if name == b"fmt ":
            kind = struct.unpack("<HHIIHH", raw[at + 8:at + 24])  # format, channels, rate, .., bits
        if name == b"data":
            after = raw[at + 8 + size + size % 2:][:4]  # the name of another chunk, if the length is right
            data = raw[at + 8:at + 8 + size] if size and (not after or (len(after) == 4 and after.replace(b" ", b"").isalnum())) else raw[at + 8:]
            break
        at += 8 + size + size % 2
    if kind and data is not None and kind[0] == 1 and kind[5] == 16:
        channels, rate = kind[1], kind[2]
        wave = np.frombuffer(data[:len(data) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels).astype(np.float32) / 32768
    else:
        import soundfile
        wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    wave = torch.from_numpy(wave.mean(1))
    if len(wave) * RATE < 400 * rate:
        raise ValueError(f"{len(wave)} samples at {rate} Hz, less than 25 ms")
    if not torch.isfinite(wave).all():
        raise ValueError("NaN or infinite samples")
    if rate != RATE:  # band-limited, by the spectrum of the whole recording
        n = round(len(wave) * RATE / rate)
        wave = torch.fft.irfft(torch.fft.rfft(wave)[:n // 2 + 1], n=n) * (n / len(wave))
    return wave


def words_of(caption):
    """Lower-cased words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def build_vocabulary(captions):
    """{token: id}: padding 0, unknown character 1, characters (as '##a'), and the words that occur at least twice, most frequent first."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    characters = sorted({c for word in counts for c in word})
    words = sorted((word for word, n in counts.items() if n >= 2), key=lambda word: (-counts[word], word))
    return {token: i for i, token in enumerate(["<pad>", "<unk>", *(f"##{c}" for c in characters), *words])}


def tokenise(captions, vocabulary, spell=0.0, draws=None):
    """[B, L <= 77] int64 token ids of B captions, padded with 0; an empty caption is one unknown character.

    Words that the vocabulary lacks, and with `draws` (a NumPy generator) a share `spell` of the others, are read by their characters.
    """
    rows = []
    for caption in captions:
        words, ids = words_of(caption), []
        spelled = draws.random(len(words)) < spell if draws is not None and spell else [False] * len(words)
        for word, by_character in zip(words, spelled, strict=True):
            if word in vocabulary and not by_character:
                ids.append(vocabulary[word])
            else:
                ids += [vocabulary.get(f"##{c}", 1) for c in word]
        rows.append(torch.tensor(ids[:MAX_TOKENS] or [1]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ------------------------------------------------------------------------------------------------------------------ data

@dataclass
class Data:
    """Photos and captions by row; photos and mels are memory-mapped, or on the device where they fit."""
    photos: torch.Tensor  # [P, 3, S, S] uint8, or features [P, D] float32
    captions: list  # [C] text
    photo_of: torch.Tensor  # [C] row of photos
    mels: torch.Tensor  # [frames, 80] float16, log mel
    speech: torch.Tensor  # [C, 2]: first row of mels, number of frames (0: not spoken)
    wavs: list  # [C] path or None
    splits: dict  # train | dev | test -> [n] caption rows
    vocabulary: dict
    mel_statistics: tuple  # (mean [80, 1], deviation [80, 1]) over training frames, on the device
    image_size: int
    counts: dict  # what was dropped or is missing
    device: torch.device
    fingerprint: str
    synthetic: bool

    @property
    def modalities(self):
        return MODALITIES if len(self.mels) else MODALITIES[:2]


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def decoded(folder, name, paths, decode, shape, dtype, workers):
    """Every file decoded once: (mapped rows [R, *shape], rows of each file [N], {file: why it could not be read}, fingerprint of the contents).

    decode(bytes) -> array [rows, *shape]. The cache's name holds a hash of the transform's name and of the files' names, sizes and times.
    """
    def about(path):
        return (path.name, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (path.name,)

    def read(path):
        nothing = np.empty((0, *shape), dtype), b""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:  # any other OSError ends the run: it may pass, and the cache would keep it
            return *nothing, "no such file"
        try:
            return decode(raw), hashlib.sha256(raw).digest(), None
        except (MemoryError, torch.OutOfMemoryError, ImportError):
            raise
        except Exception as error:  # PIL and soundfile raise kinds of their own
            return *nothing, first_line(error)
    key = hashlib.sha256(json.dumps([name, shape, str(np.dtype(dtype)), [about(path) for path in paths]]).encode()).hexdigest()[:16]
    folder = Path(folder)
    data_file, index_file = folder / f"{name}_{key}.bin", folder / f"{name}_{key}.json"
    if not index_file.exists():  # written last
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = tempfile.TemporaryDirectory(dir=folder)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder} cannot be written ({error.strerror}); choose another") from None
        counts, problems, digest = [], {}, hashlib.sha256()

        def write(file):
            with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
                for start in common.progress(range(0, len(paths), 256), f"decoding {name}"):  # some at a time: they wait in memory for their turn
                    for path, (rows, content, problem) in zip(paths[start:start + 256], pool.map(read, paths[start:start + 256]), strict=True):
                        counts.append(len(rows))
                        digest.update(content or b"-")
                        if problem:
                            problems[path.name] = problem
                        file.write(np.ascontiguousarray(rows, dtype).tobytes())
        with own:  # runs that start together decode twice, but never into one file
            common.atomic_write(Path(own.name, data_file.name), write)
            os.replace(Path(own.name, data_file.name), data_file)
        common.write_json(index_file, {"counts": counts, "problems": problems, "fingerprint": digest.hexdigest()[:16]})
    index = common.read_json(index_file)
    n = sum(index["counts"])
    if not data_file.is_file() or data_file.stat().st_size != n * math.prod(shape) * np.dtype(dtype).itemsize:
        raise UserError(f"{data_file} is damaged; delete it and {index_file.name} to decode the files again")
    rows = np.memmap(data_file, dtype, mode="c", shape=(n, *shape)) if n else np.empty((0, *shape), dtype)
    return torch.from_numpy(rows), torch.tensor(index["counts"], dtype=torch.int64), index["problems"], index["fingerprint"]


def decode_photo(raw, size):
    """[1, 3, size, size] uint8 of a file's bytes, squeezed to a square: a crop would cut off what captions tell of."""
    image = Image.open(io.BytesIO(raw))
    image.draft("RGB", (size, size))  # a JPEG is read at a half, a quarter or an eighth of its size where that is enough
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)[None]


def decode_speech(raw, device):
    """[frames <= 1024, 80] float16 log mel of a file's bytes."""
    return log_mel(read_wav(raw).to(device)).T[:MAX_FRAMES].half().cpu().numpy()


def find(root, *names):
    """The first of root/name that exists. Raises: UserError with what to do."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root / names[0]}: no such file or folder; download Flickr8k_Dataset.zip and Flickr8k_text.zip (github.com/jbrownlee/Datasets, "
                    "release Flickr8k) and flickr_audio (sls.csail.mit.edu/downloads/flickraudio), set data.dir=, or try --demo")


def read_lines(path):
    """[(number from 1, line)] of a text file, blank lines left out. Raises: UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # without the mark that some editors put at the start
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_captions(root):
    """({photo: {number: caption}}, file) of Flickr8k.token.txt (`name.jpg#k<TAB>caption`), or of Kaggle's captions.txt (CSV: image,caption)."""
    path = find(root, "Flickr8k_text/Flickr8k.token.txt", "Flickr8k.token.txt", "captions.txt", "Flickr8k_text/captions.txt")
    captions, kaggle = {}, path.name == "captions.txt"
    for number, line in read_lines(path):
        if kaggle:
            row = [] if line.count('"') % 2 else next(csv.reader([line]))  # a quote that is not closed would hide the lines after it
            if len(row) != 2:
                raise UserError(f"{path}: line {number}: expected image,caption or image,\"caption, with commas\", found {line[:60]!r}")
            if number > 1 or row[0] != "image":
                of_photo = captions.setdefault(row[0].strip(), {})
                of_photo[len(of_photo)] = row[1].strip()
        else:
            found = re.fullmatch(r"(.+)#(\d+)\t(.*)", line)
            if not found:
                raise UserError(f"{path}: line {number}: expected name.jpg#k<TAB>caption, found {line[:60]!r}")
            captions.setdefault(found[1], {})[int(found[2])] = found[3].strip()
    return captions, path


def read_speech_list(root):
    """({(photo, number): wav}, file) of flickr_audio/wav2capt.txt (`<wav> <photo> #k`); ({}, None) without the folder flickr_audio."""
    if not (root / "flickr_audio").is_dir():
        return {}, None
    path, speech = find(root, "flickr_audio/wav2capt.txt"), {}
    for number, line in read_lines(path):
        words = line.split()
        if len(words) != 3 or not re.fullmatch(r"#?\d+", words[2]):
            raise UserError(f"{path}: line {number}: expected <wav> <photo> #k, found {line[:60]!r}")
        speech[words[1], int(words[2].lstrip("#"))] = root / "flickr_audio/wavs" / words[0]
    return speech, path


def read_features(path, photos):
    """(features [R, D] float32, whether each of the files `photos` has some [N], {file name: why it has none}).

    path: a .pt dict of feats [N, D] (of [N, layers, D] the last layer's) and ids [N], file names.
    Raises: UserError on a file of another kind, non-finite features, or a photo that can be read but has none (encode.py leaves out the others).
    """
    if not path:
        raise UserError("model.image_encoder=cached needs data.image_features_file=, a .pt with feats [N, D] and ids, the photos' file names")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        feats, ids = content["feats"], [Path(str(i)).stem for i in content["ids"]]
        if feats.ndim == 3:
            feats = feats[:, -1, :content["dims"][-1] if "dims" in content else None]
    except Exception as error:  # torch, pickle and zipfile raise kinds of their own
        raise UserError(f"{path}: cannot be read as a dict of feats and ids ({common.reason_of(error)})") from None
    row_of = {name: i for i, name in enumerate(ids)}
    if feats.ndim != 2 or len(feats) != len(ids) or len(row_of) != len(ids):
        raise UserError(f"{path}: expected feats [N, D] with N different ids, found {list(feats.shape)}, {len(row_of)} different of {len(ids)} ids")
    missing, problems = [photo for photo in photos if photo.stem not in row_of], {}
    for photo in missing:
        try:
            decode_photo(photo.read_bytes(), 8)
        except Exception as error:
            problems[photo.name] = first_line(error)
        else:
            raise UserError(f"{path}: no features of {len(missing)} of {len(photos)} photos, such as {photo.name}; encode the photos again")
    feats = feats[[row_of[photo.stem] for photo in photos if photo.stem in row_of]].float()
    if not torch.isfinite(feats).all():
        raise UserError(f"{path}: NaN or infinite features; encode the photos again")
    return feats, torch.tensor([photo.stem in row_of for photo in photos]), problems


def load_data(cfg):
    """`Data` of cfg; photos and speech are decoded into the cache the first time. Vocabulary and mel statistics come from the training split alone.

    Raises: UserError naming the file, what was expected and found: missing or unreadable lists, a photo in two splits, fewer than two photos with
    captions in a split, speech for fewer than two training captions, precomputed features that do not fit.
    """
    device, root = common.pick_device(cfg.device), Path(cfg.data.dir)
    photo_dir = find(root, "Flickr8k_Dataset", "Flicker8k_Dataset", "Images")
    captions, caption_file = read_captions(root)
    spoken, speech_file = read_speech_list(root)
    files = [caption_file, *([speech_file] if speech_file else [])]
    names, seen = {}, {}
    for split in ("train", "dev", "test"):
        files.append(find(root, f"Flickr8k_text/Flickr_8k.{split}Images.txt", f"Flickr_8k.{split}Images.txt"))
        names[split] = [name for _, name in read_lines(files[-1])]
        for name in names[split]:
            if name in seen:
                raise UserError(f"{files[-1]}: {name} is in {seen[name]} too; a photo belongs to one split, once")
            seen[name] = split
    files_of_photos, size = [photo_dir / name for name in seen], -(-cfg.model.image_size * 8 // 7)
    if cfg.model.image_encoder == "cached":
        photos, found, problems = read_features(cfg.data.image_features_file, files_of_photos)
        fingerprint = common.fingerprint([cfg.data.image_features_file])
    else:
        photos, found, problems, fingerprint = decoded(cfg.data.cache_dir, f"photos{size}", files_of_photos, lambda raw: decode_photo(raw, size),
                                                   (3, size, size), np.uint8, cfg.num_workers)
    row_of = {name: i for i, name in enumerate(itertools.compress(seen, found.tolist()))}
    items = [(split, name, k) for name, split in seen.items() if name in row_of for k in sorted(captions.get(name, {}))]
    splits = {split: torch.tensor([i for i, item in enumerate(items) if item[0] == split]) for split in names}
    for split, listed in names.items():
        if (n := len({item[1] for item in items if item[0] == split})) < 2:
            why = f" (the first that cannot be read: {': '.join(next(iter(problems.items())))})" if problems else ""
            raise UserError(f"{root}: {n} of {len(listed)} listed {split} photos can be read and have captions{why}; check the folders")
    wavs = [spoken.get((name, k)) for _, name, k in items]
    there = [path for path in wavs if path]
    mels, frames, broken, content = decoded(cfg.data.cache_dir, "mels", there, lambda raw: decode_speech(raw, device), (N_MELS,), np.float16,
                                            cfg.num_workers if device.type == "cpu" else 1)
    speech = torch.zeros(len(items), 2, dtype=torch.int64)
    speech[[i for i, path in enumerate(wavs) if path]] = torch.stack([frames.cumsum(0) - frames, frames], dim=1)
    if speech_file and (speech[splits["train"], 1] > 0).sum() < 2:
        why = f" (the first that cannot be read: {': '.join(next(iter(broken.items())))})" if broken else ""
        raise UserError(f"{speech_file}: fewer than 2 of its {len(spoken)} recordings are readable and of a caption of a training photo{why}; "
                        "check flickr_audio, or move it away to run on image and text alone")
    text = [captions[name][k] for _, name, k in items]
    counts = {"photos missing or broken": len(problems), "photos without captions": sum(name not in captions for name in row_of),
              "captions not spoken": len(items) - len(there), "recordings missing or broken": len(broken)}
    train_frames = speech[splits["train"]].sum(1).max() if len(mels) else 0  # train comes first
    sample = mels[:train_frames][::max(1, int(train_frames) // 2**18)].double()
    mean, deviation = (sample.mean(0), sample.std(0).clamp(min=1e-3)) if len(sample) else (torch.zeros(N_MELS), torch.ones(N_MELS))
    digest = hashlib.sha256(f"{common.fingerprint(files)}{fingerprint}{content}".encode()).hexdigest()[:16]
    if device.type == "cuda" and photos.numel() * photos.element_size() < torch.cuda.mem_get_info(device)[0] // 4:
        photos = photos.to(device)
    return Data(photos, text, torch.tensor([row_of[name] for _, name, _ in items]), mels, speech, wavs, splits,
                build_vocabulary([text[i] for i in splits["train"].tolist()]), tuple(x.float()[:, None].to(device) for x in (mean, deviation)),
                cfg.model.image_size, counts, device, digest, (root / "SYNTHETIC_DEMO").exists())


def random_data(cfg):
    """Random photos, captions of 12 of 4,520 words and 5 s of speech, one batch: for profile_flops.py where the data are not at hand."""
    device, n, size, draws = common.pick_device(cfg.device), cfg.training.batch_size, -(-cfg.model.image_size * 8 // 7), np.random.default_rng(0)
    if cfg.model.image_encoder == "cached":
        raise UserError("model.image_encoder=cached: the width of its features is not known without data.image_features_file=")
    words = [f"w{i}" for i in range(4520)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'\""), *words])}
    speech = torch.stack([torch.arange(n) * 500, torch.full((n,), 500)], dim=1)
    return Data(torch.randint(256, (n, 3, size, size), dtype=torch.uint8), [" ".join(draws.choice(words, 12)) for _ in range(n)], torch.arange(n),
                torch.randn(500 * n, N_MELS).half(), speech, [None] * n, dict.fromkeys(("train", "dev", "test"), torch.arange(n)), vocabulary,
                (torch.zeros(N_MELS, 1, device=device), torch.ones(N_MELS, 1, device=device)), cfg.model.image_size, {}, device, "random", True)


def raw_items(data, modality, items, draws=None):
    """What is queried with, before it becomes the model's input: captions, photos [n, 3, S, S] uint8 (or features [n, D]), or log mels [T, 80] each.

    items: [n] rows of photos for modality image, else of captions. Photos are cropped in the middle, or with `draws` (a NumPy generator) anywhere and
    half of them mirrored.
    """
    if modality == "text":
        return [data.captions[i] for i in items.tolist()]
    if modality == "audio":
        return [data.mels[first:first + n] for first, n in data.speech[items].tolist()]
    if data.photos.ndim == 2:
        return data.photos[items.to(data.photos.device)]
    side, margin = data.image_size, data.photos.shape[-1] - data.image_size
    corners = draws.integers(margin + 1, size=(len(items), 2)) if draws is not None else np.full((len(items), 2), margin // 2)
    crops = torch.stack([data.photos[p, :, y:y + side, x:x + side] for p, (y, x) in zip(items.tolist(), corners.tolist(), strict=True)])
    if draws is not None:
        mirrored = torch.from_numpy(draws.random(len(items)) < 0.5).nonzero()[:, 0].to(crops.device)
        crops[mirrored] = crops[mirrored].flip(3)
    return crops


def as_input(data, modality, raw):
    """{argument: tensor} of the model for raw items."""
    if modality == "text":
        return {"text": tokenise(raw, data.vocabulary).to(data.device)}
    if modality == "image":
        raw = raw.to(data.device, non_blocking=True)
        return {"image": raw.float() if raw.ndim == 2 else raw.float().sub_(115).div_(68)}
    frames = torch.tensor([len(x) for x in raw], device=data.device)
    padded = nn.utils.rnn.pad_sequence(raw, batch_first=True).to(data.device, non_blocking=True).float().transpose(1, 2)  # [A, 80, T]
    mean, deviation = data.mel_statistics
    return {"audio": (padded - mean) / deviation, "audio_frames": frames}


def spec_augment(audio, frames, draws):
    """Zeroes (the mean) in every row of audio [A, 80, T] two bands of up to 12 mels and two spans of up to 15% of its frames (Park et al. 2019)."""
    def any_of(length, widest, places):
        """[A, places] bool: in one of two spans of up to `widest` places, anywhere in length [A, 1, 1] or a number."""
        start, width = torch.from_numpy(draws.random((2, len(audio), 2, 1)).astype(np.float32)).to(audio.device)
        place, first = torch.arange(places, device=audio.device), (start * length).floor()
        return ((place >= first) & (place < first + (width * widest).floor())).any(1)
    length = frames[:, None, None]
    band, span = any_of(N_MELS, 13, N_MELS), any_of(length, 0.15 * length, audio.shape[2])
    return audio * ~(band[:, :, None] | span[:, None])


def make_batch(data, indices, draws=None, spell=0.0):
    """Model input of caption rows [B]: text [B, L], image [B, ...], photo [B] ids; and of the A spoken ones audio [A, 80, T], audio_frames [A],
    audio_rows [A] (their places in the batch). draws: a NumPy generator for augmentation."""
    photos, spoken = data.photo_of[indices], data.speech[indices, 1].nonzero()[:, 0]
    text = tokenise(raw_items(data, "text", indices), data.vocabulary, spell, draws)
    batch = {"text": text.to(data.device, non_blocking=True), **as_input(data, "image", raw_items(data, "image", photos, draws)),
             "photo": photos.to(data.device, non_blocking=True)}
    if len(spoken):
        batch |= {**as_input(data, "audio", raw_items(data, "audio", indices[spoken])), "audio_rows": spoken.to(data.device, non_blocking=True)}
        if draws is not None:
            batch["audio"] = spec_augment(batch["audio"], batch["audio_frames"], draws)
    return batch


def epoch_batches(data, cfg, epoch):
    """The caption rows of every batch of an epoch: a pure function of seed and epoch. Speech of similar length shares a batch."""
    draws, rows = np.random.default_rng([cfg.seed, epoch]), data.splits["train"].numpy()
    if cfg.data.captions == "one":  # the caption with the highest key of each photo
        photo, frames = data.photo_of.numpy()[rows], data.speech.numpy()[rows, 1]
        prefer = draws.random(photo.max() + 1) < cfg.data.spoken_share
        order = np.lexsort((draws.random(len(rows)) + (prefer[photo] & (frames > 0)), photo))
        rows = rows[order[np.append(np.diff(photo[order]) > 0, True)]]
    rows = draws.permutation(rows)
    frames = data.speech.numpy()[rows, 1]
    if frames.any():  # those without speech anywhere in between
        frames = np.where(frames > 0, frames, draws.choice(frames[frames > 0], len(rows)))
    n_batches, pool = steps_per_epoch(cfg, data), np.arange(len(rows)) // (cfg.training.bucket * cfg.training.batch_size)
    batches = np.array_split(rows[np.lexsort((frames, pool))], n_batches)
    return [torch.from_numpy(batches[i]) for i in draws.permutation(n_batches)]


def steps_per_epoch(cfg, data):
    """Batches of an epoch; the last rows are spread over all of them."""
    rows = data.splits["train"]
    n = len(data.photo_of[rows].unique()) if cfg.data.captions == "one" else len(rows)
    return max(1, min(-(-n // cfg.training.batch_size), n // 2))  # no batch of one row


def total_steps(cfg, data):
    """Optimisation steps of a run."""
    return cfg.training.epochs * steps_per_epoch(cfg, data)


# ----------------------------------------------------------------------------------------------------------------- model

class Block(nn.Module):
    """Pre-norm transformer layer [N, L, D] -> [N, L, D]; mask [N, 1, 1, L] is True where there is something."""

    def __init__(self, dim, n_heads, dropout):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        n, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # [N, heads, L, D / heads]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(n, length, dim)))
        return x + self.drop(self.mlp(self.norm2(x)))


class TextEncoder(nn.Module):
    """Tokens [B, L] (0: padding) -> mean over the tokens [B, D]."""

    def __init__(self, vocab_size, dim, n_heads, n_layers, dropout):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab_size, dim), nn.Parameter(0.02 * torch.randn(MAX_TOKENS, dim))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks, self.norm = nn.ModuleList(Block(dim, n_heads, dropout) for _ in range(n_layers)), nn.LayerNorm(dim)

    def forward(self, text):
        there = text != 0
        x = self.embed(text) + self.position[:text.shape[1]]
        for block in self.blocks:
            x = block(x, there[:, None, None])
        return (self.norm(x) * there[:, :, None]).sum(1) / there.sum(1, keepdim=True)


class ImageEncoder(nn.Module):
    """Normalised pixels [B, 3, S, S] -> the class token of a vision transformer [B, D] (Dosovitskiy et al. 2021)."""

    def __init__(self, image_size, patch_size, dim, n_heads, n_layers, dropout):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(0.02 * torch.randn((image_size // patch_size) ** 2 + 1, dim))
        self.blocks, self.norm = nn.ModuleList(Block(dim, n_heads, dropout) for _ in range(n_layers)), nn.LayerNorm(dim)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)  # [B, patches, D]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class AudioEncoder(nn.Module):
    """Log mels [B, 80, T], of which `frames` [B] are there -> [B, D]: stride-2 convolutions, then the mean over time and frequency.

    The input and each layer, normalised over its channels alone, are zeroed past the end, so that what lies there changes nothing.
    """

    def __init__(self, channels, dim, dropout):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise([1, *channels]))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.pitch = nn.Parameter(torch.zeros(N_MELS // 2, channels[0]))  # which mel a feature is of: convolutions cannot tell
        self.project = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels[-1], dim), nn.LayerNorm(dim))

    def forward(self, audio, frames):
        x = (audio * (torch.arange(audio.shape[2], device=audio.device) < frames[:, None, None]))[:, None]  # [B, 1, 80, T]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x, frames = conv(x), (frames + 1) // 2
            x = norm(x.permute(0, 2, 3, 1))  # [B, mels, T, C]
            if i == 0:
                x = x + self.pitch[:, None]
            there = torch.arange(x.shape[2], device=x.device) < frames[:, None]  # [B, T]
            x = (F.gelu(x) * there[:, None, :, None]).permute(0, 3, 1, 2)
        return self.project(x.sum(3).mean(2) / frames[:, None])


def slot_weights(slots, x, topk):
    """(a, chosen), both [B, M], of slots [M, D] and x [B, D]: a is the softmax of x . slots / sqrt(D) over a row's top-k slots, chosen is 1 there."""
    top = (x @ slots.T / slots.shape[1] ** 0.5).topk(topk, dim=1)
    weights = torch.zeros(len(x), len(slots), device=x.device, dtype=top.values.dtype).scatter(1, top.indices, top.values.softmax(1))
    return weights, torch.zeros_like(weights).scatter(1, top.indices, 1.0)


def memory_write(slots, x, topk, lr):
    """One write into the slots: m_k + lr * mean over the rows b that chose slot k of a_bk (x_b - m_k), a as in `slot_weights`.

    It is a step of gradient descent on 1/2 sum_k mean_b a_bk |m_k - x_b|^2 with a held fixed. Deviation from the recipe: the mean; its sum over b
    diverges once lr * sum_b a_bk passes 2.
    slots: [M, D] float. x: [B, D], detached here. topk: slots a row writes to, 1..M. lr: eta in (0, 1].
    Returns: new slots [M, D]; those that no row chose keep their bits.
    """
    x = x.detach().to(slots.dtype)
    a, chosen = slot_weights(slots, x, topk)
    n = chosen.sum(0)[:, None]  # [M, 1]
    return torch.where(n > 0, slots + lr * (a.T @ x - a.sum(0)[:, None] * slots) / n.clamp(min=1), slots)


class SlotMemory(nn.Module):
    """LayerNorm(x + attention(x; slots)) [B, D]; multi-head, x asks, M learned slots are keys and values.

    Two ways to adapt: with `enable_ttt_updates`, in eval mode, the slots that all rows share move towards what they were asked, after the answer
    (online). With episodic=True every row has slots of its own, written before the answer and gone after it.
    """

    def __init__(self, dim, n_slots, n_heads, ttt_topk, ttt_lr, enable_ttt_updates=False):
        super().__init__()
        self.slots, self.norm = nn.Parameter(0.02 * torch.randn(n_slots, dim)), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.n_heads, self.ttt_topk, self.ttt_lr = n_heads, min(ttt_topk, n_slots), ttt_lr
        self.enable_ttt_updates = enable_ttt_updates

    def adapt(self, x):
        """(lr * a [B, M], x [B, D]), which say how each row's own slots differ from the shared ones."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(self.slots.dtype)
            return self.ttt_lr * slot_weights(self.slots, x, self.ttt_topk)[0], x

    def read(self, x, adapted=None):
        """[B, D]. adapted: (w, x) of `adapt`, then row b's slots are m_k + w_bk (x_b - m_k).

        Keys and values are affine in the slots, so these are never formed: O(B M), not O(B M D^2).
        """
        q, k, v = (y.view(len(y), self.n_heads, -1) for y in (self.query(x), self.key(self.slots), self.value(self.slots)))  # [B or M, heads, d]
        logits = torch.einsum("bhd,mhd->bhm", q, k)
        if adapted is not None:
            w, written = adapted[0][:, None], [f(adapted[1]).view(q.shape) for f in (self.key, self.value)]  # [B, 1, M]
            logits = logits + w * ((q * written[0]).sum(2, keepdim=True) - logits)
        p = (logits.to(self.slots.dtype) / q.shape[2] ** 0.5).softmax(2)  # [B, heads, M]
        if adapted is None:
            y = torch.einsum("bhm,mhd->bhd", p.to(v.dtype), v)
        else:
            y = torch.einsum("bhm,mhd->bhd", (p * (1 - w)).to(v.dtype), v) + (p * w).sum(2, keepdim=True).to(v.dtype) * written[1]
        return self.norm(x + self.out(y.flatten(1)))

    def write(self, x):
        """The online write, where it is switched on."""
        if self.enable_ttt_updates and not self.training:
            with torch.no_grad():
                self.slots.copy_(memory_write(self.slots, x, self.ttt_topk, self.ttt_lr))

    def forward(self, x, episodic=False):
        y = self.read(x, self.adapt(x) if episodic else None)
        self.write(x)
        return y


class MultiModalMemoryNetwork(nn.Module):
    """Text, image and audio, any of them, into one latent: model(text, image, audio, audio_frames, episodic) -> dict with
    `central_latent` [B, D], not normalised, and `encodings` {modality: [B, D]}.

    text: [B, L <= 77] int64, 0 is padding. image: [B, 3, S, S] normalised pixels, or [B, image_features]. audio: [B, 80, T] or [B, 1, 80, T]
    standardised log mels; audio_frames: [B] int64, how many of the T are there (default: all). episodic: every row reads slots of its own.
    Raises: ValueError if nothing is given, or a modality that the model was built without.
    """

    objective = types.MappingProxyType(  # what `train_step` minimises; build_model sets the config's
        {"temperature": 0.07, "fused": 0.5, "through_update": True, "clip_norm": 1.0, "use_amp": True})

    def __init__(self, vocab_size=4565, latent_dim=256, memory_size=64, num_heads=4, num_layers=3, image_size=224, patch_size=16, image_features=0,
                 audio_channels=(64, 128, 256, 512), modalities=MODALITIES, dropout=0.1, feedback_steps=2, enable_ttt_updates=False, ttt_topk=8,
                 ttt_lr=0.1):
        super().__init__()
        dim = latent_dim
        text = TextEncoder(vocab_size, dim, num_heads, num_layers, dropout)
        image = (nn.Sequential(nn.LayerNorm(image_features), nn.Dropout(dropout), nn.Linear(image_features, dim), nn.LayerNorm(dim)) if image_features
                 else ImageEncoder(image_size, patch_size, dim, num_heads, num_layers, dropout))
        self.encoders = nn.ModuleDict({"text": text, "image": image})
        if "audio" in modalities:
            self.encoders["audio"] = AudioEncoder(audio_channels, dim, dropout)

        def memory(n, topk):
            return SlotMemory(dim, n, num_heads, topk, ttt_lr, enable_ttt_updates)
        self.standardise = nn.ModuleDict({m: nn.BatchNorm1d(dim) for m in modalities})  # else what is hard to match collapses into one point
        self.memories = nn.ModuleDict({m: memory(memory_size // 2, max(1, ttt_topk // 2)) for m in modalities})
        self.central, self.feedback_steps = memory(memory_size, ttt_topk), feedback_steps
        self.modality_type_embeddings = nn.Parameter(0.02 * torch.randn(len(MODALITIES), dim))
        self.fusion = nn.Sequential(nn.Linear(len(MODALITIES) * (dim + 1), 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))
        self.feedback = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def encode(self, modality, *inputs, episodic=False):
        """[B, D] of one modality after its memory, from the input of its encoder (audio: mels and frames). Raises: ValueError if it has none."""
        if modality not in self.encoders:
            raise ValueError(f"this model was trained without {modality}; it has {', '.join(self.encoders)}")
        return self.memories[modality](self.standardise[modality](self.encoders[modality](*inputs)), episodic)

    def fuse_modalities(self, encodings, episodic=False):
        """Latent [B, D] of {modality: [B, D]}; one that is not there is zeros plus its type embedding, presence bit 0. Raises: ValueError if {}."""
        if not encodings:
            raise ValueError("nothing to fuse: give at least one of text, image and audio")
        x = next(iter(encodings.values()))
        parts = [encodings.get(m, torch.zeros_like(x)) + self.modality_type_embeddings[i] for i, m in enumerate(MODALITIES)]
        presence = x.new_tensor([float(m in encodings) for m in MODALITIES]).expand(len(x), -1)
        fused = z = self.fusion(torch.cat([*parts, presence], dim=1))
        adapted = self.central.adapt(fused) if episodic else None
        for _ in range(self.feedback_steps):
            z = self.central.read(z + self.feedback(z), adapted)
        self.central.write(fused)
        return z

    def forward(self, text=None, image=None, audio=None, audio_frames=None, episodic=False):
        given = {"text": (text,), "image": (image,)}
        if audio is not None:
            audio = audio.flatten(0, 1) if audio.ndim == 4 else audio
            given["audio"] = (audio, audio_frames if audio_frames is not None else torch.full((len(audio),), audio.shape[2], device=audio.device))
        encodings = {m: self.encode(m, *inputs, episodic=episodic) for m, inputs in given.items() if inputs[0] is not None}
        return {"central_latent": self.fuse_modalities(encodings, episodic), "encodings": encodings}


def build_model(cfg, data):
    """MultiModalMemoryNetwork for the data's vocabulary, features and modalities, on their device. Raises: UserError on sizes that do not fit."""
    m = cfg.model
    if not m.audio_channels:
        raise UserError("model.audio_channels=[] leaves no convolution; give one number of channels or more")
    if m.latent_dim % m.num_heads:
        raise UserError(f"model.latent_dim={m.latent_dim} must be a multiple of model.num_heads={m.num_heads}")
    if m.image_size % m.patch_size:
        raise UserError(f"model.image_size={m.image_size} must be a multiple of model.patch_size={m.patch_size}")
    features = data.photos.shape[1] if data.photos.ndim == 2 else 0
    model = MultiModalMemoryNetwork(len(data.vocabulary), m.latent_dim, m.memory_size, m.num_heads, m.num_layers, m.image_size, m.patch_size, features,
                                   m.audio_channels, data.modalities, m.dropout, m.feedback_steps, False, m.ttt_topk, m.ttt_lr).to(data.device)
    model.objective = {"temperature": cfg.losses.temperature, "fused": cfg.losses.fused, "through_update": cfg.training.through_update,
                       "clip_norm": cfg.training.clip_norm, "use_amp": cfg.training.use_amp}
    return model


def build_optimizer(cfg, model):
    """AdamW (Loshchilov & Hutter 2019) over every parameter."""
    return torch.optim.AdamW(model.parameters(), lr=cfg.training.learning_rate, weight_decay=cfg.training.weight_decay,
                             fused=next(model.parameters()).is_cuda)


# ------------------------------------------------------------------------------------------------------------- objective

def retrieval_losses(model, batch, temperature=0.07, through_update=True, fused=True):
    """{"text_image", "text_audio", "image_audio", "fused"}: scalars, InfoNCE (van den Oord et al. 2018) of the pairs, audio's over spoken rows.

    batch: as `make_batch` returns it; with fewer than two spoken rows there is only text_image. Captions of one photo are no negatives. Every
    modality goes through the fusion alone; "fused" is a random pair of modalities against the third. Which encodings are adapted before they are
    used (through_update) and which pair is fused is drawn from torch's CPU generator.
    """
    coins = (torch.rand(len(MODALITIES) + 1) < 0.5).tolist()
    adapted = {m: through_update and coin for m, coin in zip((*MODALITIES, "pair"), coins, strict=True)}
    third = MODALITIES[int(torch.randint(len(MODALITIES), ()))]
    spoken, photo, given = batch.get("audio_rows"), batch["photo"], {"text": (batch["text"],), "image": (batch["image"],)}
    if spoken is not None and len(spoken) > 1:
        given["audio"] = (batch["audio"], batch["audio_frames"])
    encodings = {m: model.encode(m, *inputs, episodic=adapted[m]) for m, inputs in given.items()}
    latents = {m: F.normalize(model.fuse_modalities({m: e}, adapted[m]).float(), dim=1) for m, e in encodings.items()}
    losses = {}
    for a, b in PAIRS:
        if a in latents and b in latents:
            rows = spoken if b == "audio" else slice(None)
            losses[f"{a}_{b}"] = common.info_nce(latents[a][rows], latents[b], 1 / temperature, photo[rows], "mask")
    if fused and len(encodings) == 3:
        pair = {m: e if m == "audio" else e[spoken] for m, e in encodings.items() if m != third}
        joint, other = F.normalize(model.fuse_modalities(pair, adapted["pair"]).float(), dim=1), latents[third]
        losses["fused"] = common.info_nce(joint, other if third == "audio" else other[spoken], 1 / temperature, photo[spoken], "mask")
    return losses


def train_step(model, batch, optimizer):
    """One step -> {"loss", and the losses of `retrieval_losses` that the batch has} as 0-d tensors (no synchronisation)."""
    objective = model.objective
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch["text"].device.type, torch.bfloat16, enabled=objective["use_amp"] and batch["text"].is_cuda):
        losses = retrieval_losses(model, batch, objective["temperature"], objective["through_update"], objective["fused"] > 0)
    total = sum((objective["fused"] if name == "fused" else 1) * value for name, value in losses.items())
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), objective["clip_norm"])
    optimizer.step()
    return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}


# ------------------------------------------------------------------------------------------------------------ evaluation

@dataclass
class Direction:
    """Queries of one or more modalities against a gallery of one; rows of equal id belong together."""
    name: str
    query: tuple
    items: torch.Tensor  # [Q] photos if the query is an image alone, else captions
    ids: torch.Tensor  # [Q]
    gallery: str
    gallery_items: torch.Tensor  # [G]
    gallery_ids: torch.Tensor  # [G]


def directions(data, split):
    """The six directions of a split (two without speech), then the variants: the same photo counts as right, and fused queries."""
    rows = data.splits[split]
    photo, spoken = data.photo_of[rows], rows[data.speech[rows, 1] > 0]
    photos, said = photo.unique(), data.photo_of[spoken]
    heard = said.unique()
    found = [Direction("text -> image", ("text",), rows, photo, "image", photos, photos),
             Direction("image -> text", ("image",), photos, photos, "text", rows, photo)]
    if len(spoken) > 1:
        relevant = torch.isin(photo, heard)
        found += [Direction("audio -> image", ("audio",), spoken, said, "image", photos, photos),
                  Direction("image -> audio", ("image",), heard, heard, "audio", spoken, said),
                  Direction("text -> audio", ("text",), spoken, spoken, "audio", spoken, spoken),
                  Direction("audio -> text", ("audio",), spoken, spoken, "text", rows, rows),
                  Direction("text -> audio, same photo", ("text",), rows[relevant], photo[relevant], "audio", spoken, said),
                  Direction("audio -> text, same photo", ("audio",), spoken, said, "text", rows, photo),
                  Direction("text + audio -> image", ("text", "audio"), spoken, said, "image", photos, photos),
                  Direction("text + image -> audio", ("text", "image"), spoken, spoken, "audio", spoken, spoken),
                  Direction("image + audio -> text", ("image", "audio"), spoken, spoken, "text", rows, rows)]
    return found


N_DIRECTIONS = 6  # of `directions` that the protocol uses, as far as they are there


@torch.no_grad()
def embed(model, data, modalities, items, batch_size, raw=None, episodic=False):
    """[N, D] float32, L2-normalised latents of items [N] (photos if the modality is the image alone, else captions), or of raw items given for them.

    Raises: FloatingPointError if they are not finite.
    """
    model.eval()
    order = torch.arange(len(items))
    if "audio" in modalities:  # neighbours of similar length need little padding
        order = torch.tensor([len(x) for x in raw]).argsort(stable=True) if raw is not None else data.speech[items, 1].argsort(stable=True)
    found = []
    for part in order.split(batch_size):
        inputs = {}
        for m in modalities:
            rows = data.photo_of[items[part]] if m == "image" and len(modalities) > 1 else items[part]
            inputs |= as_input(data, m, take(raw, part) if raw is not None else raw_items(data, m, rows))
        with common.full_precision():
            found.append(F.normalize(model(**inputs, episodic=episodic)["central_latent"].float(), dim=1))
    out = torch.cat(found)[order.argsort().to(data.device)]
    if not torch.isfinite(out).all():
        raise FloatingPointError("non-finite embeddings: the weights have overflowed; lower training.learning_rate")
    return out


def embedded(model, data, tasks, batch_size):
    """({modality: items}, function (modality, items) -> [n, D]) of all that the galleries of tasks hold, each modality embedded once."""
    items = {d.gallery: d.gallery_items for d in tasks}
    z = {m: embed(model, data, (m,), rows, batch_size) for m, rows in items.items()}
    return items, lambda m, rows: z[m][torch.searchsorted(items[m], rows).to(z[m].device)]


def take(raw, rows):
    return raw[rows.to(raw.device)] if isinstance(raw, torch.Tensor) else [raw[i] for i in rows.tolist()]


def ranks(direction, queries, gallery):
    return common.retrieval_per_query(queries, gallery, direction.ids, direction.gallery_ids, map_ks=())


def photo_groups(data, direction):
    """[Q] NumPy ints from 0: which photo a query goes with."""
    photo = direction.items if direction.query == ("image",) else data.photo_of[direction.items]
    return photo.unique(return_inverse=True)[1].numpy()


def interval(values, groups, n, seed):
    """[low, high], the 95% percentile bootstrap interval (Efron 1979) of the mean of values [Q]; n resamples of photos with all of their queries."""
    n_groups = groups.max() + 1
    weights = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n)  # [n, photos]
    means = weights @ np.bincount(groups, values) / (weights @ np.bincount(groups))
    return np.quantile(means, (0.025, 0.975)).tolist()


def read_best(folder, data, cfg):
    """(model of best_model.pt, its epoch). Raises: UserError if there is none or it does not fit the data."""
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
        raise UserError(f"{folder / 'best_model.pt'} is of other sizes than the data; choose another output_dir=, or --fresh") from None
    return model.eval(), state["epoch"]


def evaluate(cfg, data=None):
    """Retrieval on the test photos by the best model: writes results.json; returns the results. What is there is read back."""
    folder, data = start(cfg, data)
    model, epoch = read_best(folder, data, cfg)
    file, settings = folder / "results.json", {"n_bootstrap": cfg.evaluation.n_bootstrap}
    known = common.read_json(file) if file.exists() else {}
    known = known if known.get("epoch") == epoch else {}
    if known.get("evaluation") == settings:
        return known
    tasks, table = directions(data, "test"), []
    _, z = embedded(model, data, tasks, cfg.evaluation.batch_size)
    for d in tasks:
        queries = z(*d.query, d.items) if len(d.query) == 1 else embed(model, data, d.query, d.items, cfg.evaluation.batch_size)
        q, photos = ranks(d, queries, z(d.gallery, d.gallery_items)), photo_groups(data, d)
        table.append({"direction": d.name, "n_queries": len(d.ids), "n_gallery": len(d.gallery_ids),
                      **{f"R@{k}": q[f"hit@{k}"].mean().item() for k in (1, 5, 10)}, "median_rank": float(np.median(q["rank"].numpy())),
                      **{f"R@{k}_95%": interval(q[f"hit@{k}"].numpy(), photos, cfg.evaluation.n_bootstrap, cfg.seed) for k in (1, 10)},
                      **{f"chance_R@{k}": q[f"chance@{k}"].mean().item() for k in (1, 5, 10)}})
    results = {"experiment": cfg.experiment, "seed": cfg.seed, "synthetic": data.synthetic, "data_fingerprint": data.fingerprint, "epoch": epoch,
               "parameters": sum(p.numel() for p in model.parameters()), "counts": data.counts, "evaluation": settings,
               "n_photos": {split: len(data.photo_of[rows].unique()) for split, rows in data.splits.items()}, "retrieval": table}
    results = known | results  # other settings here leave what `test_time` found
    common.write_json(folder / "results.json", results)
    return results


# ---------------------------------------------------------------------------------------------------- test-time training

CORRUPTIONS = {  # of queries: amounts, mildest first
    "image": {"noise": (0.08, 0.18, 0.38), "defocus": (3, 6, 10), "jpeg": (25, 15, 7)},  # sd of 1; pixels of radius at 224; quality
    "audio": {"white noise": (20, 10, 5, 0)},  # dB
    "text": {"swap": (0.05, 0.1, 0.2), "drop": (0.05, 0.1, 0.2), "insert": (0.05, 0.1, 0.2)}}  # of the letters
HELD_OUT = {"image": ("contrast", 0.3), "audio": ("low-pass", 1000), "text": ("word drop", 0.3)}  # on dev, for the steps below
STEPS = {"memory-episodic": (0.1, 0.3, 1.0), "memory-online": (0.1, 0.3, 1.0), "tent": (1e-4, 1e-3, 1e-2), "eata": (1e-4, 1e-3, 1e-2)}
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {c: "".join(k for other in KEYS[max(0, y - 1):y + 2] for k in other[max(0, x - 1):x + 2] if k != c)
              for y, row in enumerate(KEYS) for x, c in enumerate(row)}


def corrupt_text(caption, kind, amount, draws):
    """Each letter with probability `amount`: swapped for a neighbour on the keyboard, dropped, or followed by a neighbour; or words dropped."""
    if kind == "word drop":
        words = caption.split()
        keep = draws.random(len(words)) >= amount
        return " ".join(word for word, kept in zip(words, keep, strict=True) if kept) or caption
    out = []
    for c, hit in zip(caption, draws.random(len(caption)) < amount, strict=True):
        near = NEIGHBOURS.get(c.lower())
        typed = near[draws.integers(len(near))] if hit and near else ""
        out.append({"swap": typed, "drop": "", "insert": c + typed}[kind] if typed else c)
    return "".join(out)


def corrupt_photo(photo, kind, amount, draws):
    """uint8 [3, S, S] -> the same: noise and JPEG as in ImageNet-C (Hendrycks & Dietterich 2019), a disk blur, or a lower contrast."""
    x = photo.float()
    if kind == "noise":
        x = x + 255 * amount * torch.from_numpy(draws.standard_normal(x.shape, dtype=np.float32))
    elif kind == "contrast":
        x = (x - x.mean((1, 2), keepdim=True)) * amount + x.mean((1, 2), keepdim=True)
    elif kind == "defocus":
        radius = amount * photo.shape[1] / 224
        reach = math.ceil(radius)
        axis = torch.arange(-reach, reach + 1.0)
        disk = (radius + 0.5 - (axis[:, None] ** 2 + axis**2).sqrt()).clamp(0, 1)
        x = F.conv2d(F.pad(x[:, None], [reach] * 4, mode="reflect"), (disk / disk.sum())[None, None])[:, 0]
    else:
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(buffer := io.BytesIO(), "JPEG", quality=amount)
        return torch.from_numpy(np.array(Image.open(buffer)).transpose(2, 0, 1))
    return x.round().clamp(0, 255).to(torch.uint8)


def corrupt_speech(wave, kind, amount, draws):
    """[n] -> [n]: white noise `amount` dB below the recording's mean power, or nothing above `amount` Hz."""
    if kind == "white noise":
        noise = torch.from_numpy(draws.standard_normal(len(wave), dtype=np.float32))
        return wave + noise * (wave.square().mean() / 10 ** (amount / 10)).sqrt()
    spectrum = torch.fft.rfft(wave)
    spectrum[int(amount * len(wave) / RATE) + 1:] = 0
    return torch.fft.irfft(spectrum, n=len(wave))


def corrupted_items(data, modality, items, kind, amount, seed):
    """As `raw_items`, corrupted; every item by a generator of its own, so that neither order nor company matters. kind "clean": as they are."""
    raw = raw_items(data, modality, items)
    if kind == "clean":
        return raw
    draws = [np.random.default_rng([seed, item]) for item in items.tolist()]
    if modality == "text":
        return [corrupt_text(caption, kind, amount, g) for caption, g in zip(raw, draws, strict=True)]
    if modality == "image":
        return torch.stack([corrupt_photo(photo, kind, amount, g) for photo, g in zip(raw.cpu(), draws, strict=True)])
    waves = (read_wav(data.wavs[item].read_bytes()) for item in items.tolist())
    return [log_mel(corrupt_speech(wave, kind, amount, g).to(data.device)).T[:MAX_FRAMES].half().cpu() for wave, g in zip(waves, draws, strict=True)]


def set_memories(model, online, lr):
    """Switch every memory's online writes on or off, and set the step of its writes."""
    for module in model.modules():
        if isinstance(module, SlotMemory):
            module.enable_ttt_updates, module.ttt_lr = online, lr


def entropy_loss(z, gallery, temperature, filtered=False, memory=None):
    """(mean entropy of softmax(z . gallery / temperature), share of the B rows it is taken over); (None, 0) if that is no row.

    z: [B, D], gallery: [G, D], L2-normalised. The objective of TENT (Wang et al. 2021) over a gallery in place of classes, as in TCR (ICLR 2025).
    filtered: EATA's active samples alone, weighted (Niu et al. 2022): entropy below 0.4 ln G, and a cosine below 0.05 between their distribution and
    the running mean of earlier ones, kept in the list `memory`. (Its Fisher regulariser is left out: streams are short and the model is reset.)
    """
    log_p = (z @ gallery.T / temperature).log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)  # [B]
    if not filtered:
        return entropy.mean(), 1.0
    margin = 0.4 * math.log(len(gallery))
    keep = entropy < margin
    if memory:
        keep &= F.cosine_similarity(memory[0][None], p.detach()).abs() < 0.05
    if not keep.any():
        return None, 0.0
    mean = p[keep].detach().mean(0)
    memory[:] = [0.9 * memory[0] + 0.1 * mean] if memory else [mean]
    return (entropy[keep] * (margin - entropy[keep].detach()).exp()).mean(), keep.float().mean().item()


def respond(model, data, modality, raw, gallery, method, lr, order, temperature, batch_size, stream_batch):
    """(embeddings [N, D] of queries that arrive in `order`, share of them that adapted something); afterwards the model is what it was, to the bit.

    raw: N raw items of `modality`. gallery: [G, D], read only. order: a permutation of N.
    none, memory-episodic: whatever the order. memory-online, tent, eata, random: `stream_batch` at a time, answered before the step they cause.
    random: tent's step with every gradient replaced by a random one of the same norm. Raises: FloatingPointError if a step makes answers non-finite.
    """
    trained = model.central.ttt_lr
    set_memories(model, method == "memory-online", lr if "memory" in method else trained)
    if method in ("none", "memory-episodic"):
        z = embed(model, data, (modality,), torch.arange(len(raw)), batch_size, raw, episodic=method != "none")
        set_memories(model, False, trained)
        return z, float(method != "none")
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    out, shares, memory = torch.empty(len(raw), gallery.shape[1], device=data.device), [], []
    affine = [p for m in model.encoders[modality].modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    generator = torch.Generator().manual_seed(int(order[0]))
    model.eval().requires_grad_(False)
    for p in affine if method != "memory-online" else ():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(affine, lr=lr)
    for part in order.split(stream_batch):
        with common.full_precision(), torch.set_grad_enabled(method != "memory-online"):
            z = F.normalize(model(**as_input(data, modality, take(raw, part)))["central_latent"].float(), dim=1)
            out[part.to(z.device)] = z.detach()
            if method == "memory-online":
                continue
            loss, share = entropy_loss(z, gallery, temperature, method == "eata", memory)
            shares.append(share * len(part) / len(raw))
            if loss is None:
                continue
            optimizer.zero_grad()
            loss.backward()
        if method == "random":
            for p in affine:
                direction = torch.randn(p.shape, generator=generator).to(p.device)
                p.grad = direction * (p.grad.norm() / direction.norm())
        optimizer.step()
    set_memories(model, False, trained)
    model.requires_grad_(True)
    model.load_state_dict(saved)
    if not torch.isfinite(out).all():
        raise FloatingPointError(f"non-finite embeddings in the test-time method {method}, step {lr:g}")
    return out, sum(shares) if shares else 1.0


def digest(x):
    return hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:16]


def choose_steps(cfg, model, data):
    """{method: step size with the best mean MRR on dev under the held-out corruptions}, and all scores."""
    e, tasks, scores = cfg.evaluation, directions(data, "dev")[:N_DIRECTIONS], {}
    _, z_of = embedded(model, data, tasks, e.batch_size)
    for d in tasks:
        (modality,), (kind, amount) = d.query, HELD_OUT[d.query[0]]
        if modality == "image" and data.photos.ndim == 2:
            continue
        gallery = z_of(d.gallery, d.gallery_items)
        raw = corrupted_items(data, modality, d.items, kind, amount, cfg.seed)
        order = torch.randperm(len(d.items), generator=torch.Generator().manual_seed(cfg.seed))
        for method, lr in [("none", None), *((method, lr) for method, steps in STEPS.items() for lr in steps)]:
            z, _ = respond(model, data, modality, raw, gallery, method, lr, order, cfg.losses.temperature, e.batch_size, e.stream_batch)
            scores.setdefault(method if lr is None else f"{method} {lr:g}", []).append((1 / ranks(d, z, gallery)["rank"]).mean().item())
    scores = {name: float(np.mean(values)) for name, values in scores.items()}
    chosen = {method: max(steps, key=lambda lr: scores[f"{method} {lr:g}"]) for method, steps in STEPS.items()}
    return {**chosen, "random": chosen["tent"]}, scores


def test_time(cfg, data=None):
    """The protocol: frozen galleries, corrupted queries, every method in every direction. Adds `ttt` to results.json; returns the results."""
    folder, data = start(cfg, data)
    results, e = evaluate(cfg, data), cfg.evaluation
    settings = {key: getattr(e, key) for key in ("stream_batch", "n_orders", "n_severities", "n_bootstrap")}
    if results.get("ttt", {}).get("settings") == settings:
        return results
    model, _ = read_best(folder, data, cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps, dev_scores = choose_steps(cfg, model, data)
    tasks, conditions, hits = sorted(directions(data, "test")[:N_DIRECTIONS], key=lambda d: MODALITIES.index(*d.query)), [], {}
    _, z_of = embedded(model, data, tasks, e.batch_size)
    galleries = {d.name: z_of(d.gallery, d.gallery_items) for d in tasks}
    frozen = {name: digest(gallery) for name, gallery in galleries.items()}
    for (modality,), group in common.progress(itertools.groupby(tasks, key=lambda d: d.query), "test-time training"):
        mine = list(group)
        kinds = CORRUPTIONS[modality] if modality != "image" or data.photos.ndim == 4 else {}
        levels = [(kind, i + 1, amount) for kind, amounts in kinds.items() for i, amount in enumerate(amounts[:e.n_severities])]
        for kind, level, amount in [("clean", 0, None), *levels]:
            raw_all = corrupted_items(data, modality, mine[0].items, kind, amount, cfg.seed)  # mine[0] has the items of the others too
            for d, method in itertools.product(mine, ("none", *METHODS)):
                raw, runs = take(raw_all, torch.searchsorted(mine[0].items, d.items)), []
                for i in range(1 if method in ("none", "memory-episodic") else e.n_orders):
                    order = torch.randperm(len(d.items), generator=torch.Generator().manual_seed(cfg.seed + i))
                    z, share = respond(model, data, modality, raw, galleries[d.name], method, steps.get(method), order, cfg.losses.temperature,
                                       e.batch_size, e.stream_batch)
                    q = ranks(d, z, galleries[d.name])
                    runs.append({"R@1": q["hit@1"].numpy(), "R@10": q["hit@10"].numpy(), "rank": q["rank"].numpy(), "share": share})
                mean = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
                conditions.append({"direction": d.name, "corruption": kind, "severity": level, "amount": amount, "method": method,
                                   "R@1": mean["R@1"].mean(), "R@10": mean["R@10"].mean(), "mean_rank": mean["rank"].mean(),
                                   "adapted_share": mean["share"], "sd_over_orders_R@10": float(np.std([run["R@10"].mean() for run in runs]))})
                hits.setdefault((d.name, method, "clean" if kind == "clean" else "corrupted"), []).append(mean)
    for d in tasks:
        assert digest(galleries[d.name]) == frozen[d.name] == digest(embed(model, data, (d.gallery,), d.gallery_items, e.batch_size))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    results["ttt"] = {"settings": settings, "steps": steps, "dev_MRR_held_out": dev_scores, "summary": summary_of(cfg, data, tasks, hits),
                      "conditions": conditions, "gallery_sha256": frozen}
    common.write_json(folder / "results.json", results)
    return common.read_json(folder / "results.json")


def summary_of(cfg, data, tasks, hits):
    """A row a direction and method: recalls on clean and on corrupted queries (mean over all corruptions), and their change with its paired interval.

    hits: {(direction, method, "clean" or "corrupted"): [{"R@1": [Q], "R@10": [Q]} of a corruption]}.
    """
    summary = []
    for d, method in itertools.product(tasks, ("none", *METHODS)):
        chance = ranks(d, torch.ones(len(d.ids), 1), torch.ones(len(d.gallery_ids), 1))
        row = {"direction": d.name, "method": method, **{f"chance_{m}": chance[f"chance@{m[2:]}"].mean().item() for m in ("R@1", "R@10")}}
        for on, m in itertools.product(("clean", "corrupted"), ("R@1", "R@10")):
            if (d.name, method, on) in hits:
                mine, none = (np.mean([h[m] for h in hits[d.name, which, on]], axis=0) for which in (method, "none"))
                row |= {f"{on}_{m}": mine.mean(), f"{on}_{m}_change": (mine - none).mean(),
                        f"{on}_{m}_95%": interval(mine - none, photo_groups(data, d), cfg.evaluation.n_bootstrap, cfg.seed)}
        summary.append(row)
    return summary


def report(r):
    """The final tables as text; recalls in percent."""
    marked = "  [SYNTHETIC demo data]" if r["synthetic"] else ""
    rows = []
    for t in r["retrieval"]:
        bounds = [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in (t["R@1_95%"], t["R@10_95%"])]
        rows += [[t["direction"], t["n_queries"], t["n_gallery"], *(100 * t[f"R@{k}"] for k in (1, 5, 10)), t["median_rank"], *bounds],
                 ["  chance", "", "", *(100 * t[f"chance_R@{k}"] for k in (1, 5, 10)), "", "", ""]]
    text = (f"test: {r['n_photos']['test']:,} photos; recalls in %; epoch {r['epoch']}, seed {r['seed']}{marked}\n"
            + common.format_table(["query -> gallery", "queries", "gallery", "R@1", "R@5", "R@10", "median rank", "R@1 95%", "R@10 95%"], rows))
    if "ttt" not in r:
        return text
    keys = [f"{on}_{m}" for on in ("clean", "corrupted") for m in ("R@1", "R@10")]
    rows, helped, helped_random, harmed, damage, compared = [], [], [], [], [], 0

    def change(row, key):
        low, high = row[f"{key}_95%"]
        return f"{100 * row[f'{key}_change']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    for row in r["ttt"]["summary"]:
        if row["method"] == "none":
            rows += [[row["direction"], *("" for _ in keys)],
                     ["  chance", *(100 * row[f"chance_{m}"] for m in ("R@1", "R@10") * 2)],
                     ["  none", *(100 * row[key] if key in row else None for key in keys)]]
            continue
        rows.append([f"  {row['method']}", *(change(row, key) if key in row else None for key in keys)])
        name, control = f"{row['method']}, {row['direction']}", row["method"] == "random"
        if row["clean_R@10_95%"][1] < 0:
            damage.append(name)
        if "corrupted_R@10" in row:  # precomputed features of photos are not corrupted
            low, high = row["corrupted_R@10_95%"]
            compared += not control
            if low > 0:
                (helped_random if control else helped).append(name)
            if high < 0:
                harmed.append(name)
    text += (f"\n\ntest-time training{marked}: recalls without it (none), changes by it with paired 95% intervals; corrupted: over all corruptions\n"
             + common.format_table(["direction, method", "clean R@1", "clean R@10", "corrupted R@1", "corrupted R@10"], rows)
             + "\nsteps chosen on dev under held-out corruptions: " + ", ".join(f"{m} {lr:g}" for m, lr in r["ttt"]["steps"].items())
             + f"\ncorrupted R@10: {len(helped)} of {compared} intervals lie above 0 (about {compared * 0.025:.1f} would by chance)")
    text += f": {'; '.join(helped)}" if helped else ". NULL RESULT: no test-time method helps here"
    text += f"\nbelow 0: {'; '.join(harmed) or 'none'}. The random-direction control above 0: {'; '.join(helped_random) or 'none'}"
    return f"{text}\ndamage to clean queries (R@10 interval below 0): {'; '.join(damage) or 'none'}"


# -------------------------------------------------------------------------------------------------------------- training

def start(cfg, data=None):
    """(run folder, data), after what every stage needs: same config and same data as the folder's run, seeds, deterministic kernels."""
    data = data or load_data(cfg)
    folder = common.open_run(cfg, data.fingerprint)
    common.seed_everything(cfg.seed)
    return folder, data


def dev_scores(cfg, model, data):
    """{"dev_loss": InfoNCE over all dev pairs, "dev_recall": mean of R@1, 5, 10 in all directions, in %, and each direction's R@10}."""
    tasks, recalls, row, loss = directions(data, "dev")[:N_DIRECTIONS], [], {}, 0.0
    items, z = embedded(model, data, tasks, cfg.evaluation.batch_size)
    for d in tasks:
        q = ranks(d, z(*d.query, d.items), z(d.gallery, d.gallery_items))
        recalls += [100 * q[f"hit@{k}"].mean().item() for k in (1, 5, 10)]
        row[f"dev_R@10 {d.name}"] = recalls[-1]
    for a, b in itertools.combinations(items, 2):
        rows = items["audio"] if "audio" in (a, b) else items["text"]
        x, y = (z(m, data.photo_of[rows] if m == "image" else rows) for m in (a, b))
        loss += common.info_nce(x, y, 1 / cfg.losses.temperature, data.photo_of[rows].to(data.device), "mask").item()
    return {"dev_loss": loss, "dev_recall": float(np.mean(recalls)), **row}


def train(cfg, data=None):
    """Train for training.epochs, resuming exactly; best_model.pt is the epoch with the best dev_recall. Returns the history, one row an epoch."""
    t = cfg.training
    folder, data = start(cfg, data)
    model = build_model(cfg, data)
    optimizer = build_optimizer(cfg, model)
    per_epoch, last_step, step, history, pending = steps_per_epoch(cfg, data), total_steps(cfg, data), 0, [], []

    def factor(s):  # of the learning rate, after s steps
        return common.warmup_cosine(s + 1, last_step + 1, math.ceil(t.warmup * last_step))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    latest = folder / "checkpoint_latest.pt"
    if latest.exists() or latest.with_name(f"{latest.name}.previous").exists():
        state = common.load_checkpoint(latest)
        step, history = state["global_step"], state["history"]
        pending = [{name: value.to(data.device) for name, value in losses.items()} for losses in state["position"]["pending"]]
        model.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict(state["optimizer_state_dict"])
        scheduler.load_state_dict(state["scheduler_state_dict"])
        common.set_rng_state(state["rng"])
        print(f"{folder}: training is complete" if step >= last_step else f"resuming {folder} at step {step} of {last_step}")
    if step < last_step:
        (folder / "results.json").unlink(missing_ok=True)
    log = common.RunLog(folder, cfg.wandb and step < last_step, dataclasses.asdict(cfg))
    if history:  # a kill may have come between the last checkpoint and this file
        log.write(history)
    names = ("loss", "text_image", *(("text_audio", "image_audio", "fused") if len(data.modalities) == 3 else ()))
    started, first, batches = time.time(), step, {}
    with common.StopSignal() as stop:
        for step in common.progress(range(first + 1, last_step + 1), "steps"):  # counted from 1: `step` steps are done at the end of the body
            epoch, place = divmod(step - 1, per_epoch)
            if epoch not in batches:
                batches = {epoch: epoch_batches(data, cfg, epoch)}
            draws = np.random.default_rng([cfg.seed, epoch, place]) if t.augment else None
            model.train()
            batch = make_batch(data, batches[epoch][place], draws, t.spell)
            pending.append(train_step(model, batch, optimizer))
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            ends = place == per_epoch - 1
            if not ends and not stop.signum:
                continue
            losses = {name: torch.stack(values).cpu() for name in names if (values := [taken[name] for taken in pending if name in taken])}
            if len(bad := (~torch.isfinite(losses["loss"])).nonzero()[:, 0]):  # the host waits for the device only here
                taken, bad_step = pending[int(bad[0])], step - len(pending) + 1 + int(bad[0])
                raise FloatingPointError(f"non-finite {' and '.join(n for n, v in taken.items() if not math.isfinite(v))} in step {bad_step}, "
                                         f"learning rate {t.learning_rate * factor(bad_step - 1):g}; lower training.learning_rate")
            if ends:
                row = {"epoch": epoch + 1, "step": step, **{name: losses[name].mean().item() if name in losses else None for name in names},
                       **dev_scores(cfg, model, data), "learning_rate": rate}
                better = all(row["dev_recall"] > earlier["dev_recall"] for earlier in history)
                history.append(row)
                pending = []
                if better:
                    common.save_checkpoint(folder / "best_model.pt", {
                        "model_state_dict": model.state_dict(), "config": dataclasses.asdict(cfg), "epoch": epoch + 1, "vocabulary": data.vocabulary,
                        "mel_statistics": [x.cpu() for x in data.mel_statistics]}, keep_previous=False)
                print(f"epoch {epoch + 1:3}  loss {row['loss']:.4f}  dev: loss {row['dev_loss']:.4f}  mean recall {row['dev_recall']:.1f}%"
                      f"{' *' if better else ''}", flush=True)
            common.save_checkpoint(latest, {
                "epoch": step // per_epoch, "global_step": step, "best_val_loss": min((row["dev_loss"] for row in history), default=None),
                "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
                "scheduler_state_dict": scheduler.state_dict(), "scaler_state_dict": {}, "history": history, "config": dataclasses.asdict(cfg),
                "rng": common.rng_state(), "position": {"pending": pending}})
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


def plot_training(path, history, synthetic):
    """Losses and dev recalls by epoch, from the rows of metrics.csv."""
    losses = [n for n in ("loss", "text_image", "text_audio", "image_audio", "fused") if n in history[0]]
    recalls = {"mean of R@1, 5, 10": "dev_recall", **{n.removeprefix("dev_R@10 "): n for n in history[0] if n.startswith("dev_R@10 ")}}
    panels = {"training loss": {n: [row[n] for row in history] for n in losses}, "dev loss": {"three pairs": [row["dev_loss"] for row in history]},
              "dev R@10 (%)": {label: [row[n] for row in history] for label, n in recalls.items()}}
    chosen = 1 + max(range(len(history)), key=lambda i: history[i]["dev_recall"])
    common.plot_curves(path, panels, mark=chosen, title=mark("training", synthetic))


def plot_retrieval(path, r):
    """R@10 of every direction with its interval, beside chance."""
    figure, (axis,) = common.new_figure(width=7.5, height=0.6 + 0.38 * len(r["retrieval"]))
    table = r["retrieval"][::-1]
    place, value = np.arange(len(table)), np.array([100 * t["R@10"] for t in table])
    bounds = 100 * np.array([t["R@10_95%"] for t in table]).T
    axis.barh(place, value, xerr=np.abs(bounds - value), color="tab:blue", alpha=0.8, capsize=3, label="R@10, 95%")
    axis.barh(place, [100 * t["chance_R@10"] for t in table], color="tab:orange", height=0.35, label="chance")
    axis.set_yticks(place, [t["direction"] for t in table], fontsize=8)
    axis.set(xlabel="R@10 (%)", title=mark(f"retrieval, {r['n_photos']['test']:,} test photos", r["synthetic"]))
    axis.legend(fontsize=8)
    common.save_figure(figure, path)


def plot_severity(path, r, metric):
    """The metric against severity, mean over the corruptions of that severity: a panel a direction, a line a method."""
    table = r["ttt"]["conditions"]
    names = list(dict.fromkeys(c["direction"] for c in table))
    figure, axes = common.new_figure(len(names), width=3.4, height=3.6)
    for axis, name in zip(axes, names, strict=True):
        for method in (*METHODS, "none"):  # the others often lie on it: it is drawn over them, dashed
            mine = [c for c in table if c["direction"] == name and c["method"] == method]
            levels = sorted({c["severity"] for c in mine})
            values = [100 * np.mean([c[metric] for c in mine if c["severity"] == level]) for level in levels]
            axis.plot(levels, values, marker=".", label=method, **({"color": "black", "linestyle": "--"} if method == "none" else {}))
        chance = next(row for row in r["ttt"]["summary"] if row["direction"] == name)[f"chance_{metric}"]
        axis.axhline(100 * chance, color="grey", linestyle=":", label="chance")
        axis.set(xlabel="severity of the query's corruption", ylabel=f"{metric} (%)", title=name, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(mark("test-time training", r["synthetic"]))
    common.save_figure(figure, path)


def plot_changes(path, r):
    """Change of R@10 by every method with its paired interval: clean and corrupted queries."""
    summary = [row for row in r["ttt"]["summary"] if row["method"] != "none"]
    names = list(dict.fromkeys(row["direction"] for row in summary))
    figure, axes = common.new_figure(2, width=5.4, height=0.9 + 0.75 * len(names))
    for axis, on in zip(axes, ("clean", "corrupted"), strict=True):
        for i, method in enumerate(METHODS):
            rows = [row for row in summary if row["method"] == method and f"{on}_R@10" in row]
            place = [names.index(row["direction"]) + 0.14 * (i - 2) for row in rows]
            value = np.array([100 * row[f"{on}_R@10_change"] for row in rows])
            bounds = 100 * np.array([row[f"{on}_R@10_95%"] for row in rows]).T
            axis.errorbar(value, place, xerr=np.abs(bounds - value), fmt=".", capsize=2, label=method)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlabel="change of R@10 (points), paired 95%", title=f"{on} queries")
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(mark("test-time training against none", r["synthetic"]))
    common.save_figure(figure, path)


def plot_results(folder, r):
    plot_retrieval(folder / "retrieval.png", r)
    if "ttt" in r:
        plot_severity(folder / "ttt_R1.png", r, "R@1")
        plot_severity(folder / "ttt_R10.png", r, "R@10")
        plot_changes(folder / "ttt_changes.png", r)


def compare(cfg):
    """Finished runs side by side: runs that differ only in their seed become one row, mean +- sd. Writes compare.txt."""
    runs = common.runs_by_seed(cfg.compare, cfg.experiment)

    def cell(values, sign=""):
        return f"{100 * np.mean(values):{sign}.1f}" + (f" +- {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else "") if values else "-"
    recalls, changes = [], []
    every = {row["direction"]: row for _, found in runs for r in found for row in r["retrieval"]}  # one may have had no speech
    for direction, first in every.items():
        recalls += [[direction, *[""] * 4], ["  chance", "", *(100 * first[f"chance_R@{k}"] for k in (1, 5, 10))]]
        for name, found in runs:
            rows = [row for r in found for row in r["retrieval"] if row["direction"] == direction]
            recalls.append([f"  {name}", len(rows), *(cell([row[f"R@{k}"] for row in rows]) for k in (1, 5, 10))])
    for name, found in runs:
        changed = [row for r in found if "ttt" in r for row in r["ttt"]["summary"] if row["method"] != "none"]
        for direction, method in dict.fromkeys((row["direction"], row["method"]) for row in changed):
            same = [row for row in changed if (row["direction"], row["method"]) == (direction, method)]
            cells = (cell([row[f"{on}_R@10_change"] for row in same if f"{on}_R@10_change" in row], "+") for on in ("clean", "corrupted"))
            changes.append([name, direction, method, len(same), *cells])
    text = "recalls in %\n" + common.format_table(["query -> gallery", "seeds", "R@1", "R@5", "R@10"], recalls)
    if changes:
        text += "\n\nchange of R@10 by test-time training, in points\n"
        text += common.format_table(["run", "direction", "method", "seeds", "clean", "corrupted"], changes)
    text += "\n[SYNTHETIC demo data]" if any(r["synthetic"] for _, found in runs for r in found) else ""
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    common.atomic_write(out / "compare.txt", lambda file: file.write(f"{text}\n".encode()))
    print(f"{text}\n{out / 'compare.txt'}")


# ------------------------------------------------------------------------------------------------------------------ main

STAGES = ("all", "cache", "train", "evaluate", "ttt", "compare")


@common.exit_codes
def main(argv):
    args = common.parse_command_line(argv, (Config,), __doc__, STAGES)
    cfg = common.load_config(Config, args.config, args.overrides, demo=args.demo)
    if args.stage == "compare":
        return compare(cfg)
    if args.fresh and args.stage in ("cache", "evaluate", "ttt"):
        raise UserError(f"--fresh starts a run again; --stage {args.stage} does not")
    if args.demo:
        if any(override.startswith(("data.dir=", "data.cache_dir=", "data.image_features_file=")) for override in args.overrides):
            raise UserError("--demo brings its own data; leave it or the folders out")
        torch.set_num_threads(1)  # for so small a model a second thread only waits
        cfg.data.dir, cfg.data.cache_dir = demo_data.write_flickr8k("data/demo/flickr8k"), "data/demo/cache"
    if args.stage != "cache":
        cfg.fresh = args.fresh
        common.check_run(cfg)  # before the data are decoded; nothing is written or moved until they are
    data = load_data(cfg)
    for split, rows in data.splits.items():
        print(f"{split}: {len(data.photo_of[rows].unique()):,} photos, {len(rows):,} captions, {int((data.speech[rows, 1] > 0).sum()):,} spoken")
    print(f"vocabulary: {len(data.vocabulary):,} tokens; " + ", ".join(f"{name} {n:,}" for name, n in data.counts.items()))
    if len(data.modalities) < 3:
        print(f"NOTE: {cfg.data.dir} has no folder flickr_audio: image and text alone")
    if args.stage == "cache":
        return
    build_model(cfg, data)  # sizes that do not fit are told before the run's folder is made
    if args.stage in ("evaluate", "ttt"):
        read_best(Path(cfg.output_dir), data, cfg)
    folder = common.open_run(cfg, data.fingerprint)
    if args.stage in ("all", "train"):
        history = train(cfg, data)
        if cfg.evaluation.plots:
            plot_training(folder / "training_curves.png", history, data.synthetic)
    if args.stage != "train":
        results = evaluate(cfg, data) if args.stage == "evaluate" else test_time(cfg, data)
        if cfg.evaluation.plots:
            plot_results(folder, results)
        text = report(results)
        common.atomic_write(folder / "results.txt", lambda file: file.write(f"{text}\n".encode()))
        print(f"\n{text}")
    print(f"files: {folder}/ (results.json, metrics.csv, best_model.pt, *.png)")


if __name__ == "__main__":
    sys.exit(main())
