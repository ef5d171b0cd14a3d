"""Whether the head of a cluster answers, before Ray is asked to connect.

Owns: the questions to a head and what an answer means, Ray's token included. Does not own: the form of `RAY_ADDRESS`
(`environment`), or the connection (`cluster`).

`ray.init` itself takes nine minutes to give up on an address where no head is, and handles no signal meanwhile. So a
thread asks first: a TCP connection, gRPC's standard health check, and one call that needs the token.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from mnist_dist.console import Stop
from mnist_dist.environment import RAY_ADDRESS
from mnist_dist.errors import ConfigError, first_line
from mnist_dist.side_thread import SideThread

CONNECT_S, ANSWER_S = 8.0, 15.0
"""How long a head may take to accept a connection, and to answer a call, s."""
GIVE_UP_S = 25.0
"""How long all questions may take, s: the name of a host may take longer than any of the others."""
POLL_S = 0.1
RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
TOKEN_REMEDY = (
    f"set {RAY_AUTH_MODE}=token here, and copy the token of the cluster (~/.ray/auth_token of the user who started it) "
    f"to the same place here, to another file that {RAY_AUTH_TOKEN_PATH} names, or into {RAY_AUTH_TOKEN}; or start the "
    f"cluster again with {RAY_AUTH_MODE}=disabled"
)
_HEALTH = "/grpc.health.v1.Health/Check"  # https://github.com/grpc/grpc/blob/master/doc/health-checking.md
_SERVING = b"\x08\x01"
_WITH_TOKEN = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def await_head(
    address: str, *, stop: Stop | None, ask: Callable[[str], object] | None = None, give_up_s: float = GIVE_UP_S
) -> None:
    """Waits until the head of a cluster has answered; a signal ends the waiting.

    Args:
        address: the `host:port` in `RAY_ADDRESS`.
        stop: notes signals; None: Python's own handlers.
        ask: asks the head in a thread; None: `ask_head`.
        give_up_s: longest wait, s.

    Raises:
        ConfigError: no head answers within half a minute, or it does not accept this process' token.
        Interrupted: SIGINT or SIGTERM.
    """
    asking, deadline = SideThread(lambda: (ask or ask_head)(address), name="asking"), time.monotonic() + give_up_s
    asking.start()
    while not asking.ended(POLL_S):
        if stop is not None:
            stop.check()
        if time.monotonic() > deadline:
            raise _unreachable(address, f"no answer within {give_up_s:g} s")
    if stop is not None:
        stop.check()
    asking.result()


def ask_head(address: str, *, answer_s: float = ANSWER_S) -> None:
    """Asks the head of a cluster whether it is well, and whether it accepts this process' token.

    Args:
        address: its `host:port`.
        answer_s: how long it may take to answer each question, s.

    Raises:
        ConfigError: it does not answer, is not the head of a cluster, or does not accept the token.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as err:
        raise _unreachable(address, first_line(err)) from err
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return  # Its calls need Ray's certificates.
    code, answer = _call(address, _HEALTH, answer_s=answer_s)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise _unreachable(address, f"it accepts connections, but did not answer within {answer_s:g} s")
    if answer != _SERVING:
        raise _unreachable(address, "what listens there is not the head of a Ray cluster (its port is 6379 by default)")
    if is_token_sent() and own_token() is None:
        return  # Ray says so itself, or finds a token elsewhere, as on Kubernetes.
    if _call(address, _WITH_TOKEN, answer_s=answer_s, token=own_token())[0] is grpc.StatusCode.UNAUTHENTICATED:
        raise _refused(address)


def is_token_sent() -> bool:
    """Whether Ray sends a token from this process to a cluster at an explicit address."""
    return os.environ.get(RAY_AUTH_MODE, "").lower() == "token"


def own_token() -> str | None:
    """The token that Ray would send from this process; None: it would send none, or has none."""
    if not is_token_sent():
        return None
    if RAY_AUTH_TOKEN in os.environ:
        return os.environ[RAY_AUTH_TOKEN].strip()
    try:
        return token_file().read_text().strip()
    except OSError:
        return None


def token_file() -> Path:
    """Where Ray looks for the token of this user."""
    return Path(os.environ.get(RAY_AUTH_TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _call(address: str, method: str, *, answer_s: float, token: str | None = None) -> tuple[grpc.StatusCode, bytes]:
    """The status and the answer of a call with an empty request."""
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # As Ray's own channels.
        try:
            call = channel.unary_unary(method)
            return grpc.StatusCode.OK, bytes(call(b"", timeout=answer_s, metadata=metadata))
        except grpc.RpcError as err:
            return err.code(), b""


def _unreachable(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at the address in {RAY_ADDRESS}: {why}. Start the cluster (ray start --head), correct "
        f"the address, or unset {RAY_ADDRESS} to run on this machine alone. Received: {RAY_ADDRESS}={address!r}"
    )


def _refused(address: str) -> ConfigError:
    mode = os.environ.get(RAY_AUTH_MODE, "")
    why = (
        "the token of this process is another one" if is_token_sent() else f"without {RAY_AUTH_MODE}=token none is sent"
    )
    return ConfigError(
        f"the Ray cluster at {address} asks for its token, and {why}: {TOKEN_REMEDY}. "
        f"Received: {RAY_ADDRESS}={address!r}, {RAY_AUTH_MODE}={mode!r}"
    )
