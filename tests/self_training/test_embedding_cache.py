"""Embeddings kept on disk: the encoder's calls are counted, files are broken by hand."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from clouds.config import get_cfg
from clouds.self_training.refiners import build_refiner
from clouds.self_training.refiners.base import PseudoLabel
from clouds.self_training.refiners.sam.embedding_cache import (
    CachedEmbedder,
    EmbeddingCache,
    fingerprint,
)
from clouds.self_training.refiners.sam.model import build_sam
from clouds.self_training.refiners.sam.predictor import ImageEmbedder

SIZE = (96, 160)
SHAPE = (4, 8, 8)
ENTRY = 64 + 2 * 4 * 8 * 8  # bytes, with the header
SAM_ENTRY = 64 + 2 * 64 * 8 * 8  # likewise, of the tiny SAM


def config(folder="", **sam):
    cfg = get_cfg()
    node = cfg.MODEL.CLOUDS.SAM
    node.MODEL, node.WEIGHTS, node.SIZE_THRESHOLD = "tiny", "", 100
    node.CACHE_DIR = str(folder)
    for name, value in sam.items():
        assert name in node
        node[name] = value
    return cfg


def image_of(seed=0, size=SIZE):
    """uint8 (3, H, W), smooth colors."""
    noise = np.random.default_rng(seed).normal(size=(3, *size))
    smooth = ndimage.gaussian_filter(noise, (0, 4, 4))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return torch.from_numpy((255 * smooth).astype(np.uint8))


def label_of(seed=0, size=SIZE):
    generator = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(generator.normal(size=size), 8) for _ in range(5)]
    return PseudoLabel(
        torch.from_numpy(np.argmax(fields, axis=0).astype(np.uint8)), torch.ones(size)
    )


def counted(refiner):
    """A list that gets a 1 at each call of the refiner's image encoder."""
    calls = []
    embed = refiner.embed.embed if isinstance(refiner.embed, CachedEmbedder) else refiner.embed
    embed.sam.image_encoder.neck.register_forward_hook(lambda *_: calls.append(1))
    return calls


def entries(folder):
    return sorted(path for path in Path(folder).iterdir() if path.suffix == ".npe")


def values_of(number):
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float16)


def key_of(number):
    return f"{number:032x}"


