"""`python -m kvik.hf.conformance --cache dynamic --cache kvik`: exits with 1 if something is broken, 2 on bad usage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kvik.errors import KvikError, UsageError


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m kvik.hf.conformance",
        description="Checks caches for transformers against the same models without a cache, on tiny random weights.",
    )
    made.add_argument(
        "--cache", action="append", metavar="NAME",
        help="dynamic, dynamic:bare, static, quantized (fp8), quantized:quanto, quantized:hqq, kvik, kvik:SPEC, or "
        "module:Class, called with config=model.config if it has such a parameter, else with the model; several times "
        "for columns side by side (default: dynamic)",
    )  # fmt: skip
    made.add_argument(
        "--only", action="append", default=[], metavar="CASE", help="one case; may be given several times"
    )
    made.add_argument("--lossy", action="store_true", help="a module:Class stores less than it is given")
    made.add_argument("--list", action="store_true", help="name all cases and what must hold")
    made.add_argument("--json", action="store_true", help="print one JSON object instead")
    made.add_argument("--write", metavar="FILE", help="put the table between the markers of a markdown file as well")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite. Returns the exit code."""
    asked = parser().parse_args(arguments)
    try:
        return _run(asked)
    except KvikError as error:
        print(f"kvik: {error}", file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace) -> int:
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import Progress

    from kvik.hf.conformance import view
    from kvik.hf.conformance.caches import contender
    from kvik.hf.conformance.cases import chosen
    from kvik.hf.conformance.run import run

    cases = chosen(asked.only)
    if asked.list:
        print("\n".join(f"{case.name:26} {case.law}" for case in cases))
        return 0
    contenders = [contender(name, lossy=asked.lossy) for name in dict.fromkeys(asked.cache or ["dynamic"])]
    text = _read(asked.write) if asked.write else ""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    found = []
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(cases) * len(contenders))
        for each in contenders:
            for finding in run(each, cases):
                found.append(finding)
                bar.update(task, advance=1, description=f"{each.name}: {finding.case}")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if asked.json:
        print(json.dumps(view.as_json(contenders, cases, found, versions), indent=1))
    else:
        view.render(Console(), contenders, cases, found)
    if asked.write:
        Path(asked.write).write_text(view.between(text, view.markdown(contenders, cases, found, versions)))
    return int(any(finding.verdict.bad for finding in found))


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--write {name} can't be read: {error.strerror}; make it, with the two markers") from error


if __name__ == "__main__":
    sys.exit(main())
