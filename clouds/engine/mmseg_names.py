"""Names of tensors in checkpoints of mmsegmentation: Rein's and SoMA's, and their DINOv2.

Values are the same but for the query, key and value projections of SoMA, which are layers of their
own there, and the rows of one here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from clouds.messages import format_examples

HEAD, OUR_HEAD = "decode_head.", "sem_seg_head."

_ENCODER = ("pixel_decoder.encoder.layers.{}.", "pixel_decoder.transformer.encoder.layers.{}.")
_LAYER = "transformer_decoder.layers.{}."
_OURS = "predictor.transformer_{}_layers.{{}}."
_CROSS, _SELF, _FFN = (_OURS.format(k) for k in ("cross_attention", "self_attention", "ffn"))

HEAD_MODULES: tuple[tuple[str, str], ...] = (
    ("pixel_decoder.input_convs.{}.conv", "pixel_decoder.input_proj.{}.0"),
    ("pixel_decoder.input_convs.{}.gn", "pixel_decoder.input_proj.{}.1"),
    ("pixel_decoder.level_encoding.weight", "pixel_decoder.transformer.level_embed"),
    (_ENCODER[0] + "self_attn", _ENCODER[1] + "self_attn"),
    (_ENCODER[0] + "norms.0", _ENCODER[1] + "norm1"),
    (_ENCODER[0] + "norms.1", _ENCODER[1] + "norm2"),
    (_ENCODER[0] + "ffn.layers.0.0", _ENCODER[1] + "linear1"),
    (_ENCODER[0] + "ffn.layers.1", _ENCODER[1] + "linear2"),
    ("pixel_decoder.lateral_convs.0.conv", "pixel_decoder.adapter_1"),
    ("pixel_decoder.lateral_convs.0.gn", "pixel_decoder.adapter_1.norm"),
    ("pixel_decoder.output_convs.0.conv", "pixel_decoder.layer_1"),
    ("pixel_decoder.output_convs.0.gn", "pixel_decoder.layer_1.norm"),
    ("pixel_decoder.mask_feature", "pixel_decoder.mask_features"),
    (_LAYER + "cross_attn.attn", _CROSS + "multihead_attn"),
    (_LAYER + "norms.0", _CROSS + "norm"),
    (_LAYER + "self_attn.attn", _SELF + "self_attn"),
    (_LAYER + "norms.1", _SELF + "norm"),
    (_LAYER + "ffn.layers.0.0", _FFN + "linear1"),
    (_LAYER + "ffn.layers.1", _FFN + "linear2"),
    (_LAYER + "norms.2", _FFN + "norm"),
    ("transformer_decoder.post_norm", "predictor.decoder_norm"),
    ("level_embed", "predictor.level_embed"),
    ("cls_embed", "predictor.class_embed"),
    ("mask_embed.0", "predictor.mask_embed.layers.0"),
    ("mask_embed.2", "predictor.mask_embed.layers.1"),
    ("mask_embed.4", "predictor.mask_embed.layers.2"),
    ("query_feat", "predictor.query_feat"),
    ("query_embed", "predictor.query_embed"),
    ("querys2feat", "predictor.query_to_feat"),
)
"""Modules of the head in mmsegmentation and here; `{}` is a number."""

REIN, OUR_ADAPTER = "backbone.reins.", "backbone.adapter."
SOMA_MODEL = "backbone.model."
OUR_TRANSFORMER = "backbone.transformer."

LORA = re.compile(r"\.(lora_[AB])\.weight$")
OUR_LORA = re.compile(r"\.updates\.(soma|soma_added)\.(lora_[AB])$")
SPLIT = re.compile(r"\.attn\.q\.")

UNUSED = ("backbone.mask_token", "backbone.model.mask_token")
"""Of DINOv2's pretraining; no feature depends on it."""

DERIVED = "criterion."
"""Begins our names of tensors that the config determines, which mmsegmentation does not save."""


