"""What the five experiments share: config, losses, schedule, metrics, checkpoints, the run folder, a few plots.

Nothing here is an experiment: no data set, model, parameter group or training loop, and nothing that an ablation
would want to change. Functions take plain tensors and numbers, never a config section.

Shapes: N rows (pairs) of D features; Q queries against G gallery rows; C classes.
"""

import argparse
import ast
import contextlib
import dataclasses
import datetime
import difflib
import functools
import glob
import hashlib
import importlib.metadata
import inspect
import json
import math
import operator
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import types
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend (config, data, folder): reported in one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------- config

# Keys that do not change what is trained: they neither name the run's folder nor make it a different run. So are all that end in dir, _file or
# parquet: the data they name are known by their fingerprint.
NEUTRAL_KEYS = ("device", "num_workers", "wandb", "evaluation", "compare", "dim")


def is_neutral(key):
    """Whether a dotted config key leaves the run what it is."""
    return key.split(".")[0] in NEUTRAL_KEYS or key.endswith(("dir", "_file", "parquet", ".cache"))


def ranged(default, *bounds):
    """A dataclass field whose value must satisfy every bound, e.g. `ranged(0.1, ">= 0", "< 1")`."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


class _StrictLoader(yaml.BaseLoader):
    """YAML with every scalar left a string (the dataclass types it) and duplicate keys refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise UserError(f"line {node.value[i][0].start_mark.line + 1}: duplicate key {key!r}; keep one of the two")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The mapping in a YAML file, all scalars as strings. Raises UserError: no such file, bad syntax, duplicate key."""
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        known = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config{_nearest(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if raw in (None, ""):
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(raw).__name__}")
    return raw


def _nearest(word, known):
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _describe(kind):
    """A field type in the words of an error message."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null", dict: "a section"}
    return names.get(kind) or f"a list of {_describe((typing.get_args(kind) or (str,))[0]).removeprefix('a ')}s"


def _convert(value, kind):
    """What YAML gave, a string, list or dict, as `kind`; ValueError if it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda k: k is str):  # str takes anything: last
            try:
                return _convert(value, option)
            except ValueError:
                pass
        raise ValueError
    if origin is list or kind is list:
        if not isinstance(value, list):
            raise ValueError
        return [_convert(v, args[0] if args else str) for v in value]
    if kind is dict and isinstance(value, dict):
        return value
    if kind is dict or not isinstance(value, str):
        raise ValueError
    value, words = re.sub(r'^\\"(.*)\\"$', r"\1", value.strip()), None  # \"siglip\": quotes escaped by a Markdown editor
    if origin is typing.Literal:
        words = {str(option): option for option in args}
    elif kind is type(None):
        words = dict.fromkeys(("", "~", "null", "Null", "NULL", "None"))
    elif kind is bool:
        value, words = value.lower(), {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if words is not None:
        if value not in words:
            raise ValueError
        return words[value]
    number = kind(value)  # int("512"), float("1e-4"), str("no")
    if kind is float and not math.isfinite(number):
        raise ValueError
    return number


def flatten(tree, prefix="", leaves=()):
    """{'a': {'b': 1}} -> {'a.b': 1}, except for the dicts named in leaves. Raises: UserError on a key that is there twice, dotted and nested."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and prefix + key not in leaves
        for name, leaf in (flatten(value, f"{prefix}{key}.", leaves) if nested else {prefix + key: value}).items():
            if name in flat:
                raise UserError(f"duplicate key {name} (dotted and in its section); keep one of the two")
            flat[name] = leaf
    return flat


def config_schema(Config, prefix=""):
    """{'training.batch_size': (field, type)} in the order of the dataclasses; a section maps to None."""
    hints, keys = typing.get_type_hints(Config), {}
    for field in dataclasses.fields(Config):
        section = dataclasses.is_dataclass(hints[field.name])
        keys[prefix + field.name] = None if section else (field, hints[field.name])
        if section:
            keys.update(config_schema(hints[field.name], f"{prefix}{field.name}."))
    return keys


def typed(flat, schema, where):
    """A flat {dotted key: raw value} checked and converted against the schema of `config_schema`.

    Raises: UserError that begins with `where` and names the key: unknown, a section, of a wrong type, out of range.
    """
    values = {}
    for key, raw in flat.items():
        if key not in schema:
            known = [k for k in schema if schema[k]]
            same_leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            hint = f"; did you mean {same_leaf[0]}?" if same_leaf else _nearest(key, known)
            raise UserError(f"{where}: unknown key {key}{hint} (-h lists every key)")
        if schema[key] is None:  # a section: `training:` with nothing under it is fine, a value is not
            if raw == "":
                continue
            raise UserError(f"{where}: {key} is a section; set {key}.<key> instead of {key}={raw}")
        field, kind = schema[key]
        try:
            value = _convert(raw, kind)
        except (ValueError, OverflowError):
            hint = _nearest(str(raw), list(map(str, typing.get_args(kind)))) if typing.get_origin(kind) is typing.Literal else ""
            raise UserError(f"{where}: {key}: expected {_describe(kind)}, found {raw!r}{hint}") from None
        for bound in field.metadata.get("bounds", ()):
            op, limit = bound.split()
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
            compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}[op]
            if not all(compare(v, float(limit)) for v in numbers):
                raise UserError(f"{where}: {key}: must be {bound}, found {raw}")
        values[key] = value
    return values


