"""The flags of an experiment: fields of a frozen dataclass, read from the command line by absl."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    lower_bound: float | None = None,
    upper_bound: float | None = None,
    may_be_empty: bool = True,
) -> Any:
    """Returns a field of an experiment's Options, which becomes a flag of the same name.

    The annotation gives the type: str, int, float, bool, one of them or None, or a tuple of them
    (written --name=a,b) without duplicates. `choices` and bounds apply to each element. Floats must
    be finite. `may_be_empty` says whether a tuple may have no element (--name=).
    """
    metadata = {
        "help": help,
        "choices": choices,
        "lower_bound": lower_bound,
        "upper_bound": upper_bound,
        "may_be_empty": may_be_empty,
    }
    return dataclasses.field(default=default, metadata=metadata)


def seed_flag(help: str, default: int = 0) -> Any:
    """Returns the flag of a random seed, in the range that every generator accepts."""
    return flag(default, help, lower_bound=0, upper_bound=2**31 - 1)


def define_flags(options: type, values: flags.FlagValues) -> None:
    """Defines a flag in `values` for each field of an Options class."""
    annotations = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        default: Any = field.default
        text, module = field.metadata["help"], "experiment"
        if annotations[field.name] is bool:
            flags.DEFINE_bool(field.name, default, text, values, module)
        else:
            parser = _FieldParser(annotations[field.name], field.metadata)
            flags.DEFINE(parser, field.name, default, text, values, _FieldSerializer(), module)


def read_options(options: type, values: flags.FlagValues) -> Any:
    """Returns the Options with the values of parsed flags."""
    return options(**{f.name: values[f.name].value for f in dataclasses.fields(options)})


class _FieldParser(flags.ArgumentParser):
    """Parses text to the annotated type of a field and checks its choices and bounds."""

    def __init__(self, annotation: Any, metadata: Mapping[str, Any]) -> None:
        super().__init__()
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        alternatives = typing.get_args(annotation) if is_union else (annotation,)
        (kind,) = (a for a in alternatives if a is not types.NoneType)
        self._is_tuple = typing.get_origin(kind) is tuple
        self._kind = typing.get_args(kind)[0] if self._is_tuple else kind
        self._choices, self._may_be_empty = metadata["choices"], metadata["may_be_empty"]
        self._lower_bound, self._upper_bound = metadata["lower_bound"], metadata["upper_bound"]

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # a default
            return argument
        if not self._is_tuple:
            return self._element(argument)
        parts = [part.strip() for part in argument.split(",")] if argument.strip() else []
        if not parts and not self._may_be_empty:
            raise ValueError("must have one element or more")
        elements = tuple(self._element(part) for part in parts)
        for element in elements:
            if elements.count(element) > 1:
                raise ValueError(f"has {element} twice")
        return elements

    def flag_type(self) -> str:
        return self._kind.__name__

    def _element(self, text: str) -> Any:
        if not text and self._is_tuple:
            raise ValueError("has an empty element")
        value = self._kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be finite")
        if self._choices is not None and value not in self._choices:
            raise ValueError(f"must be one of {', '.join(map(str, self._choices))}")
        if self._lower_bound is not None and not value >= self._lower_bound:
            raise ValueError(f"must be {self._lower_bound} or more")
        if self._upper_bound is not None and not value <= self._upper_bound:
            raise ValueError(f"must be {self._upper_bound} or less")
        return value


class _FieldSerializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
