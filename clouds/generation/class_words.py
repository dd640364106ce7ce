"""The classes of a label space that a prompt names, by the words of each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from clouds.data.label_space import LabelSpace
from clouds.generation.words import base_forms, tokenize


class ClassWords:
    """Finds the words of classes in prompts: whole words in this order, in any case.

    The last one may be a plural. A word also counts in another meaning ("street light" has the word
    "street"), and after "no" or "without".

    Args:
        label_space: its `synonyms` are the words.
    """

    def __init__(self, label_space: LabelSpace) -> None:
        self._phrases = {
            name: [phrase for word in words if (phrase := _phrase(word))]
            for name, words in zip(label_space.names, label_space.synonyms, strict=True)
        }

    def named_classes(self, text: str) -> frozenset[str]:
        """Names of the classes of which a prompt has a word."""
        tokens = tokenize(text)
        return frozenset(
            name
            for name, phrases in self._phrases.items()
            if any(_occurs(phrase, tokens) for phrase in phrases)
        )

    def coverage(self, prompts: Iterable[str]) -> dict[str, dict[str, int]]:
        """{"class": {name: number of prompts that name it}}, in the order of the classes."""
        counts = Counter(name for prompt in prompts for name in self.named_classes(prompt))
        return {"class": {name: counts[name] for name in self._phrases}}


def _phrase(word: str) -> list[str]:
    """The tokens of a word, without punctuation, such as that of "traffic sign (back)"."""
    return [token for token in tokenize(word) if token[0].isalnum()]


def _occurs(phrase: Sequence[str], tokens: Sequence[str]) -> bool:
    *first, last = phrase
    endings = {last, f"{last}s", f"{last}es"}
    return any(
        tokens[i - len(first) : i] == first
        and (tokens[i] in endings or last in base_forms(tokens[i]))
        for i in range(len(first), len(tokens))
    )


def request_of(label_space: LabelSpace) -> dict[str, str]:
    """Class -> its words, as an instruction to a language model names them."""
    return {
        name: " or ".join(words)
        for name, words in zip(label_space.names, label_space.synonyms, strict=True)
    }
