"""What setup.py makes of nvcc and of the environment; the nvcc here is a script."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools")


@pytest.fixture
def setup_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With nothing on PATH but what a test puts into tmp_path."""
    spec = importlib.util.spec_from_file_location("setup_py", Path(__file__).parents[1] / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(module, "TERMINAL", tmp_path / "terminal")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "MUON_KERNELS_CUDA", "MUON_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return module


def nvcc(directory: Path, release: str = "13.0", archs: str = "75 80 86 89 90 100 120") -> Path:
    listed = "\\n".join(f"compute_{arch}" for arch in archs.split())
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "nvcc"
    path.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'tools, release {release}, V1' || printf '{listed}\\n'\n")
    path.chmod(0o755)
    return path


def test_no_nvcc(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_py.cuda_options() == []
    assert "no CUDA kernels, for there is no nvcc on PATH" in capsys.readouterr().err
    monkeypatch.setenv("MUON_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="MUON_KERNELS_CUDA is 1, but there is no nvcc"):
        setup_py.cuda_options()


@pytest.mark.parametrize(("where", "variable"), [("", None), ("bin", "CUDA_HOME"), ("nvidia/cu13/bin", None)])
def test_where_nvcc_is_found(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, variable: str | None
) -> None:
    path = nvcc(tmp_path / where)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert setup_py.cuda_options() == [
        f"-DMUON_KERNELS_NVCC={path}",
        "-DMUON_KERNELS_CUDA_ARCHS=80;86-real;89-real;90-real;100-real;120-real",
    ]
    monkeypatch.setenv("MUON_KERNELS_CUDA", "0")
    assert setup_py.cuda_options() == []


def test_an_older_nvcc(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds for what it knows; one that is too old, or broken, is no reason to install nothing."""
    nvcc(tmp_path, "12.4", "50 80 86 87 89 90")
    assert setup_py.cuda_options()[1] == "-DMUON_KERNELS_CUDA_ARCHS=80;86-real;89-real;90-real"
    nvcc(tmp_path, "11.8")
    assert setup_py.cuda_options() == []
    monkeypatch.setenv("MUON_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"nvcc is release 11\.8, but at least 12\.1 is needed"):
        setup_py.cuda_options()
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="nvcc does not run"):
        setup_py.cuda_options()


@pytest.mark.parametrize(
    ("wanted", "archs"),
    [
        ("90", "90"),
        ("80, 90", "80;90-real"),
        ("80;86;", "80;86-real"),
        ("90a", "90a"),
        (",80 80", "80"),
        ("100f", "100f"),
    ],
)
def test_architectures(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, archs: str
) -> None:
    nvcc(tmp_path)
    monkeypatch.setenv("MUON_KERNELS_CUDA_ARCHS", wanted)
    assert setup_py.cuda_options()[1] == f"-DMUON_KERNELS_CUDA_ARCHS={archs}"


@pytest.mark.parametrize("wanted", ["nonsense", "70", "9.0", "90-virtual", "80,sm_90", ","])
def test_architectures_that_there_are_not(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    nvcc(tmp_path)
    monkeypatch.setenv("MUON_KERNELS_CUDA_ARCHS", wanted)
    with pytest.raises(SystemExit, match="MUON_KERNELS_CUDA_ARCHS should be compute capabilities"):
        setup_py.cuda_options()


def test_an_unknown_choice(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUON_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="MUON_KERNELS_CUDA should be 0, 1 or auto but is: 'yes'"):
        setup_py.cuda_options()


def test_what_is_compiled_is_said_where_a_user_sees_it(
    setup_py: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip keeps what a build prints to itself, so it goes to the terminal as well; there need not be one."""
    nvcc(tmp_path, archs="80 90 100")
    setup_py.cuda_options()
    said = capsys.readouterr().err
    assert "sm_80, sm_90, sm_100" in said and "about 3 min" in said and "MUON_KERNELS_CUDA=0" in said
    assert (tmp_path / "terminal").read_text() == f"\n{said}"
    monkeypatch.setattr(setup_py, "TERMINAL", tmp_path / "no" / "terminal")
    setup_py.cuda_options()
    assert capsys.readouterr().err == said
    monkeypatch.setattr(setup_py, "TERMINAL", tmp_path / "another")
    monkeypatch.setattr(setup_py.sys.stderr, "isatty", lambda: True, raising=False)
    setup_py.cuda_options()
    assert not (tmp_path / "another").exists(), "stderr is the terminal"


def test_every_package_is_installed() -> None:
    """An editable install finds them whether or not they are listed."""
    from setuptools.config.pyprojecttoml import read_configuration

    root = Path(__file__).parents[1]
    listed = read_configuration(root / "pyproject.toml")["tool"]["setuptools"]["packages"]
    written = [path.parent.relative_to(root).parts for path in (root / "muon_kernels").rglob("__init__.py")]
    assert sorted(listed) == sorted(map(".".join, written))
