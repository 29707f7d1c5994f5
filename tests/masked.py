"""What an operator of the table has to give: dense autograd, with the product's gradient masked by hand."""

import itertools

import oracle
import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def is_one_call(operator, sample, keep):
    """Whether a region's operator has a backward of its own here, or calls its layers one by one."""
    if keep.select != "channel" or keep.score not in ("l1", "l2", "random"):
        return False
    groups, out = sample.constants.get("groups", 1), sample.weight[0]
    # a choice among all, or of groups of one channel
    return groups != out and keep.count(out // groups) < out // groups


def mask_of(operator, sample, grad, keep, scored=None):
    """0/1 mask of the product's gradient."""
    features, examples = (
        lambda numbers: operator.features(numbers, sample),
        lambda numbers: operator.examples(numbers, sample),
    )
    return oracle.mask(grad, keep, features, examples, scored)


def expected(operator, sample, leaves, coefficients, keep, norm_grad="full", mask=None):
    """Gradients by name, None where none is wanted. `mask`: where it is known, as for "random"."""
    given, constants = sample.arranged(leaves), sample.constants
    with torch.enable_grad():
        product = operator.product(given, constants)
        y = operator.biased(product, given, constants).detach().requires_grad_()
        biased = operator.biased(product.detach(), given, constants)
        output = operator.after(y, given, constants)
    norm = [name for name in ("gamma", "beta") if name in leaves]
    grad, *others = torch.autograd.grad(output, [y, *(leaves[name] for name in norm)], coefficients)
    one_call = is_one_call(operator, sample, keep)
    if mask is None:
        scored = operator.scored(coefficients, output, y, leaves, keep) if one_call else None
        mask = mask_of(operator, sample, grad, keep, scored)
    if norm_grad == "kept" and one_call:
        channels = mask.movedim(1, 0).flatten(1).any(1)
        others = [other * channels for other in others]
    found = dict(zip(norm, others, strict=True))
    kept = grad * mask
    for name, of in (("input", product), ("weight", product), ("bias", biased)):
        leaf = leaves[name]
        if leaf is None:
            continue
        if not leaf.requires_grad:
            found[name] = None
            continue
        through = grad if name == "bias" and keep.bias == "full" else kept
        (found[name],) = torch.autograd.grad(of, leaf, through, retain_graph=True)
    return found


def gradients(output, leaves, coefficients):
    """Those of a backward, by name; no gradient where none was asked for."""
    tensors = {name: t for name, t in leaves.items() if isinstance(t, torch.Tensor)}
    wanted = [t for t in tensors.values() if t.requires_grad]
    found = (
        iter(torch.autograd.grad(output, wanted, coefficients, retain_graph=True)) if wanted else iter(())
    )
    return {name: next(found) if t.requires_grad else None for name, t in tensors.items()}


def features_kept(operator, sample, leaves, grad_weight):
    """Mask and numbers of the features that a weight's gradient speaks of, one after the other by autograd."""
    with torch.enable_grad():
        product = operator.product(sample.arranged(leaves), sample.constants)
    mask = torch.zeros(product.numel(), dtype=product.dtype)
    counts = []
    for run in operator.features(torch.arange(product.numel()).view(product.shape), sample):
        counts.append(0)
        for feature in range(run.shape[2]):
            places = run[..., feature].flatten()
            alone = torch.zeros(product.numel(), dtype=product.dtype)
            alone[places] = 1
            (of_feature,) = torch.autograd.grad(
                product, leaves["weight"], alone.view(product.shape), retain_graph=True
            )
            if grad_weight[of_feature != 0].any():
                mask[places] = 1
                counts[-1] += len(places) > 0
    return mask.view(product.shape), counts


def widest(operator):
    """The largest of the operator's types."""
    return operator.supports.dtypes[0]


def combinations(operator):
    """Every combination of what the operator can be told beside k."""
    taken = operator.supports.settings()
    for values in itertools.product(*taken.values()):
        yield dict(zip(taken, values, strict=True))


def as_keep(k, keywords):
    return oracle.Keep(
        k=k,
        select=keywords["select"],
        score=keywords["score"],
        bias=keywords.get("bias_grad", "full"),
        score_fraction=keywords["score_fraction"],
    )


def assert_close(found, wanted, tolerance):
    """Every gradient within `tolerance` of the largest of its entries."""
    assert found.keys() == wanted.keys()
    largest = {name: g.abs().max().item() for name, g in wanted.items() if g is not None and g.numel()}
    if "beta" in largest and "bias" in largest:
        # in front of a norm it is a sum of large terms that comes to 0
        largest["bias"] = max(largest.values())
    for name, grad in wanted.items():
        assert (found[name] is None) == (grad is None), name
        if grad is None or not grad.numel():
            continue
        scale = max(1.0, largest[name])
        ours = found[name].to_dense().to(grad.dtype)
        torch.testing.assert_close(
            ours, grad, atol=tolerance * scale, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(operator, sample, dtype, k, needs=(True, True, True), **keywords):
    """The dense output to the bit, and the gradients of the masked one."""
    leaves = sample.leaves(dtype, needs)
    output = operator.run(sample, leaves, k=k, **keywords)
    others = sample.leaves(dtype, needs)
    assert torch.equal(output, operator.run(sample, others))
    if sample.norm is not None:
        statistics = zip(leaves["norm"].buffers(), others["norm"].buffers(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in statistics)
    assert output.dtype == dtype
    coefficients = sample.coefficients(output)
    if not output.requires_grad:
        assert not any(leaf.requires_grad for leaf in leaves.values() if isinstance(leaf, torch.Tensor))
        return
    found = gradients(output, leaves, coefficients)
    assert {grad.dtype for grad in found.values() if grad is not None} <= {dtype}
    # of the same values, in the widest type
    exact = sample.leaves(dtype, needs)
    for name, leaf in exact.items():
        if isinstance(leaf, torch.Tensor):
            exact[name] = leaf.detach().double().requires_grad_(leaf.requires_grad)
    wanted = expected(
        operator,
        sample,
        exact,
        coefficients.double(),
        as_keep(k, keywords),
        keywords.get("norm_grad", "full"),
    )
    assert_close(found, wanted, TOLERANCE[dtype])
