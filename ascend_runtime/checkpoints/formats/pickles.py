"""Reads pickles without running any code that they name.

Python's own reader calls whatever a pickle names, allocates as many memo entries or bytes as the pickle says, and
hashes objects that may be nested deeply enough to crash the process. This reader supports what Python and torch write
(protocols 2 to 5): plain values, lists and dicts with plain keys. Any other object becomes a `PickledObject`. Each
opcode creates at most one small object, and the numbers of opcodes and objects are bounded.
"""

from __future__ import annotations

import gc
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import coded_error

# torch's pickle of a 14B model's tensors has 0.2 MB and takes 0.1 million steps; with the optimizer state of 16 ranks,
# 10 MB and 5 million steps.
MAX_PICKLE_BYTES = 64 * 2**20
MAX_PICKLE_STEPS = 8_000_000
MAX_PICKLE_OBJECTS = 4_000_000
MAX_PICKLE_NAMES = 10_000  # of classes and functions
LARGEST_KEY = 2**60  # integers below have different hashes
# No code is ever run here; but a pickle that names these is malicious, and its weights cannot be trusted either.
CODE = ("os", "posix", "nt", "sys", "subprocess", "builtins.eval", "builtins.exec", "builtins.compile",
        "builtins.__import__")  # fmt: skip
MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names. It is not imported."""

    path: str  # such as "torch.float32"


class OtherPickle(ValueError):
    """A pickle of an unsupported kind, which may be valid."""


class PickledObject:
    """Stands for an object: `of`, the name of its class or function, called with `arguments`, and its pickled state."""

    __slots__ = ("of", "arguments", "state")

    def __init__(self, of: Any, arguments: Any):
        self.of, self.arguments, self.state = of, arguments, None

    def get(self, name: str) -> Any:
        """An attribute; None if there is none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


Makers = Mapping[str, Callable[..., Any]]  # by a class' or function's path: makes an object from the arguments


