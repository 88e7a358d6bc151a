"""`python -m producer.cli` is `millrace`."""

from producer.cli import main

main()
