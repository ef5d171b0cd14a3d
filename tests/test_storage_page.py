"""The page of a storage: what is in it, in which state, and links that still lead there when the storage has moved."""

import shutil
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from harness import Recorder, run_command
from pages import Parts, cut_texts, make_wide
from test_inventory import begun_run, begun_search, committed_table, end_epoch, put_trials

from mnist_dist import inventory, report
from mnist_dist.errors import ConfigError, DataError, StorageError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.comparison_parts import run_of
from mnist_dist.evaluation.evaluate import evaluate
from mnist_dist.evaluation.evaluation_row import DEPTH, evaluation_row
from mnist_dist.evaluation.pages import write_evaluation_page
from mnist_dist.evaluation.storage_page import relative_link, report_storage
from mnist_dist.inventory import rows_below
from mnist_dist.report_config import ReportJob
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

HOSTILE = "a <b> & 100 %#1"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "local" else str(request.getfixturevalue("s3"))


def evaluated_table(root: str, name: str, scratch: Path) -> str:
    """A table with the same prediction for each image, and its evaluation beside it; the accuracy as it is shown."""
    table = committed_table(join(root, name), images=10)
    labels = scratch / "labels.csv"
    labels.write_text("uri,label\n" + "".join(f"1-{n:02d}.png,{'bee' if n < 8 else 'cat'}\n" for n in range(10)))
    job = EvaluateJob(predictions=table.uri, labels=str(labels), match="name", output=join(root, f"{name}-evaluation"))
    return f"{evaluate(job, console=Recorder(), report=write_evaluation_page)['accuracy']:.4f}"


def fill(root: str, scratch: Path) -> str:
    """One of each: a finished run, one that was stopped, a search, a table and its evaluation, and a damaged run. Gives
    the accuracy of the evaluation."""
    finished = begun_run(root, HOSTILE)
    finished.finish({"epochs": 7, "test_accuracy": 0.97, "validation_accuracy": 0.96})
    ANYWHERE.write_bytes(join(finished.uri, "bundle", "report.html"), b"the report of a run")
    end_epoch(begun_run(root, "half"), 2)
    search = begun_search(root, "tried")
    put_trials(search, "done", "failed", "stopped")
    ANYWHERE.write_bytes(join(search.uri, "report.html"), b"the report of a search")
    ANYWHERE.write_bytes(join(root, "damaged", "run-000001.json"), b"{")
    return evaluated_table(root, "scores", scratch)


def page_of(root: str, **flags: Any) -> Parts:
    result = report_storage(ReportJob(storage=root, **flags), console=Recorder())
    return Parts(ANYWHERE.read_bytes(result["report"]).decode())


def test_the_page_shows_all_of_it_with_its_state_and_numbers(root: str, tmp_path: Path) -> None:
    accuracy = fill(root, tmp_path)
    console = Recorder()
    result = report_storage(ReportJob(storage=root), console=console)
    assert result["report"] == join(root, "index.html")
    assert {name: result[name] for name in ("runs", "searches", "tables", "evaluations")} == {
        "runs": 2,
        "searches": 1,
        "tables": 1,
        "evaluations": 1,
    }
    assert console.lines[0].startswith("2 training runs, 1 search, 1 prediction table and 1 evaluation in ")
    page = Parts(ANYWHERE.read_bytes(result["report"]).decode())
    assert {"runs", "searches", "tables", "evaluations", "unreadable"} <= page.ids
    rows = {row[0]: row for row in page.tables["runs"][1:]}
    assert rows[HOSTILE][1:6] == ["finished", "0.9700", "0.9600", "7", "7"]
    assert rows["half"][1:6] == ["resumable", "", "0.5200", "2", "7"]
    assert page.tables["searches"][1][1:6] == ["resumable", "0.9000", "3", "5", "1"]
    assert "test accuracy" not in page.tables["searches"][0]  # A column without an entry is left out.
    assert page.tables["tables"][1][:7] == ["scores", "finished", "10", "7", "3", "b", "report"]
    assert page.column("evaluations", "accuracy") == [accuracy]
    assert page.column("evaluations", "table") == ["scores"]
    assert page.column("unreadable", "name") == ["damaged"]
    assert "run-000001.json" in page.column("unreadable", "why")[0]
    assert page.text.count("97.00 %") == 1
    assert "2 resumable by the same command and 1 unreadable" in page.text


def test_links_are_relative_and_lead_to_the_reports(root: str, tmp_path: Path) -> None:
    fill(root, tmp_path)
    page = page_of(root)
    expected = {
        HOSTILE: f"{HOSTILE}/bundle/report.html",
        "tried": "tried/report.html",
        "report": "scores-evaluation/report.html",
        "scores-evaluation": "scores-evaluation/report.html",
    }
    assert {text: urllib.parse.unquote(link) for text, link in page.links.items()} == expected
    for link in expected.values():
        assert ANYWHERE.exists(join(root, link))
    assert "half" not in page.links  # It has no report yet.


def test_runs_and_searches_one_folder_further_down_are_found_and_finalists_are_not(tmp_path: Path) -> None:
    fill(str(tmp_path / "elsewhere"), tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    begun_run(str(tmp_path / "runs" / "tried"), "winner").finish({"epochs": 7})
    page = page_of(str(tmp_path))
    assert page.links["report"] == "runs/scores-evaluation/report.html"  # The evaluation knows the table's old place.
    assert sorted(page.column("runs", "name")) == sorted([f"runs/{HOSTILE}", "runs/half"])
    assert page.column("searches", "name") == ["runs/tried"]
    assert urllib.parse.unquote(page.links["runs/tried"]) == "runs/tried/report.html"


def test_each_folder_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path), tmp_path)
    listed, usual = list[str](), inventory._open

    def counted(name: str, uri: str, **limits: Any) -> Any:
        listed.append(uri)
        return usual(name, uri, **limits)

    monkeypatch.setattr(inventory, "_open", counted)
    page_of(str(tmp_path))
    assert len(listed) == len(set(listed)) > 5


