"""Command lines: parsing of words into a config or a call, errors of one line, and the end of a process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro

from gen_dist.config import NetworkConfig, TrainConfig
from gen_dist.config.options import FLAT, of_role
from gen_dist.errors import ConfigError
from gen_dist.network_options import help_lines, lines_about_roles, with_networks
from gen_dist.plugins import interpreter
from gen_dist.plugins.faults import place_of, told
from gen_dist.plugins.loading import Plugin
from gen_dist.plugins.loading import load as load_plugin
from gen_dist.plugins.surroundings import Watch, watched
from gen_dist.presets import get_preset, presets
from gen_dist.startup import lost_output, settle, tell

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Further options of a command that has none besides the config's."""


_TRAIN_USAGE = """usage: {prog} PRESET [--option value ...] [--fresh]
       {prog} --config FILE [--option value ...] [--fresh]

Train a preset, or the config that a run wrote to its config.json.
The same command resumes a run; --fresh starts it over.
--plugin FILE_OR_MODULE, anywhere and repeatable, adds parts and presets of your own.

presets:
{presets}

{prog} PRESET --help lists every option with its meaning and default."""


def parse_train(arguments: Sequence[str], prog: str, more: T) -> tuple[TrainConfig, bool, T]:
    """Parse a command line into the config to train, the flag --fresh, and further options.

    Args:
        arguments: words of the command line.
        prog: the command's name in help and errors.
        more: a dataclass of further options, with their defaults.

    Raises:
        ConfigError: an unknown preset or option, or an invalid value.
        SystemExit: after printing help.
    """
    words, named = without_plugins(arguments)
    plugins = [load_plugin(word) for word in named]
    with watched():  # configs of plug-ins check their values
        return _parse_train(words, plugins, prog, more)


def _parse_train(words: list[str], plugins: Sequence[Plugin], prog: str, more: T) -> tuple[TrainConfig, bool, T]:
    if not words or words[0] in ("-h", "--help"):
        print(_TRAIN_USAGE.format(prog=prog, presets=preset_lines()))
        raise SystemExit(0 if words else 2)
    if words[0].startswith("--config="):
        words[:1] = words[0].split("=", maxsplit=1)
    is_of_file = words[0] == "--config"
    refuse_empty_words(words[2:] if is_of_file else words)
    if is_of_file:
        if len(words) < 2 or not words[1]:
            raise ConfigError("--config needs a file, such as runs/vae-mnist/config.json")
        source, default, words = words[1], _read_config(Path(words[1])), words[2:]
    elif words[0].startswith("-"):
        raise ConfigError(f"the preset comes first, as in {prog} vae-mnist --steps 5")
    else:
        source, default, words = words[0], get_preset(words[0]), words[1:]
    if any(word == "--config" or word.startswith("--config=") for word in words):
        if is_of_file:
            raise ConfigError("--config is given twice; name one file")
        raise ConfigError(
            f"--config FILE stands in place of a preset, as in {prog} --config runs/vae-mnist/config.json"
        )

    names = {plugin.name for plugin in plugins}
    recorded = [plugin for plugin in default.plugins if plugin.name not in names]
    default = dataclasses.replace(default, plugins=(*recorded, *plugins))
    if "--help" in words or "-h" in words:
        print("networks:", *help_lines(default), "", sep="\n  ")
    preset, given = default, words
    default, words = with_networks(preset, given, partial(_parse_network, f"{prog} {source}"))
    about_roles = lines_about_roles(preset, default, given)

    _refuse_names_twice(default, more)
    flat = tyro.conf.OmitArgPrefixes
    start_over = tyro.conf.arg(help="Remove the files of an earlier run from the run directory and start over.")
    options_of_both = dataclasses.make_dataclass(
        "Options",
        [
            ("more", flat[type(more)]),
            ("config", flat[tyro.conf.AvoidSubcommands[TrainConfig]]),
            ("fresh", Annotated[tyro.conf.FlagCreatePairsOff[bool], start_over], False),
        ],
    )
    declared = (type(more), TrainConfig, *(type(getattr(default, part)) for part in FLAT))
    options = _with_short_errors(
        lambda: tyro.cli(options_of_both, args=words, prog=f"{prog} {source}", default=options_of_both(more, default)),
        *declared,
    )
    if os.environ.get("RANK", "0") == "0":
        for line in about_roles:
            tell(line)
    return options.config, options.fresh, options.more


_RESERVED = frozenset({"config", "fresh", "help", "kind", "plugin"})
"""Options of the command line that are no field of a config."""


