"""examples/serve_fastapi.py behind a socket, asked by an HTTP client."""

from __future__ import annotations

import io
import runpy
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine import Engine

pytest.importorskip("fastapi")
httpx, uvicorn = pytest.importorskip("httpx"), pytest.importorskip("uvicorn")

SCRIPT = Path(__file__).parent.parent / "examples" / "serve_fastapi.py"
MOST = 3


@contextmanager
def served(**options: Any) -> Iterator[Any]:
    """A client of a server on a free port of this machine."""
    app = runpy.run_path(str(SCRIPT))["app"](MOST, size=64, **options)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False
        ) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with served(steps=2) as client:
        yield client


def picture(answer: Any, kind: str) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(answer.content)) as files, files.open(f"{kind}.png") as file:
        return np.asarray(Image.open(file))


def metrics(client: Any) -> dict[str, str]:
    return dict(line.split() for line in client.get("/metrics").text.splitlines())


def test_a_pair_is_the_seed_s(client: Any) -> None:
    first, other, again = (client.get("/pair", params={"seed": seed}) for seed in (7, 8, 7))
    assert first.status_code == 200
    assert first.headers["content-type"] == "application/zip"
    assert picture(first, "image").shape == picture(first, "anomaly").shape == (64, 64, 3)
    assert picture(first, "mask").shape == (64, 64)
    assert np.array_equal(picture(first, "image"), picture(again, "image"))
    assert not np.array_equal(picture(first, "image"), picture(other, "image"))


def test_bad_requests_are_named_and_harm_nobody(client: Any) -> None:
    assert client.get("/pair").status_code == 422
    assert client.get("/pair", params={"seed": "seven"}).status_code == 422
    answer = client.get("/pair", params={"seed": -1})
    assert answer.status_code == 400
    assert "seed" in answer.json()["detail"]
    assert client.get("/health").status_code == 200
    assert client.get("/pair", params={"seed": 1}).status_code == 200


def test_a_full_queue_refuses_at_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, go_on, generate = (
        int(metrics(client)["dualdiff_drawn"]),
        threading.Event(),
        Engine.generate,
    )

    def slowly(*given: Any, **options: Any) -> Any:
        assert go_on.wait(30)
        return generate(*given, **options)

    monkeypatch.setattr(Engine, "generate", slowly)
    with ThreadPoolExecutor(MOST) as pool:
        asked = [pool.submit(client.get, "/pair", params={"seed": seed}) for seed in range(MOST)]
        while metrics(client)["dualdiff_waiting"] != str(MOST):
            time.sleep(0.01)
        assert client.get("/pair", params={"seed": 9}).status_code == 503
        assert client.get("/health").status_code == 200
        go_on.set()
        assert [each.result().status_code for each in asked] == [200] * MOST
    assert metrics(client) == {
        "dualdiff_waiting": "0", "dualdiff_drawn": str(drawn + MOST), "dualdiff_broken": "0",
    }  # fmt: skip


def test_a_fault_of_the_device_is_seen_by_health(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "generate", fail)
    with served() as client:
        assert client.get("/pair", params={"seed": 1}).status_code == 500
        assert client.get("/health").status_code == 503
