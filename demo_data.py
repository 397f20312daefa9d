"""Synthetic stand-ins for the real data sets, in their exact files, so that every experiment starts with no download.

Each `write_*` is deterministic, takes seconds, does nothing where its files already are, and returns the folder.

    python demo_data.py            # writes them all under data/demo/
"""

import argparse
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import atomic_write, read_json, write_text

GENRES = ("Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama", "Family",
          "Fantasy", "Film-Noir", "History", "Horror", "Music", "Musical", "Mystery", "Romance", "Sci-Fi", "Short",
          "Sport", "Thriller", "War", "Western")  # of MM-IMDb, the columns of its labels


def save(path, content):
    """torch.save onto path, atomically."""
    atomic_write(path, lambda file: torch.save(content, file))


def nonlinear_map(n_in, n_out, gain, generator):
    """A fixed random two-layer tanh network [.., n_in] -> [.., n_out]; features are of unequal scale, as encoders'."""
    first = gain * torch.randn(n_in, 4 * n_in, generator=generator) / n_in**0.5
    bias = torch.randn(4 * n_in, generator=generator)
    second = torch.randn(4 * n_in, n_out, generator=generator) / (4 * n_in) ** 0.5
    scale = torch.exp(0.5 * torch.randn(n_out, generator=generator))
    offset = torch.randn(n_out, generator=generator)
    return lambda x: torch.tanh(x @ first + bias) @ second * scale + offset


COCO_VERSION = 2  # of what write_coco writes; a stand-in of another version is replaced


