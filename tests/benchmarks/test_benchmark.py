from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import dataset_files
import numpy as np
import pytest
import torch
from engine_toy import restored_loggers
from tiny_model import tiny_config, tiny_model
from torch import nn

from clouds.config import load_config
from clouds.config.defaults import KEYS
from clouds.data.structures import Domain
from clouds.engine import Trainer
from clouds.self_training.pseudo_labeler import PseudoLabeler, PseudoLabelOptions
from clouds.self_training.refiners.base import RefinedLabel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import part_clock  # noqa: E402
import profiler  # noqa: E402
import profiler_data  # noqa: E402
from part_clock import PartClock, PeakMemory  # noqa: E402
from profiler import measure_evaluation, measure_training  # noqa: E402

TOOL = ROOT / "tools" / "benchmark.py"
BASE = ROOT / "configs" / "base.yaml"

TRAIN_PARTS = [
    "waiting for data",
    "backbone",
    "pixel decoder",
    "mask decoder",
    "matcher and criterion",
    "backward",
    "clipping and optimizer",
    "everything else",
]
EVAL_PARTS = [
    "preparing the image",
    "normalizing and padding",
    "backbone",
    "pixel decoder",
    "mask decoder",
    "scores and class map",
    "confusion matrix",
    "everything else",
]


def small_config(**settings):
    defaults = {
        "DATASETS__TEST": (),
        "DATALOADER__NUM_WORKERS": 0,
        "INPUT__CROP__SIZE": (64, 64),
        "SOLVER__IMS_PER_BATCH": 2,
        "TEST__SHORT_SIDE": 0,
    }
    return tiny_config(**(defaults | settings))


class HandClock:
    """Time that passes only in `wait`."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time

    def wait(self, seconds):
        self.time += seconds


# ---------------------------------------------------------------- the clock


def test_time_counts_for_the_innermost_part():
    hand, waits = HandClock(), []
    clock = PartClock(lambda: waits.append(hand.time), hand)
    hand.wait(50)  # nothing is open
    with clock.part("outer"):
        hand.wait(1)
        clock.enter("inner")
        hand.wait(2)
        with clock.part("innermost"):
            hand.wait(4)
        hand.wait(8)
        clock.switch("after")
        hand.wait(16)
        assert clock.current == "after"
        clock.leave()
        hand.wait(32)
    hand.wait(50)
    assert clock.current is None
    with clock.part("inner"):
        hand.wait(64)
    assert clock.seconds == {"outer": 33, "inner": 74, "innermost": 4, "after": 16}
    # synchronized at each border
    assert waits == [150, 151, 153, 157, 165, 165, 181, 213, 263, 327]


# ---------------------------------------------------------------- the parts of a step


class Waits(nn.Module):
    """Takes a given time in the forward and in the backward pass."""

    def __init__(self, hand, forward, backward=0.0):
        super().__init__()
        self.hand, self.durations = hand, (forward, backward)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        hand, (forward, backward) = self.hand, self.durations

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                hand.wait(forward)
                return value.clone()

            @staticmethod
            def backward(ctx, gradient):
                hand.wait(backward)
                return gradient

        return Function.apply(x * self.weight)


class Sketch(nn.Module):
    """A model with the modules of CLOUDS, each of a known duration."""

    def __init__(self, hand):
        super().__init__()
        self.hand = hand
        self.backbone = Waits(hand, 1, 1024)
        head = nn.Module()
        head.pixel_decoder, head.predictor = Waits(hand, 2, 2048), Waits(hand, 4)
        head.forward = lambda x: head.predictor(head.pixel_decoder(x))
        self.sem_seg_head = head
        self.criterion = Waits(hand, 8)

    def forward(self, batch):
        self.hand.wait(16)
        x = self.sem_seg_head(self.backbone(torch.ones(2)))
        self.hand.wait(32)
        return {"loss_ce": self.criterion(x).sum()}

    def segment(self, batch):
        self.hand.wait(16)
        self.sem_seg_head(self.backbone(torch.ones(2)))
        self.hand.wait(32)
        size = batch[0]["height"], batch[0]["width"]
        return [torch.zeros(size, dtype=torch.uint8)]


def hooks_of(model, optimizer=None):
    hooks = [m._forward_hooks | m._forward_pre_hooks for m in model.modules()]
    if optimizer is not None:
        hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return [hook for by_id in hooks for hook in by_id.values()]


def test_parts_of_a_training_step(tmp_path):
    hand = HandClock()
    cfg = small_config(OUTPUT_DIR=str(tmp_path))
    trainer = Trainer(cfg, model=Sketch(hand), loader=lambda start: iter(()))
    clip, step = trainer.train_step.clip, trainer.optimizer.step

    def slow_clip():
        hand.wait(64)
        return clip()

    trainer.train_step.clip = slow_clip
    trainer.optimizer.register_step_pre_hook(lambda *_: hand.wait(128))
    before = hooks_of(trainer.model, trainer.optimizer)
    clock = PartClock(lambda: None, hand)
    with profiler.profiled_step(trainer, clock) as train_step, clock.part(profiler.REST):
        # this hook is called after that of the profiler, so within the measured time
        inside = trainer.optimizer.register_step_pre_hook(lambda *_: hand.wait(256))
        train_step(0, [{}, {}], time.perf_counter())
        inside.remove()
    assert trainer.optimizer.step == step
    assert hooks_of(trainer.model, trainer.optimizer) == before
    assert clock.seconds == {
        "everything else": 16 + 32 + 128,
        "backbone": 1,
        "pixel decoder": 2,
        "mask decoder": 4,
        "matcher and criterion": 8,
        "backward": 1024 + 2048,
        "clipping and optimizer": 64 + 256,
    }


class SlowRefiner:
    """Returns the teacher's labels in eight seconds."""

    needs_scores = False

    def __init__(self, hand):
        self.hand = hand

    def refine(self, images, labels, seeds):
        self.hand.wait(8)
        return [RefinedLabel.from_teacher(label) for label in labels]


