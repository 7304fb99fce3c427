"""Keeps the rows of a comparison, and what later rows are measured against."""

import math
from dataclasses import asdict, dataclass, field

from orchestrator.comparison.contestants import REFERENCE, Contestant
from orchestrator.comparison.table import DENSE, ModelTasks, Row, gap_fraction
from orchestrator.inputs import Inputs
from orchestrator.record.totals import Totals, count_parameters, evaluated


@dataclass
class Scoreboard:
    """The rows so far, and the results that later rows are measured against."""

    inputs: Inputs
    dense: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    tasks: list[ModelTasks] = field(default_factory=list)
    # The reference method's totals, one per target.
    reference: list[Totals] = field(default_factory=list)

    def enter(self, contestant: Contestant, target: int, totals: Totals, seconds: float) -> list[Row]:
        """Add a model's rows, one for each set of held-out blocks, and its tasks; return the rows."""
        if contestant.name == REFERENCE:
            self.reference.append(totals)
        entered = [
            Row(
                method=contestant.name,
                source=contestant.source,
                sparsity=totals.sparsity,
                parameters=totals.parameters_after,
                data=data,
                **asdict(totals.evaluated[data]),
                perplexity=pruned,
                loss=math.log(pruned),
                gap=gap_fraction(*map(math.log, (pruned, dense, self.reference[target].perplexity[data][1]))),
                seconds=seconds,
            )
            for data, (dense, pruned) in totals.perplexity.items()
        ]
        self.rows += entered
        if totals.tasks:
            dense, pruned = zip(*totals.tasks, strict=True)
            self.tasks = self.tasks or [ModelTasks(method=DENSE, sparsity=0.0, results=dense)]
            self.tasks.append(ModelTasks(method=contestant.name, sparsity=totals.sparsity, results=pruned))
        return entered

    def enter_dense(self) -> None:
        """Add the dense model's rows."""
        parameters, _ = count_parameters(self.inputs.source)
        for data, perplexity in self.dense.items():
            self.rows.append(
                Row(
                    method=DENSE,
                    source="the model given",
                    sparsity=0.0,
                    parameters=parameters,
                    data=data,
                    **asdict(evaluated(self.inputs)[data]),
                    perplexity=perplexity,
                    loss=math.log(perplexity),
                    gap=0.0,
                    seconds=0.0,
                )
            )
