"""The cell's parts that need no cell: frames, truncation, the filter's table, the image's inputs, the stubs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_image import build, frames, rootfs, seccomp
from sandbox_image.output import HeadTail

IMAGE = Path(build.__file__).parent
ROOT = IMAGE.parent


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(2, 60))
def test_head_and_tail_are_exact_and_nothing_between_is_invented(chunks: list[bytes], limit: int) -> None:
    buffer = HeadTail(limit)
    for chunk in chunks:
        buffer.write(chunk)
    whole = b"".join(chunks)
    assert buffer.total == len(whole)
    assert buffer.truncated == (len(whole) > limit)
    if not buffer.truncated:
        assert buffer.text() == whole.decode("utf-8", "backslashreplace")
    elif whole.isascii():
        head, notice, tail = (
            buffer.text().rpartition("\n[output truncated: ")[0],
            "",
            buffer.text().rpartition("]\n")[2],
        )
        assert whole.startswith(head.encode())
        assert whole.endswith(tail.encode())
        assert notice == ""
        assert len(head) + len(tail) <= limit


def test_a_cut_never_splits_a_character() -> None:
    buffer = HeadTail(10)
    buffer.write("é€é€é€é€é€".encode())
    assert buffer.text() == "é€\n[output truncated: 15 bytes]\n€" or "\\x" not in buffer.text()


def test_many_tiny_writes_stay_small() -> None:
    buffer = HeadTail(1000)
    for _ in range(50_000):
        buffer.write(b"x")
    assert buffer.text() == "x" * 500 + "\n[output truncated: 49000 bytes]\n" + "x" * 500


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20)), max_size=5), st.integers(1, 7)
)
def test_frames_survive_any_cutting(messages: list[dict[str, object]], step: int) -> None:
    stream = b"".join(frames.encode(message) for message in messages)
    decoder = frames.Decoder(limit=1 << 16)
    got = [m for i in range(0, len(stream), step) for m in decoder.feed(stream[i : i + step])]
    assert got == messages


def test_an_announced_giant_is_refused_before_it_is_read() -> None:
    with pytest.raises(frames.BadFrame, match="limit 100"):
        frames.Decoder(limit=100).feed(b"\x00\x00\x00\x65")


def test_docker_s_profile_allows_nothing_that_the_filter_denies() -> None:
    profile = json.loads((IMAGE / "seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    free = {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }
    assert not free & set(seccomp.DENIED)
    assert not free & {"clone", "clone3", "socket", "umount"}
    assert {"read", "write", "execve", "futex", "mmap", "wait4"} <= free


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_program_that_the_kernel_accepts_in_size(machine: str) -> None:
    code = seccomp.program(machine)
    assert len(code) % 8 == 0
    assert len(code) // 8 < 4096


def test_generated_stubs_are_those_of_cell_proto(tmp_path: Path) -> None:
    tools = pytest.importorskip("grpc_tools")
    import grpc

    stubs = (IMAGE / "proto" / "cell_pb2_grpc.py").read_text()
    if f"GRPC_GENERATED_VERSION = '{grpc.__version__}'" not in stubs:
        pytest.skip(f"generated with another grpcio-tools than {grpc.__version__}")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-m",
        f"{tools.__name__}.protoc",
        f"-I{ROOT}",
        *outputs,
        "sandbox_image/proto/cell.proto",
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    for made in sorted((tmp_path / "sandbox_image" / "proto").iterdir()):
        assert made.read_text() == (IMAGE / "proto" / made.name).read_text(), f"regenerate {made.name}"


def test_the_hash_changes_with_the_base_and_the_host_s_own_modules_stay_outside() -> None:
    assert build.content_hash("a") == build.content_hash("a") != build.content_hash("b")
    names = {path.name for path in build.package_files()}
    assert {"supervisor.py", "cell_pb2.py", "requirements.txt"} <= names
    assert not names & {"build.py", "rootfs.py"}


def test_the_host_s_mirror_is_found_in_both_formats_of_apt(tmp_path: Path) -> None:
    assert rootfs.host_mirror("x", tmp_path) is None
    (tmp_path / "sources.list").write_text(
        "# deb http://no/ x main\ndeb [signed-by=/k] http://old.example/debian x main\n"
    )
    assert rootfs.host_mirror("x", tmp_path) == "http://old.example/debian"
    (tmp_path / "sources.list.d").mkdir()
    security = "Types: deb\nURIs: http://sec.example\nSuites: x-security\nComponents: main\n"
    text = f"{security}\nTypes: deb\nURIs: http://new.example/debian\nSuites: x x-updates\nComponents: main\n"
    (tmp_path / "sources.list.d" / "d.sources").write_text(text)
    assert rootfs.host_mirror("x", tmp_path) == "http://new.example/debian"
    assert rootfs.host_mirror("y", tmp_path) is None


def test_pins_of_the_supervisor_are_not_older_than_the_stubs() -> None:
    pins = dict(line.split("==") for line in (IMAGE / "requirements.txt").read_text().split() if "==" in line)
    stubs = (IMAGE / "proto" / "cell_pb2_grpc.py").read_text()
    generated = stubs.split("GRPC_GENERATED_VERSION = '")[1].split("'")[0]
    assert tuple(map(int, pins["grpcio"].split("."))) >= tuple(map(int, generated.split(".")))
