"""Make one of the generated models, if it is not there yet, and print its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgl_lmcache.cpu.model import RECIPES, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=RECIPES, help="bench: 0.3 GB, prefill costs seconds; tiny: 6 MB, for tests")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where models lie (default: in the user's cache)")
    arguments = parser.parse_args()
    print(make_model(RECIPES[arguments.model], arguments.out))


if __name__ == "__main__":
    main()
