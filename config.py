"""The command line: a dataclass is a set of flags, a field's comment its --help, and presets are values.

A numeric field's comment starts with the range it allows, [1, 16] or (0, inf); --help shows it and parse()
enforces it. The presets carry the hyperparameters of the paper's appendix, and three sets of our own.
"""
import argparse
import dataclasses
import inspect
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

_PAPER = dict(size=64, frames=16, channels=3, dim=256, dim_mults=(1, 2, 4, 8), blocks=2, head_dim=64,
              emb_dim=1024, emb_layers=4, attention_resolutions=(8, 16, 32), prediction="eps", dropout=0.0,
              lr=3e-4, beta2=0.99, weight_decay=0.0, warmup=1000, decay="constant", batch_size=128,
              ema=0.9999, num_images=8, cond_dim=0, dataset="video_folder", patch=1, noise_shift=1.0)
_CPU = dict(size=32, digits=1, dim=32, dim_mults=(1, 2, 4, 6), blocks=1, patch=2, scale_shift=True,
            attention_resolutions=(2, 4, 8), head_dim=32, emb_dim=256, emb_layers=2, num_images=8,
            noise_shift=3.0, lr=1e-3, warmup=150, decay="cosine", batch_size=8, ema=0.999, steps=8_000,
            short_captions=0.3)
_TEXT = _PAPER | dict(encoder="bert", cond_dim=1024, tokens=64)

PRESETS: dict[str, dict[str, Any]] = {
    # Ours: two for a CPU (an hour or more on two cores) and one for one GPU. All others are the paper's.
    "cpu": _CPU,
    "cpu_wide": _CPU | dict(dim=64, dim_mults=(1, 2, 4), attention_resolutions=(8,), num_images=2, lr=8e-4,
                            batch_size=4, steps=9_000),
    "cuda": dict(size=64, digits=2, dim=64, dim_mults=(1, 2, 4, 8), blocks=2, scale_shift=True,
                 attention_resolutions=(8, 16, 32), head_dim=64, emb_dim=512, emb_layers=2, num_images=4,
                 noise_shift=3.0, lr=5e-4, warmup=500, decay="cosine", batch_size=16, accumulate=2,
                 checkpointing=True, ema=0.9995, steps=20_000, short_captions=0.3),
    "ucf101": _PAPER | dict(dropout=0.1, steps=60_000),
    "bair": _PAPER | dict(dim=128, dim_mults=(1, 2, 3, 4), blocks=3, emb_layers=2, prediction="v",
                          dropout=0.1, lr=2e-4, beta2=0.999, weight_decay=0.01, ema=0.999,
                          steps=660_000, flip=True),
    "kinetics600": _PAPER | dict(emb_layers=2, prediction="v", dropout=0.1, lr=2e-4, batch_size=256,
                                 steps=220_000),
    "text_small": _TEXT | dict(dim=128, steps=200_000),
    "text_large": _TEXT | dict(steps=700_000),
    "text_9x128": _TEXT | dict(frames=9, size=128, dim=128, dim_mults=(1, 2, 4, 8, 16), head_dim=128, lr=2e-4,
                               num_images=7, steps=800_000),
}

_DIGITS = {"all": dict(steps=24, delta=0.1), "generate": dict(sampler="dpm_solver", steps=25, delta=0.0),
           "extend": dict(steps=20, delta=0.0, method="replacement")}


def _paper(w_r: float = 0.0, **flags: Any) -> dict[str, dict[str, Any]]:
    whole = dict.fromkeys(("predict", "extend", "interpolate"), {"w_r": w_r})  # not of small frames
    return {"all": flags} | (whole if w_r else {})


# The sampling settings that a checkpoint carries: for all modes, then what a mode has of its own.
SAMPLING: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("cpu", "cpu_wide", "cuda"), _DIGITS),
    "ucf101": _paper(steps=256, gamma=0.1),
    "bair": _paper(steps=256, delta=0.1, overlap=1, w_r=50.0),
    "kinetics600": _paper(steps=128, delta=0.1, overlap=5, w_r=9.0),
    **dict.fromkeys(("text_small", "text_large", "text_9x128"), _paper(steps=256, gamma=0.3)),
}


