"""The names and signatures of guided-diffusion's modules, and whether ours are those."""

import ast
import importlib
import inspect
import json
from pathlib import Path

MODULES = json.loads((Path(__file__).parent / "data" / "door_names.json").read_text())
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _default(node):
    return inspect.Parameter.empty if node is None else ast.literal_eval(node)


def upstream_parameters(signature):
    """(positional, keyword-only, whether there are *args or **kwargs): the first two are lists of (name, default)."""
    arguments = ast.parse(f"def f{signature}: ...").body[0].args
    missing = len(arguments.args) - len(arguments.defaults)
    defaults = [None] * missing + arguments.defaults
    positional = [(arg.arg, _default(node)) for arg, node in zip(arguments.args, defaults, strict=True)]
    keywords = [
        (arg.arg, _default(node)) for arg, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return positional, keywords, bool(arguments.vararg or arguments.kwarg)


def assert_parameters(ours, signature):
    """Upstream's parameters come first, in order, with upstream's defaults; those of ours after them by keyword only.

    Where upstream has no default, ours may have one.
    """
    positional, keywords, is_open = upstream_parameters(signature)
    found = list(inspect.signature(ours).parameters.values())
    first, rest = found[: len(positional)], found[len(positional) :]
    assert [parameter.name for parameter in first] == [name for name, _ in positional]
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in first)
    by_name = {parameter.name: parameter for parameter in found}
    for name, default in positional + keywords:
        if default is not inspect.Parameter.empty:
            assert by_name[name].default == default, name
    assert {name for name, _ in keywords} <= by_name.keys()
    if not is_open:
        assert all(parameter.kind in (inspect.Parameter.KEYWORD_ONLY, *VARIABLE) for parameter in rest)
        for parameter in rest:
            required = parameter.kind not in VARIABLE and parameter.default is inspect.Parameter.empty
            assert not required or parameter.name in dict(keywords), parameter.name


def assert_is_upstreams(module, name):
    """`guided_diffusion.module.name` has upstream's parameters, methods and members."""
    entry, ours = MODULES[module][name], getattr(importlib.import_module(f"guided_diffusion.{module}"), name)
    for member in entry.get("members", []):
        assert ours[member].name == member
    if "signature" in entry:
        assert_parameters(ours, entry["signature"])
    for method, signature in entry.get("methods", {}).items():
        assert_parameters(getattr(ours, method), signature)
