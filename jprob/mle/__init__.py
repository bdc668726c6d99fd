"""Maximum likelihood: params, data and an optax optimizer in, fitted params out.

The user writes one pure function `nll(params, batch, key) -> Array[batch]`: the negative log-likelihood per example.
`init` makes the state of a run, `step` takes one step, and `run` takes many over shuffled minibatches; all are pure, so
that `jax.vmap` trains any number of seeds, initial params or learning rates at once. `fit` is `run` for a person: with
progress, checkpoints and an orderly end. For small problems there are `fit_full_batch`, to the bottom by L-BFGS, and
`covariance`, the standard errors of what was fitted.
"""

from .checkpoint import load_params as load_params
from .fit import Report as Report
from .fit import Result as Result
from .fit import fit as fit
from .full_batch import Covariance as Covariance
from .full_batch import FullBatchFit as FullBatchFit
from .full_batch import covariance as covariance
from .full_batch import fit_full_batch as fit_full_batch
from .loop import run as run
from .loop import step as step
from .objective import Output as Output
from .precision import MasterWeights as MasterWeights
from .precision import master_weights as master_weights
from .state import Best as Best
from .state import History as History
from .state import Metrics as Metrics
from .state import State as State
from .state import averaged_params as averaged_params
from .state import init as init
