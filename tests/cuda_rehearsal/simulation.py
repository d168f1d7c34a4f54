"""A CUDA device on the CPU build of torch: what a program does with it is noted, nothing is computed.

Tensors on the CPU are real. Tensors on cuda are fake (shape, dtype, device, autograd); those of integers and truth
values carry their contents beside them (up to MAX_CONTENTS), so that code that reads masks and ids goes the way it
would go. Floating-point contents are unknown and read as 0. Noted with the place in the code (`Log`): waits of the host for the device, the
attention kernel of every call, the largest tensors; and counted: bytes alive, their peak, operations. A tensor on the
wrong device raises, as it would on a GPU.

`fake_cuda.load` must have run before torch was imported.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from tests.cuda_rehearsal.attention_kernels import attention_as_on_cuda

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
OWN_FILES = ("tests/cuda_rehearsal/", "/torch/", "contextlib.py", "functools.py", "/peft/tuners/")
# Operations whose result has a shape that only the device knows: the host must wait for it.
DATA_DEPENDENT = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# Masks and ids have fewer numbers; what has more (states of an optimiser in 8 bits) is read by nobody.
MAX_CONTENTS = 2**20
UNINITIALISED = ("empty_like", "new_empty", "new_empty_strided")
OWN_TYPES = {FakeTensor, nn.Parameter, Tensor}


def place() -> str:
    """The nearest file and function outside of torch and of this folder: `align/dpo/trainer.py:compute_loss`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<") and not any(own in name for own in OWN_FILES):
            for root in ("/site-packages/", "/align/", "/reward/", "/tests/", "/scripts/"):
                if root in name:
                    name = name.split(root)[-1] if root == "/site-packages/" else root[1:] + name.split(root)[-1]
                    break
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


@dataclass
class Log:
    """What happened: `waits` by place, `attention` by kernel and shapes, `shapes` of new floating-point tensors
    (with more than a hundred thousand numbers) by operation and place."""

    waits: Counter[str] = field(default_factory=Counter)
    attention: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    shapes: Counter[tuple[Any, ...]] = field(default_factory=Counter)


