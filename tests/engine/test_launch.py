from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_toy import Toy, losses_of, script_environment, toy_batches, toy_config
from run_files import resume

from clouds import comm
from clouds.engine import HookBase, Interrupted, NonFiniteLossError, Trainer
from clouds.engine.launch import check_launch, free_port, launch

SCRIPT = Path(__file__).resolve().parents[1] / "engine_toy.py"


def toy_trainer(folder, *overrides, loss_factor=None):
    model = Toy()
    model.loss_factor = loss_factor
    return Trainer(toy_config(folder, *overrides), model=model, loader=toy_batches)


class SendSigterm(HookBase):
    """Sends this process SIGTERM in iteration 5."""

    def before_step(self):
        if self.trainer.iter == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def in_two_processes(folder):
    """Body of each of two processes; the tests below read the files that it writes."""
    torch.set_num_threads(1)
    folder, rank = Path(folder), comm.get_rank()
    assert comm.get_world_size() == 2
    assert comm.get_local_rank() == rank
    assert comm.all_gather(f"from {rank}") == ["from 0", "from 1"]
    mean = comm.mean_over_ranks(torch.tensor([float(rank), 5.0]))
    assert mean.tolist() == [0.5, 5.0]

    toy_trainer(folder / "whole").train()
    toy_trainer(folder / "accumulated", "SOLVER.ACCUMULATE", "2").train()
    toy_trainer(folder / "sharded", "SOLVER.PARALLEL", "fsdp").train()

    stopped = toy_trainer(folder / "stopped")
    if rank == 1:  # a signal to one process only
        stopped.register_hooks([SendSigterm()])
    try:
        stopped.train()
    except Interrupted as request:
        (folder / f"interrupted{rank}").write_text(str(request))
    comm.synchronize()
    resume(toy_trainer(folder / "stopped"))

    def loss_factor(call):
        return float("nan") if call == 6 and rank == 1 else 1.0

    try:
        toy_trainer(folder / "diverged", loss_factor=loss_factor).train()
    except NonFiniteLossError as error:
        (folder / f"diverged{rank}").write_text(str(error))

    try:
        toy_trainer(folder / "odd", "SOLVER.IMS_PER_BATCH", "3")
    except ValueError as error:
        (folder / f"odd{rank}").write_text(str(error))

    trainer = toy_trainer(folder / f"own{rank}" if rank else folder / "whole")
    try:
        trainer.resume_or_load(resume=True)
    except ValueError as error:
        (folder / f"folder{rank}").write_text(str(error))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(in_two_processes, (str(folder),), num_gpus=2, device="cpu")
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    toy_trainer(folder).train()
    return folder


def assert_same_run(first, second, tolerance):
    a, b = losses_of(first), losses_of(second)
    assert sorted(a) == sorted(b) == list(range(12))
    for iteration in a:
        assert a[iteration] == pytest.approx(b[iteration], rel=tolerance, abs=tolerance)
    one, two = (
        torch.load(f / "model_final.pth", weights_only=True)["model"] for f in (first, second)
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance)


def test_two_processes_train_as_one(one_process, two_processes):
    assert_same_run(one_process, two_processes / "whole", 1e-5)


def test_two_processes_that_accumulate_gradients_train_as_one(one_process, two_processes):
    assert_same_run(one_process, two_processes / "accumulated", 1e-5)


def test_two_processes_that_share_the_weights_train_as_one(one_process, two_processes):
    assert_same_run(one_process, two_processes / "sharded", 1e-5)


def test_a_signal_to_one_process_stops_both_at_the_same_iteration(two_processes):
    texts = [(two_processes / f"interrupted{rank}").read_text() for rank in (0, 1)]
    assert all("after 6 of 12 iterations" in text for text in texts)
    assert "SIGTERM" in texts[1]
    assert "another process" in texts[0]
    assert_same_run(two_processes / "whole", two_processes / "stopped", 0)


