#!/usr/bin/env python
"""A training step of a vision transformer with an adapter: composed of library calls, and ours.

    OMP_NUM_THREADS=1 python benchmarks/vit_step.py
    OMP_NUM_THREADS=1 python benchmarks/vit_step.py --adapter rein --repeats 3
    python benchmarks/vit_step.py --size 512 --images 4 --device cuda --dtype bfloat16 --repeats 10

The composed step is timm's transformer with `forward_intermediates`, the plain pyramid, the adapter
as it is published (LoRA: a product beside each linear layer, one for each of query, key and value;
Rein: a function after each block), transformers' Mask2Former with its losses, and AdamW with a
group for each parameter, in float32. Ours is the trainer's step on the configs of `configs/papers`.
Both start from the same random weights, with random adapters, and get the same rendered images; the
printed losses differ, since they are computed at random points.

Further settings of the model follow as KEY VALUE. Needs transformers.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clouds.modeling  # noqa: F401 - registers what the config names
from clouds.config import load_config
from clouds.d2 import CfgNode
from clouds.modeling.build import build_seeded

sys.path.insert(0, str(Path(__file__).parent))
from in_turns import machine, parser_of, silence_all_but_peaks
from part_clock import PartClock
from profiler import BACKWARD, OPTIMIZER
from published_step import (
    BACKBONE,
    HEAD,
    LOSSES,
    PublishedHead,
    PublishedLosses,
    Sample,
    adamw_of,
    labelled_target,
    with_masks,
)
from step import OURS, OurStep, measure, report, source_sample

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from transformers_weights import mask_decoder_weights, pixel_decoder_weights

COMPOSED = "composed"
SCALES = (4, 2, 1, 0.5)
"""Factors of the plain pyramid, from stride 16 to 4, 8, 16, 32."""


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(args, Path(folder))
        batch = [source_sample(seed, args.size) for seed in range(args.images)]
        composed, ours = build(cfg, device)
        loaded = [with_masks(sample) for sample in batch]
        ways = {
            COMPOSED: lambda clock: composed(loaded, clock),
            OURS: lambda clock: ours(batch, clock),
        }
        taken = measure(ways, args.untimed, args.repeats, device)
    print(
        f"training step, {args.images} images of {args.size}x{args.size}, "
        f"{cfg.MODEL.BACKBONE.TIMM_NAME} with {args.adapter}, ours {args.dtype}; {machine(device)}"
    )
    report(taken, device)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--timm-name", default="vit_large_patch14_dinov2.lvd142m")
    add("--adapter", default="lora", choices=["lora", "rein"])
    add("--size", type=int, default=256, help="of an image, pixels, a multiple of 32")
    add("--images", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--untimed", type=int, default=1, help="additional rounds before, not in the result")
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of ours, by autocast")
    add("settings", nargs="*", metavar="KEY VALUE", help="of the model, as for tools/train_net.py")
    args = parser.parse_args(words)
    if args.size % 32 or min(args.size, args.images, args.repeats) < 1 or args.untimed < 0:
        parser.error(
            f"--size {args.size} --images {args.images} --repeats {args.repeats} --untimed "
            f"{args.untimed}: --size must be a multiple of 32, --untimed at least 0, all others 1"
        )
    return args


def config(args: argparse.Namespace, folder: Path) -> CfgNode:
    """The papers' config with random weights and crops of the size; positions are not resized."""
    settings = {
        "MODEL.DEVICE": args.device,
        "MODEL.BACKBONE.TIMM_NAME": args.timm_name,
        "MODEL.BACKBONE.WEIGHTS": "",
        "MODEL.BACKBONE.IMG_SIZE": args.size,
        "MODEL.BACKBONE.ADAPTER.NAME": args.adapter,
        "DATASETS.TEST": "()",
        "INPUT.CROP.SIZE": f"({args.size}, {args.size})",
        "SOLVER.IMS_PER_BATCH": args.images,
        "SOLVER.AMP.ENABLED": args.dtype == "bfloat16",
        "SOLVER.CHECKPOINT_ADAPTERS_ONLY": False,
        "OUTPUT_DIR": folder / "output",
    }
    words = [str(word) for pair in settings.items() for word in pair]
    return load_config("papers/base", [*words, *args.settings])


def build(cfg: CfgNode, device: torch.device) -> tuple[ComposedStep, OurStep]:
    """Both steps, with the same weights; the frozen ones are the same tensors."""
    model = build_seeded(cfg).to(device)
    randomize_adapter(model.backbone)
    return ComposedStep(cfg, model), OurStep(cfg, model)


