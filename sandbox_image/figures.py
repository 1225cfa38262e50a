"""The open matplotlib figures of a session as PNG: drawn inside it, carried as base64, checked by the supervisor."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import sys
import zlib
from typing import Any

from sandbox_image.frames import BadFrame

COUNT = 8
EACH_BYTES = 4 << 20
ALL_BYTES = 16 << 20
FRAME_BYTES = ALL_BYTES * 4 // 3 + 1024  # base64

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CRC = struct.Struct(">I")


def collect() -> tuple[list[str], list[str]]:
    """Figures in base64, the newest `COUNT` in the order of their numbers, and words about those that are missing.

    Does not import matplotlib, close a figure or change which one is current.
    """
    helpers: Any = sys.modules.get("matplotlib._pylab_helpers")
    if "matplotlib.pyplot" not in sys.modules or helpers is None:
        return [], []
    out: list[str] = []
    missing: list[str] = []
    numbers = sorted(helpers.Gcf.figs)
    if len(numbers) > COUNT:
        missing.append(f"{len(numbers)} figures are open, the last {COUNT} are shown: plt.close() those that are done")
    room = ALL_BYTES
    for number in numbers[-COUNT:]:
        buffer = io.BytesIO()
        try:
            helpers.Gcf.figs[number].canvas.figure.savefig(buffer, format="png")
        except Exception as error:  # the user's artists draw themselves: a formula may not parse
            missing.append(f"figure {number} cannot be drawn: {type(error).__name__}: {error}")
            continue
        size = buffer.tell()
        if size > EACH_BYTES or size > room:
            missing.append(f"figure {number} is not shown: {size} bytes of PNG are too many, lower its dpi")
            continue
        room -= size
        out.append(base64.b64encode(buffer.getbuffer()).decode())
    return out, missing


def parse(sent: object) -> list[bytes]:
    """What a session's frame calls figures. Raises `BadFrame` for anything that `collect` does not make."""
    if not isinstance(sent, list) or len(sent) > COUNT:
        raise BadFrame("figures are not a short list")
    out = []
    for figure in sent:
        try:
            out.append(base64.b64decode(figure, validate=True))
        except (binascii.Error, ValueError, TypeError):
            raise BadFrame("a figure is not base64") from None
    if any(len(figure) > EACH_BYTES for figure in out) or sum(map(len, out)) > ALL_BYTES:
        raise BadFrame("the figures are too large")
    if not all(map(is_png, out)):
        raise BadFrame("a figure is not a PNG")
    return out


def is_png(data: bytes) -> bool:
    """Whole chunks with right checksums from IHDR to IEND, and nothing behind."""
    if not data.startswith(_SIGNATURE):
        return False
    at, kinds = len(_SIGNATURE), []
    while at + _CHUNK.size <= len(data):
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + _CHUNK.size + length
        if end + _CRC.size > len(data) or _CRC.unpack_from(data, end)[0] != zlib.crc32(data[at + 4 : end]):
            return False
        kinds.append(kind)
        at = end + _CRC.size
        if kind == b"IEND":
            break
    return at == len(data) and kinds[:1] == [b"IHDR"] and kinds[-1:] == [b"IEND"] and b"IDAT" in kinds
