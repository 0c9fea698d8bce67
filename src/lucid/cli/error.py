"""Why a command cannot answer."""


class CommandError(Exception):
    """Why a command cannot answer, in one sentence."""
