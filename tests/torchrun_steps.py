"""Training steps of several experiments for test_torchrun.py: alone, or as one of torchrun's processes.

    python tests/torchrun_steps.py OUT          # in an empty folder; writes {type: {case: losses, weights}} to OUT
"""

import functools
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

NO_DROPOUT = ("model.dropout=0", "model.input_dropout=0")
CASES = {  # script, config, overrides; batches that two processes cannot share evenly
    "coco siglip": ("exp_coco_heads", "siglip", (*NO_DROPOUT, "training.batch_size=63")),
    "coco clip": ("exp_coco_heads", "clip", (*NO_DROPOUT, "training.batch_size=63")),
    "coco queue": ("exp_coco_heads", "siglip", (*NO_DROPOUT, "training.batch_size=63", "loss.type=queue",
                                                "loss.queue_size=150", "loss.temperature=0.1")),
    "coco blip": ("exp_coco_heads", "blip", (*NO_DROPOUT, "training.batch_size=63")),
    "coco align": ("exp_coco_heads", "align", (*NO_DROPOUT, "training.batch_size=63")),
    "gw": ("exp_gw_mmimdb", "gw_small", (*NO_DROPOUT, "model.image_dropout=0", "training.batch_size=33")),
    "flickr_tiny": ("exp_flickr_ttt", "flickr8k_tiny", (*NO_DROPOUT, "training.batch_size=21")),
    "pixmo_features": ("exp_pixmo_mrl", "pixmo_features", ("vision_encoder.dropout=0", "text_encoder.dropout=0",
                                                           "dataset.batch_size=21")),
    "flickr_features": ("exp_flickr_ttt", "flickr8k_features", (*NO_DROPOUT, "training.batch_size=21"))}


def batch_of(module, cfg, data, step):
    """The batch of a step (from 0), as the script's own loop makes it."""
    if module.__name__ == "exp_flickr_ttt":
        per_epoch = module.steps_per_epoch(cfg, data)
        epoch, place = divmod(step, per_epoch)
        rows = module.epoch_batches(data, cfg.seed, cfg.data.captions, per_epoch, epoch)[place]
        return module.make_batch(data, rows, np.random.default_rng([cfg.seed, epoch, place]), common.share)
    if module.__name__ == "exp_pixmo_mrl":
        per_epoch, size = module.steps_per_epoch(cfg, data), cfg.dataset.batch_size
        epoch, place = divmod(step, per_epoch)
        rows = module.epoch_order(data.sets["train"], cfg.seed, epoch)[place * size:(place + 1) * size]
        return module.make_batch(data, rows, "train", epoch, common.share(len(rows)))
    if module.__name__ == "exp_gw_mmimdb":
        rows = module.batch_rows(data, cfg, step)
    else:
        rows = module.epoch_batches(data, cfg, 0)[step]
    return module.make_batch(data, rows, common.share(len(rows)))


@functools.cache
def loaded(name):
    """(module, config, data) of a case."""
    script, config, settings = CASES[name]
    module = importlib.import_module(script)
    cfg = common.load_config(module.Config, ROOT / f"configs/{config}.yaml", ["device=cpu", *settings], demo=True)
    with common.one_after_the_other():
        module.use_demo(cfg)
        return module, cfg, module.load_data(cfg)


def run(name, n_steps):
    module, cfg, data = loaded(name)
    common.seed_everything(cfg.seed)
    model = module.build_model(cfg, data).to(torch.get_default_dtype())
    optimizer = module.build_optimizer(cfg, model)
    model.train()
    losses = []
    for step in range(n_steps):
        batch = batch_of(module, cfg, data, step)
        batch = {key: x.to(torch.get_default_dtype()) if x.is_floating_point() else x for key, x in batch.items()}
        parts = module.train_step(model, batch, optimizer)
        losses.append(common.summed(torch.stack(list(parts.values()))))
    return {"losses": torch.stack(losses), "weights": model.state_dict()}


def main(out):
    common.join_processes("cpu")
    results = {"float32": {name: run(name, 3) for name in CASES}}
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # where the scripts leave half precision they would leave float64, too
    results["float64"] = {name: run(name, 20) for name in CASES}
    if common.process()[0] == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1])
