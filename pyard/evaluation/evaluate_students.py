"""`pyard.evaluate`: measures students and their teacher, and prints a table."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import torch

from pyard.data.digits import DIGIT_SHAPE, digits_data
from pyard.diffusion.solvers import Solver
from pyard.errors import InputError
from pyard.evaluation.by_prompts import ByPrompts
from pyard.evaluation.candidates import loaded_student, over_teacher, student_candidate, teacher_row
from pyard.evaluation.card_scores import record_in_folders
from pyard.evaluation.feature_file import FeatureSettings, FileFeatures, require_feature_file
from pyard.evaluation.features import FeatureNetwork, digits_classifier
from pyard.evaluation.images import SampleFile
from pyard.evaluation.measure import LabelPolicy, labels_of, measure
from pyard.evaluation.pixels import to_bytes
from pyard.evaluation.reference import Reference, load_reference
from pyard.evaluation.report import Evaluation
from pyard.evaluation.teacher_settings import Auto, TeacherSettings
from pyard.models.backbone import Backbone
from pyard.models.codec import Codec
from pyard.models.student import Student
from pyard.runtime import OnnxStudent
from pyard.sampling.exposure_bias import ExposureBias, exposure_bias
from pyard.sampling.inference import batch_size_that_fits
from pyard.storage.typed import checked
from pyard.teachers import load_teacher
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.trajectories import TrajectoryReader, TrajectoryStore
from pyard.trajectories.batch_size import USUAL, default_batch_size

# Kept apart from the seeds that trajectories are made with: a student is not to be measured on the noise it was trained on.
DEFAULT_SEED = 1000
_USUAL_BATCH = 128


@checked("evaluate")
def evaluate(
    students: str | Path | Student | OnnxStudent | list[str],
    teacher: str | Path | NetworkTeacher = "digits",
    *,
    count: int | None = None,
    seed: int = DEFAULT_SEED,
    teacher_steps: int | Auto = "auto",
    cfg_scale: float | Auto = "auto",
    cfg_channels: int | Auto | None = "auto",
    cfg_interval: tuple[float, float] | Auto | None = "auto",
    solver: Solver | Auto | None = "auto",
    batch_size: int | None = None,
    features: Path | FileFeatures | None = None,
    feature_settings: FeatureSettings = FeatureSettings(),  # noqa: B008 (frozen)
    reference: Path | Reference | None = None,
    labels: LabelPolicy = "balanced",
    extrapolate: bool = False,
    trajectories: Path | None = None,
    samples_npz: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
    network: type[Backbone] | str | None = None,
    sample_shape: list[int] | None = None,
    prompts: Path | list[str] | None = None,
    clip: Path | None = None,
) -> Evaluation:
    """Measure students against their teacher and real data, and print the table.

    Without a feature network of yours, Fréchet distances are taken in the features of a small classifier trained on
    scikit-learn's digits; they distinguish students of the digits, and cannot be compared with published FIDs.
    docs/evaluation.md says what each number is, and how to get FID, sFID, Inception Score, precision and recall by ADM's
    protocol. The scores are also written into the model cards in the students' folders.

    Example: pyard evaluate --students runs/step-distillation runs/ard runs/ard/student.onnx --out quality.json

    Args:
        students: a run folder, a student's folder or an ONNX file; or a list of them.
        teacher: `digits`, or a teacher's folder or file. For text-to-image students, their own pipeline by default.
        count: samples for each row; none: 1797, the number of real digits, or one for each prompt.
        seed: random seed of the noise; choose a different one from that of the trajectories.
        teacher_steps: solver steps of the teacher; 0: leave out the teacher, whose samples may take longest; auto: the value
            recorded by the students. For this, cfg_scale, cfg_channels, cfg_interval and solver, auto takes the settings of the
            trajectories that the students were trained on. For students of earlier versions, which record nothing, it means 25
            steps and a guidance weight of 1.5 on all channels at all times.
        cfg_scale: the teacher's guidance weight; 1: no guidance; auto: see teacher_steps.
        cfg_channels: number of leading channels to guide; none: all; auto: see teacher_steps.
        cfg_interval: lowest and highest teacher time with guidance; none: all times; auto: see teacher_steps.
        solver: the teacher's solver: ddim | euler | heun | dpm++2m; none: the schedule's usual one; auto: see teacher_steps.
        batch_size: samples that are drawn, and timed, together; none: 128, or fewer large ones, so that they fit in memory.
        features: file of a feature network: TorchScript (such as inception-2015-12-05.pt) or ONNX; none: the digits classifier,
            for 8 x 8 digits only. With `prompts`, see there and `clip`.
        feature_settings: inputs and outputs of that network.
        reference: real data: an .npz file with mu and sigma, with images arr_0, or with both, as in ADM's reference batches; or
            a folder of pictures; none: the real digits, for 8 x 8 digits only.
        labels: labels of the samples: `balanced`, every class in turn, or `random`, uniform.
        extrapolate: also extrapolate Fréchet distances to infinitely many samples; needs at least 4 samples per feature.
        trajectories: a store of the teacher's trajectories, preferably not used in training: measure the exposure bias of
            the PyTorch students at each step.
        samples_npz: write the student's samples as ADM's .npz (arr_0, uint8 [n, H, W, C]; arr_1, labels), whatever the count.
        out: a JSON file to write as well.
        progress: show a progress bar.
        network: package.module:Class of the backbone of teacher and students, if it is not one of pyard's. In Python also the
            class itself.
        sample_shape: [C, ...] of the samples, if teacher and students take several sizes; none: the teacher's usual one.
        prompts: compare text-to-image students with their teacher on these prompts: a `.txt` or `.jsonl` file, a folder
            with metadata.jsonl, or a list. Sample i has prompt i modulo their number. With `out`, their embeddings are kept in
            the folder of the same name without .json, which a later call reuses, and a sheet of the pictures that teacher and
            students draw for the first prompts is written as .png.
        clip: folder of a CLIP model of transformers, for CLIP scores; without `features`, Fréchet distances to the teacher's
            samples are taken in its embeddings of pictures.

    Returns:
        The rows, the teacher's first.

    Raises:
        InputError: a student has another teacher, sample shape or number of classes; teacher settings differ from those that
            the students were trained on; there is no feature network for these images; or a file is missing or cannot be
            written.
    """
    _check_files(features, reference, samples_npz, out)
    if prompts is not None and out is not None and out.suffix in ("", ".png"):
        # Beside it are a folder and a .png of the same name.
        raise InputError(f"evaluate: out is {out}; expected a name that ends in .json")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = list(students) if isinstance(students, list) else [students]
    if not sources:
        raise InputError("evaluate: students is an empty list; expected at least one folder or ONNX file")
    if samples_npz is not None and len(sources) != 1:
        raise InputError(f"evaluate: samples_npz takes the samples of one student; found {len(sources)}")
    names = [str(source) if isinstance(source, str | Path) else type(source).__name__ for source in sources]
    loaded = [loaded_student(source, network) for source in sources]
    by_prompts = ByPrompts.begin(prompts, list(zip(names, loaded, strict=True)), clip, out, device)
    if by_prompts is not None:
        if labels != "balanced":
            raise InputError(f"evaluate: labels is {labels!r}; prompts are taken in turn; leave it out")
        teacher = by_prompts.teacher(teacher, sources[0], device)
        loaded = [over_teacher(*pair, teacher) for pair in zip(loaded, sources, strict=True)]
        by_prompts = dataclasses.replace(by_prompts, students=[one for one in loaded if isinstance(one, Student)])
    elif isinstance(teacher, str | Path):
        teacher = load_teacher(teacher, network=network).to(device)
    for student, source in zip(loaded, sources, strict=True):
        if isinstance(student, Student) and isinstance(source, str | Path):
            student.to(device)
    drawn = teacher.sample_shape if by_prompts is None else by_prompts.students[0].sample_shape
    drawn = drawn if sample_shape is None else tuple(sample_shape)
    teacher.check_sample(drawn)
    batch_size = usual_batch_size(teacher.network.trunk, loaded, drawn) if batch_size is None else batch_size
    asked = dict(
        teacher_steps=teacher_steps,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        cfg_interval=cfg_interval,
        solver=solver,
    )
    named = list(zip(names, loaded, strict=True))
    # Prompts, which cost time to encode, come after everything that may be wrong.
    candidates = [] if by_prompts else [student_candidate(s, teacher, name=n, sample_shape=drawn) for n, s in named]
    settings = TeacherSettings.of(named, asked, teacher.fingerprint)
    codec = teacher.codec or next((s.codec for s in loaded if isinstance(s, Student) and s.codec), None)
    decode = None if codec is None else _decoder(codec, teacher.device)
    shape = drawn if codec is None else codec.image_shape(drawn)
    of_features, data = _network_and_data(features, feature_settings, reference, shape, samples_npz, progress, by_prompts)
    quantise = feature_settings.quantise
    facts: dict[str, Any] = {"teacher_fingerprint": teacher.fingerprint}
    if settings.teacher_steps:
        facts |= asdict(settings)
    with contextlib.ExitStack() as stack:
        visits = None
        if by_prompts is not None:
            teacher = by_prompts.with_prompts(teacher, _table_folder(out, stack), progress)
            visits, asked_by = by_prompts.visits(teacher, drawn), by_prompts.asked_by(teacher)
            candidates = [
                student_candidate(s, teacher, name=n, sample_shape=drawn) for n, s in zip(names, asked_by, strict=True)
            ]
        conditions = teacher.conditions.count
        if count is None:
            count = 1797 if by_prompts is None else max(2, conditions)
        biases: dict[str, ExposureBias] = {}
        if trajectories is not None:
            store = TrajectoryStore.open(trajectories)
            biases = {name: measured_exposure_bias(s, store, batch_size) for name, s in named if isinstance(s, Student)}
        written = _sample_file(samples_npz, names[0], labels, count, conditions, seed, quantise)
        watching = [stack.enter_context(written), None if by_prompts is None else by_prompts.take]
        evaluation = measure(
            teacher_row(teacher, settings, visits=visits) if settings.teacher_steps else None,
            candidates,
            data=data,
            features=of_features,
            sample_shape=drawn,
            num_classes=conditions,
            count=count,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            labels=labels,
            decode=decode,
            extrapolate=extrapolate,
            exposure=biases,
            on_images=_all_of(watching),
        )
    evaluation.settings.update(facts)
    if isinstance(of_features, FileFeatures):
        evaluation.settings["features_settings"] = asdict(of_features.settings)
    elif of_features is not None and by_prompts is None:
        evaluation.settings["classifier_accuracy_on_held_out_digits"] = digits_classifier().held_out_accuracy
    if samples_npz is not None:
        evaluation.settings.update(samples_npz=str(samples_npz), quantise=quantise)
    if by_prompts is not None:
        evaluation = by_prompts.finish(evaluation, teacher)
    if out is not None:
        evaluation.save(out)  # before it is printed: a terminal may be gone, or know ASCII alone
    record_in_folders(evaluation, sources, loaded)
    print(evaluation.table())
    return evaluation


def usual_batch_size(trunk: Backbone, students: Sequence[Student | OnnxStudent], sample_shape: tuple[int, ...]) -> int:
    """128, or as many as fit into memory: of large samples, no more than a teacher with this trunk computes together."""
    own = default_batch_size(trunk, sample_shape)
    fits = [batch_size_that_fits(student, sample_shape) for student in students if isinstance(student, Student)]
    return min([_USUAL_BATCH, *fits, *([own] if own < USUAL else [])])


def _table_folder(out: Path | None, stack: contextlib.ExitStack) -> Path:
    """The folder of the prompts' embeddings: beside the results, or a temporary one."""
    return Path(stack.enter_context(TemporaryDirectory())) / "prompts" if out is None else out.with_suffix("")


