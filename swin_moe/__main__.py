"""`python -m swin_moe COMMAND ...` is `swin-moe COMMAND ...`."""

from swin_moe.cli import main

main()
