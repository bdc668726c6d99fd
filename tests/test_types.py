"""`make test` checks types: every argument and result against its annotation."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from experiments import stats
from jprob import categorical

WRONG = {
    "rank": lambda: categorical.kl_divergence(jnp.zeros((2, 3)), jnp.zeros(3)),
    "size": lambda: categorical.kl_divergence(jnp.zeros(2), jnp.zeros(3)),
    "type": lambda: stats.bca_interval([1.0, 2.0], confidence="high"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_of_its_type(name, pytestconfig):
    """Without `--jaxtyping-packages` any other error will do."""
    checked = pytestconfig.option.jaxtyping_packages is not None
    with pytest.raises(TypeCheckError if checked else (TypeError, ValueError)):
        WRONG[name]()
