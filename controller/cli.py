"""The command line: `kvstrata demo | bench | node | check | stats | results`.

Only the arguments are here; what a command does is imported once it is chosen, so that `--help`
answers at once. Exit status: 0 well, 1 something is not as it should be, 2 no node store answers
or the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvstrata import __version__
from kvstrata.core.errors import KVStrataError, NodeUnavailable

EXIT_WRONG = 1
EXIT_UNREACHABLE = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status. An error that was foreseen is one sentence."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except NodeUnavailable as error:
        return _fail(options.command, error, EXIT_UNREACHABLE)
    except KVStrataError as error:
        return _fail(options.command, error, EXIT_WRONG)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone, e.g. `| head`
        return EXIT_WRONG


def _fail(command: str, error: KVStrataError, status: int) -> int:
    print(f"kvstrata {command}: {error}", file=sys.stderr)
    return status


def _run(options: argparse.Namespace) -> int:
    if options.command == "demo":
        from kvstrata.controller.demo.command import demo

        return demo(options)
    if options.command == "bench":
        from kvstrata.controller.bench.command import bench

        return bench(options)
    if options.command == "results":
        from kvstrata.controller import cli_results

        return cli_results.run(options)
    from kvstrata.controller import cli_node

    return cli_node.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvstrata", description="Keeps the KV cache of stock vLLM in host memory and gives it back."
    )
    parser.add_argument("--version", action="version", version=f"kvstrata {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="show kvstrata at work with real engines, in minutes"))
    _add_bench(commands.add_parser("bench", help="measure copies and serving on this machine's GPU"))
    _add_node(commands.add_parser("node", help="run this host's node store in the foreground, or end it"))
    check = commands.add_parser(
        "check", help="ask the running node store whether its books are right; exit 1 if not"
    )
    stats = commands.add_parser("stats", help="sizes and counters of the running node store")
    for command in (check, stats):
        _add_config(command)
        command.add_argument("--json", action="store_true", help="print data instead of text")
    _add_results(commands.add_parser("results", help="the measured figures, missed goals first"))
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration (YAML); without it, the file that KVSTRATA_CONFIG names",
    )
    parser.add_argument(
        "--runtime-dir", metavar="DIR", help="where the node store's sockets lie, instead of node.runtime_dir"
    )


def _port(text: str) -> int:
    """The first of three. Raises ArgumentTypeError."""
    if not text.isdecimal() or not 1 <= int(text) <= 65533:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 1 to 65533")
    return int(text)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--gpu", action="store_true", help="the vLLM of this Python runs on a GPU")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a chat model; without it SmolLM2-135M-Instruct is made"
    )
    parser.add_argument("--port", type=_port, metavar="N", help="first port to use; without it, free ones")
    parser.add_argument("--quick", action="store_true", help="fewer questions: faster, less exact")
    parser.add_argument("--keep", action="store_true", help="keep the engines' logs")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    copy = what.add_parser("copy", help="chunks between a GPU's KV cache and host memory")
    serving = what.add_parser("serve", help="vLLM with kvstrata, without, and with other connectors")
    for one in (copy, serving):
        one.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    serving.add_argument("--runner", choices=("v1", "v2"), default="v2", help="vLLM's model runner (v2)")
    serving.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="engines to compare, all at once on one GPU (plain kvstrata offload lmcache); each takes 18 GiB"
        " of its memory and --kv-gib. Ours may have settings: kvstrata:client.save=false,client.packing=off",
    )
    serving.add_argument(
        "--kv-gib", type=float, default=14.0, metavar="N", help="GPU memory for KV, each (14)"
    )
    serving.add_argument(
        "--pool-gib", type=int, default=26, metavar="N", help="host memory for KV, each (26)"
    )
    serving.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="of the KV cache (auto)")


def _add_node(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stop", action="store_true", help="ask the running one to end")
    what.add_argument("--status", action="store_true", help="say whether one runs; exit 2 if none does")
    parser.add_argument(
        "--force", action="store_true", help="with --stop: also while engines are connected to it"
    )
    parser.add_argument("--json", action="store_true", help="print data instead of text")


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results"),
        metavar="DIR",
        help="folder of the kept results (docs/results)",
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite the table in FILE instead")
    parser.add_argument(
        "--check", action="store_true", help="with --readme: write nothing, exit 1 if out of date"
    )
    parser.add_argument("--json", action="store_true", help="print data instead of text")


if __name__ == "__main__":
    sys.exit(main())
