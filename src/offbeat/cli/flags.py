"""Flags. A command is a dataclass: its fields are the flags, their docstrings the help.

A command's parts (a method, a task, a cluster, a grid) are dataclasses too, and give their fields as flags without a
prefix, unless the name is taken. What is no number or text is written as Python, such as ``Gamma(cv=0.1)``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.conf import arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ..core.method import Method
from ..core.values import unknown
from ..engines.cluster import Cluster
from ..engines.network import Link
from ..engines.presets import PRESETS
from ..engines.processors import Machines
from ..experiment import Grid, entry
from ..methods import all_methods
from ..names import KINDS, read
from ..tasks import TASKS
from .command import Command, told

MethodName = Annotated[str, arg(metavar="NAME", help=f"One of {', '.join(c.name for c in all_methods())}.")]
TaskName = Annotated[str, arg(metavar="NAME", help=f"One of {', '.join(sorted(TASKS))}.")]

PresetName = Annotated[
    str | None,
    arg(metavar="NAME", help=f"A cluster to start from: {', '.join(PRESETS)}. Other flags change it."),
]


ModuleNames = Annotated[tuple[str, ...], arg(name="import", metavar="MODULE [MODULE ...]")]


def parse(command: Any, name: str, argv: Sequence[str]) -> Command:
    argv, script = _script(command, argv) if "script" in {f.name for f in fields(command)} else (argv, ())
    if script and script[0] != "-m":  # what lies beside a script, --import finds as the script does
        sys.path.append(str(Path(script[0]).resolve().parent))
    with told():
        default = command.defaults(argv)
    parts = [getattr(default, f.name) for f in fields(command) if hasattr(default, f.name)]
    registry = _registry(command, [type(part) for part in parts if is_dataclass(part)])
    parsed = tyro.cli(command, prog=f"offbeat {name}", args=list(argv), default=default, registry=registry)
    return cast(Command, replace(parsed, script=tuple(script)) if script else parsed)


def _script(command: Any, argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Flags of the command, and what follows them: the user's script, or -m and a module, with its own arguments.

    The script is the first word that is no flag's value and ends in .py or is a file; or what follows --.
    """
    parts = (command, *all_methods(), *TASKS.values())
    switches = {f.name.replace("_", "-") for part in parts for f in fields(part) if f.type in (bool, "bool")}
    before = ""
    for i, word in enumerate(argv):
        if word == "--":
            return argv[:i], argv[i + 1 :]
        value = before.startswith("--") and "=" not in before and before[2:].removeprefix("no-") not in switches
        if word == "-m" or (not value and not word.startswith("-") and (word.endswith(".py") or Path(word).is_file())):
            return argv[:i], argv[i:]
        before = word
    return argv, ()


def _registry(command: Any, parts: Sequence[type]) -> ConstructorRegistry:
    """How the flags of ``command`` are made of those of its parts, and how their texts are read."""
    registry = ConstructorRegistry()
    taken = {f.name for f in fields(command)}
    free: dict[type, set[str]] = {}  # the fields of each part that need no prefix
    for part in parts:
        free[part] = {f.name for f in fields(part)} - taken
        taken |= free[part]

    @registry.primitive_rule
    def text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if get_origin(info.type) is tuple:
            return None  # its entries are read one by one
        union = (info.type, *get_args(info.type))
        if info.type in free or not any(isinstance(t, type) and issubclass(t, (*KINDS, Link, Machines)) for t in union):
            return None
        plain = str in union  # the grid's entries are read by the grid
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="METHOD" if plain else "VALUE",
            instance_from_str=lambda words: words[0] if plain else read(words[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [value if isinstance(value, str) else repr(value)],
        )

    @registry.struct_rule
    def flat(info: StructTypeInfo) -> StructConstructorSpec | None:
        cls = type(info.default)
        if cls not in free:
            return None
        hidden = "task" if cls is Grid else "seed" if cls in TASKS.values() else ""  # the command sets it
        hints, helps = get_type_hints(cls), {name: text for name, _, text in described(cls)}
        flags = [
            StructFieldSpec(
                name=f.name,
                type=cast(Any, Annotated[hints[f.name], arg(prefix_name=f.name not in free[cls])]),
                default=getattr(info.default, f.name),
                helptext=helps[f.name],
            )
            for f in fields(cls)
            if f.name != hidden
        ]

        def build(**settings: Any) -> Any:
            with told():
                return cls(**settings)

        return StructConstructorSpec(instantiate=build, fields=tuple(flags))

    return registry


def said_in(argv: Sequence[str], flag: str, default: str) -> str:
    """What ``argv`` says for ``flag``, before anything else is known about the flags."""
    said = default
    for word, value in zip(argv, [*argv, "-"][1:], strict=True):
        if word == flag and not value.startswith("-"):
            said = value
        elif word.startswith(f"{flag}="):
            said = word.partition("=")[2]
    return said


def method_of(text: str) -> Method:
    """A method by name, by name with settings, or as a value."""
    value = read(text) if text[:1].isupper() and "(" in text else entry(text)
    if not isinstance(value, Method):
        raise ValueError(f"{text} is no method: offbeat methods lists them")
    return value


def words_of(argv: Sequence[str], flag: str) -> list[str]:
    """The words that follow ``flag`` in ``argv``, up to the next flag."""
    start = next((i for i, word in enumerate(argv) if word == flag), len(argv)) + 1
    return list(takewhile(lambda word: not word.startswith("-"), argv[start:]))


def load(modules: Sequence[str]) -> None:
    """Import what the user names, from this folder or installed: classes that are loaded can be read by their names."""
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for module in modules:
        importlib.import_module(module)


def task_class(name: str) -> type[Any]:
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return TASKS[name]


def preset(argv: Sequence[str]) -> Cluster | None:
    """The cluster that ``--preset`` names."""
    name = said_in(argv, "--preset", "")
    if name and name not in PRESETS:
        raise ValueError(unknown("preset", name, list(PRESETS)))
    return PRESETS[name]() if name else None


def described(cls: type[Any]) -> list[tuple[str, str, str]]:
    """Name, default and docstring of each field of a dataclass."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            params = docstring_parser.parse_from_object(base).params
            texts |= {p.arg_name: " ".join(p.description.replace("``", "").split()) for p in params if p.description}
    return [(f.name, repr(f.default), texts.get(f.name, "")) for f in fields(cls)]
