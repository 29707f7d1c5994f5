"""fxprop: make a PyTorch model's backward pass cost less, by a graph rewrite.

>>> gm, report = fxprop.transform(model, 0.05, (x,))
>>> print(report)

The folders in the order in which a model goes through them; each imports only those above it:

    settings.py   the one table of settings
    ops/          the sparse operators that stand in generated code, and all that is known of each
    plan/         the records that stages hand on, and a glossary
    policy/       sites to a plan
    tracing/      a model to graphs
    graph/        graphs to sites, a plan to rewritten graphs
    compact/      a backward that runs on part of the mini-batch
    report/       a plan to numbers, numbers to text
    pipeline/     the stages in their order: transform, estimate, layers, backend
    inspection/   code before and after, one layer explained
    training/     how much is kept over the steps
    timing/       measured times, tune and calibrate
    cli/          the commands

Where is
    what a channel is                      ops/axes.py
    what top-k ranks by                    ops/scores.py
    what is chosen, and what that costs    ops/selections.py
    the one backward                       ops/engine.py
    how batch norm's backward is cut       ops/regions/conv_batch_norm.py, with ops/kernels/batch_norm.py
    which examples enter the backward      compact/choice.py; where the cut lies: compact/cut.py
    which rule decided                     policy/policy.py, `Policy._decide`
    why a layer was left dense             policy/cost_model.py, by the numbers of policy/machine.py
    what the page shows                    report/forms/page.py, in the words of report/wording.py
"""

from fxprop import ops
from fxprop.errors import FxpropError
from fxprop.inspection.code import code_diff
from fxprop.inspection.dump import dump
from fxprop.inspection.explain import explain
from fxprop.ops.registered import register_site
from fxprop.pipeline.backend import backend
from fxprop.pipeline.set_keep import kept_examples, set_keep
from fxprop.pipeline.transform import Transformed, estimate, layers, restore, transform
from fxprop.policy.files import load_policy
from fxprop.policy.policy import Policy, Rule
from fxprop.report.report import Report
from fxprop.timing.calibrate import calibrate
from fxprop.timing.measure import measure
from fxprop.timing.measurement import Measurement
from fxprop.timing.tune import tune
from fxprop.training import schedules
from fxprop.training.fidelity import fidelity
from fxprop.training.recommend import recommend
from fxprop.training.scheduler import KeepScheduler
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
    "calibrate",
    "code_diff",
    "dump",
    "estimate",
    "explain",
    "fidelity",
    "kept_examples",
    "layers",
    "load_policy",
    "measure",
    "ops",
    "recommend",
    "register_site",
    "restore",
    "schedules",
    "set_keep",
    "transform",
    "tune",
]
