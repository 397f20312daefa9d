"""Raw data sets -> the embedding files that the experiments read. Needs `transformers` (>= 5.20).

    python encode.py coco --images train2017 --captions captions_train2017.json --split train2017 --native-text
    python encode.py mmimdb --data mmimdb --backbone clip        # or blip2, or models of your own
    python encode.py alignment --captions captions.json --images photos --language gpt2 --vision facebook/dinov2-base
    python encode.py alignment --mmimdb mmimdb --out mmimdb/features --language gpt2 --vision facebook/dinov2-base
    python encode.py flickr8k --data flickr8k --text-model sentence-transformers/all-MiniLM-L6-v2 --corruptions
    python encode.py pixmo --data pixmo --out pixmo/features     # --tokens: every token, for attention pooling
    torchrun --nproc-per-node 8 encode.py pixmo --data pixmo     # the same files, made by eight GPUs

Models are folders or names on huggingface.co, with @revision if wanted. What a model takes is checked before anything
is encoded. The same command after a kill goes on at the first unfinished shard and gives the bits of a run that was
not interrupted. Beside every output stands a `*_manifest.json`. docs/encoding.md says what each subcommand writes.

Shapes: N items (images, captions, films), B rows of a batch, T tokens, L layers, D features.
"""

import logging
import os
import signal

if __name__ == "__main__":  # Ctrl-C while the modules load ends in one line, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"stopped by Ctrl-C\n") and 130))

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing.connection
import multiprocessing.forkserver
import random
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import common
from common import UserError

SHARD, TEXT_SHARD = 256, 4096  # rows a shard, of images (or layer-wise features) and of texts: it fixes the batches
SCORED_TOKENS = 256  # tokens whose logits are in memory at a time
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INPUTS = {  # what a model may take: the first input of such models, and one to take instead
    "images": (("pixel_values",), "facebook/dinov2-base"),
    "texts": (("input_ids",), "sentence-transformers/all-MiniLM-L6-v2"),
    "speech": (("input_features", "input_values"), "openai/whisper-base.en")}


# ------------------------------------------------------------------------------------------------------------- models

def import_transformers():
    """The package, quiet; imported here, so that -h is quick and needs nothing."""
    try:
        import transformers
        is_new = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20)  # others want torchvision, too
    except ImportError:
        is_new = False
    if not is_new:
        raise UserError("encode.py needs the package transformers, at least 5.20: pip install 'transformers>=5.20'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # ten lines of retries where there is no network
    return transformers


@dataclasses.dataclass
class Source:
    """A model that is known but not loaded."""
    name: str  # as given
    path: str  # folder, or name on the hub
    revision: str | None  # as asked for
    commit: str  # of the hub, or a fingerprint of the folder's files
    config: object
    remote_code: bool = False  # whether code of the model's own may run

    @property
    def kind(self):
        return self.config.model_type

    @property
    def stem(self):
        """The last part of the name, which names its files."""
        return Path(self.path).name

    @property
    def family(self):
        """The name without the parts that tell size and training length: bloomz-560m and bloomz-1b1 are bloomz."""
        size = re.compile(r"(tiny|small|base|large|huge|giant|[tsblhgx]+|patch)?\d*([mbk]\d*)?", re.IGNORECASE)
        return "_".join(part for part in re.split(r"[_\-.]", self.stem) if not size.fullmatch(part)) or self.stem

    @property
    def model_class(self):
        """What AutoModel loads, or None of a model with code of its own."""
        return import_transformers().AutoModel._model_mapping.get(type(self.config), None)

    @property
    def is_dual(self):
        """Whether it embeds images and texts into one space, as CLIP and SigLIP do."""
        return self.kind != "blip-2" and hasattr(self.model_class, "get_text_features")

    def takes(self, what):
        """Whether it takes "images", "texts" or "speech"; a model with code of its own is believed."""
        if hasattr(self.model_class, "get_image_features"):
            return what != "speech"
        return self.model_class is None or self.model_class.main_input_name in INPUTS[what][0]

    @property
    def is_causal(self):
        """Whether it is a whole causal language model: without an encoder, and no masked one that may be run so."""
        from transformers.models.auto import modeling_auto as auto
        return (self.kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and self.takes("texts")
                and self.kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
                and not getattr(self.config, "is_encoder_decoder", False))


def cause(error):
    """What went wrong at loading a model, in one line, with what helps if the error says so."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    hints = re.findall(r"pip install [\w'\"<>=.\- ]*\w", " ".join(lines[1:]))[:1]
    hints += ["--trust-remote-code runs it"] * ("trust_remote_code" in str(error))
    return "; ".join([f"{type(error).__name__}: {lines[0].rstrip('.')}", *hints])


def find_model(name, needs, remote_code=False):
    """Source of a local folder or of a name[@revision] on the hub. Raises: UserError, also if it does not take what is
    needed: "images", "texts" or "speech"."""
    transformers = import_transformers()
    path, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision or None, trust_remote_code=remote_code)
        if Path(path).is_dir():
            kinds = (".json", ".safetensors", ".bin", ".model", ".py")
            commit = f"files {common.fingerprint(sorted(p for p in Path(path).iterdir() if p.suffix in kinds))}"
        else:
            commit = Path(transformers.utils.cached_file(path, "config.json", revision=revision or None)).parent.name
    except Exception as error:  # the hub, json and transformers raise kinds of their own
        raise UserError(f"model {name}: {cause(error)}; give a folder of a saved model or a name on huggingface.co "
                        "(with HF_HUB_OFFLINE=1 one that has been downloaded)") from None
    source = Source(name, path, revision or None, commit, config, remote_code)
    if not source.takes(needs):
        raise UserError(f"model {name}: a {source.kind} takes no {needs}; give one that does: {INPUTS[needs][1]}")
    return source


def load(source, kind, **options):
    """transformers.<kind>.from_pretrained of a Source, in one line if it fails."""
    try:
        return getattr(import_transformers(), kind).from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # missing files, unknown classes, missing packages
        raise UserError(f"model {source.name}: {kind} cannot be loaded ({cause(error)})") from None


def load_model(source, args, kind="AutoModel"):
    """The model on its device(s), in eval mode. Raises: UserError, also if weights are not in its files: they would be
    random."""
    options = {"device_map": args.device_map} if args.device_map else {}
    model, info = load(source, kind, dtype=DTYPES[args.weights], output_loading_info=True, **options)
    missing = {key for key in info["missing_keys"] if source.is_dual or "pooler" not in key}  # others' is not read here
    if missing:
        raise UserError(f"model {source.name}: {len(missing)} weights are not in its files (the first: "
                        f"{min(missing)}); it is no {kind} checkpoint")
    model.config.use_cache = False  # keys and values of a decoder that generates nothing
    return (model if args.device_map else model.to(args.device)).eval().requires_grad_(False)


def open_images(name, args):
    """(Source, image processor) of a model that takes images. The processor is Pillow's: the same pixels with and
    without torchvision."""
    source = find_model(name, "images", args.trust_remote_code)
    if source.kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(f"model {name}: NaFlex models take patches, not pictures; take a fixed-size SigLIP 2")
    backend = {} if source.kind == "timm_wrapper" else {"backend": "pil"}  # timm's has but one
    return source, load(source, "AutoImageProcessor", **backend)


def open_texts(name, args):
    """(Source, tokenizer, pooling) of a model that takes texts.

    pooling, unless --text-pool says otherwise: the projection of CLIP, SigLIP and their like, the last token of a
    causal model, the mean over the tokens of any other (of BLIP-2's T5 encoder, too).
    """
    source = find_model(name, "texts", args.trust_remote_code)
    tokenizer = load(source, "AutoTokenizer")
    own = "projection" if source.is_dual else "last" if source.is_causal else "mean"
    how = args.text_pool or own
    if how == "last" and tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no EOS token to pool at; use --text-pool mean")
    if source.kind == "blip-2" and not source.config.text_config.is_encoder_decoder:
        raise UserError(f"model {name}: its language model has no encoder; take Salesforce/blip2-flan-t5-xl")
    return source, tokenizer, how


# -------------------------------------------------------------------------------------------------------------- texts

class Tokens(list):
    """Token ids of a text, and whether it was cut."""
    is_cut = False


def start_token(tokenizer):
    """BOS, else EOS, else None."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def tokenize(source, tokenizer, texts, args, how):
    """[N] Tokens, cut to what model, tokenizer and --max-length allow; a special token at their end stays there.

    how="last": the last id is EOS, whatever the tokenizer appends; how="start": the first one is a start token.
    """
    table = getattr(getattr(source.config, "text_config", source.config), "max_position_embeddings", None)
    limit = min(args.max_length, tokenizer.model_max_length, table or args.max_length)
    start, eos, specials = start_token(tokenizer), tokenizer.eos_token_id, set(tokenizer.all_special_ids)
    items = []
    for ids in tokenizer(texts)["input_ids"]:
        ids = ids or [start or 0]  # an empty text is not without tokens
        if how == "last" and ids[-1] != eos:
            ids = [*ids, eos]
        if how == "start" and ids[0] != start:
            ids = [start, *ids]
        n_end = int(ids[-1] in specials)
        items.append(Tokens(ids if len(ids) <= limit else ids[:limit - n_end] + ids[len(ids) - n_end:]))
        items[-1].is_cut = len(ids) > limit
    return items


def pad(items, tokenizer, device="cpu", length=None):
    """Lists of token ids -> (ids [B, T], mask [B, T] of 0/1), int64, padded on the right to the longest, or `length`.

    So positions count from the first token in every model, and a causal one never sees the padding.
    """
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    length = length or max(map(len, items))
    ids = torch.tensor([item + [pad_id] * (length - len(item)) for item in items])
    mask = torch.tensor([[1] * len(item) + [0] * (length - len(item)) for item in items])
    return ids.to(device), mask.to(device)


def pool_tokens(hidden, mask, how):
    """hidden [B, T, D], mask [B, T] of 0/1 -> [B, D] float32: the last token of the text, the first, or the mean."""
    mask = mask.to(hidden.device)
    if how == "mean":
        return hidden.float().masked_fill(mask[..., None] == 0, 0).sum(1) / mask.sum(1, keepdim=True)
    index = torch.zeros_like(mask[:, 0]) if how == "first" else mask.sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), index].float()


