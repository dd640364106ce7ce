"""The order, seeds and mixture of the training samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from clouds.data.build import (
    DatasetWeight,
    WeightedMixture,
    WeightedTrainingSampler,
    check_batch_size,
    sample_seed,
)


def sample_batches(mixture, batch_size, count, **options):
    return list(islice(WeightedTrainingSampler(mixture, batch_size, **options), count))


@pytest.mark.parametrize(
    "weights", [(DatasetWeight(7),), (DatasetWeight(5), DatasetWeight(2, 1.0))]
)
def test_with_factors_of_one_order_and_seeds_are_those_of_earlier_versions(weights):
    # recorded with the version before datasets had factors
    stream = sample_batches(WeightedMixture(weights, 3), 4, 4000)
    assert stream[0] == [
        (5, 1374224419159112019),
        (6, 6062815274278709897),
        (2, 8688532937909049281),
        (1, 4854266099512449391),
    ]
    digest = hashlib.sha256(repr(stream).encode()).hexdigest()
    assert digest == "3a3845a9d7a84b0bcf3ddaedf775e2d7d1caa5743338ad5015ba4d9567d1ae15"
    assert stream[0] == [(i, sample_seed(3, 0, i)) for i in (5, 6, 2, 1)]


@pytest.mark.parametrize(
    "num_images,factor,num_samples,least",
    [
        (10, 1.0, 10, 1),
        (10, 2.0, 20, 2),
        (10, 0.7, 7, 0),
        (10, 0.2, 2, 0),
        (10, 2.34, 23, 2),
        (3, 1.9, 6, 1),  # rounded from 5.7: all three occur twice
        (10, 0.01, 1, 0),  # at least one
        (1, 0.2, 1, 0),
        (9400, 0.7, 6580, 0),
    ],
)
def test_samples_of_a_dataset_in_an_epoch(num_images, factor, num_samples, least):
    weight = DatasetWeight(num_images, factor)
    assert weight.num_samples == num_samples
    for epoch in range(5):
        _, images = WeightedMixture((weight,), 0).epoch_samples(epoch)
        counts = np.bincount(images, minlength=num_images)
        assert counts.sum() == num_samples
        assert counts.min() >= least
        assert counts.max() <= least + 1


def test_each_image_occurs_factor_times_on_average():
    mixture = WeightedMixture(
        (DatasetWeight(10, 2.34), DatasetWeight(5, 0.5), DatasetWeight(4, 1.0)), 11
    )
    assert mixture.epoch_length == 23 + 2 + 4  # 2.5 is rounded to even
    epochs = 3000
    counts = np.zeros(19)
    for epoch in range(epochs):
        order, images = mixture.epoch_samples(epoch)
        assert sorted(order) == list(range(29))
        counts += np.bincount(images, minlength=19)
    mean = counts / epochs
    # 3 of 10, and 2 of 5, are drawn: standard deviation of the mean below 0.009
    assert mean[:10] == pytest.approx(np.full(10, 2.3), abs=0.045)
    assert mean[10:15] == pytest.approx(np.full(5, 0.4), abs=0.045)
    assert mean[15:].tolist() == [1.0] * 4


def test_the_remainder_is_drawn_independently_per_epoch_and_dataset():
    mixture = WeightedMixture((DatasetWeight(20, 0.5), DatasetWeight(20, 0.5)), 0)
    drawn = set()
    for epoch in range(10):
        _, images = mixture.epoch_samples(epoch)
        drawn.add(tuple(sorted(i for i in images if i < 20)))
        drawn.add(tuple(sorted(i - 20 for i in images if i >= 20)))
    assert len(drawn) == 20
    other = WeightedMixture(mixture.weights, 1)
    assert sorted(other.epoch_samples(0)[1]) != sorted(mixture.epoch_samples(0)[1])


def test_samples_of_an_epoch_have_different_seeds():
    mixture = WeightedMixture((DatasetWeight(4, 3.5), DatasetWeight(3, 2.0)), 5)
    stream = list(chain(*sample_batches(mixture, 5, 4 * 3)))  # three epochs
    assert len({seed for _, seed in stream}) == 60
    for epoch in range(3):
        counts = Counter(i for i, _ in stream[20 * epoch : 20 * epoch + 20])
        assert sorted(counts[i] for i in range(4)) == [3, 3, 4, 4]
        assert [counts[i] for i in range(4, 7)] == [2, 2, 2]


@pytest.mark.parametrize("start", [1, 2, 3, 4, 7, 8, 123])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_stream_continues_the_uninterrupted_one(start, world_size):
    mixture = WeightedMixture(
        (DatasetWeight(5, 1.5), DatasetWeight(4, 2.3), DatasetWeight(3, 0.5)), 9
    )
    uninterrupted = sample_batches(mixture, 6, 140)
    shares = [
        sample_batches(mixture, 6, 140 - start, start=start, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == uninterrupted[start:]


def test_a_late_start_shuffles_a_single_epoch(monkeypatch):
    made = []
    original = WeightedMixture.epoch_samples
    monkeypatch.setattr(
        WeightedMixture, "epoch_samples", lambda self, e: made.append(e) or original(self, e)
    )
    mixture = WeightedMixture((DatasetWeight(50, 1.5),), 0)  # 75 samples
    sample_batches(mixture, 5, 1, start=1_500_000)
    assert made == [100_000]


def test_a_batch_must_be_shared_evenly():
    for world_size in (1, 2, 3, 6):
        check_batch_size(6, world_size)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 6.*4 processes.*multiple of 4"):
        check_batch_size(6, 4)
