import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread only waits; also for the scripts that tests start
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


SLOWEST_FIRST = ("exp_gw_mmimdb", "torchrun", "scripts", "exp_alignment_corr", "exp_coco_heads", "exp_flickr_ttt",
                 "exp_pixmo_mrl", "encode", "common", "fuzz", "cuda")


def pytest_collection_modifyitems(items):
    """Files of tests by the time they take: each is one core's, and all cores are to end together."""
    items.sort(key=lambda item: [item.path.stem == f"test_{name}" for name in SLOWEST_FIRST], reverse=True)


def assert_nothing_chosen_on_test(run, whole, changed):
    """`run` is `whole` with the test split's labels (or pairing) shuffled: what was trained and chosen is equal.

    changed: keys into results.json of a test score, which must differ (the shuffle was seen).
    """
    import common
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("best_model.pt", "checkpoint_latest.pt"):
        one, other = (common.load_checkpoint(folder / name) for folder in (run, whole))
        assert one.get("step") == other.get("step")
        assert all(torch.equal(x, other["model_state_dict"][key]) for key, x in one["model_state_dict"].items()), name
    results, expected = (common.read_json(folder / "results.json") for folder in (run, whole))
    assert results["chosen"] == expected["chosen"]  # step, thresholds, baselines' strengths: each script lists all
    for key in changed:
        results, expected = results[key], expected[key]
    assert results != expected


def kill_at(owner, name, n, when=lambda *_: True, before=lambda *_: None):
    """Kill this process, as no handler can soften, before the n-th call of owner.name with `when` true."""
    real, calls = getattr(owner, name), itertools.count(1)

    def killing(*args, **kwargs):
        if when(*args) and next(calls) == n:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, killing)


def ends_with(name):
    """`when` of `kill_at`: one of the first two arguments is a path that ends so."""
    return lambda *args: any(str(arg).endswith(name) for arg in args[:2])


def killed(module, jobs):
    """Run a script once for each job (moment, command line), in a process of its own that is killed at that moment.

    module: a test module with `exp`, the script; `quicken()`; `MOMENTS`, {moment: function that patches the process}.
    The processes are forks of one that has imported all, so that a job costs its work alone.
    """
    code = f"""if True:
        import json, os, signal, sys
        import matplotlib.pyplot, torch._inductor  # once, not in every fork
        sys.path.insert(0, "tests")
        import {module} as tests
        tests.quicken()
        for moment, command in json.load(sys.stdin):
            child = os.fork()
            if not child:
                tests.MOMENTS[moment]()
                tests.exp.main(command)
                if moment == "after completion":
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(99)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == -9, (moment, status)"""
    jobs = json.dumps([[moment, [*map(str, command)]] for moment, command in jobs])
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=jobs, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def apply_diff(source, diff):
    """source with a unified diff's hunks applied; they begin with @@, line numbers are not read.

    What a hunk keeps and removes must be in source exactly once, as lines in a row.
    """
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [line or " " for line in hunk.splitlines()]
        assert {line[0] for line in lines} <= {" ", "-", "+"}, hunk
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert f"\n{source}".count(f"\n{old}") == 1, f"not once in the script:\n{old}"
        source = f"\n{source}".replace(f"\n{old}", f"\n{new}")[1:]
    return source


@pytest.fixture(scope="session")
def coco_demo(tmp_path_factory):
    """A small COCO stand-in: 300 + 60 images, 5 captions each."""
    import demo_data
    return demo_data.write_coco(tmp_path_factory.mktemp("coco"), n_train=300, n_val=60, n_factors=4, image_dim=24,
                                text_dim=32)
