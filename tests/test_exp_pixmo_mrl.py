"""exp_pixmo_mrl.py: parquet and images, tokens, masks, the Matryoshka loss against loops, exact resume, evaluation, bad input."""

import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import common
import demo_data
import exp_pixmo_mrl as exp
import profile_flops
from common import UserError

SHARED = ROOT.parent / "shared"
SMALL = ["dataset.image_size=32", "dataset.batch_size=16", "dataset.max_text_length=24", "vision_encoder.projection_dim=16",
         "vision_encoder.mrl_dimensions=[8, 4]", "vision_encoder.width=16", "vision_encoder.depth=1", "vision_encoder.heads=2",
         "text_encoder.width=16", "text_encoder.depth=1", "text_encoder.heads=2", "text_encoder.vocab_size=300", "text_encoder.dropout=0.1",
         "vision_encoder.dropout=0.1", "optimization.num_epochs=2", "optimization.log_every=3", "optimization.save_every_steps=2",
         "evaluation.shortlists=[4]", "device=cpu", "num_workers=0"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return demo_data.write_pixmo(tmp_path_factory.mktemp("scenes"), sizes=(88, 24, 24), group_rows=16)


def arguments(tmp_path, scenes, *overrides):
    return [*(f"dataset.{part}_parquet={scenes}/pixmo_{part}.parquet" for part in ("train", "val", "test")), f"output_dir={tmp_path / 'run'}",
            f"dataset.cache_dir={tmp_path / 'cache'}", *SMALL, *overrides]


def config(tmp_path, scenes, *overrides):
    return common.load_config(exp.Config, None, arguments(tmp_path, scenes, *overrides))


def cli(tmp_path, scenes, *overrides):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "toy.yaml").write_text("optimization:\n  lr: 2e-3\n")
    return exp.main([str(tmp_path / "toy.yaml"), *arguments(tmp_path, scenes, *overrides)])


