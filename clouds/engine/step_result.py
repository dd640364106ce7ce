"""Results of an iteration, whose copy to the host may be under way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from clouds import comm


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradient is NaN or infinite; the weights are those before the iteration."""


class HostCopy:
    """A copy of a vector (N,) on the host; from a GPU it is under way, and reading waits for it."""

    def __init__(self, vector: torch.Tensor) -> None:
        self._values: list[float] | None = None
        # torch allocates pinned memory for a non-blocking copy from a GPU.
        self._vector = vector.to("cpu", non_blocking=vector.is_cuda)
        self._event: torch.cuda.Event | None = None
        if vector.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(vector.device))

    @property
    def is_read(self) -> bool:
        """Whether the numbers were read, so that reading them again does not wait."""
        return self._values is not None

    def read(self) -> list[float]:
        """The numbers."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = self._vector.tolist()
        return self._values


@dataclass
class StepResult:
    """Results of one iteration. Those that the device computes are read when they are wanted.

    Attributes:
        iteration: counted from 0.
        files: of this process's images.
        names: of the losses.
        copy: the losses, then gradient norm, share of the processes that were asked to stop, and
            with loss scaling the factor.
        learning_rates: by the name of the parameter group.
        data_seconds: time spent waiting for the batch.
        seconds: duration of the iteration on the host, including `data_seconds`.
    """

    iteration: int
    files: tuple[str, ...]
    names: tuple[str, ...]
    copy: HostCopy
    learning_rates: dict[str, float]
    data_seconds: float
    seconds: float = 0.0

    @property
    def losses(self) -> dict[str, float]:
        """Weighted losses by name, each the mean over the processes."""
        return dict(zip(self.names, self.copy.read(), strict=False))

    @property
    def total_loss(self) -> float:
        """Their sum, which is minimized."""
        return math.fsum(self.losses.values())

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of all parameters before clipping."""
        return self.copy.read()[len(self.names)]

    @property
    def stop(self) -> bool:
        """Whether a process was asked to stop."""
        return self.copy.read()[len(self.names) + 1] > 0

    @property
    def loss_scale(self) -> float | None:
        """Factor of the loss in fp16 training; None without."""
        rest = self.copy.read()[len(self.names) + 2 :]
        return rest[0] if rest else None

    def scalars(self) -> dict[str, float]:
        """The numbers of a training record that the device computes."""
        return {"total_loss": self.total_loss, **self.losses, "grad_norm": self.grad_norm}

    def problems(self) -> list[str]:
        """What is not finite: `loss_ce is nan`. An infinite gradient is normal in fp16."""
        losses = self.losses.items()
        bad = [f"{name} is {value}" for name, value in losses if not math.isfinite(value)]
        if not bad and not math.isfinite(self.grad_norm) and self.loss_scale is None:
            bad = [f"the gradient norm is {self.grad_norm}, with finite losses"]
        return bad


class ResultCheck:
    """Checks the results of each iteration, in it or in the next one.

    Attributes:
        unchecked: the results that were not checked yet.
        failed: the iteration whose results were not finite; -1: none.
        stop: a process was asked to stop, as far as that was read; the same on all processes.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the results of an earlier training."""
        self.unchecked: StepResult | None = None
        self.failed = -1
        self.stop = False

    def __call__(self) -> None:
        """Read and check the results that were not; a collective operation if they are bad.

        Raises:
            NonFiniteLossError: losses or gradients are not finite; it names the batch's files.
        """
        result, self.unchecked = self.unchecked, None
        if result is None:
            return
        if problems := result.problems():
            self.failed = result.iteration
            files = [name for names in comm.all_gather(result.files) for name in names]
            raise NonFiniteLossError(
                f"training diverged in iteration {result.iteration}: {', '.join(problems)}.\n"
                "Images of the batch:\n" + "\n".join(f"  {name}" for name in files)
            )
        self.stop = result.stop
