"""Raw data sets -> the embedding files that the experiments read. The one script that needs `transformers` (pip install transformers; not timm).

    python encode.py coco --images train2017 --captions captions_train2017.json --split train2017 --out pretrain_encoded
    python encode.py mmimdb --data mmimdb --backbone clip          # or blip2: latents of 70 views for exp_gw_mmimdb.py
    python encode.py alignment --captions captions.json --images photos --language bigscience/bloomz-560m --vision facebook/dinov2-base --out prh
    python encode.py alignment --mmimdb mmimdb --language bigscience/bloomz-560m --vision facebook/dinov2-base --out mmimdb/features
    python encode.py flickr8k --data flickr8k                      # image_features.pt for exp_flickr_ttt.py's model.image_encoder=cached

Models are folders or names on huggingface.co, with @revision if wanted; HF_HUB_OFFLINE=1 uses only what has been downloaded. Rows are encoded in
shards; the same command after a kill goes on at the first unfinished one and gives the same bits as a run that was not interrupted. Beside every
output stands a `*_manifest.json`: model, revision, transform, versions, and the images that could not be read.

Shapes: N items (images, captions, films), B rows of a batch, T tokens, L layers, D features.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import common
from common import UserError

IMAGE_SHARD, TEXT_SHARD = 256, 4096  # rows a shard: part of what fixes the batches, so of the bits
LEVELS = range(10, 101, 10)  # u, percent of words replaced
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


# ---------------------------------------------------------------------------------------------------------------- models

def import_transformers():
    """The package, quiet. Imported here, so that -h is quick and needs nothing."""
    try:
        import transformers
    except ImportError:
        raise UserError("encode.py needs the package transformers: pip install 'transformers>=5.0'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@dataclasses.dataclass
class Source:
    """A model that is known but not loaded."""
    name: str  # as given
    path: str  # folder, or name on the hub
    revision: str | None  # as asked for
    commit: str  # of the hub, or a fingerprint of the folder's files
    config: object

    @property
    def stem(self):
        """The last part of its name, which names its files."""
        return Path(self.path).name


def find_model(name):
    """Source of a local folder or a name[@revision] on the hub. Raises: UserError."""
    transformers = import_transformers()
    path, revision = (name, "") if Path(name).is_dir() else name.partition("@")[::2]
    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision or None)
        if Path(path).is_dir():
            commit = f"files {common.fingerprint(sorted(p for p in Path(path).iterdir() if p.suffix in ('.json', '.safetensors', '.bin', '.model')))}"
        else:
            commit = Path(transformers.utils.cached_file(path, "config.json", revision=revision or None)).parent.name
    except Exception as error:  # the hub, json and transformers raise kinds of their own
        raise UserError(f"model {name}: {first_line(error)}; give a folder of a saved model or a name on huggingface.co "
                        "(with HF_HUB_OFFLINE=1 one that has been downloaded)") from None
    return Source(name, path, revision or None, commit, config)


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def load(source, kind, **kwargs):
    """transformers.<kind>.from_pretrained of a Source, in one line if it fails."""
    try:
        return getattr(import_transformers(), kind).from_pretrained(source.path, revision=source.revision, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # missing files, unknown classes, missing packages
        raise UserError(f"model {source.name}: {kind} cannot be loaded ({first_line(error)})") from None


def load_model(source, args, kind="AutoModel"):
    """The model on the device, in eval mode, weights of args.weights. Raises: UserError also if weights that matter are not in its files."""
    model, info = load(source, kind, dtype=DTYPES[args.weights], output_loading_info=True)
    if missing := [key for key in info["missing_keys"] if "pooler" not in key]:  # they would be random
        raise UserError(f"model {source.name}: {len(missing)} weights are not in its files (the first: {min(missing)}); it is no {kind} checkpoint")
    return model.to(args.device).eval().requires_grad_(False)


def load_processor(source):
    """The image processor, its Pillow version: the same pixels whether or not torchvision is installed."""
    return load(source, "AutoImageProcessor", backend="pil")


def load_tokenizer(source, padding_side=None):
    tokenizer = load(source, "AutoTokenizer")
    tokenizer.padding_side = padding_side or tokenizer.padding_side
    return tokenizer


def max_tokens(source, tokenizer, wanted):
    """The largest number of tokens that the command line, the tokenizer and the position table all allow."""
    text = getattr(source.config, "text_config", source.config)
    return min(wanted, tokenizer.model_max_length, getattr(text, "max_position_embeddings", None) or wanted)


# --------------------------------------------------------------------------------------------- tokens, pooling and forward passes

def tokenize(tokenizer, texts, max_length, add_eos=False):
    """[N] lists of token ids, at most max_length long. add_eos: the last id is the EOS token, whatever this tokenizer's version appends itself."""
    ids, eos = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"], tokenizer.eos_token_id
    if not add_eos:
        return ids
    ids = [item if item[-1:] == [eos] else [*item[:max_length - 1], eos] for item in ids]
    assert all(item[-1] == eos for item in ids), "a caption does not end with EOS"
    return ids


def pad(items, side, pad_id, device="cpu", length=None):
    """Lists of token ids -> (ids [B, T], mask [B, T] of 0/1), int64, padded on the left or right to the longest (or to `length`)."""
    length = length or max(map(len, items))
    ids, mask = torch.full((len(items), length), pad_id), torch.zeros(len(items), length, dtype=torch.int64)
    for row, item in enumerate(items):
        place = slice(length - len(item), None) if side == "left" else slice(len(item))
        ids[row, place], mask[row, place] = torch.tensor(item), 1
    return ids.to(device), mask.to(device)


