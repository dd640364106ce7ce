"""Errors, signals and kills at any moment: what was done is saved, and resuming is exact."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_toy import Toy, losses_of, script_environment, toy_batches, toy_config
from run_files import resume

from clouds.engine import HookBase, Interrupted, Trainer
from clouds.engine.launch import launch

SCRIPT = Path(__file__).resolve().parents[1] / "engine_toy.py"


def trainer_of(folder, *overrides, model=None, loader=toy_batches, evaluate=None):
    model = Toy(dropout=0.3) if model is None else model
    return Trainer(toy_config(folder, *overrides), model, loader, evaluate)


def weights_in(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are rounded in the same way in this process and in those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder).train()
    return folder


def assert_same_run(folder, whole):
    """The same weights, optimizer and records, bit for bit."""
    assert losses_of(folder) == losses_of(whole)
    first, second = (torch.load(f / "model_final.pth", weights_only=True) for f in (folder, whole))
    assert first["iteration"] == second["iteration"] == 11
    for name, value in second["model"].items():
        assert torch.equal(first["model"][name], value), name
    states = [file["optimizer"]["state"] for file in (first, second)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[1].items():
        assert all(torch.equal(states[0][number][name], state[name]) for name in state)


def failing_at(iteration, error):
    """A loader that raises the error in place of that batch."""

    def load(start):
        for number, batch in enumerate(toy_batches(start), start):
            if number == iteration:
                raise error
            yield batch

    return load


ERRORS = [
    OSError(errno.ENOENT, "No such file or directory", "images/7.png"),
    ValueError("broken image"),
    MemoryError(),
    KeyboardInterrupt(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    SystemExit(4),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_saves_and_resuming_is_exact(tmp_path, whole, caplog, error):
    with pytest.raises(type(error)) as raised:
        trainer_of(tmp_path, loader=failing_at(6, error)).train()
    assert raised.value is error
    saved = tmp_path / "model_0000005.pth"
    assert torch.load(saved, weights_only=True)["iteration"] == 5
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert f"stopped by {type(error).__name__}" in line
    assert (
        f"after 6 of 12 iterations. The same command with --resume resumes from '{saved}'" in line
    )
    resumed = trainer_of(tmp_path)
    resume(resumed)
    assert resumed.start_iter == 6
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("iteration", [0, 1, 4, 11])
def test_in_any_iteration(tmp_path, whole, caplog, iteration):
    with pytest.raises(ValueError, match="broken"):
        trainer_of(tmp_path, loader=failing_at(iteration, ValueError("broken image"))).train()
    assert f"after {iteration} of 12 iterations" in caplog.text
    if iteration == 0:
        assert "There is nothing to save" in caplog.text
        assert list(tmp_path.glob("*.pth")) == []
    resumed = trainer_of(tmp_path)
    resume(resumed)
    assert resumed.start_iter == iteration
    assert_same_run(tmp_path, whole)


class Fail(HookBase):
    """Raises in a method in iteration 6."""

    def __init__(self, method):
        setattr(self, method, self.fail)

    def fail(self):
        if self.trainer.iter == 6:
            raise RuntimeError("a hook failed")


@pytest.mark.parametrize(
    ("method", "saved"),
    [
        ("before_step", "model_0000005.pth"),
        ("after_backward", "model_0000005.pth"),
        ("after_step", "model_0000003.pth"),  # other hooks have not had iteration 6
    ],
)
def test_an_error_in_a_hook(tmp_path, whole, caplog, method, saved):
    trainer = trainer_of(tmp_path)
    trainer.register_hooks([Fail(method)])
    with pytest.raises(RuntimeError, match="a hook failed"):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == saved
    not_saved = "They are not saved: the iteration that was ended had changed the weights"
    assert (not_saved in caplog.text) == (method == "after_step")
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


def test_an_error_in_an_evaluation_loses_no_iteration(tmp_path, whole):
    def evaluate():
        raise RuntimeError("a broken test image")

    with pytest.raises(RuntimeError, match="a broken test image"):
        trainer_of(tmp_path, "TEST.EVAL_PERIOD", "6", evaluate=evaluate).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


def test_an_error_in_the_optimizers_step_saves_nothing_half_done(tmp_path, whole):
    trainer = trainer_of(tmp_path)
    step = trainer.optimizer.step

    def half(*args, **options):
        with torch.no_grad():
            if trainer.iter == 6:
                trainer.model.conv.weight.add_(1.0)
                raise RuntimeError("killed worker")
        return step(*args, **options)

    trainer.optimizer.step = half
    with pytest.raises(RuntimeError, match="killed worker"):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


class Statistics(Toy):
    """Counts forward passes in a buffer, as batch normalization does; may raise after that."""

    def __init__(self, fail_at=-1):
        super().__init__(dropout=0.3)
        self.register_buffer("passes", torch.zeros(()))
        self.fail_at = fail_at

    def forward(self, batch):
        self.passes += 1
        if self.calls == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


def test_a_forward_pass_that_changed_buffers_is_not_saved(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        trainer_of(tmp_path, model=Statistics(fail_at=6)).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    resume(trainer_of(tmp_path, model=Statistics()))
    assert weights_in(tmp_path / "model_final.pth")["passes"] == 12


def test_weights_that_are_not_finite_are_not_saved(tmp_path, caplog):
    class Break(HookBase):
        def after_step(self):
            if self.trainer.iter == 5:
                self.trainer.model.norm.weight.data[0] = math.nan

    trainer = trainer_of(tmp_path, loader=failing_at(6, ValueError("broken image")))
    trainer.register_hooks([Break()])
    with pytest.raises(ValueError, match="broken image"):
        trainer.train()
    assert "They are not saved: weights are not finite" in caplog.text
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000003.pth"]


@pytest.fixture
def small_files():
    """Files of this process have at most 4000 bytes: less than a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(tmp_path, whole, small_files, caplog):
    class Full(HookBase):
        def before_step(self):
            if self.trainer.iter == 7:
                small_files(4000)

    trainer = trainer_of(tmp_path)
    trainer.register_hooks([Full()])
    with pytest.raises(OSError, match=r"File too large.*Free space, then add --resume") as error:
        trainer.train()
    small_files(resource.RLIM_INFINITY)
    assert error.value.errno == errno.EFBIG
    assert "after 8 of 12 iterations. The last one cannot be saved ([Errno 27] " in caplog.text
    assert f"--resume resumes from '{tmp_path}/model_0000003.pth'" in caplog.text
    assert sorted(p.name for p in tmp_path.glob("*.p*")) == ["model_0000003.pth"]
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_full_disk_at_the_last_checkpoint(tmp_path, whole, small_files):
    """The run is complete in all but model_final.pth, which resuming writes."""
    trainer = trainer_of(tmp_path)
    save = trainer.checkpointer.save

    def without_space(name, **entries):
        small_files(4000 if name == "model_final" else resource.RLIM_INFINITY)
        save(name, **entries)

    trainer.checkpointer.save = without_space
    with pytest.raises(OSError, match="Free space"):
        trainer.train()
    small_files(resource.RLIM_INFINITY)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000011.pth"
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_lost_folder_is_made_again(tmp_path, whole):
    def load(start):
        for number, batch in enumerate(toy_batches(start), start):
            if number == 6:
                (tmp_path / "out").rename(tmp_path / "lost")
                raise OSError(errno.ESTALE, "Stale file handle")
            yield batch

    with pytest.raises(OSError, match="Stale file handle"):
        trainer_of(tmp_path / "out", loader=load).train()
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000005.pth"


