"""Messages of other libraries while they download weights."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

HUB_LOGGER = "huggingface_hub.utils._http"
"""Logger of the HTTP client of the hub, which writes two lines per attempt."""

_FAILURE = re.compile(r"^(.*) thrown while requesting \w+ \w+://([^/\s]+)", re.DOTALL)


@dataclass
class Attempts(logging.Filter):
    """Filter of the loggers of the hub's client and of open_clip, which logs with the root logger.

    Attempts that fail are reported once; other messages of the hub's client are kept.

    Attributes:
        failure: host and reason of that attempt; empty: none failed.
    """

    failure: str = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record of these loggers is kept."""
        match = _FAILURE.match(record.getMessage())
        if match and not self.failure:
            reason, host = match.groups()
            self.failure = f"{host} cannot be reached: {reason.strip(chr(39))}"
            logger.warning("%s; trying again for up to a minute", self.failure)
        is_attempt = match is not None or record.getMessage().startswith("Retrying in")
        return record.name == HUB_LOGGER and not is_attempt


@contextmanager
def one_warning() -> Iterator[Attempts]:
    """Within it, failing attempts of a download are one warning instead of two lines for each.

    Neither are messages of open_clip shown, which logs with the root logger: what fails raises.
    """
    attempts = Attempts()
    loggers = [logging.getLogger(HUB_LOGGER), logging.getLogger()]
    for each in loggers:
        each.addFilter(attempts)
    try:
        with warnings.catch_warnings():
            # diffusers calls the hub's client with an argument that it no longer has
            warnings.filterwarnings("ignore", ".*local_dir_use_symlinks.*", UserWarning)
            yield attempts
    finally:
        for each in loggers:
            each.removeFilter(attempts)
