"""The settings of policies, rules and operators: the one table, which everything that has settings reads.

Policy, Rule, policy files, the command line, `explain`, the operators' keywords and the guide's table all
follow `SETTINGS`. The classes beside it give the same names their types; tests/test_settings.py holds them
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Required, TypedDict, get_args

from fxprop.errors import PolicyError

Select = Literal["channel", "element", "row", "nonzero"]
BiasGrad = Literal["full", "selected"]
NormGrad = Literal["full", "kept"]
WeightGrad = Literal["dense", "row_sparse"]
When = Literal["faster", "always"]
ExamplesSelect = Literal["importance", "top", "random"]


class Layer(Protocol):
    """What the table asks of a layer: see `fxprop.plan.Site`."""

    @property
    def can_be_row_sparse(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What is set for one layer, besides how much is kept of it."""

    select: Select = "channel"
    score: str = "l1"
    bias: BiasGrad = "full"
    sync_selection: bool = False
    score_fraction: float = 1.0
    norm_grad: NormGrad = "full"
    weight_grad: WeightGrad = "dense"
    score_weight: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings(LayerSettings):
    """What a policy sets for every layer."""

    keep: float | None = None
    k: int | None = None
    keep_input: float | None = None
    keep_weight: float | None = None
    round_to: int = 1
    regions: bool = True
    when: When = "faster"


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """What a policy sets for the mini-batch, whatever the layer."""

    examples: float | Literal["auto"] = 1.0
    examples_select: ExamplesSelect = "importance"
    examples_least: float = 0.15
    examples_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """What a rule sets for the layers that it matches; None leaves it to the policy."""

    keep: float | None = None
    k: int | None = None
    keep_input: float | None = None
    keep_weight: float | None = None
    select: Select | None = None
    score: str | None = None
    round_to: int | None = None
    bias: BiasGrad | None = None
    sync_selection: bool | None = None
    score_fraction: float | None = None
    regions: bool | None = None
    norm_grad: NormGrad | None = None
    weight_grad: WeightGrad | None = None
    score_weight: bool | None = None
    when: When | None = None


class KeepArgs(TypedDict, total=False):
    """The keywords that every sparse operator takes; see `fxprop.ops.conv2d`."""

    k: Required[int | float]
    select: Select
    score: str
    bias_grad: BiasGrad
    sync_selection: bool
    score_fraction: float
    norm_grad: NormGrad
    weight_grad: WeightGrad
    score_weight: bool
    k_input: int | float
    k_weight: int | float
    chained: bool


def _never(layer: Layer, settings: LayerSettings) -> str | None:
    return None


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    default: Any
    # what it may be, as errors and the guide say it, and whether a value is that
    values: str
    check: Callable[[Any], bool]
    meaning: str
    # the operators' keyword; None where it is the plan's alone
    keyword: str | None = None
    # its values, where they are a few words
    choices: tuple[str, ...] = ()
    # why it does not apply to a layer; there the plan drops it, and says so
    meaningless: Callable[[Layer, LayerSettings], str | None] = _never

    def read(self, text: str) -> Any:
        """A value as the command line gives it; what is not a number stays text, which `check` judges."""
        kind = float if self.default is None else type(self.default)
        try:
            return kind(text) if kind in (int, float) else text
        except ValueError:
            return text


def _choice(name: str, kind: Any, meaning: str, keyword: str | None, meaningless: Any = _never) -> Setting:
    words: tuple[str, ...] = get_args(kind)
    values = f"one of {', '.join(words)}"
    return Setting(name, words[0], values, words.__contains__, meaning, keyword, words, meaningless)


