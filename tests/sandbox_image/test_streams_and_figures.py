"""Output as it comes, and what counts as a figure."""

import asyncio
import base64
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_image import figures
from sandbox_image.frames import BadFrame
from sandbox_image.output import Tap


async def drain(tap: Tap) -> str:
    return "".join([text async for _, text in tap])


@given(st.lists(st.binary(max_size=8) | st.sampled_from([b"\xe2\x82\xac", b"\xf0\x9d"]), max_size=20))
def test_a_tap_tells_exactly_what_was_written_however_it_was_cut(chunks: list[bytes]) -> None:
    async def run() -> str:
        tap = Tap(1 << 20)
        for chunk in chunks:
            tap.write(chunk, is_stderr=False)
        tap.finish()
        return await drain(tap)

    assert asyncio.run(run()) == b"".join(chunks).decode("utf-8", "backslashreplace")


@given(st.text(max_size=30), st.integers(0, 40))
def test_a_full_tap_ends_with_a_whole_character(text: str, limit: int) -> None:
    async def run() -> str:
        tap = Tap(limit)
        tap.write(text.encode(), is_stderr=True)
        tap.write(b"more", is_stderr=True)
        tap.finish()
        return await drain(tap)

    told = asyncio.run(run())
    assert len(told.encode()) <= limit
    whole = text + "more"
    assert whole.startswith(told)
    if limit >= len(whole.encode()):
        assert told == whole


async def test_a_tap_that_nobody_reads_holds_no_more_than_its_limit() -> None:
    tap = Tap(1000)
    for _ in range(1000):
        tap.write(b"x" * 100, is_stderr=False)
    tap.close()
    assert len(await drain(tap)) == 1000


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*between: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(between) + chunk(b"IDAT", pixels) + chunk(b"IEND")


def test_a_png_is_recognised() -> None:
    assert figures.is_png(png())
    assert figures.is_png(png(chunk(b"tEXt", b"Software\0x")))
    assert figures.parse([base64.b64encode(png()).decode()]) == [png()]
    assert figures.parse([]) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        png()[:-1],
        png() + b"<script>",
        png().replace(b"IDAT", b"IDOT"),
        png()[:20] + b"\xff" + png()[21:],
        b"\x89PNG\r\n\x1a\n" + chunk(b"IEND"),
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR",
        b"GIF89a",
    ],
)
def test_what_only_looks_like_a_png_is_refused(data: bytes) -> None:
    assert not figures.is_png(data)
    with pytest.raises(BadFrame):
        figures.parse([base64.b64encode(data).decode()])


@given(st.binary(max_size=200), st.integers(0, 60))
def test_no_bytes_break_the_look(data: bytes, cut: int) -> None:
    assert not figures.is_png(png()[:cut] + data) or data.endswith(chunk(b"IEND"))


@pytest.mark.parametrize("sent", [None, "x", {}, [1], ["%"], [None], [[]], ["AAAA"] * 9, ["x" * (6 << 20)]])
def test_a_figure_list_of_another_shape_is_refused(sent: object) -> None:
    with pytest.raises(BadFrame):
        figures.parse(sent)
