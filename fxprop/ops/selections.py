"""What a selection is: what it chooses from, what of it is computed, and the backward of what it keeps.

The plan, the cost model, the report and the operators ask the same object. Another selection is another
class here, and its word in `fxprop.settings.Select`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fxprop.ops.axes import Axes
from fxprop.ops.entries import available
from fxprop.ops.entries.cost import Example
from fxprop.ops.entries.run import alone_gradients, nonzero_gradients
from fxprop.ops.form import Form, Gradients, Operands
from fxprop.ops.keep import Keep
from fxprop.ops.kernels.layout import is_channels_last
from fxprop.ops.scores import RANDOM, count_of, entry_scores, scores_over
from fxprop.settings import LayerSettings, Select


class Sizes(NamedTuple):
    """Entries of a layer's input, weight and output."""

    input: float
    weight: float
    output: float


class Given(NamedTuple):
    """What a backward is given: the gradient as the form arranged it, and the operands."""

    grad: Tensor
    of: Operands
    # what the selection's `rank` gave
    ranked: Tensor | None

    @property
    def scores(self) -> Tensor:
        """Of a selection that takes some."""
        assert self.ranked is not None
        return self.ranked


class Selection(Protocol):
    """A value of `select`."""

    # what it counts: "4 of 64 channels"
    unit: str
    # whether channels are chosen, once for all examples: what else is set for those has a meaning then
    of_channels: bool
    # whether whole channels or rows are kept, so that dense products of what is left are all there is
    of_slices: bool
    # whether nothing that is not zero is dropped: then nothing is asked of k
    exact: bool
    # whether there are as many to choose from as the batch has; then k is a share in generated code
    counts_batch: bool

    def n(self, axes: Axes) -> int | None:
        """How many one choice is made from; None where shapes are not known."""

    def scored(self, axes: Axes, of: LayerSettings) -> int:
        """Entries of grad_output that are read for the scores of a layer with known shapes."""

    def select_ops(self, axes: Axes, of: LayerSettings) -> int:
        """Element operations for the scores, and one comparison per candidate.

        A norm costs two per entry (magnitude or square, and sum), a single entry's magnitude or a random
        draw one. A lower bound: top-k's own passes depend on the kernel.
        """

    def moved_by_product(self, sizes: Sizes, share: float, depthwise: bool) -> float:
        """Entries that a product of the sparse backward reads and writes. Asked only if `of_slices`."""

    def moved_once(self, sizes: Sizes, share: float) -> float:
        """Entries that gathering what is kept reads and writes."""

    def alone(self, axes: Axes) -> Example | None:
        """What an example is to loops over kept entries, if these can be run for this selection."""

    def keeps_all(self, k: int | float, n: int, example: int | None) -> bool:
        """Whether k is all of n channels, or of an example's entries, so that the dense operator is run."""

    def rank(self, form: Form, keep: Keep, grad: Tensor, of: Operands) -> Tensor | None:
        """The scores of what `grad`, as `form` arranged it, has to choose from; None if it takes none."""

    def kept(self, form: Form, keep: Keep, given: Given) -> Tensor:
        """What is kept of the gradient; zeros may stand for what is not."""

    def backward(self, form: Form, keep: Keep, given: Given, bias: torch.Size | None) -> Gradients:
        """The gradients from what is kept of the gradient; a bias's if it has a shape."""


