"""A training step makes the host wait for the device once, for the costs of matching.

The losses are read after that wait of the next step, when they have arrived. On a CPU, where they
are not deferred, they are read in the step itself.

On a CPU nothing waits. Which operations would wait on CUDA is known from their names: those that
read a value on the host, and those whose output's size depends on values on the device. Copies to
the device wait too, unless they are non-blocking; so numbers of the host reach the device as fills
or non-blocking copies.
"""

from __future__ import annotations

import collections
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_config
from torch.overrides import TorchFunctionMode

from clouds.engine import Trainer
from clouds.engine.step_result import HostCopy
from clouds.modeling import criterion, matcher
from clouds.modeling.build import build_seeded

ROOT = Path(__file__).parents[2] / "clouds"
READS = {"item", "tolist", "numpy", "cpu", "equal", "allclose", "is_nonzero", "__array__"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__format__", "__contains__"}
SIZED_BY_VALUES = {"nonzero", "argwhere", "bincount", "unique", "unique_consecutive"}
SIZED_BY_VALUES |= {"masked_select"}
COPIES_FROM_HOST = {"tensor", "as_tensor", "new_tensor"}

ON_THE_HOST = {
    # The label is on the host, where the data loader put it.
    ("structures.py", "masks_from_label"): {"bincount": 1, "nonzero": 1, "__getitem__": 1},
    # The costs were copied by `match`.
    ("matcher.py", "_assign"): {"numpy": 1},
}
WAITS = {
    ("matcher.py", "match"): {"cpu": 1},
    # On a GPU these numbers are on the host already, see the tests below.
    ("step_result.py", "read"): {"tolist": 1},
}
ONLY_ON_A_CPU = {"deformable_attention_cpu.py", "points.py:_indices_of_smallest"}


class Calls(TorchFunctionMode):
    """Counts calls of torch that would wait, by the function of clouds that makes them."""

    def __init__(self):
        super().__init__()
        self.counts = collections.defaultdict(collections.Counter)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if masked or name in READS | SIZED_BY_VALUES | COPIES_FROM_HOST:
            self.note(name)
        return function(*args, **(kwargs or {}))

    def note(self, name):
        frame = sys._getframe(2)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(ROOT):
            frame = frame.f_back
        assert frame is not None, f"{name} is called from outside of {ROOT}"
        file, function = Path(frame.f_code.co_filename).name, frame.f_code.co_name
        if not {file, f"{file}:{function}"} & ONLY_ON_A_CPU:
            self.counts[file, function][name] += 1


def sample(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8),
        "sem_seg": torch.randint(0, 4, (64, 96), generator=generator).to(torch.uint8),
        "seed": seed,
        "partly_labelled": seed % 2 == 1,
    }


def trainer_of(folder, images, **settings):
    cfg = tiny_config(
        OUTPUT_DIR=str(folder), DATASETS__TEST=(), SOLVER__IMS_PER_BATCH=images, **settings
    )
    batches = [[sample(2 * i + k) for k in range(images)] for i in range(3)]
    trainer = Trainer(cfg, model=build_seeded(cfg), loader=lambda start: iter(batches))
    trainer.train_step(0, batches[0], time.perf_counter())  # what is made once
    return trainer, lambda: trainer.train_step(1, batches[1], time.perf_counter())


@pytest.mark.parametrize("head", ["linear", "text", "pooled"])
@pytest.mark.parametrize("images", [1, 3])
def test_a_source_step_waits_for_the_costs_and_for_the_losses(head, images, tmp_path):
    _, step = trainer_of(tmp_path, images, MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME=head)
    with Calls() as calls:
        step()
    predictions = 4
    expected = {
        caller: {
            name: count * {"structures.py": images, "matcher.py": 1, "step_result.py": 1}[caller[0]]
            for name, count in counts.items()
        }
        for caller, counts in (ON_THE_HOST | WAITS).items()
    }
    expected["matcher.py", "_assign"] = {"numpy": images * predictions}
    assert {caller: dict(counts) for caller, counts in calls.counts.items()} == expected


def test_deferred_losses_are_read_after_the_wait_for_the_next_costs(tmp_path, monkeypatch):
    """So nothing of the step is on the way any more that the host would have to wait for."""
    trainer, step = trainer_of(tmp_path, 2)
    trainer.train_step.deferred = True
    step()
    last, calls = trainer.result_check.unchecked, []
    read, assign = HostCopy.read, matcher.match
    monkeypatch.setattr(HostCopy, "read", lambda self: calls.append(self) or read(self))
    monkeypatch.setattr(criterion, "match", lambda *a: calls.append("costs") or assign(*a))
    step()
    own = trainer.result_check.unchecked
    assert calls[0] == "costs" and "costs" not in calls[1:]
    assert set(calls[1:]) == {last.copy} and own.copy is not last.copy
    assert last.copy.is_read and not own.copy.is_read


def test_the_counter_counts_what_waits():
    values = torch.arange(4.0)
    with Calls() as calls:
        calls.note = lambda name: calls.counts["here"].update([name])
        float(values[0])
        bool(values.sum() > 3)
        values[values > 1].cpu().tolist()
        values.new_tensor([1.0]).numpy()
        torch.nonzero(values)
        values + 1
    counts = calls.counts["here"]
    assert counts.total() == 8, counts
    assert {"__getitem__", "cpu", "tolist", "new_tensor", "numpy", "nonzero"} <= set(counts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
def test_the_waits_that_torch_reports_on_a_gpu(amp, tmp_path):
    settings = {"SOLVER__AMP__ENABLED": bool(amp), "SOLVER__AMP__DTYPE": amp or "bf16"}
    _, step = trainer_of(tmp_path, 3, MODEL__DEVICE="cuda", **settings)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in warned if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in waits]
