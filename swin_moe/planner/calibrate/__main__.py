"""`python -m swin_moe.planner.calibrate`, also as a rank: swin-moe launch -n 2 -- -m swin_moe.planner.calibrate."""

from swin_moe.planner.calibrate.command import run

if __name__ == "__main__":
    run()
