"""The one exception that means "the input is wrong", as opposed to "pyard is wrong"."""


class InputError(ValueError):
    """A file, an argument or a combination of them that pyard cannot work with.

    The message names what was found, what was expected and what to do. The command line prints it in one line and exits with
    status 2; everything else that is raised is a bug and keeps its traceback.
    """