def load_config(Config, path, overrides=(), demo=False):
    """The config dataclass from a YAML file and `key=value` overrides.

    Strings in the file are converted by the field's type, so `1e-4` is a number and `no` a word where a word is asked for.
    The file's `demo:` section is checked always and applied with `demo=True` (before the overrides). An empty
    `output_dir` becomes `results/[demo/]<file name>[,overrides that change the run]`.

    Args: Config: dataclass, nested one dataclass a section, with an `experiment` name and an `output_dir`.
        path: a YAML file, or None for the defaults. overrides: list of 'section.key=value'.
    Raises: UserError (a ValueError), in one line: unknown or duplicate key, wrong type, out of range, missing file,
        a YAML of another experiment.
    """
    cfg, schema = Config(), config_schema(Config)
    raw = read_yaml(path) if path is not None else {}
    name = raw.get("experiment", cfg.experiment)
    if name != cfg.experiment:
        raise UserError(f"{path}: is a config of exp_{name}.py (experiment: {name}), not of exp_{cfg.experiment}.py")
    demo_section = raw.pop("demo", None) or {}
    if not isinstance(demo_section, dict):
        raise UserError(f"{path}: demo is a section of keys, found {demo_section!r}")
    try:
        flat, demo_flat = flatten(raw, leaves=[k for k, v in schema.items() if v and v[1] is dict]), flatten(demo_section)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    values, demo_values = typed(flat, schema, path), typed(demo_flat, schema, f"{path}: demo")
    if demo:
        values.update(demo_values)
    changed = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"{item!r}: an override is written key=value, e.g. seed=1")
        changed[key.strip()] = value = text.strip()
        if value.startswith(("[", "{", '"', "'")):  # the rest stays as it is: a path may hold ` #` or `: `
            with contextlib.suppress(yaml.YAMLError):
                changed[key.strip()] = yaml.load(value, Loader=_StrictLoader)
    values.update(typed(changed, schema, "command line"))
    if "output_dir" in schema and values.get("output_dir", "") in ("", "null", "~"):
        stem = Path(path).stem if path is not None else cfg.experiment
        named = [f"{key}={_plain(changed[key])}" for key in sorted(changed) if not is_neutral(key)]
        folder = re.sub(r"[^\w.=,+\-\[\]]+", "_", ",".join([stem, *named]))
        if len(folder) > 200:  # file systems stop at 255 bytes
            folder = f"{folder[:180]}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"
        values["output_dir"] = str(Path("results", "demo" if demo else "", folder))
    for key, value in values.items():
        *sections, leaf = key.split(".")
        value = os.path.expanduser(value) if leaf.endswith("dir") else value
        setattr(functools.reduce(getattr, sections, cfg), leaf, value)
    return cfg


def _plain(value):
    return "[" + ",".join(map(_plain, value)) + "]" if isinstance(value, list) else "null" if value is None else str(value)


def _config_help(section, prefix=""):
    """One line a key: name, default, the trailing comment on the field in the source, choices and bounds."""
    source, lines = inspect.getsource(type(section)).splitlines(), []
    hints = typing.get_type_hints(type(section))
    statements = {n.target.id: source[n.end_lineno - 1] for n in ast.parse("\n".join(source)).body[0].body if isinstance(n, ast.AnnAssign)}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            lines += ["", *_config_help(value, f"{prefix}{field.name}.")]
            continue
        choices = f" [{_describe(hints[field.name])}]" if typing.get_origin(hints[field.name]) is typing.Literal else ""
        bounds = "".join(f" ({b})" for b in field.metadata.get("bounds", ()))
        lines.append(f"  {f'{prefix}{field.name}={_plain(value)}':44} {statements[field.name].partition('# ')[2]}{choices}{bounds}")
    return lines


def parse_command_line(argv, configs, doc, stages):
    """`config.yaml [key=value ...] [--stage S] [--demo] [--fresh]` -> arguments; -h lists every key of the config dataclasses."""
    keys = "\n\n".join("\n".join(_config_help(Config())) for Config in configs)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"config keys, defaults and meaning (set in the YAML, or as key=value):\n{keys}")
    parser.add_argument("config", help="a YAML file in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a config key, e.g. seed=1 training.learning_rate=3e-4")
    parser.add_argument("--stage", choices=stages, default="all", help="run only this part (default: all)")
    parser.add_argument("--demo", action="store_true", help="synthetic stand-in data, a run of about a minute on a laptop CPU")
    parser.add_argument("--fresh", action="store_true", help="move an existing run folder to .old-N and start again")
    args = parser.parse_intermixed_args(argv)
    if "=" in args.config and not Path(args.config).exists():
        parser.error(f"the config file comes first, found {args.config!r}")
    return args


