"""pip install --no-build-isolation . : the package in python/, beside it libmoectl.so.0 and the tool, built by CMake."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# For every processor of the architecture; the tool without what Debian's releases name differently.
OPTIONS = ["-DCMAKE_BUILD_TYPE=Release", "-DMOECTL_NATIVE=OFF", "-DMOECTL_TORCH=OFF", "-DMOECTL_PROMETHEUS=OFF",
           "-DMOECTL_TESTS=OFF", "-DMOECTL_BENCHMARKS=OFF", "-DMOECTL_WERROR=OFF", "-DBUILD_SHARED_LIBS=OFF"]

# What must be there before CMake can name the rest, by Debian's packages.
lacks = [debian for there, debian in (
    (shutil.which("cmake"), "cmake"),
    (shutil.which((os.environ.get("CXX", "").split() or ["c++"])[0]), "g++"),
    (shutil.which("ninja") or shutil.which("make"), "ninja-build"),
    # A part of setuptools from version 70 on.
    (importlib.util.find_spec("setuptools.command.bdist_wheel") or importlib.util.find_spec("wheel"), "python3-wheel"),
) if not there]
if lacks:
    sys.exit("moectl cannot be built without these Debian packages, or what they hold: " + ", ".join(lacks))

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel


def cmake(*arguments):
    if subprocess.run(["cmake", *arguments], check=False).returncode:
        sys.exit("moectl was not built: what CMake says above is the reason")


class Build(build_py):
    def run(self):
        super().run()
        build = ROOT / "build" / "python"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        cmake("-S", ROOT, "-B", build, *generator, *OPTIONS)
        cmake("--build", build, "--target", "moectl_c", "moectl", "--parallel", str(os.cpu_count()))
        for file in ("libmoectl.so.0", "moectl"):
            shutil.copy(build / file, Path(self.build_lib) / "moectl" / file)


class Wheel(bdist_wheel):
    """One for every Python of this architecture: the package speaks to the library by ctypes."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


version = re.search(r"project\(moectl VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
setup(version=version, cmdclass={"build_py": Build, "bdist_wheel": Wheel})
