"""The platform and device that a call is compiled for, or where it runs."""

import dataclasses
from typing import Any

import jax
from jax.interpreters import mlir


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform and device that a call is compiled for."""

    platform: str  # as JAX names it for lowering: "cpu", "cuda", "rocm", "tpu", ...
    device: jax.Device | None = None  # None: not known, e.g. where a program is exported
    partitioned: bool = False  # whether the compiler spreads the call over several devices

    @staticmethod
    def here(problem: Any = None) -> "Target":
        """Returns where an eager call runs: where its arrays are committed, else by default.

        problem: a pytree of the call's arrays.
        """
        for array in jax.tree.leaves(problem):
            traced = isinstance(array, jax.core.Tracer)
            if isinstance(array, jax.Array) and not traced and array.committed:
                devices = sorted(array.devices(), key=lambda device: device.id)
                return Target(_platform(devices[0]), devices[0], len(devices) > 1)
        default = jax.config.jax_default_device
        if default is None or isinstance(default, str):
            default = jax.devices(default)[0]
        return Target(_platform(default), default)

    @staticmethod
    def of_lowering(context: mlir.LoweringRuleContext, platform: str | None) -> "Target":
        """Returns what a lowering rule lowers for.

        platform: the one that the rule is registered for; None: it is registered for all.
        """
        module = context.module_context
        platform = platform or (context.platforms or module.platforms)[0]
        axes: Any = module.axis_context
        if hasattr(axes, "manual_axes"):  # in a shard_map: whole for each device if over all axes
            partitioned = len(axes.manual_axes) < len(axes.mesh.axis_names)
        else:
            partitioned = axes.num_devices > 1
        devices = getattr(axes, "device_assignment", None) or ()
        device = next((one for one in devices if _platform(one) == platform), None)
        if device is None:
            try:
                device = jax.devices(platform)[0]
            except RuntimeError:  # this machine has none, or JAX has not been told to use it
                device = None
        return Target(platform, device, partitioned)


def _platform(device: jax.Device) -> str:
    if device.platform != "gpu":
        return device.platform
    capability = str(getattr(device, "compute_capability", ""))
    return "rocm" if capability.startswith("gfx") else "cuda"
