"""Names of Rein's and SoMA's checkpoints, and ours."""

from __future__ import annotations

import pytest
import torch
from reference_adapters import needs_adapter_reference, peft_facts

from clouds.engine.mmseg_names import from_mmseg, is_mmseg, to_mmseg


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(weights):
    return {name: list(value.shape) for name, value in weights.items()}


@needs_adapter_reference
@pytest.mark.parametrize("kind", ["rein", "plain"])
def test_names_of_the_head_are_those_of_detectron2(kind):
    table = peft_facts("rein_head")["to_detectron2"][kind]
    for theirs, ours in table.items():
        if ours is None:
            assert theirs.startswith("querys2feat.")
            ours = theirs.replace("querys2feat", "predictor.query_to_feat")
        weights = from_mmseg({f"decode_head.{theirs}": torch.empty(0)})
        assert list(weights) == [f"sem_seg_head.{ours}"]
        assert list(to_mmseg(weights)) == [f"decode_head.{theirs}"]


@needs_adapter_reference
@pytest.mark.parametrize(
    ("kind", "keys", "ours"),
    [
        ("rein", "rein_checkpoint_keys", 303),
        ("soma", "published_checkpoint_keys", 679 - 1 - 2 * (24 + 2 * 16)),
    ],
)
def test_published_files_there_and_back(kind, keys, ours):
    """SoMA's: 679 names without mask_token, and one for three of query, key and value.

    In each of 24 blocks one bias for three, in each of 16 blocks also a factor A and a factor B.
    """
    published = meta(peft_facts("checkpoints")[kind][keys])
    assert is_mmseg(published)
    weights = from_mmseg(published)
    assert len(weights) == ours
    assert not is_mmseg(weights)
    published.pop("backbone.model.mask_token", None)
    assert shapes_of(to_mmseg(weights)) == shapes_of(published)


def test_query_key_and_value_are_rows_in_this_order():
    names = [f"backbone.model.blocks.0.attn.{part}.lora_A.weight" for part in "qkv"]
    published = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    weights = from_mmseg(published)
    fused = weights["backbone.transformer.blocks.0.attn.qkv.updates.soma_added.lora_A"]
    assert fused[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    back = to_mmseg(weights)
    assert all(torch.equal(back[name], published[name]) for name in names)


def test_a_backbone_under_either_name():
    for prefix in ("backbone.", "backbone.model."):
        weights = from_mmseg({f"{prefix}blocks.3.mlp.fc1.weight": torch.empty(0)})
        assert list(weights) == ["backbone.transformer.blocks.3.mlp.fc1.weight"]


def test_what_mmsegmentation_has_no_name_for_is_refused():
    weights = {"sem_seg_head.predictor._mask_pooling_proj.0.weight": torch.empty(0)}
    with pytest.raises(ValueError, match=r"1 tensors have no name.*_mask_pooling_proj"):
        to_mmseg(weights)
    name = "backbone.transformer.blocks.0.attn.qkv.updates.lora.lora_A"
    with pytest.raises(ValueError, match="merge other adapters"):
        to_mmseg({name: torch.empty(0)})


def test_updates_beside_the_rest_of_a_weight_are_not_given_without_it():
    name = "backbone.transformer.blocks.0.mlp.fc1.updates.soma.lora_A"
    with pytest.raises(ValueError, match="START paper"):
        to_mmseg({name: torch.empty(1, 1)})
    whole = {name: torch.empty(1, 1), "backbone.transformer.blocks.0.mlp.fc1.weight": torch.ones(1)}
    assert sorted(to_mmseg(whole)) == [
        "backbone.model.blocks.0.mlp.fc1.lora_A.weight",
        "backbone.model.blocks.0.mlp.fc1.weight",
    ]
