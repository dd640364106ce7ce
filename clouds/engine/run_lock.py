"""The lock of OUTPUT_DIR: a file that names the run which writes there.

The file is created with O_EXCL, which is atomic on local disks and on NFS, and deleted when the run
ends. A run that was killed leaves it behind; it is recognised on the same machine, because there is
no process with that number and start time, and replaced. On another machine this cannot be known:
the modification time of the file, which a live run renews every `HEARTBEAT_SECONDS`, tells.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from clouds import comm

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOCK = "run.lock"
"""Name of the file in OUTPUT_DIR."""

HEARTBEAT_SECONDS = 30.0
ATTEMPTS = 40
"""Times that a lock left behind may be replaced by another process first."""

GUARD = f".{LOCK}.replace"
"""File that exists while a process deletes a lock that was left behind: only one does at a time."""

GUARD_SECONDS = 60.0
"""Age from which a GUARD was itself left behind; a process has it for milliseconds."""

_PAUSE = 0.05


@dataclass(frozen=True)
class Holder:
    """The process that a lock names.

    Attributes:
        host: name of its machine.
        boot: the kernel's random number of its start; empty where there is no /proc.
        namespace: of process numbers, which containers have their own of; empty as `boot`.
        pid: process number.
        start: start time of the process in clock ticks since the kernel's start; empty as `boot`.
        since: date and time at which it took the lock.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    start: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """The process that calls this."""
        namespace = Path("/proc/self/ns/pid")
        return cls(
            host=socket.gethostname(),
            boot=_text(Path("/proc/sys/kernel/random/boot_id")),
            namespace=str(namespace.readlink()) if os.path.lexists(namespace) else "",
            pid=os.getpid(),
            start=start_time(os.getpid()),
            since=datetime.now().isoformat(" ", "seconds"),
        )

    def is_same_process(self, other: Holder) -> bool:
        """Whether both name the same process."""
        return {**asdict(self), "since": ""} == {**asdict(other), "since": ""}

    def has_ended(self, here: Holder) -> bool | None:
        """Whether the process has ended, as the process `here` sees it; None: cannot be known."""
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return True  # the machine was restarted
        if self.namespace != here.namespace:
            return None
        return not is_running(self.pid, self.start)


def is_running(pid: int, start: str) -> bool:
    """Whether there is a process of this machine with that number and start time."""
    if sys.platform == "win32":
        return True  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        logger.debug("process %d is another user's", pid)
    return start_time(pid) in (start, "")


def start_time(pid: int) -> str:
    """Start time of a process in clock ticks; 'ended' for a zombie; empty if it is not known."""
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if len(fields) < 20:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def _text(path: Path) -> str:
    """Contents of a file of /proc; empty if there is none, or it may not be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


class RunLock:
    """The lock of a folder, which must exist; this process may take it more than once.

    Args:
        folder: OUTPUT_DIR.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder, LOCK)
        self.own = Holder.this_process()
        self.held = False
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ValueError: another process has it; the message says which, and what to do.
            OSError: the file cannot be written.
        """
        for _ in range(ATTEMPTS):
            if self._create():
                self.held = True
                threading.Thread(target=self._renew, name="run lock", daemon=True).start()
                return
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                continue  # deleted at this moment
            holder = parse(content)
            if holder is not None and holder.is_same_process(self.own):
                return
            if holder is None or not holder.has_ended(self.own):
                raise ValueError(self._in_use(holder))
            logger.warning("%s: replaced; the run that left it (%s) has ended", self.path, holder)
            self._remove(content)
        raise ValueError(
            f"'{self.path}': other runs start in this folder at this moment; try again."
        )

    def release(self) -> None:
        """Delete the file, if this object created it and it is still there."""
        self._ended.set()
        if self.held and self.path.is_file():
            holder = parse(self.path.read_bytes())
            if holder is not None and holder.is_same_process(self.own):
                self.path.unlink(missing_ok=True)
        self.held = False

    def _create(self) -> bool:
        """Create the file; False if it exists."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(asdict(self.own)).encode())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove(self, content: bytes) -> None:
        """Delete the lock, which was left behind, unless another process has replaced it.

        The content is compared while GUARD exists. So the lock that is deleted is no newer one: a
        lock left behind is deleted by the process with GUARD alone.
        """
        guard = self.path.with_name(GUARD)
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if time.time() - guard.stat().st_mtime > GUARD_SECONDS:
                    guard.unlink()
            time.sleep(_PAUSE)
            return
        try:
            with suppress(FileNotFoundError):
                if self.path.read_bytes() == content:
                    self.path.unlink()
        finally:
            guard.unlink(missing_ok=True)

    def _renew(self) -> None:
        """Renew the modification time until the lock is released."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError as error:
                logger.warning("%s cannot be renewed: %s", self.path, error.strerror)
                return

    def _in_use(self, holder: Holder | None) -> str:
        """Message for a folder that another run uses; None: the file cannot be read."""
        folder = self.path.parent
        other = "or set another folder with OUTPUT_DIR <folder>."
        try:
            seconds = max(0, round(time.time() - self.path.stat().st_mtime))
        except FileNotFoundError:
            seconds = 0
        remove = (
            f"Last sign of life {timedelta(seconds=seconds)} ago (a live run gives one every "
            f"{HEARTBEAT_SECONDS:.0f} s). If that run is dead, `rm {shlex.quote(str(self.path))}` "
            f"allows a new one; if not, wait for its end, {other}"
        )
        if holder is None:
            return f"OUTPUT_DIR '{folder}' has a lock that is incomplete, '{self.path}'. {remove}"
        name = f"process {holder.pid} on '{holder.host}', since {holder.since}"
        if holder.has_ended(self.own) is None:
            return (
                f"OUTPUT_DIR '{folder}' is in use by a run ({name}), which cannot be seen from "
                f"this machine or container. {remove}"
            )
        return (
            f"OUTPUT_DIR '{folder}' is in use by a run ({name}). Two runs cannot write in one "
            f"folder: wait for its end, stop it with `kill {holder.pid}`, {other}"
        )


def parse(content: bytes) -> Holder | None:
    """The holder that the content of a lock names; None if it is incomplete."""
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) and holder.pid > 0 else None


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of `folder` within the context: rank 0 for all processes of the run.

    Raises:
        ValueError: another run has it; on all processes.
    """
    lock = RunLock(folder)
    on_main_process(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def on_main_process(action: Callable[[], T]) -> T | None:
    """Call `action` on rank 0; what it raises is raised on all processes.

    Returns:
        What `action` returned; None on the other processes.

    Raises:
        ValueError, OSError: as `action`; a ValueError with the message on the other processes.
    """
    failed: Exception | None = None
    result: T | None = None
    if comm.is_main_process():
        try:
            result = action()
        except (ValueError, OSError) as error:
            failed = error
    message = comm.all_gather(str(failed) if failed else "")[0]
    if failed is not None:
        raise failed
    if message:
        raise ValueError(message)
    return result