@pytest.mark.parametrize(
    ("bundle", "name"),
    [("/a/runs/digits/bundle", "digits"), ("s3://a/dinov2/", "dinov2"), ("bundle", "bundle"), ("net", "net")],
)
def test_a_table_names_the_run_or_the_bundle_that_scored_it(bundle: str, name: str) -> None:
    assert run_of("") == ""
    assert run_of(bundle) == name


def test_the_page_may_lie_elsewhere_and_is_written_anew(tmp_path: Path) -> None:
    root, output = tmp_path / "runs", tmp_path / "pages" / "all.html"
    run = begun_run(str(root), "first")
    run.finish({"epochs": 7, "test_accuracy": 0.97, "validation_accuracy": 0.96})
    ANYWHERE.write_bytes(join(run.uri, "bundle", "report.html"), b"a report")
    assert page_of(str(root), output=str(output)).links == {"first": "../runs/first/bundle/report.html"}
    assert not (root / "index.html").exists()
    begun_run(str(root), "second")
    for _ in range(2):  # The page itself is in nobody's way.
        assert sorted(page_of(str(root)).column("runs", "name")) == ["first", "second"]


@pytest.mark.parametrize(
    ("uri", "page_uri", "expected"),
    [
        ("/a/runs/x/report.html", "/a/runs/index.html", "x/report.html"),
        ("/a/runs/x/report.html", "/a/pages/index.html", "../runs/x/report.html"),
        ("/report.html", "/index.html", "report.html"),
        ("s3://b/runs/x y/report.html", "s3://b/runs/index.html", "x%20y/report.html"),
        ("s3://b/x/report.html", "s3://b/index.html", "x/report.html"),
        ("gs://b/runs/100 %#1/r.html", "gs://b/other/index.html", "../runs/100%20%25%231/r.html"),
    ],
)
def test_links_between_two_pages(uri: str, page_uri: str, expected: str) -> None:
    assert relative_link(uri, page_uri) == expected


def test_a_storage_with_nothing_in_it_is_an_error_and_no_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"no run, search, prediction table or evaluation in .*storage="):
        report_storage(ReportJob(storage=str(tmp_path)), console=Recorder())
    with pytest.raises(StorageError, match="cannot be listed"):
        report_storage(ReportJob(storage=str(tmp_path / "gone")), console=Recorder())
    assert not (tmp_path / "index.html").exists()


def test_a_run_is_no_storage(tmp_path: Path) -> None:
    run = begun_run(str(tmp_path), "first")
    with pytest.raises(ConfigError, match=rf"name the folder that holds it \({tmp_path}\)"):
        report_storage(ReportJob(storage=run.uri), console=Recorder())
    assert not (tmp_path / "first" / "index.html").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"storage": ""}, "storage must be a folder"),
        ({"output": "page"}, r"output must be a file that ends in \.html"),
        ({"output": "s3://bucket/index.html"}, "same file system or bucket"),
        ({"storage": "s3://one/runs", "output": "s3://two/index.html"}, "same file system or bucket"),
    ],
)
def test_wrong_usage_is_told(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReportJob(**flags)


def test_an_evaluation_is_told_from_other_folders(tmp_path: Path) -> None:
    accuracy = evaluated_table(str(tmp_path), "scores", tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.json").write_text('{"accuracy": 1}')
    (row,) = rows_below(str(tmp_path), evaluation_row, depth=DEPTH)
    assert (row.name, row.state, row.result) == ("scores-evaluation", "finished", f"accuracy {accuracy}")
    assert row.numbers["predictions"] == str(tmp_path / "scores")
    (tmp_path / "scores-evaluation" / "report.html").unlink()
    (row,) = rows_below(str(tmp_path), evaluation_row, depth=DEPTH)
    assert row.state == "stopped"
    (tmp_path / "scores-evaluation" / "metrics.json").write_text("{")
    (row,) = rows_below(str(tmp_path), evaluation_row, depth=DEPTH)
    assert row.state == "unreadable"


def test_the_command_and_the_function_write_the_page(tmp_path: Path) -> None:
    begun_run(str(tmp_path / "runs"), "first")
    code, result, err = run_command("jobs.report", "--storage", str(tmp_path / "runs"))
    assert (code, result["job"], result["runs"]) == (0, "report", 1), err
    page = tmp_path / "runs" / "index.html"
    assert f"report: {page}" in err
    page.unlink()
    assert report(tmp_path / "runs").uri == str(page)
    assert page.exists()


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_storage_that_was_moved_is_browsed_at_any_width(browser: Any, tmp_path: Path) -> None:
    fill(str(tmp_path / "runs"), tmp_path)
    report_storage(ReportJob(storage=str(tmp_path / "runs")), console=Recorder())
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    for width_px in (390, 1280):
        make_wide(browser, width_px)
        browser.get((tmp_path / "moved" / "index.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width_px
        assert cut_texts(browser) == []
        assert browser.get_log("browser") == []
    button = browser.find_element("xpath", "//section[@id='runs']//th[normalize-space()='test accuracy']/button")
    button.click()
    names = browser.find_elements("css selector", "#runs tbody th")
    assert [name.text for name in names] == [HOSTILE, "half"]
    names[0].find_element("tag name", "a").click()
    assert "the report of a run" in browser.page_source
