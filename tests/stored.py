"""An MLflow store to put finished runs into, and what a terminal shows of their tables."""

from __future__ import annotations

from pathlib import Path

from mlflow.tracking import MlflowClient
from rich.console import Console

from dctc.tracking.comparison import Comparison
from dctc.tracking.tables import terminal_table


class Store:
    """An experiment to put finished runs into."""

    def __init__(self, client: MlflowClient, uri: str, name: str, files: Path) -> None:
        self.client, self.uri, self.name = client, uri, name
        self.id = client.create_experiment(name, artifact_location=files.as_uri())
        self.time = 1_700_000_000_000

    def add(
        self,
        method: str,
        share: str,
        seed: int | str,
        digest: str = "d1",
        status: str = "FINISHED",
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
        metrics: dict[str, list[float]] | None = None,
        **scores: float,
    ) -> str:
        own = {"method": method, "labelled_share": share, "seed": str(seed), "dataset_digest": digest}
        tags = own | (tags or {})
        self.time += 1000
        run = str(self.client.create_run(self.id, start_time=self.time, tags=tags).info.run_id)
        for net, score in scores.items():
            self.client.log_metric(run, f"test/{net}/miou", score)
        for key, value in (params or {}).items():
            self.client.log_param(run, key, value)
        for key, values in (metrics or {}).items():
            for step, number in enumerate(values):
                self.client.log_metric(run, key, number, step=step)
        self.client.set_terminated(run, status)
        return run


def printed(table: Comparison, styled: bool = False) -> str:
    console = Console(width=120, force_terminal=styled, color_system="standard", legacy_windows=False)
    with console.capture() as capture:
        console.print(terminal_table(table))
    return capture.get()
