"""What a pickle holds, without running anything of it.

Python's own reader calls whatever a pickle names, makes room for as many memos or bytes as it says, and hashes what
may be nested so deep that the process ends. Of what Python and torch write (protocols 2 to 5) this reads plain values,
lists, dicts by plain keys, and everything else as a `Record`: it takes one step for each of the pickle's, which makes
one small object at most, and of both there may be so many.
"""

from __future__ import annotations

import gc
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# What torch writes of a 14B model's tensors has 0.2 MB and takes 0.1 million steps; of one that 16 ranks trained, with
# what their optimizer keeps, 10 MB and 5 million.
LONGEST = 64 * 2**20  # bytes
MOST_STEPS = 8_000_000
MOST_OBJECTS = 4_000_000
MOST_NAMES = 10_000  # of classes and functions
LARGEST_KEY = 2**60  # of whole numbers below it no two have one hash
# Nothing of these is ever run here; but who names them means to, and his weights are not to be trusted either.
CODE = ("os", "posix", "nt", "sys", "subprocess", "builtins.eval", "builtins.exec", "builtins.compile",
        "builtins.__import__")  # fmt: skip
MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names: what is imported of it is for the reader to decide."""

    path: str  # such as "torch.float32"


class OtherPickle(ValueError):
    """A pickle of a kind that is not read here, whole as it may be."""


class Record:
    """Stands for an object: what its class is called, what that was given, and the state that it was left with."""

    __slots__ = ("of", "arguments", "state")

    def __init__(self, of: Any, arguments: Any):
        self.of, self.arguments, self.state = of, arguments, None

    def get(self, name: str) -> Any:
        """An attribute; None where it has none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


Makers = Mapping[str, Callable[..., Any]]  # by the paths of names: what is made of the arguments


def read_pickle(content: bytes, makers: Makers, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What `content` holds.

    makers: what becomes of calls of certain names, in place of records. persistent: what its persistent ids stand for.
    Raises ValueError where it is none, or has what Python and torch do not write of tensors.
    """
    if len(content) > LONGEST:
        raise ValueError(f"its pickle has {len(content)} bytes, where {LONGEST} are allowed")
    if content[:1] != pickle.PROTO:  # with which those of protocol 2 and later begin
        raise OtherPickle("its pickle is of protocol 0 or 1. Save it again with torch.save's default protocol.")
    reader = _Reader(content, makers, persistent)
    try:
        with _no_collector():
            return reader.run()
    except (IndexError, KeyError, TypeError, struct.error, AttributeError):
        raise ValueError(f"its pickle breaks off or is damaged at byte {reader.at}") from None


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's search for cycles, which would look at millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Reader:
    """stack: what was made and not used yet; marks: where runs of it begin; memo: what is used again."""

    def __init__(self, content: bytes, makers: Makers, persistent: Callable[[Any], Any] | None):
        self.content, self.makers, self.persistent, self.at = content, makers, persistent, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.names: dict[str, Name] = {}
        self.room = MOST_OBJECTS

    def run(self) -> Any:
        content, steps = self.content, STEPS
        for _ in range(MOST_STEPS):
            code = content[self.at]
            self.at += 1
            if code == STOP:
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise ValueError(f"its pickle has the code {code} at byte {self.at - 1}, which torch does not write")
            step(self)
        raise ValueError(f"its pickle takes more than {MOST_STEPS} steps")

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
        """A new object."""
        self.room -= room
        if self.room < 0:
            raise ValueError(f"its pickle holds more than {MOST_OBJECTS} objects")
        self.stack.append(value)

    def name(self, path: str) -> None:
        """Writers name a class once, and remember it."""
        if path not in self.names and len(self.names) == MOST_NAMES:
            raise ValueError(f"its pickle names more than {MOST_NAMES} classes")
        if path in CODE or path.partition(".")[0] in CODE:
            raise ValueError(f"it names {path}, and code of a file is never run")
        self.put(self.names.setdefault(path, Name(path)), room=20)

    def remember(self, index: int) -> None:
        """For later use: writers number what they remember one after the other."""
        if index < len(self.memo):
            self.memo[index] = self.stack[-1]
        elif index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            raise IndexError

    def last(self, count: int) -> tuple[Any, ...]:
        """The last values, taken off."""
        if count > len(self.stack):
            raise IndexError
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        return taken

    def made(self, of: Any, arguments: Any) -> Any:
        path = of.path if isinstance(of, Name) else None
        if path in self.makers and isinstance(arguments, tuple):
            return self.makers[path](*arguments)
        return {} if path in MAPPINGS else Record(of, arguments)

    def set_items(self, items: list[Any] | tuple[Any, ...]) -> None:
        """Into what is last. Entries by tuples and the like are left out: they name no tensor."""
        into = self.stack[-1]
        if isinstance(into, dict):
            into.update((key, value) for key, value in zip(items[::2], items[1::2]) if _is_key(key))

    def append_all(self, items: list[Any] | tuple[Any, ...]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def build(self) -> None:
        (state,) = self.last(1)
        if isinstance(self.stack[-1], Record) and self.stack[-1] is not SET:
            self.stack[-1].state = state


def _is_key(key: Any) -> bool:
    return type(key) in (str, Record, bool, type(None)) or type(key) is int and abs(key) < LARGEST_KEY


def _number(form: str) -> Callable[[_Reader], Any]:
    """A step that puts a number of this form (see struct)."""
    unpack, size = struct.Struct(form).unpack, struct.calcsize(form)
    return lambda reader: reader.put(unpack(reader.take(size))[0])


def _counted(form: str, make: Callable[[bytes], Any]) -> Callable[[_Reader], Any]:
    """A step that puts what is made of as many bytes as a number of this form says."""
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
SET = Record(Name("builtins.set"), ())  # stands for all sets, as none holds a tensor
STEPS = _by_code({
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
    pickle.FROZENSET: lambda reader: reader.put(Record(SET, reader.since_mark())),
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
