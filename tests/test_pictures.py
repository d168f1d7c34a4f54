"""Pictures are opened as image viewers show them, in one place, and nothing but a UserError gets out."""

import base64
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from align.data.pictures import PictureStore
from align.errors import UserError
from align.media.images import ImageStore, treatment_counts
from align.media.rgb import ON_WHITE, RESCALED, UPRIGHT
from align.models.open_image import open_image
from align.plan.prompt_sizes import PromptMeter
from align.report.thumbnails import Pictures
from scripts.fuzz_images import fault_of, mutations, seed_pictures
from tests import tiny_models


def corners(picture):
    """Where the four corners of `marked` are: the four are white but for the top left one, which is red."""
    (right, bottom) = (picture.width - 2, picture.height - 2)
    return [picture.getpixel(place)[1] < 128 for place in ((1, 1), (right, 1), (1, bottom), (right, bottom))]


def marked() -> Image.Image:
    """40 wide, 60 high, white, with a red square in the top left corner."""
    picture = Image.new("RGB", (40, 60), "white")
    picture.paste((255, 0, 0), (0, 0, 16, 16))
    return picture


# How the upright picture is stored so that an orientation turns it back.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def write_turned(path, orientation):
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    (marked().transpose(turn) if turn is not None else marked()).save(path, exif=exif)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_every_orientation_stands_upright_everywhere(tmp_path, suffix, orientation):
    name = f"a.{suffix}"
    write_turned(tmp_path / name, orientation)
    store = ImageStore(tmp_path)
    picture = store.open(name)
    assert picture.size == store.size(name) == (40, 60)
    assert corners(picture) == [True, False, False, False]
    assert np.array_equal(picture, load_image(str(tmp_path / name)))
    assert np.array_equal(picture, open_image(tmp_path / name))
    assert np.array_equal(picture, store.open(Image.open(tmp_path / name)))
    assert treatment_counts([store.header(name)]) == ({UPRIGHT: 1} if orientation > 1 else {})
    taken = PictureStore(tmp_path, tmp_path / "out", min_side=1)
    assert taken.take(name).size == (40, 60)
    assert taken.treated == ({UPRIGHT: 1} if orientation > 1 else {})
    # Turned once, not twice: nothing is left that would turn it again.
    assert corners(open_image(picture)) == [True, False, False, False]


def test_a_turned_picture_and_its_upright_copy_have_one_fingerprint(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)).resize((40, 60), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    smooth.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    store = PictureStore(tmp_path, tmp_path / "out", min_side=1)
    upright, turned = store.take("upright.png"), store.take("turned.png")
    assert all(np.array_equal(a, b) for a, b in zip(upright.print, turned.print, strict=True))


def test_exif_behind_the_pixels_of_a_png_counts_too(tmp_path):
    write_turned(tmp_path / "early.png", 6)
    data = (tmp_path / "early.png").read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    tail = data.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(data[:start] + data[end:tail] + data[start:end] + data[tail:])
    store = ImageStore(tmp_path)
    assert store.size("late.png") == store.open("late.png").size == (40, 60)


def test_damaged_exif_leaves_a_picture_as_it_lies(tmp_path):
    marked().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    marked().save(tmp_path / "b.png", exif=b"Exif\0\0MM")
    for name in ("a.jpg", "b.png"):
        assert ImageStore(tmp_path).open(name).size == ImageStore(tmp_path).size(name) == (40, 60)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grey16.png", np.linspace(0, 65535, 256).astype(np.uint16)),
        ("grey16.tiff", np.linspace(0, 65535, 256).astype(np.uint16)),
        ("unit.tiff", np.linspace(0, 1, 256, dtype=np.float32)),
        ("bytes.tiff", np.linspace(0, 255, 256, dtype=np.float32)),
        ("kelvin.tiff", np.linspace(270, 310, 256, dtype=np.float32)),
        ("signed.tiff", np.linspace(-1000, 1000, 256).astype(np.int32)),
        ("grey16_in_32.tiff", np.linspace(0, 65535, 256).astype(np.int32)),
    ],
)
def test_a_ramp_of_more_than_eight_bits_becomes_the_ramp_of_bytes(tmp_path, name, values):
    Image.fromarray(np.tile(values, (4, 1))).save(tmp_path / name)
    store = ImageStore(tmp_path)
    found = np.asarray(store.open(name))
    assert np.abs(found - np.arange(256).reshape(1, 256, 1)).max() <= 1
    assert store.header(name).treatments == (RESCALED,)
    assert np.array_equal(found, open_image(tmp_path / name))


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    # 12 of 16 bits used: the scale is the type's, so that two pictures of one camera stay comparable.
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "a.png")
    assert set(np.asarray(ImageStore(tmp_path).open("a.png")).ravel()) == {round(4095 / 65535 * 255)}


