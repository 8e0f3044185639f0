"""The error hierarchy, split by whose fault it is. Every error carries three parts: what, why, what to do."""

from __future__ import annotations

from typing import ClassVar


class LlmcError(Exception):
    """Base of every error a user can meet.

    `what` names the failure, `why` its cause, `fix` the next thing to do; each is one sentence.
    `code` is stable and machine-readable; the command line exits with `exit_code`;
    `http_status` is what a server answers where the error can reach one.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, code: str, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what} {why} {fix}")
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix

    def __reduce__(self) -> tuple[type[LlmcError], tuple[str, str, str, str]]:
        """An error crosses from one process to another whole."""
        return type(self), (self.code, self.what, self.why, self.fix)

    def as_dict(self) -> dict[str, str]:
        """The `error` object of `--json` output."""
        return {"code": self.code, "what": self.what, "why": self.why, "fix": self.fix}


class ModelError(LlmcError):
    """The source model cannot be read, or is outside of what llmc supports."""

    exit_code = 3


class RecipeError(LlmcError):
    """A recipe, preset, pass or option does not exist or does not fit together."""

    exit_code = 2


class UsageError(LlmcError):
    """The command or call was used wrongly."""

    exit_code = 2
    http_status = 400


class TargetError(LlmcError):
    """What was asked for is not possible on this machine or target."""

    exit_code = 4


class DeviceLostError(TargetError):
    """A device failed in a step, and this process cannot use it any more: only a new one can."""

    http_status = 503


class ArtifactError(LlmcError):
    """An artifact is damaged, incomplete, or of another schema."""

    exit_code = 3


class RequestError(LlmcError):
    """One generation request cannot be served as asked."""

    exit_code = 2
    http_status = 400


class CheckFailed(LlmcError):
    """A verification that was asked for, or that guards a compile, said no."""

    exit_code = 1


class InternalError(LlmcError):
    """A defect of llmc itself; the report should carry `--debug` output."""

    exit_code = 1
