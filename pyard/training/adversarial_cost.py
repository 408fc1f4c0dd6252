"""What the adversarial stage adds to an update."""

from __future__ import annotations

from pyard.conditions import Condition
from pyard.cost.flops import discriminator_flops, feature_flops
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.training.adversarial_config import AdversarialConfig


def adversarial_flops(network: Denoiser, condition: Condition, settings: AdversarialConfig) -> float:
    """FLOPs of one sample's share of an update: the frozen teacher's passes and the discriminators'.

    Args:
        network: the teacher's.
        condition: of one sample.
        settings: of the stage.
    """
    trunk, blocks = network.trunk, looked_at(network, settings)
    head = discriminator_flops(
        trunk.tokens_per_step(),
        trunk.hidden_size,
        trunk.conditioning_size(condition),
        width=settings.width,
        depth=settings.depth,
        kernel_size=settings.kernel_size,
        r1=settings.r1 > 0,
        feature_matching=settings.feature_matching > 0,
    )
    return feature_flops(network, condition, blocks) + len(blocks) * head


def looked_at(network: Denoiser, settings: AdversarialConfig) -> tuple[int, ...]:
    """The blocks of the teacher that have discriminators; an InputError if it does not have them."""
    depth = len(network.trunk.blocks)
    if settings.blocks is None:
        return tuple(range(depth))
    if max(settings.blocks) >= depth:
        raise InputError(f"adversarial: blocks is {list(settings.blocks)}; the teacher has {depth}, numbered from 0")
    return settings.blocks
