"""Measuring ways of drawing samples side by side: same noise, same labels, same count, timed in turn."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.errors import InputError
from pyard.evaluation.features import Classifier, FeatureNetwork, activations_of
from pyard.evaluation.frechet import GaussianStatistics, RunningStatistics, frechet_distance, frechet_infinity
from pyard.evaluation.inception_score import inception_score
from pyard.evaluation.neighbours import precision_recall
from pyard.evaluation.reference import Reference
from pyard.evaluation.report import Evaluation, Quality

if TYPE_CHECKING:
    from pyard.sampling.exposure_bias import ExposureBias

LabelPolicy = Literal["balanced", "random"]
NEIGHBOURS = 3  # of precision and recall, as in ADM's protocol


@dataclass(frozen=True)
class Candidate:
    """A way of drawing samples.

    Args:
        name: of its row.
        network_passes: network passes a sample.
        draw: (noise float32 [n, C, H, W], labels int64 [n]) to samples float32 [n, C, H, W], or to pictures uint8 [n, 3, H, W].
    """

    name: str
    network_passes: int
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray]


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ... num_classes - 1, 0, 1, ...: int64 [count]."""
    return np.arange(count, dtype=np.int64) % num_classes


def labels_of(policy: LabelPolicy, count: int, num_classes: int, seed: int) -> np.ndarray:
    """The labels of samples 0 ... count - 1, int64: in turn, or drawn uniformly, each a function of (seed, number)."""
    if policy not in get_args(LabelPolicy):
        raise InputError(f"evaluation: labels is {policy!r}; expected one of {get_args(LabelPolicy)}")
    if policy == "balanced":
        return balanced_labels(count, num_classes)
    return uniform_labels(seed, np.arange(count), num_classes)


