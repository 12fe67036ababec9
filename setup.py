"""Lists the packages; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["swin_moe*", "launcher*", "checkpoint_tools*"]), "swin_moe.configs"],
    # The configs live at the top of the repository, where users look for them, and are installed inside the package.
    package_dir={"swin_moe.configs": "configs"},
    package_data={"swin_moe": ["**/*.txt"], "swin_moe.configs": ["**/*.yaml"]},
)
