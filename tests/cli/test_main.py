"""`clouds`: its help, the choice of a command, commands of other packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib
from engine_toy import script_environment

from clouds.cli.main import main
from clouds.cli.table import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PRESENT = [name for name, command in COMMANDS.items() if find_spec(command.module)]
OF_CONFIGS = {
    "train": [],
    "eval": [],
    "cache-sam": [],
    "baselines": [],
    "list-config": [],
    "convert": ["a.pth", "b.safetensors"],
}
"""Commands that take overrides, and their other arguments."""


def run(*words, path=(), program=("-m", "clouds"), cwd=None):
    environment = script_environment(ROOT / "projects/street_renderer")
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), environment["PYTHONPATH"]])
    command = [sys.executable, *program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture
def plugin(tmp_path):
    """A folder with the metadata of an installed package that has two commands."""
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[clouds.commands]\ngreet = my_command:main\nbroken = my_command:absent\n"
        "missing = not_there:main\n"
    )
    (tmp_path / "my_command.py").write_text(
        "import argparse\n"
        "def main(argv=None):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('name')\n"
        "    print('hello', parser.parse_args(argv).name)\n"
        "    return 7\n"
    )
    return tmp_path


def test_help_lists_the_commands():
    started = time.monotonic()
    done = run("--help")
    assert time.monotonic() - started < 3  # half a second on an idle machine
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m clouds COMMAND")
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout and command.summary in done.stdout
    last = done.stdout.splitlines()[-2:]
    assert last[0] == "example:" and last[1].startswith("  clouds train ")


def test_help_imports_no_command():
    program = (
        "import sys; from clouds.cli.main import main; main(['--help'])\n"
        "own = {m for m in sys.modules if m.startswith('clouds.')}\n"
        "light = {'clouds.cli', 'clouds.version', 'clouds.plugins'}\n"
        "light |= {f'clouds.cli.{m}' for m in ('main', 'table', 'command_line')}\n"
        "print(own - light, {'numpy', 'torch', 'yaml'} & set(sys.modules))\n"
    )
    done = run(program=("-c", program))
    assert done.stdout.splitlines()[-1] == "set() set()", done.stderr


@pytest.mark.parametrize("name", PRESENT)
def test_help_of_a_command_shows_its_name_and_ends_with_an_example(name):
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m clouds {name} ")
    assert done.stdout.splitlines()[-1].strip() == COMMANDS[name].examples[-1]


def test_a_script_shows_its_own_name():
    done = run("--help", program=(str(ROOT / "tools/train_net.py"),))
    assert done.stdout.startswith("usage: train_net.py ")


def test_version_is_that_of_the_package(capsys):
    import clouds

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clouds {clouds.__version__}\n"


def test_no_command_is_a_usage_error(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_wrong_command_names_the_near_ones(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["trian"])
    assert leaving.value.code == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_a_command_of_another_package(plugin):
    done = run("greet", "you", path=[plugin])
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello you\n", "")
    assert "usage: " in run("greet", path=[plugin]).stderr
    listed = run("--help", path=[plugin]).stdout
    assert ["greet", "from", "my-plugin"] in [line.split() for line in listed.splitlines()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "the command 'missing' (not_there:main) needs the package 'not_there'"),
        ("broken", "the command 'broken' (my_command:absent) cannot be imported"),
    ],
)
def test_a_plugin_that_fails_is_named(plugin, name, message):
    done = run(name, path=[plugin])
    assert done.returncode == 2
    assert message in done.stderr and "'my-plugin'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_commands_of_the_renderer_are_entry_points():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared["scripts"] == {"clouds": "clouds.cli.main:main"}
    assert declared["entry-points"]["clouds.commands"].keys() == {"demo", "make-demo-data"}
    for place in declared["entry-points"]["clouds.commands"].values():
        module, _, function = place.partition(":")
        imported = __import__(module, fromlist=[function])
        assert callable(getattr(imported, function))


def shell(line, **environment):
    """Standard output and error of a line for bash, in which $CLOUDS is the command."""
    variables = {**script_environment(), "CLOUDS": f"{sys.executable} -m clouds", **environment}
    done = subprocess.run(["/bin/bash", "-c", line], capture_output=True, env=variables)
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["list-config", "--help"])
def test_output_that_cannot_be_written(words):
    output, errors = shell(f"$CLOUDS {words} > /dev/full; echo $?")
    assert output == "2\n"
    assert errors == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", ["list-config", "--help", "no-such-command"])
def test_a_reader_that_ends(words):
    """As `clouds list-config | head`: true does not read at all."""
    output, errors = shell(f"(sleep 0.1; $CLOUDS {words}; echo $? >&2) | true")
    status = errors.splitlines()[-1]
    assert (output, status) == ("", "2" if words == "no-such-command" else "141")
    assert errors.count("\n") == (2 if words == "no-such-command" else 1)


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "utf-8"])
def test_any_terminal_shows_all_keys(encoding):
    """Escapes stand for characters that the encoding lacks."""
    output, errors = shell("$CLOUDS list-config", PYTHONIOENCODING=encoding, LC_ALL="C")
    assert errors == ""
    assert ("\\u2026" in output) == encoding.startswith("ascii")
    assert ("\u2026" in output) == (encoding == "utf-8")


def test_without_a_home_or_a_name():
    output, errors = shell("env -u HOME -u USER -u LOGNAME $CLOUDS list-config OUTPUT_DIR")
    assert "OUTPUT_DIR" in output
    assert errors == ""


@pytest.mark.parametrize(
    "words",
    [
        ["list-config", "--config-file", "~/a.yaml"],
        ["train", "--config-file", "~/a.yaml"],
        ["train", "--config-file", "demo/warmup", "OUTPUT_DIR", "~/a"],
        ["predict", "--weights", "~/a.pth", "--input", "~/a.png", "--output", "~/out"],
    ],
)
def test_a_user_without_an_account(words, monkeypatch, capsys):
    """As `docker run --user 12345`: there is no home for `~`."""
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**20 + 5)
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    text = capsys.readouterr().err
    assert "the home directory is not known" in text or "determine home directory" in text
    assert "Traceback" not in text


def test_without_the_module_resource():
    """Windows lacks it, and some signals."""
    program = (
        "import sys, signal; sys.modules['resource'] = None\n"
        "for name in ('SIGHUP', 'SIGUSR1', 'SIGCHLD'): delattr(signal, name)\n"
        "import torch; from clouds.engine import interrupt, metrics\n"
        "print(metrics.memory_gib(torch.device('cpu')), *interrupt.SIGNALS)\n"
        "with interrupt.StopRequest().listening(): pass\n"
        "metrics.MetricsFile(__import__('pathlib').Path(sys.argv[1])).write({'a': float('nan')})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, os.devnull],
        capture_output=True,
        text=True,
        env=script_environment(),
    )
    assert (done.stderr, done.stdout) == ("", "nan 2 15\n")


@pytest.mark.parametrize("name", OF_CONFIGS)
def test_two_dashes_before_overrides(name, capsys):
    words = [*OF_CONFIGS[name], "--config-file", "demo/warmup", "--", "SOLVER.NO_SUCH_KEY", "1"]
    with pytest.raises(SystemExit) as leaving:
        main([name, *words])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "SOLVER.NO_SUCH_KEY" in error or "'a.pth' does not exist" in error


def test_scikit_learn_is_named_by_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as leaving:
        main(["baselines", "--config-file", "demo/warmup"])
    assert leaving.value.code == 2
    assert 'pip install "clouds-dgss[baselines]"' in capsys.readouterr().err


def test_every_extra_that_messages_name_exists():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set()
    for path in (ROOT / "clouds").rglob("*.py"):
        named |= set(re.findall(r"install_extra\(['\"](\w+)['\"]\)", path.read_text()))
        assert "pip install -e '.[" not in path.read_text()
    assert named == {
        *("baselines", "corruptions", "export", "generate", "report", "sam", "slurm", "wandb")
    }
    assert named <= declared["optional-dependencies"].keys()
