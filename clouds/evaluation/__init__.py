"""Evaluation of models on datasets: protocols, confusion matrices, pseudo-labels, reports."""

from __future__ import annotations

from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.evaluator import (
    SemSegEvaluator,
    check_test_data,
    evaluate,
    evaluate_dataset,
    evaluate_held_out,
)
from clouds.evaluation.protocols import build_protocol
from clouds.evaluation.report import DatasetResult, Results

__all__ = [
    "ConfusionMatrix",
    "DatasetResult",
    "Results",
    "SemSegEvaluator",
    "build_protocol",
    "check_test_data",
    "evaluate",
    "evaluate_dataset",
    "evaluate_held_out",
]