def _refuse_names_twice(config: TrainConfig, more: object) -> None:
    """Raise ConfigError if two parts of a config have an option of one name, since options have no prefix."""
    owners = {**dict.fromkeys(_RESERVED, "the command line"), **dict.fromkeys(_names_of(more), "the command line")}
    owners |= dict.fromkeys(_names_of(config), "every config")
    for part in FLAT:
        chosen = getattr(config, part)
        owner = f"{part} {getattr(chosen, 'kind', '')}".rstrip()
        for name in _names_of(chosen):
            if name != "kind" and owners.setdefault(name, owner) != owner:
                raise ConfigError(
                    f"option {name} of {owner} is one of {owners[name]} too, and options have no prefix; rename it in "
                    "the plug-in"
                )


def _names_of(part: Any) -> list[str]:
    """Names of the fields of a dataclass."""
    return [one.name for one in dataclasses.fields(part)]


def without_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its other words and the values of every `--plugin`.

    Raises:
        ConfigError: the last one has no value.
    """
    others: list[str] = []
    plugins = []
    rest = iter(words)
    for word in rest:
        if word != "--plugin" and not word.startswith("--plugin="):
            others.append(word)
        elif value := word.partition("=")[2] if "=" in word else next(rest, ""):
            plugins.append(value)
        else:
            raise ConfigError("--plugin needs a Python file or a module, as in --plugin my_gan.py")
    return others, plugins


def _parse_network(prog: str, config: NetworkConfig, words: Sequence[str], role: str) -> NetworkConfig:
    """Parse the options of one role's network."""
    form: Any = tyro.conf.AvoidSubcommands[type(config)]  # type: ignore[misc]
    try:
        parsed: NetworkConfig = _with_short_errors(
            lambda: tyro.cli(form, args=words, prog=prog, default=config), type(config)
        )
    except ConfigError as error:
        line = of_role(str(error), config, role)
        for typed in {word.partition("=")[0] for word in words if word.startswith("--")}:  # no option of the network
            line = re.sub(rf"(?<![\w-]){re.escape(typed)}(?![\w-])", f"--{role}.{typed[2:]}", line)
        raise ConfigError(line) from None
    return parsed


def refuse_empty_words(words: Sequence[str]) -> None:
    """Raise ConfigError if a word is empty, as `--out "$UNSET"` is: an empty path would be the current directory."""
    for before, word in zip(["", *words], words, strict=False):
        if not word or re.fullmatch(r"--[\w.-]+=", word):
            option = word.rstrip("=") or (before if before.startswith("--") else "an argument")
            raise ConfigError(f"{option} is empty; name a value, or leave it out (is a variable of the shell not set?)")


def _read_config(path: Path) -> TrainConfig:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"config file {path} cannot be read: {reason}") from None
    return TrainConfig.from_json(text, str(path))


def program_of(path: str, module: str | None = None) -> str:
    """Program as a user types it: `gen-dist`, `python -m gen_dist.launch.train` or `python launch/train.py`.

    Args:
        path: its sys.argv[0].
        module: name of its module if it was started by Python's option -m.
    """
    if Path(path).stem == "gen-dist":
        return "gen-dist"
    return shlex.join(["python", "-m", module] if module else ["python", path])


def own_program() -> str:
    """This process's program as a user types it, so that a command to type next works where the user is."""
    main = sys.modules["__main__"].__spec__
    return program_of(sys.argv[0], main.name if main else None)


def resume_command() -> str:
    """Command line that resumes the run that this process was started for."""
    options = shlex.join(word for word in sys.argv[1:] if word != "--fresh")
    command = f"{own_program()} {options}"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return f"the same accelerate launch command with {command.removeprefix('python ')}"
    return command


def preset_lines(*, results: bool = False) -> str:
    """One line per preset: its name and description, and with `results` what to expect of it where that is measured."""
    width = max(map(len, presets()))
    lines = []
    for name, preset in presets().items():
        expected = f" ({preset.expected} in {preset.seconds} s)" if results and preset.expected else ""
        lines.append(f"  {name:{width}}  {preset.description}{expected}")
    return "\n".join(lines)


class _MissingArgumentError(ConfigError):
    """An option stands where an argument without a name is missing."""


def _parsed(parse: Callable[[Sequence[str]], T], words: Sequence[str], start: int, *declared: Any) -> T:
    """Parse the words of a command that may have arguments without names.

    Args:
        parse: parses words with tyro.
        words: words of the command line.
        start: number of words before the arguments.
        declared: classes and functions whose annotations list the choices of options.

    Raises:
        ConfigError: an unknown option, a missing argument, or an invalid value.
        SystemExit: after printing help.
    """
    try:
        return _with_short_errors(lambda: parse(words), *declared)
    except _MissingArgumentError as error:
        # tyro says that of an unknown option, too, if it stands first. A stand-in for the argument shows which it is.
        for trial in ([*words[:start], "PATH", *words[start:]], words[:start]):
            try:
                _with_short_errors(lambda trial=trial: parse(trial), *declared)  # type: ignore[misc]
            except ConfigError as other:
                unknown, rest = str(other).partition("; ")[::2]
                if unknown.startswith(_UNRECOGNIZED):
                    given = [word for word in unknown.removeprefix(_UNRECOGNIZED).split(", ") if word.startswith("-")]
                    raise ConfigError(f"{_UNRECOGNIZED}{', '.join(given)}; {rest}") from None
                if " needs " in unknown:
                    raise other from None
        raise error


