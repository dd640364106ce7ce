"""Graphs of a model for other runtimes, torch.export and ONNX, each checked when it is written."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clouds.export.network import INPUT_TYPES
from clouds.files import atomic_write
from clouds.messages import install_extra

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]
"""Runs a graph: images (N, 3, H, W) to scores (N, C, H, W)."""

TRACED_SIZE = (2, 3, 96, 160)
"""Of the images with which a graph is traced; it is of any batch, height and width."""

CHECKED_SIZES = ((1, 3, 128, 192), (2, 3, 100, 77))
"""Of the images on which a graph is compared with the model: multiples of 32, and others."""

MAX_DIFFERENCE = 1e-3
MIN_AGREEMENT = 0.999
"""Bounds of a check: difference of scores, and share of pixels with the same class."""

EXTERNAL_DATA_BYTES = 1 << 30
"""Weights of an ONNX file that is larger are in a file beside it: protobuf allows 2 GiB."""

IN_PLACE_OF_ONNX = "Leave onnx out of --format (torch and safetensors remain)."


@dataclass(frozen=True)
class Check:
    """How a graph differs from the model, over all CHECKED_SIZES.

    Attributes:
        difference: largest absolute difference of scores.
        agreement: smallest share of the pixels of an image batch with the same class.
    """

    difference: float
    agreement: float


def trace(network: nn.Module, input_type: str) -> torch.export.ExportedProgram:
    """The graph of a module for images of any number and size.

    Args:
        network: images (N, 3, H, W) to scores (N, C, H, W).
        input_type: of INPUT_TYPES.

    Raises:
        ValueError: torch.export cannot make a graph of it, or not one for images of any size.
    """
    dynamic = torch.export.Dim.AUTO
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(
                network,
                (sample_images(TRACED_SIZE, input_type),),
                dynamic_shapes={"images": {0: dynamic, 2: dynamic, 3: dynamic}},
                strict=False,
            )
        except Exception as error:  # torch.export raises errors of many types for what it lacks
            raise ValueError(
                f"torch.export makes no graph of this model ({_first_line(error)}). Leave torch "
                "and onnx out of --format (safetensors remains), or use another backbone or "
                "adapter."
            ) from error
    fixed = [size for size in _placeholder_shape(program) if isinstance(size, int)]
    if len(fixed) != 1:  # the channels
        raise ValueError(
            f"torch.export made a graph for images of {tuple(_placeholder_shape(program))} alone, "
            "not of any size: a layer of the model computes with a size as a fixed number. Leave "
            "torch and onnx out of --format (safetensors remains)."
        )
    _drop_unused(program)
    return program


def _drop_unused(program: torch.export.ExportedProgram) -> None:
    """Keep no values of parameters that the scores do not depend on, such as a text encoder's."""
    used = {node.name for node in program.graph.nodes if node.users}
    for placeholder, name in program.graph_signature.inputs_to_parameters.items():
        if placeholder not in used:
            program.state_dict[name] = nn.Parameter(torch.empty(0), requires_grad=False)


def _placeholder_shape(program: torch.export.ExportedProgram) -> list[Any]:
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    return list(node.meta["val"].shape)


def write_torch(
    program: torch.export.ExportedProgram, network: nn.Module, path: Path, input_type: str
) -> Check:
    """Write a .pt2 file, read it again and compare it with the module.

    Raises:
        ValueError: it differs, see `check`.
    """
    with atomic_write(path) as file, _quiet():
        torch.export.save(program, file)
    with _quiet():
        loaded = torch.export.load(path).module()
    return check(lambda x: loaded(torch.from_numpy(x)).numpy(), network, path, input_type)


