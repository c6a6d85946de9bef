"""The one error that is meant for the user."""


class PreflowError(Exception):
    """A problem the user can solve: the message says what is wrong, where, and what to do.

    Anything that is not a `PreflowError` is a defect of preflow and shows its traceback.
    """


class LocationError(PreflowError, ValueError):
    """A path or address that is written wrongly; pydantic names the setting."""


class DiskFullError(PreflowError, OSError):
    """There was no room for a file; what was there before is untouched."""
