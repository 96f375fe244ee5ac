"""`python -m turbo_client` is the `turbodiffusion` command."""

from turbo_client.cli import main

main()
