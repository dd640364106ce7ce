"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1) in plain PyTorch."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clouds.modeling.pixel_decoder.attention_op import Size
from clouds.modeling.pixel_decoder.deformable_attention_cpu import (
    compute_type,
    deformable_attention_cpu,
)

IMPLEMENTATIONS = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


def deformable_attention(
    value: Tensor,
    sizes: Sequence[Size],
    locations: Tensor,
    weights: Tensor,
    implementation: str = "auto",
) -> Tensor:
    """Sum values sampled bilinearly at given places of several feature maps.

    All forms compute in float32 at least and keep nothing but the three tensors for the backward
    pass. They differ by rounding. Triton's adds up the gradient of `value` in no fixed order, so
    that its last bits vary, unless `torch.use_deterministic_algorithms` asks for one.

    Args:
        value: (N, S, M, D), the maps flattened one after another, M heads of D channels.
        sizes: (height, width) of each of the L maps; S is the sum of their areas.
        locations: (N, Q, M, L, P, 2) as (x, y), 0 the left or upper edge of a map and 1 the
            opposite one; outside of it values are zero.
        weights: (N, Q, M, L, P), the attention of each sample.
        implementation: 'torch'; 'triton', for tensors on CUDA; or 'auto', which is Triton on CUDA
            where it works.

    Returns:
        (N, Q, M * D), of the type of `value`.

    Raises:
        ValueError: 'triton' was asked for and cannot be had.
    """
    if choose(implementation, value.device) == "triton":
        from clouds.modeling.pixel_decoder.deformable_attention_triton import (
            deformable_attention_triton,
        )

        return deformable_attention_triton(value, sizes, locations, weights)
    if value.device.type == "cpu":
        return deformable_attention_cpu(value, sizes, locations, weights)
    # Sampled again in the backward pass: the samples would be most of what the model keeps.
    out: Tensor = checkpoint(
        sample_level_by_level,
        value,
        sizes,
        locations,
        weights,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return out


def sample_level_by_level(
    value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """See `deformable_attention`; for any device that has `grid_sample`."""
    n, _, heads, channels = value.shape
    queries, dtype = locations.shape[1], compute_type(value, locations)
    grids = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    attention = weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, NM, Q, P)
    levels = torch.split(value.to(dtype), [height * width for height, width in sizes], dim=1)
    out = value.new_zeros((n * heads, channels, queries), dtype=dtype)
    for level, size, grid, share in zip(levels, sizes, grids, attention, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(n * heads, channels, *size)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (NM, D, Q, P)
        out = out + (samples * share[:, None]).sum(-1)
    return out.reshape(n, heads * channels, queries).transpose(1, 2).to(value.dtype)


def choose(implementation: str, device: torch.device) -> str:
    """'torch' or 'triton', whichever is used for tensors on `device`; the choice is logged once.

    Raises:
        ValueError: 'triton' was asked for and cannot be had.
    """
    key = (implementation, device.type, device.index)
    if key not in _chosen:
        _chosen[key] = _decide(implementation, device)
    return _chosen[key]


# A plain dict, as `torch.compile` reads it without leaving the graph once the choice is made.
_chosen: dict[tuple[str, str, int | None], str] = {}


def _decide(implementation: str, device: torch.device) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"deformable attention {implementation!r}: allowed is one of {IMPLEMENTATIONS}"
        )
    choice = implementation
    if implementation != "torch":
        problem = _why_not_triton(device)
        if problem and implementation == "triton":
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.DEFORMABLE_ATTENTION is 'triton', but {problem}; "
                "set it to 'auto' or 'torch'"
            )
        choice = "torch" if problem else "triton"
        if problem and device.type == "cuda":
            logger.warning("Deformable attention runs without Triton, slowly: %s", problem)
    logger.info("Deformable attention on %s: %s", device, choice)
    return choice


def _why_not_triton(device: torch.device) -> str:
    """Empty where the Triton kernels run on tensors of this device."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}, and Triton's kernels need CUDA"
    from clouds.modeling.pixel_decoder.deformable_attention_triton import try_out

    return try_out(device)


class MSDeformAttn(nn.Module):
    """Attention whose keys are a few learned sampling points around each query's own position.

    Args:
        channels: of queries and values.
        levels: number of feature maps.
        heads: attention heads; `channels` is a multiple of it.
        points: sampling points per head and level.
        implementation: see `deformable_attention`.
    """

    def __init__(
        self, channels: int, levels: int, heads: int, points: int, implementation: str = "auto"
    ) -> None:
        super().__init__()
        self.implementation = implementation
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, its k-th point k pixels away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C), positions added.
            reference: (Q, 2) as (x, y) in [0, 1], where each query is.
            value: (N, S, C), the maps flattened one after another.
            sizes: (height, width) of each map.

        Returns:
            (N, Q, C)
        """
        n, q, _ = query.shape
        shape = (n, q, self.heads, self.levels, self.points)
        # Places are computed in float32: half precision cannot tell neighbouring pixels apart.
        # Over flat rows: on a CPU an operation whose last side is 2 takes several times as long.
        offsets = self.sampling_offsets(query).float()
        pixel = offsets.new_empty(self.heads, self.levels, self.points, 2)
        for level, (height, width) in enumerate(sizes):  # filled, as a copy would wait for a GPU
            pixel[:, level, :, 0].fill_(1 / width)
            pixel[:, level, :, 1].fill_(1 / height)
        pixel = pixel.flatten()
        centres = reference.repeat(1, pixel.numel() // 2)
        locations = torch.addcmul(centres, offsets, pixel).view(*shape, 2)
        # Over columns rather than short rows: on a CPU several times as fast.
        logits = self.attention_weights(query).view(-1, self.levels * self.points).t()
        weights = logits.softmax(0).t().view(shape)
        values = self.value_proj(value).view(n, -1, self.heads, value.shape[-1] // self.heads)
        out: Tensor = self.output_proj(
            deformable_attention(values, sizes, locations, weights.to(values.dtype))
        )
        return out
