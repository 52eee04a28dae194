"""Start, queue, disconnect, drain and end of a server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from running_server import CHAT, error_of

from layerskip.cli.main import run


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def running(server):
    return server.engine.stats().num_requests_running


def test_server_answers_while_it_loads(folder, start):
    loaded = threading.Event()

    def load():
        loaded.wait()
        raise ValueError("this model is broken")

    server = start(load=load)
    with server.client() as client:
        response = client.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        error = error_of(client.post(CHAT, json=server.chat()), 503)
        assert "loading" in error["message"]
        error_of(client.get("/v1/models"), 503)
    loaded.set()
    server.join()
    assert str(server.failure) == "this model is broken"


def test_full_queue_refuses_with_the_time_to_wait(start):
    server = start(max_queue=1)
    server.engine.resumed.clear()
    with server.client() as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, CHAT, json=server.chat())
        wait_until(lambda: running(server))
        second = pool.submit(client.post, CHAT, json=server.chat())
        wait_until(lambda: server.engine.stats().num_requests_waiting)
        refused = client.post(CHAT, json=server.chat())
        assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) > 0
        # The first of its three answers was queued, and may not stay there.
        server.engine.resumed.set()
        assert first.result().status_code == second.result().status_code == 200
        assert client.post(CHAT, json=server.chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_ends_the_answer(held, client, stream):
    body = held.chat(stream=stream, max_tokens=300, ignore_eos=True)
    before = held.engine.stats().generation_tokens
    with httpx.Client(base_url=held.url, timeout=60) as leaving, ThreadPoolExecutor(1) as pool:
        pool.submit(leaving.post, CHAT, json=body)
        wait_until(lambda: running(held))
        for connection in leaving._transport._pool.connections:
            connection._connection._network_stream._sock.shutdown(2)
    wait_until(lambda: not running(held))
    assert held.engine.stats().generation_tokens == before


def test_drain_finishes_running_answers_and_refuses_new_ones(start):
    server = start()
    server.engine.resumed.clear()
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, CHAT, json=server.chat())
        wait_until(lambda: running(server))
        server.server.drain()
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json() == {"status": "draining"}
        refused = client.post(CHAT, json=server.chat())
        assert "draining" in error_of(refused, 503)["message"]
        server.engine.resumed.set()
        assert answer.result().status_code == 200
    server.join()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_do_not_finish_in_time_end_with_an_error(start, stream):
    server = start(drain_seconds=0.1)
    server.engine.resumed.clear()
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, CHAT, json=server.chat(stream=stream, max_tokens=300))
        wait_until(lambda: running(server))
        server.server.drain()
        time.sleep(0.2)
        server.engine.resumed.set()
        text = answer.result().text
    events = text.split("\n\n")
    error = json.loads(events[-3].removeprefix("data: ") if stream else text)["error"]
    assert "shutting down" in error["message"]
    server.join()


def test_program_serves_drains_and_ends(folder, tmp_path):
    command = [sys.executable, "-m", "layerskip", "serve", "--model", str(folder), "--port", "0"]
    command += ["--dtype", "float32", "--no-compile", "--served-model-name", "mine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first, curl = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("mine is ready: http://127.0.0.1:"), process.communicate()
        answer = subprocess.run(curl.split("#")[0], shell=True, capture_output=True, check=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.wait()


def test_second_signal_ends_at_once(held):
    program = (
        "import os, signal, threading\n"
        "from layerskip.decoding import DecodingConfig\n"
        "from layerskip.serve.config import ServeConfig\n"
        "from layerskip.serve.server import Server, listen\n"
        "from layerskip.serve.service import Service\n"
        "class Engine:\n"
        "    def shutdown(self, seconds): threading.Event().wait()\n"
        "config = ServeConfig(port=0)\n"
        "service = Service('tiny', config, DecodingConfig())\n"
        "def load():\n"
        "    service.state, service._engine = 'ready', Engine()\n"
        "    print('ready', flush=True)\n"
        "    threading.Event().wait()\n"
        "Server(service, load).run_on(listen(config))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_taken_port_is_one_line(server, capsys):
    port = server.url.rpartition(":")[2]
    assert run(["serve", "--port", port]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "choose another --port" in error


def test_missing_extra_is_one_line(tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(name='fastapi')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "layerskip", "serve"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == (
        "layerskip: layerskip serve needs fastapi; run: pip install 'layerskip[serve]'\n"
    )


def test_open_address_without_a_key_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.delenv("LAYERSKIP_API_KEY", raising=False)
    assert run(["serve", "--host", "0.0.0.0"]) == 2
    assert "LAYERSKIP_API_KEY" in capsys.readouterr().err
