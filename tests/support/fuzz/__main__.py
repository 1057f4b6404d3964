"""The fuzz as a program: see `--help`. Its exit code is 1 where a call failed."""

import argparse
import sys

from .main import DEFAULT_SEED, fuzz, number_or_random

parser = argparse.ArgumentParser(prog="python -m fuzz", description="Random calls against float64.")
parser.add_argument(
    "--seed", type=number_or_random, default=DEFAULT_SEED, help="of the shapes: a number or random"
)
parser.add_argument(
    "--data-seeds", default="", help="numbers, or random, with commas between; by default the seed"
)
parser.add_argument("--calls", type=int, default=2000, help="for each data seed")
parser.add_argument("--shapes", type=int, default=160, help="cases, each of which is compiled once")
parser.add_argument(
    "--implementation", default="", help="names with commas between; a case draws one of them"
)
parser.add_argument("--sizes", choices=("gpu", "cpu"), default="gpu")
parser.add_argument("--processes", type=int, default=16, help="0: this one alone")
parser.add_argument(
    "--seconds", type=float, default=480, help="after which what still runs is ended, and fails"
)
parser.add_argument(
    "--replay", default="", help="one call, by its name SEED.SHAPE/SEED.CALL, in this process"
)
parser.add_argument("--json", default="", help="a file for counts and failures")

if __name__ == "__main__":
    given = vars(parser.parse_args())
    given["data_seeds"] = [number_or_random(x) for x in given["data_seeds"].split(",") if x]
    given["implementations"] = tuple(filter(None, given.pop("implementation").split(",")))
    sys.exit(0 if fuzz(**given).passed else 1)
