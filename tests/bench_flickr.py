"""Data and test-time training of exp_flickr_ttt.py at the document's sizes. By hand:

    python tests/bench_flickr.py [batch size]        # default 64; one CPU thread, or the GPU if there is one

Each pair of variants takes turns in one process; medians and their ratio are printed: a batch from the caches against decoding its files every time;
mel in torch against librosa (where it is installed); an episodic forward pass (every row with slots of its own) against a plain one.
"""

import io
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


def compare(variants, repeats):
    """{name: median seconds} of functions that take turns; the first round warms up."""
    times = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(title, medians, of=1):
    (name, first), (other, second) = medians.items()
    print(f"{title}: {name} {1000 * first / of:.2f} ms, {other} {1000 * second / of:.2f} ms: ratio {second / first:.3f}")


def main():
    cfg, draws = exp.Config(), np.random.default_rng(0)
    cfg.training.batch_size = n = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.set_num_threads(1)
    data = exp.random_data(cfg)
    print(f"batch of {n} on {data.device}, {torch.get_num_threads()} thread")
    photos, speech = [], []
    for _ in range(n):  # as large as Flickr8k's: 500 x 375, 4 s
        image = Image.fromarray(draws.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(buffer := io.BytesIO(), "JPEG", quality=90)
        photos.append(buffer.getvalue())
        soundfile.write(buffer := io.BytesIO(), 0.1 * draws.standard_normal(64000), 16000, format="WAV", subtype="PCM_16")
        speech.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            Path(folder, f"{i}.jpg").write_bytes(photos[i])
            Path(folder, f"{i}.wav").write_bytes(speech[i])
        decode = ((".jpg", lambda raw: exp.decode_photo(raw, 256), (3, 256, 256), np.uint8),
                  (".wav", lambda raw: exp.decode_speech(raw, torch.device("cpu")), (exp.N_MELS,), np.float16))
        rows = [exp.decoded(folder, f"bench{end}", [Path(folder, f"{i}{end}") for i in range(n)], f, shape, dtype, 1)
                for end, f, shape, dtype in decode]
        data.photos, data.mels, frames = rows[0][0], rows[1][0], rows[1][1]
        data.speech = torch.stack([frames.cumsum(0) - frames, frames], dim=1)

        def decode_all():
            data_now = [np.concatenate([f(Path(folder, f"{i}{end}").read_bytes()) for i in range(n)]) for end, f, *_ in decode]
            data.photos, data.mels = (torch.from_numpy(x) for x in data_now)
            exp.make_batch(data, torch.arange(n), np.random.default_rng(0))
        cached = (data.photos, data.mels)

        def from_cache():
            data.photos, data.mels = cached
            exp.make_batch(data, torch.arange(n), np.random.default_rng(0))
        gather = compare({"": lambda: (exp.raw_items(data, "image", torch.arange(n)), exp.raw_items(data, "audio", torch.arange(n)),
                                       exp.tokenise(data.captions, data.vocabulary))}, 9)
        print(f"gathering a batch from the caches, before the device's part: {1000 * gather['']:.2f} ms")
        report("a batch with normalisation and augmentation", compare({"from the caches": from_cache, "decoding every file": decode_all}, 5))
    wave = torch.from_numpy(0.1 * draws.standard_normal(64000).astype(np.float32))
    try:
        import librosa
    except ImportError:
        print("mel against librosa: pip install librosa")
    else:
        def by_librosa():
            mel = librosa.feature.melspectrogram(y=wave.numpy(), sr=16000, n_fft=400, hop_length=160, n_mels=80, fmax=8000, htk=True, norm=None,
                                                 pad_mode="reflect")
            return np.log(mel + 1e-6)
        difference = np.abs(by_librosa() - exp.log_mel(wave).numpy()).max()
        report(f"log mel of 4 s (they differ by {difference:.1e})", compare({"torch": lambda: exp.log_mel(wave), "librosa": by_librosa}, 50))
    model = exp.build_model(cfg, data).eval()
    batch = exp.make_batch(data, torch.arange(n))
    inputs = {key: batch[key] for key in ("text", "image", "audio", "audio_frames")}
    for name, given in (("text, image and audio", inputs), ("text alone", {"text": inputs["text"]})):
        with torch.no_grad():
            report(f"forward of {name}", compare({"plain": lambda g=given: model(**g), "episodic": lambda g=given: model(**g, episodic=True)}, 9))


if __name__ == "__main__":
    main()
