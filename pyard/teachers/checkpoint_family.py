"""Which code a checkpoint with DiT's tensor names comes from, and how that code trained it.

DiT, SiT, REPA and their relatives share tensor names and differ in time, sign and what is predicted: a checkpoint that is read
as another family's loads without a word and draws noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pyard.diffusion.noise_schedule import NoiseSchedule, Prediction
from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import Tensors
from pyard.storage.numbers import number
from pyard.teachers import Family
from pyard.teachers.latent_statistics import LatentStatistics

# Beginnings of tensor names that belong to one code alone, and why pyard does not read it.
_OTHERS = {
    r"s_embedder\.|s_projector\.": "DDT or a DiT-DH of RAE: an encoder whose output conditions each token of a decoder",
    r"sideblocks\.|en_(in|out)blocks\.|mask_token|decoder_pos_embed": "MDT or MDTv2: a masked encoder with side blocks",
    r"decoder_blocks\.|decoder_layer": "MaskDiT: an encoder and a decoder",
    r"in_blocks\.|mid_block\.|out_blocks\.": "U-ViT: blocks with long skip connections",
    r"joint_blocks\.|context_embedder\.|y_embedder\.y_proj|caption_": "a text-to-image transformer",
    r"init_conv_seq\.|layers\.\d+\.attention\.wq": "minRF or another network with attention.wq, wk and wv",
}
_LIGHTNING = re.compile(r"blocks\.\d+\.mlp\.w(12|3)\.|feat_rope\.|blocks\.\d+\.norm1\.weight")
_QK_NORM = re.compile(r"blocks\.\d+\.attn\.[qk]_norm\.")
# What REPA's and REPA-E's training adds: projections onto an encoder's features, and statistics of the latents.
_PROJECTORS = re.compile(r"(?:projectors?|proj_layers)\.")
_STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
# REPA's command line has these; SiT's has not.
_REPA_ARGS = ("proj_coeff", "enc_type", "encoder_depth")


def refuse_other_networks(tensors: Tensors, path: Path) -> None:
    """Name networks that share DiT's names and are something else."""
    for pattern, what in _OTHERS.items():
        found = next((name for name in tensors if re.match(pattern, name)), None)
        if found is not None:
            raise InputError(
                f"{path} ({found}) is {what}; pyard does not read it (docs/own-teacher.md says how to use it as a teacher)"
            )


def family_of(tensors: Tensors, args: Mapping[str, Any], path: Path, given: str | None) -> Family:
    """The code that wrote a checkpoint: what its tensors and settings show, what the caller says, what its names say.

    Raises:
        InputError: nobody says it, or the caller contradicts what the file shows.
    """
    if given is not None and given not in get_args(Family):
        raise InputError(f"family is {given!r}; expected one of {get_args(Family)}")
    shown, why = _shown(tensors, args)
    if shown is not None:
        if given not in (None, shown):
            raise InputError(f"{path} has {why}, so it is of the family {shown!r}; found family={given!r}: leave it out")
        return shown
    family = given or _named(str(args.get("model", ""))) or _named(path.stem)
    if family is None:
        raise InputError(
            f"{path}: DiT and SiT checkpoints have the same tensors, and neither the file's name nor its contents say which "
            "this is; give family='dit' or family='sit' (found None)"
        )
    found: Family = next(name for name in get_args(Family) if name == family)
    return found


def _shown(tensors: Tensors, args: Mapping[str, Any]) -> tuple[Family | None, str]:
    lightning = next((name for name in tensors if _LIGHTNING.match(name)), None)
    modulation = tensors.get("blocks.0.adaLN_modulation.1.weight")
    if lightning is None and modulation is not None and modulation.ndim == 2 and modulation.shape[0] == 4 * modulation.shape[1]:
        lightning = "blocks.0.adaLN_modulation.1.weight without shifts"
    if lightning is not None:
        return "lightningdit", f"the tensor {lightning}"
    repa = next((name for name in tensors if _PROJECTORS.match(name) or name in _STATISTICS), None)
    if repa is not None:
        return "repa", f"the tensor {repa}"
    setting = next((name for name in _REPA_ARGS if name in args), None)
    if setting is not None or args.get("prediction") == "v":
        return "repa", f"the setting {setting or 'prediction=v'} of REPA's training script"
    return None, ""


def _named(name: str) -> str | None:
    found = re.search(r"(?<![a-z])(lightningdit|repa|dit|sit)(?![a-z])", name.lower())
    return None if found is None else found[1]


def without_training_parts(tensors: Tensors, path: Path) -> tuple[Tensors, LatentStatistics | None]:
    """Tensors without what REPA and REPA-E add for training, and the latter's latent statistics."""
    kept = {name: tensor for name, tensor in tensors.items() if not _PROJECTORS.match(name) and name not in _STATISTICS}
    return kept, LatentStatistics.in_tensors(tensors, path)


def without_sections(args: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, where they are in the sections of LightningDiT's YAML files, too."""
    sections = [args.get(name) for name in ("data", "model", "transport", "sample")]
    return {**args, **{name: value for section in sections if isinstance(section, Mapping) for name, value in section.items()}}


def has_qk_norm(tensors: Tensors) -> bool:
    """Whether queries and keys are normalised (REPA's `--qk-norm`, LightningDiT's `use_qknorm`), as pyard's DiT does not."""
    return any(_QK_NORM.match(name) for name in tensors)


def schedule_in(args: Mapping[str, Any], family: Family, path: Path) -> NoiseSchedule:
    """How a checkpoint was trained: what its settings say, else the defaults of its family's code.

    Raises:
        InputError: a setting that pyard does not know.
    """

    def known(name: str, values: Mapping[Any, Any], default: Any) -> Any:
        found = args.get(name, default)
        try:
            return values[default if found is None else found]
        except (KeyError, TypeError):
            raise InputError(
                f"{path}: its settings say {name}={found!r}; expected one of {', '.join(map(repr, values))}, or in Python "
                "load_teacher(…, schedule=NoiseSchedule(…))"
            ) from None

    if family == "dit":
        known("diffusion_steps", {1000: 1000}, 1000)
        betas = known("noise_schedule", {"linear": "linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}, "linear")
        prediction: Prediction = known("predict_xstart", {False: "eps", True: "denoised"}, False)
        return NoiseSchedule(beta_schedule=betas, prediction=prediction)
    if family == "repa":
        prediction = known("prediction", {"v": "velocity"}, "v")
        kind = known("path_type", {"linear": "linear", "cosine": "gvp"}, "linear")
        return NoiseSchedule(kind="flow", prediction=prediction, path=kind)
    # LightningDiT shifts the times of its sampler, which run from noise to data.
    shift = 1 / number(f"{path}: timestep_shift", args.get("timestep_shift") or 1.0, 1e-6, 1e6)
    kind = known("path_type", {"Linear": "linear", "GVP": "gvp", "VP": "vp"}, "Linear")
    prediction = known("prediction", {"velocity": "velocity", "noise": "eps", "score": "score"}, "velocity")
    # SiT samples from its time sample_eps on where the network says nothing at pure noise (transport/transport.py).
    away = args.get("sample_eps") if args.get("train_eps") is not None else None
    away = 1e-3 if away is None else number(f"{path}: sample_eps", away, 0, 0.5)
    start = 1.0 if prediction == "velocity" or kind == "vp" else 1.0 - away
    return NoiseSchedule(kind="flow", prediction=prediction, path=kind, start=start, shift=shift)