def exit_codes(main):
    """Make `main(argv)` return 0 done, 2 a user's mistake, 1 anything else, 130/143 stopped by Ctrl-C/SIGTERM.

    What a user can cause is one line on stderr; only a bug shows a traceback.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(sys.argv[1:] if argv is None else argv)
            return 0
        except UserError as error:
            message, code = str(error), 2
        except Stopped as stop:
            message, code = str(stop), 128 + stop.signum
        except KeyboardInterrupt:
            message, code = "stopped by Ctrl-C", 130
        except torch.OutOfMemoryError as error:
            message, code = f"out of GPU memory ({str(error).split('. ')[0]}); lower the batch size or evaluation.chunk_size", 1
        except (OSError, FloatingPointError) as error:
            message, code = str(error), 1
        print(f"error: {' '.join(message.split())}" if code < 128 else message, file=sys.stderr)
        return code
    return wrapped


# ---------------------------------------------------------------------------------------------------- device, seeds, stop

def pick_device(name="auto"):
    """torch.device from "auto" (cuda, else mps, else cpu), "cuda", "mps" or "cpu"; also switches TF32 matmul on.

    Raises: UserError if the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind = name.partition(":")[0]
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind, False) or name not in (kind, *(f"{kind}:{i}" for i in range(count))):
        raise UserError(f"device={name} is not available here; use one of auto, {', '.join(k for k in available if available[k])}")
    torch.set_float32_matmul_precision("high")
    return torch.device(name)


@contextlib.contextmanager
def full_precision():
    """Float32 matrix products without TF32, for what is measured rather than trained."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def seed_everything(seed):
    """Seed Python, NumPy and torch (all devices) and ask for deterministic kernels, so that equal runs give equal bits."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def rng_state():
    """All random states as plain types and tensors (so that a checkpoint loads with weights_only=True)."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Stopped(Exception):
    """A run that ended itself after Ctrl-C or SIGTERM, with its checkpoint saved."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


class StopSignal:
    """Context in which the first Ctrl-C or SIGTERM only sets `.signum`, so that a loop can save and stop between steps.

    A second one acts at once.
    """

    def __enter__(self):
        self.signum = 0
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, frame):
        self.signum = signum
        for s, handler in self.previous.items():
            signal.signal(s, handler)

    def __exit__(self, *exc):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------- losses

BLOCK = 1024  # rows of the [N, N] logits held at once


def _row_blocks(block_fn, n_rows, chunk_size):
    """[block_fn(slice of rows), ...]; each block's [chunk, N] intermediates are recomputed in backward, not stored."""
    size = min(n_rows, chunk_size or BLOCK)
    rows = [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]
    if len(rows) == 1 or not torch.is_grad_enabled():
        return [block_fn(r) for r in rows]
    return [checkpoint(block_fn, r, use_reentrant=False, preserve_rng_state=False, determinism_check="none") for r in rows]


def _check_pairs(a, b, ids, false_negatives):
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"a and b must be equal [N, D] with N > 0, found {list(a.shape)} and {list(b.shape)}")
    if false_negatives not in ("ignore", "mask", "multi_positive"):
        raise ValueError(f"false_negatives must be ignore, mask or multi_positive, found {false_negatives!r}")
    if false_negatives != "ignore" and ids is None:
        raise ValueError(f"false_negatives={false_negatives!r} needs ids [N]; without ids use 'ignore'")
    if ids is not None and ids.shape != a.shape[:1]:
        raise ValueError(f"ids must be [{len(a)}], found {list(ids.shape)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)  # logits in float32 also under autocast
    return a.to(dtype), b.to(dtype)


def _groups(ids):
    """(ids as int32 ranks, number of rows that carry each row's id), both [N], without a host synchronisation."""
    ordered = ids.sort().values
    first = torch.searchsorted(ordered, ids)
    return first.int(), torch.searchsorted(ordered, ids, right=True) - first


def _same(ids, rows, diagonal=True):
    """[chunk, N] bool: pairs of equal id, with or without the pairs of a row and its own partner."""
    same = ids[rows, None] == ids
    if not diagonal:
        same[:, rows].fill_diagonal_(False)
    return same


def info_nce(a, b, logit_scale, ids=None, false_negatives="ignore", label_smoothing=0.0, chunk_size=None):
    """Symmetric InfoNCE: mean over rows and over both directions of the cross-entropy of logit_scale * a b^T.

    a, b: [N, D] float, L2-normalised; row i of a is the partner of row i of b. logit_scale: scalar (1 / temperature).
    ids: [N] int, which image or movie a row belongs to. false_negatives: what becomes of pairs of equal id off the
    diagonal: "ignore" leaves them as negatives, "mask" drops them from the denominator, "multi_positive" makes them
    positives (soft targets, each row normalised). label_smoothing: eps spread evenly over the columns of a row that are
    not dropped. chunk_size: rows of logits held at once (default 1024); it changes memory, not the value.
    Returns: scalar, float32 (float64 for float64 input).
    Raises: ValueError on shapes that disagree, ids that are missing, label_smoothing outside [0, 1].
    Source: van den Oord et al. 2018, equation 4; the symmetric form of CLIP (Radford et al. 2021, figure 3). Soft targets as in UniCL
    (Yang et al. 2022); smoothing of Szegedy et al. 2016, section 7.
    """
    a, b = _check_pairs(a, b, ids, false_negatives)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], found {label_smoothing}")
    n, masked, soft = len(a), false_negatives == "mask", false_negatives == "multi_positive"
    dropped = torch.finfo(a.dtype).min / 4  # finite: a block may drop all of a column, and -inf - -inf is nan
    with torch.autocast(a.device.type, enabled=False):
        if masked or soft:
            ids, group = _groups(ids)
        if label_smoothing:
            share = 1 / (n + 1 - group).to(a.dtype) if masked else a.new_full((n,), 1 / n)  # 1 / columns kept, [N]

        def block(rows):
            """log-sum-exp of these rows; of each column over these rows; what the targets take off, both ways."""
            logits = (logit_scale * a[rows]) @ b.T  # [chunk, N]
            target = 0 if soft else 2 * (1 - label_smoothing) * logit_scale * (a[rows] * b[rows]).sum(1)  # [chunk]
            if masked:
                logits = logits.masked_fill_(_same(ids, rows, diagonal=False), dropped)
            if soft:
                same = _same(ids, rows)
                target = 2 * (1 - label_smoothing) * (logits * same).sum(1) / group[rows]
            if label_smoothing:
                kept = logits.masked_fill(logits == dropped, 0)
                target = target + label_smoothing * (kept.sum(1) * share[rows] + kept @ share)
            return logits.logsumexp(1), logits.logsumexp(0), target

        row_lse, column_lse, target = zip(*_row_blocks(block, n, chunk_size), strict=True)
        return (torch.cat(row_lse) + torch.stack(column_lse).logsumexp(0) - torch.cat(target)).mean() / 2


