"""Means over the corruptions and severities of Cityscapes-C."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from clouds.data.corruption import COMMON, SEVERITIES
from clouds.data.datasets.builtin import CORRUPTED, CORRUPTED_PREFIX

Key = tuple[str, int]
"""A corruption and its severity."""


@dataclass(frozen=True)
class CorruptionScores:
    """mIoU, percent, of corrupted images.

    Attributes:
        miou: by corruption and severity.
        clean: of the images without corruption; None: not evaluated.
    """

    miou: Mapping[Key, float]
    clean: float | None = None

    @classmethod
    def of(cls, miou: Mapping[str, float]) -> CorruptionScores | None:
        """Those among the mIoU of datasets by name; None: there are none."""
        found = {
            key_of(name): value for name, value in miou.items() if name.startswith(CORRUPTED_PREFIX)
        }
        return cls(found, miou.get(CORRUPTED)) if found else None

    @property
    def names(self) -> list[str]:
        """The corruptions, in the order of their evaluation."""
        return list(dict.fromkeys(name for name, _ in self.miou))

    def of_corruption(self, name: str) -> float:
        """Mean over the severities that were evaluated."""
        return statistics.fmean(v for (other, _), v in self.miou.items() if other == name)

    def of_severity(self, severity: int) -> float:
        """Mean over the corruptions that were evaluated with it; nan: none were."""
        values = [value for (_, other), value in self.miou.items() if other == severity]
        return statistics.fmean(values) if values else math.nan

    @property
    def mean(self) -> float:
        """Mean of the means of corruptions."""
        return statistics.fmean(self.of_corruption(name) for name in self.names)

    @property
    def retention(self) -> float:
        """`mean` in percent of `clean`; nan if that is not known."""
        return 100 * self.mean / self.clean if self.clean else math.nan

    def missing(self) -> list[str]:
        """Of the common corruptions, names of the datasets that were not evaluated."""
        wanted = ((name, severity) for name in COMMON for severity in SEVERITIES)
        return [f"{CORRUPTED_PREFIX}{n}_{s}" for n, s in wanted if (n, s) not in self.miou]

    def mean_error(self, reference: CorruptionScores) -> float:
        """mCE, percent: the mean over corruptions of the error relative to another model's.

        The error of a corruption is the sum over its severities of 100 - mIoU (Hendrycks and
        Dietterich, 2019, with 100 - mIoU in place of the error of classification).

        Raises:
            ValueError: the other model was evaluated on other corruptions.
        """
        if self.miou.keys() != reference.miou.keys():
            differing = sorted(self.miou.keys() ^ reference.miou.keys())
            raise ValueError(
                f"the corruptions of the two models differ: {differing[0][0]} of severity "
                f"{differing[0][1]} has a score of one of them only"
            )
        return 100 * statistics.fmean(
            _error(self, name) / _error(reference, name) for name in self.names
        )

    def table(self) -> str:
        """Corruptions as rows, severities as columns."""
        severities = sorted({severity for _, severity in self.miou})
        rows = [
            [
                name,
                *(_percent(self.miou.get((name, severity))) for severity in severities),
                _percent(self.of_corruption(name)),
            ]
            for name in self.names
        ]
        rows.append(["mean", *(_percent(self.of_severity(s)) for s in severities)])
        rows[-1].append(_percent(self.mean))
        text = tabulate(
            rows,
            ["corruption: mIoU in %", *map(str, severities), "mean"],
            "simple",
            stralign="right",
            disable_numparse=True,
            colalign=("left",),
        )
        if self.clean is None:
            return text
        return (
            f"{text}\nWithout corruption {_percent(self.clean)}; of that {_percent(self.retention)}"
            " % remain in the mean."
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        by_severity = {str(s): self.of_severity(s) for s in sorted({s for _, s in self.miou})}
        return {
            "mIoU": self.mean,
            "clean-mIoU": self.clean,
            "retention": self.retention,
            "by-corruption": {name: self.of_corruption(name) for name in self.names},
            "by-severity": by_severity,
            "missing": self.missing(),
        }


def key_of(name: str) -> Key:
    """Corruption and severity of a dataset `cityscapes_c_<corruption>_<severity>`."""
    corruption, _, severity = name.removeprefix(CORRUPTED_PREFIX).rpartition("_")
    return corruption, int(severity)


def _error(scores: CorruptionScores, name: str) -> float:
    values: Iterable[float] = (v for (other, _), v in scores.miou.items() if other == name)
    return sum(100 - value for value in values)


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"
