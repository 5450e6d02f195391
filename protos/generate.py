"""Generates the Python code of every .proto file under trackagent/protos/v1, beside it.

`python protos/generate.py` writes the files; with `--check` it writes nothing and fails, naming the
differences, when the committed files are not what the definitions give. The compiler is the one that
grpcio-tools brings: its version decides which versions of protobuf and grpcio can run the code.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("trackagent/protos/v1")
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
DIFF_LINES_SHOWN = 40


def main() -> int:
    """Generates or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check

    definitions = sorted((ROOT / PACKAGE).glob("*.proto"))
    if not definitions:
        print(f"cannot generate: no .proto file in {ROOT / PACKAGE}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        if not compile_into(Path(scratch), definitions):
            return 1
        fresh = generated_files(Path(scratch))
    committed = generated_files(ROOT)
    differing = sorted(n for n in fresh | committed if fresh.get(n) != committed.get(n))

    if check:
        for name in differing:
            print(summary(name, committed.get(name), fresh.get(name)), file=sys.stderr)
        if differing:
            print("the generated code is out of date; run `make protos`", file=sys.stderr)
        return 1 if differing else 0

    for name in differing:
        path = ROOT / PACKAGE / name
        if name in fresh:
            path.write_text(fresh[name], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT.parent)}")
        else:
            path.unlink()
            print(f"removed {path.relative_to(ROOT.parent)}: it has no definition any more")
    if not differing:
        print("the generated code is up to date")
    return 0


def compile_into(folder: Path, definitions: list[Path]) -> bool:
    """Runs the compiler; False when it failed, which it has then explained on stderr."""
    # Relative to ROOT, the path of a definition is its Python package: so the imports come out right.
    well_known_types = resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--proto_path={well_known_types}",
        f"--python_out={folder}",
        f"--pyi_out={folder}",
        f"--grpc_python_out={folder}",
        *(str(path.relative_to(ROOT)) for path in definitions),
    ]
    return protoc.main(arguments) == 0


def generated_files(root: Path) -> dict[str, str]:
    """The generated files below `root`, as name → text."""
    folder = root / PACKAGE
    return {
        path.name: path.read_text(encoding="utf-8")
        for pattern in PATTERNS
        for path in folder.glob(pattern)
    }


def summary(name: str, committed: str | None, fresh: str | None) -> str:
    """What differs in one file, in at most DIFF_LINES_SHOWN lines of diff."""
    if committed is None:
        return f"{name}: missing"
    if fresh is None:
        return f"{name}: has no definition any more"
    lines = list(
        difflib.unified_diff(
            committed.splitlines(), fresh.splitlines(), "committed", "generated", lineterm="", n=1
        )
    )
    more = len(lines) - DIFF_LINES_SHOWN
    shown = [line[:200] for line in lines[:DIFF_LINES_SHOWN]]
    return "\n".join(
        [f"{name}: differs", *shown, *([f"... {more} lines more"] if more > 0 else [])]
    )


if __name__ == "__main__":
    sys.exit(main())
