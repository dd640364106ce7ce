"""Prompts written by a language model, filtered and balanced over the classes.

Round k asks for the classes that the file still lacks, with random numbers that are a function of
the seed and k alone. Its prompts and a comment line that ends the round are written together, so an
interrupted run resumes after its last complete round and produces the same file.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from clouds.generation.prompt_file import PromptFile
from clouds.generation.prompts import cut_by_clip
from clouds.generation.words import content_words

NamedClasses = Callable[[str], frozenset[str]]
"""Prompt -> names of the classes that it names."""


CLASS_DESCRIPTIONS: Mapping[str, str] = {
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
"""Class of Cityscapes -> its description in an instruction."""


class ChatModel(Protocol):
    """A language model that follows instructions."""

    def answer(self, instructions: Sequence[str], seed: int) -> list[str]:
        """One answer per instruction, a function of the instructions and the seed."""
        ...


class NothingUsableError(ValueError):
    """No answer of several consecutive rounds contained a valid prompt."""


@dataclass(frozen=True)
class WritingOptions:
    """Options of `write_prompts`.

    Attributes:
        count: number of new prompts; more are written if the quota requires it.
        quota: minimum number of prompts in the file that name each class.
        seed: of all random choices.
        batch_size: instructions per call of the model.
        per_answer: prompts per instruction.
        similarity: Jaccard index of content words from which a prompt counts as repeated.
        patience: rounds without a valid prompt after which the run fails.
        classes: name -> description in an instruction, of the classes that prompts are to name.
        dense: each prompt names several classes, the place, the weather and the time.
    """

    count: int
    quota: int = 0
    seed: int = 0
    batch_size: int = 4
    per_answer: int = 10
    similarity: float = 0.6
    patience: int = 20
    classes: Mapping[str, str] = field(default_factory=lambda: CLASS_DESCRIPTIONS)
    dense: bool = False

    @property
    def min_classes(self) -> int:
        """Smallest number of classes that a valid prompt names."""
        return min(MIN_CLASSES_DENSE if self.dense else MIN_CLASSES, len(self.classes))

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
    """Progress of a run.

    Attributes:
        written: new prompts in the file.
        rounds: complete rounds.
        dropped: number of dropped lines by reason, in this run.
        lacking: classes below the quota, with the number of missing prompts.
    """

    written: int = 0
    rounds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, int] = field(default_factory=dict)


def write_prompts(
    model: ChatModel,
    output: Path,
    options: WritingOptions,
    settings: Mapping[str, object],
    named_classes: NamedClasses,
    avoid: Sequence[str] = (),
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Fill a prompt file with a language model; resumes an earlier run.

    Args:
        output: the file; it is created with its folder. Its existing prompts are kept, count for
            the quota, and are not repeated.
        settings: all other values that the answers depend on (model, temperature, ...); written
            to the file.
        named_classes: which classes a prompt names.
        avoid: prompts of other files, not to be repeated.
        show: called after each round, and once before the first.

    Raises:
        ValueError: the file was started with other settings.
        NothingUsableError: `options.patience` consecutive rounds without a valid prompt.
    """
    file = PromptFile(output, _settings(options, settings, avoid))
    state = _State(options, file, named_classes, avoid)
    if not state.done():
        file.drop_incomplete_round()
        state = _State(options, file, named_classes, avoid)
    show(state.progress)
    idle_rounds = 0
    while not state.done():
        answers = _ask(model, options, state.progress)
        kept, finished = state.take(answers)
        if finished:
            file.append(kept, round_number=None)
            break
        file.append(kept, round_number=state.progress.rounds)
        state.progress.rounds += 1
        show(state.progress)
        idle_rounds = 0 if kept else idle_rounds + 1
        if idle_rounds >= options.patience:
            raise NothingUsableError(_failure_message(options, state.progress, answers))
    show(state.progress)
    return state.progress