def test_divergence_in_one_process_stops_both_and_names_all_images(two_processes):
    texts = [(two_processes / f"diverged{rank}").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert "iteration 6: loss_ce is nan" in texts[0]
    assert [line.strip() for line in texts[0].splitlines() if ".png" in line] == [
        f"toy_{number:05d}.png" for number in range(24, 28)
    ]
    assert [p.name for p in (two_processes / "diverged").glob("*.pth")] == ["model_0000003.pth"]


def test_batch_size_that_is_not_divisible(two_processes):
    for rank in (0, 1):
        assert "IMS_PER_BATCH is 3, which 2 processes" in (two_processes / f"odd{rank}").read_text()


def test_output_folder_that_is_not_shared(two_processes):
    for rank in (0, 1):
        text = (two_processes / f"folder{rank}").read_text()
        assert "they would start at [12, 0]" in text
        assert "share" in text


def test_one_process_is_rank_0_of_1():
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    assert comm.is_main_process()
    assert comm.all_gather(3) == [3]
    assert comm.mean_over_ranks(torch.tensor([2.0])).tolist() == [2.0]


def launch_arguments(**changes):
    defaults = {
        "num_gpus": 1,
        "num_machines": 1,
        "machine_rank": 0,
        "dist_url": "auto",
        "device": "auto",
    }
    return {**defaults, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 0}, "must be at least 1"),
        ({"num_gpus": 3}, r"this machine has 2 usable GPU\(s\).*MODEL.DEVICE cpu. for 3 CPU"),
        ({"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "--machine-rank is 2"),
        ({"num_machines": 0}, "at least one machine"),
        ({"num_machines": 2}, "needs --dist-url tcp://HOST:PORT"),
    ],
)
def test_invalid_launches(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        check_launch(**launch_arguments(**arguments))


def test_valid_launches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(**launch_arguments(num_gpus=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_launch(**launch_arguments(num_gpus=1))
    check_launch(**launch_arguments(num_gpus=8, device="cpu"))


def test_each_process_gets_the_gpu_of_its_local_rank(monkeypatch):
    cuda = torch.device("cuda")
    assert comm.device_of_process(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert comm.device_of_process(cuda) == torch.device("cuda", 1)
    assert comm.device_of_process(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda:1', but there are 4 processes"):
        comm.device_of_process(torch.device("cuda", 1))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 3 on its machine, which has 2 GPU\(s\)"):
        comm.device_of_process(cuda)


def exit_with(status):
    raise SystemExit(status)


@pytest.mark.slow
def test_exit_status_of_a_process_is_that_of_launch():
    with pytest.raises(SystemExit) as leaving:
        launch(exit_with, (7,), num_gpus=2, device="cpu")
    assert leaving.value.code == 7


@pytest.mark.slow
def test_torchrun(tmp_path, one_process):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), str(tmp_path)]
    subprocess.run(command, env=script_environment(), check=True)
    assert_same_run(one_process, tmp_path, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_all_processes_of_torchrun(tmp_path, one_process):
    """As docs/cluster.md starts them: torchrun ignores SLURM's signal, the ranks save and end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", str(SCRIPT)]
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *torchrun]
    command = [*ignoring, "--slow", "0.2", str(tmp_path)]
    process = subprocess.Popen(command, env=script_environment(), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (tmp_path / "metrics.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors  # torchrun's for any rank that does not exit with 0
    done = max(losses_of(tmp_path))
    assert done < 11
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{done:07d}.pth", errors
    subprocess.run([*torchrun, "--resume", str(tmp_path)], env=script_environment(), check=True)
    assert_same_run(one_process, tmp_path, 1e-5)


@pytest.mark.slow
def test_two_machines(tmp_path, one_process):
    port = free_port()
    program = (
        "import sys; from engine_toy import train_toy; from clouds.engine.launch import "
        f"launch; launch(train_toy, ({str(tmp_path)!r}, False, 0.0, 0.0, []), num_machines=2, "
        f"machine_rank=int(sys.argv[1]), dist_url='tcp://127.0.0.1:{port}', device='cpu')"
    )
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank)], env=script_environment(SCRIPT.parent)
        )
        for rank in (0, 1)
    ]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert_same_run(one_process, tmp_path, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_to_the_launching_process(tmp_path, number):
    command = [sys.executable, str(SCRIPT), "--num-gpus", "2", "--slow", "0.2", str(tmp_path)]
    process = subprocess.Popen(command, env=script_environment(), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "metrics.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    done = max(losses_of(tmp_path))
    assert done < 11
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{done:07d}.pth"
