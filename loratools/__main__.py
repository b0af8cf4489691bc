"""`python -m loratools` is the command line."""

from loratools.cli import main

if __name__ == "__main__":
    main()
