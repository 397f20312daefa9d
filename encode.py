"""Raw data sets -> the embedding files that the experiments read. Needs `transformers` (>= 5.20; not timm).

    python encode.py coco --images train2017 --captions captions_train2017.json --split train2017 --out pretrain_encoded
    python encode.py mmimdb --data mmimdb --backbone clip          # or blip2: latents of 70 views for exp_gw_mmimdb.py
    python encode.py alignment --captions captions.json --images photos --language bigscience/bloomz-560m --vision facebook/dinov2-base --out prh
    python encode.py alignment --mmimdb mmimdb --language bigscience/bloomz-560m --vision facebook/dinov2-base --out mmimdb/features
    python encode.py flickr8k --data flickr8k --text-model sentence-transformers/all-MiniLM-L6-v2 --speech-model openai/whisper-base.en --corruptions

Models are folders or names on huggingface.co, with @revision if wanted; HF_HUB_OFFLINE=1 uses only what has been downloaded. Rows are encoded in
shards; the same command after a kill goes on at the first unfinished one and gives the same bits as a run that was not interrupted. Beside every
output stands a `*_manifest.json`: model, revision, transform, versions, and the images that could not be read.

Shapes: N items (images, captions, films), B rows of a batch, T tokens, L layers, D features.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import common
from common import UserError

SHARD, TEXT_SHARD = 256, 4096  # rows a shard, of pictures (or layer-wise features) and of texts: it fixes the batches, so the bits
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


# ---------------------------------------------------------------------------------------------------------------- models

def import_transformers():
    """The package, quiet; imported here, so that -h is quick and needs nothing."""
    try:
        import transformers
        version = transformers.__version__
    except ImportError:
        version = "0.0"
    if tuple(map(int, version.split(".")[:2])) < (5, 20):  # older ones want torchvision for every image processor
        raise UserError("encode.py needs the package transformers, at least 5.20: pip install 'transformers>=5.20'")
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
    def kind(self):
        return self.config.model_type

    @property
    def stem(self):
        """The last part of the name, which names its files."""
        return Path(self.path).name


def find_model(name):
    """Source of a local folder or of a name[@revision] on the hub. Raises: UserError."""
    transformers = import_transformers()
    path, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision or None)
        if Path(path).is_dir():
            files = sorted(p for p in Path(path).iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".model"))
            commit = f"files {common.fingerprint(files)}"
        else:
            commit = Path(transformers.utils.cached_file(path, "config.json", revision=revision or None)).parent.name
    except Exception as error:  # the hub, json and transformers raise kinds of their own
        raise UserError(f"model {name}: {first_line(error)}; give a folder of a saved model or a name on huggingface.co "
                        "(with HF_HUB_OFFLINE=1 one that has been downloaded)") from None
    return Source(name, path, revision or None, commit, config)


def load(source, kind, **kwargs):
    """transformers.<kind>.from_pretrained of a Source, in one line if it fails."""
    try:
        return getattr(import_transformers(), kind).from_pretrained(source.path, revision=source.revision, **kwargs)
    except Exception as error:  # missing files, unknown classes, missing packages
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise UserError(f"model {source.name}: {kind} cannot be loaded ({first_line(error)})") from None


def out_of_memory(error):
    return any(words in str(error).lower() for words in ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed"))


def load_model(source, args, kind="AutoModel"):
    """The model on the device, in eval mode. Raises: UserError, also if weights are missing from its files: they would be random."""
    try:
        model, info = load(source, kind, dtype=DTYPES[args.weights], output_loading_info=True)
        model = model.to(args.device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"model {source.name}: out of memory while it was loaded; --weights bfloat16, or a smaller model") from None
    if missing := [key for key in info["missing_keys"] if "pooler" not in key]:  # a pooler that nothing here reads may be missing
        raise UserError(f"model {source.name}: {len(missing)} weights are not in its files (the first: {min(missing)}); it is no {kind} checkpoint")
    model.config.use_cache = False  # keys and values of a decoder that generates nothing
    return model.eval().requires_grad_(False)


def load_processor(source):
    """The image processor on Pillow: the same pixels whether or not torchvision is installed."""
    if source.kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(f"model {source.name}: NaFlex models, with patches instead of pictures, are not known here; take a fixed-size SigLIP 2")
    return load(source, "AutoImageProcessor", backend="pil")


def load_tokenizer(source, padding_side=None):
    tokenizer = load(source, "AutoTokenizer")
    tokenizer.padding_side = padding_side or tokenizer.padding_side
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------- texts

def max_tokens(source, tokenizer, wanted):
    """The largest number of tokens that the command line, the tokenizer and the position table all allow."""
    table = getattr(getattr(source.config, "text_config", source.config), "max_position_embeddings", None)
    return min(wanted, tokenizer.model_max_length, table or wanted)


def text_pooling(source, asked):
    """How texts are pooled: CLIP and SigLIP have a projection of their own, BLIP-2's T5 encoder is averaged, --text-pool decides for the others."""
    return "projection" if source.kind in ("clip", "siglip", "siglip2") else "mean" if source.kind == "blip-2" else asked


class Tokens(list):
    """Token ids of a text, and whether it was cut."""
    is_cut = False


def start_token(tokenizer):
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)


def tokenize(source, tokenizer, texts, args, how):
    """[N] Tokens, cut to what the model takes. how="last": the last id is EOS, whatever this tokenizer's version appends by itself."""
    limit, eos = max_tokens(source, tokenizer, args.max_length), tokenizer.eos_token_id
    ids = [Tokens(item or [start_token(tokenizer) or 0]) for item in tokenizer(texts, truncation=True, max_length=limit)["input_ids"]]
    if how == "last" and eos is None:
        raise UserError(f"model {source.name}: its tokenizer has no EOS token to pool at; use --text-pool mean")
    full = [i for i, item in enumerate(ids) if len(item) >= limit]  # the others are whole
    for i, whole in zip(full, tokenizer([texts[i] for i in full])["input_ids"] if full else [], strict=True):
        ids[i].is_cut = len(whole) + (how == "last" and whole[-1:] != [eos]) > limit
    if how == "last":
        for item in ids:
            if item[-1] != eos:
                item[limit - 1:] = [eos]
        assert all(item[-1] == eos for item in ids), "a text does not end with EOS"
    return ids


