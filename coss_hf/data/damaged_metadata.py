"""Encoded images without the parts that Pillow reads although no pixel depends on them: texts, tags and profiles."""

import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
TIFF_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of a value by its type, where not 1


def without_metadata(data: bytes) -> Iterator[bytes]:
    """Yield an encoded image without its metadata, first with its orientation, then without.

    To be tried on an image that Pillow refuses: one damaged byte in a text is enough for that. Nothing is yielded for
    formats whose metadata Pillow skips.
    """
    if data.startswith(PNG):
        yield _png(data, {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf", b"iTXt"})
        yield _png(data, {b"IHDR", b"PLTE", b"IDAT", b"IEND"})
    elif data[:4] in (b"II*\0", b"MM\0*"):
        yield _tiff(data)
    elif data[4:8] == b"ftyp":
        yield data.replace(b"Exif", b"free")  # a kind of item that the reader of AVIF does not know


def _png(data: bytes, kept: set[bytes]) -> bytes:
    """The chunks of some kinds; of eXIf and iTXt those whose checksum is right."""
    chunks = [PNG]
    position = len(PNG)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        chunk = data[position : position + 12 + length]
        kind = chunk[4:8]
        is_sound = zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        if kind in kept and (is_sound or kind not in (b"eXIf", b"iTXt")):
            chunks.append(chunk)
        position += 12 + length
    return b"".join(chunks)


def _tiff(data: bytes) -> bytes:
    """The image with an unknown type, which is skipped, for tags whose values lie behind the end of the file."""
    order = "<" if data[:1] == b"I" else ">"
    repaired = bytearray(data)
    (directory,) = struct.unpack(f"{order}I", data[4:8])
    (count,) = struct.unpack(f"{order}H", data[directory : directory + 2].ljust(2, b"\0"))
    end = min(directory + 2 + 12 * count, len(data) - 11)
    for entry in range(directory + 2, end, 12):
        kind, values, offset = struct.unpack(f"{order}HII", data[entry + 2 : entry + 12])
        size = values * TIFF_SIZES.get(kind, 1)
        if size > 4 and offset + size > len(data):
            repaired[entry + 2 : entry + 4] = b"\0\0"
    return bytes(repaired)
