#!/usr/bin/env python3
"""pkgproxy: a caching HTTP proxy for package managers, in one file.

Copyright (c) 2014 Piotr S. Staszewski (design of the original pkgproxy)
Copyright (c) 2026 the pkgproxy contributors
Two-clause BSD licence, see LICENSE.txt.

pkgproxy runs between a group of machines and the mirrors from which they install packages, and
downloads each package once.  Start it with ``python3 pkgproxy.py -r packages/`` and set
``http_proxy=http://this-host:9999/`` on the clients.

Scope: pkgproxy stores what package managers download, never serves wrong bytes, and never refuses a
request that it could have forwarded.  It is not a general web cache, a load balancer, a TLS
interceptor, a mirror generator or a process manager.

Where to start reading
----------------------
Read decide() in section 3 and Proxy.respond() in section 11 first, then Flight and SingleFlight in
section 7 and Downloader in section 10: they are the core.  Five types connect everything:

    Request        a client's request, as received; frozen
    ResponseHead   status line and fields of a response, received or stored; frozen
    CacheDecision  what decide() says: the action, the class of the name, and the reason
    Response       an answer to a client: head, body, and how the cache produced it
    Flight         a download in progress, with its PartialFile: the only mutable state that requests
                   share; it holds a lock, the number of bytes received, and the result

The path of a request
---------------------
::

    accept ─ EventLoop ── hit: HotCache, or Proxy.prepare_hit; HitTransfer ──────────► client
                │ anything else, once the head is complete                      (event loop thread)
                ▼
          thread ─ ProxyHandler: parse a Request                                     (worker thread)
                         Dispatcher.respond: check access; own pages are answered here
                         Proxy.respond
                            stored   = Store.lookup(key), or SmallAnswers has a 404, a redirect ...
                            decision = decide(request, stored, config, now)
                            SERVE      → the stored file
                            PASS       → OriginClient; the body is passed through, not stored
                            FETCH, VALIDATE → flight, is_leader = SingleFlight.join(key)
                               leader:   PartialStore.open_for_writing: no other instance writes it
                                         look in the store again, send the request to the origin
                                         304 → the stored file
                                         200 → Downloader, in a thread of its own unless it is small:
                                               read, write, announce the bytes, commit, finish
                                         (if another instance downloads: PeerFollower instead)
                               follower: wait for the head
                               both →    TailingBody, from byte 0 or from the requested range
                         ProxyHandler: send the head, then the chunks of the body ──► client
                            error before the first byte → stored response if allowed, or the error

Any number of clients may request one file at the same time: the origin sends it once, and each client
reads it at its own speed while it arrives.  The download continues if its clients disconnect.

Threads
-------
    main              starts the rest, waits for signals, sends watchdog messages
    event loop        one per listening address: waits on idle connections, sends hits that are not large
    worker            one per connection that needs one: answers requests, returns the connection to the loop
    download          Downloader: one per download that takes a while; it never waits for a client
    peer follower     PeerFollower: one per download that another instance runs
    lease renewal     LeaseManager: one, if instances coordinate through memcached
    name lookup       Resolver: one per lookup, because getaddrinfo() has no timeout
    eviction          EvictionThread: one; also looks for packages to adopt
    revalidation      BackgroundRevalidator: a few at most; also looks whether slow origins are back
    index reader      IndexReader: one at most; reads indexes that were stored
    scrub             Scrubber: one; reads stored files again to find damaged ones
    history           TrafficHistory: one; saves the statistics
    log               QueueLogHandler: one for the log, one for the access log; writes it

All of them but main are daemon threads: a blocked client, origin or disk never delays the exit.

Sections
--------
Each section uses only names that are defined above it, and sections 2 to 4 are pure (no clock, disk
or socket).  Store and Barrier do not use each other.  Only Downloads and Proxy use Store, Barrier and
Origin client together.  Tests enforce this, and a maximum size for each section.

     1  Types and limits   configuration, requests, responses, errors; constants with their reasons
     2  HTTP messages      fields, targets, framing, ranges, preconditions, forwarding
     3  Cache rules        name classes, cache keys, file names, freshness, storability, decide()
     4  Access rules       client networks, protected addresses, targets without a parent proxy
     5  Store              stored responses, partial files, metadata, disk space, eviction
     6  What indexes tell  the size and digest of each package, as the stored indexes say
     7  Barrier            at most one download per key: in this process, and among instances
     8  Sockets            reading with deadlines, header lines, chunked bodies
     9  Origin client      name lookup, address policy, TLS, connections, redirects
    10  Downloads          bodies, downloading and resuming, other instances, sharing among mirrors
    11  Proxy              answers a request: hit, fetch, validate, pass through, stale
    12  Statistics         counters, history, recent requests
    13  Pages              status page, JSON, metrics, client configuration
    14  Server             connections, event loop, worker threads, request handler, tunnels
    15  Command line       options, start, signals, service manager, log

Invariants
----------
Code and tests cite these by number.

 1. A file in the visible cache tree is complete: its bytes were counted, flushed to disk (fsync), and
    then the file was renamed into place.  It is never written again, only replaced by a rename or
    removed.
 2. There is at most one flight per cache key, in all processes that share a cache root.  Only the
    flight's leader writes its partial file.
 3. A flight finishes exactly once, and has left SingleFlight before its waiters wake up.  The order
    is: rename, leave, then announce the last bytes.  So when a client has received a complete response
    of declared length, the file is stored and counted.
 4. A new leader looks in the store again before it contacts the origin.
 5. No lock is held during a network or disk operation.  No two locks are held at the same time.  A
    comment at each lock names the data that it guards.
 6. A local failure (full disk, missing permission, removed root, damaged metadata) disables caching,
    but never fails a request.
 7. After the first byte of a response has been sent, the only honest way to report an error is to
    close the connection.  A body that is shorter than declared is never ended as if it were complete.
 8. A client's Request is never modified.  Hop-by-hop fields are removed before any field is added.
 9. No request can name a path outside the root, a metadata file, or the file of another key.
10. Every wait has a deadline, after which the waiter contacts the origin itself.
11. pkgproxy deletes and replaces only files that it stored itself: those of the name and size that a
    head says.  In a root given with -r, which holds nothing but the cache, a file without a head counts as
    a copy of a stored one if it has exactly the name of a requested key: what the origin sends replaces it.
12. Clients are independent: no client's speed, error or departure changes what another one receives.
13. What a stored index says about a package (its size, its digest) is never contradicted by a hit.

Two traps behind 1 and 7, in Python 3.9 to 3.13: shutil.copyfileobj() over an http.client response
copies a truncated body without an error; and http.client reads a head that was cut off as an empty
200, and takes an informational 103 for the final response.

Specifications
--------------
Names in code, log and pages are those of the RFCs:

    RFC 9110  HTTP semantics: fields, ranges, preconditions, Via    sections 2, 11
    RFC 9111  HTTP caching: storing, freshness, validation          sections 3, 11
    RFC 9112  HTTP/1.1: messages, framing, connections              sections 2, 8, 9, 14
    RFC 9211  the Cache-Status field                                section 2
    RFC 3986  URIs: parsing and normalisation                       section 2
    RFC 5861  stale-while-revalidate                                section 3
    RFC 1918, 4193, 6598 and others: special address ranges         section 4
    RFC 8305  connecting over IPv4 and IPv6 ("happy eyeballs")      section 9
    RFC 7617  Basic authentication, to a parent proxy               section 15
"""
from __future__ import annotations

import argparse
import array
import base64
import binascii
import bisect
import calendar
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import enum
import errno
import functools
import glob
import hashlib
import http.client
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
import zlib
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from email.utils import formatdate
from html import escape, unescape
from typing import Any, Callable, NamedTuple, Protocol, TypeVar, Union

try:
    import fcntl
except ImportError:  # Windows has no flock(): instances coordinate through memcached or not at all
    fcntl = None  # type: ignore[assignment]
try:
    import resource as _resource
except ImportError:  # Windows has no limit on file descriptors that could be read
    resource: Any = None
else:
    resource = _resource

__version__ = "1.0.0"

log = logging.getLogger("pkgproxy")


# ---------------------------------------------------------------------------------------------
# 1 Types and limits
# ---------------------------------------------------------------------------------------------

Fields = tuple[tuple[str, str], ...]  # header fields in wire order; names compare case-insensitively

# Limits of messages, in bytes unless noted.  They bound what one peer can make the proxy hold in memory.
MAX_LINE = 16 * 1024  # a start line or field; RFC 9112 §3 asks for 8,000, and CDNs sign with long URLs
MAX_HEAD = 64 * 1024  # a whole head; in practice as much as Apache allows (100 fields of 8 KiB)
MAX_FIELDS = 200  # field lines in a head; Apache allows 100, Go's HTTP/2 about 250
MAX_RANGES = 512  # ranges in one request; librepo sends up to 256 and halves that when refused
MAX_FILTERS = 1024 * 1024  # characters in a filters file; far more than a person writes
MAX_MEMOIZED_HEAD = 4096  # request heads up to this are memoized; longer ones rarely repeat
MAX_MEMOIZED = 1000  # characters of an argument that is memoized; longer names come only from attackers
# An unguessable separator: a stored body that contained it could forge parts of a multipart response.
MULTIPART_BOUNDARY = secrets.token_hex(12)

# Limits of the server.
MAX_CONNECTIONS = 4000  # clients; fewer if descriptors are short.  Each busy one takes a thread
LISTEN_BACKLOG = 256  # connections waiting for accept(); a fleet started by cron arrives at once
STACK_SIZE = 2 * 1024 * 1024  # bytes for a thread, instead of 8 MB; recursion in Python 3.13 needs 1.3 MB
SENDS_PER_TURN = 2  # of one hit, its head included, before the next client has its turn
ACCEPTS_PER_TURN = 4  # connections accepted before the open ones have their turn
THREAD_IDLE_TIMEOUT = 0.1  # seconds that a thread waits for its client's next request after a miss
# Hits of the current second, ready to be sent again; each holds a descriptor and up to SMALL_BODY bytes.  As
# many as a fleet asks for in a second: with fewer, machines that are some files apart prepare each one anew.
HOT_CACHE_SIZE = 512
HOT_CACHE_BYTES = 8 * 1024 * 1024  # of heads and small bodies in them
SMALL_BODY = 64 * 1024  # bytes; a body up to this is sent together with its head
COPY_SIZE = 256 * 1024  # bytes per read or write where sendfile() is not used
SEND_SIZE = 256 * 1024  # bytes of a file sent at a time; larger pieces take more processor time, not less
# Bytes.  A larger body is downloaded, or sent as a hit, by a thread of its own: several use several
# processors, and each wakes its client less often than the event loop does.
LARGE_BODY = 512 * 1024
MAX_EVENTS = 10_000  # failures or attempts remembered; bounds the memory that unknown hosts can take
MAX_LOG_LINES = 10_000  # log lines waiting for a slow disk; more are dropped, because requests go first
MAX_ROWS = 20  # requests of a colour, and downloads, on the status page; about a screenful
MAX_ORIGINS = 40  # origins, and clients, counted separately, against label explosion; the rest is "other"
MAX_ANSWERS = 1000  # responses other than 200 kept in memory; most are a 404 of a few hundred bytes
MAX_ANSWER = 8 * 1024  # bytes of each of them
LARGE_MEMO = 1000  # results of a pure function that hits need again

# Limits of downloads and of the cache.
MAX_REDIRECTS = 10  # followed for one request, as by Go's http.Client
MAX_LOOKUPS = 64  # concurrent DNS look-ups; each takes a thread, because getaddrinfo() has no timeout
MAX_LOOKUP_WAITERS = 256  # requests of one client that wait for look-ups; each takes a thread
POOL_SIZE = 8  # idle connections kept to one origin; dnf downloads 3 files at a time by default
POOL_TOTAL = 24  # idle connections kept in all; each holds a descriptor
SPACE_STEP = 1024 * 1024  # bytes written between two checks of the free space
BLOCK = 4096  # bytes a small file occupies on most file systems
SPARE_INODES = 500  # free inodes, beyond the reserve, that eviction makes for new downloads
MAX_SPARE = 10**9  # free bytes, beyond the limits, that eviction makes for new downloads
FULL_DOWNLOAD_RANGE = 1024 * 1024  # bytes; a range that starts below this and is as long downloads the whole
MAX_CANDIDATES = 8  # stored files of one name that are compared; each is an open file

# Timeouts of connections to origins, in seconds.  pacman gives up after 10 s of silence, dnf after 30 s, so
# a stale response or an error should be sent before that.
CONNECT_ATTEMPT_DELAY = 0.25  # before another address of the same name is tried (RFC 8305 §8)
NAME_RETRY = 60.0  # until this host's full name is looked up again, if it is unknown
DNS_TIMEOUT = 20.0  # a resolver tries each name server for 5 to 10 s
PARENT_CONNECT_TIMEOUT = 3.0  # to a parent proxy that may be bypassed, so that both fit into 10 s
CONNECT_TIMEOUT = 10.0  # to all addresses of a name; pacman drops a server after 10 s of silence
ORIGIN_TIMEOUT = 30.0  # of silence from an origin; dnf gives up after 30 s below 1,000 B/s
RESPONSE_HEAD_TIMEOUT = 40.0  # for a head, redirects included; less than FOLLOWER_HEAD_TIMEOUT
RESUME_TIMEOUT = 10.0  # for a head when resuming; all attempts fit into the 90 s that clients wait
RESUME_BACKOFF = (0.1, 0.3, 1.0, 2.0, 4.0)  # before each attempt to resume a download
VALIDATION_TIMEOUT = 9.0  # for an origin if a stored response can answer; pacman waits 10 s
ORIGIN_BACKOFF = 30.0  # a parent proxy that failed is avoided, a slow origin is watched without new requests
QUICK_FAILURE = 1.0  # a failure that cost no more is risked again with the next request
PROBE_INTERVAL = 2.0  # between two requests that look in the background whether a slow origin answers
MAX_RETRY_AFTER = 3600.0  # an origin may ask to be left alone for longer, by mistake
ADDRESS_PENALTY = 300.0  # an address that failed is tried after the others of its name
CONTINUE_TIMEOUT = 1.0  # for 100 (Continue), then the body is sent all the same (RFC 9110 §10.1.1)
POOL_IDLE_TIMEOUT = 15.0  # a pooled connection waits for its next request; nginx closes it after 75 s

# Timeouts of clients, in seconds, and rates in bytes a second.
IDLE_TIMEOUT = 60.0  # between two requests; apt thinks for a long time between two packages
REQUEST_HEAD_TIMEOUT = 30.0  # for a complete head; Apache allows 40 s, nginx 60 s
SLOW_HEAD_AGE = 1.0  # a head that takes longer may lose its connection to a new client when full
MIN_SHARE = 4  # connections of a client; with fewer, none is closed for other clients while it is busy
PLACES_PER_TURN = 4  # how often room for new clients is made until the limiter is called again
CLIENT_TIMEOUT = 60.0  # without progress in the middle of a message, as in nginx
LINGER_TIMEOUT = 2.0  # reading after the last response, so that a reset does not destroy it
TUNNEL_IDLE_TIMEOUT = 300.0  # a tunnel without traffic is closed
MIN_BODY_RATE = 1000  # of a request body in the long run, as dnf demands of a mirror
MIN_RATE = 4000  # a slower response gives way to new clients, a slower download without client stops
RATE_WINDOW = 10.0  # over which a rate is measured; a modem acknowledges in bursts
REFUSAL_LOG_INTERVAL = 60.0  # between two log lines about one refused client, lest it fills the log
LAN_INTERVAL = 5.0  # between two looks at this host's networks: many providers change the prefix daily

# Timeouts among requests, processes and threads, in seconds.
FOLLOWER_PATIENCE = 5.0  # then one follower asks as well: the leader's request may be why nothing comes
FOLLOWER_HEAD_TIMEOUT = 45.0  # a follower waits for its leader's head: RESPONSE_HEAD_TIMEOUT and some
FOLLOWER_STALL_TIMEOUT = 45.0  # a follower waits for the next byte: a stall of the origin, and a resumption
PEER_POLL_INTERVAL = 0.03  # between two looks at another instance's download; not noticeable to a person
PUBLISH_DELAY = 0.05  # without data from the origin, after which other instances see what has arrived
LEASE_DURATION = 10  # a memcached lease lapses and a follower takes over; its protocol has whole seconds
LEASE_RENEWAL_INTERVAL = 3.0  # between two renewals; two may fail
MEMCACHED_TIMEOUT = 1.0  # for memcached's reply; it answers in a millisecond or is down
MEMCACHED_BACKOFF = 5.0  # before a failed memcached is tried again; less than a lease
COMMIT_TIMEOUT = 900.0  # for a complete body to reach the disk: 10 GB at 12 MB/s
SHUTDOWN_GRACE = 8.0  # for running responses after SIGTERM; docker kills after 10 s
NOTIFY_INTERVAL = 10.0  # between two status texts to the service manager
RECORD_DELAY = 0.01  # a hit that was sent waits to be logged together with others of the same file
LOG_BATCH_DELAY = 0.02  # a log line waits for others, so that a burst is one write

# Intervals of the cache, in seconds.
DAY = 86400.0
REVALIDATION_INTERVAL = 3600.0  # between two validations of one response in the background
MAX_BACKGROUND_VALIDATIONS = 4  # at one time; no client waits for them
MAX_WATCHED = 16  # slow origins, or files of them, that are asked again in the background; each has a thread
DOUBT_PERIOD = 60.0  # a client that asks for a package again so soon doubts it; retries follow in seconds
DOUBT_INTERVAL = 5.0  # between two validations of a doubted package: many clients may share an address
DOUBTS_PER_CLIENT = 64  # packages that one address doubts in that time; a benchmark repeats more of them
EVICTION_INTERVAL = 300.0  # between two checks of the disk; a walk over a large cache takes seconds
SCRUB_PAUSE = 60.0  # between two rounds, and after the last use of a stored file; a disk may sleep then
SCRUB_RATE = 500_000  # bytes a second that are read to find damaged files; 43 GB a day
RECOVERY_PERIOD = 60.0  # without a disk error, until a stored file shows that the cache works again
MIN_EVICTION_PAUSE = 10.0  # between two evictions, however often the disk is full
MIN_EVICTION_AGE = 60.0  # a file used more recently is kept: a client may be about to ask for it again
OPEN_FOR = 3600.0  # a host's protection is rechecked this seldom if a bare file is all that could leak
ADOPT_SCAN_INTERVAL = 6 * 3600.0  # between two scans of the --adopt folders, which may be large
HISTORY_SAVE_INTERVAL = 60.0  # between two checks whether to save the counters; a crash loses no more

_T = TypeVar("_T")


def replace_fields(original: _T, **changes: Any) -> _T:
    """Return a copy of a dataclass instance with some fields replaced.

    Does not check the names.  dataclasses.replace() takes four times as long, and a miss makes ten calls.
    """
    copy = object.__new__(type(original))
    vars(copy).update(vars(original), **changes)
    return copy


def memoize(pure: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """Memoize a pure function for the most recent arguments of up to MAX_MEMOIZED characters."""
    memo = functools.lru_cache(LARGE_MEMO)(pure)
    return functools.wraps(pure)(lambda text: (memo if len(text or "") <= MAX_MEMOIZED else pure)(text))


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of a request: scheme, host, port and path (RFC 9110 §7.1), without userinfo or fragment."""

    scheme: str
    host: str  # lower case; an IPv6 address without its brackets
    port: int
    path: str  # path and query as the client wrote them; "*" or "" for OPTIONS * and CONNECT

    @property
    def authority(self) -> str:
        """``host[:port]`` as in the Host field; the default port is omitted, except for CONNECT."""
        host = "[%s]" % self.host if ":" in self.host else self.host
        default = 80 if self.scheme == "http" else 443 if self.path else None  # None: of a tunnel
        return host if self.port == default else "%s:%d" % (host, self.port)

    @property
    def uri(self) -> str:
        """The target in absolute-form (RFC 9112 §3.2.2)."""
        return "%s://%s%s" % (self.scheme, self.authority, self.path)


class ParentProxy(NamedTuple):
    """A parent proxy through which origins are reached."""

    place: Target
    fields: Fields = ()  # Proxy-Authorization, if the proxy's URL contains credentials
    or_direct: bool = False  # connect to origins directly while the parent is unreachable


@dataclasses.dataclass(frozen=True, eq=False)
class Config:
    """The settings from the command line.  The table of options takes its defaults from here.

    Compared by identity: functions that memoize results by their Config hash it for each hit.
    """

    addrs: tuple[str, ...] = (":9999",)  # to listen on
    root: str | None = None  # cache directory; None: the current one, which may also hold other files
    filters_file: str | None = None  # path of the file that `filters` are read from
    allow: tuple[str, ...] = ("loopback", "private", "lan")  # client networks: names of NETWORKS, or CIDR
    lan: tuple[str, ...] = ()  # what "lan" in `allow` stands for at the moment; looked up again and again
    connect_ports: tuple[int, ...] = (443,)  # allowed for CONNECT
    heuristics: bool = True  # heuristic freshness (RFC 9111 §4.2.2)
    offline: bool = False  # never contact an origin
    max_size: int | None = None  # bytes the cache may occupy; None: bounded by min_free only
    min_free: int | None = None  # bytes to leave free on the file system; None: 5 %, at most 10 GB
    scrub: bool = True  # whether stored files are read again to find damaged ones
    max_orphans: int = 8  # downloads that may continue after their last client has left
    max_age: float | None = None  # seconds since its last use after which a stored response is removed
    reuse_port: bool = False  # let other instances listen on the same addresses
    instance: str = ""  # name of this instance; "": the addresses tell instances apart
    filters: tuple[re.Pattern[str], ...] = ()  # URIs that are never cached; reread on SIGHUP
    origins_file: str | None = None  # path of the file that `origins` are read from
    origins: tuple[str, ...] | None = None  # hosts that may be reached; None: all.  Reread on SIGHUP
    access_log: str | None = None  # path of the log in the combined format
    barrier: tuple[tuple[str, int], ...] = ()  # memcached servers; none: file locks coordinate instances
    pseudonym: str = "pkgproxy"  # this proxy in Via and Cache-Status (RFC 9110 §7.6.3)
    ca_file: str | None = None  # certificates (PEM) trusted in addition to the system's
    parents: tuple[tuple[str, ParentProxy], ...] = ()  # by the scheme of the origin
    no_proxy: tuple[str, ...] = ()  # origins to reach without a parent
    adopt: tuple[str, ...] = ()  # directories with the user's own packages, never modified
    names: tuple[str, ...] = ()  # host names of this proxy, in addition to the machine's
    private: bool = False  # the pages show neither clients' addresses nor files


class Readable(Protocol):
    """A request's body, an origin's response, or a file."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes; b"" at the end."""


# Why a stored package is doubted: its client has just got it, so it is validated, unless that was just done;
# that has confirmed it, and the client asks once more, so it is fetched anew; or an index that is newer waits
# to be read, so it is validated.
DOUBT_OF_CLIENT, DOUBT_PERSISTS, DOUBT_UNREAD = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Request:
    """A client's request, as received; never modified (invariant 8)."""

    method: str
    uri: str  # the request target; filters search it and the log shows it
    target: Target
    fields: Fields
    version: tuple[int, int] = (1, 1)
    body: Readable | None = None
    length: int | None = 0  # bytes of the body; None: chunked
    client: str = "127.0.0.1"
    key: str = ""  # cache key (RFC 9111 §2); "" if the target cannot be cached
    is_own_page: bool = False  # for a page of the proxy itself
    client_prefix: str = ""  # what the client wrote before the target: "/", or HTTPS_HOST
    client_is_local: bool = False  # the client runs on this host
    known_missing: bool = False  # the event loop has just found nothing stored
    doubt: int = 0  # of a stored package: 0, or one of the DOUBT_ constants
    timings: dict[str, float] | None = None  # monotonic time of each step, by name; None: they are not logged
    # Sends the client a head of an interim response (RFC 9110 §15.2).
    send_interim: Callable[[bytes], object] | None = None


def mark(timings: dict[str, float] | None, step: str) -> None:
    """Record when a request first reached a step, for the log line that ``-v`` writes.

    ===============  ==================================================================================
    step             until then, since the step before
    ===============  ==================================================================================
    received         (its first bytes are there: all else is counted from here)
    dispatched       the client sent the rest of its head, and a thread was started
    looked up        the store was looked in: the disk
    joined           (another client's download is waited for)
    locked           no other instance downloads it: the lock on its partial file, or memcached
    connected        names, TCP, TLS, the parent proxy; not marked for a connection from the pool
    origin head      the request was sent; the origin took its time
    redirected head  the same, of the servers that the origin's redirects lead to
    broke off        a part of the body came; then the rest was asked for, perhaps more than once
    first byte       the client got its first byte; a small body was waited for a moment
    origin end       the rest of the body came; where it is not stored, at the client's speed
    stored           digest, fsync and rename: the disk
    ===============  ==================================================================================

    What is left up to the seconds in the log line is the client's time.  Another thread may be adding a
    step: copy ``timings`` before iterating over it.
    """
    if timings is not None:
        timings.setdefault(step, time.monotonic())


@dataclasses.dataclass(frozen=True)
class ResponseHead:
    """Status line and header fields of a response, plus what the cache knows about it."""

    status: int
    reason: str
    fields: Fields
    key: str = ""  # cache key of the request
    final_uri: str = ""  # target of the response, after redirects
    vary: Fields = ()  # request fields named by Vary (RFC 9111 §4.1)
    request_time: float = 0.0  # wall clock: when the request, or the last validation, was sent
    response_time: float = 0.0  # wall clock: when the response to it arrived
    size: int = -1  # bytes of the stored body
    mtime_ns: int = 0  # of the body file; with the size it tells one stored body from another
    local_clients_only: bool = False  # from an origin that only clients on this host may reach
    same_as: str = ""  # the identical stored file that was used in place of a download
    behind_login: bool = False  # a redirect on the way, to a request with a password, did not permit sharing
    displaced: bool = False  # stored under the hashed name because a foreign file has the natural one
    sha256: str = ""  # of the stored body; "" if it was stored by an earlier version
    sha512: str = ""  # of the stored body, if an index or its name has one
    verified: bool = True  # False: the body file was copied, so its origin is asked; never saved
    is_page: bool = False  # the body begins like HTML, or a redirect leads to such a page

    def __hash__(self) -> int:
        """Hash what tells two stored heads apart; hashing all fields takes long."""
        return hash((self.key, self.mtime_ns, self.response_time))


class RandomAccessFile(Protocol):
    """An open file that many threads read at positions of their own."""

    def fileno(self) -> int:
        """Return the file descriptor."""

    def read_at(self, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``; raise OSError."""


class FileSlice(NamedTuple):
    """A byte range of an open file that can be sent with sendfile()."""

    file: RandomAccessFile
    start: int
    stop: int  # exclusive
    fallback: Callable[[int, int], Iterator[bytes]] | None = None  # yields [start, stop) if reading fails

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


class ResponseBody(Protocol):
    """The body of a response; yields bytes or file slices.  Its owner closes it, perhaps more than once."""

    length: int | None  # bytes; None: unknown until the end
    live: bool  # its chunks arrive over time, so each is sent at once

    @property
    def origin_bytes(self) -> int:
        """Bytes so far that are not from the cache: from an origin, or multipart delimiters."""

    def chunks(self) -> Iterator[bytes | FileSlice]:
        """Yield the body in order; raise OSError or ProxyError if it cannot be completed."""

    def close(self) -> None:
        """Release files and connections."""


class Outcome(enum.Enum):
    """How a request was answered: the word for log, counters and pages, and most of what depends on it.

    Some members are also named in cache_status_field(), in BackgroundRevalidator._renew() and in Statistics,
    and all of them in the README's table of words.  STYLE has rules for each colour: in both themes, of rows,
    and of the filter of the last requests.  Tests compare the README and STYLE with the members.

    >>> Outcome("shared").from_cache, Outcome.FAILED.value, Outcome.FAILED.colour
    (True, 'failed', 'bad')
    """

    from_cache: bool  # the body came from a stored file or a download that another request had started
    in_hit_rate: bool  # counts as a request that the cache might have answered
    colour: str  # class in the status page: "cache", "origin", "stale" or "bad"
    hint: str  # why there is no hit, if this is the most frequent outcome; "": the response's detail

    def __new__(cls, word: str, colour: str = "origin", in_hit_rate: bool = False, from_cache: bool = False,
                hint: str = "") -> Outcome:
        """Make a member whose value is its word alone, so that Outcome(word) finds it."""
        member = object.__new__(cls)
        member._value_, member.colour, member.in_hit_rate = word, colour, in_hit_rate
        member.from_cache, member.hint = from_cache, hint
        return member

    #           word         colour    in rate  cached
    HIT = "hit", "cache", True, True  # from a stored file, without asking the origin
    VALIDATED = "validated", "cache", True, True  # from a stored file, after the origin's 304
    STALE = "stale", "stale", True, True  # from a stored file, because the origin is unavailable
    COLLAPSED = "collapsed", "cache", True, True  # from a download started for another client
    SHARED = "shared", "cache", True, True  # from an identical file of another mirror
    MISS = ("miss", "origin", True, False,  # downloaded and stored
            "each was for another file: normal at first; otherwise let all machines use the same mirror")
    UPDATED = "updated", "origin", True, False  # downloaded to replace an outdated stored file
    RELAYED = "relayed", "origin", True, False  # not stored: the response forbids it, or the disk failed
    BYPASS = ("bypass", "origin", True, False,  # not stored: because of a filter or the method
              "most matched a filter, or were not GET requests. Indexes need no filters")
    TUNNEL = "tunnel", "origin", False, False  # opaque bytes in both directions (CONNECT)
    OWN = "own", "origin", False, False  # a page of the proxy itself
    REFUSED = "refused", "bad", False, False  # an invalid or forbidden request
    FAILED = "failed", "bad", False, False, "most origins are unreachable"  # an error of the origin


class Action(enum.Enum):
    """What decide() tells the proxy to do."""

    SERVE = "serve"  # send the stored response
    VALIDATE = "validate"  # ask the origin whether the stored response is current
    FETCH = "fetch"  # download and store
    PASS = "pass"  # forward this client's request, and store nothing
    REFUSE = "refuse"  # send an error, because no origin may be asked


class NameClass(enum.Enum):
    """What a file name tells about how the file changes; POLICIES has the consequences."""

    CONTENT = "content-named"  # contains a digest of the content, or something as unique: never changes
    PACKAGE = "package"  # name and version: one file, unless it is uploaded again
    INDEX = "index"  # changes at any time, and must match its neighbours
    OTHER = "other"  # unknown: the response's own fields decide


class CachePolicy(NamedTuple):
    """How one class of names is cached, whatever the origin's headers say."""

    lifetime: float | None  # seconds of freshness; None: by the response's fields (RFC 9111 §4.2)
    refresh: float = math.inf  # seconds since the last validation, after which a hit starts another
    heeds_max_age: bool = True  # a max-age can force a validation; BackgroundRevalidator sends max-age=0
    redirects: bool = True  # follow redirects, and store the file under the requested name
    always_stale: bool = True  # may be served stale if the origin is unavailable, whatever its fields say


# Mirrors send the same max-age for packages and indexes, so this table is the one place that overrides it.
# Two clocks: `lifetime` and max-age are compared with the age, which counts from the origin (RFC 9111 §4.2.3)
# even if other caches were in between; `refresh` with the time since this proxy's own last validation.
POLICIES = {
    NameClass.CONTENT: CachePolicy(math.inf, heeds_max_age=False),  # a max-age could only confirm the file
    NameClass.PACKAGE: CachePolicy(math.inf, refresh=DAY),  # some repositories do upload a version again
    NameClass.INDEX: CachePolicy(0),  # stale is safe: clients check signature and date
    NameClass.OTHER: CachePolicy(None, redirects=False, always_stale=False),
}


@dataclasses.dataclass(frozen=True)
class CacheDecision:
    """What to do with a request, and why."""

    action: Action
    name_class: NameClass
    forward: str = ""  # fwd of Cache-Status (RFC 9211 §2.2): uri-miss, vary-miss, stale, request ...
    ttl: int | None = None  # seconds of freshness left, negative if stale; None: unknown or unlimited
    refresh: bool = False  # after SERVE, validate in the background

    @property
    def policy(self) -> CachePolicy:
        """The policy of the name's class."""
        return POLICIES[self.name_class]


class CacheStatus(NamedTuple):
    """One member of the Cache-Status field (RFC 9211)."""

    outcome: Outcome
    forward: str = ""  # fwd: why the origin was asked (§2.2); "": it was not
    forward_status: int = 0  # fwd-status: the origin's status (§2.3)
    stored: bool = False  # the response is being stored (§2.5)
    ttl: int | None = None  # seconds of freshness left (§2.4)
    detail: str = ""  # for people: what else led to the outcome (§2.8)


class ProxyError(Exception):
    """A request that cannot be satisfied; carries the status and the message for the client."""

    status = 500
    outcome = Outcome.REFUSED
    forward = ""  # as in CacheDecision, if the request got that far
    reason = ""  # why no stored response was served instead

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
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
    """A response to a client: head, body, and how the cache produced it."""

    head: ResponseHead
    body: ResponseBody
    cache_status: CacheStatus
    fallback: Callable[[Exception], Response] | None = None  # if the body fails before its first byte


class HeadTooLargeError(ValueError):
    """A head that exceeds a limit; ``status`` is for the client (414, or 431: RFC 6585 §5)."""

    def __init__(self, message: str, status: int = 431) -> None:
        super().__init__(message)
        self.status = status


class BadRequestError(ProxyError):
    """A malformed or ambiguous request (400, 414, 431 ...); its connection is closed (RFC 9112 §2.2)."""

    status = 400


class OriginError(ProxyError):
    """The origin is unreachable, or its response is not valid HTTP (502)."""

    status = 502
    outcome = Outcome.FAILED

    def __init__(self, message: str, target: Target | None = None, unreachable: bool = False,
                 status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after  # seconds for which the origin asks to be left alone
        self.target = target  # the origin that failed, after redirects; None: the requested one
        # There was no connection, so other requests to this host would fail, too.  Not set for errors that
        # the request itself may have caused: an error status, a connection closed early, silence.
        self.unreachable = unreachable


class OriginTimeoutError(OriginError):
    """The origin did not answer in time (504)."""

    status = 504


class TruncatedBodyError(OriginError):
    """The origin's body ended before its declared length."""


class CannotResumeError(OriginError):
    """The download cannot be resumed, for example because the file has changed at the origin."""


class DownloadAbandonedError(CannotResumeError):
    """The download has no client left, and as many others as allowed already continue without one."""


class StorageError(Exception):
    """The cache could not be used; the client still gets its response from the origin (invariant 6)."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.code = error.errno


class DamagedIndexError(Exception):
    """An index cannot be read to its end; the message is for the log."""


class FileFacts(NamedTuple):
    """What an index says about one file."""

    size: int | None
    algorithm: str  # "sha256", "sha512", or "" if no digest is known
    digest: bytes  # the first 32 bytes, which are all of a SHA-256


# ---------------------------------------------------------------------------------------------
# 2 HTTP messages: pure functions, without clock, disk or socket
# ---------------------------------------------------------------------------------------------

# Fields (RFC 9110 §5) ------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 §5.6.2
_TOKEN = re.compile(TOKEN)
_NO_TEXT = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # forbidden in field values (RFC 9110 §5.5)
# RFC 9110 §7.6.1, and the fields of older software.  Connection names further ones.
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
     "proxy-authentication-info", "te", "trailer", "transfer-encoding", "upgrade"))


@functools.lru_cache(32)  # a miss looks fields up fifty times, in five heads; more would hold long ones
def _values_by_name(fields: Fields) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, text in fields:
        found[name.lower()] = (*found.get(name.lower(), ()), text)
    return found


def field_values(fields: Fields, name: str) -> tuple[str, ...]:
    """Return all values of a field, in order.

    >>> field_values((("Via", "1.1 a"), ("via", "1.1 b")), "Via")
    ('1.1 a', '1.1 b')
    """
    return _values_by_name(fields).get(name.lower(), ())


def field_value(fields: Fields, name: str) -> str | None:
    """Return the first value of a field; None, and not "", if the field is absent."""
    values = _values_by_name(fields).get(name.lower())
    return values[0] if values else None


def list_members(fields: Fields, name: str) -> list[str]:
    """Return the lower-cased members of a list-valued field without quoted strings (RFC 9110 §5.6.1)."""
    members = ",".join(field_values(fields, name)).lower().split(",")
    return [member for text in members if (member := text.strip(" \t"))]


_WEIGHTED = re.compile(r"([^;\s]+)\s*(?:;\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*)?(?:;.*)?")


def member_weights(fields: Fields, name: str) -> collections.defaultdict[str, float]:
    """Return the weights of the members of Accept or Accept-Encoding (RFC 9110 §12.4.2), 0.0 for others."""
    accepted = [match for match in map(_WEIGHTED.fullmatch, list_members(fields, name)) if match]
    return collections.defaultdict(float, {match[1]: float(match[2] or 1) for match in accepted})


def without_fields(fields: Fields, names: Container[str]) -> Fields:
    """Return the fields whose names are not among ``names`` (lower case)."""
    return tuple([field for field in fields if field[0].lower() not in names])


def with_field(fields: Fields, name: str, text: str) -> Fields:
    """Return the fields with one of them set: any that have its name are replaced."""
    return without_fields(fields, (name.lower(),)) + ((name, text),)


@functools.lru_cache(32)
def end_to_end(fields: Fields) -> Fields:
    """Return the fields that a proxy forwards (RFC 9110 §7.6.1), without Content-Length.

    The proxy writes Content-Length itself, because it may frame the body differently.
    """
    return without_fields(fields, HOP_BY_HOP.union(list_members(fields, "Connection"), ("content-length",)))


def parse_fields(lines: list[str]) -> Fields:
    """Parse field lines without their CRLF (RFC 9112 §5); raise ValueError.

    White space before the colon and folded lines are errors (§5.1, §5.2): two parsers could read them
    differently, which allows request smuggling.

    >>> parse_fields(["Host: a", "X:  b c "])
    (('Host', 'a'), ('X', 'b c'))
    """
    if len(lines) > MAX_FIELDS:
        raise HeadTooLargeError("more than %d fields" % MAX_FIELDS)
    fields = []
    for line in lines:
        name, colon, text = line.partition(":")
        if not (colon and _TOKEN.fullmatch(name)) or _NO_TEXT.search(text):
            # Show the name at most: the value may be a password.
            raise ValueError("invalid field line: %.60r" % (name if colon else ""))
        fields.append((name, text.strip(" \t")))
    return tuple(fields)


def parse_delta_seconds(text: str | None) -> int:
    """Parse delta-seconds (RFC 9111 §1.2.2): an invalid value counts as 0, a huge one as 2**31.

    >>> [parse_delta_seconds(text) for text in ("60", "-1", None, "9" * 30, "1.5")]
    [60, 0, 0, 2147483648, 0]
    """
    return min(int(text[:12]), 2**31) if text and text.isascii() and text.isdigit() else 0


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATES = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        r"\w{3}, (?P<d>\d{2}) (?P<m>\w{3}) (?P<y>\d{4}) (?P<t>\d\d:\d\d:\d\d) GMT",  # IMF-fixdate
        r"\w{6,9}, (?P<d>\d{2})-(?P<m>\w{3})-(?P<y>\d{2}) (?P<t>\d\d:\d\d:\d\d) GMT",  # RFC 850
        r"\w{3} (?P<m>\w{3}) (?P<d>[ \d]\d) (?P<t>\d\d:\d\d:\d\d) (?P<y>\d{4})"))  # asctime


@memoize
def parse_date(text: str | None) -> float | None:
    """Parse an HTTP-date in any of its three formats (RFC 9110 §5.6.7).

    Returns clock seconds, or None if it is invalid.

    >>> [parse_date(text) for text in ("Sun, 06 Nov 1994 08:49:37 GMT",
    ...     "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", "0")]
    [784111777.0, 784111777.0, 784111777.0, None]
    """
    match = next(filter(None, (pattern.fullmatch(text or "") for pattern in _DATES)), None)
    if match is None or match["m"].lower() not in _MONTHS:
        return None
    year = int(match["y"])
    year += 0 if year > 99 else 2000 if year < 70 else 1900  # RFC 850 has two digits
    hour, minute, second = (int(part) for part in match["t"].split(":"))
    day, month = int(match["d"]), _MONTHS.index(match["m"].lower()) + 1
    is_valid = 1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60  # 60: a leap second
    return float(calendar.timegm((year, month, day, hour, minute, second))) if is_valid else None


# Messages (RFC 9112) -------------------------------------------------------------------------

_REQUEST_LINE = re.compile(r"(%s) ([^\x00-\x20\x7f]+) HTTP/(\d)\.(\d)" % TOKEN)


def parse_request_line(line: str) -> tuple[str, str, tuple[int, int]]:
    """Parse a request line without its CRLF into method, target and version (RFC 9112 §3).

    >>> parse_request_line("GET http://a/b HTTP/1.1")
    ('GET', 'http://a/b', (1, 1))
    """
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadRequestError("The request line is not 'METHOD target HTTP/1.1'.")
    if match[3] != "1":
        raise BadRequestError("HTTP/%s.%s is not supported; use HTTP/1.1." % (match[3], match[4]), 505)
    return match[1], match[2], (1, min(int(match[4]), 1))  # a later minor version is read as 1.1 (§2.3)


def parse_status_line(line: str) -> tuple[tuple[int, int], int, str]:
    """Parse a status line without its CRLF into version, status and reason (RFC 9112 §4); raise ValueError.

    >>> parse_status_line("HTTP/1.1 200 OK")
    ((1, 1), 200, 'OK')
    """
    match = re.fullmatch(r"HTTP/1\.(\d) ([1-5]\d\d)(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?", line)
    if not match:
        raise ValueError("not an HTTP/1 status line: %.60r" % line)
    return (1, min(int(match[1]), 1)), int(match[2]), match[3] or ""


def content_length(fields: Fields) -> int | None:
    """Return Content-Length, or None if absent (RFC 9112 §6.2); raise ValueError if invalid.

    Equal values may be repeated, as §6.3 step 5 allows; request_framing() is stricter.
    """
    found = {part.strip(" \t") for text in field_values(fields, "Content-Length") for part in text.split(",")}
    if not found:
        return None
    text = found.pop()
    if found or not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ValueError("invalid or contradictory Content-Length")
    return int(text)


def is_chunked(fields: Fields) -> bool:
    """Return whether the body is chunked (RFC 9112 §6.1); raise ValueError for any other coding."""
    if field_value(fields, "Transfer-Encoding") is None:
        return False
    if list_members(fields, "Transfer-Encoding") != ["chunked"]:
        raise ValueError("Transfer-Encoding other than chunked")
    return True


_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")


def parse_chunk_size(line: bytes) -> int:
    """Parse the first line of a chunk, CRLF included (RFC 9112 §7.1); raise ValueError.

    >>> parse_chunk_size(b"1f;name=value\\r\\n")
    31
    """
    match = _CHUNK_SIZE.fullmatch(line)
    if not match:
        raise ValueError("invalid chunk size: %.20r" % line)
    return int(match[1], 16)


def request_framing(version: tuple[int, int], fields: Fields) -> int | None:
    """Return the length of a request's body, None if chunked (RFC 9112 §6.3); raise BadRequestError.

    §6.3 allows to repair some contradictions.  The proxy refuses all of them, because a client and a
    server that disagree about where a message ends are what request smuggling needs.
    """
    try:
        length, chunked = content_length(fields), is_chunked(fields)
        # Step 5: repeated lengths, even equal ones.
        if "," in ",".join(field_values(fields, "Content-Length")):
            raise ValueError("more than one Content-Length")
        # Step 3: Transfer-Encoding would override the length.  HTTP/1.0 has no Transfer-Encoding (§6.1).
        if chunked and (length is not None or version < (1, 1)):
            raise ValueError("Transfer-Encoding with Content-Length, or with HTTP/1.0")
    except ValueError as error:
        raise BadRequestError("The length of the body is ambiguous: %s." % error) from None
    # Step 4: chunked.  Step 6: the declared length.  Step 7: a request without either has no body.
    return None if chunked else length or 0


# Targets and cache keys (RFC 9110 §7.1, RFC 3986) ----------------------------------------------

_HOST = re.compile(r"(?!\.)(?!.*\.\.)[a-z0-9._-]{1,253}")
_USERINFO = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:%]*")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})")


def split_authority(authority: str, default_port: int) -> tuple[str, int]:
    """Split ``[userinfo@]host[:port]`` into host and port; raise BadRequestError.

    The errors do not show the text: any of it may be a part of a password.
    """
    userinfo, _, host_port = authority.rpartition("@")
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(\d{0,5}))?", host_port)
    if not match or not _USERINFO.fullmatch(userinfo):
        raise BadRequestError("The URL has no valid host and port.")
    host, port = match[1].lower(), int(match[2] or default_port)
    if host.startswith("["):
        try:
            host = ipaddress.IPv6Address(host[1:-1]).compressed
        except ValueError:
            raise BadRequestError("The host in brackets is not an IPv6 address.") from None
    elif not _HOST.fullmatch(host):
        raise BadRequestError("The host is not a valid name.")
    if not 0 < port < 65536:
        raise BadRequestError("The port is not between 1 and 65535.")
    # The dot after a full name is for DNS (RFC 3986 §3.2.2): neither /etc/hosts nor certificates have it.
    return host.removesuffix("."), port


def is_address(host: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _normalize_escape(match: re.Match[str]) -> str:
    """Decode an unreserved character, and capitalize any other percent-encoding (RFC 3986 §6.2.2)."""
    char = chr(int(match[1], 16))
    return char if char in _UNRESERVED else match[0].upper()


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
    """Parse an absolute-form target (RFC 9112 §3.2.2), dropping userinfo and fragment.

    The path is normalized, so that the origin is asked for exactly what the cache key says.

    >>> parse_target("HTTP://me:pw@Example.org:80?q#f")
    Target(scheme='http', host='example.org', port=80, path='/?q')
    """
    match = re.fullmatch(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", uri, re.I | re.S)
    if not match:
        raise BadRequestError("The request target is not an http or https URL.")
    scheme = match[1].lower()
    host, port = split_authority(match[2], 443 if scheme == "https" else 80)
    # Encode what is not allowed in a URI (RFC 3986).
    allowed = urllib.parse.quote(match[3], "!$&'()*+,;=:@/?%[]", "latin-1", "backslashreplace")
    path, mark, query = allowed.partition("?")
    path = _PERCENT.sub(_normalize_escape, path if path.startswith("/") else "/" + path)
    return Target(scheme, host, port, _without_dots(path) + mark + query)


def resolve_reference(base: str, reference: str | None) -> Target | None:
    """Return the target of a URI reference (RFC 3986 §5).

    None if there is none, or if it is invalid, or not for http or https.
    """
    with contextlib.suppress(BadRequestError, ValueError):
        return parse_target(urllib.parse.urljoin(base, reference)) if reference else None
    return None


# A client that uses the proxy as a mirror writes a prefix before the origin's URL, or replaces its scheme:
#   /http://host/path    zypper merges the two slashes; pip sends %3A for the colon
#   /HTTPS///host/path   apt-cacher-ng's form for a repository that must be fetched with TLS
HTTPS_HOST = "http://HTTPS///"
_HTTPS_HOST = re.compile(r"https?://HTTPS(?::\d*)?/{2,3}([^/].*)", re.I | re.S)
_WRITTEN_OUT = re.compile(r"/(?:((?i:https?))(?::|(?i:%3A))|HTTPS)/{1,3}([^/?]+)(.*)", re.S)
# apt-cacher-ng's form without scheme, /host.name/path.  A dot, a port or "localhost", followed by a slash,
# distinguishes a host from a page of the proxy.
_NAMED = re.compile(r"/((?:localhost|[\w-]+(?:\.[\w-]+)+|\[[0-9a-f:.]+\])(?:(?::|%3A)\d+)?"
                    r"|[\w-]+(?::|%3A)\d+)(/.*)", re.I | re.A | re.S)
# The proxy's own pages, and those that browsers and monitors look for.
_OWN_PAGE = re.compile(r"/(?:debug/.*|setup/.*|status\.json|metrics|healthz|wpad\.dat|proxy\.pac|favicon\.ico"
                       r"|robots\.txt)?(?:\?.*)?", re.S)


def is_transparent(path: str, host: str, local: tuple[str, int]) -> bool:
    """Return whether an origin-form request was intercepted: a firewall redirected it from port 80.

    ``host`` is its Host field, ``local`` the address and port that received it.  The request is for the
    proxy itself if the host has another port, is the local address, or is a name without a dot.
    """
    name, port = split_authority(host, 80) if host else ("", 0)
    if port != 80 or name == local[0] or "." not in name and ":" not in name:
        return False
    # These three ask for a page of the proxy even under another name: by another address of the machine, on
    # port 80 itself, or for the WPAD file, which browsers request from wpad.<domain>.
    ours = is_address(name) or local[1] == 80 or path.startswith("/wpad.dat")
    return not (ours and _OWN_PAGE.fullmatch(path))


def parse_origin_form(path: str, host: str, local: tuple[str, int]) -> tuple[Target | None, str]:
    """Return the target of an origin-form request, and the prefix that the client wrote before it.

    The target is None for the proxy's own pages.

    >>> parse_origin_form("/https%3A/example.org%3A444/x", "proxy:9999", ("10.0.0.1", 9999))
    (Target(scheme='https', host='example.org', port=444, path='/x'), '/')
    """
    match = _WRITTEN_OUT.fullmatch(path)
    if match:
        parts = match[1] or "https", urllib.parse.unquote(match[2]), match[3]
        return parse_target("%s://%s%s" % parts), "/"
    if is_transparent(path, host, local):
        target = parse_target("http://" + host + path.lstrip("*"))
        return replace_fields(target, path=path) if path == "*" else target, ""
    match = _NAMED.fullmatch(path)
    if match:
        return parse_target("http://%s%s" % (urllib.parse.unquote(match[1]), match[2])), "/"
    return None, ""


def with_client_prefix(prefix: str, target: Target) -> str:
    """Return the URL by which a client that writes ``prefix`` reaches a target through the proxy."""
    if prefix == HTTPS_HOST:
        return target.uri if target.scheme == "http" else HTTPS_HOST + target.authority + target.path
    return prefix + target.uri


def parse_request_target(method: str, uri: str, host: str, local: tuple[str, int]
                         ) -> tuple[Target | None, str]:
    """Return a request's target (RFC 9112 §3.2), and the prefix that the client wrote before it.

    ``host`` is the Host field, ``local`` the address and port that received the request.  The target is
    None for the proxy's own pages.
    """
    # §3.2.3: authority-form, for CONNECT only.
    if method == "CONNECT":
        if "@" in uri or not re.search(r":\d+$", uri):
            raise BadRequestError("The target of CONNECT is not host:port.")
        return Target("https", *split_authority(uri, 443), ""), ""
    # §3.2.4: asterisk-form, for OPTIONS only.  §3.2.1: origin-form.
    if uri == "*" and method == "OPTIONS" or uri.startswith("/"):
        return parse_origin_form(uri, host, local)
    # §3.2.2: absolute-form.  It overrides Host.
    match = _HTTPS_HOST.fullmatch(uri)
    if match:
        return parse_target("https://" + match[1]), HTTPS_HOST
    target = parse_target(uri)
    if method == "OPTIONS" and re.fullmatch(r"https?://[^/?#]+", uri, re.I):
        return replace_fields(target, path="*"), ""  # §3.2.4: without a path it means the server
    # A client configured to use the proxy also sends it the URLs that begin with the proxy's own address.
    own_hosts = (local[0], "localhost") if local[0] in ("127.0.0.1", "::1") else (local[0],)
    if target.port == local[1] and (target.host in own_hosts or _WRITTEN_OUT.fullmatch(target.path)):
        inner, prefix = parse_origin_form(target.path, "", local)
        return inner or (None if _OWN_PAGE.fullmatch(target.path) else target), prefix
    return target, ""


def parse_host_field(version: tuple[int, int], fields: Fields) -> str:
    """Return the one Host field (RFC 9112 §3.2), "" if it is absent or empty; raise BadRequestError."""
    hosts = field_values(fields, "Host")
    if len(hosts) > 1 or not hosts and version >= (1, 1):
        raise BadRequestError("The request has no Host field, or several.")
    if hosts and hosts[0]:
        split_authority(hosts[0], 80)  # only to check it; some clients send userinfo, too
    return hosts[0] if hosts else ""


def cache_key(target: Target) -> str:
    """Return the primary cache key (RFC 9111 §2), after safe normalization (RFC 3986 §6.2.2).

    ``%2B`` and ``+`` make two keys (RFC 3986 §2.2), because object stores read ``+`` as a space.  Clients
    that encode one package's name differently still share its file, in the way that mirrors do.

    >>> cache_key(parse_target("http://A:80/x/../b%2b+%7e%2fc?q=%2b"))
    'http://a/b%2B+~%2Fc?q=%2B'
    """
    path, mark, query = _PERCENT.sub(_normalize_escape, target.path).partition("?")
    # parse_target() has normalized the path; again here, because no key may lead out of the cache directory.
    return "%s://%s%s%s%s" % (target.scheme, target.authority, _without_dots(path), mark, query)


def parse_request(lines: list[str], local: tuple[str, int] = ("", 0)) -> Request:
    """Make a request from the lines of its head (RFC 9112); its body is still to be read.

    ``local`` is the address and port that received it.  Raises BadRequestError.
    """
    method, uri, version = parse_request_line(lines[0])
    try:
        fields = parse_fields(lines[1:])
    except ValueError as error:
        status = getattr(error, "status", 400)
        raise BadRequestError("A header field is invalid: %s." % error, status) from None
    length = request_framing(version, fields)
    target, prefix = parse_request_target(method, uri, parse_host_field(version, fields), local)
    if method == "CONNECT" and (length != 0 or field_value(fields, "Content-Length") is not None):
        raise BadRequestError("CONNECT must not have a body.")
    key = cache_key(target) if target and target.path not in ("", "*") else ""
    if target is None:
        uri = re.sub(r"\A\w+://[^/?]*", "", uri) or "/"  # the path of the proxy's own page
    elif prefix or uri.startswith("/"):
        uri = target.uri  # filters and readers of the log expect the origin's URL
    return Request(method, uri, target or Target("", "", 0, uri), fields, version, length=length, key=key,
                   is_own_page=target is None, client_prefix=prefix)


# Validators and partial content (RFC 9110 §8.8, §14, §15.3.7) -----------------------------------


def media_type(head: ResponseHead) -> str:
    """Return the media type in lower case, without parameters; "" if there is none."""
    return (field_value(head.fields, "Content-Type") or "").partition(";")[0].strip().lower()


# The first bytes of a page, after the size of its first chunk, a byte order mark, white space and comments.
# Not <script>, <body> or an XML declaration: templates and components begin with these, too.
_HTML_START = re.compile(rb"(?:[0-9a-f]{1,8}[^\r\n]{0,99}\r\n)?(?:\xef\xbb\xbf)?(?:\s|<!--(?:(?!-->).)*-->)*"
                        rb"<(?:!doctype\s+html|html|head)(?:[\s>]|\Z)", re.I | re.S)


def begins_page(data: bytes) -> bool:
    """Return whether a body begins like an HTML page."""
    return bool(_HTML_START.match(data[:4096]))


def is_html(head: ResponseHead) -> bool:
    """Return whether a response is an HTML page, by its media type or its first bytes."""
    return head.is_page or media_type(head).startswith(("text/html", "application/xhtml"))


def validators(head: ResponseHead) -> Fields:
    """Return the preconditions that validate a stored response (RFC 9111 §4.3.1)."""
    tag, date = field_value(head.fields, "ETag"), field_value(head.fields, "Last-Modified")
    return ((("If-None-Match", tag),) if tag else ()) + ((("If-Modified-Since", date),) if date else ())


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def content_range(response: ResponseHead) -> tuple[int, int, int] | None:
    """Return the range [start, stop) of a 206, and the complete size (RFC 9110 §14.4).

    Returns None for other responses, and if the field is absent or lacks the size.
    """
    match = _CONTENT_RANGE.fullmatch(field_value(response.fields, "Content-Range") or "")
    return (int(match[1]), int(match[2]) + 1, int(match[3])) if match and response.status == 206 else None


def is_remainder(response: ResponseHead, head: ResponseHead, size: int | None, offset: int) -> bool:
    """Return whether ``response`` continues, from ``offset``, the representation that ``head`` began.

    ``size`` is the complete size, if known.  When in doubt the answer is False: bytes of two versions of a
    file must never be combined (RFC 9110 §15.3.7.3).
    """
    # 1. The same version: a 206 repeats ETag (§15.3.7).  It may omit the date, which If-Range has compared,
    #    and the coding.
    for name in ("ETag", "Last-Modified", "Content-Encoding"):
        before, after = field_value(head.fields, name), field_value(response.fields, name)
        omitted = after is None and name != "ETag" or before is None and name == "Last-Modified"
        if before != after and not (offset and omitted):
            return False
    # 2. From the start: a 200 with the whole.
    if not offset:
        return response.status == 200 and (size is None or content_length(response.fields) == size)
    # 3. From the offset: a 206 with exactly the rest.
    start, stop, total = content_range(response) or (-1, 0, 0)
    is_complete = content_length(response.fields) in (None, stop - start)
    return is_complete and start == offset and stop == total and size in (None, total)


def strong_date(head: ResponseHead) -> str | None:
    """Return Last-Modified if it is a strong validator, else None (RFC 9110 §8.8.2.2).

    It is strong if it was at least a minute old: the file may have changed twice within one second.
    """
    date = field_value(head.fields, "Last-Modified")
    modified = parse_date(date)
    sent = parse_date(field_value(head.fields, "Date")) or head.response_time
    return date if modified is not None and sent - modified >= 60 else None


def strong_validator(head: ResponseHead) -> str | None:
    """Return the validator for If-Range (RFC 9110 §13.1.5): a strong ETag, or a strong date without ETag."""
    tag = field_value(head.fields, "ETag")
    return strong_date(head) if not tag else None if tag.startswith("W/") else tag


def resume_validator(head: ResponseHead) -> str | None:
    """Return the validator with which a download may be resumed, or taken over from another instance.

    None for a copy of a local file: if it was adopted, its size and date alone confirm it, so it may differ
    from what the origin has, and must never be joined to the origin's bytes.
    """
    return None if head.same_as else strong_validator(head)


# Content codings (RFC 9110 §8.4.1) ---------------------------------------------------------------

# Origins send large text indexes gzipped if they are asked to: conda's is 440 MB of JSON.  Whatever coding
# has come is stored, under the one cache key, and gzip is decoded for clients that do not take it.


def has_coded_form(key: str) -> bool:
    """Return whether a cache key names a large text index: conda's, npm's, or a page that pip reads."""
    path = key.partition("?")[0]
    is_page = "simple/" in path and path.endswith("/")
    return is_page or path.endswith("/repodata.json") or key.endswith(("#json", "#npm"))


def accepts_gzip(request: Request) -> bool:
    """Return whether a client says that it takes gzip (RFC 9110 §12.5.3)."""
    weights = member_weights(request.fields, "Accept-Encoding")
    return weights.get("gzip", weights["*"]) > 0


def is_decodable(request: Request, head: ResponseHead) -> bool:
    """Return whether a response is gzipped for the way only; other names may be gzip files themselves."""
    coding = (field_value(head.fields, "Content-Encoding") or "").lower()
    return head.status == 200 and coding in ("gzip", "x-gzip") and has_coded_form(request.key)


def with_coding_of(fields: Fields, head: ResponseHead) -> Fields:
    """Return the fields of a request that asks for the coding that a stored body has.

    Another one has other bytes, and often another ETag: it neither confirms nor continues that body.
    """
    return with_field(fields, "Accept-Encoding", field_value(head.fields, "Content-Encoding") or "identity")


# Links behind a prefix ------------------------------------------------------------------------

# A client that writes a prefix leaves the proxy by an absolute link.  Two kinds of pages consist of such
# links and are rewritten: those that pip reads (PEP 503, PEP 691), npm's documents, and cargo's config.json.

_PAGE_LINK = re.compile(rb"""(\shref\s{0,8}=\s{0,8}["']?|"url"\s{0,8}:\s{0,8}")(https?:|/{1,2})""", re.I)
_BASE_TAG = re.compile(rb"""<base\s(?:[^<>]{0,99}\s)?href\s{0,8}=\s{0,8}["']?([^"'<>\s]{1,300})""", re.I)
_TARBALL_LINK = re.compile(rb'("(?:tarball|dl)"\s{0,8}:\s{0,8}")(https?:)')
_LINKS = {"text/html": _PAGE_LINK, "application/vnd.pypi.simple.v1+html": _PAGE_LINK,
          "application/vnd.pypi.simple.v1+json": _PAGE_LINK, "application/json": _TARBALL_LINK,
          "application/vnd.npm.install-v1+json": _TARBALL_LINK}
_LONGEST_LINK = 512  # bytes; more than any match of these patterns


def link_pattern_for(request: Request, head: ResponseHead) -> re.Pattern[bytes] | None:
    """Return the pattern of the links to rewrite in a response; None: leave it unchanged."""
    path, media = request.target.path.partition("?")[0], media_type(head)
    is_coded = field_value(head.fields, "Content-Encoding") is not None and not is_decodable(request, head)
    if request.client_prefix != "/" or head.status != 200 or is_coded or path.endswith("/repodata.json"):
        return None  # conda's index has no links
    for_pip = "pypi.simple" in (field_value(request.fields, "Accept") or "") or "simple/" in path
    if path.endswith("/config.json") or for_pip and path.endswith("/"):  # whatever their Content-Type says
        return _PAGE_LINK if for_pip else _TARBALL_LINK
    return _LINKS.get(media) if for_pip or media != "text/html" else None


def is_adapted(request: Request, head: ResponseHead) -> bool:
    """Return whether the client gets other bytes than those of the stored body: see adapt_body()."""
    return bool(link_pattern_for(request, head)) or is_decodable(request, head) and not accepts_gzip(request)


# Preconditions and ranges (RFC 9110 §13, §14) -------------------------------------------------

_TAG = re.compile(r'(?:W/)?"[^"]*"')


def _tag_among(tag: str | None, lists: Iterable[str], strong: bool) -> bool:
    """Compare an entity tag with those of If-Match or If-None-Match (RFC 9110 §8.8.3.2)."""
    listed = ",".join(lists)
    if listed.strip() == "*":
        return True
    if tag is None or strong and tag.startswith("W/"):
        return False
    found = _TAG.findall(listed)
    return tag in found if strong else tag.removeprefix("W/") in [one.removeprefix("W/") for one in found]


def evaluate_preconditions(request: Request, head: ResponseHead) -> int:
    """Evaluate the preconditions of a request in the order of RFC 9110 §13.2.2: return 200, 304 or 412."""
    if not any(name.startswith("if-") for name in _values_by_name(request.fields)):
        return 200
    tag, modified = field_value(head.fields, "ETag"), parse_date(field_value(head.fields, "Last-Modified"))
    match, none_match = (field_values(request.fields, name) for name in ("If-Match", "If-None-Match"))
    unmodified_since = parse_date(field_value(request.fields, "If-Unmodified-Since"))
    modified_since = parse_date(field_value(request.fields, "If-Modified-Since"))
    # Step 1: If-Match.
    if match:
        if not _tag_among(tag, match, strong=True):
            return 412
    # Step 2: If-Unmodified-Since, without If-Match.
    elif unmodified_since is not None and modified is not None and modified > unmodified_since:
        return 412
    # Step 3: If-None-Match.
    if none_match:
        return 304 if _tag_among(tag, none_match, strong=False) else 200
    # Step 4: If-Modified-Since, without If-None-Match.  Step 5, If-Range, is for requested_ranges().
    return 304 if modified_since is not None and modified is not None and modified <= modified_since else 200


def parse_range(text: str, size: int) -> list[tuple[int, int]] | None:
    """Parse a Range field into ranges [start, stop) of ``size`` bytes (RFC 9110 §14.1.2).

    Returns None if the field is to be ignored, and [] if no range can be satisfied.  Ranges that add up to
    more than the whole are ignored, as §14.2 suggests against attacks.

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
    return ranges if sum(stop - start for start, stop in ranges) <= size else None


def requested_ranges(request: Request, head: ResponseHead, size: int) -> list[tuple[int, int]] | None:
    """Return the ranges of a representation to send; None: all of it (RFC 9110 §14.2).

    Range is ignored if If-Range does not match (§13.1.5), and for bodies that are decoded or whose links are
    rewritten: their bytes have other positions.
    """
    text = field_value(request.fields, "Range")
    if text is None or request.method != "GET" or is_adapted(request, head):
        return None
    condition = field_value(request.fields, "If-Range")
    if condition is not None and condition not in (strong_validator(head), strong_date(head)):
        return None  # compared as text: apt sends the date back byte for byte
    return parse_range(text, size)


# Responses ------------------------------------------------------------------------------------

UNKNOWN_END = 2**62  # the stop of a range that ends where the body ends
Span = Union[bytes, "tuple[int, int]"]  # literal bytes, or a range [start, stop) of a representation


@dataclasses.dataclass(frozen=True)
class SelectedResponse:
    """The part of a representation that the client gets: a head, and the spans of the body."""

    head: ResponseHead
    spans: tuple[Span, ...]

    @property
    def overhead(self) -> int:
        """Bytes of the body that are not part of the representation."""
        return sum(len(span) for span in self.spans if isinstance(span, bytes))

    @property
    def length(self) -> int | None:
        """Bytes of the body, None if unknown."""
        total = self.overhead + sum(span[1] - span[0] for span in self.spans if isinstance(span, tuple))
        return total if total < UNKNOWN_END else None


def _partial_content(head: ResponseHead, size: int, ranges: list[tuple[int, int]]) -> SelectedResponse:
    """Make a 206: with one range, or as multipart/byteranges (RFC 9110 §15.3.7)."""
    labels = ["bytes %d-%d/%d" % (start, stop - 1, size) for start, stop in ranges]
    fields = with_field(head.fields, "Content-Range", labels[0])
    spans: list[Span] = [*ranges]
    if len(ranges) > 1:
        part = "\r\n--%s\r\nContent-Type: %s\r\nContent-Range: %s\r\n\r\n"
        media = field_value(head.fields, "Content-Type") or "application/octet-stream"
        spans = [span for label, pair in zip(labels, ranges)
                 for span in ((part % (MULTIPART_BOUNDARY, media, label)).encode("latin-1"), pair)]
        spans.append(("\r\n--%s--\r\n" % MULTIPART_BOUNDARY).encode("latin-1"))
        fields = without_fields(head.fields, ("content-range",))
        fields = with_field(fields, "Content-Type", "multipart/byteranges; boundary=" + MULTIPART_BOUNDARY)
    head = replace_fields(head, status=206, reason="Partial Content", fields=fields)
    return SelectedResponse(head, tuple(spans))


def generated_head(status: int, media: str = "text/plain; charset=utf-8", more: Fields = (),
                   policy: str = "default-src 'none'") -> ResponseHead:
    """Make the head of a response that the proxy itself generates.

    It must not be stored, and a browser must not guess its type, nor load or run anything that ``policy``
    (CSP) does not allow: an error message quotes text from outside.
    """
    return ResponseHead(status, http.client.responses.get(status, "Error"), (
        ("Content-Type", media), ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", policy), *more))


def error_head(status: int) -> ResponseHead:
    """Make the head of an error, with Allow or Retry-After (RFC 9110 §10.2.1, §10.2.3)."""
    more = {405: (("Allow", "GET, HEAD, OPTIONS"),), 503: (("Retry-After", "5"),)}
    return generated_head(status, more=more.get(status, ()))


def select_response(request: Request, head: ResponseHead, size: int | None) -> SelectedResponse:
    """Apply the preconditions and ranges of a request to a representation of ``size`` bytes.

    Ranges are ignored while the size is unknown (None); RFC 9110 §14.2 always allows that.
    """
    status = evaluate_preconditions(request, head)
    if status == 304:
        names = ("content-type", "content-length", "content-encoding", "content-range")
        fields = without_fields(head.fields, names)
        return SelectedResponse(replace_fields(head, status=304, reason="Not Modified", fields=fields), ())
    if status == 412:
        return SelectedResponse(error_head(412), (b"The file does not meet the request's precondition.\n",))
    ranges = None if size is None else requested_ranges(request, head, size)
    if ranges is None or size is None:
        return SelectedResponse(head, ((0, UNKNOWN_END if size is None else size),))
    if not ranges:  # RFC 9110 §15.5.17
        text = b"The file has %d bytes, and the requested range is beyond its end.\n" % size
        return SelectedResponse(generated_head(416, more=(("Content-Range", "bytes */%d" % size),)), (text,))
    return _partial_content(head, size, ranges)


def redirect_target(head: ResponseHead, target: Target) -> Target | None:
    """Return the target of a redirect that the proxy follows (RFC 9110 §15.4); None: relay it to the client.

    Not followed are redirects from https to http, which lose protection, and those that only add a slash:
    the client must learn the folder's URL, because links are relative to it.
    """
    new_target = resolve_reference(target.uri, field_value(head.fields, "Location"))
    is_redirect = head.status in (301, 302, 303, 307, 308)
    if not is_redirect or new_target is None or new_target.uri == target.uri + "/":
        return None
    return None if target.scheme == "https" and new_target.scheme != "https" else new_target


def via_value(fields: Fields, version: tuple[int, int], config: Config) -> str:
    """Return the value of Via with this proxy appended (RFC 9110 §7.6.3); ``version`` is the message's."""
    return ", ".join([*field_values(fields, "Via"), "%d.%d %s" % (*version, config.pseudonym)])


def is_same_site(target: Target, new_target: Target) -> bool:
    """Return whether credentials may follow a redirect: same host and port, or from http to https."""
    ports = (target.port, new_target.port)
    return target.host == new_target.host and (ports[0] == ports[1] or ports == (80, 443))


def max_forwards(request: Request) -> int | None:
    """Return how many proxies may forward a TRACE or OPTIONS (RFC 9110 §7.6.2); None: any number."""
    found = field_values(request.fields, "Max-Forwards") if request.method in ("TRACE", "OPTIONS") else ()
    return min(map(parse_delta_seconds, found), default=None)


def is_loop(request: Request, config: Config) -> bool:
    """Return whether a request has passed through this proxy before (RFC 9110 §7.6.3)."""
    pseudonym = config.pseudonym.lower()
    return any(member.split()[1:2] == [pseudonym] for member in list_members(request.fields, "Via"))


def cache_status_field(status: CacheStatus) -> str:
    """Return one member of Cache-Status (RFC 9211 §2).

    ``hit`` and ``fwd`` exclude each other: a response is a hit if the request was not forwarded (§2.1).

    >>> cache_status_field(CacheStatus(Outcome.MISS, "uri-miss", stored=True))
    'pkgproxy; fwd=uri-miss; stored'
    """
    outcome = status.outcome
    is_hit = outcome.from_cache and not status.forward
    detail = status.detail and re.sub(r'[^ !#-\[\]-~]', "", status.detail)
    return "; ".join([part for part in (
        "pkgproxy", is_hit and "hit", not is_hit and status.forward and "fwd=" + status.forward,
        status.forward_status and "fwd-status=%d" % status.forward_status, status.stored and "stored",
        outcome is Outcome.COLLAPSED and "collapsed", status.ttl is not None and "ttl=%d" % status.ttl,
        detail and 'detail="%s"' % detail) if part])


def render_head(head: ResponseHead, fields: Fields) -> bytes:
    """Return status line, fields and the empty line as sent (RFC 9112 §2.1)."""
    lines = ["HTTP/1.1 %d %s" % (head.status, head.reason)] + ["%s: %s" % field for field in fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


class Framing(enum.Enum):
    """How a client finds the end of a response's body (RFC 9112 §6.3)."""

    NONE = "none"  # there is no body
    LENGTH = "length"  # Content-Length
    CHUNKED = "chunked"
    CLOSE = "close"  # the end of the connection


def response_framing(request: Request, head: ResponseHead, length: int | None) -> Framing:
    """Choose the framing of a response with a body of ``length`` bytes, None if unknown."""
    if head.status in (204, 304) or head.status < 200:  # §6.3 step 1
        return Framing.NONE
    if length is not None:
        return Framing.LENGTH
    return Framing.CHUNKED if request.version >= (1, 1) else Framing.CLOSE  # §6.1: not to HTTP/1.0


def wants_keep_alive(request: Request) -> bool:
    """Return whether a client wants its connection to stay open (RFC 9112 §9.3).

    Old clients say so in Proxy-Connection.
    """
    options = list_members(request.fields, "Connection") + list_members(request.fields, "Proxy-Connection")
    return "close" not in options and (request.version >= (1, 1) or "keep-alive" in options)


def client_fields(head: ResponseHead, request: Request) -> Fields:
    """Return a response's fields as its client gets them.

    For a client that writes a prefix, a redirect leads through the proxy again.  To a browser, all origins
    behind the prefix are one site, so none may set a cookie, or run a script that could read the others.
    """
    fields = head.fields
    if has_coded_form(request.key) and "accept-encoding" not in list_members(fields, "Vary"):
        fields += (("Vary", "Accept-Encoding"),)
    if not request.client_prefix:
        return fields
    fields = without_fields(fields, ("set-cookie",)) + (("Content-Security-Policy", "sandbox"),)
    new_target = resolve_reference(head.final_uri or request.target.uri, field_value(fields, "Location"))
    if new_target is not None:
        fields = with_field(fields, "Location", with_client_prefix(request.client_prefix, new_target))
    return fields


def rewrite_links(chunks: Iterable[bytes], links: re.Pattern[bytes], base: str, page: Target
                  ) -> Iterator[bytes]:
    """Yield a body with ``base`` before its absolute links, however it is divided into chunks.

    Links without a host are relative to ``page``, or to what the page's <base href> says.

    >>> b"".join(rewrite_links([b'<a href="/x"'], _PAGE_LINK, "http://p:9999/", parse_target("https://a/")))
    b'<a href="http://p:9999/https://a/x"'
    """
    rest, origin = b"", page

    def rewrite(match: re.Match[bytes]) -> bytes:
        """Put the proxy's URL before one link."""
        start = {b"//": origin.scheme + "://", b"/": "%s://%s/" % (origin.scheme, origin.authority)}
        return match[1] + (base + start.get(match[2], match[2].decode())).encode()

    for chunk in itertools.chain(chunks, [b""]):
        rest += chunk
        tag = _BASE_TAG.search(rest)
        origin = (resolve_reference(page.uri, tag[1].decode("latin-1")) if tag else None) or origin
        # A match may continue in the next chunk, so keep as many bytes as the longest has.
        done = end = max(0, len(rest) - (_LONGEST_LINK if chunk else 0))
        for match in links.finditer(rest):
            if match.start() >= end:
                break
            done = max(done, match.end())
        if done:
            yield links.sub(rewrite, rest[:done])
        rest = rest[done:]


def decode_gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a gzipped body decoded (RFC 1952), 0 to COPY_SIZE bytes at once: few bytes may stand for many.

    Raise TruncatedBodyError if it is damaged or ends early.
    """
    decoder = zlib.decompressobj(31)
    try:
        for data in chunks:
            while data:
                decoder = zlib.decompressobj(31) if decoder.eof else decoder  # another member follows
                yield decoder.decompress(data, COPY_SIZE)
                data = decoder.unconsumed_tail or decoder.unused_data
        if not decoder.eof:
            raise zlib.error("it ends early")
    except zlib.error as error:
        raise TruncatedBodyError("The gzipped body is damaged: %s." % error) from None


def encode_gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Return an iterator over a body gzipped, fast rather than small."""
    encoder = zlib.compressobj(1, wbits=31)
    return itertools.chain(map(encoder.compress, chunks), map(encoder.flush, [zlib.Z_FINISH]))


def with_date(head: ResponseHead, now: float) -> ResponseHead:
    """Return a head with Date (RFC 9110 §6.6.1): the one it has, or ``now``."""
    date = field_value(head.fields, "Date") or formatdate(now, usegmt=True)
    return replace_fields(head, fields=with_field(head.fields, "Date", date))


def render_response_head(request: Request, head: ResponseHead, length: int | None, cache_status: CacheStatus,
                         close: bool, config: Config) -> bytes:
    """Return the head of a response as sent, with framing, Via, Cache-Status and Connection.

    ``length`` is that of the body, None if unknown; ``close`` announces the end of the connection.
    """
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


# Text for the log and the pages ---------------------------------------------------------------


def escape_control(text: str) -> str:
    """Escape control characters, so that text from outside cannot forge log lines or drive a terminal."""
    return _CONTROL.sub(lambda match: "\\x%02x" % ord(match[0]), text)


# A host with something behind its colon that is not a port: a password whose @ is missing, say.
_NO_PORT = re.compile(r"/*(?:\w+(?::|%3A)/+)?(?:\[[^\]/]*\]|[^:/?#\[]*?)(?::|%(?:25)*3A)"
                      r"(?!\d{0,5}(?:[/?#\s]|(?:,direct)?\Z))", re.I)  # ,direct: of --parent
# The userinfo of a URL within the path or query of another.
_INNER_USERINFO = re.compile(r"((?::|%3A|HTTPS)/{1,3})[^/?]*(?:@|%(?:25)*40)", re.I)


def cut_userinfo(text: str) -> str:
    """Remove everything between the scheme and the last @ of an invalid request target.

    The exact place of its userinfo, which may be a password, cannot be known.  Without an @, everything
    behind the host is removed if no port follows it.

    >>> cut_userinfo("http:/me:se/cret@a:80/x"), cut_userinfo("/me:secret@a"), cut_userinfo("http://a/x")
    ('http:/a:80/x', '/a', 'http://a/x')
    >>> cut_userinfo("http://me:secret/x")
    'http://me:...'
    """
    rest = re.split("@|%(?:25)*40", text)[-1]
    scheme = re.match("(?:https?:)?/*", text, re.I)
    shown = text if rest == text or scheme is None else scheme[0] + rest
    no_port = _NO_PORT.match(shown)
    return no_port[0] + "..." if no_port else shown


@memoize
def loggable_uri(uri: str) -> str:
    """Return a request target for the log: without userinfo, and safe for a terminal.

    >>> loggable_uri("http://me:secret@a/@x")
    'http://a/@x'
    """
    try:
        parse_target(uri)
    except BadRequestError:
        return escape_control(cut_userinfo(uri))
    return escape_control(_INNER_USERINFO.sub(r"\1", uri.partition("#")[0]))


def log_text(request: Request, cache_status: CacheStatus) -> str:
    """Return method, target and the reason for the outcome, as the log shows them."""
    detail = " (%s)" % escape_control(cache_status.detail) if cache_status.detail else ""
    return "%s %s%s" % (escape_control(request.method), loggable_uri(request.uri), detail)


def truncate_middle(text: str, most: int) -> str:
    """Return text from outside for a page: printable ASCII, at most ``most`` characters (the middle is cut).

    >>> truncate_middle("http://a/b", 20), truncate_middle("http://a/bcdefghijklmno", 11)
    ('http://a/b', 'http:...lmno')
    """
    text = escape_control(text).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= most else text[:most // 2] + "..." + text[-(most // 2 - 1):]


@functools.lru_cache(LARGE_MEMO)  # hits need the same ones again and again
def format_bytes(count: float) -> str:
    """Format a number of bytes for people, in decimal units.

    >>> format_bytes(999), format_bytes(53080), format_bytes(999_950)
    ('999 B', '53.1 kB', '1.0 MB')
    """
    power = next((power for power in range(1, 5) if count < 999.95 * 1000**power), 5)
    return "%d B" % count if count < 1000 else "%.1f %sB" % (count / 1000**power, " kMGTP"[power])


def reason_phrase(message: str) -> str:
    """Return the cause in an error message, for the status line: apt shows nothing else of a response.

    The cause is the first sentence, without a remedy after a semicolon.

    >>> reason_phrase("CONNECT to port 25 is not allowed; the operator can add it.")
    'CONNECT to port 25 is not allowed'
    """
    return truncate_middle(re.split(r"[.;] ", message)[0].rstrip("."), 118)


def displayable_uri(uri: str) -> str:
    """Return a request target for a page: without its query, which may be a password.

    More people read the pages than the log.
    """
    path, mark, _ = loggable_uri(uri).partition("?")
    return truncate_middle(path + mark, 120)


# ---------------------------------------------------------------------------------------------
# 3 Cache rules: pure functions
# ---------------------------------------------------------------------------------------------

# Cache-Control (RFC 9111 §5.2) ------------------------------------------------------------------

MAX_CACHE_CONTROL = 1000  # characters of all values together

# An unterminated quoted string extends to the end.  Otherwise the search would start again at each of its
# characters, and take quadratic time.
_DIRECTIVE = re.compile(
    r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|(%s)(?:[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)(?:"|\\?\Z)|([^\s,]*)))?' % TOKEN,
    re.S)


def cache_directives(fields: Fields) -> dict[str, str | None]:
    """Parse Cache-Control (RFC 9111 §5.2).

    Of a repeated directive the smallest number counts, which is the most cautious reading (§4.2.1).  A field
    of more than MAX_CACHE_CONTROL characters counts as ``no-store, no-cache``: what it says is not parsed.

    >>> cache_directives((("Cache-Control", 'max-age=5, private="a, b"'), ("cache-control", "MAX-AGE=3")))
    {'max-age': '3', 'private': 'a, b'}
    """
    found: dict[str, str | None] = {}
    text = ",".join(field_values(fields, "Cache-Control"))
    if len(text) > MAX_CACHE_CONTROL:
        return {"no-store": None, "no-cache": None}
    for match in _DIRECTIVE.finditer(text):
        if match[1] is None:
            continue  # a quoted string without a name
        key = match[1].lower()
        argument = match[2] or match[3]
        is_number = (argument or "0").isdigit()
        if key not in found or is_number and parse_delta_seconds(argument) < parse_delta_seconds(found[key]):
            found[key] = argument
    return found


# Which request fields may shape a shared response ----------------------------------------------

# A response may be given to other clients only if nothing but its key (and Vary) has shaped it.  So a
# request whose response is stored, or shared by a running download, has three kinds of fields:
#   SHARED_FIELDS  are forwarded.  Origins that heed Accept or Accept-Language name them in Vary, some
#                  mirrors refuse clients without User-Agent, and is_shareable() covers Authorization.
#   _OWN_FIELDS    are replaced by the proxy's own, or shape only the response that the proxy makes.
#   _NEEDLESS      are dropped: what clients tell about themselves, and what other proxies or tracing add.
# Any other field might ask for a response for this client alone: see private_fields().

SHARED_FIELDS = frozenset(
    ("accept", "accept-language", "authorization", "cache-control", "pragma", "user-agent"))
_OWN_FIELDS = frozenset(("host", "via", "range", "if-range", "if-match", "if-none-match", "if-modified-since",
                         "if-unmodified-since", "accept-encoding"))
# The last two lines: npm, bundler, cargo, NuGet, zypper, flatpak and Go.
_NEEDLESS = re.compile(
    r"accept-charset|expect|content-type|date|expires|cache-store|from|referer|dnt|max-forwards"
    r"|priority|save-data|upgrade-insecure-requests|sec-(?:ch|fetch|gpc)(?:-[a-z-]+)?|forwarded|x-real-ip"
    r"|want-(?:(?:content|repr)-)?digest|x-forwarded-[a-z]+|x-(?:request|correlation)-id|traceparent"
    r"|tracestate|x-b3-[a-z]+|baggage"
    r"|npm-(?:auth-type|command|in-ci|scope|session)|pacote-[a-z-]+|x-gemfile-source|cargo-protocol"
    r"|x-nuget-[a-z-]+|x-zypp-[a-z]+|flatpak-[a-z-]+|disable-module-fetch")
_CREDENTIAL = re.compile("api|auth|cookie|cred|jwt|key|login|otp|pass|saml|secret|session|sign|token|user")


def _only(fields: Fields, names: frozenset[str]) -> Fields:
    return tuple(field for field in fields if field[0].lower() in names)


def private_fields(request: Request) -> frozenset[str]:
    """Return the names of the fields that may ask for a response for this client alone.

    Such a request is never stored, nor joined to a running download.  If a name looks like a credential's,
    it is not even answered from the cache.
    """
    names = frozenset(name.lower() for name, _ in end_to_end(request.fields)) - SHARED_FIELDS - _OWN_FIELDS
    # A browser that follows a prefixed link may have a cookie of the proxy's host; no origin gets it.
    ignored = {"cookie"} if request.client_prefix else set()
    return frozenset(name for name in names - ignored if not _NEEDLESS.fullmatch(name))


def without_private_fields(request: Request) -> Request:
    """Return the request that the origin of a shared response sees; Vary selects fields of this one."""
    return replace_fields(request, fields=_only(request.fields, SHARED_FIELDS | _OWN_FIELDS))


def origin_request_fields(request: Request, config: Config, identity: bool) -> Fields:
    """Return the fields of a request to an origin (RFC 9110 §7.6).

    ``identity``: the response may be stored.  Then send SHARED_FIELDS only, and ask for no content coding,
    because one stored body serves all clients; but for gzip if the proxy can decode it for the others.
    """
    hops = max_forwards(request)
    # 1. Remove hop-by-hop fields (§7.6.1), those that the proxy writes itself, a browser's cookie for
    #    another service on the proxy's host, and Expect from HTTP/1.0 (§10.1.1).
    removed = ["host", "via"] + (["cookie"] if request.client_prefix else [])
    removed += ["expect"] if request.version < (1, 1) else []
    kept = without_fields(end_to_end(request.fields), removed)
    # 2. Add: Host first (§7.2), Max-Forwards (§7.6.2), the framing of the body, Via last (§7.6.3).
    fields = (("Host", request.target.authority),) + (_only(kept, SHARED_FIELDS) if identity else kept)
    if hops is not None:
        fields = with_field(fields, "Max-Forwards", str(hops - 1))
    if identity:
        is_whole = request.client_prefix == "/" and field_value(request.fields, "Range") is None
        may_code = is_whole and has_coded_form(request.key) and accepts_gzip(request)
        fields += (("Accept-Encoding", "gzip" if may_code else "identity"),)
    elif request.length is None:
        fields += (("Transfer-Encoding", "chunked"),)
    elif request.length or field_value(request.fields, "Content-Length") is not None:
        fields += (("Content-Length", str(request.length)),)
    return fields + (("Via", via_value(request.fields, request.version, config)),)


def permits_sharing(head: ResponseHead) -> bool:
    """Return whether a response to a request with Authorization says that it is for all clients."""
    control = cache_directives(head.fields)
    allowed = "public" in control or parse_delta_seconds(control.get("s-maxage")) > 0
    return allowed and "authorization" not in list_members(head.fields, "Vary")


def is_shareable(request: Request, head: ResponseHead) -> bool:
    """Return whether a response to a request with Authorization may be stored (RFC 9111 §3.5).

    Every redirect that answered the password must permit that as well: it may lead to a signed URL, whose
    response is public only for those who know the URL.  Without Authorization, ``no-store`` on a redirect is
    about the redirect alone, because every client gets such a URL for the asking.

    ``must-revalidate``, which the RFC also accepts, is not enough.  It obliges a cache to let the origin
    check each client's credentials, but the proxy serves packages without asking, and indexes while the
    origin is down.
    """
    return field_value(request.fields, "Authorization") is None or (
        permits_sharing(head) and not head.behind_login)


def selecting_fields(request: Request, head: ResponseHead) -> Fields:
    """Return the request's fields that Vary names, normalized (RFC 9111 §4.1).

    Accept-Encoding is left out, because the proxy chooses it itself.  Language tags are compared without
    regard to case (RFC 5646 §2.1.1).
    """
    selected = []
    for name in sorted(set(list_members(head.fields, "Vary")) - {"accept-encoding"}):
        text = ", ".join(map(str.strip, ",".join(field_values(request.fields, name)).split(",")))
        selected.append((name, text.lower() if name == "accept-language" else text))
    return tuple(selected)


def storable_fields(fields: Fields) -> Fields:
    """Return the response fields to store; never Set-Cookie, because a cookie is for one client only."""
    return without_fields(end_to_end(fields), ("set-cookie",))


# Pages that origins send in two forms by Accept, often without Vary: PyPI's (PEP 691), npm's documents.
# A mark at the end of its cache key tells one form from the other.
FORMS = {
    "": "text/html", "#npm": "application/vnd.npm.install-v1+json; q=1.0, application/json; q=0.8, */*",
    "#json": "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html"}


def with_chosen_form(request: Request) -> Request:
    """Return a request with Accept reduced to the form of a page that it chooses, and the form in its key.

    So clients that choose the same in other words share one stored response.  Other requests stay as they
    are.
    """
    weights = member_weights(request.fields, "Accept") or collections.defaultdict(float, {"*/*": 1.0})
    path = request.target.path.partition("?")[0]
    pypi = "application/vnd.pypi.simple."
    json_weight = max(weights[pypi + name] for name in ("v1+json", "latest+json"))
    html_weight = max(weights[name] for name in (pypi + "v1+html", "text/html", "text/*", "*/*"))
    if request.method not in ("GET", "HEAD") or not request.key or path.endswith(".tgz"):
        return request
    if weights["application/vnd.npm.install-v1+json"] > weights["application/json"]:
        mark = "#npm"
    elif path.endswith("/") and (json_weight or "simple/" in path and html_weight):
        mark = "#json" if json_weight and json_weight >= html_weight else ""
    else:
        return request
    fields = with_field(request.fields, "Accept", FORMS[mark])
    return replace_fields(request, fields=fields, key=request.key + mark)


# Where a key's body is stored -----------------------------------------------------------------


def _file_name(segment: str, windows: bool) -> str:
    if windows:
        segment = re.sub(r'[<>:"|?*\\]|[. ]$', lambda match: "^%02X" % ord(match[0]), segment)
        if re.match(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", segment, re.I):
            segment = "^%02X%s" % (ord(segment[0]), segment[1:])
    return "^" + segment if segment in ("", "?", "^3F") else segment


def cache_file_names(key: str, windows: bool = False) -> tuple[str | None, str]:
    """Return a cache key's two possible file names below the root: the natural and the hashed one.

    The natural name is None if it would be too long for a file system.  The hashed name also serves if a
    URL is both a file and a folder.  No two keys share a name.  No URL contains a caret, so it marks what a
    file system cannot hold: ``^`` is an empty segment, ``^2F`` a slash in a query.

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
    # File systems allow 255 bytes a name and, with the root before it, about 4,000 a path.
    fits = max(map(len, names)) <= 240 and sum(map(len, names)) <= 1000 and len(names) <= 100
    return "/".join([folder, *names]) if fits else None, "%s/^%s" % (folder, digest)


# Name classes: index and package names of every package manager --------------------------------

# To add a package manager's names, go through this list:
#   _INDEX, or _INDEX_FOLDER   a file that changes in place
#   _PACKAGE                   the suffix of its packages, whose names have a version; _VERSION_IN_PATH if the
#                              version is in the folder; _PLATFORM if a platform with digits looks like one
#   _DATED, _MOVING            a folder in which nothing changes, or in which even versioned names do
#   _CONTENT, and _DIGEST      a name with a digest.  A version does not make a name CONTENT, because some
#                              repositories upload a version again
#   _SIGNATURES                the suffix of a signature or checksum, from which signed_keys() and
#                              signature_keys() are derived.  Add it to _NEVER_EMPTY if an empty one is an
#                              error, and the signed file to _COMPRESSED if its content is what is signed
#   _INDEX_NAME, _PARSERS      an index that tells the sizes or digests of packages, to be read
# Examples belong in the tests: NameRulesTest.CLASSES and DATED, its tests of digest_in_name() and
# shareable_name(), and PairTest.PAIRS for each kind of signature.  A page in two forms: FORMS.
# Clients choose the names, so each pattern must match in linear time (a test measures them all): do not
# let an unbounded repetition follow something that can begin at many places of one segment.

# A path beyond these limits has no class: matching costs time for each byte and segment.
MAX_NAME = 255  # bytes of a segment; no file system has longer names
MAX_CLASSIFIED_PATH = 2048  # characters of the path
MAX_CLASSIFIED_SEGMENTS = 100
# Content-named files are cached forever, so a name belongs here only if it can never mean another content.
# Without a digest that digest_in_name() can check, it is not enough to share the file between mirrors.
# So add the name to _DIGEST as well if it contains the SHA-256 or SHA-512 of the very body.
_CONTENT = re.compile(
    r"/by-hash/[^/]+/[0-9a-f]{32,128}$"  # apt
    r"|/repodata/[0-9a-f]{32,128}-[^/]+$"  # rpm-md
    r"|\.diff/(?!Index)[^/]+$"  # apt's pdiffs
    r"|/objects/[0-9a-f]{2}/[0-9a-f]{62}\.(?!commitmeta)[a-z.]+$"  # ostree
    r"|/deltas/[\w+-]{2}/[^/]+/(?:superblock|\d+)$|/summaries/[0-9a-f]{64}[.-][^/]+$"  # flatpak
    r"|/[a-z]{1,2}/[0-9a-f]{64}(?:-[0-9a-f]{64})?(?:\.gz)?$"  # freebsd-update
    r"|/file/\d/[0-9a-f]{40,64}$|/files/[0-9a-f]{64}\.tar$"  # IPS, swupd
    r"|/All/Hashed/[^/]+$"  # FreeBSD pkg
    r"|/nar/(?:\w+/)?(?:[0-9a-z]{32}-)?(?:[0-9a-z]{52}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
    r"\.nar(?:\.\w+)?$"  # Nix: named by a digest, or at random
    r"|/[0-9a-f]{64}\.msgpack\.zst$"  # conda
    r"|/(?:artifact|(?:package|registry)/[0-9a-f-]{36})/[0-9a-f]{40}$"  # Julia: the hash of a Git tree
    r"|/(?:blobs|manifests)/sha256:[0-9a-f]{64}$"  # OCI, Homebrew's bottles
    r"|/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/[^/]+$"  # PyPI
    r"|/core/guids/[0-9a-f]{64}/")  # Amazon Linux
# Dated archives and Maven's timestamped snapshots: nothing in them changes, whatever their names say.
_DATED = re.compile(r"/\d{8}T\d{6}Z/|/repos/\d{4}/\d\d/\d\d/|/history/\d{8}/|-SNAPSHOT/[^/]*-\d{8}\.\d{6}-\d")
_MOVING = re.compile(r"/(?:current|latest|latest-stable|snapshots|rawhide|nightly|[^/]+-SNAPSHOT)/", re.I)
# Suffixes of signatures and checksums, which are renewed together with what they sign.
_SIGNATURES = ("sig", "sig2", "asc", "gpg", "sign", "signature", "minisig", "prov",
               "md5", "rmd160", "sha1", "sha256", "sha512", "sha1sum", "sha256sum", "sha512sum")
_SIGNATURE = re.compile(r"\.(?:%s)$" % "|".join(_SIGNATURES))
# Files that change in place.
_INDEX_FOLDER = re.compile(
    r"/(?:project/trace|indices|media\.1|boot/[^/]+|media_info|refs/heads|delta-indexes)/")
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
    r"|/index\.yaml|/(?:channel-rust-[^/]+|release-stable)\.toml|/registries(?:\.\w+)?"  # Helm, Rust, Julia
    r"|/config\.json|/maven-metadata\.xml|/archetype-catalog\.xml|/@v/list|/@latest"
    r"|/(?:current_)?repodata[^/]*|/notices\.json"  # conda
    r"|/0[12](?:packages\.details|mailrc)\.txt\.gz|/PACKAGES(?:\.\w+)?|/texlive\.tlpdb[^/]*"
    r"|/setup\.(?:ini|xz|zst|bz2)|/repo(?:\.info)?|/base/(?:pkg|src)list[^/]*)$")
# Packages: these need a version in the name, too.  It is searched after the platform, which has digits.
_PACKAGE = re.compile(
    r"/([^/]+?)\.(?:u?deb|ddeb|dsc|debdelta|jigdo|template|d?rpm|apk|ipk|xbps|eopkg|hpkg|pkg|conda|gem"
    r"|whl(?:\.metadata)?|gemspec\.rz|crate|snap|[jwa]ar|klib|pom|module|s?nupkg|nuspec|vsix|zip|tar|msi"
    r"|t(?:gz|xz|bz2?|lz)|pkg\.tar(?:\.\w+)?|gpkg\.tar"
    r"|(?:orig[\w.-]{0,64}\.|debian\.)?(?:tar|diff)\.(?:gz|xz|bz2|zst|lzo?|lz4|lzma|lrz|Z))")
_PLATFORM = re.compile(
    r"x86[-_]64|x86|i[3-6]86|amd64|arm64|armv\d\w*|aarch64|ppc64\w*|mips64\w*|riscv64"
    r"|(?:linux|osx|win)-?(?:32|64)", re.I)
_VERSION = re.compile(r"[-_~@+.][vr]?\d")
_VERSIONLESS = re.compile(r"[/_.-](?:latest|current|nightly|daily)[_.-]", re.I)
# Names that say what they are without the version in the last segment: Go's modules, and cargo's crates.
_VERSION_IN_PATH = re.compile(r"/@v/v\d[^/]*\.(?:info|mod|zip)|/crates/[^/]+/\d[^/]*/download")


def _has_package_name(path: str) -> bool:
    """Return whether the last segment of a path is a package's file name with a version."""
    at = path.rfind("/")
    match = _PACKAGE.fullmatch(path, at)
    return bool(match and _VERSION.search(_PLATFORM.sub("", match[1])) and not _VERSIONLESS.search(path, at))


@memoize
def classify_name(key: str) -> NameClass:
    """Return the class of the name in a cache key; a signature has the class of the signed file.

    >>> [classify_name("http://a" + path).value for path in ("/dists/x/by-hash/SHA256/" + "0" * 64,
    ...     "/pool/c/curl_7.88.1-10_amd64.deb", "/core.db.sig", "/jenkins_amd64.deb")]
    ['content-named', 'package', 'index', 'other']
    """
    path = "/" + key.partition("://")[2].partition("/")[2].partition("?")[0]
    if len(path) > MAX_CLASSIFIED_PATH:
        return NameClass.OTHER
    path = urllib.parse.unquote(path, "latin-1")
    segments = path.split("/")[1:]
    if len(segments) > MAX_CLASSIFIED_SEGMENTS or max(map(len, segments)) > MAX_NAME or _CONTROL.search(path):
        return NameClass.OTHER
    for _ in range(3):  # a name may be followed by a checksum's and a signature's suffix
        if _CONTENT.search(path):
            return NameClass.CONTENT
        is_dated = _DATED.search(path)
        if is_dated or _MOVING.search(path):
            return NameClass.INDEX if not is_dated else NameClass.PACKAGE if segments[-1] else NameClass.OTHER
        path = _SIGNATURE.sub("", path)
    # Everything below dists/ is an index, except that some apt repositories keep their packages there.
    in_dists = "/dists/" in path and not path.endswith((".deb", ".udeb"))
    if in_dists or _INDEX_FOLDER.search(path) or _INDEX.search(path):
        return NameClass.INDEX
    return NameClass.PACKAGE if _has_package_name(path) or _VERSION_IN_PATH.search(path) else NameClass.OTHER


def is_immutable_name(key: str) -> bool:
    """Return whether a name never stands for other content: a package's, or a content-named file's."""
    return POLICIES[classify_name(key)].lifetime == math.inf


# Only digests of the body itself: ostree's .filez, for one, is named after its uncompressed content.  A new
# shape belongs to the first alternative: otherwise digest_in_name() has to know its group.
_DIGEST = re.compile(
    r"/(?:by-hash/SHA(?:256|512)/|repodata/|(?:blobs|manifests)/sha256:)"
    r"([0-9a-f]{128}|[0-9a-f]{64})(?:-[^/]+)?$"
    r"|/objects/([0-9a-f]{2}/[0-9a-f]{62})\.(?:commit|dirtree|dirmeta)$")  # .filez: of what is in it
_EPOCH = re.compile(r"_\d+:(?=[^_]*_[^_]*deb)")  # in apt's own cache, file names include the epoch


def digest_in_name(key: str) -> tuple[str, str] | None:
    """Return algorithm and digest of the body, if a content-named key contains one that cannot be forged.

    >>> digest_in_name("http://a/by-hash/SHA256/" + "0" * 64)[0]
    'sha256'
    """
    is_content = classify_name(key) is NameClass.CONTENT and not _SIGNATURE.search(key)
    match = _DIGEST.search(urllib.parse.unquote(key, "latin-1")) if is_content else None
    digest = (match[1] or match[2]).replace("/", "") if match else ""
    return ("sha256" if len(digest) == 64 else "sha512", digest) if match else None


@memoize
def shareable_name(key: str) -> str:
    """Return the name under which every mirror has the same file; "" if there is none.

    That is the digest in the name, or else a package's file name.  Other content-named files are unique in
    their own repository only, and a Go module's version says nothing without its path.
    """
    digest = digest_in_name(key)
    if digest is not None:
        return digest[1]
    if "?" in key or not is_immutable_name(key):
        return ""
    name = urllib.parse.unquote(key.rpartition("/")[2], "latin-1")
    is_package = _has_package_name(_SIGNATURE.sub("", "/" + name))
    is_unique = is_package and not _VERSION_IN_PATH.search(urllib.parse.unquote(key, "latin-1"))
    return _EPOCH.sub("_", name) if is_unique else ""


_COMPRESSED = re.compile(r"(?:(?<=/Packages)|(?<=\.tar))\.\w+$")  # opkg and others sign what is in it


def signed_keys(key: str) -> list[str]:
    """Return what a file may be the signature or checksum of; nothing if its name is not that of one.

    >>> signed_keys("http://a/summary.sig"), signed_keys("http://a/summary")
    (['http://a/summary'], [])
    """
    signed: list[str] = []
    while _SIGNATURE.search(key) and len(signed) < 2:  # a checksum may have a signature
        key = _SIGNATURE.sub("", key)
        signed.append(key)
    suffixes = (".gz", ".xz", ".zst", ".bz2") if signed and key.endswith(("/Packages", ".tar")) else ()
    return signed + [key + suffix for suffix in suffixes]


def signature_keys(key: str) -> list[str]:
    """Return the possible signatures and checksums of a file, which have to be of its generation."""
    if "?" in key or _SIGNATURE.search(key):
        return []
    # A new file may need a new key, but not the reverse: so only this list has "key" (repomd.xml.key).
    suffixes = (*_SIGNATURES, "key", "sha256.asc", "sha512.asc")
    names = dict.fromkeys((key, _COMPRESSED.sub("", key)))
    return [name + "." + suffix for name in names for suffix in suffixes]


# Pages in the place of files (captive portals, parked mirrors) ------------------------------------

# A page's name, without the query.  An index is a page only as a folder's listing, or if its name says so.
_PAGE = re.compile(r"/[^/.]*$|\.(?:x?html?|php|aspx?|jsp|cgi)$", re.I)
_INDEX_PAGE = re.compile(r"/$|\.x?html?$", re.I)


def can_be_page(key: str) -> bool:
    """Return whether a name may be that of a page: a folder, or another that does not look like a file."""
    pages = {NameClass.OTHER: _PAGE, NameClass.INDEX: _INDEX_PAGE}.get(classify_name(key))
    return bool(pages and pages.search(key.partition("?")[0]))


def is_misplaced_page(request: Request, stored: ResponseHead | None, response: ResponseHead) -> bool:
    """Return whether a response is HTML in the place of a file: from a captive portal or a parked mirror.

    What is ``stored``, if anything, tells whether it is a file; else the name does.  A browser may get a page
    in the place of another type if the name allows it.

    >>> page = ResponseHead(200, "", (("Content-Type", "text/html"),))
    >>> [is_misplaced_page(parse_request(["GET http://a%s HTTP/1.0" % path]), None, page)
    ...     for path in ("/simple/x/", "/x.iso", "/InRelease", "/x-1.0.rpm")]
    [False, True, True, True]
    """
    if not is_html(response) or response.status >= 300 or stored is not None and is_html(stored):
        return False
    accepted = field_value(request.fields, "Accept") or ""
    # A stored response of the same wrong type may be a page as well.
    is_same = stored is not None and media_type(stored) == media_type(response)
    is_expected = stored is None or is_same or accepted.lower().startswith("text/html")
    # A text may begin like a page: README.md, a template.
    is_text = is_same and "text/" in media_type(response) and classify_name(request.key) is NameClass.OTHER
    return not (is_text or is_expected and can_be_page(request.key))


# Freshness (RFC 9111 §4.2) --------------------------------------------------------------------


def freshness_lifetime(head: ResponseHead) -> int | None:
    """Return the explicit freshness lifetime in a shared cache, in seconds (RFC 9111 §4.2.1).

    Returns None if the origin gives none.

    >>> freshness_lifetime(ResponseHead(200, "", (("Cache-Control", "max-age=60, s-maxage=5"),)))
    5
    """
    # 1. s-maxage, because this cache is shared.  2. max-age.
    control = cache_directives(head.fields)
    for name in ("s-maxage", "max-age"):
        if name in control:
            return parse_delta_seconds(control[name])
    # 3. Expires minus Date.  An invalid Expires, such as "0", is in the past (§5.3).  Without a valid Date,
    #    the time of reception counts (RFC 9110 §6.6.1).
    if field_value(head.fields, "Expires") is None:
        return None
    end, start = parse_date(field_value(head.fields, "Expires")), parse_date(field_value(head.fields, "Date"))
    return 0 if end is None else max(0, int(end - (head.response_time if start is None else start)))


_TEXT_TYPE = re.compile(r"^text/|json|ya?ml|xml|html|script|toml|csv|urlencoded|x-sh")
_BINARY_NAME = re.compile(
    r"\w+://[^?]*/[^/?]*[^/?.]\.(?!(?:(?:geo|nd)?json[cl]?|ya?ml|xml|x?html?|txt|toml|[ct]sv|md|[cm]?js|css|ini|cfg"
    r"|conf|php\d?|aspx?|jsp|cgi|rss|atom|list|repo|log|asc|pem|sh|ps1|py|properties|lock|sql|plist|map|appcast"
    r"|sha\d+|version)$)\w{1,12}", re.I)


def heuristic_lifetime(head: ResponseHead, config: Config) -> int:
    """Return the heuristic lifetime, in seconds, of a response without explicit freshness (RFC 9111 §4.2.2).

    It is a day for a binary file that cannot be validated, else 0: text is often a list that changes.
    """
    is_file = _BINARY_NAME.fullmatch(head.key) and not _TEXT_TYPE.search(media_type(head))
    return int(DAY) if config.heuristics and is_file and not validators(head) else 0


def current_age(head: ResponseHead, now: float) -> int:
    """Return the age of a stored response in seconds (RFC 9111 §4.2.3).

    An invalid Age is ignored, and of several the first counts (§5.1).  The age is as high as possible if the
    response was received in the future.  Up to a minute is a difference between the clocks of machines.
    """
    date = parse_date(field_value(head.fields, "Date"))
    apparent_age = 0.0 if date is None else max(0.0, head.response_time - date)
    first = (field_value(head.fields, "Age") or "").partition(",")[0].strip(" \t")
    age_value = parse_delta_seconds(first) if head.response_time - now < 60 else 2**31
    corrected_age = age_value + max(0.0, head.response_time - head.request_time)  # plus response_delay
    return int(max(apparent_age, corrected_age) + max(0.0, now - head.response_time))  # plus resident_time


def with_age(head: ResponseHead, now: float) -> ResponseHead:
    """Return a stored response's head with Age as served now (RFC 9111 §5.1), and with Accept-Ranges."""
    fields = (*without_fields(head.fields, ("accept-ranges", "age")), ("Accept-Ranges", "bytes"))
    return replace_fields(head, fields=(*fields, ("Age", str(current_age(head, now)))))


def freshen_head(stored: ResponseHead, response: ResponseHead) -> ResponseHead:
    """Return a stored head updated by a 304 (RFC 9111 §3.2, §4.3.4)."""
    # Fields that describe the stored body stay as they are (§3.2), and the ETag by which it was validated.
    kept = ("content-length", "content-encoding", "content-range", "content-md5", "etag", "set-cookie")
    new = without_fields(end_to_end(response.fields), kept)
    # The age restarts from that of the 304, so an old Age goes even if the 304 has none (§4.2.3).
    fields = without_fields(stored.fields, ["age", *(name.lower() for name, _ in new)]) + new
    return replace_fields(stored, fields=fields, request_time=response.request_time,
                          response_time=response.response_time, behind_login=response.behind_login)


def is_304_for(stored: ResponseHead, response: ResponseHead) -> bool:
    """Return whether a 304 confirms the stored response (RFC 9111 §4.3.4).

    With another ETag or date it is about another response: a mirror that compares dates would also confirm
    a captive portal's page that was stored today.
    """
    tag, date = field_value(response.fields, "ETag"), field_value(response.fields, "Last-Modified")
    stored_tag = field_value(stored.fields, "ETag") or "none"
    same_tag = tag is None or tag.removeprefix("W/") == stored_tag.removeprefix("W/")
    return same_tag and date in (None, field_value(stored.fields, "Last-Modified") or date)


def is_same_version(stored: ResponseHead, response: ResponseHead) -> bool:
    """Return whether a 200 has the size and the validators of what is stored: some origins know no 304."""
    return response.status == 200 and content_length(response.fields) == stored.size and (
        validators(response) == validators(stored))


# What may be stored (RFC 9111 §3, §4.4) --------------------------------------------------------


def _prohibitions(request: Request, head: ResponseHead) -> tuple[tuple[bool, str], ...]:
    """Return the directives and fields that forbid storing a response, each with whether it applies."""
    control = cache_directives(head.fields)
    # §5.2.2.3: must-understand overrides no-store, but allows only statuses whose caching rules are known.
    understood = "must-understand" in control and head.status in http.client.responses
    return (
        ("no-store" in cache_directives(request.fields), "no-store"),
        ("no-store" in control and not understood, "no-store"),
        ("must-understand" in control and not understood, "must-understand"),
        ("private" in control, "private"),
        ("*" in list_members(head.fields, "Vary"), "Vary: *"),
        (not is_shareable(request, head), "Authorization"))


# Files that are never empty, besides packages and what a digest names.
_NEVER_EMPTY = re.compile(r"/(?:(?:In)?Release|repomd\.xml|APKINDEX[^/]*|[^/]+\.(?:db|files|adb|pkg|[gx]z|bz2"
                          r"|zst|lzma|tar|tgz|txz|zip|jar|gpg|sig|asc|key))(?:\?|$)")


def is_implausible(key: str, size: int | None) -> bool:
    """Return whether a body's size cannot be true: no package is empty, for example."""
    return size == 0 and (is_immutable_name(key) or bool(_NEVER_EMPTY.search(key)))


def why_not_storable(request: Request, head: ResponseHead, config: Config) -> str:
    """Return why a response must not be stored (RFC 9111 §3); "" if it may be."""
    lifetime = freshness_lifetime(head) if POLICIES[classify_name(request.key)].lifetime is None else 1
    of_use = validators(head) or (heuristic_lifetime(head, config) if lifetime is None else lifetime)
    reasons = (
        (request.method != "GET", "only GET is stored"),
        (head.status != 200, "status %d is not stored" % head.status),
        *_prohibitions(request, head),
        (is_misplaced_page(request, None, head), "an HTML page for a name that is not a page's"),
        (is_implausible(request.key, content_length(head.fields)), "no bytes"),
        (not of_use, "no lifetime and no validator"))
    return next((reason for applies, reason in reasons if applies), "")


def is_small_answer(request: Request, head: ResponseHead) -> bool:
    """Return whether a response to a GET is kept in memory: not a 200, but with a lifetime (RFC 9111 §3).

    Statuses that are about a condition, a range or credentials are for one request.  A content-named file,
    and Nix's description of one, may appear at any moment.
    """
    may_appear = classify_name(request.key) is NameClass.CONTENT or request.key.endswith(".narinfo")
    of_use = freshness_lifetime(head) and "no-cache" not in cache_directives(head.fields)  # never validated
    return bool(of_use and not may_appear and head.status not in (200, 206, 304, 401, 407, 412, 416)
                and not head.is_page and not any(applies for applies, _ in _prohibitions(request, head)))


def is_worth_full_download(request: Request) -> bool:
    """Return whether to download a whole file although a range was requested.

    It is if the range starts within FULL_DOWNLOAD_RANGE and is at least as long: then the client probably
    resumes or reads on.  An invalid Range is ignored, so it asks for the whole file; several ranges do not.
    """
    ranges = parse_range(field_value(request.fields, "Range") or "", 2**60)
    if not ranges or len(ranges) > 1:
        return ranges is None
    start, stop = ranges[0]
    return start <= FULL_DOWNLOAD_RANGE <= stop - start


def invalidated_keys(request: Request, response: ResponseHead) -> list[str]:
    """Return the keys that a successful unsafe request invalidates (RFC 9111 §4.4).

    These are its target, and the URLs in Location and Content-Location if they have the same origin.
    """
    if request.method in ("GET", "HEAD", "OPTIONS", "TRACE") or response.status >= 400:
        return []
    keys = [request.key]
    for name in ("Location", "Content-Location"):
        target = resolve_reference(request.target.uri, field_value(response.fields, name))
        if target and (target.scheme, target.authority) == (request.target.scheme, request.target.authority):
            keys.append(cache_key(target))
    return [key + mark for key in keys for mark in FORMS]


# What to do with a request (RFC 9111 §4) -------------------------------------------------------

# Directives of a response that forbid serving it stale (§4.2.4); s-maxage implies proxy-revalidate
# (§5.2.2.10).
_NEVER_STALE = frozenset(("must-revalidate", "proxy-revalidate", "no-cache", "s-maxage"))


def _client_wants_validation(control: dict[str, str | None], policy: CachePolicy, age: int,
                             ttl: float) -> bool:
    """Return whether a client's directives demand a validation (RFC 9111 §5.2.1.1, §5.2.1.3, §5.2.1.4)."""
    too_old = policy.heeds_max_age and "max-age" in control and age >= parse_delta_seconds(control["max-age"])
    too_short = "min-fresh" in control and ttl < parse_delta_seconds(control["min-fresh"])
    return "no-cache" in control or too_old or too_short


def _may_serve_stale(control: dict[str, str | None], stored: ResponseHead, ttl: float) -> bool:
    """Return whether a stale response may be served without asking the origin first.

    The client allows it with max-stale (RFC 9111 §5.2.1.2), the origin with stale-while-revalidate
    (RFC 5861 §3).
    """
    response_control = cache_directives(stored.fields)
    by_client = parse_delta_seconds(control["max-stale"] or str(2**31)) if "max-stale" in control else 0
    by_origin = parse_delta_seconds(response_control.get("stale-while-revalidate"))
    return -ttl < max(by_client, by_origin) and _NEVER_STALE.isdisjoint(response_control)


def _decide_stored(request: Request, stored: ResponseHead, name_class: NameClass, config: Config,
                   now: float) -> CacheDecision:
    """Decide about a stored response that matches the request: SERVE or VALIDATE (RFC 9111 §4).

    ``age`` counts from the origin's response (§4.2.3), ``now - response_time`` from the last validation here.
    """
    control, policy, age = cache_directives(request.fields), POLICIES[name_class], current_age(stored, now)
    if not control and "no-cache" in list_members(request.fields, "Pragma"):  # §5.4
        control = {"no-cache": None}
    # 1. Freshness (§4.2): by the name's class, else explicit, else heuristic.
    lifetime: float | None = freshness_lifetime(stored) if policy.lifetime is None else policy.lifetime
    ttl = (heuristic_lifetime(stored, config) if lifetime is None else lifetime) - age
    ttl = ttl if stored.verified else -math.inf
    known_ttl = None if math.isinf(ttl) else int(ttl)
    # 2. The client demands a validation (or BackgroundRevalidator, with max-age=0), or sends one of the two
    #    conditions that only the origin can evaluate (§4.3.2).
    strict = field_values(request.fields, "If-Match") + field_values(request.fields, "If-Unmodified-Since")
    doubted = request.doubt > DOUBT_OF_CLIENT or request.doubt and now - stored.response_time > DOUBT_INTERVAL
    if strict or doubted or _client_wants_validation(control, policy, age, ttl):
        return CacheDecision(Action.VALIDATE, name_class, "request", known_ttl)
    # 3. Fresh, or allowed to be stale while it is validated in the background (§4.2.4).  A package is fresh
    #    whatever its fields say, but once a day it is validated as well: it may have changed after all.
    by_fields = policy.lifetime is None
    fresh = ttl > 0 and not (by_fields and "no-cache" in cache_directives(stored.fields))
    if fresh or by_fields and _may_serve_stale(control, stored, ttl):
        due = not fresh or abs(now - stored.response_time) > policy.refresh  # abs(): clocks jump
        return CacheDecision(Action.SERVE, name_class, ttl=known_ttl, refresh=due)
    return CacheDecision(Action.VALIDATE, name_class, "stale", known_ttl)


def _pass_if_private(request: Request, stored: ResponseHead | None, decision: CacheDecision) -> CacheDecision:
    """Change a decision to PASS if fields of this client alone may shape the response."""
    private = private_fields(request)
    if private and decision.action is not Action.SERVE or any(map(_CREDENTIAL.search, private)):
        return replace_fields(decision, action=Action.PASS, forward="request", refresh=False)
    # Vary names a field that is not forwarded: a fetch would bring the stored response again.
    if decision.forward == "vary-miss" and stored is not None and selecting_fields(
            without_private_fields(request), stored) == stored.vary:
        return replace_fields(decision, action=Action.PASS)
    return decision


def decide(request: Request, stored: ResponseHead | None, config: Config, now: float) -> CacheDecision:
    """Decide what to do with a request, given the head that is stored for its key (RFC 9111 §4).

    The first row that applies decides:

    ====  =====================================================  ===================  ===========
    step  condition                                              action               fwd
    ====  =====================================================  ===================  ===========
    1     ``--offline``                                          SERVE or REFUSE      uri-miss
    2     a filter matches                                       PASS                 bypass
    3     the method is not GET or HEAD                          PASS                 method
    4     the request has a body                                 PASS                 bypass
    5     nothing is stored                                      FETCH                uri-miss
    6     the stored response was selected by other fields       FETCH                vary-miss
    7     a stored response matches                              SERVE or VALIDATE    stale, request
    ====  =====================================================  ===================  ===========

    The result of steps 5 to 7 is then restricted: PASS if the request has private fields; REFUSE if the
    origin would be asked despite ``only-if-cached``; PASS instead of FETCH if there is nothing to store.
    """
    # Only a file changes as its name tells; any other answer, such as a 404, as its fields say.
    name_class = classify_name(request.key) if stored is None or stored.status == 200 else NameClass.OTHER
    matches = stored is not None and selecting_fields(request, stored) == stored.vary  # RFC 9111 §4.1
    is_read = request.method in ("GET", "HEAD")
    if config.offline:
        action, forward = (Action.SERVE, "") if matches and is_read else (Action.REFUSE, "uri-miss")
        return CacheDecision(action, name_class, forward)
    if any(pattern.search(request.uri) for pattern in config.filters):
        return CacheDecision(Action.PASS, name_class, "bypass")
    if not is_read or request.length != 0:  # only the origin knows what a GET's body means (RFC 9110 §9.3.1)
        return CacheDecision(Action.PASS, name_class, "bypass" if is_read else "method")
    if stored is None or not matches:
        decision = CacheDecision(Action.FETCH, name_class, "uri-miss" if stored is None else "vary-miss")
    else:
        decision = _decide_stored(request, stored, name_class, config, now)
    decision = _pass_if_private(request, stored, decision)
    control = {} if decision.action is Action.SERVE else cache_directives(request.fields)
    if "only-if-cached" in control:  # §5.2.1.7
        return replace_fields(decision, action=Action.REFUSE)
    if decision.action is Action.FETCH and (request.method == "HEAD" or "no-store" in control):
        return replace_fields(decision, action=Action.PASS)
    return decision


def may_serve_stale_on_error(decision: CacheDecision, stored: ResponseHead) -> bool:
    """Return whether a stored response may be served because its origin is unavailable (RFC 9111 §4.2.4)."""
    allowed = decision.policy.always_stale or _NEVER_STALE.isdisjoint(cache_directives(stored.fields))
    return allowed and decision.forward != "vary-miss"


def why_not_from_cache(request: Request, decision: CacheDecision) -> str:
    """Return why a request cannot be answered from the cache, whatever is stored; "" if it can."""
    private = ", ".join(sorted(private_fields(request)))
    reasons = (
        (request.method not in ("GET", "HEAD"), "only GET and HEAD are answered from the cache"),
        (private and decision.forward == "request", "for this client alone: " + private),
        (decision.action is Action.PASS, "the request bypasses the cache"))
    return next((reason for applies, reason in reasons if applies), "")


def replaces_stored(decision: CacheDecision, response: ResponseHead) -> bool:
    """Return whether the answer to a validation shows that the stored response is outdated."""
    is_whole = response.status == 200 and not is_implausible(response.key, content_length(response.fields))
    return decision.action is Action.VALIDATE and is_whole


# What is not believed -------------------------------------------------------------------------


def says_not_now(status: int) -> bool:
    """Return whether a status means that the same request may succeed later."""
    return status in (408, 425, 429) or status >= 500


def why_not_believed(request: Request, stored: ResponseHead, response: ResponseHead) -> str:
    """Return why a stored response is better than the origin's answer to its validation; "" if it is not.

    ================================  =================================================================
    the answer                        the stored response
    ================================  =================================================================
    408, 425, 429 or 5xx              is better: the origin says "not now" (RFC 9111 §4.2.4)
    HTML in the place of a file,      is better: a captive portal or a parked mirror has answered
    or a redirect to it
    any other, to a doubt             is better, unless it is a 200: the package may have been removed
    403, 404, 410 and others          is not: that is the origin's answer.  It stays stored
    ================================  =================================================================
    """
    is_suspicion = request.doubt and "no-cache" not in cache_directives(request.fields)
    if says_not_now(response.status) or is_suspicion and response.status != 200:
        return str(response.status)
    if response.is_page and response.status >= 300:
        return "a redirect to an HTML page"
    return "an HTML page instead of the file" if is_misplaced_page(request, stored, response) else ""


def parse_retry_after(response: ResponseHead) -> float:
    """Return for how many seconds an origin wants to be left alone (RFC 9110 §10.2.3), 0 if it does not say.

    >>> parse_retry_after(ResponseHead(429, "", (("Retry-After", "60"),)))
    60.0
    """
    text = field_value(response.fields, "Retry-After")
    date = parse_date(text)
    seconds = parse_delta_seconds(text) if date is None else date - response.response_time
    return min(max(0.0, float(seconds)), MAX_RETRY_AFTER)


# What indexes say: bytes in, entries out

MAX_STANZA = 4 * 1024 * 1024  # bytes about one package; a Release is one stanza, of 150 KB in Debian
MAX_JSON_OBJECT = 64 * 1024  # bytes about one file in JSON; npm's have 1 KB
MAX_ENTRIES = 400_000  # files that one index names: Debian's Sources 130,000


_RawEntry = tuple[bytes, bytes, bytes]  # name, decimal size or b"", hexadecimal digest or b""
_PROJECT = re.compile(r"([^-]+(?:-(?!\d)[^-]*)*)-\d")  # the name in foo-bar-1.0.tar.gz


def index_places(key: str) -> Iterator[str]:
    """Yield the places of the indexes that may name a file.

    >>> list(index_places("http://a/x/Foo_Bar-1.0.tar.gz"))
    ['http://a/x/', 'http://a/x/simple/foo-bar/', 'http://a/', 'http://a/simple/foo-bar/']
    """
    folder, _, name = key.rpartition("/")
    project = _PROJECT.match(name) if name.endswith((".whl", ".tar.gz", ".zip")) else None
    while 2 < folder.count("/") + 1 < 100 and "?" not in key:
        yield folder + "/"
        if project:
            yield "%s/simple/%s/" % (folder, re.sub("[-_.]+", "-", project[1]).lower())
        folder = folder.rpartition("/")[0]


def name_below(base: str, key: str) -> bytes | None:
    """Return the name that an index with this base has for a URL; None if it can have none.

    >>> name_below("http://a/debian/", "http://a/debian/pool/g%2b%2b.deb")
    b'pool/g++.deb'
    """
    is_below = key.startswith(base) and "?" not in key
    return urllib.parse.unquote_to_bytes(key[len(base):]) if is_below else None


def _stanzas(chunks: Iterable[bytes], separator: bytes = b"\n\n") -> Iterator[bytes]:
    """Split a stream at each separator, with a newline before each stanza; leave out empty ones."""
    rest = b""
    for chunk in itertools.chain(filter(None, chunks), [separator]):
        *complete, rest = (rest + chunk).split(separator)
        if len(rest) > MAX_STANZA:
            raise DamagedIndexError("an entry is longer than %d bytes" % MAX_STANZA)
        yield from (b"\n" + stanza for stanza in complete if stanza)


_NEXT_FIELD = re.compile(rb"\n(?![ \t])")


def _field(stanza: bytes, name: bytes) -> bytes:
    """Return the value of the field that begins with ``name``, and its continuation lines; b"" if absent."""
    rest = stanza.partition(b"\n" + name)[2]
    return _NEXT_FIELD.split(rest, maxsplit=1)[0].strip(b" \t\r\n\0")  # NUL: a tar's padding


def _file_lines(stanza: bytes, name: bytes) -> Iterator[list[bytes]]:
    """Yield the lines ``digest size name`` of a field."""
    return (words for words in map(bytes.split, _field(stanza, name).splitlines()) if len(words) == 3)


def _parse_apt(chunks: Iterator[bytes], base: str, _key: str) -> Iterator[_RawEntry]:
    """Parse Packages or Sources (deb822).  In a flat repository, names may begin with the index's folder."""
    own = base.split("/")[-2].encode() + b"/"
    for stanza in _stanzas(chunks):
        directory = _field(stanza, b"Directory:") + b"/"
        for digest, size, name in _file_lines(stanza, b"Checksums-Sha256:"):
            yield directory + name, size, digest
        digest = _field(stanza, b"SHA256:") or _field(stanza, b"SHA512:")
        name = _field(stanza, b"Filename:").removeprefix(b"./").removeprefix(own)
        yield name, _field(stanza, b"Size:"), digest


def _parse_release(chunks: Iterator[bytes], _base: str, _key: str) -> Iterator[_RawEntry]:
    """Parse Release or InRelease: the Packages and Sources that it names, and their by-hash names."""
    for stanza in _stanzas(chunks):
        for algorithm in (b"SHA256", b"SHA512"):
            for digest, size, name in _file_lines(stanza, algorithm + b":"):
                if re.search(rb"(?:^|/)(?:Packages|Sources)(?:\.\w+)?$", name):
                    yield name[:name.rfind(b"/") + 1] + b"by-hash/%b/%b" % (algorithm, digest), size, digest
                    yield name, size, digest if algorithm == b"SHA256" else b""


_LOCATION = re.compile(rb"""<location\s+href=["']([^"'>]*)["']\s*/?>""")  # with xml:base it is elsewhere
_SIZE = re.compile(rb"""<size(?:\s[^>]{0,200}?\bpackage=["']|>)(\d+)""")
_CHECKSUM = re.compile(rb"<checksum\s[^>]{0,200}>\s*([0-9a-f]+)\s*<")


def _parse_rpm(chunks: Iterator[bytes], _base: str, key: str) -> Iterator[_RawEntry]:
    """Parse primary.xml or repomd.xml.

    Well-formed XML without ``<!`` has no entities of its own, and no text that looks like an element.  So it
    can be scanned, at a quarter of the cost of an XML parser.
    """
    for stanza in _stanzas(chunks, b"</data>" if key.endswith("/repomd.xml") else b"</package>"):
        if b"<!" in stanza:
            raise DamagedIndexError("its XML has a document type, a comment or CDATA")
        location, size, checksum = (pattern.search(stanza) for pattern in (_LOCATION, _SIZE, _CHECKSUM))
        if location:
            name = unescape(location[1].decode("utf-8", "replace")).encode("utf-8", "replace")
            yield name, size[1] if size else b"", checksum[1] if checksum else b""


def _tar_contents(chunks: Iterator[bytes], end: bytes) -> Iterator[bytes]:
    """Yield the contents, padded, of a tar's regular files whose names end so; a blank line before each.

    tarfile would keep every member in memory, and read a header of any length.
    """
    rest, blocks, wanted = b"", 0, False  # blocks: of the present file, still to come
    for chunk in chunks:
        rest, at = rest + chunk, 0
        while len(rest) - at >= 512:
            count = min(max(1, blocks), (len(rest) - at) // 512)
            block = rest[at:at + 512 * count]
            at += 512 * count
            if blocks:
                blocks -= count
                yield block if wanted else b""
            elif block.strip(b"\0"):  # not an end mark: apk's index is a tar behind another
                size = re.fullmatch(rb"[ \0]*([0-7]{1,12})[ \0]*", block[124:136])
                if block[257:262] != b"ustar" or not size:
                    raise DamagedIndexError("it is not a tar archive, or damaged")
                blocks = -(-int(size[1], 8) // 512)
                # Not a link, a folder or a longer header.
                wanted = block[156] in b"0\0" and block[:100].partition(b"\0")[0].endswith(end)
                yield b"\n\n"
        rest = rest[at:]
    if blocks:
        raise DamagedIndexError("the tar archive ends early")


def _parse_pacman(chunks: Iterator[bytes], _base: str, _key: str) -> Iterator[_RawEntry]:
    """Parse NAME.db or NAME.files, whose desc files begin with %FILENAME%."""
    mark = b"%FILENAME%\n"
    for stanza in _stanzas(_tar_contents(chunks, b"desc"), mark):
        name = stanza[1:].partition(b"\n")[0]
        yield name, _field(stanza, b"%CSIZE%\n"), _field(stanza, b"%SHA256SUM%\n")


def _parse_apk(chunks: Iterator[bytes], _base: str, _key: str) -> Iterator[_RawEntry]:
    """Parse APKINDEX.tar.gz.  Its checksums cover only a part of a file, so it tells only the size."""
    for stanza in _stanzas(_tar_contents(chunks, b"APKINDEX")):
        yield b"%b-%b.apk" % (_field(stanza, b"P:"), _field(stanza, b"V:")), _field(stanza, b"S:"), b""


_ANCHOR = re.compile(r"""\s[^>]*?\bhref\s*=\s*["']([^"'#]*)#?([^"']*)""")
_INTEGRITY = re.compile(r"\bsha(?:512|256)-([\w+/]+=*)")
# The beginning of an object about a file: the first alternative is npm's.  No string can contain it, because
# its quotes would be escaped.
_JSON_FILE = re.compile(r'(?:"dist"\s*:|"files"\s*:\s*\[|\}\s*,)\s*(?=\{\s*")')


def _html_links(chunks: Iterator[bytes]) -> Iterator[tuple[str, str, str]]:
    for stanza in _stanzas(chunks, b"<a"):
        if anchor := _ANCHOR.match(stanza[1:].decode("utf-8", "replace")):
            yield unescape(anchor[1]), "", anchor[2].rpartition("=")[2]


def _json_digest(item: dict[str, Any]) -> str:
    """Return the digest in an object about a file: PyPI's in hexadecimal, or npm's in Base64."""
    hashes, integrity = item.get("hashes"), _INTEGRITY.search(str(item.get("integrity")))
    if integrity:
        with contextlib.suppress(ValueError):
            return binascii.a2b_base64(integrity[1]).hex()
    return str(hashes.get("sha256", hashes.get("sha512"))) if isinstance(hashes, dict) else ""


def _json_links(chunks: Iterator[bytes]) -> Iterator[tuple[str, str, str]]:
    """Parse only the objects about files: a document may have 100 MB."""
    text = ""
    for chunk in itertools.chain(chunks, [b""]):
        text, at = text + chunk.decode("latin-1"), 0  # URLs and digests are ASCII
        found = _JSON_FILE.search(text)
        while found and (not chunk or len(text) - found.start() > MAX_JSON_OBJECT):
            try:
                item, at = json.JSONDecoder().raw_decode(text, found.end())
            except (ValueError, RecursionError):
                raise DamagedIndexError("its JSON is damaged, or an object in it is too long") from None
            yield str(item.get("tarball", item.get("url"))), str(item.get("size")), _json_digest(item)
            found = _JSON_FILE.search(text, at - 1)
        text = text[found.start() if found else max(0, at - 1, len(text) - 100):]


def _parse_page(chunks: Iterator[bytes], base: str, key: str) -> Iterator[_RawEntry]:
    """Parse PyPI's pages in HTML (PEP 503) and JSON (PEP 691), and npm's documents."""
    first = next(chunks, b"")
    parse_links = _json_links if first.lstrip()[:1] == b"{" else _html_links
    for link, size, digest in parse_links(itertools.chain([first], chunks)):
        with contextlib.suppress(ValueError):  # of urljoin
            yield name_below(base, urllib.parse.urljoin(key, link)) or b"", size.encode(), digest.encode()


# To add a format, add a line here, and a group to the pattern.
_PARSERS: dict[str, Callable[..., Iterator[_RawEntry]]] = {
    "release": _parse_release, "apt": _parse_apt, "repomd": _parse_rpm, "rpm": _parse_rpm,
    "pacman": _parse_pacman, "apk": _parse_apk, "pypi": _parse_page, "npm": _parse_page}
_INDEX_NAME = re.compile(  # with the folder in which it must be
    r"/(?:(?P<release>(?:In)?Release)|(?P<apt>(?:Packages|Sources)(?:\.\w+)?|by-hash/[^/]+/(?:[0-9a-f]{64}){1,2})"
    r"|(?P<repomd>repodata/repomd\.xml)|(?P<rpm>repodata/(?:[\w-]*-)?primary\.xml(?:\.(?:gz|xz|bz2|zst))?)"
    r"|(?P<pacman>[^/]+\.(?:db|files)(?:\.tar(?:\.\w+)?)?)|(?P<apk>APKINDEX\.tar\.gz))$")


def _page_type(key: str, content_type: str) -> tuple[str, str, str] | None:
    """Return what index_type() does, for a page of PyPI or a document of npm."""
    folder = key.removesuffix("index.html").rstrip("/")
    above, _, project = folder.rpartition("/")
    if folder != key and above.endswith(("/simple", "/+simple")):
        base = above.rpartition("/")[0] + "/"
        return "pypi", base, "%ssimple/%s/" % (base, project)
    base = key.replace("%2F", "/") + "/"  # an author wrote the document: it speaks for one package
    is_npm = (content_type in ("application/json", "application/vnd.npm.install-v1+json")
              and classify_name(key) is NameClass.OTHER)  # conda's repodata.json, for one, is an index
    return ("npm", base, base) if is_npm else None


def index_type(key: str, content_type: str = "") -> tuple[str, str, str] | None:
    """Return kind, base and place of an index; None if pkgproxy does not read the file.

    The base is the URL of the folder that the names in the index are relative to; an index says nothing about
    other URLs.  Tables are filed under a place: for a package, index_places() finds it.  Those whose place
    begins with "top " name other indexes, and so tell which of them are current.

    >>> index_type("http://a/debian/dists/sid/main/binary-amd64/Packages.xz")
    ('apt', 'http://a/debian/', 'http://a/debian/')
    """
    key = key.partition("#")[0]  # each form of a page tells the same
    if "?" in key or len(key) > MAX_CLASSIFIED_PATH:
        return None
    found = _INDEX_NAME.search(key, key.find("/", len("https://")))
    if found is None:
        return _page_type(key, content_type)
    dists = key.find("/dists/", found.pos) if found.lastgroup == "apt" else -1
    base = key[:(dists if dists >= 0 else found.start()) + 1]
    return str(found.lastgroup), base, "top " * (found.lastgroup in ("release", "repomd")) + base


_NOT_BELOW = re.compile(rb"(?<![^/])\.\.(?![^/])|[\0-\x1f\x7f]|^/|/$|^$")


def parse_index(kind: str, chunks: Iterator[bytes], base: str, key: str) -> Iterator[tuple[bytes, FileFacts]]:
    """Yield what a decompressed index says about each file that it names, with the name below its base.

    Names that lead out of the base are left out.  Raises DamagedIndexError.
    """
    for count, (name, size, digest) in enumerate(_PARSERS[kind](chunks, base, key)):
        if count == MAX_ENTRIES:
            raise DamagedIndexError("it has more than %d entries" % MAX_ENTRIES)
        name = re.sub(rb"(?<![^/])(?:\./)+", b"", name) if b"./" in name else name
        known = int(size) if size.isdigit() and len(size) < 15 else None
        algorithm = "sha%d" % (4 * len(digest)) if re.fullmatch(rb"(?:[0-9a-fA-F]{64}){1,2}", digest) else ""
        if len(name) < 4096 and not _NOT_BELOW.search(name) and (algorithm or known is not None):
            yield name, FileFacts(known, algorithm, binascii.unhexlify(digest[:64]) if algorithm else b"")


def why_unexpected(expected: Iterable[FileFacts], size: int | None, digest: Callable[[str], str]) -> str:
    """Return how a body contradicts all that is known about it; "" if it does not, or if nothing is known.

    ``size`` is None if it is not known yet.  ``digest`` returns the hexadecimal digest by an algorithm of
    hashlib, or "" if that is not known.

    >>> why_unexpected([FileFacts(3, "", b"")], 4, str)
    'it has 4 bytes, and its index says 3'
    """
    reason = ""
    for facts in expected:
        if size is not None and facts.size not in (None, size):
            reason = "it has %d bytes, and its index says %d" % (size, facts.size or 0)
            continue
        found, named = digest(facts.algorithm) if facts.algorithm else "", facts.digest.hex()
        if not found or found[:64] == named:
            return ""
        reason = "its %s is %s..., and its index or name says %s..." % (
            facts.algorithm, found[:16], named[:16])
    return reason


# ---------------------------------------------------------------------------------------------
# 4 Access rules: pure functions
# ---------------------------------------------------------------------------------------------

# Which clients may use the proxy ----------------------------------------------------------------

NETWORKS = {
    "loopback": ("127.0.0.0/8", "::1/128"),
    # RFC 1918; RFC 6598 (carrier-grade NAT, also VPNs); RFC 3927; for IPv6 RFC 4193 and link-local
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16",
                "fc00::/7", "fe80::/10"),
    "lan": (),  # the networks of this host's interfaces, which are in Config.lan
    "all": ("0.0.0.0/0", "::/0"),
    "none": (),  # as the first --allow: the defaults do not apply
}


def parse_networks(names: Iterable[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return the networks that names of NETWORKS and CIDR texts stand for; raise ValueError with advice."""
    try:
        networks = [ipaddress.ip_network(text) for name in names for text in NETWORKS.get(name, (name,))]
    except ValueError as error:
        raise ValueError("%s; write %s or 203.0.113.0/24" % (error, ", ".join(NETWORKS))) from None
    # IPv4-mapped networks become IPv4, as the clients' addresses do.
    return [ipaddress.ip_network((int(each[0]) & 0xFFFFFFFF, each.prefixlen - 96))
            if each.prefixlen >= 96 and getattr(each[0], "ipv4_mapped", None) else each for each in networks]


def lan_networks(interfaces: Iterable[str]) -> tuple[str, ...]:
    """Return the networks of interfaces, given as ADDRESS/PREFIX, apart from loopback and private ones.

    A network that is wider than any home's or company's is a VPN's, and leads to the whole internet.

    >>> lan_networks(["2001:db8::1/64", "192.168.0.1/24", "10.0.0.1/0"])
    ('2001:db8::/64',)
    """
    known = parse_networks(("loopback", "private"))
    found = {ipaddress.ip_interface(text).network for text in interfaces}
    return tuple(sorted(str(network) for network in found
                        if network.prefixlen >= (16 if network.version == 4 else 48)
                        and not any(network.network_address in other for other in known)))


def not_allowed_error(address: str) -> ProxyError:
    """Return the error for a client that is not allowed, with the option that lets it in.

    For IPv6 that is an option for its network, because a host changes its address within it.

    >>> str(not_allowed_error("2001:db8::9"))
    '2001:db8::9 may not use this proxy: its operator can add --allow 2001:db8::/64.'
    """
    text = address.partition("%")[0]
    network = ipaddress.ip_network((text, 64), strict=False) if ":" in text else text
    return ProxyError("%s may not use this proxy: its operator can add --allow %s." % (address, network), 403)


def unmap_ipv4(text: str) -> str:
    """Return an IPv4-mapped address as IPv4: a dual-stack socket reports 10.0.0.1 as ::ffff:10.0.0.1."""
    return text[len("::ffff:"):] if text.startswith("::ffff:") and "." in text else text


def client_network(address: str) -> str:
    """Return what counts as one client in limits: an IPv4 address, or the /64 network of an IPv6 address.

    One host can use all addresses of its /64 network.

    >>> client_network("10.0.0.1"), client_network("2001:db8::1%eth0") == client_network("2001:db8::ff:1")
    ('10.0.0.1', True)
    """
    text = address.partition("%")[0]
    return ipaddress.IPv6Address(text).packed[:8].hex() if ":" in text else text


@functools.lru_cache(LARGE_MEMO)  # needed for each request, and takes 45 µs
def is_client_allowed(address: str, allow: Iterable[str]) -> bool:
    """Return whether a client's address is in the allowed networks.

    >>> [is_client_allowed(a, ("private",)) for a in ("::ffff:10.0.0.1", "fe80::1%eth0", "8.8.8.8")]
    [True, True, False]
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip  # also in hexadecimal, which unmap_ipv4() leaves alone
    return any(ip in network for network in parse_networks(allow))


# Which origins are protected from clients on other hosts ----------------------------------------

# Addresses of this host and its link, and of clouds' metadata services, which give a machine's secrets to
# anything that connects from it.
_PROTECTED = tuple(map(ipaddress.ip_network, (
    "127.0.0.0/8", "::1", "0.0.0.0/8", "::",  # loopback; this network (RFC 1122 §3.2.1.3), unspecified
    "169.254.0.0/16", "fe80::/10", "fec0::/10",  # link-local, site-local
    "224.0.0.0/4", "ff00::/8", "255.255.255.255",  # multicast, broadcast
    "168.63.129.16", "100.100.100.200", "fd00:100::100:200", "192.0.0.192",  # Azure, Alibaba, Alibaba, Oracle
    "fd00:ec2::/32", "fd20:ce::254", "fd00:c1::a9fe:a9fe",  # AWS (all local services), Google, Oracle
    "fd00:42::42", "fd00:a9fe:a9fe::1")))  # Scaleway, Akamai
# IPv6 addresses that contain an IPv4 address, and by how many bits it is shifted to the left: mapped and
# compatible (RFC 4291 §2.5.5), translated (RFC 7915), NAT64 (RFC 6052, 8215), 6to4 (RFC 3056).
_EMBEDDED = tuple((ipaddress.IPv6Network(network), shift) for network, shift in (
    ("::ffff:0:0/96", 0), ("::/96", 0), ("::ffff:0:0:0/96", 0), ("64:ff9b::/96", 0), ("64:ff9b:1::/48", 0),
    ("2002::/16", 80)))


def is_protected_address(address: str) -> bool:
    """Return whether only clients on this host may reach an address: one of this host or its link.

    An address that is embedded in an IPv6 address counts as well.

    >>> [is_protected_address(a) for a in ("127.9.9.9", "::ffff:169.254.1.1", "2002:7f00:1::", "10.0.0.1")]
    [True, True, True, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = [ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF) for network, shift in _EMBEDDED
             if ip in network]
    inner += getattr(ip, "teredo", None) or ()  # server and client (RFC 4380)
    return any(ip in network for network in _PROTECTED) or any(
        is_protected_address(str(other)) for other in inner)


def is_numeric_host(host: str) -> bool:
    """Return whether a host is an address in any form that C's inet_aton() accepts: 127.1, 0x7f000001."""
    return ":" in host or re.search(r"(?:^|\.)(?:\d+|0x[0-9a-f]*)\.?$", host) is not None


def is_protected_host(host: str) -> bool:
    """Return whether a host is protected, whatever DNS says: by address, or as localhost (RFC 6761 §6.3)."""
    if is_address(host):
        return is_protected_address(host)
    name = host.rstrip(".")
    return name == "localhost" or name.endswith(".localhost")


# Which origins may be reached at all -------------------------------------------------------------


def parse_origins(text: str) -> tuple[list[str], list[str]]:
    """Parse a file of origins: an address, a host name or ``*.example.org`` a line; # begins a comment.

    Returns the origins and, like parse_filters(), errors: none, because one invalid line makes all invalid.
    Raises ValueError.  ``*.example.org`` stands for all names below example.org, but not for itself.
    """
    lines = [line.partition("#")[0].strip().lower() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if line and not is_address(line) and not re.fullmatch(r"(\*\.)?[\w-]+(\.[\w-]+)*\.?", line, re.A):
            raise ValueError("line %d is not a host name; write deb.example.org or *.example.org, "
                             "without port; non-ASCII names as xn--" % number)
    if not any(lines):  # a file that was just being written, say
        raise ValueError("it has no line with a host name")
    return [line.rstrip(".") for line in lines if line], []


def check_target_allowed(target: Target, client_is_local: bool, origins: tuple[str, ...] | None) -> None:
    """Raise ProxyError if a client may not reach the target of its request, or of a redirect.

    Only names are checked here.  Addresses are checked as they are connected to, by AddressPolicy.
    """
    if not client_is_local and is_protected_host(target.host):
        raise ProxyError("Only the proxy's own host may reach %s through it." % target.host, 403)
    host = target.host.rstrip(".")
    if origins is not None and not any(
            host == origin or origin.startswith("*") and host.endswith(origin[1:]) for origin in origins):
        raise ProxyError("%s is not an allowed origin; the operator can add it to --origins." % host, 403)


def may_share_download(request: Request, head: ResponseHead) -> bool:
    """Return whether a request's client may have what is being downloaded for another client.

    The key is the same.  What may differ is where the clients are, and the fields that Vary names: then the
    follower asks the origin for itself.  Requests with Authorization never get here (see SharedFetch).
    """
    allowed = request.client_is_local or not head.local_clients_only
    return allowed and selecting_fields(request, head) == head.vary


# Which names the proxy answers to ---------------------------------------------------------------


def parse_host_name(text: str) -> str:
    """Return a host name in lower case, without a final dot; raise ValueError.

    >>> parse_host_name("Proxy.example.org.")
    'proxy.example.org'
    """
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text, re.A):
        raise ValueError("'%s' is not a host name; write proxy.example.org" % text)
    return text.lower().rstrip(".")


def called_name(request: Request) -> str:
    """Return the name under which a browser knows this proxy; "" if the name does not matter.

    It matters for the proxy's own pages and for targets behind a prefix, which a browser treats as content
    of that name: see is_own_name().  It does not for wpad.dat, which is requested from the wpad host of any
    domain and contains only that name.  A client without Host is not a browser.
    """
    is_wpad = request.is_own_page and request.uri.startswith("/wpad.dat")
    if is_wpad or not (request.is_own_page or request.client_prefix):
        return ""
    return split_authority(field_value(request.fields, "Host") or "localhost", 80)[0]


def is_own_name(name: str, names: tuple[str, ...]) -> bool:
    """Return whether a name is certainly this proxy's, or one of ``names``.

    This prevents DNS rebinding: a web page of evil.example could read what the proxy answers to
    evil.example, if its name servers then return the proxy's address.  The attack needs a name in the public
    DNS, so an address is safe, and a name without a dot (docker's, or from a search domain) or below a
    private domain.

    >>> [is_own_name(n, ("a.example",)) for n in ("10.0.0.1", "proxy", "a.example", "evil.example")]
    [True, True, True, False]
    """
    private = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
    return "." not in name or is_numeric_host(name) or name.endswith(private) or name in names


# Which parent proxy leads to an origin ----------------------------------------------------------


def _matches_no_proxy(target: Target, entry: str) -> bool:
    """Return whether an entry of no_proxy covers a target.

    An entry is an address, a network, or a domain with all below it, each also with :port; or * for all.
    """
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(entry, strict=False)
        return is_address(target.host) and ipaddress.ip_address(target.host) in network
    name, port = re.fullmatch(r"\[?(.*?)\]?(?::(\d+))?", entry, re.S).groups()  # type: ignore[union-attr]
    domain = "." + name.removeprefix("*.").removeprefix(".")
    covers = name in ("*", target.host) or target.host.endswith(domain)
    return covers and (not port or int(port) == target.port)


def parent_proxy_for(target: Target, config: Config) -> ParentProxy | None:
    """Return the parent proxy for a target; None: connect directly.

    This host and its link are always reached directly, and the origins in no_proxy.
    """
    parent = dict(config.parents).get(target.scheme)
    is_direct = parent is None or is_protected_host(target.host) or any(
        _matches_no_proxy(target, entry) for entry in config.no_proxy if entry)
    return None if is_direct else parent


# ---------------------------------------------------------------------------------------------
# 5 Store
# ---------------------------------------------------------------------------------------------
#
# Files below the cache root:
#
#   HOST/PATH                          a complete body (invariant 1), under its natural or hashed name
#   .pkgproxy/heads/HOST/PATH^head     its head, in a JSON list; while a body is replaced, the old head too
#   .pkgproxy/partials/SHA256[.OWNER]  a download in progress, or the rest of an interrupted one
#   .pkgproxy/partials/...^head        its metadata: only if another process may need it
#   .pkgproxy/names/, adopted/         NameIndex: stored files with a digest in their name; packages to adopt
#   ...^RANDOM                         a temporary file, before it is renamed

METADATA_FOLDER = ".pkgproxy"
# O_NONBLOCK: opening a FIFO must not block.  O_NOFOLLOW: bodies are never symbolic links, which could lead
# out of the root.
_REGULAR = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_WRITABLE = os.O_RDWR | _REGULAR
# Errors by which a file system says that it cannot have a file of this name.
_NAME_REFUSED = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
# Errors that reading a damaged JSON file may raise.
_DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_NO_STAT = os.stat_result((0,) * 10)
MIN_RESUMABLE_SIZE = 256 * 1024  # bytes: a smaller download is restarted instead of resumed
FLUSH_INTERVAL = 0.5  # seconds between two flushes of a partial file that other machines may read
_REMOTE = ("nfs", "cifs", "smb", "ceph", "fuse.", "9p", "virtiofs", "lustre", "glusterfs", "afs")
_MAX_NAMES = 1024 * 1024  # bytes in one bucket of a NameIndex: 10,000 names, 2 million in 256 buckets
COUNT_STEP = 128 * 1024 * 1024  # bytes, or 1 % of --max-size if more, that land until all files are counted
_MAX_METADATA = 2 * _MAX_NAMES  # bytes; no bucket is larger, nor are two heads with every byte escaped
# Names that version 1.0 used in head files, and today's; None: no longer stored.
_NAMES_IN_1_0: dict[str, str | None] = {
    "final": "final_uri", "requested": "request_time", "received": "response_time",
    "guarded": "local_clients_only", "like": "same_as", "boot": None, "flushed": None}


@dataclasses.dataclass(frozen=True)
class StoredResponse:
    """A stored response: an open body, and the head that describes exactly this body.

    The owner closes it.  The open file stays readable when the body is replaced or evicted.
    """

    file: io.FileIO
    head: ResponseHead  # its size and mtime_ns are those of the open file
    name: str  # path below the root; "": an adopted file
    described: bool  # False: without a head file, so that the head was made from the file itself

    def fileno(self) -> int:
        """Return the body's descriptor."""
        return self.file.fileno()

    def read_at(self, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``.  Raises OSError."""
        if hasattr(os, "pread"):  # connections that get one hit of the HotCache share the file's position
            return os.pread(self.fileno(), size, offset)
        self.file.seek(offset)
        return self.file.read(size) or b""

    def close(self) -> None:
        """Close the body."""
        self.file.close()


def _close(stored: StoredResponse | None) -> None:
    if stored is not None:
        stored.close()


# Temporary names have a random part for each process and a number for each file: no system call for a name.
_PROCESS_ID, _file_numbers = secrets.token_hex(8), itertools.count()


def _temporary_name(path: str) -> str:
    """Return a name beside ``path`` that no other thread or process uses."""
    return "%s^%s%x" % (path, _PROCESS_ID, next(_file_numbers))


def _unlink(path: str) -> None:
    """Remove a file if it exists and can be removed.  Windows removes no open file."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``.  Raises OSError."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining):]


def make_directory(path: str) -> None:
    """Create a folder and its missing parents, writable for this user only.  Raises OSError.

    os.makedirs() would give the parents the umask's mode.
    """
    if not os.path.isdir(path) and os.path.dirname(path) != path:  # a missing drive is its own parent
        make_directory(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another thread made it, or it is a file
            os.mkdir(path, 0o755)


def create_in_folder(path: str, create: Callable[[], _T]) -> _T:
    """Call ``create``, which gives a file the name ``path``, and make the folder if necessary; OSError.

    That the folder is missing is found out by trying: mostly it exists, and looking costs a system call.  A
    new folder may be removed before the file is in it, by eviction or "rm -rf" for example.
    """
    for _ in range(2):
        with contextlib.suppress(FileNotFoundError):
            return create()
        with contextlib.suppress(FileNotFoundError):
            make_directory(os.path.dirname(path))
    return create()


def create_file(path: str, flags: int) -> int:
    """Return the descriptor of a file that is open for writing, and created if necessary.  Raises OSError."""
    return create_in_folder(path, lambda: os.open(path, flags | _WRITABLE | os.O_CREAT, 0o644))


def store_bytes(path: str, data: bytes, flags: int) -> None:
    """Write ``data`` to a file opened with ``flags``.  Raises OSError."""
    with io.FileIO(create_file(path, flags), "r+b") as file:
        write_all(file.fileno(), data)


def replace_file(path: str, data: str | bytes) -> None:
    """Write a file under a temporary name and rename it to ``path``, creating its folder.

    Readers see the old or the new content, never a mixture.  Raises OSError.
    """
    temporary = _temporary_name(path)
    try:
        store_bytes(temporary, data.encode() if isinstance(data, str) else data, os.O_TRUNC)
        os.replace(temporary, path)
    except OSError:
        _unlink(temporary)
        raise


def _open(path: str) -> tuple[io.FileIO | None, os.stat_result]:
    """Open a regular file; return it with its status, or (None, _NO_STAT) if there is none of this name."""
    try:
        descriptor = os.open(path, _REGULAR)
    except (OSError, ValueError):
        return None, _NO_STAT
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode):
        return io.FileIO(descriptor, "rb"), info
    os.close(descriptor)
    return None, _NO_STAT


def try_lock_file(file: io.FileIO) -> bool:
    """Lock a file against other processes until it is closed (invariant 2).

    Returns False if another process holds the lock.  Raises OSError if the file system has no locks.
    """
    if fcntl is not None:
        try:
            # flock, because a lock by lockf is lost as soon as any descriptor of the file is closed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def why_locks_fail(folder: str) -> str:
    """Return why files in a folder cannot be locked against other processes; "" if they can.

    Also "" if nothing can be written there: then nothing has to be locked either.
    """
    path, reason = _temporary_name(os.path.join(folder, "lock")), ""
    with contextlib.suppress(OSError):
        make_directory(folder)
        with io.FileIO(path, "x+b") as first, io.FileIO(path, "r+b") as second:
            os.unlink(path)
            try:
                both = try_lock_file(first) and try_lock_file(second)
                reason = "its file system ignores locks" if both else ""
            except OSError as error:
                reason = "its file system refuses locks (%s)" % error.strerror
        os.rmdir(folder)  # fails if the folder is in use
    return reason if fcntl is not None else "this system has no flock"


def is_remote(path: str) -> bool:
    """Check whether a folder is on a file system that other machines may write too (Linux only)."""
    with contextlib.suppress(OSError, IndexError), open("/proc/self/mountinfo", encoding="utf-8",
                                                        errors="replace") as file:
        device = os.stat(path).st_dev
        name = "%d:%d" % (os.major(device), os.minor(device))
        types = [line.rpartition(" - ")[2].split()[0] for line in file if line.split()[2] == name]
        return types[-1].startswith(_REMOTE)
    return False


def boot_id() -> str:
    """Return an identifier of this boot of the machine, without hyphens.

    The kernel's file comes first.  The systemd unit hides it and passes the same value as %b.  If neither
    exists, the identifier is this process's own, so that no data of an earlier process is trusted.
    """
    known = os.environ.get("PKGPROXY_BOOT_ID", "")
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        known = file.read()
    return known.strip().replace("-", "").lower() or secrets.token_hex(16)


def _head_from(row: dict[Any, Any]) -> ResponseHead:
    """Build a head from its JSON object, in today's or version 1.0's names.

    Raises ValueError, TypeError or KeyError if the object is damaged.
    """
    row = {new: value for name, value in row.items() if (new := _NAMES_IN_1_0.get(name, name))}
    for name in ("fields", "vary"):
        row[name] = parse_fields(["%s: %s" % (field, text) for field, text in row[name]])
    head = ResponseHead(**row)
    texts = (head.reason, head.key, head.final_uri, head.same_as, head.sha256)
    numbers = (head.request_time, head.response_time, head.size, head.mtime_ns)
    if not (head.status == 200 and all(isinstance(text, str) and not _CONTROL.search(text) for text in texts)
            and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)):
        raise ValueError("a damaged head")
    return head


def read_metadata(path: str) -> bytes:
    """Return the content of a file that pkgproxy keeps for itself.  Raises OSError."""
    with open(path, "rb", opener=lambda path, _flags: os.open(path, _REGULAR)) as file:
        return file.read(min(os.fstat(file.fileno()).st_size, _MAX_METADATA))


@functools.lru_cache(LARGE_MEMO)
def _parsed_heads(path: str, *_identity: int) -> tuple[ResponseHead, ...]:
    """Return the heads in a head file.  A head file is only ever replaced, so that inode, size and times
    identify its content."""
    return tuple(_head_from(row) for row in json.loads(read_metadata(path)))


def _read_heads(path: str) -> tuple[ResponseHead, ...]:
    """Return the heads in a head file; none if it is missing, damaged, or not a regular file."""
    try:
        info = os.stat(path)
        read = _parsed_heads if info.st_size <= MAX_MEMOIZED_HEAD else _parsed_heads.__wrapped__
        return read(path, info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size)
    except _DAMAGED:
        return ()


def _write_heads(path: str, heads: list[ResponseHead]) -> None:
    rows = [{name: value for name, value in vars(head).items()  # earlier versions do not know is_page
             if name != "verified" and (value or name != "is_page")} for head in heads]
    replace_file(path, json.dumps(rows, ensure_ascii=False))


def _matching_head(heads: Iterable[ResponseHead], key: str | None,
                   info: os.stat_result) -> ResponseHead | None:
    """Return the head that describes a body (of this key; None: of any), with the file's time.

    None if the body has another size than any head says: it is foreign (invariant 11).  The file's time tells
    bodies of one size apart:

    - It is the head's: the body is the one that was stored.
    - It is the head's without the fraction of the second: a copy has lost that (rsync, tar).
    - It is any other: a copy has lost it (``cp -r``, ``scp -r``).  The head is returned as not verified.
    - If only the fraction differs and the head has no digest by which to verify that, it is another body.
    """
    fitting = (head for head in heads if head.size == info.st_size and key in (None, head.key))
    head = min(fitting, key=lambda head: abs(head.mtime_ns - info.st_mtime_ns), default=None)
    if head is None or head.mtime_ns == info.st_mtime_ns:
        return head
    same_second = head.mtime_ns // 10**9 == info.st_mtime_ns // 10**9
    truncated = info.st_mtime_ns % 10**9 == 0
    if same_second and not truncated and not head.sha256:
        return None
    return replace_fields(head, mtime_ns=info.st_mtime_ns, verified=same_second and truncated)


def _bare_head(key: str, info: os.stat_result, first: bytes = b"") -> ResponseHead:
    """Make a head for a body that has none, from its file's status, and from its first byte: pip accepts a
    page of the right type only, an HTML page may replace only another one, and an index may be gzipped."""
    (page, mark, form), modified = key.partition("#"), info.st_mtime
    kind = re.split("[,;]", FORMS[mark + form])[0] if mark else "application/octet-stream"
    kind = "text/html" if first == b"<" and can_be_page(page) else kind
    fields: Fields = (("Content-Type", kind), ("Last-Modified", formatdate(modified, usegmt=True)))
    if first == b"\x1f" and has_coded_form(key):
        fields += (("Content-Encoding", "gzip"),)
    return ResponseHead(200, "OK", fields, key, key, (), modified, modified, info.st_size, info.st_mtime_ns,
                        verified=False)


def _has_exact_name(root: str, name: str) -> bool:
    """Check whether a file has exactly this name below the root.

    File systems that ignore case, or know short names, open other files too.  A head would tell them apart;
    this check is for bodies without one.
    """
    parts = name.split("/")
    with contextlib.suppress(OSError):
        return all(part in os.listdir("/".join((root, *parts[:depth]))) for depth, part in enumerate(parts))
    return False


def size_on_disk(info: os.stat_result) -> int:
    """Return the bytes that a file takes: its blocks, or its size if they are allocated later."""
    return max(info.st_size, getattr(info, "st_blocks", 0) * 512)


def inodes_for(key: str) -> int:
    """Return the most inodes that storing a response may take: two files and all their folders."""
    return 2 * key.count("/") + 4 if key else 0


def head_size(head: ResponseHead) -> int:
    """Estimate the bytes that a head file takes, and the folders of a key that is deeper than most."""
    fields = sum(len(name) + len(text) for name, text in head.fields)
    return fields + BLOCK * max(2, inodes_for(head.key) - 24)


def hash_body(algorithm: str, body: RandomAccessFile) -> Any:
    """Return the hash of a body.  Raises OSError."""
    found, offset = hashlib.new(algorithm), 0
    while data := body.read_at(COPY_SIZE, offset):
        found.update(data)
        offset += len(data)
    return found


class RefCountedFile:
    """An open file with one writer and any number of readers; the last of them closes it.

    Who closes: the writer opens the file and counts as its first user.  A reader calls acquire() before it
    uses the file; that fails if the last user has left meanwhile, and the reader looks into the store.  Each
    user calls release() once, in any order: a slow reader may keep the file open long after the writer.
    """

    def __init__(self, path: str, file: io.FileIO) -> None:
        self.path = path
        self._file = file
        self._lock = threading.Lock()  # guards _refcount
        self._refcount = 1  # the writer and the readers

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def read_at(self, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``; the writer's position stays.  Raises OSError."""
        if hasattr(os, "pread"):
            return os.pread(self.fileno(), size, offset)
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def still_exists(self) -> bool:
        """Check whether the file's name still leads to the open file.  Raises OSError."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fileno()))
        except FileNotFoundError:
            return False

    def reader_count(self) -> int:
        """Return the number of users besides the writer."""
        return max(0, self._refcount - 1)

    def acquire(self) -> bool:
        """Add a user.  Returns False if the file is closed already."""
        with self._lock:
            self._refcount += 1 if self._refcount else 0
            return self._refcount > 0

    def release(self) -> None:
        """Remove a user; the last one closes the file."""
        with self._lock:
            self._refcount -= 1
            if not self._refcount:
                self._file.close()


class PartialFile(RefCountedFile):
    """A download in progress (an incomplete response, RFC 9111 §3.3): one writer, any number of readers.

    The writer calls start() and write(), and at the end exactly one of commit(), keep_for_resume() and
    discard().  Readers may read on after that, until they release() it.

    Who may write: if ``owner`` is "", the holder of the file's lock.  Otherwise the instance that a lease
    named ``owner``, which is the only one to use the file ``SHA256.owner``.

    Two instances, one key, with locks:

    1. A locks the file, writes, and calls publish().  B cannot lock it, and opens it for reading.
    2. B loads the metadata, and follows the file's size (refresh_size).
    3. If A commits, the file has its place in the store: B finds it there (is_stored_as).
    4. If A dies, the kernel releases its lock: B locks the file (try_lock) and resumes the download in it.

    With leases, A's file is its own.  If A's lease lapses, B copies the bytes into a file of its own, because
    A may only have been suspended, and lets its readers switch to that (switch_to).

    The metadata, in a head file beside the partial file, are for other instances and for resuming.  After a
    power failure a file may be longer than the part of it that is on the disk, filled up with zeros.  So the
    bytes of a partial file are trusted up to its present size only while the boot lasts in which they were
    written; otherwise up to ``flushed_size``.

    ======================  ==============  ============  ===================
    the writer              writer_boot_id  flushed_size  readable bytes
    ======================  ==============  ============  ===================
    writes, on this boot    this boot       any           the file's size
    crashed, or is remote   another boot    0             none
    writes, remote disk     another boot    a number      flushed_size
    left the file           ""              a number      flushed_size
    ======================  ==============  ============  ===================
    """

    def __init__(self, store: Store, key: str, owner: str, path: str, descriptor: int) -> None:
        super().__init__(path, io.FileIO(descriptor, "r+b"))
        self.head = ResponseHead(0, "", (), key)  # of the response as it will be stored, or of a leftover
        self.length: int | None = None  # declared bytes of the body; None: unknown
        self.owner = owner
        self.size = 0  # bytes written; of a leftover or another instance's file, bytes that may be read
        self._hash: Any = None  # SHA-256 of the bytes written; None: of a leftover, not yet computed
        self._store = store
        self._writer_boot_id = store.boot  # of another instance that writes the file, as in its metadata
        self._published_at = 0.0  # monotonic time of the last publish()
        self._granted_size = 0  # size up to which Space has granted disk space

    def start(self, head: ResponseHead, length: int | None, offset: int = 0) -> None:
        """Start writing a response of ``length`` bytes (None: unknown), or resume at ``offset``.

        Raises StorageError.
        """
        self.head, self.length, self.size = head, length, offset
        try:
            self._granted_size = self._store.space.reserve(self, 1 if length is None else length - offset)
            found = os.fstat(self.fileno()).st_size
            if found < offset:
                raise OSError(errno.ESTALE, "the partial file was truncated")
            if not offset:
                self._remove_metadata()
                if found and not self.owner:
                    self._replace_file()
            if found:
                self._file.truncate(offset)
                self._file.seek(offset)
            self._hash = None if offset else hashlib.sha256()
        except OSError as error:
            self._store.space.release(self)
            raise StorageError(error) from error

    def _replace_file(self) -> None:
        """Continue in a new file, so that readers of the leftover keep its bytes.

        The new file is locked before it gets the name: no other instance can lock it in between.
        """
        if not self.still_exists():
            raise OSError(errno.ESTALE, "the partial file was removed")
        temporary = _temporary_name(self.path)
        file = io.FileIO(os.open(temporary, _WRITABLE | os.O_CREAT | os.O_EXCL, 0o644), "r+b")
        try:
            try_lock_file(file)
            self._file.close()
            os.replace(temporary, self.path)
        finally:
            self._file = file

    def write(self, data: bytes) -> None:
        """Append all of ``data``.  Raises OSError (disk full ...)."""
        if self.size + len(data) > self._granted_size:
            self._granted_size = self._store.space.reserve(self, len(data))
        if self._hash is None:  # not in start(): nobody waits here, because readers have the leftover's bytes
            self._hash = hash_body("sha256", self)
        write_all(self.fileno(), data)
        self._hash.update(data)
        self.size += len(data)

    def sha256(self) -> str:
        """Return the digest of the bytes written.  Raises OSError."""
        return str((self._hash or hash_body("sha256", self)).hexdigest())

    def publish(self) -> None:
        """Let other instances read the bytes written so far, unless that fails.

        On this machine the metadata is written once: other instances then see the file grow.  Other machines
        may see later blocks before earlier ones, so there the bytes are flushed before they are published.
        """
        now = time.monotonic()
        if not self._published_at or self._store.remote and now - self._published_at > FLUSH_INTERVAL:
            self._published_at = now
            with contextlib.suppress(OSError):
                if self._store.remote:
                    os.fsync(self.fileno())
                self._write_metadata(self._store.boot)

    def commit(self) -> None:
        """Flush the body to the disk and store it under its key (invariant 1).  Raises StorageError.

        The body gets its place by renaming the partial file, so other instances find one or the other.  An
        instance that must not let this body be stored (an unsafe request has made it invalid) first unlinks
        the partial file and then deletes the stored response: either there is nothing left to rename, or the
        rename came first, and the response is deleted.
        """
        try:
            os.fsync(self.fileno())
            self._remove_metadata()
            self._store.commit(self)
        except OSError as error:
            self.discard()
            raise StorageError(error) from error
        self.unlock()

    def keep_for_resume(self) -> None:
        """Leave the file for a later request to resume, if a strong validator identifies the response."""
        large = self.size >= MIN_RESUMABLE_SIZE
        with contextlib.suppress(OSError):
            if (large and resume_validator(self.head) is not None and self.still_exists()
                    and os.fstat(self.fileno()).st_size == self.size):  # else another process has written it
                os.fsync(self.fileno())
                self._write_metadata("")
                self.unlock()
                return
        self.discard(cut=large)

    def discard(self, cut: bool = False) -> None:
        """Remove the file.  Its readers read on.

        With ``cut`` the file is emptied too, so that slow readers do not hold its disk space: they fetch the
        remainder from the origin.
        """
        self._store.space.release(self, kept=False)
        self._published_at = math.inf
        with contextlib.suppress(OSError, ValueError):
            if cut:
                self._file.truncate(0)
            if self.still_exists():
                self._remove_metadata()
                os.unlink(self.path)
        self.unlock()

    def unlock(self) -> None:
        """Let other instances write the file, even if readers here still have it open."""
        self._store.space.release(self)
        if fcntl is not None and not self.owner:
            with contextlib.suppress(OSError, ValueError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # Methods for following another instance's download

    def try_lock(self) -> bool:
        """Become the file's only writer if no other process is.  Raises OSError."""
        return try_lock_file(self._file)

    def load_metadata(self) -> bool:
        """Read the metadata that another instance has published.

        Returns False if there is none yet, or it is damaged or of version 1.0: then the download starts anew.
        """
        with contextlib.suppress(*_DAMAGED):
            if self._store.remote:  # opening the file makes an NFS client ask the server for its present size
                os.close(os.open(self.path, _REGULAR))
            info = os.fstat(self.fileno())
            row = json.loads(read_metadata(self.path + "^head")) if info.st_size else {}
            head, length, flushed_size = _head_from(row["head"]), row["length"], row["flushed_size"] or 0
            valid = all(isinstance(size, int) and size >= 0 for size in (length or 0, flushed_size))
            # A new, empty file may have the inode number of a removed one whose metadata is left.
            matches = (head.key, row["inode"]) == (self.head.key, info.st_ino)
            if valid and matches and self.still_exists():
                self.head, self.length = head, length
                self._writer_boot_id = row["writer_boot_id"]
                is_local = self._writer_boot_id == self._store.boot
                self.size = info.st_size if is_local else min(info.st_size, flushed_size)
                return True
        return False

    def refresh_size(self) -> None:
        """Update ``size`` to the bytes that the other instance has written by now.  Raises OSError."""
        if self._writer_boot_id == self._store.boot:
            self.size = os.fstat(self.fileno()).st_size
        else:
            self.load_metadata()

    def switch_to(self, other: PartialFile | StoredResponse) -> None:
        """Let this file's readers continue in another file with the same bytes.  Raises OSError.

        dup2() exchanges the file under the descriptor, which the readers keep using.
        """
        os.dup2(other.fileno(), self.fileno(), inheritable=False)
        if isinstance(other, PartialFile):
            self.path, self.owner, self.size = other.path, other.owner, other.size
            self._writer_boot_id = other._writer_boot_id
            other.release()
        else:
            self.size = other.head.size

    def is_abandoned(self) -> bool:
        """Check whether the writer has left the file or has not written for a while.  Raises OSError."""
        return not self._writer_boot_id or time.time() - os.fstat(self.fileno()).st_mtime > MIN_EVICTION_AGE

    def is_stored_as(self, stored: StoredResponse) -> bool:
        """Check whether a stored body is this file, or has all its bytes; then all of it may be read."""
        if os.path.samestat(os.fstat(stored.fileno()), os.fstat(self.fileno())):
            self.size = stored.head.size
            return True
        return self.size == self.length

    def _write_metadata(self, writer_boot_id: str) -> None:
        """Write the head file.  Raises OSError."""
        row = {"head": vars(self.head),  # as the response will be stored; without size and mtime_ns
               "inode": os.fstat(self.fileno()).st_ino,  # a head file may survive its partial file
               "length": self.length, "writer_boot_id": writer_boot_id,
               "flushed_size": self.size if self._store.remote or not writer_boot_id else 0}
        replace_file(self.path + "^head", json.dumps(row, ensure_ascii=False))

    def _remove_metadata(self) -> None:
        """Remove the head file.  Raises OSError: metadata of another response must not stay."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path + "^head")


def _rename(path: str, place: str) -> None:
    """Rename a complete body into its place.  Raises OSError."""
    if os.name == "nt":  # which renames no open file, and a download's writer and readers have it open
        copy = os.path.join(os.path.dirname(place), "^" + os.path.basename(path))
        path = shutil.copy2(path, copy)
    os.replace(path, place)


def hex_digest(body: StoredResponse | PartialFile, algorithm: str) -> str:
    """Return the hexadecimal digest of a body, which is read unless the digest is known.  Raises OSError."""
    if isinstance(body, PartialFile) and algorithm == "sha256":
        return body.sha256()
    known = str(getattr(body.head, algorithm)) or str(hash_body(algorithm, body).hexdigest())
    if isinstance(body, PartialFile):
        body.head = replace_fields(body.head, sha512=known)  # to be kept with it
    return known


class NameIndex:
    """Finds stored files by their digests, or packages to adopt by their names.

    An index is a folder of text files with lines "DIGEST PLACE": the first 18 digits of the name's SHA-256,
    and a cache key or a path.  Lines are in 256 buckets by the first two digits, so that a lookup reads
    little: 70 KB if there are 200,000 names.

    Entries may get lost and may be outdated.  A lost one costs a download at most, and the caller verifies
    each place it gets.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def add(self, name: str, place: str) -> None:
        """Record that a file of this name is at ``place``.  Raises OSError.

        A list of names that grows too long loses its older half.
        """
        path, prefix = self._bucket(name)
        store_bytes(path, b"%s%s\n" % (prefix, place.encode("utf-8", "surrogateescape")), os.O_APPEND)
        if os.stat(path).st_size > _MAX_NAMES:
            replace_file(path, read_metadata(path)[-_MAX_NAMES // 2:].partition(b"\n")[2])

    def lookup(self, name: str) -> list[str]:
        """Return up to MAX_CANDIDATES places of a name, the newest first."""
        path, prefix = self._bucket(name)
        with contextlib.suppress(OSError):
            lines = reversed(read_metadata(path).split(b"\n")[:-1])
            newest_first = dict.fromkeys(line[len(prefix):] for line in lines if line.startswith(prefix))
            return [place.decode("utf-8", "surrogateescape") for place in newest_first][:MAX_CANDIDATES]
        return []

    def rebuild(self, entries: Iterable[tuple[str, str]]) -> None:
        """Replace the index by these names and places.  Raises OSError."""
        new = NameIndex(_temporary_name(self._folder))
        try:
            make_directory(new._folder)
            for name, place in entries:
                new.add(name, place)
            shutil.rmtree(self._folder, ignore_errors=True)
            os.rename(new._folder, self._folder)
        finally:
            shutil.rmtree(new._folder, ignore_errors=True)

    def _bucket(self, name: str) -> tuple[str, bytes]:
        """Return the path of a name's bucket, and how the name's lines in it begin."""
        digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
        return os.path.join(self._folder, digest[:2]), b"%s " % digest[:18].encode()


def _visible_files(top: str, root: str) -> Iterator[tuple[str, str]]:
    """Yield the paths of the files below ``top``, and their names below ``root``.  Links are not followed."""
    for folder, subfolders, files in os.walk(top):
        subfolders[:] = [name for name in subfolders if name != METADATA_FOLDER]
        for path in (os.path.join(folder, file) for file in files):
            yield path, os.path.relpath(path, root).replace(os.sep, "/")


def adoptable_packages(folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the names and paths of packages below the folders of --adopt."""
    for path, relative in itertools.chain(*(_visible_files(top, top) for top in folders)):
        # "%" is not quoted: apt and others write %3a into file names where the URL has it too.
        name = shareable_name("http://a/" + urllib.parse.quote(os.fsencode(relative), "/%:+~"))
        if name and "\n" not in path:
            yield name, path


class Space:
    """Grants disk space to downloads, so that they leave the reserve free and keep to --max-size.

    Usable are the file system's free bytes without the reserve or, if fewer, the bytes left by --max-size,
    minus the space that running downloads have been granted but have not used yet.

    A download with a declared length is granted all of it at its start, or is not stored.  Any other one is
    granted at least SPACE_STEP bytes at a time.  If it does not fit in the end, its clients may be cut off;
    so its size is remembered, and the next download of the same key must be granted as much at once.

    If little is left, ``scarce`` is set, which starts an eviction.  The eviction counts all files and
    corrects the size that is assumed here.  Other instances and people change the root, too.  So with
    --max-size the files are also counted whenever 1 % of it, or COUNT_STEP if that is more, has landed.

    PartialFile calls reserve() and release(); Store calls add(); evict() calls free_bytes(), free_inodes(),
    take_demand() and correct().
    """

    def __init__(self, root: str, min_free: int | None, max_size: int | None) -> None:
        self.scarce = threading.Event()
        self._root = root
        self._min_free = min_free  # bytes
        self._max_size = sys.maxsize if max_size is None else max_size
        self._count_step = max(COUNT_STEP, self._max_size // 100)
        self._lock = threading.RLock()  # guards all below
        # The size that each running download may reach, with its head file and folders.
        self._running: weakref.WeakKeyDictionary[PartialFile, int] = weakref.WeakKeyDictionary()
        self._stored = 0  # assumed bytes below the root, without running downloads
        self._files = 0  # assumed number of stored responses
        self._landed = 0  # bytes stored since the last count
        self._demand = 0  # free bytes that downloads lacked, or that the next one is likely to need
        self._spare = 0  # free bytes that the last eviction aimed at
        self._outgrown: dict[str, int] = {}  # by key: sizes of undeclared bodies that did not fit

    def reserve(self, partial: PartialFile, count: int) -> int:
        """Grant ``count`` more bytes to a download, or SPACE_STEP if it has not declared its length.

        Returns the size up to which it may be written before the next call.  Raises OSError (ENOSPC).
        """
        free, inodes = self.free_bytes(), self.free_inodes()
        key, overhead = partial.head.key, head_size(partial.head)
        with self._lock:
            starts = partial not in self._running
            if partial.length is None:
                count = max(count, SPACE_STEP, self._outgrown.pop(key, 0) if starts else 0)
            end, needed = partial.size + count + overhead, count
            if end > self._running.get(partial, 0):  # otherwise the bytes have been granted already
                needed += overhead + sum(max(0, granted - other.size)
                                         for other, granted in self._running.items() if other is not partial)
            below_limit = self._max_size - self._used()
            left = min(free, below_limit) - needed
            fits = left >= 0 and (not starts or inodes >= inodes_for(key))
            likely = min(count, MAX_SPARE, 5 * self._spare)  # the next download is often as large
            if left < max(likely, self._spare // 2) or not fits:
                self.scarce.set()
                self._demand = max(self._demand, likely if left >= 0 else needed)
            if fits:
                self._running[partial] = max(end, self._running.get(partial, 0))
                self._stored -= partial.size if starts else 0  # a leftover now counts as a download
                return min(self._running[partial] - overhead, partial.size + SPACE_STEP)
            if partial.length is None and len(self._outgrown) < LARGE_MEMO:
                self._outgrown[key] = partial.size + count
        if partial.length is not None and end > self._max_size:
            raise OSError(errno.EFBIG, "this file is larger than --max-size")
        place = "room below --max-size" if below_limit < min(free, needed) else "free space"
        raise OSError(errno.ENOSPC, "not enough " + (
            "%s for %d bytes" % (place, count) if left < 0 else "free inodes"))

    def release(self, partial: PartialFile, kept: bool = True) -> None:
        """End a download's grant; ``kept`` says whether its bytes stay on the disk."""
        with self._lock:
            if self._running.pop(partial, None) is not None and kept:
                self.add(partial.size + head_size(partial.head), 0)

    def add(self, size: int, files: int) -> None:
        """Count bytes and files that have landed, or have gone if negative.

        Starts an eviction if the limit is passed.
        """
        with self._lock:
            self._stored += size
            self._files += files
            self._landed += max(size, 0)
            if self._used() > self._max_size or self._landed > self._count_step:
                self.scarce.set()

    def free_bytes(self) -> int:
        """Return the free bytes without the reserve, which may be negative.  Raises OSError."""
        usage = shutil.disk_usage(self._root)
        reserve = min(usage.total // 20, 10 * 10**9) if self._min_free is None else self._min_free
        return usage.free - reserve

    def free_inodes(self) -> int:
        """Return the free inodes without a reserve of 5 %, at most 10,000.  Raises OSError.

        File systems that allocate inodes on demand report none at all: there is no limit.
        """
        found = os.statvfs(self._root) if hasattr(os, "statvfs") else None
        return found.f_favail - min(found.f_files // 20, 10_000) if found and found.f_files else sys.maxsize

    def snapshot(self) -> dict[str, int | None]:
        """Describe the size of the cache for the status page, current to the last stored file.

        ``bytes`` and ``files`` are pkgproxy's own, and ``limit`` is --max-size (None: not set).
        """
        with self._lock:
            limit = self._max_size if self._max_size < sys.maxsize else None
            return {"bytes": max(0, self._used()), "files": max(0, self._files), "limit": limit}

    def take_demand(self) -> tuple[int, int, int]:
        """Return the assumed bytes and files, and the free bytes needed since the last call."""
        with self._lock:
            demand, self._demand, self._landed = self._demand, 0, 0
            return self._used(), self._files, demand

    def correct(self, size: int, files: int, spare: int) -> None:
        """Add the differences between counted and assumed bytes and files; set the eviction's spare space."""
        with self._lock:
            self._stored += size
            self._files += files
            self._spare = spare

    def _used(self) -> int:
        return self._stored + sum(other.size for other in self._running)


class Store:
    """Finds, stores, updates and deletes responses below the cache root.

    There is no index: the file system holds all state, so that several processes may share a root and
    people may copy, move and delete files at any time.
    """

    def __init__(self, root: str, trust_bare: bool = True, min_free: int | None = None,
                 max_size: int | None = None) -> None:
        self.root = os.path.abspath(root)
        self.metadata_folder = os.path.join(self.root, METADATA_FOLDER)
        self.boot = boot_id()
        self.remote = is_remote(self.root)
        self.space = Space(self.root, min_free, max_size)
        self.names = NameIndex(os.path.join(self.metadata_folder, "names"))  # of stored files: cache keys
        self.adopted = NameIndex(os.path.join(self.metadata_folder, "adopted"))  # of --adopt: paths
        self.trust_bare = trust_bare  # whether the root holds nothing but the cache
        # The names that a key's body may have: the preferred one first, the hashed one last.
        self._names_of = memoize(lambda key: list(filter(None, cache_file_names(key, os.name == "nt"))))
        self._why_wrong = functools.lru_cache(LARGE_MEMO)(self._compare)
        self._lock = threading.Lock()  # guards checks
        # Packages that had the size and digest in their index, or not, and damaged files that were removed.
        self.checks = collections.Counter(verified=0, refused=0, healed=0)
        self._used: dict[str, float] = {}  # by name: clock time of the last use since the last eviction
        self.used_at = 0.0  # clock time of the last use of any stored response
        self.unhashed = collections.deque[str](maxlen=LARGE_MEMO)  # names of bodies whose digests are needed

    def lookup(self, key: str) -> StoredResponse | None:
        """Open the stored response for a cache key; None if there is none that may be used.

        People copy the root with cp, scp or rsync, which may lose the times of files or the metadata folder:

        - A body without its time is used, but not ``verified``: either verify_copy() finds that it has the
          digest in its head, or decide() has its origin asked.  Then update_head() saves the new time.
        - A body without a head, the same, if the root holds nothing but the cache (``trust_bare``).
        - A body of another size than its head says was changed, or only partly copied: it is never used.
        - A body that contradicts what an index says about it is not used (invariant 13).
        - A body under the hashed name that only made way for a foreign file is not used once that is removed:
          people expect that a file which they have removed is fetched anew.
        """
        bare, names, version = None, self._names_of(key), self.knowledge_version()
        for name in names:
            file, info = _open(self.body_path(name))
            if file is None:
                continue
            head = _matching_head(_read_heads(self.head_path(name)), key, info)
            is_ours = not bare and self._is_bare(name) if head is None else (
                not head.displaced or os.path.lexists(self.body_path(names[0])))
            if not is_ours or self._why_wrong(key, name, info.st_size, head, *version):
                file.close()
            elif head is not None:
                _close(bare)
                self._used[name] = self.used_at = time.time()
                return StoredResponse(file, head, name, True)
            else:
                bare = StoredResponse(file, _bare_head(key, info, file.read(1)), name, False)
                file.seek(0)
        return bare

    def _is_bare(self, name: str) -> bool:
        """Check whether a file counts as a copy of a stored one that has lost its head (invariant 11)."""
        path = self.body_path(name)
        return (self.trust_bare and os.path.isfile(path) and not os.path.islink(path)
                and not _read_heads(self.head_path(name)) and _has_exact_name(self.root, name))

    def why_not_found(self, key: str) -> str:
        """Return why lookup() finds nothing."""
        is_there = any(os.path.lexists(self.body_path(name)) for name in self._names_of(key))
        return "the stored copy cannot be used" if is_there else "no stored copy"

    def expected(self, key: str) -> list[FileFacts]:
        """Return what is known about a body in advance; each is right.  Here: the digest in its name."""
        algorithm, digest = digest_in_name(key) or ("", "")
        return [FileFacts(None, algorithm, bytes.fromhex(digest)[:32])] if algorithm else []

    def knowledge_version(self) -> tuple[int, ...]:
        """Return what changes when expected() may return something else than before."""
        return ()

    def _compare(self, key: str, name: str, size: int, head: ResponseHead | None, *_memo: int) -> str:
        """Return why a stored body is not used; see why_unexpected().  Have a missing digest computed."""
        expected = self.expected(key)
        reason = why_unexpected(expected, size, lambda algorithm: getattr(head, algorithm, ""))
        if reason:
            log.info("The stored file of %s is not used: %s", loggable_uri(key), reason)
        elif expected and head and not head.sha256 and name not in self.unhashed:
            self.unhashed.append(name)
        return reason

    def awaits_index(self, head: ResponseHead) -> bool:  # noqa: ARG002 (see IndexedStore)
        """Return whether an index that may name a body is newer than its validation, and not read yet."""
        return False

    def count_check(self, result: str) -> None:
        """Count a package as "verified", "refused" or "healed"."""
        with self._lock:
            self.checks[result] += 1

    def commit(self, partial: PartialFile) -> None:
        """Store a complete download under its key.  Raises OSError."""
        modified = parse_date(field_value(partial.head.fields, "Last-Modified"))
        if modified is None or not 0 <= modified < 2**33:
            modified = partial.head.response_time
        # The seconds are the origin's, for people to see.  The fraction, from the clock, tells bodies of one
        # second and size apart, so that no head of one ever describes the other.
        mtime_ns = int(modified) * 10**9 + time.time_ns() // 1000 % 10**6 * 1000
        os.utime(partial.path, ns=(time.time_ns(), mtime_ns))
        info = os.fstat(partial.fileno())  # the file system may have rounded the time
        if info.st_size != partial.size or partial.length not in (None, partial.size):
            raise OSError(errno.EIO, "the partial file has %d bytes, not the %d received of %s" % (
                info.st_size, partial.size, partial.length))
        self._publish(partial.path, partial, replace_fields(
            partial.head, size=partial.size, mtime_ns=info.st_mtime_ns, sha256=partial.sha256()))

    def link(self, stored: StoredResponse) -> None:
        """Store a body under the key of its head as well, as a hard link.

        Raises OSError if the file system has no hard links, or the body has no head file of its own.
        """
        if not stored.described:
            raise OSError(errno.EPERM, "the file was not stored by pkgproxy")
        own = _temporary_name(os.path.join(self.metadata_folder, "partials", "own"))
        create_in_folder(own, lambda: os.link(self.body_path(stored.name), own))
        try:
            self._publish(own, stored, stored.head)
        finally:
            _unlink(own)

    def _publish(self, path: str, file: StoredResponse | PartialFile, head: ResponseHead) -> None:
        """Rename a body to its natural name, or to its hashed one if that is impossible.  Raises OSError."""
        named = (fact.digest.hex() for fact in Store.expected(self, head.key))
        digests = {head.sha256, head.sha512[:64], *named}
        with contextlib.suppress(OSError):
            for digest in filter(None, digests if is_immutable_name(head.key) else ()):
                self.names.add(digest, head.key)
        *_, hashed = names = self._names_of(head.key)
        for name in names:
            exists, old = self.find_head(name, head.key)
            if exists and not old and name != hashed and not self._is_bare(name):  # it stays (invariant 11)
                head = replace_fields(head, displaced=True)
            elif self._rename_into_place(path, file, name, head, old):
                self.space.add(-old.size if old else 0, 0 if old else 1)
                if name != hashed and os.path.lexists(self.body_path(hashed)):
                    self.delete_file(hashed, head.key)
                return
        raise OSError(errno.EEXIST, "a file that pkgproxy did not store has its name")

    def _rename_into_place(self, path: str, file: StoredResponse | PartialFile, name: str, head: ResponseHead,
                           old: ResponseHead | None) -> bool:
        """Rename the open file from ``path`` to ``name``.  Returns False if the file system refuses the name.

        Raises OSError.  The head is written first, into a file that keeps the head of a replaced body too.
        So at each moment, even after a crash, the visible body has a head that describes it, and no reader
        mixes two generations.

        Another instance may replace ``path`` at any time, for example if somebody removed the metadata folder
        and a second download of the key has begun.  Its growing file must not become a body:

        1. rename ``path`` into its place (a growing file there is not used: no head describes it),
        2. compare the file in the place with the open one,
        3. if they are not the same, rename the other instance's file back to ``path``.
        """
        place, head_path = self.body_path(name), self.head_path(name)
        try:
            _write_heads(head_path, [head, old] if old and old.verified else [head])
            create_in_folder(place, lambda: _rename(path, place))
        except OSError as error:
            if error.errno in _NAME_REFUSED:
                return False
            # A body without a head must not get one that does not fit: it would never be replaced.
            _unlink("" if old else head_path)
            raise
        if os.name != "nt" and not os.path.samestat(os.lstat(place), os.fstat(file.fileno())):
            os.replace(place, path)
            raise OSError(errno.ESTALE, "the partial file was replaced")
        if old:  # it would fit the new body as well if that had the same size and lost its time
            with contextlib.suppress(OSError):
                _write_heads(head_path, [head])
        return True

    def update_head(self, stored: StoredResponse, head: ResponseHead) -> None:
        """Save a head that a validation has updated; a failure costs only the next validation.

        A body that had no head becomes pkgproxy's own by this: it is counted, and may be evicted.
        """
        known = {"size": stored.head.size, "mtime_ns": stored.head.mtime_ns}
        with contextlib.suppress(OSError):
            info = os.lstat(self.body_path(stored.name))
            if known == {"size": info.st_size, "mtime_ns": info.st_mtime_ns}:  # else a newer body is stored
                _write_heads(self.head_path(stored.name), [replace_fields(head, **known)])
                if not stored.described:
                    self.space.add(info.st_size, 1)

    def delete(self, key: str) -> None:
        """Delete the stored response for a key; other files are left alone (invariant 11)."""
        for name in self._names_of(key):
            self.delete_file(name, key)

    def delete_file(self, name: str, key: str | None = None) -> bool:
        """Delete the stored response of a name if pkgproxy stored it, for this key (None: for any).

        A head without a body is deleted too.  Returns whether there was such a response.
        """
        exists, head = self.find_head(name, key)
        if head:
            _unlink(self.body_path(name))
        if head or not exists:
            _unlink(self.head_path(name))
        return head is not None

    def find_head(self, name: str, key: str | None) -> tuple[bool, ResponseHead | None]:
        """Return whether a file of this name exists, and the head by which it is pkgproxy's own.

        ``key`` is the cache key that the head must have; None: any.
        """
        try:
            info = os.lstat(self.body_path(name))
        except OSError:
            return False, None
        heads = _read_heads(self.head_path(name)) if stat.S_ISREG(info.st_mode) else ()
        return True, _matching_head(heads, key, info)

    def take_access_times(self) -> dict[str, float]:
        """Return the clock times of the last uses since the last call, by name.

        They are kept in memory, so that a hit writes nothing to the disk.  One that is noted just now may get
        lost, which is harmless.
        """
        used, self._used = self._used, {}
        return used

    def body_path(self, name: str) -> str:
        """Return the path of a name's body."""
        return "%s/%s" % (self.root, name)

    def head_path(self, name: str) -> str:
        """Return the path of a name's head file."""
        return "%s/heads/%s^head" % (self.metadata_folder, name)


def version_of(store: Store, key: str) -> tuple[int, int] | None:
    """Return size and modification time (ns) of the stored body for a key, which is not a use."""
    for path in map(store.body_path, store._names_of(key)):
        with contextlib.suppress(OSError):
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode):  # else a folder, so that the body has its hashed name
                return info.st_size, info.st_mtime_ns
    return None


def list_hosts(store: Store) -> list[str]:
    """Return the hosts with stored responses.  Raises OSError if the root cannot be read."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(store.head_path("")[:-len("^head")])
        return sorted(name for name in names if os.path.isdir(store.body_path(name)))
    return []


def verify_copy(store: Store, stored: StoredResponse) -> StoredResponse | None:
    """Check a copied body against the digest in its head, and save its new time.

    Returns None, and closes the body, if it is another one; ``stored`` if that is known or cannot be told.
    """
    if stored.head.verified or not stored.head.sha256:
        return stored
    with contextlib.suppress(OSError):
        if hash_body("sha256", stored).hexdigest() == stored.head.sha256:
            store.update_head(stored, stored.head)
            return replace_fields(stored, head=replace_fields(stored.head, verified=True))
    stored.close()
    return None


class PartialStore:
    """Opens and unlinks the partial files below a cache root."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def open_for_writing(self, key: str, owner: str = "", exclusive: bool = True) -> PartialFile | None:
        """Open the partial file of a key as its only writer, with the rest of an interrupted download.

        With an ``owner``, the file is SHA256.owner, and the caller has a lease instead of the file's lock;
        ``exclusive`` tells whether the lease is certain to be the only one.

        Returns None if another process writes the file.  Raises StorageError.
        """
        path = self.path(key, owner)
        try:
            # Between open and lock another process may commit or remove the file.  Then the lock is one on a
            # file without a name, and the next attempt opens the new file.
            for _ in range(10):
                with PartialFile(self._store, key, owner, path, create_file(path, 0)) as partial:
                    if not owner and not partial.try_lock():
                        return None
                    if partial.still_exists():
                        if not partial.load_metadata() and owner:
                            self._adopt_leftovers(partial, exclusive)
                        partial.acquire()
                        return partial
            raise OSError(errno.EAGAIN, "another process keeps replacing its file", key)
        except OSError as error:
            raise StorageError(error) from error

    def open_for_reading(self, key: str, owner: str = "") -> PartialFile | None:
        """Open the partial file that another instance writes, or has written; None if there is none."""
        path = self.path(key, owner)
        with contextlib.suppress(OSError):
            return PartialFile(self._store, key, owner, path, os.open(path, _WRITABLE))
        return None

    def unlink(self, key: str, owner: str) -> None:
        """Remove a partial file, so that the process that writes it cannot store what is outdated."""
        _unlink(self.path(key, owner))

    def path(self, key: str, owner: str) -> str:
        """Return the path of a key's partial file."""
        name = hashlib.sha256(key.encode()).hexdigest() + ("." + owner if owner else "")
        return "%s/partials/%s" % (self._store.metadata_folder, name)

    def _adopt_leftovers(self, partial: PartialFile, exclusive: bool) -> None:
        """Copy the bytes that another owner has left of the same download.  Raises OSError.

        Its file is not written itself: that owner may still be alive, as a lease can be lost to a pause.
        With an exclusive lease, no other owner writes any more.  Without, a file counts as left if nobody
        has written it for a while.
        """
        for path in glob.glob(glob.escape(self.path(partial.head.key, "")) + ".*"):
            owner = os.path.basename(path).partition(".")[2]
            old = None if owner == partial.owner or "^" in owner else self.open_for_reading(
                partial.head.key, owner)
            with old or contextlib.nullcontext():
                if old and old.load_metadata() and (exclusive or old.is_abandoned()) and not partial.size:
                    while data := old.read_at(min(COPY_SIZE, old.size - partial.size), partial.size):
                        partial.write(data)
                    partial.head, partial.length = old.head, old.length
                    old.discard()


class Entry(NamedTuple):
    """A response with its head, or another file of pkgproxy's, as eviction sees it."""

    used: float  # clock time of the last use
    size: int  # bytes on the disk
    name: str = ""  # path below the root; "": counted, but never evicted
    is_response: bool = False

    def eviction_order(self) -> tuple[bool, bool, float, int]:
        """Sort leftovers of downloads first, then the least recently used, indexes last.

        Of two links to one file, the one that frees nothing goes first.
        """
        is_index = self.is_response and classify_name("http://" + self.name) is NameClass.INDEX
        return self.is_response, is_index, self.used, self.size


class EvictionReport(NamedTuple):
    """The result of evict()."""

    files: int  # stored responses found
    size: int  # bytes on the disk of bodies, metadata and partial files
    removed: int  # stored responses
    freed: int  # bytes


def _response_entry(store: Store, path: str, head: os.stat_result, used: dict[str, float],
                    seen: set[tuple[int, int]], now: float) -> Entry:
    """Return the entry of the response that a head file belongs to.  Raises OSError."""
    top, size = os.path.join(store.metadata_folder, "heads"), size_on_disk(head)
    name = os.path.relpath(path, top)[:-len("^head")].replace(os.sep, "/")
    body, info = store.body_path(name), _NO_STAT
    try:
        info = os.lstat(body)
    except (FileNotFoundError, NotADirectoryError):
        if head.st_mtime < now - DAY:  # else a download may be about to rename the body into place
            _unlink(path)
    if not (path.endswith("^head") and stat.S_ISREG(info.st_mode)):
        return Entry(head.st_mtime, size)
    if name in used:
        # If another body takes the place just now, it gets a wrong time, and is verified by its digest.
        with contextlib.suppress(OSError):
            os.utime(body, ns=(int(used[name] * 10**9), info.st_mtime_ns))
    if (info.st_dev, info.st_ino) not in seen:  # links to one file take its space once
        size += size_on_disk(info)
    if info.st_nlink > 1:
        seen.add((info.st_dev, info.st_ino))
    return Entry(max(used.get(name, 0.0), info.st_atime), size, name, True)


def _own_files(store: Store, used: dict[str, float], now: float) -> Iterator[Entry]:
    """Yield everything below the root that is pkgproxy's, by walking the metadata folder only."""
    seen: set[tuple[int, int]] = set()
    for folder, _, files in os.walk(store.metadata_folder):
        part = folder[len(store.metadata_folder) + 1:].partition(os.sep)[0]
        with contextlib.suppress(OSError):  # each folder of heads has a counterpart with bodies
            yield Entry(now, size_on_disk(os.lstat(folder)) * (2 if part == "heads" else 1))
        for file in files:
            with contextlib.suppress(OSError):
                path = os.path.join(folder, file)
                info = os.lstat(path)
                if part == "heads":
                    yield _response_entry(store, path, info, used, seen, now)
                elif info.st_mtime < now - DAY and (part == "partials" or "^" in file):
                    os.unlink(path)  # nobody has resumed it for a day, or a crash left it
                else:
                    name = "%s/%s/%s" % (METADATA_FOLDER, part, file) if part == "partials" else ""
                    # A lock tells whether a file is in use.  If it has an owner instead, its time does.
                    last = math.inf if "." in file else now - MIN_EVICTION_AGE - 1
                    yield Entry(min(info.st_mtime, last), size_on_disk(info), "" if "^" in file else name)


def _remove_entry(store: Store, entry: Entry) -> bool:
    """Remove an entry's files, and the folders that become empty.

    Returns False if it is locked or gone.
    """
    path = store.body_path(entry.name)
    if entry.is_response:
        removed = store.delete_file(entry.name)
        for folder in map(os.path.dirname, (path, store.head_path(entry.name)) if removed else ()):
            with contextlib.suppress(OSError):  # the folder is not empty
                while folder not in (store.root, store.metadata_folder):
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)
        return removed
    with contextlib.suppress(OSError), io.FileIO(os.open(path, _WRITABLE), "r+b") as file:
        if try_lock_file(file):
            os.unlink(path)
            _unlink(path + "^head")
            return True
    return False


def _evict_entries(store: Store, entries: list[Entry], max_age: float | None, excess: int,
                   now: float) -> tuple[int, int]:
    """Evict until ``excess`` bytes and enough inodes are free; return removed responses and bytes."""
    removed, freed, inodes = 0, 0, store.space.free_inodes()
    if excess <= 0 and inodes >= SPARE_INODES and max_age is None:
        return 0, 0  # sorting a large cache takes a while
    for entry in sorted((entry for entry in entries if entry.name), key=Entry.eviction_order):
        expired = max_age is not None and now - entry.used > max_age
        # A time in the future comes from a clock that has been set back since.
        unused = abs(now - entry.used) > MIN_EVICTION_AGE
        wanted = expired or freed < excess or inodes < SPARE_INODES
        if unused and wanted and _remove_entry(store, entry):
            removed, freed = removed + entry.is_response, freed + entry.size
            inodes = store.space.free_inodes()
    return removed, freed


def evict(store: Store, config: Config, now: float) -> EvictionReport:
    """Count all files of the cache, and evict expired and excess ones.

    Also removes old leftovers.  Files that pkgproxy did not store stay.  Raises OSError if the root cannot be
    read.
    """
    assumed, assumed_files, demand = store.space.take_demand()
    entries = list(_own_files(store, store.take_access_times(), now))
    total = sum(entry.size for entry in entries)
    spare, free = min(total // 20, MAX_SPARE), store.space.free_bytes()
    if config.max_size is not None:
        free = min(free, config.max_size - total)
    # A download that would not fit into an empty cache evicts nothing.
    excess = max(spare, demand if demand - free <= total else 0) - free
    removed, freed = _evict_entries(store, entries, config.max_age, excess, now)
    files = sum(entry.is_response for entry in entries)
    store.space.correct(total - freed - assumed, files - removed - assumed_files, spare)
    return EvictionReport(files, total, removed, freed)


def log_foreign_files(store: Store) -> None:
    """Log how many visible files are not pkgproxy's own, and why.  Raises OSError."""
    counts, size = collections.Counter[str](), 0
    hosts = [""] if store.trust_bare else list_hosts(store)
    visible = (_visible_files(store.body_path(host), store.root) for host in hosts)
    for path, name in itertools.chain(*visible):
        if store.find_head(name, None) == (True, None):
            has_head = os.path.exists(store.head_path(name))
            counts["another size than .pkgproxy says" if has_head else "no head in .pkgproxy"] += 1
            size += os.lstat(path).st_size
    if counts:
        reasons = ", ".join("%d with %s" % (number, reason) for reason, number in sorted(counts.items()))
        log.info("Files in %s that are not under pkgproxy's care, and are not evicted: %s (%s in all). "
                 "With -r, those without a head are checked when they are requested.",
                 store.root, reasons, format_bytes(size))


# ---------------------------------------------------------------------------------------------
# 6 What indexes tell
# ---------------------------------------------------------------------------------------------
#
# An index of a repository says how large each package is, and which digest it has.  IndexReader reads the
# indexes that are stored, in a thread of its own, and answers for packages: invariant 13.

READ_SIZE = 64 * 1024  # bytes of a compressed file, or of its content, at a time: about 2 ms of work
MAX_INDEX = 1024 * 1024 * 1024  # bytes of an index, decompressed: Arch's extra.files has half as many
MAX_RATIO = 200  # of decompressed to stored bytes, beyond the first 16 MiB; real indexes reach 50
MAX_WINDOW = 72 * 1024 * 1024  # bytes of a decoder: `xz -9` needs 65 MiB, `xz -6` 9
INDEX_TIMEOUT = 120.0  # seconds to read one index, pauses included; Debian's takes 4


def _decode(file: io.FileIO, data: bytes, decoder: Any) -> Generator[bytes, None, bytes]:
    """Decompress one part of a file.  Returns the beginning of the next part, without padding."""
    output = data
    while not decoder.eof:
        if not data and not output:
            raise EOFError("it ends early")
        output = decoder.decompress(data, COPY_SIZE)
        yield output  # even if empty, because each chunk is a chance to look at the clock
        data = getattr(decoder, "unconsumed_tail", b"")  # zlib has this instead of needs_input
        if not data and not decoder.eof and getattr(decoder, "needs_input", True):
            data = file.read(READ_SIZE)
    rest: bytes = decoder.unused_data.lstrip(b"\0")
    while len(rest) < 8 and (data := file.read(READ_SIZE)):  # enough to recognize the next part
        rest = (rest + data).lstrip(b"\0")
    return rest


def _run_zstd(file: io.FileIO, module: str) -> Iterator[bytes]:
    """Decompress a file with the zstd program, which knows the other formats, too.

    It waits for nothing but a complete file and its reader, which kills it when a limit is reached.
    """
    import subprocess  # costs a millisecond, and few indexes need it

    program = shutil.which("zstd")
    if not program:
        raise DamagedIndexError("there is neither %s in Python nor zstd on PATH" % module)
    file.seek(0)
    with subprocess.Popen([program, "-dcq", "--memory=%d" % MAX_WINDOW], stdin=file,  # noqa: S603
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
        try:
            yield from iter(lambda: process.stdout.read(COPY_SIZE) if process.stdout else b"", b"")
            if process.wait():
                raise DamagedIndexError("zstd cannot decompress it")
        finally:
            process.kill()


_DECODERS: tuple[tuple[bytes, str, str, str, dict[str, Any]], ...] = (
    (b"\x1f\x8b", "zlib", "decompressobj", "error", {"wbits": 31}),
    (b"BZh", "bz2", "BZ2Decompressor", "", {}),
    (b"\xfd7zXZ\0", "lzma", "LZMADecompressor", "LZMAError", {"memlimit": MAX_WINDOW}),
    (b"\x5d\0\0", "lzma", "LZMADecompressor", "LZMAError", {"memlimit": MAX_WINDOW}),
    (b"\x28\xb5\x2f\xfd", "compression.zstd", "ZstdDecompressor", "ZstdError", {}))  # windows up to 128 MiB


def _decompress(file: io.FileIO) -> Iterator[bytes]:
    """Yield the contents of a file, whose first bytes tell the compression; more parts may follow."""
    data = file.read(READ_SIZE)
    while data:
        known = [row[1:] for row in _DECODERS if data.startswith(row[0])]
        if not known:
            yield from itertools.chain([data], iter(lambda: file.read(READ_SIZE), b""))
            return
        module, decoder, error, options = known[0]
        try:
            imported: Any = __import__(module, fromlist=[decoder])  # Python may have been built without it
        except ImportError:
            yield from _run_zstd(file, module)
            return
        own_error: Any = getattr(imported, error, OSError)
        try:
            data = yield from _decode(file, data, getattr(imported, decoder)(**options))
        except (own_error, EOFError, ValueError) as failure:
            raise DamagedIndexError("cannot decompress it: %s" % failure) from None


def read_index(file: io.FileIO) -> Iterator[bytes]:
    """Decompress a stored index from its first byte, in chunks that are not small, because each costs time.

    The pauses leave the interpreter lock to requests.  A low priority would do the opposite: while the thread
    holds the lock and waits for a processor, every other thread of the process waits, too.

    Raises OSError, and DamagedIndexError, also if the index is larger or slower to read than allowed.
    """
    limit = min(MAX_INDEX, 16 * 1024 * 1024 + MAX_RATIO * file.seek(0, io.SEEK_END))
    file.seek(0)
    deadline, worked = time.monotonic() + INDEX_TIMEOUT, time.thread_time()
    total, joined = 0, bytearray()
    for chunk in _decompress(file):
        total += len(chunk)
        joined += chunk
        if total > limit or time.monotonic() > deadline:
            raise DamagedIndexError("reading it takes more than %d bytes or %d s" % (limit, INDEX_TIMEOUT))
        if len(joined) >= READ_SIZE:
            yield bytes(joined)
            joined.clear()
            time.sleep(min(1.0, time.thread_time() - worked))
            worked = time.thread_time()
    yield bytes(joined)


# A table holds what one index says.
# A line of JSON, rows sorted by key, and a checksum, which reveals a table that a crash left incomplete.

_KEY_SIZE = 10  # bytes of a name's SHA-256
_ROW = struct.Struct(">%dsqB32s" % _KEY_SIZE)  # key, size (-1: unknown), algorithm, digest
_FENCE = 64  # rows between two whose keys are kept in memory: 45 KB for Debian's main
_ALGORITHMS = ("", "sha256", "sha512")
_MAGIC = "pkgproxy index table 1"
_CRC_RESIDUE = 0x2144DF1C  # the CRC-32 of any data with its own CRC-32 behind it


class TableSource(NamedTuple):
    """The stored index from which a table was made."""

    key: str
    base: str
    size: int
    mtime_ns: int
    sha256: str  # hexadecimal, of the index as stored


def write_table(path: str, source: TableSource, entries: Iterable[tuple[bytes, FileFacts]]) -> None:
    """Write a table, or replace it, from what parse_index() yields.  Raises OSError, DamagedIndexError."""
    buckets = [bytearray() for _ in range(16)]  # by the key's first digit: a row costs only its bytes
    for name, (size, algorithm, digest) in entries:
        key, known = hashlib.sha256(name).digest(), -1 if size is None else size
        buckets[key[0] >> 4] += _ROW.pack(key, known, _ALGORITHMS.index(algorithm), digest)
    data = bytearray(json.dumps([_MAGIC, *source]).encode() + b"\n")
    for bucket in buckets:
        data += b"".join(sorted({row for row, in struct.iter_unpack("%ds" % _ROW.size, bucket)}))
        bucket.clear()
    data += binascii.crc32(data).to_bytes(4, "little")
    replace_file(path, bytes(data))


class IndexTable:
    """A table on disk.  Raises OSError; DamagedIndexError if the file is not a whole table.

    The file is opened for each look-up, so that no descriptor is held, threads share no position, and Windows
    can remove it.  It is read, not mapped: a bad sector, or another machine that truncates the file, would
    kill a process that has it mapped.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with io.FileIO(path) as file:
            data = file.readall()
        self._start = data.find(b"\n") + 1
        rows = range(self._start, len(data) - _ROW.size, _ROW.size * _FENCE)
        self._fences = [data[at:at + _KEY_SIZE] for at in rows]
        try:
            magic, *source = json.loads(data[:self._start])
            self.source = TableSource(*source)
        except (ValueError, TypeError, RecursionError):
            magic = ""
        if binascii.crc32(data) != _CRC_RESIDUE or magic != _MAGIC:
            raise DamagedIndexError("the file is not a complete table of this version")

    def look_up(self, name: bytes) -> list[FileFacts]:
        """Return what the index says about a file; several if it contradicts itself.  Raises OSError."""
        key = hashlib.sha256(name).digest()[:_KEY_SIZE]
        first = max(0, bisect.bisect_left(self._fences, key) - 1) * _FENCE
        with io.FileIO(self._path) as file:
            file.seek(self._start + first * _ROW.size)
            rows = file.read(2 * _FENCE * _ROW.size)
        found = [_ROW.unpack_from(rows, at)[1:] for at in range(0, len(rows) - _ROW.size + 1, _ROW.size)
                 if rows.startswith(key, at)]
        return [FileFacts(size if size >= 0 else None, _ALGORITHMS[algorithm], digest if algorithm else b"")
                for size, algorithm, digest in found]


# The reader

MAX_QUEUED_INDEXES = 1000  # more are read when they are used again
MAX_PLACES = 500  # places, and tables, that are remembered; most places have no table
CHECK_INTERVAL = 5.0  # seconds until the tables of a place are compared with the stored indexes again
LEARNING_BACKOFF = 60.0  # seconds without reading after a failure of the disk


class IndexReader:
    """Reads indexes in a background thread, and answers what the current ones say about a package.

    A table lies in ``indexes/<place>/<key and version of its index>``, both hashed: a package's URL leads to
    the places, and their folders list the tables.  A table is believed while the very version of the index
    from which it was made is stored, and is what the Release or repomd.xml above it names, if that is known.
    An index with a digest in its own name remains stored when it is outdated, so it has to be named.  For a
    damaged index the table is empty, so that it is not read again.

    The thread runs only while indexes wait.  It works on an open file, which remains one version:

    1. note() queues an index; from now on the table of its previous version is not believed;
    2. the thread opens the index, and writes a table for the version that it has opened;
    3. if the index is replaced meanwhile, this table is not believed, and note() has queued the new version.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = os.path.join(store.metadata_folder, "indexes")
        self._open_table = functools.lru_cache(MAX_PLACES)(IndexTable)
        self._tables = functools.lru_cache(MAX_PLACES)(self._find_tables)
        self._lock = threading.Lock()  # guards what follows
        self._thread = threading.Thread()
        # By key: kind, base and place of an index, and the clock time; also of the one that is being read.
        self._queue: dict[str, tuple[str, str, str, float]] = {}
        self._unnamed: set[str] = set()  # keys of indexes that no index has named; each new table may do so
        self._failed = -LEARNING_BACKOFF  # monotonic time of the last failure of the disk
        self.generation = 0  # of the answers: while it is the same, only other processes can change them

    def note(self, head: ResponseHead) -> None:
        """Queue an index that was stored, or is used, to be read unless it has been; ignore other files."""
        found = index_type(head.key, media_type(head))
        if found is None or head.key in self._unnamed or os.path.exists(
                self._path(found[2], head.key, version_of(self._store, head.key))):
            return
        with self._lock:
            if len(self._queue) <= MAX_QUEUED_INDEXES and time.monotonic() - self._failed > LEARNING_BACKOFF:
                self._queue[head.key] = *found, time.time()
                self.generation += 1
                if not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, daemon=True)
                    with contextlib.suppress(RuntimeError):  # no further thread: the next index tries again
                        self._thread.start()

    def facts_for(self, key: str, prefix: str = "") -> list[FileFacts]:
        """Return what the current indexes say about a file: each is right.  Empty if none names the file.

        With the prefix "top ", the indexes that name other indexes are asked.
        """
        found: list[FileFacts] = []
        moment = int(time.monotonic() / CHECK_INTERVAL)
        for place in index_places(key):
            for table in self._tables(prefix + place, self.generation, moment):
                with contextlib.suppress(OSError):  # the table has just been deleted
                    found += table.look_up(name_below(table.source.base, key) or b"")
        return list(dict.fromkeys(found))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = threading.Thread()  # this one still lives, but looks at the queue no more
                    return
                key, queued = next(iter(self._queue.items()))
            try:
                self._read(key, *queued[:3])
            except OSError as error:
                log.warning("Cannot learn from %s: %s", loggable_uri(key), error)
                self._failed = time.monotonic()
            finally:
                with self._lock:
                    if self._queue[key] is queued:  # else it has been replaced, and is read again
                        del self._queue[key]

    def awaits(self, head: ResponseHead) -> bool:
        """Return whether an index that may name a file is newer than its validation, and not read yet."""
        if not self._queue:
            return False
        with self._lock:
            newest = dict(sorted(queued[2:] for queued in self._queue.values()))  # by place
        return any(newest.get(place, 0.0) > head.response_time for place in index_places(head.key))

    def _read(self, key: str, kind: str, base: str, place: str) -> None:
        if classify_name(key) is NameClass.CONTENT and not self.facts_for(key, "top "):
            if len(self._unnamed) > MAX_QUEUED_INDEXES:
                self._unnamed.clear()
            self._unnamed.add(key)
            return
        stored = Store.lookup(self._store, key)
        if stored is None:
            return
        with contextlib.closing(stored):
            version = stored.head.size, stored.head.mtime_ns
            path = self._path(place, key, version)
            source = TableSource(key, base, *version, hex_digest(stored, "sha256"))
            try:
                write_table(path, source, parse_index(kind, read_index(stored.file), base, key))
            except DamagedIndexError as error:
                log.warning("Cannot learn from %s: %s", loggable_uri(key), error)
                write_table(path, source, ())
            self._unnamed.clear()
            with self._lock:  # or else one of two simultaneous changes would get lost
                self.generation += 1

    def _path(self, place: str, *index: object) -> str:
        """Return the path of the table for key and version of an index, or of the folder with its like."""
        names = [hashlib.sha256(repr(part).encode()).hexdigest()[:32] for part in (place, index) if part]
        return os.path.join(self._folder, *names)

    def _find_tables(self, place: str, *_memo: int) -> list[IndexTable]:
        """Return the tables of a place that are believed."""
        with contextlib.suppress(OSError):
            paths = [entry.path for entry in os.scandir(self._path(place)) if "^" not in entry.name]
            return [table for table in map(self._open_current, paths) if table and (
                place.startswith("top ") or self._is_named(table.source))]
        return []

    def _open_current(self, path: str) -> IndexTable | None:
        """Open a table; delete it, and return None, if its index has been replaced or removed since."""
        with contextlib.suppress(OSError, DamagedIndexError):
            table = self._open_table(path)
            if version_of(self._store, table.source.key) == (table.source.size, table.source.mtime_ns):
                return table
        _unlink(path)
        return None

    def _is_named(self, source: TableSource) -> bool:
        facts = self.facts_for(source.key, "top ")
        may_be_named = facts or classify_name(source.key) is not NameClass.CONTENT
        return bool(may_be_named) and not why_unexpected(
            facts, source.size, lambda algorithm: source.sha256 if algorithm == "sha256" else "")


class IndexedStore(Store):
    """A store that also knows its packages from the stored indexes (invariant 13)."""

    def __init__(self, root: str, trust_bare: bool = True, min_free: int | None = None,
                 max_size: int | None = None) -> None:
        super().__init__(root, trust_bare, min_free, max_size)
        self._reader = IndexReader(self)
        self._facts = functools.lru_cache(LARGE_MEMO)(lambda key, *_memo: self._reader.facts_for(key))

    def expected(self, key: str) -> list[FileFacts]:
        """Return what is known about a body: the digest in its name, or what each index says about it.

        A miss asks several times, and each answer may take a read from every table of the repository.
        """
        known = super().expected(key)
        may_be_named = not known and classify_name(key) is not NameClass.INDEX
        return self._facts(key, *self.knowledge_version()) if may_be_named else known

    def lookup(self, key: str) -> StoredResponse | None:
        """Open a stored response; read it if it is an index that is never validated, and was never read."""
        stored = super().lookup(key)
        if stored is not None and classify_name(key) is NameClass.CONTENT:
            self._reader.note(stored.head)
        return stored

    def awaits_index(self, head: ResponseHead) -> bool:
        """Return whether an index that may name a package is newer than its validation, and not read yet."""
        return classify_name(head.key) is NameClass.PACKAGE and self._reader.awaits(head)

    def knowledge_version(self) -> tuple[int, ...]:
        """Return what changes when expected() may return something else; so do other processes, at times."""
        return self._reader.generation, int(time.monotonic() / CHECK_INTERVAL)

    def _publish(self, path: str, file: StoredResponse | PartialFile, head: ResponseHead) -> None:
        """Store a body, and read it if it is an index.  Raises OSError."""
        super()._publish(path, file, head)
        self._reader.note(head)

    def update_head(self, stored: StoredResponse, head: ResponseHead) -> None:
        """Save a validated head, and read the index that it belongs to if that was never done."""
        super().update_head(stored, head)
        self._reader.note(head)


# ---------------------------------------------------------------------------------------------
# 7 Barrier
# ---------------------------------------------------------------------------------------------
#
# One download per cache key: SingleFlight ensures it among the threads of this process.  Among instances that
# share a root, the lock on the partial file does (section 5) or, with --barrier, a lease in memcached.


class FlightResult(enum.Enum):
    """The result of a flight, by which its followers decide how to go on."""

    # The response is in the store, and all bytes of the partial file may be read, if there is one.  There is
    # none after a 304, or if the response was stored as a link to another mirror's file.
    STORED = "stored"
    AGAIN = "again"  # the origin was not asked: decide anew
    WHOLE = "whole"  # all bytes have arrived, but were not stored: read them from the partial file
    ALONE = "alone"  # the response cannot be shared: ask the origin without joining
    FAILED = "failed"  # before the head: join anew; after it: ask the origin for the remainder


class Flight:
    """A download in progress: its leader reports progress, followers wait for it.

    ==========  ====================  ==================================================================
    state       set by                followers
    ==========  ====================  ==================================================================
    started     SingleFlight.join()   wait for the head
    receiving   publish()             read the partial file up to ``received``, wait for more
    committing  finish_receiving()    the same; they wait longer, because the disk is slow, not the origin
    finished    finish(result)        see FlightResult
    ==========  ====================  ==================================================================

    Any state may be followed by "finished".  forbid_storing() may come in any state.

    Who ends it: the leader, exactly once (invariant 3), by SingleFlight.finish(); either the thread that
    joined, or the Downloader or PeerFollower thread that it has started.

    Order at the end of a download (invariant 3).  A client may ask for the same file as soon as it has the
    last byte, and then must find it stored:

    1. the writer writes the last bytes, but does not report them by set_received(),
    2. calls finish_receiving() and, unless storing is forbidden, renames the file into the store,
    3. SingleFlight removes the flight: new requests look into the store,
    4. finish() reports the last bytes and wakes the followers.

    An unsafe request (POST, say) that makes the response invalid at the same time calls forbid_storing()
    before it deletes the stored response.  The writer asks before and after the rename: whichever of the two
    comes last deletes it.

    Every wait has a deadline, after which the follower asks the origin itself (invariant 10).
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._changed = threading.Condition()  # guards all below
        self._partial: PartialFile | None = None
        self._received = 0  # bytes that may be read
        self._committing = False  # whether all bytes have arrived
        self._storing_forbidden = False
        self._result: FlightResult | None = None
        self._error: Exception | None = None

    def publish(self, partial: PartialFile) -> None:
        """Let followers read the partial file: its head has arrived."""
        with self._changed:
            self._partial = partial
            # A resumed download begins with bytes; but the last ones are reported by finish() only.
            self._received = max(self._received, partial.size if partial.size != partial.length else 0)
            self._changed.notify_all()

    def set_received(self, received: int) -> None:
        """Let followers read the first ``received`` bytes."""
        with self._changed:
            self._received = received
            self._changed.notify_all()

    def finish_receiving(self) -> bool:
        """Report that all bytes have arrived.  Returns whether they may be stored."""
        with self._changed:
            self._committing = True
            return not self._storing_forbidden

    def forbid_storing(self) -> None:
        """Do not store the response, because it is outdated.  Followers still get it."""
        with self._changed:
            self._storing_forbidden = True

    def finish(self, result: FlightResult, error: Exception | None = None,
               received: int | None = None) -> None:
        """Report the result, and with it the last bytes.  Only the first call has an effect."""
        with self._changed:
            if self._result is None:
                self._result, self._error = result, error
                self._received = self._received if received is None else received
                self._changed.notify_all()

    def wait_for_head(self, timeout: float) -> tuple[PartialFile | None, FlightResult | None]:
        """Wait for the partial file, which the caller must release(), or for the result.

        Returns both as far as they are known: the result is None while the download runs, and the partial
        file is None if there was none or its last user has closed it.  After ``timeout`` seconds both may be
        None.  Raises the flight's error if it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._partial or self._result, timeout)
            partial, result, error = self._partial, self._result, self._error
        if result is FlightResult.FAILED and error:
            raise error
        return (partial if partial and partial.acquire() else None), result

    def wait_for_bytes(self, offset: int, timeout: float) -> int:
        """Wait for bytes beyond ``offset``, and return how many may be read.

        They are no more than ``offset`` if the body ends there.  Raises the flight's error, or StorageError
        if nothing arrives for ``timeout`` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._received > offset or self._result, timeout)
            if self._committing:
                self._changed.wait_for(lambda: self._received > offset or self._result, COMMIT_TIMEOUT)
            if self._received > offset or self._result in (FlightResult.STORED, FlightResult.WHOLE):
                return self._received
            error = self._error
        raise error or StorageError(OSError(errno.ETIMEDOUT, "the download stands still"))


class SingleFlight:
    """Ensures that one download per cache key runs in this process (invariant 2)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _flights
        self._flights: dict[str, Flight] = {}

    def join(self, key: str, overdue: Flight | None = None) -> tuple[Flight, bool]:
        """Return the flight for a key, and whether the caller leads it and must finish it.

        A flight whose head is ``overdue`` gives way to another.
        """
        if overdue is not None:
            # It must not store what a POST may invalidate, once it is not known here any more.
            overdue.forbid_storing()
            self.remove(overdue)
        own = Flight(key)
        with self._lock:
            flight = self._flights.setdefault(key, own)
        return flight, flight is own

    def finish(self, flight: Flight, result: FlightResult, error: Exception | None = None,
               received: int | None = None) -> None:
        """Remove a flight, then report its result and its last bytes (invariant 3)."""
        self.remove(flight)
        flight.finish(result, error, received)

    def remove(self, flight: Flight) -> None:
        """Let no more requests join a flight."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]

    def invalidate(self, key: str) -> None:
        """Keep a key's running download from being stored, and from being joined."""
        with self._lock:
            flight = self._flights.pop(key, None)
        if flight is not None:
            flight.forbid_storing()

    def is_in_flight(self, key: str) -> bool:
        """Check whether a key is being downloaded."""
        return key in self._flights


class MemcachedClient:
    """Stores lease owners in one memcached server (memcached's doc/protocol.txt).

    After an error the server is left alone for MEMCACHED_BACKOFF seconds: calls fail at once.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._idle = collections.deque[Any]()  # buffered files of idle connections; its methods are atomic
        self._backoff_until = 0.0  # monotonic time; 0: the last call succeeded

    def add(self, key: str, owner: str) -> bool:
        """Set the owner of a key for LEASE_DURATION seconds if it has none.

        Returns whether the owner was set.  Raises OSError.
        """
        return self._ask("add %s 0 %d %d\r\n%s" % (key, LEASE_DURATION, len(owner), owner))[0] == "STORED"

    def holder(self, key: str) -> tuple[str, str]:
        """Return the owner of a key, "" for none, and the unique number for cas().  Raises OSError."""
        words = self._ask("gets %s" % key)
        return (words[5], words[4]) if len(words) == 7 else ("", "")

    def cas(self, key: str, owner: str, unique: str, seconds: int) -> bool:
        """Extend a key by ``seconds`` (negative: delete it) if nobody has written it since holder().

        Returns whether the key was written.  Raises OSError.
        """
        return self._ask("cas %s 0 %d %d %s\r\n%s" % (key, seconds, len(owner), unique, owner))[0] == "STORED"

    def close(self) -> None:
        """Close idle connections."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _ask(self, command: str) -> list[str]:
        """Send a command; return the words of the response, which ends with the data and END if it has data.

        Raises OSError.
        """
        if time.monotonic() < self._backoff_until:
            raise OSError(errno.EHOSTUNREACH, "memcached was unreachable a moment ago")
        try:
            words = self._exchange((command + "\r\n").encode("ascii"))
        except OSError as error:
            until = time.monotonic() + MEMCACHED_BACKOFF
            failed_before, self._backoff_until = self._backoff_until > 0, until
            if not failed_before:
                log.warning("Cannot reach memcached at %s:%d (%s). Each instance downloads on its own.",
                            *self._address, error)
            raise
        failed_before, self._backoff_until = self._backoff_until > 0, 0.0
        if failed_before:
            log.warning("memcached at %s:%d works again.", *self._address)
        return words

    def _exchange(self, message: bytes) -> list[str]:
        # The server may have closed an idle connection: then a new one is tried.
        with contextlib.suppress(IndexError, OSError):
            return self._exchange_on(self._idle.pop(), message)
        with socket.create_connection(self._address, MEMCACHED_TIMEOUT) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._exchange_on(sock.makefile("rwb"), message)

    def _exchange_on(self, file: Any, message: bytes) -> list[str]:
        """Send a command and read the response; keep the connection if that was complete."""
        with contextlib.ExitStack() as stack:
            stack.callback(file.close)
            file.write(message)
            file.flush()
            words = self._read_words(file)
            if words[0] == "VALUE":
                words += self._read_words(file) + self._read_words(file)  # the data, END
            if words[-1] not in ("STORED", "NOT_STORED", "EXISTS", "NOT_FOUND", "END"):
                raise OSError(errno.EPROTO, "memcached says %s" % " ".join(words))
            if len(self._idle) < POOL_SIZE:
                self._idle.append(file)
                stack.pop_all()
        return words

    def _read_words(self, file: Any) -> list[str]:
        line = file.readline(MAX_LINE).decode("latin-1")
        if not line.endswith("\r\n") or not line.strip():
            raise ConnectionResetError(errno.ECONNRESET, "memcached closed the connection")
        return str(line).split()


class Lease(NamedTuple):
    """The right to download a key, as far as other instances are concerned."""

    owner: str  # suffix of the partial file; "": there are no leases, and the lock on the file decides
    exclusive: bool  # False: other instances may have it, too, because memcached could not be asked


class LeaseManager:
    """Grants leases among instances, through memcached.

    Without memcached servers the locks on partial files decide, and if they do not work either, each instance
    downloads on its own.

    A lease lapses after LEASE_DURATION seconds, so that the followers of a dead instance can take over.  One
    thread renews all leases of this process every LEASE_RENEWAL_INTERVAL seconds.  An instance that was
    suspended for longer may find its lease taken; then it must not store its download (is_lost).
    """

    def __init__(self, servers: tuple[tuple[str, int], ...], alone: bool) -> None:
        self._servers = [MemcachedClient(address) for address in servers]
        self.uses_memcached = bool(servers)
        self._alone = alone  # whether locks do not work, so that without servers each instance is on its own
        self._lock = threading.Lock()  # guards _held
        self._held: dict[str, str | None] = {}  # by owner: the key; None once the lease was lost
        self._stop = threading.Event()
        if servers:
            threading.Thread(target=self._renew_all, daemon=True).start()

    def holder(self, key: str) -> str:
        """Return the owner of a key's lease, "" if there is none or memcached cannot be reached."""
        with contextlib.suppress(OSError, IndexError):
            server, name = self._server(key)
            return server.holder(name)[0]
        return ""

    def acquire(self, key: str) -> Lease | None:
        """Return the lease of a key, which the caller must release(); None if another instance has it."""
        if not self._servers and not self._alone:
            return Lease("", True)
        with contextlib.suppress(OSError, IndexError):  # no servers, or out of reach
            owner, ours = self.try_acquire(key)
            return Lease(owner, True) if ours else None
        return Lease(secrets.token_hex(8), False)

    def try_acquire(self, key: str) -> tuple[str, bool]:
        """Return the owner of a key's lease, and whether the caller has just become it.

        The owner is "" if another one's lease has lapsed at this moment: the next attempt may get it.  Raises
        OSError if memcached cannot be reached.
        """
        server, name = self._server(key)
        owner = secrets.token_hex(8)
        if not server.add(name, owner):
            return server.holder(name)[0], False
        with self._lock:
            self._held[owner] = key
        return owner, True

    def release(self, key: str, owner: str) -> None:
        """Give up a lease, if the caller has it."""
        with self._lock:
            held = self._held.pop(owner, None)
        if held is not None:
            with contextlib.suppress(OSError):
                self._renew(key, owner, -1)

    def is_lost(self, owner: str) -> bool:
        """Check whether another instance has taken this owner's lease."""
        return self._held.get(owner, "") is None

    def close(self) -> None:
        """Stop renewing leases."""
        self._stop.set()
        for server in self._servers:
            server.close()

    def _server(self, key: str) -> tuple[MemcachedClient, str]:
        """Return the server that all instances ask about a key, and the key's name there."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._servers[int(digest, 16) % max(1, len(self._servers))], "pkgproxy:" + digest

    def _renew_all(self) -> None:
        while not self._stop.wait(LEASE_RENEWAL_INTERVAL):
            for owner, key in self._held.copy().items():
                with contextlib.suppress(OSError):
                    if key is not None and not self._renew(key, owner, LEASE_DURATION):
                        with self._lock:
                            if owner in self._held:  # not released meanwhile
                                self._held[owner] = None

    def _renew(self, key: str, owner: str, seconds: int) -> bool:
        """Extend a lease, or end it (negative ``seconds``).  Returns False if it is lost.  Raises OSError."""
        server, name = self._server(key)
        holder, unique = server.holder(name)
        if holder == owner:
            return server.cas(name, owner, unique, seconds)
        return seconds > 0 and not holder and server.add(name, owner)  # memcached was restarted


class OrphanLimiter:
    """Limits how many downloads continue without a client: the oldest ones may, if they are fast enough.

    A client that breaks off often comes back for the same file, so its download should not be lost.  But a
    client could start downloads and leave, again and again, and each holds a thread, a connection and disk
    space.  What a stopped download has received is kept for the next request (see ``keep_for_resume``).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards _orphans
        # Time (monotonic) and size of each at its last speed check.
        self._orphans: dict[PartialFile, tuple[float, int]] = {}

    def may_continue(self, partial: PartialFile) -> bool:
        """Return whether a download may continue: it has clients, or it is one of the permitted orphans."""
        has_readers, now = partial.reader_count() > 0, time.monotonic()
        with self._lock:
            since, size = self._orphans.get(partial, (now, partial.size))
            check_due = now - since > RATE_WINDOW
            if has_readers or check_due and partial.size - size < MIN_RATE * (now - since):
                self._orphans.pop(partial, None)
                return has_readers
            if check_due or partial not in self._orphans and len(self._orphans) < self._limit:
                self._orphans[partial] = now, partial.size
            return partial in self._orphans

    def remove(self, partial: PartialFile) -> None:
        """Forget a download that has ended."""
        self._orphans.pop(partial, None)


def start_thread(work: Callable[..., object], *arguments: Any) -> None:
    """Run ``work`` in a new daemon thread; raise StorageError if the system allows no further thread."""
    try:
        threading.Thread(target=work, args=arguments, daemon=True).start()
    except RuntimeError as error:
        raise StorageError(OSError(errno.ENOMEM, str(error))) from None


# ---------------------------------------------------------------------------------------------
# 8 Sockets
# ---------------------------------------------------------------------------------------------


class RecentEvents:
    """When something last happened to a host, a file or a client, and why: failures, attempts, log lines.

    A span of time is given when asking, not when recording, so that one record serves several questions.

    Methods for the caller: note, note_first, find, gather, forget.  Safe for use by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards _events
        self._events: dict[str, tuple[float, str]] = {}  # by name: monotonic time and reason; oldest first

    def note(self, name: str, reason: str = "", ahead: float = 0.0) -> None:
        """Record that the event happens to ``name`` now, or ``ahead`` seconds later: until then, its age is
        below 0."""
        with self._lock:
            if len(self._events) >= MAX_EVENTS:
                self._events.clear()  # costs a few repeated attempts or log lines, but bounds the memory
            self.forget(name)  # moves the name to the end
            self._events[self._key(name)] = time.monotonic() + ahead, reason[:MAX_MEMOIZED]

    def note_first(self, name: str, span: float) -> bool:
        """Record the event and return True, unless it happened in the last ``span`` seconds."""
        with self._lock:  # of several threads that ask at once, exactly one gets True
            is_first = self.find(name, span) is None
            if is_first:
                self.note(name)
            return is_first

    def find(self, name: str, span: float) -> tuple[float, str] | None:
        """Return the event's age in seconds and its reason; None if it is ``span`` seconds old or older."""
        return next((row[1:] for row in self.gather(span, name)), None)

    def gather(self, span: float, *names: str) -> list[tuple[str, float, str]]:
        """Return (name, age in seconds, reason) of events younger than ``span`` seconds, the newest last.

        ``names`` limits the result to these names; without any, all are returned.
        """
        now = time.monotonic()
        with self._lock:
            keys = map(self._key, names or self._events)
            rows = [(key, *self._events[key]) for key in keys if key in self._events]
        return [(name, now - when, reason) for name, when, reason in rows if now - when < span]

    def forget(self, *names: str) -> None:
        """Remove the events of these names."""
        with self._lock:
            for name in names:
                self._events.pop(self._key(name), None)

    def _key(self, name: str) -> str:
        # Clients choose the length of names, and MAX_EVENTS times the longest URL would be 160 MB.
        return name if len(name) <= MAX_MEMOIZED else hashlib.sha256(name.encode()).hexdigest()


def wait_until_ready(sock: socket.socket, timeout: float, writing: bool = False) -> bool:
    """Wait up to ``timeout`` seconds until a socket can be read (or written); return whether it can.

    A socket that has failed or was closed by the peer counts as ready.
    """
    # Not select(), if possible, since it ends at descriptor 1023; epoll would need more system calls.
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        selector.register(sock, selectors.EVENT_WRITE if writing else selectors.EVENT_READ)
        return bool(selector.select(timeout))


def is_open_and_silent(sock: socket.socket) -> bool:
    """Return whether a connection is open and has no unread bytes."""
    try:
        return not wait_until_ready(sock, 0)
    except (OSError, ValueError):
        return False


def time_left(deadline: float | None, limit: float) -> float:
    """Return the seconds that a step may take: ``limit``, but no longer than until a monotonic deadline.

    Raise socket.timeout if the deadline has passed.
    """
    left = limit if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")
    return min(left, limit)


class DeadlineReader(io.RawIOBase):
    """A raw stream over a socket whose reads respect an overall deadline.

    A socket's own timeout starts anew with every read, so a peer that sends one byte now and then would
    occupy a thread for ever.  Wrap the reader in io.BufferedReader.

    ``timeout`` limits the silence before each read, in seconds; ``prefetched`` are bytes that were already
    received from the socket.  A socket without TLS should be non-blocking: the reader then polls only if
    there is nothing to read, whereas Python's timeouts poll before each read.

    Methods for the caller: set_deadline.  Attributes: prefetched, on_idle.
    """

    def __init__(self, sock: socket.socket, timeout: float, prefetched: bytes = b"") -> None:
        super().__init__()
        self.prefetched = prefetched  # bytes not yet read
        self.on_idle: Callable[[], object] | None = None  # called if no byte comes for PUBLISH_DELAY seconds
        self._sock = sock
        self._timeout = timeout
        self._deadline: float | None = None  # monotonic

    def set_deadline(self, seconds_left: float | None) -> None:
        """Limit the time of all further reads together; None: only the time of each read."""
        self._deadline = None if seconds_left is None else time.monotonic() + seconds_left

    def readable(self) -> bool:
        """Return True (io.BufferedReader asks)."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read the bytes that are available into a buffer, after waiting for the first; socket.timeout."""
        if self.prefetched:
            size = min(len(buffer), len(self.prefetched))
            buffer[:size], self.prefetched = self.prefetched[:size], self.prefetched[size:]
            return size
        time_left(self._deadline, self._timeout)  # raises: even bytes that are there come too late
        if hasattr(self._sock, "pending"):  # TLS: part of a record may have arrived, so recv() may block
            if not self._sock.pending():
                self._wait()
            self._sock.settimeout(time_left(self._deadline, self._timeout))
        while True:
            try:  # first: on a busy connection, bytes are mostly there, and waiting would cost a system call
                return self._sock.recv_into(buffer)
            except BlockingIOError:
                self._wait()

    def _wait(self) -> None:
        """Wait until the socket has bytes; socket.timeout.

        on_idle is called once per wait, after PUBLISH_DELAY: the owner of a download then publishes what has
        arrived so far, so that other readers do not wait for a stalled origin's next byte.
        """
        if self.on_idle is not None:
            if wait_until_ready(self._sock, time_left(self._deadline, PUBLISH_DELAY)):
                return
            self.on_idle()
        if not wait_until_ready(self._sock, time_left(self._deadline, self._timeout)):
            raise socket.timeout("timed out")


def read_head_lines(file: io.BufferedIOBase) -> list[str]:
    """Read the lines of a head, without their CRLF, up to and without the empty line (RFC 9112 §2.1).

    Return [] if the stream ends before the first byte, and [""] if the first line is empty.  Raise
    HeadTooLargeError, or ValueError for a head that is cut off or has a line that does not end in CRLF: a
    bare LF, which a recipient may accept, is how one message is smuggled past another parser as two.
    """
    lines: list[str] = []
    total = 0
    while (line := file.readline(MAX_LINE + 2)) != b"\r\n":
        total += len(line)
        if not line and not lines:
            return []
        if not line.endswith(b"\r\n") and len(line) > MAX_LINE:
            raise HeadTooLargeError("a line is longer than %d bytes" % MAX_LINE, 431 if lines else 414)
        if not line.endswith(b"\r\n"):
            raise ValueError("a line ends without CR" if line.endswith(b"\n") else "the head is cut off")
        if total > MAX_HEAD:
            raise HeadTooLargeError("the head is longer than %d bytes" % MAX_HEAD)
        lines.append(line[:-2].decode("latin-1"))
    return lines or [""]


class ChunkedReader:
    """Decodes a chunked body (RFC 9112 §7.1) and drops its trailers; http.client's decoder is too lax.

    Method for the caller: read.  Attribute: ended (whether the last chunk and the trailers were read).
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.ended = False
        self._file = file
        self._left = 0  # bytes of the current chunk
        self._allowance = MAX_HEAD  # bytes of framing that may still come; each byte of data adds two

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, or b"" after the last chunk.

        Raise ValueError if the framing is invalid or far larger than the data: extensions and one-byte
        chunks must not cost more work than the body is worth.
        """
        if self.ended:
            return b""
        data = (b"" if self._left else self._read_small_chunks(size)) or self._read_one_chunk(size)
        self._allowance += 2 * len(data)
        if self._allowance < 0:
            raise ValueError("the chunks are too small for their framing")
        return data

    def _read_small_chunks(self, size: int) -> bytes:
        """Join the chunks that are completely in the buffer: one by one, each would cost a write to disk."""
        buffered, pieces, position = self._file.peek(1), [], 0  # type: ignore[attr-defined]
        while match := _CHUNK_SIZE.match(buffered, position):
            length = int(match[1], 16)
            end = match.end() + length
            if not 0 < length <= size or buffered[end:end + 2] != b"\r\n":
                break
            pieces.append(buffered[match.end():end])
            self._allowance -= end + 2 - position - length
            size, position = size - length, end + 2
        self._file.read(position)
        return b"".join(pieces)

    def _read_one_chunk(self, size: int) -> bytes:
        """Return up to ``size`` bytes of the current chunk or, if it is used up, of the next one."""
        if not self._left:
            line = self._file.readline(MAX_LINE)
            self._left = parse_chunk_size(line)
            self._allowance -= len(line) + 2
        if not self._left:
            trailers = read_head_lines(self._file)
            if not trailers:
                raise ValueError("the body is cut off before its end")
            parse_fields(trailers if trailers != [""] else [])
            self.ended = True
            return b""
        data = self._file.read1(min(size, self._left))
        if not data:
            raise ValueError("a chunk is cut off")
        self._left -= len(data)
        if not self._left and self._file.read(2) != b"\r\n":
            raise ValueError("a chunk is longer than its declared size")
        return data


# ---------------------------------------------------------------------------------------------
# 9 Origin client
#
# A request to an origin takes this way:
#
#   OriginClient.fetch            follows redirects; one OriginRequest for each hop
#     _send_with_retry            a pooled connection, then a new one, then one without the parent proxy
#       OriginConnection.exchange   Resolver.resolve → AddressPolicy.filter → connect_fastest → TLS → request
#         OriginResponse              reads the head; the caller reads the body from it
#
# Its time limits, each within OriginRequest.deadline if that is set: DNS_TIMEOUT (getaddrinfo() has none),
# CONNECT_TIMEOUT for all addresses together and again for TLS, ORIGIN_TIMEOUT of silence for the head,
# FIRST_BYTES_TIMEOUT for a look at the beginning of the body, and ORIGIN_TIMEOUT of silence for each read of
# the body.
# ---------------------------------------------------------------------------------------------

FIRST_BYTES_TIMEOUT = 1.0  # seconds; they mostly come with the head, and tell whether a body is a page
Address = tuple[Any, ...]  # family, type, protocol, canonical name and socket address, as of getaddrinfo()


@dataclasses.dataclass(frozen=True)
class OriginRequest:
    """A request to an origin server."""

    method: str
    target: Target
    fields: Fields
    body: Readable | None = None
    length: int | None = 0  # of the body; None: chunked
    client_is_local: bool = False  # the client is on this host, so it may reach addresses of this host, too
    follow_redirects: bool = False  # except to HTML: see OriginClient.fetch
    deadline: float | None = None  # monotonic: for the response's head; None: only each step is limited
    client: str = ""  # the client's address
    timings: dict[str, float] | None = None  # those of the client's request (see mark())
    origins: tuple[str, ...] | None = None  # to which redirects may lead; None: all
    send_interim: Callable[[bytes], object] | None = None  # of the client's request; None: they are discarded

    def timeout_for(self, limit: float) -> float:
        """Return the seconds that a step with its own ``limit`` may take; socket.timeout."""
        return time_left(self.deadline, limit)

    @property
    def is_retryable(self) -> bool:
        """Whether the request may be sent twice: a safe method (RFC 9110 §9.2.2) and no body."""
        return self.body is None and self.method in ("GET", "HEAD", "OPTIONS")


def resolve_addresses(host: str, port: int) -> list[Address]:
    """Return the addresses of a host name, alternating between the families (RFC 8305 §4); OSError."""
    # As bytes: given a str, Python loads a megabyte of tables for names that are not ASCII.
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    families = [[address for address in found if (address[0] == found[0][0]) is is_first]
                for is_first in (True, False)]
    return [address for pair in itertools.zip_longest(*families) for address in pair if address]


class Resolver:
    """Resolves host names with a timeout and remembers addresses that failed.

    getaddrinfo() has no timeout, so each lookup runs in a thread of its own.  Requests for the same name
    share one lookup.  At most MAX_LOOKUPS are in progress, half of them for one client: a client that asks
    for names whose servers are silent does not use up the threads of the others.  At most
    MAX_LOOKUP_WAITERS requests of one client wait for lookups: each holds a thread, even if its client has
    left.  The limit is high, because a whole fleet behind one address may ask for the same mirror at once.

    Method for the caller: resolve.  Attribute: failures, to which connections add the addresses that failed.
    """

    def __init__(self) -> None:
        # Refused and broken connections, and silence: by address, or by the URL of a parent proxy.
        self.failures = RecentEvents()
        self._lock = threading.Lock()  # guards _lookups and _waiters
        self._waiters: collections.Counter[str] = collections.Counter()  # requests, by client network
        # Lookups in progress, by host and port, and the client network that started each.
        self._lookups: dict[tuple[str, int], tuple[concurrent.futures.Future[list[Address]], str]] = {}

    def resolve(self, host: str, port: int, timeout: float, client: str = "") -> list[Address]:
        """Return the addresses of a host, those that failed recently last.

        Raise OSError or UnicodeError if the host has none, socket.timeout, and OriginError (503) if too many
        lookups are in progress, in total or for this client, or too many of its requests wait for one.
        """
        network = client_network(client)
        if is_address(host):
            addresses = resolve_addresses(host, port)  # asks no name server
        else:
            try:
                addresses = self._look_up((host, port), network).result(timeout)
            except concurrent.futures.TimeoutError:
                raise socket.timeout("the name servers did not answer") from None
            finally:
                with self._lock:
                    self._waiters -= collections.Counter([network])  # drops zeros
        failed = self.failures.gather(ADDRESS_PENALTY, *[address[4][0] for address in addresses])
        ages = {name: age for name, age, _ in failed}
        return sorted(addresses, key=lambda address: -ages.get(address[4][0], math.inf))  # the latest last

    def _look_up(self, name: tuple[str, int], network: str) -> concurrent.futures.Future[list[Address]]:
        """Return the lookup of a name that is in progress, or start one, and count a waiter; OriginError."""
        with self._lock:
            self._waiters[network] += 1  # also if an error follows: resolve() undoes it
            if self._waiters[network] > MAX_LOOKUP_WAITERS:
                raise OriginError("Too many requests wait for host names to be resolved.", status=503)
            if name in self._lookups:
                return self._lookups[name][0]
            networks = [running for _, running in self._lookups.values()]
            if len(networks) >= MAX_LOOKUPS or networks.count(network) >= max(1, MAX_LOOKUPS // 2):
                raise OriginError("Too many host names are being resolved.", status=503)
            lookup: concurrent.futures.Future[list[Address]] = concurrent.futures.Future()
            try:
                start_thread(self._run, lookup, name)  # at its end, it waits for the lock
            except StorageError:
                raise OriginError("No thread is left to resolve a host name.", status=503) from None
            self._lookups[name] = lookup, network
            return lookup

    def _run(self, lookup: concurrent.futures.Future[list[Address]], name: tuple[str, int]) -> None:
        try:
            finish = functools.partial(lookup.set_result, resolve_addresses(*name))
        except (OSError, UnicodeError) as error:
            finish = functools.partial(lookup.set_exception, error)
        finally:
            with self._lock:
                del self._lookups[name]  # first, or a later request would get the result of this lookup
        finish()


def is_local_address(address: Address) -> bool:
    """Return whether a socket address belongs to this machine; OSError if that cannot be determined.

    No packet is sent.  bind() cannot tell: with Linux's ip_nonlocal_bind=1 it succeeds for any address, and
    /proc, which has that setting and the list of addresses, may be hidden.
    """
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback or ip.is_unspecified:
        return True
    with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            if ip.version == 4:  # the kernel accepts only the address of an interface here
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ip.packed)
                return True
            # To an own address, the kernel uses the same as source (RFC 6724 §5, rule 1).
            probe.connect(address)
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == ip
        except OSError as error:  # with IPv6: no route leads there, so the address is not of this machine
            if ip.version == 4 and error.errno != errno.EADDRNOTAVAIL:
                raise
            return False


def is_local_client(address: str) -> bool:
    """Return whether a client with this IP address is on this host; False if that cannot be determined."""
    with contextlib.suppress(OSError, ValueError):
        return is_local_address((address, 9))
    return False


def is_near(address: Address) -> bool:
    """Return whether only clients on this host may reach a socket address; OSError if that cannot be told."""
    return is_protected_address(address[0]) or is_local_address(address)


class AddressPolicy:
    """Decides which addresses the proxy may connect to (no loops, no internal hosts).

    | the address                       | client on this host | client elsewhere |
    |-----------------------------------|---------------------|------------------|
    | of this host, a listening port    | 508                 | 508              |
    | of this host, another port        | allowed             | 403              |
    | link-local, metadata service, ... | allowed             | 403              |
    | any other                         | allowed             | allowed          |

    The order defeats DNS rebinding: 1. resolve the name, 2. check each address, 3. connect to an address
    that was checked.  The name is not resolved again, so it cannot change between check and connection.

    Method for the caller: filter.  Attribute: listening_ports.
    """

    def __init__(self) -> None:
        self.listening_ports: set[int] = set()  # of this proxy

    def filter(self, addresses: list[Address], origin_request: OriginRequest,
               need_all: bool = False) -> list[Address]:
        """Return the addresses to which a request may go; ProxyError if all of them are refused.

        With ``need_all``, one that is refused is enough: a parent proxy on this host gets the name, and may
        connect to any of its addresses.
        """
        refusals = [self._refusal(address[4], origin_request.client_is_local) for address in addresses]
        allowed = [address for address, refusal in zip(addresses, refusals) if refusal is None]
        # The family that gives a 502 is missing for a parent on this host as well.
        fatal = [found for found in refusals if found and (not allowed or need_all and found[0] != 502)]
        if fatal:
            status, reason = fatal[0]
            raise ProxyError("%s %s." % (origin_request.target.authority, reason), status)
        return allowed

    def _refusal(self, address: Address, client_is_local: bool) -> tuple[int, str] | None:
        """Return the status and the reason for which an address is refused, or None."""
        listens_there = address[1] in self.listening_ports
        if client_is_local and not listens_there:
            return None
        is_local, is_refused = False, not client_is_local and is_protected_address(address[0])
        try:
            is_local = is_local_address(address)
        except OSError as error:  # an address family that this machine lacks, or no descriptor is left
            if not is_refused:
                status = 502 if error.errno == errno.EAFNOSUPPORT else 503
                return status, "cannot be checked: %s" % error.strerror
        if is_local and listens_there:
            return 508, "leads back to this proxy"
        if is_refused or is_local and not client_is_local:
            return 403, "is an address that only clients on the proxy's own host may reach"
        return None


def _start_connecting(address: Address, attempts: list[socket.socket]) -> None:
    """Add a socket that is connecting to an address; OSError."""
    family, kind, protocol, _, socket_address = address
    attempts.append(socket.socket(family, kind, protocol))
    attempts[-1].setblocking(False)
    code = attempts[-1].connect_ex(socket_address)
    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        raise OSError(code, os.strerror(code))


def connect_fastest(addresses: list[Address], timeout: float) -> socket.socket:
    """Return a connection to the address that answers first ("happy eyeballs", RFC 8305 §5).

    1. Start to connect to the first address.
    2. Wait for CONNECT_ATTEMPT_DELAY seconds, or until an attempt fails, and start with the next address; the
       attempts that are in progress go on.
    3. Return the first connection that succeeds and close the others.

    So an address that swallows packets (IPv6 without a route, say) does not use up the ``timeout``, which is
    for all together.  Raise the last error, or socket.timeout.
    """
    untried, deadline = list(addresses), time.monotonic() + timeout
    failure: OSError = socket.timeout("timed out")
    attempts: list[socket.socket] = []
    try:
        with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
            while untried or selector.get_map():
                if untried:
                    try:
                        _start_connecting(untried.pop(0), attempts)
                    except OSError as error:  # an address family that this machine lacks, say
                        failure = error
                        continue
                    selector.register(attempts[-1], selectors.EVENT_WRITE)
                patience = time_left(deadline, CONNECT_ATTEMPT_DELAY if untried else timeout)
                for key, _ in selector.select(patience):
                    sock: socket.socket = key.fileobj  # type: ignore[assignment]
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        attempts.remove(sock)
                        sock.settimeout(timeout)
                        return sock
                    failure = OSError(code, os.strerror(code))
        raise failure
    finally:
        for sock in attempts:
            sock.close()


def make_tls_context(ca_file: str | None) -> Any:
    """Return an ssl.SSLContext that trusts the system's certificates and those in a file; OSError.

    ssl is imported only here: it costs 20 ms and some MB, and many proxies never meet an https origin.
    Verification cannot be turned off.
    """
    try:
        import ssl
    except ImportError:
        raise OSError(errno.EPROTONOSUPPORT, "this Python has no TLS (no ssl module)") from None
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file:
        context.load_verify_locations(ca_file)
    return context


# OpenSSL's words for bytes that are not TLS, which depend on its version and on the bytes.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL",
           "HTTP_REQUEST", "BAD_RECORD_TYPE")


def explain_error(error: Exception) -> str:
    """Return the reason of a connection's error, in words for a client."""
    refusal = getattr(error, "verify_message", "").rstrip(".")  # of ssl.SSLCertVerificationError
    if refusal:
        is_unknown = re.search("self|issuer", refusal)
        remedy = " (the operator can add its issuer with --ca-file)" if is_unknown else ""
        return "its certificate is not trusted: %s%s" % (refusal, remedy)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text[0].lower() + text[1:] if text[1:2].islower() else text  # the system's begin with a capital
    # "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)": only the words in the middle
    return re.sub(r"^\[[A-Z0-9_: ]+\] |^_ssl\.c:\d+: | \(_ssl\.c:\d+\)", "", text)


def render_request_head(method: str, target: str, fields: Fields) -> bytes:
    """Return a request's head as sent (RFC 9112 §3, §5).

    ValueError if a part contains what would end it: then the origin would read another request, or two.
    """
    lines = ["%s %s HTTP/1.1" % (method, target.encode("ascii").decode() or "/"), *map(": ".join, fields)]
    if _NO_TEXT.search("".join(lines)) or lines[0].count(" ") != 2:
        raise ValueError("a control character in the request")
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def connect_through_parent(sock: socket.socket, parent: ParentProxy, target: Target) -> None:
    """Make a parent proxy open a tunnel to an origin (RFC 9110 §9.3.6); OSError, ValueError."""
    authority = replace_fields(target, path="").authority  # that of a tunnel always has a port
    sock.sendall(render_request_head("CONNECT", authority, (("Host", authority), *parent.fields)))
    reader = DeadlineReader(sock, ORIGIN_TIMEOUT)
    reader.set_deadline(sock.gettimeout())
    with io.BufferedReader(reader, 1) as file:  # reads nothing beyond the head: the rest belongs to TLS
        lines = read_head_lines(file)
    if not lines or parse_status_line(lines[0])[1] // 100 != 2:
        raise ValueError("it answered CONNECT with '%s'" % "".join(lines[:1]))


def is_answered_before_body(sock: socket.socket, origin_request: OriginRequest) -> bool:
    """Return whether the origin answers Expect: 100-continue with a final status (RFC 9110 §10.1.1).

    An origin that does not answer may not know the field: after CONTINUE_TIMEOUT, it gets the body.
    """
    is_asked = list_members(origin_request.fields, "Expect") == ["100-continue"]
    if not is_asked or hasattr(sock, "pending") or not wait_until_ready(sock, CONTINUE_TIMEOUT):
        return False  # TLS has no MSG_PEEK
    status = sock.recv(len("HTTP/1.1 1"), socket.MSG_PEEK)[9:]
    return status not in (b"1", b"")


class OriginResponse:
    """A response from an origin; checks that its body has the declared length.

    The response owns its connection: 1. The constructor reads the head.  2. The caller reads the body.
    3. At its end, or when close() is called before, the connection goes back to the pool or is closed, once.

    Methods for the caller: read, read_ahead, on_idle, set_length, close.  Attributes: head, length, start,
    end_is_known.
    """

    start = 0  # offset of the first byte in the representation; not 0 only for a verified remainder
    _left: int | None = None  # bytes of the body that are unread; None: unknown

    def __init__(self, connection: OriginConnection) -> None:
        """Read the final head; ValueError, OSError."""
        sock, origin_request = connection.sock, connection.origin_request
        self._connection = connection
        self._reader = DeadlineReader(sock, ORIGIN_TIMEOUT)
        self._file = io.BufferedReader(self._reader, 64 * 1024)
        if sock.gettimeout() and not hasattr(sock, "pending"):  # not TLS
            sock.setblocking(False)  # DeadlineReader waits instead
        # The deadline is for the whole head, interim responses included: each line could arrive just in time.
        self._reader.set_deadline(origin_request.timeout_for(ORIGIN_TIMEOUT))
        while True:
            lines = read_head_lines(self._file)
            if not lines:
                raise ConnectionResetError("it closed the connection without a response")
            version, status, reason = parse_status_line(lines[0])
            fields = parse_fields(lines[1:])
            if status >= 200:  # otherwise an interim response: 100, 103 (RFC 9110 §15.2)
                break
            if status == 101:
                raise ValueError("it switched protocols without being asked")
            if status > 101 and origin_request.send_interim:
                fields = without_fields(end_to_end(fields), ("set-cookie",))
                origin_request.send_interim(render_head(ResponseHead(status, reason, ()), fields))
        mark(origin_request.timings, "origin head")
        self.head = with_date(ResponseHead(
            status, reason, fields, final_uri=origin_request.target.uri, request_time=connection.request_time,
            response_time=time.time(), local_clients_only=connection.guarded), time.time())
        self._find_body(version, fields)
        if status < 300 and self._left != 0:
            self._reader.set_deadline(FIRST_BYTES_TIMEOUT)
            # A reset is reported only once: a body that ends with it would seem complete.
            with contextlib.suppress(OSError if self.end_is_known else socket.timeout):
                self.head = replace_fields(self.head, is_page=begins_page(self._file.peek(1)))
        self._reader.set_deadline(None)

    def _find_body(self, version: tuple[int, int], fields: Fields) -> None:
        """Determine where the body ends (RFC 9112 §6.3) and whether the connection persists (§9.3).

        1. HEAD, 204 and 304 have no body, whatever their fields say.
        2. Transfer-Encoding together with Content-Length is an error here, as it may be an attempt to smuggle
           a response (rule 3 would let the former win).
        3. Chunked: up to the last chunk.
        4. Content-Length: so many bytes.
        5. Neither: up to the end of the connection.  Such a body is passed on, but never stored.
        """
        chunked, declared = is_chunked(fields), content_length(fields)
        if chunked and (version < (1, 1) or declared is not None):
            raise ValueError("Transfer-Encoding with HTTP/1.0 or with Content-Length")
        has_no_body = self._connection.origin_request.method == "HEAD" or self.head.status in (204, 304)
        self.length = self._left = 0 if has_no_body else declared  # bytes of the body; None: unknown
        self._chunks = ChunkedReader(self._file) if chunked and not has_no_body else None
        # Whether a complete body can be told from one that was cut off; not so in case 5.
        self.end_is_known: bool = self._chunks is not None or self.length is not None
        options = list_members(fields, "Connection")
        is_kept = "close" not in options and (version >= (1, 1) or "keep-alive" in options)
        # If a response without body declares one, some origins send it all the same.
        is_doubtful = has_no_body and (chunked or declared)
        self._is_persistent = is_kept and self.end_is_known and not is_doubtful  # another response may follow

    def read(self, size: int = COPY_SIZE) -> bytes:
        """Return up to ``size`` bytes of the body as they arrive, b"" at its end.

        Raise OriginTimeoutError, or TruncatedBodyError if the body ends early or its framing is invalid.
        """
        if self._file.closed or self._left == 0:
            self.close()
            return b""
        limit = size if self._left is None else min(size, self._left)
        try:
            data = self._chunks.read(limit) if self._chunks else self._file.read1(limit)
            if not data and self._left:
                raise ValueError("it ended %d bytes early" % self._left)
        except (OSError, ValueError) as error:
            self._connection.origin_client.resolver.failures.note(self._connection.peer_address)
            if isinstance(error, (socket.timeout, TimeoutError)):
                raise OriginTimeoutError("The origin stopped sending.") from None
            raise TruncatedBodyError("The response from the origin broke off: %s." % error) from None
        self._connection.origin_client.count(len(data))
        if self._left is not None:
            self._left -= len(data)
        if self._left == 0 or not data:
            self._left = 0
            mark(self._connection.origin_request.timings, "origin end")
            self.close()  # at once: others can use the connection before the caller asks for more
        return data

    def read_ahead(self, limit: int, timeout: float) -> bytes:
        """Receive a body of up to ``limit`` bytes, and keep it for the reads that follow.

        Return b"" if it is longer, or if not all of it came within ``timeout`` seconds.
        """
        if self._left is None or self._left > limit:
            return b""
        body = bytearray()
        self._reader.set_deadline(timeout)
        with contextlib.suppress(OSError):  # the next read meets a failure again
            while len(body) < self._left and (data := self._file.read1(self._left - len(body))):
                body += data
        self._reader.set_deadline(None)
        self._file.detach()  # which may have buffered bytes beyond the body: they must not come before it
        self._file, self._reader.prefetched = io.BufferedReader(self._reader, 64 * 1024), bytes(body)
        return self._reader.prefetched if len(body) == self._left else b""

    def on_idle(self, call: Callable[[], object]) -> None:
        """Set a function to be called if nothing arrives for PUBLISH_DELAY seconds."""
        self._reader.on_idle = call

    def set_length(self, length: int) -> None:
        """Set the body's length in bytes, which is known from Content-Range, however the body is framed."""
        self.length = self._left = length
        self.end_is_known = True

    def close(self) -> None:
        """Give the connection back; it is closed if it has unread bytes."""
        if not self._file.closed:
            self._file.close()
            at_end = self._left == 0 and (self._chunks is None or self._chunks.ended)
            self._connection.release(at_end and self._is_persistent)


class OriginConnection:
    """A connection to an origin server, direct or through a parent proxy.

    Methods for the caller: exchange, connect_tcp, bypass_parent, release, close.  Attribute: sock.
    """

    reached = established = False  # whether it is connected: without TLS, and with TLS if the URL has https

    def __init__(self, origin_client: OriginClient, origin_request: OriginRequest) -> None:
        target = origin_request.target
        # TCP or TLS; None: not connected.  Without TLS it is non-blocking once a response has been read.
        self.sock: Any = None
        self.origin_client = origin_client
        self.parent = parent_proxy_for(target, origin_client.config)  # None: direct
        self.origin_request = origin_request  # the current one, or the last
        self.pool_key = (target.scheme, target.host, target.port, origin_request.client_is_local, self.parent)
        self.request_time = 0.0  # time.time() when it was sent
        self.blamed_name = target.authority  # the party to name in an error
        self.peer_address = ""  # IP address of the origin or parent
        self.guarded = False  # whether only clients on this host may reach the origin's address
        self.idle_since = 0.0  # monotonic
        self._is_reusable = True  # whether the check of the target is valid for the next request, too

    def exchange(self, origin_request: OriginRequest) -> OriginResponse:
        """Send a request, after connecting if necessary, and return the response once its head has arrived.

        Raise OSError or ValueError, and close the connection; ProxyError if the address is not allowed.
        """
        self.origin_request, self.request_time = origin_request, time.time()
        body, length = origin_request.body, origin_request.length
        try:
            if self.sock is None:
                self.connect()
                mark(origin_request.timings, "connected")
            target, fields = origin_request.target.path, origin_request.fields
            # A parent that is not a tunnel gets the absolute form (RFC 9112 §3.2.2).
            if self.parent is not None and origin_request.target.scheme == "http":
                uri, fields = origin_request.target.uri, fields + self.parent.fields
                target = uri.rstrip("*") if target == "*" else uri
            self._send(render_request_head(origin_request.method, target, fields))
            if body is not None and not is_answered_before_body(self.sock, origin_request):
                # An origin that rejects the body (413, say) may respond and close before it has read all.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    while data := body.read(COPY_SIZE):  # as new chunks if the length is unknown (§7.1)
                        self._send(b"%x\r\n%s\r\n" % (len(data), data) if length is None else data)
                    self._send(b"0\r\n\r\n" if length is None else b"")
            response = OriginResponse(self)
            if response.head.status == 407 and self.parent is not None:
                self.blamed_name = "the parent proxy " + self.parent.place.authority
                raise PermissionError(errno.EACCES, "it requires another user name or password")
            return response
        except BaseException:
            self.close()
            raise

    def _send(self, data: bytes) -> None:
        """Send all of ``data``; OSError.  A pooled connection takes a head without a wait."""
        sent = 0
        if not self.sock.gettimeout():  # it is non-blocking
            with contextlib.suppress(BlockingIOError):
                sent = self.sock.send(data)
        if sent < len(data):
            self.sock.settimeout(self.origin_request.timeout_for(ORIGIN_TIMEOUT))
            self.sock.sendall(data[sent:])

    def connect(self) -> None:
        """Open the connection, with TLS for https; OSError, ProxyError."""
        self.reached = self.established = False
        self.connect_tcp()
        self.reached = True
        if self.origin_request.target.scheme == "https":
            self.sock.settimeout(self.origin_request.timeout_for(CONNECT_TIMEOUT))
            name = self.origin_request.target.host  # without a trailing dot, as RFC 6066 §3 demands
            self.sock = self.origin_client.tls_context.wrap_socket(self.sock, server_hostname=name)
        self.established = True

    def connect_tcp(self) -> None:
        """Open the connection without TLS, through the parent proxy if there is one; OSError, ProxyError."""
        if self.parent is not None:
            try:
                self._connect_parent(self.parent)
                return
            except (OSError, ValueError) as error:
                if self.sock is None:  # the parent itself failed, not the origin behind it
                    self.origin_client.resolver.failures.note(self.parent.place.uri)
                if not self.bypass_parent(error):
                    raise
        self._open(self._resolve(self.origin_request), CONNECT_TIMEOUT)
        # For clients on other machines, _resolve() has refused such an address.
        self.guarded = self.origin_request.client_is_local and is_near(self.sock.getpeername())

    def bypass_parent(self, error: Exception) -> bool:
        """Stop using the parent proxy, which has failed, if that is configured; return whether it is."""
        if self.parent is None or not self.parent.or_direct:
            return False
        log.debug("Going without %s: %s.", self.blamed_name, explain_error(error))
        self.close()
        self.parent, self.blamed_name = None, self.origin_request.target.authority
        return True

    def _resolve(self, origin_request: OriginRequest, need_all: bool = False) -> list[Address]:
        """Return the addresses to which a request may go; OSError, ProxyError."""
        target, resolver = origin_request.target, self.origin_client.resolver
        timeout = origin_request.timeout_for(DNS_TIMEOUT)
        addresses = resolver.resolve(target.host, target.port, timeout, origin_request.client)
        return self.origin_client.guard.filter(addresses, origin_request, need_all)

    def _open(self, addresses: list[Address], limit: float) -> None:
        """Connect to the address that answers first; those before it in the list count as failed.

        So the next request does not wait CONNECT_ATTEMPT_DELAY for each of them again.
        """
        self.sock = connect_fastest(addresses, self.origin_request.timeout_for(limit))
        self.peer_address = self.sock.getpeername()[0]
        for slower in itertools.takewhile(lambda address: address[4][0] != self.peer_address, addresses):
            self.origin_client.resolver.failures.note(slower[4][0])
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _connect_parent(self, parent: ParentProxy) -> None:
        """Connect to a parent proxy and, for https, through it; OSError, ValueError, ProxyError."""
        if parent.or_direct and self.origin_client.resolver.failures.find(parent.place.uri, ORIGIN_BACKOFF):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "it failed a moment ago")
        target, self.blamed_name = self.origin_request.target, "the parent proxy " + parent.place.authority
        # The operator has chosen this address, so it may be an internal one; only loops are refused.
        parent_request = replace_fields(self.origin_request, target=parent.place, client_is_local=True)
        addresses = self._resolve(parent_request)
        self._check_target(any(is_local_address(address[4]) for address in addresses))
        self._open(addresses, PARENT_CONNECT_TIMEOUT if parent.or_direct else CONNECT_TIMEOUT)
        if target.scheme == "https":
            self.sock.settimeout(self.origin_request.timeout_for(CONNECT_TIMEOUT))
            connect_through_parent(self.sock, parent, target)
        self.blamed_name = target.authority

    def _check_target(self, parent_is_local: bool) -> None:
        """Check a target to which the parent proxy will connect; ProxyError.

        A parent on this host reaches everything that this host reaches, so the name is resolved here, too.  A
        parent on another machine resolves names itself; only numeric addresses are checked.  The parent
        resolves the name again for each request: if it changes in between, that goes unnoticed.
        """
        target, client_is_local = self.origin_request.target, self.origin_request.client_is_local
        is_numeric = is_numeric_host(target.host)
        must_resolve = is_numeric or parent_is_local and not client_is_local
        try:
            addresses = self._resolve(self.origin_request, parent_is_local) if must_resolve else []
        except (OSError, UnicodeError) as error:
            raise OriginError("%s cannot be checked, and the parent proxy is on this host: %s." % (
                target.authority, explain_error(error)), target) from None
        # A client on this host does not wait for the name server, so its name may lead to any address: the
        # response may be given only to other clients on this host.
        unchecked = parent_is_local and not is_numeric
        self.guarded = client_is_local and (unchecked or any(is_near(address[4]) for address in addresses))
        # Without a tunnel, the parent resolves the name again for the next request: it must be checked again.
        self._is_reusable = client_is_local or not unchecked or target.scheme == "https"

    def close(self) -> None:
        """Close the connection."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def release(self, at_message_end: bool) -> None:
        """Keep the connection for another request, if it is at the end of a response; close it otherwise."""
        # Some origins respond to HEAD with a body, which may arrive too late to be noticed.  Others go on
        # reading a request's body after they have rejected it.
        method, body = self.origin_request.method, self.origin_request.body
        if at_message_end and self._is_reusable and method != "HEAD" and body is None:
            self.origin_client.pool.release(self, time.monotonic())
        else:
            self.close()


class ConnectionPool:
    """Idle connections to origins, at most POOL_SIZE to one and POOL_TOTAL in all.

    A list is searched instead of a dictionary by key: it has few entries, and its order says which one to
    close.  Each use of it is one operation, so there is no lock: of several threads that choose a connection,
    the one that removes it has it.

    Methods for the caller: acquire, release, close_expired, close.
    """

    def __init__(self) -> None:
        self._idle: list[OriginConnection] = []  # the longest idle first

    def acquire(self, key: tuple[Any, ...], now: float) -> OriginConnection | None:
        """Take out a usable connection; ``now`` is monotonic.

        The most recently used comes first: it is the least likely to be closed by the origin at this moment,
        and the others can expire.
        """
        for connection in reversed(self._idle.copy()):
            if connection.pool_key == key and self._remove(connection):
                if now - connection.idle_since < POOL_IDLE_TIMEOUT and is_open_and_silent(connection.sock):
                    return connection
                connection.close()
        return None

    def release(self, connection: OriginConnection, now: float) -> None:
        """Put in a connection; if there are too many, the longest idle one is closed."""
        connection.idle_since = now
        self._idle.append(connection)
        idle = self._idle.copy()
        same_origin = [other for other in idle if other.pool_key == connection.pool_key]
        self._close(same_origin[:-POOL_SIZE] or idle[:-POOL_TOTAL])

    def close_expired(self, now: float) -> None:
        """Close connections that were idle for POOL_IDLE_TIMEOUT seconds; ``now`` is monotonic."""
        self._close([other for other in self._idle.copy() if now - other.idle_since >= POOL_IDLE_TIMEOUT])

    def close(self) -> None:
        """Close all connections."""
        self._close(self._idle.copy())

    def _close(self, connections: list[OriginConnection]) -> None:
        for connection in filter(self._remove, connections):
            connection.close()

    def _remove(self, connection: OriginConnection) -> bool:
        """Take out a connection; False if another thread was faster."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
            return True
        return False


def redirected_request(origin_request: OriginRequest, location: Target) -> OriginRequest:
    """Return the request that follows a redirect; credentials never go to another host.  ProxyError."""
    check_target_allowed(location, origin_request.client_is_local, origin_request.origins)
    credentials = () if is_same_site(origin_request.target, location) else ("authorization", "cookie")
    fields = without_fields(origin_request.fields, ("host", *credentials))
    return replace_fields(origin_request, target=location, fields=(("Host", location.authority), *fields))


def resumable_body(head: ResponseHead, size: int | None, offset: int, ask: Callable[[int], OriginResponse],
                   response: OriginResponse | None = None, retry: bool = True
                   ) -> Generator[bytes, None, None]:
    """Yield a representation from ``offset`` to its end, over as many connections as it takes.

    ``head`` is the representation's, ``size`` its length if that is known.  The bytes come from ``response``
    (closed at the end) if it is given, then from the responses that ``ask(offset)`` fetches.  After each
    failure comes one of the RESUME_BACKOFF pauses; a response that delivered FULL_DOWNLOAD_RANGE bytes makes
    all of them available again.  Raise OriginError if no pause is left or the rest cannot be requested.
    Without ``retry`` there are no pauses, so the first failure is the last.
    """
    pauses = list(RESUME_BACKOFF) if retry else []
    while True:
        began_at = offset
        try:
            with contextlib.closing(response or ask(offset)) as source:
                while data := source.read(COPY_SIZE):
                    offset += len(data)
                    yield data
            if size in (None, offset):
                return
            raise TruncatedBodyError("The origin sent less than the remaining bytes.")
        except OriginError as error:
            if retry and offset >= began_at + FULL_DOWNLOAD_RANGE:
                pauses = list(RESUME_BACKOFF)
            cannot_resume = isinstance(error, CannotResumeError) or offset and resume_validator(head) is None
            if cannot_resume or not pauses:
                raise
        response = None
        time.sleep(pauses.pop(0))


class OriginClient:
    """Sends requests to origin servers and follows redirects.

    ``count`` is called with the number of body bytes that arrive.  The resolver, the pool and the other
    attributes are shared by all connections.

    Methods for the caller: fetch, fetch_remainder, connect, is_open.
    """

    def __init__(self, count: Callable[[int], object], config: Config) -> None:
        self.count = count
        self.pool = ConnectionPool()
        self.resolver = Resolver()
        self.guard = AddressPolicy()
        self.config = config
        self._open_hosts = functools.lru_cache(LARGE_MEMO)(self._is_open)  # hits ask for it

    @functools.cached_property
    def tls_context(self) -> Any:
        """The ssl.SSLContext of all connections; OSError."""
        return make_tls_context(self.config.ca_file)

    def is_open(self, host: str) -> bool:
        """Return whether clients on other machines may reach a host; remembered for OPEN_FOR seconds."""
        return self._open_hosts(host, int(time.time() / OPEN_FOR))

    def _is_open(self, host: str, _period: int) -> bool:
        try:
            return not any(is_near(found[4]) for found in self.resolver.resolve(host, 80, DNS_TIMEOUT))
        except (OSError, UnicodeError):  # offline, no name resolves, and people bring the files
            return self.config.offline

    def fetch(self, origin_request: OriginRequest) -> OriginResponse:
        """Send a request, follow redirects if it asks for that, and return the response with its head read.

        If the redirects end at an HTML page, the first of them is returned instead: a captive portal
        redirects every request to its login page, and the user must see where that is.  Raise OriginError or
        ProxyError.
        """
        if origin_request.deadline is None and origin_request.is_retryable:
            origin_request = replace_fields(origin_request, deadline=time.monotonic() + RESPONSE_HEAD_TIMEOUT)
        first: OriginResponse | None = None  # redirect, still unread
        local_clients_only = behind_login = False
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = self._send_with_retry(origin_request)
                # An internal host on the way counts as well as one at the end.
                local_clients_only = local_clients_only or response.head.local_clients_only
                response.head = replace_fields(
                    response.head, local_clients_only=local_clients_only, behind_login=behind_login)
                follows = origin_request.follow_redirects
                location = redirect_target(response.head, origin_request.target) if follows else None
                if location is None:
                    if first is not None and response.head.status < 300 and is_html(response.head):
                        first, response = response, first
                        response.head = replace_fields(response.head, is_page=True)
                    mark(origin_request.timings if first else None, "redirected head")
                    return response
                first = first or response
                if response is not first:
                    response.close()
                has_password = field_value(origin_request.fields, "Authorization") is not None
                behind_login = behind_login or has_password and not permits_sharing(response.head)
                origin_request = redirected_request(origin_request, location)
        finally:
            if first is not None:
                first.close()
        raise OriginError("%s: more than %d redirects." % (origin_request.target.authority, MAX_REDIRECTS))

    def _send_with_retry(self, origin_request: OriginRequest) -> OriginResponse:
        """Send one request; retry if a pooled connection or the parent proxy fails.

        An origin may close an idle connection at any moment, so also just as a request is sent over it.  A
        request that may be repeated is then sent again over a new connection (RFC 9112 §9.3.1).
        """
        connection = OriginConnection(self, origin_request)
        is_retryable = origin_request.is_retryable
        pooled = self.pool.acquire(connection.pool_key, time.monotonic()) if is_retryable else None
        with self._translate_errors(connection, origin_request.target):
            if pooled is not None:
                # A timeout is not retried; the errors below speak of ``connection``.
                connection.peer_address, connection.established = pooled.peer_address, True
                # PermissionError is a parent's 407; ValueError is what remained unread on the connection.
                with contextlib.suppress(ConnectionError, PermissionError, ValueError):
                    return pooled.exchange(origin_request)
            try:
                return connection.exchange(origin_request)
            except (OSError, ValueError) as error:
                if not is_retryable or not connection.bypass_parent(error):
                    raise
            return connection.exchange(origin_request)

    def connect(self, target: Target, client_is_local: bool, client: str = "") -> socket.socket:
        """Return a TCP connection to a target, for a tunnel; OriginError, ProxyError."""
        deadline = time.monotonic() + RESPONSE_HEAD_TIMEOUT
        origin_request = OriginRequest(
            "CONNECT", target, (), client_is_local=client_is_local, deadline=deadline, client=client)
        connection = OriginConnection(self, origin_request)
        with self._translate_errors(connection, target), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.connect_tcp()
            stack.pop_all()
        return connection.sock  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _translate_errors(self, connection: OriginConnection, target: Target) -> Iterator[None]:
        """Turn errors of a request into OriginTimeoutError (504) or OriginError (502)."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.resolver.failures.note(connection.peer_address)
            failure = "The request to %s failed" if connection.reached else "Cannot connect to %s"
            kind, unreachable, reason = OriginError, not connection.reached, ": " + explain_error(error)
            if isinstance(error, (socket.timeout, TimeoutError)):
                kind, unreachable = OriginTimeoutError, not connection.established
                failure = "No answer from %s in time"
                reason = "" if str(error) in ("", "timed out") else reason
            elif isinstance(error, socket.gaierror):
                failure, reason = "Cannot resolve %s", "" if error.errno == socket.EAI_NONAME else reason
            elif getattr(error, "reason", "") in _NO_TLS:
                failure, reason = "%s does not speak TLS", ""
            raise kind("%s%s." % (failure % connection.blamed_name, reason), target, unreachable) from None

    def fetch_remainder(self, origin_request: OriginRequest, head: ResponseHead, size: int | None,
                        offset: int) -> OriginResponse:
        """Return the response with the rest, from ``offset``, of the representation that ``head`` describes.

        ``size`` is the representation's length, if known.  Raise OriginError if the origin cannot send it
        now, CannotResumeError if the response does not fit the bytes before ``offset``, or if ``head`` has no
        strong validator: then the origin could not say that the file has changed (RFC 9110 §13.1.5).
        """
        validator = strong_validator(head)
        if offset and validator is None:
            raise CannotResumeError("The download cannot be resumed: the origin sent no strong validator.")
        more = (("Range", "bytes=%d-" % offset), ("If-Range", validator or "")) if offset else ()
        fields = without_fields(with_coding_of(origin_request.fields, head), ("range", "if-range")) + more
        response = self.fetch(replace_fields(origin_request, fields=fields))
        status = response.head.status
        if says_not_now(status):
            response.close()
            raise OriginError("%s answers %d." % (origin_request.target.authority, status), status=status)
        if not is_remainder(response.head, head, size, offset):
            response.close()
            raise CannotResumeError("The download cannot be resumed: the file has changed on the origin.")
        part = content_range(response.head)
        if part is not None:
            response.set_length(part[1] - offset)
        response.start = offset
        return response


# ---------------------------------------------------------------------------------------------
# 10 Downloads
# ---------------------------------------------------------------------------------------------
#
# The way of a response that is stored.  One thread writes, any number of clients read:
#
#   origin ──► OriginResponse ──► Downloader.download ──► PartialFile ──► TailingBody ──► client
#                                        │                               ▲
#                                        └─ Flight.set_received ─────────┘ wakes the readers
#
# A small body that comes at once takes a short cut: the first client's own thread receives it into memory,
# calls Downloader.download, and sends it.  No thread is started, nothing is read back from the file, and the
# other clients notice no difference.
#
# If another instance is the writer, a PeerFollower in this process takes the place of the Downloader: it
# watches the other's partial file grow, and tells the flight.


@dataclasses.dataclass
class IterableBody:
    """A response body whose chunks come from an iterable: bytes, file slices, or an origin's response.

    TailingBody is the other kind of body, which must wait for its chunks.
    """

    length: int | None
    parts: Iterable[bytes | FileSlice]
    close: Callable[[], None] = lambda: None  # releases the file or the connection behind ``parts``
    origin_bytes: int = 0
    live: bool = False

    def chunks(self) -> Iterator[bytes | FileSlice]:
        """Yield the body in order."""
        return iter(self.parts)


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


def file_version(stored: StoredResponse) -> tuple[int, int, int]:
    """Return what changes when a file is removed, replaced or written to; OSError."""
    info = os.fstat(stored.fileno())
    return info.st_nlink, info.st_ctime_ns, info.st_size


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
    body: bytes = b""  # the whole body, if it was small and came at once


class TailingBody:
    """A response body read from a partial file while it grows.

    Every client of a flight reads one, also the client that started it:

    1. the writer appends bytes to the partial file, then calls ``Flight.set_received``;
    2. that wakes the readers, and each reads on from its own offset, as fast as its client takes it;
    3. the last bytes are announced only when the file is in its place (invariant 3).

    If the disk fails, or the download stands still or fails, each reader fetches the remainder from the
    origin, from its own offset (invariant 10).  If it fails, the leader's request may be why (invariant 12),
    so the leader itself does not ask again, and the others ask only once.
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
            elif self._download.body:
                yield self._download.body[slice(*span)]
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
            except (OriginError, StorageError, OSError) as error:
                if isinstance(error, OriginError) and not self._may_ask_despite(error):
                    raise
                if deadline is not None and getattr(error, "code", 0) == errno.ETIMEDOUT:
                    raise OriginTimeoutError("The first byte did not come in time.") from None
                yield from self._fetch_remainder(offset, stop, retry=not isinstance(error, OriginError))
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

    def _may_ask_despite(self, error: OriginError) -> bool:
        """Return whether this client's request may get what the leader's did not."""
        is_follower = self._download.response is None
        is_resumable = self._started and strong_validator(self._download.partial.head) is not None
        return is_follower and is_resumable and not error.unreachable

    def _fetch_remainder(self, offset: int, stop: int, retry: bool = True) -> Iterator[bytes]:
        """Yield the bytes from ``offset`` to ``stop`` straight from the origin, for this client alone."""
        partial = self._download.partial
        if self._started and resume_validator(partial.head) is None:
            raise CannotResumeError("The download cannot be resumed: no strong validator identifies it.")
        ask = functools.partial(
            self._origin.fetch_remainder, self._download.origin_request, partial.head, partial.length)
        pieces = resumable_body(partial.head, partial.length, offset, ask, retry=retry)
        with contextlib.closing(pieces):
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


# Fields that describe the very bytes of a body, and so not those of the same body in another form.
_BODY_FIELDS = ("content-length", "accept-ranges", "etag", "content-md5", "digest", "content-digest",
                "repr-digest")


def read_in_memory(body: ResponseBody) -> Iterator[bytes]:
    """Yield a body in order, with its file slices read."""
    for part in body.chunks():
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


def adapt_body(request: Request, response: Response) -> Response:
    """Return a response as its client can use it; the one place where other bytes are sent than are stored.

    - A gzipped index is decoded for a client that does not take gzip.  It is the same to that client, so its
      validators stay, the ETag as a weak one.
    - Links lead through the proxy if the client put the proxy's address before the URL.  A page with
      rewritten links has no validators, because the client may come by another address next time.
    """
    old, links = response.head, link_pattern_for(request, response.head)
    if not is_adapted(request, old):
        return response
    is_gzipped, takes_gzip = is_decodable(request, old), accepts_gzip(request)
    host, original, tag = field_value(request.fields, "Host"), response.body, field_value(old.fields, "ETag")

    def pieces() -> Iterator[bytes]:
        for data in read_in_memory(original):
            body.origin_bytes = original.origin_bytes
            yield data

    body = IterableBody(None, (), original.close)
    chunks = filter(None, decode_gzip(pieces())) if is_gzipped else pieces()
    fields = without_fields(old.fields, _BODY_FIELDS if takes_gzip else (*_BODY_FIELDS, "content-encoding"))
    if links is None:
        fields += (("ETag", "W/" + tag.removeprefix("W/")),) if tag else ()
    else:
        fields = without_fields(fields, ("last-modified",))
        chunks = rewrite_links(chunks, links, "http://%s/" % host if host else "/", request.target)
    body.parts = encode_gzip(chunks) if is_gzipped and takes_gzip else chunks
    return replace_fields(response, head=replace_fields(old, fields=fields), body=body)


# Responses to clients, by where their bodies come from


def response_from_store(request: Request, stored: StoredResponse, status: CacheStatus) -> Response:
    """Answer with a stored response, which the body closes: preconditions, ranges, Age (RFC 9111 §5.1)."""
    head = with_age(stored.head, time.time())
    selection = select_response(request, head, head.size)
    parts = [span if isinstance(span, bytes) else FileSlice(stored, *span) for span in selection.spans]
    body = IterableBody(selection.length, parts, stored.close, selection.overhead)
    return Response(selection.head, body, status)


def response_from_partial(request: Request, download: Download, origin: OriginClient, status: CacheStatus,
                          head: ResponseHead) -> Response:
    """Answer with a partial file while it grows; ``head`` is the head that this client may see.

    The caller has acquired the partial file, and the body releases it.
    """
    head = replace_fields(head, fields=with_field(head.fields, "Accept-Ranges", "bytes"))
    selection = select_response(request, head, download.partial.length)
    return Response(selection.head, TailingBody(download, selection, origin), status)


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
    """Describe a response whose body is a file of another mirror, or an adopted one."""
    detail = "same as " + head.same_as
    if head.sha256:  # found by its digest, so that the origin was not asked at all
        return CacheStatus(Outcome.SHARED, detail=detail)
    return CacheStatus(Outcome.SHARED, decision.forward, head.status, stored=True, detail=detail)


# What clients may have, and what origins are asked for


def look_up_for_client(store: Store, origin: OriginClient, request: Request) -> StoredResponse | None:
    """Look up the stored response for a request; None if there is none that its client may have.

    Responses that came from protected addresses are for clients on this host alone.  A body file without a
    head does not tell where it came from, so the address of its host is checked again.
    """
    stored = store.lookup(request.key)
    stored = verify_copy(store, stored) if stored is not None else None
    if stored is None or request.client_is_local:
        return stored
    if stored.head.local_clients_only or not (
            stored.described or origin.is_open(parse_target(request.key).host)):
        stored.close()
        return None
    return stored


def full_request(request: Request, config: Config, deadline: float | None = None,
                 stored: StoredResponse | None = None) -> OriginRequest:
    """Make the request for a whole representation that may be stored, whatever part the client asked for.

    ``stored`` is what it will validate.  If that is not coded, a gzipped form may replace it.
    """
    fields = origin_request_fields(request, config, identity=True)
    if stored is not None and (field_value(stored.head.fields, "Content-Encoding") or not stored.described):
        fields = with_coding_of(fields, stored.head)
    return OriginRequest(
        "GET", request.target, fields, origins=config.origins,
        client_is_local=request.client_is_local, client=request.client, deadline=deadline,
        follow_redirects=POLICIES[classify_name(request.key)].redirects, timings=request.timings,
        send_interim=request.send_interim)


def fetch_full(origin: OriginClient, origin_request: OriginRequest) -> OriginResponse:
    """Ask for a whole representation; OriginError, also if the response does not answer that."""
    response = origin.fetch(origin_request)
    status = response.head.status
    is_conditional = any(name.startswith("If-") for name, _ in origin_request.fields)
    if status in (206, 416) or status == 304 and not is_conditional:
        response.close()
        raise OriginError("%s answered %d to a plain request." % (origin_request.target.authority, status))
    return response


def fetch_rest(origin: OriginClient, origin_request: OriginRequest, request: Request,
               partial: PartialFile | None) -> OriginResponse | None:
    """Ask for what an earlier download lacks; None if nothing is left of one, or if it does not fit."""
    if partial is not None and partial.size and resume_validator(partial.head) \
            and may_share_download(request, partial.head):
        with contextlib.suppress(CannotResumeError):
            return origin.fetch_remainder(origin_request, partial.head, partial.length, partial.size)
    return None


def confirm_bare_file(origin: OriginClient, origin_request: OriginRequest, request: Request,
                      stored: StoredResponse, config: Config) -> ResponseHead | None:
    """Return the origin's head for a body file without one, if size and date show that it is the same.

    The answer to a HEAD tells them, so the file is not read.  Below the root, if its name tells versions
    apart, a file with a later date than the origin's is a copy that has lost its time.
    """
    response = origin.fetch(replace_fields(origin_request, method="HEAD"))
    response.close()
    head, size = response.head, content_length(response.head.fields)
    modified = parse_date(field_value(head.fields, "Last-Modified"))
    written = stored.head.mtime_ns // 10**9
    is_fixed = bool(stored.name) and is_immutable_name(request.key)
    same_date = modified is not None and (modified == written or is_fixed and modified < written)
    same = size == stored.head.size and same_date
    if not same or why_not_storable(replace_fields(request, method="GET"), head, config):
        return None
    return replace_fields(head, fields=storable_fields(head.fields), key=request.key,
                          vary=selecting_fields(request, head), size=stored.head.size,
                          mtime_ns=stored.head.mtime_ns, same_as=stored.head.same_as)


# Failures


def _site(target: Target) -> str:
    return "%s://%s" % (target.scheme, target.authority)


def is_site_down(request: Request, error: OriginError) -> bool:
    """Return whether a request's own origin, not one that a redirect led to, cannot be connected to."""
    return error.unreachable and (error.target is None or _site(error.target) == _site(request.target))


def _same_request(request: Request) -> str:
    """Return a name for requests that an origin cannot tell apart, if only their clients wrote them."""
    return "%s %r" % (request.key, _only(request.fields, _REFUSED_FIELDS))


# An origin may refuse a request because of these; refusals for other reasons are its answer to all clients.
_REFUSED_FIELDS = SHARED_FIELDS - {"authorization", "cache-control", "pragma"}


def check_believed(origin: OriginClient, look: OriginRequest, request: Request, stored: ResponseHead,
                   response: OriginResponse) -> None:
    """Raise OriginError, and close the response, if it is not believed: see why_not_believed().

    First, ``look`` follows a redirect that its client would follow: a captive portal's leads to a page at
    another host.  If that cannot be reached, the redirect is believed, because the client may reach it.
    """
    location = redirect_target(response.head, request.target)
    if location and not (response.head.is_page or is_html(stored) or is_same_site(request.target, location)):
        with contextlib.suppress(ProxyError), contextlib.closing(
                origin.fetch(redirected_request(look, location))) as end:
            is_page = end.head.is_page or end.head.status < 300 and is_html(end.head)
            response.head = replace_fields(response.head, is_page=is_page)
    if reason := why_not_believed(request, stored, response.head):
        response.close()
        final, wait = parse_target(response.head.final_uri), parse_retry_after(response.head)
        reason += " from " + ("origin" if _site(final) == _site(request.target) else final.authority)
        raise OriginError(reason + (", retry after %d s." % wait if wait else "."), final, retry_after=wait)


class RecentFailures:
    """Remembers which origins are not to be asked now, and disk errors (a circuit breaker).

    Only requests that a stored copy can answer are spared: all others are still sent to the origin, and show
    when it is back.

    ==========================================  ====================  ====================================
    failure                                     what is not asked     until
    ==========================================  ====================  ====================================
    no connection, after more than a second     the whole origin      it answers; a request in the
    silence and others that cost as much        this cache key        background asks it every 2 s
    a status with Retry-After                   this cache key, by    that time has passed, at most an hour
                                                the same client
                                                software
    any that came quickly                       nothing               the next request asks again
    any to a request with Authorization         nothing               the same
    ==========================================  ====================  ====================================

    All but the first may be the fault of this very request, which must not decide what clients get from the
    rest of the origin, nor what others get for longer than a look in the background takes (invariant 12).
    """

    def __init__(self, on_full_disk: Callable[[], None]) -> None:
        self._on_full_disk = on_full_disk
        # By scheme and authority, by cache key, or by _same_request(): in the future if it is not asked until
        # then.  All are shown on the status page.
        self._events = RecentEvents()
        self._disk_code: int | None = None  # the errno of the last failure
        self._disk = RecentEvents()  # "": the last disk error, until something is stored

    def reason_not_to_ask(self, request: Request) -> str:
        """Return why a request is not sent to its origin if a stored copy can answer; "" if it is."""
        events = self._events.gather(0.0, _same_request(request))
        return events[0][-1] if events else self.slow_origin(request)[1]

    def slow_origin(self, request: Request) -> tuple[str, str]:
        """Return what is not waited for, an origin or a cache key, and why; empty strings if nothing is.

        Requests of the proxy itself have no client, and wait: they look whether the origin is back.
        """
        events = self._events.gather(0.0, _site(request.target), request.key) if request.client else []
        return (events[0][0], events[0][-1]) if events else ("", "")

    def origin_failed(self, request: Request, error: OriginError, seconds: float) -> None:
        """Record that a cached copy is served because an origin failed after some seconds."""
        is_private = field_value(request.fields, "Authorization") is not None
        name = _site(request.target) if is_site_down(request, error) else request.key
        name += " with a password" if is_private else ""  # what others get does not depend on it
        is_slow = seconds > QUICK_FAILURE and not is_private
        is_new = self._events.find(name, ORIGIN_BACKOFF) is None
        if not error.unreachable:
            self._events.forget(_site(request.target))
        self._events.note(name, str(error), PROBE_INTERVAL + VALIDATION_TIMEOUT + 2 if is_slow else 0.0)
        log.log(logging.WARNING if is_new else logging.DEBUG, "%s: %s Serving the stored copy%s.",
                loggable_uri(request.uri), error, ", and asking again in the background" if is_slow else "")

    def note_retry_after(self, request: Request, error: OriginError) -> None:
        """Record for how long an origin asks to be left alone, before other requests follow this one."""
        if error.retry_after and field_value(request.fields, "Authorization") is None:
            self._events.note(_same_request(request), str(error), error.retry_after)

    def origin_answered(self, request: Request) -> None:
        """Forget the failures of an origin: it has answered."""
        self._events.forget(_site(request.target), request.key, _same_request(request))

    def disk_failed(self, error: StorageError) -> str:
        """Log a disk error once for each kind, and return the reason for Cache-Status."""
        if error.code == errno.EAGAIN:
            return "another download is storing it"
        if error.code == errno.EFBIG:  # others can be stored
            return "not stored: %s" % error
        is_new = self._disk.find("", math.inf) is None or self._disk_code != error.code
        self._disk.note("", str(error))
        self._disk_code = error.code
        if error.code == errno.ENOSPC:
            self._on_full_disk()
        remedy = {errno.ENOSPC: " Free some space.", errno.EACCES: " Let this user write the cache root.",
                  errno.EROFS: " Mount the cache root for writing."}.get(error.code or 0, "")
        remedy = " Raise --max-size if this lasts." if "--max-size" in str(error) else remedy
        log.log(logging.WARNING if is_new else logging.DEBUG,
                "Nothing can be stored: %s. Requests are still passed to the origins.%s", error, remedy)
        return "not stored: %s" % error

    def disk_recovered(self) -> None:
        """Record that a response was stored, which is a recovery if nothing has failed for a while: when
        space is short, large files fail and small ones do not."""
        if (last := self._disk.find("", math.inf)) and last[0] >= RECOVERY_PERIOD:
            self._disk.forget("")
            log.warning("The cache can be written again.")

    def disk_error(self) -> str:
        """Return why nothing could be stored lately, or "".

        An old error does not count: another process may have stored something since.
        """
        last = self._disk.find("", EVICTION_INTERVAL)
        return truncate_middle(last[1], 150) if last else ""

    def snapshot(self) -> list[dict[str, Any]]:
        """Describe the last failures of origins for the status page, the newest last."""
        events = self._events.gather(ORIGIN_BACKOFF)[-10:]
        return [{"origin": displayable_uri(name.partition(" ")[0]), "reason": truncate_middle(reason, 150),
                 "seconds": max(0, round(age))} for name, age, reason in events]


# The same file from another mirror


class LocalFileResponse(OriginResponse):
    """A stored file that is read as if an origin sent it, to make a copy of it.

    If it cannot be read to its end, or changes meanwhile, the copy is discarded (see resume_validator): the
    download begins anew at the origin if nothing was read yet, else each client that has no byte yet asks
    the origin for itself, and the others are cut off (invariant 7).
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


def _head_by_digest(request: Request, stored: StoredResponse,
                    expected: list[FileFacts]) -> ResponseHead | None:
    """Return the head of a body at another mirror, if the body has an expected digest.

    It has those of its fields that describe the file and not the mirror it came from.  Raises OSError.
    """
    # It is read, because the disk may have damaged it since it was stored.
    if why_unexpected(expected, stored.head.size, lambda name: str(hash_body(name, stored).hexdigest())):
        return None
    fields = _only(stored.head.fields, frozenset(("content-type", "last-modified", "date")))
    return replace_fields(stored.head, fields=fields, key=request.key, sha256=hex_digest(stored, "sha256"))


class MirrorDeduplicator:
    """Finds a file that is certainly the one requested, although it is not stored from the requested URL.

    If its digest is known, from its name or an index, that is any stored or adopted file of this digest, and
    no origin is asked.  Else it is an adopted file of the same name, if the origin confirms size and date.
    """

    def __init__(self, store: Store, origin: OriginClient, config: Config) -> None:
        self._store = store
        self._origin = origin
        self._adopted_folders = tuple(os.path.join(folder, "") for folder in config.adopt)

    def find_identical(self, request: Request, config: Config,
                       origin_request: OriginRequest | None = None) -> StoredResponse | None:
        """Find an identical file, under the head that it has at this mirror; None if there is none.

        Without ``origin_request``, the origin is not asked.
        """
        expected = [facts for facts in self._store.expected(request.key) if facts.algorithm]
        for stored in self._candidates(request):
            head = None
            with contextlib.suppress(OSError, OriginError):
                if expected:
                    head = _head_by_digest(request, stored, expected)
                elif origin_request is not None:
                    timely = replace_fields(origin_request, deadline=time.monotonic() + VALIDATION_TIMEOUT)
                    head = confirm_bare_file(self._origin, timely, request, stored, config)
            if head is not None:
                return replace_fields(stored, head=head)
            stored.close()
        return None

    def has_candidates(self, request: Request) -> bool:
        """Return whether any file might be identical."""
        stored = next(self._candidates(request), None)
        _close(stored)
        return stored is not None

    def _candidates(self, request: Request) -> Iterator[StoredResponse]:
        """Open files of an expected digest, or to adopt, that the client may have, one after the other."""
        name, expected = shareable_name(request.key), self._store.expected(request.key)
        # A client that says no-cache doubts what the proxy has: it may have seen a wrong digest, say.
        if "no-cache" in cache_directives(request.fields) or field_value(request.fields, "Authorization"):
            return
        digests = [facts.digest.hex() for facts in expected if facts.algorithm]
        for key in itertools.chain(*map(self._store.names.lookup, digests)):
            stored = look_up_for_client(self._store, self._origin, replace_fields(request, key=key))
            if stored is not None and key != request.key and not (
                    stored.head.vary or field_value(stored.head.fields, "Content-Encoding")):
                # A query may hold another client's password, so it is not shown.
                yield replace_fields(stored, head=replace_fields(stored.head, same_as=key.partition("?")[0]))
            else:
                _close(stored)
        for path in self._store.adopted.lookup(name) if name and self._adopted_folders else ():
            file, info = _open(path) if path.startswith(self._adopted_folders) else (None, _NO_STAT)
            if file is not None and why_unexpected(expected, info.st_size, lambda _: ""):
                file.close()
            elif file is not None:
                head = replace_fields(_bare_head(request.key, info), same_as="an adopted file")
                yield StoredResponse(file, head, "", False)


# Small responses other than 200


class SmallAnswers:
    """Keeps small responses other than 200 in memory, while they are fresh and the most recently used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _kept
        self._kept: dict[str, tuple[ResponseHead, bytes]] = {}  # by cache key, the most recently used last

    def respond(self, request: Request, config: Config) -> Response | None:
        """Answer a request from memory; None if that is impossible, and what was kept is then removed."""
        (head, data), now = self.pop(request.key), time.time()
        if head is None or head.local_clients_only and not request.client_is_local:
            return None
        decision = decide(request, head, config, now)
        if decision.action is not Action.SERVE or decision.refresh:
            return None
        self._put(request.key, head, data)
        aged = with_field(head.fields, "Age", str(current_age(head, now)))
        status = CacheStatus(Outcome.HIT, ttl=decision.ttl)
        return Response(replace_fields(head, fields=aged), bytes_body(data), status)

    def keep(self, flight: Flight, request: Request, response: OriginResponse, head: ResponseHead,
             answer: Response) -> Response:
        """Read a response and keep it if it may be kept and is small; return ``answer`` with the body that
        was read; OriginError."""
        if not is_small_answer(request, head) or not flight.finish_receiving():
            return answer
        data = b""
        while piece := response.read():
            data += piece
            if len(data) > MAX_ANSWER:
                rest = itertools.chain([data], iter(response.read, b""))
                return replace_fields(answer, body=replace_fields(answer.body, parts=rest))
        self._put(head.key, replace_fields(head, fields=storable_fields(head.fields)), data)
        status = answer.cache_status._replace(outcome=Outcome.MISS, stored=True, detail="")
        return replace_fields(answer, body=bytes_body(data), cache_status=status)

    def pop(self, key: str) -> tuple[ResponseHead | None, bytes]:
        """Remove and return what is kept for a key."""
        with self._lock:
            return self._kept.pop(key, (None, b""))

    def _put(self, key: str, head: ResponseHead, data: bytes) -> None:
        with self._lock:
            self._kept[key] = head, data
            if len(self._kept) > MAX_ANSWERS:
                del self._kept[next(iter(self._kept))]


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

    def acquire(self, key: str, ignores_lock: bool = False) -> PartialFile | None:
        """Lock a key, and return its partial file; None if another download has the lock; StorageError.

        With ``ignores_lock``, return a partial file of a random name instead.  The caller must call release()
        at the end, or discard() if nothing was written.
        """
        lease = Lease(secrets.token_hex(8), False) if ignores_lock else self.leases.acquire(key)
        if lease is None:
            return None
        try:
            return self.partials.open_for_writing(key, *lease)
        except StorageError:
            self.leases.release(key, lease.owner)
            raise

    def discard(self, partial: PartialFile | None, keep: bool = False) -> None:
        """Remove a partial file that was not written, and unlock its key.

        With ``keep``, what is left in it of an earlier download stays: it has not become wrong.
        """
        if partial is not None:
            (partial.keep_for_resume if keep else partial.discard)()
            self.release(partial)

    def release(self, partial: PartialFile) -> None:
        """Unlock the key of a partial file that was stored, kept or discarded."""
        partial.release()
        self.leases.release(partial.head.key, partial.owner)

    def is_downloading_elsewhere(self, key: str) -> bool:
        """Return whether another instance downloads a key."""
        if self.leases.uses_memcached:
            return bool(self.leases.holder(key))
        partial = self.partials.open_for_reading(key)
        with contextlib.suppress(OSError), partial or contextlib.nullcontext():
            return partial is not None and not partial.try_lock()
        return False

    def invalidate(self, key: str) -> None:
        """Prevent other instances from storing what they are downloading under a key."""
        self.partials.unlink(key, self.leases.holder(key))


def why_refused(store: Store, key: str, size: int | None, digest: Callable[[str], str]) -> str:
    """Return how a body contradicts what is known about it; "" if it does not.  Count and log that.

    For ``size`` and ``digest``, see why_unexpected().  Raises what ``digest`` does.
    """
    expected = store.expected(key)
    reason = why_unexpected(expected, size, digest)
    if reason:
        store.count_check("refused")
        log.warning("%s was not stored: %s", loggable_uri(key), reason)
    elif expected and digest("sha256"):
        store.count_check("verified")
    return reason


def agrees_with_index(store: Store, key: str, body: StoredResponse) -> bool:
    """Return whether a body agrees with what is known about it, for which it is read (invariant 13)."""
    with contextlib.suppress(OSError):
        return not why_unexpected(store.expected(key), body.head.size, functools.partial(hex_digest, body))
    return False


class Downloader:
    """The tee: downloads responses into partial files, from which all their clients read.

    Each download runs in one thread, which is the only writer of its partial file (invariant 2): one of its
    own, or the first client's for a small body that is in memory before the client gets its first byte.  It
    belongs to the cache and not to a client: it continues when clients leave, and no client slows it down.

    Public: ``start``; ``download`` for a thread that already exists; ``snapshot``.
    """

    def __init__(self, config: Config, store: Store, flights: SingleFlight, origin: OriginClient,
                 failures: RecentFailures, may_store: Callable[[str, bool, bool], bool]) -> None:
        self.store = store
        self.flights = flights
        self.origin = origin
        self.failures = failures
        self.locks = DownloadLocks(store, config)
        self.mirrors = MirrorDeduplicator(store, origin, config)
        self._may_store = may_store  # see BackgroundRevalidator
        self.small_answers = SmallAnswers()
        self._orphans = OrphanLimiter(config.max_orphans)
        # Start (monotonic) and first offset; each use is one operation, so there is no lock.
        self._running: dict[PartialFile, tuple[float, int]] = {}

    def snapshot(self) -> list[dict[str, Any]]:
        """Describe the running downloads for the status page, the oldest first; rates are in bytes/s."""
        now = time.monotonic()
        return [{"uri": displayable_uri(partial.head.key), "bytes": partial.size, "length": partial.length,
                 "rate": int((partial.size - start) / max(now - since, 0.001)),
                 "clients": partial.reader_count()}
                for partial, (since, start) in list(self._running.copy().items())[:MAX_ROWS]]

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
        # What contradicts its index is stored, but is not found.
        replaces = download.replaces or self.store.expected(head.key) and version_of(self.store, head.key)
        outcome = Outcome.UPDATED if replaces else Outcome.MISS
        status = CacheStatus(outcome, decision.forward, response.head.status, stored=True)
        status = shared_cache_status(decision, head) if head.same_as else status
        # Only this client gets the fields that are not stored, such as Set-Cookie.
        own_head = replace_fields(stored_head, fields=end_to_end(head.fields))
        download.flight.publish(partial)
        # A network file system or memcached may hang, and that must not keep the client from its bytes.
        if not (response.start or self.store.remote or self.locks.leases.uses_memcached):
            download = replace_fields(download, body=response.read_ahead(LARGE_BODY, PUBLISH_DELAY))
        partial.acquire()
        result = response_from_partial(request, download, self.origin, status, own_head)
        try:
            if download.body:  # only the disk must be waited for, so another thread would only cost time
                self.download(download)
            else:
                start_thread(self.download, download)
        except StorageError:
            result.body.close()
            raise
        return result

    def download(self, download: Download) -> None:
        """Download to the end, store the result, and finish the flight.

        Runs in a thread of its own, or in the first client's if the whole body has been received already.

        1. Receive: read from the origin, write to the partial file, announce all but the last bytes.
        2. Commit: flush the file and give it its place in the cache, or discard it.
        3. Finish the flight: take it out of the barrier, then announce the last bytes (invariant 3).  A
           client that has them and asks again finds the response stored.
        4. Release the lock: with memcached that may take a moment, so no client waits for it.

        A miss of one read needs these system calls, besides those of its threads' locks; a test counts them:

        - read the request, and hand the connection to a thread and back                               5
        - look in the store, and again as leader (invariant 4)                                         4
        - create the partial file, lock it, check that its name still leads to it, and its size        6
        - the origin: check that the pooled connection is open, send, receive                          3
        - ask for free space and inodes, and remove what may be left of another download               4
        - write and flush the body, remove metadata, set its times and read them back                  5
        - add the digest to the index of names                                                         5
        - check that no other file has the name in the cache, write the head and rename it, rename
          the body, compare it with the open file, look for a file under the hashed name              10
        - unlock and close                                                                             2
        - send head and body                                                                           1
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
                # The stored response is outdated, and its successor is not stored.
                self.store.delete(partial.head.key)
        except OriginError as failure:
            log.warning("%s was not stored: %s", partial.head.key, failure)
            if isinstance(failure, DownloadAbandonedError) or partial.head.same_as:
                # A client that joined at the last moment, or has no byte of a copy yet, asks the origin.
                result = FlightResult.ALONE
            error = None if result is FlightResult.ALONE else failure
            partial.keep_for_resume()
        finally:
            self._orphans.remove(partial)
            self._running.pop(partial, None)
            self.flights.finish(flight, result, error, partial.size)
            self.locks.release(partial)

    def _receive(self, download: Download) -> None:
        """Write the whole body, over as many connections as it takes; OriginError, StorageError."""
        partial, response = download.partial, download.response
        self._running[partial] = time.monotonic(), partial.size
        if response is None and partial.size == partial.length:
            return  # the instance that died had received everything

        def ask(offset: int) -> OriginResponse:
            mark(download.origin_request.timings, "broke off")
            if partial.size:
                partial.publish()
            request = replace_fields(download.origin_request, deadline=time.monotonic() + RESUME_TIMEOUT)
            remainder = self.origin.fetch_remainder(request, partial.head, partial.length, offset)
            remainder.on_idle(partial.publish)
            return remainder

        # Other instances can read the partial file once its metadata is written.  That costs a file, which
        # most downloads do not need: it is written if the origin pauses, or if the download takes a while.
        publish_at = time.monotonic() + PUBLISH_DELAY
        if response is not None:
            response.on_idle(partial.publish)
        pieces = resumable_body(partial.head, partial.length, partial.size, ask, response)
        with contextlib.closing(pieces):
            for data in pieces:
                self._write(download, data)
                if time.monotonic() > publish_at and partial.size != partial.length:
                    partial.publish()

    def _write(self, download: Download, data: bytes) -> None:
        """Append data to the partial file, and wake the readers; OriginError, StorageError."""
        partial, flight = download.partial, download.flight
        if not self._orphans.may_continue(partial):
            # A client may join between the two checks, so first let nobody join, then look again.
            self.flights.remove(flight)
            if not partial.reader_count():
                raise DownloadAbandonedError("its clients have left, and it was too slow or one of too many "
                                             "such downloads.")
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
        partial, flight, key = download.partial, download.flight, download.partial.head.key
        # A lease that was not renewed in time is lost: another instance has taken over.
        may_store = flight.finish_receiving() and not self.locks.leases.is_lost(partial.owner)
        if not may_store or self._is_refused(partial) or is_implausible(key, partial.size) or \
                not self._may_store(key, download.origin_request.client_is_local, download.replaces):
            partial.discard()
            return FlightResult.WHOLE
        partial.commit()
        mark(download.origin_request.timings, "stored")
        self.failures.disk_recovered()
        if not flight.finish_receiving():
            self.store.delete(partial.head.key)
        return FlightResult.STORED

    def _is_refused(self, partial: PartialFile) -> bool:
        """Return whether a complete body contradicts what is known about it; StorageError."""
        try:
            digest = functools.partial(hex_digest, partial)
            return bool(why_refused(self.store, partial.head.key, partial.size, digest))
        except OSError as error:
            raise StorageError(error) from error


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
            partial = self._partial
            if result is not None:
                received = partial.size if partial is not None and self._published else None
                if partial is not None:
                    partial.unlock()
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
        elif owner not in ("", self._owner):
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
            if same and resume_validator(old.head) and other.size >= old.size:
                old.switch_to(other)
                self._owner = owner
            else:
                other.release()

    def _finish(self) -> FlightResult | None:
        """Return how the other instance's download ended; None if it was continued here."""
        partial, stored = self._partial, self._downloader.store.lookup(self._flight.key)
        if partial is None or not partial.still_exists():
            is_whole = partial is not None and self._published and partial.size == partial.length
            result = FlightResult.WHOLE if is_whole else FlightResult.ALONE
        elif self._published or partial.load_metadata():
            result = None
        else:  # its writer died before it had anything, or had yet to lock it, and follows this download now
            partial.discard()
            result = FlightResult.AGAIN
        if stored is not None:
            with contextlib.closing(stored):
                if stored.head.verified:  # else it was there before, copied or changed by hand
                    return self._finish_stored(stored)
        return self._continue_download(partial) if partial and not result else result

    def _finish_stored(self, stored: StoredResponse) -> FlightResult:
        """Let clients that have a part already continue in the stored file, if it is the same.

        A third instance may have stored it.  Then a strong validator must prove that it is the same.
        """
        partial = self._partial
        if partial is not None and self._published and not partial.is_stored_as(stored):
            validator = resume_validator(partial.head)
            same = validator is not None and validator == strong_validator(stored.head)
            if not same or partial.length not in (None, stored.head.size):
                return FlightResult.ALONE
            partial.switch_to(stored)
        return FlightResult.STORED

    def _continue_download(self, partial: PartialFile) -> FlightResult | None:
        """Resume the download of an instance that died, in its file or in our copy; StorageError, OSError."""
        request, head = self._request, partial.head
        if resume_validator(head) is None:
            partial.discard()
        if not may_share_download(request, head) or resume_validator(head) is None:
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
# 11 Proxy
# ---------------------------------------------------------------------------------------------
#
# Proxy.respond() is the path of every request; start reading there.

PAIR_SPAN = 60.0  # seconds since its validation in which a file is taken for what a new signature signs


def check_request_allowed(request: Request, config: Config) -> None:
    """Raise ProxyError if a request has come in a loop, or if its client may not reach its target."""
    if is_loop(request, config):
        raise ProxyError("The request has come through this proxy before: its target leads back here.", 508)
    check_target_allowed(request.target, request.client_is_local, config.origins)


def own_request(request: Request, decision: CacheDecision, config: Config) -> OriginRequest:
    """Return the request to the origin whose response is for one client alone."""
    follow = decision.forward not in ("bypass", "method") and decision.policy.redirects
    return OriginRequest(
        request.method, request.target, origin_request_fields(request, config, identity=False), request.body,
        request.length, request.client_is_local, follow and not private_fields(request), None, request.client,
        request.timings, config.origins, request.send_interim)


def answer_as_final_recipient(request: Request) -> Response:
    """Answer a TRACE or OPTIONS that may go no further (RFC 9110 §7.6.2, §9.3.7, §9.3.8)."""
    if request.method == "OPTIONS":
        allow = ("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE, CONNECT")
        return Response(generated_head(200, more=(allow,)), bytes_body(b""), CacheStatus(Outcome.OWN))
    fields = without_fields(request.fields, ("authorization", "cookie", "proxy-authorization"))
    start = "%s %s HTTP/%d.%d" % (request.method, request.uri, *request.version)
    text = "\r\n".join([start, *("%s: %s" % field for field in fields), "", ""]).encode("latin-1")
    return Response(generated_head(200, "message/http"), bytes_body(text), CacheStatus(Outcome.OWN))


# Hits, which the event loop sends without a thread unless they are large


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedHit:
    """A hit as it is sent: the rendered head, and a body that is in memory, as far as the system tells.

    Its file is closed with the last reference to it, of the HotCache or of a connection.
    """

    request: Request
    status: int
    cache_status: CacheStatus
    close: bool  # whether the connection is closed after it
    data: bytes  # the head, and a small body
    part: FileSlice | None  # a body that is not small
    body_size: int
    stored: StoredResponse  # open: its descriptor tells whether the file is still the same
    version: tuple[int, int, int]  # of that file
    text: str  # for the log
    # How often each client has got it, up to 2: from then on, it is known not to doubt it in this second.
    clients: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __del__(self) -> None:
        self.stored.close()


class HotCache:
    """Prepared hits of the current second, for clients that ask for the same at the same time.

    An entry may be used until the second ends (its Age field is right for that long), and while its file, and
    what the indexes say, are unchanged.  One look at the file serves all requests that had arrived by then:

    1. The event loop wakes with requests from many clients: ``recheck``.
    2. ``get`` for the first of them looks at the file, and for the others does not.
    3. A client sees an answer, has the file removed or replaced, and asks again: that request is read after
       another ``recheck``, so the file is looked at again.
    """

    def __init__(self, size: int = HOT_CACHE_SIZE) -> None:
        self._size, self._bytes = size, 0
        self._entries: dict[Any, PreparedHit] = {}  # by the bytes of the head, and the client's access
        self._valid_for: tuple[Any, ...] = ()  # the second, the configuration, and the knowledge of indexes
        self._verified: set[PreparedHit] = set()  # those whose files were looked at since the last recheck

    def recheck(self, valid_for: tuple[Any, ...]) -> None:
        """Look at each file again before its entry is used: it may have changed before the next request.

        ``valid_for`` is Proxy.hits_valid_for(): when it has changed, all hits are prepared again.
        """
        if valid_for != self._valid_for:
            self._entries, self._bytes, self._valid_for = {}, 0, valid_for
        self._verified.clear()

    def get(self, asked: Any, client: str = "") -> PreparedHit | None:
        """Return the entry for a request, if it may still be used.

        With ``client``, only if that client is known not to doubt it.
        """
        entry = self._entries.get(asked)
        if entry is None or client and entry.clients[client] < 2:
            return None
        if entry in self._verified:
            return entry
        with contextlib.suppress(OSError):
            if file_version(entry.stored) == entry.version:
                self._verified.add(entry)
                return entry
        return None

    def put(self, asked: Any, entry: PreparedHit) -> None:
        """Keep an entry, unless its file has already been removed; if there are too many, begin anew.

        Large files are not kept: an evicted one would go on taking space, and sending it costs far more than
        preparing it again.  Nothing is kept on Windows, where an open file cannot be removed.
        """
        if len(self._entries) >= self._size or self._bytes > HOT_CACHE_BYTES:
            self._entries, self._bytes = {}, 0
        self._entries.pop(asked, None)
        if entry.version[0] and entry.body_size <= LARGE_BODY and os.name != "nt":
            self._entries[asked] = entry
            self._bytes += len(entry.data)


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


def render_hit(request: Request, stored: StoredResponse, config: Config, now: float) -> PreparedHit | None:
    """Render the response to a request if it is a hit that nothing must be waited for; None if not.

    The caller closes ``stored`` if there is none.  OSError.
    """
    # A copied file may have to be read to its end, and a displaced one depends on another file.
    if stored.head.displaced or not stored.head.verified:
        return None
    version = file_version(stored)  # before it is read
    with contextlib.suppress(ProxyError):
        check_request_allowed(request, config)
        decision = decide(request, stored.head, config, now)
        selection = select_response(request, with_age(stored.head, now), stored.head.size)
        spans = () if request.method == "HEAD" else selection.spans
        span = spans[0] if spans else (0, 0)
        if decision.action is not Action.SERVE or decision.refresh or \
                is_adapted(request, selection.head) or len(spans) > 1 or isinstance(span, bytes):
            return None
        part = FileSlice(stored, *span)
        is_small = part.size <= SMALL_BODY
        # Of a body that is not small, the first byte: an unreadable file may still be replaced now.
        body = read_without_blocking(stored.file, span[0], span[1] if is_small else span[0] + 1)
        if body is None:
            return None
        close, status = not wants_keep_alive(request), CacheStatus(Outcome.HIT, ttl=decision.ttl)
        head = render_response_head(request, selection.head, selection.length, status, close, config)
        return PreparedHit(
            request, selection.head.status, status, close, head + body if is_small else head,
            None if is_small else part, part.size, stored, version, log_text(request, status))
    return None


# Fetches that clients share


@dataclasses.dataclass(frozen=True)
class FlightLeader:
    """Runs the fetch that other clients share: a miss or a revalidation.  One object for each fetch.

    Each step returns the leader's own response and how the flight has ended.  A FlightResult of None means
    that a thread is still running, a download or a PeerFollower, which finishes the flight later.
    """

    downloader: Downloader
    request: Request
    flight: Flight
    config: Config
    deadline: float  # monotonic: by then, a stored response is served stale
    ignores_lock: bool = False  # another leader has the key's lock, and no response head yet

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
            self.downloader.failures.note_retry_after(self.request, error)
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
                partial = self.downloader.locks.acquire(request.key, self.ignores_lock)
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
            found = self.downloader.mirrors.find_identical(request, self.config, origin_request)
            if found is not None:
                return self._serve_identical(decision, found, partial)
            rest = fetch_rest(origin, origin_request, request, partial)
            response = rest or fetch_full(origin, origin_request)
        except BaseException:
            self.downloader.locks.discard(partial, keep=True)
            raise
        return self._store_or_relay(response, decision, partial)

    def _serve_identical(self, decision: CacheDecision, stored: StoredResponse,
                         partial: PartialFile | None) -> tuple[Response, FlightResult | None]:
        """Serve the same file of another mirror, and store it under this key as well: as a link to the file,
        or as a copy if the file system refuses links."""
        try:
            self.downloader.store.link(stored)
        except OSError as error:
            log.debug("%s is copied: %s", self.request.key, error)
            return self._store_or_relay(LocalFileResponse(stored), decision, partial)
        if not self.flight.finish_receiving():  # a POST has made it invalid meanwhile (RFC 9111 §4.4)
            self.downloader.store.delete(self.request.key)
        self.downloader.locks.discard(partial)
        self.downloader.failures.disk_recovered()
        status = shared_cache_status(decision, stored.head)
        return response_from_store(self.request, stored, status), FlightResult.STORED

    def _validate(self, decision: CacheDecision,
                  stored: StoredResponse) -> tuple[Response, FlightResult | None]:
        """Ask the origin whether a stored response is still right (RFC 9111 §4.3); OriginError.

        The caller closes ``stored`` on an error.  If it may be served stale then, Proxy does that.
        """
        request, answer = self.request, self._revalidate(decision, stored)
        if isinstance(answer, OriginResponse):
            stored.close()
            if is_misplaced_page(request, stored.head, answer.head):
                return response_from_origin(request, answer, decision, "an HTML page"), FlightResult.ALONE
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
        deadline = max(self.deadline, time.monotonic() + 1) if may_be_stale else None
        origin, origin_request = self.downloader.origin, full_request(request, self.config, deadline, stored)
        if not stored.described and agrees_with_index(self.downloader.store, request.key, stored) and (
                head := confirm_bare_file(origin, origin_request, request, stored, self.config)):
            return head
        # A client that doubts a file found at another mirror gets the file that this mirror has.
        is_doubted = request.doubt == DOUBT_PERSISTS or not stored.described or stored.head.same_as and (
            request.doubt == DOUBT_OF_CLIENT or "no-cache" in cache_directives(request.fields))
        more = () if is_doubted or decision.forward == "vary-miss" else validators(stored.head)
        response = fetch_full(origin, replace_fields(origin_request, fields=origin_request.fields + more))
        is_same = request.doubt and not is_doubted and is_same_version(stored.head, response.head)
        if response.head.status == 304 or is_same:
            response.close()
            if is_same or is_304_for(stored.head, response.head):
                return freshen_head(stored.head, response.head)
            response = fetch_full(origin, origin_request)
        if may_be_stale:
            look = replace_fields(
                origin_request, follow_redirects=True, deadline=time.monotonic() + QUICK_FAILURE)
            check_believed(origin, look, request, stored.head, response)
        return response

    def _store_or_relay(self, response: OriginResponse, decision: CacheDecision,
                        partial: PartialFile | None) -> tuple[Response, FlightResult | None]:
        """Store a response while it is sent to the client, or only send it if it cannot be stored.

        ``partial`` is ours and locked; None if it must still be locked.  The response may be the remainder
        of what ``partial`` has (``response.start`` > 0).
        """
        request, resumes = self.request, response.start > 0
        if response.head.status < 500 and not response.head.same_as:
            self.downloader.failures.origin_answered(request)
        head = partial.head if partial is not None and resumes else replace_fields(
            response.head, key=request.key, vary=selecting_fields(request, response.head))
        origin_request, wrong_size = full_request(request, self.config), ""
        try:
            size = None if response.length is None else response.length + response.start
            reason = why_not_storable(replace_fields(request, method="GET"), head, self.config) or (
                "" if response.end_is_known else "no declared length")
            wrong_size = "" if reason else why_refused(self.downloader.store, request.key, size, lambda _: "")
            reason = reason or wrong_size
            if not reason:
                partial = partial or self.downloader.locks.acquire(request.key, self.ignores_lock)
                if partial is None:  # it will replace what is stored, or fail and leave it
                    return response_from_origin(
                        request, response, decision, "another download is storing it"), FlightResult.ALONE
                download = Download(partial, self.flight, origin_request, response,
                                    replaces=decision.action is Action.VALIDATE)
                return self.downloader.start(request, decision, head, download), None
        except StorageError as error:
            reason = self.downloader.failures.disk_failed(error)
        except BaseException:
            response.close()
            self.downloader.locks.discard(partial)
            raise
        self.downloader.locks.discard(partial, keep=is_html(response.head))
        if not wrong_size and replaces_stored(decision, head) and is_shareable(request, response.head):
            # What is stored is known to be outdated, and its successor cannot be stored.
            self.downloader.store.delete(request.key)
        if resumes:
            response.close()
            response = fetch_full(self.downloader.origin, origin_request)
        answer = response_from_origin(request, response, decision, reason)
        answer = self.downloader.small_answers.keep(self.flight, request, response, head, answer)
        return answer, FlightResult.AGAIN if answer.cache_status.stored else FlightResult.ALONE


@dataclasses.dataclass(frozen=True)
class SharedFetch:
    """Fetches a response together with all clients that ask for the same key now.  One object a request.

    The first client leads a flight, the others follow it:

        leader                                followers
        SingleFlight.join: a new flight       SingleFlight.join: the same flight
        FlightLeader.lead: asks the origin    Flight.wait_for_head
        Downloader.start: Flight.publish ───► read the partial file as it grows
        the Downloader's thread: finish ────► have the last bytes

    What the leader's request causes must not decide what the followers get (invariant 12):

    - It fails, although there was a connection: all join again, one of them leads, the others follow.  After
      a second failure, each asks on its own.
    - No head has come for FOLLOWER_PATIENCE seconds: the same.  The first leader may still have the lock, so
      the new one writes a partial file of another name.  So if the origin is slow, it gets one more request
      every FOLLOWER_PATIENCE seconds, however many followers there are.

    A request with Authorization has a flight of its own that no other request can join: its response may be
    for this client alone, which only its head will tell (RFC 9111 §3.5).
    """

    downloader: Downloader
    request: Request
    decision: CacheDecision
    config: Config

    def wants_only_part(self) -> bool:
        """Return whether a range is too short, or too far from the start, to download a whole file for it.

        A download that is already running serves the range.  It may end while this looks for it, so the store
        is looked in last.
        """
        key, downloader = self.request.key, self.downloader
        if self.decision.action is not Action.FETCH or field_value(self.request.fields, "Range") is None \
                or is_worth_full_download(self.request) \
                or downloader.flights.is_in_flight(key) or downloader.locks.is_downloading_elsewhere(key) \
                or downloader.mirrors.has_candidates(self.request):
            return False
        stored = look_up_for_client(downloader.store, downloader.origin, self.request)
        _close(stored)
        return stored is None

    def fetch(self) -> Response | FlightResult:
        """Return a response; ALONE if this request cannot share one, AGAIN if it must be decided anew;
        ProxyError."""
        deadline = time.monotonic() + VALIDATION_TIMEOUT
        result = self._share(deadline) if field_value(self.request.fields, "Authorization") is None else (
            self._lead(deadline, self.decision.action is Action.FETCH))
        if self.decision.action is Action.VALIDATE and isinstance(result, Response) and isinstance(
                result.body, TailingBody):
            # The stored copy could answer, so do not wait long for a first byte: a second at least.
            result.body.first_byte_deadline = max(deadline, time.monotonic() + 1)
        return result or FlightResult.ALONE

    def _lead(self, deadline: float, missing: bool, flight: Flight | None = None,
              ignores_lock: bool = False) -> Response | None:
        """Ask the origin in a flight; without one, in a new flight that no other request can join."""
        request, own_flight = without_private_fields(self.request), flight or Flight(self.request.key)
        leader = FlightLeader(self.downloader, request, own_flight, self.config, deadline, ignores_lock)
        return leader.lead(missing, alone=flight is None)

    def _share(self, deadline: float) -> Response | FlightResult | None:
        """Lead a flight, or follow one; another one if it fails or if its head takes too long."""
        missing, has_failed, failures = self.decision.action is Action.FETCH, False, self.downloader.failures
        overdue: Flight | None = None
        give_up_at = time.monotonic() + FOLLOWER_HEAD_TIMEOUT
        while time.monotonic() < give_up_at:
            flight, is_leader = self.downloader.flights.join(self.request.key, overdue)
            if is_leader and (response := self._lead(deadline, missing, flight, overdue is not None)):
                return response
            missing = False  # another flight may have stored it
            mark(self.request.timings, "joined")
            try:
                patience = max(0.0, min(FOLLOWER_PATIENCE, give_up_at - time.monotonic()))
                partial, result = flight.wait_for_head(patience)
            except OriginError as error:
                # This request fails as well if the origin cannot be reached, or if no time is left to ask it,
                # because a stored response must be served by then.
                is_late = self.decision.action is Action.VALIDATE and time.monotonic() >= deadline
                if is_late or is_site_down(self.request, error) or failures.reason_not_to_ask(self.request):
                    raise
                if has_failed:
                    return self._lead(deadline, missing)
                has_failed = True
                continue
            if partial is not None or result not in (None, FlightResult.WHOLE):
                return self._response_of(flight, partial, result)
            # WHOLE: nothing was stored, and this thread woke too late to read the partial file: join anew.
            overdue = overdue if result else flight
        return None

    def _response_of(self, flight: Flight, partial: PartialFile | None,
                     result: FlightResult | None) -> Response | FlightResult:
        """Return the response that another client's flight, or another instance, has got."""
        request, origin = self.request, self.downloader.origin
        status = CacheStatus(Outcome.COLLAPSED, self.decision.forward)
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


@contextlib.contextmanager
def failures_logged(what: str) -> Iterator[None]:
    """Log what goes wrong in a background thread, which goes on."""
    try:
        yield
    except (ProxyError, OSError) as error:
        log.debug("%s failed: %s", what, error)
    except Exception:
        log.exception("%s failed: this is a bug", what)


class EvictionThread:
    """Keeps the cache within its bounds, in a thread of its own.

    A response may be removed while it is read: the body has its file open, so the bytes stay until the last
    reader closes it.  Partial files that are being written are locked, and stay.
    """

    def __init__(self, store: Store, stopped: threading.Event) -> None:
        """``stopped`` ends the thread after the current run; ``store.space.scarce`` ends its pause."""
        self._store = store
        # For the status page: what the last run found, and what all runs have removed.
        self.last_report = {"at": 0.0, "removedFiles": 0, "removedBytes": 0}
        self._stopped = stopped

    def run(self, config: Config) -> None:
        """Run now, and then every EVICTION_INTERVAL seconds."""
        scanned_at = -ADOPT_SCAN_INTERVAL
        while not self._stopped.is_set():
            self._store.space.scarce.clear()  # set when the disk is full, or will soon be: run now
            with failures_logged("The eviction"):
                if config.adopt and time.monotonic() - scanned_at > ADOPT_SCAN_INTERVAL:
                    self._store.adopted.rebuild(adoptable_packages(config.adopt))
                    scanned_at = time.monotonic()
                is_first = not self.last_report["at"]
                self._record(evict(self._store, config, time.time()))
                if is_first:
                    log_foreign_files(self._store)
            self._stopped.wait(MIN_EVICTION_PAUSE)  # a disk that stays full must not keep this thread busy
            self._store.space.scarce.wait(EVICTION_INTERVAL)

    def _record(self, report: EvictionReport) -> None:
        if report.removed:
            log.info("Evicted %d of %d stored files, %s of %s", report.removed, report.files,
                     format_bytes(report.freed), format_bytes(report.size))
        self.last_report = {
            "at": time.time(), "files": report.files - report.removed, "bytes": report.size - report.freed,
            "removedFiles": self.last_report["removedFiles"] + report.removed,
            "removedBytes": self.last_report["removedBytes"] + report.freed}


class Scrubber:
    """Reads stored files again, in a thread of its own, and removes those that the disk has damaged.

    It reads slowly, and only while the proxy is in use.  A file without a known digest gets its digest now.
    The name of the last file is kept on the disk: the next one is always that which was not read for longest.
    """

    def __init__(self, store: Store, stopped: threading.Event) -> None:
        """``stopped`` ends the thread, also in the middle of a file."""
        self._store = store
        self._last_path = os.path.join(store.metadata_folder, "scrubbed")
        self._stopped = stopped

    def run(self) -> None:
        """Check all stored files, again and again."""
        while not self._stopped.wait(SCRUB_PAUSE):
            with failures_logged("The scrub"):
                for name in self._names():
                    self.check(name)

    def check(self, name: str) -> None:
        """Compare a stored body with its digest, and remove it if it is damaged or unreadable."""
        path = self._store.body_path(name)
        file, info = _open(path)
        head = self._store.find_head(name, None)[1]
        with file or contextlib.nullcontext():
            if file is None or head is None:
                return
            stored = StoredResponse(file, head, name, True)
            try:
                found = self._hash(stored)
            except OSError as error:
                found = str(error.strerror)
            if self._stopped.is_set() or found == head.sha256:
                return
            if not head.sha256 and len(found) == 64:
                self._store.update_head(stored, replace_fields(head, sha256=found))
                self._store.names.add(found, head.key)
                return
            with contextlib.suppress(OSError):  # else it has been replaced, changed or removed meanwhile
                if os.path.samestat(os.lstat(path), info):
                    self._store.delete_file(name)
                    self._store.count_check("healed")
                    log.warning("%s was damaged, and is removed: it no longer has the digest with which it "
                                "was stored (%s). Check its disk.", path, found[:16])

    def _names(self) -> Iterator[str]:
        """Yield names to check: those whose digests are needed, and all others in order from the last on."""
        last, saved_at, top = "", time.monotonic(), self._store.head_path("")[:-len("^head")]
        with contextlib.suppress(OSError, ValueError), open(self._last_path, encoding="utf-8") as saved:
            last = saved.read()
        for folder, subfolders, files in os.walk(top):
            subfolders.sort()
            for file in sorted(files):
                while self._store.unhashed:
                    yield self._store.unhashed.popleft()
                name = os.path.relpath(os.path.join(folder, file), top)[:-len("^head")].replace(os.sep, "/")
                if last not in ("", name):
                    continue
                last = ""
                yield name
                if self._stopped.is_set():
                    return
                if time.monotonic() - saved_at > SCRUB_PAUSE:
                    replace_file(self._last_path, name)
                    saved_at = time.monotonic()
        replace_file(self._last_path, "")

    def _hash(self, stored: StoredResponse) -> str:
        """Return the SHA-256 of a body, read at SCRUB_RATE while the proxy is in use.  Raises OSError."""
        found, offset = hashlib.sha256(), 0
        while not self._stopped.is_set() and (data := stored.read_at(SMALL_BODY, offset)):
            found.update(data)
            offset += len(data)
            self._stopped.wait(max(0.02, len(data) / SCRUB_RATE))  # a small file costs 0.2 ms of a processor
            while time.time() - self._store.used_at > SCRUB_PAUSE and not self._stopped.wait(5.0):
                pass
        return found.hexdigest()


class BackgroundRevalidator:
    """Revalidates stored responses in the background, after they were served as hits.

    A revalidation is an ordinary request with ``max-age=0``, whose body nobody reads: so it joins a flight,
    updates the stored head on a 304, and stores a new response, all as a client's request does.
    """

    def __init__(self, respond: Callable[[Request], Response], store: Store, flights: SingleFlight,
                 failures: RecentFailures, stopped: threading.Event) -> None:
        self._respond = respond
        self._store = store
        self._flights = flights
        self._failures = failures
        self._running = threading.BoundedSemaphore(MAX_BACKGROUND_VALIDATIONS)
        self._attempts = RecentEvents()  # by cache key; of watch(), by what is slow
        self._renewing: set[str] = set()  # keys that are being renewed; one operation each, so without lock
        self._watching = threading.BoundedSemaphore(MAX_WATCHED)
        self._stopped = stopped

    def revalidate(self, key: str, client_is_local: bool) -> None:
        """Revalidate a stored response, unless that was tried lately, or too many revalidations run."""
        if self._attempts.note_first(key, REVALIDATION_INTERVAL) and not self._flights.is_in_flight(key):
            self._start(self._running, self._renew, [*signed_keys(key), key], client_is_local)

    def assess(self, request: Request, head: ResponseHead) -> Request:
        """Return the request; it demands a validation if something newer than the stored response tells about
        it: what a stored signature signs, or an index that says that this is another file now, or an index
        that is not read yet, which is a reason for doubt."""
        if any(other.response_time > head.response_time if other else self._store.expected(key)
               for key in signed_keys(head.key) for other in (self._stored_head(key),)):
            return replace_fields(request, fields=request.fields + (("Cache-Control", "max-age=0"),))
        return replace_fields(request, doubt=DOUBT_UNREAD) if self._store.awaits_index(head) else request

    def may_store(self, key: str, client_is_local: bool, replaces: bool) -> bool:
        """Return whether a file that has arrived, perhaps to replace a stored one, may be stored now.

        A file and its signature must be of one generation, or its clients refuse both:

        1. A new file has arrived whole, and is not stored yet.  No client has its last bytes.
        2. Each stored signature is renewed.  If the origin has it no longer, it is removed.
        3. The file is stored, unless the origin has failed in step 2: then the old pair stays.

        If the signature comes first, it is not stored: both are renewed in the background, the file first.
        Where there was no signature, a file that was validated lately is not asked for again.
        """
        signed = [head for head in map(self._stored_head, signed_keys(key)) if head is not None]
        is_recent = not replaces and all(abs(time.time() - head.response_time) < PAIR_SPAN for head in signed)
        if signed and not is_recent and key not in self._renewing:
            self._start(self._running, self._renew, [*signed_keys(key), key], client_is_local)
            return not replaces
        may_store = not replaces or self._renew(signature_keys(key), client_is_local)
        if not may_store:
            log.warning("%s was not stored: its signature cannot be renewed, and the old pair stays.",
                        loggable_uri(key))
        return may_store

    def watch(self, request: Request) -> None:
        """If a request's origin is slow, ask it for the same in the background, every PROBE_INTERVAL seconds
        until it answers, but for ORIGIN_BACKOFF seconds at most."""
        slow = self._failures.slow_origin(request)[0]
        if slow and self._attempts.note_first("watch " + slow, 2 * ORIGIN_BACKOFF):
            self._start(self._watching, self._watch, request, slow)

    def _start(self, slots: threading.BoundedSemaphore, task: Callable[..., object], *arguments: Any) -> None:
        def work() -> None:
            with failures_logged("A revalidation"):
                task(*arguments)
            slots.release()

        if slots.acquire(blocking=False):
            try:
                start_thread(work)
            except StorageError:  # no more threads: later, then
                slots.release()

    def _watch(self, watched: Request, slow: str) -> None:
        """Ask for the same as a request while its origin is slow."""
        until = time.monotonic() + ORIGIN_BACKOFF
        try:
            while time.monotonic() < until and not self._stopped.wait(PROBE_INTERVAL) \
                    and self._failures.slow_origin(watched)[0]:
                head = self._stored_head(watched.key)
                self._ask(watched.key, head.vary if head else (), watched.client_is_local)
        finally:
            self._attempts.forget("watch " + slow)

    def _stored_head(self, key: str) -> ResponseHead | None:
        stored = self._store.lookup(key)
        _close(stored)
        return stored.head if stored is not None else None

    def _renew(self, keys: list[str], client_is_local: bool) -> bool:
        """Revalidate stored responses, up to the first that the origin does not confirm or replace; return
        whether there was none such."""
        for key, head in zip(keys, map(self._stored_head, keys)):
            if head is None:
                continue
            self._renewing.add(key)
            try:
                response = self._ask(key, head.vary, client_is_local)
                if response.cache_status.outcome is Outcome.COLLAPSED:  # perhaps from before the change
                    response = self._ask(key, head.vary, client_is_local)
            except (ProxyError, OSError) as error:
                log.debug("%s was not validated: %s", key, error)
                return False
            finally:
                self._renewing.discard(key)
            if response.head.status in (403, 404, 410) and signed_keys(key):
                self._store.delete(key)
            is_right = response.cache_status.outcome in (Outcome.VALIDATED, Outcome.UPDATED)
            if not is_right and self._stored_head(key) is not None:
                return False
        return True

    def _ask(self, key: str, vary: Fields, client_is_local: bool) -> Response:
        """Send the request that validates a stored response; ``vary``: the request fields that select it."""
        target, accept = parse_target(key), FORMS.get("#" + key.partition("#")[2], "")
        fields = (("Host", target.authority), ("Cache-Control", "max-age=0"), ("Accept", accept), *vary)
        fields = tuple(pair for pair in fields if pair[1])
        response = self._respond(Request("GET", target.uri, target, fields, key=key, client="",
                                         client_is_local=client_is_local))
        with contextlib.closing(response.body) as body:
            collections.deque(body.chunks(), maxlen=0)  # so that the limit counts running downloads
        return response


class PackageDoubts:
    """Notices clients that doubt a package: they ask for it again within DOUBT_PERIOD seconds of getting it.

    A package may have been uploaded again under its name; then its clients see a wrong digest, and try again.

    1. A client has got the whole package: ``note_delivered``.
    2. It asks again.  The package is validated, once for all who doubt it and at most every DOUBT_INTERVAL
       seconds: many clients may share an address, and may want the same package.  If an address doubts very
       many packages, most of them are served as they are.
    3. If a 304 confirms it (``note_answer``), and it is still doubted, it is fetched without conditions: once
       a day, because the doubt may be wrong.
    """

    def __init__(self, flights: SingleFlight) -> None:
        self._flights = flights
        self._delivered = RecentEvents()  # by client and cache key
        self._validated = RecentEvents()  # by each of _names(): the last validation for a doubt
        self._confirmed = RecentEvents()  # by cache key: the last 304 to a doubt or to no-cache
        self._refetched = RecentEvents()  # by cache key, size and validators

    def note_delivered(self, request: Request, client: str, status: int) -> None:
        """Record that a client has got all of a response."""
        if (request.method, status) == ("GET", 200) and classify_name(request.key) is NameClass.PACKAGE:
            self._delivered.note("%s %s" % (client, request.key))

    def forget(self, request: Request) -> None:
        """Record that the client of a request has not got all of its response."""
        self._delivered.forget("%s %s" % (request.client, request.key))

    def is_due(self, request: Request, client: str, head: ResponseHead) -> bool:
        """Return whether a request doubts a stored package, and the origin is to be asked now, or is being
        asked."""
        if self._delivered.find("%s %s" % (client, request.key), DOUBT_PERIOD) is None or not (
                self._flights.is_in_flight(request.key) or self._may_refetch(head)
                or not self._validated.gather(DOUBT_INTERVAL, *self._names(request, client))):
            return False
        # The others would be passed through as a whole, or refused.
        return request.method == "GET" and field_value(request.fields, "Range") is None and not (
            private_fields(request) or "only-if-cached" in cache_directives(request.fields))

    def assess(self, request: Request, head: ResponseHead) -> Request:
        """Return the request with its ``doubt`` of the stored response that has this head."""
        doubt = request.doubt
        if self.is_due(request, request.client, head):
            doubt = doubt or DOUBT_OF_CLIENT
            for name in self._names(request, request.client):
                self._validated.note_first(name, DOUBT_INTERVAL)
        elif not POLICIES[classify_name(request.key)].lifetime or \
                "no-cache" not in cache_directives(request.fields):
            return request
        return replace_fields(request, doubt=DOUBT_PERSISTS if self._may_refetch(head, True) else doubt)

    def _may_refetch(self, head: ResponseHead, note: bool = False) -> bool:
        """Return whether a package may be fetched without conditions; with ``note``, it will be."""
        version = "%s %d %s" % (head.key, head.size, validators(head))
        return self._confirmed.find(head.key, DOUBT_PERIOD) is not None and (
            self._refetched.note_first(version, DAY) if note else not self._refetched.gather(DAY, version))

    def _names(self, request: Request, client: str) -> tuple[str, str]:
        """Return what a validation is limited by: the package, and one of the client's slots."""
        return request.key, "%s %d" % (client, hash(request.key) % DOUBTS_PER_CLIENT)

    def note_answer(self, request: Request, outcome: Outcome) -> None:
        """Record that the origin has confirmed a stored response that a client doubted."""
        is_client = request.doubt in (DOUBT_OF_CLIENT, DOUBT_PERSISTS)
        if outcome is Outcome.VALIDATED and (is_client or "no-cache" in cache_directives(request.fields)):
            self._confirmed.note(request.key)


class Proxy:
    """Answers requests from the cache, from a running download, or from the origin."""

    def __init__(self, config: Config, store: Store, count_received: Callable[[int], object]) -> None:
        """``count_received`` is called with the number of body bytes whenever some arrive from an origin."""
        self.config = config  # replaced as a whole when the filters are read again
        self._store = store
        self._origin = OriginClient(count_received, config)
        self._stopped = threading.Event()
        self.evictor = EvictionThread(store, self._stopped)
        self._scrubber = Scrubber(store, self._stopped)
        self._failures = RecentFailures(store.space.scarce.set)
        self._barrier = SingleFlight()
        self._revalidator = BackgroundRevalidator(
            self.respond, store, self._barrier, self._failures, self._stopped)
        self._downloader = Downloader(config, store, self._barrier, self._origin, self._failures,
                                      self._revalidator.may_store)
        self.doubts = PackageDoubts(self._barrier)

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
        return adapt_body(request, self._respond(request))

    def _respond(self, request: Request) -> Response:
        config = self.config
        check_request_allowed(request, config)
        if max_forwards(request) == 0:
            return answer_as_final_recipient(request)
        stored = None if request.known_missing else look_up_for_client(self._store, self._origin, request)
        mark(request.timings, "looked up")
        began = time.monotonic()
        if stored is not None:
            request = self._revalidator.assess(request, stored.head)
            request = self.doubts.assess(request, stored.head)
        decision = decide(request, stored.head if stored else None, config, time.time())
        try:
            response = self._serve(request, decision, stored) if stored is not None else (
                self._downloader.small_answers.respond(request, config))
            response = response or self._forward(request, decision, config, stored)
            self.doubts.note_answer(request, response.cache_status.outcome)
        except ProxyError as error:
            response = self._respond_despite(request, decision, began, error)
        return replace_fields(response, fallback=lambda error: adapt_body(
            request, self._respond_despite(request, decision, began, error)))

    def _serve(self, request: Request, decision: CacheDecision, stored: StoredResponse) -> Response | None:
        """Serve a hit, or a stale response without asking an origin that is known to be down; None if
        ``stored`` cannot be used like that, and is closed."""
        if decision.action is Action.SERVE:
            if decision.refresh:
                self._revalidator.revalidate(request.key, request.client_is_local)
            return response_from_store(request, stored, CacheStatus(Outcome.HIT, ttl=decision.ttl))
        if decision.action is Action.VALIDATE and may_serve_stale_on_error(decision, stored.head) \
                and (reason := self._failures.reason_not_to_ask(request)):
            return self._serve_stale(request, decision, stored, reason)
        stored.close()
        return None

    def _forward(self, request: Request, decision: CacheDecision, config: Config,
                 stored: StoredResponse | None) -> Response:
        """Respond to a request for which ``stored``, if there is any, cannot be used as it is."""
        if decision.action is Action.REFUSE:
            is_missing = decision.forward == "uri-miss"
            if is_missing and (found := self._downloader.mirrors.find_identical(request, config)):
                return response_from_store(request, found, shared_cache_status(decision, found.head))
            reason = "this proxy is offline" if config.offline else "the request is only-if-cached"
            raise ProxyError("No stored response fits, and %s." % reason, 504)
        shared = SharedFetch(self._downloader, request, decision, config)
        if decision.action is Action.PASS or shared.wants_only_part():
            return self._pass(request, decision, config)
        result = shared.fetch()
        if isinstance(result, Response):
            return result
        if result is FlightResult.AGAIN:
            return self._respond(replace_fields(request, known_missing=False))
        response = self._pass(request, decision, config, "not collapsed")
        if stored and says_not_now(response.head.status) and may_serve_stale_on_error(decision, stored.head):
            response.body.close()
            raise OriginError("%d from origin." % response.head.status, request.target)
        return response

    def _pass(self, request: Request, decision: CacheDecision, config: Config, detail: str = "") -> Response:
        """Ask the origin for this client alone.  A method that changes things invalidates stored responses
        (RFC 9111 §4.4)."""
        if decision.forward == "request" and private_fields(request):
            detail = why_not_from_cache(request, decision)
        response = self._origin.fetch(own_request(request, decision, config))
        for key in invalidated_keys(request, response.head):
            # In this order: a download that is stored between two of these steps is deleted by the last.
            self._barrier.invalidate(key)
            self._downloader.locks.invalidate(key)
            self._store.delete(key)
            self._downloader.small_answers.pop(key)
        return response_from_origin(request, response, decision, detail)

    # When a response fails

    def _respond_despite(self, request: Request, decision: CacheDecision, began: float,
                         error: Exception) -> Response:
        """Respond despite an error; the one place where a failed response is replaced by another.

        - The stored file cannot be read: ask the origin (invariant 6).
        - The origin fails: serve the stored copy, stale.  If it may not be served, raise the error with the
          reason, for Cache-Status and the log.

        ``began``: when the origin was asked (monotonic).
        """
        if not isinstance(error, ProxyError):
            log.warning("The stored file of %s cannot be read: %s", loggable_uri(request.uri), error)
            if self.config.offline or "only-if-cached" in cache_directives(request.fields):
                raise ProxyError("The stored file cannot be read: %s." % error, 504)
            try:
                return self._pass(request, decision, self.config, "not read: %s" % error)
            except ProxyError as failure:
                raise failure.with_reason(decision.forward, "the stored copy cannot be read") from None
        stored = self._find_stale(request, decision)
        if isinstance(stored, str):
            raise error.with_reason("" if decision.action is Action.REFUSE else decision.forward, stored)
        if isinstance(error, OriginError):
            self._failures.origin_failed(request, error, time.monotonic() - began)
        return self._serve_stale(request, decision, stored, str(error))

    def _find_stale(self, request: Request, decision: CacheDecision) -> StoredResponse | str:
        """Return a stored response that may be served instead of an error, or why there is none."""
        reason = why_not_from_cache(request, decision)
        stored = None if reason else look_up_for_client(self._store, self._origin, request)
        if stored is None:
            return reason or self._store.why_not_found(request.key)
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
        self._revalidator.watch(request)
        return response_from_store(
            request, stored, CacheStatus(Outcome.STALE, decision.forward, detail=reason))

    # For the event loop, for tunnels, and for the operator

    def prepare_hit(self, request: Request) -> tuple[PreparedHit | None, bool]:
        """Return a hit that nothing must be waited for, and whether nothing is stored."""
        stored = self._store.lookup(request.key)
        if stored is None:
            return None, True
        # Whether a client on another host may have a body file without a head takes a DNS lookup; whether a
        # signature is of its file's generation, another lookup in the store.
        is_open = request.client_is_local or (stored.described and not stored.head.local_clients_only)
        is_sure = is_open and not signed_keys(request.key) and not self._store.awaits_index(stored.head)
        # The end of this second, so that no Age is too low.
        hit = render_hit(request, stored, self.config, float(int(time.time()) + 1)) if is_sure else None
        if hit is None:
            stored.close()
        return hit, False

    def connect_tunnel(self, request: Request) -> socket.socket:
        """Open the connection that a CONNECT asks for; ProxyError."""
        check_request_allowed(request, self.config)
        if self.config.offline:
            raise ProxyError("This proxy is offline.", 504)
        if request.target.port not in self.config.connect_ports:
            raise ProxyError("CONNECT to port %d is not allowed; the operator can add --connect-ports. What "
                             "is fetched with http:// needs none, and is cached." % request.target.port, 403)
        return self._origin.connect(request.target, request.client_is_local, request.client)

    def add_listening_port(self, port: int) -> None:
        """Treat requests that lead back to a port of this proxy as loops."""
        self._origin.guard.listening_ports.add(port)

    def hits_valid_for(self) -> tuple[Any, ...]:
        """Return what changes when a hit must be prepared again: its age, the filters, what indexes tell."""
        return int(time.time()), self.config, self._store.knowledge_version()

    def snapshot(self) -> dict[str, Any]:
        """Describe what goes on now, for the status page: plain data of bounded size."""
        return {"downloads": self._downloader.snapshot(), "troubles": self._failures.snapshot(),
                "swept": self.evictor.last_report, "unstored": self._failures.disk_error(),
                "checks": self._store.checks, "cache": self._store.space.snapshot()}

    def start(self) -> None:
        """Start the background work."""
        start_thread(self.evictor.run, self.config)
        if self.config.scrub:
            start_thread(self._scrubber.run)

    def close_idle(self) -> None:
        """Close connections to origins that have been idle for too long; cheap if called often."""
        self._origin.pool.close_expired(time.monotonic())

    def close(self) -> None:
        """End the background work, and close idle connections."""
        self._stopped.set()
        self._store.space.scarce.set()  # on which the eviction waits
        self._downloader.locks.leases.close()
        self._origin.pool.close()


# ---------------------------------------------------------------------------------------------
# 12 Statistics
# ---------------------------------------------------------------------------------------------
#
# class             counts                              kept
# Counters          requests and bytes                  since the start
# TrafficHistory    the same, and bytes by time slot    over all time; saved by a thread of its own
# RecentRequests    the last requests, busiest origins  since the start
# StatusCollector   nothing: it collects the others' figures for the pages
#
# Every request passes Counters.add() and RecentRequests.note(), also those that the event loop answers from
# memory, so these two only add. Sorting, shortening and escaping are left to the pages.
# Lock order: TrafficHistory, then Counters. No lock is held while a file is read or written.

# Requests after which to look for a reason to give a hint: tunnels are conspicuous early, a cache without
# hits is not.
HINT_AFTER_REQUESTS = (20, 100)
# What the status page plots: seconds per slot, and number of slots.
PLOTS = {"hour": (60, 60), "day": (900, 96), "month": (21600, 120)}


class SendResult(NamedTuple):
    """What was sent of a response."""

    size: int  # bytes of the body
    cached: int  # bytes of it that came from the cache
    took: float  # seconds
    whole: bool  # nothing is missing
    quiet: bool = False  # write no log line


def usage_hint(outcomes: dict[str, int], details: Iterable[str]) -> str:
    """Explain why the cache saves nothing, or return "" if it does or if it is too early to tell.

    Two situations are reported: almost all requests are tunnels, whose content cannot be cached, and none of
    the first hundred requests was a hit.

    ``outcomes``: number of requests by outcome, besides other counts.  ``details``: why recent responses were
    not stored ("" if they were), as in Cache-Status.
    """
    # Pages of the proxy and refused requests say nothing about the repositories that the clients use.
    counts = {each: outcomes[each.value] for each in Outcome if each not in (Outcome.OWN, Outcome.REFUSED)}
    total, tunnels = sum(counts.values()), counts[Outcome.TUNNEL]
    if total and tunnels >= 0.9 * total:
        return ("%d of %d requests used CONNECT: https passes through unseen and cannot be cached. Use "
                "http:// if packages are signed, or put the proxy's address in front of https:// addresses: "
                "http://this-host:9999/https://mirror.example.org/." % (tunnels, total))
    # The caller asks only once after the hundredth request of any kind, so refused requests must count here:
    # with one of them among the hundred, ``total`` would still be below the threshold.
    seen = total + outcomes[Outcome.REFUSED.value]
    hits = sum(count for outcome, count in counts.items() if outcome.from_cache)
    if not total or seen < HINT_AFTER_REQUESTS[-1] or hits:
        return ""
    most = max(counts, key=counts.__getitem__)
    common = collections.Counter(filter(None, details)).most_common(1)
    why = most.hint or "most responses must not be stored" + (" (%s)" % common[0][0] if common else "")
    return "None of the first %d requests was a hit: %s." % (total, why)


class Counters:
    """Count requests by outcome, and bytes, since the start.  All methods may be called from any thread.

    ``statsCacheBytes`` and ``statsDownBytes`` have the names that the Go program gave them in /debug/vars:
    body bytes sent to clients that no origin had to send for them (hits, validated and stale responses, and
    downloads that another client had begun), and body bytes received from origins.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _totals
        self._totals = {"statsCacheBytes": 0, "statsDownBytes": 0, "statsTunnelBytes": 0,
                        **{outcome.value: 0 for outcome in Outcome}}
        self._started = time.time(), time.monotonic()

    def add_bytes(self, count: int, name: str = "statsDownBytes") -> None:
        """Add body bytes from an origin or, as ``statsTunnelBytes``, those of a tunnel in both directions."""
        with self._lock:
            self._totals[name] += count

    def add(self, outcome: Outcome, cached: int = 0) -> None:
        """Add a request with this outcome, answered with ``cached`` body bytes from the cache."""
        with self._lock:
            self._totals[outcome._value_] += 1  # a plain attribute; .value is a slow property
            self._totals["statsCacheBytes"] += cached

    def start_time(self, now: float) -> float:
        """Return the clock time of the start, given the clock time ``now``.

        A machine without a battery-backed clock boots with a wrong time, and sets its clock after the proxy
        has started.  So if the clock has been changed by more than a minute, the start is computed again from
        the monotonic clock; smaller corrections must not move a start time that is published in /metrics.
        """
        started, monotonic_start = self._started
        corrected = now - (time.monotonic() - monotonic_start)
        return started if abs(corrected - started) < 60 else corrected

    def totals(self) -> dict[str, int]:
        """Return all counters in one flat dictionary, whose values never decrease."""
        with self._lock:
            return dict(self._totals)

    def snapshot(self) -> dict[str, Any]:
        """Return the counters as /debug/vars shows them, with the outcomes in a dictionary of their own."""
        counts = self.totals()
        outcomes = {outcome.value: counts.pop(outcome.value) for outcome in Outcome}
        return {**counts, "statsRequests": sum(outcomes.values()), "statsOutcomes": outcomes}


def _parse_count(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < 2**63:
        raise ValueError("not a counter")
    return number


class TrafficHistory:
    """Keep counters over all time, and bytes per time slot for the plots, across restarts.

    Each instance on a cache root has a history file of its own, named after the instance: two processes that
    wrote one file would lose each other's counts.  A lost or damaged file costs only the past; an unwritable
    folder costs nothing until the next restart.
    """

    def __init__(self, metadata_folder: str, name: str, counters: Counters) -> None:
        """``name``: --instance or the listening addresses.  ``counters``: polled, never changed."""
        self._path = os.path.join(metadata_folder, "history-%s.json" % urllib.parse.quote(name, "")[:200])
        self._counters = counters
        self._stop = threading.Event()
        self._saver = threading.Thread(target=self._save_periodically, daemon=True)
        self._saved = b""  # content of the file, as this process has written it
        self._is_shared = False  # another process writes it, too; this has been logged
        self._lock = threading.Lock()  # guards all below
        self._since = int(time.time())  # clock time of the very first start
        self._all: collections.Counter[str] = collections.Counter()  # over all time, as of the last record()
        self._recorded: dict[str, int] = {}  # of this run, as of the last record()
        # For each plot, by slot number (clock time // width): bytes from the cache, bytes from origins.
        self._slots: dict[str, dict[int, list[int]]] = {name: {} for name in PLOTS}

    def start(self) -> None:
        """Load the saved history, and start the thread that saves it every minute."""
        if not os.path.exists(self._path):
            # Earlier versions had one file for all instances: the first one to start inherits it.
            with contextlib.suppress(OSError):
                os.rename(os.path.join(os.path.dirname(self._path), "history.json"), self._path)
        self._load()
        self._saver.start()

    def stop(self) -> None:
        """Stop the thread and save for the last time."""
        self._stop.set()
        self._saver.join(1.0)
        self.save()

    def _save_periodically(self) -> None:
        while not self._stop.wait(HISTORY_SAVE_INTERVAL):
            self.save()

    def record(self, now: float) -> None:
        """Add everything counted since the last call to the history and to the slots of ``now``."""
        with self._lock:
            totals = self._counters.totals()
            gained = {name: count - self._recorded.get(name, 0) for name, count in totals.items()}
            self._recorded = totals
            self._all.update(gained)  # a Counter adds
            traffic = gained["statsCacheBytes"], gained["statsDownBytes"]
            for name, (width, most) in PLOTS.items():
                current, slots = int(now // width), self._slots[name]
                if any(traffic):
                    slots[current] = [old + new for old, new in zip(slots.get(current, (0, 0)), traffic)]
                # abs(): after the clock was set back, slots of the future are dropped too.
                self._slots[name] = {at: row for at, row in slots.items() if abs(current - at) < most}

    def snapshot(self, now: float) -> dict[str, Any]:
        """Return the counters over all time, and the slots of each plot, oldest first, up to ``now``."""
        self.record(now)
        with self._lock:
            plots = {name: {"seconds": width, "bytes": [
                self._slots[name].get(int(now // width) - age, [0, 0]) for age in range(most - 1, -1, -1)]}
                for name, (width, most) in PLOTS.items()}
            return {"allTime": {"since": self._since, **self._all}, "plots": plots}

    def _load(self) -> None:
        # The file may be damaged, or from another version: check each value before using it.
        try:
            saved = json.loads(read_metadata(self._path))
            since = _parse_count(saved["since"])
            counts = {str(name): _parse_count(count) for name, count in saved["all"].items()}
            slots = {name: {int(number): [_parse_count(row[0]), _parse_count(row[1])]
                            for number, row in saved["slots"][name].items()} for name in PLOTS}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return
        with self._lock:
            self._since, self._all, self._slots = since, collections.Counter(counts), slots

    def save(self) -> None:
        """Write the history file, if there is anything to save that has changed; errors are ignored."""
        self.record(time.time())
        with self._lock:
            data = json.dumps({"since": self._since, "all": self._all, "slots": self._slots}).encode()
        if data != self._saved and any(self._all.values()):
            with contextlib.suppress(OSError):  # it was removed
                if self._saved and not self._is_shared and read_metadata(self._path) != self._saved:
                    self._is_shared = True
                    log.warning("Another process writes %s, too: give each an --instance.", self._path)
            with contextlib.suppress(OSError):
                replace_file(self._path, data)
                self._saved = data


class RecentRequests:
    """Remember the last requests, clients and origins, and warn users whose proxy saves nothing."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._warned = RecentEvents()  # topics about which a warning has been logged
        self._lock = threading.Lock()  # guards all below
        self._seen = 0  # requests, except those for pages of the proxy
        # The last requests by Outcome.colour, so that a burst of hits does not displace the failures.
        self._recent: dict[str, Any] = {each.colour: collections.deque(maxlen=MAX_ROWS) for each in Outcome}
        # By host and port, and by address: requests, bytes sent, bytes of these from the cache, time of the
        # last request; None: all others.
        self._origins: dict[Any, list[float]] = {}
        self._clients: dict[Any, list[float]] = {}

    def note(self, request: Request, status: int, cache_status: CacheStatus,
             answers: list[tuple[str, SendResult]]) -> None:
        """Record one request, and the clients that were sent the same response at the same time.

        ``answers``: for each client its address and the result of sending.  Not for the proxy's own pages.
        """
        target, outcome, now = request.target, cache_status.outcome, time.time()
        with self._lock:
            before = self._seen
            self._seen = seen = before + len(answers)
            for number, (client, sent) in enumerate(answers[-MAX_ROWS:], before):
                self._recent[outcome.colour].append((
                    number, now, client, request.method, target, request.uri, status, sent, cache_status))
            # Any client can invent host names: only those that gave a response take a row.
            found = target.host and outcome not in (Outcome.REFUSED, Outcome.FAILED)
            origin: list[float] = [0, 0, 0, 0] if not found else self._row(
                self._origins, (target.host, target.port))
            for client, sent in answers if outcome is not Outcome.REFUSED else ():
                for row in (origin, self._clients.get(client) or self._row(self._clients, client)):
                    row[:] = row[0] + 1, row[1] + sent.size, row[2] + sent.cached, now
        if before < HINT_AFTER_REQUESTS[-1] and any(before < due <= seen for due in HINT_AFTER_REQUESTS):
            with self._lock:
                details = [row[-1].detail for rows in self._recent.values() for row in rows]
            self._warn_once("outcomes", usage_hint(self._counters.totals(), details))
        elif cache_status.forward == "bypass" and is_immutable_name(request.key):
            self._warn_once("filters", "A filter excludes a package from the cache: %s." %
                            displayable_uri(request.uri))

    @staticmethod
    def _row(table: dict[Any, list[float]], key: Any) -> list[float]:
        """Return the row of a key.  If the table is full, the least busy row is added to that of None."""
        if key not in table and len(table) > MAX_ORIGINS:
            least = min(filter(None, table), key=lambda name: table[name][0])
            others, row = table.setdefault(None, [0, 0, 0, 0]), table.pop(least)
            others[:] = [*map(sum, zip(others[:3], row)), max(others[3], row[3])]
        return table.setdefault(key, [0, 0, 0, 0])

    def _warn_once(self, topic: str, text: str) -> None:
        if text and self._warned.note_first(topic, math.inf):
            log.warning("%s", text)

    def snapshot(self) -> dict[str, Any]:
        """Return the newest request, and the client and origin with most bytes, first, in bounded size.

        Everything here came from clients: it is shortened, and stripped of control characters and of queries.
        """
        with self._lock:
            newest = sorted(itertools.chain(*self._recent.values()), key=lambda row: row[0], reverse=True)
            hosts, addresses = [sorted([(name, *row) for name, row in table.items()], key=lambda row: -row[2])
                                for table in (self._origins, self._clients)]
        origins: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for host, *counts in hosts:
            # Two long names can look alike when shortened: their counts are added up.
            name = truncate_middle(Target("http", host[0], host[1], "").authority, 80) if host else "other"
            origins[name].update(dict(zip(("requests", "bytes", "cached"), counts)))  # a Counter adds
        return {"origins": origins, "clients": [
            {"client": truncate_middle(client or "others", 45), "requests": requests, "bytes": size,
             "cached": cached, "seen": seen} for client, requests, size, cached, seen in addresses],
            "recent": [
            {"at": at, "client": truncate_middle(client, 45), "method": truncate_middle(method, 16),
             "uri": displayable_uri(target.uri if target.host and method != "CONNECT" else uri),
             "status": status, "bytes": sent.size, "seconds": round(sent.took, 3),
             "outcome": cache_status.outcome.value, "detail": truncate_middle(cache_status.detail, 80)}
            for _, at, client, method, target, uri, status, sent, cache_status in newest]}


def disk_usage(root: str) -> dict[str, int]:
    """Return the total and free bytes of a folder's file system; {} if it cannot be read."""
    with contextlib.suppress(OSError):
        found = shutil.disk_usage(root)
        return {"size": found.total, "free": found.free}
    return {}


def try_writing(folder: str) -> None:
    """Raise OSError if no file with content can be made in a folder."""
    # A full disk may still take an empty file.
    path = os.path.join(folder, "^probe-" + secrets.token_hex(4))
    replace_file(path, "x")
    os.unlink(path)


class StatusCollector:
    """Collect everything that the pages show about this process, and judge its health.

    ``counters`` and ``recent`` are for the caller to feed, ``history`` to start and stop.
    """

    def __init__(self, store: Store, counters: Counters, name: str,
                 more: Callable[[], dict[str, Any]]) -> None:
        """``name``: of the history file.  ``more``: returns what only the proxy knows (Proxy.snapshot)."""
        self.recent = RecentRequests(counters)
        self.history = TrafficHistory(store.metadata_folder, name, counters)
        self.counters = counters
        self._store = store
        self._more = more

    def snapshot(self) -> dict[str, Any]:
        """Return the figures of all sources as plain data that json can write."""
        now = time.time()
        return {"now": now, "since": self.counters.start_time(now), "disk": disk_usage(self._store.root),
                "host": socket.gethostname(), "counters": self.counters.totals(), **self.counters.snapshot(),
                **self.history.snapshot(now), **self.recent.snapshot(), **self._more()}

    def health_problem(self) -> str:
        """Return why this process can neither serve nor store, or "" if it can: tried, not guessed."""
        try:
            try_writing(self._store.metadata_folder)
            start_thread(int)  # a thread that ends at once
        except OSError as error:
            self._store.space.scarce.set()  # the disk may be full: let the next eviction run early
            return "Cannot write to the cache root: %s." % (error.strerror or error)
        except StorageError:
            return "Cannot start any more threads."
        return ""


# ---------------------------------------------------------------------------------------------
# 13 Pages
# ---------------------------------------------------------------------------------------------
#
# path                    answer
# /                       the status page for browsers, a greeting as text for curl (by the Accept field)
# /status.json            the status page's figures, and its changed parts as HTML for its script
# /metrics                the same figures for Prometheus
# /debug/vars             counters as JSON, as the Go program had them
# /healthz                200 "ok", or 503 and the reason
# /setup/                 the commands that make package managers use the proxy, and those that undo it
# /setup/NAME             one of them as text, with the address by which the client came
# /proxy.pac, /wpad.dat   proxy autoconfiguration
# /robots.txt, /favicon.ico   what browsers and crawlers ask every server for
#
# The functions here turn a snapshot of StatusCollector into text, and have no state. Host names and URIs in
# it come from clients: whatever goes into HTML passes escape() first. The Content-Security-Policy allows the
# page's own script and style by their digests, and nothing else.


class Page(NamedTuple):
    """A page that the proxy makes itself."""

    media: str  # Content-Type
    text: str
    status: int = 200
    policy: str = "default-src 'none'"  # Content-Security-Policy
    reason: str = ""  # reason phrase; "": the usual one


TEXT = "text/plain; charset=utf-8"
WELCOME = """pkgproxy %(version)s: a caching HTTP proxy for package managers.
%(state)s

Set this as your HTTP proxy:
  export http_proxy=http://%(proxy)s

Package managers: http://%(proxy)s/setup/; status page: http://%(proxy)s/ in a browser
"""
# For each client: the text of its setting, the file that this belongs to, and the command that undoes it.  A
# file that exists only for this is written, and one that others write too ("+") gets one line more; both are
# undone by a rule (see setup_commands).  Without a file the text is a command, which changes nothing the
# second time.  zypper and pacman have a distribution's file to change; apk, xbps and podman read only the
# environment.  The real names of repositories are examples.
SETUP = {
    "apt": ('Acquire::http::Proxy "http://%(proxy)s";', "/etc/apt/apt.conf.d/01proxy", ""),
    "dnf": ("proxy=http://%(proxy)s", "+/etc/dnf/dnf.conf", ""),
    "yum": ("proxy=http://%(proxy)s", "+/etc/yum.conf", ""),
    "zypper": (r"f=/etc/sysconfig/proxy; [ -e $f.old ] || cp -p $f $f.old; sed -i -e 's|^PROXY_ENABLED=.*|"
               r"""PROXY_ENABLED="yes"|' -e 's|^HTTP_PROXY=.*|HTTP_PROXY="http://%(proxy)s"|' $f""", "",
               "mv /etc/sysconfig/proxy.old /etc/sysconfig/proxy"),
    "pacman": (r"d=/etc/pacman.d; sed -n 's|^\s*Server *= *|CacheServer = http://%(proxy)s/|p' $d/mirrorlist "
               "> $d/pkgproxy; grep -q $d/pkgproxy /etc/pacman.conf || sed -i "
               r"'\|^\s*Include.*/mirrorlist|i Include = /etc/pacman.d/pkgproxy' /etc/pacman.conf", "",
               "sed -i '/pacman.d.pkgproxy$/d' /etc/pacman.conf; rm /etc/pacman.d/pkgproxy"),
    **dict.fromkeys(("apk", "xbps", "podman", "env"), (
        "export http_proxy=http://%(proxy)s", "/etc/profile.d/pkgproxy.sh", "")),
    "pkg": ('PKG_ENV : { http_proxy: "http://%(proxy)s" }', "+/usr/local/etc/pkg.conf", ""),
    "opkg": ("option http_proxy http://%(proxy)s", "/etc/opkg/pkgproxy.conf", ""),
    "portage": ('http_proxy="http://%(proxy)s"', "+/etc/portage/make.conf", ""),
    "apt-https": (r"sed -i 's| \(https://download.docker.com\)| http://%(proxy)s/\1|' "
                  "/etc/apt/sources.list.d/*", "",
                  "sed -i 's| http://%(pattern)s/https://| https://|' /etc/apt/sources.list.d/*"),
    "pip": ("pip config set global.index-url http://%(proxy)s/https://pypi.org/simple/; "
            "pip config set global.trusted-host %(host)s", "",
            "pip config unset global.index-url; pip config unset global.trusted-host"),
    "npm": ("npm set registry=http://%(proxy)s/https://registry.npmjs.org", "", "npm config delete registry"),
    "docker": ("docker build --build-arg http_proxy=http://%(proxy)s .", "", "docker build ."),
    "github-runner": ("http_proxy=http://%(proxy)s", "+.env", ""),
    "gitlab-runner": ("f=/etc/gitlab-runner/config.toml; grep -q '^ *environment *=' $f || sed -i "
                      r"""'/^\[\[runners]]/a\  environment = ["http_proxy=http://%(proxy)s"]' $f""", "",
                      r"""sed -i '\|^  environment = \["http_proxy=http://%(pattern)s"]$|d' """
                      "/etc/gitlab-runner/config.toml"),
}
DETECT = """#!/bin/sh
# Tells apt to use the proxy if it is reachable and healthy, else to connect directly. In apt.conf:
#   Acquire::http::Proxy-Auto-Detect "/usr/local/bin/pkgproxy-detect";
# To undo it, remove both files.
if timeout 2 bash -c 'exec 3<>/dev/tcp/%(host)s/%(port)d && printf "GET /healthz HTTP/1.0\\r\\n\\r\\n" >&3 &&
    read -r _ status _ <&3 && [ "$status" = 200 ]' 2>/dev/null; then
    echo 'http://%(proxy)s'
else
    echo DIRECT
fi
"""
AVAHI = """<!DOCTYPE service-group SYSTEM "avahi-service.dtd">
<!-- For squid-deb-proxy-client: /etc/avahi/services/pkgproxy.service on the proxy's machine; undo: rm it. -->
<service-group><name replace-wildcards="yes">pkgproxy on %%h</name>
<service><type>_apt_proxy._tcp</type><port>%(port)d</port></service></service-group>
"""
AUTOCONFIG = r"""function FindProxyForURL(url, host) {
    host = host.replace(/\.$/, "");
    if (!/^http:/i.test(url) || host == "%(host)s" || !/^[^:]+\.[^:]+$/.test(host)
            || /(^|\.)(local|lan|internal|localhost|home\.arpa|fritz\.box)$/i.test(host)
            || /^(0|10|127|169\.254|172\.(1[6-9]|2\d|3[01])|192\.168)\.[\d.]+$/.test(host)
            || /^100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7])\.[\d.]+$/.test(host))
        return "DIRECT";
    return "PROXY %(proxy)s; DIRECT";
}
"""
FIXED_PAGES = {  # media type and text by path
    **dict.fromkeys(("wpad.dat", "proxy.pac"), ("application/x-ns-proxy-autoconfig", AUTOCONFIG)),
    "setup/detect.sh": (TEXT, DETECT), "setup/avahi": (TEXT, AVAHI), "favicon.ico": ("image/x-icon", ""),
    "robots.txt": (TEXT, "User-agent: *\nDisallow: /\n")}


def format_duration(seconds: float) -> str:
    """Format a duration for people, rounded down to the largest unit of which there are enough.

    >>> format_duration(59), format_duration(90), format_duration(7200), format_duration(3e5)
    ('59 s', '1 min', '2 h', '3 days')
    """
    for least, width, unit in ((2 * DAY, DAY, "days"), (7200, 3600, "h"), (60, 60, "min")):
        if seconds >= least:
            return "%d %s" % (seconds // width, unit)
    return "%d s" % max(0, seconds)


def format_count(count: int, noun: str) -> str:
    """Format a number with its noun.

    >>> format_count(1, "file"), format_count(12000, "file")
    ('1 file', '12,000 files')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_percent(part: int, whole: int) -> str:
    """Format a share as a percentage, rounded down; a dash if the whole is 0."""
    return "%d %%" % (100 * part // whole) if whole else "–"


def hit_counts(counts: dict[str, int]) -> tuple[int, int]:
    """Return how many requests were answered from the cache, and how many could have been.

    ``counts``: number of requests by outcome.  Tunnels, pages of the proxy, refused and failed requests
    are in neither number, because a cache cannot answer them.
    """
    rated = [(outcome, counts.get(outcome.value, 0)) for outcome in Outcome if outcome.in_hit_rate]
    return sum(count for outcome, count in rated if outcome.from_cache), sum(count for _, count in rated)


def summary(view: dict[str, Any]) -> str:
    """Say in one or two sentences whether the proxy works and what it has saved."""
    answered = sum(view["counters"].get(each.value, 0) for each in Outcome if each is not Outcome.OWN)
    done = ". %s answered, %s saved." % (
        format_count(answered, "request"), format_bytes(view["counters"]["statsCacheBytes"]))
    return "Running for %s%s" % (format_duration(view["now"] - view["since"]),
                                 done if answered else ", waiting for the first request.")


# The status page: one file without external resources. Its script replaces the elements that have changed
# every two seconds, but none in which text is selected; without scripts the page reloads itself every ten.
# What the user has chosen stands outside these elements: radio buttons, whose state the style applies.
# STYLE's colours: bytes from the cache are blue, from origins brown, stale is violet, everywhere. Each text
# colour has a contrast of at least 4.5 to each background, by day and by night (WCAG 2.2 §1.4.3; a test
# computes it).
STYLE = """
:root{color-scheme:light dark;--back:#f5f6f8;--card:#fff;--text:#1b1f24;--soft:#5a6270;--line:#dfe2e7;
--cache:#1c64c8;--origin:#a8570a;--stale:#7a3fb5;--bad:#b3261e;--good:#1a7034}
@media(prefers-color-scheme:dark){:root{--back:#14171b;--card:#1c2026;--text:#e6e8eb;--soft:#a0a8b4;
--line:#30363e;--cache:#6cabff;--origin:#eaa04e;--stale:#c99cff;--bad:#ff8a80;--good:#5fc97b}}
*{box-sizing:border-box}body{margin:0 auto;max-width:70rem;padding:1.5rem 1rem 3rem;background:var(--back);
color:var(--text);font:1rem/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums}
header{display:flex;flex-wrap:wrap;gap:.25rem 1rem;align-items:center}header a{margin-left:auto}
header b{border:1px solid;border-radius:1rem;padding:0 .75rem}h1{font-size:1.5rem;margin:0;
overflow-wrap:anywhere}h2{font-size:1rem;margin:0 0 .75rem}p{margin:.25rem 0}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem 1.25rem;
margin-top:1rem;min-width:0}.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),
1fr));gap:0 1rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem;margin:0}dd{margin:0}
dt+dd{font-size:1.75rem;line-height:1.3;font-weight:600}dt,dd+dd,.soft,th,figcaption{color:var(--soft);
font-size:.875rem;font-weight:400}
.good{color:var(--good)}b.bad,p.bad,.bad>:first-child{color:var(--bad)}a,.cache>:first-child,
b.cache{color:var(--cache)}.origin>:first-child,b.origin{color:var(--origin)}
.stale>:first-child{color:var(--stale)}path{fill:var(--cache)}path.origin{fill:var(--origin)}
path.grid{fill:none;stroke:var(--line);vector-effect:non-scaling-stroke}
svg{display:block;width:100%;height:9rem;border-bottom:1px solid var(--soft)}figure{margin:0;display:none}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem}figure>div{position:relative;
margin:.5rem 5rem 0 0}figure i{position:absolute;left:100%;top:-.375rem;padding-left:.5rem;
font:.75rem/1 system-ui;white-space:nowrap;color:var(--soft)}.half{margin-top:4.5rem}
.quarter{margin-top:6.75rem}.zero{margin-top:9rem}div+figcaption{margin-right:5rem;font-size:.75rem}
#hour:checked~div .hour,#day:checked~div .day,#month:checked~div .month{display:block}
#all:checked~table tr:nth-child(n+21),#cached:checked~* tbody :not(.cache,td,span),
#sent:checked~* tbody :not(.origin,td,span),#stale:checked~* tbody :not(.stale,td,span),
#failed:checked~* tbody :not(.bad,td,span),#setup label+div{display:none}input{position:absolute;opacity:0}
label{display:inline-block;padding:.125rem .75rem;margin:0 .25rem .75rem 0;border:1px solid var(--line);
border-radius:1rem;font-size:.875rem;cursor:pointer}:checked+label{background:var(--cache);
border-color:var(--cache);color:var(--card)}:focus-visible+label{outline:2px solid var(--cache);
outline-offset:2px}
#setup>div{display:flex;flex-wrap:wrap;margin-top:.75rem}#setup :checked+label+div{display:block;order:1;
width:100%}pre{margin:.25rem 0 .75rem;padding:.5rem .75rem;background:var(--back);border-radius:.25rem;
font-size:.8125rem;white-space:pre-wrap;overflow-wrap:anywhere;user-select:all}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25rem 1rem .25rem 0;
vertical-align:top;border-top:1px solid var(--line)}th{border:0}.n{text-align:right;white-space:nowrap}
.n:last-child{padding-right:0}.name{overflow-wrap:anywhere;min-width:6rem}.name .soft{display:block}td,
li{font-size:.875rem;list-style:none}li+li{margin-top:.75rem}ul{margin:0;padding:0}progress{display:block;
width:100%;accent-color:var(--cache)}
#lost,.lost #health{display:none}.lost #lost{display:inline}.lost main{opacity:.5}
@media(max-width:40rem){body{padding:1rem .5rem 2rem}section{padding:.75rem}th,td{padding-right:.5rem}
.tall thead{display:none}.tall tr{display:block;border-top:1px solid var(--line);padding:.5rem 0}
.tall td{display:inline-block;border:0;padding:0 .5rem 0 0}.tall .name{display:block}
.tall .n:last-child::after{content:" ago"}}
"""
SCRIPT = """
"use strict"; const seen = {};
async function update() {
  if (document.hidden) return;
  try {
    const view = await (await fetch("/status.json", {signal: AbortSignal.timeout?.(5000)})).json();
    for (const [id, text] of Object.entries(view.html)) {
      const part = document.getElementById(id), chosen = getSelection();
      if (seen[id] !== text && (chosen.isCollapsed || !chosen.containsNode(part, true)))
        part.innerHTML = seen[id] = text;
    }
    document.body.className = ""; document.title = view.health + " – pkgproxy on " + view.host;
  } catch (error) { document.body.className = "lost"; document.title = "disconnected"; }
}
setInterval(update, 2000);
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%(word)s – pkgproxy on %(host)s</title><link rel="icon" href="data:,"><style>%(style)s</style>
<noscript><meta http-equiv="refresh" content="10"></noscript></head><body><header>
<h1>pkgproxy on %(host)s</h1><span id="health" role="status">%(health)s</span>
<b id="lost" class="bad">disconnected</b><a href="#setup">Set up clients</a></header>
<main><p id="state" class="soft">%(state)s</p><div id="problems">%(problems)s</div>%(first)s
<section id="disk" aria-label="Size of the cache">%(disk)s</section>
<section aria-label="Savings"><dl id="figures">%(figures)s</dl></section>
<section><h2>Bytes from the cache and from origins</h2>%(spans)s<div id="plots">%(plots)s</div></section>
<div class="two"><section><h2>Clients</h2><table id="clients">%(clients)s</table></section>
<section><h2>Busiest origins</h2><table id="origins">%(origins)s</table></section></div>
<section><h2>Running downloads</h2><div id="downloads">%(downloads)s</div></section>
<section><h2>Last requests</h2>%(outcomes)s<table id="recent" class="tall">%(recent)s</table></section>
%(last)s<p class="soft">pkgproxy %(version)s. For monitoring: <a href="/status.json">/status.json</a>,
<a href="/metrics">/metrics</a>, <a href="/debug/vars">/debug/vars</a>, <a href="/healthz">/healthz</a>.</p>
</main><script>%(script)s</script></body></html>
"""
SIZE = """<b>%s, %s, %s free on the disk</b><progress aria-label="Space in use" max="100" value="%.2f">
</progress><span class="soft">Since the start: %s evicted (%s), %s.</span>"""
SETUP_SECTION = """
<section id="setup"><h2>Set up clients</h2><p>Run a line on the client, as root where it changes the system.
Repositories are cached if their addresses start with http:// or http://%(proxy)s/https://, not with https://.
If a client cannot reach %(proxy)s, open this page under another address.</p><div>%(commands)s</div>
<p class="soft">As text: <a href="/setup/">/setup/</a>. On laptops that leave this network, let apt run
<a href="/setup/detect.sh">/setup/detect.sh</a>; other clients can use <a href="/proxy.pac">/proxy.pac</a>.
</p></section>"""
SETUP_CHOICE = """<input type="radio" name="setup" id="to-%s" %s><label for="to-%s">%s</label>
<div><pre>%s</pre><span class="soft">To undo it:</span><pre>%s</pre></div>"""


# A hash allows exactly this inline text (W3C CSP Level 3 §2.3.1).
POLICY = ("default-src 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % tuple(
              base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (STYLE, SCRIPT)))


def problems(view: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is wrong at the moment: for each problem a few words, and sentences that explain it."""
    found = [] if view["disk"] else [("disk unreadable", "Cannot read the cache directory.")]
    if view["unstored"]:
        word = "disk full" if " space" in view["unstored"] else "cannot store"
        found.append(("cache full" if "--max-size" in view["unstored"] else word,
                      "Cannot store anything: %s." % view["unstored"]))
    # What is known about a whole origin has no path; an error is known for one file only.
    sites = [row["origin"].partition("://")[2].partition("/") for row in view["troubles"]]
    if sites:
        word = "failing" if any(slash for _, slash, _ in sites) else "unreachable"
        found.append(("%s %s" % (format_count(len({host for host, _, _ in sites}), "origin"), word), ""))
    return found + [("", "%s is failing: %s Serving cached copies for the next %s." % (
        row["origin"], row["reason"], format_duration(row["seconds"]))) for row in view["troubles"]]


def _short(count: float) -> str:
    """Format a number of bytes without a needless zero.

    >>> _short(20e9), _short(4.3e9)
    ('20 GB', '4.3 GB')
    """
    return format_bytes(count).replace(".0 ", " ")


def _disk_html(view: dict[str, Any]) -> str:
    """Return the size of the cache as a bar: of its limit, else of the space that it could take."""
    size, most, swept = view["cached_bytes"], view["max_bytes"], view["swept"]
    used, whole = _short(size), _short(most or 0)
    if most:
        used = "%s of %s" % (used[:-3] if used[-3:] == whole[-3:] else used, whole)
    share = 100 * size / (most or size + view["free_bytes"] or 1)
    return SIZE % (
        used, format_count(view["cached_files"], "file"), _short(view["free_bytes"]), min(100, share),
        format_count(swept["removedFiles"], "file"), _short(swept["removedBytes"]),
        format_count(view["counters"]["stale"], "stale response"))


def _figures_html(view: dict[str, Any]) -> str:
    """Return the savings and hit rates, over all time and since the start."""
    text = ""
    for title, key in (("over all time", "allTime"), ("since the start", "counters")):
        counts = view[key]
        saved, down = counts.get("statsCacheBytes", 0), counts.get("statsDownBytes", 0)
        share, (found, asked) = format_percent(saved, saved + down), hit_counts(counts)
        sources = "%s came from the cache, %s from origins" % (share, format_bytes(down))
        for name, figure, meaning in (
                ("Saved", format_bytes(saved), sources if saved + down else "no traffic yet"),
                ("Hits", format_percent(found, asked), f"{found:,} of {format_count(asked, 'request')}")):
            text += "<div><dt>%s %s</dt><dd>%s</dd><dd>%s</dd></div>" % (name, title, figure, meaning)
    return text


# A plot stretches to any width, so its bars are in units of a slot: x is the slot's number, 0 the oldest one.
# y is the square root of the share of the scale, in percent of the height: a burst is a hundred times what is
# usual, and both must be seen.  The page holds all three plots, and its style shows the chosen one.
PLOT = """<figure class="%(name)s"><figcaption><span><b class="cache">&#9632;</b> %(cache)s from the cache
&ensp;<b class="origin">&#9632;</b> %(origin)s from origins</span>
<span>bytes in %(slot)s, square-root scale</span></figcaption>
<div><i>%(scale)s</i><i class="half">%(half)s</i><i class="quarter">%(quarter)s</i>
<i class="zero">0</i><svg viewBox="0 0 %(slots)d 100" preserveAspectRatio="none" role="img"
aria-label="The last %(span)s: %(cache)s from the cache, %(origin)s from origins">
<path class="grid" d="M0 0H%(slots)dM0 50H%(slots)dM0 75H%(slots)dM%(third)d 0V100M%(two)d 0V100"/>
<path d="%(low)s"/><path class="origin" d="%(high)s"/></svg></div>
<figcaption><span>%(span)s ago</span><span>%(late)s</span><span>%(later)s</span><span>now</span></figcaption>
</figure>"""


def _bars(rows: Iterable[tuple[float, float]]) -> str:
    """Return an SVG path of one bar per row, from its lower to its upper end (shares of the scale)."""
    ends = [(10 * math.sqrt(100 * low), 10 * math.sqrt(100 * top)) for low, top in rows]
    return "".join("M%d %.1fh.8v%.1fh-.8z" % (at, 100 - top, top - low)
                   for at, (low, top) in enumerate(ends) if top > low)


def _plots_html(view: dict[str, Any]) -> str:
    """Return the three plots: bytes from the cache, and stacked on them bytes from origins."""
    text = ""
    for name, plot in view["plots"].items():
        rows, width = plot["bytes"], plot["seconds"]
        cache, origin = (sum(column) for column in zip(*rows))
        peak, third = max(map(sum, rows)), len(rows) // 3
        # A round number that the peak does not exceed, at least a kilobyte; its quarters are round enough.
        scale = next(base * 10**power for power in itertools.count(3) for base in (1, 2, 4, 6, 8)
                     if base * 10**power >= peak)
        text += PLOT % {
            "name": name, "cache": format_bytes(cache), "origin": format_bytes(origin), "slots": len(rows),
            "slot": format_duration(width), "span": format_duration(width * len(rows)),
            "scale": _short(scale), "half": _short(scale / 4), "quarter": _short(scale / 16),
            "third": third, "two": 2 * third, "late": format_duration(width * 2 * third),
            "later": format_duration(width * third), "low": _bars((0, one / scale) for one, _ in rows),
            "high": _bars((one / scale, (one + other) / scale) for one, other in rows)}
    return text


def _uri_html(uri: str) -> str:
    """Return the name of a file, followed by the rest of its URI in a soft colour."""
    folder, slash, name = escape(uri).rpartition("/")
    if not name or "://" not in folder:  # a CONNECT target has no file name
        return escape(uri)
    return '%s <span class="soft">%s</span>' % (name, folder + slash)


def _downloads_html(view: dict[str, Any]) -> str:
    """Return the running downloads with their progress bars."""
    text = ""
    for row in view["downloads"]:
        length = row["length"]  # None if the origin did not declare it: a bar without a value, which moves
        bar, whole = ("", "") if length is None else (
            ' max="%d" value="%d"' % (length or 1, row["bytes"]), " of " + format_bytes(length))
        text += '<li class="name">%s<progress aria-label="%s"%s></progress>%s%s, %s/s, %s</li>' % (
            _uri_html(row["uri"]), escape(row["uri"]), bar, format_bytes(row["bytes"]), whole,
            format_bytes(row["rate"]), format_count(row["clients"], "client"))
    return "<ul>%s</ul>" % text if text else '<p class="soft">None at the moment.</p>'


def _table(titles: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Return the rows of a table; each consists of its class and its cells, which are HTML.

    ``titles``: separated by spaces, each with the class of its column after a colon.
    """
    columns = [title.partition(":")[::2] for title in titles.split()]
    head = "".join("<th class=%s>%s" % (column, title.replace("_", " ")) for title, column in columns)
    body = "".join("<tr class=%s>" % row[0] + "".join("<td class=%s>%s" % (column, cell)
                   for (_, column), cell in zip(columns, row[1:])) for row in rows)
    return "<thead><tr>%s</thead><tbody>%s" % (head, body) if body else '<tr><td class="soft">None yet.'


def _tables_html(view: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by their ids: last requests, clients and origins with most bytes."""
    recent = []
    for row in view["recent"]:
        seconds, notes = row["seconds"], [  # only unusual values
            row["method"] if row["method"] != "GET" else "",
            str(row["status"]) if row["status"] != 200 else "", row["detail"]]
        recent.append((
            Outcome(row["outcome"]).colour, row["outcome"],
            "%s %s" % (_uri_html(row["uri"]), escape(", ".join(filter(None, notes)))),
            format_bytes(row["bytes"]), "%d ms" % (1000 * seconds) if seconds < 1 else "%.1f s" % seconds,
            escape(row["client"]), format_duration(view["now"] - row["at"])))
    return {
        "recent": _table("Outcome:t File:name Size:n Time:n Client:t Ago:n", recent),
        "clients": _table("Address:name Requests:n Sent:n Last_seen:n", [(
            "t", escape(row["client"]), f"{row['requests']:,}", format_bytes(row["bytes"]),
            format_duration(view["now"] - row["seen"]) + " ago") for row in view["clients"][:10]]),
        "origins": _table("Origin:name Requests:n Sent:n Cached:n", [(
            "t", escape(name), f"{row['requests']:,}", format_bytes(row["bytes"]),
            format_percent(row["cached"], row["bytes"])) for name, row in [*view["origins"].items()][:10]])}


def setup_commands(name: str, names: dict[str, Any]) -> tuple[str, str]:
    """Return the shell command that makes a client use the proxy, and the one that undoes it.

    Run twice, the first does what it does when it is run once.  ``name``: a key of SETUP.  ``names``: the
    proxy's address, as the texts use it.
    """
    # An undo must not remove another proxy's address, so in sed's patterns only itself matches the proxy's.
    names = {**names, "pattern": re.sub(r"[.[]", r"\\\g<0>", names["proxy"])}
    text, file, undo = (part % names for part in SETUP[name])
    words, path = "'%s'" % text, file.lstrip("+")
    if not file:
        return text, undo
    if file != path:
        # A line that is appended to one without its final newline would become a part of it.
        return ('f=%s; grep -sqxF %s $f || { [ -z "$(tail -c1 $f 2>&-)" ] || echo >> $f; echo %s >> $f; }' % (
                    path, words, words),
                "f=%s; grep -vxF %s $f > $f.new; cat $f.new > $f && rm $f.new" % (path, words))
    now, later = (" && . " + path, "; unset http_proxy") if path.endswith(".sh") else ("", "")
    return "echo %s > %s%s" % (words, path, now), "rm -f %s%s" % (path, later)


def _choices(group: str, **labels: str) -> str:
    """Return a group of radio buttons with their labels, by their ids; the first one is chosen."""
    return "".join('<input type="radio" name="%s" id="%s"%s><label for="%s">%s</label>' % (
        group, name, "" if number else " checked", name, label)
        for number, (name, label) in enumerate(labels.items()))


def status_html(view: dict[str, Any]) -> dict[str, str]:
    """Return the changing parts of the status page, by the id of the element that holds each."""
    return {"state": summary(view), "health": '<b class="%s">%s</b>' % (
        "good" if view["health"] == "OK" else "bad", view["health"]),
            "problems": "".join('<p class="bad">%s</p>' % escape(text) for _, text in problems(view) if text),
            "disk": _disk_html(view), "figures": _figures_html(view), "plots": _plots_html(view),
            "downloads": _downloads_html(view), **_tables_html(view)}


def status_page(view: dict[str, Any], names: dict[str, Any]) -> Page:
    """Return the complete status page.  ``names``: the address by which the client reached the proxy."""
    choices = [SETUP_CHOICE % (name, "checked" * (name == "apt"), name, name, *map(
        escape, setup_commands(name, names))) for name in SETUP]
    setup = SETUP_SECTION % {"proxy": escape(names["proxy"]), "commands": "".join(choices)}
    unused = not hit_counts(view["allTime"])[1]  # then setting up clients is what comes first
    return Page("text/html; charset=utf-8", PAGE % {
        **status_html(view), "spans": _choices("span", hour="Hour", day="Day", month="Month"),
        "outcomes": _choices("outcome", all="All", cached="From the cache", sent="From origins",
                             stale="Stale", failed="Failed or refused"), "word": view["health"],
        "host": escape(view["host"]), "style": STYLE, "script": SCRIPT, "version": view["version"],
        "first": setup if unused else "", "last": "" if unused else setup}, policy=POLICY)


def _metrics(view: dict[str, Any]) -> Iterator[tuple[str, str, Iterable[tuple[str, float]]]]:
    """Yield each metric: its name and label ("NAME" or "NAME LABEL"), its help text, and its samples.

    A sample is the value of the label ("" without a label) and a number.
    """
    counts, eviction = view["counters"], view["swept"]
    yield "build_info version", "Version of pkgproxy; always 1.", [(view["version"], 1)]
    yield "start_time_seconds", "Time of the start, in seconds since 1970.", [("", view["since"])]
    yield "requests_total outcome", "Requests answered, by outcome.", [
        (outcome.value, counts[outcome.value]) for outcome in Outcome]
    yield "cache_bytes_total", "Body bytes served from the cache.", [("", counts["statsCacheBytes"])]
    yield "downloaded_bytes_total", "Body bytes downloaded from origins.", [("", counts["statsDownBytes"])]
    yield "tunnel_bytes_total", "Bytes through tunnels, both ways.", [("", counts["statsTunnelBytes"])]
    for name, key, meaning in (("requests", "requests", "Requests, by origin (the busiest ones)."),
                               ("sent_bytes", "bytes", "Body bytes sent to clients, by origin."),
                               ("cached_bytes", "cached", "Body bytes served from the cache, by origin.")):
        yield "origin_%s_total origin" % name, meaning, [(o, row[key]) for o, row in view["origins"].items()]
    yield "downloads", "Running downloads.", [("", len(view["downloads"]))]
    yield "troubled_origins", "Origins that failed a moment ago.", [("", len(view["troubles"]))]
    yield "stored_files", "Stored files, when they were last counted.", [("", eviction.get("files", 0))]
    yield "stored_bytes", "Bytes on disk at that time, with metadata.", [("", eviction.get("bytes", 0))]
    yield "swept_files_total", "Files removed by eviction.", [("", eviction.get("removedFiles", 0))]
    yield "swept_bytes_total", "Bytes freed by eviction.", [("", eviction.get("removedBytes", 0))]
    yield "packages_total check", "Packages that were compared with their index, or with their digest.", [
        *view["checks"].items()]
    for key, count in view["disk"].items():
        yield "disk_%s_bytes" % key, "File system of the cache: %s in bytes." % key, [("", count)]


def metrics_text(view: dict[str, Any]) -> str:
    """Return the figures in Prometheus' text format, version 0.0.4."""
    lines = []
    for names, meaning, samples in _metrics(view):
        name, _, label = ("pkgproxy_" + names).partition(" ")
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += ["# HELP %s %s" % (name, meaning), "# TYPE %s %s" % (name, kind)]
        for text, count in samples:
            # A line feed would have to be escaped too: truncate_middle() has removed those.
            quoted = re.sub(r'(["\\])', r"\\\1", text)
            lines.append("%s%s %s" % (name, '{%s="%s"}' % (label, quoted) if label else "", repr(count)))
    return "\n".join([*lines, ""])


def page_view(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Select what /status.json publishes from a snapshot of StatusCollector; the other pages use the same.

    With --private, clients' addresses and the names of files are not published.
    """
    keys = ("counters allTime plots now since host disk recent downloads unstored troubles clients origins "
            "swept checks").split()
    cache = snapshot["cache"]
    view = {"version": __version__, "cached_bytes": cache["bytes"], "cached_files": cache["files"],
            "free_bytes": snapshot["disk"].get("free", 0), "max_bytes": cache["limit"],
            **{key: snapshot[key] for key in keys}}
    view["health"] = ", ".join(word for word, _ in problems(view) if word) or "OK"
    if snapshot["config"].private:
        for row in view["recent"] + view["downloads"] + view["clients"] + view["troubles"]:
            # The detail can be a URI, and is "" for most requests.
            row.update({key: "hidden" for key in ("client", "uri", "detail", "origin") if row.get(key)})
    return view


def _json_page(content: dict[str, Any], indent: int | None = None) -> Page:
    return Page("application/json; charset=utf-8", json.dumps(content, indent=indent) + "\n")


def _setup_page(name: str, names: dict[str, Any]) -> Page:
    """Return /setup/NAME, or the list of all for "".  The text of a file can be written to it as it is."""
    if name in SETUP:
        return Page(TEXT, "# Undo: %s\n%s\n" % (setup_commands(name, names)[1], SETUP[name][0] % names))
    if name:
        raise ProxyError("In /setup/NAME, NAME is one of %s, detect.sh, avahi." % ", ".join(SETUP), 404)
    lines = ["%s: %s\n    undo: %s\n" % (key, *setup_commands(key, names)) for key in SETUP]
    return Page(TEXT, "\n".join([*lines, "Files: /setup/detect.sh and /setup/avahi\n"]))


def _statistics_page(name: str, names: dict[str, Any], fields: Fields, snapshot: dict[str, Any]) -> Page:
    """Return the page of this name that shows figures; "" is the status page."""
    if name == "debug/vars":
        return _json_page({key: value for key, value in snapshot.items()
                           if key == "cmdline" or key.startswith("stats")}, 1)
    view = page_view(snapshot)
    if name == "status.json":
        return _json_page({**view, "html": status_html(view)})
    if name == "metrics":
        return Page("text/plain; version=0.0.4; charset=utf-8", metrics_text(view))
    if "text/html" in (field_value(fields, "Accept") or ""):
        return status_page(view, names)
    # auto-apt-proxy sends apt to port 3142, and knows apt-cacher-ng by this answer to it.
    is_apt = "APT-HTTP" in (field_value(fields, "User-Agent") or "")
    text = WELCOME % {"version": __version__, "state": summary(view), **names}
    return Page(TEXT, text, 406, reason="Usage Information") if is_apt else Page(TEXT, text)


def make_page(path: str, address: tuple[str, int], fields: Fields,
              snapshot: Callable[[], dict[str, Any]], health_problem: Callable[[], str]) -> Page | None:
    """Return the page of this path, or None if there is none.  Raises ProxyError for an unknown /setup/NAME.

    ``path``: with a slash in front, and possibly a query.  ``address``: host and port by which the client
    reached the proxy, and which therefore works in its configuration.  ``fields``: of the request; they tell
    a browser from apt and curl.  ``snapshot``, ``health_problem``: called only for the pages that need them.
    """
    names = {"host": address[0], "port": address[1], "proxy": Target("", *address, "").authority}
    page = path.partition("?")[0][1:].rstrip("/")
    if page in FIXED_PAGES:
        media, text = FIXED_PAGES[page]
        return Page(media, text % names)
    if page.partition("/")[0] == "setup":
        return _setup_page(page[len("setup/"):], names)
    if page == "healthz":
        reason = health_problem()
        return Page(TEXT, (reason or "ok") + "\n", 503 if reason else 200)
    if page in ("", "status.json", "metrics", "debug/vars"):
        return _statistics_page(page, names, fields, snapshot())
    return None


# ---------------------------------------------------------------------------------------------
# 14 Server
# ---------------------------------------------------------------------------------------------

# Which thread does what:
#
# 1. The thread of ProxyServer.serve_forever() accepts a connection and gives it to its EventLoop.
# 2. The event loop, in the same thread, waits for requests on all idle connections.  It sends hits itself if
#    they are not large and their files are in memory, since starting another thread takes more time.
# 3. Everything that may block goes to a worker thread: ProxyHandler reads the request, has the Dispatcher
#    answer it, and sends the response.  It also sends large hits, and those that must be read from the disk.
# 4. The worker returns the connection to the event loop, or closes it.
#
# So a connection always has one owner, and needs no lock.  ConnectionLimiter and Dispatcher are shared by all
# servers of the process, hence by their event loops and workers.


def progress(sock: socket.socket) -> tuple[int, bool]:
    """Ask the system how far a connection has come.

    Return the bytes transferred both ways, and whether bytes are queued that the client has not acknowledged;
    (0, False) if the system does not tell (only Linux does).
    """
    with contextlib.suppress(AttributeError, OSError, struct.error):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) if sys.platform == "linux" else b""
        # Offsets in Linux' struct tcp_info: tcpi_bytes_acked and _received; tcpi_unacked and _notsent_bytes.
        acknowledged, received = struct.unpack_from("QQ", info, 120)
        queued = struct.unpack_from("I", info, 24), struct.unpack_from("I", info, 144)
        return acknowledged + received, queued != ((0,), (0,))
    return 0, False


def send_patiently(sock: socket.socket, send: Callable[..., _T], *arguments: Any) -> _T:
    """Return send(*arguments), after waiting for a client whose system takes no bytes now.

    socket.timeout after CLIENT_TIMEOUT without progress.  A client with a large buffer makes room in it
    seldom, but is alive as long as its system takes bytes.
    """
    while True:
        try:
            return send(*arguments)
        except BlockingIOError:
            now = progress(sock)
            while not wait_until_ready(sock, CLIENT_TIMEOUT, writing=True):
                before, now = now, progress(sock)
                if now == before:
                    raise socket.timeout("timed out") from None


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of ``data`` to a client.

    The client may take CLIENT_TIMEOUT to accept the next bytes, however long the whole takes: a slow client
    is not an error.  OSError if the connection breaks, socket.timeout if the client stalls.
    """
    left = memoryview(data)
    while left:
        left = left[send_patiently(sock, sock.send, left):]


HIT_THREADS = 16  # threads of the process up to which another one is started to send a large hit
_MORE = getattr(socket, "MSG_MORE", 0)  # the body follows: send the head with its first bytes


def send_some(sock: socket.socket, part: FileSlice, start: int) -> int:
    """Send the next bytes of a file slice, up to SEND_SIZE, with sendfile() if possible.

    ``start`` is the offset in the file of the first byte to send.  Return how many bytes have been sent;
    BlockingIOError if the client's system takes none now.  StorageError if the file cannot be read or has
    become shorter, so that the rest can come from elsewhere; OSError if the client fails.
    """
    size = min(SEND_SIZE, part.stop - start)
    try:
        try:
            count = os.sendfile(sock.fileno(), part.file.fileno(), start, size)
        except (AttributeError, OSError) as error:  # AttributeError: no sendfile in Python on this system
            # The system or the file system may not support it.
            if getattr(error, "errno", errno.ENOSYS) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            count = sock.send(part.file.read_at(min(COPY_SIZE, size), start))
    except (BlockingIOError, ConnectionError, TimeoutError, socket.timeout):
        raise  # the client's
    except OSError as error:  # the file's
        raise StorageError(error) from None
    if not count:
        raise StorageError(OSError(errno.EIO, "the file became shorter"))
    return count


class HitTransfer:
    """A hit on its way to one client, some bytes at a time.

    Begun by the event loop, and continued by a thread if it is large or has to be read from the disk.  The
    request is counted before the last bytes leave, so that a client that has them finds it counted.
    """

    __slots__ = ("_counters", "_is_counted", "_left", "began", "hit", "unsent")

    def __init__(self, hit: PreparedHit, began: float, counters: Counters) -> None:
        """``began``: monotonic."""
        self._counters = counters
        self.began = began
        self.hit, self.unsent = hit, hit.data
        self._left, self._is_counted = hit.part.size if hit.part else 0, False  # bytes of the file

    def needs_thread(self) -> bool:
        """Return whether the rest is large, or the next bytes are not in memory, as far as the system tells.

        Beyond HIT_THREADS threads, size does not matter: many slow clients must not take all threads.

        One byte tells it of all that are sent with it: the system reads ahead, and keeps and drops files in
        large pieces.
        """
        stop = self.hit.part.stop - max(0, self._left - SEND_SIZE) if self.hit.part and not self.unsent else 0
        is_large = self._left > LARGE_BODY and threading.active_count() < HIT_THREADS
        return is_large or bool(stop) and read_without_blocking(self.hit.stored.file, stop - 1, stop) is None

    def send_some(self, sock: socket.socket) -> bool:
        """Send the next bytes; return whether they were the last.

        BlockingIOError if the client's system takes none now; OSError if the client fails, StorageError if
        the file does.
        """
        hit = self.hit
        if not self._is_counted and self._left <= SEND_SIZE:
            self._is_counted = True
            self._counters.add(hit.cache_status.outcome, hit.body_size)
        if self.unsent:
            self.unsent = self.unsent[sock.send(self.unsent, _MORE if self._left else 0):]
        elif hit.part:
            self._left -= send_some(sock, hit.part, hit.part.stop - self._left)
        return not self._left and not self.unsent

    def result(self) -> SendResult:
        """Return what has been sent in the end, and count it if it is not counted yet."""
        left = len(self.unsent) + self._left
        size = max(0, self.hit.body_size - left)
        if not self._is_counted:
            self._counters.add(self.hit.cache_status.outcome, size)
        return SendResult(size, size, time.monotonic() - self.began, not left)


class RequestBody:
    """The body of a client's request, read as the origin takes it.

    ``length`` is in bytes; None means that the body is chunked (RFC 9112 §7.1).  ``timed`` is the raw
    stream below ``file``, whose reads it limits: in the long run, a body must arrive with MIN_BODY_RATE.
    ``awaiting`` is the client's socket if the client sends the body only after a 100 response (RFC 9110
    §10.1.1), which is sent when the first byte is asked for, since the origin may refuse the request
    without reading its body.
    """

    def __init__(self, file: io.BufferedIOBase, length: int | None, timed: DeadlineReader,
                 awaiting: socket.socket | None = None) -> None:
        self._file = file
        self._timed = timed
        self._deadline = time.monotonic() + CLIENT_TIMEOUT  # each received byte extends it
        self._left = length or 0
        self._chunks = ChunkedReader(file) if length is None else None
        self._awaiting = awaiting

    @property
    def unread(self) -> bool:
        """Whether the body has not been read to its end."""
        return not self._chunks.ended if self._chunks else self._left > 0

    def read(self, size: int = COPY_SIZE, /) -> bytes:
        """Read up to ``size`` bytes; BadRequestError if the client closes, stalls or breaks the framing."""
        try:
            if self._awaiting is not None:
                send_all(self._awaiting, b"HTTP/1.1 100 Continue\r\n\r\n")
                self._awaiting = None
            self._timed.set_deadline(self._deadline - time.monotonic())
            data = self._chunks.read(size) if self._chunks else self._file.read1(min(self._left, size))
        except (socket.timeout, TimeoutError):
            raise BadRequestError("The request body did not arrive in time.", 408) from None
        except (OSError, ValueError) as error:  # the connection broke, or the framing of chunks is invalid
            raise BadRequestError("The request body could not be read: %s." % error) from None
        if self._left and not data:
            raise BadRequestError("The request body ended %d bytes early." % self._left)
        self._left -= 0 if self._chunks else len(data)
        self._deadline += len(data) / MIN_BODY_RATE
        return data


def error_response(error: ProxyError) -> Response:
    """Return the response for an error: one sentence of plain text, and its cause in the status line."""
    detail = "%s; %s" % (str(error).rstrip("."), error.reason) if error.reason else str(error)
    head = replace_fields(error_head(error.status), reason=reason_phrase(str(error)))
    return Response(head, bytes_body((str(error) + "\n").encode()),
                    CacheStatus(error.outcome, error.forward, detail=detail))


def set_events(selector: selectors.BaseSelector, sock: socket.socket, events: int, data: Any = None) -> None:
    """Let a selector report ``events`` of a socket from now on, with ``data``.

    0 means no events; the socket may be unknown to the selector, before and after, or closed by then.
    OSError if the system cannot watch more sockets.
    """
    # By number: the map's KeyError for an unknown socket would contain the socket's repr(), which is slow.
    if 0 <= sock.fileno() in selector.get_map():
        selector.unregister(sock)
    if events:
        selector.register(sock, events, data)


def relay_tunnel(client: socket.socket, origin: socket.socket, early: bytes) -> int:
    """Relay bytes both ways; return how many.

    The tunnel ends when both sides have closed, one fails, or nothing moves for TUNNEL_IDLE_TIMEOUT.  If
    one side closes its direction, the other direction stays open (a half-close): some protocols depend on
    it.  ``early`` are bytes that have already been received from the client.

    A direction holds either bytes, and waits until the sink takes them, or none, and waits for the source: a
    slow sink thus slows the source down, and a tunnel needs no more than SMALL_BODY bytes a direction.
    """
    sinks = {client: origin, origin: client}  # by source, until the source has closed
    held, count = {client: early, origin: b""}, 0  # bytes not yet sent, by source; how many have been sent
    with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
        origin.setblocking(False)
        while sinks:
            wanted = [(source, sink, selectors.EVENT_WRITE) if held[source] else
                      (source, source, selectors.EVENT_READ) for source, sink in sinks.items()]
            for sock in held:  # one direction may read from it, the other one write to it
                set_events(selector, sock, sum(events for _, other, events in wanted if other is sock))
            ready = {key.fileobj: events for key, events in selector.select(TUNNEL_IDLE_TIMEOUT)}
            if not ready:
                break
            for source, sock, events in wanted:
                if not ready.get(sock, 0) & events:
                    continue
                held[source] = held[source] or source.recv(SMALL_BODY)
                if not held[source]:
                    sinks.pop(source).shutdown(socket.SHUT_WR)
                    continue
                with contextlib.suppress(BlockingIOError):
                    sent = sinks[source].send(held[source])
                    held[source], count = held[source][sent:], count + sent
    return count


@functools.lru_cache(LARGE_MEMO)
def parse_request_head(data: bytes, is_local: bool, server_address: tuple[str, int]) -> Request:
    """Parse a complete request head; BadRequestError or ValueError.

    ``is_local``: the client is on this host; ``server_address``: the proxy's address and port that it
    connected to.  Memoized, since the machines of a fleet send the same heads, and since the event loop has
    mostly parsed a head before the worker thread does.
    """
    # RFC 9112 §2.2: ignore an empty line before the request line; some clients send one after a body.
    lines = read_head_lines(io.BytesIO(data[2:] if data.startswith(b"\r\n") else data))
    return with_chosen_form(replace_fields(parse_request(lines, server_address), client_is_local=is_local))


_BARE_LF = re.compile(rb"(?<!\r)\n")
TLS_HELLO = b"\x16\x03"  # how a client begins that takes the proxy for a server with TLS (RFC 8446 §5.1)


def find_head_end(data: bytes, seen: int = 0) -> int:
    """Find the end of the first request head in ``data``.

    Return its length, 0 if more bytes are needed, or -1 if no further bytes can make it a valid head.  The
    first ``seen`` bytes have been searched before: a head that arrives byte by byte must not take quadratic
    time.
    """
    end = data.find(b"\r\n\r\n", max(0, seen - 3))
    if end >= 0:
        return end + 4
    too_long = len(data) > MAX_HEAD or len(data) - data.rfind(b"\n") > MAX_LINE + 2
    return -1 if too_long or data[:2] == TLS_HELLO or _BARE_LF.search(data, max(0, seen - 1)) else 0


# Whether the client is on this host, and the proxy's address and port that it connected to.  With the bytes
# of a request's head, it determines which stored response the client may get.
AccessKey = tuple[bool, tuple[str, int]]


class ClientConnection:
    """A client's connection and its buffered input.  Only one thread at a time uses it.

    ==============================  =====================  =============================
    State                           ``waiting``            owner
    ==============================  =====================  =============================
    parked (too many of a client)   False                  ConnectionLimiter
    waits for a request             True                   EventLoop
    a hit is being sent             True, with pending     EventLoop
    a request is being answered     False                  a worker thread
    ==============================  =====================  =============================
    """

    def __init__(self, sock: socket.socket, address: Any,
                 on_admitted: Callable[[ClientConnection], None]) -> None:
        """``sock``, ``address``: as returned by accept().  ``on_admitted``: called when it may be served."""
        sock.setblocking(False)
        self.sock = sock
        self.host = unmap_ipv4(address[0])
        self.network = client_network(self.host)
        self.on_admitted = on_admitted  # each connection knows its event loop: servers share one limiter
        self.buffered = b""  # received, but not yet answered: mostly the beginning of a head
        self.answered = False  # has got a response: from now on, the client must expect a close at any time
        self.waiting = False
        self.waiting_since = time.monotonic()  # when the connection became idle, or the current request began
        self.known_missing = False  # nothing is stored for the request that a thread is about to answer
        self.access_key: AccessKey | None = None  # None: refused, or not checked yet
        self.pending: HitTransfer | None = None  # the hit that is being sent
        self.watched = 0  # events for which the event loop's selector watches the socket
        self.is_tunnel = False
        self._acknowledged = 0  # bytes, at the last call of has_progressed()
        self.rate = math.inf  # bytes a second in the last RATE_WINDOW, if the client limited it
        self._transferred = 0  # bytes, at the last measurement
        self._was_slow = False  # the client limited the rate then

    @functools.cached_property
    def server_address(self) -> tuple[str, int]:
        """The proxy's address and port that the client connected to."""
        name = self.sock.getsockname()
        return unmap_ipv4(name[0]), name[1]

    def has_timed_out(self, now: float) -> bool:
        """Return whether the event loop has waited too long for the client, at the monotonic time ``now``.

        A client with a large buffer makes room in it seldom, but is alive as long as its system takes bytes.
        """
        head = REQUEST_HEAD_TIMEOUT if self.buffered or not self.answered else IDLE_TIMEOUT
        limit = CLIENT_TIMEOUT if self.pending else head
        if now - self.waiting_since > limit and self.pending and self.has_progressed():
            self.waiting_since = now
        return now - self.waiting_since > limit

    def has_progressed(self) -> bool:
        """Return whether bytes have been transferred since the last call, as far as the system tells."""
        before, self._acknowledged = self._acknowledged, progress(self.sock)[0]
        return self._acknowledged != before

    def measure_rate(self, now: float, elapsed: float) -> None:
        """Update ``rate`` with what has been transferred in the last ``elapsed`` seconds.

        A client counts as slow only if it was so at both ends of that time.
        """
        transferred, queued = progress(self.sock)
        # Nothing queued means that the origin is slow, not the client: that counts only after CLIENT_TIMEOUT.
        is_slow = queued or not self.waiting and now - self.waiting_since > CLIENT_TIMEOUT
        measured = is_slow and self._was_slow
        self.rate = (transferred - self._transferred) / elapsed if measured else math.inf
        self._transferred, self._was_slow = transferred, is_slow

    def closing_rank(self, now: float) -> tuple[int, float, float]:
        """Return how soon to close the connection if another client needs its place.

        The lowest rank goes first: (0, since, 0) for an idle connection, (1, since, 0) for an incomplete
        head, (2, rate, since) for a slow response.  Anything else (3, or 4 for a tunnel) is closed only if
        its client has more connections than its share.
        """
        if self.waiting and not self.pending:
            if self.answered and not self.buffered:
                return 0, self.waiting_since, 0  # idle between two requests: a client must expect that
            if now - self.waiting_since > SLOW_HEAD_AGE:
                return 1, self.waiting_since, 0
        return 2 if self.rate < MIN_RATE else 3 + self.is_tunnel, self.rate, self.waiting_since

    def receive(self, flags: int = 0) -> bytes | None:
        """Return the bytes that have arrived; b"" if the client has closed, None if nothing has arrived."""
        try:
            return self.sock.recv(SMALL_BODY, flags)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""


class ConnectionLimiter:
    """Limits open connections, in total and per client.

    A connection may need a thread and up to four file descriptors.  At the limit, a new client makes the
    limiter close the connection that has been idle longest; if there is none, the one with the oldest
    incomplete request head; if there is none, the one with the slowest response below MIN_RATE.  If there is
    none either, the client with the most connections loses one, whatever it is doing, as long as it has
    MIN_SHARE, and more than the new client will have.  So the connections are shared out evenly among the
    clients that want some, but a client alone loses nothing.

    A client (an IPv6 /64 network counts as one) may have half of the connections.  Further ones are parked:
    accepted, but neither read nor counted, so that one client cannot keep the others out.  So are those that
    find no place, since only accept() tells whose they are.  At most half of the connections may be tunnels,
    which stay open for long, and half of these one client's.

    The life of a connection, as the limiter sees it:

    1. admit(), when it has been accepted.  The connection is registered, or parked without a place.
    2. admit_parked(), several times a second: parked connections get the places that have become free, those
       of the client with the fewest connections first.
    3. release(), when it has been closed.

    A thread notices only after a while that its connection has been closed, if it waits for an origin.  Up
    to a quarter of the places do not wait for that: they are free as soon as the connection is shut down.
    """

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self.max_tunnels = max(2, max_connections // 2)
        self._lock = threading.Lock()  # guards all below
        self._connections: set[ClientConnection] = set()
        self._per_client: collections.Counter[str] = collections.Counter()  # by network
        self._parked: list[ClientConnection] = []
        self._attempts = 0  # to make room, since the last admit_parked()
        self._closing: set[ClientConnection] = set()  # shut down, but not released yet
        self._abandoned: set[ClientConnection] = set()  # the same, but their places are free already
        self._measured = time.monotonic()
        self._released_at = 0.0  # monotonic: when a place last became free

    def busy_count(self) -> int:
        """Return the number of connections that are not waiting for a request."""
        with self._lock:
            return sum(not connection.waiting for connection in self._connections)

    def admit(self, connection: ClientConnection) -> ClientConnection | None:
        """Admit an accepted connection, or park it; return one to be refused if too many are parked."""
        with self._lock:
            if not self._make_room(connection.network):
                self._parked.append(connection)
                if len(self._parked) <= self.max_connections:
                    return None
                counts = collections.Counter(each.network for each in self._parked)
                return self._parked.pop(max(  # the latest of the client that has the most
                    range(len(self._parked)), key=lambda index: (counts[self._parked[index].network], index)))
            self._register(connection)
        connection.on_admitted(connection)
        return None

    def should_pause(self) -> bool:
        """Return whether to accept no connection for a moment: no more can be parked, but places become free,
        and only one client wants them.  So its connections are served in turn, and none is refused.
        """
        with self._lock:
            is_full = len(self._parked) >= self.max_connections and len(self._per_client) == 1
            return is_full and time.monotonic() - self._released_at < 1.0

    def release(self, connection: ClientConnection) -> bool:
        """Free the place of a closed connection; return whether others wait for it."""
        with self._lock:
            self._released_at = time.monotonic()
            self._abandoned.discard(connection)
            self._unregister(connection)
            return bool(self._parked)

    def admit_parked(self) -> None:
        """Admit parked connections as far as the limits allow: the clients with the fewest first.

        For the others, close connections of the same clients that can be spared.
        """
        admitted, blocked = [], set[str]()
        with self._lock:
            self._attempts = 0
            self._measure_rates(time.monotonic())
            counts, parked, self._parked = self._per_client.copy(), self._parked, []

            def count_with(connection: ClientConnection) -> int:  # the client's connections, up to this one
                counts[connection.network] += 1
                return counts[connection.network]

            for connection in sorted(parked, key=count_with):
                network = connection.network
                is_next = network not in blocked
                if is_next and connection.receive(socket.MSG_PEEK) == b"":
                    connection.sock.close()
                elif is_next and self._make_room(network, len(blocked) + 1):
                    self._register(connection)
                    admitted.append(connection)
                else:
                    blocked.add(network)
                    self._parked.append(connection)
            for network in itertools.filterfalse(self._may_have_more, blocked):
                self._close_spare(sum(each.network == network for each in self._parked), network)
        for connection in admitted:
            connection.on_admitted(connection)

    def open_tunnel(self, connection: ClientConnection) -> None:
        """Count a connection as a tunnel from now on; ProxyError if the limits allow no further one."""
        with self._lock:
            tunnels = [each.network for each in self._connections if each.is_tunnel]
            if self.max_tunnels <= max(len(tunnels), 2 * tunnels.count(connection.network)):
                raise ProxyError("Too many tunnels are open.", 503)
            connection.is_tunnel = True

    def close(self) -> None:
        """Close the parked connections."""
        with self._lock:
            while self._parked:
                self._parked.pop().sock.close()

    def _may_have_more(self, network: str) -> bool:
        return self._per_client[network] < max(4, self.max_connections // 2)

    def _register(self, connection: ClientConnection) -> None:
        self._connections.add(connection)
        self._per_client[connection.network] += 1

    def _unregister(self, connection: ClientConnection) -> None:
        self._closing.discard(connection)
        if connection in self._connections:
            self._connections.remove(connection)
            self._per_client -= collections.Counter([connection.network])  # drops zeros

    def _make_room(self, network: str, count: int = 1) -> bool:
        """Make room for ``count`` new connections, if needed; return whether ``network`` has room now."""
        if not self._may_have_more(network):
            return False
        if len(self._connections) >= self.max_connections and self._attempts < PLACES_PER_TURN:
            self._attempts += 1  # it takes long, since it looks at all connections
            heaviest, most = self._per_client.most_common(1)[0]
            above_share = most >= max(MIN_SHARE, self._per_client[network] + 2)
            self._close_spare(count, above_share=heaviest if above_share else None)
        return len(self._connections) < self.max_connections

    def _measure_rates(self, now: float) -> None:
        if now - self._measured > RATE_WINDOW:
            for connection in self._connections:
                connection.measure_rate(now, now - self._measured)
            self._measured = now

    def _close_spare(self, count: int, network: str | None = None, above_share: str | None = None) -> None:
        """Close up to ``count`` connections (of one client), those being closed already included.

        They are only shut down: the thread that owns a connection notices, and closes it.  Busy ones are
        closed only if they belong to the client ``above_share``.
        """
        now = time.monotonic()
        count -= sum(network in (None, connection.network) for connection in self._closing)
        ranked = [(rank, connection) for connection in self._connections - self._closing
                  if network in (None, connection.network)
                  and ((rank := connection.closing_rank(now))[0] <= 2 or connection.network == above_share)]
        for rank, connection in sorted(ranked, key=lambda pair: pair[0]):
            # The next request may have arrived just now: then the connection is not idle any more.
            if count > 0 and (rank[0] >= 2 or is_open_and_silent(connection.sock)):
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
                self._closing.add(connection)
                count -= 1
                if not (network or connection.waiting) and 4 * len(self._abandoned) < self.max_connections:
                    self._unregister(connection)
                    self._abandoned.add(connection)


def format_timings(timings: dict[str, float]) -> str:
    """Format the steps of a request for the log, in milliseconds since it began to arrive; see mark().

    >>> format_timings({"received": 5.0, "dispatched": 5.0004, "first byte": 5.02})
    ' [dispatched 0.4, first byte 20.0 ms]'
    """
    steps = sorted(tuple(timings.items()), key=lambda step: step[1])  # a copy: a download may add "stored"
    return " [%s ms]" % ", ".join(["%s %.1f" % (name, 1000 * (at - steps[0][1])) for name, at in steps[1:]])


class Dispatcher:
    """Checks access, routes a request to a status page or the proxy, and logs it.

    All servers of a process share one.  ``write_log`` writes lines to the log without blocking.
    """

    def __init__(self, proxy: Proxy, statistics: StatusCollector, limiter: ConnectionLimiter,
                 write_log: Callable[[list[str]], None]) -> None:
        self.proxy = proxy
        self.statistics = statistics
        self.limiter = limiter
        self._write_log = write_log
        # Logs a response that was sent to some clients in the access log; None without --access-log.
        self.log_access: Callable[[Request, int, Outcome, list[tuple[str, SendResult]]], None] | None = None
        self._refused = RecentEvents()  # clients, by address
        self._full_name = ""  # of this host; "" until it is known
        self._lookups = RecentEvents()  # of the full name

    # Access

    def check_access(self, connection: ClientConnection) -> bool:
        """Return whether the client may connect; if so, ``connection.access_key`` is set.

        The address is checked before anything is parsed.
        """
        host, own_address, config = connection.host, connection.server_address, self.proxy.config
        is_this_host = host == own_address[0]
        if is_this_host or is_client_allowed(host, config.allow + config.lan):
            connection.access_key = is_this_host or is_local_client(host), own_address
        return connection.access_key is not None

    def refuse(self, connection: ClientConnection) -> bytes:
        """Return the response to a client for which there is no room; count it, and log it at times."""
        request = Request("?", "?", Target("", "", 0, "/"), (), client=connection.host)
        response = error_response(ProxyError("%s has too many connections open." % connection.host, 503))
        self.count(request, response, 0, False)
        self.record(request, response, 0, time.monotonic(), True)
        return render_head(response.head, (*response.head.fields, ("Connection", "close")))

    def host_names(self) -> tuple[str, str]:
        """Return this host's short and full name without waiting; the full name is "" while it is unknown.

        Then start to look it up: in a thread, as it may take seconds, and every NAME_RETRY seconds, which is
        longer than a look-up takes.
        """
        if not self._full_name and self._lookups.note_first("", NAME_RETRY):
            with contextlib.suppress(StorageError):  # no thread can be started
                start_thread(self._look_up_name)
        return socket.gethostname().lower(), self._full_name

    def _look_up_name(self) -> None:
        with contextlib.suppress(UnicodeError):  # a name that no name server can have
            name = socket.getfqdn().lower()  # the short name if the look-up fails
            self._full_name = name if "." in name else ""

    def _check_name(self, request: Request) -> None:
        """Raise ProxyError if the client calls the proxy by a name that is not its own (see is_own_name)."""
        name = called_name(request)
        if not is_own_name(name, self.proxy.config.names) and name not in self.host_names():
            raise ProxyError("This proxy does not answer to the name '%s'; its operator can add --name %s."
                             % (name, name), 421)

    # Requests, in worker threads

    def respond(self, request: Request, server_address: tuple[str, int]) -> Response:
        """Return the response to a request that came to this address and port of the proxy; ProxyError."""
        self._check_name(request)
        if not request.is_own_page:
            return self.proxy.respond(request)
        if request.method == "OPTIONS":
            return answer_as_final_recipient(request)
        if request.method not in ("GET", "HEAD"):
            raise ProxyError("The proxy's own pages support only GET and HEAD.", 405)
        host = field_value(request.fields, "Host")
        address = split_authority(host, 80) if host else server_address
        page = make_page(request.uri, address, request.fields, self.snapshot, self.health_problem)
        if page is None:
            raise ProxyError("No such page. To fetch through this proxy, set http_proxy=http://%s/ or request"
                             " /http://host/path" % Target("", *address, "").authority, 404)
        head = generated_head(page.status, page.media, (("Vary", "Accept"),), page.policy)
        return Response(replace_fields(head, reason=page.reason or head.reason),
                        bytes_body(page.text.encode()), CacheStatus(Outcome.OWN))

    def snapshot(self) -> dict[str, Any]:
        """Return the data of the status pages, with the command line as Go's expvar shows it."""
        # loggable_uri() removes the password of a parent's URL; --parent=URL is split, to let it see the URL.
        words = [re.split(r"(?<=\A--parent=)", word) for word in sys.argv]
        command_line = ["".join(loggable_uri(part) if re.search("@|://", part) else part for part in parts)
                        for parts in words]
        return {"cmdline": command_line, "config": self.proxy.config, **self.statistics.snapshot()}

    def health_problem(self) -> str:
        """Return why the proxy is not healthy, "" if it is."""
        if self.limiter.busy_count() >= self.limiter.max_connections:
            return "All %d connections are busy." % self.limiter.max_connections
        return self.statistics.health_problem()

    # Hits, in the event loop

    def try_hot_path(self, connection: ClientConnection, size: int,
                     hot_cache: HotCache) -> PreparedHit | None:
        """Return the response to a buffered head of ``size`` bytes, if nothing has to be waited for.

        None sends the request to a thread.  ``connection.known_missing`` saves that thread the look-up if
        this one has found nothing.
        """
        connection.known_missing = False
        if size > MAX_MEMOIZED_HEAD or connection.access_key is None:
            return None
        key = connection.buffered[:size], connection.access_key
        hit = hot_cache.get(key)
        if hit is None:
            with contextlib.suppress(ProxyError, ValueError):  # the thread that gets it sends the error
                request = parse_request_head(key[0], *key[1])
                if request.method in ("GET", "HEAD") and request.length == 0 and not request.is_own_page:
                    self._check_name(request)
                    hit, connection.known_missing = self.proxy.prepare_hit(request)
                    if hit is not None:
                        hot_cache.put(key, hit)
        if hit is not None and hit.clients[connection.host] < 2 and self.proxy.doubts.is_due(
                hit.request, connection.host, hit.stored.head):
            return None
        return hit

    # Counting and logging

    def count(self, request: Request, response: Response, sent: int, whole: bool) -> None:
        """Count a response with ``sent`` bytes of its body; if ``whole``, its last bytes leave next."""
        self.statistics.counters.add(response.cache_status.outcome, self._cached_bytes(response, sent))
        if whole:
            self.proxy.doubts.note_delivered(request, request.client, response.head.status)

    def _cached_bytes(self, response: Response, sent: int) -> int:
        from_cache = response.cache_status.outcome.from_cache and response.head.status in (200, 206)
        return max(0, sent - response.body.origin_bytes) if from_cache else 0

    def record(self, request: Request, response: Response, sent: int, began: float, whole: bool) -> None:
        """Log a response, ``sent`` bytes of its body since ``began`` (monotonic), and add it to the pages."""
        # A client that may not connect, so that its request was not even read, is logged once in a while.
        quiet = request.method == "?" and response.head.status in (403, 503) and not self._refused.note_first(
            request.client, REFUSAL_LOG_INTERVAL)
        result = SendResult(sent, self._cached_bytes(response, sent), time.monotonic() - began, whole, quiet)
        if not whole:
            self.proxy.doubts.forget(request)
        self.record_results(request, response.head.status, response.cache_status, [(request.client, result)])

    def record_hit(self, hit: PreparedHit, results: list[tuple[str, SendResult]]) -> None:
        """Log a hit that was sent to several clients."""
        self.record_results(hit.request, hit.status, hit.cache_status, results, hit.text)

    def record_results(self, request: Request, status: int, cache_status: CacheStatus,
                       results: list[tuple[str, SendResult]], text: str = "") -> None:
        """Log one response that was sent to several clients; ``text`` is log_text(), if known."""
        outcome = cache_status.outcome
        if self.log_access:
            self.log_access(request, status, outcome, results)
        if outcome is not Outcome.OWN:
            self.statistics.recent.note(request, status, cache_status, results)
        if log.isEnabledFor(logging.DEBUG if outcome is Outcome.OWN else logging.INFO):
            text = text or log_text(request, cache_status)
            timings = format_timings(request.timings) if request.timings else ""
            self._write_log(["%-12s %-6s %3d %8s %5.2fs %s%s%s" % (
                client, outcome._value_, status, format_bytes(result.size), result.took, text,
                "" if result.whole else ", incomplete", timings)
                for client, result in results if not result.quiet])


class WakeableSelector(selectors.DefaultSelector):
    """A selector that other threads can wake up."""

    def __init__(self) -> None:
        super().__init__()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.register(self._reader, selectors.EVENT_READ, self._discard)

    def wake(self) -> None:
        """Let select() return now, with a function to be called among the data; from any thread."""
        with contextlib.suppress(OSError):  # full, so that it wakes anyway; or closed
            self._writer.send(b"\0")

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._reader.recv(4096)

    def close(self) -> None:
        """Close the selector and its sockets."""
        super().close()
        self._reader.close()
        self._writer.close()


class EventLoop:
    """Waits for requests on idle connections; answers hits, hands the rest to threads.

    A connection comes with add(), and leaves when it is handed to a thread (ProxyServer.serve_in_thread),
    which adds it again, or when it is closed.  add() may be called from any thread; all other methods
    belong to one.

    A turn is one call of run_once().  Each connection that is ready gets some bytes of its hit sent, or one
    request answered; further requests that it has buffered are postponed to the next turn.

    The path of a hit: run_once → _serve → _read_request → Dispatcher.try_hot_path → HotCache.get, or
    Proxy.prepare_hit → _send → HitTransfer.send_some → _record.

    Stored files are checked once a turn, not once a request (see HotCache), and responses are logged once in
    some turns.  That must not be noticed: a client that removes a file, or changes the settings, and *then*
    sends a request must not get the old response.  So where a request may have arrived after the turn began,
    HotCache.recheck() comes first.
    """

    def __init__(self, server: ProxyServer) -> None:
        self._server = server
        self._dispatcher = server.dispatcher
        self._counters = server.dispatcher.statistics.counters
        self._connections: set[ClientConnection] = set()
        self._postponed: list[ClientConnection] = []  # have answered one request and buffered another
        self._sent: dict[PreparedHit, list[tuple[str, SendResult]]] = {}  # not recorded yet
        self._recorded_at = 0.0  # monotonic
        self._closed = False
        self._thread = 0  # the one that calls run_once()
        self._hot_cache = HotCache(min(HOT_CACHE_SIZE, server.dispatcher.limiter.max_connections))
        self._given: queue.SimpleQueue[ClientConnection] = queue.SimpleQueue()  # by other threads
        self.selector = WakeableSelector()

    def add(self, connection: ClientConnection) -> None:
        """Wait for the next request of a connection."""
        if self._thread == threading.get_ident() and not self._closed:
            self._add(connection)
        else:
            self._given.put(connection)
            self.selector.wake()
            if self._closed:  # set before close() takes what was given: one of the two finds the connection
                self._take(self._server.close_connection)

    def run_once(self, timeout: float) -> None:
        """Serve all connections that are ready now, or as soon as one is, within ``timeout`` seconds."""
        self._thread = threading.get_ident()
        again, self._postponed = self._postponed, []
        ready = self.selector.select(0 if again else min(timeout, RECORD_DELAY if self._sent else timeout))
        self._hot_cache.recheck(self._dispatcher.proxy.hits_valid_for())
        for key, _ in ready:
            if not isinstance(key.data, ClientConnection):
                key.data()  # a client waits to be accepted, or another thread has called wake()
            elif key.data.waiting and key.data not in again:
                self._serve(key.data)
        for connection in again:
            if connection.waiting:
                self._serve(connection, is_readable=False)
        self._take(self._add)
        if not ready or time.monotonic() - self._recorded_at > RECORD_DELAY:
            self._record()

    @property
    def sending(self) -> int:
        """Connections that a hit is being sent to, or that have buffered another request; new ones, whose
        first request is probably on its way; and hits that were sent, but are not logged yet."""
        busy = [each for each in tuple(self._connections)
                if each.pending or not each.answered and time.monotonic() - each.waiting_since < 0.1]
        return len(busy) + len(self._postponed) + len(self._sent)

    def close_timed_out(self, now: float) -> None:
        """Close connections that have exceeded their timeout; ``now`` is monotonic.

        An incomplete head goes to a thread instead, which sends the error.
        """
        for connection in tuple(self._connections):
            if connection.has_timed_out(now):
                incomplete = connection.buffered and not connection.pending
                (self._hand_to_thread if incomplete else self._close)(connection)

    def close(self) -> None:
        """Close all connections that no thread serves, and those that come later."""
        self._closed = True
        self._take(self._server.close_connection)
        for connection in tuple(self._connections):
            self._close(connection)
        self._record()
        self._hot_cache = HotCache()  # closes the files
        self.selector.close()

    # Connections come and go

    def _take(self, function: Callable[[ClientConnection], None]) -> None:
        """Call a function for each connection that other threads have given."""
        with contextlib.suppress(queue.Empty):
            while True:
                function(self._given.get_nowait())

    def _add(self, connection: ClientConnection) -> None:
        """Serve a connection at once, since a new one has usually sent its request; then wait for more."""
        self._connections.add(connection)
        # The time begins now, not when the connection was accepted: it may have been parked for long.
        connection.waiting, connection.waiting_since = True, time.monotonic()
        self._hot_cache.recheck(self._dispatcher.proxy.hits_valid_for())  # it may be younger than this turn
        self._serve(connection)

    def _remove(self, connection: ClientConnection) -> None:
        connection.waiting, connection.watched = False, 0
        self._connections.discard(connection)
        set_events(self.selector, connection.sock, 0)

    def _close(self, connection: ClientConnection) -> None:
        if connection.pending:
            self._note_sent(connection, connection.pending)
        self._remove(connection)
        self._server.close_connection(connection)

    def _hand_to_thread(self, connection: ClientConnection) -> None:
        self._remove(connection)
        self._server.serve_in_thread(connection)

    # Requests

    def _serve(self, connection: ClientConnection, is_readable: bool = True) -> None:
        """Do for a connection what one turn allows, and watch it until the next one.

        A bug, or a lack of memory to watch it (fs.epoll.max_user_watches, say), costs this connection, not
        the others.
        """
        try:
            if connection.pending is None:
                self._read_request(connection, is_readable)
            if connection.pending is not None:
                self._send(connection, connection.pending)
            # Wait until the rest of a hit can be sent, or else until the next request comes.
            events = selectors.EVENT_WRITE if connection.pending else selectors.EVENT_READ
            if connection.waiting and events != connection.watched:
                set_events(self.selector, connection.sock, events, connection)
                connection.watched = events
        except Exception:  # noqa: BLE001
            self._server.handle_error(connection)
            if connection.waiting:
                self._close(connection)

    def _read_request(self, connection: ClientConnection, is_readable: bool) -> None:
        """Find the hit that answers the next request, or hand the connection to a thread.

        A request that may block takes the connection, with all that is buffered, to a thread: responses must
        leave in the order of the requests (RFC 9112 §9.3.2).
        """
        began, seen = time.monotonic(), 0
        if is_readable:
            data = connection.receive()
            if data == b"":
                self._close(connection)
            if not data:
                return
            if not connection.buffered:
                connection.waiting_since = began
                hit = self._hot_cache.get((data, connection.access_key), connection.host)
                if hit is not None:  # mostly: a whole head, the same that this client sent a moment ago
                    connection.pending = HitTransfer(hit, began, self._counters)
                    return
            seen, connection.buffered = len(connection.buffered), connection.buffered + data
        is_allowed = connection.access_key or self._dispatcher.check_access(connection)
        size = find_head_end(connection.buffered, seen) if is_allowed else -1  # a thread refuses it
        hit = self._dispatcher.try_hot_path(connection, size, self._hot_cache) if size > 0 else None
        if hit is not None:
            connection.buffered = connection.buffered[size:]
            connection.pending = HitTransfer(hit, began, self._counters)
        elif size:
            self._hand_to_thread(connection)

    def _send(self, connection: ClientConnection, transfer: HitTransfer) -> None:
        """Send the next bytes of a hit, or let a thread do that."""
        try:
            for _ in range(SENDS_PER_TURN):
                if transfer.needs_thread():
                    self._hand_to_thread(connection)
                    return
                if transfer.send_some(connection.sock):
                    connection.answered = True
                    self._note_sent(connection, transfer)
                    break
        except BlockingIOError:
            connection.has_progressed()  # from now on
        except (OSError, StorageError):
            self._close(connection)
            return
        connection.waiting_since = time.monotonic()
        if not connection.pending and transfer.hit.close:
            self._close(connection)
        elif not connection.pending and connection.buffered:
            self._postponed.append(connection)

    def _note_sent(self, connection: ClientConnection, transfer: HitTransfer) -> None:
        connection.pending = None
        hit, result = transfer.hit, transfer.result()
        self._sent.setdefault(hit, []).append((connection.host, result))
        if hit.clients[connection.host] < 2 and result.whole:  # from now on, it may doubt it
            hit.clients[connection.host] += 1
            self._dispatcher.proxy.doubts.note_delivered(hit.request, connection.host, hit.status)

    def _record(self) -> None:
        """Log what was sent in the last turns: once per hit, which is cheaper than once per client."""
        sent, self._sent, self._recorded_at = self._sent, {}, time.monotonic()
        for hit, results in sent.items():
            self._dispatcher.record_hit(hit, results)


class ResponseWriter:
    """Writes one response to a client, in a thread, and counts it before its last bytes leave.

    So a client that has a whole response finds it counted.
    """

    def __init__(self, sock: socket.socket, request: Request, response: Response,
                 dispatcher: Dispatcher) -> None:
        self.begun = self.whole = self._is_counted = False  # any byte has been sent, and all bytes
        self._sock = sock
        self._request = request
        self._response = response
        self._dispatcher = dispatcher
        self._sent = 0  # bytes of the body

    def send(self, close: bool) -> bool:
        """Send the response; return whether the connection stays open.

        ProxyError or StorageError if its body fails; OSError or socket.timeout if the client does.
        """
        request, response = self._request, self._response
        framing = response_framing(request, response.head, response.body.length)
        unread = getattr(request.body, "unread", False)  # it would be taken for the next request
        close = close or unread or framing is Framing.CLOSE or not wants_keep_alive(request)
        head = render_response_head(request, with_date(response.head, time.time()), response.body.length,
                                    response.cache_status, close, self._dispatcher.proxy.config)
        try:
            if request.method == "HEAD" or framing is Framing.NONE:
                self._count(0)
                self._write(head)
            else:
                self._write_body(head, response.body, framing)
        except Exception:
            if framing is Framing.CLOSE and self.begun:
                # A normal close would mark the end of the body (invariant 7), so reset the connection.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._sock.close()
            raise
        self.whole = True
        return not close

    def finish(self, started: float) -> None:
        """Close the body, and record what has been sent since ``started`` (monotonic)."""
        self._response.body.close()
        self._count(self._sent, self.whole)
        self._dispatcher.record(self._request, self._response, self._sent, started, self.whole)

    def _count(self, sent: int, whole: bool = True) -> None:
        if not self._is_counted:
            self._is_counted = True
            self._dispatcher.count(self._request, self._response, sent, whole)

    def _write_body(self, head: bytes, body: ResponseBody, framing: Framing) -> None:
        """Write head and body.

        Small parts are collected, so that the head and a small body leave in one segment; large slices of
        files are sent by the kernel.  A body of a declared length must have it (invariant 7): one that is
        longer would be taken for the next response, one that is shorter would leave the client waiting.
        """
        # Bytes to be written, the number of those that belong to the body, and the size of the body so far.
        waiting, count, total = head, 0, 0
        for part in body.chunks():
            total += part.size if isinstance(part, FileSlice) else len(part)
            if body.length is not None and total > body.length:
                raise ConnectionAbortedError(errno.EIO, "the body is longer than declared")
            if isinstance(part, FileSlice) and part.size > SMALL_BODY:
                if not self.begun:  # an unreadable file can still become an error response
                    read_file_slice(FileSlice(part.file, part.start, part.start + 1))
                self._write(waiting, count)
                waiting, count = b"", 0
                self._send_file(part, total == body.length)
                continue
            data = read_file_slice(part) if isinstance(part, FileSlice) else part
            waiting += b"%x\r\n%s\r\n" % (len(data), data) if framing is Framing.CHUNKED and data else data
            count += len(data)
            if len(waiting) > SMALL_BODY or body.live:  # the next bytes may be long in coming
                if total == body.length:
                    self._count(total)
                self._write(waiting, count)
                waiting, count = b"", 0
        if body.length not in (None, total):
            raise ConnectionAbortedError(errno.EIO, "the body is shorter than declared")
        self._count(total)
        self._write(waiting + (b"0\r\n\r\n" if framing is Framing.CHUNKED else b""), count)

    def _write(self, data: bytes, count: int = 0) -> None:
        """Send bytes, ``count`` of which belong to the body."""
        if data and not self.begun:
            self.begun = True
            mark(self._request.timings, "first byte")
        send_all(self._sock, data)
        self._sent += count

    def _send_file(self, part: FileSlice, is_last: bool) -> None:
        """Send a file slice; if it cannot be read to its end, the slice's fallback provides the rest.

        ``is_last``: it completes the body.
        """
        offset = part.start
        try:
            while offset < part.stop:
                if is_last and part.stop - offset <= SEND_SIZE:
                    self._count(self._sent + part.stop - offset)
                count = send_patiently(self._sock, send_some, self._sock, part, offset)
                self._sent += count
                offset += count
        except StorageError:
            if part.fallback is None:
                raise
            for data in part.fallback(offset, part.stop):
                self._write(data, len(data))


class ProxyHandler:
    """Reads requests from one connection and writes the responses, in a thread.  It decides nothing.

    The event loop waits for heads, so there is only one place that does.  When a request comes here, its
    head is complete in ``connection.buffered``, or never will be: then it is invalid, or it was not
    complete in time, and the error is sent.  Only bodies are waited for.
    """

    def __init__(self, server: ProxyServer, connection: ClientConnection) -> None:
        self._server = server
        self._connection = connection

    def handle(self) -> bool:
        """Answer the buffered requests, and those that come within a moment after a miss; return whether the
        connection stays open.

        After a hit, the connection returns to the event loop at once, which may answer the next one itself.
        """
        connection = self._connection
        with contextlib.suppress(ConnectionError, socket.timeout, TimeoutError, StorageError):
            while self._answer_one():
                connection.answered, connection.buffered = True, self._buffered()
                if self._lingers and not connection.buffered and \
                        wait_until_ready(connection.sock, THREAD_IDLE_TIMEOUT):
                    connection.buffered = connection.receive() or b""
                connection.waiting_since = time.monotonic()
                if not find_head_end(connection.buffered):
                    return True
        return False

    def _answer_one(self) -> bool:
        """Answer one request; return whether the connection stays open."""
        connection, self._lingers = self._connection, False  # whether the next request may be a miss, too
        # The request line, where only the rest of the head is wrong, and the thread that may send interim
        # responses (0: none).
        self._line, self._awaiting_head = "?", threading.get_ident()
        self._timed = DeadlineReader(connection.sock, CLIENT_TIMEOUT, connection.buffered)
        self._file = io.BufferedReader(self._timed, 64 * 1024)
        if connection.pending is not None:
            return self._finish_hit(connection.pending)
        self._started = time.monotonic()
        try:
            request = self._next()
        except ProxyError as error:
            return self._answer(self._failed_request(), error_response(error), close=True)
        if request.method == "CONNECT":
            return self._handle_connect(request)
        return self._answer(request, self._respond(request))

    def _finish_hit(self, transfer: HitTransfer) -> bool:
        """Send the rest of a hit that the event loop has begun; return whether the connection stays open."""
        connection, dispatcher = self._connection, self._server.dispatcher
        try:
            while not send_patiently(connection.sock, transfer.send_some, connection.sock):
                pass
        finally:
            connection.pending = None
            dispatcher.record_hit(transfer.hit, [(connection.host, transfer.result())])
        dispatcher.proxy.doubts.note_delivered(transfer.hit.request, connection.host, transfer.hit.status)
        return not transfer.hit.close

    def _handle_connect(self, request: Request) -> bool:
        """Serve a tunnel until it ends; return False: nothing can follow it."""
        head, dispatcher = ResponseHead(200, "Connection established", ()), self._server.dispatcher
        response, count, whole = Response(head, bytes_body(b""), CacheStatus(Outcome.TUNNEL)), 0, False
        try:
            self._server.limiter.open_tunnel(self._connection)
            with dispatcher.proxy.connect_tunnel(request) as origin:
                try:
                    fields = (("Via", via_value((), (1, 1), dispatcher.proxy.config)),)
                    send_all(self._connection.sock, render_head(head, fields))
                    mark(request.timings, "first byte")
                    count, whole = relay_tunnel(self._connection.sock, origin, self._buffered()), True
                finally:
                    dispatcher.count(request, response, 0, False)
                    dispatcher.statistics.counters.add_bytes(count, "statsTunnelBytes")
                    dispatcher.record(request, response, count, self._started, whole)
        except ProxyError as error:
            return self._answer(request, error_response(error), close=True)
        return False

    def _respond(self, request: Request) -> Response:
        """Return the dispatcher's response, or an error response.

        This is the one place where a bug becomes a status 500.
        """
        try:
            return self._server.dispatcher.respond(request, self._connection.server_address)
        except ProxyError as error:
            return error_response(error)
        except Exception:
            log.exception("%s %s failed: this is a bug", request.method, loggable_uri(request.uri))
            return error_response(ProxyError("Internal error of the proxy; see its log.", 500))

    def _answer(self, request: Request, response: Response, close: bool = False) -> bool:
        """Send a response and record it; return whether the connection stays open.

        If it fails before its first byte, another takes its place: a stale one, and at last an error, which
        cannot fail.  After the first byte, the only honest error is closing the connection (invariant 7).
        """
        sock, dispatcher, stays_open = self._connection.sock, self._server.dispatcher, False
        self._awaiting_head = 0
        writer = ResponseWriter(sock, request, response, dispatcher)
        try:
            while not writer.whole:
                try:
                    stays_open = writer.send(close)
                except (ProxyError, StorageError) as error:
                    if writer.begun:
                        return False
                    response.body.close()
                    response = self._fallback(response, error)
                    writer = ResponseWriter(sock, request, response, dispatcher)
        finally:
            self._lingers = response.cache_status.outcome is not Outcome.HIT
            writer.finish(self._started)
        unread = getattr(request.body, "unread", False)
        if not stays_open and (close or unread or wants_keep_alive(request)):
            self._drain_and_close()  # the client may still be sending; the log line leaves this time out
        return stays_open

    def _fallback(self, response: Response, error: ProxyError | StorageError) -> Response:
        """Return the response that takes the place of one that failed before its first byte."""
        try:
            if response.fallback:
                return response.fallback(error)
        except ProxyError as other:
            error = other
        return error_response(error if isinstance(error, ProxyError) else ProxyError(str(error), 500))

    # Reading

    def _next(self) -> Request:
        """Return the request whose head is buffered; ProxyError for an invalid head or an unwanted client."""
        connection = self._connection
        if connection.access_key is None:
            raise not_allowed_error(connection.host)
        request = self._parse_head(connection.buffered, connection.access_key)
        body = None
        if request.length != 0:
            expects = list_members(request.fields, "Expect") == ["100-continue"] and request.version >= (1, 1)
            body = RequestBody(self._file, request.length, self._timed, connection.sock if expects else None)
        timings = {"received": connection.waiting_since} if log.isEnabledFor(logging.DEBUG) else None
        mark(timings, "dispatched")
        missing, connection.known_missing = connection.known_missing, False
        return replace_fields(
            request, body=body, client=connection.host, timings=timings, known_missing=missing,
            send_interim=None if request.version < (1, 1) else self._send_interim)

    def _send_interim(self, head: bytes) -> None:
        """Send an interim response, unless the client does not take it now.

        Only this thread may do that, and only while it waits for the head of the final response: a download
        that goes on in another thread, or for the rest of a body, may meet interim responses as well.
        """
        sock = self._connection.sock
        if threading.get_ident() == self._awaiting_head and wait_until_ready(sock, 0.0, writing=True):
            with contextlib.suppress(OSError):  # the final response will meet the error again
                send_all(sock, head)

    def _parse_head(self, data: bytes, access_key: AccessKey) -> Request:
        """Parse the head at the start of ``data``, and consume it."""
        size = find_head_end(data)
        if not size:
            raise BadRequestError("The request head took longer than %d s." % REQUEST_HEAD_TIMEOUT, 408)
        if data[:2] == TLS_HELLO:
            raise BadRequestError("The proxy's address must start with http://, not https://.")
        try:
            parse = parse_request_head if 0 < size <= MAX_MEMOIZED_HEAD else parse_request_head.__wrapped__
            # An invalid head is parsed for its error; the line end makes an overlong last line a whole one.
            head = data[:size] if size > 0 else data + b"\r\n"
            request = parse(head, *access_key)
        except ValueError as error:
            raise BadRequestError("Invalid head: %s." % error, getattr(error, "status", 400)) from None
        except ProxyError:
            self._line = data.lstrip(b"\r\n").partition(b"\r\n")[0].decode("latin-1")
            raise
        self._file.read(size)
        return request

    def _failed_request(self) -> Request:
        """Return what is known of a request whose head was invalid, for the log."""
        method, _, uri = self._line.partition(" ")
        # Before they are shortened: the @ behind a long password may be in the part that is left out.
        method, uri = cut_userinfo(method), cut_userinfo(uri)
        uri = (uri.rpartition(" ")[0] or uri)[:200]
        return Request(method[:200], uri, Target("", "", 0, "/"), (), client=self._connection.host)

    def _buffered(self) -> bytes:
        """Return the bytes that have been received but not read, without waiting for more."""
        self._timed.set_deadline(0.0)
        with contextlib.suppress(socket.timeout):
            return self._file.peek(1) + self._timed.prefetched
        return self._timed.prefetched

    def _drain_and_close(self) -> None:
        """Close for writing, and read until the client closes, for LINGER_TIMEOUT at most.

        Unread bytes would turn the close into a reset, which may overtake the response.
        """
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_WR)
            self._timed.set_deadline(LINGER_TIMEOUT)
            while self._file.read1(COPY_SIZE):
                pass


class ProxyServer:
    """Listens on one address and serves its connections.

    The end comes in two steps: after stop(), nothing is accepted any more, and serve_forever() returns when
    the event loop has sent its responses.  Those of worker threads may take longer: see replies_running.
    Clients whose connections were accepted a moment ago still get a response: unlike after one, they do not
    expect a close, and may not try again.
    """

    def __init__(self, listening: socket.socket, dispatcher: Dispatcher) -> None:
        self.socket = listening
        self.server_address: tuple[str, int] = listening.getsockname()[:2]
        self.dispatcher = dispatcher
        self.limiter = dispatcher.limiter
        self.last_iteration = time.monotonic()  # last call of do_periodic_work, also for the watchdog
        self._stop_at = math.inf  # monotonic: when serve_forever() returns at the latest
        self._act_soon = True  # call do_periodic_work at once: there may be a place for a waiting client
        self._resume_at = 0.0  # monotonic: accept nothing until then
        self.event_loop = EventLoop(self)
        dispatcher.proxy.add_listening_port(self.server_address[1])

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until stop(), and then until the event loop has sent its responses, or SHUTDOWN_GRACE.

        At the end, close the listening socket and all connections that no worker thread serves.
        ``poll_interval``: seconds between two calls of do_periodic_work().
        """
        while time.monotonic() < self._stop_at and (self.socket.fileno() >= 0 or self.event_loop.sending):
            try:
                self.event_loop.run_once(0.0 if self._act_soon else poll_interval)
                if self._act_soon or time.monotonic() - self.last_iteration >= poll_interval:
                    self._act_soon = False
                    self.do_periodic_work()
            except Exception:  # a bug must not end the service of all clients
                log.exception("The event loop failed: this is a bug")
                time.sleep(poll_interval)
        self.socket.close()
        self.event_loop.close()

    def stop(self) -> None:
        """Stop accepting connections, and let serve_forever() end; from any thread."""
        self._stop_at = min(self._stop_at, time.monotonic() + SHUTDOWN_GRACE)
        self.limiter.close()
        self._act_soon = True
        self.event_loop.selector.wake()

    def do_periodic_work(self) -> None:
        """Do what is due several times a second.

        That includes watching the listening socket again, after a lack of descriptors has stopped it: while
        it is watched and nothing is accepted, the event loop would spin.
        """
        now = self.last_iteration = time.monotonic()
        events = selectors.EVENT_READ if self._stop_at == math.inf and now >= self._resume_at else 0
        set_events(self.event_loop.selector, self.socket, events, self._accept)
        if not events and self._stop_at < math.inf:
            # At once: what is in its queue then waits for the next process, if that has the same socket, or
            # is lost.  With --reuse-port each process has a queue of its own, so it is emptied first.
            for _ in range(LISTEN_BACKLOG // ACCEPTS_PER_TURN):
                if self.dispatcher.proxy.config.reuse_port and self.socket.fileno() >= 0:
                    self._accept()
            self.socket.close()
        self.event_loop.close_timed_out(now)
        self.limiter.admit_parked()
        self.dispatcher.proxy.close_idle()

    # Accepting, in the thread of serve_forever()

    def _accept(self) -> None:
        """Accept connections, as many as one turn allows.

        If the process is out of file descriptors, or so many connections wait that no further one can be
        parked, the clients wait in the system's queue.
        """
        for _ in range(ACCEPTS_PER_TURN):
            try:
                if self.limiter.should_pause():
                    raise OSError(errno.ENOBUFS, "too many connections wait")
                sock, address = self.socket.accept()
            except OSError as error:  # nobody waits (any more), mostly
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    set_events(self.event_loop.selector, self.socket, 0)
                    self._resume_at = time.monotonic() + 0.1
                return
            self._admit(ClientConnection(sock, address, self.event_loop.add))

    def _admit(self, connection: ClientConnection) -> None:
        """Let the event loop serve a new connection, now or when the limits allow it.

        If so many connections wait that no further one can even be parked, one of the client that has the
        most of them is refused, without reading a request.
        """
        refused = self.limiter.admit(connection)
        if refused:
            with contextlib.suppress(OSError):
                refused.sock.send(self.dispatcher.refuse(refused))
            self.close_connection(refused)

    def close_connection(self, connection: ClientConnection) -> None:
        """Close a connection; wake the loop if another client waits for its place.

        Called by the event loop and by worker threads.
        """
        connection.sock.close()
        if self.limiter.release(connection):
            self._act_soon = True
            self.event_loop.selector.wake()

    # Worker threads

    def serve_in_thread(self, connection: ClientConnection) -> None:
        """Let a thread answer the buffered requests of a connection.

        A thread of its own for each, since a pool saves little: a thread answers all requests that its client
        sends in quick succession.  ThreadPoolExecutor would also delay the exit until its threads end.
        """
        try:
            start_thread(self._answer_requests, connection)
        except StorageError:
            self.handle_error(connection)
            self.close_connection(connection)

    def _answer_requests(self, connection: ClientConnection) -> None:
        """Answer requests in a worker thread; then return the connection to the event loop, or close it.

        From add() on, the event loop owns the connection: nothing here may touch it any more.
        """
        try:
            stays_open = ProxyHandler(self, connection).handle()
        except Exception:  # noqa: BLE001
            self.handle_error(connection)
            stays_open = False
        (self.event_loop.add if stays_open else self.close_connection)(connection)

    @property
    def replies_running(self) -> int:
        """The number of responses that are being prepared or sent, for which SIGTERM waits.

        Those of worker threads are counted for all servers of the process together.
        """
        return self.limiter.busy_count() + self.event_loop.sending

    def handle_error(self, connection: ClientConnection) -> None:
        """Log a bug, or the lack of threads; other connections are not affected."""
        log.error("A connection from %s failed.", connection.host, exc_info=True)


# ---------------------------------------------------------------------------------------------
# 15 Command line
# ---------------------------------------------------------------------------------------------

# Values of options ----------------------------------------------------------------------------
#
# Each parser takes the text of an option's value and returns the value for Config.  It raises
# ValueError with a sentence that names the invalid text and gives valid examples.

_SIZE_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # in bytes
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # in seconds


def parse_addr(text: str) -> tuple[str, int]:
    """Parse a listening address; an empty host stands for all addresses of the machine.

    >>> parse_addr("[::1]:9999"), parse_addr(":9999")
    (('::1', 9999), ('', 9999))
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]*)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError("Invalid address '%s'; use :9999, 192.168.0.1:9999 or [::1]:9999" % text)
    return match[1] or match[2] or "", int(match[3])


def parse_ports(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of ports; "none" is the empty list.

    >>> parse_ports("443,8443"), parse_ports("none")
    ((443, 8443), ())
    """
    ports = [] if text == "none" else text.split(",")
    if not all(re.fullmatch(r"\d{1,5}", port, re.A) and 0 < int(port) < 65536 for port in ports):
        raise ValueError("Invalid port list '%s'; use 443,8443 or none" % text)
    return tuple(map(int, ports))


def parse_size(text: str) -> int:
    """Parse a size; units are powers of 1024. Returns bytes.

    >>> parse_size("1.5k"), parse_size("20G")
    (1536, 21474836480)
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([BKMGT]?)(?:I?B)?", text.strip().upper())
    if not match:
        raise ValueError("Invalid size '%s'; use 500M, 20G or 1.5T" % text)
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def parse_duration(text: str) -> float:
    """Parse a time with a unit.  Returns seconds.

    >>> parse_duration("30d")
    2592000.0
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhdw])", text.strip().lower())
    if not match:
        raise ValueError("Invalid time '%s'; use 90m, 12h, 30d or 8w" % text)
    return float(match[1]) * _TIME_UNITS[match[2]]


def parse_count(text: str) -> int:
    """Parse a decimal number from 0 to 10,000."""
    if not re.fullmatch(r"\d{1,5}", text, re.A) or int(text) > 10_000:
        raise ValueError("Invalid number '%s'; use 0 to 10000" % text)
    return int(text)


def parse_path(text: str) -> str:
    """Return the path of a file or directory unchanged.

    An empty path is an error, because it usually comes from an unset shell variable, and would otherwise
    mean the current directory.
    """
    if not text:
        raise ValueError("Invalid path ''; use the name of a file or directory")
    return text


def parse_barrier(text: str) -> tuple[tuple[str, int], ...]:
    """Parse the URL of the memcached servers through which instances coordinate.

    >>> parse_barrier("memcached://mc1.example.org,[::1]:11212")
    (('mc1.example.org', 11211), ('::1', 11212))
    """
    scheme, _, authorities = text.partition("://")
    with contextlib.suppress(ProxyError):
        servers = tuple(split_authority(authority, 11211) for authority in authorities.split(","))
        if scheme == "memcached" and all(host for host, _ in servers):
            return servers
    raise ValueError("Invalid barrier '%s'; use memcached://HOST:PORT[,HOST:PORT]" % text)


def parse_parent_proxy(text: str) -> ParentProxy | None:
    """Parse a parent proxy, written as a URL or host:port; None for "" and "none".

    ",direct" at the end allows direct connections if the proxy cannot be reached.  The error message does
    not repeat the text, which may contain a password.

    >>> parse_parent_proxy("http://me:pw@proxy.test:3128,direct").fields
    (('Proxy-Authorization', 'Basic bWU6cHc='),)
    """
    if text in ("", "none"):
        return None
    match = re.fullmatch(r"(?:http://(?:([^/?#@]*)@)?)?([^/?#@,]+)/?(,direct)?", text, re.I)
    with contextlib.suppress(BadRequestError):
        if match:
            target = parse_target("http://" + match[2])
            # RFC 7617 §2: the colon is required even if there is no password.
            credentials = urllib.parse.unquote_to_bytes("%s:%s" % (match[1] or "").partition(":")[::2])
            basic = "Basic " + base64.b64encode(credentials).decode()
            return ParentProxy(target, (("Proxy-Authorization", basic),) if match[1] else (), bool(match[3]))
    raise ValueError("Invalid parent proxy; use http://[name:password@]host:port[,direct], or none")


def parent_proxies(option: str | None, environment: Mapping[str, str]) -> tuple[tuple[str, ParentProxy], ...]:
    """Return the parent proxy for each scheme that has one.

    ``option`` is the value of --parent.  If it is None, http_proxy and https_proxy in the environment
    apply; lower case takes precedence, as in curl.  HTTP_PROXY is ignored in a CGI environment, where a
    client can set it with a Proxy field (CVE-2016-5385).  Raises ValueError.
    """
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
    """Parse a filters file: one regular expression a line; blank lines and # comments are skipped.

    Returns the compiled expressions, and an error message for each invalid line.  A deeply nested
    expression exhausts the compiler's stack, and a huge repeat count overflows its counter.
    """
    filters, errors = [], []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        try:
            filters += [re.compile(line)] if line and not line.startswith("#") else []
        except (re.error, OverflowError, RecursionError) as error:
            errors.append("line %d is not a regular expression, skipped: %s: %s" % (number, line, error))
    return filters, errors


class StartupError(Exception):
    """pkgproxy cannot start, because an option's value cannot be used on this machine.

    Its text is one or two sentences with the cause and a remedy; main() writes it to stderr.
    """


def load_file(name: str, path: str, parse: Callable[[str], tuple[list[Any], list[str]]]) -> tuple[Any, ...]:
    """Read a file of filters or origins, as ``name`` says.  Raises StartupError if it cannot be used.

    Messages from ``parse`` about lines that it has skipped are logged.  A byte order mark at the start is
    ignored; editors on Windows write one.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_FILTERS + 1)
        if len(text) > MAX_FILTERS:  # probably the wrong file: a package, or a device such as /dev/zero
            raise OSError(errno.EFBIG, "it has more than %d characters" % MAX_FILTERS)
        entries, errors = parse(text)
    except (OSError, ValueError) as error:  # ValueError: also for text that is not UTF-8
        reason = getattr(error, "strerror", None) or error
        raise StartupError("Cannot read the %s file %s: %s." % (name, path, reason)) from None
    for message in errors:
        log.warning("%s: %s", path, message)
    log.info("Parsed %s from %s", format_count(len(entries), name[:-1]), path)
    return tuple(entries)


def load_files(config: Config) -> Config:
    """Return the configuration with filters and origins as their files are now.  Raises StartupError."""
    if config.filters_file:
        config = replace_fields(config, filters=load_file("filters", config.filters_file, parse_filters))
    if config.origins_file:
        config = replace_fields(config, origins=load_file("origins", config.origins_file, parse_origins))
    return config


# Options --------------------------------------------------------------------------------------
#
# To add an option: add a field with its default to Config, and a row to OPTIONS.  parse_options() needs
# no change: it passes each value to the field that the row names.  README.md quotes --help, which must
# fit two screens: one line for each option, and 48 lines of 80 columns in all.  With Python 3.9 to 3.12,
# which break two of the lines, it has 48 already, so a new row must take the place of a line of EPILOG.
#
# Tests check this.  CommandLineTest also needs: for a new metavar (ADDR, NET ...), a valid value; if the
# value is parsed, what becomes of it, and a row for an invalid value; and the default, if the help shows it.


class Option(NamedTuple):
    """A row of the options table.  A new option needs one row here and one field in Config.

    An option that is not given keeps the default of its field; the help text repeats it for the user.
    """

    usage: str  # its flags and, unless it is a switch, the name of its value
    help: str  # one line, with the default in parentheses
    field: str = ""  # the field of Config that it sets; "" for argparse's own actions
    parse: Callable[[str], Any] | None = None  # from the text to the field's value; None: the text itself
    more: Mapping[str, Any] = {}  # further arguments of ArgumentParser.add_argument()


REPEATED = {"action": "append"}  # the field is a tuple
ON, OFF = {"action": "store_true"}, {"action": "store_false"}  # what a switch sets its field to
VERSION = {"action": "version", "version": "pkgproxy " + __version__}

OPTIONS: dict[str, tuple[Option, ...]] = {  # by their heading in --help
    "clients": (
        # The text of these two is only checked here, and parsed where it is used.
        Option("-a --addr ADDR", "address to listen on; repeatable (:9999)", "addrs",
               lambda text: parse_addr(text) and text, REPEATED),
        Option("--allow NET", "further clients; repeatable (loopback, private, lan)", "allow",
               lambda text: (text, parse_networks([text]))[0], REPEATED),
        Option("--name NAME", "another host name of the proxy; repeatable (none)", "names",
               parse_host_name, REPEATED),
        Option("--connect-ports PORTS", "ports that CONNECT may reach, or none (443)", "connect_ports",
               parse_ports),
        Option("--reuse-port", "share the addresses with other instances (off)", "reuse_port", more=ON),
        Option("--instance NAME", "name of this instance; implies --reuse-port (none)", "instance"),
        Option("--private", "hide clients' addresses and files on the pages (off)", "private", more=ON),
    ),
    "cache": (
        Option("-r --root DIR", "cache directory, created if missing (.)", "root", parse_path),
        Option("--max-size SIZE", "maximum size of the cache (unlimited)", "max_size", parse_size),
        Option("--min-free SIZE", "disk space to keep free (5 %%, at most 10 GB)", "min_free", parse_size),
        Option("--max-age TIME", "remove files not used for this long (never)", "max_age", parse_duration),
        Option("-f --filters FILE", "expressions for URIs not to cache (none)", "filters_file", parse_path),
        Option("--no-scrub", "do not look for files that the disk has damaged (off)", "scrub", more=OFF),
        Option("--no-heuristics", "assume no lifetime if an origin gives none (off)", "heuristics", more=OFF),
        Option("--barrier URL", "coordinate instances by memcached (file locks)", "barrier", parse_barrier),
    ),
    "origins": (
        Option("--origins FILE", "the only hosts that clients may reach (any)", "origins_file", parse_path),
        Option("--parent URL", "parent proxy, or none ($http_proxy, $https_proxy)", "parents"),
        Option("--ca-file FILE", "PEM certificates to trust in addition (none)", "ca_file", parse_path),
        Option("--adopt DIR", "also use packages found in DIR; repeatable (none)",
               "adopt", lambda text: os.path.abspath(parse_path(text)), REPEATED),
        Option("--offline", "serve only cached files, contact no origin (off)", "offline", more=ON),
        Option("--max-orphans N", "downloads that continue without clients (8)", "max_orphans", parse_count),
    ),
    "log and help": (
        Option("--access-log FILE", "log for GoAccess and others (none)", "access_log", parse_path),
        Option("-v --verbose", "log more, and the steps of requests", "verbose", more={"action": "count"}),
        Option("-q --quiet", "do not log requests; twice: only errors", "quiet", more={"action": "count"}),
        Option("-V --version", "show the version and exit", more=VERSION),
        Option("-h --help", "show this help and exit", more={"action": "help"}),
    ),
}
EPILOG = """Defaults are in parentheses.  Formats:
  ADDR   :9999, 192.168.0.1:9999 or [::1]:9999; PORTS 443,8443 or none
  NET    all, or 203.0.113.0/24; "--allow none" first: without the defaults
  SIZE   500M, 20G or 1.5T; TIME 90m, 12h, 30d or 8w
  FILE   a line each: for -f expressions, for --origins hosts or *.example.org
  URL    for --barrier memcached://HOST:PORT[,HOST:PORT]
         for --parent http://[NAME:PASSWORD@]HOST:PORT[,direct]
Clients need only http_proxy=http://this-host:9999/, which also shows a page."""


def _parse_argument(parse: Callable[[str], Any], text: str) -> Any:
    """Parse a value for argparse, which would replace the message of a ValueError with its own."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_argument_parser() -> argparse.ArgumentParser:
    """Build the parser from OPTIONS. Options that are not given are absent from its result."""
    parser = argparse.ArgumentParser(
        "pkgproxy.py", "%(prog)s [options]", "A caching HTTP proxy for package managers.", EPILOG,
        # EPILOG keeps its line breaks, and each help text gets enough columns for one line.
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
        add_help=False, argument_default=argparse.SUPPRESS)
    for heading, options in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for option in options:
            words = option.usage.split()
            flags = [word for word in words if word.startswith("-")]
            settings: dict[str, Any] = {
                "dest": option.field, "metavar": "".join(words[len(flags):]),
                "type": option.parse and functools.partial(_parse_argument, option.parse)}
            group.add_argument(*flags, help=option.help, **option.more,
                               **{name: value for name, value in settings.items() if value})
    return parser


def parse_options(arguments: list[str]) -> tuple[Config, int]:
    """Return the configuration and the log level.  Exits with code 2 and one line if an option is invalid.

    Options that are not given keep the defaults of Config.  Some fields come from elsewhere: parents and
    no_proxy also from the environment, reuse_port also from --instance, and pseudonym from a random number.
    --allow adds to the default, unless the first one is "none".
    """
    parser = make_argument_parser()
    given = vars(parser.parse_args(arguments))
    level = logging.INFO + 10 * given.pop("quiet", 0) - 10 * given.pop("verbose", 0)
    values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in given.items()}
    more = values.get("allow", ())
    if "none" in more[1:]:
        parser.error("'none' must be the first --allow")
    values["allow"] = more[1:] if more[:1] == ("none",) else Config.allow + more
    try:
        values["parents"] = parent_proxies(values.get("parents"), os.environ)
    except ValueError as error:
        parser.error(str(error))
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    values["no_proxy"] = tuple(no_proxy.lower().replace(" ", "").split(","))
    values["reuse_port"] = bool(values.get("reuse_port") or values.get("instance"))
    # Unique, so that this proxy recognizes its own requests in Via, but not those of another instance.
    values["pseudonym"] = "pkgproxy-" + secrets.token_hex(4)
    return Config(**values), max(logging.DEBUG, min(level, logging.ERROR))


# Start ----------------------------------------------------------------------------------------


def open_store(config: Config) -> Store:
    """Open the store, and create the cache directory if it is missing.  Raises StartupError."""
    store = IndexedStore(config.root or ".", config.root is not None, config.min_free, config.max_size)
    try:
        make_directory(store.root)
        hosts = list_hosts(store)
        is_used = not hosts and store.trust_bare and set(os.listdir(store.root)) - {METADATA_FOLDER}
    except OSError as error:
        raise StartupError("Cannot use the cache root %s: %s. Choose another directory with -r." % (
            store.root, error.strerror)) from None
    content = "files without metadata" if is_used else "nothing stored yet"
    log.info("Cache root at %s (%s)", store.root,
             format_count(len(hosts), "host") + " stored" if hosts else content)
    if not os.access(store.root, os.W_OK):
        log.warning("The cache root is not writable. Requests are forwarded, but nothing is stored.")
    for directory in config.adopt:
        if os.path.isdir(directory):
            log.info("Adopting identical packages from %s", directory)
        else:
            log.warning("The directory %s, from which packages are to be adopted, does not exist. "
                        "pkgproxy looks for it again every %d h.", directory, ADOPT_SCAN_INTERVAL // 3600)
    return store


def check_access_settings(config: Config) -> None:
    """Log which clients may connect and how origins are reached.  Raises StartupError.

    A --ca-file without certificates is reported now instead of with the first https request.
    """
    log.info("Allowed clients: %s", ", ".join(config.allow) or "only this machine")
    for scheme, parent in config.parents:
        log.info("Using the parent proxy %s for %s origins%s", parent.place.authority, scheme,
                 ", with direct connections if it fails" if parent.or_direct else "")
    if config.ca_file is not None:
        try:
            make_tls_context(config.ca_file)
        except OSError as error:
            raise StartupError("Cannot use the certificates in %s: %s." % (
                config.ca_file, explain_error(error))) from None


def make_connection_limiter(addresses: int) -> ConnectionLimiter:
    """Limit connections by the file descriptors that this process may open, after raising that limit.

    A connection uses up to four descriptors (client, origin, stored file, partial file).  For each one,
    another may be parked until the limit allows it, and each of the listening addresses may keep a hit ready;
    for every fourth, an abandoned one may still use its four.  40 are left for everything else.
    """
    if resource is None:
        return ConnectionLimiter(MAX_CONNECTIONS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: unlimited
    places = (soft - 40) // (6 + addresses) if soft > 0 else MAX_CONNECTIONS
    return ConnectionLimiter(max(4, min(MAX_CONNECTIONS, places)))


class NonblockingListener(socket.socket):
    """A listening socket that takes over another one's descriptor, and does not block in accept().

    It must not block, because another process that shares it may be quicker to accept.  ``family`` and
    ``type`` are attributes here, because accept() asks for them each time: socket's own properties, which
    build enumerations, take a tenth of the time of a connection.
    """

    family: socket.AddressFamily = socket.AF_INET
    type: socket.SocketKind = socket.SOCK_STREAM

    def __init__(self, plain: socket.socket) -> None:
        self.family, self.type = plain.family, plain.type
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self.setblocking(False)
        # Accepted sockets inherit it: Nagle's algorithm would delay a body that follows its head by 40 ms.
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def open_socket(host: str, port: int, reuse_port: bool = False) -> socket.socket:
    """Open a listening socket, for IPv4 and IPv6 if the host is empty; OSError, OverflowError.

    With ``reuse_port``, other processes may listen on the same address.
    """
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    return NonblockingListener(socket.create_server(
        (host, port), family=family, backlog=LISTEN_BACKLOG, reuse_port=reuse_port, dualstack_ipv6=both))


def display_address(listening: socket.socket) -> str:
    """Return host:port of a listening socket, without the host if it listens on all addresses."""
    host, port = listening.getsockname()[:2]
    return Target("", "" if ipaddress.ip_address(host).is_unspecified else host, port, "").authority


def inherited_socket(descriptor: int) -> socket.socket:
    """Take over a listening socket that the parent process opened.  Raises OSError if it is anything else."""
    listening = socket.socket(fileno=descriptor)
    if (listening.family not in (socket.AF_INET, socket.AF_INET6)
            or not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        raise OSError(errno.EINVAL, "it is not a listening TCP socket")
    return NonblockingListener(listening)


def open_sockets(config: Config, environment: Mapping[str, str]) -> list[socket.socket]:
    """Listen on each configured address, or take over the sockets that systemd passed instead.

    Raises StartupError if one of them fails; the others are then closed.
    """
    if config.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise StartupError("This system does not support SO_REUSEPORT; remove --reuse-port and --instance.")
    sockets: list[socket.socket] = []
    # Those of systemd's socket activation (sd_listen_fds(3)).  LISTEN_PID tells them from variables that were
    # inherited by mistake.
    count = environment.get("LISTEN_FDS", "") if environment.get("LISTEN_PID") == str(os.getpid()) else ""
    descriptors = range(3, 3 + int(count)) if count.isdecimal() else range(0)
    for addr in descriptors or config.addrs:
        try:
            sockets.append(inherited_socket(addr) if isinstance(addr, int)
                           else open_socket(*parse_addr(addr), config.reuse_port))
        except (OSError, OverflowError) as error:
            for listening in sockets:
                listening.close()
            # create_server() appends "(while attempting to bind on address ...)", which repeats the address.
            reason = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]
            message = "socket %d from systemd: %s." if descriptors else "%s: %s. Choose another with -a."
            raise StartupError("Cannot listen on " + message % (addr, reason)) from None
        log.warning("Starting proxy server at %s", display_address(sockets[-1]))  # with -q, too
    address = display_address(sockets[0])
    log.info("Status page at http://%s/", socket.gethostname() + address if address[0] == ":" else address)
    return sockets


# Signals and the service manager --------------------------------------------------------------


def install_signal_handlers() -> queue.SimpleQueue[str]:
    """Return a queue that receives the names of the signals SIGTERM, SIGINT and SIGHUP.

    A Python signal handler runs between any two instructions of the main thread.  SimpleQueue.put() is
    reentrant, so a handler may call it; an Event or a log call could deadlock on a lock that the
    interrupted code holds.
    """
    signals: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), lambda *_, name=name: signals.put(name))
    return signals


class SystemdNotifier:
    """Sends state changes and watchdog messages to systemd, or nothing under any other parent (sd_notify(3)).

    READY=1, RELOADING=1 and STOPPING=1 mark the states.  WATCHDOG=1 is sent while all event loops run; if it
    stays away for WATCHDOG_USEC, systemd restarts the service.
    """

    def __init__(self, environment: Mapping[str, str], counters: Counters) -> None:
        path = environment.get("NOTIFY_SOCKET", "") if hasattr(socket, "AF_UNIX") else ""
        self._address = "\0" + path[1:] if path.startswith("@") else path  # "@": Linux's abstract namespace
        self._counters = counters
        timeout = (parse_delta_seconds(environment.get("WATCHDOG_USEC")) or 60_000_000) / 1e6  # seconds
        self._max_silence = timeout / 2  # a loop that has not run for this long counts as stuck
        self.pause = min(1.0, timeout / 4)  # maximum seconds between two calls of send_watchdog()
        self._next = 0.0  # monotonic time of the next watchdog message

    def notify(self, text: str) -> None:
        """Send a message.  Errors are ignored, because the proxy works without a service manager."""
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1.0)
                sock.sendto(text.encode(), self._address)

    def send_watchdog(self, last_iteration: float) -> None:
        """Send the watchdog message and a status line if it is time and all event loops run.

        ``last_iteration`` is the monotonic time at which the slowest loop last ran.
        """
        now = time.monotonic()
        if self._address and now >= self._next and now - last_iteration < self._max_silence:
            self._next = now + min(self._max_silence / 2, NOTIFY_INTERVAL)
            counts = self._counters.totals()
            hits, requests = hit_counts(counts)
            self.notify("WATCHDOG=1\nSTATUS=%s, %s hits, %s saved" % (
                format_count(requests, "request"), format_percent(hits, requests),
                format_bytes(counts["statsCacheBytes"])))


def reload_files(proxy: Proxy, notifier: SystemdNotifier) -> None:
    """Read the files of filters and origins again.  If that fails, the previous ones remain in force.

    The access log needs nothing, because its file is opened for each write.
    """
    notifier.notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
    try:
        proxy.config = config = load_files(proxy.config)
        if not (config.filters_file or config.origins_file or config.access_log):
            log.info("Nothing to read again: neither --filters nor --origins is given")
    except StartupError as error:
        log.error("%s The previous filters and origins remain in force.", error)
    notifier.notify("READY=1")


# Linux's requests for the addresses of all interfaces, and for the netmask of one (netdevice(7)).
_SIOCGIFCONF, _SIOCGIFNETMASK = 0x8912, 0x891B


def interface_addresses() -> Iterator[str]:
    """Yield the addresses of this machine's interfaces as ADDRESS/PREFIX; OSError.

    Outside Linux, only the IPv6 address from which the internet is reached, whose network is a /64
    (RFC 4291 §2.5.4).  No packet is sent.
    """
    if sys.platform != "linux":
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(("2000::1", 9))
            yield probe.getsockname()[0] + "/64"
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # SIOCGIFADDR would tell only the first address of an interface, and socket.if_nameindex() needs
        # AF_NETLINK, which pkgproxy.service does not permit.
        size = struct.calcsize("16sLLH6x")  # of a struct ifreq: a name, and at most a struct ifmap
        buffer = array.array("B", bytes(1024 * size))
        reply = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iP", len(buffer), buffer.buffer_info()[0]))
        for start in range(0, struct.unpack_from("i", reply)[0], size):
            request = bytes(buffer[start:start + size])
            with contextlib.suppress(OSError):  # it has gone meanwhile
                mask = fcntl.ioctl(probe, _SIOCGIFNETMASK, request)  # of the address in the request
                yield "/".join(socket.inet_ntoa(each[20:24]) for each in (request, mask))
    with open("/proc/self/net/if_inet6", encoding="ascii") as file:  # missing if IPv6 is disabled
        for words in map(str.split, file):
            yield "%s/%d" % (ipaddress.IPv6Address(bytes.fromhex(words[0])), int(words[2], 16))


def with_lan(config: Config) -> Config:
    """Return the configuration with this machine's present networks, if "lan" is allowed; log a change."""
    interfaces: list[str] = []
    with contextlib.suppress(OSError):
        interfaces.extend(interface_addresses())  # keeps those before an error
    lan = lan_networks(interfaces) if "lan" in config.allow else ()
    if lan == config.lan:
        return config
    log.info("Networks of this machine, whose clients are allowed (lan): %s", ", ".join(lan) or "none")
    return replace_fields(config, lan=lan)


def wait_for_shutdown(servers: list[ProxyServer], proxy: Proxy, signals: queue.SimpleQueue[str],
                      notifier: SystemdNotifier) -> None:
    """Return on SIGTERM or SIGINT.

    Meanwhile, send watchdog messages, look at this machine's networks, and read files again on SIGHUP.
    """
    looks = RecentEvents()  # at the networks
    while True:
        if looks.note_first("lan", LAN_INTERVAL):
            proxy.config = with_lan(proxy.config)
        notifier.send_watchdog(min(server.last_iteration for server in servers))
        with contextlib.suppress(queue.Empty):
            name = signals.get(timeout=notifier.pause)  # Windows delivers signals only between two waits
            if name != "SIGHUP":
                return
            reload_files(proxy, notifier)


def serve(servers: list[ProxyServer], proxy: Proxy, signals: queue.SimpleQueue[str],
          notifier: SystemdNotifier) -> None:
    """Serve until a signal arrives, then shut down.

    Shutdown: 1. stop accepting, on all addresses at once; 2. wait for the running responses, at most
    SHUTDOWN_GRACE seconds for all servers together; 3. close the proxy.
    Threads that are still busy are daemons and end with the process.
    """
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    notifier.notify("READY=1")
    wait_for_shutdown(servers, proxy, signals, notifier)
    notifier.notify("STOPPING=1")
    log.info("Stopping")
    deadline = time.monotonic() + SHUTDOWN_GRACE
    for server in servers:
        server.stop()
    for thread in threads:
        thread.join()
    while any(server.replies_running for server in servers) and time.monotonic() < deadline:
        time.sleep(0.05)
    proxy.close()


# Log ------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def _timestamp(second: int) -> str:
    """Return a local time in the format of the original's log."""
    return time.strftime("%Y/%m/%d %H:%M:%S ", time.localtime(second))


class QueueLogHandler(logging.Handler):
    """Writes log lines to stderr in a thread of its own, several at a time.

    If stderr blocks (a stopped pager, a stuck log driver), lines are dropped instead of stopping the proxy.
    Lines that are still queued at exit are written by flush(), which logging.shutdown() calls.
    """

    def __init__(self, with_timestamps: bool,
                 write_some: Callable[[bytes], int] = functools.partial(os.write, 2)) -> None:
        super().__init__()
        self._write_some = write_some  # returns how many bytes it has written; OSError
        self._with_timestamps = with_timestamps
        self._queue: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()  # Event: set when written
        threading.Thread(target=self._run, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record of the logging module."""
        self.write([self.format(record)])

    def write(self, lines: list[str]) -> None:
        """Write lines of the access log.  A LogRecord for each would cost as much as serving a hit."""
        timestamp = _timestamp(int(time.time())) if self._with_timestamps else ""
        for line in lines[:max(0, MAX_LOG_LINES - self._queue.qsize())]:
            self._queue.put("%s%s\n" % (timestamp, line))

    def flush(self) -> None:
        """Wait until all queued lines are written, at most one second."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(1.0)

    def _run(self) -> None:
        """Write batches of lines forever."""
        while True:
            batch = [self._queue.get()]
            time.sleep(LOG_BATCH_DELAY)  # more lines arrive meanwhile, and share the system call
            with contextlib.suppress(queue.Empty):
                while len(batch) < MAX_LOG_LINES:
                    batch.append(self._queue.get_nowait())
            self._write_out(batch)

    def _write_out(self, batch: list[str | threading.Event]) -> None:
        """Write the lines of a batch, then set its events.

        sys.stderr would keep lines that it failed to write (a full device), and fail again at exit.
        """
        data = "".join(line for line in batch if isinstance(line, str)).encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError, ValueError):  # /dev/full, or stderr was closed
            while data:
                try:
                    data = data[self._write_some(data):]
                except BlockingIOError:  # the parent process made stderr non-blocking
                    time.sleep(LOG_BATCH_DELAY)
        for line in batch:
            if isinstance(line, threading.Event):
                line.set()


_append_errors = RecentEvents()  # by path


def append_to_file(path: str, data: bytes) -> int:
    """Append to a file and return how many bytes were written; OSError, which is also logged once a minute.

    The file is opened each time, so that logrotate may rename it at any moment and need not copy it.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            return file.write(data)
    except OSError as error:
        if _append_errors.note_first(path, REFUSAL_LOG_INTERVAL):
            log.error("Cannot write to the access log %s: %s.", path, error.strerror)
        raise


def access_log_lines(request: Request, status: int, outcome: Outcome, results: list[tuple[str, SendResult]]
                     ) -> list[str]:
    """Return lines in the combined format of Apache and nginx, with the outcome as a further word.

    The request line of a request that was not read is "-", as in Apache.  Characters that would end a
    quoted string, or drive a terminal, are escaped as in nginx.
    """
    line = "%s %s HTTP/%d.%d" % (request.method, loggable_uri(request.uri), *request.version)
    referer, agent = (field_value(request.fields, name) or "-" for name in ("Referer", "User-Agent"))
    line, referer, agent = (escape_control(text).replace("\\", "\\x5c").replace('"', "\\x22") for text in (
        "-" if request.method == "?" else line, loggable_uri(referer), agent))
    when = time.strftime("%d/%b/%Y:%H:%M:%S %z")
    return ['%s - - [%s] "%s" %d %d "%s" "%s" %s' % (client, when, line, status, result.size, referer, agent,
                                                   outcome._value_) for client, result in results]


def stderr_is_journal(stream: str) -> bool:
    """Return whether stderr is the journal, which adds timestamps itself.

    ``stream`` is $JOURNAL_STREAM: device and inode of the journal's socket (systemd.exec(5)).
    """
    return stream == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))


# Main -----------------------------------------------------------------------------------------


def limit_address_space() -> None:
    """Let threads that start from now on take little address space; some machines and containers limit it.

    Besides 8 MB of stack for each thread, glibc reserves 64 MB for each of up to 8 heaps a processor, which
    only keep threads that run at the same time from waiting for each other: Python's do not.
    """
    # Each exception is that of a system without the one or the other; MemoryError is systemd's
    # MemoryDenyWriteExecute, under which ctypes may be unusable.
    with contextlib.suppress(RuntimeError, ImportError, OSError, AttributeError, TypeError, MemoryError):
        threading.stack_size(STACK_SIZE)
        import ctypes
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX: 2 heaps


def run(config: Config, level: int) -> None:
    """Start pkgproxy, serve until a signal arrives, and stop.  Raises StartupError.

    Everything that can fail is done before the first thread of the proxy starts, and the addresses are
    opened last, so that clients of a proxy that cannot start are refused at once.
    """
    limit_address_space()  # before the first thread, because threads inherit it
    log_handler = QueueLogHandler(not stderr_is_journal(os.environ.get("JOURNAL_STREAM", "")))
    logging.basicConfig(level=level, format="%(message)s", handlers=[log_handler])
    store = open_store(config)
    config = with_lan(load_files(config))
    if os.path.isdir(config.access_log or ""):
        raise StartupError("The access log %s is a directory; name a file in it." % config.access_log)
    if not config.filters_file:
        log.info("No filters file given")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        log.warning("Running as root: an unprivileged account is sufficient and safer")
    check_access_settings(config)
    signals = install_signal_handlers()  # before "Starting" is logged, after which a SIGTERM may come
    sockets = open_sockets(config, os.environ)
    counters = Counters()
    proxy = Proxy(config, store, counters.add_bytes)
    statistics = StatusCollector(store, counters, config.instance or ",".join(config.addrs), proxy.snapshot)
    proxy.start()
    statistics.history.start()
    dispatcher = Dispatcher(proxy, statistics, make_connection_limiter(len(sockets)), log_handler.write)
    if config.access_log:
        with contextlib.suppress(OSError):  # it is logged, now instead of with the first request
            append_to_file(config.access_log, b"")
        access_log = QueueLogHandler(False, functools.partial(append_to_file, config.access_log))
        dispatcher.log_access = lambda *response: access_log.write(access_log_lines(*response))
    dispatcher.host_names()  # starts the look-up of the full name
    serve([ProxyServer(listening, dispatcher) for listening in sockets], proxy, signals,
          SystemdNotifier(os.environ, counters))
    statistics.history.stop()


def open_missing_standard_files() -> None:
    """Open /dev/null for each standard descriptor that is closed.

    Otherwise the next file or socket would get its number, and the log would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def main(arguments: list[str] | None = None) -> int:
    """Run pkgproxy with command-line arguments (default: sys.argv).  Returns the exit code.

    0: stopped by SIGTERM or SIGINT; 1: cannot start; 2 (from argparse): invalid option.
    """
    open_missing_standard_files()
    config, level = parse_options(sys.argv[1:] if arguments is None else arguments)
    try:
        run(config, level)
    except StartupError as error:
        logging.shutdown()  # write the earlier log lines first
        sys.stderr.write("pkgproxy: %s\n" % error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
