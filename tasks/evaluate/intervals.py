"""The statistics behind the gate: an interval that knows which comparisons are alike, and a rate without length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.intp]
# Comparisons that are invented, in sum, with sides exchanged: by themselves they say that length decides everything.
PRIOR = 4.0
# Keeps the coefficients of a judge that never errs finite; without a meaning otherwise.
RIDGE = 0.05


def quantile(confidence: float, clusters: float) -> float:
    """Return Student's two-sided quantile with `clusters` - 1 degrees of freedom; with many, the normal one."""
    from scipy.stats import t  # here and below: scipy takes a second to import, and flows must start at once

    return float(t.ppf(0.5 + confidence / 2, max(1.0, clusters - 1)))


def wilson(rate: float, effective: float, z: float) -> tuple[float, float]:
    """Return Wilson's score interval (Wilson 1927) of a rate seen in `effective` independent trials."""
    centre = (rate + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(rate * (1 - rate) / effective + z * z / (4 * effective**2))
    return max(0.0, round(centre - half, 12)), min(1.0, round(centre + half, 12))


def spread(rate: float, ties: float) -> float:
    """Return the variance of one outcome that is 1 or 0, or with probability `ties` 0.5, and `rate` on average."""
    return max(0.0, rate * (1 - rate) - ties / 4)


@dataclass(frozen=True)
class Estimate:
    """A rate, the variance of that, and what it rests on."""

    rate: float
    variance: float
    samples: int
    clusters: int
    ties: float
    size: float  # of a cluster: mean samples, weighted by samples

    @property
    def effective_samples(self) -> float:
        """Independent comparisons that would be as sure: never more than there are, never fewer than clusters."""
        at_most = self.samples * _ratio(self.rate * (1 - self.rate), spread(self.rate, self.ties))
        fewest = self.samples / self.size
        return min(max(_ratio(self.rate * (1 - self.rate), self.variance), fewest), max(at_most, fewest))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return Wilson's interval at the effective number of samples, with Student's quantile for few clusters."""
        return wilson(self.rate, self.effective_samples, quantile(confidence, self.samples / self.size))


def _ratio(above: float, below: float) -> float:
    return above / below if below > 1e-12 else float(above > 1e-12)


def cluster_variance(influence: Floats, codes: NDArray[np.intp]) -> float:
    """Return the variance of a sum whose terms are alike within clusters (Liang and Zeger 1986)."""
    sums = np.bincount(codes, weights=influence)
    return float(len(sums) / max(1, len(sums) - 1) * (sums**2).sum())


def estimate_mean(outcomes: Floats, clusters: Sequence[str] | Places) -> Estimate:
    """Return the mean outcome; its variance knows that comparisons of one cluster are alike (Kish's design effect)."""
    return _estimate(float(outcomes.mean()), (outcomes - outcomes.mean()) / len(outcomes), outcomes, clusters)


def _estimate(rate: float, influence: Floats, outcomes: Floats, clusters: Sequence[str] | Places) -> Estimate:
    codes = np.unique(clusters, return_inverse=True)[1]
    sizes = np.bincount(codes).astype(float)
    return Estimate(
        rate=rate,
        variance=cluster_variance(influence, codes),
        samples=len(outcomes),
        clusters=len(sizes),
        ties=float((outcomes == 0.5).mean()),
        # Clusters of unequal size count as fewer, equal ones: Carter, Schnepel and Steigerwald 2017.
        size=float((sizes**2).sum() / sizes.sum()),
    )


def estimate_without_length(outcomes: Floats, lengths: Floats, clusters: Sequence[str]) -> Estimate:
    """Return the mean outcome, had the new adapter's samples been as often longer than the other's as shorter.

    A logistic regression of the outcome on the difference in length, after Dubois et al. 2024 (arXiv 2404.04475). The
    length terms are odd: exchanging the sides turns their sign, so a judge that looks at length only is described
    with nothing left over, whether any difference counts or only a large one. The fit is then averaged over each
    comparison and the same one with the difference turned round (standardisation, Robins 1986), which is 0.5 for such
    a judge and the raw rate where lengths do not matter. Where the samples are all longer, nothing tells length from
    merit: a few invented comparisons (`PRIOR`) then pull the rate to 0.5, and it proves nothing. A prompt's
    difficulty is no term of its own, as one pair of adapters cannot tell it from the prompt's lengths; the interval,
    which knows that samples of a prompt are alike, carries it. `lengths` has the SFT adapter's sample first.
    """
    # Where an adapter wrote nothing, silence decided and not length: there the outcome stands.
    spoken = (lengths.min(axis=1) > 0).astype(np.float64)
    if not spoken.any():
        return estimate_mean(outcomes, clusters)
    odd = _length_terms(lengths)
    turned = np.column_stack([np.ones(len(odd)), -odd])
    terms = np.column_stack([np.ones(len(odd)), odd])
    # As many as there are at most, or they would outvote the few there are.
    weights = np.concatenate([spoken, spoken * min(1.0, PRIOR / spoken.sum())])
    coefficients, hessian = _fit_logistic(np.vstack([terms, turned]), np.concatenate([outcomes, 1 - outcomes]), weights)
    here, there = _logistic(terms @ coefficients), _logistic(turned @ coefficients)
    standard = np.where(spoken > 0, (here + there) / 2, outcomes)
    slope = (terms * (here * (1 - here))[:, None] + turned * (there * (1 - there))[:, None]) * spoken[:, None] / 2
    scores = terms * ((outcomes - here) * spoken)[:, None]
    influence = (standard - standard.mean()) / len(odd) + scores @ np.linalg.solve(hessian, slope.mean(axis=0))
    return _estimate(float(standard.mean()), influence, outcomes, clusters)


def _length_terms(lengths: Floats) -> Floats:
    """Return what changes its sign with the sides: who is longer, by how much (bounded), and by what factor."""
    difference = lengths[:, 1] - lengths[:, 0]
    scale = math.sqrt(float((difference**2).mean())) or 1.0
    factor = np.log((lengths[:, 1] + 1) / (lengths[:, 0] + 1))
    return np.column_stack([np.sign(difference), np.tanh(difference / scale), factor])


def _logistic(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -500, 500))), dtype=np.float64)


def _fit_logistic(terms: Floats, outcomes: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the coefficients and the Hessian of a weighted logistic regression, by Newton's method."""
    count = terms.shape[1]
    penalty = np.diag([1e-6] + [RIDGE] * (count - 1))
    coefficients = np.zeros(count)
    for _ in range(200):
        fitted = _logistic(terms @ coefficients)
        hessian = (terms.T * (weights * fitted * (1 - fitted))) @ terms + penalty
        step = np.linalg.solve(hessian, terms.T @ (weights * (outcomes - fitted)) - penalty @ coefficients)
        step *= min(1.0, 2 / max(1e-12, float(np.abs(step).max())))
        coefficients += step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients, hessian