def read_pickle(content: bytes, makers: Makers, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object that a pickle holds.

    makers: functions to use for calls of certain names; other calls become a PickledObject. persistent: loads the
    object of a persistent id. Raises ValueError for an invalid pickle, or one that Python and torch do not write.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise coded_error("AV-1312", f"its pickle has {len(content)} bytes; at most {MAX_PICKLE_BYTES} are allowed")
    if content[:1] != pickle.PROTO:  # the first opcode of protocol 2 and later
        raise OtherPickle("its pickle has protocol 0 or 1. Save it again with torch.save's default protocol.")
    reader = _Reader(content, makers, persistent)
    try:
        with _no_collector():
            return reader.run()
    except (IndexError, KeyError, TypeError, struct.error, AttributeError):
        raise ValueError(f"its pickle is cut off or damaged at byte {reader.at}") from None


@contextmanager
def _no_collector() -> Iterator[None]:
    """Disables Python's garbage collector, which would scan millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Reader:
    """The pickle machine. stack: objects not consumed yet; marks: positions in it; memo: objects that may be reused."""

    def __init__(self, content: bytes, makers: Makers, persistent: Callable[[Any], Any] | None):
        self.content, self.makers, self.persistent, self.at = content, makers, persistent, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.names: dict[str, Name] = {}
        self.room = MAX_PICKLE_OBJECTS

    def run(self) -> Any:
        content, steps = self.content, OPCODES
        for _ in range(MAX_PICKLE_STEPS):
            code = content[self.at]
            self.at += 1
            if code == STOP:
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise coded_error(
                    "AV-1312", f"its pickle has the opcode {code} at byte {self.at - 1}, which torch does not write"
                )
            step(self)
        raise coded_error("AV-1312", f"its pickle takes more than {MAX_PICKLE_STEPS} steps")

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.content):
            raise IndexError
        return self.content[start : self.at]

    def line(self) -> str:
        end = self.content.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise IndexError
        return self.take(end + 1 - self.at)[:-1].decode()

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, value: Any, room: int = 1) -> None:
        """Pushes a new object, which takes `room` of the allowed objects."""
        self.room -= room
        if self.room < 0:
            raise coded_error("AV-1312", f"its pickle holds more than {MAX_PICKLE_OBJECTS} objects")
        self.stack.append(value)

    def name(self, path: str) -> None:
        """Pushes a name. Writers name a class once, and memoize it."""
        if path not in self.names and len(self.names) == MAX_PICKLE_NAMES:
            raise coded_error("AV-1312", f"its pickle names more than {MAX_PICKLE_NAMES} classes")
        if path in CODE or path.partition(".")[0] in CODE:
            raise coded_error("AV-1312", f"it names {path}, and code in a file is never run")
        self.put(self.names.setdefault(path, Name(path)), room=20)

    def remember(self, index: int) -> None:
        """Memoizes the top of the stack. Writers number memo entries consecutively."""
        if index < len(self.memo):
            self.memo[index] = self.stack[-1]
        elif index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            raise IndexError

    def last(self, count: int) -> tuple[Any, ...]:
        """Pops the last `count` values."""
        if count > len(self.stack):
            raise IndexError
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        return taken

    def made(self, of: Any, arguments: Any) -> Any:
        path = of.path if isinstance(of, Name) else None
        if path in self.makers and isinstance(arguments, tuple):
            return self.makers[path](*arguments)
        return {} if path in MAPPINGS else PickledObject(of, arguments)

    def set_items(self, items: list[Any] | tuple[Any, ...]) -> None:
        """Adds items to the dict on top of the stack. Keys such as tuples are skipped: they name no tensor."""
        into = self.stack[-1]
        if isinstance(into, dict):
            into.update((key, value) for key, value in zip(items[::2], items[1::2]) if _is_key(key))

    def append_all(self, items: list[Any] | tuple[Any, ...]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def build(self) -> None:
        (state,) = self.last(1)
        if isinstance(self.stack[-1], PickledObject) and self.stack[-1] is not SET:
            self.stack[-1].state = state


def _is_key(key: Any) -> bool:
    return type(key) in (str, PickledObject, bool, type(None)) or type(key) is int and abs(key) < LARGEST_KEY


def _number(form: str) -> Callable[[_Reader], Any]:
    """An opcode that pushes a number of this format (see struct)."""
    unpack, size = struct.Struct(form).unpack, struct.calcsize(form)
    return lambda reader: reader.put(unpack(reader.take(size))[0])


def _counted(form: str, make: Callable[[bytes], Any]) -> Callable[[_Reader], Any]:
    """An opcode that pushes an object made from bytes, whose count is a number of this format."""
    unpack, size = struct.Struct(form).unpack, struct.calcsize(form)
    return lambda reader: reader.put(make(reader.take(unpack(reader.take(size))[0])))


def _remember(form: str) -> Callable[[_Reader], Any]:
    unpack, size = struct.Struct(form).unpack, struct.calcsize(form)
    return lambda reader: reader.remember(unpack(reader.take(size))[0])


def _recall(form: str) -> Callable[[_Reader], Any]:
    unpack, size = struct.Struct(form).unpack, struct.calcsize(form)
    return lambda reader: reader.stack.append(reader.memo[unpack(reader.take(size))[0]])


def _constant(value: Any) -> Callable[[_Reader], Any]:
    return lambda reader: reader.stack.append(value)


def _tuple(count: int) -> Callable[[_Reader], Any]:
    return lambda reader: reader.put(reader.last(count))


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _named(reader: _Reader) -> None:
    module, name = reader.last(2)
    reader.name(f"{module}.{name}" if type(module) is type(name) is str else "nothing")


def _by_code(steps: dict[bytes, Callable[[_Reader], Any]]) -> dict[int, Callable[[_Reader], Any]]:
    return {code[0]: step for code, step in steps.items()}


STOP = pickle.STOP[0]
SET = PickledObject(Name("builtins.set"), ())  # stands for every set, since no set holds a tensor
OPCODES = _by_code({
    pickle.PROTO: lambda reader: reader.take(1),
    pickle.FRAME: lambda reader: reader.take(8),
    pickle.MARK: lambda reader: reader.marks.append(len(reader.stack)),
    pickle.POP: lambda reader: reader.last(1),
    pickle.POP_MARK: lambda reader: reader.since_mark(),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.BININT: _number("<i"),
    pickle.BININT1: _number("<B"),
    pickle.BININT2: _number("<H"),
    pickle.BINFLOAT: _number(">d"),
    pickle.LONG1: _counted("<B", lambda content: int.from_bytes(content, "little", signed=True)),
    pickle.SHORT_BINUNICODE: _counted("<B", _text),
    pickle.BINUNICODE: _counted("<I", _text),
    pickle.SHORT_BINBYTES: _counted("<B", bytes),
    pickle.BINBYTES: _counted("<I", bytes),
    pickle.EMPTY_TUPLE: _constant(()),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.TUPLE: lambda reader: reader.put(tuple(reader.since_mark())),
    pickle.EMPTY_LIST: lambda reader: reader.put([]),
    pickle.APPEND: lambda reader: reader.append_all(reader.last(1)),
    pickle.APPENDS: lambda reader: reader.append_all(reader.since_mark()),
    pickle.EMPTY_DICT: lambda reader: reader.put({}),
    pickle.SETITEM: lambda reader: reader.set_items(reader.last(2)),
    pickle.SETITEMS: lambda reader: reader.set_items(reader.since_mark()),
    pickle.EMPTY_SET: _constant(SET),
    pickle.ADDITEMS: lambda reader: reader.since_mark(),
    pickle.FROZENSET: lambda reader: reader.put(PickledObject(SET, reader.since_mark())),
    pickle.GLOBAL: lambda reader: reader.name(f"{reader.line()}.{reader.line()}"),
    pickle.STACK_GLOBAL: _named,
    pickle.REDUCE: lambda reader: reader.put(reader.made(*reader.last(2))),
    pickle.NEWOBJ: lambda reader: reader.put(reader.made(*reader.last(2))),
    pickle.NEWOBJ_EX: lambda reader: reader.put(reader.made(*reader.last(3)[:2])),
    pickle.BUILD: lambda reader: reader.build(),
    pickle.BINPUT: _remember("<B"),
    pickle.LONG_BINPUT: _remember("<I"),
    pickle.MEMOIZE: lambda reader: reader.remember(len(reader.memo)),
    pickle.BINGET: _recall("<B"),
    pickle.LONG_BINGET: _recall("<I"),
    pickle.BINPERSID: lambda reader: reader.put(reader.persistent(*reader.last(1))),
})  # fmt: skip
