"""Words of English text: tokens, base forms, and the words that carry the content."""

from __future__ import annotations

import re
from functools import cache

STOP_WORDS = frozenset({
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "by", "to", "from", "with", "under",
    "over", "into", "as", "is", "are", "its", "it", "his", "her", "their", "this", "that", "photo",
    "picture", "image", "view", "scene",
})  # fmt: skip

_IRREGULAR_PLURALS = {
    "men": "man", "women": "woman", "children": "child", "policemen": "policeman",
    "policewomen": "policewoman", "fishermen": "fisherman", "businessmen": "businessman",
    "businesswomen": "businesswoman", "postmen": "postman", "gentlemen": "gentleman",
    "schoolchildren": "schoolchild", "busses": "bus", "leaves": "leaves",
}  # fmt: skip


def content_words(text: str) -> frozenset[str]:
    """The words of a text in lower case, plurals as singulars, without `STOP_WORDS`."""
    words = (base_forms(token)[-1] for token in tokenize(text) if token not in STOP_WORDS)
    return frozenset(word for word in words if word[0].isalnum())


def tokenize(text: str) -> list[str]:
    """Words in lower case and single punctuation marks; a hyphen separates two words."""
    text = text.lower().replace("’", "'")
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[,;.:!?()—–]", text)


@cache
def base_forms(token: str) -> tuple[str, ...]:
    """The token, followed by the words that it may be the plural or the genitive of."""
    forms = [token]
    if token in _IRREGULAR_PLURALS:
        forms.append(_IRREGULAR_PLURALS[token])
    elif token.endswith("'s"):
        forms.append(token[:-2])
    elif token.endswith("ies") and len(token) > 4:
        forms += [token[:-3] + "y", token[:-1]]
    elif token.endswith("s") and len(token) > 1 and not token.endswith(("ss", "us")):
        forms.append(token[:-1])
        if token.endswith(("ches", "shes", "xes", "sses", "zes", "buses")):
            forms.append(token[:-2])
    return tuple(forms)
