"""A teacher behind a real HTTP server that speaks the chat protocol, with sessions in a real sandbox pool."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_models import HYBRID, THINKING
from sandboxes import new_node

from aster import synthesize
from aster.agent import teacher as teaching
from aster.agent.chat import ChatRenderer
from aster.agent.demonstrations import Wanted, select
from aster.agent.rewards import RewardPool
from aster.agent.sampling import sample
from aster.agent.teacher import ChatTeacher
from aster.config import Recipe, ToolConfig
from aster.data.trajectories import read_trajectories
from aster.errors import CircuitOpen, ConfigError
from aster.types import Budget, Cause, PromptRow, Sampling
from serve.pool import PoolSettings, SandboxPool
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Status

BUDGET = Budget(max_prompt_tokens=2000, max_response_tokens=4000, max_tool_calls=5, trajectory_timeout_s=150)
ROWS = [
    PromptRow(f"row-{n}", ({"role": "user", "content": f"What is {n} * 7 + 1?"},), str(n * 7 + 1), "t")
    for n in range(40)
]


class Server:
    """Scripted by rule: multiplies in a first cell, adds to the variable it kept in a second, then answers with what
    it read. `reply` may be replaced; what was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self.reply: Callable[[dict[str, Any]], dict[str, Any]] = three_steps
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({"path": self.path, **body})
                outer.headers.append(dict(self.headers))
                status = outer.failures.pop(0) if outer.failures else 200
                answer = outer.reply(body) if status == 200 else {"error": "scripted"}
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def said(content: str | None, thought: str = "hm", code: str | None = None, **more: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": thought}
    if code is not None:
        function = {"name": "code_interpreter", "arguments": json.dumps({"code": code})}
        message["tool_calls"] = [{"id": "c-1", "type": "function", "function": function}]
    return {"choices": [{"message": message, "finish_reason": "stop", **more}]}


def three_steps(body: dict[str, Any]) -> dict[str, Any]:
    read = [m["content"] for m in body["messages"] if m["role"] == "tool"]
    number = body["messages"][0]["content"].split()[2]
    if not read:
        return said(None, "multiply", f"x = {number} * 7")
    if len(read) == 1:
        return said(None, "add", "print(x + 1)")
    return said(f"\\boxed{{{read[1].strip()}}}", "done")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


class Sessions:
    """The pool as an episode sees it."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool

    async def open(self, key: str) -> Session:
        return Session(self.pool, (await self.pool.create(CreateSession())).session_id)


class Session:
    def __init__(self, pool: SandboxPool, session_id: str) -> None:
        self.pool, self.session_id = pool, session_id

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecuteResponse:
        return await self.pool.execute(self.session_id, ExecuteRequest(code=code, timeout_s=timeout_s, call_id=call_id))

    async def close(self) -> None:
        await self.pool.close(self.session_id)


@pytest.fixture
async def sessions():
    pool = SandboxPool(PoolSettings(backend="process", max_sessions=16), node=new_node())
    await pool.start()
    yield Sessions(pool)
    await pool.stop()


class Inside:
    """Sessions in this process: state is kept, a start costs nothing. For tests that are not about the sandbox."""

    session_id = "inside"

    async def open(self, key: str) -> Inside:
        return Inside()

    def __init__(self) -> None:
        self._names: dict[str, Any] = {}

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecuteResponse:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, self._names)
        return ExecuteResponse(status=Status.OK, text=printed.getvalue(), stdout=printed.getvalue())

    async def close(self) -> None: ...


@pytest.fixture
async def run(server: Server, thinking: ChatRenderer, tmp_path: Path, monkeypatch):
    """`await run(rows, samples=..., ...)` samples into tmp_path and returns how many were made."""
    monkeypatch.setattr(teaching, "_FIRST_PAUSE_S", 0.01)
    rewards = RewardPool(reward="strict", workers=1)
    teacher = ChatTeacher(server.url, model="wise", renderer=thinking, api_key="secret")

    async def go(rows: list[PromptRow], **more: Any) -> int:
        return await sample(
            rows,
            **{
                "engine": teacher.conversation,
                "sandboxes": Inside(),
                "renderer": thinking,
                "rewards": rewards,
                "budget": BUDGET,
                "sampling": Sampling(0.6, 0.95),
                "tool": ToolConfig(),
                "folder": tmp_path,
                "concurrency": 8,
                **more,
            },
        )

    yield go
    await teacher.close()
    rewards.close()


async def test_a_teacher_solves_problems_in_a_session_and_becomes_conversations(
    run, server, sessions, thinking, tmp_path
):
    assert await run(ROWS[:3], samples=2, sandboxes=sessions) == 6
    found = list(read_trajectories(tmp_path / "0.parquet"))
    assert [(t.row_id, t.sample, t.reward, t.cause) for t in found] == [
        (f"row-{n}", s, 1.0, Cause.ANSWERED) for n in range(3) for s in range(2)
    ]
    assert [[c.observation.strip() for c in t.calls][-1] for t in found] == ["1", "1", "8", "8", "15", "15"]
    ids = np.concatenate([found[2].prompt_ids, found[2].ids])
    rows = {row.row_id: row for row in ROWS}
    selected = select(found, rows, thinking, wanted=Wanted(min_calls=2), per_problem=1)
    assert selected.report()["token_exact"] == 3, "the student's own tokens, as SFT will make them"
    assert [m["role"] for m in selected.kept[1].messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert thinking.decode(ids).endswith("done\n</think>\n\n\\boxed{8}<|im_end|>")

    asked = server.asked[-1]
    assert (asked["path"], asked["model"]) == ("/v1/chat/completions", "wise")
    assert (asked["temperature"], asked["top_p"], asked["parallel_tool_calls"]) == (0.6, 0.95, False)
    assert asked["tools"][0]["function"]["name"] == "code_interpreter"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    longest = max(server.asked, key=lambda a: len(a["messages"]))["messages"]
    assert [m["role"] for m in longest] == ["user", "assistant", "tool", "assistant", "tool"]
    assert longest[1]["reasoning_content"] == "multiply"
    assert longest[2]["tool_call_id"] == longest[1]["tool_calls"][0]["id"] == "c-1"


async def test_a_teacher_cannot_be_forced_to_call_first(run):
    with pytest.raises(ConfigError, match="cannot be made to go on from a call's opening"):
        await run(ROWS[:1], tool=ToolConfig(force_first_call=True))


async def test_a_killed_run_makes_only_the_files_that_are_missing(run, server, tmp_path):
    assert await run(ROWS) == 40
    before = len(server.asked)
    (tmp_path / "1.parquet").unlink()
    seen: list[tuple[int, int]] = []
    assert await run(ROWS, progress=lambda done, of: seen.append((done, of))) == 8
    assert len(server.asked) == before + 3 * 8
    assert seen == [(1, 2), (2, 2)]
    assert await run(ROWS) == 0


async def test_the_slowest_trajectory_of_a_file_holds_up_no_other_file(run, server, tmp_path):
    others = threading.Event()

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        if "What is 0 " in body["messages"][0]["content"]:
            assert others.wait(100), "file 1 must be written while a trajectory of file 0 is still running"
        return three_steps(body)

    server.reply = reply
    seen: list[tuple[int, int]] = []

    def progress(done: int, of: int) -> None:
        seen.append((done, of))
        if done and (tmp_path / "1.parquet").is_file():
            others.set()

    assert await run(ROWS, progress=progress) == 40
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == ["0.parquet", "1.parquet"]


async def test_a_busy_server_is_asked_again_and_a_dead_one_ends_the_run(run, server, tmp_path):
    server.failures = [503, 429, 500]
    assert await run(ROWS[:1]) == 1
    assert next(read_trajectories(tmp_path / "0.parquet")).reward == 1.0
    server.close()
    with pytest.raises(CircuitOpen, match=r"all 2 trajectories of file 0 were lost; .* in 5 attempts \(ConnectError"):
        await run(ROWS[:2], folder=tmp_path / "other")
    assert not (tmp_path / "other/0.parquet").exists()


async def test_a_request_that_is_refused_is_one_error_that_says_why(run, server):
    server.failures = [401] * 8
    with pytest.raises(ConfigError, match=r"refuses requests for model 'wise' with status 401: .*scripted"):
        await run(ROWS[:4])


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_conversation_that_is_refused_is_lost_and_the_others_go_on(run, server, tmp_path, status):
    def reply(body):
        if len(body["messages"]) > 1 and body["messages"][0]["content"].startswith("What is 1 "):
            server.failures = [status]
        return three_steps(body)

    server.reply = reply
    assert await run(ROWS[:3], concurrency=1) == 3
    first, refused, third = read_trajectories(tmp_path / "0.parquet")
    assert (first.reward, refused.reward, third.reward) == (1.0, None, 1.0)
    assert f"refuses this conversation with status {status}: " in refused.error


@pytest.mark.parametrize("status", [400, 404])
async def test_a_refusal_before_any_answer_or_of_every_request_is_the_runs(run, server, status):
    server.failures = [status] * 8
    with pytest.raises(ConfigError, match=f"refuses requests for model 'wise' with status {status}"):
        await run(ROWS[:4])


async def test_a_last_file_of_one_lost_trajectory_ends_no_run(run, server, tmp_path):
    def reply(body):
        odd = body["messages"][0]["content"].startswith("What is 32 ")
        return said("no thought", None) if odd else three_steps(body)

    server.reply = reply
    assert await run(ROWS[:33]) == 33
    (lost,) = read_trajectories(tmp_path / "1.parquet")
    assert lost.cause is Cause.ENGINE_LOST
    assert await run(ROWS[:33]) == 0


BAD_JSON = {"tool_calls": [{"id": "c", "function": {"name": "code_interpreter", "arguments": "{"}}]}
TAG_IN_THOUGHT = said(None, "a <tool_call> may", "1")["choices"][0]["message"]
TAG_IN_CODE = said(None, "hm", "print('</tool_call>')")["choices"][0]["message"]
AS_TEXT = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "1"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": None, "reasoning_content": "hm", **BAD_JSON}, "arguments of code_interpreter are not JSON"),
        ({"content": AS_TEXT, "reasoning_content": "hm"}, "writes its calls as text"),
        ({"content": "4", "reasoning_content": None}, "give the turn a thought"),
        (TAG_IN_THOUGHT, "a call's tag stands in the turn's own text"),
        (TAG_IN_CODE, "a call's tag stands in the turn's own text"),
        ("hello", "is no message: hello"),
        ({"content": "4", "tool_calls": {"name": "x"}}, "is no message"),
    ],
)
async def test_a_turn_that_the_student_cannot_write_loses_the_trajectory(run, server, tmp_path, message, words):
    def reply(body):
        fine = body["messages"][0]["content"].startswith("What is 0 ")
        return three_steps(body) if fine else {"choices": [{"message": message, "finish_reason": "stop"}]}

    server.reply = reply
    assert await run(ROWS[:2]) == 2
    fine, lost = read_trajectories(tmp_path / "0.parquet")
    assert (fine.reward, lost.reward, lost.cause) == (1.0, None, Cause.ENGINE_LOST)
    assert words in lost.error


async def test_half_a_surrogate_pair_in_a_reply_is_sent_back_and_ends_nothing(run, server, tmp_path):
    def reply(body):
        return said("\\boxed{1}") if len(body["messages"]) > 1 else said("\ud835", "hm", "print(1)")

    server.reply = reply
    assert await run(ROWS[:1]) == 1
    assert next(read_trajectories(tmp_path / "0.parquet")).reward == 1.0
    assert server.asked[-1]["messages"][1]["content"] == "\ud835"


async def test_a_reply_that_was_cut_runs_nothing(run, server, tmp_path):
    server.reply = lambda body: said(None, "long", "print(1)", finish_reason="length")
    assert await run(ROWS[:1]) == 1
    (cut,) = read_trajectories(tmp_path / "0.parquet")
    assert (cut.cause, len(cut.calls), cut.reward) == (Cause.MAX_TOKENS, 0, 0.0)


async def test_a_run_goes_on_only_with_the_settings_it_was_begun_with(server, thinking, tmp_path, model_dir):
    student = model_dir(THINKING)

    def args(*more: str):
        argv = ["--from", str(tmp_path / "run"), "--dataset", "x", "--model", str(student), "--out", "x"]
        return synthesize._parser().parse_args([*argv, "--endpoint", server.url, "--teacher", "wise", *more])

    recipe = Recipe.load("rl_stage2_32k")
    await synthesize.teach(args(), recipe, ROWS[:2], thinking, Inside())
    await synthesize.teach(args(), recipe, ROWS[:2], thinking, Inside())
    assert len(server.asked) == 6
    with pytest.raises(ConfigError, match="was begun with another samples: 1, now 3; name another run"):
        await synthesize.teach(args("--samples", "3"), recipe, ROWS[:2], thinking, Inside())
    with pytest.raises(ConfigError, match="was begun with another problems"):
        await synthesize.teach(args(), recipe, ROWS[:1], thinking, Inside())
    with pytest.raises(ConfigError, match="was begun with another seed: 0, now 1"):
        await synthesize.teach(args("--seed", "1"), recipe, ROWS[:2], thinking, Inside())
    other = PromptRow("row-1", ({"role": "user", "content": "What is 1 * 8?"},), ROWS[1].ground_truth, "t")
    for second in (other, replace(ROWS[1], ground_truth="9")):
        with pytest.raises(ConfigError, match="was begun with another problems"):
            await synthesize.teach(args(), recipe, [ROWS[0], second], thinking, Inside())
    (student / "chat_template.jinja").write_text(HYBRID)
    with pytest.raises(ConfigError, match="was begun with another student"):
        await synthesize.teach(args(), recipe, ROWS[:2], thinking, Inside())
    assert len(server.asked) == 6
