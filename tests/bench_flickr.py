"""Data, training step and test-time training of exp_flickr_ttt.py at the document's sizes. By hand:

    python tests/bench_flickr.py [batch size]        # default 64; one CPU thread, or the GPU if there is one

Variants take turns in one process; medians and the ratio of a pair are printed: a training step with its batch from the
caches; a batch from the caches against decoding its files every time; mel in torch against librosa (where it is
installed); an episodic forward pass (every row with slots of its own) against a plain one.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import exp_flickr_ttt as exp


def compare(title, variants, repeats):
    """Print the median time of functions that take turns, {name: function}; the first round warms up. On a CPU its own
    time counts, so that other programs disturb little."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(clock() - start)
    medians = [statistics.median(values) for values in times.values()]
    ratio = f": ratio {medians[1] / medians[0]:.3f}" if len(medians) == 2 else ""
    print(f"{title}: {', '.join(f'{name} {1000 * x:.2f} ms' for name, x in zip(variants, medians, strict=True))}"
          f"{ratio}", flush=True)


def written_files(folder, n):
    """n photos and recordings as large as Flickr8k's: 500 x 375 pixels, 4 s."""
    draws, photos, speech = np.random.default_rng(0), [], []
    for i in range(n):
        small = Image.fromarray(draws.integers(256, size=(24, 32, 3), dtype=np.uint8))
        photos.append(Path(folder, f"{i}.jpg"))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(photos[-1], "JPEG", quality=90)
        speech.append(Path(folder, f"{i}.wav"))
        soundfile.write(speech[-1], 0.1 * draws.standard_normal(64000), 16000, subtype="PCM_16")
    return photos, speech


def main():
    cfg = exp.Config()
    cfg.training.batch_size = n = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, rows = exp.random_data(cfg), torch.arange(n)
    print(f"batch of {n} on {data.device}, {torch.get_num_threads()} thread")
    with tempfile.TemporaryDirectory() as folder:
        photos, speech = written_files(folder, n)

        def decode_photo(raw):
            return exp.decode_photo(raw, 256)

        def decode_speech(raw):
            return exp.decode_speech(raw, torch.device("cpu"))
        cached_photos = exp.decoded(folder, "photos", photos, decode_photo, (3, 256, 256), np.uint8, 1)[0]
        cached_mels, frames = exp.decoded(folder, "mels", speech, decode_speech, (exp.N_MELS,), np.float16, 1)[:2]
        data.speech = torch.stack([frames.cumsum(0) - frames, frames], dim=1)

        def from_cache():
            data.photos, data.mels = cached_photos, cached_mels
            return exp.make_batch(data, rows, np.random.default_rng(0))

        def decoding():
            data.photos = torch.from_numpy(np.concatenate([decode_photo(path.read_bytes()) for path in photos]))
            data.mels = torch.from_numpy(np.concatenate([decode_speech(path.read_bytes()) for path in speech]))
            return exp.make_batch(data, rows, np.random.default_rng(0))
        model = exp.build_model(cfg, data)
        optimizer = exp.build_optimizer(cfg, model)
        compare("a batch with normalisation and augmentation",
                {"from the caches": from_cache, "decoding every file": decoding}, 5)
        compare("a training step",
                {"with its batch from the caches": lambda: exp.train_step(model, from_cache(), optimizer)}, 5)
        batch = exp.make_batch(data, rows)
    wave = 0.1 * np.random.default_rng(0).standard_normal(64000).astype(np.float32)
    try:
        import librosa
    except ImportError:
        print("mel against librosa: pip install librosa")
    else:
        def by_librosa():
            return np.log(1e-6 + librosa.feature.melspectrogram(
                y=wave, sr=16000, n_fft=400, hop_length=160, n_mels=80, fmax=8000, htk=True, norm=None,
                pad_mode="reflect"))
        compare("log mel of 4 s", {"torch": lambda: exp.log_mel(torch.from_numpy(wave)), "librosa": by_librosa}, 50)
    model.eval()
    with torch.no_grad():
        for keys in (("text", "image", "audio", "audio_frames"), ("text",)):
            given = {key: batch[key] for key in keys}
            compare(f"forward of {' + '.join(keys[:3])}",
                    {"plain": lambda x=given: model(**x), "episodic": lambda x=given: model(**x, episodic=True)}, 9)


if __name__ == "__main__":
    main()
