"""Raw data sets -> the embedding files that the experiments read. Needs `transformers` (>= 5.20).

    python encode.py coco --images train2017 --captions captions_train2017.json --split train2017 --native-text
    python encode.py mmimdb --data mmimdb --backbone clip        # or blip2, or models of your own
    python encode.py alignment --captions captions.json --images photos --language gpt2 --vision facebook/dinov2-base
    python encode.py alignment --mmimdb mmimdb --out mmimdb/features --language gpt2 --vision facebook/dinov2-base
    python encode.py flickr8k --data flickr8k --text-model sentence-transformers/all-MiniLM-L6-v2 --corruptions
    python encode.py pixmo --data pixmo --out pixmo/features     # --tokens: every token, for attention pooling

Models are folders or names on huggingface.co, with @revision if wanted; HF_HUB_OFFLINE=1 uses only what has been
downloaded. What a model takes is checked before anything is encoded. Rows are encoded in shards; the same command
after a kill goes on at the first unfinished one and gives the bits of a run that was not interrupted. Beside every
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
import glob
import hashlib
import importlib.metadata
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
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
    return "; ".join([f"{type(error).__name__}: {lines[0]}", *hints])


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
        raise UserError(f"model {name}: a {source.kind} takes no {needs}; give one that does, such as "
                        f"{INPUTS[needs][1]}")
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
        raise UserError(f"model {name}: NaFlex models, with patches instead of pictures, are not known here; take a "
                        "fixed-size SigLIP 2")
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
        raise UserError(f"model {name}: its language model has no encoder; take a BLIP-2 with T5, such as "
                        "Salesforce/blip2-flan-t5-xl")
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
    ids = torch.full((len(items), length), pad_id)
    for row, item in enumerate(items):
        ids[row, :len(item)] = torch.tensor(item)
    mask = torch.arange(length) < torch.tensor([len(item) for item in items])[:, None]
    return ids.to(device), mask.long().to(device)


def pool_tokens(hidden, mask, how):
    """hidden [B, T, D], mask [B, T] of 0/1 -> [B, D] float32: the last token that is no padding, the first, or their
    mean."""
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


def pixels_of(image, processor):
    """[3, H, W] float32 of a picture, or the reason why there are none, a str."""
    if isinstance(image, str):
        return image
    try:
        return processor(images=image, return_tensors="pt")["pixel_values"][0].float().numpy()
    except Exception as error:  # a size that this processor cannot handle
        return common.reason_of(error)


def image_preparer(files, processor, args):
    """prepare(rows) -> pixels, or the reason why there are none."""
    return lambda rows: list(args.readers.map(lambda row: pixels_of(read_image(files[row]), processor), rows))


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
        pixels = torch.from_numpy(np.stack(items)).to(model.device, DTYPES[args.weights])
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
        pixels = torch.from_numpy(np.stack(items)).to(model.device, DTYPES[args.weights])
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
    """The text with that share of its words (at least one) replaced by the tokenizer's mask token, or left out where it
    has none."""
    words = text.split()
    places = set(draws.sample(range(len(words)), min(len(words), max(1, round(share * len(words))))))
    return " ".join(mask_token if i in places else word
                    for i, word in enumerate(words) if i not in places or mask_token)


def rewrite_captions(captions, seed=0):
    """Items as exp_alignment_corr.py reads them: each caption with u% of its words replaced, u = 10..100, by words
    drawn from all captions (as often as they occur there). What is replaced at one level stays so at the next."""
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
            sentences[f"Caption {level} - {u}%"] = " ".join(
                new[j] if j in replaced else word for j, word in enumerate(words))
        items.append({f"Index - {i}": {"original": caption, "sentences": sentences}})
    return items


# ----------------------------------------------------------------------------------------------------- rows in shards

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
    keys = [key for key in {**found, **job} if found.get(key) != job.get(key)]
    if keys:
        changes = [f"{key}={json.dumps(found.get(key))} (now {json.dumps(job.get(key))})" for key in keys]
        named = ", ".join(change if len(change) < 150 else change.split("=")[0] for change in changes)
        data = ", where data are the texts or pictures, of which some were changed or mended" if "data" in keys else ""
        raise UserError(f"{where} was made otherwise: {named}{data}; move it away, or choose another --out")


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


def run_batches(forward, items, batch_size):
    """(outputs of forward for the items that are no str, in their order; which items these are). The longest are run
    first, like lengths together; pictures stay in order."""
    good = sorted((i for i, item in enumerate(items) if not isinstance(item, str)), key=lambda i: -len(items[i]))
    batches = [good[i:i + batch_size] for i in range(0, len(good), batch_size)]
    parts = [[x.cpu() for x in forward([items[i] for i in batch])] for batch in batches]
    order = torch.tensor(good).argsort()
    return [torch.cat(column)[order] for column in zip(*parts, strict=True)], sorted(good)


def check_room(path, n, shapes, dtypes):
    """Raise UserError if n rows do not fit on the disk, twice: the finished file is a copy."""
    row_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=False))
    needed, free = 2 * n * row_bytes / 1e9, shutil.disk_usage(path.parent).free / 1e9
    if needed > free:
        raise UserError(f"{path}: {n} rows of {shapes[0]} need {needed:.3g} GB while they are made, {free:.3g} GB are "
                        "free there; make room, choose another --out, or take fewer with --limit")


def encode_rows(path, job, names, shard, prepare, load_forward, finish, args):
    """Encode len(names) rows in shards into `path`, or go on where an earlier run of the same job stopped. Returns the
    manifest.

    job: dict of all that decides the content. names: of the rows, for messages and the list of bad images.
    prepare(rows) -> items for the model, or a str where a row has none; it runs one shard ahead in a thread.
    load_forward() -> forward(items) -> tuple of [B, ...] tensors: features, stored as args.dtype, and perhaps float32
    numbers beside them. finish(outputs, kept) -> (facts for the manifest, content of `path`), where outputs are the
    rows that have an item and the list kept says which they are; a dict is completed by what every such file says.
    Finished shards are in `.{name}.work/`, which is removed at the end; its state.json says how many there are.
    """
    path, n, dtypes = Path(path), len(names), (DTYPES[args.dtype], torch.float32)
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
        raise UserError(f"{path} exists and has no {manifest_file.name}: it was not made by this command; move it "
                        "away, or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    empty = {"job": job, "done": 0, "written": 0, "shapes": [], "bad": {}, "bad_rows": [], "n_cut": 0}
    state = common.read_json(state_file) if state_file.exists() else empty
    check_same_job(state["job"], job, f"the unfinished {work}")
    if state["done"]:
        print(f"{path.name}: going on at {state['done']} of {n} rows", flush=True)
    shards = [range(i, min(i + shard, n)) for i in range(state["done"], n, shard)]
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        forward = load_forward() if shards else None
        future = ahead.submit(prepare, shards[0]) if shards else None
        for rows, following in zip(common.progress(shards, path.name), [*shards[1:], None], strict=True):
            items = future.result()
            future = ahead.submit(prepare, following) if following else None
            outputs, good = run_batches(forward, items, args.batch_size)
            if outputs and not state["shapes"]:
                state["shapes"] = [list(x.shape[1:]) for x in outputs]
                check_room(path, n, state["shapes"], dtypes)
            for k, x in enumerate(outputs):
                block = x.to(dtypes[k])
                broken = [i for i, row in zip(good, block, strict=True) if k == 0 and not torch.isfinite(row).all()]
                if broken:
                    raise UserError(f"model {job['model']}: features of {names[rows[broken[0]]]} are not finite with "
                                    f"--weights {args.weights} --dtype {args.dtype}; try float32 for both")
                write_rows(work / f"{k}.bin", state["written"], block)
            for i, item in enumerate(items):
                if isinstance(item, str):
                    state["bad"][str(names[rows[i]])] = item
                    state["bad_rows"].append(rows[i])
                    if state["shapes"]:  # not all of a folder that is not there
                        print(f"cannot be read: {names[rows[i]]} ({item})", flush=True)
            state["n_cut"] += sum(item.is_cut for item in items if isinstance(item, Tokens))
            state["done"], state["written"] = rows[-1] + 1, state["written"] + len(good)
            common.write_json(state_file, state)
    if not state["shapes"]:
        shutil.rmtree(work)
        name, reason = next(iter(state["bad"].items()))
        raise UserError(f"{path.name}: none of the {n} images can be read, the first: {name} ({reason})")
    outputs = []  # mapped, not read
    for k, shape in enumerate(state["shapes"]):
        size = state["written"] * math.prod(shape)
        outputs.append(torch.from_file(str(work / f"{k}.bin"), size=size, dtype=dtypes[k]).view(-1, *shape))
    facts, content = finish(outputs, sorted(set(range(n)) - set(state["bad_rows"])))
    counts = {"n_cut": state["n_cut"], "n_bad_images": len(state["bad"])}
    manifest = {**counts, **facts, "bad_images": state["bad"], "batch_size": args.batch_size,
                "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "pillow")},
                "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
                "job": job}
    common.write_json(manifest_file, manifest)
    if isinstance(content, dict):
        content = {**content, "family": job["family"], **counts, "fingerprint": digest(job)}
    if path.suffix == ".npy":
        common.atomic_write(path, lambda file: np.save(file, content.numpy()))
    else:
        common.atomic_write(path, lambda file: torch.save(content, file))
    shutil.rmtree(work)
    print(f"{path}: {state['written']} rows {state['shapes'][0]} {args.dtype}; images that cannot be read: "
          f"{counts['n_bad_images']}, texts that were cut: {counts['n_cut']}")
    return manifest


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
        raise UserError(f"--native-text: {vision.name}, a {vision.kind}, has no text tower for the images' space; take "
                        "SigLIP or CLIP")
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
    dataset = folder_of(root / "dataset", "MM-IMDb's plots and posters (the unpacked mmimdb.tar.gz)")
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


def mmimdb(args):
    """latents/mm_imdb1_globals_aug{views}_{backbone}_{image,text}.npy for exp_gw_mmimdb.py."""
    root, views = Path(args.data), args.views
    ids, out = film_ids(root, args.limit), Path(args.out or root / "latents")
    defaults = {"clip": "openai/clip-vit-base-patch16", "blip2": "Salesforce/blip2-flan-t5-xl"}
    both = args.model or defaults.get(args.backbone)
    if not both and not (args.image_model and args.text_model):
        raise UserError(f"--backbone {args.backbone}: name its models, --image-model and --text-model, or one of both, "
                        "--model")
    vision, processor = open_images(args.image_model or both, args)
    text, tokenizer, how = open_texts(args.text_model or both, args)
    plots = [" ".join(summaries) for summaries in film_plots(root, ids)]
    posters = [root / "dataset" / f"{film}.jpeg" for film in ids]

    def read_poster(film):
        poster = read_image(posters[film])
        return poster, pixels_of(poster, processor)

    def prepare_images(rows):  # a shard holds whole films: each poster is read once, then each view is a task
        films = range(rows[0] // views, rows[-1] // views + 1)
        read = dict(zip(films, args.readers.map(read_poster, films), strict=True))

        def view_pixels(row):
            film, view = divmod(row, views)
            poster, clean = read[film]
            if view == 0 or isinstance(clean, str):
                return clean
            size = clean.shape[:0:-1]  # (width, height) that the model sees
            return pixels_of(augment_image(poster, size, view_draws(ids[film], view, "image")), processor)
        return list(args.readers.map(view_pixels, rows))

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

    encode("image", model_job(vision, processor, data=digest(file_sizes(posters))), SHARD, prepare_images,
           lambda: image_forward(vision, args))
    encode("text", model_job(text, **text_facts(how, args), data=digest(plots)), TEXT_SHARD, prepare_texts,
           lambda: text_forward(text, tokenizer, args, how))


# ---------------------------------------------------------------------------------------------------------- alignment

def read_list(path):
    """[N] strings of a text file, a line each, or of a JSON list of strings or of {"image": name}. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        items = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        items = [" ".join((item["image"] if isinstance(item, dict) else item).split()) for item in items]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: expected a text file with a line each, or a JSON list of strings "
                        f"({common.reason_of(error)})") from None
    if not items or not all(items):
        raise UserError(f"{path}: " + (f"line {items.index('') + 1} is empty" if items else "nothing in it"))
    return items


