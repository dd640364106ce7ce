"""Prompt files, one prompt per line: reading, near-duplicates, and length in CLIP tokens.

Blank lines and lines that start with '#' are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clouds.generation.words import content_words
from clouds.resources import PROMPTS, find, near_names

DEFAULT_PROMPTS = "street_scenes"
"""Short name of the prompts that come with the package."""


CLIP_CONTEXT = 77
"""Context length of CLIP's text encoder in tokens, including start and end token."""


class Prompt(str):
    """A prompt with its position in the file.

    Attributes:
        line: line number, from 1.
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
    """Read the prompts of a file, in order, repeated ones included.

    Args:
        path: a file; one that does not exist may be the name of prompts that come with the
            package, such as 'street_scenes'.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text, or contains no prompt.
    """
    path = find(PROMPTS, path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        close = near_names(PROMPTS, path) or [DEFAULT_PROMPTS]
        raise FileNotFoundError(
            f"prompt file {path} {what}. A prompt file has one prompt per line; prompts of the "
            f"package have short names: {', '.join(close)}."
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
            f"comments). Write one prompt per line, as in {find(PROMPTS, DEFAULT_PROMPTS)}."
        )
    return prompts


def parse_prompts(lines: Iterable[str]) -> list[Prompt]:
    """The prompts among the lines of a file, without blank lines and comments."""
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [Prompt(line, number) for number, line in stripped if line and line[0] != "#"]


# ---------------------------------------------------------------------- repetition
def near_duplicates(prompts: Sequence[str], threshold: float = 0.5) -> list[tuple[int, int, float]]:
    """Find pairs of prompts with nearly the same words; memory grows with pairs that share a word.

    Args:
        prompts: the prompts.
        threshold: smallest similarity that is reported, in (0, 1]. The similarity is the
            intersection over union (Jaccard index) of the prompts' `content_words`.

    Returns:
        (first, second, similarity), indices first < second, the most similar pair first.
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
def cut_by_clip(text: str) -> str:
    """The part of a text beyond CLIP's context, from the first word that does not fit completely.

    It is empty if the text fits.
    """
    return _cut(text, CLIP_CONTEXT, _count_clip_tokens)


def over_long(prompts: Iterable[str]) -> list[str]:
    """One warning for each prompt that is longer than CLIP's context."""
    return _warnings(prompts, CLIP_CONTEXT, _count_clip_tokens)


def cut_prompts(
    prompts: Iterable[str], tokenizers: Sequence[Any], longest: int | None = None
) -> list[str]:
    """One warning for each prompt that is too long for all text encoders of a generator.

    Args:
        tokenizers: of the transformers kind: `tokenizer(text)["input_ids"]` and
            `tokenizer.model_max_length`. The one with the longest context is used.
        longest: number of tokens that the generator reads at most, if any.
    """
    longest = 10**9 if longest is None else longest
    limits = [int(min(tokenizer.model_max_length, longest)) for tokenizer in tokenizers]
    if not limits:
        return []
    limit = max(limits)
    tokenizer = tokenizers[limits.index(limit)]
    return _warnings(prompts, limit, lambda text: len(tokenizer(text)["input_ids"]))


def _warnings(prompts: Iterable[str], limit: int, count: Callable[[str], int]) -> list[str]:
    warnings = []
    for number, prompt in enumerate(prompts, start=1):
        cut = _cut(str(prompt), limit, count)
        if cut:
            where = f"line {prompt.line}" if isinstance(prompt, Prompt) else f"prompt {number}"
            warnings.append(f"{where}: tokens beyond {limit} are cut: {cut!r}")
    return warnings


def _cut(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The words beyond `limit` tokens. No token contains a space."""
    if count(text) <= limit:
        return ""
    words = text.split()
    low, high = 0, len(words)  # the first `low` words fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if count(" ".join(words[:middle])) <= limit:
            low = middle
        else:
            high = middle
    return " ".join(words[low:])


def _count_clip_tokens(text: str) -> int:
    return len(_clip_encoder()(text)) + 2  # with start and end token


@cache
def _clip_encoder() -> Callable[[str], list[int]]:
    """CLIP's byte-pair encoding, with the vocabulary that is part of open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    encode: Callable[[str], list[int]] = SimpleTokenizer().encode
    return encode
