"""Files in and out of a session: below its home, as its own user, beside a running cell."""

import asyncio
import time

import pytest
from sandboxes import Session, open_session, there

from serve.errors import FileRefused
from serve.pool import SandboxPool

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def refused(work: object) -> int:
    with pytest.raises(FileRefused) as refusal:
        await work  # type: ignore[misc]
    return refusal.value.code


async def test_a_file_goes_in_and_out_and_is_the_session_s_own(pool: SandboxPool, session: Session) -> None:
    content = bytes(range(256)) * 5000
    await pool.write_file(session.id, "data/in put.bin", content)
    answer = await session.run(
        "import os; d = open('data/in put.bin', 'rb').read(); s = os.stat('data/in put.bin')\n"
        "len(d), s.st_uid == os.getuid(), oct(s.st_mode & 0o777), open('data/out é', 'wb').write(d[::-1])"
    )
    assert answer.result == "(1280000, True, '0o600', 1280000)"
    assert await pool.read_file(session.id, "data/out é") == content[::-1]
    listed = await pool.list_files(session.id)
    assert [(file.path, file.size) for file in listed.files] == [("data/in put.bin", 1280000), ("data/out é", 1280000)]
    assert all(abs(file.modified - time.time()) < 60 for file in listed.files)
    assert not listed.truncated


async def test_an_empty_file_and_an_overwritten_one(pool: SandboxPool, session: Session) -> None:
    await pool.write_file(session.id, "f", b"long content")
    await pool.write_file(session.id, "./a/../f", b"")
    assert await pool.read_file(session.id, "f") == b""
    assert [file.path for file in (await pool.list_files(session.id)).files] == ["f"]


async def test_files_do_not_wait_for_a_running_cell(pool: SandboxPool, session: Session) -> None:
    code = (
        "import os, time\nopen('begun', 'w').close()\n"
        "while not os.path.exists('go'): time.sleep(.01)\nopen('go').read()"
    )
    call = asyncio.create_task(session.run(code))
    await there(session, "begun")
    await pool.write_file(session.id, "go", b"now")
    assert (await call).result == "now"


async def test_what_leads_out_of_the_home_directory_is_refused(pool: SandboxPool, session: Session) -> None:
    await session.run(
        "import os\nos.symlink('/etc', 'etc'); os.symlink('..', 'up'); os.symlink('in', 'fine'); os.mkdir('in')\n"
        "os.symlink('/etc/passwd', 'passwd'); n = open('in/f', 'w').write('x'); os.symlink('loop', 'loop')"
    )
    outside = ("../x", "/etc/passwd", "etc/passwd", "passwd", "up/x", "a/../../x", "", ".", "..", "in/..", "a\0b")
    for path in outside:
        assert await refused(pool.read_file(session.id, path)) in {422, 404}, path
        assert await refused(pool.write_file(session.id, path, b"evil")) == 422, path
    assert await refused(pool.read_file(session.id, "loop")) == 422
    assert await pool.read_file(session.id, "fine/f") == b"x"
    await pool.write_file(session.id, "fine/g", b"y")
    assert [f.path for f in (await pool.list_files(session.id)).files] == ["in/f", "in/g"]


async def test_what_is_no_readable_file_is_refused_by_its_status(pool: SandboxPool, session: Session) -> None:
    await session.run(
        "import os, socket\nos.mkdir('d'); s = socket.socket(socket.AF_UNIX); s.bind('sock')\n"
        "n = open('big', 'wb').truncate(40 << 20)\n"
        "n = open('closed', 'w').write('x'); os.chmod('closed', 0); os.mkdir('locked'); os.chmod('locked', 0)"
    )
    assert await refused(pool.read_file(session.id, "missing")) == 404
    assert await refused(pool.read_file(session.id, "missing/deep")) == 404
    assert await refused(pool.read_file(session.id, "d")) == 422
    assert await refused(pool.read_file(session.id, "big/deep")) in {404, 422}
    assert await refused(pool.read_file(session.id, "sock")) == 422
    assert await refused(pool.read_file(session.id, "big")) == 413
    assert await refused(pool.read_file(session.id, "x" * 5000)) == 422
    assert await refused(pool.write_file(session.id, "d", b"x")) == 422
    assert await refused(pool.write_file(session.id, "d/", b"x")) == 422
    assert await refused(pool.write_file(session.id, "big/deep", b"x")) == 422
    if pool.backend.name != "process":  # root may read anything
        assert await refused(pool.read_file(session.id, "closed")) == 422
        assert await refused(pool.write_file(session.id, "locked/x", b"x")) == 422


async def test_no_room_leaves_the_old_file(pool: SandboxPool) -> None:
    if pool.backend.name == "process":
        pytest.skip("no disk of its own")
    session = await open_session(pool)
    await pool.write_file(session.id, "f", b"old")
    await session.run("for i in range(2): n = open(f'big{i}', 'wb').write(b'x' * (28 << 20))")
    assert await refused(pool.write_file(session.id, "f", b"x" * (20 << 20))) == 507
    assert await pool.read_file(session.id, "f") == b"old"
    assert {file.path for file in (await pool.list_files(session.id)).files} == {"f", "big0", "big1"}
    await session.close()


async def test_the_session_s_own_limit_of_a_file_holds(pool: SandboxPool) -> None:
    session = await open_session(pool, file_bytes=1 << 20)
    assert await refused(pool.write_file(session.id, "f", b"x" * (2 << 20))) == 507
    await pool.write_file(session.id, "f", b"x" * (1 << 20))
    await session.close()


async def test_thirty_two_megabytes_go_through(pool: SandboxPool, session: Session) -> None:
    content = b"0123456789abcdef" * (2 << 20)
    await pool.write_file(session.id, "f", content)
    assert await pool.read_file(session.id, "f") == content
    assert await refused(pool.write_file(session.id, "f", content + b"x")) == 413


async def test_a_listing_follows_no_link_and_is_bounded(pool: SandboxPool, session: Session) -> None:
    await session.run(
        "import os, socket\nos.mkdir('d'); os.symlink('.', 'd/self'); os.symlink('/usr', 'usr')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind('sock')\n"
        "n = open(b'd/bad\\xff', 'w').write('x')"
    )
    assert [file.path for file in (await pool.list_files(session.id)).files] == ["d/bad\\udcff"]
    await session.run("for i in range(12_000): open(f'd/{i:05}', 'w').close()")
    listed = await pool.list_files(session.id)
    assert len(listed.files) == 10_000
    assert listed.truncated


async def test_a_session_that_kills_the_helper_disturbs_only_itself(pool: SandboxPool) -> None:
    if pool.backend.name != "docker" and pool.backend.slots == 1:
        pytest.skip("needs sessions with a uid of their own")
    if pool.backend.name == "process":
        pytest.skip("root would kill the whole machine")
    session, neighbour = await open_session(pool), await open_session(pool)
    code = (
        "import os, signal, time\nend = time.time() + 2\n"
        "while time.time() < end:\n    try: os.kill(-1, signal.SIGKILL)\n    except OSError: pass"
    )
    call = asyncio.create_task(session.run(code))
    await asyncio.sleep(0.2)
    codes = set()
    for _ in range(5):
        try:
            await pool.write_file(session.id, "f", b"x" * (1 << 20))
        except FileRefused as error:
            codes.add(error.code)
        await pool.write_file(neighbour.id, "f", b"x")
    assert codes <= {507}
    await call
    await pool.write_file(session.id, "f", b"fine")
    assert await pool.read_file(session.id, "f") == b"fine"
    for one in (session, neighbour):
        await one.close()