def test_floats_that_are_no_numbers_are_black(tmp_path):
    Image.fromarray(np.array([[0.0, 1.0, np.nan, np.inf]], np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(ImageStore(tmp_path).open("a.tiff"))[0, :, 0].tolist() == [0, 255, 0, 255]


def transparent(mode):
    """A black bar on nothing, in several of Pillow's ways to say so."""
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 2))
    if mode in ("RGBA", "LA"):
        return picture.convert(mode), {}
    grey = Image.new("L", (8, 8), 7)
    grey.paste(0, (0, 0, 8, 2))
    if mode == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16)), {"transparency": 7}
    if mode == "RGB":
        return grey.convert("RGB"), {"transparency": (7, 7, 7)}
    if mode == "1":
        return grey.point(lambda value: 255 * (value > 0)).convert("1"), {"transparency": 255}
    return (grey if mode == "L" else grey.convert(mode)), {"transparency": 7}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "RGB", "I;16"])
def test_black_on_transparent_is_black_on_white(tmp_path, mode):
    picture, options = transparent(mode)
    picture.save(tmp_path / "a.png", **options)
    store = ImageStore(tmp_path)
    found = np.asarray(store.open("a.png"))
    assert set(found[:2].ravel()) == {0}
    assert set(found[2:].ravel()) == {255}
    assert ON_WHITE in store.header("a.png").treatments
    assert np.array_equal(found, open_image((tmp_path / "a.png").read_bytes()))


def test_half_transparent_red_is_pink_and_a_gif_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 3), (255, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert ImageStore(tmp_path).open("a.webp").getpixel((0, 0)) == (255, 127, 127)
    transparent("RGBA")[0].save(tmp_path / "a.gif")
    found = ImageStore(tmp_path).open("a.gif")
    assert (found.getpixel((0, 0)), found.getpixel((0, 7))) == ((0, 0, 0), (255, 255, 255))


def test_plain_is_what_pillow_does(tmp_path):
    write_turned(tmp_path / "turned.jpg", 6)
    transparent("RGBA")[0].save(tmp_path / "clear.png")
    store = ImageStore(tmp_path, conversion="plain")
    for name in ("turned.jpg", "clear.png"):
        expected = Image.open(tmp_path / name).convert("RGB")
        assert np.array_equal(store.open(name), expected)
        assert store.size(name) == expected.size
        assert store.header(name).treatments == ()


def test_plan_and_report_see_the_picture_upright(tmp_path):
    write_turned(tmp_path / "a.jpg", 6)
    uri = Pictures(tmp_path).uri("a.jpg")
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert corners(shown) == [True, False, False, False]
    ImageStore(tmp_path).open("a.jpg").save(tmp_path / "upright.png")
    meter = PromptMeter(tiny_models.llava_onevision_processor(), ImageStore(tmp_path))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    turned, upright = (meter.size("q", messages, [name]) for name in ("a.jpg", "upright.png"))
    assert (turned.tokens, turned.pixels) == (upright.tokens, upright.pixels)


@pytest.mark.parametrize("name", ["AVIF", "JPEG2000", "DDS", "PPM", "TGA", "ICO", "PCX"])
def test_formats_that_no_data_set_has_are_refused_under_any_name(tmp_path, name):
    try:
        marked().save(tmp_path / "a", name)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {name}")
    (tmp_path / "a").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*not a readable image.*JPEG, PNG, WEBP, GIF, BMP, TIFF"):
        ImageStore(tmp_path).open("a.png")


def test_a_picture_of_a_phone_with_several_pictures_is_its_first(tmp_path):
    marked().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert ImageStore(tmp_path).open("a.jpg").size == (40, 60)


@pytest.mark.parametrize("reference", ["a\0.png", "loop.png", "\ud800.png", "x" * 5000, "a.png/b.png"])
def test_references_that_are_no_paths_are_named(tmp_path, reference):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "a.png").write_bytes(b"")
    for look in (ImageStore(tmp_path).open, ImageStore(tmp_path).size, ImageStore(tmp_path).sha256):
        with pytest.raises(UserError):
            look(reference)


@pytest.mark.parametrize("error", [struct.error("x"), IndexError(), MemoryError(), RecursionError(), zlib.error("y")])
def test_whatever_a_decoder_raises_is_a_user_error(tmp_path, monkeypatch, error):
    marked().save(tmp_path / "a.png")

    def broken(image, *arguments):
        raise error

    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(UserError, match=r"a\.png.*cannot be decoded"):
        ImageStore(tmp_path).open("a.png")


def test_damaged_pictures_raise_nothing_but_user_errors():
    rng = random.Random(7)
    seeds = seed_pictures()
    assert len(seeds) >= 40
    for name, data in seeds:
        assert fault_of(data) is None, name
        for damaged in mutations(data, 20, rng):
            assert fault_of(damaged) is None, name
