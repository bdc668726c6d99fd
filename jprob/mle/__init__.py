"""Maximum likelihood: params, data and an optax optimizer in, fitted params out.

The user writes one pure function `nll(params, batch, key) -> Array[batch]`: the negative log-likelihood per example.
`init` makes the state of a run, `step` takes one step, and `run` takes many over shuffled minibatches; all are pure, so
that `jax.vmap` trains any number of seeds, initial params or learning rates at once.
"""

from .loop import Metrics as Metrics
from .loop import State as State
from .loop import init as init
from .loop import run as run
from .loop import step as step
