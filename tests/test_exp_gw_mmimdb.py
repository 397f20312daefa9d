"""exp_gw_mmimdb.py and profile_flops.py: data, model, losses against loops, conditions, leaks, exact resume, FLOPs,
bad input."""

import functools
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_nothing_chosen_on_test
from torch import nn

import common
import demo_data
import exp_gw_mmimdb as exp
import profile_flops
from common import UserError

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return demo_data.write_mmimdb(tmp_path_factory.mktemp("films"), n_films=150, views=3, dims=(10, 8))


SMALL = ["data.backbone=clip", "model.dim=16", "model.hidden_dim=12", "model.head_dim=8", "training.batch_size=32",
         "training.steps=12", "training.eval_every=4", "device=cpu"]


@pytest.fixture(autouse=True)
def few_conditions(monkeypatch):
    monkeypatch.setattr(common, "bootstrap", functools.partial(common.bootstrap, n_resamples=50))
    for name, value in (("AMOUNTS", (0, 0.5, 1)), ("RATES", (0, 0.5, 1)), ("N_DRAWS", 1)):
        monkeypatch.setattr(exp, name, value)


def config(tmp_path, films, *overrides):
    path = tmp_path / "toy.yaml"
    path.write_text("training:\n  learning_rate: 3e-3\n")
    return common.load_config(exp.Config, path,
                              [f"data.dir={films}", f"output_dir={tmp_path / 'run'}", *SMALL, *overrides])


def cli(tmp_path, films, *overrides):
    path = tmp_path / "toy.yaml"
    path.write_text("training:\n  learning_rate: 3e-3\n")
    return exp.main([str(path), f"data.dir={films}", f"output_dir={tmp_path / 'run'}", *SMALL, *overrides])


def toy_model(selector="shared", dims=(10, 8, 23), dropout=0.0, **changes):
    torch.manual_seed(0)
    changes = {"selector_scale": "none", "input_dropout": 0, **changes}
    model = exp.ModelConfig(selector=selector, dim=16, hidden_dim=12, head_dim=8, dropout=dropout, **changes)
    return exp.GlobalWorkspace(dict(zip(exp.DOMAINS, dims, strict=True)), model).double()


def toy_batch(size=6, dims=(10, 8, 23)):
    g = torch.Generator().manual_seed(1)
    image, text, image_target, text_target = (torch.randn(size, d, generator=g, dtype=torch.float64)
                                              for d in (*dims[:2], *dims[:2]))
    return {"image": image, "text": text, "labels": (torch.rand(size, dims[2], generator=g) < 0.3).double(),
            "image_target": image_target, "text_target": text_target,
            "film": torch.tensor([0, 0, 1, 2, 3, 4, 5, 6][:size]),
            "genre_set": torch.tensor([0, 0, 1, 1, 2, 3, 4, 4][:size])}


# ----------------------------------------------------------------------------------------------------------------- data

def test_labels_from_raw_files(tmp_path):
    (tmp_path / "dataset").mkdir()
    for film, genres in (("0000002", ["drama", "SCIENCE FICTION", "News"]), ("0000001", ["Sci Fi", "film-noir"]),
                         ("0000003", None), ("0000004", ["War"])):
        (tmp_path / f"dataset/{film}.json").write_text(json.dumps({"genres": genres, "plot": ["a", "b"]}))
        if film != "0000004":  # no poster: no film
            (tmp_path / f"dataset/{film}.jpeg").write_bytes(b"")
    labels = exp.write_labels(tmp_path, tmp_path / "labels")
    assert (tmp_path / "labels/ids_all.txt").read_text().split() == ["0000001", "0000002", "0000003"]
    assert json.loads((tmp_path / "labels/class_names_23.json").read_text()) == list(exp.GENRES) == sorted(exp.GENRES)
    named = [{exp.GENRES[i] for i in np.flatnonzero(row)} for row in labels]
    assert named == [{"Sci-Fi", "Film-Noir"}, {"Drama", "Sci-Fi"}, set()]
    assert np.load(tmp_path / "labels/labels_all_23.npy").dtype == np.float32


def test_labels_stage_reproduces_the_label_files(tmp_path, films, capsys):
    root = tmp_path / "copy"
    shutil.copytree(films, root)
    shutil.rmtree(root / "labels")
    assert cli(tmp_path, root, "--stage", "labels") == 0
    assert "150 films" in capsys.readouterr().out
    for name in ("labels_all_23.npy", "ids_all.txt", "class_names_23.json"):
        assert (root / "labels" / name).read_bytes() == Path(films, "labels", name).read_bytes()
    small = np.load(root / "labels/labels_all_23.npy").astype(np.uint8)  # the same labels in other bytes are left alone
    np.save(root / "labels/labels_all_23.npy", small)
    before = (root / "labels/labels_all_23.npy").read_bytes()
    assert cli(tmp_path, root, "--stage", "labels") == 0
    assert (root / "labels/labels_all_23.npy").read_bytes() == before
    np.save(root / "labels/labels_all_23.npy", 1 - small)
    assert cli(tmp_path, root, "--stage", "labels") == 2
    assert "holds other labels than" in capsys.readouterr().err
    assert np.array_equal(np.load(root / "labels/labels_all_23.npy"), 1 - small)


def test_rows_are_views_times_film_plus_view_and_targets_clean(tmp_path, films):
    cfg = config(tmp_path, films)
    data = exp.load_data(cfg)
    raw = {m: np.load(f"{films}/latents/mm_imdb1_globals_aug3_clip_{m}.npy").astype(np.float32)
           for m in ("image", "text")}
    ids = Path(films, "labels/ids_all.txt").read_text().split()
    split = common.read_json(f"{films}/split.json")
    assert [ids[i] for i in data.splits["test"].tolist()] == split["test"]
    film = ids.index(split["train"][4])
    batch = exp.make_batch(data, torch.tensor([3 * film + 2]))
    for modality, x in raw.items():
        train_rows = np.concatenate([[3 * ids.index(f) + v for v in range(3)] for f in split["train"]])
        mean, deviation = x[train_rows].astype(np.float64).mean(0), x[train_rows].astype(np.float64).std(0)
        assert batch[modality][0].numpy() == pytest.approx((x[3 * film + 2] - mean) / deviation, abs=1e-4)
        assert batch[f"{modality}_target"][0].numpy() == pytest.approx((x[3 * film] - mean) / deviation, abs=1e-4)
    genres = json.loads(Path(films, f"dataset/{ids[film]}.json").read_text())["genres"]
    assert {data.genres[i] for i in batch["labels"][0].nonzero()[:, 0].tolist()} == set(genres)


def test_labels_in_another_order_change_nothing_but_the_latents_follow_ids_all(tmp_path, films):
    root = tmp_path / "uint8"
    shutil.copytree(films, root)
    labels = np.load(root / "labels/labels_all_23.npy")
    np.save(root / "labels/labels_all_23.npy", labels.astype(np.uint8))
    one, other = (exp.load_data(config(tmp_path, f)) for f in (films, root))
    assert torch.equal(one.labels, other.labels)


def test_statistics_of_all_rows_are_the_stats_files(tmp_path, films):
    data = exp.load_data(config(tmp_path, films, "data.statistics=all"))
    stats = np.load(f"{films}/latents/mm_imdb1_globals_aug3_clip_image.stats.npz")
    assert data.statistics["image"][0].numpy() == pytest.approx(stats["mu"])
    assert data.statistics["image"][1].numpy() == pytest.approx(stats["sigma"])


