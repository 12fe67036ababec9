"""`python -m swin_moe.predict`, as other entry points are started."""

from swin_moe.predict.command import main
from swin_moe.run.session import run_main

if __name__ == "__main__":
    run_main(main)
