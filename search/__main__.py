"""``python -m search`` is the command `uipe`, also where only the code has travelled and no command is installed."""

from search.cli.main import main

if __name__ == "__main__":
    main()
