"""Reads the classes, weather, time of day and place in an English prompt, and what it excludes.

Matching is by whole words from the tables of `prompt_lexicon`, the longest phrase first ("bus
stop" is not a bus, "street lamp" is a pole and not a street), with plurals and simple negation ("no
cars", "without traffic lights", "an empty street"). There is no grammatical parsing. The renderer
renders these descriptions, and `coverage` counts them over a prompt file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, get_args

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.words import base_forms, tokenize
from street_renderer.prompt_lexicon import (
    ALSO_EXCLUDED,
    BUSTLE_WORDS,
    CLASS_WORDS,
    NEUTRAL,
    PLACE_HINTS,
    PLACE_WORDS,
    SEASON_HINTS,
    SEASON_WORDS,
    TIME_HINTS,
    TIME_WORDS,
    VIEWPOINT_WORDS,
    WEATHER_WORDS,
    Bustle,
    Season,
    Viewpoint,
)
from street_renderer.style import PLACES, TIMES, WEATHERS, Place, Time, Weather

NOT_NAMED = "not named"
"""Key of `coverage` for prompts without a value of a topic."""


@dataclass(frozen=True)
class SceneDescription:
    """The content of one prompt; None for topics that are not in it.

    Attributes:
        classes: names of the Cityscapes classes in the prompt.
        unwanted: class names that the prompt excludes ("no cars"); never road or sky, and never
            one of `classes`.
        weather, time, place: as in `street_renderer.style`. Dawn and dusk are both "dusk".
        season: of the year.
        viewpoint: from inside a car, from the sidewalk, from close to the ground, or from above.
        bustle: amount of traffic and people, quiet or busy.
    """

    classes: frozenset[str] = frozenset()
    unwanted: frozenset[str] = frozenset()
    weather: Weather | None = None
    time: Time | None = None
    place: Place | None = None
    season: Season | None = None
    viewpoint: Viewpoint | None = None
    bustle: Bustle | None = None


def parse_scene(text: str) -> SceneDescription:
    """Describe one prompt; words that are not in the lexicon are ignored."""
    tokens = tokenize(text)
    objects = _match(tokens, "class")
    negated = _negated(tokens, objects)
    named = {
        topic: [v for m in _match(tokens, topic) if m.start not in negated for v in m.values]
        for topic in _TOPICS
        if topic != "class"
    }
    objects, ridden = _split_riders(tokens, objects)
    classes = {v for m in objects if m.start not in negated for v in m.values}
    if any(m.start not in negated for m in ridden):
        classes.add("rider")
    unwanted = _excluded_classes(tokens, objects, negated)
    if unwanted.issuperset(_MOVING):
        named["bustle"].insert(0, "quiet")
    return SceneDescription(
        classes=frozenset(classes),
        unwanted=frozenset(unwanted - classes - {"road", "sky"}),
        weather=_first_in_order(named["weather"], _WEATHER_ORDER),
        time=_first_in_order(named["time"], _TIME_ORDER)
        or _first_in_order(named["time hint"], _TIME_ORDER),
        place=_first_named(named["place"] + named["place hint"], PLACES),
        season=_first_named(named["season"] + named["season hint"], _SEASONS),
        viewpoint=_first_named(named["viewpoint"], _VIEWPOINTS),
        bustle=_first_named(named["bustle"], _BUSTLES),
    )


def named_classes(text: str) -> frozenset[str]:
    """Names of the Cityscapes classes that a prompt names."""
    return parse_scene(text).classes


def coverage(prompts: Iterable[str]) -> dict[str, dict[str, int]]:
    """Number of prompts that name each class, weather, time of day and so on.

    Returns:
        Topic -> value -> number of prompts. The topics are "class" (all 19 names, in the order of
        their train ids; a prompt counts once for each class that it names) and the other fields
        of `SceneDescription`, where prompts without a value count as `NOT_NAMED`.
    """
    scenes = [parse_scene(prompt) for prompt in prompts]
    named = Counter(name for scene in scenes for name in scene.classes)
    counts = {"class": {name: named[name] for name in CITYSCAPES_19.names}}
    for topic, values in _COVERED_TOPICS.items():
        frequency = Counter(getattr(scene, topic) for scene in scenes)
        counts[topic] = {value: frequency[value] for value in values} | {NOT_NAMED: frequency[None]}
    return counts


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVING = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_WEATHER_ORDER: tuple[Weather, ...] = ("snow", "rain", "fog", "overcast", "clear")
_TIME_ORDER: tuple[Time, ...] = ("night", "dusk", "day")
_SEASONS: tuple[Season, ...] = get_args(Season)
_VIEWPOINTS: tuple[Viewpoint, ...] = get_args(Viewpoint)
_BUSTLES: tuple[Bustle, ...] = get_args(Bustle)
_COVERED_TOPICS: Mapping[str, tuple[str, ...]] = {
    "weather": WEATHERS,
    "time": TIMES,
    "place": PLACES,
    "season": _SEASONS,
    "viewpoint": _VIEWPOINTS,
    "bustle": _BUSTLES,
}


@dataclass(frozen=True)
class _Match:
    """A phrase of the lexicon at tokens start to end - 1, and its values (none if neutral)."""

    start: int
    end: int
    phrase: str
    values: tuple[str, ...]


_TOPICS: Mapping[str, Mapping[str, str]] = {
    "class": CLASS_WORDS,
    "weather": WEATHER_WORDS,
    "time": TIME_WORDS,
    "time hint": TIME_HINTS,
    "place": PLACE_WORDS,
    "place hint": PLACE_HINTS,
    "season": SEASON_WORDS,
    "season hint": SEASON_HINTS,
    "viewpoint": VIEWPOINT_WORDS,
    "bustle": BUSTLE_WORDS,
}

_Lexicon = dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]


@cache
def _lexicon(topic: str) -> _Lexicon:
    """First word -> (words, values) of the phrases that start with it, longest first."""
    values: dict[tuple[str, ...], tuple[str, ...]] = dict.fromkeys(_split(NEUTRAL), ())
    for value, phrases in _TOPICS[topic].items():
        for phrase in _split(phrases):
            values[phrase] = (*values.get(phrase, ()), value)
    lexicon: _Lexicon = {}
    for phrase in sorted(values, key=len, reverse=True):
        lexicon.setdefault(phrase[0], []).append((phrase, values[phrase]))
    return lexicon


def _split(phrases: str) -> Iterator[tuple[str, ...]]:
    for phrase in phrases.split(","):
        yield tuple(phrase.split())


def _match(tokens: list[str], topic: str) -> list[_Match]:
    """The phrases of one topic in the text, from left to right, the longest at each position."""
    matches = []
    start = 0
    while start < len(tokens):
        match = _longest(tokens, start, _lexicon(topic))
        if match is not None:
            matches.append(match)
        start = start + 1 if match is None else match.end
    return matches


def _longest(tokens: list[str], start: int, lexicon: _Lexicon) -> _Match | None:
    best: _Match | None = None
    for form in base_forms(tokens[start]):
        for words, values in lexicon.get(form, ()):
            end = start + len(words)
            if best is not None and end <= best.end:
                break
            if end <= len(tokens) and all(
                word in base_forms(token)
                for word, token in zip(words[1:], tokens[start + 1 : end], strict=True)
            ):
                best = _Match(start, end, " ".join(words), values)
                break
    return best


_DETERMINERS = _words("a an the any single one other of more many further")
_SCOPE_ENDS = _words(
    """but except with only just a an the two three four some several in on at under along beside
    beneath near behind over by from through past as while where when which that between around
    beyond after before is are . ; : ! ? ( ) — –"""
)


def _negated(tokens: list[str], objects: list[_Match]) -> set[int]:
    """Indices of the tokens in the scope of a negation.

    The scope of "no" ends at the next preposition, article or full stop. It includes words joined
    by "or" but not by "and" (that of "without": both), and crosses a comma only inside a list that
    ends with such a word.
    """
    inside = {i for match in objects for i in range(match.start, match.end)}
    negated: set[int] = set()
    for i, token in enumerate(tokens):
        following = tokens[i + 1] if i + 1 < len(tokens) else ""
        if i in inside or (token == "no" and following == "one"):
            continue
        if token in ("no", "nor", "neither") or (
            token in ("not", "never") and following in ("a", "any", "one")
        ):
            negated.update(_scope(tokens, i + 1, joins=("or", "nor")))
        elif token in ("without", "lacking") or (
            token in ("free", "devoid", "empty", "bare") and following == "of"
        ):
            negated.update(_scope(tokens, i + 1, joins=("or", "nor", "and")))
        elif token == "free":  # a car-free street
            negated.update(match.start for match in objects if match.end == i)
    return negated


def _scope(tokens: list[str], start: int, joins: tuple[str, ...]) -> Iterator[int]:
    """Token indices from `start` to the end of the negation's scope."""
    while start < len(tokens) and tokens[start] in _DETERMINERS:
        start += 1
    for i in range(start, len(tokens)):
        token = tokens[i]
        if token in _SCOPE_ENDS or (token == "and" and "and" not in joins):
            return
        if token == "," and not _list_continues(tokens, i + 1, joins):
            return
        yield i


