"""Blocks that are computed again in the backward pass: gradients, memory, bad configs."""

from __future__ import annotations

import pytest
import torch
from test_clouds_model import sample, train_step
from tiny_adapter import small_vit, vit_model_config

from clouds.config import ConfigError, load_config
from clouds.modeling.build import build_seeded

KEY = "MODEL__BACKBONE__ACTIVATION_CHECKPOINTING"


class SavedBytes:
    """Bytes that autograd keeps for the backward pass while it is entered."""

    def __init__(self):
        self.total = 0

    def pack(self, tensor):
        self.total += tensor.nbytes
        return tensor


def forward(backbone):
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        torch.manual_seed(0)
        features = backbone(torch.randn(2, 3, 64, 64))
        loss = sum(f.square().mean() for f in features.values())
    return loss, saved.total


@pytest.mark.parametrize("name", ["rein", "lora", "full"])
def test_the_same_gradients_and_fewer_activations(name):
    results = []
    for enabled in (False, True):
        backbone = small_vit(name)
        backbone.activation_checkpointing = enabled
        loss, saved = forward(backbone)
        loss.backward()
        gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
        results.append((loss, saved, gradients))
    (loss, saved, gradients), (other, fewer, others) = results
    assert fewer < saved / 3
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys() and gradients
    for key, value in gradients.items():
        torch.testing.assert_close(others[key], value, msg=key)


def test_a_config_enables_it_in_the_whole_model():
    results = []
    for enabled in (False, True):
        model = build_seeded(vit_model_config("rein", **{KEY: enabled})).train()
        assert model.backbone.activation_checkpointing is enabled
        results.append(train_step(model, [sample(0)]))
    (losses, gradients), (other_losses, others) = results
    assert losses == other_losses and gradients.keys() == others.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(others[key], value, msg=key)


def test_without_a_gradient_nothing_is_computed_again():
    backbone = small_vit("rein").eval()
    with torch.no_grad():
        expected = backbone(torch.ones(1, 3, 64, 64))
        backbone.activation_checkpointing = True
        found = backbone(torch.ones(1, 3, 64, 64))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_other_backbones_are_refused():
    with pytest.raises(ConfigError, match="needs a vision transformer"):
        load_config(None, ["MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", True])
    convnext = {"MODEL__BACKBONE__TIMM_NAME": "test_convnext", KEY: True}
    with pytest.raises(ValueError, match="needs a vision transformer"):
        build_seeded(vit_model_config("none", **convnext))
