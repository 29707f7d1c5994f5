"""The checks after every rewrite: each is shown to fail on a wrong graph or module."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxprop
from fxprop.errors import RewriteError
from fxprop.graph.find_sites import find_sites
from fxprop.graph.rewrite import rewrite
from fxprop.graph.verify import verify_graph, verify_state
from fxprop.tracing.module.copy_tree import copy_tree
from fxprop.tracing.module.traced_module import TracedModule
from fxprop.tracing.parts import trace_model


@pytest.fixture
def parts():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    traced = trace_model(model, "symbolic", None)
    plan = fxprop.Policy(keep=0.5).resolve(find_sites(traced, True, None))
    return model, traced.pieces[""], plan.rewritten


def test_a_right_rewrite_passes(parts):
    model, traced, plan = parts
    after = rewrite(traced.graph, plan)
    verify_graph(traced.graph, after, plan)
    verify_state(model, TracedModule(copy_tree(model), {True: after, False: after}, "M"))


def test_a_malformed_graph(parts):
    _, traced, plan = parts
    after = rewrite(traced.graph, plan)
    first = next(n for n in after.nodes if n.op == "call_function")
    first.append(next(n for n in after.nodes if n.op == "placeholder"))
    with pytest.raises(RewriteError, match="malformed"):
        verify_graph(traced.graph, after, plan)


def test_another_output(parts):
    _, traced, plan = parts
    after = rewrite(traced.graph, plan)
    output = next(n for n in after.nodes if n.op == "output")
    output.args = (next(n for n in after.nodes if n.op == "call_function"),)
    with pytest.raises(RewriteError, match="changed the graph's outputs"):
        verify_graph(traced.graph, after, plan)


def test_another_placeholder(parts):
    _, traced, plan = parts
    after = rewrite(traced.graph, plan)
    with after.inserting_before(next(iter(after.nodes))):
        after.placeholder("more")
    with pytest.raises(RewriteError, match="changed the graph's placeholders"):
        verify_graph(traced.graph, after, plan)


def test_a_site_that_was_not_rewritten(parts):
    _, traced, plan = parts
    fewer = plan[1:]
    with pytest.raises(RewriteError, match=r"2 sites were planned and 1 rewritten.*_0"):
        verify_graph(traced.graph, rewrite(traced.graph, fewer), plan)


def test_a_plan_for_another_graph(parts):
    _, traced, plan = parts
    first = plan[0]
    wrong = (replace(first, site=replace(first.site, node="nowhere")),)
    with pytest.raises(RewriteError, match="has no node 'nowhere'"):
        rewrite(traced.graph, wrong)


def test_copied_missing_and_reordered_parameters(parts):
    model, traced, _ = parts
    graphs = traced.fx_graphs
    with pytest.raises(RewriteError, match="a copy of '0.weight'"):
        verify_state(model, TracedModule(copy.deepcopy(model), graphs, "M"))
    shorter = nn.Sequential(*list(model)[:-1])
    with pytest.raises(RewriteError, match="named_parameters have other names"):
        verify_state(shorter, TracedModule(copy_tree(model), graphs, "M"))
    tree = copy_tree(model)
    tree.register_buffer("more", torch.ones(1))
    with pytest.raises(RewriteError, match="named_buffers have other names"):
        verify_state(model, TracedModule(tree, graphs, "M"))


def test_the_graph_given_is_not_touched(parts):
    _, traced, plan = parts
    before = str(traced.graph)
    rewrite(traced.graph, plan)
    assert str(traced.graph) == before
