"""A planted secret of each kind is found in nothing that a job prints, logs or writes.

The secrets: AWS credentials in the environment and in a profile, user info and signed queries of URLs. They are looked
for in stdout, stderr, Ray's own logs, and every file of the output, Parquet decoded.
"""

import io
import pickle
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import CLASSES, SPEC, Command, write_spread_bundle
from PIL import Image
from web import Page, WebServer, running_web_server

from mnist_dist.config import DataConfig, ModelConfig, StoreConfig, TrainJob, differences
from mnist_dist.console import Console, command_line
from mnist_dist.errors import ServiceError
from mnist_dist.score_config import InputConfig, ScoreJob
from mnist_dist.search_config import SearchJob
from mnist_dist.store.anywhere import store_for
from mnist_dist.store.https import HttpsStore
from mnist_dist.store.uris import shown
from mnist_dist.store.web_requests import Patience

SECRETS = {
    "environment": "5ec2e7AwsEnvironment",
    "profile": "5ec2e7AwsProfile",
    "user info": "5ec2e7UserInfo",
    "query": "5ec2e7SignedQuery",
}
SECRET = re.compile(r"5ec2e7\w*")


def profile_file() -> str:
    """The content of a file of AWS credentials."""
    return f"[default]\naws_access_key_id = {SECRETS['profile']}\naws_secret_access_key = {SECRETS['profile']}\n"


# --- without a job ---------------------------------------------------------------------------------------------------

URL = "https://ann:5ec2e7UserInfo@h.test/a.tar?X-Amz-Signature=5ec2e7SignedQuery"


def test_settings_that_are_stored_and_compared_hold_no_secrets() -> None:
    jobs = (
        ScoreJob(bundle="b", output="o", inputs=InputConfig(input=(URL, "x"))),
        TrainJob(data=DataConfig(data=(URL,)), model=ModelConfig(weights=URL)),
        SearchJob(data=DataConfig(data=(URL,))),
    )
    for job in jobs:
        assert SECRET.search(str(job.settings())) is None
        assert shown(URL) in str(job.settings())


def test_a_url_that_is_signed_again_is_the_same_setting() -> None:
    job = ScoreJob(bundle="b", output="o", inputs=InputConfig(input=(URL,)))
    signed_again = replace(job, inputs=InputConfig(input=(URL + "Again",)))
    assert differences(job.settings(), signed_again.settings()) == []


def test_a_line_and_the_command_to_resume_show_no_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Console(terminal=False).line(f"reading {URL} failed, and '{URL}', too")
    assert capsys.readouterr().err == f"reading {shown(URL)} failed, and '{shown(URL)}', too\n"
    monkeypatch.setattr("sys.argv", ["score.py", "--input", URL, f"--input={URL}"])
    assert SECRET.search(command_line()) is None
    assert command_line().count(shown(URL)) == 2


@pytest.mark.parametrize("kind", ["environment", "profile"])
def test_a_store_that_has_credentials_is_pickled_and_fails_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "credentials").write_text(profile_file())
    names = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), SECRETS["environment"])
    for name, value in names.items():
        monkeypatch.setenv(name, value) if kind == "environment" else monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    store = store_for(StoreConfig(s3_requester_pays=True))
    with running_web_server() as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.url)
        store.forget_clients()
        assert SECRETS[kind] in str(store.object_store_access("s3://bucket/key"))  # it has them
        with pytest.raises(FileNotFoundError, match="s3://bucket/key") as caught:
            store.read_range("s3://bucket/key", 0, 1)
    assert any(SECRETS[kind] in asked.headers["Authorization"] for asked in bucket.asked)  # and uses them
    assert SECRET.search("".join(traceback.format_exception(caught.value))) is None
    assert SECRET.search(pickle.dumps(store).decode(errors="replace")) is None
    store.forget_clients()


def test_a_proxy_with_a_password_fails_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://bob:{SECRETS['user info']}@127.0.0.1:9")
    store = HttpsStore(allow_private_hosts=True, patience=Patience(attempts=1))  # else it would look up the name
    with pytest.raises(ServiceError, match=r"https://h.test/a.tar: the proxy cannot be reached") as caught:
        store.read_bytes(URL)
    assert SECRET.search("".join(traceback.format_exception(caught.value))) is None
    assert SECRET.search(pickle.dumps(store).decode(errors="replace")) is None


# --- of a job --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a command left."""

    code: int
    stdout: str
    stderr: str
    output: Path
    ray_logs: str

    def files(self) -> str:
        """The content of all files of the output, and their names."""
        return "\n".join(f"{path}: {content(path)}" for path in sorted(self.output.rglob("*")) if path.is_file())


