"""SAM's image encoder and mask decoder with segment_anything's modules, faster and in less memory.

Image encoder (ViTDet, Li et al., 2022): no matrix of attention scores is stored. With relative
positions, the score of query (y, x) and key (v, u) has the terms a(y, x, v) + b(y, x, u) added.
This is the product of the query's rows a and b with one-hot vectors of the key's row v and column
u. So a and b are concatenated to the queries and the one-hot vectors to the keys, and plain scaled
dot-product attention remains, which torch computes without storing scores. For an image of
1024x1024 they take 0.8 GB in each global layer of ViT-B.

Mask decoder (Kirillov et al., 2023, appendix A), for few points and many prompts:

- An image has thousands of tokens, a prompt about ten. So the projections of the image tokens
  (query, key, value, output) are multiplied into the prompt tokens instead.
- Tokens stay (N, tokens, channels) to the end, where a transposed convolution of stride 2 and
  kernel size 2 is a linear layer on each token. Nothing is transposed or repeated per prompt.
- The predicted IoUs do not depend on the masks, so only the mask with the largest one is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def encode(encoder: Any, images: Tensor) -> Tensor:
    """`encoder(images)`: embeddings of images, (N, 3, S, S) -> (N, C, s, s).

    Args:
        encoder: `image_encoder` of a `segment_anything.modeling.Sam`. One of another architecture
            (MobileSAM's) is called unchanged.
    """
    if not hasattr(encoder, "blocks"):
        embedding: Tensor = encoder(images)
        return embedding
    x = encoder.patch_embed(images)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = x + _block_attention(block, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    embedding = encoder.neck(x.permute(0, 3, 1, 2))
    return embedding


def _block_attention(block: Any, x: Tensor) -> Tensor:
    """A block's attention on (N, H, W, C), in windows if the block has them."""
    from segment_anything.modeling.image_encoder import window_partition, window_unpartition

    if not block.window_size:
        return attend(block.attn, x)
    size = x.shape[1:3]
    windows, padded_size = window_partition(x, block.window_size)
    out: Tensor = window_unpartition(
        attend(block.attn, windows), block.window_size, padded_size, size
    )
    return out


def attend(attention: Any, x: Tensor) -> Tensor:
    """`attention(x)` of segment_anything's image encoder, (N, H, W, C) -> (N, H, W, C)."""
    n, height, width, _ = x.shape
    num_heads = attention.num_heads
    qkv = attention.qkv(x).view(n, height * width, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)  # (N, num_heads, H * W, d)
    dim = query.shape[-1]
    if attention.use_rel_pos:
        terms = _relative_position_terms(attention, query, (height, width))
        query = _concat_and_pad(query * attention.scale, terms)
        one_hot = _one_hot_positions(height, width, key)
        key = _concat_and_pad(key, one_hot.expand(n, num_heads, -1, -1))
        value = F.pad(value, (0, query.shape[-1] - dim))  # the fast kernels need equal lengths
        out = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :dim]
    else:
        out = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    projected: Tensor = attention.proj(
        out.view(n, num_heads, height, width, dim).permute(0, 2, 3, 1, 4).flatten(3)
    )
    return projected


def _concat_and_pad(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate and pad to a multiple of 8 elements, as kernels for half precision need it."""
    length = first.shape[-1] + second.shape[-1]
    return F.pad(torch.cat((first, second), dim=-1), (0, -length % 8))


def _relative_position_terms(attention: Any, query: Tensor, size: tuple[int, int]) -> Tensor:
    """a and b of the module docstring, concatenated: (N, num_heads, H * W, H + W)."""
    from segment_anything.modeling.image_encoder import get_rel_pos

    height, width = size
    grid = query.view(*query.shape[:2], height, width, -1)
    rows = get_rel_pos(height, height, attention.rel_pos_h)  # (H, H, d)
    columns = get_rel_pos(width, width, attention.rel_pos_w)
    a = torch.einsum("nhyxc,yvc->nhyxv", grid, rows)
    b = torch.einsum("nhyxc,xuc->nhyxu", grid, columns)
    return torch.cat((a, b), dim=-1).flatten(2, 3)


def _one_hot_positions(height: int, width: int, like: Tensor) -> Tensor:
    """(H * W, H + W), of each pixel a one at its row and a one at H + its column."""
    rows, columns = (torch.eye(n, dtype=like.dtype, device=like.device) for n in (height, width))
    return torch.cat((rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)), dim=1)


def best_masks(
    decoder: Any, pixels: Tensor, positions: Tensor, prompts: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The best of SAM's three masks of each prompt.

    Args:
        decoder: `mask_decoder` of a `segment_anything.modeling.Sam`, in evaluation mode.
        pixels: (M, h * w, C), the image embedding plus the dense prompt embedding.
        positions: (h * w, C), the position encoding of the pixels.
        prompts: (M, p, C), the sparse prompt embeddings.
        size: h, w.

    Returns:
        logits: (M, 1, 4h, 4w), of the mask with the largest predicted IoU.
        ious: (M, 3), the predicted IoU of all three.
    """
    output_tokens = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens = torch.cat((output_tokens.expand(len(prompts), -1, -1), prompts), dim=1)
    tokens, pixels = _transform(decoder.transformer, tokens, pixels, positions)
    ious = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]  # the first is that of the single mask
    best = ious.argmax(1)
    networks = enumerate(decoder.output_hypernetworks_mlps[1:], start=2)
    kernels = torch.stack([network(tokens[:, number]) for number, network in networks], dim=1)
    kernel = kernels[torch.arange(len(best), device=best.device), best]
    return _mask_logits(decoder.output_upscaling, pixels, kernel, size), ious