def pool_tokens(hidden, mask, how):
    """hidden [B, T, D], mask [B, T] of 0/1 -> [B, D] float32: the last token that is no padding, the first, or the mean; either padding side."""
    if how == "mean":
        return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    index = mask.argmax(1) if how == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index].float()


def positions(model, mask, side):
    """What left padding needs where positions are absolute (GPT-2): position 0 at the first token; with right padding they are so anyway."""
    takes = side == "left" and "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes else {}


def pad_token(tokenizer):
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def text_pooling(source, asked):
    """How a model's text features are pooled: CLIP and SigLIP have a projection of their own, BLIP-2's T5 encoder is averaged, E5-Mistral's last token
    is taken; `asked` (--text-pool) decides for the others."""
    kind = source.config.model_type
    return "projection" if kind in ("clip", "siglip", "siglip2") else "mean" if kind == "blip-2" else asked


def text_preparer(source, tokenizer, texts, args, add_eos):
    """prepare(rows) -> token ids of these texts."""
    limit = max_tokens(source, tokenizer, args.max_length)
    if add_eos and tokenizer.eos_token_id is None:
        raise UserError(f"model {source.name}: its tokenizer has no EOS token for last-token pooling; use --text-pool mean")
    return lambda rows: tokenize(tokenizer, [texts[i] for i in rows], limit, add_eos)


def text_forward(source, tokenizer, args, how):
    """forward(items: lists of token ids) -> ([B, D],)."""
    model, pad_id, side, kind = load_model(source, args), pad_token(tokenizer), tokenizer.padding_side, source.config.model_type
    length = None
    if kind.startswith("siglip"):  # trained on captions padded to the full length, without a mask; reads the last place
        length = source.config.text_config.max_position_embeddings
    elif kind == "blip-2":
        if not source.config.text_config.is_encoder_decoder:
            raise UserError(f"model {source.name}: its language model has no encoder; text latents need a T5 BLIP-2, e.g. Salesforce/blip2-flan-t5-xl")
        model = model.language_model.get_encoder()
    elif source.config.is_encoder_decoder:
        model = model.get_encoder()

    @torch.inference_mode()
    def forward(items):
        ids, mask = pad(items, "right" if how == "projection" else side, pad_id, args.device, length)
        if how == "projection":
            return (model.get_text_features(input_ids=ids, **({} if length else {"attention_mask": mask})).pooler_output,)
        out = model(input_ids=ids, attention_mask=mask, **positions(model, mask, side))
        return (pool_tokens(out.last_hidden_state, mask, how),)
    return forward


def image_forward(source, args):
    """forward(items: [3, H, W] arrays) -> ([B, D],): the projection of CLIP, the pooled output of SigLIP, the mean over the outputs of BLIP-2's
    Q-Former, the CLS token of a plain vision transformer."""
    model = load_model(source, args)

    @torch.inference_mode()
    def forward(items):
        pixels = torch.from_numpy(np.stack(items)).to(args.device, DTYPES[args.weights])
        if source.config.model_type == "blip-2":
            out = model.get_qformer_features(pixel_values=pixels)
            return (getattr(out, "last_hidden_state", out).float().mean(1),)
        if hasattr(model, "get_image_features"):
            return (model.get_image_features(pixel_values=pixels).pooler_output,)
        return (model(pixel_values=pixels).last_hidden_state[:, 0],)
    return forward


def language_preparer(tokenizer, texts):
    """prepare(rows) -> token ids, not cut: `language_forward` cuts, and knows then which captions were."""
    fallback = [next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)]
    return lambda rows: [ids or fallback for ids in tokenizer([texts[i] for i in rows])["input_ids"]]


def language_forward(source, tokenizer, args):
    """forward(items: lists of token ids) -> (features [B, L, D], nats [B]) of a causal language model.

    Features: mean over the tokens of the embeddings' output and of every block's (the last one normalised), L = blocks + 1. Nats: negative log
    likelihood of all tokens of the text, the first one given a start token (BOS, else EOS), so that tokenizers with and without one compare; nan for a
    text longer than the model takes.
    """
    model, pad_id, side = load_model(source, args, "AutoModelForCausalLM"), pad_token(tokenizer), tokenizer.padding_side
    limit = max_tokens(source, tokenizer, args.max_length)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(f"model {source.name}: its tokenizer has neither BOS nor EOS to start a text with")
    starts_itself = tokenizer("a")["input_ids"][0] == start

    def run(items, hidden):
        ids, mask = pad(items, side, pad_id, args.device)
        return ids, mask, model(input_ids=ids, attention_mask=mask, output_hidden_states=hidden, use_cache=False, **positions(model, mask, side))

    @torch.inference_mode()
    def forward(items):
        cut = [item[:limit] for item in items]
        ids, mask, out = run(cut, True)
        features = torch.stack([pool_tokens(hidden, mask, "mean") for hidden in out.hidden_states], dim=1)
        if not starts_itself:
            ids, mask, out = run([[start, *item[:limit - 1]] for item in items], False)
        kept = (mask[:, 1:] * mask[:, :-1]).bool()
        room = limit if starts_itself else limit - 1
        nats = [F.cross_entropy(logits[:-1][keep].float(), row[1:][keep], reduction="sum") if len(item) <= room else torch.tensor(math.nan)
                for logits, row, keep, item in zip(out.logits, ids, kept, items, strict=True)]
        return features, torch.stack([value.to(args.device) for value in nats])
    return forward


