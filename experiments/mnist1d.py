"""MNIST-1D: signals of 40 numbers that stand for the ten digits. They are generated, so that nothing is downloaded.

Each digit has a template of 12 points, drawn by hand. A signal is made of it in these steps:

    pad         36 to 60 zeros follow the template
    stretch     linear interpolation, to 72 points
    scale       by a factor of .8 to 1.2
    shift       in a circle, by 0 to 47 points
    noise       smooth (deviation .25 before a Gaussian filter of width 2) on the padding, white (.02) on all points
    shear       a straight line of a rise of up to .375 either way is subtracted
    subsample   linear interpolation, to 40 points

The templates, the steps and their constants are those of the authors. The random numbers are not. So the examples
differ from those that the authors publish, and only the statistics agree.

Source: Greydanus and Kobak (2024), Scaling down deep learning with MNIST-1D, ICML; github.com/greydanus/mnist1d.
"""

import numpy as np
from scipy.ndimage import gaussian_filter1d

_DRAWN = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
_DIGITS, _LENGTH = _DRAWN.shape
_POINTS, _FEATURES = 72, 40
_PER_DIGIT = 500


def templates() -> np.ndarray:
    """The ten templates, each of deviation 1 / 6, from 0 to 0; float64[10, 12]."""
    standard = (_DRAWN - _DRAWN.mean(axis=1, keepdims=True)) / _DRAWN.std(axis=1, keepdims=True)
    return (standard - standard[:, :1]) / 6


def signals(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """5000 signals in random order, of mean 0 and deviation 1 over all: float64[5000, 40], and the digit of each."""
    draw = np.random.RandomState(np.random.PCG64(seed))  # whose stream NumPy keeps
    labels = draw.permutation(np.repeat(np.arange(_DIGITS), _PER_DIGIT))
    count = len(labels)
    padding, shift = draw.randint(36, 61, count), draw.randint(48, size=count)
    factor, rise = 0.8 + 0.4 * draw.random_sample(count), 0.75 * (draw.random_sample(count) - 0.5)
    smooth, white = 0.25 * draw.standard_normal((count, _POINTS)), 0.02 * draw.standard_normal((count, _POINTS))

    # The place of each point in the padded template, after shift and stretch.
    places = (np.arange(_POINTS) - shift[:, None]) % _POINTS * ((_LENGTH - 1 + padding) / (_POINTS - 1))[:, None]
    drawn = zip(places, templates()[labels], strict=True)
    digit = np.stack([np.interp(place, np.arange(_LENGTH), template) for place, template in drawn])  # ends in its 0
    x = np.where(places < _LENGTH, factor[:, None] * digit, gaussian_filter1d(smooth, 2, axis=1)) + white
    x -= rise[:, None] * np.linspace(-0.5, 0.5, _POINTS)
    kept = np.linspace(0, _POINTS - 1, _FEATURES)
    x = np.stack([np.interp(kept, np.arange(_POINTS), row) for row in x])
    return (x - x.mean()) / x.std(), labels
