"""Every script as a person runs it: --help, the demos (shrunk), the configs, the README's commands."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import profile_flops

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
DEMOS = {  # overrides that shrink a config's demo to a few seconds
    "siglip": ["training.num_epochs=2"], "siglip_cca": ["training.num_epochs=2"], "quick_test": [],
    **{name: ["training.num_epochs=2", "model.hidden_dim=64", "model.num_heads=2"]
       for name in ("clip", "mlp", "align", "attention", "cross_modal")},
    "blip": ["training.num_epochs=2", "model.hidden_dim=64", "loss.queue_size=256"],
    **{name: ["synthetic.n_samples=4000", "synthetic.epochs=2", "alignment.n_permutations=19", "synthetic.n_seeds=1"]
       for name in ("alignment_synthetic", "alignment_synthetic_full")},
    **{f"gw_{name}": ["training.steps=6", "training.eval_every=3"]
       for name in ("clip_shared", "clip_random", "blip2_shared", "blip2_random", "small")},
    **{f"pixmo_{name}": ["optimization.num_epochs=1", "vision_encoder.depth=1", "text_encoder.depth=1",
                         "vision_encoder.projection_dim=256", "vision_encoder.mrl_dimensions=[64, 16]"]
       for name in ("alignment", "scratch", "scratch_nomrl", "features", "features_nomrl")},
    "alignment_n_sweep": ["alignment.n_permutations=19", "n_sweep.sizes=[64]", "n_sweep.n_draws=2"],
    "alignment_prh": ["alignment.n_permutations=19", "alignment.metrics=[mutual_knn]", "stages=[uniqueness]"],
    "alignment_mmimdb": ["mmimdb.epochs=2", "alignment.n_permutations=19", "alignment.metrics=[mutual_knn]"],
    **{name: ["training.epochs=2", "model.latent_dim=16", "evaluation.n_severities=1", "evaluation.n_orders=1",
              "evaluation.stream_batch=150"]
       for name in ("flickr8k", "flickr8k_tiny", "flickr8k_features")},
    "clip_finetune": ["finetune.epochs=2", "finetune.warmup_epochs=1", "finetune.n_seeds=1",
                      "alignment.n_permutations=19"]}

TRAINED_ONLY = (  # they are evaluated as others of their script are
    "siglip_cca", "clip", "mlp", "align", "blip", "attention", "cross_modal", "gw_clip_random", "gw_blip2_shared",
    "gw_blip2_random", "gw_small", "pixmo_scratch_nomrl", "pixmo_features_nomrl", "pixmo_alignment", "flickr8k",
    "flickr8k_tiny")
NOTHING_TRAINED = ("alignment_prh", "alignment_n_sweep")


def script_of(config):
    return f"exp_{yaml.safe_load(config.read_text())['experiment']}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_every_config_loads_plain_and_as_demo(config):
    module = importlib.import_module(script_of(config))
    assert common.load_config(module.Config, config).output_dir == f"results/{config.stem}"
    assert common.load_config(module.Config, config, demo=True).output_dir == f"results/demo/{config.stem}"
    assert config.stem in DEMOS


def test_git_ignores_every_default_data_path():
    paths = {"optuna_study.db", "flickr8k"}  # of the search; where encode.py looks
    for config in CONFIGS:
        cfg = common.load_config(importlib.import_module(script_of(config)).Config, config)
        paths |= {str(value) for key, value in common.flatten(dataclasses.asdict(cfg)).items()
                  if key.endswith(("dir", "_file", "parquet")) and value}
    result = subprocess.run(["git", "check-ignore", *(f"{path}/x" for path in paths)], cwd=ROOT,
                            capture_output=True, text=True)
    if result.returncode == 128:
        pytest.skip("not a git repository")
    assert set(result.stdout.split()) == {f"{path}/x" for path in paths}


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """(folder, {config: exit code}): every demo in one folder, so that stand-ins are made once, by forks of one process
    that has imported the scripts."""
    folder = tmp_path_factory.mktemp("demos")
    jobs = [[config.stem, script_of(config), [str(config), "--demo", "device=cpu", *DEMOS[config.stem],
             *["--stage", "train"] * (config.stem in TRAINED_ONLY)]] for config in CONFIGS]
    code = """if True:
        import importlib, json, os, sys
        import matplotlib.pyplot, sklearn.manifold, torch._inductor  # once, not in every fork
        codes = {}
        for name, script, arguments in json.load(sys.stdin):
            main = importlib.import_module(script).main
            if not (child := os.fork()):
                for stream, file in ((1, "out"), (2, "err")):
                    os.dup2(os.open(f"{name}.{file}", os.O_WRONLY | os.O_CREAT), stream)
                code = 99
                try:
                    code = main(arguments)
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        json.dump(codes, sys.stdout)"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, input=json.dumps(jobs),
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_every_demo_runs_and_reports_synthetic_results(config, demos):
    folder, codes = demos
    out, err = ((folder / f"{config.stem}.{kind}").read_text() for kind in ("out", "err"))
    assert (codes[config.stem], err) == (0, "")
    (run_folder,) = [path for path in (folder / "results/demo").iterdir() if path.name.split(",")[0] == config.stem]
    assert (run_folder / "best_model.pt").exists() or config.stem in NOTHING_TRAINED
    if config.stem not in TRAINED_ONLY:
        assert "SYNTHETIC" in out
        assert "chance" in out
        assert json.loads((run_folder / "results.json").read_text())["synthetic"] is True


