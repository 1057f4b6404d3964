"""Which kernel of the simulator predicts a kernel that a table names.

A table may name a kernel of `mla_jax.hal` itself, such as "flashmla_dense". Others are recognised
here, each with the nearest kernel that has a model. `note` says what differs.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.simulated.tables.first_flashmla import first_flashmla_kernel
from mla_jax.hal import HardwareProfile, load_profile
from mla_jax.hal.simulator.ascend_costs import ASCEND_KERNELS
from mla_jax.hal.simulator.gpu_costs import KERNELS, Kernel

PREFILL = "prefill"  # experiments/simulated/tables/prefill_model.py


@dataclass(frozen=True)
class Model:
    """The prediction of one kernel of a table.

    kernels: the kernel of `mla_jax.hal`, or PREFILL, by the dtype of the KV cache.
    prepares: whether a launch before it rotates q and appends to the cache.
    """

    pattern: str
    kernels: Mapping[str, str]
    note: str
    prepares: bool = False


MODELS = (
    Model("flashmla", {"bf16": "flashmla_dense"}, "its own model"),
    Model("hopper", {"bf16": "hopper"}, "its own model and plan"),
    Model("hopper_int8", {"int8": "hopper"}, "its own model and plan"),
    Model(
        r"TensorRT-LLM \S+ MLA decode op",
        {"bf16": "first_flashmla_bf16", "fp8": "first_flashmla_fp8"},
        "FlashMLA's first version, after a launch that rotates q and appends to the cache",
        prepares=True,
    ),
    Model(
        r"SGLang \S+ FA3 MLA decode",
        {"bf16": "flashinfer_fa3"},
        "FlashAttention-3 in absorbed mode, as FlashInfer's template",
    ),
    Model(
        r"CANN FIA npu_fused_infer_attention_score_v2 MLA decode",
        {"bf16": "fia"},
        "its own model",
    ),
    Model(
        r"CANN FIA causal prefill MHA 192/128",
        {"bf16": "fia-prefill"},
        "its own model",
    ),
    Model(
        r"TensorRT-LLM \S+ MLA context op",
        {"bf16": PREFILL, "fp8": PREFILL},
        "FlashAttention-3's order, after a launch that rotates or converts its operands",
    ),
)  # fmt: skip
DTYPES = {"bf16": "bf16", "fp8_kv": "fp8"}  # in tables, and in `Problem`
# Devices by other names. Which 910B an Atlas 800T A2 has is not said; a 910B3 is assumed.
DEVICES = {"Ascend 910B (Atlas 800T A2)": "Ascend910B3"}


def profile_of(device: str) -> HardwareProfile:
    """Returns the profile of a device, by the name that a table gives it."""
    return load_profile(DEVICES.get(device, device))


def kernel_for(profile: HardwareProfile, name: str) -> Kernel | str:
    """Returns what to simulate for a name in `Model.kernels`, or for "flashmla_int8".

    That is FlashMLA with operands of int8, which no library has.
    """
    if name.startswith("first_flashmla_"):
        return first_flashmla_kernel(profile, name.removeprefix("first_flashmla_"))
    if name != "flashmla_int8":
        return name
    flashmla = KERNELS["flashmla_dense"](profile)
    return dataclasses.replace(flashmla, name=name, multiplies="int8")


def dtype_of(variant: str, cell: str | None) -> str:
    """Returns the dtype of the KV cache, as `Problem` names it. cell: the column dtype, if any."""
    if not cell:
        if variant == "hopper_int8":
            return "int8"
        return "fp8" if re.search("fp8(kv)?$", variant) else "bf16"
    if cell not in DTYPES:
        raise ValueError(f"dtype = {cell!r}, wanted {' or '.join(DTYPES)}")
    return DTYPES[cell]


def model_of(variant: str, dtype: str) -> Model:
    """Returns the model of a table's kernel; raises ValueError that names what is not known."""
    if variant in KERNELS or variant in ASCEND_KERNELS:
        return Model(variant, {dtype: variant}, "its own model")
    for model in MODELS:
        if re.fullmatch(model.pattern, variant):
            if dtype not in model.kernels:
                raise ValueError(
                    f"kernel {variant!r} has a model for {' and '.join(model.kernels)}, "
                    f"not for dtype {dtype}"
                )
            return model
    recognised = [repr(model.pattern.replace(r"\S+", "VERSION")) for model in MODELS]
    names = ", ".join([*KERNELS, *ASCEND_KERNELS, *recognised])
    raise ValueError(f"kernel = {variant!r} has no model, wanted one of {names}")
