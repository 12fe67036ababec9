"""Where descriptions of machines lie: the shipped ones and this machine's own. What is in them: planner/hardware.py."""

import os
from pathlib import Path

from swin_moe.config.io import config_folder

LINKS = "links.yaml"  # in the folder of machines; none itself


def hardware_folder() -> Path:
    """Returns where the shipped machines lie."""
    return config_folder() / "hardware"


def shipped_hardware() -> list[str]:
    """Returns the names of the shipped machines."""
    return sorted(path.stem for path in hardware_folder().glob("*.yaml") if path.name != LINKS)


def own_hardware() -> Path:
    """Returns where the machine's own file is looked for: swin_moe/hardware.yaml under XDG_CONFIG_HOME or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "swin_moe" / "hardware.yaml"
