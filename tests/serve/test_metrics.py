"""Metrics by vLLM's names."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import CHAT

DASHBOARD = Path(__file__).parents[2] / "examples" / "serve" / "grafana.json"
NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_success",
    "request_failure",
}


def metrics(client):
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return list(text_string_to_metric_families(response.text))


def value(client, name, **labels):
    """The sum of a metric's samples that have some labels."""
    return sum(
        sample.value
        for metric in metrics(client)
        for sample in metric.samples
        if sample.name == f"layerskip:{name}" and labels.items() <= sample.labels.items()
    )


def test_names_and_labels_are_those_of_the_contract(client, server):
    client.post(CHAT, json=server.chat())
    families = metrics(client)
    assert {family.name for family in families} == {f"layerskip:{name}" for name in NAMES} | {
        "layerskip:request_success_created",
        "layerskip:request_failure_created",
        "layerskip:time_to_first_token_seconds_created",
        "layerskip:inter_token_latency_seconds_created",
        "layerskip:e2e_request_latency_seconds_created",
    }
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.labels["model_name"] == "tiny" for sample in samples)


def test_the_dashboard_shows_metrics_that_exist():
    shown = set(re.findall(r"layerskip:(\w+?)(?:_total|_bucket)?\b", DASHBOARD.read_text()))
    assert shown
    assert shown <= NAMES


@pytest.mark.parametrize(
    ("name", "grows"),
    [
        ("generation_tokens_total", 8),
        ("prompt_tokens_total", 23),
        ("time_to_first_token_seconds_count", 1),
        ("inter_token_latency_seconds_count", 7),
        ("e2e_request_latency_seconds_count", 1),
        ("request_success_total", 1),
    ],
)
def test_request_is_counted(client, server, name, grows):
    before = value(client, name)
    client.post(CHAT, json=server.chat(ignore_eos=True))
    assert value(client, name) == before + grows


def test_failure_is_counted(client, server):
    before = value(client, "request_failure_total")
    server.engine.fail = True
    client.post(CHAT, json=server.chat())
    assert value(client, "request_failure_total") == before + 1