def aged(path, seconds):
    """Make a file's last use lie so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def put_aged(cache, number, seconds):
    cache.put(key_of(number), values_of(number))
    aged(cache.path(key_of(number)), seconds)


# ---------------------------------------------------- what refined labels are


def test_the_encoder_runs_once_per_view(tmp_path):
    pictures = [image_of(seed) for seed in range(3)]
    views = pictures + [picture.flip(2) for picture in pictures]
    labels = [label_of(seed) for seed in range(3)]
    labels += [PseudoLabel(label.classes.flip(1), label.confidence.flip(1)) for label in labels]
    visits = [0, 1, 0, 3, 4, 1, 2, 5, 3, 0, 5, 2]
    without = build_refiner(config(), "cpu")
    refiner = build_refiner(config(tmp_path), "cpu")
    calls, all_calls = counted(refiner), counted(without)
    seen = set()
    for start in range(0, len(visits), 2):
        some = visits[start : start + 2]
        args = [views[v] for v in some], [labels[v] for v in some], [start, start + 1]
        new = refiner.refine(*args)
        for ours, exact in zip(new, without.refine(*args), strict=True):
            assert ours.labels.tolist() == exact.labels.tolist()
            assert (ours.points == exact.points).all()
            assert (ours.masks == exact.masks).float().mean() >= 0.999
        seen |= set(some)
        assert len(calls) == len(seen) == len(entries(tmp_path))
    assert (len(calls), len(all_calls)) == (6, 12)
    # a later run needs the encoder for none of them
    later = build_refiner(config(tmp_path), "cpu")
    calls = counted(later)
    again = later.refine(*args)
    assert calls == []
    for first, second in zip(new, again, strict=True):
        assert (first.masks == second.masks).all()


def test_embeddings_are_rounded_to_half_precision_and_no_further(tmp_path):
    images = [image_of(0), image_of(1, (128, 128))]
    exact = build_refiner(config(), "cpu").embed(images)
    embed = build_refiner(config(tmp_path), "cpu").embed
    computed, read = embed(images), embed(images)
    assert embed.computed == 2
    for a, b, c in zip(exact, computed, read, strict=True):
        assert b.dtype == c.dtype == torch.float32 and b.shape == c.shape == (64, 8, 8)
        expected = a.numpy().astype(np.float16).astype(np.float32)
        assert (b.numpy() == expected).all() and (c.numpy() == expected).all()
        assert not (a == b).all()


def test_entries_of_another_precision_are_others(tmp_path):
    embed = build_refiner(config(tmp_path), "cpu").embed
    exact = embed([image_of()])[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embed([image_of()])[0]
        assert embed.computed == len(entries(tmp_path)) == 2
        assert (embed([image_of()])[0] == rounded).all()
    assert (embed([image_of()])[0] == exact).all()
    assert embed.computed == len(entries(tmp_path)) == 2
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_no_folder_no_cache():
    assert isinstance(build_refiner(config(), "cpu").embed, ImageEmbedder)


def test_only_what_is_missing_is_embedded_and_once(tmp_path):
    asked = []

    def embed(images):
        asked.append([int(image[0, 0, 0]) for image in images])
        return [torch.full(SHAPE, float(image[0, 0, 0])) for image in images]

    def picture(value):
        return torch.full((3, 5, 7), value, dtype=torch.uint8)

    cached = CachedEmbedder(embed, EmbeddingCache(tmp_path, SHAPE), "x", torch.device("cpu"))
    assert [int(e[0, 0, 0]) for e in cached([picture(3)])] == [3]
    numbers = [5, 3, 9, 5, 3]
    assert [int(e[0, 0, 0]) for e in cached([picture(n) for n in numbers])] == numbers
    assert cached([]) == []
    assert [int(e[0, 0, 0]) for e in cached([picture(n) for n in numbers])] == numbers
    assert asked == [[3], [5, 9]]
    assert cached.computed == 3


# --------------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def tiny():
    return build_sam(config(), "cpu")


def test_key_is_of_the_pixels_and_the_size(tmp_path):
    embed = CachedEmbedder(None, EmbeddingCache(tmp_path, SHAPE), "x", torch.device("cpu"))
    image = image_of(0, (12, 20))
    changed = image.clone()
    changed[2, 11, 19] ^= 1
    others = [changed, image.flip(2), image.reshape(3, 20, 12), image[[1, 0, 2]]]
    keys = {embed.key(one) for one in [image, *others]}
    assert len(keys) == 5
    # neither memory layout nor the name of a file has a part in it
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not strided.is_contiguous()
    assert embed.key(image.clone()) == embed.key(strided) == embed.key(image)
    other = CachedEmbedder(None, embed.cache, "y", torch.device("cpu"))
    assert other.key(image) not in keys


def test_key_is_of_the_encoder_alone(tiny):
    def again(change=None, model="tiny", seed=0):
        cfg = config()
        cfg.SEED = seed
        sam = build_sam(cfg, "cpu")
        if change:
            change(sam)
        return fingerprint(sam, model)

    def nudged(sam):
        sam.image_encoder.blocks[1].mlp.lin2.bias[3] += 1e-6

    def other_mean(sam):
        sam.pixel_mean += 1

    def other_input(sam):
        sam.image_encoder.img_size = 256

    def other_decoder(sam):
        sam.mask_decoder.iou_token.weight += 1
        sam.prompt_encoder.no_mask_embed.weight += 1

    same = fingerprint(tiny, "tiny")
    assert again() == again(other_decoder) == same
    changes = [again(nudged), again(other_mean), again(other_input), again(seed=1)]
    assert len({same, *changes, again(model="vit_b")}) == 6


def test_half_precision_weights_and_counters_have_a_fingerprint(tiny):
    class Sam:
        image_encoder = torch.nn.Sequential(
            torch.nn.BatchNorm2d(3), torch.nn.Linear(2, 2)
        ).bfloat16()
        pixel_mean = pixel_std = torch.zeros(3)

    Sam.image_encoder.img_size = 8
    first = fingerprint(Sam, "x")
    Sam.image_encoder[0].num_batches_tracked += 1
    assert fingerprint(Sam, "x") != first


# ------------------------------------------------------------ broken entries


def broken(data):
    """Ways in which an entry's file may be broken, by name."""
    return {
        "empty": b"",
        "header cut": data[:30],
        "values cut": data[:-1],
        "half": data[: len(data) // 2],
        "too long": data + b"\0",
        "torn": data[:100] + bytes(len(data) - 100),
        "zeros": bytes(len(data)),
        "one bit": data[:200] + bytes([data[200] ^ 4]) + data[201:],
        "other format": b"\x93NUMPY\x01\x00" + data[8:],
        # the shape stands in the last 52 bytes of the header: three numbers of 4 bytes
        "other shape": data[:12] + data[16:20] + data[12:16] + data[20:],
    }


@pytest.mark.parametrize("name", list(broken(bytes(300))))
def test_a_broken_entry_is_made_again(tmp_path, name, caplog):
    refiner = build_refiner(config(tmp_path), "cpu")
    calls = counted(refiner)
    expected = refiner.embed([image_of()])[0]
    path = entries(tmp_path)[0]
    whole = path.read_bytes()
    assert len(whole) == SAM_ENTRY
    path.write_bytes(broken(whole)[name])
    assert path.read_bytes() != whole
    caplog.clear()
    assert (refiner.embed([image_of()])[0] == expected).all()
    assert len(calls) == 2
    assert path.read_bytes() == whole
    assert [r for r in caplog.records if path.name in r.getMessage()]
    path.write_bytes(broken(whole)[name])
    refiner.embed([image_of()])
    assert len(calls) == 3
    assert len(caplog.records) == 1  # it is said once
    refiner.embed([image_of()])
    assert len(calls) == 3


def test_an_entry_that_cannot_be_read_is_made_again(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path, SHAPE)
    cache.path(key_of(1)).mkdir()
    assert cache.get(key_of(1)) is None
    assert len(caplog.records) == 1


def test_entries_are_mapped_and_reading_warns_of_nothing(tmp_path, recwarn):
    cache = EmbeddingCache(tmp_path, SHAPE)
    cache.put(key_of(1), values_of(1))
    maps = Path("/proc/self/maps")
    if maps.is_file():
        values = cache.get(key_of(1))
        assert str(cache.path(key_of(1))) in maps.read_text()
    # an evicted entry stays readable for those who have it
    cache.path(key_of(1)).unlink()
    assert (torch.from_numpy(values).numpy() == values_of(1)).all()
    assert not recwarn.list


def test_nothing_that_was_read_can_change_the_file(tmp_path):
    cache = EmbeddingCache(tmp_path, SHAPE)
    cache.put(key_of(1), values_of(1))
    cache.get(key_of(1))[:] = 0
    assert (cache.get(key_of(1)) == values_of(1)).all()


def test_a_process_killed_while_it_writes(tmp_path):
    """Kills writers at random; whatever is left is whole, or not looked at."""
    context = multiprocessing.get_context("fork")

    def write_forever():
        cache = EmbeddingCache(tmp_path, SHAPE)
        for number in range(10**9):
            cache.put(key_of(number % 20), values_of(number % 20))

    for pause in (0.05, 0.06, 0.07):
        process = context.Process(target=write_forever)
        process.start()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cache = EmbeddingCache(tmp_path, SHAPE)
    found = [cache.get(key_of(number)) for number in range(20)]
    assert any(values is not None for values in found)
    assert all(v is None or (v == values_of(n)).all() for n, v in enumerate(found))
    assert not cache._warned_of_broken


# ------------------------------------------------------------------ several processes


def test_size_counts_entries_alone(tmp_path):
    cache = EmbeddingCache(tmp_path, SHAPE)
    (tmp_path / "of_somebody.txt").write_text("x" * 100)
    for number in range(3):
        cache.put(key_of(number), values_of(number))
    assert cache.size() == (3, 3 * ENTRY)


def test_what_a_killed_process_left_goes_once_it_is_old(tmp_path):
    old, new = (tmp_path / f".{key_of(n)}.npe.{key_of(7)}.part" for n in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    aged(old, 7200)
    EmbeddingCache(tmp_path, SHAPE)
    assert not old.exists() and new.exists()


def test_several_processes_write_and_read_at_once(tmp_path):
    writers = 4

    def work(rank, wrong):
        cache = EmbeddingCache(tmp_path, SHAPE)
        drawn = np.random.default_rng(rank)
        for _ in range(150):
            number = int(drawn.integers(60))
            values = cache.get(key_of(number))
            if values is None:
                cache.put(key_of(number), values_of(number))
            elif not (values == values_of(number)).all():
                wrong.value += 1
        wrong.value += cache._warned_of_broken + (cache.failure is not None)

    context = multiprocessing.get_context("fork")
    wrong = context.Value("i", 0)
    processes = [context.Process(target=work, args=(r, wrong)) for r in range(writers)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(0.005)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert wrong.value == 0
    assert EmbeddingCache(tmp_path, SHAPE).size() == (60, 60 * ENTRY)
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------- folders that fail


@contextlib.contextmanager
def largest_file(size):
    """Writes beyond `size` bytes of a file fail, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_does_not_stop_training(tmp_path, caplog):
    refiner = build_refiner(config(tmp_path), "cpu")
    refiner.embed([image_of(0)])
    calls = counted(refiner)
    args = [image_of(1), image_of(2)], [label_of(1), label_of(2)], [1, 2]
    caplog.clear()
    with largest_file(SAM_ENTRY // 2):
        first, second = refiner.refine(*args), refiner.refine(*args)
        refiner.embed([image_of(0)])
    assert len(calls) == 4  # what was there before is still used
    for a, b in zip(first, second, strict=True):
        assert (a.masks == b.masks).all()
    assert len(list(tmp_path.iterdir())) == 1  # no half-written file
    records = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(records) == 1 and os.strerror(errno.EFBIG) in records[0].getMessage()
    assert refiner.embed.cache.failure.errno == errno.EFBIG


def test_a_folder_that_goes_away(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path / "x", SHAPE)
    (tmp_path / "x").rmdir()
    cache.put(key_of(1), values_of(1))
    assert cache.get(key_of(1)) is None
    assert cache.failure.errno == errno.ENOENT and len(caplog.records) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError, match=r"CACHE_DIR: cannot make the folder .*file"):
            build_refiner(config(folder), "cpu")


def test_folders_are_made(tmp_path):
    build_refiner(config(tmp_path / "a/b"), "cpu").embed([image_of()])
    assert len(entries(tmp_path / "a/b")) == 1
