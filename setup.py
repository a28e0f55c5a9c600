"""Builds kdkernels._C with CMake and Ninja; everything else is in pyproject.toml.

Environment:
    KDKERNELS_CUDA           AUTO (default: with CUDA where nvcc is found), ON or OFF
    KDKERNELS_CUDA_ARCHS     CMake list of CUDA architectures, such as "80-real;90" (default: sm_80,
                             sm_90 and sm_100, and PTX of the newest)
    CMAKE_BUILD_PARALLEL_LEVEL  compile jobs
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        # Afresh each time: a cache remembers the tools of a build environment that is gone.
        build = Path(self.build_temp).resolve()
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        options = [
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DKDKERNELS_CUDA={os.environ.get('KDKERNELS_CUDA') or 'AUTO'}",
        ]
        if archs := os.environ.get("KDKERNELS_CUDA_ARCHS"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        environment = os.environ.copy()
        if not shutil.which("nvcc") and Path("/usr/local/cuda/bin/nvcc").exists():
            environment.setdefault("CUDACXX", "/usr/local/cuda/bin/nvcc")
        subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True, env=environment
        )
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


setup(
    ext_modules=[Extension("kdkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