class Channel:
    """Whole output channels for the whole batch: meProp's unified form (1706.06197, section 3.3)."""

    unit = "channels"
    of_channels = True
    of_slices = True
    exact = False
    counts_batch = False

    def n(self, axes: Axes) -> int | None:
        return axes.n

    def scored(self, axes: Axes, of: LayerSettings) -> int:
        entries, rows = axes.entries, axes.rows
        assert entries is not None
        assert rows is not None
        if of.score == RANDOM or not entries:
            return 0
        return count_of(of.score_fraction, rows) * entries // rows

    def select_ops(self, axes: Axes, of: LayerSettings) -> int:
        draws = axes.channels if of.score == RANDOM else 0
        return draws + 2 * self.scored(axes, of) + axes.channels

    def moved_by_product(self, sizes: Sizes, share: float, depthwise: bool) -> float:
        # a depthwise convolution reads and writes the kept channels of its input only
        of_input = share if depthwise else 1.0
        return share * (sizes.output + sizes.weight) + of_input * sizes.input

    def moved_once(self, sizes: Sizes, share: float) -> float:
        return 2 * share * (sizes.output + sizes.weight)

    def alone(self, axes: Axes) -> Example | None:
        return None

    def keeps_all(self, k: int | float, n: int, example: int | None) -> bool:
        return k >= n

    def rank(self, form: Form, keep: Keep, grad: Tensor, of: Operands) -> Tensor | None:
        return form.scores(grad, keep, of)

    def kept(self, form: Form, keep: Keep, given: Given) -> Tensor:
        return form.take(given.grad, form.top(given.scores, int(keep.k)), given.of)

    def backward(self, form: Form, keep: Keep, given: Given, bias: torch.Size | None) -> Gradients:
        kept, of = form.top(given.scores, int(keep.k)), given.of
        grad = form.take(given.grad, kept, of)
        grad_bias = None if bias is None else form.bias(grad, kept, of.weight, bias)
        return *form.from_kept(grad, kept, of, keep), grad_bias


class Element:
    """The top-k entries of each example: meProp's first form (1706.06197, equation 5).

    Where numba is installed, and few enough are kept, only these are computed with: see `entries`.
    Elsewhere grad_output is masked and the dense kernels run. k is capped: a smaller image than the one the
    plan was made for has fewer entries. An entry that is not finite ranks highest, except with "random".
    """

    unit = "elements"
    of_channels = False
    of_slices = False
    exact = False
    counts_batch = False

    def n(self, axes: Axes) -> int | None:
        return axes.example

    def scored(self, axes: Axes, of: LayerSettings) -> int:
        assert axes.entries is not None
        return 0 if of.score == RANDOM else axes.entries

    def select_ops(self, axes: Axes, of: LayerSettings) -> int:
        assert axes.entries is not None
        return 2 * axes.entries

    def moved_by_product(self, sizes: Sizes, share: float, depthwise: bool) -> float:
        return sum(sizes)

    def moved_once(self, sizes: Sizes, share: float) -> float:
        return 2 * sizes.output

    def alone(self, axes: Axes) -> Example | None:
        return axes.alone if available.why_not() is None else None

    def keeps_all(self, k: int | float, n: int, example: int | None) -> bool:
        return example is not None and k >= example

    def rank(self, form: Form, keep: Keep, grad: Tensor, of: Operands) -> Tensor | None:
        return None

    def kept(self, form: Form, keep: Keep, given: Given) -> Tensor:
        return mask_entries(form.examples(given.grad), keep)

    def backward(self, form: Form, keep: Keep, given: Given, bias: torch.Size | None) -> Gradients:
        grad, of = given.grad, given.of
        alone = alone_gradients(form, keep, grad, of, bias is not None)
        if alone is not None:
            pair, kept = alone
            return *pair, None if bias is None else form.bias(kept, None, of.weight, bias)
        grad = mask_entries(form.examples(grad), keep).view(grad.shape)
        pair = form.products(grad, form.arrange_input(of.input), of.weight, of)
        grad_bias = None if bias is None else form.bias(grad, None, of.weight, bias)
        return *form.restore(pair, of), grad_bias


