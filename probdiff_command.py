"""The command ``probdiff``. It lies outside of the package, so that Ctrl-C is heard while the package is imported."""

import sys


def main():
    """Run :func:`probdiff.cli.main`; returns the exit code."""
    try:
        from probdiff.cli import main

        return main()
    except KeyboardInterrupt:
        print("\nprobdiff: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