def _with_short_errors(parse: Callable[[], T], *declared: Any) -> T:
    """Parse with tyro, and turn its framed error into one line.

    Args:
        parse: the call of tyro.
        declared: classes and functions whose annotations list the choices of options, in their order.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # The frame is of hyphens where the terminal's encoding has no lines.
        text = re.sub(r"[\u2500-\u257f]+|-{8,}", " ", re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()))
        place = place_of(stop)  # a ValueError of a plug-in's config, which tyro takes for a wrong value
        kind = _MissingArgumentError if re.search(r"Missing value for argument '(?!-)", text) else ConfigError
        raise kind(_one_line(text, declared) + (f" ({place})" if place else "")) from None


_UNRECOGNIZED = "Unrecognized options: "
_CHOICE = r"^invalid choice '(.*)' for argument '(.*?)'\. Expected one of \((.*?),?\)"
"""Error of tyro for a value that is none of an option's choices, which come in the order of a set."""
_SENTENCES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^Missing value for argument '(.*?)'\. Expected 1 values", r"\1 needs a value"),
    (r"^Missing value for argument '(.*?)'\. Expected (\d+) values", r"\1 needs \2 values"),
    (
        r"^Unrecognized or misplaced options: (.*) Arguments are applied to .* matter\.(; perhaps .*?)?(?= For full)",
        lambda found: "Unrecognized options: " + re.sub(r" \(applied to [^)]*\)", ",", found[1]).rstrip(","),
    ),
    (
        r"^(Error parsing \S+: )no type matching \{None\}\|.* - <class '(?!NoneType)\w+'>: (.*?)(?=\.? For full|$)",
        r"\1\2; use a number or None",
    ),
    (r"^(Error parsing \S+: )no type matching .* - <class '(?!NoneType)\w+'>: ", r"\1"),
)
"""Errors of tyro that are two sentences, and the one that says the same."""


def _one_line(error: str, declared: Sequence[Any]) -> str:
    """Sentence of tyro's framed error that names the mistake, without the option's own help text."""
    error = error.replace("__tyro-dummy-inner__.", "")  # tyro's name for options of a function
    if missing := re.search(r"Missing from (.*?):\s*\n(.*?)For full helptext", error, re.DOTALL):
        program = " ".join(missing[1].split())
        needed, title, unknown = missing[2].partition(_UNRECOGNIZED.rstrip())
        unrecognized = f"{_UNRECOGNIZED}{', '.join(unknown.split())}; " if title else ""
        return f"{unrecognized}{program} needs {_arguments(needed)}; see {program} --help"
    text = " ".join(error.split())
    text = re.sub(r"^(Value error|Parsing error|Unrecognized options|Invalid choice|Missing \S+) ", "", text)
    text = re.sub(r"^Error parsing (?!-)[\w.]+: ", "", text)  # what a dataclass says of itself
    text = re.sub(r" Argument helptext:.*?(?= For full helptext)", "", text)
    text = re.sub(r" Perhaps you meant:(.*?)(?= For full helptext)", _option_names, text)
    if choice := re.search(_CHOICE, text):
        choices = ", ".join(_in_order(re.findall("'(.*?)'", choice[3]), declared))
        text = f"{choice[2]} {choice[1]!r} is none of {choices}{text[choice.end() :]}"
    for mistake, sentence in _SENTENCES:
        text = re.sub(mistake, sentence, text, count=1)
    return re.sub(r"\.? For full helptext, (see|run) (.*)$", r"; see \2", text)


def _in_order(choices: Sequence[str], declared: Sequence[Any]) -> list[str]:
    """Choices in the order of the Literal that lists them, and None behind them; else by letter."""
    named = set(choices) - {"None"}
    for one in declared:
        for hint in get_type_hints(one).values():
            for listed in _choices_in(hint):
                if set(listed) == named:
                    return [*listed, *(["None"] if "None" in choices else [])]
    return sorted(choices)


def _choices_in(hint: Any) -> list[list[str]]:
    """Choices of each Literal in a type, as they are typed."""
    if get_origin(hint) is Literal:
        return [list(map(str, get_args(hint)))]
    return [choices for part in get_args(hint) for choices in _choices_in(part)]


