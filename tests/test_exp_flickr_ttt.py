"""exp_flickr_ttt.py: mels, tokens, the data tree and its quirks, memories and their writes, test-time methods, runs."""

import io
import itertools
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
from conftest import ROOT, assert_nothing_chosen_on_test
from PIL import Image

import common
import demo_data
import exp_flickr_ttt as exp
import profile_flops
from common import UserError

SHARED = ROOT.parent / "shared"
SMALL = ["model.latent_dim=16", "model.memory_size=12", "model.num_heads=2", "model.num_layers=1",
         "model.image_size=14", "model.patch_size=7", "model.audio_channels=[4, 8]", "training.batch_size=10",
         "training.epochs=3", "evaluation.n_orders=1", "evaluation.n_severities=1", "evaluation.stream_batch=35",
         "num_workers=1", "device=cpu"]
CACHED = [f"model.{m}_encoder=cached" for m in exp.MODALITIES]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return demo_data.write_flickr8k(tmp_path_factory.mktemp("flickr") / "tree", n_photos=(30, 10, 14))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def features(tmp_path_factory, tree, cache):
    folder = tmp_path_factory.mktemp("features")
    exp.write_demo_features(exp.DataConfig(dir=str(tree), cache_dir=str(cache), features_dir=str(folder)))
    return folder


@pytest.fixture(autouse=True)
def fewer_choices(monkeypatch):
    for name, method in exp.METHODS.items():
        monkeypatch.setitem(exp.METHODS, name, method._replace(choices=method.choices[-1:]))
    monkeypatch.setattr(exp, "RATES", exp.RATES[-1:])
    monkeypatch.setattr(exp, "CCA_RIDGES", (1.0,))


def arguments(tmp_path, tree, cache, *overrides):
    (tmp_path / "toy.yaml").write_text("training:\n  learning_rate: 3e-3\n")
    return [str(tmp_path / "toy.yaml"), f"data.dir={tree}", f"data.cache_dir={cache}",
            f"output_dir={tmp_path / 'run'}", *SMALL, *overrides]


def config(tmp_path, tree, cache, *overrides):
    path, *rest = arguments(tmp_path, tree, cache, *overrides)
    return common.load_config(exp.Config, path, rest)


def cli(tmp_path, tree, cache, *overrides):
    return exp.main(arguments(tmp_path, tree, cache, *overrides))


