"""The result objects of the Python API: a job's figures and access to the files it wrote."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mnist_dist.errors import DataError
from mnist_dist.store.anywhere import ANYWHERE

if TYPE_CHECKING:
    import pyarrow as pa

    from mnist_dist.models.bundle import Bundle


@dataclass(frozen=True)
class Result:
    """The result of a job.

    Args:
        values: the content of the JSON line that the command prints.
    """

    values: Mapping[str, Any]

    @property
    def seconds(self) -> float | None:
        """Duration of the job, including earlier drivers; None if the job does not report it."""
        return cast("float | None", self.values.get("seconds"))

    def _of(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise DataError(f"the job gave no {name}: a plan and a dry run give {', '.join(self.values)}")
        return self.values[name]

    def _repr_html_(self) -> str:
        """An HTML table, for notebooks."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(_shown(value))}</td></tr>"
            for name, value in self.values.items()
        )
        return f"<table>{rows}</table>"


class TrainResult(Result):
    """A finished training run."""

    @property
    def uri(self) -> str:
        """The run's folder."""
        return str(self._of("run_dir"))

    @property
    def test_accuracy(self) -> float:
        """Accuracy on the test images, 0-1."""
        return float(self._of("test_accuracy"))

    @property
    def test_loss(self) -> float:
        """Mean cross-entropy on the test images, nats."""
        return float(self._of("test_loss"))

    def bundle(self) -> "Bundle":
        """The trained model; see `load_bundle`."""
        return _bundle(self._of("bundle"))


class SearchResult(Result):
    """A finished search."""

    @property
    def uri(self) -> str:
        """The search's folder."""
        return str(self._of("run_dir"))

    @property
    def report(self) -> str:
        """URI of the HTML page."""
        return str(self._of("report"))

    @property
    def best(self) -> Mapping[str, Any]:
        """The winner: `trial`, `config`, `val_accuracy`, `val_loss`, `test_accuracy`, `test_loss`, `ms_per_image`."""
        return cast(Mapping[str, Any], self._of("best"))

    def bundle(self) -> "Bundle":
        """The winner's model; see `load_bundle`."""
        return _bundle(self._of("bundle"))

    def table(self) -> "pa.Table":
        """The leaderboard: one row per trial, the best first."""
        return _parquet(self._of("leaderboard"))


class ScoreResult(Result):
    """A finished prediction table."""

    @property
    def uri(self) -> str:
        """The output's folder."""
        return str(self._of("output"))

    @property
    def images(self) -> int:
        """Number of rows in the table."""
        return int(self._of("images"))

    @property
    def statuses(self) -> Mapping[str, int]:
        """Status -> number of rows."""
        return cast(Mapping[str, int], self._of("statuses"))

    def table(self, columns: "list[str] | None" = None) -> "pa.Table":
        """The rows; see `read_predictions`.

        Args:
            columns: names of the columns to read; None: all.
        """
        from mnist_dist.scoring.predictions import read_predictions

        return read_predictions(self.uri, columns=columns)


class EvaluateResult(Result):
    """A finished evaluation. Figures are None without true labels, or if the table lacks a column they need."""

    @property
    def uri(self) -> str:
        """The results' folder."""
        return str(self._of("output"))

    @property
    def report(self) -> str:
        """URI of the HTML page."""
        return str(self._of("report"))

    @property
    def accuracy(self) -> float | None:
        """Accuracy, 0-1; None without labels, and of a multi-label table."""
        return cast("float | None", self.values.get("accuracy"))

    def table(self) -> "pa.Table":
        """The prediction table that was evaluated; see `read_predictions`."""
        from mnist_dist.scoring.predictions import read_predictions

        return read_predictions(self.values["predictions"])


class ReportResult(Result):
    """The page of a storage."""

    @property
    def uri(self) -> str:
        """URI of the HTML page."""
        return str(self._of("report"))


class ImportResult(Result):
    """An imported model."""

    @property
    def uri(self) -> str:
        """The bundle's folder."""
        return str(self._of("output"))

    @property
    def assumed(self) -> list[str]:
        """What neither the source nor an argument said."""
        return list(self._of("assumed"))

    def bundle(self) -> "Bundle":
        """The imported model; see `load_bundle`."""
        return _bundle(self.uri)


class CombineResult(Result):
    """A combination of bundles."""

    @property
    def uri(self) -> str:
        """The new bundle's folder."""
        return str(self._of("output"))

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy on the validation images, 0-1; None where none judged."""
        return cast("float | None", self.values.get("validation_accuracy"))

    def bundle(self) -> "Bundle":
        """The new model; see `load_bundle`."""
        return _bundle(self.uri)


class ExportResult(Result):
    """A finished export."""

    @property
    def uri(self) -> str:
        """The export's folder."""
        return str(self._of("output"))

    @property
    def path(self) -> str:
        """The file or folder that the runtime opens."""
        return str(self._of("path"))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bundle(uri: str) -> "Bundle":
    from mnist_dist.models.bundle import load_bundle

    return load_bundle(uri)


def _parquet(uri: str) -> "pa.Table":
    import pyarrow.parquet as pq

    with ANYWHERE.open_binary(uri) as file:
        return pq.read_table(file)
