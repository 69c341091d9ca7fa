"""The inception score (arXiv 1606.03498): exp E KL(p(y|x) || p(y)), from 1 to the number of classes.

High when each picture is of one class for sure, and all classes occur. It never looks at real pictures.
Legend: N pictures, C classes, R resamples. Everything is float64.
"""

import numpy as np

Array = np.ndarray

PART = 5000
"""Pictures in a part, as in guided-diffusion's evaluator: the score is the mean over parts."""


def inception_score(probabilities: Array, part: int = PART) -> float:
    """The score of (N, C), rows adding up to 1."""
    whole = np.ones((1, len(probabilities)))
    parts = [slice(start, start + part) for start in range(0, len(probabilities), part)]
    return float(np.mean([score_resamples(probabilities[rows], whole[:, rows]) for rows in parts]))


def score_resamples(probabilities: Array, counts: Array) -> Array:
    """The score (R,) of resamples, each in one part; `counts` (R, N) says how often each row is taken.

    By KL = H(y) - H(y|x): the entropy of the mean less the mean entropy.
    """
    n = counts.sum(axis=1)
    mean = counts @ probabilities / n[:, None]
    each = counts @ _entropy(probabilities) / n
    return np.exp(_entropy(mean) - each)


def _entropy(probabilities: Array) -> Array:
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return -(probabilities * logs).sum(axis=1)
