"""Faults known from other implementations, and the tests that would catch each of them here."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TRAPS = {
    "greedy acceptance compares probabilities and accepts a wrong token": (
        "decoding/test_accept.py::test_greedy_refuses_a_likely_token_that_is_not_the_most_likely",
        "decoding/test_accept.py::test_greedy_over_all_patterns",
        "decoding/test_exactness.py::test_self_speculative_equals_plain",
    ),
    "the model is changed while drafting and not restored after an exception; not thread-safe": (
        "decoding/test_language_model.py::test_an_exception_leaves_the_model_usable",
        "decoding/test_language_model.py::test_an_abandoned_answer_leaves_the_model_usable",
        "decoding/test_language_model.py::test_threads_share_one_model",
    ),
    "early exit silently runs all layers": (
        "model/test_bad_checkpoints.py::test_unsupported_architecture",
        "decoding/test_against_transformers.py"
        "::test_early_exit_equals_transformers_with_the_first_layers_alone",
        "decoding/test_kvq.py::test_plain_and_early_exit_run_one_position_a_step",
    ),
    "draft and verification keep separate caches; verification runs all layers again": (
        "decoding/test_kvq.py::test_layers_run_once_per_round",
        "decoding/test_memory.py::test_one_cache_and_one_set_of_weights",
    ),
    "the LM head runs over the whole prompt": (
        "decoding/test_kvq.py::test_prompt_runs_in_chunks_with_one_row_of_logits",
    ),
    "one synchronisation with the device for every drafted token": (
        "decoding/test_kvq.py::test_one_synchronisation_a_round",
        "decoding/test_kvq.py::test_a_draft_that_ends_by_itself_looks_at_each_token_once",
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
        "decoding/test_batch.py::test_greedy_rows_are_those_of_each_prompt_alone",
    ),
    "the output of the last layer never enters the loss": (
        "recipe/test_attach.py::test_an_exit_trains_exactly_the_layers_below_it",
        "recipe/test_attach.py::test_the_last_exit_alone_is_plain_training",
    ),
    "dropout slices hidden states but not masks, positions and rotary tensors": (
        "recipe/test_layer_dropout.py"
        "::test_masks_positions_and_rotary_tables_are_sliced_with_the_rows",
        "recipe/test_attach.py::test_a_batch_trains_as_its_rows_alone",
        "recipe/test_attach.py::test_packed_sequences",
    ),
    "logits of all exits are stacked in memory": (
        "recipe/test_exit_loss.py::test_logits_exist_for_one_chunk_at_a_time_and_chunks_are_even",
        "recipe/test_exit_loss.py::test_peak_memory_does_not_grow_with_the_exits",
    ),
    "the curriculum counts calls, and restarts at 0 after a resume": (
        "training/test_trainer.py::test_the_curriculum_counts_optimizer_steps",
        "training/test_run.py::test_resume_is_bit_for_bit",
        "recipe/test_attach.py::test_evaluation_between_accumulated_batches_changes_nothing",
    ),
    "the loss ignores the number of items in the accumulated batch": (
        "training/test_trainer.py::test_accumulation_gives_the_same_steps",
    ),
    "wrapping a layer changes the names in the state dict": (
        "recipe/test_attach.py::test_attach_and_detach_leave_no_trace",
        "recipe/test_attach.py::test_checkpoints_are_the_plain_ones",
        "training/test_run.py::test_lora_is_merged_and_saved_beside",
    ),
    "FSDP hangs where devices drop different layers": (
        "training/test_distributed.py::test_two_processes_train_as_one",
        "recipe/test_layer_dropout.py::test_a_sample_depends_on_its_arguments_alone",
    ),
    "the recipe without layer dropout": (
        "recipe/test_attach.py::test_each_part_of_the_recipe_can_be_turned_off_alone",
    ),
    "a baseline with other weights": (
        "bench/test_peers.py::test_transformers_gives_our_tokens_in_every_row",
        "bench/test_peers.py::test_llama_cpp_gives_our_tokens",
    ),
    "the baseline's tokens are counted anew from its text, the method's are not": (
        "bench/test_peers.py::test_tokens_of_one_step_may_come_one_by_one",
        "bench/test_measure.py::test_tokens_after_the_first_step_are_decoded",
        "bench/test_peers.py::test_answers_end_by_our_rules",
    ),
    "no warm-up, no synchronisation with the device": (
        "bench/test_measure.py::test_all_take_turns_and_another_one_begins_each_time",
        "decoding/test_clock.py::test_the_clock_waits_for_the_device_before_it_reads",
    ),
    "every cell of a sweep scores other samples": (
        "bench/test_measure.py::test_systems_take_turns_with_each_other",
        "bench/test_measure.py::test_all_take_turns_and_another_one_begins_each_time",
        "bench/test_tasks.py::test_a_larger_draw_contains_the_smaller_one_and_keeps_the_order",
    ),
    "several JSON documents in one file": (
        "cli/test_bench.py::test_one_document_with_the_rows_of_the_contract",
        "cli/test_tune.py::test_json_is_one_document",
    ),
    "an exact match that is a distance, HumanEval without pass@1": (
        "bench/test_quality.py::test_exact_match_is_exact",
        "bench/test_quality.py::test_rouge_of_hand_counted_words",
        "bench/test_quality.py::test_pass_at_1_of_humaneval_and_mbpp",
        "bench/test_sandbox.py::test_exiting_early_fails",
    ),
    "evaluation at an exit silently uses the whole model": (
        "bench/test_harness.py::test_an_exit_says_what_it_likes_itself",
        "bench/test_perplexity.py"
        "::test_exits_differ_and_windows_of_full_stride_are_the_sum_of_their_parts",
    ),
    "the documented flag name differs from the one in code": (
        "test_docs.py::test_flags_in_the_pages_exist",
        "test_docs.py::test_every_setting_is_explained",
        "cli/test_train.py::test_every_setting_has_a_flag_of_its_name",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_tests(trap):
    for test in TRAPS[trap]:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), test
