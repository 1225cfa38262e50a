"""The parser that reads what a session sends: any bytes, in any pieces, give frames of ours or `BadFrame`."""

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_image import frames

LIMIT = 1 << 12
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


def feed(data: bytes, step: int) -> tuple[list[dict[str, object]], bool]:
    """Frames until the end or the first bad one, fed `step` bytes at a time."""
    decoder = frames.Decoder(limit=LIMIT)
    got: list[dict[str, object]] = []
    for at in range(0, len(data), step):
        try:
            got += decoder.feed(data[at : at + step])
        except frames.BadFrame:
            return got, True
    return got, False


@given(st.binary(max_size=300), st.integers(1, 9))
def test_any_bytes_give_objects_or_bad_frame_and_nothing_else(data: bytes, step: int) -> None:
    got, _ = feed(data, step)
    assert all(isinstance(frame, dict) for frame in got)


@given(st.lists(MESSAGE, max_size=4), st.binary(max_size=60), st.integers(1, 9))
def test_frames_before_garbage_are_as_sent_and_all_there_when_read_byte_by_byte(
    messages: list[dict[str, object]], garbage: bytes, step: int
) -> None:
    stream = b"".join(map(frames.encode, messages))
    got, _ = feed(stream + garbage, step)
    assert got[: len(messages)] == messages[: len(got)]
    assert feed(stream + garbage, 1)[0][: len(messages)] == messages


@given(MESSAGE, st.integers(1, 9))
def test_an_incomplete_frame_is_waited_for_and_never_guessed(message: dict[str, object], missing: int) -> None:
    whole = frames.encode(message)
    got, bad = feed(whole[: max(0, len(whole) - missing)], 4)
    assert (got, bad) == ([], False)


@given(st.integers(LIMIT + 1, (1 << 32) - 1), st.binary(max_size=20))
def test_a_length_above_the_limit_is_refused_whatever_follows(length: int, body: bytes) -> None:
    with pytest.raises(frames.BadFrame, match=f"frame of {length} bytes"):
        frames.Decoder(limit=LIMIT).feed(frames.HEADER.pack(length) + body)


@given(st.text(alphabet=st.characters(codec=None, categories=["Cs", "Lu"]), max_size=20))
def test_lone_surrogates_are_carried(text: str) -> None:
    (frame,) = frames.Decoder(limit=LIMIT).feed(frames.encode({"t": text}))
    assert frame["t"].encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


@pytest.mark.parametrize(
    "body",
    [b"[" * 4000, b'{"a":' * 800, b'{"a":NaN', b"{}x", b"\xff", b"1" * 4000, b"null", b'"{}"', b'{"a":"\\ud800"'],
)
def test_hostile_json_is_a_bad_frame(body: bytes) -> None:
    with pytest.raises(frames.BadFrame):
        frames.Decoder(limit=LIMIT).feed(frames.HEADER.pack(len(body)) + body)


def test_descriptors_come_with_their_frame_and_its_end_is_none() -> None:
    ours, theirs = socket.socketpair()
    channel = frames.Channel(theirs)
    assert not channel.is_pending()
    pipe = os.pipe()
    socket.send_fds(ours, [frames.encode({"op": "fork"})], [*pipe, pipe[1]])
    assert channel.is_pending()
    taken = channel.receive()
    assert taken is not None
    assert taken[0] == {"op": "fork"}
    os.write(taken[1][1], b"x")
    assert os.read(taken[1][0], 1) == b"x"
    ours.sendall(frames.encode({"op": "run"}))
    assert channel.receive() == ({"op": "run"}, [])
    channel.send({"ok": True})
    assert json.loads(ours.recv(100)[4:]) == {"ok": True}
    ours.close()
    assert channel.receive() is None
    for fd in (*pipe, *taken[1]):
        os.close(fd)