def joint_config(**settings):
    return small_config(DATASETS__TRAIN=("gta5", "sd_x"), MODEL__CLOUDS__REFINER="none", **settings)


def test_teacher_and_refiner_are_parts_of_a_joint_step(tmp_path):
    hand = HandClock()
    cfg = joint_config(OUTPUT_DIR=str(tmp_path))
    trainer = Trainer(cfg, loader=lambda start: iter(()))
    teacher = trainer.pseudo_labeler.teacher
    labeler = PseudoLabeler(teacher, lambda device: SlowRefiner(hand), PseudoLabelOptions())
    trainer.model.pseudo_labeler = labeler
    head = labeler.teacher_parts["sem_seg_head"]
    head.predictor.register_forward_pre_hook(lambda *_: hand.wait(4))
    trainer.model.criterion.register_forward_pre_hook(lambda *_: hand.wait(16))
    labeler.prepare(trainer.device)
    before = vars(labeler).copy()
    clock = PartClock(lambda: None, hand)
    batch = next(iter(profiler_data.random_batches(cfg)(0)))
    with profiler.profiled_step(trainer, clock) as train_step, clock.part(profiler.REST):
        train_step(0, batch, time.perf_counter())
    found = {name: seconds for name, seconds in clock.seconds.items() if seconds}
    # the criterion's hook is called before that of the profiler
    assert found == {"teacher": 4, "refiner": 8, "everything else": 16}
    assert vars(labeler) == before and not head._forward_pre_hooks


def test_a_measured_joint_step(tmp_path):
    cfg = joint_config(OUTPUT_DIR=str(tmp_path), SOLVER__IMS_PER_BATCH=3)
    trainer = Trainer(cfg, loader=profiler_data.random_batches(cfg))
    trainer.resume_or_load(resume=False)
    found = measure_training(trainer, iterations=1, warmup=0)
    names = [part.name for part in found.parts]
    assert names == [*TRAIN_PARTS[:2], "teacher", "refiner", *TRAIN_PARTS[2:]]
    assert found.subject == "batch of 3, 33% of them generated, crop 64x64"