def _list_continues(tokens: list[str], start: int, joins: tuple[str, ...]) -> bool:
    for token in tokens[start:]:
        if token in joins:
            return True
        if token in _SCOPE_ENDS or token in ("and", "no"):
            return False
    return False


_PARKED = _words("parked chained locked leaning propped row rows")
_MOVING_VERBS = _words(
    """weave weaving stream streaming buzz buzzing squeeze squeezing thread threading cut cutting
    flood flooding swarm swarming rush rushing filtering overtaking abreast"""
)
_RIDING = _words("riding rides ride rode pedals pedalling pedaling astride")


def _split_riders(tokens: list[str], objects: list[_Match]) -> tuple[list[_Match], list[_Match]]:
    """Find "a man on a bicycle", "riding a motorbike" and "scooters stream past".

    Returns:
        The matches without the persons who ride, and the two-wheelers that are ridden.
    """
    people = [match for match in objects if "person" in match.values]
    seated: list[_Match] = []
    ridden: list[_Match] = []
    for match in objects:
        if not {"bicycle", "motorcycle"} & set(match.values):
            continue
        if _MOVING_VERBS & set(tokens[match.end : match.end + 2]):
            ridden.append(match)
            continue
        clause = _clause_start(tokens, match.start)
        first = max(clause, match.start - 4)
        if _PARKED & set(tokens[first : match.start]):
            continue
        for i in range(match.start - 1, first - 1, -1):
            before = [p for p in people if max(clause, i - 6) <= p.start and p.end <= i]
            if tokens[i] in _RIDING or (tokens[i] == "on" and before):
                ridden.append(match)
                seated += [p for p in before if p.end == i]
                break
    return [match for match in objects if match not in seated], ridden


