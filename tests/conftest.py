import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread only waits; also for the scripts that tests start
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def assert_nothing_chosen_on_test(run, whole, changed):
    """`run` is `whole` with the test split's labels (or pairing) shuffled: what was trained and chosen is equal to the bit.

    changed: keys into results.json of a test score, which must differ (the shuffle was seen).
    """
    import common
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("best_model.pt", "checkpoint_latest.pt"):
        one, other = (common.load_checkpoint(folder / name) for folder in (run, whole))
        assert one.get("step") == other.get("step")
        assert all(torch.equal(x, other["model_state_dict"][key]) for key, x in one["model_state_dict"].items()), name
    results, expected = (common.read_json(folder / "results.json") for folder in (run, whole))
    assert results["chosen"] == expected["chosen"]  # step, thresholds, baselines' strengths: each script lists all of them
    for key in changed:
        results, expected = results[key], expected[key]
    assert results != expected


@pytest.fixture(scope="session")
def coco_demo(tmp_path_factory):
    """A small COCO stand-in: 300 + 60 images, 5 captions each."""
    import demo_data
    return demo_data.write_coco(tmp_path_factory.mktemp("coco"), n_train=300, n_val=60, n_factors=4, image_dim=24, text_dim=32)
