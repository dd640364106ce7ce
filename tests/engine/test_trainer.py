from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dataset_files import write
from engine_toy import (
    Toy,
    losses_of,
    restored_loggers,
    script_environment,
    toy_batches,
    toy_config,
)
from run_files import resume
from torch import nn

from clouds.engine import HookBase, Interrupted, NonFiniteLossError, Trainer
from clouds.engine.metrics import MetricsFile
from clouds.engine.train_loop import seed_iteration
from clouds.environment import check_writable, setup_logging

SCRIPT = Path(__file__).resolve().parents[1] / "engine_toy.py"


def trainer_of(folder, *overrides, dropout=0.0, evaluate=None, model=None):
    return Trainer(
        toy_config(folder, *overrides),
        model=Toy(dropout) if model is None else model,
        loader=toy_batches,
        evaluate=evaluate,
    )


def weights_in(path):
    return torch.load(path, weights_only=True)["model"]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def has_learned(model):
    """Whether the loss of a trained toy is below that of an untrained one on the same batch."""
    batch = next(toy_batches(0))
    with torch.no_grad():
        return sum(model(batch).values()) < 0.9 * sum(Toy()(batch).values())


class StopAfter(HookBase):
    """Sends this process a signal in an iteration, after which training stops."""

    def __init__(self, iteration, number=signal.SIGTERM):
        self.iteration = iteration
        self.number = number

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def test_training_equals_a_loop_in_plain_torch(tmp_path):
    trainer = trainer_of(tmp_path, "SOLVER.WARMUP_ITERS", "0", "SOLVER.WEIGHT_DECAY", "0.1")
    trainer.train()

    model = Toy()
    decayed = [model.conv.weight, model.conv.bias]
    others = [model.norm.weight, model.norm.bias, model.query.weight]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    batches = toy_batches(0)
    records = losses_of(tmp_path)
    for iteration in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - iteration / 12) ** 0.9
        losses = model(next(batches))
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(decayed + others, 0.5)
        optimizer.step()
        expected = [total, *(losses[n] for n in ("loss_ce", "loss_mask", "loss_ce_0")), norm]
        assert records[iteration][:5] == pytest.approx([v.item() for v in expected], rel=1e-5)
        assert records[iteration][5] == pytest.approx(0.1 * (1 - iteration / 12) ** 0.9)
    trained = weights_in(tmp_path / "model_final.pth")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-6)
    assert has_learned(model)
    assert torch.equal(trained["backbone.weight"], Toy().backbone.weight)


def test_a_record_is_the_mean_since_the_previous_one(tmp_path):
    trainer_of(tmp_path / "each").train()
    trainer_of(tmp_path / "five", "LOG_PERIOD", "5").train()
    each, five = losses_of(tmp_path / "each"), losses_of(tmp_path / "five")
    assert sorted(five) == [4, 9, 11]
    for last, window in ((4, range(5)), (9, range(5, 10)), (11, range(10, 12))):
        for column in range(5):
            mean = sum(each[i][column] for i in window) / len(window)
            assert five[last][column] == pytest.approx(mean)
        assert five[last][5] == each[last][5]


@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.OPTIMIZER", "ADAMW"),
        ("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", "False"),
        ("LOG_PERIOD", "5", "SOLVER.AMP.ENABLED", "True"),
    ],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path, overrides):
    trainer_of(tmp_path / "whole", *overrides, dropout=0.3).train()
    stopped = trainer_of(tmp_path / "stopped", *overrides, dropout=0.3)
    stopped.register_hooks([StopAfter(6)])
    with pytest.raises(Interrupted, match=r"SIGTERM after 7 of 12 .*--resume.*model_0000006\.pth"):
        stopped.train()
    torch.manual_seed(99)  # the state of the global generators has no effect
    resumed = trainer_of(tmp_path / "stopped", *overrides, dropout=0.3)
    resume(resumed)
    assert resumed.start_iter == 7
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    whole, again = (tmp_path / f / "model_final.pth" for f in ("whole", "stopped"))
    assert equal(weights_in(whole), weights_in(again))


def test_dropout_depends_on_the_seed(tmp_path):
    trainer_of(tmp_path / "a", "SOLVER.MAX_ITER", "2", dropout=0.3).train()
    trainer_of(tmp_path / "b", "SOLVER.MAX_ITER", "2", "SEED", "1", dropout=0.3).train()
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "b")


