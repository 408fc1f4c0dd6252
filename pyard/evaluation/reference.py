"""What samples are compared with: the features of real images, or statistics of them that somebody published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pyard.data.pictures import picture_files
from pyard.errors import InputError
from pyard.evaluation.features import FeatureNetwork, activations_of
from pyard.evaluation.frechet import GaussianStatistics, RunningStatistics
from pyard.evaluation.images import folder_images, npz_images
from pyard.storage.arrays import open_npz
from pyard.storage.files import stand_in
from pyard.storage.reading import regular_file

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Reference:
    """Real images as a feature network sees them.

    Args:
        name: where they come from.
        statistics: of the features.
        features: [m, D], of the images that precision and recall are taken with; None: neither is measured.
        spatial: statistics of the spatial features; None: no sFID.
    """

    name: str
    statistics: GaussianStatistics
    features: np.ndarray | None = None
    spatial: GaussianStatistics | None = None

    @property
    def count(self) -> int:
        """Images that precision and recall are taken with; 0: none."""
        return 0 if self.features is None else len(self.features)

    @classmethod
    def of(
        cls,
        batches: Iterable[np.ndarray],
        network: FeatureNetwork,
        name: str = "images",
        *,
        progress: bool = False,
        total: int | None = None,
    ) -> Reference:
        """The reference that batches of images [n, C, H, W], uint8 or float from -1 to 1, make; `total` of them, if known."""
        features, spatial, with_spatial = [], RunningStatistics(), True
        for batch in tqdm(batches, desc=f"features of {name}", unit="batch", total=total, disable=not progress):
            found = activations_of(network, batch)
            features.append(found.features)
            with_spatial = found.spatial is not None
            if found.spatial is not None:
                spatial.add(found.spatial)
        if not features:
            raise InputError(f"reference {name}: no images")
        together = np.concatenate(features)
        return cls(name, GaussianStatistics.of(together), together, spatial.result() if with_spatial else None)


def load_reference(
    source: str | Path, network: FeatureNetwork, image_shape: tuple[int, ...], *, progress: bool = False
) -> Reference:
    """A reference by name.

    Args:
        source: an `.npz` file with `mu` and `sigma` (and `mu_s`, `sigma_s` of spatial features), with images `arr_0`, uint8
            [n, H, W, C], or with both, as ADM's reference batches have: then the statistics are as published and the images
            serve precision and recall alone. Or a folder of pictures, which are cropped to squares by ADM's rule.
        network: what features are taken with.
        image_shape: (C, H, W) of the samples that will be compared; a folder's pictures are cropped to it.
        progress: show a progress bar.

    Raises:
        InputError: nothing there that can be read, images of another shape, or statistics of another network.
    """
    path = Path(source)
    if path.is_dir():
        channels, height, width = image_shape
        if height != width:
            raise InputError(f"reference {path}: pictures are cropped to squares; samples are {height} x {width}")
        batches = folder_images(path, height, channels, _BATCH_SIZE)
        total = -(-len(picture_files(path)) // _BATCH_SIZE)
        return Reference.of(batches, network, path.name, progress=progress, total=total)
    if path.suffix != ".npz" or not path.exists():
        raise InputError(
            f"reference {path}: expected an .npz file with mu and sigma or images arr_0, such as ADM's reference batch "
            "VIRTUAL_imagenet256_labeled.npz (github.com/openai/guided-diffusion, evaluations), or a folder of pictures"
        )
    what = _no_archive(path)
    if what is not None:
        raise InputError(f"reference {path} is not an .npz file: {what}")
    try:
        with open_npz(path) as archive:
            names = set(archive.names)
            published: dict[str, np.ndarray] = {
                key: archive.read(key) for key in ("mu", "sigma", "mu_s", "sigma_s") if key in names
            }
    except InputError as error:
        raise InputError(f"reference {error}") from None
    statistics, spatial = (_published(path, published, *keys) for keys in (("mu", "sigma"), ("mu_s", "sigma_s")))
    found = None
    if "arr_0" in names:
        batches = npz_images(path, _BATCH_SIZE)
        found = Reference.of(_of_shape(batches, image_shape, path), network, path.name, progress=progress)
    elif statistics is None:
        raise InputError(f"reference {path}: it has {', '.join(sorted(names)) or 'nothing'}; expected mu and sigma, or arr_0")
    if statistics is None:
        assert found is not None
        return found
    # Images that are no images tell as well what the network gives.
    own = activations_of(network, np.zeros((2, *image_shape), np.float32))
    for kind, ours, theirs in (("features", own.features, statistics), ("spatial features", own.spatial, spatial)):
        if ours is not None and theirs is not None and ours.shape[1:] != theirs.mean.shape:
            raise InputError(
                f"reference {path}: statistics of {len(theirs.mean)} {kind}; {network.name} gives {ours.shape[1]}: they come "
                "from another network, or from another of its outputs"
            )
    return Reference(path.name, statistics, found.features if found else None, None if own.spatial is None else spatial)


def _no_archive(path: Path) -> str | None:
    """What a file named .npz is that is none; None if it may be one."""
    with regular_file(path) as file:
        if file.read(6) == b"\x93NUMPY":
            return (
                f'it is one array as np.save writes it; np.savez writes an .npz: python -c "import numpy as np; '
                f"np.savez('{path.with_stem(path.stem + '-archive')}', np.load('{path}'))\" if it holds images"
            )
    return stand_in(path)


def _published(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> GaussianStatistics | None:
    if mean not in arrays or covariance not in arrays:
        return None
    size = arrays[mean].size
    for name, shape in ((mean, (size,)), (covariance, (size, size))):
        array = arrays[name]
        if array.dtype.kind not in "fiu" or array.shape != shape or not size or not np.isfinite(array).all():
            raise InputError(f"reference {path}: {name} is {array.dtype} {array.shape}; expected finite numbers {shape}")
    return GaussianStatistics(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), 0)


def _of_shape(batches: Iterable[np.ndarray], shape: tuple[int, ...], path: Path) -> Iterable[np.ndarray]:
    for batch in batches:
        if batch.shape[1:] != shape:
            raise InputError(f"reference {path}: images of {batch.shape[1:]}; the samples are {shape}")
        yield batch
