"""Every error that this application raises on purpose.

A message says what must hold, what was found and what to do. Errors that can occur on a client also carry a code and a
neutral sentence, because Flower sends a client's exception text to the server word for word and that text may name
private files.
"""

from __future__ import annotations


class FGLError(Exception):
    """Base of all errors of this application."""

    client_code = 100
    """What a client answers instead of its exception text; 1 to 99 are Flower's own codes."""
    client_sentence = "The client failed; its own log holds the reason."


class ConfigError(FGLError):
    """A run-configuration value is missing, unknown, of the wrong type or out of range."""

    client_code = 101
    client_sentence = "The run configuration does not fit this client; its own log holds the reason."


class DataError(FGLError):
    """Images cannot be read, or there are too few."""

    client_code = 102
    client_sentence = "The client has no usable images; its own log holds the reason."


class ModelError(FGLError):
    """A classifier, generator or captioner cannot be loaded, or its arrays do not fit."""

    client_code = 103
    client_sentence = "The client could not load a model; its own log holds the reason."


class PromptError(FGLError):
    """Prompts that arrived are malformed, or there are none."""

    client_code = 104
    client_sentence = "The client could not write prompts; its own log holds the reason."


class ApprovalError(FGLError):
    """The owner of a client has not approved the run's prompts."""

    client_code = 105
    client_sentence = "The owner of this client has not approved its prompts."


class SynthesisError(FGLError):
    """The synthesis worker failed or the store does not hold what the plan asks for."""


class RoundError(FGLError):
    """An exchange with the clients gave nothing to go on with."""


class RunFolderError(FGLError):
    """A run folder cannot be used, or belongs to a run with other settings."""