def start_script(*words):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env=script_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    slow = ("--slow", 0.15, "--dropout", 0.3)
    process = start_script(*slow, tmp_path / "killed")
    wait_for(lambda: (tmp_path / "killed" / "last_checkpoint").exists(), process)
    wait_for(lambda: len(losses_of(tmp_path / "killed")) > 5, process)
    process.kill()
    process.communicate()
    before = losses_of(tmp_path / "killed")
    assert 5 < len(before) < 12
    with (tmp_path / "killed" / "metrics.json").open("a") as file:
        file.write('{"iteration": 6, "total_lo')  # an incomplete line

    trainer = trainer_of(tmp_path / "killed", dropout=0.3)
    assert trainer.resume_or_load(resume=True) in (4, 8)
    trainer.train()
    trainer_of(tmp_path / "whole", dropout=0.3).train()
    whole = losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "killed") == whole
    assert {i: whole[i] for i in before} == before
    files = [tmp_path / name / "model_final.pth" for name in ("killed", "whole")]
    assert equal(*map(weights_in, files))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_message_says_how_to_resume(tmp_path, number):
    process = start_script("--slow", 0.15, tmp_path)
    wait_for(lambda: (tmp_path / "metrics.json").exists(), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = max(losses_of(tmp_path))
    assert f"stopped by {number.name} after {done + 1} of 12 iterations" in errors
    assert f"--resume resumes from '{tmp_path}/model_{done:07d}.pth'" in errors
    assert torch.load(tmp_path / f"model_{done:07d}.pth", weights_only=True)["iteration"] == done


def test_a_second_sigint_stops_at_once(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.register_hooks([StopAfter(2, signal.SIGINT), StopAfter(2, signal.SIGINT)])
    before = signal.getsignal(signal.SIGINT)  # ignored if a shell runs the tests in background
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(trainer_of(tmp_path).train()))
    thread.start()
    thread.join()
    assert done == [None]
    assert len(losses_of(tmp_path)) == 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(tmp_path, value):
    model = Toy()
    model.loss_factor = lambda call: value if call == 6 else 1.0
    trainer = trainer_of(tmp_path, model=model)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    text = str(error.value)
    assert f"iteration 6: loss_ce is {value}" in text
    assert "loss_mask" not in text
    assert [f"toy_{n:05d}.png" in text for n in range(22, 30)] == [False] * 2 + [True] * 4 + [
        False
    ] * 2
    assert f"last checkpoint is '{tmp_path}/model_0000003.pth'" in text
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000003.pth"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sorted(losses_of(tmp_path)) == list(range(6))


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    model = Toy()
    model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteLossError, match=r"iteration 0: the gradient norm is nan") as error:
        trainer_of(tmp_path, model=model).train()
    assert "No checkpoint was saved" in str(error.value)


def test_bf16_trains_float_weights(tmp_path):
    seen = []
    model = Toy()
    model.conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer_of(tmp_path, "SOLVER.AMP.ENABLED", "True", model=model).train()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert has_learned(model)


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16"):
        trainer_of(tmp_path, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "fp16")


