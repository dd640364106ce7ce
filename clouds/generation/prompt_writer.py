"""A language model writes prompts; what is no street scene, too long or said already is dropped.

The work goes in rounds. Round k asks for what the file still lacks, with random numbers that are
a function of the seed and k alone; its prompts and a comment line that closes the round are
written at once. So a run that was broken off, even in the middle of writing, goes on after its
last closed round and makes the same file as an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from clouds.data.label_space import CITYSCAPES_19
from clouds.files import unfinished, written_whole
from clouds.generation.prompts import clip_tokens, parse_prompts
from clouds.generation.scene_words import content_words, read_scene
from clouds.scenes.style import TIMES, WEATHERS

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Something that answers instructions."""

    def answer(self, instructions: Sequence[str], seed: int) -> list[str]:
        """One answer for each instruction; the same ones for the same instructions and seed."""
        ...


class NothingUsableError(ValueError):
    """The model gave no prompt that could be kept, round after round."""


@dataclass(frozen=True)
class WritingOptions:
    """What to write.

    Attributes:
        count: new prompts that the file is to get; more if the quota needs more.
        quota: prompts of the file that must name each class.
        seed: of all random choices.
        batch_size: instructions answered at once.
        per_answer: prompts asked for in one instruction.
        similarity: share of common words from which a prompt is taken for one that is there.
        patience: rounds without a usable prompt after which to give up.
    """

    count: int
    quota: int = 0
    seed: int = 0
    batch_size: int = 4
    per_answer: int = 10
    similarity: float = 0.6
    patience: int = 20

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "per_answer", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.quota < 0 or self.seed < 0:
            raise ValueError("quota and seed must not be negative")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity}; allowed is above 0, at most 1")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        written: new prompts in the file.
        rounds: closed rounds.
        dropped: how many lines of answers were dropped, by reason (this run's).
        lacking: classes below the quota, with the number of prompts that are missing.
    """

    written: int = 0
    rounds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, int] = field(default_factory=dict)


def write_prompts(
    writer: Writer,
    output: Path,
    options: WritingOptions,
    settings: Mapping[str, object],
    avoid: Sequence[str] = (),
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Let a writer fill a prompt file, going on where an earlier run stopped.

    Args:
        writer: answers the instructions.
        output: the file, created with its folder; prompts that stand in it already stay, count
            for the quota, and are not repeated.
        settings: what else the answers depend on (model, temperature ...); kept in the file.
        avoid: prompts of other files that must not be repeated.
        show: called after each round, and once before the first.

    Raises:
        ValueError: the file was begun with other settings.
        NothingUsableError: no prompt could be kept for `options.patience` rounds in a row.
    """
    file = _PromptFile(output, _header(options, settings, avoid))
    state = _State(options, file, avoid)
    if not state.done():
        file.drop_open_round()
        state = _State(options, file, avoid)
    show(state.progress)
    idle = 0
    while not state.done():
        answers = _ask(writer, options, state.progress)
        kept, finished = state.take(answers)
        if finished:
            file.append(kept, closes=None)
            break
        file.append(kept, closes=state.progress.rounds)
        state.progress.rounds += 1
        show(state.progress)
        idle = 0 if kept else idle + 1
        if idle >= options.patience:
            raise NothingUsableError(_complaint(options, state.progress, answers))
    show(state.progress)
    return state.progress


# ---------------------------------------------------------------------- what is asked
CLASS_ASKED_AS: Mapping[str, str] = {
    "road": "road",
    "sidewalk": "sidewalk",
    "building": "buildings",
    "wall": "a free-standing wall",
    "fence": "a fence or railing",
    "pole": "lamp posts or utility poles",
    "traffic light": "traffic lights",
    "traffic sign": "traffic signs",
    "vegetation": "trees or hedges",
    "terrain": "grass, soil or fields",
    "sky": "the sky",
    "person": "pedestrians",
    "rider": "a cyclist or motorcyclist riding",
    "car": "cars",
    "truck": "a truck",
    "bus": "a bus",
    "train": "a tram or train",
    "motorcycle": "a motorcycle or scooter",
    "bicycle": "bicycles",
}
"""How an instruction names each class."""

_PLACES = (
    "a city centre",
    "a narrow old-town street",
    "a residential street or suburb",
    "a wide avenue",
    "a motorway",
    "a country road or village",
    "an industrial area or port",
)
_REGIONS = (
    "Western Europe", "Eastern Europe", "Scandinavia", "the Mediterranean", "North America",
    "South America", "East Asia", "South Asia", "Southeast Asia", "Africa", "the Middle East",
    "Australia or New Zealand",
)  # fmt: skip
_WEATHER_ASKED_AS = {
    "clear": "clear, sunny or starry",
    "overcast": "overcast",
    "rain": "rain or wet streets",
    "fog": "fog or haze",
    "snow": "snow",
}
_TIME_ASKED_AS = {"day": "by day", "dusk": "at dusk or dawn", "night": "at night"}


def instruction(rng: np.random.Generator, per_answer: int, lacking: Mapping[str, int]) -> str:
    """What to ask a model for, in words.

    Args:
        rng: chooses weather, time, place and region, and which of the lacking classes are asked
            for: those that lack most are the likeliest.
        lacking: class -> how many prompts are missing; all classes count alike if it is empty.
    """
    names = list(lacking) or list(CITYSCAPES_19.names)
    weights = np.array([lacking.get(name, 1) for name in names], dtype=np.float64)
    share = weights / weights.sum()
    chosen = rng.choice(len(names), size=min(3, len(names)), replace=False, p=share)
    things = "; ".join(CLASS_ASKED_AS[names[i]] for i in chosen)
    weather = _WEATHER_ASKED_AS[WEATHERS[rng.integers(len(WEATHERS))]]
    time = _TIME_ASKED_AS[TIMES[rng.integers(len(TIMES))]]
    place = _PLACES[rng.integers(len(_PLACES))]
    region = _REGIONS[rng.integers(len(_REGIONS))]
    return (
        f"Write {per_answer} descriptions of photographs of street scenes, seen from a car or at "
        "street level. Each is one sentence of 15 to 35 words on a line of its own, in English. "
        "Name concrete things that are in the picture, never something that is absent. Vary the "
        "form of the sentences, the season and the viewpoint.\n"
        f"Every description must show: {things}.\n"
        f"Most of them: {place} in {region}, {time}, weather {weather}.\n"
        f"Answer with the {per_answer} lines only, without numbers, titles or comments."
    )


def _ask(writer: Writer, options: WritingOptions, progress: Progress) -> list[str]:
    rng = np.random.default_rng([options.seed, progress.rounds])
    asked = [
        instruction(rng, options.per_answer, progress.lacking) for _ in range(options.batch_size)
    ]
    answers = writer.answer(asked, seed=int(rng.integers(2**31)))
    assert len(answers) == len(asked)
    return answers


# ---------------------------------------------------------------------- what is answered
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MARKER = re.compile(r"^(?:[-*•–—>#]+|\(?\d{1,3}\s*[.):]|\(?[a-zA-Z][.)](?=\s))\s*")
_QUOTES = "\"'“”‘’«»`*_ \t"
_ENDS = (".", "!", "?", "…")
FEWEST_WORDS = 6
FEWEST_CLASSES = 2


def parse_answer(answer: str) -> list[str]:
    """The lines of an answer without numbers, bullets, quotes and thoughts."""
    lines = []
    for line in _THOUGHT.sub("", answer).splitlines():
        line = line.strip().strip(_QUOTES)
        line = _MARKER.sub("", line).strip(_QUOTES)
        line = re.sub(r"\s+", " ", line.replace("**", ""))
        if line:
            lines.append(line)
    return lines


def fault(line: str) -> str | None:
    """Why a line of an answer is no prompt, or None if it is one."""
    if line.endswith(":"):
        return "heading"
    if not line.isprintable() or sum(c.isascii() and c.isalpha() for c in line) < 0.6 * len(line):
        return "not plain English"
    if len(line.split()) < FEWEST_WORDS:
        return "too short"
    if len(read_scene(line).classes) < FEWEST_CLASSES:
        return "no street scene"
    # A token has at least one byte, so that few bytes need no tokenizer.
    if len(line.encode()) > 75 and clip_tokens(line).cut:
        return "too long"
    return None


def _candidates(answers: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each line of the answers, with what is wrong with it."""
    for answer in answers:
        lines = parse_answer(answer)
        for i, line in enumerate(lines):
            wrong = fault(line)
            if wrong is None and i == len(lines) - 1 and not line.endswith(_ENDS):
                wrong = "unfinished"  # the model ran out of tokens
            yield line, wrong


class _State:
    """The prompts so far, and what is still wanted."""

    def __init__(self, options: WritingOptions, file: _PromptFile, avoid: Sequence[str]) -> None:
        self.options = options
        self.known = [content_words(prompt) for prompt in (*avoid, *file.old, *file.new)]
        self.named = Counter(c for p in (*file.old, *file.new) for c in read_scene(p).classes)
        self.progress = Progress(written=len(file.new), rounds=file.rounds)
        self._update_lacking()

    def done(self) -> bool:
        return self.progress.written >= self.options.count and not self.progress.lacking

    def take(self, answers: Sequence[str]) -> tuple[list[str], bool]:
        """Keep what can be kept; also says whether nothing more is wanted."""
        kept: list[str] = []
        for line, wrong in _candidates(answers):
            if self.done():
                return kept, True
            words = content_words(line)
            if wrong is None and self._is_known(words):
                wrong = "repeated"
            classes = read_scene(line).classes
            if (
                wrong is None
                and self.progress.written >= self.options.count
                and not classes & self.progress.lacking.keys()
            ):
                wrong = "not of a class that lacks"
            if wrong is not None:
                self.progress.dropped[wrong] += 1
                continue
            kept.append(line)
            self.known.append(words)
            self.named.update(classes)
            self.progress.written += 1
            self._update_lacking()
        return kept, self.done()

    def _is_known(self, words: frozenset[str]) -> bool:
        bar = self.options.similarity
        return any(len(words & old) >= bar * len(words | old) for old in self.known)

    def _update_lacking(self) -> None:
        missing = {name: self.options.quota - self.named[name] for name in CITYSCAPES_19.names}
        self.progress.lacking = {name: lack for name, lack in missing.items() if lack > 0}


def _complaint(options: WritingOptions, progress: Progress, answers: Sequence[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in progress.dropped.most_common())
    wanted = (
        f"{progress.written} of {options.count} prompts are written"
        if progress.written < options.count
        else f"still lacking: {', '.join(progress.lacking)}"
    )
    return (
        f"{options.patience} rounds in a row gave no prompt that can be used ({wanted}; dropped: "
        f"{reasons or 'nothing, the answers were empty'}). The last answer begins "
        f"{answers[0][:80]!r}. Use an instruction-tuned model, another --temperature, or a lower "
        "--quota."
    )


# ---------------------------------------------------------------------- the file
_BEGIN = "# written by tools/write_prompts.py: "
_CLOSED = "# end of round "


def _header(
    options: WritingOptions, settings: Mapping[str, object], avoid: Sequence[str]
) -> dict[str, object]:
    """Everything that the prompts are a function of, apart from their number."""
    return {
        **settings,
        "seed": options.seed,
        "quota": options.quota,
        "batch_size": options.batch_size,
        "per_answer": options.per_answer,
        "similarity": options.similarity,
        "avoid": hashlib.sha256("\n".join(avoid).encode()).hexdigest()[:16] if avoid else None,
    }


class _PromptFile:
    """The output: prompts that were there before, a line of settings, and the rounds.

    Attributes:
        old: prompts above the line of settings.
        new: prompts below it, in closed rounds and behind them.
        rounds: how many are closed.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        for leftover in unfinished(path.parent, path.name):
            leftover.unlink(missing_ok=True)
        before, settings, body = _split_file(_read(path))
        self._head = before + _BEGIN + json.dumps(header) + "\n"
        if settings is None:
            if before and not before.endswith("\n"):
                self._head = before + "\n" + self._head[len(before) :]
            self._write("")
        else:
            _check_same(path, settings, header)
            self._head = before + _BEGIN + settings + "\n"
        self.old = [prompt.text for prompt in parse_prompts(before.splitlines())]
        # A line without its end was being written when the run was broken off.
        self._lines = [line for line in body.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def new(self) -> list[str]:
        return [prompt.text for prompt in parse_prompts(self._lines)]

    @property
    def rounds(self) -> int:
        return sum(line.startswith(_CLOSED) for line in self._lines)

    def drop_open_round(self) -> None:
        """Forget what stands behind the last closed round."""
        while self._lines and not self._lines[-1].startswith(_CLOSED):
            self._lines.pop()
        self._write("".join(self._lines))

    def _write(self, body: str) -> None:
        """Write all of the file anew."""
        with written_whole(self.path, "w") as stream:
            stream.write(self._head + body)

    def append(self, prompts: Sequence[str], closes: int | None) -> None:
        """Write prompts, and the line that closes a round, to the disk."""
        lines = [f"{prompt}\n" for prompt in prompts]
        if closes is not None:
            lines.append(f"{_CLOSED}{closes}\n")
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write("".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        self._lines += lines


def _read(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8; name another --output") from error


def _split_file(text: str) -> tuple[str, str | None, str]:
    """What stands above the line of settings, the settings, and what stands below."""
    before, begin, rest = text.partition(_BEGIN)
    settings, end, body = rest.partition("\n")
    return (before, settings, body) if begin and end else (before, None, "")


def _check_same(path: Path, settings: str, header: Mapping[str, object]) -> None:
    """Refuse to go on with a file that was begun with other settings."""
    try:
        begun = json.loads(settings)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the line of settings is broken: {settings[:60]!r}") from error
    wanted = json.loads(json.dumps(header))
    changed = [
        f"{key} {begun.get(key)!r} (now {wanted.get(key)!r})"
        for key in sorted({*begun, *wanted})
        if begun.get(key) != wanted.get(key)
    ]
    if changed:
        raise ValueError(
            f"{path} was begun with {', '.join(changed)}. Give the same settings to go on with it, "
            "or another --output."
        )
