"""Policies as data: dict, JSON, TOML, files. Data only; nothing read here is ever executed."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxprop import settings
from fxprop.errors import PolicyError
from fxprop.policy.policy import Policy, Rule, rule_fields

_RULES_KEY = "rule"
# `key = value  # comment` in TOML, `"key": value,` in JSON
_ENTRY = re.compile(r"""[\s{]*"?(\w+)"?\s*[=:]\s*(.*?)\s*[,}]*\s*(?:#.*)?$""")
_POLICY_KEYS = (*settings.NAMES, "allow_unmatched", *settings.EXAMPLE_NAMES)

PolicyLike = Policy | float | Mapping[str, Any] | str | os.PathLike[str]


def as_policy(policy: PolicyLike) -> Policy:
    """The Policy that `policy` stands for.

    >>> as_policy(0.05)                                    # one keep for all
    >>> as_policy({"keep": 0.05, "rule": [{"name": "fc", "keep": 0.5}]})
    >>> as_policy("policy.toml")

    PolicyError says what was wrong, with file and line where there is one.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return from_dict(policy)
    if isinstance(policy, str | os.PathLike):
        return load_policy(policy)
    if isinstance(policy, int | float) and not isinstance(policy, bool):
        settings.check("keep", policy, "policy")
        return Policy(keep=float(policy))
    raise PolicyError(
        f"policy is {policy!r} of type {type(policy).__name__}: expected an fxprop.Policy, a number "
        "(one keep for all layers), a mapping, or the path of a .toml or .json file"
    )


def to_dict(policy: Policy) -> dict[str, Any]:
    """Plain data that `from_dict` reads back: settings, then rules under "rule"."""
    keys = _POLICY_KEYS if policy.takes_examples else _POLICY_KEYS[: -len(settings.OF_EXAMPLES)]
    data = {key: getattr(policy, key) for key in keys if getattr(policy, key) is not None}
    if policy.rules:
        data[_RULES_KEY] = [_rule_to_dict(rule) for rule in policy.rules]
    return data


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    if rule.where is not None:
        raise PolicyError(
            f"rule ({rule.conditions()}) has a `where` function, which cannot be written as data; "
            "use name, regex, type or position"
        )
    keys = rule_fields(in_files=True)
    return {key: getattr(rule, key) for key in keys if getattr(rule, key) is not None}


def from_dict(data: Mapping[str, Any]) -> Policy:
    """The Policy described by `data`; PolicyError names an unknown key and the allowed ones."""
    _check_keys(data, (*_POLICY_KEYS, _RULES_KEY), "policy")
    rules = data.get(_RULES_KEY, [])
    if not isinstance(rules, list | tuple) or not all(isinstance(r, Mapping) for r in rules):
        raise PolicyError(
            f"policy: {_RULES_KEY}={rules!r}: expected a list of tables ([[{_RULES_KEY}]] in TOML)"
        )
    for number, rule in enumerate(rules, start=1):
        _check_keys(rule, rule_fields(in_files=True), f"rule {number}")
    given = {key: value for key, value in data.items() if key != _RULES_KEY}
    return Policy(**given, rules=tuple(Rule(**rule) for rule in rules))


def _check_keys(data: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PolicyError(
                f"{where}: unknown key {key!r}; the allowed keys are {', '.join(allowed)}.{hint}"
            )


def to_json(policy: Policy) -> str:
    """The policy as JSON text."""
    return json.dumps(to_dict(policy), indent=2) + "\n"


def to_toml(policy: Policy) -> str:
    """The policy as TOML text."""
    return as_toml(to_dict(policy))


def as_toml(data: Mapping[str, Any]) -> str:
    """A policy's plain data as a TOML file; PolicyError without tomli-w."""
    try:
        import tomli_w  # the standard library only reads TOML
    except ImportError as error:
        raise PolicyError(
            "writing TOML needs tomli-w, which is not installed: pip install tomli-w"
        ) from error
    return tomli_w.dumps(data)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read a policy from a .toml or .json file.

    >>> policy = fxprop.load_policy("policy.toml")

    PolicyError starts with `path:line:` where the fault has a line.
    """
    file = Path(path)
    if file.suffix not in (".toml", ".json"):
        raise PolicyError(f"{file}: policy files end in .toml or .json")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{file}: cannot be read: {error}") from error
    try:
        data = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except json.JSONDecodeError as error:
        raise PolicyError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{file}:{_toml_line(error, text)}: not valid TOML: {error}") from error
    if not isinstance(data, dict):
        raise PolicyError(f"{file}:1: expected a table of settings, got {type(data).__name__}")
    try:
        return from_dict(data)
    except PolicyError as error:
        line = _line_of_fault(str(error), text)
        raise PolicyError(f"{file}:{'' if line is None else f'{line}:'} {error}") from error


def _toml_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    # tomllib gives the line as an attribute from Python 3.14 on, and in the message before
    line = getattr(error, "lineno", None)
    if isinstance(line, int):
        return line
    _, _, tail = str(error).partition("(at line ")
    digits = tail.partition(",")[0]
    return int(digits) if digits.isdigit() else text.count("\n") + 1


def _line_of_fault(message: str, text: str) -> int | None:
    """The first line whose key (and value) the message quotes; the parsers keep no positions."""
    for number, line in enumerate(text.splitlines(), start=1):
        entry = _ENTRY.match(line)
        if entry is None:
            continue
        key, value = entry[1], entry[2].replace('"', "'")
        if f"unknown key {key!r}" in message or f"{key}={value}" in message:
            return number
    return None