def content(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix != ".parquet":
        return data.decode(errors="replace")
    table = pq.read_table(io.BytesIO(data))
    return f"{table.schema.metadata} {table.to_pylist()}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """AWS credentials in the environment, and others in the profile file."""
    file = tmp_path_factory.mktemp("aws") / "credentials"
    file.write_text(profile_file())
    key = SECRETS["environment"]
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": key,
        "AWS_SESSION_TOKEN": key,
        "AWS_SHARED_CREDENTIALS_FILE": str(file),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "NO_PROXY": "127.0.0.1",
    }


def ended(*command: str, output: Path, environment: Mapping[str, str]) -> Ran:
    ray = tempfile.mkdtemp(prefix="r")  # pytest's folders are too long for Ray's sockets
    try:
        with Command(*command, "--verbose", **environment, RAY_TMPDIR=ray) as job:
            code = job.process.wait()
            logs = [path for path in Path(ray).rglob("*") if path.is_file() and not path.is_symlink()]
            written = "\n".join(path.read_bytes().decode(errors="replace") for path in logs)
            return Ran(code, job.stdout(), job.stderr(), output, written)
    finally:
        shutil.rmtree(ray, ignore_errors=True)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(5)
    shape = (SPEC.height_px, SPEC.width_px, SPEC.channels)
    return [Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)) for _ in range(6)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, images: list[Image.Image]) -> Path:
    return write_spread_bundle(tmp_path_factory.mktemp("bundle") / "b", images=images, seed=3)


@pytest.fixture(scope="module")
def server(images: list[Image.Image]) -> Iterator[WebServer]:
    """Images, and pages that fail, all with a secret in their URLs."""
    with running_web_server() as one:
        for number, image in enumerate(images):
            file = io.BytesIO()
            image.save(file, "PNG")
            one.put(signed(f"/{number}.png"), data=file.getvalue())
        one.put(signed("/denied.png"), status=403)
        one.put(signed("/cut.png"), data=b"x" * 99, sent_bytes=9, headers={"Retry-After": "0"})
        one.put(signed("/circle.png"), Page(status=302, headers={"Location": signed("/circle.png")}))
        one.put(signed("/no-image.png"), data=b"no image")
        yield one


def signed(path: str) -> str:
    return f"{path}?X-Amz-Signature={SECRETS['query']}"


def urls(server: WebServer) -> list[str]:
    """The URLs of all pages and of some that are not there, each with its secrets."""
    root = server.url.replace("//", f"//ann:{SECRETS['user info']}@")
    gone = [root + signed("/gone.png"), f"http://ann:{SECRETS['user info']}@127.0.0.1:9{signed('/refused.png')}"]
    bad = [f"{scheme}ann:{SECRETS['user info']}@[{signed('/bad.png')}" for scheme in ("ftp://", "http://")]
    return [*(root + path for path in server.pages), *gone, *bad]


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, server: WebServer, environment: Mapping[str, str]
) -> Ran:
    folder = tmp_path_factory.mktemp("scored")
    (folder / "list.txt").write_text("\n".join(urls(server)))
    arguments = f"--bundle {bundle} --input {folder}/list.txt --output {folder}/out --actors 1 --engine keras"
    more = "--allow-private-hosts --max-bad-fraction 1"
    return ended("jobs.score", *arguments.split(), *more.split(), output=folder / "out", environment=environment)


@pytest.mark.slow
def test_every_url_is_read_or_has_its_status(scored: Ran, images: list[Image.Image]) -> None:
    assert scored.code == 0, scored.stderr
    rows = pq.read_table(scored.output / "table").to_pylist()
    found = {re.sub(r".*/([\w-]+)\.png.*", r"\1", row["uri"]): row["status"] for row in rows}
    good = {str(number): "ok" for number in range(len(images))}
    bad = {"denied": "denied", "cut": "failed", "circle": "failed", "no-image": "unsupported", "gone": "missing"}
    assert {**good, **bad, "refused": "failed"}.items() <= found.items()
    assert len(rows) == len(images) + 8
    assert {row["predicted_class"] for row in rows if row["status"] == "ok"} <= set(CLASSES)


@pytest.mark.slow
def test_a_scoring_job_shows_no_secret(scored: Ran) -> None:
    assert SECRET.findall(scored.stdout) == []
    assert SECRET.findall(scored.stderr) == []
    assert SECRET.findall(scored.ray_logs) == []


@pytest.mark.slow
def test_a_scoring_job_writes_no_secret(scored: Ran) -> None:
    assert SECRET.findall(scored.files()) == []


@pytest.mark.slow
@pytest.mark.parametrize("job", ["jobs.score", "jobs.score --plan", "jobs.score --dry-run", "jobs.train", "s3"])
def test_an_input_that_fails_shows_no_secret(
    tmp_path: Path, bundle: Path, server: WebServer, environment: Mapping[str, str], job: str
) -> None:
    url = server.url.replace("//", f"//ann:{SECRETS['user info']}@") + signed("/gone.txt")
    scoring = f"jobs.score --bundle {bundle} --output {tmp_path}/out --allow-private-hosts"
    commands = {
        "jobs.train": f"jobs.train quickstart --data {url} --storage {tmp_path}/out --allow-private-hosts",
        "s3": f"{scoring} --input s3://bucket/prefix",
    }
    command = commands.get(job, f"{job.replace('jobs.score', scoring)} --input {url}")
    ran = ended(*command.split(), output=tmp_path / "out", environment={**environment, "AWS_MAX_ATTEMPTS": "1"})
    assert ran.code in (1, 2)
    assert '"error"' in ran.stdout
    for text in (ran.stdout, ran.stderr, ran.files()):
        assert SECRET.findall(text) == []