def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[], None]) -> None:
    """Runs a program; ValueError and OSError carry a sentence for the user, all else is a bug and shown."""
    for stream in (sys.stdout, sys.stderr):  # a path must not fail where it cannot be shown
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # notebooks' streams have none
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # whoever read our output, such as head, has enough: end as quietly as others do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        fail(f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split()))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise  # PyTorch's are known by name: this file does without torch
        fail("out of memory: lower --batch_size (raise --accumulate), use --checkpointing, or lower --num")


def rebuild(settings: dict[str, Any], *configs: type) -> list[Any]:
    """One instance of each dataclass from a checkpoint's settings; what they lack has its default.

    Raises ValueError if a value is not one that its flag would take.
    """
    try:
        parts = _instances(settings, configs)
        values = {name: value for part in parts for name, value in vars(part).items()}
        typed = [f"--{'' if v else 'no-'}{name}" if isinstance(v, bool) else f"--{name}={_shown(v)}"
                 for name, v in values.items()]
        taken = vars(_parser(configs).parse_known_args(typed)[0])
    except (argparse.ArgumentError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"its settings are not what flags take: {str(error):.200}") from None
    if wrong := [name for name, value in values.items() if taken.get(name) != value]:
        raise ValueError(f"its settings {', '.join(wrong)} are not of the types that flags have")
    return parts


def _instances(values: dict[str, Any], configs: Sequence[type]) -> list[Any]:
    return [config(**{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values})
            for config in configs]


def parse(*configs: type, argv: list[str] | None = None, first: Sequence[str] = (),
          defaults: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {}) -> list[Any]:
    """One instance of each dataclass from the command line; a field name they share is one flag.

    A flag given by hand wins over defaults(given), those win over --preset, and that over the dataclass. Bad
    input ends the program with one sentence and exit status 2. --help lists the flags named in first first.
    """
    try:
        given = vars(_parser(configs, first).parse_args(argv))
        values = defaults(given) | given
        if (preset := values.get("preset", "cpu")) not in PRESETS:
            raise ValueError(f"--preset {preset} is not one of {', '.join(PRESETS)}")
        values = (PRESETS[preset] if "preset" in values else {}) | values
        return _instances(values, configs)
    except (argparse.ArgumentError, ValueError) as error:
        fail(str(error))


def _parser(configs: Sequence[type], first: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--FLAG VALUE ...]", formatter_class=partial(argparse.HelpFormatter, width=110))
    parser.error, groups, fields = fail, {}, {}
    for field, comment, title in (entry for config in configs for entry in _documented_fields(config)):
        fields.setdefault(field.name, (field, comment, title))
    for name in [*first, *(name for name in fields if name not in first)]:
        field, comment, title = fields[name]
        title = "What everybody needs first" if name in first else title
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        text = f"{comment} (default: {_shown(field.default) or 'none'})".replace("%", "%%")
        groups[title].add_argument(f"--{name}", help=text, **_kind_of(field, comment))
    return parser


def _kind_of(field: dataclasses.Field, comment: str) -> dict[str, Any]:
    if field.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(field.type) is typing.Literal:
        return {"choices": typing.get_args(field.type)}
    return {"type": _converter(field.type, comment), "metavar": field.name.upper()}


def _documented_fields(config: type) -> list[tuple[dataclasses.Field, str, str]]:
    """The fields with their comments and the first sentence of the dataclass that has them."""
    found = {}
    for part in reversed(config.__mro__[:-1]):
        title = inspect.getdoc(part).splitlines()[0].split(". ")[0].rstrip(".")
        for name, comment in re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(part), re.M):
            found[name] = comment, title
    return [(field, *found[field.name]) for field in dataclasses.fields(config)]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _converter(kind: Any, comment: str) -> Callable[[str], Any]:
    """str -> kind, checked against the range that begins the comment; errors name flag, value and range."""
    number = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    interval = re.match(r"([\[(])([^,\]]+), ([^\])]+)([\])])", comment)

    def convert(text: str) -> Any:
        try:
            return tuple(one(part) for part in text.split(",")) if number is not kind else one(text)
        except ValueError:
            allowed = f" in {interval[0]}" if interval else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {_NAMES[kind]}{allowed}") from None

    def one(text: str) -> Any:
        value = number(text)
        if interval:
            low, high = float(interval[2]), float(interval[3])
            above = value > low or value == low and interval[1] == "["
            below = value < high or value == high and interval[4] == "]"
            if not (above and below):
                raise ValueError
        return value

    return convert


_NAMES = {int: "a whole number", float: "a number", str: "text", tuple[int, ...]: "a list of numbers (1,2,4)"}
