"""How counts are printed: one unit for all numbers of a report, so that columns can be added up."""

from __future__ import annotations

from dataclasses import dataclass

_PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""))
_SIGNIFICANT = 6


@dataclass(frozen=True)
class Unit:
    """A unit of FLOPs and how many decimals numbers in it have.

    >>> unit = Unit.of(128_969_228_288)
    >>> f"{unit.text(19_267_584)} {unit}"
    '0.019 GFLOP'
    """

    prefix: str
    # FLOPs in one
    size: int
    decimals: int

    @classmethod
    def of(cls, largest: int | None) -> Unit:
        """The unit in which `largest`, the sum of all, has one to three digits and six in all."""
        count = max(largest or 0, 1)
        power, prefix = next(of for of in _PREFIXES if count >= 10 ** of[0])
        digits = len(str(count // 10**power))
        return cls(prefix, 10**power, max(0, _SIGNIFICANT - digits) if power else 0)

    def __str__(self) -> str:
        return f"{self.prefix}FLOP"

    def text(self, flops: int | None) -> str:
        """`flops` in this unit, without its name; "-" where unknown."""
        return "-" if flops is None else f"{flops / self.size:,.{self.decimals}f}"


def scaled(number: int | None) -> str:
    """A count that is not compared with others, with its own prefix: "4.13 G"."""
    if number is None:
        return "-"
    for power, prefix in _PREFIXES[:-1]:
        if abs(number) >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return str(number)


def percent(share: float | None) -> str:
    """A share as a percentage: "92.1 %"."""
    return "-" if share is None else f"{100 * share:.1f} %"