def _transform(
    transformer: Any, prompts: Tensor, pixels: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """`TwoWayTransformer`: prompt tokens (M, t, C) and pixels (M, n, C), of the same shapes."""
    tokens, keys = prompts, pixels + positions
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = layer.norm1(layer.self_attn(tokens, tokens, tokens))
        else:
            query = tokens + prompts
            tokens = layer.norm1(tokens + layer.self_attn(query, query, tokens))
        attended = _token_to_image(layer.cross_attn_token_to_image, tokens + prompts, pixels, keys)
        tokens = layer.norm2(tokens + attended)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        attention = layer.cross_attn_image_to_token
        pixels = layer.norm4(_add_image_to_token(attention, pixels, keys, tokens + prompts, tokens))
        keys = pixels + positions
    attention = transformer.final_attn_token_to_image
    attended = _token_to_image(attention, tokens + prompts, pixels, keys)
    return transformer.norm_final_attn(tokens + attended), pixels


def _mask_logits(upscaling: Any, pixels: Tensor, kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Upscaled pixels (M, n, C) times a kernel (M, c): (M, 1, 4 * height, 4 * width)."""
    first, norm, activation, second, second_activation = upscaling
    x = _conv_transpose_2x2(pixels, first)
    x = activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    x = second_activation(_conv_transpose_2x2(x, second))
    height, width = size
    logits: Tensor = x.flatten(1, -2) @ kernel[..., None]
    # each pixel became 2x2 pixels, and each of these 2x2 again
    logits = logits.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    return logits.reshape(-1, 1, 4 * height, 4 * width)


def as_tokens(image: Tensor) -> Tensor:
    """A view of an image (..., C, h, w) as (..., h * w, C)."""
    return image.flatten(-2).transpose(-1, -2)


def _token_to_image(attention: Any, query: Tensor, pixels: Tensor, keys: Tensor) -> Tensor:
    """segment_anything's `attention(q=query, k=keys, v=pixels)`, for few queries.

    q·(W_k k) is (W_kᵀ q)·k, and the key's bias adds the same to all scores of a query. The
    weighted mean of W_v v + b_v is W_v times that of v, plus b_v.

    query (M, t, C); pixels, keys (M, n, C) -> (M, t, C)
    """
    num_heads = attention.num_heads
    query = _split_heads(attention.q_proj(query), num_heads)
    key_weight = _weight_per_head(attention.k_proj, num_heads)
    value_weight = _weight_per_head(attention.v_proj, num_heads)
    means = F.scaled_dot_product_attention(
        (query @ key_weight).flatten(1, 2)[:, None],
        keys[:, None],
        pixels[:, None],
        scale=query.shape[-1] ** -0.5,
    )
    values = means.reshape(*query.shape[:3], -1) @ value_weight.transpose(1, 2)
    out: Tensor = attention.out_proj(values.transpose(1, 2).flatten(2) + attention.v_proj.bias)
    return out


def _add_image_to_token(
    attention: Any, pixels: Tensor, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """`pixels` plus segment_anything's `attention(q=queries, k=keys, v=values)`, for few keys.

    (W_q q + b_q)·k is q·(W_qᵀ k) + b_q·k. The output's bias is divided among the heads, in each of
    which the weights of all keys add up to one.

    pixels, queries (M, n, C); keys, values (M, t, C) -> (M, n, C)
    """
    num_heads = attention.num_heads
    key = _split_heads(attention.k_proj(keys), num_heads)
    key = key * key.shape[-1] ** -0.5
    value = _split_heads(attention.v_proj(values), num_heads)
    bias = (key @ attention.q_proj.bias.view(num_heads, -1, 1)).flatten(1, 2)
    key = (key @ _weight_per_head(attention.q_proj, num_heads)).flatten(1, 2)
    scores = torch.baddbmm(bias, key, queries.transpose(1, 2))  # (M, num_heads * t, n)
    weights = scores.view(*value.shape[:3], -1).softmax(2).flatten(1, 2)
    out_weight = attention.out_proj.weight.T.view(num_heads, value.shape[-1], -1)
    value = (value @ out_weight).flatten(1, 2)
    out_bias = attention.out_proj.bias / num_heads
    return torch.baddbmm(pixels, weights.transpose(1, 2), value + out_bias)


def _split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(M, t, num_heads * d) -> (M, num_heads, t, d)."""
    return tokens.view(*tokens.shape[:2], num_heads, -1).transpose(1, 2)


def _weight_per_head(projection: Any, num_heads: int) -> Tensor:
    """The weight of a linear layer, (num_heads, d, C)."""
    weight: Tensor = projection.weight
    return weight.view(num_heads, -1, weight.shape[1])


def _conv_transpose_2x2(tokens: Tensor, conv: Any) -> Tensor:
    """A transposed convolution of kernel size 2 and stride 2: (..., c) -> (..., 2, 2, c')."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(tokens, weight, conv.bias.repeat(4)).view(*tokens.shape[:-1], 2, 2, -1)
