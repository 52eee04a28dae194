"""The targets of benchmarks/speed.py, from rows as `bench` writes them."""

import pytest
from speed_targets import report, target_table


def row(system, mode, tokens_per_s, *, label=None, exit_layer=None, **figures):
    return {
        "system": system,
        "mode": mode,
        "label": label,
        "exit_layer": exit_layer,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_with_prompt": tokens_per_s and 0.8 * tokens_per_s,
        **figures,
    }


def own(plain, auto, *, exit_layer=8, share=0.85, categories=None):
    found = [
        row("layerskip", "plain", plain, speedup=1.0, share_of_bandwidth=share),
        row("layerskip", "auto", auto, exit_layer=exit_layer, speedup=auto / plain),
        row("layerskip", "auto", 10 * auto, label="without n-grams", exit_layer=exit_layer),
    ]
    if categories:
        found[1]["categories"] = categories
    return found


def part(rows, *, weights="16bit", task="topv2"):
    return {"rows": rows, "task": task, "environment": {"weights": weights}}


def by_goal(parts):
    return {line["goal"]: line for line in target_table(parts)}


def test_a_trained_checkpoint_is_held_against_its_peers():
    peers = [
        row("llama.cpp", "plain", 100.0),
        row("llama.cpp", "prompt-lookup", 125.0),
        row("transformers", "self-speculative", 70.0, exit_layer=4, tokens_per_s_with_prompt=40.0),
        row("transformers", "self-speculative", 60.0, exit_layer=8),
    ]
    lines = by_goal({"m topv2 16bit": part([*own(90.0, 225.0), *peers])})
    reached = {goal: (line["reached"], line["met"]) for goal, line in lines.items()}
    assert reached == {
        "plain, share of the ceiling": (0.85, True),
        "plain / llama.cpp plain": (pytest.approx(0.9), False),
        "auto / plain": (pytest.approx(2.5), True),
        "auto / llama.cpp plain": (pytest.approx(2.25), True),
        "auto / llama.cpp prompt lookup": (pytest.approx(1.8), False),
        "auto / transformers' best assistant_early_exit, whole answers": (
            pytest.approx(3.75),
            False,
        ),
        "auto / plain, worst case": (pytest.approx(2.5), True),
    }


def test_tasks_have_goals_of_their_own():
    for task, wanted in (("topv2", 2.2), ("humaneval", 1.9), ("cnn_dm", None), ("d.jsonl", 2.2)):
        measured = part(own(90.0, 180.0)) | {"task": task}
        assert by_goal({"m": measured})["auto / plain"]["wanted"] == wanted


def test_the_built_in_checkpoint_is_to_be_faster():
    measured = part(own(90.0, 216.0)) | {"model": "smollm2-135m-layerskip"}
    line = by_goal({"m": measured})["auto / plain"]
    assert (line["wanted"], line["met"]) == (2.5, False)


def test_four_bits_have_no_goal_over_plain_and_only_16_bits_a_ceiling():
    lines = by_goal({"m topv2 int4": part(own(90.0, 135.0), weights="int4")})
    assert lines["auto / plain"]["met"] is None
    assert "plain, share of the ceiling" not in lines


def test_an_untrained_checkpoint_is_judged_on_summaries():
    for task, categories, reached in (
        ("cnn_dm", None, 1.1),
        ("spec_bench", {"qa": {"speedup": 1.0}, "summarization": {"speedup": 1.3}}, 1.3),
        ("humaneval", None, None),
    ):
        rows = own(100.0, 110.0, exit_layer=None, categories=categories)
        lines = by_goal({"m": part(rows, task=task)})
        assert "auto / plain" not in lines
        line = lines.get("untrained, auto / plain on summaries")
        assert (line and line["reached"]) == (reached and pytest.approx(reached))
        assert line is None or line["met"] == (reached >= 1.2)


def test_the_worst_case_of_all_parts_is_named():
    parts = {"a": part(own(100.0, 120.0)), "b": part(own(100.0, 96.0)), "c": {"error": "no"}}
    line = by_goal(parts)["auto / plain, worst case"]
    assert (line["case"], line["reached"], line["met"]) == ("b", pytest.approx(0.96), False)
    kinds = {"qa": {"speedup": 0.9}, "rag": {"speedup": 1.5}, "empty": {}}
    parts["a"] = part(own(100.0, 120.0, categories=kinds))
    line = by_goal(parts)["auto / plain, worst case"]
    assert (line["case"], line["reached"], line["met"]) == ("a, qa", pytest.approx(0.9), False)


def test_memory_and_start_up_are_at_most():
    lines = by_goal(
        {
            "memory m": {"over_plain": 1.03},
            "start-up m": {"seconds": 3.0, "seconds_with_compilation": 20.0},
        }
    )
    assert {goal: line["met"] for goal, line in lines.items()} == {
        "peak memory, auto / plain": False,
        "start-up, s": True,
        "start-up with compilation, s": None,
    }


def test_a_peer_that_failed_has_no_line():
    failed = {**row("llama.cpp", "plain", None), "error": "not installed"}
    assert "plain / llama.cpp plain" not in by_goal({"m": part([*own(90.0, 200.0), failed])})


def test_the_report_has_a_line_for_each_goal_and_names_what_failed():
    parts = {
        "memory m": {"over_plain": 1.01},
        "m topv2 int8": {"command": "layerskip bench", "error": "no such file"},
    }
    machine = {"command": "python speed.py", "commit": "abc", "date": "2026-11-25"}
    machine |= {"cpu": "a CPU", "threads": 2, "torch": "2.13"}
    text = report({"environment": machine, "goals": target_table(parts), "parts": parts}, None)
    assert "| peak memory, auto / plain | memory m | at most 1.02 | 1.01 | yes |" in text
    assert "no such file" in text
