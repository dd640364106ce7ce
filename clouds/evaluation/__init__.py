"""Scoring a model on datasets.

confusion    counts of labelled against predicted classes
protocols    at which size an image is fed and its prediction scored
evaluator    a model over datasets, on one process or several
report       the numbers, as a table and as results.json
"""

from __future__ import annotations

from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.evaluator import SemSegEvaluator, evaluate, evaluate_dataset
from clouds.evaluation.protocols import PROTOCOLS, Protocol, build_protocol
from clouds.evaluation.report import DatasetResult, Results

__all__ = [
    "PROTOCOLS",
    "ConfusionMatrix",
    "DatasetResult",
    "Protocol",
    "Results",
    "SemSegEvaluator",
    "build_protocol",
    "evaluate",
    "evaluate_dataset",
]