def vision_forward(source, args, how):
    """forward(items: [3, H, W] arrays) -> ([B, L, D],): the CLS token (how="cls") or the mean over tokens ("avg") after each block, before any final norm."""
    model = load_model(source, args)
    tower, config = getattr(model, "vision_model", model), getattr(source.config, "vision_config", source.config)
    blocks = next((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == getattr(config, "num_hidden_layers", None)), None)
    if blocks is None:
        raise UserError(f"model {source.name}: no list of transformer blocks found in a {source.config.model_type}; use a vision transformer")
    seen = []
    for block in blocks:  # hooks, as the last of `hidden_states` is normalised in some models
        block.register_forward_hook(lambda module, inputs, output: seen.append(output if isinstance(output, torch.Tensor) else output[0]))
    extra = {}
    if source.config.model_type == "vit_mae":  # no masking, no shuffling
        model.config.mask_ratio = 0.0
        extra["noise"] = torch.arange((config.image_size // config.patch_size) ** 2, device=args.device).float()

    @torch.inference_mode()
    def forward(items):
        seen.clear()
        pixels = torch.from_numpy(np.stack(items)).to(args.device, DTYPES[args.weights])
        tower(pixel_values=pixels, **{key: value.expand(len(items), -1) for key, value in extra.items()})
        n_patches = pixels.shape[2] * pixels.shape[3] // config.patch_size**2
        if how == "cls" and seen[0].shape[1] <= n_patches:
            raise UserError(f"model {source.name}: a {source.config.model_type} has no CLS token; use --vision-pool avg")
        return (torch.stack([x[:, 0].float() if how == "cls" else x.float().mean(1) for x in seen], dim=1),)
    return forward


# --------------------------------------------------------------------------------------------------------- images, views

def read_image(path):
    """An RGB picture, turned upright. Raises whatever Pillow raises on a missing or broken file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency, odd EXIF
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def guarded_read(path):
    """read_image(path), or the reason (a str) why it cannot be read."""
    try:
        return read_image(path)
    except Exception as error:  # Pillow raises many kinds on a broken file
        return first_line(error)


def pixels_of(image, processor):
    return image if isinstance(image, str) else processor(images=image, return_tensors="np")["pixel_values"][0].astype(np.float32)


def image_preparer(files, processor, workers):
    """prepare(rows) -> [3, H, W] arrays, or the reason (a str) why a picture cannot be read."""
    return lambda rows: list(workers.map(lambda i: pixels_of(guarded_read(files[i]), processor), rows))


def view_draws(item, view, modality):
    """The random numbers of one view: a function of id, view and modality alone, so that any row can be made again."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{item}:{view}:{modality}".encode()).digest(), "big"))


def augment_image(image, size, draws):
    """A SimCLR view (Chen et al. 2020, appendix A): crop of 0.08 to 1 of the area to size = (width, height), flip, colour jitter (strength 1), grey, blur."""
    width, height = image.size
    for _ in range(10):
        area = draws.uniform(0.08, 1) * width * height
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = draws.randint(0, width - w), draws.randint(0, height - h)
    image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    if draws.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draws.random() < 0.8:
        for change in draws.sample(("Brightness", "Contrast", "Color", "Hue"), 4):
            if change == "Hue":
                shift, (hue, *rest) = round(255 * draws.uniform(-0.2, 0.2)), image.convert("HSV").split()
                image = Image.merge("HSV", [hue.point([(i + shift) % 256 for i in range(256)]), *rest]).convert("RGB")
            else:
                image = getattr(ImageEnhance, change)(image).enhance(draws.uniform(0.2, 1.8))
    if draws.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if draws.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(draws.uniform(0.1, 2)))
    return image


def mask_words(text, mask_token, draws, share=0.15):
    """The text with that share of its words (at least one) replaced by the tokenizer's mask token, or left out where it has none."""
    words = text.split()
    places = set(draws.sample(range(len(words)), min(len(words), max(1, round(share * len(words))))))
    return " ".join(word if i not in places else mask_token or "" for i, word in enumerate(words) if i not in places or mask_token)


# --------------------------------------------------------------------------------------------------------- rows in shards

def digest(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def file_sizes(files):
    """What tells one set of pictures from another without reading them."""
    return [[Path(f).name, os.path.getsize(f) if os.path.exists(f) else None] for f in files]


def check_same_job(found, job, where):
    changed = [f"{key}={json.dumps(found.get(key))} (now {json.dumps(job.get(key))})" for key in {**found, **job} if found.get(key) != job.get(key)]
    if changed:
        raise UserError(f"{where} was made otherwise: {', '.join(v if len(v) < 150 else v.split('=')[0] for v in changed)}; "
                        "move it away, or choose another --out")


def append_block(path, start, n, block):
    """Write rows [start, start + B) of an .npy of n rows. Plain writes, not a mapping: on a full disk they raise an error, a mapping kills the process."""
    block = (block.view(torch.int16) if block.dtype == torch.bfloat16 else block).contiguous().numpy()
    with open(path, "r+b" if start else "w+b") as file:
        if start:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        else:
            np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False,
                                                        "shape": (n, *block.shape[1:])})
        file.seek(file.tell() + start * block[0].nbytes)
        file.write(block.tobytes())
        file.flush()
        os.fsync(file.fileno())


def map_rows(path, dtype):
    """The [N, ...] tensor of an .npy, mapped, not read."""
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    return rows.view(torch.bfloat16) if dtype == torch.bfloat16 and rows.dtype == torch.int16 else rows


