"""fxprop: make a PyTorch model's backward pass cost less, by a graph rewrite.

>>> gm, report = fxprop.transform(model, 0.05, (x,))
>>> print(report)
"""

from fxprop import ops
from fxprop.backend import backend
from fxprop.dump import dump
from fxprop.errors import FxpropError
from fxprop.explain import explain
from fxprop.inspect import code_diff
from fxprop.ops.registered import register_site
from fxprop.policy import Policy, Rule
from fxprop.policy_files import load_policy
from fxprop.report.report import Report
from fxprop.train import schedules
from fxprop.train.keep import set_keep
from fxprop.train.measure import measure
from fxprop.train.measurement import Measurement
from fxprop.train.scheduler import KeepScheduler
from fxprop.train.tune import tune
from fxprop.transform import Transformed, estimate, layers, restore, transform
from fxprop.version import __version__

__all__ = [
    "FxpropError",
    "KeepScheduler",
    "Measurement",
    "Policy",
    "Report",
    "Rule",
    "Transformed",
    "__version__",
    "backend",
    "code_diff",
    "dump",
    "estimate",
    "explain",
    "layers",
    "load_policy",
    "measure",
    "ops",
    "register_site",
    "restore",
    "schedules",
    "set_keep",
    "transform",
    "tune",
]
