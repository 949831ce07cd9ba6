"""PyTorch's tensors over Channels and through pools: equal, aliasing kept, by value and shared, one descriptor a message."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import bare_pair, capture, close_pieces
from test_shared import Call, decode, descriptors, mappings, memory_file

import fdshare
from fdshare import Channel, DecodeError, NotSendableError, SharedMemory, handoff
from fdshare.integrations import torch as integration
from fdshare.testing import Child

KIB, MIB = 1 << 10, 1 << 20

pytestmark = [
    # What PyTorch says of its own features.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated).*:UserWarning"),
]


@pytest.fixture
def torch() -> Any:
    """The library, loaded only where a test runs: it takes a second."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed")
    module.set_num_threads(1)  # its threads do not survive a fork
    integration.install()
    return module


@pytest.fixture
def pair() -> Any:
    a, b = fdshare.Pipe()
    with a, b:
        yield a, b


def sent(pair: tuple[Channel, Channel], obj: Any) -> Any:
    a, b = pair
    a.send(obj)
    return b.recv()


def same_memory(one: Any, other: Any) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


# by value

PLAIN: dict[str, Callable[[Any], Any]] = {
    "float": lambda torch: torch.arange(12.0).reshape(3, 4),
    "single": lambda torch: torch.tensor(5),
    "empty": lambda torch: torch.empty(0, 3),
    "bfloat16": lambda torch: torch.arange(5, dtype=torch.bfloat16),
    "float8": lambda torch: torch.ones(5).to(torch.float8_e4m3fn),
    "bool": lambda torch: torch.tensor([True, False]),
    "complex": lambda torch: torch.ones(4, dtype=torch.cfloat) * 1j,
    "conjugate": lambda torch: (torch.ones(4, dtype=torch.cfloat) * 1j).conj(),
    "negative": lambda torch: torch.imag((torch.ones(4, dtype=torch.cfloat) * 1j).conj()),
    "transposed": lambda torch: torch.arange(12.0).reshape(3, 4).T,
    "strided": lambda torch: torch.arange(100.0).reshape(10, 10)[1::2, 3::3],
    "expanded": lambda torch: torch.arange(5.0).expand(3, 5),
    "large": lambda torch: torch.arange(1_000_000),
    "large_strided": lambda torch: torch.arange(1_000_000).reshape(1000, 1000)[:, ::2].T,
    "one_view": lambda torch: torch.arange(1_000_000)[5:10],
    "channels_last": lambda torch: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_tensor_arrives_equal_and_by_value(torch: Any, pair: tuple[Channel, Channel], make: Any) -> None:
    tensor = make(torch)
    received = sent(pair, {"tensor": [tensor]})["tensor"][0]
    assert type(received) is torch.Tensor
    assert (received.dtype, received.shape, received.stride()) == (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
    )
    assert received.storage_offset() == tensor.storage_offset()
    assert (received.is_conj(), received.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    comparable = torch.float32 if tensor.dtype is torch.float8_e4m3fn else tensor.dtype
    assert torch.equal(received.to(comparable), tensor.to(comparable))
    before = tensor.clone()
    received.zero_()
    assert torch.equal(tensor.to(comparable), before.to(comparable))


@pytest.mark.parametrize(
    "make",
    [
        lambda torch: torch.tensor([[0.0, 1], [2, 0]]).to_sparse(),
        lambda torch: torch.tensor([[0.0, 1], [2, 0]]).to_sparse_csr(),
        lambda torch: torch.tensor([[0.0, 1], [2, 0]]).to_sparse_csc(),
    ],
    ids=["coo", "csr", "csc"],
)
def test_sparse_tensors(torch: Any, pair: tuple[Channel, Channel], make: Any) -> None:
    tensor = make(torch)
    received = sent(pair, tensor)
    assert received.layout is tensor.layout
    assert torch.equal(received.to_dense(), tensor.to_dense())


def test_nested_and_quantized_tensors(torch: Any, pair: tuple[Channel, Channel]) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
    first, second = sent(pair, nested).unbind()
    assert (first.tolist(), second.tolist()) == ([1, 1], [0, 0, 0])
    quantized = torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.5, 0, torch.qint8)
    assert sent(pair, quantized).dequantize().tolist() == [0.5, 1.0]


def test_meta_tensor(torch: Any, pair: tuple[Channel, Channel]) -> None:
    received = sent(pair, torch.empty(1 << 40, device="meta"))
    assert (received.device.type, received.shape) == ("meta", (1 << 40,))


def test_storages(torch: Any, pair: tuple[Channel, Channel]) -> None:
    storage = torch.arange(5, dtype=torch.uint8).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.uint8, _internal=True)
    one, other, empty = sent(pair, [storage, typed, torch.UntypedStorage(0)])
    assert one.tolist() == [0, 1, 2, 3, 4]
    assert other.dtype is torch.uint8
    assert other._untyped_storage.data_ptr() == one.data_ptr()
    assert empty.nbytes() == 0


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_views_of_one_storage_stay_that(torch: Any, pair: tuple[Channel, Channel], size: int) -> None:
    whole = torch.arange(float(size))
    other = torch.arange(float(size))
    received, tail, back, apart = sent(pair, [whole, whole[5:], whole.flip(0), other])
    assert same_memory(received, tail)
    assert not same_memory(received, apart)
    received[7] = -1
    assert tail[2] == -1
    assert apart[7] == 7
    assert whole[7] == 7
    assert back[0] == size - 1
    again = sent(pair, whole)
    assert not same_memory(again, received)


