"""Plants faults, one at a time in a copy of the repository, and sees whether the tests notice.

    python tests/faults/plant.py [LIST ...] [--only TEXT] [--missing] [--minutes N] [--emulated] [--stale]

A list is a TOML file beside this one. It has a table [[fault]] for each, with the fields of `Fault`; `tests`, the files
in which its expressions are looked up; and [[lean]], what is replaced before its faults, instantiations that no chosen
test needs, to save time. Without LIST it is every list. What notices a fault is written to scores.jsonl as soon as it
is known, and SCORES.md is made from that.

A fault in Python costs its tests: each runs in a fork of this process, which has torch and pytest ready. One in
csrc/cpu or python/ costs a build of the module besides. Tests of GPU kernels build these themselves, and names of
builds are hashes of what goes into them: a fault's test cannot meet a sound build. What only costs time, or changes
what nobody reads, is no fault, unless the profile's assertions count it.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import json
import multiprocessing.process
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("tests", "faults")
TIMEOUT = 900.0
PRELOADED = (
    *("torch", "torch.testing", "torch.multiprocessing", "torch.fx.experimental.symbolic_shapes", "pytest"),
    *("torch.distributed", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.distributed.tensor.parallel"),
)
# What tests here do not use costs seconds over many forks.
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:xdist")
SURVIVED, STALE, SAME = "SURVIVED", "STALE", "same code"
UNNOTICED = (SURVIVED, STALE, SAME)


class Stale(Exception):
    """The text that a fault replaces is not there once."""


class DidNotRun(Exception):
    """Tests, or a build, came to no result."""


class Fault(NamedTuple):
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`.

    `tests` are pytest's arguments if they begin with tests/ or tools/, else an expression for -k in the list's TESTS.
    `also` has more of (old, new) in that file.
    """

    name: str
    old: str
    new: str
    tests: str
    file: str
    also: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """What a score is valid for."""
        text = json.dumps([self.old, self.new, self.tests, self.file, self.also])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def planted(self, text: str) -> str:
        """The text of the file with the fault in it."""
        for old, new in ((self.old, self.new), *self.also):
            if (count := text.count(old)) != 1:
                raise Stale(f"{old!r} occurs {count} times in {self.file}")
            text = text.replace(old, new)
        return text


class FaultList(NamedTuple):
    """The faults of a file beside this one."""

    name: str
    faults: tuple[Fault, ...]
    tests: tuple[str, ...] = ()
    lean: tuple[Fault, ...] = ()

    def arguments(self, *faults: Fault) -> tuple[str, ...]:
        """Arguments of pytest for what should notice any of these faults, which have one form of `tests`."""
        if _is_whole(faults[0]):
            return tuple(shlex.split(faults[0].tests))
        first, *others = dict.fromkeys(fault.tests for fault in faults)
        return (*self.tests, "-k", " or ".join(f"({each})" for each in (first, *others)) if others else first)


def _is_whole(fault: Fault) -> bool:
    return fault.tests.startswith(("tests/", "tools/"))


def read_lists(root: Path) -> dict[str, FaultList]:
    """All lists by their names."""
    lists = {}
    for path in sorted((root / FOLDER).glob("*.toml")):
        given = tomllib.loads(path.read_text())
        lean = (Fault("lean", each["old"], each["new"], "", each["file"]) for each in given.get("lean", ()))
        faults = (
            Fault(
                each["name"],
                each["old"],
                each["new"],
                each["tests"],
                each["file"],
                tuple(map(tuple, each.get("also", ()))),
            )
            for each in given["fault"]
        )
        lists[path.stem] = FaultList(path.stem, tuple(faults), tuple(given.get("tests", ())), tuple(lean))
    return lists


