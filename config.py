"""The command line: a dataclass is a set of flags, and the comment after a field is its --help.

A field without a comment is no flag. A number's comment begins with the range it allows, [1, 16] or (0, inf).
"""
import argparse
import dataclasses
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from presets import PRESETS

# ---- a flag ----------------------------------------------------------------------------------------------

NAMES = {int: "a whole number", float: "a number", str: "text", bool: "a switch"}


class Flag(NamedTuple):
    """A field of a dataclass, with the comment after it and the first sentence of the dataclass."""
    name: str
    type: Any
    comment: str
    group: str

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def choices(self) -> tuple:
        """The values of a Literal; of any other type there are none."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def number(self) -> type:
        """int, float, bool or str: the type of a value, or of each value of a list."""
        if self.choices:
            return str
        return get_args(self.type)[0] if self.is_list else self.type

    @property
    def range(self) -> str:
        """The range that the comment begins with, as it is written; "" if there is none."""
        written = re.match(r"[\[(][^,\]]+, [^\])]+[\])]", self.comment)
        return written[0] if written else ""

    def allows(self, value: Any) -> bool:
        """Whether a value is of the flag's type and in its range, or one of its choices."""
        if self.choices:
            return value in self.choices
        if self.is_list:
            return isinstance(value, tuple) and all(map(self.allows_one, value))
        return self.allows_one(value)

    def allows_one(self, value: Any) -> bool:
        kinds = (int, float) if self.number is float else (self.number,)
        if type(value) not in kinds:
            return False
        if not self.range:
            return True
        low, high = map(float, self.range[1:-1].split(", "))
        if value == low:
            return self.range[0] == "["
        if value == high:
            return self.range[-1] == "]"
        return low < value < high

    def kind(self) -> dict[str, Any]:
        """What argparse has to know of it."""
        if self.choices:
            return {"choices": self.choices}
        if self.type is bool:
            return {"action": argparse.BooleanOptionalAction}
        return {"type": self.read, "metavar": self.name.upper()}

    def read(self, text: str) -> Any:
        """The value that text on the command line means; argparse shows the error."""
        try:
            if self.is_list:
                value = tuple(map(self.number, text.split(",")))
            else:
                value = self.number(text)
        except ValueError:
            value = None
        if not self.allows(value):
            kind = "a list of numbers (1,2,4)" if self.is_list else NAMES[self.number]
            where = f" in {self.range}" if self.range else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}{where}")
        return value


def flags_of(configs: Sequence[type]) -> dict[str, Flag]:
    """The flags of dataclasses by name; a name that they share is one flag."""
    flags: dict[str, Flag] = {}
    for config in configs:
        types = {field.name: field.type for field in dataclasses.fields(config)}
        for part in reversed(config.__mro__[:-1]):
            group = inspect.getdoc(part).splitlines()[0].split(". ")[0].rstrip(".")
            for name, comment in re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(part), re.M):
                if name in types:
                    flags.setdefault(name, Flag(name, types[name], comment, group))
    return flags


# ---- the command line ------------------------------------------------------------------------------------

def no_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """For a program whose flags have no other defaults than their dataclasses'."""
    return {}


def parse(*configs: type, argv: list[str] | None = None, first: Sequence[str] = (),
          defaults: Callable[[dict[str, Any]], dict[str, Any]] = no_defaults) -> list[Any]:
    """One instance of each dataclass from the command line; a field name they share is one flag.

    A flag given by hand wins over defaults(given), those win over --preset, and that over the dataclass. Bad
    input ends the program with one sentence and exit status 2. --help shows the flags named in first, with
    the values that they would have here, and --help_all shows all of them.
    """
    flags = flags_of(configs)
    try:
        given = vars(command_line(flags).parse_args(argv))
        help_all, help_first = given.pop("help_all", False), given.pop("help", False)
        values = defaults(given) | given
        if "preset" in values:
            if values["preset"] not in PRESETS:
                raise ValueError(f"--preset {values['preset']} is not one of {', '.join(PRESETS)}")
            values = PRESETS[values["preset"]] | values
        parts = instances(configs, values)
    except (argparse.ArgumentError, ValueError) as error:
        fail(str(error))
    if help_all or help_first:
        shown = list(flags) if help_all else first
        command_line(flags, shown, parts).print_help()
        sys.stdout.flush()  # whoever reads it may have had enough: run() sees to that
        raise SystemExit(0)
    return parts


def instances(configs: Sequence[type], values: dict[str, Any]) -> list[Any]:
    """One instance of each dataclass from the values that are its fields."""
    parts = []
    for config in configs:
        names = {field.name for field in dataclasses.fields(config)}
        parts.append(config(**{name: values[name] for name in names & values.keys()}))
    return parts


def command_line(flags: dict[str, Flag], shown: Sequence[str] = (),
                 parts: Sequence[Any] = ()) -> argparse.ArgumentParser:
    """A parser of the flags, whose help has those in shown, with the values that they have in parts."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False, add_help=False,
                                     exit_on_error=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=partial(argparse.HelpFormatter, width=110))
    parser.error = fail
    parser.add_argument("--help", "-h", action="store_true", help="show the flags that everybody needs")
    parser.add_argument("--help_all", action="store_true", help="show all flags")
    values, groups = {}, {}
    for part in parts:
        values |= vars(part)
    for name in dict.fromkeys([*shown, *flags]):
        flag, text = flags[name], argparse.SUPPRESS
        if name in shown:
            text = f"{flag.comment} (here: {typed(values[name])})".replace("%", "%%")
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(f"--{name}", help=text, **flag.kind())
    return parser


def typed(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) or '""'


# ---- settings from a checkpoint --------------------------------------------------------------------------

def rebuild(settings: dict[str, Any], *configs: type) -> list[Any]:
    """One instance of each dataclass from a checkpoint's settings; what they lack has its default.

    Raises ValueError if a value is not one that its flag would take.
    """
    check(settings, *configs)
    return instances(configs, settings)


def check(settings: dict[str, Any], *configs: type) -> None:
    """Raises ValueError if a value of the settings is not one that its flag would take."""
    if not isinstance(settings, dict):
        raise ValueError("it holds no settings")
    flags = flags_of(configs)
    for name, flag in flags.items():
        if name in settings and not flag.allows(settings[name]):
            raise ValueError(f"its setting {name} is {settings[name]!r:.100}, which --{name} does not take")


# ---- a whole program -------------------------------------------------------------------------------------

def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory. PyTorch says it in its own ways, and this file does without torch."""
    words = "allocate memory|not enough memory|out of memory"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def run(main: Callable[[], None]) -> None:
    """Runs a program; ValueError and OSError carry a sentence for the user, all else is a bug and shown."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks' streams have none
            stream.reconfigure(errors="backslashreplace")  # a path must not fail where it cannot be shown
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # whoever read our output, such as head, has enough: end as quietly as others do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail("out of memory: training takes less with a lower --batch_size and a higher --accumulate, or with "
             "--checkpointing, and sampling with a lower --num")
