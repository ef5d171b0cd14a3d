"""The configuration of an evaluation: the prediction table, the true labels and the output.

Owns: the fields of the job, as `config.py` owns those of training and scoring.
"""

from dataclasses import dataclass, field
from typing import Literal

from mnist_dist.config import StoreConfig, require
from mnist_dist.score_config import TtaView
from mnist_dist.store.uris import absolute, join

LABEL_COLUMN = "label"
Match = Literal["uri", "path", "name", "stem"]


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Evaluates a prediction table: accuracy, calibration and mistakes. Optionally compares it with a second table."""

    predictions: str | None = None
    """Folder or bucket prefix of the prediction table. None if `input` is given."""
    input: tuple[str, ...] = ()
    """Images to score first with `bundle`, into `<output>/predictions`; the same forms as for scoring. From lists
    (Parquet, CSV) the label column is copied into the table."""
    labels: str | None = None
    """Parquet, CSV or TSV file with `uri_column` and `label_column`, or the labelled images themselves, in any form
    that can be trained on. None: the label column of the table, the labels of `input`, or else the images' folders."""
    match: Match = "uri"
    """How `labels` find their images. uri: the whole URI. path: the end of the image's path; leading folders that all
    labels share are left out as far as needed. name: the file name. stem: the file name without its suffix."""
    label_column: str = LABEL_COLUMN
    """Column with the true labels, of the label file, else of the table, if it was carried: class names, class numbers,
    or true and false."""
    uri_column: str = "uri"
    """Column with the URIs, paths or names of the images, of the label file, else of the lists in `input`."""
    label_separator: str | None = None
    """Multi-label tables: what stands between the labels of an image where they are one text (`;`, `|`). None: the
    labels are lists, or a file has a row for each."""
    image_column: str | None = None
    """The column of Parquet files that holds the images. None: found by its type."""
    compare: str | None = None
    """Prediction table of another model on the same images, to compare with."""
    output: str | None = None
    """Folder or bucket prefix for the results. None: `<predictions>-evaluation`, or `<bundle>-evaluation`."""
    bundle: str | None = None
    """Bundle that scores `input`, or that made the table and names the classes. None: the bundle recorded in the table
    if it still exists, or else the predicted classes."""
    threshold: float | str | None = None
    """Multi-label bundle and `input`: the probability from which a class is predicted, as in scoring: a number, or a
    file with one per class. None: 0.5."""
    tta: tuple[TtaView, ...] = ()
    """Test-time augmentation of `input`: the mean over several views of each image, as in scoring."""
    top: int = 24
    """Images to show of each kind: the most confident mistakes, what is barely right, and changed predictions; of
    mistakes six times as many, so that each confusion has some."""
    store: StoreConfig = field(default_factory=StoreConfig)
    verbose: bool = False
    """Show logs and tracebacks."""

    def __post_init__(self) -> None:
        require(
            bool(self.predictions) != bool(self.input),
            "predictions must be a folder or a bucket prefix, or input must name images",
            predictions=self.predictions,
            input=self.input,
        )
        require(not self.input or self.bundle is not None, "input needs a bundle", bundle=self.bundle)
        require(bool(self.input) or not self.tta, "tta needs input: a table is evaluated as it is", tta=self.tta)
        require(
            bool(self.input) or self.threshold is None,
            "threshold needs input: a table is evaluated with the threshold that it was made with",
            threshold=self.threshold,
        )
        require(bool(self.label_column), "label_column must be a column name", label_column=self.label_column)
        require(bool(self.uri_column), "uri_column must be a column name", uri_column=self.uri_column)
        require(
            self.match == "uri" or self.labels is not None, "match needs labels", match=self.match, labels=self.labels
        )
        require(self.label_separator != "", "label_separator must not be empty", label_separator=self.label_separator)
        require(self.top >= 0, "top must be 0 or a number of images", top=self.top)
        table, output = self.table_uri, self.output_uri
        require(
            not f"{output}/".startswith(f"{table}/"),
            "output must lie outside the table, whose readers would take its files for rows",
            output=self.output,
            predictions=self.predictions,
        )
        require(
            self.compare is None or absolute(self.compare) != table,
            "compare must name another table",
            compare=self.compare,
        )

    @property
    def output_uri(self) -> str:
        """Absolute URI of the results."""
        if self.output is None:
            return f"{absolute(self.predictions or self.bundle or '')}-evaluation"
        return absolute(self.output)

    @property
    def table_uri(self) -> str:
        """Absolute URI of the evaluated prediction table."""
        if self.predictions is None:
            return join(self.output_uri, "predictions")
        return absolute(self.predictions)