def out_of_memory(error):
    return any(words in str(error).lower() for words in ("out of memory", "not enough memory", "can't allocate memory"))


def run_batches(forward, items, batch_size):
    """(outputs of forward for the items that are no str, in order; their indices; the batch size that fitted). Longest first; out of memory starts
    the shard again with half the batch."""
    good = sorted((i for i, item in enumerate(items) if not isinstance(item, str)), key=lambda i: -len(items[i]))  # pictures: in order
    while True:
        try:
            parts = [forward([items[i] for i in good[j:j + batch_size]]) for j in range(0, len(good), batch_size)]
            parts = [[x.cpu() for x in part] for part in parts]
            break
        except RuntimeError as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
        batch_size //= 2
        print(f"out of memory: going on with batches of {batch_size}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [torch.cat(column) for column in zip(*parts, strict=True)], good, batch_size


def encode_rows(path, job, n, shard, prepare, load_forward, finish, args, names):
    """Encode n rows in shards into `path`, or go on where an earlier run of the same job stopped. Returns the manifest.

    job: dict of all that decides the content. prepare(rows) -> items for the model, or a str, the reason why a row has none; it runs one shard ahead in
    a thread. load_forward() -> forward(items) -> tuple of [B, ...] tensors: features, stored as args.dtype, and perhaps a column of numbers.
    finish(mapped outputs, rows that are good) -> (facts for the manifest, write()), where write() puts `path` in its place. names [n]: for messages.
    A shard's rows go to `.{name}.work/`, which is removed at the end; its state.json says how many are done.
    """
    path, work, dtype = Path(path), Path(path).with_name(f".{Path(path).name}.work"), DTYPES[args.dtype]
    manifest_file, state_file = path.with_name(f"{path.stem}_manifest.json"), work / "state.json"
    job = json.loads(json.dumps({**job, "dtype": args.dtype, "weights": args.weights, "shard": shard}, default=str))
    if path.exists() and manifest_file.exists():
        manifest = common.read_json(manifest_file)
        check_same_job(manifest.get("job", {}), job, path)
        shutil.rmtree(work, ignore_errors=True)
        print(f"{path}: finished before")
        return manifest
    if path.exists() and not state_file.exists():
        raise UserError(f"{path} exists and has no {manifest_file.name}: it was not made by this command; move it away, or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    state = common.read_json(state_file) if state_file.exists() else {"job": job, "done": 0, "batch_size": args.batch_size, "bad": {}, "shapes": []}
    check_same_job(state["job"], job, f"the unfinished {work}")
    shards = [range(i, min(i + shard, n)) for i in range(state["done"], n, shard)]
    batch_size, began, told = min(state["batch_size"], args.batch_size), time.time(), 0
    if shards:
        forward = load_forward()
        if state["done"]:
            print(f"{path.name}: going on at {state['done']} of {n} rows", flush=True)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        future = ahead.submit(prepare, shards[0]) if shards else None
        for number, rows in enumerate(shards):
            items = future.result()
            if number + 1 < len(shards):
                future = ahead.submit(prepare, shards[number + 1])
            outputs, good, batch_size = run_batches(forward, items, batch_size)
            bad = {str(names[rows[i]]): item for i, item in enumerate(items) if isinstance(item, str)}
            if not outputs and not state["shapes"]:
                raise UserError(f"{path.name}: none of the first {len(rows)} images can be read, the first: {next(iter(bad.items()))}")
            state["shapes"] = state["shapes"] or [list(x.shape[1:]) for x in outputs]
            for k, shape in enumerate(state["shapes"]):
                block = torch.full((len(rows), *shape), math.nan, dtype=torch.float32 if k else dtype)
                if outputs:
                    block[good] = outputs[k].to(block.dtype)
                    if k == 0 and not (finite := torch.isfinite(block[good].flatten(1)).all(1)).all():
                        name = names[rows[good[int((~finite).nonzero()[0])]]]
                        raise UserError(f"{job['model']}: features of {name} are not finite in {args.dtype} (largest before: "
                                        f"{outputs[0].abs().max():.3g}); use --dtype {'float32' if path.suffix == '.npy' else 'bfloat16'}")
                append_block(work / f"{k}.npy", rows[0], n, block)
            for name, reason in bad.items():
                print(f"cannot be read: {name} ({reason})", flush=True)
            state |= {"done": rows[-1] + 1, "batch_size": batch_size, "bad": state["bad"] | bad}
            common.write_json(state_file, state)
            rate = (rows[-1] + 1 - shards[0][0]) / (time.time() - began)
            if sys.stderr.isatty() or time.time() - told > 30:
                told, left = time.time(), (n - rows[-1] - 1) / rate
                print(f"{path.name}: {rows[-1] + 1} of {n} rows, {rate:.3g}/s, {left // 60:.0f} min {left % 60:.0f} s left", flush=True)
    outputs = [map_rows(work / f"{k}.npy", dtype) for k in range(len(state["shapes"]))]
    kept = torch.tensor([i for i in range(n) if str(names[i]) not in state["bad"]])
    facts, write = finish(outputs, kept)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "pillow")}
    manifest = {**facts, "n_bad_images": len(state["bad"]), "bad_images": state["bad"], "batch_size": state["batch_size"], "versions": versions,
                "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type, "job": job}
    common.write_json(manifest_file, manifest)
    write()
    shutil.rmtree(work)
    print(f"{path}: {len(kept)} rows {state['shapes'][0]} {args.dtype}" + (f", {len(state['bad'])} images could not be read" if state["bad"] else ""))
    return manifest


def save(path, value):
    """write() for encode_rows: torch.save, atomically."""
    return lambda: common.atomic_write(path, lambda file: torch.save(value, file))


def taken(rows, kept):
    """rows[kept], without a copy if that is all of them."""
    return rows if len(kept) == len(rows) else rows[kept]


def model_job(source, processor=None, **facts):
    """The part of a job that says which model, from where, on what pixels."""
    transform = {key: value for key, value in processor.to_dict().items() if not key.startswith("_")} if processor else None
    return {"model": source.name, "revision": source.commit, **({"transform": transform} if processor else {}), **facts}


# -------------------------------------------------------------------------------------------------------------- commands

def folder_of(path, what):
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder ({what})")
    return Path(path)


def read_coco(path, limit):
    """(images [N] dicts id and file_name, captions: list of (image row, caption id, text) by image) of a COCO captions file. Raises: UserError."""
    content = common.read_json(path)
    try:
        by_image = {}
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append((annotation["id"], " ".join(annotation["caption"].split())))
        images = [{"id": image["id"], "file_name": image["file_name"]} for image in content["images"] if image["id"] in by_image][:limit]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected COCO captions, images with id and file_name, annotations with id, image_id and caption "
                        f"({first_line(error)})") from None
    if not images:
        raise UserError(f"{path}: no image has a caption")
    if left := len(content["images"]) - len(images):
        print(f"{path}: {left} of {len(content['images'])} images left out (without captions, or beyond --limit)")
    return images, [(row, *caption) for row, image in enumerate(images) for caption in by_image[image["id"]]]


