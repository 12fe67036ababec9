"""`swin-moe demo RUN`: the command line."""

import argparse
import importlib.util
import sys
from typing import Any

from swin_moe.config.arguments import command_parser, exit_code
from swin_moe.config.mistaken import misplaced

_EXAMPLES = """examples:
  a run of yours, at http://127.0.0.1:7860
    swin-moe demo output/digits_swin_moe
  released weights, on another port
    swin-moe demo swin_tiny_patch4_window7_224 --port 8000
  a detector, from a file that does not tell its network
    swin-moe demo mask_rcnn_swin_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco checkpoint.load=FILE
  for others on this network, who then can send images to this machine
    swin-moe demo output/mine --host 0.0.0.0"""


def run(argv: list[str] | None = None) -> None:
    """Serves the page until Ctrl-C; ends with exit code 2 after one sentence about what is wrong."""
    from swin_moe.checkpoint.errors import describe

    sys.exit(exit_code(lambda: _serve(parse(argv)), describe))


main = run


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options; raises ValueError for wrong ones."""
    parser = command_parser(
        "demo",
        "A page on this machine: upload an image; its classes or objects, experts, attention and features.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("source", metavar="RUN", help="a run, a checkpoint, a file of weights, the name of released ones, or a config")
    add("overrides", metavar="key=value", nargs="*", help="options; checkpoint.load=PATH gives a config its weights")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    add("--port", type=int, default=7860, help="7860")
    options = parser.parse_intermixed_args(argv)
    if not 1 <= options.port <= 65535:
        raise ValueError(f"swin-moe demo: --port must be in [1, 65535], got {options.port}")
    wrong = [word for word in options.overrides if "=" not in word]
    if wrong:
        raise ValueError(f"swin-moe demo takes one RUN and options as key=value, got also {', '.join(wrong)}")
    if clause := misplaced(options.source):
        raise ValueError(f"{options.source} is no config and no run{clause}")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("swin-moe demo needs gradio, which is not installed: pip install 'swin-moe[demo]'")
    return options


def _serve(options: Any) -> None:
    from swin_moe.demo.app import build
    from swin_moe.demo.look import Observer
    from swin_moe.demo.networks import open_network

    page = build(Observer(open_network(options.source, options.overrides)), options.source)
    import gradio

    plain = ["system-ui", "sans-serif"]  # gradio's own come from another host
    theme = gradio.themes.Default(font=plain, font_mono=["monospace"])
    page.launch(server_name=options.host, server_port=options.port, theme=theme, share=False, footer_links=[])
