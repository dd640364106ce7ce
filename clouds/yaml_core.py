"""PyYAML's safe loader with the scalars of YAML 1.2.

PyYAML follows YAML 1.1, in which 010 is 8, 1:30 is 90, `no` is False and 1e-5 is text. Under the
core schema of YAML 1.2.2 (section 10.3.2), used here, they are 10, text, text and a float. The
merge key `<<` of YAML 1.1 is kept. The size of a document is bounded, also when aliases repeat
parts of it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

MAX_NODES = 100_000
"""Values, names, lists and mappings of a document, each alias counted as what it stands for."""

MAX_DEPTH = 50
"""Levels of lists and mappings within each other, also through aliases."""

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
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError as error:  # Python limits the number of digits
        problem = f"a number of {len(text)} digits is too long; at most 4300 are allowed"
        raise ConstructorError(None, None, problem, node.start_mark) from error


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader of documents of limited size, with aliases expanded.

    Raises:
        ComposerError: a document of more than MAX_NODES nodes or MAX_DEPTH levels with its aliases
            expanded, or an alias within what it stands for.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._composed = self._open_levels = 0
        # of the nodes that are complete, which the document keeps alive: nodes and levels
        self._extent: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; see the class for errors."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        self._composed += 1
        self._check(self._composed, self._open_levels + 1, mark)
        self._open_levels += 1
        node = super().compose_node(parent, index)
        self._open_levels -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._extent:
                problem = f"the alias *{event.anchor} is within what it stands for; write it out"
                raise ComposerError(None, None, problem, mark)
        else:
            nodes, levels = self._extent_of(node)
            self._extent[id(node)] = nodes, levels
            self._check(nodes, levels, mark)
        return node

    def _extent_of(self, node: yaml.Node | None) -> tuple[int, int]:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        extents = [self._extent[id(child)] for child in children]
        levels = max((levels for _, levels in extents), default=0)
        return 1 + sum(nodes for nodes, _ in extents), 1 + levels

    def _check(self, nodes: int, levels: int, mark: Any) -> None:
        problem = ""
        if nodes > MAX_NODES:
            problem = (
                f"{nodes} values with aliases expanded, but at most {MAX_NODES} are allowed; "
                "write out what is needed instead of aliases of aliases"
            )
        elif levels > MAX_DEPTH:
            problem = f"lists and mappings in more than {MAX_DEPTH} levels; use fewer"
        if problem:
            raise ComposerError(None, None, problem, mark)


class CoreLoader(BoundedLoader):
    """BoundedLoader under the core schema of YAML 1.2."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = yaml.SafeLoader.yaml_constructors | {INT_TAG: _construct_int}
