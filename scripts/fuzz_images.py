"""Damaged pictures in; out what opening them raised that is no UserError, which must be nothing.

    python scripts/fuzz_images.py --mutations 20000 --seed 0

Every format that Pillow writes here is damaged in the ways that files are: bytes flipped, numbers in the header
replaced, cut, pieces doubled or taken out. Each result goes through the header, the decoder and the fingerprint.
"""

from __future__ import annotations

import argparse
import io
import random
import time
import traceback
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

from align.data.fingerprint import fingerprint
from align.errors import UserError
from align.media.decoding import read_header, read_picture

# What a picture may claim to be, written by Pillow: (format, mode, options).
WRITTEN = (
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"progressive": True}),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)),
    *(("GIF", mode, {}) for mode in ("L", "P", "RGBA")),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
    # Never to be opened: decoders that no data set needs.
    *((name, "RGB", {}) for name in ("AVIF", "JPEG2000", "PPM", "PCX", "TGA", "SGI", "ICO", "DDS", "IM")),
    *((name, mode, {}) for name, mode in (("SPIDER", "F"), ("BLP", "P"), ("MSP", "1"), ("XBM", "1"))),
)
NUMBERS = (0, 1, 2, 3, 8, 16, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1)


def seed_pictures() -> list[tuple[str, bytes]]:
    """One small file per line of WRITTEN that this Pillow can write, with EXIF where the format takes it."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 37, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    found = []
    for name, mode, options in WRITTEN:
        picture = (
            Image.fromarray(noise).convert("L").convert(mode) if mode in ("I;16", "I", "F") else Image.fromarray(noise)
        )
        buffer = io.BytesIO()
        try:
            picture.convert(mode).save(buffer, name, exif=exif, **options)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append((f"{name} {mode}", buffer.getvalue()))
    return found


def mutations(data: bytes, count: int, rng: random.Random) -> Iterator[bytes]:
    """`count` damaged versions of a file."""
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            _damage(damaged, rng)
        yield bytes(damaged)


def _damage(data: bytearray, rng: random.Random) -> None:
    """One change in place; three in four lie in the first 128 bytes, where the numbers stand."""
    if len(data) < 2:
        return
    place = rng.randrange(min(len(data), 128) if rng.random() < 0.75 else len(data))
    kind = rng.randrange(6)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.randrange(256)
    elif kind == 2:
        width = rng.choice((1, 2, 4))
        number = rng.choice(NUMBERS) % 256**width
        data[place : place + width] = number.to_bytes(width, rng.choice(("big", "little")))
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        piece = data[place : place + rng.randrange(1, 64)]
        data[place:place] = piece
    else:
        del data[place : place + rng.randrange(1, 64)]


def fault_of(data: bytes) -> str | None:
    """What opening these bytes raises that is no UserError, as a traceback; None where all is well."""
    try:
        read_header(io.BytesIO(data), "fuzzed", max_pixels=4_000_000)
        header, picture = read_picture(io.BytesIO(data), "fuzzed", max_pixels=4_000_000)
        assert picture.mode == "RGB", picture.mode
        assert picture.size == header.size, (picture.size, header.size)
        _, small = read_picture(io.BytesIO(data), "fuzzed", max_pixels=4_000_000, draft_px=64)
        fingerprint(small)
    except UserError:
        return None
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    """Prints every kind of fault once, and counts; exit code 1 where there is any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000, help="damaged pictures in all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    seeds = seed_pictures()
    each = -(-arguments.mutations // len(seeds))
    faults: Counter[str] = Counter()
    started, slowest = time.perf_counter(), 0.0
    for name, data in seeds:
        for damaged in mutations(data, each, rng):
            before = time.perf_counter()
            fault = fault_of(damaged)
            slowest = max(slowest, time.perf_counter() - before)
            if fault is not None:
                kind = f"{name}: {fault.strip().splitlines()[-1]}"
                if not faults[kind]:
                    print(fault)
                faults[kind] += 1
    for kind, count in faults.most_common():
        print(f"{count:6d}  {kind}")
    print(
        f"{each * len(seeds)} damaged pictures of {len(seeds)} kinds: {sum(faults.values())} exceptions that are no "
        f"UserError; {time.perf_counter() - started:.0f} s, the slowest picture {slowest:.2f} s"
    )
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