def sigmoid_loss(a, b, logit_scale, logit_bias, ids=None, false_negatives="ignore", chunk_size=None):
    """Pairwise sigmoid loss: -sum_ij log sigmoid(z_ij (logit_scale a_i.b_j + logit_bias)) / N, z = 1 for partners, else -1.

    a, b: [N, D] float, L2-normalised. logit_scale, logit_bias: scalars. ids, false_negatives, chunk_size: as in `info_nce`;
    "mask" drops pairs of equal id off the diagonal, "multi_positive" gives them z = 1.
    Returns: scalar, float32 (float64 for float64 input).
    Raises: ValueError on shapes that disagree or ids that are missing.
    Source: SigLIP, Zhai et al. 2023, algorithm 1 (the sum is divided by N, not N^2).
    """
    a, b = _check_pairs(a, b, ids, false_negatives)
    n, masked, soft = len(a), false_negatives == "mask", false_negatives == "multi_positive"
    with torch.autocast(a.device.type, enabled=False):
        if masked or soft:
            ids, _ = _groups(ids)

        def block(rows):
            logits = (logit_scale * a[rows]) @ b.T
            logits += logit_bias  # [chunk, N]
            positive = (logits * _same(ids, rows)).sum() if soft else 0
            if masked:
                logits = logits.masked_fill_(_same(ids, rows, diagonal=False), torch.finfo(a.dtype).min / 4)
            # -log sigmoid(-x) = softplus(x) and -log sigmoid(x) = softplus(x) - x; beyond 40 softplus(x) is x in float64 too
            return F.softplus(logits, threshold=40).sum() - positive

        total = torch.stack(_row_blocks(block, n, chunk_size)).sum()
        if not soft:
            total = total - (logit_scale * (a * b).sum() + n * logit_bias)
        return total / n


# -------------------------------------------------------------------------------------------------------------- schedule

def warmup_cosine(step, total_steps, warmup_steps):
    """Learning-rate factor in [0, 1] of a step, counted from 0: linear 0 -> 1 over warmup_steps, then half a cosine to 0 at
    total_steps, and 0 ever after.

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts; clamped, as an unclamped cosine rises again past its end.
    """
    step = max(step, 0)
    if step < warmup_steps:
        return step / warmup_steps
    if step >= total_steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


# --------------------------------------------------------------------------------------------------------------- metrics

def _miss_probability(better, tied, own, k):
    """P(none of the top k is one's own) with `better` others above, `tied` others level, ties in random order; [Q] float64.

    1 - C(t+m-r, m) / C(t+m, m) is the hit; the quotient is written as the product of (t-j) / (t+m-j) over j < r.
    """
    places = (k - better).clamp(min=0)  # of the tied group inside the top k
    miss = torch.ones_like(better, dtype=torch.float64)
    for j in range(int(min(k, (tied + own).max()))):
        inside = (j < places) & (j < tied + own)
        miss = torch.where(inside, miss * (tied - j).clamp(min=0) / (tied + own - j).clamp(min=1), miss)
    return miss


