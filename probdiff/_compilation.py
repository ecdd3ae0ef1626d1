"""Options of XLA for large programs, on CPU: a quicker compiler, and the widest vectors of the machine.

The backend optimises at level 2, not 3, which takes about 0.7 of the time for a program about 4 % slower; it prefers vectors of 512 bits, not 256, where the
machine has them, which gains as much (docs/results/benchmark.md). Results are the same up to rounding. Options that the user has set in ``XLA_FLAGS`` are kept.
"""

import os

OPTIONS = {"xla_backend_optimization_level": 2, "xla_cpu_prefer_vector_width": 512}


def compiler_options() -> dict[str, int]:
    """The options for ``jax.jit``, or ``compile``, of a program that is not part of another."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.items() if name not in flags}


def set_compiler_options() -> None:
    """Set the options for all programs of this process; XLA reads ``XLA_FLAGS`` when JAX is first used."""
    added = [f"--{name}={value}" for name, value in compiler_options().items()]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *added]).strip()