def is_decoder(source):
    """Whether a text model is causal: such a model stands either padding, the others (RoBERTa and its like) count positions from the first token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    return source.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and source.kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def pad(items, tokenizer, side, device="cpu", length=None):
    """Lists of token ids -> (ids [B, T], mask [B, T] of 0/1), int64, padded on that side to the longest, or to `length`."""
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    length = length or max(map(len, items))
    ids, mask = torch.full((len(items), length), pad_id), torch.zeros(len(items), length, dtype=torch.int64)
    for row, item in enumerate(items):
        place = slice(length - len(item), None) if side == "left" else slice(len(item))
        ids[row, place], mask[row, place] = torch.tensor(item), 1
    return ids.to(device), mask.to(device)


def positions(model, side, mask):
    """What left padding needs where positions are absolute (GPT-2): position 0 at the first token. With right padding they are so anyway."""
    takes = side == "left" and "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes else {}


def pool_tokens(hidden, mask, how):
    """hidden [B, T, D], mask [B, T] of 0/1 -> [B, D] float32: the last token that is no padding, the first, or their mean; either padding side."""
    if how == "mean":
        return hidden.float().masked_fill(mask[..., None] == 0, 0).sum(1) / mask.sum(1, keepdim=True)
    index = mask.argmax(1) if how == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index].float()


def text_forward(source, tokenizer, args, how):
    """forward(lists of token ids) -> ([B, D],)."""
    model, length, side = load_model(source, args), None, tokenizer.padding_side if is_decoder(source) else "right"
    if source.kind.startswith("siglip"):  # trained on captions padded to the full length, without a mask
        length = source.config.text_config.max_position_embeddings
    elif source.kind == "blip-2" and not source.config.text_config.is_encoder_decoder:
        raise UserError(f"model {source.name}: its language model has no encoder; take a BLIP-2 with T5, such as Salesforce/blip2-flan-t5-xl")
    elif source.kind == "blip-2":
        model = model.language_model.get_encoder()
    elif source.config.is_encoder_decoder:
        model = model.get_encoder()

    @torch.inference_mode()
    def forward(items):
        if how == "projection":
            ids, mask = pad(items, tokenizer, side, args.device, length)
            return (model.get_text_features(input_ids=ids, **({} if length else {"attention_mask": mask})).pooler_output,)
        ids, mask = pad(items, tokenizer, side, args.device)
        return (pool_tokens(model(input_ids=ids, attention_mask=mask, **positions(model, side, mask)).last_hidden_state, mask, how),)
    return forward


def language_tokens(tokenizer, texts, rows):
    """Lists of the token ids of these texts, not cut: `language_forward` cuts, and knows then which texts were."""
    return [ids or [start_token(tokenizer) or 0] for ids in tokenizer([texts[i] for i in rows])["input_ids"]]


def language_forward(source, tokenizer, args):
    """forward(lists of token ids) -> (features [B, L, D], nats [B]) of a causal language model.

    Features: mean over the tokens, of the embeddings and of every block's output (the last one normalised), L = blocks + 1. Nats: negative log
    likelihood of all tokens of the text, the first one given a start token (BOS, else EOS), so that tokenizers with and without one compare; nan for
    a text longer than the model takes.
    """
    model, limit = load_model(source, args, "AutoModelForCausalLM"), max_tokens(source, tokenizer, args.max_length)
    if (start := start_token(tokenizer)) is None:
        raise UserError(f"model {source.name}: its tokenizer has neither BOS nor EOS to start a text with")

    def run(network, items, hidden):
        ids, mask = pad([item[:limit] for item in items], tokenizer, tokenizer.padding_side, args.device)
        out = network(input_ids=ids, attention_mask=mask, output_hidden_states=hidden, **positions(network, tokenizer.padding_side, mask))
        return ids, mask, out

    @torch.inference_mode()
    def forward(items):
        twice = any(item[0] != start for item in items)  # once for the features, which leave out a start token that the tokenizer did not put
        ids, mask, out = run(model.base_model if twice else model, items, True)
        features = torch.stack([pool_tokens(hidden, mask, "mean") for hidden in out.hidden_states], dim=1)
        if twice:
            del out  # gigabytes
            items = [item if item[0] == start else [start, *item] for item in items]
            ids, mask, out = run(model, items, False)
        scored = (mask[:, 1:] * mask[:, :-1]).bool()
        nats = [float(F.cross_entropy(logits[:-1][keep].float(), row[1:][keep], reduction="sum")) if len(item) <= limit else math.nan
                for logits, row, keep, item in zip(out.logits, ids, scored, items, strict=True)]
        return features, torch.tensor(nats)
    return forward


# --------------------------------------------------------------------------------------------------------------- pictures

def read_image(path):
    """An RGB picture, turned upright, transparency on white; if it cannot be read the reason, a str."""
    try:
        image = Image.fromarray(common.decode_image(Path(path).read_bytes(), max_pixels=2**40))
    except (OSError, ValueError) as error:
        return first_line(error)
    return f"{image.width} x {image.height} pixels, too narrow" if max(image.size) > 1000 * min(image.size) else image


def pixels_of(image, processor):
    """[3, H, W] float32 of a picture, or the reason why there are none, a str."""
    if isinstance(image, str):
        return image
    try:
        return processor(images=image, return_tensors="np")["pixel_values"][0].astype(np.float32)
    except Exception as error:  # a size that this processor cannot handle
        return first_line(error)


def image_preparer(files, processor, readers):
    """prepare(rows) -> pixels, or the reason why there are none."""
    return lambda rows: list(readers.map(lambda i: pixels_of(read_image(files[i]), processor), rows))


def has_cls(hidden, pixels, config):
    """Whether hidden [B, T, D] has more tokens than pixels [B, 3, H, W] have patches."""
    patch = getattr(config, "patch_size", None) or 1
    height, width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return hidden.ndim == 3 and hidden.shape[1] > pixels.shape[2] * pixels.shape[3] // (height * width)


def image_forward(source, args):
    """forward([3, H, W] arrays) -> ([B, D],): CLIP's projection, SigLIP's pooled output, the mean of the outputs of BLIP-2's Q-Former, the CLS token
    of a plain vision transformer. Raises: UserError if that has none."""
    model = load_model(source, args)

    @torch.inference_mode()
    def forward(items):
        pixels = torch.from_numpy(np.stack(items)).to(args.device, DTYPES[args.weights])
        if source.kind == "blip-2":
            out = model.get_qformer_features(pixel_values=pixels)
            return (getattr(out, "last_hidden_state", out).float().mean(1),)
        if hasattr(model, "get_image_features"):
            return (model.get_image_features(pixel_values=pixels).pooler_output,)
        out = model(pixel_values=pixels)
        if source.kind in ("siglip_vision_model", "clip_vision_model"):
            return (out.pooler_output,)
        if not has_cls(out.last_hidden_state, pixels, source.config):
            if getattr(out, "pooler_output", None) is not None and out.last_hidden_state.ndim == 4:  # a convolutional network's mean over places
                return (out.pooler_output.flatten(1).float(),)
            raise UserError(f"model {source.name}: a {source.kind} gives no CLS token after all patches; use SigLIP, CLIP, BLIP-2 or a vision "
                            "transformer such as facebook/dinov2-base")
        return (out.last_hidden_state[:, 0],)
    return forward


def vision_forward(source, args):
    """forward([3, H, W] arrays) -> ([B, L, D],): the CLS token (or the mean over tokens) after each block, before any final norm."""
    model = load_model(source, args)
    tower, config = getattr(model, "vision_model", model), getattr(source.config, "vision_config", source.config)
    blocks = next((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == getattr(config, "num_hidden_layers", None)), None)
    if blocks is None:
        raise UserError(f"model {source.name}: a {source.kind} has no list of transformer blocks; use a vision transformer")
    seen, extra = [], {}
    for block in blocks:  # hooks, as the last of `hidden_states` is normalised in some models
        block.register_forward_hook(lambda module, inputs, output: seen.append(output if isinstance(output, torch.Tensor) else output[0]))
    if source.kind == "vit_mae":  # all patches, in order
        model.config.mask_ratio = 0.0
        extra["noise"] = torch.arange((config.image_size // config.patch_size) ** 2, device=args.device).float()

    @torch.inference_mode()
    def forward(items):
        seen.clear()
        pixels = torch.from_numpy(np.stack(items)).to(args.device, DTYPES[args.weights])
        tower(pixel_values=pixels, **{key: value.expand(len(items), -1) for key, value in extra.items()})
        if args.vision_pool == "cls" and not has_cls(seen[0], pixels, config):
            raise UserError(f"model {source.name}: a {source.kind} has no CLS token; use --vision-pool avg")
        return (torch.stack([x[:, 0].float() if args.vision_pool == "cls" else x.float().mean(1) for x in seen], dim=1),)
    return forward


# ----------------------------------------------------------------------------------------------------------- augmentation

def view_draws(item, view, modality):
    """The random numbers of one view: a function of id, view and modality alone, so that any row can be made again."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{item}:{view}:{modality}".encode()).digest(), "big"))


