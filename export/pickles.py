"""Interprets the pickle inside a torch file, opcode by opcode, without running what it says.

A pickle is a program. This code knows how to build tensors, dicts and inert objects and nothing else: there is no call
that it could be talked into.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge.errors import ModelError

Array: TypeAlias = npt.NDArray[np.generic]

_STORAGES: dict[str, np.dtype[np.generic]] = {
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_CALLS = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",  # dict(model.named_parameters())
    "torch.jit._pickle.build_intlist",  # a scripted Conv2d's padding
    "collections.OrderedDict",
}


@dataclass(frozen=True)
class _Global:
    """A name the pickle asked for and may have; it stays a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A whole storage, contiguous. A type of its own: a tensor given as a storage would defeat the bounds check."""

    values: Array  # (count,)


@dataclass
class Module:
    """An object of a class __torch__.*: attributes, no behaviour."""

    attributes: dict[object, object] = field(default_factory=dict)


Opener: TypeAlias = Callable[[np.dtype[np.generic], str, int], Storage]


def unpickled(data: bytes, storage: Opener) -> object:
    """Interprets the opcodes torch writes (protocols 2 to 5); `pickletools.genops` cuts them, and executes nothing.

    Raises ModelError for a global or opcode outside the allowed ones, ValueError, IndexError, KeyError or TypeError
    for a program that makes no sense.
    """
    stack: list[object] = []
    marks: list[list[object]] = []  # the stacks that lie below each open MARK
    memo: dict[int, object] = {}  # a dict: an index in the billions costs one entry, not a table

    def items_since_mark() -> list[object]:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    def popped(count: int) -> list[object]:
        if count > len(stack):
            raise IndexError("the stack is empty")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    argument: Any  # of the type its opcode says
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "TUPLE":
            items = items_since_mark()
            stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(popped(int(name[-1]))))
        elif name in ("SETITEM", "SETITEMS"):
            pairs = popped(2) if name == "SETITEM" else items_since_mark()
            _fill(stack[-1], pairs)
        elif name in ("APPEND", "APPENDS"):
            items = popped(1) if name == "APPEND" else items_since_mark()
            if not isinstance(stack[-1], list):
                raise TypeError("APPEND to what is no list")
            stack[-1].extend(items)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "INST"):
            stack.append(_allowed(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = popped(2)
            stack.append(_allowed(f"{module}.{attribute}" if isinstance(module, str) else repr(type(module))))
        elif name == "NEWOBJ":
            cls, _arguments = popped(2)
            if not (isinstance(cls, _Global) and cls.name.startswith("__torch__.")):
                raise TypeError("NEWOBJ of what is no module class")
            stack.append(Module())
        elif name == "BUILD":
            target, attributes = stack[-2], popped(1)[0]
            if isinstance(target, Module) and isinstance(attributes, dict):
                target.attributes = attributes  # an OrderedDict is built too: its _metadata is no tensor
        elif name == "BINPERSID":
            stack.append(_storage(popped(1)[0], storage))
        elif name == "REDUCE":
            function, arguments = popped(2)
            if not isinstance(function, _Global) or not isinstance(arguments, tuple):
                raise TypeError("REDUCE of what is no function")
            stack.append(_result(function.name, arguments))
        elif name == "STOP":
            break
        else:
            raise ModelError(f"data.pkl uses the opcode {name}", expected="what torch writes for tensors and modules")
    return stack[-1]


_LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _allowed(name: str) -> _Global:
    if name in _CALLS or name in _STORAGES or name.startswith("__torch__."):
        return _Global(name)
    asked = f"data.pkl asks for {name[:100]!r}"
    raise ModelError(asked, expected="tensors and modules only", remedy="do not trust this file")


def _fill(target: object, pairs: list[object]) -> None:
    if not isinstance(target, dict) or len(pairs) % 2:
        raise TypeError("SETITEMS on what is no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, (str, int)):  # nested tuples can take hours to hash
            raise TypeError(f"a dict key of {type(key)}")
        target[key] = value


def _storage(identity: object, storage: Opener) -> Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(count)) if name in _STORAGES:
            return storage(_STORAGES[name], key, count)
    raise ModelError("data.pkl names no storage", expected="('storage', type, key, device, length)")


def _result(function: str, arguments: tuple[object, ...]) -> object:
    match function, arguments:
        case "torch._utils._rebuild_tensor_v2", (Storage(storage), int(offset), tuple(shape), tuple(strides), *_):
            return _view(storage, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (np.ndarray() as tensor, *_):
            return tensor
        case "torch.jit._pickle.build_intlist", (list(items),):
            return items
        case "collections.OrderedDict", ():
            return {}
    raise TypeError(f"{function} with other arguments than torch gives it")


def _view(storage: Array, offset: int, shape: tuple[object, ...], strides: tuple[object, ...]) -> Array:
    """A tensor over its storage (offset and strides in elements), refused unless every element lies inside."""
    numbers = [n for n in (offset, *shape, *strides) if isinstance(n, int) and n >= 0]
    if len(numbers) != 1 + 2 * len(shape) or len(shape) != len(strides) or len(shape) > 8:
        raise ModelError("data.pkl has a malformed tensor")
    sizes, steps = numbers[1 : 1 + len(shape)], numbers[1 + len(shape) :]
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # More elements than the storage has: one number spread over a huge shape, which a copy would make real.
    if 0 in sizes or last >= len(storage) or math.prod(sizes) > len(storage):
        facts = f"offset {offset}, shape {shape}, strides {strides}"[:200]
        raise ModelError("data.pkl has a tensor outside its storage", expected=f"{len(storage)} values", got=facts)
    steps = [step * storage.itemsize if size > 1 else 0 for size, step in zip(sizes, steps, strict=True)]
    return np.lib.stride_tricks.as_strided(storage[offset:], sizes, steps, writeable=False)
