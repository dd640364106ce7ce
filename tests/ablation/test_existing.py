"""Rows of a table from runs that exist."""

from __future__ import annotations

import json

import pytest
from fake_train import results

from clouds.ablation.existing import compare, parse_groups


@pytest.fixture
def runs(tmp_path):
    def write(name, seed, miou, **config):
        folder = tmp_path / name
        folder.mkdir()
        config = {"SEED": seed, "OUTPUT_DIR": name, "SOLVER": {"BASE_LR": 0.1}, **config}
        (folder / "results.json").write_text(json.dumps(results(seed, miou, 9, config)))
        return folder

    return write


def test_rows_by_config(runs):
    fast = {"SOLVER": {"BASE_LR": 0.2}, "MODEL": {"DEVICE": "cuda", "W": "x" * 80}}
    folders = [runs("a", 0, 10.0), runs("b", 0, 20.0, **fast), runs("c", 1, 11.0)]
    folders.append(runs("d", 1, 23.0, **fast) / "results.json")
    table = compare(folders, {}, {})
    first, second = table.rows
    assert first.name == "baseline" == table.baseline
    assert second.name == f"MODEL.W {'x' * 59}…, SOLVER.BASE_LR 0.2"
    assert first.values(["mean/mIoU"]) == {0: 10.0, 1: 11.0}
    assert table.difference(second, "mIoU").mean == 11.0


def test_named_rows(runs):
    groups = parse_groups([f"b={runs('a', 0, 10.0)},{runs('b', 1, 10.0, X=1)}"])
    table = compare([runs("c", 0, 12.0)], groups, {"x": ("bdd_val/mIoU",)}, "baseline")
    assert [row.name for row in table.rows] == ["b", "baseline"]
    assert table.difference(table.rows[0], "x").mean == -2.0


def test_an_evaluation_before_the_end_of_training_is_told(runs):
    """The results of `runs` are those after ten iterations."""
    whole, part = ({"SOLVER": {"MAX_ITER": n}} for n in (10, 11))
    table = compare([runs("a", 0, 1.0, **whole), runs("b", 0, 1.0, **part)], {}, {})
    assert table.rows[0].notes == ()
    (note,) = table.rows[1].notes
    assert note.endswith("b' was evaluated after 10 of 11 iterations.") and note in table.markdown()


def test_many_datasets_have_no_columns_of_their_own(runs, tmp_path):
    file = runs("a", 0, 10.0) / "results.json"
    content = json.loads(file.read_text())
    content["datasets"] = {f"d{i}": content["datasets"]["bdd_val"] for i in range(9)}
    content["anomaly-sets"] = {"road_anomaly21": {"AUPR": 7.0, "images": 3}}
    file.write_text(json.dumps(content))
    table = compare([file], {}, {})
    assert list(table.metrics) == ["mIoU"]
    assert table.rows[0].values(["road_anomaly21/*"]) == {0: 7.0}


def test_groups_of_another_form():
    for word in ("a", "=x", "a="):
        with pytest.raises(ValueError, match=r"expected is NAME=RUN,RUN"):
            parse_groups([word])
    with pytest.raises(ValueError, match="given twice"):
        parse_groups(["a=x", "a=y"])


def test_runs_without_results(runs, tmp_path):
    (tmp_path / "empty/eval/native").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty' has no results.json: it has not been ev"):
        compare([tmp_path / "empty"], {}, {})
    (tmp_path / "empty/eval/native/results.json").touch()
    with pytest.raises(FileNotFoundError, match=r"There are some in '.*eval/native'"):
        compare([tmp_path / "empty"], {}, {})
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        compare([tmp_path / "nowhere"], {}, {})


def test_runs_that_make_no_row(runs):
    a, b = runs("a", 0, 10.0), runs("b", 0, 11.0)
    with pytest.raises(ValueError, match=r"'.*a' and '.*b' are both of the row 'baseline'.*seed 0"):
        compare([a, b], {}, {})
    with pytest.raises(ValueError, match=r"a' is named twice"):
        compare([a, a / "results.json"], {}, {})
    with pytest.raises(ValueError, match="--baseline is 'z'; the rows are 'baseline'"):
        compare([a], {}, {}, "z")
    with pytest.raises(ValueError, match="has the name of another row"):
        compare([a], {"baseline": [b]}, {})


def test_configs_that_differ_beyond_what_a_name_shows(runs):
    """Two rows of one name would be one row, without the runs of the other."""
    folders = [runs("a", 0, 1.0)]
    folders += [runs(name, 0, 2.0, MODEL={"WEIGHTS": f"{'x' * 70}/{name}"}) for name in ("b", "c")]
    with pytest.raises(ValueError, match=r"c' and '.*b' have different configs.* --group"):
        compare(folders, {}, {})


def test_keys_without_an_effect_on_scores_make_no_row(runs):
    folders = [runs(str(i), i, 1.0, LOGGER=[name]) for i, name in enumerate(("csv", "wandb"))]
    assert len(compare(folders, {}, {}).rows) == 1
