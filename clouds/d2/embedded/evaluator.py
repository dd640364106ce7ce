"""The interface through which predictions become a score."""

from __future__ import annotations

from typing import Any


class DatasetEvaluator:
    """Sees every prediction on a dataset once, then gives the result."""

    def reset(self) -> None:
        """Forget everything seen; called before each round."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[Any]) -> None:
        """Take in one batch.

        Args:
            inputs: what the model was given.
            outputs: what it returned for them, in the same order.
        """

    def evaluate(self) -> dict[str, Any] | None:
        """Result over everything processed since `reset`: task name to its numbers."""
        return None