def shaken(model):
    """The model in eval mode with every parameter away from where it starts, so that nothing is zero by chance."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def small(tmp_path, tree, cache):
    cfg = config(tmp_path, tree, cache)
    data = exp.load_data(cfg)
    torch.manual_seed(0)
    return cfg, data, shaken(exp.build_model(cfg, data))


def refuse_test(monkeypatch):
    """Reading an item of the test split fails."""
    def guarded(read):
        def read_items(data, modality, items, *rest, **options):
            assert not torch.isin(items, data.items("image" if modality == "image" else "text", "test")).any()
            return read(data, modality, items, *rest, **options)
        return read_items
    for name in ("raw_items", "corrupted_items"):
        monkeypatch.setattr(exp, name, guarded(getattr(exp, name)))


def copied(tree, target):
    shutil.copytree(tree, target)
    return target


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model, before):
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------- speech, text

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
    spans = [padded[160 * i:160 * i + 400] for i in range(1 + 1000 // 160)]
    power = np.stack([np.abs(np.fft.rfft(span * window)) ** 2 for span in spans])
    mel = exp.mel_spectrogram(torch.from_numpy(wave))
    assert mel.shape == (80, 7)
    assert mel.T.numpy() == pytest.approx(power @ filters.double().numpy(), rel=1e-6)
    both = exp.log_mel(torch.from_numpy(np.stack([wave, wave])).view(1, 2, 1000))
    assert both.shape == (1, 2, 80, 7)
    assert torch.allclose(both[0, 1], torch.log(mel + 1e-6), rtol=1e-12)


def pcm(wave, rate=16000, channels=1, stated=None, tail=b""):
    raw = wave.astype("<i2").tobytes()
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36, b"WAVE", b"fmt ", 16, 1, channels, rate, 2 * channels * rate,
                       2 * channels, 16, b"data", len(raw) if stated is None else stated) + raw + tail


def test_read_wav_trusts_the_file_size_and_mixes_and_resamples():
    wave = (8000 * np.sin(2 * np.pi * 440 * np.arange(4000) / 16000)).astype(np.int16)
    expected = torch.from_numpy(wave.astype(np.float32) / 32768)
    for stated in (None, 0, 2**32 - 1, 10**6, 2000):  # right, empty, unknown, too long, too short
        assert torch.equal(exp.read_wav(pcm(wave, stated=stated)), expected), stated
    for name in (b"LIST", b"id3 "):  # another chunk is no sound
        assert torch.equal(exp.read_wav(pcm(wave, tail=name + (4).to_bytes(4, "little") + b"abcd")), expected)
    stereo = np.stack([wave, np.zeros_like(wave)], axis=1)
    assert exp.read_wav(pcm(stereo, channels=2)).numpy() == pytest.approx(expected.numpy() / 2)
    slow = (8000 * np.sin(2 * np.pi * 440 * np.arange(2000) / 8000)).astype(np.int16)
    resampled = exp.read_wav(pcm(slow, rate=8000)).numpy()
    assert resampled[100:-100] == pytest.approx(expected.numpy()[100:-100], abs=2e-3)
    soundfile.write(buffer := io.BytesIO(), expected.numpy(), 16000, format="WAV", subtype="FLOAT")
    assert torch.equal(exp.read_wav(buffer.getvalue()), expected)
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


# --------------------------------------------------------------------------------------------------------------- data

def test_counts_of_a_tree_with_its_quirks(small):
    _, data, _ = small
    n_photos = {split: len(data.photo_of[rows].unique()) for split, rows in data.splits.items()}
    assert n_photos == {"train": 30, "dev": 10, "test": 14}
    assert len(data.captions) == 5 * 54
    assert data.counts == {"photos missing or broken": 1, "photos without captions": 0,
                           "captions not spoken": 270 - 2 * 49, "recordings missing or broken": 0}
    assert data.synthetic
    train = data.splits["train"]  # alone makes the vocabulary and the scale of mels
    assert data.vocabulary == exp.build_vocabulary([data.captions[i] for i in train.tolist()])
    frames = torch.cat([data.mels[first:first + n].double() for first, n in data.speech[train].tolist()])
    assert torch.allclose(data.mel_statistics[0][:, 0], frames.mean(0).float())
    assert torch.allclose(data.mel_statistics[1][:, 0], frames.std(0).float())
    photos = [set(data.photo_of[rows].tolist()) for rows in data.splits.values()]
    assert not photos[0] & photos[1] | photos[1] & photos[2] | photos[0] & photos[2]
    row = int((data.speech[:, 1] > 0).nonzero()[5])  # its header says 0 bytes
    first, n = data.speech[row].tolist()
    wave = exp.read_wav(Path(data.wavs[row]).read_bytes())
    assert n == 1 + len(wave) // 160
    assert torch.equal(data.mels[first:first + n].T, exp.log_mel(wave).half())


def test_missing_and_broken_files_are_counted_and_never_zeros(tmp_path, tree):
    root = copied(tree, tmp_path / "tree")
    photo_dir, wav_dir = root / "Flickr8k_Dataset", root / "flickr_audio/wavs"
    train = (root / "Flickr8k_text/Flickr_8k.trainImages.txt").read_text().split()
    photos = [name for name in train if (photo_dir / name).exists()]
    (photo_dir / photos[0]).unlink()
    (photo_dir / photos[1]).write_bytes((photo_dir / photos[1]).read_bytes()[:200])
    wavs = [line.split() for line in (root / "flickr_audio/wav2capt.txt").read_text().splitlines()]
    gone, broken = [wav for wav, photo, _ in wavs if photo in photos[2:]][:2]
    (wav_dir / gone).unlink()
    (wav_dir / broken).write_bytes(b"RIFF")
    tokens = root / "Flickr8k_text/Flickr8k.token.txt"
    lines = [line for line in tokens.read_text().splitlines() if not line.startswith(photos[9])]
    tokens.write_bytes(b"".join(line.encode() + b"\r\n" for line in lines))
    photo_dir.rename(root / "Flicker8k_Dataset")
    data = exp.load_data(config(tmp_path, root, tmp_path / "cache"))
    assert len(data.photo_of[data.splits["train"]].unique()) == 30 - 3
    assert data.counts["photos missing or broken"] == 3
    assert data.counts["photos without captions"] == 1
    assert data.counts["recordings missing or broken"] == 2
    assert not any(c.endswith("\r") for c in data.captions)
    assert (data.photos.float().flatten(1).std(1) > 1).all()
    silent = [i for i, path in enumerate(data.wavs) if path and path.name in (gone, broken)]
    batch = exp.make_batch(data, torch.tensor([*silent, *data.splits["dev"][:6].tolist()]))
    assert not set(batch["audio_rows"].tolist()) & {0, 1}
    assert len(batch["text"]) == 8


def test_photos_of_16_bits_transparent_and_turned(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(deep := io.BytesIO(), "PNG")
    seen = exp.decode_photo(deep.getvalue(), 64)
    assert seen.shape == (1, 3, 64, 64)
    assert seen[0, 0, 5].tolist() == pytest.approx((ramp[0] / 257).tolist(), abs=1)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(clear := io.BytesIO(), "PNG")
    assert (exp.decode_photo(clear.getvalue(), 8) == 255).all()
    wide = Image.fromarray(np.repeat(np.array([[255, 0]], dtype=np.uint8), 20, axis=0).repeat(20, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    wide.save(turned := io.BytesIO(), "JPEG", exif=exif, quality=95)
    upright = exp.decode_photo(turned.getvalue(), 16)[0, 0].astype(int)
    assert upright[:6].min() > 230 > 25 > upright[-6:].max()


def test_kaggle_captions_and_no_speech_folder(tmp_path, tree, capsys):
    root = copied(tree, tmp_path / "tree")
    captions, path = exp.read_captions(root)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # the mark that some editors put
    assert exp.read_captions(root)[0] == captions
    lines = [f'{name},"{text[:2]}, said ""{k}""{text[2:]}"' for name, of in captions.items() for k, text in of.items()]
    (root / "captions.txt").write_text("\n".join(["image,caption", *lines, "", ""]))
    path.unlink()
    shutil.rmtree(root / "flickr_audio")
    name = next(iter(captions))
    quoted = {k: f'{text[:2]}, said "{k}"{text[2:]}' for k, text in captions[name].items()}
    assert exp.read_captions(root)[0][name] == quoted
    assert cli(tmp_path, root, tmp_path / "cache", "training.epochs=1") == 0
    assert "image and text alone" in capsys.readouterr().out
    tables = common.read_json(tmp_path / "run/results.json")["tables"]
    directions = {row.split(",")[0] for title in ("retrieval", "test time") for row in tables[title]}
    assert directions == {"text -> image", "image -> text"}
    for bad in ("a.jpg", 'a.jpg,"a quote', 'a.jpg,"' + "a" * 200000, "a.jpg,one,two"):
        (root / "captions.txt").write_text(f"image,caption\n{bad}\n")
        with pytest.raises(UserError, match="line 2: expected image,caption"):
            exp.read_captions(root)


DECODE = (lambda raw: exp.decode_photo(raw, 4), (3, 4, 4), np.uint8, 1)


def test_what_may_pass_is_not_kept_as_a_broken_file(tmp_path, tree, monkeypatch):
    paths = sorted(Path(tree, "Flickr8k_Dataset").iterdir())[:3]

    def fails(*_):
        raise PermissionError(13, "Permission denied")

    def too_large(*_):
        raise MemoryError
    with monkeypatch.context() as m:
        m.setattr(Path, "read_bytes", fails)
        with pytest.raises(OSError, match="denied"):
            exp.decoded(tmp_path, "photos4", paths, *DECODE)
    with pytest.raises(MemoryError):
        exp.decoded(tmp_path, "photos4", paths, too_large, *DECODE[1:])
    assert exp.decoded(tmp_path, "photos4", paths, *DECODE)[1].tolist() == [1, 1, 1]


def test_two_runs_may_decode_at_the_same_time(tmp_path, tree):
    paths, others = sorted(Path(tree, "Flickr8k_Dataset").iterdir())[:3], []

    def other_run(raw):
        if not others:
            others.append(None)
            others[0] = exp.decoded(tmp_path, "photos4", paths, *DECODE)[0]
        return DECODE[0](raw)
    assert torch.equal(exp.decoded(tmp_path, "photos4", paths, other_run, *DECODE[1:])[0], others[0])
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left over


def test_files_are_decoded_once_and_again_when_they_change(tmp_path, tree, monkeypatch, capsys):
    root, folder = copied(tree, tmp_path / "tree"), tmp_path / "cache"
    first = exp.load_data(config(tmp_path, root, folder))
    with monkeypatch.context() as m:
        m.setattr(exp, "decode_photo", None)
        m.setattr(exp, "decode_speech", None)
        second = exp.load_data(config(tmp_path, root, folder))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.photos, second.photos)
    photo = next((root / "Flickr8k_Dataset").iterdir())
    Image.new("RGB", (50, 40), "red").save(photo)
    assert exp.load_data(config(tmp_path, root, folder)).fingerprint != first.fingerprint
    newest = max(folder.glob("mels*.bin"), key=lambda p: p.stat().st_mtime)
    raw = newest.read_bytes()
    for damaged in (raw[:-2], raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:]):  # cut off, a flipped bit
        newest.write_bytes(damaged)
        assert cli(tmp_path, root, folder) == 2
        error = capsys.readouterr().err
        assert "is damaged; delete it" in error
        assert len(error.splitlines()) == 1


def test_an_epoch_has_every_photo_once_or_every_caption(small):
    cfg, data, _ = small
    photos = data.photo_of[data.splits["train"]].unique()
    is_spoken = data.speech[:, 1] > 0
    for captions in ("one", "all"):
        cfg.data.captions = captions
        n_batches = exp.steps_per_epoch(cfg, data)
        epochs = [exp.epoch_batches(data, 1, captions, n_batches, epoch) for epoch in range(4)]
        assert len(epochs[0]) == n_batches
        assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
        for rows in map(torch.cat, epochs):
            assert len(rows.unique()) == len(rows)
            if captions == "all":
                assert sorted(rows.tolist()) == data.splits["train"].tolist()
                continue
            n_of_photo = torch.bincount(data.photo_of[rows])[photos]
            heard = torch.isin(photos, data.photo_of[data.splits["train"]][is_spoken[data.splits["train"]]])
            spoken_of_photo = torch.bincount(data.photo_of[rows[is_spoken[rows]]], minlength=len(photos))[photos]
            assert (spoken_of_photo[heard] >= 1).all()
            assert (n_of_photo - 1 == (n_of_photo > spoken_of_photo) * heard).all()
    fresh = exp.epoch_batches.__wrapped__(data, 1, "all", n_batches, 3)
    assert all(torch.equal(a, b) for a, b in zip(fresh, epochs[3], strict=True))
    cfg.data.captions, cfg.training.batch_size = "one", 2
    n_batches = exp.steps_per_epoch(cfg, data)
    for epoch in range(8):  # BatchNorm has no variance of one row
        assert min(map(len, exp.epoch_batches(data, 1, "one", n_batches, epoch))) > 1


def test_long_epochs_put_speech_of_like_length_together(small):
    _, data, _ = small
    data.splits["train"] = torch.arange(len(data.captions))
    batches = exp.epoch_batches.__wrapped__(data, 1, "all", 90, 0)
    lengths = [data.speech[b, 1][data.speech[b, 1] > 0].float() for b in batches]
    within = np.mean([x.std().item() for x in lengths if len(x) > 1])
    assert within < 0.5 * torch.cat(lengths).std()


def test_augmentation_is_drawn_from_the_generator_alone(small):
    _, data, _ = small
    rows = data.splits["train"][:8]
    generators = (None, *(np.random.default_rng(seed) for seed in (1, 1, 2)))
    plain, one, same, other = (exp.make_batch(data, rows, g) for g in generators)
    for key in ("image", "audio"):
        assert torch.equal(one[key], same[key])
        assert not torch.equal(one[key], other[key])
        assert not torch.equal(one[key], plain[key])
    kept = one["audio"] != 0
    assert torch.equal(one["audio"][kept], plain["audio"][kept])  # SpecAugment only zeroes


# -------------------------------------------------------------------------------------------------------------- model

def test_parameters_at_the_documents_sizes_and_of_the_arms():
    with torch.device("meta"):
        sizes = {memory: sum(p.numel() for p in exp.MultiModalMemoryNetwork(memory=memory).parameters())
                 for memory in ("slots", "linear", "none")}
    assert sizes["slots"] == pytest.approx(9.6e6, rel=0.01)
    assert sizes["linear"] == sizes["slots"]
    assert sizes["none"] == pytest.approx(sizes["slots"], rel=1e-3)


def test_padding_changes_nothing_in_any_modality(small):
    _, data, model = small
    spoken = (data.speech[:, 1] > 0).nonzero()[:, 0]
    rows = spoken[data.speech[spoken, 1].argsort()][[0, 5, -1]]
    batch = exp.make_batch(data, rows)

    def latent(**inputs):
        return model(**inputs)["central_latent"]
    with torch.no_grad():
        for keys in (("text",), ("image",), ("audio", "audio_frames")):
            together = latent(**{k: batch[k] for k in keys})
            for i in range(3):
                alone = exp.make_batch(data, rows[i:i + 1])
                assert (latent(**{k: alone[k] for k in keys})[0] - together[i]).abs().max() < 1e-5, keys
        frames = batch["audio_frames"]
        longer = F.pad(batch["audio"], (0, 37))
        longer = torch.where(torch.arange(longer.shape[2]) < frames[:, None, None], longer, 5.0)  # not even zeros
        plain = latent(audio=batch["audio"], audio_frames=frames)
        assert (latent(audio=longer, audio_frames=frames) - plain).abs().max() < 1e-5
        assert (latent(text=F.pad(batch["text"], (0, 20))) - latent(text=batch["text"])).abs().max() < 1e-5


def test_audio_as_in_the_documents_shape_and_all_frames_by_default(small):
    model = small[2]
    audio = torch.randn(2, 80, 33)
    expected = model(audio=audio, audio_frames=torch.tensor([33, 33]))["central_latent"]
    assert torch.equal(model(audio=audio[:, None])["central_latent"], expected)
    assert expected.shape == (2, 16)


@pytest.mark.parametrize("cached", [False, True])
def test_every_parameter_gets_gradient_and_a_batch_is_learnt(tmp_path, tree, cache, features, cached):
    extra = [*CACHED, f"data.features_dir={features}", "model.input_dropout=0"] if cached else []
    cfg = config(tmp_path, tree, cache, "model.dropout=0", *extra)
    data = exp.load_data(cfg)
    torch.manual_seed(0)
    model = exp.build_model(cfg, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = data.splits["train"]
    # one caption a photo: those of one photo cannot be told apart by it
    rows = rows[data.speech[rows, 1] > 0][::2][:12]
    batch, history = exp.make_batch(data, rows), []
    touched = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for step in range(150):
        history.append(exp.train_step(model, batch, optimizer))
        if step < 12:  # the fused pair is drawn anew at every step
            touched = {name: x + model.get_parameter(name).grad.abs().sum().item() for name, x in touched.items()}
    assert [name for name, total in touched.items() if total == 0] == []
    names = ["text_image", "text_audio", "image_audio", "fused"]
    assert history[0].keys() == {"loss", *names}
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    total = sum((0.5 if name == "fused" else 1) * history[0][name].item() for name in names)
    assert history[0]["loss"].item() == pytest.approx(total, rel=1e-5)


def test_the_objectives_settings_are_on_the_model(small):
    _, data, model = small
    batch = exp.make_batch(data, data.splits["train"][:8])
    torch.manual_seed(0)
    warm = exp.retrieval_losses(model, batch)
    model.temperature, model.fused = 0.7, 0.0
    torch.manual_seed(0)
    cool = exp.retrieval_losses(model, batch)
    assert warm.keys() - cool.keys() == {"fused"}
    assert (cool["text_image"] - warm["text_image"]).abs() > 1e-3


def test_losses_against_their_formulas(small):
    _, data, model = small
    batch = exp.make_batch(data, data.splits["train"][:20])
    photo, spoken = batch["photo"], batch["audio_rows"]

    def plain(a, b, ids):
        logits, target = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.07, torch.arange(len(a))
        logits = logits.masked_fill((ids[:, None] == ids) & ~torch.eye(len(a), dtype=torch.bool), -torch.inf)
        return ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).item()
    with torch.no_grad():
        e = {m: model.encode(m, batch[m], batch.get(f"{m}_frames")) for m in exp.MODALITIES}
        z = {m: model.fuse_modalities({m: x}) for m, x in e.items()}
        of_spoken = {m: x if m == "audio" else x[spoken] for m, x in z.items()}
        for third in exp.MODALITIES:  # the pair knows nothing of what it is to find
            losses = exp.retrieval_losses(model, {**batch, "adapted": (False,) * 4, "third": third})
            pair = {m: x if m == "audio" else x[spoken] for m, x in e.items() if m != third}
            expected = {"text_image": plain(z["text"], z["image"], photo),
                        **{f"{m}_audio": plain(of_spoken[m], z["audio"], photo[spoken]) for m in ("text", "image")},
                        "fused": plain(model.fuse_modalities(pair), of_spoken[third], photo[spoken])}
            assert {name: x.item() for name, x in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_what_a_step_draws_and_how_far_it_goes(small):
    cfg, data, model = small
    drawn = [exp.draw_passes(model) for _ in range(400)]
    assert np.mean([x["adapted"] for x in drawn], axis=0) == pytest.approx([0.5] * 4, abs=0.1)
    assert {x["third"] for x in drawn} == set(exp.MODALITIES)
    model.through_update = False
    assert not any(any(exp.draw_passes(model)["adapted"]) for _ in range(20))
    model.temperature, optimizer = 0.005, exp.build_optimizer(cfg, model)
    exp.train_step(model, exp.make_batch(data, data.splits["train"][:8]), optimizer)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1, rel=1e-3)  # clipped
    settings = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(settings) == len([*model.parameters()])
    for name, expected in (("central.log_scale", (3e-2, 0)), ("confidence.text.weight", (5e-3, 0)),
                           ("central.slots", (3e-3, 0.01))):
        assert settings[model.get_parameter(name)] == pytest.approx(expected), name


def test_the_seed_decides_the_rows_and_the_augmentation(tmp_path, tree, cache, monkeypatch):
    class Seen(BaseException):
        pass

    def make_batch(data, rows, draws, share):
        raise Seen(tuple(rows.tolist()), draws.random())
    monkeypatch.setattr(exp, "make_batch", make_batch)
    first = []
    for seed in (1, 2):
        cfg = config(tmp_path, tree, cache, f"seed={seed}", f"output_dir={tmp_path / str(seed)}")
        with pytest.raises(Seen) as seen:
            exp.train(cfg, exp.load_data(cfg))
        first.append(seen.value.args)
    assert first[0][0] != first[1][0]
    assert first[0][1] != first[1][1]


def test_fusion_knows_what_is_there(small):
    model = small[2]
    e = {m: torch.randn(3, 16) for m in exp.MODALITIES}
    subsets = [subset for n in (1, 2, 3) for subset in itertools.combinations(exp.MODALITIES, n)]
    latents = [model.fuse_modalities({m: e[m] for m in subset}) for subset in subsets]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(latents, 2))
    absent = model.fuse_modalities({"text": e["text"]})
    for name, change in (("presence_scale", lambda: setattr(model, "presence_scale", 0.0)),
                         ("types", model.modality_type_embeddings.data.zero_)):  # each does something
        change()
        assert (model.fuse_modalities({"text": e["text"]}) - absent).abs().max() > 1e-3, name
        absent = model.fuse_modalities({"text": e["text"]})
    with pytest.raises(ValueError, match="at least one of text, image and audio"):
        model()
    with pytest.raises(ValueError, match="nothing to fuse"):
        model.fuse_modalities({})


def test_captions_of_one_photo_are_no_negatives(small, monkeypatch):
    _, data, model = small
    calls = []
    monkeypatch.setattr(common, "info_nce", lambda a, b, scale, ids, how, rows: calls.append(
        (scale, ids.tolist(), how)) or a.sum() * 0)
    batch = exp.make_batch(data, data.splits["train"][:8])
    exp.retrieval_losses(model, batch)
    photos = batch["photo"].tolist()
    spoken = [photos[i] for i in batch["audio_rows"].tolist()]
    assert [how for *_, how in calls] == ["mask"] * 4
    assert [ids for _, ids, _ in calls] == [photos, spoken, spoken, spoken]
    assert calls[0][0] == pytest.approx(1 / 0.07)


# ------------------------------------------------------------------------------------------------------------- memory

def objective(slots, x, a, n):
    return 0.5 * sum(a[b, k] / max(n[k], 1) * (slots[k] - x[b]).square().sum()
                     for b in range(len(x)) for k in range(len(slots)))


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


@pytest.mark.parametrize("linear", [False, True])
def test_reading_is_cosine_attention_and_episodic_reading_has_slots_of_its_own(linear):
    torch.manual_seed(0)
    memory = exp.SlotMemory(8, 6, 2, 3, 0.4, linear=linear).double().eval()
    x = torch.randn(5, 8, dtype=torch.float64)

    def reference(slots, query):  # [M, D], [D]
        outputs = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            q, keys, values = memory.query(query)[part], memory.key(slots)[:, part], memory.value(slots)[:, part]
            cosines = torch.stack([F.cosine_similarity(q, k, dim=0) for k in keys])
            weights = (1 + cosines) / (1 + cosines).sum() if linear else (16 * cosines).softmax(0)
            outputs.append(weights @ values)
        return memory.norm(query + memory.out(torch.cat(outputs)))
    with torch.no_grad():
        for b in range(5):
            assert torch.allclose(memory(x)[b], reference(memory.slots, x[b]), atol=1e-5)
            adapted = reference(exp.memory_write(memory.slots, x[b:b + 1], 3, 0.4), x[b])
            assert torch.allclose(memory(x, episodic=True)[b], adapted, atol=1e-5)
            assert (adapted - memory(x)[b]).abs().max() > 1e-4
    weights = memory.attention(x)
    assert weights.shape == (5, 2, 6)
    assert torch.allclose(weights.sum(2), torch.ones(5, 2).to(weights))


def test_a_new_memory_is_addressed_by_content():
    torch.manual_seed(0)
    for dim, n_slots in ((128, 32), (256, 32), (256, 64)):
        memory = exp.SlotMemory(dim, n_slots, 4, 4, 0.1)
        weights = memory.attention(torch.randn(200, dim))
        assert torch.special.entr(weights).sum(2).mean() / np.log(n_slots) < 0.75
        assert len(weights.argmax(2).unique()) > 0.9 * n_slots


def test_online_memories_answer_then_write_slots_only(small):
    """As the document uses them: the flag on every module that has it, eval mode, no_grad."""
    _, data, model = small
    batch, before = exp.make_batch(data, data.splits["test"][:6]), state_of(model)
    with torch.no_grad():
        plain = model(text=batch["text"])["central_latent"]
        assert is_unchanged(model, before)  # off: not a bit
        for module in model.modules():
            if hasattr(module, "enable_ttt_updates"):
                module.enable_ttt_updates = True
        assert torch.equal(model(text=batch["text"])["central_latent"], plain)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
        assert changed == {"memories.text.slots", "central.slots"}
        assert not torch.equal(model(text=batch["text"])["central_latent"], plain)
        model.train()
        slots = {k: v for k, v in state_of(model).items() if k.endswith("slots")}
        model(image=batch["image"])
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in slots.items())  # nor in training


def test_episodic_is_invariant_to_batch_and_order(small):
    _, data, model = small
    batch, before = exp.make_batch(data, data.splits["test"][:9]), state_of(model)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for key in ("text", "image"):
            def latent(rows, episodic=True, key=key):
                return model(**{key: batch[key][rows]}, episodic=episodic)["central_latent"]
            whole = latent(slice(None))
            assert (latent(order) - whole[order]).abs().max() < 1e-5
            assert all((latent(slice(i, i + 1))[0] - whole[i]).abs().max() < 1e-5 for i in range(9))
            assert (latent(slice(None), episodic=False) - whole).abs().max() > 1e-4
    assert is_unchanged(model, before)


def test_training_runs_through_the_inner_update():
    torch.manual_seed(0)
    memory, x, gradients = exp.SlotMemory(8, 6, 2, 3, 0.4), torch.randn(4, 8), []
    for episodic in (False, True, torch.tensor(0.0), torch.tensor(1.0)):
        memory.zero_grad()
        memory(x, episodic).pow(3).sum().backward()
        gradients.append(memory.slots.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6
    for plain, of_tensor in zip(gradients[:2], gradients[2:], strict=True):  # what a GPU's recorded step is given
        torch.testing.assert_close(of_tensor, plain)


# --------------------------------------------------------------------------------------------------------- evaluation

def test_directions_and_their_right_answers(small):
    _, data, _ = small
    tasks = exp.directions(data, "test")
    six = ["text -> image", "image -> text", "audio -> image", "image -> audio", "text -> audio", "audio -> text"]
    assert [d.name for d in tasks[:6]] == six
    n = int((data.speech[data.splits["test"], 1] > 0).sum())
    sizes = [(len(d.items), len(d.gallery_items)) for d in tasks[:7]]
    assert sizes == [(70, 14), (14, 70), (n, 14), (n // 2, n), (n, n), (n, 70), (n, n)]
    for d in tasks:  # a perfect model, by photo or by caption as the direction asks
        n_ids = int(max(d.ids.max(), d.gallery_ids.max())) + 1
        q = exp.ranks(d, torch.eye(n_ids)[d.ids], torch.eye(n_ids)[d.gallery_ids])
        assert q["hit@1"].mean() == 1, d.name
        flat = exp.ranks(d, torch.ones(len(d.ids), 2), torch.ones(len(d.gallery_ids), 2))
        assert torch.allclose(flat["hit@10"], flat["chance@10"])
    assert tasks[4].ids.tolist() == tasks[4].items.tolist() == tasks[4].gallery_ids.tolist()


def test_embed_is_the_model_whatever_the_chunk_and_order(small, monkeypatch):
    _, data, model = small
    tasks = exp.directions(data, "test")
    whole = [exp.embed(model, data, d.query, d.items) for d in tasks]
    monkeypatch.setattr(exp, "EMBED_ROWS", 5)
    for d, z in zip(tasks, whole, strict=True):
        assert (exp.embed(model, data, d.query, d.items) - z).abs().max() < 1e-5
        assert torch.allclose(z.norm(dim=1), torch.ones(len(z)))
    rows = tasks[2].items[[7, 2]]
    batch = exp.make_batch(data, rows)
    direct = F.normalize(model(audio=batch["audio"], audio_frames=batch["audio_frames"])["central_latent"], dim=1)
    assert (exp.embed(model, data, ("audio",), rows) - direct).abs().max() < 1e-5


def test_intervals_resample_photos_with_all_of_their_captions(small):
    _, data, _ = small
    photos, d = data.items("image", "test"), exp.directions(data, "test")[0]
    hits = torch.rand(len(d.items), generator=torch.Generator().manual_seed(0)).double()
    sums = exp.by_photo(data, d, {"hit@1": hits}, ks=(1,))["R@1"]
    assert exp.percent({"R@1": sums}, None)["R@1"] == pytest.approx(100 * hits.mean().item())
    counts = np.random.default_rng(0).multinomial(len(photos), np.full(len(photos), 1 / len(photos)), size=3)
    place = torch.searchsorted(photos, data.photo_of[d.items]).numpy()
    expected = [100 * np.average(hits.numpy(), weights=row[place]) for row in counts]
    assert exp.percent({"R@1": sums}, counts)["R@1"] == pytest.approx(expected)
    both = exp.percent({"text -> image R@10": sums, "image -> text R@10": sums * torch.tensor([[0.5], [1]])}, None)
    assert both["mean R@10"] == pytest.approx(75 * hits.mean().item())


def test_cca_and_ridge_against_plain_solutions():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, n, generator=g, dtype=torch.float64) for n in (7, 5))
    y[:, :3] += 2 * x[:, :3]
    x, y = x - x.mean(0), y - y.mean(0)
    a, b = exp.cca(exp.svd(x), exp.svd(y), 0.5, 0.2, 8)
    ridge_x, ridge_y = (k * torch.linalg.svdvals(z).square().mean() for k, z in ((0.5, x), (0.2, y)))
    cov_x, cov_y = x.T @ x + ridge_x * torch.eye(7).double(), y.T @ y + ridge_y * torch.eye(5).double()
    squared = torch.linalg.eigvals(torch.linalg.solve(cov_x, x.T @ y) @ torch.linalg.solve(cov_y, y.T @ x)).real
    correlations = squared.sort(descending=True).values[:5].sqrt()
    assert torch.allclose((a.T @ cov_x @ a).diagonal()[:5].sqrt(), correlations)  # weighed by them
    assert torch.allclose((a.T @ x.T @ y @ b)[:5, :5], torch.diag(correlations**3), atol=1e-10)
    assert a.shape == (7, 8)
    assert not a[:, 5:].any()
    w = exp.ridge_regression(x, y, 0.5)
    assert torch.allclose(w, torch.linalg.solve(cov_x, x.T @ y))


def test_a_model_that_starts_at_cca_retrieves_from_the_start(tmp_path, tree, cache, features, monkeypatch):
    refuse_test(monkeypatch)
    overrides = (*CACHED, f"data.features_dir={features}", "model.latent_dim=32", "training.epochs=1")
    recalls = {}
    for init in ("cca", "random"):
        cfg = config(tmp_path, tree, cache, *overrides, f"model.init={init}")
        data = exp.load_data(cfg)
        torch.manual_seed(0)
        model = exp.build_model(cfg, data).train()
        train = data.splits["train"]
        train = train[data.speech[train, 1] > 0]
        with torch.no_grad():
            exp.retrieval_losses(model, exp.make_batch(data, train))  # BatchNorm sees its first batch
        for norm in model.standardise.values():
            norm.momentum = 1.0
        with torch.no_grad():
            exp.retrieval_losses(model, exp.make_batch(data, train))
        z = {m: exp.embed(model.eval(), data, (m,), data.photo_of[train] if m == "image" else train)
             for m in exp.MODALITIES}
        recalls[init] = [common.retrieval_metrics(z[a], z[b], data.photo_of[train], data.photo_of[train])["R@1"]
                         for a, b in itertools.permutations(exp.MODALITIES, 2)]
    assert min(recalls["cca"]) > 0.6
    assert max(recalls["random"]) < 0.3


def test_cca_finds_what_two_modalities_share(tmp_path, tree, cache, features, monkeypatch):
    monkeypatch.setattr(exp, "CCA_RIDGES", (0.01, 1.0))
    data = exp.load_data(config(tmp_path, tree, cache, *CACHED, f"data.features_dir={features}"))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(data.names["image"]), 4, generator=g)
    data.features["image"] = hidden @ torch.randn(4, 20, generator=g)
    data.features["text"] = hidden[data.photo_of] @ torch.randn(4, 9, generator=g)
    project, _ = exp.fit_cca(data, "text", "image")
    d = exp.directions(data, "test")[0]
    q = exp.ranks(d, project("text", d.items), project("image", d.gallery_items))
    assert q["hit@1"].mean() > 0.9


# -------------------------------------------------------------------------------------------------- test-time methods

def test_corruptions(small):
    _, data, _ = small
    wave = torch.sin(torch.arange(16000) * 0.3)
    for snr in (20, 0):
        noise = exp.corrupt_speech(wave, "white noise", snr, np.random.default_rng(0)) - wave
        measured = 10 * torch.log10(wave.square().mean() / noise.square().mean()).item()
        assert measured == pytest.approx(snr, abs=0.2)
    low, high = (torch.sin(torch.arange(16000) * 2 * np.pi * f / 16000) for f in (300, 3000))
    assert exp.corrupt_speech(low + high, "low-pass", 1000, None).numpy() == pytest.approx(low.numpy(), abs=3e-3)
    caption, draws = "the quick brown fox jumps over the lazy dog " * 20, np.random.default_rng(0)
    swapped, dropped, longer = (exp.corrupt_text(caption, kind, 0.2, draws) for kind in ("swap", "drop", "insert"))
    assert len(swapped) == len(caption)
    n_swapped = sum(a != b for a, b in zip(swapped, caption, strict=True))
    assert n_swapped / len(caption.replace(" ", "")) == pytest.approx(0.2, abs=0.05)
    assert len(dropped) < len(caption) < len(longer)
    n_words = len(exp.corrupt_text(caption, "word drop", 0.3, draws).split())
    assert n_words == pytest.approx(0.7 * len(caption.split()), rel=0.15)
    assert exp.corrupt_text("dog", "word drop", 0.9999999, draws) == "dog"  # never nothing
    assert set(exp.NEIGHBOURS) == set("abcdefghijklmnopqrstuvwxyz")
    for modality, kinds in exp.CORRUPTIONS.items():
        items = exp.directions(data, "test")[{"text": 0, "image": 1, "audio": 2}[modality]].items[:4]
        clean, order = exp.raw_items(data, modality, items), torch.tensor([3, 1, 0, 2])
        for kind, amount in [*((k, amounts[-1]) for k, amounts in kinds.items()), exp.HELD_OUT[modality]]:
            one, other = (exp.corrupted_items(data, modality, rows, kind, amount) for rows in (items, items[order]))
            assert all(map(same, exp.take(one, order), other))
            assert not all(map(same, one, clean)), kind


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def answers(small, modality, method, choice, batch=4, order=None):
    _, data, model = small
    d = exp.directions(data, "test")[{"text": 0, "image": 1, "audio": 2}[modality]]
    gallery = exp.embed(model, data, (d.gallery,), d.gallery_items)
    order = torch.arange(len(d.items)) if order is None else order
    raw = exp.raw_items(data, modality, d.items)
    z, share = exp.answer_stream(model, data, modality, raw, gallery, method, choice, order, batch)
    return z, share, gallery


@pytest.mark.parametrize("modality", exp.MODALITIES)
@pytest.mark.parametrize("method", [name for name in exp.METHODS if name != "none"])
def test_methods_leave_the_model_as_it_was_and_answer_before_they_adapt(small, modality, method):
    model, choice = small[2], {"statistics": 16, "eata": (0.05, 1.1)}.get(method, 0.3 if "memory" in method else 0.05)
    before = state_of(model)
    plain, _, gallery = answers(small, modality, "none", None)
    frozen = gallery.clone()
    adapted, share, gallery = answers(small, modality, method, choice)
    assert torch.equal(gallery, frozen)
    assert is_unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.enable_ttt_updates or m.ttt_lr != 0.1 for m in exp.all_memories(model).values())
    assert not model.standardise[modality]._forward_pre_hooks
    assert torch.equal(adapted, answers(small, modality, method, choice)[0])
    if method not in ("eata", "tcr"):  # they choose among the queries
        assert share == pytest.approx(1)
    if method not in ("memory-episodic", "statistics"):
        assert (adapted[:4] - plain[:4]).abs().max() < 1e-5  # the first four came before any step
    if method != "eata" or share:
        assert (adapted - plain).abs().max() > 1e-4
    assert torch.equal(answers(small, modality, method, None)[0], plain)  # off


def test_steps_are_those_asked_for_and_the_controls_are_random_of_the_same_norm(small):
    def second_half(method, choice):  # after one step
        return answers(small, "text", method, choice, 35)[0][35:]
    for method in ("memory-episodic", "memory-online", "tent"):
        assert (second_half(method, 0.1) - second_half(method, 0.9)).abs().max() > 1e-3, method
    assert (second_half("random", 0.1) - second_half("tent", 0.1)).abs().max() > 1e-3
    p, steps = torch.nn.Parameter(torch.zeros(50)), []
    for generator in (None, torch.Generator().manual_seed(0)):
        p.data.zero_()
        kept = exp.SimpleNamespace(parameters=[p], generator=generator, optimizer=torch.optim.SGD([p], lr=1.0))
        exp.step_down(kept, (p * torch.arange(50)).sum())
        steps.append(p.detach().clone())
    assert torch.equal(steps[0], -torch.arange(50.0))
    assert steps[1].norm() == pytest.approx(steps[0].norm().item(), rel=1e-5)
    assert abs(F.cosine_similarity(*steps, dim=0)) < 0.5


def test_statistics_are_those_of_the_queries_so_far_and_a_prior(small):
    _, data, model = small
    d, norm = exp.directions(data, "test")[0], model.standardise["text"]
    with torch.no_grad():
        x = torch.cat([model.encoders["text"](exp.as_input(data, "text", [data.captions[i]])["text"]) for i in d.items])
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    z, _, _ = answers(small, "text", "statistics", 16, batch=10)
    seen = x[:20].double()  # the second batch has seen itself and the first
    norm.running_mean.copy_((16 * mean + seen.sum(0)) / 36)
    squares = 16 * (var.double() + mean.double().square()) + seen.square().sum(0)
    norm.running_var.copy_(squares / 36 - norm.running_mean.double().square())
    expected = exp.embed(model, data, ("text",), d.items[10:20])
    assert (z[10:20] - expected).abs().max() < 1e-4


def test_tent_moves_only_layer_norms_down_the_entropy_of_the_frozen_gallery(small, monkeypatch):
    _, data, model = small
    d, before = exp.directions(data, "test")[0], state_of(model)
    gallery, copies, method = exp.embed(model, data, ("image",), d.gallery_items), [], exp.METHODS["tent"]

    def entropy(model):
        with torch.no_grad():
            z = exp.embed(model, data, ("text",), d.items)
            return exp.entropies(z, gallery, model.temperature)[0].mean().item()

    def configure(kept, model, *choice):
        copies.append(model)
        method.configure(kept, model, *choice)
    monkeypatch.setitem(exp.METHODS, "tent", method._replace(configure=configure))
    answers(small, "text", "tent", 0.01, batch=70, order=torch.arange(len(d.items)).repeat(4))
    assert entropy(copies[0]) < entropy(model)
    moved = {k for k, v in copies[0].state_dict().items() if not torch.equal(before[k], v)}
    assert moved == {k for k in before if k.startswith("encoders.text.") and "norm" in k}


def test_eata_keeps_the_sure_and_the_new():
    gallery, p = torch.eye(10), torch.nn.Parameter(torch.zeros(10))
    z = torch.stack([gallery[0], gallery[1], torch.ones(10) / 10**0.5])  # two sure, one at a loss
    kept = exp.SimpleNamespace(margin=0.05, seen=None, generator=None, optimizer=torch.optim.SGD([p], lr=0.0))
    model = exp.SimpleNamespace(temperature=0.07)
    assert exp.adapt_eata(model, kept, z + p, gallery, None) == pytest.approx(2 / 3)
    entropy, q = exp.entropies(z, gallery, 0.07)
    leaf = z.clone().requires_grad_()
    h, _ = exp.entropies(leaf[:2], gallery, 0.07)
    (h * (0.4 * np.log(10) - h.detach()).exp()).mean().backward()
    assert torch.allclose(p.grad, leaf.grad.sum(0), atol=1e-6)
    assert torch.allclose(kept.seen, q[:2].mean(0))
    assert exp.adapt_eata(model, kept, z + p, gallery, None) == 0.0  # the same again: not new
    assert exp.adapt_eata(model, kept, gallery[5:6] + p, gallery, None) == 1.0
    assert entropy[2] == pytest.approx(np.log(10))


def test_tcr_against_plain_loops(monkeypatch):
    """The loss of every step, with the queue as it grows, one query at a time in float64."""
    torch.manual_seed(0)
    shift, losses, expected, queue = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64)), [], [], []
    gallery = F.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1)
    batches = [F.normalize(torch.randn(10, 6, dtype=torch.float64), dim=1) for _ in range(2)]
    kept = exp.SimpleNamespace(n_batches=0, queue=None, optimizer=None)
    model = exp.SimpleNamespace(temperature=0.1)
    monkeypatch.setattr(exp, "step_down", lambda kept, loss: losses.append(loss.item()))
    for q in batches:
        monkeypatch.setattr(exp, "latents", lambda model, inputs, q=q: q + shift)
        exp.adapt_tcr(model, kept, q + shift, gallery, None)
        nearest = [max(range(12), key=lambda j, x=x: float(x @ gallery[j])) for x in q]
        g = gallery[nearest]
        p = [torch.tensor([float(x @ y) / 0.1 for y in g], dtype=torch.float64).softmax(0) for x in q]
        h = [float(-(x * x.log()).sum()) for x in p]
        centre, centre_g = q.mean(0), g.mean(0)
        scores = [float(2 * (q[i] - g[i]).norm() - (q[i] - centre).norm() - (g[i] - centre_g).norm())
                  for i in range(10)]
        for i in sorted(range(10), key=lambda i: scores[i])[:3]:
            queue.append((scores[i], q[i], g[i], h[i]))
        queue = sorted(queue, key=lambda entry: entry[0])[:10]
        limit = max(entry[3] for entry in queue)
        sure = [x for x in h if x <= limit + 1e-12]
        loss = sum(max(0, 1 - x / (limit + 1e-3)) * x for x in sure) / len(sure)
        loss += np.mean([np.exp(-0.1 * float((x - centre).norm())) for x in q])
        mean_q, mean_g = (torch.stack([entry[k] for entry in queue]).mean(0) for k in (1, 2))
        loss += float((centre - centre_g).norm() - (mean_q - mean_g).norm()) ** 2
        expected += [loss] * 3  # nothing moves here
    assert losses == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def whole(tmp_path_factory, tree, cache, features):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        fewer_choices.__wrapped__(m)
        assert cli(folder, tree, cache, *CACHED, f"data.features_dir={features}") == 0
    return folder / "run"


def assert_same_run(run, whole, tested=True):
    for name in ("metrics.csv", *(("results.json",) if tested else ())):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    one, other = (common.load_checkpoint(f / "checkpoint_latest.pt")["model_state_dict"] for f in (run, whole))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_leaves_the_documented_files_and_its_tables_agree(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.csv", "checkpoint_latest.pt", "best_model.pt", "ttt",
                     "results.json", "per_item.pt", "report.md", "training_curves.png", "ttt_R10.png",
                     "ttt_changes.png"}
    assert {f"{m},settings.pt" for m in exp.MODALITIES} <= {path.name for path in (whole / "ttt").iterdir()}
    results = common.read_json(whole / "results.json")
    assert results["synthetic"] is True
    tables = results["tables"]
    retrieval, protocol = tables["retrieval"], tables["test time"]
    directions = [row for row in retrieval if "," not in row]
    assert len(directions) == 6
    assert len([row for row in retrieval if row.endswith(", CCA")]) == 9
    for name in directions:
        assert 0 < retrieval[f"{name}, chance"]["R@10"] < 100
        assert f"{name}, CCA" in retrieval
    assert {row.rsplit(", ", 1)[1] for row in protocol} == {"chance", *exp.METHODS}
    for name in directions:
        none = protocol[f"{name}, none"]
        assert [none["clean R@1"], none["clean R@10"]] == pytest.approx([retrieval[name][k] for k in ("R@1", "R@10")])
    trained = tables["parts of the trained model"]["as trained"]
    assert trained["mean R@10"] == pytest.approx(np.mean([retrieval[name]["R@10"] for name in directions]))
    assert set(tables["memories, dev"]) == {*exp.MODALITIES, "central"}
    assert len(results["gallery_sha256"]) == 6
    assert any(note.startswith("Corrupted R@10: ") for note in results["notes"])
    lines = (whole / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert {"entropy_text", "usage_central", "dev_recall"} <= set(lines[0].split(","))


def test_the_protocols_tables_and_curves(small):
    cfg, data, _ = small
    cfg.evaluation.n_severities, cfg.evaluation.more_streams = 2, True
    d, answers = exp.directions(data, "test")[0], {}
    for name, stream in exp.streams_of("text", cfg.evaluation).items():
        hits = 0.8 - 0.2 * (3 if stream.severity is None else stream.severity)
        for method, factor in (("none", 1.0), ("tent", 0.5)):
            sums = torch.tensor([[5 * hits * factor], [5.0]]).repeat(1, 14)  # of five captions of 14 photos
            answers.setdefault(("text", name), {})[f"{d.name}, {method}"] = {
                "R@1": sums / 5, "R@10": sums, "share": torch.tensor(factor)}
    results = {"tables": {}, "curves": {}, "per_item": {}, "n": 14}
    exp.protocol_tables(cfg, [d], ["none", "tent"], answers, results)
    row, difference = results["tables"]["test time"], results["tables"]["test time, paired difference"]
    assert [row[f"{d.name}, none"][f"{on} R@10"] for on in ("clean", "corrupted")] == pytest.approx([80, 50])
    change = difference[f"{d.name}, tent - {d.name}, none"]
    assert [change[f"{on} R@10"] for on in ("clean", "corrupted")] == pytest.approx([-40, -25])
    assert row[f"{d.name}, tent"]["adapted share"] == 0.5
    lines = results["curves"]["text -> image R@10 (%)"]["lines"]
    assert lines["none"]["y"] == pytest.approx([80, 60, 40])
    assert lines["chance"]["y"] == pytest.approx([100 * 10 / 14] * 3)
    assert results["tables"]["other streams"][f"{d.name}, tent"]["mixed R@10"] == pytest.approx(10)


def test_what_is_reported_is_of_the_settings_that_are_listed(whole, tmp_path, tree, cache, features):
    cfg = config(tmp_path, tree, cache, *CACHED, f"data.features_dir={features}")
    data, (model, _), results = exp.load_data(cfg), exp.load_model(whole), common.read_json(whole / "results.json")
    for d in exp.directions(data, "test")[:6:2]:
        gallery, raw = exp.embed(model, data, (d.gallery,), d.gallery_items), exp.raw_items(data, *d.query, d.items)
        order = exp.stream_order(len(d.items), cfg.seed)
        for method, choice in results["chosen"][f"test time, {d.query[0]}"].items():
            choice = tuple(choice) if isinstance(choice, list) else choice
            z, _ = exp.answer_stream(model, data, *d.query, raw, gallery, method, choice, order, 35)
            row = results["tables"]["test time"][f"{d.name}, {method}"]
            assert row["clean R@10"] == pytest.approx(100 * exp.ranks(d, z, gallery)["hit@10"].mean().item(), abs=1e-6)


def test_a_null_result_is_called_one():
    def row(low, high):
        return {f"{on} R@10 {side}": bound
                for on in ("clean", "corrupted") for side, bound in (("low", low), ("high", high))}
    changes = {("text -> image", method): row(-1, 1) for method in ("tent", "tcr", "random")}
    assert "0 of 2 intervals" in exp.verdicts(changes)[0]
    assert "NULL RESULT" in exp.verdicts(changes)[0]
    changes["text -> image", "tcr"] = row(1, 2)
    changes["text -> image", "tent"] = row(-2, -1)
    text = exp.verdicts(changes)
    assert "1 of 2 intervals lie above 0 (by chance about 0.1): tcr, text -> image." in text[0]
    assert text[1].startswith("Below 0: tent, text -> image.")
    assert text[2].endswith("tent, text -> image.")


def test_nothing_is_chosen_on_test(tmp_path, tree, cache, features, whole):
    """With the test captions' features shuffled among themselves (clean and corrupted alike), all that is trained and
    all that dev chooses, the test-time methods' steps too, stays as it was to the bit."""
    folder = copied(features, tmp_path / "features")
    test = Path(tree, "Flickr8k_text/Flickr_8k.testImages.txt").read_text().split()
    for path in folder.glob("text_features*.pt"):
        content = torch.load(path, weights_only=True)
        rows = [i for i, name in enumerate(content["ids"]) if name.rpartition("#")[0] in test]
        content["feats"][rows] = content["feats"][rows[5:] + rows[:5]]
        torch.save(content, path)
    assert cli(tmp_path, tree, cache, *CACHED, f"data.features_dir={folder}") == 0
    assert_nothing_chosen_on_test(tmp_path / "run", whole, changed=("tables", "retrieval", "text -> image", "R@10"))
    chosen = common.read_json(tmp_path / "run/results.json")["chosen"]
    assert {f"test time, {m}" for m in exp.MODALITIES} < chosen.keys()
    assert chosen["test time, text"].keys() == exp.METHODS.keys()


