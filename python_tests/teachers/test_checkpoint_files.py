"""Files as training scripts and their users leave them: keys, prefixes, wrappers, and what is no checkpoint at all."""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pytest
import torch
from factories import dit_tensors
from safetensors.torch import save_file

import pyard
from pyard.cli.command_line import main
from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import read_checkpoint


def read(path: Path, **settings: object):
    return pyard.load_teacher(path, **{"family": "dit", "num_heads": 2, **settings})


@pytest.fixture
def plain(tmp_path: Path) -> str:
    torch.save(dit_tensors(), tmp_path / "plain.pt")
    return read(tmp_path / "plain.pt").fingerprint


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as FSDP, torch.compile and activation checkpointing write them: the wrappers stand in the middle, too."""
    inner = {name.replace(".attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.attn."): t for name, t in tensors.items()}
    return under("_orig_mod._fsdp_wrapped_module.", inner)


T = dit_tensors()
OTHER = dit_tensors(seed=1)
FILES = {
    "model alone": {"model": T, "epoch": 3},
    "state_dict": {"state_dict": T},
    "lightning": {"state_dict": {**under("model.", T), "loss.weight": torch.zeros(3)}, "epoch": 3},
    "lightning with averages": {"state_dict": {**under("model.", OTHER), **under("ema_model.", T)}},
    "ema-pytorch": {**under("online_model.", OTHER), **under("ema_model.", T), "initted": torch.tensor(True)},
    "ddp": {"model": under("module.", OTHER), "ema": under("module.", T), "opt": {"state": {}, "param_groups": [{"lr": 1}]}},
    "net": under("net.", T),
    "fsdp": {"model": wrapped(T)},
    "averaged model": {**under("module.", T), "n_averaged": torch.tensor(7)},
    "deepspeed": {"module": T, "global_steps": 10},
    "capitals": {"model": OTHER, "EMA": T},
    "fsdp around the embedding": {
        "model": {name.replace("x_embedder", "x_embedder._fsdp_wrapped_module"): t for name, t in T.items()}
    },
    "average beside an optimiser": {"ema": {"shadow": T, "decay": 0.9}, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}},
}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_found_under_any_key_and_prefix(name, plain, tmp_path: Path):
    torch.save(FILES[name], tmp_path / "dit.pt")
    assert read(tmp_path / "dit.pt").fingerprint == plain


def test_weights_of_a_file_with_several_are_chosen(plain, tmp_path: Path, capsys):
    torch.save({"model": OTHER, "ema": T}, tmp_path / "dit.pt")
    torch.save(OTHER, tmp_path / "other.pt")
    other = read(tmp_path / "other.pt").fingerprint
    assert plain != other
    assert read(tmp_path / "dit.pt", weights="model").fingerprint == other
    assert read(tmp_path / "dit.pt", weights="ema").fingerprint == plain
    words = ["convert", "--source", tmp_path / "dit.pt", "--num_heads", "2", "--weights", "model", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert pyard.load_teacher(tmp_path / "out").fingerprint == other
    torch.save({"model": T}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="has the weights model; there is no 'ema'"):
        read(tmp_path / "model.pt", weights="ema")
    with pytest.raises(InputError, match="weights is for"):
        pyard.load_teacher(tmp_path / "out", weights="ema")
    torch.save({**under("generator.", T), **under("teacher.", OTHER)}, tmp_path / "two.pt")
    with pytest.raises(InputError, match=r"several networks \(generator, teacher\)"):
        read(tmp_path / "two.pt")


@pytest.mark.parametrize("kind", ["list", "names without dots"])
def test_averages_whose_names_say_nothing_are_not_passed_over(kind, tmp_path: Path):
    """As torch_ema and the LitEma of latent diffusion store them."""
    if kind == "list":
        content = {"model": OTHER, "ema": {"decay": 0.9, "shadow_params": list(T.values())}}
    else:
        content = {**under("model.", OTHER), **{"model_ema." + name.replace(".", ""): tensor for name, tensor in T.items()}}
    torch.save(content, tmp_path / "dit.pt")
    with pytest.raises(InputError, match="averaged weights whose names do not say what they are of; give weights='model'"):
        read(tmp_path / "dit.pt")
    torch.save(OTHER, tmp_path / "other.pt")
    assert read(tmp_path / "dit.pt", weights="model").fingerprint == read(tmp_path / "other.pt").fingerprint


@pytest.mark.parametrize("args", [{"class_dropout_prob": 0.0}, argparse.Namespace(cfg_prob=0, lr=1e-4)])
def test_a_network_that_never_lost_a_label_has_no_row_without_class(args, tmp_path: Path):
    torch.save({"model": T, "args": args}, tmp_path / "dit.pt")
    assert read(tmp_path / "dit.pt").conditions.count == 6
    assert not read(tmp_path / "dit.pt").conditions.has_null
    assert read(tmp_path / "dit.pt", num_classes=5).conditions.has_null


def test_packed_and_cut_files_are_called_what_they_are(tmp_path: Path):
    torch.save(T, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content, message in (
        ("a.pt.gz", gzip.compress(whole), "compressed by gzip; unpack it first"),
        ("b.pt", lzma.compress(whole[:1000]), "compressed by xz; unpack it first"),
        ("c.pt", whole[:-500], "zip archive without its end, cut off at .* bytes; copy it again"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)


def test_half_precision_files_are_read_in_float32(tmp_path: Path):
    save_file({name: tensor.half() for name, tensor in T.items()}, tmp_path / "dit.fp16.safetensors")
    teacher = read(tmp_path / "dit.fp16.safetensors")
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32}
    assert torch.equal(teacher.network.trunk.label_embed.weight, T["y_embedder.embedding_table.weight"].half().float())


@pytest.mark.parametrize(("in_args", "classes", "has_null"), [(6, 6, False), (5, 5, True), (None, 5, True)])
def test_the_files_own_number_of_classes_decides_whether_there_is_no_class(in_args, classes, has_null, tmp_path: Path):
    args = {} if in_args is None else {"num_classes": in_args}
    torch.save({"ema": T, "args": argparse.Namespace(model="DiT-S/2", **args)}, tmp_path / "0100000.pt")
    teacher = pyard.load_teacher(tmp_path / "0100000.pt", num_heads=2)
    assert (teacher.num_classes, teacher.network.config.has_null_label) == (classes, has_null)
    if not has_null:
        with pytest.raises(InputError, match="cfg_scale"):
            pyard.generate_trajectories(teacher, tmp_path / "store", 4, num_steps=2, teacher_steps=2, progress=False)


def test_a_number_of_classes_that_does_not_fit_is_refused_and_can_be_given(tmp_path: Path):
    torch.save({"ema": T, "args": argparse.Namespace(model="DiT-S/2", num_classes=1000)}, tmp_path / "dit.pt")
    with pytest.raises(InputError, match=r"6 rows.*num_classes of the checkpoint's args is 1000; give num_classes=6"):
        read(tmp_path / "dit.pt")
    assert read(tmp_path / "dit.pt", num_classes=5).num_classes == 5


def test_settings_of_a_pickle_survive_the_conversion_that_its_refusal_names(tmp_path: Path):
    args = argparse.Namespace(model="SiT-S/2", prediction="noise", path_type="GVP", out=Path("/tmp"))
    torch.save({"ema": T, "args": args}, tmp_path / "0100000.pt")
    with pytest.raises(InputError, match="only reads pickles with weights_only=True") as refusal:
        pyard.load_teacher(tmp_path / "0100000.pt", num_heads=2)
    exec(str(refusal.value).split('python -c "')[1].split('"')[0], {})
    teacher = pyard.load_teacher(tmp_path / "0100000.safetensors", num_heads=2)
    assert (teacher.schedule.prediction, teacher.schedule.path) == ("eps", "gvp")


def zip_of(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")


def test_files_that_are_no_checkpoint_are_one_line_without_advice_to_unpickle(tmp_path: Path):
    save_file(T, tmp_path / "good.safetensors")
    torch.save(T, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    index = json.dumps({"weight_map": dict.fromkeys(T, "x")}).encode()
    for name, content, message in (
        ("a.pt", pointer, "Git LFS pointer"),
        ("a.safetensors", pointer, "Git LFS pointer"),
        ("b.pt", b"\n<!DOCTYPE html><html>404</html>", "web page"),
        ("c.safetensors.index.json", index, "JSON"),
        ("d.pt", b"", "is empty"),
        ("e.pt", b"\x89HDF\r\n\x1a\n" + bytes(100), "begins with"),
        ("f.pt", good[: len(good) // 2], "cut off"),
        ("g.pt", b"\x80\x04\x95" + bytes(40), "cannot be read"),
        ("h.safetensors", good, "it is a pickle"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as refusal:
            read(tmp_path / name)
        assert "weights_only=False" not in str(refusal.value), name
        assert "\n" not in str(refusal.value), name
    zip_of(tmp_path / "photos.pt", "1.jpg", "2.jpg")
    with pytest.raises(InputError, match=r"zip archive of something else \(1.jpg"):
        read(tmp_path / "photos.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        read(tmp_path / "script.pt")


def test_safetensors_are_read_whatever_they_are_called(plain, tmp_path: Path):
    save_file(T, tmp_path / "dit.pt")
    assert read(tmp_path / "dit.pt").fingerprint == plain


@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("blocks.1.attn.qkv.weight", torch.zeros(96, 31), "do not match each other: size mismatch for blocks.1.attention.qkv"),
    ("final_layer.linear.bias", None, "do not match each other: Missing key"),
    ("x_embedder.proj.weight", torch.zeros(32, 8), r"x_embedder.proj.weight is \[32, 8\]"),
    ("pos_embed", torch.zeros(1, 15, 32), "expected .* of a square picture"),
    ("pos_embed", torch.zeros(3), "expected .* of a square picture"),
    ("y_embedder.embedding_table.weight", torch.zeros(6), "expected a matrix"),
    ("final_layer.linear.weight", torch.zeros(15, 32), "not a multiple of 2² pixels"),
    ("blocks.1000000000.mlp.fc1.weight", torch.zeros(1), "some are missing"),
    ("blocks.0.mlp.fc2.weight", torch.zeros(32, 128, dtype=torch.int8), "quantised"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_one_line(name, tensor, message, tmp_path: Path):
    tensors = {**T, name: tensor} if tensor is not None else {key: value for key, value in T.items() if key != name}
    save_file(tensors, tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=message) as refusal:
        read(tmp_path / "dit.safetensors")
    assert "\n" not in str(refusal.value)


def test_settings_beside_a_checkpoint_are_found(tmp_path: Path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_file(T, tmp_path / "run" / "checkpoints" / "0400000.safetensors")
    (tmp_path / "run" / "args.json").write_text(json.dumps({"model": "SiT-XL/2", "note": "größer"}), encoding="utf-8")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "0400000.safetensors").args["model"] == "SiT-XL/2"
