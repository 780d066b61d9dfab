"""The error that a user can mend."""


class UserError(ValueError):
    """Reports a mistake of the user's: the command line prints it and exits with status 2."""
