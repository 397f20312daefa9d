"""200 seeded mutations of what the scripts read: each is read, or ends in one line and exit code 2,
never in a traceback."""

import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import demo_data
import exp_alignment_corr
import exp_coco_heads
import exp_flickr_ttt
import exp_gw_mmimdb
import exp_pixmo_mrl

N_CASES = 200
ODD = (None, True, -1, 0.5, 1e308, 10**30, "", "x", "7", [], [1, "a"], {}, {"a": {"b": []}}, "\ud800",
       "../..", [[]] * 3)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """{what: (function that reads it, its files)}."""
    root = tmp_path_factory.mktemp("fuzz")
    coco = demo_data.write_coco(root / "coco", n_train=40, n_val=10, n_factors=4, image_dim=12, text_dim=16)
    films = demo_data.write_mmimdb(root / "films", n_films=60, views=3, dims=(10, 8))
    scenes = demo_data.write_pixmo(root / "scenes", sizes=(24, 8, 8), group_rows=8)
    features = demo_data.write_pixmo_features(scenes, widths=(24, 12))
    photos = demo_data.write_flickr8k(root / "photos", n_photos=(8, 4, 4), n_spoken=1)
    stacks = Path(demo_data.write_alignment(root / "stacks", n=40, levels=(0,)))
    for path in [*sorted(stacks.glob("vision/*"))[1:], *sorted(stacks.glob("gpt*/*"))[1:]]:
        path.unlink()
    parquet = [f"dataset.{split}_parquet={scenes}/pixmo_{split}.parquet" for split in ("train", "val", "test")]
    cached = [f"{side}_encoder.{key}" for side, file in (("vision", "image"), ("text", "text"))
              for key in ("name=cached", f"features_file={features}/{file}_features.pt")]

    def read_layers():
        cfg = common.load_config(exp_alignment_corr.Config, None, [
            f"features_dir={stacks}/gpt_u={{u}}_features", f"vision_dir={stacks}/vision", "stages=[align]",
            "device=cpu", "alignment.n_permutations=19", "alignment.metrics=[mutual_knn]", f"output_dir={root}/layers"])
        shutil.rmtree(root / "layers", ignore_errors=True)
        exp_alignment_corr.evaluate(cfg, exp_alignment_corr.load_data(cfg, "align"))
    flickr = [f"data.dir={photos}", f"data.cache_dir={root}/flickr_cache", "model.image_size=28", "num_workers=0"]

    def loads(module, overrides, **arguments):
        def read():
            cfg = common.load_config(module.Config, None, [*overrides, "device=cpu", f"output_dir={root}/none"])
            module.load_data(cfg, **arguments)
        read()  # what is not damaged is read
        return read
    mmimdb = loads(exp_alignment_corr, [f"mmimdb.dir={films}", "stages=[mmimdb]"], stage="mmimdb")
    gw = loads(exp_gw_mmimdb, [f"data.dir={films}", "data.backbone=clip"])
    yaml = root / "run.yaml"
    yaml.write_text((ROOT / "configs/siglip.yaml").read_text())
    out = root / "runs/small"
    overrides = [f"data.dir={films}", "data.backbone=clip", "model.dim=8", "model.hidden_dim=8", "model.head_dim=4",
                 "training.batch_size=16", "training.steps=6", "training.eval_every=3", "device=cpu"]
    (root / "gw.yaml").write_text("")
    run = [str(root / "gw.yaml"), *overrides, f"output_dir={out}"]
    assert exp_gw_mmimdb.main([*run, "--stage", "train"]) == 0
    results = {"headline": "h", "tables": {"t": {"a": {"mAP": 0.5}, "b": {"mAP": 0.4}}}, "curves": {
        "mAP": {"xlabel": "x", "lines": {"a": {"x": [0, 1], "y": [0.1, 0.2]}}}}, "notes": [], "seed": 42, "n": 3,
        "data_fingerprint": "f", "files": [], "chosen": {}, "synthetic": True}
    common.write_json(out / "results.json", results)
    draws = {"a": {"mAP": torch.rand(9)}}
    common.save_checkpoint(out / "per_item.pt", {"ids": ["1", "2", "3"], "draws": draws, "scores": draws})
    return {
        "a YAML": (lambda: common.load_config(exp_coco_heads.Config, yaml), [yaml]),
        "embeddings": (loads(exp_coco_heads, [f"data.dir={coco}"]), [*Path(coco).iterdir()]),
        "films": (gw, [p for p in Path(films).rglob("*") if p.is_file() and p.suffix != ".jpeg"]),
        "films of alignment": (mmimdb, [p for p in Path(films).rglob("*") if p.is_file() and p.suffix != ".jpeg"]),
        "parquet": (loads(exp_pixmo_mrl, [*parquet, f"dataset.cache_dir={root}/cache"]),
                    [*Path(scenes).glob("*.parquet")]),
        "pixmo's cache": (loads(exp_pixmo_mrl, [*parquet, f"dataset.cache_dir={root}/cache"]),
                          [p for p in (root / "cache").rglob("*") if p.is_file()]),
        "features": (loads(exp_pixmo_mrl, [*parquet, *cached]), [*Path(features).iterdir()]),
        "Flickr8k": (loads(exp_flickr_ttt, flickr), [p for p in Path(photos).rglob("*") if p.is_file()]),
        "Flickr8k's cache": (loads(exp_flickr_ttt, flickr),
                             [p for p in (root / "flickr_cache").rglob("*") if p.is_file()]),
        "layers": (read_layers, [*stacks.glob("vision/*"), *stacks.glob("gpt*/*")]),
        "a run to compare": (lambda: common.compare_runs([out], root / "compare"),
                             [out / name for name in ("results.json", "per_item.pt", "config.yaml")]),
        "a run to go on with": (lambda: exp_gw_mmimdb.main.__wrapped__([*run, "--stage", "train"]),
                                [out / name for name in ("checkpoint_latest.pt", "best_model.pt", "config.yaml",
                                                         "environment.json", "metrics.csv")])}


