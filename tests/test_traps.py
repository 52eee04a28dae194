"""Faults known from other implementations, and a test that would catch each of them here."""

import re
from pathlib import Path

TESTS = {
    "greedy acceptance accepts a token that is not the most likely": "test_greedy_over_all_patterns",
    "an exception leaves the model changed": "test_an_exception_leaves_the_model_usable",
    "not thread-safe": "test_threads_share_one_model",
    "early exit runs all layers": "test_early_exit_equals_transformers_with_the_first_layers_alone",
    "verification runs all layers again": "test_a_round_runs_each_layer_once_for_each_position",
    "draft and verification have separate caches": "test_one_cache_and_no_copies",
    "the LM head runs over the whole prompt": "test_a_prompt_runs_in_chunks_with_one_row_of_logits",
    "one synchronization for every drafted token": "test_one_synchronization_a_round",
    "stop strings see the last token alone": "test_a_stop_string_anywhere_in_a_draft",
    "end tokens are searched in the order of the list": "test_the_earliest_of_several_end_tokens",
    "max_new_tokens=1 or no draft tokens crash": "test_small_numbers",
    "the repetition penalty sees the wrong history": "test_history_before_each_position",
    "softmax in half precision": "test_half_precision_logits_are_widened_before_the_softmax",
    "an all-zero residual crashes sampling": "test_all_zero_residual",
    "batch size 1 only": "test_greedy_rows_are_those_of_each_prompt_alone",
    "the last layer's output never enters the loss": "test_an_exit_trains_exactly_the_layers_below_it",
    "dropout does not slice masks": "test_masks_positions_and_rotary_tables_are_sliced_with_the_rows",
    "logits of all exits are stacked in memory": "test_peak_memory_does_not_grow_with_the_exits",
    "the curriculum restarts after a resume": "test_the_curriculum_goes_on_after_a_resume",
    "the loss ignores the accumulated batch": "test_accumulated_batches_are_one_batch",
    "wrapping a layer renames its weights": "test_attach_and_detach_leave_no_trace",
    "FSDP hangs where devices drop other layers": "test_two_processes_train_as_one",
    "a baseline with other weights": "test_transformers_gives_our_tokens_in_every_row",
    "no synchronization before a clock is read": "test_the_clock_waits_for_the_device",
    "an exact match that is a distance": "test_exact_match_is_exact",
    "evaluation at an exit uses the whole model": "test_an_exit_says_what_it_likes_itself",
    "documented flags differ from those in code": "test_flags_in_the_pages_exist",
}  # fmt: skip


def test_every_trap_has_its_test():
    folder = Path(__file__).parent
    source = "\n".join(path.read_text() for path in folder.rglob("test_*.py"))
    missing = [name for name in TESTS.values() if not re.search(rf"(?m)^def {name}\(", source)]
    assert not missing