def test_environment_names_the_folders_and_config_keys_win(monkeypatch, tmp_path):
    for variable, value in (("MMIMDB1_DIR", "/raw"), ("OTHER_BACKBONES_DIR_IMDB1_AUG70", "/lat"),
                            ("IMDB1_LABELS_DIR_23", "/lab"), ("MMIMDB_TEXT_EMBEDS", "t.npy")):
        monkeypatch.setenv(variable, value)
    root, image, text, labels = map(str, exp.paths(exp.DataConfig(backbone="clip", views=70)))
    assert (root, image, text, labels) == ("/raw", "/lat/mm_imdb1_globals_aug70_clip_image.npy", "/lat/t.npy", "/lab")
    root, image, text, labels = map(str, exp.paths(
        exp.DataConfig(dir="/d", latents_dir="/l", text_file="mine.npy", backbone="blip2", views=70)))
    assert (root, image, text, labels) == ("/d", "/l/mm_imdb1_globals_aug70_blip2_image.npy", "/l/mine.npy", "/lab")


def test_an_epoch_is_every_view_of_every_training_film_once(tmp_path, films):
    cfg = config(tmp_path, films)
    data = exp.load_data(cfg)
    per_epoch = 90 * 3 // 32
    rows = torch.cat([exp.batch_rows(data, cfg, step) for step in range(per_epoch)])
    expected = (data.splits["train"][:, None] * 3 + torch.arange(3)).flatten()
    assert len(rows) == 32 * per_epoch == len(set(rows.tolist()))  # every batch full, no row twice
    assert set(rows.tolist()) <= set(expected.tolist())
    assert not torch.equal(rows, torch.cat([exp.batch_rows(data, cfg, per_epoch + step) for step in range(per_epoch)]))
    assert torch.equal(exp.batch_rows(data, cfg, 3), exp.batch_rows(data, cfg, 3))
    assert not torch.equal(exp.batch_rows(data, cfg, 3), exp.batch_rows(data, config(tmp_path, films, "seed=1"), 3))


# ---------------------------------------------------------------------------------------------------------------- model

@pytest.mark.parametrize(("backbone", "trained"), [("clip", 6_078_999), ("blip2", 7_915_799)])
def test_parameter_counts_at_the_real_sizes(backbone, trained):
    cfg = common.load_config(exp.Config, ROOT / f"configs/gw_{backbone}_shared.yaml")
    widths = {"clip": (512, 512), "blip2": (768, 2048)}[backbone]
    with torch.device("meta"):
        model = exp.GlobalWorkspace(dict(zip(exp.DOMAINS, (*widths, 23), strict=True)), cfg.model)
    assert sum(p.numel() for p in model.parameters()) == trained
    assert sum(p.numel() for p in model.selector.parameters()) == 262_656


@pytest.mark.parametrize("scale", [False, True])
def test_shared_selector_against_a_loop(scale):
    torch.manual_seed(0)
    selector, e = exp.SharedKeySelector(6, 4, scale).double(), torch.randn(5, 2, 6, dtype=torch.float64)
    assert (selector.key.bias is None) == scale  # it cancels
    with torch.no_grad():
        weights = selector(e)
        for b in range(5):
            query = selector.query.weight @ (e[b, 0] + e[b, 1]) / 2 + selector.query.bias
            logits = torch.stack([query @ (selector.key.weight @ e[b, d]) for d in range(2)])
            assert weights[b] == pytest.approx((logits / (2 if scale else 1)).softmax(0))


def test_a_constant_selector_is_the_same_for_every_film_and_learns():
    selector = exp.ConstantSelector(2)
    encodings = torch.randn(7, 2, 3)
    assert selector(encodings).tolist() == [[0.5, 0.5]] * 7
    selector(encodings)[:, 0].sum().backward()
    torch.optim.Adam(selector.parameters(), lr=0.01, maximize=True).step()
    weights = selector(torch.randn(7, 2, 3))
    assert weights[0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(0.6)).item())
    assert (weights == weights[0]).all()


@pytest.mark.parametrize(("temperature", "largest"), [(0.1, 0.878), (1.0, 0.581)])
def test_random_selector_statistics(temperature, largest):
    torch.manual_seed(0)
    weights = exp.RandomSelector(temperature)(torch.zeros(100_000, 2, 3))
    assert weights.sum(1) == pytest.approx(torch.ones(100_000))
    assert weights.max(1).values.mean().item() == pytest.approx(largest, abs=0.003)
    assert weights.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.005)


def test_the_chosen_selector_weighs_exactly_image_and_text():
    for selector, kind in (("shared", exp.SharedKeySelector), ("constant", exp.ConstantSelector),
                           ("random", exp.RandomSelector), ("uniform", exp.UniformSelector)):
        model = toy_model(selector)
        assert isinstance(model.selector, kind)
        assert model.eval_selector is None
    model = toy_model("uniform")
    e = {d: torch.randn(4, 16, dtype=torch.float64) for d in exp.DOMAINS}
    assert model.fuse({d: e[d] for d in ("image", "text")})[1].tolist() == [[0.5, 0.5]] * 4
    assert model.fuse({d: e[d] for d in ("image", "labels")})[1].std() > 0  # random, as every other set
    assert model.fuse({"text": e["text"]})[0].tolist() == torch.tanh(e["text"]).tolist()
    # trains with attention, is tested with random weights
    reference, both = toy_model("reference-random"), {d: e[d] for d in ("image", "text")}
    assert torch.equal(reference.fuse(both)[1], reference.selector(torch.stack(list(both.values()), dim=1)))
    assert not torch.equal(reference.eval().fuse(both)[1], reference.fuse(both)[1])
    assert reference.eval_selector.temperature == 0.1
    with pytest.raises(ValueError, match="no selector 'sharde'"):
        exp.make_selector(exp.ModelConfig(selector="sharde"))


def loop_losses(model, batch):
    """Every set and term on its own, weights as the model's `fuse` gives them."""
    targets = {"image": batch["image_target"], "text": batch["text_target"], "labels": batch["labels"]}

    def loss(d, decoded):
        return (F.binary_cross_entropy_with_logits(decoded, targets[d])
                if d == "labels" else F.mse_loss(decoded, targets[d]))
    terms = {name: [] for name in exp.LOSSES}
    for s in exp.SUBSETS:
        z = model.fuse({d: model.encoders[d](batch[d]) for d in s})[0]
        outside = [d for d in exp.DOMAINS if d not in s]
        for d in s:
            terms["demi_cycle" if len(s) == 1 else "fused"].append(loss(d, model.decoders[d](z)))
        for d in outside:
            terms["translation"].append(loss(d, model.decoders[d](z)))
        if outside:
            again = model.fuse({d: model.encoders[d](model.decoders[d](z)) for d in outside})[0]
            terms["cycle"] += [loss(d, model.decoders[d](again)) for d in s]
    for a, b in itertools.combinations(exp.DOMAINS, 2):
        logits = (F.normalize(model.encoders[a](batch[a]), dim=1)
                  @ F.normalize(model.encoders[b](batch[b]), dim=1).T / 0.07)
        targets_ = torch.arange(len(logits))
        terms["contrastive"].append((F.cross_entropy(logits, targets_) + F.cross_entropy(logits.T, targets_)) / 2)
    assert {name: len(v) for name, v in terms.items()} == {
        "translation": 9, "demi_cycle": 3, "cycle": 9, "contrastive": 3, "fused": 9}
    return {name: torch.stack(v).mean() for name, v in terms.items()}


