"""Make the token files that train_gpt.py reads from text files of any kind.

    python examples/prepare_tokens.py docs README.md --suffix .md --out data/docs --tokenizer bytes
    python examples/prepare_tokens.py my_texts --suffix .txt --out data/mine

A folder stands for the files in it and below it. Every tenth file is held out; of fewer than ten, the last tenth of
each. train.bin and val.bin hold one uint16 a token and nothing else, as nanoGPT's do.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

Encoder = Callable[[bytes], list[int]]


def encode_bytes(text: bytes) -> list[int]:
    """Return a token a byte, and 0 for the end of the document."""
    return [*text, 0]


def gpt2_encoder() -> Encoder:
    """Return the tokenizer of GPT-2, of 50257 tokens, which tiktoken downloads once."""
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise SystemExit(
            "--tokenizer gpt2 needs tiktoken: pip install tiktoken, or take --tokenizer bytes, which needs nothing"
        ) from None
    encoding = tiktoken.get_encoding("gpt2")
    return lambda text: [*encoding.encode_ordinary(text.decode()), encoding.eot_token]


ENCODERS: dict[str, Callable[[], Encoder]] = {"gpt2": gpt2_encoder, "bytes": lambda: encode_bytes}


def files_of(paths: Iterable[Path], suffixes: Sequence[str] = ()) -> list[Path]:
    """Return the files that paths stand for, in a fixed order; of a folder those that end in one of the suffixes.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: there is no file.
    """
    paths = list(paths)
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"paths should be files or folders but are not there: {', '.join(missing)}")
    found = []
    for path in paths:
        inside = sorted(below for below in path.rglob("*") if below.is_file()) if path.is_dir() else [path]
        found += [file for file in inside if file == path or not suffixes or file.name.endswith(tuple(suffixes))]
    if not found:
        ends = f" that end in {' or '.join(suffixes)}" if suffixes else ""
        raise ValueError(f"paths should hold files{ends} but hold none: {', '.join(map(str, paths))}")
    return found


def prepare(files: Sequence[Path], out: Path, encode: Encoder) -> dict[str, int]:
    """Write train.bin and val.bin into a new folder and return how many tokens each has.

    The folder has its name only once both are complete, so that nobody reads half of them.

    Raises:
        FileExistsError: the folder is there already and holds something.
        ValueError: a file has a zero byte, or is no UTF-8 text, for an encoder that needs that; or there is no text.
            Nothing is left then.
    """
    _check_new(out)
    writing = out.absolute().with_name(f"{out.absolute().name}.writing-{secrets.token_hex(4)}")
    writing.mkdir(parents=True)
    counts = {"train": 0, "val": 0}
    try:
        with (writing / "train.bin").open("wb") as train, (writing / "val.bin").open("wb") as val:
            for n, file in enumerate(files):
                tokens = _encoded(file, encode)
                cut = len(tokens) * 9 // 10 if len(files) < 10 else 0 if n % 10 == 9 else len(tokens)
                for name, to, part in (("train", train, tokens[:cut]), ("val", val, tokens[cut:])):
                    part.tofile(to)
                    counts[name] += len(part)
        if not all(counts.values()):
            raise ValueError(
                f"files should hold text to train on and to hold out but hold {sum(counts.values())} tokens"
            )
        try:
            writing.rename(out)  # replaces an empty folder
        except OSError:
            _check_new(out)  # another was faster
            raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return counts


def _check_new(out: Path) -> None:
    """Raise FileExistsError if a folder is there and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} should be a new folder, or an empty one, but is not; give another, or remove it")


def _encoded(file: Path, encode: Encoder) -> np.ndarray:
    text = file.read_bytes()
    if (at := text.find(0)) >= 0:
        raise ValueError(
            f"{file} should be text but has a zero byte, at {at}, as pictures, archives and UTF-16 have; "
            "leave it out, of a folder by --suffix, or write it as UTF-8"
        )
    try:
        return np.array(encode(text), dtype=np.uint16)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} should be UTF-8 text but is not: {error.reason} at byte {error.start}; "
            "leave it out by --suffix, or take --tokenizer bytes"
        ) from None


def standard_library(out: Path) -> None:
    """Make token files of bytes from the sources of Python's standard library, which every machine has, if need be.

    Several may begin at the same time: the first to end makes the folder.
    """
    with contextlib.suppress(FileExistsError):
        prepare(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")), out, encode_bytes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="files and folders of text")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.bin and val.bin")
    parser.add_argument("--tokenizer", choices=ENCODERS, default="gpt2", help="default: gpt2")
    parser.add_argument("--suffix", nargs="+", default=(), help="how files in folders end, such as .txt .md")
    args = parser.parse_args(argv)
    try:
        counts = prepare(files_of(args.paths, args.suffix), args.out, ENCODERS[args.tokenizer]())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: {counts['train']:,} tokens to train on, {counts['val']:,} held out")


if __name__ == "__main__":
    main()