def test_steps_are_chosen_by_dev_and_off_is_among_them(small, monkeypatch):
    cfg, data, model = small
    monkeypatch.setitem(exp.METHODS, "tent", exp.METHODS["tent"]._replace(choices=(1e-3, 10.0)))
    monkeypatch.setattr(exp, "RATES", (1e-3, 10.0))
    scores, current, real, answer = {}, [], exp.ranks, exp.answer_stream
    held_out = [exp.corrupted_items(data, "text", data.items(m, "dev"), "word drop", 0.3) for m in ("text", "audio")]

    def ranks(d, queries, gallery):
        rank = scores[current[0]][("image", "audio").index(d.gallery)]
        return {**real(d, queries, gallery), "rank": torch.full((len(d.ids),), rank)}

    def stream(model, data, modality, raw, gallery, method, choice, *rest):
        assert raw in held_out
        current[:] = [(method, choice)]
        return answer(model, data, modality, raw, gallery, method, None, *rest)
    monkeypatch.setattr(exp, "answer_stream", stream)
    monkeypatch.setattr(exp, "ranks", ranks)
    for of_none, mild, strong, expected in (((3.0, 3.0), (1.0, 4.0), (4.0, 3.0), (1e-3, 1e-3)),
                                            ((1.0, 1.0), (2.0, 2.0), (1.5, 1.5), (None, 10.0))):
        scores.update({("none", None): of_none, ("tent", 1e-3): mild, ("tent", 10.0): strong})
        chosen = exp.choose_settings(cfg, model, data, "text", ["none", "tent"])
        assert (chosen["tent"], chosen["random"]) == expected  # random also where tent is off


