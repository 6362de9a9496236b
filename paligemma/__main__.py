"""`python -m paligemma` is the command `paligemma`."""

from paligemma.cli import main

if __name__ == "__main__":
    main()
