"""From a dataset record to a sample: reading, augmentation, conversion to tensors.

One mapper per dataset role, with augmentations of the functions `build_*_augmentations`. Another
`Augmentation`, here RandomGamma, is added there, or by a mapper of one's own:

    augmentations = (*build_source_augmentations(cfg).augmentations, RandomGamma())
    mapper = SourceMapper(AugmentationList(augmentations))
    build_train_loader(cfg, mappers={Domain.SOURCE: mapper})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from fvcore.transforms.transform import TransformList

from clouds.data.augmentation import (
    Augmentation,
    AugmentationList,
    ColorJitterTransform,
    RandomFlip,
    ResizeCropFlip,
    Size,
    SSDColorJitter,
)
from clouds.data.labels import read_train_ids
from clouds.data.photometric import PhotoMetricDistortion
from clouds.data.rare_class_sampling import MAX_CROPS, RareClassSampling
from clouds.data.reading import is_one_color, read_image
from clouds.data.structures import (
    Draw,
    EvalSample,
    GeneratedSample,
    GivenLabelSample,
    JitterInput,
    ModelInput,
    Record,
    SourceSample,
    sample_rng,
)
from clouds.messages import format_examples

if TYPE_CHECKING:
    from clouds.d2 import CfgNode

UInt8Array = npt.NDArray[np.uint8]


def build_source_augmentations(cfg: CfgNode, dataset: str = "") -> AugmentationList:
    """Augmentations of labelled source images, by INPUT: geometry, then color.

    Args:
        cfg: the config.
        dataset: a name in DATASETS.TRAIN, needed if INPUT.INITIAL_SIZES has a size for each.

    Raises:
        ValueError: there is a size for each dataset, but none for `dataset`.
    """
    keys = cfg.INPUT
    augmentations: list[Augmentation] = [
        ResizeCropFlip(
            working_size=_working_size(cfg, dataset),
            scale_range=tuple(keys.SCALE_RANGE),
            crop_size=tuple(keys.CROP.SIZE),
            position=keys.CROP.POSITION,
            flip=keys.FLIP,
            short_sides=tuple(keys.SHORT_SIDES),
            long_side_max=keys.LONG_SIDE_MAX,
            cat_max_ratio=keys.CROP.CAT_MAX_RATIO,
            pad=padded_crop_size(cfg) == (0, 0),
        )
    ]
    return AugmentationList((*augmentations, *_color_augmentations(cfg)))


def padded_crop_size(cfg: CfgNode) -> Size:
    """Size to which the model pads smaller training images; (0, 0): augmentation pads them."""
    height, width = cfg.INPUT.CROP.SIZE
    return (height, width) if cfg.INPUT.CROP.PADDING == "mean" else (0, 0)


def _color_augmentations(cfg: CfgNode) -> tuple[Augmentation, ...]:
    if cfg.INPUT.PHOTOMETRIC_DISTORTION:
        return (PhotoMetricDistortion(),)
    if not cfg.INPUT.COLOR_AUG_SSD:
        return ()
    return (SSDColorJitter(on_device=cfg.INPUT.COLOR_AUG_ON_DEVICE),)


def _working_size(cfg: CfgNode, dataset: str) -> Size:
    sizes = cfg.INPUT.INITIAL_SIZES
    if not sizes:
        return cfg.INPUT.INITIAL_HEIGHT, cfg.INPUT.INITIAL_WIDTH
    by_name = dict(zip(cfg.DATASETS.TRAIN, sizes, strict=True))
    if dataset not in by_name:
        raise ValueError(
            f"INPUT.INITIAL_SIZES has a size for each dataset, but none for {dataset!r}; allowed "
            f"are {', '.join(by_name)}: pass the name to build_source_augmentations"
        )
    height, width = by_name[dataset]
    return height, width


def build_generated_augmentations(cfg: CfgNode) -> AugmentationList:
    """Augmentations of generated images for teacher and student, by INPUT: a random flip."""
    return AugmentationList((RandomFlip(),) if cfg.INPUT.FLIP else ())


def build_student_augmentations(cfg: CfgNode) -> AugmentationList:
    """Further augmentations of the student's view of a generated image, by INPUT: color.

    They must not move pixels, since the pseudo-label is that of the teacher's view.
    """
    return AugmentationList(_color_augmentations(cfg))


def read_record_image(record: Record) -> UInt8Array:
    """Read the image of a record, (H, W, 3) RGB, and corrupt it if its dataset says so.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is broken, or too small to be corrupted.
        ImportError: the package that corrupts it is missing.
    """
    image = read_image(record.image)
    if record.corruption is None:
        return image
    try:
        return record.corruption(image)
    except ValueError as error:
        raise ValueError(f"{record.image}: {error}") from error


def read_image_and_label(record: Record) -> tuple[UInt8Array, UInt8Array | None]:
    """Read the image (H, W, 3) RGB and the label (H, W) as train ids, None if there is none.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is broken, or the sizes of label and image differ.

    It also raises as `read_record_image`.
    """
    image = read_record_image(record)
    if record.label is None:
        return image, None
    assert record.label_format is not None  # checked by Record
    label = read_train_ids(record.label, record.label_format, record.dataset)
    if label.shape != image.shape[:2]:
        raise ValueError(
            f"{record.label}: the label is {label.shape[1]}x{label.shape[0]} pixels, but its "
            f"image {record.image} is {image.shape[1]}x{image.shape[0]}. One of them is not the "
            "dataset's own; `clouds check-data --full` lists every such pair."
        )
    return image, label


def to_tensor(pixels: UInt8Array) -> torch.Tensor:
    """Image (H, W, 3) -> (3, H, W), label (H, W) -> (H, W); contiguous uint8 tensor."""
    if pixels.ndim == 3:
        pixels = pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _model_input(
    record: Record,
    image: torch.Tensor,
    size: tuple[int, ...],
    transforms: TransformList | None = None,
) -> ModelInput:
    """`transforms`: of the image, of which a color jitter may be left to the model."""
    found: JitterInput = {}
    for one in transforms.transforms if transforms is not None else ():
        if isinstance(one, ColorJitterTransform) and one.on_device:
            found = {"color_jitter": one}
    return {
        **found,
        "image": image,
        "height": size[0],
        "width": size[1],
        "file_name": str(record.image),
        "domain": record.domain,
        "dataset": record.dataset,
    }


@dataclass(frozen=True)
class SourceMapper:
    """Reads a labelled image and augments image and label.

    Attributes:
        augmentations: of the images of all datasets, or by dataset name.
        rare_classes: names a class of which the crop should have pixels; None: no class.
    """

    augmentations: AugmentationList | Mapping[str, AugmentationList]
    rare_classes: RareClassSampling | None = None

    @classmethod
    def from_config(
        cls, cfg: CfgNode, rare_classes: RareClassSampling | None = None
    ) -> SourceMapper:
        """With the augmentations of INPUT."""
        if not cfg.INPUT.INITIAL_SIZES:
            return cls(build_source_augmentations(cfg), rare_classes)
        by_name = {name: build_source_augmentations(cfg, name) for name in cfg.DATASETS.TRAIN}
        return cls(by_name, rare_classes)

    def __call__(self, record: Record, seed: int) -> SourceSample:
        """The sample of a record and a seed in [0, 2**63).

        Raises:
            ValueError: there is no label; or as `read_image_and_label`.
        """
        image, label = read_image_and_label(record)
        if label is None:
            raise ValueError(f"{record.image} has no label, so it cannot be a source of training")
        augmentations = self.augmentations
        if not isinstance(augmentations, AugmentationList):
            augmentations = augmentations[record.dataset]
        augmented, transforms = augmentations(image, np.random.default_rng(seed), label)
        augmented_label = transforms.apply_segmentation(label)
        if self.rare_classes is not None:
            wanted = self.rare_classes.draw_class(record.dataset, seed)
            for number in range(1, MAX_CROPS):
                if np.sum(augmented_label == wanted) >= self.rare_classes.min_crop_pixels:
                    break
                rng = sample_rng(seed, Draw.RARE_CLASS_CROP, number)
                augmented, transforms = augmentations(image, rng, label)
                augmented_label = transforms.apply_segmentation(label)
        return {
            **_model_input(record, to_tensor(augmented), label.shape, transforms),
            "sem_seg": to_tensor(augmented_label),
            "seed": seed,
        }


@dataclass(frozen=True)
class GeneratedMapper:
    """Reads a generated image and makes a clean view for the teacher and one for the student.

    Attributes:
        augmentations: of both views.
        student_augmentations: of the student's view, after `augmentations`.
        labels: MODEL.CLOUDS.GENERATED_LABELS. With 'given' the label that the image was generated
            for is read in place of the clean view, with 'filtered' in addition to it. With
            'teacher' a label, which some folders have to measure pseudo-labels, is not read.
    """

    augmentations: AugmentationList
    student_augmentations: AugmentationList
    labels: str = "teacher"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> GeneratedMapper:
        """With the augmentations of INPUT, and labels by MODEL.CLOUDS.GENERATED_LABELS."""
        return cls(
            build_generated_augmentations(cfg),
            build_student_augmentations(cfg),
            cfg.MODEL.CLOUDS.GENERATED_LABELS,
        )

    def __call__(self, record: Record, seed: int) -> GeneratedSample | SourceSample:
        """The sample of a record and a seed in [0, 2**63).

        Raises:
            ValueError: a label is read, and there is none, or one of another size.

        It also raises as `read_generated_image`.
        """
        image = read_generated_image(record)
        rng = np.random.default_rng(seed)
        # drawn first, so that the clean view does not depend on the student's augmentations
        clean, transforms = self.augmentations(image, rng)
        student, colors = self.student_augmentations(clean, rng)
        label = None
        if self.labels != "teacher":
            given = read_given_label(record, image.shape[:2])
            label = to_tensor(transforms.apply_segmentation(given))
        if label is not None and self.labels == "given":
            model_input = _model_input(record, to_tensor(student), image.shape, colors)
            return {**model_input, "sem_seg": label, "seed": seed}
        clean_image = to_tensor(clean)
        sample: GeneratedSample = {
            **_model_input(
                record,
                clean_image if student is clean else to_tensor(student),
                image.shape,
                colors,
            ),
            "clean_image": clean_image,
            "seed": seed,
        }
        if label is None:
            return sample
        return cast("GivenLabelSample", {**sample, "given_label": label})


def trains_on_given_labels(cfg: CfgNode) -> bool:
    """Whether generated images are trained on their labels in place of the teacher's."""
    return str(cfg.MODEL.CLOUDS.GENERATED_LABELS) != "teacher"