def replace_in(tree, draws):
    """The tree (dicts, lists) with one value in it replaced, taken out, or of another type."""
    if isinstance(tree, (dict, list)) and tree and draws.random() < 0.8:
        copy = dict(tree) if isinstance(tree, dict) else list(tree)
        key = draws.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
        if draws.random() < 0.2:
            del copy[key]
        else:
            copy[key] = replace_in(copy[key], draws)
        return copy
    if isinstance(tree, torch.Tensor) and draws.random() < 0.8:
        return draws.choice([
            lambda x: x[:len(x) // 2] if x.ndim else x, lambda x: x.new_zeros(0), lambda x: x.to(torch.complex64),
            lambda x: x.float() * float("nan"), lambda x: x.T if x.ndim == 2 else x[None], lambda x: x.to("meta"),
            lambda x: x.to_sparse(), lambda x: x.bool(), lambda x: x.tolist(), lambda x: x.double() * 1e300])(tree)
    return draws.choice(ODD)


def damaged_array(array, draws):
    """A .npy file of an array that is something else."""
    odd = draws.choice([array[:len(array) // 2], array.astype("S8"), np.array(["a", 1], dtype=object), array[None],
                        np.zeros(len(array), dtype=[("a", "f4"), ("b", "i8")]), array.astype(bool), np.float32(3)])
    np.save(buffer := io.BytesIO(), odd, allow_pickle=True)
    return buffer.getvalue()


def damaged_bytes(content, draws):
    """A file cut short, longer, with other bytes, lines taken out or twice, or a number that no type holds."""
    place = draws.randrange(len(content) + 1)
    lines = content.splitlines(keepends=True) or [b""]
    line = draws.randrange(len(lines))
    return draws.choice([
        content[:place], b"", content + content[place:], content[:place] + b"\xff\x00\xfe" + content[place + 3:],
        b"".join(lines[:line] + lines[line + 1:]), b"".join([*lines[:line], lines[line], *lines[line:]]),
        content[:place] + b"9" * 5000 + content[place:], b"[" * 100_000, b"<!doctype html><html>",
        b"\x80\x02cos\nsystem\n."])


def mutate(path, draws):
    """Overwrite a file by a damaged one; sometimes it is gone, or a folder."""
    content = path.read_bytes()
    path.unlink()
    how = draws.random()
    if how < 0.05:
        return
    if how < 0.1:
        path.mkdir()
    elif how < 0.7 and path.suffix == ".json":
        path.write_text(json.dumps(replace_in(json.loads(content), draws)))
    elif how < 0.7 and path.suffix == ".pt":
        torch.save(replace_in(torch.load(io.BytesIO(content), weights_only=True), draws), path)
    elif how < 0.7 and path.suffix == ".npy":
        path.write_bytes(damaged_array(np.load(io.BytesIO(content)), draws))
    else:
        path.write_bytes(damaged_bytes(content, draws))


def remove(path):
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore")
def test_what_is_damaged_is_read_or_refused_in_one_line(readers, capsys):
    for case in range(N_CASES):
        draws = random.Random(case)
        what = [*readers][case % len(readers)]
        read, files = readers[what]
        kind = draws.choice(sorted({file.suffix for file in files}))
        path = draws.choice(sorted(file for file in files if file.suffix == kind))
        before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
        mutate(path, draws)
        code = common.exit_codes(lambda argv, read=read: read())([])
        out, err = capsys.readouterr()
        told = f"case {case}, {what}: {path.name}\n{out}{err}"
        assert code in (0, 1, 2), told  # 1: what the system says of a file
        lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  ")]
        assert (len(lines), "Traceback" in err) == (1 if code else 0, False), told
        for file in [*path.parent.glob("*.damaged"), *before]:
            remove(file)
        for file, content in before.items():
            file.write_bytes(content)
