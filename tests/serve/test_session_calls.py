"""What an owner can do with a session beside running cells: interrupt, reset, watch the output, look at figures."""

import asyncio
import base64
import time

import pytest
from sandboxes import PRINTS_LATER, Session, put, there

from serve.cells.link import CellLost
from serve.pool import SandboxPool
from serve.schema import ExecuteRequest, ExecuteResponse, OutputChunk, State, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")


BEGUN = "open('begun', 'w').close()"


async def started(session: Session, code: str) -> asyncio.Task[ExecuteResponse]:
    """A call whose cell has come to `BEGUN`; what stands before that has run."""
    assert BEGUN in code
    call = asyncio.create_task(session.run(code))
    await there(session, "begun")
    return call


# interrupt -----------------------------------------------------------------------------------------------------------


async def test_an_interrupt_is_a_ctrl_c_and_keeps_the_state(pool: SandboxPool, session: Session) -> None:
    await session.run("x = 1")
    call = await started(session, f"x = 2\nimport time\n{BEGUN}; time.sleep(60)")
    assert (await pool.interrupt(session.id)).was_running
    answer = await call
    assert (answer.status, answer.state) == (Status.ERROR, State.KEPT)
    assert answer.error is not None
    assert answer.error.name == "KeyboardInterrupt"
    assert "time.sleep(60)" in answer.stderr
    assert (await session.run("x")).result == "2"


async def test_an_interrupt_reaches_a_child_that_is_waited_for(pool: SandboxPool, session: Session) -> None:
    code = "r = subprocess.run(['sh', '-c', 'touch child; exec sleep 60'])"
    call = await started(session, f"import subprocess\n{BEGUN}; {code}")
    await there(session, "child")
    assert (await pool.interrupt(session.id)).was_running
    assert (await call).status is Status.ERROR


async def test_an_interrupt_between_cells_is_nothing(pool: SandboxPool, session: Session) -> None:
    assert not (await pool.interrupt(session.id)).was_running
    await session.run("x = 1")
    assert not (await pool.interrupt(session.id)).was_running
    assert (await session.run("x")).result == "1"


async def test_an_interrupt_hits_the_cell_that_it_was_meant_for_or_none(pool: SandboxPool, session: Session) -> None:
    """At any moment of a short life: never the next cell, and not lost when the cell has just begun."""
    for pause_ms in range(20):
        call = asyncio.create_task(session.run("import time\nfor _ in range(3000): time.sleep(.01)"))
        await asyncio.sleep(pause_ms / 1000)
        while not (await pool.interrupt(session.id)).was_running:  # noqa: ASYNC110 - it is on its way
            await asyncio.sleep(0)
        assert (await call).status is Status.ERROR  # one that was not interrupted ends with `timeout`
        quick = asyncio.create_task(session.run("1"))
        await asyncio.sleep(pause_ms / 5000)
        await pool.interrupt(session.id)
        await quick
        assert (await session.run("2")).result == "2"


async def test_a_cell_may_catch_an_interrupt(pool: SandboxPool, session: Session) -> None:
    call = await started(
        session, f"import time\ntry:\n    {BEGUN}; time.sleep(60)\nexcept KeyboardInterrupt:\n    r = 'caught'\nr"
    )
    await pool.interrupt(session.id)
    assert (await call).result == "caught"


# reset ---------------------------------------------------------------------------------------------------------------


async def test_a_reset_session_is_as_if_freshly_opened(pool: SandboxPool, session: Session) -> None:
    who = "import os; os.getuid(), os.getpid()"
    await session.run("x = 1; n = open('f', 'w').write('x')", call_id="a")
    before = (await session.run(who)).result
    await pool.reset(session.id)
    answer = await session.run("'x' in globals(), __import__('os').listdir('.')", call_id="a")
    assert (answer.result, answer.state, answer.cell, answer.reason) == ("(False, [])", State.KEPT, 1, "")
    after = (await session.run(who)).result
    assert before != after
    if pool.backend.name != "process":
        assert (before or "").split(",")[0] != (after or "").split(",")[0]


async def test_a_reset_ends_the_running_cell_and_those_that_wait(pool: SandboxPool, session: Session) -> None:
    call = await started(session, f"import time\n{BEGUN}; time.sleep(60)")
    began = time.monotonic()
    await pool.reset(session.id)
    assert time.monotonic() - began < 15
    answer = await call
    assert (answer.status, answer.state, answer.reason) == (Status.SESSION_DIED, State.LOST, "it was reset")
    assert (await session.run("1")).state is State.KEPT


async def test_a_reset_heals_a_dead_session(pool: SandboxPool, session: Session) -> None:
    await session.run("import os; os._exit(1)")
    await pool.reset(session.id)
    answer = await session.run("1 + 1")
    assert (answer.result, answer.state, answer.reason) == ("2", State.KEPT, "")


# streams -------------------------------------------------------------------------------------------------------------