def check_given_labels(records: Sequence[Record], given: bool) -> None:
    """Raise ValueError if images of a dataset have no label although labels are `given`."""
    unlabelled = [record.image for record in records if record.label is None]
    if given and unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(records)} images of {records[0].dataset} have no label in "
            f"the label space of the training: {format_examples(unlabelled)}. Generate images for "
            "labels (`clouds generate --condition`), or set MODEL.CLOUDS.GENERATED_LABELS teacher."
        )


def read_given_label(record: Record, size: tuple[int, ...]) -> UInt8Array:
    """Read the label that a generated image of `size` was generated for, (H, W) train ids.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: there is no label, or it is broken or of another size.
    """
    if record.label is None:
        raise ValueError(
            f"{record.image} of {record.dataset} has no label. "
            "MODEL.CLOUDS.GENERATED_LABELS teacher needs none."
        )
    assert record.label_format is not None  # checked by Record
    label = read_train_ids(record.label, record.label_format, record.dataset)
    if label.shape != size:
        raise ValueError(
            f"{record.label}: the label is {label.shape[1]}x{label.shape[0]} pixels, but its "
            f"generated image is {size[1]}x{size[0]}. {_GENERATE_AGAIN}"
        )
    return label


_GENERATE_AGAIN = (
    "Delete it and run `clouds generate` again with the same options: it generates the "
    "missing images."
)


