"""Documents: line length, and existence of the keys, paths, links and commands they name."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from clouds.cli import command_line, table
from clouds.config import KEYS
from clouds.config.compat import COMPAT_KEYS

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 120
FOLDERS = "tools clouds configs docs benchmarks projects tests .ci".split()

COMMAND = re.compile(
    r"(?:\w+=\S+ )*"  # environment variables
    r"(?:(?:python|torchrun(?: --[\w-]+ \d+)*) (?:((?:tools|benchmarks)/\S+\.py)|-m (clouds)\b)"
    r"|(clouds)(?= [a-z-]+(?: |$)))(.*)"
)
"""Groups: a script, or twice `clouds`; the arguments."""

TABLE_KEYS = {key.name for key in KEYS}
SECTIONS = {name.rsplit(".", n)[0] for name in TABLE_KEYS for n in range(1, name.count(".") + 1)}
TOP_SECTIONS = sorted({name.split(".")[0] for name in SECTIONS})


class Command(NamedTuple):
    """A command line of a document.

    Attributes:
        script: relative to the repository; `clouds`: the package's command.
        arguments: those that the document gives.
        abbreviated: whether required ones may be missing: in inline code, and before `…`.
    """

    script: str
    arguments: tuple[str, ...]
    abbreviated: bool = False


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, relative to the repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *patterns]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout", allow_module_level=True)
    # files that are deleted but not committed are not there
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks, without fence and indentation."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:(?<=\n\n)|\A)((?: {4,}\S.*(?:\n|\Z))+)", rest)
    return [*fenced, *(re.sub(r"^ +(?=\S)", "", block, flags=re.M) for block in indented)]


def code_spans(text: str) -> list[str]:
    """Inline code; a line break in it is a space."""
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def long_lines(text: str) -> list[str]:
    """Lines of more than MAX_LENGTH characters, except a URL that alone is as long."""
    return [
        line
        for line in text.splitlines()
        if len(line) > MAX_LENGTH
        and not any("://" in word and len(word) > MAX_LENGTH - 4 for word in line.split())
    ]


def keys(text: str) -> set[str]:
    """Names of config keys with their section, such as MODEL.WEIGHTS, and of sections."""
    return set(re.findall(rf"(?<![\w./])(?:{'|'.join(TOP_SECTIONS)})(?:\.[A-Z][A-Z0-9_]*)+", text))


def paths(text: str) -> set[str]:
    """Paths of the repository in inline code, and scripts and configs in code blocks."""
    words = [word for code in (*code_spans(text), *code_blocks(text)) for word in code.split()]
    words = [word.strip("\"',;:()") for word in words]
    # <name> and … stand for something else; a path with an asterisk is a pattern
    return {
        word
        for word in words
        if word.split("/")[0] in FOLDERS and "/" in word and not re.search("[<…]", word)
    }


def missing_paths(text: str) -> set[str]:
    return {path for path in paths(text) if not list(ROOT.glob(path.rstrip("/")))}


def missing_modules(text: str) -> set[str]:
    """Python files that inline code names without a folder, and no folder has."""
    names = {span for span in code_spans(text) if re.fullmatch(r"\w+\.py", span)}
    return names - {path.name for path in tracked("*.py")}


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, folder: Path) -> set[str]:
    """Relative links whose file or heading does not exist."""
    broken = set()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[.+?\]: (\S+)", text, re.M)
    for target in targets:
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = folder / name
        if not path.exists():
            broken.add(target)
            continue
        document = path.read_text() if name and anchor else text
        if anchor and anchor not in anchors(document):
            broken.add(target)
    return broken


def commands(text: str) -> list[Command]:
    """Commands of the package, tools and benchmarks, in code blocks and inline code."""
    blocks = "\n".join(code_blocks(text)).replace("\\\n", " ").splitlines()
    spans = code_spans(text)
    found = []
    for line, inline in [(line, False) for line in blocks] + [(span, True) for span in spans]:
        match = COMMAND.match(line)
        if match:
            words = shlex.split(match[4], comments=True)
            given = tuple(word for word in words if word != "…")
            script = match[1] or match[2] or match[3]
            if script == "clouds" and not given:
                continue  # the program, not a command
            found.append(Command(script, given, abbreviated=inline or "…" in words))
    return found


class ParsedError(BaseException):
    """Raised in place of the rest of a program after its arguments are parsed."""

    def __init__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
        super().__init__()
        self.parser = parser
        self.namespace = namespace


def stopping(method, abbreviated):
    """`ArgumentParser.parse_args`, or its like, that raises ParsedError where it would return."""

    def parse(self, *args, **kwargs):
        for action in self._actions:
            action.required &= not abbreviated
        raise ParsedError(self, method(self, *args, **kwargs))

    return parse


def run_parser(command: Command, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a script up to the end of argument parsing, and return its config overrides.

    Raises:
        SystemExit: its parser rejects the arguments, with status 2.
    """
    script = ROOT / command.script
    if command.script == "clouds":
        script = ROOT / "clouds" / "__main__.py"
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            method = getattr(argparse.ArgumentParser, name)
            patch.setattr(argparse.ArgumentParser, name, stopping(method, command.abbreviated))
        patch.setattr(sys, "argv", [str(script), *command.arguments])
        patch.syspath_prepend(str(script.parent))
        patch.chdir(ROOT)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except ParsedError as parsed:
            overrides = list(getattr(parsed.namespace, "opts", []))
            return command_line.given_overrides(parsed.parser, overrides)
    raise AssertionError(f"{command.script} does not parse arguments")