def retrieval_per_query(queries, gallery, query_ids, gallery_ids, ks=(1, 5, 10), map_ks=(10,), chunk_size=256):
    """Retrieval quality of every query; `retrieval_metrics` averages it, a bootstrap resamples it.

    queries: [Q, D], gallery: [G, D], float, L2-normalised for cosine. query_ids: [Q], gallery_ids: [G] int; the gallery
    rows that carry the query's id are its own, and the best of them counts. Scores close to those of own rows are computed
    in float64 and compared in float32, so that equal rows tie whatever the block size. Ties: the expectation over their
    random order; AP ranks an own row below every other row of the same score. AP@k is divided by min(k, own rows).
    Returns: dict of [Q] float64 on the CPU: `hit@k` (probability), `AP@k`, `rank` (expected, from 1), `chance@k`.
    Raises: ValueError on non-finite input, shapes that disagree, or a query without an own row in the gallery.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries [Q, D] and gallery [G, D] needed, found {list(queries.shape)} and {list(gallery.shape)}")
    if query_ids.shape != queries.shape[:1] or gallery_ids.shape != gallery.shape[:1]:
        raise ValueError(f"one id a row needed, found {list(query_ids.shape)} ids for {len(queries)} queries and "
                         f"{list(gallery_ids.shape)} for {len(gallery)} gallery rows")
    if not len(queries) or not len(gallery):
        raise ValueError(f"nothing to retrieve: {len(queries)} queries, {len(gallery)} gallery rows")
    for name, x in (("queries", queries), ("gallery", gallery)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(x)).any(1).sum())} rows of {len(x)} hold non-finite values")
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device  # MPS has no float64
    queries, gallery = queries.detach().to(device), gallery.detach().to(device)
    gallery_ids, order = gallery_ids.to(device).sort(stable=True)  # own rows of a query become one range
    gallery, query_ids = gallery[order], query_ids.to(device)
    first = torch.searchsorted(gallery_ids, query_ids)
    n_own = torch.searchsorted(gallery_ids, query_ids, right=True) - first  # [Q]
    if (n_own == 0).any():
        raise ValueError(f"{int((n_own == 0).sum())} of {len(queries)} queries have no row of their id in the gallery, "
                         f"the first is id {int(query_ids[n_own == 0][0])}")
    offsets = torch.arange(int(n_own.max()), device=device)
    gallery32 = gallery.float()
    tolerance = 16 * torch.finfo(torch.float32).eps * queries.float().norm(dim=1, keepdim=True) * gallery32.norm(dim=1).max()  # of a float32 product
    out = {name: [] for name in (*(f"hit@{k}" for k in ks), *(f"AP@{k}" for k in map_ks), "rank")}
    buffers = gallery32.new_empty(2, min(chunk_size, len(queries)), len(gallery))  # used again by every block: fresh ones pile up in the heap
    for i in range(0, len(queries), chunk_size):
        rows = slice(i, i + chunk_size)
        scores, work = buffers[:, :len(queries[rows])]  # [q, G]
        with full_precision():
            torch.mm(queries[rows].float(), gallery32.T, out=scores)
        if not torch.isfinite(torch.stack([scores.amax(), scores.amin()])).all():
            raise ValueError("scores overflow float32; normalise the rows")
        is_own = offsets < n_own[rows, None]  # [q, most own rows of any query]
        own_columns = first[rows, None] + offsets * is_own  # filled up with the first
        near = None
        if len(offsets) <= 32:
            exact = ((queries[rows].double() * gallery[c].double()).sum(1, keepdim=True).float() for c in own_columns.T)  # [q, 1] each
            near = functools.reduce(torch.logical_or, (torch.sub(scores, own, out=work).abs_() <= tolerance[rows] for own in exact)).nonzero()
        if near is None or len(near) * 16 > scores.numel():  # many own rows, or a collapsed model: all are near
            scores = (queries[rows].double() @ gallery.double().T).float()
        else:
            for part in near.split(65536):
                scores[part[:, 0], part[:, 1]] = (queries[i + part[:, 0]].double() * gallery[part[:, 1]].double()).sum(1).float()
        own = scores.gather(1, own_columns).masked_fill(~is_own, -torch.inf)
        best = own.amax(1, keepdim=True)
        level = (own == best).sum(1)  # m, own rows at the best own score
        better = torch.gt(scores, best, out=work).sum(1).long()  # b; a float sum is several times faster and exact to 2^24
        tied = torch.ge(scores, best, out=work).sum(1).long() - better - level  # t
        for k in ks:
            out[f"hit@{k}"].append(1 - _miss_probability(better, tied, level, k))
        out["rank"].append(better + (tied + level + 1).double() / (level + 1))
        if map_ks:
            if len(offsets) == 1:
                worst = (better + tied + 1).double()
                aps = {k: torch.where(worst <= k, 1 / worst, 0.0) for k in map_ks}
            else:  # an own row a hair lower: below all rows that tie with it, above all that do not
                scores, own = scores.double(), own.double()  # so that a hair is less than the gap to the next float32
                below = torch.nextafter(own, torch.full_like(own, -torch.inf))
                scores.scatter_(1, own_columns, torch.where(is_own, below, below[:, :1]))
                mine = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, own_columns, True)
                top = mine.gather(1, scores.topk(min(max(map_ks), len(gallery)), dim=1).indices).double()
                places = torch.arange(1, top.shape[1] + 1, device=device)
                precision = top @ (places[:, None] <= places).double() / places  # own rows so far / place
                aps = {k: (precision * top)[:, :k].sum(1) / n_own[rows].clamp(max=k) for k in map_ks}
            for k in map_ks:
                out[f"AP@{k}"].append(aps[k])
    values = {name: torch.cat(parts).cpu() for name, parts in out.items()}
    for k in ks:  # all G rows level
        values[f"chance@{k}"] = (1 - _miss_probability(torch.zeros_like(n_own), len(gallery) - n_own, n_own, k)).cpu()
    return values


def retrieval_metrics(queries, gallery, query_ids, gallery_ids, ks=(1, 5, 10), map_ks=(10,), chunk_size=256):
    """Means over queries of `retrieval_per_query` (same arguments, ties and errors).

    Returns: dict of floats: `R@k` (0..1), `median_rank`, `mean_rank` (expected ranks, from 1), `MRR`, `mAP@k`.
    """
    q = retrieval_per_query(queries, gallery, query_ids, gallery_ids, ks, map_ks, chunk_size)
    return {**{f"R@{k}": q[f"hit@{k}"].mean().item() for k in ks},
            "median_rank": float(np.median(q["rank"].numpy())), "mean_rank": q["rank"].mean().item(),
            "MRR": (1 / q["rank"]).mean().item(), **{f"mAP@{k}": q[f"AP@{k}"].mean().item() for k in map_ks}}


def multilabel_metrics(logits, targets, threshold=0.5):
    """F1 at a probability threshold, mAP and ROC-AUC of multi-label predictions, over the whole set at once.

    logits: [N, C] float. targets: [N, C] of 0/1. A label is predicted when sigmoid(logit) > threshold.
    Returns: dict of floats `f1_micro`, `f1_macro`, `f1_weighted`, `f1_samples` (an F1 of 0/0 counts as 0), `mAP` and
    `roc_auc` (macro, over the classes where they are defined: with a positive; with a positive and a negative; else nan).
    Raises: ValueError on shapes that disagree, non-finite logits, targets other than 0/1, a threshold outside (0, 1).
    Definitions as in scikit-learn, which the tests compare with.
    """
    if logits.ndim != 2 or logits.shape != targets.shape or not logits.numel():
        raise ValueError(f"logits and targets must be equal [N, C] with N, C > 0, found {list(logits.shape)} and {list(targets.shape)}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), found {threshold}")
    x, y = logits.detach().cpu().double().numpy(), targets.detach().cpu().double().numpy()
    if not np.isfinite(x).all():
        raise ValueError(f"logits: {int((~np.isfinite(x)).any(1).sum())} rows of {len(x)} hold non-finite values")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
    predicted = x > math.log(threshold / (1 - threshold))

    def f1(axis):
        hits, wrong = (predicted * y).sum(axis), (predicted != y).sum(axis)
        return 2 * hits / np.maximum(2 * hits + wrong, 1)  # hits is 0 where the sum is

    average_precision, auc = [], []
    for c in range(x.shape[1]):
        order = np.argsort(-x[:, c], kind="stable")
        score, positive = x[order, c], y[order, c]
        ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # last place of each run of equal scores
        hits, seen = positive.cumsum()[ends], ends + 1
        if hits[-1]:
            average_precision.append((np.diff(hits, prepend=0) * hits / seen).sum() / hits[-1])
        if 0 < hits[-1] < len(score):
            recall, fall_out = np.append(0, hits / hits[-1]), np.append(0, (seen - hits) / (len(score) - hits[-1]))
            auc.append((np.diff(fall_out) * (recall[1:] + recall[:-1]) / 2).sum())
    support = y.sum(0)
    return {"f1_micro": float(f1(None)), "f1_macro": float(f1(0).mean()), "f1_samples": float(f1(1).mean()),
            "f1_weighted": float((f1(0) * support).sum() / max(support.sum(), 1)),
            "mAP": float(np.mean(average_precision)) if average_precision else math.nan,
            "roc_auc": float(np.mean(auc)) if auc else math.nan}


# ----------------------------------------------------------------------------------------------------------- checkpoints

def _previous(path):
    return path.with_name(f"{path.name}.previous")


def atomic_write(path, write, keep_previous=False):
    """Call write(binary file) on a temporary file, fsync, rename onto path: at any moment path is whole, old or new.

    Raises: OSError naming the path (disk full, no permission); what was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, _previous(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); all that was saved before is kept, and the same command "
                      "resumes from it once this is mended") from None