def _arguments(lines: str) -> str:
    """Arguments as tyro lists them, without the help text below each, which stands further to the right."""
    named = [line for line in lines.splitlines() if line.strip()]
    left = min(len(line) - len(line.lstrip()) for line in named)
    parts = "\n".join(line.strip() for line in named if len(line) - len(line.lstrip()) == left)
    parts = re.sub(r"\n(?!--|[A-Z])", "", parts)  # choices that a narrow terminal has on several lines
    return parts.replace("\n", " and ")


def _option_names(match: re.Match[str]) -> str:
    names = dict.fromkeys(re.findall(r"--(?!help\b)[a-z-]+", match[1]))  # tyro adds whose --help has them
    return f"; perhaps you meant {' or '.join(names)}"


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run a command and end the process; an error that a user can fix gives one line and exit code 2.

    Every command passes here, so that none has a traceback of its own for a file, memory or a reader that is gone.
    """
    settle()
    exit_code = _exit_code_of(command)
    if (lost := lost_output(sys.stdout)) and exit_code == 0:
        tell(f"error: standard output cannot be written: {lost.strerror}; its last lines are lost")
        exit_code = 2
    # A process that joined others has loaded this module. Other processes must not wait for torch.
    if parallel := sys.modules.get("gen_dist.parallel.processes"):
        parallel.end_process(exit_code)
    sys.exit(exit_code)


def _exit_code_of(command: Callable[[], None]) -> int:
    watch = Watch(interpreter.SETTLED)
    try:
        try:
            command()
        finally:
            watch.settle()
    except KeyboardInterrupt:
        return 130  # the code that shells give a command ended by Ctrl-C
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not place_of(error):  # one of a plug-in would end a run in silence
            if not isinstance(error.code, int | None):
                raise
            return error.code or 0
        if not (known := told(error)) or os.environ.get("GEN_DIST_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or not known.shared:
            # A control character of a path would break the line, or command the terminal.
            line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], str(known))
            tell(f"{f'rank {rank}: ' if rank != '0' else ''}error: {line}")
        return 2
    return 0


def tell_outcome(lines: Sequence[str]) -> None:
    """Print how a run ended. All that is in the lines is saved, so a reader that is gone does not make the run fail."""
    print(*lines, sep="\n", flush=True)
    if lost := lost_output(sys.stdout):
        tell(f"warning: standard output cannot be written: {lost.strerror}; the run itself is saved")


def call_parsed(function: Callable[..., None], words: Sequence[str], prog: str) -> None:
    """Call a function with arguments parsed from words of the command line.

    Raises:
        ConfigError: an unknown option, or an invalid value.
        SystemExit: after printing help.
    """
    refuse_empty_words(words)
    # The call is made after parsing, because output during parsing counts as a parsing error.
    _parsed(lambda given: tyro.cli(_deferred(function), args=given, prog=prog), words, 0, function)()


def parse_options(kind: type[T], words: Sequence[str], prog: str) -> T:
    """Options of a command without subcommands, parsed into a dataclass.

    Raises:
        ConfigError: an unknown option, or an invalid value.
        SystemExit: after printing help.
    """
    refuse_empty_words(words)
    return _parsed(lambda given: tyro.cli(kind, args=given, prog=prog), list(words) or ["--help"], 0, kind)


def run_subcommand(functions: Sequence[Callable[..., None]], words: Sequence[str], prog: str) -> None:
    """Run the function that the first word names, with arguments parsed from the other words.

    Raises:
        ConfigError: an unknown command or option, or an invalid value.
        SystemExit: after printing help.
    """
    if not words:
        words = ["--help"]
    refuse_empty_words(words)
    commands = {function.__name__.replace("_", "-"): _deferred(function) for function in functions}
    if words[0] not in commands and not words[0].startswith("-"):
        raise ConfigError(f"unknown command {words[0]!r}; there are {', '.join(commands)}; see {prog} --help")
    if words[0].startswith("-") and words[0] not in ("-h", "--help") and not words[0].startswith("--tyro-"):
        stands = f"{words[0]!r} stands before the command, which is"
        unknown = f"{words[0]!r} is not an option of {prog}, which takes a command first:"
        start = stands if any(word in commands for word in words) else unknown
        raise ConfigError(f"{start} {', '.join(commands)}; see {prog} --help")
    try:
        # The call is made after parsing, because output during parsing counts as a parsing error.
        call = _parsed(
            lambda given: tyro.extras.subcommand_cli_from_dict(commands, args=given, prog=prog), words, 1, *functions
        )
    except ConfigError as error:  # tyro names the help of all commands
        of = f"{prog} {words[0]}" if words[0] in commands else prog
        raise ConfigError(str(error).replace(f"see {prog} --help", f"see {of} --help")) from None
    call()


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    @functools.wraps(function)
    def call_later(*values: object, **named: object) -> Callable[[], None]:
        return functools.partial(function, *values, **named)

    return call_later
