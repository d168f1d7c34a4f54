"""A video file and numbers of its frames in, those frames out as RGB images; PyAV reads it.

Frames are numbered from 0 in the order in which they are shown. A frame is decoded from the keyframe before it. Where
that does not give it (it refers to what lies further back, or the file has no times), the file is decoded from its
start. What is decoded, and what is held in memory, is limited in all: a file of 1 KB can ask for terabytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from align.errors import UserError
from align.versions import install_extra

FRAME_KEY = "video_frame"
MAX_FRAMES = 1_000_000
MAX_FRAME_PIXELS = 100_000_000
# All frames that are decoded to reach the picked ones: 8 frames of 4K video, 600 behind a keyframe each.
MAX_DECODED_PIXELS = 40_000_000_000
# All picked frames together, 3 bytes a pixel: 48 frames of 4K video.
MAX_HELD_PIXELS = 400_000_000


@dataclass(frozen=True)
class FileIndex:
    """What the packets of a file tell: how many frames it has, how many a second, and where they can be found.

    `times` are the presentation times of all frames in order, None where the packets do not tell; `keys` the
    presentation time of every keyframe, in order, and `key_packets` the decoding time of its packet,
    for which one seeks.
    `frame_pixels`: of one frame, as the header has it.
    """

    frame_pixels: int
    count: int
    rate: float | None
    times: tuple[int, ...] | None
    keys: tuple[int, ...]
    key_packets: tuple[int, ...]

    def key_before(self, time: int) -> int | None:
        """The number of the last keyframe that is not shown after `time`."""
        return bisect_right(self.keys, time) - 1 if self.keys and self.keys[0] <= time else None

    def num_decoded(self, numbers: Collection[int]) -> int:
        """How many frames are decoded for some: from the keyframe before each, or from where the one before it was.

        >>> FileIndex(1, 100, None, tuple(range(100)), (0, 50), (0, 50)).num_decoded([10, 20, 60])
        32
        >>> _UNTIMED.num_decoded([20])
        21
        """
        if self.times is None:
            return max(numbers, default=-1) + 1
        total, done = 0, -1
        for number in sorted(set(numbers)):
            key = self.key_before(self.times[number])
            start = 0 if key is None else bisect_left(self.times, self.keys[key])
            total += number - max(start - 1, done)
            done = number
        return total


_UNTIMED = FileIndex(1, 100, None, None, (), ())


@dataclass
class DecodeBudget:
    """Pixels that may still be decoded for one call."""

    path: Path
    left: int = MAX_DECODED_PIXELS

    def spend(self, pixels: int) -> None:
        """Raises UserError where that is more than is left."""
        self.left -= pixels
        if self.left < 0:
            raise UserError(
                f"more than {MAX_DECODED_PIXELS:,} pixels would be decoded to reach the frames that are looked at",
                where=str(self.path),
                fix="scale the video down, cut it, or write it with more keyframes",
            )


def check_held(count: int, frame_pixels: int, path: Path) -> None:
    """Raises UserError where so many frames of this size are more than may be held in memory."""
    if count * frame_pixels > MAX_HELD_PIXELS:
        raise UserError(
            f"{count} frames of {frame_pixels:,} pixels are more than {MAX_HELD_PIXELS:,} pixels in all",
            where=str(path),
            fix="scale the video down, or look at fewer frames (model.video_frames)",
        )


def file_index(path: Path, max_pixels: int) -> FileIndex:
    """Reads all packets of a file, once a process; headers are often wrong. Raises as `read_numbers` does."""
    now = path.stat()
    return _index(path, max_pixels, now.st_ino, now.st_size, now.st_mtime_ns)


def read_numbers(path: Path, index: FileIndex, numbers: Collection[int], max_pixels: int) -> dict[int, Image.Image]:
    """Those of the frames that can be decoded, by number.

    Raises UserError where PyAV is missing, frames are too large, or too much would be decoded or held; PyAV's errors
    for files that are no videos.
    """
    check_held(len(numbers), index.frame_pixels, path)
    DecodeBudget(path).spend(index.num_decoded(numbers) * index.frame_pixels)
    budget = DecodeBudget(path)
    if index.times is None:
        return _from_the_start(path, index, numbers, max_pixels, budget)
    found = dict(_from_keyframes(path, index, numbers, max_pixels, budget))
    missing = set(numbers) - found.keys()
    return found | _from_the_start(path, index, missing, max_pixels, budget) if missing else found


def decodable(path: Path, index: FileIndex) -> list[int]:
    """The numbers of all frames that come out; fewer than there are packets where some are
    damaged or hold no picture."""
    return [number for number, _ in _numbered(path, index, DecodeBudget(path))]


@lru_cache(maxsize=256)
def _index(path: Path, max_pixels: int, *file_and_age: int) -> FileIndex:
    with _av().open(str(path)) as container:
        if not container.streams.video:
            raise UserError("expected a video, found a file without pictures", where=str(path))
        stream = container.streams.video[0]
        check_size(stream.width, stream.height, max_pixels, path)
        pixels = stream.width * stream.height
        shown: list[int | None] = []
        keys: list[tuple[int, int]] = []
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            shown.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if len(shown) > MAX_FRAMES:
                raise UserError(f"expected at most {MAX_FRAMES} frames", where=str(path), fix="cut the video")
        rate = float(stream.average_rate) if stream.average_rate else None
    known = sorted(time for time in shown if time is not None)
    times = tuple(known) if len(set(known)) == len(shown) else None
    keys.sort()
    return FileIndex(
        pixels, max(len(shown), 1), rate, times, tuple(key[0] for key in keys), tuple(key[1] for key in keys)
    )


def _from_keyframes(
    path: Path, index: FileIndex, numbers: Collection[int], max_pixels: int, budget: DecodeBudget
) -> Iterator[tuple[int, Image.Image]]:
    """The wanted frames that are found behind the keyframe before them."""
    assert index.times is not None
    with _opened(path) as (container, stream):
        frames: Iterator[Any] = iter(())
        now = None
        for number in sorted(numbers):
            time = index.times[number]
            key = index.key_before(time)
            if key is None:
                continue
            if now is None or now < index.keys[key]:
                container.seek(index.key_packets[key], stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                budget.spend(frame.width * frame.height)
                now = frame.pts
                if now is None or now >= time:
                    break
            if now == time:
                yield number, _picture(frame, number, max_pixels, path)


def _from_the_start(
    path: Path, index: FileIndex, numbers: Collection[int], max_pixels: int, budget: DecodeBudget
) -> dict[int, Image.Image]:
    found: dict[int, Image.Image] = {}
    for number, frame in _numbered(path, index, budget):
        if number in numbers:
            found[number] = _picture(frame, number, max_pixels, path)
        if len(found) == len(numbers):
            break
    return found


def _numbered(path: Path, index: FileIndex, budget: DecodeBudget) -> Iterator[tuple[int, Any]]:
    """Every frame that is decoded from the start, with its number: by its time, or counted where there are none."""
    numbers = {time: number for number, time in enumerate(index.times or ())}
    with _opened(path) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            budget.spend(frame.width * frame.height)
            if count == 0 and frame.pts not in numbers:
                numbers = {}
            number = numbers.get(frame.pts) if numbers else count
            if number is not None:
                yield number, frame


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What PyAV says of a file as a UserError."""
    av = _av()
    try:
        yield
    except (
        av.error.FFmpegError,
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
        MemoryError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"the video cannot be read ({error})", where=str(path), fix="convert it (to H.264 in MP4), or remove it"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    with _av().open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _picture(frame: Any, number: int, max_pixels: int, path: Path) -> Image.Image:
    check_size(frame.width, frame.height, max_pixels, path)
    picture = frame.to_image().convert("RGB")
    # Phones write a film as it was held, with the turn that players make.
    if frame.rotation:
        picture = picture.rotate(frame.rotation, expand=True)
    picture.info[FRAME_KEY] = number
    return picture


def check_size(width: int, height: int, max_pixels: int, path: Path) -> None:
    """Raises UserError for frames of more pixels than are allowed."""
    if width * height > max_pixels:
        raise UserError(
            f"expected frames of at most {max_pixels} pixels, found {width}x{height}",
            where=str(path),
            fix="scale the video down",
        )


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            "reading video files needs PyAV, which is not installed",
            fix=f"{install_extra('video')}, or give a folder of frames",
        ) from None
    return av


def read_frame(path: Path, number: int, *, max_pixels: int = MAX_FRAME_PIXELS) -> Image.Image:
    """One frame of a video file, as RGB. Raises UserError where it is not there, and as `read_frames` does."""
    with readable(path):
        index = file_index(path, max_pixels)
        checked([number], index.count, path)
        found = read_numbers(path, index, [number], max_pixels)
    if not found:
        raise UserError(f"frame {number} cannot be decoded", where=str(path), fix="convert the video (to H.264 in MP4)")
    return found[number]


def checked(indices: list[int], count: int, path: Path) -> list[int]:
    """The indices, if all lie within the video; else UserError."""
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise UserError(f"the frames {indices[:8]} were picked of a video of {count}", where=str(path))
    return [int(index) for index in indices]
