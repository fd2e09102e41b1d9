"""The error tree: everything this library raises on purpose.

AlignerError
├── ModelLoadError            a model folder is missing, damaged or refused
├── TemplateError             an unknown template, or one that lacks a field it needs
├── ProviderUnavailableError  the execution provider asked for cannot really run
├── QuestionNotFoundError     a chain gave an answer but no question to correct it against
├── InputTooLongError         question and sentence do not fit the model's context
├── CorrectionTimeoutError    a deadline passed
├── CorrectionFailedError     the model or its backend failed while correcting
└── MissingDependencyError    an extra is not installed (also an ImportError)

Bad types and values are plain `TypeError` and `ValueError` that name the argument.
"""


class AlignerError(Exception):
    """Base of every error of this library."""


class ModelLoadError(AlignerError):
    """A model cannot be loaded; the message says which file and what to do."""


class TemplateError(AlignerError):
    """A template is unknown, or was given fields it cannot use."""


class ProviderUnavailableError(AlignerError):
    """The execution provider asked for is not installed or did not load."""


class QuestionNotFoundError(AlignerError):
    """No question was found for an answer; it is never guessed."""


class InputTooLongError(AlignerError):
    """The question and the sentence alone exceed the model's context."""


class CorrectionTimeoutError(AlignerError):
    """A correction did not finish before its deadline."""


class CorrectionFailedError(AlignerError):
    """The model failed while correcting; the cause is chained."""


class MissingDependencyError(AlignerError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


def check_texts(**texts: object) -> None:
    """Raise a `TypeError` that names the first argument that is not a string."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")
