"""Random calls of the attention op, compared with float64.

`cases` draws what is static in a call and `calls` the lengths, pages and oddities of one call, both
with numpy from a seed. `arrays` makes the operands, `judge` computes the float64 reference and the
pass rule; both run in numpy on a CPU and under `jax.jit` on a GPU. `runner` compiles and runs,
`pool` does so in several processes. Nothing but `runner` uses the library.

    make fuzz PYTHON=python3 ARGS="--calls=700 --data-seeds=1,2,3 --json=fuzz.json"
    make fuzz PYTHON=python3 ARGS="--replay=117.17/3.177"
"""