def write_rewritten(args):
    """Make {out}/captions.json of --rewrite-captions; returns its path."""
    path, items = Path(args.out) / "captions.json", rewrite_captions(read_list(args.rewrite_captions), args.seed)
    content = json.dumps(items, indent=1, ensure_ascii=False) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != content:
        raise UserError(f"{path} exists and holds other captions; move it away, or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_text(path, content)
    print(f"{path}: {len(items)} captions at u = 0, 10 .. 100")
    return path


def read_items(args):
    """(ids [N], {folder of language features: texts [N]}, pictures [N] or None) of the alignment command."""
    if args.mmimdb:
        root = Path(args.mmimdb)
        ids = film_ids(root, args.limit)
        texts = [next((summary for summary in summaries if len(summary.split()) > 1), summaries[0])
                 for summaries in film_plots(root, ids)]  # the first that is longer than a word
        return ids, {"language": texts}, [root / "dataset" / f"{film}.jpeg" for film in ids]
    if not args.captions:
        raise UserError("alignment needs --captions (or --rewrite-captions) for photos and captions, or --mmimdb for "
                        "films")
    from exp_alignment_corr import read_captions
    levels = {f"gpt_u={u}_features": texts[:args.limit] for u, texts in read_captions(args.captions).items()}
    ids = [next(iter(item)) for item in json.loads(Path(args.captions).read_text(encoding="utf-8"))]
    if len(set(ids)) < len(ids):
        raise UserError(f"{args.captions}: an item is named twice; features are matched by name")
    if args.vision and not args.images:
        raise UserError("--vision needs --images, the photos of the captions")
    if not args.images:
        return ids[:args.limit], levels, None
    folder = folder_of(args.images, "the photos of the captions")
    pictures = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    names = read_list(args.image_names) if args.image_names else pictures
    if len(names) != len(ids):
        raise UserError(f"{args.images}: {len(names)} photos for the {len(ids)} captions of {args.captions}; name "
                        "theirs, in order, with --image-names")
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
    if not (args.language or args.vision or args.rewrite_captions):
        raise UserError("alignment: name models to encode with, --language MODEL ... and / or --vision MODEL ...")
    out = Path(args.out)
    if args.rewrite_captions:
        args.captions = write_rewritten(args)
        if not (args.language or args.vision):
            return
    ids, levels, files = read_items(args)
    language = [open_language(name, args) for name in args.language]
    vision = [open_images(name, args) for name in args.vision]
    for stems in ([source.stem for source, _ in opened] for opened in (language, vision)):
        if len(set(stems)) < len(stems):
            raise UserError(f"two models would both write {max(stems, key=stems.count)}.pt; encode them into different "
                            "--out folders")
    for source, processor in vision:  # tried now: hours of texts come first
        vision_forward(source, processor, args)
    pictures = args.readers.map(read_image, files) if files else [""] * len(ids)
    reasons = [picture if isinstance(picture, str) else "" for picture in pictures]
    for i, reason in enumerate(reasons):  # an item without a picture is left out on both sides
        if reason:
            print(f"cannot be read: {files[i]} ({reason}); {ids[i]} is left out", flush=True)
    good = [i for i, reason in enumerate(reasons) if not reason]
    if not good:
        raise UserError(f"none of the {len(ids)} pictures can be read, the first: {files[0]} ({reasons[0]})")
    n_left_out = len(ids) - len(good)
    ids, files = [ids[i] for i in good], [files[i] for i in good] if files else None

    def finish(outputs, kept, source, texts):
        facts = {"n_left_out": n_left_out}
        content = {"feats": outputs[0], "ids": [ids[i] for i in kept], "model": source.stem,
                   "pool": "avg" if texts else args.vision_pool}
        if len(outputs) == 2:
            is_whole = ~outputs[1].isnan()
            facts["n_bytes"] = sum(len(text.encode()) for text, x in zip(texts, is_whole.tolist(), strict=True) if x)
            bits = float(outputs[1][is_whole].double().sum()) / math.log(2)
            facts["bpb"] = bits / facts["n_bytes"] if facts["n_bytes"] else None
        if not texts:
            content["files"] = [files[i].name for i in kept]
        return facts, {**content, **facts}

    for source, tokenizer in language:
        load_once = functools.cache(functools.partial(language_forward, source, tokenizer, args))  # for all levels
        for folder, all_texts in levels.items():
            texts = [all_texts[i] for i in good]

            def prepare(rows, source=source, tokenizer=tokenizer, texts=texts):
                return tokenize(source, tokenizer, [texts[i] for i in rows], args,
                                "start" if source.is_causal else "mean")
            job = model_job(source, pool="avg", max_length=args.max_length, data=digest([ids, texts]))
            encode_rows(out / folder / f"{source.stem}.pt", job, ids, SHARD, prepare, load_once,
                        functools.partial(finish, source=source, texts=texts), args)
        load_once.cache_clear()  # frees the model
    for source, processor in vision:
        job = model_job(source, processor, pool=args.vision_pool, data=digest([ids, file_sizes(files)]))
        encode_rows(out / "vision" / f"{source.stem}.pt", job, ids, SHARD, image_preparer(files, processor, args),
                    functools.partial(vision_forward, source, processor, args),
                    functools.partial(finish, source=source, texts=None), args)


# ----------------------------------------------------------------------------------------------------------- flickr8k

def flickr8k(args):
    """{image,text,audio}_features.pt, and those of corrupted queries, for exp_flickr_ttt.py's cached encoders."""
    import exp_flickr_ttt as flickr
    root = folder_of(args.data, "Flickr8k_Dataset (the unpacked Flickr8k_Dataset.zip)")
    folders = [root / name for name in ("Flickr8k_Dataset", "Flicker8k_Dataset", "Images")]
    photos = next((folder for folder in folders if folder.is_dir()), folders[0])
    photo_names = sorted(path.name for path in photos.glob("*.jpg"))[:args.limit]
    if not photo_names:
        raise UserError(f"{photos}: no photos (*.jpg) in it; unpack Flickr8k_Dataset.zip")
    splits = flickr.read_splits(root)[0] if args.corruptions else {}

    vision, processor = open_images(args.image_model, args)
    sizes = [getattr(processor, "size", None), getattr(processor, "crop_size", None)]
    side = max(length for size in sizes for length in dict(size or {}).values())

    def read_photo(name, kind, amount):
        image = read_image(photos / name)
        if kind and not isinstance(image, str):
            scale = side / min(image.size)
            image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
            photo = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            photo = flickr.corrupt_photo(photo, kind, amount, flickr.item_draws(name))
            image = Image.fromarray(photo.permute(1, 2, 0).numpy())
        return pixels_of(image, processor)

    # modality -> model, {name: its photo}, read(name, kind, amount) -> item, load_forward, shard, facts of the job
    parts = {"image": (vision, {name: name for name in photo_names}, read_photo, lambda: image_forward(vision, args),
                       SHARD, {"processor": processor, "data": digest(file_sizes(photos / n for n in photo_names))})}
    if args.text_model:
        text, tokenizer, how = open_texts(args.text_model, args)
        captions = flickr.read_captions(root)[0]
        texts = {f"{photo}#{k}": caption for photo in photo_names
                 for k, caption in sorted(captions.get(photo, {}).items())}

        def read_text(name, kind, amount):
            caption = texts[name]
            caption = flickr.corrupt_text(caption, kind, amount, flickr.item_draws(name)) if kind else caption
            return tokenize(text, tokenizer, [caption], args, how)[0]
        parts["text"] = (text, {name: name.rpartition("#")[0] for name in texts}, read_text,
                         lambda: text_forward(text, tokenizer, args, how), TEXT_SHARD,
                         {**text_facts(how, args), "data": digest(texts)})
    if args.speech_model:
        speech = find_model(args.speech_model, "speech", args.trust_remote_code)
        listed = flickr.read_speech_list(root)[0].items()
        wavs = {path.name: (path, photo) for (photo, _), path in listed if photo in set(photo_names)}
        if not wavs:
            raise UserError(f"{root}: no recordings of these photos (flickr_audio/wav2capt.txt); leave --speech-model "
                            "out")

        def read_wave(name, kind, amount):
            try:
                wave = flickr.read_wav(wavs[name][0].read_bytes())
            except Exception as error:  # soundfile raises kinds of its own
                return common.reason_of(error)
            return (flickr.corrupt_speech(wave, kind, amount, flickr.item_draws(name)) if kind else wave).numpy()
        parts["audio"] = (speech, {name: wavs[name][1] for name in sorted(wavs)}, read_wave,
                          lambda: speech_forward(speech, args), SHARD,
                          {"data": digest(file_sizes(path for path, _ in wavs.values()))})
    for modality, (source, photo_of, read, load_forward, shard, facts) in parts.items():
        conditions = [(*flickr.CLEAN, None)]
        if args.corruptions:
            conditions += [(kind, x, "test") for kind, amounts in flickr.CORRUPTIONS[modality].items() for x in amounts]
            conditions.append((*flickr.HELD_OUT[modality], "dev"))
        load_once = functools.cache(load_forward)
        for kind, amount, split in conditions:
            asked = [name for name, photo in photo_of.items() if split is None or photo in splits[split]]
            path = Path(args.out or root) / f"{modality}_features{flickr.condition_suffix(kind, amount)}.pt"
            if not asked:
                raise UserError(f"{path}: no {modality} of a {split} photo is here (--limit?)")

            def prepare(rows, asked=asked, kind=kind, amount=amount, read=read):
                return list(args.readers.map(lambda row: read(asked[row], kind, amount), rows))

            def finish(outputs, kept, asked=asked, source=source):
                ids = [asked[i] for i in kept]
                return {}, {"feats": outputs[0], "ids": ids, "unreadable": sorted(set(asked) - set(ids)),
                            "model": source.stem}
            job = model_job(source, **facts, names=digest(asked), corruption=[kind, amount])
            encode_rows(path, job, asked, shard, prepare, load_once, finish, args)


# -------------------------------------------------------------------------------------------------------------- pixmo

IMAGE_COLUMNS = ("image_bytes", "image", "jpg", "bytes")  # in the order of preference
CAPTION_COLUMNS = ("caption", "text", "captions", "transcripts")
ID_COLUMNS = ("image_id", "id", "key", "image_url", "url")


def parquet_files(patterns):
    """The parquet files of files, folders and globs, sorted. Raises: UserError."""
    files = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        files += sorted(path.glob("**/*.parquet") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise UserError(f"{', '.join(patterns)}: no parquet files there; download PixMo with its images, and name its "
                        "files or folder with --data")
    return files


def open_parquet(path, caption_column=None):
    """(pyarrow ParquetFile; names of its image and caption column, and of its ids' or None). Raises: UserError."""
    import pyarrow
    import pyarrow.parquet
    file = common.guarded(lambda p: pyarrow.parquet.ParquetFile(p, pre_buffer=False, buffer_size=1 << 20), path)
    kinds = {field.name: field.type for field in file.schema_arrow}

    def holds_bytes(kind):
        if pyarrow.types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    image = next((name for name in IMAGE_COLUMNS if name in kinds and holds_bytes(kinds[name])), None)
    if image is None:
        raise UserError(f"{path}: holds no image bytes (columns {', '.join(kinds)}); expected one of "
                        f"{', '.join(IMAGE_COLUMNS)}: take a release that embeds the images, not their URLs alone")
    wanted = [caption_column] if caption_column else CAPTION_COLUMNS
    caption = next((name for name in wanted if name in kinds), None)
    if caption is None:
        raise UserError(f"{path}: no captions {' or '.join(wanted)} (columns {', '.join(kinds)}); name theirs with "
                        "--caption-column")
    return file, image, caption, next((name for name in ID_COLUMNS if name in kinds), None)


def read_captions(path, caption_column=None):
    """[N] (id, list of captions) of a parquet file; an id that no column gives is "file:row"."""
    file, _, caption, key = open_parquet(path, caption_column)
    rows = []
    with file:
        for batch in file.iter_batches(columns=[name for name in (caption, key) if name], use_threads=False):
            ids = batch.column(key).to_pylist() if key else [None] * len(batch)
            for name, texts in zip(ids, batch.column(caption).to_pylist(), strict=True):
                texts = texts if isinstance(texts, list) else [texts]
                texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
                rows.append((f"{path.name}:{len(rows)}" if name is None else name, texts))
    return rows


def read_images(files, first):
    """Yields the image bytes of every row from row `first` of all files on, 64 rows in memory at a time."""
    for path in files:
        file, image, *_ = open_parquet(path)
        with file:
            for group in range(file.num_row_groups):
                n_rows = file.metadata.row_group(group).num_rows
                if first < n_rows:
                    for batch in file.iter_batches(64, row_groups=[group], columns=[image], use_threads=False):
                        for value in batch.column(image)[first:].to_pylist():
                            yield (value.get("bytes") if isinstance(value, dict) else value) or b""
                        first = max(0, first - len(batch))
                else:
                    first -= n_rows


def pixmo(args):
    """{image,text}_features.pt, a text row a caption, for exp_pixmo_mrl.py's cached encoders."""
    files, out = parquet_files(args.data), Path(args.out)
    vision, processor = open_images(args.image_model, args)
    text, tokenizer, how = open_texts(args.text_model, args)
    read = functools.partial(read_captions, caption_column=args.caption_column)
    rows = [row for path in files for row in common.guarded(read, path)][:args.limit]
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

    def prepare(rows):  # shards come in order: the files are read once, from the first unfinished shard on
        nonlocal stream
        stream = stream or read_images(files, rows[0])
        contents = [next(stream) for _ in rows]
        return list(args.readers.map(lambda content: pixels_of(read_image(content), processor), contents))

    def finish_images(outputs, kept):
        unreadable = [ids[i] for i in sorted(set(range(len(ids))) - set(kept))]
        return {}, {"feats": outputs[0], "ids": [ids[i] for i in kept], "unreadable": unreadable, "model": vision.stem}

    def finish_texts(outputs, _):
        content = {"feats": outputs[0], "ids": text_ids, "model": text.stem}
        return {}, {**content, "mask": outputs[1].bool()} if args.tokens else content

    job = model_job(vision, processor, pool="tokens" if args.tokens else "own", n=len(ids),
                    data=common.fingerprint(files))
    names = [f"row {i}, id {name}" for i, name in enumerate(ids)]
    encode_rows(out / "image_features.pt", job, names, SHARD, prepare,
                lambda: image_forward(vision, args, args.tokens), finish_images, args)
    encode_texts(out / "text_features.pt", (text, tokenizer, how), texts, args, finish_texts, n_tokens)


# ------------------------------------------------------------------------------------------------------- command line

def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function):
        """A subcommand with the options that all have; returns its add_argument."""
        sub = commands.add_parser(function.__name__, description=function.__doc__, help=function.__doc__)
        sub.set_defaults(run=function)
        add = sub.add_argument
        add("--limit", type=positive, metavar="N", help="only the first N images, items or films")
        add("--device", default="auto", help="auto | cuda | cuda:1 | mps | cpu")
        add("--device-map", choices=("auto",), help="spread a model over all GPUs (needs the package accelerate)")
        add("--batch-size", type=positive, help="rows a forward pass (default: 64; 8 on a CPU, whose memory is slow)")
        add("--weights", choices=("auto", *DTYPES), default="auto", help="of the model (auto: bfloat16 on a GPU, else "
                                                                         "float32)")
        add("--dtype", choices=tuple(DTYPES), default="float16", help="of the features written (default: float16)")
        add("--workers", type=positive, default=os.cpu_count() or 1, help="threads that decode (default: one a core)")
        add("--trust-remote-code", action="store_true", help="run code that comes with a model (default: refuse such)")
        add("--max-length", type=positive, default=512, help="tokens that a text is cut to (default: 512, or fewer if "
                                                             "the model takes fewer)")
        if function is not alignment:
            add("--text-pool", choices=("last", "mean", "first"), help="tokens that stand for a text (default: the "
                "model's projection, else the last of a causal model, EOS, else the mean)")
            add("--normalize-texts", action="store_true", help="pooled texts at unit length, as many sentence "
                                                               "encoders are used")
        return add

    add = command(coco)
    add("--images", required=True, help="folder of the images")
    add("--captions", required=True, help="COCO captions JSON")
    add("--split", default="train2017", help="what the files' names begin with: train2017 (default) or val2017")
    add("--image-model", default="google/siglip-so400m-patch14-384", help="(default: %(default)s)")
    add("--text-model", default="intfloat/e5-mistral-7b-instruct", help="(default: %(default)s)")
    add("--instruction", default="", help="E5's task: texts become 'Instruct: ...', newline, 'Query: caption'")
    add("--native-text", action="store_true", help="also the captions through the image model's own text tower")
    add("--out", default="pretrain_encoded", help="folder to write to (default: %(default)s)")
    add = command(mmimdb)
    add("--data", default=os.environ.get("MMIMDB1_DIR", "mmimdb"), help="folder with dataset/ (default: $MMIMDB1_DIR, "
                                                                        "else mmimdb)")
    add("--backbone", default="clip", help="name in the files: clip (default), blip2, or any word with your own models")
    add("--model", help="of posters and plots (default: CLIP ViT-B/16 or BLIP-2 Flan-T5 XL, by --backbone)")
    add("--image-model", help="of the posters (default: --model)")
    add("--text-model", help="of the plots (default: --model)")
    add("--views", type=positive, default=70, help="rows a film, view 0 clean, the others augmented (default: 70)")
    add("--out", help="folder to write to (default: latents/ in the data)")
    add = command(alignment)
    add("--captions", help="JSON of captions and their rewrites at levels u")
    add("--rewrite-captions", metavar="FILE", help="make it, {out}/captions.json, of plain captions (a line each)")
    add("--seed", type=int, default=0, help="of --rewrite-captions")
    add("--images", help="folder of the photos, one a caption")
    add("--image-names", help="file of their names in the order of the captions (default: sorted names)")
    add("--mmimdb", metavar="DIR", help="posters and plots of this folder instead of photos and captions")
    add("--language", nargs="+", default=[], metavar="MODEL", help="causal language models, other text encoders")
    add("--vision", nargs="+", default=[], metavar="MODEL", help="vision transformers, also CLIP's and timm's")
    add("--vision-pool", choices=("cls", "avg"), default="cls", help="CLS token (default), or mean, after each block")
    add("--out", default="prh", help="folder to write to (default: %(default)s)")
    add = command(flickr8k)
    add("--data", default="flickr8k", help="folder with Flickr8k_Dataset/ (default: %(default)s)")
    add("--image-model", "--model", default="google/siglip-so400m-patch14-384", help="(default: %(default)s)")
    add("--text-model", help="of the captions (default: no text_features.pt)")
    add("--speech-model", help="Whisper, wav2vec 2.0, HuBERT or WavLM (default: no audio_features.pt)")
    add("--corruptions", action="store_true", help="also the corrupted queries of the test-time protocol")
    add("--out", help="folder to write to (default: the data's)")
    add = command(pixmo)
    add("--data", nargs="+", default=["pixmo"], help="parquet files, folders or globs (default: pixmo)")
    add("--image-model", default="openai/clip-vit-large-patch14-336", help="(default: %(default)s)")
    add("--text-model", default="sentence-transformers/all-mpnet-base-v2", help="(default: %(default)s)")
    add("--caption-column", help=f"text or list of texts (default: the first of {', '.join(CAPTION_COLUMNS)})")
    add("--tokens", action="store_true", help="features of every token, for attention pooling, instead of pooled ones")
    add("--out", default="pixmo/features", help="folder to write to (default: %(default)s)")
    return parser.parse_args(argv)


@common.exit_codes
def main(argv=None):
    args = parse_command_line(argv)
    args.device = common.pick_device(args.device)
    if args.weights == "auto":
        args.weights = "bfloat16" if args.device.type == "cuda" else "float32"
    args.batch_size = args.batch_size or (8 if args.device.type == "cpu" else 64)
    if args.command == "mmimdb" and args.dtype == "bfloat16":
        raise UserError("--dtype bfloat16: latents are .npy files, which have no bfloat16; use float16 or float32")
    with concurrent.futures.ThreadPoolExecutor(args.workers) as args.readers:
        args.run(args)


if __name__ == "__main__":
    sys.exit(main())
