"""exp_coco_heads.py: data and splits, heads, losses, closed forms and CSLS, leaks, exact resume, tuning, bad input."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, apply_diff, assert_nothing_chosen_on_test, ends_with, kill_at, killed
from torch import nn

import common
import exp_coco_heads as exp
from common import UserError

SHARED = ROOT.parent / "shared"
HEADS = ("mlp", "siglip", "clip", "align", "blip", "attention", "cross_modal")
GATED = ("attention", "cross_modal")
SMALL = ["training.batch_size=128", "training.num_epochs=3", "training.learning_rate=5e-3", "model.output_dim=16",
         "model.hidden_dim=32", "model.num_heads=4", "data.val=40", "data.test=0.2", "device=cpu"]
REAL = {name: getattr(common, name) for name in ("save_figure", "plot_embedding_space")}


def quicken(setattr=setattr):
    """Few resamples, and pictures of one byte."""
    import matplotlib.pyplot as plt
    import torch._dynamo  # noqa: F401, which an optimizer's first step imports

    def save_figure(figure, path):
        plt.close(figure)
        common.write_text(path, "x")
    setattr(common, "bootstrap", functools.partial(common.bootstrap, n_resamples=50))
    setattr(common, "save_figure", save_figure)
    setattr(common, "plot_embedding_space", lambda path, *_: common.write_text(path, "x"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        yield


def config(tmp_path, data_dir, *overrides):
    keys = [f"data.dir={data_dir}", f"output_dir={tmp_path / 'run'}", *SMALL, *overrides]
    return common.load_config(exp.Config, None, keys)


def cli(tmp_path, data_dir, *overrides):
    (tmp_path / "toy.yaml").write_text("experiment: coco_heads\n")
    return exp.main([str(tmp_path / "toy.yaml"), f"data.dir={data_dir}", f"output_dir={tmp_path / 'run'}", *SMALL,
                     *map(str, overrides)])


def failing(tmp_path, data_dir, capsys, *overrides, code=2):
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli(tmp_path, data_dir, *overrides) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def data(tmp_path_factory, coco_demo):
    return exp.load_data(config(tmp_path_factory.mktemp("data"), coco_demo))


def tensor(folder, name):
    return torch.load(Path(folder) / f"{name}.pt", weights_only=True)


def copy(source, target, **changes):
    """The data files with some replaced: name -> tensor, bytes, or a function of the metadata."""
    shutil.copytree(source, target)
    for name, value in changes.items():
        path = next(Path(target).glob(f"{name}.*"))
        if isinstance(value, torch.Tensor):
            torch.save(value, path)
        elif isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(json.dumps(value(json.loads(path.read_text()))))
    return target


def poison(folder, name, row, value):
    x = tensor(folder, name).clone()
    x[row, 1] = value
    return x


def unit(*shape, seed, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def metrics(folder):
    lines = [line.split(",") for line in (Path(folder) / "metrics.csv").read_text().splitlines()]
    return [dict(zip(lines[0], map(float, line), strict=True)) for line in lines[1:]]


# ---------------------------------------------------------------------------------------------------------------- data

def test_both_image_layouts_and_all_dtypes_load_alike(tmp_path, coco_demo, data):
    repeated = tensor(coco_demo, "train2017_image_embeddings")  # a row a caption
    rows, index = repeated[::5], [i // 5 for i in range(1500)]
    shuffle = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    where = shuffle.argsort().repeat_interleave(5).tolist()
    variants = {"one row": (rows.clone(), index), "both": (repeated, index), "full": (repeated.float(), None),
                "image_index, not order": (rows[shuffle].clone(), where)}
    for name, (images, rows_of) in variants.items():
        extra = {} if rows_of is None else {"image_index": rows_of}
        folder = copy(coco_demo, tmp_path / name, train2017_image_embeddings=images,
                      train2017_metadata=lambda m, extra=extra: {**m, **extra})
        loaded = exp.load_data(config(tmp_path, folder))
        assert torch.equal(loaded.images, data.images), name
        assert loaded.images.dtype == torch.float16
        assert torch.equal(loaded.image_index, data.image_index)
        assert all(torch.equal(loaded.splits[s], data.splits[s]) for s in data.splits)
    rows = torch.tensor([7, 700, 1499])
    batch = exp.make_batch(data, rows)  # pairs a caption with its image
    assert torch.equal(batch["image"], repeated[rows].float())
    assert torch.equal(batch["text"], tensor(coco_demo, "train2017_text_embeddings")[rows].float())
    assert [data.image_ids[i] for i in batch["ids"].tolist()] == ["100001", "100140", "100299"]
    for name, scale in (("large", 1e6), ("small", 1e-8)):  # float16 would overflow, or lose its precision
        images = (repeated.float() * scale).requires_grad_()
        folder = copy(coco_demo, tmp_path / name, train2017_image_embeddings=images)
        assert exp.load_data(config(tmp_path, folder)).images.dtype == torch.bfloat16


def test_splits_are_by_image_and_fixed_by_the_split_seed(tmp_path, coco_demo, data):
    images = {s: set(data.image_index[rows].tolist()) for s, rows in data.splits.items()}
    assert {s: len(i) for s, i in images.items()} == {"train": 200, "val": 40, "test": 60}
    assert not images["train"] & images["val"] | images["train"] & images["test"] | images["val"] & images["test"]
    assert all(len(data.splits[s]) == 5 * len(images[s]) for s in images)  # whole images
    same = exp.load_data(config(tmp_path, coco_demo, "seed=7"))
    other = exp.load_data(config(tmp_path, coco_demo, "data.split_seed=7"))
    assert torch.equal(data.splits["test"], same.splits["test"])
    assert not torch.equal(data.splits["test"], other.splits["test"])
    coco = exp.split_images(exp.DataConfig(), [f"{i:06}" for i in range(118_287)], 118_287, ())  # 80%, 1%, 4%
    assert {split: len(rows) for split, rows in coco.items()} == {"train": 94630, "val": 1183, "test": 4731}


@pytest.mark.parametrize(("overrides", "counts"), [
    (["data.test=0.04", "data.val=auto"], (240, 30, 12)),
    (["data.test=30", "data.val=20", "data.train=100"], (100, 20, 30)),
    (["data.test=0.1", "data.val=0.1", "data.train=rest"], (240, 30, 30)),
    (["data.test=0.5", "data.val=auto"], (120, 30, 150)),
    (["data.test=val2017", "data.val=auto"], (270, 30, 60)),
    (["data.test=val2017", "data.val=0.01", "data.train=0.5"], (150, 3, 60))])
def test_split_sizes(tmp_path, coco_demo, overrides, counts):
    data = exp.load_data(config(tmp_path, coco_demo, *overrides))
    assert tuple(len(data.image_index[data.splits[s]].unique()) for s in ("train", "val", "test")) == counts


@pytest.mark.parametrize("as_captions", [False, True])
def test_karpathy_list(tmp_path, coco_demo, as_captions):
    train, val = (common.read_json(Path(coco_demo) / f"{n}2017_metadata.json") for n in ("train", "val"))
    images = {*map(str, train["image_ids"][:50] + val["image_ids"][:100])}  # 10 images of train, 20 of val
    captions = train["caption_ids"][:50] + val["caption_ids"][:100]
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(map(str, captions if as_captions else images)))
    cfg = config(tmp_path, coco_demo, "data.test=karpathy", f"data.karpathy_ids={path}", "data.val=30")
    data = exp.load_data(cfg)
    splits = {s: {data.image_ids[i] for i in data.image_index[rows].tolist()} for s, rows in data.splits.items()}
    assert splits["test"] == images
    assert len(splits["train"]) == 300 - 10 - 30
    assert not (splits["train"] | splits["val"]) & {*map(str, val["image_ids"])}
    exp.open_folder(cfg, data)
    path.write_text("\n".join(map(str, train["image_ids"][100:200])))
    with pytest.raises(UserError, match="holds another split"):  # a changed test list
        exp.open_folder(cfg, exp.load_data(cfg))
    path.write_text("1 2 3")
    with pytest.raises(UserError, match=r"3 of 3 ids are no image_ids"):
        exp.load_data(cfg)


def test_an_epoch_is_a_pure_function_of_seed_and_epoch(tmp_path, coco_demo, data):
    cfg = config(tmp_path, coco_demo)
    batches = exp.epoch_batches(data, cfg, 1)
    assert torch.equal(torch.cat(batches).sort().values, data.splits["train"])
    assert {len(b) for b in batches} == {125}  # 1,000 pairs in 8 batches of at most 128: none is short
    torch.randn(3)  # the global generator has no say
    assert torch.equal(torch.cat(exp.epoch_batches(data, cfg, 1)), torch.cat(batches))
    for other in ((cfg, 2), (config(tmp_path, coco_demo, "seed=1"), 1)):
        assert not torch.equal(torch.cat(exp.epoch_batches(data, *other)), torch.cat(batches))
    few = dataclasses.replace(data, splits={"train": data.splits["train"][:21]})
    pairs = exp.epoch_batches(few, config(tmp_path, coco_demo, "training.batch_size=2"), 1)
    assert sorted(map(len, pairs)) == [2] * 9 + [3]  # a pair alone would have no negative
    once = config(tmp_path, coco_demo, "training.one_caption_per_image=true")
    rows = torch.cat(exp.epoch_batches(data, once, 1))
    assert len(rows) == 200 == len(data.image_index[rows].unique())
    assert not torch.equal(rows.sort().values, torch.cat(exp.epoch_batches(data, once, 2)).sort().values)


@pytest.mark.parametrize(("keys", "rate"), [
    (["training.warmup_steps=3"], lambda step: common.warmup_cosine(step, 16, 3)),
    (["training.warmup_steps=2", "training.schedule=constant"], lambda step: min(1, step / 2))])
def test_a_runs_steps_take_every_epochs_batches_at_the_schedules_rate(tmp_path, coco_demo, data, monkeypatch, keys,
                                                                      rate):
    cfg = config(tmp_path, coco_demo, "training.num_epochs=2", *keys)
    real, steps = exp.train_step, []

    def seen(model, batch, optimizer):
        steps.append((model.training, batch["ids"].tolist(), optimizer.param_groups[0]["lr"]))
        return real(model, batch, optimizer)
    monkeypatch.setattr(exp, "train_step", seen)
    history = exp.train(cfg, data)
    batches = [*exp.epoch_batches(data, cfg, 0), *exp.epoch_batches(data, cfg, 1)]
    rates = [pytest.approx(5e-3 * rate(step), abs=1e-12) for step in range(16)]
    assert steps == [(True, data.image_index[rows].tolist(), lr) for rows, lr in zip(batches, rates, strict=True)]
    assert [row["learning_rate"] for row in history] == [rates[7], rates[15]]


def test_the_monitored_quantity():
    row = {"val_loss": 0.5, "val_i2t_R1": 20.0, "val_t2i_R1": 40.0, "val_RSUM": 300.0}
    for monitor, value in (("loss", -0.5), ("r1", 30.0), ("rsum", 300.0)):
        assert exp.monitored(row, exp.Config(training=exp.TrainingConfig(monitor=monitor))) == value


def test_inputs_are_standardised_by_training_statistics_only(tmp_path, coco_demo):
    texts = tensor(coco_demo, "train2017_text_embeddings").float()
    texts[:, 3] = 2.5  # a constant feature must not divide by zero
    cfg = config(tmp_path, copy(coco_demo, tmp_path / "constant", train2017_text_embeddings=texts))
    data = exp.load_data(cfg)
    model, rows = exp.build_model(cfg, data), data.splits["train"]
    expected = data.images[data.image_index[rows]].float()
    torch.testing.assert_close(model.image_mean, expected.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.image_deviation, expected.std(0, unbiased=False), rtol=1e-4, atol=1e-5)
    assert model.text_deviation[3] == 1
    assert torch.isfinite(model.embed_text(data.texts[:9].float())).all()


# --------------------------------------------------------------------------------------------------------------- heads

@pytest.mark.parametrize("loss", exp.LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_one_batch_is_learnt_and_every_parameter_gets_gradient(tmp_path, coco_demo, data, head, loss):
    cfg = config(tmp_path, coco_demo, f"model.type={head}", f"loss.type={loss}", "model.input_dropout=0",
                 "model.dropout=0", "training.learning_rate=1e-2", "model.hidden_dim=64", "model.output_dim=64",
                 "loss.temperature=0.07", "training.one_caption_per_image=true", "model.momentum=0.5")
    common.seed_everything(0)
    model = exp.build_model(cfg, data)
    optimizer = exp.build_optimizer(cfg, model)
    batch = exp.make_batch(data, exp.epoch_batches(data, cfg, 0)[0][:32])
    first = exp.train_step(model, batch, optimizer)
    largest = {}  # a gate starts at 0: what it lets through gets its gradient from the second step on
    for _ in range(60):
        last = exp.train_step(model, batch, optimizer)
        for name, p in model.named_parameters():
            if p.requires_grad:
                for part, gradient in zip("qkv", p.grad.chunk(3) if "in_proj" in name else [p.grad], strict=False):
                    largest[f"{name} {part}"] = max(largest.get(f"{name} {part}", 0), gradient.abs().max().item())
    dead = {name for name, value in largest.items() if value < 1e-7}  # that of a key or before BatchNorm cancels
    assert all(re.search(r"in_proj_bias k|key.bias|heads.\d.0.bias", name) for name in dead), dead
    if loss in ("clip", "siglip"):  # the others' targets are soft or their negatives many: their loss has a floor
        assert last["loss"] < 0.2 * first["loss"]
    z_image, z_text = model.eval()(batch["image"], batch["text"])
    torch.testing.assert_close(z_image.norm(dim=1), torch.ones(32))
    assert (z_image @ z_text.T).argmax(1).eq(torch.arange(32)).float().mean() > 0.9


def test_the_sizes_of_heads():
    def first(**keys):
        return exp.make_heads(exp.ModelConfig(**keys), [10, 12])[1]
    assert [first(type=name)[0].out_features for name in ("mlp", "blip", "clip", "align")] == [1024, 1024, 6, 2048]
    assert {first(type=name, hidden_dim=32)[0].out_features for name in ("mlp", "blip", "clip", "align")} == {32}
    branch = first(type="attention", hidden_dim=96, num_heads=3, num_layers=4).branch
    assert [layer.self_attn.num_heads for layer in branch.encoder] == [3] * 4
    branch = first(type="cross_modal", hidden_dim=96, num_heads=3).branch
    assert branch.attention(torch.randn(5, 96)).shape == (5, 3, exp.N_SLOTS)
    assert [type(first(type="align", use_bn=use)[1]) for use in (True, False)] == [common.BatchNorm1d, nn.LayerNorm]


@pytest.mark.parametrize(("keys", "varies"), [
    (["model.dropout=0", "model.input_dropout=0.5"], True), (["model.dropout=0.5", "model.input_dropout=0"], True),
    (["model.dropout=0", "model.input_dropout=0"], False)])
def test_dropout_is_on_both_sides_and_in_training_alone(tmp_path, coco_demo, data, keys, varies):
    model = exp.build_model(config(tmp_path, coco_demo, "model.type=mlp", *keys), data)
    batch = exp.make_batch(data, data.splits["train"][:9])
    for training in (True, False):
        for one, other in zip(*(model.train(training)(batch["image"], batch["text"]) for _ in range(2)), strict=True):
            assert torch.equal(one, other) == (not varies or not training)


@pytest.mark.parametrize("head", GATED)
def test_gated_heads_start_as_their_linear_part(tmp_path, coco_demo, data, head):
    model = exp.build_model(config(tmp_path, coco_demo, f"model.type={head}"), data).eval()
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    assert [p.shape for p in gates] == [torch.Size([])] * 2
    health = exp.gate_health(model, data)
    assert [health[name] for name in ("gate_image", "gate_text", "linear_image", "linear_text")] == [0, 0, 1, 1]
    for side, x in zip(model.heads, (data.images, data.texts), strict=True):
        x = x[:50].float()
        assert torch.equal(side(x), side.linear(x))
        with torch.no_grad():
            side.gate.fill_(1)
        assert torch.allclose(side(x), side.linear(x) + side.branch(x), atol=1e-5)
        assert not torch.allclose(side(x), side.linear(x), atol=0.05)


def test_the_rank_of_attentions_output_is_not_that_of_a_token():
    """Eight tokens of 8 numbers: their mean would leave 8."""
    torch.manual_seed(0)
    model = exp.ModelConfig("attention", output_dim=64, hidden_dim=64, num_heads=2, dropout=0)
    head = exp.make_heads(model, [96, 96])[0].eval()
    with torch.no_grad():
        head.gate.fill_(1)
        head.linear[1].weight.zero_()
        assert exp.effective_rank(head(torch.randn(2000, 96))) > 20
    low = torch.randn(500, 5) @ torch.randn(5, 64)
    assert 2 < exp.effective_rank(low) <= 5.001
    assert exp.effective_rank(torch.randn(5000, 64)) > 60


def test_cross_modal_heads_share_their_memory_and_so_do_the_copies(tmp_path, coco_demo, data):
    model = exp.build_model(config(tmp_path, coco_demo, "model.type=cross_modal", "loss.type=queue"), data)
    image, text = (head.branch.memory for head in model.heads)
    image_copy, text_copy = (head.branch.memory for head in model.momentum_heads)
    assert image is text
    assert image_copy is text_copy is not image
    assert image.shape == (exp.N_SLOTS, 32)
    weights = model.heads[0].branch.attention(torch.randn(5, 32))
    assert weights.shape == (5, 4, exp.N_SLOTS)
    assert torch.allclose(weights.sum(-1), torch.ones(5, 4))


@pytest.mark.parametrize("head", HEADS)
def test_independent_noise_scores_chance(tmp_path, coco_demo, head):
    """No head may see the query's partner: trained and tested on unrelated images and captions it stays at chance."""
    g = torch.Generator().manual_seed(5)
    images, texts = torch.randn(300, 24, generator=g), torch.randn(1500, 32, generator=g)
    folder = copy(coco_demo, tmp_path / "noise", train2017_text_embeddings=texts,
                  train2017_image_embeddings=images.repeat_interleave(5, 0))
    cfg = config(tmp_path, folder, f"model.type={head}", "data.test=150", "training.num_epochs=4")
    data = exp.load_data(cfg)
    exp.train(cfg, data)
    model, _ = exp.load_model(tmp_path / "run")
    if head in GATED:  # also with the branch wide open
        with torch.no_grad():
            for side in model.heads:
                side.gate.fill_(1)
    z_image, z_text, own = exp.embed(model, data, "test")
    scores = exp.summarise(exp.retrieval(z_image, z_text, own))
    for k in exp.KS:  # 150 images, 750 captions: three standard deviations of a binomial proportion
        for way, p in (("I2T", 1 - math.comb(745, k) / math.comb(750, k)), ("T2I", k / 150)):
            assert abs(scores[f"{way} R@{k}"] / 100 - p) < 3 * math.sqrt(p * (1 - p) / 150)
    z_image += 20 * z_text[torch.arange(150) * 5]  # a head that cheats, an image by its first caption, is found out
    assert exp.summarise(exp.retrieval(F.normalize(z_image, dim=1), z_text, own))["I2T R@1"] > 95


