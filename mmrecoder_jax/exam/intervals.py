"""95 % bootstrap intervals over charts.

Samples of one chart stay together: a resample draws charts. A mean over some of the samples (those
whose first turn executes) is a ratio of two sums, and so it is in every resample. Two policies are
compared by the same draws, so that what charts have in common goes out.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
      mean: NaN where there is no value.
      low, high: of the 95 % interval.
      count: values.
    """

    mean: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, float | int | None]:
        """NaN, which JSON does not have, as null."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        return {
            **{name: None if math.isnan(x) else x for name, x in numbers.items()},
            "count": self.count,
        }


@dataclasses.dataclass(frozen=True)
class Sums:
    """Values by chart: their sum and how many there are; NaN are no values."""

    total: Float[np.ndarray, " charts"]
    count: Float[np.ndarray, " charts"]

    @classmethod
    def of(
        cls, values: Float[np.ndarray, " samples"], chart: Int[np.ndarray, " samples"], charts: int
    ) -> "Sums":
        """Of values, each of which is of the chart of this number."""
        known = ~np.isnan(values)
        return cls(
            np.bincount(chart[known], values[known], charts).astype(float),
            np.bincount(chart[known], minlength=charts).astype(float),
        )

    @property
    def mean(self) -> float:
        count = self.count.sum()
        return float(self.total.sum() / count) if count else math.nan

    def resampled(self, picks: Int[np.ndarray, "resamples charts"]) -> np.ndarray:
        """The mean in each resample, NaN where it has no value."""
        counts = self.count[picks].sum(1)
        with np.errstate(invalid="ignore"):
            return self.total[picks].sum(1) / counts


def _picks(charts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, charts, (RESAMPLES, charts))


def estimate(sums: Sums, seed: int = 0) -> Estimate:
    """The mean over all values, with its interval over charts."""
    count = int(sums.count.sum())
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    means = sums.resampled(_picks(len(sums.total), seed))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return Estimate(sums.mean, float(low), float(high), count)


def difference(one: Sums, other: Sums, seed: int = 0) -> Estimate:
    """The mean of `other` minus that of `one`, whose charts are the same in the same order.

    Its count is that of the charts.
    """
    charts = len(one.total)
    if not one.count.any() or not other.count.any():
        return Estimate(math.nan, math.nan, math.nan, 0)
    picks = _picks(charts, seed)
    gains = other.resampled(picks) - one.resampled(picks)
    low, high = np.nanpercentile(gains, [2.5, 97.5])
    return Estimate(other.mean - one.mean, float(low), float(high), charts)


def over_seeds(means: Float[np.ndarray, " seeds"]) -> Estimate:
    """The mean of runs that differ in their seed alone, with Student's 95 % interval; none for a
    single run.
    """
    count = len(means)
    mean = float(means.mean())
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf(0.975, count - 1) * means.std(ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)
