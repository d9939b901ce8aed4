from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from misbehaving_server import Server, serve

from equilibria.data import download as module
from equilibria.data.download import FetchError, download

CONTENT = bytes(i * i % 251 for i in range(200_000))
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(CONTENT) as server:
        yield server


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "data.zip"


def part(target: Path) -> Path:
    return target.with_name("data.zip.part")


def test_a_file_is_fetched(server: Server, target: Path, waits: list[float]) -> None:
    download(server.url, target, CHECKSUM, wait=waits.append)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]
    assert list(target.parent.iterdir()) == [target]
    assert waits == []


@pytest.mark.parametrize("says_length", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    server: Server, target: Path, waits: list[float], says_length: bool
) -> None:
    server.cuts = [70_000, 50_000] if says_length else []
    server.says_length = says_length
    download(server.url, target, CHECKSUM, wait=waits.append)
    assert target.read_bytes() == CONTENT
    if says_length:
        assert server.asked == [None, "bytes=70000-", "bytes=120000-"]
        assert waits == [1.0, 1.0]  # each attempt brought something


def test_a_later_call_goes_on_with_the_part(server: Server, target: Path, waits: list[float]) -> None:
    server.cuts = [70_000]
    server.statuses = [200] + 9 * [503]
    with pytest.raises(FetchError, match="the server answers 503"):
        download(server.url, target, CHECKSUM, wait=waits.append)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert part(target).read_bytes() == CONTENT[:70_000]
    server.statuses.clear()
    server.asked.clear()
    download(server.url, target, CHECKSUM)
    assert server.asked == ["bytes=70000-"]
    assert target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server: Server, target: Path, waits: list[float]) -> None:
    server.ranges = False
    server.cuts = [70_000, 90_000]
    download(server.url, target, CHECKSUM, wait=waits.append)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=70000-", "bytes=90000-"]


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(server: Server, target: Path) -> None:
    server.ranges = False
    server.cuts = [70_000, 90_000] * 20
    with pytest.raises(FetchError, match="broke off after"):
        download(server.url, target, CHECKSUM, wait=lambda seconds: None)
    assert len(server.asked) < 10


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_failure_passes(server: Server, target: Path, waits: list[float], status: int) -> None:
    server.statuses = 4 * [status]
    download(server.url, target, CHECKSUM, wait=waits.append)
    assert target.read_bytes() == CONTENT
    assert waits == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_lasting_failure_is_said_at_once(server: Server, target: Path, waits: list[float], status: int) -> None:
    server.statuses = [status]
    with pytest.raises(FetchError, match=f"the server answers {status} "):
        download(server.url, target, CHECKSUM, wait=waits.append)
    assert waits == []
    assert not target.exists()


def test_wrong_bytes_are_not_kept(server: Server, target: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(FetchError, match=r"data\.zip gave does not have the checksum sha256:"):
        download(server.url, target, CHECKSUM)
    assert list(target.parent.iterdir()) == []
    assert len(server.asked) == 1


@pytest.mark.parametrize("size", [10, 200_000, 300_000])
def test_a_part_of_another_file_is_thrown_away(server: Server, target: Path, size: int) -> None:
    target.parent.mkdir()
    part(target).write_bytes(b"x" * size)
    download(server.url, target, CHECKSUM, wait=lambda seconds: None)
    assert target.read_bytes() == CONTENT
    assert server.asked == [f"bytes={size}-", None]


def test_a_part_that_is_whole_needs_no_more(server: Server, target: Path) -> None:
    target.parent.mkdir()
    part(target).write_bytes(CONTENT)
    download(server.url, target, CHECKSUM)
    assert target.read_bytes() == CONTENT
    assert server.asked == ["bytes=200000-"]


def test_no_connection_and_a_silent_one(target: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/data.zip"
        with pytest.raises(FetchError, match="refused"):
            download(url, target, CHECKSUM, wait=waits.append)
        assert waits == [1.0, 2.0, 4.0, 8.0]
        silent.listen()
        monkeypatch.setattr(module, "TIMEOUT", 0.05)
        with pytest.raises(FetchError, match="timed out"):
            download(url, target, CHECKSUM, wait=waits.append)


def test_a_full_disk_is_no_fault_of_the_connection(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_bar", full)
    with pytest.raises(OSError, match="No space left"):
        download(server.url, target, CHECKSUM)
    assert len(server.asked) == 1