def save_checkpoint(path, state, keep_previous=True):
    """Write a dict of tensors and plain types atomically; the file it replaces is kept as `<path>.previous`.

    Raises: OSError naming the path; the last good checkpoint stays.
    """
    atomic_write(path, lambda file: torch.save(state, file), keep_previous)


def load_checkpoint(path):
    """The dict that `save_checkpoint` wrote, on the CPU (weights_only=True). A missing or damaged file falls back to
    `<path>.previous`, where there is one, with a warning; the damaged one becomes `<path>.damaged`.

    Raises: FileNotFoundError if neither is there, UserError if none can be read.
    """
    path, problems = Path(path), []
    for candidate in (path, _previous(path)):
        try:
            with zipfile.ZipFile(candidate) as archive:  # torch.load does not check the CRCs it writes
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # zipfile, pickle and torch each raise their own kinds on a damaged file
            problems.append(f"{candidate} is damaged ({type(error).__name__}: {str(error).splitlines()[0]})")
            continue
        if candidate != path:
            warnings.warn(f"{problems[0] if problems else f'{path} is missing'}; using {candidate}", stacklevel=2)
            if problems:  # else the next save would put it in the good one's place
                path.replace(path.with_name(f"{path.name}.damaged"))
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}; use --fresh to start again")
    raise FileNotFoundError(f"{path}: no such checkpoint; run the training first")


