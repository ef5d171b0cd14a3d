"""listing: what `--list` says of training runs, searches and prediction tables, in each state, local and on S3."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import manifest_rows
from harness import Recorder, an_epoch, run_command, s3_client
from scored import described_by, one_hot, plan_of, scored_rows

from mnist_dist import inventory
from mnist_dist.config import PhasesConfig, TrainJob
from mnist_dist.documents import encode
from mnist_dist.errors import ConfigError, StorageError
from mnist_dist.inventory import Folder, InventoryRow, ListJob, RunFacts, ago, facts_name, facts_names, rows_below
from mnist_dist.models.history import history_csv
from mnist_dist.score_config import TableConfig
from mnist_dist.scoring.commit import commit
from mnist_dist.scoring.generations import SUMMARY, Generation, Output
from mnist_dist.scoring.manifest import write_manifest
from mnist_dist.scoring.output_row import DEPTH, table_row
from mnist_dist.scoring.predictions import MARK, prediction_schema
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.lock import Holder, Lock, holder_of
from mnist_dist.store.s3_reads import FastReads
from mnist_dist.store.uris import join
from mnist_dist.training.checkpoints import STATE_FILE, Checkpoint, State, write_checkpoint
from mnist_dist.training.runs import Run, attempt_name, run_row
from mnist_dist.tuning.search_row import search_row
from mnist_dist.tuning.trials import Status, Trial, TrialRecords, TrialsOver

TRAIN = TrainJob(phases=PhasesConfig(epochs=(3, 4), trainable=("head", "all")))
SEARCH = SearchJob(
    space=SearchSpace(backbones=(BackboneSpace(backbone="mlp", trained=("all",)),)),
    search=SearchConfig(trials=5, finalists=2),
)
CLASSES = ("ant", "bee", "cat")
SHARD_SIZE = 4
FENCE = 17
"""Number of the lock under which runs and searches begin."""
KILLED_DRIVER = (
    "import os, sys; from mnist_dist.store.lock import Lock; Lock(sys.argv[1], what='it').__enter__(); os._exit(9)"
)


# --- what drivers leave ----------------------------------------------------------------------------------------------


def leave_lock(uri: str) -> None:
    """As a driver that was killed."""
    assert subprocess.run([sys.executable, "-c", KILLED_DRIVER, uri]).returncode == 9


def leave_released_lock(run: Run) -> None:
    """As a driver that has ended."""
    with Lock(run.lock_uri, what=run.uri, above=run.max_number):
        pass


def begun_run(root: str, name: str) -> Run:
    run = Run(join(root, name))
    run.begin(RunFacts(recipe="quickstart", settings=TRAIN.settings(), features=None, records="abc"), fence=FENCE)
    return run


def end_epoch(run: Run, number: int) -> None:
    """As the loop: a line of the history for each epoch so far."""
    lines = [an_epoch(epoch, val_accuracy=0.5 + epoch / 100) for epoch in range(1, number + 1)]
    ANYWHERE.write_bytes(join(run.uri, "history.csv"), history_csv(lines))


def save_checkpoint(run: Run, scratch: Path) -> None:
    scratch.mkdir()
    arrays = [np.zeros(3, np.float32)]
    write_checkpoint(scratch, Checkpoint(state=State(step=7), weights=arrays, optimizer=arrays, best=None))
    ANYWHERE.upload_folder(scratch, join(run.uri, attempt_name(FENCE), "checkpoint-000000007"), last=STATE_FILE)


def begun_search(root: str, name: str, job: SearchJob = SEARCH) -> Run:
    run = Run(join(root, name))
    run.begin(RunFacts(recipe="search-digits", settings=job.settings(), features=None, records="abc"), fence=FENCE)
    return run


def put_trials(run: Run, *status: Status, folder: str = "trials") -> None:
    """Trial 2 is the best that is not failed."""
    for number, word in enumerate(status):
        accuracy = None if word in ("running", "failed") else 0.9 - abs(number - 2) / 100
        trial = Trial(number=number, params={}, status=word, val_accuracy=accuracy, val_loss=1.0)
        TrialRecords(join(run.uri, folder), fence=FENCE).write(trial)


def begun_table(uri: str, *, images: int) -> tuple[Output, Generation]:
    output = Output(uri)
    generation = output.new_generation(plan_of(), fence=output.max_number() + 1)
    rows = manifest_rows([f"{generation.number}-{index:02d}.png" for index in range(images)])
    generation.begin(lambda to: write_manifest(to, rows, shard_size=SHARD_SIZE))
    return output, generation


def put_shards(generation: Generation, *shards: int) -> None:
    """In each, the first image is missing."""
    with pq.ParquetFile(pa.BufferReader(ANYWHERE.read_bytes(generation.manifest_uri))) as manifest:
        for shard in shards:
            uris = manifest.read_row_group(shard)["uri"].to_pylist()
            status = ["missing"] + ["ok"] * (len(uris) - 1)
            rows = scored_rows(uris, one_hot([1] * len(uris), 3), CLASSES, status=status, model_id="m")
            with ANYWHERE.new_object(generation.shard_uri(shard)) as file:
                pq.write_table(rows, file)


def committed_table(uri: str, *, images: int, good: bool = True) -> Output:
    output, generation = begun_table(uri, images=images)
    shards = -(-images // SHARD_SIZE)
    put_shards(generation, *range(shards))
    commit(
        output,
        generation,
        fence=generation.number,
        shards=shards,
        schema=prediction_schema(TableConfig(), carried=pa.schema([])),
        judge=lambda counts, rows: good,
        description=described_by(CLASSES),
        images_per_s=None,
        check=lambda: None,
        progress=lambda done, total: None,
    )
    return output


# --- how they are told -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "local" else str(request.getfixturevalue("s3"))


def the_run(root: str) -> InventoryRow:
    (row,) = rows_below(root, run_row)
    return row


def the_search(root: str) -> InventoryRow:
    (row,) = rows_below(root, search_row)
    return row


def the_table(root: str) -> InventoryRow:
    (row,) = rows_below(root, table_row, depth=DEPTH)
    return row


def words(row: InventoryRow) -> tuple[str, str, str]:
    return row.state, row.progress, row.result


def test_a_training_run_is_told_from_its_begin_to_its_result(root: str, tmp_path: Path) -> None:
    run = begun_run(root, "first")
    assert words(the_run(root)) == ("new", "0 of 7 epochs", "")
    save_checkpoint(run, tmp_path / "checkpoint")
    assert words(the_run(root)) == ("stopped", "0 of 7 epochs", "")
    end_epoch(run, 2)
    assert words(the_run(root)) == ("stopped", "2 of 7 epochs", "validation accuracy 0.5200 so far")
    with Lock(join(run.uri, "lock"), what=run.uri):
        assert words(the_run(root)) == ("running", "2 of 7 epochs", "validation accuracy 0.5200 so far")
        assert the_run(root).numbers["driver"]["pid"] == os.getpid()
    run.finish({"epochs": 6, "test_accuracy": 0.97, "validation_accuracy": 0.96})
    row = the_run(root)
    assert words(row) == ("finished", "6 of 7 epochs", "test accuracy 0.9700")
    assert (row.name, row.uri, row.numbers["recipe"]) == ("first", run.uri, "quickstart")


def test_a_killed_driver_is_not_at_work(root: str) -> None:
    run = begun_run(root, "first")
    end_epoch(run, 1)
    leave_lock(join(run.uri, "lock"))
    holder = holder_of(join(run.uri, "lock"))
    assert holder is not None
    assert holder.is_gone
    assert not holder.seems_alive
    assert the_run(root).state == "stopped"


def test_a_driver_that_has_only_its_lock_is_told_by_both_lists(tmp_path: Path) -> None:
    with Lock(str(tmp_path / "runs" / "first" / "lock"), what="it"):
        assert words(the_run(str(tmp_path / "runs"))) == ("running", "", "")
        assert words(the_search(str(tmp_path / "runs"))) == ("running", "", "")


def test_a_driver_that_has_ended_is_not_at_work(root: str) -> None:
    run = begun_run(root, "first")
    leave_released_lock(run)
    assert holder_of(run.lock_uri) is None
    assert words(the_run(root)) == ("new", "0 of 7 epochs", "")
    assert "driver" not in the_run(root).numbers


def test_a_lock_alone_that_was_left_is_neither_a_run_nor_a_search_nor_a_table(root: str) -> None:
    lock = Lock(join(root, "refused", "lock"), what="it", above=lambda: 3)
    work = Lock(join(root, "table", "_work", "lock"), what="it", above=lambda: 3)
    with lock, work:
        pass
    assert rows_below(root, run_row) == []
    assert rows_below(root, search_row) == []
    assert rows_below(root, table_row, depth=DEPTH) == []


def test_a_driver_that_is_not_seen_for_a_minute_is_not_at_work(root: str) -> None:
    run = begun_run(root, "first")
    for number, age_s, state in ((1, 10, "running"), (2, 70, "new")):
        holder = Holder(id="other", host="elsewhere", pid=1, time=time.time() - age_s)
        ANYWHERE.write_bytes(join(run.lock_uri, f"{number:06d}"), encode(holder))
        assert the_run(root).state == state


def test_of_the_facts_and_trials_of_several_drivers_the_latest_are_told(root: str) -> None:
    search = begun_search(root, "first")
    put_trials(search, "failed", "failed")
    TrialRecords(join(search.uri, "trials"), fence=FENCE - 1).write(Trial(number=2, params={}, status="failed"))
    TrialRecords(join(search.uri, "trials"), fence=FENCE + 1).write(Trial(number=0, params={}, status="running"))
    search.write("run-000016.json", RunFacts(recipe="late", settings={}, features=None))
    row = the_search(root)
    assert row.numbers["recipe"] == "search-digits"
    assert words(row) == ("stopped", "1 of 5 trials, 1 failed", "")


def test_the_facts_with_the_highest_number_count() -> None:
    files = ("run-000009.json", "run-1000000.json", "run-999999.json", "run.json", "run-17.json", "run-000018.json.tmp")
    assert facts_names(files) == {"run-000009.json": 9, "run-1000000.json": 1_000_000, "run-999999.json": 999_999}
    folder = Folder(name="first", uri="first", folders=frozenset(), files=dict.fromkeys(files, 0.0))
    assert facts_name(folder.facts_number()) == "run-1000000.json"
    assert folder.facts_number() == 1_000_000


def test_a_search_is_told_from_its_begin_to_its_result(root: str) -> None:
    run = begun_search(root, "first")
    assert words(the_search(root)) == ("new", "0 of 5 trials", "")
    put_trials(run, "done", "failed", "stopped", "running")
    assert words(the_search(root)) == (
        "stopped",
        "3 of 5 trials, 1 failed",
        "trial 2: validation accuracy 0.9000 so far",
    )
    with Lock(join(run.uri, "lock"), what=run.uri):
        assert the_search(root).state == "running"
    put_trials(run, "done", "failed", "stopped", "done", "done")
    put_trials(run, "done", folder="finalists")
    assert the_search(root).progress == "5 of 5 trials, 1 failed; 1 of 2 finalists"
    best = {"trial": 2, "val_accuracy": 0.91, "test_accuracy": 0.89, "val_loss": 0.3}
    run.finish({"trials": 5, "failed": 1, "best": best})
    row = the_search(root)
    assert words(row) == (
        "finished",
        "5 of 5 trials, 1 failed; 1 of 2 finalists",
        "trial 2: validation accuracy 0.9100, test accuracy 0.8900",
    )
    assert row.numbers["best"] == {"trial": 2, "val_accuracy": 0.91, "test_accuracy": 0.89}


def test_a_search_of_which_nothing_came_has_failed(tmp_path: Path) -> None:
    run = begun_search(str(tmp_path), "first")
    put_trials(run, "failed", "failed", "failed", "failed")
    assert the_search(str(tmp_path)).state == "stopped"  # a fifth may do better
    put_trials(run, "failed", "failed", "failed", "failed", "failed")
    assert words(the_search(str(tmp_path))) == ("failed", "5 of 5 trials, 5 failed", "")


def test_a_search_whose_finalists_all_failed_has_failed(tmp_path: Path) -> None:
    run = begun_search(str(tmp_path), "first")
    put_trials(run, "done", "done", "failed", "failed", "failed")
    put_trials(run, "failed", folder="finalists")
    assert the_search(str(tmp_path)).state == "stopped"  # the other one may do better
    put_trials(run, "failed", "failed", folder="finalists")
    assert the_search(str(tmp_path)).state == "failed"


def test_trials_that_ended_early_are_all_there_are(tmp_path: Path) -> None:
    run = begun_search(str(tmp_path), "first")
    put_trials(run, "done", "stopped")
    run.write("trials.json", TrialsOver(2, (1,)))
    assert the_search(str(tmp_path)).progress == "2 of 2 trials"


def test_a_prediction_table_is_told_from_its_begin_to_its_result(root: str) -> None:
    output, generation = begun_table(join(root, "scores"), images=10)
    assert words(the_table(root)) == ("new", "0 of 3 shards, 0 of 10 rows of generation 1", "")
    put_shards(generation, 0, 2)
    row = the_table(root)
    assert words(row) == ("stopped", f"2 of 3 shards, {row.numbers['rows_done']} of 10 rows of generation 1", "")
    assert 6 <= row.numbers["rows_done"] <= 7
    with Lock(output.lock_uri, what=output.uri):
        assert the_table(root).state == "running"
    output.discard(generation, fence=9)
    committed_table(output.uri, images=10)
    assert words(the_table(root)) == ("finished", "generation 1", "10 rows: 7 ok, 3 errors")
    begun_table(output.uri, images=5)
    assert words(the_table(root)) == (
        "stopped",
        "0 of 2 shards, 0 of 5 rows of generation 2",
        "10 rows: 7 ok, 3 errors",
    )


def test_a_table_of_too_many_bad_rows_has_failed(tmp_path: Path) -> None:
    committed_table(str(tmp_path / "scores"), images=5, good=False)
    assert words(the_table(str(tmp_path))) == ("failed", "generation 1", "5 rows: 3 ok, 2 errors")


def test_a_table_may_be_the_folder_itself_or_lie_in_a_run(root: str) -> None:
    table = committed_table(join(begun_run(root, "first").uri, "predictions"), images=5)
    assert the_table(root).name == "first/predictions"
    assert the_table(table.uri).name == ""
    assert the_table(table.uri).uri == table.uri


def test_only_what_is_asked_for_is_listed_and_the_newest_first(root: str) -> None:
    begun_run(root, "training")
    put_trials(begun_search(root, "searching"), "done")
    begun_search(root, "new-search")
    committed_table(join(root, "scores"), images=5)
    for name in (
        "_records/abc/run-000001.json",
        ".hidden/run-000001.json",
        "bundle/bundle.json",
        "spark/_SUCCESS",
        "run-000001.json.txt",
    ):
        ANYWHERE.write_bytes(join(root, name), b"{}")
    assert [row.name for row in rows_below(root, run_row)] == ["training"]
    assert {row.name for row in rows_below(root, search_row)} == {"searching", "new-search"}
    assert [row.name for row in rows_below(root, table_row, depth=DEPTH)] == ["scores"]


def test_what_was_touched_last_comes_first(tmp_path: Path) -> None:
    for name, at in (("a", 100), ("b", 300), ("c", 200)):
        begun_run(str(tmp_path), name)
        os.utime(tmp_path / name / "run-000017.json", (at, at))
    rows = rows_below(str(tmp_path), run_row)
    assert [row.name for row in rows] == ["b", "c", "a"]
    assert rows[0].values()["updated"] == "1970-01-01T00:05:00+00:00"


def test_an_object_on_s3_says_when_it_was_written(s3: str) -> None:
    begun_run(s3, "first")
    updated_s = the_run(s3).updated_s
    assert updated_s is not None
    assert abs(updated_s - time.time()) < 60


def test_listing_s3_takes_a_few_requests_a_run_and_none_for_caches(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        run = begun_run(s3, name)
        save_checkpoint(run, tmp_path / name)
        end_epoch(run, 7)
        run.finish({"epochs": 7, "test_accuracy": 0.97})
        leave_released_lock(run)
    for number in range(30):
        ANYWHERE.write_bytes(f"{s3}/_records/{number}/pixels.npy", b"1")
    asked, really = [], FastReads._get

    def noted(reads: FastReads, *arguments: Any) -> Any:
        asked.append("quick read")
        return really(reads, *arguments)

    monkeypatch.setattr(FastReads, "_get", noted)
    events = s3_client().meta.events
    events.register("before-call.s3", lambda model, **_: asked.append(model.name), unique_id="count")
    try:
        assert len(rows_below(s3, run_row)) == 2
    finally:
        events.unregister("before-call.s3", unique_id="count")
    # of the storage and of each run; facts, result and history of each. The lock of a finished run is not looked at
    assert sorted(asked) == ["ListObjectsV2"] * 3 + ["quick read"] * 6


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run-000017.json", b"{", "run-000017.json is not a RunFacts"),
        ("run-000017.json", b"{}", "missing required field `recipe`"),
        ("result.json", b"[1]", "result.json is not a dict"),
        ("history.csv", b"epoch\n1\n", "KeyError: 'val_accuracy'"),
        ("history.csv", b"epoch,val_accuracy\n1,much\n", "could not convert string to float"),
        ("lock/000018", b"\xff", "lock/000018 is not a Holder"),
    ],
)
def test_a_damaged_run_is_a_row_that_says_so(root: str, name: str, content: bytes, reason: str) -> None:
    ANYWHERE.write_bytes(join(begun_run(root, "broken").uri, name), content)
    begun_run(root, "whole")
    rows = {row.name: row for row in rows_below(root, run_row)}
    assert rows["whole"].state == "new"
    assert rows["broken"].state == "unreadable"
    assert reason in rows["broken"].result


def test_a_damaged_search_and_a_damaged_table_are_rows_that_say_so(tmp_path: Path) -> None:
    run = begun_search(str(tmp_path), "search")
    ANYWHERE.write_bytes(join(run.uri, "trials", "000000-000017.json"), b"{}")
    state, _, reason = words(the_search(str(tmp_path)))
    assert state == "unreadable"
    assert "000000-000017.json is not a Trial" in reason
    table = committed_table(str(tmp_path / "scores"), images=5)
    ANYWHERE.write_bytes(table.version_uri(1, MARK), b"")
    state, _, reason = words(the_table(str(tmp_path)))
    assert state == "unreadable"
    assert "mark.json is not a Mark" in reason


def test_a_table_without_its_summary_is_still_a_table(tmp_path: Path) -> None:
    table = committed_table(str(tmp_path / "scores"), images=5)
    ANYWHERE.delete(table.version_uri(1, SUMMARY))
    assert words(the_table(str(tmp_path))) == ("finished", "generation 1", "5 rows")


def test_what_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    begun_run(str(tmp_path), "first")
    looks = []

    def swept_once(folder: Folder) -> InventoryRow | None:
        looks.append(folder)
        if len(looks) == 2:  # the first is the storage itself
            raise FileNotFoundError("swept")
        return run_row(folder)

    assert the_run(str(tmp_path)) == rows_below(str(tmp_path), swept_once)[0]
    assert len(looks) == 3


def test_a_storage_that_is_not_there_is_told(root: str) -> None:
    with pytest.raises(StorageError, match=f"the storage cannot be listed: .* Received: {root!r}"):
        rows_below(root, run_row)


def test_an_empty_storage_has_no_rows(tmp_path: Path) -> None:
    console = Recorder()
    job = ListJob(storage=str(tmp_path))
    assert inventory.show(rows_below(str(tmp_path), run_row), job=job, what="training runs", console=console) == {
        "storage": str(tmp_path),
        "runs": [],
    }
    assert console.lines == [f"no training runs below {tmp_path}"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-3, "0 s ago"), (59.4, "59 s ago"), (60, "1 min ago"), (7_199, "1 h ago"), (200_000, "2 d ago")],
)
def test_how_long_ago_is_said_shortly(seconds: float, shown: str) -> None:
    assert ago(seconds) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("quickstart",), r"not expected here \(python -m jobs\.train --list --help\)\. Received: quickstart$"),
        (("--epochs", "3"), r"python -m jobs\.train --list --help lists the flags"),
        (("--storage",), r"^--storage takes TEXT\."),
    ],
)
def test_anything_else_beside_list_is_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inventory.asked("python -m jobs.train", ["--list", *flags])


def test_list_may_stand_anywhere() -> None:
    assert inventory.asked("it", ["--storage", "s3://a/b", "--list"]) == ListJob(storage="s3://a/b")
    assert inventory.asked("it", ["quickstart", "--storage", "s3://a/b"]) is None


# --- the commands ----------------------------------------------------------------------------------------------------


def rows_of(job: str, storage_uri: str) -> tuple[list[dict[str, Any]], str]:
    code, result, err = run_command(f"jobs.{job}", "--list", "--storage", storage_uri)
    assert (code, result["job"]) == (0, job)
    return result["runs"], err


def test_the_commands_list_a_storage_that_they_share(tmp_path: Path) -> None:
    begun_run(str(tmp_path), "training").finish({"epochs": 7, "test_accuracy": 0.97})
    put_trials(begun_search(str(tmp_path), "searching"), "done")
    committed_table(str(tmp_path / "scores"), images=5)
    for job, name, shown in (
        ("train", "training", "test accuracy 0.9700"),
        ("search", "searching", "1 of 5 trials"),
        ("score", "scores", "5 rows: 3 ok, 2 errors"),
    ):
        (row,), err = rows_of(job, str(tmp_path))
        assert row["name"] == name
        assert shown in err


def test_a_storage_that_is_not_there_ends_with_2(tmp_path: Path) -> None:
    code, result, err = run_command("jobs.score", "--list", "--storage", str(tmp_path / "no"))
    assert (code, result["error_type"]) == (2, "StorageError")
    assert f"Received: '{tmp_path / 'no'}'" in err


@pytest.mark.parametrize("job", ["train", "search", "score"])
def test_listing_loads_neither_ray_nor_tensorflow(job: str, tmp_path: Path) -> None:
    begun_run(str(tmp_path), "training")
    begun_search(str(tmp_path), "searching")
    begun_table(str(tmp_path / "scores"), images=5)
    code = f"""
import json, sys
from mnist_dist.commands.{job} import main
assert len(main(["--list", "--storage", {str(tmp_path)!r}], program="mnist-dist {job}")["runs"]) == 1
print(json.dumps(sorted({{"ray", "tensorflow", "keras"}} & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("job", ["train", "search", "score"])
def test_the_help_names_list(job: str) -> None:
    command = [sys.executable, "-m", f"jobs.{job}", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert "--list [--storage URI]" in done.stdout
