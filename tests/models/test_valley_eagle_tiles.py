"""How many tokens an image has, and which pixels the encoders see."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from align.models.open_image import open_image
from align.models.qwen2vl import qwen2vl_pixels, smart_resize
from align.models.valley_eagle.configuration import ValleyEagleConfig
from align.models.valley_eagle.pixels import cut_tiles, siglip_pixels
from align.models.valley_eagle.tiles import unpadded

PUBLISHED_CAP, TRAINING_CAP, CHAT_CAP = 16384 * 784, 571536, 1280 * 784
# Recorded from the published code: width, height, canvas, tile map, SigLIP tokens, then Qwen2-VL tokens at each cap.
VECTORS = [
    (3, 3, (1, 1), (14, 14), 392, 4, 4, 4),
    (384, 384, (1, 1), (14, 14), 392, 196, 196, 196),
    (385, 384, (2, 1), (14, 14), 392, 196, 196, 196),
    (500, 375, (2, 1), (14, 18), 448, 234, 234, 234),
    (480, 640, (2, 2), (28, 22), 812, 391, 391, 391),
    (640, 480, (2, 2), (22, 28), 812, 391, 391, 391),
    (800, 600, (3, 2), (28, 38), 1260, 609, 609, 609),
    (1024, 768, (3, 2), (28, 38), 1260, 999, 713, 999),
    (1024, 1024, (3, 3), (42, 42), 1960, 1369, 729, 1225),
    (1280, 720, (3, 2), (24, 42), 1204, 1196, 700, 1196),
    (720, 1280, (2, 3), (42, 24), 1204, 1196, 700, 1196),
    (1920, 1080, (3, 2), (24, 42), 1204, 2691, 700, 1222),
    (2048, 512, (3, 1), (10, 42), 616, 1314, 702, 1224),
    (4000, 3000, (3, 3), (32, 42), 1540, 15301, 713, 1230),
    (100, 1000, (1, 3), (42, 4), 364, 144, 144, 144),
    (1000, 100, (3, 1), (4, 42), 364, 144, 144, 144),
    (1152, 1152, (3, 3), (42, 42), 1960, 1681, 729, 1225),
    (899, 1024, (3, 3), (42, 36), 1708, 1184, 725, 1184),
]
GEOMETRY = ValleyEagleConfig().geometry()


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector[0]}x{vector[1]}")
def test_token_counts_equal_the_published_ones(vector):
    width, height, canvas, tile_map, siglip, published, training, chat = vector
    assert GEOMETRY.grid(width, height) == canvas
    assert GEOMETRY.map_size(width, height) == tile_map
    assert GEOMETRY.num_tile_tokens(width, height, tiled=True) == siglip
    assert GEOMETRY.num_tile_tokens(width, height, tiled=False) == 196
    for cap, expected in ((PUBLISHED_CAP, published), (TRAINING_CAP, training), (CHAT_CAP, chat)):
        assert GEOMETRY.num_eagle_tokens(width, height, 3136, cap) == expected


def test_the_training_cap_bounds_an_image_to_2689_tokens():
    sizes = [(w, h) for w in range(28, 3000, 97) for h in range(28, 3000, 97)]
    counts = [
        GEOMETRY.num_tile_tokens(*size, tiled=True) + GEOMETRY.num_eagle_tokens(*size, 3136, TRAINING_CAP)
        for size in sizes
        if max(size) <= 100 * min(size)
    ]
    assert max(counts) <= 2689


def test_unpadding_truncates_where_rounding_would_keep_more():
    # 94 * (42 / 1316) is 2.9999999999999996 in float64: 2 rows of content, pad (14 - 2) // 2 = 6 on either side.
    rows, columns = unpadded(1316, 94, 42, 14)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (2, 42)


def test_an_odd_slack_keeps_one_more_row():
    # 1000 x 100 on 14 x 42: int(100 * 0.042) = 4 rows, slack 10, pad 5. 1200 x 100: 3 rows, slack 11, pad 5,
    # 4 rows kept.
    rows, _ = unpadded(1200, 100, 42, 14)
    assert rows == slice(5, 9)


def test_a_map_above_the_limit_is_pooled():
    geometry = ValleyEagleConfig(max_vision_token=196 + 300).geometry()
    # 1024 x 768 has a map of 28 x 38 = 1064 tokens; sqrt(300 / (28 / 38)) = 20.2, times 28 / 38 = 14.9.
    assert geometry.map_size(1024, 768) == (14, 20)


def test_without_the_second_encoder_all_tiles_are_pooled_alike():
    # The published 1.5B derivative: 9 x 9 tokens a tile, at most 320 in all. 10 tiles: sqrt(32) = 5.6, so 5 x 5 each.
    geometry = ValleyEagleConfig(
        eagle_vision_tower=None, mm_projector_type="mlp_pixel_shuffle", max_vision_token=320
    ).geometry()
    assert geometry.num_tile_tokens(1024, 1024, tiled=True) == 10 * 25
    assert geometry.num_tile_tokens(1024, 1024, tiled=False) == 81
    assert geometry.num_eagle_tokens(1024, 1024, 3136, TRAINING_CAP) == 0


@pytest.mark.parametrize(("width", "height"), [(201, 1), (1, 10000), (10000, 1)])
def test_an_image_longer_than_200_to_1_is_refused(width, height):
    with pytest.raises(ValueError, match=f"factor of 200 at most, found {width}x{height}"):
        GEOMETRY.num_eagle_tokens(width, height, 3136, TRAINING_CAP)


def test_smart_resize_equals_that_of_transformers_within_its_limits():
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=TRAINING_CAP)
    rng = np.random.default_rng(0)
    for width, height in rng.integers(28, 3000, size=(200, 2)).tolist():
        width, height = max(width, height // 100), max(height, width // 100)
        new_w, new_h = smart_resize(width, height, factor=28, min_pixels=3136, max_pixels=TRAINING_CAP)
        assert processor.get_number_of_image_patches(height, width) == (new_w // 14) * (new_h // 14)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 3), (384, 384), (500, 375), (97, 701), (1300, 111)])
def test_arrays_have_the_sizes_that_the_counts_promise(width, height):
    image = noise(width, height)
    assert len(cut_tiles(image, GEOMETRY, tiled=True)) == GEOMETRY.num_tiles(width, height, tiled=True)
    rows, grid = qwen2vl_pixels(image, GEOMETRY.eagle, min_pixels=3136, max_pixels=TRAINING_CAP)
    assert rows.shape == (grid[0] * grid[1] * grid[2], 1176)
    assert len(rows) // 4 == GEOMETRY.num_eagle_tokens(width, height, 3136, TRAINING_CAP)


@pytest.mark.parametrize(("width", "height"), [(384, 384), (500, 375), (97, 701)])
def test_siglip_pixels_equal_those_of_transformers(width, height):
    image = noise(width, height)
    reference = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    tiles = cut_tiles(image, GEOMETRY, tiled=True)
    expected = reference([image, *tiles[1:]], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(siglip_pixels(tiles), np.stack(expected))


@pytest.mark.parametrize("max_pixels", [TRAINING_CAP, PUBLISHED_CAP])
@pytest.mark.parametrize(("width", "height"), [(3, 3), (500, 375), (1280, 720), (97, 701)])
def test_qwen2vl_pixels_equal_those_of_transformers(width, height, max_pixels):
    image = noise(width, height)
    reference = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=max_pixels)
    first = smart_resize(width, height, factor=28, min_pixels=4 * 784, max_pixels=16384 * 784)
    expected = reference([image.resize(first)], return_tensors="np")
    rows, grid = qwen2vl_pixels(image, GEOMETRY.eagle, min_pixels=3136, max_pixels=max_pixels)
    np.testing.assert_array_equal(rows, expected["pixel_values"])
    assert list(grid) == expected["image_grid_thw"][0].tolist()


def test_the_canvas_is_black_around_a_centred_image():
    tiles = cut_tiles(Image.new("RGB", (1000, 100), (255, 255, 255)), GEOMETRY, tiled=True)
    canvas = np.concatenate([np.asarray(tile) for tile in tiles[1:]], axis=1)
    lit = canvas.any(axis=(1, 2))
    # 3 x 1 canvas of 1152 x 384: the image is 1152 x 116, from row (384 - 116) // 2 = 134 on.
    assert (lit.argmax(), lit.sum()) == (134, 116)
    assert np.asarray(tiles[0]).min() == 255


def test_images_open_from_every_accepted_source(tmp_path):
    import base64

    image = noise(20, 10)
    path = tmp_path / "image #1 50%.png"
    image.save(path)
    data = path.read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [
        image,
        np.asarray(image),
        path,
        str(path),
        path.as_uri(),
        data,
        address,
        {"bytes": data, "path": None},
    ]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))


@pytest.mark.parametrize("source", ["https://example.org/a.png", 3, {"type": "image"}, np.zeros((3, 3, 3))])
def test_other_sources_are_refused(source):
    with pytest.raises(ValueError, match=r"expected an (image|array of bytes)"):
        open_image(source)
