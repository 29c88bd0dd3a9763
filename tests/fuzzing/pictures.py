"""Pictures of any format, mode and size, whole or damaged, or something else."""

from __future__ import annotations

import io
import random
import struct
import zlib

from PIL import Image

from tests.fuzzing.damage import another_file, mutate_bytes

__all__ = ["mutate_picture"]

_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I", "F", "I;16", "YCbCr", "LAB", "HSV")
_FORMATS = (
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "ICO",
    "TGA",
    "JPEG2000",
    "PCX",
    "DDS",
    "EPS",
    "PDF",
    "SGI",
    "MSP",
    "XBM",
    "IM",
    "SPIDER",
    "AVIF",
    "ICNS",
    "MPO",
    "GIF",
)


def mutate_picture(rng: random.Random, content: bytes) -> bytes:
    """A picture of any format, mode and size, whole or damaged, or something else."""
    action = rng.random()
    if action < 0.08:
        return another_file(rng)
    if action < 0.35:
        return mutate_bytes(rng, content)
    mode = rng.choice(_MODES)
    size = rng.choice(((1, 1), (7, 5), (64, 48), (1, 600), (600, 1), (40, 40)))
    picture = Image.effect_noise(size, 60) if mode == "L" else Image.new(mode, size)
    stream = io.BytesIO()
    try:
        picture.save(stream, rng.choice(_FORMATS))
    except (OSError, ValueError, KeyError, SystemError, TypeError):
        stream = io.BytesIO()
        Image.effect_noise(size, 60).save(
            stream, rng.choice(("PNG", "JPEG", "TIFF", "WEBP", "GIF"))
        )
    made = stream.getvalue()
    if action < 0.5:
        return made
    if action < 0.65 and made.startswith(b"\x89PNG"):
        header = struct.pack(
            ">IIBBBBB",
            *(rng.choice((0, 1, 64, 30_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)),
            *(
                rng.choice((1, 2, 4, 8, 16, 77)),
                rng.choice((0, 2, 3, 4, 6, 9)),
                0,
                0,
                rng.choice((0, 1)),
            ),
        )
        chunk = b"IHDR" + header
        return made[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + made[33:]
    return mutate_bytes(rng, made)
