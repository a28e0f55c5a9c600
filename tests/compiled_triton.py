"""Triton's kernels as they are compiled for a GPU, in the emulator of csrc/tests, on the CPU.

``KDKERNELS_TRITON_PTX`` names a folder for what is compiled. With it, kernels are not interpreted:
Triton compiles them for an H100, as it would there, and the PTX is translated to C++ (see
csrc/tests/ptx) and run. What ptxas makes of it, and what a GPU's memory does, is not seen.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

FOLDER = os.environ.get("KDKERNELS_TRITON_PTX", "")
CSRC_TESTS = Path(__file__).parents[1] / "csrc" / "tests"
CXX = shutil.which("clang++") or "g++"  # which takes five times as long
FLAGS = ["-std=c++17", "-O0", "-fwrapv", "-mfma", "-fPIC", f"-I{CSRC_TESTS / 'ptx'}"]

#: C types of a kernel's arguments, by Triton's names.
C_TYPES = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


def _run(*command: object) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def _folder() -> Path:
    """For what is built of these sources, with the emulator, which is loaded.

    One emulator for all kernels: the stacks of its threads take much room.
    """
    base = Path(FOLDER or tempfile.mkdtemp())
    if not FOLDER:
        atexit.register(shutil.rmtree, base, ignore_errors=True)
    sources = sorted(x for x in CSRC_TESTS.rglob("*") if x.is_file() and x.suffix != ".pyc")
    digest = hashlib.sha256(b"".join(x.read_bytes() for x in sources)).hexdigest()
    folder = base / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libemulator.so"
    if not library.exists():
        emulator = [CSRC_TESTS / f"{name}.cpp" for name in ("emulator", "scheduler")]
        built = library.with_suffix(f".{os.getpid()}.so")
        _run("g++", "-std=c++17", "-O2", "-fPIC", "-shared", *emulator, "-o", built)
        built.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder


def library_of(ptx: str) -> ctypes.CDLL:
    """The kernels of some PTX, by their names with ``launch_`` before."""
    sys.path.insert(0, str(CSRC_TESTS / "ptx"))
    from translate import translate

    stem = _folder() / hashlib.sha256(ptx.encode()).hexdigest()[:16]
    library = stem.with_suffix(".so")
    if not library.exists():
        stem.with_suffix(".ptx").write_text(ptx)
        # Other processes may be about the same.
        source, built = (stem.with_suffix(f".{os.getpid()}.{x}") for x in ("cpp", "so"))
        source.write_text(translate(ptx, f"{stem.name}.ptx"))
        _run(CXX, *FLAGS, "-shared", source, "-o", built)
        built.rename(library)
    return ctypes.CDLL(str(library))


def _flat(kind: Any, value: Any) -> list[Any]:
    """A kernel's parameters: tuples have theirs in a row, constants have none."""
    if isinstance(kind, (tuple, list)):
        return [x for pair in zip(kind, value, strict=True) for x in _flat(*pair)]
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [ctypes.c_uint64(0 if value is None else value.data_ptr())]
    return [C_TYPES[kind](value)]


class _Launcher:
    """Calls a compiled kernel with a grid and arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = tuple(source.signature.values())
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, launch: Any, *rest: Any) -> None:
        assert (y, z) == (1, 1), "the emulator's grids are one-dimensional"
        values = _flat(self.kinds, rest[4:])
        values += [ctypes.c_uint64(0)] * 2  # scratch that no kernel of ours asks for
        addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        launch(
            ctypes.c_uint(x), ctypes.c_uint(self.threads), ctypes.c_size_t(self.shared), addresses
        )


class _Utilities:
    """Loads what was compiled."""

    @staticmethod
    def load_binary(
        name: str, ptx: bytes, shared: int, device: int
    ) -> tuple[Any, Any, int, int, int]:
        library = library_of(ptx.decode())
        return library, getattr(library, f"launch_{name}"), 0, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """An H100, as far as Triton asks."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    """Before any kernel is imported: from here on they are compiled."""
    os.environ["TRITON_CACHE_DIR"] = str(Path(FOLDER) / "triton")
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    driver.set_active(_Driver())
    stages_of = CUDABackend.add_stages

    def stages(backend: Any, stages: dict[str, Any], *arguments: Any) -> None:
        stages_of(backend, stages, *arguments)
        stages["cubin"] = lambda ptx, metadata: ptx.encode()  # what is loaded

    CUDABackend.add_stages = stages

    from kdkernels.backends import triton as backend
    from kdkernels.triton import schedule

    backend._interpreted = lambda: True
    device_of = schedule.device_of

    @functools.wraps(device_of)
    def emulated(device: torch.device) -> schedule.Device:
        if device.type == "cpu":
            return schedule.Device(132, 50 * 2**20, 32, 65536)
        return device_of(device)

    schedule.device_of = emulated
