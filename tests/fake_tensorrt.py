"""A `tensorrt` of any of seven versions without TensorRT: its members are the real ones, ONNX Runtime does the work.

tests/tensorrt_api.json holds the members of each version's classes, read off the real bindings. A member that a version
does not have raises AttributeError, as does `hasattr`; one that it has and this fake does not: NotImplementedError.
The builder's half is in fake_tensorrt_builder.py, the runtime's in fake_tensorrt_runtime.py.
"""

from __future__ import annotations

import enum
import functools
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

_API = json.loads(Path(__file__).with_name("tensorrt_api.json").read_bytes())
VERSIONS: tuple[str, ...] = tuple(_API["versions"])
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
NUMPY = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT8": "int8", "INT32": "int32"} | {
    "INT64": "int64",
    "BOOL": "bool",
}


@functools.cache
def members(version: str) -> dict[str, frozenset[str]]:
    """Class, or "module", -> its public names in one version; a class that the version does not have is not there."""
    at = VERSIONS.index(version)
    found: dict[str, frozenset[str]] = {}
    for kind, groups in _API.items():
        if kind == "versions":
            continue
        names: set[str] = set()
        for span, words in groups.items():
            first, last = span.split(" - ")
            if VERSIONS.index(first) <= at <= VERSIONS.index(last):
                names |= set(words.split())
        if names:
            found[kind] = frozenset(names)
    return found


@dataclass
class Watch:
    """What a test plants in a fake TensorRT, and what it sees of it."""

    capability: str = "8.7"  # of the GPU: a plan for another is refused
    unsupported: frozenset[str] = frozenset()  # operators that the parser has no importer for
    workspace: int = 0  # bytes that a build needs
    refuse_build: str = ""  # the builder says this and gives no plan
    refuse_context: int | None = None  # the context of this number finds no memory
    refuse: str = ""  # this method of contexts says no, or the class Runtime
    refuse_enqueue: int = 0  # so many of the next runs are refused
    on_host: frozenset[str] = frozenset()  # tensors that the engine wants in host memory
    answer_shape: dict[str, tuple[int, ...]] = field(default_factory=dict)  # get_tensor_shape of these lies
    compute: Callable[[bytes], bytes] = bytes  # the ONNX graph that an engine runs in place of its own

    events: list[str] = field(default_factory=list)  # "+runtime", "+context 0", "-context 0", … in order
    runs: list[tuple[int, dict[str, tuple[int, ...]], dict[str, int]]] = field(default_factory=list)
    # each enqueue: profile, shape of each input, address of each tensor
    builds: list[dict[str, Any]] = field(default_factory=list)  # the header of each plan that was built
    mistakes: list[str] = field(default_factory=list)  # things let go while something still stood on them


class _GatedType(type):
    def __getattribute__(cls, name: str) -> Any:
        if not name.startswith("_") and (home := type.__getattribute__(cls, "_home")):
            home._check(cls.__name__, name, {name for base in cls.__mro__ for name in vars(base)})
        return super().__getattribute__(name)


class Gated(metaclass=_GatedType):
    """An object of TensorRT: only the members that its version has can be read, and only its properties be set."""

    _home: ClassVar[Any] = None

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            getattr(type(self), name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            getattr(type(self), name)
        super().__setattr__(name, value)


class _EnumType(enum.EnumMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in cls._member_map_:  # before Python 3.12 members are found here
            return cls._member_map_[name]
        raise AttributeError(f"{cls.__module__} has no {cls.__name__}.{name}")


class _Number(enum.Enum, metaclass=_EnumType):
    """As pybind11's enums are: a number on demand, and no `1 << flag`."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class ILogger:
    """Made for subclasses that have `log`; theirs must call this __init__, or pybind11 refuses the object."""

    Severity: ClassVar[Any]
    INTERNAL_ERROR: ClassVar[Any]
    ERROR: ClassVar[Any]
    WARNING: ClassVar[Any]
    INFO: ClassVar[Any]
    VERBOSE: ClassVar[Any]

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    """TensorRT's own, which prints."""

    def __init__(self, min_severity: Any = None) -> None:
        super().__init__()
        self.min_severity = min_severity or self.WARNING

    def log(self, severity: Any, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            print(f"[TRT] {msg}")


class IProgressMonitor:
    """Made for subclasses that have the three methods."""

    def __init__(self) -> None:
        self._made = True


class FakeTensorrt:
    """What `import tensorrt` gives in one version."""

    def __init__(self, version: str, watch: Watch) -> None:
        from tests import fake_tensorrt_builder as builder
        from tests import fake_tensorrt_runtime as runtime

        self.__version__, self._watch, self._members = version, watch, members(version)
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()  # builders and runtimes that live
        self._logger: Any = None
        classes: dict[str, type] = {}
        for kind in self._members:
            if {"name", "value"} <= self._members[kind] and kind not in ("ITensor", "ILayer"):
                names = sorted(self._members[kind] - {"name", "value", "itemsize"})
                classes[kind] = _Number(kind, names, module=f"TensorRT {version}", start=0)  # type: ignore[call-overload]
            elif kind != "module" and (base := vars(builder).get(kind) or vars(runtime).get(kind)):
                classes[kind] = _GatedType(kind, (base,), {"_home": self})
        levels = _Number("Severity", list(SEVERITIES), module=f"TensorRT {version}", start=0)  # type: ignore[call-overload]
        shown = {"Severity": levels, **{name: levels[name] for name in SEVERITIES}}
        classes["ILogger"] = type("ILogger", (ILogger,), shown)
        classes["Logger"] = type("Logger", (Logger, classes["ILogger"]), {})
        classes["IProgressMonitor"] = type("IProgressMonitor", (IProgressMonitor,), {})
        self._classes = SimpleNamespace(**classes)
        for name in self._members["module"] & set(classes):
            setattr(self, name, classes[name])

    def __getattr__(self, name: str) -> Any:
        if name in self._members["module"]:
            raise NotImplementedError(f"the fake TensorRT has no {name}")
        raise AttributeError(f"TensorRT {self.__version__} has no {name}")

    def _check(self, kind: str, name: str, made: set[str]) -> None:
        if name not in self._members[kind]:
            raise AttributeError(f"TensorRT {self.__version__} has no {kind}.{name}")
        if name not in made:
            raise NotImplementedError(f"the fake TensorRT has no {kind}.{name}")

    def _register(self, user: object, logger: Any) -> None:
        """As TensorRT does: while a builder or runtime lives, its logger hears everything, and others nothing."""
        if not isinstance(logger, self._classes.ILogger) or not getattr(logger, "_made", False):
            raise TypeError(
                f"__init__(): incompatible constructor arguments: {logger!r}, or its __init__ was not called"
            )
        if not self._users:
            self._logger = logger
        elif logger is not self._logger:
            self._log("WARNING", "The logger passed in differs from one already registered, and is ignored")
        self._users.add(user)

    def _log(self, severity: str, text: str) -> None:
        self._logger.log(self._classes.ILogger.Severity[severity], text)


def fake_tensorrt(version: str, watch: Watch | None = None) -> Any:
    """The module `tensorrt` of one of VERSIONS. watch: what is planted, and what is seen."""
    return FakeTensorrt(version, watch or Watch())
