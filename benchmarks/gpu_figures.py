"""Figures of `gpu.py`: durations, the ceilings of the device, and floors that follow from both.

The floor of a computation is the time that its matrix products and convolutions take at the rate of
a large matrix product, or, where memory bounds it, that its least traffic takes at the rate of a
copy. Both rates are measured in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from clouds.files import atomic_write

sys.path.insert(0, str(Path(__file__).parent))
from in_turns import seconds_of

GIB = 2**30
MEASURED, SKIPPED, FAILED, TIMED_OUT = "measured", "skipped", "failed", "out of time"


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the device.

    Attributes:
        copy: GiB/s of a copy, bytes read and written.
        product: TFLOP/s of a large matrix product, by type: 'float32' (without TF32), 'bfloat16'.
    """

    copy: float
    product: dict[str, float]

    def floor(self, figure: Figure) -> float | None:
        """Seconds that the figure's counted work takes at least; None: nothing was counted."""
        times = []
        if figure.tflop:
            times.append(figure.tflop / self.product[figure.dtype])
        if figure.traffic_gib:
            times.append(figure.traffic_gib / self.copy)
        return max(times, default=None)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Durations of one implementation of one computation.

    Attributes:
        name: of the computation.
        way: of the implementation.
        seconds: of each round; processor time on a CPU.
        dtype: of the matrix products: 'float32' or 'bfloat16'.
        images: that it processes.
        tflop: counted, of matrix products and convolutions, as our implementation needs them.
        traffic_gib: bytes that it must read and write at least.
        peak_mib: peak memory of a round minus memory before it.
    """

    name: str
    way: str
    seconds: tuple[float, ...]
    dtype: str = "float32"
    images: int = 0
    tflop: float = 0.0
    traffic_gib: float = 0.0
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self, ceilings: Ceilings | None) -> dict[str, Any]:
        """The attributes, and what follows from them; None where it does not."""
        floor = None if ceilings is None else ceilings.floor(self)
        share = None
        if ceilings is not None and self.tflop:
            share = self.tflop / self.median / ceilings.product["bfloat16"]
        return {
            **dataclasses.asdict(self),
            "median_s": self.median,
            "images_per_second": self.images / self.median if self.images else None,
            "floor_s": floor,
            "times_floor": None if floor is None else self.median / floor,
            "share_of_bf16_product": share,
        }


@dataclasses.dataclass(frozen=True)
class Section:
    """Results of one section.

    Attributes:
        name: of the section.
        status: MEASURED, SKIPPED, FAILED or TIMED_OUT.
        figures: in the order of the table; ratios refer to the first `way` of the same `name`.
        notes: further numbers, by name.
        problem: why it was skipped or ended, or the traceback of the error.
        wall_s: duration of the section with all preparations, seconds.
    """

    name: str
    status: str = MEASURED
    figures: Sequence[Figure] = ()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""
    wall_s: float = 0.0

    def ratio(self, figure: Figure) -> float:
        """How many times as fast `figure` is as the first way of the same computation."""
        first = next(one for one in self.figures if one.name == figure.name)
        return first.median / figure.median


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio that is to be reached.

    Attributes:
        section, name, way: of a figure.
        value: what is required.
        of: 'speed' (the ratio to the first way), 'memory' (its peak over this one's) or 'share' (of
            the bf16 rate of a matrix product).
    """

    section: str
    name: str
    way: str
    value: float
    of: str = "speed"

    def measured(self, sections: Sequence[Section], ceilings: Ceilings | None) -> float | None:
        """The value that was reached; None: not measured."""
        for section in sections:
            for figure in section.figures if section.name == self.section else ():
                if (figure.name, figure.way) == (self.name, self.way):
                    return self._value(section, figure, ceilings)
        return None

    def _value(self, section: Section, figure: Figure, ceilings: Ceilings | None) -> float | None:
        if self.of == "speed":
            return section.ratio(figure)
        if self.of == "share":
            share: float | None = figure.to_dict(ceilings)["share_of_bf16_product"]
            return share
        first = next(one for one in section.figures if one.name == figure.name)
        if not first.peak_mib or not figure.peak_mib:
            return None
        return first.peak_mib / figure.peak_mib


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of a run.

    Attributes:
        machine: facts about hardware and software.
        sections: in the order of the run.
        goals: to compare them with.
        ceilings: of the device; None: not measured.
    """

    machine: dict[str, Any]
    sections: Sequence[Section]
    goals: Sequence[Goal]
    ceilings: Ceilings | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "machine": self.machine,
            "ceilings": None if self.ceilings is None else dataclasses.asdict(self.ceilings),
            "sections": [
                {
                    **{f: getattr(s, f) for f in ("name", "status", "problem", "wall_s", "notes")},
                    "figures": [
                        {**f.to_dict(self.ceilings), "ratio": s.ratio(f)} for f in s.figures
                    ],
                }
                for s in self.sections
            ],
            "goals": [
                {**dataclasses.asdict(g), "measured": g.measured(self.sections, self.ceilings)}
                for g in self.goals
            ],
        }

    def to_markdown(self) -> str:
        """The same as tables."""
        parts = ["# Figures of one run", table(["", ""], [[k, v] for k, v in self.machine.items()])]
        if self.ceilings is not None:
            rates = {f"matrix product, {k}, TFLOP/s": v for k, v in self.ceilings.product.items()}
            rates["copy, GiB/s"] = self.ceilings.copy
            parts += ["## Ceilings", table(["rate", ""], [[k, v] for k, v in rates.items()])]
        for section in self.sections:
            parts.append(f"## {section.name}")
            if section.status != MEASURED:
                reason = section.problem.strip().splitlines()[-1] if section.problem else ""
                parts.append(f"{section.status}: {reason}")
            if section.figures:
                parts.append(self._figures(section))
            if section.notes:
                rows = [[k, str(v)] for k, v in section.notes.items()]
                parts.append(table(["", ""], rows))
        if self.goals:
            parts += ["## Goals", self._goals()]
        return "\n\n".join(parts) + "\n"

    def _figures(self, section: Section) -> str:
        rows = []
        for figure in section.figures:
            values = figure.to_dict(self.ceilings)
            floor, share = values["floor_s"], values["share_of_bf16_product"]
            rows.append(
                [
                    *(figure.name, figure.way, 1e3 * figure.median),
                    f"{1e3 * min(figure.seconds):.4g} to {1e3 * max(figure.seconds):.4g}",
                    section.ratio(figure),
                    *(None if floor is None else 1e3 * floor, values["times_floor"]),
                    *(values["images_per_second"], None if share is None else f"{share:.1%}"),
                    figure.peak_mib,
                ]
            )
        head = ["", "way", "ms", "spread", "ratio", "floor, ms", "times floor", "images/s"]
        return table([*head, "of bf16 rate", "peak, MiB"], rows)

    def _goals(self) -> str:
        rows = []
        for goal in self.goals:
            value = goal.measured(self.sections, self.ceilings)
            reached = "not measured" if value is None else "yes" if value >= goal.value else "no"
            rows.append([goal.section, goal.name, goal.way, goal.of, goal.value, value, reached])
        return table(["section", "", "way", "of", "goal", "measured", "reached"], rows)

    def write(self, folder: Path) -> None:
        """Write gpu.json and gpu.md."""
        texts = {"gpu.json": json.dumps(self.to_dict(), indent=1), "gpu.md": self.to_markdown()}
        for name, text in texts.items():
            with atomic_write(folder / name, "w") as file:
                file.write(text)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    return tabulate(rows, head, tablefmt="github", floatfmt=".4g")


def measure_ceilings(device: torch.device, side: int, copied_gib: float, rounds: int) -> Ceilings:
    """The best of `rounds` copies, and of `rounds` products of square matrices of `side`."""

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds_of(call, device) for _ in range(rounds))

    source = torch.zeros(int(copied_gib * GIB), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    seconds = best(lambda: copy.copy_(source))
    product = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(side, side, device=device, dtype=getattr(torch, name))
        b, out = torch.randn_like(a), torch.empty_like(a)
        product[name] = 2 * side**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e12
    return Ceilings(2 * copied_gib / seconds, product)
