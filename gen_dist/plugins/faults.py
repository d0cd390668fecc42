"""Errors of a plug-in's own code, each as one line with the plug-in's file and line."""

from __future__ import annotations

from gen_dist.errors import MachineError, PluginError, UserError, as_user_error, shortened
from gen_dist.plugins.loading import place_of_file, place_within
from gen_dist.plugins.surroundings import spoiled_by


class PluginFault(PluginError):
    """Unexpected error of a plug-in's code. Other processes need not have it."""

    shared = False


def told(error: BaseException) -> UserError | None:
    """Return an error as one that is told in a line. None stands for a fault of this program, whose traceback helps.

    An error that passed through code of a plug-in is the plug-in's, as is one after it has spoiled what all code needs.
    """
    known, place = as_user_error(error), place_of(error)
    if known is not None:
        return MachineError(f"{known} ({place})") if place and isinstance(known, MachineError) else known
    spoiled = spoiled_by()
    if not place and not spoiled:
        return None
    text = shortened(" ".join(str(error).split()))
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    cause = f"{place}:" if place else f"{spoiled}, and then"
    return PluginFault(f"{cause} {reason}; GEN_DIST_TRACEBACK=1 shows the calls")


def place_of(error: BaseException | None) -> str | None:
    """Plug-in and its innermost line that an unexpected error, or its cause, passed through. None if none."""
    while error is not None and not isinstance(error, UserError):  # which says itself what is wrong
        found = None
        trace = error.__traceback__
        while trace:
            frame = trace.tb_frame
            if file := place_within(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
                found = f"plug-in {file}, line {trace.tb_lineno}"
            trace = trace.tb_next
        # The compiler's errors list the user's calls apart: its own frames are those of its interpreter.
        for call in getattr(error, "real_stack", None) or ():
            if file := place_of_file(call.filename):
                found = f"plug-in {file}, line {call.lineno}"
        if found:
            return found
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
