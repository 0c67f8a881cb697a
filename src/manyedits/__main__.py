"""``python -m manyedits``."""

from manyedits.cli import main

main()
