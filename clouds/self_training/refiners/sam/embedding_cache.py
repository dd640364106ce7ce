"""Image embeddings on disk, so that SAM's encoder sees each view of a picture once.

    <key>.npe            an entry: header (magic, CRC-32 of the values, shape), then the values
    .<key>.npe.*.part    one that is being written; a killed process may leave it

The key is a hash of the picture's pixels, of SAM's encoder and of the precision it computes in, so
neither a picture that was painted again, nor its flipped view, nor other weights, nor a run without
autocast meet an entry that is not theirs. Entries are in half precision: 2 MB each, whatever the
picture's size. They hold all values, since SAM's encoder ends in a layer norm.

Any number of processes may use a folder at once. An entry appears whole, under its name, or not at
all; one that a power cut has torn does not match its checksum and is made again.
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

from clouds.files import name_when_whole, raw_bytes, written_whole

if TYPE_CHECKING:
    from clouds.self_training.refiners.sam.refiner import Embed

logger = logging.getLogger(__name__)

HALF = np.dtype("<f2")
MAGIC = b"CLDSEMB1"
HEADER = struct.Struct("<8s4I40x")
"""Magic, CRC-32 of the values, shape; 64 bytes."""
_ENTRY = re.compile(r"[0-9a-f]{32}\.npe")
ABANDONED_AFTER = 3600.0
"""Seconds after which an entry that is still being written belongs to a process that is gone."""
SHARES = 16
"""A bounded folder is looked through once in so many parts of its size that are written."""

Shape = tuple[int, int, int]
Half = npt.NDArray[np.float16]


class EmbeddingCache:
    """A folder of arrays by key, for any number of processes.

    The folder is looked through only when there is a size bound, and then once in a sixteenth of
    it that is written; reading never does. When the bound is reached, entries that nobody has
    read or written since this object was made go, those unused for longest first. Entries that
    are in use stay, and new ones are not kept: training visits all pictures before it visits one
    again, so what it would evict is what it needs next.

    Args:
        folder: made if it is not there. What else lies in it is left alone.
        shape: of every array, (C, s, s).
        max_bytes: bound on all entries together, whatever their shape; 0: none.
        writers: processes of this run that write at once; they keep to the bound together.

    Attributes:
        closed: whether new entries are not kept any more: the bound is reached, or a write failed.
        failure: what went wrong in that write; None where nothing did.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, shape: Shape, max_bytes: int = 0, writers: int = 1) -> None:
        self.folder = folder
        self.shape = shape
        self.max_bytes = max_bytes
        self.writers = writers
        self.closed = False
        self.failure: OSError | None = None
        self._started = time.time()
        self._left = 0  # bytes that may be written before the folder is looked through
        self._told_of_broken = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"MODEL.CLOUDS.SAM.CACHE_DIR: cannot make the folder {folder} "
                f"({error.strerror}). Name one that can be written, or '' to do without."
            ) from error

    @property
    def entry_bytes(self) -> int:
        """Size of an entry's file."""
        return HEADER.size + int(np.prod(self.shape)) * HALF.itemsize

    def path(self, key: str) -> Path:
        """The file of an entry, there or not; the key is 32 hexadecimal digits."""
        return self.folder / f"{key}.npe"

    def get(self, key: str) -> Half | None:
        """An entry, (C, s, s), mapped from its file; None when it is not there, or is broken."""
        path = self.path(key)
        with contextlib.suppress(OSError):  # in a folder that only others write, age stays
            os.utime(path)
        try:
            return self._read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if not self._told_of_broken:
                logger.warning(
                    "%s cannot be used (%s) and is made again; likewise others, of which nothing "
                    "is said",
                    path,
                    error,
                )
            self._told_of_broken = True
            return None

    def put(self, key: str, values: Half) -> None:
        """Keep an entry, unless that would exceed the bound. A failure is logged, not raised.

        Args:
            values: (C, s, s).
        """
        assert values.shape == self.shape and values.dtype == HALF, (values.shape, values.dtype)
        if self.closed:
            return
        try:
            if self.max_bytes and self._left < self.entry_bytes:
                self._make_room()
            if not self.closed:
                self._write(self.path(key), np.ascontiguousarray(values))
                self._left -= self.entry_bytes
        except OSError as error:
            self.closed, self.failure = True, error
            logger.warning(
                "cannot keep image embeddings in %s (%s). What is there is used; others are "
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
            # Copy on write, which nobody does: torch warns of arrays that cannot be written.
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        magic, checksum, *shape = HEADER.unpack_from(mapped)
        if magic != MAGIC or tuple(shape) != self.shape:
            raise ValueError(f"its header is {magic!r}, shape {shape}")
        values = np.frombuffer(mapped, HALF, offset=HEADER.size)
        if zlib.crc32(values.data) != checksum:
            raise ValueError("its values do not match their checksum")
        return values.reshape(self.shape)

    def _write(self, path: Path, values: Half) -> None:
        # Not synced: the checksum tells of a torn one.
        with written_whole(path, parents=False, synced=False) as file:
            file.write(HEADER.pack(MAGIC, zlib.crc32(values.data), *self.shape))
            file.write(values.data)

    def _make_room(self) -> None:
        """Look through the folder, evict what is stale if need be, and share out what is left."""
        # Until they look again, all writers together add this much at most.
        reserve = max(self.max_bytes // SHARES, self.writers * self.entry_bytes)
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        if used + reserve > self.max_bytes:
            for modified, size, path in files:
                if modified >= self._started or used + 2 * reserve <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)  # another process may have been faster
                used -= size
        self._left = reserve // self.writers
        if used + reserve > self.max_bytes:
            self.closed = True
            logger.warning(
                "%s is full: %.1f of MODEL.CLOUDS.SAM.CACHE_GIB %.1f GiB are in use. Further "
                "pictures are embedded at each visit.",
                self.folder,
                used / 2**30,
                self.max_bytes / 2**30,
            )

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size, path of each entry; deletes what killed processes have left."""
        files = []
        with os.scandir(self.folder) as found:
            for item in found:
                target = name_when_whole(item.name)
                if not _ENTRY.fullmatch(target or item.name):
                    continue
                try:
                    status = item.stat()
                except FileNotFoundError:  # evicted, or written, by another process
                    continue
                if target is None:
                    files.append((status.st_mtime, status.st_size, Path(item.path)))
                elif status.st_mtime < time.time() - ABANDONED_AFTER:
                    Path(item.path).unlink(missing_ok=True)
        return files

    def size(self) -> tuple[int, int]:
        """Number of entries in the folder, and bytes of them; looks through it."""
        files = self._files()
        return len(files), sum(size for _, size, _ in files)


class CachedEmbedder:
    """Image embeddings from a cache, and from SAM's encoder where it has none: an `Embed`.

    What it returns is rounded to half precision whether it was there or not. It is computed under
    the autocast of the call, which has a part in the key.

    Args:
        embed: computes embeddings.
        cache: where they are kept.
        encoder: what the embeddings depend on besides the picture, from `fingerprint`.
        device: where embeddings are wanted.

    Attributes:
        computed: how many were not in the cache.
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
        """Embeddings, float32 (C, s, s) each.

        Args:
            images: uint8 (3, H, W) RGB. On a GPU they are copied to the host first.
        """
        keys = [self.key(image) for image in images]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        images_of = dict(zip(keys, images, strict=True))
        missing = [key for key, values in found.items() if values is None]
        if missing:
            found |= self._compute({key: images_of[key] for key in missing})
        return [
            # to the device in half precision, which is half the bytes
            torch.from_numpy(found[key]).to(self.device).to(torch.float32)
            for key in keys
        ]

    def _compute(self, images: dict[str, torch.Tensor]) -> dict[str, Half]:
        """Embed pictures and keep their embeddings, by key."""
        made = self.embed(list(images.values()))
        self.computed += len(images)
        rounded = {
            key: np.asarray(embedding.to(torch.float16).cpu().numpy(), HALF)
            for key, embedding in zip(images, made, strict=True)
        }
        for key, values in rounded.items():
            self.cache.put(key, values)
        return rounded

    def key(self, image: torch.Tensor) -> str:
        """The entry of a picture, uint8 (3, H, W): a hash of pixels, size, SAM and autocast."""
        assert image.dtype == torch.uint8, f"expected uint8, got {image.dtype}"
        pixels = image.detach().cpu().contiguous().numpy()
        known = f"{self.encoder} {precision(self.device)} {pixels.shape} "
        digest = hashlib.blake2b(known.encode(), digest_size=16)
        digest.update(pixels.data)
        return digest.hexdigest()


def precision(device: torch.device) -> torch.dtype:
    """What products are computed in on the device now, under autocast or without."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def fingerprint(sam: Any, model: str) -> str:
    """A hash of all that embeddings depend on besides the picture; takes seconds for ViT-H.

    That is the encoder's weights and input, not the prompt encoder or the mask decoder.

    Args:
        sam: as from `build_sam`.
        model: its name.
    """
    known = (
        MAGIC,
        model,
        sam.image_encoder.img_size,
        sam.pixel_mean.tolist(),
        sam.pixel_std.tolist(),
    )
    digest = hashlib.blake2b(repr(known).encode(), digest_size=16)
    for name, tensor in sam.image_encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
