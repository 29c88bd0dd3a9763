"""Damage of any file: bits, blocks, words put in, and files of another kind under its name."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile

__all__ = ["TEXTS", "another_file", "mutate_bytes", "mutate_text"]

TEXTS = (
    *(
        "",
        " ",
        "\n",
        "a",
        "A" * 300,
        "A" * 70_000,
        "é",
        "日本語",
        "\u202egpj",
        "\ufeff",
        "\x00",
        "\x1b[31m",
    ),
    *(
        "\ud800",
        "\U0010ffff",
        "a\nb",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "C:\\x",
        "..",
        ".",
    ),
    *(
        "model.safetensors",
        "con",
        "none",
        "null",
        "true",
        "1",
        "1e999",
        "nan",
        "float32",
        "bfloat16",
    ),
    *(
        "llama",
        "default",
        "<image>",
        "<image>" * 50,
        "{{ 1 }}",
        "{% raw %}",
        "%s%n",
        "(a|aa)+b",
        "[",
        "*",
    ),
    *(
        "http://127.0.0.1:9/x",
        "file:///etc/passwd",
        "owner/repo",
        "os:system",
        "${HOME}",
        "`id`",
        "|id",
    ),
)


def mutate_text(rng: random.Random, content: bytes, words: tuple[str, ...] = TEXTS) -> bytes:
    """A text file: words put in, pieces moved, cut and doubled, or bytes changed."""
    action = rng.random()
    if action < 0.25:
        return mutate_bytes(rng, content)
    if action < 0.3:
        return another_file(rng)
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice((1, 1, 2, 4))):
        first, second = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        second = min(second, first + rng.choice((1, 4, 40, 400)))
        piece = text[first:second]
        text = rng.choice(
            (
                text[:first] + rng.choice(words) + text[first:],
                text[:first] + rng.choice(words) + text[second:],
                text[:first] + text[second:],
                text[:second] + piece * rng.choice((1, 3, 50)) + text[second:],
            )
        )[:400_000]
    return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, blocks cut, doubled or overwritten, lengths made extreme."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not changed:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
        # Headers stand at the beginning, tables of contents at the end.
        reach = min(len(changed), rng.choice((16, 256, 4096, len(changed))))
        place = (
            rng.randrange(reach) if rng.random() < 0.8 else len(changed) - 1 - rng.randrange(reach)
        )
        action = rng.randrange(7)
        if action == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            changed[place] = rng.randrange(256)
        elif action == 2:
            del changed[place:]
        elif action == 3:
            del changed[place : place + rng.choice((1, 4, 64, 1024))]
        elif action == 4:
            changed[place:place] = changed[place : place + rng.choice((1, 4, 64, 1024))]
        elif action == 5:
            extreme = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**16))
            changed[place : place + 4] = struct.pack(rng.choice("<>") + "I", extreme)
        else:
            length = rng.choice((1, 8, 100))
            changed[place : place + length] = bytes(rng.randrange(256) for _ in range(length))
    return bytes(changed)


def another_file(rng: random.Random) -> bytes:
    """A file of another kind under this name."""
    kind = rng.randrange(9)
    if kind == 0:
        return b""
    if kind == 1:
        return (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
        )
    if kind == 2:
        return pickle.dumps({"a": print})
    if kind == 3:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../a", b"\0" * 1_000_000)
        return stream.getvalue()
    if kind == 4:
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\nshowpage\n"
    if kind == 5:
        return b"<!DOCTYPE html><html><body>404</body></html>"
    if kind == 6:
        return b"\x00" * rng.choice((1, 100, 100_000))
    if kind == 7:
        return b"[" * rng.choice((100, 100_000))
    return bytes(rng.randrange(256) for _ in range(rng.choice((3, 200))))
