"""Prompt files: one prompt a line; what they cover, repeat and lose.

Blank lines, and lines that begin with '#', are no prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from clouds.data.label_space import CITYSCAPES_19
from clouds.generation.scene_lexicon import Bustle, Season, Viewpoint
from clouds.generation.scene_words import SceneWords, content_words, read_scene
from clouds.scenes.style import PLACES, TIMES, WEATHERS

__all__ = [
    "BANK",
    "CLIP_CONTEXT",
    "ClipLength",
    "Prompt",
    "SceneWords",
    "clip_tokens",
    "coverage",
    "cut_prompts",
    "near_duplicates",
    "over_long",
    "read_prompts",
    "read_scene",
]

BANK = Path(__file__).parents[2] / "prompts" / "street_scenes.txt"
"""The prompts that come with the project (in its repository)."""

CLIP_CONTEXT = 77
"""Tokens that CLIP's text encoder reads, its start and end marks among them."""


class Prompt(str):
    """The text of a prompt, which knows the line of its file that it stands on.

    Attributes:
        line: number of the line, from 1.
    """

    __slots__ = ("line",)
    line: int

    def __new__(cls, text: str, line: int) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.line = line
        return prompt

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        return (str(self), self.line)

    @property
    def text(self) -> str:
        """The prompt as a plain string."""
        return str(self)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order; repeated ones stay.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text in UTF-8, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"prompt file {path} {what}. A prompt file holds one prompt a line; the project's own "
            f"is {BANK}."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {path} is not text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    prompts = parse_prompts(lines)
    if not prompts:
        raise ValueError(
            f"prompt file {path} has no prompt in it ({len(lines)} lines, all of them blank or "
            f"comments). Write one prompt a line; {BANK} is an example."
        )
    return prompts


def parse_prompts(lines: Iterable[str]) -> list[Prompt]:
    """The prompts among the lines of a file; see the module."""
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [Prompt(line, number) for number, line in stripped if line and line[0] != "#"]


# ---------------------------------------------------------------------- coverage
NOT_SAID = "not said"
_TOPICS: dict[str, tuple[str, ...]] = {
    "weather": WEATHERS,
    "time": TIMES,
    "place": PLACES,
    "season": get_args(Season),
    "viewpoint": get_args(Viewpoint),
    "bustle": get_args(Bustle),
}


def coverage(prompts: Iterable[str]) -> dict[str, dict[str, int]]:
    """How many prompts name each class, weather, time and so on.

    Returns:
        Topic -> value -> number of prompts. The topics are "class" (all 19 names, in the order of
        their train ids; a prompt counts for each class that it names) and the other fields of
        `SceneWords`, with the prompts that say nothing about it under "not said".
    """
    scenes = [read_scene(prompt) for prompt in prompts]
    named = Counter(name for scene in scenes for name in scene.classes)
    counts = {"class": {name: named[name] for name in CITYSCAPES_19.names}}
    for topic, values in _TOPICS.items():
        said = Counter(getattr(scene, topic) for scene in scenes)
        counts[topic] = {value: said[value] for value in values} | {NOT_SAID: said[None]}
    return counts


# ---------------------------------------------------------------------- repetition
def near_duplicates(prompts: Sequence[str], threshold: float = 0.5) -> list[tuple[int, int, float]]:
    """Pairs of prompts that say nearly the same.

    Args:
        prompts: any number of them; memory grows with the pairs that share a word.
        threshold: 0 to 1, similarity from which a pair is reported. The similarity is that of
            `content_words`: words in both over words in either.

    Returns:
        (first, second, similarity) with positions first < second in `prompts`, the most similar
        pair first.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold is {threshold}; it must be above 0 and at most 1")
    from scipy import sparse

    words = [content_words(prompt) for prompt in prompts]
    numbers = {word: i for i, word in enumerate(sorted(frozenset().union(*words)))}
    if not numbers:
        return []
    rows = np.repeat(np.arange(len(words)), [len(w) for w in words])
    columns = np.array([numbers[word] for w in words for word in sorted(w)], dtype=np.int64)
    member = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(words), len(numbers))
    )
    shared = sparse.triu(member @ member.T, k=1).tocoo()
    sizes = np.array([len(w) for w in words], dtype=np.float64)
    similarity = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    pairs = [
        (int(shared.row[i]), int(shared.col[i]), float(similarity[i]))
        for i in np.flatnonzero(similarity >= threshold)
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))


# ---------------------------------------------------------------------- length
@dataclass(frozen=True)
class ClipLength:
    """How much of a text CLIP reads.

    Attributes:
        tokens: of the whole text, with the start and end marks.
        cut: the end of the text that is not read, from the first word that does not fit whole;
            empty where everything is read.
    """

    tokens: int
    cut: str


def clip_tokens(text: str, context_length: int = CLIP_CONTEXT) -> ClipLength:
    """Count a text in CLIP's tokens, and find what a text encoder of that length does not read."""
    encode = _clip_encoder()
    return _length(text, context_length, lambda part: len(encode(part)) + 2)


def over_long(prompts: Iterable[str], context_length: int = CLIP_CONTEXT) -> list[str]:
    """One warning for each prompt that CLIP does not read to its end."""
    found = []
    for number, prompt in enumerate(prompts, start=1):
        cut = clip_tokens(prompt, context_length).cut
        if cut:
            found.append(_warning(prompt, number, context_length, cut))
    return found


def cut_prompts(prompts: Iterable[str], tokenizers: Sequence[Any]) -> list[str]:
    """One warning for each prompt that no text encoder of a generator reads to its end.

    Args:
        tokenizers: of the transformers kind: `tokenizer(text)["input_ids"]` and
            `tokenizer.model_max_length`. Of several, the one that reads furthest decides.
    """
    limits = [int(min(tokenizer.model_max_length, 10**9)) for tokenizer in tokenizers]
    if not limits:
        return []
    limit = max(limits)
    tokenizer = tokenizers[limits.index(limit)]
    found = []
    for number, prompt in enumerate(prompts, start=1):
        cut = _length(str(prompt), limit, lambda part: len(tokenizer(part)["input_ids"])).cut
        if cut:
            found.append(_warning(prompt, number, limit, cut))
    return found


def _length(text: str, limit: int, count: Callable[[str], int]) -> ClipLength:
    """Compare a text with a limit; tokens never reach over a blank, so words are cut off whole."""
    tokens = count(text)
    if tokens <= limit:
        return ClipLength(tokens, "")
    words = text.split()
    low, high = 0, len(words)  # the first `low` words fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if count(" ".join(words[:middle])) <= limit:
            low = middle
        else:
            high = middle
    return ClipLength(tokens, " ".join(words[low:]))


def _warning(prompt: str, number: int, limit: int, cut: str) -> str:
    where = f"line {prompt.line}" if isinstance(prompt, Prompt) else f"prompt {number}"
    return f"{where}: tokens beyond {limit} are cut: {cut!r}"


@cache
def _clip_encoder() -> Callable[[str], list[int]]:
    """CLIP's own byte-pair encoding; its vocabulary comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    encode: Callable[[str], list[int]] = SimpleTokenizer().encode
    return encode
