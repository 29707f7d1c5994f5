"""Products in code that has no graph, replaced by their sparse operators as they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fxprop.ops.axes import Shapes
from fxprop.ops.catalogue import OPERATORS, arguments
from fxprop.ops.reads import Product
from fxprop.ops.selections import SELECTIONS
from fxprop.plan.decisions import Sparsity
from fxprop.tracing.observe.products import ProductMode

# parameter -> what is kept of it, by how many features there are to choose from
ProductPlan = Mapping[str, Mapping[int, Sparsity]]


class SparseProducts(ProductMode):
    """Runs the products with some parameters by their sparse operators.

    >>> with SparseProducts({"w": w}, {"w": {512: Sparsity(k=25, n=512)}}):
    ...     y = F.linear(x, w)

    A product with a number of features that the plan does not know (another part of the weight) keeps
    the same share.
    """

    def __init__(self, parameters: Mapping[str, Tensor], plan: ProductPlan) -> None:
        super().__init__(parameters, self._run)
        self._plan = plan

    def _run(self, name: str, product: Product, dense: Callable[[], Any]) -> Any:
        if name not in self._plan:
            return dense()
        operator = OPERATORS[product.op]
        shapes = tuple(product.input.shape), tuple(product.weight.shape), None
        axes = operator.axes(Shapes(*shapes, product.constants))
        if isinstance(axes, str) or product.weight.is_complex():
            return dense()
        known = self._plan[name]
        sparsity = known.get(axes.n) or next(iter(known.values()))
        keep = sparsity.keep
        if axes.n != sparsity.n and SELECTIONS[sparsity.select].of_channels:
            keep = keep.scaled(axes.n, sparsity.n)
        args, kwargs = arguments(product)
        return operator.sparse(*args, **kwargs, **keep.arguments(operator.without))
