"""Lazily imported backends: unknown names, missing packages and other versions become one sentence."""

import importlib.metadata

import pytest

from swin_moe.registry import lookup, require


def test_an_unknown_choice_names_the_allowed_ones():
    with pytest.raises(ValueError, match="engine.name: unknown choice 'x'; allowed: a, b, or package.module:Name"):
        lookup({"b": "math:pi", "a": "math:e"}, "x", key="engine.name")


@pytest.mark.parametrize("engine", ["deepspeed", "fairscale"])
def test_a_missing_package_names_the_extra_to_install(monkeypatch, engine):
    from swin_moe.engine.base import ENGINES

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.delitem(__import__("sys").modules, f"swin_moe.engine.{engine}", raising=False)
    with pytest.raises(ValueError, match=rf"engine.name={engine} needs the package '{engine}', .*swin-moe\[{engine}\]"):
        lookup(ENGINES, engine, key="engine.name")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(ValueError, match="deepspeed 0.20.0 is installed, but only 0.19.8 was checked"):
        require("deepspeed", "0.19.8")


def test_a_very_long_name_is_cut():
    with pytest.raises(ValueError, match="unknown choice '9{120} ...'; allowed: a"):
        lookup({"a": "json:dumps"}, "9" * 5000, key="engine.name")