@pytest.fixture(autouse=True)
def logger_levels():
    """Restores the levels that scripts set before they parse arguments."""
    before = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    yield
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).setLevel(before.get(name, logging.NOTSET))


DOCUMENTS = tracked("*.md")
COMMANDS = list(dict.fromkeys(c for path in DOCUMENTS for c in commands((ROOT / path).read_text())))
of_each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=str)


@of_each_document
def test_lines_have_at_most_120_characters(path):
    assert long_lines((ROOT / path).read_text()) == []


@of_each_document
def test_config_keys_exist(path):
    known = TABLE_KEYS | SECTIONS
    if path.name == "CHANGELOG.md":  # it names former keys, too
        known |= COMPAT_KEYS
    assert keys((ROOT / path).read_text()) - known == set()


@of_each_document
def test_paths_and_links_exist(path):
    text = (ROOT / path).read_text()
    assert missing_paths(text) == set()
    assert missing_modules(text) == set()
    assert broken_links(text, (ROOT / path).parent) == set()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join([c.script, *c.arguments]))
def test_the_parser_accepts_the_command(command, monkeypatch):
    try:
        overrides = run_parser(command, monkeypatch)
    except SystemExit as end:
        assert end.code == 0, "the parser rejects the arguments"  # 0: --help
        return
    assert set(overrides[::2]) - TABLE_KEYS == set()
    assert len(overrides) % 2 == 0


def test_every_command_is_in_the_documents():
    given = {(command.script, *command.arguments[:1]) for command in COMMANDS}
    in_documents = {words[1] for words in given if words[0] == "clouds" and words[1:]}
    for script in {words[0] for words in given} - {"clouds"}:
        text = (ROOT / script).read_text()
        in_documents |= set(re.findall(r"The command `clouds ([a-z-]+)`", text))
    there = {name for name, row in table.COMMANDS.items() if importlib.util.find_spec(row.module)}
    assert there - in_documents == set()
    assert "tools/benchmark.py" in {command.script for command in COMMANDS}


