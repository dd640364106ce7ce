"""The sine position encoding by hand and against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers_weights import mask2former

from clouds.modeling.pixel_decoder.msdeformattn import sine_position_encoding


def test_numbers_by_hand():
    """2 rows, 4 columns: y at pi and 2 pi, x at quarters of a turn; both frequencies are 1."""
    encoding = sine_position_encoding(2, 4, 4)
    assert encoding.shape == (4, 2, 4)
    sin_y, cos_y, sin_x, cos_x = encoding
    tolerance = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(sin_y, torch.zeros(2, 4), **tolerance)
    torch.testing.assert_close(cos_y, torch.tensor([[-1.0] * 4, [1.0] * 4]), **tolerance)
    torch.testing.assert_close(sin_x, torch.tensor([[1.0, 0.0, -1.0, 0.0]] * 2), **tolerance)
    torch.testing.assert_close(cos_x, torch.tensor([[0.0, -1.0, 0.0, 1.0]] * 2), **tolerance)


def test_frequencies_fall_by_hand():
    """8 channels: 4 for y, the first pair at wavelength 1, the second at sqrt(10000) = 100."""
    encoding = sine_position_encoding(1, 1, 8)[:4, 0, 0].tolist()
    turn = 2 * math.pi
    assert encoding == pytest.approx(
        [math.sin(turn), math.cos(turn), math.sin(turn / 100), math.cos(turn / 100)], abs=1e-5
    )


@pytest.mark.parametrize(("height", "width", "channels"), [(5, 9, 16), (24, 7, 256), (1, 1, 4)])
def test_against_transformers(height, width, channels):
    embed = mask2former().Mask2FormerSinePositionEmbedding(channels // 2, normalize=True)
    theirs = embed(torch.Size((1, channels, height, width)), "cpu", torch.float32)[0]
    ours = sine_position_encoding(height, width, channels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
