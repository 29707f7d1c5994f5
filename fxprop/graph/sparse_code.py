"""Products in code that has no graph: to sites, and to modules that replace them as they are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from fxprop.errors import ModelError
from fxprop.graph.context import with_axes
from fxprop.graph.read_functions import type_names
from fxprop.graph.sparse_products import ProductPlan, SparseProducts
from fxprop.plan.sites import CALL, Site
from fxprop.tracing.module.generated_class import make_class
from fxprop.tracing.observe.records import USED, ProductCall, TensorInfo


def product_site(root: nn.Module, call: ProductCall) -> Site:
    """The site of a product with a parameter that a module's own code computes."""
    product, weight = call.product, call.product.weight
    assert isinstance(weight, TensorInfo)
    owner_path, _, attribute = call.parameter.rpartition(".")
    site = Site(
        name=call.parameter.removesuffix(".weight"),
        op=product.op,
        node=CALL + call.parameter,
        graph=call.module,
        types=type_names(type(root.get_submodule(owner_path))) if attribute == "weight" else (),
        source=call.source,
    )
    inside = not call.module or call.parameter.startswith(f"{call.module}.")
    if not inside:
        return replace(site, skip=f"the code of {call.module!r} uses it, which does not hold it")
    if call.used:
        return replace(site, skip=USED)
    return with_axes(site, product.input, weight, call.output, product.constants, call.reached)


def parameter_of(site: Site) -> str:
    """The parameter of such a site, named as in the module whose code uses it."""
    return site.node.removeprefix(CALL).removeprefix(f"{site.graph}." if site.graph else "")


class SparseCode(nn.Module):
    """A module whose own code runs as written, with some of its products in their sparse form.

    Mixed into the class of the module it is installed on.
    """

    _fx_sparse: ProductPlan
    _fx_dense_class: type[nn.Module]
    # a forward that was put on the instance, which would hide the class's
    _fx_own_forward: Callable[..., Any] | None

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass  # a user's, further up, might want arguments, or keep a registry

    @staticmethod
    def fx_install(module: nn.Module, plan: ProductPlan) -> None:
        """Make the products of `module`'s code with the parameters in `plan` sparse."""
        if isinstance(module, SparseCode):
            raise ModelError(f"{type(module).__name__} was already transformed by fxprop")
        module.__dict__["_fx_sparse"] = plan
        module.__dict__["_fx_dense_class"] = type(module)
        module.__dict__["_fx_own_forward"] = module.__dict__.pop("forward", None)
        module.__class__ = _class_for(cast(Hashable, type(module)))

    def fx_uninstall(self) -> None:
        """Be an ordinary module again."""
        del self.__dict__["_fx_sparse"]
        own_forward = self.__dict__.pop("_fx_own_forward")
        if own_forward is not None:
            self.__dict__["forward"] = own_forward
        self.__class__ = self.__dict__.pop("_fx_dense_class")

    def fx_sparse_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's forward, with the products of the plan replaced."""
        # all of them: a weight may be computed from its own parameter and others, such as a gain
        # (one with several names goes by the plan's)
        parameters = dict(self.named_parameters())
        every = dict(self.named_parameters(remove_duplicate=False))
        parameters |= {name: every[name] for name in self._fx_sparse if name in every}
        with SparseProducts(parameters, self._fx_sparse):
            if self._fx_own_forward is not None:
                return self._fx_own_forward(*args, **kwargs)
            return self._fx_dense_class.forward(self, *args, **kwargs)

    def extra_repr(self) -> str:
        """The parameters whose products are sparse, with what is kept."""
        kept = ", ".join(
            f"{name}: {s.amount}/{s.n} {s.select}"
            for name, of in self._fx_sparse.items()
            for s in of.values()
        )
        own = self._fx_dense_class.extra_repr(self)
        return ", ".join(filter(None, (own, f"sparse products: {kept}")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = ("_fx_sparse", "_fx_dense_class", "_fx_own_forward")
        state = {key: value for key, value in vars(self).items() if key not in own}
        if self._fx_own_forward is not None:
            state["forward"] = self._fx_own_forward
        return _rebuild, (self._fx_dense_class, state, self._fx_sparse)


@functools.lru_cache(maxsize=1024)  # torch.compile tells modules apart by their class
def _class_for(base: Any) -> type[nn.Module]:
    """`base` with a sparse forward, of the same signature and under the same name."""

    @functools.wraps(base.forward)
    def forward(self: SparseCode, *args: Any, **kwargs: Any) -> Any:
        return self.fx_sparse_forward(*args, **kwargs)

    own = {"forward": forward, "__module__": base.__module__}
    made: type[nn.Module] = make_class(base.__name__, (SparseCode, base), own)
    return made


def _rebuild(base: type[nn.Module], state: Mapping[str, Any], plan: ProductPlan) -> nn.Module:
    module = base.__new__(base)
    module.__dict__.update(state)
    SparseCode.fx_install(module, plan)
    return module
