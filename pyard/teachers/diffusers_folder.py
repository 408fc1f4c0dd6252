"""diffusers' DiT as a teacher, in both directions: `DiTTransformer2DModel` and `DiTPipeline` folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.schedulers import load_schedule, scheduler_of
from pyard.errors import InputError
from pyard.models.backbone import Denoiser
from pyard.models.codec import LatentCodec, require_latent_codec
from pyard.models.dit.checkpoint_file import Tensors
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT, dit_trunk, sincos_position_embedding
from pyard.models.folder import class_name, require_replaceable
from pyard.models.pretrained import only_variant, read_pretrained
from pyard.storage.files import write_text
from pyard.storage.folders import new_folder
from pyard.storage.reading import read_json, read_object
from pyard.teachers.network_teacher import NetworkTeacher

_INDEX = "model_index.json"
# The published DiT-XL/2 folder still names the class that diffusers had for all of its transformers.
_TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")

# Layers of a block with equal names and shapes on both sides but for these; to_q, to_k, to_v are one matrix here.
_BLOCK = {
    "norm1.linear": "modulation",
    "attn1.to_out.0": "attention.proj",
    "ff.net.0.proj": "fc1",
    "ff.net.2": "fc2",
}
_OUTER = {
    "pos_embed.proj": "trunk.patch_embed",
    "proj_out_1": "head.modulation",
    "proj_out_2": "head.linear",
}
_EMBED = {
    "timestep_embedder.linear_1": "time_embed.fc1",
    "timestep_embedder.linear_2": "time_embed.fc2",
    "class_embedder.embedding_table": "label_embed",
}


def is_diffusers_folder(path: Path) -> bool:
    """True for the folder of a diffusers pipeline or transformer."""
    if (path / _INDEX).is_file():
        return True
    return class_name(path) in _TRANSFORMERS


def load_diffusers(path: str | Path, *, schedule: NoiseSchedule | None = None) -> NetworkTeacher:
    """Read a `DiTPipeline` folder, or a `DiTTransformer2DModel` folder with a `scheduler` beside it.

    Args:
        path: the folder.
        schedule: overrides the scheduler's; needed for a transformer without one.

    Raises:
        InputError: another pipeline or transformer, or settings that pyard would not reproduce.
    """
    from diffusers import DiTTransformer2DModel

    path = Path(path)
    home, folder, index = path.parent, path, {}
    if (path / _INDEX).is_file():
        home, folder = path, path / "transformer"
        index = read_object(path / _INDEX, "the index of a DiTPipeline")
        if index.get("_class_name") != "DiTPipeline":
            raise InputError(f"{path} is a {index.get('_class_name')}; expected a DiTPipeline")
    found = read_object(folder / "config.json", "the configuration of a transformer").get("_class_name")
    if found not in _TRANSFORMERS:
        raise InputError(f"{folder} holds a {found!s:.60}; expected a {_TRANSFORMERS[0]}")
    if schedule is None:
        if not (home / "scheduler").is_dir():
            raise InputError(
                f"{folder} has no scheduler ({home / 'scheduler'}), so its noise schedule is unknown; give the "
                "folder of the whole pipeline, or in Python load_teacher(…, schedule=NoiseSchedule(…))"
            )
        schedule = load_schedule(home / "scheduler")
    variant = only_variant(folder, "diffusion_pytorch_model")
    transformer = read_pretrained(DiTTransformer2DModel, folder, torch_dtype=torch.float32, variant=variant)
    network = from_diffusers(transformer, schedule)
    return NetworkTeacher(network, schedule, codec=LatentCodec.beside(home), class_names=_class_names(index, network.config))


def from_diffusers(transformer: Any, schedule: NoiseSchedule) -> DiT:
    """pyard's DiT with the weights of a diffusers `DiTTransformer2DModel`.

    Args:
        transformer: the model.
        schedule: of its scheduler; a flow's network is told sigma * num_train_timesteps.

    Raises:
        InputError: settings or weights that pyard's DiT does not have, with the reason.
    """
    theirs = transformer.config
    for name, expected, reason in (
        ("activation_fn", "gelu-approximate", "DiT's MLPs have no other activation"),
        ("norm_elementwise_affine", False, "adaLN has the only scale and shift of DiT's norms"),
    ):
        if theirs[name] != expected:
            raise InputError(f"transformer: {name} is {theirs[name]!r}, expected {expected!r}: {reason}")
    config = DiTConfig(
        input_size=theirs["sample_size"],
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"] or theirs["in_channels"],
        patch_size=theirs["patch_size"],
        hidden_size=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        depth=theirs["num_layers"],
        num_heads=theirs["num_attention_heads"],
        num_classes=theirs["num_embeds_ada_norm"],
        freq_shift=1.0,
        time_scale=float(schedule.num_train_timesteps) if schedule.kind == "flow" else 1.0,
        mlp_norm_eps=theirs["norm_eps"],
    )
    state = {name: tensor.float() for name, tensor in transformer.state_dict().items()}
    ours = _rename(state, {**_OUTER, **_block_names(config)})
    # A plain Linear here, a convolution of stride P there.
    ours["trunk.patch_embed.weight"] = ours["trunk.patch_embed.weight"].flatten(1)
    ours["trunk.pos_embed"] = transformer.pos_embed.pos_embed[0].float()
    for i in range(config.depth):
        block = f"transformer_blocks.{i}.attn1."
        for kind in ("weight", "bias"):
            parts = [state.get(f"{block}to_{part}.{kind}") for part in "qkv"]
            zeros = torch.zeros(config.hidden_size)  # attention_bias=False
            stacked = torch.cat([zeros if part is None else part for part in parts])
            ours[f"trunk.blocks.{i}.attention.qkv.{kind}"] = stacked
    embedders = [_rename(state, _embed_names(i)) for i in range(config.depth)]
    for i, embedder in enumerate(embedders[1:], start=1):
        unequal = [name for name, tensor in embedder.items() if not torch.equal(tensor, embedders[0][name])]
        if unequal:
            raise InputError(
                f"transformer: the time and label embedder of block {i} differs from that of block 0 ({unequal[0]}); diffusers "
                "has one in each block, but DiT and pyard have one for all blocks"
            )
    network = DiT(config)
    network.load_state_dict({**ours, **embedders[0]})
    return network


def to_diffusers(network: Denoiser, schedule: NoiseSchedule) -> Any:
    """The reverse of `from_diffusers`: a `DiTTransformer2DModel`, one copy of the embedders for each block.

    Raises:
        InputError: settings that diffusers' class does not have, with the reason.
    """
    from diffusers import DiTTransformer2DModel

    trunk = dit_trunk(network, "a diffusers transformer")
    config = trunk.config
    time_scale = float(schedule.num_train_timesteps) if schedule.kind == "flow" else 1.0
    fixed = {
        "freq_shift": (config.freq_shift, 1.0, "diffusers fixes the time embedding's frequency shift at 1; DiT's is 0"),
        "frequency_size": (config.frequency_size, 256, "diffusers fixes the width of the time embedding"),
        "norm_eps": (config.norm_eps, 1e-6, "diffusers fixes the epsilon of all norms but those of the MLPs"),
        "mlp_ratio": (config.mlp_ratio, 4.0, "diffusers fixes the width of the MLPs"),
        "has_null_label": (config.has_null_label, True, "diffusers' label table always has a row for no class"),
        "(time_scale, time_offset)": ((config.time_scale, config.time_offset), (time_scale, 0.0),
                                      "diffusers passes the scheduler's time to the network"),
    }  # fmt: skip
    for name, (found, expected, reason) in fixed.items():
        if found != expected:
            raise InputError(
                f"this network cannot be a diffusers transformer: {name} is {found}, expected {expected}: {reason}"
            )
    table = sincos_position_embedding(config.input_size // config.patch_size, config.hidden_size)
    if not torch.allclose(trunk.pos_embed.cpu(), table, atol=1e-5):
        raise InputError(
            "this network cannot be a diffusers transformer: its position embedding is not diffusers' sin-cos table"
        )
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.mlp_norm_eps,
    )
    state = {name: tensor.detach().cpu().float() for name, tensor in network.state_dict().items()}
    theirs = _rename(state, _reversed({**_OUTER, **_block_names(config)}))
    patch = theirs["pos_embed.proj.weight"]
    theirs["pos_embed.proj.weight"] = patch.unflatten(1, (config.in_channels, config.patch_size, config.patch_size))
    for i in range(config.depth):
        theirs |= _rename(state, _reversed(_embed_names(i)))
        for kind in ("weight", "bias"):
            parts = state[f"trunk.blocks.{i}.attention.qkv.{kind}"].chunk(3)
            theirs |= {f"transformer_blocks.{i}.attn1.to_{part}.{kind}": t for part, t in zip("qkv", parts, strict=True)}
    transformer.load_state_dict(theirs)
    return transformer.eval()


def save_diffusers(teacher: NetworkTeacher, path: str | Path) -> None:
    """Write a teacher as a `DiTPipeline` folder: transformer, scheduler, and the VAE if it has one.

    Without a VAE the folder holds transformer and scheduler alone, which `pyard.load_teacher` reads from `transformer/`.

    Raises:
        InputError: what diffusers cannot hold, with the reason.
    """
    from diffusers import AutoencoderKL, DiTPipeline

    transformer = to_diffusers(teacher.network, teacher.schedule)
    scheduler = scheduler_of(teacher.schedule)
    vae = None if teacher.codec is None else require_latent_codec(teacher.codec, "a DiTPipeline").vae
    if vae is not None and not isinstance(vae, AutoencoderKL):
        raise InputError(f"a DiTPipeline only decodes with an AutoencoderKL; this teacher's VAE is a {type(vae).__name__}")
    with new_folder(Path(path), owned=_owned_in(Path(path))) as folder:
        if vae is not None:
            names = None if teacher.class_names is None else dict(enumerate(teacher.class_names))
            pipeline = DiTPipeline(transformer, vae, scheduler, id2label=names)
            pipeline.save_pretrained(str(folder))
            if names is not None:
                # The pipeline reads these names from its index but does not write them there.
                index = read_json(folder / _INDEX)
                write_text(folder / _INDEX, json.dumps({**index, "id2label": names}, indent=2) + "\n")
        else:
            transformer.save_pretrained(str(folder / "transformer"))
            scheduler.save_pretrained(str(folder / "scheduler"))


def _owned_in(path: Path) -> tuple[str, ...]:
    """What an earlier teacher has left in a folder; an InputError if another model is in it."""
    names = (_INDEX, "transformer", "scheduler")
    if not (path / _INDEX).exists() and class_name(path / "transformer") in _TRANSFORMERS:
        return names
    return (*names, "vae") if require_replaceable(path, "DiTPipeline", names=names, index=_INDEX) else ()


def _block_names(config: DiTConfig) -> dict[str, str]:
    return {
        f"transformer_blocks.{i}.{theirs}": f"trunk.blocks.{i}.{ours}"
        for i in range(config.depth)
        for theirs, ours in _BLOCK.items()
    }


def _embed_names(block: int) -> dict[str, str]:
    return {f"transformer_blocks.{block}.norm1.emb.{theirs}": f"trunk.{ours}" for theirs, ours in _EMBED.items()}


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


def _rename(state: Tensors, names: dict[str, str]) -> Tensors:
    """The tensors of these layers under their new names."""
    layers = {name: name.rpartition(".") for name in state}
    return {f"{names[layer]}.{kind}": state[name] for name, (layer, _, kind) in layers.items() if layer in names}


def _class_names(index: dict[str, Any], config: DiTConfig) -> list[str] | None:
    labels = index.get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(config.num_classes)}:
        return None
    if not all(isinstance(name, str) for name in labels.values()):
        raise InputError("model_index.json: id2label has names that are not strings")
    return [labels[str(i)] for i in range(config.num_classes)]