def coco(args):
    """{split}_image_embeddings.pt [images, D], {split}_text_embeddings.pt [captions, D], {split}_metadata.json for exp_coco_heads.py."""
    folder, out = folder_of(args.images, "the images"), Path(args.out)
    images, captions = read_coco(args.captions, args.limit)
    files, names = [folder / image["file_name"] for image in images], [image["file_name"] for image in images]
    vision, text = find_model(args.image_model), find_model(args.text_model)
    processor, tokenizer = load_processor(vision), load_tokenizer(text, args.padding_side)
    counts = np.bincount([row for row, *_ in captions])

    def finish_images(outputs, kept):
        x = taken(outputs[0], kept)
        return {"rows_are": "captions" if args.repeat_images else "images"}, save(image_path, x.repeat_interleave(
            torch.from_numpy(counts)[kept], dim=0) if args.repeat_images else x)

    image_path = out / f"{args.split}_image_embeddings.pt"
    manifest = encode_rows(image_path, model_job(vision, processor, repeat_images=args.repeat_images, data=digest(file_sizes(files)),
                                                 captions=digest(captions)),
                           len(files), IMAGE_SHARD, image_preparer(files, processor, args.workers), lambda: image_forward(vision, args), finish_images,
                           args, names)
    kept = {row: new for new, row in enumerate(row for row, name in enumerate(names) if name not in manifest["bad_images"])}
    captions = [caption for caption in captions if caption[0] in kept]
    prefix, how = f"Instruct: {args.instruction}\nQuery: " if args.instruction else "", text_pooling(text, args.text_pool)
    texts, text_path = [prefix + caption for *_, caption in captions], out / f"{args.split}_text_embeddings.pt"
    encode_rows(text_path, model_job(text, pool=how, padding_side=tokenizer.padding_side, max_length=args.max_length, instruction=args.instruction,
                                     data=digest(texts)),
                len(texts), TEXT_SHARD, text_preparer(text, tokenizer, texts, args, how == "last"), lambda: text_forward(text, tokenizer, args, how),
                lambda outputs, rows: ({}, save(text_path, outputs[0])), args, range(len(texts)))
    metadata = {"dataset_name": args.split, "image_model": args.image_model, "text_model": args.text_model, "total_pairs": len(captions),
                "unique_images": len(kept), "total_captions": len(captions), "bad_images": manifest["n_bad_images"],
                "image_ids": [images[row]["id"] for row, *_ in captions], "caption_ids": [caption_id for _, caption_id, _ in captions],
                **({} if args.repeat_images else {"image_index": [kept[row] for row, *_ in captions]}),
                "captions": [caption for *_, caption in captions], "image_files": [names[row] for row in kept]}
    common.write_json(out / f"{args.split}_metadata.json", metadata)
    print(f"{out / f'{args.split}_metadata.json'}: {len(captions)} captions of {len(kept)} images")


def film_ids(root, limit):
    """Film ids in the order of labels/ids_all.txt if there is one, else all with plot and poster, sorted (the same)."""
    listed = root / "labels/ids_all.txt"
    dataset = folder_of(root / "dataset", "MM-IMDb's plots and posters; unpack mmimdb.tar.gz, or point --data at it")
    ids = listed.read_text().split() if listed.is_file() else sorted(p.stem for p in dataset.glob("*.json") if p.with_suffix(".jpeg").exists())
    if not ids:
        raise UserError(f"{dataset}: no films (an {{id}}.json with its {{id}}.jpeg)")
    return ids[:limit]


