"""Several processes that train as one, by torchrun with gloo on the CPU: equal losses and weights, kills, one-line errors."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torchrun_steps import CASES

import common

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What one process and what two made of the same steps."""
    results = []
    for launcher in ([sys.executable], TORCHRUN):
        folder = tmp_path_factory.mktemp("steps")
        command = [*launcher, str(ROOT / "tests/torchrun_steps.py"), "out.pt"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        results.append(torch.load(folder / "out.pt", weights_only=True))
    return results


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, steps):
    one, two = (results["float64"][case] for results in steps)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-8)
    one, two = (results["float32"][case]["losses"] for results in steps)
    # flickr_tiny: the affines before its BatchNorm have no gradient but noise, which Adam turns into steps; a change of 1e-7 of one
    # process's inputs moves its losses as much
    torch.testing.assert_close(two, one, rtol=2e-4 if case == "flickr_tiny" else 1e-5, atol=1e-7)


def command(data, folder, launcher=TORCHRUN):
    return [*launcher, str(ROOT / "exp_coco_heads.py"), str(ROOT / "configs/cross_modal.yaml"), f"data.dir={data}", "device=cpu",
            "data.test=val2017", "data.val=0.2", "training.batch_size=64", "model.hidden_dim=64", "model.output_dim=16",
            "training.num_epochs=8", f"output_dir={folder}", "--stage", "train"]


def weights_of(folder):
    return common.load_checkpoint(folder / "checkpoint_latest.pt")["model_state_dict"]


def workers(launcher):
    """The process ids of a torchrun's processes, by their number."""
    listed = subprocess.run(["ps", "--ppid", str(launcher), "-o", "pid="], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def begun(arguments, folder):
    """A started command whose run has a checkpoint."""
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoint_latest.pt").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    return run


@pytest.fixture(scope="module")
def uninterrupted(coco_demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(coco_demo, folder), check=True, capture_output=True)
    return folder


@pytest.mark.skipif(not os.path.exists("/proc"), reason="asks ps for the processes")
@pytest.mark.parametrize("moment", ["kill -9 of the second", "SIGTERM"])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(moment, coco_demo, uninterrupted, tmp_path):
    arguments = command(coco_demo, tmp_path / "run")
    run = begun(arguments, tmp_path / "run")
    if moment == "SIGTERM":
        run.terminate()
    else:
        os.kill(workers(run.pid)[1], signal.SIGKILL)
    errors = run.communicate()[1]
    assert run.returncode
    assert common.load_checkpoint(tmp_path / "run/checkpoint_latest.pt")["position"]["finished"] is False
    if moment == "SIGTERM":  # then one process goes on with what two began
        assert errors.count("the same command resumes from") == 1
        alone = shutil.copytree(tmp_path / "run", tmp_path / "alone")
        printed = subprocess.run(command(coco_demo, alone, launcher=[sys.executable]), check=True, capture_output=True, text=True).stdout
        assert "resuming at step" in printed
        states = [common.load_checkpoint(folder / "checkpoint_latest.pt") for folder in (alone, uninterrupted)]
        assert [state["global_step"] for state in states] == [states[1]["global_step"]] * 2
    resumed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert "resuming at step" in resumed
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(uninterrupted), rtol=0, atol=0)
    assert (tmp_path / "run/metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()


def test_a_mistake_is_told_once(tmp_path):
    result = subprocess.run(command(tmp_path / "nowhere", tmp_path / "run"), capture_output=True, text=True)
    assert result.returncode
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "no such file" in result.stderr
