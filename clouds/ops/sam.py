"""SAM's image encoder and mask decoder, faster and in less memory, with segment_anything's weights.

Image encoder (ViTDet, Li et al., 2022), without matrices of attention scores: the score of query
(y, x) and key (v, u) has the query's relative-position terms a(y, x, v) + b(y, x, u) added. That is
the product of the query's two rows a and b with one-hot vectors of the key's row v and column u. So
a and b are concatenated to the queries, the one-hot vectors to the keys, and plain scaled
dot-product attention remains, which torch computes without storing scores: for an image of
1024x1024 they take 0.8 GB in each global layer of ViT-B.

Mask decoder (Kirillov et al., 2023, appendix A), for few points and many components:

- An image has thousands of tokens, a prompt about ten. A projection between their attention's query
  and key is therefore multiplied into the prompt's side, and so are those of its values and of its
  output; image tokens are not projected.
- Tokens stay (N, tokens, channels) to the end, where a transposed convolution of stride 2 and
  kernel 2 is a product with every token. Nothing is transposed or repeated for each component.
- Predicted IoUs need no mask, so only the mask with the largest one is computed.
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


def best_masks(
    decoder: Any, pixels: Tensor, positions: Tensor, prompts: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The best of SAM's three masks of each prompt.

    Args:
        decoder: `mask_decoder` of a `segment_anything.modeling.Sam`, in evaluation mode.
        pixels: (M, h * w, C), the image's embedding and the dense prompt's, added.
        positions: (h * w, C), embeddings of the pixels' places.
        prompts: (M, p, C), embeddings of the sparse prompts.
        size: h, w.

    Returns:
        logits: (M, 1, 4h, 4w), of the mask with the largest predicted IoU.
        ious: (M, 3), the predicted IoU of all three.
    """
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens = torch.cat((own.expand(len(prompts), -1, -1), prompts), dim=1)
    tokens, pixels = _transform(decoder.transformer, tokens, pixels, positions)
    ious = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]  # without the single mask's
    best = ious.argmax(1)
    kernels = torch.stack(
        [
            network(tokens[:, number])
            for number, network in enumerate(decoder.output_hypernetworks_mlps[1:], start=2)
        ],
        dim=1,
    )
    kernel = kernels[torch.arange(len(best), device=best.device), best]
    return _mask(decoder.output_upscaling, pixels, kernel, size), ious


def _transform(
    transformer: Any, prompts: Tensor, pixels: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Prompts (M, t, C) and pixels (M, n, C) that have looked at each other."""
    tokens, placed = prompts, pixels + positions
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = layer.norm1(layer.self_attn(tokens, tokens, tokens))
        else:
            asking = tokens + prompts
            tokens = layer.norm1(tokens + layer.self_attn(asking, asking, tokens))
        seen = _look_at_pixels(layer.cross_attn_token_to_image, tokens + prompts, pixels, placed)
        tokens = layer.norm2(tokens + seen)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        attention = layer.cross_attn_image_to_token
        pixels = layer.norm4(_add_tokens(attention, pixels, placed, tokens + prompts, tokens))
        placed = pixels + positions
    attention = transformer.final_attn_token_to_image
    seen = _look_at_pixels(attention, tokens + prompts, pixels, placed)
    return transformer.norm_final_attn(tokens + seen), pixels


def _mask(upscaling: Any, pixels: Tensor, kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (M, 1, 4 * height, 4 * width): upscaled pixels (M, n, C) times a kernel (M, c)."""
    first, norm, activate, second, activate_again = upscaling
    x = _four_for_one(pixels, first)
    x = activate(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    x = activate_again(_four_for_one(x, second))
    height, width = size
    logits: Tensor = x.flatten(1, -2) @ kernel[..., None]
    # which of four by four: half of the height and width, then quarter of both
    logits = logits.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    return logits.reshape(-1, 1, 4 * height, 4 * width)


def as_tokens(image: Tensor) -> Tensor:
    """A view of an image (..., C, h, w), which is (..., h * w, C)."""
    return image.flatten(-2).transpose(-1, -2)


def _look_at_pixels(attention: Any, asking: Tensor, pixels: Tensor, placed: Tensor) -> Tensor:
    """segment_anything's `attention(q=asking, k=placed, v=pixels)`, for few that ask.

    q·(W_k k) is (W_kᵀ q)·k, and the key's bias adds the same to all of a token's scores. The
    weighted mean of W_v v + b_v is W_v times that of v, plus b_v.

    Args:
        asking: (M, t, C).
        pixels, placed: (M, n, C).

    Returns:
        (M, t, C).
    """
    heads = attention.num_heads
    queries = _split(attention.q_proj(asking), heads)
    key = _weight_of_heads(attention.k_proj, heads)
    value = _weight_of_heads(attention.v_proj, heads)
    found = F.scaled_dot_product_attention(
        (queries @ key).flatten(1, 2)[:, None],
        placed[:, None],
        pixels[:, None],
        scale=queries.shape[-1] ** -0.5,
    )
    seen = found.reshape(*queries.shape[:3], -1) @ value.transpose(1, 2)
    joined: Tensor = attention.out_proj(seen.transpose(1, 2).flatten(2) + attention.v_proj.bias)
    return joined


def _add_tokens(
    attention: Any, pixels: Tensor, placed: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """`pixels` plus segment_anything's `attention(q=placed, k=keys, v=values)`, for few keys.

    (W_q q + b_q)·k is q·(W_qᵀ k) + b_q·k. The output's bias is shared out among the heads, in
    each of which the weights of all keys add up to one.

    Args:
        pixels, placed: (M, n, C).
        keys, values: (M, t, C).

    Returns:
        (M, n, C).
    """
    heads = attention.num_heads
    key = _split(attention.k_proj(keys), heads)
    key = key * key.shape[-1] ** -0.5
    value = _split(attention.v_proj(values), heads)
    bias = (key @ attention.q_proj.bias.view(heads, -1, 1)).flatten(1, 2)
    key = (key @ _weight_of_heads(attention.q_proj, heads)).flatten(1, 2)
    scores = torch.baddbmm(bias, key, placed.transpose(1, 2))  # (M, heads * t, n)
    weights = scores.view(*value.shape[:3], -1).softmax(2).flatten(1, 2)
    value = (value @ attention.out_proj.weight.T.view(heads, value.shape[-1], -1)).flatten(1, 2)
    return torch.baddbmm(pixels, weights.transpose(1, 2), value + attention.out_proj.bias / heads)


def _split(tokens: Tensor, heads: int) -> Tensor:
    """(M, t, heads * d) -> (M, heads, t, d)."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


def _weight_of_heads(projection: Any, heads: int) -> Tensor:
    """The weight of a linear layer, (heads, d, C)."""
    weight: Tensor = projection.weight
    return weight.view(heads, -1, weight.shape[1])


def _four_for_one(tokens: Tensor, conv: Any) -> Tensor:
    """A transposed convolution of kernel 2 and stride 2: (..., c) -> (..., 2, 2, c')."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(tokens, weight, conv.bias.repeat(4)).view(*tokens.shape[:-1], 2, 2, -1)