def test_a_step_that_overflows_in_fp16_is_skipped(tmp_path):
    model = Toy()
    calls = []
    model.norm.weight.register_hook(
        lambda gradient: calls.append(1) or gradient * (math.inf if len(calls) == 3 else 1.0)
    )
    trainer = trainer_of(tmp_path, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train_step.scaler = trainer.scaler = scaler
    before = {}

    class Watch(HookBase):
        def before_step(self):
            before[self.trainer.iter] = model.conv.weight.detach().clone()

    trainer.register_hooks([Watch()])
    trainer.train()
    moved = [not torch.equal(before[i], before[i + 1]) for i in range(11)]
    assert moved == [True, True, False] + [True] * 8
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [r["loss_scale"] for r in records] == [1024.0] * 3 + [512.0] * 9
    assert records[2]["grad_norm"] is None
    assert has_learned(model)

    trainer_of(tmp_path / "plain").train()
    scaled, plain = losses_of(tmp_path), losses_of(tmp_path / "plain")
    assert [scaled[i] == pytest.approx(plain[i]) for i in (0, 1)] == [True, True]
    assert [scaled[i][0] == pytest.approx(plain[i][0]) for i in (2, 3)] == [True, False]


class Evaluation:
    """A fake evaluation whose result is the number of its calls.

    At call `fail_at` a signal arrives; with `loader_fails` the loader then raises an error.
    """

    def __init__(self, fail_at=0, loader_fails=False):
        self.calls = 0
        self.fail_at = fail_at
        self.loader_fails = loader_fails

    def __call__(self):
        self.calls += 1
        if self.calls == self.fail_at:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                if self.loader_fails:
                    raise RuntimeError("a loader process was killed")
        metrics = {"toy/mIoU": float(self.calls), "toy/none": math.nan}
        image = torch.zeros(4, 6, 3, dtype=torch.uint8).numpy()
        return SimpleNamespace(flat=lambda: metrics, panels={"toy": image})


def evaluations_of(folder):
    records = MetricsFile(folder / "metrics.json").records()
    return [(r["iteration"], r["toy/mIoU"], r["toy/none"]) for r in records if "evaluation" in r]


def with_evaluation(folder, evaluation, *overrides):
    return trainer_of(folder, "TEST.EVAL_PERIOD", "5", *overrides, evaluate=evaluation)


def test_evaluation_every_period_and_at_the_end(tmp_path):
    evaluation = Evaluation()
    results = with_evaluation(tmp_path, evaluation).train()
    assert evaluations_of(tmp_path) == [(4, 1.0, None), (9, 2.0, None), (11, 3.0, None)]
    assert results.flat()["toy/mIoU"] == 3.0
    trainer_of(tmp_path / "none").train()
    assert losses_of(tmp_path) == losses_of(tmp_path / "none")  # no effect on training


def test_evaluation_at_the_end_only(tmp_path):
    with_evaluation(tmp_path, Evaluation(), "TEST.EVAL_PERIOD", "0").train()
    assert evaluations_of(tmp_path) == [(11, 1.0, None)]


def test_a_period_that_ends_with_training_evaluates_once(tmp_path):
    with_evaluation(tmp_path, Evaluation(), "TEST.EVAL_PERIOD", "6").train()
    assert [iteration for iteration, *_ in evaluations_of(tmp_path)] == [5, 11]


@pytest.mark.parametrize("loader_fails", [False, True])
def test_an_interrupted_evaluation_is_repeated_on_resuming(tmp_path, loader_fails):
    with pytest.raises(Interrupted, match="after 10 of 12"):
        with_evaluation(tmp_path, Evaluation(2, loader_fails)).train()
    assert [iteration for iteration, *_ in evaluations_of(tmp_path)] == [4]
    evaluation = Evaluation()
    resume(with_evaluation(tmp_path, evaluation))
    assert [iteration for iteration, *_ in evaluations_of(tmp_path)] == [4, 9, 11]
    assert evaluation.calls == 2
    trainer_of(tmp_path / "whole").train()
    assert losses_of(tmp_path) == losses_of(tmp_path / "whole")


def test_resuming_a_complete_run_only_evaluates(tmp_path):
    with_evaluation(tmp_path, Evaluation()).train()
    before = weights_in(tmp_path / "model_final.pth")
    evaluation = Evaluation()
    resume(with_evaluation(tmp_path, evaluation))
    assert evaluation.calls == 1
    assert [iteration for iteration, *_ in evaluations_of(tmp_path)] == [4, 9, 11]
    assert len(losses_of(tmp_path)) == 12
    assert equal(before, weights_in(tmp_path / "model_final.pth"))


def test_zero_iterations(tmp_path):
    evaluation = Evaluation()
    with_evaluation(tmp_path, evaluation, "SOLVER.MAX_ITER", "0").train()
    assert evaluation.calls == 1
    assert losses_of(tmp_path) == {}


def test_a_resumed_run_may_be_longer_and_changes_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer_of(tmp_path, "SOLVER.MAX_ITER", "4").train()
    resume(trainer_of(tmp_path, "SOLVER.MAX_ITER", "8", "LOG_PERIOD", "2"))
    assert "resuming at iteration 4" in caplog.text
    assert "SOLVER.MAX_ITER: 4 -> 8" in caplog.text
    assert "LOG_PERIOD" not in caplog.text
    assert sorted(losses_of(tmp_path)) == [0, 1, 2, 3, 5, 7]


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path, caplog):
    trainer = trainer_of(tmp_path)
    resume(trainer)
    assert trainer.start_iter == 0
    assert "no checkpoint" in caplog.text


