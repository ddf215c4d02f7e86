# pyright: strict, reportMissingTypeStubs=false, reportUnknownVariableType=false
"""Statistics of paired comparisons: arrays in, frozen estimates out, no files and no state.

Every comparison of two arms is a set of differences d = value(arm) - value(control), one for each item and seed, both
arms on the same item. Items of one family are not independent, and neither are items answered by the same trained seed,
so the unit is the family (`clusters`), and the seed when there is more than one. Where the design fixes the mix of
kinds (half of the probes are answerable), `strata` keeps that mix from counting as chance. Methods:

- interval: bias-corrected and accelerated (BCa) bootstrap over clusters (Efron 1987), by scipy;
- p: sign flips of whole clusters (exact while 2^clusters is small; equal magnitudes reduce to McNemar's binomial),
  or with strata the clustered t test;
- few clusters (< FEW) or several seeds: t interval and t test on the two-way clustered variance (Cameron, Gelbach and
  Miller 2011) with Satterthwaite's degrees of freedom, because a bootstrap of a handful of units is too narrow;
- no variance at all: an exact binomial bound on the share of units that could differ, where a bootstrap would say +-0;
- many comparisons: Benjamini-Hochberg or Holm, by statsmodels;
- equivalence: two one-sided tests (TOST) against a margin.

"Not significant" is never "no regression": see `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests

Floats = NDArray[np.float64]
Verdict = Literal["improved", "regressed", "equivalent", "inconclusive"]
Method = Literal["bca", "t", "bound"]

FEW = 20  # fewer clusters than this: t instead of the bootstrap
RESAMPLES = 2000
FLIPS = 9999
_scipy = cast(Any, scipy_stats)  # scipy ships no complete types


@dataclass(frozen=True)
class Rate:
    """A share of n answers in `clusters` families, with its 95% interval."""

    n: int
    clusters: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean paired difference over `n` pairs in `clusters` clusters and `seeds` seeds; `se`, `df`: the clustered t."""

    n: int
    clusters: int
    seeds: int
    delta: float
    ci_low: float
    ci_high: float
    p: float
    se: float
    df: float
    method: Method


@dataclass(frozen=True)
class SignTest:
    """How many of k comparisons are ahead, tied and behind; p is the exact two-sided binomial over the untied."""

    ahead: int
    tied: int
    behind: int
    p: float


def paired_difference(
    differences: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any],
    seeds: Sequence[Any] | NDArray[Any] | None = None,
    strata: Sequence[Any] | NDArray[Any] | None = None,
    *,
    level: float = 0.95,
    span: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of the differences (n,), its interval and its p against zero.

    `clusters` (n,) names each pair's family (the item itself where there are no families), `seeds` (n,) its training
    seed, `strata` (n,) its stratum, whose share in the mean is fixed. `span` is the largest possible |difference|.
    Raises ValueError on no pairs, on values that are not finite, and on lengths that differ.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0:
        raise ValueError("paired_difference needs at least one pair")
    if not np.isfinite(d).all():
        raise ValueError("paired_difference got a value that is not finite: drop pairs without a value first")
    g, n_clusters = _codes(clusters, d.size)
    s, n_seeds = _codes(seeds if seeds is not None else np.zeros(d.size), d.size)
    k, n_strata = _codes(strata if strata is not None else np.zeros(d.size), d.size)
    delta = float(d.mean())
    means = np.bincount(k, weights=d) / np.bincount(k)
    se, df = _clustered_se(d - means[k], g, s, n_clusters, n_seeds, n_strata)
    cell = (k * n_clusters + g, n_strata * n_clusters)
    sums_KG = np.bincount(cell[0], weights=d, minlength=cell[1]).reshape(n_strata, n_clusters).astype(np.float64)
    counts_KG = np.bincount(cell[0], minlength=cell[1]).reshape(n_strata, n_clusters).astype(np.float64)
    sums = _total(sums_KG, 0)
    method: Method
    if se < 1e-12:
        method, se, df, p = "bound", 0.0, math.inf, sign_flip_p(sums, seed=seed)
        low, high = _bound(delta, n_clusters, level, span)
    elif n_seeds > 1 or n_clusters < FEW or int(np.count_nonzero(counts_KG, axis=1).min()) < FEW // 2:
        method, p = "t", float(2 * _scipy.t.sf(abs(delta) / se, df))
        half = float(_scipy.t.ppf(0.5 + level / 2, df)) * se
        low, high = max(-span, delta - half), min(span, delta + half)
    else:
        # flips of whole families would count the mix of kinds as chance
        p = sign_flip_p(sums, seed=seed) if n_strata == 1 else float(2 * _scipy.t.sf(abs(delta) / se, df))
        method = "bca"
        low, high = _bca(sums_KG, counts_KG, level, resamples, seed)
    return Difference(d.size, n_clusters, n_seeds, delta, low, high, p, se, df, method)


