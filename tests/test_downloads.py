"""Messages while a download fails, by the real client of the hub."""

from __future__ import annotations

import logging

import pytest

from clouds.downloads import HUB_LOGGER, one_warning

NOWHERE = "http://127.0.0.1:9/model.bin"  # the port is closed


def test_a_failing_download_is_one_warning(caplog):
    http = pytest.importorskip("huggingface_hub.utils")

    def fetch():
        with pytest.raises(Exception, match=r"refused|failed"):
            http.http_backoff("GET", NOWHERE, max_retries=3, base_wait_time=0)

    with caplog.at_level(logging.INFO):
        fetch()
        assert len(caplog.records) > 3
        caplog.clear()
        with one_warning() as attempts:
            fetch()
            logging.getLogger().error("open_clip failed")
            logging.getLogger(HUB_LOGGER).warning("Rate limited. Waiting 300s")
        record, other = caplog.records
        assert other.getMessage() == "Rate limited. Waiting 300s"
        assert record.name == "clouds.downloads" and record.levelname == "WARNING"
        assert attempts.failure.startswith("127.0.0.1:9 cannot be reached: ")
        assert attempts.failure in record.getMessage()
        caplog.clear()
        fetch()  # the filters are removed
        assert len(caplog.records) > 3


def test_other_libraries_and_errors_are_not_touched(caplog):
    with pytest.raises(KeyError), one_warning() as attempts:
        logging.getLogger("other").warning("seen")
        raise KeyError
    assert [record.getMessage() for record in caplog.records] == ["seen"]
    assert attempts.failure == ""
