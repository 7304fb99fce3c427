"""What we expect of Ray Train's private names."""

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from actors.train_private import TrainerAlone


def kinds_of(trainer: TorchTrainer) -> list[type]:
    return [type(one) for one in trainer._create_default_callbacks()]


def test_a_trainer_alone_has_all_callbacks_but_the_cleaner() -> None:
    usual, alone = (kinds_of(kind(print)) for kind in (TorchTrainer, TrainerAlone))
    assert PlacementGroupCleanerCallback in usual
    assert alone == [kind for kind in usual if kind is not PlacementGroupCleanerCallback]
