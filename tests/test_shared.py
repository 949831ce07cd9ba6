"""SharedMemory: every holder sees the same, its size stays, sealed it stays as it is, and nothing is left of it."""

from __future__ import annotations

import array
import copy
import errno
import fcntl
import gc
import io
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    METHODS,
    bare_pair,
    capture,
    close_pieces,
    requires_memfd,
    requires_proc,
    requires_seqpacket,
    running,
    wait_until,
)
from test_interrupts import Interrupter, expect_drops
from test_limits import NoRoom

import fdshare
from fdshare import (
    Channel,
    ClosedError,
    DecodeError,
    FdHandle,
    FdLimitError,
    NoSpaceError,
    NotSendableError,
    SealError,
    SharedMemory,
    memory,
    system,
)
from fdshare.codec import Incoming, PickleCodec
from fdshare.handle import Handles
from fdshare.rights import open_numbers
from fdshare.shared import allocation, mapping
from fdshare.shared.memory import rebuild_memory
from fdshare.shared.references import open_window, rebuild_mapping
from fdshare.testing import Child, checked_child

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(params=["memfd", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where shared memory lives; a forked child finds it as here."""
    if request.param == "memfd" and not system.HAVE_MEMFD:
        pytest.skip("needs memory files")
    monkeypatch.setattr(memory, "HAVE_MEMFD", request.param == "memfd")
    return str(request.param)


def descriptors() -> int:
    return len(open_numbers())


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count(allocation.NAME)


def live_mappings() -> int:
    """How many mappings the tables know that are there."""
    tables = [entry() for _, entry in mapping._by_address.values()] + [
        entry() for entry in mapping._by_file.values()
    ]
    return sum(found is not None for found in tables)


# what it is


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MIB + 1])
def test_new_memory_is_zero_and_writable(kind: str, size: int) -> None:
    with SharedMemory(size) as shared:
        assert (shared.size, len(shared.buf), shared.buf.nbytes) == (size, size, size)
        assert bytes(shared.buf) == bytes(size)
        assert not shared.buf.readonly
        shared.buf[:] = b"x" * size
        assert bytes(shared.buf) == b"x" * size


@pytest.mark.parametrize("size", [-1, -(1 << 70)])
def test_negative_size(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        SharedMemory(size)


@pytest.mark.parametrize("size", [1.5, "1", None])
def test_size_that_is_no_number(size: Any) -> None:
    with pytest.raises(TypeError):
        SharedMemory(size)


@pytest.mark.parametrize(
    ("source", "content"),
    [
        (b"", b""),
        (b"hello", b"hello"),
        (bytearray(b"hello"), b"hello"),
        (memoryview(b"hello")[::2], b"hlo"),
        (memoryview(b""), b""),
        (array.array("H", [1, 2]), array.array("H", [1, 2]).tobytes()),
        (bytes(range(256)) * 20_000, bytes(range(256)) * 20_000),
    ],
    ids=["empty", "bytes", "bytearray", "strided", "empty_view", "numbers", "large"],
)
def test_from_buffer_is_a_copy(kind: str, source: Any, content: bytes) -> None:
    source = copy.copy(source) if isinstance(source, bytearray) else source
    shared = SharedMemory.from_buffer(source)
    assert bytes(shared.buf) == content
    assert shared.size == len(content)
    if isinstance(source, bytearray):
        source[:] = b"other"
        assert bytes(shared.buf) == content


@pytest.mark.parametrize("source", [5, "text", [b"x"], None])
def test_from_something_without_a_buffer(source: Any) -> None:
    with pytest.raises(TypeError):
        SharedMemory.from_buffer(source)


@requires_memfd
def test_repr_shows_size_and_state() -> None:
    shared = SharedMemory(10)
    assert repr(shared) == f"<SharedMemory 10 bytes fd={shared.fileno()}>"
    shared.seal()
    assert repr(shared).endswith(" sealed>")
    shared.close()
    assert repr(shared) == "<SharedMemory 10 bytes closed>"


def test_it_is_one_descriptor(kind: str) -> None:
    before = descriptors()
    many = [SharedMemory(100) for _ in range(10)]
    assert descriptors() == before + 10
    assert stat.S_ISREG(os.fstat(many[0].fileno()).st_mode)
    assert not os.get_inheritable(many[0].fileno())
    del many
    assert descriptors() == before


def test_its_descriptor_can_be_mapped_by_others() -> None:
    shared = SharedMemory(100)
    with mmap.mmap(shared.fileno(), 100) as other:
        other[:5] = b"hello"
    assert bytes(shared.buf[:5]) == b"hello"


def test_file_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(memory, "HAVE_MEMFD", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = SharedMemory(100)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(shared.fileno()).st_nlink == 0
    assert os.fstat(shared.fileno()).st_mode & 0o777 == 0o600


# every holder sees the same


def test_holders_see_each_others_writes(kind: str, pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    first = SharedMemory(1000)
    a.send({"memory": [first]})
    (second,) = b.recv()["memory"]
    assert (type(second), second.size) == (SharedMemory, 1000)
    second.buf[10] = 7
    assert first.buf[10] == 7
    first.close()
    assert second.buf[10] == 7
    assert not second.closed


def _add_one(channel: Channel, shared: SharedMemory) -> None:
    with channel:
        for word in channel:
            shared.buf[0] += 1
            later = channel.recv()
            later.buf[0] += 10
            channel.send(word)


@pytest.mark.parametrize("method", METHODS)
def test_process_argument_and_message(method: str) -> None:
    a, b = fdshare.Pipe()
    shared, later = SharedMemory(10), SharedMemory.from_buffer(b"1234")
    with a, Child(_add_one, b, shared, method=method, unwanted=(a,)) as child:
        b.close()
        for turn in range(3):
            a.send(turn)
            a.send(later)
            assert a.recv(timeout=30) == turn
            assert shared.buf[0] == turn + 1
            assert later.buf[0] == ord("1") + 10 * (turn + 1)
        a.close()
        child.result(30)


def _fill(shared: SharedMemory, value: int) -> SharedMemory:
    shared.buf[:] = bytes([value]) * shared.size
    result = SharedMemory(8)
    result.buf[:] = b"a result"
    return result


def test_pool_argument_and_result() -> None:
    shared = SharedMemory(10)
    with fdshare.ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        result = pool.submit(_fill, shared, 9).result(30)
    assert bytes(shared.buf) == b"\x09" * 10
    assert bytes(result.buf) == b"a result"


def test_stock_pool_argument_and_result() -> None:
    """Any pickler takes it, by the broker."""
    shared = SharedMemory(10)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(_fill, (shared, 9))
        pool.close()
        pool.join()
    assert bytes(shared.buf) == b"\x09" * 10
    assert bytes(result.buf) == b"a result"


def test_copy_is_another_holder() -> None:
    shared = SharedMemory(10)
    for other in (copy.copy(shared), copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        other.buf[0] += 1
        assert other is not shared
        other.close()
    assert shared.buf[0] == 3


def test_forked_child_holds_it_too(kind: str) -> None:
    shared = SharedMemory(10)
    pid = os.fork()
    if not pid:
        shared.buf[0] = 5
        os._exit(0)
    os.waitpid(pid, 0)
    assert shared.buf[0] == 5


@requires_seqpacket
def test_occurring_twice_it_is_one_object_and_one_descriptor() -> None:
    shared = SharedMemory(10)
    with bare_pair("seqpacket") as (channel, bare):
        channel.send([shared, shared, {"again": shared}])
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        close_pieces(pieces)
    a, b = fdshare.Pipe()
    with a, b:
        a.send([shared, shared])
        first, second = b.recv()
        assert first is second


def test_what_comes_again_or_comes_back_is_mapped_once(kind: str, pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    shared = SharedMemory(10)
    before = descriptors(), mappings()
    held = []
    for _ in range(5):
        a.send(shared)
        held.append(b.recv())
        b.send(held[-1])
        held.append(a.recv())
    assert (descriptors(), mappings()) == before
    shared.close()
    held[0].buf[3] = 1
    assert all(other.buf[3] == 1 for other in held)


def test_moved_memory_is_closed_here(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    shared = SharedMemory(10)
    a.send(fdshare.move(shared))
    assert shared.closed
    b.recv().buf[0] = 1


def test_threads_that_receive_and_drop_the_same_memory() -> None:
    """The tables of mappings stay right, however a mapping's end and its return fall together."""
    shared = SharedMemory(64)
    stop = threading.Event()

    def exchange(place: int) -> Callable[[], None]:
        def run() -> None:
            a, b = fdshare.Pipe()
            with a, b:
                for number in range(300):
                    a.send([shared, SharedMemory(number)])
                    again, own = b.recv()
                    again.buf[place] = number % 251
                    assert shared.buf[place] == number % 251
                    assert len(own.buf) == number
            stop.set()

        return run

    with running(*(exchange(place) for place in range(4))):
        stop.wait(30)
    shared.close()
    assert live_mappings() == 0


def test_tables_do_not_grow() -> None:
    kept = [SharedMemory(10) for _ in range(100)]
    for _ in range(2000):
        SharedMemory(10)
    assert len(mapping._by_file) < 500
    assert len(mapping._by_address) < 500
    assert live_mappings() >= 200
    assert len(kept) == 100


# its size stays


def test_size_is_sealed_from_the_start() -> None:
    shared = SharedMemory(5000)
    for size in (0, 4999, 5001):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fileno(), size)
    with pytest.raises(PermissionError):
        os.pwrite(shared.fileno(), b"beyond", 5000)
    assert not fcntl.fcntl(shared.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE


# sealing


@requires_memfd
def test_sealed_memory_is_read_only_and_stays_so() -> None:
    shared = SharedMemory(5000)
    shared.buf[:5] = b"hello"
    assert not shared.sealed
    shared.seal()
    shared.seal()
    assert shared.sealed
    assert shared.buf.readonly
    assert bytes(shared.buf[:5]) == b"hello"
    with pytest.raises(TypeError):
        shared.buf[0] = 1
    with pytest.raises(PermissionError):
        os.pwrite(shared.fileno(), b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(shared.fileno(), 5000)
    with pytest.raises(PermissionError):
        fcntl.fcntl(shared.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(shared.fileno(), 0)


@requires_memfd
def test_sealed_memory_is_read_only_for_receivers(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    shared = SharedMemory.from_buffer(b"for strangers")
    shared.seal()
    a.send(shared)
    received = b.recv()
    assert received.sealed
    assert received.buf.readonly


def _is_read_only(shared: SharedMemory) -> tuple[bool, bool, bytes]:
    return shared.sealed, shared.buf.readonly, bytes(shared.buf)


@requires_memfd
def test_sealed_memory_is_read_only_in_another_process() -> None:
    shared = SharedMemory.from_buffer(b"for strangers")
    shared.seal()
    with Child(_is_read_only, shared) as child:
        assert child.result(30) == (True, True, b"for strangers")


@pytest.mark.parametrize("look", [lambda buf: buf, lambda buf: buf[2:3], lambda buf: memoryview(buf)])
def test_views_keep_it_from_being_sealed(look: Any) -> None:
    shared = SharedMemory(10)
    view = look(shared.buf)
    with pytest.raises(SealError, match="view") as caught:
        shared.seal()
    assert caught.value.errno == errno.EBUSY
    assert isinstance(caught.value, BufferError)
    view[0] = 1
    assert not shared.sealed
    assert not shared.buf.readonly
    view.release()
    shared.seal()


@requires_memfd
def test_an_array_that_numpy_made_keeps_it_from_being_sealed() -> None:
    """``numpy.ndarray(buffer=...)`` exports nothing of what it looks into."""
    numpy = pytest.importorskip("numpy")
    shared = SharedMemory(10)
    for make in (lambda: numpy.ndarray((10,), "u1", shared.buf), lambda: numpy.frombuffer(shared.buf, "u1")):
        made = make()
        with pytest.raises(SealError):
            shared.seal()
        made[0] = 1
        del made
    shared.seal()


def _hold(channel: Channel) -> None:
    with channel:
        shared = channel.recv()
        channel.send(shared.size)
        channel.recv()
        shared.close()
        channel.send("let go")
        channel.recv()


def test_another_process_keeps_it_from_being_sealed() -> None:
    shared = SharedMemory(10)
    a, b = fdshare.Pipe()
    with a, Child(_hold, b, method="spawn", unwanted=(a,)) as child:
        b.close()
        a.send(shared)
        a.recv(timeout=30)
        with pytest.raises(SealError, match="elsewhere") as caught:
            shared.seal()
        assert caught.value.errno == errno.EBUSY
        assert not shared.sealed
        shared.buf[0] = 1
        a.send("let go")
        assert a.recv(timeout=30) == "let go"
        shared.seal()
        a.send("end")
        child.result(30)
    assert shared.buf[0] == 1


@requires_memfd
def test_memory_in_a_message_can_be_sealed() -> None:
    shared = SharedMemory(10)
    a, b = fdshare.Pipe()
    with a, b:
        a.send(shared)
        shared.seal()
        assert b.recv().buf.readonly


@requires_memfd
def test_other_holders_here_see_that_it_was_sealed(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    shared = SharedMemory(10)
    a.send(shared)
    other = b.recv()
    view = other.buf
    with pytest.raises(SealError):
        shared.seal()
    view.release()
    shared.seal()
    assert other.sealed
    assert other.buf.readonly
    a.send([shared, other])
    assert all(holder.buf.readonly for holder in b.recv())
    before = descriptors()
    shared.close()
    assert descriptors() == before
    other.close()
    assert descriptors() == before - 1


def test_system_without_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HAVE_MEMFD", False)
    shared = SharedMemory(10)
    with pytest.raises(SealError) as caught:
        shared.seal()
    assert caught.value.errno == errno.ENOTSUP
    assert not shared.sealed
    shared.buf[0] = 1


@requires_memfd
def test_memory_whose_holder_forbade_new_writers() -> None:
    """F_SEAL_FUTURE_WRITE: what is mapped stays writable, what comes is not."""
    fd = os.memfd_create("own", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 10)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | 0x10)
    received = decode(rebuild_memory, Lent(stat.S_IFREG), 10, handles=[fd])
    assert received.buf.readonly
    assert not received.sealed


@requires_proc
def test_memory_whose_descriptor_cannot_write() -> None:
    shared = SharedMemory.from_buffer(b"0123456789")
    path = f"/proc/self/fd/{shared.fileno()}"
    fd = os.open(path, os.O_RDONLY)
    shared.close()
    received = decode(rebuild_memory, Lent(stat.S_IFREG), 10, handles=[fd])
    assert bytes(received.buf) == b"0123456789"
    assert received.buf.readonly


# descriptors that come without pickle


@requires_memfd
def test_from_handle_by_bare_descriptors() -> None:
    shared = SharedMemory.from_buffer(b"for strangers")
    shared.seal()
    ours, theirs = socket.socketpair()
    with ours, theirs, FdHandle.dup(shared) as handle:
        fdshare.send_fds(ours, [b"memory"], [handle])
        _, (received,) = fdshare.recv_fds(theirs, 10, 1)
        other = SharedMemory.from_handle(received, sealed=True)
        assert received.closed
        shared.close()
        assert bytes(other.buf) == b"for strangers"
        assert other.sealed


@requires_proc
def test_from_handle_maps_what_was_not_known() -> None:
    before = descriptors(), mappings()
    shared = SharedMemory.from_handle(FdHandle(memory_file(5000, seals=fcntl.F_SEAL_SHRINK)))
    shared.buf[4999] = 1
    assert (shared.size, shared.sealed) == (5000, False)
    shared.close()
    assert (descriptors(), mappings()) == before


@requires_memfd
@pytest.mark.parametrize(
    ("make", "sealed", "reason"),
    [
        (lambda: memory_file(10), False, "shrinking"),
        (lambda: memory_file(10, seals=fcntl.F_SEAL_WRITE), True, "not sealed"),
        (lambda: memory_file(10, seals=fcntl.F_SEAL_SHRINK), True, "not sealed"),
        (lambda: memory_file(0, seals=0xF), True, "empty"),
        (lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), True, "not sealed"),
    ],
)
def test_from_handle_refuses_what_could_hurt(make: Callable[[], int], sealed: bool, reason: str) -> None:
    with FdHandle(make()) as handle:
        with pytest.raises(DecodeError, match=reason):
            SharedMemory.from_handle(handle, sealed=sealed)
        os.fstat(handle.fileno())
    with pytest.raises(ClosedError):
        SharedMemory.from_handle(handle)


# closing


def test_closed_memory(kind: str) -> None:
    before = descriptors()
    shared = SharedMemory(10)
    shared.close()
    shared.close()
    assert shared.closed
    assert shared.size == 10
    assert descriptors() == before
    for use in (lambda: shared.buf, shared.seal, shared.fileno, lambda: shared.sealed):
        with pytest.raises(ClosedError):
            use()
    a, b = fdshare.Pipe()
    with a, b, pytest.raises(NotSendableError, match="closed"):
        a.send([shared])


@requires_proc
def test_views_outlive_their_holder(kind: str) -> None:
    before = descriptors(), mappings()
    with SharedMemory(5000) as shared:
        view = shared.buf[1000:2000]
    view[:] = b"x" * 1000
    assert view.tobytes() == b"x" * 1000
    assert (descriptors(), mappings()) == (before[0] + 1, before[1] + (kind == "memfd"))
    del view
    assert (descriptors(), mappings()) == before


@requires_proc
def test_dropped_without_close(recwarn: pytest.WarningsRecorder) -> None:
    before = descriptors(), mappings()
    SharedMemory(10)
    assert (descriptors(), mappings()) == before
    assert not recwarn.list


# no space


def _without_space(kind: str) -> None:
    memory.HAVE_MEMFD = kind == "memfd"
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
    before = descriptors()
    makers: list[Callable[[], object]] = [
        lambda: SharedMemory(MIB + 1),
        lambda: SharedMemory.from_buffer(bytes(MIB + 1)),
    ]
    for make in makers:
        with pytest.raises(NoSpaceError) as caught:
            make()
        assert caught.value.errno == errno.EFBIG
        del caught
    assert descriptors() == before
    assert len(SharedMemory(MIB).buf) == MIB


def test_no_space_by_file_size_limit(kind: str) -> None:
    checked_child(_without_space, kind, method="fork")


@pytest.mark.parametrize("size", [1 << 45, 1 << 60, 1 << 63, 1 << 80])
def test_no_space_for_more_than_the_machine_has(size: int) -> None:
    """The kernel would kill somebody rather than refuse."""
    with pytest.raises(NoSpaceError, match=str(size)):
        SharedMemory(size)


def _without_address_space() -> None:
    limit = 1 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with pytest.raises(NoSpaceError) as caught:
        SharedMemory(limit)
    assert caught.value.errno == errno.ENOMEM


def test_no_space_in_the_address_space() -> None:
    checked_child(_without_address_space, method="fork")


def _without_descriptors() -> None:
    taken = [os.dup(0) for _ in range(20)]
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, soft[1]))
    try:
        with pytest.raises(FdLimitError):
            while True:
                taken.append(SharedMemory(1))  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
        for fd in taken:
            if isinstance(fd, int):
                os.close(fd)


def test_no_descriptor_left() -> None:
    checked_child(_without_descriptors, method="fork")


def test_group_limits_are_read() -> None:
    assert allocation._group_limit() > 0
    assert allocation._left_on_machine() > 0


def test_what_no_disk_holds_is_refused_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory files and posix_fallocate, as on macOS, room is made by writing zeros."""
    monkeypatch.setattr(memory, "HAVE_MEMFD", False)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with pytest.raises(NoSpaceError, match="bytes on the disk are left") as caught:
        SharedMemory(1 << 60)
    assert caught.value.errno == errno.ENOSPC


def test_without_proc_the_whole_machine_is_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(allocation, "open", refuse, raising=False)
    assert 0 < allocation._left_on_machine() == allocation._whole_machine() < 1 << 60


def test_zeros_are_written_where_nothing_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    shared = SharedMemory(3 * MIB + 5)
    assert os.fstat(shared.fileno()).st_blocks * 512 >= 3 * MIB + 5
    assert bytes(shared.buf) == bytes(3 * MIB + 5)


def test_all_of_it_is_there() -> None:
    shared = SharedMemory(3 * MIB + 5)
    assert os.fstat(shared.fileno()).st_blocks * 512 >= 3 * MIB + 5


# what is left of it


def _hold_until_killed(channel: Channel, shared: SharedMemory | None) -> None:
    if shared is None:
        shared = SharedMemory(MIB)
        shared.buf[:4] = b"mine"
        channel.send(shared)
    channel.send(os.fstat(shared.fileno()).st_ino)
    channel.recv(timeout=60)


def holders(inode: int) -> list[str]:
    """Processes that have the memory file open, or mapped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.stat(link).st_ino for link in (process / "fd").iterdir() if memfd(link)]
            if inode in files or f" {inode} " in (process / "maps").read_text().replace("/memfd", " /memfd"):
                found.append(process.name)
        except OSError:
            pass  # it ended
    return found


def memfd(link: Path) -> bool:
    try:
        return os.readlink(link).startswith(f"/memfd:{allocation.NAME}")
    except OSError:
        return False


def test_memory_lives_on_when_its_maker_is_killed_and_goes_with_the_last_holder() -> None:
    a, b = fdshare.Pipe()
    with a:
        maker = multiprocessing.get_context("fork").Process(target=_hold_until_killed, args=(b, None))
        maker.start()
        shared = a.recv(timeout=30)
        inode = a.recv(timeout=30)
        other = multiprocessing.get_context("spawn").Process(target=_hold_until_killed, args=(b, shared))
        other.start()
        b.close()
        assert a.recv(timeout=30) == inode
        assert (
            holders(inode) == sorted(map(str, (os.getpid(), maker.pid, other.pid)), key=str)
            or len(holders(inode)) == 3
        )
        os.kill(maker.pid, signal.SIGKILL)
        maker.join()
        assert bytes(shared.buf[:4]) == b"mine"
        shared.close()
        assert holders(inode) == [str(other.pid)]
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        wait_until(lambda: holders(inode) == [])
        maker.close()
        other.close()


# interrupts and limits


def _interrupted(seed: int) -> int:
    expect_drops()
    interrupt = Interrupter(120e-6, seed)
    kept = [SharedMemory(100) for _ in range(3)]
    a, b = fdshare.Pipe()
    with a, b:

        def make() -> None:
            SharedMemory.from_buffer(bytes(5000)).seal()

        def exchange() -> None:
            a.send([kept, SharedMemory(10)])
            b.recv()[0][1].buf[0] = 1

        def seal() -> None:
            kept[2].seal()
            kept[2] = SharedMemory(100)

        for turn in range(600):
            interrupt((make, exchange, seal)[turn % 3])
            while b.poll():
                b.recv()
        interrupt.stop()
        gc.collect()
        a.send(kept)
        again = b.recv()
        for shared, other in zip(kept, again, strict=True):
            if not shared.sealed:
                shared.buf[0] = 5
                assert other.buf[0] == 5
    return interrupt.hits


def test_interrupts_leave_nothing_behind() -> None:
    assert checked_child(_interrupted, 1, method="fork") > 50


def test_receiver_at_its_descriptor_limit() -> None:
    shared = SharedMemory(10)
    a, b = fdshare.Pipe()
    with a, b:
        a.send([shared, Own(shared.buf), Own(shared.buf[5:])])
        shared.close()
        gc.collect()
        with NoRoom(0) as room:
            with pytest.raises(FdLimitError):
                b.recv()
            room.make_room(1)
            first, second, third = b.recv()
        first.buf[5] = 7
        assert (second.memory[5], third.memory[0]) == (7, 7)


# what a receiver refuses


class Lent:
    """Stands for a mapping in a message that is made by hand: descriptor 0."""

    def __init__(self, format: int, index: int = 0) -> None:
        self.arguments = (index, format)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_mapping, self.arguments


class Call:
    """Makes the receiver call a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def decode(function: Any, *arguments: Any, handles: list[int]) -> Any:
    payload = pickle.dumps(Call(function, *arguments))
    return PickleCodec().decode(Incoming(payload, Handles(map(FdHandle, handles))))


def memory_file(size: int, *, seals: int | None = None) -> int:
    fd = os.memfd_create("by hand", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if seals is not None:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: memory_file(10), "not sealed"),
        (lambda: memory_file(10, seals=fcntl.F_SEAL_GROW), "not sealed"),
        (lambda: memory_file(0, seals=fcntl.F_SEAL_SHRINK), "empty"),
        (lambda: memory_file(1 << 62, seals=fcntl.F_SEAL_SHRINK), "no room"),
        (lambda: os.open(__file__, os.O_RDONLY | os.O_CLOEXEC), "not sealed"),
        (lambda: os.pipe2(os.O_CLOEXEC)[0], "not sealed"),
        (lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC), "not sealed"),
    ],
    ids=["unsealed", "can_shrink", "empty", "too_large", "a_file", "a_pipe", "a_device"],
)
def test_receiver_maps_nothing_that_could_hurt(
    make: Callable[[], int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pipe2 = os.pipe2

    def pipe_with_one_end(flags: int) -> tuple[int, int]:
        reader, writer = real_pipe2(flags)
        os.close(writer)
        return reader, -1

    monkeypatch.setattr(os, "pipe2", pipe_with_one_end)
    with pytest.raises(DecodeError, match=reason):
        decode(rebuild_memory, Lent(stat.S_IFREG), 10, handles=[make()])


@requires_memfd
@pytest.mark.parametrize("size", [-1, 11, 1 << 62])
def test_receiver_checks_the_size(size: int) -> None:
    fd = memory_file(10, seals=fcntl.F_SEAL_SHRINK)
    with pytest.raises(DecodeError, match="file of 10"):
        decode(rebuild_memory, Lent(stat.S_IFREG), size, handles=[fd])


@requires_memfd
@pytest.mark.parametrize("index", [-1, 1, 1 << 40])
def test_receiver_checks_the_descriptor(index: int) -> None:
    fd = memory_file(10, seals=fcntl.F_SEAL_SHRINK)
    with pytest.raises(DecodeError, match="descriptor"):
        decode(rebuild_memory, Lent(stat.S_IFREG, index), 10, handles=[fd])


@requires_memfd
@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (0, 11), (8, 3), (11, 0), (0, -1), (1 << 62, 1 << 62)])
def test_receiver_checks_windows(offset: int, size: int) -> None:
    fd = memory_file(10, seals=fcntl.F_SEAL_SHRINK)
    with pytest.raises(DecodeError, match="window"):
        decode(open_window, Lent(stat.S_IFREG), offset, size, False, handles=[fd])


@pytest.mark.parametrize(
    "payload",
    [
        b"\x01",
        b"\x01" + (100).to_bytes(8, "little") + pickle.dumps([]),
        b"\x01" + len(pickle.dumps(5)).to_bytes(8, "little") + pickle.dumps(5) + pickle.dumps("message"),
        b"\x01"
        + len(pickle.dumps([(0, 0, 0)])).to_bytes(8, "little")
        + pickle.dumps([(0, 0, 0)])
        + pickle.dumps(""),
        b"\x01" + bytes(8) + pickle.dumps("message"),
        b"\x01" + b"\xff" * 8,
    ],
)
def test_garbage_in_place_of_windows(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        PickleCodec().decode(Incoming(payload))


def test_failed_message_leaves_memory_that_was_known_alone() -> None:
    shared = SharedMemory(10)
    a, b = fdshare.Pipe()
    with a, b:
        for _ in range(2):
            a.send([shared, Call(int, "no number")])
            with pytest.raises(DecodeError):
                b.recv()
        a.send(shared)
        assert b.recv().buf[0] == 0
        shared.buf[0] = 1
    assert shared.fileno() >= 0


@requires_seqpacket
def test_failed_message_keeps_nothing() -> None:
    shared = SharedMemory(10)
    with bare_pair("seqpacket") as (channel, bare):
        channel.send([shared, Call(int, "no number")])
        shared.close()
        before = descriptors(), mappings()
        with Channel(bare.dup()) as other:
            with pytest.raises(DecodeError) as caught:
                other.recv()
            del caught
        assert (descriptors(), mappings()) == before


# windows: buffers of other objects


class Own:
    """A user's class that lends its memory to pickle."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Own, (pickle.PickleBuffer(self.memory),)


def test_buffers_of_any_class_travel_by_reference(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    shared = SharedMemory(500_000)
    ordinary = Own(bytearray(b"o" * 300_000))
    windows = [Own(shared.buf[start:]) for start in (0, 10, 499_999)]
    a.send([ordinary, windows[0], Own(bytearray(b"small")), windows[1:], Own(shared.buf[7:8].toreadonly())])
    first, whole, small, (tail, last), readonly = b.recv()
    assert bytes(first.memory) == b"o" * 300_000
    assert bytes(small.memory) == b"small"
    shared.buf[10] = 42
    shared.buf[499_999] = 43
    assert (whole.memory[10], tail.memory[0], last.memory[0]) == (42, 42, 43)
    tail.memory[1] = 44
    assert shared.buf[11] == 44
    assert memoryview(readonly.memory).readonly
    first.memory[0] = 1
    assert ordinary.memory[0] == ord("o")


@requires_seqpacket
def test_window_message_is_small() -> None:
    shared = SharedMemory(16 * MIB)
    with bare_pair("seqpacket") as (channel, bare):
        channel.send([Own(shared.buf), Own(shared.buf[5:])])
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        assert sum(len(data) for data, _ in pieces) < KIB
        close_pieces(pieces)


def test_windows_by_way_of_cloudpickle() -> None:
    shared = SharedMemory(10)
    own = Own(shared.buf)
    a, b = fdshare.Pipe()
    with a, b:
        a.send(lambda: own)
        b.recv()().memory[0] = 5
    assert shared.buf[0] == 5


def test_windows_outside_of_channels_are_values() -> None:
    shared = SharedMemory.from_buffer(b"content")
    copied = pickle.loads(pickle.dumps(Own(shared.buf), 5))
    copied.memory[0] = 0
    assert bytes(shared.buf) == b"content"


def test_memory_as_a_file() -> None:
    """Nothing is special about the descriptor."""
    shared = SharedMemory.from_buffer(b"0123456789")
    with io.FileIO(os.dup(shared.fileno())) as file:
        file.seek(0)
        assert file.read() == b"0123456789"
