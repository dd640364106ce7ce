"""Rein's and SoMA's published files against our models of their size, names and shapes alone."""

from __future__ import annotations

import pytest
import torch
from reference_adapters import adapter_config, needs_adapter_reference, peft_facts

from clouds.engine.load_report import compare_tensors, rename_older_tensors
from clouds.modeling.build import build_on_meta

pytestmark = needs_adapter_reference

LEFT_OUT = {"rein": 342, "soma": 342 - 24 * 6 - 2}
"""Tensors of DINOv2-L. SoMA's file keeps all biases: six in each block, of the patches, of the last
norm."""


def model_of(name):
    options = {"START": "published"} if name == "soma" else {}
    cfg = adapter_config(name, **options)
    cfg.MODEL.BACKBONE.NAME = "ViT"
    return build_on_meta(cfg)


def report_on(model, shapes):
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return compare_tensors("published.pth", rename_older_tensors(weights, model), model)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("rein", "rein_checkpoint_keys"), ("soma", "published_checkpoint_keys")],
)
def test_a_published_file_is_complete_over_dinov2(name, keys):
    report = report_on(model_of(name), peft_facts("checkpoints")[name][keys])
    assert report.complete
    assert (report.unexpected, report.mismatched) == ((), ())
    assert report.missing == ("criterion.empty_weight",)
    assert len(report.left_out) == LEFT_OUT[name]
    lines = str(report).splitlines()
    assert len(lines) < 24
    assert f"which the file leaves out ({LEFT_OUT[name]})" in str(report)


def test_a_file_with_its_backbone_leaves_nothing_out():
    published = peft_facts("checkpoints")["rein"]
    backbone = {f"backbone.{n}": s for n, s in published["backbone_keys_not_saved"].items()}
    report = report_on(model_of("rein"), published["rein_checkpoint_keys"] | backbone)
    assert report.complete and report.left_out == report.unexpected == report.mismatched == ()


def test_a_file_of_the_other_method_does_not_match():
    report = report_on(model_of("soma"), peft_facts("checkpoints")["rein"]["rein_checkpoint_keys"])
    assert not report.complete
    assert "backbone.adapter.scale" in report.unexpected


def test_the_optimizer_of_the_published_recipes():
    """Which parameters decay, and the learning rate of the backbone."""
    from clouds.engine.mmseg_names import to_mmseg
    from clouds.engine.optimizer import parameter_groups

    for name, factor in (("rein", 1.0), ("soma", 0.5)):
        published = peft_facts("checkpoints")[name]["optimizer_groups"]
        theirs = {g["name"]: (g["lr"], g["weight_decay"], g["n"]) for g in published}
        theirs.pop("backbone.model.mask_token", None)
        cfg = adapter_config(name, **({"START": "published"} if name == "soma" else {}))
        cfg.MODEL.BACKBONE.NAME = "ViT"
        cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER = 1e-4, factor
        ours = {}
        for group in parameter_groups(cfg, build_on_meta(cfg)):
            named = zip(group["param_names"], group["params"], strict=True)
            for key, parameter in to_mmseg(dict(named)).items():
                ours[key] = (group["lr"], group["weight_decay"], parameter.numel())
        assert ours == theirs