def randomize_adapter(backbone: Any) -> None:
    """Values of an adapter in training: LoRA's B is 0 at first, and Rein's scale 0.001."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith(("lora_B", "adapter.scale")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * noise.to(parameter.device))


# ----------------------------------------------------------------------- composed


class LoraLinear(nn.Module):
    """W x + b + s B A x as published: W x + b first, the product of the factors added to it.

    Args:
        layer: frozen.
        ours: the `AdaptedLinear` whose factors are copied, those of query, key and value each.
    """

    def __init__(self, layer: nn.Linear, ours: Any) -> None:
        super().__init__()
        (update,) = ours.updates.values()
        self.layer, self.scale = layer, update.scale
        chunks = (update.lora_A.chunk(update.parts), update.lora_B.chunk(update.parts))
        a, b = (nn.ParameterList(p.detach().clone() for p in parts) for parts in chunks)
        self.lora_A, self.lora_B = a, b

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        products = [F.linear(F.linear(x, a), b) * self.scale for a, b in pairs]
        out: Tensor = self.layer(x) + torch.cat(products, dim=-1)
        return out


class ReinLayers(nn.Module):
    """Rein as published: tokens of each block from two factors, and the head's queries.

    Args:
        ours: the `Rein` whose parameters are copied.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.a = nn.Parameter(ours.learnable_tokens_a.detach().clone())
        self.b = nn.Parameter(ours.learnable_tokens_b.detach().clone())
        self.scale = nn.Parameter(ours.scale.detach().clone())
        for name in ("mlp_token2feat", "mlp_delta_f", "transform", "merge"):
            setattr(self, name, linear_like(getattr(ours, name)))

    def after_block(self, index: int, tokens: Tensor, prefix: int) -> Tensor:
        """All tokens (N, L, C) after a block -> the same, with refined patch tokens."""
        first, features = tokens[:, :prefix], tokens[:, prefix:]
        learned = self.a[index] @ self.b[index]
        attention = torch.einsum("nlc,mc->nlm", features, learned) * features.shape[-1] ** -0.5
        attention = attention.softmax(-1)[..., 1:]
        delta = torch.einsum("nlm,mc->nlc", attention, self.mlp_token2feat(learned[1:]))
        delta = self.mlp_delta_f(delta + features)
        return torch.cat([first, features + delta * self.scale], dim=1)

    def queries(self) -> Tensor:
        """Object queries (m, D)."""
        projected = torch.stack(
            [self.transform(a @ b) for a, b in zip(self.a, self.b, strict=True)]
        )
        parts = [projected.max(0).values, projected.mean(0), projected[-1]]
        queries: Tensor = self.merge(torch.stack(parts, dim=-1).flatten(1))
        return queries


def linear_like(ours: nn.Linear) -> nn.Linear:
    """A copy of a linear layer."""
    layer = nn.Linear(ours.in_features, ours.out_features, device=ours.weight.device)
    layer.load_state_dict(ours.state_dict())
    return layer


class LinkedHead(PublishedHead):
    """`PublishedHead` whose queries are computed from Rein's tokens."""

    def __init__(self, cfg: CfgNode, widths: Sequence[int]) -> None:
        super().__init__(cfg, widths)
        dim = cfg.MODEL.MASK_FORMER.HIDDEN_DIM
        self.query_to_feat = nn.Linear(dim, dim)
        del self.predictor.queries_embedder, self.predictor.queries_features

    def load_weights(self, ours: Any) -> None:
        """Load those of a `CLOUDSHead` without queries of its own."""
        weights = mask_decoder_weights(ours.predictor.state_dict())
        names = [name for name in weights if name.startswith("query_to_feat.")]
        layer = {name.removeprefix("query_to_feat."): weights.pop(name) for name in names}
        self.query_to_feat.load_state_dict(layer)
        self.predictor.load_state_dict(weights)
        self.pixel_decoder.load_state_dict(pixel_decoder_weights(ours.pixel_decoder.state_dict()))
        self.class_embed.load_state_dict(ours.predictor.class_embed.state_dict())

    def set_queries(self, queries: Tensor) -> None:
        """Positions (Q, D) of the queries of the next call; their features follow from these."""
        self.predictor.queries_embedder = SimpleNamespace(weight=queries)
        self.predictor.queries_features = SimpleNamespace(weight=self.query_to_feat(queries))


