"""Exact probability functions for JAX: logits in, no digit lost that the inputs determine."""

from . import bayes as bayes
from . import bernoulli as bernoulli
from . import calibration as calibration
from . import categorical as categorical
from . import expectation as expectation
from . import gaussian as gaussian
from . import linear_categorical as linear_categorical
from . import metrics as metrics
from . import mvn as mvn
