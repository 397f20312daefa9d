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


@pytest.fixture(scope="session")
def coco_demo(tmp_path_factory):
    """A small COCO stand-in: 300 + 60 images, 5 captions each."""
    import demo_data
    return demo_data.write_coco(tmp_path_factory.mktemp("coco"), n_train=300, n_val=60, n_factors=4, image_dim=24, text_dim=32)
