"""Where a run can be watched: views of the record, never the record itself."""

from experiment.trackers.base import NoTracker, Safe, Tracker
from experiment.trackers.tensorboard_tracker import TensorBoardTracker
from experiment.trackers.trackio_tracker import TrackioTracker
from experiment.trackers.wandb_tracker import WandbTracker, wandb_id

__all__ = [
    "NoTracker",
    "Safe",
    "TensorBoardTracker",
    "Tracker",
    "TrackioTracker",
    "WandbTracker",
    "wandb_id",
]
