"""What a run is made of and where it writes: versions, log files, the dumped config."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from clouds.d2 import BACKEND, CfgNode, backend_version
from clouds.version import __version__

logger = logging.getLogger(__name__)

LOGGERS = ("clouds", "fvcore", "py.warnings")
"""Loggers whose messages reach the console and the log file."""

MARK = "_clouds_run"


@functools.cache
def git_commit() -> str:
    """Commit of the source tree that this package runs from, with '+' when files differ from it.

    Empty when it runs from an installed copy, or there is no git.
    """
    root = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return ""
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
    outputs = []
    for command in commands:
        done = subprocess.run(
            [git, "-C", str(root), *command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return ""
        outputs.append(done.stdout.strip())
    return outputs[0] + ("+" if outputs[1] else "")


def provenance() -> dict[str, str]:
    """Versions of everything that has a part in a run's numbers."""
    return {
        "version": __version__,
        "commit": git_commit(),
        "backend": BACKEND,
        "backend_version": backend_version(),
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
    }


def banner(device: torch.device, processes: int) -> str:
    """First line of a log."""
    facts = provenance()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return (
        f"clouds {facts['version']} (commit {facts['commit'] or 'unknown'}), "
        f"d2 backend {facts['backend']} {facts['backend_version']}, torch {facts['torch']}, "
        f"Python {facts['python']}, device {device}{f' ({name})' if name else ''}, "
        f"{processes} process(es)"
    )


def check_writable(output_dir: str) -> None:
    """Make OUTPUT_DIR and see that files can be written in it.

    Raises:
        ValueError: they cannot; says why.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            pass
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR '{folder}' cannot be written: {error.strerror}. "
            "Name another folder with OUTPUT_DIR <folder>."
        ) from error


def setup_logging(output_dir: str, rank: int) -> None:
    """Send the package's messages to the console and to a file in `output_dir`.

    The file is log.txt, or log.txt.rank<N> on the other processes, which are quiet on the console
    but for warnings; it gets debug messages too. Python's own warnings go the same way. Calling it
    again replaces what an earlier call set up.
    """
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    who = f" rank {rank}" if rank else ""
    console.setFormatter(logging.Formatter(f"[%(asctime)s{who}] %(message)s", "%m-%d %H:%M:%S"))
    path = Path(output_dir, "log.txt" if rank == 0 else f"log.txt.rank{rank}")
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    logging.captureWarnings(True)
    for name in LOGGERS:
        target = logging.getLogger(name)
        target.setLevel(logging.DEBUG)
        target.propagate = False
        for handler in [h for h in target.handlers if hasattr(h, MARK)]:
            target.removeHandler(handler)
            handler.close()
        for handler in (console, file):
            setattr(handler, MARK, True)
            target.addHandler(handler)


def dump_config(cfg: CfgNode, path: Path, command: str = "") -> None:
    """Write the whole config as YAML that can be used again, under a comment on what wrote it."""
    facts: dict[str, Any] = {**provenance(), "command": command}
    comment = "".join(f"# {name}: {value}\n" for name, value in facts.items() if value)
    path.write_text(comment + cfg.dump())
