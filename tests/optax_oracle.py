"""The table of `tests.laws.test_optax_table` in optax itself: ``python -m tests.optax_oracle FILE``, a process of its own.

After the equations of optax's ``optax/microbatching/_microbatching_test.py`` (github.com/google-deepmind/optax, Apache 2.0).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SIZE = 10
"""Of the batch, as in optax's tests."""
SIZES = (1, 2, 5, 10)
"""Of a micro-batch: optax wants divisors."""


def inputs() -> dict[str, np.ndarray]:
    """What both sides are given, in float64."""
    generator = np.random.default_rng(0)
    return {
        "scale": np.array(1.7),
        "first": generator.normal(size=(SIZE, 3)),
        "second": generator.normal(size=(SIZE, 3)) + 3.0,
        "params": generator.normal(size=3),
        "targets": generator.normal(size=SIZE),
    }


def flat(prefix: str, tree: Any) -> dict[str, Any]:
    """A tree of dicts and tuples as one dict, by paths."""
    if isinstance(tree, Mapping):
        return {k: v for key in tree for k, v in flat(f"{prefix}/{key}", tree[key]).items()}
    if isinstance(tree, Sequence):
        return {k: v for n, part in enumerate(tree) for k, v in flat(f"{prefix}/{n}", part).items()}
    return {prefix: tree}


def results() -> dict[str, np.ndarray]:
    """Of every case, by name and micro-batch size."""
    import jax
    import jax.numpy as jnp
    from optax import microbatching
    from optax.microbatching import AccumulationType as Type

    jax.config.update("jax_enable_x64", True)
    given = {name: jnp.asarray(value) for name, value in inputs().items()}
    scale, first, second = given["scale"], given["first"], given["second"]

    def each(a: Any, x: Any, y: Any) -> Any:
        return x * y, x / y * a

    def total(a: Any, x: Any, y: Any) -> Any:
        return jnp.sum(a + x + 2 * y, axis=0)

    def mean(a: Any, x: Any, y: Any) -> Any:
        return jnp.mean(a * x), {"key": jnp.mean(y)}

    def everything(a: Any, x: Any, y: Any) -> Any:
        return {"each": each(a, x, y), "sum": total(a, x, y), "mean": mean(a, x, y)}

    def loss(params: Any, x: Any, y: Any) -> Any:
        return 0.5 * jnp.mean((x @ params - y) ** 2)

    table: dict[str, tuple[Callable[..., Any], Any]] = {
        "each": (each, Type.CONCAT),
        "sum": (total, Type.SUM),
        "mean": (mean, Type.MEAN),
        "running mean": (mean, Type.RUNNING_MEAN),
        "everything": (everything, {"each": Type.CONCAT, "sum": Type.SUM, "mean": Type.MEAN}),
    }
    found: dict[str, Any] = {}
    for size in SIZES:
        for name, (function, way) in table.items():
            run = microbatching.microbatch(function, argnums=(1, 2), microbatch_size=size, accumulator=way)
            found |= flat(f"{name}/{size}", run(scale, first, second))

        def number(scale: Any, first: Any, size: int = size) -> Any:
            run = microbatching.microbatch(total, argnums=(1, 2), microbatch_size=size, accumulator=Type.SUM)
            return (run(scale, jnp.sin(first), second) ** 2).sum()

        found |= flat(f"gradient/{size}", jax.grad(number, (0, 1))(scale, first))
        mapped = microbatching.micro_vmap(lambda x, y: jnp.sum(x * y**2), in_axes=(0, 0), microbatch_size=size)
        found |= flat(f"vmap/{size}", mapped(first, second))
        (grads, squares), aux = microbatching.micro_grad(
            loss,
            batch_argnums=(1, 2),
            microbatch_size=size,
            transform_fn=lambda g: (g, g**2),
            metrics_fn=jnp.linalg.norm,
        )(given["params"], first, given["targets"])
        found |= flat(f"grad/{size}", (grads, squares, aux.values, aux.metrics))
    return {name: np.asarray(value) for name, value in found.items()}


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
