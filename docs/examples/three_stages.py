"""Three KV stages of 32 keys: the copy engine runs two blocks ahead of the tensor cores."""

from mla_jax.hal import GpuScheduleBuilder, Schedule, gpu_kernel

STAGES = 3


def three_stages(num_blocks: int) -> Schedule:
    build = GpuScheduleBuilder("three-stages", num_blocks, stages=STAGES)
    for block in range(min(STAGES, num_blocks)):
        build.load(block)
    for block in range(num_blocks):
        build.scores("mma", block)
        build.softmax("warps", block)
        build.values("mma", "L", block)
        build.values("mma", "R", block)
        if block + STAGES < num_blocks:
            build.load(block + STAGES)
    build.store("warps")
    return build.build()


kernel = gpu_kernel(three_stages, like="flashinfer_fa3", block_kv=32)
