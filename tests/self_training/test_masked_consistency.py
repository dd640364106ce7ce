"""Masked blocks of the student's view."""

from __future__ import annotations

import pytest
import torch

from clouds.config import get_cfg
from clouds.d2 import ImageList
from clouds.data.structures import Domain
from clouds.self_training.masked_consistency import BlockMasking, hide_blocks


def test_blocks_are_whole_and_cut_at_the_border():
    visible = BlockMasking(0.5, 8).visible(20, 27, seed=3)
    assert visible.shape == (20, 27) and visible.dtype == torch.bool
    for y in range(0, 20, 8):
        for x in range(0, 27, 8):
            block = visible[y : y + 8, x : x + 8]
            assert (block == block[0, 0]).all()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_the_share_of_hidden_blocks(ratio):
    visible = BlockMasking(ratio, 1).visible(200, 250, seed=1)
    # 4 standard deviations of a share of 50,000 independent blocks
    assert (~visible).float().mean().item() == pytest.approx(ratio, abs=4 * 0.5 / 50_000**0.5)


def test_the_seed_alone_decides():
    masking = BlockMasking(0.7, 16)
    assert torch.equal(masking.visible(96, 128, 5), masking.visible(96, 128, 5))
    assert not torch.equal(masking.visible(96, 128, 5), masking.visible(96, 128, 6))


def test_generated_images_alone_are_masked_with_0_and_not_their_padding():
    images = ImageList.from_tensors([torch.ones(3, 48, 64), torch.ones(3, 40, 64)], 32)
    batch = [
        {"domain": Domain.SOURCE, "seed": 4},
        {"domain": Domain.GENERATED, "seed": 4},
    ]
    images.tensor += 1  # padding is 1, images are 2
    masking = BlockMasking(0.7, 16)
    hide_blocks(masking, batch, images)
    assert (images.tensor[0, :, :48] == 2).all()
    visible = masking.visible(40, 64, 4)
    assert torch.equal(images.tensor[1, :, :40], 2.0 * visible.expand(3, 40, 64))
    assert (images.tensor[1, :, 40:] == 1).all()


def test_it_comes_from_the_config():
    cfg = get_cfg()
    assert BlockMasking.from_config(cfg) is None
    cfg.MODEL.CLOUDS.MASKED_CONSISTENCY.RATIO = 0.7
    assert BlockMasking.from_config(cfg) == BlockMasking(0.7, 64)
