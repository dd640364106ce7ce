"""Rein's head and SoMA's head of mmsegmentation against ours, for the same weights and features."""

from __future__ import annotations

import pytest
import torch
from reference_adapters import (
    assert_close,
    needs_adapter_reference,
    peft_arrays,
    peft_facts,
    value_of,
)

from clouds.config import get_cfg
from clouds.d2 import ShapeSpec
from clouds.data.structures import masks_from_label
from clouds.engine.mmseg_names import from_mmseg
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.meta_arch.head import CLOUDSHead
from clouds.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
from clouds.modeling.postprocessing import SemanticMap
from clouds.modeling.transformer_decoder.decoder import CLASS_HEADS, Predictions

pytestmark = needs_adapter_reference

FEATURES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@pytest.fixture(scope="module")
def reference():
    return peft_arrays("rein_head")


def build_head(kind):
    """Our head of the reference's sizes, with its weights under mmsegmentation's names."""
    pixel_decoder = MSDeformAttnPixelDecoder(
        {name: ShapeSpec(channels=96, stride=stride) for name, stride in FEATURES.items()},
        transformer_in_features=["res3", "res4", "res5"],
        conv_dim=64,
        mask_dim=64,
        num_layers=2,
        num_heads=8,
        dim_feedforward=128,
        dropout=0.0,
        implementation="torch",
    )
    predictor = CLASS_HEADS["linear"](
        in_channels=64,
        hidden_dim=64,
        mask_dim=64,
        num_classes=19,
        embed_dim=0,
        num_queries=0 if kind == "rein" else 20,
        num_layers=3,
        num_heads=8,
        dim_feedforward=256,
        dropout=0.0,
        num_levels=3,
    )
    head = CLOUDSHead(pixel_decoder=pixel_decoder, predictor=predictor)
    entries = peft_facts("rein_head")["keys"][kind]
    published = {f"decode_head.{entry['name']}": value_of(entry) for entry in entries}
    weights = from_mmseg(published)
    head.load_state_dict({n.removeprefix("sem_seg_head."): v for n, v in weights.items()})
    return head.eval()


@pytest.fixture(scope="module", params=["rein", "plain"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def predictions(kind, reference):
    features = {n: torch.from_numpy(reference[f"in/stride{s}"]) for n, s in FEATURES.items()}
    queries = torch.from_numpy(reference["in/queries"]) if kind == "rein" else None
    with torch.no_grad():
        return build_head(kind)(features, queries=queries)


def test_all_predictions(kind, predictions, reference):
    assert len(predictions.class_logits) == 4
    for i, (classes, masks) in enumerate(
        zip(predictions.class_logits, predictions.mask_logits, strict=True)
    ):
        assert_close(classes, reference[f"{kind}/cls_pred_{i}"], name=f"classes {i}")
        assert_close(masks, reference[f"{kind}/mask_pred_{i}"], name=f"masks {i}")


def test_semantic_map(kind, predictions, reference):
    classes, masks = predictions.final
    probabilities = classes.softmax(-1)[..., :-1]
    maps = [
        SemanticMap(p, m, (96, 128), (96, 128), 100).scores()
        for p, m in zip(probabilities, masks, strict=True)
    ]
    assert_close(torch.stack(maps)[..., ::2, ::2], reference[f"{kind}/seg_logits"])


@pytest.mark.parametrize("layer", range(4))
def test_losses_of_one_prediction(layer, reference):
    """Of Rein's head, which the reference has alone."""
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 19
    criterion = SetCriterion.from_config(cfg)
    predictions = Predictions(
        [torch.from_numpy(reference[f"rein/cls_pred_{layer}"])],
        [torch.from_numpy(reference[f"rein/mask_pred_{layer}"])],
    )
    labels = torch.from_numpy(reference["loss/labels"])
    targets = [masks_from_label(label, 255, torch.device("cpu")) for label in labels]
    torch.manual_seed(100 + layer)
    losses = criterion(predictions, targets, None)
    for ours, theirs in (("loss_ce", "cls"), ("loss_mask", "mask"), ("loss_dice", "dice")):
        assert_close(losses[ours], reference[f"loss/loss_{theirs}_{layer}"], name=ours)
