"""`clouds list-config`: keys, values of a config, errors."""

from __future__ import annotations

import pytest

from clouds.cli import list_config


@pytest.fixture
def lines(capsys):
    def run(*words):
        list_config.main([str(word) for word in words])
        return capsys.readouterr().out.splitlines()

    return run


def test_a_pattern_without_a_match_names_similar_keys(capsys):
    with pytest.raises(SystemExit) as leaving:
        list_config.main(["SOLVER.BASE_LRR"])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "no config key contains 'SOLVER.BASE_LRR'" in error and "SOLVER.BASE_LR" in error


def test_values_of_a_config(lines, tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER:\n  MAX_ITER: 12\n  GAMMA: 0.1\n")
    config = ["--config-file", tmp_path / "a.yaml"]
    for words in (["solver.max", *config], [*config, "solver.max"]):
        assert lines(*words)[:2] == [
            "SOLVER.MAX_ITER",
            "    value: 12    differs from the default",
        ]
    assert lines("solver.gamma", *config)[1] == "    value: 0.1"
    shown = lines("seed", *config, "SEED", "5", "SOLVER.GAMMA", "1e-4")
    assert shown[1] == "    value: 5    differs from the default"


def test_values_as_markdown(lines, tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER:\n  MAX_ITER: 12\n")
    table = lines("solver.max", "--markdown", "--config-file", tmp_path / "a.yaml")
    cells = [cell.strip() for cell in table[-1].strip("|").split("|")]
    assert cells[:3] == ["`SOLVER.MAX_ITER`", "**`12`**", "`40000`"]


def test_overrides_need_a_config(capsys):
    with pytest.raises(SystemExit) as leaving:
        list_config.main(["SEED", "5"])
    assert leaving.value.code == 2
    assert "SEED 5 need a config" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1e-4", "-1"])
def test_an_invalid_value_is_an_error(value, capsys):
    with pytest.raises(SystemExit) as leaving:
        list_config.main(["--config-file", "demo/warmup", "SEED", value])
    assert leaving.value.code == 2
    assert "SEED" in capsys.readouterr().err
