"""Label spaces of one's own, for models with a text class head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clouds.data.label_space import IGNORE, LabelSpace, distinct_colors
from clouds.data.yaml_section import Color
from clouds.messages import repeated
from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.modeling.text_classifier import TextClassifier


def parse_classes(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Names of classes, from a list or from text separated by commas, without outer spaces.

    Raises:
        TypeError: other objects than text.
        ValueError: there is no name, an empty one, one that occurs twice (upper and lower case are
            the same), or more than 255.
    """
    words = classes.split(",") if isinstance(classes, str) else list(classes)
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"classes has {word!r}; allowed are names, e.g. 'road, dog'.")
    names = tuple(" ".join(word.split()) for word in words)
    if not any(names):
        raise ValueError(f"classes is {classes!r}; give at least one name, e.g. 'road, dog'.")
    if not all(names):
        raise ValueError(f"classes is {classes!r}, which has an empty name; remove it.")
    if twice := repeated(name.lower() for name in names):
        raise ValueError(
            f"classes names {', '.join(map(repr, twice))} more than once; name a class once."
        )
    if len(names) > IGNORE:
        raise ValueError(f"classes has {len(names)} names; allowed are at most {IGNORE}.")
    return names


def label_space_of(names: Sequence[str], known: LabelSpace | None = None) -> LabelSpace:
    """A label space of `names`.

    Args:
        names: of the classes, in the order of their train ids.
        known: a class with the same name in it keeps its color and its words; the only word of
            another class is its name.
    """
    kept: dict[str, tuple[Color, tuple[str, ...]]] = {}
    if known is not None:
        described = zip(known.names, known.colors, known.synonyms, strict=True)
        kept = {name.lower(): (color, words) for name, color, words in described}
    kept = {name: kept[name.lower()] for name in names if name.lower() in kept}
    new = iter(distinct_colors(len(names) - len(kept), [color for color, _ in kept.values()]))
    classes = [kept[name] if name in kept else (next(new), (name,)) for name in names]
    colors, words = zip(*classes, strict=True)
    return LabelSpace("own classes", tuple(names), tuple(colors), tuple(words))


def numbered_label_space(num_classes: int) -> LabelSpace:
    """Classes without known names: `class 0`, `class 1`, …"""
    return label_space_of([f"class {i}" for i in range(num_classes)])


def use_label_space(model: CLOUDS, label_space: LabelSpace) -> None:
    """Let a model with a text class head predict the classes of `label_space`, for inference.

    The geometric ensemble counts a class as seen in training if the model's label space has it.
    """
    before, ensemble = model.label_space, model.ensemble
    if ensemble is not None:
        seen = dict(zip(before.names if before else (), ensemble.seen, strict=False))
        in_lower_case = {name.lower(): value for name, value in seen.items()}
        flags = tuple(in_lower_case.get(name.lower(), False) for name in label_space.names)
        model.ensemble = replace(ensemble, seen=flags)
    model.label_space = label_space
    model.text_classifier = TextClassifier(label_space.synonyms)