def sign_flip_p(sums: ArrayLike, *, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of the total of the cluster sums (G,) under sign flips; exact for equal magnitudes or G <= 13.

    With one binary item a cluster it is McNemar's exact test.
    """
    x = np.asarray(sums, dtype=np.float64)
    x = x[np.abs(x) > 1e-12]
    if x.size == 0:
        return 1.0
    if np.allclose(np.abs(x), abs(x[0]), rtol=1e-9):
        return float(_scipy.binomtest(int((x > 0).sum()), x.size, 0.5).pvalue)
    result = _scipy.permutation_test(
        (x,),
        _total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=flips,
        batch=max(1, 4_000_000 // x.size),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def sign_test(deltas: ArrayLike) -> SignTest:
    """Exact test of "ahead on k of m" over the signs of the deltas (m,); ties are left out of the test and reported."""
    d = np.asarray(deltas, dtype=np.float64)
    ahead, behind = int((d > 0).sum()), int((d < 0).sum())
    p = float(_scipy.binomtest(ahead, ahead + behind, 0.5).pvalue) if ahead + behind else 1.0
    return SignTest(ahead, int(d.size - ahead - behind), behind, p)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """q values (false discovery rate) of the p values (m,), in their order."""
    return _adjust(p, "fdr_bh")


def holm(p: ArrayLike) -> Floats:
    """Holm's adjusted p values (family-wise error) of the p values (m,), in their order."""
    return _adjust(p, "holm")


def clustered_rate(values: ArrayLike, clusters: Sequence[Any], seeds: Sequence[Any] | None = None) -> Rate:
    """The mean of values in 0..1 (n,), its 95% interval over families and seeds. Raises as paired_difference does."""
    # centred, so that a rate of 0 or 1 is an end of what can be and its bound is that of a binomial
    estimate = paired_difference(np.asarray(values, dtype=np.float64) - 0.5, clusters, seeds, span=0.5)
    low, high = (min(1.0, max(0.0, bound + 0.5)) for bound in (estimate.ci_low, estimate.ci_high))
    return Rate(estimate.n, estimate.clusters, estimate.delta + 0.5, low, high)


def equivalence_p(difference: Difference, margin: float, span: float = 1.0) -> float:
    """TOST: p of "the difference is at least as large as the margin". Small p: equivalent within +-margin.

    Without any variance it is the chance of having met no differing unit although a share margin / span of them differ.
    """
    if margin <= 0:
        raise ValueError(f"equivalence margin must be above 0, got {margin}")
    if difference.method == "bound":
        return (1 - min(1.0, margin / span)) ** difference.clusters if abs(difference.delta) < margin else 1.0
    above = float(_scipy.t.sf((difference.delta + margin) / difference.se, difference.df))
    below = float(_scipy.t.cdf((difference.delta - margin) / difference.se, difference.df))
    return max(above, below)


def detectable_difference(difference: Difference, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest true difference that a comparison of this spread finds significant with the given power.

    By the noncentral t distribution, with the standard error and the degrees of freedom of the estimate: few seeds that
    differ can find large differences only. None where nothing varied (method "bound"), so that no spread is known.
    """
    if difference.method == "bound":
        return None
    critical = float(_scipy.t.ppf(1 - alpha / 2, difference.df))

    def shortfall(away: float) -> float:
        return float(_scipy.nct.sf(critical, difference.df, away)) - power

    # the lower tail, which an effect of this size hardly reaches, is left out: the answer errs on the large side
    return difference.se * cast(float, brentq(shortfall, 0.0, 50 * critical))


def verdict(delta: float, q: float, equivalence: float, alpha: float = 0.05) -> Verdict:
    """One word for a comparison: significant by its adjusted q, else equivalent by TOST, else inconclusive."""
    if q <= alpha and delta != 0:
        return "improved" if delta > 0 else "regressed"
    return "equivalent" if equivalence <= alpha else "inconclusive"


def _codes(labels: Sequence[Any] | NDArray[Any], n: int) -> tuple[NDArray[np.intp], int]:
    values = np.asarray(labels)
    if values.shape != (n,):
        raise ValueError(f"paired_difference got {n} differences but labels of shape {values.shape}")
    unique, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.intp), int(unique.size)


def _total(x: Floats, axis: int = -1) -> Floats:
    return cast(Floats, x.sum(axis=axis))


def _bca(sums_KG: Floats, counts_KG: Floats, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """BCa interval over clusters of the strata's means, each weighted by its share of the pairs."""
    K, G = len(sums_KG), int(sums_KG.shape[1])
    shares = counts_KG.sum(axis=1) / counts_KG.sum()
    means = sums_KG.sum(axis=1) / counts_KG.sum(axis=1)

    def statistic(*columns: Floats, axis: int = -1) -> Floats:
        total = np.zeros(())
        for k in range(K):
            n, sums = _total(columns[K + k], axis), _total(columns[k], axis)
            # a resample that misses a stratum keeps the stratum's mean
            total = total + shares[k] * np.where(n > 0, sums / np.maximum(n, 1), means[k])
        return total

    result = _scipy.bootstrap(
        (*sums_KG, *counts_KG),
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // G),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def _clustered_se(e: Floats, g: NDArray[np.intp], s: NDArray[np.intp], G: int, S: int, K: int) -> tuple[float, float]:
    """Standard error of the mean and Satterthwaite's degrees of freedom; residuals e (n,), families g, seeds s (n,).

    Each of the K strata's means that the residuals are taken from costs the families one degree.
    """
    by_family = _cluster_variance(e, g, G)
    if S == 1:
        return math.sqrt(by_family), max(1.0, G - K)
    by_seed = _cluster_variance(e, s, S)
    cell, cells = _codes(g * S + s, e.size)
    variance = max(by_family + by_seed - _cluster_variance(e, cell, cells), by_family, by_seed)
    if variance <= 0:
        return 0.0, math.inf
    df = variance**2 / (by_family**2 / max(1, G - K) + by_seed**2 / (S - 1))
    return math.sqrt(variance), max(1.0, df)


def _cluster_variance(e: Floats, codes: NDArray[np.intp], k: int) -> float:
    """Variance of the mean when whole clusters are drawn: k/(k-1) * sum of squared cluster totals / n^2."""
    totals = np.bincount(codes, weights=e, minlength=k)
    return 0.0 if k < 2 else float(k / (k - 1) * (totals**2).sum() / e.size**2)


def _bound(delta: float, units: int, level: float, span: float) -> tuple[float, float]:
    """Interval when all units agree: other units are at most a share b (Clopper-Pearson at 0 of n), each up to span."""
    b = 1 - ((1 - level) / 2) ** (1 / units)
    return delta - b * (span + delta), delta + b * (span - delta)


def _adjust(p: ArrayLike, method: str) -> Floats:
    values = np.asarray(p, dtype=np.float64)
    if values.size == 0:
        return values
    return np.asarray(cast(Any, multipletests)(values, method=method)[1], dtype=np.float64)
