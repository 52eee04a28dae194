"""Faults known from other implementations, and the tests that would catch each of them here."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TRAPS = {
    "greedy acceptance compares probabilities and accepts a wrong token": (
        "decoding/test_accept.py::test_greedy_refuses_a_likely_token_that_is_not_the_most_likely",
        "decoding/test_accept.py::test_greedy_over_all_patterns",
    ),
    "the model is changed while drafting and not restored after an exception; not thread-safe": (
        "decoding/test_language_model.py::test_an_exception_leaves_the_model_usable",
        "decoding/test_language_model.py::test_an_abandoned_answer_leaves_the_model_usable",
        "decoding/test_language_model.py::test_threads_share_one_model",
    ),
    "early exit silently runs all layers": (
        "decoding/test_against_transformers.py"
        "::test_early_exit_equals_transformers_with_the_first_layers_alone",
        "decoding/test_kvq.py::test_plain_and_early_exit_run_one_position_a_step",
    ),
    "draft and verification keep separate caches; verification runs all layers again": (
        "decoding/test_kvq.py::test_layers_run_once_per_round",
        "decoding/test_kvq.py::test_one_cache_is_allocated_and_never_copied",
    ),
    "the LM head runs over the whole prompt": (
        "decoding/test_kvq.py::test_prompt_runs_in_chunks_with_one_row_of_logits",
    ),
    "one synchronisation with the device for every drafted token": (
        "decoding/test_kvq.py::test_one_synchronisation_a_round",
    ),
    "stop strings see only the last token, several tokens never match, output is not trimmed": (
        "decoding/test_stream.py::test_text_ends_before_the_stop_string",
        "decoding/test_ends.py::test_stop_string_wherever_it_falls_in_a_draft",
        "decoding/test_ends.py::test_streaming_never_shows_a_stop_string",
    ),
    "several end tokens are searched in the order of the list": (
        "decoding/test_ends.py::test_the_earliest_of_several_end_tokens",
        "decoding/test_ends.py::test_end_token_wherever_it_falls",
    ),
    "max_new_tokens=1 or no draft tokens crash": ("decoding/test_ends.py::test_small_numbers",),
    "the repetition penalty sees the wrong history during verification": (
        "decoding/test_exactness.py::test_self_speculative_equals_plain",
        "decoding/test_sampling.py::test_history_before_each_position",
    ),
    "softmax in half precision": (
        "decoding/test_sampling.py::test_half_precision_logits_are_widened_before_the_softmax",
    ),
    "an all-zero residual crashes sampling": ("decoding/test_accept.py::test_all_zero_residual",),
    "batch size 1 only": (
        "decoding/test_accept.py::test_rows_are_judged_apart",
        "decoding/test_ragged.py::test_every_row_advances_by_its_own_accepted_tokens",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_tests(trap):
    for test in TRAPS[trap]:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), test
