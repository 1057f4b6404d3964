"""Registers the pytrees that users pass and get with `jax.export`, so that programs serialize.

What is stored of a pytree is its static part, as JSON with a version; its arrays are arguments and
results of the exported program. Arrays and static values are stored by name. A field that a later
version of this library adds has its default when an older program is read, and one that this
version does not know is refused by name.

A process that only reads a program has not loaded what compiles its kernels. Reading a pytree of
this library loads it.
"""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export  # which `import jax` has loaded already

from mla_jax.cache import PagedKVCache
from mla_jax.checkpoints.weights import MLAParams
from mla_jax.implementations.hopper import tiles_from_json, tiles_to_json
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SplitPlan

KERNEL_RUNTIME = "jax.experimental.mosaic.gpu"  # says where XLA finds what the kernels call
VERSION = 1  # of the stored form; one that reads differently gets the next number


class StoredNode(NamedTuple):
    """The static part of a pytree node, as it is stored."""

    arrays: tuple[str, ...]  # names of the children, in order
    static: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """How the static part of one dataclass is stored.

    Attributes:
        node: a dataclass that is registered as a pytree.
        arrays: its fields that are children, in the order of the pytree.
        static: its other fields, in the order of the pytree.
    """

    node: type
    arrays: tuple[str, ...]
    static: tuple[str, ...]

    @staticmethod
    def of(node: type) -> "StoredForm":
        # A node that holds the names of its own fields shows which are children, and all orders.
        names = {field.name: field.name for field in dataclasses.fields(node)}
        arrays, structure = jax.tree.flatten(node(**names))
        tree: Any = structure  # whose methods its stub does not list
        return StoredForm(node, tuple(arrays), tuple(tree.node_data()[1]))

    @property
    def title(self) -> str:
        return f"mla_jax.{self.node.__name__}"

    def to_bytes(self, values: Sequence[Any]) -> bytes:
        """Returns JSON of the static values, which are in the order of `static`."""
        static = dict(zip(self.static, values, strict=True))
        if static.get("tiles") is not None:
            static["tiles"] = tiles_to_json(static["tiles"])
        stored = {"version": VERSION, "arrays": self.arrays, "static": static}
        return json.dumps(stored, default=int).encode()  # int: NumPy's integers

    def from_bytes(self, stored: bytes) -> StoredNode:
        """Reads what `to_bytes` returns; raises ValueError for that of another version."""
        importlib.import_module(KERNEL_RUNTIME)
        fields = json.loads(bytes(stored))
        version = fields["version"]
        if version != VERSION:
            raise ValueError(
                f"the exported program is from another version of mla_jax: its {self.title} is of "
                f"version {version}, wanted version {VERSION}"
            )
        arrays, static = tuple(fields["arrays"]), dict(fields["static"])
        if unknown := {*arrays, *static} - {*self.arrays, *self.static}:
            raise ValueError(
                f"the exported program is from another version of mla_jax: its {self.title} has "
                f"{', '.join(sorted(unknown))}, wanted only {', '.join(self.arrays + self.static)}"
            )
        if static.get("tiles") is not None:
            static["tiles"] = tiles_from_json(static["tiles"])
        return StoredNode(arrays, static)

    def build(self, aux_data: StoredNode, children: Sequence[Any]) -> Any:
        """Returns the node with these children; JAX names the arguments."""
        arrays = dict(zip(aux_data.arrays, children, strict=True))
        return self.node(**arrays, **aux_data.static)

    def register(self) -> None:
        # It raises only where the name is registered already: a process that imports this library
        # a second time keeps the classes of the first.
        with contextlib.suppress(ValueError):
            jax.export.register_pytree_node_serialization(
                self.node,
                serialized_name=self.title,
                serialize_auxdata=self.to_bytes,
                deserialize_auxdata=self.from_bytes,
                from_children=self.build,
            )


def register_pytrees() -> None:
    """Registers all of them; `import mla_jax` calls it."""
    for node in (PagedKVCache, MLAParams, SplitPlan, DecodePlan):
        StoredForm.of(node).register()
