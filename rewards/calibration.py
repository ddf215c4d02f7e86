# pyright: strict, reportMissingTypeStubs=false, reportUnknownVariableType=false
"""How far the scores of a judge or a reward model agree with people, and what a judged rate is worth after that.

Pure functions: arrays in, frozen estimates out. People's labels are 0 or 1, one for each reply, and the replies are
taken as independent. A verdict is "score >= threshold".

- agreement: Cohen's kappa with the large-sample variance of Fleiss, Cohen and Everitt (1969), by statsmodels; AUC with
  the score-type interval on Hanley and McNeil's variance (Newcombe 2006, method 5), which has a width at AUC = 1 too;
  Wilson's interval for sensitivity, specificity and each bin of the reliability curve;
- corrected_rate, "ppi": prediction-powered inference (Angelopoulos et al. 2023, Science 382) with the power tuning of
  PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv 2311.01453): the labelled replies have to be a random sample of the
  population that was judged;
- corrected_rate, "rogan-gladen": sensitivity and specificity measured elsewhere (Rogan and Gladen 1978) with the
  interval of Lang and Reiczigel (2014): the labelled replies may be of another mix of good and bad, but the judge has
  to err as often on either kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from scipy import stats as scipy_stats
from statsmodels.stats.inter_rater import cohens_kappa

Floats = NDArray[np.float64]
Method = Literal["ppi", "rogan-gladen"]

BINS = 10
_scipy, _optimize = cast(Any, scipy_stats), cast(Any, optimize)  # scipy ships no complete types


@dataclass(frozen=True)
class Estimate:
    """A value, its two-sided interval, and how many replies it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Bin:
    """Replies of like score: the range and mean of their scores, and the share that people call good."""

    lowest: float
    highest: float
    score: float
    rate: Estimate


@dataclass(frozen=True)
class Agreement:
    """A judge against labels. Sensitivity: good replies that it calls good; specificity: bad ones that it calls bad."""

    n: int
    good: int
    threshold: float
    kappa: Estimate
    auc: Estimate
    sensitivity: Estimate
    specificity: Estimate
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class CorrectedRate:
    """A rate of good replies with the judge's error in its interval.

    `judged` is the rate as the judge gives it, `weight` how much of the verdicts is used (PPI++'s lambda; 1 for
    Rogan-Gladen).
    """

    method: Method
    value: float
    low: float
    high: float
    judged: float
    n_judged: int
    n_labelled: int
    weight: float


def agreement(scores: ArrayLike, labels: ArrayLike, threshold: float, level: float = 0.95) -> Agreement:
    """Everything about scores (n,) and labels (n,) of 0 and 1. Raises ValueError unless both labels are there."""
    s, y = _pair(scores, labels)
    _both_kinds(y)
    verdicts = (s >= threshold).astype(np.float64)
    good, bad = int(y.sum()), int((1 - y).sum())
    return Agreement(
        n=y.size,
        good=good,
        threshold=threshold,
        kappa=kappa(verdicts, y, level),
        auc=auc(s, y, level),
        sensitivity=_wilson_count(int(verdicts[y == 1].sum()), good, level),
        specificity=_wilson_count(int((1 - verdicts[y == 0]).sum()), bad, level),
        reliability=reliability(s, y, level=level),
    )


def kappa(verdicts: ArrayLike, labels: ArrayLike, level: float = 0.95) -> Estimate:
    """Cohen's kappa of two 0/1 arrays (n,).

    Without any disagreement the variance is 0; then the lower end is what the exact bound on the share of
    disagreements leaves. A judge that says the same of all agrees by chance, and its interval is the whole range.
    """
    v, y = _pair(verdicts, labels)
    _both_kinds(y)
    table = [[int(((v == a) & (y == b)).sum()) for b in (0, 1)] for a in (0, 1)]
    if table[0][1] + table[1][0] == 0:
        expected = float(y.mean() ** 2 + (1 - y.mean()) ** 2)
        most = 1 - ((1 - level) / 2) ** (1 / y.size)
        return Estimate(1.0, 1 - most / (1 - expected), 1.0, y.size)
    if v.min() == v.max():
        return Estimate(0.0, -1.0, 1.0, y.size)
    found = cast(Any, cohens_kappa)(np.array(table))
    half = _z(level) * float(found.std_kappa)
    value = float(found.kappa)
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half), y.size)


def auc(scores: ArrayLike, labels: ArrayLike, level: float = 0.95) -> Estimate:
    """P(a good reply scores above a bad one), ties counted half, for scores (n,) and labels (n,)."""
    s, y = _pair(scores, labels)
    _both_kinds(y)
    good, bad = s[y == 1], s[y == 0]
    pairs = good.size * bad.size
    value = float(_scipy.mannwhitneyu(good, bad).statistic) / pairs
    z, half = _z(level), (good.size + bad.size) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return abs(theta - value) - z * math.sqrt(theta * (1 - theta) * spread / pairs)

    tiny = 1e-9  # at 0 and 1 the variance vanishes and with it the difference that the root is sought of
    solve = _optimize.brentq
    low = float(solve(excess, 0.0, min(value, 1 - tiny))) if value > tiny else 0.0
    high = float(solve(excess, max(value, tiny), 1.0)) if value < 1 - tiny else 1.0
    return Estimate(value, low, high, y.size)


