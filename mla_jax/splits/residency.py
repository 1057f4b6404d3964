"""Whether a program that is traced now is for GPUs with an unknown number of SMs."""

import jax

# True while an exported program is lowered, which other machines run: then no worker of a plan may
# wait for another one, because fewer of them may run at the same time than on this machine. JAX
# keeps what it has traced with True apart from the rest.
for_any_gpu = jax.make_user_context(False)
