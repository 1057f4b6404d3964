"""An experiment's flags: the fields of a frozen dataclass, read from the command line by absl."""

import dataclasses
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
) -> Any:
    """A field of an experiment's Options, and so a flag of the same name.

    The annotation gives the type: str, int, float, bool, one of them or None, or a tuple of them
    (written --name=a,b). `choices` and `lower_bound` hold for each element.
    """
    metadata = {"help": help, "choices": choices, "lower_bound": lower_bound}
    return dataclasses.field(default=default, metadata=metadata)


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
    """The Options that parsed flags say."""
    return options(**{f.name: values[f.name].value for f in dataclasses.fields(options)})


class _FieldParser(flags.ArgumentParser):
    """Text to the annotated type of a field, within its choices and bound."""

    def __init__(self, annotation: Any, metadata: Mapping[str, Any]) -> None:
        super().__init__()
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        alternatives = typing.get_args(annotation) if is_union else (annotation,)
        (kind,) = (a for a in alternatives if a is not types.NoneType)
        self._is_tuple = typing.get_origin(kind) is tuple
        self._kind = typing.get_args(kind)[0] if self._is_tuple else kind
        self._choices, self._lower_bound = metadata["choices"], metadata["lower_bound"]

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # a default
            return argument
        if not self._is_tuple:
            return self._element(argument)
        return tuple(self._element(part.strip()) for part in argument.split(",") if part.strip())

    def flag_type(self) -> str:
        return self._kind.__name__

    def _element(self, text: str) -> Any:
        value = self._kind(text)
        if self._choices is not None and value not in self._choices:
            raise ValueError(f"must be one of {', '.join(map(str, self._choices))}")
        if self._lower_bound is not None and not value >= self._lower_bound:
            raise ValueError(f"must be {self._lower_bound} or more")
        return value


class _FieldSerializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
