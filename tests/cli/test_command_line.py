"""Shared by the commands: errors in one line or with their traceback, and paths with `~`."""

import argparse
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clouds.cli import command_line, main

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CLOUDS = {"__name__": "clouds.anything", "__file__": "/anywhere/clouds/anything.py"}
TOOL = {"__name__": "__main__", "__file__": str(TOOLS / "x.py")}
OTHER = {"__name__": "clouds_of_another", "__file__": "/anywhere/clouds_of_another.py"}


def run(source, module, *also, **options):
    """Run code as that of a module, within a command."""
    with command_line.user_errors_in_one_line(*also, **options):
        exec(source, dict(module))


def error_of(capsys, source, module, *also, **options):
    with pytest.raises(SystemExit) as leaving:
        run(source, module, *also, **options)
    assert leaving.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.endswith("\n")
    return text.removeprefix("error: ")[:-1]


@pytest.mark.parametrize("module", [CLOUDS, TOOL])
@pytest.mark.parametrize("kind", ["ValueError", "OSError", "FileNotFoundError", "ImportError"])
def test_an_error_of_this_project_is_one_line(capsys, module, kind):
    assert error_of(capsys, f"raise {kind}('it is wrong')", module) == "it is wrong"


def test_the_message_of_a_key_error_has_no_quotes(capsys):
    assert error_of(capsys, "raise KeyError('no such name')", CLOUDS) == "no such name"


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError",  # in a module of another package
        "import json; json.loads('{')",
        "from pathlib import Path; Path('/nowhere/at/all').read_text()",
    ],
)
def test_errors_of_other_packages_keep_their_traceback(capsys, source):
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
def test_errors_of_the_program_keep_their_traceback(capsys, source):
    kinds = (ValueError, ZeroDivisionError, AssertionError, MemoryError, KeyboardInterrupt)
    with pytest.raises(kinds):
        run(source, CLOUDS)
    assert capsys.readouterr().err == ""


def test_errors_of_the_operating_system_are_one_line(capsys):
    for source in (
        "from pathlib import Path; Path('/nowhere/x').read_text()",
        "open('/nowhere/x')",
    ):
        assert error_of(capsys, source, CLOUDS) == "/nowhere/x: No such file or directory"
    source = "import errno; raise OSError(errno.ENOSPC, 'the disk is full')"
    assert error_of(capsys, source, CLOUDS) == "the disk is full"


def test_further_types_and_interruption(capsys):
    assert error_of(capsys, "raise MemoryError('too large')", CLOUDS, MemoryError) == "too large"
    with pytest.raises(SystemExit) as leaving:
        run("raise KeyboardInterrupt", OTHER, stopped="resume with it")
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "\nresume with it\n"


def test_the_log_gets_the_traceback(capsys, caplog):
    with caplog.at_level(logging.DEBUG, "clouds"):
        error_of(capsys, "raise ValueError('wrong')", CLOUDS)
    assert "Traceback" in caplog.text


def test_late_flags(capsys):
    parser = argparse.ArgumentParser()
    assert command_line.given_overrides(parser, ["SEED", "-1"]) == ["SEED", "-1"]
    assert command_line.given_overrides(parser, ["--", "SEED", "1"]) == ["SEED", "1"]
    with pytest.raises(SystemExit) as leaving:
        command_line.given_overrides(parser, ["SEED", "1", "--resume"])
    assert leaving.value.code == 2
    assert "--resume comes after KEY VALUE" in capsys.readouterr().err


WORDS = {
    "benchmark": ["--config-file", "x.yaml"],
    "cache_sam": ["--config-file", "x.yaml"],
    "check_datasets": [],
    "check_prompts": ["x.txt"],
    "convert_checkpoint": ["a.pth", "b.pth"],
    "demo": [],
    "describe_dataset": ["images", "labels"],
    "export": ["--weights", "a.pth", "--output", "x"],
    "generate_images": ["--output", "x"],
    "list_config": [],
    "list_parameters": ["--config-file", "x.yaml"],
    "make_demo_data": [],
    "predict": ["--config-file", "x.yaml"],
    "report": ["run"],
    "train_controlnet": ["--model", "x", "--dataset", "y", "--output", "z"],
    "train_net": ["--config-file", "x.yaml"],
    "trivial_baselines": ["--config-file", "x.yaml"],
    "write_prompts": ["--model", "x", "--output", "y"],
}