def place_of(root: Path, fault: Fault) -> Path:
    """The file that has `old` exactly once: the one that the fault names or, where code has moved since, the only one.

    Raises:
        Stale: there is none, or there are several.
    """
    named = root / fault.file
    if named.exists() and named.read_text().count(fault.old) == 1:
        return named
    sources = (path for folder in ("muon_kernels", "csrc", "python") for path in sorted((root / folder).rglob("*.*")))
    texts = (path for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"))
    found = [path for path in texts if path.read_text().count(fault.old) == 1]
    if len(found) != 1:
        places = [str(path.relative_to(root)) for path in found]
        raise Stale(f"{fault.old!r} should be in {fault.file}, or in one other file, once, but is in: {places}")
    return found[0]


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def commit_of(root: Path) -> str:
    """The short commit, with a + if tracked files beside the scores have been changed since."""
    changed = (line[3:] for line in _git(root, "status", "--porcelain", "--untracked-files=no").splitlines())
    scores = {str(FOLDER / "scores.jsonl"), str(FOLDER / "SCORES.md")}
    return _git(root, "rev-parse", "--short", "HEAD").strip() + "+" * bool(set(changed) - scores)


class Copy:
    """A copy of the repository that faults are planted in, with the module built of it, without CUDA."""

    def __init__(self, source: Path, root: Path, emulated: bool = False) -> None:
        self.root = root
        self._emulated = emulated
        for name in filter(None, _git(source, "ls-files", "-z", "-co", "--exclude-standard").split("\0")):
            if (source / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, root / name)
        # A stale .pyc would hide a change of the same second and size; threads that spin take turns on busy cores.
        self.environment = {
            "PYTHONPATH": f"{root}:{root / 'tests'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        self._configured = False
        self._sound = b""  # the module that this tree builds without a fault
        self._foreign = False  # whether the module is of a fault
        self._keep_module()
        # By hashes rather than times of sources, so where a fault is these are not taken.
        compile_all = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
        subprocess.run(
            [*compile_all, "muon_kernels", "tests", "tools"], cwd=root, stdout=subprocess.DEVNULL, check=False
        )

    def _keep_module(self) -> None:
        """Have the sound module: from the temporary directory if sources are as they were, else by a build."""
        if not (self.root / "CMakeLists.txt").exists():
            return
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folders = [path for folder in ("csrc", "python") for path in sorted((self.root / folder).rglob("*.*"))]
        inputs = [p for p in (*folders, self.root / "CMakeLists.txt") if "cuda" not in p.relative_to(self.root).parts]
        digest = hashlib.sha256(f"{sys.version} {self._emulated}".encode())
        for path in filter(Path.is_file, inputs):
            digest.update(f"{path.relative_to(self.root)}\0".encode() + path.read_bytes() + b"\0")
        kept = Path(tempfile.gettempdir(), f"muon-faults-{os.getuid()}", f"{digest.hexdigest()[:24]}{suffix}")
        if kept.exists():
            shutil.copyfile(kept, self.root / "muon_kernels" / f"_C{suffix}")
            return
        kept.parent.mkdir(exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(self._sound_of_tree())
        os.replace(part, kept)

    def _call(self, command: Sequence[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise DidNotRun(f"the module was not built:\n{done.stdout}")

    def _module(self) -> Path:
        (module,) = (self.root / "muon_kernels").glob("_C*.so")
        return module

    def _build(self) -> bytes:
        """Compile what has changed; the module."""
        import pybind11

        scripts = sysconfig.get_path("scripts")
        cmake, ninja = (shutil.which(n, path=scripts) or shutil.which(n) or n for n in ("cmake", "ninja"))
        if not self._configured:
            options = [  # setup.py's, but for -O1, which compiles four times as fast as -O3
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.root / 'muon_kernels'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                "-DCMAKE_BUILD_TYPE=None",
                "-DCMAKE_CXX_FLAGS=-O1",
                f"-DMUON_KERNELS_EMULATED={self._emulated}",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
            ]
            self._call([cmake, "-G", "Ninja", "-S", str(self.root), "-B", str(self.root / "build"), *options])
            self._configured = True
        self._call([cmake, "--build", str(self.root / "build")])
        return self._module().read_bytes()

    def _sound_of_tree(self) -> bytes:
        self._sound = self._sound or self._build()
        return self._sound

    def make_sound(self) -> None:
        """Put the sound module in place, if a fault's is there."""
        if self._foreign:
            self._module().write_bytes(self._sound)
            self._foreign = False

    @contextmanager
    def planted(self, fault: Fault, native: bool = False) -> Iterator[bool]:
        """Have the fault in the copy, and in the module if it is `native`; whether the code is another then.

        Raises:
            Stale, DidNotRun: it cannot be planted, or what it makes of the sources cannot be compiled.
        """
        path = place_of(self.root, fault)
        text = path.read_text()
        planted = fault.planted(text)
        sound = self._sound_of_tree() if native else b""
        path.write_text(planted)
        try:
            if native:
                self._foreign = True
                yield self._build() != sound
            else:
                self.make_sound()
                yield True
        finally:
            path.write_text(text)

    def failure(self, arguments: Sequence[str]) -> str | None:
        """The first test that fails, or None.

        Raises:
            DidNotRun: no test ran to an end.
        """
        log = self.root / "faults.log"
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            code = 70
            try:
                code = self._in_child(arguments, log)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        process = os.pidfd_open(child)
        try:
            in_time = bool(select.select([process], [], [], TIMEOUT)[0])
        finally:
            os.close(process)
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it started
            _, status = os.waitpid(child, 0)
        if not in_time:
            return "it hangs"
        if os.WIFSIGNALED(status):
            return f"killed by signal {os.WTERMSIG(status)}"
        code, output = os.WEXITSTATUS(status), log.read_text(errors="replace")
        if code == 0 and re.search(r"\b\d+ passed\b", output):
            return None
        if code == 0:
            raise DidNotRun(f"every test is skipped here, {shlex.join(arguments)}")
        failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py)::(.*?)(?: - .*)?$", output, re.MULTILINE)
        if code != 1 or not failed or "nvcc failed" in output:  # no tests, a usage error, one that cannot be imported
            raise DidNotRun(f"the tests did not run, {shlex.join(arguments)}:\n{output[-6000:]}")
        return f"{failed[1]}::{failed[2]}"

    def _in_child(self, arguments: Sequence[str], log: Path) -> int:
        """Run pytest as a process that was started in the copy would."""
        os.setsid()
        for stream, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
            file = os.open(path, flags)
            os.dup2(file, stream)
            os.close(file)
        os.dup2(1, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(self.root)
        os.environ.update(self.environment)
        sys.argv[:] = ["pytest", *arguments]
        # Processes that tests spawn take the path, and would run __main__ again; tests may not meet this harness.
        sys.path[:] = [*self.environment["PYTHONPATH"].split(":"), *sys.path]
        multiprocessing.process.ORIGINAL_DIR = str(self.root)  # type: ignore[attr-defined]
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.modules.pop("plant", None)
        spec = importlib.util.find_spec("muon_kernels")
        if "muon_kernels" in sys.modules or spec is None or self.root not in Path(spec.origin or "/").parents:
            sys.exit("another muon_kernels would be imported")
        pytest: Any = sys.modules["pytest"]
        return int(pytest.main([*PYTEST, *arguments]))


def preload() -> None:
    """Import what every child needs, but nothing of the repository."""
    own = {Path(p).resolve() for p in (*os.environ.get("PYTHONPATH", "").split(":"), Path(__file__).parent)}
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() not in own]
    os.environ["OMP_WAIT_POLICY"] = "passive"  # libgomp reads it once
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()


class Scores:
    """The file of scores, a line a fault, and the page that is made from it."""

    def __init__(self, root: Path, lists: Mapping[str, FaultList]) -> None:
        self._folder, self._lists, self._commit = root / FOLDER, lists, commit_of(root)
        self.rows = read_scores(root)

    def valid(self, of: str, fault: Fault) -> bool:
        """Whether it is known what notices this fault."""
        row = self.rows.get((of, fault.name))
        return row is not None and row["digest"] == fault.digest and row["result"] != STALE

    def record(self, of: str, fault: Fault, result: str | None, seconds: float = 0) -> None:
        """Write a result down; None forgets one. Runs side by side do so one after the other."""
        with (self._folder / "plant.py").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._record(of, fault, result, seconds)

    def _record(self, of: str, fault: Fault, result: str | None, seconds: float) -> None:
        self.rows = read_scores(self._folder.parents[1])
        self.rows.pop((of, fault.name), None)
        if result is not None:
            self.rows[of, fault.name] = {
                "list": of,
                "name": fault.name,
                "digest": fault.digest,
                "result": result,
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                "commit": self._commit,
                "seconds": round(seconds, 1),
            }
        self.write()

    def forget(self) -> None:
        """Drop rows of faults that are in no list: at the start only, for lists may change while others run."""
        known = {(each.name, fault.name) for each in self._lists.values() for fault in each.faults}
        self.rows = {key: row for key, row in self.rows.items() if key in known}

    def write(self) -> None:
        """Write both files."""
        self.rows = dict(sorted(self.rows.items()))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
        for name, text in (("scores.jsonl", "".join(lines)), ("SCORES.md", page(self.rows, self._lists))):
            part = self._folder / f".{name}.{os.getpid()}"
            part.write_text(text)
            os.replace(part, self._folder / name)


def read_scores(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of scores.jsonl by list and name."""
    path = root / FOLDER / "scores.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(row["list"], row["name"]): row for row in rows}


def page(rows: Mapping[tuple[str, str], Mapping[str, Any]], lists: Mapping[str, FaultList]) -> str:
    """SCORES.md."""
    found = {
        each.name: [
            (f, row["result"] if (row := rows.get((each.name, f.name))) and row["digest"] == f.digest else None)
            for f in each.faults
        ]
        for each in lists.values()
    }
    total = [0] * 6
    table = []
    for name, results in found.items():
        scores = [result for _, result in results]
        numbers = [len(scores), sum(r is not None and r not in UNNOTICED for r in scores)]
        numbers += [scores.count(kind) for kind in (*UNNOTICED, None)]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        own = [rows[name, f.name] for f, result in results if result is not None]
        dates, commits = ([*dict.fromkeys(sorted(row[key] for row in own))] for key in ("date", "commit"))
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
        table.append([name, *map(str, numbers), when, ", ".join(commits)])
    head = ["list", "faults", "noticed", "survived", "stale", "same code", "not run", "dates", "commits"]
    lines = [
        "# What notices the planted faults",
        "",
        "Nothing here is edited by hand: `python tests/faults/plant.py` writes it, from scores.jsonl.",
        "",
        *_rows(head, [*table, ["all", *map(str, total), "", ""]]),
    ]
    for kind, title in ((SURVIVED, "Survivors"), (STALE, "Stale"), (SAME, "Compiled to the same code")):
        if names := [(name, f.name) for name, results in found.items() for f, result in results if result == kind]:
            lines += ["", f"## {title}", "", *(f"- {name}: {fault}" for name, fault in names)]
    for name, results in found.items():
        lines += ["", f"## {name}", "", *_rows(["fault", "noticed by"], [[f.name, r or "not run"] for f, r in results])]
    return "\n".join([*lines, ""])


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


class Run:
    """Faults of lists, tried one after the other."""

    def __init__(self, copy: Copy, scores: Scores, deadline: float) -> None:
        self._copy, self._scores, self._deadline = copy, scores, deadline
        self.survived = self.unknown = 0

    def over(self) -> bool:
        """Whether no fault should be begun any more."""
        return time.monotonic() > self._deadline

    def run(self, faults: FaultList, chosen: Sequence[Fault]) -> None:
        """Try the chosen ones of a list."""
        sound: dict[tuple[str, ...], bool] = {}
        expressions = [f for f in chosen if not _is_whole(f)]
        lean: list[tuple[Path, str]] = []
        try:
            for each in faults.lean:
                path = place_of(self._copy.root, each)
                lean.append((path, path.read_text()))
                path.write_text(each.planted(path.read_text()))
            # All at once first, for they overlap.
            if (
                len({f.tests for f in expressions}) > 1
                and not self.over()
                and self._passes(faults.arguments(*expressions))
            ):
                sound = {faults.arguments(f): True for f in expressions}
            for fault in chosen:
                if self.over():
                    return
                self._try(faults, fault, sound)
        finally:
            for path, text in reversed(lean):
                path.write_text(text)

    def _passes(self, arguments: tuple[str, ...]) -> bool:
        self._copy.make_sound()
        try:
            failed = self._copy.failure(arguments)
        except DidNotRun as error:
            failed = str(error)
        if failed:
            print(f"fails without a fault, {shlex.join(arguments)}: {failed}", flush=True)
        return not failed

    def _try(self, faults: FaultList, fault: Fault, sound: dict[tuple[str, ...], bool]) -> None:
        arguments, begun = faults.arguments(fault), time.monotonic()
        try:
            fault.planted(place_of(self._copy.root, fault).read_text())
            if arguments not in sound:
                sound[arguments] = self._passes(arguments)
                begun = time.monotonic()
            if not sound[arguments]:
                self.unknown += 1
                return
            with self._copy.planted(fault, _is_native(fault, arguments)) as changes:
                result = (self._copy.failure(arguments) or SURVIVED) if changes else SAME
        except Stale as error:
            result = STALE
            print(f"{faults.name}: {fault.name}: {error}", flush=True)
        except DidNotRun as error:
            self.unknown += 1
            print(f"{faults.name}: {fault.name}: {error}", flush=True)
            return
        seconds = time.monotonic() - begun
        self._scores.record(faults.name, fault, result, seconds)
        self.survived += result == SURVIVED
        print(f"{faults.name}: {fault.name}: {result} ({seconds:.1f} s)", flush=True)


def _is_native(fault: Fault, arguments: Sequence[str]) -> bool:
    """Whether the module has to be built: tests of CUDA build what they need, from the same bindings."""
    of_module = fault.file.startswith(("csrc/", "python/")) and not fault.file.startswith("csrc/cuda/")
    return of_module and not arguments[0].startswith("tests/cuda/")


def note_stale(
    root: Path, lists: Mapping[str, FaultList], chosen: Mapping[str, Sequence[Fault]], scores: Scores
) -> None:
    """Write down which faults are stale, and forget it of those that are not any more."""
    for name, faults in chosen.items():
        for fault in faults:
            try:
                fault.planted(place_of(root, fault).read_text())
            except Stale as error:
                print(f"{name}: {fault.name}: {error}")
                scores.record(name, fault, STALE)
            else:
                if (scores.rows.get((name, fault.name)) or {}).get("result") == STALE:
                    scores.record(name, fault, None)


def main() -> int:
    """Try faults; 1 if one survived or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", nargs="*", help="names of lists; all if there is none")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name or file contains it")
    parser.add_argument("--missing", action="store_true", help="faults without a valid score")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="begin none after N minutes")
    parser.add_argument(
        "--emulated", action="store_true", help="with AVX-512 and AMX in plain code, see tests/emulated"
    )
    parser.add_argument("--stale", action="store_true", help="run nothing, find what cannot be planted any more")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    lists = read_lists(ROOT)
    names = [Path(name).stem for name in arguments.list] or list(lists)
    if unknown := [name for name in names if name not in lists]:
        parser.error(f"there is no list {', '.join(unknown)}; there are: {', '.join(lists)}")
    scores = Scores(ROOT, lists)
    chosen = {
        name: [
            fault
            for fault in lists[name].faults
            if (arguments.only in fault.name or arguments.only in fault.file)
            and not (arguments.missing and scores.valid(name, fault))
        ]
        for name in names
    }
    scores.forget()
    scores.write()
    if arguments.stale:
        note_stale(ROOT, lists, chosen, scores)
        return 0
    if not any(chosen.values()) or time.monotonic() > deadline:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # children are ended, and the copy goes
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(Copy(ROOT, Path(temporary).resolve(), arguments.emulated), scores, deadline)
        for name, faults in chosen.items():
            if faults and not run.over():
                run.run(lists[name], faults)
    print(f"{run.survived} survived, {run.unknown} could not be tried")
    return int(bool(run.survived or run.unknown))


if __name__ == "__main__":
    sys.exit(main())
