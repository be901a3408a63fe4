#!/usr/bin/env python3
"""pkgproxy: a caching HTTP proxy for package managers, in one file.

It stands between a fleet of machines and the mirrors that they install from, and downloads each
package once.  Start it with ``python3 pkgproxy.py -r packages/``, tell the clients
``http_proxy=http://this-host:9999/``, and that is all.  It stores what package managers fetch, never
serves wrong bytes, and never refuses what it could have passed on.  It is no general web cache, no
load balancer, no TLS interceptor and no mirror generator.

One request's way through the house::

    client ──> Door      ProxyHandler: bytes → Request (parsed by Rules)
                 │
               Proxy     respond(request)
                 │         stored = Store.lookup(key)
                 │         decide(request, stored, config, now)              (Rules)
                 ├─ SERVE ─────── the file itself: preconditions, ranges
                 ├─ PASS ──────── Origin.fetch, bytes copied through, nothing kept
                 └─ FETCH, VALIDATE
                       Barrier.join(key)
                         ├─ leader    claim the partial → look again → Origin.fetch → a thread fills
                         │            it; where another instance holds it, a thread watches it grow
                         └─ follower  wait for the leader's head
                       both read the growing partial from byte 0, or from their range
                 │
    client <── Door      Reply → bytes

The floors, top to bottom; each uses only what stands above it, and a test holds us to that:

    1 Words     Config, Request, Head, Reply, Outcome, Decision, errors, limits
    2 Rules     pure functions: targets, keys, names, fields, freshness, ranges … decide()
    3 Store     stored responses on disk
    4 Barrier   who is fetching what: one Flight per cache key, one lease among instances
    5 Origin    one forward request, and the pool of connections to origins
    6 Proxy     the only one that knows 3, 4 and 5
    7 Pages     the proxy's own pages
    8 Door      sockets in, sockets out
    9 Porch     options, signals, main

What always holds.  Code and tests cite these by number.

 1. A file under the visible cache tree is complete: counted, flushed to disk, then renamed.  It is
    never written again, only replaced by rename or removed.
 2. At most one flight per cache key, in all processes that share a root; only its leader writes
    its partial.
 3. A flight ends exactly once, and is gone from the barrier before its waiters wake.  Land, then
    tell: rename, leave the barrier, then announce the last bytes.  Whoever received a whole
    representation with a declared length finds it stored.
 4. After winning leadership, look again in the store.
 5. No lock is held across network or disk; no two locks are held together; every lock's line says
    what it guards.
 6. A local failure (disk full, no permission, root removed, bad metadata) costs the cache, never
    the reply.
 7. After the first byte of a reply, the only honest error is closing the connection; a body shorter
    than declared is never ended cleanly.
 8. The incoming Request is never modified; hop-by-hop fields go before any are added.
 9. No request can name a path outside the root, a bookkeeping name, or another key's file.
10. Every wait has a deadline, after which the waiter goes to the origin alone.
11. Nothing is deleted that pkgproxy did not store itself.
12. Clients are decoupled: no client's speed, fault or departure changes what another client gets.

Words follow RFC 9110 (semantics), 9111 (caching), 9112 (HTTP/1.1) and 9211 (Cache-Status).
"""
from __future__ import annotations

import argparse
import base64
import calendar
import collections
import contextlib
import copy
import dataclasses
import enum
import errno
import functools
import glob
import hashlib
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import urllib.parse
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from email.utils import formatdate
from html import escape
from typing import Any, Callable, NamedTuple, Protocol, TypeVar, Union

try:
    import fcntl
except ImportError:  # Windows has no flock: there the barrier ends at the process, or is memcached's
    fcntl = None  # type: ignore[assignment]
try:
    import resource as _resource
except ImportError:  # nor limits on descriptors
    resource: Any = None
else:
    resource = _resource

__version__ = "1.0.0"

log = logging.getLogger("pkgproxy")


# ---------------------------------------------------------------------------------------------
# 1 Types and limits
# ---------------------------------------------------------------------------------------------

Fields = tuple[tuple[str, str], ...]  # in the order of the wire; names compare without case
UNAVAILABLE_STATUSES = (500, 502, 503, 504)  # an origin's words for "not now": stale beats them
# Limits, with their reasons.
MAX_LINE = 16 * 1024  # request line, status line, one field: RFC 9112 §3 asks for 8,000; CDNs sign long
MAX_HEAD = 64 * 1024  # a whole head: as much as Apache lets one grow (100 fields of 8 KiB) in practice
MAX_FIELDS = 200  # lines in a head: Apache allows 100, Go's http2 about 250
MAX_RANGES = 512  # in one request: librepo asks for 256 at most and halves on refusal
MAX_CONNECTIONS = 4000  # of clients, and fewer where descriptors are few: a thread each
MAX_LOOKUPS = 64  # names being looked up at once: a thread each, and no deadline
HOT_CACHE_SIZE = 32  # small replies of this second, at hand to be sent again, each with an open file
LARGE_MEMO = 1000  # results of a pure function that a hit needs again and again
MAX_MEMOIZED = 1000  # characters of an argument whose result is remembered; only strangers send longer names
MAX_EVENTS = 10_000  # failures, or attempts, remembered
MAX_LOG_LINES = 10_000  # that wait to be written; what is more is lost
MAX_REDIRECTS = 10  # followed inside for one request, as Go's client did for the original
COPY_SIZE = 256 * 1024  # bytes moved at a time, where it is not the kernel that moves them
SMALL_BODY = 64 * 1024  # bytes: a body up to this leaves together with its head
LISTEN_BACKLOG = 256  # connections that wait to be accepted: a fleet that wakes up by cron comes all at once
REQUESTS_PER_TURN = 4  # requests of one client that are answered before the next client's
MAX_IDLE_THREADS = 16  # threads that wait for more to do
THREAD_IDLE_TIMEOUT = 5.0  # seconds that they do so
LARGE_SEND = 8 * 1024 * 1024  # bytes: to send so many takes longer than to go to another processor
PUBLISH_DELAY = 0.05  # seconds without a byte from an origin: time to let other instances see what has come
SPACE_STEP = 1024 * 1024  # bytes that a download writes between two looks at the free space
BLOCK = 4096  # bytes that a small file takes on most file systems
SPARE_INODES = 500  # that eviction keeps free for new downloads, beyond the reserve
MAX_SPARE = 10**9  # bytes that eviction keeps free for new downloads, beyond the limits
MAX_FILTERS = 1024 * 1024  # characters in a filters file
MAX_MEMOIZED_HEAD = 4096  # bytes: a request head up to this is worth remembering
MULTIPART_BOUNDARY = secrets.token_hex(12)  # between the parts of multipart/byteranges
FULL_DOWNLOAD_RANGE = 1024 * 1024  # bytes: a range that starts and reaches so far is worth a whole download
PROOF_SIZE = 4096  # bytes at each end of a package, that show whether another mirror's is the same
MAX_CANDIDATES = 8  # places that one name is looked for in
MIN_MATCHING_FILES = 3  # proofs in a row, after which one mirror's folder may stand in for another's
MAX_ROWS = 20  # requests, and downloads, on the status page
MAX_ORIGINS = 40  # told apart there and in /metrics; what is more counts as "other"
HINT_AFTER_REQUESTS = (20, 100)  # requests: by then it can be told that a proxy is of no use to its clients
# Times, all in seconds.
CONNECT_ATTEMPT_DELAY = 0.25  # a try of another address of the same name: RFC 8305 §8 recommends it
DNS_TIMEOUT = 20.0  # for the addresses of a name: a resolver asks a dead name server for 5 to 10 s
PARENT_CONNECT_TIMEOUT = 3.0  # for a connection to a parent proxy, where origins may be asked without it
CONNECT_TIMEOUT = 10.0  # to all addresses of a name: pacman drops a server that says nothing for 10 s
ORIGIN_TIMEOUT = 30.0  # of silence from an origin: dnf gives up after 30 s under 1,000 B/s
RESPONSE_HEAD_TIMEOUT = 40.0  # for the head of an answer, redirects and all: who waits is told within 45 s
RESUME_TIMEOUT = 10.0  # the same for the rest of a download: all tries fit into a stalled client's 90 s
FOLLOWER_HEAD_TIMEOUT = 45.0  # a follower's wait for its leader's head: what that may take, and some
FOLLOWER_STALL_TIMEOUT = 45.0  # a follower's wait for one more byte of a partial: a stall, and a resumption
PEER_POLL_INTERVAL = 0.03  # between two looks at what another instance downloads
LEASE_DURATION = 10  # a lease in memcached lapses after so long: then a follower takes over
LEASE_RENEWAL_INTERVAL = 3.0  # so often its leader renews it
MEMCACHED_TIMEOUT = 1.0  # for memcached's answer
MEMCACHED_BACKOFF = 5.0  # one that could not be asked is left alone for so long: less than a lease
COMMIT_TIMEOUT = 900.0  # and for a complete one to reach the disk: 10 GB at 12 MB/s
VALIDATION_TIMEOUT = 9.0  # for an origin, where a stored response can answer: pacman gives up after 10 s
RESUME_BACKOFF = (0.1, 0.3, 1.0, 2.0, 4.0)  # before each new try to go on with a download that broke off
ORIGIN_BACKOFF = 30.0  # an origin that could not be asked is not waited for again, where a stored one can answer
IDLE_TIMEOUT = 60.0  # of a client between two requests: apt thinks for long between two .debs
REQUEST_HEAD_TIMEOUT = 30.0  # for a whole request head once it has begun (Apache gives 40 s, nginx 60)
LINGER_TIMEOUT = 2.0  # reading what a client still sends after our last answer
CLIENT_TIMEOUT = 60.0  # of a client that neither reads nor writes in the middle of a message
MIN_BODY_RATE = 1000  # bytes a second that a request's body must reach in the long run, as dnf asks of a mirror
MIN_RATE = 4000  # bytes a second: a slower reply makes room for other clients, a slower orphan stops
RATE_WINDOW = 10.0  # over which that is measured: a modem's acknowledgements come in bursts
CONTINUE_TIMEOUT = 1.0  # for an origin's word on Expect: 100-continue; then the body is sent all the same
SLOW_HEAD_AGE = 1.0  # a request head that takes longer makes place for another client, where there is no room
TUNNEL_IDLE_TIMEOUT = 300.0  # a tunnel through which nothing moves is closed
REFUSAL_LOG_INTERVAL = 60.0  # between two log lines that tell of one refused client
POOL_IDLE_TIMEOUT = 15.0  # an origin's connection waits this long for its next request (nginx closes at 75)
LOG_BATCH_DELAY = 0.02  # a log line waits so long for others, that they are written together
POOL_CLEANUP_INTERVAL = 5.0  # between two looks at what waits too long
OPEN_FOR = 3600.0  # a host is looked at so seldom, where only a body without a head is to be given away
ADDRESS_PENALTY = 300.0  # an address that failed is tried after the others of its name
POOL_SIZE = 8  # idle connections kept to one origin
POOL_TOTAL = 24  # and to all: each is a descriptor
SHUTDOWN_GRACE = 8.0  # running replies get this long after SIGTERM; systemd and docker kill after 10
DAY = 86400.0
EVICTION_INTERVAL = 300.0  # between two looks at the disk
MIN_EVICTION_PAUSE = 10.0  # at least, however often the disk is full
MIN_EVICTION_AGE = 60.0  # what was used so lately is not swept
ADOPT_SCAN_INTERVAL = 6 * 3600.0  # between two looks at the folders of --adopt
NOTIFY_INTERVAL = 10.0  # between two of our states that a service manager shows
HISTORY_SAVE_INTERVAL = 60.0  # between two looks at whether the counters have to be saved
# What the status page plots: seconds a slot, and how many slots.
PLOTS = {"hour": (60, 60), "day": (900, 96), "month": (21600, 120)}
_T = TypeVar("_T")


def replace_fields(original: _T, **changes: Any) -> _T:
    """A dataclass of ours with other values.  dataclasses.replace takes four times as long, and a miss makes
    ten of them."""
    copy = object.__new__(type(original))
    vars(copy).update(vars(original), **changes)
    return copy


def memoize(function: Callable[[str], _T]) -> Callable[[str], _T]:
    """Remember the results of a pure function for the last short arguments."""
    known = functools.lru_cache(LARGE_MEMO)(function)
    return functools.wraps(function)(lambda text: (known if len(text) <= MAX_MEMOIZED else function)(text))


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a request goes (RFC 9110 §7.1), userinfo and fragment dropped."""

    scheme: str
    host: str  # lower case; an IPv6 address without its brackets
    port: int
    path: str  # path and query, as the client wrote them, never empty

    @property
    def authority(self) -> str:
        """``host[:port]`` as it goes into Host and into names; the default port is left out."""
        host = "[%s]" % self.host if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else "%s:%d" % (host, self.port)

    @property
    def uri(self) -> str:
        """The target in absolute-form."""
        return "%s://%s%s" % (self.scheme, self.authority, self.path)


@dataclasses.dataclass(frozen=True)
class ParentProxy:
    """A proxy that origins are asked through."""

    place: Target
    fields: Fields = ()  # Proxy-Authorization, where its URL has a name and a password
    or_direct: bool = False  # origins are asked without it where it can't be


@dataclasses.dataclass(frozen=True)
class Config:
    """What the options say.  The options table of floor 9 takes its defaults from here."""

    addrs: tuple[str, ...] = (":9999",)
    root: str | None = None  # None: the current folder, which may hold anything
    filters_file: str | None = None
    allow: tuple[str, ...] = ("loopback", "private")
    connect_ports: tuple[int, ...] = (443,)  # that CONNECT may lead to
    heuristics: bool = True
    offline: bool = False
    max_size: int | None = None  # bytes below the root that are pkgproxy's; None: no limit but min_free
    min_free: int | None = None  # bytes left on the file system; None: 5 %, at most 10 GB
    max_orphans: int = 8  # downloads that go on when their last client has left
    max_age: float | None = None  # seconds since a stored response was last used
    reuse_port: bool = False  # other instances may listen on our addresses
    instance: str = ""  # our name among several; none: the addresses tell them apart
    sharing: bool = True  # of files between mirrors, where no digest in the name proves them
    filters: tuple[re.Pattern[str], ...] = ()  # parsed from filters_file, at start and on SIGHUP
    barrier: tuple[tuple[str, int], ...] = ()  # memcached servers; none: the file system's locks
    pseudonym: str = "pkgproxy"  # our name in Via and Cache-Status (RFC 9110 §7.6.3)
    ca_file: str | None = None  # certificates (PEM) that are trusted besides the system's
    parents: tuple[tuple[str, ParentProxy], ...] = ()  # by the scheme of the origins
    no_proxy: tuple[str, ...] = ()  # origins that are asked without a parent
    adopt: tuple[str, ...] = ()  # folders with packages that are the user's own
    names: tuple[str, ...] = ()  # by which clients call this proxy, besides the host's own

    def __hash__(self) -> int:
        """Enough to remember results by."""
        return hash(self.pseudonym)


class Readable(Protocol):
    """What a request's body, an origin's response and a file have in common."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, as it came in.  Never modified (invariant 8)."""

    method: str
    uri: str  # the request target as received: what filters search and the log shows
    target: Target
    fields: Fields
    version: tuple[int, int] = (1, 1)
    body: Readable | None = None
    length: int | None = 0  # of the body; None: chunked
    client: str = "127.0.0.1"
    server_address: str = ""  # our address by which the client reached us
    received: float = 0.0  # clock time
    key: str = ""  # cache key (RFC 9111 §2)
    is_own_page: bool = False  # for our own pages
    client_prefix: str = ""  # what the client wrote before the target: "/", or HTTPS_HOST
    client_is_local: bool = False  # the client is on this host
    known_missing: bool = False  # a moment ago nothing was stored for it
    timings: dict[str, float] | None = None  # monotonic time of each step, by its name; None: nobody logs them

    def __hash__(self) -> int:
        """Enough to remember results by: a body has none, and all fields take long."""
        return hash(self.uri)


def mark(timings: dict[str, float] | None, step: str) -> None:
    """Record when a request first reached a step, for the log line that ``-v`` writes.

    Another thread may be adding a step: copy ``timings`` before iterating over it.
    """
    if timings is not None:
        timings.setdefault(step, time.monotonic())


@dataclasses.dataclass(frozen=True)
class ResponseHead:
    """Status and fields of a response, live or stored.  Times are clock seconds."""

    status: int
    reason: str
    fields: Fields
    key: str = ""  # requested: what it is stored under
    final_uri: str = ""  # the target that answered, after redirects
    vary: Fields = ()  # the request's fields that Vary names (RFC 9111 §4.1)
    request_time: float = 0.0  # when the request for it, or its last validation, was sent
    response_time: float = 0.0  # when it, or its last validation, arrived
    size: int = -1  # of the body it describes
    mtime_ns: int = 0  # of the body it describes: with size, the body's name (DESIGN §4)
    boot_id: str = ""  # of the machine, where its body may not have reached the disk yet
    flushed_size: int = -1  # bytes of such a body that have, as far as is known
    local_clients_only: bool = False  # it came from where only clients on this host may go: it is for them alone
    same_as: str = ""  # what its body was found to be the same as, instead of being fetched

    def __hash__(self) -> int:
        """Enough to remember results by."""
        return hash((self.key, self.mtime_ns, self.response_time))


class RandomAccessFile(Protocol):
    """An open file whose readers do not move the position that its writer is at."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...

    def read_at(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes from ``offset``; OSError."""
        ...


class FileSlice(NamedTuple):
    """A part of an open file, for the kernel to send: ``stop`` is exclusive."""

    file: RandomAccessFile
    start: int
    stop: int
    fallback: Callable[[int, int], Iterator[bytes]] | None = None  # what comes instead where it cannot be read

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


UNKNOWN_END = 2**62  # the stop of a span that ends where the body ends
Span = Union[bytes, "tuple[int, int]"]  # literal bytes, or [start, stop) of a representation


@dataclasses.dataclass(frozen=True)
class EvictionReport:
    """What a sweep found and did."""

    files: int  # stored responses found
    size: int  # bytes on the disk of all that is pkgproxy's: bodies, bookkeeping, downloads
    removed: int  # stored responses
    freed: int  # bytes


class ResponseBody(Protocol):
    """A reply's body.  Whoever holds it closes it; close() may be called again."""

    length: int | None  # bytes; None: known only at its end
    live: bool  # its chunks arrive over time: each is to be sent at once

    @property
    def origin_bytes(self) -> int:
        """Bytes so far that did not come from the cache: an origin's, and multipart lines."""
        ...

    def chunks(self) -> Iterator[bytes | FileSlice]:
        """Yield the body in order; raise OSError or Failure where it cannot be completed."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...


class Outcome(enum.Enum):
    """How a request was answered.  Log, counters, Cache-Status and pages share these words."""

    HIT = "hit"  # from the file, nobody asked
    VALIDATED = "validated"  # from the file, after the origin said 304
    STALE = "stale"  # from the file, because the origin cannot be asked
    COLLAPSED = "collapsed"  # from another client's download
    SHARED = "shared"  # from another mirror's file, which is the same
    MISS = "miss"  # downloaded, and being stored
    UPDATED = "updated"  # stored before, but the origin has a new one, being stored
    RELAYED = "relayed"  # from the origin, not kept: the answer may not be, or the disk refused
    BYPASS = "bypass"  # from the origin, not kept: a filter or the method says so
    TUNNEL = "tunnel"  # bytes both ways, unseen (CONNECT)
    OWN = "own"  # a page of ours
    REFUSED = "refused"  # the request's fault, or not allowed
    FAILED = "failed"  # the origin's fault


CACHE_OUTCOMES = (Outcome.HIT, Outcome.VALIDATED, Outcome.STALE, Outcome.COLLAPSED, Outcome.SHARED)


class SendResult(NamedTuple):
    """What has left of an answer."""

    size: int  # bytes of its body
    cached: int  # of which no origin had to send for it
    took: float  # seconds
    whole: bool
    quiet: bool = False  # nothing to log


class Action(enum.Enum):
    """What decide() orders."""

    SERVE = "serve"
    VALIDATE = "validate"
    FETCH = "fetch"
    PASS = "pass"
    REFUSE = "refuse"


class NameClass(enum.Enum):
    """What a file's name says about its life (see the decision table in the README)."""

    CONTENT = "content-named"
    PACKAGE = "package"
    INDEX = "index"
    OTHER = "other"


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """Where a name's class overrules what the origin says of a response."""

    lifetime: float | None  # seconds it is fresh; None: the origin's word (RFC 9111 §4.2)
    refresh: float | None  # seconds since its last validation, after which a hit starts another behind it
    heeds_max_age: bool  # whether a client's max-age leads to a validation
    redirects: bool  # followed inside, and the file stored under the requested name
    html: bool  # whether text/html can be what was asked for
    always_stale: bool  # may answer stale whatever the origin says, where that can't be asked


# A mirror's max-age knows nothing of packages: this is the one place where its word doesn't count.
POLICIES = {
    # A name that holds a digest of its content, or as good as one, never means anything else.
    NameClass.CONTENT: CachePolicy(math.inf, None, heeds_max_age=False, redirects=True, html=False,
                              always_stale=True),
    # A package's name and version mean one file, but for those that are uploaded again.
    NameClass.PACKAGE: CachePolicy(math.inf, DAY, heeds_max_age=True, redirects=True, html=False,
                              always_stale=True),
    # An index must be right now, and fit its neighbours; its clients check its signature and date.
    NameClass.INDEX: CachePolicy(0, None, heeds_max_age=True, redirects=True, html=True, always_stale=True),
    NameClass.OTHER: CachePolicy(None, None, heeds_max_age=True, redirects=False, html=True, always_stale=False),
}


@dataclasses.dataclass(frozen=True)
class CacheDecision:
    """What to do with a request, and why: ``forward`` is the reason in Cache-Status' words."""

    action: Action
    name_class: NameClass
    forward: str = ""  # RFC 9211 §2.2: uri-miss, vary-miss, stale, request, bypass, method
    ttl: int | None = None  # seconds of freshness left, where that is known
    refresh: bool = False  # serve, and validate in the background

    @property
    def policy(self) -> CachePolicy:
        """What the name's class overrules."""
        return POLICIES[self.name_class]


@dataclasses.dataclass(frozen=True)
class CacheStatus:
    """One member of the Cache-Status field (RFC 9211)."""

    outcome: Outcome
    forward: str = ""
    forward_status: int = 0
    stored: bool = False
    ttl: int | None = None
    detail: str = ""


class ProxyError(Exception):
    """A request that cannot be satisfied; ``status`` and the sentence go to the client."""

    status = 500
    outcome = Outcome.REFUSED
    forward = ""  # as in CacheDecision, if the request got that far
    reason = ""  # why no stored response was served instead

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status or self.status

    def with_reason(self, forward: str, reason: str) -> ProxyError:
        """Copy the error, and add why the origin was asked and why no stored response was served instead.

        It is a copy because other clients of the same flight raise the same error.
        """
        error = copy.copy(self)
        error.forward, error.reason = forward, reason
        return error


@dataclasses.dataclass(frozen=True)
class Response:
    """What the Door sends."""

    head: ResponseHead
    body: ResponseBody
    cache_status: CacheStatus
    counts_as_cached: bool = False  # its body bytes come from the cache
    fallback: Callable[[Exception], Response] | None = None  # if the body fails before its first byte


class HeadTooLargeError(ValueError):
    """A head, or a line of one, that is larger than we take; ``status`` is what a client is told."""

    def __init__(self, sentence: str, status: int = 431) -> None:
        super().__init__(sentence)
        self.status = status


class BadRequestError(ProxyError):
    """The client's message breaks RFC 9112 (400, 414, 431 …): the connection is closed."""

    status = 400


class OriginError(ProxyError):
    """The origin refused the connection, or answered what is no HTTP (502)."""

    status = 502
    outcome = Outcome.FAILED

    def __init__(self, sentence: str, target: Target | None = None, unreachable: bool = False,
                 status: int = 0) -> None:
        super().__init__(sentence, status)
        self.target = target  # which of the origins on the way failed; None: the one that was asked
        # Whether other requests to this host would fail as well, or wait in vain.  Not set for errors that
        # the request itself may have caused: a status, or a connection that the origin closed.
        self.unreachable = unreachable or self.status == 504


class OriginTimeoutError(OriginError):
    """The origin did not answer in time (504)."""

    status = 504


class TruncatedBodyError(OriginError):
    """The origin's body ended before its declared length."""


class CannotResumeError(OriginError):
    """What has begun cannot be, or is not to be, gone on with: the origin has another file now, say."""


class DownloadAbandonedError(CannotResumeError):
    """Nobody waits for a download any more, and others without a client go on already."""


class StorageError(Exception):
    """The cache cannot be used; the reply must not suffer (invariant 6)."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.code = error.errno


# ---------------------------------------------------------------------------------------------
# 2 HTTP messages: pure functions, no clock, no disk, no socket
# ---------------------------------------------------------------------------------------------

# Fields (RFC 9110 §5) ------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 §5.6.2
_TOKEN = re.compile(TOKEN)
_NO_TEXT = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # no field value holds these (RFC 9110 §5.5)
# A quoted string that never ends goes to the end, lest it is searched for again and again.
_DIRECTIVE = re.compile(
    r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|(%s)(?:[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)(?:"|\\?\Z)|([^\s,]*)))?' % TOKEN,
    re.S)
# RFC 9110 §7.6.1, and what older software sends; Connection adds names of its own.
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
     "proxy-authentication-info", "te", "trailer", "transfer-encoding", "upgrade"))


def field_values(fields: Fields, name: str) -> tuple[str, ...]:
    """Every value of a field, in order.

    >>> field_values((("Via", "1.1 a"), ("via", "1.1 b")), "Via")
    ('1.1 a', '1.1 b')
    """
    name = name.lower()
    return tuple([text for other, text in fields if other.lower() == name])


def field_value(fields: Fields, name: str) -> str | None:
    """The first value of a field, or None: absent is not empty."""
    name = name.lower()
    for other, text in fields:
        if other.lower() == name:
            return text
    return None


def list_members(fields: Fields, name: str) -> list[str]:
    """The members of a list-valued field without quoted strings, in lower case (RFC 9110 §5.6.1)."""
    parts = ",".join(field_values(fields, name)).lower().split(",")
    return [part.strip(" \t") for part in parts if part.strip(" \t")]


def without_fields(fields: Fields, names: Iterable[str]) -> Fields:
    """The fields whose names (lower case) are not among ``names``."""
    drop = frozenset(names)
    return tuple((name, text) for name, text in fields if name.lower() not in drop)


def _only(fields: Fields, names: frozenset[str]) -> Fields:
    return tuple(field for field in fields if field[0].lower() in names)


def end_to_end(fields: Fields) -> Fields:
    """The fields that a proxy passes on: RFC 9110 §7.6.1.  Content-Length is the framing's."""
    return without_fields(fields, HOP_BY_HOP.union(list_members(fields, "Connection"), ("content-length",)))


def parse_fields(lines: list[str]) -> Fields:
    """Parse field lines without their CRLF (RFC 9112 §5); ValueError says what is wrong.

    >>> parse_fields(["Host: a", "X:  b c "])
    (('Host', 'a'), ('X', 'b c'))
    """
    if len(lines) > MAX_FIELDS:
        raise HeadTooLargeError("more than %d fields" % MAX_FIELDS)
    fields = []
    for line in lines:
        name, colon, text = line.partition(":")
        if not (colon and _TOKEN.fullmatch(name)) or _NO_TEXT.search(text):
            raise ValueError("no field line: %.60r" % (name if colon else ""))  # its value may be a password
        fields.append((name, text.strip(" \t")))
    return tuple(fields)


def storable_fields(fields: Fields) -> Fields:
    """What is stored of a response's fields: a cookie is for one client only."""
    return without_fields(end_to_end(fields), ("set-cookie",))


def parse_delta_seconds(text: str | None) -> int:
    """delta-seconds (RFC 9111 §1.2.2): what is none counts as 0, what is huge as 2**31.

    >>> [parse_delta_seconds(text) for text in ("60", "-1", None, "9" * 30, "1.5")]
    [60, 0, 0, 2147483648, 0]
    """
    if text is None or not (text.isascii() and text.isdigit()):
        return 0
    return min(int(text[:12]), 2**31)


def cache_directives(fields: Fields, name: str = "Cache-Control") -> dict[str, str | None]:
    """Parse Cache-Control (RFC 9111 §5.2); of a repeated directive the smaller argument counts.

    >>> cache_directives((("Cache-Control", 'max-age=5, private="a, b"'), ("cache-control", "MAX-AGE=3")))
    {'max-age': '3', 'private': 'a, b'}
    """
    found: dict[str, str | None] = {}
    for match in _DIRECTIVE.finditer(",".join(field_values(fields, name))):
        if match[1] is None:
            continue  # a quoted string on its own
        key = match[1].lower()
        argument = match[2] if match[2] is not None else match[3]
        if key not in found or (argument or "0").isdigit() and parse_delta_seconds(argument) < parse_delta_seconds(found[key]):
            found[key] = argument
    return found


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATES = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        r"\w{3}, (?P<d>\d{2}) (?P<m>\w{3}) (?P<y>\d{4}) (?P<t>\d\d:\d\d:\d\d) GMT",  # IMF-fixdate
        r"\w{6,9}, (?P<d>\d{2})-(?P<m>\w{3})-(?P<y>\d{2}) (?P<t>\d\d:\d\d:\d\d) GMT",  # RFC 850
        r"\w{3} (?P<m>\w{3}) (?P<d>[ \d]\d) (?P<t>\d\d:\d\d:\d\d) (?P<y>\d{4})"))  # asctime


def parse_date(text: str | None) -> float | None:
    """An HTTP-date in any of its three formats (RFC 9110 §5.6.7) as clock seconds, else None.

    >>> [parse_date(text) for text in ("Sun, 06 Nov 1994 08:49:37 GMT",
    ...     "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", "0")]
    [784111777.0, 784111777.0, 784111777.0, None]
    """
    for pattern in _DATES:
        match = pattern.fullmatch(text or "")
        if not match or match["m"].lower() not in _MONTHS:
            continue
        year = int(match["y"])
        year += 0 if year > 99 else 2000 if year < 70 else 1900
        hour, minute, second = (int(part) for part in match["t"].split(":"))
        day, month = int(match["d"]), _MONTHS.index(match["m"].lower()) + 1
        if not (1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60):
            return None
        return float(calendar.timegm((year, month, day, hour, minute, second)))
    return None


def format_http_date(clock: float) -> str:
    """An IMF-fixdate (RFC 9110 §5.6.7)."""
    return formatdate(int(clock), usegmt=True)


# Messages (RFC 9112) -------------------------------------------------------------------------


def parse_request_line(line: str) -> tuple[str, str, tuple[int, int]]:
    """Method, target and version of a request line without its CRLF (RFC 9112 §3).

    >>> parse_request_line("GET http://a/b HTTP/1.1")
    ('GET', 'http://a/b', (1, 1))
    """
    parts = line.split(" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or not parts[1]:
        raise BadRequestError("The request line is not 'METHOD target HTTP/1.1'.")
    if re.search(r"[\x00-\x20\x7f]", parts[1]):
        raise BadRequestError("The request target holds a control character.")
    match = re.fullmatch(r"HTTP/(\d)\.(\d)", parts[2])
    if not match:
        raise BadRequestError("The request line does not end in an HTTP version.")
    if match[1] != "1":
        raise BadRequestError("HTTP/%s.%s is not spoken here; use HTTP/1.1." % (match[1], match[2]), 505)
    return parts[0], parts[1], (1, min(int(match[2]), 1))


def parse_status_line(line: str) -> tuple[tuple[int, int], int, str]:
    """Version, status and reason of a status line without its CRLF (RFC 9112 §4); or ValueError.

    >>> parse_status_line("HTTP/1.1 200 OK")
    ((1, 1), 200, 'OK')
    """
    match = re.fullmatch(r"HTTP/1\.(\d) ([1-5]\d\d)(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?", line)
    if not match:
        raise ValueError("no HTTP/1 status line: %.60r" % line)
    return (1, min(int(match[1]), 1)), int(match[2]), match[3] or ""


def content_length(fields: Fields) -> int | None:
    """The one Content-Length (RFC 9112 §6.2), None without; ValueError where they are in doubt."""
    found = {part.strip(" \t") for text in field_values(fields, "Content-Length") for part in text.split(",")}
    if not found:
        return None
    text = found.pop()
    if found or not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ValueError("Content-Length in doubt")
    return int(text)


def is_chunked(fields: Fields) -> bool:
    """Whether the body is chunked (RFC 9112 §6.1); ValueError for a coding that we don't speak."""
    codings = list_members(fields, "Transfer-Encoding")
    if not codings and field_value(fields, "Transfer-Encoding") is None:
        return False
    if codings != ["chunked"]:
        raise ValueError("Transfer-Encoding other than chunked")
    return True


_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")


def parse_chunk_size(line: bytes) -> int:
    """The size in a chunk's first line, with its CRLF (RFC 9112 §7.1); ValueError.

    >>> parse_chunk_size(b"1f;name=field_value\\r\\n")
    31
    """
    match = _CHUNK_SIZE.fullmatch(line)
    if not match:
        raise ValueError("no chunk size: %.20r" % line)
    return int(match[1], 16)


def request_framing(version: tuple[int, int], fields: Fields) -> int | None:
    """The length of a request's body, None if chunked (RFC 9112 §6.3); BadRequest where in doubt."""
    try:
        length, chunked = content_length(fields), is_chunked(fields)
    except ValueError as error:
        raise BadRequestError("The body's framing is not clear: %s." % error) from None
    if len(field_values(fields, "Content-Length")) > 1 or "," in (field_value(fields, "Content-Length") or ""):
        raise BadRequestError("The body's framing is not clear: more than one Content-Length.")
    if chunked and (length is not None or version < (1, 1)):
        raise BadRequestError("The body's framing is not clear: both Content-Length and Transfer-Encoding.")
    return None if chunked else length or 0


# Targets and cache keys (RFC 9110 §7.1, RFC 3986) ----------------------------------------------

_HOST = re.compile(r"(?!\.)(?!.*\.\.)[a-z0-9._-]{1,253}")
_USERINFO = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:%]*")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ODD = re.compile(r"[^A-Za-z0-9\-._~!$&'()*+,;=:@/?%\[\]]")  # what RFC 3986 has no place for
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})")


def split_authority(authority: str, default_port: int) -> tuple[str, int]:
    """Host and port of ``[userinfo@]host[:port]``; BadRequest where it is none."""
    userinfo, _, place = authority.rpartition("@")
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(\d{0,5}))?", place)
    if not match or not _USERINFO.fullmatch(userinfo):
        raise BadRequestError("The URL has no valid host and port.")  # what it has may be part of a password
    host, port = match[1].lower(), int(match[2] or default_port)
    if host.startswith("["):
        try:
            host = ipaddress.IPv6Address(host[1:-1]).compressed
        except ValueError:
            raise BadRequestError("'%.80s' is no IPv6 address." % host) from None
    elif not _HOST.fullmatch(host):
        raise BadRequestError("'%.80s' is no host name." % host)
    if not 0 < port < 65536:
        raise BadRequestError("%d is no port." % port)
    return host, port


def is_address(host: str) -> bool:
    """Whether a host is an address, not a name."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _percent(match: re.Match[str]) -> str:
    return "".join("%%%02X" % byte for byte in match[0].encode("latin-1", "replace"))


def _normal(text: str, keep: frozenset[str]) -> str:
    """Percent-encoding without choice: decoded where in ``keep``, in capitals elsewhere."""

    def one(match: re.Match[str]) -> str:
        char = chr(int(match[1], 16))
        return char if char in keep else match[0].upper()

    return _PERCENT.sub(one, text)


def _without_dots(path: str) -> str:
    """Remove dot segments (RFC 3986 §5.2.4)."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


@memoize
def parse_target(uri: str) -> Target:
    """An absolute-form target (RFC 9112 §3.2.2); userinfo and fragment are dropped.

    >>> parse_target("HTTP://me:pw@Example.org:80?q#f")
    Target(scheme='http', host='example.org', port=80, path='/?q')
    """
    match = re.fullmatch(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", uri, re.I | re.S)
    if not match:
        raise BadRequestError("The request target is not an http or https URL.")
    scheme = match[1].lower()
    host, port = split_authority(match[2], 443 if scheme == "https" else 80)
    path, mark, query = _ODD.sub(_percent, match[3]).partition("?")
    # What the origin is asked for is what the cache key says: without dot segments (RFC 3986 §6.2.2).
    path = _without_dots(_normal(path if path.startswith("/") else "/" + path, _UNRESERVED))
    return Target(scheme, host, port, path + mark + query)


# What a client may write before a URL, or in place of its scheme, when it fetches from us as from a
# mirror.  zypper makes one slash of two, pip comes back with %3A for a colon, and apt-cacher-ng's
# users write HTTPS/// where that has to fetch with TLS.
HTTPS_HOST = "http://HTTPS///"
_HTTPS_HOST = re.compile(r"https?://HTTPS(?::\d*)?/{2,3}([^/].*)", re.I | re.S)
_WRITTEN_OUT = re.compile(r"/(?:((?i:https?))(?::|(?i:%3A))|HTTPS)/{1,3}([^/?]+)(.*)", re.S)
# apt-cacher-ng's /host.name/path: a dot, a port or localhost tells a host from a page of ours, and so
# does the slash behind it.
_NAMED = re.compile(r"/((?:localhost|[\w-]+(?:\.[\w-]+)+|\[[0-9a-f:.]+\])(?:(?::|%3A)\d+)?"
                    r"|[\w-]+(?::|%3A)\d+)(/.*)", re.I | re.A | re.S)
# Our own pages, also those that browsers and monitors look for.
_OWN_PAGE = re.compile(r"/(?:debug/.*|setup/.*|status\.json|metrics|healthz|wpad\.dat|proxy\.pac|favicon\.ico"
                       r"|robots\.txt)?(?:\?.*)?", re.S)


def is_transparent(path: str, host: str, local: tuple[str, int]) -> bool:
    """Whether a client that asks for a path of a host believes to talk to that host itself, on port 80,
    from where a firewall led it to us: ``local``, our address and port.  Our own name has our port, is
    our address, or has no dot."""
    name, port = split_authority(host, 80) if host else ("", 0)
    if port != 80 or name == local[0] or "." not in name and ":" not in name:
        return False
    ours = is_address(name) or local[1] == 80 or path.startswith("/wpad.dat")
    return not (ours and _OWN_PAGE.fullmatch(path))


def parse_origin_form(path: str, host: str, local: tuple[str, int]) -> tuple[Target | None, str]:
    """Where a request in origin-form goes, None for our own pages; and the prefix before the target's URL.

    >>> parse_origin_form("/https%3A/example.org%3A444/x", "proxy:9999", ("10.0.0.1", 9999))
    (Target(scheme='https', host='example.org', port=444, path='/x'), '/')
    """
    match = _WRITTEN_OUT.fullmatch(path)
    if match:
        written = match[1] or "https", urllib.parse.unquote(match[2]), match[3]
        return parse_target("%s://%s%s" % written), "/"
    if is_transparent(path, host, local):
        target = parse_target("http://" + host + path.lstrip("*"))
        return replace_fields(target, path=path) if path == "*" else target, ""
    match = _NAMED.fullmatch(path)
    if match:
        return parse_target("http://%s%s" % (urllib.parse.unquote(match[1]), match[2])), "/"
    return None, ""


def parse_host_name(text: str) -> str:
    """A host name in lower case; ValueError.

    >>> parse_host_name("Proxy.example.org.")
    'proxy.example.org'
    """
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text, re.A):
        raise ValueError("'%s' is not a host name; write proxy.example.org" % text)
    return text.lower().rstrip(".")


def called_name(request: Request) -> str:
    """The name by which a browser believes to know this proxy, "" if it does not matter: an ordinary target,
    a client without a Host field (no browser), or wpad.dat, which is asked for under any domain's wpad and
    tells no more than the name."""
    if not (request.is_own_page or request.client_prefix) or request.is_own_page and request.uri.startswith("/wpad.dat"):
        return ""
    return split_authority(field_value(request.fields, "Host") or "localhost", 80)[0].rstrip(".")


def with_client_prefix(prefix: str, target: Target) -> str:
    """How a client that writes a prefix must write a target, so that it comes through us again."""
    if prefix == HTTPS_HOST:
        return target.uri if target.scheme == "http" else HTTPS_HOST + target.authority + target.path
    return prefix + target.uri


def parse_request_target(method: str, uri: str, host: str, local: tuple[str, int]) -> tuple[Target | None, str]:
    """Where a request goes (RFC 9112 §3.2, §3.3), None for our own pages; and the prefix before it."""
    if method == "CONNECT":
        if "@" in uri or not re.search(r":\d+$", uri):
            raise BadRequestError("CONNECT wants host:port.")
        return Target("https", *split_authority(uri, 443), ""), ""
    if uri == "*" and method == "OPTIONS" or uri.startswith("/"):
        return parse_origin_form(uri, host, local)
    match = _HTTPS_HOST.fullmatch(uri)
    if match:
        return parse_target("https://" + match[1]), HTTPS_HOST
    target = parse_target(uri)
    if method == "OPTIONS" and re.fullmatch(r"https?://[^/?#]+", uri, re.I):  # RFC 9112 §3.2.4
        return replace_fields(target, path="*"), ""
    # Who knows us as a proxy sends what has our prefix to us as a proxy, too.
    if target.port == local[1] and (target.host == local[0] or _WRITTEN_OUT.fullmatch(target.path)):
        inner, prefix = parse_origin_form(target.path, "", local)
        return inner or (None if _OWN_PAGE.fullmatch(target.path) else target), prefix
    return target, ""


def parse_host_field(version: tuple[int, int], fields: Fields) -> str:
    """The one Host field (RFC 9112 §3.2), "" where there is none, or nothing in it; BadRequest."""
    hosts = field_values(fields, "Host")
    if len(hosts) > 1 or not hosts and version >= (1, 1):
        raise BadRequestError("The request has no Host field, or several.")
    if hosts and hosts[0]:
        split_authority(hosts[0], 80)  # some send userinfo there too
    return hosts[0] if hosts else ""


def cache_key(target: Target) -> str:
    """The primary cache key (RFC 9111 §2), after safe normalisation (RFC 3986 §6.2.2).

    ``%2B`` and ``+`` are two keys (RFC 3986 §2.2): object stores read ``+`` as a space.  Clients that write
    one package's name differently still share the file, by the proof that mirrors' files need.

    >>> cache_key(parse_target("http://A:80/x/../b%2b+%7e%2fc?q=%2b"))
    'http://a/b%2B+~%2Fc?q=%2B'
    """
    path, mark, query = target.path.partition("?")
    path = _without_dots(_normal(path, _UNRESERVED))
    return "%s://%s%s%s%s" % (target.scheme, target.authority, path, mark, _normal(query, _UNRESERVED))


def parse_request(lines: list[str], local: tuple[str, int] = ("", 0)) -> Request:
    """A request from the lines of its head, its body still to come (RFC 9112); BadRequest, Failure.

    ``local``: our address and port, where it came in.
    """
    method, uri, version = parse_request_line(lines[0])
    try:
        fields = parse_fields(lines[1:])
    except ValueError as error:
        raise BadRequestError("A field is not clear: %s." % error, getattr(error, "status", 400)) from None
    length = request_framing(version, fields)
    target, prefix = parse_request_target(method, uri, parse_host_field(version, fields), local)
    if method == "CONNECT" and (length != 0 or field_value(fields, "Content-Length") is not None):
        raise BadRequestError("CONNECT has no body.")
    key = cache_key(target) if target and target.path not in ("", "*") else ""
    if target is None:
        uri = re.sub(r"\A\w+://[^/?]*", "", uri) or "/"  # our own page's path
    elif prefix or uri.startswith("/"):
        uri = target.uri  # what filters and readers of the log look for
    return Request(method, uri, target or Target("", "", 0, uri), fields, version, length=length, key=key,
                   is_own_page=target is None, client_prefix=prefix)


# Name classes (index and package names of every package manager) -----------------------------

# Strangers choose the names, so each pattern must take linear time (a test times them all): nothing unbounded
# may follow what can begin at many places of one segment.

MAX_NAME = 255  # bytes of a path segment that has a name class: what file systems allow
_INDEX_FOLDER = re.compile(
    r"/(?:project/trace|indices|media\.1|boot/[^/]+|media_info|refs/heads|delta-indexes)/")
# Metadata services of clouds at addresses that are not link-local.  They give a machine's secrets to
# whatever connects from it.
_METADATA = tuple(map(ipaddress.ip_network, (
    "168.63.129.16", "100.100.100.200", "fd00:100::100:200", "192.0.0.192",  # Azure, Alibaba, Alibaba, Oracle
    "fd00:ec2::/32", "fd20:ce::254", "fd00:c1::a9fe:a9fe",  # AWS (all local services), Google, Oracle
    "fd00:42::42", "fd00:a9fe:a9fe::1")))  # Scaleway, Akamai


def validators(head: ResponseHead) -> Fields:
    """The preconditions that ask whether a stored response is still right (RFC 9111 §4.3.1)."""
    tag, date = field_value(head.fields, "ETag"), field_value(head.fields, "Last-Modified")
    return ((("If-None-Match", tag),) if tag else ()) + ((("If-Modified-Since", date),) if date else ())


def _weak(tag: str) -> str:
    return tag[2:] if tag.startswith("W/") else tag


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def content_range(answer: ResponseHead) -> tuple[int, int, int] | None:
    """The part [start, stop) that a 206 brings, and the size of the whole (RFC 9110 §14.4); None where it
    does not say, and for other answers."""
    match = _CONTENT_RANGE.fullmatch(field_value(answer.fields, "Content-Range") or "")
    return (int(match[1]), int(match[2]) + 1, int(match[3])) if match and answer.status == 206 else None


def is_remainder(answer: ResponseHead, head: ResponseHead, size: int | None, offset: int) -> bool:
    """Whether an answer is the rest, from ``offset``, of the representation of ``size`` bytes that ``head``
    belongs to.  Bytes of two generations are never spliced."""
    both = head.fields, answer.fields
    mine, theirs = (field_value(fields, "Last-Modified") for fields in both)
    coding, their_coding = (field_value(fields, "Content-Encoding") for fields in both)
    same = field_value(head.fields, "ETag") == field_value(answer.fields, "ETag")  # §15.3.7: a 206 has that of the 200
    # It may leave out the date, which If-Range has compared, and the coding.
    same = same and (mine == theirs or bool(offset) and None in (mine, theirs))
    if not same or their_coding not in ((coding, None) if offset else (coding,)):
        return False
    if not offset:
        return answer.status == 200 and (size is None or content_length(answer.fields) == size)
    part = content_range(answer)
    if part is None:
        return False
    start, stop, total = part
    if content_length(answer.fields) not in (None, stop - start):
        return False
    return start == offset and stop == total and size in (None, total)


def strong_date(head: ResponseHead) -> str | None:
    """A Last-Modified that was at least a minute old, and so names one content (RFC 9110 §8.8.2.2)."""
    date = field_value(head.fields, "Last-Modified")
    modified = parse_date(date)
    sent = parse_date(field_value(head.fields, "Date")) or head.response_time
    return date if modified is not None and sent - modified >= 60 else None


def strong_validator(head: ResponseHead) -> str | None:
    """What a range may be asked for with: an ETag that isn't weak, or a strong date (RFC 9110 §8.8)."""
    tag = field_value(head.fields, "ETag")
    return strong_date(head) if not tag else None if tag.startswith("W/") else tag


# Which of a request's fields an origin gets ----------------------------------------------------

# A response may go to other clients only if nothing else than its key has shaped it.  So a fetch that is
# stored or joined sends these fields of its client and no others; Host, Via, the coding, ranges and
# conditions are the proxy's own.  Origins name Accept and Accept-Language in Vary if they heed them, a few
# mirrors refuse clients without User-Agent, and for Authorization there are rules (is_shareable).

SHARED_FIELDS = frozenset(
    ("accept", "accept-language", "authorization", "cache-control", "pragma", "user-agent"))
# Fields that shape the proxy's own answer, and what it writes into its request.
_OWN_FIELDS = frozenset(("host", "via", "range", "if-range", "if-match", "if-none-match", "if-modified-since",
                         "if-unmodified-since"))
# Fields that need not reach an origin: what browsers, npm, bundler, cargo, NuGet,
# Maven, zypper and flatpak say about themselves, what a proxy before this one adds, and tracing.
_NEEDLESS = re.compile(
    r"accept-(?:encoding|charset)|expect|content-type|date|expires|cache-store|from|referer|dnt|max-forwards"
    r"|priority|save-data|upgrade-insecure-requests|sec-(?:ch|fetch|gpc)(?:-[a-z-]+)?|forwarded|x-real-ip"
    r"|want-(?:(?:content|repr)-)?digest|x-forwarded-[a-z]+|x-(?:request|correlation)-id|traceparent|tracestate"
    r"|x-b3-[a-z]+|baggage"
    r"|npm-(?:auth-type|command|in-ci|scope|session)|pacote-[a-z-]+|x-gemfile-source|cargo-protocol"
    r"|x-nuget-[a-z-]+|x-zypp-[a-z]+|flatpak-[a-z-]+|disable-module-fetch")
_CREDENTIAL = re.compile("api|auth|cookie|cred|jwt|key|login|otp|pass|saml|secret|session|sign|token|user")


def _private_fields(fields: Fields) -> frozenset[str]:
    names = frozenset(name.lower() for name, _ in end_to_end(fields)) - SHARED_FIELDS - _OWN_FIELDS
    return frozenset(name for name in names if not _NEEDLESS.fullmatch(name))


def private_fields(request: Request) -> frozenset[str]:
    """The names of a request's fields that may ask for a response for its client alone.  Such a request is
    never stored or joined; a field that looks like a credential is not even answered from the cache."""
    found = _private_fields(request.fields)
    return found - {"cookie"} if request.client_prefix else found  # a browser's, which no origin gets


def without_private_fields(request: Request) -> Request:
    """A request as its origin sees it if the response may be shared: what Vary names is taken from this."""
    return replace_fields(request, fields=_only(request.fields, SHARED_FIELDS | _OWN_FIELDS))


# What may be stored, what may be used (RFC 9111 §3, §4) --------------------------------------


def media_type(head: ResponseHead) -> str:
    """The media type without parameters, in lower case."""
    return (field_value(head.fields, "Content-Type") or "").partition(";")[0].strip().lower()


def is_shareable(request: Request, head: ResponseHead) -> bool:
    """Whether the response to a request with Authorization is for other clients as well (RFC 9111 §3.5).

    ``must-revalidate``, which the RFC also accepts, is not enough: it obliges a cache to let the origin see
    each client's credentials, but packages are served without asking, and indexes while it is down.
    """
    control = cache_directives(head.fields)
    allowed = "public" in control or parse_delta_seconds(control.get("s-maxage")) > 0
    return field_value(request.fields, "Authorization") is None or (
        allowed and "authorization" not in list_members(head.fields, "Vary"))


def selecting_fields(request: Request, head: ResponseHead) -> Fields:
    """The request's fields that Vary names (RFC 9111 §4.1).  We choose Accept-Encoding ourselves."""
    names = [name for name in list_members(head.fields, "Vary") if name != "accept-encoding"]
    return tuple((name, ", ".join(part.strip() for text in field_values(request.fields, name)
                                  for part in text.split(","))) for name in sorted(set(names)))


def complete_head(request: Request, part: ResponseHead) -> ResponseHead:
    """The head that the answer to a request for the whole has, by that of a part (RFC 9110 §15.3.7)."""
    fields = without_fields(storable_fields(part.fields), ("content-range", "content-length"))
    return replace_fields(part, status=200, reason="OK", fields=fields, key=request.key,
                   vary=selecting_fields(request, part))


def _passed_if_private(request: Request, stored: ResponseHead | None, decision: CacheDecision) -> CacheDecision:
    """A decision, or to pass the request for its client alone if its fields may shape the response."""
    private = private_fields(request)
    if private and decision.action is not Action.SERVE or any(map(_CREDENTIAL.search, private)):
        return replace_fields(decision, action=Action.PASS, forward="request", refresh=False)
    if decision.forward == "vary-miss" and stored is not None and selecting_fields(
            without_private_fields(request), stored) == stored.vary:  # it names a field that is not shared
        return replace_fields(decision, action=Action.PASS)
    return decision


# Links behind a prefix ------------------------------------------------------------------------

# Links that lead away from the prefix of who follows them: those of a page that pip reads (PEP 503, PEP 691)
# and those of an npm document.  Nothing else is ever rewritten.

_PAGE_LINK = re.compile(rb"""(\shref\s{0,8}=\s{0,8}["']?)(https?:|/{1,2})""", re.I)
_FILE_LINK = re.compile(rb'("url"\s{0,8}:\s{0,8}")(https?:|/{1,2})')
_TARBALL_LINK = re.compile(rb'("tarball"\s{0,8}:\s{0,8}")(https?:)')
_LINKS = {"text/html": _PAGE_LINK, "application/vnd.pypi.simple.v1+html": _PAGE_LINK,
          "application/vnd.pypi.simple.v1+json": _FILE_LINK, "application/json": _TARBALL_LINK,
          "application/vnd.npm.install-v1+json": _TARBALL_LINK}
_LONGEST_LINK = 64  # bytes of a match, at most


def link_pattern_for(request: Request, head: ResponseHead) -> re.Pattern[bytes] | None:
    """What finds the links of a response that must lead through the client's prefix; None: there are none."""
    if request.client_prefix != "/" or head.status != 200 or field_value(head.fields, "Content-Encoding") is not None:
        return None
    for_pip = "pypi.simple" in (field_value(request.fields, "Accept") or "") or "simple/" in request.target.path
    media = media_type(head)
    return _LINKS.get(media) if for_pip or media != "text/html" else None


# Preconditions and ranges (RFC 9110 §13, §14) -------------------------------------------------

_TAG = re.compile(r'(?:W/)?"[^"]*"')


def _tag_among(tag: str | None, lists: Iterable[str], strong: bool) -> bool:
    """Compare entity tags (RFC 9110 §8.8.3.2)."""
    listed = ",".join(lists)
    if listed.strip() == "*":
        return True
    if tag is None or strong and tag.startswith("W/"):
        return False
    found = _TAG.findall(listed)
    return tag in found if strong else _weak(tag) in map(_weak, found)


def evaluate_preconditions(request: Request, head: ResponseHead) -> int:
    """The status that the preconditions give, in the order of RFC 9110 §13.2.2: 200, 304 or 412."""
    tag, modified = field_value(head.fields, "ETag"), parse_date(field_value(head.fields, "Last-Modified"))
    match, none_match = field_values(request.fields, "If-Match"), field_values(request.fields, "If-None-Match")
    unmodified_since = parse_date(field_value(request.fields, "If-Unmodified-Since"))
    modified_since = parse_date(field_value(request.fields, "If-Modified-Since"))
    if match:
        if not _tag_among(tag, match, strong=True):
            return 412
    elif unmodified_since is not None and modified is not None and modified > unmodified_since:
        return 412
    if none_match:
        return 304 if _tag_among(tag, none_match, strong=False) else 200
    unmodified = modified_since is not None and modified is not None and modified <= modified_since
    return 304 if unmodified else 200


def parse_range(text: str, size: int) -> list[tuple[int, int]] | None:
    """Byte ranges as [start, stop) (RFC 9110 §14.1.2): None to be ignored, [] unsatisfiable.

    A set that asks for more bytes than there are is an attack or a dumb client, and ignored.

    >>> [parse_range("bytes=" + text, 10) for text in ("0-3", "8-99", "-3", "5-", "10-", "3-1", "0-0,-1")]
    [[(0, 4)], [(8, 10)], [(7, 10)], [(5, 10)], [], None, [(0, 1), (9, 10)]]
    """
    unit, _, listed = text.partition("=")
    specs = [spec.strip(" \t") for spec in listed.split(",") if spec.strip(" \t")]
    if unit.strip().lower() != "bytes" or not 0 < len(specs) <= MAX_RANGES:
        return None
    ranges = []
    for spec in specs:
        match = re.fullmatch(r"(\d{0,18})-(\d{0,18})", spec, re.A)
        if not match or spec == "-" or match[1] and match[2] and int(match[2]) < int(match[1]):
            return None
        start = int(match[1]) if match[1] else max(0, size - int(match[2]))
        stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
        if start < stop:
            ranges.append((start, stop))
    if sum(stop - start for start, stop in ranges) > size:
        return None
    return ranges


def requested_ranges(request: Request, head: ResponseHead, size: int) -> list[tuple[int, int]] | None:
    """The ranges to send of a representation, after If-Range (RFC 9110 §13.1.5); None: all of it."""
    text = field_value(request.fields, "Range")
    if text is None or request.method != "GET" or link_pattern_for(request, head):
        return None  # the parts of a page with other links are others
    condition = field_value(request.fields, "If-Range")
    if condition is not None and condition not in (strong_validator(head), strong_date(head)):
        return None  # apt sends our Last-Modified back byte for byte
    return parse_range(text, size)


# Replies --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SelectedResponse:
    """What of a representation goes to the client: a head, and the spans of its body."""

    head: ResponseHead
    spans: tuple[Span, ...]

    @property
    def overhead(self) -> int:
        """Bytes of the body that are not the representation's."""
        return sum(len(span) for span in self.spans if isinstance(span, bytes))

    @property
    def length(self) -> int | None:
        """Bytes of the body, None where that is unknown."""
        if any(span[1] == UNKNOWN_END for span in self.spans if isinstance(span, tuple)):
            return None
        return sum(len(span) if isinstance(span, bytes) else span[1] - span[0] for span in self.spans)


def _partial_content(head: ResponseHead, size: int, ranges: list[tuple[int, int]], boundary: str) -> SelectedResponse:
    """206, single or multipart/byteranges (RFC 9110 §15.3.7)."""
    labels = ["bytes %d-%d/%d" % (start, stop - 1, size) for start, stop in ranges]
    fields = without_fields(head.fields, ("content-range",))
    if len(ranges) == 1:
        fields += (("Content-Range", labels[0]),)
        return SelectedResponse(replace_fields(head, status=206, reason="Partial Content", fields=fields), (ranges[0],))
    kind = field_value(head.fields, "Content-Type") or "application/octet-stream"
    spans: list[Span] = []
    for span, label in zip(ranges, labels):
        lines = "\r\n--%s\r\nContent-Type: %s\r\nContent-Range: %s\r\n\r\n" % (boundary, kind, label)
        spans += [lines.encode("latin-1"), span]
    spans.append(("\r\n--%s--\r\n" % boundary).encode("latin-1"))
    fields = without_fields(fields, ("content-type",))
    fields += (("Content-Type", "multipart/byteranges; boundary=" + boundary),)
    return SelectedResponse(replace_fields(head, status=206, reason="Partial Content", fields=fields), tuple(spans))


def generated_head(status: int, media: str = "text/plain; charset=utf-8", more: Fields = (),
             policy: str = "default-src 'none'") -> ResponseHead:
    """The head of an answer of our own: nothing in it is run but what ``policy`` names (CSP), nothing is
    guessed at, or kept."""
    return ResponseHead(status, http.client.responses.get(status, "Error"), (
        ("Content-Type", media), ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", policy), *more))


def error_head(status: int) -> ResponseHead:
    """The head of an error of our own, with what its client shall know (RFC 9110 §10.2.1, §10.2.3)."""
    more = {405: (("Allow", "GET, HEAD, OPTIONS"),), 503: (("Retry-After", "5"),)}
    return generated_head(status, more=more.get(status, ()))


def select_response(request: Request, head: ResponseHead, size: int | None, boundary: str) -> SelectedResponse:
    """Apply preconditions and ranges to a representation of ``size`` bytes.

    Where the size is not known yet (None), ranges are ignored: that is always allowed.
    """
    status = evaluate_preconditions(request, head)
    if status == 304:
        names = ("content-type", "content-length", "content-encoding", "content-range")
        return SelectedResponse(replace_fields(head, status=304, reason="Not Modified",
                                 fields=without_fields(head.fields, names)), ())
    if status == 412:
        return SelectedResponse(error_head(412), (b"The representation is another than the request's condition.\n",))
    ranges = None if size is None else requested_ranges(request, head, size)
    if ranges is None or size is None:
        return SelectedResponse(head, ((0, UNKNOWN_END if size is None else size),))
    if not ranges:
        unsatisfied = error_head(416)
        fields = unsatisfied.fields + (("Content-Range", "bytes */%d" % size),)
        text = b"The representation has %d bytes; none of them was asked for.\n" % size
        return SelectedResponse(replace_fields(unsatisfied, fields=fields), (text,))
    return _partial_content(head, size, ranges, boundary)


def redirect_target(head: ResponseHead, target: Target) -> Target | None:
    """Where a redirect leads, if it is one to follow (RFC 9110 §15.4); None to relay it.

    Not followed: from https down to http, and one that only adds a slash (the client must learn it).
    """
    location = field_value(head.fields, "Location")
    if head.status not in (301, 302, 303, 307, 308) or not location:
        return None
    try:
        onward = parse_target(urllib.parse.urljoin(target.uri, location))
    except (BadRequestError, ValueError):
        return None
    if target.scheme == "https" and onward.scheme != "https" or onward.uri == target.uri + "/":
        return None
    return onward


def via_value(fields: Fields, version: tuple[int, int], config: Config) -> str:
    """The Via field with us added (RFC 9110 §7.6.3)."""
    return ", ".join([*field_values(fields, "Via"), "%d.%d %s" % (*version, config.pseudonym)])


def is_same_site(target: Target, onward: Target) -> bool:
    """Whether a redirect stays where it was, so that credentials may go along; http may become https."""
    ports = (target.port, onward.port)
    return target.host == onward.host and (ports[0] == ports[1] or ports == (80, 443))


def max_forwards(request: Request) -> int | None:
    """How many proxies a TRACE or OPTIONS may still pass (RFC 9110 §7.6.2); None: as many as it likes."""
    found = field_values(request.fields, "Max-Forwards") if request.method in ("TRACE", "OPTIONS") else []
    return min(map(parse_delta_seconds, found)) if found else None


def origin_request_fields(request: Request, config: Config, identity: bool) -> Fields:
    """The fields of a request to an origin (RFC 9110 §7.6): end-to-end ones, Host, Via.

    ``identity``: the answer may be stored, so send SHARED_FIELDS only, and ask for no coding.
    """
    own = ["host", "via"]
    own += ["cookie"] if request.client_prefix else []  # a browser's, for another service on our host
    hops = max_forwards(request)
    own += ["max-forwards"] if hops is not None else []
    own += ["expect"] if request.version < (1, 1) else []  # RFC 9110 §10.1.1
    fields = without_fields(end_to_end(request.fields), own)
    fields = (("Host", request.target.authority),) + (_only(fields, SHARED_FIELDS) if identity else fields)
    if hops is not None:
        fields += (("Max-Forwards", str(hops - 1)),)
    if identity:
        fields += (("Accept-Encoding", "identity"),)
    elif request.length is None:
        fields += (("Transfer-Encoding", "chunked"),)
    elif request.length or field_value(request.fields, "Content-Length") is not None:
        fields += (("Content-Length", str(request.length)),)
    return fields + (("Via", via_value(request.fields, request.version, config)),)


def is_loop(request: Request, config: Config) -> bool:
    """Whether a request has passed through us before (RFC 9110 §7.6.3)."""
    return any(member.split()[1:2] == [config.pseudonym.lower()] for member in list_members(request.fields, "Via"))


def cache_status_field(status: CacheStatus) -> str:
    """One member of Cache-Status (RFC 9211).

    >>> cache_status_field(CacheStatus(Outcome.MISS, "uri-miss", stored=True))
    'pkgproxy; fwd=uri-miss; stored'
    """
    parts = ["pkgproxy"]
    kept = status.outcome in (Outcome.STALE, Outcome.SHARED) and not status.forward
    if status.outcome is Outcome.HIT or kept:
        parts.append("hit")
    elif status.forward:
        parts.append("fwd=" + status.forward)
    if status.forward_status:
        parts.append("fwd-status=%d" % status.forward_status)
    parts += ["stored"] if status.stored else []
    parts += ["collapsed"] if status.outcome is Outcome.COLLAPSED else []
    parts += ["ttl=%d" % status.ttl] if status.ttl is not None else []
    parts += ['detail="%s"' % re.sub(r'[^ !#-\[\]-~]', "", status.detail)] if status.detail else []
    return "; ".join(parts)


def render_head(head: ResponseHead, fields: Fields) -> bytes:
    """Status line and fields, with the empty line (RFC 9112 §2.1)."""
    lines = ["HTTP/1.1 %d %s" % (head.status, head.reason)] + ["%s: %s" % field for field in fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


class Framing(enum.Enum):
    """How the end of a reply's body is told (RFC 9112 §6.3)."""

    NONE = "none"  # there is no body
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


def response_framing(request: Request, head: ResponseHead, length: int | None) -> Framing:
    """The framing of a reply whose body has ``length`` bytes, None where that is not known."""
    if head.status in (204, 304) or head.status < 200:
        return Framing.NONE
    if length is not None:
        return Framing.LENGTH
    return Framing.CHUNKED if request.version >= (1, 1) else Framing.CLOSE


def wants_keep_alive(request: Request) -> bool:
    """Whether a client wants its connection to stay open (RFC 9112 §9.3)."""
    options = list_members(request.fields, "Connection") + list_members(request.fields, "Proxy-Connection")
    return "close" not in options and (request.version >= (1, 1) or "keep-alive" in options)


def client_fields(head: ResponseHead, request: Request) -> Fields:
    """A response's fields for a client that wrote a prefix: a redirect leads through us again.  To a browser
    all sites behind us would be one: none gets a cookie, or runs a script that could read the others."""
    if not request.client_prefix:
        return head.fields
    fields = without_fields(head.fields, ("set-cookie",)) + (("Content-Security-Policy", "sandbox"),)
    location = field_value(fields, "Location")
    with contextlib.suppress(BadRequestError, ValueError):
        onward = parse_target(urllib.parse.urljoin(head.final_uri or request.target.uri, location or ""))
        if location:
            fields = without_fields(fields, ("location",)) + (("Location", with_client_prefix(request.client_prefix, onward)),)
    return fields


def rewrite_links(pieces: Iterable[bytes], links: re.Pattern[bytes], base: str, page: Target) -> Iterator[bytes]:
    """A body with its absolute links behind ``base``, however it is cut into pieces.

    >>> b"".join(rewrite_links([b'<a href="/x"'], _PAGE_LINK, "http://proxy:9999/", parse_target("https://a/")))
    b'<a href="http://proxy:9999/https://a/x"'
    """
    site = base + page.scheme + "://"
    starts = {b"//": site.encode(), b"/": ("%s%s/" % (site, page.authority)).encode()}

    def one(match: re.Match[bytes]) -> bytes:
        return match[1] + (starts.get(match[2]) or base.encode() + match[2])

    rest = b""
    for piece in itertools.chain(pieces, [b""]):
        rest += piece
        done = end = max(0, len(rest) - (_LONGEST_LINK if piece else 0))  # a link may go on in the next piece
        for match in links.finditer(rest):
            if match.start() >= end:
                break
            done = max(done, match.end())
        if done:
            yield links.sub(one, rest[:done])
        rest = rest[done:]


def with_date(head: ResponseHead, now: float) -> ResponseHead:
    """A head with Date (RFC 9110 §6.6.1): its own, or now."""
    if field_value(head.fields, "Date") is not None:
        return head
    return replace_fields(head, fields=head.fields + (("Date", format_http_date(now)),))


def render_response_head(request: Request, head: ResponseHead, length: int | None, cache_status: CacheStatus, close: bool,
              config: Config) -> bytes:
    """The head of a reply with a body of ``length`` bytes as it leaves: with framing, Via, Cache-Status."""
    framing = response_framing(request, head, length)
    status = [*field_values(head.fields, "Cache-Status"), cache_status_field(cache_status)]
    fields = without_fields(client_fields(head, request), ("via", "cache-status"))
    fields += (("Via", via_value(head.fields, (1, 1), config)), ("Cache-Status", ", ".join(status)))
    if framing is Framing.CHUNKED:
        fields += (("Transfer-Encoding", "chunked"),)
    elif framing is Framing.LENGTH:
        fields += (("Content-Length", str(length)),)
    if close or request.version < (1, 1):
        fields += (("Connection", "close" if close else "keep-alive"),)
    return render_head(head, fields)


def escape_control(text: str) -> str:
    """Text from outside, safe for a log and a terminal."""
    return _CONTROL.sub(lambda match: "\\x%02x" % ord(match[0]), text)


def cut_userinfo(text: str) -> str:
    """A request target that is not valid, safe to show: nobody can tell where its userinfo begins or ends, so
    everything before the last @ is cut but the scheme.

    >>> cut_userinfo("http:/me:se/cret@a:80/x"), cut_userinfo("/me:secret@a"), cut_userinfo("http://a/x")
    ('http:/a:80/x', '/a', 'http://a/x')
    """
    rest = re.split("@|%40", text)[-1]
    scheme = re.match("(?:https?:)?/*", text, re.I)
    return text if rest == text or scheme is None else scheme[0] + rest


@memoize
def loggable_uri(uri: str) -> str:
    """A request target for the log: safe for a terminal, and without the userinfo, which may be a password.

    >>> loggable_uri("http://me:secret@a/@x")
    'http://a/@x'
    """
    try:
        parse_target(uri)
    except BadRequestError:
        return escape_control(cut_userinfo(uri))
    return escape_control(re.sub(r"\A(\w+://)[^/?]*@", r"\1", uri.partition("#")[0]))


def log_text(request: Request, cache_status: CacheStatus) -> str:
    """What the log says of a request, and of why it was answered so."""
    detail = " (%s)" % escape_control(cache_status.detail) if cache_status.detail else ""
    return "%s %s%s" % (escape_control(request.method), loggable_uri(request.uri), detail)


def truncate_middle(text: str, most: int) -> str:
    """Text from outside for a page: ASCII without controls, long text without its middle.

    >>> truncate_middle("http://a/b", 20), truncate_middle("http://a/bcdefghijklmno", 11)
    ('http://a/b', 'http:...lmno')
    """
    text = escape_control(text).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= most else text[:most // 2] + "..." + text[-(most // 2 - 1):]


def displayable_uri(uri: str) -> str:
    """A request target for a page, which more people read than the log: without its query, which may be a
    password too."""
    path, mark, _ = loggable_uri(uri).partition("?")
    return truncate_middle(path + mark, 120)


# ---------------------------------------------------------------------------------------------
# 3 Cache rules: pure functions
# ---------------------------------------------------------------------------------------------


def _file_name(segment: str, windows: bool) -> str:
    if not segment or segment == "?":
        return "^" + segment.replace("?", "^3F" if windows else "?")
    if windows:
        segment = re.sub(r'[<>:"|?*\\]|[. ]$', lambda match: "^%02X" % ord(match[0]), segment)
        if re.match(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", segment, re.I):
            segment = "^%02X%s" % (ord(segment[0]), segment[1:])
    return segment


def cache_file_names(key: str, windows: bool = False) -> tuple[str | None, str]:
    """Where a cache key's body may lie, relative to the root: its natural name and its hashed one.

    A caret stands in no URL, so it marks what a file system can't hold as it is: ``^`` is an empty
    segment, ``^2F`` a slash in a query.  The natural name is None where it would be too long; the
    hashed one also serves where the natural one is taken (a URL that is both file and folder).
    No two keys share a name.

    >>> cache_file_names("http://a/b/metalink?x=/y")[0]
    'a/b/metalink?x=^2Fy'
    """
    scheme, _, rest = key.partition("://")
    authority, _, path = rest.partition("/")
    path, mark, query = path.partition("?")
    segments = path.split("/")
    segments[-1] += mark + query.replace("/", "^2F")
    folder = _file_name(authority if scheme == "http" else scheme + "^" + authority, windows)
    if len(folder) > 200:
        folder = "^" + hashlib.sha256(folder.encode()).hexdigest()
    names = [_file_name(segment, windows) for segment in segments]
    digest = hashlib.sha256(key.encode("ascii", "replace")).hexdigest()
    held = max(map(len, names)) <= 240 and sum(map(len, names)) <= 1000 and len(names) <= 100
    natural = "/".join([folder, *names]) if held else None
    return natural, "%s/^%s" % (folder, digest)


_CONTENT = re.compile(
    r"/by-hash/[^/]+/[0-9a-f]{32,128}$"  # apt
    r"|/repodata/[0-9a-f]{32,128}-[^/]+$"  # rpm-md
    r"|\.diff/(?!Index)[^/]+$"  # apt's pdiffs
    r"|/objects/[0-9a-f]{2}/[0-9a-f]{62}\.(?!commitmeta)[a-z.]+$"  # ostree
    r"|/deltas/[\w+-]{2}/[^/]+/(?:superblock|\d+)$|/summaries/[0-9a-f]{64}[.-][^/]+$"  # flatpak
    r"|/[a-z]{1,2}/[0-9a-f]{64}(?:-[0-9a-f]{64})?(?:\.gz)?$"  # freebsd-update
    r"|/All/Hashed/[^/]+$"  # FreeBSD pkg
    r"|/nar/(?:\w+/)?[0-9a-z]{52}\.nar(?:\.\w+)?$"  # Nix
    r"|/(?:blobs|manifests)/sha256:[0-9a-f]{64}$"  # OCI, Homebrew's bottles
    r"|/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/[^/]+$"  # PyPI
    r"|/core/guids/[0-9a-f]{64}/")  # Amazon Linux
_MOVING = re.compile(r"/(?:current|latest|latest-stable|snapshots|rawhide|nightly|[^/]+-SNAPSHOT)/", re.I)
_SIGNATURE = re.compile(r"\.(?:sig2?|asc|gpg|sign|signature|minisig|md5|rmd160|sha(?:1|256|512)(?:sum)?)$")
_INDEX = re.compile(
    r"(?:/(?:In)?Release|/(?:Packages|Sources)(?:\.\w+)?|/(?:Translation|Contents|Components|Commands)-[^/]*"
    r"|/meta-release[^/]*|/ls-lR[^/]*|/[^/]*(?:MD5|SHA\d+)(?:SUMS?)?"
    r"|/repodata/[^/]*|/(?:metalink|mirrorlist)|/mirror\.list|/\.?(?:treeinfo|discinfo)|/COMPOSE_ID"
    r"|/RPM-GPG-KEY[^/]*|/[^/]+\.(?:repo|flatpakrepo|metalink|meta4|mirrorlist|key|commitmeta|narinfo)"
    r"|/content|/repoindex\.xml|/repomd\.xml|/directory\.yast|/CHECKSUMS[^/]*|/ARCHIVES\.gz"
    r"|/license\.tar\.gz|/control\.xml|/add_on_products[^/]*|/part\.info|/geoip"
    r"|/[^/]+\.(?:db|files)(?:\.tar(?:\.\w+)?)?|/[^/]+\.abs\.tar\.gz|/last(?:update|sync)"  # pacman
    r"|/APKINDEX[^/]*|/(?i:packages)\.adb|/latest-releases\.yaml"  # apk
    r"|/Packages\.manifest|/sha256sums|/[^/]+\.buildinfo"  # opkg
    r"|/[^/]+-(?:repodata|stagedata)"  # xbps
    r"|/layout\.conf|/(?:portage|gentoo)-latest[^/]*|/latest-[^/]+\.txt|/timestamp\.\w+"  # portage
    r"|/ChangeLog\.txt|/(?:PACKAGES|FILELIST)\.TXT|/MANIFEST\.bz2|/GPG-KEY"  # slackpkg
    r"|/eopkg-index\.xml[^/]*|/latest|/nix-cache-info|/nixexprs\.tar\.\w+"
    r"|/(?:meta|packagesite|data|filesite|digests|pkg)\.(?:conf|pkg|txz|tzst|tbz)|/(?:latest|pub)\.ssl"
    r"|/index\.txt|/pkg_summary\.\w+|/SHA512\.\w+|/pkg-vulnerabilities[^/]*"  # OpenBSD, pkgsrc
    r"|/summary(?:\.idx)?|/config"  # ostree
    r"|/versions|/names|/info/[^/]+|/(?:latest_|prerelease_)?specs\.4\.8(?:\.gz)?"  # RubyGems
    r"|/config\.json|/maven-metadata\.xml|/archetype-catalog\.xml|/@v/list|/@latest"
    r"|/(?:current_)?repodata[^/]*|/notices\.json"  # conda
    r"|/0[12](?:packages\.details|mailrc)\.txt\.gz|/PACKAGES(?:\.\w+)?|/texlive\.tlpdb[^/]*"
    r"|/setup\.(?:ini|xz|zst|bz2)|/repo(?:\.info)?|/base/(?:pkg|src)list[^/]*)$")
_PACKAGE = re.compile(
    r"/([^/]+?)\.(?:u?deb|ddeb|dsc|debdelta|jigdo|template|d?rpm|apk|ipk|xbps|eopkg|hpkg|pkg|conda|whl|gem"
    r"|crate|snap|jar|war|pom|module|t(?:gz|xz|bz2?|lz)|pkg\.tar(?:\.\w+)?|gpkg\.tar"
    r"|(?:orig[\w.-]{0,64}\.|debian\.)?(?:tar|diff)\.(?:gz|xz|bz2|zst|lzo?|lz4|lzma|lrz|Z))")
_PLATFORM = re.compile(
    r"x86[-_]64|x86|i[3-6]86|amd64|arm64|armv\d\w*|aarch64|ppc64\w*|mips64\w*|riscv64|(?:linux|osx|win)-?(?:32|64)",
    re.I)
_VERSION = re.compile(r"[-_~@+.]v?\d")
_VERSIONLESS = re.compile(r"[/_.-](?:latest|current|nightly|daily)[_.-]", re.I)
_GO_MODULE = re.compile(r"/@v/v\d[^/]*\.(?:info|mod|zip)")


@memoize
def classify_name(key: str) -> NameClass:
    """The class of the name that a cache key holds; a signature has that of what it signs.

    >>> [classify_name("http://a" + path).value for path in ("/dists/x/by-hash/SHA256/" + "0" * 64,
    ...     "/pool/c/curl_7.88.1-10_amd64.deb", "/core.db.sig", "/jenkins_amd64.deb")]
    ['content-named', 'package', 'index', 'other']
    """
    path = "/" + key.partition("://")[2].partition("/")[2].partition("?")[0]
    path = urllib.parse.unquote(path, "latin-1")
    if _CONTROL.search(path) or max(map(len, path.split("/"))) > MAX_NAME:
        return NameClass.OTHER
    for _ in range(3):  # the signature of a checksum of a name
        if _CONTENT.search(path):
            return NameClass.CONTENT
        if _MOVING.search(path):
            return NameClass.INDEX
        path = _SIGNATURE.sub("", path)
    # Some apt repositories keep their pool below dists/.
    dists = "/dists/" in path and not path.endswith((".deb", ".udeb"))
    if dists or _INDEX_FOLDER.search(path) or _INDEX.search(path):
        return NameClass.INDEX
    name = path.rfind("/")
    package = _PACKAGE.fullmatch(path, name)
    versioned = package and _VERSION.search(_PLATFORM.sub("", package[1]))
    if versioned and not _VERSIONLESS.search(path, name) or _GO_MODULE.search(path):
        return NameClass.PACKAGE
    return NameClass.OTHER


_DIGEST = re.compile(
    r"/(?:by-hash/SHA(?:256|512)/|repodata/|(?:blobs|manifests)/sha256:)"
    r"([0-9a-f]{128}|[0-9a-f]{64})(?:-[^/]+)?$"
    r"|/objects/([0-9a-f]{2}/[0-9a-f]{62})\.(?:commit|dirtree|dirmeta)$")  # .filez: of what is in it
_EPOCH = re.compile(r"_\d+:(?=[^_]*_[^_]*deb)")  # apt writes it into names in /var/cache, mirrors don't


def digest_in_name(key: str) -> tuple[str, str] | None:
    """Algorithm and digest of the very body, where a content-named key holds one that nobody can forge.

    >>> digest_in_name("http://a/by-hash/SHA256/" + "0" * 64)[0]
    'sha256'
    """
    match = None if _SIGNATURE.search(key) else _DIGEST.search(urllib.parse.unquote(key, "latin-1"))
    if match is None or classify_name(key) is not NameClass.CONTENT:
        return None
    digest = (match[1] or match[2]).replace("/", "")
    return "sha256" if len(digest) == 64 else "sha512", digest


def shareable_name(key: str) -> str:
    """What a file is called on each mirror that has it: its digest, or a package's own name; "" for what
    may be another file in each folder."""
    digest = digest_in_name(key)
    name = urllib.parse.unquote(key.rpartition("/")[2], "latin-1")
    telling = len(name) > 5 and re.search(r"\d", name) and not _GO_MODULE.search(key)
    if digest is None and ("?" in key or not telling
                           or classify_name(key) not in (NameClass.PACKAGE, NameClass.CONTENT)):
        return ""
    return _EPOCH.sub("_", name) if digest is None else digest[1]


def mirror_prefixes(key: str, other: str) -> tuple[str, str]:
    """Two keys without the end that they have in common: two mirrors of one repository.

    >>> mirror_prefixes("http://a/x/pool/b_1.deb", "http://b/y/z/pool/b_1.deb")
    ('http://a/x', 'http://b/y/z')
    """
    one, two = key.split("/"), other.split("/")
    while min(len(one), len(two)) > 3 and one[-1] == two[-1]:
        del one[-1], two[-1]
    return "/".join(one), "/".join(two)


# Freshness (RFC 9111 §4.2) ------------------------------------------------------------------


def freshness_lifetime(head: ResponseHead) -> int | None:
    """Explicit freshness lifetime in a shared cache, in seconds; None where the origin gives none.

    >>> freshness_lifetime(ResponseHead(200, "", (("Cache-Control", "max-age=60, s-maxage=5"),)))
    5
    """
    control = cache_directives(head.fields)
    for name in ("s-maxage", "max-age"):
        if name in control:
            return parse_delta_seconds(control[name])
    if field_value(head.fields, "Expires") is None:
        return None
    end, start = parse_date(field_value(head.fields, "Expires")), parse_date(field_value(head.fields, "Date"))
    # §5.3: an invalid Expires, "0" above all, is in the past.  RFC 9110 §6.6.1: without a Date, ours.
    return 0 if end is None else max(0, int(end - (head.response_time if start is None else start)))


def heuristic_lifetime(head: ResponseHead, config: Config) -> int:
    """Seconds that a response of no known class and freshness is used for (RFC 9111 §4.2.2)."""
    html = (field_value(head.fields, "Content-Type") or "").lower().startswith(("text/html", "application/xhtml"))
    if not config.heuristics or validators(head) or html or "?" in head.key or head.key.endswith("/"):
        return 0
    return int(DAY)


def current_age(head: ResponseHead, now: float) -> int:
    """Age of a stored response in seconds (RFC 9111 §4.2.3).  Received in the future: nobody knows how old
    it is, so it is as old as can be; but clocks of several machines differ by a little."""
    stated = parse_date(field_value(head.fields, "Date"))
    apparent = 0.0 if stated is None else max(0.0, head.response_time - stated)
    ages = field_values(head.fields, "Age") or ["0"]
    # What is no age, or two, tells of a cache that can't be trusted: as old as can be (§5.1).
    age = parse_delta_seconds(ages[0]) if len(ages) == 1 and ages[0].isdigit() and head.response_time - now < 60 else 2**31
    corrected = age + max(0.0, head.response_time - head.request_time)
    return int(max(apparent, corrected) + max(0.0, now - head.response_time))


def with_age(head: ResponseHead, now: float) -> ResponseHead:
    """A stored response's head as it is served now (RFC 9111 §5.1)."""
    fields = without_fields(head.fields, ("accept-ranges", "age"))
    return replace_fields(head, fields=fields + (
        ("Accept-Ranges", "bytes"), ("Age", str(current_age(head, now)))))


def freshen_head(stored: ResponseHead, answer: ResponseHead) -> ResponseHead:
    """A stored head brought up to date by a 304 (RFC 9111 §3.2, §4.3.4)."""
    kept = ("content-length", "content-encoding", "content-range", "content-md5", "etag", "set-cookie")
    new = without_fields(end_to_end(answer.fields), kept)
    # The 304's Age counts, or that it has none (§4.2.3).
    fields = without_fields(stored.fields, ["age", *(name.lower() for name, _ in new)]) + new
    return replace_fields(stored, fields=fields, request_time=answer.request_time, response_time=answer.response_time)


def is_304_for(stored: ResponseHead, answer: ResponseHead) -> bool:
    """Whether a 304 speaks of the stored response (RFC 9111 §4.3.4).  With another ETag, or another date, it
    speaks of another: a mirror that compares dates says 304 to a captive portal's page of today, too."""
    tag, date = field_value(answer.fields, "ETag"), field_value(answer.fields, "Last-Modified")
    mine = field_value(stored.fields, "ETag")
    same_tag = tag is None or mine is not None and _weak(tag) == _weak(mine)
    return same_tag and date in (None, field_value(stored.fields, "Last-Modified") or date)


def why_not_storable(request: Request, head: ResponseHead, config: Config) -> str:
    """Why a response may not be stored (RFC 9111 §3), or "" where it may."""
    control, policy = cache_directives(head.fields), POLICIES[classify_name(request.key)]
    lifetime = freshness_lifetime(head) if policy.lifetime is None else 1
    of_use = validators(head) or (heuristic_lifetime(head, config) if lifetime is None else lifetime)
    reasons = (
        (request.method != "GET" or head.status != 200, "not a 200 to a GET"),
        ("no-store" in cache_directives(request.fields), "no-store"),
        ("no-store" in control and "must-understand" not in control, "no-store"),
        ("private" in control, "private"),
        ("*" in list_members(head.fields, "Vary"), "Vary: *"),
        (not is_shareable(request, head), "Authorization"),
        (not policy.html and "text/html" in media_type(head), "text/html for a package"),
        (not of_use, "neither fresh nor validated"))
    return next((reason for applies, reason in reasons if applies), "")


def _client_wants_validation(control: dict[str, str | None], policy: CachePolicy, age: int, ttl: float) -> bool:
    """Whether the client's directives want the origin asked (RFC 9111 §5.2.1)."""
    too_old = policy.heeds_max_age and "max-age" in control and age >= parse_delta_seconds(control["max-age"])
    too_short = "min-fresh" in control and ttl < parse_delta_seconds(control["min-fresh"])
    return "no-cache" in control or too_old or too_short


def _may_serve_stale(control: dict[str, str | None], stored: ResponseHead, ttl: float) -> bool:
    """Whether client or origin allow a stale answer without asking first (RFC 9111 §5.2.1.2, RFC 5861 §3)."""
    told = cache_directives(stored.fields)
    if {"must-revalidate", "proxy-revalidate", "no-cache", "s-maxage"} & set(told):
        return False
    patience = parse_delta_seconds(control["max-stale"] or str(2**31)) if "max-stale" in control else 0
    return -ttl < max(patience, parse_delta_seconds(told.get("stale-while-revalidate")))


def _decide_stored(request: Request, control: dict[str, str | None], stored: ResponseHead,
                   name_class: NameClass, config: Config, now: float) -> CacheDecision:
    policy, age = POLICIES[name_class], current_age(stored, now)
    lifetime: float | None = freshness_lifetime(stored) if policy.lifetime is None else policy.lifetime
    ttl = (heuristic_lifetime(stored, config) if lifetime is None else lifetime) - age
    known = None if math.isinf(ttl) else int(ttl)
    if not control and "no-cache" in list_members(request.fields, "Pragma"):  # §5.4
        control = {"no-cache": None}
    # §4.3.2: these two conditions are for the origin to decide.
    strict = any(field_value(request.fields, name) is not None for name in ("If-Match", "If-Unmodified-Since"))
    if strict or _client_wants_validation(control, policy, age, ttl):
        return CacheDecision(Action.VALIDATE, name_class, "request", known)
    if policy.lifetime is not None and ttl > 0:
        due = policy.refresh is not None and abs(now - stored.response_time) > policy.refresh  # clocks jump
        return CacheDecision(Action.SERVE, name_class, refresh=due)
    fresh = ttl > 0 and "no-cache" not in cache_directives(stored.fields)
    if fresh or policy.lifetime is None and _may_serve_stale(control, stored, ttl):
        return CacheDecision(Action.SERVE, name_class, ttl=known, refresh=not fresh)
    return CacheDecision(Action.VALIDATE, name_class, "stale", known)


def decide(request: Request, stored: ResponseHead | None, config: Config, now: float) -> CacheDecision:
    """The decision table: what to do with a request, given what is stored for it."""
    name_class = classify_name(request.key)
    if config.offline:
        usable = stored is not None and selecting_fields(request, stored) == stored.vary
        usable = usable and request.method in ("GET", "HEAD")
        return CacheDecision(Action.SERVE if usable else Action.REFUSE, name_class, "" if usable else "uri-miss")
    if any(pattern.search(request.uri) for pattern in config.filters):
        return CacheDecision(Action.PASS, name_class, "bypass")
    plain = request.method in ("GET", "HEAD")
    if not plain or request.length != 0:  # what a GET's body means is for the origin to say (RFC 9110 §9.3.1)
        return CacheDecision(Action.PASS, name_class, "bypass" if plain else "method")
    control = cache_directives(request.fields)
    if stored is None:
        decision = CacheDecision(Action.FETCH, name_class, "uri-miss")
    elif selecting_fields(request, stored) != stored.vary:
        decision = CacheDecision(Action.FETCH, name_class, "vary-miss")
    else:
        decision = _decide_stored(request, control, stored, name_class, config, now)
    decision = _passed_if_private(request, stored, decision)
    if decision.action is not Action.SERVE and "only-if-cached" in control:
        return replace_fields(decision, action=Action.REFUSE)
    if decision.action is Action.FETCH and (request.method == "HEAD" or "no-store" in control):
        return replace_fields(decision, action=Action.PASS)
    return decision


def may_serve_stale_on_error(decision: CacheDecision, stored: ResponseHead) -> bool:
    """Whether a stored response may answer where its origin can't be asked (RFC 9111 §4.2.4)."""
    strict = {"must-revalidate", "proxy-revalidate", "no-cache", "s-maxage"} & set(cache_directives(stored.fields))
    return decision.forward != "vary-miss" and (decision.policy.always_stale or not strict)


def replaces_stored(decision: CacheDecision, answer: ResponseHead) -> bool:
    """Whether an answer tells that the stored response is wrong; a captive portal's page does not."""
    portal = not decision.policy.html and "text/html" in media_type(answer)
    return decision.action is Action.VALIDATE and answer.status == 200 and not portal


def invalidated_keys(request: Request, answer: ResponseHead) -> list[str]:
    """What a method that changes things makes invalid: its target, and what the answer's Location and
    Content-Location name at the same origin (RFC 9111 §4.4)."""
    if request.method in ("GET", "HEAD", "OPTIONS", "TRACE") or answer.status >= 400:
        return []
    keys = [request.key]
    for name in ("Location", "Content-Location"):
        with contextlib.suppress(BadRequestError, ValueError):
            target = parse_target(urllib.parse.urljoin(request.target.uri, field_value(answer.fields, name) or ""))
            if (target.scheme, target.authority) == (request.target.scheme, request.target.authority):
                keys.append(cache_key(target))
    return keys


def detached_signatures(target: Target) -> list[Target]:
    """The detached signatures of an index, which must be of its generation."""
    suffixes = (".asc", ".sig", ".gpg", ".key") if "?" not in target.path else ()
    return [replace_fields(target, path=target.path + suffix) for suffix in suffixes]


def is_worth_full_download(request: Request, size_limit: int) -> bool:
    """Whether a request for a range is worth a whole download: open or long, from near the start."""
    ranges = parse_range(field_value(request.fields, "Range") or "", 2**60)
    if not ranges or len(ranges) > 1:
        return ranges is None
    start, stop = ranges[0]
    return start <= size_limit and stop - start >= size_limit


# ---------------------------------------------------------------------------------------------
# 4 Access rules: pure functions
# ---------------------------------------------------------------------------------------------

# Who may come in, what is never kept ----------------------------------------------------------

NETWORKS = {
    "loopback": ("127.0.0.0/8", "::1/128"),
    # RFC 1918, 6598 (carrier-grade NAT, VPNs), 3927; RFC 4193 and link-local for IPv6
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16",
                "fc00::/7", "fe80::/10"),
    "all": ("0.0.0.0/0", "::/0"),
}


def parse_networks(names: Iterable[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks behind set names and CIDR texts; ValueError says what is allowed."""
    try:
        return [ipaddress.ip_network(text) for name in names for text in NETWORKS.get(name, (name,))]
    except ValueError as error:
        raise ValueError("%s; write %s or 203.0.113.0/24" % (error, ", ".join(NETWORKS))) from None


def unmap_ipv4(text: str) -> str:
    """An address without its disguise as IPv6: what a dual-stack socket calls ::ffff:10.0.0.1."""
    return text[len("::ffff:"):] if text.startswith("::ffff:") and "." in text else text


def client_network(address: str) -> str:
    """What counts as one client where clients share something: an IPv4 address, or the /64 network of an IPv6
    address, because one host there has all its addresses to choose from.

    >>> client_network("10.0.0.1"), client_network("2001:db8::1%eth0") == client_network("2001:db8::ff:1")
    ('10.0.0.1', True)
    """
    text = address.partition("%")[0]
    return ipaddress.IPv6Address(text).packed[:8].hex() if ":" in text else text


@functools.lru_cache(LARGE_MEMO)
def is_client_allowed(address: str, allow: Iterable[str]) -> bool:
    """Whether a client's address is in the allowed networks.

    >>> [is_client_allowed(a, ("private",)) for a in ("::ffff:10.0.0.1", "fe80::1%eth0", "8.8.8.8")]
    [True, True, False]
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip  # however it is written
    return any(ip.version == network.version and ip in network for network in parse_networks(allow))


# IPv6 addresses that stand for an IPv4 one, and how far to the right that is written in bits:
# mapped and compatible (RFC 4291 §2.5.5), NAT64 (RFC 6052, 8215), 6to4 (RFC 3056)
_EMBEDDED = tuple((ipaddress.IPv6Network(network), shift) for network, shift in (
    ("::ffff:0:0/96", 0), ("::/96", 0), ("64:ff9b::/96", 0), ("64:ff9b:1::/48", 0), ("2002::/16", 80)))


def is_protected_address(address: str) -> bool:
    """Whether an address is of this host or its link alone, and not for clients from elsewhere: loopback,
    link-local, cloud metadata, unspecified, multicast, broadcast, in whatever disguise.

    >>> [is_protected_address(a) for a in ("127.9.9.9", "::ffff:169.254.169.254", "2002:7f00:1::", "10.0.0.1")]
    [True, True, True, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip.version == network.version and ip in network for network in _METADATA):
        return True
    if isinstance(ip, ipaddress.IPv6Address):
        own = ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast or ip.is_site_local
        inner = [ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF) for network, shift in _EMBEDDED
                 if ip in network]
        inner += ip.teredo or ()
        return own or any(is_protected_address(str(other)) for other in inner)
    zero = int(ip) >> 24 == 0 or int(ip) == 0xFFFFFFFF  # this network (RFC 1122 §3.2.1.3), broadcast
    return zero or ip.is_loopback or ip.is_link_local or ip.is_multicast


def is_numeric_host(host: str) -> bool:
    """Whether a host is an address, in whatever form C's inet_aton takes: 127.1, 0x7f000001."""
    return ":" in host or re.search(r"(?:^|\.)(?:\d+|0x[0-9a-f]*)\.?$", host) is not None


def is_own_name(name: str, names: tuple[str, ...]) -> bool:
    """Whether a name that a client calls us by is certainly ours, or one of ``names``.

    A web page of evil.example can read what this proxy answers to evil.example, if its name servers then
    say that this is the proxy's address (DNS rebinding).  That takes a name in the public DNS: no address is
    one, nor a name without a dot (docker's, a search domain's), nor a name below a private domain.

    >>> [is_own_name(n, ("a.example",)) for n in ("10.0.0.1", "proxy", "a.example", "evil.example")]
    [True, True, True, False]
    """
    private = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
    return "." not in name or is_numeric_host(name) or name.endswith(private) or name in names


def is_protected_host(host: str) -> bool:
    """Whether a host is guarded whatever its name servers say: an address, or localhost (RFC 6761 §6.3)."""
    if is_address(host):
        return is_protected_address(host)
    name = host.rstrip(".")
    return name == "localhost" or name.endswith(".localhost")


def _is_excepted(target: Target, entry: str) -> bool:
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(entry, strict=False)
        return is_address(target.host) and ipaddress.ip_address(target.host) in network
    name, port = re.fullmatch(r"\[?(.*?)\]?(?::(\d+))?", entry, re.S).groups()  # type: ignore[union-attr]
    name = name[1:] if name.startswith("*.") else name
    if port and int(port) != target.port:
        return False
    return name in ("*", target.host) or target.host.endswith(name if name.startswith(".") else "." + name)


def parent_proxy_for(target: Target, config: Config) -> ParentProxy | None:
    """The parent to ask for a target: none for this host and its link, nor for what no_proxy names: an
    address, a network, or a domain with all below it, each also with :port; or * for all."""
    if is_protected_host(target.host) or any(_is_excepted(target, entry) for entry in config.no_proxy if entry):
        return None
    return dict(config.parents).get(target.scheme)


# ---------------------------------------------------------------------------------------------
# 5 Store
# ---------------------------------------------------------------------------------------------

METADATA_FOLDER = ".pkgproxy"  # the bookkeeping folder below the root: heads and partials
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# O_NONBLOCK: a FIFO would hang open().  O_NOFOLLOW: bodies are no links, least of all out of the root.
_REGULAR = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | _FLAGS
_WRITABLE = os.O_RDWR | os.O_CREAT | _REGULAR
_NAME_REFUSED = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
_NO_STAT = os.stat_result((0,) * 10)
MIN_RESUMABLE_SIZE = 256 * 1024  # bytes: a smaller download is begun anew, and costs no head of its own
FLUSH_INTERVAL = 0.5  # seconds, where another machine may read a partial as it grows
_REMOTE = ("nfs", "cifs", "smb", "ceph", "fuse.", "9p", "virtiofs", "lustre", "glusterfs", "afs")
_MAX_NAMES = 1024 * 1024  # bytes in a file of names: 10,000 of them, and 256 files, are 2 million
_RECENT_BUCKET = "recent"  # the file of names that none of those has yet
_MAX_RECENT = 64 * 1024  # bytes in it, which every miss looks through
_COMPLETE_MARK = "whole-256"  # says that they were made from all that is stored
_MAX_HEAD_FILE = 16 * MAX_HEAD  # bytes: two heads, escaped; a larger file is none of ours


@dataclasses.dataclass(frozen=True)
class StoredResponse:
    """A stored response: an open body, and the head that describes just this body."""

    file: io.FileIO  # whoever holds the Stored closes it
    head: ResponseHead  # size and mtime_ns are the open body's
    name: str  # below the root
    described: bool  # False: no head on disk, only what the file itself tells

    def fileno(self) -> int:
        """The body's descriptor."""
        return self.file.fileno()

    def read_at(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes from ``offset``; OSError."""
        self.file.seek(offset)
        return self.file.read(size) or b""

    def close(self) -> None:
        """Close the body."""
        self.file.close()


def _private_opener(path: str, flags: int) -> int:
    """For open(): whatever the umask, nobody else writes; and what is no file makes nobody wait."""
    return os.open(path, flags | _REGULAR, 0o644)


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write data to its end; OSError (disk full …)."""
    left = memoryview(data)
    while left:
        left = left[file.write(left):]


def make_directory(path: str) -> None:
    """Make a folder and those above it, for us alone to write; OSError."""
    for last in (False, False, True):
        missing, folder = [], path
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        try:
            for folder in reversed(missing):
                with contextlib.suppress(FileExistsError):  # another thread was quicker, or it is a file
                    os.mkdir(folder, 0o755)
            return
        except FileNotFoundError:  # somebody has just removed what was there: a cleaning rm -rf
            if last:
                raise


def _open(path: str) -> tuple[io.FileIO | None, os.stat_result]:
    """Open a body; None where there is none."""
    try:
        descriptor = os.open(path, _REGULAR)
    except (OSError, ValueError):
        return None, _NO_STAT
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode):
        return io.FileIO(descriptor, "rb"), info
    os.close(descriptor)  # a folder, a FIFO: litter in the place of a body
    return None, _NO_STAT


def try_lock_file(file: io.FileIO) -> bool:
    """Lock a file against other processes (invariant 2), for as long as it is open; False where one has it,
    OSError."""
    if fcntl is not None:
        try:
            # flock, not lockf: that one is lost when any descriptor of the file is closed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def why_locks_fail(folder: str) -> str:
    """Why files in a folder can't be locked against other processes; "" where they can, or where nothing can
    be written anyway."""
    path = os.path.join(folder, "lock-" + secrets.token_hex(8))
    reason = "" if fcntl is not None else "this system has no flock"
    with contextlib.suppress(OSError):
        if not reason:
            make_directory(folder)
            with io.FileIO(path, "x+b") as one, io.FileIO(path, "r+b") as two:
                os.unlink(path)
                try:
                    reason = "its file system ignores locks" if try_lock_file(one) and try_lock_file(two) else ""
                except OSError as error:
                    reason = "its file system refuses locks (%s)" % error.strerror
            os.rmdir(folder)  # unless it is in use
    return reason


def is_remote(path: str) -> bool:
    """Whether a folder lies on a disk that other machines write too, as far as Linux tells."""
    with contextlib.suppress(OSError, IndexError), open("/proc/self/mountinfo", encoding="utf-8",
                                                        errors="replace") as file:
        device = os.stat(path).st_dev
        name = "%d:%d" % (os.major(device), os.minor(device))
        kinds = [line.rpartition(" - ")[2].split()[0] for line in file if line.split()[2] == name]
        return bool(kinds) and kinds[-1].startswith(_REMOTE)
    return False


def _head_from(row: dict[str, Any]) -> ResponseHead:
    """A head from its JSON; ValueError, TypeError or KeyError where somebody damaged it."""
    for name in ("fields", "vary"):
        row[name] = tuple((field, text) for field, text in row[name])
        if not all(isinstance(part, str) for pair in row[name] for part in pair):
            raise ValueError("a damaged field")
        parse_fields(["%s: %s" % pair for pair in row[name]])
    head = ResponseHead(**row)
    texts = (head.reason, head.key, head.final_uri, head.same_as)
    numbers = (head.request_time, head.response_time, head.size, head.mtime_ns)
    if not (head.status == 200 and all(isinstance(text, str) and not _CONTROL.search(text) for text in texts)
            and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)):
        raise ValueError("a damaged head")
    return head


@functools.lru_cache(LARGE_MEMO)
def _parsed_heads(path: str, *_identity: int) -> tuple[ResponseHead, ...]:
    """The heads in a head file of this identity, which is only ever replaced; OSError, ValueError …"""
    with open(path, "rb", opener=_private_opener) as file:
        return tuple(_head_from(row) for row in json.loads(file.read(_MAX_HEAD_FILE)))


def _read_heads(path: str) -> tuple[ResponseHead, ...]:
    """The heads in a head file; none where it is missing, damaged or no file (a FIFO, say)."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            return ()
        read = _parsed_heads if info.st_size <= MAX_MEMOIZED_HEAD else _parsed_heads.__wrapped__
        return read(path, info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return ()


def replace_file(path: str, text: str) -> None:
    """Replace a file of the bookkeeping; OSError.  Another instance may do so at the same time."""
    make_directory(os.path.dirname(path))
    new = "%s^%s" % (path, secrets.token_hex(4))
    try:
        with io.FileIO(new, "wb", opener=_private_opener) as file:
            write_all(file, text.encode())
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def _write_heads(path: str, heads: list[ResponseHead]) -> None:
    replace_file(path, json.dumps([vars(head) for head in heads], ensure_ascii=False))


def size_on_disk(info: os.stat_result) -> int:
    """Bytes that a file takes: whole blocks, but no less than its size where they are allocated later."""
    return max(info.st_size, getattr(info, "st_blocks", 0) * 512)


def inodes_for(key: str) -> int:
    """Inodes that are needed at most to store a response under a cache key: two files, and their folders."""
    return 2 * key.count("/") + 4 if key else 0


def head_size(head: ResponseHead) -> int:
    """About as many bytes as a head takes, with its folders where they are deeper than most, which exist."""
    fields = sum(len(name) + len(text) for name, text in head.fields)
    return fields + BLOCK * max(2, inodes_for(head.key) - 24)


class RefCountedFile:
    """An open file; the last of its users closes it."""

    def __init__(self, path: str, file: io.FileIO) -> None:
        self.path = path
        self._file = file
        self._unlink_on_close = False  # whether its name is ours alone, and shall go with it
        self._lock = threading.Lock()  # guards _users
        self._refcount = 1  # the writer, and whoever reads

    def fileno(self) -> int:
        """Its file's descriptor."""
        return self._file.fileno()

    def read_at(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, without moving anybody's position."""
        if hasattr(os, "pread"):
            return os.pread(self.fileno(), size, offset)
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def has_readers(self) -> bool:
        """Whether anybody but the writer uses it."""
        return self.reader_count() > 0

    def reader_count(self) -> int:
        """How many use it beside the writer."""
        with self._lock:
            return max(0, self._refcount - 1)

    def acquire(self) -> bool:
        """One user more; False if it is closed already."""
        with self._lock:
            self._refcount += 1 if self._refcount else 0
            return self._refcount > 0

    def release(self) -> None:
        """One user less; the last closes the file."""
        with self._lock:
            self._refcount -= 1
            last = self._refcount == 0
        if last:
            self._file.close()
            if self._unlink_on_close:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    os.unlink(self.path)


class PartialFile(RefCountedFile):
    """An incomplete response (RFC 9111 §3.3): written by one, read by many while it grows.

    It ends once, in commit(), keep() or discard(); whoever reads it reads on.
    Between instances, the lock on its file says who leads; one that has an ``owner`` is locked by its name,
    which no other instance uses.  Its head file names the file that it describes by its inode.
    """

    def __init__(self, store: Store, key: str, owner: str, path: str, file: io.FileIO) -> None:
        super().__init__(path, file)
        self.head = ResponseHead(0, "", (), key)  # of the live response, as it will be stored, or of what is left
        self.length: int | None = None  # declared
        self.owner = owner
        self.size = 0  # bytes written, or left and good to go on with
        self._store = store
        self._writer_is_local = True  # whether another instance that writes it is on this machine
        self._writer_left = False  # whether that one has left it
        self._published_at = 0.0  # monotonic time of the last word to other instances
        self._checked = 0  # the size up to which space is known to be free

    def start(self, head: ResponseHead, length: int | None, offset: int = 0) -> None:
        """Begin to write a response of ``length`` bytes (None: unknown), or go on at ``offset``;
        LocalFailure."""
        self.head, self.length, self.size = head, length, offset
        try:
            self._checked = self._store.space.reserve(self, 1 if length is None else length - offset)
            found = os.fstat(self.fileno()).st_size
            if found < offset:
                raise OSError(errno.ESTALE, "the partial was cut")
            if not offset:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + "^head")
                if found and not self.owner:
                    self._replace_file()
            self._file.truncate(offset)
            self._file.seek(offset)
        except OSError as error:
            self._store.space.release(self)
            raise StorageError(error) from error

    def _replace_file(self) -> None:
        """Who reads what was left reads on: the new one gets a file of its own, locked before it is seen."""
        if not self.still_exists():
            raise OSError(errno.ESTALE, "somebody removed the partial")
        new = "%s^%s" % (self.path, secrets.token_hex(8))  # never a file that another instance writes
        file = io.FileIO(os.open(new, _WRITABLE | os.O_EXCL, 0o644), "r+b")
        try:
            try_lock_file(file)
            self._file.close()
            os.replace(new, self.path)
        finally:
            self._file = file

    def write(self, data: bytes) -> int:
        """Append all of ``data``; OSError (disk full …) comes through."""
        if self.size + len(data) > self._checked:
            self._checked = self._store.space.reserve(self, len(data))
        write_all(self._file, data)
        self.size += len(data)
        return len(data)

    def publish(self) -> None:
        """Let other instances read what has been written so far.  On another machine's disk they may see it
        in another order than we write it: there what they may read is flushed first; OSError."""
        now = time.monotonic()
        if not self._published_at or self._store.remote and now - self._published_at > FLUSH_INTERVAL:
            self._published_at = now
            if self._store.remote:
                os.fsync(self.fileno())
            self._write_metadata(self._store.boot)

    def commit(self) -> None:
        """Flush to disk, then give the body its place and its head (invariant 1); or LocalFailure."""
        try:
            os.fsync(self.fileno())
            if not self.still_exists():
                raise OSError(errno.ENOENT, "somebody removed the partial")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + "^head")
            linked = self._store.commit(self)
            if linked and not self.still_exists():  # another instance spoiled it meanwhile
                self.delete_stored()
                raise OSError(errno.ENOENT, "somebody removed the partial")
        except OSError as error:
            self.discard()
            raise StorageError(error) from error
        if linked:
            with contextlib.suppress(OSError):  # Windows removes no open file
                os.unlink(self.path)
        self._unlink_on_close = bool(self.owner)
        self.unlock()

    def keep_for_resume(self) -> None:
        """Leave it for a later request to go on with (DESIGN §6.7), where it can be told what it is of."""
        try:
            if self.size < MIN_RESUMABLE_SIZE or strong_validator(self.head) is None or not self.still_exists():
                raise OSError("not worth it")
            if os.fstat(self.fileno()).st_size != self.size:
                raise OSError("not what was received")
            os.fsync(self.fileno())
            self._write_metadata("")
        except OSError:
            self.discard(cut=self.size >= MIN_RESUMABLE_SIZE)
        self.unlock()

    def discard(self, cut: bool = False) -> None:
        """Forget the file.  Its readers read on.  Its writer may also ``cut`` it, so that slow readers do not
        keep its space: they go on from the origin."""
        self._store.space.release(self, kept=False)
        self._published_at = math.inf
        with contextlib.suppress(OSError, ValueError):
            if cut:
                self._file.truncate(0)
            if self.still_exists():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + "^head")
                os.unlink(self.path)
        self._unlink_on_close = bool(self.owner)
        self.unlock()

    def delete_stored(self) -> None:
        """Remove what is stored under its key: it is no longer right."""
        self._store.delete(self.head.key)

    # What other instances write

    def try_lock(self) -> bool:
        """Whether nobody else writes it any more, so that we may; OSError."""
        return try_lock_file(self._file)

    def load_metadata(self) -> bool:
        """What another instance has told of what it writes; False where that is nothing yet."""
        with contextlib.suppress(OSError), open(self.path, "rb", opener=_private_opener):
            pass  # so NFS looks anew
        # An empty file may have the inode number of a removed one, whose head file is still there.
        size = os.fstat(self.fileno()).st_size
        head = self._read_metadata() if size else None
        if head is None:
            return False
        self._writer_left = not head.boot_id
        self._writer_is_local = head.boot_id == self._store.boot
        self.head = replace_fields(head, boot_id="", flushed_size=-1, mtime_ns=0)
        self.length = None if head.size < 0 else head.size
        self.size = size if self._writer_is_local else min(size, max(0, head.flushed_size))
        return True

    def refresh_size(self) -> None:
        """See how far the other instance has come; OSError."""
        if self._writer_is_local:
            self.size = os.fstat(self.fileno()).st_size
        else:
            self.load_metadata()

    def copy_from(self, old: PartialFile) -> None:
        """Take over the bytes of an instance that may not be quite dead into this file, which is ours alone;
        OSError."""
        while self.size < old.size:
            data = old.read_at(min(COPY_SIZE, old.size - self.size), self.size)
            if not data:
                raise OSError(errno.EIO, "the partial was cut")
            self.write(data)
        self.head, self.length = old.head, old.length

    def switch_to(self, other: PartialFile | StoredResponse) -> None:
        """Let whoever reads this read on in another file of the same bytes; OSError."""
        os.dup2(other.fileno(), self.fileno(), inheritable=False)
        if isinstance(other, PartialFile):
            self.path, self.owner, self.size, self._writer_is_local = other.path, other.owner, other.size, other._writer_is_local
            other.release()
        else:
            self.size = other.head.size

    def is_abandoned(self) -> bool:
        """Whether it was left, or nobody has written it for a while; OSError."""
        return self._writer_left or time.time() - os.fstat(self.fileno()).st_mtime > MIN_EVICTION_AGE

    # Inside

    def _write_metadata(self, boot: str) -> None:
        """Write down what it is of, and in which ``boot`` it is being written, "" once it is on the disk:
        after a power cut a file may be longer than what has reached the disk of it; OSError."""
        _write_heads(self.path + "^head", [replace_fields(
            self.head, size=-1 if self.length is None else self.length, boot_id=boot, mtime_ns=self._inode(),
            flushed_size=self.size if self._store.remote or not boot else -1)])

    def _read_metadata(self) -> ResponseHead | None:
        """What its head file says of just this file."""
        heads = _read_heads(self.path + "^head")
        with contextlib.suppress(OSError):
            if heads and [(head.key, head.mtime_ns) for head in heads] == [(self.head.key, self._inode())]:
                return heads[0] if self.still_exists() else None
        return None

    def _inode(self) -> int:
        """The name that its head file knows it by."""
        return os.fstat(self.fileno()).st_ino

    def still_exists(self) -> bool:
        """Whether the file that has its name is still the one that is open; OSError."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fileno()))
        except FileNotFoundError:
            return False

    def is_stored_as(self, stored: StoredResponse) -> bool:
        """Whether it has landed, as this body; then all of it may be read."""
        if os.path.samestat(os.fstat(stored.fileno()), os.fstat(self.fileno())):
            self.size = stored.head.size
            return True
        return self.size == self.length

    def unlock(self) -> None:
        """Others need not wait until the last of our clients has read it."""
        self._store.space.release(self)
        if fcntl is not None and not self.owner:
            with contextlib.suppress(OSError, ValueError):
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _close(stored: StoredResponse | None) -> None:
    if stored is not None:
        stored.close()


def _save_access_time(path: str, last: float) -> None:
    """Write the time of a file's last use into its inode, not into that of one which replaces it now."""
    with contextlib.suppress(OSError), open(path, "rb", opener=_private_opener) as file:
        target = file.fileno() if os.utime in os.supports_fd else path
        os.utime(target, ns=(int(last * 10**9), os.fstat(file.fileno()).st_mtime_ns))


def _remove_old(path: str, before: float) -> None:
    """Remove a file of our books that nobody has written since ``before``."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_mtime < before:
            os.unlink(path)


def _rename(path: str, place: str) -> None:
    try:
        os.replace(path, place)
    except PermissionError:
        if os.name != "nt":
            raise
        # Windows renames no open file, and every reply from a partial holds it open.
        new = os.path.join(os.path.dirname(place), "^" + os.path.basename(path))
        shutil.copy2(path, new)
        os.replace(new, place)


def _describes(head: ResponseHead, info: os.stat_result) -> bool:
    """Whether a head names this body.  Where a copy lost the fraction of the time, its second counts."""
    if head.size != info.st_size:
        return False
    same = head.mtime_ns == info.st_mtime_ns
    return same or info.st_mtime_ns % 10**9 == 0 and head.mtime_ns // 10**9 == info.st_mtime_ns // 10**9


def _bare_head(key: str, info: os.stat_result) -> ResponseHead:
    fields = (("Content-Type", "application/octet-stream"), ("Last-Modified", format_http_date(info.st_mtime)))
    return ResponseHead(200, "OK", fields, key, key, response_time=info.st_mtime, request_time=info.st_mtime,
                size=info.st_size, mtime_ns=info.st_mtime_ns)


def boot_id() -> str:
    """A name of this start of the machine, without hyphens.  The systemd unit hides the kernel's file, and
    passes the same name as %b.  Where the system tells none, one of this process: then what a crash left is
    not trusted, whatever crashed."""
    known = os.environ.get("PKGPROXY_BOOT_ID", "")
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        known = file.read()
    return known.strip().replace("-", "").lower() or secrets.token_hex(16)


def matches_digest_in_name(key: str, body: StoredResponse | PartialFile) -> bool:
    """Whether a body is what its name says, where that holds a digest of it; LocalFailure."""
    digest = digest_in_name(key)
    if digest is None:
        return True
    found, offset = hashlib.new(digest[0]), 0
    try:
        while data := body.read_at(COPY_SIZE, offset):
            found.update(data)
            offset += len(data)
    except OSError as error:
        raise StorageError(error) from error
    return found.hexdigest() == digest[1]


class NameIndex:
    """Where the files lie that mirrors call by one name: lines of a name's digest and a place, a cache key or
    a path.  New ones come into one file; whoever sweeps spreads them over 256, so that 200,000 are 70 KB
    each.  What is lost, or outdated, costs a download at most; it is looked through when it is asked.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def add(self, name: str, place: str) -> None:
        """A file of this name lies there."""
        with contextlib.suppress(OSError):
            self._add(self._folder, {_RECENT_BUCKET: [self._line(name, place)]})

    def lookup(self, name: str) -> list[str]:
        """The places of a name, the newest first."""
        start, lines, found = b"\n" + self._line(name, "")[:-1], b"\n", []
        for bucket in (start[1:3].decode(), _RECENT_BUCKET):
            with contextlib.suppress(OSError):
                lines += self._read(os.path.join(self._folder, bucket))
        at = lines.find(start)
        while at >= 0 and (end := lines.find(b"\n", at + 1)) >= 0:
            found.append(lines[at + len(start):end])
            at = lines.find(start, end)
        places = [place.decode("utf-8", "surrogateescape") for place in reversed(found)]
        return list(dict.fromkeys(places))[:MAX_CANDIDATES]

    def compact(self) -> None:
        """Give what is new its place, and what somebody died over.  What another process adds in this moment
        may be lost."""
        path = os.path.join(self._folder, _RECENT_BUCKET)
        own = "%s^%s" % (path, secrets.token_hex(4))
        with contextlib.suppress(OSError):
            os.rename(path, own)
        for left in glob.glob(glob.escape(path) + "^*"):
            with contextlib.suppress(OSError):
                if left != own and time.time() - os.stat(left).st_mtime < MIN_EVICTION_AGE:
                    continue  # somebody is at it
                lines = self._read(left).splitlines(keepends=True)
                self._add(self._folder, self._by_bucket(
                    line for line in lines if re.match(rb"[0-9a-f]{18} .*\n", line)))
                os.unlink(left)

    def is_complete(self) -> bool:
        """Whether it was ever made from all that is stored."""
        return os.path.exists(os.path.join(self._folder, _COMPLETE_MARK))

    def rebuild(self, entries: Iterable[tuple[str, str]]) -> None:
        """Replace all of it: names and places; OSError."""
        new = "%s^%s" % (self._folder, secrets.token_hex(4))
        rows = iter(entries)
        try:
            while part := list(itertools.islice(rows, 100_000)):
                self._add(new, self._by_bucket(self._line(name, place) for name, place in part))
            self._add(new, {_COMPLETE_MARK: [b""]})
            shutil.rmtree(self._folder, ignore_errors=True)
            os.rename(new, self._folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def record_comparison(self, mirrors: tuple[str, str], same: bool) -> None:
        """Two mirrors had, or had not, the same file under one name."""
        with contextlib.suppress(OSError):
            if same:
                self._add(self._folder, {self._pair(mirrors): [b"+"]})
            else:
                os.unlink(os.path.join(self._folder, self._pair(mirrors)))

    def are_mirrors(self, mirrors: tuple[str, str]) -> bool:
        """Whether two mirrors have always had the same files lately."""
        with contextlib.suppress(OSError):
            return os.path.getsize(os.path.join(self._folder, self._pair(mirrors))) >= MIN_MATCHING_FILES
        return False

    def _line(self, name: str, place: str) -> bytes:
        digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
        return ("%s %s\n" % (digest[:18], place)).encode("utf-8", "surrogateescape")

    def _read(self, path: str) -> bytes:
        """A file of names; OSError.  Its size is asked first: to make room for the largest takes longer."""
        with io.FileIO(path, "rb", opener=_private_opener) as file:
            return file.read(min(os.fstat(file.fileno()).st_size, 4 * _MAX_NAMES)) or b""

    def _by_bucket(self, lines: Iterable[bytes]) -> dict[str, list[bytes]]:
        """Lines by the file that each belongs to."""
        found: dict[str, list[bytes]] = {}
        for line in lines:
            found.setdefault(line[:2].decode(), []).append(line)
        return found

    def _pair(self, mirrors: tuple[str, str]) -> str:
        return "mirrors-" + hashlib.sha256(" ".join(sorted(mirrors)).encode("utf-8", "replace")).hexdigest()

    def _add(self, folder: str, lines: dict[str, list[bytes]]) -> None:
        """Append lines to files; one that grows too long loses its older half; OSError."""
        make_directory(folder)
        for bucket, more in lines.items():
            path = os.path.join(folder, bucket)
            with io.FileIO(path, "ab", opener=_private_opener) as file:
                write_all(file, b"".join(more))
                full = file.tell() > (_MAX_RECENT if bucket == _RECENT_BUCKET else _MAX_NAMES)
            if full and bucket == _RECENT_BUCKET:
                self.compact()
            elif full:
                with open(path, "rb", opener=_private_opener) as file:
                    kept = file.read()[-_MAX_NAMES // 2:].partition(b"\n")[2]
                new = "%s^%s" % (path, secrets.token_hex(4))
                with open(new, "wb", opener=_private_opener) as file:
                    file.write(kept)
                os.replace(new, path)


def adoptable_packages(folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and paths of the packages in folders that are the user's own.  Links are not followed."""
    for top in folders:
        for folder, below, files in os.walk(top):
            below[:] = [name for name in below if name != METADATA_FOLDER]
            for path in (os.path.join(folder, file) for file in files):
                below_top = os.path.relpath(path, top).replace(os.sep, "/")
                # A % stays: apt and others write %3a where a URL would have it.
                name = shareable_name("http://a/" + urllib.parse.quote(os.fsencode(below_top), "/%:+~"))
                if name and "\n" not in path:
                    yield name, path


def _body_names(key: str) -> list[str]:
    """Where a cache key's body may lie, the place to prefer first, the hashed one last."""
    return [name for name in cache_file_names(key, os.name == "nt") if name is not None]


class Space:
    """Decides whether downloads may use more disk space: what the file system has free, less a reserve, in
    bytes and in inodes, and what --max-size leaves.  A download of a declared length reserves all of it, any
    other SPACE_STEP bytes at a time.  For Partial: reserve, release; for Janitor: take, correct.
    """

    def __init__(self, free: Callable[[], tuple[int, int]], max_size: int | None) -> None:
        self.scarce = threading.Event()  # set when something has to be evicted
        self._free = free  # bytes and inodes that may be used; OSError
        self._max_size = max_size
        self._lock = threading.Lock()  # guards all below
        # The size that each download may reach, and the bytes of its head and folders when it is stored.
        self._running: weakref.WeakKeyDictionary[PartialFile, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._stored = 0  # bytes below the root, without running downloads, as far as is known
        self._needed = 0  # free bytes that refused downloads needed, or the next one is likely to need
        self._spare = 0  # free bytes that eviction aims at
        self._outgrown: dict[str, int] = {}  # by key: a size that did not fit, of bodies that declare none

    def reserve(self, partial: PartialFile, count: int) -> int:
        """Let a download write ``count`` bytes more; return the size up to which it may be written before it
        has to ask again; OSError (ENOSPC)."""
        free, inodes = self._free()
        with self._lock:
            size = partial.size
            end, overhead = self._running.get(partial, (-1, head_size(partial.head)))
            self._stored -= size if end < 0 else 0
            if self._max_size is not None:
                free = min(free, self._max_size - self._stored - sum(one.size for one in self._running))
            if end < 0 and partial.length is None:  # a client that was cut off then gets all of it now
                count = max(count, self._outgrown.pop(partial.head.key, 0))
            needed = count
            if size + count > end:  # else the others were granted what that left
                needed += overhead + sum(max(0, other - one.size) + more for one, (other, more)
                                         in self._running.items() if one is not partial)
            likely = min(count, MAX_SPARE, 5 * self._spare)  # the next download is often as large
            room, enough = free - needed, end >= 0 or inodes >= inodes_for(partial.head.key)
            if room < max(0, likely, self._spare // 2) or not enough:
                self.scarce.set()
                wanted = likely if room >= 0 else needed
                self._needed = max(self._needed, wanted if wanted <= (self._max_size or wanted) else 0)
            if room >= 0 and enough:
                ahead = 0 if partial.length is not None else min(room, max(0, SPACE_STEP - count))
                self._running[partial] = max(end, size + count + ahead), overhead
                return min(self._running[partial][0], size + SPACE_STEP)
            if partial.length is None and len(self._outgrown) < LARGE_MEMO:
                self._outgrown[partial.head.key] = size + count
        raise OSError(errno.ENOSPC, "not enough free %s" % (
            "space for %d bytes" % count if room < 0 else "inodes"))

    def release(self, partial: PartialFile, kept: bool = True) -> None:
        """A download has ended; whether what it has written is ``kept``."""
        with self._lock:
            mine = self._running.pop(partial, None)
            if mine is not None and kept:
                self._stored += partial.size + mine[1]

    def take(self) -> tuple[int, int]:
        """Bytes below the root, as far as is known; free bytes that were needed since the last call."""
        with self._lock:
            needed, self._needed = self._needed, 0
            return self._stored + sum(one.size for one in self._running), needed

    def correct(self, difference: int, spare: int) -> None:
        """Correct the known size by what counting has shown, and set what eviction aims at."""
        with self._lock:
            self._stored += difference
            self._spare = spare


class Store:
    """Stored responses below ``root``.  The file system is the truth; there is no index.

    For the caller: lookup, share, freshen, forget.  For Partial: place.  For Partials and Janitor: the rest.
    """

    def __init__(self, root: str, trust_bare: bool = True, min_free: int | None = None,
                 max_size: int | None = None) -> None:
        self.root = os.path.abspath(root)
        self._top = os.path.join(self.root, "")
        self.boot = boot_id()
        self._min_free = min_free  # bytes
        self.space = Space(lambda: (self.free_space(), self.free_inodes()), max_size)
        self._lock = threading.Lock()  # guards _used
        self._used: dict[str, float] = {}  # by name: clock time of the last use since the last sweep
        self._places = memoize(self._find_places)
        self.metadata_folder = os.path.join(self.root, METADATA_FOLDER)
        self.names = NameIndex(os.path.join(self.metadata_folder, "names"))  # of what is stored: common names, cache keys
        self.adopted = NameIndex(os.path.join(self.metadata_folder, "adopted"))  # of what is not ours: paths
        self.remote = is_remote(self.root)
        self._trust_bare = trust_bare  # whether the root is ours alone, so that a bare body is one of ours

    def lookup(self, key: str) -> StoredResponse | None:
        """The stored response for a cache key, opened; None where there is none that may be used.

        A body that no head describes is used if its name says what it is (content-named, package):
        people copy and rsync such files, and may lose the bookkeeping folder; but not where the root
        may hold anything (trust_bare).  A body that contradicts its head was changed by hand.
        """
        bare = None
        for name, path, head_path in self._places(key):
            file, info = _open(path)
            if file is None:
                continue
            heads = _read_heads(head_path)
            for head in heads:
                if head.key == key and _describes(head, info):
                    _close(bare)
                    with self._lock:
                        self._used[name] = time.time()
                    if head.mtime_ns != info.st_mtime_ns:
                        head = replace_fields(head, mtime_ns=info.st_mtime_ns)
                    return StoredResponse(file, head, name, True)
            fixed = classify_name(key) in (NameClass.CONTENT, NameClass.PACKAGE)
            if self._trust_bare and fixed and not (heads or bare) and self._is_exact(name):
                bare = StoredResponse(file, _bare_head(key, info), name, False)
            else:
                file.close()
        return bare

    def _is_exact(self, name: str) -> bool:
        """Whether a name is on the disk to the letter.  File systems that ignore case, or know short names,
        open another file as well; only its head, which is missing here, would tell."""
        folder = self.root
        with contextlib.suppress(OSError):
            for part in name.split("/"):
                other = os.path.join(folder, part.swapcase())
                if os.path.lexists(other) and part not in os.listdir(folder):
                    return False
                folder = os.path.join(folder, part)
            return True
        return False

    def _find_places(self, key: str) -> list[tuple[str, str, str]]:
        """Where a cache key's body may lie: its names, with their paths and those of their heads."""
        return [(name, self.body_path(name), self.head_path(name)) for name in _body_names(key)]

    def commit(self, partial: PartialFile) -> bool:
        """Give a complete body its natural name, or where that is taken its hashed one; OSError.  Whether
        the partial still has its old name, too.

        The head goes first, into a file that keeps the previous body's head beside the new one's, so
        that at each moment the visible body has a head that describes it, and a reader between the
        two steps, or a crash, mixes nothing.
        """
        modified = parse_date(field_value(partial.head.fields, "Last-Modified"))
        if modified is None or not 0 <= modified < 2**33:
            modified = partial.head.response_time
        # People see the origin's second; the fraction tells two bodies of one second apart.
        mtime_ns = int(modified) * 10**9 + time.time_ns() // 1000 % 10**6 * 1000
        by_descriptor = os.utime in os.supports_fd
        os.utime(partial.fileno() if by_descriptor else partial.path, ns=(time.time_ns(), mtime_ns))
        info = os.fstat(partial.fileno())  # file systems keep times more or less fine
        if info.st_size != partial.size or partial.length not in (None, partial.size):
            raise OSError(errno.EIO, "the partial has %d bytes, not the %d received of %s" % (
                info.st_size, partial.size, partial.length))
        head = replace_fields(partial.head, size=partial.size, mtime_ns=info.st_mtime_ns)
        return self._settle(partial.path, partial, head, may_move=True)

    def link(self, twin: StoredResponse) -> None:
        """Let a body that is stored already be found under its head's key as well: one file, two names;
        OSError where the file system has no such thing, or the body is not ours."""
        if not twin.described:
            raise OSError(errno.EPERM, "it is not ours")
        make_directory(os.path.join(self.metadata_folder, "partials"))
        self._settle(self.body_path(twin.name), twin, twin.head, may_move=False)

    def _settle(self, path: str, file: StoredResponse | PartialFile, head: ResponseHead, may_move: bool) -> bool:
        """Give an open file its place, and return whether it keeps ``path`` as well; OSError.

        Another instance may replace ``path`` at any time.  So the file first gets a name that nobody else
        uses, and is compared with the open one under that.  That name is a link, because while ``path``
        exists no other instance begins the same download.  Where links fail, a file that ``may_move`` is
        renamed."""
        own, linked = os.path.join(self.metadata_folder, "partials", "own^" + secrets.token_hex(8)), True
        try:
            os.link(path, own)
        except OSError:
            if not may_move:
                raise
            if os.name == "nt":
                own = path  # Windows neither renames nor removes an open file
            else:
                os.rename(path, own)
                linked = False
        try:
            if os.path.samestat(os.lstat(own), os.fstat(file.fileno())):
                self._publish(own, head)
                return linked
            if not linked:
                os.replace(own, path)  # it belongs to another instance's download
            raise OSError(errno.ESTALE, "it has been replaced")
        finally:
            with contextlib.suppress(OSError):  # rename() does nothing if both names are of one file
                os.unlink(own)

    def _publish(self, path: str, head: ResponseHead) -> None:
        """Give a file its place by its head's key; OSError."""
        *natural, hashed = _body_names(head.key)
        if shareable_name(head.key):
            self.names.add(shareable_name(head.key), head.key)
        for name in natural:
            taken, old = self._look(name, head.key)
            if (old or not taken) and self._rename_into_place(path, name, head, old):  # else somebody's (invariant 11)
                self.delete_file(hashed, head.key)
                return
        if not self._rename_into_place(path, hashed, head, self.head_of(hashed, head.key)):
            raise OSError(errno.EEXIST, "something else has its name")

    def update_head(self, stored: StoredResponse, head: ResponseHead) -> None:
        """Keep a head that a validation has brought up to date; a failure costs only that."""
        head = replace_fields(head, size=stored.head.size, mtime_ns=stored.head.mtime_ns)
        with contextlib.suppress(OSError):
            if not _describes(head, os.lstat(self.body_path(stored.name))):
                return  # another instance has stored a newer body meanwhile
            _write_heads(self.head_path(stored.name), [head])

    def delete(self, key: str) -> None:
        """Remove a stored response, if it is ours (invariant 11)."""
        for name in _body_names(key):
            self.delete_file(name, key)

    def take_access_times(self) -> dict[str, float]:
        """The clock time of each name's last use since this was asked last: so a hit costs no write."""
        with self._lock:
            used, self._used = self._used, {}
        return used

    def free_space(self) -> int:
        """Bytes that may be used: what is free, less the reserve; OSError."""
        usage = shutil.disk_usage(self.root)
        reserve = min(usage.total // 20, 10 * 10**9) if self._min_free is None else self._min_free
        return usage.free - reserve

    def free_inodes(self) -> int:
        """Inodes that may be used: what is free, less 5 %, at most 10,000; OSError.  Many file systems make
        them as they are needed."""
        found = os.statvfs(self.root) if hasattr(os, "statvfs") else None
        return found.f_favail - min(found.f_files // 20, 10_000) if found and found.f_files else sys.maxsize

    def list_hosts(self) -> list[str]:
        """The hosts that are stored; OSError where the root cannot be read."""
        folders = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:  # a cleaning rm -rf
            folders = [entry.name for entry in entries if entry.name != METADATA_FOLDER and entry.is_dir()]
        return sorted(name for name in folders if os.path.isdir(self.head_path(name)[:-len("^head")]))

    def head_of(self, name: str, key: str | None) -> ResponseHead | None:
        """The head of the body that has this name, if we stored it for this key (None: for any)."""
        return self._look(name, key)[1]

    def _look(self, name: str, key: str | None) -> tuple[bool, ResponseHead | None]:
        """Whether something has this name, and the head that describes it."""
        try:
            info = os.lstat(self.body_path(name))
        except OSError:
            return False, None
        heads = (head for head in _read_heads(self.head_path(name)) if key in (None, head.key))
        return True, next((head for head in heads if _describes(head, info)), None)

    def _rename_into_place(self, path: str, name: str, head: ResponseHead, old: ResponseHead | None) -> bool:
        """Give a body a name, in place of what ``old`` describes; False where the file system refuses it."""
        place = self.body_path(name)
        for last in (False, True):
            try:
                _write_heads(self.head_path(name), [head, old] if old else [head])
                make_directory(os.path.dirname(place))
                _rename(path, place)
                break
            except OSError as error:
                if error.errno in _NAME_REFUSED:
                    return False
                if last or error.errno != errno.ENOENT:  # a cleaning rm -rf came between two steps
                    raise
        return True

    def delete_file(self, name: str, key: str | None = None) -> bool:
        """Remove a stored response, if it is ours (invariant 11), and for this key; or a head without a body.
        Whether there was one."""
        path = self.body_path(name)
        found, ours = self._look(name, key)
        with contextlib.suppress(OSError):
            if ours:
                os.unlink(path)
        with contextlib.suppress(OSError):
            if ours or not found:
                os.unlink(self.head_path(name))
        return ours is not None

    def body_path(self, name: str) -> str:
        """Where the body of a name lies."""
        return self._top + name

    def head_path(self, name: str) -> str:
        """Where the head file of a name lies."""
        return "%s/heads/%s^head" % (self.metadata_folder, name)


class PartialStore:
    """The partials below a root.  For the caller: claim, follow, spoil."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def open_for_writing(self, key: str, owner: str = "", sole: bool = True) -> PartialFile | None:
        """The partial of a key for us alone to write, with what a crash or a dead origin left of it; None
        where another process writes it; LocalFailure.  With an ``owner`` it is a file of that name, and
        the caller knows whether he is the ``sole`` one."""
        path = self.path(key, owner)
        try:
            make_directory(os.path.dirname(path))
            for _ in range(10):  # somebody may rename or remove it between open and lock
                partial = self._opened(key, owner, os.O_CREAT)
                try:
                    free = bool(owner) or partial.try_lock()
                    if free and partial.still_exists():
                        if not partial.load_metadata() and owner:
                            self._adopt_leftovers(partial, sole)
                        partial.acquire()
                        return partial
                finally:
                    partial.release()
                if not free:
                    return None
            raise OSError(errno.EAGAIN, "another process keeps taking it", path)
        except OSError as error:
            raise StorageError(error) from error

    def open_for_reading(self, key: str, owner: str = "") -> PartialFile | None:
        """The partial that another instance writes, or has written; None where there is none."""
        try:
            return self._opened(key, owner, 0)
        except OSError:
            return None

    def _opened(self, key: str, owner: str, flags: int) -> PartialFile:
        path = self.path(key, owner)
        descriptor = os.open(path, _WRITABLE & ~os.O_CREAT | flags, 0o644)
        return PartialFile(self._store, key, owner, path, io.FileIO(descriptor, "r+b"))

    def _adopt_leftovers(self, partial: PartialFile, sole: bool) -> None:
        """Take over what another owner has left: anyone's, where we are the sole writer, else what nobody has
        written for a while."""
        name = os.path.basename(self.path(partial.head.key, ""))
        with os.scandir(os.path.join(self._store.metadata_folder, "partials")) as entries:
            owners = [entry.name[len(name) + 1:] for entry in entries
                      if entry.name.startswith(name + ".") and "^" not in entry.name]
        for owner in owners:
            old = self.open_for_reading(partial.head.key, owner) if owner != partial.owner else None
            if old is not None:
                try:
                    if old.load_metadata() and (sole or old.is_abandoned()) and not partial.size:
                        partial.copy_from(old)
                        old.discard()
                finally:
                    old.release()

    def unlink(self, key: str, owner: str) -> None:
        """Let another process not store what it writes: it is no longer right."""
        with contextlib.suppress(OSError):
            os.unlink(self.path(key, owner))

    def path(self, key: str, owner: str) -> str:
        """Where the partial of a key lies."""
        name = hashlib.sha256(key.encode()).hexdigest() + ("." + owner if owner else "")
        return "%s/partials/%s" % (self._store.metadata_folder, name)


def disk_usage(root: str) -> dict[str, int]:
    """Bytes of a folder's file system, and free ones; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        found = shutil.disk_usage(root)
        return {"size": found.total, "free": found.free}
    return {}


def try_writing(folder: str) -> None:
    """OSError where no file can be made there, and filled: a full disk still takes an empty one."""
    path = os.path.join(folder, "^probe-" + secrets.token_hex(4))
    replace_file(path, "x")
    os.unlink(path)


class Entry(NamedTuple):
    """A file of pkgproxy's below the root, or a response with its head, as eviction sees it."""

    last: float  # clock time of its last use
    size: int  # bytes on the disk
    name: str  # below the root; "": counted, but not evicted


def _eviction_order(entry: Entry) -> tuple[bool, bool, float, int]:
    """Left-over partials, then all else by its last use, indexes last.  Of one file with two names, the one
    that frees nothing goes first."""
    index = classify_name("http://" + entry.name) is NameClass.INDEX and not entry.name.startswith(METADATA_FOLDER)
    return not entry.name.startswith(METADATA_FOLDER + "/partials"), index, entry.last, entry.size


class Evictor:
    """Keeps a store within its bounds.  For the caller: sweep."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def run(self, config: Config, now: float) -> EvictionReport:
        """Remove what has not been used for too long, and as much as is too much: left-over partials first,
        then the least recently used, indexes last, never what pkgproxy did not store; OSError where the root
        can't be read."""
        used, (before, needed) = self._store.take_access_times(), self._store.space.take()
        self._sweep_partials(now)
        self._store.names.compact()
        found = list(self._find(used, now))
        stored = [entry.name for entry in found if entry.name and not entry.name.startswith(METADATA_FOLDER)]
        if stored and not self._store.names.is_complete():
            with contextlib.suppress(OSError):
                self._store.names.rebuild(self._common_names(stored))
        total, removed, freed, inodes = sum(entry.size for entry in found), 0, 0, 0
        spare, room = min(total // 20, MAX_SPARE), self._store.free_space()
        if config.max_size is not None:
            room = min(room, config.max_size - total)
        # A download that would not even fit into an empty cache evicts nothing.
        excess = max(spare, needed if needed - room <= total else 0) - room
        lacking = SPARE_INODES - self._store.free_inodes()
        ordered = excess > 0 or lacking > 0 or config.max_age is not None  # else that costs nobody a moment
        for entry in sorted(found, key=_eviction_order) if ordered else ():
            expired = config.max_age is not None and now - entry.last > config.max_age
            unused = abs(now - entry.last) > MIN_EVICTION_AGE  # in the future: by a clock that has been put right since
            chosen = unused and (expired or freed < excess or inodes < lacking)
            count = self._evict(entry.name) if chosen else 0
            inodes, freed = inodes + count, freed + (entry.size if count else 0)
            removed += count > 0 and not entry.name.startswith(METADATA_FOLDER)
        self._store.space.correct(total - freed - before, spare)
        return EvictionReport(len(stored), total, removed, freed)

    def _common_names(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            for head in _read_heads(self._store.head_path(name)):
                if shareable_name(head.key):
                    yield shareable_name(head.key), head.key

    def _find(self, used: dict[str, float], now: float) -> Iterator[Entry]:
        """All that is pkgproxy's below the root, from one walk."""
        seen: set[tuple[int, int]] = set()
        for folder, _, files in os.walk(self._store.metadata_folder):
            part = folder[len(self._store.metadata_folder) + 1:].partition(os.sep)[0]
            with contextlib.suppress(OSError):  # a folder of heads stands for one of bodies
                yield Entry(now, size_on_disk(os.lstat(folder)) * (1 + (part == "heads")), "")
            for file in files:
                with contextlib.suppress(OSError):
                    path = os.path.join(folder, file)
                    info = os.lstat(path)
                    last = info.st_mtime
                    if part == "partials" and "." not in file:
                        last = min(last, now - MIN_EVICTION_AGE - 1)  # its lock tells whether it is in use
                    fixed = part not in ("partials", "names") or "^" in file or file == _COMPLETE_MARK
                    entry = Entry(last, size_on_disk(info), "" if fixed else "%s/%s/%s" % (METADATA_FOLDER, part, file))
                    yield self._described(path, entry, used, seen, now) if part == "heads" else entry

    def _described(self, path: str, head: Entry, used: dict[str, float], seen: set[tuple[int, int]],
                   now: float) -> Entry:
        """The stored response that a head file belongs to; OSError."""
        top = os.path.join(self._store.metadata_folder, "heads")
        name = os.path.relpath(path, top)[:-len("^head")].replace(os.sep, "/")
        try:
            info = os.lstat(self._store.body_path(name))
        except (FileNotFoundError, NotADirectoryError):
            _remove_old(path, now - DAY)  # its body was removed by hand
            return head
        if not (path.endswith("^head") and stat.S_ISREG(info.st_mode)):
            return head
        if name in used:  # remembered here, so that a hit costs no write
            _save_access_time(self._store.body_path(name), used[name])
        same = (info.st_dev, info.st_ino) in seen  # a file of two mirrors takes its space once
        if info.st_nlink > 1:
            seen.add((info.st_dev, info.st_ino))
        last = max(used.get(name, 0.0), info.st_atime)
        return Entry(last, head.size + (0 if same else size_on_disk(info)), name)

    def _evict(self, name: str) -> int:
        """Remove a response, or a file of the bookkeeping that is not locked; how many inodes that frees."""
        count, path = 0, self._store.body_path(name)
        with contextlib.suppress(OSError):
            if name.startswith(METADATA_FOLDER):
                with io.FileIO(os.open(path, _WRITABLE & ~os.O_CREAT), "r+b") as file:
                    if try_lock_file(file):
                        os.unlink(path)
                        count = 1
                        os.unlink(path + "^head")  # a partial may have one
            elif name and self._store.delete_file(name):
                count = 2
                while name := os.path.dirname(name):
                    for folder in (self._store.body_path(name), self._store.head_path(name)[:-len("^head")]):
                        with contextlib.suppress(OSError):  # one that is not empty
                            os.rmdir(folder)
                            count += 1
        return count

    def _sweep_partials(self, now: float) -> None:
        """Remove what crashes left and nobody has gone on with for a day."""
        with contextlib.suppress(OSError), os.scandir(os.path.join(self._store.metadata_folder, "partials")) as entries:
            for entry in entries:
                _remove_old(entry.path, now - DAY)


# ---------------------------------------------------------------------------------------------
# 6 Barrier
# ---------------------------------------------------------------------------------------------


class FlightResult(enum.Enum):
    """How a flight ended, for those who waited for it."""

    STORED = "stored"  # look in the store
    AGAIN = "again"  # nobody was asked: decide anew
    WHOLE = "whole"  # all bytes have arrived, but the disk did not take them
    STALE = "stale"  # its leader got a stale response: decide anew, alone
    ALONE = "alone"  # the answer is not for sharing: ask the origin yourself
    FAILED = "failed"  # before the first byte: ask once yourself; later, the error is yours too


class Flight:
    """One fetch under way.  Its leader publishes a partial and ends it; followers wait on it.

    All waits end: when something happens, or at their deadline with Landing.ALONE (invariant 10).
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._changed = threading.Condition()  # guards all below
        self._partial: PartialFile | None = None
        self._received = 0  # bytes that may be read
        self._complete = False  # all bytes are here, and go to the disk
        self._spoiled = False  # its body must not be stored
        self._landing: FlightResult | None = None
        self._error: Exception | None = None

    def publish(self, partial: PartialFile) -> None:
        """The head has arrived: followers may read."""
        with self._changed:
            self._partial = partial
            self._received = max(self._received, partial.size if partial.size != partial.length else 0)
            self._changed.notify_all()

    def set_received(self, received: int) -> None:
        """So many bytes may be read."""
        with self._changed:
            self._received = received
            self._changed.notify_all()

    def finish_receiving(self) -> bool:
        """All bytes have arrived; whether they may be stored.  Waits from now on are for the disk."""
        with self._changed:
            self._complete = True
            return not self._spoiled

    def forbid_storing(self) -> None:
        """What is on its way is no longer right: give it to those who wait, but don't store it."""
        with self._changed:
            self._spoiled = True

    def finish(self, landing: FlightResult, error: Exception | None = None, received: int | None = None) -> None:
        """Announce the end, and with it the last bytes (invariant 3).  Only the first call counts."""
        with self._changed:
            if self._landing is None:
                self._landing, self._error = landing, error
                self._received = self._received if received is None else received
                self._changed.notify_all()

    def is_finished(self) -> bool:
        """Whether it has been ended."""
        with self._changed:
            return self._landing is not None

    def wait_for_head(self, timeout: float) -> tuple[PartialFile | None, FlightResult]:
        """A partial (acquired); or how the flight ended without one."""
        with self._changed:
            self._changed.wait_for(lambda: self._partial or self._landing, timeout)
            partial, landing, error = self._partial, self._landing, self._error
        if landing is FlightResult.FAILED and error:
            raise error
        if partial and partial.acquire():
            return partial, FlightResult.STORED
        return None, landing or FlightResult.ALONE

    def wait_for_bytes(self, offset: int, timeout: float) -> int:
        """Bytes that may be read, more than ``offset`` unless it ended whole; the flight's error; or
        LocalFailure where it stands still."""
        with self._changed:
            self._changed.wait_for(lambda: self._received > offset or self._landing, timeout)
            if self._complete:  # a slow disk is no fault of the origin's
                self._changed.wait_for(lambda: self._received > offset or self._landing, COMMIT_TIMEOUT)
            if self._received > offset or self._landing in (FlightResult.STORED, FlightResult.WHOLE):
                return self._received
            error = self._error
        raise error or StorageError(OSError(errno.ETIMEDOUT, "the download stands still"))


class SingleFlight:
    """At most one flight per cache key (invariant 2)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _flights
        self._flights: dict[str, Flight] = {}

    def join(self, key: str) -> tuple[Flight, bool]:
        """The flight for a key, and whether the caller leads it (and must leave and end it)."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, False
            flight = self._flights[key] = Flight(key)
            return flight, True

    def finish(self, flight: Flight, landing: FlightResult, error: Exception | None = None,
            received: int | None = None) -> None:
        """Take a flight off, then announce its end, and with it the last bytes (invariant 3)."""
        self.remove(flight)
        flight.finish(landing, error, received)

    def remove(self, flight: Flight) -> None:
        """Let nobody join a flight any more."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]

    def invalidate(self, key: str) -> None:
        """Let no flight of now store its body, and nobody join it any more."""
        with self._lock:
            flight = self._flights.pop(key, None)
        if flight is not None:
            flight.forbid_storing()

    def is_in_flight(self, key: str) -> bool:
        """Whether a key is being fetched."""
        with self._lock:
            return key in self._flights

    def in_flight(self) -> int:
        """Flights under way."""
        with self._lock:
            return len(self._flights)


class MemcachedClient:
    """One memcached server, and as much of its text protocol as a lease needs (memcached's protocol.txt).
    For the caller: add, holder, cas."""

    def __init__(self, place: tuple[str, int]) -> None:
        self._place = place
        self._lock = threading.Lock()  # guards _idle and _trouble
        self._idle: list[Any] = []  # files of connections
        self._trouble = 0.0  # monotonic time until which it is left alone; 0: it is well

    def add(self, key: str, owner: str) -> bool:
        """Whether a key had no owner and has this one now; OSError."""
        return self._ask("add %s 0 %d %d" % (key, LEASE_DURATION, len(owner)), owner)[0] == "STORED"

    def holder(self, key: str) -> tuple[str, str]:
        """The owner of a key and memcached's unique number for that, "" for none; OSError."""
        words = self._ask("gets %s" % key)
        return (words[-1], words[4]) if words[0] == "VALUE" else ("", "")

    def cas(self, key: str, owner: str, unique: str, span: int) -> bool:
        """Whether nobody else has written a key meanwhile, so that it is the owner's for ``span`` seconds
        more (negative: no longer); OSError."""
        command = "cas %s 0 %d %d %s" % (key, span, len(owner), unique)
        return self._ask(command, owner)[0] == "STORED"

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for file in idle:
            file.close()

    def _ask(self, command: str, data: str | None = None) -> list[str]:
        """The words of an answer, and the data at its end if it has any; OSError."""
        if time.monotonic() < self._trouble:
            raise OSError(errno.EHOSTUNREACH, "memcached was unreachable a moment ago")
        message = (command + "\r\n" + ("" if data is None else data + "\r\n")).encode("ascii")
        try:
            words = self._exchange(message)
        except (OSError, ValueError, IndexError) as error:
            self._failed(error)
            raise OSError(errno.EHOSTUNREACH, str(error)) from None
        with self._lock:
            again, self._trouble = self._trouble > 0, 0.0
        if again:
            log.warning("memcached at %s:%d works again.", *self._place)
        return words

    def _exchange(self, message: bytes) -> list[str]:
        with self._lock:
            pooled = self._idle.pop() if self._idle else None
        if pooled is not None:
            with contextlib.suppress(OSError):  # it may have been restarted meanwhile
                return self._talk(pooled, message)
        with socket.create_connection(self._place, MEMCACHED_TIMEOUT) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            file = sock.makefile("rwb")
        return self._talk(file, message)

    def _talk(self, file: Any, message: bytes) -> list[str]:
        try:
            file.write(message)
            file.flush()
            words = self._read_words(file)
            if words[0] == "VALUE":
                data = self._read_words(file)
                words += data if data != ["END"] and self._read_words(file) == ["END"] else []
            if words[0] not in ("STORED", "NOT_STORED", "EXISTS", "NOT_FOUND", "END", "VALUE"):
                raise OSError(errno.EPROTO, "memcached says %s" % " ".join(words))
        except BaseException:
            file.close()
            raise
        with self._lock:
            room = len(self._idle) < POOL_SIZE
            if room:
                self._idle.append(file)
        if not room:
            file.close()
        return words

    def _read_words(self, file: Any) -> list[str]:
        line = file.readline(MAX_LINE).decode("latin-1")
        if not line.endswith("\r\n") or not line.strip():
            raise ConnectionResetError(errno.ECONNRESET, "memcached closed the connection")
        return str(line).split()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            known, self._trouble = self._trouble > 0, time.monotonic() + MEMCACHED_BACKOFF
        log.log(logging.DEBUG if known else logging.WARNING, "memcached at %s:%d cannot be asked (%s): each "
                "instance downloads on its own.", *self._place, error)


class LeaseManager:
    """Who leads among instances, where the lock on a partial does not tell it: for each key the owner that
    memcached names, or, without memcached, whoever asks (each instance on its own)."""

    def __init__(self, servers: tuple[tuple[str, int], ...], alone: bool) -> None:
        self._servers = [MemcachedClient(place) for place in servers]
        self._alone = alone  # without servers: whether locks don't work either
        self._lock = threading.Lock()  # guards _held and _renewing
        self._held: dict[str, str | None] = {}  # by owner: the key, None once it was lost
        self._renewing = False
        self._stop = threading.Event()

    @property
    def uses_memcached(self) -> bool:
        """Whether memcached names the owners, so that it can be asked."""
        return bool(self._servers)

    def holder(self, key: str) -> str:
        """Who downloads a key, as far as can be told."""
        with contextlib.suppress(OSError, IndexError):
            server, name = self._server(key)
            return server.holder(name)[0]
        return ""

    def acquire(self, key: str) -> tuple[str, bool | None]:
        """The owner of a key ("": who locks its file), and whether that is the caller, for it alone; None:
        for the caller, but others may think the same."""
        if not self._servers:
            return (secrets.token_hex(8), None) if self._alone else ("", True)
        try:
            return self.try_acquire(key)
        except OSError:
            return secrets.token_hex(8), None

    def try_acquire(self, key: str) -> tuple[str, bool]:
        """The owner of a key, and whether it has none but the caller, who has just become it; OSError where
        memcached can't be asked."""
        server, name = self._server(key)
        owner = secrets.token_hex(8)
        for _ in range(3):
            if server.add(name, owner):
                self._start_renewing(key, owner)
                return owner, True
            holder, _ = server.holder(name)
            if holder:
                return holder, False
        raise OSError(errno.EAGAIN, "the lease comes and goes")

    def release(self, key: str, owner: str) -> None:
        """The caller's no longer."""
        with self._lock:
            held = self._held.pop(owner, None)
        if held is not None:
            with contextlib.suppress(OSError):
                self._renew(key, owner, -1)

    def is_lost(self, owner: str) -> bool:
        """Whether another instance has taken what was this owner's."""
        with self._lock:
            return owner in self._held and self._held[owner] is None

    def close(self) -> None:
        """Renew nothing any more."""
        self._stop.set()
        for server in self._servers:
            server.close()

    def _server(self, key: str) -> tuple[MemcachedClient, str]:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._servers[int(digest, 16) % max(1, len(self._servers))], "pkgproxy:" + digest

    def _start_renewing(self, key: str, owner: str) -> None:
        with self._lock:
            self._held[owner] = key
            begin, self._renewing = not self._renewing, True
        if begin:
            threading.Thread(target=self._renew_all, daemon=True).start()

    def _renew_all(self) -> None:
        while not self._stop.wait(LEASE_RENEWAL_INTERVAL):
            with self._lock:
                held = list(self._held.items())
            for owner, key in held:
                with contextlib.suppress(OSError):
                    if key is not None and not self._renew(key, owner, LEASE_DURATION):
                        with self._lock:
                            if owner in self._held:
                                self._held[owner] = None

    def _renew(self, key: str, owner: str, span: int) -> bool:
        """Whether a lease is its owner's for ``span`` seconds more; OSError."""
        server, name = self._server(key)
        holder, unique = server.holder(name)
        if holder == owner:
            return server.cas(name, owner, unique, span)
        return span > 0 and not holder and server.add(name, owner)  # memcached has forgotten it


# ---------------------------------------------------------------------------------------------
# 7 Sockets
# ---------------------------------------------------------------------------------------------


class RecentEvents:
    """When something last happened to a host, a file or a client, and why: failures, attempts, log lines."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards _events
        self._events: dict[str, tuple[float, str]] = {}  # by name: monotonic time and reason

    def note(self, name: str, reason: str = "") -> None:
        """It happens now."""
        with self._lock:
            if len(self._events) >= MAX_EVENTS:
                self._events.clear()  # costs some attempts more, no memory
            self.forget(name)  # to be the newest
            self._events[self._key(name)] = time.monotonic(), reason[:MAX_MEMOIZED]

    def note_first(self, name: str, span: float) -> bool:
        """Note it unless it has happened in the last ``span`` seconds; return whether it was noted."""
        with self._lock:
            first = self.find(name, span) is None
            if first:
                self.note(name)
            return first

    def find(self, name: str, span: float) -> tuple[float, str] | None:
        """Seconds since it happened, and why; None if that is ``span`` seconds ago, or more."""
        return next((row[1:] for row in self.gather(span, name)), None)

    def gather(self, span: float, *names: str) -> list[tuple[str, float, str]]:
        """Names (all, or those given) with the seconds since it happened and why, the newest last."""
        now = time.monotonic()
        with self._lock:
            keys = map(self._key, names or self._events)
            rows = [(key, *self._events[key]) for key in keys if key in self._events]
        return [(name, now - when, reason) for name, when, reason in rows if now - when < span]

    def forget(self, *names: str) -> None:
        """It never happened."""
        with self._lock:
            for name in names:
                self._events.pop(self._key(name), None)

    def _key(self, name: str) -> str:
        # Strangers choose the length of names, and so the memory that they take.
        return name if len(name) <= MAX_MEMOIZED else hashlib.sha256(name.encode()).hexdigest()


def wait_until_ready(sock: socket.socket, timeout: float, writing: bool = False) -> bool:
    """Whether a socket has bytes or its end to read, or takes bytes or will fail; poll where there is one:
    select stops at 1024."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT if writing else select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    wanted = ([], [sock], [sock]) if writing else ([sock], [], [])
    return any(select.select(*wanted, timeout))


def is_open_and_silent(sock: socket.socket) -> bool:
    """Whether a connection is open, and nothing has come over it."""
    try:
        return not wait_until_ready(sock, 0)
    except (OSError, ValueError):
        return False


class DeadlineReader(io.RawIOBase):
    """The bytes of a socket, up to a deadline: a drip of single bytes must not hold a thread for ever.

    A socket without TLS does not block, and is waited for only where there is nothing to read: Python's own
    time-outs ask the system before each read.
    """

    def __init__(self, sock: socket.socket, patience: float, early: bytes = b"") -> None:
        super().__init__()
        self.prefetched = early  # has been received, and not been read
        self.keepalive: io.RawIOBase | None = None  # what keeps the socket open, to be closed with this
        self.on_idle: Callable[[], object] | None = None  # to be called where nothing comes for PAUSE
        self._sock = sock
        self._patience = patience  # seconds of silence
        self._deadline: float | None = None  # monotonic

    def set_deadline(self, seconds_left: float | None) -> None:
        """From now on all reads together may take so long; None: each alone."""
        self._deadline = None if seconds_left is None else time.monotonic() + seconds_left

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client reads, which takes this for a socket."""
        return io.BufferedReader(self, 64 * 1024)

    def readable(self) -> bool:
        """It is there to be read."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what comes; socket.timeout."""
        if self.prefetched:
            size = min(len(buffer), len(self.prefetched))
            buffer[:size], self.prefetched = self.prefetched[:size], self.prefetched[size:]
            return size
        left = self._time_left()
        if hasattr(self._sock, "pending"):  # TLS
            if not self._sock.pending():
                self._wait_briefly(left)
            self._sock.settimeout(self._time_left())
            return self._sock.recv_into(buffer)
        while True:
            try:
                return self._sock.recv_into(buffer)
            except BlockingIOError:
                if not self._wait_briefly(left) and not wait_until_ready(self._sock, self._time_left()):
                    raise socket.timeout("timed out") from None

    def _wait_briefly(self, left: float) -> bool:
        if self.on_idle is None:
            return False
        soon = wait_until_ready(self._sock, min(PUBLISH_DELAY, left))
        if not soon:
            self.on_idle()
        return soon

    def _time_left(self) -> float:
        """Seconds that it may take; socket.timeout where that is none."""
        if self._deadline is None:
            return self._patience
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return min(left, self._patience)

    def close(self) -> None:
        """Close it; the socket closes only what it has been given to hold."""
        if self.keepalive is not None:
            self.keepalive.close()
        super().close()


def read_head_lines(file: io.BufferedIOBase, limit: int = MAX_HEAD) -> list[str]:
    """The lines of a head without their CRLF, up to the empty one (RFC 9112 §2.1).

    [] at the end of the stream before the first byte; ValueError for a head that is cut off, too
    large, or whose lines end in anything but CRLF.
    """
    lines: list[str] = []
    total = 0
    while True:
        line = file.readline(MAX_LINE + 2)
        total += len(line)
        if not line and not lines:
            return []
        if not line.endswith(b"\r\n") and len(line) > MAX_LINE:
            what, status = ("a field", 431) if lines else ("a first line", 414)
            raise HeadTooLargeError("%s longer than %d bytes" % (what, MAX_LINE), status)
        if not line.endswith(b"\r\n"):
            raise ValueError("a line without CR" if line.endswith(b"\n") else "a head that is cut off")
        if total > limit:
            raise HeadTooLargeError("a head of more than %d bytes" % limit)
        if line == b"\r\n":
            return lines or [""]
        lines.append(line[:-2].decode("latin-1"))


class ChunkedReader:
    """A chunked body (RFC 9112 §7.1); trailers are dropped.  http.client's own lets bad sizes pass."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._left = 0  # bytes of the current chunk
        self._allowance = MAX_HEAD  # bytes of framing that may still come; data allows for more
        self.ended = False

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, b"" after the last chunk; ValueError if the framing is invalid or far
        larger than the data."""
        data = self._read_small(size) if not self._left and not self.ended else b""
        data = data or self._read_one(size)
        self._allowance += 2 * len(data)
        if self._allowance < 0:
            raise ValueError("chunks too small for their framing")
        return data

    def _read_small(self, size: int) -> bytes:
        """Join the chunks that are in the buffer as a whole: each on its own would cost a write to disk."""
        buffered, pieces, at = self._file.peek(1), [], 0  # type: ignore[attr-defined]
        while match := _CHUNK_SIZE.match(buffered, at):
            count = int(match[1], 16)
            stop = match.end() + count
            if not 0 < count <= size or buffered[stop:stop + 2] != b"\r\n":
                break
            pieces.append(buffered[match.end():stop])
            self._allowance -= stop + 2 - at - count
            size, at = size - count, stop + 2
        self._file.read(at)
        return b"".join(pieces)

    def _read_one(self, size: int) -> bytes:
        """Return up to ``size`` bytes of the current chunk, or of the next; b"" after the last."""
        if not self._left and not self.ended:
            line = self._file.readline(MAX_LINE)
            self._left = parse_chunk_size(line)
            self._allowance -= len(line) + 2
            if not self._left:
                trailers = read_head_lines(self._file)
                if not trailers:
                    raise ValueError("a body cut off before its end")
                parse_fields(trailers if trailers != [""] else [])
                self.ended = True
        data = self._file.read1(min(size, self._left)) if self._left else b""
        if self._left and not data:
            raise ValueError("a chunk cut off")
        self._left -= len(data)
        if data and not self._left and self._file.read(2) != b"\r\n":
            raise ValueError("a chunk that does not end where it says")
        return data


class Quota:
    """A limited number of things in use, of which one client may have half."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()  # guards _used
        self._used: collections.Counter[str] = collections.Counter()  # by client_network()

    def acquire(self, client: str) -> bool:
        """Take one for a client's address; False if there is none left for it."""
        client = client_network(client)
        with self._lock:
            free = sum(self._used.values()) < self._most and self._used[client] < max(1, self._most // 2)
            self._used[client] += free
            return free

    def release(self, client: str) -> None:
        """Return one."""
        client = client_network(client)
        with self._lock:
            self._used[client] -= 1
            self._used += collections.Counter()  # drops zeros


def start_thread(work: Callable[..., object], *arguments: Any) -> None:
    """Let a thread do it; LocalFailure where there can't be one more."""
    try:
        threading.Thread(target=work, args=arguments, daemon=True).start()
    except RuntimeError as error:
        raise StorageError(OSError(errno.ENOMEM, str(error))) from None


# ---------------------------------------------------------------------------------------------
# 8 Origin client
# ---------------------------------------------------------------------------------------------


class StrictHTTPResponse(http.client.HTTPResponse):
    """http.client's response with a strict head.

    http.client takes a head that is cut off for an empty 200, any 1xx but 100 for the final answer,
    lets bare LF pass, and leaves the conflict of two lengths to chance.
    """

    pairs: Fields = ()  # the fields, in the order of the wire

    def __init__(self, sock: socket.socket, *arguments: Any, **more: Any) -> None:
        self.patience = sock.gettimeout() or ORIGIN_TIMEOUT  # seconds until the whole head is there
        self._sock = sock
        self._timed = DeadlineReader(sock, ORIGIN_TIMEOUT)
        self._timed.keepalive = sock.makefile("rb", buffering=0)  # http.client closes the socket before it reads
        super().__init__(self._timed, *arguments, **more)  # type: ignore[arg-type]
        if not hasattr(sock, "pending"):
            sock.setblocking(False)

    def hurry(self, seconds_left: float) -> None:
        """From now on reading it may take so long in all."""
        self._timed.set_deadline(seconds_left)

    def on_pause(self, call: Callable[[], object]) -> None:
        """What to do where nothing comes for PAUSE seconds."""
        self._timed.on_idle = call

    def begin(self, **_limits: Any) -> None:
        """Read the final head, within the socket's time-out; ValueError or http.client.RemoteDisconnected."""
        self._timed.set_deadline(self.patience)
        self._read_head()
        self._timed.set_deadline(None)

    def _read_head(self) -> None:
        while True:
            lines = read_head_lines(self.fp)
            if not lines:
                raise http.client.RemoteDisconnected("closed before an answer")
            version, status, reason = parse_status_line(lines[0])
            fields = parse_fields(lines[1:])
            if status >= 200:
                break
            if status == 101:
                raise ValueError("101 without being asked")
        self.status = self.code = status
        self.version, self.reason, self.pairs = version[0] * 10 + version[1], reason, fields
        self.headers = self.msg = http.client.HTTPMessage()
        self._frame(version, fields)

    def _frame(self, version: tuple[int, int], fields: Fields) -> None:
        """Where the body ends (RFC 9112 §6.3)."""
        self.chunked = is_chunked(fields)
        declared = field_value(fields, "Content-Length") or ("chunked" if self.chunked else "0")
        if self.chunked and (version < (1, 1) or field_value(fields, "Content-Length") is not None):
            raise ValueError("Transfer-Encoding with HTTP/1.0 or a Content-Length")
        self.chunk_left = None
        self.length = None if self.chunked else content_length(fields)
        options = list_members(fields, "Connection")
        self.will_close = "close" in options or version < (1, 1) and "keep-alive" not in options
        if self._method == "HEAD" or self.status in (204, 304):  # type: ignore[attr-defined]
            self.length, self.chunked = 0, False
        elif not self.chunked and self.length is None:
            self.will_close = True
        if self.length == 0 and declared != "0":
            self.will_close = True  # an answer without body that declares one: who knows what follows


def resolve_addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a name, the families in turn (RFC 8305 §4); OSError."""
    # In bytes: for a str, Python loads a megabyte of tables for names beyond ASCII, which ours never are.
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    first = [address for address in found if address[0] == found[0][0]]
    other = [address for address in found if address[0] != found[0][0]]
    pairs = itertools.zip_longest(first, other)
    return [address for pair in pairs for address in pair if address is not None]


def _detached(sock: Any, patience: float) -> socket.socket:
    """The same connection in a socket of its own, which outlives the tries."""
    own = socket.socket(sock.family, sock.type, sock.proto, sock.detach())
    own.settimeout(patience)
    return own


class DNSLookup:
    """One question to the name servers, in a thread of its own: getaddrinfo knows no deadline."""

    def __init__(self, host: str, port: int, done: Callable[[], None]) -> None:
        self._place = (host, port)
        self._done = done  # told of the end
        self._ended = threading.Event()
        self._found: list[tuple[Any, ...]] = []
        self._failure: Exception | None = None
        try:
            threading.Thread(target=self._run, daemon=True).start()
        except RuntimeError as error:
            raise OSError(errno.ENOMEM, "no thread to look it up: %s" % error) from None

    def _run(self) -> None:
        try:
            self._found = resolve_addresses(*self._place)
        except (OSError, UnicodeError) as error:
            self._failure = error
        finally:
            self._done()
            self._ended.set()

    def result(self, patience: float) -> list[tuple[Any, ...]]:
        """The addresses; OSError, UnicodeError, socket.timeout."""
        if not self._ended.wait(patience):
            raise socket.timeout("the name servers say nothing")
        if self._failure is not None:
            raise self._failure
        return list(self._found)


class Resolver:
    """The addresses of origins, and which of them failed lately.  For the caller: find, failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _lookups
        self._lookups: dict[tuple[str, int], DNSLookup] = {}  # under way: one a name, however many wait
        self.failures = RecentEvents()  # by address, or the URL of a parent proxy
        self._quota = Quota(MAX_LOOKUPS)

    def resolve(self, host: str, port: int, patience: float, client: str = "") -> list[tuple[Any, ...]]:
        """The addresses of a name, those that failed lately last; OSError, UnicodeError, socket.timeout, and
        OriginFailure if too many names are being looked up, for the client or in all."""
        if is_address(host):
            found = resolve_addresses(host, port)  # nobody has to be asked
        else:
            found = self._lookup((host, port), client).result(patience)
        return sorted(found, key=lambda address: -(self.failures.find(address[4][0], ADDRESS_PENALTY) or (math.inf,))[0])

    def mark_failed(self, address: str) -> None:
        """An address refused, broke off or said nothing."""
        self.failures.note(address)

    def _lookup(self, place: tuple[str, int], client: str) -> DNSLookup:
        """The lookup of a name that is under way, or a new one; OSError, OriginFailure."""
        free, started = self._quota.acquire(client), False
        try:
            with self._lock:
                if place not in self._lookups:
                    if not free:
                        raise OriginError("Too many names are being looked up.", status=503)
                    self._lookups[place] = DNSLookup(*place, functools.partial(self._looked_up, place, client))
                    started = True
                return self._lookups[place]
        finally:
            if free and not started:
                self._quota.release(client)

    def _looked_up(self, place: tuple[str, int], client: str) -> None:
        with self._lock:
            self._lookups.pop(place, None)
        self._quota.release(client)


def connect_fastest(addresses: list[tuple[Any, ...]], patience: float) -> socket.socket:
    """A connection to whichever address answers first: a new one is tried every NEXT_ADDRESS seconds, and
    at once when one refuses (RFC 8305 §5); OSError, socket.timeout."""
    waiting, deadline = list(addresses), time.monotonic() + patience
    failure: OSError = socket.timeout("timed out")
    with selectors.DefaultSelector() as tries, contextlib.ExitStack() as others:
        while waiting or tries.get_map():
            if waiting:
                family, kind, protocol, _, address = waiting.pop(0)
                try:
                    sock = others.enter_context(socket.socket(family, kind, protocol))
                    sock.setblocking(False)
                    code = sock.connect_ex(address)
                    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
                        raise OSError(code, os.strerror(code))
                    tries.register(sock, selectors.EVENT_WRITE)
                except OSError as error:  # a family that this machine does not speak
                    failure = error
                    continue
            left = deadline - time.monotonic()
            for key, _ in tries.select(max(0.0, min(left, CONNECT_ATTEMPT_DELAY) if waiting else left)):
                tries.unregister(key.fileobj)
                code = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # type: ignore[union-attr]
                if not code:
                    return _detached(key.fileobj, patience)
                failure = OSError(code, os.strerror(code))
            if time.monotonic() >= deadline:
                raise socket.timeout("timed out")
    raise failure


@dataclasses.dataclass(frozen=True)
class OriginRequest:
    """One request to an origin."""

    method: str
    target: Target
    fields: Fields
    body: Readable | None = None
    length: int | None = 0  # of the body; None: chunked
    client_is_local: bool = False  # for a client on this host, which may reach what only this host may
    follow_redirects: bool = False  # redirects, but not to HTML
    deadline: float | None = None  # monotonic: by then a head, or a time-out; None: each step has its own
    client: str = ""  # its address
    timings: dict[str, float] | None = None  # the client request's (see mark())

    def timeout_for(self, most: float) -> float:
        """Seconds for a step that may take ``most``; socket.timeout where there are none left."""
        if self.deadline is None:
            return most
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return min(left, most)

    @property
    def is_retryable(self) -> bool:
        """Whether it may be sent twice (RFC 9110 §9.2.2), and whether it still can be."""
        return self.body is None and self.method in ("GET", "HEAD", "OPTIONS")


def is_local_address(address: tuple[Any, ...]) -> bool:
    """Whether an address is one of this machine's; OSError if that cannot be found out.  No packet is sent.

    bind() cannot tell: with Linux's ip_nonlocal_bind=1 it succeeds for any address, and /proc, which has
    that setting and the list of addresses, may be hidden.  So the kernel is asked in other ways.
    """
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback or ip.is_unspecified:
        return True
    with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            if ip.version == 4:  # each address names its interface
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ip.packed)
                return True
            probe.connect(address)  # packets to an own address come from just it (RFC 6724 §5, rule 1)
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == ip
        except OSError as error:  # IPv6: there is no way to it
            if ip.version == 4 and error.errno != errno.EADDRNOTAVAIL:
                raise
            return False


def is_local_client(address: str) -> bool:
    """Whether a client with this address is on this host; not, where that can't be found out."""
    with contextlib.suppress(OSError, ValueError):
        return is_local_address((address, 9))
    return False


def is_near(address: tuple[Any, ...]) -> bool:
    """Whether only clients on this host may be led to an address; OSError if that cannot be found out."""
    return is_protected_address(address[0]) or is_local_address(address)


class AddressPolicy:
    """Which addresses may be connected to.  For the caller: pass_by, and ports."""

    def __init__(self) -> None:
        self.listening_ports: set[int] = set()  # that we listen on

    def filter(self, found: list[tuple[Any, ...]], forward: OriginRequest) -> list[tuple[Any, ...]]:
        """Those of the addresses that a request may go to; Failure where there are none.

        The address that is looked at is the one connected to: a name has no second chance to change.
        """
        reasons = [self._reason(address, forward) for address in found]
        passed = [address for address, reason in zip(found, reasons) if reason is None]
        if reasons and reasons[0] is not None and not passed:
            status, sentence = reasons[0]
            raise ProxyError("%s %s." % (forward.target.authority, sentence), status)
        return passed

    def _reason(self, found: tuple[Any, ...], forward: OriginRequest) -> tuple[int, str] | None:
        address = found[4]
        if forward.client_is_local and address[1] not in self.listening_ports:
            return None
        try:
            own = is_local_address(address)
        except OSError as error:  # a family that this machine does not speak, or no descriptor left
            return 502, "cannot be checked: %s" % error.strerror
        if not own:
            guarded = not forward.client_is_local and is_protected_address(address[0])
            return (403, "is an address that only the proxy's own host may reach") if guarded else None
        if address[1] in self.listening_ports:
            return 508, "leads back to this proxy"
        return None if forward.client_is_local else (403, "is the proxy's own host, which only it itself may reach")


class TrustStore:
    """Whose certificates are believed: the system's, and those of a file.  It can't be turned off."""

    def __init__(self, ca_file: str | None) -> None:
        self._ca_file = ca_file
        self._context: Any = None  # one for all, made when it is first needed: 20 ms and some MB

    def context(self) -> Any:
        """The ssl.SSLContext of all connections; OSError."""
        if self._context is None:
            try:
                import ssl
            except ImportError:
                raise OSError(errno.EPROTONOSUPPORT, "this Python has no TLS (no ssl module)") from None
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            if self._ca_file:
                context.load_verify_locations(self._ca_file)
            self._context = context
        return self._context


def explain_error(error: Exception) -> str:
    """What an error of a connection means, in words for a client."""
    refused = getattr(error, "verify_message", "").rstrip(".")  # ssl.SSLCertVerificationError has one
    if refused:
        unknown = re.search("self|issuer", refused) is not None
        remedy = " (the operator can add its issuer with --ca-file)" if unknown else ""
        return "its certificate is refused: %s%s" % (refused, remedy)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"^\[[A-Z0-9_: ]+\] |^_ssl\.c:\d+: | \(_ssl\.c:\d+\)", "", text)


PoolKey = tuple[str, str, int, bool, "ParentProxy | None"]  # what connections may stand in for each other


def pool_key(forward: OriginRequest, parent: ParentProxy | None) -> PoolKey:
    """Scheme, host, port, whether the connection may lead where only this host may go, and the way."""
    target = forward.target
    return target.scheme, target.host, target.port, forward.client_is_local, parent


def connect_through_parent(sock: socket.socket, parent: ParentProxy, target: Target) -> None:
    """Let a parent proxy connect us to an origin (RFC 9110 §9.3.6); OSError, ValueError."""
    authority = "%s:%d" % ("[%s]" % target.host if ":" in target.host else target.host, target.port)
    lines = ["CONNECT %s HTTP/1.1" % authority, "Host: " + authority, *map(": ".join, parent.fields), "", ""]
    sock.sendall("\r\n".join(lines).encode("latin-1"))
    timed = DeadlineReader(sock, ORIGIN_TIMEOUT)
    timed.set_deadline(sock.gettimeout())
    with io.BufferedReader(timed, 1) as file:  # what follows the head is not ours to read
        lines = read_head_lines(file)
    if not lines or parse_status_line(lines[0])[1] // 100 != 2:
        raise ValueError("to CONNECT it answers '%s'" % "".join(lines[:1]))


class OriginConnection(http.client.HTTPConnection):
    """A connection to an origin, or through a parent proxy."""

    response_class = StrictHTTPResponse

    def __init__(self, forward: OriginRequest, parent: ParentProxy | None, addresses: Resolver, guard: AddressPolicy,
                 trust: TrustStore) -> None:
        super().__init__(forward.target.host, forward.target.port)
        self.place = pool_key(forward, parent)
        self.parent = parent  # that it goes through
        self.blamed_name = forward.target.authority  # whose fault it is if nothing comes of it
        self.peer_address = ""  # the address that it is connected to
        self.guarded = False  # whether only clients on this host may reach that
        self.reached = False  # whether it has been open
        self.reusable = True  # whether the check of its target holds for the next request as well
        self.idle_since = 0.0  # monotonic
        self._forward = forward
        self._addresses = addresses
        self._guard = guard
        self._trust = trust

    def connect_tcp(self) -> None:
        """Open the connection, without TLS; OSError, Failure."""
        if self.parent is not None:
            try:
                self._dial_through(self.parent)
                return
            except (OSError, ValueError) as error:
                if self.sock is None:  # it is not the origin's fault
                    self._addresses.mark_failed(self.parent.place.uri)
                if not self.bypass_parent(error):
                    raise
        found = self._find(self._forward)
        self._open(found, CONNECT_TIMEOUT)
        # Clients on other machines were refused before.
        self.guarded = self._forward.client_is_local and is_near(self.sock.getpeername())

    def bypass_parent(self, error: Exception) -> bool:
        """Whether it does without its parent from now on, which has failed."""
        if self.parent is None or not self.parent.or_direct:
            return False
        log.debug("%s cannot be asked: %s.", self.blamed_name, explain_error(error))
        self.close()
        self.parent, self.blamed_name = None, self._forward.target.authority
        return True

    def _find(self, forward: OriginRequest) -> list[tuple[Any, ...]]:
        """The addresses that a request may go to; OSError, Failure."""
        target = forward.target
        found = self._addresses.resolve(target.host, target.port, forward.timeout_for(DNS_TIMEOUT), forward.client)
        return self._guard.filter(found, forward)

    def _open(self, found: list[tuple[Any, ...]], patience: float) -> None:
        self.sock = connect_fastest(found, self._forward.timeout_for(patience))
        self.peer_address = self.sock.getpeername()[0]
        for slower in itertools.takewhile(lambda address: address[4][0] != self.peer_address, found):
            self._addresses.mark_failed(slower[4][0])
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _dial_through(self, parent: ParentProxy) -> None:
        """Connect through a parent.  One on another machine resolves names for itself."""
        if parent.or_direct and self._addresses.failures.find(parent.place.uri, ORIGIN_BACKOFF):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "it could not be asked a moment ago")
        target, self.blamed_name = self._forward.target, "The parent proxy " + parent.place.authority
        # It is the operator who leads us there: only a circle is refused.
        found = self._find(replace_fields(self._forward, target=parent.place, client_is_local=True))
        self._check_target(any(is_local_address(way[4]) for way in found))
        self._open(found, PARENT_CONNECT_TIMEOUT if parent.or_direct else CONNECT_TIMEOUT)
        if target.scheme == "https":
            self.sock.settimeout(self._forward.timeout_for(CONNECT_TIMEOUT))
            connect_through_parent(self.sock, parent, target)
        self.blamed_name = target.authority

    def _check_target(self, beside: bool) -> None:
        """Check a target that a parent will connect to.  A parent on this host (``beside``) reaches all that
        this host reaches, so a name is resolved here as well; Failure if it leads here, or nowhere.

        The parent resolves it again, for each request: a name that changes in between is not noticed.
        """
        target, near = self._forward.target, self._forward.client_is_local
        numeric = is_numeric_host(target.host)
        try:
            found = self._find(self._forward) if numeric or beside and not near else []
        except (OSError, UnicodeError) as error:
            raise OriginError("%s cannot be checked, and the parent proxy is on this host: %s." % (
                target.authority, explain_error(error)), target) from None
        # A client on this host does not wait for a name server: its name may have led anywhere.
        self.guarded = near and (beside and not numeric or any(is_near(address[4]) for address in found))
        self.reusable = near or numeric or not beside or target.scheme == "https"

    def getresponse(self) -> http.client.HTTPResponse:
        """The answer's head; OSError, ValueError, http.client.HTTPException."""
        response = super().getresponse()
        if response.status == 407 and self.parent is not None:
            self.blamed_name = "The parent proxy " + self.parent.place.authority
            raise OSError(errno.EACCES, "it wants another name and password")
        return response

    def request_line(self, target: Target) -> tuple[str, Fields]:
        """The target of the request line, in absolute-form for a parent (RFC 9112 §3.2.2), and the fields
        that are for the parent."""
        if self.parent is None or target.scheme == "https":
            return target.path, ()
        return target.uri.rstrip("*") if target.path == "*" else target.uri, self.parent.fields

    def connect(self) -> None:
        """Open the connection, with TLS where the scheme asks for it; OSError, Failure."""
        self.reached = False
        self.connect_tcp()
        self.reached = True
        if self._forward.target.scheme == "https":
            self.sock.settimeout(self._forward.timeout_for(CONNECT_TIMEOUT))
            name = self.host.rstrip(".")  # as certificates and SNI have it (RFC 6066 §3)
            self.sock = self._trust.context().wrap_socket(self.sock, server_hostname=name)

    def is_idle(self) -> bool:
        """Whether the origin has neither closed it nor sent what nobody asked for."""
        return self.sock is not None and is_open_and_silent(self.sock)


class ConnectionPool:
    """Idle connections to origins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _idle
        self._idle: dict[PoolKey, list[OriginConnection]] = {}

    def acquire(self, place: PoolKey, now: float) -> OriginConnection | None:
        """A connection that seems alive, the last used first."""
        while True:
            with self._lock:
                idle = self._idle.get(place)
                connection = idle.pop() if idle else None
                if not idle:
                    self._idle.pop(place, None)
            if connection is None:
                return None
            if now - connection.idle_since < POOL_IDLE_TIMEOUT and connection.is_idle():
                return connection
            connection.close()

    def release(self, connection: OriginConnection, now: float) -> None:
        """Keep a connection for the next request; close the oldest where there are too many."""
        connection.idle_since = now
        with self._lock:
            idle = self._idle.setdefault(connection.place, [])
            idle.append(connection)
            surplus = idle[:-POOL_SIZE]
            del idle[:-POOL_SIZE]
            if sum(map(len, self._idle.values())) > POOL_TOTAL:
                oldest = min(self._idle.values(), key=lambda waiting: waiting[0].idle_since)
                surplus.append(oldest.pop(0))
                if not oldest:
                    del self._idle[next(place for place, waiting in self._idle.items() if waiting is oldest)]
        for other in surplus:
            other.close()

    def close_expired(self, now: float) -> None:
        """Close what has waited too long, and what its origin has closed."""
        surplus = []
        with self._lock:
            for place, waiting in list(self._idle.items()):
                surplus += [other for other in waiting
                            if now - other.idle_since > POOL_IDLE_TIMEOUT or not other.is_idle()]
                waiting[:] = [other for other in waiting if other not in surplus]
                if not waiting:
                    del self._idle[place]
        for other in surplus:
            other.close()

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            idle = [connection for waiting in self._idle.values() for connection in waiting]
            self._idle.clear()
        for connection in idle:
            connection.close()


class OriginResponse:
    """An answer of an origin: its head, and its body counted (DESIGN §3, the traps behind 1 and 7)."""

    start = 0  # offset of its first byte in the representation; only a verified remainder has another

    def __init__(self, head: ResponseHead, raw: StrictHTTPResponse, give_back: Callable[[bool], None],
                 count: Callable[[int], object], broke_off: Callable[[], None]) -> None:
        self.head = head
        # Bytes; None: unknown.  http.client forgets it as it reads.
        self.length: int | None = None if raw.chunked else raw.length
        self.end_is_known = raw.chunked or raw.length is not None  # whether the end will be known as such
        self._raw = raw
        self._chunks = ChunkedReader(raw.fp) if raw.chunked else None
        self._left = self.length
        self._give_back = give_back  # called once: True if the connection may be used again
        self._count = count  # told of each piece's bytes
        self._broke_off = broke_off
        self._open = True

    def read(self, size: int = COPY_SIZE) -> bytes:
        """Up to ``size`` body bytes as they come, b"" at the end; OriginFailure where it breaks off."""
        if not self._open or self._left == 0:
            self.close()
            return b""
        try:
            data = self._read(size)
        except OriginError:
            self._broke_off()
            raise
        self._left = None if self._left is None else self._left - len(data)
        self._count(len(data))
        if not data or self._left == 0:
            self._end(self._is_reusable())
        return data

    def set_deadline(self, seconds_left: float) -> None:
        """From now on reading it may take so long in all."""
        self._raw.hurry(seconds_left)

    def on_idle(self, call: Callable[[], object]) -> None:
        """What to do where nothing comes for PAUSE seconds."""
        self._raw.on_pause(call)

    def set_length(self, count: int) -> None:
        """The body is known to have so many bytes, however it is framed."""
        self.length = self._left = count
        self.end_is_known = True

    def _read(self, size: int) -> bytes:
        most = size if self._left is None else min(size, self._left)
        try:
            data = self._chunks.read(most) if self._chunks else self._raw.fp.read1(most)
        except (socket.timeout, TimeoutError):
            raise OriginTimeoutError("The origin went silent.") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TruncatedBodyError("The origin broke off: %s." % error) from None
        if not data and self._left:
            raise TruncatedBodyError("The origin closed the connection %d bytes early." % self._left)
        return data

    def close(self) -> None:
        """Release the connection; one with unread bytes is closed."""
        self._end(self._left == 0 and self._is_reusable())

    def _is_reusable(self) -> bool:
        return not self._raw.will_close and (self._chunks is None or self._chunks.ended)

    def _end(self, reusable: bool) -> None:
        if self._open:
            self._open = False
            self._give_back(reusable)


def _keep(first: OriginResponse | None, response: OriginResponse) -> OriginResponse:
    """The first of the redirects on the way; the others are closed."""
    if first is None:
        return response
    response.close()
    return first


def remainder_request(forward: OriginRequest, head: ResponseHead, offset: int) -> OriginRequest:
    """Ask for the rest of a representation, which may be no other (RFC 9110 §13.1.5, §14.2); OriginFailure
    where it has no strong validator to say so."""
    validator = strong_validator(head)
    if offset and validator is None:
        raise CannotResumeError("The download cannot be resumed: the origin sent no strong validator.")
    more = (("Range", "bytes=%d-" % offset), ("If-Range", validator or "")) if offset else ()
    return replace_fields(forward, fields=without_fields(forward.fields, ("range", "if-range")) + more)


def resumable_body(head: ResponseHead, size: int | None, offset: int, ask: Callable[[int], OriginResponse],
               response: OriginResponse | None = None) -> Generator[bytes, None, None]:
    """The bytes of a representation from ``offset`` to its end, over as many connections as it takes: the
    answer's at hand, if there is one, then what ``ask`` fetches from an offset (DESIGN §6.4); OriginFailure
    where that leads no further."""
    pauses = list(RESUME_BACKOFF)
    while True:
        begun = offset
        try:
            with contextlib.closing(response or ask(offset)) as answer:
                while data := answer.read(COPY_SIZE):
                    offset += len(data)
                    yield data
            if size in (None, offset):
                return
            raise TruncatedBodyError("The origin sent less than the rest.")
        except CannotResumeError:
            raise
        except OriginError:
            if offset >= begun + FULL_DOWNLOAD_RANGE:
                pauses = list(RESUME_BACKOFF)  # it does get on
            if not pauses or offset and strong_validator(head) is None:
                raise
        response = None
        time.sleep(pauses.pop(0))


def send_body(connection: OriginConnection, body: Readable, length: int | None) -> None:
    """Send a request's body, framed anew if it is chunked (RFC 9112 §7.1)."""
    while True:
        data = body.read(COPY_SIZE)
        if length is None:
            connection.send(b"%x\r\n%s\r\n" % (len(data), data))
        elif data:
            connection.send(data)
        if not data:
            return


def is_answered_before_body(sock: socket.socket, forward: OriginRequest) -> bool:
    """Whether the origin of a request with Expect: 100-continue answers it without its body (RFC 9110
    §10.1.1).  One that says nothing may not know the field: it gets the body after a moment."""
    if list_members(forward.fields, "Expect") != ["100-continue"] or hasattr(sock, "pending"):
        return False  # TLS lets nobody look ahead
    if not wait_until_ready(sock, CONTINUE_TIMEOUT):
        return False
    status = sock.recv(len("HTTP/1.1 1"), socket.MSG_PEEK)[9:]
    return status not in (b"1", b"")


class OriginClient:
    """Sends requests to origins, over pooled connections."""

    def __init__(self, count: Callable[[int], object], config: Config) -> None:
        self._pool = ConnectionPool()
        self._addresses = Resolver()
        self.guard = AddressPolicy()
        self._config = config
        self._trust = TrustStore(config.ca_file)
        self._count = count  # told of the body bytes that arrive
        self._tidied = 0.0  # monotonic
        self._open_hosts = functools.lru_cache(LARGE_MEMO)(self._is_open)

    def is_open(self, host: str) -> bool:
        """Whether clients on other machines may be given what comes from a host; remembered, as hits ask."""
        return self._open_hosts(host, int(time.time() / OPEN_FOR))

    def _is_open(self, host: str, _span: int) -> bool:
        try:
            return not any(is_near(found[4]) for found in self._addresses.resolve(host, 80, DNS_TIMEOUT))
        except (OSError, UnicodeError):  # without a network nothing is resolved, and people bring files
            return self._config.offline

    def fetch(self, forward: OriginRequest) -> OriginResponse:
        """Send a request and read the answer's head; OriginFailure or OriginTimeout.

        Where a redirect leads to HTML, the redirect itself is the answer: people shall see where a
        captive portal sends them.
        """
        if forward.deadline is None and forward.is_retryable:
            forward = replace_fields(forward, deadline=time.monotonic() + RESPONSE_HEAD_TIMEOUT)
        first: OriginResponse | None = None
        guarded = False
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = self._send_with_retry(forward)
                guarded = guarded or response.head.local_clients_only  # the way counts, not its end alone
                if guarded:
                    response.head = replace_fields(response.head, local_clients_only=True)
                onward = redirect_target(response.head, forward.target) if forward.follow_redirects else None
                if onward is None:
                    portal_page = response.head.status < 300 and "text/html" in media_type(response.head)
                    if first is None or not portal_page:
                        return response
                    response.close()
                    portal, first = first, None
                    return portal
                first = _keep(first, response)
                fields = forward.fields
                if not is_same_site(forward.target, onward):
                    fields = without_fields(fields, ("authorization", "cookie"))
                fields = (("Host", onward.authority),) + without_fields(fields, ("host",))
                forward = replace_fields(forward, target=onward, fields=fields)
        finally:
            if first is not None:
                first.close()
        raise OriginError("%s redirects more than %d times." % (forward.target.authority, MAX_REDIRECTS))

    def _send_with_retry(self, forward: OriginRequest) -> OriginResponse:
        """One request.  A pooled connection that the origin has closed meanwhile, or polluted, costs a
        silent second try, where the request may be repeated (RFC 9112 §9.3.1)."""
        connection = self._connection(forward)
        pooled = self._pool.acquire(connection.place, time.monotonic()) if forward.is_retryable else None
        with self._translate_errors(connection, forward.target):
            if pooled is not None:
                connection.peer_address = pooled.peer_address  # if that one falls silent
                # RemoteDisconnected is one, and a parent's 407 the second.
                with contextlib.suppress(ConnectionError, PermissionError, ValueError):
                    return self._send_once(pooled, forward)
            try:
                return self._send_once(connection, forward)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not forward.is_retryable or not connection.bypass_parent(error):
                    raise
            return self._send_once(connection, forward)

    def _connection(self, forward: OriginRequest) -> OriginConnection:
        parent = parent_proxy_for(forward.target, self._config)
        return OriginConnection(forward, parent, self._addresses, self.guard, self._trust)

    def connect(self, target: Target, near: bool, client: str = "") -> socket.socket:
        """A bare connection, for a tunnel; OriginFailure, Failure."""
        deadline = time.monotonic() + RESPONSE_HEAD_TIMEOUT
        forward = OriginRequest("CONNECT", target, (), client_is_local=near, deadline=deadline, client=client)
        connection = self._connection(forward)
        with self._translate_errors(connection, target), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.connect_tcp()
            stack.pop_all()
        assert isinstance(connection.sock, socket.socket)  # noqa: S101 (for the type checker)
        return connection.sock

    @contextlib.contextmanager
    def _translate_errors(self, connection: OriginConnection, target: Target) -> Iterator[None]:
        """Failures to ask become words for the client: 504 timed out, 502 all else."""
        try:
            yield
        except (socket.timeout, TimeoutError) as error:
            self._addresses.mark_failed(connection.peer_address)
            why = ": " + explain_error(error) if str(error) not in ("", "timed out") else ""
            raise OriginTimeoutError("%s did not answer in time%s." % (connection.blamed_name, why), target) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._addresses.mark_failed(connection.peer_address)
            sentence = "%s cannot be asked: %s." % (connection.blamed_name, explain_error(error))
            raise OriginError(sentence, target, not connection.reached) from None

    def fetch_remainder(self, forward: OriginRequest, head: ResponseHead, size: int | None, offset: int) -> OriginResponse:
        """The rest, from ``offset``, of the representation that ``head`` belongs to; OriginFailure where
        what comes is another."""
        response = self.fetch(remainder_request(forward, head, offset))
        if response.head.status in (*UNAVAILABLE_STATUSES, 429):
            response.close()
            raise OriginError("%s answers %d." % (forward.target.authority, response.head.status))
        if not is_remainder(response.head, head, size, offset):
            response.close()
            raise CannotResumeError("The download cannot be resumed: the origin has another file now.")
        part = content_range(response.head)
        if part is not None:
            response.set_length(part[1] - offset)
        response.start = offset
        return response

    def close_idle(self) -> None:
        """Close connections that have been idle for too long."""
        now = time.monotonic()
        if now - self._tidied > POOL_CLEANUP_INTERVAL:
            self._tidied = now
            self._pool.close_expired(now)

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def _send_once(self, connection: OriginConnection, forward: OriginRequest) -> OriginResponse:
        requested = time.time()
        try:
            if connection.sock is None:
                connection.connect()
                mark(forward.timings, "connected")
            connection.sock.settimeout(forward.timeout_for(ORIGIN_TIMEOUT))
            line, more = connection.request_line(forward.target)
            connection.putrequest(forward.method, line, skip_host=True, skip_accept_encoding=True)
            for name, text in forward.fields + more:
                connection.putheader(name, text.encode("latin-1"))
            connection.endheaders()
            if forward.body is not None and not is_answered_before_body(connection.sock, forward):
                # An origin that refuses the body half-way (413, say) has answered before it closes.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    send_body(connection, forward.body, forward.length)
            raw = connection.getresponse()
            mark(forward.timings, "origin head")
        except BaseException:
            connection.close()
            raise
        assert isinstance(raw, StrictHTTPResponse)  # noqa: S101 (for the type checker)

        def give_back(reusable: bool) -> None:
            raw.close()
            # Some answer HEAD with a body, which may come too late to be seen; and a body that was not
            # asked for may be waited for all the same.
            if reusable and connection.reusable and forward.method != "HEAD" and forward.body is None:
                self._pool.release(connection, time.monotonic())
            else:
                connection.close()

        received = time.time()
        head = ResponseHead(raw.status, raw.reason, raw.pairs, final_uri=forward.target.uri, request_time=requested,
                    response_time=received, local_clients_only=connection.guarded)
        head = with_date(head, received)
        broke_off = functools.partial(self._addresses.mark_failed, connection.peer_address)
        return OriginResponse(head, raw, give_back, self._count, broke_off)


# ---------------------------------------------------------------------------------------------
# 9 Downloads
# ---------------------------------------------------------------------------------------------
#
# The way of a response that is stored.  One thread writes, any number of clients read:
#
#   origin ──► OriginResponse ──► Downloader.download ──► PartialFile ──► TailingBody ──► client
#                                        │                               ▲
#                                        └─ Flight.set_received ─────────┘ wakes the readers
#
# If another instance is the writer, a PeerFollower in this process takes the place of the Downloader: it
# watches the other's partial file grow, and tells the flight.


@dataclasses.dataclass
class IterableBody:
    """A response body whose chunks come from an iterable: bytes, file slices, or an origin's response.

    TailingBody is the one kind of body that must wait for its chunks, and LinkRewritingBody changes them.
    """

    length: int | None
    parts: Iterable[bytes | FileSlice]
    release: Callable[[], object] | None = None  # closes the file or the connection behind ``parts``
    origin_bytes: int = 0
    live: bool = False

    def chunks(self) -> Iterator[bytes | FileSlice]:
        """Yield the body in order."""
        return iter(self.parts)

    def close(self) -> None:
        """Release the file or the connection."""
        if self.release is not None:
            self.release()


def bytes_body(data: bytes) -> IterableBody:
    """Make a body of bytes in memory."""
    return IterableBody(len(data), (data,))


def read_file_slice(part: FileSlice) -> bytes:
    """Read a small slice; StorageError if the disk fails, or if the file has become shorter."""
    try:
        data = part.file.read_at(part.size, part.start)
    except OSError as error:
        raise StorageError(error) from None
    if len(data) != part.size:
        raise StorageError(OSError(errno.EIO, "the stored body was cut"))
    return data


@dataclasses.dataclass(frozen=True)
class Download:
    """A response on its way from an origin to the disk, with all that its writer and its readers need.

    Each follower makes one of its own: if the disk fails, it asks the origin with its own request.
    """

    partial: PartialFile
    flight: Flight
    origin_request: OriginRequest  # for the whole representation; remainders are asked for with its fields
    response: OriginResponse | None = None  # None: the writer resumes the partial file
    replaces: bool = False  # the origin says that the stored response is outdated


class TailingBody:
    """A response body read from a partial file while it grows.

    Every client of a flight reads one, also the client that started it:

    1. the writer appends bytes to the partial file, then calls ``Flight.set_received``;
    2. that wakes the readers, and each reads on from its own offset, as fast as its client takes it;
    3. the last bytes are announced only when the file is in its place (invariant 3).

    If the disk fails, or the download stands still, each reader fetches the remainder from the origin, from
    its own offset (invariant 10).
    """

    live = True

    def __init__(self, download: Download, selection: SelectedResponse, origin: OriginClient) -> None:
        """Read ``download.partial``, which the caller has acquired and close() releases."""
        self.length = selection.length
        self.origin_bytes = selection.overhead
        # Monotonic time by which the first byte must have come: set if a stored copy could answer instead.
        self.first_byte_deadline: float | None = None
        self._download = download
        self._origin = origin
        self._spans = selection.spans
        self._started = False  # whether a byte of the representation has been yielded
        self._open = True

    def chunks(self) -> Iterator[bytes | FileSlice]:
        """Yield the body as it arrives; OriginError if it cannot be completed."""
        for span in self._spans:
            if isinstance(span, bytes):
                yield span
            else:
                yield from self._follow(*span)

    def _follow(self, offset: int, stop: int) -> Iterator[bytes | FileSlice]:
        while offset < stop:
            deadline = self.first_byte_deadline
            try:
                timeout = max(0.0, deadline - time.monotonic()) if deadline else FOLLOWER_STALL_TIMEOUT
                received = min(stop, self._download.flight.wait_for_bytes(offset, timeout))
                if received <= offset:
                    return  # the body is complete; its length was not known before
                part = self._read(offset, received)
            except (StorageError, OSError) as error:
                if deadline is not None and getattr(error, "code", 0) == errno.ETIMEDOUT:
                    raise OriginTimeoutError("The first byte did not come in time.") from None
                yield from self._fetch_remainder(offset, stop)
                return
            offset += part.size if isinstance(part, FileSlice) else len(part)
            self.first_byte_deadline = None
            self._started = True
            yield part

    def _read(self, offset: int, received: int) -> bytes | FileSlice:
        """Read received bytes; OSError, StorageError.

        Large parts are left to sendfile().  A body that is sent with chunked coding cannot use it: the size
        of each chunk goes before its bytes.
        """
        partial = self._download.partial
        use_sendfile = received - offset > SMALL_BODY and self.length is not None and hasattr(os, "sendfile")
        # sendfile() on a file that was cut would wait for ever, so its last byte is read first.
        data = partial.read_at(1, received - 1) if use_sendfile else partial.read_at(
            min(COPY_SIZE, received - offset), offset)
        if not data:
            raise StorageError(OSError(errno.EIO, "the partial file was cut"))
        return FileSlice(partial, offset, received, self._fetch_remainder) if use_sendfile else data

    def _fetch_remainder(self, offset: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from ``offset`` to ``stop`` straight from the origin, for this client alone."""
        partial = self._download.partial
        if self._started and strong_validator(partial.head) is None:
            raise CannotResumeError("The download cannot be resumed: the origin sent no strong validator.")
        ask = functools.partial(
            self._origin.fetch_remainder, self._download.origin_request, partial.head, partial.length)
        with contextlib.closing(resumable_body(partial.head, partial.length, offset, ask)) as pieces:
            for piece in pieces:
                data = piece[:stop - offset]
                offset += len(data)
                self.origin_bytes += len(data)
                self._started = True
                yield data
                if offset >= stop:
                    return

    def close(self) -> None:
        """Release the partial file."""
        if self._open:
            self._open = False
            self._download.partial.release()


class LinkRewritingBody:
    """A response body whose links are rewritten on the way, so that they lead through the proxy."""

    length: int | None = None
    live = False

    def __init__(self, body: ResponseBody, links: re.Pattern[bytes], base: str, page: Target) -> None:
        self._body = body
        self._links = links
        self._base_and_page = base, page

    @property
    def origin_bytes(self) -> int:
        """Bytes of the original body that did not come from the cache."""
        return self._body.origin_bytes

    def chunks(self) -> Iterator[bytes | FileSlice]:
        """Yield the rewritten body as it arrives."""
        return rewrite_links(self._pieces(), self._links, *self._base_and_page)

    def _pieces(self) -> Iterator[bytes]:
        for part in self._body.chunks():
            if isinstance(part, bytes):
                yield part
                continue
            for start in range(part.start, part.stop, COPY_SIZE):
                try:
                    data = read_file_slice(FileSlice(part.file, start, min(start + COPY_SIZE, part.stop)))
                except StorageError:
                    if part.fallback is None:
                        raise
                    yield from part.fallback(start, part.stop)
                    break
                yield data

    def close(self) -> None:
        """Close the original body."""
        self._body.close()


# Responses to clients, by where their bodies come from


def response_from_store(request: Request, stored: StoredResponse, status: CacheStatus) -> Response:
    """Answer with a stored response, which the body closes: preconditions, ranges, Age (RFC 9111 §5.1)."""
    head = with_age(stored.head, time.time())
    selection = select_response(request, head, head.size, MULTIPART_BOUNDARY)
    parts = [span if isinstance(span, bytes) else FileSlice(stored, *span) for span in selection.spans]
    body = IterableBody(selection.length, parts, stored.close, selection.overhead)
    return Response(selection.head, body, status, counts_as_cached=True)


def response_from_partial(request: Request, download: Download, origin: OriginClient, status: CacheStatus,
                          head: ResponseHead) -> Response:
    """Answer with a partial file while it grows; ``head`` is the head that this client may see.

    The caller has acquired the partial file, and the body releases it.
    """
    fields = without_fields(head.fields, ("accept-ranges",)) + (("Accept-Ranges", "bytes"),)
    head = replace_fields(head, fields=fields)
    selection = select_response(request, head, download.partial.length, MULTIPART_BOUNDARY)
    counts_as_cached = status.outcome in (Outcome.COLLAPSED, Outcome.SHARED)
    return Response(selection.head, TailingBody(download, selection, origin), status, counts_as_cached)


def response_from_origin(request: Request, response: OriginResponse, decision: CacheDecision,
                         detail: str = "") -> Response:
    """Pass an origin's response through to the client, without storing it.

    Hop-by-hop fields end here (RFC 9110 §7.6.1).  The length of a HEAD's body is that of the GET's.
    """
    head = replace_fields(response.head, fields=end_to_end(response.head.fields))
    outcome = Outcome.BYPASS if decision.forward in ("bypass", "method") else Outcome.RELAYED
    status = CacheStatus(outcome, decision.forward, head.status, detail=detail)
    length = content_length(response.head.fields) if request.method == "HEAD" else response.length
    return Response(head, IterableBody(length, iter(response.read, b""), response.close, live=True), status)


def shared_cache_status(decision: CacheDecision, head: ResponseHead) -> CacheStatus:
    """Describe a response whose body was found to be the same as another mirror's file."""
    detail = "same as " + head.same_as
    if digest_in_name(head.key):  # the origin was not asked at all
        return CacheStatus(Outcome.SHARED, detail=detail)
    return CacheStatus(Outcome.SHARED, decision.forward, 206, stored=True, detail=detail)


# What clients may have, and what origins are asked for


def look_up_for_client(store: Store, origin: OriginClient, request: Request) -> StoredResponse | None:
    """Look up the stored response for a request; None if there is none that its client may have.

    Responses that came from protected addresses are for clients on this host alone.  A body file without a
    head does not tell where it came from, so the address of its host is checked again.
    """
    stored = store.lookup(request.key)
    if stored is None or request.client_is_local:
        return stored
    if stored.head.local_clients_only or not (
            stored.described or origin.is_open(parse_target(request.key).host)):
        stored.close()
        return None
    return stored


def may_share_download(request: Request, head: ResponseHead) -> bool:
    """Return whether a request's client may have what is being downloaded for another client.

    The key is the same.  What may differ is where the clients are, and the fields that Vary names: then the
    follower asks the origin for itself.  Requests with Authorization never get here (see SharedFetch).
    """
    allowed = request.client_is_local or not head.local_clients_only
    return allowed and selecting_fields(request, head) == head.vary


def full_request(request: Request, config: Config, deadline: float | None = None) -> OriginRequest:
    """Make the request for a whole representation that may be stored, whatever part the client asked for."""
    return OriginRequest(
        "GET", request.target, origin_request_fields(request, config, identity=True),
        client_is_local=request.client_is_local, client=request.client, deadline=deadline,
        follow_redirects=POLICIES[classify_name(request.key)].redirects, timings=request.timings)


def fetch_full(origin: OriginClient, origin_request: OriginRequest) -> OriginResponse:
    """Ask for a whole representation; OriginError, also if the response does not answer that."""
    response = origin.fetch(origin_request)
    status = response.head.status
    is_conditional = any(name.startswith("If-") for name, _ in origin_request.fields)
    if status in (206, 416) or status == 304 and not is_conditional:
        response.close()
        raise OriginError("%s answered %d to a plain request." % (origin_request.target.authority, status))
    return response


def confirm_bare_file(origin: OriginClient, origin_request: OriginRequest, request: Request,
                      stored: StoredResponse, config: Config) -> ResponseHead | None:
    """Return the origin's head for a body file without one, if size and date show that it is the same."""
    response = origin.fetch(replace_fields(origin_request, method="HEAD"))
    response.close()
    head, size = response.head, content_length(response.head.fields)
    modified = parse_date(field_value(head.fields, "Last-Modified"))
    same = size == stored.head.size and modified == stored.head.mtime_ns // 10**9
    if not same or why_not_storable(replace_fields(request, method="GET"), head, config):
        return None
    return replace_fields(stored.head, fields=storable_fields(head.fields), final_uri=head.final_uri,
                          request_time=head.request_time, response_time=head.response_time)


# Failures


def _site(target: Target) -> str:
    return "%s://%s" % (target.scheme, target.authority)


class RecentFailures:
    """Remembers origins and disk errors that failed a moment ago (a circuit breaker).

    Clients do not wait again for an origin that is known to be down, and the log has one line for each
    failure, not one for each request.  Only requests that a stored copy can answer are spared the wait: all
    others are still sent to the origin, and show when it is back.
    """

    def __init__(self, on_full_disk: Callable[[], None]) -> None:
        self._on_full_disk = on_full_disk
        self._unreachable = RecentEvents()  # by scheme and authority; by cache key, if a redirect leads there
        self._errors = RecentEvents()  # by cache key: shown on the status page, but not acted upon
        self._lock = threading.Lock()  # guards all below
        self._disk_error: StorageError | None = None  # the last that was logged; None: something was stored
        self._disk_failed_at = 0.0  # monotonic

    def origin_down_reason(self, request: Request) -> str:
        """Return why the origin of a request was unreachable in the last ORIGIN_BACKOFF seconds, or ""."""
        events = self._unreachable.gather(ORIGIN_BACKOFF, _site(request.target), request.key)
        return events[0][-1] if events else ""

    def origin_failed(self, request: Request, error: OriginError) -> None:
        """Record that a cached copy is served because an origin failed.

        Only a failure to connect counts for other requests: for the whole origin, or for one cache key if a
        redirect led elsewhere.  Any other failure may be the fault of this very request, and one client's
        request must not decide what other clients get (invariant 12).
        """
        lasts = error.unreachable and field_value(request.fields, "Authorization") is None
        redirected = error.target is not None and _site(error.target) != _site(request.target)
        events = self._unreachable if lasts else self._errors
        name = _site(request.target) if lasts and not redirected else request.key
        is_new = events.note_first(name, ORIGIN_BACKOFF)
        events.note(name, str(error))
        log.log(logging.WARNING if is_new else logging.DEBUG, "%s Serving the stored copy%s.", error,
                " for the next %d s" % ORIGIN_BACKOFF if lasts else "")

    def origin_answered(self, request: Request) -> None:
        """Forget the failures of an origin: it has answered."""
        for events in (self._unreachable, self._errors):
            events.forget(_site(request.target), request.key)

    def disk_failed(self, error: StorageError) -> str:
        """Log a disk error once for each kind, and return the reason for Cache-Status."""
        if error.code == errno.EAGAIN:
            return "another instance is storing it"
        with self._lock:
            is_new = self._disk_error is None or self._disk_error.code != error.code
            self._disk_error, self._disk_failed_at = error, time.monotonic()
        if error.code == errno.ENOSPC:
            self._on_full_disk()
        remedy = {errno.ENOSPC: " Free some space.", errno.EACCES: " Let this user write the cache root.",
                  errno.EROFS: " Mount the cache root for writing."}.get(error.code or 0, "")
        log.log(logging.WARNING if is_new else logging.DEBUG,
                "Nothing can be stored: %s. Requests are still passed to the origins.%s", error, remedy)
        return "not stored: %s" % error

    def disk_recovered(self) -> None:
        """Record that a response was stored."""
        with self._lock:
            recovered, self._disk_error = self._disk_error is not None, None
        if recovered:
            log.warning("The cache can be written again.")

    def disk_error(self) -> str:
        """Return why nothing could be stored lately, or "".

        An old error does not count: another process may have stored something since.
        """
        with self._lock:
            is_recent = time.monotonic() - self._disk_failed_at < EVICTION_INTERVAL
            return truncate_middle(str(self._disk_error), 150) if self._disk_error and is_recent else ""

    def snapshot(self) -> list[dict[str, Any]]:
        """Describe the last failures of origins for the status page, the newest last."""
        events = self._errors.gather(ORIGIN_BACKOFF) + self._unreachable.gather(ORIGIN_BACKOFF)
        return [{"origin": displayable_uri(name), "reason": truncate_middle(reason, 150),
                 "seconds": round(ORIGIN_BACKOFF - age)} for name, age, reason in events[-10:]]


# The same file from another mirror


class LocalFileResponse(OriginResponse):
    """A stored file that is read as if an origin sent it, to make a copy of it.

    If it cannot be read to its end, the download continues from the origin like any other.
    """

    def __init__(self, stored: StoredResponse) -> None:  # without the base class's, which needs a connection
        self.head = stored.head
        self.length: int | None = stored.head.size
        self.end_is_known = True
        self._stored = stored
        stored.file.seek(0)

    def on_idle(self, call: Callable[[], object]) -> None:
        """Do nothing: a disk does not pause."""

    def read(self, size: int = COPY_SIZE) -> bytes:
        """Read up to ``size`` bytes, b"" at the end; OriginError if that fails or the file was changed."""
        try:
            data, info = self._stored.file.read(size) or b"", os.fstat(self._stored.fileno())
        except OSError as error:
            raise TruncatedBodyError("The copy cannot be read: %s." % error) from None
        if (info.st_size, info.st_mtime_ns) != (self.head.size, self.head.mtime_ns):
            raise TruncatedBodyError("The file to copy is being changed.")
        return data

    def close(self) -> None:
        """Close the file."""
        self._stored.close()


def _read_proof(response: OriginResponse, origin_request: OriginRequest) -> bytes:
    """Read a range of at most PROOF_SIZE bytes, and up to one byte more if the origin sends too many;
    OriginError, socket.timeout."""
    data = b""
    response.set_deadline(origin_request.timeout_for(VALIDATION_TIMEOUT))  # its client waits for a first byte
    while len(data) <= PROOF_SIZE and (piece := response.read(PROOF_SIZE)):
        data += piece
    return data


def _under_other_head(stored: StoredResponse, head: ResponseHead) -> StoredResponse:
    """Give a stored body the head that it has at another mirror."""
    # A query may hold another client's password, so it is not shown.
    same_as = stored.head.key.partition("?")[0] if stored.name else stored.head.same_as
    local_clients_only = head.local_clients_only or stored.head.local_clients_only
    return replace_fields(stored, head=replace_fields(
        head, size=stored.head.size, mtime_ns=stored.head.mtime_ns, local_clients_only=local_clients_only,
        same_as=same_as))


def _has_named_digest(key: str, stored: StoredResponse) -> bool:
    """Return whether a body has the digest in a key's name, if that has one.  An unreadable body has not."""
    with contextlib.suppress(StorageError):
        return matches_digest_in_name(key, stored)
    return False


class MirrorDeduplicator:
    """Finds a stored file that is identical to one requested from another mirror.

    Two files of one name are identical if that name holds their digest, or else if the origin shows it: by
    the size and by the first and last bytes, which hold the checksums of an archive.

    Public: ``find_identical``, ``find_substitute``, ``check_status``, ``has_candidates``.
    """

    def __init__(self, store: Store, origin: OriginClient, config: Config) -> None:
        self._store = store
        self._origin = origin
        self._sharing = config.sharing
        self._adopted_folders = tuple(os.path.join(folder, "") for folder in config.adopt)

    def find_identical(self, request: Request, origin_request: OriginRequest,
                       config: Config) -> StoredResponse | OriginResponse | None:
        """Find an identical file, under the head that it has at this mirror.

        Return the origin's response instead if the origin answered the probe with the whole file, or None.
        OriginError if the origin cannot be asked, and there is a substitute.
        """
        try:
            with self._candidates(request) as candidates:
                if digest_in_name(request.key):
                    return self._match_digest(request, candidates)
                if candidates:
                    return self._match_probe(request, origin_request, candidates, config)
        except (CannotResumeError, StorageError, OSError) as error:
            log.debug("%s: %s", request.key, error)
        except OriginError:
            if self._has_substitute(request):
                raise
        return None

    def check_status(self, request: Request, response: OriginResponse) -> None:
        """Raise OriginError if a mirror is unavailable, and there is a substitute."""
        if response.head.status in UNAVAILABLE_STATUSES and self._has_substitute(request):
            response.close()
            raise OriginError("%s answers %d." % (request.target.authority, response.head.status))

    def find_substitute(self, request: Request) -> StoredResponse | None:
        """Find a file of the same name from a mirror that has lately been shown to have the same files."""
        has_digest = digest_in_name(request.key) is not None
        with self._candidates(request) as candidates:
            for candidate in candidates:
                prefixes = mirror_prefixes(request.key, candidate.head.key)
                if _has_named_digest(request.key, candidate) if has_digest else (
                        candidate.name and self._store.names.are_mirrors(prefixes)):
                    candidates.remove(candidate)
                    return candidate
        return None

    def _has_substitute(self, request: Request) -> bool:
        stored = self.find_substitute(request)
        _close(stored)
        return stored is not None

    def has_candidates(self, request: Request) -> bool:
        """Return whether any stored file might be identical."""
        with self._candidates(request) as candidates:
            return bool(candidates)

    @contextlib.contextmanager
    def _candidates(self, request: Request) -> Iterator[list[StoredResponse]]:
        """Open the files of the same name that the client may have; those left in the list are closed."""
        candidates: list[StoredResponse] = []
        try:
            for stored in self._open_same_name(request):
                if stored.head.vary or field_value(stored.head.fields, "Content-Encoding"):
                    stored.close()
                else:
                    candidates.append(stored)
            yield candidates
        finally:
            for stored in candidates:
                stored.close()

    def _open_same_name(self, request: Request) -> Iterator[StoredResponse]:
        name, has_digest = shareable_name(request.key), digest_in_name(request.key) is not None
        # A client that says no-cache doubts what the proxy has: it may have seen a wrong digest, say.
        doubted = "no-cache" in cache_directives(request.fields)
        if not name or doubted or field_value(request.fields, "Authorization") is not None:
            return
        # A file fetched over http is never used for an https URL, unless a digest in the URL proves it.
        schemes = ("http:", "https:") if request.target.scheme == "http" or has_digest else ("https:",)
        if self._sharing or has_digest:
            for key in [*self._store.names.lookup(name), request.key.replace("%2B", "+")]:
                if key != request.key and key.startswith(schemes):
                    stored = look_up_for_client(self._store, self._origin, replace_fields(request, key=key))
                    if stored is not None:
                        yield stored
        for path in self._store.adopted.lookup(name) if self._adopted_folders else ():
            file, info = _open(path) if path.startswith(self._adopted_folders) else (None, _NO_STAT)
            if file is not None:
                head = replace_fields(_bare_head(request.key, info), same_as="an adopted file")
                yield StoredResponse(file, head, "", False)

    def _match_digest(self, request: Request, candidates: list[StoredResponse]) -> StoredResponse | None:
        """Take the first candidate that has the digest in the name, with those of its fields that describe
        the file and not the mirror it came from."""
        for candidate in candidates:
            if _has_named_digest(request.key, candidate):
                candidates.remove(candidate)
                fields = tuple(field for field in candidate.head.fields
                               if field[0].lower() in ("content-type", "last-modified", "date"))
                head = replace_fields(candidate.head, fields=fields, key=request.key)
                return _under_other_head(candidate, head)
        return None

    def _match_probe(self, request: Request, origin_request: OriginRequest, candidates: list[StoredResponse],
                     config: Config) -> StoredResponse | OriginResponse | None:
        """Take the candidate whose size, first and last bytes are those that the origin shows."""
        origin_request = replace_fields(origin_request, deadline=time.monotonic() + VALIDATION_TIMEOUT)
        fields = origin_request.fields + (("Range", "bytes=0-%d" % (PROOF_SIZE - 1)),)
        response = self._origin.fetch(replace_fields(origin_request, fields=fields))
        if response.head.status not in (206, 304, 416):
            return response
        with contextlib.closing(response):
            first = _read_proof(response, origin_request)
        start, stop, size = content_range(response.head) or (0, 0, 0)
        head = complete_head(request, response.head)
        if why_not_storable(replace_fields(request, method="GET"), head, config) or start or not size \
                or stop != min(PROOF_SIZE, size):
            return None
        same = [one for one in candidates if one.head.size == size and one.read_at(stop, 0) == first]
        tail = max(stop, size - PROOF_SIZE)
        if same and tail < size:
            with contextlib.closing(self._origin.fetch_remainder(origin_request, head, size, tail)) as rest:
                last = _read_proof(rest, origin_request)
            same = [one for one in same if one.read_at(PROOF_SIZE, tail) == last]
        for one in candidates:
            if one.name:
                prefixes = mirror_prefixes(request.key, one.head.key)
                self._store.names.record_comparison(prefixes, one in same)
        if not same:
            return None
        candidates.remove(same[0])
        return _under_other_head(same[0], head)


# The writer


class DownloadLocks:
    """Decides which of the instances that share a cache root downloads a key.

        ====================  ==================================  =================================
        setting               who downloads                       each instance writes
        ====================  ==================================  =================================
        locks work            who has the lock on the file        the one partial file of the key
        --barrier             who has the lease in memcached      a partial file named by its lease
        neither               every instance, for its own clients a partial file with a random name
        ====================  ==================================  =================================
    """

    def __init__(self, store: Store, config: Config) -> None:
        why = "" if config.barrier else why_locks_fail(store.metadata_folder)
        if why:
            log.warning("Instances that share %s would download each on its own: %s. --barrier "
                        "memcached://HOST:PORT lets them share.", store.root, why)
        self.partials = PartialStore(store)
        self.leases = LeaseManager(config.barrier, bool(why))

    def acquire(self, key: str) -> PartialFile | None:
        """Lock a key, and return its partial file; None if another instance downloads it; StorageError.

        The caller must call release() at the end, or discard() if nothing was written.
        """
        owner, sole = self.leases.acquire(key)
        if sole is False:
            return None
        try:
            return self.partials.open_for_writing(key, owner, bool(sole))
        except StorageError:
            self.leases.release(key, owner)
            raise

    def discard(self, partial: PartialFile | None) -> None:
        """Remove a partial file that was not written, and unlock its key."""
        if partial is not None:
            partial.discard()
            self.release(partial)

    def release(self, partial: PartialFile) -> None:
        """Unlock the key of a partial file that was stored, kept or discarded."""
        partial.release()
        self.leases.release(partial.head.key, partial.owner)

    def is_lost(self, partial: PartialFile) -> bool:
        """Return whether another instance has taken over, because the lease was not renewed in time."""
        return self.leases.is_lost(partial.owner)

    def is_downloading_elsewhere(self, key: str) -> bool:
        """Return whether another instance downloads a key."""
        holder = self.leases.holder(key)
        partial = None if holder or self.leases.uses_memcached else self.partials.open_for_reading(key)
        if partial is None:
            return bool(holder)
        with contextlib.suppress(OSError):
            try:
                return not partial.try_lock()
            finally:
                partial.release()
        return False

    def invalidate(self, key: str) -> None:
        """Prevent other instances from storing what they are downloading under a key."""
        self.partials.unlink(key, self.leases.holder(key))

    def close(self) -> None:
        """Stop renewing leases."""
        self.leases.close()


class OrphanLimiter:
    """Limits how many downloads continue without a client: the oldest ones may, if they are fast enough.

    A client that breaks off often comes back for the same file, so its download should not be lost.  But a
    client could start downloads and leave, again and again, and each holds a thread, a connection and disk
    space.  What a stopped download has received is kept for the next request (see ``keep_for_resume``).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards _orphans
        self._orphans: dict[int, tuple[float, int]] = {}  # time (monotonic) and size at the last speed check

    def may_continue(self, partial: PartialFile) -> bool:
        """Return whether a download may continue: it has clients, or it is one of the permitted orphans."""
        has_readers, now = partial.has_readers(), time.monotonic()
        with self._lock:
            since, size = self._orphans.get(id(partial), (now, partial.size))
            check_due = now - since > RATE_WINDOW
            if has_readers or check_due and partial.size - size < MIN_RATE * (now - since):
                self._orphans.pop(id(partial), None)
                return has_readers
            if check_due or id(partial) not in self._orphans and len(self._orphans) < self._limit:
                self._orphans[id(partial)] = now, partial.size
            return id(partial) in self._orphans

    def remove(self, partial: PartialFile) -> None:
        """Forget a download that has ended."""
        with self._lock:
            self._orphans.pop(id(partial), None)


class Downloader:
    """The tee: downloads responses into partial files, from which all their clients read.

    Each download runs in a thread of its own, which is the only writer of its partial file (invariant 2).  It
    belongs to the cache and not to a client: it continues when clients leave, and no client slows it down.

    Public: ``start``; ``download`` for a thread that already exists; ``snapshot``.
    """

    def __init__(self, config: Config, store: Store, flights: SingleFlight, origin: OriginClient,
                 failures: RecentFailures, on_replaced: Callable[[OriginRequest], None]) -> None:
        self.store = store
        self.flights = flights
        self.origin = origin
        self.failures = failures
        self.locks = DownloadLocks(store, config)
        self._on_replaced = on_replaced  # called when a stored response was replaced by a newer one
        self._orphans = OrphanLimiter(config.max_orphans)
        self._lock = threading.Lock()  # guards _running
        self._running: dict[PartialFile, tuple[float, int]] = {}  # start (monotonic), first offset

    def snapshot(self) -> list[dict[str, Any]]:
        """Describe the running downloads for the status page, the oldest first; rates are in bytes/s."""
        now = time.monotonic()
        with self._lock:
            running = list(itertools.islice(self._running.items(), MAX_ROWS))
        return [{"uri": displayable_uri(partial.head.key), "bytes": partial.size, "length": partial.length,
                 "rate": int((partial.size - start) / max(now - since, 0.001)),
                 "clients": partial.reader_count()}
                for partial, (since, start) in running]

    def start(self, request: Request, decision: CacheDecision, head: ResponseHead,
              download: Download) -> Response:
        """Start a download, and return the response for its first client; StorageError.

        ``head`` is the origin's, of the whole representation.  Followers may join as soon as the flight has
        the partial file.
        """
        response, partial = download.response, download.partial
        assert response is not None  # noqa: S101 (for the type checker)
        stored_head = replace_fields(head, fields=storable_fields(head.fields))
        # What is left of an earlier download is kept only if this response continues it (start > 0).
        length = None if response.length is None else response.length + response.start
        partial.start(stored_head, length, response.start)
        outcome = Outcome.UPDATED if download.replaces else Outcome.MISS
        status = CacheStatus(outcome, decision.forward, response.head.status, stored=True)
        status = shared_cache_status(decision, head) if head.same_as else status
        # Only this client gets the fields that are not stored, such as Set-Cookie.
        own_head = replace_fields(stored_head, fields=end_to_end(head.fields))
        partial.acquire()
        result = response_from_partial(request, download, self.origin, status, own_head)
        try:
            start_thread(self.download, download)
        except StorageError:
            result.body.close()
            raise
        download.flight.publish(partial)
        return result

    def download(self, download: Download) -> None:
        """Download to the end, store the result, and finish the flight; in a thread of its own.

        1. Receive: read from the origin, write to the partial file, announce all but the last bytes.
        2. Commit: flush the file and give it its place in the cache, or discard it.
        3. Finish the flight: take it out of the barrier, then announce the last bytes (invariant 3).  A
           client that has them and asks again finds the response stored.
        4. Release the lock: with memcached that may take a moment, so no client waits for it.
        """
        partial, flight = download.partial, download.flight
        result = FlightResult.FAILED
        error: Exception | None = None
        try:
            self._receive(download)
            result = FlightResult.WHOLE
            result = self._commit(download)
        except StorageError as failure:
            # If all bytes were received, readers have them.  Else each asks the origin for the remainder.
            error, result = failure, result if result is FlightResult.WHOLE else FlightResult.ALONE
            self.failures.disk_failed(failure)
            partial.discard(cut=result is FlightResult.ALONE)
            if download.replaces:
                partial.delete_stored()  # the stored response is outdated, and its successor is not stored
        except OriginError as failure:
            log.warning("%s was not stored: %s", partial.head.key, failure)
            if isinstance(failure, DownloadAbandonedError):
                result = FlightResult.ALONE  # a client that joined at the last moment asks the origin
            error = None if result is FlightResult.ALONE else failure
            partial.keep_for_resume()
        finally:
            self._orphans.remove(partial)
            with self._lock:
                self._running.pop(partial, None)
            self.flights.finish(flight, result, error, partial.size)
            self.locks.release(partial)
        if result is FlightResult.STORED and download.replaces:
            self._on_replaced(download.origin_request)

    def _receive(self, download: Download) -> None:
        """Write the whole body, over as many connections as it takes; OriginError, StorageError."""
        partial, response = download.partial, download.response
        with self._lock:
            self._running[partial] = time.monotonic(), partial.size
        if response is None and partial.size == partial.length:
            return  # the instance that died had received everything

        def ask(offset: int) -> OriginResponse:
            if partial.size:
                _publish()
            request = replace_fields(download.origin_request, deadline=time.monotonic() + RESUME_TIMEOUT)
            remainder = self.origin.fetch_remainder(request, partial.head, partial.length, offset)
            remainder.on_idle(_publish)
            return remainder

        def _publish() -> None:
            with contextlib.suppress(OSError):
                partial.publish()

        # Other instances can read the partial file once its metadata is written.  That costs a file, which
        # most downloads do not need: it is written if the origin pauses, or if the download takes a while.
        publish_at = time.monotonic() + PUBLISH_DELAY
        if response is not None:
            response.on_idle(_publish)
        pieces = resumable_body(partial.head, partial.length, partial.size, ask, response)
        with contextlib.closing(pieces):
            for data in pieces:
                self._write(download, data)
                if time.monotonic() > publish_at and partial.size != partial.length:
                    _publish()

    def _write(self, download: Download, data: bytes) -> None:
        """Append data to the partial file, and wake the readers; OriginError, StorageError."""
        partial, flight = download.partial, download.flight
        if not self._orphans.may_continue(partial):
            # A client may join between the two checks, so first let nobody join, then look again.
            self.flights.remove(flight)
            if not partial.has_readers():
                raise DownloadAbandonedError("Its clients have left, and it is too slow, or too many other "
                                             "downloads continue without clients.")
        if partial.length is not None and partial.size + len(data) > partial.length:
            raise CannotResumeError("The origin sends more than it has declared.")
        try:
            partial.write(data)
        except OSError as error:
            raise StorageError(error) from error
        if partial.size != partial.length:  # the last bytes are announced after the commit (invariant 3)
            flight.set_received(partial.size)

    def _commit(self, download: Download) -> FlightResult:
        """Store a complete body, unless it has become invalid; StorageError.

        A POST, say, may invalidate it at any time (RFC 9111 §4.4).  Hence the flight is asked twice: before
        the file gets its place, and again afterwards, because the POST may have come in between.
        """
        partial, flight = download.partial, download.flight
        may_store = flight.finish_receiving() and not self.locks.is_lost(partial)
        if may_store and not matches_digest_in_name(partial.head.key, partial):
            log.warning("%s was not stored: its bytes have another digest than its name", partial.head.key)
            may_store = False
        if not may_store:
            partial.discard()
            return FlightResult.WHOLE
        partial.commit()
        mark(download.origin_request.timings, "stored")
        self.failures.disk_recovered()
        if not flight.finish_receiving():
            partial.delete_stored()
        return FlightResult.STORED


class PeerFollower:
    """Follows another instance's download, and takes it over if that instance dies.

    One runs for each flight whose key another instance has locked, in a thread of its own: ``run``.  It reads
    the other's partial file and its metadata:

    1. The other instance locks its partial file, or gets the lease, and asks the origin.
    2. It publishes the metadata.  From now on our clients read its file, as far as it has been written.
    3. It renames the file into the cache, or removes it, and unlocks it.
    4. Our attempt to lock succeeds: it has finished, or it has died.  The store tells which.
    """

    def __init__(self, downloader: Downloader, request: Request, origin_request: OriginRequest,
                 flight: Flight) -> None:
        self._downloader = downloader
        self._locks = downloader.locks
        self._request = request  # the leader's, to download for if the other instance dies
        self._origin_request = origin_request
        self._flight = flight
        self._partial: PartialFile | None = None  # the other instance's
        self._published = False  # whether our clients read it
        self._owner = ""  # the other instance, as its lease names it; "": the file itself is locked
        self._own_lease = ""  # ours, once we hold it

    def run(self) -> None:
        """Follow until the other instance has finished; then finish the flight, or continue the download."""
        result: FlightResult | None = FlightResult.ALONE
        try:
            if self._follow():
                result = self._finish()
            else:  # it stands still: later requests must not wait for it as well
                self._locks.partials.unlink(self._flight.key, self._owner)
        except (OSError, StorageError) as error:
            log.debug("%s cannot be followed: %s", self._flight.key, error)
        finally:
            if result is not None:
                self._close(result)

    def _close(self, result: FlightResult) -> None:
        partial = self._partial
        if partial is not None:
            partial.unlock()
        received = partial.size if partial is not None and self._published else None
        self._downloader.flights.finish(self._flight, result, received=received)
        if partial is not None:
            partial.release()
        self._locks.leases.release(self._flight.key, self._own_lease)

    def _follow(self) -> bool:
        """Announce what the other instance has written until it finishes; False if it stands still."""
        pause, deadline = 0.001, time.monotonic() + FOLLOWER_HEAD_TIMEOUT
        while time.monotonic() < deadline:
            if self._partial is None:
                self._partial = self._locks.partials.open_for_reading(self._flight.key, self._owner)
            if self._try_take_over():
                return True
            if self._partial is not None and self._has_grown(self._partial):
                deadline = time.monotonic() + FOLLOWER_STALL_TIMEOUT
                if self._partial.size == self._partial.length:
                    self._flight.finish_receiving()
                    deadline = time.monotonic() + COMMIT_TIMEOUT
            time.sleep(pause)
            pause = min(2 * pause, PEER_POLL_INTERVAL)
        return False

    def _has_grown(self, partial: PartialFile) -> bool:
        """Announce what has been written since the last call; return whether that is anything."""
        before = partial.size
        if not self._published:
            self._published = partial.load_metadata()
            if self._published:
                self._flight.publish(partial)
            return self._published
        partial.refresh_size()
        if partial.size > before and partial.size != partial.length:
            self._flight.set_received(partial.size)
        return partial.size > before

    def _try_take_over(self) -> bool:
        """Try to become the writer; True if the other instance no longer is.

        The lock is on an open file, and the file may have lost its name meanwhile:

        1. the other instance renames or removes its file, and a third one creates a new file of that name;
        2. we lock the old file, which nobody locks any more;
        3. the name leads to another file: open that one and try again, if no client reads the old one yet.
        """
        if self._locks.leases.uses_memcached:
            return self._try_take_lease()
        partial = self._partial
        if partial is not None and partial.try_lock() and not self._published and not partial.still_exists():
            partial.release()
            partial = self._partial = self._locks.partials.open_for_reading(self._flight.key)
        return partial is None or partial.try_lock()

    def _try_take_lease(self) -> bool:
        try:
            owner, is_ours = self._locks.leases.try_acquire(self._flight.key)
        except OSError:  # memcached cannot be asked: the other instance's file disappears when it finishes
            return self._partial is None or not self._partial.still_exists()
        if is_ours:
            self._own_lease = owner
        elif owner != self._owner:
            self._switch_writer(owner)
        return is_ours

    def _switch_writer(self, owner: str) -> None:
        """Follow a new owner of the lease, whose file begins as a copy of the old one.

        If clients read the old file already, they may continue only in the same bytes, which a strong
        validator must prove.
        """
        other, old = self._locks.partials.open_for_reading(self._flight.key, owner), self._partial
        if not self._published or old is None:
            self._partial, self._owner = other, owner
            if old is not None:
                old.release()
        elif other is not None:
            same = other.load_metadata() and other.head.fields == old.head.fields
            if same and strong_validator(old.head) and other.size >= old.size:
                old.switch_to(other)
                self._owner = owner
            else:
                other.release()

    def _finish(self) -> FlightResult | None:
        """Return how the other instance's download ended; None if it was continued here."""
        partial, stored = self._partial, self._downloader.store.lookup(self._flight.key)
        if stored is not None:
            with contextlib.closing(stored):
                return self._finish_stored(stored)
        if partial is None or not partial.still_exists():
            is_whole = partial is not None and self._published and partial.size == partial.length
            return FlightResult.WHOLE if is_whole else FlightResult.ALONE
        if not self._published and not partial.load_metadata():
            return FlightResult.AGAIN  # it died before it had anything
        return self._continue_download(partial)

    def _finish_stored(self, stored: StoredResponse) -> FlightResult:
        """Let clients that have a part already continue in the stored file, if it is the same.

        A third instance may have stored it.  Then a strong validator must prove that it is the same.
        """
        partial = self._partial
        if partial is not None and self._published and not partial.is_stored_as(stored):
            validator = strong_validator(partial.head)
            same = validator is not None and validator == strong_validator(stored.head)
            if not same or partial.length not in (None, stored.head.size):
                return FlightResult.ALONE
            partial.switch_to(stored)
        return FlightResult.STORED

    def _continue_download(self, partial: PartialFile) -> FlightResult | None:
        """Resume the download of an instance that died, in its file or in our copy; StorageError, OSError."""
        request, head = self._request, partial.head
        if strong_validator(head) is None:
            partial.discard()
        if not may_share_download(request, head) or strong_validator(head) is None:
            return FlightResult.ALONE
        if self._locks.leases.uses_memcached:
            own = self._locks.partials.open_for_writing(self._flight.key, self._own_lease)
            if own is None or own.head.fields != head.fields or own.size < partial.size:
                self._locks.discard(own)
                return FlightResult.ALONE
            partial.switch_to(own)
        partial.refresh_size()
        partial.start(head, partial.length, partial.size)
        if not self._published:
            self._flight.publish(partial)
        self._downloader.download(Download(partial, self._flight, self._origin_request))
        return None


# ---------------------------------------------------------------------------------------------
# 10 Proxy
# ---------------------------------------------------------------------------------------------
#
# Proxy.respond() is the path of every request; start reading there.

REVALIDATION_INTERVAL = 3600.0  # seconds between two validations of one response in the background
MAX_BACKGROUND_VALIDATIONS = 4  # validations at one time that no client waits for
# Request fields with which a large stored response may have a small answer.
_PART_FIELDS = ("range", "if-none-match", "if-modified-since")
# Fields that describe the very bytes of a body, and so not those of a body with rewritten links.
_BODY_FIELDS = ("content-length", "accept-ranges", "etag", "last-modified", "content-md5", "digest",
                "content-digest", "repr-digest")


def rewrite_for_prefix(request: Request, response: Response) -> Response:
    """Make the links of a response lead through the proxy, if its client put the proxy's address before the
    URL; else return the response as it is."""
    links = link_pattern_for(request, response.head)
    if links is None:
        return response
    head = replace_fields(response.head, fields=without_fields(response.head.fields, _BODY_FIELDS))
    host = field_value(request.fields, "Host")
    body = LinkRewritingBody(response.body, links, "http://%s/" % host if host else "/", request.target)
    return replace_fields(response, head=head, body=body)


def check_target_allowed(request: Request, config: Config) -> None:
    """Raise ProxyError if a request has come in a loop, or if its client may not reach its target.

    Only names are checked here.  Addresses are checked as they are connected to, by AddressPolicy.
    """
    if is_loop(request, config):
        raise ProxyError("The request has come through this proxy before: its target leads back here.", 508)
    if not request.client_is_local and is_protected_host(request.target.host):
        raise ProxyError("Only the proxy's own host may reach %s through it." % request.target.host, 403)


def answer_as_final_recipient(request: Request) -> Response:
    """Answer a TRACE or OPTIONS that may go no further (RFC 9110 §7.6.2, §9.3.7, §9.3.8)."""
    if request.method == "OPTIONS":
        allow = ("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE, CONNECT")
        return Response(generated_head(200, more=(allow,)), bytes_body(b""), CacheStatus(Outcome.OWN))
    fields = without_fields(request.fields, ("authorization", "cookie", "proxy-authorization"))
    lines = ["%s %s HTTP/%d.%d" % (request.method, request.uri, *request.version)]
    lines += ["%s: %s" % field for field in fields]
    text = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return Response(generated_head(200, "message/http"), bytes_body(text), CacheStatus(Outcome.OWN))


# Small hits, which the event loop sends without a thread


@dataclasses.dataclass(frozen=True, eq=False)
class HotEntry:
    """A small hit as it is sent: rendered head and body."""

    request: Request
    status: int
    cache_status: CacheStatus
    close: bool  # whether the connection is closed after it
    data: bytes  # head and body
    body_size: int
    stored: StoredResponse  # open: its descriptor tells whether the file is still the same
    version: tuple[int, int, int]  # of that file
    text: str  # for the log


def file_version(stored: StoredResponse) -> tuple[int, int, int]:
    """Return what changes when a file is removed, replaced or written to; OSError."""
    info = os.fstat(stored.fileno())
    return info.st_nlink, info.st_ctime_ns, info.st_size


class HotCache:
    """Rendered small responses of the current second, for clients that ask for the same at the same time.

    An entry may be used until the second ends (its Age field is right for that long), and while its file is
    unchanged.  One look at the file serves all requests that had arrived by then:

    1. The event loop wakes with requests from many clients: ``start_turn``.
    2. ``get`` for the first of them looks at the file, and for the others does not.
    3. A client sees an answer, has the file removed or replaced, and asks again: that request is read in a
       later turn, or after ``recheck``, so the file is looked at again.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, HotEntry] = {}  # by the bytes of the request's head, and the client's access
        self._valid_for: tuple[int, Config | None] = (0, None)  # the second, and the configuration
        self._verified: set[HotEntry] = set()  # entries whose files were looked at since the last recheck

    def start_turn(self, valid_for: tuple[int, Config]) -> None:
        """Begin a turn of the event loop, in this second and with this configuration."""
        if valid_for != self._valid_for:
            self.clear()
            self._valid_for = valid_for
        self.recheck()

    def recheck(self) -> None:
        """Look at each file again before its entry is used: it may have changed before the next request."""
        self._verified.clear()

    def get(self, asked: Any, config: Config) -> HotEntry | None:
        """Return the entry for a request, if it may still be used."""
        entry = self._entries.get(asked) if config is self._valid_for[1] else None
        if entry is None or entry in self._verified:
            return entry
        with contextlib.suppress(OSError):
            if file_version(entry.stored) == entry.version:
                self._verified.add(entry)
                return entry
        return None

    def put(self, asked: Any, entry: HotEntry) -> None:
        """Keep an entry, or just close its file: if the cache is full, if the file has already been removed,
        and on Windows, where an open file cannot be removed."""
        old = self._entries.pop(asked, None)
        if old is not None:
            old.stored.close()
        if len(self._entries) < HOT_CACHE_SIZE and entry.version[0] and os.name != "nt":
            self._entries[asked] = entry
        else:
            entry.stored.close()

    def clear(self) -> None:
        """Remove all entries."""
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            entry.stored.close()


def read_without_blocking(file: io.FileIO, start: int, stop: int) -> bytes | None:
    """Read a part of a file if it is in memory, as far as the system tells; None if not, or on an error."""
    buffer = bytearray(stop - start)
    try:
        try:
            count = os.preadv(file.fileno(), [buffer], start, os.RWF_NOWAIT)
        except (AttributeError, OSError) as error:
            if isinstance(error, BlockingIOError):
                return None
            file.seek(start)
            count = file.readinto(buffer) or 0
    except OSError:
        return None
    return bytes(buffer) if count == stop - start else None


def hot_entry_for(request: Request, stored: StoredResponse, config: Config, now: float) -> HotEntry | None:
    """Render the response to a request if it is small and nothing must be waited for; None if not.

    The caller closes ``stored``, also by way of the entry.  OSError.
    """
    # Most large files are recognised here, before the work that their thread will do again.
    if stored.head.size > SMALL_BODY and request.method == "GET" and not any(
            name.lower() in _PART_FIELDS for name, _ in request.fields):
        return None
    version = file_version(stored)  # before it is read
    with contextlib.suppress(ProxyError):
        check_target_allowed(request, config)
        decision = decide(request, stored.head, config, now)
        selection = select_response(request, with_age(stored.head, now), stored.head.size, "")
        spans = () if request.method == "HEAD" else selection.spans
        span = spans[0] if spans else (0, 0)
        if decision.action is not Action.SERVE or decision.refresh or \
                link_pattern_for(request, selection.head) or len(spans) > 1 or isinstance(span, bytes) or \
                span[1] - span[0] > SMALL_BODY:
            return None
        body = read_without_blocking(stored.file, *span)
        if body is None:
            return None
        close, status = not wants_keep_alive(request), CacheStatus(Outcome.HIT, ttl=decision.ttl)
        head = render_response_head(request, selection.head, selection.length, status, close, config)
        return HotEntry(request, selection.head.status, status, close, head + body, len(body), stored,
                        version, log_text(request, status))
    return None


# Fetches that clients share


@dataclasses.dataclass(frozen=True)
class FlightLeader:
    """Runs the fetch that other clients share: a miss or a revalidation.  One object for each fetch.

    Each step returns the leader's own response and how the flight has ended.  A FlightResult of None means
    that a thread is still running, a download or a PeerFollower, which finishes the flight later.
    """

    downloader: Downloader
    mirrors: MirrorDeduplicator
    request: Request
    flight: Flight
    config: Config

    def lead(self, missing: bool, alone: bool) -> Response | None:
        """Fetch a response for all followers, and finish the flight; ProxyError.

        The response is None if another instance downloads it: then this request follows as well.

        ``missing``: the store has been looked in a moment ago.  ``alone``: no client, of other instances
        neither, may wait for this response before its head shows that it is for all.
        """
        result: FlightResult | None = FlightResult.ALONE
        failure: Exception | None = None
        try:
            response, result = self._fetch(missing, alone)
        except OriginError as error:
            result, failure = FlightResult.FAILED, error
            raise
        finally:
            if result is not None:
                self.downloader.flights.finish(self.flight, result, failure)
        return response

    def _fetch(self, missing: bool, alone: bool) -> tuple[Response | None, FlightResult | None]:
        """Look in the store again (invariant 4), then validate or fetch.


        1. Request A looks in the store, and finds nothing.
        2. Request B, which leads a flight for the same key, stores the response and leaves the barrier.
        3. Request A joins the barrier, and leads a new flight.  Without another look it would download again.

        The same goes for the lock between instances, so the look that counts is the one after it.
        """
        request, partial = self.request, None
        store, origin = self.downloader.store, self.downloader.origin
        stored = None if missing else look_up_for_client(store, origin, request)
        try:
            if stored is None and not alone:
                partial = self.downloader.locks.acquire(request.key)
                mark(request.timings, "locked")
                if partial is None:
                    origin_request = full_request(request, self.config)
                    start_thread(PeerFollower(self.downloader, request, origin_request, self.flight).run)
                    return None, None
                stored = look_up_for_client(store, origin, request)
        except StorageError as error:
            log.debug("%s: %s", request.key, error)  # logged aloud when the response cannot be stored
        if stored is None:
            return self._fetch_missing(partial)
        self.downloader.locks.discard(partial)
        decision = decide(request, stored.head, self.config, time.time())
        if decision.action is Action.SERVE:
            status = CacheStatus(Outcome.HIT, ttl=decision.ttl)
            return response_from_store(request, stored, status), FlightResult.AGAIN
        try:
            return self._validate(decision, stored)
        except BaseException:
            stored.close()
            raise

    def _fetch_missing(self, partial: PartialFile | None) -> tuple[Response, FlightResult | None]:
        """Fetch a response that is not stored: find it under another mirror's name, or resume what is left of
        an earlier download, or ask for the whole."""
        request = self.request
        decision, origin = decide(request, None, self.config, time.time()), self.downloader.origin
        origin_request = full_request(request, self.config, time.monotonic() + RESPONSE_HEAD_TIMEOUT)
        try:
            found = self.mirrors.find_identical(request, origin_request, self.config)
            if isinstance(found, StoredResponse):
                return self._serve_identical(decision, found, partial)
            response = found or self._resume(origin_request, partial) or fetch_full(origin, origin_request)
            self.mirrors.check_status(request, response)
        except BaseException:
            self.downloader.locks.discard(partial)
            raise
        return self._store_or_relay(response, decision, partial)

    def _serve_identical(self, decision: CacheDecision, stored: StoredResponse,
                         partial: PartialFile | None) -> tuple[Response, FlightResult | None]:
        """Serve the same file of another mirror, and store it under this key as well: as a link to the file,
        or as a copy if the file system refuses links."""
        request = self.request
        try:
            self.downloader.store.link(stored)
        except OSError as error:
            log.debug("%s is copied: %s", request.key, error)
            return self._store_or_relay(LocalFileResponse(stored), decision, partial)
        if not self.flight.finish_receiving():  # a POST has made it invalid meanwhile (RFC 9111 §4.4)
            self.downloader.store.delete(request.key)
        self.downloader.locks.discard(partial)
        self.downloader.failures.disk_recovered()
        status = shared_cache_status(decision, stored.head)
        return response_from_store(request, stored, status), FlightResult.STORED

    def _resume(self, origin_request: OriginRequest, partial: PartialFile | None) -> OriginResponse | None:
        """Ask for what an earlier download lacks; None if nothing is left of one, or if it does not fit."""
        if partial is not None and partial.size and may_share_download(self.request, partial.head):
            with contextlib.suppress(CannotResumeError):
                return self.downloader.origin.fetch_remainder(
                    origin_request, partial.head, partial.length, partial.size)
        return None

    def _validate(self, decision: CacheDecision,
                  stored: StoredResponse) -> tuple[Response, FlightResult | None]:
        """Ask the origin whether a stored response is still right (RFC 9111 §4.3); OriginError.

        The caller closes ``stored`` on an error.  If it may be served stale then, Proxy does that.
        """
        request, answer = self.request, self._revalidate(decision, stored)
        if isinstance(answer, OriginResponse):
            stored.close()
            return self._store_or_relay(answer, decision, None)
        self.downloader.failures.origin_answered(request)
        head = replace_fields(answer, vary=selecting_fields(request, answer))
        if is_shareable(request, head):
            self.downloader.store.update_head(stored, head)
        status = CacheStatus(Outcome.VALIDATED, decision.forward, 304)
        response = response_from_store(request, replace_fields(stored, head=head), status)
        return response, FlightResult.STORED

    def _revalidate(self, decision: CacheDecision, stored: StoredResponse) -> ResponseHead | OriginResponse:
        """Return the head that confirms a stored response, or the response that replaces it; OriginError."""
        request, may_be_stale = self.request, may_serve_stale_on_error(decision, stored.head)
        deadline = time.monotonic() + VALIDATION_TIMEOUT if may_be_stale else None
        origin, origin_request = self.downloader.origin, full_request(request, self.config, deadline)
        if not stored.described:
            head = confirm_bare_file(origin, origin_request, request, stored, self.config)
            return head or fetch_full(origin, origin_request)
        # A client that doubts a file found at another mirror gets the file that this mirror has.
        doubted = stored.head.same_as and "no-cache" in cache_directives(request.fields)
        more = () if doubted or decision.forward == "vary-miss" else validators(stored.head)
        response = fetch_full(origin, replace_fields(origin_request, fields=origin_request.fields + more))
        if response.head.status == 304:
            response.close()
            if is_304_for(stored.head, response.head):
                return freshen_head(stored.head, response.head)
            response = fetch_full(origin, origin_request)
        if response.head.status in UNAVAILABLE_STATUSES and may_be_stale:
            response.close()
            final = parse_target(response.head.final_uri)
            raise OriginError("%s answers %d." % (final.authority, response.head.status), final)
        return response

    def _store_or_relay(self, response: OriginResponse, decision: CacheDecision,
                        partial: PartialFile | None) -> tuple[Response, FlightResult | None]:
        """Store a response while it is sent to the client, or only send it if it cannot be stored.

        ``partial`` is ours and locked; None if it must still be locked.  The response may be the remainder
        of what ``partial`` has (``response.start`` > 0).
        """
        request, resumes = self.request, response.start > 0
        if response.head.status < 500 and not (response.head.same_as and digest_in_name(request.key)):
            self.downloader.failures.origin_answered(request)
        head = partial.head if partial is not None and resumes else replace_fields(
            response.head, key=request.key, vary=selecting_fields(request, response.head))
        origin_request = full_request(request, self.config)
        try:
            reason = why_not_storable(replace_fields(request, method="GET"), head, self.config)
            reason = reason or ("" if response.end_is_known else "no declared length")
            if not reason:
                partial = partial or self.downloader.locks.acquire(request.key)
                if partial is None:  # it will replace what is stored, or fail and leave it
                    return response_from_origin(
                        request, response, decision, "another instance is storing it"), FlightResult.ALONE
                replaces = decision.action is Action.VALIDATE
                download = Download(partial, self.flight, origin_request, response, replaces)
                return self.downloader.start(request, decision, head, download), None
        except StorageError as error:
            reason = self.downloader.failures.disk_failed(error)
        except BaseException:
            response.close()
            self.downloader.locks.discard(partial)
            raise
        self.downloader.locks.discard(partial)
        if replaces_stored(decision, response.head) and is_shareable(request, response.head):
            # What is stored is known to be outdated, and its successor cannot be stored.
            self.downloader.store.delete(request.key)
        if resumes:
            response.close()
            response = fetch_full(self.downloader.origin, origin_request)
        return response_from_origin(request, response, decision, reason), FlightResult.ALONE


@dataclasses.dataclass(frozen=True)
class SharedFetch:
    """Fetches a response together with all clients that ask for the same key now.  One object a request.

    The first client leads a flight, the others follow it:

        leader                                followers
        SingleFlight.join: a new flight       SingleFlight.join: the same flight
        FlightLeader.lead: asks the origin    Flight.wait_for_head
        Downloader.start: Flight.publish ───► read the partial file as it grows
        the Downloader's thread: finish ────► have the last bytes

    A request with Authorization has a flight of its own that no other request can join: its response may be
    for this client alone, which only its head will tell (RFC 9111 §3.5).
    """

    downloader: Downloader
    mirrors: MirrorDeduplicator
    request: Request
    decision: CacheDecision
    config: Config

    def fetch(self) -> Response | FlightResult:
        """Return a response; ALONE if this request cannot share one, AGAIN if it must be decided anew;
        ProxyError."""
        alone = field_value(self.request.fields, "Authorization") is not None
        key, deadline = self.request.key, time.monotonic() + VALIDATION_TIMEOUT
        flight, is_leader = (Flight(key), True) if alone else self.downloader.flights.join(key)
        missing = self.decision.action is Action.FETCH
        response = self._leader(flight).lead(missing, alone) if is_leader else None
        result = response or self._follow(flight)
        if self.decision.action is Action.VALIDATE and isinstance(result, Response) and isinstance(
                result.body, TailingBody):
            # The stored copy could answer, so do not wait long for a first byte: a second at least.
            result.body.first_byte_deadline = max(deadline, time.monotonic() + 1)
        return result

    def _leader(self, flight: Flight) -> FlightLeader:
        request = without_private_fields(self.request)
        return FlightLeader(self.downloader, self.mirrors, request, flight, self.config)

    def _follow(self, flight: Flight) -> Response | FlightResult:
        """Share a flight that another client leads, or another instance.

        If the leader fails, its request may be to blame (invariant 12), so each follower asks the origin once
        by itself; but not if the origin is unreachable, or if the failure took its time.
        """
        request, origin, began = self.request, self.downloader.origin, time.monotonic()
        status = CacheStatus(Outcome.COLLAPSED, self.decision.forward)
        try:
            partial, result = flight.wait_for_head(FOLLOWER_HEAD_TIMEOUT)
        except OriginError as error:
            if error.unreachable or time.monotonic() - began > VALIDATION_TIMEOUT:
                raise
            response = self._leader(Flight(request.key)).lead(missing=False, alone=True)
            return response or FlightResult.ALONE
        if partial is not None:
            if may_share_download(request, partial.head):
                download = Download(partial, flight, full_request(request, self.config))
                return response_from_partial(request, download, origin, status, partial.head)
            partial.release()
        elif result is FlightResult.STORED:
            stored = look_up_for_client(self.downloader.store, origin, request)
            if stored is not None and selecting_fields(request, stored.head) == stored.head.vary:
                return response_from_store(request, stored, status)
            _close(stored)
        return FlightResult.AGAIN if result is FlightResult.AGAIN else FlightResult.ALONE


# Background work


class EvictionThread:
    """Keeps the cache within its bounds, in a thread of its own.

    A response may be removed while it is read: the body has its file open, so the bytes stay until the last
    reader closes it.  Partial files that are being written are locked, and stay.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._evictor = Evictor(store)
        # For the status page: what the last run found, and what all runs have removed.
        self.last_report = {"at": 0.0, "removedFiles": 0, "removedBytes": 0}
        self._wake = store.space.scarce
        self._stopped = threading.Event()

    def start(self, config: Config) -> None:
        """Run now, and then every EVICTION_INTERVAL seconds."""
        threading.Thread(target=self._run, args=(config,), daemon=True).start()

    def request_run(self) -> None:
        """Run soon: the disk is full."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the current run."""
        self._stopped.set()
        self._wake.set()

    def _run(self, config: Config) -> None:
        scanned_at = -ADOPT_SCAN_INTERVAL
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                if config.adopt and time.monotonic() - scanned_at > ADOPT_SCAN_INTERVAL:
                    self._store.adopted.rebuild(adoptable_packages(config.adopt))
                    scanned_at = time.monotonic()
                self._record(self._evictor.run(config, time.time()))
            except OSError as error:
                log.debug("The eviction failed: %s", error)
            except Exception:
                log.exception("The eviction failed: this is a bug")
            self._stopped.wait(MIN_EVICTION_PAUSE)  # a disk that stays full must not keep this thread busy
            self._wake.wait(EVICTION_INTERVAL)

    def _record(self, report: EvictionReport) -> None:
        if report.removed:
            log.info("Evicted %d of %d stored files, %d of %d MB", report.removed, report.files,
                     report.freed // 10**6, report.size // 10**6)
        self.last_report = {
            "at": time.time(), "files": report.files - report.removed, "bytes": report.size - report.freed,
            "removedFiles": self.last_report["removedFiles"] + report.removed,
            "removedBytes": self.last_report["removedBytes"] + report.freed}


class BackgroundRevalidator:
    """Revalidates stored responses in the background, after they were served as hits.

    A revalidation is an ordinary request with ``max-age=0``, whose body nobody reads: so it joins a flight,
    updates the stored head on a 304, and stores a new response, all as a client's request does.
    """

    def __init__(self, respond: Callable[[Request], Response], store: Store, flights: SingleFlight) -> None:
        self._respond = respond
        self._store = store
        self._flights = flights
        self._running = threading.BoundedSemaphore(MAX_BACKGROUND_VALIDATIONS)
        self._attempts = RecentEvents()  # by cache key

    def revalidate(self, target: Target, vary: Fields, client_is_local: bool) -> None:
        """Revalidate a stored response, unless that was tried lately, or too many revalidations are running.

        ``vary`` holds the request fields that select the stored response among its variants.
        """
        key = cache_key(target)
        if not self._attempts.note_first(key, REVALIDATION_INTERVAL) or self._flights.is_in_flight(key):
            return
        if not self._running.acquire(blocking=False):
            return
        fields = (("Host", target.authority), ("Cache-Control", "max-age=0")) + tuple(
            (name, text) for name, text in vary if text)
        request = Request("GET", target.uri, target, fields, received=time.time(), key=key,
                          client_is_local=client_is_local)
        try:
            threading.Thread(target=self._run, args=(request,), daemon=True).start()
        except RuntimeError:  # no more threads: later, then
            self._running.release()

    def revalidate_signatures(self, origin_request: OriginRequest) -> None:
        """Revalidate the stored signatures of an index that was replaced, even if that was tried lately.

        An index and its signature must be of one generation, or its clients refuse both.
        """
        if classify_name(cache_key(origin_request.target)) is NameClass.INDEX:
            for target in detached_signatures(origin_request.target):
                stored = self._store.lookup(cache_key(target))
                if stored is not None:
                    stored.close()
                    self._attempts.forget(cache_key(target))
                    self.revalidate(target, stored.head.vary, origin_request.client_is_local)

    def _run(self, request: Request) -> None:
        try:
            with contextlib.closing(self._respond(request).body) as body:
                for _ in body.chunks():  # read to the end, so that the limit counts running downloads
                    pass
        except (ProxyError, OSError) as error:
            log.debug("%s was not validated: %s", request.key, error)
        finally:
            self._running.release()


class Proxy:
    """Answers requests from the cache, from a running download, or from the origin."""

    def __init__(self, config: Config, store: Store, count_received: Callable[[int], object]) -> None:
        """``count_received`` is called with the number of body bytes whenever some arrive from an origin."""
        self.config = config  # replaced as a whole when the filters are read again
        self._store = store
        self._origin = OriginClient(count_received, config)
        self.evictor = EvictionThread(store)
        self._failures = RecentFailures(self.evictor.request_run)
        self._barrier = SingleFlight()
        self._revalidator = BackgroundRevalidator(self.respond, store, self._barrier)
        self._downloader = Downloader(config, store, self._barrier, self._origin, self._failures,
                                      self._revalidator.revalidate_signatures)
        self._locks = self._downloader.locks
        self._mirrors = MirrorDeduplicator(store, self._origin, config)

    def respond(self, request: Request) -> Response:
        """Respond to a request; ProxyError if that is impossible.

        1. Look up what is stored, and let ``decide`` say what to do with it.
        2. Serve it as it is (``_serve``): a hit, or stale because the origin is known to be down.
        3. Else ask the origin (``_forward``): for this client alone (``_pass``), or for all that ask for the
           same now (``SharedFetch``), which stores or revalidates the response.
        4. If the origin fails, serve the stored copy or raise the error (``_respond_despite``).

        If the response's body fails before its first byte, the caller calls ``response.fallback(error)`` for
        another response.
        """
        return rewrite_for_prefix(request, self._respond(request))

    def _respond(self, request: Request) -> Response:
        config = self.config
        check_target_allowed(request, config)
        if max_forwards(request) == 0:
            return answer_as_final_recipient(request)
        stored = None if request.known_missing else look_up_for_client(self._store, self._origin, request)
        mark(request.timings, "looked up")
        decision = decide(request, stored.head if stored else None, config, time.time())
        try:
            response = self._serve(request, decision, stored) if stored is not None else None
            response = response or self._forward(request, decision, config)
        except OriginError as error:
            return self._respond_despite(request, decision, error)
        return replace_fields(response, fallback=functools.partial(self.fallback, request, decision))

    def _serve(self, request: Request, decision: CacheDecision, stored: StoredResponse) -> Response | None:
        """Serve a hit, or a stale response without asking an origin that is known to be down; None if
        ``stored`` cannot be used like that, and is closed."""
        if decision.action is Action.SERVE:
            if decision.refresh:
                self._revalidator.revalidate(request.target, stored.head.vary, request.client_is_local)
            status = CacheStatus(Outcome.HIT, ttl=decision.ttl)
            return response_from_store(request, stored, status)
        if decision.action is Action.VALIDATE and may_serve_stale_on_error(decision, stored.head):
            reason = self._failures.origin_down_reason(request)
            if reason:
                return self._serve_stale(request, decision, stored, reason)
        stored.close()
        return None

    def _forward(self, request: Request, decision: CacheDecision, config: Config) -> Response:
        """Respond to a request for which nothing stored can be used as it is."""
        if decision.action is Action.REFUSE:
            reason = "this proxy is offline" if config.offline else "the request is only-if-cached"
            error = ProxyError("No stored response fits, and %s." % reason, 504)
            return self._respond_despite(request, decision, error)
        if decision.action is Action.PASS or self._should_pass_range(request, decision):
            return self._pass(request, decision, config)
        result = SharedFetch(self._downloader, self._mirrors, request, decision, config).fetch()
        if isinstance(result, Response):
            return result
        if result is FlightResult.AGAIN:
            return self._respond(replace_fields(request, known_missing=False))
        return self._pass(request, decision, config, "not collapsed")

    def _pass(self, request: Request, decision: CacheDecision, config: Config, detail: str = "") -> Response:
        """Ask the origin for this client alone.  A method that changes things invalidates stored responses
        (RFC 9111 §4.4)."""
        fields = origin_request_fields(request, config, identity=False)
        private = sorted(private_fields(request))
        follow = decision.forward not in ("bypass", "method") and decision.policy.redirects and not private
        if private and decision.forward == "request":
            detail = "for this client alone: " + ", ".join(private)
        response = self._origin.fetch(OriginRequest(
            request.method, request.target, fields, request.body, request.length, request.client_is_local,
            follow, client=request.client, timings=request.timings))
        for key in invalidated_keys(request, response.head):
            # In this order: a download that is stored between two of these steps is deleted by the last.
            self._barrier.invalidate(key)
            self._locks.invalidate(key)
            self._store.delete(key)
        return response_from_origin(request, response, decision, detail)

    def _should_pass_range(self, request: Request, decision: CacheDecision) -> bool:
        """Return whether a range is too short, or too far from the start, to download a whole file for it.

        A download that is already running serves the range.  It may end while this looks for it, so the store
        is looked in last.
        """
        key = request.key
        if decision.action is not Action.FETCH or field_value(request.fields, "Range") is None \
                or is_worth_full_download(request, FULL_DOWNLOAD_RANGE) or self._barrier.is_in_flight(key) \
                or self._locks.is_downloading_elsewhere(key) or self._mirrors.has_candidates(request):
            return False
        stored = look_up_for_client(self._store, self._origin, request)
        _close(stored)
        return stored is None

    # When a response fails

    def fallback(self, request: Request, decision: CacheDecision, error: Exception) -> Response:
        """Respond to a request whose response has failed before its first byte; ProxyError."""
        return rewrite_for_prefix(request, self._respond_despite(request, decision, error))

    def _respond_despite(self, request: Request, decision: CacheDecision, error: Exception) -> Response:
        """Respond despite an error; the one place where a failed response is replaced by another.

        - The stored file cannot be read: ask the origin (invariant 6).
        - The origin fails: serve the stored copy, stale, or the same file of another mirror.  If neither may
          be served, raise the error with the reason, for Cache-Status and the log.
        """
        if not isinstance(error, ProxyError):
            log.warning("The stored file of %s cannot be read: %s", loggable_uri(request.uri), error)
            if self.config.offline or "only-if-cached" in cache_directives(request.fields):
                raise ProxyError("The stored file cannot be read: %s." % error, 504)
            return self._pass(request, decision, self.config, "not read: %s" % error)
        stored = self._find_stale(request, decision, error)
        if isinstance(stored, str):
            raise error.with_reason("" if decision.action is Action.REFUSE else decision.forward, stored)
        if isinstance(error, OriginError):
            self._failures.origin_failed(request, error)
        return self._serve_stale(request, decision, stored, str(error))

    def _find_stale(self, request: Request, decision: CacheDecision,
                    error: ProxyError) -> StoredResponse | str:
        """Return a stored response that may be served instead of an error, or why there is none."""
        if decision.action is Action.PASS:
            return "the request bypasses the cache"
        stored = look_up_for_client(self._store, self._origin, request)
        if stored is None:
            # Only the operator may decide that another mirror's file is served without asking this mirror.
            permitted = isinstance(error, OriginError) or self.config.offline or digest_in_name(request.key)
            if decision.forward == "uri-miss" and permitted:
                stored = self._mirrors.find_substitute(request)
            return stored or "no stored copy"
        if selecting_fields(request, stored.head) != stored.head.vary:
            reason = "the stored copy is for other request fields"
        elif decision.action is Action.REFUSE or not may_serve_stale_on_error(decision, stored.head):
            reason = "the stored copy must be revalidated"
        else:
            return stored
        stored.close()
        return reason

    def _serve_stale(self, request: Request, decision: CacheDecision, stored: StoredResponse,
                     reason: str) -> Response:
        if stored.head.key != request.key:
            reason += " Same name as " + stored.head.key.partition("?")[0]
        status = CacheStatus(Outcome.STALE, decision.forward, detail=reason)
        return response_from_store(request, stored, status)

    # For the event loop, for tunnels, and for the operator

    def prepare_hit(self, request: Request, now: float) -> tuple[HotEntry | None, bool]:
        """Render a hit that nothing must be waited for, and return it with whether nothing is stored.

        The caller closes the entry's file.
        """
        stored = self._store.lookup(request.key)
        if stored is None:
            return None, True
        # Whether a client on another host may have a body file without a head takes a DNS lookup.
        is_open = request.client_is_local or (stored.described and not stored.head.local_clients_only)
        entry = hot_entry_for(request, stored, self.config, now) if is_open else None
        if entry is None:
            stored.close()
        return entry, False

    def connect_tunnel(self, request: Request) -> socket.socket:
        """Open the connection that a CONNECT asks for; ProxyError."""
        check_target_allowed(request, self.config)
        if self.config.offline:
            raise ProxyError("This proxy is offline.", 504)
        if request.target.port not in self.config.connect_ports:
            raise ProxyError("CONNECT may not lead to port %d; the operator can add --connect-ports. What is "
                             "fetched with http:// needs none, and is cached." % request.target.port, 403)
        return self._origin.connect(request.target, request.client_is_local, request.client)

    def add_listening_port(self, port: int) -> None:
        """Treat requests that lead back to a port of this proxy as loops."""
        self._origin.guard.listening_ports.add(port)

    def snapshot(self) -> dict[str, Any]:
        """Describe what goes on now, for the status page: plain data of bounded size."""
        return {"downloads": self._downloader.snapshot(), "troubles": self._failures.snapshot(),
                "swept": self.evictor.last_report, "unstored": self._failures.disk_error()}

    def start(self) -> None:
        """Start the background work."""
        self.evictor.start(self.config)

    def close_idle(self) -> None:
        """Close connections to origins that have been idle for too long; cheap if called often."""
        self._origin.close_idle()

    def close(self) -> None:
        """End the background work, and close idle connections."""
        self.evictor.stop()
        self._locks.close()
        self._origin.close()


# ---------------------------------------------------------------------------------------------
# 11 Statistics
# ---------------------------------------------------------------------------------------------


def sum_by_name(rows: Iterable[tuple[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Counts by name: those of one name added up.

    >>> sum_by_name([("a", {"n": 1}), ("b", {"n": 2}), ("a", {"n": 4})])
    {'a': {'n': 5}, 'b': {'n': 2}}
    """
    sums: dict[str, dict[str, int]] = {}
    for name, row in rows:
        known = sums.setdefault(name, dict.fromkeys(row, 0))
        for key, count in row.items():
            known[key] += count
    return sums


def usage_hint(outcomes: dict[str, int], details: Iterable[str]) -> str:
    """What users are about to lose, by how the first requests ended, and why; "" where all is well."""
    heeded: dict[Outcome, int] = {one: outcomes[one.value] for one in Outcome
                                  if one not in (Outcome.OWN, Outcome.REFUSED)}
    total, tunnels = sum(heeded.values()), heeded[Outcome.TUNNEL]
    if total and tunnels >= 0.9 * total:
        return ("%d of %d requests were CONNECT: https passes through unseen and isn't cached. Begin the "
                "repositories' addresses with http://, where their packages are signed, or put the proxy's "
                "own before them: http://this-host:9999/https://mirror.example.org/." % (tunnels, total))
    # What was refused has been seen, too: else one such request, and this would never be said.
    seen = total + outcomes[Outcome.REFUSED.value]
    if not total or seen < HINT_AFTER_REQUESTS[-1] or any(heeded[one] for one in CACHE_OUTCOMES):
        return ""
    most = max(heeded, key=lambda one: heeded[one])
    known = collections.Counter(filter(None, details)).most_common(1)
    why = {Outcome.MISS: "each was for another file. That is normal while the cache fills; else let all "
                         "machines name the same mirror",
           Outcome.BYPASS: "most were kept out by a filter, or are no GET. Indexes need no filters",
           Outcome.FAILED: "most origins cannot be asked",
           }.get(most, "most answers may not be kept%s" % (" (%s)" % known[0][0] if known else ""))
    return "Not one of the first %d requests was a hit: %s." % (total, why)


class Counters:
    """What was answered, and how.  statsCacheBytes + statsDownBytes are the original's names.

    ``down`` counts body bytes that arrived from origins; ``cache`` body bytes sent that no origin
    had to send for it: hits, validated and stale ones, and downloads that others had begun.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _counts
        self._counts = dict.fromkeys(("down", "cache", "tunnelled", *(one.value for one in Outcome)), 0)
        self._started = time.time(), time.monotonic()

    def add_down(self, count: int) -> None:
        """Body bytes from an origin."""
        with self._lock:
            self._counts["down"] += count

    def add_tunnel(self, count: int) -> None:
        """Bytes through tunnels, both ways together."""
        with self._lock:
            self._counts["tunnelled"] += count

    def add(self, outcome: Outcome, cached: int = 0, count: int = 1) -> None:
        """So many answers, with so many body bytes from the cache."""
        with self._lock:
            self._counts[outcome._value_] += count  # .value is a function of the library's
            self._counts["cache"] += cached

    def since(self, now: float) -> float:
        """When it was started, by a clock that says ``now``: a machine that keeps no time while it is off
        starts us by a wrong one, and puts it right later."""
        clock, began = self._started
        right = now - (time.monotonic() - began)
        return clock if abs(right - clock) < 60 else right

    def snapshot(self) -> dict[str, Any]:
        """All of them."""
        with self._lock:
            counts = dict(self._counts)
        outcomes = {outcome.value: counts[outcome.value] for outcome in Outcome}
        return {"statsCacheBytes": counts["cache"], "statsDownBytes": counts["down"],
                "statsTunnelBytes": counts["tunnelled"], "statsRequests": sum(outcomes.values()),
                "statsOutcomes": outcomes}


def _count(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < 2**63:
        raise ValueError("no count")
    return number


class TrafficHistory:
    """Counters over all time, and when the bytes came: what outlives a restart.

    Each instance on a root has a file of its own, by its name.  A damaged or lost file costs the past,
    nothing else.
    """

    def __init__(self, books: str, name: str, totals: Callable[[], dict[str, int]]) -> None:
        self._old = os.path.join(books, "history.json")  # of versions that had one for all instances
        self._path = os.path.join(books, "history-%s.json" % urllib.parse.quote(name, "")[:200])
        self._totals = totals  # the counters since the start: they only grow
        self._stop = threading.Event()
        self._saver: threading.Thread | None = None
        self._lock = threading.Lock()  # guards all below
        self._since = int(time.time())
        self._all: dict[str, int] = {}  # counters over all time, as of the last record
        self._last: dict[str, int] = {}  # and of this run
        # Of each plot, by their number: bytes from the cache, and from origins.
        self._slots: dict[str, dict[int, list[int]]] = {name: {} for name in PLOTS}
        self._saved = ""

    def start(self) -> None:
        """Go on from what was saved, and save from now on."""
        if not os.path.exists(self._path):
            with contextlib.suppress(OSError):  # the first instance of this version inherits the old file
                os.rename(self._old, self._path)
        self.load()
        self._saver = threading.Thread(target=self._save_again, daemon=True)
        self._saver.start()

    def stop(self) -> None:
        """Save for the last time, if it was started."""
        self._stop.set()
        if self._saver is not None:
            self._saver.join(1.0)
            self.save()

    def _save_again(self) -> None:
        while not self._stop.wait(HISTORY_SAVE_INTERVAL):
            self.save()

    def record(self, now: float) -> None:
        """Note what has been counted since the last time."""
        totals = self._totals()
        with self._lock:
            gained = {name: max(0, count - self._last.get(name, 0)) for name, count in totals.items()}
            for name, count in gained.items():
                self._all[name] = self._all.get(name, 0) + count
                self._last[name] = self._last.get(name, 0) + count
            pair = gained["statsCacheBytes"], gained["statsDownBytes"]
            for name, (width, most) in PLOTS.items():
                number, slots = int(now // width), self._slots[name]
                if any(pair):
                    slots[number] = [old + new for old, new in zip(slots.get(number, (0, 0)), pair)]
                for old in [one for one in slots if abs(number - one) >= most]:
                    del slots[old]

    def snapshot(self, now: float) -> dict[str, Any]:
        """Counters over all time, and each plot from its oldest slot to now."""
        self.record(now)
        with self._lock:
            plots = {name: {"seconds": width, "bytes": [
                self._slots[name].get(int(now // width) - back, [0, 0]) for back in range(most - 1, -1, -1)]}
                for name, (width, most) in PLOTS.items()}
            return {"allTime": {"since": self._since, **self._all}, "plots": plots}

    def load(self) -> None:
        """Take over what was saved, if it can be read."""
        try:
            with open(self._path, encoding="utf-8", opener=_private_opener) as file:
                kept = json.loads(file.read(_MAX_HEAD_FILE))
            since = _count(kept["since"])
            counts = {str(key): _count(row) for key, row in kept["all"].items()}
            slots = {name: {int(key): [_count(row[0]), _count(row[1])]
                            for key, row in kept["slots"][name].items()} for name in PLOTS}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return
        with self._lock:
            self._since, self._all, self._slots = since, counts, slots

    def save(self) -> None:
        """Write it down, where it has changed."""
        self.record(time.time())
        with self._lock:
            text = json.dumps({"since": self._since, "all": self._all, "slots": self._slots})
        if text != self._saved and any(self._all.values()):
            with contextlib.suppress(OSError):
                replace_file(self._path, text)
                self._saved = text


class RecentRequests:
    """The last requests, and the busiest origins.

    note() stands in the way of each hit: what can wait is done in gather().
    """

    def __init__(self, outcomes: Callable[[], dict[str, int]]) -> None:
        self._outcomes = outcomes  # counted so far
        self._lock = threading.Lock()  # guards all below
        self._seen = 0
        self._hinted: set[str] = set()  # of what has been said, once
        self._recent: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=MAX_ROWS)
        self._origins: dict[tuple[str, int], list[int]] = {}  # by host and port: requests, bytes, cached ones

    def note(self, request: Request, status: int, cache_status: CacheStatus,
             answers: list[tuple[str, SendResult]]) -> None:
        """What clients got for the same request at the same time, and was no page of ours."""
        target, now = request.target, time.time()
        with self._lock:
            before = self._seen
            self._seen = seen = before + len(answers)
            for client, sent in answers[-MAX_ROWS:]:
                self._recent.append((now, client, request.method, target, request.uri, status, sent,
                                     cache_status))
            if target.host and cache_status.outcome not in (Outcome.REFUSED, Outcome.FAILED):
                place = target.host, target.port
                row = self._origins.get(place) or self._admit(place)
                row[0] += len(answers)
                for _, sent in answers:
                    row[1] += sent.size
                    row[2] += sent.cached
        due = before < HINT_AFTER_REQUESTS[-1] and any(before < number <= seen for number in HINT_AFTER_REQUESTS)
        if due or cache_status.forward == "bypass":
            self._hint(request, due)

    def _admit(self, place: tuple[str, int]) -> list[int]:
        """A row for a new origin; where there are many, the least busy one gives way to it."""
        if len(self._origins) > MAX_ORIGINS:
            least = min((one for one in self._origins if one[0]), key=lambda one: self._origins[one][0])
            others = self._origins.setdefault(("", 0), [0, 0, 0])
            others[:] = map(sum, zip(others, self._origins.pop(least)))
        return self._origins.setdefault(place, [0, 0, 0])

    def _hint(self, request: Request, due: bool) -> None:
        """Say, once each, where users are about to lose what this proxy is for."""
        if due:
            with self._lock:
                details = [row[-1].detail for row in self._recent]
            topic, text = "outcomes", usage_hint(self._outcomes(), details)
        elif classify_name(request.key) in (NameClass.PACKAGE, NameClass.CONTENT):
            topic, text = "filters", "A filter keeps a package from the cache: %s." % displayable_uri(request.uri)
        else:
            return
        with self._lock:
            new = text and topic not in self._hinted
            self._hinted.update([topic] if text else [])
        if new:
            log.warning("%s", text)

    def gather(self) -> dict[str, Any]:
        """All of it as plain data of bounded size: the newest request and the busiest origin first."""
        with self._lock:
            recent = list(self._recent)[::-1]
            origins = sorted(((place, tuple(row)) for place, row in self._origins.items()),
                             key=lambda one: -one[1][1])
        return {
            "recent": [{"at": at, "client": truncate_middle(client, 45), "method": truncate_middle(method, 16),
                        "uri": displayable_uri(target.uri if target.host and method != "CONNECT" else uri),
                        "status": code, "bytes": sent.size, "seconds": round(sent.took, 3),
                        "outcome": status.outcome.value, "detail": truncate_middle(status.detail, 80)}
                       for at, client, method, target, uri, code, sent, status in recent],
            "origins": sum_by_name((truncate_middle(Target("http", host, port, "").authority, 80) if host else "other", {
                "requests": requests, "bytes": sent, "cached": cached})
                for (host, port), (requests, sent, cached) in origins)}


class StatusCollector:
    """What the pages need to know.  For the caller: recent, history, snapshot, ailment."""

    def __init__(self, store: Store, counters: Counters, name: str,
                 gather: Callable[[], dict[str, Any]]) -> None:
        self.recent = RecentRequests(lambda: counters.snapshot()["statsOutcomes"])
        self.history = TrafficHistory(store.metadata_folder, name, self._totals)
        self._store = store
        self.counters = counters
        self._gather = gather  # what else there is to tell

    def _totals(self) -> dict[str, int]:
        """The counters since the start, as one level."""
        counted = self.counters.snapshot()
        return {**{name: counted[name] for name in ("statsCacheBytes", "statsDownBytes", "statsTunnelBytes")},
                **counted["statsOutcomes"]}

    def snapshot(self) -> dict[str, Any]:
        """All that the pages show."""
        now = time.time()
        return {**self.counters.snapshot(), "counters": self._totals(), **self.history.snapshot(now),
                "now": now, "since": self.counters.since(now), "disk": disk_usage(self._store.root),
                **self.recent.gather(), **self._gather()}

    def health_problem(self) -> str:
        """Why this process cannot do its work, or cache; "" where it can."""
        try:
            try_writing(self._store.metadata_folder)
            start_thread(int)
        except OSError as error:
            self._store.space.scarce.set()  # it may be full
            return "The cache root cannot be written: %s." % (error.strerror or error)
        except StorageError:
            return "No more threads are to be had."
        return ""


# ---------------------------------------------------------------------------------------------
# 12 Pages
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Page:
    """One of our own pages."""

    media: str
    text: str
    status: int = 200
    policy: str = "default-src 'none'"  # Content-Security-Policy


TEXT = "text/plain; charset=utf-8"
WELCOME = """pkgproxy %(version)s: a caching HTTP proxy for package managers.
%(state)s

Set this as your HTTP proxy, for example (as root):

  apt       echo 'Acquire::http::Proxy "http://%(proxy)s";' > /etc/apt/apt.conf.d/01proxy
  others    export http_proxy=http://%(proxy)s

More at http://%(proxy)s/ in a browser, counters at http://%(proxy)s/debug/vars
"""
# For each package manager: what /setup/NAME says, where that belongs (after >> it is appended), and what
# else there is to do.
SETUP = {
    "apt": ('Acquire::http::Proxy "http://%s";', "> /etc/apt/apt.conf.d/01proxy", ""),
    "dnf": ("proxy=http://%s", ">> /etc/dnf/dnf.conf", ""),
    "yum": ("proxy=http://%s", ">> /etc/yum.conf", ""),
    "zypper": ('PROXY_ENABLED="yes"\nHTTP_PROXY="http://%s"\nNO_PROXY="localhost, 127.0.0.1"',
               "> /etc/sysconfig/proxy", ""),
    "pacman": ("XferCommand = /usr/bin/env http_proxy=http://%s /usr/bin/curl -fL -C - -o %%o %%u",
               "> /etc/pacman.d/pkgproxy",
               " && sed -i '/^\\[options\\]/a Include = /etc/pacman.d/pkgproxy' /etc/pacman.conf"),
    "pkg": ('PKG_ENV : { http_proxy: "http://%s" }', ">> /usr/local/etc/pkg.conf", ""),
    "opkg": ("option http_proxy http://%s", "> /etc/opkg/pkgproxy.conf", ""),
    "portage": ('http_proxy="http://%s"', ">> /etc/portage/make.conf", ""),
    **dict.fromkeys(("apk", "xbps", "env"), (
        "export http_proxy=http://%s", "> /etc/profile.d/pkgproxy.sh", " && . /etc/profile.d/pkgproxy.sh")),
}
DETECT = """#!/bin/sh
# The proxy for apt where it is well, else DIRECT: for laptops.  Name this file in apt.conf:
#   Acquire::http::Proxy-Auto-Detect "/usr/local/bin/pkgproxy-detect";
if timeout 2 bash -c 'exec 3<>/dev/tcp/%(host)s/%(port)d && printf "GET /healthz HTTP/1.0\\r\\n\\r\\n" >&3 &&
    read -r _ status _ <&3 && [ "$status" = 200 ]' 2>/dev/null; then
    echo 'http://%(proxy)s'
else
    echo DIRECT
fi
"""
AUTOCONFIG = """function FindProxyForURL(url, host) {
    if (url.substring(0, 5) != "http:" || host == "%(host)s" || host == "localhost" || host == "::1"
            || shExpMatch(host, "127.*"))
        return "DIRECT";
    return "PROXY %(proxy)s; DIRECT";
}
"""


def format_bytes(count: float) -> str:
    """Bytes for people.

    >>> format_bytes(999), format_bytes(53080), format_bytes(999_950)
    ('999 B', '53.1 kB', '1.0 MB')
    """
    power = next((power for power in range(1, 5) if count < 999.95 * 1000**power), 5)
    return "%d B" % count if count < 1000 else "%.1f %sB" % (count / 1000**power, " kMGTP"[power])


def format_duration(seconds: float) -> str:
    """Seconds for people.

    >>> format_duration(59), format_duration(90), format_duration(7200), format_duration(3e5)
    ('59 s', '1 min', '2 h', '3 days')
    """
    for width, unit in ((2 * DAY, "days"), (7200, "h"), (60, "min")):
        if seconds >= width:
            return "%d %s" % (seconds // {"days": DAY, "h": 3600}.get(unit, 60), unit)
    return "%d s" % max(0, seconds)


def format_count(count: int, noun: str) -> str:
    """A count for people.

    >>> format_count(1, "file"), format_count(12000, "file")
    ('1 file', '12,000 files')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_percent(part: int, whole: int) -> str:
    """A share for people; a dash where there is nothing to have a share of."""
    return "%d %%" % (100 * part // whole) if whole else "–"


def hit_counts(counts: dict[str, int]) -> tuple[int, int]:
    """How many answers came from the cache, and of how many for which that was to be hoped."""
    found = sum(counts.get(outcome.value, 0) for outcome in CACHE_OUTCOMES)
    others = (Outcome.MISS, Outcome.UPDATED, Outcome.RELAYED, Outcome.BYPASS)
    return found, found + sum(counts.get(outcome.value, 0) for outcome in others)


def summary(view: dict[str, Any]) -> str:
    """In one sentence, whether it works."""
    counts = view["counters"]
    answered = sum(counts.get(outcome.value, 0) for outcome in Outcome if outcome is not Outcome.OWN)
    if not answered:
        return "Running for %s, and waiting for its first request." % format_duration(view["now"] - view["since"])
    return "Running for %s. %s answered, %s saved." % (
        format_duration(view["now"] - view["since"]), format_count(answered, "request"), format_bytes(counts["statsCacheBytes"]))


# The status page.  All that comes from outside goes through escape().
STYLE = """
:root{color-scheme:light dark;--back:#f5f6f8;--card:#fff;--text:#1b1f24;--soft:#5a6270;--line:#dfe2e7;
--cache:#1c64c8;--origin:#a8570a;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--back:#14171b;--card:#1c2026;--text:#e6e8eb;--soft:#a0a8b4;
--line:#30363e;--cache:#6cabff;--origin:#eaa04e;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.5rem 1rem 3rem;background:var(--back);color:var(--text);
font:1rem/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums}
header{display:flex;flex-wrap:wrap;gap:.25rem 1rem;align-items:baseline}header a{margin-left:auto}
h1{font-size:1.5rem;margin:0}h2{font-size:1rem;margin:0 0 .75rem}p{margin:.25rem 0}a{color:var(--cache)}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem 1.25rem;
margin-top:1rem;min-width:0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 1rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:1rem;margin:0}
dt,dd+dd,.soft,th,figcaption{color:var(--soft);font-size:.875rem;font-weight:400}
dd{margin:0}dt+dd{font-size:1.75rem;line-height:1.3;font-weight:600}
.cache{color:var(--cache);fill:var(--cache)}.origin{color:var(--origin);fill:var(--origin)}
svg{display:block;width:100%;height:9rem;border-bottom:1px solid var(--soft)}
figure{margin:0;display:none}figcaption b:nth-of-type(2){margin-left:.75rem}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem}
#hour:checked~div .hour,#day:checked~div .day,#month:checked~div .month{display:block}
.tabs>input{position:absolute;opacity:0}
.tabs>label{display:inline-block;padding:.125rem .75rem;margin:0 .25rem .75rem 0;border:1px solid var(--line);
border-radius:1rem;font-size:.875rem;cursor:pointer}
.tabs>input:checked+label{background:var(--cache);border-color:var(--cache);color:var(--card)}
.tabs>input:focus-visible+label,:focus-visible{outline:2px solid var(--cache);outline-offset:2px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.875rem}
th,td{text-align:left;padding:.25rem 1rem .25rem 0;vertical-align:top;border-top:1px solid var(--line)}
tr:first-child th{border:0}.n{text-align:right;white-space:nowrap}
.name{overflow-wrap:anywhere;min-width:9rem}.name .soft{display:block}
progress{width:100%;accent-color:var(--cache)}ul{margin:0;padding:0}
#setup ul{margin-top:.75rem}li{list-style:none;margin-bottom:.75rem}
pre{margin:.25rem 0 0;padding:.5rem .75rem;background:var(--back);border-radius:.25rem;font-size:.8125rem;
white-space:pre-wrap;overflow-wrap:anywhere;user-select:all}
.bad{color:var(--bad)}.lost #state::after{content:" The connection to it is lost.";color:var(--bad)}
@media(max-width:40rem){body{padding:1rem .5rem 2rem}section{padding:.75rem}.tall thead{display:none}
.tall tr{display:block;border-top:1px solid var(--line);padding:.5rem 0}
th,td{padding-right:.5rem}.name{min-width:6rem}
.tall td{display:inline;border:0;padding:0 .5rem 0 0}.tall td.name{display:block}
.tall td.n:last-child::after{content:" ago"}}
"""
SCRIPT = """
"use strict"; const seen = {};
async function update() {
  if (document.hidden) return;
  try {
    const view = await (await fetch("/status.json")).json();
    for (const [id, text] of Object.entries(view.html))
      if (seen[id] !== text) document.getElementById(id).innerHTML = seen[id] = text;
    document.body.className = "";
  } catch (error) { document.body.className = "lost"; }
}
setInterval(update, 2000);
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>pkgproxy</title><link rel="icon" href="data:,"><style>%(style)s</style>
<noscript><meta http-equiv="refresh" content="10"></noscript></head><body>
<header><h1>pkgproxy</h1><span class="soft">a caching proxy for package managers, %(version)s</span>
<a href="#setup">Set up this machine</a></header>
<main><p id="state">%(state)s</p><section aria-label="Savings"><dl id="figures">%(figures)s</dl></section>
<section class="tabs"><h2>Bytes from the cache and from origins</h2>
<input type="radio" name="span" id="hour" checked><label for="hour">Hour</label>
<input type="radio" name="span" id="day"><label for="day">Day</label>
<input type="radio" name="span" id="month"><label for="month">Month</label>
<div id="plots">%(plots)s</div></section>
<section><h2>Downloads in flight</h2><div id="downloads">%(downloads)s</div></section>
<div class="two"><section><h2>Busiest origins</h2><div class="wide" tabindex="0" role="group"
aria-label="Busiest origins"><table id="origins">%(origins)s</table></div></section>
<section><h2>Disk and troubles</h2><div id="disk">%(disk)s</div></section></div>
<section><h2>Last requests</h2><table id="recent" class="tall">%(recent)s</table></section>
<section id="setup"><h2>Set up this machine</h2><p>As root, one of these; then update as always. Repositories'
addresses must begin with http://, for https passes through unseen, or
with http://%(proxy)s/https://. For another
machine, open this page by an address of ours that it can reach.</p><ul>%(setup)s</ul>
<p class="soft">Each is also text to fetch, as <a href="/setup/apt">/setup/apt</a>. Laptops that leave this
network let apt run <a href="/setup/detect.sh">/setup/detect.sh</a>; others read
<a href="/proxy.pac">/proxy.pac</a>. For machines: <a href="/status.json">/status.json</a>,
<a href="/metrics">/metrics</a>, <a href="/debug/vars">/debug/vars</a>, <a href="/healthz">/healthz</a>.
</p></section></main><script>%(script)s</script></body></html>
"""


def _digest(text: str) -> str:
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY = ("default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % (_digest(STYLE), _digest(SCRIPT)))


def _figures(view: dict[str, Any]) -> str:
    text = ""
    for title, key in (("since the start", "counters"), ("over all time", "allTime")):
        counts = view[key]
        saved, down = counts.get("statsCacheBytes", 0), counts.get("statsDownBytes", 0)
        found, asked = hit_counts(counts)
        text += "<div><dt>Saved %s</dt><dd>%s</dd><dd>%s</dd></div>" % (
            title, format_bytes(saved), "%s came from the cache, %s from origins" % (
                format_percent(saved, saved + down), format_bytes(down)) if saved + down else "nothing has come yet")
        text += "<div><dt>Hits %s</dt><dd>%s</dd><dd>%s of %s</dd></div>" % (
            title, format_percent(found, asked), f"{found:,}", format_count(asked, "request"))
    return text


def _bars(rows: Iterable[tuple[float, float]]) -> str:
    """An SVG path of bars, each from its lower end to its upper one, in hundredths of the plot's height."""
    return "".join("M%d %.1fh.8v%.1fh-.8z" % (at, 100 - top, top - low)
                   for at, (low, top) in enumerate(rows) if top > low)


PLOT = """<figure class="%(name)s"><figcaption><span><b class="cache">&#9632;</b> %(cache)s from the cache
<b class="origin">&#9632;</b> %(origin)s from origins</span><span>at most %(peak)s in %(slot)s</span>
</figcaption><svg viewBox="0 0 %(slots)d 100" preserveAspectRatio="none" role="img"
aria-label="The last %(span)s: %(cache)s from the cache, %(origin)s from origins">
<path class="cache" d="%(low)s"/><path class="origin" d="%(high)s"/></svg>
<figcaption><span>%(span)s ago</span><span>now</span></figcaption></figure>"""


def _plots(view: dict[str, Any]) -> str:
    text = ""
    for name, plot in view["plots"].items():
        rows, width = plot["bytes"], plot["seconds"]
        cache, origin = (sum(column) for column in zip(*rows))
        peak = max(map(sum, rows))
        scale = 100 / (peak or 1)
        text += PLOT % {
            "name": name, "cache": format_bytes(cache), "origin": format_bytes(origin), "peak": format_bytes(peak),
            "slot": format_duration(width), "slots": len(rows), "span": format_duration(width * len(rows)),
            "low": _bars((0, one * scale) for one, _ in rows),
            "high": _bars((one * scale, (one + other) * scale) for one, other in rows)}
    return text


def _named(uri: str) -> str:
    """A file's name, and below it where it is from."""
    folder, mark, name = escape(uri).rpartition("/")
    if not name or "://" not in folder:
        return folder + mark + name
    return '%s <span class="soft">%s</span>' % (name, folder + mark)


def _downloads(view: dict[str, Any]) -> str:
    text = ""
    for row in view["downloads"]:
        length = row["length"]
        bar = "" if length is None else ' max="%d" value="%d"' % (length or 1, row["bytes"])
        text += ('<li class="name">%s<progress aria-label="%s"%s></progress>%s%s, %s/s, %s</li>' % (
            _named(row["uri"]), escape(row["uri"]), bar, format_bytes(row["bytes"]),
            "" if length is None else " of " + format_bytes(length), format_bytes(row["rate"]),
            format_count(row["clients"], "client")))
    return "<ul>%s</ul>" % text if text else '<p class="soft">None at this moment.</p>'


def _recent(view: dict[str, Any]) -> str:
    text = ('<thead><tr><th>Outcome<th>File<th class="n">Size<th class="n">Took<th>Client<th class="n">Ago'
            '</thead><tbody>')
    for row in view["recent"]:
        outcome, took = Outcome(row["outcome"]), row["seconds"]
        bad = outcome in (Outcome.FAILED, Outcome.REFUSED, Outcome.STALE)
        told = [row["method"] if row["method"] != "GET" else "",
                str(row["status"]) if row["status"] != 200 else "", row["detail"]]
        text += '<tr><td class="%s">%s<td class="name">%s %s' % (
            "bad" if bad else "cache" if outcome in CACHE_OUTCOMES else "origin", outcome.value,
            _named(row["uri"]), escape(", ".join(filter(None, told))))
        text += '<td class="n">%s<td class="n">%s<td>%s<td class="n">%s' % (
            format_bytes(row["bytes"]), "%d ms" % (1000 * took) if took < 1 else "%.1f s" % took,
            escape(row["client"]), format_duration(view["now"] - row["at"]))
    return text + "</tbody>" if view["recent"] else '<tr><td class="soft">None yet.'


def _origins(view: dict[str, Any]) -> str:
    text = '<tr><th>Origin<th class="n">Requests<th class="n">Sent<th class="n">Cached'
    for name, row in list(view["origins"].items())[:10]:
        text += '<tr><td class="name">%s<td class="n">%s<td class="n">%s<td class="n">%s' % (
            escape(name), f"{row['requests']:,}", format_bytes(row["bytes"]), format_percent(row["cached"], row["bytes"]))
    return text if view["origins"] else '<tr><td class="soft">None yet.'


def _disk(view: dict[str, Any]) -> str:
    disk, swept, lines = view["disk"], view["swept"], []
    if swept.get("at"):
        lines += ["%s stored, %s on the disk: counted %s ago, as every %s." % (
            format_count(swept["files"], "file"), format_bytes(swept["bytes"]), format_duration(view["now"] - swept["at"]),
            format_duration(EVICTION_INTERVAL)),
                  "Swept since the start: %s, %s." % (format_count(swept["removedFiles"], "file"),
                                                      format_bytes(swept["removedBytes"]))]
    lines += ["%s of %s are free on its disk." % (format_bytes(disk["free"]), format_bytes(disk["size"])) if disk
              else '<span class="bad">The cache root cannot be read.</span>',
              "%s since the start." % format_count(view["counters"]["stale"], "stale answer")]
    if view["unstored"]:
        lines.append('<span class="bad">Nothing can be stored:</span> %s.' % escape(view["unstored"]))
    lines += ['<span class="bad">%s is in trouble:</span> %s For %s more, what is stored is served stale.' % (
        escape(row["origin"]), escape(row["reason"]), format_duration(row["seconds"])) for row in view["troubles"]]
    return "".join("<p>%s</p>" % line for line in lines)


def setup_line(name: str, proxy: str) -> str:
    """What to paste into a root shell so that a package manager uses the proxy."""
    text, place, more = SETUP[name]
    words = " ".join("'%s'" % line for line in (text % proxy).split("\n"))
    return "%s %s %s" % ("printf '%s\\n'" if "' '" in words else "echo", words, place) + more


def status_html(view: dict[str, Any]) -> dict[str, str]:
    """What changes on the status page, by the element that holds it."""
    return {"state": summary(view), "figures": _figures(view), "plots": _plots(view), "disk": _disk(view),
            "downloads": _downloads(view), "recent": _recent(view), "origins": _origins(view)}


def status_page(view: dict[str, Any], proxy: str) -> Page:
    """The status page, whole, for a browser with scripts or without."""
    names: dict[str, list[str]] = {}
    for name in SETUP:
        names.setdefault(setup_line(name, proxy), []).append("others" if name == "env" else name)
    lines = "".join("<li>%s<pre>%s</pre></li>" % (", ".join(row), escape(line))
                    for line, row in names.items())
    return Page("text/html; charset=utf-8", PAGE % {
        **status_html(view), "setup": lines, "style": STYLE, "script": SCRIPT, "version": view["version"],
        "proxy": escape(proxy)}, policy=POLICY)


def _metrics(view: dict[str, Any]) -> Iterator[tuple[str, str, Iterable[tuple[str, float]]]]:
    """Name, meaning, and samples: the value of the one label, "" where there is none, and a number."""
    counts, swept = view["counters"], view["swept"]
    yield "build_info version", "Always 1.", [(view["version"], 1)]
    yield "start_time_seconds", "When it was started.", [("", view["since"])]
    yield "requests_total outcome", "Requests answered, by outcome.", [
        (outcome.value, counts[outcome.value]) for outcome in Outcome]
    for name, key, meaning in (("cache", "statsCacheBytes", "Body bytes that the cache served."),
                               ("downloaded", "statsDownBytes", "Body bytes downloaded from origins."),
                               ("tunnel", "statsTunnelBytes", "Bytes through tunnels, both ways.")):
        yield name + "_bytes_total", meaning, [("", counts[key])]
    for name, key, meaning in (("requests", "requests", "Requests, by origin (the busiest ones)."),
                               ("sent_bytes", "bytes", "Bytes sent to clients, by origin."),
                               ("cached_bytes", "cached", "Those of them that came from the cache.")):
        yield "origin_%s_total origin" % name, meaning, [(o, row[key]) for o, row in view["origins"].items()]
    yield "downloads", "Downloads in flight.", [("", len(view["downloads"]))]
    yield "troubled_origins", "Origins that could not be asked a moment ago.", [("", len(view["troubles"]))]
    for name, key, meaning in (("stored_files", "files", "Stored files, as of the last sweep."),
                               ("stored_bytes", "bytes", "Bytes on the disk, bookkeeping included."),
                               ("swept_files_total", "removedFiles", "Files that sweeps have removed."),
                               ("swept_bytes_total", "removedBytes", "Bytes that sweeps have freed.")):
        yield name, meaning, [("", swept.get(key, 0))]
    for key, count in view["disk"].items():
        yield "disk_%s_bytes" % key, "Bytes of the cache's file system: %s." % key, [("", count)]


def metrics_text(view: dict[str, Any]) -> str:
    """The counters in Prometheus' text format, version 0.0.4."""
    lines = []
    for names, meaning, samples in _metrics(view):
        name, _, label = ("pkgproxy_" + names).partition(" ")
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += ["# HELP %s %s" % (name, meaning), "# TYPE %s %s" % (name, kind)]
        for text, count in samples:
            quoted = re.sub(r'(["\\])', r"\\\1", text)
            lines.append("%s%s %s" % (name, '{%s="%s"}' % (label, quoted) if label else "", repr(count)))
    return "\n".join([*lines, ""])


def page_view(snapshot: dict[str, Any]) -> dict[str, Any]:
    """What the pages show, from what the proxy tells."""
    keys = ("counters", "allTime", "plots", "now", "since", "disk", "recent", "downloads", "unstored",
            "troubles", "origins", "swept")
    return {"version": __version__, **{key: snapshot[key] for key in keys}}


def _json(found: dict[str, Any], indent: int | None = None) -> Page:
    return Page("application/json; charset=utf-8", json.dumps(found, indent=indent) + "\n")


def _setup_page(name: str, names: dict[str, Any]) -> Page:
    if name == "detect.sh":
        return Page(TEXT, DETECT % names)
    if name not in SETUP:
        raise ProxyError("In /setup/NAME, NAME is one of %s." % ", ".join([*SETUP, "detect.sh"]), 404)
    return Page(TEXT, SETUP[name][0] % names["proxy"] + "\n")


def _figures_page(name: str, proxy: str, html: bool, snapshot: Callable[[], dict[str, Any]]) -> Page | None:
    if name == "debug/vars":
        return _json({key: row for key, row in snapshot().items()
                      if key == "cmdline" or key.startswith("stats")}, 1)
    if name not in ("", "status.json", "metrics"):
        return None
    view = page_view(snapshot())
    if name == "status.json":
        return _json({**view, "html": status_html(view)})
    if name == "metrics":
        return Page("text/plain; version=0.0.4; charset=utf-8", metrics_text(view))
    if html:
        return status_page(view, proxy)
    return Page(TEXT, WELCOME % {"version": __version__, "proxy": proxy, "state": summary(view)})


def make_page(path: str, place: tuple[str, int], html: bool, snapshot: Callable[[], dict[str, Any]],
             ailment: Callable[[], str]) -> Page | None:
    """One of our own pages, None where there is none of that name; Failure.

    ``place``: host and port by which the client reached us; ``html``: whether it would rather have that;
    ``ailment``: why we are not well, "" where we are.
    """
    host, port = place
    names = {"host": host, "port": port, "proxy": "[%s]:%d" % place if ":" in host else "%s:%d" % place}
    kind, _, name = path.partition("?")[0][1:].partition("/")
    whole = "/".join([kind, name]) if name else kind
    if kind == "setup":
        return _setup_page(name, names)
    if whole in ("wpad.dat", "proxy.pac"):
        return Page("application/x-ns-proxy-autoconfig", AUTOCONFIG % names)
    if whole == "healthz":
        reason = ailment()
        return Page(TEXT, (reason or "ok") + "\n", 503 if reason else 200)
    return _figures_page(whole, str(names["proxy"]), html, snapshot)


# ---------------------------------------------------------------------------------------------
# 13 Server
# ---------------------------------------------------------------------------------------------


class RequestBody:
    """A request's body: ``length`` bytes, or chunked where that is None."""

    def __init__(self, file: io.BufferedIOBase, length: int | None, timed: DeadlineReader) -> None:
        self._file = file
        self._timed = timed
        self._until = time.monotonic() + CLIENT_TIMEOUT  # and later with each byte
        self._left = length or 0
        self._chunks = ChunkedReader(file) if length is None else None

    @property
    def unread(self) -> bool:
        """Whether there is more to come."""
        return not self._chunks.ended if self._chunks else self._left > 0

    def read(self, size: int = COPY_SIZE, /) -> bytes:
        """Up to ``size`` bytes as they come; BadRequest where the client stops early, or for too long."""
        try:
            self._timed.set_deadline(self._until - time.monotonic())
            if self._chunks:
                data = self._chunks.read(size)
            else:
                data = self._file.read1(min(self._left, size)) if self._left else b""
            self._timed.set_deadline(None)
        except (socket.timeout, TimeoutError):
            raise BadRequestError("The body did not come in time.", 408) from None
        except (OSError, ValueError) as error:
            raise BadRequestError("The body's framing is not clear: %s." % error) from None
        if self._left and not data:
            raise BadRequestError("The body ended %d bytes early." % self._left)
        self._left -= 0 if self._chunks else len(data)
        self._until += len(data) / MIN_BODY_RATE
        return data


def _wait_for_client(sock: socket.socket) -> None:
    """Until a client takes more; socket.timeout."""
    if not wait_until_ready(sock, CLIENT_TIMEOUT, writing=True):
        raise socket.timeout("timed out")


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send to a client, who may take CLIENT_TIMEOUT for each step; OSError, socket.timeout."""
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left):]
        except BlockingIOError:
            _wait_for_client(sock)


def _send_some(sock: socket.socket, part: FileSlice, start: int, by_kernel: bool) -> int:
    try:
        if by_kernel:
            count = os.sendfile(sock.fileno(), part.file.fileno(), start, part.stop - start)
        else:
            count = sock.send(part.file.read_at(min(COPY_SIZE, part.stop - start), start))
    except (BlockingIOError, ConnectionError, TimeoutError, socket.timeout):
        raise
    except OSError as error:
        raise StorageError(error) from None
    if not count:
        raise StorageError(OSError(errno.EIO, "the body was cut"))
    return count


def send_slice(sock: socket.socket, part: FileSlice) -> Iterator[int]:
    """Send a part of a file to a client as ``send_all`` does, by the kernel where that can; yields the bytes
    of each step.  LocalFailure where the disk fails, or the file has become shorter."""
    start, by_kernel = part.start, hasattr(os, "sendfile")
    while start < part.stop:
        try:
            count = _send_some(sock, part, start, by_kernel)
        except BlockingIOError:
            _wait_for_client(sock)
        except StorageError as failure:
            if not by_kernel or failure.code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            by_kernel = False  # not from this file system
        else:
            start += count
            yield count


class ExpectContinueBody:
    """A body that its client sends only when told to (RFC 9110 §10.1.1)."""

    def __init__(self, body: RequestBody, connection: socket.socket) -> None:
        self._body = body
        self._connection: socket.socket | None = connection

    @property
    def unread(self) -> bool:
        """Whether there is more to come."""
        return self._body.unread

    def read(self, size: int = COPY_SIZE, /) -> bytes:
        """Ask for the body before its first byte."""
        if self._connection is not None:
            try:
                send_all(self._connection, b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError as error:
                raise BadRequestError("The client has gone: %s." % error) from None
            self._connection = None
        return self._body.read(size)


def error_response(failure: ProxyError) -> Response:
    """An error of ours, as one plain sentence."""
    detail = "%s; %s" % (str(failure).rstrip("."), failure.reason) if failure.reason else str(failure)
    return Response(error_head(failure.status), bytes_body((str(failure) + "\n").encode()),
                    CacheStatus(failure.outcome, failure.forward, detail=detail))


class TunnelDirection:
    """One direction of a tunnel."""

    def __init__(self, source: socket.socket, sink: socket.socket, early: bytes = b"") -> None:
        self.count = 0  # bytes that have gone through
        self.ended = False  # the source has no more, and the sink knows
        self._source = source
        self._sink = sink
        self._waiting = bytearray(early)
        self._open = True  # whether more may come

    def wants(self, sock: socket.socket) -> int:
        """What it waits for at a socket, in selectors' words."""
        read = sock is self._source and self._open and len(self._waiting) < SMALL_BODY
        write = sock is self._sink and self._waiting
        return (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)

    def move(self, ready: dict[Any, int]) -> None:
        """Move what can be moved, the end included (a half-close); OSError."""
        if ready.get(self._source, 0) & self.wants(self._source) & selectors.EVENT_READ:
            data = self._source.recv(SMALL_BODY)
            self._open = bool(data)
            self._waiting += data
        if ready.get(self._sink, 0) & self.wants(self._sink) & selectors.EVENT_WRITE:
            sent = self._sink.send(self._waiting)
            del self._waiting[:sent]
            self.count += sent
        if not self._open and not self._waiting and not self.ended:
            self.ended = True
            self._sink.shutdown(socket.SHUT_WR)


def relay_tunnel(client: socket.socket, origin: socket.socket, early: bytes) -> int:
    """Bytes both ways, until both ends have closed, one breaks, or nothing has moved for TUNNEL_IDLE.  The
    number of them; ``early`` has come from the client already."""
    ways = (TunnelDirection(client, origin, early), TunnelDirection(origin, client))
    with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
        for sock in (client, origin):
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)
        while not all(way.ended for way in ways):
            for sock in (client, origin):
                wanted = ways[0].wants(sock) | ways[1].wants(sock)
                if sock in selector.get_map():
                    selector.unregister(sock)
                if wanted:
                    selector.register(sock, wanted)
            ready = {key.fileobj: events for key, events in selector.select(TUNNEL_IDLE_TIMEOUT)}
            if not ready:
                break
            for way in ways:
                way.move(ready)
    return sum(way.count for way in ways)


def has_disconnected(sock: socket.socket) -> bool:
    """Whether the other end has closed a connection on which nothing has been read yet."""
    try:
        return wait_until_ready(sock, 0) and not sock.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):  # closed
        return True


@functools.lru_cache(LARGE_MEMO // 4)
def parse_request_head(data: bytes, near: bool, local: tuple[str, int]) -> Request:
    """The request that a whole head makes, for a client on this host or elsewhere; BadRequest, ValueError."""
    return replace_fields(parse_request(read_head_lines(io.BytesIO(data)), local), client_is_local=near)


_BARE_LF = re.compile(rb"(?<!\r)\n")


def find_head_end(data: bytes, seen: int = 0) -> int:
    """Where the first head in ``data`` ends: 0 where more must come, -1 where no more is worth waiting for.
    Of ``data``, so much has been ``seen`` before."""
    end = data.find(b"\r\n\r\n", max(0, seen - 3))
    if end >= 0:
        return end + 4
    long = len(data) > MAX_HEAD or len(data) - data.rfind(b"\n") > MAX_LINE + 2
    return -1 if long or _BARE_LF.search(data, max(0, seen - 1)) else 0


def progress(sock: socket.socket) -> tuple[int, bool]:
    """How many bytes have gone over a connection, both ways, and whether the other end has yet to take some;
    (0, False) if the system does not tell.  The offsets are those of Linux' struct tcp_info."""
    with contextlib.suppress(AttributeError, OSError, struct.error):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) if sys.platform == "linux" else b""
        acknowledged, received = struct.unpack_from("QQ", info, 120)
        queued = struct.unpack_from("I", info, 24), struct.unpack_from("I", info, 144)  # sent, and not yet
        return acknowledged + received, queued != ((0,), (0,))
    return 0, False


class PendingSend(NamedTuple):
    """An answer of the lobby's that could not be sent at once."""

    copy: HotEntry
    left: bytes  # still to be sent, of head and body
    began: float  # monotonic


AccessKey = tuple[bool, tuple[str, int]]  # whether a client is near, and our address by which it came


class ClientConnection:
    """A client's connection, as long as it lasts.  One thread at a time has to do with it."""

    def __init__(self, connection: socket.socket, address: Any, begin: Callable[[ClientConnection], None]) -> None:
        self.connection = connection
        self.address = address  # as accept() tells it
        self.host = unmap_ipv4(address[0])
        self.network = client_network(self.host)
        self.rate = math.inf  # bytes a second that it took lately, while it held up its reply
        self._taken = 0  # bytes, when that was measured last
        self._held = False  # whether it held up its reply then
        self.on_admitted = begin  # to be called when it is admitted
        self.buffered = b""  # has come, and has not been read
        self.answered = False  # whether it has had an answer
        self.waiting = False  # for its next request, or the rest of its head, and no thread serves it
        self.waiting_since = time.monotonic()  # when it began to wait for that
        self.keep_alive = False  # the connection, when no thread serves it any more
        self.known_missing = False  # whether nothing is stored for its request that a thread is to answer
        self.access_key: AccessKey | None = None  # None: it may not connect, or nobody has checked that yet
        self.pending: PendingSend | None = None  # the lobby's answer, while it is being sent
        self._place: tuple[str, int] | None = None
        self._near: bool | None = None

    @property
    def local_address(self) -> tuple[str, int]:
        """Our address and port by which it reached us."""
        if self._place is None:
            name = self.connection.getsockname()
            self._place = unmap_ipv4(name[0]), name[1]
        return self._place

    @property
    def local(self) -> str:
        """Our address alone."""
        return self.local_address[0]

    @property
    def near(self) -> bool:
        """Whether it is on this host."""
        if self._near is None:
            self._near = self.host == self.local or is_local_client(self.host)
        return self._near

    def measure(self, now: float, elapsed: float) -> None:
        """Update the rate after so many seconds.  A reply that only its origin holds up counts after a while.
        """
        taken, queued = progress(self.connection)
        held = queued or not self.waiting and now - self.waiting_since > CLIENT_TIMEOUT
        self.rate = (taken - self._taken) / elapsed if held and self._held else math.inf
        self._taken, self._held = taken, held

    def receive(self) -> bytes | None:
        """What has come by now; b"" where it has gone, None where nothing has come."""
        try:
            return self.connection.recv(SMALL_BODY)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def send(self, data: bytes) -> int | None:
        """How much of ``data`` it takes now; None where it has gone."""
        try:
            return self.connection.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return None


class ConnectionLimiter:
    """A bound on connections: each may take a thread and up to four descriptors.

    When there is no room, the one that has been idle longest makes place for the next, then the one that
    has taken longest over its request head, then the slowest below MIN_RATE; where none is, the next waits.
    One client (an IPv6 /64 network counts as one) has no more than half of it: what it opens beyond is
    parked, without a thread.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tunnels = Quota(max(2, most // 2))
        self._lock = threading.Lock()  # guards all below
        self._count = 0
        self._visitors: set[ClientConnection] = set()
        self._hosts: dict[str, int] = {}  # connections by client
        self._parked: list[ClientConnection] = []
        self._leaving: set[ClientConnection] = set()  # have been shed, and still count
        self._measured = time.monotonic()
        self.crowded = False  # whether somebody has found no room lately

    def reserve(self, waits: bool = True) -> bool:
        """Take room for one connection more; False where there is none yet: then one makes place for it, if
        it really ``waits``."""
        with self._lock:
            free = self._count < self.most
            if waits:
                self.crowded = not free or bool(self._parked)
                if not free:
                    self._close_idle()
            self._count += free
            return free

    def busy_count(self) -> int:
        """Connections that can't be spared."""
        with self._lock:
            return self._count - sum(visitor.waiting for visitor in self._visitors)

    def cancel(self) -> None:
        """Nobody came in."""
        with self._lock:
            self._count -= 1

    def admit(self, visitor: ClientConnection) -> bool:
        """Serve a visitor, or park him; False where even that is too much."""
        with self._lock:
            admitted = self._hosts.get(visitor.network, 0) < self._per_client_limit()
            if admitted:
                self._register(visitor)
            elif len(self._parked) < self.most:
                self._count -= 1
                self._parked.append(visitor)
                self.crowded = True
            else:
                return False
        if admitted:
            visitor.on_admitted(visitor)
        return True

    def release(self, visitor: ClientConnection) -> None:
        """A connection has ended."""
        with self._lock:
            self._count -= 1
            self._leaving.discard(visitor)
            if visitor in self._visitors:
                self._visitors.remove(visitor)
                self._hosts[visitor.network] -= 1
                if not self._hosts[visitor.network]:
                    del self._hosts[visitor.network]

    def admit_parked(self) -> None:
        """Serve those who were parked, where there is place for them; make it where it can be spared."""
        following, gone, stuck = [], [], set()
        with self._lock:
            self._measure(time.monotonic())
            parked, self._parked = self._parked, []
            for visitor in parked:
                if visitor.network in stuck:
                    self._parked.append(visitor)
                elif has_disconnected(visitor.connection):
                    gone.append(visitor)
                elif self._count < self.most and self._hosts.get(visitor.network, 0) < self._per_client_limit():
                    self._count += 1
                    self._register(visitor)
                    following.append(visitor)
                else:
                    stuck.add(visitor.network)
                    self._parked.append(visitor)
            self.crowded = bool(self._parked)
            for host in stuck:
                self._close_idle(host, sum(visitor.network == host for visitor in self._parked))
        for visitor in gone:
            visitor.connection.close()
        for visitor in following:
            visitor.on_admitted(visitor)

    def _measure(self, now: float) -> None:
        if now - self._measured > RATE_WINDOW:
            for visitor in self._visitors:
                visitor.measure(now, now - self._measured)
            self._measured = now

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            parked, self._parked = self._parked, []
        for visitor in parked:
            visitor.connection.close()

    def _per_client_limit(self) -> int:
        return max(4, self.most // 2)

    def _register(self, visitor: ClientConnection) -> None:
        self._visitors.add(visitor)
        self._hosts[visitor.network] = self._hosts.get(visitor.network, 0) + 1

    def _close_idle(self, host: str | None = None, most: int = 1) -> None:
        """Close the connections (of one client) that can be spared best, as far as there are any."""
        now = time.monotonic()
        spare = [visitor for visitor in self._visitors
                 if visitor.waiting and not visitor.pending and host in (None, visitor.network)
                 and (not visitor.buffered and visitor.answered or now - visitor.waiting_since > SLOW_HEAD_AGE)]
        spare.sort(key=lambda visitor: (bool(visitor.buffered) or not visitor.answered, visitor.waiting_since))
        slow = [visitor for visitor in self._visitors
                if visitor.rate < MIN_RATE and host in (None, visitor.network)]
        spare += sorted(slow, key=lambda visitor: visitor.rate)
        most -= sum(host in (None, visitor.network) for visitor in self._leaving)
        for visitor in spare:
            slow_one = visitor.rate < MIN_RATE
            if most > 0 and visitor not in self._leaving and (slow_one or is_open_and_silent(visitor.connection)):
                with contextlib.suppress(OSError):
                    visitor.connection.shutdown(socket.SHUT_RDWR)
                self._leaving.add(visitor)
                most -= 1


def usable_processors() -> list[int]:
    """Those that we may use, the fast ones.  [] where the system does not let us choose (Linux does)."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    speeds = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0)
    for number in speeds:
        with contextlib.suppress(OSError, ValueError), open(
                "/sys/devices/system/cpu/cpu%d/cpufreq/cpuinfo_max_freq" % number, encoding="ascii") as file:
            speeds[number] = int(file.read())
    return [number for number, speed in speeds.items() if speed >= 0.8 * max(speeds.values())]


class CPUAffinity:
    """The processor that the threads of a process share.  Where they run on two, nearly every system call of
    the one hands the interpreter lock to the other, which must be woken there: eight clients took twice the
    time for what is not stored yet.  For the caller: take, away."""

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._all: set[int] = set()

    def pin(self, number: int) -> None:
        """Keep the threads that this one will start together; other instances have other numbers."""
        with contextlib.suppress(OSError):
            found = usable_processors()
            if found:
                everywhere, own = os.sched_getaffinity(0), {found[number % len(found)]}
                os.sched_setaffinity(0, own)
                self._all, self._own = everywhere, own  # where we are let

    @contextlib.contextmanager
    def unpinned(self) -> Iterator[None]:
        """While the kernel has long work to do for a thread, that may go where its client is."""
        if not self._own:
            yield
            return
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._all)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._own)


class Dispatcher:
    """Answers requests, counts and logs the answers, for all servers of a process.

    For the handlers: reply_to, tunnelling, note, note_tunnel.  For the lobbies: admits, refuse, answer, told.
    """

    def __init__(self, proxy: Proxy, statistics: StatusCollector, room: ConnectionLimiter,
                 tell: Callable[[list[str]], None], seat: CPUAffinity | None = None) -> None:
        self.proxy = proxy
        self.statistics = statistics
        self.room = room
        self.seat = seat or CPUAffinity()
        self._tell = tell  # writes lines into the log
        self._ids = itertools.cycle(range(1, 1000))
        self._refusals = RecentEvents()  # by address
        self._full_name = functools.lru_cache(1)(socket.getfqdn)  # when first needed: it may take seconds

    def admits(self, visitor: ClientConnection) -> bool:
        """Whether a client may connect.  The only check of its address, before anything is parsed."""
        allowed = visitor.host == visitor.local or is_client_allowed(visitor.host, self.proxy.config.allow)
        if allowed and visitor.access_key is None:
            visitor.access_key = visitor.near, visitor.local_address
        return allowed

    def refuse(self, visitor: ClientConnection) -> bytes:
        """The answer to a client that may not connect, whatever it sent; counted and logged."""
        failure = ProxyError("%s may not use this proxy; its operator can add --allow." % visitor.host, 403)
        reply, request = error_response(failure), Request("?", "?", Target("", "", 0, "/"), ())
        size, quiet = reply.body.length or 0, not self._refusals.note_first(visitor.host, REFUSAL_LOG_INTERVAL)
        self._note(request, 403, reply.cache_status, [(visitor.host, SendResult(size, 0, 0.0, True, quiet))])
        head = with_date(reply.head, time.time())
        return render_response_head(request, head, size, reply.cache_status, True, self.proxy.config) + b"%s\n" % (
            str(failure).encode())

    def _check_name(self, request: Request) -> None:
        """Failure if a request for an own page, or with a prefix, does not call this proxy by its name."""
        name = called_name(request)
        if not is_own_name(name, self.proxy.config.names) and name not in (
                socket.gethostname().lower(), self._full_name().lower()):
            raise ProxyError("This proxy does not answer to the name '%s'; its operator can add --name %s." % (
                name, name), 421)

    @contextlib.contextmanager
    def open_tunnel(self, request: Request) -> Iterator[socket.socket]:
        """The connection that a CONNECT asks for, while its tunnel lasts; Failure."""
        if not self.room.tunnels.acquire(request.client):
            raise ProxyError("Too many tunnels are open.", 503)
        try:
            with self.proxy.connect_tunnel(request) as origin:
                yield origin
        finally:
            self.room.tunnels.release(request.client)

    def respond(self, request: Request, authority: str) -> Response:
        """Our own page, or the proxy's reply; Failure.  ``authority``: where we listen."""
        self._check_name(request)
        if not request.is_own_page:
            return self.proxy.respond(request)
        if request.method == "OPTIONS":
            return answer_as_final_recipient(request)
        if request.method not in ("GET", "HEAD"):
            raise ProxyError("Our own pages are for GET and HEAD.", 405)
        listening = Target("", request.server_address, int(authority.rpartition(":")[2]), "").authority
        host, port = split_authority(field_value(request.fields, "Host") or listening, 80)
        page = make_page(request.uri, (host, port), "text/html" in (field_value(request.fields, "Accept") or ""),
                        self.snapshot, self.health_problem)
        if page is None:
            raise ProxyError("There is no such page here. To fetch through this proxy, set http_proxy=http://%s/"
                          " or ask for /http://host/path" % Target("", host, port, "").authority, 404)
        return Response(generated_head(page.status, page.media, (("Vary", "Accept"),), page.policy),
                     bytes_body(page.text.encode()), CacheStatus(Outcome.OWN))

    def snapshot(self) -> dict[str, Any]:
        """What the pages show, with the command line as Go's expvar has it."""
        words = [re.split(r"(?<=\A--parent=)", word) for word in sys.argv]
        return {"cmdline": ["".join(map(loggable_uri, parts)) for parts in words], **self.statistics.snapshot()}

    def health_problem(self) -> str:
        """Why this proxy is not well, "" where it is."""
        if self.room.busy_count() >= self.room.most:
            return "All %d connections are busy." % self.room.most
        return self.statistics.health_problem()

    def record(self, request: Request, reply: Response, sent: int, took: float, whole: bool) -> None:
        """Count and log one answer."""
        counted = reply.counts_as_cached and reply.head.status in (200, 206)
        cached = max(0, sent - reply.body.origin_bytes) if counted else 0
        self._note(request, reply.head.status, reply.cache_status,
                   [(request.client, SendResult(sent, cached, took, whole))])

    def _note(self, request: Request, status: int, cache_status: CacheStatus,
              answers: list[tuple[str, SendResult]], text: str = "") -> None:
        """The same for all of them: what was asked, and what the answer was."""
        outcome = cache_status.outcome
        self.statistics.counters.add(outcome, sum([sent.cached for _, sent in answers]), len(answers))
        if outcome is not Outcome.OWN:
            self.statistics.recent.note(request, status, cache_status, answers)
        if log.isEnabledFor(logging.DEBUG if outcome is Outcome.OWN else logging.INFO):
            text = text or log_text(request, cache_status)
            self._tell(["[%3d] %-15s %-9s %3d %9d bytes %7.3f s  %s%s" % (
                next(self._ids), client, outcome._value_, status, sent.size, sent.took, text,
                "" if sent.whole else ", broken off") for client, sent in answers if not sent.quiet])

    def record_tunnel(self, request: Request, head: ResponseHead, count: int, took: float, whole: bool) -> None:
        """Count and log one tunnel."""
        self.statistics.counters.add_tunnel(count)
        self.record(request, Response(head, bytes_body(b""), CacheStatus(Outcome.TUNNEL)), count, took, whole)

    def try_hot_path(self, visitor: ClientConnection, size: int, shelf: HotCache) -> HotEntry | None:
        """The answer to a request with a head so long, where it is at hand."""
        visitor.known_missing = False
        if size > MAX_MEMOIZED_HEAD or visitor.access_key is None:
            return None
        asked = visitor.buffered[:size], visitor.access_key
        copy = shelf.get(asked, self.proxy.config)
        if copy is None:
            copy, visitor.known_missing = self._prepare(asked, shelf)
        return copy

    def _prepare(self, asked: tuple[bytes, AccessKey], shelf: HotCache) -> tuple[HotEntry | None, bool]:
        """What is at hand for a request that nobody has made in this second; whether nothing is stored."""
        head, whence = asked
        try:
            request = parse_request_head(head, *whence)
        except (ProxyError, ValueError):
            return None, False
        named = is_own_name(called_name(request), self.proxy.config.names)  # others may take a look-up
        if request.is_own_page or not named or request.length != 0 or request.method not in ("GET", "HEAD"):
            return None, False
        copy, missing = self.proxy.prepare_hit(request, float(int(time.time())))
        if copy is not None:
            shelf.put(asked, copy)
        return copy, missing

    def record_hot(self, copy: HotEntry, answers: list[tuple[str, SendResult]]) -> None:
        """Count and log what lobbies sent of a copy, to whom."""
        self._note(copy.request, copy.status, copy.cache_status, answers, copy.text)


class LoopOwner(Protocol):
    """Whose lobby it is."""

    desk: Dispatcher

    def serve_in_thread(self, visitor: ClientConnection) -> None:
        """Serve a visitor, however long it takes; in a thread, that is."""

    def shutdown_request(self, request: Any) -> None:
        """A visitor leaves."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of a bug."""


class WakeableSelector:
    """A selector whom other threads can call."""

    def __init__(self, called: Callable[[], None]) -> None:
        self._selector = selectors.DefaultSelector()
        self._watched: set[socket.socket] = set()  # whom the selector does not know costs it a long message
        self._bell, self._button = socket.socketpair()
        for sock in (self._bell, self._button):
            sock.setblocking(False)
        self.register(self._bell, selectors.EVENT_READ, called)

    def wake(self) -> None:
        """Let select() return, and what is ``called`` be among what it returns; from any thread."""
        with contextlib.suppress(OSError):  # it rings already, or it has been closed
            self._button.send(b"\0")

    def drain(self) -> None:
        """The bell has been heard."""
        with contextlib.suppress(OSError):
            self._bell.recv(4096)

    def select(self, timeout: float) -> list[Any]:
        """What belongs to the sockets that are ready now, or within ``timeout`` seconds."""
        return [key.data for key, _ in self._selector.select(timeout)]

    def register(self, sock: socket.socket, events: int, data: Any) -> None:
        """From now on watch a socket for these events; OSError."""
        if sock in self._watched:
            self._selector.modify(sock, events, data)
        else:
            self._selector.register(sock, events, data)
            self._watched.add(sock)

    def unregister(self, sock: socket.socket) -> None:
        """Watch a socket no more."""
        if sock in self._watched:
            self._watched.remove(sock)
            self._selector.unregister(sock)

    def close(self) -> None:
        """Watch nothing more."""
        for thing in (self._selector, self._bell, self._button):
            thing.close()


class EventLoop:
    """Where visitors wait whom no thread serves: one selector, and one thread, for all of them.

    What they ask for that is at hand they get on the spot.  For all that may take longer they go to a
    thread, and come back.  For the caller: welcome and close, from any thread; the rest from one.
    """

    def __init__(self, host: LoopOwner) -> None:
        self._host = host
        self._visitors: set[ClientConnection] = set()
        self._coming: queue.SimpleQueue[ClientConnection] = queue.SimpleQueue()
        self._again: list[ClientConnection] = []  # have asked for more than their turn allows
        self._given: dict[HotEntry, list[tuple[str, SendResult]]] = {}  # in this turn, and to whom
        self._closed = False
        self._thread = 0  # that attends
        self._shelf = HotCache()
        self.watchman = WakeableSelector(self._take_new)

    def add(self, visitor: ClientConnection) -> None:
        """Let a visitor wait for its next request."""
        if self._thread == threading.get_ident() and not self._closed:
            self._add(visitor)
            return
        self._coming.put(visitor)
        (self._take_new if self._closed else self.watchman.wake)()

    def run_once(self, timeout: float) -> None:
        """Serve who wants something now, or within ``timeout`` seconds."""
        self._thread = threading.get_ident()
        again, self._again = self._again, []
        found = self.watchman.select(0 if again else timeout)
        self._shelf.start_turn((int(time.time()), self._host.desk.proxy.config))
        for ready in found:
            if not isinstance(ready, ClientConnection):
                ready()
            elif ready.waiting and ready not in again:
                self._serve(ready)
        for visitor in again:
            if visitor.waiting:
                self._serve(visitor, more=True)
        self._record()

    @property
    def sending(self) -> int:
        """Answers of its own under way."""
        return sum(visitor.pending is not None for visitor in tuple(self._visitors))

    def close_timed_out(self, now: float) -> None:
        """See off who has waited for too long; ``now`` is monotonic."""
        for visitor in tuple(self._visitors):
            patience = REQUEST_HEAD_TIMEOUT if visitor.buffered or not visitor.answered else (
                IDLE_TIMEOUT if visitor.access_key else LINGER_TIMEOUT)
            if now - visitor.waiting_since > (CLIENT_TIMEOUT if visitor.pending else patience):
                told = visitor.buffered and not visitor.pending  # that its head did not come in time
                (self._hand_to_thread if told else self._close)(visitor)

    def close(self) -> None:
        """See everybody off."""
        self._closed = True
        self._take_new()
        for visitor in tuple(self._visitors):
            self._close(visitor)
        self._record()
        self._shelf.clear()
        self.watchman.close()

    def _take_new(self) -> None:
        self.watchman.drain()
        with contextlib.suppress(queue.Empty):
            while True:
                visitor = self._coming.get_nowait()
                (self._host.shutdown_request if self._closed else self._add)(visitor)

    def _add(self, visitor: ClientConnection) -> None:
        """Hear at once what a visitor wants, which a new one has mostly said already; if that isn't all, let
        him wait."""
        visitor.connection.setblocking(False)
        self._visitors.add(visitor)
        visitor.waiting, visitor.waiting_since = True, time.monotonic()  # one may have been parked for long
        self._shelf.recheck()  # it may have come after the others of this turn
        self._serve(visitor)
        if visitor.waiting and not visitor.pending:
            self._watch(visitor)

    def _watch(self, visitor: ClientConnection) -> None:
        events = selectors.EVENT_WRITE if visitor.pending else selectors.EVENT_READ
        try:
            self.watchman.register(visitor.connection, events, visitor)
        except OSError as error:  # the system watches no more
            log.warning("A connection cannot be waited for: %s", error)
            self._close(visitor)

    def _remove(self, visitor: ClientConnection) -> None:
        visitor.waiting = False
        self._visitors.discard(visitor)
        self.watchman.unregister(visitor.connection)

    def _close(self, visitor: ClientConnection) -> None:
        """Let a visitor leave, and note what was left of an answer to it."""
        if visitor.pending:
            (copy, left, began), visitor.pending = visitor.pending, None
            self._note(visitor, copy, copy.body_size - len(left), began, whole=False)
        self._remove(visitor)
        self._host.shutdown_request(visitor)

    def _hand_to_thread(self, visitor: ClientConnection) -> None:
        self._remove(visitor)
        self._host.serve_in_thread(visitor)

    def _serve(self, visitor: ClientConnection, more: bool = False) -> None:
        """Do what there is to do for a visitor; ``more``: of what he has asked for already.  A bug costs him,
        not the others."""
        try:
            if visitor.pending:
                self._send(visitor, *visitor.pending)
                self._serve_buffered(visitor)
            elif more:
                self._serve_buffered(visitor)
            else:
                self._on_readable(visitor)
        except Exception:  # noqa: BLE001
            self._host.handle_error(visitor, visitor.address)
            if visitor.waiting:
                self._close(visitor)

    def _on_readable(self, visitor: ClientConnection) -> None:
        began, data = time.monotonic(), visitor.receive()
        if not data:
            if data is not None:
                self._close(visitor)
            return
        known = visitor.access_key
        if not known and not self._host.desk.admits(visitor):
            self._refuse(visitor)
            return
        if not visitor.buffered:
            visitor.waiting_since = began
            if known:  # mostly it is one head, which somebody has sent a moment ago
                copy = self._shelf.get((data, known), self._host.desk.proxy.config)
                if copy is not None:
                    self._send(visitor, copy, copy.data, began)
                    return
        seen, visitor.buffered = len(visitor.buffered), visitor.buffered + data
        self._shelf.recheck()  # what follows a first head may have been sent in this turn
        self._serve_buffered(visitor, seen)

    def _refuse(self, visitor: ClientConnection) -> None:
        """Answer a client that may not connect, once.  What it sends is dropped, until it closes or LINGER is
        over: unread bytes would turn our close into a reset, which may overtake the answer."""
        if not visitor.answered:
            visitor.answered, visitor.waiting_since = True, time.monotonic()
            visitor.send(self._host.desk.refuse(visitor))
            with contextlib.suppress(OSError):
                visitor.connection.shutdown(socket.SHUT_WR)

    def _serve_buffered(self, visitor: ClientConnection, seen: int = 0) -> None:
        """Answer what can be answered on the spot, request after request, as long as a turn lasts."""
        for _ in range(REQUESTS_PER_TURN):
            began, free = time.monotonic(), visitor.waiting and not visitor.pending
            size = find_head_end(visitor.buffered, seen) if free else 0
            if not size:
                return
            copy = self._host.desk.try_hot_path(visitor, size, self._shelf) if size > 0 else None
            if copy is None:
                self._hand_to_thread(visitor)
                return
            visitor.buffered, seen = visitor.buffered[size:], 0
            self._send(visitor, copy, copy.data, began)
        self._again.append(visitor)

    def _send(self, visitor: ClientConnection, copy: HotEntry, left: bytes, began: float) -> None:
        """Send what can be sent now of what is ``left`` of a copy, and note when that was all."""
        waited, count = visitor.pending is not None, visitor.send(left)
        whole = count == len(left)
        visitor.pending = None if whole else PendingSend(copy, left[count or 0:], began)
        if count is None:
            self._close(visitor)
            return
        visitor.waiting_since = time.monotonic()
        if waited is whole:
            self._watch(visitor)
        if whole:
            visitor.answered = True
            self._note(visitor, copy, copy.body_size, began, whole=True)
            if copy.close:
                self._close(visitor)

    def _note(self, visitor: ClientConnection, copy: HotEntry, size: int, began: float, whole: bool) -> None:
        """Keep in mind what a visitor was given: so many bytes of the body, or only some of the head."""
        sent = SendResult(max(0, size), max(0, size), time.monotonic() - began, whole)
        self._given.setdefault(copy, []).append((visitor.host, sent))

    def _record(self) -> None:
        """Let what was given be counted and logged, all that was given of one copy together."""
        given, self._given = self._given, {}
        for copy, answers in given.items():
            self._host.desk.record_hot(copy, answers)


class RequestReader:
    """Reads one client's requests.  For the caller: next, early, linger."""

    def __init__(self, visitor: ClientConnection) -> None:
        self.line = "?"  # the last request's first
        self._begun = False
        self._visitor = visitor
        self._timed = DeadlineReader(visitor.connection, CLIENT_TIMEOUT, visitor.buffered)
        self.file = io.BufferedReader(self._timed, 64 * 1024)

    def next(self) -> Request | None:
        """The next request, the head of which has come; None where the client has gone; BadRequest."""
        self.line = "?"
        request = self._known() or self._read()
        if request is None:
            return None
        body: RequestBody | ExpectContinueBody | None = None
        if request.length != 0:
            body = RequestBody(self.file, request.length, self._timed)
            if list_members(request.fields, "Expect") == ["100-continue"] and request.version >= (1, 1):
                body = ExpectContinueBody(body, self._visitor.connection)
        visitor = self._visitor
        return replace_fields(request, body=body, received=time.time(), client=visitor.host,
                       server_address=visitor.local, client_is_local=visitor.near)

    def _known(self) -> Request | None:
        """The first request, where the lobby has parsed it already."""
        early, size = self._timed.prefetched, 0 if self._begun else find_head_end(self._timed.prefetched)
        self._begun = True
        if 0 < size <= MAX_MEMOIZED_HEAD:
            with contextlib.suppress(ProxyError, ValueError):
                request = parse_request_head(early[:size], self._visitor.near, self._visitor.local_address)
                self._timed.prefetched = early[size:]
                return replace_fields(request, known_missing=self._visitor.known_missing)
        return None

    def _read(self) -> Request | None:
        self._timed.set_deadline(max(0.0, self._visitor.waiting_since + REQUEST_HEAD_TIMEOUT - time.monotonic()))
        lines = self._read_head()
        self._timed.set_deadline(None)
        if not lines:
            return None
        self.line = lines[0]
        return parse_request(lines, self._visitor.local_address)

    def _read_head(self) -> list[str]:
        try:
            lines = read_head_lines(self.file)
            if lines == [""]:  # an empty line before the request line (RFC 9112 §2.2)
                lines = read_head_lines(self.file)
            return lines
        except ValueError as error:
            raise BadRequestError("The head is not clear: %s." % error, getattr(error, "status", 400)) from None
        except (socket.timeout, TimeoutError):
            raise BadRequestError("The head did not come within %d s." % REQUEST_HEAD_TIMEOUT, 408) from None

    def buffered(self) -> bytes:
        """What has come already of what follows."""
        self._timed.set_deadline(0.0)
        data = b""
        with contextlib.suppress(socket.timeout):
            data = self.file.peek(1)
        return data + self._timed.prefetched

    def drain_and_close(self) -> None:
        """Unread bytes would turn our close into a reset, which may overtake the answer."""
        with contextlib.suppress(OSError):
            self._visitor.connection.shutdown(socket.SHUT_WR)
            self._timed.set_deadline(LINGER_TIMEOUT)
            while self.file.read1(COPY_SIZE):
                pass


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """One client connection: bytes to Request, Reply to bytes.  It decides nothing."""

    server: ProxyServer

    def setup(self) -> None:
        """Take over a visitor."""
        self._visitor: ClientConnection = self.request
        self.connection = self._visitor.connection  # which does not block
        self._reader = RequestReader(self._visitor)
        self.rfile = self._reader.file

    def handle(self) -> None:
        """Answer the request that has come, and those that came with it (RFC 9112 §9.3)."""
        with contextlib.suppress(ConnectionError, socket.timeout, TimeoutError):
            while self._answer_one():
                self._visitor.answered, self._visitor.waiting_since = True, time.monotonic()
                self._visitor.buffered = self._reader.buffered()
                if not find_head_end(self._visitor.buffered):
                    self._visitor.keep_alive = True
                    return

    def finish(self) -> None:
        """Let go of the visitor."""
        self.rfile.close()

    def _answer_one(self) -> bool:
        """One request and its reply; whether the connection stays open."""
        self._sent = 0  # body bytes of the reply that have left
        self._bytes_sent = False  # whether any byte of it has left
        self._started = time.monotonic()
        try:
            request = self._reader.next()
        except ProxyError as failure:
            method, _, uri = self._reader.line.partition(" ")
            # Before they are shortened: the @ behind a long password may be in the part that is left out.
            method, uri = cut_userinfo(method), cut_userinfo(uri)
            uri = (uri.rpartition(" ")[0] or uri)[:200]
            request = Request(method[:200], uri, Target("", "", 0, "/"), (), client=self._visitor.host,
                              server_address=self._visitor.local)
            return self._answer(request, error_response(failure), close=True)
        if request is None:
            return False
        self._started = time.monotonic()
        with self.server.count_reply():
            if request.method == "CONNECT":
                return self._handle_connect(request)
            return self._answer(request, self._reply_to(request))

    def _handle_connect(self, request: Request) -> bool:
        """Serve a tunnel to its end; False: nothing follows it."""
        established, count, whole = ResponseHead(200, "Connection established", ()), 0, False
        try:
            with self.server.desk.open_tunnel(request) as origin:
                try:
                    fields = (("Via", via_value((), (1, 1), self.server.desk.proxy.config)),)
                    self._write(render_head(established, fields))
                    count = relay_tunnel(self.connection, origin, self._reader.buffered())
                    whole = True
                finally:
                    took = time.monotonic() - self._started
                    self.server.desk.record_tunnel(request, established, count, took, whole)
        except ProxyError as failure:
            return self._answer(request, error_response(failure), close=True)
        return False

    def _reply_to(self, request: Request) -> Response:
        """The server's reply; an error where there is none.  The one place where a bug becomes a 500."""
        try:
            return self.server.desk.respond(request, self.server.authority)
        except ProxyError as failure:
            return error_response(failure)
        except Exception:
            log.exception("%s %s failed: this is a bug", request.method, loggable_uri(request.uri))
            return error_response(ProxyError("This proxy failed; its log says how.", 500))

    def _answer(self, request: Request, reply: Response, close: bool = False) -> bool:
        """Send a reply, or, if that fails before its first byte, an error; then note it."""
        whole, open_after = False, False
        try:
            while not whole:
                try:
                    open_after = self._send(request, reply, close)
                    whole = True
                except (ProxyError, StorageError) as failure:
                    if self._bytes_sent:
                        return False  # the only honest error is closing the connection (invariant 7)
                    reply.body.close()
                    reply = self._fallback(reply, failure)  # an error of ours at last, which does not fail
            if not open_after and (close or wants_keep_alive(request) or getattr(request.body, "unread", False)):
                self._reader.drain_and_close()  # the client may still be sending
            return open_after
        finally:
            reply.body.close()
            self.server.desk.record(request, reply, self._sent, time.monotonic() - self._started, whole)

    def _fallback(self, reply: Response, failure: ProxyError | StorageError) -> Response:
        """What goes to the client where a reply failed before its first byte."""
        try:
            if reply.fallback:
                return reply.fallback(failure)
        except ProxyError as error:
            failure = error
        return error_response(failure if isinstance(failure, ProxyError) else ProxyError(str(failure), 500))

    # Writing

    def _send(self, request: Request, reply: Response, close: bool) -> bool:
        """Send a reply; whether the connection stays open.  Failure where the body can't be completed."""
        framing = response_framing(request, reply.head, reply.body.length)
        unread = getattr(request.body, "unread", False)
        close = close or unread or framing is Framing.CLOSE or not wants_keep_alive(request)
        head = render_response_head(request, with_date(reply.head, time.time()), reply.body.length, reply.cache_status,
                         close, self.server.desk.proxy.config)
        if request.method == "HEAD" or framing is Framing.NONE:
            self._write(head)
            return not close
        try:
            self._write_body(head, reply, framing)
        except Exception:
            if framing is Framing.CLOSE and self._bytes_sent:
                # A plain close would pass for the end (invariant 7): reset the connection.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()
            raise
        return not close

    def _write_body(self, head: bytes, reply: Response, framing: Framing) -> None:
        """Head and first bytes leave in one segment where the body is small."""
        body = reply.body
        waiting, count, total = head, 0, 0
        for part in body.chunks():
            total += part.size if isinstance(part, FileSlice) else len(part)
            if body.length is not None and total > body.length:
                raise ConnectionAbortedError(errno.EIO, "the body is longer than declared")
            if isinstance(part, FileSlice) and part.size > SMALL_BODY:
                if not self._bytes_sent:  # an error can still be told
                    read_file_slice(FileSlice(part.file, part.start, part.start + 1))
                self._write(waiting, count)
                waiting, count = b"", 0
                self._send_file(part)
                continue
            data = read_file_slice(part) if isinstance(part, FileSlice) else part
            waiting += b"%x\r\n%s\r\n" % (len(data), data) if framing is Framing.CHUNKED and data else data
            count += len(data)
            if len(waiting) > SMALL_BODY or body.live:
                self._write(waiting, count)
                waiting, count = b"", 0
        if body.length not in (None, total):
            raise ConnectionAbortedError(errno.EIO, "the body is shorter than declared")
        self._write(waiting + (b"0\r\n\r\n" if framing is Framing.CHUNKED else b""), count)

    def _write(self, data: bytes, count: int = 0) -> None:
        """Send bytes, ``count`` of them the body's."""
        self._bytes_sent = self._bytes_sent or bool(data)
        send_all(self.connection, data)
        self._sent += count

    def _send_file(self, part: FileSlice) -> None:
        """Let the kernel send it; LocalFailure where it can't be read, and nothing comes instead."""
        self._bytes_sent, at = True, part.start
        try:
            with self.server.desk.seat.unpinned() if part.size > LARGE_SEND else contextlib.nullcontext():
                for count in send_slice(self.connection, part):
                    self._sent += count
                    at += count
        except StorageError:
            if part.fallback is None:
                raise
            for data in part.fallback(at, part.stop):
                self._write(data, len(data))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """http.server's own log lines: the server's note() has said it all."""


class NonblockingListener(socket.socket):
    """Takes over a socket that listens, and does not block: another process may be quicker to accept.

    accept() asks for the family and the type each time, of which socket makes enumerations: a tenth of the
    time of a connection.
    """

    def __init__(self, plain: socket.socket) -> None:
        self._family, self._type = plain.family, plain.type
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self.setblocking(False)

    @property
    def family(self) -> socket.AddressFamily:
        """Its address family."""
        return self._family

    @property
    def type(self) -> socket.SocketKind:
        """Its kind."""
        return self._type


def open_socket(host: str, port: int, reuse_port: bool = False) -> socket.socket:
    """A socket that listens, for IPv4 and IPv6 where the host is empty and we can, where other processes may
    listen too with ``reuse_port``; OSError, OverflowError."""
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    return NonblockingListener(socket.create_server(
        (host, port), family=family, backlog=LISTEN_BACKLOG, reuse_port=reuse_port, dualstack_ipv6=both))


def display_address(listening: socket.socket) -> str:
    """host:port of a listening socket; without the host where it is any."""
    host, port = listening.getsockname()[:2]
    shown = "[%s]" % host if ":" in host else host
    return "%s:%d" % ("" if ipaddress.ip_address(host).is_unspecified else shown, port)


class ThreadPool:
    """Threads that have done their work and wait a while for more: to start one costs as much as several
    hits.  For the caller: do, close."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _idle and _closed
        self._work: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]]] = queue.SimpleQueue()
        self._idle = 0  # threads that wait, and have not been counted on
        self._closed = False

    def submit(self, work: Callable[..., object], *arguments: Any) -> None:
        """Let a thread do it, which catches its errors; RuntimeError where there can't be one more."""
        with self._lock:
            found = self._idle > 0
            self._idle -= found
        if found:
            self._work.put((work, arguments))
        else:
            threading.Thread(target=self._run, args=(work, arguments), daemon=True).start()

    def close(self) -> None:
        """Send home who waits, and whoever comes back."""
        with self._lock:
            self._closed, count, self._idle = True, self._idle, 0
        for _ in range(count):
            self._work.put((int, ()))

    def _run(self, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        while True:
            work(*arguments)
            del work, arguments  # else their connection lives on
            with self._lock:
                if self._closed or self._idle >= MAX_IDLE_THREADS:
                    return
                self._idle += 1
            try:
                work, arguments = self._work.get(timeout=THREAD_IDLE_TIMEOUT)
            except queue.Empty:
                with self._lock:
                    if self._idle:
                        self._idle -= 1
                        return
                work, arguments = self._work.get()  # we are counted on


class ProxyServer(http.server.ThreadingHTTPServer):
    """Listens on one address; a thread for whatever may block."""

    def __init__(self, listening: socket.socket, desk: Dispatcher) -> None:
        self.desk = desk
        self.room = desk.room
        self._lock = threading.Lock()  # guards _replying
        self._replying = 0
        self._until = math.inf  # monotonic: when serve_forever() ends at last
        self._accept_soon = True  # whether somebody may wait for the room that there is now, as when it starts
        self._resume = 0.0  # monotonic: until then nobody is let in
        self.last_iteration = time.monotonic()  # of its loop, the last
        self._ended = threading.Event()
        self._ended.set()
        super().__init__(listening.getsockname()[:2], ProxyHandler, bind_and_activate=False)
        self.socket.close()  # socketserver's own
        self.socket = listening
        self.authority = display_address(listening)  # for replies that outlast it, too
        self.lobby = EventLoop(self)
        self._crew = ThreadPool()
        desk.proxy.add_listening_port(self.server_address[1])

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown(): socketserver's loop, with the lobby in the place of its selector."""
        self._ended.clear()
        acted = 0.0
        while time.monotonic() < self._until and (self._until == math.inf or self.lobby.sending):
            try:
                self.lobby.run_once(0.0 if self._accept_soon else poll_interval)
                now = time.monotonic()
                if self._accept_soon or now - acted >= poll_interval:
                    acted, self._accept_soon = now, False
                    self.service_actions()
            except Exception:  # one client's fault, or one bug, is not the end of service
                log.exception("Waiting for clients failed: this is a bug")
                time.sleep(poll_interval)
        self._ended.set()

    def stop(self) -> None:
        """Accept no more; what is being sent may take GRACE."""
        self._until = time.monotonic() + SHUTDOWN_GRACE
        self.room.close()
        self.lobby.watchman.wake()

    def shutdown(self) -> None:
        """Stop, and wait for serve_forever() to end."""
        if self._until == math.inf:
            self.stop()
        self._ended.wait()

    def server_close(self) -> None:
        """Close all that nobody serves."""
        super().server_close()
        self.lobby.close()
        self._crew.close()

    def service_actions(self) -> None:
        """Called several times a second."""
        now = self.last_iteration = time.monotonic()
        if self._until < math.inf:
            self.lobby.watchman.unregister(self.socket)
        elif now >= self._resume:
            self.lobby.watchman.register(self.socket, selectors.EVENT_READ, self._accept)
        self.lobby.close_timed_out(now)
        self.room.admit_parked()
        self.desk.proxy.close_idle()

    def _accept(self) -> None:
        """Let in who waits at the door, a turn's worth of them."""
        for number in range(REQUESTS_PER_TURN):
            if not self._accept_one(waits=not number):
                return

    def _accept_one(self, waits: bool) -> bool:
        """Let one in, if there is room and one waits, as is known or not; don't spin where descriptors are
        out."""
        if not self.room.reserve(waits):
            if waits:
                self.lobby.watchman.unregister(self.socket)  # until the next service_actions
            return False
        try:
            connection, address = self.get_request()
        except OSError as error:
            self.room.cancel()
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.lobby.watchman.unregister(self.socket)
                self._resume = time.monotonic() + 0.1
            return False
        self.process_request(connection, address)
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Let a new connection into the lobby; turn it away where its client has far too many."""
        with contextlib.suppress(OSError):  # it has gone already
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a head and a body sent apart
        visitor = ClientConnection(request, client_address, self.lobby.add)  # cost 40 ms each
        if self.room.admit(visitor):
            return
        reply = error_response(ProxyError("%s has too many connections open." % visitor.host, 503))
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(render_head(reply.head, (*reply.head.fields, ("Connection", "close"))))
        self.shutdown_request(visitor)

    def serve_in_thread(self, visitor: ClientConnection) -> None:
        """Serve a visitor in a thread of its own."""
        try:
            self._crew.submit(self.process_request_thread, visitor, visitor.address)
        except RuntimeError:  # no thread for it
            self.handle_error(visitor, visitor.address)
            self.shutdown_request(visitor)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """What that thread does; then the visitor waits in the lobby again."""
        request.keep_alive = False
        try:
            self.finish_request(request, client_address)
        except Exception:  # noqa: BLE001
            self.handle_error(request, client_address)
        if request.keep_alive:
            self.lobby.add(request)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        request.connection.close()
        self.room.release(request)
        if self.room.crowded:
            self._accept_soon = True
            self.lobby.watchman.wake()

    @property
    def replies_running(self) -> int:
        """Replies under way."""
        with self._lock:
            replying = self._replying
        return replying + self.lobby.sending

    @contextlib.contextmanager
    def count_reply(self) -> Iterator[None]:
        """Count a reply under way, so that SIGTERM can wait for it."""
        with self._lock:
            self._replying += 1
        try:
            yield
        finally:
            with self._lock:
                self._replying -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A bug, or no thread for a connection: say so, go on."""
        log.error("A connection from %s failed.", client_address, exc_info=True)


# ---------------------------------------------------------------------------------------------
# 14 Command line
# ---------------------------------------------------------------------------------------------


def parse_ports(text: str) -> tuple[int, ...]:
    """Ports from a list such as 443,8443, or none; ValueError says what is allowed.

    >>> parse_ports("443,8443"), parse_ports("none")
    ((443, 8443), ())
    """
    if text == "none":
        return ()
    ports = text.split(",")
    if not all(port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536 for port in ports):
        raise ValueError("'%s' is no list of ports; write 443,8443 or none" % text)
    return tuple(int(port) for port in ports)


def parse_barrier(text: str) -> tuple[tuple[str, int], ...]:
    """The memcached servers that instances agree by; ValueError.

    >>> parse_barrier("memcached://mc1.example.org,[::1]:11212")
    (('mc1.example.org', 11211), ('::1', 11212))
    """
    scheme, mark, places = text.partition("://")
    try:
        servers = tuple(split_authority(place, 11211) for place in places.split(","))
    except ProxyError:
        servers = ()
    if scheme != "memcached" or not mark or not all(host and port for host, port in servers) or not servers:
        raise ValueError("'%s' is no barrier; write memcached://HOST:PORT[,HOST:PORT]" % text)
    return servers


# Parent proxies -------------------------------------------------------------------------------


def parse_parent_proxy(text: str) -> ParentProxy | None:
    """The proxy of a URL, or of host:port; None for "" or none.  With ,direct behind it origins may be
    asked without it.  ValueError does not repeat the password.

    >>> parse_parent_proxy("http://me:pw@proxy.test:3128,direct").fields
    (('Proxy-Authorization', 'Basic bWU6cHc='),)
    """
    if text in ("", "none"):
        return None
    match = re.fullmatch(r"(?:http://(?:([^/?#@]*)@)?)?([^/?#@,]+)/?(,direct)?", text, re.I)
    try:
        target = parse_target("http://" + match[2]) if match else None
    except BadRequestError:
        target = None
    if match is None or target is None:
        raise ValueError("a parent proxy is written http://[name:password@]host:port[,direct], or none")
    name, _, password = (match[1] or "").partition(":")
    pair = urllib.parse.unquote_to_bytes("%s:%s" % (name, password))  # RFC 7617 §2: a colon even so
    secret = base64.b64encode(pair).decode()
    return ParentProxy(target, (("Proxy-Authorization", "Basic " + secret),) if match[1] else (), bool(match[3]))


def parent_proxies(option: str | None, environment: Mapping[str, str]) -> tuple[tuple[str, ParentProxy], ...]:
    """The parent of each scheme: --parent's, or what http_proxy and https_proxy say.  HTTP_PROXY may come
    from a request where we run as CGI (CVE-2016-5385).  ValueError."""
    found = []
    for scheme in ("http", "https"):
        name = scheme + "_proxy"
        upper = "" if scheme == "http" and "REQUEST_METHOD" in environment else environment.get(name.upper())
        try:
            parent = parse_parent_proxy(environment.get(name) or upper or "" if option is None else option)
        except ValueError as error:
            raise ValueError("%s: %s" % (name if option is None else "--parent", error)) from None
        found += [(scheme, parent)] if parent else []
    return tuple(found)


def parse_filters(text: str) -> tuple[list[re.Pattern[str]], list[str]]:
    """The regular expressions of a filters file, one a line, and a sentence for each bad line."""
    filters, complaints = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            filters.append(re.compile(line))
        except (re.error, OverflowError, RecursionError) as error:
            complaints.append("line %d is no regular expression, skipped: %s: %s" % (number, line, error))
    return filters, complaints


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Bytes of a size such as 500M, 20G or 1.5T; ValueError says what is allowed.

    >>> parse_size("1.5k"), parse_size("20G")
    (1536, 21474836480)
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([BKMGT]?)(?:I?B)?", text.strip().upper())
    if not match:
        raise ValueError("'%s' is no size; write 500M, 20G or 1.5T" % text)
    return int(float(match[1]) * _UNITS[match[2]])


def parse_count(text: str, least: int, most: int) -> int:
    """A number of things; ValueError says what is allowed."""
    if not re.fullmatch(r"\d{1,9}", text, re.A) or not least <= int(text) <= most:
        raise ValueError("'%s' is no number from %d to %d" % (text, least, most))
    return int(text)


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90m, 12h, 30d or 8w; ValueError says what is allowed.

    >>> parse_duration("30d")
    2592000.0
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhdw])", text.strip().lower())
    if not match:
        raise ValueError("'%s' is no time; write 90m, 12h, 30d or 8w" % text)
    return float(match[1]) * _SPANS[match[2]]


DEFAULTS = Config()
REPEATED: dict[str, Any] = {"action": "append"}
COUNTED: dict[str, Any] = {"action": "count", "default": 0}


def _read_by(parse: Callable[[str], Any]) -> dict[str, Any]:
    """For argparse, so that its message names the option and ends in what ``parse`` says."""

    def one(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {"type": one}


def parse_name(text: str) -> str:
    """The name of a file or a folder; ValueError where a shell's variable was empty."""
    if not text:
        raise ValueError("'' is no name")
    return text


# group, flags, what the value is called, help with the default in brackets, argparse's other words
OPTIONS: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("clients", "-a --addr", "ADDR", "listen here; may be repeated (%s)" % DEFAULTS.addrs[0], REPEATED),
    ("clients", "--allow", "NET", "who may connect; may be repeated (%s)" % ", ".join(DEFAULTS.allow),
     REPEATED),
    ("clients", "--name", "NAME", "its name, if not the host's; may be repeated (none)",
     {**REPEATED, **_read_by(parse_host_name)}),
    ("clients", "--connect-ports", "PORTS", "where CONNECT may lead (443)",
     {"default": DEFAULTS.connect_ports, **_read_by(parse_ports)}),
    ("clients", "--reuse-port", "", "let other instances listen here too (off)", {"action": "store_true"}),
    ("clients", "--instance", "NAME", "one of several: own statistics, --reuse-port (none)", {"default": ""}),
    ("cache", "-r --root", "DIR", "where it lies, made if missing (the current folder)",
     _read_by(parse_name)),
    ("cache", "--max-size", "SIZE", "most to store; least used goes first (no limit)", _read_by(parse_size)),
    ("cache", "--min-free", "SIZE", "leave free on the disk (5 %%, at most 10 GB)", _read_by(parse_size)),
    ("cache", "--max-age", "TIME", "remove what was not used for so long (keep it)", _read_by(parse_duration)),
    ("cache", "-f --filters", "FILE", "what is never cached, as expressions (none)", _read_by(parse_name)),
    ("cache", "--no-heuristics", "", "ask again where no lifetime is told (a day)",
     {"action": "store_false", "dest": "heuristics"}),
    ("cache", "--no-sharing", "", "share files of mirrors by digest only (by proof)",
     {"action": "store_false", "dest": "sharing"}),
    ("cache", "--barrier", "URL", "by what instances that share it agree (locks)",
     {"default": (), **_read_by(parse_barrier)}),
    ("origins", "--parent", "URL", "proxy to ask, or none ($http_proxy, $https_proxy)", {}),
    ("origins", "--ca-file", "FILE", "PEM certificates to trust as well, for https (none)",
     _read_by(parse_name)),
    ("origins", "--adopt", "DIR", "also use packages found here; may be repeated (none)",
     {**REPEATED, **_read_by(parse_name)}),
    ("origins", "--offline", "", "never ask one, serve what is stored (off)", {"action": "store_true"}),
    ("origins", "--max-orphans", "N", "downloads that go on without clients (%d)" % DEFAULTS.max_orphans,
     {"default": DEFAULTS.max_orphans, **_read_by(lambda text: parse_count(text, 0, 10_000))}),
    ("log and help", "-v --verbose", "", "log more", COUNTED),
    ("log and help", "-q --quiet", "", "log no requests; twice: nothing but errors", COUNTED),
    ("log and help", "-V --version", "", "show the version and exit",
     {"action": "version", "version": "pkgproxy " + __version__}),
    ("log and help", "-h --help", "", "show this and exit", {"action": "help"}),
)
EPILOG = """In brackets: the default.  What may be written:
  ADDR   :9999, 192.168.0.1:9999 or [::1]:9999
  NET    loopback, private, all, or a network such as 203.0.113.0/24
  PORTS  443,8443 or none
  SIZE   500M, 20G or 1.5T
  TIME   90m, 12h, 30d or 8w
  FILE   for -f: regular expressions, one a line, each searched in the URI
  URL    for --barrier memcached://HOST:PORT[,HOST:PORT]
         for --parent http://[NAME:PASSWORD@]HOST:PORT[,direct]

Clients only set http_proxy=http://this-host:9999/, which also shows a page.
Clean the cache with rm, at any time."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with an option a line."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=26, **more)


class StartupError(Exception):
    """An option's value, or the machine, does not let us start: one clear line, then exit."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


def parse_addr(text: str) -> tuple[str, int]:
    """Host and port to listen on; the host is empty for all.  ValueError says what is allowed.

    >>> parse_addr("[::1]:9999"), parse_addr(":9999")
    (('::1', 9999), ('', 9999))
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]*)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError("'%s' is no address; write :9999, 192.168.0.1:9999 or [::1]:9999" % text)
    return match[1] or match[2] or "", int(match[3])


def parse_options(arguments: list[str]) -> tuple[Config, int]:
    """The configuration, and the log level; exits with 2 and one line where an option is bad."""
    parser = argparse.ArgumentParser(
        "pkgproxy.py", "%(prog)s [options]", "A caching HTTP proxy for package managers.", EPILOG,
        formatter_class=HelpFormatter, add_help=False)
    groups = {row[0]: parser.add_argument_group(row[0]) for row in OPTIONS}
    for group, flags, metavar, text, words in OPTIONS:
        if metavar:
            words = {"metavar": metavar, **words}
        groups[group].add_argument(*flags.split(), help=text, **words)
    options = parser.parse_args(arguments)
    addrs, allow = tuple(options.addr or DEFAULTS.addrs), tuple(options.allow or DEFAULTS.allow)
    try:
        for addr in addrs:
            parse_addr(addr)
        parse_networks(allow)
        config = Config(addrs, options.root, options.filters, allow,
                        options.connect_ports, options.heuristics, options.offline, options.max_size,
                        options.min_free, max_age=options.max_age, max_orphans=options.max_orphans,
                        reuse_port=options.reuse_port or bool(options.instance),
                        instance=options.instance, sharing=options.sharing, barrier=options.barrier,
                        pseudonym="pkgproxy-" + secrets.token_hex(4),
                        ca_file=options.ca_file, parents=parent_proxies(options.parent, os.environ),
                        no_proxy=tuple((os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
                                        ).lower().replace(" ", "").split(",")),
                        adopt=tuple(map(os.path.abspath, options.adopt or ())),
                        names=tuple(options.name or ()))
    except ValueError as error:
        parser.error(str(error))
    level = logging.INFO + 10 * options.quiet - 10 * options.verbose
    return config, max(logging.DEBUG, min(level, logging.ERROR))


def load_filters(path: str) -> tuple[re.Pattern[str], ...]:
    """Read a filters file; OSError or UnicodeDecodeError.  Bad lines are reported and skipped."""
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(MAX_FILTERS + 1)
    if len(text) > MAX_FILTERS:  # a package, a device that never ends
        raise OSError(errno.EFBIG, "it has more than %d characters" % MAX_FILTERS)
    filters, complaints = parse_filters(text)
    for complaint in complaints:
        log.warning("%s: %s", path, complaint)
    log.info("Parsed %d filters from %s", len(filters), path)
    return tuple(filters)


def open_store(config: Config) -> Store:
    """The store below the root, made if it is missing; Unusable where it is no folder to read."""
    store = Store(config.root or ".", config.root is not None, config.min_free, config.max_size)
    try:
        make_directory(store.root)
        hosts = store.list_hosts()
    except OSError as error:
        raise StartupError("The cache root %s cannot be used: %s. Name another folder with -r." % (
            store.root, error.strerror)) from None
    found = "holds %d host%s" % (len(hosts), "s" if len(hosts) > 1 else "") if hosts else "nothing stored yet"
    log.info("Cache root at %s (%s)", store.root, found)
    if not os.access(store.root, os.W_OK):
        log.warning("The cache root cannot be written: requests are passed on, nothing is kept")
    for folder in config.adopt:
        if os.path.isdir(folder):
            log.info("Adopting what is the same from %s", folder)
        else:
            log.warning("There is no folder %s to adopt packages from. It is looked for again after %d h.",
                        folder, ADOPT_SCAN_INTERVAL // 3600)
    return store


def check_access_settings(config: Config) -> None:
    """Say who may come in, and which way we go out; Unusable where --ca-file holds no certificates."""
    log.info("Clients may come from: %s", ", ".join(config.allow))
    for scheme, parent in config.parents:
        log.info("Asking %s origins through the parent proxy %s%s", scheme, parent.place.authority,
                 ", or directly" if parent.or_direct else "")
    if config.ca_file is not None:
        try:
            TrustStore(config.ca_file).context()
        except OSError as error:
            raise StartupError("The certificates in %s cannot be used: %s." % (
                config.ca_file, explain_error(error))) from None


def make_connection_limiter() -> ConnectionLimiter:
    """Room for as many connections as the descriptors allow: each may take four, and one more is parked."""
    if resource is None:
        return ConnectionLimiter(MAX_CONNECTIONS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ConnectionLimiter(max(4, min(MAX_CONNECTIONS, (soft - 40) // 5 if soft > 0 else MAX_CONNECTIONS)))


def inherited_socket(descriptor: int) -> socket.socket:
    """A listening socket that whoever started us has opened; OSError where it is none."""
    listening = socket.socket(fileno=descriptor)
    if (listening.family not in (socket.AF_INET, socket.AF_INET6)
            or not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        raise OSError(errno.EINVAL, "it is no listening TCP socket")
    return NonblockingListener(listening)


def open_sockets(config: Config, environment: Mapping[str, str]) -> list[socket.socket]:
    """A listening socket for each address, or those that systemd hands over in their place (sd_listen_fds(3),
    from descriptor 3 on); Unusable where one is taken or not ours."""
    sockets: list[socket.socket] = []
    ours, count = environment.get("LISTEN_PID") == str(os.getpid()), environment.get("LISTEN_FDS", "")
    handed = range(3, 3 + int(count)) if ours and count.isdecimal() else range(0)
    if config.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise StartupError("This system has no SO_REUSEPORT: leave out --reuse-port and --instance.")
    for addr in handed or config.addrs:
        try:
            sockets.append(inherited_socket(addr) if isinstance(addr, int)
                           else open_socket(*parse_addr(addr), config.reuse_port))
        except (OSError, OverflowError) as error:
            for listening in sockets:
                listening.close()
            # Without what create_server adds to it.
            reason = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]
            what = "the socket %d of systemd: %s." if handed else "%s: %s. Name another with -a."
            raise StartupError("Cannot listen on " + what % (addr, reason)) from None
        log.info("Starting proxy server at %s", display_address(sockets[-1]))
    return sockets


def reload_filters(proxy: Proxy) -> None:
    """Read the filters file again; a bad one keeps the old filters."""
    config = proxy.config
    if config.filters_file:
        try:
            proxy.config = replace_fields(config, filters=load_filters(config.filters_file))
        except (OSError, UnicodeDecodeError) as error:
            log.error("The filters file %s cannot be read: %s; the old filters stay", config.filters_file,
                      getattr(error, "strerror", None) or error)


def install_signal_handlers() -> queue.SimpleQueue[str]:
    """From now on the names of the signals that we heed come out of this queue.  A handler may interrupt
    anything: a SimpleQueue bears that, an Event or the log does not."""
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), lambda *_, name=name: heard.put(name))
    return heard


class SystemdNotifier:
    """The service manager that started us, where it wants to be told how we are (systemd, sd_notify(3))."""

    def __init__(self, environment: Mapping[str, str], counters: Counters) -> None:
        place = environment.get("NOTIFY_SOCKET", "") if hasattr(socket, "AF_UNIX") else ""
        self._place = "\0" + place[1:] if place.startswith("@") else place
        self._counters = counters
        watch = (parse_delta_seconds(environment.get("WATCHDOG_USEC")) or 60_000_000) / 1e6  # seconds, then we are killed
        self._max_silence = watch / 2  # seconds without a beat, then we are not well
        self.pause = min(1.0, watch / 4)  # seconds, at most, between two calls of ping()
        self._next = 0.0  # monotonic time of the next ping

    def notify(self, text: str) -> None:
        """Tell it, if it can be told."""
        if self._place:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1.0)
                sock.sendto(text.encode(), self._place)

    def send_watchdog(self, beat: float) -> None:
        """That we are well, where we were so at the monotonic time ``beat``, and what we have done."""
        now = time.monotonic()
        if self._place and now >= self._next and now - beat < self._max_silence:
            self._next = now + min(self._max_silence / 2, NOTIFY_INTERVAL)
            counted = self._counters.snapshot()
            found, asked = hit_counts(counted["statsOutcomes"])
            self.notify("WATCHDOG=1\nSTATUS=%s, %s hits, %s saved" % (
                format_count(asked, "request"), format_percent(found, asked), format_bytes(counted["statsCacheBytes"])))

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """While the filters are read again."""
        self.notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        yield
        self.notify("READY=1")


def wait_for_shutdown(servers: list[ProxyServer], proxy: Proxy, heard: queue.SimpleQueue[str],
                 manager: SystemdNotifier) -> None:
    """Until SIGTERM or SIGINT; SIGHUP reads the filters again."""
    while True:
        manager.send_watchdog(min(server.last_iteration for server in servers))
        with contextlib.suppress(queue.Empty):
            name = heard.get(timeout=manager.pause)  # Windows delivers signals between waits only
            if name in ("SIGTERM", "SIGINT"):
                return
            if name == "SIGHUP":
                with manager.reloading():
                    reload_filters(proxy)


def serve(servers: list[ProxyServer], proxy: Proxy, heard: queue.SimpleQueue[str], manager: SystemdNotifier) -> None:
    """Serve until a signal ends it; running replies get GRACE seconds."""
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    manager.notify("READY=1")
    wait_for_shutdown(servers, proxy, heard, manager)
    manager.notify("STOPPING=1")
    log.info("Stopping")
    deadline = time.monotonic() + SHUTDOWN_GRACE
    for server in servers:
        server.stop()
    for server in servers:
        server.shutdown()
        server.server_close()
    while any(server.replies_running for server in servers) and time.monotonic() < deadline:
        time.sleep(0.05)
    proxy.close()


class QueueLogHandler(logging.Handler):
    """Writes the log in a thread of its own, several lines at a time: where nobody reads it any more (a
    stopped pager, a stuck log driver), lines are lost, and nobody waits."""

    def __init__(self, stamped: bool) -> None:
        super().__init__()
        self._stamped = stamped
        self._stamp = (0, "")  # clock seconds, and how they are written
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._threaded = False

    def start(self) -> None:
        """From now on a thread writes.  Before, no client waits."""
        threading.Thread(target=self._run, daemon=True).start()
        self._threaded = True

    def emit(self, record: logging.LogRecord) -> None:
        """For the logging module."""
        self.write([self.format(record)])

    def write(self, lines: list[str]) -> None:
        """Put lines into the queue, or drop them; without logging's records, which cost as much as a hit."""
        stamp, put = self._time(), self._lines.put
        for line in lines[:max(0, MAX_LOG_LINES - self._lines.qsize())]:
            put("%s%s\n" % (stamp, line))
        while not (self._threaded or self._lines.empty()):
            self._write_out([self._lines.get()])

    def flush(self) -> None:
        """Wait for what is in the queue, but not for long."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(1.0 if self._threaded else 0.0)

    def _time(self) -> str:
        if not self._stamped:
            return ""
        now, stamp = int(time.time()), self._stamp
        if now != stamp[0]:
            self._stamp = stamp = now, time.strftime("%Y/%m/%d %H:%M:%S ", time.localtime(now))
        return stamp[1]

    def _run(self) -> None:
        while True:
            lines = [self._lines.get()]
            time.sleep(LOG_BATCH_DELAY)
            with contextlib.suppress(queue.Empty):
                while len(lines) < MAX_LOG_LINES:
                    lines.append(self._lines.get_nowait())
            self._write_out(lines)

    def _write_out(self, lines: list[str | threading.Event]) -> None:
        text = "".join(line for line in lines if isinstance(line, str))
        data = text.encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError, ValueError):  # a full log device harms nothing
            while data and (self._threaded or os.name == "nt" or select.select([], [2], [], 1.0)[1]):
                try:
                    data = data[os.write(2, data):]
                except BlockingIOError:  # whoever started us wants it so
                    time.sleep(LOG_BATCH_DELAY)
        for line in lines:
            if isinstance(line, threading.Event):
                line.set()


def load_configured_filters(config: Config) -> Config:
    """The configuration with what its filters file says; Unusable."""
    if not config.filters_file:
        log.info("No filters file given")
        return config
    try:
        return replace_fields(config, filters=load_filters(config.filters_file))
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError("The filters file %s cannot be read: %s." % (
            config.filters_file, getattr(error, "strerror", None) or error)) from None


def run(config: Config, writer: QueueLogHandler) -> None:
    """Start, serve, stop; Unusable."""
    store = open_store(config)
    config = load_configured_filters(config)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        log.warning("Running as root: an account without privileges is enough, and safer")
    check_access_settings(config)
    heard = install_signal_handlers()
    sockets = open_sockets(config, os.environ)
    seat = CPUAffinity()
    seat.pin(int(config.instance) if re.fullmatch("[0-9]{1,9}", config.instance) else os.getpid())
    writer.start()
    counters = Counters()
    proxy = Proxy(config, store, counters.add_down)
    statistics = StatusCollector(store, counters, config.instance or ",".join(config.addrs), proxy.snapshot)
    proxy.start()
    statistics.history.start()
    desk = Dispatcher(proxy, statistics, make_connection_limiter(), writer.write, seat)
    serve([ProxyServer(listening, desk) for listening in sockets], proxy, heard,
          SystemdNotifier(os.environ, counters))
    statistics.history.stop()


def stderr_is_journal(stream: str) -> bool:
    """Whether stderr is the journal that systemd names in $JOURNAL_STREAM, which stamps the time itself."""
    with contextlib.suppress(OSError, ValueError):
        info = os.fstat(2)
        return stream == "%d:%d" % (info.st_dev, info.st_ino)
    return False


def open_missing_standard_files() -> None:
    """Open what was closed of 0, 1 and 2: the log would go into whatever gets that number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    open_missing_standard_files()
    config, level = parse_options(sys.argv[1:] if arguments is None else arguments)
    writer = QueueLogHandler(not stderr_is_journal(os.environ.get("JOURNAL_STREAM", "")))
    logging.basicConfig(level=level, format="%(message)s", handlers=[writer])
    try:
        run(config, writer)
    except StartupError as problem:
        logging.shutdown()  # what was said before stands before
        sys.stderr.write("pkgproxy: %s\n" % problem)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
