"""Differences between the config of a checkpoint and the present one."""

from __future__ import annotations

import yaml
from engine_toy import toy_config

from clouds.config import get_cfg
from clouds.engine.config_changes import changed_keys


def test_changes_with_an_effect_are_listed():
    then = toy_config("a", "SEED", "1", "MODEL.DEVICE", "cpu", "TEST.SHORT_SIDE", "512")
    now = toy_config("b", "SEED", "2", "SOLVER.IMS_PER_BATCH", "8", "INPUT.CROP.SIZE", "(64, 64)")
    assert changed_keys(then.dump(), now) == [
        "INPUT.CROP.SIZE: [768, 768] -> [64, 64]",
        "SEED: 1 -> 2",
        "SOLVER.IMS_PER_BATCH: 4 -> 8",
    ]
    assert changed_keys(now.dump(), now) == []


def test_keys_of_earlier_versions_are_compared_by_their_present_names():
    now = toy_config("a", "MODEL.CLOUDS.SUPERPIXEL.COMPACTNESS", "30.0")
    lines = yaml.safe_load(now.dump())
    cloud = lines["MODEL"]["CLOUDS"]
    cloud["SUPERPIXEL"]["RULER"] = cloud["SUPERPIXEL"].pop("COMPACTNESS")  # renamed
    cloud["SAM"]["CACHE_GIB"] = 20  # without effect
    lines["MODEL"]["SEM_SEG_HEAD"]["IGNORE_VALUE"] = 255  # the one value of the code
    assert changed_keys(yaml.safe_dump(lines), now) == []
    cloud["SUPERPIXEL"]["RULER"] = 20.0
    lines["MODEL"]["SEM_SEG_HEAD"]["IGNORE_VALUE"] = 200
    lines["NO_SUCH_KEY"] = 1
    assert changed_keys(yaml.safe_dump(lines), now) == [
        "MODEL.CLOUDS.SUPERPIXEL.COMPACTNESS: 20.0 -> 30.0",
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE: 200 -> '(absent)'",
        "NO_SUCH_KEY: 1 -> '(absent)'",
    ]


def test_comparing_configs_logs_no_warnings(caplog):
    now = toy_config("a")
    changed_keys(now.dump() + "\nWANDB: {NAME: x}\n", now)
    assert caplog.records == []


def test_of_a_description_the_changed_lines_are_told():
    then, now = get_cfg(), get_cfg()
    text = "name: campus\nclasses:\n  - {name: road, ids: 0}\n  - {name: tree, ids: 3}\n"
    then.DATASETS.DESCRIPTIONS = (text,)
    now.DATASETS.DESCRIPTIONS = (text.replace("ids: 3", "ids: 4"),)
    assert changed_keys(then.dump(), now) == [
        "DATASETS.DESCRIPTIONS: -   - {name: tree, ids: 3}; +   - {name: tree, ids: 4}"
    ]
    (added,) = changed_keys(get_cfg().dump(), then)
    assert added.startswith("DATASETS.DESCRIPTIONS: + name: campus; + classes:; + ")
