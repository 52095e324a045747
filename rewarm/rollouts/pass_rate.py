"""Pass rates with honest error bars: several samples of one prompt are not several prompts."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rewarm.checks import at_least, in_range

Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class PassRate:
    """Mean pass rate over prompts with its 95 % interval.

    Args:
        mean: Mean over prompts of the fraction of samples that passed, in [0, 1].
        low: Lower end of the interval, in [0, 1].
        high: Upper end of the interval, in [0, 1].
        num_prompts: Number of prompts in the mean, >= 1.

    Example:
        >>> PassRate(mean=0.5, low=0.4, high=0.6, num_prompts=100).mean
        0.5
    """

    mean: float
    low: float
    high: float
    num_prompts: int


def wilson_interval(passed: float, total: int, z: float = Z_95) -> tuple[float, float]:
    """Interval for a success probability from independent trials, sound near 0 and 1 and never outside them.

    (p + z^2 / 2n -+ z * sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  p = passed / n, n = total

    Args:
        passed: Number of successes, in [0, total]; a sum of fractions will do.
        total: Number of independent trials, >= 1.
        z: Normal quantile of the wanted coverage, > 0; the default gives 95 %.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)

    Source: Wilson 1927, Journal of the American Statistical Association 22, pp. 209-212.   Differs: nothing.
    """
    at_least(1, total=total)
    in_range(f"[0, {total}]", passed=passed)
    in_range("(0, inf)", z=z)
    rate, spread = passed / total, z * z / total
    centre = rate + spread / 2
    half_width = math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    low = (centre - half_width) / (1 + spread)
    high = (centre + half_width) / (1 + spread) if passed < total else 1.0  # rounding would miss the 1
    return low, high


def pass_rate(fractions: Sequence[float], num_samples: int) -> PassRate:
    """Mean pass rate over prompts, with how far another draw of prompts and samples could move it.

    mean -+ 1.96 * s / sqrt(Q),  s^2 = sum_q (fraction_q - mean)^2 / (Q - 1)

    Samples of one prompt tend to pass or fail together, so counting Q * G independent trials would make the
    interval too narrow. The prompt is the unit: its fraction carries the spread between prompts and the noise
    of sampling alike. With one sample per prompt these are Q independent trials, and the Wilson interval is
    better. It also serves, on Q trials, for one prompt and for equal fractions, where s says nothing.

    Args:
        fractions: Fraction of samples that passed, for each prompt, in [0, 1]. Length Q >= 1; the normal
            interval wants some 30 prompts or more.
        num_samples: Samples per prompt G, >= 1.

    Returns:
        The mean with its interval, whose ends are cut at 0 and 1.

    Raises:
        ValueError: If there is no prompt, or a fraction is not a multiple of 1 / num_samples in [0, 1].

    Example:
        >>> rate = pass_rate([0.0, 0.25, 0.5, 1.0], num_samples=4)
        >>> rate.mean, round(rate.low, 4), round(rate.high, 4)
        (0.4375, 0.0191, 0.8559)

    Source: Miller 2024, arXiv:2411.00640 (questions as the unit, the central limit theorem).
    Differs: The Wilson interval where the normal one has nothing to go by (ours).
    """
    at_least(1, num_samples=num_samples)
    if not fractions:
        raise ValueError("fractions is []; it must hold at least one prompt")
    for i, fraction in enumerate(fractions):
        if not (0 <= fraction <= 1 and abs(fraction * num_samples - round(fraction * num_samples)) < 1e-4):
            raise ValueError(
                f"fractions[{i}] is {fraction}; it must be a multiple of 1/{num_samples} in [0, 1]"
            )
    total = len(fractions)
    mean = math.fsum(fractions) / total
    if num_samples == 1 or min(fractions) == max(fractions):
        return PassRate(mean, *wilson_interval(math.fsum(fractions), total), total)
    variance = math.fsum((fraction - mean) ** 2 for fraction in fractions) / (total - 1)
    half_width = Z_95 * math.sqrt(variance / total)
    return PassRate(mean, max(mean - half_width, 0.0), min(mean + half_width, 1.0), total)


def pass_rate_by_group(
    fractions: Sequence[float], groups: Sequence[Hashable], num_samples: int
) -> dict[Hashable, PassRate]:
    """Pass rate of each group of prompts, such as each level of difficulty.

    Args:
        fractions: Fraction of samples that passed, for each prompt, in [0, 1]. Length Q >= 1.
        groups: The group of each prompt. Length Q.
        num_samples: Samples per prompt G, >= 1.

    Returns:
        The groups in order of first appearance, each with its `pass_rate`.

    Raises:
        ValueError: If the lengths differ, or as in `pass_rate`.

    Example:
        >>> rates = pass_rate_by_group([1.0, 0.5, 0.0], ["easy", "easy", "hard"], num_samples=2)
        >>> {group: rate.mean for group, rate in rates.items()}
        {'easy': 0.75, 'hard': 0.0}

    Source: none (ours).   Differs: nothing.
    """
    if len(groups) != len(fractions):
        raise ValueError(f"groups has {len(groups)} entries; it must have {len(fractions)}, one per prompt")
    members: dict[Hashable, list[float]] = {}
    for fraction, group in zip(fractions, groups, strict=True):
        members.setdefault(group, []).append(fraction)
    return {group: pass_rate(values, num_samples) for group, values in members.items()}