class Row:
    """Whole rows: examples of a convolution, rows (tokens) of a product.

    The products run on the kept rows of the input and of grad_output; all others of grad_input are zero.
    A batch of matrices chooses among the rows of each. Source: VCAS (2402.19215).
    """

    unit = "rows"
    of_channels = False
    of_slices = True
    exact = False
    counts_batch = True

    def n(self, axes: Axes) -> int | None:
        return axes.rows

    def scored(self, axes: Axes, of: LayerSettings) -> int:
        assert axes.entries is not None
        return 0 if of.score == RANDOM else axes.entries

    def select_ops(self, axes: Axes, of: LayerSettings) -> int:
        assert axes.rows is not None
        candidates = axes.matrices * axes.rows
        draws = candidates if of.score == RANDOM else 0
        return draws + 2 * self.scored(axes, of) + candidates

    def moved_by_product(self, sizes: Sizes, share: float, depthwise: bool) -> float:
        return share * (sizes.output + sizes.input) + sizes.weight

    def moved_once(self, sizes: Sizes, share: float) -> float:
        # the rest of grad_input is set to zero
        return 2 * share * (sizes.output + sizes.input) + sizes.input

    def alone(self, axes: Axes) -> Example | None:
        return None

    def keeps_all(self, k: int | float, n: int, example: int | None) -> bool:
        return isinstance(k, float) and k >= 1

    def rank(self, form: Form, keep: Keep, grad: Tensor, of: Operands) -> Tensor | None:
        return scores_over(grad, tuple(range(form.rows_dim + 1, grad.dim())), keep)

    def kept(self, form: Form, keep: Keep, given: Given) -> Tensor:
        return _take_rows(given.grad, _choose_rows(keep, given.scores))

    def backward(self, form: Form, keep: Keep, given: Given, bias: torch.Size | None) -> Gradients:
        grad, of, kept = given.grad, given.of, _choose_rows(keep, given.scores)
        taken, input = _take_rows(grad, kept), form.arrange_input(of.input)
        of_kept = Operands(of.input, of.weight, form.others_of_rows(kept, of), of.needed)
        grad_input, grad_weight = form.products(taken, _take_rows(input, kept), of.weight, of_kept)
        if grad_input is not None:
            grad_input = _spread_rows(grad_input, kept, input)
        grad_bias = None
        if bias is not None:
            grad_bias = form.bias(_spread_rows(taken, kept, grad), None, of.weight, bias)
        return *form.restore((grad_input, grad_weight), of), grad_bias


class Nonzero(Element):
    """Every entry that is not zero: the gradients are the dense ones, whatever k is.

    Behind ReLU and max-pooling few are left, and loops over those can be faster than the dense kernels; how
    few they are decides at every backward. Compiled code, which cannot ask, is dense.
    """

    exact = True

    def scored(self, axes: Axes, of: LayerSettings) -> int:
        return 0

    def select_ops(self, axes: Axes, of: LayerSettings) -> int:
        assert axes.entries is not None
        return axes.entries

    def keeps_all(self, k: int | float, n: int, example: int | None) -> bool:
        return False

    def kept(self, form: Form, keep: Keep, given: Given) -> Tensor:
        return given.grad

    def backward(self, form: Form, keep: Keep, given: Given, bias: torch.Size | None) -> Gradients:
        grad, of = given.grad, given.of
        pair = nonzero_gradients(form, grad, of)
        if pair is None:
            found = form.products(grad, form.arrange_input(of.input), of.weight, of)
            pair = form.restore(found, of)
        return *pair, None if bias is None else form.bias(grad, None, of.weight, bias)


def _choose_rows(keep: Keep, scores: Tensor) -> Tensor:
    """Indices of the rows with the highest scores, of each matrix."""
    n = scores.shape[-1]
    k = min(keep.k, n) if isinstance(keep.k, int) else max(1, int(keep.k * n + 0.5))
    # in order: memory is read from its beginning to its end
    return scores.topk(k, dim=-1).indices.sort(-1).values


def _take_rows(tensor: Tensor, kept: Tensor) -> Tensor:
    """The rows `kept` [k] of a tensor, or [matrices, k] of each of its matrices, in its memory format."""
    if kept.dim() == 2:
        return tensor.gather(1, kept[..., None].expand(-1, -1, tensor.shape[2]))
    if is_channels_last(tensor):
        return tensor.movedim(1, -1).index_select(0, kept).movedim(-1, 1)
    return tensor.index_select(0, kept)


def _spread_rows(rows: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_take_rows`, zero elsewhere."""
    if kept.dim() == 2:
        return torch.zeros_like(like).scatter_(1, kept[..., None].expand_as(rows), rows)
    return torch.zeros_like(like).index_copy_(0, kept, rows)


def mask_entries(grad_output: Tensor, keep: Keep) -> Tensor:
    """`grad_output` [examples, n] with all but the top-k entries of each example set to zero."""
    scores = entry_scores(grad_output, keep)
    kept = scores.topk(min(int(keep.k), scores.shape[1]), dim=1, sorted=False).indices
    return torch.zeros_like(grad_output).scatter_(1, kept, grad_output.gather(1, kept))


SELECTIONS: dict[Select, Selection] = {
    "channel": Channel(),
    "element": Element(),
    "row": Row(),
    "nonzero": Nonzero(),
}
