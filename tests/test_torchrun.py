"""Several processes that train as one, by torchrun with gloo on the CPU: equal losses and weights, kills, one-line
errors; and that encode as one, to the bit."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torchrun_steps import CASES

import common
import demo_data
import encode

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
    # flickr_tiny: the affines before its BatchNorm have no gradient but noise, which Adam turns into steps; a change of
    # 1e-7 of one process's inputs moves its losses as much
    torch.testing.assert_close(two, one, rtol=2e-4 if case == "flickr_tiny" else 1e-5, atol=1e-7)


def command(data, folder, launcher=TORCHRUN):
    return [*launcher, str(ROOT / "exp_coco_heads.py"), str(ROOT / "configs/cross_modal.yaml"),
            f"data.dir={data}", "device=cpu", "data.test=val2017", "data.val=0.2", "training.batch_size=64",
            "model.hidden_dim=64", "model.output_dim=16", "training.num_epochs=8", f"output_dir={folder}",
            "--stage", "train"]


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
        printed = subprocess.run(command(coco_demo, alone, launcher=[sys.executable]), check=True,
                                 capture_output=True, text=True).stdout
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


# ------------------------------------------------------------------------------------------------------------ encode.py

ENCODE = """
import json, os, signal, sys
sys.path[:0] = [{root!r}]
import torch.distributed
import common, encode
encode.SHARD, encode.TEXT_SHARD = 8, 16
torch.distributed.destroy_process_group = lambda: None  # one group for all commands
{more}
sys.exit(max(encode.main(command) for command in json.loads(sys.argv[1])))
"""
DIES = """
real = encode.encode_shard
def dying(rows, *args):
    if rows == range(40, 48):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(rows, *args)
encode.encode_shard = dying
"""
SEES_NO_OUTPUT = """
if os.environ["RANK"] == "1":
    sys.argv[1] = sys.argv[1].replace({folder!r}, "/nowhere")
"""
OVERFLOWS = """
real = encode.image_forward
def overflowing(*args):
    forward = real(*args)
    return lambda items: tuple(1e6 ** common.process()[0] * x for x in forward(items))
encode.image_forward = overflowing
"""


def with_options(commands, folder):
    return [[*map(str, command), "--out", str(folder / name), "--device", "cpu", "--workers", "1"]
            for name, command in commands.items()]


def encoded(commands, folder, more=""):
    """The finished two processes of encode.py's commands, which write to subfolders of `folder`."""
    script = folder.parent / f"{folder.name}.py"
    script.write_text(ENCODE.format(root=str(ROOT), more=more))
    return subprocess.run([*TORCHRUN, str(script), json.dumps(with_options(commands, folder))],
                          capture_output=True, text=True)


def printed_alone(commands, folder):
    """What encode.py prints in this process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(encode, "SHARD", 8)
        patch.setattr(encode, "TEXT_SHARD", 16)
        assert [encode.main(command) for command in with_options(commands, folder)] == [0] * len(commands)
    return printed.getvalue()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{folder: a command} of every subcommand, with tiny models,
    and a photo, a poster and a row that cannot be read."""
    pytest.importorskip("transformers")
    from tiny_models import save_model
    root = tmp_path_factory.mktemp("raw")
    model = {kind: save_model(root / kind, kind) for kind in ("siglip", "bert", "gpt2", "whisper")}
    flickr, films, pixmo = root / "flickr", root / "films", root / "pixmo"
    demo_data.write_flickr8k(flickr, n_photos=(60, 6, 6))
    demo_data.write_mmimdb(films, n_films=30)
    demo_data.write_pixmo(pixmo, sizes=(30, 5, 5), group_rows=4)  # one row has no picture
    photos = sorted(path.name for path in (flickr / "Flickr8k_Dataset").iterdir())
    (flickr / "Flickr8k_Dataset" / photos[9]).write_text("gone")
    next((films / "dataset").glob("*.jpeg")).write_text("gone")
    (root / "captions.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": name} for i, name in enumerate(photos)],
        "annotations": [{"id": i, "image_id": i // 2, "caption": "A thing" + " again" * (i % 9)}
                        for i in range(2 * len(photos))]}))
    both = ["--image-model", model["siglip"], "--text-model", model["bert"]]
    return {"coco": ["coco", "--images", flickr / "Flickr8k_Dataset", "--captions", root / "captions.json", *both,
                     "--native-text"],
            "mmimdb": ["mmimdb", "--data", films, "--model", model["siglip"], "--views", 3],
            "alignment": ["alignment", "--mmimdb", films, "--language", model["gpt2"], "--vision", model["siglip"],
                          "--vision-pool", "avg"],
            "flickr8k": ["flickr8k", "--data", flickr, *both, "--speech-model", model["whisper"], "--limit", 20],
            "pixmo": ["pixmo", "--data", pixmo, *both, "--tokens"]}


@pytest.fixture(scope="module")
def encoded_alone(commands, tmp_path_factory):
    """(folder, what was printed) of one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    return folder, printed_alone(commands, folder)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_processes_write_the_files_of_one(commands, encoded_alone, tmp_path):
    folder, printed = encoded_alone
    result = encoded(commands, tmp_path / "out", more=SEES_NO_OUTPUT.format(folder=str(tmp_path / "out")))
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(folder)
    one, two = (re.sub(r"\S+ rows a second", "", text)
                for text in (printed.replace(str(folder), str(tmp_path / "out")), result.stdout))
    assert one == two
    assert "cannot be read: " in one


def test_a_killed_process_ends_all_and_one_goes_on(commands, encoded_alone, tmp_path):
    command = {"coco": commands["coco"]}
    assert encoded(command, tmp_path / "out", more=DIES).returncode
    printed = printed_alone(command, tmp_path / "out")
    # process 0 may have written its shard before it was ended
    assert re.search("going on at (32|40) of 72 rows", printed)
    assert contents(tmp_path / "out/coco") == contents(encoded_alone[0] / "coco")


def test_what_fails_in_one_process_alone_is_one_line(commands, tmp_path):
    result = encoded({"coco": commands["coco"]}, tmp_path / "out", more=OVERFLOWS)
    assert result.returncode
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    name = json.loads(Path(commands["coco"][4]).read_text())["images"][8]["file_name"]
    assert f"features of {name} are not finite" in line
    assert "encode.py" not in result.stderr.split("torch.distributed", 1)[0]  # no traceback but torchrun's own
