"""A record -> an evaluation sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clouds.data.mappers.pair import read_pair, to_tensor
from clouds.data.sample import EvalSample, Record

UInt8Array = npt.NDArray[np.uint8]

Prepare = Callable[[UInt8Array, "UInt8Array | None", str], "tuple[UInt8Array, UInt8Array | None]"]
"""What an evaluation protocol does to a picture: (image (H, W, 3) RGB, label (H, W) train ids or
None, name of the dataset) -> (image that the model gets, label that is scored)."""


@dataclass(frozen=True)
class EvaluationMapper:
    """Reads image and label, and lets the protocol prepare them.

    Attributes:
        prepare: the protocol's.
    """

    prepare: Prepare

    def __call__(self, record: Record) -> EvalSample:
        """The sample of one record; raises as `read_pair`."""
        image, label = read_pair(record)
        fed, scored = self.prepare(image, label, record.dataset)
        height, width = image.shape[:2] if scored is None else scored.shape
        sample: EvalSample = {
            "image": to_tensor(fed),
            "height": height,
            "width": width,
            "file_name": str(record.image),
            "domain": record.domain,
            "dataset": record.dataset,
        }
        if scored is not None:
            sample["label"] = to_tensor(scored)
        return sample