def augment_image(image, size, draws):
    """A SimCLR view (Chen et al. 2020, appendix A): a crop of .08 to 1 of the area to size = (width, height), flip, colour jitter, grey, blur."""
    width, height = image.size
    for _ in range(10):
        area, ratio = draws.uniform(0.08, 1) * width * height, math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = draws.randint(0, width - w), draws.randint(0, height - h)
    image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    if draws.random() < 0.5:
        image = ImageOps.mirror(image)
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
    return " ".join(mask_token if i in places else word for i, word in enumerate(words) if i not in places or mask_token)


def rewrite_captions(captions, seed=0):
    """Items as exp_alignment_corr.py reads them: each caption with u% of its words replaced, u = 10..100, by words drawn from all captions (as often
    as they occur there). What is replaced at one level stays replaced at the next."""
    vocabulary = [word for caption in captions for word in caption.split()]
    if len(set(vocabulary)) < 2:
        raise UserError("captions of one and the same word cannot be rewritten")
    items = []
    for i, caption in enumerate(captions):
        draws, words, sentences = view_draws(i, seed, "rewrite"), caption.split(), {}
        order, new = draws.sample(range(len(words)), len(words)), []
        for word in words:
            new.append(draws.choice(vocabulary))
            while new[-1] == word:
                new[-1] = draws.choice(vocabulary)
        for level, u in enumerate(range(10, 101, 10), 1):
            replaced = set(order[:round(len(words) * u / 100)])
            sentences[f"Caption {level} - {u}%"] = " ".join(new[j] if j in replaced else word for j, word in enumerate(words))
        items.append({f"Index - {i}": {"original": caption, "sentences": sentences}})
    return items


# --------------------------------------------------------------------------------------------------------- rows in shards

def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_sizes(files):
    """What tells one set of pictures from another without reading them."""
    return [[Path(f).name, os.path.getsize(f) if os.path.exists(f) else None] for f in files]


def model_job(source, processor=None, **facts):
    """The part of a job that says which model, and on what pixels."""
    transform = {"transform": {k: v for k, v in processor.to_dict().items() if not k.startswith("_")}} if processor else {}
    return {"model": source.name, "revision": source.commit, **transform, **facts}


def check_same_job(found, job, where):
    """Raises UserError, naming what differs, if `where` was made by another job."""
    changed = [f"{key}={json.dumps(found.get(key))} (now {json.dumps(job.get(key))})" for key in {**found, **job} if found.get(key) != job.get(key)]
    if changed:
        mended = ", where data are the texts or pictures, of which some were changed or mended" if found.get("data") != job.get("data") else ""
        raise UserError(f"{where} was made otherwise: {', '.join(c if len(c) < 150 else c.split('=')[0] for c in changed)}{mended}; "
                        "move it away, or choose another --out")


