"""`make test` checks types: every argument and result against its annotation."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from experiments import stats
from jprob import bayes, categorical, gaussian

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


def test_a_number_may_be_an_integer():
    """`temperature=2` is what a person writes."""
    z, key = jnp.array([1.0, 2.0]), jax.random.key(0)
    assert categorical.softmax(z, temperature=0).tolist() == [0, 1]
    assert categorical.log_softmax(z, temperature=2).shape == (2,)
    assert categorical.sample(key, z, temperature=0) == 1
    assert categorical.distillation_loss(z, z, temperature=2) == 0
    assert categorical.cross_entropy(z, jnp.array(1), label_smoothing=1) > 0
    assert gaussian.nll(z, 1, 2, beta=1).shape == (2,)
    assert gaussian.entropy(1) > 0
    assert bayes.gaussian_posterior(0, 1, z, 2).loc == 0.5
    assert bayes.beta_posterior(1, 1, jnp.array([True, False])).alpha == 2
