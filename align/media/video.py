"""A video in, a few of its frames out as PIL images: a file through PyAV, or a folder of frames.

Which frames are looked at differs between models: a sampler gets the number of frames and the frame rate and gives
indices. A model's processor has its own (`processor.frame_indices`). Frames of a file carry their number under
`info["video_frame"]`: some models scale them otherwise than pictures. Sound is not read, addresses are not fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from align.errors import UserError
from align.media.images import FRAME_MARK, ImageStore
from align.media.video_decoding import (
    FRAME_KEY,
    MAX_FRAME_PIXELS,
    check_held,
    checked,
    decodable,
    file_index,
    read_numbers,
    readable,
)

if TYPE_CHECKING:
    from transformers import ProcessorMixin

FRAME_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# (number of frames in the video, frames per second or None) -> indices of the frames to look at, in order.
FrameSampler = Callable[[int, float | None], list[int]]


def uniform(num_frames: int, frames_per_second: float | None = None, *, count: int = 8) -> list[int]:
    """`count` frames from the first to the last, indices truncated: Valley 1, Valley2 (8),
    LLaVA-OneVision (16 or more).

    A video with fewer frames has some twice, as in the originals.

    >>> uniform(13), uniform(3, count=4)
    ([0, 1, 3, 5, 6, 8, 10, 12], [0, 0, 1, 2])
    """
    return np.linspace(0, num_frames - 1, count).astype(int).tolist()


def at_interval(
    num_frames: int, frames_per_second: float | None = None, *, seconds: float = 2.0, at_most: int | None = None
) -> list[int]:
    """A frame every so many seconds from the first one on (Valley 1's "fps" mode: 2 s); of too many, evenly some.

    The rate is rounded to whole frames a second first, as in the original. Without a rate, a frame is a second.

    >>> at_interval(10, 1.0), at_interval(10, 1.0, at_most=3)
    ([0, 2, 4, 6, 8], [0, 4, 8])
    """
    rate = max(round(frames_per_second or 1.0), 1)
    indices = list(range(0, num_frames, max(int(rate * seconds), 1)))
    if at_most is None or len(indices) <= at_most:
        return indices
    return [indices[i] for i in uniform(len(indices), count=at_most)]


def frame_sampler_of(processor: ProcessorMixin, num_frames: int | None = None) -> FrameSampler:
    """How a model picks frames: `num_frames` evenly where that is given, else as its processor says, else 8 evenly.

    Raises UserError for a model that takes no videos.
    """
    if not getattr(processor, "takes_videos", True):
        raise UserError(
            f"{type(processor).__name__} takes images, not videos",
            fix="leave questions about videos out, or use another model",
        )
    if num_frames is not None:
        return partial(uniform, count=num_frames)
    return getattr(processor, "frame_indices", uniform)


def frame_references(store: ImageStore, video: str, sampler: FrameSampler) -> list[str]:
    """The picked frames of a video file or a folder of frames, as references that `store` opens like any image.

    Raises UserError as `read_frames` does, and where the video lies outside the store's root.
    """
    root = store.root.resolve()
    path = (root / video).resolve()
    if path.is_dir() and path.is_relative_to(root):
        names = _frame_names(path)
        picked = checked(sampler(len(names), None), len(names), path)
        return [f"{video.rstrip('/')}/{names[index]}{FRAME_MARK}" for index in picked]
    path = store.path(video)
    frames = _from_file(path, sampler, store.max_pixels)
    return [f"{video}#frame={frame.info[FRAME_KEY]}" for frame in frames]


def read_frames(
    path: str | Path,
    num_frames: int | None = None,
    sampler: FrameSampler | None = None,
    *,
    max_pixels: int = MAX_FRAME_PIXELS,
) -> list[Image.Image]:
    """The picked frames of a video file, or of a folder of frames in the order of their names, as RGB images.

    `sampler`: which ones, by default `num_frames` evenly (8 where neither is given). `max_pixels`:
    the most pixels of a frame.

    Raises UserError for a path that is not there, a file that cannot be decoded, a folder without frames, a frame that
    is too large, and where PyAV is missing.
    """
    path = Path(path)
    sampler = sampler or partial(uniform, count=num_frames or 8)
    if path.is_dir():
        return _from_folder(path, sampler, max_pixels)
    if not path.is_file():
        raise UserError("there is no such video", where=str(path), fix="check the path")
    return _from_file(path, sampler, max_pixels)


def _from_folder(folder: Path, sampler: FrameSampler, max_pixels: int) -> list[Image.Image]:
    names = _frame_names(folder)
    store = ImageStore(folder, max_pixels)
    picked = [names[index] + FRAME_MARK for index in checked(sampler(len(names), None), len(names), folder)]
    check_held(len(picked), max(math.prod(store.size(name)) for name in picked), folder)
    return [store.open(name) for name in picked]


def _frame_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
    if not names:
        raise UserError(
            f"expected frames ({', '.join(FRAME_SUFFIXES)}), found none", where=str(folder), fix="check the path"
        )
    return names


def _from_file(path: Path, sampler: FrameSampler, max_pixels: int) -> list[Image.Image]:
    with readable(path):
        index = file_index(path, max_pixels)
        wanted = checked(sampler(index.count, index.rate), index.count, path)
        frames = read_numbers(path, index, set(wanted), max_pixels)
        if len(frames) < len(set(wanted)):
            # Some packets hold no picture of their own, or are damaged: the frames that come out are the video.
            there = decodable(path, index)
            if not there:
                raise UserError("expected a video, found no frame that can be decoded", where=str(path))
            wanted = [there[number] for number in checked(sampler(len(there), index.rate), len(there), path)]
            frames = read_numbers(path, index, set(wanted), max_pixels)
    return [frames[number] for number in wanted]