class ComposedNetwork(nn.Module):
    """timm's transformer with an adapter, the plain pyramid, and transformers' Mask2Former.

    Args:
        cfg: of the model.
        model: ours, whose weights are copied; the frozen ones are shared.
    """

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        super().__init__()
        ours, options = model.backbone, cfg.MODEL.BACKBONE
        self.blocks = list(ours.out_blocks)
        self.backbone = nn.ModuleDict({"transformer": transformer_like(cfg, ours.transformer)})
        self.rein: ReinLayers | None = None
        if options.ADAPTER.NAME == "rein":
            self.rein = self.backbone["rein"] = ReinLayers(ours.adapter)
            self.hook_blocks(self.rein)
        else:
            add_lora(self.backbone["transformer"], ours.transformer)
        widths = [int(ours.transformer.embed_dim)] * len(SCALES)
        self.head = (PublishedHead if self.rein is None else LinkedHead)(cfg, widths)
        self.head.load_weights(model.sem_seg_head)

    def hook_blocks(self, rein: ReinLayers) -> None:
        transformer: Any = self.backbone["transformer"]
        prefix = transformer.num_prefix_tokens
        for index, block in enumerate(transformer.blocks):
            block.register_forward_hook(
                lambda _, __, out, index=index: rein.after_block(index, out, prefix)
            )

    def features(self, x: Tensor) -> list[Tensor]:
        """Strides 4 to 32 of normalized images (N, 3, H, W)."""
        transformer: Any = self.backbone["transformer"]
        maps = transformer.forward_intermediates(
            x, indices=self.blocks, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return [
            F.interpolate(m, scale_factor=scale, mode="bilinear") if scale != 1 else m
            for m, scale in zip(maps, SCALES, strict=True)
        ]

    def predict(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `PublishedHead`."""
        if self.rein is not None:
            self.head.set_queries(self.rein.queries())
        return self.head(features)


def transformer_like(cfg: CfgNode, ours: nn.Module) -> nn.Module:
    """timm's model with the weights of ours, the same tensors, frozen."""
    options = cfg.MODEL.BACKBONE
    model: nn.Module = timm.create_model(
        options.TIMM_NAME.partition(".")[0],
        num_classes=0,
        global_pool="",
        img_size=options.IMG_SIZE,
        patch_size=options.PATCH_SIZE,
        dynamic_img_size=True,
    )
    own = {name: p for name, p in ours.state_dict().items() if ".updates." not in name}
    model.load_state_dict(own, assign=True)
    return model.requires_grad_(False).eval()


def add_lora(model: nn.Module, ours: nn.Module) -> None:
    """Put a `LoraLinear` at the place of each layer that is adapted in ours."""
    for name, adapted in list(ours.named_modules()):
        if hasattr(adapted, "updates"):
            parent, _, leaf = name.rpartition(".")
            new = LoraLinear(model.get_submodule(name), adapted)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), leaf, new)


class ComposedStep:
    """Forward, backward, clip if the config says so, step.

    Args:
        cfg: of the model.
        model: ours, whose weights are copied.
    """

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        self.device = model.device
        self.mean, self.std = model.pixel_mean.clone(), model.pixel_std.clone()
        self.network = ComposedNetwork(cfg, model).to(self.device)
        self.losses = PublishedLosses(cfg, self.device)
        self.optimizer = adamw_of(cfg, self.network)
        clipping = cfg.SOLVER.CLIP_GRADIENTS
        self.bound = clipping.CLIP_VALUE if clipping.ENABLED else math.inf

    def __call__(self, batch: Sequence[Sample], clock: PartClock) -> dict[str, float]:
        """Train on a batch of `with_masks`; returns the weighted losses."""
        with clock.part(BACKBONE):
            views = [(s["image"].to(self.device) - self.mean) / self.std for s in batch]
            features = self.network.features(torch.stack(views))
        targets = [labelled_target(sample, self.device) for sample in batch]
        with clock.part(HEAD):
            class_logits, mask_logits = self.network.predict(features)
        with clock.part(LOSSES):
            losses = self.losses(class_logits, mask_logits, targets)
        with clock.part(BACKWARD):
            self.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
        with clock.part(OPTIMIZER):
            if self.bound < math.inf:
                nn.utils.clip_grad_norm_(self.network.parameters(), self.bound, foreach=False)
            self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}


if __name__ == "__main__":
    silence_all_but_peaks()
    main()