@pytest.mark.parametrize("script", sorted({script_of(c) for c in CONFIGS}))
def test_help_lists_every_key_with_a_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["-h"])
    assert end.value.code == 0
    text = capsys.readouterr().out

    def check(section, prefix=""):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                check(value, f"{prefix}{field.name}.")
            else:
                assert re.search(rf"^  {re.escape(prefix + field.name)}=\S* +\S+", text,
                                 flags=re.MULTILINE), prefix + field.name
    check(importlib.import_module(script).Config())


@pytest.mark.parametrize(("args", "lines"), [
    (["configs/blip.yaml"], ["model.type=blip", "loss.temperature=null", "study_name=xclip_siglip_tuning"]),
    (["configs/quick_test.yaml", "--demo"], ["data.train=1000", "output_dir=results/demo/quick_test"]),
    (["configs/tune/siglip.yaml"], ["study_name=siglip_tuning", "model.type=siglip"])])
def test_help_beside_a_config_shows_its_values(args, lines, capsys):
    import exp_coco_heads as exp
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in args]
    with pytest.raises(SystemExit):
        exp.main([*words, "-h"])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if "=" in line} >= set(lines)


@pytest.mark.parametrize(("text", "message"), [
    ("seeed: 1", "unknown key seeed; did you mean seed?"), (None, "no such config"),
    ("base: x.yaml\nn_trails: 3\nsearch_space: {}", "unknown key n_trails; did you mean n_trials?")])
def test_help_beside_a_config_with_a_mistake_says_that_it_shows_the_defaults(tmp_path, capsys, text, message):
    import exp_coco_heads as exp
    path = tmp_path / "mine.yaml"
    if text:
        path.write_text(f"experiment: coco_heads\n{text}\n")
    with pytest.raises(SystemExit):
        exp.main([str(path), "-h"])
    assert re.search(rf"^{re.escape(f'{path}: {message}')}.*; shown are the defaults$", capsys.readouterr().out,
                     flags=re.MULTILINE)


@pytest.mark.parametrize("args", [[], ["--stage", "dance", "configs/siglip.yaml"],
                                  ["configs/siglip.yaml", "--demmo"], ["seed=1"]])
def test_wrong_usage_exits_2(args, capsys):
    import exp_coco_heads as exp
    assert exp.main(args) == 2
    assert capsys.readouterr().err.count("\n") == 1


class Watch(TorchDispatchMode):
    """Notes what would wait for a device: numbers and shapes that are read from tensors."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        of_mask = name.strip("_").startswith("index") and isinstance(args[1], (list, tuple)) and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.WAITING or of_mask:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


class WatchHost(TorchFunctionMode):
    """Notes tensors that are made without a device, in CPU memory."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("arange", "tensor", "zeros", "ones", "full", "empty", "eye", "rand", "randn", "randint", "randperm",
                    "linspace", "as_tensor", "from_numpy") and "device" not in (kwargs or {}):
            self.made.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["siglip", "attention", "cross_modal", "blip", "align", "gw_clip_shared", "gw_small",
                                  "pixmo_scratch", "pixmo_features", "flickr8k_tiny", "clip_finetune",
                                  "alignment_mmimdb"])
