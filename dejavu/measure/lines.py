"""Lines of JSON that tell whether they are whole: a list of values, and a checksum of them.

What a loss of power, or a process killed amid a write, leaves at the end of a file is no line.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dejavu.errors import UsageError


def make_line(values: list[Any]) -> str:
    """Write a line; half a surrogate pair (JSON can carry one) becomes its escape when the line is encoded."""
    text = json.dumps(values, ensure_ascii=False)[:-1]
    return f'{text}, "{checksum(encode(text))}"]\n'


def encode(text: str) -> bytes:
    """Give the bytes of lines."""
    return text.encode(errors="backslashreplace")


def read_line(line: bytes) -> list[Any] | None:
    """Give the values of a line; None where it is not one that was written."""
    text, _, rest = line.rpartition(b", ")
    if rest != f'"{checksum(text)}"]\n'.encode():
        return None
    values: list[Any] = json.loads(text + b"]")
    return values


def checksum(text: bytes) -> str:
    """Give what a line ends with."""
    return f"{zlib.crc32(text):08x}"


def read_lines(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """Give the offset of each line's end, and its values; what is no line at the end is passed over.

    None where there is no file; UsageError where lines follow what is none.
    """
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            values = read_line(line)
            if values is None:
                if any(map(read_line, file)):
                    raise UsageError(
                        f"line {number} of {path} is corrupted: restore it from a copy, or remove it and all behind "
                        "it, which are then served again"
                    )
                return
            offset += len(line)
            yield offset, values
