"""What values the settings of policies and rules may have."""

from __future__ import annotations

from typing import Any

from fxprop.errors import PolicyError
from fxprop.ops.select import get_score
from fxprop.plan import BIAS_GRADS, NORM_GRADS, SELECTS, WEIGHT_GRADS, WHENS


def check_keep(keep: Any, where: str) -> None:
    """Raise PolicyError unless `keep` is a share: a number with 0 < keep <= 1."""
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not number or not 0 < keep <= 1:  # NaN fails the comparison
        raise PolicyError(
            f"{where}: keep={keep!r}: expected a number with 0 < keep <= 1, the share of the output "
            "gradient to keep (1.0 is dense)"
        )


def check_settings(settings: Any, where: str) -> None:
    """Raise PolicyError for the first value that `settings`, a Policy or a Rule, cannot have."""
    if settings.keep is not None:
        check_keep(settings.keep, where)
    for setting in ("k", "round_to"):
        value = getattr(settings, setting)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PolicyError(f"{where}: {setting}={value!r}: expected an integer of at least 1")
    if settings.keep is not None and settings.k is not None:
        raise PolicyError(
            f"{where}: keep={settings.keep!r} and k={settings.k!r} both given: set one of them"
        )
    if settings.select is not None and settings.select not in SELECTS:
        raise PolicyError(f"{where}: select={settings.select!r}: expected one of {', '.join(SELECTS)}")
    if settings.bias is not None and settings.bias not in BIAS_GRADS:
        raise PolicyError(f"{where}: bias={settings.bias!r}: expected one of {', '.join(BIAS_GRADS)}")
    for setting in ("sync_selection", "regions"):
        value = getattr(settings, setting)
        if value is not None and not isinstance(value, bool):
            raise PolicyError(f"{where}: {setting}={value!r}: expected true or false")
    for setting, values in (("norm_grad", NORM_GRADS), ("weight_grad", WEIGHT_GRADS), ("when", WHENS)):
        value = getattr(settings, setting)
        if value is not None and value not in values:
            raise PolicyError(f"{where}: {setting}={value!r}: expected one of {', '.join(values)}")
    fraction = settings.score_fraction
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if fraction is not None and not (number and 0 < fraction <= 1):
        raise PolicyError(f"{where}: score_fraction={fraction!r}: expected a number with 0 < x <= 1")
    if settings.score is not None:
        get_score(settings.score)
