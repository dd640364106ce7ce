"""MODEL.COMPILE with a backend that runs the traced graphs as they are: no C++ compiler needed."""

from __future__ import annotations

import functools

import pytest
import torch
from joint_samples import generated, joint_model, source
from tiny_model import tiny_model

from clouds.config import get_cfg


@pytest.fixture
def traced(monkeypatch):
    """The graphs that torch.compile has traced."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield graphs
    torch.compiler.reset()


def step(model, batch):
    losses = model.train()(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


@pytest.mark.parametrize("part", ["backbone", "head"])
def test_a_joint_step_equals_the_eager_one(part, traced):
    """Both the student's head and the teacher's, another module with `final_only`."""
    batch = [source(0), generated(1)]
    plain, compiled = joint_model(), joint_model(MODEL__COMPILE=part)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    losses, gradients = step(compiled, batch)
    assert traced
    expected, expected_gradients = step(plain, batch)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=float(1e-5 * largest))


def test_evaluation_of_several_sizes_equals_the_eager_one(traced):
    plain, compiled = tiny_model().eval(), tiny_model(MODEL__COMPILE="all").eval()
    for height, width in ((64, 96), (96, 64)):
        batch = [{"image": source(0, height, width)["image"]}]
        with torch.no_grad():
            (got,), (expected,) = compiled(batch), plain(batch)
        torch.testing.assert_close(got["sem_seg"], expected["sem_seg"], rtol=1e-4, atol=1e-5)
    assert len(traced) >= 2


def test_nothing_is_compiled_by_default(traced):
    assert get_cfg().MODEL.COMPILE == "none"
    with torch.no_grad():
        tiny_model().eval()([{"image": source(0)["image"]}])
    assert not traced
