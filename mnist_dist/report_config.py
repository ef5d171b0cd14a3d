"""The configuration of `jobs.report`: the storage to show, and where its page goes.

Owns: the fields of the job, as `config.py` owns those of training and scoring.
"""

from dataclasses import dataclass

from mnist_dist.config import require
from mnist_dist.store.uris import absolute, bucket_and_key, is_remote, join, scheme_of

INDEX_FILE = "index.html"


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """Writes one page about all runs, searches, prediction tables and evaluations in a storage, with links to their
    reports."""

    storage: str = "runs"
    """Folder or bucket prefix to show."""
    output: str | None = None
    """HTML file to write, in the same file system or bucket, since the links of the page are relative. None:
    `index.html` in `storage`."""
    verbose: bool = False
    """Show the traceback of an unexpected error."""

    def __post_init__(self) -> None:
        require(bool(self.storage), "storage must be a folder or a bucket prefix", storage=self.storage)
        require(self.output != "", "output must be an HTML file", output=self.output)
        is_page = self.output is None or self.output.endswith((".html", ".htm"))
        require(is_page, "output must be a file that ends in .html", output=self.output)
        is_near = _place_of(self.page_uri) == _place_of(self.storage)
        require(
            is_near,
            "output must lie in the same file system or bucket as storage, since the links of the page are relative",
            output=self.output,
            storage=self.storage,
        )

    @property
    def page_uri(self) -> str:
        """Absolute URI of the page."""
        return absolute(self.output) if self.output is not None else join(absolute(self.storage), INDEX_FILE)


def _place_of(uri: str) -> tuple[str, str]:
    """Scheme and bucket; both empty for a local path."""
    return (scheme_of(uri), bucket_and_key(uri)[0]) if is_remote(uri) else ("", "")
