"""What survives a pool, without a cell: a session's journal, and the name and lease of an owner."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve import janitor, owner
from serve.journal import BadJournal, Counted, Gap, Journal, Opened, Ran, Reset, cells_of, count_of, obstacle, ran
from serve.schema import ExecuteRequest, ExecuteResponse, Limits, Status

OPENED = Opened(limits=Limits(), ttl_s=100, idle_ttl_s=10, began=1.0)


def cell(number: int, *, status: Status = Status.OK, seconds: float = 1.0) -> Ran:
    request = ExecuteRequest(code=f"cell {number}", call_id=str(number), timeout_s=3, max_output_bytes=1000)
    return ran(request, ExecuteResponse(status=status, text="é\n", cell=number, duration_s=seconds))


def test_what_was_written_is_read_by_another_process_s_eyes(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "id", OPENED)
    lines = [cell(1), Gap(why="so"), Reset(), cell(1), Counted(cells=7)]
    for line in lines:
        journal.append(line)
    found, opened = Journal.recover(tmp_path / "id")
    assert opened == OPENED
    assert found.lines() == [OPENED, *lines]
    assert (tmp_path / "id").stat().st_mode & 0o777 == 0o600
    assert cells_of(lines)[0].record.text_sha256 == hashlib.sha256("é\n".encode()).hexdigest()


def test_a_line_that_was_not_finished_is_cut_off_and_the_next_one_is_whole(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "id", OPENED)
    journal.append(cell(1))
    with open(tmp_path / "id", "a") as file:
        file.write('{"kind":"ran","record":{"cell":2')
    journal, _ = Journal.recover(tmp_path / "id")
    journal.append(cell(2))
    assert [line.record.cell for line in cells_of(journal.lines())] == [1, 2]


@pytest.mark.parametrize("content", ["", "{}\n", '{"kind":"reset"}\n', "not JSON\n", '{"kind":"opened"}\n'])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "id").write_text(content)
    with pytest.raises(BadJournal):
        Journal.recover(tmp_path / "id")


def test_a_closed_session_s_journal_does_not_come_back(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "id", OPENED)
    journal.remove()
    with pytest.raises(FileNotFoundError):
        journal.append(cell(1))
    journal.touch()
    assert list(tmp_path.iterdir()) == []


def test_a_copy_has_the_past_and_its_own_future(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "a", OPENED)
    journal.append(cell(1))
    later = OPENED.model_copy(update={"began": 2.0})
    copy = journal.copy(tmp_path / "b", later)
    journal.append(cell(2))
    assert copy.lines() == [later, cell(1)]


def test_the_last_use_is_the_time_of_the_file(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "id", OPENED)
    os.utime(journal.path, (5, 5))
    assert journal.used == 5
    before = time.time()
    journal.touch()
    assert before - 1 <= journal.used <= time.time() + 1  # a file system's clock has ticks


def test_what_can_be_run_again_is_decided_by_all_lines_since_the_last_reset() -> None:
    bad = cell(2, status=Status.TIMEOUT)
    assert obstacle([OPENED, cell(1), cell(2, status=Status.ERROR)], limit_s=2) == ""
    assert obstacle([OPENED, cell(1), bad], limit_s=60) == "cell 2 ended with timeout"
    assert obstacle([OPENED, bad, Reset(), cell(1)], limit_s=60) == ""
    assert obstacle([OPENED, Gap(why="a file"), cell(1)], limit_s=60) == "a file"
    assert obstacle([OPENED, cell(1, seconds=40), cell(2, seconds=30)], limit_s=60) == (
        "its cells ran for 70 s, the limit is 60 s"
    )


def test_the_supervisor_s_count_is_known_after_each_line() -> None:
    lines = [OPENED, cell(1), cell(2), Reset(), cell(1), Counted(cells=5), cell(6)]
    assert [count_of(lines[: n + 1]) for n in range(len(lines))] == [0, 1, 2, 0, 1, 5, 6]


# owners --------------------------------------------------------------------------------------------------------------


def test_a_name_is_free_again_when_its_process_ends_and_what_was_left_comes_first(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from serve import owner\n"
        "root = Path(sys.argv[1]); held = [owner.claim(root, 'n', lease_s=60) for _ in range(2)]\n"
        "held[0].erase(); print([o.name for o in held], flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=-1, stdout=-1, text=True, env=environment
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "['n-0', 'n-1']"
    mine = owner.claim(tmp_path, "n", lease_s=60)
    assert mine.name == "n-0"
    mine.erase()
    holder.kill()
    holder.communicate()
    successor = owner.claim(tmp_path, "n", lease_s=60)
    assert successor.name == "n-1"
    assert owner.claim(tmp_path, "n", lease_s=60).name == "n-0"
    assert owner.claim(tmp_path, "m", lease_s=60).name == "m-0"


def test_only_what_is_unlocked_and_past_its_lease_is_abandoned(tmp_path: Path) -> None:
    slow, fresh, dead = (owner.claim(tmp_path, node, lease_s=60) for node in ("slow", "fresh", "dead"))
    slow.renew(-1)  # it holds its lock: only slow
    fresh.leave()
    dead.renew(-1)
    dead.leave()
    found = []
    for abandoned in owner.abandoned(tmp_path):
        found.append(abandoned.name)
        assert owner.try_lock(tmp_path / abandoned.name / "lock") is None  # a successor cannot have it meanwhile
    assert found == ["dead-0"]
    (dead.sessions / "id").write_text("x")
    (dead.directory / "cell").mkdir()
    assert janitor.sweep(tmp_path) == 0
    assert owner.names(tmp_path) == ["fresh-0", "slow-0"]
    assert not dead.directory.exists()


def test_a_file_that_was_removed_between_opening_and_locking_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "lock"
    lock = owner.fcntl.flock

    def flock(file, how) -> None:
        path.unlink()
        lock(file, how)

    monkeypatch.setattr(owner.fcntl, "flock", flock)
    assert owner.try_lock(path) is None


@pytest.mark.parametrize("node", ["", "a.b", "x" * 17, "a/b"])
def test_a_node_whose_name_does_not_fit_is_refused(tmp_path: Path, node: str) -> None:
    with pytest.raises(ValueError, match="node="):
        owner.claim(tmp_path, node, lease_s=1)
