"""Versions of a run, its log files, and the config that it writes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clouds.d2 import BACKEND, CfgNode, backend_version
from clouds.files import atomic_write
from clouds.version import __version__

logger = logging.getLogger(__name__)

LOGGERS = ("clouds", "fvcore", "py.warnings")
"""Loggers whose messages reach the console and the log file."""

MARK = "_clouds_run"
"""Attribute of the handlers that `setup_logging` added."""


@functools.cache
def git_commit() -> str:
    """Commit of the source tree of this package, with '+' if tracked files are modified.

    Empty if the package is not in a git repository, or git is not installed.
    """
    root = Path(__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return ""
    describe = [git, "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12"]
    done = subprocess.run([*describe, "--dirty=+"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def provenance() -> dict[str, str]:
    """Versions of the code and libraries that determine the numbers of a run."""
    return {
        "version": __version__,
        "commit": git_commit(),
        "backend": BACKEND,
        "backend_version": backend_version(),
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
    }


def banner(device: torch.device, num_processes: int) -> str:
    """The first line of a log: versions and hardware."""
    facts = provenance()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return (
        f"clouds {facts['version']} (commit {facts['commit'] or 'unknown'}), "
        f"d2 backend {facts['backend']} {facts['backend_version']}, torch {facts['torch']}, "
        f"Python {facts['python']}, device {device}{f' ({name})' if name else ''}, "
        f"{num_processes} process(es)"
    )


def check_writable(output_dir: str) -> None:
    """Create OUTPUT_DIR and check that files can be written in it.

    Raises:
        ValueError: they cannot, or the name is not text; the message has the reason.
    """
    folder = Path(output_dir)
    if not output_dir.isprintable():
        raise ValueError(
            f"OUTPUT_DIR {output_dir!r} has bytes that are not {sys.getfilesystemencoding()}, or "
            "characters that cannot be printed; TensorBoard cannot write there. Set another folder "
            "with OUTPUT_DIR <folder>."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            pass
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR '{folder}' cannot be written: {error.strerror}. "
            "Set another folder with OUTPUT_DIR <folder>."
        ) from error


class Console(logging.StreamHandler):  # type: ignore[type-arg] # Python 3.10 lacks it
    """Writes messages to a stream until it is closed, as the pipe in `clouds train … | head` is.

    The run goes on: the log file has all messages, and one that the console is closed. Characters
    that the stream's encoding lacks are escaped. Progress bars on the terminal stay below.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.setLevel(logging.CRITICAL + 1)
        with Path(os.devnull).open("w") as nowhere, contextlib.suppress(OSError, ValueError):
            number = self.stream.fileno()
            if os.path.sameopenfile(number, sys.stderr.fileno()):  # as in `2>&1 | head`
                os.dup2(nowhere.fileno(), sys.stderr.fileno())
            os.dup2(nowhere.fileno(), number)  # for the messages in its buffer
        logger.warning("the console is closed (%s); messages are only here", error.strerror)

    def format(self, record: logging.LogRecord) -> str:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)


def setup_logging(output_dir: str, rank: int) -> None:
    """Log the package's messages and Python's warnings to the console and a file in `output_dir`.

    The file, which also gets debug messages, is log.txt, or log.txt.rank<N> on rank N > 0. Ranks
    above 0 log only warnings to the console. A further call replaces the handlers of an earlier
    one.
    """
    console = Console(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    source = f" rank {rank}" if rank else ""
    console.setFormatter(logging.Formatter(f"[%(asctime)s{source}] %(message)s", "%m-%d %H:%M:%S"))
    path = Path(output_dir, "log.txt" if rank == 0 else f"log.txt.rank{rank}")
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
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
    """Write the complete config as a YAML file, with a comment on the versions and the command."""
    facts: dict[str, Any] = {**provenance(), "command": command}
    comment = "".join(f"# {name}: {value}\n" for name, value in facts.items() if value)
    text = (comment + cfg.dump()).encode("utf-8", "backslashreplace")  # names that are not UTF-8
    with atomic_write(path) as file:
        file.write(text)
