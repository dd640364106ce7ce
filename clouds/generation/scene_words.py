"""What a sentence says about a street scene: classes, weather, time of day, place and more.

Plain word matching from one table, longest phrase first ("bus stop" names no bus, "street lamp"
is a pole and no street), with plurals and simple negation ("no cars", "without traffic lights",
"an empty street"). It measures what a prompt bank covers, and it tells the procedural generator
what to paint. It reads English, and it makes no attempt at grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, get_args

from clouds.generation.scene_lexicon import (
    ALSO_RULED_OUT,
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
from clouds.scenes.style import PLACES, Place, Time, Weather


@dataclass(frozen=True)
class SceneWords:
    """What one sentence asks for; None where it says nothing.

    Attributes:
        classes: names of the Cityscapes classes that the sentence names.
        unwanted: class names that it rules out ("no cars"); never road or sky, and never one
            of `classes`.
        weather, time, place: as in `clouds.scenes.style`. Dawn and dusk are one time, "dusk".
        season: time of the year.
        viewpoint: from inside a car, from the sidewalk, from close above the ground, or from
            above the street.
        bustle: whether it calls the street quiet or busy.
    """

    classes: frozenset[str] = frozenset()
    unwanted: frozenset[str] = frozenset()
    weather: Weather | None = None
    time: Time | None = None
    place: Place | None = None
    season: Season | None = None
    viewpoint: Viewpoint | None = None
    bustle: Bustle | None = None


def read_scene(text: str) -> SceneWords:
    """Read one sentence; words that are not in the tables are passed over."""
    tokens = _tokens(text)
    things = _match(tokens, "class")
    negated = _negated(tokens, things)
    said = {
        topic: [v for m in _match(tokens, topic) if m.start not in negated for v in m.values]
        for topic in _TOPICS
        if topic != "class"
    }
    things, riders = _split_riders(tokens, things)
    classes = {v for m in things if m.start not in negated for v in m.values}
    if any(m.start not in negated for m in riders):
        classes.add("rider")
    unwanted = _ruled_out(tokens, things, negated)
    if unwanted.issuperset(_MOVING):
        said["bustle"].insert(0, "quiet")
    return SceneWords(
        classes=frozenset(classes),
        unwanted=frozenset(unwanted - classes - {"road", "sky"}),
        weather=_strongest(said["weather"], _WEATHER_ORDER),
        time=_strongest(said["time"], _TIME_ORDER) or _strongest(said["time hint"], _TIME_ORDER),
        place=_first(said["place"] + said["place hint"], PLACES),
        season=_first(said["season"] + said["season hint"], _SEASONS),
        viewpoint=_first(said["viewpoint"], _VIEWPOINTS),
        bustle=_first(said["bustle"], _BUSTLES),
    )


def content_words(text: str) -> frozenset[str]:
    """The words that say what is seen: lower case, plurals as singulars, no articles and such."""
    words = (_forms(token)[-1] for token in _tokens(text) if token not in _EMPTY_WORDS)
    return frozenset(word for word in words if word[0].isalnum())


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVING = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_WEATHER_ORDER: tuple[Weather, ...] = ("snow", "rain", "fog", "overcast", "clear")
_TIME_ORDER: tuple[Time, ...] = ("night", "dusk", "day")
_SEASONS: tuple[Season, ...] = get_args(Season)
_VIEWPOINTS: tuple[Viewpoint, ...] = get_args(Viewpoint)
_BUSTLES: tuple[Bustle, ...] = get_args(Bustle)

_EMPTY_WORDS = _words(
    """a an the and or of in on at by to from with under over into as is are its it his her their
    this that photo picture image view scene"""
)

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "policemen": "policeman",
    "policewomen": "policewoman", "fishermen": "fisherman", "businessmen": "businessman",
    "businesswomen": "businesswoman", "postmen": "postman", "gentlemen": "gentleman",
    "schoolchildren": "schoolchild", "busses": "bus", "leaves": "leaves",
}  # fmt: skip


@dataclass(frozen=True)
class _Match:
    """A phrase of the table at tokens start..end-1, and the values it stands for.

    A neutral phrase has no value.
    """

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
    """First word -> (words, values) of the phrases that begin with it, the longest first."""
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


def _tokens(text: str) -> list[str]:
    """Lower-case words and single punctuation marks; a hyphen parts two words."""
    text = text.lower().replace("’", "'")
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[,;.:!?()—–]", text)


@cache
def _forms(token: str) -> tuple[str, ...]:
    """The token and what it may be the plural or the genitive of."""
    forms = [token]
    if token in _IRREGULAR:
        forms.append(_IRREGULAR[token])
    elif token.endswith("'s"):
        forms.append(token[:-2])
    elif token.endswith("ies") and len(token) > 4:
        forms += [token[:-3] + "y", token[:-1]]
    elif token.endswith("s") and not token.endswith(("ss", "us")):
        forms.append(token[:-1])
        if token.endswith(("ches", "shes", "xes", "sses", "zes", "buses")):
            forms.append(token[:-2])
    return tuple(forms)


def _match(tokens: list[str], topic: str) -> list[_Match]:
    """The phrases of one topic in the text, from the left, the longest at each place."""
    found = []
    start = 0
    while start < len(tokens):
        match = _longest(tokens, start, _lexicon(topic))
        if match is not None:
            found.append(match)
        start = start + 1 if match is None else match.end
    return found


def _longest(tokens: list[str], start: int, lexicon: _Lexicon) -> _Match | None:
    best: _Match | None = None
    for form in _forms(tokens[start]):
        for words, values in lexicon.get(form, ()):
            end = start + len(words)
            if best is not None and end <= best.end:
                break
            if end <= len(tokens) and all(
                word in _forms(token)
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


def _negated(tokens: list[str], things: list[_Match]) -> set[int]:
    """The tokens that a negation covers.

    "no" reaches to the next preposition, article or full stop; over "or" but not over "and"
    ("without" reaches over both), and over a comma only inside a list that such a word ends.
    """
    inside = {i for match in things for i in range(match.start, match.end)}
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
            negated.update(match.start for match in things if match.end == i)
    return negated


def _scope(tokens: list[str], start: int, joins: tuple[str, ...]) -> Iterator[int]:
    """Token numbers from `start` to the end of what is negated there."""
    while start < len(tokens) and tokens[start] in _DETERMINERS:
        start += 1
    for i in range(start, len(tokens)):
        token = tokens[i]
        if token in _SCOPE_ENDS or (token == "and" and "and" not in joins):
            return
        if token == "," and not _list_goes_on(tokens, i + 1, joins):
            return
        yield i


def _list_goes_on(tokens: list[str], start: int, joins: tuple[str, ...]) -> bool:
    for token in tokens[start:]:
        if token in joins:
            return True
        if token in _SCOPE_ENDS or token in ("and", "no"):
            return False
    return False


_PARKED = _words("parked chained locked leaning propped row rows")
_ON_THE_MOVE = _words(
    """weave weaving stream streaming buzz buzzing squeeze squeezing thread threading cut cutting
    flood flooding swarm swarming rush rushing filtering overtaking abreast"""
)
_RIDING = _words("riding rides ride rode pedals pedalling pedaling astride")


def _split_riders(tokens: list[str], things: list[_Match]) -> tuple[list[_Match], list[_Match]]:
    """Find "a man on a bicycle", "riding a motorbike" and "scooters stream past".

    Returns:
        The matches without the people who sit in a saddle, and the two-wheelers that are ridden.
    """
    people = [match for match in things if "person" in match.values]
    seated: list[_Match] = []
    ridden: list[_Match] = []
    for match in things:
        if not {"bicycle", "motorcycle"} & set(match.values):
            continue
        if _ON_THE_MOVE & set(tokens[match.end : match.end + 2]):
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
    return [match for match in things if match not in seated], ridden


def _clause_start(tokens: list[str], end: int) -> int:
    """Where the clause begins that token number `end` stands in."""
    for i in range(end - 1, -1, -1):
        if tokens[i] in ",;.:!?()—–":
            return i + 1
    return 0


_EMPTY = _words("empty deserted abandoned")
_OPEN_SPACES = _words("city town square downtown village neighbourhood neighborhood")


def _ruled_out(tokens: list[str], things: list[_Match], negated: set[int]) -> set[str]:
    """Classes that a negation covers, that nobody is there for, or that an empty street lacks."""
    unwanted: set[str] = set()
    for match in things:
        if match.start in negated:
            unwanted.update(ALSO_RULED_OUT.get(match.phrase, match.values))
    text = " ".join(tokens)
    if "nobody" in tokens or "no one" in text or "not a soul" in text:
        unwanted.update(ALSO_RULED_OUT["people"])
    if _street_is_empty(tokens, things):
        unwanted.update(_MOVING)
    return unwanted


def _street_is_empty(tokens: list[str], things: list[_Match]) -> bool:
    """Whether the text says "an empty street" or "the square is deserted"."""
    spaces = {i for i, token in enumerate(tokens) if token in _OPEN_SPACES}
    for match in things:
        if "road" in match.values:
            spaces.update(range(match.start, match.end))
    for i, token in enumerate(tokens):
        if token not in _EMPTY or tokens[i + 1 : i + 2] == ["of"]:
            continue
        if spaces & set(range(i + 1, i + 4)):
            return True
        said_of = tokens[max(i - 1, 0)] in ("is", "lies", "stands", "almost")
        if said_of and spaces & set(range(max(i - 4, 0), i)):
            return True
    return False


Value = TypeVar("Value", bound=str)


def _strongest(said: Iterable[str], order: tuple[Value, ...]) -> Value | None:
    """The first of `order` that was said at all."""
    values = set(said)
    return next((value for value in order if value in values), None)


def _first(said: Iterable[str], allowed: tuple[Value, ...]) -> Value | None:
    """What was said first."""
    return next((value for name in said for value in allowed if value == name), None)
