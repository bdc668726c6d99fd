"""Exact probability functions for JAX: logits in, no digit lost that the inputs determine."""

import importlib
from typing import TYPE_CHECKING, Any

from . import bayes as bayes
from . import bernoulli as bernoulli
from . import calibration as calibration
from . import categorical as categorical
from . import expectation as expectation
from . import gaussian as gaussian
from . import linear_categorical as linear_categorical
from . import metrics as metrics
from . import mvn as mvn
from ._checks import checkify as checkify

if TYPE_CHECKING:
    from . import mle as mle

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "mle":  # on first use: it loads optax
        return importlib.import_module(".mle", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
