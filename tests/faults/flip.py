"""Damage the files of a run and of the cache, one at a time, and judge commands on them: one line of JSON for each.

    LD_PRELOAD=failing_calls.so python -m tests.faults.flip WORK COMMAND[,COMMAND ...] DAMAGES

DAMAGES bits are flipped in each file, one at a time; then it is cut at as many places, zeroed and removed. Verdicts
that are right:

- `same`: the result is that of the undamaged files, and nothing is said;
- `told`: the result is right, and a line names the damage;
- `told, older checkpoint`: a line names the damage, and the checkpoint before was used;
- `told, figures stay wrong`: a line names the damage to metrics.jsonl, which nothing restores;
- `refused`: exit code 2 and one line that starts with `error: `;
- `absent`: the file, no part of a checkpoint or the cache, was removed, and the result goes without it;
- `own file`: the damaged file is a picture or a log that the command neither reads nor writes;
- `other weights`: the file is one of diffusers', which has no digest: the start of the run says its SHA-256.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.commands import Commands, Ended, print_json
from tests.faults.inject import problems_of_end
from tests.faults.steady import get_ready
from tests.faults.tree import figures_of

RIGHT = frozenset(
    {
        *("same", "told", "told, older checkpoint", "told, figures stay wrong", "refused", "absent", "own file"),
        "other weights",
    }
)
COMMANDS = {
    "resume": "half",
    "sample": "evaluated",
    "evaluate": "evaluated",
    "evaluate more": "evaluated",
    "encode": "encoded",
    "report": "evaluated",
    "replay": "evaluated",
    "resume in shards": "half in shards",
    "train from a run": "beside a run",
    "resume from a run": "half from a run",
    "encode to one file": "encoded to one file",
    "export for diffusers": "exported for diffusers",
    "train from diffusers": "beside a directory of diffusers",
    "sample a fitted prior": "done with a prior",
    "resume on shards": "half on shards",
    "resume a plug-in": "half of a plug-in",
    "sample a plug-in": "plug-in alone",
    "evaluate a plug-in": "plug-in alone",
    "report a plug-in": "plug-in evaluated",
}
"""Scenarios, and the states that they are tried on."""


def damages_of(data: bytes, count: int, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Damaged versions of a file's content, with a name each; None stands for a file that is gone."""
    size = len(data)
    places = {0, size // 2, size - 1, *(chance.randrange(size) for _ in range(count))} if size else set()
    for place in chance.sample(sorted(places), min(count, len(places))):
        bit = chance.randrange(8)
        yield f"bit {bit} of byte {place}", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    lengths = sorted({0, 1, size // 2, size - 1} & set(range(size)))
    for length in chance.sample(lengths, min(count, len(lengths))):
        yield f"cut to {length} bytes", data[:length]
    yield "zeros", bytes(size)
    yield "gone", None


def result_of(commands: Commands, command: str, ended: Ended) -> Any:
    """Result for which the user ran a command."""
    run, out = commands.run_path, commands.root / "out"
    match command.split()[0]:
        case "resume" | "train":
            return {name: digest for name, digest in commands.contents().items() if name.startswith("run/")}
        case "encode" | "export":
            return {name: digest for name, digest in commands.contents().items() if name.startswith("out/")}
        case "evaluate":
            return figures_of(run / "evaluation.json")
        case "report":
            return (out / "report.html").read_text().split("data digest")[0]
        case "sample":
            return (out / "samples.png").read_bytes().hex()
        case _:
            return ended.out


def verdict_of(
    commands: Commands, command: str, ended: Ended, usual: Ended, expected: Any, damaged: str, damage: str
) -> str:
    """Judge a command on damaged files."""
    if problems := problems_of_end(ended):
        return "; ".join(problems)
    if ended.code == 2:
        return "refused"
    try:
        found = result_of(commands, command, ended)
    except (OSError, ValueError) as error:
        return f"no result: {error}"
    if damage == "gone" and not {"checkpoints", "cache"} & set(Path(damaged).parts):
        return "absent"
    told = any(word in ended.err and word not in usual.err for word in ("damaged", "cannot be read", "packed "))
    if found == expected:
        return "told" if told else "same"
    if command.startswith(("resume", "train")):
        changed = {name for name in {*expected, *found} if expected.get(name) != found.get(name)}
        if changed <= {damaged}:
            return "own file"
    if command == "train from diffusers" and damaged == "other/diffusion_pytorch_model.safetensors":
        return "other weights"
    if told and damaged == "run/metrics.jsonl":
        return "told, figures stay wrong"
    if told and "checkpoints" in Path(damaged).parts:
        return "told, older checkpoint"
    return "told, but another result" if told else "another result, in silence"


def _is_read(path: Path) -> bool:
    """True for files; images and their packed data are others in each copy of a state."""
    return path.is_file() and "images" not in path.parts and not path.parent.name.startswith("folder-images-")


def main(work: str, names: str, count: str) -> None:
    """Damage the files of each command's state in turn."""
    get_ready()
    commands, chance = Commands(Path(work)), random.Random(1)
    for command in names.split(","):
        state, words = COMMANDS[command], commands.scenarios[command].words
        commands.prepare(state)
        commands.restore(state)
        usual = commands.run(words)
        assert usual.code == 0, usual.err
        expected = result_of(commands, command, usual)
        commands.restore(state)
        for file in filter(_is_read, sorted(commands.root.rglob("*"))):
            for damage, content in damages_of(file.read_bytes(), int(count), chance):
                commands.restore(state)
                if content is None:
                    file.unlink()
                else:
                    file.write_bytes(content)
                ended = commands.run(words)
                name = file.relative_to(commands.root).as_posix()
                verdict = verdict_of(commands, command, ended, usual, expected, name, damage)
                row = {"command": command, "file": name, "damage": damage, "verdict": verdict, "code": ended.code}
                print_json(row if verdict in RIGHT else row | {"err": ended.err[-600:]})
            commands.restore(state)


if __name__ == "__main__":
    main(*sys.argv[1:])
