"""Images in a page: what they decode to, and the limit of their size."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from clouds.report.embed import MAX_WIDTH, Embedder


def decoded(uri):
    kind, _, data = uri.partition(";base64,")
    assert kind == "data:image/webp"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_label_maps_keep_their_colors():
    colors = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    image = colors[np.random.default_rng(1).integers(0, 5, (20, 30))]
    assert np.array_equal(decoded(Embedder().colors(image)), image)
    wide = np.repeat(image, 80, axis=1)
    reduced = decoded(Embedder().colors(wide))
    assert reduced.shape == (round(MAX_WIDTH * 20 / 2400), MAX_WIDTH, 3)
    assert {tuple(c) for c in reduced.reshape(-1, 3)} <= {tuple(c) for c in colors}


def test_photos_are_close():
    rows, columns = np.mgrid[:40, :60]
    image = np.stack([4 * columns, 6 * rows, 128 + columns], 2).astype(np.uint8)
    difference = decoded(Embedder().photo(image)).astype(int) - image
    assert np.abs(difference).mean() < 4
    assert decoded(Embedder().photo(image, 30)).shape == (20, 30, 3)


def test_the_size_is_limited():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    embedder = Embedder(max_bytes=20_000)
    found = [embedder.colors(noise) for _ in range(3)]
    assert len(found[0]) > 10_000 and found[1:] == ["", ""]
    assert embedder.left_out == 2 and embedder.used == len(found[0])
    assert embedder.photo(noise[:8, :8])  # smaller ones still fit
