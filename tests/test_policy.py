"""Policies: matching, precedence (one test per pair), k, errors, files."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxprop
from fxprop.errors import PolicyError
from fxprop.ops.axes import Shapes, of_convolution, of_linear
from fxprop.plan.sites import Site
from fxprop.policy import files as policy_files
from fxprop.policy.policy import Policy, Rule


def site(name="a.b", n=100, **fields):
    axes = None if "skip" in fields else of_linear(Shapes(None, (n, 4), None))
    fields = {"op": "linear", "node": name, "types": ("Linear",), "axes": axes, **fields}
    return Site(name=name, **fields)


def decide(policy, *sites):
    return [(d.status, d.sparsity.k if d.sparsity else None) for d in policy.resolve(sites).decisions]


# --- precedence, as numbered in Policy's docstring ------------------------------------------------------


def test_skip_beats_a_rule():
    (decision,) = Policy(rules=[Rule(name="*", keep=0.5)]).resolve([site(skip="unsafe")]).decisions
    assert (decision.status, decision.reason) == ("skipped", "unsafe")


def test_first_rule_beats_second():
    rules = [Rule(name="a.*", keep=0.2), Rule(name="a.b", keep=0.5)]
    assert decide(Policy(rules=rules), site()) == [("rewritten", 20)]


def test_rule_beats_output_default():
    policy = Policy(keep=0.1, rules=[Rule(type="Linear", keep=0.2)])
    assert decide(policy, site(is_output=True)) == [("rewritten", 20)]
    assert decide(policy, site(types=(), is_output=True)) == [("dense", None)]


def test_output_default_beats_a_rule_that_sets_no_amount():
    policy = Policy(keep=0.1, rules=[Rule(type="Linear", score="l2")])
    assert decide(policy, site(is_output=True), site()) == [("dense", None), ("rewritten", 10)]


def test_rule_supplies_what_it_sets_and_the_policy_the_rest():
    policy = Policy(keep=0.1, score="l2", round_to=8, rules=[Rule(name="a.b", keep=0.5)])
    (decision,) = policy.resolve([site()]).decisions
    assert decision.sparsity.score == "l2"
    assert decision.sparsity.k == 56  # 50 rounded up to a multiple of 8
    assert decision.decided_by == "rule 1 (name='a.b')"


def test_rule_k_replaces_policy_keep_and_the_other_way_round():
    assert decide(Policy(keep=0.1, rules=[Rule(name="*", k=7)]), site()) == [("rewritten", 7)]
    assert decide(Policy(k=7, rules=[Rule(name="*", keep=0.1)]), site()) == [("rewritten", 10)]


# --- matching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        (Rule(name="a.*"), True),
        (Rule(name="a"), False),
        (Rule(regex=r"a\.[bc]"), True),
        (Rule(regex="a"), False),
        (Rule(type="Linear"), True),
        (Rule(type="linear"), True),
        (Rule(type="Conv2d"), False),
        (Rule(position="first"), True),
        (Rule(position="output"), False),
        (Rule(where=lambda s: s.groups == 1), True),
        (Rule(name="a.*", type="Conv2d"), False),
    ],
)
def test_conditions(rule, matches):
    assert rule.matches(site(is_first=True)) is matches


def test_second_use_is_matched_by_the_plain_name_too():
    assert Rule(name="a.b").matches(site("a.b#2"))
    assert Rule(name="a.b#2").matches(site("a.b#2"))
    assert not Rule(name="a.b#2").matches(site("a.b"))


# --- k --------------------------------------------------------------------------------------------------


@given(
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(1, 4096),
    st.integers(1, 64),
)
def test_k_follows_from_keep(keep, n, round_to):
    (decision,) = Policy(keep=keep, round_to=round_to).resolve([site(n=n)]).decisions
    k = max(1, math.floor(keep * n + 0.5))
    k = min(n, math.ceil(k / round_to) * round_to)
    if k == n:
        assert (decision.status, decision.reason) == ("dense", f"k = n = {n}")
    else:
        assert (decision.sparsity.k, decision.sparsity.n) == (k, n)


def test_k_beyond_n_is_dense():
    assert decide(Policy(k=101), site()) == [("dense", None)]


def test_nothing_given_is_dense():
    assert decide(Policy(), site()) == [("dense", None)]


def test_n_of_grouped_depthwise_and_element():
    def convolution(weight, output, groups=1):
        axes = of_convolution(Shapes(None, weight, output, {"groups": groups}))
        return site(op="conv2d", axes=axes)

    grouped = convolution((12, 2, 3, 3), (2, 12, 5, 4), groups=3)
    depthwise = convolution((12, 1, 3, 3), (2, 12, 5, 4), groups=12)
    assert (grouped.n("channel"), depthwise.n("channel")) == (4, 12)
    assert grouped.n("element") == depthwise.n("element") == 240
    unbatched = convolution((12, 2, 3), (12, 5))
    assert unbatched.n("element") == 60


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.1", True, [0.1]])
def test_bad_keep(keep):
    with pytest.raises(PolicyError, match="expected a number with 0 < keep <= 1"):
        Policy(keep=keep)
    with pytest.raises(PolicyError, match="keep="):
        Rule(name="*", keep=keep)


def test_bad_keep_as_the_policy_itself():
    with pytest.raises(PolicyError, match="keep=0: expected a number with 0 < keep <= 1"):
        policy_files.as_policy(0)
    with pytest.raises(PolicyError, match="of type bool: expected an fxprop.Policy, a number"):
        policy_files.as_policy(True)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"k": 0}, "k=0: expected an integer of at least 1"),
        ({"k": 2.0}, "k=2.0: expected an integer"),
        ({"round_to": 0}, "round_to=0"),
        ({"keep": 0.5, "k": 3}, "keep=0.5 and k=3 both given"),
        ({"select": "rows"}, "select='rows': expected one of channel, element"),
        ({"score": "l7"}, "unknown score 'l7': expected one of l1, l2, random"),
        ({"bias": "none"}, "bias='none': expected one of full, selected"),
        ({"rules": ["fc"]}, "rules contain 'fc': expected fxprop.Rule"),
        ({"select": None}, "select=None"),
        ({"allow_unmatched": 1}, "allow_unmatched=1"),
    ],
)
def test_bad_policy(fields, match):
    with pytest.raises(PolicyError, match=match):
        Policy(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"keep": 0.5}, "a rule needs a condition: give at least one of name, regex, type"),
        ({"regex": "("}, "is not a regular expression"),
        ({"position": "last"}, "position='last': expected 'first' or 'output'"),
        ({"name": 3}, "name=3: expected a string"),
        ({"where": "fc"}, "where='fc': expected a function"),
    ],
)
def test_bad_rule(fields, match):
    with pytest.raises(PolicyError, match=match):
        Rule(**fields)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Rule(name="layr4.*", keep=0.2), r"rule 1 \(name='layr4.\*'\) matches no layer.*layer4"),
        (Rule(name="layer4.0.conv", keep=0.2), r"Nearest names: .*layer4.0.conv1"),
        (Rule(type="Conv1d", keep=0.2), "Known types: Linear, linear"),
        (Rule(position="first", keep=0.2), "Known types"),
    ],
)
def test_unmatched_rule_names_near_misses(rule, match):
    sites = [site("layer4.0.conv1"), site("layer4.0.conv2"), site("fc")]
    with pytest.raises(PolicyError, match=match):
        Policy(rules=[rule]).check_all_match(sites)
    Policy(rules=[rule], allow_unmatched=True).check_all_match(sites)


# --- data and files -------------------------------------------------------------------------------------

rules = st.builds(
    Rule,
    name=st.text(min_size=1),
    type=st.none() | st.sampled_from(["Conv2d", "linear"]),
    position=st.none() | st.sampled_from(["first", "output"]),
    keep=st.none() | st.floats(0.01, 1),
    select=st.none() | st.sampled_from(["channel", "element"]),
    round_to=st.none() | st.integers(1, 64),
    bias=st.none() | st.sampled_from(["full", "selected"]),
)
policies = st.builds(
    Policy,
    k=st.none() | st.integers(1, 99),
    select=st.sampled_from(["channel", "element"]),
    score=st.sampled_from(["l1", "l2", "random"]),
    round_to=st.integers(1, 64),
    rules=st.lists(rules, max_size=3),
    allow_unmatched=st.booleans(),
)


@given(policies)
def test_round_trips(tmp_path_factory, policy):
    folder = tmp_path_factory.mktemp("policies")
    assert policy_files.from_dict(policy_files.to_dict(policy)) == policy
    for name, text in (
        ("p.toml", policy_files.to_toml(policy)),
        ("p.json", policy_files.to_json(policy)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        assert fxprop.load_policy(folder / name) == policy


def test_where_cannot_be_written():
    with pytest.raises(PolicyError, match="`where` function, which cannot be written as data"):
        policy_files.to_toml(Policy(rules=[Rule(where=lambda s: True, keep=0.5)]))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("p.toml", "keep = 0.1\nkep = 3\n", r"p.toml:2: policy: unknown key 'kep'; the allowed keys are keep, k"),
        ("p.toml", "keep = 0.1\n[[rule]]\nname = 'fc'\nkeeep = 1\n", r"p.toml:4: rule 1: unknown key 'keeep'.*'keep'"),
        ("p.toml", "keep = 0.1\nselect = \n", r"p.toml:2: not valid TOML"),
        ("p.toml", "select = 'channel'\nkeep = 2.0 # two\n", r"p.toml:2: policy: keep=2.0"),
        ("p.toml", "keep = 0.1\nscore = 'l9'\n", r"p.toml:?.*unknown score 'l9'"),
        ("p.toml", "rule = 3\n", "rule=3: expected a list of tables"),
        ("p.json", '{\n  "keep": 0.1,\n  "selct": "element"\n}', r"p.json:3: policy: unknown key 'selct'"),
        ("p.json", '{"keep": 0.1,}', r"p.json:1: not valid JSON"),
        ("p.json", "[1]", r"p.json:1: expected a table of settings, got list"),
        ("p.yaml", "keep: 1", r"policy files end in .toml or .json"),
    ],
)  # fmt: skip
def test_bad_files_say_where(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(PolicyError, match=match):
        fxprop.load_policy(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(PolicyError, match="none.toml: cannot be read"):
        fxprop.load_policy(tmp_path / "none.toml")


def test_mapping_and_path_are_policies(tmp_path):
    data = {"keep": 0.05, "rule": [{"name": "fc", "keep": 0.5}]}
    (tmp_path / "p.json").write_text(json.dumps(data))
    expected = Policy(keep=0.05, rules=[Rule(name="fc", keep=0.5)])
    assert policy_files.as_policy(data) == expected
    assert policy_files.as_policy(str(tmp_path / "p.json")) == expected
    assert policy_files.as_policy(tmp_path / "p.json") == expected
    assert policy_files.as_policy(0.05) == Policy(keep=0.05)
    with pytest.raises(PolicyError, match="expected an fxprop.Policy, a number"):
        policy_files.as_policy(None)
