"""torchvision beside any torch, for our own imports; torchvision_site.py says what is wrong without."""

from types import ModuleType

from swin_moe.data.torchvision_site import watch


def import_torchvision() -> ModuleType:
    """Returns the torchvision module; call it before anything that imports torchvision, such as timm.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    watch()
    import torchvision

    return torchvision
