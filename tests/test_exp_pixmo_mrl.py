"""exp_pixmo_mrl.py: parquet and images, caches, features, tokens, masks, the Matryoshka loss against loops, exact
resume, evaluation, bad input."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_nothing_chosen_on_test, ends_with, kill_at, killed
from PIL import Image

import common
import demo_data
import exp_pixmo_mrl as exp
import profile_flops
from common import UserError

SHARED = ROOT.parent / "shared"
SMALL = ["dataset.image_size=32", "dataset.batch_size=16", "dataset.max_text_length=24",
         "vision_encoder.projection_dim=16", "vision_encoder.mrl_dimensions=[8, 4]", "vision_encoder.width=16",
         "vision_encoder.depth=1", "vision_encoder.heads=2", "text_encoder.width=16", "text_encoder.depth=1",
         "text_encoder.heads=2", "text_encoder.vocab_size=120", "text_encoder.dropout=0.1",
         "vision_encoder.dropout=0.1", "optimization.num_epochs=2", "optimization.log_every=3",
         "optimization.save_every_steps=2", "device=cpu", "num_workers=0"]
REAL = {name: getattr(common, name) for name in ("plot_history", "plot_embedding_space", "plot_similarity_matrix")}


def quicken():
    """Pictures cost most of a tiny run: they are drawn by the tests of pictures alone."""
    for name in REAL:
        setattr(common, name, lambda *_, **__: None)
    exp.plot_sizes = lambda *_, **__: None
    common.bootstrap.__defaults__ = (None, 50, 0)


REAL_SIZES, REAL_BOOTSTRAP = exp.plot_sizes, common.bootstrap.__defaults__


@pytest.fixture(autouse=True, scope="module")
def quick():
    quicken()
    yield
    for name, real in REAL.items():
        setattr(common, name, real)
    exp.plot_sizes, common.bootstrap.__defaults__ = REAL_SIZES, REAL_BOOTSTRAP


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return demo_data.write_pixmo(tmp_path_factory.mktemp("scenes"), sizes=(88, 24, 24), group_rows=16)


def arguments(tmp_path, scenes, *overrides):
    return [*(f"dataset.{part}_parquet={scenes}/pixmo_{part}.parquet" for part in ("train", "val", "test")),
            f"output_dir={tmp_path / 'run'}", f"dataset.cache_dir={tmp_path / 'cache'}", *SMALL, *overrides]


def config(tmp_path, scenes, *overrides):
    return common.load_config(exp.Config, None, arguments(tmp_path, scenes, *overrides))


def cli(tmp_path, scenes, *overrides):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "toy.yaml").write_text("optimization:\n  lr: 2e-3\n")
    return exp.main([str(tmp_path / "toy.yaml"), *arguments(tmp_path, scenes, *overrides)])


def failing(tmp_path, scenes, capsys, *overrides, code=2):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert cli(tmp_path, scenes, *overrides) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def cached(scenes, *overrides):
    """Overrides for the features of frozen encoders."""
    features = demo_data.write_pixmo_features(scenes, widths=(24, 12))
    return ["vision_encoder.name=cached", "text_encoder.name=cached",
            f"vision_encoder.features_file={features}/image_features.pt",
            f"text_encoder.features_file={features}/text_features.pt", *overrides]


def write(path, group_rows=4, **columns):
    table = pa.table({name: value if isinstance(value, pa.Array) else pa.array(value)
                      for name, value in columns.items()})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def encoded(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def picture(width=60, height=40, seed=0):
    """A smooth RGB picture, different in every corner."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------------------------------------- images

def centre(image, size):
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(image.convert("RGB").resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))).astype(int)


def test_every_file_format_gives_the_same_picture():
    image = picture()
    expected = centre(image, 16)
    for data in (encoded(image), encoded(image, "WEBP", lossless=True), encoded(image, "BMP"), encoded(image, "TIFF"),
                 encoded(image, "JPEG", quality=98), encoded(image.convert("CMYK"), "JPEG", quality=98),
                 encoded(image.convert("RGBA"))):
        got = common.decode_image(data, 16)
        assert got.shape == (16, 16, 3)
        assert got.dtype == np.uint8
        assert abs(got.astype(int) - expected).mean() < 3
    palette = image.quantize(256)
    assert abs(common.decode_image(encoded(palette, "GIF"), 16).astype(int)
               - centre(palette.convert("RGB"), 16)).max() <= 2


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (common.decode_image(encoded(clear), 8) == 255).all()
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert abs(common.decode_image(encoded(half), 8).astype(int) - 127).max() <= 1
    grey = Image.new("LA", (20, 20), (0, 0))
    assert (common.decode_image(encoded(grey), 8) == 255).all()
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([0] * 768)
    assert (common.decode_image(encoded(palette, "PNG", transparency=3), 8) == 255).all()
    assert (common.decode_image(encoded(palette, "PNG"), 8) == 0).all()


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 64), (64, 1)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        got = common.decode_image(encoded(Image.fromarray(ramp), kind), 64)[:, :, 0].astype(int)
        assert abs(got - np.round(ramp / 257)).max() <= 1


def test_exif_orientation_turns_the_picture():
    image = picture(40, 40)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        # Exif 2.3, 4.6.4.A: which row and column of the scene the stored ones are
        pixels = np.asarray(image).astype(int)
        expected = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.swapaxes(0, 1),
                    np.rot90(pixels, -1), pixels[::-1, ::-1].swapaxes(0, 1), np.rot90(pixels)][orientation - 1]
        assert abs(common.decode_image(encoded(image, "PNG", exif=exif), 40).astype(int) - expected).max() <= 1
    assert common.decode_image(encoded(image, "PNG", exif=b"Exif\0\0broken"), 8).shape == (8, 8, 3)


def test_long_and_tiny_pictures_are_cut_to_their_centre_square():
    wide = Image.new("RGB", (3000, 2), "white")
    wide.paste((255, 0, 0), (1490, 0, 1510, 2))
    assert (common.decode_image(encoded(wide), 8) == (255, 0, 0)).all()
    assert (common.decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), 8) == (1, 2, 3)).all()


def test_eight_bit_values_in_32_bit_tiffs_are_no_black():
    values = np.arange(48, dtype=np.int32).reshape(6, 8) * 5
    for scale in (1, 257):  # of 0..255, of 0..65535
        file = io.BytesIO()
        Image.fromarray(values * scale).save(file, "TIFF")
        decoded = common.decode_image(file.getvalue())
        np.testing.assert_array_equal(decoded, np.repeat(values[:, :, None], 3, axis=2))


def test_a_large_jpeg_decoded_small_equals_the_full_decode():
    data = encoded(picture(1600, 1200), "JPEG", quality=92)
    error = common.decode_image(data, 128).astype(float) - centre(Image.open(io.BytesIO(data)), 128)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 40  # PSNR in dB


JPEG = encoded(picture(200, 150), "JPEG")


