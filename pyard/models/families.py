"""Backbones by name: those that pyard brings, and those that a user names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyard.errors import InputError

if TYPE_CHECKING:
    from pyard.models.backbone import Backbone

# A family is a folder of pyard/models and a row here; students' and teachers' folders keep its name.
FAMILIES = {
    "dit": "pyard.models.dit.network:Trunk",
    "lightning_dit": "pyard.models.lightning_dit.network:LightningDiT",
    "pixart": "pyard.models.pixart.network:PixArt",
    "sd3": "pyard.models.sd3.network:SD3",
    "aura_flow": "pyard.models.aura_flow.network:AuraFlow",
    "flux": "pyard.models.flux.network:Flux",
    "flux2": "pyard.models.flux2.network:Flux2",
    "qwen_image": "pyard.models.qwen_image.network:QwenImage",
    "z_image": "pyard.models.z_image.network:ZImage",
}


def family_name(backbone: type[Backbone]) -> str:
    """The name that folders know a backbone by."""
    place = f"{backbone.__module__}:{backbone.__qualname__}"
    return next((name for name, known in FAMILIES.items() if known == place), place)


def backbone_class(family: str, network: type[Backbone] | str | None, where: object) -> type[Backbone]:
    """The class of a folder's backbone.

    Args:
        family: what the folder says.
        network: the user's own class, or where to import it from; None: a family that pyard knows.
        where: the folder, for messages.

    Raises:
        InputError: a family that pyard does not know, and no network; a folder never names code that is imported.
    """
    if network is not None:
        return import_network(network)
    if family not in FAMILIES:
        raise InputError(
            f"{where} uses the network {family}, which is not one of pyard's ({', '.join(FAMILIES)}), and pyard does not "
            f"run code that a folder names: give network=… in Python, or --network {family} on the command line"
        )
    found: type[Backbone] = _imported(FAMILIES[family])
    return found


def import_network(network: type[Backbone] | str) -> type[Backbone]:
    """A backbone's class as it is; one of "package.module:Class" imported from the user's path, the current folder included."""
    from pyard.models.backbone import Backbone

    if isinstance(network, str):
        if network.count(":") != 1:
            raise InputError(f"network is {network!r}; expected package.module:Class")
        here = str(Path.cwd())
        if here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)
        try:
            network = _imported(network)
        except (ImportError, AttributeError) as error:
            raise InputError(f"network {network!r} cannot be imported: {error}") from None
    if not (isinstance(network, type) and issubclass(network, Backbone)):
        raise InputError(f"network is {network!r}; expected a class that inherits from pyard.models.backbone.Backbone")
    return network


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