class Memory:
    """Bytes in living storages on the device, and their peak with what stood there."""

    def __init__(self) -> None:
        self.current = self.peak = 0
        self._sizes: dict[int, tuple[int, str]] = {}
        self._references: dict[int, Any] = {}
        self._holders_at = 0
        self.holders: Counter[str] = Counter()

    def note(self, tensor: Tensor) -> bool:
        """Whether the tensor has a storage of its own, that was not there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = (0, place() if storage.nbytes() > 2**22 else "small")
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))
        self.resize(storage)
        return True

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count a storage with the size that it has now: FSDP2 empties those of gathered weights and fills them again."""
        before, holder = self._sizes.get(storage._cdata, (None, ""))
        if before is None:
            return
        self._sizes[storage._cdata] = (storage.nbytes(), holder)
        self.current += storage.nbytes() - before
        if self.current > self.peak:
            self.peak = self.current
            if self.peak > 1.02 * self._holders_at:
                self._holders_at = self.peak
                self.holders = self._by_holder()

    def reset_peak(self) -> None:
        self.peak, self._holders_at = self.current, 0

    def _gone(self, key: int) -> None:
        self.current -= self._sizes.pop(key, (0, ""))[0]
        self._references.pop(key, None)

    def _by_holder(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for size, holder in self._sizes.values():
            found[holder] += size
        return found


class Simulation(TorchDispatchMode):
    """The mode under which a program runs; `log`, `memory`, `flops` and `operations` are what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.log, self.memory = Log(), Memory()
        # By "forward" (which holds what checkpointing computes again before backward reaches it) and "backward".
        self.flops: Counter[str] = Counter()
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would go through the wrapper of its compiler at every operation, and nothing is compiled

    def reset(self) -> None:
        """Begin to count anew."""
        self.log, self.flops, self.operations = Log(), Counter(), 0
        self.memory.reset_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device  # more than half of all that is dispatched, and no operation of a device
        if any(kind not in OWN_TYPES for kind in types):
            return NotImplemented  # a DTensor comes back with what it holds
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor works out shapes for itself
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        fake = FakeTensor in types
        if func is aten._pin_memory.default:
            return args[0].clone()  # memory that a copy to a device need not wait for
        if not fake and target != "cuda":
            return func(*args, **kwargs)
        self.operations += 1
        if not fake:
            return (
                self._to_device(args[0], kwargs) if func is aten._to_copy.default else self._created(func, args, kwargs)
            )
        if func is aten._to_copy.default and target == "cpu":
            self.wait("to the host")
            real = contents(args[0])
            return real.to(kwargs.get("dtype") or real.dtype).clone()
        if func is aten.copy_.default and args[0].device.type == "cpu" and isinstance(args[1], FakeTensor):
            self.wait("to the host")
            return args[0].copy_(contents(args[1]))
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return contents(args[0]).reshape(-1)[0].item()
        if func is aten.equal.default:
            self.wait("equal")
            return True
        if func in DATA_DEPENDENT:
            return self._data_dependent(func, args, kwargs)
        if func in INDEXING:
            args = (args[0], self._indices(args[1]), *args[2:])
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor) and args[1].ndim:
            args = (args[0], self._to_device(args[1], {}), *args[2:])
        out = self.fakes.dispatch(func, types, args, kwargs)
        self._count(func, args, kwargs, out)
        self._note(func, args, kwargs, out)
        return out

    def wait(self, what: str) -> None:
        self.log.waits[f"{place()} ({what})"] += 1

    def to_list(self, tensor: Any) -> Any:
        """`Tensor.tolist`: one wait, where FakeTensor's own asks for every element."""
        if tensor.device.type == "cuda":
            self.wait("tolist")
        return contents(tensor).tolist()

    def new(self, like: Tensor, real: Tensor | None = None) -> FakeTensor:
        """A tensor on the device in the form of one on the meta device, with contents where they are known."""
        made = FakeTensor(self.fakes, like, CUDA)
        if real is not None and is_plain(real.dtype):
            made._real = real  # type: ignore[attr-defined]
        self.memory.note(made)
        return made

    def _to_device(self, source: Tensor, kwargs: dict[str, Any]) -> FakeTensor:
        dtype = kwargs.get("dtype") or source.dtype
        known = is_plain(dtype) and is_plain(source.dtype)
        form = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device="meta")
        return self.new(form, source.detach().to(dtype).clone() if known else None)

    def _created(self, func: Any, args: Any, kwargs: Any) -> FakeTensor:
        form = func(*args, **{**kwargs, "device": "meta"})
        if form.is_meta and not (is_plain(form.dtype) and form.numel() <= MAX_CONTENTS):
            return self.new(form)
        real = func(*args, **{**kwargs, "device": "cpu"})
        return self.new(torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta"), real)

    def _data_dependent(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.wait(func._schema.name.split("::")[1])
        real_args, real_kwargs = tree_map_only(FakeTensor, contents, (args, kwargs))
        out = func(*real_args, **real_kwargs)
        return tree_map_only(Tensor, lambda t: self.new(torch.empty(t.shape, dtype=t.dtype, device="meta"), t), out)

    def _indices(self, indices: Any) -> list[Any]:
        """Truth values become positions, for which the host waits; indices on the CPU are copied."""
        found: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                self.wait("boolean index")
                positions = contents(index).nonzero(as_tuple=True)
                found += [self.new(torch.empty(p.shape, dtype=p.dtype, device="meta"), p) for p in positions]
            elif isinstance(index, Tensor) and not isinstance(index, FakeTensor):
                found.append(self._to_device(index, {}))
            else:
                found.append(index)
        return found

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            return
        if func._overloadpacket in (aten.mm, aten.addmm):  # whose formula does not know every overload
            left, right = [leaf for leaf in args if isinstance(leaf, Tensor)][-2:]
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            flops = formula(*args, **kwargs, out_val=out)
            if "flash" in func._schema.name and any(leaf is True for leaf in args):
                flops //= 2  # causal: a kernel leaves out what no query sees, which the formula counts
        backward = torch._C._current_graph_task_id() != -1
        self.flops["backward" if backward else "forward"] += flops

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outputs = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        made = [leaf for leaf in outputs if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda"]
        for tensor in made:
            if self.memory.note(tensor) and tensor.numel() > 100_000 and not is_plain(tensor.dtype):
                self.log.shapes[tuple(tensor.shape), str(func), place()] += 1
        if any(is_plain(tensor.dtype) for tensor in made):
            _give_contents(func, args, kwargs, out)


def from_list(make: Any) -> Any:
    """`torch.tensor([scalar on the device, ...])` waits for every scalar, in C++ where no dispatch mode sees it."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        known = data if isinstance(data, Tensor) else tree_map_only(FakeTensor, lambda scalar: scalar.item(), data)
        return make(known, *args, **kwargs)

    return made


def is_plain(dtype: torch.dtype) -> bool:
    """Integers and truth values, whose contents are kept."""
    return not (dtype.is_floating_point or dtype.is_complex)


def contents(tensor: Any) -> Tensor:
    """What the tensor holds, as far as that is known; zeros without storage of their own where it is not."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    real = getattr(tensor, "_real", None)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) if real is None else real


def _give_contents(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Compute integers and truth values for real, where all that they are made of is known."""
    name = func._schema.name.split("::")[1]
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor) and is_plain(leaf.dtype)]
    if any(tensor.numel() > MAX_CONTENTS for tensor in made):
        return
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if name not in UNINITIALISED and all(is_plain(leaf.dtype) for leaf in inputs):
        real_args, real_kwargs = tree_map_only(FakeTensor, contents, (args, kwargs))
        if real_kwargs.get("device") is not None:
            real_kwargs = {**real_kwargs, "device": "cpu"}
        reals = [leaf for leaf in tree_leaves(func(*real_args, **real_kwargs)) if isinstance(leaf, Tensor)]
        for tensor, real in zip([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], reals, strict=True):
            if isinstance(tensor, FakeTensor) and is_plain(tensor.dtype):
                tensor._real = real  # type: ignore[attr-defined]
        return
    for tensor in made:
        # Unknown numbers are finite, equal to other unknown ones and to no given one, and neither greater nor smaller.
        alone = func._overloadname == "Scalar"
        holds = tensor.dtype == torch.bool and (name == "isfinite" or (name == "ne" if alone else name == "eq"))
        tensor._real = torch.tensor(int(holds), dtype=tensor.dtype).expand(tensor.shape).clone()  # type: ignore[attr-defined]


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with parameters replaced: torch would swap their data, which fakes do not allow."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            new = fn(parameter)
        if new is not parameter:
            self._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _address(tensor: Any) -> int:
    """`Tensor.data_ptr`, one per storage: accelerate knows parameters by it when it hands sharded ones to an optimiser."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


@contextmanager
def simulated() -> Iterator[Simulation]:
    """Within the context there is a CUDA device."""
    simulation = Simulation()
    lift, apply, to_list = torch._C._only_lift_cpu_tensors(), nn.Module._apply, FakeTensor.tolist
    data_ptr = FakeTensor.data_ptr
    resize = torch.UntypedStorage.resize_
    from_lists = torch.tensor, torch.as_tensor

    def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        simulation.memory.resize(storage)
        return found

    torch._C._set_only_lift_cpu_tensors(True)
    nn.Module._apply = _apply  # type: ignore[method-assign,assignment]
    FakeTensor.tolist = lambda tensor: simulation.to_list(tensor)  # type: ignore[method-assign]
    FakeTensor.data_ptr = _address  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign]
    torch.tensor, torch.as_tensor = map(from_list, from_lists)
    try:
        with simulation, attention_as_on_cuda(simulation):
            yield simulation
    finally:
        nn.Module._apply, FakeTensor.tolist = apply, to_list  # type: ignore[method-assign]
        FakeTensor.data_ptr = data_ptr  # type: ignore[method-assign]
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        torch.tensor, torch.as_tensor = from_lists
        torch._C._set_only_lift_cpu_tensors(lift)
