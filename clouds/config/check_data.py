"""Conditions on the keys of datasets, label spaces and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from clouds.config.cross_checks import cross_check
from clouds.data.datasets import (
    Datasets,
    UnknownDatasetError,
    check_names_are_free,
    is_generated,
    read_descriptions,
)
from clouds.data.input_sizes import parse_sizes
from clouds.data.label_space import LabelSpace
from clouds.data.yaml_section import DescriptionError

TEXT_HEADS = ("text", "MultiScaleMaskedTransformerDecoder")


DATASET_KEYS = (
    "DATASETS.TRAIN",
    "DATASETS.DESCRIPTIONS",
    "DATASETS.LABEL_SPACE",
    "DATASETS.CLASS_MAP",
)
"""The values that the training label space, and the classes of all datasets, follow from."""


@cross_check("DATASETS.DESCRIPTIONS")
def descriptions_are_valid(descriptions: tuple[str, ...]) -> str | None:
    """The YAML files exist, and describe datasets."""
    try:
        read_descriptions(descriptions)
    except (FileNotFoundError, DescriptionError) as error:
        return str(error)
    return None


@cross_check(
    *DATASET_KEYS,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
    "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE",
    "MODEL.CLOUDS.GEOMETRIC_ENSEMBLE_EMA",
)
def label_space_is_known(*values: Any) -> str | None:
    """Datasets whose classes are not known are allowed where NUM_CLASSES suffices."""
    num_classes, head, *ensembles = values[len(DATASET_KEYS) :]
    datasets = _datasets(*values[: len(DATASET_KEYS)])
    if datasets is None:
        return None
    reason = _unknown_label_space(datasets)
    if reason is None:
        try:
            datasets.label_space  # noqa: B018
        except ValueError as error:
            return str(error)
        return _problem_of_mapping(datasets, datasets.labelled)
    if num_classes == 0:
        return (
            f"{reason}. The number of classes is derived from it unless "
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES is set"
        )
    if head in TEXT_HEADS or any(ensembles):
        return f"{reason}. The text classifier needs the class names of its label space"
    return None


@cross_check("MODEL.SEM_SEG_HEAD.NUM_CLASSES", *DATASET_KEYS)
def num_classes_are_those_of_the_label_space(num_classes: int, *values: Any) -> str | None:
    """Labels of the training data are ids of its label space."""
    expected = _training_label_space(*values)
    if num_classes == 0 or expected is None or num_classes == expected.num_classes:
        return None
    labelled = values[2] or ", ".join(name for name in values[0] if not is_generated(name))
    return (
        f"must be {expected.num_classes}, the number of classes of {labelled} in DATASETS.TRAIN, "
        "or 0"
    )


@cross_check("DATASETS.TEST", *DATASET_KEYS)
def test_data_has_classes_of_the_training_data(test: tuple[str, ...], *values: Any) -> str | None:
    """Labels are mapped to the training label space; unknown datasets are skipped."""
    if _training_label_space(*values) is None:
        return None
    return _problem_of_mapping(Datasets.of(*values), test)


@cross_check("DATASETS.CLASS_MAP", "DATASETS.TRAIN", "DATASETS.TEST")
def class_map_is_used(
    class_map: tuple[str, ...], train: tuple[str, ...], test: tuple[str, ...]
) -> str | None:
    """Each entry is about a dataset of the config."""
    for entry in class_map:
        pattern = entry.partition(":")[0].strip()
        if not any(fnmatchcase(name, pattern) for name in (*train, *test)):
            return (
                f"{entry!r} is about no dataset of DATASETS.TRAIN and DATASETS.TEST, which are "
                f"{', '.join((*train, *test))}"
            )
    return None


def _datasets(*values: Any) -> Datasets | None:
    """From the values of DATASET_KEYS; None if `descriptions_are_valid` has a problem with them."""
    try:
        return Datasets.of(*values)
    except (FileNotFoundError, DescriptionError):
        return None


def _training_label_space(*values: Any) -> LabelSpace | None:
    """From the values of DATASET_KEYS; None if it is not known, or other checks report why."""
    datasets = _datasets(*values)
    if datasets is None or _unknown_label_space(datasets) is not None:
        return None
    try:
        return datasets.label_space
    except ValueError:
        return None


def _problem_of_mapping(datasets: Datasets, names: Sequence[str]) -> str | None:
    """Why the classes of a dataset cannot be those of the training label space, if so."""
    for name in names:
        try:
            datasets.get(name)
        except UnknownDatasetError:
            continue  # reported when the data is listed, with what to do
        except ValueError as error:
            return str(error)
    return None


@cross_check("DATASETS.TRAIN", "DATASETS.TEST")
def dataset_names_are_free(train: tuple[str, ...], test: tuple[str, ...]) -> str | None:
    """A dataset that the user has registered has a name of its own."""
    try:
        check_names_are_free((*train, *test))
    except ValueError as error:
        return str(error)
    return None


def _unknown_label_space(datasets: Datasets) -> str | None:
    """Why the label space of the training data is not known; None if it is."""
    if datasets.label_space_name:
        return None
    if not datasets.train:
        return "no dataset is named"
    for name in datasets.train:
        try:
            datasets.own(name)
        except ValueError as error:
            return str(error)
    return None if datasets.labelled else "no labelled dataset is named"


@cross_check("INPUT.INITIAL_HEIGHT", "INPUT.INITIAL_WIDTH")
def initial_size_is_complete(height: int, width: int) -> str | None:
    """Height and width are set together."""
    if (height > 0) == (width > 0):
        return None
    return f"INPUT.INITIAL_WIDTH is {width}; both must be 0, or both above 0"


@cross_check("DATASETS.FACTORS", "DATASETS.TRAIN")
def there_is_a_factor_per_dataset(factors: tuple[float, ...], train: tuple[str, ...]) -> str | None:
    """Factors belong to the datasets by their order."""
    return _not_one_per_dataset(len(factors), train)


@cross_check("INPUT.INITIAL_SIZES", "DATASETS.TRAIN")
def there_is_a_size_per_dataset(
    sizes: tuple[tuple[int, int], ...], train: tuple[str, ...]
) -> str | None:
    """Sizes belong to the datasets by their order; generated images are not resized."""
    problem = _not_one_per_dataset(len(sizes), train)
    if problem is not None or not sizes:
        return problem
    if len(set(train)) < len(train):
        return f"DATASETS.TRAIN names a dataset twice: {', '.join(train)}. Name each once"
    resized = [
        name
        for name, size in zip(train, sizes, strict=True)
        if is_generated(name) and size != (0, 0)
    ]
    if resized:
        return f"generated images are not resized; write (0, 0) for {', '.join(resized)}"
    return None


def _not_one_per_dataset(count: int, train: tuple[str, ...]) -> str | None:
    """A message unless there are no values, or one per dataset."""
    if count in (0, len(train)):
        return None
    return (
        f"has {count} of {len(train)} values: DATASETS.TRAIN names {', '.join(train) or 'none'}. "
        "Give one value per dataset, in that order, or none, ()"
    )


@cross_check("TEST.LONG_SIDE_MAX", "TEST.SHORT_SIDE", "TEST.SLIDE.SHORT_SIDE")
def long_side_is_not_below_the_short_side(long_side: int, short: int, slide: int) -> str | None:
    """A limit below the short side would limit every image."""
    if long_side == 0 or long_side >= max(short, slide):
        return None
    return (
        f"TEST.SHORT_SIDE is {short} and TEST.SLIDE.SHORT_SIDE {slide}; allowed are 0, without a "
        f"limit, and numbers from {max(short, slide)}"
    )


@cross_check("TEST.INPUT_SIZES")
def input_sizes_can_be_read(entries: tuple[str, ...]) -> str | None:
    """A pattern of names, and two sides."""
    try:
        parse_sizes(entries)
    except ValueError as error:
        return str(error)
    return None


@cross_check("INPUT.SCALE_RANGE")
def scale_range_is_ordered(scales: tuple[float, float]) -> str | None:
    """Minimum first."""
    return None if scales[0] <= scales[1] else "the first number must not exceed the second"


@cross_check("INPUT.PHOTOMETRIC_DISTORTION", "INPUT.COLOR_AUG_SSD")
def there_is_one_color_augmentation(distortion: bool, jitter: bool) -> str | None:
    """Both do the same."""
    return "set INPUT.COLOR_AUG_SSD False, which it replaces" if distortion and jitter else None


@cross_check("INPUT.COLOR_AUG_ON_DEVICE", "INPUT.COLOR_AUG_SSD", "INPUT.CLASS_MIXING")
def jitter_on_the_device_is_possible(on_device: bool, jitter: bool, mixing: bool) -> str | None:
    """Classes are pasted by the loader, after the jitter of both images."""
    if on_device and not jitter:
        return "set INPUT.COLOR_AUG_SSD True: no other color augmentation runs on the device"
    if on_device and mixing:
        return "set it False: INPUT.CLASS_MIXING pastes images that the loader has jittered"
    return None


@cross_check("INPUT.LONG_SIDE_MAX", "INPUT.SHORT_SIDES")
def training_long_side_is_not_below_the_short_sides(
    limit: int, sides: tuple[int, ...]
) -> str | None:
    """A limit below the largest short side would change images of any ratio."""
    if limit == 0 or limit >= max(sides, default=0):
        return None
    return f"must be 0, or at least {max(sides)}, the largest of INPUT.SHORT_SIDES"


@cross_check("INPUT.SHORT_SIDES", "INPUT.INITIAL_HEIGHT", "INPUT.INITIAL_SIZES")
def there_is_one_working_size(
    sides: tuple[int, ...], height: int, sizes: tuple[Any, ...]
) -> str | None:
    """Short sides replace the size before random scaling."""
    if not sides or (height == 0 and not sizes):
        return None
    return (
        "replaces INPUT.INITIAL_HEIGHT, INPUT.INITIAL_WIDTH and INPUT.INITIAL_SIZES; set those to "
        "0, 0 and ()"
    )
