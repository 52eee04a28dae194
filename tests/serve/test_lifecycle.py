"""Start, queue, disconnect, drain and end of a server."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from running_server import CHAT, error_of

from layerskip import LayerSkipModel
from layerskip.cli.main import run
from layerskip.cli.serve import _curl
from layerskip.model.checkpoint import CheckpointSettings, PromptForm
from layerskip.serve import server as server_module
from layerskip.serve.config import ServeConfig
from layerskip.serve.engine import Engine


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


def test_server_with_damaged_weights_does_not_start(folder, start):
    """Its own first answer shows what loading does not."""

    def load():
        model = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
        model.decoder.layers[-1].mlp_norm.weight.fill_(float("nan"))
        return model, Engine(model)

    server = start(load=load)
    server.join()
    assert str(server.failure).startswith("this model's results are not finite")
    assert len(str(server.failure).splitlines()) == 1


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
    assert held.engine.stats().generation_tokens < before + 100


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


def test_program_serves_drains_and_ends(folder):
    command = [sys.executable, "-m", "layerskip", "serve", "--model", str(folder), "--port", "0"]
    command += ["--dtype", "float32", "--no-compile", "--served-model-name", "mine"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            first, curl = process.stdout.readline(), process.stdout.readline()
            assert first.startswith("mine is ready: http://127.0.0.1:")
            answer = subprocess.run(curl, shell=True, capture_output=True, check=True)
            assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()


def test_command_for_a_checkpoint_of_one_task_fits_its_prompts():
    form = PromptForm(text="a command", example="Text Mira's team\n", ending="\n")
    model = SimpleNamespace(settings=CheckpointSettings(prompt_form=form), has_chat_template=True)
    words = shlex.split(_curl("http://x", ServeConfig(), model))
    assert words[1] == "http://x/v1/completions"
    assert json.loads(words[-1])["prompt"] == form.example


def test_second_signal_ends_at_once(start, monkeypatch):
    server, statuses = start(), []
    server.engine.resumed.clear()
    monkeypatch.setattr(os, "_exit", statuses.append)
    server.server.handle_exit(signal.SIGTERM, None)
    assert not statuses
    server.server.handle_exit(signal.SIGTERM, None)
    assert statuses == [128 + signal.SIGTERM]


def test_limits_reach_the_engine(monkeypatch):
    monkeypatch.setattr(server_module, "Engine", lambda model, **limits: limits)
    limits = {"kv_cache_tokens": 50, "max_num_seqs": 3, "max_queue": 4, "prefill_chunk": 5}
    assert server_module.make_engine(None, ServeConfig(**limits)) == limits


def test_taken_port_is_one_line(server, capsys):
    port = server.url.rpartition(":")[2]
    assert run(["serve", "--port", port]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "choose another --port" in error


def test_missing_extra_is_one_line(capsys, monkeypatch):
    for name in list(sys.modules):
        if re.fullmatch(r"layerskip\.serve\.(?!config|engine)\w+", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "layerskip: layerskip serve needs fastapi; run: pip install 'layerskip[serve]'\n"
    )


def test_open_address_without_a_key_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.delenv("LAYERSKIP_API_KEY", raising=False)
    assert run(["serve", "--host", "0.0.0.0"]) == 2
    assert "LAYERSKIP_API_KEY" in capsys.readouterr().err
