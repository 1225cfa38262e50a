"""Finished turns on disk: what comes back, what is too old or too new, what a torn tail costs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from aster.data.journal import JournalPlace, KeptTurns, TurnJournal, prune, read_journal
from aster.types import Budget, FinishedTurn, Sampling, Task, ToolCall, ToolOutcome, Turn

RUN = 1_700_000_000_000
CALL = ToolCall("x = 1\nx", "ok", ToolOutcome.SUCCESS, "1 \ud800", 0.5, queue_s=0.1)


def task(uid: str = "r/train/1/row/0", attempt: int = 0) -> Task:
    return Task(uid, "row", 0, (), "code_agent", Budget(8, 8, 1), Sampling(), seed=1, attempt=attempt)


def turn(token: int, version: int = 3, newer: int | None = None) -> FinishedTurn:
    """Three sampled tokens, the last perhaps of a newer version, and two of the observation."""
    return FinishedTurn(
        turn=Turn(5 * token, 5 * token + 3, "stop", 0.25, 1.5, CALL, (CALL,)),
        ids=np.array([token, 1, 2, 3, 4], np.int32),
        mask=np.array([1, 1, 1, 0, 0], bool),
        logprobs=np.array([-0.1, -1e-30, -3.4e38, 0, 0], np.float32),
        versions=np.array([version, version, version if newer is None else newer, -1, -1], np.int32),
        seen=("abc", "def"),
    )


def write(
    folder: Path, *turns: FinishedTurn, engine="e0", of: Task | None = None, first=0, config="c", run: int = RUN
) -> None:
    journal = TurnJournal(JournalPlace(folder, config, run), engine=engine)
    for number, one in enumerate(turns, first):
        journal.append(of or task(), "prompt", number, one)
    journal.close()


def tokens(folder: Path, *, oldest=0, newest=9, config="c", uid="r/train/1/row/0") -> list[int]:
    past = read_journal(folder, config_hash=config, oldest=oldest, newest=newest).get(uid)
    return [] if past is None else [int(t.ids[0]) for t in past.turns]


def test_a_turn_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, turn(0, version=3, newer=4))
    (back,) = read_journal(tmp_path, config_hash="c", oldest=0, newest=4)["r/train/1/row/0"].turns
    before = turn(0, version=3, newer=4)
    for f in fields(FinishedTurn):
        one, two = getattr(before, f.name), getattr(back, f.name)
        if isinstance(one, np.ndarray):
            assert (one.dtype, one.tobytes()) == (two.dtype, two.tobytes()), f.name
        else:
            assert one == two, f.name


def test_a_torn_tail_costs_its_turn_only(tmp_path: Path) -> None:
    write(tmp_path, turn(0), turn(1), turn(2))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        assert tokens(tmp_path) == [0, 1]
    file.write_bytes(whole.splitlines()[0][:10])
    assert tokens(tmp_path) == []


def test_turns_are_those_of_weights_that_the_resumed_run_has(tmp_path: Path) -> None:
    write(tmp_path, turn(0, 3), turn(1, 3, newer=4), turn(2, 4), turn(3, 5))
    assert tokens(tmp_path, newest=3) == [0], "version 4 was never saved"
    assert [p.name.split(".")[0] for p in tmp_path.iterdir()] == ["3"], "and nobody will ever want it"


def test_what_a_restart_has_cut_stays_cut_when_other_weights_have_its_version(tmp_path: Path) -> None:
    """Killed, resumed from version 3, trained to a version 4 of its own, saved, killed again before its prompt came."""
    write(tmp_path, turn(0, 3), turn(1, 3, newer=4))
    write(tmp_path, turn(7), of=task("r/train/1/other/0"))
    assert tokens(tmp_path, newest=3) == [0]
    assert tokens(tmp_path, newest=4) == [0]
    assert tokens(tmp_path, newest=4, uid="r/train/1/other/0") == [7]


def test_a_trajectory_that_is_too_old_to_be_learnt_from_is_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path, turn(0, 3), turn(1, 4))
    assert tokens(tmp_path, oldest=3) == [0, 1]
    assert tokens(tmp_path, oldest=4) == []


def test_what_ran_again_counts_and_what_an_older_attempt_still_wrote_does_not(tmp_path: Path) -> None:
    write(tmp_path, turn(0), turn(1), turn(2), engine="e1")
    write(tmp_path, turn(20), turn(21), engine="e0", of=task(attempt=1))
    assert tokens(tmp_path) == [20, 21]
    write(tmp_path, turn(30), engine="e2", run=RUN + 1)
    assert tokens(tmp_path) == [30], "another run begins with attempt 0 again"


@pytest.mark.parametrize("engines", ["012", "210", "010"])
def test_attempts_go_on_from_each_other_whatever_engines_they_ran_on(tmp_path: Path, engines: str) -> None:
    write(tmp_path, turn(0), turn(1), turn(2), engine=engines[0])
    write(tmp_path, turn(10), turn(11), engine=engines[1], of=task(attempt=1))
    write(tmp_path, turn(22), turn(23, version=4), engine=engines[2], of=task(attempt=2), first=2)
    assert tokens(tmp_path) == [10, 11, 22, 23]


def test_turns_after_a_gap_are_useless(tmp_path: Path) -> None:
    write(tmp_path, turn(0))
    write(tmp_path, turn(2), engine="e1", first=2)
    assert tokens(tmp_path) == [0]


def test_another_config_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, turn(0))
    assert tokens(tmp_path, config="d") == []
    assert "written under another config" in caplog.text


def test_pruning_deletes_what_no_checkpoint_needs_while_the_engine_goes_on(tmp_path: Path) -> None:
    journal = TurnJournal(JournalPlace(tmp_path, "c", RUN), engine="engine-1.2")
    for number, version in enumerate((2, 3, 4)):
        journal.append(task(f"r/train/1/row/{number}"), "prompt", 0, turn(number, version))
    prune(tmp_path, useless=lambda version: version < 4)
    journal.append(task("r/train/1/row/3"), "prompt", 0, turn(3, 4))
    found = read_journal(tmp_path, config_hash="c", oldest=0, newest=9)
    assert sorted(found) == ["r/train/1/row/2", "r/train/1/row/3"]


def test_a_disk_that_refuses_ends_the_journal_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "journal").write_text("a file where the folder should be")
    write(tmp_path / "journal", turn(0), turn(1))
    assert caplog.text.count("keeps no journal any more") == 1


def test_no_folder_is_no_past(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none", config_hash="c", oldest=0, newest=9) == {}


class TestOfALostTrajectory:
    """What its next attempt goes on from, read while other engines write."""

    async def test_those_of_its_attempt_on_its_engine(self, tmp_path: Path) -> None:
        kept, other = (KeptTurns(JournalPlace(tmp_path, config, RUN)) for config in "cd")
        write(tmp_path, turn(0), turn(1, version=4))
        write(tmp_path, turn(7), of=task("r/train/1/row/1"))
        write(tmp_path, turn(8), turn(9), engine="1.e0")
        write(tmp_path, turn(5), engine="e0", of=task(attempt=1))
        past = await kept.of(task(), "e0")
        assert past is not None
        assert (past.prompt, [int(t.ids[0]) for t in past.turns]) == ("prompt", [0, 1])
        assert await kept.of(task("r/train/1/row/2"), "e0") is None
        assert await kept.of(task(), "e1") is None
        assert await other.of(task(), "e0") is None

    async def test_a_second_loss_keeps_what_the_first_had_kept(self, tmp_path: Path) -> None:
        kept = KeptTurns(JournalPlace(tmp_path, "c", RUN))
        write(tmp_path, turn(0), turn(1))
        again = replace(task(attempt=1), past=await kept.of(task(), "e0"))
        assert await kept.of(again, "e1") == again.past, "it was lost before it had finished anything"
        write(tmp_path, turn(2), engine="e1", of=again, first=2)
        past = await kept.of(again, "e1")
        assert past is not None
        assert [int(t.ids[0]) for t in past.turns] == [0, 1, 2]

    async def test_one_that_began_afresh_has_only_what_came_after_that(self, tmp_path: Path) -> None:
        kept = KeptTurns(JournalPlace(tmp_path, "c", RUN))
        write(tmp_path, turn(0), turn(1))
        again = replace(task(attempt=1), past=await kept.of(task(), "e0"))
        write(tmp_path, turn(20), engine="e1", of=again)
        past = await kept.of(again, "e1")
        assert past is not None
        assert [int(t.ids[0]) for t in past.turns] == [20]

    async def test_any_name_and_no_file_of_another_run(self, tmp_path: Path) -> None:
        odd = task('r/train/1/"Zürich\\\ud800/0')
        kept = KeptTurns(JournalPlace(tmp_path, "c", RUN))
        write(tmp_path, turn(0), of=odd)
        assert await kept.of(odd, "e0") is not None
        assert await KeptTurns(JournalPlace(tmp_path, "c", RUN + 1)).of(odd, "e0") is None

    async def test_a_folder_that_cannot_be_read_costs_time_only(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept = KeptTurns(JournalPlace(tmp_path, "c", RUN))
        write(tmp_path, turn(0))
        (file,) = tmp_path.iterdir()
        file.unlink()
        file.mkdir()
        assert await kept.of(task(), "e0") is None
        assert "they are sampled again" in caplog.text