def reliability(scores: ArrayLike, labels: ArrayLike, bins: int = BINS, level: float = 0.95) -> tuple[Bin, ...]:
    """The share of good replies by score, in up to `bins` bins of like size; equal scores share a bin."""
    s, y = _pair(scores, labels)
    edges = np.unique(np.quantile(s, np.linspace(0, 1, bins + 1)[1:-1]))
    codes = np.searchsorted(edges, s, side="left")
    found: list[Bin] = []
    for code in np.unique(codes):
        mine = codes == code
        rate = _wilson_count(int(y[mine].sum()), int(mine.sum()), level)
        found.append(Bin(float(s[mine].min()), float(s[mine].max()), float(s[mine].mean()), rate))
    return tuple(found)


def corrected_rate(
    judged: ArrayLike, verdicts: ArrayLike, labels: ArrayLike, method: Method = "ppi", level: float = 0.95
) -> CorrectedRate:
    """The rate of good replies in a population of which a judge has seen all and people only some.

    `judged` (N,) are the judge's verdicts on the replies without a label, `verdicts` and `labels` (n,) its verdicts and
    people's 0 or 1 on the labelled ones. For "ppi" the verdicts may be any numbers in 0..1, for "rogan-gladen" only 0
    or 1. Raises ValueError for anything else, and where the judge cannot be corrected.
    """
    f = np.asarray(judged, dtype=np.float64)
    v, y = _pair(verdicts, labels)
    if f.ndim != 1 or f.size == 0 or not ((f >= 0) & (f <= 1)).all() or not ((v >= 0) & (v <= 1)).all():
        raise ValueError("corrected_rate needs verdicts in 0..1, at least one of them on a reply without a label")
    value, low, high, weight = _ppi(f, v, y, level) if method == "ppi" else _rogan_gladen(f, v, y, level)
    return CorrectedRate(method, value, low, high, float(f.mean()), f.size, y.size, weight)


def _ppi(f: Floats, v: Floats, y: Floats, level: float) -> tuple[float, float, float, float]:
    """PPI++ (value, low, high, lambda).

    With the tuned lambda the estimate mean(y) + lambda (mean(f) - mean(v)) has the variance p(1 - p) / m, where
    m = n / (1 - rho^2 N / (N + n)) and rho correlates verdicts with labels: it is worth m labels. The interval is
    Wilson's at m, because the normal one is far too narrow where few labels are of one kind or few verdicts are wrong.
    Half a reply of each of the four kinds (good or bad, called good or bad) goes into rho, so that a judge without an
    error in the sample is not taken for one that never errs.
    """
    n, N = y.size, f.size
    weights = np.concatenate([np.ones(n), np.full(4, 0.5)])
    joint = np.cov(np.append(v, [0, 0, 1, 1]), np.append(y, [0, 1, 0, 1]), aweights=weights, ddof=0)
    weight = float(joint[0, 1] / joint[0, 0] / (1 + n / N))
    rho2 = float(joint[0, 1] ** 2 / (joint[0, 0] * joint[1, 1]))
    value = min(1.0, max(0.0, float(y.mean() + weight * (f.mean() - v.mean()))))
    low, high = _wilson(value, n / (1 - rho2 * N / (N + n)), level)
    return value, low, high, weight


def _rogan_gladen(f: Floats, v: Floats, y: Floats, level: float) -> tuple[float, float, float, float]:
    """(value, low, high, 1). Lang and Reiczigel (2014), section 2.3: two pseudo-observations for either error rate."""
    if not set(np.unique(np.concatenate([f, v])).tolist()) <= {0.0, 1.0}:
        raise ValueError("rogan-gladen needs verdicts of 0 or 1; set a threshold, or use ppi")
    _both_kinds(y)
    z, n_good, n_bad = _z(level), float(y.sum()), float((1 - y).sum())
    sensitivity, specificity = float(v[y == 1].mean()), float(1 - v[y == 0].mean())
    if sensitivity + specificity <= 1:
        raise ValueError(
            f"rogan-gladen: sensitivity {sensitivity:.2f} and specificity {specificity:.2f} are no better than chance"
        )
    value = (float(f.mean()) + specificity - 1) / (sensitivity + specificity - 1)
    sens, spec = (sensitivity * n_good + 1) / (n_good + 2), (specificity * n_bad + 1) / (n_bad + 2)
    gain = sens + spec - 1
    seen = (float(f.sum()) + z * z / 2) / (f.size + z * z)
    rate = (seen + spec - 1) / gain
    v_sens, v_spec = sens * (1 - sens) / (n_good + 2), spec * (1 - spec) / (n_bad + 2)
    middle = rate + 2 * z * z * (rate * v_sens - (1 - rate) * v_spec)
    spread = seen * (1 - seen) / (f.size + z * z) + rate**2 * v_sens + (1 - rate) ** 2 * v_spec
    half = z * math.sqrt(spread) / gain
    clip = (min(1.0, max(0.0, x)) for x in (value, middle - half, middle + half))
    value, low, high = clip
    return value, min(low, value), max(high, value), 1.0


def _pair(values: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float arrays (n,), n at least 2. Raises ValueError for labels other than 0 and 1."""
    x, y = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or y.size < 2:
        raise ValueError(f"a comparison needs a score for each of two labels or more, got {x.shape} and {y.shape}")
    if not np.isfinite(x).all() or not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("a comparison needs finite scores, and labels of 0 or 1")
    return x, y


def _both_kinds(y: Floats) -> None:
    if y.min() == y.max():
        raise ValueError(f"all {y.size} labels are {y[0]:.0f}; label good replies and bad ones")


def _wilson(p: float, n: float, level: float) -> tuple[float, float]:
    """Wilson's interval; n need not be whole."""
    z = _z(level)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def _wilson_count(k: int, n: int, level: float) -> Estimate:
    return Estimate(k / n, *_wilson(k / n, n, level), n)


def _z(level: float) -> float:
    return float(_scipy.norm.ppf(0.5 + level / 2))
