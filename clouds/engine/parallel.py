"""Several processes that train one model: DistributedDataParallel, or sharding (SOLVER.PARALLEL).

Sharding is torch's `fully_shard` (FSDP2). Each process keeps a part of every parameter, of its
gradient and of the optimizer's state. The parameters of a block are gathered before it is computed
and freed afterwards; so are, for the whole step, those that belong to no block (`HasBlocks`). They
stay float32: SOLVER.AMP is autocast with either kind.

All processes must gather the same blocks in the same order. Where they compute different things,
in evaluation and for the labels of the teacher, the weights are gathered as a whole before.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from clouds import comm
from clouds.d2 import CfgNode
from clouds.modeling.backbone.base import HasBlocks, TextEncoder
from clouds.self_training.ema import EMATeacher


def place(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device; with SOLVER.PARALLEL fsdp and several processes it is sharded.

    Sharding is in place, and includes the teacher. The weights must be the same in all processes.

    Raises:
        ValueError: the installed torch cannot shard it.
    """
    if cfg.SOLVER.PARALLEL == "fsdp" and comm.get_world_size() > 1:
        shard(model, device)
    return model.to(device)


def wrap(model: nn.Module) -> nn.Module:
    """The module that training calls: DistributedDataParallel around a model that is not sharded,
    if there are several processes.
    """
    if comm.get_world_size() == 1 or is_sharded(model):
        return model
    with warnings.catch_warnings():
        # Newer torch calls it forward_sync_buffers, which torch 2.4 does not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a part of the model's parameters."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model and its teacher over all processes, in place; see `place`."""
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(
            f"SOLVER.PARALLEL fsdp needs torch 2.7 or newer, and {torch.__version__} is installed. "
            "Install a newer one, or set SOLVER.PARALLEL ddp."
        )
    mesh = init_device_mesh(device.type, (comm.get_world_size(),))
    teacher = teacher_of(model)
    if teacher is not None:
        teacher.reset()  # copies of sharded modules cannot be made
    parts = [] if teacher is None else list(teacher.averaged_parts().values())
    for root in (model, *parts):
        _shard_module(root, mesh)
        root.to(device)


def teacher_of(model: nn.Module) -> EMATeacher | None:
    """The teacher of a model in joint training; None if it has none."""
    teacher = getattr(getattr(model, "pseudo_labeler", None), "teacher", None)
    return teacher if isinstance(teacher, EMATeacher) else None


def blocks_of(root: nn.Module) -> list[list[nn.Module]]:
    """Groups of layers that are sharded by themselves: those of the backbone, then of the head."""
    parts = (root, getattr(root, "backbone", None), getattr(root, "sem_seg_head", None))
    networks = (part for part in parts if isinstance(part, HasBlocks))
    return [list(group) for network in networks for group in network.blocks()]


