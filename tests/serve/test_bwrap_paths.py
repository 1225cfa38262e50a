"""An environment that lies below /tmp is not hidden by the cell's own /tmp."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from sandboxes import open_session

import serve.cells.bwrap as bwrap
from serve.pool import PoolSettings, SandboxPool

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


async def test_a_package_below_tmp_is_importable_in_a_cell(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        folder = Path(directory)
        folder.chmod(0o755)
        (folder / "only_here.py").write_text("VALUE = 42\n")
        usual = bwrap.host_python()
        elsewhere = replace(usual, search_path=(*usual.search_path, folder))
        monkeypatch.setattr(bwrap, "host_python", lambda: elsewhere)
        with tempfile.TemporaryDirectory(prefix="s", dir="/tmp", ignore_cleanup_errors=True) as sockets:
            settings = PoolSettings(backend="bwrap", sessions_per_cell=1, max_sessions=1, socket_root=sockets)
            pool = SandboxPool(settings, node="tmp")
            await pool.start()
            try:
                session = await open_session(pool)
                answer = await session.run("import only_here, os; (only_here.VALUE, os.listdir('/tmp'))")
                assert answer.result == "(42, [])", answer
            finally:
                await pool.stop()
