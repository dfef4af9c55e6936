"""`python -m phikit.cli`, for an environment whose scripts are not on the path."""

from phikit.cli import main

main()