def test_training_starts_from_the_weights_of_the_config(tmp_path):
    trainer_of(tmp_path / "first").train()
    final = str(tmp_path / "first" / "model_final.pth")
    second = trainer_of(tmp_path / "second", "MODEL.WEIGHTS", final)
    assert second.resume_or_load(resume=False) == 0
    assert equal(second.model.state_dict(), weights_in(final))
    assert not second.optimizer.state


def test_a_loader_that_ends_is_an_error(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.loader = lambda start: [next(toy_batches(0))]
    with pytest.raises(ValueError, match="ended before iteration 1"):
        trainer.train()


def test_partial_files_are_deleted(tmp_path):
    (tmp_path / f".model_0000003.pth.{'0a' * 16}.part").write_bytes(b"half")
    (tmp_path / ".another's.part").write_bytes(b"half")
    trainer_of(tmp_path).train()
    assert [path.name for path in tmp_path.glob(".*")] == [".another's.part"]


def test_tensorboard_has_scalars_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with_evaluation(tmp_path, Evaluation()).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = losses_of(tmp_path)
    totals = [(e.step, e.value) for e in events.Scalars("loss/total")]
    assert totals == [(i, pytest.approx(losses[i][0])) for i in range(12)]
    assert [(e.step, e.value) for e in events.Scalars("mIoU/toy")] == [(4, 1), (9, 2), (11, 3)]
    image = events.Images("images/toy")[0]
    assert (image.step, image.width, image.height) == (4, 6, 4)


def test_console_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "clouds.engine.hooks")
    trainer_of(tmp_path, "LOG_PERIOD", "6").train()
    lines = [r.getMessage() for r in caplog.records if r.name == "clouds.engine.hooks"]
    assert len(lines) == 2
    for part in ("iteration 6/12", "ETA 0:00:0", "loss ", "(ce ", "mask ", "grad ", "lr ", "img/s"):
        assert part in lines[0]
    assert "GiB" in lines[0]
    assert "data 0.0" in lines[0]
    assert "ce_0" not in lines[0]


def test_seeds_depend_on_seed_iteration_and_rank():
    def draw(*args):
        seed_iteration(*args)
        return torch.rand(1).item()

    draws = {args: draw(*args) for args in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(set(draws.values())) == 4
    assert all(draw(*args) == value for args, value in draws.items())


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"OUTPUT_DIR '.*file/out' cannot be written: Not a dir"):
        check_writable(str(tmp_path / "file" / "out"))
    check_writable(str(tmp_path / "new" / "out"))
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_logs_go_to_a_file_per_process(tmp_path):
    logger = logging.getLogger("clouds.engine.test")
    with restored_loggers():
        for rank in (0, 1):
            setup_logging(str(tmp_path), rank)
            logger.info("rank is %d", rank)
    assert "rank is 0" in (tmp_path / "log.txt").read_text()
    text = (tmp_path / "log.txt.rank1").read_text()
    assert "rank is 1" in text
    assert "rank is 0" not in text


def test_logged_names_that_are_not_utf8_are_escaped(tmp_path, capsys):
    with restored_loggers():
        setup_logging(str(tmp_path), 0)
        logging.getLogger("clouds.engine.test").warning("no image: %s", os.fsdecode(b"a\xff.png"))
    assert "no image: a\\udcff.png" in (tmp_path / "log.txt").read_text("utf-8")
    captured = capsys.readouterr()
    assert "no image: a\\udcff.png" in captured.out
    assert captured.err == ""


class Brightness(nn.Module):
    """The loss is the mean of the images times a parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        mean = torch.stack([sample["image"].float().mean() for sample in batch]).mean()
        return {"loss_ce": mean * self.factor.sum()}


def test_skipped_files_are_in_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for number in range(6):
        write(tmp_path, "gta5", number)
    for number in (1, 4):
        (tmp_path / f"gta5/images/{number:05d}.png").write_bytes(b"no image")
    overrides = ("DATASETS.TRAIN", "('gta5',)", "INPUT.CROP.SIZE", "(16, 16)", "LOG_PERIOD", "3")
    overrides += ("DATALOADER.NUM_WORKERS", "0", "DATALOADER.FAULTY", "skip")
    Trainer(toy_config(tmp_path / "run", *overrides), model=Brightness()).train()
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    # an epoch has 6 images, so both are met in the first two batches of 4
    assert [json.loads(line)["faulty_files"] for line in lines] == [2] * 4
