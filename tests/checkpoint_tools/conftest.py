import sys
import types

import pytest


class CfgNode(dict):
    """Stands for yacs' class, so that torch can be the oracle."""


@pytest.fixture
def yacs(monkeypatch):
    """Lets torch unpickle the config in official files."""
    module = types.ModuleType("yacs.config")
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