def _settings(
    options: WritingOptions, settings: Mapping[str, object], avoid: Sequence[str]
) -> dict[str, object]:
    """All values that the prompts are a function of, apart from their number."""
    return {
        **settings,
        "seed": options.seed,
        "quota": options.quota,
        "batch_size": options.batch_size,
        "per_answer": options.per_answer,
        "similarity": options.similarity,
        "dense": options.dense or None,
        "classes": None if options.classes == CLASS_DESCRIPTIONS else dict(options.classes),
        "avoid": hashlib.sha256("\n".join(avoid).encode()).hexdigest()[:16] if avoid else None,
    }


# ---------------------------------------------------------------------- instructions
_PLACE_DESCRIPTIONS = (
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
_WEATHERS = ("clear, sunny or starry", "overcast", "rain or wet streets", "fog or haze", "snow")
_TIMES = ("by day", "at dusk or dawn", "at night")


def instruction(
    rng: np.random.Generator,
    per_answer: int,
    lacking: Mapping[str, int],
    classes: Mapping[str, str] = CLASS_DESCRIPTIONS,
    dense: bool = False,
) -> str:
    """The instruction for one answer.

    Args:
        rng: draws weather, time, place and region, and three of the lacking classes, or six of
            dense prompts, with probabilities proportional to the number of missing prompts.
        lacking: class -> number of missing prompts; if empty, all classes are equally likely.
        classes: class -> its description.
        dense: ask for prompts that name all of the place, the weather, the time and the classes.
    """
    names = list(classes if dense else lacking or classes)
    other = 0.1 if lacking else 1.0
    weights = np.array([lacking.get(name, other) for name in names], dtype=np.float64)
    share = weights / weights.sum()
    count = min(6 if dense else 3, len(names))
    chosen = rng.choice(len(names), size=count, replace=False, p=share)
    wanted = "; ".join(classes[names[i]] for i in chosen)
    weather = _WEATHERS[rng.integers(len(_WEATHERS))]
    time = _TIMES[rng.integers(len(_TIMES))]
    place = _PLACE_DESCRIPTIONS[rng.integers(len(_PLACE_DESCRIPTIONS))]
    region = _REGIONS[rng.integers(len(_REGIONS))]
    if dense:
        return (
            f"Write {per_answer} detailed descriptions of photographs of street scenes, seen from "
            "a car or at street level. Each is one sentence of 25 to 45 words on a line of its "
            "own, in English. Name concrete things that are in the image and where they are, "
            "never something that is absent. Vary the form of the sentences.\n"
            f"Every description names all of these: {wanted}.\n"
            f"Every description also names the place ({place} in {region}), the time of day "
            f"({time}) and the weather ({weather}).\n"
            f"Answer with the {per_answer} lines only, without numbers, titles or comments."
        )
    return (
        f"Write {per_answer} descriptions of photographs of street scenes, seen from a car or at "
        "street level. Each is one sentence of 15 to 35 words on a line of its own, in English. "
        "Name concrete things that are in the picture, never something that is absent. Vary the "
        "form of the sentences, the season and the viewpoint.\n"
        f"Every description must show: {wanted}.\n"
        f"Most of them: {place} in {region}, {time}, weather {weather}.\n"
        f"Answer with the {per_answer} lines only, without numbers, titles or comments."
    )


def _ask(model: ChatModel, options: WritingOptions, progress: Progress) -> list[str]:
    rng = np.random.default_rng([options.seed, progress.rounds])
    instructions = [
        instruction(rng, options.per_answer, progress.lacking, options.classes, options.dense)
        for _ in range(options.batch_size)
    ]
    answers = model.answer(instructions, seed=int(rng.integers(2**31)))
    assert len(answers) == len(instructions)
    return answers


# ---------------------------------------------------------------------- answers
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MARKER = re.compile(r"^(?:[-*•–—>#]+|\(?\d{1,3}\s*[.):]|\(?[a-zA-Z][.)](?=\s))\s*")
_QUOTES = "\"'“”‘’«»`*_ \t"
_SENTENCE_ENDS = (".", "!", "?", "…")
MIN_WORDS = 6
MIN_CLASSES = 2
MIN_CLASSES_DENSE = 4


def parse_answer(answer: str) -> list[str]:
    """The lines of an answer without numbers, bullets, quotes and thinking blocks."""
    lines = []
    for line in _THINKING.sub("", answer).splitlines():
        line = line.strip().strip(_QUOTES)
        line = _MARKER.sub("", line).strip(_QUOTES)
        line = re.sub(r"\s+", " ", line.replace("**", ""))
        if line:
            lines.append(line)
    return lines


def rejection_reason(
    line: str, named_classes: NamedClasses, min_classes: int = MIN_CLASSES
) -> str | None:
    """Why a line of an answer is not a valid prompt; None if it is valid.

    Args:
        line: without number and quotes.
        named_classes: the classes that it names.
        min_classes: smallest number of classes of a valid prompt.
    """
    if line.endswith(":"):
        return "heading"
    if not line.isprintable() or sum(c.isascii() and c.isalpha() for c in line) < 0.6 * len(line):
        return "not plain English"
    if len(line.split()) < MIN_WORDS:
        return "too short"
    if len(named_classes(line)) < min_classes:
        return "too few classes"
    # A token has at least one byte: a text of up to 75 bytes always fits.
    if len(line.encode()) > 75 and cut_by_clip(line):
        return "too long"
    return None


def _candidates(
    answers: Sequence[str], named_classes: NamedClasses, min_classes: int
) -> Iterator[tuple[str, str | None]]:
    """Each line of the answers with the reason to reject it, or None."""
    for answer in answers:
        lines = parse_answer(answer)
        for i, line in enumerate(lines):
            reason = rejection_reason(line, named_classes, min_classes)
            if reason is None and i == len(lines) - 1 and not line.endswith(_SENTENCE_ENDS):
                reason = "unfinished"  # the answer reached max_new_tokens
            yield line, reason


class _State:
    """The prompts so far, and the number that is still missing."""

    def __init__(
        self,
        options: WritingOptions,
        file: PromptFile,
        named_classes: NamedClasses,
        avoid: Sequence[str],
    ) -> None:
        self.options = options
        self.named_classes = named_classes
        self.known = [content_words(prompt) for prompt in (*avoid, *file.old, *file.new)]
        self.class_counts = Counter(c for p in (*file.old, *file.new) for c in named_classes(p))
        self.progress = Progress(written=len(file.new), rounds=file.rounds)
        self._update_lacking()

    def done(self) -> bool:
        return self.progress.written >= self.options.count and not self.progress.lacking

    def take(self, answers: Sequence[str]) -> tuple[list[str], bool]:
        """Returns the prompts to keep, and whether all that is needed has been written."""
        kept: list[str] = []
        candidates = _candidates(answers, self.named_classes, self.options.min_classes)
        for line, reason in candidates:
            if self.done():
                return kept, True
            words = content_words(line)
            if reason is None and self._is_known(words):
                reason = "repeated"
            classes = self.named_classes(line)
            if (
                reason is None
                and self.progress.written >= self.options.count
                and not classes & self.progress.lacking.keys()
            ):
                reason = "not of a lacking class"
            if reason is not None:
                self.progress.dropped[reason] += 1
                continue
            kept.append(line)
            self.known.append(words)
            self.class_counts.update(classes)
            self.progress.written += 1
            self._update_lacking()
        return kept, self.done()

    def _is_known(self, words: frozenset[str]) -> bool:
        threshold = self.options.similarity
        return any(len(words & old) >= threshold * len(words | old) for old in self.known)

    def _update_lacking(self) -> None:
        missing = {
            name: self.options.quota - self.class_counts[name] for name in self.options.classes
        }
        self.progress.lacking = {name: lack for name, lack in missing.items() if lack > 0}


def _failure_message(options: WritingOptions, progress: Progress, answers: Sequence[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in progress.dropped.most_common())
    missing = (
        f"{progress.written} of {options.count} prompts are written"
        if progress.written < options.count
        else f"still lacking: {', '.join(progress.lacking)}"
    )
    return (
        f"{options.patience} consecutive rounds gave no valid prompt ({missing}; dropped: "
        f"{reasons or 'nothing, the answers were empty'}). The last answer starts with "
        f"{answers[0][:80]!r}. Use an instruction-tuned model, another --temperature, or a lower "
        "--quota."
    )