def mmimdb(args):
    """latents/mm_imdb1_globals_aug{views}_{backbone}_{image,text}.npy, rows views * film + view, view 0 clean, for exp_gw_mmimdb.py."""
    from exp_alignment_corr import film_texts
    root, views = Path(args.data), args.views
    ids = film_ids(root, args.limit)
    texts, source = film_texts(root, ids), find_model(args.model or {"clip": "openai/clip-vit-base-patch16",
                                                                     "blip2": "Salesforce/blip2-flan-t5-xl"}.get(args.backbone, args.backbone))
    processor, tokenizer = load_processor(source), load_tokenizer(source)
    how = text_pooling(source, args.text_pool)
    files, out = [root / "dataset" / f"{film}.jpeg" for film in ids], Path(args.out or root / "latents")

    def film_views(film, wanted):
        image = guarded_read(files[film])
        if isinstance(image, str):
            return [image] * len(wanted)
        size = pixels_of(image, processor).shape[:0:-1]  # width, height that the model sees
        return [pixels_of(augment_image(image, size, view_draws(ids[film], view, "image")) if view else image, processor) for view in wanted]

    def prepare_images(rows):  # whole films, as a shard holds whole films
        return [item for part in args.workers.map(lambda film: film_views(film, range(views)), range(rows[0] // views, rows[-1] // views + 1)) for item in part]

    def prepare_texts(rows):
        plots = [mask_words(texts[row // views], tokenizer.mask_token, view_draws(ids[row // views], row % views, "text")) if row % views
                 else texts[row // views] for row in rows]
        return tokenize(tokenizer, plots, max_tokens(source, tokenizer, args.max_length), how == "last")

    names = [film for film in ids for _ in range(views)]
    for modality, prepare, data in (("image", prepare_images, file_sizes(files)), ("text", prepare_texts, texts)):
        path = out / f"mm_imdb1_globals_aug{views}_{args.backbone}_{modality}.npy"

        def finish(outputs, kept, path=path):
            total = squares = torch.zeros(outputs[0].shape[1], dtype=torch.float64)
            for rows in kept.split(65536):
                block = outputs[0][rows].double()
                total, squares = total + block.sum(0), squares + block.square().sum(0)
            mean = total / len(kept)
            sigma = (squares / len(kept) - mean.square()).clamp(min=0).sqrt()
            sigma[sigma == 0] = 1  # a constant feature
            statistics = {"mu": mean.float().numpy(), "sigma": sigma.float().numpy()}
            common.atomic_write(path.with_name(f"{path.stem}.stats.npz"), lambda file: np.savez(file, **statistics))
            facts = {"total_rows": len(names), "original_rows": len(ids), "views_per_sample": views, "dims": outputs[0].shape[1], "dtype": args.dtype,
                     "row": "views_per_sample * film + view, view 0 clean; films as in ids"}
            return facts | {"ids": ids}, lambda: os.replace(path.with_name(f".{path.name}.work") / "0.npy", path)

        job = model_job(source, processor if modality == "image" else None, modality=modality, views=views, films=digest(ids), data=digest(data),
                        **({"pool": how, "max_length": args.max_length} if modality == "text" else {"augmentation": "SimCLR"}))
        load_forward = (lambda: image_forward(source, args)) if modality == "image" else (lambda: text_forward(source, tokenizer, args, how))
        shard = views * max(1, (IMAGE_SHARD if modality == "image" else TEXT_SHARD) // views)
        manifest = encode_rows(path, job, len(names), shard, prepare, load_forward, finish, args, names)
        if manifest["bad_images"]:
            print(f"the rows of these {manifest['n_bad_images']} films are nan: mend their posters and encode again, or take them out of {root / 'split.json'}")


def read_plain_captions(path):
    """[N] captions: a line each, or a JSON list of strings."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        captions = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        captions = [" ".join(caption.split()) for caption in captions]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected a caption a line, or a JSON list of strings ({first_line(error)})") from None
    if not captions or not all(captions):
        raise UserError(f"{path}: " + (f"line {captions.index('') + 1} is empty" if captions else "no captions"))
    return captions


def rewrite_captions(captions, seed=0):
    """Items as exp_alignment_corr.py reads them: each caption with u% of its words replaced, u = 10..100, by words drawn from all captions (as often
    as they occur there). The words replaced at one level stay replaced at the next."""
    vocabulary = [word for caption in captions for word in caption.split()]
    if len(set(vocabulary)) < 2:
        raise UserError("captions of one and the same word cannot be rewritten")
    items = []
    for i, caption in enumerate(captions):
        draws, words = view_draws(i, seed, "rewrite"), caption.split()
        order, new = draws.sample(range(len(words)), len(words)), []
        for word in words:
            new.append(draws.choice(vocabulary))
            while new[-1] == word:
                new[-1] = draws.choice(vocabulary)
        sentences = {}
        for level, u in enumerate(LEVELS, 1):
            replaced = set(order[:round(len(words) * u / 100)])
            sentences[f"Caption {level} - {u}%"] = " ".join(new[j] if j in replaced else word for j, word in enumerate(words))
        items.append({f"Index - {i}": {"original": caption, "sentences": sentences}})
    return items


def image_names(path, folder):
    """Names of the pictures in the order of the captions: lines, a JSON list of names or of {"image": name}; without a list, the folder's, sorted."""
    if not path:
        return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    try:
        text = Path(path).read_text(encoding="utf-8")
        listed = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
        return [item["image"] if isinstance(item, dict) else str(item).strip() for item in listed if item]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--image-names {path}: expected a name a line, or a JSON list of names or of {{'image': name}} ({first_line(error)})") from None


def alignment(args):
    """Layer-wise features {feats [N, L, D], ids, model, pool[, bpb]} for exp_alignment_corr.py: gpt_u={u}_features/ (or language/, with --mmimdb), vision/."""
    from exp_alignment_corr import film_texts, read_captions
    out, files = Path(args.out), None
    if args.mmimdb:
        ids = film_ids(Path(args.mmimdb), args.limit)
        files = [Path(args.mmimdb, "dataset", f"{film}.jpeg") for film in ids]
        levels = {"language": film_texts(args.mmimdb, ids)}
    else:
        captions_file = args.captions
        if args.rewrite_captions:
            captions_file = out / "captions.json"
            items = rewrite_captions(read_plain_captions(args.rewrite_captions), args.seed)
            out.mkdir(parents=True, exist_ok=True)
            common.atomic_write(captions_file, lambda file: file.write((json.dumps(items, indent=1, ensure_ascii=False) + "\n").encode()))
            print(f"{captions_file}: {len(items)} captions at u = 0, 10 .. 100")
            if not args.language and not args.vision:
                return
        if not captions_file:
            raise UserError("alignment needs --captions (or --rewrite-captions) for photos and captions, or --mmimdb for films")
        levels = {f"gpt_u={u}_features": texts for u, texts in read_captions(captions_file).items()}
        ids = [next(iter(item)) for item in json.loads(Path(captions_file).read_text(encoding="utf-8"))]
        if args.images:
            names = image_names(args.image_names, folder_of(args.images, "the photos"))
            if len(names) != len(ids):
                raise UserError(f"{args.images}: {len(names)} photos for the {len(ids)} captions of {captions_file}; name them in order with --image-names")
            files = [Path(args.images, name) for name in names]
    if args.vision and not files:
        raise UserError("--vision needs --images, the photos of the captions")
    if len(set(ids)) < len(ids):
        raise UserError(f"{args.captions}: an item is named twice; features are matched by these names")
    good, n_bad = range(len(ids))[:args.limit], 0
    if files:  # an item without a picture is left out on both sides
        reasons = list(args.workers.map(lambda i: guarded_read(files[i]) if not files[i].is_file() or args.vision else None, good))
        for i, reason in zip(good, reasons, strict=True):
            if isinstance(reason, str):
                print(f"cannot be read: {files[i]} ({reason}); {ids[i]} is left out", flush=True)
        del reasons[len(good):]
        good = [i for i, reason in zip(good, reasons, strict=True) if not isinstance(reason, str)]
        n_bad = len(reasons) - len(good)
    ids, levels = [ids[i] for i in good], {name: [texts[i] for i in good] for name, texts in levels.items()}
    files = [files[i] for i in good] if files else None
    if not ids:
        raise UserError("no item has a readable picture")
    sources = [find_model(name) for name in [*args.language, *args.vision]]
    for side in (sources[:len(args.language)], sources[len(args.language):]):
        if twice := [s.stem for s in side if [other.stem for other in side].count(s.stem) > 1]:
            raise UserError(f"two models would both write {twice[0]}.pt; encode them into different --out folders")
    for source in sources[:len(args.language)]:
        tokenizer = load_tokenizer(source, args.padding_side or "left")
        load_forward = functools.cache(lambda source=source, tokenizer=tokenizer: language_forward(source, tokenizer, args))  # once for all levels
        for folder, texts in levels.items():
            path = out / folder / f"{source.stem}.pt"

            def finish(outputs, rows, path=path, texts=texts, source=source):
                whole = ~outputs[1].isnan()
                n_bytes = sum(len(text.encode()) for text, is_whole in zip(texts, whole.tolist(), strict=True) if is_whole)
                facts = {"model": source.stem, "pool": "avg", "bpb": float(outputs[1][whole].double().sum()) / math.log(2) / n_bytes if n_bytes else None}
                if not whole.all():
                    print(f"{source.name}: {int((~whole).sum())} texts of {path.parent.name} are longer than the model takes: cut, not counted in bpb")
                return facts | {"n_bytes": n_bytes, "n_left_out": n_bad}, save(path, {"feats": outputs[0], "ids": ids, **facts})

            encode_rows(path, model_job(source, pool="avg", padding_side=tokenizer.padding_side, max_length=args.max_length, data=digest([ids, texts])),
                        len(ids), TEXT_SHARD, language_preparer(tokenizer, texts), load_forward, finish, args, ids)
    for source in sources[len(args.language):]:
        processor, path = load_processor(source), out / "vision" / f"{source.stem}.pt"
        facts = {"model": source.stem, "pool": args.vision_pool, "files": [f.name for f in files]}
        encode_rows(path, model_job(source, processor, pool=args.vision_pool, data=digest([ids, file_sizes(files)])), len(ids), IMAGE_SHARD,
                    image_preparer(files, processor, args.workers), lambda source=source: vision_forward(source, args, args.vision_pool),
                    lambda outputs, rows, path=path, facts=facts: ({"n_left_out": n_bad}, save(path, {"feats": outputs[0], "ids": ids, **facts})), args, ids)


def flickr8k(args):
    """image_features.pt {feats [N, D], ids [N] file names, model} for exp_flickr_ttt.py's model.image_encoder=cached."""
    root = folder_of(args.data, "Flickr8k")
    folder = next((root / name for name in ("Flickr8k_Dataset", "Flicker8k_Dataset", "Images") if (root / name).is_dir()), None)
    files = sorted(folder.glob("*.jpg"))[:args.limit] if folder else []
    if not files:
        raise UserError(f"{root}: no Flickr8k_Dataset/*.jpg (nor Flicker8k_Dataset, Images) in it")
    source, path, names = find_model(args.model), Path(args.out or root) / "image_features.pt", [f.name for f in files]
    processor = load_processor(source)

    def finish(outputs, kept):
        return {}, save(path, {"feats": taken(outputs[0], kept), "ids": [names[i] for i in kept.tolist()], "model": source.name, "revision": source.commit})

    encode_rows(path, model_job(source, processor, data=digest(file_sizes(files))), len(files), IMAGE_SHARD,
                image_preparer(files, processor, args.workers), lambda: image_forward(source, args), finish, args, names)


# ---------------------------------------------------------------------------------------------------------- command line

def positive(text):
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parse_command_line(argv):
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--limit", type=positive, metavar="N", help="only the first N images, items or films")
    shared.add_argument("--device", default="auto", help="auto | cuda | cuda:1 | mps | cpu")
    shared.add_argument("--batch-size", type=positive, default=64, help="rows a forward pass; halved when memory runs out (default: 64)")
    shared.add_argument("--weights", choices=("auto", *DTYPES), default="auto", help="type of the model's weights (auto: bfloat16 on a GPU, else float32)")
    shared.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="type of the features written (default: float16)")
    shared.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="threads that decode images (default: one a core)")
    texts = argparse.ArgumentParser(add_help=False)
    texts.add_argument("--max-length", type=positive, default=512, help="tokens a text is cut to, if the model does not cut earlier (default: 512)")
    texts.add_argument("--padding-side", choices=("left", "right"), help="of the texts in a batch (default: the tokenizer's; alignment: left)")
    pool = argparse.ArgumentParser(add_help=False)
    pool.add_argument("--text-pool", choices=("last", "mean", "first"), default="last",
                      help="token(s) of an encoder that has no pooling of its own: last (with EOS appended), mean, first (CLS) (default: last)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, *parents):
        sub = commands.add_parser(function.__name__, description=function.__doc__, help=function.__doc__, parents=[shared, *parents])
        sub.set_defaults(run=function)
        return sub.add_argument

    add = command(coco, texts, pool)
    add("--images", required=True, help="folder of the images")
    add("--captions", required=True, help="COCO captions JSON")
    add("--split", default="train2017", help="what the files' names begin with: train2017 | val2017")
    add("--out", default="pretrain_encoded", help="folder to write to (default: pretrain_encoded)")
    add("--image-model", default="google/siglip-so400m-patch14-384", help="SigLIP, CLIP, BLIP-2 or a plain vision transformer (default: %(default)s)")
    add("--text-model", default="intfloat/e5-mistral-7b-instruct", help="any text encoder (default: %(default)s)")
    add("--instruction", default="", help="E5's task description: captions become 'Instruct: ...\\nQuery: caption' (default: none)")
    add("--repeat-images", action="store_true", help="an image row per caption, as the original files had, instead of image_index")
    add = command(mmimdb, texts, pool)
    add("--data", default=os.environ.get("MMIMDB1_DIR", "mmimdb"), help="folder with dataset/ (default: $MMIMDB1_DIR, else mmimdb)")
    add("--backbone", default="clip", help="name in the files: clip, blip2, or any word with --model")
    add("--model", help="default: openai/clip-vit-base-patch16 for clip, Salesforce/blip2-flan-t5-xl for blip2")
    add("--views", type=positive, default=70, help="rows a film: view 0 clean, the others augmented (default: 70)")
    add("--out", help="folder to write to (default: {data}/latents)")
    add = command(alignment, texts)
    add("--captions", help="JSON of captions and rewrites at levels u")
    add("--rewrite-captions", metavar="FILE", help="make {out}/captions.json from one's own captions (a line each, or a JSON list) by seeded word replacement")
    add("--seed", type=int, default=0, help="of --rewrite-captions")
    add("--images", help="folder of the photos, one a caption")
    add("--image-names", help="their names in the order of the captions (default: sorted names)")
    add("--mmimdb", metavar="DIR", help="posters and plots of this folder instead of captions and photos")
    add("--language", nargs="+", default=[], metavar="MODEL", help="causal language models")
    add("--vision", nargs="+", default=[], metavar="MODEL", help="vision transformers, also CLIP's")
    add("--vision-pool", choices=("cls", "avg"), default="cls", help="CLS token, or mean of the tokens, after each block (default: cls)")
    add("--out", default="prh", help="folder to write to (default: prh)")
    add = command(flickr8k)
    add("--data", default="flickr8k", help="folder with Flickr8k_Dataset/ (default: flickr8k)")
    add("--model", default="google/siglip-so400m-patch14-384", help="default: %(default)s")
    add("--out", help="folder to write image_features.pt to (default: the data's)")
    return parser.parse_args(argv)


@common.exit_codes
def main(argv=None):
    args = parse_command_line(argv)
    args.device = common.pick_device(args.device)
    if args.weights == "auto":
        args.weights = "bfloat16" if args.device.type == "cuda" else "float32"
    if args.command == "mmimdb" and args.dtype == "bfloat16":
        raise UserError("--dtype bfloat16: latents are .npy files, which have no bfloat16; use float16 or float32")
    if args.command == "alignment" and not (args.language or args.vision or args.rewrite_captions):
        raise UserError("alignment: name models to encode with, --language MODEL ... and / or --vision MODEL ...")
    with concurrent.futures.ThreadPoolExecutor(args.workers) as args.workers:
        args.run(args)


if __name__ == "__main__":
    sys.exit(main())