def test_a_training_step_reads_nothing_from_its_device_and_makes_nothing_beside_it(name, demos, monkeypatch):
    """What a GPU needs to record it as a graph."""
    monkeypatch.chdir(demos[0])
    built = profile_flops.build(ROOT / f"configs/{name}.yaml", 8, device="cpu")
    model, batch, step = built.model, built.batch, built.module.train_step
    model.train()
    if hasattr(built.module, "draw_passes"):  # as they are on a GPU
        batch |= {**built.module.draw_passes(model), "adapted": torch.tensor([1.0, 0, 1, 1])}
    optimizer = SimpleNamespace(zero_grad=built.optimizer.zero_grad, step=lambda: None)  # its fused kernel is torch's
    with WatchHost() as host, Watch() as device:
        losses = step(model, batch, optimizer)
    assert (device.waits, host.made) == ([], [])
    assert all(torch.isfinite(loss) for loss in losses.values())


def readme_commands():
    """Of the README and the pages in docs/."""
    pages = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", pages, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if re.search(r"(python|torchrun) .*\w+\.py", line)]


@pytest.mark.parametrize("command", readme_commands())
def test_every_readme_command_parses(command):
    """The script, its config and every override of each command in the README exist; nothing is run."""
    words = shlex.split(
        re.search(r"(?:python|torchrun.*?) (\w+\.py.*?)(?:&&|;|$)", command).group(1).replace("$seed", "1"))
    assert (ROOT / words[0]).exists()
    if words[0] == "encode.py" and "-h" not in words:
        assert callable(importlib.import_module("encode").parse_command_line(words[1:]).run)
    if words[0].startswith("exp_") and "-h" not in words:
        module = importlib.import_module(words[0].removesuffix(".py"))
        if words[1:] == ["--stage", "tune"]:  # without a YAML: configs/tune/default.yaml
            return
        args = common.parse_command_line(words[1:], (module.Config,), module.__doc__, module.STAGES)
        # not a config that the README has just had written
        if args.config and Path(args.config).exists() and Path(args.config).parent.name != "tune":
            common.load_config(module.Config, args.config, args.overrides, demo=args.demo)


def test_readme_opens_with_two_commands_and_the_test_command():
    text = (ROOT / "README.md").read_text()
    assert "python -m pytest" in text
    assert "--demo" in text.split("## ")[1]
    assert len(readme_commands()) > 5


def test_demo_data_is_deterministic_and_not_rewritten(tmp_path):
    import demo_data
    one, other = (demo_data.write_coco(tmp_path / n, n_train=40, n_val=10) for n in "ab")
    files = [sorted((tmp_path / n).iterdir()) for n in "ab"]
    parts = ("image_embeddings.pt", "metadata.json", "text_embeddings.pt")
    assert [p.name for p in files[0]] == [f"{split}2017_{part}" for split in ("train", "val") for part in parts]
    assert common.fingerprint(files[0]) == common.fingerprint(files[1])
    before = [p.stat().st_mtime_ns for p in files[0]]
    assert demo_data.write_coco(one, n_train=40, n_val=10) == one != other
    assert [p.stat().st_mtime_ns for p in files[0]] == before


def test_a_coco_stand_in_of_another_version_is_replaced_and_real_data_never(tmp_path):
    import demo_data
    folder = tmp_path / "coco"
    demo_data.write_coco(folder, n_train=40, n_val=10)
    files, path = sorted(folder.iterdir()), folder / "val2017_metadata.json"
    written, metadata = common.fingerprint(files), common.read_json(path)
    del metadata["version"]  # as the first version wrote it
    common.write_json(path, metadata)
    demo_data.write_coco(folder, n_train=40, n_val=10)
    assert common.fingerprint(files) == written
    common.write_json(path, {**metadata, "synthetic": False})
    real = common.fingerprint(files)
    demo_data.write_coco(folder, n_train=40, n_val=10)
    assert common.fingerprint(files) == real
