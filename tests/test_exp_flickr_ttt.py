"""exp_flickr_ttt.py: mels, tokens, the data tree and its quirks, padding, memories and their writes, test-time methods, exact resume, bad input."""

import io
import itertools
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn

import common
import demo_data
import exp_flickr_ttt as exp
import profile_flops
from common import UserError

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return demo_data.write_flickr8k(tmp_path_factory.mktemp("flickr") / "tree", n_photos=(30, 10, 14))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


SMALL = ["model.latent_dim=16", "model.memory_size=12", "model.num_heads=2", "model.num_layers=1", "model.image_size=14", "model.patch_size=7",
         "model.audio_channels=[4, 8]", "training.batch_size=10", "training.epochs=3", "evaluation.n_orders=2", "evaluation.n_severities=1",
         "evaluation.n_bootstrap=100", "evaluation.stream_batch=35", "num_workers=1", "device=cpu"]


def arguments(tmp_path, tree, cache, *overrides):
    (tmp_path / "toy.yaml").write_text("training:\n  learning_rate: 3e-3\n")
    return [str(tmp_path / "toy.yaml"), f"data.dir={tree}", f"data.cache_dir={cache}", f"output_dir={tmp_path / 'run'}", *SMALL, *overrides]


def config(tmp_path, tree, cache, *overrides):
    path, *rest = arguments(tmp_path, tree, cache, *overrides)
    return common.load_config(exp.Config, path, rest)


def cli(tmp_path, tree, cache, *overrides):
    return exp.main(arguments(tmp_path, tree, cache, *overrides))


