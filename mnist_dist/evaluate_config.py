"""The configuration of an evaluation: which table of predictions, what is true, where the results go.

Owns: the fields of the job, as `config.py` owns those of training and scoring.
"""

from dataclasses import dataclass

from mnist_dist.config import require
from mnist_dist.store.uris import absolute, join

LABEL_COLUMN = "label"


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Says what a table of predictions is worth: accuracy, calibration, mistakes; or how two tables differ."""

    predictions: str | None = None
    """Folder or `s3://` prefix of the prediction table; or, with `input`, None."""
    input: tuple[str, ...] = ()
    """Images that `bundle` scores first, into `<output>/predictions`; as `jobs.score` takes them. Of manifests
    (Parquet, CSV) the label column is carried along."""
    labels: str | None = None
    """Parquet, CSV or TSV file with the columns `uri` and `label`. None: a carried column of the table, or else the
    names of the folders that the images lie in."""
    label_column: str = LABEL_COLUMN
    """Column of the table that holds the truth, where it was carried along: class names or class numbers."""
    compare: str | None = None
    """Prediction table of another model over the same images."""
    output: str | None = None
    """Folder or `s3://` prefix of the results. None: `<predictions>-evaluation`, or `<bundle>-evaluation`."""
    bundle: str | None = None
    """Bundle that made the table, which names the classes, or that scores `input`. None: the one that the table
    remembers, where it is still there, or else the classes that were predicted."""
    top: int = 24
    """Images that are shown: of the most confident mistakes, the least confident hits, and those that moved."""
    verbose: bool = False
    """Show logs and tracebacks."""

    def __post_init__(self) -> None:
        require(
            bool(self.predictions) != bool(self.input),
            "predictions is a folder or an s3:// prefix; or input names images",
            predictions=self.predictions,
            input=self.input,
        )
        require(not self.input or self.bundle is not None, "input needs a bundle", bundle=self.bundle)
        require(bool(self.label_column), "label_column is a name", label_column=self.label_column)
        require(self.top >= 0, "top is a number of images, 0 or above", top=self.top)
        table, output = self.table_uri, self.output_uri
        require(
            not f"{output}/".startswith(f"{table}/"),
            "output lies outside of the table, whose readers would take its files for rows",
            output=self.output,
            predictions=self.predictions,
        )
        require(
            self.compare is None or absolute(self.compare) != table,
            "compare is another table",
            compare=self.compare,
        )

    @property
    def output_uri(self) -> str:
        """Where the results go, as every process sees it."""
        if self.output is None:
            return f"{absolute(self.predictions or self.bundle or '')}-evaluation"
        return absolute(self.output)

    @property
    def table_uri(self) -> str:
        """The prediction table that is evaluated, as every process sees it."""
        if self.predictions is None:
            return join(self.output_uri, "predictions")
        return absolute(self.predictions)
