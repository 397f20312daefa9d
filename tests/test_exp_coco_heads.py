"""exp_coco_heads.py: data layouts and splits, heads, leakage gates, baselines, exact resume under SIGKILL, bad input."""

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
from conftest import ROOT

import common
import exp_coco_heads as exp
from common import UserError

SHARED = ROOT.parent / "shared"
HEADS = ("mlp", "siglip", "clip", "align", "blip", "attention", "cross_modal")
SMALL = ["training.batch_size=128", "training.num_epochs=3", "model.output_dim=16", "model.hidden_dim=32", "data.val=40", "data.test=0.2",
         "evaluation.n_bootstrap=50"]


def config(tmp_path, data_dir, *overrides, text="training:\n  learning_rate: 5e-3\n"):
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return common.load_config(exp.Config, path, [f"data.dir={data_dir}", f"output_dir={tmp_path / 'run'}", "device=cpu", *SMALL, *overrides])


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


def tensor(folder, name):
    return torch.load(Path(folder) / f"{name}.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------------------------ data

def test_both_image_layouts_and_all_dtypes_load_alike(tmp_path, coco_demo):
    reference = exp.load_data(config(tmp_path, coco_demo))  # train2017 repeats an image row for every caption
    repeated = tensor(coco_demo, "train2017_image_embeddings")
    index = [i // 5 for i in range(1500)]

    def add_index(metadata):
        return {**metadata, "image_index": index}
    one_row = copy(coco_demo, tmp_path / "one_row", train2017_image_embeddings=repeated[::5].clone(), train2017_metadata=add_index)
    both = copy(coco_demo, tmp_path / "both", train2017_metadata=add_index)  # repeated rows, image_index left in
    full = copy(coco_demo, tmp_path / "full", train2017_image_embeddings=repeated.float())
    for folder in (one_row, both, full):
        data = exp.load_data(config(tmp_path, folder))
        assert torch.equal(data.images, reference.images)
        assert data.images.dtype == torch.float16
        assert torch.equal(data.image_index, reference.image_index)
        assert all(torch.equal(data.splits[s], reference.splits[s]) for s in data.splits)
    large = copy(coco_demo, tmp_path / "large", train2017_image_embeddings=repeated.float() * 1e6)
    assert exp.load_data(config(tmp_path, large)).images.dtype == torch.bfloat16  # float16 would overflow
    small = copy(coco_demo, tmp_path / "small", train2017_image_embeddings=(repeated.float() * 1e-8).requires_grad_())
    assert exp.load_data(config(tmp_path, small)).images.dtype == torch.bfloat16  # or lose its precision


def test_old_torch_files_and_surplus_images_load(tmp_path, coco_demo):
    repeated = tensor(coco_demo, "train2017_image_embeddings")
    reference = exp.load_data(config(tmp_path, coco_demo))
    surplus = torch.cat([repeated[::5], torch.randn(1200, 24).half()])  # as many rows as captions, by coincidence
    folder = copy(coco_demo, tmp_path / "surplus", train2017_image_embeddings=surplus,
                  train2017_metadata=lambda m: {**m, "image_index": [i // 5 for i in range(1500)]})
    torch.save(tensor(coco_demo, "train2017_text_embeddings"), folder / "train2017_text_embeddings.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(exp.load_data(config(tmp_path, folder)).images, reference.images)


def test_image_rows_follow_image_index_not_order(tmp_path, coco_demo):
    reference = exp.load_data(config(tmp_path, coco_demo))
    rows = tensor(coco_demo, "train2017_image_embeddings")[::5]
    shuffle = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    where = shuffle.argsort().repeat_interleave(5).tolist()
    folder = copy(coco_demo, tmp_path / "shuffled", train2017_image_embeddings=rows[shuffle].clone(),
                  train2017_metadata=lambda m: {**m, "image_index": where})
    assert torch.equal(exp.load_data(config(tmp_path, folder)).images, reference.images)


def test_splits_are_by_image_and_fixed_by_the_split_seed(tmp_path, coco_demo):
    data = exp.load_data(config(tmp_path, coco_demo))
    images = {s: set(data.image_index[rows].tolist()) for s, rows in data.splits.items()}
    assert {s: len(i) for s, i in images.items()} == {"train": 200, "val": 40, "test": 60}
    assert not images["train"] & images["val"] | images["train"] & images["test"] | images["val"] & images["test"]
    assert all(len(data.splits[s]) == 5 * len(images[s]) for s in images)  # whole images
    same = exp.load_data(config(tmp_path, coco_demo, "seed=7"))
    other = exp.load_data(config(tmp_path, coco_demo, "data.split_seed=7"))
    assert torch.equal(data.splits["test"], same.splits["test"])
    assert not torch.equal(data.splits["test"], other.splits["test"])


@pytest.mark.parametrize(("overrides", "counts"), [
    (["data.test=0.04", "data.val=auto"], (240, 30, 12)), (["data.test=30", "data.val=20", "data.train=100"], (100, 20, 30)),
    (["data.test=0.1", "data.val=0.1", "data.train=rest"], (240, 30, 30)), (["data.test=0.5", "data.val=auto"], (120, 30, 150)),
    (["data.test=val2017", "data.val=auto"], (270, 30, 60)), (["data.test=val2017", "data.val=0.01", "data.train=0.5"], (150, 3, 60))])
def test_split_sizes(tmp_path, coco_demo, overrides, counts):
    data = exp.load_data(config(tmp_path, coco_demo, *overrides))
    assert tuple(len(data.image_index[data.splits[s]].unique()) for s in ("train", "val", "test")) == counts


def test_documented_split_of_coco():
    """118,287 images: 80% / 1% / 4%, as the recipe has it."""
    n = 118_287
    pool, test = exp.split_off(list(range(n)), 0.04, n, "test")
    pool, val = exp.split_off(pool, max(0.01, min(0.1, 1000 / n)), n, "val")
    assert (len(test), len(val), len(exp.split_off(pool, 0.8, n, "train")[1])) == (4731, 1183, 94630)


@pytest.mark.parametrize("as_captions", [False, True])
def test_karpathy_list(tmp_path, coco_demo, as_captions):
    train, val = (json.loads((Path(coco_demo) / f"{n}2017_metadata.json").read_text()) for n in ("train", "val"))
    images = set(train["image_ids"][:50] + val["image_ids"][:100])  # 10 images of train, 20 of val
    listed = [c for m in (train, val) for c, i in zip(m["caption_ids"], m["image_ids"], strict=True) if i in images] if as_captions else list(images)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, listed)))
    data = exp.load_data(config(tmp_path, coco_demo, "data.test=karpathy", f"data.karpathy_ids={tmp_path / 'ids.txt'}", "data.val=30"))
    got = {s: {data.image_ids[i] for i in data.image_index[rows].tolist()} for s, rows in data.splits.items()}
    assert got["test"] == images
    assert len(got["train"]) == 300 - 10 - 30
    assert not (got["train"] | got["val"]) & set(val["image_ids"])
    (tmp_path / "ids.txt").write_text("1 2 3")
    with pytest.raises(UserError, match=r"3 of 3 ids are no image_ids"):
        exp.load_data(config(tmp_path, coco_demo, "data.test=karpathy", f"data.karpathy_ids={tmp_path / 'ids.txt'}"))


def test_an_epoch_is_a_pure_function_of_seed_and_epoch(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo)
    data = exp.load_data(cfg)
    batches = exp.epoch_batches(data, cfg, 1)
    assert torch.equal(torch.cat(batches).sort().values, data.splits["train"])
    assert {len(b) for b in batches} <= {125, 126}  # 1,000 pairs in 8 batches of at most 128: none is short
    assert torch.equal(torch.cat(exp.epoch_batches(data, cfg, 1)), torch.cat(batches))
    assert not torch.equal(torch.cat(exp.epoch_batches(data, cfg, 2)), torch.cat(batches))
    data.splits["train"] = data.splits["train"][:21]
    pairs = exp.epoch_batches(data, config(tmp_path, coco_demo, "training.batch_size=2"), 1)
    assert sorted(map(len, pairs)) == [2] * 9 + [3]  # a pair alone would have no negative
    data = exp.load_data(cfg)
    once = torch.cat(exp.epoch_batches(data, config(tmp_path, coco_demo, "training.one_caption_per_image=true"), 1))
    assert len(once) == 200 == len(data.image_index[once].unique())


def test_batch_pairs_a_caption_with_its_image(tmp_path, coco_demo):
    data = exp.load_data(config(tmp_path, coco_demo))
    rows = torch.tensor([7, 700, 1499])
    batch = exp.make_batch(data, rows)
    assert torch.equal(batch["image"], tensor(coco_demo, "train2017_image_embeddings")[rows].float())
    assert torch.equal(batch["text"], tensor(coco_demo, "train2017_text_embeddings")[rows].float())
    assert [data.image_ids[i] for i in batch["ids"].tolist()] == [100_001, 100_140, 100_299]


# ------------------------------------------------------------------------------------------------------ model, objective

@pytest.mark.parametrize(("head", "loss"), [*((head, "clip") for head in HEADS), ("siglip", "siglip"), ("mlp", "align"), ("clip", "queue"),
                                            ("blip", "blip"), ("cross_modal", "blip")])
def test_one_batch_is_learnt_and_every_parameter_gets_gradient(tmp_path, coco_demo, head, loss):
    cfg = config(tmp_path, coco_demo, f"model.type={head}", f"loss.type={loss}", "model.input_dropout=0", "model.dropout=0",
                 "training.learning_rate=1e-2", "model.hidden_dim=64", "model.output_dim=64", "model.num_heads=4", "loss.temperature=0.07",
                 "training.one_caption_per_image=true")
    common.seed_everything(0)
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    optimizer = exp.build_optimizer(cfg, model)
    batch = exp.make_batch(data, exp.epoch_batches(data, cfg, 0)[0][:48])
    first = exp.train_step(model, batch, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    for _ in range(150):
        last = exp.train_step(model, batch, optimizer)
    if loss in ("clip", "siglip"):  # the others' targets are soft: their loss has a floor
        assert last["loss"] < 0.15 * first["loss"]
    z_image, z_text = model.eval()(batch["image"], batch["text"])
    torch.testing.assert_close(z_image.norm(dim=1), torch.ones(48))
    assert (z_image @ z_text.T).argmax(1).eq(torch.arange(48)).float().mean() > 0.95


def test_starting_scale_and_bias(tmp_path, coco_demo):
    def start(*overrides):
        cfg = config(tmp_path, coco_demo, *overrides)
        return {k: round(v.item(), 4) for k, v in exp.logit_parameters(exp.build_model(cfg, exp.load_data(cfg))).items()}
    assert start("loss.type=clip") == {"logit_scale": 14.2857}
    assert start("loss.type=siglip") == {"logit_scale": 10.0, "logit_bias": -10.0}
    assert start("loss.temperature=0.01", "loss.logit_bias=auto") == {"logit_scale": 100.0, "logit_bias": round(-math.log(127), 4)}
    assert start("loss.type=align") == {"logit_scale": 1.0}
    assert start("loss.type=queue") == start("loss.type=blip") == {"logit_scale": 14.2857}


def test_weight_decay_spares_scale_bias_and_norms(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "model.type=mlp", "loss.type=siglip", "training.weight_decay=0.3")
    model = exp.build_model(cfg, exp.load_data(cfg))
    decay, rest = exp.build_optimizer(cfg, model).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decay["params"]} == {2}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_fixed_temperature_is_not_trained(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "model.learnable_temp=false")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    exp.train_step(model, exp.make_batch(data, data.splits["train"][:64]), exp.build_optimizer(cfg, model))
    assert exp.logit_parameters(model)["logit_scale"].item() == pytest.approx(10, rel=1e-6)


def test_attention_queries_and_keys_get_gradient(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "model.type=attention", "model.hidden_dim=64", "model.num_heads=4", "loss.type=clip", "model.dropout=0")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    exp.train_step(model, exp.make_batch(data, data.splits["train"][:64]), exp.build_optimizer(cfg, model))
    for head in model.heads:
        for layer in head.encoder.layers:
            query, key, value = layer.self_attn.in_proj_weight.grad.chunk(3)
            assert query.norm() > 1e-4 * value.norm()
            assert key.norm() > 1e-4 * value.norm()


def test_cross_modal_heads_share_their_memory_and_so_do_the_copies(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "model.type=cross_modal", "loss.type=queue")
    model = exp.build_model(cfg, exp.load_data(cfg))
    assert model.heads[0].memory is model.heads[1].memory
    assert model.momentum_heads[0].memory is model.momentum_heads[1].memory is not model.heads[0].memory


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.type=attention", "model.hidden_dim=60"], "must be a multiple of 8 tokens x model.num_heads=8"),
    (["model.type=cross_modal", "model.hidden_dim=60"], "must be a multiple of model.num_heads=8"),
    (["loss.type=siglip", "loss.label_smoothing=0.1"], "works with loss.type=clip or align, not siglip"),
    (["loss.type=clip", "loss.queue_size=64"], "works with loss.type=queue or blip, not clip"),
    (["loss.type=clip", "loss.temperature=0.001"], r"must lie in \[0.01, 1\] with loss.type=clip"),
    (["loss.type=blip", "loss.temperature=0.9"], r"must lie in \[0.001, 0.5\] with loss.type=blip")])
def test_settings_that_do_not_go_together(tmp_path, coco_demo, overrides, message):
    cfg = config(tmp_path, coco_demo, *overrides)
    with pytest.raises(UserError, match=message):
        exp.build_model(cfg, exp.load_data(cfg))


# ------------------------------------------------------------------------------------------------- queue and blip losses

def queue_model(tmp_path, data_dir, *overrides):
    cfg = config(tmp_path, data_dir, "model.output_dim=6", "loss.queue_size=10", *overrides)
    common.seed_everything(0)
    return exp.build_model(cfg, exp.load_data(cfg)).double()


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("loss", ["queue", "blip"])
@pytest.mark.parametrize("false_negatives", ["ignore", "mask", "multi_positive"])
def test_queue_loss_against_loops(tmp_path, coco_demo, loss, false_negatives):
    model = queue_model(tmp_path, coco_demo, f"loss.type={loss}", f"loss.false_negatives={false_negatives}")
    ids, filled = torch.tensor([3, 5, 3, 8]), torch.tensor([5, 7, 3, 9, 9, 1])
    z, keys = unit(2, 4, 6, seed=0), unit(2, 4, 6, seed=1)
    model.queue[:, :6], model.queue_ids[:6] = unit(2, 6, 6, seed=2), filled  # four places are empty
    model.queue[:, 6:] = 99.0  # whatever lies there must not count
    model.steps.fill_(3)
    alpha = 0.4 * min(1, 3 / model.ramp_steps) if loss == "blip" else 0.0
    scale, expected = model.log_scale.exp().item(), 0.0
    all_ids = ids.tolist() + filled.tolist()
    for way in (0, 1):
        candidates = torch.cat([keys[1 - way], model.queue[1 - way, :6]])
        for i in range(4):
            same = [j for j in range(10) if all_ids[j] == ids[i]]
            kept = [j for j in range(10) if false_negatives != "mask" or j == i or j not in same]
            positive = same if false_negatives == "multi_positive" else [i]
            log_p = (scale * candidates[kept] @ z[way, i]).log_softmax(0)
            soft = (scale * candidates[kept] @ keys[way, i]).softmax(0)
            for n, j in enumerate(kept):
                expected -= (alpha * soft[n] + (1 - alpha) * (j in positive) / len(positive)) * log_p[n] / 8
    assert model.queue_loss(*z, keys, ids).item() == pytest.approx(expected.item(), abs=1e-5 if alpha else 1e-10)  # alpha is float32


def test_queue_wraps_around_and_takes_batches_of_any_size(tmp_path, coco_demo):
    model = queue_model(tmp_path, coco_demo, "loss.type=queue")
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


def test_the_soft_targets_ramp_over_the_first_epoch_however_long_it_is(tmp_path, coco_demo):
    for one, steps in (("false", 8), ("true", 2)):  # 1,000 captions of 200 images in batches of 128
        cfg = config(tmp_path, coco_demo, "loss.type=blip", f"training.one_caption_per_image={one}")
        data = exp.load_data(cfg)
        assert exp.build_model(cfg, data).ramp_steps == len(exp.epoch_batches(data, cfg, 0)) == steps


@pytest.mark.parametrize("head", ["align", "cross_modal"])  # cross_modal: a memory that both heads share must not move twice
def test_momentum_copies_follow_parameters_and_batchnorm_and_drop_nothing(tmp_path, coco_demo, head):
    cfg = config(tmp_path, coco_demo, f"model.type={head}", "loss.type=queue", "model.momentum=0.9", "model.dropout=0.5")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    before = {k: v.clone() for k, v in model.momentum_heads.state_dict().items()}
    batch = exp.make_batch(data, data.splits["train"][:64])
    assert all(torch.equal(one, other) for one, other in zip(*(model.momentum_keys(batch["image"], batch["text"]) for _ in range(2)), strict=True))
    exp.train_step(model, batch, exp.build_optimizer(cfg, model))
    live, after = model.heads.state_dict(), model.momentum_heads.state_dict()
    assert any("running_var" in k for k in after) == (head == "align")
    for k, v in after.items():
        expected = 0.9 * before[k] + 0.1 * live[k] if v.is_floating_point() else live[k]
        torch.testing.assert_close(v, expected)
    assert not all(torch.equal(live[k], after[k]) for k in after)
    assert all(not p.requires_grad for p in model.momentum_heads.parameters())


@pytest.mark.parametrize("overrides", [("model.type=align", "loss.type=blip"), ("model.type=attention", "model.num_heads=2", "loss.type=queue"),
                                       ("model.type=cross_modal", "loss.type=align")], ids=lambda o: "+".join(o))
def test_queues_copies_and_buffers_resume_exactly(tmp_path, coco_demo, monkeypatch, overrides):
    options = [*overrides, "training.save_every_steps=3", "model.hidden_dim=32", *([] if "align" in overrides[-1] else ["loss.queue_size=300"])]
    cfgs = [config(tmp_path, coco_demo, *options, f"output_dir={tmp_path / name}") for name in ("whole", "cut")]
    exp.train(cfgs[0])
    step, calls = exp.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 14:  # in the second epoch, two steps after a checkpoint
            raise MemoryError
        return step(*args)
    monkeypatch.setattr(exp, "train_step", interrupted)
    with pytest.raises(MemoryError):
        exp.train(cfgs[1])
    exp.train(cfgs[1])
    one, other = (common.load_checkpoint(tmp_path / name / "checkpoint_latest.pt")["model_state_dict"] for name in ("whole", "cut"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(k.startswith("queue") for k in one) == ("align" not in overrides[-1])


def test_inputs_are_standardised_by_training_statistics_only(tmp_path, coco_demo):
    texts = tensor(coco_demo, "train2017_text_embeddings").float()
    texts[:, 3] = 2.5  # a constant feature must not divide by zero
    cfg = config(tmp_path, copy(coco_demo, tmp_path / "constant", train2017_text_embeddings=texts))
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    rows = data.splits["train"]
    expected = data.images[data.image_index[rows]].float()
    torch.testing.assert_close(model.image_mean, expected.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.image_deviation, expected.std(0, unbiased=False), rtol=1e-4, atol=1e-5)
    assert model.text_deviation[3] == 1
    assert torch.isfinite(model.embed_text(data.texts[:9].float())).all()


# ------------------------------------------------------------------------------------------------------------ evaluation

@pytest.mark.parametrize("head", HEADS)
def test_independent_noise_scores_chance(tmp_path, coco_demo, head):
    """No head may see the query's partner: trained and tested on unrelated images and captions it must stay at chance.

    The same measure finds a head that cheats, by letting an image attend to its own caption, at 100%.
    """
    g = torch.Generator().manual_seed(5)
    folder = copy(coco_demo, tmp_path / "noise", train2017_image_embeddings=torch.randn(300, 24, generator=g).repeat_interleave(5, 0),
                  train2017_text_embeddings=torch.randn(1500, 32, generator=g))
    cfg = config(tmp_path, folder, f"model.type={head}", "model.num_heads=4", "data.test=150", "training.num_epochs=2")
    data = exp.load_data(cfg)
    exp.train(cfg, data)
    results = exp.evaluate(cfg, data)
    for k in exp.KS:  # 150 images, 750 captions: three standard deviations of a binomial proportion
        for way, n in (("i2t", 150), ("t2i", 750)):
            p = results["baselines"]["chance"][f"{way}_R@{k}"] / 100
            assert abs(results["test"][f"{way}_R@{k}"] / 100 - p) < 3 * math.sqrt(p * (1 - p) / (n if way == "i2t" else 150)) + 1e-9
    z_image, z_text, own = exp.embed(lambda x: x @ torch.randn(24, 32), lambda x: x, data, "test")
    z_image += 20 * z_text[torch.arange(150) * 5]  # its first caption
    assert exp.summarise(exp.retrieval(F.normalize(z_image, dim=1), F.normalize(z_text, dim=1), own))["i2t_R@1"] > 95


def test_permuting_the_test_pairs_changes_nothing():
    g = torch.Generator().manual_seed(0)
    z_image = F.normalize(torch.randn(40, 8, generator=g), dim=1)
    own = torch.arange(200) // 5
    z_text = F.normalize(z_image[own] + 0.7 * torch.randn(200, 8, generator=g), dim=1)
    reference = exp.summarise(exp.retrieval(z_image, z_text, own))
    captions, images = torch.randperm(200, generator=g), torch.randperm(40, generator=g)
    moved = exp.summarise(exp.retrieval(z_image[images], z_text[captions], images.argsort()[own[captions]], chunk_size=7))
    assert moved == pytest.approx(reference, abs=1e-9)
    wrong = exp.summarise(exp.retrieval(z_image[images], z_text, own))  # but labels that do not move with the rows must fall
    assert wrong["RSUM"] < reference["RSUM"] / 3


def test_gallery_of_unique_images_against_a_loop(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo)
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data).eval()
    z_image, z_text, own = exp.embed(model.embed_image, model.embed_text, data, "test")
    assert (len(z_image), len(z_text)) == (60, 300)
    s = (z_image.double() @ z_text.double().T).numpy()
    own = own.numpy()
    i2t = [np.flatnonzero(own[np.argsort(-s[i])] == i)[0] for i in range(60)]
    t2i = [np.flatnonzero(np.argsort(-s[:, j]) == own[j])[0] for j in range(300)]
    got = exp.summarise(exp.retrieval(z_image, z_text, torch.from_numpy(own)))
    for k in exp.KS:
        assert got[f"i2t_R@{k}"] == pytest.approx(100 * np.mean(np.array(i2t) < k))
        assert got[f"t2i_R@{k}"] == pytest.approx(100 * np.mean(np.array(t2i) < k))
    assert got["RSUM"] == pytest.approx(sum(got[f"{w}_R@{k}"] for w in ("i2t", "t2i") for k in exp.KS))


def test_bootstrap_interval_matches_the_binomial_one():
    hits = torch.zeros(400, dtype=torch.float64)
    hits[:100] = 1
    per_query = {way: {f"hit@{k}": hits for k in exp.KS} for way in ("i2t", "t2i")}
    low, high = exp.bootstrap(per_query, torch.arange(400), 4000)["t2i_R@1"]
    half = 196 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(25 - half, abs=0.6)
    assert high == pytest.approx(25 + half, abs=0.6)
    same = exp.bootstrap({w: {f"hit@{k}": hits.repeat_interleave(5) if w == "t2i" else hits for k in exp.KS} for w in ("i2t", "t2i")},
                         torch.arange(400).repeat_interleave(5), 4000)["t2i_R@1"]  # five equal captions add no information
    assert same == pytest.approx([low, high], abs=0.3)


def test_baselines_in_closed_form(tmp_path, coco_demo):
    data = exp.load_data(config(tmp_path, coco_demo))
    rows = data.splits["train"]
    x, y = data.images[data.image_index[rows]].double(), data.texts[rows].double()
    mean_image, _, c_image, c_text, c_cross = exp.covariances(data, chunk=333)
    torch.testing.assert_close(mean_image.double(), x.mean(0), rtol=0, atol=1e-5)
    xc, yc = x - x.mean(0), y - y.mean(0)
    for got, expected in ((c_image, xc.T @ xc), (c_text, yc.T @ yc), (c_cross, xc.T @ yc)):
        torch.testing.assert_close(got, expected / len(x), rtol=0, atol=1e-5)
    for image, text, setting, rsum in exp.linear_baselines(data).values():
        z_image, z_text, own = exp.embed(image, text, data, "val")
        assert exp.summarise(exp.retrieval(z_image, z_text, own))["RSUM"] == rsum > 100  # chance is about 70 here
        assert setting


def test_linear_data_is_solved_by_the_baselines(tmp_path, coco_demo):
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 6, generator=g)
    images = latent @ torch.randn(6, 24, generator=g)
    texts = latent.repeat_interleave(5, 0) @ torch.randn(6, 32, generator=g)
    folder = copy(coco_demo, tmp_path / "linear", train2017_image_embeddings=images.repeat_interleave(5, 0), train2017_text_embeddings=texts)
    for image, text, _, _ in exp.linear_baselines(exp.load_data(config(tmp_path, folder))).values():
        scores = exp.summarise(exp.retrieval(*exp.embed(image, text, exp.load_data(config(tmp_path, folder)), "test")))
        assert scores["RSUM"] > 590


# ------------------------------------------------------------------------------------------------------ runs and resumes

def run(*args, check=True, **kwargs):
    result = subprocess.run([sys.executable, str(ROOT / "exp_coco_heads.py"), *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)
    assert not check or result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.fixture(scope="module")
def job(tmp_path_factory, coco_demo):
    """(command line, folder of its uninterrupted run)."""
    base = tmp_path_factory.mktemp("job")
    (base / "toy.yaml").write_text("experiment: coco_heads\nmodel:\n  type: mlp\ntraining:\n  learning_rate: 5e-3\n")
    command = [base / "toy.yaml", f"data.dir={coco_demo}", "device=cpu", *SMALL, "training.num_epochs=4", "training.save_every_steps=3"]
    run(*command, f"output_dir={base / 'whole'}")
    return command, base / "whole"


def assert_same_run(folder, whole):
    for name in ("best_model.pt", "checkpoint_latest.pt"):
        one, other = (common.load_checkpoint(f / name) for f in (folder, whole))
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(one["model_state_dict"][k], other["model_state_dict"][k]) for k in other["model_state_dict"])
    for name in ("results.json", "metrics.csv", "loss_history.json", "splits.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert one["history"] == other["history"]
    torch.testing.assert_close(one["optimizer_state_dict"]["state"][0], other["optimizer_state_dict"]["state"][0], rtol=0, atol=0)


def test_a_run_leaves_the_documented_files(job):
    _, whole = job
    names = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    evaluation = ("metrics.json", "metrics.txt", "embedding_space.png", "similarity_matrix.png", "rank_histogram.png")
    assert {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt", "results.json", "splits.json",
            "training_curves.png", "loss_history.json", *(f"evaluation_results/{n}" for n in evaluation)} <= names
    results = json.loads((whole / "results.json").read_text())
    assert results["synthetic"] is True
    assert {"n_images", "n_captions", "seed", "units", "data_fingerprint", "test", "interval95", "baselines"} <= set(results)
    assert set(results["baselines"]) == {"chance", "ridge", "CCA"}
    state = common.load_checkpoint(whole / "checkpoint_latest.pt")
    assert {"epoch", "global_step", "best_val_loss", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict",
            "history", "config", "rng", "position"} <= set(state)
    rows = (whole / "metrics.csv").read_text().splitlines()
    assert len(rows) == 5
    assert len({row.count(",") for row in rows}) == 1


# Each hook is patched into the script and kills the process there with SIGKILL, which no handler can soften.
KILL = "import os, signal, sys; import exp_coco_heads as exp, common; kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
MOMENTS = {
    "mid-epoch": "step = exp.train_step; n = [0]\ndef f(*a):\n    n[0] += 1\n    if n[0] == 13: kill()\n    return step(*a)\nexp.train_step = f",
    "during a save": "import torch; save = torch.save; n = [0]\ndef f(state, file):\n    save(state, file); n[0] += 1\n"
                     "    if n[0] == 6: file.truncate(2000); kill()\ntorch.save = f",
    "between the renames of a save": "replace = os.replace; n = [0]\ndef f(a, b):\n    replace(a, b); n[0] += str(b).endswith('latest.pt.previous')\n"
                                     "    if n[0] == 4: kill()\nos.replace = f",
    "at the last epoch's end": "write = common.RunLog.write; n = [0]\ndef f(self, rows):\n    n[0] += 1\n    if n[0] == 4: kill()\n"
                               "    write(self, rows)\ncommon.RunLog.write = f",
    "after training, before the plots": "def f(*a): kill()\nexp.plot_training = f",
    "during evaluation": "def f(*a): kill()\nexp.linear_baselines = f",
    "before the last file is written": "write = common.write_json\ndef f(path, value):\n    if str(path).endswith('results.json'): kill()\n"
                                       "    write(path, value)\ncommon.write_json = f",
    "after completion": "import atexit; atexit.register(kill)"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_rerun_equals_uninterrupted(job, tmp_path, moment, capsys):
    command, whole = job
    command = [*command, f"output_dir={tmp_path / 'run'}"]
    killed = subprocess.run([sys.executable, "-c", f"{KILL}{MOMENTS[moment]}\nsys.exit(exp.main(sys.argv[1:]))", *map(str, command)], cwd=ROOT,
                            capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / "results.json").exists() == (moment == "after completion")
    assert exp.main([*map(str, command)]) == 0
    assert "I2T R@1" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


def test_rerunning_a_finished_run_only_reports(job):
    command, whole = job
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.suffix in (".pt", ".csv", ".json") and p.name != "environment.json"}
    assert "training is complete" in run(*command, f"output_dir={whole}").stdout
    assert all(p.read_bytes() == blob for p, blob in before.items())


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_the_rerun_equals_uninterrupted(job, tmp_path, stop, code, capsys):
    command, whole = job
    command = [*command, f"output_dir={tmp_path / 'run'}"]
    slow = ("import exp_coco_heads as exp, sys, time; step = exp.train_step\ndef f(*a):\n    print('step', flush=True); time.sleep(.05)\n"
            "    return step(*a)\nexp.train_step = f\nsys.exit(exp.main(sys.argv[1:]))")
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != "step\n":
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.fullmatch(r"stopped at epoch 1, step \d; the same command resumes from .*checkpoint_latest.pt\n", stderr)
    assert exp.main([*map(str, command)]) == 0
    assert "resuming" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


def test_stopped_after_the_last_step_of_an_epoch(tmp_path, coco_demo, monkeypatch):
    cfgs = [config(tmp_path, coco_demo, f"output_dir={tmp_path / name}") for name in ("whole", "cut")]
    exp.train(cfgs[0])
    step, calls = exp.train_step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 16:  # the second epoch's last
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    monkeypatch.setattr(exp, "train_step", stopping)
    with pytest.raises(common.Stopped, match="stopped at epoch 2, step 8"):
        exp.train(cfgs[1])
    exp.train(cfgs[1])
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_resume_survives_a_damaged_latest_checkpoint(job, tmp_path):
    command, whole = job
    command = [*command, f"output_dir={tmp_path / 'run'}"]
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint_latest.pt").write_bytes(b"torn")
    (tmp_path / "run" / "results.json").unlink()
    result = run(*command)
    assert "checkpoint_latest.pt is damaged" in result.stderr
    assert_same_run(tmp_path / "run", whole)


def test_same_seed_same_bits_other_seed_other_bits(tmp_path, coco_demo):
    weights = []
    for n, seed in enumerate((3, 3, 4)):
        cfg = config(tmp_path, coco_demo, f"seed={seed}", "training.num_epochs=1", f"output_dir={tmp_path / str(n)}")
        exp.train(cfg)
        weights.append(common.load_checkpoint(tmp_path / str(n) / "best_model.pt")["model_state_dict"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["heads.0.1.weight"], weights[2]["heads.0.1.weight"])


def test_evaluating_an_unfinished_run_leaves_no_stale_result(tmp_path, coco_demo, monkeypatch):
    cfg = config(tmp_path, coco_demo)
    step, calls = exp.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 8:
            raise MemoryError
        return step(*args)
    monkeypatch.setattr(exp, "train_step", interrupted)
    with pytest.raises(MemoryError):
        exp.train(cfg)
    assert exp.evaluate(cfg)["best_epoch"] == 1
    monkeypatch.setattr(exp, "train_step", step)
    exp.train(cfg)
    assert exp.evaluate(cfg)["best_epoch"] == common.load_checkpoint(tmp_path / "run/best_model.pt")["epoch"] > 1


def test_a_changed_test_list_is_refused(tmp_path, coco_demo):
    ids = json.loads((Path(coco_demo) / "train2017_metadata.json").read_text())["image_ids"]
    (tmp_path / "ids.json").write_text(json.dumps(ids[:100]))
    cfg = config(tmp_path, coco_demo, "data.test=karpathy", f"data.karpathy_ids={tmp_path / 'ids.json'}", "training.num_epochs=1")
    exp.train(cfg)
    (tmp_path / "ids.json").write_text(json.dumps(ids[100:200]))
    with pytest.raises(UserError, match="holds another split"):
        exp.evaluate(cfg)


def test_a_damaged_best_model_is_an_error_not_an_older_epoch(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo)
    exp.train(cfg)
    (tmp_path / "run/best_model.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"best_model.pt is damaged .*--fresh"):
        exp.evaluate(cfg)


def test_a_failed_start_leaves_no_folder_and_moves_no_run(tmp_path, coco_demo):
    base = [str(ROOT / "configs/siglip.yaml"), f"output_dir={tmp_path / 'run'}", *SMALL, "training.num_epochs=1", "evaluation.plots=false"]
    assert exp.main([*base, f"data.dir={tmp_path / 'nowhere'}"]) == 2
    assert not (tmp_path / "run").exists()
    for _ in range(2):  # settings that do not go together are found before anything is written, or moved
        assert exp.main([*base, f"data.dir={coco_demo}", "loss.label_smoothing=0.1", "--fresh"]) == 2
        assert (tmp_path / "run").exists() == (tmp_path / "run/results.json").exists()
        assert exp.main([*base, f"data.dir={coco_demo}"]) == 0
    assert not list(tmp_path.glob("*.old-*"))
    assert exp.main([*base, f"data.dir={tmp_path / 'nowhere'}", "--fresh"]) == 2
    assert exp.main([*base, f"data.dir={coco_demo}", "--fresh", "--stage", "evaluate"]) == 2
    assert (tmp_path / "run/results.json").exists()


def test_evaluation_settings_may_change_afterwards(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "training.num_epochs=1")
    exp.train(cfg)
    first = exp.evaluate(cfg)
    again = exp.evaluate(config(tmp_path, coco_demo, "training.num_epochs=1", "evaluation.chunk_size=17", "evaluation.n_bootstrap=20"))
    assert again["test"] == first["test"]
    assert again["interval95"] != first["interval95"]


def test_early_stopping_keeps_the_best_epoch(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "training.num_epochs=40", "training.patience=2", "training.learning_rate=0.1", "training.schedule=constant")
    history = exp.train(cfg)
    best = max(range(len(history)), key=lambda i: history[i]["val_RSUM"])
    assert len(history) == best + 3 < 40
    assert common.load_checkpoint(tmp_path / "run" / "best_model.pt")["epoch"] == best + 1


def test_trained_head_beats_the_baselines_on_the_demo_data(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "model.type=mlp", "training.num_epochs=15", "model.hidden_dim=128", "model.input_dropout=0.2")
    exp.train(cfg)
    results = exp.evaluate(cfg)
    assert results["test"]["RSUM"] > results["baselines"]["ridge"]["RSUM"] + 20


def test_split_stage_and_compare(tmp_path, coco_demo):
    base = [f"data.dir={coco_demo}", *SMALL, "training.num_epochs=1", "evaluation.plots=false"]
    run(ROOT / "configs/siglip.yaml", *base, f"output_dir={tmp_path / 'split'}", "--stage", "split")
    splits = json.loads((tmp_path / "split" / "splits.json").read_text())
    assert [len(splits["image_ids"][s]) for s in ("train", "val", "test")] == [200, 40, 60]
    assert not (tmp_path / "split" / "best_model.pt").exists()
    runs = []
    for name, seed in (("siglip", 1), ("siglip", 2), ("clip", 1)):
        runs.append(str(tmp_path / f"{name},seed={seed}"))
        assert exp.main([str(ROOT / f"configs/{name}.yaml"), *base, f"seed={seed}", f"output_dir={runs[-1]}"]) == 0
    result = run(ROOT / "configs/siglip.yaml", "--stage", "compare", f"compare=[{', '.join(runs)}]", f"output_dir={tmp_path / 'compare'}")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert lines["siglip"].split()[1] == "2"
    assert "+-" in lines["siglip"]
    assert "+-" not in lines["clip"]
    values = [json.loads((Path(r) / "results.json").read_text())["test"]["RSUM"] for r in runs[:2]]
    assert lines["siglip"].endswith(f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}")
    assert (tmp_path / "compare" / "compare.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------- tuning

def tune_yaml(folder, space, **keys):
    keys = {"experiment": "coco_heads", "base": str(folder / "base.yaml"), "storage": f"sqlite:///{folder / 'study.db'}", "n_trials": 12, "n_jobs": 1,
            "num_epochs": 3, "n_captions": 500, "results_dir": str(folder / "best"), "search_space": space} | keys
    (folder / "tune.yaml").write_text(yaml.safe_dump(keys))
    return folder / "tune.yaml"


SPACE = {"training.learning_rate": {"low": "1e-5", "high": "1e-1", "log": "true"}, "model": {"type": ["siglip", "mlp"]}, "model.hidden_dim": [16, 32],
         "loss.type": ["clip", "queue"]}


def test_tuning_subset_has_whole_images(tmp_path, coco_demo):
    data = exp.load_data(config(tmp_path, coco_demo))
    rows = exp.tuning_subset(data, 502, seed=1)
    assert len(rows) == 505
    assert len(data.image_index[rows].unique()) == 101
    assert set(rows.tolist()) <= set(data.splits["train"].tolist())
    assert torch.equal(exp.tuning_subset(data, 10**6, seed=1), data.splits["train"])


def test_tuning_prunes_resumes_and_writes_a_config_that_trains(tmp_path, coco_demo):
    optuna = pytest.importorskip("optuna")
    (tmp_path / "base.yaml").write_text("experiment: coco_heads\n")
    path = tune_yaml(tmp_path, SPACE)
    overrides = [f"data.dir={coco_demo}", "device=cpu", *SMALL]
    # kill -9 in the middle of the fifth trial
    code = ("import os, signal, sys, exp_coco_heads as exp; validate, n = exp.validate, [0]\ndef f(*a):\n    n[0] += 1\n"
            "    if n[0] == 9: os.kill(os.getpid(), signal.SIGKILL)\n    return validate(*a)\nexp.validate = f\nsys.exit(exp.main(sys.argv[1:]))")
    killed = subprocess.run([sys.executable, "-c", code, str(path), *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    states = [t.state.name for t in optuna.load_study(study_name="xclip_siglip_tuning", storage=storage).trials]
    assert states.count("RUNNING") == 1
    result = run(path, *overrides)
    study = optuna.load_study(study_name="xclip_siglip_tuning", storage=storage)
    states = [t.state.name for t in study.trials]
    assert states.count("COMPLETE") + states.count("PRUNED") == 12
    assert states.count("FAIL") == 1  # the one that was killed; its parameters were tried again
    failed = next(t for t in study.trials if t.state.name == "FAIL")
    assert any(t.params == failed.params and t.number != failed.number for t in study.trials)
    assert states.count("PRUNED") > 0
    assert f"next: python exp_coco_heads.py {tmp_path / 'best' / 'best_config.yaml'}" in result.stdout
    assert "12 complete" not in result.stdout
    again = run(path, *overrides)
    assert len(optuna.load_study(study_name="xclip_siglip_tuning", storage=storage).trials) == 13
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    best = common.load_config(exp.Config, tmp_path / "best" / "best_config.yaml")
    assert best.training.learning_rate == study.best_params["training.learning_rate"]
    assert "I2T R@1" in run(tmp_path / "best" / "best_config.yaml", f"output_dir={tmp_path / 'run'}").stdout
    changed = run(tune_yaml(tmp_path, {**SPACE, "model.hidden_dim": [8]}, n_trials=1), *overrides)
    broken = run(tune_yaml(tmp_path, SPACE, storage="sqlite:////proc/none/study.db"), *overrides, check=False)
    assert broken.returncode == 2
    assert "storage=sqlite:////proc/none/study.db cannot be opened" in broken.stderr
    assert re.search(r"searched something else; this search is the study xclip_siglip_tuning_[0-9a-f]{8}", changed.stdout)


def test_tuning_with_worker_processes_and_a_journal(tmp_path, coco_demo):
    optuna = pytest.importorskip("optuna")
    (tmp_path / "base.yaml").write_text("experiment: coco_heads\n")
    path = tune_yaml(tmp_path, SPACE, storage=str(tmp_path / "journal.log"), n_trials=5, n_jobs=2)
    run(path, f"data.dir={coco_demo}", "device=cpu", *SMALL)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log")))
    assert len(optuna.load_study(study_name="xclip_siglip_tuning", storage=storage).trials) == 5  # not one more


def test_nan_trials_fail_and_count(tmp_path, coco_demo):
    optuna = pytest.importorskip("optuna")
    (tmp_path / "base.yaml").write_text("experiment: coco_heads\n")
    path = tune_yaml(tmp_path, {"training.learning_rate": ["1e5", "1e6"]}, n_trials=2)
    result = run(path, f"data.dir={coco_demo}", "device=cpu", *SMALL, check=False)
    assert result.returncode == 2
    assert "all trials of xclip_siglip_tuning failed or were pruned" in result.stderr
    study = optuna.load_study(study_name="xclip_siglip_tuning", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL"]


@pytest.mark.parametrize(("space", "message"), [
    ({"training.learnig_rate": ["1e-3"]}, "did you mean training.learning_rate"), ({"model.type": "mlp"}, "expected a list of choices"),
    ({"model.dropout": {"low": "0.5", "high": "0.1"}}, "low must be a number below high"), ({"model.dropout": ["1.5"]}, "must be < 1"),
    ({"model.hidden_dim": {"low": "64", "high": "null"}}, "low must be a number"),
    ({"model.use_bn": {"low": "false", "high": "true"}}, "low must be a number"),
    ({"training.weight_decay": {"low": "0", "high": "1", "log": "true"}}, r"log must be true \(with low above 0\) or false"),
    ({"model.dropout": {"low": "0.1", "high": "0.5", "log": "yes"}}, "found log: yes"),
    ({}, "no search_space")])
def test_bad_search_spaces(tmp_path, space, message):
    with pytest.raises(UserError, match=message):
        exp.read_search_space("tune.yaml", exp.TuneConfig(search_space=space))


@pytest.mark.parametrize("args", [["--stage", "evaluate"], ["--stage", "compare"], ["--fresh"]])
def test_a_search_is_not_started_by_another_stage(args):
    result = run(ROOT / "configs/tune/siglip.yaml", *args, check=False)
    assert result.returncode == 2
    assert "describes a search, not a run" in result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tune").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_tune_yaml_loads_on_its_base(path):
    tuning = common.load_config(exp.TuneConfig, path)
    space = exp.read_search_space(path, tuning)
    first = {k: v[0] for k, v in space.items()}
    cfg = exp.trial_config(ROOT / tuning.base, [], first, False)
    assert cfg.training.learning_rate == first["training.learning_rate"]
    assert {p.stem: common.load_config(exp.TuneConfig, p).n_trials for p in path.parent.glob("*.yaml")} == {
        "default": 150, "siglip": 50, "clip": 50, "attention": 75, "mlp": 40}


# ------------------------------------------------------------------------------------------------------------- bad input

def poison(folder, name, row, value):
    x = tensor(folder, name).clone()
    x[row, 1] = value
    return x


BAD_DATA = {
    "text rows": (lambda f: {"train2017_text_embeddings": tensor(f, "train2017_text_embeddings")[:-3].clone()},
                   r"train2017_text_embeddings.pt: expected 1500 rows .*found 1497"),
    "image rows": (lambda f: {"train2017_image_embeddings": tensor(f, "train2017_image_embeddings")[:-3].clone()},
                   r"train2017_image_embeddings.pt: expected 1500 rows .*found 1497 rows and no image_index"),
    "no image_ids": (lambda f: {"train2017_metadata": lambda m: {k: v for k, v in m.items() if k != "image_ids"}},
                     r"train2017_metadata.json: expected a list image_ids .*found NoneType"),
    "nan": (lambda f: {"train2017_image_embeddings": poison(f, "train2017_image_embeddings", slice(10, 15), math.nan)},
            r"train2017_image_embeddings.pt: 1 of 300 rows hold NaN or infinite values, the first is row 10"),
    "inf": (lambda f: {"train2017_text_embeddings": poison(f, "train2017_text_embeddings", [4, 9], math.inf)},
            r"train2017_text_embeddings.pt: 2 of 1500 rows hold NaN or infinite values, the first is row 4"),
    "corrupt": (lambda f: {"train2017_image_embeddings": b"PK\x03\x04 not a checkpoint"}, r"train2017_image_embeddings.pt: not a readable .pt file"),
    "not a float tensor": (lambda f: {"train2017_image_embeddings": torch.arange(6)},
                           r"expected a float tensor \[rows, dim\], found torch.strided torch.int64 \[6\]"),
    "no columns": (lambda f: {"train2017_text_embeddings": torch.zeros(1500, 0)}, r"expected a float tensor .*\[1500, 0\]"),
    "sparse": (lambda f: {"train2017_text_embeddings": torch.eye(1500).to_sparse()}, "expected a float tensor .*torch.sparse_coo"),
    "constant": (lambda f: {"train2017_text_embeddings": torch.ones(1500, 32)}, "train2017_text_embeddings.pt: rows all alike"),
    "huge": (lambda f: {"train2017_text_embeddings": torch.randn(1500, 32) * 1e30}, "values out of range"),
    "mixed ids": (lambda f: {"train2017_metadata": lambda m: {**m, "image_ids": ["1", *m["image_ids"][1:]]}}, "all numbers or all strings"),
    "ids as lists": (lambda f: {"train2017_metadata": lambda m: {**m, "image_ids": [[i] for i in m["image_ids"]]}}, "all numbers or all strings"),
    "index as floats": (lambda f: {"train2017_metadata": lambda m: {**m, "image_index": [0.5] * 1500}}, "image_index must be a list of 1500 ids"),
    "few caption_ids": (lambda f: {"train2017_metadata": lambda m: {**m, "caption_ids": [1, 2]}}, "caption_ids must be a list of 1500 ids"),
    "metadata": (lambda f: {"train2017_metadata": b"{"}, r"train2017_metadata.json: cannot be read as JSON"),
    "image_index": (lambda f: {"train2017_image_embeddings": tensor(f, "train2017_image_embeddings")[::5].clone(),
                               "train2017_metadata": lambda m: {**m, "image_index": [300] * 1500}},
                    r"image_index must hold rows of .*\(0 to 299\), found 300 to 300"),
    "one id, two images": (lambda f: {"train2017_metadata": lambda m: {**m, "image_ids": [i // 10 for i in range(1500)]}},
                           r"rows 0 and 5 carry the same image id 0"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_with_file_expected_and_found(tmp_path, coco_demo, case):
    make, message = BAD_DATA[case]
    folder = copy(coco_demo, tmp_path / "bad", **make(coco_demo))
    with pytest.raises(UserError, match=message) as error:
        exp.load_data(config(tmp_path, folder))
    assert "\n" not in str(error.value)


def test_leaking_held_out_file_and_clashing_widths(tmp_path, coco_demo):
    folder = copy(coco_demo, tmp_path / "leak", val2017_metadata=lambda m: {**m, "image_ids": [i - 800_000 for i in m["image_ids"]]})
    with pytest.raises(UserError, match="60 image ids are in both train2017 and val2017"):
        exp.load_data(config(tmp_path, folder, "data.test=val2017"))
    folder = copy(coco_demo, tmp_path / "widths", val2017_text_embeddings=torch.randn(300, 31))
    with pytest.raises(UserError, match=r"val2017 has image and text widths \(24, 31\), train2017 has \(24, 32\)"):
        exp.load_data(config(tmp_path, folder, "data.test=val2017"))


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.test=0.999"], "data.val=40: asks for 40 images, 0 of 300 are left"), (["data.test=1000"], "asks for 1000 images, 300 of 300"),
    (["data.test=1"], "the test split has 1 of 300 images"), (["data.val=most"], "data.val: expected .* one of auto, found 'most'"),
    (["data.test=val2014"], "val2014_image_embeddings.pt: no such file"), (["data.test=karpathy"], "needs data.karpathy_ids"),
    (["data.train=-0.5"], "asks for -150 images")])
def test_bad_splits(tmp_path, coco_demo, overrides, message):
    with pytest.raises(UserError, match=message):
        exp.load_data(config(tmp_path, coco_demo, *overrides))


def test_checkpoint_of_other_widths(tmp_path, coco_demo):
    cfg = config(tmp_path, coco_demo, "training.num_epochs=1")
    exp.train(cfg)
    narrow = copy(coco_demo, tmp_path / "narrow", train2017_image_embeddings=torch.randn(300, 20).repeat_interleave(5, 0))
    with pytest.raises(UserError, match=r"best_model.pt: trained on image and text widths \[24, 32\], the data have \[20, 32\]"):
        exp.evaluate(config(tmp_path, narrow, "training.num_epochs=1"))
    with pytest.raises(UserError, match="holds a run on other data"):
        exp.train(config(tmp_path, narrow, "training.num_epochs=1"))


@pytest.mark.parametrize(("args", "message"), [
    (["training.learnig_rate=1"], "did you mean training.learning_rate"), (["training.batch_size=big"], "expected a whole number"),
    (["data.dir=nowhere"], r"nowhere/train2017_image_embeddings.pt: no such file; .*--demo"),
    (["--stage", "evaluate"], "best_model.pt: no such file; train first"), (["--stage", "compare"], "needs compare="),
    (["--stage", "compare", "compare=[nowhere]"], "nowhere/results.json: no such file"),
    (["--stage", "tune"], r"siglip.yaml: has no search_space; tune YAMLs are in configs/tune/"),
    (["output_dir=/proc/none"], "the output folder /proc/none cannot be written"), (["device=cuda:7"], "device=cuda:7 is not available")])
def test_user_errors_exit_2_with_one_line(tmp_path, coco_demo, args, message):
    if "cuda:7" in args[0] and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    result = run(ROOT / "configs/siglip.yaml", f"data.dir={coco_demo}", f"output_dir={tmp_path / 'run'}", *args, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("batch_size", [128, 10**4])  # with one step an epoch only the weights show it
def test_non_finite_run_stops_in_one_line(tmp_path, coco_demo, batch_size):
    result = run(ROOT / "configs/siglip.yaml", f"data.dir={coco_demo}", f"output_dir={tmp_path / 'run'}", *SMALL, "training.learning_rate=1e6",
                 "training.schedule=constant", f"training.batch_size={batch_size}", "training.num_epochs=40", check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"error: non-finite .*; lower training.learning_rate.*\n", result.stderr), result.stderr


def test_non_finite_loss_names_step_and_rate(tmp_path, coco_demo, monkeypatch):
    cfg = config(tmp_path, coco_demo, "training.schedule=constant")
    step, calls = exp.train_step, []

    def poisoned(*args):
        calls.append(1)
        return step(*args) if len(calls) != 11 else {**step(*args), "loss": torch.tensor(math.nan)}
    monkeypatch.setattr(exp, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"non-finite siglip loss \(nan\) at step 3 of the epoch, learning rate 0.005, .*logit_scale"):
        exp.train(cfg)
    monkeypatch.setattr(exp, "train_step", step)
    assert len(exp.train(cfg)) == 3  # resumed from before the bad step


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small tmpfs")
def test_full_disk_is_one_line_and_loses_nothing(job, tmp_path):
    command, whole = job
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        command = [*command, f"output_dir={disk / 'run'}"]
        result = run(*command, check=False)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert "No space left" in result.stderr
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        run(*command)
        assert_same_run(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


# ------------------------------------------------------------------------------------------------------------- real data

@pytest.mark.skipif(not (SHARED / "data/coco_heads").exists(), reason="the real embeddings are not here")
def test_real_embeddings_reproduce_the_published_cca(tmp_path):
    """CCA with 256 dimensions and shrinkage 0.5 on 29,985 real pairs: I2T R@1/5/10 24.1/48.8/60.9, T2I 17.1/43.1/57.3."""
    cfg = common.load_config(exp.Config, None, [f"data.dir={SHARED / 'data/coco_heads'}", "data.test=val2017", f"output_dir={tmp_path}"])
    data = exp.load_data(cfg)
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [26_985, 3_000, 5_000]
    scores = {}
    for name, (image, text, _, _) in exp.linear_baselines(data).items():
        scores[name] = exp.summarise(exp.retrieval(*exp.embed(image, text, data, "test")))
    assert scores["ridge"]["i2t_R@1"] == pytest.approx(16.5, abs=1.5)
    assert scores["CCA"]["RSUM"] > 251.3 - 3  # the regularisation is chosen on validation, so it may do better


@pytest.mark.skipif(not (SHARED / "documents").exists(), reason="the source document is not here")
def test_documented_yaml_loads_as_it_stands(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (SHARED / "documents/coco_heads.md").read_text(), flags=re.DOTALL)
    for i, block in enumerate(blocks):
        (tmp_path / f"{i}.yaml").write_text(block)
        cfg = common.load_config(exp.Config, tmp_path / f"{i}.yaml")
        for section, values in yaml.safe_load(block.replace('\\"', '"')).items():
            for key, value in values.items():
                assert getattr(getattr(cfg, section), key) == (float(value) if key == "learning_rate" else value)
        exp.make_heads(cfg.model, [40, 48])
    assert len(blocks) >= 9
