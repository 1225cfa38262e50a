"""Run once where cells will run: `python -m sandbox_image.prepare DIRECTORY` writes matplotlib's list of fonts there,
and compiles what sessions import, where byte code is kept (PYTHONPYCACHEPREFIX)."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from sandbox_image import zygote

_SUPERVISOR = ("sandbox_image.supervisor", "sandbox_image.service")
_DRAWING = ("matplotlib.pyplot", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "mpl_toolkits.mplot3d")


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["MPLCONFIGDIR"] = str(directory)
    packages = zygote.import_packages()
    for name in (*_SUPERVISOR, *(_DRAWING if packages["matplotlib"] else ())):
        importlib.import_module(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
