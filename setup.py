"""Builds csrc through CMake and Ninja; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The GPUs that get code of their own; PTX of the first for all that come later.
CUDA_ARCHS = "80;86;89;90;100;120"


def find_nvcc() -> str | None:
    """nvcc on PATH, in CUDA_HOME, or in this environment's PyPI wheels (pip install nvidia-cuda-nvcc)."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    wheels = [str(p) for p in Path(sysconfig.get_path("purelib"), "nvidia").glob("*") if (p / "bin" / "nvcc").exists()]
    places = (shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes + wheels)
    return shutil.which("nvcc") or next(filter(None, places), None)


def cuda_options() -> list[str]:
    """CMake's options for the CUDA kernels, by MUON_KERNELS_CUDA (0, 1, auto) and MUON_KERNELS_CUDA_ARCHS."""
    wanted = os.environ.get("MUON_KERNELS_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"MUON_KERNELS_CUDA should be 0, 1 or auto but is: {wanted!r}")
    nvcc = find_nvcc() if wanted != "0" else None
    if wanted == "1" and nvcc is None:
        raise SystemExit("MUON_KERNELS_CUDA is 1 but there is no nvcc on PATH, in CUDA_HOME or in this environment")
    if nvcc is None:
        return []
    first, *others = os.environ.get("MUON_KERNELS_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").split(";")
    archs = ";".join([first, *(f"{arch}-real" for arch in others)])
    return [f"-DMUON_KERNELS_NVCC={nvcc}", f"-DMUON_KERNELS_CUDA_ARCHS={archs}"]


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
            *cuda_options(),
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