@pytest.mark.parametrize(("data", "cause"), [
    (None, "no image bytes"), (b"", "no image bytes"), (b"<html><body>404</body></html>", "HTML"),
    (b"\n<!DOCTYPE html>", "HTML"),
    (b"\x00" * 50, "not an image"), (JPEG[:len(JPEG) // 2], "truncated"), (encoded(picture())[:-300], "."),
    (JPEG[:20], "."), (encoded(picture(400, 300)), "400 x 300 pixels are more than max_pixels=100000"),
    (encoded(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF"), "floating-point"),
    (encoded(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF"), "32-bit")])
def test_what_is_no_whole_picture_has_a_cause(data, cause):
    with pytest.raises(ValueError, match=cause):
        common.decode_image(data, 16, max_pixels=100_000)


def test_a_bomb_is_refused_by_its_header_alone():
    header = encoded(Image.new("1", (30_000, 30_000)))
    with pytest.raises(ValueError, match="more than"):
        common.decode_image(header, 16)


# -------------------------------------------------------------------------------------------------------------- parquet

def prepared(tmp_path, pattern, each=map, size=8, **changes):
    cfg = common.load_config(exp.Config, None, [f"dataset.cache_dir={tmp_path / 'cache'}",
                                                *(f"dataset.{k}={v}" for k, v in changes.items())])
    split = exp.read_split(str(pattern), "dataset.train_parquet", cfg, size, each)
    split.same = exp.group_equal(split.picture[:, None].tolist(), split.captions)
    return split


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
    assert np.array_equal(exp.gather_images(split, np.arange(6)), np.stack([common.decode_image(g, 8) for g in GOOD]))
    assert split.ids.tolist() == (list("uvwxyz") if "url" in columns else list("012345") if "id" in columns
                                  else [f"a.parquet:{i}" for i in range(6)])


def test_bad_rows_are_named_counted_and_left_out(tmp_path):
    (tmp_path / "parts").mkdir()
    for part, (images, captions) in {"a": ([GOOD[0], b"<html>", None, GOOD[1], GOOD[2]], ["a", "b", "c", None, "e"]),
                                     "b": ([GOOD[3], GOOD[4][:200]], ["f", "g"])}.items():
        write(tmp_path / f"parts/{part}.parquet", group_rows=2, image=images, caption=captions)
    for pattern in (tmp_path / "parts", tmp_path / "parts/*.parquet"):
        split = prepared(tmp_path, pattern)
        assert [texts[0] for texts in split.captions] == ["a", "e", "f"]
        assert [(file, row) for file, row, _ in split.bad] == [
            ("a.parquet", 1), ("a.parquet", 2), ("a.parquet", 3), ("b.parquet", 1)]
        assert [cause for *_, cause in split.bad][:3] == ["HTML, not an image", "no image bytes", "no caption"]
        assert np.array_equal(exp.gather_images(split, np.array([2, 0])),
                              np.stack([common.decode_image(GOOD[i], 8) for i in (3, 0)]))


def test_rows_of_equal_image_or_caption_belong_together(tmp_path):
    path = write(tmp_path / "a.parquet", image=[GOOD[i] for i in (0, 1, 0, 2, 3, 4)],
                 captions=[["a"], ["b"], ["c"], ["d", "b"], ["e", "c"], ["f"]])
    assert prepared(tmp_path, path).same.tolist() == [0, 1, 0, 1, 0, 5]


def test_images_of_later_splits_are_taken_out_of_earlier_ones(tmp_path):
    paths = {name: write(tmp_path / f"{name}.parquet", image=[GOOD[i] for i in rows],
                         caption=[f"{name}{i}" for i in rows])
             for name, rows in {"train": (0, 1, 2, 3), "val": (3, 4), "test": (4, 1)}.items()}
    sets = {name: prepared(tmp_path, path) for name, path in paths.items()}
    exp.leave_out_overlap(sets)
    assert [texts[0] for texts in sets["train"].captions] == ["train0", "train2"]
    assert [texts[0] for texts in sets["val"].captions] == ["val3"]
    assert sets["train"].bad == [("train.parquet", 3, "its image is also in val"),
                                 ("train.parquet", 1, "its image is also in test")]
    with pytest.raises(UserError, match="hold the same images"):
        exp.leave_out_overlap({"train": prepared(tmp_path, paths["val"]), "val": prepared(tmp_path, paths["val"])})


@pytest.mark.parametrize(("columns", "message"), [
    ({"image_url": ["http://x"], "caption": ["a"]}, "holds no image bytes .*not their URLs alone"),
    ({"image": GOOD[:1]}, "no captions"),
    ({"image": ["text"], "caption": ["a"]}, "holds no image bytes"),
    ({"image": [b"x"], "caption": ["a"]}, "none of 1 rows .*not an image")])
def test_files_without_what_is_needed(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, write(tmp_path / "a.parquet", **columns))


def test_a_glob_reaches_every_depth_and_an_empty_one_nothing(tmp_path, monkeypatch):
    (tmp_path / "one/two").mkdir(parents=True)
    paths = [write(tmp_path / place, image=GOOD[:1], caption=["a"])
             for place in ("a.parquet", "one/b.parquet", "one/two/c.parquet")]
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
    for _ in exp.read_group(tmp_path / "a.parquet", 0, True):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 0.5 * 640 * 50_000


def test_a_caption_that_is_no_text_is_a_bad_row(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], dtype=np.int32).tobytes())
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfec")])
    split = prepared(tmp_path, write(tmp_path / "a.parquet", image=GOOD[:3], caption=broken, id=broken))
    assert (split.captions.tolist(), split.ids.tolist()) == ([["a"], ["c"]], ["a", "c"])
    (name, row, cause), = split.bad
    assert (name, row) == ("a.parquet", 1)
    assert "codec can't decode" in cause


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match=r"dataset.train_parquet=.*no parquet files there.*--demo"):
        prepared(tmp_path, tmp_path / "nothing.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"a.parquet: cannot be read"):
        prepared(tmp_path, tmp_path / "a.parquet")
    path = write(tmp_path / "b.parquet", image=GOOD, caption=list("abcdef"))
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(len(whole) // 2) + whole[40 + len(whole) // 2:])
    with pytest.raises(UserError, match=r"b.parquet, row group 0: cannot be read"):
        prepared(tmp_path, path)


def test_a_cache_cut_short_goes_on_where_it_was(tmp_path, scenes, monkeypatch):
    path = f"{scenes}/pixmo_train.parquet"
    whole = prepared(tmp_path / "a", path)
    real, calls = exp.index_rows, itertools.count()

    def stopped(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(exp, "index_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "b", path)
    folder, = (tmp_path / "b/cache").glob("images512_*")
    (folder / "2.pt").rename(folder / ".2.pt.tmp")  # the third was not yet whole
    seen = []
    monkeypatch.setattr(exp, "index_rows", lambda *args: (seen.append(0), real(*args))[1])
    again = prepared(tmp_path / "b", path)
    assert len(seen) == 4  # of six
    assert np.array_equal(exp.gather_images(again, np.arange(87)), exp.gather_images(whole, np.arange(87)))
    for name in ("captions", "ids", "place", "picture", "number"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert again.bad == whole.bad
    for i in range(6):
        one, other = (next((tmp_path / f"{run}/cache").glob(f"*/{i}.pt")).read_bytes() for run in "ab")
        assert one == other
    seen.clear()
    prepared(tmp_path / "b", path)
    assert seen == []


def test_a_cache_goes_on_within_a_row_group_and_fills_a_gap(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(exp, "BLOCK_ROWS", 6)  # of groups of 16
    path = f"{scenes}/pixmo_train.parquet"
    whole = prepared(tmp_path, path)
    squares, blocks = exp.gather_images(whole, np.arange(87)), [*(tmp_path / "cache").glob("images6_*/*.pt")]
    assert len(blocks) == 17
    for block in blocks:
        if block.stem not in ("0", "5"):
            block.unlink()
    again = prepared(tmp_path, path)
    assert torch.equal(exp.gather_images(again, np.arange(87)), squares)
    assert (again.captions.tolist(), again.place.tolist()) == (whole.captions.tolist(), whole.place.tolist())


@pytest.mark.parametrize("damage", ["short", "a flipped byte of a picture", "a flipped byte of the index"])
def test_a_damaged_cache_is_refused(tmp_path, scenes, damage):
    path = f"{scenes}/pixmo_val.parquet"
    expected = exp.gather_images(prepared(tmp_path, path), np.arange(23))
    file, = (tmp_path / "cache").glob("images512_*/1.pt")
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("archive/data/0" if "picture" in damage else "archive/data.pkl")
    content[member.header_offset + 200] ^= 1
    file.write_bytes(content if "flipped" in damage else content[:100])
    with pytest.raises(UserError, match=r"1\.pt is damaged; delete it to make it again"):
        prepared(tmp_path, path)
    file.unlink()
    assert torch.equal(exp.gather_images(prepared(tmp_path, path), np.arange(23)), expected)


def test_runs_that_start_together_decode_once(tmp_path, scenes, monkeypatch):
    real, seen = exp.index_rows, []
    monkeypatch.setattr(exp, "index_rows", lambda *args: (seen.append(0), real(*args))[1])
    with exp.ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: prepared(tmp_path, f"{scenes}/pixmo_train.parquet"), range(2))
    assert len(seen) == 6
    assert torch.equal(*(exp.gather_images(split, np.arange(87)) for split in (one, other)))


def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, scenes):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"dataset.cache_dir=.*cannot be written"):
        prepared(tmp_path, f"{scenes}/pixmo_val.parquet")


def test_no_room_for_the_cache_is_said_before_decoding(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(exp.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100_000})())
    with pytest.raises(UserError, match=r"do not fit.*dataset.cache=false"):
        prepared(tmp_path, f"{scenes}/pixmo_train.parquet", size=64)
    assert len(prepared(tmp_path, f"{scenes}/pixmo_train.parquet", cache="false")) == 87


def test_an_epoch_is_every_row_once_shuffled_by_windows_of_row_groups(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(exp, "SHUFFLE_ROWS", 30)
    split = prepared(tmp_path, f"{scenes}/pixmo_train.parquet")
    orders = [exp.epoch_order.__wrapped__(split, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert np.array_equal(orders[0], orders[1])
    assert not any(np.array_equal(orders[0], other) for other in orders[2:])
    for order in orders:
        assert sorted(order) == list(range(len(split)))
        first = split.place[order[:31], 1]  # two groups of 15 or 16 good rows
        assert len(set(first[:30])) == 2
        assert len(set(np.diff(first[:16]))) > 1  # mixed inside the window


def test_rows_are_the_same_with_and_without_cache_and_threads(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(exp, "SHUFFLE_ROWS", 20)
    rows = np.random.default_rng(0).permutation(87)
    stored, decoded = (prepared(tmp_path, f"{scenes}/pixmo_train.parquet", cache=c) for c in ("true", "false"))
    assert not decoded.squares
    with exp.ThreadPoolExecutor(2) as pool:
        threaded = prepared(tmp_path / "t", f"{scenes}/pixmo_train.parquet", pool.map)
        assert torch.equal(exp.gather_images(threaded, rows), exp.gather_images(stored, rows))
        for part in np.array_split(rows, 9):
            expected = exp.gather_images(stored, part)
            assert np.array_equal(exp.gather_images(decoded, part), expected)
            assert np.array_equal(exp.gather_images(decoded, part, pool.map), expected)
    exp.gather_images(decoded, np.array([0]))
    assert sum(map(len, decoded.held.values())) <= 40


# --------------------------------------------------------------------------------------------------------------- tokens

def test_words_are_read_by_their_longest_pieces():
    captions = ["the red circle", "the red square is red"] * 3 + ["walking", "talking", "a jumping dog"]
    vocabulary = exp.build_vocabulary(captions, 60)
    assert vocabulary[:3] == ["<pad>", "<start>", "<unknown>"]
    assert {"the", "red", "circle", "square", "is"} <= set(vocabulary)
    assert "##ing" in vocabulary or "##king" in vocabulary or "##alking" in vocabulary
    assert len(vocabulary) == len(set(vocabulary)) <= 60

    def spelled(text):
        ids, = exp.tokenise([text], vocabulary, 100)
        assert ids[0] == exp.START
        return [vocabulary[i] for i in ids[1:]]
    assert spelled("The RED circle") == ["the", "red", "circle"]
    assert spelled("") == []
    for text in ("the red circle", "walking", "dog talking", "redcircle"):
        assert "".join(piece.removeprefix("##") for piece in spelled(text)) == text.replace(" ", "")
    assert spelled("redtalking")[0] == "red"  # the longest first
    assert spelled("日本") == ["<unknown>", "<unknown>"]
    assert len(exp.tokenise(["the red circle"], vocabulary, 2)[0]) == 2
    assert exp.build_vocabulary(captions, 60) == vocabulary


# -------------------------------------------------------------------------------------------------------------- batches

def test_batches_are_a_pure_function_of_seed_epoch_and_row(tmp_path, scenes):
    for overrides in (["dataset.horizontal_flip_prob=0.5"], cached(scenes)):
        data = exp.load_data(config(tmp_path, scenes, "dataset.text_dropout_prob=0.5", *overrides))
        rows = np.array([5, 0, 60, 33])
        batch, other = exp.make_batch(data, rows, epoch=1), exp.make_batch(data, rows[::-1].copy(), epoch=1)
        assert torch.equal(batch["image"], other["image"].flip(0))
        assert torch.equal(batch["ids"][:, 0], other["ids"][:, 0].flip(0))
        n = min(batch["text"].shape[1], other["text"].shape[1])
        assert torch.equal(batch["text"][:, :n], other["text"].flip(0)[:, :n])
        assert not torch.equal(batch["text"], exp.make_batch(data, rows, epoch=2)["text"])
        plain = [exp.make_batch(data, rows) for _ in range(2)]
        assert all(torch.equal(plain[0][key], plain[1][key]) for key in plain[0])
        assert (plain[0]["ids"] >= 0).all()


def test_crops_and_flips_are_those_of_the_stored_square(tmp_path, scenes):
    data = exp.load_data(config(tmp_path, scenes, "dataset.horizontal_flip_prob=0.5"))
    split, rows = data.sets["train"], np.arange(30)
    images = exp.make_batch(data, rows, epoch=3)["image"]
    margin = split.squares[0].shape[0] - 32
    assert margin == 5
    draw = {what: exp.uniform(42, 3, rows, what) for what in ("top", "left", "flip")}
    top, left = (np.floor(draw[side] * (margin + 1)).astype(int) for side in ("top", "left"))
    assert {*top, *left} == set(range(margin + 1))
    assert 5 < (draw["flip"] < 0.5).sum() < 25
    for i, row in enumerate(rows):
        cut = split.squares[split.number[row]].numpy()[top[i]:top[i] + 32, left[i]:left[i] + 32].astype(np.float32)
        cut = cut[:, ::-1] if draw["flip"][i] < 0.5 else cut
        torch.testing.assert_close(images[i], torch.from_numpy(cut / 127.5 - 1).permute(2, 0, 1))
    middle = exp.gather_images(split, rows[:4])[:, 2:34, 2:34] / 127.5 - 1
    torch.testing.assert_close(exp.make_batch(data, rows[:4])["image"], middle.permute(0, 3, 1, 2))


def test_text_dropout_has_its_rate_and_never_touches_evaluation(tmp_path, scenes):
    data = exp.load_data(config(tmp_path, scenes, "dataset.text_dropout_prob=0.3"))
    rows = np.arange(87)
    dropped = torch.stack([exp.make_batch(data, rows, epoch=e)["ids"][:, 1] == -1 for e in range(60)])
    assert abs(dropped.float().mean() - 0.3) < 0.03
    batch = exp.make_batch(data, rows, epoch=0)
    assert (batch["text_mask"][dropped[0]].sum(1) == 1).all()  # the start token alone
    assert (batch["text"][dropped[0], 0] == exp.START).all()
    assert (batch["text_mask"][~dropped[0]].sum(1) > 1).all()
    assert (exp.make_batch(data, rows)["ids"] >= 0).all()
    features = exp.load_data(config(tmp_path, scenes, *cached(scenes, "dataset.text_dropout_prob=0.3")))
    batch = exp.make_batch(features, rows[:80], epoch=0)
    gone = batch["ids"][:, 1] == -1
    assert not batch["text_mask"][gone].any()  # no token at all
    assert batch["text_mask"][~gone].any(1).all()
    assert batch["image_mask"].all()


def test_a_dropped_row_keeps_its_photo():
    """Rows 0 and 1 are of photo 7, the caption of row 0 is dropped, as is that of row 3."""
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(4, 8, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.tensor([[7, -1], [7, 1], [3, 2], [5, -1]])
    loss, _ = exp.matryoshka_loss(image, text, [8], 5.0, ids=ids, false_negatives="mask")
    logits = 5 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    masked = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ((0, 1), (0, 3)):
        masked[i, j] = masked[j, i] = True
    logits = logits.masked_fill(masked, -torch.inf)
    expected = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_uniform_numbers_are_uniform_and_independent():
    x = exp.uniform(1, 2, np.arange(100_000), "top")
    assert 0 <= x.min() < x.max() < 1
    assert abs(x.mean() - 0.5) < 0.005
    assert abs(np.histogram(x, 10, (0, 1))[0] - 10_000).max() < 500
    for other in (exp.uniform(1, 3, np.arange(100_000), "top"), exp.uniform(2, 2, np.arange(100_000), "top"),
                  exp.uniform(1, 2, np.arange(100_000), "left"), exp.uniform(1, 2, np.arange(1, 100_001), "top")):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.015


# ------------------------------------------------------------------------------------------------------------- features

def write_features(path, ids, feats, **more):
    torch.save({"feats": feats, "ids": ids, "model": "x", **more}, path)
    return str(path)


def feature_config(tmp_path, scenes, image, text):
    """A config of features of the scenes' ids: image, text: (ids, feats, and what else the file has)."""
    paths = [write_features(tmp_path / f"{side}.pt", *content[:2], **dict(*content[2:]))
             for side, content in (("image", image), ("text", text))]
    return config(tmp_path, scenes, "vision_encoder.name=cached", "text_encoder.name=cached",
                  f"vision_encoder.features_file={paths[0]}", f"text_encoder.features_file={paths[1]}")


def scene_ids(scenes):
    return [i for part in ("train", "val", "test")
            for i in pq.read_table(f"{scenes}/pixmo_{part}.parquet")["image_id"].to_pylist()]


def test_features_go_with_their_rows_and_captions(tmp_path, scenes):
    """Pooled features of images, ids in another order; token features of captions, several rows an id, with padding."""
    ids, g = scene_ids(scenes), torch.Generator().manual_seed(0)
    images = {i: torch.randn(6, generator=g).half() for i in ids}
    captions = [(i, torch.randn(3, 5, generator=g).half(), 1 + k) for i in ids for k in range(i % 3 + 1)]
    mask = torch.arange(3) < torch.tensor([n for *_, n in captions])[:, None]
    cfg = feature_config(tmp_path, scenes, image=(ids[::-1], torch.stack([images[i] for i in ids[::-1]])),
                         text=(torch.tensor([i for i, *_ in captions]), torch.stack([x for _, x, _ in captions]),
                               {"mask": mask}))
    data = exp.load_data(cfg)
    assert data.facts["widths"] == {"vision": 6, "text": 5}
    rows = np.array([3, 50, 0, 17])
    batch = exp.make_batch(data, rows)
    assert batch["image"].shape == (4, 1, 6)
    for b, row in enumerate(rows):
        name = int(data.sets["train"].ids[row])
        assert torch.equal(batch["image"][b, 0], images[name])
        expected = torch.cat([x[:n] for i, x, n in captions if i == name])
        assert torch.equal(batch["text"][b][batch["text_mask"][b]], expected)
    seen = [exp.make_batch(data, rows, epoch=e)["text_mask"].sum(1) for e in range(40)]
    for b, row in enumerate(rows):  # every subset of the captions but none
        lengths = [1 + k for k in range(int(data.sets["train"].ids[row]) % 3 + 1)]
        subsets = {sum(part) for n in range(1, len(lengths) + 1) for part in itertools.combinations(lengths, n)}
        assert {int(x[b]) for x in seen} - {0} <= subsets


def test_captions_alone_will_do_where_features_are_given(tmp_path):
    paths = {name: write(tmp_path / f"{name}.parquet", id=list(ids),
                         caption=["the same" if i in "ef" else f"caption {i}" for i in ids],
                         image_url=["http://x"] * len(ids))
             for name, ids in {"train": "abcdefgh", "val": "ijk", "test": "lmn"}.items()}
    g = torch.Generator().manual_seed(0)
    ids = list("abcdefgijklmn")  # h has none
    feats = torch.randn(13, 4, generator=g)
    feats[ids.index("b")] = feats[ids.index("a")]  # the same picture twice
    feats[ids.index("g")] = feats[ids.index("l")]  # and one of the test split
    files = {side: write_features(tmp_path / f"{side}.pt", ids, feats) for side in ("image", "text")}
    cfg = common.load_config(exp.Config, None, [
        *(f"dataset.{name}_parquet={path}" for name, path in paths.items()), f"dataset.cache_dir={tmp_path / 'cache'}",
        "vision_encoder.name=cached", "text_encoder.name=cached", f"vision_encoder.features_file={files['image']}",
        f"text_encoder.features_file={files['text']}", *SMALL])
    data = exp.load_data(cfg)
    train = data.sets["train"]
    assert train.ids.tolist() == list("abcdef")
    assert sorted(train.bad) == [("train.parquet", 6, "its image is also in test"),
                                 ("train.parquet", 7, "no features in image.pt")]
    assert train.same.tolist() == [0, 0, 2, 3, 4, 4]


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file; make it with encode.py pixmo"), (b"no archive", "cannot be read"),
    ({"feats": torch.zeros(2, 3)}, "cannot be read (KeyError: 'ids')"),
    ({"feats": torch.zeros(2, 3), "ids": [1]}, "expected feats [N, D] or [N, T, D] and ids [N]"),
    ({"feats": torch.full((2, 3), torch.nan), "ids": [1, 2]}, "NaN or infinite features in row 0"),
    ({"feats": torch.zeros(2, 3), "ids": [1, 2]},
     "has no features of pixmo_train.parquet, ids such as 1000000; its own are such as 1"),
    ({"feats": torch.zeros(2, 3, 4), "ids": [1, 2], "mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
     "padding must be at the end")])
def test_features_that_are_wrong(tmp_path, scenes, capsys, content, message):
    path = tmp_path / "features.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert message in failing(tmp_path, scenes, capsys, *cached(scenes), f"vision_encoder.features_file={path}")
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_in_a_feature_file_is_refused(tmp_path, scenes, capsys):
    overrides = cached(scenes)
    file = tmp_path / "flipped.pt"
    content = bytearray((demo_data.Path(scenes) / "features/text_features.pt").read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "does not match its checksum" in failing(tmp_path, scenes, capsys, *overrides,
                                                    f"text_encoder.features_file={file}")


# ---------------------------------------------------------------------------------------------------------------- model

@pytest.mark.parametrize("kind", ["simple", "multihead", "mean"])
def test_pooling_ignores_padding_and_survives_a_row_without_tokens(kind):
    torch.manual_seed(0)
    pool = exp.Pooling(8, kind)
    x, mask = torch.randn(3, 5, 8, requires_grad=True), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0] * 5]).bool()
    pooled = pool(x, mask)
    longer = pool(torch.cat([x, 100 * torch.randn(3, 4, 8)], dim=1), F.pad(mask, (0, 4)))
    torch.testing.assert_close(pooled, longer)
    torch.testing.assert_close(pooled[0], pool(x[:1, :3], mask[:1, :3])[0])
    if kind == "mean":
        torch.testing.assert_close(pooled[0], x[0, :3].mean(0))
        tower = type("Tower", (), {"tokens": lambda self, x, m: (x, m), "pool": pool})()
        assert exp.pooling_entropy(tower, x, mask) == pytest.approx(1)  # of the tokens that are there
    if kind == "simple":
        weights = (x[0, :3] @ pool.query[0] / 8**0.5).softmax(0)
        torch.testing.assert_close(pooled[0], (weights[:, None] * x[0, :3]).sum(0))
    pooled.square().sum().backward()
    assert torch.isfinite(pooled).all()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0, 3:] == 0).all()


def test_multihead_pooling_against_torchs_attention():
    torch.manual_seed(0)
    pool, x = exp.Pooling(8, "multihead"), torch.randn(3, 5, 8)
    reference = torch.nn.MultiheadAttention(8, 8, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(8), pool.key.weight, pool.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([torch.zeros(16), pool.value.bias]))
        reference.out_proj.weight.copy_(pool.out.weight)
        reference.out_proj.bias.copy_(pool.out.bias)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 1, 0, 1, 0]]).bool()
    expected = reference(pool.query.reshape(1, 1, 8).expand(3, 1, 8), x, x, key_padding_mask=~mask)[0][:, 0]
    torch.testing.assert_close(pool(x, mask), expected)


@pytest.mark.parametrize("kind", ["simple", "multihead"])
def test_pooling_learns_which_token_counts(kind, tmp_path, scenes):
    """Of four tokens the one with a mark carries what is asked for: weights that stay even would not find it."""
    cfg = config(tmp_path, scenes)
    torch.manual_seed(0)
    pool, g = exp.Pooling(16, kind), torch.Generator().manual_seed(0)
    tower = torch.nn.ModuleDict({"pool": pool, "log_scale": torch.nn.Identity()})
    optimizer = exp.build_optimizer(cfg, tower)
    mask, losses = torch.ones(64, 4, dtype=torch.bool), []
    for _ in range(150):
        x, place = torch.randn(64, 4, 16, generator=g), torch.randint(4, (64,), generator=g)
        x[:, :, 0] = -1
        x[torch.arange(64), place, 0] = 1
        loss = (pool(x, mask)[:, 1:] - x[torch.arange(64), place, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 20 * cfg.optimization.lr * (10 if group["params"][0] is pool.query else 1)
        optimizer.step()
        losses.append(loss.item())
    entropy = exp.pooling_entropy(type("Tower", (), {"tokens": lambda self, x, m: (x, m), "pool": pool})(), x, mask)
    assert losses[-1] < (0.3 if kind == "simple" else 0.8) * losses[0]
    assert entropy < 0.9


def test_padding_does_not_change_a_caption(tmp_path, scenes):
    cfg = config(tmp_path, scenes)
    data = exp.load_data(cfg)
    model = exp.build_model(cfg, data).eval()
    batch = exp.make_batch(data, np.arange(8))
    with torch.no_grad():
        whole = model.text(batch["text"], batch["text_mask"])
        for i in range(8):
            n = int(batch["text_mask"][i].sum())
            alone = model.text(batch["text"][i:i + 1, :n], batch["text_mask"][i:i + 1, :n])[0]
            torch.testing.assert_close(alone, whole[i], atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_gradient_one_batch_is_learnt_and_checkpointing_changes_nothing(tmp_path, scenes):
    overrides = ["losses.learnable_temperature=true", "vision_encoder.dropout=0", "text_encoder.dropout=0",
                 "vision_encoder.pooling_type=multihead", "optimization.lr=1e-3"]
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
            assert parameter.grad.abs().max() > 0, name
        runs.append(losses)
    assert min(runs[0]) < 0.25 * runs[0][0]  # on the way it rises at times, elsewhere on another processor
    np.testing.assert_allclose(runs[0][:5], runs[1][:5], rtol=1e-5)
    assert model.logit_scale.item() != pytest.approx(1 / 0.07, rel=0.1)  # it moves


def test_weight_decay_is_for_matrices_and_scores_and_temperature_have_rates_of_their_own(tmp_path, scenes):
    cfg = config(tmp_path, scenes, "losses.learnable_temperature=true", "vision_encoder.pooling_type=multihead")
    model = exp.build_model(cfg, exp.load_data(cfg))
    optimizer = exp.build_optimizer(cfg, model)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, vectors, query, scale = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [
        (0.01, 2e-4), (0, 2e-4), (0, 10 * 2e-4), (0, 20 * 2e-4)]
    assert scale == {"log_scale"}
    assert query == {"vision.pool.query", "text.pool.query"}
    assert {"vision.encoder.position", "text.encoder.embed.weight", "text.norm.weight"} <= vectors
    assert {"vision.encoder.embed.weight", "text.encoder.blocks.0.linear1.weight",
            "vision.projector.1.weight"} <= matrices
    assert len(matrices) + len(vectors) + 3 == len(names)


# ------------------------------------------------------------------------------------------------------------ objective

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
            losses = [
                common.info_nce(F.normalize(image[:, :d], dim=1), F.normalize(text[:, :d], dim=1), scale, **options)
                for d in dims]
            loss = sum(w * value for w, value in zip(weights, losses, strict=True)) / sum(weights)
        else:
            loss, _ = exp.matryoshka_loss(image, text, dims, scale, weights, **options)
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-12)


def test_shares_of_a_batch_add_up_to_its_losses_and_gradients():
    g = torch.Generator().manual_seed(0)
    pairs = [torch.randn(9, 12, generator=g, dtype=torch.float64) for _ in range(2)]
    ids = torch.tensor([[0, 0], [1, -1], [2, 2], [1, 3], [4, -1], [5, 5], [0, 6], [7, -1], [8, 8]])
    results = []
    for shares in ([slice(None)], [slice(0, 2), slice(2, 7), slice(7, 9)]):
        image, text = (x.clone().requires_grad_() for x in pairs)
        parts = [exp.prefix_losses(image, text, [3, 12], 6.0, ids, "mask", rows) for rows in shares]
        losses = torch.stack([sum(part[d] for part in parts) for d in (3, 12)])
        losses.sum().backward()
        results.append((losses, image.grad, text.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    halves = [x.half() for x in pairs]
    loss, _ = exp.matryoshka_loss(*halves, [3, 12], 6.0)
    torch.testing.assert_close(loss, exp.matryoshka_loss(*(x.float() for x in halves), [3, 12], 6.0)[0])


def test_lengths_of_the_vectors_do_not_matter():
    image, text = oracle_pairs()
    factors = torch.tensor([[0.1], [3.0], [70.0], [1.0]], dtype=torch.float64)
    expected, _ = exp.matryoshka_loss(image, text, [16, 4], 10.0)
    torch.testing.assert_close(exp.matryoshka_loss(factors * image, F.normalize(text, dim=1), [16, 4], 10.0)[0],
                               expected)


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
    lambda x: exp.matryoshka_loss(x, x[:3], [4], 1.0), lambda x: exp.matryoshka_loss(x, x, [17], 1.0),
    lambda x: exp.matryoshka_loss(x, x, [0], 1.0), lambda x: exp.matryoshka_loss(x, x, [], 1.0),
    lambda x: exp.matryoshka_loss(x, x, [4, 8], 1.0, [1.0]),
    lambda x: exp.matryoshka_loss(x, x, [4], 1.0, false_negatives="mask")])
def test_wrong_arguments_of_the_loss(call):
    with pytest.raises(ValueError, match=r"must"):
        call(torch.randn(4, 16))


def test_the_drawn_sizes_are_unbiased_and_a_function_of_seed_and_step(tmp_path, scenes):
    cfg = config(tmp_path, scenes, "losses.mrl_weights=[1, 2, 5]")
    model = exp.build_model(cfg, exp.load_data(cfg))
    assert model.dims == [4, 8, 16]
    np.testing.assert_allclose(model.weights, [5 / 8, 2 / 8, 1 / 8])  # given from the largest
    for n in (1, 2, 4):
        cfg.losses.n_dims_per_step = n
        drawn = [exp.draw_dims(cfg, model, step) for step in range(4000)]
        assert drawn == [exp.draw_dims(cfg, model, step) for step in range(4000)]
        assert drawn != [exp.draw_dims(dataclasses.replace(cfg, seed=1), model, step) for step in range(4000)]
        assert {len(dims) for dims in drawn} == {n}
        for d, w in zip(model.dims, model.weights, strict=True):
            assert abs(sum(dims.count(d) for dims in drawn) / 4000 / n - w) < 0.03
    cfg.losses.n_dims_per_step, model.weights = 2, [1 / 3] * 3
    assert all(len(set(exp.draw_dims(cfg, model, step))) == 2 for step in range(100))  # equal weights: none twice
    model.weights = [5 / 8, 2 / 8, 1 / 8]
    g = torch.Generator().manual_seed(0)
    image, text, ids = torch.randn(6, 16, generator=g), torch.randn(6, 16, generator=g), torch.arange(6)
    whole = exp.objective(model, image, text, ids)
    mean = sum(w * exp.objective(model, image, text, ids, [d])["loss"]
               for w, d in zip(model.weights, model.dims, strict=True))
    torch.testing.assert_close(mean, whole["loss"])
    torch.testing.assert_close(whole["loss"], 0.25 * whole["loss_clip"] + whole["loss_mrl"])
    repeated = exp.objective(model, image, text, ids, [4, 4, 8])["loss_mrl"]
    parts = [exp.objective(model, image, text, ids, [d])["loss_mrl"] for d in (4, 8)]
    torch.testing.assert_close(repeated, (2 * parts[0] + parts[1]) / 3)
    for losses, expected in ((exp.LossConfig(), 1), (exp.LossConfig(n_dims_per_step=2), 2),
                             (exp.LossConfig(sample_single_mrl_dim=True), 1)):
        cfg.losses = losses
        assert len(exp.draw_dims(cfg, model, 0)) == expected
    for losses in (exp.LossConfig(n_dims_per_step="all"), exp.LossConfig(sample_single_mrl_dim=False),
                   exp.LossConfig(mrl=0)):
        cfg.losses = losses
        assert exp.draw_dims(cfg, model, 0) is None


def test_validation_is_of_every_row_and_every_size(tmp_path, scenes):
    cfg = config(tmp_path, scenes, "losses.mrl_weights=[1, 2, 5]")
    data = exp.load_data(cfg)
    model, ids = exp.build_model(cfg, data), torch.from_numpy(data.sets["val"].same)
    ids[1], model.drawn = ids[0], [4]  # two rows of one photo; what the last step has drawn
    row, (image, text), expected = exp.validate(cfg, model, data), exp.embed(cfg, model, data, "val"), 0
    for rows in torch.arange(23).split([12, 11]):
        for d, weight in {4: 5 / 8, 8: 2 / 8, 16: 1 / 8}.items():
            sides = (F.normalize(x[rows, :d], dim=1) for x in (image, text))
            loss = common.info_nce(*sides, 1 / 0.07, ids=ids[rows], false_negatives="mask")
            expected += len(rows) / 23 * weight * loss.item()
    assert row["val/loss_mrl"] == pytest.approx(expected, rel=1e-5)
    hits = common.retrieval_metrics(*(F.normalize(x, dim=1) for x in (image, text)), ids, ids)
    assert row["val/i2t_r5"] == pytest.approx(100 * hits["R@5"])


def test_schedule_of_the_reference():
    for step, rate in ((0, 0), (1, 2e-6), (50, 1e-4), (100, 2e-4), (325, 1.707107e-4), (550, 1e-4), (775, 2.928932e-5),
                       (999, 6.092342e-10), (1000, 0), (1500, 0)):
        assert 2e-4 * common.warmup_cosine(step, 1000, 100) == pytest.approx(rate, rel=1e-6, abs=1e-15)


# ----------------------------------------------------------------------------------------------------------- evaluation

def test_two_stages_of_everything_are_the_exact_search_and_a_collapsed_model_is_chance():
    g = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(60, 16, generator=g), dim=1)
    queries = F.normalize(gallery + 0.35 * torch.randn(60, 16, generator=g), dim=1)
    small = [F.normalize(x[:, :4], dim=1) for x in (queries, gallery)]
    for ids in (torch.arange(60), torch.arange(60) // 2):
        exact = common.retrieval_per_query(queries, gallery, ids, ids)
        assert 0.5 < exact["hit@1"].mean() < 1
        for shortlist in (60, 1000):
            for k in (1, 5, 10):
                hits = exp.two_stage_hits(small, (queries, gallery), ids, shortlist, k)
                torch.testing.assert_close(hits, exact[f"hit@{k}"])
    ids = torch.arange(60)
    top = (small[0] @ small[1].T).topk(5).indices
    expected = np.mean([t[(gallery[t] @ q).argmax()] == i for i, (q, t) in enumerate(zip(queries, top, strict=True))])
    assert exp.two_stage_hits(small, (queries, gallery), ids, 5, 1).mean().item() == pytest.approx(expected)
    whole = [queries, F.normalize(gallery + queries[0], dim=1)]
    table, _ = exp.adaptive_searches([4, 16], whole, exp.retrieval(*whole, ids), ids)
    small, row = [F.normalize(x[:, :4], dim=1) for x in whole], table["4, best 10 again by 16"]
    hits = [exp.two_stage_hits(small[::turn], whole[::turn], ids, 10, 1).mean().item() for turn in (1, -1)]
    assert (row["I2T R@1"], row["T2I R@1"]) == pytest.approx((100 * hits[0], 100 * hits[1]))
    assert hits[0] != hits[1]
    same = torch.ones(60, 16) / 4
    for k in (1, 5, 10):
        assert exp.two_stage_hits((same, same), (same, same), ids, 60, k).mean().item() == pytest.approx(k / 60)
    assert exp.two_stage_hits((same, same), (same, same), ids, 10, 1).mean() < 0.1


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


def test_geometry_against_loops():
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(30, 5, generator=g), dim=1) for _ in range(2))
    got = exp.geometry(image, text)
    pairs = [math.exp(-2 * (image[i] - image[j]).square().sum()) for i in range(30) for j in range(i)]
    assert got["uniformity image"] == pytest.approx(math.log(np.mean(pairs)), abs=1e-5)
    distances = [(a - b).square().sum().item() for a, b in zip(image, text, strict=True)]
    assert got["alignment"] == pytest.approx(np.mean(distances), abs=1e-6)
    assert got["modality gap"] == pytest.approx((image.mean(0) - text.mean(0)).norm().item(), abs=1e-6)


def test_bytes_and_what_they_hold():
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(200, 64, generator=g) + 2, dim=1)
    text = F.normalize(image + 0.03 * torch.randn(200, 64, generator=g), dim=1)
    table = exp.bytes_table([8, 64], (image, text), (image, text), torch.arange(200))
    assert [*table] == ["float32, 64", "int8, 64", "one bit, 64", "float32, 8", "int8, 8", "one bit, 8"]
    assert [row["bytes"] for row in table.values()] == [256, 64, 8, 32, 8, 1]
    recalls = {name: row["mean R@5"] for name, row in table.items()}
    exact = common.retrieval_metrics(image, text, torch.arange(200), torch.arange(200))["R@5"]
    assert recalls["float32, 64"] == pytest.approx(100 * exact, abs=3)
    assert recalls["int8, 64"] == pytest.approx(recalls["float32, 64"], abs=1)
    assert 2.5 < recalls["one bit, 8"] < recalls["one bit, 64"] <= recalls["float32, 64"]
    offset = exp.bytes_table([64], (image, text), (0 * image, 0 * text), torch.arange(200))
    assert offset["one bit, 64"]["mean R@5"] < recalls["one bit, 64"] - 10  # signs about zero say little of these
    # the shortlist is all of them, captions have another mean, one coordinate is eight times the others
    image = F.normalize(image[:40] + torch.eye(64)[0], dim=1)
    text = F.normalize(image + 0.1 * torch.randn(40, 64, generator=g) + torch.linspace(-0.2, 0.2, 64), dim=1)
    table, expected = exp.bytes_table([64], (image, text), (image, text), torch.arange(40)), {"int8": [], "one bit": []}
    for query, gallery in ((image, text), (text, image)):
        rounded = F.normalize((127 * gallery / gallery.abs().amax(1, keepdim=True)).round(), dim=1)
        bits = (gallery - gallery.mean(0)).sign()
        for name, scores in (("int8", query @ rounded.T), ("one bit", (query - query.mean(0)) @ bits.T)):
            expected[name].append(((scores > scores.diagonal()[:, None]).sum(1) < 5).double().mean())
    for name, hits in expected.items():
        assert table[f"{name}, 64"]["mean R@5"] == pytest.approx(50 * sum(hits))


# -------------------------------------------------------------------------------------------------------------- the run

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
    for name in ("results.json", "metrics.csv", "left_out.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_leaves_the_documented_files(whole, scenes, tmp_path):
    names = {p.name for p in whole.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt", "results.json",
            "per_item.pt", "report.md", "left_out.csv"} <= names
    header, *rows = (whole / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/loss_clip", "train/loss_mrl", "train/lr", "train/step", "train/epoch", "val/loss",
            "val/loss_clip", "val/loss_mrl", "val/temperature", "val/entropy_image", "val/entropy_text",
            *(f"val/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))} == set(header.split(","))
    assert [row.split(",")[0] for row in rows] == ["2", "3", "4", "5", "6", "8", "9", "10"]
    state = common.load_checkpoint(whole / "checkpoint_latest.pt")
    for row in state["history"]:
        rate = 2e-3 * common.warmup_cosine(row["train/step"] - 1, 10, 1)
        assert row["train/lr"] == pytest.approx(rate)
    epochs = [row for row in state["history"] if "val/loss" in row]
    lowest = min(epochs, key=lambda row: row["val/loss"])
    assert common.load_checkpoint(whole / "best_model.pt")["step"] == lowest["train/step"]
    assert {"epoch", "global_step", "best_val_loss", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
            "scaler_state_dict", "history", "config", "rng", "position"} <= set(state)
    assert [line.split(",")[:3] for line in (whole / "left_out.csv").read_text().splitlines()[1:]] == [
        [part, f"pixmo_{part}.parquet", "7"] for part in ("train", "val", "test")]
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    with pytest.MonkeyPatch.context() as patch:  # with the pictures
        for name, real in REAL.items():
            patch.setattr(common, name, real)
        patch.setattr(exp, "plot_sizes", REAL_SIZES)
        assert cli(tmp_path, scenes) == 0
    for name in ("training_curves", "loss_components", "lr_schedule", "embedding_space", "similarity_matrix",
                 "mrl_performance", "bytes"):
        assert (tmp_path / f"run/{name}.png").read_bytes()[:4] == b"\x89PNG", name


def test_the_tables_are_named_as_they_are_read(whole):
    results = common.read_json(whole / "results.json")
    assert [*results["tables"]] == ["retrieval", "paired difference", "ranks", "adaptive retrieval",
                                    "bytes of a gallery item", "geometry", "parts"]
    assert results["synthetic"] is True
    table, differences = results["tables"]["retrieval"], results["tables"]["paired difference"]
    assert [*table] == ["chance", "MRL 16", "MRL 8", "MRL 4", "PCA 16", "PCA 8", "PCA 4", "random coordinates 8",
                        "random coordinates 4"]
    for k in (1, 5, 10):
        assert table["chance"][f"I2T R@{k}"] == pytest.approx(100 * k / 23, abs=0.5)
    for row in table.values():
        assert row["RSUM"] == pytest.approx(sum(row[f"{way} R@{k}"] for way in exp.WAYS for k in exp.KS))
        assert row["mean R@5"] == pytest.approx((row["I2T R@5"] + row["T2I R@5"]) / 2)
        assert row["% kept"] == pytest.approx(100 * row["mean R@5"] / table["MRL 16"]["mean R@5"])
        assert row["mean R@5 low"] <= row["mean R@5"] <= row["mean R@5 high"]
    assert table["random coordinates 4"]["sd over draws"] > 0
    for pair in ("MRL 4 - MRL 16", "MRL 4 - PCA 4", "MRL 8 - random coordinates 8"):
        a, b = pair.split(" - ")
        assert differences[pair]["mean R@5"] == pytest.approx(table[a]["mean R@5"] - table[b]["mean R@5"])
    assert [*results["tables"]["parts"]] == ["MRL 16", *(f"MRL 16, {change}, {side}" for side in ("vision", "text")
                                                         for change in ("even weights", "no positions"))]
    assert {"I2T MRR", "I2T median rank", "T2I MRR", "T2I median rank"} == results["tables"]["ranks"]["MRL 4"].keys()
    assert (results["tables"]["adaptive retrieval"]["4, best 10 again by 16"]["multiply-adds a query"]
            == 23 * 4 + 10 * 16)
    items = common.load_checkpoint(whole / "per_item.pt")
    assert len(items["ids"]) == results["n"] == 23
    for row in table:
        assert exp.scores(items["rows"][row])["mean R@5"] == pytest.approx(table[row]["mean R@5"])
    assert {"prefix 4", "prefix of MRL, PCA of plain 4"} <= items["draws"].keys()
    model, cfg = exp.load_model(whole)
    assert model.dims == exp.mrl_dims(cfg.vision_encoder) == [4, 8, 16]
    assert not model.training
    assert len(model.facts["vocabulary"]) <= 120


def test_the_evaluation_is_of_the_best_model_and_its_controls_of_training_pairs(whole, monkeypatch):
    model, cfg = exp.load_model(whole)
    data, real, grouped = exp.load_data(cfg, model.facts), common.bootstrap, []
    same = data.sets["test"].same
    same[1] = same[0]  # two rows of one photo
    monkeypatch.setattr(common, "bootstrap", lambda statistic, n, groups: (grouped.append(groups),
                                                                           real(statistic, n, groups))[1])
    tables = exp.evaluate(cfg, data)["tables"]
    assert all(groups[0] == groups[1] and len({*groups.tolist()}) == len({*same.tolist()}) for groups in grouped)
    trained, sides = (exp.normalised(cfg, model, data, split) for split in ("train", "test"))
    *means, axes = exp.fit_pca(*trained)
    turned, ids = [(x - mean) @ axes for x, mean in zip(sides, means, strict=True)], torch.from_numpy(same)

    def recalls(pair, columns):
        queries, gallery = (F.normalize(x[:, columns], dim=1) for x in pair)
        return np.array([[100 * common.retrieval_metrics(*way, ids, ids)[f"R@{k}"] for k in exp.KS]
                         for way in ((queries, gallery), (gallery, queries))])
    draws = [recalls(sides, np.random.default_rng([42, i]).permutation(16)[:4]) for i in range(10)]
    for row, expected in (("MRL 8", recalls(sides, slice(8))), ("PCA 4", recalls(turned, slice(4))),
                          ("random coordinates 4", np.mean(draws, axis=0))):
        values = [[tables["retrieval"][row][f"{way} R@{k}"] for k in exp.KS] for way in exp.WAYS]
        np.testing.assert_allclose(values, expected, err_msg=row)
    spread = np.std([draw[:, 1].mean() for draw in draws], ddof=1)
    assert tables["retrieval"]["random coordinates 4"]["sd over draws"] == pytest.approx(spread)
    codes = exp.bytes_table(model.dims, sides, trained, ids)
    assert tables["bytes of a gallery item"] == {row: pytest.approx(values) for row, values in codes.items()}
    assert codes != exp.bytes_table(model.dims, sides, sides, ids)


def test_nothing_is_chosen_on_test(whole, scenes, tmp_path):
    """The test split's captions in another order: what is trained and chosen is the same to the bit."""
    shuffled = tmp_path / "scenes"
    shutil.copytree(scenes, shuffled)
    table = pq.read_table(f"{scenes}/pixmo_test.parquet")
    captions = table["caption"].to_pylist()
    table = table.set_column(table.schema.get_field_index("caption"), "caption", pa.array(captions[8:] + captions[:8]))
    pq.write_table(table, shuffled / "pixmo_test.parquet", row_group_size=16)
    assert cli(tmp_path, shuffled) == 0
    assert_nothing_chosen_on_test(tmp_path / "run", whole, ["tables", "retrieval", "MRL 16"])


MOMENTS = {  # patches of a process that kills itself there
    "while decoding": lambda: kill_at(exp, "index_rows", 3),
    "before the first checkpoint": lambda: kill_at(exp, "train_step", 2),
    "mid-epoch": lambda: kill_at(exp, "train_step", 4),
    "during a save": lambda: kill_at(torch, "save", 4, before=lambda _, file: file.write(b"torn")),
    "between the renames of a save": lambda: kill_at(os, "replace", 3, ends_with(".checkpoint_latest.pt.tmp")),
    "at an epoch's end": lambda: kill_at(exp, "validate", 1),
    "between best_model.pt and the checkpoint": lambda: kill_at(common.Run, "save", 3),
    "before a periodic checkpoint": lambda: kill_at(exp, "keep_periodic", 2),
    "in the second epoch": lambda: kill_at(exp, "train_step", 8),
    "after training": lambda: kill_at(exp, "evaluate", 1),
    "in the evaluation": lambda: kill_at(exp, "bytes_table", 1),
    "before results.json": lambda: kill_at(common, "write_json", 1, ends_with("results.json")),
    "after completion": lambda: None,
}


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory, scenes):
    base = tmp_path_factory.mktemp("killed")
    (base / "toy.yaml").write_text("optimization:\n  lr: 2e-3\n")
    folders = {moment: base / str(i) for i, moment in enumerate(MOMENTS)}
    killed(__name__, ((moment, [base / "toy.yaml", *arguments(folder, scenes)]) for moment, folder in folders.items()))
    return folders


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_rerun_with_another_number_of_workers_equals_uninterrupted(whole, scenes, killed_runs, moment):
    folder = killed_runs[moment]
    assert (folder / "run/results.json").exists() == (moment == "after completion")
    assert cli(folder, scenes, "num_workers=2") == 0
    assert_same_run(folder / "run", whole)


def test_a_finished_run_only_reports(whole, scenes, tmp_path, monkeypatch, capsys):
    before = {p: p.read_bytes() for p in whole.iterdir() if p.suffix == ".pt" or p.name == "results.json"}
    for name in ("train_step", "embed"):
        monkeypatch.setattr(exp, name, None)
    assert cli(tmp_path, scenes, f"output_dir={whole}") == 0
    out = capsys.readouterr().out
    assert "training is complete" in out
    assert "SYNTHETIC" in out
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.parametrize("overrides", [["dataset.cache=false"], ["num_workers=3", "dataset.cache=false"]])
def test_neither_cache_nor_workers_change_a_run(whole, scenes, tmp_path, overrides):
    assert cli(tmp_path, scenes, *overrides) == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(whole, scenes, tmp_path, monkeypatch, capsys, sent, code):
    real, calls = exp.train_step, itertools.count(1)

    def stopped(*args):
        if next(calls) == 3:
            signal.raise_signal(sent)
        return real(*args)
    monkeypatch.setattr(exp, "train_step", stopped)
    assert "stopped at step 3; the same command resumes" in failing(tmp_path, scenes, capsys, code=code)
    assert common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")["global_step"] == 3
    assert "no such checkpoint" in failing(tmp_path, scenes, capsys, "--stage", "evaluate")
    monkeypatch.setattr(exp, "train_step", real)
    assert cli(tmp_path, scenes) == 0
    assert_same_run(tmp_path / "run", whole)


def test_non_finite_loss_stops_with_step_and_rate(scenes, tmp_path, capsys):
    err = failing(tmp_path, scenes, capsys, "optimization.lr=1e30", "optimization.warmup_ratio=0", code=1)
    assert re.search("non-finite .*learning rate|non-finite embeddings", err)


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
    cfg = config(tmp_path, scenes, "losses.learnable_temperature=true", "losses.temperature=0.0101",
                 "optimization.lr=0.01")
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
    assert (exp.build_model(config(tmp_path, scenes, "losses.temperature=0.005"), data).logit_scale.item()
            == pytest.approx(200))


def test_periodic_checkpoints_and_the_control_without_mrl(scenes, tmp_path):
    assert cli(tmp_path, scenes, "optimization.save_every_epochs=1", "losses.mrl=0", "losses.contrastive=1",
               "dataset.test_parquet=", "vision_encoder.use_attention_pooling=false",
               "vision_encoder.projector=linear") == 0
    assert {p.name for p in (tmp_path / "run").glob("checkpoint_epoch_*")} == {
        "checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"}
    assert common.load_checkpoint(tmp_path / "run/checkpoint_epoch_1.pt")["epoch"] == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"plain 16", "plain 4", "PCA 4"} <= results["tables"]["retrieval"].keys()
    assert "MRL 16" not in results["tables"]["retrieval"]
    assert "23 val pairs, plain" in results["headline"]
    assert any("also chose the epoch" in note for note in results["notes"])
    rows = common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")["history"]
    assert all(row["train/loss"] == pytest.approx(row["train/loss_clip"]) for row in rows)


def test_embed_writes_normalised_prefixes_of_any_parquet(whole, scenes, tmp_path, capsys):
    path = write(tmp_path / "more.parquet", image=[GOOD[0], b"<html>", GOOD[2]], caption=["a red circle", "b", "日本"],
                 id=["x", "y", "z"])
    assert cli(tmp_path, scenes, f"output_dir={whole}", "--stage", "embed", "dim=8", f"parquet={path}") == 0
    assert "2 pairs x 8 dimensions, 1 rows left out" in capsys.readouterr().out
    got = torch.load(whole / "embeddings_more_8.pt", weights_only=True)
    assert got["ids"] == ["x", "z"]
    assert got["image"].shape == got["text"].shape == (2, 8)
    assert cli(tmp_path, scenes, f"output_dir={whole}", "--stage", "embed", f"parquet={path}",
               "dataset.train_parquet=gone.parquet") == 0
    full = torch.load(whole / "embeddings_more_16.pt", weights_only=True)
    for side in ("image", "text"):
        torch.testing.assert_close(got[side], F.normalize(full[side][:, :8], dim=1))
        torch.testing.assert_close(got[side].norm(dim=1), torch.ones(2))
    assert "dim=17 is more than" in failing(tmp_path, scenes, capsys, f"output_dir={whole}",
                                            "--stage", "embed", "dim=17")
    assert "no trained run to embed" in failing(tmp_path, scenes, capsys, f"output_dir={tmp_path / 'none'}",
                                                "--stage", "embed")


def test_features_end_to_end_and_compared_over_seeds(scenes, tmp_path, monkeypatch, capsys):
    overrides = cached(scenes, "optimization.num_epochs=1")
    folders = {}
    for name, more in {"mrl": [], "mrl2": ["seed=2"], "plain": ["losses.mrl=0"]}.items():
        assert cli(tmp_path, scenes, *overrides, *more, f"output_dir={tmp_path / name}") == 0
        folders[name] = tmp_path / name
    results = common.read_json(folders["mrl"] / "results.json")
    assert [*results["tables"]["parts"]] == ["MRL 16", "MRL 16, even weights, text"]  # a pooled picture is one token
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert exp.main(["--compare", *(str(folder) for folder in folders.values())]) == 0
    out = capsys.readouterr().out
    assert re.search(r"MRL 4: mrl \(2\)", out)
    assert "prefix 4" in out.split("plain - mrl (paired, 24 items)")[1]
    assert "prefix of MRL, PCA of plain 4" in out
    assert (tmp_path / "results/compare/compare.png").exists()
    assert cli(tmp_path, scenes, *overrides, f"output_dir={folders['mrl']}", "--stage", "embed", "dim=4") == 0
    assert torch.load(folders["mrl"] / "embeddings_pixmo_test_4.pt", weights_only=True)["text"].shape == (24, 4)


@pytest.mark.parametrize(("overrides", "message"), [
    (["vision_encoder.mrl_dimensions=[32]"], "32 is more than vision_encoder.projection_dim=16"),
    (["losses.mrl_weights=[1, 2]"], r"expected one for each of \[16, 8, 4\]"),
    (["losses.mrl=0", "losses.contrastive=0"], "nothing would be trained"),
    (["dataset.image_size=8"], "less than a patch of 16 pixels"),
    (["losses.n_dims_per_step=2", "losses.sample_single_mrl_dim=true"], "say the same; give one"),
    (["vision_encoder.width=18", "vision_encoder.heads=4"], "not a multiple of vision_encoder.heads=4"),
    (["optimization.betas=[0.9]"], "expected two numbers"),
    (["dataset.horizontal_flip_prob=.5", "vision_encoder.name=cached"],
     "needs vision_encoder.name=scratch; cached sees pictures once"),
    (["--demo"], "brings its own data"),
    (["dataset.val_parquet=gone"], "dataset.val_parquet=gone: no parquet files"),
    (["--fresh", "--stage", "evaluate"], "--fresh starts a run again"),
    (["dataset.text_dropuot_prob=0"], "did you mean dataset.text_dropout_prob"),
    (["device=tpu"], "is not available here")])
def test_mistakes_are_one_line(scenes, tmp_path, capsys, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)  # --demo writes its data before it sees the clash
    monkeypatch.setattr(demo_data, "write_pixmo", lambda: "demo")
    assert re.search(message, failing(tmp_path, scenes, capsys, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_run_on_other_data_is_refused(whole, scenes, tmp_path, capsys):
    err = failing(tmp_path, scenes, capsys, f"output_dir={whole}", f"dataset.train_parquet={scenes}/pixmo_val.parquet",
                  f"dataset.val_parquet={scenes}/pixmo_train.parquet")
    assert "holds a run on other data" in err


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
    defaults.output_dir = cfg.output_dir
    defaults.dataset.train_parquet, defaults.dataset.val_parquet = cfg.dataset.train_parquet, cfg.dataset.val_parquet
    assert cfg == defaults


def test_profile_counts_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = demo_data.write_pixmo
    monkeypatch.setattr(demo_data, "write_pixmo", lambda: real(sizes=(40, 8, 8)))
    path = tmp_path / "toy.yaml"
    items = [item.partition("=") for item in [*SMALL, "dataset.train_parquet=gone.parquet"]
             if not item.startswith("device")]
    path.write_text("experiment: pixmo_mrl\n" + "".join(f"{key}: {value}\n" for key, _, value in items))
    found = profile_flops.profile(path, device="cpu", overrides=["losses.n_dims_per_step=all"])
    assert found["random_data"]
    assert found["batch_size"] == 16
    cfg = common.load_config(exp.Config, path, ["device=cpu"])
    data = exp.random_data(cfg)
    b, w, patches, tokens = 16, 16, 4, exp.make_batch(data, np.arange(16))["text"].shape[1]

    def tower(n):
        return 2 * n * w * 12 * w + 4 * n * n * w + 4 * n * w + 2 * w * 16 + 2 * 16 * 16
    forward = b * (tower(patches) + 2 * patches * 3 * 16 * 16 * w + tower(tokens)) + 2 * b * b * 16
    assert found["flops_forward"] == pytest.approx(forward, rel=0.02)


# ----------------------------------------------------------------------------------------------------------- pretrained

def tiny_clip(folder):
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": 300, "max_position_embeddings": 20, "projection_dim": 8, "eos_token_id": 1,
                     "bos_token_id": 0, "pad_token_id": 1},
        vision_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 16, "projection_dim": 8}, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = [chr(i) for i in range(97, 123)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "th", "re", *letters, *(f"{c}</w>" for c in letters), ".</w>",
                  ".", ";</w>", ";"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nr e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 20, "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}))
    return folder


def clip_overrides(folder):
    return ["dataset.image_size=0", f"vision_encoder.name={folder}", f"text_encoder.name={folder}"]


def test_frozen_encoders_run_once_over_their_own_pictures(scenes, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder = tiny_clip(tmp_path / "clip")
    cfg = config(tmp_path, scenes, *clip_overrides(folder))
    data = exp.load_data(cfg)
    split = data.sets["train"]
    assert (data.facts["image_size"], data.facts["max_length"], len(split.squares[0])) == (32, 20, 40)
    assert data.facts["widths"] == {"vision": 24, "text": 16}
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    batch = exp.make_batch(data, np.arange(8))
    pixels = exp.gather_images(split, np.arange(8))[:, 4:36, 4:36] / 255.0
    pixels = ((pixels - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.4, 0.3])).permute(0, 3, 1, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(batch["image"].float(), expected, atol=4e-3, rtol=4e-3)
        for i in range(8):
            inputs = tokenizer(split.captions[i], truncation=True, max_length=20, return_tensors="pt")
            expected = clip.text_model(**inputs).last_hidden_state[0]
            torch.testing.assert_close(batch["text"][i][batch["text_mask"][i]].float(), expected, atol=4e-3, rtol=4e-3)
    dropped = exp.make_batch(data, np.arange(64), epoch=0)
    gone = dropped["ids"][:, 1] == -1
    assert (dropped["text_mask"][gone].sum(1) == 2).all()  # start and end of ""
    model = exp.build_model(cfg, data)
    assert not any("encoder" in name for name in model.state_dict())
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)  # never again
    again = exp.make_batch(exp.load_data(cfg), np.arange(8))
    assert torch.equal(again["image"], batch["image"])
    assert cli(tmp_path, scenes, *clip_overrides(folder)) == 0
    results = common.read_json(tmp_path / "run/results.json")
    assert [*results["tables"]["parts"]] == ["MRL 16", "MRL 16, even weights, vision", "MRL 16, even weights, text"]
    assert exp.load_model(tmp_path / "run")[0].text.norm.weight.shape == (16,)


def test_a_token_cache_goes_on_after_a_kill_and_a_flipped_byte_is_refused(scenes, tmp_path, monkeypatch, capsys):
    folder = tiny_clip(tmp_path / "clip")
    monkeypatch.setattr(exp, "ENCODED_ROWS", 8)
    monkeypatch.setattr(exp, "BLOCK_BATCHES", 2)
    whole, run = (config(tmp_path / name, scenes, *clip_overrides(folder)) for name in "ab")
    exp.load_data(whole)
    real, calls = common.save_checkpoint, itertools.count()

    def stopped(*args, **options):
        if next(calls) == 19:  # after ten of the squares, six of train's images, three of its captions
            raise KeyboardInterrupt
        return real(*args, **options)
    monkeypatch.setattr(common, "save_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        exp.load_data(run)
    monkeypatch.setattr(common, "save_checkpoint", real)
    assert sorted(len([*folder.glob("*.pt")]) for folder in (tmp_path / "b/cache").glob("tokens*_*")) == [3, 6]
    exp.load_data(run)
    files = [sorted((tmp_path / name / "cache").glob("tokens*_*/*.pt")) for name in "ab"]
    for one, other in zip(*files, strict=True):
        assert one.relative_to(tmp_path / "a") == other.relative_to(tmp_path / "b")
        assert one.read_bytes() == other.read_bytes()
    content = bytearray(files[1][0].read_bytes())
    content[len(content) // 2] ^= 1
    files[1][0].write_bytes(content)
    assert "is damaged; delete it to make it again" in failing(tmp_path / "b", scenes, capsys, *clip_overrides(folder))


def test_no_room_for_the_tokens_is_said_first(scenes, tmp_path, monkeypatch, capsys):
    folder = tiny_clip(tmp_path / "clip")
    monkeypatch.setattr(exp, "BLOCK_BATCHES", 1)
    monkeypatch.setattr(exp.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 60_000})())
    err = failing(tmp_path, scenes, capsys, *clip_overrides(folder), "dataset.cache=false")
    assert re.search(r"tokens32_[0-9a-f]{16}: .*do not fit", err)


def test_what_a_pretrained_encoder_does_not_take_is_one_line(scenes, tmp_path, capsys):
    folder = tiny_clip(tmp_path / "clip")
    err = failing(tmp_path, scenes, capsys, *clip_overrides(folder), "dataset.image_size=48")
    assert "does not take dataset.image_size=48" in err
    assert "cannot be read" in failing(tmp_path, scenes, capsys, f"vision_encoder.name={tmp_path / 'nothing'}",
                                       "text_encoder.name=scratch")


def test_encoders_stored_in_half_precision_are_used_in_full(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny_clip(tmp_path / "clip")
    transformers.CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    module = exp.pretrained(str(folder), "image")[1]()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_pretrained_encoders_that_cannot_be_had(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(exp.sys.modules, "transformers", None)
    assert "pip install transformers" in failing(tmp_path, scenes, capsys, "text_encoder.name=some/model")


# ------------------------------------------------------------------------------------------------------------ real data

@pytest.mark.skipif(not (SHARED / "data/pixmo").exists(), reason="no real data beside the checkout")
def test_real_photos_and_features_load(tmp_path):
    features = SHARED / "data/pixmo/features"
    cfg = config(tmp_path, SHARED / "data/pixmo", "dataset.image_size=64")
    data = exp.load_data(cfg)
    assert {name: len(split) for name, split in data.sets.items()} == {"train": 1600, "val": 200, "test": 200}
    assert all(not split.bad for split in data.sets.values())
    assert not data.synthetic
    batch = exp.make_batch(data, np.arange(4), "val")
    assert batch["image"].shape == (4, 3, 64, 64)
    assert batch["text_mask"].sum(1).min() >= 20
    cfg = config(tmp_path, SHARED / "data/pixmo", "vision_encoder.name=cached", "text_encoder.name=cached",
                 f"vision_encoder.features_file={features}/image_features.pt",
                 f"text_encoder.features_file={features}/text_features.pt")
    data = exp.load_data(cfg)
    batch = exp.make_batch(data, np.arange(4), "test")
    assert batch["image"].shape == (4, 1, 1280)
    assert batch["text"].shape == (4, 5, 384)
    assert batch["text_mask"].all()
