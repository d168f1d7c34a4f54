"""Frames of real video files, written here with PyAV, and of folders."""

from __future__ import annotations

import builtins
import contextlib
import struct
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from align.errors import UserError
from align.media.images import ImageStore
from align.media.video import at_interval, frame_references, frame_sampler_of, read_frames, uniform
from align.media.video_decoding import (
    FRAME_KEY,
    DecodeBudget,
    _from_keyframes,
    _from_the_start,
    file_index,
    read_frame,
)
from align.models import open_image
from align.models.load import load_processor

WIDTH, HEIGHT = 64, 48


def shade(number: int) -> int:
    """The grey of a frame: far enough from its neighbours to survive compression."""
    return 20 + 15 * number


def write_video(path, num_frames: int = 13, rate: int = 10, codec: str = "mpeg4", size=(WIDTH, HEIGHT)):
    """A video whose frames are plain, each of its own grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            picture = Image.new("RGB", size, (shade(number),) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def greys(frames) -> list[int]:
    return [round((float(np.asarray(frame).mean()) - 20) / 15) for frame in frames]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.mkv", "libvpx-vp9")])
def test_the_picked_frames_of_a_file_are_read(tmp_path, name, codec):
    frames = read_frames(write_video(tmp_path / name, codec=codec), 8)
    assert greys(frames) == [0, 1, 3, 5, 6, 8, 10, 12]
    assert [frame.info[FRAME_KEY] for frame in frames] == [0, 1, 3, 5, 6, 8, 10, 12]
    assert {(frame.size, frame.mode) for frame in frames} == {((WIDTH, HEIGHT), "RGB")}


def test_a_short_video_has_frames_twice(tmp_path):
    assert greys(read_frames(write_video(tmp_path / "a.mp4", num_frames=3), 4)) == [0, 0, 1, 2]


def test_a_sampler_gets_the_frame_rate(tmp_path):
    seen = []

    def sampler(count, rate):
        seen.append((count, rate))
        return at_interval(count, rate, seconds=0.5)

    assert greys(read_frames(write_video(tmp_path / "a.mp4", rate=10), sampler=sampler)) == [0, 5, 10]
    assert seen == [(13, 10.0)]


def test_frames_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for number in reversed(range(5)):
        Image.new("RGB", (8, 8), (shade(number),) * 3).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    frames = read_frames(tmp_path, 3)
    assert greys(frames) == [0, 2, 4]
    assert all(FRAME_KEY not in frame.info for frame in frames)


def test_every_two_seconds_at_most_so_many():
    assert at_interval(100, 9.6) == [0, 20, 40, 60, 80]
    assert at_interval(100, 9.6, at_most=3) == [0, 40, 80]
    assert at_interval(3, None) == [0, 2]


def test_the_number_of_frames_can_be_set_over_the_model_s_own():
    class Processor:
        def frame_indices(self, num_frames, frames_per_second=None):
            return [num_frames - 1]

    assert frame_sampler_of(Processor())(9, None) == [8]
    assert frame_sampler_of(Processor(), 2)(9, None) == [0, 8]
    assert frame_sampler_of(object())(8, None) == list(range(8)) == uniform(8)


def test_what_cannot_be_read_is_a_user_error(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "empty").mkdir()
    for name, reason in [
        ("text.mp4", "cannot be read"),
        ("cut.mp4", "cannot be read"),
        ("empty", "expected frames"),
        ("missing.mp4", "no such video"),
    ]:
        with pytest.raises(UserError, match=reason) as error:
            read_frames(tmp_path / name)
        assert name in str(error.value)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="without pictures"):
        read_frames(tmp_path / "a.wav")


def test_frames_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(UserError, match="64x48"):
        read_frames(write_video(tmp_path / "a.mp4"), max_pixels=WIDTH * HEIGHT - 1)


def gif(path, num_frames, side=9000):
    """A GIF with a canvas of side x side, of whose frames each changes one pixel: some 20 bytes a frame."""
    screen = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\x04\x0a\x00\x00\x00"
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    path.write_bytes(screen + (control + frame) * num_frames + b"\x3b")
    return path


def test_a_gif_that_works_is_a_video(tmp_path):
    assert len(read_frames(gif(tmp_path / "a.gif", 40, side=32), 8)) == 8


@pytest.mark.parametrize("num_frames", [40, 100_000])
def test_many_huge_frames_in_a_small_file_are_refused_before_they_are_decoded(tmp_path, num_frames):
    path = gif(tmp_path / "a.gif", num_frames)
    with pytest.raises(UserError, match="8 frames of 81,000,000 pixels"):
        read_frames(path)
    with pytest.raises(UserError, match="8 frames of 81,000,000 pixels"):
        frame_references(ImageStore(tmp_path), "a.gif", uniform)


def test_a_frame_far_behind_its_keyframe_is_refused_before_it_is_decoded(tmp_path):
    path = gif(tmp_path / "a.gif", 100_000)
    with pytest.raises(UserError, match="would be decoded"):
        read_frame(path, 99_999)


def test_what_is_decoded_in_all_is_limited_also_where_the_packets_tell_nothing(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    index = file_index(path, 10**6)
    for budget, is_enough in ((6, True), (5, False)):
        found = DecodeBudget(path, left=budget * WIDTH * HEIGHT)
        with contextlib.nullcontext() if is_enough else pytest.raises(UserError, match="would be decoded"):
            assert list(_from_the_start(path, index, [5], 10**6, found)) == [5]


def test_a_folder_of_huge_frames_is_refused(tmp_path):
    for number in range(8):
        Image.new("1", (9000, 9000)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match="frames of 81,000,000 pixels"):
        read_frames(tmp_path)


def test_a_film_held_upright_stands_upright(tmp_path):
    path = tmp_path / "lying.mp4"
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    picture.paste("black", (0, 0, WIDTH // 2, HEIGHT))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    # The track's matrix, behind version, times, id, duration and layer (ISO 14496-12, 8.3.2): a quarter turn clockwise.
    place = data.index(b"tkhd") + 4 + 24 + 16
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    found = read_frame(tmp_path / "turned.mp4", 0)
    assert found.size == (HEIGHT, WIDTH)
    assert np.asarray(found)[: WIDTH // 2 - 8].max() < 64
    assert np.asarray(found)[WIDTH // 2 + 8 :].min() > 192


def test_a_sampler_that_picks_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="of a video of 13"):
        read_frames(write_video(tmp_path / "a.mp4"), sampler=lambda count, rate: [count])


def test_without_pyav_files_are_refused_and_folders_are_read(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    video = write_video(tmp_path / "a.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    monkeypatch.setattr(builtins, "__import__", no_av)
    with pytest.raises(UserError, match=r"pip install 'av>=14"):
        read_frames(video)
    assert len(read_frames(tmp_path, sampler=partial(uniform, count=2))) == 2


def test_models_know_the_frames_of_a_file():
    assert open_image.FRAME_KEY == FRAME_KEY


# Containers and codecs with B-frames and a keyframe every 7 frames, in groups that are closed or open; one refreshes
# its pictures column by column instead, one has no times.
FILMS = {
    "closed.mp4": ("libx264", {"g": "7", "bf": "3", "x264-params": "scenecut=0"}),
    "open.mkv": ("libx264", {"g": "7", "bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=7:min-keyint=7"}),
    "refresh.ts": ("libx264", {"g": "7", "x264-params": "intra-refresh=1:scenecut=0"}),
    "open.ts": ("mpeg2video", {"g": "7", "bf": "2"}),
    "old.avi": ("mpeg4", {"g": "7", "bf": "2"}),
    "two.mp4": ("mpeg4", {"g": "7", "bf": "2"}),
    "vp9.mkv": ("libvpx-vp9", {"g": "7"}),
}


def write_film(path, num_frames=40):
    """Noise that moves and changes, so that no frame resembles another."""
    codec, options = FILMS[path.name]
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH + num_frames, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(num_frames):
            picture = noise[:, number : number + WIDTH] // 2 + np.uint8(3 * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def decoded_from_the_start(path):
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_image().convert("RGB")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", FILMS)
def test_a_frame_by_itself_is_the_one_that_decoding_from_the_start_gives(tmp_path, name):
    film = write_film(tmp_path / name)
    expected = decoded_from_the_start(film)
    assert len({frame.tobytes() for frame in expected}) == len(expected) == 40
    for number in range(0, 40, 3):
        found = read_frame(film, number)
        assert found.info[FRAME_KEY] == number
        np.testing.assert_array_equal(np.asarray(found), expected[number])
    for found, number in zip(read_frames(film, 11), uniform(40, count=11), strict=True):
        np.testing.assert_array_equal(np.asarray(found), expected[number])


@pytest.mark.parametrize("name", ["closed.mp4", "open.mkv", "two.mp4", "vp9.mkv"])
def test_every_frame_is_found_behind_the_keyframe_before_it(tmp_path, name):
    film = write_film(tmp_path / name)
    index = file_index(film, WIDTH * HEIGHT)
    assert len(index.keys) >= 6
    for number in range(40):
        assert [found for found, _ in _from_keyframes(film, index, [number], WIDTH * HEIGHT, DecodeBudget(film))] == [
            number
        ]


def test_frames_of_a_film_that_was_cut_keep_their_numbers(tmp_path):
    """Cut before an open group: its first packets need what was cut off and give no picture."""
    with av.open(str(write_film(tmp_path / "open.ts"))) as whole, av.open(str(tmp_path / "cut.ts"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        second_key = [number for number, packet in enumerate(packets) if packet.is_keyframe][2]
        for packet in packets[second_key:]:
            packet.stream = stream
            cut.mux(packet)
    film = tmp_path / "cut.ts"
    expected = decoded_from_the_start(film)
    assert len(expected) < file_index(film, WIDTH * HEIGHT).count
    frames = read_frames(film, sampler=lambda count, rate: list(range(count)))
    assert len(frames) == len(expected)
    for frame, right in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), right)
        np.testing.assert_array_equal(np.asarray(read_frame(film, frame.info[FRAME_KEY])), right)


def test_a_frame_behind_the_last_is_refused(tmp_path):
    film = write_film(tmp_path / "closed.mp4", num_frames=3)
    with pytest.raises(UserError, match=r"the frames \[3\] were picked of a video of 3"):
        read_frame(film, 3)


def test_a_model_that_takes_no_videos_says_so():
    processor = load_processor(Path(__file__).parent / "golden" / "vl360_tiny")
    with pytest.raises(UserError, match="QH360VLProcessor takes images, not videos"):
        frame_sampler_of(processor)