def require_onnx() -> None:
    """Raise ImportError, with what to install, unless the packages of the extra are there."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--format onnx needs {', '.join(missing)}: {install_extra('export')}. Or leave onnx "
            "out of --format."
        )


def write_onnx(
    program: torch.export.ExportedProgram, network: nn.Module, path: Path, input_type: str
) -> Check:
    """Write an ONNX file with the input `images` and the output `scores`, and compare it.

    Weights of more than EXTERNAL_DATA_BYTES are in `<path>.data`.

    Raises:
        ImportError: see `require_onnx`.
        ValueError: ONNX lacks an operator; the message names it. Or the file differs from the
            module in onnxruntime, see `check`.
    """
    require_onnx()
    import onnxruntime

    names = {0: "batch", 2: "height", 3: "width"}
    try:
        with torch.no_grad(), _quiet():
            converted = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=["scores"],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many types
        raise _not_convertible(error) from error
    assert converted is not None, "returned with dynamo=True"
    graph: Any = converted.model.graph  # of onnx_ir, which may not be installed
    for value in (*graph.inputs, *graph.outputs):
        for axis, name in names.items():
            value.shape[axis] = name
    weights = sum(value.nbytes for value in program.state_dict.values())
    converted.save(path, external_data=weights > EXTERNAL_DATA_BYTES)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return check(lambda x: session.run(None, {"images": x})[0], network, path, input_type)


def _not_convertible(error: Exception) -> ValueError:
    """The error for a failure of the ONNX exporter; it names the operators that ONNX lacks."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = "\n".join(str(cause) for cause in causes)
    operators = re.findall(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    operators += re.findall(r"No decompositions registered for .*?OpOverload\(op='([^']+)'", text)
    if operators:
        names = ", ".join(sorted(set(operators)))
        version = metadata.version("onnxscript")
        return ValueError(
            f"ONNX has no operator for {names} (torch {torch.__version__}, onnxscript {version}). "
            f"{IN_PLACE_OF_ONNX}"
        )
    return ValueError(
        f"the model cannot be written as ONNX: {_first_line(error)}. {IN_PLACE_OF_ONNX}"
    )


def check(run: Run, network: nn.Module, path: Path, input_type: str) -> Check:
    """Compare the scores of a graph and of the module on images of CHECKED_SIZES.

    Raises:
        ValueError: their shapes differ, or they differ by more than MAX_DIFFERENCE, or have the
            same class in fewer than MIN_AGREEMENT of the pixels.
    """
    differences, agreements = [], []
    for seed, size in enumerate(CHECKED_SIZES):
        images = sample_images(size, input_type, seed)
        with torch.no_grad():
            expected: Array = network(images).numpy()
        found = run(images.numpy())
        if found.shape != expected.shape:
            raise ValueError(
                f"'{path}' gives scores of the shape {found.shape} for images of {size}, and the "
                f"model {expected.shape}: the file is not usable. {_without(path)}"
            )
        differences.append(float(np.abs(found - expected).max()))
        agreements.append(float((found.argmax(1) == expected.argmax(1)).mean()))
    result = Check(max(differences), min(agreements))
    if not result.difference <= MAX_DIFFERENCE or result.agreement < MIN_AGREEMENT:
        raise ValueError(
            f"'{path}' differs from the model: scores by {result.difference:.3g} (allowed is "
            f"{MAX_DIFFERENCE}), and {result.agreement:.3%} of the pixels have the same class "
            f"(allowed are {MIN_AGREEMENT:.1%}): the file is not usable. {_without(path)}"
        )
    return result


def _without(path: Path) -> str:
    """How to export without the graph of a file."""
    return f"Leave {'onnx' if path.suffix == '.onnx' else 'torch'} out of --format."


def sample_images(size: tuple[int, int, int, int], input_type: str, seed: int = 0) -> Tensor:
    """Random images (N, 3, H, W), 0 to 255, with areas of one color and noise."""
    generator = torch.Generator().manual_seed(seed)
    n, channels, height, width = size
    areas = torch.randint(20, 236, (n, channels, 4, 6), generator=generator).float()
    areas = nn.functional.interpolate(areas, (height, width))
    noise = torch.randint(-20, 21, size, generator=generator)
    return (areas + noise).to(INPUT_TYPES[input_type])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torch's exporters about their own optimizations and plans."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "torch.export")]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