def write(path, group_rows=4, **columns):
    table = pa.table({name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def encoded(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def picture(width=60, height=40, seed=0):
    """A smooth RGB picture, different in every corner."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------------------------------------- images

def centre(image, size):
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))).astype(int)


def test_every_file_format_gives_the_same_picture():
    image = picture()
    expected = centre(image, 16)
    for data in (encoded(image), encoded(image, "WEBP", lossless=True), encoded(image, "BMP"), encoded(image, "TIFF"),
                 encoded(image, "JPEG", quality=98), encoded(image.convert("CMYK"), "JPEG", quality=98), encoded(image.convert("RGBA"))):
        got = exp.decode_image(data, 16)
        assert got.shape == (16, 16, 3)
        assert got.dtype == np.uint8
        assert abs(got.astype(int) - expected).mean() < 3
    palette = image.quantize(256)
    assert abs(exp.decode_image(encoded(palette, "GIF"), 16).astype(int) - centre(palette.convert("RGB"), 16)).max() <= 2


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (exp.decode_image(encoded(clear), 8) == 255).all()
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert abs(exp.decode_image(encoded(half), 8).astype(int) - 127).max() <= 1
    grey = Image.new("LA", (20, 20), (0, 0))
    assert (exp.decode_image(encoded(grey), 8) == 255).all()
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([0] * 768)
    assert (exp.decode_image(encoded(palette, "PNG", transparency=3), 8) == 255).all()
    assert (exp.decode_image(encoded(palette, "PNG"), 8) == 0).all()


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 64), (64, 1)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        got = exp.decode_image(encoded(Image.fromarray(ramp), kind), 64)[:, :, 0].astype(int)
        assert abs(got - np.round(ramp / 257)).max() <= 1


def test_exif_orientation_turns_the_picture():
    image = picture(40, 40)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.asarray(image).astype(int)  # Exif 2.3, 4.6.4.A: which row and column of the scene the stored ones are
        expected = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.swapaxes(0, 1), np.rot90(pixels, -1),
                    pixels[::-1, ::-1].swapaxes(0, 1), np.rot90(pixels)][orientation - 1]
        assert abs(exp.decode_image(encoded(image, "PNG", exif=exif), 40).astype(int) - expected).max() <= 1
    assert exp.decode_image(encoded(image, "PNG", exif=b"Exif\0\0broken"), 8).shape == (8, 8, 3)


def test_long_and_tiny_pictures_are_cut_to_their_centre_square():
    wide = Image.new("RGB", (3000, 2), "white")
    wide.paste((255, 0, 0), (1490, 0, 1510, 2))
    assert (exp.decode_image(encoded(wide), 8) == (255, 0, 0)).all()
    assert (exp.decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), 8) == (1, 2, 3)).all()


def test_a_large_jpeg_decoded_small_equals_the_full_decode():
    data = encoded(picture(1600, 1200), "JPEG", quality=92)
    error = exp.decode_image(data, 128).astype(float) - centre(Image.open(io.BytesIO(data)), 128)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 40  # PSNR in dB


JPEG = encoded(picture(200, 150), "JPEG")


@pytest.mark.parametrize(("data", "cause"), [
    (None, "no image bytes"), (b"", "no image bytes"), (b"<html><body>404</body></html>", "HTML"), (b"\n<!DOCTYPE html>", "HTML"),
    (b"\x00" * 50, "not an image"), (JPEG[:len(JPEG) // 2], "truncated"), (encoded(picture())[:-300], "."), (JPEG[:20], "."),
    (encoded(picture(400, 300)), "400 x 300 pixels are more than max_pixels=100000"),
    (encoded(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF"), "floating-point"),
    (encoded(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF"), "32-bit")])
def test_what_is_no_whole_picture_has_a_cause(data, cause):
    with pytest.raises(ValueError, match=cause):
        exp.decode_image(data, 16, max_pixels=100_000)


def test_a_bomb_is_refused_by_its_header_alone():
    header = encoded(Image.new("1", (30_000, 30_000)))
    with pytest.raises(ValueError, match="more than"):
        exp.decode_image(header, 16)


# --------------------------------------------------------------------------------------------------------------- parquet

def prepared(tmp_path, pattern, **changes):
    cfg = common.load_config(exp.Config, None, [f"dataset.cache_dir={tmp_path / 'cache'}", *(f"dataset.{k}={v}" for k, v in changes.items())])
    return exp.prepare(str(pattern), "dataset.train_parquet", cfg, 8)


GOOD = [encoded(picture(seed=i)) for i in range(6)]


@pytest.mark.parametrize("columns", [
    {"image_bytes": pa.array(GOOD, pa.large_binary()), "caption": list("abcdef")},
    {"image": pa.array([{"bytes": g, "path": "x.png"} for g in GOOD]), "text": list("abcdef"), "url": list("uvwxyz")},
    {"jpg": GOOD, "transcripts": [[c, c * 2] for c in "abcdef"]},
    {"bytes": GOOD, "captions": [[c] for c in "abcdef"], "id": list(range(6))},
    {"image": GOOD, "caption": list("abcdef"), "captions": [["no"]] * 6, "jpg": [b""] * 6}])
def test_every_column_layout_is_read(tmp_path, columns):
    split = prepared(tmp_path, write(tmp_path / "a.parquet", **columns))
    assert [texts[0] for texts in split.captions] == list("abcdef")
    assert [len(texts) for texts in split.captions] == [2 if "transcripts" in columns else 1] * 6
    assert np.array_equal(exp.gather_images(split, np.arange(6)), np.stack([exp.decode_image(g, 8) for g in GOOD]))
    assert split.ids == (list("uvwxyz") if "url" in columns else list("012345") if "id" in columns else [f"a.parquet:{i}" for i in range(6)])


def test_bad_rows_are_named_counted_and_left_out(tmp_path):
    (tmp_path / "parts").mkdir()
    for part, (images, captions) in {"a": ([GOOD[0], b"<html>", None, GOOD[1], GOOD[2]], ["a", "b", "c", None, "e"]),
                                     "b": ([GOOD[3], GOOD[4][:200]], ["f", "g"])}.items():
        write(tmp_path / f"parts/{part}.parquet", group_rows=2, image=images, caption=captions)
    for pattern in (tmp_path / "parts", tmp_path / "parts/*.parquet"):
        split = prepared(tmp_path, pattern)
        assert [texts[0] for texts in split.captions] == ["a", "e", "f"]
        assert [(file, row) for file, row, _ in split.bad] == [("a.parquet", 1), ("a.parquet", 2), ("a.parquet", 3), ("b.parquet", 1)]
        assert [cause for *_, cause in split.bad][:3] == ["HTML, not an image", "no image bytes", "no caption"]
        assert np.array_equal(exp.gather_images(split, np.array([2, 0])), np.stack([exp.decode_image(GOOD[i], 8) for i in (3, 0)]))


def test_rows_of_equal_image_or_caption_belong_together(tmp_path):
    path = write(tmp_path / "a.parquet", image=[GOOD[i] for i in (0, 1, 0, 2, 3, 4)], captions=[["a"], ["b"], ["c"], ["d", "b"], ["e", "c"], ["f"]])
    assert prepared(tmp_path, path).same.tolist() == [0, 1, 0, 1, 0, 5]


def test_images_of_later_splits_are_taken_out_of_earlier_ones(tmp_path):
    paths = {name: write(tmp_path / f"{name}.parquet", image=[GOOD[i] for i in rows], caption=[f"{name}{i}" for i in rows])
             for name, rows in {"train": (0, 1, 2, 3), "val": (3, 4), "test": (4, 1)}.items()}
    sets = {name: prepared(tmp_path, path) for name, path in paths.items()}
    exp.leave_out_overlap(sets)
    assert [texts[0] for texts in sets["train"].captions] == ["train0", "train2"]
    assert [texts[0] for texts in sets["val"].captions] == ["val3"]
    assert sets["train"].bad == [("train.parquet", 3, "its image is also in val"), ("train.parquet", 1, "its image is also in test")]
    with pytest.raises(UserError, match="hold the same images"):
        exp.leave_out_overlap({"train": prepared(tmp_path, paths["val"]), "val": prepared(tmp_path, paths["val"])})


@pytest.mark.parametrize(("columns", "message"), [
    ({"image_url": ["http://x"], "caption": ["a"]}, "holds no image bytes .*image_url only says where"), ({"image": GOOD[:1]}, "no captions"),
    ({"image": ["text"], "caption": ["a"]}, "holds no image bytes"), ({"image": [b"x"], "caption": ["a"]}, "none of 1 rows .*not an image")])
def test_files_without_what_is_needed(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, write(tmp_path / "a.parquet", **columns))


def test_a_glob_reaches_every_depth_and_an_empty_one_nothing(tmp_path, monkeypatch):
    (tmp_path / "one/two").mkdir(parents=True)
    paths = [write(tmp_path / place, image=GOOD[:1], caption=["a"]) for place in ("a.parquet", "one/b.parquet", "one/two/c.parquet")]
    assert exp.parquet_files(f"{tmp_path}/**/*.parquet", "key") == exp.parquet_files(str(tmp_path), "key") == paths
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"dataset.val_parquet is empty"):
        exp.parquet_files("", "dataset.val_parquet")


def test_a_row_group_is_read_a_few_rows_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table({"image": [rng.bytes(50_000) for _ in range(640)], "caption": ["a"] * 640})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=640, write_batch_size=16)
    del table
    before, most = pa.total_allocated_bytes(), 0
    for _ in exp.read_group(tmp_path / "a.parquet", 0):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 0.5 * 640 * 50_000


def test_a_caption_that_is_no_text_is_a_bad_row(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], dtype=np.int32).tobytes())
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfec")])
    split = prepared(tmp_path, write(tmp_path / "a.parquet", image=GOOD[:3], caption=broken, id=broken))
    assert (split.captions, split.ids) == ([["a"], ["c"]], ["a", "c"])
    assert split.bad == [("a.parquet", 1, "no caption")]


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match=r"dataset.train_parquet=.*no parquet files there.*--demo"):
        prepared(tmp_path, tmp_path / "nothing.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"a.parquet: not a readable parquet file"):
        prepared(tmp_path, tmp_path / "a.parquet")
    path = write(tmp_path / "b.parquet", image=GOOD, caption=list("abcdef"))
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(len(whole) // 2) + whole[40 + len(whole) // 2:])
    with pytest.raises(UserError, match=r"b.parquet: row group 0 cannot be read"):
        prepared(tmp_path, path)


def test_a_cache_cut_short_goes_on_where_it_was(tmp_path, scenes, monkeypatch):
    path = f"{scenes}/pixmo_train.parquet"
    whole = prepared(tmp_path / "a", path)
    real, calls = exp.decode_group, itertools.count()

    def killed(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(exp, "decode_group", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "b", path)
    index = next((tmp_path / "b/cache").glob("*/rows.jsonl"))
    index.write_bytes(index.read_bytes()[:-30])  # the third line is torn
    seen = []
    monkeypatch.setattr(exp, "decode_group", lambda *args: (seen.append(args[2]), real(*args))[1])
    again = prepared(tmp_path / "b", path)
    assert seen == [2, 3, 4, 5]
    assert np.array_equal(again.pixels, whole.pixels)
    assert (again.captions, again.ids, again.bad) == (whole.captions, whole.ids, whole.bad)
    seen.clear()
    assert np.array_equal(prepared(tmp_path / "b", path).position, whole.position)
    assert seen == []


@pytest.mark.parametrize("damage", ["lost", "short"])
def test_a_damaged_cache_is_made_again(tmp_path, scenes, damage):
    path = f"{scenes}/pixmo_val.parquet"
    expected = np.array(prepared(tmp_path, path).pixels)
    stored = next((tmp_path / "cache").glob("*/pixels.uint8"))
    stored.unlink()
    if damage == "short":
        stored.write_bytes(bytes(100))
    split = prepared(tmp_path, path)
    assert np.array_equal(split.pixels, expected)
    assert len(split) == 23


def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, scenes):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"dataset.cache_dir=.*cannot be written"):
        prepared(tmp_path, f"{scenes}/pixmo_val.parquet")


def test_no_room_for_the_cache_is_said_before_decoding(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(exp.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"do not fit.*dataset.cache=false"):
        prepared(tmp_path, f"{scenes}/pixmo_train.parquet")
    assert len(prepared(tmp_path, f"{scenes}/pixmo_train.parquet", cache="false")) == 87


def test_an_epoch_is_every_row_once_shuffled_by_windows_of_row_groups(tmp_path, scenes):
    split = prepared(tmp_path, f"{scenes}/pixmo_train.parquet", shuffle_rows=30)
    orders = [exp.epoch_order(split, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert np.array_equal(orders[0], orders[1])
    assert not any(np.array_equal(orders[0], other) for other in orders[2:])
    for order in orders:
        assert sorted(order) == list(range(len(split)))
        first = split.position[order[:31]] // 16  # two groups of 15 or 16 good rows
        assert len(set(first[:30])) == 2
        assert len(set(np.diff(first[:16]))) > 1  # mixed inside the window


def test_rows_are_the_same_with_and_without_cache_and_threads(tmp_path, scenes):
    rows = np.random.default_rng(0).permutation(87)
    stored, decoded = (prepared(tmp_path, f"{scenes}/pixmo_train.parquet", cache=c, shuffle_rows=20) for c in ("true", "false"))
    assert decoded.pixels is None
    with exp.ThreadPoolExecutor(2) as pool:
        for part in np.array_split(rows, 9):
            expected = exp.gather_images(stored, part)
            assert np.array_equal(exp.gather_images(decoded, part), expected)
            assert np.array_equal(exp.gather_images(decoded, part, pool.map), expected)
    exp.gather_images(decoded, np.array([0]))
    assert sum(map(len, decoded.held.values())) <= 40


# ---------------------------------------------------------------------------------------------------------------- tokens

def naive_bpe(captions, n_merges):
    words = Counter(word for text in captions for word in exp.WORD.findall(text.lower()))
    words = {word: [2 + b for b in word.encode()] for word in words} , words
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for word, ids in words[0].items():
            for pair in itertools.pairwise(ids):
                pairs[pair] += words[1][word]
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for word in words[0]:
            words[0][word] = exp.merge(words[0][word], best, 257 + len(merges))
    return merges


def test_byte_pairs_against_a_loop_that_counts_anew(scenes):
    captions = pq.read_table(f"{scenes}/pixmo_train.parquet")["caption"].to_pylist()[:60]
    captions += ["aaaa aaaaaa aaa", "ÄÖÜ äöü 日本語 日本", "a  b\n\nc"]
    assert exp.Tokenizer.train(captions, 258 + 80).merges == naive_bpe(captions, 80)


def test_tokens_carry_the_text_whatever_it_is():
    tokenizer = exp.Tokenizer.train(["the red circle", "the red square is red"] * 3, 290)
    bytes_of = {i: bytes([i - 2]) for i in range(2, 258)}
    for i, (a, b) in enumerate(tokenizer.merges):
        bytes_of[258 + i] = bytes_of[a] + bytes_of[b]
    for text in ("the red circle", "", "日本 🚲\n\t x", "The RED"):
        ids, = tokenizer([text], 100)
        assert ids[0] == exp.START
        assert b"".join(bytes_of[i] for i in ids[1:].tolist()).decode() == text.lower()
    assert len(tokenizer(["the red circle"], 100)[0]) < 8
    assert tokenizer(["the red circle"], 3)[0].tolist() == tokenizer(["the red circle"], 100)[0][:3].tolist()


# ---------------------------------------------------------------------------------------------------------------- batches

def test_batches_are_a_pure_function_of_seed_epoch_and_row(tmp_path, scenes):
    data = exp.load_data(config(tmp_path, scenes, "dataset.text_dropout_prob=0.5", "dataset.horizontal_flip_prob=0.5"))
    rows = np.array([5, 0, 60, 33])
    batch, other = exp.make_batch(data, rows, epoch=1), exp.make_batch(data, rows[::-1].copy(), epoch=1)
    assert torch.equal(batch["image"], other["image"].flip(0))
    assert torch.equal(batch["ids"], other["ids"].flip(0))
    assert not torch.equal(batch["image"], exp.make_batch(data, rows, epoch=2)["image"])
    assert torch.equal(exp.make_batch(data, rows)["image"], exp.make_batch(data, rows)["image"])
    assert (exp.make_batch(data, rows)["ids"] >= 0).all()


def test_crops_and_flips_are_those_of_the_stored_square(tmp_path, scenes):
    data = exp.load_data(config(tmp_path, scenes, "dataset.horizontal_flip_prob=0.5"))
    split, rows = data.sets["train"], np.arange(30)
    host = exp.gather(data, rows, epoch=3)
    images = exp.to_device(data, host)["image"]
    margin = split.size - 32
    assert margin == 5
    assert {*host["top"].tolist(), *host["left"].tolist()} == set(range(margin + 1))
    assert 5 < host["flip"].sum() < 25
    for i, row in enumerate(rows):
        top, left = int(host["top"][i]), int(host["left"][i])
        cut = split.pixels[split.position[row], top:top + 32, left:left + 32].astype(np.float32)
        cut = cut[:, ::-1] if host["flip"][i] else cut
        torch.testing.assert_close(images[i], torch.from_numpy(cut / 127.5 - 1).permute(2, 0, 1))
    middle = exp.gather(data, rows)
    assert set(middle["top"].tolist()) == {2}
    assert not middle["flip"].any()


def test_text_dropout_has_its_rate_and_never_touches_evaluation(tmp_path, scenes):
    data = exp.load_data(config(tmp_path, scenes, "dataset.text_dropout_prob=0.3"))
    rows = np.arange(87)
    dropped = torch.stack([exp.gather(data, rows, epoch=e)["ids"] == -1 for e in range(60)])
    assert abs(dropped.float().mean() - 0.3) < 0.03
    host = exp.gather(data, rows, epoch=0)
    assert (host["mask"][host["ids"] == -1].sum(1) == 1).all()  # the start token alone
    assert (exp.gather(data, rows)["ids"] >= 0).all()


def test_uniform_numbers_are_uniform_and_independent():
    x = exp.uniform(1, 2, np.arange(100_000), "top")
    assert 0 <= x.min() < x.max() < 1
    assert abs(x.mean() - 0.5) < 0.005
    assert abs(np.histogram(x, 10, (0, 1))[0] - 10_000).max() < 500
    for other in (exp.uniform(1, 3, np.arange(100_000), "top"), exp.uniform(2, 2, np.arange(100_000), "top"),
                  exp.uniform(1, 2, np.arange(100_000), "left"), exp.uniform(1, 2, np.arange(1, 100_001), "top")):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.015


# ----------------------------------------------------------------------------------------------------------------- model

@pytest.mark.parametrize("kind", ["simple", "multihead", "mean"])
def test_pooling_ignores_padding_and_survives_a_row_without_tokens(kind):
    torch.manual_seed(0)
    pool = exp.mean_pooling if kind == "mean" else exp.AttentionPooling(8, kind, 2)
    x, mask = torch.randn(3, 5, 8, requires_grad=True), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0] * 5]).bool()
    pooled = pool(x, mask)
    longer = pool(torch.cat([x, 100 * torch.randn(3, 4, 8)], dim=1), F.pad(mask, (0, 4)))
    torch.testing.assert_close(pooled, longer)
    torch.testing.assert_close(pooled[0], pool(x[:1, :3])[0])
    if kind == "simple":
        weights = pool.score(x[0, :3]).softmax(0)
        torch.testing.assert_close(pooled[0], (weights * x[0, :3]).sum(0))
    pooled.square().sum().backward()
    assert torch.isfinite(pooled).all()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0, 3:] == 0).all()


def test_multihead_pooling_against_torchs_attention():
    torch.manual_seed(0)
    pool, x = exp.AttentionPooling(8, "multihead", 2), torch.randn(3, 5, 8)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(8), pool.key.weight, pool.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([torch.zeros(8), pool.key.bias, pool.value.bias]))
        reference.out_proj.weight.copy_(pool.out.weight)
        reference.out_proj.bias.copy_(pool.out.bias)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 1, 0, 1, 0]]).bool()
    expected = reference(pool.query.reshape(1, 1, 8).expand(3, 1, 8), x, x, key_padding_mask=~mask)[0][:, 0]
    torch.testing.assert_close(pool(x, mask), expected)


def test_padding_does_not_change_a_caption(tmp_path, scenes):
    cfg = config(tmp_path, scenes)
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data).eval()
    batch = exp.make_batch(data, np.arange(8))
    padded = {"tokens": F.pad(batch["tokens"], (0, 3), value=7)[:, :24], "mask": F.pad(batch["mask"], (0, 3))[:, :24]}
    short = batch["tokens"].shape[1] <= 21
    with torch.no_grad():
        whole = model.text(batch["tokens"], batch["mask"])
        if short:
            torch.testing.assert_close(model.text(padded["tokens"], padded["mask"]), whole, atol=1e-5, rtol=1e-5)
        for i in range(8):
            n = int(batch["mask"][i].sum())
            torch.testing.assert_close(model.text(batch["tokens"][i:i + 1, :n], batch["mask"][i:i + 1, :n])[0], whole[i], atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_gradient_one_batch_is_learnt_and_checkpointing_changes_nothing(tmp_path, scenes):
    overrides = ["losses.learnable_temperature=true", "vision_encoder.dropout=0", "text_encoder.dropout=0", "vision_encoder.pooling_type=multihead",
                 "optimization.lr=3e-3"]
    cfg = config(tmp_path, scenes, *overrides)
    data = exp.load_data(cfg)
    batch, runs = exp.make_batch(data, np.arange(16)), []
    for checkpointing in (False, True):
        cfg.optimization.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        model = exp.build_model(cfg, data).train()
        optimizer = exp.build_optimizer(cfg, model)
        losses = [exp.train_step(model, batch, optimizer)["loss"].item() for _ in range(120)]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or name in ("vision.pool.key.bias", "vision.pool.score.bias", "text.pool.score.bias"), name
        runs.append(losses)
    assert runs[0][-1] < 0.2 * runs[0][0]
    np.testing.assert_allclose(runs[0][:5], runs[1][:5], rtol=1e-5)


def test_weight_decay_is_for_matrices_only(tmp_path, scenes):
    cfg = config(tmp_path, scenes, "losses.learnable_temperature=true")
    model = exp.build_model(cfg, exp.load_data(cfg))
    optimizer = exp.build_optimizer(cfg, model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0]
    assert {"log_scale", "vision.encoder.position", "text.encoder.embedding.weight", "text.norm.weight"} <= set(free)
    assert {"vision.encoder.patches.weight", "text.encoder.blocks.0.qkv.weight", "vision.projector.1.weight"} <= set(decayed)
    assert len(decayed) + len(free) == len(names)


def test_half_precisions_train_and_the_scaler_is_fp16s(tmp_path, scenes):
    for precision in ("bf16", "fp16"):
        cfg = config(tmp_path, scenes, f"optimization.precision={precision}")
        data = exp.load_data(cfg)
        model = exp.build_model(cfg, data)
        batch = exp.make_batch(data, np.arange(16))
        losses = exp.train_step(model, batch, exp.build_optimizer(cfg, model))
        assert model.scaler.is_enabled() == (precision == "fp16")
        assert all(torch.isfinite(losses[k]) and losses[k].dtype == torch.float32 for k in exp.TRAIN_COLUMNS)
        assert model(batch)[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- objective

def oracle_pairs():
    i, j = torch.arange(1, 5, dtype=torch.float64)[:, None], torch.arange(1, 17, dtype=torch.float64)
    return tuple(torch.sin(0.37 * i * j + b) + 0.1 * torch.cos(0.5 * j) for b in (0.1, 0.4))


def test_matryoshka_loss_against_reference_values():
    image, text = oracle_pairs()
    loss, each = exp.matryoshka_loss(image, text, [16, 8, 4, 2], 1 / 0.07)
    expected = {16: 4.36819e-6, 8: 7.89086e-5, 4: 0.09542602, 2: 0.76644515}
    assert {d: pytest.approx(v, rel=2e-6) for d, v in expected.items()} == {d: v.item() for d, v in each.items()}
    assert loss.item() == pytest.approx(0.21548861, abs=5e-9)
    assert 0.25 * each[16].item() + loss.item() == pytest.approx(0.21548970, abs=5e-9)
    single, each = exp.matryoshka_loss(image.float(), text.float(), [4], 1 / 0.07)
    assert single.item() == each[4].item() == pytest.approx(0.09542602, rel=1e-5)


def test_chance_loss_and_orthonormal_pairs():
    for b, expected in ((64, 4.158883), (128, 4.852030)):
        same = torch.ones(b, 8)
        assert exp.matryoshka_loss(same, same, [8, 2], 1 / 0.07)[0].item() == pytest.approx(expected, abs=1e-5)
    eye = torch.eye(4, dtype=torch.float64)
    assert exp.matryoshka_loss(eye, eye, [4], 1 / 0.07)[0].item() == pytest.approx(1.874623e-6, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_prefix_accumulation_equals_separate_losses_and_gradients(masked):
    g = torch.Generator().manual_seed(0)
    pairs = [torch.randn(12, 20, generator=g, dtype=torch.float64) for _ in range(2)]
    ids = torch.tensor([0, 1, 2, 2, 4, 5, -1, -1, -1, 9, 10, 10])
    options = {"ids": ids, "false_negatives": "mask"} if masked else {}
    dims, weights, results = [20, 3, 7, 12], [1.0, 2.0, 0.5, 3.0], []
    for separate in (False, True):
        image, text, scale = (x.clone().requires_grad_() for x in (*pairs, torch.tensor(9.0, dtype=torch.float64)))
        if separate:
            losses = [common.info_nce(F.normalize(image[:, :d], dim=1), F.normalize(text[:, :d], dim=1), scale, **options) for d in dims]
            loss = sum(w * value for w, value in zip(weights, losses, strict=True)) / sum(weights)
        else:
            loss, _ = exp.matryoshka_loss(image, text, dims, scale, weights, **options)
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-12)


def test_lengths_of_the_vectors_do_not_matter():
    image, text = oracle_pairs()
    factors = torch.tensor([[0.1], [3.0], [70.0], [1.0]], dtype=torch.float64)
    expected, _ = exp.matryoshka_loss(image, text, [16, 4], 10.0)
    torch.testing.assert_close(exp.matryoshka_loss(factors * image, F.normalize(text, dim=1), [16, 4], 10.0)[0], expected)


def test_a_zero_prefix_is_finite():
    image, text = (x.float().clone().requires_grad_() for x in oracle_pairs())
    loss, _ = exp.matryoshka_loss(torch.cat([torch.zeros(4, 2), image[:, 2:]], dim=1), text, [16, 2], 10.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(image.grad).all()


def test_masked_pairs_are_not_negatives():
    """k rows without text can be told apart by nothing: unmasked their loss is at least k ln k / B."""
    k, b = 3, 8
    image, text = torch.eye(b, dtype=torch.float64), torch.eye(b, dtype=torch.float64)
    text[:k] = text[0]
    image[:k] = image[0]
    ids = torch.tensor([-1] * k + list(range(b - k)))
    literal, _ = exp.matryoshka_loss(image, text, [b], 1000.0)
    masked, _ = exp.matryoshka_loss(image, text, [b], 1000.0, ids=ids, false_negatives="mask")
    assert literal.item() == pytest.approx(k * math.log(k) / b, abs=1e-6)
    assert masked.item() == pytest.approx(0, abs=1e-6)


def test_expected_floor_of_literal_dropout():
    k = np.arange(65)
    binomial = np.array([math.comb(64, n) * 0.1**n * 0.9 ** (64 - n) for n in k])
    assert (binomial * k * np.log(np.maximum(k, 1)) / 64).sum() == pytest.approx(0.193, abs=5e-4)


@pytest.mark.parametrize("call", [
    lambda x: exp.matryoshka_loss(x, x[:3], [4], 1.0), lambda x: exp.matryoshka_loss(x, x, [17], 1.0), lambda x: exp.matryoshka_loss(x, x, [0], 1.0),
    lambda x: exp.matryoshka_loss(x, x, [], 1.0), lambda x: exp.matryoshka_loss(x, x, [4, 8], 1.0, [1.0]),
    lambda x: exp.matryoshka_loss(x, x, [4], 1.0, false_negatives="mask")])
def test_wrong_arguments_of_the_loss(call):
    with pytest.raises(ValueError, match=r"must"):
        call(torch.randn(4, 16))


def test_the_drawn_dimension_is_unbiased_and_a_function_of_seed_and_step(tmp_path, scenes):
    cfg = config(tmp_path, scenes, "losses.mrl_weights=[1, 2, 5]")
    model = exp.build_model(cfg, exp.load_data(cfg))
    assert model.dims == [4, 8, 16]
    np.testing.assert_allclose(model.weights, [5 / 8, 2 / 8, 1 / 8])  # given from the largest
    drawn = [exp.draw_dim(cfg, model, step) for step in range(4000)]
    assert drawn == [exp.draw_dim(cfg, model, step) for step in range(4000)]
    for d, w in zip(model.dims, model.weights, strict=True):
        assert abs(drawn.count(d) / 4000 - w) < 0.03
    g = torch.Generator().manual_seed(0)
    image, text, ids = torch.randn(6, 16, generator=g), torch.randn(6, 16, generator=g), torch.arange(6)
    whole = exp.objective(model, image, text, ids)
    mean = sum(w * exp.objective(model, image, text, ids, d)["loss"] for w, d in zip(model.weights, model.dims, strict=True))
    torch.testing.assert_close(mean, whole["loss"])
    torch.testing.assert_close(whole["loss"], 0.25 * whole["loss_clip"] + whole["loss_mrl"])
    cfg.seed = 43
    assert drawn != [exp.draw_dim(cfg, model, step) for step in range(4000)]
    cfg.losses.sample_single_mrl_dim = False
    assert exp.draw_dim(cfg, model, 0) is None


def test_schedule_of_the_reference():
    for step, rate in ((0, 0), (1, 2e-6), (50, 1e-4), (100, 2e-4), (325, 1.707107e-4), (550, 1e-4), (775, 2.928932e-5), (999, 6.092342e-10),
                       (1000, 0), (1500, 0)):
        assert 2e-4 * common.warmup_cosine(step, 1000, 100) == pytest.approx(rate, rel=1e-6, abs=1e-15)


# ------------------------------------------------------------------------------------------------------------ evaluation

def test_funnel_of_everything_is_the_exact_search_and_of_a_collapsed_model_chance():
    g = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(60, 16, generator=g), dim=1)
    queries = F.normalize(gallery + 0.35 * torch.randn(60, 16, generator=g), dim=1)
    for ids in (torch.arange(60), torch.arange(60) // 2):
        exact = common.retrieval_metrics(queries, gallery, ids, ids)["R@1"]
        assert 0.5 < exact < 1
        assert exp.funnel(queries, gallery, ids, 4, 60) == pytest.approx(exact, abs=1e-12)
        assert exp.funnel(queries, gallery, ids, 4, 1000) == pytest.approx(exact, abs=1e-12)
    ids = torch.arange(60)
    small = (F.normalize(queries[:, :4], dim=1) @ F.normalize(gallery[:, :4], dim=1).T).topk(5).indices
    expected = np.mean([top[(gallery[top] @ q).argmax()] == i for i, (q, top) in enumerate(zip(queries, small, strict=True))])
    assert exp.funnel(queries, gallery, ids, 4, 5) == pytest.approx(expected)
    same = torch.ones(60, 16) / 4
    assert exp.funnel(same, same, ids, 4, 60) == pytest.approx(1 / 60)
    assert exp.funnel(same, same, ids, 4, 10) < 0.1


def test_pca_keeps_the_largest_variance_of_either_side_about_its_own_mean():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=g) * torch.tensor([5.0, 3, 1, 0.1, 0.1, 0.1])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    image, text = x @ turn + 7, x @ turn - 3
    *means, axes = exp.fit_pca(image, text)
    torch.testing.assert_close(means[0], image.mean(0), rtol=1e-4, atol=1e-4)
    kept = (image - means[0]) @ axes
    torch.testing.assert_close(kept.var(0), x.var(0).sort(descending=True).values, rtol=0.1, atol=0.01)
    torch.testing.assert_close(kept, (text - means[1]) @ axes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(axes.T @ axes, torch.eye(6), rtol=1e-4, atol=1e-4)


def test_geometry_of_more_rows_than_a_block():
    x = F.normalize(torch.randn(1025, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    squares = torch.pdist(x.double()).square()
    assert exp.geometry(x, x)["uniformity_text"] == pytest.approx(math.log((-2 * squares).exp().mean()), abs=1e-5)


def test_geometry_against_loops():
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(30, 5, generator=g), dim=1) for _ in range(2))
    got = exp.geometry(image, text)
    pairs = [math.exp(-2 * (image[i] - image[j]).square().sum()) for i in range(30) for j in range(i)]
    assert got["uniformity_image"] == pytest.approx(math.log(np.mean(pairs)), abs=1e-5)
    assert got["alignment"] == pytest.approx(np.mean([(a - b).square().sum().item() for a, b in zip(image, text, strict=True)]), abs=1e-6)
    assert got["modality_gap"] == pytest.approx((image.mean(0) - text.mean(0)).norm().item(), abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- the run

@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes):
    folder = tmp_path_factory.mktemp("whole")
    assert cli(folder, scenes) == 0
    return folder / "run"


def assert_same_run(folder, whole):
    for name in ("best_model.pt", "checkpoint_latest.pt"):
        one, other = (common.load_checkpoint(path / name) for path in (folder, whole))
        for key, value in other["model_state_dict"].items():
            assert torch.equal(one["model_state_dict"][key], value), key
        for key in ("epoch", "global_step", "best_val_loss", "history"):
            assert one.get(key) == other.get(key)
    for name in ("results.json", "metrics.csv", "left_out.csv", "tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_leaves_the_documented_files(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt", "results.json", "results.txt",
            "training_curves.png", "loss_components.png", "lr_schedule.png", "embedding_space.png", "similarity_matrix.png",
            "mrl_performance.png"} <= names
    header, *rows = (whole / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/loss_clip", "train/loss_mrl", "train/lr", "train/step", "train/epoch", "val/loss", "val/loss_clip", "val/loss_mrl",
            *(f"val/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))} == set(header.split(","))
    assert [row.split(",")[0] for row in rows] == ["3", "5", "6", "9", "10"]
    state = common.load_checkpoint(whole / "checkpoint_latest.pt")
    assert {"epoch", "global_step", "best_val_loss", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict",
            "history", "config", "rng", "position"} <= set(state)
    results = json.loads((whole / "results.json").read_text())
    assert results["synthetic"] is True
    assert set(results["dims"]) == set(results["pca"]) == {"4", "8", "16"}
    assert results["chance"]["R@1"] == pytest.approx(1 / 23, abs=0.01)
    assert [line.split(",")[:3] for line in (whole / "left_out.csv").read_text().splitlines()[1:]] == [
        [part, f"pixmo_{part}.parquet", "7"] for part in ("train", "val", "test")]


KILLER = """
import os, signal, sys
import common, exp_pixmo_mrl as exp
module, (place, _, name), n = os if sys.argv[1] == "os" else exp, sys.argv[2].partition(" "), int(sys.argv[3])
real, calls = getattr(module, place), [0]
def killed(*args, **kwargs):
    calls[0] += not name or os.path.basename(args[1]) == name
    if calls[0] == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, place, killed)
sys.exit(exp.main(sys.argv[4:]))
"""

KILLS = {  # a function and the call that does not come back; `replace <file>`: the rename onto it
    "while decoding": ("exp", "decode_group", 3), "mid-epoch, before the first checkpoint": ("exp", "train_step", 2),
    "mid-epoch, after a checkpoint": ("exp", "train_step", 4), "mid-save, nothing renamed": ("os", "replace checkpoint_latest.pt.previous", 1),
    "mid-save, between the two renames": ("os", "replace checkpoint_latest.pt", 2), "at an epoch's end, before validation": ("exp", "validate", 1),
    "at an epoch's end, best saved, latest not": ("os", "replace checkpoint_latest.pt.previous", 2),
    "at an epoch's end, before metrics.csv": ("os", "replace metrics.csv", 2), "in the second epoch": ("exp", "train_step", 8),
    "after the last step": ("exp", "validate", 2), "after the last checkpoint": ("os", "replace metrics.csv", 5),
    "in the evaluation": ("exp", "funnel", 1), "before results.json": ("os", "replace results.json", 1)}


@pytest.mark.parametrize("case", KILLS)
def test_killed_and_rerun_with_another_number_of_workers_equals_uninterrupted(whole, scenes, tmp_path, case):
    (tmp_path / "toy.yaml").write_text("optimization:\n  lr: 2e-3\n")
    command = [str(tmp_path / "toy.yaml"), *arguments(tmp_path, scenes, "evaluation.plots=false")]
    process = subprocess.run([sys.executable, "-c", KILLER, *map(str, KILLS[case]), *command], cwd=ROOT, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/results.json").exists()
    assert cli(tmp_path, scenes, "num_workers=2", "evaluation.plots=false") == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_only_reports(whole, scenes, tmp_path, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir() if p.suffix == ".pt" or p.name in ("results.json", "results.txt")}
    monkeypatch.setattr(exp, "train_step", None)
    monkeypatch.setattr(exp, "embed", None)
    assert cli(tmp_path, scenes, f"output_dir={whole}") == 0
    assert "training is complete" in (out := capsys.readouterr().out)
    assert "SYNTHETIC" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("overrides", [["dataset.cache=false"], ["num_workers=3", "dataset.cache=false"]])
def test_neither_cache_nor_workers_change_a_run(whole, scenes, tmp_path, overrides):
    assert cli(tmp_path, scenes, *overrides) == 0
    assert_same_run(tmp_path / "run", whole)


def test_plots_asked_for_later_are_drawn(scenes, tmp_path):
    assert cli(tmp_path, scenes, "optimization.num_epochs=1", "evaluation.plots=false") == 0
    before = (tmp_path / "run/results.json").read_bytes()
    assert cli(tmp_path, scenes, "optimization.num_epochs=1") == 0
    assert len(list((tmp_path / "run").glob("*.png"))) == 6
    assert (tmp_path / "run/results.json").read_bytes() == before


def test_sigterm_saves_and_exits(whole, scenes, tmp_path, monkeypatch, capsys):
    real, calls = exp.train_step, itertools.count(1)

    def stopped(*args):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(exp, "train_step", stopped)
    assert cli(tmp_path, scenes) == 143
    assert "stopped at step 3; the same command resumes" in capsys.readouterr().err
    assert common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")["global_step"] == 3
    assert cli(tmp_path, scenes, "--stage", "evaluate") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(exp, "train_step", real)
    assert cli(tmp_path, scenes) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_at_any_moment_of_a_step_is_saved_before_the_exit(scenes, tmp_path, monkeypatch):
    real, calls = common.RunLog.write, itertools.count(1)

    def stopped(*args):
        if next(calls) == 1:  # after step 3, whose checkpoint is not due
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(common.RunLog, "write", stopped)
    assert cli(tmp_path, scenes, "optimization.save_every_steps=100") == 130
    assert common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")["global_step"] == 4


def test_non_finite_loss_stops_with_step_and_rate(scenes, tmp_path, capsys):
    assert cli(tmp_path, scenes, "optimization.lr=1e30", "optimization.warmup_ratio=0") == 1
    assert "non-finite" in (err := capsys.readouterr().err)
    assert "lower optimization.lr" in err


def test_weights_that_have_overflowed_never_replace_a_good_checkpoint(scenes, tmp_path, monkeypatch):
    real, calls = exp.train_step, itertools.count(1)

    def overflowing(model, *args):
        if next(calls) == 4:
            model.log_scale.data.fill_(math.inf)
        return real(model, *args)
    monkeypatch.setattr(exp, "train_step", overflowing)
    assert cli(tmp_path, scenes, "optimization.log_every=1000", "optimization.save_every_steps=1") == 1
    state = common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")
    assert state["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in state["model_state_dict"].values())


def test_a_learned_scale_ends_at_100_and_comes_back_and_a_fixed_one_is_what_was_set(tmp_path, scenes):
    cfg = config(tmp_path, scenes, "losses.learnable_temperature=true", "losses.temperature=0.0101", "optimization.lr=0.05")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    optimizer, batch = exp.build_optimizer(cfg, model), exp.make_batch(data, np.arange(16))
    with torch.no_grad():
        model.log_scale.add_(1.0)  # beyond: the next step brings it back
    exp.train_step(model, batch, optimizer)
    assert model.logit_scale.item() == pytest.approx(100)
    for _ in range(3):  # of random embeddings the loss falls with the scale
        exp.train_step(model, {**batch, "image": torch.randn_like(batch["image"])}, optimizer)
    assert model.logit_scale.item() < 99
    assert exp.build_model(config(tmp_path, scenes, "losses.temperature=0.005"), data).logit_scale.item() == pytest.approx(200)


def test_periodic_checkpoints_and_the_control_without_mrl(scenes, tmp_path):
    assert cli(tmp_path, scenes, "optimization.save_every_epochs=1", "losses.mrl=0", "losses.contrastive=1", "dataset.test_parquet=",
               "vision_encoder.use_attention_pooling=false", "text_encoder.projector=linear", "evaluation.plots=false") == 0
    assert {p.name for p in (tmp_path / "run").glob("checkpoint_epoch_*")} == {"checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"}
    assert not list((tmp_path / "run").glob("*.png"))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["trained_with_mrl"] is False
    assert results["split"] == "val"
    assert "also chose the epoch" in (tmp_path / "run/results.txt").read_text()
    rows = common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")["history"]
    assert all(row["train/loss"] == pytest.approx(row["train/loss_clip"]) for row in rows)


def test_embed_writes_normalised_prefixes_of_any_parquet(whole, scenes, tmp_path, capsys):
    path = write(tmp_path / "more.parquet", image=[GOOD[0], b"<html>", GOOD[2]], caption=["a red circle", "b", "日本"], id=["x", "y", "z"])
    assert cli(tmp_path, scenes, f"output_dir={whole}", "--stage", "embed", "dim=8", f"parquet={path}") == 0
    assert "2 pairs x 8 dimensions, 1 rows left out" in capsys.readouterr().out
    got = torch.load(whole / "embeddings.pt", weights_only=True)
    assert got["ids"] == ["x", "z"]
    assert got["image"].shape == got["text"].shape == (2, 8)
    assert cli(tmp_path, scenes, f"output_dir={whole}", "--stage", "embed", f"parquet={path}", "dataset.train_parquet=gone.parquet") == 0
    full = torch.load(whole / "embeddings.pt", weights_only=True)
    for side in ("image", "text"):
        torch.testing.assert_close(got[side], F.normalize(full[side][:, :8], dim=1))
        torch.testing.assert_close(got[side].norm(dim=1), torch.ones(2))
    assert cli(tmp_path, scenes, f"output_dir={whole}", "--stage", "embed", "dim=17") == 2
    assert "dim=17 is more than" in capsys.readouterr().err
    assert cli(tmp_path, scenes, f"output_dir={tmp_path / 'none'}", "--stage", "embed") == 2
    assert "train first" in capsys.readouterr().err


def test_compare_averages_seeds_and_draws(whole, scenes, tmp_path, capsys):
    folders = [whole]
    for seed in (1, 2):
        assert cli(tmp_path / str(seed), scenes, f"seed={seed}", "losses.mrl=0", "evaluation.plots=false") == 0
        folders.append(tmp_path / f"{seed}/run")
    capsys.readouterr()
    assert cli(tmp_path, scenes, "--stage", "compare", f"compare=[{','.join(map(str, folders))}]", f"output_dir={tmp_path / 'out'}") == 0
    text = (tmp_path / "out/compare.txt").read_text()
    assert text.count(" +- ") >= 6
    assert "[SYNTHETIC demo data]" in text
    assert "chance" in text
    assert (tmp_path / "out/compare.png").exists()
    assert cli(tmp_path / "3", scenes, "vision_encoder.mrl_dimensions=[8, 2]", "evaluation.plots=false") == 0  # other dimensions
    for pair in ([whole, tmp_path / "3/run"], [tmp_path / "3/run", whole]):
        assert cli(tmp_path, scenes, "--stage", "compare", f"compare=[{','.join(map(str, pair))}]", f"output_dir={tmp_path / 'out'}") == 0
    assert cli(tmp_path, scenes, "--stage", "compare") == 2


@pytest.mark.parametrize(("overrides", "message"), [
    (["vision_encoder.mrl_dimensions=[32]"], "32 is more than vision_encoder.projection_dim=16"),
    (["losses.mrl_weights=[1, 2]"], r"expected one for each of \[16, 8, 4\]"), (["losses.mrl=0", "losses.contrastive=0"], "nothing would be trained"),
    (["vision_encoder.width=18", "vision_encoder.heads=4"], "not a multiple of vision_encoder.heads=4"),
    (["dataset.image_size=40"], "not a multiple of vision_encoder.patch_size=16"), (["optimization.betas=[0.9]"], "expected two numbers"),
    (["vision_encoder.pooling_type=multihead", "vision_encoder.pooling_heads=5"], "not a multiple of vision_encoder.pooling_heads=5"),
    (["losses.learnable_temperature=true", "losses.temperature=0.005"], "stays at 0.01 or above"), (["--demo"], "brings its own data"),
    (["dataset.val_parquet=gone"], "dataset.val_parquet=gone: no parquet files"), (["--fresh", "--stage", "evaluate"], "--fresh starts a run again"),
    (["dataset.text_dropuot_prob=0"], "did you mean dataset.text_dropout_prob")])
def test_mistakes_are_one_line(scenes, tmp_path, capsys, overrides, message):
    assert cli(tmp_path, scenes, *overrides) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_on_other_data_is_refused(whole, scenes, tmp_path, capsys):
    assert cli(tmp_path, scenes, f"output_dir={whole}", f"dataset.train_parquet={scenes}/pixmo_val.parquet",
               f"dataset.val_parquet={scenes}/pixmo_train.parquet") == 2
    assert "holds a run on other data" in capsys.readouterr().err


def test_the_documents_snippet_loads(tmp_path):
    (tmp_path / "doc.yaml").write_text("""
dataset:
  train_parquet: /path/to/pixmo_train.parquet
  val_parquet: /path/to/pixmo_val.parquet
  batch_size: 64
  text_dropout_prob: 0.1
vision_encoder:
  projection_dim: 4096
  mrl_dimensions: [2048, 1024, 512, 256, 128]
  use_attention_pooling: true
  pooling_type: simple
losses:
  contrastive: 0.25  # CLIP weight
  mrl: 1.0           # MRL weight
optimization:
  lr: 0.0002
  weight_decay: 0.01
  betas: [0.9, 0.95]
  max_grad_norm: 1.0
  warmup_ratio: 0.1       # 10% warmup
""")
    cfg = common.load_config(exp.Config, tmp_path / "doc.yaml")
    exp.check(cfg)
    assert exp.mrl_dims(cfg.vision_encoder) == [128, 256, 512, 1024, 2048, 4096]
    defaults = exp.Config()
    defaults.output_dir, defaults.dataset.train_parquet, defaults.dataset.val_parquet = (cfg.output_dir, cfg.dataset.train_parquet,
                                                                                         cfg.dataset.val_parquet)
    assert cfg == defaults


def test_profile_counts_a_step(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("experiment: pixmo_mrl\n")
    keys = {}
    for item in [*SMALL, "dataset.train_parquet=gone.parquet"]:
        key, _, value = item.partition("=")
        keys[key] = value
    path.write_text("experiment: pixmo_mrl\n" + "".join(f"{k}: {v}\n" for k, v in keys.items() if k != "device"))
    found = profile_flops.profile(path, device="cpu")
    assert found["random_data"]
    assert found["batch_size"] == 16
    b, w, patches, tokens = 16, 16, 4, 24

    def tower(n, depth=1):
        return depth * (2 * n * w * 12 * w + 4 * n * n * w) + 2 * n * w + 2 * n * w + 2 * w * 16 + 2 * 16 * 16
    forward = b * (tower(patches) + 2 * patches * 3 * 16 * 16 * w + tower(tokens)) + 2 * b * b * 16
    assert found["flops_forward"] == pytest.approx(forward, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ pretrained

def tiny_clip(folder):
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300,
                     "max_position_embeddings": 20, "projection_dim": 8, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
                       "patch_size": 16, "projection_dim": 8}, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = [chr(i) for i in range(97, 123)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "th", "re", *letters, *(f"{c}</w>" for c in letters), ".</w>", ".", ";</w>", ";"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nr e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 20,
                                                              "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3],
                                                                 "image_processor_type": "CLIPImageProcessor"}))
    return folder


def test_frozen_pretrained_encoders_end_to_end(scenes, tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    overrides = ["dataset.image_size=0", f"vision_encoder.name={folder}", f"text_encoder.name={folder}"]
    cfg = config(tmp_path, scenes, *overrides)
    data = exp.load_data(cfg)
    assert (data.image_size, data.max_length) == (32, 20)
    torch.testing.assert_close(data.mean, 255 * torch.tensor([0.1, 0.2, 0.3]))
    assert max(len(t[0]) for t in data.sets["train"].tokens) == 20
    model = exp.build_model(cfg, data).train()
    frozen = [tower.encoder.hidden[0] for tower in (model.vision, model.text)]
    before = [p.clone() for backbone in frozen for p in backbone.parameters()]
    assert not any(backbone.training or any(p.requires_grad for p in backbone.parameters()) for backbone in frozen)
    assert not any("encoder" in name for name in model.state_dict())
    batch = exp.make_batch(data, np.arange(8))
    with torch.no_grad():
        tokens = model.vision.encoder(batch["image"])
        assert tokens.shape == (8, 5, 24)
        torch.testing.assert_close(tokens, frozen[0](pixel_values=batch["image"]).last_hidden_state)
    optimizer = exp.build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for backbone in frozen for p in backbone.parameters()}
    exp.train_step(model, batch, optimizer)
    assert all(torch.equal(a, p) for a, p in zip(before, (p for backbone in frozen for p in backbone.parameters()), strict=True))
    assert cli(tmp_path, scenes, *overrides) == 0
    assert (tmp_path / "run/results.json").exists()
    assert cli(tmp_path, scenes, *overrides, "--stage", "embed") == 0


@pytest.mark.parametrize(("override", "message"), [
    ("dataset.image_size=40", "dataset.image_size=40: .* does not take it .* own 32"),
    ("text_encoder.name={}", "dataset.max_text_length=20: .* does not take it .* lower it"),
    ("text_encoder.pooling_heads=5", "text_encoder.pooling_heads=5 does not divide the width 16")])
def test_what_a_pretrained_encoder_does_not_take_is_said_before_decoding(scenes, tmp_path, capsys, override, message):
    folder = tiny_clip(tmp_path / "clip")
    roberta = shutil.copytree(folder, tmp_path / "roberta")  # its positions start at 2: a text of 20 needs 22
    transformers = pytest.importorskip("transformers")
    transformers.RobertaModel(transformers.RobertaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                         vocab_size=300, max_position_embeddings=20, pad_token_id=1)).save_pretrained(roberta)
    capsys.readouterr()  # the progress bars of saving
    assert cli(tmp_path, scenes, "dataset.image_size=0", f"vision_encoder.name={folder}", f"text_encoder.name={folder}",
               "text_encoder.pooling_type=multihead", "text_encoder.pooling_heads=4", override.format(roberta)) == 2
    assert re.search(message, err := capsys.readouterr().err)
    assert err.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_encoders_stored_in_half_precision_are_used_in_full(scenes, tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    whole = exp.pretrained(str(folder), "vision")[1].state_dict()
    transformers = pytest.importorskip("transformers")
    transformers.CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    cfg = config(tmp_path, scenes, "dataset.image_size=0", f"vision_encoder.name={folder}", f"text_encoder.name={folder}")
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data)
    assert torch.isfinite(exp.train_step(model, exp.make_batch(data, np.arange(8)), exp.build_optimizer(cfg, model))["loss"])
    for name, value in data.encoders["vision"].state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)  # dtype included


def test_pretrained_encoders_that_cannot_be_had(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli(tmp_path, scenes, "text_encoder.name=some/model") == 2
    assert "pip install transformers" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- real data

@pytest.mark.skipif(not (SHARED / "data/pixmo").exists(), reason="no real data beside the checkout")
def test_real_photos_load(tmp_path):
    cfg = config(tmp_path, SHARED / "data/pixmo", "dataset.image_size=64")
    data = exp.load_data(cfg)
    assert {name: len(split) for name, split in data.sets.items()} == {"train": 1600, "val": 200, "test": 200}
    assert all(not split.bad for split in data.sets.values())
    assert not data.synthetic
    batch = exp.make_batch(data, np.arange(4), "val")
    assert batch["image"].shape == (4, 3, 64, 64)
    assert batch["mask"].sum(1).min() >= 20
