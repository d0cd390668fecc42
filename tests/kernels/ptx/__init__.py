"""Execution of Triton's PTX on a CPU: parser, machine, and a table of instructions."""
