"""Workers that stay from one run to the next: to start them takes seconds, which is most of a small run."""

from typing import Any

import ray

from actors.group import ShardGroup
from actors.placement import Placement


class Standing:
    """The last run's place on the cluster and the workers there, for the next run that asks for the same.

    Where a run ended by an error, and where another place is asked for, they end as a run's own do.
    """

    def __init__(self) -> None:
        self._place: tuple[Any, ...] = ()
        self._group: Any = None
        self._actors: list[Any] = []
        self._offload = False

    def release(self) -> None:
        """End the workers and give their place back."""
        self._end_workers()
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        self._place, self._group = (), None

    def leave(self, offload: bool, actors: list[Any]) -> None:
        """Let workers stand that hold their states in files, or do not."""
        self._offload, self._actors = offload, actors

    def take(self, offload: bool) -> list[Any]:
        """Return the workers that stand, if they are such; others have the place of those to come, and end."""
        if offload != self._offload:
            self._end_workers()
        actors, self._actors = self._actors, []
        return actors

    def _end_workers(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def placement(self, *place: Any) -> Placement:
        """Make a placement that takes the place that stands, and leaves it standing."""
        standing = self

        class StandingPlacement(Placement):
            def __enter__(self) -> Placement:
                # What a placement tells is the run's own.
                if standing._place != place[:3]:
                    standing.release()
                self._group = standing._group
                return super().__enter__()

            def __exit__(self, *exception: object) -> None:
                if exception[0] is None:
                    standing._place, standing._group = place[:3], self._group
                else:
                    standing.release()
                    super().__exit__(*exception)

        return StandingPlacement(*place)

    def shards(self, *arguments: Any, offload: bool, **settings: Any) -> ShardGroup:
        """Make a group of shards that takes the workers that stand, and leaves them standing."""
        standing = self

        class StandingShards(ShardGroup):
            def start(self) -> None:
                if not self._actors and not self._lost:
                    self._actors = standing.take(offload)
                super().start()

            def __exit__(self, *exception: object) -> None:
                if exception[0] is None and not self._lost and self._actors:
                    for stream in list(self._streams):
                        self.close_stream(stream)
                    standing.leave(offload, self._actors)
                    self._actors = []
                super().__exit__(*exception)

        return StandingShards(*arguments, offload=offload, **settings)
