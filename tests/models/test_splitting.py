"""Models that are split over processes; what they compute is in tests of training and of whole runs."""

from launching import run_processes


def test_a_model_that_cannot_be_split_is_refused() -> None:
    """And a pass for which the memory is too small ends with one line."""
    run_processes("unsplittable_models.py", count=1)