def test_parts_of_a_prediction():
    hand = HandClock()
    model = Sketch(hand)
    clock = PartClock(lambda: None, hand)
    with profiler.profiled_inference(model, clock), clock.part(profiler.INPUT):
        model.segment([{"height": 2, "width": 3}])
    assert hooks_of(model) == []
    assert clock.seconds == {
        "normalizing and padding": 16,
        "backbone": 1,
        "pixel decoder": 2,
        "mask decoder": 4,
        "scores and class map": 32,
    }


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_measured_steps_are_training_steps(tmp_path):
    """Weights after 1 + 2 x 2 measured steps are those after five iterations of training."""
    cfg = small_config(OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=5, SOLVER__BASE_LR=0.01)
    measured = Trainer(cfg, loader=profiler_data.random_batches(cfg))
    start = weights_of(measured.model)
    measured.resume_or_load(resume=False)
    found = measure_training(measured, iterations=2, warmup=1)
    trained = Trainer(cfg, loader=profiler_data.random_batches(cfg))
    trained.train()
    for name, value in weights_of(trained.model).items():
        assert torch.equal(value, measured.model.get_parameter(name)), name
        moves = trained.model.get_parameter(name).requires_grad and value.numel() > 1000
        assert not moves or not torch.equal(value, start[name]), name

    assert [part.name for part in found.parts] == TRAIN_PARTS
    assert all(len(part.seconds) == 2 for part in (*found.parts, found.whole))
    assert all(min(part.seconds) > 0 for part in found.parts)
    assert found.images == 2
    assert found.images_per_second == pytest.approx(4 / sum(found.whole.seconds))
    assert found.total.seconds == pytest.approx(
        [sum(part.seconds[i] for part in found.parts) for i in range(2)]
    )
    # other processes may run on the machine
    assert 0.2 < found.total.median / found.whole.median < 5
    assert 0.1 < found.peak_gib < 16


def test_measured_evaluation(tmp_path):
    cfg = small_config(TEST__SHORT_SIDE=32)
    model = tiny_model().train()
    rounds = []
    found = measure_evaluation(
        cfg,
        model,
        profiler_data.random_images(cfg, (64, 128)),
        iterations=3,
        warmup=2,
        progress=lambda r, name: rounds.append((name, len(r))) or r,
    )
    assert [part.name for part in found.parts] == EVAL_PARTS
    assert all(len(part.seconds) == 3 for part in (*found.parts, found.whole))
    assert all(min(part.seconds) > 0 for part in found.parts)
    assert 0.2 < found.total.median / found.whole.median < 5
    assert found.subject == "protocol 'native', input 32x64 scored at 64x128"
    assert rounds == [("evaluation, warm-up", 2), ("evaluation", 3)]


def test_images_without_a_label_are_not_scored():
    hand = HandClock()
    sample = {"image": torch.zeros(3, 4, 6, dtype=torch.uint8), "height": 4, "width": 6}
    found = measure_evaluation(small_config(), Sketch(hand), lambda number: sample, 1, 0)
    assert "confusion matrix" not in [part.name for part in found.parts]


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_memory_can_be_reset():
    gc.collect()  # models of other tests are not to be freed in between
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.gib()
    block = np.ones(400 << 20, np.uint8)
    during = memory.gib()
    del block
    # the kernel counts per thread, with an error of some pages
    assert memory.gib() == pytest.approx(during, abs=0.01)
    assert 0.35 < during - before < 0.6
    memory.reset()
    assert memory.gib() - before < 0.2