async def watch(
    session: Session, code: str, *, go: str = "", **options: object
) -> tuple[list[OutputChunk], ExecuteResponse]:
    """`go`: a file that the cell may wait for, written when its first output has come."""
    request = ExecuteRequest(code=code, **{"timeout_s": 20.0, **options})  # type: ignore[arg-type]
    chunks: list[OutputChunk] = []
    async with asyncio.timeout(60):
        async for event in session.pool.execute_stream(session.id, request):
            if isinstance(event, ExecuteResponse):
                return chunks, event
            if go and not chunks:
                await session.pool.write_file(session.id, go, b"")
            chunks.append(event)
    raise AssertionError("no response")


def told(chunks: list[OutputChunk], stream: str) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.stream == stream)


async def test_output_comes_as_it_is_printed_and_the_response_last(session: Session) -> None:
    code = (
        "import os, sys, time\nfor i in range(3):\n    print(i); print('e', i, file=sys.stderr)\n"
        "    while not os.path.exists('go'): time.sleep(.01)\n'end'"
    )
    chunks, answer = await watch(session, code, go="go")
    assert told(chunks, "stdout") == answer.stdout == "0\n1\n2\nend\n"
    assert told(chunks, "stderr") == answer.stderr == "e 0\ne 1\ne 2\n"
    assert (answer.status, answer.result) == (Status.OK, "end")


async def test_a_streamed_character_is_never_split_and_what_is_none_is_escaped(session: Session) -> None:
    code = (
        "import os, time\nfor b in '€𝄞'.encode() + b'\\xff\\xe2\\x82':\n"
        "    n = os.write(1, bytes([b])); time.sleep(.02)"
    )
    chunks, answer = await watch(session, code)
    assert told(chunks, "stdout") == answer.stdout == "€𝄞\\xff\\xe2\\x82"
    assert {"€", "𝄞"} <= {character for chunk in chunks for character in chunk.text}


async def test_a_stream_is_bounded_and_the_response_keeps_head_and_tail(session: Session) -> None:
    chunks, answer = await watch(session, "print('x' * 3_000_000 + 'end')", max_output_bytes=1000)
    assert told(chunks, "stdout") == "x" * 1000
    assert answer.truncated
    assert answer.stdout.endswith("end\n")


async def test_what_a_thread_printed_between_cells_is_streamed_with_the_next(session: Session) -> None:
    await session.run(PRINTS_LATER)
    await put(session, "over")
    await there(session, "printed")
    chunks, answer = await watch(session, "print('now')")
    assert told(chunks, "stdout") == answer.stdout == "late\nnow\n"


async def test_a_repeated_call_id_streams_nothing_and_runs_nothing(session: Session) -> None:
    code = "n = globals().get('n', 0) + 1; print(n)\nn"
    first, answer = await watch(session, code, call_id="s")
    assert told(first, "stdout") == "1\n1\n"
    again, repeated = await watch(session, code, call_id="s")
    assert again == []
    assert repeated.model_copy(update={"queue_s": 0.0}) == answer.model_copy(update={"queue_s": 0.0})
    assert (await session.run("n", call_id="t")).result == "1"


async def test_a_watcher_that_hangs_up_stops_nothing_and_finds_the_answer(session: Session) -> None:
    request = ExecuteRequest(
        code="import time\nfor i in range(8):\n    print(i); time.sleep(.1)\nk = globals().get('k', 0) + 1\nk",
        call_id="h",
    )
    stream = session.pool.execute_stream(session.id, request)
    assert isinstance(await anext(stream), OutputChunk)
    await stream.aclose()  # type: ignore[attr-defined]
    answer = await session.run(request.code, call_id="h")
    assert (answer.result, answer.stdout) == ("1", "".join(f"{i}\n" for i in range(8)) + "1\n")
    assert (await session.run("k")).result == "1"


async def test_a_death_ends_the_stream_with_its_reason(session: Session) -> None:
    chunks, answer = await watch(session, "import os\nprint('last words', flush=True)\nos._exit(3)")
    assert told(chunks, "stdout") == "last words\n"
    assert (answer.status, answer.reason) == (Status.SESSION_DIED, "the interpreter exited with 3")


# figures -------------------------------------------------------------------------------------------------------------


async def draw(session: Session, code: str, *, figures: bool = True) -> ExecuteResponse:
    if (await session.run("import importlib.util as u; u.find_spec('matplotlib') is None")).result == "True":
        pytest.skip("this machine has no matplotlib")
    return await session.pool.execute(session.id, ExecuteRequest(code=code, figures=figures))


def size_of(png: str) -> tuple[int, int]:
    data = base64.b64decode(png)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


async def test_open_figures_come_as_png_and_stay_open(session: Session) -> None:
    answer = await draw(
        session, "import matplotlib.pyplot as plt\nfig = plt.figure(figsize=(2, 1)); l = plt.plot([1, 2])"
    )
    assert answer.status is Status.OK, answer
    assert [size_of(png) for png in answer.figures] == [(200, 100)]
    answer = await draw(session, "other = plt.figure(figsize=(3, 1)); n = plt.figure(1).number")
    assert [size_of(png) for png in answer.figures] == [(200, 100), (300, 100)]
    assert (await draw(session, "plt.gcf().number")).result == "1"
    assert (await draw(session, "plt.close('all')")).figures == []