def test_what_chooses_reads_no_test_item(small, monkeypatch):
    cfg, data, model = small

    refuse_test(monkeypatch)
    _, chosen = exp.fit_cca(data, "image", "audio")
    assert chosen.keys() == {"ridges", "dims"}
    exp.choose_settings(cfg, model, data, "text", ["none", "statistics"])
    row, recalls = exp.validate(model, data), []
    for d in exp.directions(data, "dev")[:6]:
        z = (exp.embed(model, data, d.query, d.items), exp.embed(model, data, (d.gallery,), d.gallery_items))
        of_direction = common.retrieval_metrics(*z, d.ids, d.gallery_ids)
        recalls += [100 * of_direction[f"R@{k}"] for k in (1, 5, 10)]
        assert row[f"dev_R@10 {d.name}"] == pytest.approx(recalls[-1])
    assert row["dev_recall"] == pytest.approx(np.mean(recalls))


def test_the_better_single_query_is_the_one_of_dev(small, monkeypatch):
    """In dev text is the best query and speech the worst; in test it is the other way round."""
    _, data, model = small

    def marked(model, data, split):  # an embedding that says of which modality it is
        return lambda m, items: torch.eye(16)[exp.MODALITIES.index(m)].expand(len(items), -1)

    def ranks(d, queries, gallery):
        rank = 1.0 + queries[0, :3].argmax()
        rank = rank if torch.isin(d.photo, data.items("image", "dev")).all() else 4 - rank
        names = ("rank", *(f"{kind}@{k}" for kind in ("hit", "chance") for k in (1, 5, 10)))
        return dict.fromkeys(names, rank.expand(len(queries)))
    monkeypatch.setattr(exp, "embedded", marked)
    monkeypatch.setattr(exp, "ranks", ranks)
    rows, pairs, chosen = exp.fusion_rows(model, data)
    best = {"text + audio -> image": "text", "text + image -> audio": "text", "image + audio -> text": "image"}
    assert chosen == {f"{name}, best single": m for name, m in best.items()}
    assert {row for row in rows if row.endswith(" alone")} == {f"{name}, {m} alone" for name, m in best.items()}
    assert pairs[::2] == [(name, f"{name}, {m} alone") for name, m in best.items()]


