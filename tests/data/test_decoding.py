import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from coss_hf.data.decoding import decode, upright_rgb


def encoded(image: Image.Image, fmt: str = "PNG", **options) -> dict:
    buffer = BytesIO()
    image.save(buffer, fmt, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(record: dict) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as Pillow's on palettes with transparency
        image = decode(record)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def uniform(mode: str, colour) -> Image.Image:
    return Image.new(mode, (4, 3), colour)


def palette(transparency=None) -> dict:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 200, 30, 60, 255, 255, 255])
    return encoded(image, transparency=transparency) if transparency is not None else encoded(image)


def palette_alpha() -> dict:
    image = Image.new("PA", (4, 3))
    image.putpalette([200, 30, 60] + [0] * 765)
    image.putalpha(40)
    return encoded(image, "TIFF")


@pytest.mark.parametrize(
    "record, stored_mode, colour",
    [
        (encoded(uniform("1", 1)), "1", (255, 255, 255)),
        (encoded(uniform("1", 0)), "1", (0, 0, 0)),
        (encoded(uniform("L", 77)), "L", (77, 77, 77)),
        (encoded(uniform("L", 77), transparency=77), "L", (77, 77, 77)),
        (encoded(uniform("LA", (77, 10))), "LA", (77, 77, 77)),
        (palette(), "P", (200, 30, 60)),
        (palette(transparency=1), "P", (200, 30, 60)),
        (palette(transparency=b"\xff\x80\x00"), "P", (200, 30, 60)),
        (palette_alpha(), "PA", (200, 30, 60)),
        (encoded(uniform("RGB", (200, 30, 60))), "RGB", (200, 30, 60)),
        (encoded(uniform("RGBA", (200, 30, 60, 0))), "RGBA", (200, 30, 60)),
        (encoded(uniform("RGBA", (200, 30, 60, 90)), "WEBP", lossless=True, exact=True), "RGBA", (200, 30, 60)),
        (encoded(uniform("RGBX", (200, 30, 60, 9)), "TIFF"), "RGB", (200, 30, 60)),
        (encoded(uniform("CMYK", (0, 255, 255, 0)), "TIFF"), "CMYK", (255, 0, 0)),
        (encoded(uniform("YCbCr", (76, 85, 255)), "TIFF"), "YCbCr", (254, 0, 0)),
        # CIE Lab (D50) as L * 2.55, a + 128, b + 128; the colours by the CIE's formulas and sRGB's matrix.
        (encoded(uniform("LAB", (128, 168, 148)), "TIFF"), "LAB", (186, 89, 88)),
        (encoded(uniform("LAB", (128, 118, 98)), "TIFF"), "LAB", (65, 126, 170)),
        (encoded(uniform("LAB", (137, 128, 128)), "TIFF"), "LAB", (128, 128, 128)),
    ],
)
def test_every_mode_comes_out_in_its_true_colour(record, stored_mode, colour):
    mode = Image.open(BytesIO(record["bytes"])).mode
    if stored_mode == "YCbCr" and mode == "RGB":
        pytest.skip("Pillow before 13 reads this file as RGB, in colours of its own")
    assert mode == stored_mode
    tolerance = 3 if stored_mode == "LAB" else 2 if stored_mode == "YCbCr" else 0
    np.testing.assert_allclose(pixels(record), np.broadcast_to(colour, (3, 4, 3)), atol=tolerance)


@pytest.mark.parametrize("mode, colour", [("RGB", (200, 30, 60)), ("L", (90, 90, 90)), ("CMYK", (255, 0, 0))])
def test_jpeg_in_colour_grey_and_inverted_cmyk(mode, colour):
    stored = {"RGB": colour, "L": 90, "CMYK": (0, 255, 255, 0)}[mode]
    record = encoded(uniform(mode, stored), "JPEG", quality=95)
    assert Image.open(BytesIO(record["bytes"])).mode == mode
    if mode == "CMYK":
        assert b"Adobe" in record["bytes"]  # the marker under which ink values are stored inverted
    np.testing.assert_allclose(pixels(record), np.broadcast_to(colour, (3, 4, 3)), atol=3)