def _switch(
    name: str, default: bool, meaning: str, keyword: str | None, meaningless: Any = _never
) -> Setting:
    return Setting(
        name, default, "true or false", lambda v: isinstance(v, bool), meaning, keyword, (), meaningless
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    # NaN fails the comparison
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(0 < value <= 1)


def _is_part(value: Any) -> bool:
    return (value == 0 and not isinstance(value, bool)) or _is_share(value)


def _of_channels(layer: Layer, settings: LayerSettings) -> str | None:
    return None if settings.select == "channel" else "it applies to select='channel' only"


def _of_channel_norms(layer: Layer, settings: LayerSettings) -> str | None:
    ranks_norms = settings.select == "channel" and settings.score == "l2"
    return None if ranks_norms else "it applies to select='channel' with score='l2' only"


def _of_rows(layer: Layer, settings: LayerSettings) -> str | None:
    kept_are_rows = settings.select == "channel" and layer.can_be_row_sparse
    return None if kept_are_rows else "what is kept is not rows of a parameter"


SETTINGS = (
    Setting(
        "keep",
        None,
        "a number with 0 < keep <= 1, the share of the output gradient to keep (1.0 is dense)",
        _is_share,
        "how much is kept: k = max(1, floor(keep·n + 0.5)) of n",
    ),
    Setting(
        "k",
        None,
        "an integer of at least 1",
        _is_count,
        "how many are kept, instead of `keep`; k = n is dense",
        "k",
    ),
    Setting(
        "keep_input",
        None,
        "a number with 0 <= x <= 1; default as keep, or k",
        _is_part,
        "how much is kept in computing the gradient of the layer's input; with 0 nothing upstream gets a "
        "gradient through it ([more](#a-share-for-each-gradient))",
        "k_input",
    ),
    Setting(
        "keep_weight",
        None,
        "a number with 0 <= x <= 1; default as keep, or k",
        _is_part,
        "how much is kept in computing the weight's gradient; with 0 it gets none, like a frozen weight",
        "k_weight",
    ),
    _choice(
        "select",
        Select,
        "whole output channels for the whole batch (meProp's unified form); the top-k entries of each "
        "example; whole rows: examples of a convolution, tokens of a linear layer; or, whatever `keep` "
        "says, every entry that is not zero: the dense gradients, faster where few are left "
        "([more](single-entries.md))",
        "select",
    ),
    Setting(
        "score",
        "l1",
        "one of l1, l2, random, or a name given to fxprop.ops.register_score",
        lambda v: isinstance(v, str),  # the names are known to the operators
        "what top-k ranks by; `fxprop.ops.register_score` adds one",
        "score",
    ),
    Setting("round_to", 1, "an integer of at least 1", _is_count, "rounds k up to a multiple"),
    _choice(
        "bias",
        BiasGrad,
        "bias gradient from the whole output gradient, as in meProp's code, or from what was kept",
        "bias_grad",
    ),
    _switch(
        "sync_selection",
        False,
        "sums the scores over all processes of `torch.distributed`",
        "sync_selection",
        _of_channels,
    ),
    Setting(
        "score_fraction",
        1.0,
        "a number with 0 < x <= 1",
        _is_share,
        "computes scores from this share of the batch (an approximation)",
        "score_fraction",
        (),
        _of_channels,
    ),
    _switch(
        "regions",
        True,
        "one backward for a convolution with its norm and activation, or a linear layer with its "
        "activation ([regions](how-it-works.md#regions))",
        None,
    ),
    _choice(
        "norm_grad",
        NormGrad,
        "in a region, batch norm's own gradients for all channels, or for kept ones only",
        "norm_grad",
    ),
    _choice(
        "weight_grad",
        WeightGrad,
        "weight gradients as sparse tensors with the kept rows "
        "([more](training-stack.md#row-sparse-weight-gradients))",
        "weight_grad",
        _of_rows,
    ),
    _switch(
        "score_weight",
        False,
        "for the input's gradient, ranks channels by the norm of the output gradient times that of the "
        "channel's weight, of what its absence costs",
        "score_weight",
        _of_channel_norms,
    ),
    _choice(
        "when",
        When,
        "whether layers that a cost model expects not to gain stay dense, with the reason in the report",
        None,
    ),
)
# of the policy as a whole; no rule has them
OF_EXAMPLES = (
    Setting(
        "examples",
        1.0,
        "a number with 0 < examples <= 1, or 'auto'",
        lambda v: v == "auto" or _is_share(v),
        "the share of the mini-batch's examples whose gradient enters the backward, chosen where it "
        'arrives at the model\'s outputs, or at what enters its loss; `"auto"` follows the spread of the '
        "examples' gradient norms ([more](part-of-the-batch.md))",
    ),
    _choice(
        "examples_select",
        ExamplesSelect,
        "how they are chosen: drawn by the norm of each one's gradient, and weighted so that the mean "
        "gradient stays; the largest, not weighted; or any, weighted alike",
        None,
    ),
    Setting(
        "examples_least",
        0.15,
        "a number with 0 < x <= 1",
        _is_share,
        'the least share that `"auto"` chooses',
    ),
    Setting(
        "examples_factor",
        1.0,
        "a number above 0",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and bool(0 < v < float("inf")),
        '`"auto"` keeps this over 1 + (deviation / mean of the norms)²',
    ),
)
NAMES = tuple(setting.name for setting in SETTINGS)
# those that say how much is kept
AMOUNTS = ("keep", "k", "keep_input", "keep_weight")
EXAMPLE_NAMES = tuple(setting.name for setting in OF_EXAMPLES)
OF_LAYERS = tuple(s for s in SETTINGS if s.name in LayerSettings.__dataclass_fields__)

# the words that operators' keywords may be
CHOICES = {setting.keyword: setting.choices for setting in OF_LAYERS if setting.keyword and setting.choices}


def check(name: str, value: Any, where: str) -> None:
    """Raise PolicyError unless the setting `name` may have this value."""
    setting = (*SETTINGS, *OF_EXAMPLES)[(*NAMES, *EXAMPLE_NAMES).index(name)]
    if not setting.check(value):
        raise PolicyError(f"{where}: {name}={value!r}: expected {setting.values}")


def check_all(settings: Settings | RuleSettings, where: str) -> None:
    """Raise PolicyError for the first value that `settings` cannot have."""
    for name in (*NAMES, *(EXAMPLE_NAMES if isinstance(settings, ExampleSettings) else ())):
        if getattr(settings, name) is not None:
            check(name, getattr(settings, name), where)
    if settings.keep is not None and settings.k is not None:
        raise PolicyError(
            f"{where}: keep={settings.keep!r} and k={settings.k!r} both given: set one of them"
        )


def of_layer(settings: Settings, layer: Layer) -> tuple[LayerSettings, tuple[str, ...]]:
    """The settings that apply to a layer, and what was dropped, with the reason."""
    values, dropped = {}, []
    for setting in OF_LAYERS:
        value = getattr(settings, setting.name)
        why = None if value == setting.default else setting.meaningless(layer, settings)
        values[setting.name] = value if why is None else setting.default
        if why is not None:
            dropped.append(f"{setting.name}={value!r}: {why}")
    return LayerSettings(**values), tuple(dropped)


def keywords(settings: LayerSettings) -> Iterator[tuple[str, Any]]:
    """As keywords of an operator."""
    for setting in OF_LAYERS:
        assert setting.keyword is not None
        yield setting.keyword, getattr(settings, setting.name)


def as_markdown() -> str:
    """The table as the guide has it."""
    lines = ["| setting | values | meaning |", "|---|---|---|"]
    for setting in (*SETTINGS, *OF_EXAMPLES):
        words = setting.choices or ({"true or false": ("false", "true")}.get(setting.values, ()))
        shown = [f'`"{word}"`' if setting.choices else f"`{word}`" for word in words]
        default = f'`"{setting.default}"`' if setting.choices else f"`{str(setting.default).lower()}`"
        values = ", ".join(f"{word} (default)" if word == default else word for word in shown)
        if not shown:
            known = "" if setting.default is None else f"; default {setting.default}"
            values = setting.values.replace("<=", "≤") + known
        lines.append(f"| `{setting.name}` | {values} | {setting.meaning} |")
    return "\n".join(lines) + "\n"