def write_block(path, start, n, block):
    """Write rows [start, start + B) of an .npy of n rows. Not through a mapping, which kills the process when the disk is full."""
    block = (block.view(torch.int16) if block.dtype == torch.bfloat16 else block).contiguous().numpy()
    with open(path, "r+b" if start else "w+b") as file:
        if start:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        else:
            header = {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False, "shape": (n, *block.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.seek(file.tell() + start * block[0].nbytes)
        file.write(block.tobytes())
        file.flush()
        os.fsync(file.fileno())


def run_batches(forward, items, batch_size):
    """(outputs of forward for the items that are no str, which items these are, the batch size that fitted). The longest come first, like lengths
    together; out of memory starts the shard again with half the batch."""
    good = sorted((i for i, item in enumerate(items) if not isinstance(item, str)), key=lambda i: -len(items[i]))  # pictures stay in order
    while True:
        try:
            parts = [[x.cpu() for x in forward([items[i] for i in good[j:j + batch_size]])] for j in range(0, len(good), batch_size)]
            return [torch.cat(column) for column in zip(*parts, strict=True)], good, batch_size
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if batch_size == 1:
            raise UserError("out of memory with one row: shorter --max-length, --weights bfloat16, or a smaller model")
        batch_size //= 2
        print(f"out of memory: going on with batches of {batch_size}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def encode_rows(path, job, names, shard, prepare, load_forward, finish, args):
    """Encode len(names) rows in shards into `path`, or go on where an earlier run of the same job stopped. Returns the manifest.

    job: dict of all that decides the content. names: of the rows, for messages and the list of bad images. prepare(rows) -> items for the model, or a
    str where a row has none; it runs one shard ahead in a thread. load_forward() -> forward(items) -> tuple of [B, ...] tensors: features, stored as
    args.dtype, and perhaps a column of numbers. finish(outputs, good rows) -> (facts for the manifest, write()), where write() puts `path` in place.
    Finished shards are in `.{name}.work/`, which is removed at the end; its state.json says how many there are.
    """
    path, n, dtype = Path(path), len(names), DTYPES[args.dtype]
    work, manifest_file = path.with_name(f".{path.name}.work"), path.with_name(f"{path.stem}_manifest.json")
    state_file = work / "state.json"
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
    empty = {"job": job, "done": 0, "batch_size": args.batch_size, "bad": {}, "shapes": [], "n_cut": 0}
    state = common.read_json(state_file) if state_file.exists() else empty
    check_same_job(state["job"], job, f"the unfinished {work}")
    shards = [range(i, min(i + shard, n)) for i in range(state["done"], n, shard)]
    batch_size, told = min(state["batch_size"], args.batch_size), 0
    if state["done"]:
        differ = "" if batch_size == state["batch_size"] else f", not {state['batch_size']} as before: the bits may differ from those of one run"
        print(f"{path.name}: going on at {state['done']} of {n} rows, in batches of {batch_size}{differ}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        forward = load_forward() if shards else None
        future, began = ahead.submit(prepare, shards[0]) if shards else None, time.time()
        for number, rows in enumerate(shards):
            items = future.result()
            if number + 1 < len(shards):
                future = ahead.submit(prepare, shards[number + 1])
            outputs, good, batch_size = run_batches(forward, items, batch_size)
            bad = {str(names[rows[i]]): item for i, item in enumerate(items) if isinstance(item, str)}
            start, new = rows[0], bad
            if outputs and not state["shapes"]:  # the widths are known now: any rows before these are bad, and nothing is in the file yet
                start, new, state["shapes"] = 0, {**state["bad"], **bad}, [list(x.shape[1:]) for x in outputs]
            for k, shape in enumerate(state["shapes"]):
                block = torch.full((rows[-1] + 1 - start, *shape), math.nan, dtype=torch.float32 if k else dtype)
                here = block[rows[0] - start:]
                if outputs:
                    here[good] = outputs[k].to(block.dtype)
                if k == 0 and len(wrong := (~torch.isfinite(here[good]).flatten(1).all(1)).nonzero()):
                    what = f"model {job['model']}: features of {names[rows[good[int(wrong[0])]]]} are not finite"
                    if torch.isfinite(outputs[0]).all():
                        raise UserError(f"{what} in {args.dtype} (largest value {outputs[0].abs().max():.3g}); use --dtype "
                                        f"{'float32' if path.suffix == '.npy' else 'bfloat16'}")
                    raise UserError(f"{what} in any --dtype; {'its weights may be broken' if args.weights == 'float32' else 'try --weights float32'}")
                try:
                    write_block(work / f"{k}.npy", start, n, block)
                except OSError as error:
                    raise OSError(f"{work / f'{k}.npy'} could not be written ({error}); finished shards are kept, and the same command goes on from "
                                  "them once this is mended") from None
            for name, reason in new.items() if state["shapes"] else ():  # not all of a folder that is not there
                print(f"cannot be read: {name} ({reason})", flush=True)
            state |= {"done": rows[-1] + 1, "batch_size": batch_size, "bad": {**state["bad"], **bad},
                      "n_cut": state["n_cut"] + sum(item.is_cut for item in items if isinstance(item, Tokens))}
            common.write_json(state_file, state)
            left = (n - state["done"]) * (time.time() - began) / (state["done"] - shards[0][0])
            if left and (sys.stderr.isatty() or time.time() - told > 30):
                told = time.time()
                print(f"{path.name}: {state['done']} of {n} rows, {(n - state['done']) / left:.3g}/s, {left / 60:.1f} min left", flush=True)
    if not state["shapes"]:
        shutil.rmtree(work)
        raise UserError(f"{path.name}: none of the {len(state['bad'])} images can be read, the first: {next(iter(state['bad'].items()))}")
    outputs = [torch.from_numpy(np.load(work / f"{k}.npy", mmap_mode="c")) for k in range(len(state["shapes"]))]  # mapped, not read
    outputs[0] = outputs[0].view(dtype)
    kept = torch.tensor([i for i, name in enumerate(names) if str(name) not in state["bad"]])
    facts, write = finish(outputs, kept)
    if state["n_cut"]:
        print(f"{path}: {state['n_cut']} of {n} texts are longer than the model (or --max-length) takes: cut")
    manifest = {**({"n_cut": state["n_cut"]} if "max_length" in job else {}), **facts, "n_bad_images": len(state["bad"]),
                "bad_images": state["bad"], "batch_size": state["batch_size"],
                "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "pillow")},
                "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type, "job": job}
    common.write_json(manifest_file, manifest)
    write()
    shutil.rmtree(work)
    unread = f"; images that cannot be read: {len(state['bad'])}" if state["bad"] else ""
    print(f"{path}: {len(kept)} rows {state['shapes'][0]} {args.dtype}{unread}")
    return manifest


def saver(path, value):
    """write() for encode_rows: torch.save, atomically."""
    return lambda: common.atomic_write(path, lambda file: torch.save(value, file))


def chosen(x, rows):
    """x[rows]; x itself, mapped, if that is all of it."""
    return x if len(rows) == len(x) else x[rows]


# -------------------------------------------------------------------------------------------------------------- commands

def folder_of(path, what):
    """The Path of an existing folder. Raises: UserError saying what it should hold."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; it should hold {what}")
    return Path(path)


def read_list(path):
    """[N] strings of a text file, a line each, or of a JSON list of strings or of {"image": name}. Raises: UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        items = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        items = [" ".join((item["image"] if isinstance(item, dict) else item).split()) for item in items]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: expected a text file with a line each, or a JSON list of strings ({first_line(error)})") from None
    if not items or not all(items):
        raise UserError(f"{path}: " + (f"line {items.index('') + 1} is empty" if items else "nothing in it"))
    return items


def read_coco(path, limit):
    """(images, dicts with id and file_name; captions, (row of the image, caption id, text) by image) of a COCO captions file. Raises: UserError."""
    content, by_image = common.read_json(path), {}
    try:
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append((annotation["id"], " ".join(annotation["caption"].split())))
        images = [image for image in content["images"] if image["id"] in by_image and image["file_name"]][:limit]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected COCO captions: images with id and file_name, annotations with id, image_id and caption "
                        f"({first_line(error)})") from None
    if not images:
        raise UserError(f"{path}: no image has a caption")
    print(f"{path}: {len(images)} of {len(content['images'])} images (with captions, within --limit)")
    return images, [(row, *caption) for row, image in enumerate(images) for caption in by_image[image["id"]]]


def coco(args):
    """{split}_image_embeddings.pt [images, D], {split}_text_embeddings.pt [captions, D], {split}_metadata.json for exp_coco_heads.py."""
    folder, out = folder_of(args.images, "the images of --captions (for COCO the unpacked train2017.zip or val2017.zip)"), Path(args.out)
    images, captions = read_coco(args.captions, args.limit)
    names, n_captions = [image["file_name"] for image in images], torch.from_numpy(np.bincount([row for row, *_ in captions]))
    files, (image_file, text_file) = [folder / name for name in names], [out / f"{args.split}_{part}_embeddings.pt" for part in ("image", "text")]
    vision, text = find_model(args.image_model), find_model(args.text_model)
    processor, tokenizer = load_processor(vision), load_tokenizer(text, args.padding_side)

    def finish_images(outputs, kept):
        x = chosen(outputs[0], kept)
        return {}, saver(image_file, x.repeat_interleave(n_captions[kept], dim=0) if args.repeat_images else x)

    job = model_job(vision, processor, data=digest([file_sizes(files), captions]), repeat_images=args.repeat_images)
    manifest = encode_rows(image_file, job, names, SHARD, image_preparer(files, processor, args.readers), lambda: image_forward(vision, args),
                           finish_images, args)
    new_row = {row: new for new, row in enumerate(row for row, name in enumerate(names) if name not in manifest["bad_images"])}
    captions, how = [caption for caption in captions if caption[0] in new_row], text_pooling(text, args.text_pool)
    texts = [f"Instruct: {args.instruction}\nQuery: {caption}" if args.instruction else caption for *_, caption in captions]
    job = model_job(text, pool=how, padding_side=tokenizer.padding_side, max_length=args.max_length, instruction=args.instruction, data=digest(texts))
    encode_rows(text_file, job, range(len(texts)), TEXT_SHARD, lambda rows: tokenize(text, tokenizer, [texts[i] for i in rows], args, how),
                lambda: text_forward(text, tokenizer, args, how), lambda outputs, rows: ({}, saver(text_file, outputs[0])), args)
    index = {} if args.repeat_images else {"image_index": [new_row[row] for row, *_ in captions]}
    common.atomic_write(out / f"{args.split}_metadata.json", lambda file: file.write(json.dumps({
        "dataset_name": args.split, "image_model": args.image_model, "text_model": args.text_model, "total_pairs": len(captions),
        "unique_images": len(new_row), "total_captions": len(captions), "bad_images": manifest["n_bad_images"], **index,
        "image_ids": [images[row]["id"] for row, *_ in captions], "caption_ids": [caption_id for _, caption_id, _ in captions],
        "captions": [caption for *_, caption in captions], "image_files": [names[row] for row in new_row]}).encode()))
    print(f"{out / f'{args.split}_metadata.json'}: {len(captions)} captions of {len(new_row)} images")


def film_ids(root, limit):
    """Film ids in the order of ids_all.txt, in the folder of labels that exp_gw_mmimdb.py reads; without it all with plot and poster, sorted (as its
    --stage labels writes them)."""
    dataset = folder_of(root / "dataset", "MM-IMDb's plots and posters (the unpacked mmimdb.tar.gz)")
    listed = Path(os.environ.get("IMDB1_LABELS_DIR_23") or root / "labels") / "ids_all.txt"
    ids = listed.read_text().split() if listed.is_file() else sorted(p.stem for p in dataset.glob("*.json") if p.with_suffix(".jpeg").exists())
    if not ids:
        raise UserError(f"{dataset}: no films (an {{id}}.json with its {{id}}.jpeg)")
    return ids[:limit]


def mmimdb(args):
    """latents/mm_imdb1_globals_aug{views}_{backbone}_{image,text}.npy, row = views * film + view, view 0 clean, for exp_gw_mmimdb.py."""
    from exp_alignment_corr import film_texts
    defaults = {"clip": "openai/clip-vit-base-patch16", "blip2": "Salesforce/blip2-flan-t5-xl"}
    root, views = Path(args.data), args.views
    ids, out = film_ids(root, args.limit), Path(args.out or root / "latents")
    source = find_model(args.model or defaults.get(args.backbone, args.backbone))
    if source.kind not in ("clip", "siglip", "siglip2", "blip-2"):
        raise UserError(f"model {source.name}: a {source.kind} does not encode both posters and plots; use CLIP, SigLIP or BLIP-2")
    plots, posters = film_texts(root, ids), [root / "dataset" / f"{film}.jpeg" for film in ids]
    processor, tokenizer, how = load_processor(source), load_tokenizer(source), text_pooling(source, None)

    def read_poster(film):
        poster = read_image(posters[film])
        return poster, pixels_of(poster, processor)

    def prepare_images(rows):  # a shard holds whole films, few if there are many views: each poster is read once, then each view is a task
        films = range(rows[0] // views, rows[-1] // views + 1)
        read = dict(zip(films, args.readers.map(read_poster, films), strict=True))

        def view_pixels(row):
            (film, view), (poster, clean) = divmod(row, views), read[row // views]
            if view == 0 or isinstance(clean, str):
                return clean
            size = clean.shape[:0:-1]  # (width, height) that the model sees
            return pixels_of(augment_image(poster, size, view_draws(ids[film], view, "image")), processor)
        return list(args.readers.map(view_pixels, rows))

    def prepare_texts(rows):
        return tokenize(source, tokenizer, [plots[row // views] if row % views == 0 else mask_words(
            plots[row // views], tokenizer.mask_token, view_draws(ids[row // views], row % views, "text")) for row in rows], args, how)

    def finish(path, outputs, kept):
        total = squares = 0
        for rows in kept.split(65536):
            block = outputs[0][rows].double()
            total, squares = total + block.sum(0), squares + block.square().sum(0)
        mean = total / len(kept)
        sigma = (squares / len(kept) - mean.square()).clamp(min=0).sqrt()
        statistics = {"mu": mean.float().numpy(), "sigma": torch.where(sigma > 0, sigma, 1).float().numpy()}  # a constant feature has deviation 1
        common.atomic_write(path.with_name(f"{path.stem}.stats.npz"), lambda file: np.savez(file, **statistics))
        facts = {"total_rows": len(outputs[0]), "original_rows": len(ids), "views_per_sample": views, "dims": outputs[0].shape[1],
                 "dtype": args.dtype, "row": "views_per_sample * film + view, view 0 clean", "ids": ids}
        return facts, lambda: os.replace(path.with_name(f".{path.name}.work") / "0.npy", path)

    parts = {"image": (prepare_images, lambda: image_forward(source, args), SHARD, model_job(source, processor, data=digest(file_sizes(posters)))),
             "text": (prepare_texts, lambda: text_forward(source, tokenizer, args, how), TEXT_SHARD,
                      model_job(source, pool=how, max_length=args.max_length, data=digest(plots)))}
    for modality, (prepare, load_forward, shard, job) in parts.items():
        path = out / f"mm_imdb1_globals_aug{views}_{args.backbone}_{modality}.npy"
        manifest = encode_rows(path, {**job, "views": views, "films": digest(ids)}, [film for film in ids for _ in range(views)],
                               views * max(1, shard // views), prepare, load_forward, functools.partial(finish, path), args)
        if manifest["bad_images"]:
            print(f"the rows of these {manifest['n_bad_images']} films are nan: mend their posters, move {path} away and encode again, or take the "
                  f"films out of {root / 'split.json'}")


def read_items(args):
    """(ids [N], {folder of language features: texts [N]}, pictures [N] or None) of the alignment command."""
    from exp_alignment_corr import film_texts, read_captions
    if args.mmimdb:
        ids = film_ids(Path(args.mmimdb), args.limit)
        return ids, {"language": film_texts(args.mmimdb, ids)}, [Path(args.mmimdb, "dataset", f"{film}.jpeg") for film in ids]
    if not args.captions:
        raise UserError("alignment needs --captions (or --rewrite-captions) for photos and captions, or --mmimdb for films")
    levels = {f"gpt_u={u}_features": texts[:args.limit] for u, texts in read_captions(args.captions).items()}
    ids, files = [next(iter(item)) for item in json.loads(Path(args.captions).read_text(encoding="utf-8"))], None
    if len(set(ids)) < len(ids):
        raise UserError(f"{args.captions}: an item is named twice; features are matched by name")
    if args.images:
        folder = folder_of(args.images, "the photos of the captions")
        names = read_list(args.image_names) if args.image_names else sorted(
            p.name for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        if len(names) != len(ids):
            raise UserError(f"{args.images}: {len(names)} photos for the {len(ids)} captions of {args.captions}; name theirs, in order, with "
                            "--image-names")
        files = [folder / name for name in names[:args.limit]]
    elif args.vision:
        raise UserError("--vision needs --images, the photos of the captions")
    return ids[:args.limit], levels, files


def alignment(args):
    """Layer-wise {feats [N, L, D], ids, model, pool[, bpb]} for exp_alignment_corr.py: gpt_u={u}_features/ (language/ with --mmimdb) and vision/."""
    out = Path(args.out)
    if args.rewrite_captions:
        args.captions, items = out / "captions.json", rewrite_captions(read_list(args.rewrite_captions), args.seed)
        content = (json.dumps(items, indent=1, ensure_ascii=False) + "\n").encode()
        if args.captions.exists() and args.captions.read_bytes() != content:
            raise UserError(f"{args.captions} exists and holds other captions; move it away, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        common.atomic_write(args.captions, lambda file: file.write(content))
        print(f"{args.captions}: {len(items)} captions at u = 0, 10 .. 100")
        if not args.language and not args.vision:
            return
    ids, levels, files = read_items(args)
    language, vision = [find_model(name) for name in args.language], [find_model(name) for name in args.vision]
    for stems in ([source.stem for source in language], [source.stem for source in vision]):
        if len(set(stems)) < len(stems):
            raise UserError(f"two models would both write {max(stems, key=stems.count)}.pt; encode them into different --out folders")
    reasons = list(args.readers.map(lambda f: r if isinstance(r := read_image(f), str) else "", files)) if files else [""] * len(ids)
    for i, reason in enumerate(reasons):  # an item without a picture is left out on both sides
        if reason:
            print(f"cannot be read: {files[i]} ({reason}); {ids[i]} is left out", flush=True)
    good = [i for i, reason in enumerate(reasons) if not reason]
    if not good:
        raise UserError(f"none of the {len(ids)} pictures can be read, the first: {files[0]} ({reasons[0]})")
    ids, facts = [ids[i] for i in good], {"n_left_out": len(reasons) - len(good)}
    levels, files = {folder: [texts[i] for i in good] for folder, texts in levels.items()}, [files[i] for i in good] if files else None
    for source in language:
        tokenizer = load_tokenizer(source, args.padding_side)
        load_forward = functools.cache(functools.partial(language_forward, source, tokenizer, args))  # loaded once for all levels
        for folder, texts in levels.items():
            path = out / folder / f"{source.stem}.pt"

            def finish(outputs, rows, path=path, texts=texts, model=source.stem):
                whole = ~outputs[1].isnan()
                n_bytes = sum(len(text.encode()) for text, is_whole in zip(texts, whole.tolist(), strict=True) if is_whole)
                bpb = float(outputs[1][whole].double().sum()) / math.log(2) / n_bytes if n_bytes else None
                if n_cut := int((~whole).sum()):
                    print(f"{path}: {n_cut} texts are longer than the model (or --max-length) takes: cut, and not counted in the bits per byte")
                content = {"feats": outputs[0], "ids": ids, "model": model, "pool": "avg", "bpb": bpb}
                return {**facts, "bpb": bpb, "n_bytes": n_bytes, "n_cut": n_cut}, saver(path, content)

            job = model_job(source, pool="avg", padding_side=tokenizer.padding_side, max_length=args.max_length, data=digest([ids, texts]))
            encode_rows(path, job, ids, SHARD, functools.partial(language_tokens, tokenizer, texts), load_forward, finish, args)
        load_forward.cache_clear()  # frees the model
    for source in vision:
        processor, path = load_processor(source), out / "vision" / f"{source.stem}.pt"
        content = {"ids": ids, "model": source.stem, "pool": args.vision_pool, "files": [file.name for file in files]}
        encode_rows(path, model_job(source, processor, pool=args.vision_pool, data=digest([ids, file_sizes(files)])), ids, SHARD,
                    image_preparer(files, processor, args.readers), functools.partial(vision_forward, source, args),
                    lambda outputs, rows, path=path, content=content: (facts, saver(path, {"feats": outputs[0], **content})), args)


def speech_forward(source, args):
    """forward(waves [n] float32 at 16 kHz) -> ([B, L, D],): mean over the recording's own frames of the input of the first block of the encoder and of
    every block's output. Models of 30 s spectrograms (Whisper) pad the rest with silence; others (wav2vec 2.0, HuBERT, WavLM) take one at a time."""
    model, extractor = load_model(source, args), load(source, "AutoFeatureExtractor")
    model = model.get_encoder() if source.config.is_encoder_decoder else model
    takes = extractor.model_input_names[0]
    if takes not in ("input_features", "input_values"):
        raise UserError(f"model {source.name}: a {source.kind} takes no speech; use Whisper, wav2vec 2.0, HuBERT or WavLM")

    @torch.inference_mode()
    def forward(items):
        groups, features = [items] if takes == "input_features" else [[item] for item in items], []
        for waves in groups:
            inputs = extractor(waves, sampling_rate=16000, return_tensors="pt")[takes].to(args.device, DTYPES[args.weights])
            hidden = torch.stack(model(inputs, output_hidden_states=True).hidden_states, dim=1)  # [B, L, T, D]
            for x, wave in zip(hidden, waves, strict=True):
                own = x if takes == "input_values" else x[:, :max(1, round(x.shape[1] * len(wave) / extractor.n_samples))]
                features.append(own.float().mean(1))
        return (torch.stack(features),)
    return forward


def flickr8k(args):
    """{image,text,audio}_features.pt {feats [N, D] (audio: [N, L, D]), ids [N], unreadable, model} for exp_flickr_ttt.py's cached encoders: photos, and
    captions and speech if their models are named. --corruptions: its corrupted queries too, as {modality}_features,{kind}={amount}.pt."""
    import exp_flickr_ttt as flickr
    root = folder_of(args.data, "Flickr8k_Dataset (the unpacked Flickr8k_Dataset.zip)")
    photos = next((root / name for name in ("Flickr8k_Dataset", "Flicker8k_Dataset", "Images") if (root / name).is_dir()), root / "Flickr8k_Dataset")
    photo_names = sorted(path.name for path in photos.glob("*.jpg"))[:args.limit]
    if not photo_names:
        raise UserError(f"{photos}: no photos (*.jpg) in it; unpack Flickr8k_Dataset.zip")
    captions = flickr.read_captions(root)[0] if args.text_model else {}
    texts = {f"{photo}#{k}": caption for photo in photo_names for k, caption in sorted(captions.get(photo, {}).items())}
    speech = flickr.read_speech_list(root)[0] if args.speech_model else {}
    wavs = {path.name: (path, photo) for (photo, _), path in speech.items() if photo in set(photo_names)}
    if args.speech_model and not wavs:
        raise UserError(f"{root}: no recordings of these photos (flickr_audio/wav2capt.txt); leave --speech-model out")
    splits = flickr.read_splits(root)[0] if args.corruptions else {"test": [], "dev": []}
    vision = find_model(args.model)
    processor = load_processor(vision)
    sides = [side for size in (getattr(processor, "size", None), getattr(processor, "crop_size", None)) for side in dict(size or {}).values()]
    tokenizer = pooling = None
    if args.text_model:
        text = find_model(args.text_model)
        tokenizer, pooling = load_tokenizer(text), text_pooling(text, args.text_pool)
        if pooling == "last" and tokenizer.eos_token_id is None:
            raise UserError(f"model {text.name}: its tokenizer has no EOS token to pool at; use --text-pool mean")

    def pixels(name, kind, amount):
        image = read_image(photos / name)
        if kind and not isinstance(image, str):
            scale = max(sides) / min(image.size)
            image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
            photo = flickr.corrupt_photo(torch.from_numpy(np.array(image)).permute(2, 0, 1), kind, amount, flickr.item_draws(name))
            image = Image.fromarray(photo.permute(1, 2, 0).numpy())
        return pixels_of(image, processor)

    def wave(name, kind, amount):
        try:
            samples = flickr.read_wav(wavs[name][0].read_bytes())
        except Exception as error:  # soundfile raises kinds of its own
            return first_line(error)
        return (flickr.corrupt_speech(samples, kind, amount, flickr.item_draws(name)) if kind else samples).numpy()

    def tokens(names, kind, amount):
        given = [flickr.corrupt_text(texts[n], kind, amount, flickr.item_draws(n)) if kind else texts[n] for n in names]
        return tokenize(text, tokenizer, given, args, pooling)

    def each(read):
        return lambda names, kind, amount: list(args.readers.map(lambda name: read(name, kind, amount), names))
    parts = {"image": (vision, photo_names, lambda name: name, each(pixels), lambda: image_forward(vision, args), SHARD, {
        "processor": processor, "data": digest(file_sizes([photos / name for name in photo_names]))})}
    if args.text_model:
        parts["text"] = (text, list(texts), lambda name: name.rpartition("#")[0], tokens, lambda: text_forward(text, tokenizer, args, pooling),
                         TEXT_SHARD, {"pool": pooling, "max_length": args.max_length, "data": digest(texts)})
    if args.speech_model:
        sounds = find_model(args.speech_model)
        parts["audio"] = (sounds, sorted(wavs), lambda name: wavs[name][1], each(wave), lambda: speech_forward(sounds, args), SHARD, {
            "data": digest(file_sizes([path for path, _ in wavs.values()]))})
    for modality, (source, names, photo_of, prepare, load_forward, shard, facts) in parts.items():
        conditions = [("", 0, None), *([(kind, amount, "test") for kind, amounts in flickr.CORRUPTIONS[modality].items() for amount in amounts]
                                       + [(*flickr.HELD_OUT[modality], "dev")] if args.corruptions else [])]
        load_once = functools.cache(load_forward)
        for kind, amount, split in conditions:
            asked = [name for name in names if split is None or photo_of(name) in set(splits[split])]
            path = Path(args.out or root) / f"{modality}_features{flickr.condition_suffix(kind, amount)}.pt"
            if not asked:
                raise UserError(f"{path}: no {modality} of a {split} photo is here (--limit?)")

            def finish(outputs, kept, path=path, asked=asked, model=source.name):
                ids = [asked[i] for i in kept.tolist()]
                unreadable = sorted(set(asked) - set(ids))
                return {}, saver(path, {"feats": chosen(outputs[0], kept), "ids": ids, "unreadable": unreadable, "model": model})
            job = model_job(source, **facts, names=digest(asked), **({"corruption": [kind, amount]} if kind else {}))
            encode_rows(path, job, asked, shard, lambda rows, asked=asked, kind=kind, amount=amount, prepare=prepare: prepare(
                [asked[i] for i in rows], kind, amount), load_once, finish, args)


# ---------------------------------------------------------------------------------------------------------- command line

def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, texts=True):
        """A subcommand with the options that all have; returns its add_argument."""
        sub = commands.add_parser(function.__name__, description=function.__doc__, help=function.__doc__)
        sub.set_defaults(run=function)
        add = sub.add_argument
        add("--limit", type=positive, metavar="N", help="only the first N images, items or films")
        add("--device", default="auto", help="auto | cuda | cuda:1 | mps | cpu")
        add("--batch-size", type=positive, default=64, help="rows a forward pass, halved when memory runs out (default: 64)")
        add("--weights", choices=("auto", *DTYPES), default="auto", help="type of the model's weights (auto: bfloat16 on a GPU, else float32)")
        add("--dtype", choices=tuple(DTYPES), default="float16", help="type of the features written (default: float16)")
        add("--workers", type=positive, default=os.cpu_count() or 1, help="threads that decode images (default: one a core)")
        if texts:
            add("--max-length", type=positive, default=512, help="tokens that a text is cut to, if the model does not cut earlier (default: 512)")
        return add

    add = command(coco)
    add("--images", required=True, help="folder of the images")
    add("--captions", required=True, help="COCO captions JSON")
    add("--split", default="train2017", help="what the files' names begin with: train2017 (default) or val2017")
    add("--out", default="pretrain_encoded", help="folder to write to (default: %(default)s)")
    add("--image-model", default="google/siglip-so400m-patch14-384", help="SigLIP, CLIP, BLIP-2 or a plain vision transformer (default: %(default)s)")
    add("--text-model", default="intfloat/e5-mistral-7b-instruct", help="any text encoder (default: %(default)s)")
    add("--text-pool", choices=("last", "mean", "first"), default="last",
        help="tokens that stand for a text if the model has no pooling of its own: last (EOS is appended; default), mean, first (CLS)")
    add("--padding-side", choices=("left", "right"), help="of a causal model's texts in a batch (default: the tokenizer's); others pad on the right")
    add("--instruction", default="", help="E5's task description: texts become 'Instruct: ...', newline, 'Query: caption' (default: captions alone)")
    add("--repeat-images", action="store_true", help="a row per caption in the image file, as the original files had, instead of image_index")
    add = command(mmimdb)
    add("--data", default=os.environ.get("MMIMDB1_DIR", "mmimdb"), help="folder with dataset/ (default: $MMIMDB1_DIR, else mmimdb)")
    add("--backbone", default="clip", help="name in the files: clip (default), blip2, or any word with --model")
    add("--model", help="CLIP, SigLIP or BLIP-2 (default: openai/clip-vit-base-patch16 for clip, Salesforce/blip2-flan-t5-xl for blip2)")
    add("--views", type=positive, default=70, help="rows a film, view 0 clean, the others augmented (default: 70)")
    add("--out", help="folder to write to (default: latents/ in the data)")
    add = command(alignment)
    add("--captions", help="JSON of captions and their rewrites at levels u")
    add("--rewrite-captions", metavar="FILE", help="make {out}/captions.json of plain captions (a line each, or a JSON list) by word replacement")
    add("--seed", type=int, default=0, help="of --rewrite-captions")
    add("--images", help="folder of the photos, one a caption")
    add("--image-names", help="file of their names in the order of the captions (default: sorted names)")
    add("--mmimdb", metavar="DIR", help="posters and plots of this folder instead of photos and captions")
    add("--language", nargs="+", default=[], metavar="MODEL", help="causal language models")
    add("--vision", nargs="+", default=[], metavar="MODEL", help="vision transformers, also CLIP's")
    add("--padding-side", choices=("left", "right"), default="left", help="of the texts in a batch (default: left)")
    add("--vision-pool", choices=("cls", "avg"), default="cls", help="CLS token (default), or mean of the tokens, after each block")
    add("--out", default="prh", help="folder to write to (default: %(default)s)")
    add = command(flickr8k)
    add("--data", default="flickr8k", help="folder with Flickr8k_Dataset/ (default: %(default)s)")
    add("--model", default="google/siglip-so400m-patch14-384", help="of photos (default: %(default)s)")
    add("--text-model", help="sentence encoder of the captions, such as sentence-transformers/all-MiniLM-L6-v2 (default: no text_features.pt)")
    add("--text-pool", choices=("mean", "last", "first"), default="mean", help="tokens that stand for a text (default: mean)")
    add("--speech-model", help="of the spoken captions: Whisper or wav2vec 2.0 and its like, such as openai/whisper-base.en (default: none)")
    add("--corruptions", action="store_true", help="also the corrupted queries of the test-time protocol")
    add("--out", help="folder to write to (default: the data's)")
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
    with concurrent.futures.ThreadPoolExecutor(args.workers) as args.readers:
        args.run(args)


if __name__ == "__main__":
    sys.exit(main())