def write_coco(folder="data/demo/coco_heads", n_train=3000, n_val=500, n_captions=5, n_factors=10, image_dim=128,
               text_dim=192, n_kinds=20):
    """Embeddings as exp_coco_heads.py reads them: train2017_* (image rows a row per caption), val2017_* (per image).

    Both modalities show an image's kind of scene and its details; a caption mentions some details, half of them by size
    only, which favours non-linear heads. CCA weighs the kind as it correlates over all pairs, but images of a kind
    differ in details alone: a contrastive head learns to weigh those, and wins. Ridge compares with captions as they
    are and loses to CCA, which whitens them and keeps what correlates.
    """
    folder = Path(folder)
    last = folder / "val2017_metadata.json"  # written last
    on_disk = read_json(last) if last.exists() else {"synthetic": True}
    if on_disk.get("version") == COCO_VERSION or not on_disk.get("synthetic"):  # never over real data
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(2017)

    def noise(x):
        return torch.randn(x.shape, generator=g)

    see, read = nonlinear_map(4 * n_factors, image_dim, 1.0, g), nonlinear_map(4 * n_factors, text_dim, 1.5, g)
    kinds = torch.randn(n_kinds, 2 * n_factors, generator=g)
    for name, n, start in (("train2017", n_train, 100_000), ("val2017", n_val, 900_000)):
        index = torch.arange(n).repeat_interleave(n_captions)
        scenes = kinds[torch.randint(n_kinds, (n,), generator=g)]
        details = torch.randn(n, n_factors, generator=g)
        told = torch.cat([details[:, :n_factors // 2], 1.5 * (details[:, n_factors // 2:].abs() - 0.8)], dim=1)[index]
        told = told * (torch.rand(told.shape, generator=g) < 0.6) + 0.5 * noise(told)
        images, texts = (encoder(torch.cat([scene + 0.5 * noise(scene), detail, 0.7 * noise(detail)], dim=1)).half()
                         for encoder, scene, detail in ((see, scenes, details), (read, scenes[index], told)))
        metadata = {"dataset_name": f"synthetic {name}", "synthetic": True, "image_ids": (index + start).tolist(),
                    "caption_ids": list(range(10 * start, 10 * start + len(index))), "total_pairs": len(index),
                    "unique_images": n, "version": COCO_VERSION}
        if name == "val2017":
            metadata["image_index"] = index.tolist()
        else:
            images = images[index]
        save(folder / f"{name}_image_embeddings.pt", images)
        save(folder / f"{name}_text_embeddings.pt", texts)
        write_text(folder / f"{name}_metadata.json", json.dumps(metadata))
    return str(folder)


LANGUAGE_MODELS = (*(f"bloomz-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")),
                   *(f"open_llama_{size}" for size in ("3b", "7b", "13b")),
                   *(f"llama-{size}" for size in ("7b", "13b", "33b", "65b")))
VISION_MODELS = {"vit_tiny_in21k": 0.4, "vit_small_in21k": 0.7, "vit_base_in21k": 1.0, "vit_large_in21k": 1.3,
                 "vit_small_dinov2": 0.8, "vit_base_dinov2": 1.1, "vit_large_dinov2": 1.4}  # and how well they see


def write_alignment(folder="data/demo/alignment", n=320, levels=(0, 10, 30, 50, 70, 90), n_factors=16, dim=48):
    """Layer-wise features as exp_alignment_corr.py reads them: gpt_u={u}_features/*.pt of 12 language models, several/
    (two of them, the mean of five captions), vision/ of 7, captions.json.

    Scenes have shared factors. A caption of level u keeps them with weight 1 - u / 100 and tells things of its own
    instead; a larger model sees its input through less noise and has fewer bits per byte; the middle layers are the
    cleanest.
    """
    folder = Path(folder)
    if (folder / "captions.json").exists() and (folder / "several").exists():  # captions are written last
        return str(folder)
    g = torch.Generator().manual_seed(1024)
    scenes, own = torch.randn(n, n_factors, generator=g), torch.randn(n, n_factors, generator=g)
    ids = [f"scene_{i:04}" for i in range(n)]

    def write_model(path, content, quality, **facts):
        layers, see = [], nonlinear_map(2 * n_factors, dim, 0.5, g)
        for distance in (0.5, 0.0, 0.3):  # of a layer from the best one
            noise = torch.randn(n, n_factors, generator=g) * (1.6 - quality + distance)
            layers.append(see(torch.cat([content, noise], dim=1)))
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, {"feats": torch.stack(layers, dim=1).half(), "ids": ids, "model": path.stem, "synthetic": True,
                    **facts})

    for name, quality in VISION_MODELS.items():
        write_model(folder / "vision" / f"{name}.pt", scenes, quality, pool="cls")
    for u in levels:
        told = (1 - u / 100) * scenes + (1 - (1 - u / 100) ** 2) ** 0.5 * own
        for i, name in enumerate(LANGUAGE_MODELS):
            quality = 0.3 + 1.1 * i / (len(LANGUAGE_MODELS) - 1) + 0.05 * float(torch.randn((), generator=g))
            write_model(folder / f"gpt_u={u}_features" / f"{name}.pt", told, quality, pool="avg",
                        bpb=round(1.3 - 0.3 * quality, 4))
    told = sum(0.7 * scenes + 0.7 * torch.randn(n, n_factors, generator=g) for _ in range(5)) / 5
    for name, quality in (("bloomz-560m", 0.3), ("llama-65b", 1.4)):
        write_model(folder / "several" / f"{name}.pt", told, quality, pool="avg")
    words = [f"{a}{b}" for a in ("ba", "ke", "lu", "mo", "ni", "po", "ra", "su", "ti", "vo", "wa", "ze")
             for b in ("bel", "dan", "fir", "gon", "hul", "kas", "lim", "mur")]
    draws, items, weights = np.random.RandomState(1024), [], 1 / np.arange(1, len(words) + 1)
    for i in range(n):
        original = [words[j] for j in draws.choice(len(words), 12, p=weights / weights.sum())]
        places, new, sentences = draws.permutation(12), [words[j] for j in draws.randint(len(words), size=12)], {}
        for level, u in enumerate(range(10, 101, 10), 1):
            replaced = set(places[:round(12 * u / 100)].tolist())
            told = [new[j] if j in replaced else original[j] for j in range(12)]
            sentences[f"Caption {level} - {u}%"] = " ".join(told)
        items.append({f"Index - {i}": {"original": " ".join(original), "sentences": sentences}})
    write_text(folder / "captions.json", json.dumps(items))
    return str(folder)


def write_mmimdb(folder="data/demo/mmimdb", n_films=600, views=3, backbone="clip", dims=(64, 48)):
    """MM-IMDb in the files of the real set: dataset/{id}.json and .jpeg, split.json, labels/, latents/ of row = views *
    film + view.

    Every third genre shows in the image only, every third in the text only, every third in both, each as a direction of
    its own. Films differ in how clearly each modality speaks, and the views but the first in how noisy each one is, so
    that a weight that follows the clearer one pays.
    """
    folder = Path(folder)
    if (folder / "split.json").exists():  # written last
        return str(folder)
    draws = np.random.RandomState(23)
    ids = [f"{1000003 * (i + 1) % 9999991:07}" for i in range(n_films)]
    ids = sorted(dict.fromkeys(ids))
    labels = draws.rand(len(ids), len(GENRES)) < np.geomspace(0.4, 0.06, len(GENRES))[draws.permutation(len(GENRES))]
    labels[~labels.any(1), 7] = True  # every film has a genre: Drama
    for name in ("dataset", "labels", "latents"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    clarity = draws.uniform(0.3, 1.7, len(ids))
    for side, (modality, width) in enumerate(zip(("image", "text"), dims, strict=True)):
        shown = labels * (np.arange(len(GENRES)) % 3 != 1 - side)  # not in an image: 1, 4, ..; in a text: 0, 3, ..
        clear = clarity if side == 0 else 2 - clarity
        clean = (clear[:, None] * shown) @ draws.randn(len(GENRES), width) + draws.randn(len(ids), width)
        noise = 6 * draws.rand(len(ids), views, 1) ** 2 * (np.arange(views) > 0)[:, None]  # view 0 is clean
        rows = (clean[:, None] + noise * draws.randn(len(ids), views, width)).reshape(-1, width).astype(np.float16)
        stem = folder / "latents" / f"mm_imdb1_globals_aug{views}_{backbone}_{modality}"
        manifest = {"total_rows": len(rows), "original_rows": len(ids), "views_per_sample": views, "dims": width,
                    "dtype": "float16", "synthetic": True}
        statistics = {"mu": rows.astype(np.float32).mean(0), "sigma": rows.astype(np.float32).std(0)}
        atomic_write(f"{stem}.npy", lambda file, x=rows: np.save(file, x))
        atomic_write(f"{stem}.stats.npz", lambda file, x=statistics: np.savez(file, **x))
        write_text(f"{stem}_manifest.json", json.dumps(manifest, indent=1))
    for i, film in enumerate(ids):
        genres = [genre for genre, has in zip(GENRES, labels[i], strict=True) if has]
        told = [f"{genre.lower().replace('-', '')}{draws.randint(3)}" for genre in genres if GENRES.index(genre) % 3]
        plot = " ".join([*told, *(f"word{j}" for j in draws.randint(200, size=8))])
        facts = {"imdb_id": film, "title": f"Film {i}", "genres": genres, "plot": [plot], "synthetic": True}
        (folder / "dataset" / f"{film}.json").write_text(json.dumps(facts))
        poster = Image.fromarray(draws.randint(256, size=(6, 4, 3)).astype(np.uint8)).resize((32, 48))
        poster.save(folder / "dataset" / f"{film}.jpeg")
    atomic_write(folder / "labels" / "labels_all_23.npy", lambda file: np.save(file, labels.astype(np.float32)))
    write_text(folder / "labels" / "ids_all.txt", "".join(f"{film}\n" for film in ids))
    write_text(folder / "labels" / "class_names_23.json", json.dumps(GENRES))
    order = [ids[i] for i in draws.permutation(len(ids))]
    n_train, n_dev = int(0.6 * len(ids)), int(0.1 * len(ids))
    split = {"train": order[:n_train], "dev": order[n_train:n_train + n_dev], "test": order[n_train + n_dev:]}
    write_text(folder / "split.json", json.dumps({**split, "synthetic": True}))
    return str(folder)


SHAPE_COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "orange": (255, 127, 14),
                 "purple": (148, 103, 189), "brown": (140, 86, 75), "pink": (247, 140, 205), "black": (20, 20, 20)}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 190), "pale yellow": (255, 250, 190),
               "light blue": (200, 225, 255)}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
