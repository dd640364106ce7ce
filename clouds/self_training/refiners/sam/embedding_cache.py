"""Image embeddings of SAM on disk, so that its encoder sees each view of an image once.

    <key>.npe            an entry: header (magic, CRC-32 of the values, shape), then the values
    .<key>.npe.*.part    an entry that is being written; a killed process may leave it

The key is a hash of the image's pixels, of SAM's encoder and of the precision that it computes in.
So an image that was generated again, a flipped view, other weights and a run without autocast have
entries of their own. Entries are in half precision, of a size that the model decides: 2 MB for SAM,
whatever the image's size. Its values are in that range, since its encoder ends in a layer norm;
those of other models are checked.

Any number of processes may use a folder at once. An entry appears under its name only when it is
complete; one that is damaged does not match its checksum and is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import re
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from clouds.files import atomic_write, final_name, partial_files, raw_bytes

if TYPE_CHECKING:
    from clouds.self_training.refiners.sam.predictor import Embed

logger = logging.getLogger(__name__)

HALF = np.dtype("<f2")
LARGEST = float(np.finfo(HALF).max)
MAGIC = b"CLDSEMB1"
HEADER = struct.Struct("<8s4I40x")
"""Magic, CRC-32 of the values, shape; 64 bytes."""
_ENTRY = re.compile(r"[0-9a-f]{32}\.npe")
ABANDONED_AFTER = 3600.0
"""Age in seconds from which a partial file is that of a process that no longer runs."""

Shape = tuple[int, int, int]
Half = npt.NDArray[np.float16]


class EmbeddingCache:
    """A folder of arrays by key, for any number of processes. It has no size limit.

    Args:
        folder: made if it does not exist (OSError: it cannot). Other files in it are left alone.
        shape: of every array, three numbers: (C, s, s) for SAM.

    Attributes:
        failure: error of the write after which no more entries are kept; None: none has failed.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = folder
        self.shape = shape
        self.failure: OSError | None = None
        self._warned_of_broken = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"MODEL.CLOUDS.SAM.CACHE_DIR: cannot make the folder {folder} "
                f"({error.strerror}). Name one that can be written, or '' to do without."
            ) from error
        self._remove_abandoned()

    @property
    def entry_bytes(self) -> int:
        """Size of an entry's file."""
        return HEADER.size + int(np.prod(self.shape)) * HALF.itemsize

    def path(self, key: str) -> Path:
        """The file of an entry, there or not; the key is 32 hexadecimal digits."""
        return self.folder / f"{key}.npe"

    def get(self, key: str) -> Half | None:
        """An entry, mapped from its file; None if there is none or it is broken."""
        path = self.path(key)
        try:
            return self._read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if not self._warned_of_broken:
                logger.warning(
                    "%s cannot be used (%s) and is computed again; further broken entries are "
                    "computed again without a warning",
                    path,
                    error,
                )
            self._warned_of_broken = True
            return None

    def put(self, key: str, values: Half) -> None:
        """Keep an entry. A failure is logged, not raised; no entries are kept after it."""
        assert values.shape == self.shape and values.dtype == HALF, (values.shape, values.dtype)
        if self.failure is not None:
            return
        try:
            self._write(self.path(key), np.ascontiguousarray(values))
        except OSError as error:
            self.failure = error
            logger.warning(
                "cannot keep image embeddings in %s (%s). Entries that exist are used; others are "
                "computed at each visit, which is slow. Free some space, or name another "
                "MODEL.CLOUDS.SAM.CACHE_DIR.",
                self.folder,
                error.strerror or error,
            )

    def _read(self, path: Path) -> Half:
        """Raises ValueError for a file that is not such an entry, whole and unchanged."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.entry_bytes:
                raise ValueError(f"it has {size} bytes instead of {self.entry_bytes}")
            # Copy on write, although nothing writes: torch warns of arrays that are read-only.
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        magic, checksum, *shape = HEADER.unpack_from(mapped)
        if magic != MAGIC or tuple(shape) != self.shape:
            raise ValueError(f"its header is {magic!r}, shape {shape}")
        values = np.frombuffer(mapped, HALF, offset=HEADER.size)
        if zlib.crc32(values.data) != checksum:
            raise ValueError("its values do not match their checksum")
        return values.reshape(self.shape)

    def _write(self, path: Path, values: Half) -> None:
        # Not synced: the checksum detects an incomplete entry.
        with atomic_write(path, parents=False, fsync=False) as file:
            file.write(HEADER.pack(MAGIC, zlib.crc32(values.data), *self.shape))
            file.write(values.data)

    def _remove_abandoned(self) -> None:
        """Delete partial files of processes that were killed while they wrote an entry."""
        for path in partial_files(self.folder):
            if not _ENTRY.fullmatch(final_name(path.name) or ""):
                continue
            # another process may finish or delete it at this moment
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - ABANDONED_AFTER:
                    path.unlink()

    def size(self) -> tuple[int, int]:
        """Number of entries in the folder, and their bytes."""
        with os.scandir(self.folder) as items:
            sizes = [item.stat().st_size for item in items if _ENTRY.fullmatch(item.name)]
        return len(sizes), sum(sizes)


class CachedEmbedder:
    """Image embeddings from a cache, and from SAM's encoder where it has none: an `Embed`.

    Embeddings are rounded to half precision whether they are cached or computed. They are computed
    under the autocast of the call, which is part of the key.

    Args:
        embed, cache: compute embeddings and store them.
        encoder: hash of what the embeddings depend on besides the image, from `fingerprint`.
        device: device of the returned embeddings.

    Attributes:
        computed: number of embeddings that were not in the cache.
    """

    def __init__(
        self, embed: Embed, cache: EmbeddingCache, encoder: str, device: torch.device
    ) -> None:
        self.embed = embed
        self.cache = cache
        self.encoder = encoder
        self.device = device
        self.computed = 0

    def __call__(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Embeddings, float32, of images, uint8 (3, H, W) RGB (copied to the host)."""
        keys = [self.key(image) for image in images]
        entries = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        images_of = dict(zip(keys, images, strict=True))
        missing = [key for key, values in entries.items() if values is None]
        if missing:
            entries |= self._compute({key: images_of[key] for key in missing})
        # to the device in half precision, which is half the bytes
        return [torch.from_numpy(entries[key]).to(self.device).to(torch.float32) for key in keys]

    def _compute(self, images: dict[str, torch.Tensor]) -> dict[str, Half]:
        """Embed images and keep their embeddings, by key."""
        computed = self.embed(list(images.values()))
        if any(embedding.abs().max() > LARGEST for embedding in computed):
            raise ValueError(
                "an image embedding has values that half precision does not hold. Set "
                "MODEL.CLOUDS.SAM.CACHE_DIR '' to do without the cache for this model."
            )
        self.computed += len(images)
        rounded = {
            key: np.asarray(embedding.to(torch.float16).cpu().numpy(), HALF)
            for key, embedding in zip(images, computed, strict=True)
        }
        for key, values in rounded.items():
            self.cache.put(key, values)
        return rounded

    def key(self, image: torch.Tensor) -> str:
        """Key of an image, uint8 (3, H, W): a hash of pixels, size, SAM and precision."""
        assert image.dtype == torch.uint8, f"expected uint8, got {image.dtype}"
        pixels = image.detach().cpu().contiguous().numpy()
        known = f"{self.encoder} {precision(self.device)} {pixels.shape} "
        digest = hashlib.blake2b(known.encode(), digest_size=16)
        digest.update(pixels.data)
        return digest.hexdigest()


def precision(device: torch.device) -> torch.dtype:
    """Type that matrix products are computed in on the device now, under autocast or without."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def fingerprint(sam: Any, model: str) -> str:
    """`module_fingerprint` of segment_anything's image encoder; takes seconds for ViT-H.

    Of weights and preprocessing of the encoder, not of the prompt encoder or mask decoder.
    """
    size, mean, std = sam.image_encoder.img_size, sam.pixel_mean, sam.pixel_std
    return module_fingerprint((model, size, mean.tolist(), std.tolist()), sam.image_encoder)


def module_fingerprint(settings: tuple[object, ...], module: torch.nn.Module) -> str:
    """A hash of everything that embeddings depend on besides the image.

    Args:
        settings: of the model and its input, in whose `repr` every difference shows.
        module: whose weights count.
    """
    digest = hashlib.blake2b(repr((MAGIC, *settings)).encode(), digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
