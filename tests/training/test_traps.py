"""Faults known from other implementations, and the tests that would catch each of them here."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TRAPS = {
    "the output of the last layer never enters the loss": (
        "recipe/test_attach.py::test_an_exit_trains_exactly_the_layers_below_it",
        "recipe/test_attach.py::test_the_last_exit_alone_is_plain_training",
    ),
    "dropout slices hidden states but not masks, positions and rotary tensors": (
        "recipe/test_attach.py::test_a_batch_trains_as_its_rows_alone",
        "recipe/test_attach.py::test_packed_sequences",
    ),
    "logits of all exits are stacked in memory": (
        "recipe/test_exit_loss.py::test_logits_exist_for_one_chunk_at_a_time_and_chunks_are_even",
        "recipe/test_exit_loss.py::test_peak_memory_does_not_grow_with_the_exits",
    ),
    "the curriculum counts calls, and restarts at 0 after a resume": (
        "training/test_trainer.py::test_the_curriculum_counts_optimizer_steps",
        "training/test_run.py::test_the_curriculum_goes_on_after_a_resume",
        "recipe/test_attach.py::test_evaluation_between_accumulated_batches_changes_nothing",
    ),
    "the loss ignores the number of items in the accumulated batch": (
        "training/test_trainer.py::test_accumulation_gives_the_same_steps",
        "recipe/test_attach.py::test_accumulated_batches_are_one_batch",
    ),
    "wrapping a layer changes the names in the state dict": (
        "recipe/test_attach.py::test_attach_and_detach_leave_no_trace",
        "recipe/test_attach.py::test_checkpoints_are_the_plain_ones",
        "training/test_run.py::test_lora_is_merged_and_kept_beside",
    ),
    "FSDP hangs where devices drop different layers": (
        "training/test_distributed.py::test_two_processes_train_as_one",
        "recipe/test_layer_dropout.py::test_a_draw_depends_on_its_arguments_alone",
    ),
    "the recipe without layer dropout": (
        "recipe/test_attach.py::test_each_part_of_the_recipe_can_be_turned_off_alone",
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
