"""What only a GPU can show: steps replayed as CUDA graphs, a killed run of them,
losses beside plain ones in float32."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import common

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WHOLE = ["data.captions=all", "training.batch_size=10000"]  # small batches of so few photos have shapes of their own
RUNS = {  # {config: (script, overrides)}: on demo data, with at least ten replays
    "siglip": ("coco_heads", []), "attention": ("coco_heads", []), "blip": ("coco_heads", ["loss.queue_size=64"]),
    "align": ("coco_heads", []),
    "alignment_synthetic": ("alignment_corr", ["synthetic.epochs=2", "synthetic.uniqueness=[0,8]"]),
    "alignment_mmimdb": ("alignment_corr", ["mmimdb.epochs=2"]),
    "clip_finetune": ("alignment_corr", ["finetune.epochs=2", "finetune.warmup_epochs=1", "finetune.n_seeds=1"]),
    "gw_clip_shared": ("gw_mmimdb", ["training.steps=20", "training.eval_every=2"]),
    "gw_small": ("gw_mmimdb", ["training.steps=10", "training.eval_every=5", "training.selector_after_freeze=true"]),
    "pixmo_features": ("pixmo_mrl", []),
    "pixmo_scratch": ("pixmo_mrl", ["optimization.num_epochs=1", "optimization.save_every_steps=5"]),
    "flickr8k_features": ("flickr_ttt", [*WHOLE, "training.epochs=30"]),
    "flickr8k_tiny": ("flickr_ttt", [*WHOLE, "training.epochs=30"])}


def command(name, folder, *overrides):
    script, settings = RUNS[name]
    return [sys.executable, str(ROOT / f"exp_{script}.py"), str(ROOT / f"configs/{name}.yaml"), "--demo", "--stage",
            "train", "device=cuda", f"output_dir={folder}", *settings, *overrides]


def train(name, folder, *overrides):
    result = subprocess.run(command(name, folder, *overrides), cwd=folder.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr  # no kernel without a fixed order
    return result.stdout


def assert_same(folder, other):
    assert (folder / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    one, two = (common.load_checkpoint(path / "checkpoint_latest.pt") for path in (folder, other))
    assert all(torch.equal(x, two["model_state_dict"][key]) for key, x in one["model_state_dict"].items())


@pytest.mark.parametrize("name", RUNS)
def test_replayed_steps_equal_those_as_written(name, tmp_path):
    out = train(name, tmp_path / "graphs")
    assert "no CUDA graphs" not in out
    train(name, tmp_path / "eager", "cuda_graphs=false")
    assert_same(tmp_path / "graphs", tmp_path / "eager")


@pytest.mark.parametrize("name", ["attention", "gw_clip_shared", "pixmo_scratch"])
def test_killed_while_it_replays_and_rerun_equals_uninterrupted(name, tmp_path):
    train(name, tmp_path / "whole")
    with subprocess.Popen(command(name, tmp_path / "run"), cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "run/checkpoint_latest.pt").exists():
            os.sched_yield()
        process.kill()
    train(name, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_recording_trains_nothing_and_rates_reach_the_graph():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def train_step(model, batch, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch["x"]).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}
    step, batch = common.GraphedStep(train_step, model, optimizer), {"x": torch.randn(16, 8, device="cuda")}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for _ in range(4):
        step(batch)
    assert not step.graphs  # its shapes may not come again
    step(batch)
    state = model.state_dict()
    assert len(step.graphs) == 1 and torch.equal(state["0.weight"], before["0.weight"])  # of rate 0
    assert state["1.num_batches_tracked"] == 5  # the five steps
    assert all(x["step"] == 5 for x in optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 0.1
    step(batch)
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert optimizer.param_groups[0]["lr"] == 0.1 and not optimizer.param_groups[0]["capturable"]


def test_a_step_that_waits_for_the_device_runs_as_written(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def train_step(model, batch, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch["x"]).square().mean()
        if loss.item() > 1e9:
            raise AssertionError
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}
    step, x = common.GraphedStep(train_step, model, optimizer), torch.randn(4, 4, device="cuda")
    values = [step({"x": x})["loss"].item() for _ in range(20)]
    assert values[-1] < values[0] and not step.graphs
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert capsys.readouterr().out.count("no CUDA graphs of this training step") == 1


def test_logits_of_tensor_cores_are_sixteen_times_nearer_than_those_of_tf32(monkeypatch):
    """And the gradients, of TF32 products as a plain loss's."""
    n, scale = 3000, 100.0
    a, b = (F.normalize(torch.randn(n, 512, device="cuda"), dim=1) for _ in range(2))
    b = F.normalize(a + 0.2 * b, dim=1)  # close pairs: logits up to 100
    exact = (scale * a.double()) @ b.double().T
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    error = (common._logits(*common._logit_factors(scale * a, b)) - exact).abs().max()
    assert error < ((scale * a) @ b.T - exact).abs().max() / 16
    for loss in (lambda a, b: common.info_nce(a, b, scale), lambda a, b: common.sigmoid_loss(a, b, scale, -10.0)):
        values = []
        for dtype in (torch.float64, torch.float32):
            x, y = (z.to(dtype).requires_grad_() for z in (a, b))
            value = loss(x, y)
            values.append((value.double(), *(g.double() for g in torch.autograd.grad(value, (x, y)))))
        torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-4, atol=1e-6)
        for ours, true in zip(values[1][1:], values[0][1:], strict=True):
            assert (ours - true).norm() < 2e-3 * true.norm()


@pytest.mark.parametrize("n", [64, 5000])
def test_losses_equal_plain_ones_in_float32(n):
    a, b = (F.normalize(torch.randn(n, 64, device="cuda"), dim=1).requires_grad_() for _ in range(2))
    target = torch.arange(n, device="cuda")

    def plain_clip():
        logits = 50 * a @ b.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def plain_sigmoid():
        labels = 2 * torch.eye(n, device="cuda") - 1
        return -F.logsigmoid(labels * (50 * a @ b.T - 10)).sum() / n
    with common.full_precision():
        for ours, plain in ((lambda: common.info_nce(a, b, 50.0), plain_clip),
                            (lambda: common.sigmoid_loss(a, b, 50.0, -10.0), plain_sigmoid)):
            values, gradients = zip(*((f(), torch.autograd.grad(f(), (a, b))) for f in (ours, plain)), strict=True)
            torch.testing.assert_close(*values, rtol=1e-5, atol=0)
            for x, y in zip(*gradients, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
