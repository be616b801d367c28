"""`python -m erasekit`."""

from erasekit.cli import main

if __name__ == "__main__":
    main()
