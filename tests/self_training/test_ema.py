"""The teacher: a moving average of all parameters that train, and its state in checkpoints."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from clouds.config import get_cfg
from clouds.self_training.ema import EMATeacher
from clouds.self_training.pseudo_labeler import label_from_scores


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def teacher_of(momentum=0.9, interval=1, frozen=True, seed=0):
    """A student with a backbone, of which one layer is always frozen, and a head."""
    backbone = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    backbone[0].requires_grad_(False)
    backbone.requires_grad_(False) if frozen else backbone[1].requires_grad_(True)
    student = {"backbone": backbone, "sem_seg_head": layers(seed).train()}
    teacher = EMATeacher(student, momentum, interval)
    teacher.reset()
    return student, teacher


def test_the_average_is_the_geometric_sum_of_the_students_weights():
    student, teacher = teacher_of(frozen=False)
    weights = [student["sem_seg_head"][0].weight, student["backbone"][1].weight]
    history = [[weight.detach().double().clone() for weight in weights]]
    for i in range(5):
        with torch.no_grad():
            for weight in weights:
                weight += 0.3 * i - 0.5
        teacher.update()
        history.append([weight.detach().double().clone() for weight in weights])
    averages = [teacher.parts["sem_seg_head"][0].weight, teacher.parts["backbone"][1].weight]
    for average, values in zip(averages, zip(*history, strict=True), strict=True):
        # after n updates: m^n w_0 + (1 - m) sum_k m^(n - k) w_k
        expected = 0.9**5 * values[0] + 0.1 * sum(0.9 ** (5 - k) * values[k] for k in range(1, 6))
        torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-6)


def test_updates_come_after_every_interval():
    _, teacher = teacher_of(interval=100)
    assert [i for i in range(301) if teacher.due(i)] == [99, 199, 299]


def test_it_never_trains_and_is_no_part_of_the_student():
    student, teacher = teacher_of()
    head = teacher.parts["sem_seg_head"]
    assert not any(p.requires_grad for p in head.parameters())
    assert not any(m.training for m in head.modules())
    assert student["sem_seg_head"].training
    assert all(p.requires_grad for p in student["sem_seg_head"].parameters())
    shared = {p.data_ptr() for p in student["sem_seg_head"].parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in head.parameters())


def test_what_is_frozen_is_shared_and_not_saved():
    student, teacher = teacher_of(frozen=True)
    assert teacher.parts["backbone"] is student["backbone"]
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"sem_seg_head"}
    student, teacher = teacher_of(frozen=False)
    copy = teacher.parts["backbone"]
    assert copy[0].weight is student["backbone"][0].weight
    assert copy[1].weight.data_ptr() != student["backbone"][1].weight.data_ptr()
    saved = {name for name in teacher.state_dict() if name.startswith("backbone")}
    assert saved == {"backbone.1.weight", "backbone.1.bias"}


def test_buffers_are_those_of_the_student():
    student, teacher = teacher_of()
    student["sem_seg_head"](torch.randn(8, 3))
    teacher.update()
    norm = teacher.parts["sem_seg_head"][1]
    assert torch.equal(norm.running_mean, student["sem_seg_head"][1].running_mean)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_its_state_comes_back(frozen):
    student, teacher = teacher_of(0.5, frozen=frozen)
    with torch.no_grad():
        student["sem_seg_head"][0].weight += 1
        student["backbone"][1].weight += 1
    teacher.update()
    _, other = teacher_of(0.5, frozen=frozen, seed=1)
    other.load_state_dict(teacher.state_dict())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_a_state_of_another_network_is_refused():
    state = teacher_of(frozen=False)[1].state_dict()
    with pytest.raises(ValueError, match=r"2 names or shapes differ.*MODEL\.BACKBONE\.FREEZE"):
        teacher_of(frozen=True)[1].load_state_dict(state)


def test_a_state_of_other_shapes_is_refused_and_the_first_name_given():
    _, teacher = teacher_of(frozen=False)
    state = teacher.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    other = {name: value + 1 for name, value in state.items()}
    other["backbone.1.bias"] = torch.zeros(7)
    other["sem_seg_head.0.weight"] = torch.zeros(4, 7)
    with pytest.raises(ValueError, match=r"2 names or shapes differ, such as backbone\.1\.bias\."):
        teacher.load_state_dict(other)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_momentum_and_interval_are_those_of_the_config():
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.SAM.ALPHA_EMA, cfg.MODEL.CLOUDS.ITERATION_UPDATE = 0.75, 3
    student = nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 8.0)
    teacher = EMATeacher.from_config(cfg, {"head": student})
    teacher.reset()
    nn.init.constant_(student.weight, 4.0)
    teacher.update()
    assert teacher.parts["head"].weight.item() == 7  # 0.75 * 8 + 0.25 * 4
    assert [i for i in range(8) if teacher.due(i)] == [2, 5]


def test_with_a_warm_start_it_is_first_the_mean_of_the_students_weights():
    student = nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 8.0)
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.SAM.ALPHA_EMA, cfg.MODEL.CLOUDS.ITERATION_UPDATE = 0.75, 1
    cfg.MODEL.CLOUDS.EMA_WARM_START = True
    teacher, averages = EMATeacher.from_config(cfg, {"head": student}), []
    teacher.reset()
    for iteration, weight in enumerate((2.0, 5.0, 1.0, 6.0)):
        nn.init.constant_(student.weight, weight)
        teacher.update(teacher.momentum_at(iteration))
        averages.append(teacher.parts["head"].weight.item())
    # means of 2, 3 and 4 weights; then 0.75 * 4 + 0.25 * 6, since 1 - 1 / 5 exceeds 0.75
    assert averages == pytest.approx([5.0, 5.0, 4.0, 4.5])
    assert [teacher.momentum_at(i) for i in (0, 1, 2, 3)] == pytest.approx(
        [1 / 2, 2 / 3, 0.75, 0.75]
    )


def test_the_warm_start_counts_updates_rather_than_iterations():
    teacher = EMATeacher({}, 0.999, 100, warm_start=True)
    assert [teacher.momentum_at(i) for i in (99, 199)] == pytest.approx([1 / 2, 2 / 3])
    assert EMATeacher({}, 0.999, 100).momentum_at(99) == 0.999


def test_without_a_reset_it_starts_as_the_student_at_the_first_update():
    student = nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 8.0)
    teacher = EMATeacher({"head": student}, 0.5, 1)
    assert len(teacher.parts) == 0
    teacher.update()
    nn.init.constant_(student.weight, 4.0)
    teacher.update()
    assert teacher.parts["head"].weight.item() == 6


@pytest.mark.parametrize(
    "added", [nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)], ids=["parameters", "buffers"]
)
def test_a_student_that_grew_after_the_reset_is_an_error(added):
    student, teacher = teacher_of()
    student["sem_seg_head"].append(added)
    with pytest.raises(ValueError, match="longer"):
        teacher.update()


def test_states_of_earlier_versions_hold_the_head_alone(caplog):
    student, _ = teacher_of(frozen=False)
    teacher = EMATeacher({**student, "neck": nn.Linear(3, 3)}, 0.9, 1)
    teacher.reset()
    earlier = {name: value + 1 for name, value in layers().state_dict().items()}
    backbone = teacher.parts["backbone"][1].weight.clone()
    with caplog.at_level(logging.WARNING):
        teacher.load_state_dict(earlier)
    assert torch.equal(teacher.parts["sem_seg_head"][0].weight, earlier["0.weight"])
    assert torch.equal(teacher.parts["backbone"][1].weight, backbone)
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint's teacher averages the head alone; copied from the student: backbone, neck"
    ]


def test_confidence_is_the_share_of_the_best_class():
    scores = torch.tensor([[[0.6, 1.5, 0.03]], [[0.2, 0.5, 0.01]]])
    label = label_from_scores(scores)
    assert label.classes.tolist() == [[0, 0, 0]]
    assert label.classes.dtype == torch.uint8
    # 0.6 of a sum of 0.8 (below 1, so as it is); 1.5 of 2; a pixel hardly claimed at all
    assert label.confidence[0].tolist() == pytest.approx([0.6, 0.75, 0.03])
