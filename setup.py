"""Builds the optional CUDA extension; everything else about the package is in pyproject.toml.

`pip install .` makes a pure Python wheel. `LLAVA_FAST_CUDA=1 pip install .` also compiles csrc/ with CMake
(nvcc must be present; `CUDAARCHS="80;90"` chooses other GPUs) into llava_fast/_cuda.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITH_CUDA = os.environ.get("LLAVA_FAST_CUDA", "0") not in ("", "0")


class CMakeBuild(build_ext):
    """Has CMake write the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"], check=True
        )
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", destination], check=True)


setup(
    ext_modules=[Extension("llava_fast._cuda", sources=[])] if WITH_CUDA else [],
    cmdclass={"build_ext": CMakeBuild},
    # The build backend asks for these only where they are needed.
    setup_requires=["cmake>=3.26", "ninja", "pybind11>=2.13"] if WITH_CUDA else [],
)