def measure(
    teacher: Candidate | None,
    students: Sequence[Candidate],
    *,
    data: np.ndarray | Reference | None,
    features: FeatureNetwork | None,
    sample_shape: tuple[int, ...],
    num_classes: int,
    count: int,
    seed: int,
    batch_size: int = 128,
    progress: bool = True,
    labels: LabelPolicy = "balanced",
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    extrapolate: bool = False,
    exposure: Mapping[str, ExposureBias] | None = None,
    on_images: Callable[[str, np.ndarray], None] | None = None,
) -> Evaluation:
    """Measure a teacher and its students.

    All draw `count` samples with the same labels from the same noise. Samples are clipped to -1 ... 1, as a picture would be:
    a solver that starts where alpha = 0.006 throws one sample in hundreds far out, and unclipped these few would be the whole
    error. The teacher's reference samples come from noise of their own (seed + 1), so the teacher's own distance to them is
    not zero but what chance alone leaves. Features are taken a batch at a time; images are not kept.

    Args:
        teacher: whose samples the students should draw; None: students are compared with the data alone.
        students: the other rows.
        data: real images float32 [m, C, H, W], -1 to 1, or what is known of them; None with `features` None.
        features: what Fréchet distances are taken in; its classes give the label accuracy if it is a `Classifier`, and more is
            measured if it is an `ActivationNetwork`. None: endpoints and time alone are measured.
        sample_shape: (C, H, W) of the noise.
        num_classes: labels are below it.
        count: samples a row, at least 2; the same for all, as distances from different counts do not compare.
        seed: of the noise; not the seed of the trajectories that the students were trained on.
        batch_size: samples that are drawn, and timed, together.
        progress: show a progress bar.
        labels: `balanced`, every class in turn, or `random`, uniform.
        decode: latents float32 [n, C, H, W] to images [n, 3, height, width], about -1 to 1, where samples are latents: images
            are decoded before they are measured, endpoints are compared as latents.
        extrapolate: extrapolate Fréchet distances to infinitely many samples as well (`frechet_infinity`).
        exposure: exposure bias of rows, by name, to store with them.
        on_images: is given each row's name and its images, batch after batch, uint8 or float from -1 to 1.

    Returns:
        A row for each, the teacher's first.

    Raises:
        InputError: too few samples, or samples that are not finite.
    """
    for name, value, least in (("count", count, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"evaluation: {name} is {value}; expected at least {least}")
    if extrapolate and isinstance(data, Reference) and count < 4 * (size := len(data.statistics.mean)):
        raise InputError(
            f"evaluation: extrapolate from {count} samples of {size} features; expected a count of at least {4 * size}; or "
            "leave extrapolate out"
        )
    candidates = [*([] if teacher is None else [teacher]), *students]
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise InputError(f"evaluation: rows {', '.join(names) or 'none'}; expected at least one, with different names")
    classes = labels_of(labels, count, num_classes, seed)
    if isinstance(data, np.ndarray) and features is not None:
        data = Reference.of([data], features)
    runs = [_Run(candidate, features) for candidate in candidates]
    references = _Features(features)
    with tqdm(total=count, desc="evaluating", unit="sample", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            index = np.arange(start, min(start + batch_size, count))
            noise = standard_normal(seed, index, sample_shape)
            if teacher is not None and features is not None:
                drawn = teacher.draw(standard_normal(seed + 1, index, sample_shape), classes[index])
                references.add(_images(drawn, decode))
            ends = None
            # In turn, so that a busy spell of the machine hits all alike.
            for run in runs:
                drawn = run.draw(noise, classes[index])
                images = _images(drawn, decode)
                compared = images if decode is None else drawn
                if teacher is not None and ends is None:
                    ends = compared
                run.take(images, compared, ends, classes[index])
                if on_images is not None:
                    on_images(run.candidate.name, images)
            bar.update(len(index))
    rows = [run.row(data, references, extrapolate, count) for run in runs]
    rows = [dataclasses.replace(row, exposure_bias=(exposure or {}).get(row.name)) for row in rows]
    settings: dict[str, Any] = {
        "count": count,
        "seed": seed,
        "reference_seed": seed + 1,
        "labels": labels,
        "batch_size": batch_size,
    }
    if features is not None:
        settings |= {"features": features.name, "features_fingerprint": features.fingerprint}
        if isinstance(data, Reference):
            settings |= {"real_images": data.count, "reference": data.name, "neighbours": NEIGHBOURS}
    return Evaluation(tuple(rows), settings)


class _Features:
    """What a feature network says of images that come in batches."""

    def __init__(self, network: FeatureNetwork | None):
        self._network = network
        self._features: list[np.ndarray] = []
        self._probabilities: list[np.ndarray] = []
        self.spatial = RunningStatistics()

    def add(self, images: np.ndarray) -> None:
        """Take a batch."""
        if self._network is None:
            return
        found = activations_of(self._network, images)
        self._features.append(found.features)
        if found.spatial is not None:
            self.spatial.add(found.spatial)
        if found.probabilities is not None:
            self._probabilities.append(found.probabilities)

    @property
    def features(self) -> np.ndarray | None:  # [n, D]
        """Of all images; None: no network."""
        return np.concatenate(self._features) if self._features else None

    @property
    def probabilities(self) -> np.ndarray | None:  # [n, classes]
        """Of all images; None: the network gives none."""
        return np.concatenate(self._probabilities) if self._probabilities else None


class _Run:
    """A candidate while it is measured."""

    def __init__(self, candidate: Candidate, network: FeatureNetwork | None):
        self.candidate = candidate
        self._network = network
        self._outputs = _Features(network)
        self._seconds: list[float] = []
        self._squares, self._compared, self._correct = 0.0, 0, 0

    def draw(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """A batch of samples, timed."""
        begin = time.perf_counter()
        drawn = self.candidate.draw(noise, labels)
        self._seconds.append((time.perf_counter() - begin) / len(labels))
        if not np.isfinite(drawn).all():
            raise InputError(f"evaluation: samples of {self.candidate.name!r} contain NaN or infinity")
        return drawn

    def take(self, images: np.ndarray, compared: np.ndarray, ends: np.ndarray | None, labels: np.ndarray) -> None:
        """What is measured of one batch: images, and samples to compare with the teacher's `ends`."""
        self._outputs.add(images)
        if isinstance(self._network, Classifier):
            self._correct += int((self._network.classify(images) == labels).sum())
        # Pictures of a student that brings its own decoder are no endpoints.
        if ends is not None and compared.dtype != np.uint8:
            self._squares += float(np.square(compared - ends, dtype=np.float64).sum())
            self._compared += compared.size

    def row(self, data: object, references: _Features, extrapolate: bool, count: int) -> Quality:
        """All that was found."""
        found: dict[str, Any] = dict.fromkeys(("frechet_to_data", "frechet_to_teacher"))
        features, teachers, probabilities = self._outputs.features, references.features, self._outputs.probabilities
        if features is not None:
            gaussian = GaussianStatistics.of(features)
            if isinstance(data, Reference):
                found["frechet_to_data"] = frechet_distance(gaussian, data.statistics)
                if data.features is not None and min(count, data.count) > NEIGHBOURS:
                    found["precision"], found["recall"] = precision_recall(data.features, features, NEIGHBOURS)
                if data.spatial is not None:
                    found["spatial_frechet_to_data"] = frechet_distance(self._outputs.spatial.result(), data.spatial)
                if extrapolate:
                    found["frechet_to_data_infinity"] = frechet_infinity(features, data.statistics)
            if teachers is not None:
                found["frechet_to_teacher"] = frechet_distance(gaussian, GaussianStatistics.of(teachers))
                if extrapolate:
                    found["frechet_to_teacher_infinity"] = frechet_infinity(features, teachers)
            if probabilities is not None:
                found["inception_score"] = inception_score(probabilities)
        return Quality(
            name=self.candidate.name,
            network_passes=self.candidate.network_passes,
            label_accuracy=self._correct / count if isinstance(self._network, Classifier) else None,
            endpoint_mse=self._squares / self._compared if self._compared else None,
            # The first batch warms up, the last one may be smaller.
            seconds_per_image=statistics.median(self._seconds[1:-1] or self._seconds),
            **found,
        )


def _images(drawn: np.ndarray, decode: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    """Samples as images: pictures as they are, latents decoded, floats clipped to -1 ... 1."""
    if drawn.dtype == np.uint8:
        return drawn
    return np.clip(drawn if decode is None else decode(drawn), -1, 1)