def text_forward(source, tokenizer, args, how, n_tokens=None):
    """forward(lists of token ids) -> ([B, D],); with n_tokens every token: ([B, n_tokens, D], mask [B, n_tokens])."""
    model = load_model(source, args)
    length = None
    if source.kind.startswith("siglip"):  # trained on captions padded to the full length, without a mask
        length = getattr(source.config, "text_config", source.config).max_position_embeddings
    if source.kind == "blip-2":
        tower = model.language_model.get_encoder()
    elif getattr(source.config, "is_encoder_decoder", False):
        tower = model.get_encoder()
    else:
        tower = model.text_model if source.is_dual else model
    unit = functools.partial(F.normalize, dim=1) if args.normalize_texts else torch.nn.Identity()

    @torch.inference_mode()
    def forward(items):
        ids, mask = pad(items, tokenizer, model.device, length)
        inputs = {"input_ids": ids} if length else {"input_ids": ids, "attention_mask": mask}
        if how == "projection" and not n_tokens:
            return (unit(model.get_text_features(**inputs).pooler_output),)
        hidden = tower(**inputs).last_hidden_state
        if not n_tokens:
            return (unit(pool_tokens(hidden, mask, how)),)
        hidden = hidden.masked_fill(mask[..., None] == 0, 0)
        room = n_tokens - hidden.shape[1]  # below 0 it cuts padding
        return F.pad(hidden, (0, 0, 0, room)), F.pad(mask, (0, room))
    return forward


class Computed(torch.nn.Module):
    """Takes the place of a model's body and gives an output that is there already, so that the model itself makes
    logits of it: some scale them, some cap them."""
    output = None

    def forward(self, *_, **__):
        return self.output


def language_forward(source, tokenizer, args):
    """forward([B] Tokens) -> (features [B, L, D], nats [B]) of a causal language model, whose texts begin with a start
    token; (features,) of another text encoder.

    Features: mean over the tokens that the tokenizer gives, of the embeddings and of every block's output (of causal
    models the last one normalised), L = blocks + 1. Nats: negative log likelihood of all tokens of the text after the
    start token, so that tokenizers with and without one compare; nan for a text that was cut. Both come from one pass:
    a start token that the tokenizer does not put is seen by the text's tokens, but is not in the mean.
    """
    model = load_model(source, args, "AutoModelForCausalLM" if source.is_causal else "AutoModel")
    body = model.get_encoder() if getattr(source.config, "is_encoder_decoder", False) else model.base_model
    puts_start = not source.is_causal or tokenizer("a")["input_ids"][:1] == [start_token(tokenizer)]
    computed = Computed()
    if source.is_causal:
        setattr(model, model.base_model_prefix, computed)

    @torch.inference_mode()
    def forward(items):
        ids, mask = pad(items, tokenizer, model.device)
        output = body(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        text = mask.clone()
        text[:, 0] = 0
        pooled = mask if puts_start else torch.where(text.any(1, keepdim=True), text, mask)
        features = torch.stack([pool_tokens(hidden, pooled, "mean").cpu() for hidden in output.hidden_states], dim=1)
        if not source.is_causal:
            return (features,)
        hidden = output.last_hidden_state
        output = type(output)(last_hidden_state=hidden)  # frees the layers
        rows, columns = text[:, 1:].nonzero(as_tuple=True)  # column t predicts token t + 1
        nats = torch.zeros(len(items), dtype=torch.float64)
        for i in range(0, len(rows), SCORED_TOKENS):
            row, column = rows[i:i + SCORED_TOKENS], columns[i:i + SCORED_TOKENS]
            output.last_hidden_state = hidden[row.to(hidden.device), column.to(hidden.device)][None]
            computed.output = output
            logits = model(input_ids=ids[row, column][None]).logits[0].float()
            loss = F.cross_entropy(logits, ids[row, column + 1].to(logits.device), reduction="none")
            nats.index_add_(0, row.cpu(), loss.double().cpu())
        nats[torch.tensor([item.is_cut for item in items])] = math.nan
        return features, nats.float()
    return forward


# ------------------------------------------------------------------------------------------------- pictures and speech

def read_image(file):
    """The RGB picture of a path or of bytes, upright, transparency on white; or the reason why there is none, a str."""
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        image = Image.fromarray(common.decode_image(content, max_pixels=2**40))
    except (OSError, ValueError) as error:
        return common.reason_of(error)
    too_narrow = max(image.size) > 1000 * min(image.size)
    return f"{image.width} x {image.height} pixels, too narrow" if too_narrow else image


def fault_of(file):
    """The reason why there is no picture, a str, or None."""
    image = read_image(file)
    return image if isinstance(image, str) else None


def pixels_of(image, processor, dtype=torch.float32):
    """[3, H, W] of a picture, bfloat16 as int16, which NumPy has; or the reason why there are none, a str."""
    if isinstance(image, str):
        return image
    try:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0].float().to(dtype)
    except Exception as error:  # a size that this processor cannot handle
        return common.reason_of(error)
    return pixels.view(torch.int16).numpy() if dtype == torch.bfloat16 else pixels.numpy()


def pixels_on(device, items, dtype):
    """[B, 3, H, W] of what `pixels_of` made."""
    pixels = torch.from_numpy(np.stack(items))
    return (pixels.view(torch.bfloat16) if pixels.dtype == torch.int16 else pixels).to(device, dtype)


def read_pixels(file, processor, dtype):
    return pixels_of(read_image(file), processor, dtype)


@contextlib.contextmanager
def open_readers(args):
    """The workers that decode: processes where a GPU waits for them, as Python lets threads do little at a time (16 of
    them beside an H200 made 2.4 times the pictures of one); else threads."""
    ending = threading.Event()
    if args.device.type != "cuda" or "forkserver" not in multiprocessing.get_all_start_methods():
        readers = concurrent.futures.ThreadPoolExecutor(args.workers)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common", "transformers.image_processing_utils"])  # and with them PyTorch, once
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, also while the server imports
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
        readers = concurrent.futures.ProcessPoolExecutor(args.workers, context, start_reader)
        watched = readers._processes, readers._result_queue._writer, ending
        threading.Thread(target=end_together, args=watched, daemon=True).start()
    try:
        yield readers
    except concurrent.futures.BrokenExecutor:
        raise OSError("a process that decodes was killed, perhaps for its memory; the same command with fewer "
                      "--workers goes on at the first unfinished shard") from None
    finally:
        ending.set()
        readers.shutdown(cancel_futures=True)


