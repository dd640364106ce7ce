"""Bytes of tensors that exist, counted by hand, on the CPU and on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clouds.engine.live_memory import GpuKernels, LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_exists_is_counted_once(device):
    before = torch.empty(1000, device=device)
    with LiveBytes() as live:
        before.add_(1)
        before.view(10, 100)
        assert live.now == 0
        first = torch.empty(500, device=device)
        view = first.view(5, 100)
        second = first.double()
        assert live.now == 500 * 4 + 500 * 8
        del second
        assert (live.now, live.take_peak(), live.peak) == (2000, 6000, 2000)
        del first
        assert live.now == 2000  # the view holds it
        del view
        assert live.now == 0 and live.peak == 2000


def test_what_autograd_keeps_is_counted():
    weight = torch.empty(10, 100, device="meta", requires_grad=True)
    with LiveBytes() as live:
        x = torch.empty(50, 100, device="meta")
        y = F.linear(x, weight).sigmoid().sum()
        assert live.now == 4 * (50 * 100 + 50 * 10 + 1)  # x and the sigmoid, not its input
        del x
        assert live.now == 4 * (50 * 100 + 50 * 10 + 1)
        y.backward()
        del y
        assert live.now == 4 * 10 * 100  # the gradient


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_scores(masked):
    query = torch.empty(1, 2, 256, 8, device="meta", requires_grad=True)
    mask = torch.empty(1, 1, 256, 256, dtype=torch.bool, device="meta") if masked else None
    with LiveBytes() as live, GpuKernels(half=False):
        out = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        kept = out.nbytes + 2 * 256 * 4 + masked * 256 * 256 * 4  # the logs of the sums; the mask
        assert out.shape == query.shape
        assert kept <= live.now < kept + 2000 < 2 * 256 * 256 * 4
        out.sum().backward()
    assert query.grad.shape == query.shape


def test_half_precision_follows_autocast_on_cuda():
    linear, norm = nn.Linear(16, 16, device="meta"), nn.LayerNorm(16, device="meta")
    x = torch.empty(4, 16, device="meta")
    with LiveBytes() as live, GpuKernels(half=True):
        first = linear(x)
        once = live.now
        second = linear(first)
        # a copy of the input, of the weight and of the bias, and the output; then the output alone
        assert once == 2 * (4 * 16 + 16 * 16 + 16 + 4 * 16)
        assert live.now - once == 2 * 4 * 16
        assert (first.dtype, norm(second).dtype) == (torch.bfloat16, torch.float32)
        assert (second @ x.T).dtype == torch.bfloat16
    with GpuKernels(half=False):
        assert linear(x).dtype == torch.float32
