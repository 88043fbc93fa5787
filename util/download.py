"""Fetches files: complete and readable, or not at all; every wait ends."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from samdetr.util.distributed import all_gather_object, is_first_on_node, main_process_first
from samdetr.util.files import remove_leftovers, whole_file

SECONDS = 30.0  # to connect, and between two parts of the answer
SLOWEST = 10_000  # bytes a second, on average, after SECONDS
LARGEST = 16 * 2**30  # bytes


def fetch(
    url: str,
    path: Path,
    *,
    check: Callable[[Path], Any] = lambda path: None,
    allow_http: bool = False,
) -> Path:
    """The file at `path`, fetched from `url` if it is not there. One process a node fetches it, the others wait.

    Args:
        check: called with the new file before it gets its name; raises ValueError if it cannot be read.
        allow_http: whether other hosts than this one may send it without encryption, where others can change it.

    Raises:
        ValueError: why it cannot be had; nothing is left then.
    """
    error = None
    with main_process_first():
        if is_first_on_node() and not path.is_file():
            try:
                _fetch(url, path, check, allow_http)
            except ValueError as found:
                error = found
        elif not path.is_file():
            error = ValueError(f"the process of this node that fetches {url} could not; see its message")
    if any(all_gather_object(error is not None)):  # all end, or none: those that have it would wait for the others
        raise ValueError(str(error or f"another node could not fetch {url}"))
    return path


@contextlib.contextmanager
def socket_timeout() -> Iterator[None]:
    """Let libraries that fetch without a limit wait SECONDS at most, to connect and between two parts."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_url(url: str, *, largest: int, allow_http: bool = False) -> bytes:
    """What `url` sends, in memory, `largest` bytes at most. Raises ValueError: why it cannot be had."""
    with _naming(url):
        _require_safe(url, allow_http)
        return b"".join(_parts(url, allow_http, largest))


def _fetch(url: str, path: Path, check: Callable[[Path], Any], allow_http: bool) -> None:
    folder = path.parent
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    with _naming(url):
        try:
            _require_safe(url, allow_http)
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, re.compile(re.escape(path.name)))
            with _unnamed_file(path) as temporary:
                with open(temporary, "wb") as file:
                    for part in _parts(url, allow_http, LARGEST):
                        file.write(part)
                check(temporary)
        except (OSError, HTTPException, ValueError):
            for each in created:
                with contextlib.suppress(OSError):
                    each.rmdir()  # only if it is empty
            raise


@contextlib.contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn whatever goes wrong into a ValueError that names the URL."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:  # HTTPError and URLError are kinds of OSError
        reason = f"no answer for {SECONDS:.0f} s" if isinstance(error, TimeoutError) else error
        raise ValueError(f"{url} cannot be fetched: {' '.join(str(reason).split())}") from None


@contextlib.contextmanager
def _unnamed_file(path: Path) -> Iterator[Path]:
    """As `whole_file`, and the file has no name before it is complete, so that nothing stays even if the process is
    killed; where the system cannot do this, it is `whole_file`."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o644)
    except (OSError, AttributeError):
        with whole_file(path) as temporary:
            yield temporary
        return
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
        os.fsync(descriptor)
        path.unlink(missing_ok=True)
        # Only with a folder's descriptor is the link followed.
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)
    finally:
        os.close(descriptor)


def _parts(url: str, allow_http: bool, largest: int) -> Iterator[bytes]:
    class Redirects(HTTPRedirectHandler):
        def redirect_request(self, request: Request, *rest: Any) -> Request | None:
            _require_safe(rest[-1], allow_http)
            return super().redirect_request(request, *rest)

    start, received = time.monotonic(), 0
    try:
        answer = build_opener(Redirects).open(Request(url, headers={"User-Agent": "samdetr"}), timeout=SECONDS)
    except HTTPError as error:
        error.close()
        raise
    with answer:
        wanted = answer.headers.get("Content-Length")
        if wanted and int(wanted) > largest:
            raise ValueError(f"it has {int(wanted) / 1e9:.1f} GB, more than {largest / 1e9:.1f} GB")
        while part := answer.read1(2**20):
            received += len(part)
            seconds = time.monotonic() - start
            if received > largest:
                raise ValueError(f"it has more than {largest / 1e9:.1f} GB")
            if seconds > SECONDS and received < SLOWEST * seconds:
                raise ValueError(f"{received} bytes came in {seconds:.0f} s, which is too slow")
            yield part
        if wanted and received < int(wanted):
            raise IncompleteRead(b"", int(wanted) - received)


def _require_safe(url: str, allow_http: bool) -> None:
    """Raises ValueError unless the file comes over https, or from this machine, or `allow_http`."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(
            f"{parts.scheme or 'no scheme'}: is no way to fetch a file; only https is, and http if allowed"
        )
    local = parts.hostname == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(parts.hostname).is_loopback
    if not (local or allow_http):
        raise ValueError(
            f"{parts.hostname} sends it by http, where others can change it; use https, or pass `allow_http`"
        )
