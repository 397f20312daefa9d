"""encode.py with tiny random models of each family: pooling against loops over single texts,
files that the experiments train on, kill and resume."""

import importlib.util
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

pytest.importorskip("transformers")
import tiny_models
import transformers

import common
import demo_data
import encode
import exp_alignment_corr
import exp_coco_heads
import exp_gw_mmimdb
import exp_pixmo_mrl

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ARGS = SimpleNamespace(device=torch.device("cpu"), device_map=None, weights="float32", dtype="float32", max_length=512,
                       vision_pool="cls", text_pool=None, normalize_texts=False, trust_remote_code=False)
CAPTIONS = [*tiny_models.TEXTS, "a", "one two three four five six seven"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """model(kind, **options) -> folder of a tiny model, made once."""
    made, root = {}, tmp_path_factory.mktemp("models")

    def get(kind, **options):
        name = "_".join([kind, *(str(v).strip() for v in options.values())]).replace("/", "").replace(" ", "")
        if name not in made:
            made[name] = tiny_models.save_model(root / name, kind, **options)
        return made[name]
    return get


def draw_picture(draws, size):
    """Coloured patches, smoothed."""
    return Image.fromarray(draws.randint(256, size=(5, 6, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A folder with 30 pictures, of which 4 cannot be read,
    and a COCO captions JSON with its annotations out of order."""
    root, draws = tmp_path_factory.mktemp("coco_raw"), np.random.RandomState(0)
    (root / "images").mkdir()
    images, annotations = [], []
    for i in range(30):
        picture, caption = draw_picture(draws, (48 + i, 40)), f"A {('red', 'big', 'wet')[i % 3]} thing.Seen {i} times"
        name = f"{i:012}.jpg"
        picture.save(root / "images" / name, quality=90)
        images.append({"id": 1000 - i, "file_name": name})
        annotations += [{"id": 50 * i + k, "image_id": 1000 - i, "caption": f"{caption.split('.')[k % 2]} {k}\n"}
                        for k in range(2 + i % 2)]
    raw = (root / "images" / images[3]["file_name"]).read_bytes()
    (root / "images" / images[3]["file_name"]).write_bytes(raw[:300])
    (root / "images" / images[17]["file_name"]).write_text("<html>404</html>")
    (root / "images" / images[20]["file_name"]).unlink()
    (root / "images" / images[29]["file_name"]).write_bytes(b"")
    Image.new("L", (40, 40), 7).save(root / "images" / images[5]["file_name"])  # grey
    random.Random(1).shuffle(annotations)
    images.insert(2, {"id": 5, "file_name": "uncaptioned.jpg"})
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.fixture
def films(tmp_path):
    """MM-IMDb's raw files and labels of 90 stand-in films, without latents."""
    root = tmp_path / "films"
    demo_data.write_mmimdb(root, n_films=90)
    for path in (root / "latents").iterdir():
        path.unlink()
    return root


def run(*args):
    """encode.main, which must succeed."""
    assert encode.main([*map(str, args), "--device", "cpu", "--workers", "2"]) == 0


def fails(capsys, *args):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert encode.main([*map(str, args), *["--device", "cpu"] * ("--device" not in args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def coco_args(coco, model, out, *more):
    return ["coco", "--images", coco / "images", "--captions", coco / "captions.json", "--image-model", model("siglip"),
            "--text-model", model("mistral"), "--out", out, *more]


def opened(path):
    source = encode.find_model(path, "texts")
    return source, encode.load(source, "AutoTokenizer")


# -------------------------------------------------------------------------------------------------- pooling and forward

@pytest.mark.parametrize(("kind", "how"), [*((kind, how) for kind in ("bert", "roberta") for how in ("first", "mean")),
                                           *((kind, how) for kind in ("mistral", "gpt2") for how in ("last", "mean"))])
def test_pooled_texts_equal_a_loop_over_single_texts(model, kind, how):
    """Each text alone has no padding at all: the last token is hidden[-1]."""
    source, tokenizer = opened(model(kind))
    items = encode.tokenize(source, tokenizer, CAPTIONS, ARGS, how)
    assert len({len(item) for item in items}) > 3
    (found,) = encode.text_forward(source, tokenizer, ARGS, how)(items)
    plain = transformers.AutoModel.from_pretrained(model(kind)).eval()
    for row, item in zip(found, items, strict=True):
        with torch.no_grad():
            hidden = plain(input_ids=torch.tensor([item])).last_hidden_state[0]
        expected = {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[how]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
        if how == "last":
            assert (row - hidden[-2]).abs().max() > 1e-2


@pytest.mark.parametrize("wrap", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_eos_ends_every_text_once_also_when_cut(tmp_path, wrap):
    tokenizer, source = (tiny_models.save_tokenizer(tmp_path, wrap=wrap),
                         SimpleNamespace(config=transformers.MistralConfig(), name="x"))
    for length in (6, 64):
        ids = encode.tokenize(source, tokenizer, [*CAPTIONS, "x" * 500], SimpleNamespace(max_length=length), "last")
        assert all(item[-1] == tokenizer.eos_token_id and item.count(tokenizer.eos_token_id) == 1
                   and len(item) <= length for item in ids)
        assert max(map(len, ids)) == length


def test_texts_that_are_cut_are_counted(tmp_path):
    source = SimpleNamespace(config=transformers.MistralConfig(), name="x")
    for wrap, how, longest in (("$A", "mean", 9), ("$A", "last", 8), ("<s> $A </s>", "last", 7),
                               ("<s> $A </s>", "projection", 7)):
        tokenizer = tiny_models.save_tokenizer(tmp_path, wrap=wrap)
        texts = ["0123456789"[:n] for n in range(10)]
        items = encode.tokenize(source, tokenizer, texts, SimpleNamespace(max_length=9), how)
        assert [item.is_cut for item in items] == [n > longest for n in range(10)]
        assert items[0]  # an empty text is not without tokens


def test_an_empty_text_has_a_mean(model):
    source, tokenizer = opened(model("gpt2"))
    items = encode.tokenize(source, tokenizer, ["", "a dog"], ARGS, "mean")
    assert torch.isfinite(encode.text_forward(source, tokenizer, ARGS, "mean")(items)[0]).all()


# gemma2 caps its logits, cohere scales them
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma2", "cohere"])
def test_language_features_and_nats_equal_a_loop_over_single_texts(model, kind, monkeypatch):
    """The body runs once a batch and the head sees some tokens at a time,
    also where the start token is ours (gpt2, bloom)."""
    monkeypatch.setattr(encode, "SCORED_TOKENS", 7)
    source, tokenizer = opened(model(kind))
    limit, start = 40, tokenizer.bos_token_id
    items = encode.tokenize(source, tokenizer, ["", *CAPTIONS, "w" * 90], SimpleNamespace(max_length=limit), "start")
    assert all(item[0] == start for item in items)
    puts_start = tokenizer("a")["input_ids"][0] == start
    assert puts_start == (kind not in ("gpt2", "bloom"))
    load_model, calls = encode.load_model, []

    def counted(*args):
        network = load_model(*args)
        network.base_model.register_forward_hook(lambda *_: calls.append("body"))
        network.get_output_embeddings().register_forward_hook(lambda _, x, __: calls.append(x[0].shape[1]))
        return network
    monkeypatch.setattr(encode, "load_model", counted)
    features, nats = encode.language_forward(source, tokenizer, ARGS)(items)
    assert calls.count("body") == 1
    assert max(calls[1:]) == 7
    plain = transformers.AutoModelForCausalLM.from_pretrained(model(kind)).eval()
    for row, value, item in zip(features, nats, items, strict=True):
        with torch.no_grad():
            output = plain(input_ids=torch.tensor([item]), output_hidden_states=True)
        own = slice(None) if puts_start or len(item) == 1 else slice(1, None)
        torch.testing.assert_close(row, torch.stack([h[0, own].mean(0) for h in output.hidden_states]),
                                   rtol=1e-4, atol=1e-5)
        logits = output.logits[0].double()
        expected = -sum(F.log_softmax(logits[i], 0)[item[i + 1]] for i in range(len(item) - 1))
        assert math.isnan(value) if item.is_cut else float(value) == pytest.approx(float(expected), rel=1e-5)
    assert nats.isnan().sum() == 1
    assert nats[0] == 0  # nothing to tell of an empty text


@pytest.mark.parametrize("weights", encode.DTYPES)
def test_pixels_reach_the_model_as_they_are_in_its_dtype(model, coco, weights):
    processor, dtype = encode.open_images(model("clip"), ARGS)[1], encode.DTYPES[weights]
    files = [coco / "images" / f"{i:012}.jpg" for i in (0, 8)]
    whole = [processor(images=Image.open(file), return_tensors="pt")["pixel_values"][0] for file in files]
    assert encode.read_pixels(files[0], processor, dtype).dtype.itemsize == dtype.itemsize  # what processes send
    items = [encode.read_pixels(file, processor, dtype) for file in files]
    torch.testing.assert_close(encode.pixels_on("cpu", items, dtype), torch.stack(whole).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["siglip", "clip", "blip2", "vit", "siglip_vision", "clip_vision"])
def test_image_features_equal_the_model_on_one_picture(model, coco, kind):
    (source, processor), files = (encode.open_images(model(kind), ARGS),
                                  [coco / "images" / f"{i:012}.jpg" for i in (0, 5, 8)])
    with encode.open_readers(SimpleNamespace(device=torch.device("cpu"), workers=2)) as readers:
        prepare = encode.image_preparer(files, processor, SimpleNamespace(readers=readers, weights="float32"))
        items = list(prepare(range(3)))
    (found,) = encode.image_forward(source, ARGS)(items)
    plain = transformers.AutoModel.from_pretrained(model(kind)).eval()
    for row, file in zip(found, files, strict=True):
        pixels = processor(images=Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if kind == "blip2":
                seen = plain.vision_model(pixel_values=pixels).last_hidden_state
                tokens = plain.qformer(query_embeds=plain.query_tokens, encoder_hidden_states=seen).last_hidden_state[0]
                expected = sum(tokens) / len(tokens)
            elif kind.endswith("_vision"):
                expected = plain(pixel_values=pixels).pooler_output[0]
            elif kind == "vit":
                expected = plain(pixel_values=pixels).last_hidden_state[0, 0]
            else:
                expected = plain.get_image_features(pixel_values=pixels).pooler_output[0]
        torch.testing.assert_close(row.float(), expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["ijepa", "vit_mae"])
def test_a_model_whose_first_token_is_a_patch_is_refused(model, kind):
    forward = encode.image_forward(encode.find_model(model(kind), "images"), ARGS)
    with pytest.raises(common.UserError, match=f"a {kind} gives no CLS token"):
        forward([np.zeros((3, 32, 32), np.float32)])


def test_pictures_that_no_model_can_see_are_unreadable(tmp_path):
    Image.new("RGB", (2001, 2)).save(tmp_path / "line.png")
    assert encode.read_image(tmp_path / "line.png") == "2001 x 2 pixels, too narrow"

    def processor(**kwargs):
        raise ValueError("mean must have 4 elements\nmore")
    assert encode.pixels_of(Image.new("RGB", (4, 4)), processor) == "ValueError: mean must have 4 elements"


@pytest.mark.parametrize("kind", ["siglip", "clip", "blip2"])
def test_text_towers_equal_the_model_on_one_text(model, kind):
    source, tokenizer, how = encode.open_texts(model(kind), ARGS)
    items = encode.tokenize(source, tokenizer, CAPTIONS, ARGS, how)
    (found,) = encode.text_forward(source, tokenizer, ARGS, how)(items)
    plain = transformers.AutoModel.from_pretrained(model(kind)).eval()
    for row, item in zip(found, items, strict=True):
        with torch.no_grad():
            if kind == "blip2":
                expected = plain.language_model.get_encoder()(
                    input_ids=torch.tensor([item])).last_hidden_state[0].mean(0)
            else:
                item = item + [tokenizer.pad_token_id] * (24 - len(item)) if kind == "siglip" else item
                expected = plain.get_text_features(input_ids=torch.tensor([item])).pooler_output[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2", "vit_mae"])
def test_vision_layers_are_the_cls_token_after_each_block(model, kind):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (found,) = encode.vision_forward(*encode.open_images(model(kind), ARGS), ARGS)(list(pixels.numpy()))
    assert found.shape == (3, 2, 16)
    plain = transformers.AutoModel.from_pretrained(model(kind)).eval()
    tower = getattr(plain, "vision_model", plain)
    with torch.no_grad():
        if kind == "vit_mae":
            plain.config.mask_ratio = 0.0
            # any order of patches
            outputs = tower(pixel_values=pixels, noise=torch.rand(3, 16), output_hidden_states=True)
        else:
            outputs = tower(pixel_values=pixels, output_hidden_states=True)
        torch.testing.assert_close(found[:, 0], outputs.hidden_states[1][:, 0], rtol=1e-4, atol=1e-5)
        norm = tower.post_layernorm if kind == "clip" else tower.layernorm
        pooled = outputs.pooler_output if kind == "clip" else outputs.last_hidden_state[:, 0]
        torch.testing.assert_close(norm(found[:, 1]), pooled, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- coco

def test_coco_files_hold_ids_in_order_and_count_bad_images(coco, model, tmp_path, capsys):
    run(*coco_args(coco, model, tmp_path, "--dtype", "float32"))
    images, texts = (torch.load(tmp_path / f"train2017_{part}_embeddings.pt", weights_only=True)
                     for part in ("image", "text"))
    metadata, raw = (json.loads(path.read_text())
                     for path in (tmp_path / "train2017_metadata.json", coco / "captions.json"))
    manifest = json.loads((tmp_path / "train2017_image_embeddings_manifest.json").read_text())
    broken = {f"{i:012}.jpg" for i in (3, 17, 20, 29)}
    assert set(manifest["bad_images"]) == broken
    assert (manifest["n_bad_images"], metadata["bad_images"], metadata["unique_images"]) == (4, 4, 26)
    assert capsys.readouterr().out.count("\ncannot be read: ") == 4
    assert manifest["job"]["model"] == model("siglip")
    assert manifest["job"]["transform"]["image_mean"]
    assert manifest["job"]["revision"].startswith("files ")

    file_of, caption_of = {i["id"]: i["file_name"] for i in raw["images"]}, {a["id"]: a for a in raw["annotations"]}
    kept = [a for a in raw["annotations"] if file_of[a["image_id"]] not in broken]
    assert sorted(metadata["caption_ids"]) == sorted(a["id"] for a in kept)
    assert len(images) == len(set(metadata["image_ids"])) == 26
    assert len(texts) == len(kept) == len(metadata["image_ids"])
    source, processor = encode.open_images(model("siglip"), ARGS)
    see = encode.image_forward(source, ARGS)
    read_source, tokenizer = opened(model("mistral"))
    read = encode.text_forward(read_source, tokenizer, ARGS, "last")
    for row in (0, 1, 20, len(texts) - 1):
        annotation = caption_of[metadata["caption_ids"][row]]
        assert metadata["image_ids"][row] == annotation["image_id"]
        assert metadata["captions"][row] == " ".join(annotation["caption"].split())
        name = file_of[annotation["image_id"]]
        assert metadata["image_files"][metadata["image_index"][row]] == name
        image = see([encode.pixels_of(encode.read_image(coco / "images" / name), processor)])[0][0]
        text = read(encode.tokenize(read_source, tokenizer, [metadata["captions"][row]], ARGS, "last"))[0][0]
        torch.testing.assert_close(images[metadata["image_index"][row]], image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(texts[row], text, rtol=1e-4, atol=1e-5)


def test_coco_heads_trains_on_the_files(coco, model, tmp_path):
    run(*coco_args(coco, model, tmp_path / "data"))
    images = torch.load(tmp_path / "data/train2017_image_embeddings.pt", weights_only=True)
    assert images.dtype == torch.float16
    assert len(images) == 26
    assert exp_coco_heads.main([str(ROOT / "configs/siglip.yaml"), f"data.dir={tmp_path / 'data'}",
                                f"output_dir={tmp_path / 'run'}", "device=cpu", "data.val=4", "data.test=6",
                                "data.train=rest", "training.num_epochs=1", "training.batch_size=16",
                                "--stage", "train"]) == 0
    assert len(json.loads((tmp_path / "run/splits.json").read_text())["image_ids"]["train"]) == 16
    assert (tmp_path / "run/best_model.pt").exists()


def test_batch_size_does_not_change_a_row(coco, model, tmp_path):
    """Rows agree to 1e-5 of the largest value in float32: other batches are other kernels and other padding,
    not other numbers."""
    rows = {}
    for size in (1, 3, 64):
        run(*coco_args(coco, model, tmp_path / str(size), "--dtype", "float32", "--batch-size", size))
        rows[size] = [torch.load(tmp_path / str(size) / f"train2017_{part}_embeddings.pt", weights_only=True)
                      for part in ("image", "text")]
    for size in (3, 64):
        for a, b in zip(rows[1], rows[size], strict=True):
            assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_instruction_and_limit(coco, model, tmp_path, capsys):
    run(*coco_args(coco, model, tmp_path / "plain", "--limit", "3", "--dtype", "bfloat16"))
    run(*coco_args(coco, model, tmp_path / "told", "--limit", "3", "--dtype", "bfloat16",
                   "--instruction", "Find the picture"))
    plain, told = (torch.load(tmp_path / name / "train2017_text_embeddings.pt", weights_only=True)
                   for name in ("plain", "told"))
    assert plain.dtype == torch.bfloat16
    assert len(plain) == len(told) == 7
    assert ((plain - told).float().abs().amax(1) > 1e-3).all()
    metadata = [json.loads((tmp_path / name / "train2017_metadata.json").read_text()) for name in ("plain", "told")]
    assert metadata[0] == metadata[1]
    for other in (["--instruction", "Another"], ["--text-pool", "first"], ["--max-length", "6"], ["--normalize-texts"]):
        line = fails(capsys, *coco_args(coco, model, tmp_path / "plain", "--limit", "3", "--dtype", "bfloat16", *other))
        assert "train2017_text_embeddings.pt was made otherwise" in line


def test_texts_at_unit_length(coco, model, tmp_path, capsys):
    run(*coco_args(coco, model, tmp_path / "plain", "--limit", "3", "--dtype", "float32"))
    run(*coco_args(coco, model, tmp_path / "unit", "--limit", "3", "--dtype", "float32", "--normalize-texts"))
    plain, unit = (torch.load(tmp_path / name / "train2017_text_embeddings.pt", weights_only=True)
                   for name in ("plain", "unit"))
    torch.testing.assert_close(unit, F.normalize(plain, dim=1))
    assert "unit_length=false (now true)" in fails(capsys, *coco_args(
        coco, model, tmp_path / "plain", "--limit", "3", "--dtype", "float32", "--normalize-texts", "--device", "cpu"))


# --------------------------------------------------------------------------------------------- kill, resume, other jobs

DYING = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import encode
encode.SHARD, encode.TEXT_SHARD, calls, write = 8, 16, [], encode.write_rows
def dying(*args):
    write(*args)
    calls.append(1)
    if len(calls) == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
encode.write_rows = dying
encode.main({argv!r})
"""


@pytest.mark.parametrize("kill_at", [3, 6])  # in the images, after a shard's rows and before its state; in the texts
def test_kill_and_resume_equals_an_uninterrupted_run_to_the_bit(coco, model, tmp_path, monkeypatch, kill_at):
    monkeypatch.setattr(encode, "SHARD", 8)
    monkeypatch.setattr(encode, "TEXT_SHARD", 16)
    options = ["--batch-size", "4", "--max-length", "9"]
    argv = ([str(v) for v in coco_args(coco, model, tmp_path / "killed", *options)]
            + ["--device", "cpu", "--workers", "2"])
    code = DYING.format(root=str(ROOT), kill_at=kill_at, argv=argv)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "killed/train2017_metadata.json").exists()
    state = json.loads(next((tmp_path / "killed").glob(".*.work/state.json")).read_text())
    assert state["done"] == {3: 16, 6: 16}[kill_at]
    written, write = [], encode.write_rows
    monkeypatch.setattr(encode, "write_rows",
                        lambda path, start, *rest: (written.append(start), write(path, start, *rest)))
    run(*argv[:-4])
    n_shards = len(written)
    # one of 16 pictures cannot be read; finished shards are not encoded again
    assert written[0] == {3: 15, 6: 16}[kill_at]
    run(*coco_args(coco, model, tmp_path / "whole", *options))
    assert common.read_json(tmp_path / "whole/train2017_text_embeddings_manifest.json")["n_cut"] > 0
    assert n_shards < len(written) - n_shards
    for name in ("image_embeddings.pt", "text_embeddings.pt", "metadata.json", "image_embeddings_manifest.json",
                 "text_embeddings_manifest.json"):
        assert ((tmp_path / "killed" / f"train2017_{name}").read_bytes()
                == (tmp_path / "whole" / f"train2017_{name}").read_bytes()), name
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir())


def test_a_finished_command_loads_no_model_and_another_job_is_refused(coco, model, tmp_path, capsys, monkeypatch):
    run(*coco_args(coco, model, tmp_path, "--limit", "3"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(encode, "load_model", lambda *args: pytest.fail("a model was loaded"))
    run(*coco_args(coco, model, tmp_path, "--limit", "3"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert "limit" not in fails(capsys, *coco_args(coco, model, tmp_path, "--limit", "4"))
    line = fails(capsys, *coco_args(coco, model, tmp_path, "--limit", "3", "--image-model", model("clip")))
    assert "was made otherwise" in line
    assert "--out" in line
    (tmp_path / "train2017_image_embeddings_manifest.json").unlink()
    assert "was not made by this command" in fails(capsys, *coco_args(coco, model, tmp_path, "--limit", "3"))


def test_numbers_beside_features_stay_float32():
    args = SimpleNamespace(batch_size=2, dtype="float16", weights="float32")
    part = encode.encode_shard(range(3), [[0]] * 3, lambda items: (torch.ones(len(items), 4), torch.ones(len(items))),
                               "abc", {"model": "x"}, args)
    assert [x.dtype for x in part["outputs"]] == [torch.float16, torch.float32]


def test_batches_are_of_like_lengths_and_rows_stay_in_order():
    items, sizes = [[0] * (1 + i * 7 % 5) for i in range(11)], []

    def forward(batch):
        sizes.append([len(item) for item in batch])
        return (torch.tensor([[float(len(item))] for item in batch]),)
    items[4] = "broken"
    (rows,), good = encode.run_batches(forward, items, 2)
    assert good == [i for i in range(11) if i != 4]
    assert rows[:, 0].tolist() == [len(items[i]) for i in good]
    # what does not fit fails at once
    assert [n for batch in sizes for n in batch] == sorted((len(items[i]) for i in good), reverse=True)


BESIDE_A_GPU = SimpleNamespace(device=torch.device("cuda"), workers=2)  # pictures are decoded by processes there


def test_processes_that_decode_give_the_bits_of_threads(coco, films, parquet, model, tmp_path, monkeypatch):
    photos = demo_data.write_flickr8k(tmp_path / "tree", n_photos=(3, 3, 3))
    captions = [{i: {"original": "a dog", "sentences": {}}} for i in ("a", "b", "c")]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    names = sorted(path.name for path in (coco / "images").iterdir())[2:5]  # one of them cannot be read
    (tmp_path / "names").write_text("\n".join(names))
    commands = [coco_args(coco, model, "", "--weights", "bfloat16"),
                ["mmimdb", "--data", films, "--backbone", "clip", "--model", model("clip"), "--views", 3, "--limit", 4],
                ["alignment", "--captions", tmp_path / "captions.json", "--images", coco / "images", "--image-names",
                 tmp_path / "names", "--vision", model("vit")],
                ["flickr8k", "--data", photos, "--model", model("siglip"), "--text-model", model("bert"),
                 "--speech-model", model("wav2vec2"), "--corruptions"],
                pixmo_args(model, parquet, "", "--weights", "float16", "--dtype", "float32")]
    opened = encode.open_readers
    for where, kind in ((SimpleNamespace(device=torch.device("cpu"), workers=2), "ThreadPoolExecutor"),
                        (BESIDE_A_GPU, "ProcessPoolExecutor")):
        with opened(where) as readers:
            assert type(readers).__name__ == kind
    for folder, how in (("threads", opened), ("processes", lambda args: opened(BESIDE_A_GPU))):
        monkeypatch.setattr(encode, "open_readers", how)
        for command in commands:
            run(*command, "--out", tmp_path / folder / command[0])
    files = [path.relative_to(tmp_path / "threads") for path in (tmp_path / "threads").rglob("*") if path.is_file()]
    assert len(files) > 50
    for file in files:
        assert (tmp_path / "threads" / file).read_bytes() == (tmp_path / "processes" / file).read_bytes(), file


def test_processes_that_decode_end_with_their_parent_and_one_that_dies_is_one_line(coco, model, tmp_path, capsys,
                                                                                  monkeypatch):
    code = ("import os, signal, torch, types, encode\n"
            "with encode.open_readers(types.SimpleNamespace(device=torch.device('cuda'), workers=2)) as readers:\n"
            "    print(readers.submit(os.getpid).result(), flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    deadline = time.time() + 30
    while Path(f"/proc/{int(process.stdout)}").exists():
        assert time.time() < deadline, "a reader outlives its parent"
        time.sleep(0.05)
    monkeypatch.setattr(encode, "image_preparer", lambda files, processor, args: lambda rows: args.readers.map(
        os._exit, rows))
    opened = encode.open_readers
    monkeypatch.setattr(encode, "open_readers", lambda args: opened(BESIDE_A_GPU))
    assert encode.main([*map(str, coco_args(coco, model, tmp_path)), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "with fewer --workers goes on at the first unfinished shard" in line


def test_a_process_that_is_killed_while_it_sends_is_not_waited_for():
    torn = ("import multiprocessing.connection, os\n"
            "def send_a_part(self, data):\n"
            "    os.write(self.fileno(), data[:9])\n"
            "    os._exit(1)\n"
            "multiprocessing.connection.Connection._send = send_a_part")
    code = ("import torch, types, encode\n"
            "try:\n"
            "    with encode.open_readers(types.SimpleNamespace(device=torch.device('cuda'), workers=2)) as readers:\n"
            f"        futures = [readers.submit(exec, {torn!r}), *(readers.submit(int) for _ in range(50))]\n"
            "        [future.result() for future in futures]\n"
            "except OSError:\n"
            "    print('noticed')")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout == "noticed\n", process.stderr


def test_ctrl_c_at_a_terminal_is_one_line_of_the_process_that_encodes(coco, model, tmp_path):
    code = ("import sys, time, torch, types, encode\n"
            "opened = encode.open_readers\n"
            "encode.open_readers = lambda _: opened(types.SimpleNamespace(device=torch.device('cuda'), workers=2))\n"
            "encode.encode_shard = lambda *_: (print('decoded', flush=True), time.sleep(60))\n"
            "sys.exit(encode.main(sys.argv[1:]))")
    argv = [*map(str, coco_args(coco, model, tmp_path)), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "decoded\n" in process.stdout  # reads up to it
    time.sleep(1)  # all have begun
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells all of them
    _, said = process.communicate(timeout=50)  # till the last of them has ended
    assert (process.returncode, said) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")])
@pytest.mark.filterwarnings("ignore:a batch does not fit")
def test_a_batch_that_does_not_fit_into_memory_is_run_in_halves(coco, model, tmp_path, monkeypatch, error):
    sizes, original = [], encode.image_forward

    def small_memory(*args):
        forward = original(*args)

        def limited(items):
            if len(items) > 8:
                raise error
            sizes.append(len(items))
            return forward(items)
        return limited
    run(*coco_args(coco, model, tmp_path / "whole", "--dtype", "float32", "--batch-size", 64))
    monkeypatch.setattr(encode, "image_forward", small_memory)
    with pytest.warns(UserWarning, match="is run in halves; take a smaller --batch-size"):
        run(*coco_args(coco, model, tmp_path / "halves", "--dtype", "float32", "--batch-size", 64))
    assert sizes == [6, 7, 6, 7]
    whole, halves = (torch.load(tmp_path / name / "train2017_image_embeddings.pt", weights_only=True)
                     for name in ("whole", "halves"))
    assert (whole - halves).abs().max() < 1e-5 * whole.abs().max()

    def no_memory(items):
        raise error
    with pytest.raises(type(error)):
        encode.run_batches(no_memory, [torch.zeros(3)] * 4, 4)

    def a_bug(items):
        assert len(items) == 4, "a bug is not run in halves"
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        encode.run_batches(a_bug, [torch.zeros(3)] * 4, 4)


def test_rows_without_a_picture_are_left_out_also_before_the_first_good_one(tmp_path):
    args = SimpleNamespace(dtype="float16", weights="float32", batch_size=4, device=torch.device("cpu"))
    names, done, job = [f"{i}.jpg" for i in range(9)], [], {"model": "m", "family": "m"}

    def encode_them(good):
        def prepare(rows):
            if 4 in rows and not done:
                done.append(1)
                raise KeyboardInterrupt  # stopped with two bad shards behind it
            return [torch.full((3, 2, 2), float(i)) if i in good else "broken" for i in rows]
        return encode.encode_rows(tmp_path / "x.pt", job, names, 2, prepare,
                                  lambda: lambda items: (torch.stack(items)[:, 0, 0],),
                                  lambda outputs, kept: ({"kept": kept}, outputs[0].clone()), args)
    with pytest.raises(KeyboardInterrupt):
        encode_them({5, 6, 8})
    manifest = encode_them({5, 6, 8})
    assert manifest["kept"] == [5, 6, 8]
    assert list(manifest["bad_images"]) == [name for i, name in enumerate(names) if i not in (5, 6, 8)]
    rows = torch.load(tmp_path / "x.pt", weights_only=True)
    assert rows.tolist() == [[5, 5], [6, 6], [8, 8]]
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(common.UserError, match=r"none of the 9 images can be read, the first: .*0\.jpg"):
        encode_them(())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(coco, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 8)
    write = encode.write_rows

    def full(path, start, *rest):
        if start == 15:  # one of 16 pictures cannot be read
            path = "/dev/full"
        write(path, start, *rest)
    monkeypatch.setattr(encode, "write_rows", full)
    assert encode.main([*map(str, coco_args(coco, model, tmp_path)), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left" in line
    assert "the same command goes on" in line
    monkeypatch.setattr(encode, "write_rows", write)
    run(*coco_args(coco, model, tmp_path))
    assert "going on at 16 of 30 rows" in capsys.readouterr().out


def test_too_little_room_is_said_before_a_row_is_written(coco, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = fails(capsys, *coco_args(coco, model, tmp_path))
    assert "30 rows of [16] need 1.92e-06 GB while they are made, 1e-06 GB are free; make room" in line
    assert not list(tmp_path.glob(".*.work/*.bin"))


def test_a_model_too_large_for_memory_is_one_line(coco, model, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(torch.nn.Module, "to", full)
    assert encode.main([*map(str, coco_args(coco, model, tmp_path)), "--device", "cpu"]) == 1
    assert "out of memory (tried to allocate 2 GiB); lower the batch size" in capsys.readouterr().err


def test_features_too_large_for_float16_name_the_remedy(coco, model, tmp_path, capsys, monkeypatch):
    original = encode.image_forward
    monkeypatch.setattr(encode, "image_forward",
                        lambda *args: lambda items: tuple(1e6 * x for x in original(*args)(items)))
    line = fails(capsys, *coco_args(coco, model, tmp_path))
    assert "not finite with --weights float32 --dtype float16; try float32" in line
    run(*coco_args(coco, model, tmp_path / "other", "--dtype", "bfloat16"))


# --------------------------------------------------------------------------------------------------------------- mmimdb

def test_views_are_functions_of_id_and_view():
    picture = draw_picture(np.random.RandomState(0), (60, 90))

    def view(item, number):
        return np.asarray(encode.augment_image(picture, (32, 24), encode.view_draws(item, number, "image")))
    assert view("a", 1).shape == (24, 32, 3)
    assert (view("a", 1) == view("a", 1)).all()
    assert all((view("a", 1) != other).any() for other in (view("a", 2), view("b", 1)))
    plot = " ".join(f"w{i}" for i in range(40))
    masked = encode.mask_words(plot, "<mask>", encode.view_draws("a", 1, "text")).split()
    assert masked.count("<mask>") == 6
    assert all(new in (old, "<mask>") for old, new in zip(plot.split(), masked, strict=True))
    dropped = encode.mask_words(plot, None, encode.view_draws("a", 1, "text")).split()
    assert dropped == [word for word in masked if word != "<mask>"]
    assert encode.mask_words("", "<mask>", encode.view_draws("a", 1, "text")) == ""


@pytest.mark.parametrize("backbone", ["clip", "blip2"])
def test_mmimdb_latents_are_rows_of_views_that_the_workspace_trains_on(films, model, tmp_path, backbone):
    split = json.loads((films / "split.json").read_text())
    bad = split["train"].pop(0)  # its poster is broken: nan rows, which the experiment accepts only outside the split
    (films / "split.json").write_text(json.dumps(split))
    (films / "dataset" / f"{bad}.jpeg").write_text("gone")
    run("mmimdb", "--data", films, "--backbone", backbone, "--model", model(backbone), "--views", 3)
    ids = (films / "labels/ids_all.txt").read_text().split()
    source, tokenizer, how = encode.open_texts(model(backbone), ARGS)
    processor, args, size = encode.open_images(model(backbone), ARGS)[1], ARGS, (32, 32)
    for modality in ("image", "text"):
        path = films / "latents" / f"mm_imdb1_globals_aug3_{backbone}_{modality}.npy"
        rows, manifest = (np.load(path, mmap_mode="r"),
                          json.loads(path.with_name(f"{path.stem}_manifest.json").read_text()))
        assert rows.dtype == np.float16
        assert rows.shape == (manifest["total_rows"], manifest["dims"]) == (
            270, {"imageblip2": 16, "textblip2": 20}.get(modality + backbone, 12))
        assert (manifest["original_rows"], manifest["views_per_sample"], manifest["ids"]) == (90, 3, ids)
        broken = [3 * ids.index(bad) + view for view in range(3)] if modality == "image" else []
        assert np.flatnonzero(np.isnan(rows).any(1)).tolist() == sorted(broken)
        assert list(manifest["bad_images"]) == ([bad] if broken else [])
        good = np.delete(rows, broken, axis=0).astype(np.float64)
        statistics = np.load(path.with_name(f"{path.stem}.stats.npz"))
        np.testing.assert_allclose(statistics["mu"], good.mean(0), atol=1e-5)
        np.testing.assert_allclose(statistics["sigma"], good.std(0), rtol=1e-4)
        for film, view in ((5, 0), (5, 2), (80, 1)):  # any row can be made again from its id and view
            item = ids[film]
            if modality == "image":
                picture = encode.read_image(films / "dataset" / f"{item}.jpeg")
                picture = (encode.augment_image(picture, size, encode.view_draws(item, view, "image"))
                           if view else picture)
                (row,) = encode.image_forward(source, args)([encode.pixels_of(picture, processor)])
            else:
                plot = json.loads((films / "dataset" / f"{item}.json").read_text())["plot"][0]
                plot = (encode.mask_words(plot, tokenizer.mask_token, encode.view_draws(item, view, "text"))
                        if view else plot)
                (row,) = encode.text_forward(source, tokenizer, args, how)(
                    encode.tokenize(source, tokenizer, [plot], args, how))
            np.testing.assert_allclose(rows[3 * film + view].astype(np.float32), row[0].numpy(), rtol=2e-3, atol=2e-3)
    assert exp_gw_mmimdb.main([str(ROOT / f"configs/gw_{backbone}_shared.yaml"), f"data.dir={films}",
                               "data.views=3", "device=cpu", f"output_dir={tmp_path / 'run'}", "training.steps=6",
                               "training.eval_every=3", "training.batch_size=16", "--stage", "train"]) == 0
    assert (tmp_path / "run/best_model.pt").exists()


def test_a_view_that_fails_alone_is_a_row_of_nan(films, model, monkeypatch):
    augment, ids = encode.augment_image, (films / "labels/ids_all.txt").read_text().split()
    calls = []
    monkeypatch.setattr(encode, "augment_image",
                        lambda *args: "too narrow" if calls.append(1) or len(calls) == 3 else augment(*args))
    assert encode.main(["mmimdb", "--data", str(films), "--model", model("clip"), "--views", "2", "--limit", "6",
                        "--device", "cpu", "--workers", "1"]) == 0
    rows = np.load(films / "latents/mm_imdb1_globals_aug2_clip_image.npy")
    assert np.flatnonzero(np.isnan(rows).any(1)).tolist() == [5]
    assert (list(common.read_json(films / "latents/mm_imdb1_globals_aug2_clip_image_manifest.json")["bad_images"])
            == [ids[2]])


def test_labels_in_a_folder_of_their_own_fix_the_order_of_films(films, model, tmp_path, monkeypatch, capsys):
    ids = (films / "labels/ids_all.txt").read_text().split()
    labels = tmp_path / "labels"
    (films / "labels").rename(labels)
    options = ["--data", films, "--model", model("clip"), "--views", 1]
    run("mmimdb", *options)  # sorted, as nothing says otherwise
    (labels / "ids_all.txt").write_text("\n".join(ids[::-1]))
    monkeypatch.setenv("IMDB1_LABELS_DIR_23", str(labels))
    train = [str(ROOT / "configs/gw_clip_shared.yaml"), f"data.dir={films}", "data.views=1", "device=cpu",
             f"output_dir={tmp_path / 'run'}"]
    assert exp_gw_mmimdb.main([*train, "--stage", "train"]) == 2
    assert "not those of ids_all.txt in the same order" in capsys.readouterr().err
    assert "was made otherwise" in fails(capsys, "mmimdb", *options)
    run("mmimdb", *options, "--out", tmp_path / "latents")
    assert common.read_json(tmp_path / "latents/mm_imdb1_globals_aug1_clip_image_manifest.json")["ids"] == ids[::-1]
    assert exp_gw_mmimdb.load_latents(tmp_path / "latents/mm_imdb1_globals_aug1_clip_text.npy", ids[::-1])[1] == 1


# ------------------------------------------------------------------------------------------------------------ alignment

def test_alignment_features_by_level_load_and_are_compared(coco, model, tmp_path):
    names = [f"{i:012}.jpg" for i in range(29)]  # three of them broken or missing
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    out = tmp_path / "prh"
    captions = [{f"Index - {i}": {"sentences": {f"Caption {u} - {u}%": f"{tiny_models.TEXTS[i % 3]} {u} {i}"
                                                for u in range(0, 101, 10)}}}
                for i in range(29)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    run("alignment", "--captions", tmp_path / "captions.json", "--images", coco / "images",
        "--image-names", tmp_path / "names.txt", "--out", out, "--language", model("gpt2"), model("llama"),
        model("bloom"), "--vision", model("vit"), model("clip"), "--dtype", "float32", "--max-length", "26")
    levels = exp_alignment_corr.read_captions(tmp_path / "captions.json")
    assert sorted(levels) == list(range(0, 101, 10))
    ids = [f"Index - {i}" for i in range(29) if i not in (3, 17, 20)]
    vision = torch.load(out / "vision/clip.pt", weights_only=True)
    assert (vision["ids"], vision["pool"], list(vision["feats"].shape)) == (ids, "cls", [26, 2, 16])
    assert vision["files"] == [name for i, name in enumerate(names) if i not in (3, 17, 20)]
    source, tokenizer = opened(model("gpt2"))
    read = SimpleNamespace(**{**vars(ARGS), "max_length": 26})
    forward = encode.language_forward(source, tokenizer, read)
    for u in (0, 60):
        content = torch.load(out / f"gpt_u={u}_features/gpt2.pt", weights_only=True)
        texts = [levels[u][i] for i in range(29) if i not in (3, 17, 20)]
        features, nats = forward(encode.tokenize(source, tokenizer, texts, read, "start"))
        assert 0 < nats.isnan().sum() < len(texts)  # some are cut
        torch.testing.assert_close(content["feats"], features, rtol=1e-4, atol=1e-5)
        assert (content["ids"], content["pool"], content["family"]) == (ids, "avg", "gpt2")
        assert (content["n_cut"], content["n_left_out"]) == (int(nats.isnan().sum()), 3)
        fits = ~nats.isnan()
        n_bytes = sum(len(text.encode()) for text, fit in zip(texts, fits, strict=True) if fit)
        assert content["bpb"] == pytest.approx(float(nats[fits].sum()) / math.log(2) / n_bytes, rel=1e-5)
    assert exp_alignment_corr.main([str(ROOT / "configs/alignment_prh.yaml"),
                                    f"features_dir={out}/gpt_u={{u}}_features", f"vision_dir={out}/vision",
                                    f"captions_file={tmp_path}/captions.json", f"output_dir={tmp_path / 'run'}",
                                    "stages=[uniqueness]", "device=cpu", "alignment.n_permutations=19",
                                    "alignment.metrics=[mutual_knn]"]) == 0
    saved = common.load_checkpoint(tmp_path / "run/alignment/alignment_u=60.pt")
    assert len(list((tmp_path / "run/alignment").glob("alignment_u=*.pt"))) == 11
    assert len(saved["rows"]) == 3 * 2
    assert {row["bpb"] for row in saved["rows"] if row["language"] == "gpt2"} == {content["bpb"]}


def test_photos_go_with_captions_by_their_sorted_names(tmp_path, monkeypatch):
    names = ["b.jpg", "a.PNG", "c.webp"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "captions.json").write_text(json.dumps([{f"item {i}": {"original": "a", "sentences": {}}}
                                                        for i in range(3)]))
    listed = [tmp_path / name for name in [*names, "notes.txt"]]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))  # in the order of the disk
    args = SimpleNamespace(mmimdb=None, captions=tmp_path / "captions.json", vision=["x"], images=tmp_path,
                           image_names=None, limit=None)
    assert encode.read_items(args) == (["item 0", "item 1", "item 2"], {"gpt_u=0_features": ["a"] * 3},
                                       [tmp_path / name for name in sorted(names)])


def test_layers_of_a_text_encoder_have_no_bits_per_byte(films, model, tmp_path, capsys):
    film = films / "dataset" / f"{(films / 'labels/ids_all.txt').read_text().split()[2]}.json"
    # the first one that says something
    film.write_text(json.dumps(common.read_json(film) | {"plot": ["Short.", "A longer plot.", "Another one."]}))
    run("alignment", "--mmimdb", films, "--language", model("bert"), "--out", tmp_path, "--limit", 5,
        "--dtype", "float32")
    assert "a bert is no causal language model; its file has no bits per byte" in capsys.readouterr().out
    content = torch.load(tmp_path / "language/bert.pt", weights_only=True)
    assert "bpb" not in content
    source, tokenizer = opened(model("bert"))
    (item,) = encode.tokenize(source, tokenizer, ["A longer plot."], ARGS, "mean")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(model("bert")).eval()(
            torch.tensor([item]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(content["feats"][2], torch.stack([h[0].mean(0) for h in hidden]), rtol=1e-4, atol=1e-5)


def test_alignment_of_films_trains_its_probes(films, model, tmp_path):
    run("alignment", "--mmimdb", films, "--language", model("llama"), model("bloom"), "--vision", model("dinov2"),
        "--out", films / "features")
    ids = (films / "labels/ids_all.txt").read_text().split()
    assert torch.load(films / "features/language/llama.pt", weights_only=True)["ids"] == ids
    cfg = common.load_config(exp_alignment_corr.Config, ROOT / "configs/alignment_mmimdb.yaml", [
        f"mmimdb.dir={films}", f"mmimdb.language_dir={films / 'features/language'}",
        f"mmimdb.vision_dir={films / 'features/vision'}", "device=cpu", "alignment.ladder=[]",
        f"output_dir={tmp_path / 'run'}"])
    data = exp_alignment_corr.load_data(cfg)
    network = exp_alignment_corr.build_model(cfg, data)
    losses = exp_alignment_corr.train_step(network, exp_alignment_corr.make_batch(data, data.splits["train"][:16]),
                                           exp_alignment_corr.build_optimizer(cfg, network))
    assert all(math.isfinite(float(value)) for value in losses.values())


# --------------------------------------------------------------------------------------------------- flickr8k, messages

def test_flickr8k_features_by_file_name(coco, model, tmp_path):
    (tmp_path / "Flicker8k_Dataset").symlink_to(coco / "images")
    run("flickr8k", "--data", tmp_path, "--model", model("siglip"))
    content = torch.load(tmp_path / "image_features.pt", weights_only=True)
    names = [f"{i:012}.jpg" for i in range(30) if i not in (3, 17, 20, 29)]
    assert (content["ids"], list(content["feats"].shape), content["feats"].dtype) == (names, [26, 16], torch.float16)
    assert len(content["unreadable"]) == len(list((coco / "images").glob("*.jpg"))) - 26


@pytest.mark.parametrize("speech", ["whisper", "wav2vec2"])
def test_flickr8k_features_of_all_modalities_and_corruptions(model, tmp_path, speech):
    """What is written is what exp_flickr_ttt.py reads; a recording alone and in company is encoded alike,
    by its own frames."""
    import demo_data
    import exp_flickr_ttt as exp
    root = demo_data.write_flickr8k(tmp_path / "tree", n_photos=(6, 4, 4))
    args = ("flickr8k", "--data", root, "--model", model("convnext"), "--text-model", model("bert"),
            "--speech-model", model(speech), "--out", tmp_path, "--dtype", "float32")
    run(*args, "--corruptions")
    cfg = exp.Config(device="cpu", data=exp.DataConfig(dir=root, features_dir=str(tmp_path)))
    for m in exp.MODALITIES:
        setattr(cfg.model, f"{m}_encoder", "cached")
    data = exp.load_data(cfg)
    assert {m: list(x.shape[1:]) for m, x in data.features.items()} == {"text": [16], "image": [16], "audio": [3, 16]}
    for m in exp.MODALITIES:
        d = exp.directions(data, "test")[{"text": 0, "image": 1, "audio": 2}[m]]
        clean = exp.corrupted_items(data, m, d.items, *exp.CLEAN)
        conditions = [(kind, amount) for kind, amounts in exp.CORRUPTIONS[m].items() for amount in amounts]
        assert all((exp.corrupted_items(data, m, d.items, *c) - clean).abs().max() > 1e-4 for c in conditions), m
        assert exp.has_corrupted(data, m, conditions)
    source, processor = encode.open_images(model("convnext"), ARGS)
    for kind, amount in (("defocus", 10), ("noise", 0.38)):
        found = torch.load(tmp_path / f"image_features,{kind}={amount}.pt", weights_only=True)
        name = found["ids"][1]
        with Image.open(Path(root, "Flickr8k_Dataset", name)) as photo:  # 120 x 90; the model sees the shortest at 32
            pixels = np.array(photo.resize((43, 32), Image.Resampling.BICUBIC))
        pixels = exp.corrupt_photo(torch.from_numpy(pixels).permute(2, 0, 1), kind, amount, exp.item_draws(name))
        pixels = encode.pixels_of(Image.fromarray(pixels.permute(1, 2, 0).numpy()), processor)
        torch.testing.assert_close(found["feats"][1], encode.image_forward(source, ARGS)([pixels])[0][0])
    noisy = torch.load(tmp_path / "text_features,drop=0.2.pt", weights_only=True)
    texts = [exp.corrupt_text(exp.read_captions(Path(root))[0][photo][int(k)], "drop", 0.2, exp.item_draws(name))
             for name in noisy["ids"][:3] for photo, _, k in [name.rpartition("#")]]
    source, tokenizer, how = encode.open_texts(model("bert"), ARGS)
    (rows,) = encode.text_forward(source, tokenizer, ARGS, how)(
        encode.tokenize(source, tokenizer, texts, ARGS, how))
    torch.testing.assert_close(noisy["feats"][:3], rows, rtol=1e-4, atol=1e-5)
    wavs = sorted(Path(root, "flickr_audio/wavs").iterdir())
    found = torch.load(tmp_path / "audio_features.pt", weights_only=True)
    forward = encode.speech_forward(encode.find_model(model(speech), "speech"), ARGS)
    alone = forward([exp.read_wav(wavs[1].read_bytes()).numpy()])[0][0]
    assert (found["feats"][found["ids"].index(wavs[1].name)] - alone).abs().max() < 1e-4
    noisy, noise = torch.load(tmp_path / "audio_features,white_noise=0.pt", weights_only=True), ("white noise", 0)
    name = noisy["ids"][1]
    wave = exp.read_wav(Path(root, "flickr_audio/wavs", name).read_bytes())
    alone = forward([exp.corrupt_speech(wave, *noise, exp.item_draws(name)).numpy()])[0][0]
    assert (noisy["feats"][1] - alone).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------- pixmo

def png(draws, size=(48, 40)):
    file = io.BytesIO()
    draw_picture(draws, size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Two parquet files of row groups of 4: 11 + 6 rows, two without a picture that can be read,
    one without a caption."""
    pyarrow, pq, root = (pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet"),
                         tmp_path_factory.mktemp("pixmo"))
    draws = np.random.RandomState(0)
    for name, n, first in (("a", 11, 0), ("b", 6, 100)):
        pictures = [{"bytes": png(draws), "path": f"{i}.png"} for i in range(n)]
        captions = [[f"picture {first + i}", "x" * (i + 1)] for i in range(n)]
        if name == "a":
            pictures[2]["bytes"], pictures[5], captions[7] = b"<html>404", None, [" ", None]
        pq.write_table(pyarrow.table({"image": pictures, "captions": captions,
                                      "image_id": [first + i for i in range(n)]}),
                       root / f"{name}.parquet", row_group_size=4)
    return root


def pixmo_args(model, parquet, out, *more):
    return ["pixmo", "--data", parquet, "--image-model", model("convnext"), "--text-model", model("bert"),
            "--out", out, *more]


def test_pixmo_features_are_matched_by_id(model, parquet, tmp_path, capsys, monkeypatch):
    run(*pixmo_args(model, parquet, tmp_path, "--dtype", "float32"))
    image, text = (torch.load(tmp_path / f"{part}_features.pt", weights_only=True) for part in ("image", "text"))
    ids = [i for i in [*range(11), *range(100, 106)] if i not in (2, 5)]
    assert (image["ids"], image["unreadable"], image["model"]) == (ids, [2, 5], "convnext")
    assert "cannot be read: row 5, id 5 (ValueError: no image bytes)" in capsys.readouterr().out
    captioned = [i for i in [*range(11), *range(100, 106)] if i != 7]
    assert text["ids"] == [i for i in captioned for _ in range(2)]
    assert image["fingerprint"] != text["fingerprint"]
    groups = [(parquet / f"{name}.parquet", group, n, "image")
              for name, sizes in (("a", (4, 4, 3)), ("b", (4, 2))) for group, n in enumerate(sizes)]
    rows = list(encode.read_images(groups, 0, encode.SHARD))
    assert [list(encode.read_images(groups, first, encode.SHARD)) for first in (3, 9, 11, 16)] == [
        rows[n:] for n in (3, 9, 11, 16)]
    monkeypatch.setattr(encode, "SHARD", 2)
    assert list(encode.read_images(groups, 3, 8)) == [*rows[3:5], *rows[11:13]]  # of four processes the first's
    source, processor = encode.open_images(model("convnext"), ARGS)
    (row,) = encode.image_forward(source, ARGS)([encode.pixels_of(encode.read_image(rows[12]), processor)])
    torch.testing.assert_close(image["feats"][image["ids"].index(101)], row[0], rtol=1e-4, atol=1e-5)
    source, tokenizer, how = encode.open_texts(model("bert"), ARGS)
    (row,) = encode.text_forward(source, tokenizer, ARGS, how)(
        encode.tokenize(source, tokenizer, ["picture 101"], ARGS, how))
    assert how == "mean"
    torch.testing.assert_close(text["feats"][text["ids"].index(101)], row[0], rtol=1e-4, atol=1e-5)


def test_pixmo_rows_without_an_id_are_told_apart_by_file_and_row(model, parquet, tmp_path, capsys):
    import pyarrow.parquet as pq
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    for name in "ab":
        table = pq.read_table(parquet / f"{name}.parquet").drop_columns("image_id")
        pq.write_table(table, data / f"{name}.parquet", row_group_size=4)
    run(*pixmo_args(model, data, tmp_path))
    cfg = common.load_config(exp_pixmo_mrl.Config, None, [f"dataset.cache_dir={tmp_path / 'cache'}"])
    split = exp_pixmo_mrl.read_split(str(data), "dataset.train_parquet", cfg, 8, map)
    ids = torch.load(tmp_path / "image_features.pt", weights_only=True)["ids"]
    assert ids == [*(f"a.parquet:{i}" for i in range(11) if i not in (2, 5)), *(f"b.parquet:{i}" for i in range(6))]
    assert split.ids.tolist() == [i for i in ids if i != "a.parquet:7"]  # which has no caption
    shutil.copy(data / "b.parquet", data / "more")
    assert "another file has its name" in fails(capsys, *pixmo_args(model, data, tmp_path / "again"))


def test_pixmo_tokens_have_a_mask_and_resume_to_the_bit(model, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 3)
    args = ["--tokens", "--max-length", "12", "--batch-size", "2"]
    run(*pixmo_args(model, parquet, tmp_path / "whole", *args))
    write = encode.write_rows
    for part, dies_at in (("image", 4), ("text", 12)):
        def stop(path, start, block, part=part, dies_at=dies_at):
            if f".{part}_features.pt.work" in str(path) and start == dies_at:
                raise KeyboardInterrupt
            write(path, start, block)
        monkeypatch.setattr(encode, "write_rows", stop)
        assert encode.main([*map(str, pixmo_args(model, parquet, tmp_path / "cut", *args)), "--device", "cpu"]) == 130
    monkeypatch.setattr(encode, "write_rows", write)
    run(*pixmo_args(model, parquet, tmp_path / "cut", *args))
    image, text = (torch.load(tmp_path / "cut" / f"{part}_features.pt", weights_only=True, mmap=True)
                   for part in ("image", "text"))
    for part in ("image", "text"):
        assert ((tmp_path / "cut" / f"{part}_features.pt").read_bytes()
                == (tmp_path / "whole" / f"{part}_features.pt").read_bytes())
    assert list(image["feats"].shape) == [15, 1, 16]  # the places of a picture of 32 x 32
    assert list(text["feats"].shape) == [32, 12, 16]
    assert image["feats"].dtype == text["feats"].dtype == torch.float16
    assert text["mask"].dtype == torch.bool
    assert text["n_cut"] == 1
    source, tokenizer, how = encode.open_texts(model("bert"), ARGS)
    read = SimpleNamespace(**{**vars(ARGS), "max_length": 12})
    plain = transformers.AutoModel.from_pretrained(model("bert")).eval()
    for row, caption in ((0, "picture 0"), (1, "x"), (19, "x" * 11)):
        (item,) = encode.tokenize(source, tokenizer, [caption], read, how)
        with torch.no_grad():
            hidden = plain(input_ids=torch.tensor([item])).last_hidden_state[0]
        assert text["mask"][row].sum() == len(item)
        assert text["mask"][row, :len(item)].all()
        torch.testing.assert_close(text["feats"][row, :len(item)].float(), hidden, rtol=2e-3, atol=2e-3)
        assert (text["feats"][row, len(item):] == 0).all()


@pytest.mark.parametrize(("kind", "n_tokens"), [("clip", 17), ("siglip", 16), ("vit", 17), ("convnext", 1)])
def test_tokens_are_those_of_the_vision_tower(model, kind, n_tokens):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (found,) = encode.image_forward(encode.find_model(model(kind), "images"), ARGS, tokens=True)(list(pixels.numpy()))
    assert list(found.shape) == [2, n_tokens, 16]
    plain = transformers.AutoModel.from_pretrained(model(kind)).eval()
    with torch.no_grad():
        hidden = getattr(plain, "vision_model", plain)(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, hidden.flatten(2).mT if kind == "convnext" else hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "mistral", "blip2"])
def test_text_tokens_are_those_of_the_text_tower(model, kind):
    source, tokenizer, how = encode.open_texts(model(kind), ARGS)
    items = encode.tokenize(source, tokenizer, CAPTIONS, ARGS, how)
    longest = max(map(len, items))
    hidden, mask = encode.text_forward(source, tokenizer, ARGS, how, longest)(items)
    assert list(hidden.shape[:2]) == list(mask.shape) == [len(items), longest]
    assert mask.sum(1).tolist() == [len(item) for item in items]
    assert (hidden[mask == 0] == 0).all()
    (alone, _) = encode.text_forward(source, tokenizer, ARGS, how, longest)(items[:1])
    torch.testing.assert_close(alone[0], hidden[0], rtol=1e-4, atol=1e-5)
    if kind == "mistral":  # its pooled row is the last of them
        (pooled,) = encode.text_forward(source, tokenizer, ARGS, how)(items)
        torch.testing.assert_close(pooled[0], hidden[0, len(items[0]) - 1], rtol=1e-4, atol=1e-5)


def test_a_parquet_file_without_pictures_or_captions_is_one_line(model, tmp_path, capsys):
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.table({"image_url": ["http://x"], "caption": ["a"]}), tmp_path / "urls.parquet")
    pq.write_table(pyarrow.table({"jpg": [b"x"], "label": [1]}), tmp_path / "labels.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    for name, words in (("urls", "urls.parquet: holds no image bytes"), ("junk", "junk.parquet: "),
                        ("none", "no parquet files"), ("labels", "labels.parquet: no captions")):
        assert words in fails(capsys, *pixmo_args(model, tmp_path / f"{name}.parquet", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


REAL, ENCODERS = ROOT.parent / "shared/data/pixmo", Path(os.environ.get("ENCODERS", ROOT.parent / "encoders"))


@pytest.mark.skipif(not (REAL.is_dir() and (ENCODERS / "minilm").is_dir()),
                    reason="needs the photos, and real encoders in $ENCODERS")
def test_pixmo_rows_of_real_encoders_agree_with_the_features_of_the_data(tmp_path):
    run("pixmo", "--data", REAL / "pixmo_val.parquet", "--image-model", ENCODERS / "efficientnet-lite2",
        "--text-model", ENCODERS / "minilm", "--caption-column", "captions", "--limit", 24, "--out", tmp_path)
    for part, n in (("image", 1), ("text", 5)):
        content, expected = (torch.load(folder / f"{part}_features.pt", weights_only=True)
                             for folder in (tmp_path, REAL / "features"))
        first = expected["ids"].index(content["ids"][0])
        assert content["ids"] == expected["ids"][first:first + 24 * n]
        cosines = F.cosine_similarity(content["feats"].float(), expected["feats"][first:first + 24 * n].float(), dim=1)
        assert cosines.min() > 0.99


# -------------------------------------------------------------------------------------------- what is refused, and when

def test_models_that_do_not_fit_are_refused_before_anything_is_encoded(coco, model, films, parquet, tmp_path,
                                                                       capsys, monkeypatch):
    loaded = []
    load_model = encode.load_model
    monkeypatch.setattr(encode, "load_model",
                        lambda source, *args: (loaded.append(source.stem), load_model(source, *args))[1])
    images = ["--images", coco / "images", "--captions", coco / "captions.json", "--out", tmp_path / "out"]
    whisper, bert, convnext = model("whisper"), model("bert"), model("convnext")
    no_eos = tmp_path / "no_eos"
    shutil.copytree(bert, no_eos)
    tiny_models.save_tokenizer(no_eos, eos=None, wrap="<s> $A")
    assert "whisper takes no texts; give one that does: sentence-transformers" in fails(
        capsys, "coco", *images, "--image-model", model("vit"), "--text-model", whisper)
    assert "no EOS token to pool at; use --text-pool mean" in fails(
        capsys, "coco", *images, "--image-model", model("vit"), "--text-model", no_eos, "--text-pool", "last")
    assert "a vit takes no texts" in fails(capsys, "coco", *images, "--image-model", model("siglip"),
                                           "--text-model", model("vit"))
    assert "a bert takes no images; give one that does: facebook/dinov2-base" in fails(
        capsys, "coco", *images, "--image-model", bert, "--text-model", bert)
    assert "--native-text" in fails(capsys, "coco", *images, "--image-model", model("vit"), "--text-model", bert,
                                    "--native-text")
    assert "a bert takes no speech; give one that does: openai/whisper-base.en" in fails(
        capsys, "flickr8k", "--data", demo_data.write_flickr8k(tmp_path / "tree", n_photos=(3, 2, 2)),
        "--model", convnext, "--speech-model", bert)
    assert "whisper takes no texts" in fails(capsys, *pixmo_args(model, parquet, tmp_path / "out"),
                                             "--text-model", whisper)
    language = ["alignment", "--mmimdb", films, "--out", tmp_path / "out", "--language"]
    assert "a whisper takes no texts" in fails(capsys, *language, whisper)
    assert "a clip is no language model; give one, such as gpt2" in fails(capsys, *language, model("clip"))
    assert loaded == []
    assert "convnext has no list of transformer blocks of one width" in fails(
        capsys, *language, model("gpt2"), "--vision", convnext)
    assert "a ijepa has no CLS token; use --vision-pool avg" in fails(
        capsys, *language, model("gpt2"), "--vision", model("vit"), model("ijepa"))
    assert "gpt2" not in loaded  # pictures are tried before hours of texts
    assert not (tmp_path / "out").exists()


def test_a_cnn_and_a_sentence_encoder_of_ones_own(coco, films, model, tmp_path, monkeypatch):
    """coco and mmimdb with models that know nothing of each other; texts are pooled by what the model is."""
    run("coco", "--images", coco / "images", "--captions", coco / "captions.json", "--image-model", model("convnext"),
        "--text-model", model("bert"), "--out", tmp_path)
    assert list(torch.load(tmp_path / "train2017_image_embeddings.pt", weights_only=True).shape) == [26, 16]
    assert common.read_json(tmp_path / "train2017_text_embeddings_manifest.json")["job"]["pool"] == "mean"
    run("mmimdb", "--data", films, "--backbone", "own", "--image-model", model("convnext"),
        "--text-model", model("bert"), "--views", 2, "--limit", 5)
    rows = np.load(films / "latents/mm_imdb1_globals_aug2_own_text.npy")
    assert rows.shape == (10, 16)
    ids = common.read_json(films / "latents/mm_imdb1_globals_aug2_own_text_manifest.json")["ids"]
    source, tokenizer, _ = encode.open_texts(model("bert"), ARGS)
    (plot,) = encode.film_plots(films, ids[3:4])
    masked = encode.mask_words(" ".join(plot), tokenizer.mask_token, encode.view_draws(ids[3], 1, "text"))
    (expected,) = encode.text_forward(source, tokenizer, ARGS, "mean")(
        encode.tokenize(source, tokenizer, [masked], ARGS, "mean"))
    np.testing.assert_allclose(rows[7].astype(np.float32), expected[0].numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_native_texts_are_those_of_the_image_models_own_tower(coco, model, tmp_path, kind):
    run("coco", "--images", coco / "images", "--captions", coco / "captions.json", "--image-model", model(kind),
        "--text-model", model("bert"), "--native-text", "--out", tmp_path, "--dtype", "float32")
    images, native = (torch.load(tmp_path / f"train2017_{part}_embeddings.pt", weights_only=True)
                      for part in ("image", "native_text"))
    metadata = common.read_json(tmp_path / "train2017_metadata.json")
    assert native.shape == (len(metadata["captions"]), images.shape[1])
    assert (metadata["n_cut_native"]
            == common.read_json(tmp_path / "train2017_native_text_embeddings_manifest.json")["n_cut"])
    source, tokenizer, how = encode.open_texts(model(kind), ARGS)
    (row,) = encode.text_forward(source, tokenizer, ARGS, how)(
        encode.tokenize(source, tokenizer, [metadata["captions"][9]], ARGS, how))
    torch.testing.assert_close(native[9], row[0], rtol=1e-4, atol=1e-5)
    assert exp_coco_heads.load_embeddings(tmp_path, "train2017", torch.device("cpu"))[-1].shape == native.shape


def test_code_of_a_model_runs_only_when_it_is_asked_for(model, tmp_path, capsys):
    folder = tmp_path / "own"
    shutil.copytree(model("bert"), folder)
    config = common.read_json(folder / "config.json")
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("from transformers import BertConfig, BertModel\n\n\n"
                                   "class OwnConfig(BertConfig):\n    model_type = 'own'\n\n\n"
                                   "class OwnModel(BertModel):\n    config_class = OwnConfig\n")
    (tmp_path / "Images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "Images/a.jpg")
    (tmp_path / "Flickr8k.token.txt").write_text("".join(f"a.jpg#{k}\tA dog {k}\n" for k in range(5)))
    args = ["flickr8k", "--data", tmp_path, "--model", model("convnext"), "--text-model", folder,
            "--out", tmp_path / "out"]
    assert "--trust-remote-code runs it" in fails(capsys, *args)
    run(*args, "--trust-remote-code")
    assert torch.load(tmp_path / "out/text_features.pt", weights_only=True)["feats"].shape == (5, 16)


@pytest.mark.parametrize("package", ["accelerate", "timm"])
def test_missing_packages_are_named(coco, model, tmp_path, capsys, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    timm = tmp_path / "timm_vit"
    timm.mkdir()
    (timm / "config.json").write_text(
        '{"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "num_classes": 0}')
    (timm / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    args = ["--device-map", "auto"] if package == "accelerate" else ["--image-model", timm]
    assert f"pip install {package}" in fails(capsys, *coco_args(coco, model, tmp_path / "out"), *args)


def test_timm_layers_and_pooling_are_timms_own(tmp_path):
    timm = pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_classes=0, do_pooling=True)
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path)
    source, pixels = (encode.find_model(str(tmp_path), "images"),
                      torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    network = encode.load_model(source, ARGS).timm_model
    assert isinstance(network, timm.models.VisionTransformer)
    with torch.no_grad():
        layers = network.forward_intermediates(pixels, return_prefix_tokens=True, norm=False, output_fmt="NLC",
                                               intermediates_only=True)
        pooled = network(pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "pixels_of", lambda image, processor: pixels[0].numpy())
        (found,) = encode.vision_forward(source, None, ARGS)(list(pixels.numpy()))
    assert torch.equal(found, torch.stack([prefix[:, 0] for _, prefix in layers], dim=1))
    assert torch.equal(encode.image_forward(source, ARGS)(list(pixels.numpy()))[0], pooled)


def test_a_model_spread_by_accelerate_gives_the_same_bits(model):
    pytest.importorskip("accelerate")
    source, tokenizer = opened(model("gpt2"))
    items = encode.tokenize(source, tokenizer, CAPTIONS, ARGS, "start")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where accelerate puts it
    plain, spread = (encode.language_forward(
        source, tokenizer, SimpleNamespace(**{**vars(ARGS), "device": device, "device_map": m}))(items)
        for m in (None, "auto"))
    assert all(torch.equal(a, b) for a, b in zip(plain, spread, strict=True))


@pytest.mark.parametrize(("names", "family"), [
    (("bigscience/bloomz-560m", "bigscience/bloomz-7b1"), "bloomz"), (("openlm-research/open_llama_3b",), "open_llama"),
    (("facebook/vit-mae-base", "facebook/vit-mae-large"), "vit_mae"),
    (("google/vit-base-patch16-224-in21k",), "vit_in21k"),
    (("facebook/dinov2-small", "facebook/dinov2-giant"), "dinov2"), (("gpt2", "openai-community/gpt2"), "gpt2"),
    (("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"), "CLIP_ViT_laion2B"),
    (("timm/vit_base_patch16_clip_224.laion2b_ft_in12k", "timm/vit_large_patch14_clip_224.laion2b_ft_in12k"),
     "vit_clip_laion2b_ft_in12k")])
def test_models_of_one_family_differ_in_size_alone(names, family):
    assert {encode.Source(name, name, None, "", None).family for name in names} == {family}


def test_user_mistakes_are_one_line(coco, model, films, tmp_path, capsys):
    def coco_with(*more):
        return fails(capsys, *coco_args(coco, model, tmp_path / "out"), *more)
    (tmp_path / "bad.json").write_text('{"annotations": [{"id": 1}], "images": []}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "config_only").mkdir()
    (tmp_path / "config_only/config.json").write_text('{"model_type": "siglip"}')
    assert "no such folder" in coco_with("--images", tmp_path / "none")
    assert "bad.json: expected COCO captions" in coco_with("--captions", tmp_path / "bad.json")
    assert "give a folder of a saved model" in coco_with("--text-model", tmp_path / "none")
    assert "AutoImageProcessor cannot be loaded" in coco_with("--image-model", tmp_path / "config_only")
    assert "none of the 29 images" in coco_with("--images", tmp_path / "empty", "--limit", 29)
    assert "not available" in coco_with("--device", "cuda:99")
    assert "no such folder" in fails(capsys, "mmimdb", "--data", tmp_path / "none", "--model", model("clip"))
    assert "no bfloat16" in fails(capsys, "mmimdb", "--data", films, "--model", model("clip"), "--dtype", "bfloat16")
    assert "name models" in fails(capsys, "alignment", "--captions", tmp_path / "bad.json")
    assert "expected [{name: {sentences" in fails(capsys, "alignment", "--captions", tmp_path / "bad.json",
                                           "--language", model("gpt2"))
    (tmp_path / "two.json").write_text(json.dumps([{name: {"original": f"a {name}", "sentences": {}}}
                                                   for name in ("dog", "cat")]))
    assert "29 photos for 2 captions" in fails(capsys, "alignment", "--captions", tmp_path / "two.json",
                                               "--images", coco / "images", "--vision", model("vit"),
                                               "--out", tmp_path / "prh")
    (tmp_path / "names.txt").write_text("000000000000.jpg\n000000000001.jpg")
    line = fails(capsys, "alignment", "--captions", tmp_path / "two.json", "--images", coco / "images", "--image-names",
                 tmp_path / "names.txt", "--vision", model("siglip"), "--out", tmp_path / "prh")
    assert "--vision-pool avg" in line
    assert "a mistral takes no images; give one that does" in fails(
        capsys, "mmimdb", "--data", films, "--model", model("mistral"))
    assert "--backbone own: name its models" in fails(capsys, "mmimdb", "--data", films, "--backbone", "own",
                                                      "--text-model", model("bert"))
    assert "Flickr8k_Dataset: no such file or folder; download" in fails(
        capsys, "flickr8k", "--data", tmp_path, "--model", model("clip"))


def test_weights_that_the_files_lack_are_an_error(model, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "holes"
    shutil.copytree(model("clip"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "Images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "Images/a.jpg")
    assert "visual_projection.weight" in fails(capsys, "flickr8k", "--data", tmp_path, "--model", folder)


def test_without_transformers_a_line_names_the_pip_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "Images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "Images/a.jpg")
    assert "pip install" in fails(capsys, "flickr8k", "--data", tmp_path, "--model", "x")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.6"))
    assert "at least 5.20" in fails(capsys, "flickr8k", "--data", tmp_path, "--model", "x")
    with pytest.raises(SystemExit) as stop:
        encode.main(["-h"])
    assert stop.value.code == 0