def is_mmseg(names: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has mmsegmentation's names."""
    return any(name.startswith((HEAD, REIN, SOMA_MODEL)) for name in names)


def from_mmseg(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of Rein or SoMA under our names.

    SoMA's updates are those that are added to the whole weights (MODEL.BACKBONE.ADAPTER.SOMA.START
    published). Names that are not in the table stay as they are.
    """
    renamed = {}
    for name, value in _fuse_qkv(weights).items():
        if name in UNUSED:
            continue
        if name.startswith(HEAD):
            name = OUR_HEAD + _translate(name.removeprefix(HEAD), _tables()[0])
        elif name.startswith(REIN):
            name = OUR_ADAPTER + name.removeprefix(REIN)
        elif name.startswith("backbone."):
            rest = name.removeprefix(SOMA_MODEL).removeprefix("backbone.")
            name = OUR_TRANSFORMER + LORA.sub(r".updates.soma_added.\1", rest)
        renamed[name] = value
    return renamed


def to_mmseg(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `from_mmseg`: a state dict that Rein's or SoMA's code loads.

    Raises:
        ValueError: tensors have no name there; or SoMA's updates are beside what is left of the
            weights, which the state dict lacks.
    """
    is_soma = any(OUR_LORA.search(name) for name in weights)
    _refuse_updates_of_absent_weights(weights)
    renamed, unknown = {}, []
    for name, value in weights.items():
        if name.startswith(DERIVED):
            continue
        if name.startswith(OUR_HEAD):
            theirs = _translate(name.removeprefix(OUR_HEAD), _tables()[1])
            if theirs == name.removeprefix(OUR_HEAD):
                unknown.append(name)
            name = HEAD + theirs
        elif name.startswith(OUR_ADAPTER):
            name = REIN + name.removeprefix(OUR_ADAPTER)
        elif name.startswith(OUR_TRANSFORMER):
            rest = OUR_LORA.sub(r".\2.weight", name.removeprefix(OUR_TRANSFORMER))
            name = (SOMA_MODEL if is_soma else "backbone.") + rest
            if ".updates." in name:
                unknown.append(name)
        else:
            unknown.append(name)
        renamed[name] = value
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have no name in mmsegmentation's checkpoints: "
            f"{format_examples(unknown)}. Only the head 'linear' on the backbone ViT with the "
            "adapter rein, soma or none has; merge other adapters (--merge-adapters)."
        )
    return _split_qkv(renamed) if is_soma else renamed


def _refuse_updates_of_absent_weights(weights: Mapping[str, Tensor]) -> None:
    absent = [
        name
        for name in weights
        if (match := OUR_LORA.search(name))
        and match[1] == "soma"
        and f"{name[: match.start()]}.weight" not in weights
    ]
    if absent:
        raise ValueError(
            "SoMA's updates are beside what is left of the pretrained weights "
            "(MODEL.BACKBONE.ADAPTER.SOMA.START paper), and the published code adds those of a "
            "file to the pretrained weights. Convert a checkpoint that has the backbone, or merge "
            "the adapter (--merge-adapters)."
        )


def _fuse_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`attn.q.*`, `attn.k.*` and `attn.v.*` below each other as `attn.qkv.*`."""
    fused = dict(weights)
    for name in weights:
        if SPLIT.search(name):
            parts = [SPLIT.sub(f".attn.{part}.", name) for part in "qkv"]
            if all(part in fused for part in parts):
                fused[SPLIT.sub(".attn.qkv.", name)] = torch.cat([fused.pop(p) for p in parts])
    return fused


def _split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split = {}
    for name, value in weights.items():
        head, fused, tail = name.partition(".attn.qkv.")
        if not fused:
            split[name] = value
            continue
        for part, rows in zip("qkv", value.chunk(3), strict=True):
            split[f"{head}.attn.{part}.{tail}"] = rows
    return split


Table = Sequence[tuple[re.Pattern[str], str]]


@cache
def _tables() -> tuple[Table, Table]:
    """From mmsegmentation's modules to ours, and back; longer names first."""
    forth = list(HEAD_MODULES)
    return _compiled(forth), _compiled([(ours, theirs) for theirs, ours in forth])


def _compiled(pairs: Sequence[tuple[str, str]]) -> Table:
    longest_first = sorted(pairs, key=lambda pair: -len(pair[0]))
    return [
        (
            re.compile("^" + re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)"),
            new.replace("{}", r"\1"),
        )
        for old, new in longest_first
    ]


def _translate(name: str, table: Table) -> str:
    for pattern, new in table:
        translated, count = pattern.subn(new, name)
        if count:
            return translated
    return name
