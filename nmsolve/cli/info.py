"""The command ``nmsolve info``: what is installed, and which backends can run here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from nmsolve.about import __version__, versions
from nmsolve.backends.devices import devices
from nmsolve.cli.command import Command, exit_codes

__all__ = ["COMMAND"]

EPILOG = f"""\
examples:
  nmsolve info
  nmsolve info --json

{exit_codes()}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> None:
    found = devices()
    if args.json:
        data = {
            "nmsolve": __version__,
            "versions": versions(),
            "devices": [asdict(device) for device in found],
        }
        print(json.dumps(data, indent=2))
        return
    print(f"nmsolve {__version__}")
    for package, version in versions().items():
        print(f"  {package:<12} {version or 'not installed'}")
    for device in found:
        print(f"{device.name}: {device.description}")
        for name, reason in device.backends.items():
            taken = ", and auto takes it" if name == device.auto else ""
            print(f"  {name:<12} {f'cannot run: {reason}' if reason else f'can run{taken}'}")


COMMAND = Command(
    "info",
    "what is installed, and which backends can run here",
    "Versions, devices, and which backends can run on them (or why they cannot).",
    EPILOG,
    add_options,
    run,
)
