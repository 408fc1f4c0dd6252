"""A teacher's ODE trajectories on disk: computed once, at great cost, and read many times."""

from pyard.trajectories.authors_files import convert_trajectories
from pyard.trajectories.batch import TrajectoryBatch
from pyard.trajectories.generate import generate_trajectories
from pyard.trajectories.manifest import TrajectoryManifest
from pyard.trajectories.merge import merge_trajectories
from pyard.trajectories.reader import TrajectoryReader
from pyard.trajectories.stats import trajectory_stats, verify_trajectories
from pyard.trajectories.store import TrajectoryStore

__all__ = [
    "TrajectoryBatch",
    "TrajectoryManifest",
    "TrajectoryReader",
    "TrajectoryStore",
    "convert_trajectories",
    "generate_trajectories",
    "merge_trajectories",
    "trajectory_stats",
    "verify_trajectories",
]
