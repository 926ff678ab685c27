"""Builds csrc through CMake and Ninja; everything else is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from math import ceil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TERMINAL = Path("/dev/tty")
# The GPUs that get code of their own; PTX of the first for all that come later.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
OLDEST_NVCC = (12, 1)  # kernels with 32 KiB of arguments
MINUTES_AN_ARCH = 0.8  # on two cores


def say(message: str) -> None:
    """Print a line on stderr, and on the terminal as well, since pip shows what a build prints only with -v."""
    line = f"muon_kernels: {message}"
    print(line, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with suppress(OSError), TERMINAL.open("w") as terminal:  # there need not be one
            print(f"\n{line}", file=terminal)  # pip has begun a line


def find_nvcc() -> str | None:
    """nvcc on PATH, in CUDA_HOME, or in this environment's PyPI wheels (pip install nvidia-cuda-nvcc)."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    wheels = [str(p) for p in Path(sysconfig.get_path("purelib"), "nvidia").glob("*") if (p / "bin" / "nvcc").exists()]
    places = (shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes + wheels)
    return shutil.which("nvcc") or next(filter(None, places), None)


def usable_nvcc() -> tuple[str, str]:
    """(nvcc, ""), or ("", why there is none that will do)."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "", "there is no nvcc on PATH, in CUDA_HOME or in this environment"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return "", f"nvcc does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or tuple(map(int, release.groups())) < OLDEST_NVCC:
        needed = "at least {}.{} is needed".format(*OLDEST_NVCC)
        return "", f"{nvcc} is {release[0] if release else 'of an unknown version'}, but {needed}"
    return nvcc, ""


def cuda_archs(nvcc: str, wanted: str) -> list[str]:
    """Compute capabilities without their point, from MUON_KERNELS_CUDA_ARCHS or, of ours, all that this nvcc knows."""
    if not wanted.strip():
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()]
    archs = [arch.strip() for arch in re.split("[,; ]+", wanted) if arch.strip()]
    if not archs or any(not re.fullmatch(r"\d+[af]?", arch) or int(arch.rstrip("af")) < 80 for arch in archs):
        raise SystemExit(
            "MUON_KERNELS_CUDA_ARCHS should be compute capabilities from 8.0 on, without the point, such as '80,90', "
            f"but is: {wanted!r}"
        )
    return list(dict.fromkeys(archs))


def cuda_options() -> list[str]:
    """CMake's options for the CUDA kernels, by MUON_KERNELS_CUDA (0, 1, auto) and MUON_KERNELS_CUDA_ARCHS."""
    wanted = os.environ.get("MUON_KERNELS_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"MUON_KERNELS_CUDA should be 0, 1 or auto but is: {wanted!r}")
    nvcc, reason = usable_nvcc() if wanted != "0" else ("", "")
    if wanted == "1" and not nvcc:
        raise SystemExit(f"MUON_KERNELS_CUDA is 1, but {reason}")
    if not nvcc:
        say(f"no CUDA kernels, for {reason or 'MUON_KERNELS_CUDA is 0'}")
        return []
    first, *others = chosen = cuda_archs(nvcc, os.environ.get("MUON_KERNELS_CUDA_ARCHS", ""))
    minutes = ceil(MINUTES_AN_ARCH * len(chosen))
    say(
        f"compiling the CUDA kernels for {', '.join(f'sm_{arch}' for arch in chosen)} with {nvcc}, about {minutes} min "
        "on two cores. MUON_KERNELS_CUDA=0 does without them, MUON_KERNELS_CUDA_ARCHS=90 is for one kind of GPU."
    )
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
        try:
            subprocess.run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options], check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError:
            if any("NVCC" in option for option in options):
                say("MUON_KERNELS_CUDA=0 builds without the CUDA kernels")
            raise

    def run(self) -> None:
        """Say plainly what a machine without a compiler goes without."""
        try:
            super().run()
        except Exception as error:
            if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
                raise
            self.extensions = []
            say(
                f"no C++ compiler was found ({error}). The package installs without its native CPU kernels:\n"
                "backend='cpu' will be unavailable and 'auto' will use torch's operations, several times slower.\n"
                "Install g++ or clang++ and reinstall."
            )


if __name__ == "__main__":
    setup(ext_modules=[Extension("muon_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