EXAMPLES = [
    example
    for row in table.COMMANDS.values()
    if importlib.util.find_spec(row.module)
    for example in row.examples
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_parser_accepts_the_examples_of_the_commands(example, monkeypatch):
    (command,) = commands(f"`{example}`")
    overrides = run_parser(command._replace(abbreviated=False), monkeypatch)
    assert set(overrides[::2]) <= TABLE_KEYS
    assert "--output" not in overrides


# ------------------------------------------------- the checks find what is wrong
def test_code_blocks():
    text = "a\n\n    one\n    two\n\n```bash\nthree\n```\n- item\n  more\n\n      four\n"
    assert code_blocks(text) == ["three\n", "one\ntwo\n", "four\n"]


def test_long_lines():
    url = "https://example.org/" + "x" * 120
    assert long_lines("x" * 120) == []
    assert long_lines("x" * 121) == ["x" * 121]
    assert long_lines(f"- {url}") == []
    assert long_lines("see https://example.org " + "x " * 60) != []


def test_keys():
    text = "`MODEL.CLOUDS.REFINER none`, SOLVER.AMP, see TEST.PROTOCOL. `MODEL.X_1`: a.INPUT.B"
    assert keys(text) == {"MODEL.CLOUDS.REFINER", "SOLVER.AMP", "TEST.PROTOCOL", "MODEL.X_1"}
    assert keys(text) - TABLE_KEYS - SECTIONS == {"MODEL.X_1"}


def test_missing_paths():
    text = (
        "`clouds/comm.py`, `configs/warmup`, `tests/`, `clouds/<name>.py`, `output/x`, `tools/*.py`"
    )
    assert missing_paths(text) == set()
    text = (
        "`tools/none.py`, `clouds/none/`, `configs/none*.yaml`\n\n    python x configs/none.yaml\n"
    )
    assert missing_paths(text) == {
        "tools/none.py",
        "clouds/none/",
        "configs/none*.yaml",
        "configs/none.yaml",
    }
    assert missing_modules("`comm.py` and `comn.py`") == {"comn.py"}


def test_broken_links(tmp_path):
    (tmp_path / "b.md").write_text("# On a GPU\n")
    text = "# Start-up (1)\n[a](b.md) [b](b.md#on-a-gpu) [c](#start-up-1) [d](https://x.org)\n"
    assert broken_links(text, tmp_path) == set()
    text = "[a](c.md) [b](b.md#on-a-cpu) [c](#none)\n\n[d]: e.md\n"
    assert broken_links(text, tmp_path) == {"c.md", "b.md#on-a-cpu", "#none", "e.md"}


def test_commands():
    text = (
        "    OMP_NUM_THREADS=1 python tools/a.py --x \\\n        'b c' …   # comment\n"
        "    cp python tools/b.py\n    python tools/d.py 1\n\n"
        "`torchrun --nproc-per-node 8\ntools/c.py FILE`, `pytest tests`, `clouds train`\n"
        "`torchrun --nproc-per-node 8 -m clouds eval`, `python -m clouds`, `clouds`\n"
        "`clouds/cli`, `clouds.build`\n"
    )
    assert commands("\n\n" + text) == [
        Command("tools/a.py", ("--x", "b c"), abbreviated=True),
        Command("tools/d.py", ("1",)),
        Command("tools/c.py", ("FILE",), abbreviated=True),
        Command("clouds", ("train",), abbreviated=True),
        Command("clouds", ("eval",), abbreviated=True),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config-files", "FILE"),  # unknown flag
        ("--config-file", "FILE", "SEED", "1", "--resume"),  # flag after the overrides
        ("--config-file", "FILE", "--num-gpus", "two"),  # wrong type
    ],
)
def test_wrong_arguments_are_rejected(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_parser(Command("tools/train_net.py", arguments), monkeypatch)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_overrides_are_returned(monkeypatch):
    command = Command("tools/train_net.py", ("--config-file", "FILE", "--resume", "SEED", "1"))
    assert run_parser(command, monkeypatch) == ["SEED", "1"]
    with pytest.raises(FileNotFoundError):
        run_parser(Command("tools/none.py", ()), monkeypatch)


def test_only_abbreviated_commands_may_lack_required_arguments(monkeypatch):
    tool = "tools/generate_images.py"
    assert run_parser(Command(tool, ("--count", "1"), abbreviated=True), monkeypatch) == []
    for command in (Command(tool, ()), Command(tool, ("--counts", "1"), abbreviated=True)):
        with pytest.raises(SystemExit):
            run_parser(command, monkeypatch)
