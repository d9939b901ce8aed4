"""Fetching a file over HTTP: resumed where it broke off, and checked before it is used."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from equilibria.solution import UserError

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing
PIECE = 1 << 16  # bytes
TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may be others the next time


class FetchError(UserError):
    """A file could not be fetched; the message is the reason."""


class _Broken(Exception):
    """The connection failed in a way that another attempt may not."""


def download(url: str, target: Path, checksum: str, *, wait: Callable[[float], None] = time.sleep) -> None:
    """Fetches `url` into the file `target`, whose `checksum` ('sha256:...' or 'md5:...') it must have.

    What has come stands in `target`.part, and is gone on with by the next attempt, in this call or a later one; from a
    server that cannot do that, all is fetched again. After a failure that may pass (no connection, one that breaks or is
    silent for 30 s, statuses 408, 425, 429, 500 and 502 to 504) there is another attempt, after 1, 2, 4 ... seconds
    (`wait`), until five in a row have brought nothing. A file that went on from an earlier part and has the wrong
    checksum is fetched once more from its beginning.

    Raises FetchError if that was in vain, with the part kept, and for a file with the wrong checksum, which is deleted.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        resumed = part.exists()
        _fetch(url, part, wait)
        if file_digest(part, checksum) == checksum:
            part.replace(target)
            return
        part.unlink()
        if not resumed:
            break
    raise FetchError(f"what {url} gave does not have the checksum {checksum}")


def file_digest(path: Path, like: str) -> str:
    """The checksum of a file, written as `like` is: 'ALGORITHM:HEXADECIMAL'."""
    algorithm = like.split(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _fetch(url: str, part: Path, wait: Callable[[float], None]) -> None:
    failures, most = 0, _size(part)
    while True:
        try:
            _attempt(url, part)
            return
        except _Broken as error:
            # More than ever, not more than before: a server that always begins anew may break off early and late.
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures == ATTEMPTS:
                raise FetchError(str(error)) from None
            wait(2.0 ** (failures - 1))


def _attempt(url: str, part: Path) -> None:
    """Fetches the rest of the file. Raises _Broken or FetchError if it is not whole afterwards."""
    response = _open(url, part)
    if response is None:
        return
    with response:
        start, total = _extent(response, _size(part))
        with part.open("r+b" if start else "wb") as file, _bar(url, start, total) as bar:
            file.seek(start)
            while piece := _read(response):
                bar.update(file.write(piece))
            end = file.tell()
    if total is not None and end < total:
        raise _Broken(f"the connection broke off after {end:,} of {total:,} bytes")


def _open(url: str, part: Path) -> http.client.HTTPResponse | None:
    """The answer to a request for what the part lacks; None if it lacks nothing."""
    done = _size(part)
    headers = {"User-Agent": "equilibria"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and done:  # nothing lies behind the part: it is whole, or of another file
                if error.headers.get("Content-Range") == f"bytes */{done}":
                    return None
                part.unlink()
                raise _Broken("the server has less than was fetched before") from None
        kind = _Broken if error.code in TEMPORARY else FetchError
        raise kind(f"the server answers {error.code} {error.reason}") from None
    except (http.client.HTTPException, OSError) as error:  # URLError is an OSError, as a silence is
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _Broken(str(reason) or type(reason).__name__) from None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(PIECE)
    except (http.client.HTTPException, OSError) as error:
        raise _Broken(str(error) or type(error).__name__) from None


def _extent(response: http.client.HTTPResponse, done: int) -> tuple[int, int | None]:
    """Where in the file the body of a response begins, and the size of the file if the server says so."""
    if response.status == 206:
        # Content-Range: bytes START-END/TOTAL
        extent, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if extent.partition("-")[0] != str(done):
            raise _Broken("the server sent another part than was asked for")
        return done, int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _bar(url: str, start: int, total: int | None) -> tqdm:
    """Shown on a terminal only."""
    name = url.rsplit("/", 1)[1]
    return tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
