"""SAM's image encoder (Li et al., 2022, ViTDet) without tables of attention scores.

The function is segment_anything's own, with its weights. It adds to the score of query (y, x) and
key (v, u) what the query makes of the distances, a(y, x, v) + b(y, x, u). That is the product of
the query's two rows a and b with the key's place, a one in row v of the first and in row u of the
second. So queries are lengthened by a and b, keys by their place, and what is left is plain
attention, which torch computes without writing down scores: for an image of 1024x1024 they are
0.8 GB in each global layer of ViT-B, and they are most of what the stock encoder waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def encode(encoder: Any, images: Tensor) -> Tensor:
    """Embeddings of images, (N, 3, S, S) -> (N, C, s, s), as `encoder(images)`.

    Args:
        encoder: `image_encoder` of a `segment_anything.modeling.Sam`. Of another architecture
            (MobileSAM's) it is called as it is.
    """
    if not hasattr(encoder, "blocks"):
        embedded: Tensor = encoder(images)
        return embedded
    x = encoder.patch_embed(images)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = x + _attend_in_windows(block, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    embedded = encoder.neck(x.permute(0, 3, 1, 2))
    return embedded


def _attend_in_windows(block: Any, x: Tensor) -> Tensor:
    """The block's attention on (N, H, W, C), in windows if it has them."""
    from segment_anything.modeling.image_encoder import window_partition, window_unpartition

    if not block.window_size:
        return attend(block.attn, x)
    size = x.shape[1:3]
    windows, padded = window_partition(x, block.window_size)
    joined: Tensor = window_unpartition(
        attend(block.attn, windows), block.window_size, padded, size
    )
    return joined


def attend(attention: Any, x: Tensor) -> Tensor:
    """segment_anything's `attention(x)`, (N, H, W, C) -> (N, H, W, C)."""
    n, height, width, _ = x.shape
    heads = attention.num_heads
    split = attention.qkv(x).view(n, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)  # (N, heads, H * W, d)
    dim = query.shape[-1]
    if attention.use_rel_pos:
        distances = _products_with_distances(attention, query, (height, width))
        query = _lengthened(query * attention.scale, distances)
        key = _lengthened(key, _places(height, width, key).expand(n, heads, -1, -1))
        value = F.pad(value, (0, query.shape[-1] - dim))  # the fast kernels want one length
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :dim]
    else:
        seen = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    joined: Tensor = attention.proj(
        seen.view(n, heads, height, width, dim).permute(0, 2, 3, 1, 4).flatten(3)
    )
    return joined


def _lengthened(vectors: Tensor, more: Tensor) -> Tensor:
    """Both, one after the other, and zeros to the multiple of 8 that kernels in half want."""
    length = vectors.shape[-1] + more.shape[-1]
    return F.pad(torch.cat((vectors, more), dim=-1), (0, -length % 8))


def _products_with_distances(attention: Any, query: Tensor, size: tuple[int, int]) -> Tensor:
    """a and b, see above, one after the other: (N, heads, H * W, H + W).

    Args:
        query: (N, heads, H * W, d).
        size: H, W.
    """
    from segment_anything.modeling.image_encoder import get_rel_pos

    height, width = size
    grid = query.view(*query.shape[:2], height, width, -1)
    rows = get_rel_pos(height, height, attention.rel_pos_h)  # (H, H, d)
    columns = get_rel_pos(width, width, attention.rel_pos_w)
    a = torch.einsum("nhyxc,yvc->nhyxv", grid, rows)
    b = torch.einsum("nhyxc,xuc->nhyxu", grid, columns)
    return torch.cat((a, b), dim=-1).flatten(2, 3)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(H * W, H + W), a one at the pixel's row and a one at H + its column."""
    rows, columns = (torch.eye(n, dtype=like.dtype, device=like.device) for n in (height, width))
    return torch.cat((rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)), dim=1)
