"""The `dualdiff` command: one file per verb, `main` puts them together."""

from dualdiff_engine.cli.main import main as main
