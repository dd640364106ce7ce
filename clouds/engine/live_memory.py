"""Counting the memory of tensors, also on torch's meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IN_HALF = {"linear", "conv2d", "conv_transpose2d", "matmul", "__matmul__", "__rmatmul__", "bmm"}
IN_HALF |= {"einsum", "scaled_dot_product_attention"}
IN_FULL = {"layer_norm", "group_norm", "softmax", "cross_entropy"}
"""Names of functions that autocast on CUDA computes in half precision, and in float32."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are made within the context and still exist, and their peak.

    Storages that existed before do not count; views count as what they are views of.

    Attributes:
        now: bytes at present.
        peak: largest number since the start of the context or the last `take_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def take_peak(self) -> int:
        """The peak; the next one is counted from now on."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._add(tensor, counts=True)
        return out

    def _add(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class GpuKernels(TorchFunctionMode):
    """Makes meta tensors take the memory that CUDA's kernels would take.

    Attention stores no scores, and with `half` the functions that autocast knows run in bfloat16 or
    float32, each trained weight being copied to bfloat16 once. The meta device has no autocast.

    Args:
        half: as with SOLVER.AMP.
    """

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the first keeps it in use

    def apply_to(self, module: Any) -> None:
        """Enter the mode in each call of the module.

        Activation checkpointing repeats calls in the backward pass, where the mode is not active.
        """
        forward = module.forward

        def within(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        module.forward = within

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if self.half and name in IN_HALF:
            args = tuple(self._in(torch.bfloat16, one) for one in args)
        elif self.half and name in IN_FULL:
            args = tuple(self._in(torch.float32, one) for one in args)
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _in(self, dtype: torch.dtype, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._in(dtype, one) for one in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype == torch.bfloat16):
            return value.to(dtype)
        if id(value) not in self._copies:  # autocast keeps the copies of trained weights
            self._copies[id(value)] = value, value.to(dtype)
        return self._copies[id(value)][1]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention by the kernel that keeps the log of the sums in place of the scores."""
    bias = None
    if attn_mask is not None:
        bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return out


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
