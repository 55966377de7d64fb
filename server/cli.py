"""The `boomerang` command. Imports are lazy: a command loads what it needs, and no more than its own flags."""

from __future__ import annotations

import gc
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Annotated, Any

import typer
from pydantic import BaseModel, Field
from typer.core import TyperCommand

from model_store.errors import BoomerangError
from server.config import Settings
from server.options import SettingsError, flags, load_settings, read_options

_OF_MODEL = ("model", "engine")
_SETTINGS = (
    ". Every setting is also an environment variable (--max-num-seqs: BOOMERANG_MAX_NUM_SEQS) and a key of the YAML "
    "file of --config"
)

# What a command is: a function that is called with the values of its flags, and those flags.
Given = dict[str, Any]
Declared = tuple[Callable[[Given], int | None], list[Parameter]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        typer.main.get_command(_app(argv[:1])).main(argv, prog_name="boomerang")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def settings_of(argv: Sequence[str]) -> Settings:
    """What `serve` would run with. SettingsError, or SystemExit for flags that do not exist."""
    command = typer.main.get_command(_app(["serve"])).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", list(argv)).params
    return load_settings({name: value for name, value in given.items() if name != "model" and value not in (None, ())})


def _app(called: Sequence[str]) -> typer.Typer:
    """Only the called command's flags are declared in full; the others are one line of help."""
    app = typer.Typer(
        help="Serve every size between a student and its teacher from one copy of their tensors.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_top)
    is_completing = "_BOOMERANG_COMPLETE" in os.environ
    for name, (text, declare) in _COMMANDS.items():
        group, _, own = name.rpartition(" ")
        part = app
        if group:
            app.add_typer(part := typer.Typer(no_args_is_help=True, help="measure this machine"), name=group)
        is_called = is_completing or called == [group or own]
        run, parameters = declare() if is_called else (lambda given: None, [])
        part.command(
            own,
            short_help=text,
            help=text + _SETTINGS * any(parameter.name == "config" for parameter in parameters),
            cls=_Command,
        )(_as_function(run, parameters))
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from server.version import __version__

        print(__version__)
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


class _Command(TyperCommand):
    """An option of several values takes all that follow it: `--data a.txt b.txt`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {
            name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts
        }
        spread: list[str] = []
        option, is_first = "", False
        for arg in args:
            if arg.startswith("-") and not re.match(r"-$|-\.?\d", arg):
                option, is_first = arg if arg in several else "", True
                spread.append(arg)
            else:
                spread += [arg] if is_first or not option else [option, arg]
                is_first = False
        return super().parse_args(ctx, spread)


def _as_function(run: Callable[[Given], int | None], parameters: list[Parameter]) -> Callable[..., None]:
    """A function with these parameters, as typer reads them. It ends with `run`'s status; what users did wrong is one
    line for them."""

    def command(**values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None and value != []}
        raise typer.Exit(_status(lambda: run(given)))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _status(run: Callable[[], int | None]) -> int:
    try:
        return run() or 0
    except SettingsError as error:
        print(f"boomerang: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        text = "this needs torch, which is not installed: pip install 'boomerang-serve[torch]'"
        print(f"boomerang: {text}", file=sys.stderr)
        return 1
    except (BoomerangError, ValueError, OSError) as error:
        print(f"boomerang: {error}", file=sys.stderr)
        return 1


# --- commands: each says what runs and which flags it has


def _serve() -> Declared:
    def run(given: Given) -> int:
        if "model" in given:
            given.setdefault("teacher", given.pop("model"))
        settings = load_settings(given)
        gc.disable()  # what a start imports stays; looking through it for garbage would be a tenth of the time
        from server.observe.log import configure

        configure(settings.uvicorn_log_level, settings.log_format)
        # Until the server has its own handler: the first process of a container has no default for SIGTERM, and would
        # be killed at the end of the grace period.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        from server.process import serve

        return serve(settings)

    model = Annotated[str | None, typer.Argument(help="the teacher, as --teacher")]
    return run, [Parameter("model", Parameter.KEYWORD_ONLY, default=None, annotation=model), *flags(Settings)]


class PullOptions(BaseModel):
    """Flags of `pull`."""

    store: str | None = Field(None, description="folder of the local model store [env: BOOMERANG_STORE]")
    force: bool = Field(False, description="fetch again what is there")


def _pull() -> Declared:
    def run(given: Given) -> None:
        from model_store.sources import DEFAULT_TEACHER, pull
        from server.observe.log import configure

        configure()
        options = read_options(PullOptions, given)
        for model in given.get("models", [DEFAULT_TEACHER]):
            print(pull(model, options.store, force=options.force))

    text = "owner/name, owner/name@revision, owner/name:Q4_K_M, GGUF files; none: the default pair"
    models = Annotated[list[str] | None, typer.Argument(help=text)]
    return run, [Parameter("models", Parameter.KEYWORD_ONLY, default=None, annotation=models), *flags(PullOptions)]


def _sizes() -> Declared:
    from server.commands.sizes import SizesOptions, print_sizes

    return _with_settings(print_sizes, SizesOptions, "model")


def _chat() -> Declared:
    from server.commands.chat import ChatOptions, run_chat

    return _with_settings(run_chat, ChatOptions, *_OF_MODEL, "sizes")


def _latency() -> Declared:
    from server.commands.bench import LatencyOptions, run_latency

    return _with_settings(run_latency, LatencyOptions, *_OF_MODEL)


def _distill() -> Declared:
    from model_store.distill import DistillJob, run
    from server.offline import nested_codes, teacher_generator

    return lambda given: run(read_options(DistillJob, given), teacher_generator, nested_codes), flags(DistillJob)


def _evaluate() -> Declared:
    from model_store.evaluate import EvaluateJob, run
    from server.offline import nested_codes, pair_generator

    return lambda given: run(read_options(EvaluateJob, given), pair_generator, nested_codes), flags(EvaluateJob)


def _export() -> Declared:
    from model_store.export import ExportJob, run
    from server.offline import nested_codes

    return lambda given: run(read_options(ExportJob, given), nested_codes), flags(ExportJob)


def _simulate() -> Declared:
    from server.commands.simulate import SimulateOptions, run

    return lambda given: run(read_options(SimulateOptions, given)), flags(SimulateOptions)


def _with_settings(run: Callable[[Any, Settings], int], options: type[BaseModel], *groups: str) -> Declared:
    """A command with flags of its own beside those of some settings. It prints answers, so the log says only what is
    wrong."""

    def command(given: Given) -> int:
        from server.observe.log import configure

        own = read_options(options, given)
        settings = load_settings({name: value for name, value in given.items() if name not in options.model_fields})
        configure("warning")
        return run(own, settings)

    return command, [*flags(options), *flags(Settings, groups)]


_COMMANDS: dict[str, tuple[str, Callable[[], Declared]]] = {
    "serve": ("run the server", _serve),
    "pull": ("fetch models into the local store", _pull),
    "sizes": ("list the sizes of a pair", _sizes),
    "chat": ("talk to a model in the terminal", _chat),
    "bench latency": ("decode and prefill speed of every size", _latency),
    "distill": ("make a student for a teacher", _distill),
    "evaluate": ("measure what every size is worth", _evaluate),
    "export": ("write one size as an ordinary checkpoint", _export),
    "simulate": ("replay a trace against a simulated cluster", _simulate),
}