def end_together(processes, writer, ending):
    """End all processes {id: process} that decode when the first of them ends unasked: of one that is killed while it
    sends a result the executor would wait for the rest, for ever, as long as another (or its own end, writer) may send
    it."""
    is_one_gone = False
    while not (ending.is_set() or is_one_gone):
        sentinels = [process.sentinel for process in [*processes.values()]]
        is_one_gone = bool(multiprocessing.connection.wait(sentinels, timeout=1))
    if not ending.is_set():
        for process in [*processes.values()]:
            process.kill()
        writer.close()


def start_reader():
    """Begin a process that decodes, deaf to Ctrl-C as its server is; without its parent it ends itself."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def by_readers(function, items, args):
    """function(item) of all items, in their order, as they come; of functions and items that can be pickled."""
    return args.readers.map(function, items, chunksize=8)


def image_preparer(files, processor, args):
    """prepare(rows) -> pixels, or the reason why there are none."""
    read = functools.partial(read_pixels, processor=processor, dtype=DTYPES[args.weights])
    return lambda rows: by_readers(read, [files[row] for row in rows], args)


def has_cls(model, hidden, pixels):
    """Whether the first of the tokens [B, T, D] of pixels [B, 3, H, W] is a CLS token: there are more than patches."""
    if hasattr(model, "timm_model"):
        return getattr(model.timm_model, "num_prefix_tokens", 0) > 0
    patch = getattr(getattr(model.config, "vision_config", model.config), "patch_size", None) or 1
    height, width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return hidden.ndim == 3 and hidden.shape[1] > pixels.shape[2] * pixels.shape[3] // (height * width)


def image_forward(source, args, tokens=False):
    """forward([3, H, W] arrays) -> ([B, D],), or ([B, T, D],) of all tokens (of a CNN: all places).

    Pooled: the projection of CLIP and its like, SigLIP's pooled output, the mean of the outputs of BLIP-2's Q-Former,
    the mean over the places of a CNN, what a timm model pools, the CLS token of a plain vision transformer. Raises:
    UserError of one without.
    """
    model = load_model(source, args)
    tower = getattr(model, "vision_model", model)

    @torch.inference_mode()
    def forward(items):
        pixels = pixels_on(model.device, items, DTYPES[args.weights])
        if tokens:
            hidden = tower(pixel_values=pixels).last_hidden_state
            return (hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2),)
        if source.kind == "blip-2":
            queries = model.get_qformer_features(pixel_values=pixels)  # of Blip2Model a tensor
            return (getattr(queries, "last_hidden_state", queries).float().mean(1),)
        if hasattr(model, "get_image_features"):
            return (model.get_image_features(pixel_values=pixels).pooler_output,)
        out = model(pixel_values=pixels)
        pools = out.last_hidden_state.ndim == 4 or source.kind in (
            "siglip_vision_model", "clip_vision_model", "timm_wrapper")
        if pools and getattr(out, "pooler_output", None) is not None:
            return (out.pooler_output.flatten(1).float(),)
        if not has_cls(model, out.last_hidden_state, pixels):
            raise UserError(f"model {source.name}: a {source.kind} gives no CLS token and no pooled output; use CLIP, "
                            "SigLIP, BLIP-2, a CNN or a vision transformer such as facebook/dinov2-base")
        return (out.last_hidden_state[:, 0],)
    return forward


def vision_forward(source, processor, args):
    """forward([3, H, W] arrays) -> ([B, L, D],): the CLS token (or the mean over tokens) after each block, before any
    final norm. Raises: UserError, by a trial, of a model without such blocks."""
    model = load_model(source, args)
    tower, config = getattr(model, "vision_model", model), getattr(source.config, "vision_config", source.config)
    depth = getattr(config, "num_hidden_layers", None)
    lists = [m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    blocks = getattr(model.timm_model, "blocks", ()) if source.kind == "timm_wrapper" else (lists or [()])[0]
    outputs, extra = [], {}
    for block in blocks:  # hooks, as the last of `hidden_states` is normalised in some models
        block.register_forward_hook(lambda _, __, x: outputs.append(x if isinstance(x, torch.Tensor) else x[0]))
    if source.kind == "vit_mae":  # all patches, in order
        model.config.mask_ratio = 0.0
        extra["noise"] = torch.arange((config.image_size // config.patch_size) ** 2, device=model.device).float()

    @torch.inference_mode()
    def forward(items):
        outputs.clear()
        pixels = pixels_on(model.device, items, DTYPES[args.weights])
        tower(pixel_values=pixels, **{key: value.expand(len(items), -1) for key, value in extra.items()})
        if not outputs or any(x.ndim != 3 or x.shape != outputs[0].shape for x in outputs):
            raise UserError(f"model {source.name}: a {source.kind} has no list of transformer blocks of one width; use "
                            "a vision transformer such as facebook/dinov2-base")
        if args.vision_pool == "cls" and not has_cls(model, outputs[0], pixels):
            raise UserError(f"model {source.name}: a {source.kind} has no CLS token; use --vision-pool avg")
        pooled = [x[:, 0] if args.vision_pool == "cls" else x.float().mean(1) for x in outputs]
        return (torch.stack([x.float().cpu() for x in pooled], dim=1),)
    forward([pixels_of(Image.new("RGB", (64, 64)), processor)])
    return forward


def speech_forward(source, args):
    """forward(waves [n] float32 at 16 kHz) -> ([B, L, D],): mean over the recording's own frames of the input of the
    encoder's first block and of every block's output. Models of 30 s spectrograms (Whisper) pad the rest with silence;
    others (wav2vec 2.0, HuBERT, WavLM) take one at a time."""
    model, extractor = load_model(source, args), load(source, "AutoFeatureExtractor")
    model = model.get_encoder() if source.config.is_encoder_decoder else model
    is_padded = extractor.model_input_names[0] == "input_features"

    @torch.inference_mode()
    def forward(items):
        features = []
        for waves in [items] if is_padded else [[item] for item in items]:
            inputs = extractor(waves, sampling_rate=16000, return_tensors="pt")[extractor.model_input_names[0]]
            inputs = inputs.to(model.device, DTYPES[args.weights])
            hidden = torch.stack(model(inputs, output_hidden_states=True).hidden_states, dim=1)  # [B, L, T, D]
            for x, wave in zip(hidden, waves, strict=True):
                own = max(1, round(x.shape[1] * len(wave) / extractor.n_samples)) if is_padded else x.shape[1]
                features.append(x[:, :own].float().mean(1))
        return (torch.stack(features),)
    return forward


# ------------------------------------------------------------------------------------------------------- augmentation

def view_draws(item, view, modality):
    """The random numbers of one view: a function of id, view and modality alone, so that any row can be made again."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{item}:{view}:{modality}".encode()).digest(), "big"))


def augment_image(image, size, draws):
    """A SimCLR view (Chen et al. 2020, appendix A): a crop of .08 to 1 of the area to size = (width, height), flip,
    colour jitter, grey, blur."""
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
        image = ImageOps.mirror(image)
    if draws.random() < 0.8:
        for change in draws.sample(("Brightness", "Contrast", "Color", "Hue"), 4):
            if change == "Hue":
                shift, (hue, *rest) = round(255 * draws.uniform(-0.2, 0.2)), image.convert("HSV").split()
                turned = hue.point([(i + shift) % 256 for i in range(256)])
                image = Image.merge("HSV", [turned, *rest]).convert("RGB")
            else:
                image = getattr(ImageEnhance, change)(image).enhance(draws.uniform(0.2, 1.8))
    if draws.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if draws.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(draws.uniform(0.1, 2)))
    return image


