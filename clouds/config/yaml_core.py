"""PyYAML's safe loader with the scalars of YAML 1.2.

PyYAML follows YAML 1.1, in which 010 is 8, 1:30 is 90, `no` is False and 1e-5 is text. Under the
core schema of YAML 1.2.2 (section 10.3.2), used here, they are 10, text, text and a float. The
merge key `<<` of YAML 1.1 is kept.
"""

from __future__ import annotations

import re

import yaml

INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

# Tag, expression, first characters. The first expression that matches decides: every integer
# matches that of floats, too.
_SCALARS = (
    ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", ("n", "N", "~", "")),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (INT_TAG, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        FLOAT_TAG,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)

Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def _resolvers() -> Resolvers:
    """Tags and expressions by the first character of a scalar, as PyYAML wants them."""
    resolvers: Resolvers = {}
    for tag, expression, first_characters in _SCALARS:
        for character in first_characters:
            pattern = re.compile(rf"(?:{expression})\Z")
            resolvers.setdefault(character, []).append((tag, pattern))
    return resolvers


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Decimal, also with leading zeros; octal after 0o, hexadecimal after 0x."""
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class CoreLoader(yaml.SafeLoader):
    """SafeLoader under the core schema of YAML 1.2."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = yaml.SafeLoader.yaml_constructors | {INT_TAG: _construct_int}
