"""Maximum likelihood: params, data and an optax optimizer in, fitted params out.

The user writes one pure function `nll(params, batch, key) -> Array[batch]`: the negative log-likelihood per example.
`init` makes the state of a run, `step` takes one step, and `run` takes many over shuffled minibatches; all are pure, so
that `jax.vmap` trains any number of seeds, initial params or learning rates at once. `fit` is `run` for a person: with
progress, checkpoints and an orderly end. For small problems there are `fit_full_batch`, to the bottom by L-BFGS, and
`covariance`, the standard errors of what was fitted.
"""

from .driver import Result as Result
from .driver import fit as fit
from .full_batch import Covariance as Covariance
from .full_batch import FullBatchFit as FullBatchFit
from .full_batch import covariance as covariance
from .full_batch import fit_full_batch as fit_full_batch
from .loop import Best as Best
from .loop import History as History
from .loop import Metrics as Metrics
from .loop import State as State
from .loop import init as init
from .loop import run as run
from .loop import step as step
from .precision import MasterWeights as MasterWeights
from .precision import master_weights as master_weights