@pytest.mark.parametrize("head", ["siglip", "align", *GATED])
def test_weight_decay_spares_scale_bias_gates_and_norms(tmp_path, coco_demo, data, head):
    cfg = config(tmp_path, coco_demo, f"model.type={head}", "loss.type=siglip", "training.weight_decay=0.3")
    model = exp.build_model(cfg, data)
    groups = exp.build_optimizer(cfg, model).param_groups
    decay = {name: group["weight_decay"] for name, p in model.named_parameters() for group in groups
             if any(p is other for other in group["params"])}
    assert decay.keys() == {name for name, _ in model.named_parameters()}
    norms = {f"{name}.weight" for name, part in model.named_modules() if "Norm" in type(part).__name__}
    spared = {name for name in decay if name in norms or name.endswith(("scale", "bias", "gate"))}
    assert {name for name, value in decay.items() if value == 0} == spared
    assert {decay[name] for name in decay.keys() - spared} == {0.3}


@pytest.mark.parametrize("head", ["siglip", *GATED])
def test_a_start_at_cca_scores_as_cca_does(tmp_path, coco_demo, data, head):
    rsums = {}
    for init in ("cca", "random"):
        cfg = config(tmp_path, coco_demo, f"model.type={head}", f"model.init={init}", "model.output_dim=64",
                     "loss.type=queue")
        model, optimizer, _ = exp.begin(cfg, data)
        exp.initialise(cfg, model, data)
        copies = model.momentum_heads.state_dict()
        assert all(torch.equal(x, copies[name]) for name, x in model.heads.state_dict().items())
        rsums[init] = exp.validate(model, data, cfg)["val_RSUM"]
        started = {id(p) for side in model.heads for p in exp.linear_part(side).parameters()}
        rates = {(id(p) in started, group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        assert rates == {(True, 5e-4 if init == "cca" else 5e-3), (False, 5e-3)}
    scorer, _ = exp.closed_forms(data, 10)["CCA, CSLS"]
    rsum = exp.summarise(exp.retrieval(*exp.embed(scorer, data, "val")))["RSUM"]
    assert rsums == {"cca": pytest.approx(rsum, abs=12), "random": pytest.approx(70, abs=40)}


# -------------------------------------------------------------------------------------------------------------- losses

def test_starting_scale_and_bias_their_range_and_a_fixed_temperature(tmp_path, coco_demo, data):
    def scale_and_bias(model):
        return [round(x.item(), 4) for x in (model.log_scale.exp(), model.logit_bias) if x is not None]

    def start(*overrides, log_scale=None):
        cfg = config(tmp_path, coco_demo, "training.learning_rate=1e-9", *overrides)
        model = exp.build_model(cfg, data)
        if log_scale is not None:  # one step clamps it
            model.log_scale.data.fill_(log_scale)
            exp.train_step(model, exp.make_batch(data, data.splits["train"][:8]), exp.build_optimizer(cfg, model))
        return scale_and_bias(model)
    assert start("loss.type=clip") == start("loss.type=queue") == start("loss.type=blip") == [14.2857]
    assert start("loss.type=siglip") == [10.0, -10.0]
    assert start("loss.temperature=0.01", "loss.logit_bias=auto") == [100.0, round(-math.log(127), 4)]
    assert start("loss.type=align") == [1.0]
    for loss, bounds in {"clip": (1, 100), "siglip": (1, 100), "align": (1e-3, 100), "blip": (2, 1000)}.items():
        assert [start(f"loss.type={loss}", log_scale=x)[0] for x in (-20, 20)] == pytest.approx(bounds, rel=1e-5)
    cfg = config(tmp_path, coco_demo, "model.learnable_temp=false")
    model = exp.build_model(cfg, data)
    exp.train_step(model, exp.make_batch(data, data.splits["train"][:64]), exp.build_optimizer(cfg, model))
    assert scale_and_bias(model) == [10, -10]


@pytest.mark.parametrize(("keys", "kwargs"), [
    ([], {"false_negatives": "mask"}), (["loss.false_negatives=multi_positive"], {"false_negatives": "multi_positive"}),
    (["loss.type=clip"], {"false_negatives": "mask"}),
    (["loss.type=clip", "loss.label_smoothing=0.2"], {"false_negatives": "mask", "label_smoothing": 0.2}),
    (["loss.type=align", "loss.false_negatives=ignore"], {"label_smoothing": 0.1})])
def test_settings_reach_the_loss(tmp_path, coco_demo, data, keys, kwargs):
    model = exp.build_model(config(tmp_path, coco_demo, *keys), data)
    z_image, z_text, ids = unit(9, 4, seed=0), unit(9, 4, seed=1), torch.arange(9) // 2
    numbers = [x.detach() for x in (model.log_scale.exp(), model.logit_bias) if x is not None]
    loss = common.sigmoid_loss if model.loss_type == "siglip" else common.info_nce
    found = exp.LOSSES[model.loss_type](model, z_image, z_text, ids, None, slice(None))
    assert found.item() == loss(z_image, z_text, *numbers, ids=ids, **kwargs).item()


def queue_model(tmp_path, data_dir, data, *overrides):
    common.seed_everything(0)
    cfg = config(tmp_path, data_dir, "model.output_dim=6", "loss.queue_size=10", *overrides)
    return exp.build_model(cfg, data).double()


@pytest.mark.parametrize("loss", ["queue", "blip"])
@pytest.mark.parametrize("false_negatives", ["ignore", "mask", "multi_positive"])
def test_queue_loss_against_loops(tmp_path, coco_demo, data, loss, false_negatives):
    model = queue_model(tmp_path, coco_demo, data, f"loss.type={loss}", f"loss.false_negatives={false_negatives}")
    ids, filled = torch.tensor([3, 5, 3, 8]), torch.tensor([5, 7, 3, 9, 9, 1])
    z, keys = unit(2, 4, 6, seed=0), unit(2, 4, 6, seed=1)
    model.queue[:, :6], model.queue_ids[:6] = unit(2, 6, 6, seed=2), filled  # four places are empty
    model.queue[:, 6:] = 99.0  # whatever lies there must not count
    model.n_steps.fill_(3)
    alpha = 0.4 * min(1, 3 / model.ramp_steps) if loss == "blip" else 0.0
    scale, expected = model.log_scale.exp(), 0.0
    all_ids = ids.tolist() + filled.tolist()
    for way in (0, 1):
        candidates = torch.cat([keys[1 - way], model.queue[1 - way, :6]])
        for i in range(4):
            same = [j for j in range(10) if all_ids[j] == ids[i]]
            kept = [j for j in range(10) if false_negatives != "mask" or j == i or j not in same]
            positive = same if false_negatives == "multi_positive" else [i]
            log_p = (scale * candidates[kept] @ z[way, i]).log_softmax(0)
            soft = (scale.detach() * candidates[kept] @ keys[way, i]).softmax(0)
            for n, j in enumerate(kept):
                expected -= (alpha * soft[n] + (1 - alpha) * (j in positive) / len(positive)) * log_p[n] / 8
    value = exp.queue_loss(model, *z, ids, keys, slice(None))
    exact = 1e-5 if alpha else 1e-10  # alpha is float32
    assert value.item() == pytest.approx(expected.item(), abs=exact)
    slopes = [torch.autograd.grad(x, model.log_scale)[0].item() for x in (value, expected)]
    assert slopes[0] == pytest.approx(slopes[1], abs=exact)


def test_queue_wraps_around_and_takes_batches_of_any_size(tmp_path, coco_demo, data):
    model = queue_model(tmp_path, coco_demo, data, "loss.type=queue")
    seen_keys, seen_ids = [], []
    for step, n in enumerate((4, 4, 3, 1, 4)):  # short batches too
        keys, ids = unit(2, n, 6, seed=step), torch.arange(n) + 10 * step
        model.finish_step(tuple(keys), ids)
        seen_keys.append(keys)
        seen_ids += ids.tolist()
    order = torch.arange(len(seen_ids)) % 10
    for place in range(10):
        last = (order == place).nonzero()[-1].item()
        assert model.queue_ids[place] == seen_ids[last]
        assert torch.equal(model.queue[:, place], torch.cat(seen_keys, 1)[:, last])
    assert model.queue_next == 16 % 10
    model.finish_step(tuple(unit(2, 25, 6, seed=9)), torch.arange(25))  # larger than the queue
    assert sorted(model.queue_ids.tolist()) == list(range(15, 25))
    assert model.n_steps == 6
    for one, steps in (("false", 8), ("true", 2)):  # the ramp is an epoch, of 1,000 captions or of 200 images
        cfg = config(tmp_path, coco_demo, "loss.type=blip", f"training.one_caption_per_image={one}")
        assert exp.build_model(cfg, data).ramp_steps == len(exp.epoch_batches(data, cfg, 0)) == steps


@pytest.mark.parametrize("head", ["align", "cross_modal"])  # a memory that both heads share must not move twice
def test_momentum_copies_follow_parameters_and_batchnorm_and_drop_nothing(tmp_path, coco_demo, data, head):
    keys = [f"model.type={head}", "loss.type=queue", "model.momentum=0.9", "model.dropout=0.5"]
    cfg = config(tmp_path, coco_demo, *keys)
    model = exp.build_model(cfg, data)
    before = {k: v.clone() for k, v in model.momentum_heads.state_dict().items()}
    batch = exp.make_batch(data, data.splits["train"][:64])
    one, other = (model.momentum_keys(batch["image"], batch["text"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    exp.train_step(model, batch, exp.build_optimizer(cfg, model))
    live, after = model.heads.state_dict(), model.momentum_heads.state_dict()
    assert any("running_var" in k for k in after) == (head == "align")
    for k, v in after.items():
        torch.testing.assert_close(v, 0.9 * before[k] + 0.1 * live[k] if v.is_floating_point() else live[k])
    assert not all(torch.equal(live[k], after[k]) for k in after)
    assert not any(p.requires_grad for p in model.momentum_heads.parameters())


# ---------------------------------------------------------------------------------------------------------- evaluation

def noisy_pairs(n_images=40, seed=0):
    z_image, own = unit(n_images, 8, seed=seed), torch.arange(5 * n_images) // 5
    return z_image, F.normalize(z_image[own] + 0.7 * unit(5 * n_images, 8, seed=seed + 1), dim=1), own


def test_permuting_the_test_pairs_changes_nothing_but_the_labels():
    (z_image, z_text, own), g = noisy_pairs(), torch.Generator().manual_seed(0)
    hubs = torch.rand(40, generator=g), torch.rand(200, generator=g)
    captions, images = torch.randperm(200, generator=g), torch.randperm(40, generator=g)
    for hub_rows, moved_hubs in ((None, None), (hubs, (hubs[0][images], hubs[1][captions]))):
        reference = exp.summarise(exp.retrieval(z_image, z_text, own, hub_rows))
        moved = exp.retrieval(z_image[images], z_text[captions], images.argsort()[own[captions]], moved_hubs)
        assert exp.summarise(moved) == pytest.approx(reference, abs=1e-9)
    wrong = exp.summarise(exp.retrieval(z_image[images], z_text, own))  # the labels stay: the scores must fall
    assert wrong["RSUM"] < exp.summarise(exp.retrieval(z_image, z_text, own))["RSUM"] / 3


def naive_recalls(scores, own):
    """{column: percent} of scores [images, captions] without ties, by sorting."""
    out = {}
    i2t = [np.flatnonzero(own[np.argsort(-row)] == i)[0] for i, row in enumerate(scores)]
    t2i = [np.flatnonzero(np.argsort(-column) == own[j])[0] for j, column in enumerate(scores.T)]
    for way, ranks in (("I2T", i2t), ("T2I", t2i)):
        out |= {f"{way} R@{k}": 100 * np.mean(np.array(ranks) < k) for k in exp.KS}
    return out | {"RSUM": sum(out.values())}


def test_gallery_of_unique_images_against_a_loop(tmp_path, coco_demo, data):
    model = exp.build_model(config(tmp_path, coco_demo), data).eval()
    z_image, z_text, own = exp.embed(model, data, "test")
    assert (len(z_image), len(z_text)) == (60, 300)
    expected = naive_recalls((z_image.double() @ z_text.double().T).detach().numpy(), own.numpy())
    values = exp.retrieval(z_image, z_text, own)
    assert exp.summarise(values) == pytest.approx(expected)
    ranks, ids = exp.rank_table({"head": values})["head"], torch.arange(60)
    for way, *gallery in (("I2T", z_image, z_text, ids, own), ("T2I", z_text, z_image, own, ids)):
        m = common.retrieval_metrics(*gallery, map_ks=(5, 10))
        assert [ranks[f"{way} {name}"] for name in ("median rank", "mean rank", "MRR", "mAP@5", "mAP@10")] == (
            pytest.approx([m["median_rank"], m["mean_rank"], m["MRR"], 100 * m["mAP@5"], 100 * m["mAP@10"]]))
    counts = np.random.default_rng(0).multinomial(60, [1 / 60] * 60, 3)  # a resample draws an image with its captions
    drawn = exp.summarise(values, counts.astype(float))
    for r, count in enumerate(counts):
        images, captions = np.repeat(np.arange(60), count), np.repeat(np.arange(300), count[own])
        means = [100 * values[way][f"hit@{k}"][rows].mean().item() for k in exp.KS
                 for way, rows in (("I2T", images), ("T2I", captions))]
        assert drawn["T2I R@1"][r] == pytest.approx(means[1])
        assert drawn["RSUM"][r] == pytest.approx(sum(means))


def test_validation_is_of_all_validation_pairs(tmp_path, coco_demo, data):
    cfg = config(tmp_path, coco_demo, "training.batch_size=1000")  # one batch
    model = exp.build_model(cfg, data)
    row = exp.validate(model, data, cfg)
    z_image, z_text, own = exp.embed(model.eval(), data, "val")
    assert (len(z_image), len(z_text)) == (40, 200)
    loss = common.sigmoid_loss(z_image[own], z_text, 10.0, -10.0, own, "mask")
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["val_RSUM"] == exp.summarise(exp.retrieval(z_image, z_text, own))["RSUM"]


@pytest.mark.parametrize("k", [1, 10, 10**4])  # the last is larger than the bank
def test_csls_against_a_loop(k, monkeypatch):
    z_image, z_text, own = noisy_pairs()
    bank = unit(70, 8, seed=5), unit(90, 8, seed=6)
    monkeypatch.setattr(common, "rows_at_once", lambda *_, **__: 7)
    hubs = exp.hubness(z_image, z_text, bank, k)

    def nearness(x, others):
        return np.array([np.sort(others.numpy() @ row)[::-1][:k].mean() for row in x.numpy()])
    r_image, r_text = nearness(z_image, bank[1]), nearness(z_text, bank[0])
    assert hubs[0].numpy() == pytest.approx(r_image, abs=1e-6)
    assert hubs[1].numpy() == pytest.approx(r_text, abs=1e-6)
    csls = 2 * (z_image @ z_text.T).numpy() - r_image[:, None] - r_text  # Conneau et al. 2018, equation 3
    values = exp.summarise(exp.retrieval(z_image, z_text, own, hubs))
    assert values == pytest.approx(naive_recalls(csls, own.numpy()))
    assert values != exp.summarise(exp.retrieval(z_image, z_text, own))


def test_banks_hold_training_rows_only_and_so_many(tmp_path, coco_demo, data):
    model = exp.build_model(config(tmp_path, coco_demo), data).eval()
    bank = exp.training_bank(model, data)
    assert [len(z) for z in bank] == [200, 1000]
    texts, images = data.texts.clone(), data.images.clone()
    for split in ("val", "test"):  # poison
        texts[data.splits[split]], images[data.image_index[data.splits[split]]] = math.nan, math.nan
    poisoned = exp.training_bank(model, dataclasses.replace(data, texts=texts, images=images))
    assert all(torch.equal(a, b) for a, b in zip(bank, poisoned, strict=True))
    few = exp.training_bank(model, data, 30)
    assert [len(z) for z in few] == [30, 30]
    assert all((whole @ part.T).amax(0).allclose(torch.ones(30)) for whole, part in zip(bank, few, strict=True))
    assert exp.BANK_ROWS == 50_000


def test_closed_forms_against_dense_ones(data):
    rows, d = data.splits["train"], 24
    x, y = data.images[data.image_index[rows]].double(), data.texts[rows].double()
    x, y = x - x.mean(0), y - y.mean(0)
    mean, c = exp.covariances(data, chunk=333)
    torch.testing.assert_close(c, torch.cat([x, y], 1).T.cov(correction=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean[:d], data.images[data.image_index[rows]].double().mean(0), rtol=0, atol=1e-5)
    forms = exp.closed_forms(data, 10)
    for name in ("ridge", "CCA"):
        scorer, settings = forms[name]
        rsum = exp.summarise(exp.retrieval(*exp.embed(scorer, data, "val")))["RSUM"]
        assert settings["validation RSUM"] == rsum > 100  # chance is about 70 here
        scorer, settings = forms[f"{name}, CSLS"]
        z_image, z_text, own = exp.embed(scorer, data, "val")
        hubs = exp.hubness(z_image, z_text, exp.training_bank(scorer, data, 4096), 10)
        assert settings["validation RSUM"] == exp.summarise(exp.retrieval(z_image, z_text, own, hubs))["RSUM"]
    scorer, settings = forms["CCA"]
    image, correlations, text = exp.cca_solver(c[:d, :d], c[d:, d:], c[:d, d:])(*settings["shrinkages"])
    weights = correlations[:settings["dims"]] ** settings["power"]
    for matrix, directions in ((scorer.image, image), (scorer.text, text)):
        torch.testing.assert_close(matrix, (directions[:, :settings["dims"]] * weights).float())
    scorer, settings = forms["ridge"]
    weight = settings["lambda"] * x.square().mean() * len(x)
    expected = torch.linalg.lstsq(torch.cat([x, weight.sqrt() * torch.eye(d, dtype=x.dtype)]),
                                  torch.cat([y, torch.zeros(d, y.shape[1], dtype=x.dtype)])).solution
    torch.testing.assert_close(scorer.image.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(scorer.text, torch.eye(32))


@pytest.mark.parametrize(("shrink_image", "shrink_text"), [(0.3, 0.7), (0.5, 0.5), (0.7, 0.1)])
def test_cca_against_whitening_matrices(shrink_image, shrink_text):
    z = torch.randn(400, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z @ torch.randn(15, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = z.T.cov(correction=0)
    blocks = c[:6, :6], c[6:, 6:], c[:6, 6:]
    a, correlations, b = exp.cca_solver(*blocks)(shrink_image, shrink_text)

    def whitening(block, shrinkage):
        n = len(block)
        shrunk = (1 - shrinkage) * block + shrinkage * block.trace() / n * torch.eye(n, dtype=block.dtype)
        values, vectors = torch.linalg.eigh(shrunk)
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T
    left, right = whitening(blocks[0], shrink_image), whitening(blocks[1], shrink_text)
    u, s, v = torch.linalg.svd(left @ blocks[2] @ right, full_matrices=False)
    torch.testing.assert_close(correlations, s, rtol=0, atol=1e-9)
    for computed, expected in ((a, left @ u), (b, right @ v.T)):
        torch.testing.assert_close(computed.abs(), expected.abs(), rtol=0, atol=1e-9)
    torch.testing.assert_close(a.T @ blocks[2] @ b, torch.diag(s), rtol=0, atol=1e-9)  # the signs of a and b agree


@pytest.mark.parametrize("head", ["attention", "cross_modal"])
def test_ablations_replace_what_they_say(tmp_path, coco_demo, data, head):
    model = exp.build_model(config(tmp_path, coco_demo, f"model.type={head}"), data).eval()
    with torch.no_grad():
        for side in model.heads:
            side.gate.fill_(0.5)
    x = data.images[:20].float()
    before, parts = model.embed_image(x), exp.ablations(model)
    second = {"attention": "tokens not mixed", "cross_modal": "constant read"}[head]
    assert [*parts] == ["linear part", second]
    inputs = (x - model.image_mean) / model.image_deviation
    assert torch.allclose(parts["linear part"].embed_image(x), F.normalize(model.heads[0].linear(inputs), dim=1))
    assert not torch.allclose(parts[second].embed_image(x), before, atol=1e-3)
    if head == "cross_modal":
        branch = parts[second].heads[0].branch
        assert torch.allclose(branch.attention(branch.embed(inputs)), torch.tensor(1 / exp.N_SLOTS))
    assert torch.equal(model.embed_image(x), before)  # copies were changed
    assert exp.ablations(exp.build_model(config(tmp_path, coco_demo), data)) == {}


def test_native_row_where_the_file_is(tmp_path, coco_demo):
    """Zero-shot retrieval in SigLIP's own space, of a random-weight SigLIP."""
    transformers = pytest.importorskip("transformers")
    from tiny_models import save_model
    folder = save_model(tmp_path / "siglip", "siglip")
    siglip = transformers.SiglipModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([f"a photo of {i % 97} and {i % 89} dogs" for i in range(1500)], padding="max_length",
                       max_length=24, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        pixels = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        pictures = siglip.vision_model(pixel_values=pixels).pooler_output.half()
        captions = siglip.text_model(input_ids=tokens).pooler_output.half()
    files = {"train2017_image_embeddings": pictures.repeat_interleave(5, 0), "train2017_text_embeddings": captions}
    cfg = config(tmp_path, copy(coco_demo, tmp_path / "native", **files), "training.num_epochs=1")
    native_file = Path(cfg.data.dir) / "train2017_native_text_embeddings.pt"
    torch.save(captions, native_file)
    data = exp.load_data(cfg)
    exp.train(cfg, data)
    table, rows = exp.evaluate(cfg, data)["tables"]["test"], data.splits["test"]
    images, own = data.image_index[rows].unique(return_inverse=True)
    z_image, z_text = (F.normalize(x.double(), dim=1) for x in (pictures[images], captions[rows]))
    expected = naive_recalls((z_image @ z_text.T).numpy(), own.numpy())
    assert {name: table["native"][name] for name in expected} == pytest.approx(expected, abs=0.5)
    assert "native, CSLS" in table
    native_file.write_bytes(nudged(cfg.data.dir, native_file.stem, 700))
    with pytest.raises(UserError, match="does not match its checksum"):
        exp.load_data(cfg)
    torch.save(captions[:9], native_file)
    with pytest.raises(UserError, match=r"native_text_embeddings.pt: expected \[1500, 16\].*found \[9, 16\]"):
        exp.load_data(cfg)


# ---------------------------------------------------------------------------------------------------------- whole runs

JOB = ["model.type=mlp", "training.num_epochs=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, coco_demo):
    """The folder of an uninterrupted run."""
    base = tmp_path_factory.mktemp("whole")
    assert cli(base, coco_demo, *JOB) == 0
    return base / "run"


def assert_same_run(folder, whole):
    """Equal runs write equal files, but for environment.json and the folder's name."""
    for name in ("best_model.pt", "checkpoint_latest.pt"):
        one, other = (common.load_checkpoint(f / name) for f in (folder, whole))
        one["config"] = other["config"]  # names the folder
        assert repr(one) == repr(other), name
        assert all(torch.equal(x, other["model_state_dict"][key]) for key, x in one["model_state_dict"].items())
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.suffix in (".csv", ".json", ".png", ".txt")]
    assert len(files) > 10
    for name in files:
        if name.name != "environment.json":
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    items = [common.load_checkpoint(f / "per_item.pt") for f in (folder, whole)]
    assert repr(items[0]) == repr(items[1])


def test_a_run_leaves_the_documented_files(whole, coco_demo, tmp_path):
    pictures = ("embedding_space_pca.png", "embedding_space_tsne.png", "similarity_matrix.png", "rank_histogram.png")
    evaluation = [f"evaluation_results/{name}" for name in ("metrics.json", "metrics.txt", *pictures)]
    names = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    assert names == {".lock", "config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt",
                     "checkpoint_latest.pt.previous", "results.json", "splits.json", "training_curves.png", "report.md",
                     "loss_history.json", "result.png", "per_item.pt", *evaluation}
    results = common.read_json(whole / "results.json")
    assert results["synthetic"] is True
    assert results["n"] == 60
    state = common.load_checkpoint(whole / "checkpoint_latest.pt")
    assert (state["epoch"], state["global_step"]) == (4, 32)
    best = common.load_checkpoint(whole / "best_model.pt")
    assert best["step"] == results["chosen"]["step"] == max(metrics(whole), key=lambda row: row["val_RSUM"])["step"]
    losses = common.read_json(whole / "loss_history.json")
    assert losses == {name: [row[name] for row in metrics(whole)] for name in ("train_loss", "val_loss")}
    assert [len(ids) for ids in common.read_json(whole / "splits.json")["image_ids"].values()] == [200, 40, 60]
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    with pytest.MonkeyPatch.context() as patch:  # with the pictures
        for name, real in REAL.items():
            patch.setattr(common, name, real)
        assert cli(tmp_path, coco_demo, *JOB) == 0
    for name in (*evaluation[2:], "result.png", "training_curves.png"):
        assert (tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG", name


def test_the_tables_are_named_as_they_are_read(whole):
    results = common.read_json(whole / "results.json")
    table, differences, ranks = results["tables"].values()
    assert [*results["tables"]] == ["test", "paired difference", "ranks"]
    assert [*table] == ["chance", "ridge", "ridge, CSLS", "CCA", "CCA, CSLS", "mlp", "mlp, CSLS",
                        "mlp, CSLS, random bank"]
    for row in table.values():
        recalls = [row[f"{way} R@{k}"] for way in ("I2T", "T2I") for k in exp.KS]
        assert row["RSUM"] == pytest.approx(sum(recalls))
        assert all(0 <= value <= 100 for value in recalls)
        assert row["RSUM low"] <= row["RSUM high"]
    exact = {f"T2I R@{k}": 100 * k / 60 for k in exp.KS}
    exact |= {f"I2T R@{k}": 100 * (1 - math.comb(295, k) / math.comb(300, k)) for k in exp.KS}
    assert {name: table["chance"][name] for name in exact} == pytest.approx(exact)
    assert table["mlp, CSLS, random bank"]["RSUM"] == pytest.approx(table["mlp"]["RSUM"], abs=15)
    assert table["mlp, CSLS, random bank"] != table["mlp, CSLS"]
    for pair in ("mlp - CCA", "mlp - ridge", "mlp, CSLS - CCA, CSLS", "mlp, CSLS - mlp", "CCA, CSLS - CCA"):
        a, b = pair.split(" - ")
        assert differences[pair]["RSUM"] == pytest.approx(table[a]["RSUM"] - table[b]["RSUM"])
        assert differences[pair]["RSUM low"] <= differences[pair]["RSUM"] <= differences[pair]["RSUM high"]
    noted = {note.partition("images: ")[2].rpartition(",")[0] for note in results["notes"][1:]}
    assert noted == {pair for pair, row in differences.items() if row["RSUM"] <= 0}
    assert {"I2T median rank", "T2I mean rank", "I2T MRR", "T2I mAP@10"} <= ranks["mlp"].keys()
    assert ranks["chance"]["T2I mAP@10"] == pytest.approx(100 * sum(1 / place for place in range(1, 11)) / 60)
    items = common.load_checkpoint(whole / "per_item.pt")
    assert items["ids"] == common.read_json(whole / "splits.json")["image_ids"]["test"]
    for row, values in items["rows"].items():  # the table is the statistic of what --compare reads
        assert exp.summarise(values)["RSUM"] == pytest.approx(table[row.replace("the head", "mlp")]["RSUM"])


def test_health_columns_and_ablation_rows_of_a_gated_head(tmp_path, coco_demo, data):
    cfg = config(tmp_path, coco_demo, "model.type=cross_modal", "evaluation.hubness_k=0", "training.num_epochs=2")
    exp.train(cfg, data)
    table = exp.evaluate(cfg, data)["tables"]["test"]
    assert [*table] == ["chance", "ridge", "CCA", "cross_modal, linear part", "cross_modal, constant read",
                        "cross_modal"]
    for row in metrics(tmp_path / "run"):
        assert 0 < row["linear_image"] <= 1
        assert 0 < row["entropy_text"] <= 1
        assert 1 <= row["rank_image"] <= 16
    assert metrics(tmp_path / "run")[-1]["gate_text"] != 0


MOMENTS = {  # patches of a process that kills itself there
    "mid-epoch": lambda: kill_at(exp, "train_step", 13),
    "during a save": lambda: kill_at(torch, "save", 6, before=lambda _, file: file.write(b"torn")),
    "between the renames of a save": lambda: kill_at(os, "replace", 3, ends_with(".checkpoint_latest.pt.tmp")),
    "between best_model.pt and the checkpoint": lambda: kill_at(common.Run, "save", 2),
    "at the last epoch's end": lambda: kill_at(common.Run, "_write_csv", 4),
    "after training, before the plots": lambda: kill_at(exp, "plot_training", 1),
    "during evaluation": lambda: kill_at(exp, "closed_forms", 1),
    "before results.json": lambda: kill_at(common, "write_json", 1, ends_with("results.json")),
    "after completion": lambda: None,
    "in a trial": lambda: kill_at(exp, "validate", 15),
}


RUN_MOMENTS = [moment for moment in MOMENTS if moment != "in a trial"]


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory, coco_demo):
    base = tmp_path_factory.mktemp("killed")
    (base / "toy.yaml").write_text("experiment: coco_heads\n")
    command = [base / "toy.yaml", f"data.dir={coco_demo}", *SMALL, *JOB]
    killed(__name__, ((moment, [*command, f"output_dir={base / str(i)}"]) for i, moment in enumerate(RUN_MOMENTS)))
    return {moment: base / str(i) for i, moment in enumerate(RUN_MOMENTS)}


@pytest.mark.parametrize("moment", RUN_MOMENTS)
def test_killed_and_rerun_equals_uninterrupted(killed_runs, whole, coco_demo, tmp_path, moment, capsys):
    folder = killed_runs[moment]
    assert (folder / "results.json").exists() == (moment == "after completion")
    assert cli(tmp_path, coco_demo, *JOB, f"output_dir={folder}") == 0
    assert "I2T R@1" in capsys.readouterr().out
    assert_same_run(folder, whole)


def test_a_finished_run_only_reports(whole, coco_demo, tmp_path, capsys, monkeypatch):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.suffix in (".pt", ".csv", ".json", ".png")}
    for name in ("train_step", "closed_forms"):
        monkeypatch.setattr(exp, name, None)
    assert cli(tmp_path, coco_demo, *JOB, f"output_dir={whole}") == 0
    assert "training is complete" in capsys.readouterr().out
    assert all(p.read_bytes() == blob for p, blob in before.items() if p.name != "environment.json")


@pytest.mark.parametrize(("sent", "code", "step"), [(signal.SIGINT, 130, 11), (signal.SIGTERM, 143, 16)])
def test_a_signal_saves_and_the_rerun_equals_uninterrupted(whole, coco_demo, tmp_path, monkeypatch, capsys, sent,
                                                           code, step):
    real, calls = exp.train_step, itertools.count(1)

    def signalled(*args):
        if next(calls) == step:  # in an epoch, or its last
            os.kill(os.getpid(), sent)
        return real(*args)
    monkeypatch.setattr(exp, "train_step", signalled)
    line = failing(tmp_path, coco_demo, capsys, *JOB, code=code)
    assert re.fullmatch(rf"stopped at step {step}; the same command resumes from .*checkpoint_latest.pt\n", line)
    assert cli(tmp_path, coco_demo, *JOB) == 0
    assert f"resuming at step {step} of 32" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


def test_a_damaged_latest_checkpoint_falls_back_and_a_damaged_best_is_an_error(whole, coco_demo, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/checkpoint_latest.pt").write_bytes(b"torn")
    (tmp_path / "run/results.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint_latest.pt is damaged"):
        assert cli(tmp_path, coco_demo, *JOB) == 0
    assert_same_run(tmp_path / "run", whole)
    (tmp_path / "run/best_model.pt").write_bytes(b"torn")
    (tmp_path / "run/results.json").unlink()
    assert re.search(r"best_model.pt is damaged .*--fresh", failing(tmp_path, coco_demo, capsys, *JOB))


def edit_checkpoint(path, change):
    state = common.load_checkpoint(path)
    change(state)
    common.save_checkpoint(path, state, keep_previous=False)


def reshape(state):
    state["model_state_dict"]["heads.0.0.weight"] = torch.zeros(3, 3)


EDITS = {"another shape": reshape, "no weight": lambda s: s["model_state_dict"].pop("heads.1.0.bias"),
         "no statistics": lambda s: s["model_state_dict"].pop("image_mean"),
         "no weights": lambda s: s.pop("model_state_dict")}


@pytest.mark.parametrize("edit", [*EDITS, "truncated"])
def test_an_edited_best_model_is_one_line(whole, coco_demo, tmp_path, capsys, edit):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run/best_model.pt"
    if edit == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        edit_checkpoint(path, EDITS[edit])
    keys = [*JOB, "--stage", "evaluate", "evaluation.hubness_k=5"]
    assert "best_model.pt" in failing(tmp_path, coco_demo, capsys, *keys)
    with pytest.raises(UserError, match="best_model") as error:
        exp.load_model(tmp_path / "run")
    assert "\n" not in str(error.value)
    shutil.copy(whole / "best_model.pt", path)
    if edit in EDITS:
        (tmp_path / "run/checkpoint_latest.pt.previous").unlink()
        edit_checkpoint(tmp_path / "run/checkpoint_latest.pt", EDITS[edit])
        assert "checkpoint_latest.pt is of another model" in failing(tmp_path, coco_demo, capsys, *JOB)


@pytest.mark.parametrize("overrides", [("model.type=align", "loss.type=blip"),
                                       ("model.type=attention", "loss.type=queue", "model.init=cca")],
                         ids="+".join)
def test_queues_copies_and_buffers_resume_exactly(tmp_path, coco_demo, data, monkeypatch, overrides):
    cfgs = [config(tmp_path, coco_demo, *overrides, "loss.queue_size=300", f"output_dir={tmp_path / name}")
            for name in ("whole", "cut")]
    exp.train(cfgs[0], data)
    real, calls = exp.train_step, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 14:  # in the second epoch
            raise MemoryError
        return real(*args)
    monkeypatch.setattr(exp, "train_step", interrupted)
    with pytest.raises(MemoryError):
        exp.train(cfgs[1], data)
    exp.train(cfgs[1], data)
    one, other = (common.load_checkpoint(Path(cfg.output_dir) / "checkpoint_latest.pt")["model_state_dict"]
                  for cfg in cfgs)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert {"queue", "queue_ids", "queue_next", "n_steps"} <= one.keys()
    assert one["queue_ids"].min() >= 0


STOPS = ["training.num_epochs=40", "training.patience=2", "training.learning_rate=0.1", "training.schedule=constant"]


@pytest.mark.parametrize(("monitor", "column", "sign"), [("rsum", "val_RSUM", 1), ("loss", "val_loss", -1)])
def test_early_stopping_keeps_the_best_also_when_killed_in_its_last_epoch(tmp_path, coco_demo, data, monkeypatch,
                                                                          monitor, column, sign):
    cfg = config(tmp_path, coco_demo, *STOPS, f"training.monitor={monitor}")
    history = exp.train(cfg, data)
    best = max(history, key=lambda row: sign * row[column])
    assert len(history) == best["epoch"] + 2 < 40
    assert common.load_checkpoint(tmp_path / "run" / "best_model.pt")["step"] == best["step"]
    cut = config(tmp_path, coco_demo, *STOPS, f"training.monitor={monitor}", f"output_dir={tmp_path / 'cut'}")
    real, calls = common.Run._write_csv, itertools.count(1)

    def interrupted(run):  # after the checkpoint of the epoch that patience ends with
        if next(calls) == len(history):
            raise MemoryError
        real(run)
    monkeypatch.setattr(common.Run, "_write_csv", interrupted)
    with pytest.raises(MemoryError):
        exp.train(cut, data)
    assert exp.train(cut, data) == history


def test_load_model_and_embed_give_what_evaluate_used(tmp_path, coco_demo, data, capsys):
    options = ["model.type=align", "loss.type=queue", "loss.queue_size=64", "training.num_epochs=1"]
    assert cli(tmp_path, coco_demo, *options) == 0
    model, cfg = exp.load_model(tmp_path / "run")
    assert cfg.loss.type == "queue"
    assert not model.training
    z_image, z_text, own = exp.embed(model, data, "test")
    values = common.load_checkpoint(tmp_path / "run/per_item.pt")["rows"]["the head"]
    recomputed = exp.retrieval(z_image, z_text, own)
    assert all(torch.equal(recomputed[way][name], x) for way in ("I2T", "T2I") for name, x in values[way].items())
    assert cli(tmp_path, coco_demo, *options, "--stage", "embed") == 0
    assert cli(tmp_path, coco_demo, *options, "--stage", "embed", "evaluation.embed=val2017") == 0
    assert torch.equal(tensor(tmp_path / "run", "test_image_embeddings"), z_image)
    assert torch.equal(tensor(tmp_path / "run", "test_text_embeddings"), z_text)
    for name, n in (("test", 60), ("val2017", 60)):  # they load as data
        again = exp.load_data(config(tmp_path, tmp_path / "run", f"data.name={name}", "data.val=10"))
        assert (again.images.shape, again.texts.shape) == ((n, 16), (5 * n, 16))
        values = exp.retrieval(F.normalize(again.images.float()), F.normalize(again.texts.float()), again.image_index)
        if name == "test":
            assert again.image_ids == common.read_json(tmp_path / "run/splits.json")["image_ids"]["test"]
            assert exp.summarise(values)["RSUM"] == pytest.approx(exp.summarise(recomputed)["RSUM"], abs=3)
    ids = common.read_json(Path(coco_demo) / "val2017_metadata.json")["image_ids"]
    assert common.read_json(tmp_path / "run/val2017_metadata.json")["image_ids"] == [*map(str, ids)]
    assert torch.equal(tensor(tmp_path / "run", "val2017_text_embeddings"),
                       model.embed_text(tensor(coco_demo, "val2017_text_embeddings").float()).detach())
    narrow = copy(coco_demo, tmp_path / "narrow", val2017_text_embeddings=torch.randn(300, 20))
    for name, folder in (("val2017", narrow), ("val2014", coco_demo)):  # other widths, no such file
        assert name in failing(tmp_path, folder, capsys, *options, "--stage", "embed", f"evaluation.embed={name}")


def test_split_stage_and_compare(tmp_path, coco_demo, capsys, monkeypatch):
    assert cli(tmp_path, coco_demo, "--stage", "split") == 0
    assert [len(ids) for ids in common.read_json(tmp_path / "run/splits.json")["image_ids"].values()] == [200, 40, 60]
    assert not (tmp_path / "run/best_model.pt").exists()
    runs = []
    for head, seed in (("siglip", 1), ("mlp", 1), ("mlp", 2)):
        runs.append(str(tmp_path / f"{head},seed={seed}"))
        keys = [f"model.type={head}", f"seed={seed}", f"output_dir={runs[-1]}", "training.num_epochs=1"]
        assert cli(tmp_path, coco_demo, *keys) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert exp.main(["--compare", *runs]) == 0
    out = capsys.readouterr().out
    values = [common.read_json(Path(r) / "results.json")["tables"]["test"]["mlp"]["RSUM"] for r in runs[1:]]
    assert values[0] != values[1]  # of two seeds
    line = next(line for line in out.splitlines() if line.startswith("mlp: mlp (2)"))
    assert f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}" in line
    assert any(line.startswith("siglip: siglip (1)") for line in out.splitlines())
    assert sum(line.startswith("CCA ") for line in out.splitlines()) == 2  # of recalls and ranks, once each
    table = out.partition("mlp - siglip (paired, 60 items)")[2].splitlines()
    assert [line.split("  ")[0] for line in table[2:4]] == ["the head", "the head, CSLS"]
    assert {"compare.txt", "compare.png"} <= {p.name for p in (tmp_path / "results/compare").iterdir()}


def test_nothing_is_chosen_on_test(tmp_path, coco_demo):
    """With the test captions given to other images, all that is trained and chosen stays as it was, to the bit."""
    def shuffled(metadata):
        order = np.random.default_rng(0).permutation(len(metadata["image_ids"])).tolist()
        return {**metadata, **{key: [metadata[key][i] for i in order] for key in ("image_ids", "image_index")}}
    folder = copy(coco_demo, tmp_path / "shuffled", val2017_metadata=shuffled)
    (tmp_path / "whole").mkdir()
    keys = ["data.test=val2017", "model.type=attention", "model.init=cca", "training.num_epochs=2"]
    assert cli(tmp_path, folder, *keys) == cli(tmp_path / "whole", coco_demo, *keys) == 0
    changed = ("tables", "test", "attention", "RSUM")
    assert_nothing_chosen_on_test(tmp_path / "run", tmp_path / "whole/run", changed)
    assert {"step", "CCA", "CCA, CSLS", "ridge"} <= common.read_json(tmp_path / "run/results.json")["chosen"].keys()


def test_a_failed_start_leaves_no_folder_and_moves_no_run(tmp_path, coco_demo, capsys):
    assert "no such file" in failing(tmp_path, tmp_path / "nowhere", capsys)
    assert not (tmp_path / "run").exists()
    for _ in range(2):  # settings that do not go together are found before anything is written, or moved
        assert "works with" in failing(tmp_path, coco_demo, capsys, "loss.label_smoothing=0.1", "--fresh")
        assert (tmp_path / "run").exists() == (tmp_path / "run/results.json").exists()
        assert cli(tmp_path, coco_demo, "training.num_epochs=1") == 0
    assert not list(tmp_path.glob("*.old-*"))
    assert failing(tmp_path, tmp_path / "nowhere", capsys, "--fresh")
    assert failing(tmp_path, coco_demo, capsys, "--fresh", "--stage", "evaluate")
    assert (tmp_path / "run/results.json").exists()


def test_a_non_finite_run_stops_in_one_line_and_the_rerun_goes_on(tmp_path, coco_demo, capsys, monkeypatch):
    line = failing(tmp_path, coco_demo, capsys, "training.learning_rate=1e6", "training.schedule=constant",
                   "training.num_epochs=40", code=1)
    assert re.search(r"error: non-finite (loss in step \d+, learning rate 1e\+06|weights after)", line)
    keys = ["training.schedule=constant", f"output_dir={tmp_path / 'poisoned'}"]
    real, calls = exp.train_step, itertools.count(1)

    def poisoned(*args):
        losses = real(*args)
        return losses if next(calls) != 11 else {"loss": torch.tensor(math.nan)}
    with monkeypatch.context() as patch:
        patch.setattr(exp, "train_step", poisoned)
        assert "non-finite loss in step 11, learning rate 0.005" in failing(tmp_path, coco_demo, capsys, *keys, code=1)
    assert cli(tmp_path, coco_demo, *keys) == 0  # resumed from before the bad step
    assert "resuming at step 8" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small tmpfs")
def test_full_disk_is_one_line_and_loses_nothing(whole, coco_demo, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=170k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        keys = [*JOB, f"output_dir={disk / 'run'}"]
        assert "No space left" in failing(tmp_path, coco_demo, capsys, *keys, code=1)
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert cli(tmp_path, coco_demo, *keys) == 0
        assert_same_run(disk / "run", whole)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # this process still holds the run's lock


# -------------------------------------------------------------------------------------------------------------- tuning

SPACE = {"training.learning_rate": {"low": "1e-4", "high": "1e-1", "log": "true"}, "model": {"type": ["siglip", "mlp"]},
         "model.hidden_dim": [16, 32], "loss.type": ["clip", "siglip"]}


def tune_yaml(folder, space, **keys):
    (folder / "base.yaml").write_text("experiment: coco_heads\n")
    keys = {"experiment": "coco_heads", "base": str(folder / "base.yaml"), "n_trials": 10, "n_jobs": 1,
            "n_captions": 10**6, "storage": f"sqlite:///{folder / 'study.db'}", "results_dir": str(folder / "best"),
            "search_space": space} | keys
    (folder / "tune.yaml").write_text(yaml.safe_dump(keys))
    return folder / "tune.yaml"


def trials(folder, name="xclip_siglip_tuning"):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{folder / 'study.db'}"
    if (folder / "journal.log").exists():
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
        storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=name, storage=storage).trials


def states(found):
    return [trial.state.name for trial in found]


def test_tuning_subset_has_whole_images(data):
    rows = exp.tuning_subset(data, 502, seed=1)
    assert len(rows) == 505
    assert len(data.image_index[rows].unique()) == 101
    assert set(rows.tolist()) <= set(data.splits["train"].tolist())
    assert torch.equal(exp.tuning_subset(data, 10**6, seed=1), data.splits["train"])


def test_tuning_starts_at_its_base_prunes_resumes_and_writes_a_config_that_trains(tmp_path, coco_demo, capsys):
    pytest.importorskip("optuna")
    path = tune_yaml(tmp_path, SPACE)
    overrides = [f"data.dir={coco_demo}", *SMALL, "training.num_epochs=6"]
    killed(__name__, [("in a trial", [path, *overrides])])  # the third
    assert states(trials(tmp_path)).count("RUNNING") == 1
    assert exp.main([str(path), *overrides]) == 0
    out, found = capsys.readouterr().out, trials(tmp_path)
    base = found[0]
    assert ["base" in t.user_attrs for t in found] == [True] + [False] * (len(found) - 1)
    assert base.state.name == "COMPLETE"  # never pruned
    ended = [t for t in found if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == 10
    assert "PRUNED" in states(found)
    failed = [t for t in found if t.state.name == "FAIL"]  # the one that was killed; its parameters were tried again
    assert len(failed) == 1
    assert any(t.params == failed[0].params for t in found[failed[0].number + 1:])
    best = max((t for t in found if t.state.name == "COMPLETE"), key=lambda t: t.value)
    assert best.value >= base.value
    best_yaml = tmp_path / "best/best_config.yaml"
    assert f"next: python exp_coco_heads.py {best_yaml}" in out
    assert exp.main([str(path), *overrides]) == 0  # finished: it only reports
    assert len(trials(tmp_path)) == len(found)
    assert capsys.readouterr().out.splitlines()[-1] == out.splitlines()[-1]
    assert exp.main([str(best_yaml), f"output_dir={tmp_path / 'run'}", "--stage", "train"]) == 0
    assert max(row["val_RSUM"] for row in metrics(tmp_path / "run")) == best.value  # the same run
    changed = tune_yaml(tmp_path, {**SPACE, "model.hidden_dim": [8]}, n_trials=1)
    assert exp.main([str(changed), *overrides]) == 0
    message = r"searched something else; this search is the study (xclip_siglip_tuning_[0-9a-f]{8})"
    name = re.search(message, capsys.readouterr().out).group(1)
    assert states(trials(tmp_path, name)) == ["COMPLETE"]
    broken = tune_yaml(tmp_path, SPACE, storage="sqlite:////proc/none/study.db")
    assert exp.main([str(broken), *overrides]) == 2
    assert "/proc/none/study.db" in capsys.readouterr().err


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_workers_end_with_their_parent_and_a_journal_is_resumed_by_others(tmp_path, coco_demo):
    pytest.importorskip("optuna")
    path = tune_yaml(tmp_path, SPACE, storage=str(tmp_path / "journal.log"), n_jobs=2)
    command = [sys.executable, "exp_coco_heads.py", str(path), f"data.dir={coco_demo}", *SMALL, "training.num_epochs=9"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "n_trials=1000"], cwd=ROOT, **quiet) as process:
        deadline = time.time() + 120
        while not (tmp_path / "journal.log").exists() or states(trials(tmp_path)).count("RUNNING") < 2:
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    deadline = time.time() + 20
    while not all(map(is_gone, workers)):
        assert time.time() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    assert len(workers) >= 2
    before = states(trials(tmp_path))
    assert "RUNNING" in before
    wanted = before.count("COMPLETE") + before.count("PRUNED") + 2
    result = subprocess.run([*command, f"n_trials={wanted}"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = trials(tmp_path)
    after = states(found)
    assert after[:len(before)] == ["FAIL" if state == "RUNNING" else state for state in before]
    assert wanted <= after.count("COMPLETE") + after.count("PRUNED") <= wanted + 1  # n_jobs - 1
    retried = [t.params.items() for t in found[len(before):]]
    for interrupted in (t.params.items() for t in found[:len(before)] if t.state.name == "FAIL"):
        assert any(interrupted <= params for params in retried)  # killed while it drew, it may have had a part of them
    assert next(t for t in found if "base" in t.user_attrs and t.state.name != "FAIL").state.name == "COMPLETE"


def test_nan_trials_fail_and_count(tmp_path, coco_demo, capsys, monkeypatch):
    pytest.importorskip("optuna")
    real = exp.train_step

    def diverging(model, *args):
        losses = real(model, *args)
        next(model.heads.parameters()).data.fill_(math.nan)
        return losses
    monkeypatch.setattr(exp, "train_step", diverging)
    assert exp.main([str(tune_yaml(tmp_path, SPACE, n_trials=2)), f"data.dir={coco_demo}", *SMALL]) == 2
    assert "all trials of xclip_siglip_tuning failed or were pruned" in capsys.readouterr().err
    assert states(trials(tmp_path)) == ["FAIL", "FAIL"]


@pytest.mark.parametrize(("space", "message"), [
    ({"training.learnig_rate": ["1e-3"]}, "did you mean training.learning_rate"),
    ({"model.type": "mlp"}, "model.type: expected a list of choices"), ({"model.dropout": ["1.5"]}, "must be < 1"),
    ({"model.dropout": {"low": "0.5", "high": "0.1"}}, "model.dropout: expected .* numbers low < high"),
    ({"model.hidden_dim": {"low": "64", "high": "null"}}, "model.hidden_dim: expected"),
    ({"model.use_bn": {"low": "false", "high": "true"}}, "model.use_bn: expected"),
    ({"model.dropout": {"low": "0.1"}}, "model.dropout: expected"), ({"model.dropout": []}, "model.dropout: expected"),
    ({"model.dropout": {"low": "0.1", "high": "0.5", "step": "0.1"}}, "model.dropout: expected"),
    ({"training.weight_decay": {"low": "0", "high": "1", "log": "true"}}, "above 0 with log"),
    ({"model.dropout": {"low": "0.1", "high": "0.5", "log": "maybe"}}, "model.dropout"), ({}, "no search_space")])
def test_bad_search_spaces(space, message):
    with pytest.raises(UserError, match=message) as error:
        exp.read_search_space("tune.yaml", exp.TuneConfig(search_space=space))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tune").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_tune_yaml_loads_on_its_base(path, monkeypatch):
    tuning = common.load_config(exp.TuneConfig, path)
    assert tuning.n_trials == {"default": 150, "siglip": 50, "clip": 50, "attention": 75, "mlp": 40}[path.stem]
    space = exp.read_search_space(path, tuning)
    monkeypatch.chdir(ROOT)
    for place in (0, -1):
        values = {key: spec["choices"][place] if kind == "categorical" else spec[("low", "high")[place]]
                  for key, (kind, spec) in space.items()}
        cfg = exp.trial_config(tuning, [], values, False)
        assert cfg.training.learning_rate == values["training.learning_rate"]


def test_what_starts_a_search_and_what_does_not(monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(exp, "tune", lambda args: begun.append(args.config))
    monkeypatch.chdir(ROOT)
    assert exp.main(["--stage", "tune"]) == exp.main(["configs/tune/mlp.yaml"]) == 0
    assert begun == ["configs/tune/default.yaml", "configs/tune/mlp.yaml"]
    for args in (["--stage", "evaluate"], ["--fresh"]):
        assert exp.main(["configs/tune/siglip.yaml", *args]) == 2
        assert "describes a search, not a run" in capsys.readouterr().err
    assert len(begun) == 2
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert exp.main(["configs/siglip.yaml", "--stage", "tune"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tune YAMLs are in configs/tune/" in error


# ----------------------------------------------------------------------------------------------------------- bad input

def nudged(folder, name, row):
    """The bytes of a file with one bit of one number flipped."""
    blob = bytearray((Path(folder) / f"{name}.pt").read_bytes())
    place = blob.find(tensor(folder, name)[row].numpy().tobytes())
    blob[place] ^= 1
    return bytes(blob)


IMAGES, TEXTS, METADATA = "train2017_image_embeddings", "train2017_text_embeddings", "train2017_metadata"
BAD_DATA = {
    "few text rows": (lambda f: {TEXTS: tensor(f, TEXTS)[:-3].clone()}, "one for each of the 1497 rows .*found 1500"),
    "surplus text rows": (lambda f: {TEXTS: torch.randn(1503, 32)}, "one for each of the 1503 rows .*found 1500"),
    "few image rows": (lambda f: {IMAGES: tensor(f, IMAGES)[:-3].clone()},
                       rf"{IMAGES}.pt: expected 1500 rows .* or 300 .*found 1497 rows and no image_index"),
    "surplus image rows": (lambda f: {IMAGES: torch.cat([tensor(f, IMAGES)[::5], torch.randn(1200, 24).half()]),
                                      METADATA: lambda m: {**m, "image_index": [i // 5 for i in range(1500)]}},
                           rf"{IMAGES}.pt: captions 0 and 1 have the image id 100000 .* but different embeddings"),
    "one image more": (lambda f: {IMAGES: torch.randn(301, 24),
                                  METADATA: lambda m: {**m, "image_index": [i // 5 for i in range(1500)]}},
                       rf"{IMAGES}.pt: expected 1500 rows .* or 300 .*found 301 rows"),
    "no image_ids": (lambda f: {METADATA: lambda m: {k: v for k, v in m.items() if k != "image_ids"}},
                     rf"{METADATA}.json: expected image_ids, .*found NoneType"),
    "nan": (lambda f: {IMAGES: poison(f, IMAGES, slice(10, 15), math.nan)},
            rf"{IMAGES}.pt: 5 of 1500 rows hold NaN, infinite or huge values, the first is row 10"),
    "nan in a repeated row": (lambda f: {IMAGES: poison(f, IMAGES, 13, math.nan)},
                              rf"{IMAGES}.pt: 1 of 1500 rows hold NaN, infinite or huge values, the first is row 13"),
    "inf in a repeated row": (lambda f: {IMAGES: poison(f, IMAGES, 13, math.inf)},
                              rf"{IMAGES}.pt: 1 of 1500 rows hold NaN, infinite or huge values, the first is row 13"),
    "inf": (lambda f: {TEXTS: poison(f, TEXTS, [4, 9], math.inf)}, rf"{TEXTS}.pt: 2 of 1500 .* first is row 4"),
    "flipped bit": (lambda f: {TEXTS: nudged(f, TEXTS, 700)}, rf"{TEXTS}.pt: .*does not match its checksum"),
    "corrupt": (lambda f: {IMAGES: b"PK\x03\x04 not a checkpoint"}, rf"{IMAGES}.pt: cannot be read"),
    "truncated": (lambda f: {IMAGES: (Path(f) / f"{IMAGES}.pt").read_bytes()[:-999]}, rf"{IMAGES}.pt: cannot be read"),
    "not a float tensor": (lambda f: {IMAGES: torch.arange(6)}, r"expected a float tensor .*, found torch.int64 \[6\]"),
    "no columns": (lambda f: {TEXTS: torch.zeros(1500, 0)}, rf"{TEXTS}.pt: "),
    "no rows": (lambda f: {TEXTS: torch.zeros(0, 32), IMAGES: torch.zeros(0, 24),
                           METADATA: lambda m: {"image_ids": []}}, "train2017_"),
    "sparse": (lambda f: {TEXTS: torch.eye(1500).to_sparse()}, "holds a sparse tensor"),
    "constant": (lambda f: {TEXTS: torch.ones(1500, 32)}, rf"{TEXTS}.pt: .*constant"),
    "huge": (lambda f: {TEXTS: torch.randn(1500, 32) * 1e30}, rf"{TEXTS}.pt"),
    "metadata": (lambda f: {METADATA: b"{"}, rf"{METADATA}.json: cannot be read as JSON"),
    **{f"image_index {name}": (lambda f, index=index: {IMAGES: tensor(f, IMAGES)[::5].clone(),
                                                       METADATA: lambda m: {**m, "image_index": index}}, message)
       for name, index, message in (
           ("out of range", [300] * 1500, f"{METADATA}.json: image_index must"),
           ("negative", [-1] * 1500, f"{METADATA}.json: image_index must"),
           ("of floats", [0.5] * 1500, f"{METADATA}.json: image_index"), ("empty", [], f"{METADATA}.json: image_index"),
           ("short", [0, 1], f"{METADATA}.json: image_index"), ("of words", ["a"] * 1500, f"{METADATA}.json"),
           ("of other images", [i * 7 % 300 for i in range(1500)], "captions 0 and 1 have the image id 100000"))},
    "one id, two images": (lambda f: {METADATA: lambda m: {**m, "image_ids": [i // 10 for i in range(1500)]}},
                           rf"{IMAGES}.pt: captions 0 and 5 have the image id 0 in {METADATA}.json"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_with_file_expected_and_found(tmp_path, coco_demo, case):
    make, message = BAD_DATA[case]
    folder = copy(coco_demo, tmp_path / "bad", **make(coco_demo))
    with pytest.raises(UserError, match=message) as error:
        exp.load_data(config(tmp_path, folder))
    assert "\n" not in str(error.value)


def test_files_that_do_not_go_together(tmp_path, coco_demo, whole, capsys):
    images = torch.randn(300, 20).repeat_interleave(5, 0)
    narrow = copy(coco_demo, tmp_path / "narrow", train2017_image_embeddings=images)
    assert "holds a run on other data" in failing(tmp_path, narrow, capsys, *JOB, f"output_dir={whole}")
    few = copy(coco_demo, tmp_path / "few", train2017_metadata=lambda m: {**m, "caption_ids": m["caption_ids"][:2]})
    (tmp_path / "ids.txt").write_text("1000000 1000001")
    with pytest.raises(UserError, match="caption_ids"):
        exp.load_data(config(tmp_path, few, "data.test=karpathy", f"data.karpathy_ids={tmp_path / 'ids.txt'}"))
    leak = copy(coco_demo, tmp_path / "leak",
                val2017_metadata=lambda m: {**m, "image_ids": [i - 800_000 for i in m["image_ids"]]})
    with pytest.raises(UserError, match="60 image ids are in both train2017 and val2017"):
        exp.load_data(config(tmp_path, leak, "data.test=val2017"))
    widths = copy(coco_demo, tmp_path / "widths", val2017_text_embeddings=torch.randn(300, 31))
    with pytest.raises(UserError, match=r"val2017 has image and text widths \(24, 31\), train2017 has \(24, 32\)"):
        exp.load_data(config(tmp_path, widths, "data.test=val2017"))


@pytest.mark.parametrize(("args", "message"), [
    (["training.learnig_rate=1"], "did you mean training.learning_rate"),
    (["training.batch_size=big"], "expected a whole number"),
    (["model.type=transformer"], "expected one of mlp, siglip, clip"),
    (["data.dir=nowhere"], r"nowhere/train2017_image_embeddings.pt: no such file; .*--demo"),
    (["--stage", "evaluate"], "no trained run to evaluate"), (["--stage", "embed"], "no trained run"),
    (["--compare", "nowhere"], "--compare takes folders alone"),
    (["device=cuda:77"], "device=cuda:77 is not available"),
    (["output_dir=/proc/none"], "the output folder /proc/none cannot be written"),
    (["data.test=0.999"], "data.val=40: asks for 40 images, 0 of 300 are left"),
    (["data.test=1000"], "asks for 1000 images, 300 of 300"), (["data.test=1"], "the test split has 1 of 300 images"),
    (["data.val=most"], "data.val: expected .* one of auto, found 'most'"),
    (["data.val=0"], "data.val=0: asks for 0 images"), (["data.train=-0.5"], "asks for -150 images"),
    (["data.test=val2014"], "val2014_image_embeddings.pt: no such file"), (["data.test=karpathy"], "data.karpathy_ids"),
    (["model.type=attention", "model.hidden_dim=60"], "must be a multiple of 8 tokens x model.num_heads=4"),
    (["model.type=cross_modal", "model.hidden_dim=61"], "must be a multiple of model.num_heads=4"),
    (["loss.type=siglip", "loss.label_smoothing=0.1"], "works with loss.type=clip or align, not siglip"),
    (["loss.type=clip", "loss.queue_size=64"], "works with loss.type=queue or blip, not clip"),
    (["loss.type=clip", "loss.temperature=0.001"], r"must lie in \[0.01, 1\] with loss.type=clip"),
    (["loss.type=blip", "loss.temperature=0.9"], r"must lie in \[0.001, 0.5\] with loss.type=blip"),
    (["model.type=mlp", "model.init=cca"], "starts the linear part of a head; model.type=mlp has none")])
def test_mistakes_are_one_line_and_leave_no_folder(tmp_path, coco_demo, capsys, args, message):
    assert re.search(message, failing(tmp_path, coco_demo, capsys, *args))
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- README

def test_the_readmes_copy_and_modify_diff_is_applied_and_runs(tmp_path, coco_demo):
    """A head `transformer`, a hinge loss and a metric `mean rank`, as a reader would add them."""
    after = (ROOT / "README.md").read_text().partition("cp exp_coco_heads.py exp_my_heads.py")[2]
    diff = re.search(r"^```diff\n(.*?)^```$", after, flags=re.DOTALL | re.MULTILINE).group(1)
    assert diff.count("@@") >= 3
    (tmp_path / "exp_my_heads.py").write_text(apply_diff((ROOT / "exp_coco_heads.py").read_text(), diff))
    for name in ("common.py", "demo_data.py"):
        shutil.copy(ROOT / name, tmp_path)
    settings = {"experiment": "my_heads", "model": {"type": "transformer", "num_layers": 2, "num_heads": 8},
                "loss": {"type": "hinge"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    small = [item for item in SMALL if "num_heads" not in item]
    command = [sys.executable, "exp_my_heads.py", "my.yaml", f"data.dir={coco_demo}", *small, "model.hidden_dim=64"]
    result = subprocess.run([*command, "output_dir=run"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    results = common.read_json(tmp_path / "run/results.json")
    assert results["experiment"] == "my_heads"
    assert "transformer head, hinge loss" in results["headline"]
    table = results["tables"]["test"]
    assert 1 <= table["transformer"]["I2T mean rank"] < table["chance"]["I2T mean rank"]
    losses = [row["train_loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert "I2T mean rank" in result.stdout
    with pytest.raises(UserError, match="a config of exp_my_heads"):
        common.load_config(exp.Config, tmp_path / "my.yaml")


# ----------------------------------------------------------------------------------------------------------- real data

@pytest.mark.skipif(not (SHARED / "data/coco_heads").exists(), reason="the real embeddings are not here")
def test_real_embeddings_reproduce_the_published_cca(tmp_path, monkeypatch):
    """256 dimensions, shrinkage 0.5, 29,985 pairs: I2T R@1/5/10 24.1/48.8/60.9, T2I 17.1/43.1/57.3, RSUM 251.3."""
    keys = [f"data.dir={SHARED / 'data/coco_heads'}", "data.test=val2017", "device=cpu", f"output_dir={tmp_path}"]
    data = exp.load_data(common.load_config(exp.Config, None, keys))
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [26_985, 3_000, 5_000]
    for name, value in (("RIDGE_STRENGTHS", (0.1, 0.3)), ("CCA_SHRINKAGES", {0: (0.3, 0.7)}), ("CCA_DIMS", (128, 256))):
        monkeypatch.setattr(exp, name, value)  # the rest is not chosen here
    scores = {}
    for name, (scorer, _) in exp.closed_forms(data, 0).items():
        scores[name] = exp.summarise(exp.retrieval(*exp.embed(scorer, data, "test"), map_ks=()))
    assert scores["ridge"]["I2T R@1"] == pytest.approx(16.5, abs=1.5)
    assert scores["CCA"]["RSUM"] > 270  # a shrinkage a side


@pytest.mark.skipif(not (SHARED / "documents").exists(), reason="the source document is not here")
def test_documented_yaml_loads_as_it_stands(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (SHARED / "documents/coco_heads.md").read_text(), flags=re.DOTALL)
    for i, block in enumerate(blocks):
        (tmp_path / f"{i}.yaml").write_text(block)
        if '"transformer"' in block:  # what the README's diff adds
            with pytest.raises(UserError, match=f"expected one of {', '.join(HEADS)}, found 'transformer'"):
                common.load_config(exp.Config, tmp_path / f"{i}.yaml")
            continue
        cfg = common.load_config(exp.Config, tmp_path / f"{i}.yaml")
        for section, values in yaml.safe_load(block.replace('\\"', '"')).items():
            for key, value in values.items():
                assert getattr(getattr(cfg, section), key) == (float(value) if key == "learning_rate" else value)
        exp.make_heads(cfg.model, [40, 48])
    assert len(blocks) >= 9
    assert "transformer" in "".join(blocks)