def mask_words(text, mask_token, draws, share=0.15):
    """The text with a share of its words (at least one) replaced by the mask token, or left out where there is none."""
    words = text.split()
    places = set(draws.sample(range(len(words)), min(len(words), max(1, round(share * len(words))))))
    return " ".join(mask_token if i in places else word
                    for i, word in enumerate(words) if i not in places or mask_token)


# ----------------------------------------------------------------------------------------------------- rows in shards
#
# Rows are encoded in shards, which fix the batches. Of W processes (torchrun) each encodes every W-th shard and sends
# it to process 0, which alone writes, in the order of the rows: the files are those of one process, to the bit.

def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_sizes(files):
    """What tells one set of pictures from another without reading them."""
    return [[Path(f).name, os.path.getsize(f) if os.path.exists(f) else None] for f in files]


def model_job(source, processor=None, **facts):
    """The part of a job that says which model, and on what pixels."""
    job = {"model": source.name, "revision": source.commit, "family": source.family}
    if processor:
        job["transform"] = {k: v for k, v in processor.to_dict().items() if not k.startswith("_")}
    return {**job, **facts}


def check_same_job(found, job, where):
    """Raises UserError, naming what differs, if `where` was made by another job."""
    changes = [f"{key}={json.dumps(found.get(key)):.60} (now {json.dumps(job.get(key)):.60})"
               for key in {**found, **job} if found.get(key) != job.get(key)]
    if changes:
        raise UserError(f"{where} was made otherwise: {', '.join(changes)}; move it away, or choose another --out")


def write_rows(path, start, block):
    """Write rows [start, start + B) of a file of raw rows. Not through a mapping, which kills the process when the disk
    is full. Raises: OSError naming the file."""
    content = block.contiguous().view(torch.uint8).numpy().tobytes()
    try:
        with open(path, "r+b" if start else "wb") as file:
            file.seek(start * (len(content) // len(block)))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}); finished shards are kept, and the same command goes on "
                      "from them once this is mended") from None


def run_batch(forward, items):
    """forward(items), on the CPU; in halves, and halves of those, where the memory does not suffice."""
    try:
        return [x.cpu() for x in forward(items)]
    except RuntimeError as error:
        if len(items) == 1 or not common.is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # CUDA's libraries allocate beside PyTorch
    warnings.warn("a batch does not fit into memory and is run in halves; take a smaller --batch-size", stacklevel=2)
    half = len(items) // 2  # here the tensors of the attempt are free
    parts = [run_batch(forward, part) for part in (items[:half], items[half:])]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def run_batches(forward, items, batch_size):
    """(outputs of forward for the items that are no str, in their order; which items these are). The longest are run
    first, like lengths together; pictures stay in order."""
    good = sorted((i for i, item in enumerate(items) if not isinstance(item, str)), key=lambda i: -len(items[i]))
    batches = [good[i:i + batch_size] for i in range(0, len(good), batch_size)]
    parts = [run_batch(forward, [items[i] for i in batch]) for batch in batches]
    order = torch.tensor(good).argsort()
    return [torch.cat(column)[order] for column in zip(*parts, strict=True)], sorted(good)


def encode_shard(rows, items, forward, names, job, args):
    """What is kept of a shard: its rows; outputs, as they are stored; {row: reason} of those without; texts cut."""
    outputs, good = run_batches(forward, items, args.batch_size)
    outputs = [x.to(dtype) for x, dtype in zip(outputs, (DTYPES[args.dtype], torch.float32), strict=False)]
    if outputs:
        is_finite = torch.isfinite(outputs[0]).flatten(1).all(1)
        if not is_finite.all():
            name = names[rows[good[int(is_finite.int().argmin())]]]
            raise UserError(f"model {job['model']}: features of {name} are not finite with --weights {args.weights} "
                            f"--dtype {args.dtype}; try float32 for both")
    return {"rows": rows, "outputs": outputs,
            "bad": {row: item for row, item in zip(rows, items, strict=True) if isinstance(item, str)},
            "n_cut": sum(item.is_cut for item in items if isinstance(item, Tokens))}


def sent_to_process_0(part):
    """Yields the parts of all processes in process 0, in their order, one after the other; nothing in the others."""
    number, n_processes = common.process()
    if number:
        dist.send_object_list([part], 0, device=torch.device("cpu"))
        return
    yield part
    for sender in range(1, n_processes):
        received = [None]
        dist.recv_object_list(received, sender, device=torch.device("cpu"))
        yield received[0]


class RowFile:
    """An output in the making: raw rows in `.{name}.work/`, whose state.json says how many are there. For process 0.

    manifest: of an output that is finished, else None. Raises: UserError if what is there is not of this job.
    """

    def __init__(self, path, job, names):
        self.path, self.job, self.names, self.manifest = path, job, names, None
        self.state = {"job": job, "done": 0, "bad": {}, "shapes": [], "n_cut": 0}  # bad: {row: reason}
        self.work = path.with_name(f".{path.name}.work")
        self.manifest_file, self.state_file = path.with_name(f"{path.stem}_manifest.json"), self.work / "state.json"
        if path.exists() and self.manifest_file.exists():
            self.manifest = common.read_json(self.manifest_file)
            check_same_job(self.manifest.get("job", {}), job, path)
            shutil.rmtree(self.work, ignore_errors=True)
            print(f"{path}: finished before")
        elif self.state_file.exists():
            self.state = common.read_json(self.state_file)
            check_same_job(self.state["job"], job, f"the unfinished {self.work}")
            print(f"{path.name}: going on at {self.state['done']} of {len(names)} rows", flush=True)
        elif path.exists():
            raise UserError(f"{path} exists and has no {self.manifest_file.name}: it was not made by this command; "
                            "move it away, or choose another --out")

    def add(self, part):
        """Write what `encode_shard` returned. Raises: UserError if all rows will not fit, twice: the finished file is a
        copy."""
        self.work.mkdir(parents=True, exist_ok=True)
        state, n = self.state, len(self.names)
        if part["outputs"] and not state["shapes"]:
            state["shapes"] = [list(x.shape[1:]) for x in part["outputs"]]
            needed = 2 * n * sum(x[0].nbytes for x in part["outputs"]) / 1e9
            free = shutil.disk_usage(self.work).free / 1e9
            if needed > free:
                raise UserError(f"{self.path}: {n} rows of {state['shapes'][0]} need {needed:.3g} GB while they are "
                                f"made, {free:.3g} GB are free; make room, choose another --out, or use --limit")
        for k, block in enumerate(part["outputs"]):
            write_rows(self.work / f"{k}.bin", state["done"] - len(state["bad"]), block)
        for row, reason in part["bad"].items():
            state["bad"][str(row)] = reason
            if state["shapes"]:  # not all of a folder that is not there
                print(f"cannot be read: {self.names[row]} ({reason})", flush=True)
        state["n_cut"] += part["n_cut"]
        state["done"] = part["rows"].stop
        common.write_json(self.state_file, state)

    def finish(self, finish, args):
        """Write the file and its manifest, which is returned. finish: see `encode_rows`."""
        path, state, n = self.path, self.state, len(self.names)
        kept = [row for row in range(n) if str(row) not in state["bad"]]
        bad_images = {str(self.names[int(row)]): reason for row, reason in state["bad"].items()}
        if not kept:
            shutil.rmtree(self.work)
            name, reason = next(iter(bad_images.items()))
            raise UserError(f"{path.name}: none of the {n} images can be read, the first: {name} ({reason})")
        outputs = []  # mapped, not read
        for k, (shape, dtype) in enumerate(zip(state["shapes"], (DTYPES[args.dtype], torch.float32), strict=False)):
            size = len(kept) * math.prod(shape)
            outputs.append(torch.from_file(str(self.work / f"{k}.bin"), size=size, dtype=dtype).view(-1, *shape))
        facts, content = finish(outputs, kept)
        counts = {"n_cut": state["n_cut"], "n_bad_images": len(bad_images)}
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "pillow")}
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
        manifest = {**counts, **facts, "bad_images": bad_images, "batch_size": args.batch_size, "versions": versions,
                    "device": device, "job": self.job}
        common.write_json(self.manifest_file, manifest)
        if isinstance(content, dict):
            content |= {"family": self.job["family"], **counts, "fingerprint": digest(self.job)}
        save = torch.save if path.suffix == ".pt" else lambda rows, file: np.save(file, rows.numpy())
        common.atomic_write(path, lambda file: save(content, file))
        shutil.rmtree(self.work)
        print(f"{path}: {len(kept)} rows {state['shapes'][0]} {args.dtype}; images that cannot be read: "
              f"{counts['n_bad_images']}, texts that were cut: {counts['n_cut']}")
        return manifest


