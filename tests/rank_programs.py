"""Functions of processes that hang or end; as a script, it starts two processes.

python tests/rank_programs.py FUNCTION TIMEOUT
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from clouds import comm
from clouds.engine import launch as launch_module
from clouds.engine.launch import launch


def sleeping_rank_1():
    if comm.get_rank() == 1:
        time.sleep(60)
    comm.all_gather(1)


def slow_rank_1():
    if comm.get_rank() == 1:
        time.sleep(2.5)
    comm.all_gather(1)


def killed_rank_1():
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_gather(1)


def deaf():
    """Both processes save nothing and do not react to Ctrl-C."""
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    Path(os.environ["READY"], str(comm.get_rank())).write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)


def faulty_rank_1():
    if comm.get_rank() == 1:
        raise KeyError("an error of the program")
    comm.all_gather(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch_module.STOP_GRACE_SECONDS = 3.0
    launch_module.KILL_SECONDS = 1.0
    launch(globals()[sys.argv[1]], num_gpus=2, device="cpu", timeout=float(sys.argv[2]))