def _all_of(watching: list[Callable[[str, np.ndarray], None] | None]) -> Callable[[str, np.ndarray], None] | None:
    """Calls each of the functions that are there; None: there is none."""
    wanted = [one for one in watching if one is not None]

    def call(name: str, images: np.ndarray) -> None:
        for one in wanted:
            one(name, images)

    return call if wanted else None


def measured_exposure_bias(student: Student, store: TrajectoryStore, batch_size: int) -> ExposureBias:
    """A student's errors on the trajectories of a store at each step, with the teacher's history and with its own.

    Raises:
        InputError: the trajectories have another teacher or grid.
    """
    theirs, ours = store.manifest, student.config
    grid = ours.grid_of(theirs.sample_shape)
    if not grid.same_trajectory(theirs.grid) or ours.teacher_fingerprint != theirs.teacher_fingerprint:
        raise InputError(
            f"trajectories {store.path}: times {theirs.grid.times} of teacher {theirs.teacher_fingerprint[:12]}; the student "
            f"has {grid.times} of {ours.teacher_fingerprint[:12]}"
        )
    size = min(batch_size, store.count)
    reader = TrajectoryReader(store, size, target=ours.target)
    starts = range(0, store.count, size)
    return exposure_bias(student, (reader.gather(np.arange(s, min(s + size, store.count))) for s in starts))