def test_gradients(torch: Any, pair: tuple[Channel, Channel]) -> None:
    leaf = torch.ones(3, requires_grad=True)
    received = sent(pair, leaf)
    assert received.requires_grad
    assert received.is_leaf
    (received * 2).sum().backward()
    assert received.grad.tolist() == [2, 2, 2]
    for computed in (leaf * 2, [1, {"x": leaf + 1}]):
        with pytest.raises(NotSendableError, match="detach"):
            pair[0].send(computed)
    assert sent(pair, (leaf * 2).detach()).tolist() == [2, 2, 2]


def test_parameters_and_modules(torch: Any, pair: tuple[Channel, Channel]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    received = sent(pair, parameter)
    assert type(received) is torch.nn.Parameter
    assert not received.requires_grad
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    module[2].weight = module[0].weight
    copy = sent(pair, module)
    assert copy[0].weight is copy[2].weight
    assert copy.state_dict().keys() == module.state_dict().keys()
    state = sent(pair, module.state_dict())
    assert same_memory(state["0.weight"], state["2.weight"])
    for name, tensor in module.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(copy.state_dict()[name], tensor)
    sent(pair, module.load_state_dict)(state)


def test_tensor_with_attributes(torch: Any, pair: tuple[Channel, Channel]) -> None:
    tensor = torch.ones(3)
    tensor.mark = "kept"
    received = sent(pair, tensor)
    assert received.mark == "kept"
    assert received.tolist() == [1, 1, 1]


def test_one_descriptor_however_many_tensors(torch: Any) -> None:
    for tensors in ([torch.ones(10) for _ in range(1000)], [torch.ones(50_000) for _ in range(100)]):
        with bare_pair("seqpacket") as (channel, bare):
            channel.send(tensors)
            pieces = capture(bare)
            assert sum(len(fds) for _, fds in pieces) <= 1
            close_pieces(pieces)


# under a low limit, beside PyTorch's own way


def _many_tensors_by_fdshare(count: int) -> float:
    import torch

    set_limit(256)
    a, b = fdshare.Pipe()
    with a, b:
        a.send([torch.full((4,), float(i)) for i in range(count)])
        received = b.recv(timeout=30)
    return float(sum(tensor[3] for tensor in received))


def _many_tensors_by_torch(count: int) -> str:
    import torch
    import torch.multiprocessing

    set_limit(256)
    a, b = torch.multiprocessing.Pipe()  # type: ignore[attr-defined]  # a re-export
    with a, b:
        try:
            a.send([torch.full((4,), float(i)) for i in range(count)])
        except (OSError, RuntimeError) as error:
            return str(error)
    return "sent"


def set_limit(soft: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_a_thousand_tensors_under_a_limit_of_256_descriptors(torch: Any) -> None:
    with Child(_many_tensors_by_fdshare, 1000, method="fork") as child:
        assert child.result(60) == sum(range(1000))


def test_torch_itself_cannot_send_a_thousand_tensors_under_that_limit(torch: Any) -> None:
    """What is claimed of it; where this fails, the documentation has to change."""
    reader, writer = os.pipe()
    pid = os.fork()  # not a Child, which would find what PyTorch leaks
    if not pid:
        os.write(writer, _many_tensors_by_torch(1000).encode()[:4096])
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        assert os.strerror(errno.EMFILE) in file.read()
    os.waitpid(pid, 0)


# by reference


def _scale(channel: Channel) -> None:
    with channel:
        for tensors in channel:
            for tensor in tensors:
                tensor *= 10
            channel.send("done")


SHARED: dict[str, Callable[[Any], Any]] = {
    "share": lambda torch: fdshare.share(torch.arange(10.0)),
    "share_noncontiguous": lambda torch: fdshare.share(torch.arange(20.0).reshape(10, 2)[:, 1]),
    "share_large": lambda torch: fdshare.share(torch.arange(1_000_000.0)),
    "from_numpy": lambda torch: (
        torch.from_numpy(fdshare.shared_array((4, 5)) + 0 * 1)
        if False
        else torch.from_numpy(fdshare.shared_array((4, 5))).fill_(3)
    ),
    "of_memory": lambda torch: torch.frombuffer(SharedMemory(80).buf, dtype=torch.float64).fill_(3),
    "share_memory_": lambda torch: torch.arange(10.0).share_memory_(),
    "part": lambda torch: fdshare.share(torch.arange(100.0).reshape(10, 10))[::3, 1:4],
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED.keys())
def test_shared_tensor_travels_by_reference(torch: Any, make: Any) -> None:
    tensor = make(torch)
    assert integration.is_shared(tensor)
    expected = tensor * 10
    a, b = fdshare.Pipe()
    with a, Child(_scale, b, method="fork", unwanted=(a,)) as child:
        b.close()
        a.send([tensor])
        assert a.recv(timeout=30) == "done"
        assert torch.equal(tensor, expected)
        a.close()
        child.result(30)


def test_shared_tensor_message_is_small(torch: Any) -> None:
    tensor = fdshare.share(torch.zeros(8 * MIB))
    with bare_pair("seqpacket") as (channel, bare):
        channel.send([tensor, tensor[5:], tensor.view(torch.int32)])
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        assert sum(len(data) for data, _ in pieces) < KIB
        close_pieces(pieces)


def test_share_a_state_dict(torch: Any, pair: tuple[Channel, Channel]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    before = descriptors()
    state = fdshare.share(module.state_dict())
    assert descriptors() == before + 1
    assert all(integration.is_shared(tensor) for tensor in state.values())
    assert not any(integration.is_shared(tensor) for tensor in module.state_dict().values())
    received = sent(pair, state)
    assert descriptors() == before + 1
    received["1.bias"][3] = 77
    assert state["1.bias"][3] == 77
    assert module[1].bias[3] != 77
    shared_module = fdshare.share(module)
    other = sent(pair, shared_module)
    with torch.no_grad():
        other[0].weight[1, 1] = 5
    assert shared_module[0].weight[1, 1] == 5
    assert type(other[0].weight) is torch.nn.Parameter


def test_share_of_what_torch_shares_is_a_copy(torch: Any) -> None:
    tensor = torch.arange(5.0).share_memory_()
    shared = fdshare.share(tensor)
    shared[0] = 9
    assert tensor[0] == 0
    assert not shared.is_shared()
    assert integration.is_shared(shared)


def test_memory_goes_with_its_last_tensor(torch: Any, pair: tuple[Channel, Channel]) -> None:
    before = descriptors(), mappings()
    tensor = fdshare.share(torch.zeros(1000))
    received = sent(pair, tensor[5:])
    del tensor
    gc.collect()
    assert (descriptors(), mappings()) == (before[0] + 1, before[1] + 1)
    received[0] = 1
    del received
    gc.collect()
    assert (descriptors(), mappings()) == before


def test_torch_shared_storages_keep_aliasing_and_leave_nothing(
    torch: Any, pair: tuple[Channel, Channel]
) -> None:
    tensor = torch.zeros(10).share_memory_()
    before = descriptors()
    first, second = sent(pair, [tensor, tensor[2:]])
    assert first.is_shared()
    assert same_memory(first, second)
    first[2] = 7
    assert (tensor[2], second[0]) == (7, 7)
    del first, second
    gc.collect()
    assert descriptors() == before


def test_memory_shared_by_name_is_refused(torch: Any, pair: tuple[Channel, Channel]) -> None:
    """It would silently be other memory from then on."""
    import torch.multiprocessing as torch_multiprocessing

    tensor = torch.zeros(10).share_memory_()
    torch_multiprocessing.set_sharing_strategy("file_system")
    try:
        with pytest.raises(NotSendableError, match="file_descriptor"):
            pair[0].send(tensor)
    finally:
        torch_multiprocessing.set_sharing_strategy("file_descriptor")
    assert sent(pair, tensor).is_shared()


def test_tensor_on_sealed_memory_arrives_as_a_copy(torch: Any, pair: tuple[Channel, Channel]) -> None:
    """A tensor cannot be read-only: a write would be a segmentation fault."""
    shared = SharedMemory.from_buffer(bytes(range(10)))
    shared.seal()
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.frombuffer(shared.buf, dtype=torch.uint8)
    received = sent(pair, tensor)
    received[0] = 9
    assert tensor[0] == 0
    assert received.tolist() == [9, *range(1, 10)]


def test_numpy_view_of_a_shared_tensor(torch: Any, pair: tuple[Channel, Channel]) -> None:
    tensor = fdshare.share(torch.zeros(10))
    sent(pair, tensor.numpy())[3] = 5
    assert tensor[3] == 5


# pools


def _double(tensor: Any) -> Any:
    return tensor * 2


def _fill(tensor: Any, value: float) -> Any:
    tensor.fill_(value)
    return {"twice": (tensor, tensor[1:])}


def _make(size: int) -> Any:
    import torch

    whole = torch.arange(float(size))
    return whole, whole[1:]


def test_pool_takes_and_returns_tensors(torch: Any) -> None:
    context = multiprocessing.get_context("fork")
    with fdshare.ProcessPoolExecutor(1, context, initializer=integration.install) as pool:
        assert pool.submit(_double, torch.arange(3.0)).result(30).tolist() == [0, 2, 4]
        assert torch.equal(
            pool.submit(_double, torch.ones(1_000_000)).result(30), torch.full((1_000_000,), 2.0)
        )
        shared = fdshare.share(torch.zeros(10))
        whole, tail = pool.submit(_fill, shared, 7).result(30)["twice"]
        assert shared.tolist() == [7] * 10
        whole[1] = 8
        assert (tail[0], shared[1]) == (8, 8)
        for size in (10, 100_000):
            whole, tail = pool.submit(_make, size).result(30)
            assert same_memory(whole, tail)


def test_process_that_got_no_tensor_answers_torchs_way_and_what_arrives_installs(torch: Any) -> None:
    a, b = fdshare.Pipe()
    with a, Child(_receive, b, method="spawn", unwanted=(a,)) as child:
        b.close()
        assert a.recv(timeout=60)[1].tolist() == list(range(1, 10))
        a.send(torch.ones(3))
        assert a.recv(timeout=60).tolist() == [2, 2, 2]
        assert child.result(30) == (False, True)


def _receive(channel: Channel) -> tuple[bool, bool]:
    with channel:
        channel.send(_make(10))
        before = integration.installed()
        channel.send(channel.recv() * 2)
    return before, integration.installed()


# what is refused


def test_devices_are_named(torch: Any) -> None:
    device = SimpleNamespace(type="cuda", index=0)
    tensor = SimpleNamespace(requires_grad=False, device=device)
    with pytest.raises(Exception, match=r"tensor\.cpu\(\)"):
        integration.reduce_tensor(tensor, SimpleNamespace())  # type: ignore[arg-type]  # no such device here
    with pytest.raises(Exception, match=r"tensor\.cpu\(\)"):
        integration.reduce_storage(tensor, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "place", [(0, (17,), (1,)), (-1, (4,), (1,)), (15, (2,), (1,)), (0, (4,), (9,)), (0, (1 << 62,), (0,))]
)
def test_receiver_checks_that_a_tensor_stays_inside(torch: Any, place: Any) -> None:
    storage = Call(integration.rebuild_storage, bytearray(16))
    try:
        tensor = decode(integration.rebuild_tensor, storage, torch.uint8, *place, False, handles=[])
    except DecodeError:
        return
    assert tensor.untyped_storage().nbytes() <= 16


@pytest.mark.parametrize("size", [0, -1, 17, 1 << 62])
def test_receiver_checks_the_size_of_a_storage(torch: Any, size: int) -> None:
    fd = memory_file(16)
    with pytest.raises(DecodeError, match="file of 16"):
        decode(integration.rebuild_shared_storage, 0, size, handles=[fd])


def test_receiver_checks_the_descriptor_of_a_storage(torch: Any) -> None:
    with pytest.raises(DecodeError, match="declared"):
        decode(
            integration.rebuild_shared_storage, 0, 5, handles=[os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)]
        )


# around it


def test_other_picklers_are_left_alone(torch: Any) -> None:
    assert not [cls for cls in handoff.carried_types() if cls.__module__.startswith("torch")]


def test_torch_is_loaded_only_by_install() -> None:
    code = (
        "import sys, fdshare, fdshare.integrations.torch as t; print('torch' in sys.modules, t.installed())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert run.stdout.split() == ["False", "False"]


def test_install_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fdshare.integrations.torch import install\n"
        "try: install()\n"
        "except ImportError: print('import error')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert run.stdout.strip() == "import error"