def encode_rows(path, job, names, shard, prepare, load_forward, finish, args):
    """Encode len(names) rows in shards into `path`, or go on where an earlier run of the same job stopped; returns the
    manifest.

    job: dict of all that decides the content. names: of the rows, for messages and the list of bad images.
    prepare(rows) -> items for the model, or a str where a row has none; it runs two shards ahead in a thread.
    load_forward() -> forward(items) -> tuple of [B, ...] tensors: features, stored as args.dtype, and perhaps float32
    numbers beside them. finish(outputs, kept) -> (facts for the manifest, content of `path`), where outputs are the
    rows that have an item and the list kept says which they are; a dict is completed by what every such file says.
    """
    path, (number, n_processes) = Path(path), common.process()
    job = json.loads(json.dumps({**job, "dtype": args.dtype, "weights": args.weights, "shard": shard}, default=str))
    output = RowFile(path, job, names) if number == 0 else None
    manifest, done = common.agreed([output.manifest, output.state["done"]] if output else [None, None])
    if manifest:
        return manifest
    shards = [range(i, min(i + shard, len(names))) for i in range(done, len(names), shard)]
    shards += [range(0)] * (-len(shards) % n_processes)  # as many turns for every process
    own = shards[number::n_processes]
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        prepared = [ahead.submit(prepare, later) for later in own[:2] if later]
        forward = load_forward() if shards else None
        start = time.perf_counter()
        for i, rows in enumerate(common.progress(own, path.name, disable=number > 0)):
            items = [*prepared.pop(0).result()] if rows else []
            prepared += [ahead.submit(prepare, later) for later in own[i + 2:i + 3] if later]
            part = encode_shard(rows, items, forward, names, job, args)
            for received in sent_to_process_0(part):
                if received["rows"]:
                    output.add(received)
    if shards:
        print(f"{path}: {(len(names) - done) / (time.perf_counter() - start):.3g} rows a second")
    return common.agreed([output.finish(finish, args) if output else None])[0]


def text_facts(how, args):
    """The part of a job that says what is taken of a text."""
    return {"pool": how, "max_length": args.max_length, "unit_length": args.normalize_texts}


def encode_texts(path, opened, texts, args, finish=lambda outputs, _: ({}, outputs[0]), n_tokens=None):
    """encode_rows of texts by what `open_texts` gave."""
    source, tokenizer, how = opened
    job = model_job(source, **text_facts("tokens" if n_tokens else how, args), data=digest(texts))
    return encode_rows(path, job, range(len(texts)), SHARD if n_tokens else TEXT_SHARD,
                       lambda rows: tokenize(source, tokenizer, [texts[i] for i in rows], args, how),
                       lambda: text_forward(source, tokenizer, args, how, n_tokens), finish, args)


# --------------------------------------------------------------------------------------------------------------- coco

def folder_of(path, what):
    """The Path of an existing folder. Raises: UserError saying what it should hold."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; it should hold {what}")
    return Path(path)


def read_coco(path, limit):
    """(images, dicts with id and file_name; captions, (row of the image, caption id, text) by image) of a COCO captions
    file. Raises: UserError."""
    content, by_image = common.read_json(path), {}
    try:
        for annotation in content["annotations"]:
            caption = (annotation["id"], " ".join(annotation["caption"].split()))
            by_image.setdefault(annotation["image_id"], []).append(caption)
        images = [image for image in content["images"] if image["id"] in by_image and image["file_name"]][:limit]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected COCO captions: images with id and file_name, annotations with id, image_id "
                        f"and caption ({common.reason_of(error)})") from None
    if not images:
        raise UserError(f"{path}: no image has a caption")
    print(f"{path}: {len(images)} of {len(content['images'])} images (with captions, within --limit)")
    return images, [(row, *caption) for row, image in enumerate(images) for caption in by_image[image["id"]]]


def coco(args):
    """{split}_{image,text}_embeddings.pt and {split}_metadata.json for exp_coco_heads.py."""
    folder = folder_of(args.images, "the images of --captions (COCO: the unpacked train2017.zip or val2017.zip)")
    images, captions = read_coco(args.captions, args.limit)
    names = [image["file_name"] for image in images]
    files = [folder / name for name in names]
    prefix = f"{args.out}/{args.split}"
    vision, processor = open_images(args.image_model, args)
    text = open_texts(args.text_model, args)
    if args.native_text and not vision.is_dual:
        raise UserError(f"--native-text: a {vision.kind} has no text tower in the images' space; take SigLIP or CLIP")
    native = (vision, load(vision, "AutoTokenizer"), "projection") if args.native_text else None

    job = model_job(vision, processor, data=digest([file_sizes(files), captions]))
    manifest = encode_rows(f"{prefix}_image_embeddings.pt", job, names, SHARD, image_preparer(files, processor, args),
                           lambda: image_forward(vision, args), lambda outputs, _: ({}, outputs[0]), args)
    kept = [row for row, name in enumerate(names) if name not in manifest["bad_images"]]
    new_row = {row: new for new, row in enumerate(kept)}
    captions = [caption for caption in captions if caption[0] in new_row]
    plain = [caption for *_, caption in captions]
    texts = [f"Instruct: {args.instruction}\nQuery: {caption}" for caption in plain] if args.instruction else plain
    counts = {"bad_images": manifest["n_bad_images"]}
    counts["n_cut"] = encode_texts(f"{prefix}_text_embeddings.pt", text, texts, args)["n_cut"]
    if native:
        counts["n_cut_native"] = encode_texts(f"{prefix}_native_text_embeddings.pt", native, plain, args)["n_cut"]
    common.write_text(f"{prefix}_metadata.json", json.dumps({
        "dataset_name": args.split, "image_model": args.image_model, "text_model": args.text_model,
        "total_pairs": len(captions), "unique_images": len(kept), "total_captions": len(captions), **counts,
        "image_index": [new_row[row] for row, *_ in captions], "image_ids": [images[row]["id"] for row, *_ in captions],
        "caption_ids": [caption_id for _, caption_id, _ in captions], "captions": plain,
        "image_files": [names[row] for row in kept]}))
    print(f"{prefix}_metadata.json: {len(captions)} captions of {len(kept)} images")


# ------------------------------------------------------------------------------------------------------------- mmimdb

def film_ids(root, limit):
    """Film ids in the order of ids_all.txt, in the folder of labels that exp_gw_mmimdb.py reads; without it all with
    plot and poster, sorted (as its --stage labels writes them)."""
    dataset = folder_of(root / "dataset", "MM-IMDb's plots and posters (the unpacked mmimdb.tar.gz of "
                        "archive.org/details/mmimdb)")
    listed = Path(os.environ.get("IMDB1_LABELS_DIR_23") or root / "labels") / "ids_all.txt"
    with_poster = sorted(p.stem for p in dataset.glob("*.json") if p.with_suffix(".jpeg").exists())
    ids = listed.read_text().split() if listed.is_file() else with_poster
    if not ids:
        raise UserError(f"{dataset}: no films (an {{id}}.json with its {{id}}.jpeg)")
    return ids[:limit]


def film_plots(root, ids):
    """The films' plots, [N] lists of at least one summary each."""
    plots = [common.read_json(root / "dataset" / f"{film}.json").get("plot") or "" for film in ids]
    return [[plot] if isinstance(plot, str) else plot for plot in plots]


read_poster = functools.lru_cache(maxsize=4)(read_image)  # whose views come one after the other


def view_pixels(wanted, size, processor, dtype):
    """Pixels of (file of a poster, its film, view)."""
    file, film, view = wanted
    picture = read_poster(file)
    if view and not isinstance(picture, str):
        picture = augment_image(picture, size, view_draws(film, view, "image"))
    return pixels_of(picture, processor, dtype)


