"""`elastic train | search | export | evaluate | latency | space show | space import`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence

import elastic
from elastic import config

COMMANDS = {
    "train": (config.TrainConfig, "elastic.training.command", "train"),
    "search": (config.SearchConfig, "elastic.recovery.command", "search"),
    "export": (config.ExportConfig, "elastic.recovery.command", "export"),
    "evaluate": (config.EvaluateConfig, "elastic.evaluation.command", "evaluate_run"),
    "latency": (config.LatencyConfig, "elastic.latency.command", "time_run"),
    "space show": (config.SpaceShowConfig, "elastic.supernet.summary", "show_space"),
    "space import": (config.SpaceImportConfig, "elastic.spaces.nncf", "import_space"),
}


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    """Who reads the output may stop before its end, as `head` does: that ends the command without a
    traceback, as https://docs.python.org/3/library/signal.html#note-on-sigpipe has it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # at exit it would be too late to say nothing
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


@_unread()
def main(arguments: Sequence[str] | None = None, prog: str = "elastic") -> int:
    """Run one command; the exit code is 0, 1 for an error, 2 for a budget nobody meets."""
    from elastic.errors import ConfigError, unknown

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(prog))
        return 0
    if arguments[0] == "--version":
        print(elastic.__version__)
        return 0
    words = 2 if arguments[0] == "space" else 1
    command = " ".join(arguments[:words])
    if command not in COMMANDS:
        return _fail(ConfigError(unknown("command", command, COMMANDS)))
    return run(command, arguments[words:], prog=f"{prog} {command}")


@_unread()
def run(command: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse, call, print: what each entry does."""
    from elastic.config.parsing import parse
    from elastic.console import busy, end_bars
    from elastic.distributed import is_main
    from elastic.errors import BudgetError, ElasticError

    kind, module, function = COMMANDS[command]
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries do not belong in a log
    # It asks for kernels to multiply by packed layers when imported; here they are dequantised.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    parsed: object = None
    try:
        parsed = parse(kind, arguments, prog)
        # After parsing: --help never waits for torch.
        with busy("loading libraries"):
            called = getattr(importlib.import_module(module), function)
        with _counted():
            result = called(parsed)
    except BudgetError as error:
        return _fail(error, 2)
    except ElasticError as error:
        return _fail(error, hint=_moved(parsed, error))
    except OSError as error:  # a full disk under the Trainer's checkpoints, a folder not ours
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    finally:
        end_bars()
    if is_main():
        result.show()
    return 0


def _counted() -> contextlib.AbstractContextManager[None]:
    """What transformers loads, by whichever format, if the command uses it at all."""
    if "transformers" not in sys.modules:
        return contextlib.nullcontext()
    from elastic.models.loading import counted

    return counted()


def _fail(error: Exception, code: int = 1, hint: str = "") -> int:
    print(f"error: {error}{hint}", file=sys.stderr)
    return code


def _moved(parsed: object, error: Exception) -> str:
    """How to say where a run's base or data are now, where that is what is wrong."""
    from elastic.errors import DataMissing, ModelError

    if not isinstance(error, DataMissing | ModelError) or isinstance(parsed, config.TrainConfig):
        return ""
    from elastic.run import MOVABLE, Run

    run = Run(getattr(parsed, "run", None) or "")
    if not run.data.is_file():
        return ""
    trained = run.begun()
    for name in MOVABLE:
        part, _, setting = name.partition(".")
        path = getattr(getattr(trained, part), setting)
        if path and path in str(error):
            return (
                f"; if it has moved: elastic train --config {run.config_file} --run {run.path} "
                f"--{name} NEW"
            )
    return ""


def _usage(prog: str) -> str:
    lines = [f"usage: {prog} COMMAND [RUN] [--config FILE] [--setting value ...]", ""]
    for name, (kind, *_) in COMMANDS.items():
        lines.append(f"  {name:<12} {(kind.__doc__ or '').split('.')[0].split(';')[0]}.")
    return "\n".join([*lines, "", f"{prog} COMMAND --help lists the settings of a command."])


if __name__ == "__main__":
    sys.exit(main())
