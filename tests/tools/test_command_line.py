"""What the commands share: which errors become one line, and which keep their traceback."""

import argparse
import logging
import subprocess
import sys
from pathlib import Path

import command_line
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CLOUDS = {"__name__": "clouds.anything", "__file__": "/anywhere/clouds/anything.py"}
TOOL = {"__name__": "__main__", "__file__": str(TOOLS / "x.py")}
OTHER = {"__name__": "clouds_of_another", "__file__": "/anywhere/clouds_of_another.py"}


def run(source, module, *also, **options):
    """Run code as that of a module, called by a command."""
    with command_line.user_errors_in_one_line(*also, **options):
        exec(source, dict(module))


def told(capsys, source, module, *also, **options):
    with pytest.raises(SystemExit) as leaving:
        run(source, module, *also, **options)
    assert leaving.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.endswith("\n")
    return text.removeprefix("error: ")[:-1]


@pytest.mark.parametrize("module", [CLOUDS, TOOL])
@pytest.mark.parametrize("kind", ["ValueError", "OSError", "FileNotFoundError", "ImportError"])
def test_an_error_of_this_project_is_one_line(capsys, module, kind):
    assert told(capsys, f"raise {kind}('it is wrong')", module) == "it is wrong"


def test_a_key_error_is_told_without_its_quotes(capsys):
    assert told(capsys, "raise KeyError('no such name')", CLOUDS) == "no such name"


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError",  # in a module of another package
        "import json; json.loads('{')",
        "from pathlib import Path; Path('/nowhere/at/all').read_text()",
    ],
)
def test_errors_of_others_keep_their_traceback(capsys, source):
    with pytest.raises((ValueError, OSError)):
        run(source, OTHER)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "source",
    [
        "import json; json.loads('{')",
        "from pathlib import Path; Path('/a').relative_to('/b')",
        "1 / 0",
        "assert False",
        "raise MemoryError('does not fit')",
        "raise KeyboardInterrupt",
    ],
)
def test_errors_that_tell_of_a_defect_keep_their_traceback(capsys, source):
    kinds = (ValueError, ZeroDivisionError, AssertionError, MemoryError, KeyboardInterrupt)
    with pytest.raises(kinds):
        run(source, CLOUDS)
    assert capsys.readouterr().err == ""


def test_what_the_system_refuses_is_one_line(capsys):
    for source in (
        "from pathlib import Path; Path('/nowhere/x').read_text()",
        "open('/nowhere/x')",
    ):
        assert told(capsys, source, CLOUDS) == "/nowhere/x: No such file or directory"
    source = "import errno; raise OSError(errno.ENOSPC, 'the disk is full')"
    assert told(capsys, source, CLOUDS) == "the disk is full"


def test_further_kinds_and_interruption(capsys):
    assert told(capsys, "raise MemoryError('too large')", CLOUDS, MemoryError) == "too large"
    with pytest.raises(SystemExit) as leaving:
        run("raise KeyboardInterrupt", OTHER, stopped="go on with it")
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "\ngo on with it\n"


def test_the_log_gets_the_traceback(capsys, caplog):
    with caplog.at_level(logging.DEBUG, "clouds"):
        told(capsys, "raise ValueError('wrong')", CLOUDS)
    assert "Traceback" in caplog.text


def test_late_flags(capsys):
    parser = argparse.ArgumentParser()
    command_line.refuse_late_flags(parser, ["SEED", "-1"])
    with pytest.raises(SystemExit) as leaving:
        command_line.refuse_late_flags(parser, ["SEED", "1", "--resume"])
    assert leaving.value.code == 2
    assert "--resume comes after KEY VALUE" in capsys.readouterr().err


WORDS = {
    "benchmark": ["--config-file", "x.yaml"],
    "cache_sam": ["--config-file", "x.yaml"],
    "check_datasets": [],
    "check_prompts": ["x.txt"],
    "convert_checkpoint": ["a.pth", "b.pth"],
    "generate_images": ["--output", "x"],
    "list_config": [],
    "make_demo_data": [],
    "train_net": ["--config-file", "x.yaml"],
    "trivial_baselines": ["--config-file", "x.yaml"],
    "write_prompts": ["--model", "x", "--output", "y"],
}


@pytest.mark.parametrize("name", WORDS)
def test_without_the_package_a_command_says_what_to_install(name):
    bare = [sys.executable, "-S", "-E"]  # no site-packages, no PYTHONPATH
    command = [*bare, str(TOOLS / f"{name}.py"), *WORDS[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"Install the project first: pip install -e {TOOLS.parent}" in done.stderr


def test_every_command_is_tried_without_the_package():
    others = {"command_line", "demo"}  # the one has no command, the other starts those above
    assert {path.stem for path in TOOLS.glob("*.py")} == WORDS.keys() | others