def mmimdb(args):
    """latents/mm_imdb1_globals_aug{views}_{backbone}_{image,text}.npy for exp_gw_mmimdb.py."""
    root, views = Path(args.data), args.views
    ids, out = film_ids(root, args.limit), Path(args.out or root / "latents")
    defaults = {"clip": "openai/clip-vit-base-patch16", "blip2": "Salesforce/blip2-flan-t5-xl"}
    both = args.model or defaults.get(args.backbone)
    if not both and not (args.image_model and args.text_model):
        raise UserError(f"--backbone {args.backbone}: name its models with --image-model and --text-model, or --model")
    vision, processor = open_images(args.image_model or both, args)
    text, tokenizer, how = open_texts(args.text_model or both, args)
    plots = [" ".join(summaries) for summaries in film_plots(root, ids)]
    files = [root / "dataset" / f"{film}.jpeg" for film in ids]
    size = pixels_of(Image.new("RGB", (64, 64)), processor).shape[:0:-1]  # (width, height) that the model sees

    def prepare_images(rows):
        wanted = [(files[film], ids[film], view) for film, view in (divmod(row, views) for row in rows)]
        return by_readers(functools.partial(view_pixels, size=size, processor=processor, dtype=DTYPES[args.weights]),
                          wanted, args)

    def prepare_texts(rows):
        texts = []
        for film, view in (divmod(row, views) for row in rows):
            draws = view_draws(ids[film], view, "text")
            texts.append(mask_words(plots[film], tokenizer.mask_token, draws) if view else plots[film])
        return tokenize(text, tokenizer, texts, args, how)

    def encode(modality, job, shard, prepare, load_forward):
        path = out / f"mm_imdb1_globals_aug{views}_{args.backbone}_{modality}.npy"

        def finish(outputs, kept):
            rows = outputs[0]
            mu, sigma = common.guarded(lambda _: common.moments(rows, torch.arange(len(rows))), path)
            common.atomic_write(path.with_suffix(".stats.npz"),
                                lambda file: np.savez(file, mu=mu.numpy(), sigma=sigma.numpy()))
            if len(kept) < len(ids) * views:  # every film keeps its place
                rows = rows.new_full((len(ids) * views, rows.shape[1]), math.nan)
                rows[torch.tensor(kept)] = outputs[0]
            return {"total_rows": len(rows), "original_rows": len(ids), "views_per_sample": views,
                    "dims": rows.shape[1], "dtype": args.dtype, "ids": ids,
                    "row": "views_per_sample * film + view, view 0 clean"}, rows
        job = {**job, "views": views, "films": digest(ids)}
        manifest = encode_rows(path, job, [film for film in ids for _ in range(views)], views * max(1, shard // views),
                               prepare, load_forward, finish, args)
        if manifest["bad_images"]:
            print(f"the rows of these {manifest['n_bad_images']} films are nan: mend their posters, move {path} away "
                  f"and encode again, or take the films out of {root / 'split.json'}")

    encode("image", model_job(vision, processor, data=digest(file_sizes(files))), SHARD, prepare_images,
           lambda: image_forward(vision, args))
    encode("text", model_job(text, **text_facts(how, args), data=digest(plots)), TEXT_SHARD, prepare_texts,
           lambda: text_forward(text, tokenizer, args, how))


# ---------------------------------------------------------------------------------------------------------- alignment

def read_items(args):
    """(ids [N], {folder of language features: texts [N]}, pictures [N] or None) of the alignment command."""
    if args.mmimdb:
        root = Path(args.mmimdb)
        ids = film_ids(root, args.limit)
        texts = [next((summary for summary in summaries if len(summary.split()) > 1), summaries[0])
                 for summaries in film_plots(root, ids)]  # the first that is longer than a word
        return ids, {"language": texts}, [root / "dataset" / f"{film}.jpeg" for film in ids]
    if not args.captions or (args.vision and not args.images):
        raise UserError("alignment needs --captions, and for --vision --images, their photos; or --mmimdb for films")
    from exp_alignment_corr import read_captions
    levels = {f"gpt_u={u}_features": texts[:args.limit] for u, texts in read_captions(args.captions).items()}
    ids = [next(iter(item)) for item in json.loads(Path(args.captions).read_text(encoding="utf-8"))]
    if len(set(ids)) < len(ids):
        raise UserError(f"{args.captions}: an item is named twice; features are matched by name")
    if not args.images:
        return ids[:args.limit], levels, None
    folder = folder_of(args.images, "the photos of the captions")
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if args.image_names:
        names = common.guarded(lambda p: Path(p).read_text(encoding="utf-8").splitlines(), args.image_names)
    if len(names) != len(ids):
        raise UserError(f"{args.images}: {len(names)} photos for {len(ids)} captions; name theirs with --image-names")
    return ids[:args.limit], levels, [folder / name for name in names[:args.limit]]


def open_language(name, args):
    """(Source, tokenizer) of a language model. Raises: UserError."""
    source = find_model(name, "texts", args.trust_remote_code)
    tokenizer = load(source, "AutoTokenizer")
    if source.is_dual or source.kind == "blip-2":
        raise UserError(f"model {name}: a {source.kind} is no language model; give one, such as gpt2")
    if not source.is_causal:
        print(f"{name}: a {source.kind} is no causal language model; its file has no bits per byte")
    elif start_token(tokenizer) is None:
        raise UserError(f"model {name}: its tokenizer has neither BOS nor EOS to start a text with")
    return source, tokenizer


def alignment(args):
    """gpt_u={u}_features/{model}.pt (or language/) and vision/{model}.pt, every layer, for exp_alignment_corr.py."""
    if not (args.language or args.vision):
        raise UserError("alignment: name models to encode with, --language MODEL ... and / or --vision MODEL ...")
    ids, levels, files = read_items(args)
    language = [open_language(name, args) for name in args.language]
    vision = [open_images(name, args) for name in args.vision]
    for opened in (language, vision):
        if len({source.stem for source, _ in opened}) < len(opened):
            names = ", ".join(source.name for source, _ in opened)
            raise UserError(f"two of {names} would write one file; encode them into different --out folders")
    for source, processor in vision:  # tried now: hours of texts come first
        vision_forward(source, processor, args)
    good = list(range(len(ids)))
    looked_at = files if files and common.process()[0] == 0 else []
    for i, fault in enumerate(by_readers(fault_of, looked_at, args)):
        if fault:  # left out on both sides
            print(f"cannot be read: {files[i]} ({fault}); {ids[i]} is left out", flush=True)
            good.remove(i)
    (good,) = common.agreed([good])
    if not good:
        raise UserError(f"none of the {len(ids)} pictures can be read, the first: {files[0]}")
    n_left_out = len(ids) - len(good)
    ids, files = [ids[i] for i in good], [files[i] for i in good] if files else None

    def finish_texts(outputs, _, source, texts):
        facts = {"n_left_out": n_left_out}
        if source.is_causal:
            is_whole = ~outputs[1].isnan()
            facts["n_bytes"] = sum(len(text.encode()) for text, x in zip(texts, is_whole.tolist(), strict=True) if x)
            bits = float(outputs[1][is_whole].double().sum()) / math.log(2)
            facts["bpb"] = bits / facts["n_bytes"] if facts["n_bytes"] else None
        return facts, {"feats": outputs[0], "ids": ids, "model": source.stem, "pool": "avg", **facts}

    def finish_pictures(outputs, kept, source):
        facts = {"n_left_out": n_left_out}
        return facts, {"feats": outputs[0], "ids": [ids[i] for i in kept], "model": source.stem,
                       "pool": args.vision_pool, "files": [files[i].name for i in kept], **facts}

    for source, tokenizer in language:
        load_once = functools.cache(functools.partial(language_forward, source, tokenizer, args))  # for all levels
        for folder, texts in levels.items():
            texts = [texts[i] for i in good]

            def prepare(rows, source=source, tokenizer=tokenizer, texts=texts):
                how = "start" if source.is_causal else "mean"
                return tokenize(source, tokenizer, [texts[i] for i in rows], args, how)
            job = model_job(source, pool="avg", max_length=args.max_length, data=digest([ids, texts]))
            encode_rows(Path(args.out) / folder / f"{source.stem}.pt", job, ids, SHARD, prepare, load_once,
                        functools.partial(finish_texts, source=source, texts=texts), args)
        load_once.cache_clear()  # frees the model
    for source, processor in vision:
        job = model_job(source, processor, pool=args.vision_pool, data=digest([ids, file_sizes(files)]))
        encode_rows(Path(args.out) / "vision" / f"{source.stem}.pt", job, ids, SHARD,
                    image_preparer(files, processor, args), functools.partial(vision_forward, source, processor, args),
                    functools.partial(finish_pictures, source=source), args)


# ----------------------------------------------------------------------------------------------------------- flickr8k

def photo_pixels(file, corruption, side, processor, dtype):
    """Pixels of a photo; corrupted by (kind, amount), unless kind is "", at the size that the model sees."""
    import exp_flickr_ttt as flickr
    image = read_image(file)
    if corruption[0] and not isinstance(image, str):
        scale = side / min(image.size)
        image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
        photo = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        photo = flickr.corrupt_photo(photo, *corruption, flickr.item_draws(file.name))
        image = Image.fromarray(photo.permute(1, 2, 0).numpy())
    return pixels_of(image, processor, dtype)


def read_wave(file, corruption):
    """[n] float32 of a recording, corrupted as a photo is; or the reason why there is none, a str."""
    import exp_flickr_ttt as flickr
    try:
        wave = flickr.read_wav(file.read_bytes())
    except Exception as error:  # soundfile raises kinds of its own
        return common.reason_of(error)
    return (flickr.corrupt_speech(wave, *corruption, flickr.item_draws(file.name)) if corruption[0] else wave).numpy()


def flickr8k(args):
    """{image,text,audio}_features.pt, and those of corrupted queries, for exp_flickr_ttt.py's cached encoders."""
    import exp_flickr_ttt as flickr
    root = Path(args.data)
    folder = flickr.find(root, *flickr.PHOTO_FOLDERS)
    photos = sorted(path.name for path in folder.glob("*.jpg"))[:args.limit]
    if not photos:
        raise UserError(f"{folder}: no photos (*.jpg) in it; unpack Flickr8k_Dataset.zip")
    splits = flickr.read_splits(root)[0] if args.corruptions else {}
    vision, processor = open_images(args.image_model, args)
    text, tokenizer, how = open_texts(args.text_model, args) if args.text_model else (None, None, None)
    speech = find_model(args.speech_model, "speech", args.trust_remote_code) if args.speech_model else None
    captions = flickr.read_captions(root)[0] if text else {}
    recordings = flickr.read_speech_list(root)[0].items() if speech else ()
    wavs = {path.name: (path, photo) for (photo, _), path in recordings if photo in set(photos)}
    if speech and not wavs:
        raise UserError(f"{root}: no recordings of these photos in flickr_audio; leave --speech-model out")

    def encode(modality, source, photo_of, read, load_forward, shard, job):
        """The clean file of a modality and its corrupted ones. photo_of: {name: its photo}; read(names, corruption) ->
        items; a corruption is (kind, amount), kind "" of none."""
        def prepare(asked, corruption, rows):
            return read([asked[row] for row in rows], corruption)

        def finish(asked, outputs, kept):
            ids = [asked[i] for i in kept]
            return {}, {"feats": outputs[0], "ids": ids, "unreadable": sorted(set(asked) - set(ids)),
                        "model": source.stem}
        conditions = [(*flickr.CLEAN, None)]
        if args.corruptions:
            conditions += [(kind, x, "test") for kind, amounts in flickr.CORRUPTIONS[modality].items() for x in amounts]
            conditions.append((*flickr.HELD_OUT[modality], "dev"))
        load_once = functools.cache(load_forward)
        for kind, amount, split in conditions:
            asked = [name for name, photo in photo_of.items() if split is None or photo in splits[split]]
            path = flickr.feature_file(args.out or root, modality, flickr.condition_suffix(kind, amount))
            if not asked:
                raise UserError(f"{path}: no {modality} of a {split} photo is here (--limit?)")
            facts = {"names": digest(asked), "corruption": [kind, amount]}
            encode_rows(path, {**job, **facts}, asked, shard, functools.partial(prepare, asked, (kind, amount)),
                        load_once, functools.partial(finish, asked), args)

    sizes = [getattr(processor, "size", None), getattr(processor, "crop_size", None)]
    side = max(length for size in sizes for length in dict(size or {}).values())

    def read_photos(names, corruption):
        read = functools.partial(photo_pixels, corruption=corruption, side=side, processor=processor,
                                 dtype=DTYPES[args.weights])
        return by_readers(read, [folder / name for name in names], args)
    job = model_job(vision, processor=processor, data=digest(file_sizes(folder / name for name in photos)))
    encode("image", vision, {name: name for name in photos}, read_photos, lambda: image_forward(vision, args), SHARD,
           job)
    if text:
        texts = {f"{photo}#{k}": caption for photo in photos for k, caption in sorted(captions.get(photo, {}).items())}

        def read_texts(names, corruption):
            return tokenize(text, tokenizer, [
                flickr.corrupt_text(texts[name], *corruption, flickr.item_draws(name)) if corruption[0] else texts[name]
                for name in names], args, how)
        job = model_job(text, **text_facts(how, args), data=digest(texts))
        encode("text", text, {name: name.rpartition("#")[0] for name in texts}, read_texts,
               lambda: text_forward(text, tokenizer, args, how), TEXT_SHARD, job)
    if speech:
        def read_waves(names, corruption):
            return by_readers(functools.partial(read_wave, corruption=corruption), [wavs[name][0] for name in names],
                              args)
        job = model_job(speech, data=digest(file_sizes(path for path, _ in wavs.values())))
        encode("audio", speech, {name: wavs[name][1] for name in sorted(wavs)}, read_waves,
               lambda: speech_forward(speech, args), SHARD, job)


# -------------------------------------------------------------------------------------------------------------- pixmo

def read_column(path, group, name):
    """Yields a column's values in a row group of a parquet file, 64 rows in memory at a time. Raises: UserError."""
    from exp_pixmo_mrl import open_parquet
    with open_parquet(path, with_images=True)[0] as file:
        batches = file.iter_batches(64, row_groups=[group], columns=[name], use_threads=False)
        while batch := common.guarded(lambda _: next(batches, None), path):
            yield from batch.column(name).to_pylist()


def read_images(groups, first, step):
    """Yields the image bytes of SHARD rows from row `first` on, of as many `step` rows further on, and so forth.

    groups: (file, number of a row group, its rows, its image column) of all; those without such a row are not read.
    """
    start = 0
    for path, group, n, column in groups:
        wanted = [row >= first and (row - first) % step < SHARD for row in range(start, start + n)]
        if any(wanted):
            for is_wanted, value in zip(wanted, read_column(path, group, column), strict=True):
                if is_wanted:
                    yield (value.get("bytes") if isinstance(value, dict) else value) or b""
        start += n


def pixmo(args):
    """{image,text}_features.pt, a text row a caption, for exp_pixmo_mrl.py's cached encoders."""
    import exp_pixmo_mrl as experiment
    if args.caption_column:
        experiment.CAPTION_COLUMNS = (args.caption_column,)
    files = []
    for pattern in args.data:
        path = Path(pattern).expanduser()
        files += sorted(path.glob("**/*.parquet") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise UserError(f"--data {' '.join(args.data)}: no parquet files there; download allenai/pixmo-cap with its "
                        "images")
    vision, processor = open_images(args.image_model, args)
    text, tokenizer, how = open_texts(args.text_model, args)
    groups, rows = [], []  # of read_images; (id, captions): an id that no column gives is "file:row"
    for path in files:
        file, images, captions, key = experiment.open_parquet(path, with_images=True)
        if key is None and [other.name for other in files].count(path.name) > 1:
            raise UserError(f"{path}: its rows have no id, and another file has its name, by which they are told apart "
                            "then; rename one")
        first = len(rows)
        for group in range(file.num_row_groups):
            groups.append((path, group, file.metadata.row_group(group).num_rows, images))
            names = read_column(path, group, key) if key else itertools.repeat(None)
            for name, value in zip(names, read_column(path, group, captions), strict=False):
                values = value if isinstance(value, list) else [value]
                values = [caption.strip() for caption in values if isinstance(caption, str) and caption.strip()]
                rows.append((f"{path.name}:{len(rows) - first}" if name is None else name, values))
    rows = rows[:args.limit]
    ids, texts = [name for name, _ in rows], [caption for _, captions in rows for caption in captions]
    text_ids = [name for name, captions in rows for _ in captions]
    if not texts:
        raise UserError(f"{', '.join(args.data)}: no row has a caption")
    print(f"{len(files)} parquet files: {len(ids)} images, {len(texts)} captions")
    n_tokens = None
    if args.tokens:  # of the longest text
        parts = (texts[i:i + TEXT_SHARD] for i in range(0, len(texts), TEXT_SHARD))
        n_tokens = max(len(item) for part in parts for item in tokenize(text, tokenizer, part, args, how))
    stream = None

    def prepare(rows):  # a process's shards come in order: the files are read once
        nonlocal stream
        stream = stream or read_images(groups, rows[0], SHARD * common.process()[1])
        contents = [next(stream) for _ in rows]
        return by_readers(functools.partial(read_pixels, processor=processor, dtype=DTYPES[args.weights]), contents,
                          args)

    def finish_images(outputs, kept):
        unreadable = [ids[i] for i in sorted(set(range(len(ids))) - set(kept))]
        return {}, {"feats": outputs[0], "ids": [ids[i] for i in kept], "unreadable": unreadable, "model": vision.stem}

    def finish_texts(outputs, _):
        content = {"feats": outputs[0], "ids": text_ids, "model": text.stem}
        return {}, {**content, "mask": outputs[1].bool()} if args.tokens else content

    job = model_job(vision, processor, pool="tokens" if args.tokens else "own", n=len(ids),
                    data=common.fingerprint(files))
    names = [f"row {i}, id {name}" for i, name in enumerate(ids)]
    encode_rows(Path(args.out) / "image_features.pt", job, names, SHARD, prepare,
                lambda: image_forward(vision, args, args.tokens), finish_images, args)
    encode_texts(Path(args.out) / "text_features.pt", (text, tokenizer, how), texts, args, finish_texts, n_tokens)


# ------------------------------------------------------------------------------------------------------- command line

def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function):
        """A subcommand with the options that all have; returns add(names, help, default, ..), which makes another."""
        sub = commands.add_parser(function.__name__, description=function.__doc__, help=function.__doc__)
        sub.set_defaults(run=function)

        def add(names, help, default=None, **more):
            shown = f"{help} (default: {' '.join(default) if isinstance(default, list) else default})"
            sub.add_argument(*names.split(), help=shown if default else help, default=default, **more)
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        n_workers = max(1, min(32, n_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        add("--limit", "only the first N images, items or films", type=positive, metavar="N")
        add("--device", "auto | cuda | cuda:1 | mps | cpu", "auto")
        add("--device-map", "spread a model over all GPUs (needs the package accelerate)", choices=("auto",))
        add("--batch-size", "rows a forward pass (default: 64; 8 on a CPU, whose memory is slow)", type=positive)
        add("--weights", "of the model; auto: bfloat16 on a GPU, else float32", "auto", choices=("auto", *DTYPES))
        add("--dtype", "of the features written", "float16", choices=tuple(DTYPES))
        add("--workers", "that decode: processes beside a GPU, else threads", n_workers, type=positive)
        add("--trust-remote-code", "run code that comes with a model", False, action="store_true")
        add("--max-length", "tokens that a text is cut to, or fewer if the model takes fewer", 512, type=positive)
        if function is not alignment:
            add("--text-pool", "tokens that stand for a text (default: the model's projection, else the last of a "
                "causal model, EOS, else the mean)", choices=("last", "mean", "first"))
            add("--normalize-texts", "pooled texts at unit length", False, action="store_true")
        return add

    add = command(coco)
    add("--images", "folder of the images", required=True)
    add("--captions", "COCO captions JSON", required=True)
    add("--split", "what the files' names begin with: train2017 or val2017", "train2017")
    add("--image-model", "of the images", "google/siglip-so400m-patch14-384")
    add("--text-model", "of the captions", "intfloat/e5-mistral-7b-instruct")
    add("--instruction", "E5's task: texts become 'Instruct: ...', newline, 'Query: caption'", "")
    add("--native-text", "also the captions through the image model's own text tower", False, action="store_true")
    add("--out", "folder to write to", "pretrain_encoded")
    add = command(mmimdb)
    add("--data", "folder with dataset/ ($MMIMDB1_DIR)", os.environ.get("MMIMDB1_DIR", "mmimdb"))
    add("--backbone", "name in the files: clip, blip2, or any word with your own models", "clip")
    add("--model", "of posters and plots (default: CLIP ViT-B/16 or BLIP-2 Flan-T5 XL, by --backbone)")
    add("--image-model", "of the posters (default: --model)")
    add("--text-model", "of the plots (default: --model)")
    add("--views", "rows a film, view 0 clean, the others augmented", 70, type=positive)
    add("--out", "folder to write to (default: latents/ in the data)")
    add = command(alignment)
    add("--captions", "JSON of captions and their rewrites at levels u")
    add("--images", "folder of the photos, one a caption")
    add("--image-names", "file of their names, a line each, in the order of the captions (default: sorted names)")
    add("--mmimdb", "posters and plots of this folder instead of photos and captions", metavar="DIR")
    add("--language", "causal language models, other text encoders", [], nargs="+", metavar="MODEL")
    add("--vision", "vision transformers, also CLIP's and timm's", [], nargs="+", metavar="MODEL")
    add("--vision-pool", "CLS token, or mean over the tokens, after each block", "cls", choices=("cls", "avg"))
    add("--out", "folder to write to", "prh")
    add = command(flickr8k)
    add("--data", "folder with Flickr8k_Dataset/", "flickr8k")
    add("--image-model --model", "of the photos", "google/siglip-so400m-patch14-384")
    add("--text-model", "of the captions (default: no text_features.pt)")
    add("--speech-model", "Whisper, wav2vec 2.0, HuBERT or WavLM (default: no audio_features.pt)")
    add("--corruptions", "also the corrupted queries of the test-time protocol", False, action="store_true")
    add("--out", "folder to write to (default: the data's)")
    add = command(pixmo)
    add("--data", "parquet files, folders or globs", ["pixmo"], nargs="+")
    add("--image-model", "of the images", "openai/clip-vit-large-patch14-336")
    add("--text-model", "of the captions", "sentence-transformers/all-mpnet-base-v2")
    add("--caption-column", "text or list of texts (default: caption, text, captions or transcripts)")
    add("--tokens", "every token, for attention pooling, instead of pooled features", False, action="store_true")
    add("--out", "folder to write to", "pixmo/features")
    return parser.parse_args(argv)


@contextlib.contextmanager
def the_first_says_why():
    """Of several processes the first that fails says why, in a line; the others fail for it, and say nothing."""
    try:
        yield
    except Exception as error:
        if common.process()[1] > 1:
            if dist.distributed_c10d._get_default_store().add("failed", 1) > 1:
                sys.exit(1)
            if isinstance(error, UserError):  # of those only process 0's are printed
                raise OSError(str(error)) from None
        raise


@common.exit_codes
def main(argv=None):
    args = parse_command_line(argv)
    common.join_processes(args.device)
    with the_first_says_why():
        args.device = common.pick_device(args.device)
        if args.weights == "auto":
            args.weights = "bfloat16" if args.device.type == "cuda" else "float32"
        args.batch_size = args.batch_size or (8 if args.device.type == "cpu" else 64)
        if args.command == "mmimdb" and args.dtype == "bfloat16":
            raise UserError("--dtype bfloat16: latents are .npy files, which have no bfloat16; use float16 or float32")
        if args.device_map and common.process()[1] > 1:
            raise UserError("--device-map spreads a model over all GPUs, torchrun gives each process one: use either")
        with open_readers(args) as args.readers:
            args.run(args)


if __name__ == "__main__":
    sys.exit(main())
