"""The finalists of a search as one bundle: made, judged against the winner, and tested in its place.

Owns: which finalists are combined, whether the result is better than the winner, and the bundle of the search that
comes of it. Does not own: the methods (`combining`), or training the finalists, whose untested bundles are read here.

Contract: validation images alone decide. The combination lies in the search's folder as `combined/` before it is
tested, so a resumed search judges the same file; it is tested only if it becomes the bundle of the search.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.combining.building import measure
from mnist_dist.combining.combine import combined_bundle
from mnist_dist.combining.measuring import LabelledImages
from mnist_dist.combining.members import Member, check_members, same_architecture
from mnist_dist.config import CombineMethod
from mnist_dist.data.splits import Splits
from mnist_dist.engines.steps import run_step
from mnist_dist.errors import CannotCombine, ConfigError, StepFailed, StorageError, first_line
from mnist_dist.evaluation.metrics import wilson_interval
from mnist_dist.models.bundle import (
    BUNDLE_FILE,
    CALIBRATION_FILE,
    Bundle,
    BundleInfo,
    load_bundle,
    read_bundle_info,
    write_model_bundle,
)
from mnist_dist.on_ray.combining.validation import images_of
from mnist_dist.on_ray.data.prepare import DecodedData
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What is combined of the finalists of a search."""

    method: CombineMethod
    finalists: Mapping[int, str]
    """Trial -> URI of its untested bundle, the winner first."""
    uri: str
    """The folder of the combination."""
    decoded: DecodedData
    """The images at the winner's size."""
    splits: Splits
    session: Session

    def make(self) -> bool:
        """Makes the combination, unless it is there. Returns whether there is one: no other finalist may fit, or the
        models cannot be combined for another reason, which is shown and costs the search nothing but the
        combination."""
        if ANYWHERE.exists(join(self.uri, BUNDLE_FILE)):
            return True
        members = self._fitting([Member(uri, load_bundle(uri)) for uri in self.finalists.values()])
        if len(members) < 2:
            self.session.console.line(f"{self.method}: no other finalist fits the winner: nothing to combine")
            return False
        try:
            check_members(members, self.method)
            self._combine(members)
        except (CannotCombine, ConfigError, StepFailed) as error:
            if isinstance(error, StorageError):
                raise  # It ends the search, and the same command resumes here.
            self.session.console.line(f"{self.method} failed, so the winner stays alone: {first_line(error)}")
            return False
        return True

    def _combine(self, members: list[Member]) -> None:
        with tempfile.TemporaryDirectory(prefix="mnist_dist-combine-") as scratch:
            folder = Path(scratch, "bundle")
            images = self._images(self.splits.val)
            combined_bundle(members, self.method, folder, session=self.session, images=images, batch_size=BATCH_SIZE)
            self.session.confirm_lock()
            ANYWHERE.upload_folder(folder, self.uri, last=BUNDLE_FILE)

    def _fitting(self, members: list[Member]) -> list[Member]:
        """The winner, and those that can be combined with it. Of models that are the same, one is enough."""
        winner = members[0]

        def fits(member: Member) -> bool:
            ours, theirs = winner, member
            if (ours.info.spec, ours.info.model_file) != (theirs.info.spec, theirs.info.model_file):
                return False
            if ours.bundle.fixed_batch != theirs.bundle.fixed_batch:
                return False
            return self.method == "ensemble" or same_architecture(winner.bundle, member.bundle)

        distinct = dict[str, Member]()
        for member in members:
            distinct.setdefault(member.info.model_id, member)
        return [member for member in distinct.values() if member is winner or fits(member)]

    @cached_property
    def info(self) -> BundleInfo:
        """Of the combination, once it is made."""
        return read_bundle_info(self.uri)

    @cached_property
    def members(self) -> tuple[int, ...]:
        """The trials whose models are in it. They are known by the models, since the storage may have been moved."""
        assert self.info.combined is not None
        used = {member.model_id for member in self.info.combined.members if member.is_used}
        numbers = dict[str, int]()
        for number, uri in self.finalists.items():
            numbers.setdefault(read_bundle_info(uri).model_id, number)
        return tuple(number for model_id, number in numbers.items() if model_id in used)

    @cached_property
    def is_better(self) -> bool:
        """Whether it holds more than the winner, and is as good on the validation images.

        The winner is the best of several on these very images, which flatters it. So a combination that is less
        accurate only within the winner's 95 % interval is the better one if its loss is smaller.
        """
        assert self.info.combined is not None
        winner = self.info.combined.members[0].validation_accuracy
        if len(self.members) < 2 or winner is None:
            return False
        accuracy, loss = (self.info.validation[name] for name in ("accuracy", "loss"))
        if accuracy >= winner:
            return True
        images = len(self.splits.val)
        lowest, _ = wilson_interval(round(winner * images), images)
        alone = read_bundle_info(next(iter(self.finalists.values())))
        return bool(accuracy >= lowest and loss < alone.validation["loss"])

    def described(self) -> dict[str, Any]:
        """For the result of the search."""
        return {
            "method": self.method,
            "members": list(self.members),
            "val_accuracy": self.info.validation["accuracy"],
            "val_loss": self.info.validation["loss"],
            "is_bundle": self.is_better,
        }

    def finish(self, uri: str) -> dict[str, float]:
        """Tests the combination and writes it, with its test metrics, as the bundle of the search. Returns the metrics.

        Args:
            uri: of that bundle; one that is there is left as it is.
        """
        if not ANYWHERE.exists(join(uri, BUNDLE_FILE)):
            bundle = load_bundle(self.uri)
            closed = Bundle(bundle.path, bundle.info)
            step = partial(measure, closed, self._images(self.splits.test), BATCH_SIZE)
            tested = asdict(run_step(step, title="testing the combination", session=self.session))
            self._write(bundle, tested, uri)
        return dict(read_bundle_info(uri).test)

    def _write(self, bundle: Bundle, tested: Mapping[str, float], uri: str) -> None:
        calibration = bundle.path / CALIBRATION_FILE
        extra = {CALIBRATION_FILE: calibration.read_bytes()} if calibration.is_file() else {}
        with tempfile.TemporaryDirectory(prefix="mnist_dist-combine-") as scratch:
            folder = Path(scratch, "bundle")
            write_model_bundle(folder, bundle.model_path, replace(bundle.info, test=tested), extra=extra)
            self.session.confirm_lock()
            ANYWHERE.upload_folder(folder, uri, last=BUNDLE_FILE)

    def _images(self, rows: npt.NDArray[np.int64]) -> LabelledImages:
        return images_of(self.decoded.plan, rows, fingerprint=self.decoded.fingerprint)
