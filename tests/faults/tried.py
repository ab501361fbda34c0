"""Faults that are injected, how often, and what comes of it: one list for the page and for who looks for the tests."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.test_full_disk import ROOMS, WRITERS
from tests.faults.test_security import FORMS, OUTSIDE, READ_CHECKPOINTS
from tests.fuzz.test_damaged_files import CUTS, FLIPS, KINDS
from tests.pretraining.every_method import DIFFERENT
from tests.pretraining.test_unusual_inputs import POISONS
from tests.pretraining.unusual_inputs import INPUTS

NOTHING = "nothing"


@dataclass(frozen=True)
class Fault:
    """A fault, or a kind of input.

    Attributes:
        name: in Markdown.
        number: of times it is tried.
        result: what happens, in Markdown.
        tests: ``FILE::NAME`` of the tests that show it, FILE below ``tests/``.
        lost: what of the user's is.
    """

    name: str
    number: int
    result: str
    tests: tuple[str, ...]
    lost: str = NOTHING


_DISK, _REAL_DISK = "faults/test_full_disk.py", "end_to_end/test_disk.py"
_DAMAGED, _SECURITY = "fuzz/test_damaged_files.py", "faults/test_security.py"
_WATCHDOG, _INPUTS = "runs/test_watchdog.py", "pretraining/test_unusual_inputs.py"

FAULTS = (
    Fault("a disk that is full, or fills up while a file is written", len(WRITERS) * len(ROOMS),
          "one line names file, reason and remedy; the earlier file stays as it was",
          (f"{_DISK}::test_a_full_disk_is_named_and_the_earlier_file_stays_good",)),
    Fault("a read-only folder", len(WRITERS), "one line names it; the earlier file stays as it was",
          (f"{_DISK}::test_a_read_only_folder_is_named",)),
    Fault("a file longer than the system allows (`ulimit -f`)", len(WRITERS),
          "one line names it; the earlier file stays as it was",
          (f"{_DISK}::test_a_file_that_is_cut_short_is_never_taken_for_a_good_one",)),
    Fault("`nnunet_cfcl pool` on a read-only and on a full disk, `nnUNetv2_train` on a full disk", 3,
          "the same line; the same command, a training with `--c`, goes on once there is room",
          (f"{_REAL_DISK}::test_the_pool_on_a_read_only_and_on_a_full_disk_is_one_line_and_is_gone_on_with",
           f"{_REAL_DISK}::"
           "test_a_training_on_a_full_disk_names_its_checkpoint_keeps_the_earlier_one_and_goes_on_with_room")),
    Fault(f"a file that is cut short ({', '.join(KINDS)})", len(KINDS) * len(CUTS),
          "rejected by name, with the command that writes it again",
          (f"{_DAMAGED}::test_a_file_that_is_cut_short_is_named_with_what_mends_it",), "that file"),
    Fault("a flipped bit in one of these files", len(KINDS) * FLIPS,
          "rejected by name wherever it changes the content read",
          (f"{_DAMAGED}::test_a_flipped_bit_is_noticed_wherever_it_changes_what_is_read",), "that file"),
    Fault("a data loading process that raises", 2, "its own traceback, or its own line for the user",
          (f"{_WATCHDOG}::test_a_data_loading_process_that_raises_shows_its_own_traceback",
           f"{_WATCHDOG}::test_a_user_error_of_a_data_loading_process_is_raised_as_it_is"),
          "the epoch that was begun"),
    Fault("a process that is killed: data loading, pool, import", 4,
          "one line with the most common causes, for data loading also the signal",
          (f"{_WATCHDOG}::test_a_data_loading_process_that_is_killed_is_named_with_the_signal",
           "data/pool/test_run.py::test_a_killed_worker_process_is_an_error_that_says_so",
           "cli/test_counterfactuals.py::test_a_killed_process_raises_a_clear_error"),
          "the epoch, or the case, that was begun"),
    Fault("a process that hangs: data loading, main process, C code that holds Python's lock, pool, end of the pool, "
          "pool after an error", 6,
          "hanging data loading: one line with the fix; else the run is ended with the stack of its main process",
          (f"{_WATCHDOG}::test_a_hanging_data_loading_process_is_an_error_that_the_log_gets_too_and_is_ended",
           f"{_WATCHDOG}::test_a_main_process_that_hangs_is_ended_with_its_stack",
           f"{_WATCHDOG}::test_a_process_that_waits_in_c_code_and_holds_pythons_lock_is_ended_with_its_stack",
           f"{_WATCHDOG}::"
           "test_a_hanging_process_of_the_pool_ends_the_command_with_the_stack_of_its_main_process",
           f"{_WATCHDOG}::test_a_process_of_the_pool_that_does_not_end_ends_the_command",
           f"{_WATCHDOG}::test_the_error_of_one_process_of_the_pool_is_raised_though_another_one_never_returns"),
          "the epoch, or the case, that was begun"),
    Fault("a view, counterfactual or gradient of one step that is not finite", len(POISONS),
          "the step changes nothing and is counted, the next ones train; an epoch of such steps ends the run",
          (f"{_INPUTS}::test_a_step_that_is_not_finite_changes_nothing_and_the_next_ones_train",
           f"{_INPUTS}::test_an_epoch_without_a_finite_step_ends_the_run_and_leaves_no_checkpoint"), "that step"),
    Fault("unusual images, the table below", len(INPUTS) * len(DIFFERENT),
          "trains with finite numbers, or is rejected by name",
          (f"{_INPUTS}::test_an_unusual_input_trains_with_finite_numbers_or_is_refused_in_words",)),
    Fault("a checkpoint that would run code when it is loaded", len(READ_CHECKPOINTS) * len(FORMS),
          "rejected, nothing is executed",
          (f"{_SECURITY}::test_a_checkpoint_that_would_run_something_is_refused_and_runs_nothing",)),
    Fault("names that would leave their folder, in manifests, tables and settings", len(OUTSIDE),
          "rejected, or looked up among the known names; no file outside is opened",
          (f"{_SECURITY}::test_a_name_that_is_a_path_is_none_of_a_file",
           f"{_SECURITY}::test_a_pool_manifest_with_a_path_for_a_name_is_refused",
           f"{_SECURITY}::test_an_intervention_with_a_path_for_a_name_is_refused",
           f"{_SECURITY}::test_cases_of_a_table_are_looked_up_among_the_known_ones_and_open_no_file")),
)
