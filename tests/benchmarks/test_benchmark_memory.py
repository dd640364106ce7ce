"""benchmarks/memory.py: the words of its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_model import tiny_config

from clouds.engine.memory import GIB, USABLE, estimate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import memory  # noqa: E402

SMALL = {"INPUT__CROP__SIZE": (64, 64), "SOLVER__IMS_PER_BATCH": 2}


def test_a_card_is_named_with_what_it_needs():
    cfg = tiny_config(**SMALL)
    whole, halves = (
        1.001 * estimate(tiny_config(**SMALL, SOLVER__ACCUMULATE=n)).total / GIB / USABLE
        for n in (1, 2)
    )
    words = [memory.choice(cfg, card) for card in (whole, halves, halves / 2)]
    assert words == ["yes", "in 2 parts", "no"]


@pytest.mark.parametrize("words", [[], ["joint/gta_rn50", "--measure"]])
def test_configs_or_a_measurement(words, capsys):
    with pytest.raises(SystemExit):
        memory.parse(words)
    assert "name configs, or give --measure" in capsys.readouterr().err