def _shard_module(root: nn.Module, mesh: DeviceMesh) -> None:
    # Parameters of one number cannot be sharded; each process has them, see `average_gradients`.
    whole = {parameter for parameter in root.parameters() if parameter.dim() == 0}
    for parameter in root.parameters():
        parameter.data = parameter.data.contiguous()  # not channels last, which is refused
    blocks = blocks_of(root)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    # Resharded like the blocks: between steps, the model's parameters are always the parts.
    fully_shard(root, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    _set_prefetching(root, [cast(FSDPModule, block[0]) for block in blocks])
    _start(root)


def _set_prefetching(root: nn.Module, blocks: list[FSDPModule]) -> None:
    """Gather in the backward pass the block before the present one, in a fixed order.

    By default it is the one that was last computed before it, which differs between processes
    after an evaluation of different numbers of images.
    """
    backbone = getattr(root, "backbone", None)
    if isinstance(backbone, HasBlocks):
        parameters = cast(nn.Module, backbone).parameters()
        if not any(p.requires_grad for p in parameters):
            blocks = blocks[len(list(backbone.blocks())) :]  # it has no backward pass
    order = [cast(FSDPModule, root), *blocks]
    for before, block in itertools.pairwise(order):
        block.set_modules_to_backward_prefetch([before])
    order[0].set_modules_to_backward_prefetch([order[-1]])


@torch.no_grad()
def _start(root: nn.Module) -> None:
    """Make FSDP know that `root` is the outermost module, which may not be the first that is called
    (evaluation calls its parts).
    """
    module = cast(Any, root)
    module.start_sharding = lambda: None
    register_fsdp_forward_method(root, "start_sharding")
    module.start_sharding()


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """In this context all processes have all weights of a sharded model and of its teacher.

    Its begin is a collective operation, and what is computed within is none. Parameters must not be
    changed. Without effect on a model that is not sharded. Also a decorator.
    """
    sharded = _sharded_modules(model) if is_sharded(model) else []
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    if sharded:
        _embed_texts(model)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _embed_texts(model: nn.Module) -> None:
    """Let all processes have the text embeddings of the class names, which the model keeps.

    If some had them from an image, the others alone would gather the text encoder in a later step.
    """
    encoder, head = getattr(model, "backbone", None), getattr(model, "sem_seg_head", None)
    if isinstance(encoder, TextEncoder) and getattr(head, "needs_text", False):
        cast(Any, model).text_classifier.synonym_embeddings(encoder)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    teacher = teacher_of(model)
    roots = [model, *([] if teacher is None else teacher.averaged_parts().values())]
    return [m for root in roots for m in root.modules() if isinstance(m, FSDPModule)]


def average_gradients(model: nn.Module) -> None:
    """Average over the processes what a sharded model does not: gradients of unsharded numbers."""
    if not is_sharded(model):
        return
    gradients = [
        p.grad for p in model.parameters() if p.grad is not None and not comm.is_sharded(p)
    ]
    if gradients:
        means = comm.mean_over_ranks(torch.stack(gradients))
        torch._foreach_copy_(gradients, list(means.unbind()))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """`module.load_state_dict` of whole tensors, of which a sharded module takes its parts."""
    state = module.state_dict()
    weights = {n: comm.sharded_like(state[n], v) if n in state else v for n, v in weights.items()}
    module.load_state_dict(weights, strict=strict)


def clip_sharded(
    parameters: Iterable[nn.Parameter], kind: str, bound: float, order: float
) -> Tensor:
    """Clip gradients of which each process has a part; a collective operation.

    Args:
        parameters: of the optimizer, in the same order in all processes.
        kind: 'full_model', 'norm' or 'value', see `build_clipping`; 'none'.
        bound: SOLVER.CLIP_GRADIENTS.CLIP_VALUE.
        order: p of the norms.

    Returns:
        The norm of all gradients before clipping, shape ().
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [comm.own_part(gradient) for gradient in gradients]
    norms = _norms(gradients, parts, order)
    total: Tensor = torch.linalg.vector_norm(norms, order)
    if kind == "value":
        for part in parts:
            part.clamp_(-bound, bound)
    elif kind != "none":
        # as torch.nn.utils.clip_grad_norm_
        factors = (bound / ((norms if kind == "norm" else total) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(parts, list(factors.unbind()) if kind == "norm" else factors)
    return total


def _norms(gradients: list[Tensor], parts: list[Tensor], order: float) -> Tensor:
    """Norms of gradients, shape (len(gradients),), from this process's parts of them."""
    own = torch.stack(
        [
            torch.linalg.vector_norm(part, order) if part.numel() else part.new_zeros(())
            for part in parts
        ]
    )
    is_part = [comm.is_sharded(gradient) for gradient in gradients]
    mask = torch.tensor(is_part, device=own.device)
    if order == float("inf"):
        return torch.where(mask, comm.max_over_ranks(own), own)
    sums = comm.mean_over_ranks(own**order) * comm.get_world_size()
    return torch.where(mask, sums ** (1 / order), own)