@pytest.mark.parametrize(("stream", "n_orders"), [
    (exp.Stream([exp.CLEAN], 35, n_orders=2), 2), (exp.Stream([("noise", 0.18), ("jpeg", 15)], 5, is_mixed=True), 1),
    (exp.Stream([("noise", 0.18), ("jpeg", 15)], 5), 1), (exp.Stream([("noise", 0.18)], 5, with_gallery=True), 1)])
def test_a_stream_is_answered_with_what_dev_chose(small, monkeypatch, stream, n_orders):
    cfg, data, model = small
    asked, real, d = [], exp.answer_stream, exp.directions(data, "test")[1]  # photos that ask for captions
    n, chosen = len(d.items), {"none": None, "statistics": 16, "tent": 0.01, "eata": None}

    def answer_stream(*args):
        asked.append(args[3:])
        return real(*args)
    monkeypatch.setattr(exp, "answer_stream", answer_stream)
    clean = exp.embed(model, data, (d.gallery,), d.gallery_items)
    answers = exp.stream_answers(cfg, model, data, [d], {d.name: clean}, chosen, stream)
    expected = [(m, choice) for m, choice in chosen.items() for _ in range(1 if choice is None else n_orders)]
    assert [(method, choice) for _, _, method, choice, *_ in asked] == expected
    corrupted = [exp.corrupted_items(data, "image", d.items, *condition) for condition in stream.conditions]
    typed = exp.corrupted_items(data, "text", d.gallery_items, "swap", 0.1)
    for i, (raw, gallery, method, _, order, batch) in enumerate(asked):
        if stream.is_mixed:  # conditions alternate
            assert torch.equal(raw[:n:2], corrupted[0][::2])
            assert torch.equal(raw[1:n:2], corrupted[1][1::2])
        else:
            assert torch.equal(raw, torch.cat(corrupted))
        assert sorted(order.tolist()) == list(range(len(raw)))
        assert [part.min() // n for part in order.split(n)] == list(range(len(raw) // n))  # one after the other
        assert torch.equal(gallery, exp.embed(model, data, ("text",), d.gallery_items, typed)
                           if stream.with_gallery else clean)
        assert batch == stream.batch
        runs = [j for j, (*_, other, _, _, _) in enumerate(asked) if other == method]
        assert len({tuple(asked[j][4].tolist()) for j in runs}) == len(runs)  # orders differ
        if i != runs[0]:
            continue
        hits = [exp.ranks(d, z, gallery)["hit@1"].sum() for j in runs
                for z in real(model, data, "image", *asked[j])[0].split(n)]
        assert answers[f"{d.name}, {method}"]["R@1"][0].sum() == pytest.approx(sum(hits) / len(runs))


def test_the_true_transcript_is_asked_in_place_of_the_speech(small, monkeypatch):
    _, data, model = small
    monkeypatch.setattr(exp, "fit_cca", lambda data, *pair: (lambda m, items: torch.ones(len(items), 2), {}))
    rows, _, _ = exp.retrieval_rows(model, data)
    assert [row for row in rows if "transcript" in row] == [
        "audio -> image, true transcript", "image -> audio, true transcript"]
    for d in exp.directions(data, "test")[2:4]:
        written = {m: exp.embed(model, data, ("text" if m == "audio" else m,), items)
                   for m, items in ((*d.query, d.items), (d.gallery, d.gallery_items))}
        expected = exp.by_photo(data, d, exp.ranks(d, written[d.query[0]], written[d.gallery]))
        assert torch.equal(rows[f"{d.name}, true transcript"]["R@5"], expected["R@5"])
        assert not torch.equal(rows[d.name]["R@5"], expected["R@5"])
        assert torch.allclose(rows[f"{d.name}, CCA"]["R@5"], rows[f"{d.name}, chance"]["R@5"])  # as fitted here


def test_the_best_epoch_is_what_is_tested(tmp_path, tree, cache, features, whole, monkeypatch):
    class Seen(BaseException):
        pass

    def seen(model, data):
        raise Seen(state_of(model))
    shutil.copytree(whole, tmp_path / "run")
    best = common.load_checkpoint(tmp_path / "run/best_model.pt")
    best["model_state_dict"]["central.slots"] += 1  # whichever epoch it was, it is no longer the last
    common.save_checkpoint(tmp_path / "run/best_model.pt", best, keep_previous=False)
    cfg = config(tmp_path, tree, cache, *CACHED, f"data.features_dir={features}")
    monkeypatch.setattr(exp, "retrieval_rows", seen)
    with pytest.raises(Seen) as tested:
        exp.evaluate(cfg, exp.load_data(cfg))
    assert all(torch.equal(x, best["model_state_dict"][name]) for name, x in tested.value.args[0].items())


def test_the_protocol_resumes_by_condition(tmp_path, tree, cache, features, whole, monkeypatch):
    class Killed(BaseException):
        pass
    shutil.copytree(whole, tmp_path / "run")
    for name in ("results.json", "per_item.pt", "ttt/image,clean.pt", "ttt/audio,white noise 20.pt"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run/ttt/text,clean.pt").write_bytes(b"cut off")
    asked, real = [], exp.stream_answers

    def counted(*args):
        asked.append(args[-1].conditions)
        if len(asked) == 2:
            raise Killed
        return real(*args)
    command = (*CACHED, f"data.features_dir={features}")
    monkeypatch.setattr(exp, "stream_answers", counted)
    with pytest.raises(Killed):
        cli(tmp_path, tree, cache, *command)
    assert cli(tmp_path, tree, cache, *command) == 0
    assert asked == [[exp.CLEAN]] * 3 + [[("white noise", 20)]]  # text's and image's (killed, then done)
    assert_same_run(tmp_path / "run", whole)


def test_more_streams(tmp_path, tree, cache, features, whole):
    shutil.copytree(whole, tmp_path / "run")
    command = (*CACHED, f"data.features_dir={features}", "evaluation.more_streams=true")
    assert cli(tmp_path, tree, cache, "--stage", "ttt", *command) == 0
    table = common.read_json(tmp_path / "run/results.json")["tables"]["other streams"]
    columns = {f"{name} R@10" for name in ("mixed", "continual", "batch 1", "batch 64", "gallery too")}
    assert all(columns <= row.keys() for row in table.values())
    assert len(table) == 6 * (len(exp.METHODS) + 1)


def test_stages_and_arms(tmp_path, tree, cache, features, whole, capsys):
    command = (*CACHED, f"data.features_dir={features}")
    for stage in ("cache", "train", "evaluate"):
        assert cli(tmp_path, tree, cache, "--stage", stage, *command) == 0
    one, other = (common.read_json(folder / "results.json") for folder in (tmp_path / "run", whole))
    for title in ("retrieval", "parts of the trained model"):
        assert one["tables"][title] == other["tables"][title]
    assert "test time" not in one["tables"]
    assert_same_run(tmp_path / "run", whole, tested=False)
    arm = tmp_path / "arm"
    arm.mkdir()
    assert cli(arm, tree, cache, *command, "model.memory=none", "evaluation.more_streams=false") == 0
    tables = common.read_json(arm / "run/results.json")["tables"]
    assert "memories, dev" not in tables
    assert not any("memory" in row for row in tables["test time"])
    capsys.readouterr()
    assert exp.main(["--compare", str(whole), str(arm / "run")]) == 0
    assert "parts of the trained model: as trained" in capsys.readouterr().out


def test_a_model_can_be_taken_into_a_notebook(whole):
    model, cfg = exp.load_model(whole)
    assert cfg.model.latent_dim == 16
    assert not model.training
    state = common.load_checkpoint(whole / "best_model.pt")["model_state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model(text=torch.randn(2, *model.encoders["text"].mean.shape[1:]))["central_latent"].shape == (2, 16)


@pytest.mark.parametrize("step", [2, 7])
def test_interrupted_and_rerun_equals_uninterrupted(tmp_path, tree, cache, features, whole, monkeypatch, step):
    class Killed(BaseException):
        pass
    real, n_steps = exp.train_step, itertools.count()

    def killed(*args):
        if next(n_steps) == step:
            raise Killed
        return real(*args)
    command = ("--stage", "train", *CACHED, f"data.features_dir={features}")
    monkeypatch.setattr(exp, "train_step", killed)
    with pytest.raises(Killed):
        cli(tmp_path, tree, cache, *command)
    monkeypatch.setattr(exp, "train_step", real)
    assert cli(tmp_path, tree, cache, *command) == 0
    assert_same_run(tmp_path / "run", whole, tested=False)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_and_rerun_equals_uninterrupted(tree, cache, tmp_path, sent, code):
    """From scratch, with augmentation and dropout; SIGINT comes between two rows of metrics.csv."""
    runs = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        runs[name] = [*arguments(tmp_path / name, tree, cache), "--stage", "train"]
    command = [sys.executable, "exp_flickr_ttt.py", *runs["killed"]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed/run/best_model.pt").exists():
        time.sleep(0.001)
    process.send_signal(sent)
    assert process.wait() == code
    assert [exp.main(runs[name]) for name in runs] == [0, 0]
    assert_same_run(tmp_path / "killed/run", tmp_path / "whole/run", tested=False)


def test_a_finished_run_only_reports_and_an_unfinished_one_is_not_tested(tmp_path, tree, cache, features, whole,
                                                                        capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(exp, "embed", None)
    command = (*CACHED, f"data.features_dir={features}")
    assert cli(tmp_path, tree, cache, *command) == 0
    assert_same_run(tmp_path / "run", whole)
    assert "memory-episodic" in capsys.readouterr().out
    latest = common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")
    latest["position"]["finished"], latest["global_step"] = False, 8
    common.save_checkpoint(tmp_path / "run/checkpoint_latest.pt", latest)
    (tmp_path / "run/results.json").unlink()
    for stage in ("evaluate", "ttt"):
        assert cli(tmp_path, tree, cache, "--stage", stage, *command) == 2
        assert "stopped at step 8" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- cached features

def test_cached_features_go_to_their_captions_and_recordings(tmp_path, tree, cache, features):
    data = exp.load_data(config(tmp_path, tree, cache, *CACHED, f"data.features_dir={features}"))
    assert {m: x.ndim for m, x in data.features.items()} == {"text": 2, "image": 2, "audio": 3}
    stored = {m: torch.load(features / f"{m}_features.pt", weights_only=True) for m in exp.MODALITIES}
    rows = data.splits["dev"][[3, 14]]
    rows = torch.cat([rows, data.splits["test"][data.speech[data.splits["test"], 1] > 0][2:4]])
    batch = exp.make_batch(data, rows)
    for m, items in (("text", rows), ("image", data.photo_of[rows]), ("audio", rows[data.speech[rows, 1] > 0])):
        names = [data.names[m][i] for i in items.tolist()]
        assert torch.equal(batch[m], stored[m]["feats"][[stored[m]["ids"].index(name) for name in names]])
    model = exp.build_model(config(tmp_path, tree, cache, *CACHED), data)
    train = ((data.features["text"][data.splits["train"]] - model.encoders["text"].mean)
             / model.encoders["text"].deviation)
    assert train.mean(0).abs().max() < 1e-4
    assert train.var(0)[train.var(0) > 0].sub(1).abs().max() < 0.01


def test_a_photo_that_no_encoder_could_read_is_dropped(tmp_path, tree, cache, features):
    folder = copied(features, tmp_path / "f")
    content = torch.load(folder / "image_features.pt", weights_only=True)
    left_out = content["ids"][3]
    content = {**content, "feats": content["feats"][[0, 1, 2, *range(4, 54)]], "unreadable": [left_out],
               "ids": [name for name in content["ids"] if name != left_out]}
    torch.save(content, folder / "image_features.pt")
    data = exp.load_data(config(tmp_path, tree, cache, "model.image_encoder=cached", f"data.features_dir={folder}"))
    assert data.counts["photos missing or broken"] == 2
    assert left_out not in data.names["image"]


def spoil(content, how):
    return {"no dict": content["feats"], "no ids": {"feats": content["feats"]},
            "other photos": {**content, "ids": [f"x{name}" for name in content["ids"]]},
            "twice": {**content, "ids": [content["ids"][0], *content["ids"][:-1]]},
            "short": {**content, "feats": content["feats"][:-1]},
            "nan": {**content, "feats": content["feats"] * float("nan")}}[how]


@pytest.mark.parametrize(("how", "message"), [
    ("no dict", "expected a dict of feats"), ("no ids", "expected a dict of feats"), ("twice", "N different ids"),
    ("short", "N different ids"), ("other photos", "no features of 54 of 54 items, such as"),
    ("nan", "NaN or infinite"), ("gone", "no such file; make it with encode.py flickr8k"), ("junk", "cannot be read")])
def test_features_of_other_files_are_one_line(tmp_path, tree, cache, features, capsys, how, message):
    folder = copied(features, tmp_path / "f")
    path = folder / "image_features.pt"
    if how in ("gone", "junk"):
        path.write_bytes(b"junk") if how == "junk" else path.unlink()
    else:
        torch.save(spoil(torch.load(path, weights_only=True), how), path)
    assert cli(tmp_path, tree, cache, *CACHED, f"data.features_dir={folder}") == 2
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error or message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_corrupted_features_of_another_model_are_one_line_and_missing_ones_are_said(tmp_path, tree, cache, features,
                                                                                    whole, capsys):
    folder = copied(features, tmp_path / "f")
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ttt")
    (tmp_path / "run/results.json").unlink()
    path = folder / "text_features,swap=0.05.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "model": "another"}, path)
    command = (*CACHED, f"data.features_dir={folder}")
    assert cli(tmp_path, tree, cache, *command) == 2
    assert f"{path}: made by another" in capsys.readouterr().err
    path.unlink()
    assert cli(tmp_path, tree, cache, *command) == 0
    assert "No features of corrupted text queries: encode.py flickr8k --corruptions" in capsys.readouterr().out
    for path in folder.glob("*,*.pt"):
        path.unlink()
    assert cli(tmp_path, tree, cache, *command) == 0  # of none of the modalities
    assert capsys.readouterr().out.count("No features of corrupted") == 3
    assert "test time" not in common.read_json(tmp_path / "run/results.json")["tables"]
    for path in features.glob("*,*.pt"):  # then they are made
        shutil.copy(path, folder)
    assert cli(tmp_path, tree, cache, *command) == 0
    assert "No features of corrupted" not in capsys.readouterr().out
    assert (tmp_path / "run/results.json").read_bytes() == (whole / "results.json").read_bytes()


# ---------------------------------------------------------------------------------------------------------- bad input

def append(name, text):
    def damage(root):
        path = next(Path(root).rglob(name))
        path.write_text(path.read_text() + text)
    return damage


def dev_photo_in_train(root):
    dev = Path(root, "Flickr8k_text/Flickr_8k.devImages.txt").read_text().split()
    append("*trainImages.txt", f"{dev[0]}\n")(root)


def all_wavs_broken(root):
    for path in Path(root, "flickr_audio/wavs").iterdir():
        path.write_bytes(b"RIFF")


def keep_first(root, name):
    path = Path(root, f"Flickr8k_text/Flickr_8k.{name}.txt")
    path.write_text(path.read_text().split()[0])


def other_names(root):
    path = Path(root, "flickr_audio/wav2capt.txt")
    path.write_text(path.read_text().replace(".jpg", ""))


def dev_not_spoken(root):
    dev = Path(root, "Flickr8k_text/Flickr_8k.devImages.txt").read_text()
    path = Path(root, "flickr_audio/wav2capt.txt")
    lines = [line for line in path.read_text().splitlines() if line.split()[1] not in dev]
    path.write_text("\n".join(lines))


def written(name, content):
    return lambda root: Path(root, name).write_bytes(content)


def gone(name):
    return lambda root: Path(root, name).unlink()


BAD = {
    "no photos": (lambda r: shutil.rmtree(Path(r, "Flickr8k_Dataset")),
                  "Flickr8k_Dataset: no such file or folder; download"),
    "no captions": (gone("Flickr8k_text/Flickr8k.token.txt"), "Flickr8k.token.txt: no such file"),
    "no list": (gone("Flickr8k_text/Flickr_8k.devImages.txt"), "Flickr_8k.devImages.txt: no such file"),
    "caption line": (append("Flickr8k.token.txt", "photo.jpg no tab\n"), "line 272: expected name.jpg#k<TAB>caption"),
    "5,000 digits": (append("Flickr8k.token.txt", f"a.jpg#{'1' * 5000}\tA dog .\n"), "line 272: expected name.jpg#k"),
    "speech line": (append("wav2capt.txt", "a.wav b.jpg\n"), "expected <wav> <photo> #k, found 'a.wav b.jpg'"),
    "5,000 digits said": (append("wav2capt.txt", f"a.wav b.jpg #{'1' * 5000}\n"), "expected <wav> <photo> #k"),
    "no speech list": (gone("flickr_audio/wav2capt.txt"), "wav2capt.txt: no such file"),
    "overlap": (dev_photo_in_train, "a photo belongs to one split, once"),
    "empty split": (written("Flickr8k_text/Flickr_8k.testImages.txt", b""), "0 of 0 listed test photos can be read"),
    "all broken": (all_wavs_broken, "fewer than 2 of its 98 recordings are readable"),
    "one photo": (lambda r: keep_first(r, "trainImages"), "1 of 1 listed train photos can be read and have captions"),
    "other names": (other_names, "of its 98 recordings are readable and of a caption of a train photo"),
    "no speech of dev": (dev_not_spoken, "recordings are readable and of a caption of a dev photo"),
    "no recordings": (written("flickr_audio/wav2capt.txt", b""), "of its 0 recordings"),
    "not text": (written("flickr_audio/wav2capt.txt", b"\xff\xfe\xff"), "wav2capt.txt: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_naming_the_file(tmp_path, tree, capsys, case):
    root = copied(tree, tmp_path / "spoiled")
    damage, message = BAD[case]
    damage(root)
    assert cli(tmp_path, root, tmp_path / "cache") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_command(tmp_path, tree, cache, capsys):
    for overrides, message in ((["model.num_heads=3"], "model.latent_dim=16 must be a multiple of model.num_heads=3"),
                               (["model.memory_size=3"], "model.memory_size: must be >= 4"),
                               (["model.patch_size=5"], "must be a multiple of model.patch_size=5"),
                               (["model.init=cca"], "starts the maps of precomputed features"),
                               (["model.text_encoder=cached"],
                                "text_features.pt: no such file; make it with encode.py"),
                               (["training.optimizer=sgd"], "expected one of adamw"),
                               (["--stage", "ttt", "--fresh"], "needs a trained one"),
                               (["--stage", "ttt"], "run the command without --stage first"),
                               (["data.dir=nowhere"], "nowhere/")):
        assert cli(tmp_path, tree, cache, *overrides) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert cli(tmp_path, tree, cache, "training.learning_rate=1e30") == 1
    step, rate = re.search(r"in step (\d+), learning rate (\S+);", capsys.readouterr().err).groups()
    n_steps = 3 * exp.steps_per_epoch(cfg := config(tmp_path, tree, cache), exp.load_data(cfg))
    warmup = int(np.ceil(0.05 * n_steps))
    assert float(rate) == pytest.approx(1e30 * common.warmup_cosine(int(step), n_steps + 1, warmup), rel=1e-4)


def test_photos_of_test_without_speech(tmp_path, tree):
    root = copied(tree, tmp_path / "tree")
    names = (root / "Flickr8k_text/Flickr_8k.testImages.txt").read_text()
    path = root / "flickr_audio/wav2capt.txt"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if line.split()[1] not in names))
    assert cli(tmp_path, root, tmp_path / "cache", "training.epochs=1") == 0
    table = common.read_json(tmp_path / "run/results.json")["tables"]["test time"]
    assert {row.split(",")[0] for row in table} == {"text -> image", "image -> text"}


def test_flops_of_the_documents_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data here
    measured = profile_flops.profile(ROOT / "configs/flickr8k.yaml", batch_size=2, device="cpu", repeats=1)
    assert measured["random_data"]
    assert measured["parameters"] == pytest.approx(9.6e6, rel=0.01)
    assert measured["batch_size"] == 2
    vit = 3 * 12 * 256**2 * 2 * 197 + 2 * 2 * 3 * 197**2 * 256 + 2 * 196 * 768 * 256  # layers, attention, patches
    frames, height, convs = 500, 80, 0
    for a, b in itertools.pairwise((1, 64, 128, 256, 512)):
        frames, height = -(-frames // 2), height // 2
        convs += 2 * 9 * a * b * frames * height
    per_item = measured["flops_forward"] / 2
    assert vit + convs < per_item < 1.15 * (vit + convs)  # text, memories and losses are small beside them
    assert 1.9 < measured["flops_backward"] / measured["flops_forward"] < 2.1


@pytest.mark.skipif(not (SHARED / "data/flickr8k").exists(), reason="the real photos are not here")
def test_the_real_tree(tmp_path):
    data = exp.load_data(config(tmp_path, SHARED / "data/flickr8k", tmp_path / "cache"))
    n_photos = {split: len(data.photo_of[rows].unique()) for split, rows in data.splits.items()}
    assert n_photos == {"train": 753, "dev": 113, "test": 125}
    assert [int((data.speech[rows, 1] > 0).sum()) for rows in data.splits.values()] == [362, 113, 125]
    assert len(data.captions) == 4955
    assert not data.synthetic
    assert list(data.counts.values()) == [0, 0, 4355, 0]