async def test_figures_come_only_when_asked_for_and_matplotlib_is_not_imported_for_them(session: Session) -> None:
    assert (await draw(session, "import sys; 'matplotlib' in sys.modules")).result == "False"
    answer = await draw(session, "import matplotlib.pyplot as plt; fig = plt.figure()", figures=False)
    assert answer.figures == []


async def test_the_first_import_looks_for_no_fonts_and_writes_nothing_at_home(
    pool: SandboxPool, session: Session
) -> None:
    if pool.backend.name == "process":
        pytest.skip("nothing is prepared for it")
    code = (  # it looks for fonts with os.walk
        "import os\nlooked, walk = [], os.walk\n"
        "os.walk = lambda top, *a, **k: (looked.append(top), walk(top, *a, **k))[1]\n"
        "import matplotlib.pyplot\nlooked, os.listdir('.')"
    )
    assert (await draw(session, code)).result == "([], [])"
    links = "import pathlib; [p.is_symlink() for p in pathlib.Path(os.environ['MPLCONFIGDIR']).iterdir()]"
    assert (await draw(session, links)).result == "[True]"


async def test_a_figure_that_cannot_be_drawn_is_told_and_does_no_harm(session: Session) -> None:
    code = "import matplotlib.pyplot as plt\na = plt.figure(1)\nb = plt.figure(2); t = plt.title(r'$\\frac{1$')\n'ok'"
    answer = await draw(session, code)
    assert (answer.status, answer.result) == (Status.OK, "ok")
    assert len(answer.figures) == 1
    assert "figure 2 cannot be drawn" in answer.stderr


async def test_too_many_and_too_large_figures_are_told(session: Session) -> None:
    code = (
        "import matplotlib.pyplot as plt, numpy as np\nfs = [plt.figure(figsize=(1 + i, 1), dpi=10) for i in range(10)]"
    )
    answer = await draw(session, code)
    assert [size_of(png)[0] for png in answer.figures] == [10 * (i + 1) for i in range(2, 10)]
    assert "10 figures are open, the last 8 are shown" in answer.stderr
    code = "plt.close('all'); f = plt.figure(figsize=(15, 15), dpi=100); n = f.figimage(np.random.rand(1500, 1500, 3))"
    answer = await draw(session, code)
    assert answer.figures == []
    assert "lower its dpi" in answer.stderr


async def test_a_slow_figure_is_part_of_the_cell_s_time(session: Session) -> None:
    code = (
        "import matplotlib.pyplot as plt, time\nclass Slow(plt.Line2D):\n    def draw(self, renderer): time.sleep(60)\n"
        "fig, ax = plt.subplots(); n = ax.add_line(Slow([0, 1], [0, 1]))"
    )
    assert (await draw(session, code, figures=False)).status is Status.OK  # a busy machine needs its time for this
    answer = await session.pool.execute(session.id, ExecuteRequest(code="x = 4", figures=True, timeout_s=2))
    assert (answer.status, answer.state, answer.figures) == (Status.TIMEOUT, State.KEPT, [])
    assert (await session.run("x")).result == "4"


@pytest.mark.parametrize("forged", ["['bm8gcG5n']", "['%%%']", "'x'", "[3]", "['iVBORw0KGgo=']", "['AA=='] * 9"])
async def test_a_forged_figure_is_a_protocol_error(session: Session, forged: str) -> None:
    code = f"from sandbox_image import figures\nfigures.collect = lambda: ({forged}, [])"
    answer = await session.pool.execute(session.id, ExecuteRequest(code=code, figures=True))
    assert (answer.status, answer.state) == (Status.PROTOCOL_ERROR, State.LOST)
    assert (await session.run("1 + 1")).result == "2"


async def test_the_largest_answer_that_may_be_asked_for_arrives(session: Session) -> None:
    size = 16 << 20
    code = f"import sys; print('a' * {size - 1}); print('b' * {size - 1}, file=sys.stderr)"
    answer = await session.run(code, keep=size, timeout_s=60)
    assert (answer.status, answer.stdout_bytes, answer.stderr_bytes) == (Status.OK, size, size)
    assert (len(answer.stdout), len(answer.stderr)) == (size, size)
    assert answer.truncated  # the interleaved text alone is longer than was asked for


async def test_a_cell_says_so_when_it_has_no_such_session(pool: SandboxPool, session: Session) -> None:
    cell = pool.fleet.cells[0]
    with pytest.raises(CellLost, match="no such session in this cell"):
        await asyncio.wait_for(cell.link.execute("nobody", ExecuteRequest(code="1")), 20)
    assert (await session.run("1 + 1")).result == "2"