def test_peak_memory_that_cannot_be_reset_is_reported(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(part_clock, "RESET_PEAK", tmp_path)  # a folder: it cannot be written
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    assert "since the start of the process" in caplog.text
    assert memory.gib() > 0.1


# ---------------------------------------------------------------- random images


def test_random_samples_are_like_a_crop():
    sample = profiler_data.random_sample((96, 128), 3, Domain.SOURCE)
    image, label = sample["image"], sample["sem_seg"]
    assert image.shape == (3, 96, 128) and image.dtype == torch.uint8
    assert label.shape == (96, 128) and label.dtype == torch.uint8
    classes = set(label.unique().tolist())
    assert 255 in classes and 8 <= len(classes - {255}) <= 12
    assert max(classes - {255}) <= 18
    # blocks of an eighth of the shorter side
    assert torch.equal(label[:12, :12], label[0, 0].expand(12, 12))
    assert 20 < image.float().std() < 110
    assert torch.equal(image, profiler_data.random_sample((96, 128), 3, Domain.SOURCE)["image"])
    assert not torch.equal(image, profiler_data.random_sample((96, 128), 4, Domain.SOURCE)["image"])


def test_random_batches_of_a_config():
    cfg = small_config(SOLVER__IMS_PER_BATCH=3, INPUT__CROP__SIZE=(32, 64))
    batches = iter(profiler_data.random_batches(cfg)(0))
    first, second, third = (next(batches) for _ in range(3))
    assert [len(batch) for batch in (first, second, third)] == [3, 3, 3]
    assert len({sample["seed"] for sample in first + second}) == 6
    assert third is first
    assert all(sample["image"].shape == (3, 32, 64) for sample in first + second)
    assert all("sem_seg" in sample for sample in first + second)
    cfg.DATASETS.TRAIN = ("gta5", "sd_x")
    batch = next(iter(profiler_data.random_batches(cfg)(0)))
    assert [sample["domain"].value for sample in batch] == ["source", "source", "generated"]
    assert ["sem_seg" in sample for sample in batch] == [True, True, False]
    assert batch[2]["clean_image"].shape == (3, 32, 64)


def test_other_label_spaces(tmp_path, monkeypatch):
    """Random labels, counts and images of a dataset have the classes of the config."""
    overrides = ["DATASETS.TRAIN", "('camvid11_train',)", "DATASETS.TEST", "('camvid_val',)"]
    cfg = load_config(None, [*overrides, "TEST.SHORT_SIDE", "0", "INPUT.CROP.SIZE", "(96, 96)"])
    classes = {
        int(c)
        for batch in itertools.islice(profiler_data.random_batches(cfg)(0), 2)
        for sample in batch
        for c in sample["sem_seg"].unique()
    }
    assert classes == {*range(11), 255}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    _, ids = dataset_files.write(tmp_path, "camvid_val", 0)  # train ids of Cityscapes
    label = profiler_data.dataset_images(cfg, "camvid_val")(0)["label"].numpy()
    # road, building, sky and car by the names in both label spaces, in the order of camvid_11
    same = {0: 3, 2: 1, 10: 0, 13: 8}
    for theirs, ours in same.items():
        assert np.array_equal(label == ours, ids == theirs)


# ---------------------------------------------------------------- the tool


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_tool"] = module
    spec.loader.exec_module(module)
    with restored_loggers():
        yield module
    del sys.modules["benchmark_tool"]


@pytest.fixture
def run(tool, capsys):
    """Runs the command with a tiny model; returns exit code, stdout and stderr."""

    def run(*words, **settings):
        flags = [str(word) for word in words]
        if "--config-file" not in flags:
            flags = ["--config-file", str(BASE), *flags]
        try:
            code = tool.main(flags + overrides(small_config(**settings)))
        except SystemExit as leaving:
            code = leaving.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def overrides(cfg):
    """KEY VALUE words that turn the base config into `cfg`."""
    words = []
    for key in KEYS:
        value = cfg
        for part in key.name.split("."):
            value = value[part]
        if value != key.default:
            words += [key.name, repr(value)]
    return words


def test_the_tool_on_random_data(run, tmp_path):
    path = tmp_path / "new" / "numbers.json"
    flags = ["--random-data", "--iterations", "2", "--eval-size", "64", "96", "--json", path]
    done = run(*flags)
    assert done.code == 0
    found = json.loads(path.read_text())
    assert [part["name"] for part in found["train"]["parts"]] == TRAIN_PARTS
    assert [part["name"] for part in found["eval"]["parts"]] == EVAL_PARTS
    for measured in (found["train"], found["eval"]):
        for timing in (*measured["parts"], measured["sum_of_parts"], measured["whole"]):
            assert 0 < timing["min_s"] <= timing["median_s"] <= timing["max_s"]
            assert timing["median_s"] == pytest.approx(np.median(timing["all_s"]))
            assert timing["name"] in done.out
            assert f"{timing['median_s']:.4f}" in done.out
        assert measured["sum_of_parts"]["all_s"] == pytest.approx(
            np.sum([part["all_s"] for part in measured["parts"]], axis=0)
        )
        rate = measured["images"] / measured["whole"]["median_s"]
        assert measured["images_per_second"] == pytest.approx(rate)
        assert measured["peak_memory_gib"] > 0.1 and measured["peak_memory_of"] == "process"
        assert measured["besides"] == []
    assert found["eval"]["subject"].endswith("input 64x96 scored at 64x96")
    assert found["data"] == {"train": "random images", "eval": "random image"}
    assert "batch of 2, crop 64x64; data: random images" in done.out
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["device"] == "cpu" and found["machine"]["cores"] >= 1
    assert found["overrides"] == overrides(small_config())
    assert found["config"]["INPUT"]["CROP"]["SIZE"] == [64, 64]
    assert found["command"].startswith(f"python tools/benchmark.py --config-file {BASE}")


def test_the_tool_on_datasets(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    for number in range(2):
        dataset_files.write(tmp_path / "data", "gta5", number, (48, 64))
        dataset_files.write(tmp_path / "data", "cityscapes_val", number, (48, 96))
    path = tmp_path / "numbers.json"
    flags = ["--iterations", "1", "--warmup", "0", "--json", path]
    done = run(*flags, DATASETS__TEST=("cityscapes_val", "bdd_val"), OUTPUT_DIR=str(tmp_path / "o"))
    assert done.code == 0
    found = json.loads(path.read_text())
    assert found["data"] == {"train": "gta5", "eval": "cityscapes_val"}
    (sample,) = found["train"]["besides"]
    assert sample["name"] == "one sample, in one process" and sample["name"] in done.out
    assert len(sample["all_s"]) == 2 and sample["min_s"] > 0
    assert found["eval"]["subject"].endswith("input 48x96 scored at 48x96")
    assert not (tmp_path / "o").exists()


def test_one_part_only(run, tmp_path):
    path = tmp_path / "numbers.json"
    flags = ["--parts", "train", "--iterations", "1", "--warmup", "0", "--json", path]
    done = run("--random-data", *flags)
    assert done.code == 0 and "evaluation" not in done.out
    found = json.loads(path.read_text())
    assert "train" in found and "eval" not in found


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--parts", "train,test"], "'test' is not one of train, eval"),
        (["--iterations", "0"], "--iterations is 0; it must be at least 1"),
        (["--warmup", "-1"], "--warmup is -1; it must be at least 0"),
        (["--eval-size", "0", "64"], "--eval-size 0 64: both must be at least 1"),
        (["--parts", "eval"], "DATASETS.TEST is empty"),
        (["--config-file", "no_such.yaml"], "no_such.yaml"),
        (["--random-data", "--json", "/dev/null/a.json"], "--json /dev/null/a.json cannot be"),
    ],
)
def test_invalid_command_lines(run, flags, text):
    done = run(*flags)
    assert done.code == 2
    assert text in done.err and "Traceback" not in done.err


def test_flags_after_overrides(run):
    done = run("--config-file", BASE, "SEED", "1", "--random-data")
    assert done.code == 2
    assert "--random-data comes after KEY VALUE overrides" in done.err


def test_missing_dataset(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    done = run("--parts", "train")
    assert done.code == 2
    assert str(tmp_path / "gta5") in done.err
    assert "--random-data needs no datasets" in done.err


def test_missing_weights(run):
    done = run("--random-data", MODEL__WEIGHTS="no_such.pth")
    assert done.code == 2
    assert "no_such.pth" in done.err and "Traceback" not in done.err


def test_help_is_fast_and_imports_nothing_heavy():
    program = (
        f"import runpy, sys; sys.argv = ['benchmark.py', '--help']\n"
        f"sys.path.insert(0, {str(TOOL.parent)!r})\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
    )
    for flag in ("--config-file", "--iterations", "--random-data", "--eval-size", "--json"):
        assert flag in done.stdout