def numbers_of_workers(start):
    """Batches of a loader process, which is killed in iteration 6 of the run."""
    loader = torch.utils.data.DataLoader(Batches(start), None, num_workers=1, prefetch_factor=1)
    yield from loader


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, start):
        self.start = start

    def __iter__(self):
        for number, batch in enumerate(toy_batches(self.start, 0, 1), self.start):
            if number == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def test_a_killed_loader_process(tmp_path, whole):
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        trainer_of(tmp_path, loader=numbers_of_workers).train()
    resumed = trainer_of(tmp_path)
    resume(resumed)
    assert resumed.start_iter in (4, 5, 6)  # the signal may come within an earlier iteration
    assert_same_run(tmp_path, whole)


# -------------------------------------------------------------------------------------- signals


class Send(HookBase):
    """Sends this process a signal in iteration 6."""

    def __init__(self, number):
        self.number = number

    def before_step(self):
        if self.trainer.iter == 6:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_save_the_iteration(tmp_path, whole, name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    trainer = trainer_of(tmp_path)
    trainer.register_hooks([Send(number)])
    with pytest.raises(Interrupted, match=rf"stopped by {name} after 7 of 12 .*0000006\.pth") as e:
        trainer.train()
    assert e.value.signal_number == number
    assert signal.getsignal(number) is before
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


def test_nohup(tmp_path):
    """A closed terminal does not end a run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = trainer_of(tmp_path)
        trainer.register_hooks([Send(signal.SIGHUP)])
        trainer.train()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "model_final.pth").exists()


def test_a_signal_while_saving_does_not_stop_the_saving(tmp_path, whole):
    """SLURM sends SIGTERM some time after the signal of --signal."""
    trainer = trainer_of(tmp_path)
    trainer.register_hooks([Send(signal.SIGUSR1)])
    save = trainer.checkpointer.save

    def interrupted(name, **entries):
        os.kill(os.getpid(), signal.SIGTERM)
        save(name, **entries)

    trainer.checkpointer.save = interrupted
    with pytest.raises(Interrupted):
        trainer.train()
    assert (tmp_path / "last_checkpoint").exists()
    resume(trainer_of(tmp_path))
    assert_same_run(tmp_path, whole)


HANGING = """
import ctypes, sys, torch
from engine_toy import Toy, toy_batches, toy_config
from clouds.engine import Trainer, interrupt

interrupt.GRACE_SECONDS = 0.5

class Hanging(Toy):
    def forward(self, batch):
        if self.calls == 3:
            print("hangs", flush=True)
            mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # for ever, and signals do not end it
        return super().forward(batch)

Trainer(toy_config(sys.argv[1]), Hanging(), toy_batches).train()
"""


def test_a_second_interrupt_ends_a_process_that_hangs(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path)],
        env=script_environment(SCRIPT.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert "second Ctrl-C: ended without saving" in errors


# ---------------------------------------------------------------------------------------- kills


def run_and_die(folder, patch):
    """Train or resume in a fork in which `patch(trainer)` arranges a SIGKILL; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            trainer = trainer_of(folder)
            patch(trainer)
            trainer.resume_or_load(resume=True)
            trainer.train()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(pid, 0)[1]


def kill_here(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_first_checkpoint(trainer):
    trainer.register_hooks([Send(signal.SIGKILL)])
    trainer.checkpointer.save = lambda name, **entries: None


def while_writing(number):
    """Killed when a part of the checkpoint number `number` of the run is written."""

    def patch(trainer):
        write, count = torch.save, 0

        def half(content, file):
            nonlocal count
            count += 1
            if count == number:
                file.write(b"PK\3\4" + bytes(1000))
                file.flush()
                kill_here()
            write(content, file)

        torch.save = half  # of the fork

    return patch


def before_it_is_named(trainer):
    trainer.checkpointer.tag_last_checkpoint = kill_here


@pytest.mark.parametrize(
    ("patch", "start"),
    [
        (before_the_first_checkpoint, 0),
        (while_writing(1), 0),
        (while_writing(2), 4),
        (while_writing(3), 8),
        (before_it_is_named, 4),
    ],
    ids=["before", "first", "second", "final", "unnamed"],
)
def test_kills_at_exact_places(tmp_path, whole, patch, start):
    assert run_and_die(tmp_path, patch) == signal.SIGKILL
    resumed = trainer_of(tmp_path)
    resume(resumed)
    assert resumed.start_iter == start
    assert_same_run(tmp_path, whole)
    assert list(tmp_path.glob(".*")) == list(tmp_path.glob("run.lock")) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments(tmp_path, whole, seed):
    """Killed again and again, each time with --resume, until a run is complete."""
    draw = random.Random(seed)
    for _ in range(200):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                resume(trainer_of(tmp_path))
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        time.sleep(draw.uniform(0.0, 0.4))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
        if status == 0:
            break
    assert status == 0
    assert_same_run(tmp_path, whole)


# ---------------------------------------------------------------------------- several processes


def fail_in_rank_1(whole, failed):
    """Body of two processes: a whole run, and one in which the loader of the second fails."""
    from clouds import comm

    torch.set_num_threads(1)
    trainer_of(Path(whole)).train()
    rank = comm.get_rank()
    loader = failing_at(6, ValueError("broken image")) if rank == 1 else toy_batches
    try:
        trainer_of(Path(failed), loader=loader).train()
    except Exception as error:
        Path(failed, f"error{rank}").write_text(type(error).__name__)
        os._exit(5)  # without the end of the process group, as a killed process


def resume_in(folder):
    torch.set_num_threads(1)
    resume(trainer_of(Path(folder)))


@pytest.mark.slow
def test_an_error_in_one_of_two_processes(tmp_path):
    failed, other = tmp_path / "failed", tmp_path / "whole"
    with pytest.raises(SystemExit) as leaving:
        launch(fail_in_rank_1, (str(other), str(failed)), num_gpus=2, device="cpu")
    assert leaving.value.code == 5
    assert (failed / "error1").read_text() == "ValueError"
    assert (failed / "last_checkpoint").read_text() == "model_0000005.pth"
    launch(resume_in, (str(failed),), num_gpus=2, device="cpu")
    assert_same_run(failed, other)
