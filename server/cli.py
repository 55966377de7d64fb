"""The `boomerang` command. Imports are lazy, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from model_store.errors import BoomerangError
from server.options import SettingsError, add_arguments, load_settings

# command -> (help, module that offers add_arguments(parser) and run(args) -> int)
_MODULES = {
    "distill": ("make a student for a teacher", "model_store.distill"),
    "evaluate": ("measure what every size is worth", "model_store.evaluate"),
    "export": ("write one size as an ordinary checkpoint", "model_store.export"),
    "simulate": ("replay a trace against a simulated cluster", "server.commands.simulate"),
}
# Commands of the model store that our engine speaks for: functions of server.offline that are their further arguments.
_GENERATORS = {
    "distill": ("teacher_generator", "nested_codes"),
    "evaluate": ("pair_generator", "nested_codes"),
    "export": ("nested_codes",),
}
_MODEL_GROUPS = ("model", "engine")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(argv[0] if argv else None)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] | None = getattr(arguments, "run", None)
    if run is None:
        parser.print_help()
        return 2
    try:
        return run(arguments) or 0
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
        print(
            "boomerang: this needs torch, which is not installed: pip install 'boomerang-serve[torch]'", file=sys.stderr
        )
        return 1
    except Exception as error:
        if not isinstance(error, BoomerangError | ValueError | OSError):
            raise
        print(f"boomerang: {error}", file=sys.stderr)
        return 1


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Only the chosen command's own arguments are declared in full; the others are one line of help."""
    from server.version import __version__

    parser = argparse.ArgumentParser(
        prog="boomerang",
        description="Serve every size between a student and its teacher from one copy of their tensors.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the server", formatter_class=_Formatter)
    serve.add_argument("model", nargs="?", help="the teacher, as --teacher")
    add_arguments(serve)
    serve.set_defaults(run=_serve)

    pull = commands.add_parser("pull", help="fetch models into the local store", formatter_class=_Formatter)
    pull.add_argument(
        "models",
        nargs="*",
        help="owner/name, owner/name@revision, owner/name:Q4_K_M, GGUF files; none: the default pair",
    )
    pull.add_argument("--store", help="folder of the local model store [env: BOOMERANG_STORE]")
    pull.add_argument("--force", action="store_true", help="fetch again what is there")
    pull.set_defaults(run=_pull)

    sizes = commands.add_parser("sizes", help="list the sizes of a pair", formatter_class=_Formatter)
    add_arguments(sizes, ("model",))
    sizes.add_argument("--json", action="store_true", help="print JSON")
    sizes.set_defaults(run=_sizes)

    chat = commands.add_parser("chat", help="talk to a model in the terminal", formatter_class=_Formatter)
    chat.add_argument("--url", help="a running server; without one, the pair is loaded here")
    chat.add_argument("--key", help="API key for --url [env: OPENAI_API_KEY]")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--max-tokens", type=int, default=512)
    add_arguments(chat, (*_MODEL_GROUPS, "sizes"))
    chat.set_defaults(run=_chat)

    bench = commands.add_parser("bench", help="measure this machine")
    kinds = bench.add_subparsers(title="benchmarks", metavar="KIND", required=True)
    latency = kinds.add_parser("latency", help="decode and prefill speed of every size", formatter_class=_Formatter)
    latency.add_argument("--sizes", help="sizes to measure, comma-separated (16L,30L) [all]")
    latency.add_argument("--batch-sizes", default="1,16", help="requests at once [1,16]")
    latency.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    latency.add_argument("--output-len", type=int, default=64, help="tokens decoded")
    latency.add_argument("--repeats", type=int, default=3, help="the median is reported")
    latency.add_argument("--json", metavar="FILE", help="write the result as JSON (- for standard output)")
    latency.add_argument("--no-save", action="store_true", help="do not keep the figures for `boomerang sizes`")
    add_arguments(latency, _MODEL_GROUPS)
    latency.set_defaults(run=_bench_latency)

    for name, (text, module) in _MODULES.items():
        sub = commands.add_parser(name, help=text, formatter_class=_Formatter)
        if command == name:
            try:
                implementation = importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
                sub.set_defaults(run=_missing(name, module))
                continue
            implementation.add_arguments(sub)
            sub.set_defaults(run=_with_engine(name, implementation.run))
    return parser


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)


def _with_engine(name: str, run: Callable[..., int]) -> Callable[[argparse.Namespace], int]:
    if name not in _GENERATORS:
        return run

    def run_with_engine(arguments: argparse.Namespace) -> int:
        from server import offline

        return run(arguments, *(getattr(offline, function) for function in _GENERATORS[name]))

    return run_with_engine


def _missing(name: str, module: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        print(f"boomerang: {name} is not part of this installation ({module} is missing)", file=sys.stderr)
        return 1

    return run


# --- commands


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.model and not arguments.teacher:
        arguments.teacher = arguments.model
    settings = load_settings(arguments)
    from server.observe.log import configure

    configure(settings.uvicorn_log_level, settings.log_format)
    # Until the server has its own handler: the first process of a container has no default for SIGTERM, and would be
    # killed at the end of the grace period.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from server.process import serve

    return serve(settings)


def _pull(arguments: argparse.Namespace) -> int:
    from model_store.sources import DEFAULT_TEACHER, pull
    from server.observe.log import configure

    configure()
    for model in arguments.models or [DEFAULT_TEACHER]:
        print(pull(model, arguments.store, force=arguments.force))
    return 0


def _sizes(arguments: argparse.Namespace) -> int:
    from server.commands.sizes import print_sizes
    from server.observe.log import configure

    settings = load_settings(arguments)
    configure("warning")
    return print_sizes(settings, as_json=arguments.json)


def _chat(arguments: argparse.Namespace) -> int:
    from server.commands.chat import run_chat
    from server.observe.log import configure

    settings = load_settings(arguments)
    configure("warning")
    return run_chat(arguments, settings)


def _bench_latency(arguments: argparse.Namespace) -> int:
    from server.commands.bench import run_latency
    from server.observe.log import configure

    settings = load_settings(arguments)
    configure("warning")
    return run_latency(arguments, settings)
