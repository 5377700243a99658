"""pip install --no-build-isolation . : the package in python/, beside it libmoectl.so.0 and the tool, built by CMake."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
# For every processor of the architecture; the tool without what Debian's releases name differently.
OPTIONS = ["-DCMAKE_BUILD_TYPE=Release", "-DMOECTL_NATIVE=OFF", "-DMOECTL_TORCH=OFF", "-DMOECTL_PROMETHEUS=OFF",
           "-DMOECTL_TESTS=OFF", "-DMOECTL_BENCHMARKS=OFF", "-DMOECTL_WERROR=OFF", "-DBUILD_SHARED_LIBS=OFF"]


class Build(build_py):
    def run(self):
        super().run()
        build = ROOT / "build" / "python"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, *OPTIONS], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "moectl_c", "moectl", "--parallel", str(os.cpu_count())],
                       check=True)
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
