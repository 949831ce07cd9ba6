"""The list of what is measured: every case, its peers and its target."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from benchmarks.cases import (
    aio,
    arrays,
    connecting,
    descriptors,
    importing,
    pools,
    queues,
    servers,
    shared,
    small,
    sync,
    typed,
    waiting,
)
from benchmarks.model import Case, Target

__all__ = ["CASES", "select"]

KIB = 1024
MIB = 1024 * KIB

MP = "multiprocessing"

ARRAY_PEERS = ("fdshare", MP, "send_bytes", "SharedMemory", "memcpy")

STANDARD_POOL = "concurrent.futures"

POOL_PEERS = ("fdshare", STANDARD_POOL, "multiprocessing.Pool", "loky", "mpire")

SERVER_PEERS = ("fdshare", "SO_REUSEPORT", "shared socket", MP)

CASES: tuple[Case, ...] = (
    Case(
        "roundtrip", "small message, round trip", "Small messages", small.run_round_trip,
        ("fdshare", MP, "bare Python", "C"), MP, Target("share", 0.62),
    ),
    Case(
        "oneway", "small message, one way", "Small messages", small.run_one_way,
        ("fdshare", MP, "bare Python", "C"), MP, Target("faster", 2.2),
    ),
    Case(
        "typed", "small attrs object without pickle, round trip", "Small messages", typed.run_message,
        ("fdshare", "fdshare (pickle)", MP), "fdshare (pickle)",
    ),
    Case(
        "typed-handle", "attrs object with an FdHandle, without pickle", "Small messages", typed.run_descriptor,
        ("fdshare", "fdshare (pickle)"), "fdshare (pickle)",
    ),
    Case(
        "socket-1", "message with 1 socket", "Descriptors", partial(descriptors.run_sockets, count=1),
        ("fdshare", MP, "bare Python", "C"), MP, Target("faster", 8),
    ),
    Case(
        "socket-16", "message with 16 sockets", "Descriptors", partial(descriptors.run_sockets, count=16),
        ("fdshare", MP, "bare Python", "C"), MP,
    ),
    Case(
        "socket-253", "message with 253 sockets", "Descriptors", partial(descriptors.run_sockets, count=253),
        ("fdshare", MP, "bare Python", "C"), MP,
    ),
    Case(
        "handle", "one FdHandle (against one socket)", "Descriptors", descriptors.run_handle,
        ("fdshare", MP, "DupFd", "send_handle", "C"), MP, Target("faster", 10),
    ),
    Case(
        "many-5000", "5,000 FdHandles in one message", "Descriptors",
        partial(descriptors.run_many, count=5000),
        ("fdshare", MP, "fdshare (sockets)", "C"), MP, Target("micros", 3),
    ),
    Case("array-64KiB", "array of 64 KiB", "Arrays", partial(arrays.run_array, size=64 * KIB), ARRAY_PEERS, MP),
    Case(
        "array-1MiB", "array of 1 MiB", "Arrays", partial(arrays.run_array, size=MIB), ARRAY_PEERS, MP,
        Target("faster", 2.5),
    ),
    Case("array-16MiB", "array of 16 MiB", "Arrays", partial(arrays.run_array, size=16 * MIB), ARRAY_PEERS, MP),
    Case(
        "array-128MiB", "array of 128 MiB", "Arrays", partial(arrays.run_array, size=128 * MIB), ARRAY_PEERS, MP,
        Target("faster", 12),
    ),
    Case(
        "array-512MiB", "array of 512 MiB", "Arrays", partial(arrays.run_array, size=512 * MIB), ARRAY_PEERS, MP,
        heavy=True,
    ),
    Case(
        "shared-new", "1 MiB into new shared memory", "Shared memory", shared.run_new,
        ("fdshare", "SharedMemory"), "SharedMemory",
    ),
    Case(
        "shared-1KiB", "shared array of 1 KiB", "Shared memory", partial(shared.run_array, size=KIB),
        ("fdshare", "SharedMemory"), "SharedMemory",
    ),
    Case(
        "shared-1GiB", "shared array of 1 GiB", "Shared memory", partial(shared.run_array, size=1024 * MIB),
        ("fdshare", "SharedMemory"), "SharedMemory",
    ),
    Case(
        "tensors-1000", "1,000 small tensors in one message", "Shared memory", shared.run_tensors,
        ("fdshare", "torch.multiprocessing"), "torch.multiprocessing",
    ),
    Case(
        "tensor-shared", "shared tensor of 64 MiB", "Shared memory", shared.run_tensor,
        ("fdshare", "torch.multiprocessing"), "torch.multiprocessing",
    ),
    *(
        Case(
            f"queue-{sides}", f"queue, small item, {sides} to {sides}", "Queues", partial(queues.run_items, sides=sides),
            ("fdshare", MP, "bare Python"), MP, Target("faster", 4),
        )
        for sides in (1, 4)
    ),
    Case(
        "queue-answer", "queue, small item there, one back", "Queues", queues.run_answers,
        ("fdshare", MP, "bare Python"), MP,
    ),
    Case("queue-socket", "queue of sockets", "Queues", queues.run_sockets, ("fdshare", MP), MP),
    Case("queue-array", "queue of arrays of 1 MiB", "Queues", queues.run_arrays, ("fdshare", MP), MP),
    *(
        Case(
            name.lower(), f"{name}, nobody else wants it", "Locks and events", partial(sync.run_free, name=name),
            ("fdshare", MP), MP,
        )
        for name in ("Lock", "Semaphore")
    ),
    Case("lock-4", "Lock, 4 processes want it", "Locks and events", sync.run_contended, ("fdshare", MP), MP),
    Case("event", "Event there, and one back", "Locks and events", sync.run_event, ("fdshare", MP), MP),
    Case("process", "whether a process runs", "Locks and events", sync.run_alive, ("fdshare", MP), MP),
    *(
        Case(
            f"wait-{count}", f"wait, 1 of {count:,} channels ready", "Waiting", partial(waiting.run_wait, count=count),
            ("fdshare", MP, "selectors"), MP,
        )
        for count in (10, 100, 1000, 10000)
    ),
    Case(
        "aio-echo", "small message, round trip between event loops", "Event loops", aio.run_round_trip,
        aio.PEERS, "asyncio streams",
    ),
    Case(
        "aio-flow", "small message, one way between event loops", "Event loops", aio.run_one_way,
        aio.PEERS, "asyncio streams",
    ),
    Case(
        "connect", "connect to first message", "Named endpoints", connecting.run_connect,
        ("fdshare", MP, f"{MP} without key", "bare Python"), MP, Target("faster", 3),
    ),
    Case(
        "connections-1000", "one of 1,000 connections that stay", "Named endpoints",
        partial(connecting.run_held, count=1000), ("fdshare", MP, f"{MP} without key", "bare Python"), MP,
        Target("micros", 1000),
    ),
    Case(
        "pool-tasks", "task of map, 2 workers", "Process pools", pools.run_tasks, POOL_PEERS, STANDARD_POOL,
        Target("faster", 4),
    ),
    Case(
        "pool-latency", "submit to result", "Process pools", pools.run_latency, POOL_PEERS, STANDARD_POOL,
        Target("faster", 5),
    ),
    Case(
        "pool-argument", "array of 16 MiB as argument", "Process pools",
        partial(pools.run_argument, size=16 * MIB), POOL_PEERS, STANDARD_POOL, Target("faster", 4),
    ),
    Case(
        "pool-result", "array of 16 MiB as result", "Process pools",
        partial(pools.run_result, size=16 * MIB), POOL_PEERS, STANDARD_POOL, Target("faster", 4),
    ),
    Case(
        "pool-socket", "socket as argument", "Process pools", pools.run_socket,
        ("fdshare", STANDARD_POOL, "multiprocessing.Pool"), STANDARD_POOL,
    ),
    *(
        Case(
            f"pool-start-{workers}", f"constructor to first result, workers: {workers}", "Process pools",
            partial(pools.run_start, workers=workers), POOL_PEERS, STANDARD_POOL,
        )
        for workers in (1, 4, 16)
    ),
    Case(
        "pool-idle", "processor time of an idle pool, a second", "Process pools", pools.run_idle, POOL_PEERS,
        STANDARD_POOL, Target("micros", 1),
    ),
    Case(
        "server-rate", "HTTP connection, 4 workers", "Servers", servers.run_rate, SERVER_PEERS, "SO_REUSEPORT",
    ),
    *(
        Case(
            f"server-slow-p{percentile}", f"the same, 1 worker slow (5 ms), percentile {percentile}", "Servers",
            partial(servers.run_slow, percentile=percentile), SERVER_PEERS, "SO_REUSEPORT",
        )
        for percentile in (50, 99)
    ),
    Case(
        "import", "import (against multiprocessing, attrs)", "Import", importing.run_import,
        ("fdshare", "multiprocessing + attrs"), "multiprocessing + attrs", Target("share", 1.3),
    ),
)  # fmt: skip


def select(names: Iterable[str], *, quick: bool) -> list[Case]:
    """Return the cases whose name contains one of ``names`` (all where there are none), without heavy ones if ``quick``.

    Raises:
        ValueError: a name matches nothing.
    """
    wanted = list(names)
    for name in wanted:
        if not any(name in case.name for case in CASES):
            raise ValueError(
                f"no benchmark is called {name!r}; there are: {', '.join(case.name for case in CASES)}"
            )
    return [
        case
        for case in CASES
        if (not wanted or any(name in case.name for name in wanted)) and not (quick and case.heavy)
    ]
