"""Exact probability functions for JAX: logits in, no digit lost that the inputs determine."""

from . import bernoulli as bernoulli
from . import categorical as categorical
from . import gaussian as gaussian
