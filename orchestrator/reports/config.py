"""Declares the settings of `report`."""

from dataclasses import dataclass

from orchestrator.config import PruneConfig
from orchestrator.settings import Effect, check_settings, require, same_setting, setting

REPORT = ("report",)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The settings of `report`: the options of the command line.

    Raises:
        ConfigError: A setting has another type, or there is no run to report.
    """

    runs: tuple[str, ...] = setting(
        (),
        "What to report: directories that prune, tune or compare wrote, MLflow run ids, evaluation.json, bench.json.",
        None,
        REPORT,
        effect=Effect.INPUT,
    )
    output: str = setting(
        "report.html", "The page to write.", "Result", REPORT, effect=Effect.PLACE, metavar="FILE.html"
    )
    overwrite: bool = setting(False, "Replace a page that is there already.", "Result", REPORT, effect=Effect.ATTEMPT)
    prompts: tuple[str, ...] = setting(
        (),
        "Text that the dense and the pruned model continue side by side; repeatable. It loads both.",
        "Result",
        REPORT,
        effect=Effect.INPUT,
        metavar="TEXT",
        flag="--continue",
    )
    tracking_uri: str | None = same_setting(
        PruneConfig, "tracking_uri", help="MLflow store that has the runs.", shown="sqlite:///mlflow.db"
    )

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the runs."""
        check_settings(self)
        require(
            bool(self.runs), "no run is named: pass RUN_OR_DIR, a directory that prune wrote or the id of an MLflow run"
        )
