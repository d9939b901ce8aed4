"""Documents of .txt, .jsonl and .parquet files, one after the other and in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from equilibria.solution import UserError

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
LONG = 1 << 20  # bytes of UTF-8; a document above gives a part to each split, and a file above is not held in memory
BLOCK = 1 << 22  # bytes that are read at a time
LONGEST_LINE = 1 << 30  # bytes
ROWS = 256  # of a Parquet file that are in memory at a time

Advance = Callable[[int], object]
"""Is told how many bytes more of the source are done."""


def _no_one(size: int) -> None: ...


@dataclass(frozen=True)
class LongText:
    """A document that is too long to be held: a text file."""

    path: Path
    advance: Advance = _no_one

    def blocks(self) -> Iterator[str]:
        """The text, in blocks that end anywhere."""
        return text_blocks(self.path, self.advance)

    def size(self) -> int:
        """Bytes of the text as UTF-8."""
        with _opened(self.path) as file:
            head = file.read(4)
        if _compressed(self.path) or _encoding(head) != "utf-8-sig":
            return sum(len(block.encode()) for block in text_blocks(self.path))
        return self.path.stat().st_size - len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8)


Document = str | LongText


def is_long(document: Document) -> bool:
    """Whether a document is above the size at which it is cut."""
    # A character is four bytes at most, so that short ones need not be encoded to know.
    return isinstance(document, LongText) or (4 * len(document) > LONG and len(document.encode()) > LONG)


def file_documents(path: Path, field: str, advance: Advance = _no_one) -> Iterator[Document]:
    """The documents of a file: a .txt is one; a .jsonl has one on each line and a .parquet one in each row, in `field`.

    Documents may be empty. Raises UserError that names the file, and the line where there are lines, if it cannot be read.
    """
    kind = path.name.lower().removesuffix(".gz")
    if kind.endswith(".txt"):
        yield _text(path, advance)
    elif kind.endswith(".jsonl"):
        yield from _lines(path, field, advance)
    else:
        yield from _rows(path, field, advance)


def text_blocks(path: Path, advance: Advance = _no_one) -> Iterator[str]:
    """A text file in blocks that end anywhere: UTF-8, or what its byte order mark says, which is left out."""
    lines = 0
    with _opened(path) as file:
        raw = file.read(BLOCK)
        decoder = codecs.getincrementaldecoder(_encoding(raw))()
        while True:
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line = lines + error.object.count(b"\n", 0, error.start) + 1
                raise UserError(f"line {line} of {path} is not UTF-8; save the file in that encoding") from None
            lines += text.count("\n")
            if text:
                yield text
            if not raw:
                break
            advance(0 if _compressed(path) else len(raw))
            raw = file.read(BLOCK)
    advance(path.stat().st_size if _compressed(path) else 0)


def checked(value: Any, field: str, where: str) -> str:
    """The text of a field. None is empty; anything else but a text raises UserError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"the field {field!r} of {where} is no text but of type {type(value).__name__}; "
            "name a field of text with --text-field"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can write but UTF-8 cannot
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def missing_field(field: str, where: str, fields: Iterable[str]) -> UserError:
    """The error for a field that is not there."""
    return UserError(f"{where} has no field {field!r}; its fields are {', '.join(fields)}: name one with --text-field")


def extra(module: str) -> Any:
    """A module of the extra `hf`, imported when it is needed, for it takes seconds."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).split(".")[0]
        raise UserError(f'the package {package} is missing; install it with: pip install "equilibria[hf]"') from None


def _text(path: Path, advance: Advance) -> Document:
    if not _compressed(path) and path.stat().st_size > 2 * LONG:  # as UTF-16 it may still be short, but not by much
        return LongText(path, advance)
    read, size = [], 0
    for block in text_blocks(path):
        read.append(block)
        size += len(block.encode())
        if size > LONG:
            return LongText(path, advance)
    advance(path.stat().st_size)
    return "".join(read)


def _lines(path: Path, field: str, advance: Advance) -> Iterator[str]:
    number = 0
    with _opened(path) as file:
        while raw := file.readline(LONGEST_LINE):
            number += 1
            where = f"line {number} of {path}"
            if len(raw) == LONGEST_LINE:
                raise UserError(f"{where} is longer than {LONGEST_LINE >> 20} MiB; give each document a line of its own")
            advance(0 if _compressed(path) else len(raw))
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if raw.strip():
                yield _value(raw, field, where)
    advance(path.stat().st_size if _compressed(path) else 0)


def _value(raw: bytes, field: str, where: str) -> str:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8; save the file in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); write one JSON object on each line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object but of type {type(value).__name__}; write one object on each line")
    if field not in value:
        raise missing_field(field, where, value)
    return checked(value[field], field, where)


def _rows(path: Path, field: str, advance: Advance) -> Iterator[str]:
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise missing_field(field, str(path), names)
            # Checked before a row is read: a column of numbers in a file of pictures would be gigabytes.
            kind = file.schema_arrow.field(field).type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            texts = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view, arrow.types.is_null)
            if not any(test(kind) for test in texts):
                raise UserError(f"the field {field!r} of {path} holds {kind}, not text; name another with --text-field")
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield checked(value, field, f"row {number} of {path}")
                advance(round(share * len(batch)))
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as Parquet ({reason}); write the file again") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where it is compressed."""
    try:
        with gzip.open(path, "rb") if _compressed(path) else path.open("rb") as file:
            yield file  # pyright: ignore[reportReturnType]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or not compressed by gzip ({error}); make the file again") from None


def _compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"