@pytest.mark.parametrize("name", WORDS)
def test_without_the_package_the_message_is_how_to_install_it(name):
    bare = [sys.executable, "-S", "-E"]  # no site-packages, no PYTHONPATH
    command = [*bare, str(TOOLS / f"{name}.py"), *WORDS[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"Install the project first: pip install -e {TOOLS.parent}" in done.stderr


def test_all_commands_are_tested_without_the_package():
    assert {path.stem for path in TOOLS.glob("*.py")} == WORDS.keys() | {"installed"}


HOME_PATHS = [
    ("benchmark", ["--config-file", "x.yaml", "--json", "~/a/b"], "json"),
    ("clouds.cli.check_data", ["--root", "~/a/b"], "root"),
    ("clouds.cli.check_prompts", ["~/a/b"], "file"),
    ("clouds.cli.describe_dataset", ["~/a/b", "labels"], "images"),
    ("clouds.cli.convert", ["~/a/b", "c.pth"], "input"),
    ("clouds.cli.convert", ["c.pth", "~/a/b"], "output"),
    ("clouds.cli.generate", ["--output", "~/a/b"], "output"),
    ("clouds.cli.generate", ["--output", "x", "--prompts", "~/a/b"], "prompts"),
    ("clouds.cli.generate", ["--output", "x", "--model", "~/a/b"], "model"),
    ("street_renderer.demo", ["--data", "~/a/b"], "data"),
    ("street_renderer.demo", ["--output", "~/a/b"], "output"),
    ("street_renderer.demo", ["--prompts", "~/a/b"], "prompts"),
    ("street_renderer.make_demo_data", ["--output", "~/a/b"], "output"),
    ("street_renderer.make_demo_data", ["--contact-sheet", "~/a/b"], "contact_sheet"),
    ("clouds.cli.write_prompts", ["--model", "x", "--output", "~/a/b"], "output"),
    ("clouds.cli.write_prompts", ["--output", "x", "--model", "~/a/b"], "model"),
]
"""Module of a command, a command line, and the argument with the path."""


@pytest.mark.parametrize(("module", "words", "name"), HOME_PATHS)
def test_home_directory_in_paths(module, words, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(TOOLS))  # for benchmark
    args = importlib.import_module(module).parse(words)
    assert str(getattr(args, name)) == str(tmp_path / "a/b")


def test_home_directory_in_lists_of_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--model", "x", "--output", "y", "--avoid", "~/a", "b"]
    args = importlib.import_module("clouds.cli.write_prompts").parse(words)
    assert args.avoid == [tmp_path / "a", Path("b")]


def test_names_on_a_hub_are_not_paths():
    assert command_line.path_or_name("org/model~1") == "org/model~1"


def test_home_directory_of_an_unknown_user():
    with pytest.raises(argparse.ArgumentTypeError, match="~no_such_user/x"):
        command_line.path("~no_such_user/x")


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999", "NaN"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompts", "a", "--output", "b", "--count", "1", "--guidance"),
        ("write-prompts", "--output", "a", "--model", "b", "--count", "1", "--temperature"),
        ("check-prompts", "a.txt", "--similarity"),
    ],
)
def test_numbers_must_be_finite(arguments, word, capsys):
    with pytest.raises(SystemExit) as end:
        main.main([*arguments[:-1], f"{arguments[-1]}={word}"])
    assert end.value.code == 2
    assert f"{arguments[-1]}: {word!r} is given; expected is a finite number" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------------- names that are not UTF-8


@pytest.fixture
def not_utf8(tmp_path):
    """A dataset in which the image and the label b"a\\xff.png" are no images."""
    for folder in ("images", "labels"):
        path = tmp_path / "stable_diffusion/x" / folder / os.fsdecode(b"a\xff.png")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"text")
    return tmp_path


@pytest.mark.parametrize("command", [["-m", "clouds", "check-data"], [TOOLS / "check_datasets.py"]])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_commands_print_names_that_are_not_utf8(not_utf8, command, encoding):
    words = [*command, "--root", not_utf8, "--datasets", "sd_x", "--full"]
    paths = os.pathsep.join([str(TOOLS.parent), str(TOOLS.parent / "projects/street_renderer")])
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"2 files cannot be read: " in done.stdout
    for folder in (b"images", b"labels"):
        assert folder + b"/a\\udcff.png: cannot be read as an image" in done.stdout