def test_transparent_rgba_equals_pillows_own_conversion():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8))
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode, plain", [("HSV", "RGB"), ("La", "LA"), ("RGBa", "RGBA")])
def test_modes_that_only_rare_readers_yield(mode, plain, monkeypatch):
    opened = uniform("RGBA", (200, 30, 60, 255)).convert(plain).convert(mode)
    expected = np.asarray(opened.convert(plain).convert("RGB"))
    monkeypatch.setattr(Image, "open", lambda _, formats: opened)
    np.testing.assert_array_equal(pixels({"bytes": b"any", "path": None}), expected)
    assert plain == "LA" or np.abs(expected[0, 0].astype(int) - (200, 30, 60)).max() <= 3


@pytest.mark.parametrize("kind, readers", [("JPEG", ["JPEG"]), ("PNG", ["PNG"]), ("WEBP", None), ("BMP", None)])
def test_usual_formats_are_opened_by_their_reader_alone(kind, readers, monkeypatch):
    record = encoded(uniform("RGB", (200, 30, 60)), kind)
    given = []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda file, formats: given.append(formats) or opened(file, formats=formats))
    assert np.abs(pixels(record).astype(int) - (200, 30, 60)).max() <= 3 and given == [readers]


def test_an_image_in_memory_is_not_changed():
    """Its transparent colour was taken from it: what the user saved afterwards was another image."""
    image = uniform("P", 1)
    image.info["transparency"] = 1
    upright_rgb(image)
    assert image.info["transparency"] == 1 and image.mode == "P"


SIXTEEN = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]], np.uint16)
EIGHT = np.round(SIXTEEN / 257).astype(int)  # 0, 0, 1, 1, 128, 254, 255, 255


@pytest.mark.parametrize(
    "record",
    [
        encoded(Image.fromarray(SIXTEEN)),
        encoded(Image.fromarray(SIXTEEN), "TIFF"),
        encoded(Image.frombytes("I;16B", (8, 1), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
        {"bytes": b"P5 8 1 65535\n" + SIXTEEN.astype(">u2").tobytes(), "path": None},
    ],
    ids=["png", "tiff", "tiff big-endian", "tiff 32 bit", "pgm"],
)
def test_sixteen_bits_are_scaled_not_clipped(record):
    assert Image.open(BytesIO(record["bytes"])).mode.startswith("I")
    assert EIGHT.tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]
    np.testing.assert_array_equal(pixels(record), np.repeat(EIGHT[..., None], 3, 2))


@pytest.mark.parametrize("values, expected", [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 77.4, 255.0], [0, 77, 255])])
def test_floating_point_grey(values, expected):
    record = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    np.testing.assert_array_equal(pixels(record)[0, :, 0], expected)


@pytest.mark.parametrize(
    "values", [np.array([[-1, 5]], np.int32), np.array([[0, 70000]], np.int32), np.float32([[0, np.nan]])]
)
def test_grey_values_without_a_known_scale_are_refused(values):
    with pytest.raises(ValueError, match="expected 0 to"):
        decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, fmt):
    scene = np.zeros((16, 24, 3), np.uint8)
    scene[:8, :8] = 255, 0, 0  # as seen: red at the upper left, blue at the lower right
    scene[8:, 16:] = 0, 0, 255
    # What the camera stores when turned, from the EXIF standard: where row 0 and column 0 of the file lie in the scene.
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: scene.transpose(1, 0, 2)[::-1],
        7: scene.transpose(1, 0, 2)[::-1, ::-1],
        8: scene.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if fmt == "JPEG" else {}
    record = encoded(Image.fromarray(np.ascontiguousarray(stored)), fmt, exif=exif, **options)
    np.testing.assert_allclose(pixels(record), scene, atol=4)


def test_sixteen_bits_and_orientation_together():
    exif = Image.Exif()
    exif[0x0112] = 6
    record = encoded(Image.fromarray(SIXTEEN), exif=exif)
    np.testing.assert_array_equal(pixels(record)[:, 0, 0], EIGHT[0])


