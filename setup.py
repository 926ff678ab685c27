"""Builds csrc through CMake and Ninja; everything else is in pyproject.toml."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One extension, one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; without a C++ compiler the package installs and runs on torch's own operations."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # may name the tools of an isolated build that is gone
        import pybind11

        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        scripts = sysconfig.get_path("scripts")
        cmake = shutil.which("cmake", path=scripts) or shutil.which("cmake") or "cmake"
        if ninja := shutil.which("ninja", path=scripts) or shutil.which("ninja"):
            options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options], check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)

    def run(self) -> None:
        """Say plainly what a machine without a compiler goes without."""
        try:
            super().run()
        except Exception as error:
            if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
                raise
            self.extensions = []
            print(
                f"\nmuon_kernels: no C++ compiler was found ({error}).\n"
                "The package installs without its native CPU kernels: backend='cpu' will be unavailable and 'auto'\n"
                "will use torch's operations, several times slower. Install g++ or clang++ and reinstall.\n",
                file=sys.stderr,
            )


setup(ext_modules=[Extension("muon_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