def read_generated_image(record: Record) -> UInt8Array:
    """Read a generated image, (H, W, 3) RGB.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is broken, of another size than in its manifest, or of one color.
    """
    try:
        image = read_image(record.image)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{record.image}: this image of {record.dataset} was removed after training began. "
            "Run `clouds generate` again with the same options, then resume training with "
            "--resume."
        ) from error
    except ValueError as error:
        raise ValueError(f"{error} This is a generated image. {_GENERATE_AGAIN}") from error
    size = image.shape[:2]
    expected = record.manifest_size or size
    if size != expected:
        raise ValueError(
            f"{record.image}: the image is {size[1]}x{size[0]} pixels, but {expected[1]}x"
            f"{expected[0]} in the manifest of {record.dataset}. {_GENERATE_AGAIN}"
        )
    if is_one_color(image):
        raise ValueError(
            f"{record.image}: all pixels of this generated image have the color "
            f"{tuple(image[0, 0].tolist())} (RGB): a safety checker has replaced it, or numbers "
            f"have overflowed in half precision. {_GENERATE_AGAIN}"
        )
    return image


Prepare = Callable[[UInt8Array, "UInt8Array | None", str], "tuple[UInt8Array, UInt8Array | None]"]
"""Preparation of an image by an evaluation protocol: (image (H, W, 3) RGB, label (H, W) train ids
or None, name of the dataset) -> (input of the model, label that is scored)."""


@dataclass(frozen=True)
class EvaluationMapper:
    """Reads image and label and prepares them by the evaluation protocol."""

    prepare: Prepare

    def __call__(self, record: Record) -> EvalSample:
        """The sample of one record; raises as `read_image_and_label`."""
        image, label = read_image_and_label(record)
        model_input, scored = self.prepare(image, label, record.dataset)
        size = image.shape if scored is None else scored.shape
        sample = _model_input(record, to_tensor(model_input), size)
        if scored is None:
            return cast("EvalSample", sample)
        return {**sample, "label": to_tensor(scored)}
