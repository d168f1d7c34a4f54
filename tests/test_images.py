import struct
import zlib

import pytest
from PIL import Image

from align.errors import UserError
from align.media.images import ImageStore


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGBA", (4, 3), (255, 0, 0, 128)).save(root / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    return ImageStore(root, max_pixels=100)


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 60000 x 60000 pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data


def test_images_open_as_rgb_with_width_first(store):
    assert store.size("a.png") == (4, 3)
    image = store.open("a.png")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("reference", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "link.png"])
def test_nothing_outside_the_root_is_opened(store, reference):
    (store.root / "link.png").symlink_to(store.root.parent / "secret.png")
    with pytest.raises(UserError, match="outside the image root"):
        store.open(reference)


@pytest.mark.parametrize("reference", ["https://example.com/a.png", "file:///etc/passwd", "data:image/png;base64,AA=="])
def test_urls_are_refused(store, reference):
    with pytest.raises(UserError, match="is not a file"):
        store.open(reference)


def test_a_missing_image_is_named(store):
    with pytest.raises(UserError, match=r"no image 'b\.png'"):
        store.open("b.png")


def test_a_broken_image_is_named(store):
    (store.root / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png.*not a readable image"):
        store.open("text.png")
    whole = (store.root / "a.png").read_bytes()
    (store.root / "torn.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"torn\.png"):
        store.open("torn.png")


def test_a_decompression_bomb_is_refused_before_decoding(store):
    (store.root / "bomb.png").write_bytes(bomb())
    with pytest.raises(UserError, match=r"bomb\.png.*(too large|more than)"):
        store.open("bomb.png")
    Image.new("RGB", (11, 10)).save(store.root / "big.png")
    with pytest.raises(UserError, match="11x10 pixels, more than 100"):
        store.open("big.png")