GRID_PLACES = ("top left", "top centre", "top right", "middle left", "centre", "middle right", "bottom left",
               "bottom centre", "bottom right")
OPENINGS = ("The picture shows {n} on a {background} background.",
            "This is a drawing of {n}; the background is {background}.",
            "On a {background} background, {n} can be seen.")
SENTENCES = ("There is {a} in the {place}.", "In the {place} I can see {a}.", "{A} is placed at the {place}.")


def draw_shapes(draws, size):
    """(RGB picture of 1 to 4 shapes on a 3 x 3 grid, its caption) at size = (width, height) pixels."""
    background = list(BACKGROUNDS)[draws.randint(len(BACKGROUNDS))]
    image = Image.new("RGB", size, BACKGROUNDS[background])
    pen, objects, unit = ImageDraw.Draw(image), [], min(size) / 3
    left, top = (size[0] - min(size)) / 2, (size[1] - min(size)) / 2  # the scene is in the centre square
    for place in sorted(draws.choice(9, draws.randint(1, 5), replace=False)):
        colour, shape = list(SHAPE_COLOURS)[draws.randint(len(SHAPE_COLOURS))], SHAPES[draws.randint(len(SHAPES))]
        big = draws.rand() < 0.5
        r, x, y = unit * (0.42 if big else 0.25), left + unit * (place % 3 + 0.5), top + unit * (place // 3 + 0.5)
        fill, box = SHAPE_COLOURS[colour], (x - r, y - r, x + r, y + r)
        if shape == "circle":
            pen.ellipse(box, fill=fill)
        elif shape == "square":
            pen.rectangle(box, fill=fill)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        elif shape == "ring":
            pen.ellipse(box, outline=fill, width=max(2, int(r / 2.5)))
        else:
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
        objects.append((f"a {'large' if big else 'small'} {colour} {shape}", GRID_PLACES[place]))
    sentences = []
    for i in draws.permutation(len(objects)):
        a, place = objects[i]
        sentences.append(SENTENCES[draws.randint(3)].format(a=a, A=a.capitalize(), place=place))
    n = ("one shape", "two shapes", "three shapes", "four shapes")[len(objects) - 1]
    opening = OPENINGS[draws.randint(3)].format(n=n, background=background)
    return image, " ".join([opening, *sentences])


def write_pixmo(folder="data/demo/pixmo", sizes=(1600, 200, 200), group_rows=64):
    """pixmo_{train,val,test}.parquet as exp_pixmo_mrl.py reads them: `image` struct {bytes, path}, `caption`,
    `image_id`, row groups of 64.

    Drawn scenes of many sizes and file formats with captions of several sentences; about one row in 200 is broken as
    real rows are (cut off, an error page, no image, no caption).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = Path(folder)
    if (folder / "pixmo_test.parquet").exists():  # written last
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("caption", pa.string()), ("image_id", pa.int64())], {"synthetic": "true"})
    for part, (name, n) in enumerate(zip(("train", "val", "test"), sizes, strict=True)):
        draws, rows = np.random.RandomState(100 + part), []
        for i in range(n):
            short = int(draws.randint(72, 200))
            long = int(short * draws.uniform(1, 1.6))
            image, caption = draw_shapes(draws, (long, short) if draws.rand() < 0.6 else (short, long))
            kind = ("JPEG", "JPEG", "JPEG", "PNG", "palette", "WEBP", "CMYK")[draws.randint(7)]
            image = image.convert("CMYK") if kind == "CMYK" else image.quantize(32) if kind == "palette" else image
            image.save(buffer := io.BytesIO(), {"CMYK": "JPEG", "palette": "GIF"}.get(kind, kind), quality=90)
            data = buffer.getvalue()
            if i % 200 == 7:
                broken = ((data[:len(data) // 2], caption), (b"<html><body>404 Not Found</body></html>", caption),
                          (None, caption), (data, ""))
                data, caption = broken[i // 200 % 4]
            rows.append({"image": {"bytes": data, "path": None}, "caption": caption,
                         "image_id": 10**6 * (part + 1) + i})
        table = pa.Table.from_pylist(rows, schema=schema)
        atomic_write(folder / f"pixmo_{name}.parquet",
                     lambda file, table=table: pq.write_table(table, file, row_group_size=group_rows))
    return str(folder)


def write_pixmo_features(folder, n_factors=24, n_captions=5, widths=(1280, 384)):
    """features/{image,text}_features.pt beside `write_pixmo`'s files, as encode.py pixmo writes pooled features.

    They are not of the pictures: an image has random factors, which its features show and each of its captions a third
    of, with noise: what pairs share fits into as many dimensions as there are factors. Returns their folder.
    """
    import pyarrow.parquet as pq
    folder = Path(folder)
    out = folder / "features"
    if (out / "text_features.pt").exists():  # written last
        return str(out)
    out.mkdir(parents=True, exist_ok=True)
    ids = [i for name in ("train", "val", "test")
           for i in pq.read_table(folder / f"pixmo_{name}.parquet", columns=["image_id"])["image_id"].to_pylist()]
    g = torch.Generator().manual_seed(336)
    see, read = nonlinear_map(2 * n_factors, widths[0], 0.7, g), nonlinear_map(2 * n_factors, widths[1], 0.7, g)
    factors = torch.randn(len(ids), n_factors, generator=g)
    images = torch.cat([factors, torch.randn(factors.shape, generator=g)], dim=1)
    told = factors.repeat_interleave(n_captions, 0)
    told = told * (torch.rand(told.shape, generator=g) < 0.3) + 0.5 * torch.randn(told.shape, generator=g)
    texts = torch.cat([told, torch.randn(told.shape, generator=g)], dim=1)
    captions = [i for i in ids for _ in range(n_captions)]
    for name, encoder, x, rows in (("image", see, images, ids), ("text", read, texts, captions)):
        save(out / f"{name}_features.pt",
             {"feats": encoder(x).half(), "ids": rows, "model": "stand-in", "synthetic": True})
    return str(out)


COLOURS = {"red": (215, 40, 40), "blue": (45, 80, 220), "yellow": (240, 215, 40), "green": (30, 150, 60),
           "white": (250, 250, 250), "black": (15, 15, 15)}
PLACES = {"grass": (110, 190, 80), "snow": (225, 232, 240), "sand": (222, 196, 140), "water": (70, 130, 190),
          "street": (128, 128, 128)}
THINGS = ("ball", "box", "kite", "pole", "plank", "ring")
TEMPLATES = ("A {c1} {t1} and a {c2} {t2} on the {p} .", "The {t1} is {c1} and the {t2} is {c2} .",
             "A {c1} {t1} beside a {c2} {t2} .", "Two things lie on the {p} : a {c1} {t1} and a {t2} .",
             "There is a {c2} {t2} near a {c1} {t1} on {p} .")


def draw_scene(place, left, right, draws, size=(120, 90)):
    """A picture of two (colour, thing) on a place, each somewhere on its side, with speckles."""
    width, height = size
    image = Image.new("RGB", size, PLACES[place])
    pen = ImageDraw.Draw(image)
    for side, (colour, thing) in enumerate((left, right)):
        x, y = draws.uniform(0.18, 0.32) * width + side * width / 2, draws.uniform(0.35, 0.65) * height
        r, fill = draws.uniform(13, 19), COLOURS[colour]
        if thing == "kite":
            pen.polygon([(x, y - 1.4 * r), (x + r, y), (x, y + 1.4 * r), (x - r, y)], fill=fill)
        elif thing in ("ball", "ring"):
            box = (x - r, y - r, x + r, y + r)
            pen.ellipse(box, fill=fill if thing == "ball" else None, outline=fill, width=5)
        else:
            half_width, half_height = {"box": (1, 1), "pole": (1 / 3, 1.7), "plank": (1.4, 1 / 3)}[thing]
            pen.rectangle((x - half_width * r, y - half_height * r, x + half_width * r, y + half_height * r), fill=fill)
    return np.clip(np.asarray(image) + draws.normal(0, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def speak(caption, pitch, draws, rate=16000):
    """int16 wave: a word is 80 ms of two gliding tones of its own, a voice raises or lowers them all, hiss below."""
    pieces = []
    for word in caption.lower().split():
        own = np.random.RandomState(zlib.crc32(word.encode()))
        t = np.arange(int(rate * draws.uniform(0.07, 0.09))) / rate
        tones = zip(own.uniform((250, 1200), (1000, 4000)), own.uniform(-4000, 4000, 2), strict=True)
        wave = sum(np.sin(2 * np.pi * pitch * (f * t + glide * t**2 / 2)) for f, glide in tones)
        pieces += [wave * np.hanning(len(t)), np.zeros(int(rate * 0.015))]
    wave = np.concatenate(pieces)
    return (6000 * (wave + 0.02 * draws.standard_normal(len(wave)))).astype("<i2")


def write_flickr8k(folder="data/demo/flickr8k", n_photos=(320, 60, 60), n_spoken=2):
    """Flickr8k with spoken captions in the tree of the real set: photos of two coloured things on a place, with five
    captions each.

    `n_spoken` of them are read out, by one of eight voices (none of every twelfth photo's). As in the real set one
    listed photo has no file and one recording has a header of wrong length.
    """
    folder = Path(folder)
    if (folder / "SYNTHETIC_DEMO").exists():  # written last
        return str(folder)
    for name in ("Flickr8k_Dataset", "Flickr8k_text", "flickr_audio/wavs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    draws, token_lines, wav_lines = np.random.default_rng(8000), [], []
    lists = {"train": [], "dev": [], "test": []}
    for i, split in enumerate(np.repeat(list(lists), n_photos)):
        name, place = f"{1000 + 7919 * i}_{zlib.crc32(str(i).encode()):08x}", list(PLACES)[draws.integers(len(PLACES))]
        (c1, c2), (t1, t2) = (draws.choice(list(kinds), 2, replace=False) for kinds in (COLOURS, THINGS))
        photo = Image.fromarray(draw_scene(place, (c1, t1), (c2, t2), draws))
        photo.save(folder / "Flickr8k_Dataset" / f"{name}.jpg", quality=90)
        lists[split].append(f"{name}.jpg")
        captions = [template.format(c1=c1, c2=c2, t1=t1, t2=t2, p=place) for template in TEMPLATES]
        token_lines += [f"{name}.jpg#{k}\t{caption}" for k, caption in enumerate(captions)]
        for k in sorted(draws.choice(5, n_spoken if i % 12 else 0, replace=False)):
            wave = speak(captions[k], 0.85 + 0.3 * draws.integers(8) / 7, draws).tobytes()
            stated = 0 if len(wav_lines) == 5 else len(wave)
            header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + stated, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000,
                                 2, 16, b"data", stated)
            (folder / "flickr_audio/wavs" / f"{name}_{k}.wav").write_bytes(header + wave)
            wav_lines.append(f"{name}_{k}.wav {name}.jpg #{k}")
    lists["train"].insert(3, "2258277193_no_such_file.jpg")
    token_lines.append("2258277193_no_such_file.jpg.1#0\tA caption without a photo .")
    files = {"Flickr8k_text/Flickr8k.token.txt": token_lines, "flickr_audio/wav2capt.txt": wav_lines}
    files |= {f"Flickr8k_text/Flickr_8k.{split}Images.txt": names for split, names in lists.items()}
    files["SYNTHETIC_DEMO"] = ["drawn scenes and tones, not photographs and speech"]
    for path, lines in files.items():
        write_text(folder / path, "".join(f"{line}\n" for line in lines))
    return str(folder)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for written in (write_coco(), write_alignment(), write_mmimdb(), write_pixmo_features(write_pixmo()),
                    write_flickr8k()):
        print(written)
