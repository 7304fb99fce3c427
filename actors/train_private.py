"""Uses private interfaces of Ray Train. tests/actors/test_train_private.py says what we expect of each name."""

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class TrainerAlone(TorchTrainer):
    """A `TorchTrainer` for a Ray that ends with its driver.

    Ray Train's cleaner frees what a lost driver held on a cluster. It asks the dashboard, which a local Ray does not
    have, and at the end Ray Train waits twelve seconds for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