@pytest.mark.parametrize("selector", ["shared", "uniform"])
def test_losses_against_a_loop_over_sets(selector, monkeypatch):
    model, batch = toy_model(selector), toy_batch()
    model.other_sets = exp.UniformSelector()  # the random ones draw in another order in the loop
    got, expected = exp.workspace_losses(model, batch), loop_losses(model, batch)
    assert list(got) == list(exp.LOSSES)
    for name in got:
        assert got[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
    sum(got.values()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(expected.values()).backward()
    for mine, other in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_rare_genres_weigh_more_and_pairs_of_a_film_or_of_equal_genres_are_no_negatives(tmp_path, films):
    cfg = config(tmp_path, films)
    data = exp.load_data(cfg)
    model, p = exp.build_model(cfg, data), data.labels[data.splits["train"]].mean(0)
    assert model.pos_weight.numpy() == pytest.approx(((1 - p) / p).sqrt().numpy(), rel=1e-5)
    assert (exp.build_model(config(tmp_path, films, "training.pos_weight_power=0"), data).pos_weight.unique().tolist()
            == [1])
    logits, labels = torch.randn(2, 5, 23), data.labels[:5]
    expected = F.binary_cross_entropy_with_logits(logits, labels.expand(2, 5, 23), reduction="none")
    expected = (expected * torch.where(labels > 0, model.pos_weight, 1.0)).mean((1, 2))
    assert torch.allclose(exp.domain_loss(model, "labels", logits, labels), expected)
    rows = torch.cat([data.splits["train"][:20] * 3, data.splits["train"][:20] * 3 + 1])  # two views of each film
    batch = exp.make_batch(data, rows)
    assert batch["film"].tolist() == (rows // 3).tolist()
    same = (batch["labels"][:, None] == batch["labels"]).all(2)
    assert torch.equal(batch["genre_set"][:, None] == batch["genre_set"], same)
    model.eval()  # nothing dropped out
    values = {}
    for model.false_negatives in ("mask", "ignore"):
        torch.manual_seed(0)
        values[model.false_negatives] = exp.workspace_losses(model, batch)["contrastive"]
    directions = {d: F.normalize(model.encoders[d](batch[d]), dim=1) for d in exp.DOMAINS}
    terms = [common.info_nce(directions[a], directions[b], 1 / 0.07,
                             batch["film" if b == "text" else "genre_set"], "mask")
             for a, b in itertools.combinations(exp.DOMAINS, 2)]
    assert values["mask"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert values["mask"] < values["ignore"]


def test_a_loss_weight_is_a_key_and_input_dropout_leaves_targets_whole(tmp_path, films):
    cfg = config(tmp_path, films, "training.cycle_weight=0", "model.input_dropout=0.5", "model.image_dropout=0.9")
    data = exp.load_data(cfg)
    model, batch = exp.build_model(cfg, data), exp.make_batch(data, data.splits["train"] * 3)
    assert model.loss_weights == {"translation": 1, "demi_cycle": 0.5, "cycle": 0, "contrastive": 0.05, "fused": 1}
    losses = exp.train_step(model, batch, exp.build_optimizer(cfg, model))
    total = sum(model.loss_weights[name] * losses[name] for name in exp.LOSSES) / 5
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    shares = {d: (dropout(batch[d]) == 0).float().mean().item() for d, dropout in model.input_dropout.items()}
    assert shares == {"image": pytest.approx(0.9, abs=0.05), "text": pytest.approx(0.5, abs=0.06)}
    assert torch.equal(model.eval().input_dropout["image"](batch["image"]), batch["image"])


def test_the_order_of_the_inputs_does_not_matter_and_the_selector_alone_drops_nothing_out(tmp_path, films):
    cfg = config(tmp_path, films, "training.selector_after_freeze=true", "model.input_dropout=0.5")
    data = exp.load_data(cfg)
    model, inputs = exp.build_model(cfg, data), exp.film_inputs(data, "test")
    one, other = (exp.predict(model, {d: inputs[d] for d in order}) for order in (("image", "text"), ("text", "image")))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    for step, dropped in ((1, True), (13, False)):
        exp.set_train_mode(cfg, model, step)
        assert (model.input_dropout["text"](inputs["text"]) == 0).any().item() == dropped
        assert model.encoders["image"].training == dropped
        assert model.selector.training


def test_contrastive_values_of_the_reference():
    flat = torch.arange(128, dtype=torch.float64).view(8, 16)
    x, y = (F.normalize(f, dim=1) for f in (torch.sin(0.1 * flat), torch.cos(0.07 * flat)))
    scale = torch.tensor(1 / exp.TEMPERATURE, dtype=torch.float64)
    assert common.info_nce(x, y, scale).item() == pytest.approx(6.224475094730137, rel=1e-9)
    assert common.info_nce(x, x, scale).item() == pytest.approx(0.6664233218485973, rel=1e-9)


def test_clean_views_supervise_whatever_view_is_the_input():
    model, batch = toy_model("uniform"), toy_batch()
    model.other_sets = exp.UniformSelector()
    batch["film"] = batch["genre_set"] = torch.arange(6)
    before = exp.workspace_losses(model, batch)
    batch["image_target"] = batch["image_target"] + 1
    after = exp.workspace_losses(model, batch)
    assert all((before[n] != after[n]).item() == (n != "contrastive") for n in before)


def test_one_cycle_of_500_steps():
    cfg = exp.Config()
    cfg.training.steps, cfg.training.learning_rate = 500, 5.38e-4
    optimizer = exp.build_optimizer(cfg, nn.Linear(2, 2))
    scheduler, rates, betas = exp.build_scheduler(cfg, optimizer), [], []
    for _ in range(500):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if len(rates) < 500:
            scheduler.step()
    assert [rates[i] for i in (0, 50, 99, 250, 499)] == pytest.approx(
        [5.38e-5, 2.99741e-4, 5.38e-4, 3.71667e-4, 5.38e-6], rel=1e-5)
    assert (betas[0], betas[99], betas[499]) == (pytest.approx(0.95), pytest.approx(0.85), pytest.approx(0.95))


def test_every_parameter_gets_gradient_and_one_batch_is_learnt():
    torch.manual_seed(0)
    model, batch = toy_model().float(), {k: v.float() for k, v in toy_batch(8).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = exp.train_step(model, batch, optimizer)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for _ in range(300):
        last = exp.train_step(model, batch, optimizer)
    assert last["loss"] < 0.4 * first["loss"]


# ----------------------------------------------------------------------------------------------------------- evaluation

def test_corruption_has_its_size_and_its_modality(tmp_path, films):
    data = exp.load_data(config(tmp_path, films))
    clean = exp.film_inputs(data, "test")
    for kind, touched in (("image", {"image"}), ("text", {"text"}), ("both", {"image", "text"})):
        noisy = exp.corrupt(clean, kind, 0.4, seed=3)
        for d in ("image", "text"):
            change = noisy[d] - clean[d]
            if d in touched:
                assert change.std(1, correction=0) == pytest.approx(torch.full((len(change),), 2.0), rel=1e-4)
                assert change.mean(1).abs().max() < 1e-5
            else:
                assert change.abs().max() == 0
    noisy = exp.corrupt(clean, "one", 0.4, seed=3)
    hit = torch.stack([(noisy[d] != clean[d]).any(1) for d in ("image", "text")])
    assert (hit.sum(0) == 1).all()
    assert hit.any(1).all()
    assert torch.equal(noisy["text"], exp.corrupt(clean, "one", 0.4, seed=3)["text"])


def test_what_is_missing_is_a_function_of_film_kind_and_rate():
    films = [f"{i:07}" for i in range(4000)]
    for kind in ("image", "text", "both"):
        earlier = None
        for rate in (0, 0.3, 0.7, 1.0):
            missing = np.array([exp.missing_modality(film, kind, rate) for film in films])
            assert (missing >= 0).mean() == pytest.approx(rate, abs=0.03)
            if kind != "both":
                assert set(missing[missing >= 0]) <= {("image", "text").index(kind)}
            elif rate:
                assert missing[missing >= 0].mean() == pytest.approx(0.5, abs=0.05)
            if earlier is not None:
                assert (missing[earlier >= 0] == earlier[earlier >= 0]).all()  # nested
            earlier = missing


def test_a_film_that_misses_a_modality_is_a_set_of_one_domain_and_filled_in_by_its_neighbours(tmp_path, films):
    cfg = config(tmp_path, films, "model.selector=shared")
    data = exp.load_data(cfg)
    model, inputs, train = exp.build_model(cfg, data), exp.film_inputs(data, "test"), exp.film_inputs(data, "train")
    lost = torch.tensor([exp.missing_modality(data.ids[i], "both", 0.7) for i in data.splits["test"].tolist()])
    logits, weights = exp.logits_under(model, data, "test", 0, missing=("both", 0.7))
    for i, what in enumerate(lost.tolist()):
        present = [d for d, index in (("image", 0), ("text", 1)) if index != what]
        alone, own = exp.predict(model, {d: inputs[d][i:i + 1] for d in present})
        assert torch.allclose(logits[i], alone[0], atol=1e-5)
        assert weights[i].tolist() == ([1.0, 0.0] if what == 1 else [0.0, 1.0] if what == 0
                                       else pytest.approx(own[0].tolist(), abs=1e-5))
    for d in ("image", "text"):
        alone = exp.logits_under(model, data, "test", 0, **exp.conditions("shared")[f"clean, {d} only"])[0]
        assert torch.allclose(alone, exp.predict(model, {d: inputs[d]})[0], atol=1e-5)
    filled = exp.fill_in(data, inputs, lost)
    i = int((lost == 0).nonzero()[0])  # no image: the mean image of the ten films whose texts are most like its own
    cosine = F.cosine_similarity(inputs["text"][i], train["text"])
    assert torch.allclose(filled["image"][i], train["image"][cosine.argsort(descending=True)[:10]].mean(0), atol=1e-5)
    assert torch.equal(filled["text"][lost != 1], inputs["text"][lost != 1])


def test_noise_and_random_weights_are_drawn_several_times(tmp_path, films, monkeypatch):
    monkeypatch.setattr(exp, "N_DRAWS", 2)
    monkeypatch.setattr(exp, "logits_under", lambda model, data, split, seed, **asked: (
        torch.tensor([[float(seed)]]), torch.zeros(1, 2)))
    for selector, n_draws in (("shared", 1), ("random", 2), ("reference-random", 2)):
        logits, _ = exp.condition_logits(config(tmp_path, films, f"model.selector={selector}"), None, None)
        for split in ("dev", "test"):
            assert logits["clean, both"][split].flatten().tolist() == [42, 43][:n_draws]
            assert logits["image corrupted by 0.5"][split].flatten().tolist() == [42, 43]


def test_predictions_are_of_their_seed_and_translations_of_their_target(tmp_path, films, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # GPUs that a model on the CPU leaves alone
    cfg = config(tmp_path, films, "model.selector=random")
    data = exp.load_data(cfg)
    model, inputs = exp.build_model(cfg, data), exp.film_inputs(data, "test")
    before = torch.get_rng_state()
    one, same, other = (exp.predict(model, inputs, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    row = exp.translation_table(model, inputs, 0)["image to text"]
    decoded = exp.predict(model, {"image": inputs["image"]}, "text")[0]
    cosines = F.normalize(decoded, dim=1) @ F.normalize(inputs["text"], dim=1).T
    ranks = 1 + (cosines > cosines.diagonal()[:, None]).sum(1)
    assert row["R@5"] == pytest.approx(100 * (ranks <= 5).float().mean().item())
    assert row["squared error"] == pytest.approx((decoded - inputs["text"]).square().mean().item())


def test_replaced_weights(tmp_path, films):
    cfg = config(tmp_path, films, "model.selector=shared")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    own = exp.logits_under(model, data, "test", 0)[1]
    asked = exp.conditions("shared")
    of = {name: exp.logits_under(model, data, "test", 0, **asked[f"clean, both, {name} weights"])[1]
          for name in ("mean", "equal", "another film's")}
    assert torch.allclose(of["mean"], own.mean(0).expand_as(own))
    assert of["equal"].unique().tolist() == [0.5]
    assert torch.equal(of["another film's"][1:], own[:-1])


def test_metrics_against_scikit_learn_over_the_whole_split(tmp_path, films):
    cfg = config(tmp_path, films)
    data = exp.load_data(cfg)
    logits, _ = exp.logits_under(exp.build_model(cfg, data), data, "test", 0)
    labels = data.labels[data.splits["test"]]
    got = exp.genre_scores(logits, labels)
    for average in ("micro", "macro", "weighted", "samples"):
        assert got[f"f1_{average}"] == pytest.approx(
            sklearn.metrics.f1_score(labels, logits > 0, average=average, zero_division=0))
    assert got["bce"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels).item())
    values = {"logits": logits[None], "above_thresholds": logits[None] - 0.3, "labels": labels}
    whole, n = exp.row_scores(values), len(labels)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=3)
    resampled = exp.row_scores(values, counts)
    for r, rows in enumerate(np.repeat(np.arange(n), row) for row in counts):
        expected = exp.row_scores({name: x[..., rows, :] for name, x in values.items()})
        assert {name: x[r] for name, x in resampled.items()} == pytest.approx(
            {name: expected[name] for name in ("f1_macro", "mAP", "f1_macro_tuned")})
    assert whole["f1_macro_tuned"] == pytest.approx(
        sklearn.metrics.f1_score(labels, logits > 0.3, average="macro", zero_division=0))


def test_logistic_regression_against_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=g)
    y = (x @ torch.randn(12, 3, generator=g) + torch.randn(200, 3, generator=g) > torch.tensor([0.0, 2.0, 4.0])).float()
    for strength in (1.0, 0.1):
        theta = exp.logistic_regression(x, y, 1.0, strength)
        for c in range(3):
            reference = LogisticRegression(class_weight="balanced", C=1 / (200 * strength), tol=1e-8,
                                           max_iter=1000).fit(x, y[:, c])
            assert (x @ theta[1:, c] + theta[0, c]).numpy() == pytest.approx(reference.decision_function(x), abs=0.01)


def test_tuned_thresholds_reach_the_best_f1_of_a_grid():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(80, 5, generator=g), (torch.rand(80, 5, generator=g) < 0.3).float()
    labels[:, 4] = 0
    thresholds = exp.tuned_thresholds(logits, labels)
    for c in range(4):
        grid = max(sklearn.metrics.f1_score(labels[:, c], logits[:, c] >= t) for t in logits[:, c])
        assert sklearn.metrics.f1_score(labels[:, c], logits[:, c] > thresholds[c]) == pytest.approx(grid)
    assert thresholds[4] == 0
    tied = exp.tuned_thresholds(torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    assert 0 < tied.item() < 1  # there is no cut between the equal ones


# ----------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def whole(tmp_path_factory, films):
    folder = tmp_path_factory.mktemp("whole")
    assert cli(folder, films) == 0
    return folder / "run"


def results_root(folder):
    """The data folder of a run."""
    return common._run_config(folder)["data"]["dir"]


def assert_same_run(folder, whole):
    """Equal runs write equal files, but for what names the time and the folder."""
    for path in whole.iterdir():
        if path.suffix in (".csv", ".json", ".png") and path.name != "environment.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    reports = [(f / "report.md").read_text().splitlines() for f in (folder, whole)]
    assert ([line for line in reports[0][:-1] if "    python" not in line]
            == [line for line in reports[1][:-1] if "    python" not in line])
    one, other = (common.load_checkpoint(f / "checkpoint_latest.pt")["model_state_dict"] for f in (folder, whole))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_leaves_the_documented_files(whole):
    assert {p.name for p in whole.iterdir()} == {
        ".lock", "config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt",
        "checkpoint_latest.pt.previous", "best_model.pt", "results.json", "per_item.pt", "report.md",
        "training_curves.png", "corruption.png", "missing.png", "attention_histogram.png", "missing_modality.csv"}
    results = common.read_json(whole / "results.json")
    assert results["synthetic"] is True
    genres = results["tables"]["genres from image and text"]
    assert genres.keys() >= {"chance", "logistic regression, both", "logistic regression, the state", "clean, both",
                             "clean, text only", "clean, both, mean weights", "one corrupted by 0.5",
                             "text missing in 0.5", "text missing in 0.5, filled in"}
    assert genres["clean, both"].keys() >= {"f1_micro", "f1_macro", "f1_macro low", "f1_macro high", "f1_weighted",
                                            "mAP", "mAP low"}
    assert all(0 <= row["mAP"] <= 1 for row in genres.values())
    assert results["curves"].keys() >= {"mAP, one corrupted", "weight of the image, text corrupted",
                                        "macro F1 (dev thresholds), both missing"}
    items = common.load_checkpoint(whole / "per_item.pt")
    assert items["ids"] == common.read_json(next(Path(results_root(whole)).glob("split.json")))["test"]
    for row, values in items["rows"].items():  # the table is the statistic of what --compare reads
        assert float(exp.row_scores(values)["f1_macro_tuned"]) == pytest.approx(genres[row]["f1_macro_tuned"]), row
    differences = results["tables"]["paired difference"]
    logistic = genres["logistic regression, both"]["mAP"]
    assert differences["clean, both - logistic regression, both"]["mAP"] == pytest.approx(
        genres["clean, both"]["mAP"] - logistic)
    is_beaten = any(note.startswith("NOTE: the workspace does not beat") for note in results["notes"])
    assert is_beaten == (genres["clean, both"]["mAP"] < logistic)
    line = results["curves"]["macro F1 (dev thresholds), text missing"]["lines"]["left out"]
    assert line["y"][line["x"].index(0.5)] == pytest.approx(genres["text missing in 0.5"]["f1_macro_tuned"])
    missing = [line.split(",") for line in (whole / "missing_modality.csv").read_text().splitlines()[1:]]
    assert {(kind, lost) for _, kind, rate, lost in missing if rate == "1"} == {
        ("image", "image"), ("text", "text"), ("both", "image"), ("both", "text")}
    assert {lost for _, _, rate, lost in missing if rate == "0"} == {""}
    for row, thresholds in results["chosen"]["thresholds"].items():  # what is reported is what dev chose
        values = items["rows"].get(row)
        if values is not None:  # not of all points of a curve
            above = values["logits"] - torch.tensor(thresholds)[:, None]
            assert torch.equal(values["above_thresholds"], above), row
    state = common.load_checkpoint(whole / "checkpoint_latest.pt")
    assert state["global_step"] == 12
    assert len((whole / "metrics.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("override", ["model.selector=random", "training.selector_after_freeze=true"])
def test_interrupted_and_rerun_equals_uninterrupted(tmp_path, films, monkeypatch, override):
    class Killed(BaseException):
        pass
    real = exp.train_step
    (tmp_path / "whole").mkdir()
    assert cli(tmp_path / "whole", films, override, "--stage", "train") == 0
    for step in (2, 11, 12, 14) if "freeze" in override else (2, 7, 11):
        taken = itertools.count()

        def killed(*args, taken=taken, step=step):
            if next(taken) == step:
                raise Killed
            return real(*args)
        (tmp_path / str(step)).mkdir()
        monkeypatch.setattr(exp, "train_step", killed)
        with pytest.raises(Killed):
            cli(tmp_path / str(step), films, override, "--stage", "train")
        monkeypatch.setattr(exp, "train_step", real)
        assert cli(tmp_path / str(step), films, override, "--stage", "train") == 0
        folders = [tmp_path / name / "run" for name in (str(step), "whole")]
        for name in ("metrics.csv", "training_curves.png"):
            assert len({(folder / name).read_bytes() for folder in folders}) == 1
        for name in ("checkpoint_latest.pt", "best_model.pt"):
            one, other = (common.load_checkpoint(folder / name) for folder in folders)
            assert all(repr(one[key]) == repr(other[key]) for key in one if key != "config")


def test_selector_after_freeze_trains_first_the_workspace_then_the_selector_alone(tmp_path, films, monkeypatch):
    real, states = exp.train_step, []

    def spied(model, batch, optimizer):
        out = real(model, batch, optimizer)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return out
    monkeypatch.setattr(exp, "train_step", spied)
    cfg = config(tmp_path, films, "training.selector_after_freeze=true")
    exp.train(cfg, exp.load_data(cfg))
    assert len(states) == 24
    for before, after, selector_moves in ((states[0], states[11], False), (states[11], states[23], True)):
        for key in before:
            assert torch.equal(before[key], after[key]) == (key.startswith("selector.") != selector_moves), key


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_and_rerun_equals_uninterrupted(whole, films, tmp_path, sent, code):
    (tmp_path / "toy.yaml").write_text("training:\n  learning_rate: 3e-3\n")
    command = [sys.executable, "exp_gw_mmimdb.py", str(tmp_path / "toy.yaml"), f"data.dir={films}",
               f"output_dir={tmp_path / 'run'}", *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run/best_model.pt").exists():
        time.sleep(0.001)
    process.send_signal(sent)
    assert process.wait() == code
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).returncode == 0
    assert_same_run(tmp_path / "run", whole)


def test_compare_tabulates_pairs_and_draws(whole, films, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "bootstrap", common.bootstrap.func)  # as many draws as `whole` has
    for selector, seed in (("random", 42), ("random", 7)):
        (tmp_path / f"{selector}{seed}").mkdir()
        assert cli(tmp_path / f"{selector}{seed}", films, "model.selector=random", f"seed={seed}",
                   f"output_dir={tmp_path}/random,seed={seed}") == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert exp.main(["--compare", str(whole), *(f"random,seed={seed}" for seed in (42, 7))]) == 0
    out = capsys.readouterr().out
    text = Path("results/compare/compare.txt").read_text()
    assert text.rstrip() in out
    assert text.splitlines()[-1] == "[SYNTHETIC demo data]"
    assert "clean, both: random (2)" in text
    assert " +- " in text
    assert f"random - run (paired, {len(common.load_checkpoint(whole / 'per_item.pt')['ids'])} items)" in text
    assert sum(line.startswith("chance ") for line in text.splitlines()) == 2  # of genres and of retrieval, once each
    assert Path("results/compare/compare.png").stat().st_size > 50_000


def test_a_finished_run_only_reports_and_an_unfinished_one_is_not_tested(tmp_path, films, capsys, monkeypatch):
    assert cli(tmp_path, films) == 0
    before = (tmp_path / "run/results.json").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(exp, "predict", None)
        assert cli(tmp_path, films) == 0
    assert (tmp_path / "run/results.json").read_bytes() == before
    assert "clean, both" in capsys.readouterr().out
    # of another version of the script
    (tmp_path / "run/results.json").write_text(before.decode().replace('"source": "', '"source": "x'))
    assert cli(tmp_path, films) == 0
    assert "the evaluation runs again" in capsys.readouterr().out
    assert (tmp_path / "run/results.json").read_bytes() == before
    latest = common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")
    common.save_checkpoint(tmp_path / "run/checkpoint_latest.pt",
                           {**latest, "global_step": 8, "position": {**latest["position"], "finished": False}})
    (tmp_path / "run/results.json").unlink()
    assert cli(tmp_path, films, "--stage", "evaluate") == 2
    assert "stopped at step 8; the same command without --stage goes on" in capsys.readouterr().err
    assert cli(tmp_path, films, "--stage", "evaluate", f"output_dir={tmp_path / 'none'}") == 2
    assert "no trained run to evaluate" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("name", "change", "told"), [
    ("results.json", lambda p: p.write_text(""), "cannot be read as JSON"),
    ("results.json", lambda p: p.write_text("{}"), "headline is missing or damaged"),
    ("per_item.pt", lambda p: p.write_bytes(p.read_bytes()[:-999]), "per_item.pt"),
    ("corruption.png", lambda p: p.unlink(), "corruption.png is gone"),
    ("environment.json", lambda p: p.write_text("{"), "")])
def test_a_finished_run_mends_its_outputs(whole, films, tmp_path, capsys, name, change, told):
    shutil.copytree(whole, tmp_path / "run")
    change(tmp_path / "run" / name)
    assert cli(tmp_path, films) == 0
    assert told in capsys.readouterr().out
    for file in ("results.json", "corruption.png", "per_item.pt", "environment.json"):
        assert (tmp_path / "run" / file).stat().st_size > 100
    common._read_results(tmp_path / "run")
    common.check_crc(tmp_path / "run/per_item.pt")


def test_load_model_predicts_raw_latents(whole, films):
    model, cfg = exp.load_model(whole)
    data = exp.load_data(cfg)
    rows = data.splits["test"] * data.views
    raw = {m: data.latents[m][rows].float() for m in ("image", "text")}
    inputs = {m: (x - model.statistics[m][0]) / model.statistics[m][1] for m, x in raw.items()}
    logits = model(inputs)[0]
    assert torch.allclose(logits, common.load_checkpoint(whole / "per_item.pt")["rows"]["clean, both"]["logits"][0],
                          atol=1e-5)
    assert model.genres == data.genres
    assert not model.training
    results, labels = common.read_json(whole / "results.json"), data.labels[data.splits["dev"]]
    chosen, table = results["chosen"], results["tables"]["genres from image and text"]
    for row, asked in (("clean, both", {}), ("text corrupted by 0.5", {"noise": ("text", 0.5)}),
                       ("image missing in 0.5", {"missing": ("image", 0.5)})):  # thresholds are of their condition
        dev = exp.logits_under(model, data, "dev", cfg.seed, **asked)[0]
        assert torch.allclose(torch.tensor(chosen["thresholds"][row][0]), exp.tuned_thresholds(dev, labels), atol=1e-5)
        weights = [exp.logits_under(model, data, "test", cfg.seed + i, **asked)[1] for i in range(3)]
        assert table[row]["weight_image"] == pytest.approx(torch.stack(weights)[..., 0].mean().item(), rel=1e-4)


def test_the_best_step_is_what_is_tested_and_dev_scores_are_devs(whole, films, tmp_path, monkeypatch):
    class Seen(BaseException):
        pass

    def seen(model, data, seed):
        raise Seen(model.state_dict())
    shutil.copytree(whole, tmp_path / "run")
    best = common.load_checkpoint(tmp_path / "run/best_model.pt")
    best["model_state_dict"]["encoders.image.0.bias"] += 1  # whichever step it was, it is no longer the last
    common.save_checkpoint(tmp_path / "run/best_model.pt", best, keep_previous=False)
    cfg = config(tmp_path, films)
    data = exp.load_data(cfg)
    monkeypatch.setattr(exp, "baseline_logits", seen)
    with pytest.raises(Seen) as tested:
        exp.evaluate(cfg, data)
    assert all(torch.equal(x, best["model_state_dict"][name]) for name, x in tested.value.args[0].items())
    model = exp.build_model(cfg, data).eval()
    logits, weights = model(exp.film_inputs(data, "dev"))
    row, expected = exp.validate(model, data, 0), exp.genre_scores(logits, data.labels[data.splits["dev"]])
    for name in ("bce", "mAP", "mAP_micro", "f1_macro", "f1_weighted"):
        assert row[f"dev_{name}"] == pytest.approx(expected[name])
    assert row["dev_weight_image"].item() == pytest.approx(weights[:, 0].mean().item())


def test_the_baselines_are_the_ones_that_dev_chose(films, tmp_path, monkeypatch):
    """Logits name the settings that they are of; dev likes some, test likes others."""
    cfg = config(tmp_path, films)
    data = exp.load_data(cfg)
    dev_labels = data.labels[data.splits["dev"]]
    liked = {"dev": 10 * 0.75 + 0.3, "test": 10 * 1.0 + 3.0}

    def logistic_regression(x, y, power, strength, start):
        theta = torch.zeros(1 + x.shape[1], y.shape[1])
        theta[0] = 10 * power + strength
        theta[1:, 1] = 1  # the second genre's logits are the sum of the features, too
        return theta

    def genre_scores(logits, labels):
        score = float(logits[0, 0] == pytest.approx(liked["dev" if torch.equal(labels, dev_labels) else "test"]))
        return {"f1_macro": score, "mAP": score}
    monkeypatch.setattr(exp, "logistic_regression", logistic_regression)
    monkeypatch.setattr(exp, "genre_scores", genre_scores)
    model = exp.build_model(cfg, data)
    logits, settings = exp.baseline_logits(model, data, 0)
    train, test = (exp.film_inputs(data, split) for split in ("train", "test"))
    states = [exp.predict(model, x, "state")[0] for x in (train, test)]
    features = {"image": test["image"], "text": test["text"],
                "both": torch.cat([test["image"] * 0.8**0.5, test["text"]], dim=1),  # of 10 and of 8 dimensions
                "the state": (states[1] - states[0].mean(0)) / states[0].std(0)}
    for name, x in features.items():
        expected = x.sum(1) + liked["dev"]
        assert torch.allclose(logits[f"logistic regression, {name}"]["test"][0, :, 1], expected, atol=1e-3), name
    assert set(settings) == {f"logistic regression, {name}" for name in ("both", "image", "text", "the state")}
    for row, of_split in logits.items():
        assert settings[row] == {"power": 0.75, "strength": 0.3}
        for z in of_split.values():
            assert torch.allclose(z[..., 0], torch.tensor(liked["dev"])), row


def test_nothing_is_chosen_on_test(films, tmp_path):
    """With the test films' labels shuffled, all that is chosen and all that is trained stays as it was, to the bit."""
    root = tmp_path / "films"
    shutil.copytree(films, root)
    ids = (root / "labels/ids_all.txt").read_text().split()
    rows = np.array([ids.index(film) for film in common.read_json(root / "split.json")["test"]])
    labels = np.load(root / "labels/labels_all_23.npy")
    labels[rows] = labels[np.random.default_rng(0).permutation(rows)]
    np.save(root / "labels/labels_all_23.npy", labels)
    (tmp_path / "whole").mkdir()
    assert cli(tmp_path, root) == cli(tmp_path / "whole", films) == 0
    assert_nothing_chosen_on_test(tmp_path / "run", tmp_path / "whole/run",
                                  changed=("tables", "genres from image and text", "clean, both", "mAP"))


def test_the_monitor_chooses_the_step_of_the_last_phase(tmp_path, films, monkeypatch):
    monkeypatch.setattr(common, "plot_history", lambda *_, **__: None)
    best_of = {"dev_f1_macro": 4, "dev_mAP": 8, "dev_bce": 12, "dev_mAP_micro": 8, "dev_f1_weighted": 4}
    for monitor, override, expected in (("f1_macro", "model.dropout=0", 4), ("bce", "model.dropout=0", 12),
                                        ("mAP", "training.selector_after_freeze=true", 16)):
        rows = itertools.count(4, 4)

        def validate(*_, rows=rows):
            step = next(rows)  # later ones are worse
            scores = {name: -abs(step - best) / 100 for name, best in best_of.items()}
            return {**scores, "dev_bce": -scores["dev_bce"]}
        monkeypatch.setattr(exp, "validate", validate)
        cfg = config(tmp_path, films, f"training.monitor={monitor}", override, f"output_dir={tmp_path / monitor}")
        history = exp.train(cfg, exp.load_data(cfg))
        assert common.load_checkpoint(tmp_path / monitor / "best_model.pt")["step"] == expected
        assert [row["learning_rate"] for row in history if row["step"] % 12 == 0] == pytest.approx(
            [3e-5] * (1 + (history[-1]["step"] == 24)))  # the end of the cycle


def test_patience_and_the_monitor_are_the_configs(tmp_path, films):
    cfg = config(tmp_path, films, "training.monitor=bce", "training.patience=1", "training.steps=40",
                 "training.learning_rate=0.05")
    history = exp.train(cfg, exp.load_data(cfg))
    scores = [-row["dev_bce"] for row in history]
    best = common.load_checkpoint(tmp_path / "run/best_model.pt")["step"]
    assert best == history[int(np.argmax(scores))]["step"]
    assert history[-1]["step"] == min(40, best + 4)


def test_learned_attention_beats_random_weights_where_modalities_differ_in_noise(tmp_path):
    """On the stand-in, whose views differ in how noisy each modality is,
    the learned weight leaves a corrupted modality; a random one cannot."""
    root = demo_data.write_mmimdb(tmp_path / "films", n_films=400, views=4, dims=(24, 20))
    weights = {}
    for selector in ("shared", "random"):
        cfg = config(tmp_path, root, "data.views=4", f"model.selector={selector}", "training.steps=150",
                     "training.eval_every=50", "model.dim=64", "training.batch_size=128", "model.hidden_dim=48",
                     f"output_dir={tmp_path / selector}", "model.input_dropout=0",
                     "model.selector_scale=none", "training.pos_weight_power=0")
        data = exp.load_data(cfg)
        exp.train(cfg, data)
        model = exp.build_model(cfg, data)
        common.load_best(cfg.output_dir, model)
        for kind, column in (("image", 0), ("text", 1)):
            weights[selector, kind] = [
                exp.logits_under(model, data, "test", 0, noise=(kind, a))[1][:, column].mean().item()
                for a in (0.0, 1.0)]
    assert weights["shared", "image"][1] < weights["shared", "image"][0] - 0.1
    assert weights["shared", "text"][1] < weights["shared", "text"][0] - 0.1
    assert weights["random", "image"][0] == weights["random", "image"][1]


# ------------------------------------------------------------------------------------------------------------ bad input

def spoil(root, name, change):
    path = next(Path(root).rglob(name))
    if name.endswith(".npy"):
        np.save(path, change(np.load(path)))
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def zip_instead(path):
    with open(path, "wb") as file:
        np.savez(file, a=1)


def grow(root, name):
    path = next(Path(root).rglob(name))
    path.write_bytes(path.read_bytes() + b"xyz")


def set_nan(x):
    x[5] = np.nan
    return x


BAD = {
    "rows": (lambda r: spoil(r, "*aug3_clip_text.npy", lambda x: x[:-1]),
             "total_rows is 450, but mm_imdb1_globals_aug3_clip_text.npy has 449"),
    "manifest dims": (lambda r: spoil(r, "*clip_image_manifest.json", lambda m: {**m, "dims": 512}),
                      "dims is 512, but"),
    "manifest films": (lambda r: spoil(r, "*clip_image_manifest.json", lambda m: {**m, "original_rows": 9}),
                       "original_rows is 9, but ids_all.txt has 150"),
    "views": (lambda r: spoil(r, "*clip_image_manifest.json", lambda m: {**m, "views_per_sample": 2}),
              "expected 150 films x 2 views"),
    "films in another order": (lambda r: spoil(r, "*clip_text_manifest.json", lambda m: {
        **m, "ids": Path(r, "labels/ids_all.txt").read_text().split()[::-1]}),
        "not those of ids_all.txt in the same order; encode again"),
    "no manifest": (lambda r: next(Path(r).rglob("*clip_image_manifest.json")).unlink(),
                    "clip_image_manifest.json: cannot be read"),
    "names no list": (lambda r: Path(r, "labels/class_names_23.json").write_text("5"),
                      "class_names_23.json: expected a list of names"),
    "names twice": (lambda r: Path(r, "labels/class_names_23.json").write_text(json.dumps(["a"] * 23)),
                    "class_names_23.json: expected a list of names"),
    "a zip for an array": (lambda r: zip_instead(next(Path(r).rglob("*aug3_clip_text.npy"))),
                           "expected float16 or float32 [rows, dims], found NpzFile"),
    "constant latents": (lambda r: spoil(r, "*aug3_clip_image.npy", lambda x: x * 0 + 3),
                         "clip_image.npy: cannot be read (ValueError: all 10 features "
                         "are constant over 270 rows"),
    "no genres": (lambda r: spoil(r, "labels_all_23.npy", lambda x: x * 0), "no film of train has a genre"),
    "trailing bytes": (lambda r: grow(r, "*aug3_clip_image.npy"), "expected 9128 bytes by its header, found 9131"),
    "nan": (lambda r: spoil(r, "*aug3_clip_image.npy", set_nan), "NaN or infinite values, first in row 5"),
    "labels": (lambda r: spoil(r, "labels_all_23.npy", lambda x: x[:-1]), "expected 0/1 of 150 different ids"),
    "split id": (lambda r: spoil(r, "split.json", lambda s: {**s, "dev": ["nobody", *s["dev"]]}),
                 "1 films of dev are not in"),
    "overlap": (lambda r: spoil(r, "split.json", lambda s: {**s, "dev": s["dev"] + s["train"][:1]}),
                "in two parts of the split"),
    "no split.json": (lambda r: Path(r, "split.json").unlink(), "split.json: no such file; it is in mmimdb.tar.gz"),
    "no split": (lambda r: spoil(r, "split.json", lambda s: {"train": s["train"]}), "no films of dev"),
    "dtype": (lambda r: spoil(r, "*aug3_clip_image.npy", lambda x: x.astype(np.float64)),
              "expected float16 or float32"),
    "no labels": (lambda r: shutil.rmtree(Path(r, "labels")), "--stage labels"),
    "no latents": (lambda r: shutil.rmtree(Path(r, "latents")), "mm_imdb1_globals_aug3_clip_image.npy: no such file"),
    "labels junk": (lambda r: Path(r, "labels/labels_all_23.npy").write_bytes(b"junk"),
                    "labels_all_23.npy: cannot be read"),
    "names junk": (lambda r: Path(r, "labels/class_names_23.json").write_text("{"),
                   "class_names_23.json: cannot be read"),
    "null split": (lambda r: spoil(r, "split.json", lambda s: {**s, "dev": None}), "no films of dev"),
    "not a file of numpy": (lambda r: next(Path(r).rglob("*aug3_clip_text.npy")).write_bytes(b"x" * 99),
                            "clip_text.npy: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_naming_the_file(tmp_path, films, capsys, case):
    root = tmp_path / "spoiled"
    shutil.copytree(films, root)
    damage, message = BAD[case]
    damage(root)
    rows = None
    if case == "nan":  # row 5 must be one that is used
        ids, split = Path(films, "labels/ids_all.txt").read_text().split(), common.read_json(f"{films}/split.json")
        rows = ids[1] in split["train"]
        if not rows:
            pytest.skip("film 1 does not train")
    assert cli(tmp_path, root) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_command(tmp_path, films, capsys):
    for overrides, message in ((["data.backbone=blip2"], "there is mm_imdb1_globals_aug3_clip_image.npy"),
                               (["model.selector=share"], "did you mean shared?"),
                               (["training.selector_after_freeze=true", "model.selector=random"], "has none"),
                               (["training.lr=1"], "did you mean training.learning_rate?"),
                               (["--steps", "7"], "--steps: no such option; did you mean training.steps=7?"),
                               (["model.dim=1000000000"], "model.dim: must be <= 65536"),
                               (["--compare", "x"], "--compare takes folders alone"),
                               (["experiment=x"], "it cannot be set")):
        assert cli(tmp_path, films, *overrides) == 2
        assert message in capsys.readouterr().err
    assert cli(tmp_path, films, "training.learning_rate=1e30") == 1
    assert "non-finite" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- profile_flops

# (MFLOP by FlopCounterMode, by torch.profiler) of one training step at batch 1,
# and GFLOP by FlopCounterMode at batch 512
COUNTS = {("clip", "shared"): (246.866, 253.06, 128.81), ("clip", "random"): (242.147, 248.08, None),
          ("blip2", "shared"): (322.101, 330.14, 167.33), ("blip2", "random"): (317.383, 325.15, None)}


@pytest.mark.parametrize(("backbone", "selector"), COUNTS)
def test_flops_of_the_published_table(backbone, selector, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data here
    for variable in ("MMIMDB1_DIR", "OTHER_BACKBONES_DIR_IMDB1_AUG70", "IMDB1_LABELS_DIR_23"):
        monkeypatch.delenv(variable, raising=False)
    found = profile_flops.profile(ROOT / f"configs/gw_{backbone}_{selector}.yaml", batch_size=1,
                                  device="cpu", repeats=1)
    by_counter, by_profiler, large = COUNTS[backbone, selector]
    assert found["flops_counter"] / 1e6 == pytest.approx(by_counter, abs=1e-3)
    assert found["flops_profiler"] / 1e6 == pytest.approx(by_profiler, abs=0.02)
    assert found["flops_forward"] + found["flops_backward"] == found["flops_counter"]
    assert found["random_data"]
    assert found["steps"] == 1000
    assert found["flops_run"] == 1000 * found["flops_counter"]
    if large:  # the products of the contrastive loss grow with the square of the batch, all else with the batch
        pairs = 3 * 3 * 2 * 512
        assert (512 * (found["flops_counter"] - pairs) + 512**2 * pairs) / 1e9 == pytest.approx(large, abs=0.01)


def test_flops_of_a_hand_counted_step(tmp_path):
    """Towers of images, of texts, and of the labelled films' texts with a linear head: products of the layers, twice in
    the backward but for the inputs' gradient, and of one similarity matrix, whose loss forms its two gradients in the
    forward pass."""
    n, d, e = 64, 512, 512
    found = profile_flops.profile(ROOT / "configs/clip_finetune.yaml", device="cpu", repeats=1)
    layers = 3 * (2 * n * d * e + 2 * n * e * e) + 2 * n * e
    similarity = 2 * n * n * e
    assert found["flops_forward"] == layers + 3 * similarity
    assert found["flops_backward"] == 2 * layers - 3 * (2 * n * d * e)
    assert found["batch_size"] == 64
    assert found["flops_per_sample"] == pytest.approx(found["flops_counter"] / 64)
    assert any("gelu" in name or "adamw" in name.lower() or "addcdiv" in name for name in found["uncounted"])
    assert 0 < sum(found["uncounted"].values()) < 1


def test_profile_prints_ratios_writes_files_and_passes_over_what_does_not_train(tmp_path, capsys):
    configs = [str(ROOT / f"configs/{name}.yaml")
               for name in ("alignment_synthetic", "alignment_prh", "clip_finetune", "siglip")]
    assert profile_flops.main([*configs, "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "alignment_prh.yaml: has no training step; passed over" in out
    assert "x)" in out
    assert "1 multiply-add = 2 FLOPs" in out
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png"}
    files = sorted(tmp_path.glob("*.json"))  # report.md quotes no other batch size than a run's own
    assert [path.name for path in files] == [f"{name},batch=16.json"
                                             for name in ("alignment_synthetic", "clip_finetune", "siglip")]
    assert [common.read_json(path)["results"][0]["batch_size"] for path in files] == [16, 16, 16]


def test_profile_measures_the_overrides_and_both_phases(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs/gw_clip_shared.yaml"
    found = profile_flops.profile(path, 1, "cpu", 1,
                                  ["training.selector_after_freeze=true", "model.dim=64", "training.steps=50"])
    first, second = found["phases"]
    random = profile_flops.profile(ROOT / "configs/gw_clip_random.yaml", 1, "cpu", 1, ["model.dim=64"])
    assert first["flops_counter"] == random["flops_counter"]  # mean weights cost nothing
    assert second["flops_forward"] > first["flops_forward"]  # the selector's own products
    assert second["flops_backward"] < first["flops_backward"]  # no gradient of a frozen weight
    assert (found["steps"], found["flops_run"]) == (100, 50 * (first["flops_counter"] + second["flops_counter"]))
    assert found["name"] == "gw_clip_shared,model.dim=64,training.selector_after_freeze=true,training.steps=50"
    joint = profile_flops.profile(path, 1, "cpu", 1, ["model.dim=64"])
    assert joint["phases"] == []
    assert joint["parameters"] == found["parameters"]


def test_profile_measures_a_copied_script(tmp_path):
    for name in ("common", "demo_data", "profile_flops"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copy(ROOT / "exp_gw_mmimdb.py", tmp_path / "exp_mine.py")
    (tmp_path / "mine.yaml").write_text("experiment: mine\ndata:\n  views: 1\nmodel:\n  dim: 32\n  n_blocks: 1\n")
    command = [sys.executable, "profile_flops.py", "mine.yaml", "training.batch_size=4", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "stand-in data of the real shapes" in result.stdout
    assert common.read_json(tmp_path / "results/flops/mine,training.batch_size=4.json")["results"][0]["batch_size"] == 4
    (tmp_path / "mine.yaml").write_text("experiment: gw_mmimdb\n")
    refused = subprocess.run([sys.executable, "exp_mine.py", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert ("is a config of exp_gw_mmimdb.py (experiment: gw_mmimdb), not of exp_mine.py; "
            "a copied script takes a copied YAML") in refused.stderr


def test_profile_measures_flickrs_settings():
    with_fused, without = (
        profile_flops.profile(ROOT / "configs/flickr8k_tiny.yaml", 4, "cpu", 1, [f"losses.fused={share}"])
        for share in (0.5, 0))
    assert without["flops_counter"] < with_fused["flops_counter"]


def test_profile_refuses_other_files(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("experiment: something\n")
    assert profile_flops.main([str(tmp_path / "x.yaml")]) == 2
    assert "is none of the scripts here" in capsys.readouterr().err
    assert profile_flops.main([str(ROOT / "configs/siglip.yaml"), "--batch-size", "0"]) == 2


@pytest.mark.skipif(not (SHARED / "data/mmimdb").exists(), reason="the real films are not here")
def test_real_films_load_and_their_labels_are_rebuilt(tmp_path):
    labels = exp.write_labels(SHARED / "data/mmimdb", tmp_path)
    assert (labels == np.load(SHARED / "data/mmimdb/labels/labels_all_23.npy")).all()
    cfg = config(tmp_path, SHARED / "data/mmimdb", "data.backbone=mobilenet_minilm")
    data = exp.load_data(cfg)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 1040, "dev": 166, "test": 522}
    assert not data.synthetic
    with pytest.raises(UserError, match=r"data\.backbone="):
        exp.load_data(config(tmp_path, SHARED / "data/mmimdb"))