def _check_files(
    features: Path | FileFeatures | None, reference: Path | Reference | None, samples_npz: Path | None, out: Path | None
) -> None:
    """Find missing files and invalid names before hours of work."""
    if isinstance(features, str | Path):
        require_feature_file(Path(features))
    if isinstance(reference, str | Path) and not Path(reference).exists():
        raise InputError(f"evaluate: reference is {reference}: no such file or folder")
    if samples_npz is not None and samples_npz.suffix != ".npz":
        raise InputError(f"evaluate: samples_npz is {samples_npz}; expected a name that ends in .npz")
    read = [Path(file).resolve() for file in (features, reference) if isinstance(file, str | Path)]
    for name, path in (("out", out), ("samples_npz", samples_npz)):
        if path is None:
            continue
        if path.resolve() in read:
            raise InputError(f"evaluate: {name} is {path}, which is read and would be replaced; choose another name")
        if path.is_dir():
            raise InputError(f"evaluate: {name} is {path}, a folder; expected the name of a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(f"evaluate: {name} is {path}, which cannot be written: {error.strerror}") from None


def _network_and_data(
    features: Path | FileFeatures | None,
    settings: FeatureSettings,
    reference: Path | Reference | None,
    shape: tuple[int, ...],
    samples_npz: Path | None,
    progress: bool,
    by_prompts: ByPrompts | None,
) -> tuple[FeatureNetwork | None, np.ndarray | Reference | None]:
    """The requested feature network and real data; neither if samples are only written."""
    if by_prompts is not None and reference is None:
        # Students are compared with their teacher, whose samples need no real data beside them.
        if features is None:
            return by_prompts.clip, None
        return features if isinstance(features, FileFeatures) else FileFeatures(features, settings), None
    of_digits = shape == DIGIT_SHAPE
    if features is None and not of_digits:
        if samples_npz is not None and reference is None:
            return None, None
        raise InputError(
            f"evaluate: the images are {shape}; pyard only includes features of digits, {DIGIT_SHAPE}. Give --features, "
            "such as inception-2015-12-05.pt of StyleGAN3, and --reference (docs/evaluation.md says where both are); or "
            "--samples-npz alone, to measure the samples with another program"
        )
    network: FeatureNetwork = digits_classifier()
    if features is not None:
        network = features if isinstance(features, FileFeatures) else FileFeatures(features, settings)
    if isinstance(reference, Reference):
        return network, reference
    if reference is not None:
        return network, load_reference(reference, network, shape, progress=progress)
    if not of_digits:
        raise InputError(
            "evaluate: no reference. Give --reference: an .npz file such as ADM's VIRTUAL_imagenet256_labeled.npz, or a folder "
            "of pictures"
        )
    return network, digits_data()[0]


@contextlib.contextmanager
def _sample_file(
    path: Path | None, name: str, labels: LabelPolicy, count: int, num_classes: int, seed: int, quantise: Any
) -> Iterator[Callable[[str, np.ndarray], None] | None]:
    """Writes the images of the row with this name while they are drawn; None: writes nothing."""
    if path is None:
        yield None
        return
    settings = {"student": name, "labels": labels, "seed": seed, "quantise": quantise}
    with SampleFile(path, labels_of(labels, count, num_classes, seed), settings) as file:

        def write(row: str, images: np.ndarray) -> None:
            if row == name:
                file.write(to_bytes(images, quantise))

        yield write


def _decoder(codec: Codec, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    return lambda latents: codec.decode(torch.from_numpy(latents).to(device)).cpu().numpy()
