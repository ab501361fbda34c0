"""Named boundaries of errors: whatever is raised inside, the rest goes on or the error gets a meaning."""

from pathlib import Path

import pytest

from nnunet_cfcl.errors import UserError, best_effort, foreign_errors_as, isolated


def test_an_isolated_block_keeps_its_error_and_the_code_after_it_runs():
    with isolated() as errors:
        raise KeyError("case_1")
    assert [repr(error) for error in errors] == ["KeyError('case_1')"]
    with isolated() as errors:
        pass
    assert not errors


def test_an_isolated_block_does_not_keep_the_user_from_stopping_the_program():
    with pytest.raises(KeyboardInterrupt), isolated():
        raise KeyboardInterrupt


def test_an_error_of_foreign_code_is_raised_as_what_it_means_with_its_cause():
    with pytest.raises(UserError, match="^broken$") as caught, foreign_errors_as(lambda error: UserError("broken")):
        raise ZeroDivisionError
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_user_error_and_an_error_that_means_itself_are_raised_as_they_are():
    with pytest.raises(UserError, match="^mine$"), foreign_errors_as(lambda error: UserError("broken")):
        raise UserError("mine")
    with pytest.raises(ZeroDivisionError) as caught, foreign_errors_as(lambda error: error):
        raise ZeroDivisionError
    assert caught.value.__cause__ is None


def test_a_file_that_a_run_does_not_depend_on_costs_a_line_of_the_log():
    lines: list[str] = []
    with best_effort(Path("progress.png"), lines.append):
        raise MemoryError("too many epochs")
    assert lines == ["No picture progress.png (MemoryError: too many epochs); the run continues"]
