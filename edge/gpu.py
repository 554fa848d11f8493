"""The pictures that networks take, made on the GPU: a frame goes there once, and its crops never come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.backend import OnDevice, Pictures
from edge.bank import Look
from edge.bundle import DetectorFacts, EncoderFacts
from edge.cuda import Cuda
from edge.errors import BackendError
from edge.imaging import GREY
from edge.placement import Placement, cropped, fitted
from edge.values import Floats, Frame, Region

_BLOCK = (32, 8, 1)  # threads, one per pixel: a row of 32 writes 96 bytes that lie together
_LINEAR, _CUBIC = np.int32(0), np.int32(1)  # `mode` of edge/pixels.cu
_ALIGN = 256  # bytes, as CUDA aligns what it allocates

Chunk = TypeVar("Chunk")


class CudaImaging:
    """An Imaging whose pictures are OnDevice, made by the kernels of edge/pixels.cu, which are compiled here.

    `fit` begins a batch: what was made for the last one is overwritten. Pictures of one batch do not disturb each
    other. Memory grows to what one batch took, and is kept; frames that are cropped without a `fit` before add to the
    batch. Every method raises BackendError.
    """

    def __init__(self, cuda: Cuda) -> None:
        source = files("edge").joinpath("pixels.cu").read_text(encoding="utf-8")
        self._cuda = cuda
        self._resize, self._mirror = cuda.compile(source, "resize_boxes"), cuda.compile(source, "mirror")
        self._device = _Arena(cuda.allocate, cuda.free)  # frames, tables, pictures
        self._staged = _Arena(cuda.pin, cuda.unpin)  # what goes there
        self._frames: dict[Frame, int] = {}  # of this batch: where they are

    def fit(self, frames: Sequence[Frame], facts: DetectorFacts) -> OnDevice:
        """(f, H, W, 3) uint8 BGR: whole frames as the detector takes them, a letterbox filled with grey."""
        self._frames.clear()
        self._cuda.synchronize()  # the last batch may be on its way still
        self._staged.reuse()
        self._device.reuse()
        parts = [(frame, fitted(frame.width, frame.height, facts)) for frame in frames]
        return self._placed(parts, facts.width, facts.height, GREY, _LINEAR)

    def crop(self, parts: Sequence[tuple[Frame, Floats]], facts: EncoderFacts, look: Look, region: Region) -> OnDevice:
        """(n, S, S, 3) uint8 BGR: one picture per row of all the parts' boxes (k, 4) px, in order; n may be 0."""
        placed = [(frame, cropped(boxes, frame.width, frame.height, facts, look, region)) for frame, boxes in parts]
        return self._placed(placed, facts.size, facts.size, facts.fill_bgr, _CUBIC)

    def mirror(self, pictures: Pictures) -> OnDevice:
        """The same with left and right changed. Raises TypeError for pictures that are not in the GPU's memory."""
        if not isinstance(pictures, OnDevice):
            raise TypeError("CudaImaging must be given pictures in the GPU's memory, got an array")
        count, height, width, _ = pictures.shape
        mirrored = self._pictures(count, height, width)
        if count:
            arguments = (np.uint64(pictures.address), np.uint64(mirrored.address), np.int32(width), np.int32(height))
            self._cuda.launch(self._mirror, _grid(width, height, count), _BLOCK, arguments)
        return mirrored

    def close(self) -> None:
        """Give back all memory, also after an error; twice is once. Raises the first refusal, when all is done."""
        self._frames.clear()
        refused = None
        for step in (self._cuda.synchronize, self._device.clear, self._staged.clear):
            try:
                if self._device.size or self._staged.size:
                    step()
            except BackendError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def _placed(
        self,
        parts: Sequence[tuple[Frame, Placement]],
        width: int,
        height: int,
        fill: tuple[int, int, int],
        mode: np.int32,
    ) -> OnDevice:
        count = sum(len(placement) for _, placement in parts)
        pictures = self._pictures(count, height, width)
        if not count:
            return pictures
        blue, green, red = fill
        colour = np.int32(blue | green << 8 | red << 16)
        # one for all frames: the fewer copies, the better
        tables = self._uploaded(np.concatenate([placement.table for _, placement in parts]))  # (n, 8) int32
        done = 0
        for frame, placement in parts:
            if not len(placement):
                continue
            arguments = (
                np.uint64(self._uploaded_once(frame)),
                np.int32(frame.width),
                np.uint64(tables + done * 8 * np.dtype(np.int32).itemsize),
                np.uint64(pictures[done:].address),
                np.int32(width),
                np.int32(height),
                colour,
                mode,
            )
            self._cuda.launch(self._resize, _grid(width, height, len(placement)), _BLOCK, arguments)
            done += len(placement)
        return pictures

    def _pictures(self, count: int, height: int, width: int) -> OnDevice:
        address, start = self._device.take(count * height * width * 3) if count else (0, 0)
        return OnDevice(address + start, (count, height, width, 3))

    def _uploaded_once(self, frame: Frame) -> int:
        """Where this very frame lies."""
        if frame not in self._frames:
            self._frames[frame] = self._uploaded(frame.image)
        return self._frames[frame]

    def _uploaded(self, array: NDArray[np.uint8] | NDArray[np.int32]) -> int:
        """Its bytes' address, by way of page-locked memory: no copy waits for another, nor for its array to live."""
        address, start = self._device.take(array.nbytes)
        pinned, first = self._staged.take(array.nbytes)
        staged = pinned[first : first + array.nbytes]
        np.copyto(staged.view(array.dtype).reshape(array.shape), array)
        self._cuda.upload(address + start, staged)
        return address + start


class _Arena(Generic[Chunk]):
    """Memory that is taken piece by piece and given up as a whole. size: bytes that it holds."""

    def __init__(self, allocate: Callable[[int], Chunk], free: Callable[[Chunk], None]) -> None:
        self._allocate, self._free = allocate, free
        self._chunks: list[tuple[Chunk, int]] = []
        self._wanted = self._used = 0
        self.size = 0

    def take(self, size: int) -> tuple[Chunk, int]:
        """A chunk, and from which byte on `size` of it are the caller's."""
        length = -(-size // _ALIGN) * _ALIGN
        if not self._chunks or self._used + length > self._chunks[-1][1]:
            # a new one never moves what was taken; `reuse` makes one of them all
            larger = length if self._chunks else max(length, self._wanted)
            self._chunks.append((self._allocate(larger), larger))
            self.size, self._used = self.size + larger, 0
        start, self._used = self._used, self._used + length
        return self._chunks[-1][0], start

    def reuse(self) -> None:
        """Nothing is taken any more. What grew is one chunk when it is taken from again."""
        if len(self._chunks) > 1:
            self._wanted = self.size
            self.clear()
        self._used = 0

    def clear(self) -> None:
        """Give all of it back. Raises the first refusal, when all is done."""
        refused = None
        while self._chunks:
            chunk, length = self._chunks.pop()
            self.size -= length
            try:
                self._free(chunk)
            except BackendError as error:
                refused = refused or error
        if refused is not None:
            raise refused


def _grid(width: int, height: int, count: int) -> tuple[int, int, int]:
    return -(-width // _BLOCK[0]), -(-height // _BLOCK[1]), count
