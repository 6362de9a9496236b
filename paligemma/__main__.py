"""`python -m paligemma` is the command `paligemma`."""

from paligemma.cli.main import main

if __name__ == "__main__":
    main()
