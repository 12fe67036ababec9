"""Reads pickles as data: no global is ever looked up, no callable of the file's choice is ever called. No torch.

A small machine walks the opcodes (pickletools parses their arguments). Globals stay names; the few that stand for plain
values have a builder in BUILDERS, the classes of known programs become dicts or inert Instances, the rest is refused by
name. Python's own Unpickler with a filter would still let a file set attributes of whatever the filter admits.
"""

import pickletools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from swin_moe.checkpoint.errors import CheckpointError

MAX_PICKLE_BYTES = 256 << 20  # a 1000-rank config with all optimizer indices has under 1 MiB
MAX_ENCODED = 4096  # characters that _codecs.encode may turn into bytes: numpy scalars need 16
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy._core.multiarray": "numpy.core.multiarray"}


class Global(NamedTuple):
    """A global that a pickle names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Instance:
    """An object of a class of another program: what it was made from. Nothing of the class exists here."""

    def __init__(self, kind: str, args: tuple) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None


class Options(dict):
    """What a yacs CfgNode or an argparse Namespace held."""


class _Dtype:
    """numpy.dtype of a scalar; only its text is kept."""

    def __init__(self, text: str) -> None:
        self.text = text


def _rebuild_scalar(dtype: Any, data: Any) -> int | float | bool:
    import numpy as np

    if not isinstance(dtype, _Dtype) or dtype.text not in _SCALARS or not isinstance(data, bytes):
        raise ValueError("a numpy scalar of an unknown kind")
    kind = np.dtype(dtype.text).newbyteorder("<")
    if len(data) != kind.itemsize:
        raise ValueError("a numpy scalar of a wrong size")
    return np.frombuffer(data, kind)[0].item()


_SCALARS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1") or len(text) > MAX_ENCODED:
        raise ValueError("an encoding other than of a short text in latin1")
    return text.encode("latin1")


def _new_object(kind: Any, base: Any = None, state: Any = None) -> Any:
    if not isinstance(kind, Global) or str(kind) not in OPTION_CLASSES:
        raise ValueError(f"an object of {kind}")
    return Options()


def _listed(items: Any = ()) -> list:
    if not isinstance(items, list | tuple):
        raise ValueError("a set of something else than a list")
    return list(items)


def _dictionary(items: Any = ()) -> dict:
    return dict(items) if isinstance(items, list | tuple) else _refuse("a dict of something else than pairs")


def _refuse(what: str) -> Any:
    raise ValueError(what)


OPTION_CLASSES = ("yacs.config.CfgNode", "argparse.Namespace")
# What stands for a plain value; every builder checks its arguments and raises ValueError.
BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda factory=None: {},
    "builtins.set": _listed,
    "builtins.frozenset": _listed,
    "builtins.dict": _dictionary,
    "builtins.list": _listed,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _new_object,
    "numpy.core.multiarray.scalar": _rebuild_scalar,
    "numpy.dtype": lambda text, *_: _Dtype(text) if isinstance(text, str) else _refuse("a structured numpy.dtype"),
    **{name: lambda *_: Options() for name in OPTION_CLASSES},
}
_MARK = object()


class _Machine:
    """The state of one pickle being read: stack, memo, and what globals may stand for."""

    def __init__(
        self, builders: Mapping[str, Callable], inert: Collection[str], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.builders, self.inert, self.persistent = builders, inert, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes] | bytes) -> Any:
        """Returns what the pickle holds; raises ValueError, IndexError, KeyError, TypeError for an invalid one."""
        arg: Any  # what an opcode has for it: a number, a text, bytes or nothing
        for opcode, arg, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _VALUES:
                self.stack.append(arg)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                self.memo[arg] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[arg])
            elif name == "STOP":
                if len(self.stack) != 1 or self.stack[0] is _MARK:
                    raise ValueError("a pickle that ends in the middle of a value")
                return self.stack[0]
            elif name not in _IGNORED:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"the pickle opcode {name}")
                step(arg)
        raise ValueError("a pickle without an end")

    def _pop_mark(self, _: Any = None) -> list:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("a pickle with a missing mark")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def _top(self, kind: type | tuple) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError("a pickle that fills something else than a list or dict")
        return self.stack[-1]

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    _empty_set = _empty_list

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _list(self, _: Any) -> None:
        self.stack.append(self._pop_mark())

    _frozenset = _list

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def _appends(self, _: Any) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    _additems = _appends

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _tuple1(self, _: Any) -> None:
        self._last(1)

    def _tuple2(self, _: Any) -> None:
        self._last(2)

    def _tuple3(self, _: Any) -> None:
        self._last(3)

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[key] = value

    def _setitems(self, _: Any) -> None:
        items = self._pop_mark()
        self._top(dict).update(zip(items[::2], items[1::2], strict=True))

    def _global(self, arg: str) -> None:
        self._name(*arg.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global without a name")
        found = Global(_OLD_MODULES.get(module, module), name)
        if str(found) not in self.builders and str(found) not in self.inert:
            raise _Refused(found)
        self.stack.append(found)

    def _call(self, found: Any, args: Any) -> Any:
        if not isinstance(found, Global) or not isinstance(args, tuple):
            raise ValueError("a call of something else than a known global")
        if str(found) in self.inert:
            return Instance(str(found), args)
        return self.builders[str(found)](*args)

    def _reduce(self, _: Any) -> None:
        args, found = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(found, args))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Instance):
            target.state = state
        elif isinstance(target, Options):
            items = state.items() if isinstance(state, dict) else ()
            target.update((key, value) for key, value in items if not str(key).startswith("__"))
        elif not isinstance(target, dict | _Dtype):  # attributes of an OrderedDict, byte order of a dtype: not needed
            raise ValueError("attributes for something that has none")

    def _binpersid(self, _: Any) -> None:
        if self.persistent is None:
            raise ValueError("a reference to something outside the pickle")
        self.stack.append(self.persistent(self.stack.pop()))


class _Refused(ValueError):
    """A global that stands for nothing here."""


_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_IGNORED = frozenset(("PROTO", "FRAME"))


def read_pickle(
    stream: IO[bytes] | bytes,
    path: Path | str,
    *,
    builders: Mapping[str, Callable[..., Any]] = BUILDERS,
    inert: Collection[str] = (),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the content of one pickle as dicts, lists, tuples, numbers, text and what `builders` make.

    Args:
        stream: The bytes, or a file that stands at the pickle; it is left behind it.
        path: The file, for errors.
        builders: Global name -> what builds its value from the arguments; raises ValueError for bad ones.
        inert: Names of classes whose objects become Instances.
        persistent: Builds the value of a persistent id.

    Raises:
        CheckpointError: A global that is not admitted (named), or a pickle that is not valid; names the file.
    """
    try:
        return _Machine(builders, inert, persistent).run(stream)
    except _Refused as error:
        is_class = str(error).rpartition(".")[2][:1].isupper()
        advice = "; of a pickled model save its state_dict() where its code is" if is_class else ""
        raise CheckpointError(
            f"{path}: its pickle asks for the global {error}, which is refused: only tensors, plain values and known "
            f"option classes are read, and nothing is executed{advice}"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        reason = str(error) if type(error) is ValueError and str(error) else "it is not a valid pickle"
        raise CheckpointError(f"{path}: its pickle cannot be read: {reason[:200]}") from None


def plain(value: Any, path: Path | str, *, budget: int = 1_000_000) -> Any:
    """Returns a value read from a pickle as JSON: dicts with text keys, lists, numbers, text, None.

    Args:
        budget: Values allowed; a pickle can refer to one list a billion times.

    Raises:
        CheckpointError: It holds something else, nests too deeply, or is too large; names the file.
    """
    left = [budget]

    def convert(item: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > 100:
            raise CheckpointError(f"{path}: its options are nested too deeply or are too many")
        if isinstance(item, dict):
            return {str(key): convert(inner, depth + 1) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [convert(inner, depth + 1) for inner in item]
        if isinstance(item, float) and item != item or item in (float("inf"), float("-inf")):
            return str(item)
        if item is None or isinstance(item, str | int | float | bool):
            return item
        raise CheckpointError(f"{path}: an option is a {type(item).__name__}, only plain values are kept")

    return convert(value, 0)
