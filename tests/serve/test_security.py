"""Key, host, origin, sizes and times: what a stranger at the address can do."""

import socket
import time

import pytest
from running_server import CHAT, error_of

from layerskip.serve.config import ServeConfig


def connection_to(server):
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def test_key_is_needed_everywhere_but_for_the_page_and_health(start):
    server = start(api_key="secret")
    with server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == client.get("/page.js").status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            assert error_of(client.get(path), 401)["code"] == "invalid_api_key"
        error_of(client.post(CHAT, json=server.chat()), 401)
        for key in ("Bearer wrong", "Bearer s\u00e9cret".encode(), "secret", "Basic secret", ""):
            assert client.get("/v1/models", headers={"Authorization": key}).status_code == 401
    with server.client(Authorization="Bearer secret") as client:
        assert client.post(CHAT, json=server.chat()).status_code == 200


def test_other_machines_are_served_only_with_a_key_or_on_request():
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ValueError, match="LAYERSKIP_API_KEY"):
            ServeConfig(host=host)
        ServeConfig(host=host, api_key="secret")
        ServeConfig(host=host, auth=False)
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        ServeConfig(host=host)
    with pytest.raises(ValueError, match="contradicts"):
        ServeConfig(api_key="secret", auth=False)
    with pytest.raises(ValueError, match="empty"):
        ServeConfig(api_key="")
    assert "secret" not in repr(ServeConfig(api_key="secret"))


def test_other_names_for_this_address_are_refused(client):
    for name in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert client.get("/health", headers={"Host": name}).status_code == 200
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::2]"):
        error_of(client.get("/health", headers={"Host": name}), 403)


def test_pages_of_other_origins_are_refused_unless_they_are_named(client, start):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    refused = client.options(CHAT, headers=asked)
    assert refused.status_code == 405
    assert "access-control-allow-origin" not in refused.headers
    with start(allow_origin=("https://a.example",)).client() as other:
        allowed = other.options(CHAT, headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        asked["Origin"] = "https://b.example"
        assert other.options(CHAT, headers=asked).status_code == 400


def test_large_body_is_refused_however_it_is_sent(start):
    server = start(max_body_bytes=2_000)
    with server.client() as client:
        large = server.chat("x" * 3_000)
        error_of(client.post(CHAT, json=large), 413)
        pieces = (b"x" * 1_000 for _ in range(12))
        error_of(client.post(CHAT, content=pieces), 413)
        assert client.post(CHAT, json=server.chat()).status_code == 200


def test_slow_body_is_refused(start):
    server = start(body_timeout=0.1)
    with connection_to(server) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1_000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_connection_without_whole_headers_is_closed(start, sent):
    with connection_to(start(header_timeout=0.1)) as connection:
        connection.sendall(sent)
        assert connection.recv(1_000) == b""


def test_slow_headers_of_a_second_request_close_the_connection(start):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connection_to(start(header_timeout=0.1)) as connection:
        connection.sendall(request)
        assert connection.recv(1_000).startswith(b"HTTP/1.1 200 ")
        connection.sendall(request[:20])
        assert connection.recv(1_000) == b""


def test_slow_reader_holds_up_nobody(server, client):
    with connection_to(server) as connection:
        body = b'{"prompt": "x", "max_tokens": 400, "stream": true}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert client.post(CHAT, json=server.chat()).status_code == 200


def test_limits_of_prompt_and_answer(start):
    server = start(max_prompt_tokens=30, max_tokens=4, default_max_tokens=3, max_n=2, max_stop=1)
    with server.client() as client:
        error_of(client.post(CHAT, json=server.chat("x" * 40, max_tokens=4)), 400)
        error_of(client.post(CHAT, json=server.chat()), 400)
        body = server.chat(n=2, max_tokens=None, stop="\N{SNOWMAN}", ignore_eos=True)
        answer = client.post(CHAT, json=body).json()
        assert answer["usage"]["completion_tokens"] == 6
        two_prompts = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1}
        error_of(client.post("/v1/completions", json=two_prompts), 400)


def test_prompts_are_logged_only_on_request(server, client, start):
    client.post(CHAT, json=server.chat("my secret"))
    assert not any("my secret" in line for line in server.log)
    other = start(log_prompts=True)
    with other.client() as one:
        one.post(CHAT, json=other.chat("my secret"))
    assert any("my secret" in line for line in other.log)


def test_page_may_load_nothing_from_elsewhere(client):
    headers = client.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/page.js", "/page.css"):
        assert "http" not in client.get(path).text.replace("http-equiv", "")


def test_server_does_not_name_its_software(client):
    assert "server" not in client.get("/health").headers
    started = time.time()
    assert client.get("/v1/models").json()["data"][0]["created"] <= started