# ------------------------------------------------------------------------------------------------------- the run's folder

def write_json(path, value):
    """Write JSON atomically; a non-finite number becomes null. Raises: OSError naming the path."""
    def plain(v):
        if isinstance(v, dict):
            return {str(k): plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    text = json.dumps(plain(value), indent=2) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The object in a JSON file, a dict. Raises: UserError naming the file if it is missing or not a JSON object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def fingerprint(paths, whole=1 << 31, blocks=512):
    """16 hex digits of the SHA-256 over the contents of the files, in the order given; of a file larger than `whole` bytes its size and `blocks`
    blocks of 1 MiB, evenly spread from its first to its last."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if size > whole:
                digest.update(str(size).encode())
                for i in range(blocks):
                    file.seek((size - (1 << 20)) * i // (blocks - 1))
                    digest.update(file.read(1 << 20))
            else:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()[:16]


def _run_config(folder):
    """The config dict that a run's folder holds."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'} is damaged; choose another output_dir= or move the run aside with --fresh")
    return config


def check_run(cfg, fresh=False):
    """Raise UserError if cfg.output_dir holds a run of another config (unless `fresh`) or something else. Writes nothing."""
    folder = Path(cfg.output_dir)
    config_file = folder / "config.yaml"
    if config_file.exists() and not fresh:
        old, new = flatten(_run_config(folder)), flatten(dataclasses.asdict(cfg))
        changes = [f"{k}={new.get(k)} (was {old.get(k)})" for k in {**old, **new} if not is_neutral(k) and old.get(k) != new.get(k)]
        if changes:
            raise UserError(f"{folder} holds a run of a different config: {', '.join(changes[:4])}{' ...' if len(changes) > 4 else ''}; "
                            "choose another output_dir= or move the old run aside with --fresh")
    elif folder.is_dir() and not config_file.exists():
        others = [p.name for p in folder.iterdir() if not p.name.startswith((".", "compare."))]
        if others:
            raise UserError(f"{folder} is not empty and holds no run ({others[0]} ...); choose another output_dir=")


def open_run(cfg, data_fingerprint, fresh=False):
    """Create cfg.output_dir or reopen it to resume; writes config.yaml, and the data's fingerprint into environment.json. Returns its Path.

    `fresh` moves an existing run to `<folder>.old-N` first.
    Raises: UserError if the folder cannot be written, holds a run of another config or of other data, or holds something else.
    """
    check_run(cfg, fresh)
    folder = Path(cfg.output_dir)
    if fresh and (folder / "config.yaml").exists():
        n = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.old-{n}"))
        print(f"moved the earlier run to {folder.with_name(f'{folder.name}.old-{n}')}")
    environment = folder / "environment.json"
    known = read_json(environment).get("data_fingerprint") if environment.exists() else None
    if known not in (None, data_fingerprint):
        raise UserError(f"{folder} holds a run on other data (fingerprint {known}, now {data_fingerprint}); "
                        "choose another output_dir= or move the old run aside with --fresh")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be written ({error.strerror or error}); set output_dir=") from None
    atomic_write(folder / "config.yaml", lambda file: file.write(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False).encode()))
    record_environment(folder, data_fingerprint=data_fingerprint)
    return folder


def record_environment(folder, **facts):
    """Merge facts into environment.json: versions, device, git commit, command line, wall-clock times."""
    path = Path(folder) / "environment.json"
    environment = read_json(path) if path.exists() else {}
    here = Path(__file__).parent

    def git(*command):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    def version(package):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)

    packages = ("torch", "numpy", "matplotlib", "pyarrow", "soundfile", "pillow")
    environment.update(
        command_line=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), time=datetime.datetime.now().isoformat(timespec="seconds"),
        python=platform.python_version(), platform=platform.platform(), processors=os.cpu_count(), threads=torch.get_num_threads(),
        versions={p: version(p) for p in packages}, cuda=torch.version.cuda,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        git_commit=git("rev-parse", "HEAD"), git_dirty=bool(git("status", "--porcelain")), **facts)
    write_json(path, environment)


