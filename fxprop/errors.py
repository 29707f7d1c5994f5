"""The errors fxprop raises: one family, one class per stage.

Each message says what was given, what was expected and what to do next. A call that raises has not
changed the model it was given.
"""


class FxpropError(Exception):
    """Base class of every error fxprop raises on purpose."""


class ModelError(FxpropError):
    """The model cannot be used as given: not a module, on several devices, transformed already."""


class InputError(FxpropError):
    """The inputs are of the wrong kind: the model cannot run on them, or its graph was made for others."""


class ValuesNeededError(InputError):
    """The model reads values of tensors, and the model or the inputs given have none."""


class TraceError(FxpropError):
    """The model cannot be turned into an fx graph."""


class PolicyError(FxpropError):
    """A policy is malformed, or does not fit the model."""


class ExamplesError(FxpropError):
    """The backward cannot run on some of the examples, or did not although it was asked to."""


class OpError(FxpropError, RuntimeError):
    """A sparse operator cannot run: bad arguments, vmap, double backward.

    A RuntimeError too, as torch raises it for its own operators.
    """


class RewriteError(FxpropError):
    """The rewritten graph failed a check: a bug in fxprop."""


class ReportError(FxpropError):
    """A report cannot be made or written."""


class CommandError(FxpropError):
    """A command-line argument names something that is not there or cannot be used."""
