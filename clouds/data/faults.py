"""Files of which no sample can be made: named, counted, and replaced or the end of training."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds.messages import format_examples

logger = logging.getLogger(__name__)

FILE_ERRORS = (OSError, ValueError)
"""What reading raises about a faulty file; other errors are faults of the program."""

REPORT = "faulty_files.json"
"""File in OUTPUT_DIR with a line {"file", "dataset", "batch", "error"} per skipped file."""


class LoaderTraceback(Exception):  # noqa: N818 - the cause of an error, never raised itself
    """Where an error was raised, possibly in a loader process, and the file it is about."""


class FaultyFilesError(ValueError):
    """More files than DATALOADER.MAX_FAULTY are faulty."""


@dataclass(frozen=True)
class Fault:
    """A file of which no sample could be made.

    Attributes:
        file: the image file of the record.
        dataset: name of its dataset.
        error: what was raised, in a form that can be sent between processes.
        where: its traceback as text.
    """

    file: str
    dataset: str
    error: Exception
    where: str

    @classmethod
    def of(cls, file: Path, dataset: str, error: Exception) -> Fault:
        """The fault of an error that was just raised."""
        where = f"while the sample of {file} was made:\n{traceback.format_exc()}"
        return cls(str(file), dataset, _sendable(error), where)

    @property
    def of_file(self) -> bool:
        """Whether the file is to blame, not the program."""
        return isinstance(self.error, FILE_ERRORS)

    def throw(self) -> None:
        """Raise the error."""
        raise self.error from LoaderTraceback(self.where)


@dataclass(frozen=True)
class Loaded:
    """What a dataset returns for an index.

    Attributes:
        sample: the sample, or that of another file; None: there is none.
        faults: of the files that were tried before.
    """

    sample: Any
    faults: tuple[Fault, ...] = ()


def _sendable(error: Exception) -> Exception:
    """`error`; a RuntimeError of the same text if pickling does not keep it."""
    try:
        kept = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # anything may be raised by the methods of a foreign class
        kept = False
    return error if kept else RuntimeError(f"{type(error).__name__}: {error}")


class FaultLog:
    """The faulty files that a training run has skipped, over all its processes and resumes.

    They are in the file `path`, to which every process appends, so that their number is that of
    all processes that share the folder.

    Args:
        path: the file; it is created with the first fault.
        limit: DATALOADER.MAX_FAULTY.
        resumed: the entries that the file has already count, too.
    """

    def __init__(self, path: Path, limit: int, resumed: bool) -> None:
        self.path, self.limit = path, limit
        self._start = 0 if resumed else self._size()
        self._read_to = -1
        self._files: dict[str, str] = {}

    def files(self) -> dict[str, str]:
        """Faulty files and what is wrong with each, in the order in which they were found."""
        size = self._size()
        if size != self._read_to:
            self._read_to = size
            self._files = self._read()
        return self._files

    def add(self, faults: Iterable[Fault], batch: int) -> None:
        """Record the files that were skipped in batch number `batch`; each counts once.

        Raises:
            FaultyFilesError: there are more than `limit` now.
        """
        for fault in faults:
            if fault.file in self.files():
                continue
            logger.warning(
                "skipped the faulty file %s of %s in batch %d: %s", *self._write(fault, batch)
            )
        files = self.files()
        if len(files) > self.limit:
            reasons = [f"{file}: {reason}" for file, reason in files.items()]
            raise FaultyFilesError(
                f"{len(files)} files of the training data are faulty, and DATALOADER.MAX_FAULTY "
                f"allows {self.limit}. Correct or remove them (all are in {self.path}), or allow "
                f"more:\n  {format_examples(reasons, 50)}"
            )

    def _write(self, fault: Fault, batch: int) -> tuple[str, str, int, str]:
        entry = fault.file, fault.dataset, batch, str(fault.error)
        line = json.dumps(dict(zip(("file", "dataset", "batch", "error"), entry, strict=True)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._size() > 0 and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n" if torn else f"{line}\n")
        return entry

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        files: dict[str, str] = {}
        for line in self.path.read_bytes()[self._start :].splitlines():
            try:
                entry = json.loads(line)
                files.setdefault(entry["file"], entry["error"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: skipped an incomplete line: %.80r", self.path, line)
        return files
