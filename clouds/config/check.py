"""Validation of a config: each value by the rule of its key, then values that depend on others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clouds.config import check_data, check_model  # noqa: F401 - they add their conditions
from clouds.config.config import get_value
from clouds.config.cross_checks import CROSS_CHECKS, cross_check
from clouds.config.defaults import KEYS
from clouds.config.values import coerce
from clouds.d2 import CfgNode
from clouds.device import resolve_device


class ConfigError(ValueError):
    """All problems of a config, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the configuration:", *problems]))


def problems(cfg: CfgNode, origins: Mapping[str, str] | None = None) -> list[str]:
    """All problems of `cfg`, one line each; empty when it is valid.

    Args:
        cfg: has every key of the table; its other keys are not checked.
        origins: where the value of a key is set (file and line), for the messages.
    """
    origins = origins or {}
    valid: dict[str, Any] = {}
    messages = []
    for key in KEYS:
        value = get_value(cfg, key.name)
        try:
            coerced = coerce(key, value)
        except ValueError as error:
            messages.append(describe(key.name, value, str(error), origins))
            continue
        if key.rule.is_valid(coerced):
            valid[key.name] = coerced
        else:
            message = f"allowed is {key.rule.description}"
            messages.append(describe(key.name, value, message, origins))
    for names, check in CROSS_CHECKS:
        # An invalid value is reported once, not again by each check that reads it.
        if valid.keys() >= set(names):
            problem = check(*(valid[name] for name in names))
            if problem is not None:
                messages.append(describe(names[0], valid[names[0]], problem, origins))
    return messages


def describe(name: str, value: Any, message: str, origins: Mapping[str, str]) -> str:
    """One line about one problem."""
    origin = f" ({origins[name]})" if name in origins else ""
    return f"{name} = {value!r}{origin}: {message}"


@cross_check("SOLVER.STEPS")
def steps_increase(steps: tuple[int, ...]) -> str | None:
    """Steps beyond the last iteration are allowed and have no effect."""
    if all(a < b for a, b in zip((0, *steps), steps, strict=False)):
        return None
    return "must be iterations above 0 in increasing order"


@cross_check("SOLVER.WEIGHT_AVERAGE.START_ITER", "SOLVER.WEIGHT_AVERAGE.ENABLED", "SOLVER.MAX_ITER")
def averaging_begins_in_training(start: int, enabled: bool, iterations: int) -> str | None:
    """Otherwise the average is a copy of the last weights."""
    if not enabled or start < max(iterations, 1):
        return None
    return f"must be below SOLVER.MAX_ITER, {iterations}: the weights would never be averaged"


@cross_check("SOLVER.BEST_ON", "DATASETS.TEST")
def there_is_data_to_be_best_on(best_on: str, test: tuple[str, ...]) -> str | None:
    """Weights are chosen by scores."""
    return "DATASETS.TEST is empty; name its datasets" if best_on == "test" and not test else None


@cross_check("MODEL.DEVICE")
def device_exists(device: str) -> str | None:
    """The device is supported and this machine has it."""
    try:
        resolve_device(device)
    except ValueError as error:
        return str(error)
    return None


@cross_check("SOLVER.AMP.DTYPE", "SOLVER.AMP.ENABLED", "MODEL.DEVICE")
def half_precision_has_a_gpu(dtype: str, enabled: bool, device: str) -> str | None:
    """The loss scaling that fp16 needs works on CUDA only."""
    return _needs_cuda(device, "'bf16'") if dtype == "fp16" and enabled else None


@cross_check("MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION", "MODEL.DEVICE")
def triton_has_a_gpu(implementation: str, device: str) -> str | None:
    """Triton compiles for CUDA only."""
    return _needs_cuda(device, "'auto' or 'torch'") if implementation == "triton" else None


def _needs_cuda(device: str, others: str) -> str | None:
    """A message if `device` is the CPU; None for an invalid one, which `device_exists` reports."""
    if device_exists(device) is not None or resolve_device(device).type == "cuda":
        return None
    return f"needs CUDA, and MODEL.DEVICE {device!r} is the CPU here; use {others}"
