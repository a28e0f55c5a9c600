"""Two processes of a framework that wants its own, each running one check of a module."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from .documents import ROOT

SOURCE = "import importlib, sys; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()"


def meeting() -> dict[str, str]:
    """What torchrun tells two processes of one thread each, but their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return where | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


def run_two(module: str, check: str, *, timeout: int = 240, **environment: str) -> None:
    """Calls ``tests.<module>.<check>()`` in both."""
    common = meeting() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SOURCE, f"tests.{module}", check],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    failed = [
        out[-3000:] for process, out in zip(ranks, outputs, strict=True) if process.returncode
    ]
    assert not failed, "\n".join(failed)
