"""The efficiency of squared error: the sandwich against published values and draws, and verdicts that can fail."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from experiments import plots
from experiments.results import Record
from experiments.studies import efficiency

CONFIG = efficiency.Config(coefficients=[1.0, 8.0], num_examples=[500], flipped=0.05, replications=400)


@pytest.mark.parametrize(("coefficient", "want"), [(1e-3, 1.0), (1.0, 0.92), (8.0, 0.56)])
def test_the_efficiency_is_that_of_the_sandwich(coefficient, want):
    """As the coefficient falls, p (1 - p) becomes constant, and squared error a least squares that loses nothing."""
    assert efficiency.theory(coefficient) == pytest.approx(want, abs=0.005)


@pytest.mark.parametrize("flipped", [0.0, 0.05])
@pytest.mark.parametrize("loss", efficiency.LOSSES)
def test_a_limit_is_the_minimum_of_the_expected_loss(loss, flipped):
    share = flipped + (1 - 2 * flipped) * expit(2 * efficiency.GRID)

    def expected(params):
        p = expit(params[0] * efficiency.GRID)
        each = (
            -(share * np.log(p) + (1 - share) * np.log1p(-p))
            if loss == "cross-entropy"
            else share * (1 - p) ** 2 + (1 - share) * p**2
        )
        return np.sum(efficiency.DENSITY * each)

    found = minimize(expected, [1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-15}).x[0]
    assert efficiency.limit(loss, 2.0, flipped).coefficient == pytest.approx(found, abs=1e-4)
    if not flipped:
        assert efficiency.limit(loss, 2.0, flipped).coefficient == pytest.approx(2.0, abs=1e-6)


@pytest.fixture(scope="module")
def records():
    return [record for record in efficiency.run(CONFIG) if isinstance(record, Record)]


def test_fits_vary_as_the_limit_says(records):
    """The mean of 400 fits errs by a standard error, the deviation by 1 / sqrt(800). Four of each are allowed."""
    assert len(records) == 4
    for settings, values in records:
        for loss in efficiency.LOSSES:
            assert values[f"{loss}, converged"] == 1
            if settings["coefficient"] == 1.0:
                want = efficiency.limit(loss, 1.0, settings["flipped"])
                error = np.sqrt(want.variance / 500)
                assert values[loss].mean() == pytest.approx(want.coefficient, abs=4 * error / 20 + 0.02)
                assert values[loss].std() == pytest.approx(error, rel=4 / np.sqrt(800) + 0.05)


def test_verdicts_follow_the_fits(records):
    def verdicts(change):
        changed = [Record(settings, change(settings, dict(values))) for settings, values in records]
        with plots.style():
            return [h.verdict for h in efficiency.report(CONFIG, changed).hypotheses]

    def fitted(clean_ratio, flipped_gain):
        """Squared error with the given efficiency, and nearer or farther by a factor with flipped labels."""

        def change(settings, values):
            coefficient, ce = settings["coefficient"], values["cross-entropy"]
            factor = flipped_gain if settings["flipped"] else (clean_ratio or efficiency.theory(coefficient)) ** -0.5
            return values | {"squared error": coefficient + (ce - coefficient) * factor}

        return change

    assert verdicts(fitted(None, 0.5)) == ["holds", "holds"]
    assert verdicts(fitted(1.0, 0.5)) == ["falsified", "holds"]
    assert verdicts(fitted(None, 1.5)) == ["holds", "falsified"]
