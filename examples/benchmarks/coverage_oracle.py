"""What zoo_coverage.py compares with: torch alone, without fxprop.

A `TorchFunctionMode` sees every product with a parameter in the untouched model. It counts their FLOPs, and
masks their output gradients by hand for the gradients that a sparse backward has to give.
"""

import contextlib
import copy
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_CONVS = {getattr(F, f"conv{d}d") for d in (1, 2, 3)}
_TRANSPOSED = {getattr(F, f"conv_transpose{d}d") for d in (1, 2, 3)}
_MATMULS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, operator.matmul}
_GROUPED = {F.grouped_mm, torch._grouped_mm}


def _operands(func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """(input, weight) where `func` is a product; for matmul both orders are tried by the caller."""
    if func is F.linear or func in _CONVS or func in _TRANSPOSED or func in _MATMULS or func in _GROUPED:
        values = [*args, *kwargs.values()]
        return values[0], kwargs.get("weight", values[1])
    if func is torch.addmm:
        return args[1], args[2]
    return (args[1], args[2]) if func is torch.einsum and len(args) == 3 else None


def _without_bias(func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict, Tensor | None]:
    """The call without its bias, whose gradient is not masked."""
    if func is torch.addmm:
        return (torch.zeros_like(args[0]), *args[1:]), kwargs, args[0]
    if func is not F.linear and func not in _CONVS:
        return args, kwargs, None
    if len(args) > 2:
        return (*args[:2], None, *args[3:]), kwargs, args[2]
    return args, {**kwargs, "bias": None}, kwargs.get("bias")


class Products(TorchFunctionMode):
    """Sees the products with parameters; `keep` masks their gradients, but those in `dense`."""

    def __init__(self, model: nn.Module, keep: float | None = None, dense: set[int] = frozenset()) -> None:
        super().__init__()
        self.weights = {id(p): (id(p), p) for p in model.parameters()}
        self.keep, self.dense = keep, dense
        self.flops = 0
        self.unmasked = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        found = _operands(func, args, kwargs)
        weight = None
        if found is not None:
            weight = next((t for t in reversed(found) if self._origin(t) is not None), None)
        if weight is not None:
            args, kwargs, bias = _without_bias(func, args, kwargs)
            result = self._product(func, found, weight, args, func(*args, **kwargs))
            if bias is None:
                return result
            return result + bias.view(-1, *(1,) * (weight.dim() - 2)) if func in _CONVS else result + bias
        result = func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        floats = [t for t in tensors if t.is_floating_point()]
        if floats and all(id(t) in self.weights for t in floats):
            origin = max(
                (self.weights[id(t)] for t in floats), key=lambda pair: (pair[1].dim(), pair[1].numel())
            )[0]
            for t in pytree.tree_leaves(result):
                if isinstance(t, Tensor) and t.is_floating_point():
                    self.weights[id(t)] = (origin, t)
        return result

    def _origin(self, tensor: Tensor) -> int | None:
        """The parameter that `tensor` is, or is computed from alone."""
        for t in (tensor, tensor._base):
            if id(t) in self.weights:
                return self.weights[id(t)][0]
        return None

    def _attention(self, func: Any, args: tuple, kwargs: dict) -> Any:
        # inside this function of Python no mode is active, but it looks up F.linear
        dense = F.linear

        def linear(*args: Any) -> Any:
            F.linear = dense
            try:
                return self.__torch_function__(dense, (), args)
            finally:
                F.linear = linear

        F.linear = linear
        try:
            return func(*args, **kwargs)
        finally:
            F.linear = dense

    def _product(self, func: Any, found: Any, weight: Tensor, args: tuple, result: Tensor) -> Tensor:
        x = found[0] if weight is found[1] else found[1]
        if func in _TRANSPOSED:
            self.flops += 2 * x.numel() * math.prod(weight.shape[1:])
        elif func is F.linear or func in _CONVS:
            self.flops += 2 * result.numel() * math.prod(weight.shape[1:])
        elif func in _GROUPED:
            self.flops += 2 * x.numel() * weight.shape[-1]
        elif func is torch.einsum:
            self.flops += 2 * _einsum_size(args[0], found)
        else:
            self.flops += 2 * result.numel() * weight.shape[-2 if weight is found[1] else -1]
        simple = func is F.linear or func in _CONVS or func is torch.addmm
        simple |= func in _MATMULS and weight is found[1] and weight.dim() == 2
        if self.keep is None or self._origin(weight) in self.dense:
            return result
        if not simple or not result.requires_grad:
            self.unmasked |= result.requires_grad
            return result
        return _masked(result, func in _CONVS, _groups(func, x, weight), self.keep)


def _einsum_size(equation: str, operands: tuple[Tensor, Tensor]) -> int:
    """The product of the sizes of all indices."""
    names = equation.replace(" ", "").partition("->")[0].split(",")
    sizes = {
        i: n for index, t in zip(names, operands, strict=True) for i, n in zip(index, t.shape, strict=True)
    }
    return math.prod(sizes.values())


def _groups(func: Any, x: Tensor, weight: Tensor) -> int:
    channel_dim = -(weight.dim() - 1)
    return x.shape[channel_dim] // weight.shape[1] if func in _CONVS else 1


def _masked(result: Tensor, conv: bool, groups: int, keep: float) -> Tensor:
    """`result`, whose gradient is set to zero outside the channels with the largest magnitudes."""
    dim = 1 if conv else -1

    def mask(grad: Tensor) -> Tensor:
        moved = grad.movedim(dim, 0)
        scores = moved.abs().flatten(1).sum(1)
        channels = len(scores)
        runs = 1 if groups == channels else groups
        n = channels // runs
        k = max(1, math.floor(keep * n + 0.5))
        kept = torch.zeros_like(scores).view(runs, n)
        kept.scatter_(1, scores.view(runs, n).topk(k, 1).indices, 1.0)
        shape = (-1,) + (1,) * (moved.dim() - 1)
        return (moved * kept.flatten().view(shape)).movedim(0, dim)

    result = result * 1
    result.register_hook(mask)
    return result


def product_flops(model: nn.Module, args: tuple, kwargs: dict) -> int:
    """Forward FLOPs of all products with parameters in the untouched model."""
    # of a copy: some models keep tensors of their last run, and could not be copied after it
    model = copy.deepcopy(model)
    with _same_buffers(model), Products(model) as products:
        _run(model, args, kwargs)
    return products.flops


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Leave running statistics as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _run(model: nn.Module, args: tuple, kwargs: dict) -> Any:
    return model(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def _tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def forward_equal(model: nn.Module, other: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether both give the same tensors to the bit, from the same random state."""
    outputs = []
    for module in (copy.deepcopy(model), other):
        torch.manual_seed(1)
        with _same_buffers(module):
            # without its graph, which for a large model is gigabytes
            outputs.append([t.detach() for t in _tensors(_run(module, args, kwargs))])
    ours, theirs = outputs
    return len(ours) == len(theirs) > 0 and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, theirs, strict=True)
    )


def _gradients(module: nn.Module, args: tuple, kwargs: dict, mode: Any) -> dict[str, Tensor]:
    torch.manual_seed(2)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with _same_buffers(module):
        with mode:
            output = _run(module, args, kwargs)
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = sum(t.square().mean() for t in _tensors(output) if t.requires_grad)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def gradients_equal(
    model: nn.Module, policy: Any, args: tuple, kwargs: dict, keep: float | None = None
) -> str:
    """Whether the sparse gradients are those of the dense model with output gradients masked by hand.

    In float64, with `keep` (by default the policy) for the masks. "equal", "DIFFER by ...", or why it was
    not compared.
    """
    keep = policy if keep is None else keep
    import fxprop

    model = copy.deepcopy(model).double()
    args, kwargs = pytree.tree_map(_as_double, (args, kwargs))
    try:
        gm, report = fxprop.transform(model, policy, args, example_kwargs=kwargs)
    except fxprop.FxpropError as error:
        return f"not in float64: {str(error)[:60]}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rewritten = {layer.name.partition("#")[0] for layer in report.layers if layer.status == "rewritten"}
    left = {layer.name.partition("#")[0] for layer in report.layers if layer.status != "rewritten"}
    if rewritten & left:
        return "not compared: a weight is used both ways"
    masked = {id(p) for name, p in parameters.items() if rewritten & {name, *_sites_of(name)}}
    mode = Products(model, keep, {id(p) for p in parameters.values()} - masked)
    expected = _gradients(model, args, kwargs, mode)
    if mode.unmasked:
        return "not compared: a product that the oracle cannot mask"
    ours = _gradients(gm, args, kwargs, contextlib.nullcontext())
    if ours.keys() != expected.keys():
        return "DIFFER in which parameters have one"
    # a bias before a batch norm has the gradient zero, up to rounding that grows with the others' size
    largest = max((grad.abs().max().item() for grad in expected.values()), default=0.0)
    if largest == 0:
        return "not compared: all gradients are zero"
    floor = 1e-6 * largest
    sizes = {name: grad.abs().max().clamp(min=floor) for name, grad in expected.items()}
    errors = [((ours[name] - expected[name]).abs().max() / sizes[name]).item() for name in ours]
    worst = max(errors, default=0.0)
    return "equal" if worst < 1e-5 else f"DIFFER by {worst:.0e}"


def _sites_of(parameter: str) -> tuple[str, ...]:
    """What the layer with this weight may be called."""
    module = parameter.partition(".parametrizations.")[0].removesuffix(".weight")
    return module, parameter.removesuffix("_weight")


def _as_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