class RunLog:
    """metrics.csv: one row a step or epoch, the same columns in every row; its last row mirrored to W&B if asked for."""

    def __init__(self, folder, wandb=False, config=None):
        self.path, self.wandb = Path(folder) / "metrics.csv", None
        if wandb:
            try:
                import wandb as package
            except ImportError:
                raise UserError("wandb=true needs the package: pip install wandb") from None
            run_id = hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
            self.wandb = package.init(project=Path(sys.argv[0]).stem, name=Path(folder).name, id=run_id, resume="allow",
                                      config=config, dir=str(folder))

    def write(self, rows):
        """Write the whole history, a list of dicts of equal keys: a resumed run neither repeats nor loses a row."""
        for row in rows:
            if row.keys() != rows[0].keys():
                raise ValueError(f"rows of metrics.csv must have equal keys, found {list(rows[0])} and {list(row)}")
        lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
        atomic_write(self.path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
        if self.wandb:
            self.wandb.log(rows[-1])

    def close(self):
        if self.wandb:
            self.wandb.finish()


def finished_runs(items):
    """[(folder, results, config)] of the runs named in `compare=[...]`, each once; a pattern such as results/siglip* names several.

    Raises: UserError for a folder without results.json.
    """
    pieces, folders = ",".join(items).split(","), {}  # a folder's own commas (results/siglip,seed=1) were taken for the list's: put them back
    while pieces:
        for n in range(len(pieces), 0, -1):
            name = ",".join(pieces[:n]).strip()
            matches = [name] if Path(name, "results.json").exists() else [p for p in sorted(glob.glob(name)) if Path(p, "results.json").exists()]
            if matches := [m for m in matches if m == name or not re.search(r"\.old-\d+$", m)]:
                break
        else:
            raise UserError(f"{pieces[0].strip()}/results.json: no such file; compare takes folders of finished runs")
        folders |= {Path(match).resolve(): Path(match) for match in matches}
        pieces = pieces[n:]
    return [(folder, read_json(folder / "results.json"), _run_config(folder)) for folder in folders.values()]


def runs_by_seed(items, experiment):
    """[(name, [results of a run, one a seed])]: the finished runs named in `items`, those that differ only in their seed together.

    Prints a note if they were not made from the same data. Raises: UserError if `items` is empty or names a run of another experiment.
    """
    if not items:
        raise UserError("--stage compare needs compare='[folder, folder, ...]' of finished runs")
    groups = {}
    for folder, results, config in finished_runs(items):
        if results.get("experiment") != experiment:
            raise UserError(f"{folder}: a run of another experiment ({results.get('experiment')})")
        key = json.dumps([{k: v for k, v in flatten(config).items() if k != "seed" and not is_neutral(k)}, results["data_fingerprint"]])
        seeds = groups.setdefault(key, (re.sub(r",seed=\d+", "", folder.name), {}))[1]
        seeds.setdefault(results["seed"], results)  # a copy of a run is not another seed
    names = [name for name, _ in groups.values()]
    if len({results["data_fingerprint"] for _, seeds in groups.values() for results in seeds.values()}) > 1:
        print("NOTE: these runs were not made from the same data")
    return [(name if names.count(name) == 1 else f"{name} ({i + 1})", list(seeds.values())) for i, (name, seeds) in enumerate(groups.values())]


def progress(items, label):
    """tqdm over items when the terminal is interactive, else the items."""
    return tqdm(items, desc=label, leave=False, dynamic_ncols=True) if sys.stderr.isatty() else items


def format_table(header, rows):
    """Plain aligned text: the first column left, the others right; floats with one decimal, None as a dash."""
    def cell(v):
        return "-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v)
    cells = [[cell(v) for v in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ----------------------------------------------------------------------------------------------------------------- plots

def new_figure(n_panels=1, width=4.6, height=3.6):
    """(figure, list of axes) in one row; matplotlib is imported here, so that -h and imports stay quick."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, n_panels, figsize=(width * n_panels, height), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def save_figure(figure, path):
    """Write a PNG atomically and free the figure."""
    import matplotlib.pyplot as plt
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)


def plot_curves(path, panels, xlabel="epoch", title=None, mark=None):
    """One panel a quantity: panels = {ylabel: {line label: list of values, from 1}}; `mark` draws a line at the chosen epoch."""
    figure, axes = new_figure(len(panels))
    for axis, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        for label, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, marker="." if len(values) < 30 else None, label=label)
        if mark is not None:
            axis.axvline(mark, color="grey", linestyle=":", linewidth=1, label="chosen")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(lines) > 4 else {}  # so many would lie over the lines
        axis.legend(fontsize=8, **beside)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def plot_embedding_space(path, groups, title, method="pca"):
    """Two dimensions of several sets of embeddings: groups = {label: [N, D]}; equal rows of the first two sets are joined.

    method: "pca", or "tsne" (scikit-learn). Raises: UserError if scikit-learn is asked for and missing.
    """
    stacked = torch.cat([x.detach().float().cpu() for x in groups.values()])
    if method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise UserError("evaluation.projection=tsne needs scikit-learn: pip install scikit-learn") from None
        flat = TSNE(random_state=0, perplexity=min(30, (len(stacked) - 1) / 3)).fit_transform(stacked.numpy())
    else:
        centred = stacked - stacked.mean(0)
        flat = (centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T).numpy()
    figure, (axis,) = new_figure(width=5.6, height=5)
    parts = np.split(flat, np.cumsum([len(x) for x in groups.values()])[:-1])
    if len(parts) > 1 and len(parts[0]) == len(parts[1]):
        axis.plot(*np.stack([parts[0], parts[1]], axis=2).transpose(1, 2, 0), color="grey", alpha=0.25, linewidth=0.5)
    for (label, _), xy in zip(groups.items(), parts, strict=True):
        axis.scatter(*xy.T, s=8, label=label)
    axis.set(xlabel=f"{method.upper()} 1", ylabel=f"{method.upper()} 2", title=title)
    axis.legend()
    save_figure(figure, path)


def plot_similarity_matrix(path, similarity, title, xlabel, ylabel):
    """A [N, M] matrix of scores as an image with its colour bar."""
    figure, (axis,) = new_figure(width=5.2, height=4.6)
    image = axis.imshow(similarity.detach().float().cpu().numpy(), cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axis, label="cosine similarity")
    figure.suptitle(title, fontsize=9)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    save_figure(figure, path)
