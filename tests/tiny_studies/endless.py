"""Endless: one record, and then a call into XLA that does not return while anyone waits."""

from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import msgspec

from experiments.findings import Section
from experiments.results import Progress, Record


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The place to hang."""

    inside: Literal["compilation", "execution"]


def run(config: Config) -> Iterator[Record | Progress]:
    yield Record({"piece": 1}, {"value": 1.0})
    if config.inside == "execution":
        yield Progress(0.5, "executing")
        jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, jnp.zeros((), jnp.int32)).block_until_ready()
    lowered = jax.jit(_unrolled).lower(jnp.ones((4, 4)))
    yield Record({"piece": 2}, {"value": 2.0})
    lowered.compile()


def _unrolled(x: jax.Array) -> jax.Array:
    for index in range(1_500):  # a minute of compilation, after a second of tracing
        x = jnp.sort(jnp.tanh(x @ x) + index, axis=0)
    return x


def report(config: Config, records: Sequence[Record]) -> Section:
    raise AssertionError("it never ends")
