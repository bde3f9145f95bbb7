"""One form for the tables of bad inputs: what a user has, what a command says of it, what is left on disk."""

import shlex
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpo_fast.cli import main as cli


@dataclass(frozen=True)
class Bad:
    """A mistake in a world of `tiny_world.make_world`, and what becomes of it.

    Attributes:
        name: of the case.
        prepare: makes the mistake in the folder that the command runs in.
        command: after "bpo-fast"; it writes to `--output_dir out`.
        sentence: part of what it says; on standard error for a refusal, on either stream for a counted skip.
        left: names of the files below `out` afterwards, hidden ones apart; None where a run went on and only the
            sentence counts.
        status: exit status: 2 for a refusal, 0 for a counted skip.
    """

    name: str
    prepare: Callable[[Path], object]
    command: str
    sentence: str
    left: tuple[str, ...] | None = ()
    status: int = 2


def table(*cases: Bad):
    """Parametrises a test over cases, by their names."""
    return pytest.mark.parametrize("bad", cases, ids=[case.name for case in cases])


def check(bad: Bad, world: Path, capsys) -> None:
    """Runs the command in `world`, the working directory, and compares all that `bad` says."""
    bad.prepare(world)
    capsys.readouterr()
    command, *options = shlex.split(bad.command)
    recipe = [] if command == "demo" else ["--config", "run.yaml"]  # the demo has all it needs
    status = cli.main([command, *recipe, "--output_dir", "out", *options])
    printed = capsys.readouterr()
    assert status == bad.status, printed
    assert bad.sentence in (printed.err if status else printed.out + printed.err)
    assert "Traceback" not in printed.err
    if status:
        assert printed.err.splitlines()[-1].startswith("bpo-fast: error: ")
    if bad.left is not None:
        out = world / "out"
        found = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
        assert sorted(str(path) for path in found if not path.name.startswith(".")) == sorted(bad.left)


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels in 60 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
