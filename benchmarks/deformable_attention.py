#!/usr/bin/env python
"""Deformable attention, forward and backward, against the common form with `grid_sample`.

    python benchmarks/deformable_attention.py --size 384 --batch 2 --threads 1
    python benchmarks/deformable_attention.py --size 768 --batch 8 --device cuda --dtype bfloat16

The layers of the pixel decoder are run one after another on maps of strides 32, 16 and 8, in turns
with each implementation. On a CPU the time is the CPU time of all threads of this process. The
memory is what autograd keeps for the backward pass. Both get the same values, sampling locations
and weights; outputs and gradients are compared before the timing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from in_turns import machine, parser_of, report, timed
from torch import Tensor
from torch.nn import functional as F

from clouds.modeling.pixel_decoder.msdeformattn import pixel_centers
from clouds.ops.deformable_attention import (
    IMPLEMENTATIONS,
    choose_implementation,
    deformable_attention,
)

Size = tuple[int, int]
Layer = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Sequence[Size], Tensor, Tensor], Tensor]
STRIDES, NUM_HEADS, D_MODEL, NUM_POINTS = (32, 16, 8), 8, 256, 4


def grid_sample_attention(
    value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample each map, stack the samples of all maps, and take their weighted sum."""
    n, _, num_heads, head_dim = value.shape
    num_queries = locations.shape[1]
    samples = []
    for i, level in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        maps = level.flatten(2).transpose(1, 2).reshape(n * num_heads, head_dim, *sizes[i])
        grid = (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid.to(maps.dtype), align_corners=False))
    flat_weights = weights.transpose(1, 2).reshape(n * num_heads, 1, num_queries, -1)
    total = (torch.stack(samples, dim=-2).flatten(-2) * flat_weights).sum(-1)
    return total.view(n, num_heads * head_dim, num_queries).transpose(1, 2).contiguous()


def make_layers(args: argparse.Namespace) -> tuple[list[Size], list[Layer], Tensor]:
    """Sizes of the maps, each layer's inputs, and the gradient of each layer's output.

    Sampling locations are a few pixels around a query's position, as in a trained model.
    """
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = [(args.size // stride, args.size // stride) for stride in STRIDES]
    generator = torch.Generator().manual_seed(0)
    centers = pixel_centers(sizes, torch.device("cpu"))
    area = len(centers)
    pixel = 1 / torch.tensor(sizes, dtype=torch.float32).flip(1)[:, None]
    shape = (args.batch, area, NUM_HEADS, len(sizes), NUM_POINTS)
    layers = []
    for _ in range(args.layers):
        value = torch.randn(args.batch, area, NUM_HEADS, D_MODEL // NUM_HEADS, generator=generator)
        offsets = args.spread * torch.randn(*shape, 2, generator=generator)
        locations = centers[:, None, None, None] + offsets * pixel
        weights = torch.randn(*shape, generator=generator).flatten(3).softmax(-1).view(shape)
        tensors = (value.to(device, dtype), locations.to(device), weights.to(device, dtype))
        layers.append(tuple(tensor.requires_grad_() for tensor in tensors))
    gradient = torch.randn(args.batch, area, D_MODEL, generator=generator).to(device, dtype)
    return sizes, layers, gradient


def run(attention: Attention, sizes: list[Size], layers: list[Layer], gradient: Tensor) -> None:
    """Forward through all layers, then backward through all."""
    for tensor in (tensor for layer in layers for tensor in layer):
        tensor.grad = None
    outputs = [attention(value, sizes, x, weights) for value, x, weights in layers]
    torch.autograd.backward(outputs, [gradient] * len(outputs))


def saved_bytes(attention: Attention, sizes: list[Size], layers: list[Layer]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [attention(value, sizes, x, weights) for value, x, weights in layers]
    del outputs
    return sum(storages.values())


def compare(attention: Attention, sizes: list[Size], layers: list[Layer], gradient: Tensor) -> None:
    """Print the largest differences of the first layer's output and gradients, relative."""
    results = []
    for each in (grid_sample_attention, attention):
        leaves = [tensor.detach().requires_grad_() for tensor in layers[0]]
        out = each(leaves[0], sizes, *leaves[1:])
        out.backward(gradient)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    names = ("output", "gradient of value", "of locations", "of weights")
    for name, theirs, ours in zip(names, *results, strict=True):
        difference = (theirs - ours).abs().max() / theirs.abs().max()
        print(f"largest difference, {name:18}{difference.item():.1e}")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, default=384, help="side of the image, pixels")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--spread", type=float, default=2.0, help="of sampling locations, pixels of a map"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, in turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", default="auto", choices=IMPLEMENTATIONS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    inputs = make_layers(args)

    def ours(value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, sizes, locations, weights, args.implementation)

    name = choose_implementation(args.implementation, inputs[2].device)
    print(f"{args.layers} layers, {args.batch} x {args.size} x {args.size}, {args.dtype}, ", end="")
    print(f"{machine(torch.device(args.device))}; ours: {name}")
    compare(ours, *inputs)
    variants: dict[str, Attention] = {"grid_sample": grid_sample_attention, "ours": ours}
    runs = {name: lambda call=call: run(call, *inputs) for name, call in variants.items()}
    times = timed(runs, args.repeats, torch.device(args.device), untimed=1)
    saved = {name: saved_bytes(call, *inputs[:2]) for name, call in variants.items()}
    largest = saved["grid_sample"]
    besides = {
        name: f"saved {size / 2**20:.1f} MiB, {largest / size:.2f} x less"
        for name, size in saved.items()
    }
    in_ms = {name: [1e3 * seconds for seconds in taken] for name, taken in times.items()}
    print(report(in_ms, "ms", besides))


if __name__ == "__main__":
    main()