def _clause_start(tokens: list[str], end: int) -> int:
    """Index of the first token of the clause that contains token `end`."""
    for i in range(end - 1, -1, -1):
        if tokens[i] in ",;.:!?()—–":
            return i + 1
    return 0


_EMPTY = _words("empty deserted abandoned")
_OPEN_SPACES = _words("city town square downtown village neighbourhood neighborhood")


def _excluded_classes(tokens: list[str], objects: list[_Match], negated: set[int]) -> set[str]:
    """Classes that are negated, or excluded by "nobody" or by an empty street."""
    unwanted: set[str] = set()
    for match in objects:
        if match.start in negated:
            unwanted.update(ALSO_EXCLUDED.get(match.phrase, match.values))
    text = " ".join(tokens)
    if "nobody" in tokens or "no one" in text or "not a soul" in text:
        unwanted.update(ALSO_EXCLUDED["people"])
    if _street_is_empty(tokens, objects):
        unwanted.update(_MOVING)
    return unwanted


def _street_is_empty(tokens: list[str], objects: list[_Match]) -> bool:
    """Whether the text contains "an empty street", "the square is deserted" or similar."""
    spaces = {i for i, token in enumerate(tokens) if token in _OPEN_SPACES}
    for match in objects:
        if "road" in match.values:
            spaces.update(range(match.start, match.end))
    for i, token in enumerate(tokens):
        if token not in _EMPTY or tokens[i + 1 : i + 2] == ["of"]:
            continue
        if spaces & set(range(i + 1, i + 4)):
            return True
        predicate = tokens[max(i - 1, 0)] in ("is", "lies", "stands", "almost")
        if predicate and spaces & set(range(max(i - 4, 0), i)):
            return True
    return False


Value = TypeVar("Value", bound=str)


def _first_in_order(named: Iterable[str], order: tuple[Value, ...]) -> Value | None:
    """The first value of `order` that is among the named ones."""
    values = set(named)
    return next((value for value in order if value in values), None)


def _first_named(named: Iterable[str], allowed: tuple[Value, ...]) -> Value | None:
    """The first named value that is allowed."""
    return next((value for name in named for value in allowed if value == name), None)