@pytest.fixture
def small(tmp_path, tree, cache):
    """(cfg, data, model in eval mode) at toy size; slots and affine parameters away from where they start, so that nothing is zero by chance."""
    cfg = config(tmp_path, tree, cache)
    data = exp.load_data(cfg)
    torch.manual_seed(0)
    model = exp.build_model(cfg, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return cfg, data, model.eval()


# ---------------------------------------------------------------------------------------------------------- speech, text

@pytest.mark.skipif(not (SHARED / "oracles/mel_signal.npy").exists(), reason="the reference signal is not here")
def test_mel_of_the_reference_signal():
    mel = exp.mel_spectrogram(torch.from_numpy(np.load(SHARED / "oracles/mel_signal.npy")))
    assert mel.shape == (80, 501)
    assert mel.double().sum().item() == pytest.approx(1879975.75, rel=1e-6)
    assert mel.max().item() == pytest.approx(3507.5696, rel=2e-6)
    assert mel[40, 250].item() == pytest.approx(3.221349e-2, rel=1e-5)
    assert torch.log(mel + 1e-9).double().mean().item() == pytest.approx(-3.416813, abs=1e-5)


def test_mel_against_a_plain_transform():
    filters = exp.mel_filters(torch.device("cpu"))
    assert filters.sum().item() == pytest.approx(196.15196, abs=1e-4)
    assert (filters > 1e-6).sum() == 392
    wave = np.random.default_rng(0).standard_normal(1000)
    padded = np.pad(wave, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.stack([np.abs(np.fft.rfft(padded[160 * i:160 * i + 400] * window)) ** 2 for i in range(1 + 1000 // 160)])
    found = exp.mel_spectrogram(torch.from_numpy(wave))
    assert found.shape == (80, 7)
    assert found.T.numpy() == pytest.approx(power @ filters.double().numpy(), rel=1e-6)
    both = exp.log_mel(torch.from_numpy(np.stack([wave, wave])).view(1, 2, 1000))
    assert both.shape == (1, 2, 80, 7)
    assert torch.allclose(both[0, 1], torch.log(found + 1e-6), rtol=1e-12)


def pcm(wave, rate=16000, channels=1, stated=None, tail=b""):
    raw = wave.astype("<i2").tobytes()
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36, b"WAVE", b"fmt ", 16, 1, channels, rate, 2 * channels * rate, 2 * channels, 16, b"data",
                       len(raw) if stated is None else stated) + raw + tail


def test_read_wav_trusts_the_file_size_and_mixes_and_resamples():
    wave = (8000 * np.sin(2 * np.pi * 440 * np.arange(4000) / 16000)).astype(np.int16)
    expected = torch.from_numpy(wave.astype(np.float32) / 32768)
    for stated in (None, 0, 100, 2**32 - 1, 10**6):  # right, empty, too short, unknown, too long
        assert torch.equal(exp.read_wav(pcm(wave, stated=stated)), expected), stated
    assert torch.equal(exp.read_wav(pcm(wave, tail=b"LIST" + (4).to_bytes(4, "little") + b"abcd")), expected)  # another chunk is no sound
    stereo = np.stack([wave, np.zeros_like(wave)], axis=1)
    assert exp.read_wav(pcm(stereo, channels=2)).numpy() == pytest.approx(expected.numpy() / 2)
    slow = (8000 * np.sin(2 * np.pi * 440 * np.arange(2000) / 8000)).astype(np.int16)
    assert exp.read_wav(pcm(slow, rate=8000)).numpy()[100:-100] == pytest.approx(expected.numpy()[100:-100], abs=2e-3)
    soundfile.write(buffer := io.BytesIO(), expected.numpy(), 16000, format="WAV", subtype="FLOAT")
    assert torch.equal(exp.read_wav(buffer.getvalue()), expected)
    assert torch.equal(exp.read_wav(pcm(wave, tail=b"id3 " + (4).to_bytes(4, "little") + b"abcd")), expected)
    soundfile.write(nan := io.BytesIO(), np.full(4000, np.nan), 16000, format="WAV", subtype="FLOAT")
    for bad in (pcm(wave[:300]), pcm(wave[:0]), b"", b"junk" * 50, nan.getvalue()):
        with pytest.raises(Exception):  # noqa: B017  whatever kind: the loader counts them all
            exp.read_wav(bad)


def test_vocabulary_and_character_fallback():
    vocabulary = exp.build_vocabulary(["A dog , a Dog .", "The cat's dog ."])
    assert list(vocabulary)[:2] == ["<pad>", "<unk>"]
    assert [w for w in vocabulary if not w.startswith(("##", "<"))] == ["dog", ".", "a"]
    ids = exp.tokenise(["A dgo\u00e9 .", "", "dog " * 100], vocabulary)
    assert ids.shape == (3, 77)
    assert ids[0, :6].tolist() == [vocabulary[t] if t else 1 for t in ("a", "##d", "##g", "##o", None, ".")]
    assert ids[0, 6:].sum() == 0
    assert ids[1].tolist() == [1] + [0] * 76  # an empty caption is unknown, not nothing
    assert (ids[2] == vocabulary["dog"]).all()
    spelled = exp.tokenise(["dog dog dog"], vocabulary, spell=0.999, draws=np.random.default_rng(0))
    assert spelled.tolist() == [[vocabulary[f"##{c}"] for c in "dogdogdog"]]


# ------------------------------------------------------------------------------------------------------------------ data

def test_counts_of_a_tree_with_its_quirks(tmp_path, tree, cache):
    data = exp.load_data(config(tmp_path, tree, cache))
    assert {s: len(data.photo_of[r].unique()) for s, r in data.splits.items()} == {"train": 30, "dev": 10, "test": 14}
    assert len(data.captions) == 5 * 54
    assert data.counts == {"photos missing or broken": 1, "photos without captions": 0, "captions not spoken": 270 - 2 * 49,
                           "recordings missing or broken": 0}
    assert data.synthetic
    assert not set(data.photo_of[data.splits["train"]].tolist()) & set(data.photo_of[torch.cat([data.splits["dev"], data.splits["test"]])].tolist())
    row = int((data.speech[:, 1] > 0).nonzero()[5])  # its header says 0 bytes
    first, n = data.speech[row].tolist()
    wave = exp.read_wav(Path(data.wavs[row]).read_bytes())
    assert n == 1 + len(wave) // 160
    assert torch.equal(data.mels[first:first + n].T, exp.log_mel(wave).half())


def copy_tree(tree, target):
    shutil.copytree(tree, target)
    return target


def test_missing_and_broken_files_are_counted_and_never_zeros(tmp_path, tree):
    root = copy_tree(tree, tmp_path / "tree")
    train = (root / "Flickr8k_text/Flickr_8k.trainImages.txt").read_text().split()
    photos = [name for name in train if (root / "Flickr8k_Dataset" / name).exists()]
    (root / "Flickr8k_Dataset" / photos[0]).unlink()
    (root / "Flickr8k_Dataset" / photos[1]).write_bytes((root / "Flickr8k_Dataset" / photos[1]).read_bytes()[:200])
    wavs = [line.split() for line in (root / "flickr_audio/wav2capt.txt").read_text().splitlines()]
    mine = [w for w in wavs if w[1] in photos[2:]]
    (root / "flickr_audio/wavs" / mine[0][0]).unlink()
    (root / "flickr_audio/wavs" / mine[1][0]).write_bytes(b"RIFF")
    tokens = (root / "Flickr8k_text/Flickr8k.token.txt")
    tokens.write_bytes(b"".join(line.encode() + b"\r\n" for line in tokens.read_text().splitlines() if not line.startswith(photos[9])))
    (root / "Flickr8k_Dataset").rename(root / "Flicker8k_Dataset")
    data = exp.load_data(config(tmp_path, root, tmp_path / "cache"))
    assert len(data.photo_of[data.splits["train"]].unique()) == 30 - 3
    assert data.counts["photos missing or broken"] == 3
    assert data.counts["photos without captions"] == 1
    assert data.counts["recordings missing or broken"] == 2
    assert not any(c.endswith("\r") for c in data.captions)
    assert (data.photos.float().flatten(1).std(1) > 1).all()
    silent = [i for i, path in enumerate(data.wavs) if path and path.name in (mine[0][0], mine[1][0])]
    batch = exp.make_batch(data, torch.tensor([*silent, *data.splits["dev"][:6].tolist()]))
    assert not set(batch["audio_rows"].tolist()) & {0, 1}
    assert len(batch["text"]) == 8


def test_kaggle_captions_and_no_speech_folder(tmp_path, tree, capsys):
    root = copy_tree(tree, tmp_path / "tree")
    captions, _ = exp.read_captions(root)
    lines = ["image,caption"] + [f'{name},"{text[:2]}, said ""{k}""{text[2:]}"' for name, of in captions.items() for k, text in of.items()]
    (root / "captions.txt").write_text("\n".join(lines) + "\n")
    (root / "Flickr8k_text/Flickr8k.token.txt").unlink()
    shutil.rmtree(root / "flickr_audio")
    found, _ = exp.read_captions(root)
    name = next(iter(captions))
    assert found[name] == {k: f'{text[:2]}, said "{k}"{text[2:]}' for k, text in captions[name].items()}
    assert cli(tmp_path, root, tmp_path / "cache", "training.epochs=1", "evaluation.n_orders=1", "evaluation.plots=false") == 0
    assert "image and text alone" in capsys.readouterr().out
    results = common.read_json(tmp_path / "run/results.json")
    assert [t["direction"] for t in results["retrieval"]] == ["text -> image", "image -> text"]
    assert {c["direction"] for c in results["ttt"]["conditions"]} == {"text -> image", "image -> text"}


def test_a_text_file_may_start_with_a_mark_and_a_csv_end_with_a_blank_line(tmp_path, tree):
    root = copy_tree(tree, tmp_path / "tree")
    captions, path = exp.read_captions(root)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert exp.read_captions(root)[0] == captions
    path.unlink()
    lines = [f"{name},{text}" for name, of in captions.items() for text in of.values()]
    (root / "captions.txt").write_text("\n".join(["image,caption", *lines, "", ""]))
    assert exp.read_captions(root)[0] == captions
    for bad in ("a.jpg", 'a.jpg,"a quote', 'a.jpg,"' + "a" * 200000, "a.jpg,one,two"):
        (root / "captions.txt").write_text(f"image,caption\n{bad}\n")
        with pytest.raises(UserError, match="line 2: expected image,caption"):
            exp.read_captions(root)


def test_what_may_pass_is_not_kept_as_a_broken_file(tmp_path, tree, monkeypatch):
    paths = sorted(Path(tree, "Flickr8k_Dataset").iterdir())[:3]
    decode = (lambda raw: exp.decode_photo(raw, 4), (3, 4, 4), np.uint8, 1)
    for what, error in (("read_bytes", PermissionError(13, "Permission denied")), ("decode", MemoryError())):
        def fails(*_, error=error):
            raise error
        with monkeypatch.context() as m:
            if what == "read_bytes":
                m.setattr(Path, "read_bytes", fails)
            with pytest.raises((OSError, MemoryError)):
                exp.decoded(tmp_path, "photos4", paths, fails if what == "decode" else decode[0], *decode[1:])
    assert exp.decoded(tmp_path, "photos4", paths, *decode)[1].tolist() == [1, 1, 1]


def test_two_runs_may_decode_at_the_same_time(tmp_path, tree):
    paths, again = sorted(Path(tree, "Flickr8k_Dataset").iterdir())[:3], []

    def other_run(raw):
        if not again:
            again.append(True)
            again[0] = exp.decoded(tmp_path, "photos4", paths, *decode)[0]
        return decode[0](raw)
    decode = (lambda raw: exp.decode_photo(raw, 4), (3, 4, 4), np.uint8, 1)
    first = exp.decoded(tmp_path, "photos4", paths, other_run, *decode[1:])[0]
    assert torch.equal(first, again[0])
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left over


def test_files_are_decoded_once_and_again_when_they_change(tmp_path, tree, monkeypatch):
    root, cache = copy_tree(tree, tmp_path / "tree"), tmp_path / "cache"
    first = exp.load_data(config(tmp_path, root, cache))
    with monkeypatch.context() as m:
        m.setattr(exp, "decode_photo", None)
        m.setattr(exp, "decode_speech", None)
        again = exp.load_data(config(tmp_path, root, cache))
    assert first.fingerprint == again.fingerprint
    assert torch.equal(first.photos, again.photos)
    photo = next((root / "Flickr8k_Dataset").iterdir())
    Image.new("RGB", (50, 40), "red").save(photo)
    assert exp.load_data(config(tmp_path, root, cache)).fingerprint != first.fingerprint
    newest = max(cache.glob("mels*.bin"), key=lambda p: p.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[:-2])
    with pytest.raises(UserError, match="is damaged; delete it"):
        exp.load_data(config(tmp_path, root, cache))


def test_an_epoch_has_every_photo_once_or_every_caption(tmp_path, tree, cache):
    cfg = config(tmp_path, tree, cache)
    data = exp.load_data(cfg)
    for captions, per_photo in (("one", 1), ("all", 5)):
        cfg.data.captions = captions
        batches = exp.epoch_batches(data, cfg, 0)
        rows = torch.cat(batches)
        assert len(batches) == exp.steps_per_epoch(cfg, data) == 3 * per_photo
        assert max(map(len, batches)) <= cfg.training.batch_size
        assert torch.bincount(data.photo_of[rows])[data.photo_of[data.splits["train"]].unique()].tolist() == [per_photo] * 30
        assert all(torch.equal(a, b) for a, b in zip(batches, exp.epoch_batches(data, cfg, 0), strict=True))
        assert not torch.equal(rows, torch.cat(exp.epoch_batches(data, cfg, 1)))
    cfg.data.captions, cfg.data.spoken_share = "one", 1.0
    rows = torch.cat(exp.epoch_batches(data, cfg, 0))
    spoken_photos = data.photo_of[data.splits["train"]][data.speech[data.splits["train"], 1] > 0].unique()
    assert (data.speech[rows, 1] > 0).sum() == len(spoken_photos)
    cfg.data.captions, cfg.training.bucket = "all", 100
    lengths = [data.speech[b, 1][data.speech[b, 1] > 0].float() for b in exp.epoch_batches(data, cfg, 0)]
    within = np.mean([x.std().item() for x in lengths if len(x) > 2])
    assert within < 0.5 * torch.cat(lengths).std()


def test_augmentation_is_drawn_from_the_generator_alone(small):
    _, data, _ = small
    rows = data.splits["train"][:8]
    plain, one, same, other = (exp.make_batch(data, rows, g) for g in (None, *(np.random.default_rng(s) for s in (1, 1, 2))))
    for key in ("image", "audio"):
        assert torch.equal(one[key], same[key])
        assert not torch.equal(one[key], other[key])
        assert not torch.equal(one[key], plain[key])
    kept = one["audio"] != 0
    assert torch.equal(one["audio"][kept], plain["audio"][kept])  # SpecAugment only zeroes


# ----------------------------------------------------------------------------------------------------------------- model

def test_parameters_at_the_documents_sizes():
    with torch.device("meta"):
        model = exp.MultiModalMemoryNetwork()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(9.6e6, rel=0.01)


def test_padding_changes_nothing_in_any_modality(small):
    _, data, model = small
    spoken = (data.speech[:, 1] > 0).nonzero()[:, 0]
    rows = spoken[data.speech[spoken, 1].argsort()][[0, 5, -1]]
    batch = exp.make_batch(data, rows)
    with torch.no_grad():
        for name, keys in (("text", ("text",)), ("image", ("image",)), ("audio", ("audio", "audio_frames"))):
            together = model(**{k: batch[k] for k in keys})["central_latent"]
            for i in range(3):
                alone = exp.make_batch(data, rows[i:i + 1])
                assert (model(**{k: alone[k] for k in keys})["central_latent"][0] - together[i]).abs().max() < 1e-5, name
        longer = F.pad(batch["audio"], (0, 37), value=5.0)  # even what is not zero past the end
        longer = torch.where(torch.arange(longer.shape[2]) < batch["audio_frames"][:, None, None], longer, 5.0)
        assert (model(audio=longer, audio_frames=batch["audio_frames"])["central_latent"]
                - model(audio=batch["audio"], audio_frames=batch["audio_frames"])["central_latent"]).abs().max() < 1e-5
        padded = F.pad(batch["text"], (0, 20))
        assert (model(text=padded)["central_latent"] - model(text=batch["text"])["central_latent"]).abs().max() < 1e-5


def test_audio_as_in_the_documents_shape_and_all_frames_by_default(small):
    _, _, model = small
    audio = torch.randn(2, 80, 33)
    expected = model(audio=audio, audio_frames=torch.tensor([33, 33]))["central_latent"]
    assert torch.equal(model(audio=audio[:, None])["central_latent"], expected)
    assert expected.shape == (2, 16)


def test_every_parameter_gets_gradient_and_a_batch_is_learnt(small):
    cfg, data, _ = small
    torch.manual_seed(0)
    cfg.model.dropout = 0.0
    model = exp.build_model(cfg, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = data.splits["train"]
    rows = rows[data.speech[rows, 1] > 0][::2]  # one caption a photo: captions of one photo cannot be told apart by it
    batch, history = exp.make_batch(data, rows[:12]), []
    touched = {name: torch.zeros(()) for name, _ in model.named_parameters()}
    for step in range(150):
        history.append(exp.train_step(model, batch, optimizer))
        if step < 12:  # the fused pair is drawn anew at every step
            touched = {name: total + model.get_parameter(name).grad.abs().sum() for name, total in touched.items()}
    assert [name for name, total in touched.items() if total == 0] == []
    assert history[0].keys() == {"loss", "text_image", "text_audio", "image_audio", "fused"}
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    first = history[0]
    parts = [first[name].item() for name in ("text_image", "text_audio", "image_audio", "fused")]
    assert first["loss"].item() == pytest.approx(sum(parts[:3]) + 0.5 * parts[3], rel=1e-5)


def test_fusion_knows_what_is_there(small):
    model = small[2]
    e = {m: torch.randn(3, 16) for m in exp.MODALITIES}
    latents = [model.fuse_modalities({m: e[m] for m in subset}) for n in (1, 2, 3) for subset in itertools.combinations(exp.MODALITIES, n)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(latents, 2))
    absent, zeros = model.fuse_modalities({"text": e["text"]}), model.fuse_modalities({"text": e["text"], "image": torch.zeros(3, 16)})
    assert (absent - zeros).abs().max() > 1e-3  # the presence bit
    with pytest.raises(ValueError, match="at least one of text, image and audio"):
        model()
    with pytest.raises(ValueError, match="nothing to fuse"):
        model.fuse_modalities({})


def test_captions_of_one_photo_are_no_negatives(small, monkeypatch):
    _, data, model = small
    seen = []
    monkeypatch.setattr(common, "info_nce", lambda a, b, scale, ids, how: seen.append((scale, ids.tolist(), how)) or a.sum() * 0)
    batch = exp.make_batch(data, data.splits["train"][:8])
    exp.retrieval_losses(model, batch)
    spoken = batch["audio_rows"].tolist()
    assert [how for *_, how in seen] == ["mask"] * 4
    assert [ids for _, ids, _ in seen] == [batch["photo"].tolist()] + [[batch["photo"][i].item() for i in spoken]] * 3
    assert seen[0][0] == pytest.approx(1 / 0.07)


# ---------------------------------------------------------------------------------------------------------------- memory

def objective(slots, x, a, n):
    return 0.5 * sum(a[b, k] / max(n[k], 1) * (slots[k] - x[b]).square().sum() for b in range(len(x)) for k in range(len(slots)))


@pytest.mark.parametrize("n_queries", [1, 7])
def test_a_write_is_a_step_of_gradient_descent(n_queries):
    g = torch.Generator().manual_seed(n_queries)
    slots, x = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (10, n_queries))
    a = torch.zeros(n_queries, 10, dtype=torch.float64)
    for b in range(n_queries):
        scores = [float(slots[k] @ x[b]) / 6**0.5 for k in range(10)]
        top = sorted(range(10), key=lambda k: -scores[k])[:3]
        a[b, top] = torch.tensor([scores[k] for k in top], dtype=torch.float64).softmax(0)
    n = (a > 0).sum(0).tolist()
    leaf = slots.clone().requires_grad_()
    before = objective(leaf, x, a, n)
    before.backward()
    written = exp.memory_write(slots, x, 3, 0.1)
    assert torch.allclose(written, slots - 0.1 * leaf.grad, rtol=1e-12, atol=1e-14)
    assert objective(written, x, a, n) < before
    untouched = [k for k in range(10) if n[k] == 0]
    assert untouched
    assert torch.equal(written[untouched], slots[untouched])
    assert not torch.equal(written, slots)


def test_a_large_batch_writes_no_further_than_one_query_and_the_input_gets_no_gradient():
    slots, x = torch.randn(8, 5), torch.randn(1, 5, requires_grad=True)
    one, many = exp.memory_write(slots, x, 4, 1.0), exp.memory_write(slots, x.expand(500, -1), 4, 1.0)
    assert torch.allclose(one, many, atol=1e-5)
    assert not one.requires_grad


def test_reading_is_multi_head_attention_and_episodic_reading_has_slots_of_its_own():
    torch.manual_seed(0)
    memory = exp.SlotMemory(8, 6, 2, 3, 0.4).double().eval()
    with torch.no_grad():
        memory.slots.normal_()
    x = torch.randn(5, 8, dtype=torch.float64)

    def reference(slots, query):  # [M, D], [1, D]
        mha = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            mha.in_proj_weight.copy_(torch.cat([m.weight for m in (memory.query, memory.key, memory.value)]))
            mha.in_proj_bias.copy_(torch.cat([m.bias for m in (memory.query, memory.key, memory.value)]))
            mha.out_proj.weight.copy_(memory.out.weight)
            mha.out_proj.bias.copy_(memory.out.bias)
        return memory.norm(query + mha(query[None], slots[None], slots[None])[0][0])
    with torch.no_grad():
        for b in range(5):
            one = x[b:b + 1]
            assert torch.allclose(memory(x)[b:b + 1], reference(memory.slots, one))
            adapted = reference(exp.memory_write(memory.slots, one, 3, 0.4), one)
            assert torch.allclose(memory(x, episodic=True)[b:b + 1], adapted)
            assert (adapted - memory(x)[b:b + 1]).abs().max() > 1e-3


def test_online_memories_answer_then_write_slots_only(small):
    """As the document uses them: the flag on every module that has it, eval mode, no_grad."""
    _, data, model = small
    batch, before = exp.make_batch(data, data.splits["test"][:6]), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(text=batch["text"])["central_latent"]
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # off: not a bit
        for module in model.modules():
            if hasattr(module, "enable_ttt_updates"):
                module.enable_ttt_updates = True
        assert torch.equal(model(text=batch["text"])["central_latent"], plain)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
        assert changed == {"memories.text.slots", "central.slots"}
        assert not torch.equal(model(text=batch["text"])["central_latent"], plain)
        model.train()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model(image=batch["image"])
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items() if k.endswith("slots"))  # nor in training


def test_episodic_is_invariant_to_batch_and_order(small):
    _, data, model = small
    batch, before = exp.make_batch(data, data.splits["test"][:9]), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for key in ("text", "image"):
            whole = model(**{key: batch[key]}, episodic=True)["central_latent"]
            order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
            assert (model(**{key: batch[key][order]}, episodic=True)["central_latent"] - whole[order]).abs().max() < 1e-5
            for i in range(9):
                assert (model(**{key: batch[key][i:i + 1]}, episodic=True)["central_latent"][0] - whole[i]).abs().max() < 1e-5
            assert (model(**{key: batch[key]})["central_latent"] - whole).abs().max() > 1e-4
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_training_runs_through_the_inner_update():
    torch.manual_seed(0)
    memory = exp.SlotMemory(8, 6, 2, 3, 0.4)
    x = torch.randn(4, 8)
    gradients = []
    for episodic in (False, True):
        memory.zero_grad()
        memory(x, episodic).square().sum().backward()
        gradients.append(memory.slots.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


# ------------------------------------------------------------------------------------------------------------ evaluation

def test_directions_and_their_right_answers(small):
    _, data, _ = small
    found = exp.directions(data, "test")
    assert [d.name for d in found[:6]] == ["text -> image", "image -> text", "audio -> image", "image -> audio", "text -> audio", "audio -> text"]
    n_spoken = int((data.speech[data.splits["test"], 1] > 0).sum())
    assert [(len(d.items), len(d.gallery_items)) for d in found[:6]] == [
        (70, 14), (14, 70), (n_spoken, 14), (n_spoken // 2, n_spoken), (n_spoken, n_spoken), (n_spoken, 70)]
    for d in found:  # a perfect model, by photo or by caption as the direction asks
        n = int(max(d.ids.max(), d.gallery_ids.max())) + 1
        q = exp.ranks(d, torch.eye(n)[d.ids], torch.eye(n)[d.gallery_ids])
        assert q["hit@1"].mean() == 1, d.name
        flat = exp.ranks(d, torch.ones(len(d.ids), 2), torch.ones(len(d.gallery_ids), 2))
        assert torch.allclose(flat["hit@10"], flat["chance@10"])
        assert exp.photo_groups(data, d).max() + 1 == len(data.photo_of[data.splits["test"]].unique()) or "audio" in d.name
    strict = found[4]
    assert strict.ids.tolist() == strict.items.tolist() == strict.gallery_ids.tolist()


def test_embed_is_the_model_whatever_the_chunk_and_order(small):
    _, data, model = small
    for d in exp.directions(data, "test"):
        a, b = (exp.embed(model, data, d.query, d.items, size) for size in (5, 100))
        assert (a - b).abs().max() < 1e-5
        assert torch.allclose(a.norm(dim=1), torch.ones(len(a)))
    rows = exp.directions(data, "test")[2].items[[7, 2]]
    batch = exp.make_batch(data, rows)
    direct = F.normalize(model(audio=batch["audio"], audio_frames=batch["audio_frames"])["central_latent"], dim=1)
    assert (exp.embed(model, data, ("audio",), rows, 1) - direct).abs().max() < 1e-5


def test_interval_resamples_photos():
    groups = np.repeat(np.arange(200), 5)
    by_photo = np.repeat(np.random.default_rng(0).random(200) < 0.5, 5).astype(float)
    low, high = exp.interval(by_photo, groups, 2000, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 / 200) ** 0.5, rel=0.1)  # 200 independent photos, not 1,000 queries
    assert exp.interval(np.zeros(1000), groups, 100, 0) == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- test-time training

def test_corruptions(small):
    _, data, _ = small
    wave = torch.sin(torch.arange(16000) * 0.3)
    for snr in (20, 0):
        noise = exp.corrupt_speech(wave, "white noise", snr, np.random.default_rng(0)) - wave
        assert 10 * torch.log10(wave.square().mean() / noise.square().mean()).item() == pytest.approx(snr, abs=0.2)
    tones = torch.sin(torch.arange(16000) * 2 * np.pi * 300 / 16000), torch.sin(torch.arange(16000) * 2 * np.pi * 3000 / 16000)
    assert exp.corrupt_speech(tones[0] + tones[1], "low-pass", 1000, None).numpy() == pytest.approx(tones[0].numpy(), abs=3e-3)
    caption = "the quick brown fox jumps over the lazy dog " * 20
    draws = np.random.default_rng(0)
    swapped, dropped, longer = (exp.corrupt_text(caption, kind, 0.2, draws) for kind in ("swap", "drop", "insert"))
    assert len(swapped) == len(caption)
    assert sum(a != b for a, b in zip(swapped, caption, strict=True)) / len(caption.replace(" ", "")) == pytest.approx(0.2, abs=0.05)
    assert len(dropped) < len(caption) < len(longer)
    assert len(exp.corrupt_text(caption, "word drop", 0.3, draws).split()) == pytest.approx(0.7 * len(caption.split()), rel=0.15)
    assert exp.corrupt_text("dog", "word drop", 0.9999999, draws) == "dog"  # never nothing
    assert set(exp.NEIGHBOURS) == set("abcdefghijklmnopqrstuvwxyz")
    for modality, kinds in exp.CORRUPTIONS.items():
        items = exp.directions(data, "test")[{"text": 0, "image": 1, "audio": 2}[modality]].items[:4]
        clean = exp.raw_items(data, modality, items)
        for kind, amount in [*((k, amounts[-1]) for k, amounts in kinds.items()), exp.HELD_OUT[modality]]:
            order = torch.tensor([3, 1, 0, 2])
            one, other = (exp.corrupted_items(data, modality, rows, kind, amount, 7) for rows in (items, items[order]))
            assert all(map(same, exp.take(one, order), other))
            assert not all(map(same, one, clean)), kind
            assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(one, clean, strict=True)) if modality != "text" else True


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def streams(small, modality, method, lr, order=None, stream_batch=4):
    _, data, model = small
    d = exp.directions(data, "test")[{"text": 0, "image": 1, "audio": 2}[modality]]
    raw, gallery = exp.raw_items(data, modality, d.items), exp.embed(model, data, (d.gallery,), d.gallery_items, 50)
    order = torch.arange(len(d.items)) if order is None else order
    return exp.respond(model, data, modality, raw, gallery, method, lr, order, 0.07, 50, stream_batch)


@pytest.mark.parametrize("modality", exp.MODALITIES)
@pytest.mark.parametrize("method", exp.METHODS)
def test_methods_leave_the_model_as_it_was_and_answer_before_they_adapt(small, modality, method):
    model = small[2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    none, _ = streams(small, modality, "none", None)
    adapted, share = streams(small, modality, method, 0.3 if "memory" in method else 0.05)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.enable_ttt_updates or m.ttt_lr != 0.1 for m in model.modules() if hasattr(m, "enable_ttt_updates"))
    again, _ = streams(small, modality, method, 0.3 if "memory" in method else 0.05)
    assert torch.equal(adapted, again)
    if method != "memory-episodic":
        assert (adapted[:4] - none[:4]).abs().max() < 1e-5  # the first four came before any step
    if method != "eata" or share:
        assert (adapted - none).abs().max() > 1e-4


def test_tent_moves_only_layer_norms_down_the_entropy_of_the_frozen_gallery(small, monkeypatch):
    _, data, model = small
    d = exp.directions(data, "test")[0]
    gallery, inputs = exp.embed(model, data, ("image",), d.gallery_items, 50), exp.as_input(data, "text", exp.raw_items(data, "text", d.items))

    def entropy():
        with torch.no_grad():
            p = (F.normalize(model(**inputs)["central_latent"], dim=1) @ gallery.T / 0.07).softmax(1)
            return -(p * p.log()).sum(1).mean().item()
    start, frozen, moved = entropy(), gallery.clone(), {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    real = model.load_state_dict

    def spied(state):  # the moment before the reset
        moved.update(after=entropy(), names={k for k, v in model.state_dict().items() if not torch.equal(before[k], v)})
        return real(state)
    monkeypatch.setattr(model, "load_state_dict", spied)
    exp.respond(model, data, "text", exp.raw_items(data, "text", d.items), gallery, "tent", 0.01, torch.arange(len(d.items)).repeat(4), 0.07, 50, 70)
    assert moved["after"] < start
    assert moved["names"] == {k for k in before if k.startswith("encoders.text.") and "norm" in k}
    assert torch.equal(gallery, frozen)


def test_eata_keeps_the_sure_and_the_new():
    gallery = torch.eye(10)
    z = torch.stack([gallery[0], gallery[1], torch.ones(10) / 10**0.5])  # two sure, one at a loss
    memory = []
    loss, share = exp.entropy_loss(z, gallery, 0.07, True, memory)
    assert share == pytest.approx(2 / 3)
    p = (z @ gallery.T / 0.07).softmax(1)
    h = -(p * p.log()).sum(1)
    assert loss.item() == pytest.approx((h[:2] * (0.4 * np.log(10) - h[:2]).exp()).mean().item(), rel=1e-5)
    assert torch.allclose(memory[0], p[:2].mean(0))
    loss, share = exp.entropy_loss(z, gallery, 0.07, True, memory)  # the same again: not new
    assert (loss, share) == (None, 0.0)
    assert exp.entropy_loss(gallery[5:6], gallery, 0.07, True, memory)[1] == 1.0


# ------------------------------------------------------------------------------------------------------------ whole runs

@pytest.fixture(scope="module")
def whole(tmp_path_factory, tree, cache):
    folder = tmp_path_factory.mktemp("whole")
    assert cli(folder, tree, cache) == 0
    return folder / "run"


def assert_same_run(folder, whole, tested=True):
    assert not tested or (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, other = (common.load_checkpoint(f / "checkpoint_latest.pt")["model_state_dict"] for f in (folder, whole))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_leaves_the_documented_files_and_every_row_has_its_chance(whole):
    assert {p.name for p in whole.iterdir()} >= {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt",
                                                 "results.json", "results.txt", "training_curves.png", "retrieval.png", "ttt_R1.png", "ttt_R10.png",
                                                 "ttt_changes.png"}
    results = common.read_json(whole / "results.json")
    assert results["synthetic"] is True
    assert len(results["retrieval"]) == 11
    assert all(0 < row[f"chance_R@{k}"] <= 1 and 0 <= row[f"R@{k}"] <= 1 for row in results["retrieval"] for k in (1, 5, 10))
    ttt = results["ttt"]
    assert {c["method"] for c in ttt["conditions"]} == {"none", *exp.METHODS}
    assert len(ttt["conditions"]) == 6 * (2 * 4 + 2 * 4 + 2 * 2)  # methods x (text, image: clean + 3; audio: clean + 1), two directions each
    assert {(row["direction"], row["method"]) for row in ttt["summary"]} == {(d["direction"], m) for d in results["retrieval"][:6]
                                                                             for m in ("none", *exp.METHODS)}
    for row in ttt["summary"]:
        clean = [c for c in ttt["conditions"] if c["direction"] == row["direction"] and c["method"] == row["method"] and c["corruption"] == "clean"]
        assert [c["R@10"] for c in clean] == pytest.approx([row["clean_R@10"]])
        if row["method"] == "none":
            assert row["corrupted_R@10_95%"] == [0, 0]
            retrieval = next(r for r in results["retrieval"] if r["direction"] == row["direction"])
            assert (row["clean_R@1"], row["clean_R@10"]) == pytest.approx((retrieval["R@1"], retrieval["R@10"]))
    text = (whole / "results.txt").read_text()
    assert text.count("chance") > 17
    assert "SYNTHETIC" in text
    state = common.load_checkpoint(whole / "checkpoint_latest.pt")
    assert state["global_step"] == 9
    assert len((whole / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_a_null_result_is_called_one(whole):
    results = common.read_json(whole / "results.json")
    for row in results["ttt"]["summary"]:
        row["corrupted_R@10_95%"] = [-0.01, 0.01]
    assert "0 of 24 intervals lie above 0" in exp.report(results)
    assert "NULL RESULT" in exp.report(results)
    results["ttt"]["summary"][1]["corrupted_R@10_95%"] = [0.01, 0.02]
    assert "1 of 24 intervals lie above 0 (about 0.6 would by chance): memory-episodic, text -> image" in exp.report(results)
    assert "NULL RESULT" not in exp.report(results)


def test_features_that_cannot_be_corrupted_are_not_compared(whole):
    results = common.read_json(whole / "results.json")
    for row in results["ttt"]["summary"]:
        if row["direction"].startswith("image"):
            for key in [key for key in row if key.startswith("corrupted")]:
                del row[key]
    assert "0 of 16 intervals" in exp.report({**results, "ttt": {**results["ttt"], "summary": [
        row if "corrupted_R@10" not in row else row | {"corrupted_R@10_95%": [-1, 1]} for row in results["ttt"]["summary"]]}})


def test_evaluating_again_keeps_the_protocol_and_draws_what_is_missing(whole, tree, cache, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = common.read_json(tmp_path / "run/results.json")
    for name in ("ttt_changes.png", "retrieval.png"):  # a kill came before them
        (tmp_path / f"run/{name}").unlink()
    assert cli(tmp_path, tree, cache) == 0
    assert (tmp_path / "run/ttt_changes.png").exists()
    assert cli(tmp_path, tree, cache, "--stage", "evaluate", "evaluation.n_bootstrap=200") == 0
    after = common.read_json(tmp_path / "run/results.json")
    assert after["evaluation"] == {"n_bootstrap": 200}
    assert after["ttt"] == before["ttt"]
    assert (tmp_path / "run/retrieval.png").exists()


def test_photos_of_test_without_speech(tmp_path, tree):
    root = copy_tree(tree, tmp_path / "tree")
    names = (root / "Flickr8k_text/Flickr_8k.testImages.txt").read_text()
    path = root / "flickr_audio/wav2capt.txt"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if line.split()[1] not in names))
    assert cli(tmp_path, root, tmp_path / "cache", "training.epochs=1", "evaluation.n_orders=1", "evaluation.plots=false") == 0
    assert {row["direction"] for row in common.read_json(tmp_path / "run/results.json")["ttt"]["summary"]} == {"text -> image", "image -> text"}


def test_compare_averages_seeds(whole, tree, cache, tmp_path, capsys):
    results = common.read_json(whole / "results.json")
    assert cli(tmp_path, tree, cache, "--stage", "compare") == 2
    assert "compare='[folder, folder, ...]'" in capsys.readouterr().err
    other_seed = ("seed=1", "evaluation.plots=false", f"output_dir={tmp_path / '1/run'}")
    assert cli(tmp_path, tree, cache, "--stage", "evaluate", *other_seed) == 2  # not trained yet
    assert cli(tmp_path, tree, cache, "--stage", "train", *other_seed) == 0
    assert cli(tmp_path, tree, cache, "--stage", "evaluate", *other_seed) == 0
    other = common.read_json(tmp_path / "1/run/results.json")
    assert cli(tmp_path, tree, cache, "--stage", "compare", f"compare=[{whole}, {tmp_path / '1/run'}]", f"output_dir={tmp_path / 'out'}") == 0
    text = (tmp_path / "out/compare.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    both = [100 * r["retrieval"][0]["R@10"] for r in (results, other)]
    row = next(line for line in text.splitlines() if line.startswith("  run"))
    assert row.split()[1] == "2"
    assert row.endswith(f"{np.mean(both):.1f} +- {np.std(both, ddof=1):.1f}")
    first = next(s for s in results["ttt"]["summary"] if s["method"] == exp.METHODS[0])
    line = next(line for line in text.splitlines() if exp.METHODS[0] in line)  # only one of the two ran the protocol
    assert line.split()[-3:] == ["1", f"{100 * first['clean_R@10_change']:+.1f}", f"{100 * first['corrupted_R@10_change']:+.1f}"]
    assert text.endswith("[SYNTHETIC demo data]\n")
    other["retrieval"] = other["retrieval"][:2]  # a run without speech or protocol, named first, hides nothing of the others
    common.write_json(tmp_path / "1/run/results.json", other)
    assert cli(tmp_path, tree, cache, "--stage", "compare", f"compare=[{tmp_path / '1/run'}, {whole}]", f"output_dir={tmp_path / 'out'}") == 0
    text = (tmp_path / "out/compare.txt").read_text()
    assert "audio -> text" in text.split("change of R@10")[0]
    assert exp.METHODS[0] in text


@pytest.mark.parametrize("step", [2, 3, 7])
def test_interrupted_and_rerun_equals_uninterrupted(tmp_path, tree, cache, whole, monkeypatch, step):
    class Killed(BaseException):
        pass
    real, taken = exp.train_step, itertools.count()

    def killed(*args):
        if next(taken) == step:
            raise Killed
        return real(*args)
    monkeypatch.setattr(exp, "train_step", killed)
    with pytest.raises(Killed):
        cli(tmp_path, tree, cache, "--stage", "train")
    monkeypatch.setattr(exp, "train_step", real)
    assert cli(tmp_path, tree, cache, "--stage", "train") == 0
    assert_same_run(tmp_path / "run", whole, tested=False)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_and_rerun_equals_uninterrupted(whole, tree, cache, tmp_path, sent, code):
    command = [sys.executable, "exp_flickr_ttt.py", *arguments(tmp_path, tree, cache)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run/best_model.pt").exists():
        time.sleep(0.001)
    process.send_signal(sent)
    assert process.wait() == code
    tested = sent == signal.SIGKILL
    assert cli(tmp_path, tree, cache, "evaluation.plots=false", *([] if tested else ["--stage", "train"])) == 0
    assert_same_run(tmp_path / "run", whole, tested)


def test_a_finished_run_only_reports_and_an_unfinished_one_is_not_tested(tmp_path, tree, cache, whole, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run/results.json").stat().st_mtime_ns
    monkeypatch.setattr(exp, "embed", None)
    assert cli(tmp_path, tree, cache) == 0
    assert (tmp_path / "run/results.json").stat().st_mtime_ns == before
    assert "test-time training" in capsys.readouterr().out
    latest = common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")
    common.save_checkpoint(tmp_path / "run/checkpoint_latest.pt", {**latest, "global_step": 8})
    for stage in ("evaluate", "ttt"):
        assert cli(tmp_path, tree, cache, "--stage", stage) == 2
        assert "stopped at step 8 of 9" in capsys.readouterr().err


def test_stages_one_by_one_make_the_same_run(tmp_path, tree, cache, whole):
    for stage in ("cache", "train", "evaluate"):
        assert cli(tmp_path, tree, cache, "--stage", stage, "evaluation.plots=false") == 0
    assert {**common.read_json(whole / "results.json"), "ttt": None} == {**common.read_json(tmp_path / "run/results.json"), "ttt": None}
    assert "ttt" not in common.read_json(tmp_path / "run/results.json")
    assert_same_run(tmp_path / "run", whole, tested=False)


def test_precomputed_image_features(tmp_path, tree, cache, capsys):
    names = [p.stem for p in sorted(Path(tree, "Flickr8k_Dataset").iterdir())] + ["2258277193_no_such_file"]
    broken = Path(copy_tree(tree, tmp_path / "broken"), "Flickr8k_Dataset", f"{names[3]}.jpg")
    broken.write_bytes(b"no picture")
    torch.save({"feats": torch.randn(len(names), 12).half(), "ids": names}, tmp_path / "f.pt")
    cached = ["model.image_encoder=cached", f"data.image_features_file={tmp_path / 'f.pt'}"]
    data = exp.load_data(config(tmp_path, tree, cache, *cached))
    assert data.photos.shape == (55, 12)
    assert cli(tmp_path, tree, cache, *cached, "training.epochs=1", "evaluation.n_orders=1", "evaluation.plots=false") == 0
    results = common.read_json(tmp_path / "run/results.json")
    image = [c for c in results["ttt"]["conditions"] if c["direction"] == "image -> text"]
    assert {c["corruption"] for c in image} == {"clean"}  # features cannot be blurred
    torch.save({"feats": torch.arange(54)[:, None].expand(54, 12), "ids": names[:3] + names[4:]}, tmp_path / "f.pt")
    data = exp.load_data(config(tmp_path, broken.parent.parent, cache, *cached))  # encode.py leaves out what it cannot read
    assert data.counts["photos missing or broken"] == 1
    row = list(data.wavs).index(next(path for path in data.wavs if path and path.name.startswith(names[9])))
    assert data.photos[data.photo_of[row]].tolist() == [8.0] * 12
    torch.save({"feats": torch.randn(3, 12), "ids": names[:3]}, tmp_path / "f.pt")
    capsys.readouterr()
    assert cli(tmp_path, tree, cache, *cached, "training.epochs=1") == 2
    assert "no features of 52 of 55 photos" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- bad input

def append(name, text):
    def damage(root):
        path = next(Path(root).rglob(name))
        path.write_text(path.read_text() + text)
    return damage


def dev_photo_in_train(root):
    folder = Path(root, "Flickr8k_text")
    append("*trainImages.txt", (folder / "Flickr_8k.devImages.txt").read_text().split()[0] + "\n")(root)


def all_wavs_broken(root):
    for path in Path(root, "flickr_audio/wavs").iterdir():
        path.write_bytes(b"RIFF")


def keep_first(root, name):
    path = Path(root, f"Flickr8k_text/Flickr_8k.{name}.txt")
    path.write_text(path.read_text().split()[0])


def replace(root, name, old, new):
    path = next(Path(root).rglob(name))
    path.write_text(path.read_text().replace(old, new))


BAD = {
    "no photos": (lambda r: shutil.rmtree(Path(r, "Flickr8k_Dataset")), "Flickr8k_Dataset: no such file or folder; download"),
    "no captions": (lambda r: Path(r, "Flickr8k_text/Flickr8k.token.txt").unlink(), "Flickr8k.token.txt: no such file"),
    "no list": (lambda r: Path(r, "Flickr8k_text/Flickr_8k.devImages.txt").unlink(), "Flickr_8k.devImages.txt: no such file"),
    "caption line": (append("Flickr8k.token.txt", "photo.jpg no tab\n"), "line 272: expected name.jpg#k<TAB>caption"),
    "speech line": (append("wav2capt.txt", "a.wav b.jpg\n"), "expected <wav> <photo> #k, found 'a.wav b.jpg'"),
    "no speech list": (lambda r: Path(r, "flickr_audio/wav2capt.txt").unlink(), "wav2capt.txt: no such file"),
    "overlap": (dev_photo_in_train, "a photo belongs to one split, once"),
    "empty split": (lambda r: Path(r, "Flickr8k_text/Flickr_8k.testImages.txt").write_text(""), "0 of 0 listed test photos can be read"),
    "all broken": (all_wavs_broken, "fewer than 2 of its 98 recordings are readable"),
    "one photo": (lambda r: keep_first(r, "trainImages"), "1 of 1 listed train photos can be read and have captions"),
    "other names": (lambda r: replace(r, "wav2capt.txt", ".jpg", ""), "of its 98 recordings are readable and of a caption of a training photo"),
    "no recordings": (lambda r: Path(r, "flickr_audio/wav2capt.txt").write_text(""), "of its 0 recordings"),
    "not text": (lambda r: Path(r, "flickr_audio/wav2capt.txt").write_bytes(b"\xff\xfe\xff"), "wav2capt.txt: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_naming_the_file(tmp_path, tree, capsys, case):
    root = copy_tree(tree, tmp_path / "spoiled")
    damage, message = BAD[case]
    damage(root)
    assert cli(tmp_path, root, tmp_path / "cache") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_command(tmp_path, tree, cache, capsys):
    for overrides, message in ((["model.num_heads=3"], "model.latent_dim=16 must be a multiple of model.num_heads=3"),
                               (["model.patch_size=5"], "must be a multiple of model.patch_size=5"),
                               (["model.audio_channels=[]"], "leaves no convolution"),
                               (["model.image_encoder=cached"], "needs data.image_features_file="),
                               (["training.optimizer=sgd"], "expected one of adamw"),
                               (["--stage", "ttt", "--fresh"], "does not"),
                               (["--stage", "ttt"], "run the training first"),
                               (["data.dir=nowhere"], "nowhere/Flickr8k_Dataset: no such file")):
        assert cli(tmp_path, tree, cache, *overrides) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert cli(tmp_path, tree, cache, "training.learning_rate=1e30") == 1
    error = capsys.readouterr().err
    step, rate = re.search(r"non-finite loss .* in step (\d+), learning rate (\S+);", error).groups()
    assert float(rate) == pytest.approx(1e30 * common.warmup_cosine(int(step), 10, 1), rel=1e-4)  # of that very step


def test_flops_of_the_documents_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data here
    found = profile_flops.profile(ROOT / "configs/flickr8k.yaml", batch_size=2, device="cpu", repeats=1)
    assert found["random_data"]
    assert found["parameters"] == pytest.approx(9.6e6, rel=0.01)
    assert found["batch_size"] == 2
    vit = 3 * 12 * 256**2 * 2 * 197 + 2 * 2 * 3 * 197**2 * 256 + 2 * 196 * 768 * 256  # layers, attention, patches, of one photo
    frames, height, convs = 500, 80, 0
    for a, b in itertools.pairwise((1, 64, 128, 256, 512)):
        frames, height = -(-frames // 2), height // 2
        convs += 2 * 9 * a * b * frames * height
    per_item = found["flops_forward"] / 2
    assert vit + convs < per_item < 1.15 * (vit + convs)  # text, memories and losses are small beside them
    assert 1.9 < found["flops_backward"] / found["flops_forward"] < 2.1


@pytest.mark.skipif(not (SHARED / "data/flickr8k").exists(), reason="the real photos are not here")
def test_the_real_tree(tmp_path):
    cfg = config(tmp_path, SHARED / "data/flickr8k", tmp_path / "cache")
    data = exp.load_data(cfg)
    assert {s: len(data.photo_of[r].unique()) for s, r in data.splits.items()} == {"train": 753, "dev": 113, "test": 125}
    assert [int((data.speech[r, 1] > 0).sum()) for r in data.splits.values()] == [362, 113, 125]
    assert len(data.captions) == 4955
    assert not data.synthetic
    assert json.dumps(data.counts) == json.dumps({"photos missing or broken": 0, "photos without captions": 0, "captions not spoken": 4355,
                                                  "recordings missing or broken": 0})
