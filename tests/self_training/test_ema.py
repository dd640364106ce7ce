"""The teacher: a moving average beside the model, and what of it survives a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clouds.self_training.ema import EMATeacher, label_from_scores


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_the_average_is_the_geometric_sum_of_the_students_weights():
    student = layers()
    teacher = EMATeacher(student, momentum=0.9, interval=1)
    weight = student[0].weight
    seen = [weight.detach().double().clone()]
    teacher.restart()
    for i in range(5):
        with torch.no_grad():
            weight += 0.3 * i - 0.5
        teacher.update()
        seen.append(weight.detach().double().clone())
    # after n updates: m^n w_0 + (1 - m) sum_k m^(n - k) w_k
    expected = 0.9**5 * seen[0] + 0.1 * sum(0.9 ** (5 - k) * seen[k] for k in range(1, 6))
    torch.testing.assert_close(teacher.head[0].weight.double(), expected, atol=1e-6, rtol=1e-6)


def test_updates_come_after_every_interval():
    teacher = EMATeacher(layers(), 0.9, interval=100)
    assert [i for i in range(301) if teacher.due(i)] == [99, 199, 299]


def test_it_never_trains_and_is_no_part_of_the_student():
    student = layers().train()
    teacher = EMATeacher(student, 0.9, 1)
    assert not any(p.requires_grad for p in teacher.head.parameters())
    assert not any(m.training for m in teacher.head.modules())
    assert student.training and all(p.requires_grad for p in student.parameters())
    mine = {p.data_ptr() for p in student.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in teacher.head.parameters())


def test_buffers_are_those_of_the_student():
    student = layers().train()
    teacher = EMATeacher(student, 0.9, 1)
    teacher.restart()
    student(torch.randn(8, 3))
    teacher.update()
    assert torch.equal(teacher.head[1].running_mean, student[1].running_mean)
    assert teacher.head[1].num_batches_tracked == 1


def test_its_state_comes_back():
    student = layers()
    teacher = EMATeacher(student, 0.5, 1)
    teacher.restart()
    with torch.no_grad():
        student[0].weight += 1
    teacher.update()
    other = EMATeacher(layers(seed=1), 0.5, 1)
    other.load_state_dict(teacher.state_dict())
    for name, value in teacher.head.state_dict().items():
        assert torch.equal(value, other.head.state_dict()[name])


def test_confidence_is_the_share_of_the_best_class():
    scores = torch.tensor([[[0.6, 1.5, 0.03]], [[0.2, 0.5, 0.01]]])
    label = label_from_scores(scores)
    assert label.classes.tolist() == [[0, 0, 0]]
    assert label.classes.dtype == torch.uint8
    # 0.6 of a sum of 0.8 (below 1, so as it is); 1.5 of 2; a pixel hardly claimed at all
    assert label.confidence[0].tolist() == pytest.approx([0.6, 0.75, 0.03])