def test_a_path_is_read_and_bytes_come_before_it(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(uniform("L", 7))["bytes"])
    assert pixels({"bytes": None, "path": str(tmp_path / "a.png")})[0, 0, 0] == 7
    assert pixels({**encoded(uniform("L", 9)), "path": str(tmp_path / "a.png")})[0, 0, 0] == 9


@pytest.mark.parametrize("kind", ["truncated", "text", "zero bytes", "nothing", "missing file"])
def test_damaged_images_raise_a_value_error_with_their_path(kind, tmp_path):
    complete = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")[
        "bytes"
    ]
    data = {"truncated": complete[: len(complete) // 2], "text": b"not an image", "zero bytes": b""}.get(kind)
    path = None if kind == "nothing" else str(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="without a path" if kind == "nothing" else "cat.jpg"):
        decode({"bytes": data, "path": path})
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(None)


def test_decompression_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="bomb.png cannot be decoded .DecompressionBomb"):
        decode({**encoded(Image.new("RGB", (20, 20))), "path": "bomb.png"})


# ---- metadata that cannot be read: the pixels are an image (python-pillow/Pillow#4007, #5863, #6614 and others) ----


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


LONG_TEXT = b"a\0\0" + zlib.compress(b"x" * 2**21)


@pytest.mark.parametrize(
    "damaged",
    [
        chunk(b"eXIf", b"Exif\0\0notatiff"),
        chunk(b"eXIf", b""),
        chunk(b"eXIf", b"II*\0", checksum=1),
        chunk(b"tEXt", b"key\0value", checksum=1),
        chunk(b"zTXt", LONG_TEXT),
        chunk(b"zTXt", b"key\0\7value"),
        chunk(b"iCCP", b"name\0\5data"),
        chunk(b"iCCP", b"name\0\0data", checksum=1),
        chunk(b"pHYs", b"\0"),
        chunk(b"tRNS", b""),
    ],
)
@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
def test_png_with_damaged_metadata(damaged, place):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    data = encoded(image)["bytes"]
    position = 33 if place == "before the pixels" else data.index(b"IEND") - 4
    record = {"bytes": data[:position] + damaged + data[position:], "path": None}
    np.testing.assert_array_equal(pixels(record), np.asarray(image))


def test_a_damaged_text_does_not_cost_the_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    data = encoded(image, exif=exif)["bytes"]
    record = {"bytes": data[:33] + chunk(b"tEXt", b"a", checksum=1) + data[33:], "path": None}
    np.testing.assert_array_equal(pixels(record), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("fmt", ["JPEG", "WEBP", "AVIF"])
def test_exif_that_is_none(fmt):
    image = uniform("RGB", (200, 30, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x013B] = "artist"
    data = encoded(image, fmt, exif=exif)["bytes"]
    assert pixels({"bytes": data, "path": None}).shape == (4, 3, 3)  # turned
    damaged = data.replace(b"MM\0*", b"none").replace(b"II*\0", b"none")
    assert damaged != data
    np.testing.assert_allclose(pixels({"bytes": damaged, "path": None})[0, 0], (200, 30, 60), atol=9)


@pytest.mark.parametrize("tag", [270, 274, 305, 34675])
def test_tiff_with_a_tag_behind_its_end(tag):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    tags = {270: "a description", 274: 1, 305: "a program"}
    data = bytearray(encoded(image, "TIFF", tiffinfo=tags, icc_profile=b"x" * 50)["bytes"])
    (start,) = struct.unpack("<I", data[4:8])
    entries = range(start + 2, start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0], 12)
    entry = next(at for at in entries if struct.unpack("<H", data[at : at + 2])[0] == tag)
    data[entry + 4 : entry + 12] = struct.pack("<II", 9, 2**31)
    np.testing.assert_array_equal(pixels({"bytes": bytes(data), "path": None}), np.asarray(image))


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_missing_pixels_are_no_image_whatever_the_metadata(fmt):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)), fmt)[
        "bytes"
    ]
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode({"bytes": data[: len(data) // 2], "path": None})


def test_what_is_upright_is_not_turned_again():
    """Paths were turned twice by `embed`: as they were decoded, and as images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3))
    upright = decode(encoded(picture, exif=exif))
    assert np.array_equal(upright, picture.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(upright_rgb(upright), upright)
