"""Building Segment Anything (Kirillov et al., 2023), frozen, from its own packages."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clouds.d2 import CfgNode
from clouds.messages import format_examples, install_extra
from clouds.self_training.refiners.sam.conv_encoder import FINE, STRIDE, ConvEncoder
from clouds.self_training.refiners.sam.similarity_decoder import (
    CoordinateEncoder,
    SimilarityDecoder,
)
from clouds.weights_io import nonfinite_tensors, read_safetensors, read_torch
from clouds.weights_record import find_weights

logger = logging.getLogger(__name__)

OFFICIAL = "https://dl.fbaipublicfiles.com/segment_anything/"
DOWNLOADS = {
    "vit_h": OFFICIAL + "sam_vit_h_4b8939.pth",
    "vit_l": OFFICIAL + "sam_vit_l_0b3195.pth",
    "vit_b": OFFICIAL + "sam_vit_b_01ec64.pth",
    "mobile": "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
}
WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
"""Channels of the image encoder's position embedding, which tell the size of a SAM."""
POSITIONS = "image_encoder.pos_embed"
MOBILE_STEM = "image_encoder.patch_embed.seq.0.c.weight"
STREET_CONTEXT = "mask_decoder.context.weight"

TINY_SIDE, TINY_PATCH, TINY_WIDTH, TINY_PROMPT = 128, 16, 32, 64
STREET_SIDE, STREET_COARSE, STREET_FINE = 320, 64, 24


def build_sam(cfg: CfgNode, device: torch.device | str) -> Any:
    """The SAM that MODEL.CLOUDS.SAM.MODEL names, in evaluation mode, without gradients.

    Random weights, where MODEL.CLOUDS.SAM.WEIGHTS is empty, are a function of SEED; torch's global
    generator is unchanged.

    Returns:
        A `segment_anything.modeling.Sam` (for 'mobile', mobile_sam's, which has the same parts).

    Raises:
        ImportError: the package that the model comes from is not installed.
        FileNotFoundError, ValueError: see `read_weights`; the weights do not fit.
    """
    node = cfg.MODEL.CLOUDS.SAM
    state = read_weights(node.WEIGHTS, node.MODEL) if node.WEIGHTS else None
    sam = random_sam(node.MODEL, cfg.SEED)
    if state is None:
        logger.warning(
            "SAM %s has random weights (MODEL.CLOUDS.SAM.WEIGHTS is empty): "
            "its masks are meaningless",
            node.MODEL,
        )
    else:
        try:
            sam.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"MODEL.CLOUDS.SAM.WEIGHTS: {node.WEIGHTS} does not fit {node.MODEL}: {error}"
            ) from error
    return sam.requires_grad_(False).eval().to(device)


def random_sam(model: str, seed: int) -> Any:
    """A SAM with random weights, a function of `seed`; torch's global generator is unchanged.

    Raises:
        ImportError: the package that the model comes from is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_architecture(model)


def read_weights(path: str | Path, model: str) -> dict[str, torch.Tensor]:
    """Weights from a file, on the CPU.

    Args:
        path: the file, or a name of weights that an installed package offers.
        model: MODEL.CLOUDS.SAM.MODEL.

    Raises:
        FileNotFoundError: there is no such file, or a recorded one is missing.
        ValueError: it cannot be read, is not what its record says (`clouds.weights_record`), holds
            no SAM, or one of another size than `model`.
    """
    try:
        file = find_weights(str(path))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"MODEL.CLOUDS.SAM.WEIGHTS: {error}") from error
    if file is None:
        official = f" They are at {DOWNLOADS[model]}" if model in DOWNLOADS else ""
        raise FileNotFoundError(
            f"MODEL.CLOUDS.SAM.WEIGHTS: there is no file {path}. Name a file with the weights of "
            f"SAM {model}, or set the key to '' for random ones.{official}"
        )
    try:
        state = _read(file)
    except ValueError as error:
        raise ValueError(f"MODEL.CLOUDS.SAM.WEIGHTS: {error}") from error
    size = _size_of(state)
    if size is None:
        raise ValueError(f"MODEL.CLOUDS.SAM.WEIGHTS: {path} does not hold the weights of a SAM")
    if size != model:
        raise ValueError(
            f"MODEL.CLOUDS.SAM.WEIGHTS: {path} seems to hold {size}, but MODEL.CLOUDS.SAM.MODEL "
            f"is {model}. Set that to {size}, or name a file of {model}."
        )
    broken = nonfinite_tensors(state)
    if broken:
        raise ValueError(
            f"MODEL.CLOUDS.SAM.WEIGHTS: {path} has weights that are not finite: "
            f"{format_examples(broken)}. Download it again."
        )
    weights: dict[str, torch.Tensor] = state
    return weights


def _read(path: Path) -> Any:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _size_of(state: Any) -> str | None:
    """The model whose weights these seem to be; None: not SAM's."""
    if not isinstance(state, dict):
        return None
    if MOBILE_STEM in state:
        return "mobile"
    if STREET_CONTEXT in state:
        return "street"
    if POSITIONS not in state:
        return None
    width = state[POSITIONS].shape[-1]
    if width == TINY_WIDTH:
        return "tiny"
    return WIDTHS.get(width, f"a SAM with {width} channels")


def build_architecture(model: str) -> Any:
    """The modules of a SAM of that name, their weights random; raises as `build_sam`."""
    package, install = "segment-anything", install_extra("sam")
    if model == "mobile":
        package = "mobile_sam"
        install = "pip install git+https://github.com/ChaoningZhang/MobileSAM"
    try:
        registry = importlib.import_module(package.replace("-", "_")).sam_model_registry
    except ImportError as error:
        raise ImportError(
            f"MODEL.CLOUDS.SAM.MODEL {model} needs the package {package}: {install}"
        ) from error
    if model == "tiny":
        return _tiny()
    if model == "street":
        return _street()
    return registry["vit_t" if model == "mobile" else model]()


def _tiny() -> Any:
    """A SAM with all parts of the real one, long side 128, for tests."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    cells = TINY_SIDE // TINY_PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=TINY_SIDE,
            patch_size=TINY_PATCH,
            embed_dim=TINY_WIDTH,
            depth=2,
            num_heads=2,
            out_chans=TINY_PROMPT,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=TINY_PROMPT,
            image_embedding_size=(cells, cells),
            input_image_size=(TINY_SIDE, TINY_SIDE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=TINY_PROMPT,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=TINY_PROMPT, mlp_dim=128, num_heads=8
            ),
        ),
    )


def _street() -> Any:
    """Street-SAM: 4 million parameters, long side 320, masks from similarity to the points."""
    from segment_anything.modeling import Sam

    dim, cells = STREET_COARSE + FINE**2 * STREET_FINE, STREET_SIDE // STRIDE
    return Sam(
        image_encoder=ConvEncoder(STREET_SIDE, STREET_COARSE, STREET_FINE),
        prompt_encoder=CoordinateEncoder(dim, cells, STREET_SIDE),
        mask_decoder=SimilarityDecoder(STREET_COARSE, STREET_FINE),
    )
