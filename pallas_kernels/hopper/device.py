"""Which GPU this machine has, and whether the Hopper kernels can run on it."""

import jax

from mla_jax.hal import HardwareProfile, profile_of_device
from mla_jax.splits.residency import for_any_gpu

_OWN_NUMBERS = {  # of a profile, by the attributes of JAX's devices
    "core.count": "core_count",
    "buffer.shared": "shared_memory_per_block_optin",
}
ASSUMED_SMS = 132  # of an H100 or H200 SXM


def card() -> jax.Device | None:
    """Returns the first NVIDIA GPU of this machine, or None; it need not be the default device."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


def target_lacks(platform: str, device: jax.Device | None) -> str | None:
    """Returns why a program for that platform can't have the kernels; None where it can.

    device: the one that the program is for; None: not known, e.g. where it is exported.
    """
    if platform == "cuda" and device is None:
        return None
    capability = getattr(device, "compute_capability", None)
    if platform != "cuda" or capability != "9.0":
        found = f"compute capability {capability}" if capability else platform
        return f"it needs an NVIDIA GPU of compute capability 9.0 (H100, H200), here is {found}"
    return None


def machine_lacks() -> str | None:
    """Returns why the kernels can't run on this machine; None where they can."""
    device = card()
    return target_lacks("cuda" if device else jax.devices()[0].platform, device)


def profile() -> HardwareProfile | None:
    """Returns the profile of this machine's Hopper GPU; None without one, or of an unknown model.

    Its numbers are those of the model, but for SMs and shared memory, which are the GPU's own: a
    part of the GPU or another variant may have fewer.
    """
    device = card()
    if device is None or machine_lacks() is not None:
        return None
    model = profile_of_device(getattr(device, "device_kind", ""))
    if model is None:
        return None
    own = {field: getattr(device, name, None) for field, name in _OWN_NUMBERS.items()}
    differing = {f: value for f, value in own.items() if value and value != model[f]}
    return model.with_values(differing, "read from the device") if differing else model


def num_sms() -> int:
    """Returns the SMs to plan for: of this machine's Hopper GPU, or else `ASSUMED_SMS`."""
    return machine_sms() or ASSUMED_SMS


def resident_ctas() -> int:
    """Returns how many CTAs certainly run at the same time: one on each SM of this machine's GPU.

    0 where it has no Hopper GPU, and in a program that is exported: it may run on a card with fewer
    SMs than `num_sms` says.
    """
    return 0 if for_any_gpu.value else machine_sms()


def machine_sms() -> int:
    """Returns the SMs of this machine's Hopper GPU; 0: it has none."""
    device = card()
    return device.core_count if device is not None and machine_lacks() is None else 0
