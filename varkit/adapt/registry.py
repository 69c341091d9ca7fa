"""Methods of post-training by name; a method is a file of its own, imported when its name comes up."""

import importlib

from varkit.adapt.method import Method
from varkit.errors import unknown_name

METHODS: dict[str, str] = {
    "finetune": "varkit.adapt.finetune:Finetune",
    "sar": "varkit.adapt.sar:SAR",
    "reward": "varkit.adapt.reward:Reward",
}

REFERENCES: dict[str, str] = {"sar": "varkit.adapt.verify_sar:verify"}
"""Families of reference cases about methods, beside those of models (`varkit.hub.verify.FAMILIES`)."""


def find_method(name: str) -> type[Method]:
    """The settings' class of a method. Raises `UserError` with the nearest names for an unknown one."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS, "(see varkit adapt --help)")
    module, _, attribute = METHODS[name].partition(":")
    method: type[Method] = getattr(importlib.import_module(module), attribute)
    return method


def name_of(method: Method) -> str:
    """The name under which a method is registered."""
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    found = [name for name, target in METHODS.items() if target == path]
    assert found, f"{path} is not in METHODS"
    return found[0]
