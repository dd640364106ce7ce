#!/usr/bin/env python
"""Deformable attention, forward and backward, against its well-known form with `grid_sample`.

    python benchmarks/deformable_attention.py --size 384 --batch 2 --threads 1
    python benchmarks/deformable_attention.py --size 768 --batch 8 --device cuda --dtype bfloat16

As many layers as the pixel decoder has are run one after the other on maps of strides 32, 16 and
8, by turns in one form and in the other; on a CPU the processor's time is taken, of all threads.
The memory is what autograd keeps for the backward pass. Both forms get the same values, places and
weights; outputs and gradients are compared first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from in_turns import machine, parser_of, report, timed
from torch import Tensor
from torch.nn import functional as F

from clouds.modeling.pixel_decoder.msdeformattn import reference_points
from clouds.ops.deformable_attention import IMPLEMENTATIONS, choose, deformable_attention

Size = tuple[int, int]
Layer = tuple[Tensor, Tensor, Tensor]
Form = Callable[[Tensor, Sequence[Size], Tensor, Tensor], Tensor]
STRIDES, HEADS, CHANNELS, POINTS = (32, 16, 8), 8, 256, 4


def published_form(
    value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample each map, stack the samples of all maps, and sum them weighted."""
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    samples = []
    for i, level in enumerate(value.split([h * w for h, w in sizes], dim=1)):
        maps = level.flatten(2).transpose(1, 2).reshape(n * heads, channels, *sizes[i])
        grid = (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid.to(maps.dtype), align_corners=False))
    shares = weights.transpose(1, 2).reshape(n * heads, 1, queries, -1)
    total = (torch.stack(samples, dim=-2).flatten(-2) * shares).sum(-1)
    return total.view(n, heads * channels, queries).transpose(1, 2).contiguous()


def make_layers(args: argparse.Namespace) -> tuple[list[Size], list[Layer], Tensor]:
    """Sizes of the maps, each layer's inputs, and the gradient of each layer's output.

    Places lie around a query's own position as far as a trained model's do: a few pixels.
    """
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = [(args.size // stride, args.size // stride) for stride in STRIDES]
    generator = torch.Generator().manual_seed(0)
    centers = reference_points(sizes, torch.device("cpu"))
    area = len(centers)
    pixel = 1 / torch.tensor(sizes, dtype=torch.float32).flip(1)[:, None]
    shape = (args.batch, area, HEADS, len(sizes), POINTS)
    layers = []
    for _ in range(args.layers):
        value = torch.randn(args.batch, area, HEADS, CHANNELS // HEADS, generator=generator)
        offsets = args.spread * torch.randn(*shape, 2, generator=generator)
        locations = centers[:, None, None, None] + offsets * pixel
        weights = torch.randn(*shape, generator=generator).flatten(3).softmax(-1).view(shape)
        tensors = (value.to(device, dtype), locations.to(device), weights.to(device, dtype))
        layers.append(tuple(tensor.requires_grad_() for tensor in tensors))
    gradient = torch.randn(args.batch, area, CHANNELS, generator=generator).to(device, dtype)
    return sizes, layers, gradient


def run(form: Form, sizes: list[Size], layers: list[Layer], gradient: Tensor) -> None:
    """Forward through all layers, then backward through all."""
    for tensor in (tensor for layer in layers for tensor in layer):
        tensor.grad = None
    outputs = [form(value, sizes, places, weights) for value, places, weights in layers]
    torch.autograd.backward(outputs, [gradient] * len(outputs))


def kept_bytes(form: Form, sizes: list[Size], layers: list[Layer]) -> int:
    """What autograd keeps for the backward pass, every storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [form(value, sizes, places, weights) for value, places, weights in layers]
    del outputs
    return sum(storages.values())


def compare(form: Form, sizes: list[Size], layers: list[Layer], gradient: Tensor) -> None:
    """Print by how much the first layer's output and gradients differ, relative to the largest."""
    found = []
    for each in (published_form, form):
        leaves = [tensor.detach().requires_grad_() for tensor in layers[0]]
        out = each(leaves[0], sizes, *leaves[1:])
        out.backward(gradient)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    names = ("output", "gradient by value", "by location", "by weight")
    for name, theirs, ours in zip(names, *found, strict=True):
        difference = (theirs - ours).abs().max() / theirs.abs().max()
        print(f"largest difference, {name:18}{difference.item():.1e}")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, default=384, help="side of the image, pixels")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--spread", type=float, default=2.0, help="of the places, pixels of a map")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each form, by turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", default="auto", choices=IMPLEMENTATIONS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    inputs = make_layers(args)

    def ours(value: Tensor, sizes: Sequence[Size], places: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, sizes, places, weights, args.implementation)

    name = choose(args.implementation, inputs[2].device)
    print(f"{args.layers} layers, {args.batch} x {args.size} x {args.size}, {args.dtype}, ", end="")
    print(f"{machine(torch.device(args.device))}; ours: {name}")
    compare(ours, *inputs)
    forms: dict[str, Form] = {"grid_sample": published_form, "ours": ours}
    runs = {form: lambda call=call: run(call, *inputs) for form, call in forms.items()}
    times = timed(runs, args.repeats, torch.device(args.device), untimed=1)
    kept = {form: kept_bytes(call, *inputs[:2]) for form, call in forms.items()}
    most = kept["grid_sample"]
    besides = {
        form: f"kept {size / 2**20:.1f} MiB, {most / size:.2f} x less"
        for form, size in kept.items()
    }
    in_ms = {form: [1e3 * seconds for seconds in taken] for form, taken in times.items()}
    print(report(in_ms, "ms", besides))


if __name__ == "__main__":
    main()
