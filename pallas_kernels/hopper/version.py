"""Decides with which versions of JAX the Hopper kernels run."""

# Patch releases are listed one by one, because private modules may change in any of them. To add a
# version, append it here and run the interpreter, compile and GPU tests with it.
TESTED = ("0.11.2",)


def refuses(jax_version: str, jaxlib_version: str) -> str | None:
    """Returns why the kernels can't run with these versions, or None if both are tested."""
    if jax_version in TESTED and jaxlib_version == jax_version:
        return None
    return (
        "the Hopper kernels use private modules of JAX and are tested with jax and jaxlib "
        f"{', '.join(TESTED)}; here are jax {jax_version} and jaxlib {jaxlib_version}"
    )
